"""Soft gates: backward passes of rectifiers and max pooling that do not jump."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the conventional name
from torch import Tensor, nn

from parchgrad._io.checks import is_number
from parchgrad.core._torch import forward_hooks, in_place_changes
from parchgrad.core.convolution import per_dimension
from parchgrad.core.operations import ACTIVATION, Operation, Rule, follow, is_differentiated, scale_gradient
from parchgrad.core.partition import at_least_float32, row_norms
from parchgrad.errors import ModelError, SettingError

__all__ = [
    "MAX_POOLING",
    "Windows",
    "check_gates",
    "gate_rules",
    "has_replaced_rectifiers",
    "soft_gate",
    "soft_winners",
]


def check_gates(gates: float) -> None:
    """Raise `SettingError` unless `gates` is a finite number, 0 or more."""
    if not is_number(gates) or not 0 <= gates < math.inf:
        raise SettingError(f"`gates` is {gates!r}, but it must be a width of 0 or more. 0 is the true derivative.")


def soft_gate(values: Tensor, width: float, *, low: float = 0.0, high: float = math.inf) -> Tensor:
    """Soften the derivative of a rectifier, so that it rises linearly around its kinks instead of jumping.

    The gate is `clamp((z - low) / (width * sd) + 1/2, 0, 1) * clamp((high - z) / (width * sd) + 1/2, 0, 1)` with `sd`
    the standard deviation of `z` over the row. Rows with zero deviation get the true derivative.

    Source: this package, after the smoother rectifier of Dombrowski et al. (2019), "Explanations can be manipulated and
    geometry is to blame".

    Args:
        values: input `z` of the rectifier, shape (B, ...).
        width: width of the ramps in standard deviations, 0 or more; 0 is the true derivative.
        low: the lower kink.
        high: the upper kink; infinite if the rectifier has none.

    Returns:
        Derivative in [0, 1], of the shape and dtype of `values`.

    Example:
        >>> soft_gate(torch.tensor([[-1.0, 0.0, 1.0]]), 2.0), soft_gate(torch.tensor([[-1.0, 0.0, 1.0]]), 0.0)
        (tensor([[0.0000, 0.5000, 1.0000]]), tensor([[0., 0., 1.]]))
    """
    wide = at_least_float32(values)
    sides = ([wide - low if low else wide] if low > -math.inf else []) + ([high - wide] if high < math.inf else [])
    if width == 0:
        return _true_derivative(sides, values)
    # hardsigmoid(x) is clamp(x / 6 + 1/2, 0, 1) in one call.
    steepness = _row_variance(wide, scale=(width / 6) ** 2).rsqrt_().reshape(-1, *[1] * (wide.dim() - 1))
    gate = torch.ones_like(wide) if not sides else F.hardsigmoid(sides[0] * steepness, inplace=True)
    for side in sides[1:]:
        gate = gate.mul_(F.hardsigmoid(side * steepness, inplace=True))
    # On the CPU, reading a value back does not stall.
    if values.device.type != "cpu" or not bool(steepness.isfinite().all()):
        gate = torch.where(steepness.isfinite(), gate, _true_derivative(sides, wide))
    softened: Tensor = gate.to(values.dtype)
    return softened


def _true_derivative(sides: Sequence[Tensor], like: Tensor) -> Tensor:
    inside = torch.ones_like(like, dtype=torch.bool)
    for side in sides:
        inside = inside & (side > 0)
    derivative: Tensor = inside.to(like.dtype)
    return derivative


def _row_variance(values: Tensor, *, scale: float) -> Tensor:
    """Unbiased variance of each row times a factor, shape (B,); 0 for a single value."""
    flat = values.flatten(1)
    count = flat.shape[1]
    if count < 2:
        return flat.new_zeros(len(flat))
    # torch's own variance takes twice as long on a CPU.
    total = flat.sum(dim=1)
    squares = row_norms(values).square_()
    return squares.addcmul_(total, total, value=-1 / count).clamp_min_(0).mul_(scale / (count - 1))


class Windows(NamedTuple):
    """Windows of a pooling operation; each tuple has one entry per spatial dimension."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def margins(self, lengths: Sequence[int], counts: Sequence[int]) -> list[int]:
        """Padding, in torch's order, that makes inputs of these lengths end with the last of `counts` windows."""
        margins: list[int] = []
        for length, count, size, stride, padding, dilation in zip(lengths, counts, *self, strict=True):
            needed = (count - 1) * stride + (size - 1) * dilation + 1
            # The last dimension comes first.
            margins = [padding, needed - padding - length, *margins]
        return margins

    def places(self, counts: Sequence[int]) -> list[tuple[Any, ...]]:
        """Index of the first value of all windows in a padded input, of the second, and so on."""
        offsets = [range(0, size * step, step) for size, step in zip(self.size, self.dilation, strict=True)]
        found: list[tuple[Any, ...]] = []
        for starts in itertools.product(*offsets):
            spans = zip(starts, counts, self.stride, strict=True)
            found.append((..., *[slice(start, start + (count - 1) * step + 1, step) for start, count, step in spans]))
        return found


