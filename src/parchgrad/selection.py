"""The selectors: how far each channel of a layer matters for the explained class, per row of the batch."""

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from scipy import special
from torch import Tensor

from parchgrad.checks import check_kind, is_number, is_whole_number
from parchgrad.errors import SettingError, StatisticsError
from parchgrad.partition import Conserve, at_least_float32, channel_norms, without_autocast
from parchgrad.statistics import ChannelStatistics, LayerStatistics, RankedLayerStatistics
from parchgrad.statistics.layer import AnyLayerStatistics
from parchgrad.statistics.tests import TTest, check_test

__all__ = [
    "SELECTORS_BY_NAME",
    "STATISTICAL_SELECTORS",
    "ClassWise",
    "EditDefaults",
    "Evidence",
    "FixedChannels",
    "GradientEnergy",
    "GradientTimesActivation",
    "InstanceWise",
    "LayerSignal",
    "RandomChannels",
    "Selection",
    "Selector",
    "as_selection",
    "check_softness",
    "default_edit",
    "default_setting",
    "kth_largest",
    "make_selector",
    "soft_weights",
]


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerSignal:
    """What a selector sees of one convolution in one backward pass.

    Attributes:
        layer: name of the convolution in the model.
        gradient: gradient at its output, shape (B, C, *S). Rows of extreme size come divided by a power of two, so
            that squares neither vanish nor overflow.
        observation: what `Selector.observe` kept of its output in the forward pass.
        classes: class explained in each row, shape (B,), integer; None for selectors that do not ask for it.
    """

    layer: str
    gradient: Tensor
    observation: Any = None
    classes: Tensor | None = None

    @cached_property
    def channel_norms(self) -> Tensor:
        """Norm over space of each channel of the gradient, in float32 at least, shape (B, C)."""
        return channel_norms(self.gradient)


@dataclass(frozen=True, eq=False, kw_only=True)
class Selection:
    """What a selector chose in one convolution.

    Attributes:
        channel_weights: how far each channel matters, in [0, 1], or a boolean mask; shape (B, C).
        position_weights: factor of the gradient at each place, applied before its channels are partitioned, in [0, 1],
            shape (B, *S); None leaves all places as they are.
    """

    channel_weights: Tensor
    position_weights: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class EditDefaults:
    """The settings that suit a selector, used where a user gives none.

    Attributes:
        layers: see `choose_layers`.
        conserve: see `partition_gradient`.
        gates: see `soft_gate`.
        antialias: see `smooth_strides`.
    """

    layers: str | float = 0.5
    conserve: Conserve = "energy"
    gates: float = 1.0
    antialias: bool = True


