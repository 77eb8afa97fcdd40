"""The selectors: which channels of a layer matter for the explained class, per row of the batch."""

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, cast

import torch
from scipy import special
from torch import Tensor

from parchgrad.checks import check_kind, is_number, is_whole_number
from parchgrad.errors import SettingError, StatisticsError
from parchgrad.partition import at_least_float32, safe_norm, without_autocast
from parchgrad.statistics import ChannelStatistics, LayerStatistics, RankedLayerStatistics
from parchgrad.statistics.layer import AnyLayerStatistics
from parchgrad.statistics.tests import TTest, check_test

__all__ = [
    "SELECTORS_BY_NAME",
    "STATISTICAL_SELECTORS",
    "ClassWise",
    "Evidence",
    "FixedChannels",
    "GradientEnergy",
    "GradientTimesActivation",
    "InstanceWise",
    "LayerSignal",
    "RandomChannels",
    "Selection",
    "Selector",
    "default_quantile",
    "keep_best",
    "make_selector",
]


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerSignal:
    """What a selector sees of one convolution in one backward pass.

    Attributes:
        layer: name of the convolution in the model.
        gradient: gradient at its output, shape (B, C, *S).
        observation: what `Selector.observe` kept of its output in the forward pass.
        classes: class explained in each row, shape (B,), integer; None for selectors that do not ask for it.
    """

    layer: str
    gradient: Tensor
    observation: Tensor | None = None
    classes: Tensor | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Selection:
    """What a selector chose in one convolution.

    Attributes:
        channel_mask: the kept channels, boolean, shape (B, C).
        position_weights: what the gradient is multiplied by at each place, before its channels are partitioned, shape
            (B, *S); None leaves it as it is.
    """

    channel_mask: Tensor
    position_weights: Tensor | None = None


class Selector(ABC):
    """Chooses the channels that are kept (H), per row and layer. Subclass it to bring a criterion of your own.

    A selector holds settings, statistics and what follows from them, never the state of a pass, so that threads may
    share it.

    Example:
        >>> class FirstChannel(Selector):
        ...     def select(self, signal):
        ...         mask = torch.zeros(signal.gradient.shape[:2], dtype=torch.bool)
        ...         mask[:, 0] = True
        ...         return mask
        >>> FirstChannel().select(LayerSignal(layer="conv", gradient=torch.ones(1, 3, 2, 2)))
        tensor([[ True, False, False]])
    """

    needs_class: ClassVar[bool] = False
    """Whether `select` reads `LayerSignal.classes`."""

    def check(self, channels: Mapping[str, int]) -> None:  # noqa: B027 - overriding it is optional
        """Raise a `ParchGradError` if this selector cannot serve layers with these names and numbers of channels."""

    def check_classes(self, classes: int) -> None:  # noqa: B027 - overriding it is optional
        """Raise a `ParchGradError` if this selector cannot serve a model with this many classes."""

    def check_targets(self, targets: Sequence[int]) -> None:  # noqa: B027 - overriding it is optional
        """Raise a `ParchGradError` if this selector knows nothing of one of these classes of the model."""

    def observe(self, output: Tensor) -> Tensor | None:
        """Keep what `select` needs of a convolution's output (B, C, *S); called in the forward pass, detached.

        The output may be changed in place afterwards, so whatever is kept must be a new tensor.
        """
        return None

    def partition(self, signal: LayerSignal) -> "Selection":
        """Return the mask, and what becomes of the places; to be overridden by a selector that weighs these too."""
        return Selection(channel_mask=self.select(signal))

    @abstractmethod
    def select(self, signal: LayerSignal) -> Tensor:
        """Return the mask of the kept channels, boolean, shape (B, C)."""


