"""Backward pass of a convolution to its input, from all output channels or only from the kept ones.

A pruned channel contributes zero, so only the kept channels' rows of the weight are used. Batch rows that keep
different channels become groups of one grouped convolution, without a loop over rows or channels. The weight gradient
is never computed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parchgrad.core._torch import has_plain_forward, own_parameter
from parchgrad.core.layers import Convolution
from parchgrad.core.partition import without_autocast

__all__ = ["Geometry", "input_gradient", "partitioned_input_gradient", "per_dimension", "plain_geometry"]


class Geometry(NamedTuple):
    """Stride, padding, dilation and groups of a convolution; each tuple has one entry per spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def plain_geometry(convolution: Convolution) -> Geometry | None:
    """Return a convolution's geometry, or None if its parameters do not fully describe what it computes.

    None is for transposed and deformable convolutions, subclasses with their own forward, padding that is not zeros or
    differs between the sides, and weights that are recomputed in every pass.

    Example:
        >>> from torch import nn
        >>> plain_geometry(nn.Conv2d(4, 8, 3, padding="same", groups=2))
        Geometry(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=2)
        >>> plain_geometry(nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect")) is None
        True
    """
    if not isinstance(convolution, nn.Conv1d | nn.Conv2d | nn.Conv3d) or not has_plain_forward(convolution):
        return None
    weight = own_parameter(convolution, "weight")
    if weight is None:
        return None
    kernel = weight.shape[2:]
    stride = per_dimension(convolution.stride, len(kernel))
    dilation = per_dimension(convolution.dilation, len(kernel))
    padding: str | int | tuple[int, ...] = convolution.padding
    if padding == "same":
        around = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        padding = tuple(total // 2 for total in around)
        if any(total % 2 for total in around):
            return None
    elif padding == "valid":
        padding = 0
    if convolution.padding_mode != "zeros" or isinstance(padding, str):
        return None
    return Geometry(stride, per_dimension(padding, len(kernel)), dilation, convolution.groups)


def per_dimension(value: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    """Expand one number to all dimensions: users may assign a single one to a convolution.

    Example:
        >>> per_dimension(2, 3), per_dimension((2,), 2), per_dimension((1, 2), 2)
        ((2, 2, 2), (2, 2), (1, 2))
    """
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dimensions if len(values) == 1 else values


def partitioned_input_gradient(
    gradient: Tensor, scales: Tensor, weight: Tensor, geometry: Geometry, input_shape: torch.Size
) -> Tensor:
    """Scale the channels of the gradient at a convolution's output and propagate it back to the input.

    Channels with factor 0 are skipped where that is faster. The result equals the dense backward pass of the scaled
    gradient, up to rounding.

    Args:
        gradient: gradient at the convolution's output, shape (B, C, *S).
        scales: factor of each channel, see `channel_scales`, shape (B, C).
        weight: weight of the convolution, shape (C, D / groups, *kernel); its dtype sets that of the computation.
        geometry: geometry of the convolution.
        input_shape: shape (B, D, *I) of the convolution's input.

    Returns:
        Gradient at the convolution's input, shape (B, D, *I), in the dtype of `weight`.

    Example:
        >>> gradient, scales = torch.tensor([[[1.0, -1.0], [2.0, -2.0]]]), torch.tensor([[3.0, 0.0]])
        >>> partitioned_input_gradient(
        ...     gradient, scales, torch.tensor([[[10.0]], [[1.0]]]), Geometry((1,), (0,), (1,), 1),
        ...     torch.Size((1, 1, 2)))
        tensor([[[ 30., -30.]]])
    """
    if gradient.numel() == 0:
        return input_gradient(gradient, weight, geometry, input_shape)
    kept = _find_kept(scales > 0, geometry.groups, gradient.shape[2:].numel())
    trailing = [1] * (gradient.dim() - 2)
    if kept is None:
        edited = gradient * scales.reshape(*scales.shape, *trailing)
        return input_gradient(edited.to(weight.dtype), weight, geometry, input_shape)
    taken = _scales_of(scales, kept)
    pruned = _take_channels(gradient, kept).mul_(taken.reshape(*taken.shape, *trailing)).to(weight.dtype)
    found = _sparse_input_gradient(pruned, kept, weight, geometry, input_shape)
    return found.contiguous(memory_format=_memory_format(gradient))


class _Kept(NamedTuple):
    """Indices of the kept channels, the same number for each of R distinct masks.

    Attributes:
        channels: k channels in each of A groups of the convolution, shape (R, A * k).
        groups: indices of these groups, shape (R, A); None if all are used.
        order: row order in which the masks repeat cyclically, shape (B,); None if the rows are already in that order.
    """

    channels: Tensor
    groups: Tensor | None
    order: Tensor | None


# Measured with benchmarks/sparse.py: cost of a gathered channel relative to one in place, without and with groups; cost
# of gathering its weights, in positions; and the number of channels that kernels process at a time.
_COST_OF_A_KEPT_CHANNEL = 1.5
_COST_IN_GROUPS = 4.0
_POSITIONS_PER_WEIGHT = 200
_CHANNELS_AT_A_TIME = 8


def _find_kept(channel_mask: Tensor, groups: int, positions: int) -> _Kept | None:
    """Find the kept channels of each row; None if using all channels is faster.

    A row that keeps no channel passes unchanged, so the whole batch then uses all channels. The amount of work depends
    on the values of the mask, so reading them synchronises with the device.
    """
    rows, channels = channel_mask.shape
    per_group = channels // groups
    masks, order = _distinct_masks(channel_mask)

    def is_faster(taken: int) -> bool:
        sparse = taken * (rows * positions + masks.shape[0] * _POSITIONS_PER_WEIGHT)
        dense = channels * (rows * positions + _POSITIONS_PER_WEIGHT)
        return (_COST_OF_A_KEPT_CHANNEL if groups == 1 else _COST_IN_GROUPS) * sparse < dense

    if masks.shape[0] == 1 and groups == 1:
        found = masks.flatten().nonzero().T
        return _Kept(found, None, order) if found.shape[1] and is_faster(found.shape[1]) else None
    by_group = masks.reshape(-1, groups, per_group)
    counts = by_group.sum(dim=2)
    sizes = torch.stack((counts.amax(), (counts > 0).sum(dim=1).amax(), counts.sum(dim=1).amin()))
    most, active, fewest = sizes.tolist()
    most = min(per_group, -(-most // _CHANNELS_AT_A_TIME) * _CHANNELS_AT_A_TIME)
    if fewest == 0 or not is_faster(active * most):
        return None
    if active == groups:
        chosen, first = None, torch.arange(0, channels, per_group, device=masks.device)
    else:
        chosen = (counts > 0).byte().topk(active, dim=1).indices
        by_group = by_group.gather(1, chosen.unsqueeze(2).expand(-1, -1, per_group))
        first = chosen * per_group
    # Masks with fewer channels are padded with channels outside the mask, whose factor is 0.
    places = by_group.byte().topk(most, dim=2).indices
    return _Kept((places + first.unsqueeze(-1)).flatten(1), chosen, order)


def _distinct_masks(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return distinct masks (R, C) and the row order in which they repeat cyclically.

    Rows are grouped only if every mask has the same number of rows; otherwise each row keeps its own mask.
    """
    rows = mask.shape[0]
    if rows == 1:
        return mask, None
    distinct, which, counts = torch.unique(mask, dim=0, return_inverse=True, return_counts=True)
    if distinct.shape[0] == 1:
        return distinct, None
    if distinct.shape[0] == rows or bool((counts != counts[0]).any()):
        return mask, None
    return distinct, which.argsort(stable=True).reshape(distinct.shape[0], -1).T.flatten()


def _scales_of(scales: Tensor, kept: _Kept) -> Tensor:
    """Factors of the kept channels, shape (B, A * k), rows in the order of `kept`; zero for padding."""
    rows = scales.shape[0]
    ordered = scales if kept.order is None else scales[kept.order]
    if kept.channels.shape[0] == 1:
        return ordered.index_select(1, kept.channels[0])
    return ordered.gather(1, kept.channels.repeat(rows // kept.channels.shape[0], 1))


def _take_channels(gradient: Tensor, kept: _Kept) -> Tensor:
    """Copy the kept channels of each row, shape (B, A * k, *S)."""
    rows, channels, *spatial = gradient.shape
    if kept.channels.shape[0] == 1:
        return gradient.index_select(1, kept.channels[0])
    index = kept.channels.repeat(rows // kept.channels.shape[0], 1)
    if gradient.is_contiguous():
        first = torch.arange(0, rows * channels, channels, device=gradient.device)
        first = first if kept.order is None else first[kept.order]
        flat = gradient.reshape(rows * channels, *spatial)
        return flat.index_select(0, (index + first.unsqueeze(1)).flatten()).reshape(rows, -1, *spatial)
    last = gradient.movedim(1, -1)
    last = last if kept.order is None else last[kept.order]
    taken: Tensor = last.gather(-1, index.reshape(rows, *[1] * len(spatial), -1).expand(rows, *spatial, -1))
    return taken.movedim(-1, 1)


def _sparse_input_gradient(
    pruned: Tensor, kept: _Kept, weight: Tensor, geometry: Geometry, input_shape: torch.Size
) -> Tensor:
    """Propagate only the kept channels back to the input, shape (B, D, *I)."""
    rows, places, *positions = pruned.shape
    masks = kept.channels.shape[0]
    groups = geometry.groups if kept.groups is None else kept.groups.shape[1]
    per_group = weight.shape[1]
    taken = weight.index_select(0, kept.channels.flatten())
    if geometry.groups == 1 and weight.shape[2:].numel() == 1 and not any(geometry.padding):
        found = _pointwise_input_gradient(pruned, taken.reshape(masks, places, -1), geometry, input_shape)
    else:
        # Rows with the same mask form a batch; masks times convolution groups become the groups.
        folded = pruned.reshape(rows // masks, masks * places, *positions)
        shape = torch.Size((rows // masks, masks * groups * per_group, *input_shape[2:]))
        found = input_gradient(folded, taken, geometry._replace(groups=masks * groups), shape)
        found = found.reshape(rows, groups * per_group, *input_shape[2:])
    if kept.groups is not None:
        by_group = found.reshape(rows, groups, per_group, *input_shape[2:])
        index = kept.groups.repeat(rows // masks, 1).reshape(rows, groups, *[1] * (by_group.dim() - 2))
        everything = found.new_zeros(rows, geometry.groups, per_group, *input_shape[2:])
        found = everything.scatter_(1, index.expand_as(by_group), by_group).flatten(1, 2)
    if kept.order is None:
        return found
    restored = torch.empty_like(found)
    restored[kept.order] = found
    return restored


def _pointwise_input_gradient(pruned: Tensor, weight: Tensor, geometry: Geometry, input_shape: torch.Size) -> Tensor:
    """Backward pass of kernels with one position as a matrix product; `weight` has shape (R, k, D)."""
    rows, taken, *positions = pruned.shape
    weight = weight.expand(rows, -1, -1) if weight.shape[0] == 1 else weight.repeat(rows // weight.shape[0], 1, 1)
    with without_autocast(pruned.device.type):
        product = torch.bmm(weight.mT, pruned.reshape(rows, taken, -1)).reshape(rows, -1, *positions)
    if all(step == 1 for step in geometry.stride):
        return product
    found = product.new_zeros(input_shape)
    steps = zip(geometry.stride, positions, strict=True)
    places: tuple[Any, ...] = (..., *[slice(0, step * count, step) for step, count in steps])
    found[places] = product
    return found


def _memory_format(values: Tensor) -> torch.memory_format:
    """Channels last if the values are stored that way, else contiguous."""
    if values.is_contiguous():
        return torch.contiguous_format
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(values.dim(), torch.contiguous_format)
    return last if values.is_contiguous(memory_format=last) else torch.contiguous_format


def input_gradient(gradient: Tensor, weight: Tensor, geometry: Geometry, input_shape: torch.Size) -> Tensor:
    """Propagate the gradient at a convolution's output to its input, shape (B, D, *I), in the dtype of `weight`.

    Example:
        >>> weight = torch.tensor([[[10.0]], [[1.0]]])
        >>> input_gradient(torch.ones(1, 2, 3), weight, Geometry((1,), (0,), (1,), 1), torch.Size((1, 1, 3)))
        tensor([[[11., 11., 11.]]])
    """
    if gradient.numel() == 0:
        return weight.new_zeros(input_shape)
    # Only the input's shape is read, so its values need not be kept.
    shape_only = gradient.new_empty(input_shape)
    found: Tensor = torch.ops.aten.convolution_backward(
        gradient,
        shape_only,
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        [0] * len(geometry.stride),
        geometry.groups,
        [True, False, False],
    )[0]
    return found
