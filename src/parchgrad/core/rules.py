"""Soft gates and smooth strides: the backward passes of rectifiers, max pooling and strided operations.

The values of the forward pass do not change. A torch function mode intercepts the calls of modules and functions, so
the model need not be modified.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812 - the conventional name
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from parchgrad._io.checks import is_number
from parchgrad.core._torch import forward_hooks, in_place_changes
from parchgrad.core.convolution import per_dimension
from parchgrad.core.partition import at_least_float32, channel_norms, in_ordinary_range, restored_range, row_norms
from parchgrad.errors import ModelError, SettingError

__all__ = [
    "BackwardRules",
    "Windows",
    "check_antialias",
    "check_gates",
    "has_active_rules",
    "has_replaced_rectifiers",
    "is_pass_through",
    "refuse_second_derivatives",
    "smooth_strides",
    "soft_gate",
    "soft_winners",
]


def check_gates(gates: float) -> None:
    """Raise `SettingError` unless `gates` is a finite number, 0 or more."""
    if not is_number(gates) or not 0 <= gates < math.inf:
        raise SettingError(f"`gates` is {gates!r}, but it must be a width of 0 or more. 0 is the true derivative.")


def check_antialias(antialias: bool) -> None:
    """Raise `SettingError` unless `antialias` is a boolean."""
    if not isinstance(antialias, bool):
        raise SettingError(f"`antialias` is {antialias!r}, but it must be True or False.")


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
    if values.device.type != "cpu" or not bool((steepness < math.inf).all()):
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


def _summed(values: Tensor, dimension: int, count: int) -> Tensor:
    """Sum `count` neighbours along a dimension, which becomes shorter by `count - 1`."""
    if count == 1:
        return values
    length = values.shape[dimension] - count + 1
    total = values.narrow(dimension, 0, length) + values.narrow(dimension, 1, length)
    for place in range(2, count):
        total += values.narrow(dimension, place, length)
    return total


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


def _convolution_stride(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, *_: Any, **__: Any
) -> Any:
    return stride


def _pooling_stride(input: Tensor, kernel_size: Any, stride: Any = None, *_: Any, **__: Any) -> Any:
    return stride or kernel_size


def _pooling_windows(
    input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, *_: Any, **__: Any
) -> tuple[Any, ...]:
    return kernel_size, stride or kernel_size, padding, dilation


# Number of spatial dimensions of each function.
_MAX_POOLING: Mapping[Any, int] = {
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
_STRIDED: Mapping[Any, tuple[int, Callable[..., Any]]] = {
    **{function: (count, _convolution_stride) for count, function in enumerate((F.conv1d, F.conv2d, F.conv3d), 1)},
    **{
        function: (count, _pooling_stride)
        for count, function in enumerate((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), 1)
    },
    **{function: (count, _pooling_stride) for function, count in _MAX_POOLING.items()},
}


class BackwardRules(TorchFunctionMode):
    """Give rectifiers and max pooling soft gates, and strided operations smooth strides, while active.

    When rules are nested, the innermost apply, even if they change nothing.

    Attributes:
        gates: width of the gates in standard deviations of the operation's input; 0 keeps the true derivatives.
        antialias: whether strides are smoothed.

    Example:
        >>> x = torch.tensor([[-1.0, 0.0, 1.0]], requires_grad=True)
        >>> with BackwardRules(gates=2.0, antialias=False):
        ...     output = nn.ReLU()(x)
        >>> output, torch.autograd.grad(output.sum(), x)[0]
        (tensor([[0., 0., 1.]], grad_fn=<_SoftRectifierBackward>), tensor([[0.0000, 0.5000, 1.0000]]))
    """

    def __init__(self, *, gates: float, antialias: bool) -> None:
        """Store the settings."""
        super().__init__()
        self.gates = gates
        self.antialias = antialias

    def __enter__(self) -> "BackwardRules":
        """Activate the rules in this thread."""
        _ACTIVE.set((*_ACTIVE.get(), self))
        super().__enter__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self

    def __exit__(self, *failure: Any) -> None:
        """Restore the enclosing rules."""
        super().__exit__(*failure)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        # Interrupted passes may end in any order.
        _ACTIVE.set(tuple(other for other in _ACTIVE.get() if other is not self))

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function and replace its autograd node by one that follows the rules."""
        named = kwargs or {}
        if self.gates and function in _RECTIFIERS and self._applies(args, named):
            return _rectify(function, args, named, self.gates)
        if self.antialias and function in _STRIDED and self._applies(args, named):
            dimensions, read = _STRIDED[function]
            strides = per_dimension(read(*args, **named), dimensions)
            if max(strides) > 1:
                args, named = _with_input(args, named, _SmoothStride.apply(_input_of(args, named), strides))
        if self.gates and function in _MAX_POOLING and self._applies(args, named):
            return _pool(function, args, named, self.gates)
        return function(*args, **named)

    def _applies(self, args: Sequence[Any], named: Mapping[str, Any]) -> bool:
        # torch suspends the mode here, so these reads are not intercepted.
        values = _input_of(args, named)
        return values.requires_grad and torch.is_grad_enabled() and values.dim() > 1 and _ACTIVE.get()[-1:] == (self,)


