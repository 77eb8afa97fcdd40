"""One entered block: the hooks it sets, the class of each row, and the edit of each convolution's gradient.

Threads share modules and thus hooks, so the state of a pass is kept in context variables. A hook that fires for another
thread, or for a block that is not the innermost one around its convolution, does nothing.
"""

from collections import deque
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from parchgrad.core._torch import are_transforms_active, current_backward_pass, in_place_changes, is_batched
from parchgrad.core.convolution import Geometry, partitioned_input_gradient, plain_geometry
from parchgrad.core.edit import Edit
from parchgrad.core.hooks import TransientHook, tensors_in
from parchgrad.core.layers import Convolution, check_output
from parchgrad.core.partition import (
    Conserve,
    at_least_float32,
    channel_norms,
    channel_scales,
    check_channel_weights,
    check_position_weights,
    in_ordinary_range,
    restored_range,
)
from parchgrad.core.rules import (
    BackwardRules,
    has_active_rules,
    has_replaced_rectifiers,
    is_pass_through,
    refuse_second_derivatives,
    smooth_strides,
)
from parchgrad.core.selectors import LayerSignal, Selector, as_selection
from parchgrad.core.targets import check_target_count, check_target_range, pick_logits, read_classes
from parchgrad.errors import InputError, ModelError, ModelWarning, SettingError, TargetError, warn

