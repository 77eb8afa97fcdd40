"""Explainer: an attribution method with or without ParchGrad, on batches of any size; and heat maps."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeGuard

import captum.attr
import torch
from torch import Tensor, nn

from parchgrad.checks import check_kind, check_whole_number, is_number, is_whole_number
from parchgrad.diagnosis import check_small_weights, find_non_finite
from parchgrad.edit import DEFAULT_SELECTOR, Edit
from parchgrad.engine import (
    ParchGrad,
    Target,
    check_logits,
    check_target_count,
    integer_targets,
    partitioned_before,
)
from parchgrad.errors import InputError, ModelError, NonFiniteError, SettingError, TargetError
from parchgrad.heads import Logits, Output, Score, Scores, check_inputs
from parchgrad.layers import LayerChoice, bare_model, check_evaluation_mode
from parchgrad.partition import Conserve, at_least_float32
from parchgrad.selection import Selector
from parchgrad.stability import cosine, noisy_copies

__all__ = ["METHODS", "Explainer", "heatmap", "replaces_rectifiers", "signed_heatmap"]

_CAPTUM_NAMES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gradient": ("Saliency", {"abs": False}),
    "input_x_gradient": ("InputXGradient", {}),
    "integrated_gradients": ("IntegratedGradients", {"n_steps": 25}),
}
METHODS: tuple[str, ...] = (*_CAPTUM_NAMES, "smoothgrad")
"""The methods with a name of their own; any Captum gradient attribution goes by its class name."""

# Given by the explainer itself, or of no use where the result is one tensor.
_RESERVED = {"self", "forward_func", "model", "inputs", "target", "internal_batch_size"}
_RESERVED |= {"additional_forward_args", "return_convergence_delta"}
# LRP leaves attributes on the model's layers, and what it sends back is no gradient.
_UNSUPPORTED = {"LRP"}
# Their baselines are samples of a distribution, not one per row.
_SAMPLES_BASELINES = {"GradientShap", "DeepLiftShap"}
# They compare every activation's input with its output, and fail where a module serves twice.
_NEEDS_SEPARATE_MODULES = {"DeepLift", "DeepLiftShap"}
_ACTIVATIONS = (nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus)
# Methods that replace the backward pass of these modules, and without any are a plain method under another name.
_ACTS_ON: Mapping[str, tuple[type[nn.Module], ...]] = {
    **dict.fromkeys(("GuidedBackprop", "Deconvolution", "GuidedGradCam"), (nn.ReLU,)),
    **dict.fromkeys(("DeepLift", "DeepLiftShap"), _ACTIVATIONS),
}


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
        selector: Selector | None = DEFAULT_SELECTOR,
        *,
        layers: LayerChoice | None = None,
        gamma: float = math.inf,
        conserve: Conserve | None = None,
        gates: float | None = None,
        antialias: bool | None = None,
        method: str = "gradient",
        logits: Callable[[Any], Tensor] | None = None,
        internal_batch_size: int | None = 32,
        **method_options: Any,
    ) -> None:
        """Check every setting against the model and the method.

        Args:
            model: a classifier that returns logits (B, K), in evaluation mode. A DistributedDataParallel wrapper stands
                for the module inside it.
            selector: how far each channel matters; None is the plain method, and `layers`, `gamma` and `conserve` are
                unused.
            layers: which convolutions are edited; see `choose_layers`. Here and below, None takes what suits the
                selector.
            gamma: how many times stronger than the rest the kept signal becomes, in (0, inf]; infinity prunes.
            conserve: what a layer keeps: `"energy"`, `"independent"`, `"exact"` or `"none"`; see `partition_gradient`.
            gates: width of the soft gates of every rectifier and of the ramps of max pooling, in standard deviations
                of what enters; 0 is the true derivative. Off for the methods that replace the rectifiers' backward
                pass themselves: `DeepLift`, `DeepLiftShap`, `GuidedBackprop`, `GuidedGradCam` and `Deconvolution`.
            antialias: whether the gradient at the input of convolutions and pooling with a stride is smoothed.
            method: `"gradient"`, `"input_x_gradient"`, `"integrated_gradients"`, `"smoothgrad"`, or the class name of
                any Captum gradient attribution that explains the input, such as `"DeepLift"`.
            logits: picks the logits out of an output of any kind, such as `lambda output: output["logits"]`; None takes
                the output itself.
            internal_batch_size: rows in one pass, at least 1; bounds memory for large batches and for methods that
                expand a row into many (`DeepLiftShap` and `GradientShap` pass one image's rows at the least). None
                passes everything at once.
            **method_options: options of the method. `integrated_gradients`: Captum's, among them `n_steps=25` and
                `baselines=0`. `smoothgrad`: `samples=25`, `sigma=0.15` (share of each input's range) and `seed=0`.
                Captum methods: the arguments of the class and of its `attribute`; `GradientShap` draws from the global
                generators of torch and numpy, so that its maps differ from call to call.

        Raises:
            SettingError: if a setting is out of range, or the method or an option of it does not exist.
            LayerError: if the layers are not in the model.
            NonFiniteError: if a bias, scale or running statistic is NaN or infinite; it names its layer.
            ModelError: if the model is wrapped in DataParallel, holds no convolution, or none but those that cut
                patches for a transformer, or nothing that the method acts on.
            StatisticsError: if the selector's statistics do not fit the layers.
        """
        model = bare_model(model)
        if internal_batch_size is not None:
            check_whole_number("internal_batch_size", internal_batch_size, 1)
        check_logits(logits)
        check_small_weights(model)
        self._model = model
        self._pick_logits = logits
        self._internal_batch_size = internal_batch_size
        self._method = _find_method(method, method_options)
        self._method.check(model)
        if self._method.replaces_rectifiers:
            if gates:
                raise SettingError(
                    f"method {self._method.name!r} replaces the backward pass of rectifiers itself, so gates={gates} "
                    "would have no effect. Leave gates out, or choose another method."
                )
            gates = 0.0
        self._partition = ParchGrad(
            model, selector, layers=layers, gamma=gamma, conserve=conserve, gates=gates, antialias=antialias
        )

    @classmethod
    def from_edit(
        cls,
        model: nn.Module,
        edit: Edit,
        *,
        method: str = "gradient",
        logits: Callable[[Any], Tensor] | None = None,
        internal_batch_size: int | None = 32,
        **method_options: Any,
    ) -> "Explainer":
        """Make an explainer whose selector, layers and so on come in one object (see `Explainer`).

        Example:
            >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 5)).eval()
            >>> Explainer.from_edit(model, Edit(selector=None), method="input_x_gradient")
            Explainer(Sequential, input_x_gradient, plain)
        """
        return cls(
            model,
            edit.selector,
            layers=edit.layers,
            gamma=edit.gamma,
            conserve=edit.conserve,
            gates=edit.gates,
            antialias=edit.antialias,
            method=method,
            logits=logits,
            internal_batch_size=internal_batch_size,
            **method_options,
        )

    def __repr__(self) -> str:
        """Name the model, the method, and what is edited where."""
        edit = "plain" if self.edit.is_plain else f"{self.edit.selector!r}, {len(self.layers)} layers"
        return f"{type(self).__name__}({type(self._model).__name__}, {self._method.name}, {edit})"

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the edited convolutions, in module order; empty for the plain method."""
        return self._partition.layers

    @property
    def edit(self) -> Edit:
        """The settings, with what suits the selector in place of every None."""
        return self._partition.edit

    @property
    def method_options(self) -> dict[str, Any]:
        """Options of the method, those left at this package's defaults included."""
        return dict(self._method.options)

    def attribute(self, inputs: Tensor, target: Target | Score | None = None) -> Tensor:
        """Attribute the score of a class to the inputs. A batch gives the maps that its rows give one by one.

        Args:
            inputs: preprocessed batch, shape (B, C, *S), floating point, finite.
            target: class index for all rows, one per row of shape (B,), or None for the predicted class. For an output
                that is not one logit per class: a function of it, or of what `logits` picks, that returns a score for
                each row, such as `RegionScore`. Methods that look at several versions of an image call it with more
                rows than there are images.

        Returns:
            Attribution of the shape, dtype and device of `inputs`, detached; signed, unless the Captum class chosen
            takes magnitudes itself, as `Saliency` does.

        Raises:
            InputError: if the inputs are no finite floating-point batch, or do not fit the model.
            TargetError: if a target is no class of the model, or there is not one per row, or one score per row.
            StatisticsError: if the selector's statistics know nothing of a target.
            ModelError: if the model is in training mode, its output are no logits of shape (B, K), or the chosen layers
                take no part in it.
            NonFiniteError: if scores or maps are NaN or infinite; it names the layer where that began.
        """
        check_evaluation_mode(self._model)
        check_inputs(inputs)
        self._method.check_batch(inputs)
        with torch.inference_mode(False), torch.enable_grad():
            batch = inputs.detach().clone()
            scores: Logits | Scores
            if callable(target):
                targets, scores = None, Scores(Output(self._model, self._pick_logits), target)
            else:
                targets = self.predict(batch) if target is None else _targets_per_row(target, batch)
                scores = Logits(self._model, int(targets.max()), self._pick_logits)
                if self.edit.selector is not None:
                    self.edit.selector.check_targets(sorted(set(targets.tolist())))
            size = self._method.images_per_pass(inputs.shape[0], self._internal_batch_size)
            parts = []
            with partitioned_before(scores.head, self._partition):
                for start in range(0, inputs.shape[0], size):
                    rows = slice(start, start + size)
                    part = batch[rows].requires_grad_()
                    of_part = None if targets is None else targets[rows]
                    with _told_if_independent(of_function=targets is None):
                        parts.append(self._method(scores, part, of_part, rows, self._internal_batch_size))
            found = torch.cat(parts).detach()
            finite = found.flatten(1).isfinite().all(dim=1)
            if not (scores.head.was_finite and bool(finite.all())):
                raise self._non_finite(scores, batch, targets, size, finite)
        return found

    def _non_finite(
        self, scores: Logits | Scores, batch: Tensor, targets: Tensor | None, size: int, finite: Tensor
    ) -> NonFiniteError:
        """Look where values stop being finite, on the first row whose map does."""
        parts = torch.split(batch, size)
        row = int(finite.byte().argmin())
        what = f"The map of row {row} of {len(batch)} holds"
        if bool(finite.all()):
            # Its score says so, or that of another row does.
            with torch.no_grad():
                rows = torch.cat([scores.broken_rows(part) for part in parts])
            row = int(rows.byte().argmax())
            whose = f"row {row} of {len(batch)}" if bool(rows.any()) else self._method.name
            what = f"The scores of {whose} hold"
        inputs = parts[row // size]
        if targets is not None:
            inputs = inputs[row % size : row % size + 1]

        def explained(part: Tensor) -> Tensor:
            found: Tensor = scores(part)
            # A function of the user may know of the rows that it was called with before.
            return found.sum() if targets is None else found[:, targets[row]].sum()

        with partitioned_before(scores.head, self._partition):
            place, remedy = find_non_finite(self._model, explained, inputs) or (
                f"in the passes of {self._method.name} around the image, not in that of the image itself",
                "look at the method's options, such as its baselines",
            )
        return NonFiniteError(f"{what} NaN or infinite values, which began {place}; {remedy}.")

    def stability(
        self,
        inputs: Tensor,
        target: Target | Score | None = None,
        *,
        noise: float = 0.001,
        draws: int = 4,
        seed: int = 0,
    ) -> Tensor:
        """Measure how steady the heat maps are under Gaussian noise on the inputs.

        The class explained is that of the inputs without noise. A value near 1 means that nobody could tell the maps
        apart; a map below 0.5 is another one after noise that nobody can see, and explains little.

        Args:
            inputs: preprocessed batch, shape (B, C, *S), floating point, finite.
            target: see `attribute`.
            noise: standard deviation of the noise, as a share of the range of each row.
            draws: number of noisy copies, at least 1.
            seed: random seed of the noise, which is the same for every row.

        Returns:
            Mean cosine between the heat map of each row and those of its noisy copies, in [0, 1], shape (B,), float64;
            NaN where a map is zero everywhere.

        Raises:
            SettingError: if `noise` or `draws` is out of range.
            ParchGradError: see `attribute`.

        Example:
            >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 5)).eval()
            >>> Explainer(model, None).stability(torch.rand(1, 3, 8, 8), target=2).round(decimals=6)
            tensor([1.], dtype=torch.float64)
        """
        check_inputs(inputs)
        if target is None:
            target = self.predict(inputs)
        clean = heatmap(self.attribute(inputs, target))
        copies = noisy_copies(inputs.detach(), noise=noise, draws=draws, seed=seed)
        return torch.stack([cosine(clean, heatmap(self.attribute(copy, target))) for copy in copies]).mean(dim=0)

    def predict(self, inputs: Tensor) -> Tensor:
        """Predict the class of each row, shape (B,).

        Raises:
            InputError: if the inputs are no finite floating-point batch, or do not fit the model.
            ModelError: if the model is in training mode, or its output are no logits of shape (B, K).
            NonFiniteError: if logits are NaN or infinite; it names the layer where that began.
        """
        check_evaluation_mode(self._model)
        check_inputs(inputs)
        logits = Logits(self._model, None, self._pick_logits)
        size = self._internal_batch_size or inputs.shape[0]
        with torch.no_grad():
            predicted = torch.cat([logits(part).argmax(dim=1) for part in torch.split(inputs, size)])
        if not logits.was_finite:
            raise self._non_finite(logits, inputs, predicted, size, torch.ones(len(inputs), dtype=torch.bool))
        return predicted


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
    _check_map(attribution)
    return attribution.abs().mean(dim=1)


def signed_heatmap(attribution: Tensor) -> Tensor:
    """Average an attribution over colour channels with its sign: positive where it raises the score.

    Colour channels of opposite sign cancel, as they do in the score.

    Args:
        attribution: shape (B, C, *S).

    Returns:
        Signed map, shape (B, *S).

    Raises:
        InputError: if there are no spatial dimensions.

    Example:
        >>> signed_heatmap(torch.tensor([[[1.0, 0.0]], [[-2.0, 4.0]]]))
        tensor([[ 1.,  0.],
                [-2.,  4.]])
    """
    _check_map(attribution)
    return attribution.mean(dim=1)


def _check_map(attribution: Tensor) -> None:
    check_kind("The attribution", attribution, Tensor, "give a tensor (B, C, *S)", error=InputError)
    if not attribution.is_floating_point():
        raise InputError(f"The attribution is {attribution.dtype}, but a heat map needs floating point; call .float().")
    if attribution.dim() < 3:
        raise InputError(f"The attribution has shape {tuple(attribution.shape)}, but a heat map needs (B, C, *S).")


def replaces_rectifiers(method: str) -> bool:
    """Whether a method replaces the backward pass of rectifiers itself, so that soft gates have no effect on it.

    Example:
        >>> replaces_rectifiers("GuidedBackprop"), replaces_rectifiers("gradient")
        (True, False)
    """
    return method in _ACTS_ON


@contextmanager
def _told_if_independent(*, of_function: bool) -> Iterator[None]:
    """Explain autograd's error when the score is detached."""
    try:
        yield
    except RuntimeError as error:
        # With weights that ask for no gradient, there is no graph at all.
        if not any(said in str(error) for said in ("not have been used in the graph", "does not require grad")):
            raise
        if of_function:
            raise TargetError(
                "What target returns does not depend on the inputs; return a score that is computed from the output."
            ) from error
        raise ModelError(
            "The logits do not depend on the inputs; look for what cuts them off, such as detach(), torch.no_grad() or "
            "a constant."
        ) from error


def _targets_per_row(target: Target, inputs: Tensor) -> Tensor:
    targets = integer_targets(target).to(inputs.device)
    check_target_count(targets, inputs.shape[0], "batch")
    return targets.expand(inputs.shape[0])


def _find_method(name: str, options: Mapping[str, Any]) -> "_CaptumMethod | _SmoothGrad":
    """Build the method from its name and options, all of which must exist."""
    check_kind("method", name, str, f"give one of {', '.join(METHODS)}, or a Captum class name", wanted="a name")
    if name == "smoothgrad":
        _check_options(name, options, {member.name for member in fields(_SmoothGrad)})
        return _SmoothGrad(**options)
    class_name, defaults = _CAPTUM_NAMES.get(name, (name, {}))
    if class_name not in _captum_classes():
        known = [*METHODS, *_captum_classes()]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"near names: {', '.join(near)}" if near else f"known: {', '.join(known)}"
        raise SettingError(f"method {name!r} does not exist or does not explain the input by gradients; {hint}.")
    return _CaptumMethod(name, class_name, {**defaults, **options})


def _captum_classes() -> dict[str, type]:
    """Captum's gradient attributions of the input, by class name."""
    base = captum.attr.GradientAttribution
    others = (captum.attr.LayerAttribution, captum.attr.NeuronAttribution)
    return {
        name: found
        for name, found in vars(captum.attr).items()
        if inspect.isclass(found)
        and issubclass(found, base)
        and not (found is base or issubclass(found, others) or name in _UNSUPPORTED)
    }


def _check_options(method: str, options: Mapping[str, Any], known: set[str]) -> None:
    for option in options:
        if option not in known:
            hint = ", ".join(sorted(known)) or "none"
            raise SettingError(f"method {method!r} has no option {option!r}; it has: {hint}.")


@dataclass(frozen=True, eq=False)
class _CaptumMethod:
    """A Captum class as a method; options go to its constructor or its `attribute`, whichever names them."""

    name: str
    class_name: str
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        constructor, call = self._parameters()
        _check_options(self.name, self.options, {*constructor, *call} - _RESERVED)
        for option, parameter in {**constructor, **call}.items():
            if parameter.default is inspect.Parameter.empty and option not in {*_RESERVED, *self.options}:
                raise SettingError(f"method {self.name!r} needs the option {option!r}; give it by name.")
        for option in ("n_steps", "n_samples"):
            check_whole_number(option, self.options.get(option, 1), 1)

    @property
    def replaces_rectifiers(self) -> bool:
        """Whether the method replaces the backward pass of rectifiers itself."""
        return self.class_name in _ACTS_ON

    def _parameters(self) -> tuple[Mapping[str, inspect.Parameter], Mapping[str, inspect.Parameter]]:
        found = _captum_classes()[self.class_name]
        attribute = found.attribute  # type: ignore[attr-defined]  # every one of these classes has it
        return inspect.signature(found).parameters, inspect.signature(attribute).parameters

    def check(self, model: nn.Module) -> None:
        """Raise `ModelError` if the method would do nothing of its own on this model."""
        kinds = _ACTS_ON.get(self.class_name)
        if kinds is not None and not any(isinstance(module, kinds) for module in model.modules()):
            names = ", ".join(kind.__name__ for kind in kinds)
            raise ModelError(
                f"{self.class_name} acts on modules of type {names}, of which {type(model).__name__} has none; "
                "it would be a plain method under another name, so use 'gradient' or 'input_x_gradient'."
            )

    def check_batch(self, inputs: Tensor) -> None:
        """Raise `SettingError` if the options do not fit the inputs."""
        baselines = self.options.get("baselines")
        if self.class_name in _SAMPLES_BASELINES:
            _check_baseline_samples(self.class_name, baselines, inputs)
        elif baselines is not None and not is_number(baselines):
            _check_baselines(baselines, inputs)

    def images_per_pass(self, images: int, rows_per_pass: int | None) -> int:
        """How many images keep a pass within its rows; integrated gradients splits its steps itself."""
        if rows_per_pass is None:
            return images
        baselines = self.options.get("baselines")
        drawn = baselines.shape[0] if isinstance(baselines, Tensor) and baselines.dim() > 0 else 1
        factors: dict[str, int] = {
            "DeepLift": 2,
            "DeepLiftShap": 2 * drawn,
            "GradientShap": self.options.get("n_samples", 5),
        }
        return max(1, rows_per_pass // factors.get(self.class_name, 1))

    def __call__(
        self, scores: nn.Module, inputs: Tensor, targets: Tensor | None, rows: slice, rows_per_pass: int | None
    ) -> Tensor:
        constructor, call = self._parameters()
        of_constructor = {option: value for option, value in self.options.items() if option in constructor}
        of_call = {option: value for option, value in self.options.items() if option not in constructor}
        if "internal_batch_size" in call:
            of_call["internal_batch_size"] = rows_per_pass
        baselines = of_call.get("baselines")
        if isinstance(baselines, Tensor):
            baselines = baselines.to(inputs)
            if self.class_name not in _SAMPLES_BASELINES:
                of_rows = baselines if baselines.shape[0] == 1 else baselines[rows]
                baselines = of_rows.expand(-1, *inputs.shape[1:])
            of_call["baselines"] = baselines
        attribution = _captum_classes()[self.class_name](scores, **of_constructor)
        try:
            result: Tensor = attribution.attribute(inputs, target=targets, **of_call)
        except RuntimeError as error:
            if self.class_name not in _NEEDS_SEPARATE_MODULES:
                raise
            raise ModelError(
                f"{self.class_name} cannot explain this model; it needs every activation to be a module of its own, "
                "used once and not in place."
            ) from error
        return result


def _check_baselines(baselines: object, inputs: Tensor) -> None:
    sizes = inputs.shape[1:]
    if not _is_real(baselines) or baselines.dim() != inputs.dim() or not _is_broadcast(baselines.shape[1:], sizes):
        raise SettingError(
            f"baselines is {_described(baselines)}, but it must be a number, or floating-point numbers of shape (1 or "
            f"{', '.join(map(str, inputs.shape))}); bring it into that shape."
        )
    if baselines.shape[0] not in (1, inputs.shape[0]):
        raise SettingError(
            f"There are {baselines.shape[0]} baselines for {inputs.shape[0]} rows; give one, or one per row."
        )


def _check_baseline_samples(name: str, baselines: object, inputs: Tensor) -> None:
    if callable(baselines):
        return
    # Captum's own rule.
    least = 2 if name == "DeepLiftShap" else 1
    shape = tuple(inputs.shape[1:])
    if not _is_real(baselines) or tuple(baselines.shape[1:]) != shape or len(baselines) < least:
        raise SettingError(
            f"baselines is {_described(baselines)}, but {name} takes samples of a distribution; give a tensor of "
            f"{least} rows or more, each {shape}."
        )


def _is_real(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def _is_broadcast(sizes: Sequence[int], wanted: Sequence[int]) -> bool:
    return all(size in (1, full) for size, full in zip(sizes, wanted, strict=True))


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    return repr(value) if isinstance(value, str | float | None) else f"a {type(value).__name__}"


@dataclass(frozen=True, kw_only=True)
class _SmoothGrad:
    """SmoothGrad (Smilkov et al. 2017): Captum's gradient averaged over noisy copies of each row.

    Not Captum's NoiseTunnel: it draws from the global generator and knows one sigma for all rows, so that neither a
    seed nor a batch would give the same maps.
    """

    samples: int = 25
    sigma: float = 0.15
    seed: int = 0
    name: ClassVar[str] = "smoothgrad"
    replaces_rectifiers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_whole_number("samples", self.samples, 1)
        if not is_number(self.sigma) or not 0 <= self.sigma < math.inf:
            raise SettingError(f"sigma is {self.sigma!r}, but it must be a share of the input's range, 0 or more.")
        if not is_whole_number(self.seed) or abs(self.seed) >= 2**63:
            raise SettingError(f"seed is {self.seed!r}, but it must be a whole number of fewer than 64 bits.")

    @property
    def options(self) -> Mapping[str, Any]:
        return vars(self)

    def check(self, model: nn.Module) -> None:
        """Every model will do."""

    def check_batch(self, inputs: Tensor) -> None:
        """So will every batch."""

    def images_per_pass(self, images: int, rows_per_pass: int | None) -> int:
        return rows_per_pass or images

    def __call__(
        self, scores: nn.Module, inputs: Tensor, targets: Tensor | None, rows: slice, rows_per_pass: int | None
    ) -> Tensor:
        saliency = captum.attr.Saliency(scores)
        batch = inputs.shape[0]
        clean = inputs.detach()
        # The same noise for every row, drawn on the CPU: a row's map depends on neither its batch nor the device.
        generator = torch.Generator().manual_seed(int(self.seed))
        noise = torch.randn(self.samples, *clean.shape[1:], generator=generator).to(clean)
        spread = self.sigma * (clean.flatten(1).amax(dim=1) - clean.flatten(1).amin(dim=1))
        spread = spread.reshape(batch, *[1] * clean.dim())
        copies = self.samples if rows_per_pass is None else max(1, rows_per_pass // batch)
        total = torch.zeros_like(at_least_float32(clean))
        for part in torch.split(noise, copies):
            noisy = (clean.unsqueeze(1) + spread * part).flatten(0, 1).requires_grad_()
            of_copies = None if targets is None else targets.repeat_interleave(len(part))
            maps = saliency.attribute(noisy, target=of_copies, abs=False)
            total += maps.unflatten(0, (batch, len(part))).sum(dim=1)
        return (total / self.samples).to(inputs.dtype)