def soft_winners(gradient: Tensor, values: Tensor, maxima: Tensor, windows: Windows, width: float) -> Tensor:
    """Share the gradient of max pooling among the values of each window that come close to its maximum.

    A value `z` of a window with the maximum `m` gets a share proportional to `clamp(1 + (z - m) / (width * sd), 0, 1)`
    with `sd` the standard deviation of the pooled values over the row, counting minus infinity as 0. The true gradient
    goes to the maximum alone, and jumps when two values swap ranks. Equal values get equal shares. A window with only
    minus infinity passes no gradient.

    Source: this package.

    Args:
        gradient: gradient at the maxima, shape (B, C, *O).
        values: input of the pooling, shape (B, C, *S).
        maxima: maximum of each window, shape (B, C, *O).
        windows: windows of the pooling.
        width: width of the ramp in standard deviations, above 0.

    Returns:
        Gradient at the values, of their shape and dtype.

    Example:
        >>> values = torch.tensor([[[1.0, 3.0, 9.0, 9.0]]])
        >>> maxima = torch.tensor([[[3.0, 9.0]]])
        >>> windows = Windows(size=(2,), stride=(2,), padding=(0,), dilation=(1,))
        >>> soft_winners(torch.tensor([[[1.0, 2.0]]]), values, maxima, windows, 1.0).round(decimals=3)
        tensor([[[0.3400, 0.6600, 1.0000, 1.0000]]])
    """
    if values.dim() == len(windows.size) + 1:
        # A single sample without a batch dimension.
        gradient, values, maxima = (part.unsqueeze(0) for part in (gradient, values, maxima))
        return soft_winners(gradient, values, maxima, windows, width).squeeze(0)
    wide, counts = at_least_float32(values), maxima.shape[2:]
    variance = _row_variance(wide, scale=width**2)
    # On the CPU, reading a value back does not stall.
    if values.device.type != "cpu" or not bool(variance.isfinite().all()):
        # Some networks pad with minus infinity before they pool.
        variance = _row_variance(wide.masked_fill(wide == -math.inf, 0), scale=width**2)
    # If all values are equal, each is a maximum.
    reach = torch.where((variance > 0) & (variance < math.inf), variance.sqrt(), 1.0)
    margins, places = windows.margins(values.shape[2:], counts), windows.places(counts)
    padded = F.pad(wide, margins, value=-math.inf)
    floor = maxima.masked_fill(maxima == -math.inf, 0) - reach.reshape(-1, *[1] * (wide.dim() - 1))
    total, found = torch.zeros_like(floor), torch.zeros_like(padded)
    # The shares are computed twice, since keeping them for all windows takes too much memory.
    for place in places:
        total += (padded[place] - floor).relu_()
    shared = gradient / total.masked_fill_(total == 0, 1)
    for place in places:
        found[place].addcmul_((padded[place] - floor).relu_(), shared)
    return F.pad(found, [-margin for margin in margins]).to(values.dtype)


class _Rectifier(NamedTuple):
    """Derivative of a rectifier: `slope` below its lower kink, 1 between the kinks, 0 above the upper one."""

    low: float = 0.0
    high: float = math.inf
    slope: float | Tensor = 0.0

    def derivative(self, values: Tensor, width: float) -> Tensor:
        gate = soft_gate(values, width, low=self.low, high=self.high)
        if isinstance(self.slope, Tensor) or self.slope != 0:
            slope = self.slope.detach() if isinstance(self.slope, Tensor) else self.slope
            gate = gate * (1 - slope) + slope
        return gate


