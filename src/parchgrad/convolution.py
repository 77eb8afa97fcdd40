"""The backward pass of a convolution to its input: from all output channels, or from the kept ones alone.

A pruned channel sends back zero, so only the kept channels' rows of the weight take part. Rows of a batch that keep
different channels become groups of one grouped convolution, without a loop over rows or channels. The gradient of the
weight is never computed.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parchgrad.layers import Convolution
from parchgrad.partition import without_autocast

__all__ = ["Geometry", "partitioned_input_gradient", "plain_geometry"]


class Geometry(NamedTuple):
    """How a convolution moves over its input; each tuple holds a number per spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def plain_geometry(convolution: Convolution) -> Geometry | None:
    """Geometry of a convolution that does what its parameters say; None if it is a variant with a way of its own.

    Variants are subclasses with another forward, paddings other than zeros or unequal on both sides, and weights that
    are computed anew in every pass.

    Example:
        >>> plain_geometry(nn.Conv2d(4, 8, 3, padding="same", groups=2))
        Geometry(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=2)
        >>> plain_geometry(nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect")) is None
        True
    """
    own = vars(convolution)
    if not _is_plain_class(type(convolution)) or "forward" in own or "_conv_forward" in own:
        return None
    weight = convolution._parameters.get("weight")
    if weight is None:
        return None
    kernel = weight.shape[2:]
    stride = _per_dimension(convolution.stride, len(kernel))
    dilation = _per_dimension(convolution.dilation, len(kernel))
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
    return Geometry(stride, _per_dimension(padding, len(kernel)), dilation, convolution.groups)


def _is_plain_class(found: type[Convolution]) -> bool:
    """Whether a class is one of torch's convolutions, or a subclass that changes nothing about what it computes."""
    if found is nn.Conv2d or found is nn.Conv1d or found is nn.Conv3d:
        return True
    kind = next((kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if issubclass(found, kind)), None)
    return kind is not None and found.forward is kind.forward and found._conv_forward is kind._conv_forward


def _per_dimension(value: int | tuple[int, ...], dimensions: int) -> tuple[int, ...]:
    """A number for each dimension: users who change a convolution may give one for all."""
    return (value,) * dimensions if isinstance(value, int) else tuple(value)


def partitioned_input_gradient(
    gradient: Tensor, scales: Tensor, weight: Tensor, geometry: Geometry, input_shape: torch.Size
) -> Tensor:
    """Send a gradient whose channels are scaled at a convolution's output back to its input.

    Where many factors are 0, the other channels are taken alone if that is faster. The result is that of the scaled
    gradient's way through the convolution, up to rounding.

    Args:
        gradient: gradient at the convolution's output, shape (B, C, *S).
        scales: factor of each channel, see `channel_scales`, shape (B, C).
        weight: weight of the convolution, shape (C, D / groups, *kernel); its dtype is that of the computation.
        geometry: how the convolution moves.
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
        return weight.new_zeros(input_shape)
    kept = _find_kept(scales > 0, geometry.groups, gradient.shape[2:].numel())
    trailing = [1] * (gradient.dim() - 2)
    if kept is None:
        edited = gradient * scales.reshape(*scales.shape, *trailing)
        return _input_gradient(edited.to(weight.dtype), weight, geometry, input_shape)
    taken = _scales_of(scales, kept)
    pruned = _take_channels(gradient, kept).mul_(taken.reshape(*taken.shape, *trailing)).to(weight.dtype)
    found = _sparse_input_gradient(pruned, kept, weight, geometry, input_shape)
    return found.contiguous(memory_format=_memory_format(gradient))


class _Kept(NamedTuple):
    """The kept channels as indices, as many for each of R distinct masks.

    Attributes:
        channels: k channels of each of A groups of the convolution, shape (R, A * k).
        groups: which groups of the convolution these are, shape (R, A); None if all take part.
        order: the rows so that they go through the masks again and again, shape (B,); None if they do so already.
    """

    channels: Tensor
    groups: Tensor | None
    order: Tensor | None


# Found by measuring (see benchmarks/sparse.py): a channel taken out costs more than one in place, the more so out of a
# convolution with groups; preparing its weights costs as much as so many positions, and kernels work on so many
# channels at a time.
_COST_OF_A_KEPT_CHANNEL = 1.5
_COST_IN_GROUPS = 4.0
_POSITIONS_PER_WEIGHT = 200
_CHANNELS_AT_A_TIME = 8


def _find_kept(channel_mask: Tensor, groups: int, positions: int) -> _Kept | None:
    """Find the kept channels of each row; None if it is faster to take all.

    A row that keeps no channel passes unchanged, as one that keeps all, and takes the batch with it. How much there is
    to do follows from the mask alone, so that it must be read here, and the device waited for.
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
    # Where a mask has fewer, channels outside of it, whose factor is 0, fill the places up.
    places = by_group.byte().topk(most, dim=2).indices
    return _Kept((places + first.unsqueeze(-1)).flatten(1), chosen, order)


def _distinct_masks(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Masks (R, C) that the rows go through again and again, and the order of the rows in which they do.

    Rows that share a mask are found if every mask has as many rows; else each row brings its own.
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
    """Factors of the kept channels, shape (B, A * k), rows in the order of `kept`; zero where only filled up."""
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
    """Send the kept channels alone back to the input, shape (B, D, *I)."""
    rows, places, *positions = pruned.shape
    masks = kept.channels.shape[0]
    groups = geometry.groups if kept.groups is None else kept.groups.shape[1]
    per_group = weight.shape[1]
    taken = weight.index_select(0, kept.channels.flatten())
    if geometry.groups == 1 and weight.shape[2:].numel() == 1 and not any(geometry.padding):
        found = _pointwise_input_gradient(pruned, taken.reshape(masks, places, -1), geometry, input_shape)
    else:
        # Rows that share a mask are a batch; masks, and in each the groups of the convolution, are groups.
        folded = pruned.reshape(rows // masks, masks * places, *positions)
        shape = torch.Size((rows // masks, masks * groups * per_group, *input_shape[2:]))
        found = _input_gradient(folded, taken, geometry._replace(groups=masks * groups), shape)
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
    """Send channels back through kernels of one position: a product of matrices; weight of shape (R, k, D)."""
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
    """Channels last where the values are laid out so, else contiguous."""
    if values.is_contiguous():
        return torch.contiguous_format
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(values.dim(), torch.contiguous_format)
    return last if values.is_contiguous(memory_format=last) else torch.contiguous_format


def _input_gradient(gradient: Tensor, weight: Tensor, geometry: Geometry, input_shape: torch.Size) -> Tensor:
    """Backward pass of a convolution to its input alone, shape (B, D, *I)."""
    # Of the input only the shape is read, so that it need not be kept.
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
