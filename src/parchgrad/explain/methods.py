"""The attribution methods: Captum's gradient attributions, and SmoothGrad."""

import difflib
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar, TypeGuard

import captum.attr
import torch
from torch import Tensor, nn

from parchgrad._io.checks import check_kind, check_seed, check_whole_number, is_number
from parchgrad.core.partition import at_least_float32
from parchgrad.errors import ModelError, SettingError, reason_of
from parchgrad.explain.outputs import Inputs
from parchgrad.explain.stability import standard_noise, value_range

__all__ = ["METHODS", "find_method", "is_detached", "replaces_rectifiers"]

_CAPTUM_NAMES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gradient": ("Saliency", {"abs": False}),
    "input_x_gradient": ("InputXGradient", {}),
    "integrated_gradients": ("IntegratedGradients", {"n_steps": 25}),
}
METHODS: tuple[str, ...] = (*_CAPTUM_NAMES, "smoothgrad")
"""Built-in method names; any other Captum gradient attribution goes by its class name."""
# Set by the explainer, or meaningless without the convergence delta.
_RESERVED = {"self", "forward_func", "model", "inputs", "target", "internal_batch_size"}
_RESERVED |= {"additional_forward_args", "return_convergence_delta"}
# LRP leaves attributes on the model's layers, and does not propagate a gradient.
_UNSUPPORTED = {"LRP"}
# Their baselines are samples of a distribution, not one per row.
_SAMPLES_BASELINES = {"GradientShap", "DeepLiftShap"}
# They compare every activation's input with its output, and fail if a module is used twice.
_NEEDS_SEPARATE_MODULES = {"DeepLift", "DeepLiftShap"}
_ACTIVATIONS = (nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus)
# Methods that replace the backward pass of these modules; without any, they equal a plain method.
_ACTS_ON: Mapping[str, tuple[type[nn.Module], ...]] = {
    **dict.fromkeys(("GuidedBackprop", "Deconvolution", "GuidedGradCam"), (nn.ReLU,)),
    **dict.fromkeys(("DeepLift", "DeepLiftShap"), _ACTIVATIONS),
}


def replaces_rectifiers(method: str) -> bool:
    """Whether a method replaces the backward pass of rectifiers, so that soft gates have no effect.

    Example:
        >>> replaces_rectifiers("GuidedBackprop"), replaces_rectifiers("gradient")
        (True, False)
    """
    return method in _ACTS_ON


def is_detached(error: RuntimeError) -> bool:
    """Whether autograd failed since a score does not depend on an input.

    Example:
        >>> is_detached(RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn"))
        True
    """
    # If no weight requires a gradient, there is no graph at all.
    return any(said in str(error) for said in ("not have been used in the graph", "does not require grad"))


def find_method(name: str, options: Mapping[str, Any]) -> "CaptumMethod | SmoothGrad":
    """Create the method of this name with its options.

    Raises:
        SettingError: if the method does not exist, or an option is unknown or missing.

    Example:
        >>> find_method("smoothgrad", {"samples": 4})
        SmoothGrad(samples=4, sigma=0.15, seed=0)
    """
    check_kind("`method`", name, str, f"Pass one of {', '.join(METHODS)}, or a Captum class name", wanted="a name")
    if name == "smoothgrad":
        _check_options(name, options, {member.name for member in fields(SmoothGrad)})
        return SmoothGrad(**options)
    class_name, defaults = _CAPTUM_NAMES.get(name, (name, {}))
    if class_name not in _captum_classes():
        known = [*METHODS, *_captum_classes()]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"Similar names: {', '.join(near)}" if near else f"Known methods: {', '.join(known)}"
        raise SettingError(f"`method` is {name!r}, which is not one that explains the input by gradients. {hint}.")
    return CaptumMethod(name, class_name, {**defaults, **options})


@cache
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
            where = " Pass it to the selector." if option in ("quantile", "softness", "alpha") else ""
            raise SettingError(f"`{option}` is not an option of the method {method!r}. Its options: {hint}.{where}")


