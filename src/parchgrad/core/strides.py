"""Smooth strides: backward passes of strided convolutions and pooling that leave no grid."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the conventional name
from torch import Tensor

from parchgrad.core.convolution import per_dimension
from parchgrad.core.gates import MAX_POOLING
from parchgrad.core.operations import Operation, Rule, is_differentiated, refuse_second_derivatives
from parchgrad.core.partition import at_least_float32, channel_norms, in_ordinary_range, restored_range, row_norms

__all__ = ["is_pass_through", "overlapping_strides", "smooth_strides", "with_smooth_strides"]


def smooth_strides(gradient: Tensor, strides: Sequence[int]) -> Tensor:
    """Smooth the gradient at the input of a strided operation, preserving the norm of each row.

    A stride of n leaves a grid of period n in the gradient. Convolving each channel with the triangular kernel of
    half-width n, with edges replicated, removes the grid. A stride as long as the input leaves no grid and counts as 1.

    Source: this package; Zhang (2019), "Making convolutional networks shift-invariant again", filters the forward pass.

    Args:
        gradient: shape (B, C, *S), or (C, *S) for a single sample.
        strides: stride in each spatial dimension, at least 1.

    Returns:
        A new tensor of the shape and dtype of `gradient`.

    Example:
        >>> smooth_strides(torch.tensor([[[0.0, 0.0, 4.0, 0.0, 0.0]]]), (2,)).round(decimals=3)
        tensor([[[0.0000, 1.6330, 3.2660, 1.6330, 0.0000]]])
    """
    if gradient.dim() == len(strides) + 1:
        # A single sample without a batch dimension.
        return smooth_strides(gradient.unsqueeze(0), strides).squeeze(0)
    strides = [stride if stride < length else 1 for stride, length in zip(strides, gradient.shape[2:], strict=True)]
    if max(strides) == 1:
        return gradient.clone()
    wide = at_least_float32(gradient)
    norms = channel_norms(wide)
    wide, unit = in_ordinary_range(wide, norms)
    # The last dimension comes first in torch's padding.
    margins = [side for stride in reversed(strides) for side in (stride - 1, stride - 1)]
    smooth = F.pad(wide, margins, mode="replicate")
    for dimension, stride in enumerate(strides, 2):
        # The triangular kernel is two boxes; restoring the norm takes care of its factor.
        smooth = _summed(_summed(smooth, dimension, stride), dimension, stride)
    before = torch.linalg.vector_norm(norms, dim=1) if unit is None else row_norms(wide)
    after = row_norms(smooth)
    scale = torch.where(after == 0, 1.0, before / after)
    smooth.mul_(scale.reshape(-1, *[1] * (smooth.dim() - 1)))
    return restored_range(smooth, unit).to(gradient.dtype)


def overlapping_strides(strides: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    """Replace the strides of an operation that cuts patches by 1: it leaves no grid, but smoothing would blur it.

    Args:
        strides: stride in each spatial dimension.
        sizes: size of the kernel in each. Patches are kernels no larger than their stride, from 4 positions.

    Example:
        >>> overlapping_strides((16, 16), (16, 16)), overlapping_strides((4, 2), (7, 2))
        ((1, 1), (4, 2))
    """
    pairs = zip(strides, sizes, strict=True)
    return tuple(1 if stride >= _STRIDE_OF_PATCHES and size <= stride else stride for stride, size in pairs)


_STRIDE_OF_PATCHES = 4


def _summed(values: Tensor, dimension: int, count: int) -> Tensor:
    """Sum `count` neighbours along a dimension, which becomes shorter by `count - 1`."""
    if count == 1:
        return values
    length = values.shape[dimension] - count + 1
    total = values.narrow(dimension, 0, length) + values.narrow(dimension, 1, length)
    for place in range(2, count):
        total += values.narrow(dimension, place, length)
    return total


def _of_convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, *_: Any, **__: Any
) -> tuple[Any, Any]:
    return stride, tuple(weight.shape[2:])


def _of_pooling(input: Tensor, kernel_size: Any, stride: Any = None, *_: Any, **__: Any) -> tuple[Any, Any]:
    return stride or kernel_size, kernel_size


# Each function with its number of spatial dimensions, and a function that reads its strides and kernel.
_STRIDED: Mapping[Any, tuple[int, Callable[..., tuple[Any, Any]]]] = {
    **{function: (count, _of_convolution) for count, function in enumerate((F.conv1d, F.conv2d, F.conv3d), 1)},
    **{function: (count, _of_pooling) for count, function in enumerate((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), 1)},
    **{function: (count, _of_pooling) for function, count in MAX_POOLING.items()},
}


def with_smooth_strides(rules: Mapping[Any, Rule]) -> dict[Any, Rule]:
    """Add rules that smooth the gradient at the input of strided operations, before other rules for them."""
    return {
        **rules,
        **{function: partial(_smooth_input, rules.get(function, Operation.run)) for function in _STRIDED},
    }


def _smooth_input(rule: Rule, operation: Operation) -> Any:
    if is_differentiated(operation.source):
        dimensions, read = _STRIDED[operation.function]
        strides, sizes = (per_dimension(each, dimensions) for each in read(*operation.args, **operation.named))
        strides = overlapping_strides(strides, sizes)
        if max(strides) > 1:
            operation = operation.on(_SmoothStride.apply(operation.source, strides))
    return rule(operation)


class _SmoothStride(torch.autograd.Function):
    """Pass on the input of a strided operation, and smooth its gradient."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, strides: tuple[int, ...]) -> Tensor:
        ctx.strides = strides
        return source.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        return smooth_strides(gradient, ctx.strides), None


def is_pass_through(node: Any) -> bool:
    """Whether a node of the graph only smooths the gradient of a strided operation."""
    # Compared by name: torch.compile cannot trace a look-up of the node's class.
    return bool(node.name() == "_SmoothStrideBackward")
