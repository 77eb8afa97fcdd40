"""Compress log p: only the best channels of each class, quantised to 256 levels. Pure functions."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from parchgrad._io.checks import is_number
from parchgrad.errors import SettingError, StatisticsError

__all__ = ["COMPACT_PARTS", "check_share", "compact_log_p", "expand_log_p", "keep_share"]

COMPACT_PARTS = ("classes", "held", "level", "levels")
"""Names of the tensors returned by `compact_log_p`."""

_LEVELS = 256
# Most entries of a layer: a fixed number, plus this many per stored value.
_FREE, _PER_VALUE = 2**24, 100


def check_share(share: float) -> None:
    """Raise `SettingError` unless `share` lies in (0, 1]."""
    if not is_number(share) or not 0 < share <= 1:
        raise SettingError(f"`share` is {share!r}, but it must lie in (0, 1]: the share of channels to keep.")


def keep_share(log_p: Tensor, share: float) -> Tensor:
    """Set log p to zero (p = 1) for all but the best channels of each class.

    Args:
        log_p: natural log of p per channel and class, shape (C, K).
        share: share of the channels to keep for each class, in (0, 1].

    Returns:
        Log p of the same shape.

    Raises:
        SettingError: if `share` is out of range.

    Example:
        >>> keep_share(torch.tensor([[-3.0, -1.0], [-2.0, -4.0]]), 0.5)
        tensor([[-3.,  0.],
                [ 0., -4.]])
    """
    check_share(share)
    kept = max(1, round(share * len(log_p)))
    return torch.where(log_p <= log_p.kthvalue(kept, dim=0).values, log_p, 0.0)


def compact_log_p(log_p: Tensor) -> dict[str, Tensor]:
    """Store log p as one bit per entry, plus one byte per nonzero entry.

    Values are rounded to the nearest of 256 levels, quantiles of the values, so the ranking of channels is kept up to
    ties between neighbours.

    Args:
        log_p: natural log of p per channel and class, shape (C, K), at most zero.

    Returns:
        `classes` (number of classes K), `held` (bit mask of nonzero entries), `level` (index per nonzero entry), and
        `levels` (their values, float32).

    Example:
        >>> compact = compact_log_p(torch.tensor([[-3.0, 0.0, -1.0]]))
        >>> expand_log_p(compact, 1)
        tensor([[-3.,  0., -1.]])
    """
    values = log_p.double().numpy().ravel()
    held = values < 0
    values = values[held]
    # Finer levels for the best channels, where thresholds usually fall.
    levels = np.quantile(values, np.linspace(0, 1, _LEVELS) ** 1.5) if len(values) else np.zeros(_LEVELS)
    nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, values)
    return {
        "classes": torch.tensor(log_p.shape[1], device="cpu"),
        "held": torch.from_numpy(np.packbits(held)),
        "level": torch.from_numpy(nearest.astype(np.uint8)),
        "levels": torch.from_numpy(levels.astype(np.float32)),
    }


def expand_log_p(compact: Mapping[str, Tensor], channels: int) -> Tensor:
    """Restore log p, shape (C, K), float32.

    Raises:
        StatisticsError: if the parts are inconsistent.
    """
    classes, held, level, levels = (compact[part] for part in COMPACT_PARTS)
    kinds = (classes.dtype, held.dtype, level.dtype, levels.dtype)
    if kinds != (torch.int64, torch.uint8, torch.uint8, torch.float32) or classes.dim() or levels.shape != (_LEVELS,):
        raise StatisticsError("A part of log p has the wrong type or shape. Collect the statistics again.")
    size = channels * int(classes)
    if int(classes) < 1 or tuple(held.shape) != (-(-size // 8),):
        raise StatisticsError(
            "The bit mask of log p does not match the number of channels. Collect the statistics again."
        )
    if size > _FREE + _PER_VALUE * level.numel():
        # A small file of zero bits must not fill the memory.
        raise StatisticsError(
            f"log p has {channels} channels and {int(classes)} classes, but only {level.numel()} values. "
            "Collect the statistics again."
        )
    mask = np.unpackbits(held.numpy(), count=size).astype(bool)
    if tuple(level.shape) != (mask.sum(),):
        raise StatisticsError("log p does not have as many values as its bit mask. Collect the statistics again.")
    log_p = np.zeros(size, dtype=np.float32)
    log_p[mask] = levels.numpy()[level.numpy()]
    return torch.from_numpy(log_p.reshape(channels, -1))
