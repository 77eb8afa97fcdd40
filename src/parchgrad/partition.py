"""The edit: a gradient and a channel mask in, the partitioned gradient out. Pure functions, no state.

Source: Park, Jeon, Choi (2023), "Partitioned Channel Gradient for Reliable Input Attribution".

Per row of the batch, with ``g`` the gradient at a convolution's output, ``H`` the kept channels and ``L`` the rest:
``G_H`` and ``G_L`` are the sums of ``g`` over the channels of either group, ``M`` and ``N`` the variances of these
sums over the spatial positions. With ``gamma`` infinite L is pruned and H scaled by ``beta``; with ``gamma`` finite H
is scaled by ``beta * gamma * sqrt(N / M)`` and L by ``beta``.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from parchgrad.errors import SettingError

__all__ = ["Conserve", "check_edit_settings", "partition_gradient"]

Conserve = Literal["independent", "exact", "none"]


def check_edit_settings(gamma: float, conserve: str) -> None:
    """Raise `SettingError` unless `gamma` and `conserve` are settings that `partition_gradient` knows."""
    if not gamma > 0:
        raise SettingError(f"gamma is {gamma}, but it must be a positive number; math.inf prunes the other channels.")
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
    wide = gradient.float() if gradient.dtype.itemsize < 4 else gradient
    kept, rest = _group_sums(wide, channel_mask)
    kept_scale, rest_scale = _group_scales(kept, rest, channels=gradient.shape[1], gamma=gamma, conserve=conserve)
    scale = torch.where(channel_mask, kept_scale.unsqueeze(1), rest_scale.unsqueeze(1))
    one_sided = (channel_mask.all(1) | ~channel_mask.any(1)).unsqueeze(1)
    scale = scale.masked_fill(one_sided, 1.0)
    return (wide * scale.reshape(*scale.shape, *[1] * (gradient.dim() - 2))).to(gradient.dtype)


def _group_sums(gradient: Tensor, channel_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the gradient over the channels inside and outside the mask: G_H and G_L, each (B, S), in one pass."""
    batch, channels, *spatial = gradient.shape
    weights = torch.stack((channel_mask, ~channel_mask), dim=1).to(gradient.dtype)
    sums = torch.bmm(weights, gradient.reshape(batch, channels, math.prod(spatial)))
    return sums[:, 0], sums[:, 1]


def _group_scales(
    kept: Tensor, rest: Tensor, *, channels: int, gamma: float, conserve: Conserve
) -> tuple[Tensor, Tensor]:
    """Factors of H and of L, each (B,), from G_H and G_L (B, S)."""
    # Square roots of M and N: squares of tiny gradients would underflow.
    kept_deviation = _deviation(kept, channels)
    rest_deviation = _deviation(rest, channels)
    ones = torch.ones_like(kept_deviation)
    if math.isinf(gamma):
        gain, damping = ones, torch.zeros_like(ones)
    else:
        gain, damping = gamma * rest_deviation / kept_deviation, ones
    usable = kept_deviation > 0

    if conserve == "none":
        beta = ones
    elif conserve == "exact":
        # Where M is zero the gain is not finite; those rows are replaced below.
        after = _deviation(gain.unsqueeze(1) * kept + damping.unsqueeze(1) * rest, channels)
        beta = _deviation(kept + rest, channels) / after
        usable = usable & (after > 0)
    elif math.isinf(gamma):
        beta = torch.hypot(ones, rest_deviation / kept_deviation)
    else:
        # sqrt((M + N) / (M g_hat^2 + N)) with M g_hat^2 = gamma^2 N put in; an edited sum without variance stays.
        beta = torch.hypot(ones, kept_deviation / rest_deviation) / math.hypot(1.0, gamma)
        usable = usable & (rest_deviation > 0)

    if math.isinf(gamma):
        return torch.where(usable, beta * gain, ones), damping
    return torch.where(usable, beta * gain, ones), torch.where(usable, beta * damping, ones)


def _deviation(signal: Tensor, channels: int) -> Tensor:
    """Square root of the variance of a summed signal (B, S) over space, or of its magnitude for a single position.

    It is exactly zero where the signal is constant up to the rounding error of a sum over `channels` numbers.
    """
    peak = signal.abs().amax(dim=1)
    if signal.shape[1] == 1:
        return peak.sqrt()
    unit = signal / torch.where(peak > 0, peak, torch.ones_like(peak)).unsqueeze(1)
    deviation = unit.std(dim=1)
    rounding = channels * torch.finfo(signal.dtype).eps * unit.square().mean(dim=1).sqrt()
    return torch.where(deviation > rounding, deviation, torch.zeros_like(deviation)) * peak