class Selector(ABC):
    """Weights the channels of each layer, row by row. Subclass it to bring a criterion of your own.

    A selector holds settings, statistics and what follows from them, never the state of a pass, so that threads may
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

    @property
    def defaults(self) -> EditDefaults:
        """The settings that suit this selector."""
        return EditDefaults()

    def check(self, channels: Mapping[str, int]) -> None:  # noqa: B027 - overriding it is optional
        """Raise a `ParchGradError` if this selector cannot serve layers with these names and numbers of channels."""

    def check_classes(self, classes: int) -> None:  # noqa: B027 - overriding it is optional
        """Raise a `ParchGradError` if this selector cannot serve a model with this many classes."""

    def check_targets(self, targets: Sequence[int]) -> None:  # noqa: B027 - overriding it is optional
        """Raise a `ParchGradError` if this selector knows nothing of one of these classes of the model."""

    def observe(self, output: Tensor) -> Any:
        """Keep what `select` needs of a convolution's output (B, C, *S); called in the forward pass, detached.

        The output may be changed in place afterwards, so whatever is kept must be a new tensor.
        """
        return None

    @abstractmethod
    def select(self, signal: LayerSignal) -> Tensor | Selection:
        """Return the weights of the channels in [0, 1], or a boolean mask, shape (B, C); a `Selection` adds places."""


def as_selection(found: Tensor | Selection) -> Selection:
    """Bring what a selector returns into one shape.

    Example:
        >>> as_selection(torch.tensor([[1.0, 0.0]])).channel_weights
        tensor([[1., 0.]])
    """
    return found if isinstance(found, Selection) else Selection(channel_weights=found)


def kth_largest(scores: Tensor, share: float) -> Tensor:
    """The k-th largest score of each row, k = max(1, int(share * C)), shape (B, 1).

    Example:
        >>> kth_largest(torch.tensor([[3.0, 1.0, 2.0, 2.5]]), 0.5)
        tensor([[2.5000]])
    """
    return scores.topk(max(1, int(share * scores.shape[1])), dim=1).values[:, -1:]


def soft_weights(scores: Tensor, threshold: Tensor | float, softness: float) -> Tensor:
    """Turn scores into weights that rise linearly around a threshold.

    The weight is `clamp((score / threshold - (1 - softness)) / (2 * softness), 0, 1)`: half at the threshold, 0 up to
    `1 - softness` of it, 1 from `1 + softness` of it. With `softness=0` it is 1 from the threshold on, ties included.
    With `softness` above 0, all positive scores weigh 1 where the threshold is not positive, and all scores do in a row
    without a positive one.

    Args:
        scores: larger is better, shape (B, C).
        threshold: of each row, shape (B, 1), or of all.
        softness: in [0, 1].

    Returns:
        Weights in [0, 1], or a boolean mask where `softness` is 0; shape (B, C).

    Example:
        >>> scores = torch.tensor([[3.0, 1.0, 2.0, 2.5]])
        >>> soft_weights(scores, 2.0, 0.5), soft_weights(scores, 2.0, 0)
        (tensor([[1.0000, 0.0000, 0.5000, 0.7500]]), tensor([[ True, False,  True,  True]]))
    """
    if softness == 0:
        return scores >= threshold
    # By a tiny threshold every positive score is far above it.
    width = (2 * softness * torch.as_tensor(threshold, dtype=scores.dtype)).clamp_min(torch.finfo(scores.dtype).tiny)
    weights = (scores / width).sub_((1 - softness) / (2 * softness)).clamp_(0, 1)
    return weights.masked_fill_(scores.amax(dim=1, keepdim=True) <= 0, 1)


def check_softness(softness: float) -> None:
    """Raise `SettingError` unless the softness is a number in [0, 1]."""
    if not is_number(softness) or not 0 <= softness <= 1:
        raise SettingError(f"softness is {softness!r}, but it must lie in [0, 1]. 0 is a hard cut.")


def _check_quantile(quantile: float) -> None:
    if not is_number(quantile) or not 0 < quantile <= 1:
        raise SettingError(
            f"quantile is {quantile!r}, but it must lie in (0, 1]: the share of channels at or above the threshold."
        )


def _check_threshold(quantile: float | None, alpha: float | None) -> None:
    """Exactly one of the two ways to cut the ranking must be given."""
    if (quantile is None) == (alpha is None):
        given = "neither is" if quantile is None else "both are"
        raise SettingError(f"Exactly one of quantile and alpha must be given, but {given}; give one.")
    if quantile is not None:
        _check_quantile(quantile)
    if alpha is not None and not (is_number(alpha) and 0 < alpha < 1):
        raise SettingError(f"alpha is {alpha!r}, but it must lie in (0, 1): the largest p-value that is kept.")


def _check_normality_threshold(threshold: float | None) -> None:
    if threshold is not None and not (is_number(threshold) and 0 < threshold <= 1):
        raise SettingError(f"normality_threshold is {threshold!r}, but it must lie in (0, 1], or be None for no gate.")


def _defaults(softness: float, suits: EditDefaults = EditDefaults()) -> EditDefaults:
    """What suits a selector that ranks: a hard cut is the published method, with the true derivatives around it."""
    return suits if softness else replace(suits, gates=0.0, antialias=False)


@dataclass(frozen=True, kw_only=True)
class _RankingSelector(Selector):
    """What the selectors share that rank the channels by the signal alone: settings and their checks."""

    quantile: float = 0.1
    softness: float = 0.5

    def __post_init__(self) -> None:
        _check_quantile(self.quantile)
        check_softness(self.softness)

    @property
    def defaults(self) -> EditDefaults:
        """The settings that suit this selector (see `Selector.defaults`)."""
        return _defaults(self.softness)

    def _weights(self, scores: Tensor) -> Tensor:
        return soft_weights(scores, kth_largest(scores, self.quantile), self.softness)


@dataclass(frozen=True, kw_only=True)
class GradientEnergy(_RankingSelector):
    """Keep the channels with the largest norm of the gradient over space.

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
        return self._weights(signal.channel_norms)


