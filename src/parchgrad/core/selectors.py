"""Selectors rate how much each channel of a layer matters for the explained class, row by row."""

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from parchgrad._io.checks import check_kind, is_number, is_whole_number
from parchgrad.core._torch import without_function_modes
from parchgrad.core.partition import Conserve, at_least_float32, channel_norms, without_autocast
from parchgrad.errors import SettingError, StatisticsError

__all__ = [
    "REGISTERED",
    "EditDefaults",
    "Evidence",
    "FixedChannels",
    "GradientEnergy",
    "GradientTimesActivation",
    "LayerSignal",
    "RandomChannels",
    "RankingSelector",
    "RegisteredSelector",
    "Selection",
    "Selector",
    "as_selection",
    "check_quantile",
    "check_softness",
    "given",
    "kth_largest",
    "register_selector",
    "soft_weights",
    "suited",
]


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerSignal:
    """Input of a selector for one convolution in one backward pass.

    Attributes:
        layer: name of the convolution in the model.
        gradient: gradient at its output, shape (B, C, *S). Rows of extreme magnitude are divided by a power of two, so
            that squares neither underflow nor overflow.
        observation: return value of `Selector.observe` in the forward pass.
        classes: explained class of each row, shape (B,), integer; None for selectors that do not need it.
    """

    layer: str
    gradient: Tensor
    observation: Any = None
    classes: Tensor | None = None

    @cached_property
    def channel_norms(self) -> Tensor:
        """Spatial norm of each channel of the gradient, float32 or wider, shape (B, C)."""
        return channel_norms(self.gradient)


@dataclass(frozen=True, eq=False, kw_only=True)
class Selection:
    """Result of a selector for one convolution.

    Attributes:
        channel_weights: how much each channel matters, in [0, 1], or a boolean mask; shape (B, C).
        position_weights: factor of the gradient at each position, applied before its channels are partitioned, in
            [0, 1], shape (B, *S); None leaves all positions unchanged.
    """

    channel_weights: Tensor
    position_weights: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class EditDefaults:
    """Default settings of a selector, used where the user passes None.

    Attributes:
        layers: see `choose_layers`.
        conserve: see `partition_gradient`.
        gates: see `soft_gate`.
        antialias: see `smooth_strides`.
        balance: see `Balance`.
    """

    layers: str | float = 0.5
    conserve: Conserve = "energy"
    gates: float = 1.0
    antialias: bool = True
    balance: bool = True


class Selector(ABC):
    """Weight the channels of each layer, row by row. Subclass it to add a criterion.

    A selector holds settings, statistics and values derived from them, never the state of a pass, so that threads can
    share it.

    Example:
        >>> class FirstChannel(Selector):
        ...     def select(self, signal):
        ...         weights = torch.zeros(signal.gradient.shape[:2])
        ...         weights[:, 0] = 1
        ...         return weights
        >>> FirstChannel().select(LayerSignal(layer="conv", gradient=torch.ones(1, 3, 2, 2)))
        tensor([[1., 0., 0.]])
    """

    needs_class: ClassVar[bool] = False
    """Whether `select` reads `LayerSignal.classes`."""
    suits: ClassVar[EditDefaults] = EditDefaults()
    """Default settings of the class; see `defaults`."""

    @property
    def defaults(self) -> EditDefaults:
        """Default settings of this selector; with `softness=0`, the published cut, those of the true derivatives."""
        return suited(self.suits, getattr(self, "softness", 1.0))

    def check(self, channels: Mapping[str, int]) -> None:  # noqa: B027 - overriding it is optional
        """Raise a `ParchGradError` if this selector does not support layers of these names and channel counts."""

    def check_classes(self, classes: int) -> None:  # noqa: B027 - overriding it is optional
        """Raise a `ParchGradError` if this selector does not support a model with this many classes."""

    def check_targets(self, targets: Sequence[int]) -> None:  # noqa: B027 - overriding it is optional
        """Raise a `ParchGradError` if this selector has no data on one of these classes."""

    def observe(self, output: Tensor) -> Any:
        """Return what `select` needs of a convolution's detached output (B, C, *S); called in the forward pass.

        The output may be changed in place afterwards, so return new tensors.
        """
        return None

    @abstractmethod
    def select(self, signal: LayerSignal) -> Tensor | Selection:
        """Return channel weights in [0, 1] or a mask, shape (B, C), or a `Selection` with position weights."""


