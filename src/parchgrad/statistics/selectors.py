"""Selectors based on channel statistics, and the look-up of all selectors by their short names."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import ClassVar, Literal, cast

import torch
from scipy import special
from torch import Tensor

from parchgrad._io.checks import is_number
from parchgrad.core.partition import at_least_float32
from parchgrad.core.selectors import (
    REGISTERED,
    LayerSignal,
    RegisteredSelector,
    Selector,
    check_quantile,
    check_softness,
    given,
    kth_largest,
    register_selector,
    soft_weights,
)
from parchgrad.errors import SettingError, StatisticsError
from parchgrad.statistics.layer import AnyLayerStatistics, LayerStatistics, RankedLayerStatistics
from parchgrad.statistics.store import ChannelStatistics
from parchgrad.statistics.t_tests import TTest, check_test

__all__ = ["ClassWise", "InstanceWise", "find_selector", "registered_selectors"]


def _check_threshold(quantile: float | None, alpha: float | None) -> None:
    """Raise `SettingError` unless one of the two thresholds is given and valid."""
    if quantile is not None and alpha is not None:
        raise SettingError(f"`quantile` is {quantile!r} and `alpha` is {alpha!r}. Pass only one of them.")
    if quantile is not None:
        check_quantile(quantile)
    if alpha is not None and not (is_number(alpha) and 0 < alpha < 1):
        raise SettingError(f"`alpha` is {alpha!r}, but it must lie in (0, 1): the largest p-value to keep.")


def _check_normality_threshold(threshold: float | None) -> None:
    if threshold is not None and not (is_number(threshold) and 0 < threshold <= 1):
        raise SettingError(
            f"`normality_threshold` is {threshold!r}, but it must lie in (0, 1], or be None to disable it."
        )


@dataclass(frozen=True, eq=False)
class _StatisticalSelector(Selector):
    """Settings and checks shared by the selectors on channel statistics."""

    _part: ClassVar[Literal["class", "instance"]]
    statistics: ChannelStatistics
    quantile: float | None = field(default=None, kw_only=True)
    alpha: float | None = field(default=None, kw_only=True)
    softness: float = field(default=0.5, kw_only=True)
    normality_threshold: float | None = field(default=0.05, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.statistics, ChannelStatistics):
            raise StatisticsError(
                f"`statistics` is a {type(self.statistics).__name__}, but this selector needs ChannelStatistics."
            )
        if self.quantile is None and self.alpha is None:
            object.__setattr__(self, "quantile", 0.1)
        _check_threshold(self.quantile, self.alpha)
        check_softness(self.softness)
        _check_normality_threshold(self.normality_threshold)

    def check(self, channels: Mapping[str, int]) -> None:
        """Check that every layer has statistics with its number of channels (see `Selector.check`)."""
        self.statistics.require(self._part)
        others = [layer for layer in channels if layer not in self.statistics]
        if others:
            held = list(self.statistics)
            raise StatisticsError(
                f"The statistics cover {len(held)} convolutions, from {held[0]!r} to {held[-1]!r}, but not "
                f"{len(others)} of the chosen ones, such as {others[0]!r}. Choose covered layers, or collect "
                "statistics of all."
            )
        for layer, count in channels.items():
            if self.statistics[layer].channels != count:
                raise StatisticsError(
                    f"The statistics of layer {layer!r} have {self.statistics[layer].channels} channels, "
                    f"but the layer has {count}. Collect statistics on this model."
                )

    def _weights(self, scores: Tensor, allowed: Tensor, score_at_alpha: float | None) -> Tensor:
        """Weight channels around the k-th best score or the score at p = alpha; 0 where not allowed."""
        threshold = score_at_alpha if self.quantile is None else kth_largest(scores, self.quantile)
        gated = torch.where(allowed, scores, -math.inf)
        weights = soft_weights(gated, cast(Tensor | float, threshold), self.softness)
        return weights & allowed if self.softness == 0 else weights

    def _gate(self, layer: AnyLayerStatistics) -> Tensor:
        """Mask of channels whose GAP is not normally distributed over the data set, shape (C,)."""
        if self.normality_threshold is None:
            return torch.ones_like(layer.shapiro_p, dtype=torch.bool)
        return layer.shapiro_p < self.normality_threshold


@register_selector(
    "class", title="Class-wise (statistics)", summary="channels that respond to the class more than to others"
)
@dataclass(frozen=True, eq=False)
class ClassWise(_StatisticalSelector):
    """Keep the channels that respond more to the explained class than to all other classes.

    Channels are ranked by the log p of a one-sided t-test over the data set; only channels that are not normally
    distributed (Shapiro-Wilk p below the threshold) are kept. All images of a class use the same channels.

    Attributes:
        statistics: channel statistics of every chosen layer.
        quantile: share of channels at or above the threshold, in (0, 1]. Give either this or `alpha`; 0.1 without both.
        alpha: p-value at the threshold, in (0, 1).
        softness: width of the ramp around the threshold, in [0, 1]; 0 is the published hard cut. See `soft_weights`.
        normality_threshold: largest Shapiro-Wilk p-value of kept channels, in (0, 1]; None keeps any.
        test: `"welch"` or `"student"`.

    Raises:
        SettingError: if a setting is out of range.
        StatisticsError: if `statistics` is not a `ChannelStatistics`.

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
        """Check the number of channels, and that compact statistics rank enough of them (see `Selector.check`)."""
        super().check(channels)
        for name in channels:
            layer = self.statistics[name]
            if isinstance(layer, RankedLayerStatistics) and (self.quantile or 0) > layer.share:
                raise StatisticsError(
                    f"`quantile` is {self.quantile}, but the compact statistics of layer {name!r} rank only the best "
                    f"{layer.share:.0%} of the channels. Lower it, or collect full statistics."
                )

    def check_classes(self, classes: int) -> None:
        """Check that the statistics have as many classes as the model (see `Selector.check_classes`)."""
        if classes != self.statistics.model_classes:
            raise StatisticsError(
                f"The statistics have {self.statistics.model_classes} classes, but the model's output has {classes}. "
                "Collect statistics on this model."
            )

    def select(self, signal: LayerSignal) -> Tensor:
        """Look up the weights for each row's class (see `Selector.select`)."""
        classes = given(signal.classes, "classes")
        if not bool(self._known.all()):
            # The gradient may start at a class without images, which would leave the map plain.
            self.check_targets(classes.tolist())
        if self.statistics.class_indices is not None:
            classes = self._columns(classes)
        key = (signal.layer, signal.gradient.device)
        if key not in self._cached:
            self._cached[key] = self.class_weights(signal.layer).to(signal.gradient.device)
        return self._cached[key][classes]

    def _columns(self, classes: Tensor) -> Tensor:
        """Map classes of the model to columns of restricted statistics."""
        held = torch.tensor(self.statistics.class_indices, device=classes.device)
        columns = torch.searchsorted(held, classes).clamp(max=len(held) - 1)
        if not torch.equal(held[columns], classes):
            # Raises an error that names the missing class.
            self.statistics.columns(classes.tolist())
        return columns

    def check_targets(self, targets: Sequence[int]) -> None:
        """Check that the statistics include images of each class (see `Selector.check_targets`)."""
        # Classes that the model does not have are reported elsewhere.
        classes = [index for index in targets if 0 <= index < self.statistics.model_classes]
        known = self._known[self.statistics.columns(classes)].tolist()
        if not all(known):
            unknown = classes[known.index(False)]
            raise StatisticsError(
                f"The statistics include no image of class {unknown}. Collect them with images of this class, or with "
                "`labels='predicted'`."
            )

    @cached_property
    def _known(self) -> Tensor:
        """Mask of classes with images in the statistics, shape (K,)."""
        known = torch.zeros(self.statistics.classes, dtype=torch.bool, device="cpu")
        for held in self.statistics.values():
            if isinstance(held, LayerStatistics):
                return held.class_count > 0
            # Ranked statistics have no counts, and one layer may have only dead channels.
            known |= (held.class_log_p(self.test) < 0).any(dim=0)
            if bool(known.all()):
                break
        return known

    def class_weights(self, layer: str) -> Tensor:
        """Compute channel weights in [0, 1], or a boolean mask, for each class in the statistics; shape (K, C).

        All channels of a class without images have the same weight, since p is 1 for each. Channels that compact
        statistics do not keep have weight 0, even within the soft ramp.
        """
        held = self.statistics[layer]
        log_p = held.class_log_p(self.test).T
        if self.alpha is not None and isinstance(held, RankedLayerStatistics) and held.share < 1:
            # If all kept channels pass, dropped ones might pass too.
            passing = (log_p <= math.log(self.alpha)) | (log_p == 0)
            if bool((passing.all(dim=1) & (log_p < 0).any(dim=1)).any()):
                raise StatisticsError(
                    f"`alpha` is {self.alpha}, but the compact statistics of layer {layer!r} keep too few channels for "
                    "it. Lower it, use `quantile=`, or collect full statistics."
                )
        allowed = self._gate(held) & (log_p < 0).any(dim=1, keepdim=True)
        weights = self._weights(-log_p, allowed, None if self.alpha is None else -math.log(self.alpha))
        return weights if self.softness == 0 else weights.float()


