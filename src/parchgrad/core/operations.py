"""Operations of the forward pass, and nodes that give them another gradient than autograd's.

A *rule* gets an operation instead of torch running it, and returns its result, usually the same one under another node
of the graph. `BackwardRules` applies rules while a model runs.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F  # noqa: N812 - the conventional name
from torch import Tensor

from parchgrad.errors import SettingError

__all__ = [
    "ACTIVATION",
    "CONSTANT",
    "GATE",
    "SQUASHED",
    "Operation",
    "Rule",
    "follow",
    "functions_named",
    "held",
    "is_differentiated",
    "refuse_second_derivatives",
    "scale_gradient",
]


class Operation(NamedTuple):
    """A call of a function of torch.

    Attributes:
        function: the function.
        args: its positional arguments.
        named: its keyword arguments.

    Example:
        >>> operation = Operation(torch.add, (torch.ones(2), 1), {"alpha": 3})
        >>> operation.run(), operation.on(torch.zeros(2)).run()
        (tensor([4., 4.]), tensor([3., 3.]))
    """

    function: Any
    args: Sequence[Any] = ()
    named: Mapping[str, Any] = {}

    @property
    def source(self) -> Any:
        """The first argument."""
        return self.args[0] if self.args else self.named["input"]

    def on(self, source: Tensor) -> "Operation":
        """Replace the first argument."""
        if self.args:
            return self._replace(args=(source, *self.args[1:]))
        return self._replace(named={**self.named, "input": source})

    def run(self) -> Any:
        """Call the function."""
        return self.function(*self.args, **self.named)

    def is_in_place(self) -> bool:
        """Whether it overwrites its first argument, by the function's name or its only boolean argument."""
        name: str = self.function.__name__
        if name.startswith("__i") or (name.endswith("_") and not name.endswith("__")):
            return True
        return bool(self.named.get("inplace")) or any(value is True for value in self.args[1:])


Rule: TypeAlias = Callable[[Operation], Any]

ACTIVATION, SQUASHED, GATE = 1, 2, 3
"""Ranks of results that may be a factor of other values: the factor of the highest rank is the gate."""


@lru_cache
def functions_named(*names: str) -> list[Any]:
    """Find the functions of torch, its functional module and its tensors that have one of these names.

    Example:
        >>> torch.exp in functions_named("exp"), Tensor.exp in functions_named("exp")
        (True, True)
    """
    places = (torch, Tensor, F)
    return [getattr(place, name) for name in names for place in places if hasattr(place, name)]


def is_differentiated(values: Any) -> bool:
    """Whether a value is a batch of tensors through which gradients flow."""
    return isinstance(values, Tensor) and values.requires_grad and values.dim() > 1


def refuse_second_derivatives() -> None:
    """Raise `SettingError` in a backward pass that is itself recorded."""
    if torch.is_grad_enabled():
        raise SettingError(
            "Second derivatives (create_graph=True) through ParchGrad are undefined, because the edit does not "
            "depend on the input alone. Compute first derivatives only."
        )


def follow(
    result: Tensor, pullback: Callable[[Tensor], Sequence[Tensor | None]], *sources: Tensor, rank: int = 0
) -> Tensor:
    """Return a result that was already computed under a node with a gradient of its own.

    Args:
        result: the result; its own node is dropped.
        pullback: turns the gradient at the result into that at each source.
        sources: tensors that the gradient flows to.
        rank: 0, `ACTIVATION`, `SQUASHED` or `GATE`.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> followed = follow(x.exp(), lambda gradient: [3 * gradient], x)
        >>> torch.autograd.grad(followed.sum(), x)[0]
        tensor([3., 3.])
    """
    return cast(Tensor, _Followed.apply([result], pullback, rank, *sources))


CONSTANT = torch.zeros((), device="cpu", requires_grad=True)
"""What held values seem to depend on; it never gets a gradient."""


def held(values: Tensor) -> Tensor:
    """Return values that require a gradient as before, since kernels differ in that, but pass none.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> torch.autograd.grad((x * held(x)).sum(), x)[0], held(x).requires_grad, held(x.detach()).requires_grad
        (tensor([1., 1.]), True, False)
    """
    return follow(values, lambda gradient: [None], CONSTANT) if values.requires_grad else values


def scale_gradient(operation: Operation, factor: Callable[[Tensor], Tensor], *, rank: int = 0) -> Tensor:
    """Run an elementwise operation unchanged, and multiply its gradient by a factor of its own.

    Args:
        operation: it may be in place.
        factor: computes the factor from the detached source.
        rank: 0, `ACTIVATION`, `SQUASHED` or `GATE`.

    Example:
        >>> x = torch.ones(2, 2, requires_grad=True)
        >>> torch.autograd.grad(scale_gradient(Operation(torch.exp, (x,)), lambda values: 5 * values).sum(), x)[0]
        tensor([[5., 5.],
                [5., 5.]])
    """
    values = operation.source
    # Before the call, which may overwrite the values.
    scale = factor(values.detach())
    alias: Tensor = _Alias.apply(values)
    result: Tensor = operation.on(alias).run()
    if result is alias:
        return cast(Tensor, _ScaledInPlace.apply(values, scale, rank))
    return follow(result, lambda gradient: [gradient * scale], values, rank=rank)


class _Alias(torch.autograd.Function):
    """An alias under its own node, so that overwriting it leaves the graph of the original untouched."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Followed(torch.autograd.Function):
    """A result that was already computed. It comes in a list to hide it from autograd."""

    @staticmethod
    def forward(ctx: Any, hidden: list[Tensor], pullback: Any, rank: int, *sources: Tensor) -> Tensor:
        # Not by save_for_backward: checkpointing counts saved tensors.
        ctx.pullback, ctx.rank = pullback, rank
        return hidden[0].detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        return None, None, None, *ctx.pullback(gradient)


class _ScaledInPlace(torch.autograd.Function):
    """An elementwise operation that already overwrote its input."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, rank: int) -> Tensor:
        ctx.scale, ctx.rank = scale, rank
        ctx.mark_dirty(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        return gradient * ctx.scale, None, None