def as_selection(found: Tensor | Selection) -> Selection:
    """Convert the result of `Selector.select` to a `Selection`.

    Example:
        >>> as_selection(torch.tensor([[1.0, 0.0]])).channel_weights
        tensor([[1., 0.]])
    """
    return found if isinstance(found, Selection) else Selection(channel_weights=found)


def kth_largest(scores: Tensor, share: float) -> Tensor:
    """Return the k-th largest score of each row, k = max(1, int(share * C)), shape (B, 1).

    Example:
        >>> kth_largest(torch.tensor([[3.0, 1.0, 2.0, 2.5]]), 0.5)
        tensor([[2.5000]])
    """
    return scores.topk(max(1, int(share * scores.shape[1]))).values[:, -1:]


def soft_weights(scores: Tensor, threshold: Tensor | float, softness: float) -> Tensor:
    """Turn scores into weights that rise linearly around a threshold.

    The weight is `clamp((score / threshold - (1 - softness)) / (2 * softness), 0, 1)`: half at the threshold, 0 up to
    `1 - softness` of it, 1 from `1 + softness` of it. With `softness=0` it is 1 from the threshold on, ties included.
    With positive `softness`, all positive scores weigh 1 if the threshold is not positive, and all scores do in a row
    without positive ones.

    Args:
        scores: larger is better, shape (B, C).
        threshold: one per row, shape (B, 1), or one for all.
        softness: in [0, 1].

    Returns:
        Weights in [0, 1], or a boolean mask if `softness` is 0; shape (B, C).

    Example:
        >>> scores = torch.tensor([[3.0, 1.0, 2.0, 2.5]])
        >>> soft_weights(scores, 2.0, 0.5), soft_weights(scores, 2.0, 0)
        (tensor([[1.0000, 0.0000, 0.5000, 0.7500]]), tensor([[ True, False,  True,  True]]))
    """
    if softness == 0:
        return scores >= threshold
    # With a tiny width every positive score is far above the threshold.
    width = (2 * softness * torch.as_tensor(threshold, dtype=scores.dtype)).clamp_min(torch.finfo(scores.dtype).tiny)
    weights = (scores / width).sub_((1 - softness) / (2 * softness)).clamp_(0, 1)
    return weights.masked_fill_(scores.amax(dim=1, keepdim=True) <= 0, 1)


def check_softness(softness: float) -> None:
    """Raise `SettingError` unless the softness is a number in [0, 1]."""
    if not is_number(softness) or not 0 <= softness <= 1:
        raise SettingError(f"`softness` is {softness!r}, but it must lie in [0, 1]. 0 is a hard cut.")


def check_quantile(quantile: float) -> None:
    """Raise `SettingError` unless the quantile is a number in (0, 1]."""
    if not is_number(quantile) or not 0 < quantile <= 1:
        raise SettingError(
            f"`quantile` is {quantile!r}, but it must lie in (0, 1]: the share of channels at or above the threshold."
        )


def suited(suits: EditDefaults, softness: float) -> EditDefaults:
    """Adapt default settings to the softness: a hard cut is the published method, with true derivatives.

    Example:
        >>> suited(EditDefaults(), 0).gates
        0.0
    """
    return suits if softness else replace(suits, gates=0.0, antialias=False, balance=False)


