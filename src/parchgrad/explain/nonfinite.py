"""Find the layer where a pass stops being finite, by watching a second pass."""

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from parchgrad.core.hooks import TransientHook, tensors_in
from parchgrad.errors import NonFiniteError

__all__ = ["broken", "check_running_statistics", "find_non_finite"]


def broken(values: Tensor) -> Tensor:
    """Mark values that are NaN or plus infinity; minus infinity may rule out classes and positions.

    Example:
        >>> broken(torch.tensor([1.0, torch.nan, torch.inf, -torch.inf]))
        tensor([False,  True,  True, False])
    """
    return values.isnan() | values.isposinf()


def check_running_statistics(model: nn.Module) -> None:
    """Raise `NonFiniteError` if running statistics of a normalisation are not finite, as after a float16 overflow.

    An infinite variance would cut off its channel, and leave every activation finite.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> model.running_var[1] = torch.inf
        >>> check_running_statistics(model)
        Traceback (most recent call last):
        parchgrad.errors.NonFiniteError: The running_var of the model has NaN or infinite values. Load sound weights.
    """
    held = {name: values for name, values in model.named_buffers() if name.endswith(("running_mean", "running_var"))}
    # On a device, one look at all of them waits once.
    if not held or bool(torch.cat([values.detach().float().flatten() for values in held.values()]).isfinite().all()):
        return
    layer, _, name = next(name for name, values in held.items() if not values.isfinite().all()).rpartition(".")
    where = f"layer {layer!r}" if layer else "the model"
    raise NonFiniteError(f"The {name} of {where} has NaN or infinite values. Load sound weights.")


def find_non_finite(model: nn.Module, score: Callable[..., Tensor], *inputs: Tensor) -> str | None:
    """Repeat the forward and backward pass, and find where values first become NaN or infinite.

    Passes of other threads through the same model are not watched.

    Args:
        model: the model that `score` calls; not modified.
        score: maps the inputs to one number, through the model.
        *inputs: finite, each of shape (B, C, *S) or (B, F).

    Returns:
        The place as a phrase; None if everything is finite.

    Example:
        >>> model = nn.Sequential(nn.Conv1d(1, 2, 1), nn.Flatten(), nn.Linear(6, 1))
        >>> _ = model[0].weight.data.fill_(1), model[2].weight.data.fill_(3e38)
        >>> find_non_finite(model, lambda inputs: model(inputs).sum(), torch.full((1, 1, 3), 99.0))
        "in the output of layer '2' (Linear)"
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [each.detach().clone().requires_grad_() for each in inputs]
        watch = _Watch(model)
        gradients: tuple[Tensor | None, ...] = ()
        token = _WATCHING.set(watch)
        try:
            found = score(*leaves)
            watch.look([found], "in the score, which is computed from a finite output")
            if watch.forward is None and found.requires_grad:
                gradients = torch.autograd.grad(found, leaves, allow_unused=True)
        finally:
            _WATCHING.reset(token)
            watch.close()
    place = watch.verdict()
    if place is None and any(each is not None and not bool(each.isfinite().all()) for each in gradients):
        return "in the gradient of an operation on the inputs that is not a module"
    return place


class _Call(NamedTuple):
    """One call of a module, which may be called several times."""

    number: int
    module: nn.Module


class _Watch:
    """Hooks on every module, and on the inputs and outputs of modules without children."""

    def __init__(self, model: nn.Module) -> None:
        # Scripted modules accept no hooks.
        modules = [(name, m) for name, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule)]
        self._names = {module: name for name, module in modules}
        self.forward: str | None = None
        # Calls and their side with a broken gradient, in the order of the backward pass.
        self._broken: dict[tuple[_Call, str], None] = {}
        self._open: list[_Call] = []
        self._calls = 0
        self._handles: list[RemovableHandle] = []
        for module in self._names:
            self._handles.append(module.register_forward_pre_hook(TransientHook(self._enter), with_kwargs=True))
            self._handles.append(module.register_forward_hook(TransientHook(self._leave), with_kwargs=True))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def verdict(self) -> str | None:
        if self.forward is not None or not self._broken:
            return self.forward
        sides = self._broken
        inside = next((call for call, side in sides if side == "input" and (call, "output") not in sides), None)
        if inside is not None:
            return f"in the gradient, on its way back through {self._say(inside.module)}"
        behind = next(iter(sides))[0]
        return f"in the gradient of an operation after {self._say(behind.module)} that is not a module"

    def look(self, values: list[Tensor], place: str, module: nn.Module | None = None) -> None:
        """Record the first place with broken values: a weight of the module, or else this place."""
        if self.forward is None and any(bool(broken(each).any()) for each in values):
            weights = {} if module is None else dict(module.named_parameters(recurse=False))
            name = next((name for name, weight in weights.items() if bool(broken(weight).any())), None)
            self.forward = place if module is None or name is None else f"in the {name} of {self._say(module)}"

    def _enter(self, module: nn.Module, *given: Any) -> None:
        if _WATCHING.get() is not self:
            return
        self._calls += 1
        call = _Call(self._calls, module)
        around = self._open[-1].module if self._open else None
        self._open.append(call)
        values = tensors_in(given)
        self.look(values, f"before {self._say(module)}, in an operation that is not a module", around)
        self._listen(values, call, "input")

    def _leave(self, module: nn.Module, *given: Any) -> None:
        if _WATCHING.get() is not self:
            return
        call = self._open.pop()
        values = tensors_in(given[-1])
        is_leaf = next(module.children(), None) is None
        place = f"in the output of {self._say(module)}"
        if not is_leaf:
            place = f"in an operation of {self._say(module)} after its layers"
        self.look(values, place, module)
        self._listen(values, call, "output")

    def _listen(self, values: list[Tensor], call: _Call, side: str) -> None:
        if next(call.module.children(), None) is not None:
            return
        for each in values:
            if each.requires_grad:
                # torch leaves the method untyped; the hook must not keep the tensor alive.
                handle = each.register_hook(partial(self._note, call, side))  # type: ignore[no-untyped-call]
                # A weight that is passed to a module outlives the pass.
                self._handles.append(handle)

    def _note(self, call: _Call, side: str, gradient: Tensor) -> None:
        if not bool(gradient.isfinite().all()):
            self._broken[call, side] = None

    def _say(self, module: nn.Module) -> str:
        name = self._names[module]
        return f"layer {name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"


# Other threads may call the hooked modules at the same time.
_WATCHING: ContextVar[_Watch | None] = ContextVar("parchgrad_watching", default=None)
