"""ParchGrad as a context manager: while it is open, gradients through the chosen convolutions are partitioned.

Hooks sit on modules, which every thread shares. What a pass needs is therefore found through context variables: a
hook that fires for another thread, or for a block that is not the innermost one around its convolution, does nothing.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from parchgrad.convolution import Geometry, partitioned_input_gradient, plain_geometry
from parchgrad.diagnosis import tensors_in
from parchgrad.edit import DEFAULT_SELECTOR, Edit
from parchgrad.errors import InputError, ModelError, ModelWarning, ParchGradError, SettingError, TargetError, warn
from parchgrad.hooks import TransientHook, current_backward_pass, raise_masked_failure
from parchgrad.layers import Convolution, LayerChoice, bare_model, check_evaluation_mode, choose_layers
from parchgrad.partition import (
    Conserve,
    at_least_float32,
    channel_norms,
    channel_scales,
    check_channel_weights,
    check_position_weights,
    in_ordinary_range,
    restored_range,
)
from parchgrad.rules import (
    BackwardRules,
    has_active_rules,
    has_replaced_rectifiers,
    is_pass_through,
    refuse_second_derivatives,
    smooth_strides,
)
from parchgrad.selection import LayerSignal, Selector, as_selection

__all__ = [
    "ParchGrad",
    "Target",
    "check_logits",
    "check_target_count",
    "check_target_range",
    "integer_targets",
    "partitioned_before",
    "pick_logits",
    "plain_gradients",
    "read_classes",
]

Target = int | Sequence[int] | Tensor


class ParchGrad:
    """Partitions the gradient of a model inside a `with` block; any gradient method may run in it.

    Inside the block every forward pass of the model that records gradients is edited on its way back: at each chosen
    convolution the selector weighs the channels, those that do not matter are pruned (or damped), the others are
    re-scaled. Every rectifier of the model gets a soft gate, every strided convolution, average or max pooling a smooth
    stride, as far as `gates` and `antialias` say so; the model's values stay the same bit for bit. The class of each
    row is read off the backward signal at the model's output, so batches that a method expands on its own (steps, noise
    samples) get the right class per row.

    The edit is in what passes on to a convolution's input; the gradient at its own output stays as it came. With
    `gamma` infinite only the kept channels are sent back, where that is faster. Gradients of weights have no meaning in
    the block: those of most chosen convolutions stay None.

    The model is not changed, and on leaving the block no hook is left. One object may be entered several times and
    from several threads; blocks of other threads are not affected. When blocks are nested, the innermost one that
    covers a convolution applies, with its own layers. First derivatives only: `create_graph=True` is refused.

    Checkpointing needs `use_reentrant=False`. With `use_reentrant=True` a part is edited only if the backward pass is
    in the block too, and never gets soft gates.

    What the backward signal shows is the seed: of a loss such as cross-entropy, whose largest positive gradient is at
    a competing class, give `target`.

    Attributes:
        layers: names of the chosen convolutions, in module order.

    Source: Park, Jeon, Choi (2023), "Partitioned Channel Gradient for Reliable Input Attribution".

    Example:
        >>> import parchgrad as pg
        >>> from captum.attr import Saliency
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)).eval()
        >>> x = torch.rand(2, 3, 8, 8, requires_grad=True)
        >>> with ParchGrad(model, pg.GradientEnergy(quantile=0.25), layers="all"):
        ...     saliency = Saliency(model).attribute(x, target=torch.tensor([0, 3]))
        >>> saliency.shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        selector: Selector | None = DEFAULT_SELECTOR,
        *,
        layers: LayerChoice | None = None,
        gamma: float = math.inf,
        conserve: Conserve | None = None,
        gates: float | None = None,
        antialias: bool | None = None,
        target: Target | None = None,
        logits: Callable[[Any], Tensor] | None = None,
    ) -> None:
        """Choose the layers and check every setting; no hook is set before the block is entered.

        Args:
            model: a module that returns logits (B, K), or an output from which `logits` picks them. A
                DistributedDataParallel wrapper stands for the module inside it.
            selector: how far each channel matters; None leaves all channels as they are, so that without `gates` and
                `antialias` the block is plain.
            layers: which convolutions are edited; see `choose_layers`. Here and below, None takes what suits the
                selector.
            gamma: how many times stronger than the rest the kept signal becomes, in (0, inf]; infinity prunes.
            conserve: what a layer keeps: `"energy"`, `"independent"`, `"exact"` or `"none"`; see `partition_gradient`.
            gates: width of the soft gates of every rectifier (ReLU, ReLU6, Hardtanh, LeakyReLU, PReLU; as modules or
                functions) and of the ramp over which values share the gradient of max pooling, in standard deviations
                of what enters; 0 is the true derivative. Both apply in passes through the model itself, not through a
                part of it that is called on its own, and stay off where a Captum method replaces the backward pass of
                rectifiers itself.
            antialias: whether the gradient at the input of convolutions and pooling with a stride is smoothed.
            target: class per row, or one for all, in place of the class read off the backward signal.
            logits: picks the logits out of an output that is a tuple, a dict or an object of some other kind, such as
                `lambda output: output["out"]`. It picks a tensor that is there: off one that it computes no class can
                be read, since what is explained does not come from it.

        Raises:
            SettingError: if a setting is out of range.
            LayerError: if the layers are not in the model.
            ModelError: if the model holds no convolution, or none but those that cut patches for a transformer, is
                wrapped in DataParallel, or was compiled.
            StatisticsError: if the selector's statistics do not fit the layers, or know nothing of `target`.
            TargetError: if `target` is no class.
        """
        model = bare_model(model)
        edit = Edit(
            selector=selector, layers=layers, gamma=gamma, conserve=conserve, gates=gates, antialias=antialias
        ).resolved()
        if not edit.is_plain:
            _check_not_compiled(model)
        check_logits(logits)
        self._model = model
        self._edit = edit
        self._pick_logits = logits
        self._targets = None if target is None else integer_targets(target)
        self._highest_target = -1 if self._targets is None else int(self._targets.max())
        self._convolutions: dict[str, Convolution] = {}
        self._sessions: list[_Session] = []
        if edit.selector is not None and edit.layers is not None:
            self._convolutions = choose_layers(model, edit.layers)
            edit.selector.check({name: module.out_channels for name, module in self._convolutions.items()})
            if self._targets is not None:
                edit.selector.check_targets(sorted(set(self._targets.flatten().tolist())))

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the chosen convolutions, in module order."""
        return tuple(self._convolutions)

    @property
    def edit(self) -> Edit:
        """The settings, with what suits the selector in place of every None."""
        return self._edit

    def __getstate__(self) -> dict[str, Any]:
        """Leave open blocks behind: a copy, as in another process, starts outside of any."""
        return {**vars(self), "_sessions": []}

    def __enter__(self) -> "ParchGrad":
        """Set the hooks.

        Raises:
            ModelError: if the model or a part of it is in training mode or compiled.
        """
        self._enter(self._model)
        return self

    def _enter(self, head: nn.Module) -> None:
        """Set the hooks; the classes are read at the output of `head`, which calls the model."""
        if not self._edit.is_plain:
            check_evaluation_mode(self._model)
            _check_not_compiled(self._model)
        session = _Session(self, head)
        self._sessions.append(session)
        session.open()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the hooks, whatever happened in the block. Warns where the model was not called in it.

        Re-raises the original exception of a failed pass, also where hooks of another thread replaced it.

        Raises:
            ParchGradError: if the block is left in another thread or task than it was entered in, or was not entered.
        """
        session = next((session for session in reversed(_SESSIONS.get()) if session.owner is self), None)
        if session is None:
            # Its own context cannot be reached from here, but its hooks can, where it is known which are meant.
            if len(self._sessions) == 1:
                self._sessions.pop().close()
            raise ParchGradError(
                "This ParchGrad block is left in another thread or task than it was entered in; do both in one."
            )
        was_open = session.is_open
        session.close()
        if session in self._sessions:
            self._sessions.remove(session)
        if kind is None and not was_open:
            raise ParchGradError(
                "This ParchGrad block was left from another thread or task before, and gradients since then are plain; "
                "leave a block where it was entered, and only there."
            )
        if self._edit.is_plain:
            raise_masked_failure(error)
            return
        if kind is None and not session.was_called:
            warn(
                f"Nothing was edited, since {type(self._model).__name__} was not called in this block; call the model "
                "itself rather than a compiled or functional copy, in the thread that entered the block.",
                ModelWarning,
            )
        elif kind is None and session.missed:
            warn(
                f"{len(session.missed)} of {len(self.layers)} chosen convolutions were never called and not edited: "
                f"{', '.join(session.missed[:3])}{', ...' if len(session.missed) > 3 else ''}; leave out those that "
                "take no part, such as heads for training alone, and give a model without compiled parts.",
                ModelWarning,
            )
        raise_masked_failure(error)