@register_selector(
    "instance", title="Instance-wise (statistics)", summary="channels that respond to the image more than to others"
)
@dataclass(frozen=True, eq=False)
class InstanceWise(_StatisticalSelector):
    """Keep the channels that respond unusually strongly to the image.

    Channels are ranked by the upper-tail p-value of `(GAP - mean) / std` under a standard normal distribution, with
    the same normality threshold as `ClassWise`. Needs no class.

    Attributes:
        statistics: channel statistics of every chosen layer.
        quantile: share of channels at or above the threshold, in (0, 1]. Give either this or `alpha`; 0.1 without both.
        alpha: p-value at the threshold, in (0, 1).
        softness: width of the ramp around the threshold, in [0, 1]; 0 is the published hard cut. See `soft_weights`.
        normality_threshold: largest Shapiro-Wilk p-value of kept channels, in (0, 1]; None keeps any.

    Raises:
        SettingError: if a setting is out of range.
        StatisticsError: if `statistics` is not a `ChannelStatistics`.

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
        """Return the GAP: the mean over space of relu(output), shape (B, C)."""
        return at_least_float32(output).relu().flatten(2).mean(dim=2)

    def select(self, signal: LayerSignal) -> Tensor:
        """Rank by the standard score, which orders channels as the p-value does (see `Selector.select`)."""
        gap = given(signal.observation, "observation")
        layer = self.statistics[signal.layer]
        # `check` has rejected statistics without these.
        mean, std = cast(Tensor, layer.mean).to(gap), cast(Tensor, layer.std).to(gap)
        # A constant channel has p = 1: it never stands out.
        score = torch.where(std > 0, (gap - mean) / std, -math.inf)
        allowed = (std > 0) & self._gate(layer).to(gap.device)
        return self._weights(score, allowed, None if self.alpha is None else -float(special.ndtri(self.alpha)))


def registered_selectors() -> Mapping[str, RegisteredSelector]:
    """Return all registered selectors by short name, in the order of their registration.

    Example:
        >>> "energy" in registered_selectors(), "class" in registered_selectors()
        (True, True)
    """
    return MappingProxyType(REGISTERED)


def find_selector(name: str) -> RegisteredSelector:
    """Look up a registered selector.

    Raises:
        SettingError: if no selector has this name.

    Example:
        >>> find_selector("evidence").title
        'Evidence'
    """
    if name not in REGISTERED:
        raise SettingError(f"`selector` is {name!r}, but it must be one of {', '.join(REGISTERED)}.")
    return REGISTERED[name]
