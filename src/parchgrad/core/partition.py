"""The edit as pure functions: partition a gradient by weights of its channels.

Source: Park, Jeon, Choi (2023), "Partitioned Channel Gradient for Reliable Input Attribution"; soft weights and
``"energy"`` are this package's own.

For each row, ``g`` is the gradient at a convolution's output after position weighting. Weights ``w`` in [0, 1] split it
into ``H = w g``, the channels that matter, and the rest ``L = (1 - w) g``. ``M`` and ``N`` are the spatial variances of
H and L summed over channels. With infinite ``gamma``, L is pruned and H scaled by ``beta``; with finite ``gamma``, H is
scaled by ``beta * gamma * sqrt(N / M)`` and L by ``beta``.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from parchgrad._io.checks import check_kind, is_number
from parchgrad.errors import SettingError

__all__ = [
    "Conserve",
    "at_least_float32",
    "channel_norms",
    "channel_scales",
    "check_channel_weights",
    "check_edit_settings",
    "check_position_weights",
    "in_ordinary_range",
    "partition_gradient",
    "restored_range",
    "row_norms",
    "without_autocast",
]

Conserve = Literal["energy", "independent", "exact", "none"]
_WAYS = get_args(Conserve)


def check_edit_settings(gamma: float, conserve: str) -> None:
    """Raise `SettingError` unless `gamma` and `conserve` are valid settings of `partition_gradient`."""
    if not is_number(gamma) or not gamma > 0:
        raise SettingError(f"`gamma` is {gamma!r}, but it must be positive. Infinity prunes the rest.")
    if conserve not in _WAYS:
        raise SettingError(f"`conserve` is {conserve!r}, but it must be one of {', '.join(_WAYS)}.")


def check_channel_weights(channel_weights: Tensor, gradient: Tensor) -> None:
    """Raise `SettingError` unless there is a weight or a boolean for each row and channel of the gradient."""
    for name, value in (("`gradient`", gradient), ("`channel_weights`", channel_weights)):
        check_kind(name, value, Tensor, "Convert it with torch.as_tensor")
    if not gradient.is_floating_point():
        raise SettingError(f"`gradient` is {gradient.dtype}, but it must be floating point. Call .float().")
    is_weight = channel_weights.dtype == torch.bool or channel_weights.is_floating_point()
    if not is_weight or channel_weights.shape != gradient.shape[:2]:
        raise SettingError(
            f"`channel_weights` is {channel_weights.dtype} of shape {tuple(channel_weights.shape)}. The gradient of "
            f"shape {tuple(gradient.shape)} needs floating-point weights or a boolean mask of shape "
            f"{tuple(gradient.shape[:2])}."
        )


def check_position_weights(position_weights: Tensor, gradient: Tensor) -> None:
    """Raise `SettingError` unless there is a floating-point weight for each row and position of the gradient."""
    wanted = (gradient.shape[0], *gradient.shape[2:])
    if not position_weights.is_floating_point() or position_weights.shape != wanted:
        raise SettingError(
            f"`position_weights` is {position_weights.dtype} of shape {tuple(position_weights.shape)}. The gradient "
            f"of shape {tuple(gradient.shape)} needs floating-point weights of shape {wanted}."
        )


def partition_gradient(
    gradient: Tensor,
    channel_weights: Tensor,
    *,
    position_weights: Tensor | None = None,
    gamma: float = math.inf,
    conserve: Conserve = "energy",
) -> Tensor:
    """Prune or damp channels by their weights and re-scale the others, row by row.

    A row whose weights are all 1 or all 0 keeps its (position-weighted) gradient. If the kept sum has no spatial
    variance beyond rounding, nothing is re-scaled. Multiplying the gradient by a constant multiplies the result by the
    same constant. Half precision is summed and scaled in float32.

    Args:
        gradient: gradient at a convolution's output, shape (B, C, *S) with any number of spatial dimensions.
        channel_weights: how much each channel matters, in [0, 1], or a boolean mask; shape (B, C).
        position_weights: factor of each position, in [0, 1], shape (B, *S); None leaves all positions unchanged.
        gamma: strength of the summed signal of H relative to that of L after the edit, in (0, inf].
        conserve: what the layer conserves. `"energy"`: the norm of the position-weighted gradient, so that the edit
            never amplifies. `"independent"` and `"exact"`: the spatial variance of the sum over channels, assuming that
            H and L are uncorrelated, or measured before and after. `"none"`: nothing.

    Returns:
        A new tensor of the shape, dtype and device of `gradient`.

    Raises:
        SettingError: if `gamma` or `conserve` is out of range, or the weights do not fit the gradient.

    Example:
        >>> gradient = torch.tensor([[[3.0, -4.0], [12.0, 0.0]]])
        >>> partition_gradient(gradient, torch.tensor([[1.0, 0.0]])).round(decimals=3)
        tensor([[[  7.8000, -10.4000],
                 [  0.0000,   0.0000]]])
    """
    check_edit_settings(gamma, conserve)
    check_channel_weights(channel_weights, gradient)
    if position_weights is not None:
        check_position_weights(position_weights, gradient)
    wide, unit = in_ordinary_range(at_least_float32(gradient))
    if position_weights is not None:
        wide = wide * position_weights.to(wide.dtype).unsqueeze(1)
    scales = channel_scales(wide, channel_norms(wide), channel_weights, gamma=gamma, conserve=conserve)
    edited = wide * scales.reshape(*scales.shape, *[1] * (gradient.dim() - 2))
    return restored_range(edited, unit).to(gradient.dtype)


def channel_scales(
    gradient: Tensor, norms: Tensor, channel_weights: Tensor, *, gamma: float, conserve: Conserve
) -> Tensor:
    """Compute the factor by which `partition_gradient` scales each channel.

    Args:
        gradient: position-weighted gradient, float32 or wider, as returned by `in_ordinary_range`, shape (B, C, *S).
        norms: its `channel_norms`, shape (B, C).
        channel_weights: see `partition_gradient`.
        gamma: see `partition_gradient`.
        conserve: see `partition_gradient`.

    Returns:
        Factors, shape (B, C), in the dtype of `gradient`; all NaN in a row that is not finite.

    Example:
        >>> gradient = torch.tensor([[[3.0, -4.0], [12.0, 0.0]]])
        >>> channel_scales(
        ...     gradient, channel_norms(gradient), torch.tensor([[1.0, 0.0]]), gamma=math.inf, conserve="energy")
        tensor([[2.6000, 0.0000]])
    """
    weights = channel_weights.to(norms.dtype)
    if math.isinf(gamma) and conserve == "energy":
        # Rows of equal weights need no special case: a norm divided by itself is exactly 1.
        return torch.where(weights.any(dim=1, keepdim=True), _norm_keeping(weights, norms), 1.0)
    scale = weights
    if math.isfinite(gamma) or conserve != "none":
        sums = _group_sums(gradient, norms, weights)
        if math.isinf(gamma):
            scale = weights * _pruning_scale(sums, conserve=conserve).unsqueeze(1)
        else:
            kept_scale, rest_scale = _damping_scales(sums, gamma=gamma, conserve=conserve)
            scale = torch.lerp(rest_scale.unsqueeze(1), kept_scale.unsqueeze(1), weights.to(kept_scale))
    if conserve == "energy":
        scale = _norm_keeping(scale, norms)
    one_sided = (weights == 1).all(dim=1, keepdim=True) | (weights == 0).all(dim=1, keepdim=True)
    # A non-finite value in a pruned channel must reach the result: zero times infinity is NaN.
    broken = norms.sum(dim=1, keepdim=True).mul_(0)
    return (torch.where(one_sided, 1.0, scale) + broken).to(gradient.dtype)


def _norm_keeping(scales: Tensor, norms: Tensor) -> Tensor:
    """Re-scale the factors of each row to preserve its norm, unless nothing of the row is left."""
    before, after = (torch.linalg.vector_norm(part, dim=1, keepdim=True) for part in (norms, scales * norms))
    return scales * torch.where(after == 0, 1.0, before / after)


def channel_norms(gradient: Tensor) -> Tensor:
    """Compute the spatial Euclidean norm of each channel, (B, C, *S) to (B, C), in float32 or wider.

    Example:
        >>> channel_norms(torch.tensor([[[3.0, 4.0], [0.0, 2.0]]]))
        tensor([[5., 2.]])
    """
    wide = at_least_float32(gradient)
    norms: Tensor = torch.linalg.vector_norm(wide.flatten(2) if wide.dim() > 2 else wide.unsqueeze(2), dim=2)
    return norms


def row_norms(gradient: Tensor) -> Tensor:
    """Compute the Euclidean norm of each row, (B, C, *S) to (B,).

    Example:
        >>> row_norms(torch.tensor([[[3.0], [4.0]]]))
        tensor([5.])
    """
    # Two steps round less than one sum over everything.
    norms: Tensor = torch.linalg.vector_norm(channel_norms(gradient), dim=1)
    return norms


# Row norms for which squares and products of three values neither underflow nor overflow in float32.
_ORDINARY_NORMS = (2.0**-30, 2.0**30)


def in_ordinary_range(values: Tensor, norms: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Divide each row by a power of two, which is exact, so that its squares neither underflow nor overflow.

    Args:
        values: float32 or wider, shape (B, C, *S).
        norms: their `channel_norms`, if already known.

    Returns:
        The scaled rows, and the power of two that each was divided by, shape (B,); None if nothing was scaled.

    Example:
        >>> in_ordinary_range(torch.tensor([[[3e-30, 4e-30]]]))[0].norm() > 0.5
        tensor(True)
    """
    if values.numel() == 0:
        return values, None
    # On the CPU, reading a value back does not stall; on other devices a copy costs less than the stall.
    if values.device.type == "cpu":
        lengths = torch.linalg.vector_norm(channel_norms(values) if norms is None else norms, dim=1)
        if torch.equal(lengths, lengths.clamp(*_ORDINARY_NORMS)):
            return values, None
    peak = torch.linalg.vector_norm(values.flatten(1), math.inf, dim=1)
    largest = round(-math.log2(torch.finfo(peak.dtype).tiny))
    exponent = torch.frexp(torch.where(peak.isfinite(), peak, 0.0)).exponent.clamp_(-largest, largest)
    # Old releases of torch take the power of whole numbers in float32.
    unit = torch.ldexp(torch.ones_like(peak), exponent.to(peak.dtype))
    return values / _per_row(unit, values), unit


