"""Balanced backward passes: what makes a network nonlinear is held constant, so that a gradient adds up to the score.

For a score of a network whose operations are linear, piecewise linear, or balanced here, the sum of input times
gradient plus that of all biases times their gradients is the score.

Source: Mehri et al. (2025), "LibraGrad: Balancing Gradient Flow for Universally Better Vision Transformer
Attributions"; for products without a gate, which halve the gradient, Achtibat et al. (2024), "AttnLRP".
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from types import FunctionType
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import torch
import torch.nn.functional as F  # noqa: N812 - the conventional name
from torch import Tensor, nn

from parchgrad.core._torch import function_of
from parchgrad.core.layers import Layer
from parchgrad.core.operations import (
    ACTIVATION,
    CONSTANT,
    GATE,
    SQUASHED,
    Operation,
    Rule,
    follow,
    functions_named,
    held,
    scale_gradient,
)
from parchgrad.core.partition import at_least_float32
from parchgrad.errors import ModelError, SettingError

__all__ = [
    "COMPOSITES",
    "STAND_INS",
    "Balance",
    "StandIn",
    "norm_gradient",
    "register_rule",
    "rules_of_modules",
    "stand_in",
]


def norm_gradient(gradient: Tensor, values: Tensor, *, epsilon: float, is_centred: bool) -> Tensor:
    """Compute the gradient at the input of a normalisation over the last dimension with its denominator constant.

    The normalisation is `(x - mean) / sqrt(var + epsilon)`, or `x / sqrt(mean of x^2 + epsilon)` if it is not centred.

    Args:
        gradient: gradient at the normalised values, shape (..., N).
        values: input of the normalisation, shape (..., N).
        epsilon: added to the variance.
        is_centred: whether the mean is subtracted.

    Example:
        >>> values = torch.tensor([[-2.0, 2.0]])
        >>> norm_gradient(torch.tensor([[1.0, 0.0]]), values, epsilon=0, is_centred=True)
        tensor([[ 0.2500, -0.2500]])
    """
    return _through_norm(gradient, _steepness(values, epsilon, is_centred), is_centred)


def _steepness(values: Tensor, epsilon: float, is_centred: bool) -> Tensor:
    """Compute the inverse of the denominator of a normalisation, shape (..., 1)."""
    centred = values - values.mean(dim=-1, keepdim=True) if is_centred else values
    # torch's own variance takes several times as long on a CPU.
    squares: Tensor = torch.linalg.vector_norm(centred, dim=-1, keepdim=True).square_()
    return squares.div_(values.shape[-1]).add_(epsilon).rsqrt_()


def _through_norm(gradient: Tensor, steepness: Tensor, is_centred: bool) -> Tensor:
    if is_centred:
        gradient = gradient - gradient.mean(dim=-1, keepdim=True)
    return gradient * steepness


StandIn: TypeAlias = Callable[..., Tensor]
STAND_INS: dict[Any, StandIn] = {}
"""Rules of users, by class of module or function."""
_Kind = TypeVar("_Kind", bound=StandIn)


def register_rule(operation: Any) -> Callable[[_Kind], _Kind]:
    """Register the decorated function as the rule by which `balance` passes a module or function of your own.

    The function computes the result anew, with `detach()` on every factor that is to be constant. The gradient flows
    through it instead of through the operation; the values stay those of the operation, with which its own are
    compared. What the rule of a module calls
    is balanced too, apart from that module itself.

    Args:
        operation: a class of modules, whose rule gets the module and its inputs; or a function of torch or with
            `torch.overrides.handle_torch_function`, whose rule gets the same arguments, under each of its spellings in
            `torch`, `torch.Tensor` and `torch.nn.functional`. They must return one tensor, and modules must not
            overwrite their inputs.

    Raises:
        SettingError: if `operation` is a module instead of its class, cannot be called, is a layer that can be edited,
            or is a function that torch does not see.

    Example:
        >>> import parchgrad as pg
        >>> class Squash(nn.Module):
        ...     def forward(self, x):
        ...         return x / (1 + x.norm(dim=1, keepdim=True))
        >>> @register_rule(Squash)
        ... def squash(module, x):
        ...     return x / (1 + x.norm(dim=1, keepdim=True)).detach()
        >>> x, model = torch.ones(1, 4, requires_grad=True), nn.Sequential(Squash(), nn.Linear(4, 2, bias=False)).eval()
        >>> with pg.ParchGrad(model, None, balance=True):
        ...     score = model(x)[0, 1]
        ...     gradient, = torch.autograd.grad(score, x)
        >>> torch.allclose((x * gradient).sum(), score)
        True
    """
    if isinstance(operation, nn.Module) or not callable(operation):
        raise SettingError(
            f"`operation` is of type {type(operation).__name__}, but it must be a class of modules or a function. Pass "
            "type(module)."
        )
    if isinstance(operation, type) and issubclass(operation, Layer):
        raise SettingError(
            f"`operation` is {operation.__name__}, a layer that is edited itself. Register rules for the functions "
            "that its forward calls, or for a module around it."
        )
    if isinstance(operation, FunctionType) and not _is_overridable(operation):
        raise SettingError(
            f"`operation` is the function {operation.__name__}, whose calls torch does not report. Register a rule for "
            "the module that calls it, or decorate it as torch.overrides.handle_torch_function describes."
        )

    def register(rule: _Kind) -> _Kind:
        STAND_INS[operation] = rule
        return rule

    return register


def _is_overridable(function: FunctionType) -> bool:
    """Whether torch reports the calls of a function in Python, which its own and decorated functions ask for."""
    return function.__module__.split(".")[0] == "torch" or "handle_torch_function" in function.__code__.co_names


def rules_of_modules(model: nn.Module) -> list[tuple[nn.Module, StandIn]]:
    """List the modules of a model that have a rule of a user, each with that of its nearest class."""
    found = []
    for module in model.modules() if STAND_INS else ():
        kind = next((kind for kind in type(module).__mro__ if kind in STAND_INS), None)
        if kind is not None:
            found.append((module, STAND_INS[kind]))
    return found


def stand_in(result: Tensor, rule: StandIn, *args: Any, **named: Any) -> Tensor:
    """Return a computed result under the gradient of a user's rule.

    Raises:
        ModelError: if the rule does not accept the operation's arguments, either does not return a tensor, or they
            return different values.
    """
    name = getattr(rule, "__name__", rule)
    if not isinstance(result, Tensor):
        raise ModelError(
            f"The rule {name!r} is for an operation that returns a {type(result).__name__}, but only operations that "
            "return one tensor can have a rule. Register rules for the modules or functions inside."
        )
    try:
        computed = rule(*args, **named)
    except TypeError as error:
        raise ModelError(
            f"The rule {name!r} fails ({error}). The rule of a module gets the module and its inputs, that of a "
            "function the function's arguments."
        ) from error
    found = tuple(computed.shape) if isinstance(computed, Tensor) else f"a {type(computed).__name__}"
    if found != tuple(result.shape):
        raise ModelError(
            f"The rule {name!r} returns {found}, but the operation returns {tuple(result.shape)}. Return a tensor of "
            "the operation's shape."
        )
    difference = (computed.detach() - result.detach()).abs().max() if result.numel() else 0
    if not difference <= 0.01 * result.detach().abs().max():
        raise ModelError(
            f"The rule {name!r} returns other values than the operation, by up to {float(difference):.2g}. Compute the "
            "same result, with `detach()` on the factors that are to be constant."
        )
    if not computed.requires_grad:
        return result.detach()
    rank = 0 if result.grad_fn is None else _RANKS.get(_operation_of(result.grad_fn), 0)
    return follow(result, lambda gradient: [gradient], computed, rank=rank)


class _Norm(NamedTuple):
    """A normalisation over the last dimension of a reshaped input, then a scale and a shift in the input's shape."""

    shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    epsilon: float
    is_centred: bool = True


