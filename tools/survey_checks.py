"""Properties that the maps of any network must have, and a second, slower implementation of the method."""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import parchgrad as pg
from parchgrad.core.layers import LayerChoice

SIZES = (64, 96, 128)
QUANTILE = 0.1


class FaultError(Exception):
    """A map lacks a property that it must have."""


def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Add noise to every parameter that starts as a constant.

    Many networks initialise branches, scales or classifiers with zeros, so that their gradient is zero before training.
    A zero map would say nothing about the edit.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and parameter.min() == parameter.max():
                spread = 0.1 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
                parameter += spread * torch.randn(parameter.shape, generator=generator)
    return model


def workable_inputs(model: nn.Module) -> Tensor:
    """Make two noise images of the smallest size that the network accepts, or else of its default size."""
    demanded = (getattr(model, "default_cfg", None) or {}).get("input_size", (3, 224, 224))[-1]
    sizes = [*SIZES, demanded]
    for size in sizes:
        inputs = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
        try:
            with torch.no_grad():
                model(inputs)
        except (RuntimeError, AssertionError, ValueError, IndexError):
            # Too small for the network, or not its fixed size.
            if size == sizes[-1]:
                raise
        else:
            return inputs
    raise AssertionError("sizes is never empty")


class Reference:
    """A second implementation of the partitioned gradient: the equations in a hook on each convolution's output.

    Attributes:
        tied: names of convolutions whose last kept and first pruned channels differ by no more than rounding.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        """Store a network in float64 and the convolutions to edit."""
        self._model = model
        self._convolutions = layers
        self.tied: set[str] = set()

    def map(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Explain float64 inputs (B, 3, H, W) for targets (B,)."""
        handles = [
            module.register_forward_hook(functools.partial(self._attach, name))
            for name, module in self._convolutions.items()
        ]
        try:
            return seeded_gradient(self._model, inputs, targets)
        finally:
            for handle in handles:
                handle.remove()

    def _attach(self, name: str, module: nn.Module, arguments: object, output: Tensor) -> Tensor:
        # Linear layers have their channels last.
        axis = -1 if isinstance(module, nn.Linear) else 1
        edited: Tensor = _Edited.apply(
            output, lambda gradient: self._edit(name, gradient.movedim(axis, 1)).movedim(1, axis)
        )
        return edited

    def _edit(self, name: str, gradient: Tensor) -> Tensor:
        flat = gradient.flatten(2)
        energy = (flat / flat.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-300)).square().sum(dim=2)
        kept_count = max(1, int(QUANTILE * energy.shape[1]))
        last = energy.topk(kept_count, dim=1).values[:, -1:]
        mask = energy >= last
        near = (energy - last).abs() <= 1e-9 * last
        if (near.sum(dim=1) > 1).logical_and(last.squeeze(1) > 0).any():
            self.tied.add(name)
        kept, rest = ((flat * chosen.unsqueeze(2)).sum(dim=1) for chosen in (mask, ~mask))
        # A constant kept sum varies only by rounding.
        rounding = 1e-14 * flat.abs().sum(dim=1).amax(dim=1)
        if flat.shape[2] == 1:
            m, n = kept.abs()[:, 0], rest.abs()[:, 0]
            beta, usable = ((m + n) / m).sqrt(), m > rounding
        else:
            # Standard deviations, since variances of small numbers would underflow.
            m, n = kept.std(dim=1), rest.std(dim=1)
            beta, usable = torch.hypot(m, n) / m, m > rounding
        one_sided = mask.all(dim=1) | ~mask.any(dim=1)
        scale = torch.where(usable, beta, 1.0).unsqueeze(1) * mask
        scale = torch.where(one_sided.unsqueeze(1), 1.0, scale)
        return gradient * scale.reshape(*scale.shape, *[1] * (gradient.dim() - 2))


class _Edited(torch.autograd.Function):
    """An output with an edited gradient; a hook on it would miss what overwrites it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.edit = edit
        return output.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.edit(gradient), None


def seeded_gradient(model: nn.Module, inputs: Tensor, targets: Tensor, factor: float = 1.0) -> Tensor:
    """Compute the gradient of the target logits, times a factor, with plain autograd."""
    leaf = inputs.clone().requires_grad_()
    logits = model(leaf)
    seed = torch.zeros_like(logits).scatter_(1, targets.unsqueeze(1), factor)
    return torch.autograd.grad(logits, leaf, seed)[0]


def hook_count(model: nn.Module) -> int:
    """Count the hooks of all kinds on all modules."""
    kinds = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def is_unchanged(model: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Whether parameters and buffers equal those of a state dict, bit by bit."""
    return all(torch.equal(values, weights[name]) for name, values in model.state_dict().items())


def difference(found: Tensor, expected: Tensor) -> float:
    """Compute the largest difference, relative to the peak of each row's expected map."""
    peaks = expected.abs().flatten(1).amax(dim=1)
    return float(((found - expected).abs().flatten(1).amax(dim=1) / peaks).max())


