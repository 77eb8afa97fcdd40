"""One forward pass of the model in a block, and the edits of its convolutions in the backward passes that follow."""

import itertools
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from fractions import Fraction
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from parchgrad.core._torch import (
    are_transforms_active,
    current_backward_pass,
    has_plain_forward,
    in_place_changes,
    is_batched,
    will_run,
)
from parchgrad.core.balance import Balance
from parchgrad.core.convolution import Geometry, input_gradient, partitioned_input_gradient, plain_geometry
from parchgrad.core.edit import Edit
from parchgrad.core.hooks import tensors_in
from parchgrad.core.layers import Convolution, Layer
from parchgrad.core.operations import CONSTANT, refuse_second_derivatives
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
from parchgrad.core.rules import BackwardRules
from parchgrad.core.selectors import LayerSignal, Selector, as_selection
from parchgrad.core.strides import is_pass_through, overlapping_strides, smooth_strides
from parchgrad.core.targets import (
    check_target_count,
    check_target_range,
    describe_output,
    find_logits,
    pick_logits,
    read_classes,
    without_boxes,
)
from parchgrad.core.tokens import TokenView, token_view
from parchgrad.errors import InputError, LayerError, ModelError, ModelWarning, SettingError, TargetError, warn

__all__ = [
    "FORWARDS",
    "INSIDE",
    "Calls",
    "ForwardPass",
    "LayerEdit",
    "enter_inside",
    "leave_inside",
    "refuse_transforms",
]


class _Inside(TorchFunctionMode):
    """Edit the results of convolutions with this weight, while the module that owns it runs.

    Attributes:
        forward: the forward pass.
        weight: the weight.
        edits: the edits of these convolutions.
        was_met: whether there was such a convolution.
    """

    def __init__(self, forward: "ForwardPass", layer: str, convolution: Convolution, weight: Tensor) -> None:
        super().__init__()
        self.forward = forward
        self.weight = weight
        self.edits: list[LayerEdit] = []
        self.was_met = False
        self._layer, self._convolution = layer, convolution

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        result = function(*args, **named)
        weight = args[1] if len(args) > 1 else named.get("weight")
        if weight is not self.weight or getattr(function, "__name__", "") not in _FUNCTIONS:
            return result
        self.was_met = True
        edited = self.forward.edited(self._layer, self._convolution, None, result)
        if edited is None:
            return result
        self.edits.append(edited.grad_fn.edit)  # type: ignore[union-attr]  # set by the edit's own node
        return edited


_FUNCTIONS = {f"{kind}{count}d" for kind in ("conv", "conv_transpose") for count in (1, 2, 3)} | {"deform_conv2d"}


class Calls:
    """The edited calls of a block's convolutions, which choose the layers of each backward pass."""

    def __init__(self, plan: Plan, log: Log) -> None:
        """Start without calls."""
        self.plan = plan
        self.log = log
        # Names of the model's parameters by their id; of each block, since users replace them between blocks.
        self.weights = {id(weight): name for name, weight in plan.model.named_parameters()}
        # Weak, since a node of the graph refers to its edit, and that to this object.
        self._nodes: dict[int, weakref.ref[Any]] = {}
        self._numbers = itertools.count()
        # Layers by id of the backward pass, since threads may run several at once. The oldest are dropped.
        self._chosen: deque[tuple[int, frozenset[str]]] = deque(maxlen=_PASSES_AT_ONCE)

    def add(self, node: Any) -> None:
        """Add the node of an edited call."""
        number = next(self._numbers)
        self._nodes[number] = weakref.ref(node, lambda _: self._nodes.pop(number, None))

    def running(self) -> dict[Any, str]:
        """Layers of the nodes that the running backward pass goes through."""
        return {node: layer for node, layer in self._layers().items() if will_run(node)}

    def _layers(self) -> dict[Any, str]:
        """Layers of all nodes, in the order of the forward passes."""
        nodes = (reference() for reference in list(self._nodes.values()))
        return {node: node.edit.layer for node in nodes if node is not None}

    def chosen(self) -> frozenset[str]:
        """Layers to edit in the running backward pass."""
        route = self.plan.route
        if route.named is not None:
            return route.named
        now = current_backward_pass()
        # Copied, since other threads append to it.
        found = next((layers for number, layers in reversed(list(self._chosen)) if number == now), None)
        if found is None:
            running = self.running()
            paths, _, calls = self.trace(running, running)
            found = route.chosen(paths, {calls[node] for node in running if node in calls})
            self._chosen.append((now, found))
        return found

    def trace(
        self, roots: Iterable[Any], layers: Mapping[Any, str] | None = None, stops: Collection[Any] = ()
    ) -> tuple[Paths, list[Any], dict[Any, int]]:
        """Follow the graph back to its leaves, other than the model's weights if there are others.

        Args:
            roots: nodes to start from.
            layers: layers of the nodes that count as calls; None means all of this block.
            stops: further nodes that belong to the input.
        """
        roots, layers = list(roots), self._layers() if layers is None else layers
        weights = self.weights

        def is_input(node: Any) -> bool:
            variable = getattr(node, "variable", None)
            return variable is not None and variable is not CONSTANT and id(variable) not in weights

        found = trace(roots, layers, is_input, stops)
        # Without an input that requires a gradient, those of the weights flow through all layers.
        return found if found[1] else trace(roots, layers, lambda node: True)