def _relu(input: Tensor, inplace: bool = False) -> _Rectifier:
    return _Rectifier()


def _relu6(input: Tensor, inplace: bool = False) -> _Rectifier:
    return _Rectifier(high=6.0)


def _hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> _Rectifier:
    return _Rectifier(low=min_val, high=max_val)


def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> _Rectifier:
    return _Rectifier(slope=negative_slope)


def _prelu(input: Tensor, weight: Tensor) -> _Rectifier:
    # One slope per channel, in dimension 1.
    return _Rectifier(slope=weight if weight.numel() == 1 else weight.reshape(-1, *[1] * (input.dim() - 2)))


# Each function is mapped to one with the same parameters that returns its kinks.
_RECTIFIERS: Mapping[Any, Callable[..., _Rectifier]] = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_), _relu),
    F.relu6: _relu6,
    **dict.fromkeys((F.hardtanh, F.hardtanh_), _hardtanh),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), _leaky_relu),
    **dict.fromkeys((torch.prelu, Tensor.prelu), _prelu),
}
_GATED_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.PReLU),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
)


def _pooling_windows(
    input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, *_: Any, **__: Any
) -> tuple[Any, ...]:
    return kernel_size, stride or kernel_size, padding, dilation


MAX_POOLING: Mapping[Any, int] = {
    function: count
    for count, functions in enumerate(
        (
            (F.max_pool1d, torch.max_pool1d, F.max_pool1d_with_indices),
            (F.max_pool2d, torch.max_pool2d, F.max_pool2d_with_indices),
            (F.max_pool3d, torch.max_pool3d, F.max_pool3d_with_indices),
        ),
        1,
    )
    for function in functions
}
"""Number of spatial dimensions of each function of max pooling."""


def gate_rules(width: float) -> dict[Any, Rule]:
    """Return the rules of rectifiers and max pooling with soft gates of this width, above 0, in standard deviations."""
    return {
        **dict.fromkeys(_RECTIFIERS, partial(_rectify, width)),
        **dict.fromkeys(MAX_POOLING, partial(_pool, width)),
    }


def _rectify(width: float, operation: Operation) -> Any:
    """Call a rectifier unchanged, and return its result under a node with a soft derivative."""
    if not is_differentiated(operation.source):
        return operation.run()
    rectifier = _RECTIFIERS[operation.function](*operation.args, **operation.named)
    return scale_gradient(operation, lambda values: rectifier.derivative(values, width), rank=ACTIVATION)


def _pool(width: float, operation: Operation) -> Any:
    """Call max pooling unchanged, and return its result under a node that shares the gradient."""
    source = operation.source
    result = operation.run()
    if not is_differentiated(source):
        return result
    dimensions = MAX_POOLING[operation.function]
    windows = Windows(
        *[per_dimension(value, dimensions) for value in _pooling_windows(*operation.args, **operation.named)]
    )
    maxima, *indices = result if isinstance(result, tuple) else (result,)
    if maxima.shape[-dimensions:].numel() == 1:
        # Pooling over the whole map keeps its true gradient, as adaptive pooling does.
        return result
    # The maxima may be overwritten later.
    values, version, kept = source.detach(), in_place_changes(source), maxima.detach().clone()

    def share(gradient: Tensor) -> list[Tensor]:
        if in_place_changes(values) != version:
            raise ModelError("The input of max pooling was changed in place after the pooling. Change a copy instead.")
        return [soft_winners(gradient, values, kept, windows, width)]

    softened = follow(maxima, share, source)
    return (softened, *indices) if indices else softened


def has_replaced_rectifiers(model: nn.Module) -> bool:
    """Whether a Captum method has set hooks on the model's rectifiers to replace their backward pass."""
    for module in model.modules():
        if isinstance(module, _GATED_MODULES):
            places = [str(getattr(hook, "__module__", "")) for hook in forward_hooks(module)]
            # Captum's layer methods only read; their hooks come from `captum._utils.gradient`.
            if any(place.startswith("captum.") and place != "captum._utils.gradient" for place in places):
                return True
    return False
