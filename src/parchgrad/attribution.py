"""Explainer: an attribution method with or without ParchGrad, on batches of any size; and heat maps."""

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, TypeAlias

import captum.attr
import torch
from torch import Tensor, nn

from parchgrad.engine import ParchGrad, Target, check_evaluation_mode, check_target_range, integer_targets
from parchgrad.errors import InputError, ModelError, SettingError, TargetError
from parchgrad.layers import LayerChoice, find_convolutions
from parchgrad.partition import Conserve
from parchgrad.selection import Selector

__all__ = ["METHODS", "Explainer", "heatmap"]

# (logits of a batch, inputs, targets, which rows of the whole batch these are, rows per pass or None) -> attribution
Method: TypeAlias = Callable[[nn.Module, Tensor, Tensor, slice, int | None], Tensor]

_CAPTUM_NAMES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gradient": ("Saliency", {"abs": False}),
    "input_x_gradient": ("InputXGradient", {}),
    "integrated_gradients": ("IntegratedGradients", {"n_steps": 25}),
}
METHODS: tuple[str, ...] = (*_CAPTUM_NAMES, "smoothgrad")
"""The methods with a name of their own; any Captum gradient attribution goes by its class name."""

# Their baselines are samples of a distribution, not one per row.
_SAMPLES_BASELINES = {"GradientShap", "DeepLiftShap"}
# Given by the explainer itself, or of no use where the result is one tensor.
_RESERVED = {"self", "forward_func", "model", "inputs", "target", "internal_batch_size"}
_RESERVED |= {"additional_forward_args", "return_convergence_delta"}


