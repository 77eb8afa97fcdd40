"""One forward pass of the model in a block, and the edits of its convolutions in the backward passes that follow."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

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
from parchgrad.core.hooks import tensors_in
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
from parchgrad.core.plan import Log, Plan
from parchgrad.core.rules import BackwardRules, is_pass_through, refuse_second_derivatives, smooth_strides
from parchgrad.core.selectors import LayerSignal, Selector, as_selection
from parchgrad.core.targets import check_target_count, check_target_range, pick_logits, read_classes
from parchgrad.errors import InputError, LayerError, ModelError, SettingError, TargetError

__all__ = ["FORWARDS", "ForwardPass", "LayerEdit", "refuse_transforms"]


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


class ForwardPass:
    """One forward pass, and the class of each row, known once a backward pass has reached the logits."""

    def __init__(self, plan: Plan, log: Log) -> None:
        """Start a pass."""
        self.plan = plan
        self.log = log
        # The enclosing backward pass, if any: checkpointing may call parts of the model there.
        self.within = current_backward_pass()
        self.edits = True
        self.reached = False
        self.attached: set[str] = set()
        # Modules that are running, innermost last, and may do more than convolve.
        self._inside: list[_Inside] = []
        self.rules: BackwardRules | None = None
        # The graph of this pass, while the model runs: the inputs, and the nodes of convolutions.
        self.sources: list[Tensor] = []
        self._marked: dict[Any, str] = {}
        self._paths: Paths | None = None
        # Classes and used outputs by id of the backward pass, since threads may run several at once. The oldest are
        # dropped.
        self._read: deque[tuple[int, Tensor]] = deque(maxlen=_PASSES_AT_ONCE)
        self._used: deque[tuple[int, int]] = deque(maxlen=_PASSES_AT_ONCE)

    def look_inside(self, layer: str, convolution: Convolution) -> None:
        """Edit the convolution itself in a subclass that does more, until `leave_inside`."""
        weight, possible = own_parameter(convolution, "weight"), self.plan.route.possible
        if weight is not None:
            edit = partial(self._edited, layer, convolution, None) if possible is None or layer in possible else None
            self._inside.append(_Inside(weight, edit))
            self._inside[-1].__enter__()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def leave_inside(self, convolution: Convolution) -> bool:
        """Undo `look_inside`, if it was called for this module; return whether it has found the convolution."""
        if not self._inside or self._inside[-1].weight is not own_parameter(convolution, "weight"):
            return False
        inside = self._inside.pop()
        inside.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return inside.was_met

    def leave_rules(self) -> None:
        """Deactivate the rules, if any."""
        rules, self.rules = self.rules, None
        if rules is not None:
            rules.__exit__(None, None, None)

    def forget_graph(self) -> None:
        """Drop references to the graph, which would keep it alive."""
        self.sources, self._marked = [], {}

    def _expect_rows(self, rows: int) -> None:
        targets = self.plan.targets
        if targets is not None:
            check_target_count(targets, rows, "pass")

    def attach(
        self, layer: str, convolution: Convolution, inputs: tuple[Any, ...], output: Any, *, was_edited: bool
    ) -> Tensor | None:
        """Return a layer's output with an edited backward pass; None if nothing is to be replaced."""
        if not isinstance(output, Tensor):
            self._refuse(layer, output, f"returns a {type(output).__name__} instead of a tensor")
            return None
        # A convolution may delegate to another one inside it; edit the operation only once.
        earlier = getattr(output.grad_fn, "edit", None)
        if was_edited or (isinstance(earlier, LayerEdit) and earlier.forward is self):
            return None
        if output.grad_fn is not None and not has_plain_forward(convolution) and not _only_convolves(output.grad_fn):
            self._refuse(layer, output, f"is a {type(convolution).__name__}, which does more than convolve")
            return None
        return self._edited(layer, convolution, inputs, output)

    def _edited(
        self,
        layer: str,
        convolution: Convolution,
        inputs: tuple[Any, ...] | None,
        output: Tensor,
    ) -> Tensor | None:
        """Return a convolution's output with an edited backward pass; None if no gradient flows through it."""
        # Read once: each access wraps torch's node anew.
        node = output.grad_fn
        if node is None:
            self.log.unrecorded.add(layer)
            return None
        self.log.recorded.add(layer)
        if output.dim() != len(convolution.kernel_size) + 2:
            raise InputError(f"The input of layer {layer!r} has no batch dimension. Add one with inputs.unsqueeze(0).")
        self._expect_rows(output.shape[0])
        observation = None
        selector = cast(Selector, self.plan.edit.selector)
        # Some selectors need only the gradient.
        if type(selector).observe is not Selector.observe:
            with torch.no_grad():
                observation = selector.observe(output.detach())
        edit = LayerEdit(self, layer, observation)
        geometry = None if inputs is None or len(inputs) != 1 else plain_geometry(convolution)
        # An earlier hook may have replaced the output.
        if inputs is None or geometry is None or not _is_convolution_of(node, inputs[0]):
            edited = cast(Tensor, _EditedOutput.apply(output, edit))
        elif inputs[0].requires_grad:
            edited = cast(Tensor, _EditedConvolution.apply(inputs[0], [output, convolution.weight], geometry, edit))
        else:
            # No gradient flows to the input.
            return None
        self.attached.add(layer)
        self.mark(layer, edited)
        return edited

    def mark(self, layer: str, output: Any) -> None:
        """Note which nodes of the graph stand for a call of a layer."""
        if self in FORWARDS.get() and self.plan.route.paths is None:
            self._marked.update({values.grad_fn: layer for values in tensors_in(output) if values.grad_fn is not None})

    def _refuse(self, layer: str, output: Any, reason: str) -> None:
        """Raise `ModelError` in the backward pass if a layer that cannot be edited is one to edit."""
        self.mark(layer, output)

        def hook(gradient: Tensor) -> None:
            if layer in self.chosen(layer):
                self.log.met_in.add(current_backward_pass())
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
                self._warn_left_out(unmarked(nodes, self._marked))
        return paths

    def _warn_left_out(self, operations: Sequence[Any]) -> None:
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
            self.log.warn_once(
                f"The gradient stays plain in {', '.join(dict.fromkeys(found))}: these parts between the input and the "
                "output convolve or attend, but are not modules that can be edited."
            )

    def _use(self, output: int, gradient: Tensor) -> None:
        """Note that a gradient starts at an output."""
        named = self.plan.route.asked
        if isinstance(named, frozenset):
            self.log.expected |= self.attached & named
        self.log.started.add(current_backward_pass())
        self.log.used.add(output)
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
        self.log.expected |= found
        return found

    def read(self, gradient: Tensor) -> None:
        """Read the class of each row off the gradient at the logits."""
        self._read.append((current_backward_pass(), read_classes(gradient)))

    def classes_of(self, rows: int, layer: str, device: torch.device) -> Tensor:
        """Return the explained class of each row of a layer, shape (B,)."""
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

    def __init__(self, forward: ForwardPass, layer: str, observation: Any) -> None:
        """Store what the selector has observed."""
        self.forward = forward
        self._layer = layer
        self._observation = observation

    @property
    def settings(self) -> Edit:
        """Settings of the edit."""
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
        self.forward.log.edited.add(self._layer)
        self.forward.plan.route.edited = self.forward.log.edited
        return weighted, scales, unit

    def meet(self, gradient: Tensor) -> bool:
        """Note that a gradient has arrived; return whether it is to be edited."""
        log = self.forward.log
        if is_batched(gradient):
            log.met_in.add(current_backward_pass())
            raise SettingError("ParchGrad does not work with is_grads_batched=True. Run one backward pass at a time.")
        if self._layer not in self.forward.chosen(self._layer):
            return False
        log.met.add(self._layer)
        log.met_in |= {current_backward_pass(), self.forward.within}
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


def refuse_transforms() -> None:
    """Raise `ModelError` within transforms of torch.func."""
    if are_transforms_active():
        raise ModelError(
            "ParchGrad does not work within transforms of torch.func such as grad, vmap and jacrev. Use "
            "torch.autograd.grad or a Captum method."
        )


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


def _may_go_back(output: object) -> bool:
    """Whether a backward pass may start from an output, which may be of any type."""
    tensors = tensors_in(output)
    return any(values.requires_grad for values in tensors) if tensors else torch.is_grad_enabled()


FORWARDS: ContextVar[tuple[ForwardPass, ...]] = ContextVar("parchgrad_forwards", default=())
"""Running forward passes of this thread or task, innermost last."""