def keep_best(scores: Tensor, quantile: float) -> Tensor:
    """Mark the `max(1, int(quantile * C))` largest scores of each row, ties at the last place included.

    Args:
        scores: larger is better, shape (B, C).
        quantile: share of the channels to keep, in (0, 1].

    Returns:
        Boolean mask, shape (B, C).

    Example:
        >>> keep_best(torch.tensor([[3.0, 1.0, 2.0, 2.0]]), 0.5)
        tensor([[ True, False,  True,  True]])
    """
    return scores >= scores.topk(_kept_count(scores, quantile), dim=1).values[:, -1:]


def _kept_count(scores: Tensor, quantile: float) -> int:
    return max(1, int(quantile * scores.shape[1]))


def _check_quantile(quantile: float) -> None:
    if not is_number(quantile) or not 0 < quantile <= 1:
        raise SettingError(f"quantile is {quantile!r}, but it must lie in (0, 1]: the share of channels that is kept.")


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


@dataclass(frozen=True, kw_only=True)
class GradientEnergy(Selector):
    """Keep the channels with the largest energy of the gradient, the sum of its squares over space.

    Attributes:
        quantile: share of the channels to keep, in (0, 1].

    Raises:
        SettingError: if `quantile` is out of range.

    Example:
        >>> gradient = torch.tensor([[[1.0, -3.0], [2.0, 2.0], [0.0, 1.0]]])
        >>> GradientEnergy(quantile=0.34).select(LayerSignal(layer="conv", gradient=gradient))
        tensor([[ True, False, False]])
    """

    quantile: float = 0.1

    def __post_init__(self) -> None:
        _check_quantile(self.quantile)

    def select(self, signal: LayerSignal) -> Tensor:
        """Rank by `sum_S g^2` (see `Selector.select`)."""
        return _keep_most_energy(_flat(signal.gradient), self.quantile)


@dataclass(frozen=True, kw_only=True)
class GradientTimesActivation(Selector):
    """Keep the channels with the largest sum over space of gradient times the convolution's output.

    The sum is signed: channels that speak against the class rank last. A copy of each output is held until the
    backward pass, since the network may overwrite it.

    Attributes:
        quantile: share of the channels to keep, in (0, 1].

    Raises:
        SettingError: if `quantile` is out of range.

    Example:
        >>> selector = GradientTimesActivation(quantile=0.5)
        >>> output, gradient = torch.tensor([[[2.0], [5.0]]]), torch.tensor([[[1.0], [-1.0]]])
        >>> selector.select(LayerSignal(layer="conv", gradient=gradient, observation=selector.observe(output)))
        tensor([[ True, False]])
    """

    quantile: float = 0.1

    def __post_init__(self) -> None:
        _check_quantile(self.quantile)

    def observe(self, output: Tensor) -> Tensor:
        """Copy the output, which an in-place operation may overwrite."""
        return output.clone()

    def select(self, signal: LayerSignal) -> Tensor:
        """Rank by `sum_S g * z` (see `Selector.select`)."""
        output = _flat(_given(signal.observation, "observation"))
        return keep_best((_unit_rows(signal.gradient) * output).sum(dim=2), self.quantile)