@dataclass(frozen=True, kw_only=True)
class GradientTimesActivation(_RankingSelector):
    """Keep the channels with the largest sum over space of gradient times the convolution's output.

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
        output = _flat(_given(signal.observation, "observation"))
        return self._weights((at_least_float32(_flat(signal.gradient)) * output).sum(dim=2))


class _Centred(NamedTuple):
    """An output less its mean over space, (B, C, S), and its norm over space, (B, C); infinite where it is constant."""

    values: Tensor
    norms: Tensor


def _centred(output: Tensor) -> _Centred:
    """Take the mean over space off an output (B, C, S); of a single place there is none to take."""
    if output.shape[2] == 1:
        norms = output[:, :, 0].abs()
        return _Centred(output.clone(), norms.masked_fill(norms == 0, math.inf))
    mean = output.mean(dim=2, keepdim=True)
    centred = output - mean
    norms = torch.linalg.vector_norm(centred, dim=2)
    # A channel that is the same everywhere leaves the rounding of its mean.
    rounding = mean.squeeze(2).abs_().mul_(4 * torch.finfo(output.dtype).eps * math.sqrt(output.shape[2]))
    return _Centred(centred, norms.masked_fill_(norms <= rounding, math.inf))


@dataclass(frozen=True, kw_only=True)
class Evidence(_RankingSelector):
    """Keep the channels that raise the score where the layer as a whole does, and damp the other places.

    With `c` a channel's output less its mean over space, the layer's evidence at a place is `e`, the sum over all
    channels of gradient times `c`. A channel's score is its share of the positive evidence, summed over space and
    divided by the norm of `c`, so that strong channels are not kept for their strength alone. The mean is taken off
    because a level that is the same everywhere points nowhere. The gradient keeps its size at the places with the most
    evidence and is damped to a tenth at the others, before the channels are partitioned. Where no place has positive
    evidence all channels are kept.

    A copy of each output is held until the backward pass.

    Source: this package; the evidence is the map of Draelos, Carin (2020), "Use HiResCAM instead of Grad-CAM for
    faithful explanations of convolutional neural networks", of a centred output.

    Attributes:
        quantile: share of the channels at or above the threshold, in (0, 1].
        softness: width of the ramps around both thresholds, in [0, 1]; 0 is a hard cut. See `soft_weights`.
        positions: share of the places at or above their threshold, in (0, 1]; 1 leaves all as they are.

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

    quantile: float = 0.2
    softness: float = 1.0
    positions: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.positions) or not 0 < self.positions <= 1:
            raise SettingError(f"positions is {self.positions!r}, but it must lie in (0, 1]: the share of the places.")

    @property
    def defaults(self) -> EditDefaults:
        """The settings that suit this selector (see `Selector.defaults`)."""
        # Wide gates forget the class unless the evidence brings it back.
        return _defaults(self.softness, EditDefaults(layers=0.75, gates=8.0))

    def observe(self, output: Tensor) -> _Centred:
        """Take the mean over space off the output (see `Selector.observe`)."""
        # Soft gates listen to every call of the forward pass; this one is hidden from them, which saves time.
        with torch._C.DisableTorchFunction():
            return _centred(at_least_float32(_flat(output)))

    def select(self, signal: LayerSignal) -> Selection:
        """Rank by `sum_S relu(e) * g * c / |c|` with `e = sum_C g * c`, places by `e` (see `Selector.select`)."""
        centred, norms = cast(_Centred, _given(signal.observation, "observation"))
        products = at_least_float32(_flat(signal.gradient)) * centred
        evidence = products.sum(dim=1)
        with without_autocast(products.device.type):
            scores = torch.bmm(products, evidence.relu().unsqueeze(2)).squeeze(2).div_(norms)
        places = self._place_weights(evidence)
        if places is not None:
            places = places.reshape(len(places), *signal.gradient.shape[2:])
        return Selection(channel_weights=self._weights(scores), position_weights=places)

    def _place_weights(self, evidence: Tensor) -> Tensor | None:
        """Factor of each place, (B, S); None where all keep their gradient."""
        if self.positions == 1 or evidence.shape[1] == 1 or len(evidence) == 0:
            return None
        threshold = kth_largest(evidence, self.positions)
        if self.softness == 0:
            return (evidence >= threshold).to(evidence.dtype).mul_(1 - _DAMPING).add_(_DAMPING)
        steepness = (1 - _DAMPING) / self.softness / evidence.std(dim=1, keepdim=True)
        # Where the evidence is the same everywhere no place is damped.
        return (evidence - threshold).mul_(steepness).add_((1 + _DAMPING) / 2).nan_to_num_(1.0).clamp_(_DAMPING, 1)


