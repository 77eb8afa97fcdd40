"""Where a pass stops being finite: a second, watched pass names the layer."""

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from parchgrad.errors import NonFiniteError
from parchgrad.hooks import TransientHook, current_backward_pass

__all__ = ["broken", "check_small_weights", "find_non_finite", "tensors_in"]


def broken(values: Tensor) -> Tensor:
    """Which values are NaN or plus infinity; minus infinity is how classes and positions are ruled out.

    Example:
        >>> broken(torch.tensor([1.0, torch.nan, torch.inf, -torch.inf]))
        tensor([False,  True,  True, False])
    """
    return values.isnan() | values.isposinf()


def check_small_weights(model: nn.Module) -> None:
    """Raise `NonFiniteError` naming a bias, scale or running statistic that holds NaN or infinite values.

    These may silence a channel without a trace: of an infinite variance the map looks sound. A bias of minus infinity
    is meant to. What is wrong with larger weights shows in the pass, which `find_non_finite` looks at, so that they are
    not all read here.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> model.running_var[1] = torch.inf
        >>> check_small_weights(model)
        Traceback (most recent call last):
            ...
        parchgrad.errors.NonFiniteError: The running_var of the model holds NaN or infinite values; load sound weights.
    """
    named = {
        name: values
        for name, values in [*model.named_parameters(), *model.named_buffers()]
        if name.endswith(("weight", "bias", "running_mean", "running_var"))
        and _is_readable(values)
        and values.dim() < 2
    }
    together: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
    for name, values in named.items():
        key = (values.device, values.dtype, name.endswith("bias"))
        together.setdefault(key, []).append(values.detach().reshape(-1))
    # All at once: on a device every answer has to be waited for.
    if not any(_is_wrong(torch.cat(group), is_bias) for (_, _, is_bias), group in together.items()):
        return
    name = next(name for name, values in named.items() if _is_wrong(values, name.endswith("bias")))
    layer, _, what = name.rpartition(".")
    place = f"layer {layer!r}" if layer else "the model"
    raise NonFiniteError(f"The {what} of {place} holds NaN or infinite values; load sound weights.")


def find_non_finite(model: nn.Module, score: Callable[[Tensor], Tensor], inputs: Tensor) -> tuple[str, str] | None:
    """Run the model forward and back once more, and find where values first are NaN or infinite.

    Passes of other threads or tasks through the same model meanwhile are not looked at.

    Args:
        model: the model that `score` calls; looked at module by module, and left as it was.
        score: from the inputs to one number, through the model.
        inputs: finite, shape (B, C, *S).

    Returns:
        The place and what may help, as parts of a sentence; None if everything is finite.

    Example:
        >>> model = nn.Sequential(nn.Conv1d(1, 2, 1), nn.Flatten(), nn.Linear(6, 1))
        >>> _ = model[0].weight.data.fill_(1), model[2].weight.data.fill_(3e38)
        >>> find_non_finite(model, lambda inputs: model(inputs).sum(), torch.full((1, 1, 3), 99.0))[0]
        "in the output of layer '2' (Linear), whose input is finite"
    """
    with torch.inference_mode(False), torch.enable_grad():
        inputs = inputs.detach().clone().requires_grad_()
        watch = _Watch(model)
        token = _WATCHING.set(watch)
        try:
            found = score(inputs)
            watch.look_at_score(found)
            if watch.forward is None and found.requires_grad:
                # The first hook of the pass.
                found.register_hook(watch.begin_backward)  # type: ignore[no-untyped-call]  # torch leaves it untyped
                torch.autograd.grad(found, inputs, allow_unused=True)
        finally:
            _WATCHING.reset(token)
            watch.close()
    return watch.verdict()


def tensors_in(values: Any) -> list[Tensor]:
    """The floating-point tensors in nested tuples, lists and dicts, such as what a module takes or returns.

    Example:
        >>> tensors_in({"out": torch.zeros(1), "classes": [torch.tensor(1)]})
        [tensor([0.])]
    """
    found, _ = torch.utils._pytree.tree_flatten(values)
    return [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point()]


class _Call(NamedTuple):
    """One call of a module; one that serves twice is called twice."""

    number: int
    module: nn.Module