class Explainer:
    """An attribution method, with the gradient partitioned by a selector or plain.

    Example:
        >>> import parchgrad as pg
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).eval()
        >>> explainer = Explainer(model, pg.GradientEnergy(quantile=0.25), layers="all")
        >>> attribution = explainer.attribute(torch.rand(2, 3, 8, 8), target=torch.tensor([0, 3]))
        >>> attribution.shape, heatmap(attribution).shape
        (torch.Size([2, 3, 8, 8]), torch.Size([2, 8, 8]))
    """

    def __init__(
        self,
        model: nn.Module,
        selector: Selector | None,
        *,
        layers: LayerChoice = "default",
        gamma: float = math.inf,
        conserve: Conserve = "independent",
        method: str = "gradient",
        internal_batch_size: int | None = 32,
        **method_options: Any,
    ) -> None:
        """Check every setting against the model and the method.

        Args:
            model: a classifier whose output are the logits, shape (B, K), in evaluation mode.
            selector: which channels matter; None is the plain method, and `layers`, `gamma` and `conserve` are unused.
            layers: which convolutions are edited; see `choose_layers`.
            gamma: how many times stronger than the rest the kept signal becomes, in (0, inf]; infinity prunes.
            conserve: how the layer's variance is kept: `"independent"`, `"exact"` or `"none"`.
            method: `"gradient"`, `"input_x_gradient"`, `"integrated_gradients"`, `"smoothgrad"`, or the class name of
                any Captum gradient attribution that explains the input, such as `"DeepLift"`.
            internal_batch_size: rows in one pass, at least 1; bounds memory for large batches and for methods that
                expand a row into many. None passes everything at once.
            **method_options: options of the method. `integrated_gradients`: Captum's, among them `n_steps=25` and
                `baselines=0`. `smoothgrad`: `samples=25`, `sigma=0.15` (share of each input's range) and `seed=0`.
                Captum methods: the arguments of the class and of its `attribute`.

        Raises:
            SettingError: if a setting is out of range, or the method or an option of it does not exist.
            LayerError: if the layers are not in the model.
            ModelError: if the model holds no convolution.
            StatisticsError: if the selector's statistics do not fit the layers.
        """
        if internal_batch_size is not None and internal_batch_size < 1:
            raise SettingError(f"internal_batch_size is {internal_batch_size}, but a pass needs at least one row.")
        self._model = model
        self._internal_batch_size = internal_batch_size
        self._method = _find_method(method, method_options)
        self._partition = (
            None if selector is None else ParchGrad(model, selector, layers=layers, gamma=gamma, conserve=conserve)
        )

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the edited convolutions, in module order; empty for the plain method."""
        return () if self._partition is None else self._partition.layers

    def attribute(self, inputs: Tensor, target: Target | None = None) -> Tensor:
        """Attribute the score of a class to the inputs. A batch gives the maps that its rows give one by one.

        Args:
            inputs: preprocessed batch, shape (B, C, *S), floating point, finite.
            target: class index for all rows, one per row of shape (B,), or None for the predicted class.

        Returns:
            Signed attribution of the shape, dtype and device of `inputs`, detached.

        Raises:
            InputError: if the inputs are no finite floating-point batch, or do not fit the model.
            TargetError: if a target is no class of the model, or there is not one per row.
            ModelError: if the model is in training mode, or its output are no logits of shape (B, K).
        """
        check_evaluation_mode(self._model)
        _check_inputs(inputs)
        with torch.inference_mode(False), torch.enable_grad():
            batch = inputs.detach().clone()
            targets = self.predict(batch) if target is None else _targets_per_row(target, batch)
            logits = _Logits(self._model, targets)
            size = self._internal_batch_size or inputs.shape[0]
            parts = []
            with self._partition or nullcontext():
                for start in range(0, inputs.shape[0], size):
                    rows = slice(start, start + size)
                    part = batch[rows].requires_grad_()
                    parts.append(self._method(logits, part, targets[rows], rows, self._internal_batch_size))
        return torch.cat(parts).detach()

    def predict(self, inputs: Tensor) -> Tensor:
        """Predict the class of each row, shape (B,).

        Raises:
            InputError: if the inputs are no finite floating-point batch, or do not fit the model.
            ModelError: if the model's output are no logits of shape (B, K).
        """
        _check_inputs(inputs)
        logits = _Logits(self._model, None)
        size = self._internal_batch_size or inputs.shape[0]
        with torch.no_grad():
            return torch.cat([logits(part).argmax(dim=1) for part in torch.split(inputs, size)])


def heatmap(attribution: Tensor) -> Tensor:
    """Average the magnitude of an attribution over colour channels.

    Args:
        attribution: shape (B, C, *S).

    Returns:
        Non-negative map, shape (B, *S).

    Raises:
        InputError: if there are no spatial dimensions.

    Example:
        >>> heatmap(torch.tensor([[[1.0, 0.0]], [[-2.0, 4.0]]]))
        tensor([[1., 0.],
                [2., 4.]])
    """
    if attribution.dim() < 3:
        raise InputError(f"The attribution has shape {tuple(attribution.shape)}, but a heat map needs (B, C, *S).")
    return attribution.abs().mean(dim=1)


class _Logits(nn.Module):
    """The model as attribution methods see it: what it is given and what it returns is checked in words."""

    def __init__(self, model: nn.Module, targets: Tensor | None) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self._targets = targets

    def forward(self, inputs: Tensor) -> Tensor:
        try:
            logits = self.model(inputs)
        except RuntimeError as error:
            first = next(iter(find_convolutions(self.model).values()))
            if inputs.shape[1] != first.in_channels:
                raise InputError(
                    f"The inputs have {inputs.shape[1]} channels, but the model's first convolution takes "
                    f"{first.in_channels}; convert them first."
                ) from error
            raise
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise ModelError(
                f"The model returns {found}, but logits of shape (B, K) are needed; wrap it so that it returns them."
            )
        if self._targets is not None:
            check_target_range(self._targets, logits.shape[1])
        return logits


def _check_inputs(inputs: Tensor) -> None:
    if inputs.dim() < 3 or inputs.shape[0] == 0:
        raise InputError(f"The inputs have shape {tuple(inputs.shape)}, but a non-empty batch (B, C, *S) is needed.")
    if not inputs.is_floating_point():
        raise InputError(f"The inputs are {inputs.dtype}, but gradients need floating point; preprocess them first.")
    if not torch.isfinite(inputs).all():
        raise InputError("The inputs hold NaN or infinite values; look for a division by zero in the preprocessing.")


def _targets_per_row(target: Target, inputs: Tensor) -> Tensor:
    targets = integer_targets(target).to(inputs.device)
    if targets.numel() not in (1, inputs.shape[0]):
        raise TargetError(
            f"target names {targets.numel()} classes, but the batch has {inputs.shape[0]} rows; "
            "give one class per row, or one for all."
        )
    return targets.expand(inputs.shape[0])


def _find_method(name: str, options: Mapping[str, Any]) -> Method:
    """Build the method from its name and options, all of which must exist."""
    if name == "smoothgrad":
        return _smoothgrad_method(options)
    class_name, defaults = _CAPTUM_NAMES.get(name, (name, {}))
    attribution_class = _captum_classes().get(class_name)
    if attribution_class is None:
        known = [*METHODS, *_captum_classes()]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        raise SettingError(
            f"method {name!r} does not exist; {'near names' if near else 'known'}: {', '.join(near or known)}."
        )
    return _captum_method(name, attribution_class, {**defaults, **options})


def _captum_classes() -> dict[str, type]:
    """Captum's gradient attributions of the input, by class name."""
    base = captum.attr.GradientAttribution
    others = (captum.attr.LayerAttribution, captum.attr.NeuronAttribution)
    return {
        name: found
        for name, found in vars(captum.attr).items()
        if inspect.isclass(found) and issubclass(found, base) and found is not base and not issubclass(found, others)
    }