def _check_not_compiled(model: nn.Module) -> None:
    """Raise `ModelError` if the model or a part of it was compiled: what is compiled may run past hooks set later."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ModelError(
            "The model or a part of it is TorchScript, which runs past the hooks of its layers. Explain the model as "
            "it was before torch.jit."
        )
    # Looked up past nn.Module's own slow way of finding attributes.
    if any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in model.modules()):
        raise ModelError(
            "The model or a part of it was compiled by torch.compile and may run past the hooks of its layers; "
            "explain the model as it was before, such as model._orig_mod or a copy that is not compiled."
        )


@contextmanager
def partitioned_before(head: nn.Module, partition: ParchGrad) -> Iterator[None]:
    """Enter a block whose classes are read at the output of a module that wraps the model.

    Args:
        head: calls the model and returns its logits (B, K), however it comes by them.
        partition: the block, made for the model itself.

    Example:
        >>> import parchgrad as pg
        >>> model = nn.Sequential(nn.Conv1d(1, 4, 1)).eval()
        >>> head = nn.Sequential(model, nn.AdaptiveAvgPool1d(1), nn.Flatten()).eval()
        >>> x = torch.ones(1, 1, 3, requires_grad=True)
        >>> with partitioned_before(head, pg.ParchGrad(model, pg.GradientEnergy())):
        ...     torch.autograd.grad(head(x)[:, 2].sum(), x)[0].shape
        torch.Size([1, 1, 3])
    """
    partition._enter(head)
    try:
        yield
    except BaseException as error:
        partition.__exit__(type(error), error, error.__traceback__)
        raise
    partition.__exit__(None, None, None)


@contextmanager
def plain_gradients(model: nn.Module) -> Iterator[None]:
    """Inside the block gradients of the model are plain, also where ParchGrad blocks are open around it.

    Example:
        >>> import parchgrad as pg
        >>> model = nn.Sequential(nn.Conv1d(1, 4, 1), nn.Flatten()).eval()
        >>> x = torch.ones(1, 1, 3, requires_grad=True)
        >>> with pg.ParchGrad(model, pg.GradientEnergy(quantile=0.25)), plain_gradients(model):
        ...     found = torch.autograd.grad(model(x).sum(), x)[0]
        >>> torch.equal(found, torch.autograd.grad(model(x).sum(), x)[0])
        True
    """
    with ParchGrad(model, None):
        yield


class _Session:
    """One entered block: its hooks, and the modules over which it decides."""

    def __init__(self, owner: ParchGrad, head: nn.Module) -> None:
        self.owner = owner
        self._head = head
        self.covered = {id(module) for module in owner._model.modules()}
        self._handles: list[RemovableHandle] = []
        self.is_open = True
        self.was_called = False
        self._reached: set[str] = set()
        self._recorded: set[str] = set()
        self._was_passed = False
        self._has_warned = False

    @property
    def missed(self) -> list[str]:
        """Chosen convolutions that were never called, though the model and others were."""
        if not (self._was_passed and self._reached):
            return []
        return [name for name in self.owner.layers if name not in self._reached]

    def open(self) -> None:
        try:
            self._handles.append(self._head.register_forward_pre_hook(TransientHook(self._begin)))
            for name, convolution in self.owner._convolutions.items():
                hook = TransientHook(self._attach, self.owner, name)
                self._handles.append(convolution.register_forward_hook(hook, prepend=True))
            # Called after an exception too, so that a failed pass leaves no state behind.
            self._handles.append(self._head.register_forward_hook(TransientHook(self._end), always_call=True))
            _SESSIONS.set((*_open_sessions(), self))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.is_open = False
        for handle in self._handles:
            handle.remove()
        _SESSIONS.set(_open_sessions())
        for forward in _FORWARDS.get():
            if forward.session is self:
                forward.leave_rules()
        _FORWARDS.set(tuple(forward for forward in _FORWARDS.get() if forward.session is not self))

    def _decides_over(self, module: nn.Module) -> bool:
        """Whether this is the innermost block, in this thread or task, around this module."""
        key = id(module)
        for session in reversed(_SESSIONS.get()):
            if session.is_open and key in session.covered:
                return session is self
        return False

    def _forward(self) -> "_Forward | None":
        for forward in reversed(_FORWARDS.get()):
            if forward.session is self:
                return forward
        return None

    def _begin(self, model: nn.Module, inputs: tuple[object, ...]) -> None:
        if self not in _SESSIONS.get():
            return
        self.was_called = True
        forward = _Forward(self, self.owner)
        _FORWARDS.set((*_FORWARDS.get(), forward))
        gates, antialias = self._gates(), bool(self.owner.edit.antialias)
        # Without rules of its own, an inner block keeps those of a block around it out.
        records = torch.is_grad_enabled() and (gates or antialias or has_active_rules())
        if records and self._decides_over(self.owner._model):
            if gates or antialias:
                _refuse_transforms()
            forward.rules = BackwardRules(gates=gates, antialias=antialias)
            forward.rules.__enter__()

    def _gates(self) -> float:
        """Width of the gates in this pass."""
        gates = cast(float, self.owner.edit.gates)
        if gates and has_replaced_rectifiers(self.owner._model):
            self._warn_once("Soft gates are off: a Captum method replaces the backward pass of the rectifiers itself.")
            return 0.0
        return gates

    def _warn_once(self, message: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warn(message, ModelWarning)

    def _attach(
        self,
        owner: ParchGrad,
        layer: str,
        convolution: Convolution,
        inputs: tuple[Any, ...],
        output: Tensor,
    ) -> Tensor | None:
        """Put in place of a convolution's output one whose backward pass is edited."""
        if self not in _SESSIONS.get():
            return None
        # A part of the model called on its own has no forward pass of the model around it.
        forward = self._forward()
        if forward is None:
            forward = _Forward(self, owner)
            # Checkpointing with use_reentrant=False calls parts again, but goes back through the first call's nodes.
            is_repeated = layer in self._recorded and current_backward_pass() >= 0
            has_rules = owner.edit.gates or owner.edit.antialias
            if has_rules and output.grad_fn is not None and not is_repeated:
                self._warn_once(
                    "A part of the model was called on its own, where soft gates do not apply, and smooth strides at "
                    "edited convolutions alone. "
                    "Call the model itself, or give gates=0 and antialias=False."
                )
        forward.reached = self.was_called = True
        self._reached.add(layer)
        if not self._decides_over(convolution):
            return None
        _refuse_transforms()
        # Asked for once: each time costs a wrapper around torch's own node.
        node = output.grad_fn
        if node is None:
            return None
        self._recorded.add(layer)
        if output.dim() != len(convolution.kernel_size) + 2:
            raise InputError(
                f"Layer {layer!r} was given an input without a batch dimension; give a batch: inputs.unsqueeze(0)."
            )
        earlier = getattr(node, "edit", None)
        if isinstance(earlier, _LayerEdit) and earlier.forward is forward:
            # A convolution that hands over to another one inside it: one operation is edited once.
            return None
        forward.expect_rows(output.shape[0])
        observation = None
        selector = cast(Selector, owner.edit.selector)
        # Some selectors look at the gradient alone.
        if type(selector).observe is not Selector.observe:
            with torch.no_grad():
                observation = selector.observe(output.detach())
        edit = _LayerEdit(forward, layer, observation)
        geometry = plain_geometry(convolution)
        # Not if a hook that came first put something else in its place.
        if geometry is None or len(inputs) != 1 or not _is_convolution_of(node, inputs[0]):
            return cast(Tensor, _EditedOutput.apply(output, edit))
        if not inputs[0].requires_grad:
            # Nothing flows on to the input.
            return None
        return cast(Tensor, _EditedConvolution.apply(inputs[0], [output, convolution.weight], geometry, edit))

    def _end(self, model: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        forward = self._forward()
        if forward is None or self not in _SESSIONS.get():
            return
        forward.leave_rules()
        _FORWARDS.set(tuple(other for other in _FORWARDS.get() if other is not forward))
        # After an exception the output is None.
        if output is not None:
            self._was_passed = True
            forward.watch(output)


def _refuse_transforms() -> None:
    if torch._C._are_functorch_transforms_active():
        raise ModelError(
            "ParchGrad does not work within transforms of torch.func such as grad, vmap and jacrev; use "
            "torch.autograd.grad or a Captum method."
        )


# Backward passes from one forward pass, in as many threads.
_PASSES_AT_ONCE = 64


class _Forward:
    """One forward pass: the class of each of its rows, known once its backward pass reaches the logits."""

    def __init__(self, session: _Session, owner: ParchGrad) -> None:
        self.session = session
        self.owner = owner
        self.reached = False
        self.rules: BackwardRules | None = None
        # By the backward pass: several may be under way at once, each in its own thread. No one waits for the oldest.
        self._read: deque[tuple[int, Tensor]] = deque(maxlen=_PASSES_AT_ONCE)

    def leave_rules(self) -> None:
        """Let the rules act no more, where any did."""
        rules, self.rules = self.rules, None
        if rules is not None:
            rules.__exit__(None, None, None)

    def expect_rows(self, rows: int) -> None:
        targets = self.owner._targets
        if targets is not None:
            check_target_count(targets, rows, "pass")

    def watch(self, output: object) -> None:
        """Read the classes off the gradient at the logits, or take those that were given."""
        owner = self.owner
        if owner._pick_logits is not None:
            output = pick_logits(output, owner._pick_logits)
        if owner.edit.selector is None:
            return
        if not self.reached and _may_go_back(output):
            raise ModelError(
                "None of the chosen convolutions was called in this forward pass, so nothing would be edited; choose "
                "layers that take part, and explain the model itself rather than a compiled or functional copy."
            )
        if not owner.edit.selector.needs_class:
            return
        if isinstance(output, Tensor):
            classes = output.shape[1] if output.dim() > 1 else 1
            owner.edit.selector.check_classes(classes)
            if owner._targets is not None:
                check_target_range(owner._highest_target, classes)
            elif output.grad_fn is not None:
                output.register_hook(self.read)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        elif owner._targets is None:
            raise ModelError(
                f"Cannot infer the class from a {type(output).__name__}. Pass `logits=` to extract the logits, or "
                "`target=` to name the class."
            )

    def read(self, gradient: Tensor) -> None:
        self._read.append((current_backward_pass(), read_classes(gradient)))

    def classes_of(self, rows: int, layer: str, device: torch.device) -> Tensor:
        targets = self.owner._targets
        classes = None if targets is None else targets.to(device)
        if targets is None:
            now = current_backward_pass()
            # A copy, since other threads add to it.
            classes = next((read for number, read in reversed(list(self._read)) if number == now), None)
        if classes is None:
            raise TargetError(
                f"Cannot tell which class layer {layer!r} explains: the backward pass did not start at the model's "
                "output. Pass `target=`, or call the model itself."
            )
        if classes.numel() not in (1, rows):
            raise TargetError(
                f"Layer {layer!r} has {rows} rows, but the model's output has {classes.numel()}; "
                "give one target for all rows."
            )
        return classes.expand(rows)


class _LayerEdit:
    """What the edit of one convolution's output in one forward pass needs."""

    def __init__(self, forward: _Forward, layer: str, observation: Any) -> None:
        self.forward = forward
        self._layer = layer
        self._observation = observation

    @property
    def settings(self) -> Edit:
        return self.forward.owner.edit

    def apply(self, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weigh the gradient's places and find the factors of its channels.

        Returns:
            The weighted gradient, in float32 at least and divided row by row by a power of two; the factors (B, C);
            and these powers, shape (B,), or None where all are 1.
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
        return weighted, scales, unit


class _EditedConvolution(torch.autograd.Function):
    """A convolution that was computed already; its backward pass partitions, and goes to the input alone.

    Output and weight come in a list, into which autograd does not look. The output leaves as a new tensor on the same
    memory: its own backward pass is forgotten, and operations in place may follow.
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, hidden: list[Tensor], geometry: Geometry, edit: _LayerEdit) -> Tensor:
        output, weight = hidden
        # Not by save_for_backward: checkpointing counts what is saved, and its recomputation may be outside the block.
        ctx.weight, ctx.version = weight, _version(weight)
        ctx.geometry, ctx.input_shape, ctx.edit = geometry, source.shape, edit
        return output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if _version(ctx.weight) != ctx.version:
            raise ModelError(
                "The weight of a convolution was changed between the forward and the backward pass; run both anew."
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
    """The output of a convolution with a way of its own; the gradient is partitioned before it goes on to it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, edit: _LayerEdit) -> Tensor:
        ctx.edit = edit
        return output.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weighted, scales, unit = ctx.edit.apply(gradient)
        edited = weighted * scales.reshape(*scales.shape, *[1] * (gradient.dim() - 2))
        return restored_range(edited, unit).to(gradient.dtype), None


def _is_convolution_of(node: Any, source: Tensor) -> bool:
    """Whether a node of the graph is that of a convolution, straight from this input."""
    if node.name() != "ConvolutionBackward0":
        return False
    before = node.next_functions[0][0]
    # Autocast brings the input to half precision; a smooth stride stands between the input and the convolution.
    while before is not None and (before.name() == "ToCopyBackward0" or is_pass_through(before)):
        before = before.next_functions[0][0]
    if source.grad_fn is None:
        return not source.requires_grad or getattr(before, "variable", None) is source
    return before is source.grad_fn


_SESSIONS: ContextVar[tuple[_Session, ...]] = ContextVar("parchgrad_sessions", default=())
_FORWARDS: ContextVar[tuple[_Forward, ...]] = ContextVar("parchgrad_forwards", default=())


def _open_sessions() -> tuple[_Session, ...]:
    """Those of this thread or task; one that another thread closed is still in the context that entered it."""
    return tuple(session for session in _SESSIONS.get() if session.is_open)


def _may_go_back(output: object) -> bool:
    """Whether a backward pass may start from an output, of an unknown kind perhaps."""
    tensors = tensors_in(output)
    return any(values.requires_grad for values in tensors) if tensors else torch.is_grad_enabled()


def _version(values: Tensor) -> int | None:
    """Counts the changes in place; inference tensors have no such count."""
    return None if values.is_inference() else values._version


def check_logits(pick: object) -> None:
    """Raise `SettingError` unless what is to pick the logits is a function, or None."""
    if pick is not None and not callable(pick):
        raise SettingError(f"logits is {pick!r}, but it must be a function that picks them out of the output.")


def pick_logits(output: Any, pick: Callable[[Any], Tensor]) -> Tensor:
    """Pick the logits out of a model's output.

    Raises:
        ModelError: if the function fails on this output, or returns no tensor.

    Example:
        >>> pick_logits({"out": torch.ones(1, 2)}, lambda output: output["out"])
        tensor([[1., 1.]])
    """
    try:
        found = pick(output)
    except (TypeError, LookupError, AttributeError) as error:
        kind = type(output).__name__
        raise ModelError(
            f"logits cannot pick anything out of the {kind} that the model returns ({type(error).__name__}: {error}); "
            f"give a function of a {kind}."
        ) from error
    if not isinstance(found, Tensor):
        raise ModelError(
            f"logits picks a {type(found).__name__} out of the model's output, but a tensor is needed; pick one of its "
            "tensors."
        )
    return found


def read_classes(gradient: Tensor) -> Tensor:
    """Read which class each row explains off the gradient at the logits.

    It is the largest positive entry of the row; where no entry is positive, the one of largest magnitude. Of a map of
    entries for each class what is positive is summed, and the magnitudes.

    Args:
        gradient: gradient at the logits, shape (B, K, *S); (B,) counts as one class.

    Returns:
        Class indices, shape (B,).

    Example:
        >>> read_classes(torch.tensor([[0.0, 1.0, -3.0], [0.0, -2.0, -1.0]]))
        tensor([1, 1])
    """
    if gradient.dim() == 1:
        gradient = gradient.unsqueeze(1)
    maps = gradient.flatten(2) if gradient.dim() > 2 else gradient.unsqueeze(2)
    # Not the sum: weights of either sign, such as a region less its surroundings, would cancel in it.
    largest, classes = maps.clamp_min(0).sum(dim=2).max(dim=1)
    return torch.where(largest > 0, classes, maps.abs().sum(dim=2).argmax(dim=1))


def integer_targets(target: Target) -> Tensor:
    """Bring a target into one shape: class indices (N,) of dtype int64; one class gives N = 1.

    Raises:
        TargetError: if `target` holds anything but integers, or a negative one.
    """
    try:
        targets = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TargetError(f"target is {target!r}, but it must be a class index or one per row.") from error
    inexact = targets.is_floating_point() or targets.is_complex()
    if inexact or targets.dtype == torch.bool or targets.dim() > 1 or targets.numel() == 0:
        raise TargetError(
            f"target is {targets.dtype} of shape {tuple(targets.shape)}, but it must be an integer class index "
            "or one per row, shape (B,)."
        )
    if int(targets.min()) < 0:
        raise TargetError(f"target holds {int(targets.min())}, but class indices start at 0; give one from there on.")
    return targets.reshape(-1).long()


def check_target_range(highest: int, classes: int) -> None:
    """Raise `TargetError` if the highest target is no class of a model with this many classes."""
    if highest >= classes:
        raise TargetError(
            f"target {highest} is out of range: the model has {classes} classes, 0 to {classes - 1}; choose one of "
            "these."
        )


def check_target_count(targets: Tensor, rows: int, what: str) -> None:
    """Raise `TargetError` unless there is one target for all rows of a batch or pass, or one per row."""
    if targets.numel() not in (1, rows):
        raise TargetError(
            f"target names {targets.numel()} classes, but the {what} has {rows} rows; give one class per row, or one "
            "for all."
        )
