"""Rules for the backward passes of operations, applied while a model runs.

The values of the forward pass do not change. A torch function mode intercepts the calls of modules and functions, so
the model need not be modified.
"""

from collections.abc import Collection, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from parchgrad.core._torch import has_saved_tensor_hooks, open_body
from parchgrad.core.balance import COMPOSITES, Balance
from parchgrad.core.gates import gate_rules
from parchgrad.core.operations import Operation, Rule
from parchgrad.core.strides import with_smooth_strides

__all__ = ["BackwardRules", "has_active_rules"]


class BackwardRules(TorchFunctionMode):
    """Soften, smooth and balance the backward passes of operations that run while active.

    When rules are nested, the innermost apply, even if they change nothing.

    Attributes:
        rules: the rule of each function.
        balance: the rules that balance; None for none.

    Example:
        >>> from torch import nn
        >>> x = torch.tensor([[-1.0, 0.0, 1.0]], requires_grad=True)
        >>> with BackwardRules(gates=2.0):
        ...     output = nn.ReLU()(x)
        >>> output, torch.autograd.grad(output.sum(), x)[0]
        (tensor([[0., 0., 1.]], grad_fn=<_FollowedBackward>), tensor([[0.0000, 0.5000, 1.0000]]))
    """

    def __init__(
        self,
        *,
        gates: float = 0.0,
        antialias: bool = False,
        balance: bool = False,
        weights: Collection[int] = (),
        is_input_traced: bool = True,
    ) -> None:
        """Choose the rules.

        Args:
            gates: width of the soft gates of rectifiers and max pooling in standard deviations of their input; 0 keeps
                the true derivatives.
            antialias: whether strides are smoothed.
            balance: whether what makes operations nonlinear is held constant.
            weights: ids of the model's weights, for `balance`.
            is_input_traced: whether an input of the model requires a gradient, for `balance`.
        """
        super().__init__()
        self.balance = Balance(weights, is_input_traced=is_input_traced) if balance else None
        rules: dict[Any, Rule] = self.balance.rules() if self.balance else {}
        if gates:
            rules.update(gate_rules(gates))
        if self.balance is not None:
            rules.update(self.balance.own_rules())
        self.rules: Mapping[Any, Rule] = with_smooth_strides(rules) if antialias else rules
        self._opened = COMPOSITES if balance else ()

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
        """Call a function, by its rule if it has one."""
        named = kwargs or {}
        rule = self.rules.get(function)
        # torch suspends the mode here, so that what a rule calls is not intercepted.
        if rule is not None and torch.is_grad_enabled() and _ACTIVE.get()[-1:] == (self,):
            operation = Operation(function, args, named)
            if not has_saved_tensor_hooks() or operation.is_in_place():
                return rule(operation)
            # Checkpointing compares what is saved with its second pass, which runs without rules.
            operation.run()
            with saved_tensors_hooks(_same, _same):
                return rule(operation)
        if function in self._opened:
            super().__enter__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            try:
                return open_body(function)(*args, **named)
            finally:
                super().__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return function(*args, **named)


def _same(values: Tensor) -> Tensor:
    return values


# Active modes of this thread, innermost last.
_ACTIVE: ContextVar[tuple[BackwardRules, ...]] = ContextVar("parchgrad_rules", default=())


def has_active_rules() -> bool:
    """Whether any rules are active in this thread or task."""
    return bool(_ACTIVE.get())