# Active modes of this thread, innermost last.
_ACTIVE: ContextVar[tuple[BackwardRules, ...]] = ContextVar("parchgrad_rules", default=())


def has_active_rules() -> bool:
    """Whether any rules are active in this thread or task."""
    return bool(_ACTIVE.get())


def _input_of(args: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
    values: Tensor = args[0] if args else named["input"]
    return values


def _with_input(
    args: Sequence[Any], named: Mapping[str, Any], values: Tensor
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    return ((values, *args[1:]), named) if args else ((), {**named, "input": values})


def _rectify(function: Any, args: Sequence[Any], named: Mapping[str, Any], width: float) -> Tensor:
    """Call a rectifier unchanged, and return its result under a node with a soft derivative.

    The rectifier's own node still saves its tensors, since checkpointing compares their number in its second pass.
    """
    values = _input_of(args, named)
    # Before the call, which may overwrite the values.
    derivative = _RECTIFIERS[function](*args, **named).derivative(values.detach(), width)
    alias: Tensor = _Alias.apply(values)
    args, named = _with_input(args, named, alias)
    result: Tensor = function(*args, **named)
    if result is alias:
        return cast(Tensor, _SoftRectifierInPlace.apply(values, derivative))
    return cast(Tensor, _SoftRectifier.apply(values, [result], derivative))


def _pool(function: Any, args: Sequence[Any], named: Mapping[str, Any], width: float) -> Any:
    """Call max pooling unchanged, and return its result under a node that shares the gradient."""
    dimensions = _MAX_POOLING[function]
    windows = Windows(*[per_dimension(value, dimensions) for value in _pooling_windows(*args, **named)])
    result = function(*args, **named)
    maxima, *indices = result if isinstance(result, tuple) else (result,)
    if maxima.shape[-dimensions:].numel() == 1:
        # Pooling over the whole map keeps its true gradient, as adaptive pooling does.
        return result
    softened = _SoftWinners.apply(_input_of(args, named), [maxima], windows, width)
    return (softened, *indices) if indices else softened


def refuse_second_derivatives() -> None:
    """Raise `SettingError` in a backward pass that is itself recorded."""
    if torch.is_grad_enabled():
        raise SettingError(
            "Second derivatives (create_graph=True) through ParchGrad are undefined, because the edit does not "
            "depend on the input alone. Compute first derivatives only."
        )


class _Alias(torch.autograd.Function):
    """An alias under its own node, so that overwriting it leaves the graph of the original untouched."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _SoftRectifier(torch.autograd.Function):
    """A rectifier that was already computed. Its result comes in a list to hide it from autograd."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, hidden: list[Tensor], derivative: Tensor) -> Tensor:
        ctx.derivative = derivative
        return hidden[0].detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        return gradient * ctx.derivative, None, None


class _SoftRectifierInPlace(torch.autograd.Function):
    """A rectifier that already overwrote its input."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, derivative: Tensor) -> Tensor:
        ctx.derivative = derivative
        ctx.mark_dirty(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        return gradient * ctx.derivative, None


class _SoftWinners(torch.autograd.Function):
    """Max pooling that was already computed. Its maxima come in a list to hide them from autograd."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, hidden: list[Tensor], windows: Windows, width: float) -> Tensor:
        # Not by save_for_backward: checkpointing counts saved tensors. The maxima may be overwritten later.
        ctx.values, ctx.maxima, ctx.version = values.detach(), hidden[0].clone(), in_place_changes(values)
        ctx.windows, ctx.width = windows, width
        return hidden[0].detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        if in_place_changes(ctx.values) != ctx.version:
            raise ModelError("The input of max pooling was changed in place after the pooling. Change a copy instead.")
        return soft_winners(gradient, ctx.values, ctx.maxima, ctx.windows, ctx.width), None, None, None


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


def has_replaced_rectifiers(model: nn.Module) -> bool:
    """Whether a Captum method has set hooks on the model's rectifiers to replace their backward pass."""
    for module in model.modules():
        if isinstance(module, _GATED_MODULES):
            places = [str(getattr(hook, "__module__", "")) for hook in forward_hooks(module)]
            # Captum's layer methods only read; their hooks come from `captum._utils.gradient`.
            if any(place.startswith("captum.") and place != "captum._utils.gradient" for place in places):
                return True
    return False
