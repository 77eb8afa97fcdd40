import math

import numpy as np
import pytest
from scipy import stats

from parchgrad.errors import InputError, SettingError
from parchgrad.evaluation.report import PairedRows
from parchgrad.evaluation.significance import (
    critical_difference,
    holm,
    rank_biserial,
    rank_with_critical_difference,
    standings,
)

# Demsar (2006), table 6: ranks of four classifiers on fourteen data sets, ties shared.
DEMSAR = {
    "C4.5": [4, 1, 4, 4, 4, 1, 3, 2.5, 4, 2.5, 4, 3, 4, 3],
    "C4.5+m": [3, 2, 1, 1, 2, 2.5, 2, 2.5, 3, 2.5, 2.5, 2, 1, 1],
    "C4.5+cf": [2, 3, 2, 3, 3, 4, 4, 4, 2, 2.5, 1, 4, 2, 4],
    "C4.5+m+cf": [1, 4, 3, 2, 1, 2.5, 1, 1, 1, 2.5, 2.5, 1, 3, 2],
}


def test_ranks_and_critical_difference_are_those_of_the_published_example():
    found = rank_with_critical_difference(DEMSAR, higher_is_better=False)
    assert [round(rank, 3) for rank in found.ranks.values()] == [3.143, 2.0, 2.893, 1.964]
    assert round(found.critical_difference, 2) == 1.25
    assert found.images == 14
    # The paper: 3.143 - 1.964 = 1.18 is below the critical difference, so Nemenyi's test tells none from the best.
    assert found.leaders == tuple(DEMSAR)
    # The paper's 9.28 is without the correction for ties: of 14 rows one has four equal ranks and three have two.
    statistic = 12 * 14 / 20 * (sum(rank**2 for rank in found.ranks.values()) - 25)
    assert round(statistic, 2) == 9.28
    ties = (60 + 3 * 6) / (14 * 60)
    assert found.p == pytest.approx(stats.chi2.sf(statistic / (1 - ties), 3))


def test_critical_values_are_those_of_the_published_table():
    # Demsar (2006), table 5: Nemenyi's critical values for 2 to 10 methods.
    published = {
        0.95: (1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164),
        0.90: (1.645, 2.052, 2.291, 2.459, 2.589, 2.693, 2.780, 2.855, 2.920),
    }
    for confidence, values in published.items():
        for methods, value in enumerate(values, start=2):
            scale = math.sqrt(methods * (methods + 1) / 60)
            assert critical_difference(methods, 10, confidence=confidence) / scale == pytest.approx(value, abs=1e-3)
    with pytest.raises(SettingError, match="confidence"):
        critical_difference(3, 10, confidence=1)


def test_a_map_without_a_score_ranks_last():
    scores = {"a": [0.2, math.nan, 0.2], "b": [0.1, 0.1, 0.3], "c": [0.0, 0.0, math.nan]}
    higher = rank_with_critical_difference(scores, higher_is_better=True)
    assert higher.ranks == pytest.approx({"a": 2, "b": 4 / 3, "c": 8 / 3})
    lower = rank_with_critical_difference(scores, higher_is_better=False)
    assert lower.ranks == pytest.approx({"a": 7 / 3, "b": 2, "c": 5 / 3})
    assert rank_with_critical_difference({"a": [1.0], "b": [1.0], "c": [1.0]}, higher_is_better=True).p == 1
    assert math.isnan(rank_with_critical_difference({"a": [1.0], "b": [2.0]}, higher_is_better=True).p)
    for bad in ({}, {"a": [1.0]}, {"a": [], "b": []}, {"a": [1.0], "b": [1.0, 2.0]}):
        with pytest.raises(InputError, match="scores"):
            rank_with_critical_difference(bad, higher_is_better=True)


def holm_slowly(p_values):
    """Step down: the smallest p-value times all, the next times one less, never below the one before."""
    remaining, adjusted, floor = dict(enumerate(p_values)), {}, 0.0
    while remaining:
        place = min(remaining, key=remaining.get)
        floor = max(floor, min(1.0, len(remaining) * remaining.pop(place)))
        adjusted[place] = floor
    return [adjusted[place] for place in range(len(p_values))]


