"""Which differences of a whole table are real: tests that account for how many comparisons there are.

Sources: Demsar (2006), "Statistical Comparisons of Classifiers over Multiple Data Sets" (Friedman's test, critical
differences); Holm (1979), "A Simple Sequentially Rejective Multiple Test Procedure"; Kerby (2014), "The Simple
Difference Formula" (rank-biserial correlation).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import friedmanchisquare, rankdata, studentized_range, wilcoxon

from parchgrad.errors import InputError, SettingError
from parchgrad.evaluation.report import PairedRows, Verdict, verdict_of
from parchgrad.evaluation.scores import SCORES
from parchgrad.evaluation.summary import FEWEST, Comparison, paired_differences

__all__ = [
    "Ranking",
    "Standing",
    "critical_difference",
    "holm",
    "rank_biserial",
    "rank_with_critical_difference",
    "standings",
]


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Mean ranks of methods, and how far apart they must be.

    Attributes:
        ranks: mean rank over the images by method, 1 for the best.
        p: p-value of Friedman's test that all methods rank alike, in [0, 1]; NaN for fewer than three methods.
        critical_difference: mean ranks that differ by less cannot be told apart (Nemenyi's test).
        leaders: the method with the best mean rank, and those that cannot be told apart from it.
        images: number of images.
    """

    ranks: Mapping[str, float]
    p: float
    critical_difference: float
    leaders: tuple[str, ...]
    images: int


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a method compares with the reference by one score, among the many comparisons of a table.

    Attributes:
        comparison: the method minus the reference, on the same images.
        p: p-value of Wilcoxon's signed-rank test with Holm's correction for all comparisons of the table, in [0, 1];
            NaN for fewer than 20 images.
        effect: rank-biserial correlation in [-1, 1], positive where the method is better; see `rank_biserial`.
        verdict: `"better"` or `"worse"` only if the interval excludes zero, `p` is below the level, and `effect` says
            the same, else `"open"`.
    """

    comparison: Comparison
    p: float
    effect: float
    verdict: Verdict


def rank_with_critical_difference(
    scores: Mapping[str, Sequence[float]], *, higher_is_better: bool, confidence: float = 0.95
) -> Ranking:
    """Rank methods on each image, average, and find those that cannot be told apart from the best.

    A map without a score, such as one that is zero everywhere, ranks last on its image.

    Args:
        scores: scores by method, for the same images in the same order.
        higher_is_better: whether higher scores are better.
        confidence: level of Nemenyi's test, in (0, 1).

    Raises:
        InputError: if there are fewer than two methods, or they have no scores or different numbers of them.
        SettingError: if `confidence` is out of range.

    Example:
        >>> scores = {"a": [3.0, 5.0, 4.0] * 6, "b": [2.0, 5.0, 3.0] * 6, "c": [1.0, 1.0, 1.0] * 6}
        >>> found = rank_with_critical_difference(scores, higher_is_better=True)
        >>> found.ranks["c"], round(found.critical_difference, 3), found.leaders
        (3.0, 0.781, ('a', 'b'))
    """
    lengths = {len(column) for column in scores.values()}
    if len(scores) < 2 or len(lengths) > 1 or 0 in lengths:
        raise InputError("`scores` must have at least two methods, each with one score for each image.")
    table = np.array(list(scores.values()), dtype=np.float64)
    worst = np.where(np.isnan(table), np.inf, -table if higher_is_better else table)
    ranks = dict(zip(scores, rankdata(worst, axis=0).mean(axis=1).tolist(), strict=True))
    alike = bool((worst == worst[0]).all())
    p = math.nan if len(scores) < 3 else 1.0 if alike else float(friedmanchisquare(*rankdata(worst, axis=0)).pvalue)
    width = critical_difference(len(scores), table.shape[1], confidence=confidence)
    best = min(ranks.values())
    return Ranking(
        ranks=ranks,
        p=p,
        critical_difference=width,
        leaders=tuple(title for title, rank in ranks.items() if rank - best <= width),
        images=table.shape[1],
    )


def critical_difference(methods: int, images: int, *, confidence: float = 0.95) -> float:
    """Smallest difference of mean ranks that Nemenyi's test holds to be real.

    Args:
        methods: number of methods, at least 2.
        images: number of images, at least 1.
        confidence: level of the test, in (0, 1).

    Raises:
        SettingError: if `confidence` is out of range.

    Example:
        >>> round(critical_difference(4, 14), 2)
        1.25
    """
    if not 0 < confidence < 1:
        raise SettingError(f"`confidence` is {confidence}, but it must lie in (0, 1).")
    quantile = float(studentized_range.ppf(confidence, methods, np.inf)) / math.sqrt(2)
    return quantile * math.sqrt(methods * (methods + 1) / (6 * images))


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Adjust p-values for their number, so that any false discovery has at most the level's probability.

    Args:
        p_values: p-values (N,), in [0, 1]; NaN where there was no test, which does not count.

    Returns:
        Adjusted p-values (N,), in [0, 1].

    Example:
        >>> holm([0.01, 0.04, 0.03, 0.005])
        array([0.03, 0.06, 0.06, 0.02])
    """
    given = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(given)
    # NaN sorts last.
    order = order[: int((~np.isnan(given)).sum())]
    adjusted = np.full_like(given, np.nan)
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(factors * given[order]))
    return adjusted