# What is left of the gradient at places without evidence: nothing at all would leave some maps empty.
_DAMPING = 0.1


@dataclass(frozen=True, kw_only=True)
class RandomChannels(Selector):
    """Keep channels drawn at random: a control that any criterion must beat.

    The draw depends on the seed and the layer's name alone: every row and every call gets the same channels.

    Attributes:
        quantile: share of the channels to keep, in (0, 1].
        seed: seed of the draw.

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
        _check_quantile(self.quantile)
        if not is_whole_number(self.seed):
            raise SettingError(f"seed is {self.seed!r}, but it must be a whole number.")

    def select(self, signal: LayerSignal) -> Tensor:
        """Draw `max(1, int(quantile * C))` channels without replacement (see `Selector.select`)."""
        batch, channels = signal.gradient.shape[:2]
        # Python's own hash of a string differs between processes.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{signal.layer}".encode()))
        scores = torch.randperm(channels, generator=generator).unsqueeze(0)
        return (scores >= kth_largest(scores, self.quantile)).to(signal.gradient.device).expand(batch, channels)


@dataclass(frozen=True, eq=False)
class FixedChannels(Selector):
    """Keep given channels.

    Attributes:
        masks: boolean mask or weights in [0, 1] by layer name, each of shape (C,) for all rows, or (B, C).

    Raises:
        SettingError: if a mask holds anything else or has another number of dimensions.

    Example:
        >>> selector = FixedChannels({"conv": torch.tensor([0.2, 1.0])})
        >>> selector.select(LayerSignal(layer="conv", gradient=torch.ones(2, 2, 1)))
        tensor([[0.2000, 1.0000],
                [0.2000, 1.0000]])
    """

    masks: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        check_kind("masks", self.masks, Mapping, "give {name of a layer: mask}", wanted="a dictionary")
        for layer, mask in self.masks.items():
            check_kind(f"The mask of layer {layer!r}", mask, Tensor, "give a tensor (C,) or (B, C)")
            if not (mask.dtype == torch.bool or mask.is_floating_point()) or mask.dim() not in (1, 2):
                raise SettingError(
                    f"The mask of layer {layer!r} is {mask.dtype} of shape {tuple(mask.shape)}, "
                    "but it must be boolean or weights in [0, 1], of shape (C,) or (B, C)."
                )
            if mask.is_floating_point() and not bool(((mask >= 0) & (mask <= 1)).all()):
                raise SettingError(f"The mask of layer {layer!r} holds weights outside [0, 1]; clamp them.")

    def check(self, channels: Mapping[str, int]) -> None:
        """Every layer needs a mask of its own number of channels (see `Selector.check`)."""
        for layer, count in channels.items():
            if layer not in self.masks:
                raise SettingError(f"No mask is given for layer {layer!r}; give one, or leave the layer out of layers.")
            if self.masks[layer].shape[-1] != count:
                raise SettingError(
                    f"The mask of layer {layer!r} has {self.masks[layer].shape[-1]} channels, the layer has {count}; "
                    "give one of its own."
                )

    def select(self, signal: LayerSignal) -> Tensor:
        """Return the given mask for every row (see `Selector.select`)."""
        mask = self.masks[signal.layer].to(signal.gradient.device)
        batch, channels = signal.gradient.shape[:2]
        if mask.dim() == 2 and mask.shape[0] != batch:
            raise SettingError(
                f"The mask of layer {signal.layer!r} has {mask.shape[0]} rows, but the pass has {batch}; "
                "give a mask of shape (C,), or one row per row of the pass."
            )
        return mask.expand(batch, channels)


@dataclass(frozen=True, eq=False)
class _StatisticalSelector(Selector):
    """What the two selectors on channel statistics share: settings and their checks."""

    _part: ClassVar[Literal["class", "instance"]]
    statistics: ChannelStatistics
    quantile: float | None = field(default=None, kw_only=True)
    alpha: float | None = field(default=None, kw_only=True)
    softness: float = field(default=0.5, kw_only=True)
    normality_threshold: float | None = field(default=0.05, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.statistics, ChannelStatistics):
            raise StatisticsError(
                f"statistics is a {type(self.statistics).__name__}, but this selector needs ChannelStatistics."
            )
        _check_threshold(self.quantile, self.alpha)
        check_softness(self.softness)
        _check_normality_threshold(self.normality_threshold)

    @property
    def defaults(self) -> EditDefaults:
        """The settings that suit this selector (see `Selector.defaults`)."""
        return _defaults(self.softness)

    def check(self, channels: Mapping[str, int]) -> None:
        """Every layer needs statistics of its own number of channels (see `Selector.check`)."""
        self.statistics.require(self._part)
        others = [layer for layer in channels if layer not in self.statistics]
        if others:
            held = list(self.statistics)
            raise StatisticsError(
                f"The statistics are of {len(held)} convolutions, from {held[0]!r} to {held[-1]!r}, but {len(others)} "
                f"others are chosen, such as {others[0]!r}; choose among theirs, or collect statistics of all."
            )
        for layer, count in channels.items():
            if self.statistics[layer].channels != count:
                raise StatisticsError(
                    f"The statistics of layer {layer!r} have {self.statistics[layer].channels} channels, "
                    f"the layer has {count}; they were collected on another model."
                )

    def _weights(self, scores: Tensor, allowed: Tensor, score_at_alpha: float | None) -> Tensor:
        """Weigh the channels around the k-th best score, or the score at p = alpha; 0 where they are not allowed."""
        threshold = score_at_alpha if self.quantile is None else kth_largest(scores, self.quantile)
        gated = torch.where(allowed, scores, -math.inf)
        weights = soft_weights(gated, cast(Tensor | float, threshold), self.softness)
        return weights & allowed if self.softness == 0 else weights

    def _gate(self, layer: AnyLayerStatistics) -> Tensor:
        """Channels whose GAP is not normally distributed over the data set, shape (C,)."""
        if self.normality_threshold is None:
            return torch.ones_like(layer.shapiro_p, dtype=torch.bool)
        return layer.shapiro_p < self.normality_threshold


@dataclass(frozen=True, eq=False)
class ClassWise(_StatisticalSelector):
    """Keep the channels that respond more to the explained class than to all other classes.

    Channels are ranked by the log p of a one-sided t-test over the data set; only those whose distribution is not
    normal (Shapiro-Wilk p below the threshold) are kept. The same channels serve every image of a class.

    Attributes:
        statistics: channel statistics that hold every chosen layer.
        quantile: share of the channels at or above the threshold, in (0, 1]; or
        alpha: p-value at the threshold, in (0, 1). Exactly one of the two is given.
        softness: width of the ramp around the threshold, in [0, 1]; 0 is the published hard cut. See `soft_weights`.
        normality_threshold: the gate on the Shapiro-Wilk p-value, in (0, 1]; None switches it off.
        test: `"welch"` or `"student"`.

    Raises:
        SettingError: if a setting is out of range.
        StatisticsError: if `statistics` are no channel statistics.

    Example:
        >>> from parchgrad.statistics import ChannelStatistics, LayerStatistics
        >>> layer = LayerStatistics(
        ...     count=torch.tensor(40), mean=torch.ones(2), std=torch.ones(2), class_count=torch.tensor([20, 20]),
        ...     class_mean=torch.tensor([[2.0, 0.0], [0.0, 2.0]]), class_variance=torch.ones(2, 2),
        ...     shapiro_p=torch.tensor([0.01, 0.01]))
        >>> selector = ClassWise(ChannelStatistics({"conv": layer}), quantile=0.5, softness=0)
        >>> selector.select(LayerSignal(layer="conv", gradient=torch.ones(2, 2, 1), classes=torch.tensor([1, 0])))
        tensor([[False,  True],
                [ True, False]])
    """

    needs_class: ClassVar[bool] = True
    _part: ClassVar[Literal["class", "instance"]] = "class"
    test: TTest = field(default="welch", kw_only=True)
    _cached: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_test(self.test)
        self.statistics.warn_of_fallback(self.test)

    def check(self, channels: Mapping[str, int]) -> None:
        """Every layer needs statistics of its own number of channels, and of enough of them (see `Selector.check`)."""
        super().check(channels)
        for name in channels:
            layer = self.statistics[name]
            if isinstance(layer, RankedLayerStatistics) and (self.quantile or 0) > layer.share:
                raise StatisticsError(
                    f"The statistics of layer {name!r} are compact: they rank the best {layer.share:.0%} of the "
                    f"channels only, but quantile is {self.quantile}; lower it, or collect full statistics."
                )

    def check_classes(self, classes: int) -> None:
        """The statistics must know as many classes as the model (see `Selector.check_classes`)."""
        if classes != self.statistics.model_classes:
            raise StatisticsError(
                f"The statistics are of {self.statistics.model_classes} classes, but the model's output has {classes}; "
                "collect statistics on this model."
            )

    def select(self, signal: LayerSignal) -> Tensor:
        """Look the rows' classes up in the weights for all classes (see `Selector.select`)."""
        classes = _given(signal.classes, "classes")
        if self.statistics.class_indices is not None:
            classes = self._columns(classes)
        key = (signal.layer, signal.gradient.device)
        if key not in self._cached:
            self._cached[key] = self.class_weights(signal.layer).to(signal.gradient.device)
        return self._cached[key][classes]

    def _columns(self, classes: Tensor) -> Tensor:
        """The columns of some of the model's classes, where the statistics do not hold all."""
        held = torch.tensor(self.statistics.class_indices, device=classes.device)
        columns = torch.searchsorted(held, classes).clamp(max=len(held) - 1)
        if not torch.equal(held[columns], classes):
            # Names the class that is missing.
            self.statistics.columns(classes.tolist())
        return columns

    def check_targets(self, targets: Sequence[int]) -> None:
        """The statistics must hold images of each class (see `Selector.check_targets`)."""
        # Whether the model has the class at all is for others to say.
        classes = [index for index in targets if 0 <= index < self.statistics.model_classes]
        known = self._known[self.statistics.columns(classes)].tolist()
        unknown = next((index for index, found in zip(classes, known, strict=True) if not found), None)
        if unknown is not None:
            raise StatisticsError(
                f"The statistics hold no image of class {unknown}, so that nothing is known about it; collect them "
                "with images of this class, or with predicted labels."
            )

    @cached_property
    def _known(self) -> Tensor:
        """Classes of which the statistics hold images, shape (K,)."""
        known = torch.zeros(self.statistics.classes, dtype=torch.bool)
        for held in self.statistics.values():
            if isinstance(held, LayerStatistics):
                return held.class_count > 0
            # Ranked statistics keep no counts; a layer of dead channels says nothing of any class.
            known |= (held.class_log_p(self.test) < 0).any(dim=0)
            if bool(known.all()):
                break
        return known

    def class_weights(self, layer: str) -> Tensor:
        """Weights of the channels for each class that the statistics hold, in [0, 1], or a boolean mask; shape (K, C).

        All channels of a class about which nothing is known weigh the same: p is 1 for every channel. Channels that
        compact statistics do not hold weigh 0, also where a soft ramp would reach them.
        """
        held = self.statistics[layer]
        log_p = held.class_log_p(self.test).T
        if self.alpha is not None and isinstance(held, RankedLayerStatistics) and held.share < 1:
            # Where all that are held pass, others that are not held may too.
            passing = (log_p <= math.log(self.alpha)) | (log_p == 0)
            if bool((passing.all(dim=1) & (log_p < 0).any(dim=1)).any()):
                raise StatisticsError(
                    f"The statistics of layer {layer!r} are compact, with too few channels for alpha={self.alpha}; "
                    "lower it, use a quantile, or collect full statistics."
                )
        allowed = self._gate(held) & (log_p < 0).any(dim=1, keepdim=True)
        weights = self._weights(-log_p, allowed, None if self.alpha is None else -math.log(self.alpha))
        return weights if self.softness == 0 else weights.float()