def restored_range(values: Tensor, unit: Tensor | None) -> Tensor:
    """Undo `in_ordinary_range`."""
    return values if unit is None else values * _per_row(unit, values)


def _per_row(factor: Tensor, values: Tensor) -> Tensor:
    return factor.reshape(-1, *[1] * (values.dim() - 1))


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Return a context that switches autocast off, so that products do not run in half precision."""
    # `is_autocast_enabled` raises an error on devices without autocast.
    running = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if running else nullcontext()


def at_least_float32(values: Tensor) -> Tensor:
    """Convert half precision to float32 and leave wider types as they are."""
    return values.float() if values.dtype.itemsize < 4 else values


class _Groups(NamedTuple):
    """Summed gradients of H and L, each (B, S), and bounds on their rounding errors, each (B,)."""

    kept: Tensor
    rest: Tensor
    kept_rounding: Tensor
    rest_rounding: Tensor


def _group_sums(gradient: Tensor, norms: Tensor, weights: Tensor) -> _Groups:
    """Sum the two parts of the gradient over the channels."""
    batch, channels, *spatial = gradient.shape
    parts = torch.stack((weights, 1 - weights), dim=1)
    with without_autocast(gradient.device.type):
        kept, rest = torch.bmm(parts, gradient.reshape(batch, channels, math.prod(spatial))).unbind(1)
    # The error of a sum grows like sqrt(C) times the summed magnitudes.
    factor = torch.finfo(gradient.dtype).eps * math.sqrt(channels)
    errors = (parts * norms.unsqueeze(1)).sum(dim=2).mul_(factor)
    return _Groups(kept, rest, *errors.unbind(1))


def _pruning_scale(groups: _Groups, *, conserve: Conserve) -> Tensor:
    """Factor of H when L is pruned, (B,)."""
    other = groups.rest if conserve == "independent" else groups.kept + groups.rest
    of_kept, of_other = _strength(torch.stack((groups.kept, other))).unbind()
    if groups.kept.shape[1] == 1:
        beta = ((of_kept + of_other) if conserve == "independent" else of_other).div_(of_kept).sqrt_()
    else:
        beta = (torch.hypot(of_kept, of_other) if conserve == "independent" else of_other) / of_kept
    return beta.masked_fill_(of_kept <= groups.kept_rounding, 1.0)


def _damping_scales(groups: _Groups, *, gamma: float, conserve: Conserve) -> tuple[Tensor, Tensor]:
    """Factors of H and of L for a finite gamma, each (B,)."""
    errors = torch.stack((groups.kept_rounding, groups.rest_rounding))
    kept, rest = _above(_strength(torch.stack((groups.kept, groups.rest))), errors)
    ones = torch.ones_like(kept)
    single = groups.kept.shape[1] == 1
    usable = kept > 0
    # sqrt(N / M); rows with M = 0 are replaced at the end.
    ratio = _root_ratio(rest, kept, single)
    if conserve == "none":
        kept_scale, rest_scale = gamma * ratio, ones
    elif conserve == "exact":
        # (g_hat, 1) divided by its length, since g_hat itself may overflow.
        length = torch.hypot(ones, gamma * ratio)
        gain, damping = torch.hypot(ones, 1 / (gamma * ratio)).reciprocal(), length.reciprocal()
        edited = gain.unsqueeze(1) * groups.kept + damping.unsqueeze(1) * groups.rest
        errors = torch.stack(
            (errors.sum(dim=0), gain * groups.kept_rounding + damping * groups.rest_rounding),
        )
        before, after = _above(_strength(torch.stack((groups.kept + groups.rest, edited))), errors)
        beta = _root_ratio(before, after, single)
        usable = usable & (after > 0)
        # At a single position a magnitude replaces the variance, and grows with the length, not its square.
        beta = beta * length.sqrt() if single else beta
        kept_scale, rest_scale = beta * gain, beta * damping
    else:
        # From M g_hat^2 = gamma^2 N. With N = 0 the edited sum would have no variance, so the row is left unchanged.
        # "energy" needs only the ratio of the two scales, since the norm is restored later.
        kept_scale = gamma / math.hypot(1.0, gamma) * torch.hypot(ones, ratio)
        rest_scale = torch.hypot(ones, 1 / ratio) / math.hypot(1.0, gamma)
        usable = usable & (rest > 0)
    return torch.where(usable, kept_scale, ones), torch.where(usable, rest_scale, ones)


def _root_ratio(numerator: Tensor, denominator: Tensor, single: bool) -> Tensor:
    """Square root of the ratio of two variances, given as deviations, or as magnitudes at a single position."""
    ratio = numerator / denominator
    # The root comes last: the root of an odd power of two rounds, and the edit would not scale exactly.
    return ratio.sqrt() if single else ratio


def _above(strength: Tensor, rounding: Tensor) -> Tensor:
    """Replace strengths within the rounding error by 0."""
    return torch.where(strength > rounding, strength, 0.0)


def _strength(signal: Tensor) -> Tensor:
    """Spatial deviation of summed signals (N, B, *S), or their magnitude at a single position, shape (N, B).

    It is sqrt(S - 1) times the standard deviation, since only ratios are used.
    """
    if signal.shape[2:].numel() == 1:
        return signal.abs().flatten(1)
    positions = tuple(range(2, signal.dim()))
    centred = signal - signal.mean(dim=positions, keepdim=True)
    # A large gamma overflows float32; Apple's GPUs have no wider type.
    wide = centred.dtype if centred.device.type == "mps" else torch.float64
    norm: Tensor = torch.linalg.vector_norm(centred, dim=positions, dtype=wide)
    return norm