def _captum_method(name: str, attribution_class: Any, options: Mapping[str, Any]) -> Method:
    """A Captum class as a method; options go to its constructor or its `attribute`, whichever names them."""
    constructor = inspect.signature(attribution_class.__init__).parameters
    call = inspect.signature(attribution_class.attribute).parameters
    _check_options(name, options, ({*constructor, *call} - _RESERVED))
    required = [
        option
        for option, parameter in (constructor | call).items()
        if parameter.default is inspect.Parameter.empty and option not in _RESERVED and option not in options
    ]
    if required:
        raise SettingError(f"method {name!r} needs the option {required[0]!r}; give it as {required[0]}=...")
    constructor_options = {option: value for option, value in options.items() if option in constructor}
    call_options = {option: value for option, value in options.items() if option not in constructor}

    def method(logits: nn.Module, inputs: Tensor, targets: Tensor, rows: slice, rows_per_pass: int | None) -> Tensor:
        bound: dict[str, Any] = {"internal_batch_size": rows_per_pass} if "internal_batch_size" in call else {}
        baselines = call_options.get("baselines")
        if name not in _SAMPLES_BASELINES and isinstance(baselines, Tensor) and baselines.shape[0] > 1:
            bound["baselines"] = baselines[rows]
        attribution: Tensor = attribution_class(logits, **constructor_options).attribute(
            inputs, target=targets, **{**call_options, **bound}
        )
        return attribution

    return method


def _smoothgrad_method(options: Mapping[str, Any]) -> Method:
    """SmoothGrad (Smilkov et al. 2017): Captum's gradient averaged over noisy copies of each row.

    Not Captum's NoiseTunnel: it draws from the global generator and knows one sigma for all rows, so that neither a
    seed nor a batch would give the same maps.
    """
    settings = {"samples": 25, "sigma": 0.15, "seed": 0}
    _check_options("smoothgrad", options, set(settings))
    settings |= options
    samples, sigma, seed = int(settings["samples"]), float(settings["sigma"]), int(settings["seed"])
    if samples < 1 or not 0 <= sigma < math.inf:
        raise SettingError(f"smoothgrad has samples={samples} and sigma={sigma}; it needs samples >= 1 and sigma >= 0.")

    def method(logits: nn.Module, inputs: Tensor, targets: Tensor, rows: slice, rows_per_pass: int | None) -> Tensor:
        saliency = captum.attr.Saliency(logits)
        batch = inputs.shape[0]
        clean = inputs.detach()
        # The same noise for every row, drawn on the CPU: a row's map depends on neither its batch nor the device.
        noise = torch.randn(samples, *clean.shape[1:], generator=torch.Generator().manual_seed(seed)).to(clean)
        spread = sigma * (clean.flatten(1).amax(dim=1) - clean.flatten(1).amin(dim=1))
        spread = spread.reshape(batch, *[1] * clean.dim())
        copies = samples if rows_per_pass is None else max(1, rows_per_pass // batch)
        total = torch.zeros_like(clean)
        for part in torch.split(noise, copies):
            noisy = (clean.unsqueeze(1) + spread * part).flatten(0, 1).requires_grad_()
            maps = saliency.attribute(noisy, target=targets.repeat_interleave(len(part)), abs=False)
            total += maps.unflatten(0, (batch, len(part))).sum(dim=1)
        return total / samples

    return method


def _check_options(method: str, options: Mapping[str, Any], known: set[str]) -> None:
    for option in options:
        if option not in known:
            raise SettingError(
                f"method {method!r} has no option {option!r}; it has: {', '.join(sorted(known)) or 'none'}."
            )