@dataclass(frozen=True, kw_only=True)
class RegisteredSelector:
    """A selector class with its short name for command lines, runs and the explorer.

    Attributes:
        name: the short name.
        kind: the class, a dataclass.
        title: display name.
        summary: phrase that says what it keeps.
    """

    name: str
    kind: type[Selector]
    title: str
    summary: str

    @property
    def needs_statistics(self) -> bool:
        """Whether it needs channel statistics."""
        return "statistics" in self._fields

    @property
    def _fields(self) -> dict[str, Any]:
        return {item.name: item.default for item in fields(cast(Any, self.kind))}

    def has(self, setting: str) -> bool:
        """Whether it has a setting, such as `"softness"`."""
        return setting in self._fields

    def default(self, setting: str) -> float:
        """Return its default `"quantile"` or `"softness"`; 0.1 and 0 if it has none.

        Example:
            >>> REGISTERED["energy"].default("softness"), REGISTERED["random"].default("softness")
            (0.5, 0.0)
        """
        # Selectors that accept `alpha` instead of a quantile have None as their default.
        found = self._fields.get(setting)
        return _USUAL[setting] if found in (None, MISSING) else float(found)

    def suits(self, softness: float | None = None) -> EditDefaults:
        """Return its default settings (see `Selector.defaults`), which differ for a hard cut, `softness=0`.

        Example:
            >>> REGISTERED["evidence"].suits().layers, REGISTERED["energy"].suits(softness=0).gates
            ('auto', 0.0)
        """
        if not self.has("softness"):
            return self.kind.suits
        return suited(self.kind.suits, self.default("softness") if softness is None else softness)

    def make(
        self,
        *,
        quantile: float | None = None,
        softness: float | None = None,
        statistics: Any = None,
        seed: int = 0,
    ) -> Selector:
        """Create the selector, ignoring settings that it does not have.

        Args:
            quantile: share of the channels at or above the threshold, in (0, 1]; None means the selector's default.
            softness: width of the ramp around the threshold, in [0, 1]; None means the selector's default.
            statistics: channel statistics, for the selectors that need them.
            seed: random seed.

        Raises:
            SettingError: if a setting is out of range.
            StatisticsError: if statistics are needed but not given.

        Example:
            >>> REGISTERED["energy"].make(quantile=0.2)
            GradientEnergy(quantile=0.2, softness=0.5)
        """
        if self.needs_statistics and statistics is None:
            raise StatisticsError(f"Selector {self.name!r} needs channel statistics. Collect some, or choose 'energy'.")
        settings = {
            "quantile": quantile,
            "softness": softness,
            "statistics": statistics,
            "seed": seed,
            # Compact statistics contain the results of one test only.
            "test": getattr(statistics, "test", None),
        }
        return self.kind(**{name: value for name, value in settings.items() if self.has(name) and value is not None})


# Fields that `RegisteredSelector.make` sets.
_GIVEN = {"quantile", "softness", "statistics", "seed", "test"}
_USUAL = {"quantile": 0.1, "softness": 0.0}
REGISTERED: dict[str, RegisteredSelector] = {}
"""The selectors by short name; those of channel statistics join when their module is imported."""
_Kind = TypeVar("_Kind", bound=type[Selector])


def register_selector(name: str, *, title: str, summary: str) -> Callable[[_Kind], _Kind]:
    """Register the decorated selector class under a short name for command lines, runs and the explorer.

    Args:
        name: the short name.
        title: display name.
        summary: phrase that says what it keeps.

    Raises:
        SettingError: if the name is taken, the class is not a dataclass, or it has a field without a default other
            than `quantile`, `softness`, `statistics`, `seed` and `test`.

    Example:
        >>> @register_selector("loudest", title="Loudest", summary="the channel with the largest gradient")
        ... @dataclass(frozen=True, kw_only=True)
        ... class Loudest(Selector):
        ...     def select(self, signal):
        ...         norms = signal.channel_norms
        ...         return norms == norms.amax(dim=1, keepdim=True)
        >>> REGISTERED.pop("loudest").make()
        Loudest()
    """

    def register(kind: _Kind) -> _Kind:
        if name in REGISTERED:
            raise SettingError(f"A selector named {name!r} is registered already. Choose another name.")
        if not is_dataclass(kind):
            raise SettingError(f"{kind.__name__} is not a dataclass. Put @dataclass below @register_selector.")
        for item in fields(kind):
            if item.name not in _GIVEN and item.default is item.default_factory is MISSING:
                raise SettingError(f"The field {item.name!r} of {kind.__name__} needs a default.")
        REGISTERED[name] = RegisteredSelector(name=name, kind=kind, title=title, summary=summary)
        return kind

    return register