__all__ = ["Plan", "Session"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """What a block does in every pass.

    Attributes:
        model: the model whose gradient is edited.
        edit: the settings, with every None replaced.
        convolutions: the edited layers by name, in module order.
        targets: class indices (B,) or (1,), instead of those read off the backward signal.
        pick_logits: extracts the logits from the model's output.
    """

    model: nn.Module
    edit: Edit
    convolutions: Mapping[str, Convolution]
    targets: Tensor | None
    pick_logits: Callable[[Any], Tensor] | None

    @cached_property
    def highest_target(self) -> int:
        """The largest class index of `targets`."""
        return -1 if self.targets is None else int(self.targets.max())


class Session:
    """One entered block: its hooks, and the modules that it covers."""

    def __init__(self, plan: Plan, output: nn.Module) -> None:
        """Store the plan, and the module at whose output the classes are read."""
        self.plan = plan
        self._output = output
        self.covered = {id(module) for module in plan.model.modules()}
        self._handles: list[RemovableHandle] = []
        self.is_open = True
        self.was_called = False
        self._reached: set[str] = set()
        self._recorded: set[str] = set()
        self._unrecorded: set[str] = set()
        # Layers that a backward pass from the model's output should reach, does reach, and edits.
        self.expected: set[str] = set()
        self.met: set[str] = set()
        self.edited: set[str] = set()
        self._was_passed = False
        self._has_warned = False

    @property
    def missed(self) -> list[str]:
        """Chosen convolutions that were never called, although the model and others were."""
        if not (self._was_passed and self._reached):
            return []
        return [name for name in self.plan.convolutions if name not in self._reached]

    @property
    def without_gradient(self) -> list[str]:
        """Chosen convolutions that no gradient reached, although one started at the model's output."""
        # A backward pass that failed on the way says nothing.
        if self.met != self.edited:
            return []
        return [name for name in self.plan.convolutions if name in self.expected - self.edited]

    @property
    def never_recorded(self) -> bool:
        """Whether chosen convolutions were called, but always without recording gradients."""
        return bool(self._unrecorded) and not self._recorded

    def open(self) -> None:
        """Set the hooks."""
        try:
            self._handles.append(self._output.register_forward_pre_hook(TransientHook(self._begin)))
            for name, convolution in self.plan.convolutions.items():
                hook = TransientHook(self._attach, name)
                self._handles.append(convolution.register_forward_hook(hook, prepend=True))
            # Called after an exception too, so that a failed pass leaves no state behind.
            self._handles.append(self._output.register_forward_hook(TransientHook(self._end), always_call=True))
            SESSIONS.set((*open_sessions(), self))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the hooks."""
        self.is_open = False
        for handle in self._handles:
            handle.remove()
        SESSIONS.set(open_sessions())
        for forward in _FORWARDS.get():
            if forward.session is self:
                forward.leave_rules()
        _FORWARDS.set(tuple(forward for forward in _FORWARDS.get() if forward.session is not self))

    def _decides_over(self, module: nn.Module) -> bool:
        """Whether this is the innermost block, in this thread or task, around this module."""
        key = id(module)
        for session in reversed(SESSIONS.get()):
            if session.is_open and key in session.covered:
                return session is self
        return False

    def _forward(self) -> "_Forward | None":
        for forward in reversed(_FORWARDS.get()):
            if forward.session is self:
                return forward
        return None

    def _begin(self, model: nn.Module, inputs: tuple[object, ...]) -> None:
        if self not in SESSIONS.get():
            return
        self.was_called = True
        forward = _Forward(self)
        # RUF005: the compiler of torch 2.4 cannot trace an unpacked tuple.
        _FORWARDS.set(_FORWARDS.get() + (forward,))  # noqa: RUF005
        gates, antialias = self._gates(), bool(self.plan.edit.antialias)
        # Even without rules of its own, an inner block overrides those of the enclosing block.
        records = torch.is_grad_enabled() and (gates or antialias or has_active_rules())
        if records and self._decides_over(self.plan.model):
            if gates or antialias:
                _refuse_transforms()
            forward.rules = BackwardRules(gates=gates, antialias=antialias)
            forward.rules.__enter__()

    def _gates(self) -> float:
        """Width of the gates in this pass."""
        gates = cast(float, self.plan.edit.gates)
        if gates and has_replaced_rectifiers(self.plan.model):
            self._warn_once("Soft gates are off: a Captum method replaces the backward pass of the rectifiers.")
            return 0.0
        return gates

    def _warn_once(self, message: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warn(message, ModelWarning)

    def _attach(
        self,
        layer: str,
        convolution: Convolution,
        inputs: tuple[Any, ...],
        output: Tensor,
    ) -> Tensor | None:
        """Replace a convolution's output by one whose backward pass is edited."""
        if self not in SESSIONS.get():
            return None
        # A part of the model was called on its own, outside of the model's forward pass.
        forward = self._forward()
        if forward is None:
            forward = _Forward(self)
            # Checkpointing with use_reentrant=False repeats calls, but its backward pass uses the first call's nodes.
            is_repeated = layer in self._recorded and current_backward_pass() >= 0
            has_rules = self.plan.edit.gates or self.plan.edit.antialias
            if has_rules and output.grad_fn is not None and not is_repeated:
                self._warn_once(
                    "A part of the model was called on its own. Soft gates do not apply there, and smooth strides only "
                    "at edited convolutions. Call the model itself, or pass gates=0 and antialias=False."
                )
        forward.reached = self.was_called = True
        self._reached.add(layer)
        if not self._decides_over(convolution):
            return None
        _refuse_transforms()
        check_output(layer, output)
        # Read once: each access wraps torch's node anew.
        node = output.grad_fn
        if node is None:
            self._unrecorded.add(layer)
            return None
        self._recorded.add(layer)
        if output.dim() != len(convolution.kernel_size) + 2:
            raise InputError(f"The input of layer {layer!r} has no batch dimension. Add one with inputs.unsqueeze(0).")
        earlier = getattr(node, "edit", None)
        if isinstance(earlier, LayerEdit) and earlier.forward is forward:
            # A convolution may delegate to another one inside it; edit the operation only once.
            return None
        forward.expect_rows(output.shape[0])
        observation = None
        selector = cast(Selector, self.plan.edit.selector)
        # Some selectors need only the gradient.
        if type(selector).observe is not Selector.observe:
            with torch.no_grad():
                observation = selector.observe(output.detach())
        edit = LayerEdit(forward, layer, observation)
        geometry = plain_geometry(convolution)
        # An earlier hook may have replaced the output.
        if geometry is None or len(inputs) != 1 or not _is_convolution_of(node, inputs[0]):
            forward.attached.add(layer)
            return cast(Tensor, _EditedOutput.apply(output, edit))
        if not inputs[0].requires_grad:
            # No gradient flows to the input.
            return None
        forward.attached.add(layer)
        return cast(Tensor, _EditedConvolution.apply(inputs[0], [output, convolution.weight], geometry, edit))

    def _end(self, model: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        forward = self._forward()
        if forward is None or self not in SESSIONS.get():
            return
        forward.leave_rules()
        _FORWARDS.set(tuple(other for other in _FORWARDS.get() if other is not forward))
        # After an exception the output is None.
        if output is not None:
            self._was_passed = True
            forward.watch(output)


def _refuse_transforms() -> None:
    if are_transforms_active():
        raise ModelError(
            "ParchGrad does not work within transforms of torch.func such as grad, vmap and jacrev. Use "
            "torch.autograd.grad or a Captum method."
        )


# Limit of concurrent backward passes from one forward pass, each in its own thread.
_PASSES_AT_ONCE = 64


class _Forward:
    """One forward pass and the class of each row, known once a backward pass has reached the logits."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.plan = session.plan
        self.reached = False
        self.attached: set[str] = set()
        self.rules: BackwardRules | None = None
        # Classes by id of the backward pass, since threads may run several at once. The oldest are dropped.
        self._read: deque[tuple[int, Tensor]] = deque(maxlen=_PASSES_AT_ONCE)

    def leave_rules(self) -> None:
        """Deactivate the rules, if any."""
        rules, self.rules = self.rules, None
        if rules is not None:
            rules.__exit__(None, None, None)

    def expect_rows(self, rows: int) -> None:
        targets = self.plan.targets
        if targets is not None:
            check_target_count(targets, rows, "pass")

    def watch(self, output: object) -> None:
        """Read the classes off the gradient at the logits, unless targets were given."""
        selector, targets = self.plan.edit.selector, self.plan.targets
        if self.plan.pick_logits is not None:
            output = pick_logits(output, self.plan.pick_logits)
        if selector is None:
            return
        if not self.reached and _may_go_back(output):
            raise ModelError(
                "None of the chosen convolutions was called in this forward pass, so nothing would be edited. Choose "
                "layers that the model calls, and explain the model itself, not a compiled or functional copy."
            )
        for values in tensors_in(output):
            if values.grad_fn is not None:
                values.register_hook(self.note)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if not selector.needs_class:
            return
        if isinstance(output, Tensor):
            classes = output.shape[1] if output.dim() > 1 else 1
            selector.check_classes(classes)
            if targets is not None:
                check_target_range(self.plan.highest_target, classes)
            elif output.grad_fn is not None:
                output.register_hook(self.read)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        elif targets is None:
            raise ModelError(
                f"Cannot infer the class from a {type(output).__name__}. Pass `logits=` to extract the logits, or "
                "`target=` to name the class."
            )

    def note(self, gradient: Tensor) -> None:
        self.session.expected |= self.attached

    def read(self, gradient: Tensor) -> None:
        self._read.append((current_backward_pass(), read_classes(gradient)))

    def classes_of(self, rows: int, layer: str, device: torch.device) -> Tensor:
        targets = self.plan.targets
        classes = targets
        if classes is None:
            now = current_backward_pass()
            # Copied, since other threads append to it.
            classes = next((read for number, read in reversed(list(self._read)) if number == now), None)
        if classes is None:
            raise TargetError(
                f"Cannot tell which class layer {layer!r} explains: the backward pass did not start at the model's "
                "output. Pass `target=`, or call the model itself."
            )
        if classes.numel() not in (1, rows):
            raise TargetError(
                f"Layer {layer!r} has {rows} rows, but the model's output has {classes.numel()}. "
                "Pass one `target=` for all rows."
            )
        return classes.to(device).expand(rows)


class LayerEdit:
    """The edit of one convolution's gradient for one forward pass."""

    def __init__(self, forward: _Forward, layer: str, observation: Any) -> None:
        self.forward = forward
        self._layer = layer
        self._observation = observation

    @property
    def settings(self) -> Edit:
        return self.forward.plan.edit

    def apply(self, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Apply the position weights to the gradient and compute the factors of its channels.

        Returns:
            The weighted gradient, float32 or wider, each row divided by a power of two; the factors, shape (B, C); and
            the powers of two, shape (B,), or None if all are 1.
        """
        refuse_second_derivatives()
        selector = cast(Selector, self.settings.selector)
        classes = None
        if selector.needs_class:
            classes = self.forward.classes_of(gradient.shape[0], self._layer, gradient.device)
        signal = LayerSignal(
            layer=self._layer, gradient=at_least_float32(gradient), observation=self._observation, classes=classes
        )
        scaled, unit = in_ordinary_range(signal.gradient, signal.channel_norms)
        if unit is not None:
            signal = replace(signal, gradient=scaled)
        found = as_selection(selector.select(signal))
        check_channel_weights(found.channel_weights, gradient)
        weighted, norms = signal.gradient, signal.channel_norms
        if found.position_weights is not None:
            check_position_weights(found.position_weights, gradient)
            weighted = weighted * found.position_weights.to(weighted.dtype).unsqueeze(1)
            norms = channel_norms(weighted)
        scales = channel_scales(
            weighted,
            norms,
            found.channel_weights,
            gamma=self.settings.gamma,
            conserve=cast(Conserve, self.settings.conserve),
        )
        self.forward.session.edited.add(self._layer)
        return weighted, scales, unit

    def meet(self, gradient: Tensor) -> None:
        """Note that a gradient has arrived."""
        if is_batched(gradient):
            raise SettingError("ParchGrad does not work with is_grads_batched=True. Run one backward pass at a time.")
        self.forward.session.met.add(self._layer)


class _EditedConvolution(torch.autograd.Function):
    """A convolution that was already computed; its backward pass partitions the gradient and goes only to the input.

    Output and weight come in a list to hide them from autograd. The result is a new tensor on the same memory, so that
    the original backward pass is dropped and in-place operations may follow.
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, hidden: list[Tensor], geometry: Geometry, edit: LayerEdit) -> Tensor:
        output, weight = hidden
        # Not by save_for_backward: checkpointing counts saved tensors, and may recompute outside of the block.
        ctx.weight, ctx.version = weight, in_place_changes(weight)
        ctx.geometry, ctx.input_shape, ctx.edit = geometry, source.shape, edit
        return output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.edit.meet(gradient)
        if in_place_changes(ctx.weight) != ctx.version:
            raise ModelError(
                "The weight of a convolution was changed between the forward and the backward pass. Run both again."
            )
        weighted, scales, unit = ctx.edit.apply(gradient)
        weight = ctx.weight.detach().to(gradient.dtype)
        found = restored_range(
            partitioned_input_gradient(weighted, scales, weight, ctx.geometry, ctx.input_shape), unit
        )
        if ctx.edit.settings.antialias and max(ctx.geometry.stride) > 1:
            found = smooth_strides(found, ctx.geometry.stride)
        return found, None, None, None


class _EditedOutput(torch.autograd.Function):
    """The output of a convolution variant; its gradient is partitioned before the variant's own backward pass."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, edit: LayerEdit) -> Tensor:
        ctx.edit = edit
        return output.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.edit.meet(gradient)
        weighted, scales, unit = ctx.edit.apply(gradient)
        edited = weighted * scales.reshape(*scales.shape, *[1] * (gradient.dim() - 2))
        return restored_range(edited, unit).to(gradient.dtype), None


def _is_convolution_of(node: Any, source: Tensor) -> bool:
    """Whether a node of the graph is a convolution applied directly to this input."""
    if node.name() != "ConvolutionBackward0":
        return False
    before = node.next_functions[0][0]
    # Autocast and smooth strides add nodes between the input and the convolution.
    while before is not None and (before.name() == "ToCopyBackward0" or is_pass_through(before)):
        before = before.next_functions[0][0]
    if source.grad_fn is None:
        return not source.requires_grad or getattr(before, "variable", None) is source
    return before is source.grad_fn


SESSIONS: ContextVar[tuple[Session, ...]] = ContextVar("parchgrad_sessions", default=())
_FORWARDS: ContextVar[tuple[_Forward, ...]] = ContextVar("parchgrad_forwards", default=())


def open_sessions() -> tuple[Session, ...]:
    """Open sessions of this thread or task, without those that another thread has closed."""
    return tuple(session for session in SESSIONS.get() if session.is_open)


def _may_go_back(output: object) -> bool:
    """Whether a backward pass may start from an output, which may be of any type."""
    tensors = tensors_in(output)
    return any(values.requires_grad for values in tensors) if tensors else torch.is_grad_enabled()
