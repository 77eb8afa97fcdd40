"""ParchGrad as a context manager: while it is open, gradients through the chosen convolutions are partitioned.

Hooks sit on modules, which every thread shares. What a pass needs is therefore found through context variables: a
hook that fires for another thread, or for a context that is not the innermost one on its model, does nothing.
"""

import functools
import math
from collections.abc import Sequence
from contextvars import ContextVar
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from parchgrad.errors import InputError, ModelError, ParchGradError, SettingError, TargetError
from parchgrad.layers import Convolution, LayerChoice, choose_layers
from parchgrad.partition import Conserve, check_edit_settings, partition_gradient
from parchgrad.selection import LayerSignal, Selector

__all__ = ["ParchGrad", "Target", "check_evaluation_mode", "check_target_range", "integer_targets", "read_classes"]

Target = int | Sequence[int] | Tensor


class ParchGrad:
    """Partitions the gradient of a model inside a `with` block; any gradient method may run in it.

    Inside the block every forward pass of the model that records gradients is edited on its way back: at each chosen
    convolution the selector picks the channels that matter, the others are pruned (or damped), those kept are
    re-scaled. The class of each row is read off the backward signal at the model's output, so batches that a method
    expands on its own (steps, noise samples) get the right class per row.

    The model is not changed, and on leaving the block no hook is left. One object may be entered several times and
    from several threads; blocks of other threads are not affected. Of blocks nested on one model only the innermost
    acts.

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
        selector: Selector,
        *,
        layers: LayerChoice = "default",
        gamma: float = math.inf,
        conserve: Conserve = "independent",
        target: Target | None = None,
    ) -> None:
        """Choose the layers and check every setting; no hook is set before the block is entered.

        Args:
            model: the module whose output are the logits, shape (B, K).
            selector: which channels matter.
            layers: which convolutions are edited; see `choose_layers`.
            gamma: how many times stronger than the rest the kept signal becomes, in (0, inf]; infinity prunes.
            conserve: how the layer's variance is kept: `"independent"`, `"exact"` or `"none"`.
            target: class per row, or one for all, in place of the class read off the backward signal.

        Raises:
            SettingError: if a setting is out of range.
            LayerError: if the layers are not in the model.
            ModelError: if the model holds no convolution, or is wrapped in DataParallel.
            StatisticsError: if the selector's statistics do not fit the layers.
            TargetError: if `target` is no class.
        """
        if isinstance(model, nn.DataParallel):
            raise ModelError(
                "DataParallel copies the model in every pass, out of reach of the edit; explain model.module, "
                "one process per device."
            )
        if not isinstance(selector, Selector):
            raise SettingError(f"selector is {selector!r}, but it must be a Selector such as GradientEnergy().")
        check_edit_settings(gamma, conserve)
        self._model = model
        self._selector = selector
        self._gamma = gamma
        self._conserve: Conserve = conserve
        self._targets = None if target is None else integer_targets(target)
        self._convolutions = choose_layers(model, layers)
        selector.check({name: module.out_channels for name, module in self._convolutions.items()})

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the chosen convolutions, in module order."""
        return tuple(self._convolutions)

    def __enter__(self) -> "ParchGrad":
        """Set the hooks.

        Raises:
            ModelError: if the model or a part of it is in training mode.
        """
        check_evaluation_mode(self._model)
        session = _Session(self)
        _SESSIONS.set((*_SESSIONS.get(), session))
        session.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the hooks, whatever happened in the block."""
        session = next((session for session in reversed(_SESSIONS.get()) if session.owner is self), None)
        if session is None:
            raise ParchGradError("This ParchGrad block is left in another thread or task than it was entered in.")
        session.close()
        _SESSIONS.set(tuple(other for other in _SESSIONS.get() if other is not session))
        _FORWARDS.set(tuple(forward for forward in _FORWARDS.get() if forward.session is not session))


class _Session:
    """One entered block: its hooks."""

    def __init__(self, owner: ParchGrad) -> None:
        self.owner = owner
        self._handles: list[RemovableHandle] = []

    def open(self) -> None:
        model, handles = self.owner._model, self._handles
        handles.append(model.register_forward_pre_hook(self._begin))
        for name, convolution in self.owner._convolutions.items():
            handles.append(convolution.register_forward_hook(functools.partial(self._attach, name)))
        # Called after an exception too, so that a failed pass leaves no state behind.
        handles.append(model.register_forward_hook(self._end, always_call=True))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _is_innermost(self) -> bool:
        model = self.owner._model
        return next((s for s in reversed(_SESSIONS.get()) if s.owner._model is model), None) is self

    def _forward(self) -> "_Forward | None":
        return next((forward for forward in reversed(_FORWARDS.get()) if forward.session is self), None)

    def _begin(self, model: nn.Module, inputs: tuple[object, ...]) -> None:
        if self._is_innermost():
            _FORWARDS.set((*_FORWARDS.get(), _Forward(self)))

    def _attach(self, layer: str, convolution: Convolution, inputs: tuple[object, ...], output: Tensor) -> None:
        if not self._is_innermost() or not torch.is_grad_enabled() or output.grad_fn is None:
            return
        if output.dim() != len(convolution.kernel_size) + 2:
            raise InputError(
                f"Layer {layer!r} was given an input without a batch dimension; give a batch: inputs.unsqueeze(0)."
            )
        # A part of the model called on its own has no forward pass of the model around it.
        forward = self._forward() or _Forward(self)
        forward.expect_rows(output.shape[0])
        with torch.no_grad():
            observation = self.owner._selector.observe(output.detach())
        # On the node rather than the tensor: it runs after the hook that reads the classes, even where a convolution
        # is the model's last operation, and in-place operations that follow do not move it.
        output.grad_fn.register_prehook(functools.partial(forward.edit, layer, observation))

    def _end(self, model: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        forward = self._forward()
        if forward is None or not self._is_innermost():
            return
        remaining = list(_FORWARDS.get())
        remaining.remove(forward)
        _FORWARDS.set(tuple(remaining))
        # After an exception the output is None.
        if output is not None and self.owner._selector.needs_class:
            forward.watch(output)


class _Forward:
    """One forward pass: the class of each of its rows, known once its backward pass reaches the logits."""

    def __init__(self, session: _Session) -> None:
        self.session = session
        self._classes: Tensor | None = None

    def expect_rows(self, rows: int) -> None:
        targets = self.session.owner._targets
        if targets is not None and targets.numel() not in (1, rows):
            raise TargetError(
                f"target names {targets.numel()} classes, but the pass has {rows} rows; give one class per row or one "
                "for all, or leave target out: the class is then read off the backward signal."
            )

    def watch(self, output: object) -> None:
        """Read the classes off the gradient at the logits, or take those that were given."""
        targets = self.session.owner._targets
        if isinstance(output, Tensor):
            classes = output.shape[1] if output.dim() > 1 else 1
            self.session.owner._selector.check_classes(classes)
            if targets is not None:
                check_target_range(targets, classes)
            elif output.requires_grad:
                output.register_hook(self._read)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        elif targets is None:
            raise ModelError(
                f"The model returns a {type(output).__name__}, off which no class can be read; wrap it so that it "
                "returns the logits, or give target."
            )

    def _read(self, gradient: Tensor) -> None:
        self._classes = read_classes(gradient)

    def edit(
        self, layer: str, observation: Tensor | None, gradients: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None]:
        (gradient,) = gradients
        if gradient is None:
            return (None,)
        owner = self.session.owner
        classes = self._classes_of(gradient, layer) if owner._selector.needs_class else None
        channel_mask = owner._selector.select(
            LayerSignal(layer=layer, gradient=gradient, observation=observation, classes=classes)
        )
        return (partition_gradient(gradient, channel_mask, gamma=owner._gamma, conserve=owner._conserve),)

    def _classes_of(self, gradient: Tensor, layer: str) -> Tensor:
        rows = gradient.shape[0]
        targets = self.session.owner._targets
        classes = self._classes if targets is None else targets.to(gradient.device)
        if classes is None:
            raise TargetError(
                f"No class is known at layer {layer!r}, since the backward pass did not start from the model's output; "
                "give target, or call the model itself."
            )
        if classes.numel() not in (1, rows):
            raise TargetError(
                f"Layer {layer!r} has {rows} rows, but the model's output has {classes.numel()}; "
                "give one target for all rows."
            )
        return classes.expand(rows)


_SESSIONS: ContextVar[tuple[_Session, ...]] = ContextVar("parchgrad_sessions", default=())
_FORWARDS: ContextVar[tuple[_Forward, ...]] = ContextVar("parchgrad_forwards", default=())


def read_classes(gradient: Tensor) -> Tensor:
    """Read which class each row explains off the gradient at the logits.

    It is the largest positive entry of the row; where no entry is positive, the one of largest magnitude.

    Args:
        gradient: gradient at the logits, shape (B, K); further dimensions are summed, (B,) counts as one class.

    Returns:
        Class indices, shape (B,).

    Example:
        >>> read_classes(torch.tensor([[0.0, 1.0, -3.0], [0.0, -2.0, -1.0]]))
        tensor([1, 1])
    """
    if gradient.dim() == 1:
        gradient = gradient.unsqueeze(1)
    seeds = gradient.flatten(2).sum(2) if gradient.dim() > 2 else gradient
    largest, classes = seeds.max(dim=1)
    return torch.where(largest > 0, classes, seeds.abs().argmax(dim=1))


def check_evaluation_mode(model: nn.Module) -> None:
    """Raise `ModelError` if the model or a part of it is in training mode."""
    name = next((name for name, module in model.named_modules() if module.training), None)
    if name is not None:
        part = f"{type(model).__name__} (in {name!r})" if name else type(model).__name__
        raise ModelError(f"{part} is in training mode, which makes its output depend on the batch; call model.eval().")


def integer_targets(target: Target) -> Tensor:
    """Bring a target into one shape: class indices (N,) of dtype int64; one class gives N = 1.

    Raises:
        TargetError: if `target` holds anything but integers, or a negative one.
    """
    try:
        targets = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TargetError(f"target is {target!r}, but it must be a class index or one per row.") from error
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.dim() > 1 or targets.numel() == 0:
        raise TargetError(
            f"target is {targets.dtype} of shape {tuple(targets.shape)}, but it must be an integer class index "
            "or one per row, shape (B,)."
        )
    if int(targets.min()) < 0:
        raise TargetError(f"target holds {int(targets.min())}, but class indices start at 0.")
    return targets.reshape(-1).long()


def check_target_range(targets: Tensor, classes: int) -> None:
    """Raise `TargetError` if a target is no class of a model with this many classes."""
    highest = int(targets.max())
    if highest >= classes:
        raise TargetError(f"target {highest} is out of range: the model has {classes} classes, 0 to {classes - 1}.")