@dataclass(frozen=True, kw_only=True)
class RankingSelector(Selector):
    """Base class of selectors that rank channels: it has quantile, softness and their checks.

    Attributes:
        quantile: share of the channels at or above the threshold, in (0, 1].
        softness: width of the ramp around the threshold, in [0, 1]; 0 is a hard cut. See `soft_weights`.

    Raises:
        SettingError: if a setting is out of range.

    Example:
        >>> class Peak(RankingSelector):
        ...     def select(self, signal):
        ...         return self.weights(signal.gradient.abs().flatten(2).amax(dim=2))
        >>> Peak(quantile=0.5).select(LayerSignal(layer="conv", gradient=torch.tensor([[[4.0], [2.0]]])))
        tensor([[0.5000, 0.0000]])
    """

    quantile: float = 0.1
    softness: float = 0.5

    def __post_init__(self) -> None:
        check_quantile(self.quantile)
        check_softness(self.softness)

    def weights(self, scores: Tensor) -> Tensor:
        """Turn scores (B, C), larger is better, into channel weights of the same shape."""
        return soft_weights(scores, kth_largest(scores, self.quantile), self.softness)


@register_selector("energy", title="Gradient energy", summary="channels with the largest gradient")
@dataclass(frozen=True, kw_only=True)
class GradientEnergy(RankingSelector):
    """Keep the channels whose gradient has the largest spatial norm.

    Attributes:
        quantile: share of the channels at or above the threshold, in (0, 1].
        softness: width of the ramp around the threshold, in [0, 1]; 0 is a hard cut. See `soft_weights`.

    Raises:
        SettingError: if a setting is out of range.

    Example:
        >>> gradient = torch.tensor([[[0.0, -3.0], [2.0, 0.0], [0.0, 1.0]]])
        >>> GradientEnergy(quantile=0.67, softness=0.5).select(LayerSignal(layer="conv", gradient=gradient))
        tensor([[1.0000, 0.5000, 0.0000]])
    """

    def select(self, signal: LayerSignal) -> Tensor:
        """Rank by `sqrt(sum_S g^2)` (see `Selector.select`)."""
        return self.weights(signal.channel_norms)


@register_selector(
    "activation", title="Gradient times activation", summary="channels with the largest gradient times output"
)
@dataclass(frozen=True, kw_only=True)
class GradientTimesActivation(RankingSelector):
    """Keep the channels with the largest spatial sum of gradient times output.

    The sum is signed: channels that lower the score rank last. A copy of each output is held until the backward pass,
    since the network may overwrite it.

    Attributes:
        quantile: share of the channels at or above the threshold, in (0, 1].
        softness: width of the ramp around the threshold, in [0, 1]; 0 is a hard cut. See `soft_weights`.

    Raises:
        SettingError: if a setting is out of range.

    Example:
        >>> selector = GradientTimesActivation(quantile=0.5, softness=0)
        >>> output, gradient = torch.tensor([[[2.0], [5.0]]]), torch.tensor([[[1.0], [-1.0]]])
        >>> selector.select(LayerSignal(layer="conv", gradient=gradient, observation=selector.observe(output)))
        tensor([[ True, False]])
    """

    def observe(self, output: Tensor) -> Tensor:
        """Copy the output, which an in-place operation may overwrite."""
        return output.clone()

    def select(self, signal: LayerSignal) -> Tensor:
        """Rank by `sum_S g * z` (see `Selector.select`)."""
        output = _flat(given(signal.observation, "observation"))
        return self.weights((at_least_float32(_flat(signal.gradient)) * output).sum(dim=2))


class _Centred(NamedTuple):
    """An output minus its spatial mean, (B, C, S), and its spatial norm, (B, C), infinite for constant channels."""

    values: Tensor
    norms: Tensor


def _centred(output: Tensor) -> _Centred:
    """Subtract the spatial mean from an output (B, C, S), unless it has a single position."""
    if output.shape[2] == 1:
        norms = output[:, :, 0].abs()
        return _Centred(output.clone(), norms.masked_fill(norms == 0, math.inf))
    mean = output.mean(dim=2, keepdim=True)
    centred = output - mean
    norms = torch.linalg.vector_norm(centred, dim=2)
    # A constant channel leaves only the rounding error of its mean.
    rounding = mean.squeeze(2).abs_().mul_(4 * torch.finfo(output.dtype).eps * math.sqrt(output.shape[2]))
    return _Centred(centred, norms.masked_fill_(norms <= rounding, math.inf))


