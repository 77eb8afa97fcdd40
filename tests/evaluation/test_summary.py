import math

import numpy as np
import pytest
from scipy import stats

from parchgrad.errors import InputError, SettingError
from parchgrad.evaluation.summary import compare, rank_methods, valid_mean


def test_a_mean_counts_what_it_is_taken_over():
    generator = np.random.default_rng(0)
    scores = generator.normal(size=20)
    scores[[3, 8]] = math.nan
    kept = np.delete(scores, [3, 8])
    found = valid_mean(scores)
    assert found.value == pytest.approx(kept.mean())
    assert found.standard_error == pytest.approx(stats.sem(kept))
    assert (found.valid, found.total) == (18, 20)
    nothing = valid_mean([math.nan, math.nan])
    assert math.isnan(nothing.value)
    assert (nothing.valid, nothing.total) == (0, 2)
    assert math.isnan(valid_mean([1.0]).standard_error)


@pytest.mark.parametrize("exponent", [-1000, -500, 300, 1000])
def test_differences_of_any_size_have_their_interval(exponent):
    differences = np.random.default_rng(2).normal(0.2, 1.0, size=30)
    usual, found = (compare(values, np.zeros(30)) for values in (differences, np.ldexp(differences, exponent)))
    for name in ("low", "high"):
        assert getattr(found, name) == math.ldexp(getattr(usual, name), exponent)
    least = compare([5e-324, 0.0, 0.0], [0.0] * 3)
    assert 0 <= least.low <= least.high <= 5e-324


def test_an_interval_of_many_normal_differences_is_the_normal_one():
    generator = np.random.default_rng(1)
    baseline, gain = generator.normal(size=2000), generator.normal(0.1, 0.5, size=2000)
    found = compare(baseline + gain, baseline)
    half = 1.96 * gain.std(ddof=1) / math.sqrt(2000)
    assert found.difference == pytest.approx(gain.mean())
    assert found.low == pytest.approx(gain.mean() - half, abs=0.05 * half)
    assert found.high == pytest.approx(gain.mean() + half, abs=0.05 * half)
    assert found.settled
    assert found == compare(baseline + gain, baseline)
    wider = compare(baseline + gain, baseline, confidence=0.99)
    assert wider.low < found.low
    assert wider.high > found.high


def test_intervals_hold_the_true_difference_as_often_as_they_say():
    generator = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        # Skewed, with mean 0.
        scores = generator.exponential(size=40) - 1
        found = compare(scores, np.zeros(40), resamples=499, confidence=0.9)
        hits += found.low <= 0 <= found.high
    assert stats.binomtest(hits, 200, 0.9).pvalue > 1e-3


def test_pairs_without_both_scores_are_left_out():
    scores, baseline = [1.0, math.nan, 3.0, 5.0], [0.0, 1.0, math.nan, 1.0]
    found = compare(scores, baseline)
    assert found.images == 2
    assert found.difference == pytest.approx(2.5)
    none = compare([math.nan], [1.0])
    assert none.images == 0
    assert not none.settled
    assert math.isnan(none.difference)


def test_equal_differences_and_too_few_images_say_no_more_than_they_can():
    same = compare([2.0, 3.0, 4.0] * 7, [1.0, 2.0, 3.0] * 7)
    assert (same.low, same.high, same.settled) == (1.0, 1.0, True)
    assert not compare([1.0, 2.0], [1.0, 2.0]).settled
    one = compare([2.0], [1.0])
    assert one.difference == 1.0
    assert math.isnan(one.low)
    assert not one.settled


def test_differences_that_are_equal_up_to_rounding_are_equal():
    baseline = [index / 10 for index in range(12)]
    found = compare([0.3 + value for value in baseline], baseline)
    assert found.difference == pytest.approx(0.3)
    assert (found.low, found.high) == (found.difference, found.difference)
    assert compare([1e-15 * value for value in (1, 2, 4)], [0.0] * 3).low == pytest.approx(1e-15, rel=0.5)


def test_few_images_settle_nothing():
    assert not compare([1.0, 2.0], [0.0, 0.0]).settled
    few, enough = ([1.0 + index / 100 for index in range(count)] for count in (19, 20))
    assert not compare(few, [0.0] * 19).settled
    assert compare(enough, [0.0] * 20).settled


def test_images_of_a_group_are_drawn_together():
    generator = np.random.default_rng(0)
    of_group = generator.normal(size=30)
    scores = np.repeat(of_group, 4) + 0.01 * generator.normal(size=120)
    groups = [f"{place // 4}" for place in range(120)]
    alone, together = compare(scores, np.zeros(120)), compare(scores, np.zeros(120), groups=groups)
    assert together.images == 30
    assert together.difference == pytest.approx(alone.difference)
    whole = compare(scores.reshape(30, 4).mean(axis=1), np.zeros(30))
    assert together.high - together.low == pytest.approx(whole.high - whole.low, rel=0.05)
    assert together.high - together.low > 1.7 * (alone.high - alone.low)
    scores[:3] = math.nan
    assert compare(scores, np.zeros(120), groups=groups).difference == pytest.approx(
        np.mean([scores[3], *scores[4:].reshape(29, 4).mean(axis=1)])
    )
    with pytest.raises(InputError, match=r"`groups` has 3 .* 120 scores"):
        compare(scores, np.zeros(120), groups=["a"] * 3)


def test_ranks_are_averaged_over_images_that_all_have_scores_of():
    scores = {"a": [1.0, 5.0, 2.0], "b": [2.0, 5.0, math.nan], "c": [3.0, 1.0, 9.0]}
    assert rank_methods(scores, higher_is_better=True) == {"a": 2.25, "b": 1.75, "c": 2.0}
    assert rank_methods(scores, higher_is_better=False) == {"a": 1.75, "b": 2.25, "c": 2.0}
    assert all(math.isnan(rank) for rank in rank_methods({"a": [math.nan]}, higher_is_better=True).values())


def test_scores_that_do_not_fit():
    with pytest.raises(InputError, match="`scores` has 1 values and `baseline` has 2"):
        compare([1.0], [1.0, 2.0])
    with pytest.raises(InputError, match="shape"):
        valid_mean([[1.0]])
    with pytest.raises(InputError, match="different numbers"):
        rank_methods({"a": [1.0], "b": []}, higher_is_better=True)
    for name, value in (("confidence", 1.0), ("resamples", 0)):
        with pytest.raises(SettingError, match=f"`{name}` is {value}"):
            compare([1.0, 2.0], [0.0, 0.0], **{name: value})