def test_holm_agrees_with_stepping_down_and_skips_what_was_not_tested():
    p_values = np.random.default_rng(0).uniform(0, 0.2, 30)
    p_values[3] = p_values[7]
    np.testing.assert_allclose(holm(p_values), holm_slowly(p_values))
    with_gaps = np.insert(p_values, [0, 5, 30], math.nan)
    found = holm(with_gaps)
    np.testing.assert_allclose(found[~np.isnan(with_gaps)], holm_slowly(p_values))
    assert np.isnan(found).sum() == 3


def test_the_rank_biserial_correlation_by_hand_and_beside_wilcoxon():
    # Ranks of 1, -2, 2, 4 are 1, 2.5, 2.5, 4: of 10, 7.5 are positive and 2.5 negative.
    assert rank_biserial([1.0, -2.0, 2.0, 4.0]) == pytest.approx(0.5)
    assert rank_biserial([0.0, 0.0]) == 0
    differences = np.random.default_rng(1).normal(0.3, 1, 40)
    positive = stats.wilcoxon(differences, alternative="greater").statistic
    assert rank_biserial(differences) == pytest.approx(2 * positive / (40 * 41 / 2) - 1)


def rows_of(columns, groups=None):
    return [
        {
            "model": "m",
            "setting": title,
            "index": index,
            "seconds": 1.0,
            **{name: values[index] for name, values in own},
        }
        | ({} if groups is None else {"group": groups[index]})
        for title, own in ((title, list(found.items())) for title, found in columns.items())
        for index in range(len(own[0][1]))
    ]


def columns_of(rows, *scores):
    paired = PairedRows.of(rows)
    return {name: (paired, name) for name in scores}


def test_a_method_is_better_only_if_the_corrected_test_says_so_too():
    random = np.random.default_rng(2)
    base = random.normal(size=30)
    clear, slight = base + random.uniform(0.1, 1, 30), base + np.linspace(-0.9, 1.7, 30)
    columns = {
        "reference": {"aopc": base, "deletion": base},
        "clear": {"aopc": clear, "deletion": clear},
        "slight": {"aopc": slight, "deletion": base},
        **{f"same {number}": {"aopc": base, "deletion": base} for number in range(10)},
    }
    found = standings(columns_of(rows_of(columns), "aopc", "deletion"), reference="reference")
    assert len(found) == 24
    assert [found["clear", name].verdict for name in ("aopc", "deletion")] == ["better", "worse"]
    assert [found["clear", name].effect for name in ("aopc", "deletion")] == [1, -1]
    alone = stats.wilcoxon(slight - base).pvalue
    # Two comparisons are clearer, so that this p-value counts 22 times.
    assert alone < 0.05 < found["slight", "aopc"].p == pytest.approx(22 * alone)
    assert found["slight", "aopc"].comparison.settled
    assert found["slight", "aopc"].verdict == "open"
    assert found["same 1", "aopc"].p == 1
    with pytest.raises(SettingError, match="reference"):
        standings(columns_of(rows_of(columns), "aopc"), reference="none")


def test_a_mean_and_ranks_of_opposite_directions_settle_nothing():
    differences = np.concatenate([np.linspace(-1.1, -0.9, 80), np.linspace(9, 11, 20)])
    columns = {"reference": {"aopc": np.zeros(100)}, "other": {"aopc": differences}}
    found = standings(columns_of(rows_of(columns), "aopc"), reference="reference")["other", "aopc"]
    assert found.comparison.settled
    assert found.comparison.difference > 0 > found.effect
    assert found.p < 0.05
    assert found.verdict == "open"


def test_a_group_counts_once_and_too_few_are_not_tested():
    columns = {"reference": {"aopc": np.zeros(40)}, "other": {"aopc": np.ones(40)}}
    for size, tested in ((2, True), (4, False)):
        groups = [f"group {index // size}" for index in range(40)]
        found = standings(columns_of(rows_of(columns, groups), "aopc"), reference="reference")["other", "aopc"]
        assert found.comparison.images == 40 // size
        assert math.isnan(found.p) is not tested
        assert (found.verdict == "better") is tested