@register_selector("evidence", title="Evidence", summary="channels and positions that raise the score")
@dataclass(frozen=True, kw_only=True)
class Evidence(RankingSelector):
    """Keep the channels that raise the score where the layer as a whole does, and damp the other positions.

    With `c` a channel's output minus its spatial mean, the layer's evidence at a position is `e`, the sum over all
    channels of gradient times `c`. A channel's score is its share of the positive evidence, summed over space and
    divided by the norm of `c`, so that channels are not kept for their magnitude alone. The mean is subtracted because
    a constant level localises nothing. Before the channels are partitioned, the gradient is damped to a tenth at all
    but the positions with the most evidence. If no position has positive evidence, all channels are kept.

    A copy of each output is held until the backward pass.

    Source: this package; the evidence is the map of Draelos, Carin (2020), "Use HiResCAM instead of Grad-CAM for
    faithful explanations of convolutional neural networks", with a centred output.

    Attributes:
        quantile: share of the channels at or above the threshold, in (0, 1].
        softness: width of the ramps around both thresholds, in [0, 1]; 0 is a hard cut. See `soft_weights`.
        positions: share of the positions at or above their threshold, in (0, 1]; 1 leaves all unchanged.

    Raises:
        SettingError: if a setting is out of range.

    Example:
        >>> selector = Evidence(quantile=0.5, softness=0, positions=0.34)
        >>> output = torch.tensor([[[5.0, 5.0, 8.0], [9.0, 9.0, 9.0]]])
        >>> gradient = torch.tensor([[[0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]])
        >>> signal = LayerSignal(layer="conv", gradient=gradient, observation=selector.observe(output))
        >>> found = selector.select(signal)
        >>> found.channel_weights, found.position_weights
        (tensor([[ True, False]]), tensor([[0.1000, 0.1000, 1.0000]]))
    """

    # Wide gates blur the class; the evidence restores it.
    suits: ClassVar[EditDefaults] = EditDefaults(layers="auto", gates=8.0)
    quantile: float = 0.2
    softness: float = 1.0
    positions: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.positions) or not 0 < self.positions <= 1:
            raise SettingError(f"`positions` is {self.positions!r}, but it must lie in (0, 1]: a share of positions.")

    def observe(self, output: Tensor) -> _Centred:
        """Subtract the spatial mean from the output (see `Selector.observe`)."""
        # Hiding these calls from the soft gates, which intercept the forward pass, saves time.
        with without_function_modes():
            return _centred(at_least_float32(_flat(output)))

    def select(self, signal: LayerSignal) -> Selection:
        """Rank by `sum_S relu(e) * g * c / |c|` with `e = sum_C g * c`, positions by `e` (see `Selector.select`)."""
        observation: _Centred = given(signal.observation, "observation")
        centred, norms = observation
        products = at_least_float32(_flat(signal.gradient)) * centred
        evidence = products.sum(dim=1)
        with without_autocast(products.device.type):
            scores = torch.bmm(products, evidence.relu().unsqueeze(2)).squeeze(2).div_(norms)
        places = self._place_weights(evidence)
        if places is not None:
            places = places.reshape(len(places), *signal.gradient.shape[2:])
        return Selection(channel_weights=self.weights(scores), position_weights=places)

    def _place_weights(self, evidence: Tensor) -> Tensor | None:
        """Factor of each position, (B, S); None if all keep their gradient."""
        if self.positions == 1 or evidence.shape[1] == 1 or len(evidence) == 0:
            return None
        threshold = kth_largest(evidence, self.positions)
        if self.softness == 0:
            return (evidence >= threshold).to(evidence.dtype).mul_(1 - _DAMPING).add_(_DAMPING)
        steepness = (1 - _DAMPING) / self.softness / evidence.std(dim=1, keepdim=True)
        # If the evidence is constant, no position is damped.
        return (evidence - threshold).mul_(steepness).add_((1 + _DAMPING) / 2).nan_to_num_(1.0).clamp_(_DAMPING, 1)


# Factor at positions without evidence. 0 would leave some maps empty.
_DAMPING = 0.1


