"""The edit: a gradient and a channel mask in, the partitioned gradient out. Pure functions, no state.

Source: Park, Jeon, Choi (2023), "Partitioned Channel Gradient for Reliable Input Attribution".

Per row of the batch, with ``g`` the gradient at a convolution's output, ``H`` the kept channels and ``L`` the rest:
``G_H`` and ``G_L`` are the sums of ``g`` over the channels of either group, ``M`` and ``N`` the variances of these
sums over the spatial positions. With ``gamma`` infinite L is pruned and H scaled by ``beta``; with ``gamma`` finite H
is scaled by ``beta * gamma * sqrt(N / M)`` and L by ``beta``.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from parchgrad.errors import SettingError

__all__ = ["Conserve", "at_least_float32", "check_edit_settings", "partition_gradient"]

Conserve = Literal["independent", "exact", "none"]


def check_edit_settings(gamma: float, conserve: str) -> None:
    """Raise `SettingError` unless `gamma` and `conserve` are settings that `partition_gradient` knows."""
    if not isinstance(gamma, int | float) or not gamma > 0:
        raise SettingError(f"gamma is {gamma!r}, but it must be a positive number; infinity prunes the other channels.")
    if conserve not in get_args(Conserve):
        raise SettingError(f"conserve is {conserve!r}, but it must be one of {', '.join(get_args(Conserve))}.")


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
    if channel_mask.dtype != torch.bool or channel_mask.shape != gradient.shape[:2]:
        raise SettingError(
            f"channel_mask is {channel_mask.dtype} of shape {tuple(channel_mask.shape)}, but the gradient of shape "
            f"{tuple(gradient.shape)} needs a boolean mask of shape {tuple(gradient.shape[:2])}."
        )
    if gradient.numel() == 0:
        return gradient.clone()
    wide = at_least_float32(gradient)
    # A backward pass inside an autocast block would run the sums in half precision.
    with torch.autocast(gradient.device.type, enabled=False):
        groups = _group_sums(wide, channel_mask)
    kept_scale, rest_scale = _group_scales(groups, gamma=gamma, conserve=conserve)
    scale = torch.where(channel_mask, kept_scale.unsqueeze(1), rest_scale.unsqueeze(1))
    one_sided = (channel_mask.all(1) | ~channel_mask.any(1)).unsqueeze(1)
    scale = scale.masked_fill(one_sided, 1.0)
    return (wide * scale.reshape(*scale.shape, *[1] * (gradient.dim() - 2))).to(gradient.dtype)


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
    # The error of a sum of C numbers grows like sqrt(C) times their summed magnitude, here averaged over space.
    magnitude = torch.linalg.vector_norm(flat, 1, dim=2) / flat.shape[2]
    rounding = (weights * magnitude.unsqueeze(1)).sum(2) * (torch.finfo(gradient.dtype).eps * math.sqrt(channels))
    return _Groups(kept, rest, *rounding.unbind(1))


def _group_scales(groups: _Groups, *, gamma: float, conserve: Conserve) -> tuple[Tensor, Tensor]:
    """Factors of H and of L, each (B,)."""
    kept = _strength(groups.kept, groups.kept_rounding)
    rest = _strength(groups.rest, groups.rest_rounding)
    ones, zeros = torch.ones_like(kept), torch.zeros_like(kept)
    single = groups.kept.shape[1] == 1
    usable = kept > 0
    # sqrt(N / M); what a row without M gives is replaced at the end.
    ratio = _root_ratio(rest, kept, single)

    if conserve == "none":
        kept_scale, rest_scale = (ones, zeros) if math.isinf(gamma) else (gamma * ratio, ones)
    elif conserve == "exact":
        # g_hat and 1, divided by their length: g_hat itself may overflow.
        length = ones if math.isinf(gamma) else torch.hypot(ones, gamma * ratio)
        gain = ones if math.isinf(gamma) else torch.hypot(ones, 1 / (gamma * ratio)).reciprocal()
        damping = zeros if math.isinf(gamma) else length.reciprocal()
        after = _strength(
            gain.unsqueeze(1) * groups.kept + damping.unsqueeze(1) * groups.rest,
            gain * groups.kept_rounding + damping * groups.rest_rounding,
        )
        before = _strength(groups.kept + groups.rest, groups.kept_rounding + groups.rest_rounding)
        beta = _root_ratio(before, after, single)
        usable = usable & (after > 0)
        # A magnitude stands for a variance there, and grows with the length rather than with its square.
        beta = beta * length.sqrt() if single else beta
        kept_scale, rest_scale = beta * gain, beta * damping
    else:
        # With M g_hat^2 = gamma^2 N put into the equations: an edited sum without variance, N = 0, stays.
        share = 1.0 if math.isinf(gamma) else gamma / math.hypot(1.0, gamma)
        kept_scale = share * torch.hypot(ones, ratio)
        if math.isinf(gamma):
            rest_scale = zeros
        else:
            rest_scale = torch.hypot(ones, 1 / ratio) / math.hypot(1.0, gamma)
            usable = usable & (rest > 0)

    untouched = zeros if math.isinf(gamma) else ones
    return torch.where(usable, kept_scale, ones), torch.where(usable, rest_scale, untouched)


def _root_ratio(numerator: Tensor, denominator: Tensor, single: bool) -> Tensor:
    """Square root of the ratio of two variances, given as deviations; of a single position as magnitudes."""
    ratio = numerator / denominator
    # The root last: that of an odd power of two would round, and the edit would not scale exactly.
    return ratio.sqrt() if single else ratio


def _strength(signal: Tensor, rounding: Tensor) -> Tensor:
    """Standard deviation of a summed signal (B, S) over space, or its magnitude where there is a single position.

    It is exactly zero where the signal is constant up to the given rounding error.
    """
    # Of the signal divided by its peak: squares of tiny gradients would underflow.
    peak = signal.abs().amax(dim=1)
    if signal.shape[1] == 1:
        return peak
    unit = signal / torch.where(peak > 0, peak, torch.ones_like(peak)).unsqueeze(1)
    deviation = unit.std(dim=1) * peak
    return torch.where(deviation > rounding, deviation, torch.zeros_like(deviation))
