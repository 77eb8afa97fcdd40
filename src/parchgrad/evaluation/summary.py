"""From scores of images to statements about methods: means over the valid ones, and intervals against a baseline."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap, rankdata

from parchgrad.errors import InputError, SettingError

__all__ = ["FEWEST", "Comparison", "Mean", "compare", "rank_methods", "valid_mean"]


FEWEST = 20
"""Images below which nothing is settled: of 16 pairs without a difference nearly a tenth would be, of 4 a fifth."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over the images of which the score says something.

    Attributes:
        value: the mean; NaN if there are no such images.
        standard_error: of the mean; NaN of fewer than two images.
        valid: number of these images.
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
        low: lower end of the confidence interval; NaN of fewer than two images.
        high: upper end.
        images: number of images that both have a score of, or of their groups.
        settled: whether one of the two has won: the interval leaves out zero, and there are 20 images at least, since
            of fewer the intervals leave out zero too often where there is no difference.
    """

    difference: float
    low: float
    high: float
    images: int

    @property
    def settled(self) -> bool:
        """Whether the interval leaves out zero, and stands on enough images."""
        return self.images >= FEWEST and (self.low > 0 or self.high < 0)


def valid_mean(scores: ArrayLike) -> Mean:
    """Average scores (N,), leaving out NaN.

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
        scores: of the method, shape (N,); NaN where it has none.
        baseline: of the baseline on the same images in the same order, shape (N,).
        groups: names of groups, one for each image, where images of a group are not independent of each other, as the
            parts of a mosaic are not: groups are drawn then, each with the mean of its differences.
        confidence: level of the interval, in (0, 1).
        resamples: how many times the images are drawn anew, at least 1.
        seed: of the draws.

    Returns:
        Mean difference and its interval, over the images of which both have a score.

    Raises:
        InputError: if the scores, or the groups, are not of one length.
        SettingError: if a setting is out of range.

    Example:
        >>> found = compare([0.9, 0.7, 0.8, 0.9] * 6, [0.4, 0.5, 0.3, 0.5] * 6)
        >>> round(found.difference, 3), found.images, found.settled
        (0.4, 24, True)
    """
    if not 0 < confidence < 1 or resamples < 1:
        raise SettingError(
            f"confidence is {confidence} and resamples is {resamples}, but they must be in (0, 1) and at least 1."
        )
    first, second = _scores(scores), _scores(baseline)
    if len(first) != len(second):
        raise InputError(f"{len(first)} scores cannot be paired with {len(second)}; give both for the same images.")
    differences = first - second
    known = ~np.isnan(differences)
    differences = differences[known]
    if groups is not None:
        if len(groups) != len(first):
            raise InputError(f"{len(first)} scores have {len(groups)} groups; name one for each image.")
        _, place = np.unique(np.asarray(groups)[known], return_inverse=True)
        differences = np.bincount(place, differences) / np.bincount(place)
    count = len(differences)
    mean = float(differences.mean()) if count else math.nan
    if count < 2:
        return Comparison(difference=mean, low=math.nan, high=math.nan, images=count)
    both = np.concatenate((first, second))
    rounding = 4 * np.finfo(np.float64).eps * np.abs(both[np.isfinite(both)]).max(initial=0)
    if np.ptp(differences) <= rounding:
        # Every draw is the same; what the rounding of the scores leaves has no distribution.
        return Comparison(difference=mean, low=mean, high=mean, images=count)
    # A power of two changes no digit, and lets the squares of the tiniest differences be more than zero.
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


def rank_methods(scores: Mapping[str, Sequence[float]], *, higher_is_better: bool) -> dict[str, float]:
    """Rank methods on each image, 1 for the best, and average; ties share their ranks.

    Images of which a method has no score are left out.

    Args:
        scores: of each method, in the order of the images.
        higher_is_better: direction of the score.

    Returns:
        Mean rank of each method; NaN if no image has scores of all.

    Raises:
        InputError: if the methods have not as many scores each.

    Example:
        >>> rank_methods({"a": [0.9, 0.8], "b": [0.1, 0.8]}, higher_is_better=True)
        {'a': 1.25, 'b': 1.75}
    """
    if len({len(column) for column in scores.values()}) > 1:
        raise InputError("The methods have scores of different numbers of images; give all for the same ones.")
    table = np.array(list(scores.values()), dtype=np.float64)
    complete = table[:, ~np.isnan(table).any(axis=0)]
    if not complete.size:
        return dict.fromkeys(scores, math.nan)
    ranks = rankdata(-complete if higher_is_better else complete, axis=0)
    return dict(zip(scores, ranks.mean(axis=1).tolist(), strict=True))


def _scores(values: ArrayLike) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1:
        raise InputError(f"The scores have shape {found.shape}, but one for each image is needed, shape (N,).")
    return found