def check_maps(model: nn.Module, inputs: Tensor, layers: LayerChoice) -> list[str]:
    """Check the maps of a network by the published method.

    Args:
        model: a float32 model in evaluation mode; not modified.
        inputs: two different images, shape (2, 3, H, W).
        layers: convolutions to edit.

    Returns:
        Notes on the network.

    Raises:
        FaultError: if a check fails.
    """
    targets = torch.tensor([1, 3])
    # The reference implements the published method.
    selector = pg.GradientEnergy(quantile=QUANTILE, softness=0)
    hooks, weights = hook_count(model), copy.deepcopy(model.state_dict())
    notes = []

    def explain(network: nn.Module, x: Tensor, y: Tensor, chosen: pg.Selector = selector) -> Tensor:
        return pg.Explainer(network, chosen, layers=layers, conserve="independent").attribute(x, y)

    single_precision = explain(model, inputs, targets)
    if not torch.isfinite(single_precision).all():
        raise FaultError("the map is not finite")
    plain = seeded_gradient(model, inputs, targets)
    if not (plain.flatten(1).abs().amax(dim=1) > 0).all():
        raise FaultError("the plain gradient is zero")
    everything = pg.GradientEnergy(quantile=1.0, softness=0)
    _agree(explain(model, inputs, targets, everything), plain, 1e-4, "with all channels kept")
    # Double precision, so that rounding does not change which channels are kept.
    wide, pictures = copy.deepcopy(model).double(), inputs.double()
    chosen = pg.choose_layers(wide, layers, inputs=pictures, balance=False)
    untied = without_ties(wide, pictures, targets, chosen)
    if untied != chosen:
        notes.append(f"{len(chosen) - len(untied)} ties")
        layers = list(untied)
    reference = Reference(wide, untied)
    found = explain(wide, pictures, targets)
    if not (found.flatten(1).abs().amax(dim=1) > 0).all():
        raise FaultError("the map is zero")
    _agree(found, reference.map(pictures, targets), 1e-6, "against the reference")
    plain = seeded_gradient(wide, pictures, targets)
    if not difference(found, plain) > 1e-3:
        raise FaultError("the map is the plain one")
    halves = [(pictures[row : row + 1], targets[row : row + 1]) for row in (0, 1)]
    rows = torch.cat([explain(wide, *half) for half in halves])
    _agree(rows, torch.cat([reference.map(*half) for half in halves]), 1e-6, "picture by picture")
    if difference(torch.cat([seeded_gradient(wide, *half) for half in halves]), plain) < 1e-6:
        _agree(rows, found, 1e-6, "a batch against its pictures")
    else:
        notes.append("single differs")
    with pg.ParchGrad(wide, selector, layers=layers, conserve="independent"):
        scaled = seeded_gradient(wide, pictures, targets, factor=2.0**-40)
    _agree(scaled * 2.0**40, found, 1e-6, "with a smaller seed")
    if hook_count(model) != hooks or hook_count(wide) != hooks:
        raise FaultError("hooks are left on the model")
    if not is_unchanged(model, weights):
        raise FaultError("the weights are not as they were")
    return notes


def check_default(model: nn.Module, inputs: Tensor) -> tuple[str, ...]:
    """Check the maps of `pg.Explainer(model)`, including soft gates, smooth strides and balance.

    Args:
        model: a model in evaluation mode; not modified.
        inputs: two different images, shape (2, 3, H, W).

    Returns:
        Names of the edited layers.

    Raises:
        FaultError: if a check fails.
    """
    wide, pictures, targets = copy.deepcopy(model).double(), inputs.double(), torch.tensor([1, 3])
    explainer = pg.Explainer(wide)
    found = explainer.attribute(pictures, targets)
    if not torch.isfinite(found).all():
        raise FaultError("the map is not finite")
    if not (found.flatten(1).abs().amax(dim=1) > 0).all():
        raise FaultError("the map is zero")
    plain = seeded_gradient(wide, pictures, targets)
    if not difference(found, plain) > 1e-3:
        raise FaultError("the map is the plain one")
    with pg.ParchGrad(model):
        logits = model(inputs.clone().requires_grad_())
    if not torch.equal(logits, model(inputs.clone().requires_grad_())):
        raise FaultError("the block changes the network's outputs")
    halves = [(pictures[row : row + 1], targets[row : row + 1]) for row in (0, 1)]
    if difference(torch.cat([seeded_gradient(wide, *half) for half in halves]), plain) < 1e-6:
        rows = torch.cat([pg.Explainer(wide).attribute(*half) for half in halves])
        _agree(rows, found, 1e-6, "a batch against its pictures")
    return explainer.edited_layers


def _agree(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    off = difference(found, expected)
    # Written this way so that NaN fails too.
    if not off < tolerance:
        raise FaultError(f"{what}, the maps are {off:.1e} off")


def without_ties(
    model: nn.Module, inputs: Tensor, targets: Tensor, layers: Mapping[str, nn.Module]
) -> Mapping[str, nn.Module]:
    """Leave out convolutions where rounding decides which of two channels is kept.

    An attention that weights two branches by a softmax sends them opposite gradients of equal energy.
    """
    while True:
        reference = Reference(model, layers)
        reference.map(inputs, targets)
        for row in range(len(inputs)):
            reference.map(inputs[row : row + 1], targets[row : row + 1])
        if not reference.tied:
            return layers
        layers = {name: module for name, module in layers.items() if name not in reference.tied}