@dataclass(frozen=True, eq=False)
class CaptumMethod:
    """A Captum class as a method; options go to its constructor or its `attribute`, whichever accepts them."""

    name: str
    class_name: str
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        constructor, call = self._parameters()
        _check_options(self.name, self.options, {*constructor, *call} - _RESERVED)
        for option, parameter in {**constructor, **call}.items():
            if parameter.default is inspect.Parameter.empty and option not in {*_RESERVED, *self.options}:
                raise SettingError(f"The method {self.name!r} needs `{option}`. Pass it by name.")
        for option in ("n_steps", "n_samples"):
            check_whole_number(option, self.options.get(option, 1), 1)

    @property
    def replaces_rectifiers(self) -> bool:
        """Whether the method replaces the backward pass of rectifiers."""
        return self.class_name in _ACTS_ON

    def _parameters(self) -> tuple[Mapping[str, inspect.Parameter], Mapping[str, inspect.Parameter]]:
        found = _captum_classes()[self.class_name]
        attribute = found.attribute  # type: ignore[attr-defined]  # every one of these classes has it
        return inspect.signature(found).parameters, inspect.signature(attribute).parameters

    def check(self, model: nn.Module) -> None:
        """Raise `ModelError` if this model has no module that the method acts on."""
        kinds = _ACTS_ON.get(self.class_name)
        if kinds is not None and not any(isinstance(module, kinds) for module in model.modules()):
            names = ", ".join(kind.__name__ for kind in kinds)
            raise ModelError(
                f"{self.class_name} acts on modules of type {names}, but {type(model).__name__} has none, so it would "
                "equal a plain method. Use 'gradient' or 'input_x_gradient'."
            )

    @property
    def _baselines(self) -> tuple[Any, ...]:
        """The baseline of each input; one for all inputs if it is None, a number or a function."""
        baselines = self.options.get("baselines")
        return baselines if isinstance(baselines, tuple) else (baselines,)

    def check_batch(self, inputs: tuple[Tensor, ...]) -> None:
        """Raise `SettingError` if the method or its options do not fit the inputs."""
        dimensions = [each.dim() for each in inputs]
        if self.class_name == "GuidedGradCam" and len(set(dimensions)) > 1:
            raise SettingError(
                "GuidedGradCam resizes the map of one layer to every input, but the inputs have "
                f"{', '.join(map(str, dimensions))} dimensions. Choose another method, such as 'GuidedBackprop'."
            )
        baselines, samples = self.options.get("baselines"), self.class_name in _SAMPLES_BASELINES
        if callable(baselines) if samples else baselines is None or is_number(baselines):
            return
        if len(self._baselines) != len(inputs):
            raise SettingError(
                f"The number of inputs is {len(inputs)}, but `baselines` holds {len(self._baselines)}. Pass a tuple "
                "with one per input."
            )
        for index, (baseline, each) in enumerate(zip(self._baselines, inputs, strict=True)):
            name = "baselines" if len(inputs) == 1 else f"baselines[{index}]"
            if samples:
                _check_baseline_samples(name, self.class_name, baseline, each)
            elif not is_number(baseline):
                _check_baselines(name, baseline, each)
        if self.class_name == "DeepLiftShap" and len({len(each) for each in self._baselines}) > 1:
            raise SettingError(
                f"`baselines` holds {', '.join(str(len(each)) for each in self._baselines)} samples, but DeepLiftShap "
                "uses the samples of all inputs together. Pass the same number for each."
            )

    def images_per_pass(self, images: int, rows_per_pass: int | None) -> int:
        """Number of images that keep a pass within its rows; integrated gradients splits its steps itself."""
        if rows_per_pass is None:
            return images
        drawn = max((len(each) for each in self._baselines if isinstance(each, Tensor)), default=1)
        factors: dict[str, int] = {
            "DeepLift": 2,
            "DeepLiftShap": 2 * drawn,
            "GradientShap": self.options.get("n_samples", 5),
        }
        return max(1, rows_per_pass // factors.get(self.class_name, 1))

    def __call__(
        self,
        scores: nn.Module,
        inputs: tuple[Tensor, ...],
        targets: Tensor | None,
        rows: slice,
        rows_per_pass: int | None,
    ) -> tuple[Tensor, ...]:
        constructor, call = self._parameters()
        of_constructor = {option: value for option, value in self.options.items() if option in constructor}
        of_call = {option: value for option, value in self.options.items() if option not in constructor}
        if "internal_batch_size" in call:
            of_call["internal_batch_size"] = rows_per_pass
        if is_number(of_call.get("baselines")):
            of_call["baselines"] = (of_call["baselines"],) * len(inputs)
        elif any(isinstance(each, Tensor) for each in self._baselines):
            pairs = zip(self._baselines, inputs, strict=True)
            of_call["baselines"] = tuple(self._baseline_of(each, part, rows) for each, part in pairs)
        attribution = _captum_classes()[self.class_name](scores, **of_constructor)
        try:
            # A function as `baselines` takes a single input as a tensor.
            given = inputs[0] if len(inputs) == 1 else inputs
            result: Inputs = attribution.attribute(given, target=targets, **of_call)
        except RuntimeError as error:
            other = is_detached(error) or isinstance(error, torch.OutOfMemoryError)
            if self.class_name not in _NEEDS_SEPARATE_MODULES or other:
                raise
            raise ModelError(
                f"{self.class_name} failed ({reason_of(error)}). It needs every activation to be a module of its own, "
                "used once and not in place."
            ) from error
        return result if isinstance(result, tuple) else (result,)

    def _baseline_of(self, baseline: Any, inputs: Tensor, rows: slice) -> Any:
        """Select the rows of a baseline, and expand it to the shape of its input."""
        if not isinstance(baseline, Tensor):
            return baseline
        baseline = baseline.to(inputs)
        if self.class_name in _SAMPLES_BASELINES:
            return baseline
        of_rows = baseline if baseline.shape[0] == 1 else baseline[rows]
        return of_rows.expand(-1, *inputs.shape[1:])


def _check_baselines(name: str, baselines: object, inputs: Tensor) -> None:
    sizes = inputs.shape[1:]
    if not _is_real(baselines) or baselines.dim() != inputs.dim() or not _is_broadcast(baselines.shape[1:], sizes):
        raise SettingError(
            f"`{name}` is {_described(baselines)}, but it must be a number, or a floating-point tensor of shape "
            f"(1 or {', '.join(map(str, inputs.shape))})."
        )
    if baselines.shape[0] not in (1, inputs.shape[0]):
        raise SettingError(
            f"There are {len(baselines)} baselines for {len(inputs)} rows in `{name}`. Pass one, or one per row."
        )


def _check_baseline_samples(name: str, method: str, baselines: object, inputs: Tensor) -> None:
    # Captum's own rule.
    least = 2 if method == "DeepLiftShap" else 1
    shape = tuple(inputs.shape[1:])
    if not _is_real(baselines) or tuple(baselines.shape[1:]) != shape or len(baselines) < least:
        raise SettingError(
            f"`{name}` is {_described(baselines)}, but {method} needs samples of a distribution. Pass a tensor with "
            f"{least} or more rows of shape {shape}."
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
class SmoothGrad:
    """SmoothGrad (Smilkov et al. 2017): Captum's gradient averaged over noisy copies of each row.

    Not Captum's NoiseTunnel: with its global generator and one sigma for all rows, a map would depend on its batch,
    whatever the seed.
    """

    samples: int = 25
    sigma: float = 0.15
    seed: int = 0
    name: ClassVar[str] = "smoothgrad"
    replaces_rectifiers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_whole_number("samples", self.samples, 1)
        if not is_number(self.sigma) or not 0 <= self.sigma < math.inf:
            raise SettingError(f"`sigma` is {self.sigma!r}, but it must be a share of the input's range, 0 or more.")
        check_seed(self.seed)

    @property
    def options(self) -> Mapping[str, Any]:
        return vars(self)

    def check(self, model: nn.Module) -> None:
        """Accept every model."""

    def check_batch(self, inputs: tuple[Tensor, ...]) -> None:
        """Accept every batch."""

    def images_per_pass(self, images: int, rows_per_pass: int | None) -> int:
        return rows_per_pass or images

    def __call__(
        self,
        scores: nn.Module,
        inputs: tuple[Tensor, ...],
        targets: Tensor | None,
        rows: slice,
        rows_per_pass: int | None,
    ) -> tuple[Tensor, ...]:
        saliency = captum.attr.Saliency(scores)
        batch = len(inputs[0])
        clean = [at_least_float32(each.detach()) for each in inputs]
        noise = [standard_noise(each, self.samples, self.seed, index) for index, each in enumerate(clean)]
        spread = [self.sigma * value_range(each).unsqueeze(1) for each in clean]
        copies = self.samples if rows_per_pass is None else max(1, rows_per_pass // batch)
        totals = [torch.zeros_like(each) for each in clean]
        for parts in zip(*(torch.split(each, copies) for each in noise), strict=True):
            noisy = tuple(
                (middle.unsqueeze(1) + width * part).flatten(0, 1).to(each.dtype).requires_grad_()
                for each, middle, width, part in zip(inputs, clean, spread, parts, strict=True)
            )
            count = len(parts[0])
            of_copies = None if targets is None else targets.repeat_interleave(count)
            maps = saliency.attribute(noisy, target=of_copies, abs=False)
            for total, found in zip(totals, maps, strict=True):
                total += found.unflatten(0, (batch, count)).sum(dim=1)
        return tuple((total / self.samples).to(each.dtype) for total, each in zip(totals, inputs, strict=True))
