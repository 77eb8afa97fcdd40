"""Summarise scores over images: means, and confidence intervals against a baseline."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap, rankdata

from parchgrad._io.checks import check_whole_number
from parchgrad.errors import InputError, SettingError

__all__ = ["FEWEST", "Comparison", "Mean", "compare", "paired_differences", "rank_methods", "valid_mean"]


FEWEST = 20
"""Fewest images to settle a comparison: without a difference, 16 pairs would settle a tenth of the time, 4 a fifth."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over the images with a valid score.

    Attributes:
        value: the mean; NaN if no image is valid.
        standard_error: standard error of the mean; NaN for fewer than two valid images.
        valid: number of valid images.
        total: number of all images.
    """

    value: float
    standard_error: float
    valid: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How a method differs from a baseline on the same images.

    Attributes:
        difference: mean of the differences, method minus baseline; NaN if there are no images.
        low: lower end of the confidence interval; NaN for fewer than two images.
        high: upper end of the confidence interval; NaN for fewer than two images.
        images: number of images, or groups, for which both have a score.
        settled: whether the interval excludes zero and there are at least 20 images; with fewer, intervals exclude zero
            too often by chance.
    """

    difference: float
    low: float
    high: float
    images: int

    @property
    def settled(self) -> bool:
        """Whether the interval excludes zero and covers enough images."""
        return self.images >= FEWEST and (self.low > 0 or self.high < 0)


def valid_mean(scores: ArrayLike) -> Mean:
    """Average scores (N,), ignoring NaN.

    Example:
        >>> valid_mean([0.5, float("nan"), 1.0])
        Mean(value=0.75, standard_error=0.25, valid=2, total=3)
    """
    values = _scores(scores)
    kept = values[~np.isnan(values)]
    spread = float(kept.std(ddof=1) / math.sqrt(len(kept))) if len(kept) > 1 else math.nan
    mean = float(kept.mean()) if len(kept) else math.nan
    return Mean(value=mean, standard_error=spread, valid=len(kept), total=len(values))


def compare(
    scores: ArrayLike,
    baseline: ArrayLike,
    *,
    groups: Sequence[str] | None = None,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Comparison:
    """Compare a method with a baseline by a paired bootstrap over images (bias-corrected and accelerated, BCa).

    Source: Efron (1987), "Better Bootstrap Confidence Intervals".

    Args:
        scores: scores of the method, shape (N,); NaN where undefined.
        baseline: scores of the baseline on the same images, shape (N,).
        groups: group name of each image, if images in a group depend on each other, such as the cells of a mosaic; the
            bootstrap then resamples groups, each with its mean difference.
        confidence: level of the interval, in (0, 1).
        resamples: number of bootstrap resamples, at least 1.
        seed: random seed of the bootstrap.

    Returns:
        Mean difference and its interval, over the images for which both have a score.

    Raises:
        InputError: if `scores`, `baseline` and `groups` differ in length.
        SettingError: if a setting is out of range.

    Example:
        >>> found = compare([0.9, 0.7, 0.8, 0.9] * 6, [0.4, 0.5, 0.3, 0.5] * 6)
        >>> round(found.difference, 3), found.images, found.settled
        (0.4, 24, True)
    """
    if not 0 < confidence < 1:
        raise SettingError(f"`confidence` is {confidence}, but it must lie in (0, 1).")
    check_whole_number("resamples", resamples, 1)
    differences = paired_differences(scores, baseline, groups=groups)
    count = len(differences)
    mean = float(differences.mean()) if count else math.nan
    if count < 2:
        return Comparison(difference=mean, low=math.nan, high=math.nan, images=count)
    both = np.concatenate((_scores(scores), _scores(baseline)))
    rounding = 4 * np.finfo(np.float64).eps * np.abs(both[np.isfinite(both)]).max(initial=0)
    if np.ptp(differences) <= rounding:
        # All differences are equal up to rounding, so there is nothing to resample.
        return Comparison(difference=mean, low=mean, high=mean, images=count)
    # Scaling by a power of two is exact, and keeps the squares of tiny differences from underflowing.
    _, exponent = np.frexp(np.abs(differences).max())
    found = bootstrap(
        (np.ldexp(differences, -exponent),),
        np.mean,
        n_resamples=resamples,
        confidence_level=confidence,
        batch=max(1, 10_000_000 // count),
        random_state=np.random.default_rng(seed),
    )
    low, high = (float(np.ldexp(end, exponent)) for end in found.confidence_interval)
    return Comparison(difference=mean, low=low, high=high, images=count)


def paired_differences(
    scores: ArrayLike, baseline: ArrayLike, *, groups: Sequence[str] | None = None
) -> NDArray[np.float64]:
    """Differences on the images for which both have a score, averaged within each group; see `compare`.

    Raises:
        InputError: if `scores`, `baseline` and `groups` differ in length.

    Example:
        >>> paired_differences([1.0, 2.0, float("nan")], [0.0, 0.5, 0.0])
        array([1. , 1.5])
    """
    first, second = _scores(scores), _scores(baseline)
    if len(first) != len(second):
        raise InputError(
            f"`scores` has {len(first)} values and `baseline` has {len(second)}. Pass both for the same images."
        )
    differences = first - second
    known = ~np.isnan(differences)
    differences = differences[known]
    if groups is None:
        return differences
    if len(groups) != len(first):
        raise InputError(f"`groups` has {len(groups)} names for {len(first)} scores. Pass one for each image.")
    _, place = np.unique(np.asarray(groups)[known], return_inverse=True)
    means: NDArray[np.float64] = np.bincount(place, differences) / np.bincount(place)
    return means


def rank_methods(scores: Mapping[str, Sequence[float]], *, higher_is_better: bool) -> dict[str, float]:
    """Rank methods on each image, 1 for the best, and average; ties share their mean rank.

    Images without a score for every method are ignored.

    Args:
        scores: scores by method, for the same images in the same order.
        higher_is_better: whether higher scores are better.

    Returns:
        Mean rank of each method; NaN if no image has all scores.

    Raises:
        InputError: if the methods have different numbers of scores.

    Example:
        >>> rank_methods({"a": [0.9, 0.8], "b": [0.1, 0.8]}, higher_is_better=True)
        {'a': 1.25, 'b': 1.75}
    """
    if len({len(column) for column in scores.values()}) > 1:
        raise InputError("The methods in `scores` have different numbers of scores. Pass all for the same images.")
    table = np.array(list(scores.values()), dtype=np.float64)
    complete = table[:, ~np.isnan(table).any(axis=0)]
    if not complete.size:
        return dict.fromkeys(scores, math.nan)
    ranks = rankdata(-complete if higher_is_better else complete, axis=0)
    return dict(zip(scores, ranks.mean(axis=1).tolist(), strict=True))


def _scores(values: ArrayLike) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1:
        raise InputError(f"The scores have shape {found.shape}, but they must be one per image, shape (N,).")
    return found