def rank_biserial(differences: ArrayLike) -> float:
    """Effect size of paired differences: the share of the ranks that are positive, minus the share that are negative.

    Ranks are those of the magnitudes, as in Wilcoxon's test. 1 means that all differences are positive.

    Args:
        differences: differences (N,); zeros do not count.

    Returns:
        Correlation in [-1, 1]; 0 without any difference.

    Example:
        >>> rank_biserial([3.0, -1.0, 2.0, 0.0])
        0.6666666666666666
    """
    given = np.asarray(differences, dtype=np.float64)
    given = given[given != 0]
    if not len(given):
        return 0.0
    ranks = rankdata(np.abs(given))
    return float((np.sign(given) * ranks).sum() / ranks.sum())


def standings(
    columns: Mapping[str, tuple[PairedRows, str]], *, reference: str, confidence: float = 0.95, seed: int = 0
) -> dict[tuple[str, str], Standing]:
    """Compare every method with a reference in every column of a table, as one family of tests.

    Args:
        columns: paired rows and the name of the score of each column; the columns may be of different runs.
        reference: title of the method that the others are compared with.
        confidence: level of the intervals and of the family of tests, in (0, 1).
        seed: random seed of the bootstrap.

    Returns:
        Standings by method and column, without the reference; scores without a better direction stay open.

    Raises:
        SettingError: if a run does not have the reference.

    Example:
        >>> rows = [
        ...     {"model": "m", "setting": title, "index": index, "seconds": 1.0, "deletion": index + gain * (1 + index)}
        ...     for title, gain in (("a", 0.0), ("b", 0.5)) for index in range(20)
        ... ]
        >>> found = standings({"deletion": (PairedRows.of(rows), "deletion")}, reference="a")["b", "deletion"]
        >>> found.effect, found.verdict
        (-1.0, 'worse')
    """
    compared = {}
    for column, (paired, name) in columns.items():
        if reference not in paired.rows:
            raise SettingError(f"`reference` is {reference!r}, but it must be one of {', '.join(paired.rows)}.")
        sign = -1 if SCORES[name.partition("@")[0]].better == "lower" else 1
        base = paired.column(reference, name)
        for title in paired.rows:
            if title != reference:
                differences = paired_differences(paired.column(title, name), base, groups=paired.groups)
                found = paired.compare(title, reference, name, confidence=confidence, seed=seed)
                effect = sign * rank_biserial(differences)
                compared[title, column] = found, _signed_rank_p(differences), effect, verdict_of(found, name)
    adjusted = holm([p for _, p, _, _ in compared.values()])
    return {
        key: Standing(
            comparison=found,
            p=float(p),
            effect=effect,
            verdict=verdict if p < 1 - confidence and (effect > 0) == (verdict == "better") else "open",
        )
        for (key, (found, _, effect, verdict)), p in zip(compared.items(), adjusted, strict=True)
    }


def _signed_rank_p(differences: NDArray[np.float64]) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test; NaN for too few images."""
    if len(differences) < FEWEST:
        return math.nan
    return float(wilcoxon(differences).pvalue) if np.any(differences) else 1.0
