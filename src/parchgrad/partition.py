"""The edit: a gradient and a channel mask in, the partitioned gradient out. Pure functions, no state.

Source: Park, Jeon, Choi (2023), "Partitioned Channel Gradient for Reliable Input Attribution".

Per row of the batch, with ``g`` the gradient at a convolution's output, ``H`` the kept channels and ``L`` the rest:
``G_H`` and ``G_L`` are the sums of ``g`` over the channels of either group, ``M`` and ``N`` the variances of these
sums over the spatial positions. With ``gamma`` infinite L is pruned and H scaled by ``beta``; with ``gamma`` finite H
is scaled by ``beta * gamma * sqrt(N / M)`` and L by ``beta``.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from parchgrad.checks import check_kind, is_number
from parchgrad.errors import SettingError

__all__ = [
    "Conserve",
    "at_least_float32",
    "check_channel_mask",
    "check_edit_settings",
    "check_position_weights",
    "partition_gradient",
    "pruning_scale",
    "rounding_error",
    "safe_norm",
    "without_autocast",
]

Conserve = Literal["independent", "exact", "none"]
_WAYS = get_args(Conserve)


def check_edit_settings(gamma: float, conserve: str) -> None:
    """Raise `SettingError` unless `gamma` and `conserve` are settings that `partition_gradient` knows."""
    if not is_number(gamma) or not gamma > 0:
        raise SettingError(f"gamma is {gamma!r}, but it must be a positive number; infinity prunes the other channels.")
    if conserve not in _WAYS:
        raise SettingError(f"conserve is {conserve!r}, but it must be one of {', '.join(_WAYS)}.")


def check_channel_mask(channel_mask: Tensor, gradient: Tensor) -> None:
    """Raise `SettingError` unless the mask is boolean, with a row for each row of the gradient."""
    for name, value in (("gradient", gradient), ("channel_mask", channel_mask)):
        check_kind(name, value, Tensor, "turn it with torch.as_tensor")
    if not gradient.is_floating_point():
        raise SettingError(f"gradient is {gradient.dtype}, but it must hold floating-point numbers; call .float().")
    if channel_mask.dtype != torch.bool or channel_mask.shape != gradient.shape[:2]:
        raise SettingError(
            f"channel_mask is {channel_mask.dtype} of shape {tuple(channel_mask.shape)}, but the gradient of shape "
            f"{tuple(gradient.shape)} needs a boolean mask of shape {tuple(gradient.shape[:2])}."
        )


def check_position_weights(position_weights: Tensor, gradient: Tensor) -> None:
    """Raise `SettingError` unless the weights have a number for each row and position of the gradient."""
    wanted = (gradient.shape[0], *gradient.shape[2:])
    if not position_weights.is_floating_point() or position_weights.shape != wanted:
        raise SettingError(
            f"position_weights is {position_weights.dtype} of shape {tuple(position_weights.shape)}, but the gradient "
            f"of shape {tuple(gradient.shape)} needs floating-point weights of shape {wanted}."
        )


def partition_gradient(
    gradient: Tensor,
    channel_mask: Tensor,
    *,
    gamma: float = math.inf,
    conserve: Conserve = "independent",
) -> Tensor:
    """Prune or damp the channels outside the mask and re-scale those inside, row by row.

    A row whose mask is all true or all false passes unchanged. Where the kept sum has no variance over space (up to
    the rounding of the sum itself), nothing is re-scaled. Multiplying the gradient by any constant multiplies the
    result by the same constant. Half precision is summed and scaled in float32.

    Args:
        gradient: gradient at a convolution's output, shape (B, C, *S) with any number of spatial dimensions.
        channel_mask: boolean, shape (B, C); true for the channels that matter (H).
        gamma: how many times stronger than L's the summed signal of H becomes; in (0, inf].
        conserve: what keeps the layer's variance: `"independent"` takes H and L as uncorrelated, `"exact"` measures
            the sum before and after, `"none"` leaves it.

    Returns:
        A new tensor of the shape, dtype and device of `gradient`.

    Raises:
        SettingError: if `gamma` or `conserve` is out of range, or the mask does not fit the gradient.

    Example:
        >>> gradient = torch.tensor([[[1.0, -1.0], [2.0, -2.0]]])
        >>> partition_gradient(gradient, torch.tensor([[True, False]]))
        tensor([[[ 2.2361, -2.2361],
                 [ 0.0000, -0.0000]]])
    """
    check_edit_settings(gamma, conserve)
    check_channel_mask(channel_mask, gradient)
    if gradient.numel() == 0:
        return gradient.clone()
    wide = at_least_float32(gradient)
    with without_autocast(gradient.device.type):
        sums = _group_sums(wide, channel_mask)
    if math.isinf(gamma):
        kept_scale = pruning_scale(sums.kept, sums.kept + sums.rest, sums.kept_rounding, conserve=conserve)
        rest_scale = torch.zeros_like(kept_scale)
    else:
        kept_scale, rest_scale = _damping_scales(sums, gamma=gamma, conserve=conserve)
    scale = torch.where(channel_mask, kept_scale.unsqueeze(1), rest_scale.unsqueeze(1))
    one_sided = (channel_mask.all(1) | ~channel_mask.any(1)).unsqueeze(1)
    scale = scale.masked_fill(one_sided, 1.0).to(wide.dtype)
    return (wide * scale.reshape(*scale.shape, *[1] * (gradient.dim() - 2))).to(gradient.dtype)


def pruning_scale(kept: Tensor, total: Tensor, kept_rounding: Tensor, *, conserve: Conserve) -> Tensor:
    """Factor of H where L is pruned (gamma infinite), from sums over channels alone.

    Args:
        kept: the gradient summed over H, shape (B, *S).
        total: the gradient summed over all channels, shape (B, *S).
        kept_rounding: see `rounding_error`, shape (B,).
        conserve: see `partition_gradient`.

    Returns:
        Beta of each row, shape (B,), in the dtype of `kept`.

    Example:
        >>> kept, total = torch.tensor([[1.0, -1.0]]), torch.tensor([[3.0, -3.0]])
        >>> pruning_scale(kept, total, torch.zeros(1), conserve="independent")
        tensor([2.2361])
    """
    if conserve == "none":
        return torch.ones_like(kept_rounding, dtype=kept.dtype)
    other = total - kept if conserve == "independent" else total
    of_kept, of_other = _strength(torch.stack((kept, other))).unbind()
    if kept.shape[1:].numel() == 1:
        beta = ((of_kept + of_other) if conserve == "independent" else of_other).div_(of_kept).sqrt_()
    else:
        beta = (torch.hypot(of_kept, of_other) if conserve == "independent" else of_other) / of_kept
    return beta.masked_fill_(of_kept <= kept_rounding, 1.0).to(kept.dtype)


def rounding_error(values: Tensor, channels: int) -> Tensor:
    """How large the error of a sum over channels may be, as `_strength` measures signals, shape (B,).

    Args:
        values: what is summed, shape (B, K, *S).
        channels: number of channels C of the layer, of which these are some.
    """
    positions = max(1, values.shape[2:].numel())
    # The error of a sum grows like sqrt(C) times the summed magnitudes, here their mean over space.
    factor = torch.finfo(values.dtype).eps * math.sqrt(channels / positions)
    # Scaled first: the sum of huge values would overflow.
    return values.mul(factor).abs_().sum(dim=tuple(range(1, values.dim())))


def safe_norm(values: Tensor, *, dim: int | tuple[int, ...]) -> Tensor:
    """Euclidean norm over some dimensions, in which the squares of tiny values do not vanish.

    Example:
        >>> safe_norm(torch.tensor([3e-30, 4e-30]), dim=0)
        tensor(5.0000e-30, dtype=torch.float64)
    """
    norm: Tensor
    if values.dtype != torch.float64 and values.device.type != "mps":
        norm = torch.linalg.vector_norm(values, dim=dim, dtype=torch.float64)
        return norm
    # No wider type is there: the values are divided by their peak.
    peak = values.abs().amax(dim=dim, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    norm = torch.linalg.vector_norm(values / peak, dim=dim)
    return norm * peak.amax(dim=dim)


def without_autocast(device: str) -> AbstractContextManager[object]:
    """A context in which products are not run in half precision, though the backward pass is in an autocast block."""
    # Of a device that knows no autocast the question itself is an error.
    running = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if running else nullcontext()


def at_least_float32(values: Tensor) -> Tensor:
    """Convert half precision to float32 and leave wider types as they are."""
    return values.float() if values.dtype.itemsize < 4 else values


class _Groups(NamedTuple):
    """Summed gradients of H and L, each (B, S), and how large their rounding errors may be, each (B,)."""

    kept: Tensor
    rest: Tensor
    kept_rounding: Tensor
    rest_rounding: Tensor


def _group_sums(gradient: Tensor, channel_mask: Tensor) -> _Groups:
    """Sum the gradient over the channels inside and outside the mask."""
    batch, channels, *spatial = gradient.shape
    flat = gradient.reshape(batch, channels, math.prod(spatial))
    weights = torch.stack((channel_mask, ~channel_mask), dim=1).to(gradient.dtype)
    kept, rest = torch.bmm(weights, flat).unbind(1)
    magnitudes = flat.abs().mean(dim=2).unsqueeze(1)
    factor = math.sqrt(flat.shape[2])
    errors = [rounding_error(part.unsqueeze(2), channels) * factor for part in (weights * magnitudes).unbind(1)]
    return _Groups(kept, rest, *errors)


def _damping_scales(groups: _Groups, *, gamma: float, conserve: Conserve) -> tuple[Tensor, Tensor]:
    """Factors of H and of L for a finite gamma, each (B,)."""
    errors = torch.stack((groups.kept_rounding, groups.rest_rounding))
    kept, rest = _above(_strength(torch.stack((groups.kept, groups.rest))), errors)
    ones = torch.ones_like(kept)
    single = groups.kept.shape[1] == 1
    usable = kept > 0
    # sqrt(N / M); what a row without M gives is replaced at the end.
    ratio = _root_ratio(rest, kept, single)

    if conserve == "none":
        kept_scale, rest_scale = gamma * ratio, ones
    elif conserve == "exact":
        # g_hat and 1, divided by their length: g_hat itself may overflow.
        length = torch.hypot(ones, gamma * ratio)
        gain = torch.hypot(ones, 1 / (gamma * ratio)).reciprocal()
        damping = length.reciprocal()
        edited = gain.unsqueeze(1) * groups.kept + damping.unsqueeze(1) * groups.rest
        errors = torch.stack(
            (errors.sum(dim=0), gain * groups.kept_rounding + damping * groups.rest_rounding),
        )
        before, after = _above(_strength(torch.stack((groups.kept + groups.rest, edited.to(groups.kept)))), errors)
        beta = _root_ratio(before, after, single)
        usable = usable & (after > 0)
        # A magnitude stands for a variance there, and grows with the length rather than with its square.
        beta = beta * length.sqrt() if single else beta
        kept_scale, rest_scale = beta * gain, beta * damping
    else:
        # With M g_hat^2 = gamma^2 N put into the equations: an edited sum without variance, N = 0, stays.
        kept_scale = gamma / math.hypot(1.0, gamma) * torch.hypot(ones, ratio)
        rest_scale = torch.hypot(ones, 1 / ratio) / math.hypot(1.0, gamma)
        usable = usable & (rest > 0)
    return torch.where(usable, kept_scale, ones), torch.where(usable, rest_scale, ones)


def _root_ratio(numerator: Tensor, denominator: Tensor, single: bool) -> Tensor:
    """Square root of the ratio of two variances, given as deviations; of a single position as magnitudes."""
    ratio = numerator / denominator
    # The root last: that of an odd power of two would round, and the edit would not scale exactly.
    return ratio.sqrt() if single else ratio


def _above(strength: Tensor, rounding: Tensor) -> Tensor:
    """Zero where it is no more than the given rounding error."""
    return torch.where(strength > rounding, strength, 0.0)


def _strength(signal: Tensor) -> Tensor:
    """Deviation over space of summed signals (N, B, *S), or their magnitude at a single position, shape (N, B).

    The root of the sum of squares, which is sqrt(S - 1) times the standard deviation: only ratios of it are of use.
    """
    if signal.shape[2:].numel() == 1:
        return signal.abs().flatten(1)
    positions = tuple(range(2, signal.dim()))
    return safe_norm(signal - signal.mean(dim=positions, keepdim=True), dim=positions)