@dataclass(frozen=True, kw_only=True)
class Evidence(Selector):
    """Keep the channels that speak for the class where the layer as a whole does, and damp the other places.

    With `c` a channel's output less its mean over space, the layer's evidence at a place is `e`, what gradient times
    `c` sums to over all channels. A channel's score is its own part in the positive evidence, summed over space and
    divided by the norm of `c`, so that strong channels are not kept for their strength alone. The mean is taken off
    since a level that is the same everywhere points nowhere. The places of most evidence keep their gradient, that of
    the others is damped to a tenth before the channels are partitioned: what is damped is lost to the layer, whose
    variance the re-scaling of channels does not bring back. Where no place speaks for the class all channels are kept.

    Best on the upper three quarters of the convolutions: `layers=0.75`. A copy of each output is held until the
    backward pass.

    Source: this package; the evidence is the map of Draelos, Carin (2020), "Use HiResCAM instead of Grad-CAM for
    faithful explanations of convolutional neural networks", of a centred output.

    Attributes:
        quantile: share of the channels to keep, in (0, 1].
        positions: share of the places to keep undamped, in (0, 1]; 1 leaves all as they are.

    Raises:
        SettingError: if a setting is out of range.

    Example:
        >>> selector = Evidence(quantile=0.5, positions=0.34)
        >>> output = torch.tensor([[[5.0, 5.0, 8.0], [9.0, 9.0, 9.0]]])
        >>> gradient = torch.tensor([[[0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]])
        >>> signal = LayerSignal(layer="conv", gradient=gradient, observation=selector.observe(output))
        >>> found = selector.partition(signal)
        >>> found.channel_mask, found.position_weights
        (tensor([[ True, False]]), tensor([[0.1000, 0.1000, 1.0000]]))
    """

    quantile: float = 0.2
    positions: float = 0.4

    def __post_init__(self) -> None:
        _check_quantile(self.quantile)
        if not is_number(self.positions) or not 0 < self.positions <= 1:
            raise SettingError(f"positions is {self.positions!r}, but it must lie in (0, 1]: the share of the places.")

    def observe(self, output: Tensor) -> Tensor:
        """Take the mean over space off the output, shape (B, C, S); of a single place there is none to take.

        Each row may come in a unit of its own, which no ranking depends on.
        """
        wide = at_least_float32(_flat(output))
        if wide.shape[2] == 1:
            return wide.clone() if _is_safe(wide) else _in_unit(wide)
        centred = _centred(wide)
        return centred if _is_safe(torch.linalg.vector_norm(centred, dim=2)) else _centred(_in_unit(wide))

    def select(self, signal: LayerSignal) -> Tensor:
        """Rank by `sum_S relu(e) * g * c / |c|` with `e = sum_C g * c` (see `Selector.select`)."""
        return self.partition(signal).channel_mask

    def partition(self, signal: LayerSignal) -> Selection:
        """Rank the channels, and keep the places of most `e` (see `Selector.partition`)."""
        centred = _given(signal.observation, "observation")
        gradient = at_least_float32(_flat(signal.gradient))
        said = gradient * centred
        evidence = said.sum(dim=1)
        if not _is_safe(evidence):
            said = _in_unit(gradient) * centred
            evidence = said.sum(dim=1)
        norm = torch.linalg.vector_norm(centred, dim=2)
        with without_autocast(said.device.type):
            scores = torch.matmul(said, evidence.relu().unsqueeze(2)).squeeze(2)
        channels = keep_best(scores / torch.where(norm > 0, norm, torch.ones_like(norm)), self.quantile)
        if self.positions == 1:
            return Selection(channel_mask=channels)
        weights = torch.full_like(evidence, _DAMPING).masked_fill_(keep_best(evidence, self.positions), 1)
        places = weights.reshape(len(weights), *signal.gradient.shape[2:])
        return Selection(channel_mask=channels, position_weights=places)


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
        return keep_best(scores, self.quantile).to(signal.gradient.device).expand(batch, channels)