# Limit of concurrent backward passes from one forward pass, each in its own thread.
_PASSES_AT_ONCE = 64


class ForwardPass:
    """One forward pass, and the class of each row, known once a backward pass has reached the logits."""

    def __init__(self, calls: Calls) -> None:
        """Start a pass."""
        self.plan = calls.plan
        self.log = calls.log
        self.calls = calls
        # The enclosing backward pass, if any: checkpointing may call parts of the model there.
        self.within = current_backward_pass()
        self.reached = False
        self.rules: BackwardRules | None = None
        # Whether this block edits some of the layers, and decides over all convolutions.
        self.edits = self.decides_over_all = True
        # Inputs of the model and their nodes, while it runs.
        self.inputs: list[Tensor] = []
        self.starts: list[Any] = []
        # Numbers of positions of the convolutions, to tell the tokens of the image from those before them.
        self.positions: set[int] = set()
        # Modules whose rule of a user runs.
        self.standing_in: set[int] = set()
        self._attached: set[str] = set()
        # Classes by id of the backward pass, see `Calls`.
        self._read: deque[tuple[int, Tensor]] = deque(maxlen=_PASSES_AT_ONCE)

    def leave_rules(self) -> Balance | None:
        """Deactivate the rules, if any, and return those that balance, which refer to the graph."""
        rules, self.rules = self.rules, None
        if rules is None:
            return None
        rules.__exit__(None, None, None)
        return rules.balance

    def note_positions(self, output: Any) -> None:
        """Note the number of positions of a convolution's output."""
        # A pooled map, as in squeeze-and-excitation, says nothing of the grid.
        if isinstance(output, Tensor) and output.shape[2:].numel() > 1:
            self.positions.add(output.shape[2:].numel())

    def attach(
        self, layer: str, module: Layer, inputs: tuple[Any, ...], output: Any, inside: _Inside | None
    ) -> Tensor | None:
        """Return a layer's output with an edited backward pass; None if nothing is to be replaced."""
        edits = [] if inside is None else inside.edits
        if not isinstance(output, Tensor):
            self._refuse(layer, output, inputs, edits, f"returns a {type(output).__name__} instead of a tensor")
            return None
        # A convolution may delegate to another one inside it; edit the operation only once.
        earlier = getattr(output.grad_fn, "edit", None)
        if (inside is not None and inside.was_met) or (isinstance(earlier, LayerEdit) and earlier.forward is self):
            return None
        if isinstance(module, nn.Linear):
            return self.edited_tokens(layer, output)
        found = self.edited(layer, module, inputs, output)
        if found is not None and not has_plain_forward(module) and not _only_convolves(output.grad_fn):
            edits = [found.grad_fn.edit]  # type: ignore[union-attr]  # set by the edit's own node
            name = type(module).__name__
            self._refuse(layer, found, inputs, edits, f"is of type {name}, which does more than convolve")
        return found

    def edited(
        self, layer: str, convolution: Convolution, inputs: tuple[Any, ...] | None, output: Tensor
    ) -> Tensor | None:
        """Return a convolution's output with an edited backward pass; None if no gradient flows through it."""
        # Read once: each access wraps torch's node anew.
        node = output.grad_fn
        if not self._is_recorded(layer, node):
            return None
        if output.dim() != len(convolution.kernel_size) + 2:
            raise InputError(f"The input of layer {layer!r} has no batch dimension. Add one with inputs.unsqueeze(0).")
        self._check_targets(output.shape[0])
        edit = LayerEdit(self, layer)
        edit.observe(output.detach())
        geometry = None if inputs is None or len(inputs) != 1 else plain_geometry(convolution)
        # An earlier hook may have replaced the output.
        if inputs is None or geometry is None or not _is_convolution_of(node, inputs[0]):
            edited = cast(Tensor, _EditedOutput.apply(output, edit))
        elif inputs[0].requires_grad:
            edited = cast(Tensor, _EditedConvolution.apply(inputs[0], [output, convolution.weight], geometry, edit))
        else:
            # No gradient flows to the input.
            return None
        self._add(layer, edited)
        return edited

    def edited_tokens(self, layer: str, output: Tensor) -> Tensor | None:
        """Return a linear layer's output with an edited backward pass; None if no gradient flows through it."""
        if not self._is_recorded(layer, output.grad_fn):
            return None
        edit = LayerEdit(self, layer)
        if output.dim() < 2:
            raise InputError(f"The input of layer {layer!r} has no batch dimension. Add one with inputs.unsqueeze(0).")
        batch = next((len(values) for values in self.inputs if values.requires_grad and values.dim() > 1), 0)
        edit.tokens = token_view(
            output.shape, batch, self.positions, may_put_batch_second=self.plan.may_put_batch_second
        )
        self._check_targets(edit.tokens.rows)
        edit.observe(edit.tokens.patches(output.detach()))
        edited = cast(Tensor, _EditedOutput.apply(output, edit))
        self._add(layer, edited)
        return edited

    def _is_recorded(self, layer: str, node: Any) -> bool:
        """Note whether a call of a layer was recorded for a backward pass."""
        (self.log.unrecorded if node is None else self.log.recorded).add(layer)
        return node is not None

    def _check_targets(self, rows: int) -> None:
        if self.plan.targets is not None:
            check_target_count(self.plan.targets, rows, "pass")

    def _add(self, layer: str, edited: Tensor) -> None:
        self._attached.add(layer)
        self.calls.add(edited.grad_fn)

    def _refuse(
        self, layer: str, output: Any, inputs: Sequence[Any], edits: Sequence["LayerEdit"], reason: str
    ) -> None:
        """Raise `ModelError` in the backward pass if a layer that cannot be edited is one to edit.

        Without an edit inside of it, its depth is unknown, so any gradient raises the error.
        """
        error = f"Layer {layer!r} {reason}. Name the layers to edit without it."
        for edit in edits:
            edit.refusal = error
        if edits:
            return

        def hook(gradient: Tensor) -> None:
            self.log.met.add(layer)
            self.log.met_in.add(current_backward_pass())
            raise ModelError(error)

        for values in tensors_in(output):
            if values.requires_grad and not any(values is given for given in inputs):
                values.register_hook(hook)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def watch(self, output: object, balance: Balance | None) -> None:
        """Note the gradient at the output, and its classes, unless targets were given."""
        selector, targets = self.plan.edit.selector, self.plan.targets
        everything, pick = output, self.plan.pick_logits
        output = find_logits(output) if pick is None else pick_logits(output, pick)
        # Some outputs hide their tensors, but not from the function that extracts the logits.
        recorded = list(
            {id(each): each for each in tensors_in((everything, output)) if each.grad_fn is not None}.values()
        )
        route = self.plan.route
        if recorded and not route.was_inspected and self.decides_over_all:
            route.was_inspected = True
            ends = [each.grad_fn for each in tensors_in(without_boxes(everything)) if each.grad_fn is not None]
            self._inspect(ends or [each.grad_fn for each in recorded], balance)
        if selector is None:
            return
        if not self.reached and _may_go_back(output):
            raise ModelError(
                "None of the chosen layers was called in this forward pass, so nothing would be edited. Choose layers "
                "that the model calls: attention of torch and torchvision uses its linear layers without a call. "
                "Explain the model itself, not a compiled or functional copy."
            )
        if self.edits:
            for values in recorded:
                # Hooks on inputs that are passed on would outlive the block.
                if not any(values is given for given in self.inputs):
                    values.register_hook(self._start)  # type: ignore[no-untyped-call]  # torch leaves it untyped
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
                f"Cannot infer the class from {describe_output(output)}. Pass `logits=` to extract the logits, or "
                "`target=` to name the class."
            )

    def _inspect(self, outputs: Sequence[Any], balance: Balance | None) -> None:
        """Name the operations before the outputs whose gradient stays plain, and those that are not balanced."""
        if self.plan.route.named is not None and balance is None:
            return
        _, nodes, calls = self.calls.trace(outputs, stops=self.starts)
        nodes = [node for node in nodes if node not in self.starts]
        left_out = [] if self.plan.route.named is not None else self._left_out(nodes, calls, balance)
        if left_out:
            self.log.warn_once(
                f"The gradient stays plain in {', '.join(left_out)}: these parts between the input and the output "
                "convolve or attend, but are not modules that can be edited."
            )
        remaining = [] if balance is None else balance.unbalanced(nodes, is_alone=self.plan.edit.selector is None)
        if remaining:
            self.log.warn_once(
                f"The gradient is not balanced in {', '.join(remaining)}, so it does not add up to the score. Register "
                "a rule with `register_rule` for the module around, or ignore this warning."
            )

    def _left_out(self, nodes: Sequence[Any], calls: Collection[Any], balance: Balance | None) -> list[str]:
        """Name the operations outside of layers that convolve, or that attend without being balanced."""
        weights = self.calls.weights
        own = {f"{layer}.weight" for layer in self.plan.layers}
        found = []
        for node in unmarked(nodes, calls):
            used = [id(getattr(other, "variable", None)) for other, _ in node.next_functions]
            name = next((weights[key] for key in used if key in weights), None)
            # A fixed filter of each channel, such as a blur, has no channels to choose from.
            is_filter = name is None and getattr(node, "_saved_groups", 1) > 1
            # A hook may have replaced the output of a layer by that of another convolution.
            if name not in own and not is_filter and (convolves(node) or balance is None):
                kind = "a convolution" if convolves(node) else "attention"
                found.append(kind if name is None else repr(name.removesuffix(".weight")))
        return list(dict.fromkeys(found))

    def _start(self, gradient: Tensor) -> None:
        """Note that a backward pass starts at the model's output."""
        self.log.started.add(current_backward_pass())
        named = self.plan.route.named
        if named is not None:
            self.log.expected |= self._attached & named
        if not self.log.is_open and not self.calls.running():
            warn(
                "A backward pass after the block reaches none of the chosen layers, so its gradient is plain. Choose "
                "layers between the input and the explained score.",
                ModelWarning,
            )

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
    """The edit of one convolution's gradient for one forward pass.

    Attributes:
        forward: the forward pass.
        layer: name of the convolution.
        refusal: why it cannot be edited; empty if it can.
        observation: what the selector has observed.
        tokens: how the layer's output holds tokens; None for a convolution.
    """

    def __init__(self, forward: ForwardPass, layer: str) -> None:
        """Start without a refusal and an observation."""
        self.forward = forward
        self.layer = layer
        self.refusal = ""
        self.observation: Any = None
        self.tokens: TokenView | None = None

    def observe(self, output: Tensor) -> None:
        """Let the selector observe the convolution's output."""
        selector = cast(Selector, self.settings.selector)
        # Some selectors need only the gradient.
        if type(selector).observe is not Selector.observe:
            with torch.no_grad():
                self.observation = selector.observe(output)

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
            classes = self.forward.classes_of(gradient.shape[0], self.layer, gradient.device)
        signal = LayerSignal(
            layer=self.layer, gradient=at_least_float32(gradient), observation=self.observation, classes=classes
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
        self.forward.log.edited.add(self.layer)
        self.forward.plan.route.edited = self.forward.log.edited
        return weighted, scales, unit

    def meet(self, gradient: Tensor) -> bool:
        """Note that a gradient has arrived; return whether it is to be edited."""
        log, route, now = self.forward.log, self.forward.plan.route, current_backward_pass()
        log.touch(self.layer)
        if is_batched(gradient):
            log.met_in.add(now)
            raise SettingError("ParchGrad does not work with is_grads_batched=True. Run one backward pass at a time.")
        if isinstance(route.asked, Fraction) and route.asked < 1 and self.forward.within >= 0:
            log.met_in |= {now, self.forward.within} - {-1}
            raise LayerError(
                f"Cannot tell how deep layer {self.layer!r} is: checkpointing with use_reentrant=True hides its place "
                "in the graph. Use use_reentrant=False, pass `layers='all'`, or name the layers."
            )
        if self.layer not in self.forward.calls.chosen():
            return False
        log.met.add(self.layer)
        log.met_in |= {now, self.forward.within} - {-1}
        if self.refusal:
            raise ModelError(self.refusal)
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
        strides = overlapping_strides(ctx.geometry.stride, weight.shape[2:])
        if ctx.edit.settings.antialias and max(strides) > 1:
            found = smooth_strides(found, strides)
        return found, None, None, None


class _EditedOutput(torch.autograd.Function):
    """The output of a convolution variant or a linear layer; its gradient is edited before the layer's own pass."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, edit: LayerEdit) -> Tensor:
        ctx.edit = edit
        return output.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.edit.meet(gradient):
            return gradient, None
        view = ctx.edit.tokens
        values = gradient if view is None else view.patches(gradient)
        weighted, scales, unit = ctx.edit.apply(values)
        if view is not None:
            # The gradient may have reached the other tokens alone, as behind the last attention.
            is_reached = (values != 0).flatten(1).any(dim=1, keepdim=True)
            if len(is_reached):
                ctx.edit.forward.log.note_tokens(ctx.edit.layer, is_reached.any())
            scales = torch.where(is_reached, scales, 1.0)
        edited = restored_range(weighted * scales.reshape(*scales.shape, *[1] * (values.dim() - 2)), unit)
        if view is not None:
            edited = view.scaled(at_least_float32(gradient), edited, scales)
        return edited.to(gradient.dtype), None


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


INSIDE: ContextVar[tuple[_Inside, ...]] = ContextVar("parchgrad_inside", default=())
"""Running convolutions of this thread or task that may do more than convolve, innermost last."""


def enter_inside(forward: ForwardPass, layer: str, convolution: Convolution, weight: Tensor) -> None:
    """Edit the convolution itself in a subclass that does more, until `leave_inside`."""
    inside = _Inside(forward, layer, convolution, weight)
    INSIDE.set((*INSIDE.get(), inside))
    inside.__enter__()  # type: ignore[no-untyped-call]  # torch leaves it untyped


def leave_inside(log: Log, weight: Tensor | None = None) -> _Inside | None:
    """Undo the last `enter_inside` of a block, if there is one, for this weight or any."""
    running = INSIDE.get()
    if not running or running[-1].forward.log is not log or (weight is not None and running[-1].weight is not weight):
        return None
    INSIDE.set(running[:-1])
    running[-1].__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return running[-1]


FORWARDS: ContextVar[tuple[ForwardPass, ...]] = ContextVar("parchgrad_forwards", default=())
"""Running forward passes of this thread or task, innermost last."""