@dataclass(frozen=True, eq=False)
class InstanceWise(_StatisticalSelector):
    """Keep the channels that respond unusually strongly to this very image.

    Channels are ranked by the upper-tail p-value of `(GAP - mean) / std` under a standard normal distribution, with
    the same gate on normality as `ClassWise`. Needs no class.

    Attributes:
        statistics: channel statistics that hold every chosen layer.
        quantile: share of the channels at or above the threshold, in (0, 1]; or
        alpha: p-value at the threshold, in (0, 1). Exactly one of the two is given.
        softness: width of the ramp around the threshold, in [0, 1]; 0 is the published hard cut. See `soft_weights`.
        normality_threshold: the gate on the Shapiro-Wilk p-value, in (0, 1]; None switches it off.

    Raises:
        SettingError: if a setting is out of range.
        StatisticsError: if `statistics` are no channel statistics.

    Example:
        >>> from parchgrad.statistics import ChannelStatistics, LayerStatistics
        >>> layer = LayerStatistics(
        ...     count=torch.tensor(40), mean=torch.ones(2), std=torch.ones(2), class_count=torch.tensor([20, 20]),
        ...     class_mean=torch.ones(2, 2), class_variance=torch.ones(2, 2), shapiro_p=torch.tensor([0.01, 0.01]))
        >>> selector = InstanceWise(ChannelStatistics({"conv": layer}), alpha=0.05, softness=0)
        >>> gap = selector.observe(torch.tensor([[[1.0, 2.0], [-9.0, 8.0]]]))
        >>> selector.select(LayerSignal(layer="conv", gradient=torch.ones(1, 2, 2), observation=gap))
        tensor([[False,  True]])
    """

    _part: ClassVar[Literal["class", "instance"]] = "instance"

    def observe(self, output: Tensor) -> Tensor:
        """Keep the GAP: the mean over space of relu(output), shape (B, C)."""
        return at_least_float32(output).relu().flatten(2).mean(dim=2)

    def select(self, signal: LayerSignal) -> Tensor:
        """Rank by the standard score, which orders channels as the p-value does (see `Selector.select`)."""
        gap = _given(signal.observation, "observation")
        layer = self.statistics[signal.layer]
        # Statistics without these were refused by `check`.
        mean, std = cast(Tensor, layer.mean).to(gap), cast(Tensor, layer.std).to(gap)
        # A constant channel has p = 1: it never stands out.
        score = torch.where(std > 0, (gap - mean) / std, -math.inf)
        allowed = (std > 0) & self._gate(layer).to(gap.device)
        return self._weights(score, allowed, None if self.alpha is None else -float(special.ndtri(self.alpha)))