def _rows_of(values: Tensor, normalized_shape: Sequence[int]) -> tuple[int, ...]:
    return *values.shape[: -len(normalized_shape)], math.prod(normalized_shape)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> _Norm:
    return _Norm(_rows_of(input, normalized_shape), weight, bias, eps)


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> _Norm:
    epsilon = torch.finfo(input.dtype).eps if eps is None else eps
    return _Norm(_rows_of(input, normalized_shape), weight, None, epsilon, is_centred=False)


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> _Norm:
    weight, bias = (
        None if values is None else values.reshape(-1, *[1] * (input.dim() - 2)) for values in (weight, bias)
    )
    return _Norm((input.shape[0], num_groups, math.prod(input.shape[1:]) // num_groups), weight, bias, eps)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> _Norm | None:
    # With running statistics it is linear.
    return _group_norm(input, input.shape[1], weight, bias, eps) if use_input_stats else None


class Balance:
    """The rules of one forward pass.

    Attributes:
        has_acted: whether an operation was balanced.
    """

    def __init__(self, weights: Collection[int], *, is_input_traced: bool = True) -> None:
        """Start a pass.

        Args:
            weights: ids of the model's weights, which do not depend on its input.
            is_input_traced: whether an input requires a gradient; if not, gradients begin where weights meet the data.
        """
        self.has_acted = False
        self._weights, self._is_input_traced = weights, is_input_traced
        # Whether the result of a node depends on the input, and the rank of its values.
        self._known: dict[Any, bool] = {}
        self._ranks: dict[tuple[Any, bool], int] = {}

    def rules(self) -> dict[Any, Rule]:
        """Return the rule of each function."""
        found: dict[Any, Rule] = {}

        def add(names: Iterable[str], rule: Rule) -> None:
            found.update(dict.fromkeys(functions_named(*names), rule))

        for names, limit in _ACTIVATIONS.items():
            add(names, partial(self._hold_ratio, limit, ACTIVATION))
        add(("tanh", "tanh_"), partial(self._hold_ratio, 1.0, SQUASHED))
        add(("square", "square_"), partial(self._hold_ratio, 0.0, 0))
        add(("pow", "__pow__", "pow_", "__ipow__"), self._hold_power)
        for names, places in _PRODUCTS.items():
            add(names, partial(self._multiply, places))
        add(("einsum",), self._contract)
        add(_DIVISIONS, self._divide)
        for name, read in _NORMS.items():
            add((name,), partial(self._normalise, read))
        found[F.instance_norm] = partial(self._normalise, _instance_norm)
        found[F.scaled_dot_product_attention] = self._attend
        found[F.glu] = self._hold_half
        return found

    def own_rules(self) -> dict[Any, Rule]:
        """Return the rules of users for functions, under each of their spellings."""
        found: dict[Any, Rule] = {}
        for function, rule in STAND_INS.items():
            spellings = functions_named(getattr(function, "__name__", ""))
            for each in spellings if function in spellings else [function]:
                found[each] = partial(self._stand_in, rule)
        return found

    def _stand_in(self, rule: StandIn, operation: Operation) -> Any:
        self.has_acted = True
        # Only modules of torch pass it on.
        named = {name: value for name, value in operation.named.items() if name != "_stacklevel"}
        return stand_in(operation.run(), rule, *operation.args, **named)

    def _normalise(self, read: Callable[..., _Norm | None], operation: Operation) -> Any:
        """Run a normalisation unchanged, and hold its denominator constant on the way back."""
        source, result = operation.source, operation.run()
        norm = read(*operation.args, **operation.named) if source.requires_grad else None
        if norm is None:
            return result
        self.has_acted = True
        shape, is_centred = norm.shape, norm.is_centred
        steepness = _steepness(at_least_float32(source.detach()).reshape(shape), norm.epsilon, is_centred)
        weight = None if norm.weight is None else norm.weight.detach()
        # Not the source itself, whose memory may be freed.
        dtype, own_shape, shift = source.dtype, source.shape, None if norm.bias is None else norm.bias.shape

        def pullback(gradient: Tensor) -> list[Tensor]:
            wide = at_least_float32(gradient)
            weighted = wide if weight is None else wide * weight
            through = _through_norm(weighted.reshape(shape), steepness, is_centred).reshape(own_shape).to(dtype)
            return [through] if shift is None else [through, gradient.sum_to_size(shift)]

        return follow(result, pullback, source, *([] if norm.bias is None else [norm.bias]))

    def _hold_ratio(self, limit: float, rank: int, operation: Operation) -> Any:
        """Run an elementwise operation with f(0) = 0 unchanged, and hold f(x) / x constant on the way back."""
        source = operation.source
        if not source.requires_grad:
            return operation.run()
        self.has_acted = True
        if operation.is_in_place():
            return scale_gradient(
                operation, lambda values: _ratio(operation.on(values.clone()).run(), values, limit), rank=rank
            )
        result = operation.run()
        ratio = _ratio(result.detach(), source.detach(), limit)
        return follow(result, lambda gradient: [(gradient * ratio).to(gradient.dtype)], source, rank=rank)

    def _hold_power(self, operation: Operation) -> Any:
        """Balance a power above 1; roots and inverse powers have no ratio at 0."""
        exponent = _argument(operation, 1, "exponent")
        if isinstance(exponent, int | float) and exponent > 1 and isinstance(operation.source, Tensor):
            return self._hold_ratio(0.0, self._rank(operation.source.grad_fn), operation)
        return operation.run()

    def _multiply(self, places: Sequence[tuple[int, str]], operation: Operation) -> Any:
        """Run a product of several values that depend on the input with its gates held constant.

        The gradient flows to those of the lowest rank. If these are several, each gets an equal share.
        """
        operands = {place: _argument(operation, *place) for place in places}
        involved = {place: values for place, values in operands.items() if self._depends(values)}
        if len(involved) < 2:
            return operation.run()
        self.has_acted = True
        ranks = {place: self._rank(values.grad_fn) for place, values in involved.items()}
        least = min(ranks.values())
        share = 1 / sum(rank == least for rank in ranks.values())
        is_in_place = operation.is_in_place()
        replaced = operation
        for place, values in involved.items():
            if ranks[place] > least:
                values = values.detach()
            elif share < 1:
                values = _shared(values, share, ranks[place])
            # Its value may be needed on the way back.
            replaced = _with_argument(replaced, *place, values.clone() if is_in_place else values)
        if not is_in_place:
            return replaced.run()
        return operation.source.copy_(replaced._replace(function=torch.mul).run())

    def _contract(self, operation: Operation) -> Any:
        """Run `einsum`, a product of all its operands."""
        equation, *operands = operation.args
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = list(operands[0])
        places = [(place, "") for place in range(1, len(operands) + 1)]
        return self._multiply(places, operation._replace(args=(equation, *operands)))

    def _divide(self, operation: Operation) -> Any:
        """Run a division with the divisor held constant."""
        divisor = _argument(operation, 1, "other")
        if self._depends(operation.source) and self._depends(divisor):
            self.has_acted = True
            operation = _with_argument(operation, 1, "other", divisor.detach())
        return operation.run()

    def _attend(self, operation: Operation) -> Any:
        """Run attention with its weights held constant: the gradient flows through the values alone."""
        # With constant values, it flows through the weights.
        if not self._depends(_argument(operation, 2, "value")):
            return operation.run()
        self.has_acted = True
        for place in ((0, "query"), (1, "key")):
            operation = _with_argument(operation, *place, _argument(operation, *place).detach())
        mask = _argument(operation, 3, "attn_mask")
        # Without its gradient another kernel would run, which rounds otherwise.
        if isinstance(mask, Tensor):
            operation = _with_argument(operation, 3, "attn_mask", held(mask))
        return operation.run()

    def _hold_half(self, operation: Operation) -> Any:
        """Run a gated linear unit with its gate held constant."""
        source, result = operation.source, operation.run()
        if not source.requires_grad:
            return result
        self.has_acted = True
        given = _argument(operation, 1, "dim")
        dimension = -1 if given is None else given
        gate = source.detach().chunk(2, dim=dimension)[1].sigmoid()
        return follow(
            result,
            lambda gradient: [torch.cat([gradient * gate, torch.zeros_like(gradient)], dim=dimension)],
            source,
            rank=ACTIVATION,
        )

    def _depends(self, values: Any) -> bool:
        """Whether a value depends on the model's input, and not on its weights alone."""
        if not (isinstance(values, Tensor) and values.requires_grad):
            return False
        node = values.grad_fn
        return id(values) not in self._weights if node is None else self._follows_input(node)

    def _follows_input(self, node: Any) -> bool:
        stack = [node]
        while stack:
            node = stack[-1]
            if node in self._known:
                stack.pop()
                continue
            earlier = [other for other, _ in node.next_functions if other is not None]
            if hasattr(node, "variable"):
                self._known[node] = node.variable is not CONSTANT and id(node.variable) not in self._weights
            elif any(self._known.get(other) for other in earlier) or (not self._is_input_traced and _takes_data(node)):
                self._known[node] = True
            elif waiting := [other for other in earlier if other not in self._known]:
                stack.append(waiting[0])
            else:
                self._known[node] = False
        return self._known[node]

    def _rank(self, node: Any, is_mixed: bool = False) -> int:
        """Compute the rank of a node's values, whatever reshapes, shifts or scales them."""
        if node is None:
            return 0
        key = (node, is_mixed)
        if key not in self._ranks:
            self._ranks[key] = self._rank_by_graph(node, is_mixed)
        return self._ranks[key]

    def _rank_by_graph(self, node: Any, is_mixed: bool) -> int:
        name = _operation_of(node)
        found: int = getattr(node, "rank", 0) if name not in _RANKS or _is_two_sided(node) else _RANKS[name]
        if found:
            # Weights of attention stay weights when they are mixed across heads.
            return found if "Softmax" in name or not is_mixed else 0
        if name not in _PASSED and name not in _MIXING:
            return 0
        earlier = [other for other, _ in node.next_functions if other is not None and self._follows_input(other)]
        if not earlier or (len(earlier) > 1 and name not in _JOINING):
            return 0
        # The last is the branch of a residual sum, which ends the search soonest.
        is_mixed |= name in _MIXING
        ranks = takewhile(bool, (self._rank(other, is_mixed) for other in reversed(earlier)))
        return min([*ranks, *[0] * len(earlier)][: len(earlier)])

    def unbalanced(self, nodes: Iterable[Any], *, is_alone: bool) -> list[str]:
        """Name the operations among nodes on the path that are neither linear, piecewise linear, nor balanced.

        Where nothing was balanced, only those are named that a rule would have covered.

        Args:
            nodes: nodes of the graph between the input and the output.
            is_alone: whether balance is all that is asked for, so that all are named in any case.
        """
        names, on_path = [], set(nodes)
        names_all = self.has_acted or is_alone
        for node in nodes:
            # Before it, there is nothing but weights.
            name, function = _operation_of(node), function_of(node)
            # torchvision's detectors pool regions linearly.
            if _takes_data(node) or re.search("roi_(align|pool)", name):
                continue
            is_covered = name in _COVERED or name.startswith("ScaledDotProduct")
            if function is not None and not function.__module__.startswith("parchgrad."):
                is_left = names_all or is_covered
            elif name in _FACTORS or name.startswith("ScaledDotProduct"):
                is_left = (names_all or is_covered) and _multiplies(node, on_path)
            else:
                is_left = is_covered or (names_all and (name in _NONLINEAR or _normalises_batch(node)))
            if is_left:
                names.append(function.__name__ if function is not None else _snake_case(name))
        return list(dict.fromkeys(names))


def _normalises_batch(node: Any) -> bool:
    """Whether a node normalises by the statistics of its batch, which depend on the input."""
    return "BatchNorm" in node.name() and bool(getattr(node, "_saved_training", False))


def _multiplies(node: Any, on_path: Collection[Any]) -> bool:
    """Whether several factors of a product carry the gradient without a share, or a divisor or an attention weight."""
    name = _operation_of(node)
    operands = [other for other, _ in node.next_functions]
    free = [other in on_path and not _is_share(other) for other in operands]
    if name == "Div":
        return len(free) > 1 and free[1]
    if name.startswith("ScaledDotProduct"):
        return any(free[:2])
    return sum(free[place] for place in _FACTORS[name] if place < len(free)) > 1


def _is_share(node: Any) -> bool:
    """Whether a factor carries a share of the gradient, or is a weight, apart from changes of shape."""
    while _operation_of(node) in _RESHAPED and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
    return hasattr(node, "variable") or hasattr(node, "is_share")


def _ratio(images: Tensor, values: Tensor, limit: float) -> Tensor:
    """Divide f(x) by x; the limit where both are 0."""
    wide = at_least_float32(values)
    ratio = at_least_float32(images) / wide
    # On the CPU, reading a value back does not stall, and is faster than looking for zeros.
    if ratio.device.type != "cpu" or not math.isfinite(float(ratio.sum())):
        ratio = ratio.masked_fill_(wide == 0, limit)
    return ratio


def _takes_data(node: Any) -> bool:
    """Whether a layer with weights is applied to values without a gradient, such as an input that needs none."""
    place = _DATA.get(_operation_of(node))
    return place is not None and (place < 0 or node.next_functions[place][0] is None)


# Place of the data among the operands.
_DATA = {
    **dict.fromkeys(("Convolution", "Mm", "NativeLayerNorm", "NativeBatchNorm", "NativeGroupNorm"), 0),
    "Addmm": 1,
    "Embedding": -1,
}


def _is_two_sided(node: Any) -> bool:
    """Whether a node clamps values to a range with negative values, so that its result is not a gate."""
    if not _operation_of(node).startswith(("Clamp", "Hardtanh")):
        return False
    least = getattr(node, "_saved_min", getattr(node, "_saved_min_val", None))
    return not isinstance(least, int | float) or least < 0


def _operation_of(node: Any) -> str:
    """Name of a node's operation, such as `Mul`."""
    return re.sub(r"Backward\d*$", "", node.name())


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _shared(values: Tensor, share: float, rank: int) -> Tensor:
    shared = follow(values.detach(), lambda gradient: [gradient * share], values, rank=rank)
    cast(Any, shared.grad_fn).is_share = True
    return shared


def _argument(operation: Operation, place: int, name: str) -> Any:
    return operation.args[place] if len(operation.args) > place else operation.named.get(name)


def _with_argument(operation: Operation, place: int, name: str, values: Tensor) -> Operation:
    if len(operation.args) > place:
        return operation._replace(args=(*operation.args[:place], values, *operation.args[place + 1 :]))
    return operation._replace(named={**operation.named, name: values})


_RANKS = {
    **dict.fromkeys(("Softmax", "SafeSoftmax", "Sigmoid", "Hardsigmoid", "Softplus", "Exp", "Erf"), GATE),
    **dict.fromkeys(("Clamp", "ClampMin", "ClampMax", "Hardtanh"), GATE),
    **dict.fromkeys(("Rsqrt", "Sqrt", "Pow", "Reciprocal", "Norm", "LinalgVectorNorm", "Std", "Var"), GATE),
    "Tanh": SQUASHED,
    **dict.fromkeys(("Relu", "LeakyRelu", "PreluKernel", "Threshold"), ACTIVATION),
}
_JOINING = {"Add", "Sub", "Mul", "Cat", "Stack", "Where", "Maximum", "Minimum"}
_PASSED = {
    *("Rsub", "Div", "Neg", "Mean", "Sum", "AvgPool2D", "AdaptiveAvgPool2D", "NativeDropout", "NanToNum", "Cumsum"),
    *("View", "UnsafeView", "ReshapeAlias", "Transpose", "T", "Permute", "Expand", "Squeeze", "Unsqueeze", "AsStrided"),
    *("Clone", "ToCopy", "Alias", "Slice", "Select", "Split", "SplitWithSizes", "Unbind", "Unfold", "Im2Col"),
    *("Repeat", "Index", "IndexSelect", "Roll", "Flip", "Gather", "Scatter", "Topk", "Sort", "Tril", "Triu"),
    *("MaskedFill", "ConstantPadNd", "CopySlices", "Amax", "Amin", "Clamp", "ClampMin", "ClampMax", "Hardtanh"),
    *("UpsampleNearest2D", "UpsampleLinear1D", "UpsampleBilinear2D", "UpsampleBicubic2D", *_JOINING),
}
_RESHAPED = {
    *("View", "UnsafeView", "ReshapeAlias", "Transpose", "T", "Permute", "Expand", "Squeeze", "Unsqueeze", "Clone"),
}
_MIXING = {"Mm", "Addmm", "Bmm", "Convolution", "NativeBatchNorm", "CudnnBatchNorm"}


# The derivative at 0 of each activation.
_ACTIVATIONS = {
    ("gelu", "silu", "silu_", "hardswish", "hardswish_"): 0.5,
    ("mish", "mish_"): math.tanh(math.log(2)),
    ("elu", "elu_", "celu", "celu_", "relu6", "relu6_", "hardtanh", "hardtanh_", "softsign"): 1.0,
    ("selu", "selu_"): 1.0507009873554805,
}
_PRODUCTS = {
    ("mul", "multiply", "__mul__", "__rmul__", "mul_", "multiply_", "__imul__"): ((0, "input"), (1, "other")),
    ("matmul", "__matmul__", "__rmatmul__"): ((0, "input"), (1, "other")),
    ("mm", "bmm"): ((0, "input"), (1, "mat2")),
    ("addmm",): ((1, "mat1"), (2, "mat2")),
    ("baddbmm",): ((1, "batch1"), (2, "batch2")),
    ("addcmul",): ((1, "tensor1"), (2, "tensor2")),
    ("linear", "conv1d", "conv2d", "conv3d"): ((0, "input"), (1, "weight")),
}
_DIVISIONS = ("div", "divide", "true_divide", "__truediv__", "div_", "divide_", "__itruediv__")
_NORMS: Mapping[str, Callable[..., _Norm | None]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
}
# Operations that are not proportional to their input, by the name of their node.
_NONLINEAR = {
    *("Exp", "Expm1", "Log", "Log1P", "Logsumexp", "Softmax", "SafeSoftmax", "LogSoftmax", "Sigmoid", "LogSigmoid"),
    *("Hardsigmoid", "Softplus", "Tanh", "Erf", "Sin", "Cos", "Pow", "Sqrt", "Rsqrt", "Reciprocal", "Prod", "Cumprod"),
    *("Gelu", "Silu", "Hardswish", "Mish", "Elu", "Glu", "NativeLayerNorm", "NativeGroupNorm", "FusedRmsNorm"),
    *("Var", "Std", "Softshrink", "Renorm", "Atan", "Celu", "Selu", "Lerp", "Addcdiv", "Atan2", "LinalgMultiDot"),
    *("Exp2", "Log2", "Log10", "Logaddexp", "Logaddexp2", "Xlogy", "Sinh", "Cosh", "Asinh", "Acosh", "Atanh", "Tan"),
    *("Asin", "Acos", "Erfc", "Erfinv", "Logit", "Logcumsumexp", "Sinc"),
    *("MkldnnRnnLayer", "CudnnRnn", "MiopenRnn", "ThnnFusedLstmCell", "ThnnFusedGruCell"),
}
# Those of them that a rule covers, if it sees their call.
_COVERED = {
    *("Gelu", "Silu", "Hardswish", "Mish", "NativeLayerNorm", "NativeGroupNorm", "FusedRmsNorm", "Glu"),
}
# Places of the factors of products.
_FACTORS = {
    **dict.fromkeys(("Mul", "Mm", "Bmm", "Mv", "Dot", "Div"), (0, 1)),
    **dict.fromkeys(("Addmm", "Baddbmm", "Addbmm", "Addcmul", "Addmv"), (1, 2)),
    **dict.fromkeys(("Convolution", "GridSampler2D", "GridSampler3D"), (0, 1)),
    "Trilinear": (0, 1, 2),
}
COMPOSITES = (F.multi_head_attention_forward, F.normalize, F.local_response_norm)
"""Functions in Python whose parts follow the rules."""