@register_selector("random", title="Random channels (control)", summary="randomly chosen channels")
@dataclass(frozen=True, kw_only=True)
class RandomChannels(Selector):
    """Keep randomly chosen channels: a control that any criterion must beat.

    The choice depends on the seed and the layer's name alone: every row and every call gets the same channels.

    Attributes:
        quantile: share of the channels to keep, in (0, 1].
        seed: random seed.

    Raises:
        SettingError: if `quantile` is out of range.

    Example:
        >>> signal = LayerSignal(layer="conv", gradient=torch.ones(1, 8, 2, 2))
        >>> int(RandomChannels(quantile=0.25, seed=3).select(signal).sum())
        2
    """

    quantile: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_quantile(self.quantile)
        if not is_whole_number(self.seed):
            raise SettingError(f"`seed` is {self.seed!r}, but it must be a whole number.")

    def select(self, signal: LayerSignal) -> Tensor:
        """Choose `max(1, int(quantile * C))` channels without replacement (see `Selector.select`)."""
        batch, channels = signal.gradient.shape[:2]
        # Python's own hash of a string differs between processes.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{signal.layer}".encode()))
        scores = torch.randperm(channels, generator=generator, device="cpu").unsqueeze(0)
        return (scores >= kth_largest(scores, self.quantile)).to(signal.gradient.device).expand(batch, channels)


@dataclass(frozen=True, eq=False)
class FixedChannels(Selector):
    """Keep given channels.

    Attributes:
        masks: mapping of layer name to boolean mask or weights in [0, 1], shape (C,) for all rows, or (B, C).

    Raises:
        SettingError: if a mask has another type, range or number of dimensions.

    Example:
        >>> selector = FixedChannels({"conv": torch.tensor([0.2, 1.0])})
        >>> selector.select(LayerSignal(layer="conv", gradient=torch.ones(2, 2, 1)))
        tensor([[0.2000, 1.0000],
                [0.2000, 1.0000]])
    """

    masks: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        check_kind("`masks`", self.masks, Mapping, "Pass {layer name: mask}", wanted="a dictionary")
        for layer, mask in self.masks.items():
            check_kind(f"The mask of layer {layer!r}", mask, Tensor, "Pass a tensor (C,) or (B, C)")
            if not (mask.dtype == torch.bool or mask.is_floating_point()) or mask.dim() not in (1, 2):
                raise SettingError(
                    f"The mask of layer {layer!r} is {mask.dtype} of shape {tuple(mask.shape)}, "
                    "but it must be boolean or weights in [0, 1], of shape (C,) or (B, C)."
                )
            if mask.is_floating_point() and not bool(((mask >= 0) & (mask <= 1)).all()):
                raise SettingError(f"The mask of layer {layer!r} has weights outside [0, 1]. Clamp them.")

    def check(self, channels: Mapping[str, int]) -> None:
        """Check that each layer has a mask with its number of channels (see `Selector.check`)."""
        for layer, count in channels.items():
            if layer not in self.masks:
                raise SettingError(f"`masks` has no entry for layer {layer!r}. Add one, or choose other layers.")
            if self.masks[layer].shape[-1] != count:
                raise SettingError(
                    f"The mask of layer {layer!r} has {self.masks[layer].shape[-1]} channels, but the layer has "
                    f"{count}. Pass one entry per channel."
                )

    def select(self, signal: LayerSignal) -> Tensor:
        """Return the given mask for every row (see `Selector.select`)."""
        mask = self.masks[signal.layer].to(signal.gradient.device)
        batch, channels = signal.gradient.shape[:2]
        if mask.dim() == 2 and mask.shape[0] != batch:
            raise SettingError(
                f"The mask of layer {signal.layer!r} has {mask.shape[0]} rows, but the pass has {batch}. "
                "Pass a mask of shape (C,), or one row per row of the pass."
            )
        return mask.expand(batch, channels)


def given(value: Any, name: str) -> Any:
    """Return a field of the layer signal; raise `SettingError` if it is None."""
    if value is None:
        raise SettingError(f"The layer signal comes without {name}, which this selector needs. Pass `{name}=`.")
    return value


def _flat(gradient: Tensor) -> Tensor:
    """Flatten the positions into one dimension, shape (B, C, S)."""
    return gradient.flatten(2) if gradient.dim() > 2 else gradient.unsqueeze(2)