class _Watch:
    """Hooks on every module, and on the tensors that go in and come out of those without children."""

    def __init__(self, model: nn.Module) -> None:
        # What is scripted takes no hooks.
        modules = [(name, m) for name, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule)]
        self._names = {module: name for name, module in modules}
        self.forward: tuple[str, str] | None = None
        # Where minus infinity first was, that goes in.
        self._ruled_out: str | None = None
        # Of gradients that are not finite: the call, and on which side of it, in the order of the backward pass.
        self._broken: dict[tuple[_Call, str], None] = {}
        self._open: list[_Call] = []
        self._calls = 0
        self._backward_pass: int | None = None
        self._handles: list[RemovableHandle] = []
        for module in self._names:
            self._handles.append(module.register_forward_pre_hook(TransientHook(self._enter), with_kwargs=True))
            self._handles.append(module.register_forward_hook(TransientHook(self._leave), with_kwargs=True))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def verdict(self) -> tuple[str, str] | None:
        if self.forward is not None or not self._broken:
            return self.forward
        sides = self._broken
        inside = next((call for call, side in sides if side == "input" and (call, "output") not in sides), None)
        help_ = "explain in a wider type, such as float64, or by another method"
        if inside is not None:
            return self._broken_weight(inside.module) or (
                f"in the gradient, on its way back through {self._say(inside.module)}",
                help_,
            )
        behind = next(iter(sides))[0]
        return f"in the gradient, behind {self._say(behind.module)} in an operation that is no module", help_

    def look_at_score(self, score: Tensor) -> None:
        self._look(
            [score], "in the score that is made of the output, which is finite", "look at the function that makes it"
        )

    def begin_backward(self, gradient: Tensor) -> None:
        self._backward_pass = current_backward_pass()

    # Another thread may come by between torch's setting a hook and its noting that keywords go with it.
    def _enter(self, module: nn.Module, *given: Any) -> None:
        if _WATCHING.get() is not self:
            return
        self._calls += 1
        call = _Call(self._calls, module)
        self._open.append(call)
        values = tensors_in(given)
        self._look(
            values,
            f"before {self._say(module)}, in an operation that is no module",
            "look there for a division by zero, a logarithm, or values beyond the type's range",
            # Of a weight that is computed, the tensors it is computed from.
            (around.module for around in reversed(self._open)),
        )
        self._listen(values, call, "input")

    def _leave(self, module: nn.Module, *given: Any) -> None:
        if _WATCHING.get() is not self:
            return
        call = self._open.pop()
        while call.module is not module:
            # Of one that ended in an exception, which the model caught.
            call = self._open.pop()
        values = tensors_in(given[-1])
        if _has_children(module):
            place = f"in an operation of {self._say(module)} behind the layers in it"
            remedy = "look there for a division by zero, a logarithm, or values beyond the type's range"
        else:
            place = f"in the output of {self._say(module)}{_OF_FINITE}"
            remedy = "run it in a wider type, such as float32, or look at its weights and the range of its input"
        self._look(values, place, remedy, [module])
        self._listen(values, call, "output")

    def _broken_weight(self, module: nn.Module) -> tuple[str, str] | None:
        for name, own in module.named_parameters(recurse=False):
            # Masks of minus infinity may be parameters, as biases of it.
            if _is_readable(own) and _is_wrong(own, name.endswith("bias") or "mask" in name):
                return f"in the {name} of {self._say(module)}", "load sound weights"
        return None

    def _look(self, values: list[Tensor], place: str, remedy: str, modules: Iterable[nn.Module] = ()) -> None:
        """Take note of the first place where values are broken: a weight of these modules, or else this place."""
        if self.forward is not None:
            return
        if any(bool(broken(each).any()) for each in values):
            if self._ruled_out is not None:
                # It may be a mask, and the fault another; or a logarithm of zero, and the fault itself.
                place = f"{place.removesuffix(_OF_FINITE)}, perhaps by minus infinity that came up {self._ruled_out}"
                remedy = "look at both for a division by zero, a logarithm, or values beyond the type's range"
            self.forward = next(filter(None, map(self._broken_weight, modules)), (place, remedy))
            return
        ruled_out = any(bool(each.isneginf().any()) for each in values)
        if ruled_out and self._ruled_out is None:
            self._ruled_out = next((at for at, _ in filter(None, map(self._broken_weight, modules))), place)
        elif not ruled_out:
            self._ruled_out = None

    def _listen(self, values: list[Tensor], call: _Call, side: str) -> None:
        if _has_children(call.module):
            return
        for each in values:
            if each.requires_grad:
                # torch leaves the method untyped; what the hook holds must not hold the tensor.
                handle = each.register_hook(partial(self._note, call, side))  # type: ignore[no-untyped-call]
                # A weight that is handed to a module outlives the pass.
                self._handles.append(handle)

    def _note(self, call: _Call, side: str, gradient: Tensor) -> None:
        # A weight that is handed to a module may take part in passes of other threads.
        if current_backward_pass() == self._backward_pass and not _is_finite(gradient):
            self._broken[call, side] = None

    def _say(self, module: nn.Module) -> str:
        name = self._names[module]
        return f"layer {name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"


_OF_FINITE = ", whose input is finite"
# Hooks sit on modules that other threads may call meanwhile.
_WATCHING: ContextVar[_Watch | None] = ContextVar("parchgrad_watching", default=None)


def _is_wrong(values: Tensor, may_rule_out: bool) -> bool:
    return bool(broken(values).any()) if may_rule_out else not _is_finite(values)


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _is_finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())


def _is_readable(values: Tensor) -> bool:
    """Whether numbers are there to be read: not yet made, on no device, sparse, and of 8 bits they are not."""
    return (
        not nn.parameter.is_lazy(values)
        and not values.is_meta
        and values.layout == torch.strided
        and values.is_floating_point()
        and values.dtype.itemsize > 1
    )