SELECTORS_BY_NAME: Mapping[str, type[_RankingSelector | RandomChannels]] = {
    "energy": GradientEnergy,
    "activation": GradientTimesActivation,
    "evidence": Evidence,
    "random": RandomChannels,
}
"""Selectors that need no statistics, by the short names that command lines and pages use."""

STATISTICAL_SELECTORS = ("class", "instance")
"""Short names of the selectors that need channel statistics besides."""
_STATISTICAL_DEFAULTS: Mapping[str, float] = {"quantile": 0.1, "softness": 0.5}


def default_setting(name: str, setting: str) -> float:
    """The value that a selector has for a setting unless another is asked for; 0 where it has no such setting.

    Args:
        name: a key of `SELECTORS_BY_NAME` or `STATISTICAL_SELECTORS`.
        setting: `"quantile"` or `"softness"`.

    Example:
        >>> default_setting("energy", "softness"), default_setting("evidence", "softness")
        (0.5, 1.0)
    """
    if name in SELECTORS_BY_NAME:
        return float(getattr(SELECTORS_BY_NAME[name], setting, 0.0))
    return _STATISTICAL_DEFAULTS[setting]


def default_edit(name: str, *, softness: float | None = None) -> EditDefaults:
    """The settings that suit a selector, by its short name (see `Selector.defaults`).

    Args:
        name: a key of `SELECTORS_BY_NAME` or `STATISTICAL_SELECTORS`.
        softness: see `make_selector`; a hard cut suits other settings.

    Example:
        >>> default_edit("evidence").layers, default_edit("energy", softness=0).gates
        (0.75, 0.0)
    """
    softness = default_setting(name, "softness") if softness is None else softness
    if name in STATISTICAL_SELECTORS:
        return _defaults(softness)
    return make_selector(name, softness=softness).defaults


