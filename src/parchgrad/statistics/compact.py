"""Log p in little space: the best channels of each class only, at 256 levels. Pure functions."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from parchgrad.checks import is_number
from parchgrad.errors import SettingError, StatisticsError

__all__ = ["COMPACT_PARTS", "check_share", "compact_log_p", "expand_log_p", "keep_share"]

COMPACT_PARTS = ("classes", "held", "level", "levels")
"""Names of the tensors that `compact_log_p` gives."""

_LEVELS = 256
# Entries that a layer may have whatever is held of them, and as many more for each value.
_FREE, _PER_VALUE = 2**24, 100


def check_share(share: float) -> None:
    """Raise `SettingError` unless a share of the channels can be kept."""
    if not is_number(share) or not 0 < share <= 1:
        raise SettingError(f"share is {share!r}, but it must lie in (0, 1]: the share of the channels that is held.")


def keep_share(log_p: Tensor, share: float) -> Tensor:
    """Set all but the best channels of each class to zero, hence p = 1.

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
    """Store log p in a bit per entry, and a byte per entry that is not zero.

    A value becomes the nearest of 256 levels, which are quantiles of the values: the order of channels stays, but for
    ties between neighbours.

    Args:
        log_p: natural log of p per channel and class, shape (C, K), at most zero.

    Returns:
        `classes` (their number K), `held` (bits of the entries that are not zero), `level` (of each of these), and
        `levels` (the values, float32).

    Example:
        >>> compact = compact_log_p(torch.tensor([[-3.0, 0.0, -1.0]]))
        >>> expand_log_p(compact, 1)
        tensor([[-3.,  0., -1.]])
    """
    values = log_p.double().numpy().ravel()
    held = values < 0
    values = values[held]
    # The best channels are cut apart most often, so that levels lie closer there.
    levels = np.quantile(values, np.linspace(0, 1, _LEVELS) ** 1.5) if len(values) else np.zeros(_LEVELS)
    nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, values)
    return {
        "classes": torch.tensor(log_p.shape[1]),
        "held": torch.from_numpy(np.packbits(held)),
        "level": torch.from_numpy(nearest.astype(np.uint8)),
        "levels": torch.from_numpy(levels.astype(np.float32)),
    }


def expand_log_p(compact: Mapping[str, Tensor], channels: int) -> Tensor:
    """Give log p back, shape (C, K), float32.

    Raises:
        StatisticsError: if the parts do not fit each other.
    """
    classes, held, level, levels = (compact[part] for part in COMPACT_PARTS)
    kinds = (classes.dtype, held.dtype, level.dtype, levels.dtype)
    if kinds != (torch.int64, torch.uint8, torch.uint8, torch.float32) or classes.dim() or levels.shape != (_LEVELS,):
        raise StatisticsError("log p has parts of another type or shape; collect the statistics again.")
    size = channels * int(classes)
    if int(classes) < 1 or tuple(held.shape) != (-(-size // 8),):
        raise StatisticsError("log p has bits for another number of channels; collect the statistics again.")
    if size > _FREE + _PER_VALUE * level.numel():
        # Nearly nothing but bits of zero: a small file would fill the memory.
        raise StatisticsError(
            f"log p has {channels} channels and {int(classes)} classes, but values of {level.numel()} entries alone; "
            "collect the statistics again."
        )
    mask = np.unpackbits(held.numpy(), count=size).astype(bool)
    if tuple(level.shape) != (mask.sum(),):
        raise StatisticsError("log p has another number of values than bits; collect the statistics again.")
    log_p = np.zeros(size, dtype=np.float32)
    log_p[mask] = levels.numpy()[level.numpy()]
    return torch.from_numpy(log_p.reshape(channels, -1))
