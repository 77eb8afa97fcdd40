"""Where a pass stops being finite: a second, watched pass names the layer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from parchgrad.errors import NonFiniteError

__all__ = ["check_weights", "find_non_finite"]


def check_weights(model: nn.Module) -> None:
    """Raise `NonFiniteError` naming the first parameter or running statistic that holds NaN or infinite values.

    They need not reach the scores: an infinite variance silences its channel, and the map looks sound.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> model.running_var[1] = torch.inf
        >>> check_weights(model)
        Traceback (most recent call last):
            ...
        parchgrad.errors.NonFiniteError: The running_var of the model holds NaN or infinite values; load sound weights.
    """
    buffers = model.named_buffers()
    running = [(name, values) for name, values in buffers if name.endswith(("running_mean", "running_var"))]
    for name, values in [*model.named_parameters(), *running]:
        if not nn.parameter.is_lazy(values) and not _is_finite(values):
            layer, _, what = name.rpartition(".")
            place = f"layer {layer!r}" if layer else "the model"
            raise NonFiniteError(f"The {what} of {place} holds NaN or infinite values; load sound weights.")


def find_non_finite(model: nn.Module, score: Callable[[Tensor], Tensor], inputs: Tensor) -> tuple[str, str] | None:
    """Run the model forward and back once more, and find where values first are NaN or infinite.

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
        try:
            found = score(inputs)
            if watch.forward is None and found.requires_grad:
                torch.autograd.grad(found, inputs, allow_unused=True)
        finally:
            watch.close()
    return watch.verdict()


class _Watch:
    """Hooks on every module without children, and on the tensors that go in and come out."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules() if not list(module.children())}
        self.forward: tuple[str, str] | None = None
        # Of gradients that are not finite: the layer, and on which side of it, in the order of the backward pass.
        self._broken: dict[tuple[nn.Module, str], None] = {}
        self._handles: list[RemovableHandle] = []
        for module in self._names:
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(self._leave))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def verdict(self) -> tuple[str, str] | None:
        if self.forward is not None or not self._broken:
            return self.forward
        inside = next((m for m, side in self._broken if side == "input" and (m, "output") not in self._broken), None)
        help_ = "explain in a wider type, such as float64, or by another method"
        if inside is not None:
            return f"in the gradient, on its way back through layer {self._say(inside)}", help_
        behind = next(iter(self._broken))[0]
        return f"in the gradient, behind layer {self._say(behind)} in an operation that is no module", help_

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        for values in _tensors(inputs):
            if self.forward is None and not _is_finite(values):
                self.forward = (
                    f"before layer {self._say(module)}, in an operation that is no module",
                    "look there for a division by zero, a logarithm, or values beyond the type's range",
                )
            self._listen(values, module, "input")

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for values in _tensors(output):
            if self.forward is None and not _is_finite(values):
                self.forward = (
                    f"in the output of layer {self._say(module)}, whose input is finite",
                    "run it in a wider type than now, such as float32, or look at its weights and the range of its "
                    "input",
                )
            self._listen(values, module, "output")

    def _listen(self, values: Tensor, module: nn.Module, side: str) -> None:
        if values.requires_grad:
            # torch leaves the method untyped; what the hook holds must not hold the tensor.
            values.register_hook(partial(self._note, module, side))  # type: ignore[no-untyped-call]

    def _note(self, module: nn.Module, side: str, gradient: Tensor) -> None:
        if not _is_finite(gradient):
            self._broken[module, side] = None

    def _say(self, module: nn.Module) -> str:
        return f"{self._names[module]!r} ({type(module).__name__})"


def _is_finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())


def _tensors(values: Any) -> list[Tensor]:
    """The floating-point tensors in what a module takes or returns."""
    found, _ = torch.utils._pytree.tree_flatten(values)
    return [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point()]
