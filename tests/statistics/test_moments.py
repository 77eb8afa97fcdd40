import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parchgrad.statistics.moments import merge, moments_of_labels, moments_of_weights

FIELDS = ("weight", "square", "mean", "m2")


def sample(seed, rows=60, channels=5, groups=4, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(rows, channels, generator=generator, dtype=torch.float64) + offset
    return values, torch.randint(0, groups, (rows,), generator=generator)


def close(first, second, tolerance=1e-12):
    for name in FIELDS:
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=tolerance, atol=tolerance)


def test_labels_give_numpys_moments():
    values, labels = sample(0)
    found = moments_of_labels(values, labels, 6)
    for group in range(4):
        rows = values[labels == group].numpy()
        assert found.weight[group] == found.square[group] == found.effective_count[group] == len(rows)
        np.testing.assert_allclose(found.mean[group], rows.mean(0), rtol=1e-14)
        np.testing.assert_allclose(found.variance[group], rows.var(0, ddof=1), rtol=1e-12)
    assert (found.weight[4:] == 0).all()
    assert (found.mean[4:] == 0).all()
    assert (found.effective_count[4:] == 0).all()
    assert found.variance[4:].isnan().all()


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_one_hot_weights_are_labels(offset):
    values, labels = sample(1, offset=offset)
    weights = torch.nn.functional.one_hot(labels, 6)
    tolerance = 1e-12 if offset == 0 else 1e-8
    close(moments_of_weights(values, weights), moments_of_labels(values, labels, 6), tolerance)


def test_soft_weights_give_numpys_weighted_moments():
    values, _ = sample(2)
    weights = torch.rand(60, 3, dtype=torch.float64)
    found = moments_of_weights(values, weights)
    for group in range(3):
        own = weights[:, group].numpy()
        np.testing.assert_allclose(found.mean[group], np.average(values, axis=0, weights=own), rtol=1e-13)
        np.testing.assert_allclose(found.variance[group], np.cov(values.T, aweights=own).diagonal(), rtol=1e-12)
        assert float(found.effective_count[group]) == pytest.approx(own.sum() ** 2 / (own**2).sum())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 60), min_size=2, max_size=5))
def test_any_way_of_cutting_and_merging_gives_the_whole(seed, cuts):
    values, labels = sample(seed, offset=100.0)
    bounds = [0, *sorted(cuts), 60]
    parts = [moments_of_labels(values[a:b], labels[a:b], 4) for a, b in itertools.pairwise(bounds)]
    left, right = parts[0], parts[-1]
    for part in parts[1:]:
        left = merge(left, part)
    for part in reversed(parts[:-1]):
        right = merge(part, right)
    close(left, right)
    close(left, moments_of_labels(values, labels, 4))


def test_half_precision_values_are_summed_in_float64():
    values = torch.full((5000, 1), 0.1, dtype=torch.float16)
    found = moments_of_labels(values, torch.zeros(5000, dtype=torch.long), 1)
    assert found.mean.dtype == torch.float64
    torch.testing.assert_close(found.mean[0, 0], values[0, 0].double(), rtol=1e-13, atol=0)
    assert found.m2.abs().max() < 1e-20


def test_channels_of_very_different_levels_do_not_cancel():
    values, _ = sample(3)
    weights = torch.rand(60, 3, dtype=torch.float64)
    levels = torch.tensor([0.0, 1e9, -1e9, 1e3, 1.0], dtype=torch.float64)
    expected = moments_of_weights(values, weights)
    found = moments_of_weights(values + levels, weights)
    torch.testing.assert_close(found.mean, expected.mean + levels, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.m2[:, [0, 3, 4]], expected.m2[:, [0, 3, 4]], rtol=1e-10, atol=0)
    torch.testing.assert_close(found.m2, expected.m2, rtol=1e-5, atol=0)


def test_groups_of_less_weight_than_one_sample():
    values, _ = sample(4)
    weights = 1e-3 * torch.rand(60, 3, dtype=torch.float64)
    found = moments_of_weights(values, weights)
    for group in range(3):
        own = weights[:, group].numpy()
        mean = np.average(values, axis=0, weights=own)
        np.testing.assert_allclose(found.mean[group], mean, rtol=1e-13)
        np.testing.assert_allclose(found.m2[group], own @ (values.numpy() - mean) ** 2, rtol=1e-12)
        assert float(found.effective_count[group]) == pytest.approx(own.sum() ** 2 / (own**2).sum())


def test_two_samples_have_a_variance_and_one_has_none():
    found = moments_of_labels(torch.tensor([[1.0], [4.0], [7.0]]), torch.tensor([0, 0, 1]), 2)
    assert found.variance[0].item() == 4.5
    assert found.variance[1].isnan()
