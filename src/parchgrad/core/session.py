"""One entered block: the hooks it sets, the class of each row, and the edit of each convolution's gradient.

Threads share modules and thus hooks, so the state of a pass is kept in context variables. A hook that fires for another
thread, or for a block that is not the innermost one around its convolution, does nothing.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from parchgrad.core._torch import (
    are_transforms_active,
    current_backward_pass,
    has_plain_forward,
    in_place_changes,
    is_batched,
    own_parameter,
)
from parchgrad.core.convolution import Geometry, input_gradient, partitioned_input_gradient, plain_geometry
from parchgrad.core.edit import Edit
from parchgrad.core.hooks import TransientHook, tensors_in
from parchgrad.core.layers import Convolution
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
from parchgrad.core.paths import Paths, convolves, trace, unmarked
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
from parchgrad.errors import InputError, LayerError, ModelError, ModelWarning, SettingError, TargetError, warn

__all__ = ["Plan", "Route", "Session"]


class Route:
    """The layers that a plan edits: named ones, or those that a ratio chooses on the paths of a recorded pass.

    The paths are those of the first pass whose input requires a gradient.

    Attributes:
        asked: names of layers, or a ratio; see `Paths.chosen`.
        paths: the calls of convolutions between input and outputs; None before the first pass.
        edited: names of the layers edited by the last block that edited any.
    """

    def __init__(
        self, asked: frozenset[str] | Fraction, selector: Selector | None, channels: Mapping[str, int]
    ) -> None:
        """Store the choice, and the selector with the number of channels of every layer, to check that they fit."""
        self.asked = asked
        self.paths: Paths | None = None
        self.edited: frozenset[str] | set[str] = frozenset()
        self._selector, self._channels = selector, channels
        # Choices on `paths` by the outputs used.
        self._found: dict[frozenset[int] | None, frozenset[str]] = {}

    @property
    def possible(self) -> frozenset[str] | None:
        """Layers that may be edited, as far as is known; None for all."""
        if isinstance(self.asked, frozenset):
            return self.asked
        if self.paths is None:
            return None
        # With several outputs, the layers depend on those that the score uses.
        return self.chosen(self.paths, None) if len(self.paths.outputs) == 1 else frozenset(self.paths.layers)

    def chosen(self, paths: Paths, outputs: frozenset[int] | None) -> frozenset[str]:
        """Layers to edit for a score that uses these outputs; None means all outputs."""
        if isinstance(self.asked, frozenset):
            return self.asked
        if paths is self.paths and outputs in self._found:
            return self._found[outputs]
        found = paths.chosen(self.asked, outputs)
        if self._selector is not None:
            self._selector.check({name: count for name, count in self._channels.items() if name in found})
        if paths is self.paths:
            self._found[outputs] = found
        return found


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """What a block does in every pass.

    Attributes:
        model: the model whose gradient is edited.
        edit: the settings, with every None replaced.
        convolutions: all convolutions of the model by name, in module order; empty without a selector.
        route: the layers to edit.
        targets: class indices (B,) or (1,), instead of those read off the backward signal.
        pick_logits: extracts the logits from the model's output.
    """

    model: nn.Module
    edit: Edit
    convolutions: Mapping[str, Convolution]
    route: Route
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
        # Ids of the backward passes that started at the model's output, that arrived at its input, and that reached a
        # layer to edit on their way.
        self.started: set[int] = set()
        self.arrived: set[int] = set()
        self.met_in: set[int] = set()
        # Indices of the outputs that these passes started at.
        self.used: set[int] = set()
        self._was_passed = False
        self._warned: set[str] = set()

    @property
    def missed(self) -> list[str]:
        """Named layers that were never called, although the model and others were."""
        named = self.plan.route.asked
        if not (self._was_passed and self._reached and isinstance(named, frozenset)):
            return []
        return [name for name in self.plan.convolutions if name in named - self._reached]

    @property
    def without_gradient(self) -> list[str]:
        """Layers to edit that no gradient reached, although one started at the model's output."""
        # A backward pass that failed on the way says nothing.
        if self.met != self.edited:
            return []
        return [name for name in self.plan.convolutions if name in self.expected - self.edited]

    @property
    def was_plain(self) -> bool:
        """Whether there were backward passes, of which none reached a layer to edit."""
        return bool(self.started | self.arrived) and not self.met_in

    @property
    def plain_passes(self) -> int:
        """Number of backward passes to the model's input that reached no layer to edit."""
        return len(self.arrived - self.met_in)

    @property
    def never_recorded(self) -> bool:
        """Whether layers were called, but always without recording gradients."""
        return bool(self._unrecorded) and not self._recorded

    def open(self) -> None:
        """Set the hooks."""
        possible = self.plan.route.possible
        try:
            self._handles.append(self._output.register_forward_pre_hook(TransientHook(self._begin), with_kwargs=True))
            for name, convolution in self.plan.convolutions.items():
                if possible is None or name in possible or self.plan.route.paths is None:
                    hook = TransientHook(self._attach, name)
                    does_more = not has_plain_forward(convolution)
                    if does_more:
                        before = TransientHook(self._look_inside, name)
                        self._handles.append(convolution.register_forward_pre_hook(before))
                    handle = convolution.register_forward_hook(hook, prepend=True, always_call=does_more)
                    self._handles.append(handle)
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
                forward.forget_graph()
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

    def _begin(self, model: nn.Module, inputs: tuple[object, ...], named: Mapping[str, object]) -> None:
        if self not in SESSIONS.get():
            return
        self.was_called = True
        forward = _Forward(self)
        # RUF005: the compiler of torch 2.4 cannot trace an unpacked tuple.
        _FORWARDS.set(_FORWARDS.get() + (forward,))  # noqa: RUF005
        if not torch.is_grad_enabled():
            return
        decides = self._decides_over(self.plan.model)
        forward.edits = any(map(self._decides_over, self.plan.convolutions.values()))
        if forward.edits:
            forward.sources = [values for values in tensors_in((inputs, dict(named))) if values.requires_grad]
            for values in forward.sources:
                handle = values.register_hook(self._arrive)  # type: ignore[no-untyped-call]  # torch leaves it untyped
                self._handles.append(handle)
        gates, antialias = self._gates(), bool(self.plan.edit.antialias)
        # Even without rules of its own, an inner block overrides those of the enclosing block.
        if decides and (gates or antialias or has_active_rules()):
            if gates or antialias:
                _refuse_transforms()
            forward.rules = BackwardRules(gates=gates, antialias=antialias)
            forward.rules.__enter__()

    def _arrive(self, gradient: Tensor) -> None:
        """Note that a backward pass has arrived at the model's input."""
        self.arrived.add(current_backward_pass())

    def _gates(self) -> float:
        """Width of the gates in this pass."""
        gates = cast(float, self.plan.edit.gates)
        if gates and has_replaced_rectifiers(self.plan.model):
            self._warn_once("Soft gates are off: a Captum method replaces the backward pass of the rectifiers.")
            return 0.0
        return gates

    def warn_left_out(self, operations: Sequence[Any]) -> None:
        """Name the operations on the paths whose gradient stays plain, although they convolve or attend."""
        weights = {id(weight): name.rpartition(".")[0] or name for name, weight in self.plan.model.named_parameters()}
        found = []
        for node in operations:
            used = [id(getattr(other, "variable", None)) for other, _ in node.next_functions]
            kind = "a convolution" if convolves(node) else "attention"
            found.append(next((repr(weights[key]) for key in used if key in weights), kind))
        # A hook may have replaced the output of a layer by that of another convolution.
        found = [name for name in found if name.strip("'") not in self.plan.convolutions]
        if found:
            self._warn_once(
                f"The gradient stays plain in {', '.join(dict.fromkeys(found))}: these parts between the input and the "
                "output convolve or attend, but are not modules that can be edited."
            )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn(message, ModelWarning)

    def _look_inside(self, layer: str, convolution: Convolution, inputs: tuple[Any, ...]) -> None:
        """Edit the convolution itself where a subclass does more, such as a normalisation."""
        forward, possible = self._forward(), self.plan.route.possible
        weight = own_parameter(convolution, "weight")
        if self not in SESSIONS.get() or forward is None or weight is None or not self._decides_over(convolution):
            return
        is_possible = possible is None or layer in possible
        inside = _Inside(weight, partial(self._edit, forward, layer, convolution, None) if is_possible else None)
        forward.inside.append(inside)
        inside.__enter__()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def _attach(self, layer: str, convolution: Convolution, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        """Replace a convolution's output by one whose backward pass is edited."""
        if self not in SESSIONS.get():
            return None
        forward, possible = self._forward(), self.plan.route.possible
        inside = forward.leave_inside(convolution) if forward is not None else None
        # After an exception the output is None.
        if output is None:
            return None
        if possible is not None and layer not in possible:
            # Only its place on the paths matters.
            if forward is not None and self._decides_over(convolution):
                forward.mark(layer, output)
            return None
        # A part of the model was called on its own, outside of the model's forward pass.
        if forward is None:
            forward = _Forward(self)
            # Checkpointing with use_reentrant=False repeats calls, but its backward pass uses the first call's nodes.
            is_repeated = layer in self._recorded and current_backward_pass() >= 0
            has_rules = self.plan.edit.gates or self.plan.edit.antialias
            if has_rules and any(values.grad_fn is not None for values in tensors_in(output)) and not is_repeated:
                self._warn_once(
                    "A part of the model was called on its own. Soft gates do not apply there, and smooth strides only "
                    "at edited convolutions. Call the model itself, or pass gates=0 and antialias=False."
                )
        forward.reached = self.was_called = True
        self._reached.add(layer)
        if not self._decides_over(convolution):
            return None
        _refuse_transforms()
        if not isinstance(output, Tensor):
            forward.refuse(layer, output, f"returns a {type(output).__name__} instead of a tensor")
            return None
        # A convolution may delegate to another one inside it; edit the operation only once.
        if (inside is not None and inside.was_met) or forward.has_edited(output):
            return None
        if output.grad_fn is not None and not has_plain_forward(convolution) and not _only_convolves(output.grad_fn):
            forward.refuse(layer, output, f"is a {type(convolution).__name__}, which does more than convolve")
            return None
        return self._edit(forward, layer, convolution, inputs, output)

    def _edit(
        self,
        forward: "_Forward",
        layer: str,
        convolution: Convolution,
        inputs: tuple[Any, ...] | None,
        output: Tensor,
    ) -> Tensor | None:
        """Return a convolution's output with an edited backward pass; None if no gradient flows through it."""
        # Read once: each access wraps torch's node anew.
        node = output.grad_fn
        if node is None:
            self._unrecorded.add(layer)
            return None
        self._recorded.add(layer)
        if output.dim() != len(convolution.kernel_size) + 2:
            raise InputError(f"The input of layer {layer!r} has no batch dimension. Add one with inputs.unsqueeze(0).")
        forward.expect_rows(output.shape[0])
        observation = None
        selector = cast(Selector, self.plan.edit.selector)
        # Some selectors need only the gradient.
        if type(selector).observe is not Selector.observe:
            with torch.no_grad():
                observation = selector.observe(output.detach())
        edit = LayerEdit(forward, layer, observation)
        geometry = None if inputs is None or len(inputs) != 1 else plain_geometry(convolution)
        # An earlier hook may have replaced the output.
        if inputs is None or geometry is None or not _is_convolution_of(node, inputs[0]):
            edited = cast(Tensor, _EditedOutput.apply(output, edit))
        elif inputs[0].requires_grad:
            edited = cast(Tensor, _EditedConvolution.apply(inputs[0], [output, convolution.weight], geometry, edit))
        else:
            # No gradient flows to the input.
            return None
        forward.attached.add(layer)
        forward.mark(layer, edited)
        return edited

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
        forward.forget_graph()


def _refuse_transforms() -> None:
    if are_transforms_active():
        raise ModelError(
            "ParchGrad does not work within transforms of torch.func such as grad, vmap and jacrev. Use "
            "torch.autograd.grad or a Captum method."
        )


class _Inside(TorchFunctionMode):
    """Replace the results of convolutions with this weight, while the module that owns it runs.

    Attributes:
        weight: the weight.
        was_met: whether there was such a convolution.
    """

    def __init__(self, weight: Tensor, edit: Callable[[Tensor], Tensor | None] | None) -> None:
        super().__init__()
        self.weight = weight
        self.was_met = False
        self._edit = edit

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        result = function(*args, **named)
        weight = args[1] if len(args) > 1 else named.get("weight")
        if weight is not self.weight or getattr(function, "__name__", "") not in _CONVOLUTIONS:
            return result
        self.was_met = True
        edited = None if self._edit is None else self._edit(result)
        return result if edited is None else edited


_CONVOLUTIONS = {f"{kind}{count}d" for kind in ("conv", "conv_transpose") for count in (1, 2, 3)} | {"deform_conv2d"}


# Limit of concurrent backward passes from one forward pass, each in its own thread.
_PASSES_AT_ONCE = 64


class _Forward:
    """One forward pass, and the class of each row, known once a backward pass has reached the logits."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.plan = session.plan
        # The enclosing backward pass, if any: checkpointing may call parts of the model there.
        self.within = current_backward_pass()
        self.edits = True
        self.reached = False
        self.attached: set[str] = set()
        # Modules that are running, innermost last, and may do more than convolve.
        self.inside: list[_Inside] = []
        self.rules: BackwardRules | None = None
        # The graph of this pass, while the model runs: the inputs, and the nodes of convolutions.
        self.sources: list[Tensor] = []
        self._marked: dict[Any, str] = {}
        self._paths: Paths | None = None
        # Classes and used outputs by id of the backward pass, since threads may run several at once. The oldest are
        # dropped.
        self._read: deque[tuple[int, Tensor]] = deque(maxlen=_PASSES_AT_ONCE)
        self._used: deque[tuple[int, int]] = deque(maxlen=_PASSES_AT_ONCE)

    def leave_inside(self, convolution: Convolution) -> "_Inside | None":
        """Deactivate what `_look_inside` has activated for this module, if anything."""
        if not self.inside or self.inside[-1].weight is not own_parameter(convolution, "weight"):
            return None
        inside = self.inside.pop()
        inside.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return inside

    def leave_rules(self) -> None:
        """Deactivate the rules, if any."""
        rules, self.rules = self.rules, None
        if rules is not None:
            rules.__exit__(None, None, None)

    def forget_graph(self) -> None:
        """Drop references to the graph, which would keep it alive."""
        self.sources, self._marked = [], {}

    def expect_rows(self, rows: int) -> None:
        targets = self.plan.targets
        if targets is not None:
            check_target_count(targets, rows, "pass")

    def has_edited(self, output: Any) -> bool:
        """Whether this is the edited output of a convolution."""
        edit = getattr(getattr(output, "grad_fn", None), "edit", None)
        return isinstance(edit, LayerEdit) and edit.forward is self

    def mark(self, layer: str, output: Any) -> None:
        """Note which nodes of the graph stand for a call of a layer."""
        if self in _FORWARDS.get() and self.plan.route.paths is None:
            self._marked.update({values.grad_fn: layer for values in tensors_in(output) if values.grad_fn is not None})

    def refuse(self, layer: str, output: Any, reason: str) -> None:
        """Raise `ModelError` in the backward pass if a layer that cannot be edited is one to edit."""
        self.mark(layer, output)

        def hook(gradient: Tensor) -> None:
            if layer in self.chosen(layer):
                self.session.met_in.add(current_backward_pass())
                raise ModelError(f"Layer {layer!r} {reason}. Leave it out of `layers`.")

        for values in tensors_in(output):
            if values.requires_grad:
                values.register_hook(hook)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def watch(self, output: object) -> None:
        """Find the paths to the output, and note the gradient there: its classes, unless targets were given."""
        selector, targets = self.plan.edit.selector, self.plan.targets
        everything = output
        if self.plan.pick_logits is not None:
            output = pick_logits(output, self.plan.pick_logits)
        if selector is None:
            return
        if not self.reached and _may_go_back(output):
            raise ModelError(
                "None of the chosen convolutions was called in this forward pass, so nothing would be edited. Choose "
                "layers that the model calls, and explain the model itself, not a compiled or functional copy."
            )
        recorded = [values for values in tensors_in(everything) if values.grad_fn is not None] if self.edits else []
        self._paths = self._traced([values.grad_fn for values in recorded])
        self._used = deque(maxlen=_PASSES_AT_ONCE * max(1, len(recorded)))
        for index, values in enumerate(recorded):
            values.register_hook(partial(self._use, index))  # type: ignore[no-untyped-call]  # torch leaves it untyped
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

    def _traced(self, outputs: list[Any]) -> Paths | None:
        """Find the paths to the nodes of the outputs."""
        route = self.plan.route
        if route.paths is not None or not self._marked:
            return route.paths
        # An output that hides its tensors may depend on every convolution.
        roots = outputs or list(self._marked)
        starts = {values.grad_fn for values in self.sources if values.grad_fn is not None}
        leaves = {id(values) for values in self.sources if values.grad_fn is None}

        def is_source(node: Any) -> bool:
            return node in starts or id(getattr(node, "variable", None)) in leaves

        def is_leaf(node: Any) -> bool:
            return not node.next_functions

        # Without an input that requires a gradient, the gradients of weights flow through all layers.
        paths, nodes = trace(roots, self._marked, is_source if self.sources else is_leaf)
        if self.sources:
            route.paths = paths
            if isinstance(route.asked, Fraction):
                self.session.warn_left_out(unmarked(nodes, self._marked))
        return paths

    def _use(self, output: int, gradient: Tensor) -> None:
        """Note that a gradient starts at an output."""
        named = self.plan.route.asked
        if isinstance(named, frozenset):
            self.session.expected |= self.attached & named
        self.session.started.add(current_backward_pass())
        self.session.used.add(output)
        self._used.append((current_backward_pass(), output))

    def chosen(self, layer: str) -> frozenset[str]:
        """Return the layers to edit in the running backward pass, which has reached this one."""
        route = self.plan.route
        if isinstance(route.asked, frozenset):
            return route.asked
        paths = self._paths or route.paths
        if paths is None or layer not in paths.layers:
            if route.asked == 1:
                return frozenset((layer,))
            raise LayerError(
                f"Cannot tell how deep layer {layer!r} is: it ran outside of the model's own forward pass, as parts of "
                "a model that are called alone do, and parts under checkpointing with use_reentrant=True. Pass "
                "`layers='all'`, or name the layers."
            )
        now = current_backward_pass()
        # Copied, since other threads append to it. A score taken inside of the model uses none of its outputs.
        used = frozenset(output for number, output in list(self._used) if number == now)
        fits = used and max(used) < len(paths.outputs)
        found = route.chosen(paths, used if fits else None)
        self.session.expected |= found
        return found

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
        self.forward.plan.route.edited = self.forward.session.edited
        return weighted, scales, unit

    def meet(self, gradient: Tensor) -> bool:
        """Note that a gradient has arrived; return whether it is to be edited."""
        session = self.forward.session
        if is_batched(gradient):
            session.met_in.add(current_backward_pass())
            raise SettingError("ParchGrad does not work with is_grads_batched=True. Run one backward pass at a time.")
        if self._layer not in self.forward.chosen(self._layer):
            return False
        session.met.add(self._layer)
        session.met_in |= {current_backward_pass(), self.forward.within}
        return True


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
        is_edited = ctx.edit.meet(gradient)
        if in_place_changes(ctx.weight) != ctx.version:
            raise ModelError(
                "The weight of a convolution was changed between the forward and the backward pass. Run both again."
            )
        weight = ctx.weight.detach().to(gradient.dtype)
        if is_edited:
            weighted, scales, unit = ctx.edit.apply(gradient)
            edited = partitioned_input_gradient(weighted, scales, weight, ctx.geometry, ctx.input_shape)
            found = restored_range(edited, unit)
        else:
            found = input_gradient(gradient, weight, ctx.geometry, ctx.input_shape)
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
        if not ctx.edit.meet(gradient):
            return gradient, None
        weighted, scales, unit = ctx.edit.apply(gradient)
        edited = weighted * scales.reshape(*scales.shape, *[1] * (gradient.dim() - 2))
        return restored_range(edited, unit).to(gradient.dtype), None


def _only_convolves(node: Any) -> bool:
    """Whether a node of the graph is a convolution, apart from a change of shape or type behind it."""
    while node is not None and any(kind in node.name() for kind in ("Slice", "View", "ToCopy", "Clone", "Alias")):
        node = node.next_functions[0][0]
    return node is not None and convolves(node)


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