def make_selector(
    name: str,
    *,
    quantile: float | None = None,
    softness: float | None = None,
    statistics: ChannelStatistics | None = None,
    seed: int = 0,
) -> Selector:
    """Make a selector by its short name.

    Args:
        name: a key of `SELECTORS_BY_NAME` or `STATISTICAL_SELECTORS`.
        quantile: share of the channels at or above the threshold, in (0, 1]; None takes the selector's own.
        softness: width of the ramp around the threshold, in [0, 1]; None takes the selector's own. Random channels
            have no ramp.
        statistics: channel statistics, for the selectors that need them.
        seed: random seed of `"random"`.

    Raises:
        SettingError: if the name is unknown or a setting is out of range.
        StatisticsError: if statistics are needed and not given.

    Example:
        >>> make_selector("energy", quantile=0.2)
        GradientEnergy(quantile=0.2, softness=0.5)
    """
    known = (*SELECTORS_BY_NAME, *STATISTICAL_SELECTORS)
    if name not in known:
        raise SettingError(f"selector is {name!r}, but it must be one of {', '.join(known)}.")
    quantile = default_setting(name, "quantile") if quantile is None else quantile
    softness = default_setting(name, "softness") if softness is None else softness
    if name == "random":
        return RandomChannels(quantile=quantile, seed=seed)
    if name in SELECTORS_BY_NAME:
        ranking = cast(type[_RankingSelector], SELECTORS_BY_NAME[name])
        return ranking(quantile=quantile, softness=softness)
    if statistics is None:
        raise StatisticsError(f"The selector {name!r} needs channel statistics; collect some, or choose 'energy'.")
    if name == "class":
        return ClassWise(statistics, quantile=quantile, softness=softness, test=statistics.test)
    return InstanceWise(statistics, quantile=quantile, softness=softness)


def _given(value: Any, name: str) -> Any:
    if value is None:
        raise SettingError(f"The layer signal comes without {name}, which this selector needs; see LayerSignal.")
    return value


def _flat(gradient: Tensor) -> Tensor:
    """The positions in one dimension, shape (B, C, S)."""
    return gradient.flatten(2) if gradient.dim() > 2 else gradient.unsqueeze(2)
