"""One entered block: the hooks that it sets on the model.

Threads share modules and thus hooks, so the state of a pass is kept in context variables. A hook that fires for another
thread, or for a block that is not the innermost one around its convolution, does nothing.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from parchgrad.core._torch import current_backward_pass, has_plain_forward, own_parameter, without_function_modes
from parchgrad.core.balance import StandIn, rules_of_modules, stand_in
from parchgrad.core.gates import has_replaced_rectifiers
from parchgrad.core.hooks import TransientHook, tensors_in
from parchgrad.core.layers import Convolution, Layer
from parchgrad.core.passes import FORWARDS, Calls, ForwardPass, enter_inside, leave_inside, refuse_transforms
from parchgrad.core.plan import Log, Plan
from parchgrad.core.rules import BackwardRules, has_active_rules

__all__ = ["SESSIONS", "Session", "open_sessions"]


class Session:
    """One entered block: its hooks, and the modules that it covers."""

    def __init__(self, plan: Plan, output: nn.Module) -> None:
        """Store the plan, and the module at whose output the classes are read."""
        self.plan = plan
        self._output = output
        self.covered = {id(module) for module in plan.model.modules()}
        self._handles: list[RemovableHandle] = []
        self.log = Log()
        self.calls = Calls(plan, self.log)

    def open(self) -> None:
        """Set the hooks."""
        named = self.plan.route.named
        try:
            self._handles.append(self._output.register_forward_pre_hook(TransientHook(self._begin), with_kwargs=True))
            for name, module in self.plan.layers.items():
                if named is not None and name not in named:
                    hook = TransientHook(self._touch, name)
                    self._handles.append(module.register_forward_hook(hook))
                    continue
                does_more = not isinstance(module, nn.Linear) and not has_plain_forward(module)
                if does_more:
                    before = TransientHook(self._look_inside, name)
                    self._handles.append(module.register_forward_pre_hook(before))
                hook = TransientHook(self._attach, name)
                # Called after an exception too if there is something to undo.
                handle = module.register_forward_hook(hook, prepend=True, always_call=does_more)
                self._handles.append(handle)
            if self.plan.edit.balance:
                for part, rule in rules_of_modules(self.plan.model):
                    hook = TransientHook(self._stand_in, rule)
                    self._handles.append(part.register_forward_hook(hook, with_kwargs=True))
            # Called after an exception too, so that a failed pass leaves no state behind.
            self._handles.append(self._output.register_forward_hook(TransientHook(self._end), always_call=True))
            SESSIONS.set((*open_sessions(), self))
        except BaseException:
            self.close()
            raise

    @property
    def is_open(self) -> bool:
        """Whether the block has not been left yet."""
        return self.log.is_open

    def close(self) -> None:
        """Remove the hooks."""
        self.log.is_open = False
        for handle in self._handles:
            handle.remove()
        SESSIONS.set(open_sessions())
        # After an interruption.
        while leave_inside(self.log) is not None:
            pass
        for forward in FORWARDS.get():
            if forward.log is self.log:
                forward.leave_rules()
        FORWARDS.set(tuple(forward for forward in FORWARDS.get() if forward.log is not self.log))

    def _decides_over(self, module: nn.Module) -> bool:
        """Whether this is the innermost block, in this thread or task, around this module."""
        key = id(module)
        for session in reversed(SESSIONS.get()):
            if session.is_open and key in session.covered:
                return session is self
        return False

    def _forward(self) -> ForwardPass | None:
        for forward in reversed(FORWARDS.get()):
            if forward.log is self.log:
                return forward
        return None

    def _begin(
        self, model: nn.Module, inputs: tuple[object, ...], keywords: Mapping[str, object] | None = None
    ) -> None:
        # Torch leaves out the keywords if another thread removes this hook at the same time.
        if self not in SESSIONS.get():
            return
        self.log.was_called = True
        forward = ForwardPass(self.calls)
        # RUF005: the compiler of torch 2.4 cannot trace an unpacked tuple.
        FORWARDS.set(FORWARDS.get() + (forward,))  # noqa: RUF005
        if not torch.is_grad_enabled():
            return
        decides, named = self._decides_over(self.plan.model), self.plan.route.named
        decided = [name for name, module in self.plan.layers.items() if self._decides_over(module)]
        forward.edits = bool(decided) if named is None else not named.isdisjoint(decided)
        forward.decides_over_all = len(decided) == len(self.plan.layers)
        forward.inputs = tensors_in((inputs, dict(keywords or {})))
        forward.starts = [values.grad_fn for values in forward.inputs if values.grad_fn is not None]
        gates, antialias, balance = self._gates(), bool(self.plan.edit.antialias), bool(self.plan.edit.balance)
        # Even without rules of its own, an inner block overrides those of the enclosing block.
        if decides and (gates or antialias or balance or has_active_rules()):
            if gates or antialias or balance:
                refuse_transforms()
            forward.rules = BackwardRules(
                gates=gates,
                antialias=antialias,
                balance=balance,
                weights=self.calls.weights,
                is_input_traced=any(values.requires_grad for values in forward.inputs),
            )
            forward.rules.__enter__()

    def _gates(self) -> float:
        """Width of the gates in this pass."""
        gates = cast(float, self.plan.edit.gates)
        if gates and has_replaced_rectifiers(self.plan.model):
            self.log.warn_once("Soft gates are off: a Captum method replaces the backward pass of the rectifiers.")
            return 0.0
        return gates

    def _touch(self, layer: str, convolution: Convolution, inputs: tuple[Any, ...], output: Any) -> None:
        """Note where backward passes reach a convolution that is not edited."""
        forward = self._forward()
        if forward is not None:
            forward.note_positions(output)
        if self in SESSIONS.get() and self._decides_over(convolution) and (forward is None or forward.edits):
            for values in tensors_in(output):
                if values.grad_fn is not None:
                    values.register_hook(partial(self.log.touch, layer))  # type: ignore[no-untyped-call]  # as in torch

    def _look_inside(self, layer: str, convolution: Convolution, inputs: tuple[Any, ...]) -> None:
        """Edit the convolution itself where a subclass does more, such as a normalisation."""
        weight = own_parameter(convolution, "weight")
        if self in SESSIONS.get() and weight is not None and self._decides_over(convolution):
            enter_inside(self._forward() or ForwardPass(self.calls), layer, convolution, weight)

    def _attach(self, layer: str, module: Layer, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        """Replace a layer's output by one whose backward pass is edited."""
        if self not in SESSIONS.get():
            return None
        weight = own_parameter(module, "weight")
        inside = None if weight is None else leave_inside(self.log, weight)
        # After an exception the output is None.
        if output is None:
            return None
        forward = self._forward()
        # A part of the model was called on its own, outside of the model's forward pass.
        if forward is None:
            forward = ForwardPass(self.calls) if inside is None else inside.forward
            # Checkpointing with use_reentrant=False repeats calls, but its backward pass uses the first call's nodes.
            is_repeated = layer in self.log.recorded and current_backward_pass() >= 0
            edit = self.plan.edit
            has_rules = edit.gates or edit.antialias or edit.balance
            if has_rules and any(values.grad_fn is not None for values in tensors_in(output)) and not is_repeated:
                self.log.warn_once(
                    "A part of the model was called on its own. Soft gates and balance do not apply there, and smooth "
                    "strides only at edited convolutions. Call the model itself, or pass gates=0, antialias=False and "
                    "balance=False."
                )
        forward.reached = self.log.was_called = True
        if not isinstance(module, nn.Linear):
            forward.note_positions(output)
        self.log.reached.add(layer)
        if not self._decides_over(module):
            return None
        refuse_transforms()
        if forward.rules is None:
            return forward.attach(layer, module, inputs, output, inside)
        # The rules would intercept every look at a tensor.
        with without_function_modes():
            return forward.attach(layer, module, inputs, output, inside)

    def _stand_in(self, rule: StandIn, module: nn.Module, inputs: tuple[Any, ...], *rest: Any) -> Tensor | None:
        """Give a module's output the gradient of a user's rule."""
        # Torch leaves out the keywords if another thread removes this hook at the same time.
        named, output = rest if len(rest) == 2 else ({}, *rest)
        forward = self._forward()
        balance = None if forward is None or forward.rules is None else forward.rules.balance
        if forward is None or balance is None or self not in SESSIONS.get() or not self._decides_over(module):
            return None
        # The rule may call the module itself.
        if id(module) in forward.standing_in:
            return None
        if not any(values.requires_grad for values in tensors_in(output)):
            return None
        balance.has_acted = True
        forward.standing_in.add(id(module))
        try:
            return stand_in(output, rule, module, *inputs, **named)
        finally:
            forward.standing_in.discard(id(module))

    def _end(self, model: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        forward = self._forward()
        if forward is None or self not in SESSIONS.get():
            return
        balance = forward.leave_rules()
        FORWARDS.set(tuple(other for other in FORWARDS.get() if other is not forward))
        # After an exception the output is None.
        if output is not None:
            self.log.was_passed = True
            forward.watch(output, balance)
        forward.inputs, forward.starts = [], []


SESSIONS: ContextVar[tuple[Session, ...]] = ContextVar("parchgrad_sessions", default=())
"""Open blocks of this thread or task, innermost last."""


def open_sessions() -> tuple[Session, ...]:
    """Open sessions of this thread or task, without those that another thread has closed."""
    return tuple(session for session in SESSIONS.get() if session.is_open)
