import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

from parchgrad.statistics.moments import moments_of_weights
from parchgrad.statistics.tests import class_log_p, student_t_log_sf


def moments(samples, labels, classes):
    groups = [samples[labels == label] for label in range(classes)]
    return {
        "class_weight": np.array([float(len(group)) for group in groups]),
        "class_square": np.array([float(len(group)) for group in groups]),
        "class_mean": np.stack([group.mean(0) if len(group) else np.zeros(samples.shape[1]) for group in groups], 1),
        "class_variance": np.stack(
            [group.var(0, ddof=1) if len(group) > 1 else np.full(samples.shape[1], np.nan) for group in groups], 1
        ),
        "count": float(len(samples)),
        "mean": samples.mean(0),
        "variance": samples.var(0, ddof=1),
    }


@pytest.mark.parametrize("shift", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("test", ["welch", "student"])
def test_equals_scipy_for_unequal_groups(test, shift):
    generator = np.random.default_rng(0)
    labels = generator.choice(4, size=200, p=[0.1, 0.2, 0.3, 0.4])
    samples = generator.gamma(2.0, size=(200, 7)) * generator.uniform(0.1, 10, size=7)
    samples[labels == 1] += shift
    log_p = class_log_p(**moments(samples, labels, 4), test=test)
    for label in range(4):
        expected = stats.ttest_ind(
            samples[labels == label], samples[labels != label], equal_var=test == "student", alternative="greater"
        ).pvalue
        np.testing.assert_allclose(np.exp(log_p[:, label]), expected, rtol=1e-10)


@pytest.mark.parametrize("test", ["welch", "student"])
@pytest.mark.parametrize("separation", [1e3, 1e6])
def test_a_class_far_from_the_rest_does_not_cancel(separation, test):
    generator = np.random.default_rng(4)
    samples, labels = generator.normal(size=(15, 40)), np.arange(15) % 3
    samples[labels == 0] += separation
    log_p = class_log_p(**moments(samples, labels, 3), test=test)
    for label in range(3):
        own, rest = samples[labels == label], samples[labels != label]
        expected = stats.ttest_ind(own, rest, equal_var=test == "student", alternative="greater").pvalue
        np.testing.assert_allclose(np.exp(log_p[:, label]), expected, rtol=1e-10)


def test_some_classes_of_many_are_tested_against_all_the_others():
    generator = np.random.default_rng(5)
    samples, labels = generator.normal(size=(60, 7)), np.arange(60) % 5
    whole = moments(samples, labels, 5)
    some = {name: value[..., [3, 1]] if name.startswith("class") else value for name, value in whole.items()}
    np.testing.assert_allclose(class_log_p(**some), class_log_p(**whole)[:, [3, 1]], rtol=1e-9)


def test_weights_of_whole_numbers_over_a_common_one_are_repeated_samples_of_a_smaller_size():
    # Weights 0 and 1/2: the effective size is the number of samples, and mean and variance are theirs.
    generator = np.random.default_rng(6)
    samples = generator.normal(size=(20, 6))
    own = np.arange(20) < 8
    weights = np.stack([np.where(own, 0.5, 0.0), np.where(own, 0.5, 1.0)], axis=1)
    torch_moments = moments_of_weights(torch.from_numpy(samples), torch.from_numpy(weights))
    log_p = class_log_p(
        torch_moments.weight.numpy(),
        torch_moments.square.numpy(),
        torch_moments.mean.numpy().T,
        torch_moments.variance.numpy().T,
        20.0,
        samples.mean(0),
        samples.var(0, ddof=1),
    )
    # By hand: every row's weight in the rest is one minus its weight in the class.
    rest = weights[:, 1]
    rest_size = rest.sum() ** 2 / (rest**2).sum()
    rest_mean = rest @ samples / rest.sum()
    rest_variance = rest @ (samples - rest_mean) ** 2 / (rest.sum() - (rest**2).sum() / rest.sum())
    a, b = samples[own].var(0, ddof=1) / 8, rest_variance / rest_size
    t = (samples[own].mean(0) - rest_mean) / np.sqrt(a + b)
    freedom = (a + b) ** 2 / (a**2 / 7 + b**2 / (rest_size - 1))
    np.testing.assert_allclose(log_p[:, 0], stats.t.logsf(t, freedom), rtol=1e-10)


def test_one_sample_falls_back_to_student():
    generator = np.random.default_rng(1)
    samples, labels = generator.normal(size=(12, 5)), np.array([0] + [1] * 11)
    expected = stats.ttest_ind(samples[:1], samples[1:], equal_var=True, alternative="greater").pvalue
    log_p = class_log_p(**moments(samples, labels, 2))
    np.testing.assert_allclose(np.exp(log_p[:, 0]), expected, rtol=1e-10)


def test_undefined_tests_have_p_one():
    samples = np.random.default_rng(2).normal(size=(8, 3))
    # Three tenths have a rounding error in their mean.
    samples[:, 2] = 0.3
    log_p = class_log_p(**moments(samples, np.array([0] * 4 + [1] * 4), 3))
    assert np.all(log_p[2] == 0)
    assert np.all(log_p[:, 2] == 0)
    many = np.tile(np.random.default_rng(3).uniform(size=300), (30, 1))
    assert np.all(class_log_p(**moments(many, np.arange(30) % 3, 3)) == 0)
    alone = class_log_p(**moments(samples, np.zeros(8, int), 1))
    assert np.all(alone == 0)


@pytest.mark.parametrize("freedom", [1.0, 2.5, 30.0, 998.0, 60000.0])
def test_log_survival_equals_scipy_where_it_does_not_underflow(freedom):
    t = np.concatenate([np.linspace(-30, 30, 61), np.linspace(30, 37, 20)])
    survival = stats.t.sf(t, freedom)
    finite = survival > 1e-280
    ours = student_t_log_sf(t, np.full_like(t, freedom))
    np.testing.assert_allclose(ours[finite], np.log(survival[finite]), rtol=1e-12)


@pytest.mark.parametrize(("t", "freedom"), [(50.0, 900.0), (300.0, 700.0), (1e4, 400.0), (40.0, 1e6)])
def test_far_tail_equals_a_numerical_integral(t, freedom):
    # P(T > t) is f(t) times the integral of the density's ratio, which neither under- nor overflows.
    def ratio(u):
        return t * np.exp(u - (freedom + 1) / 2 * np.log1p(t / freedom * t * np.expm1(2 * u) / (1 + t / freedom * t)))

    integral = integrate.quad(ratio, 0, 1, epsrel=1e-12, points=[1e-4, 1e-3, 1e-2])[0]
    log_density = (
        special.gammaln((freedom + 1) / 2)
        - special.gammaln(freedom / 2)
        - 0.5 * np.log(freedom * np.pi)
        - (freedom + 1) / 2 * np.logaddexp(0, 2 * np.log(t) - np.log(freedom))
    )
    ours = student_t_log_sf(np.array([t]), np.array([freedom]))
    np.testing.assert_allclose(ours, log_density + np.log(integral), rtol=1e-10)


def test_far_tail_of_one_degree_of_freedom_is_cauchys():
    t = np.array([1e285, 1e300])
    np.testing.assert_allclose(student_t_log_sf(t, np.ones(2)), -np.log(np.pi) - np.log(t), rtol=1e-14)


def test_far_tail_falls_with_t_and_only_infinity_is_impossible():
    t = np.concatenate([np.linspace(20, 2000, 500), [1e10, 1e100, np.inf]])
    log_p = student_t_log_sf(t, np.full_like(t, 500.0))
    assert np.all(np.diff(log_p) < 0)
    assert np.isfinite(log_p[:-1]).all()
    assert log_p[-1] == -np.inf


def test_soft_weights_against_the_weights_that_are_left_one_by_one():
    generator = np.random.default_rng(3)
    samples = generator.normal(size=(300, 8)) + 100
    weights = generator.dirichlet(np.full(6, 0.3), size=300)
    of_classes = moments_of_weights(torch.from_numpy(samples), torch.from_numpy(weights))
    log_p = class_log_p(
        *(
            of_classes.weight.numpy(),
            of_classes.square.numpy(),
            of_classes.mean.numpy().T,
            of_classes.variance.numpy().T,
        ),
        *(300.0, samples.mean(0), samples.var(0, ddof=1)),
    )
    for k in range(6):
        parts = []
        for w in (weights[:, k], 1 - weights[:, k]):
            mean = w @ samples / w.sum()
            variance = w @ (samples - mean) ** 2 / (w.sum() - (w**2).sum() / w.sum())
            parts.append((w.sum() ** 2 / (w**2).sum(), mean, variance))
        (n, mean, variance), (rest_n, rest_mean, rest_variance) = parts
        error, rest_error = variance / n, rest_variance / rest_n
        freedom = (error + rest_error) ** 2 / (error**2 / (n - 1) + rest_error**2 / (rest_n - 1))
        expected = stats.t.logsf((mean - rest_mean) / np.sqrt(error + rest_error), freedom)
        np.testing.assert_allclose(log_p[:, k], expected, rtol=1e-9)


def test_a_channel_of_one_image_alone_is_finite():
    samples, labels = np.zeros((20, 1)), np.arange(20) // 2
    samples[labels == 3] = 1.0
    log_p = class_log_p(**moments(samples, labels, 10))
    assert np.isfinite(log_p).all()
    assert log_p[0, 3] == log_p.min() < -1e20