@dataclass(frozen=True, eq=False)
class FixedChannels(Selector):
    """Keep given channels.

    Attributes:
        masks: boolean mask by layer name, each of shape (C,) for all rows, or (B, C).

    Raises:
        SettingError: if a mask is not boolean or has another number of dimensions.

    Example:
        >>> selector = FixedChannels({"conv": torch.tensor([False, True])})
        >>> selector.select(LayerSignal(layer="conv", gradient=torch.ones(2, 2, 1)))
        tensor([[False,  True],
                [False,  True]])
    """

    masks: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        check_kind("masks", self.masks, Mapping, "give {name of a layer: mask}", wanted="a dictionary")
        for layer, mask in self.masks.items():
            check_kind(f"The mask of layer {layer!r}", mask, Tensor, "give a boolean tensor (C,) or (B, C)")
            if mask.dtype != torch.bool or mask.dim() not in (1, 2):
                raise SettingError(
                    f"The mask of layer {layer!r} is {mask.dtype} of shape {tuple(mask.shape)}, "
                    "but it must be boolean of shape (C,) or (B, C)."
                )

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

    statistics: ChannelStatistics
    quantile: float | None = field(default=None, kw_only=True)
    alpha: float | None = field(default=None, kw_only=True)
    normality_threshold: float | None = field(default=0.05, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.statistics, ChannelStatistics):
            raise StatisticsError(
                f"statistics is a {type(self.statistics).__name__}, but this selector needs ChannelStatistics."
            )
        _check_threshold(self.quantile, self.alpha)
        _check_normality_threshold(self.normality_threshold)

    def check(self, channels: Mapping[str, int]) -> None:
        """Every layer needs statistics of its own number of channels (see `Selector.check`)."""
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

    def _cut(self, scores: Tensor, score_at: Callable[[float], float]) -> Tensor:
        """Keep the best scores by number, or those at least as good as the score at p = alpha."""
        if self.quantile is not None:
            return keep_best(scores, self.quantile)
        return scores >= score_at(cast(float, self.alpha))

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
        quantile: share of the channels to keep, in (0, 1]; or
        alpha: largest p-value to keep, in (0, 1). Exactly one of the two is given.
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
        >>> selector = ClassWise(ChannelStatistics({"conv": layer}), quantile=0.5)
        >>> selector.select(LayerSignal(layer="conv", gradient=torch.ones(2, 2, 1), classes=torch.tensor([1, 0])))
        tensor([[False,  True],
                [ True, False]])
    """

    needs_class: ClassVar[bool] = True
    test: TTest = field(default="welch", kw_only=True)
    _masks: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, init=False, repr=False)

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
        """Look the rows' classes up in the masks of all classes (see `Selector.select`)."""
        classes = _given(signal.classes, "classes")
        if self.statistics.class_indices is not None:
            classes = self._columns(classes)
        key = (signal.layer, signal.gradient.device)
        if key not in self._masks:
            self._masks[key] = self.class_masks(signal.layer).to(signal.gradient.device)
        return self._masks[key][classes]

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

    def class_masks(self, layer: str) -> Tensor:
        """Mark the channels kept for each class that the statistics hold, shape (K, C).

        None are kept for a class about which nothing is known: p is 1 for every channel.
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
        kept = self._cut(-log_p, lambda alpha: -math.log(alpha)) & self._gate(held)
        return kept & (log_p < 0).any(dim=1, keepdim=True)


@dataclass(frozen=True, eq=False)
class InstanceWise(_StatisticalSelector):
    """Keep the channels that respond unusually strongly to this very image.

    Channels are ranked by the upper-tail p-value of `(GAP - mean) / std` under a standard normal distribution, with
    the same gate on normality as `ClassWise`. Needs no class.

    Attributes:
        statistics: channel statistics that hold every chosen layer.
        quantile: share of the channels to keep, in (0, 1]; or
        alpha: largest p-value to keep, in (0, 1). Exactly one of the two is given.
        normality_threshold: the gate on the Shapiro-Wilk p-value, in (0, 1]; None switches it off.

    Raises:
        SettingError: if a setting is out of range.
        StatisticsError: if `statistics` are no channel statistics.

    Example:
        >>> from parchgrad.statistics import ChannelStatistics, LayerStatistics
        >>> layer = LayerStatistics(
        ...     count=torch.tensor(40), mean=torch.ones(2), std=torch.ones(2), class_count=torch.tensor([20, 20]),
        ...     class_mean=torch.ones(2, 2), class_variance=torch.ones(2, 2), shapiro_p=torch.tensor([0.01, 0.01]))
        >>> selector = InstanceWise(ChannelStatistics({"conv": layer}), alpha=0.05)
        >>> gap = selector.observe(torch.tensor([[[1.0, 2.0], [-9.0, 8.0]]]))
        >>> selector.select(LayerSignal(layer="conv", gradient=torch.ones(1, 2, 2), observation=gap))
        tensor([[False,  True]])
    """

    def observe(self, output: Tensor) -> Tensor:
        """Keep the GAP: the mean over space of relu(output), shape (B, C)."""
        return at_least_float32(output).relu().flatten(2).mean(dim=2)

    def select(self, signal: LayerSignal) -> Tensor:
        """Rank by the standard score, which orders channels as the p-value does (see `Selector.select`)."""
        gap = _given(signal.observation, "observation")
        layer = self.statistics[signal.layer]
        mean, std = layer.mean.to(gap), layer.std.to(gap)
        # A constant channel has p = 1: it never stands out.
        score = torch.where(std > 0, (gap - mean) / std, -math.inf)
        kept = self._cut(score, lambda alpha: -float(special.ndtri(alpha)))
        return kept & (std > 0) & self._gate(layer).to(gap.device)


SELECTORS_BY_NAME: Mapping[str, type[GradientEnergy | GradientTimesActivation | Evidence | RandomChannels]] = {
    "energy": GradientEnergy,
    "activation": GradientTimesActivation,
    "evidence": Evidence,
    "random": RandomChannels,
}
"""Selectors that need nothing but a quantile, by the short names that command lines and pages use."""

STATISTICAL_SELECTORS = ("class", "instance")
"""Short names of the selectors that need channel statistics besides."""
_STATISTICAL_QUANTILE = 0.1


def default_quantile(name: str) -> float:
    """Share of the channels that a selector keeps unless another is asked for.

    Args:
        name: a key of `SELECTORS_BY_NAME` or `STATISTICAL_SELECTORS`.

    Example:
        >>> default_quantile("energy"), default_quantile("evidence"), default_quantile("class")
        (0.1, 0.2, 0.1)
    """
    return SELECTORS_BY_NAME[name].quantile if name in SELECTORS_BY_NAME else _STATISTICAL_QUANTILE


def make_selector(
    name: str, *, quantile: float | None = None, statistics: ChannelStatistics | None = None, seed: int = 0
) -> Selector:
    """Make a selector by its short name.

    Args:
        name: a key of `SELECTORS_BY_NAME` or `STATISTICAL_SELECTORS`.
        quantile: share of the channels to keep, in (0, 1]; None takes the selector's own.
        statistics: channel statistics, for the selectors that need them.
        seed: for the selector that draws.

    Raises:
        SettingError: if the name is unknown or `quantile` is out of range.
        StatisticsError: if statistics are needed and not given.

    Example:
        >>> make_selector("energy", quantile=0.2)
        GradientEnergy(quantile=0.2)
    """
    known = (*SELECTORS_BY_NAME, *STATISTICAL_SELECTORS)
    if name not in known:
        raise SettingError(f"selector is {name!r}, but it must be one of {', '.join(known)}.")
    quantile = default_quantile(name) if quantile is None else quantile
    if name == "random":
        return RandomChannels(quantile=quantile, seed=seed)
    if name in SELECTORS_BY_NAME:
        return SELECTORS_BY_NAME[name](quantile=quantile)
    if statistics is None:
        raise StatisticsError(f"The selector {name!r} needs channel statistics; collect some, or choose 'energy'.")
    if name == "class":
        return ClassWise(statistics, quantile=quantile, test=statistics.test)
    return InstanceWise(statistics, quantile=quantile)


def _given(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise SettingError(f"The layer signal comes without {name}, which this selector needs; see LayerSignal.")
    return value


# Largest norms of a row between which no square that counts vanishes or overflows in float32, and the share of the
# largest below which squares may: so neither the scale of a row nor the rows beside it change its ranking.
_SAFE_NORMS = (2.0**-30, 2.0**60)
_NEGLIGIBLE = 2.0**-22


def _keep_most_energy(flat: Tensor, quantile: float) -> Tensor:
    """`keep_best` of the energies of the channels of (B, C, S), at any scale of the rows, shape (B, C)."""
    if flat.device.type != "cpu" or flat.dtype == torch.float64:
        return keep_best(safe_norm(flat, dim=2), quantile)
    # A wider type would cost a copy of the gradient, and reading a number is no wait on the CPU.
    wide = at_least_float32(flat)
    norms: Tensor = torch.linalg.vector_norm(wide, dim=2)
    best = norms.topk(_kept_count(norms, quantile), dim=1).values
    largest = best[:, 0].tolist()
    if largest and not _SAFE_NORMS[0] < min(largest) <= max(largest) < _SAFE_NORMS[1]:
        peak = torch.maximum(wide.amax(dim=(1, 2), keepdim=True), -wide.amin(dim=(1, 2), keepdim=True))
        # A power of two changes no digit; within the normal range, it need not bring the peak to 1.
        exponent = torch.frexp(peak).exponent.clamp_(-126, 126)
        norms = torch.linalg.vector_norm(wide * torch.ldexp(torch.ones_like(peak), -exponent), dim=2)
        best = norms.topk(best.shape[1], dim=1).values
    mask = norms >= best[:, -1:]
    lost = best[:, -1:] < best[:, :1] * _NEGLIGIBLE
    if bool(lost.any()):
        mask = torch.where(lost, keep_best(safe_norm(flat, dim=2), quantile), mask)
    return mask


def _flat(gradient: Tensor) -> Tensor:
    """The positions in one dimension, shape (B, C, S)."""
    return gradient.flatten(2) if gradient.dim() > 2 else gradient.unsqueeze(2)


# What is left of the gradient at places without evidence: nothing at all would leave some maps empty.
_DAMPING = 0.1


# Peaks of a row between which neither products nor squares of what counts vanish or overflow in float32.
_SAFE_PEAKS = (2.0**-30, 2.0**30)


def _is_safe(values: Tensor) -> bool:
    """Whether the peaks of all rows are safe; unknown on a GPU, where reading a number is a wait."""
    if values.device.type != "cpu" or values.numel() == 0:
        return False
    peaks = torch.linalg.vector_norm(values.flatten(1), math.inf, dim=1)
    return bool((peaks >= _SAFE_PEAKS[0]).all() and (peaks <= _SAFE_PEAKS[1]).all())


def _centred(values: Tensor) -> Tensor:
    """Each channel of (B, C, S) less its mean over space; zero where it is the same everywhere."""
    mean = values.mean(dim=2, keepdim=True)
    centred = values - mean
    # What a channel that is the same everywhere leaves is the rounding of its mean.
    rounding = mean.abs() * (4 * torch.finfo(values.dtype).eps * math.sqrt(values.shape[2]))
    constant = torch.linalg.vector_norm(centred, dim=2, keepdim=True) <= rounding
    if centred.device.type != "cpu" or bool(constant.any()):
        centred.masked_fill_(constant, 0)
    return centred


def _in_unit(values: Tensor) -> Tensor:
    """Each row of (B, C, S) divided by the power of two near its peak, which changes no digit."""
    peak = torch.linalg.vector_norm(values, math.inf, dim=(1, 2), keepdim=True)
    # The inverse of the smallest peaks overflows, and nothing but zeros has no exponent.
    exponent = torch.frexp(peak).exponent.clamp_(-126, 126)
    return values * torch.ldexp(torch.ones_like(peak), -exponent)


def _unit_rows(gradient: Tensor) -> Tensor:
    """Each row divided by its largest magnitude, at least float32, shape (B, C, S): squares must not underflow."""
    wide = at_least_float32(_flat(gradient))
    peak = torch.linalg.vector_norm(wide, math.inf, dim=(1, 2), keepdim=True)
    return wide / torch.where(peak > 0, peak, torch.ones_like(peak))
