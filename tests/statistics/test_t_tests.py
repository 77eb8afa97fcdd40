import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

from parchgrad.errors import SettingError
from parchgrad.statistics.moments import moments_of_weights
from parchgrad.statistics.t_tests import _incomplete_beta_fraction, class_log_p, student_t_log_sf


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


def weighted_moments(samples, weights):
    found = moments_of_weights(torch.from_numpy(samples), torch.from_numpy(weights))
    return {
        "class_weight": found.weight.numpy(),
        "class_square": found.square.numpy(),
        "class_mean": found.mean.numpy().T,
        "class_variance": found.variance.numpy().T,
        "count": float(len(samples)),
        "mean": samples.mean(0),
        "variance": samples.var(0, ddof=1),
    }


def welch_by_hand(samples, weights):
    """Log p of one class, whose samples have these weights, against what the weights leave."""
    parts = []
    for w in (weights, 1 - weights):
        mean = w @ samples / w.sum()
        variance = w @ (samples - mean) ** 2 / (w.sum() - (w**2).sum() / w.sum())
        parts.append((w.sum() ** 2 / (w**2).sum(), mean, variance))
    (n, mean, variance), (rest_n, rest_mean, rest_variance) = parts
    error, rest_error = variance / n, rest_variance / rest_n
    freedom = (error + rest_error) ** 2 / (error**2 / (n - 1) + rest_error**2 / (rest_n - 1))
    return stats.t.logsf((mean - rest_mean) / np.sqrt(error + rest_error), freedom)


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


@pytest.mark.parametrize("scale", [1e-6, 1.0])
@pytest.mark.parametrize("kept", [[3, 1], [2]])
def test_some_classes_of_many_are_tested_against_all_the_others(kept, scale):
    generator = np.random.default_rng(5)
    samples, labels = scale * generator.normal(size=(60, 7)), np.arange(60) % 5
    whole = moments(samples, labels, 5)
    some = {name: value[..., kept] if name.startswith("class") else value for name, value in whole.items()}
    np.testing.assert_allclose(class_log_p(**some), class_log_p(**whole)[:, kept], rtol=1e-9)


def test_classes_of_less_weight_than_one_sample():
    generator = np.random.default_rng(7)
    samples = generator.normal(size=(40, 6))
    weights = generator.uniform(size=(40, 4)) * [0.01, 0.012, 0.014, 0]
    weights[:, 3] = 1 - weights.sum(1)
    assert (weights[:, :3].sum(0) < 0.4).all()
    expected = np.stack([welch_by_hand(samples, column) for column in weights.T], axis=1)
    whole = weighted_moments(samples, weights)
    np.testing.assert_allclose(class_log_p(**whole), expected, rtol=1e-9)
    # What the classes that are left out weigh together, less than one sample, is known from the totals alone.
    some = {name: value[..., [1, 3]] if name.startswith("class") else value for name, value in whole.items()}
    np.testing.assert_allclose(class_log_p(**some), expected[:, [1, 3]], rtol=1e-7)


def test_weights_whose_sum_is_rounded_leave_no_other_class():
    generator = np.random.default_rng(8)
    samples, labels = generator.normal(size=(30, 6)), np.arange(30) % 3
    found = moments(samples, labels, 3)
    expected = class_log_p(**found)
    # A rest of 1e-13 of the count would have the mean that all rounding adds up to, here 1e5.
    found["count"] *= 1 + 1e-13
    found["mean"] = found["mean"] + 1e-8
    np.testing.assert_allclose(class_log_p(**found), expected, rtol=1e-7)


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


@pytest.mark.parametrize("test", ["welch", "student"])
@pytest.mark.parametrize("sizes", [(1, 11), (2, 10), (2, 2), (3, 2), (1, 2), (2, 1), (3, 3), (1, 1, 10), (2, 1, 1)])
def test_groups_of_one_or_two_samples(sizes, test):
    generator = np.random.default_rng(1)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    samples = generator.normal(size=(len(labels), 5))
    log_p = class_log_p(**moments(samples, labels, len(sizes)), test=test)
    for label in range(len(sizes)):
        own, rest = samples[labels == label], samples[labels != label]
        # A single sample has no variance of its own: only the pooled one is left.
        pooled = test == "student" or min(len(own), len(rest)) == 1
        expected = stats.ttest_ind(own, rest, equal_var=pooled, alternative="greater").pvalue
        np.testing.assert_allclose(np.exp(log_p[:, label]), expected, rtol=1e-10)


def test_one_sample_against_one_is_no_test():
    assert np.all(class_log_p(**moments(np.array([[0.0], [1.0]]), np.array([0, 1]), 2)) == 0)


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_class_without_samples_changes_no_other(empty):
    generator = np.random.default_rng(9)
    samples, labels = generator.normal(size=(30, 5)), np.arange(30) % 3
    expected = class_log_p(**moments(samples, labels, 3))
    whole = moments(samples, labels + (labels >= empty), 4)
    # Its mean is that of no sample: any number may stand for it.
    for mean in (0.0, 1e20):
        whole["class_mean"][:, empty] = mean
        found = class_log_p(**whole)
        np.testing.assert_allclose(np.delete(found, empty, axis=1), expected, rtol=1e-12)
        assert np.all(found[:, empty] == 0)


def test_every_channel_is_tested_whatever_their_number():
    generator = np.random.default_rng(10)
    samples, labels = generator.normal(size=(30, 600)), np.arange(30) % 3
    found = class_log_p(**moments(samples, labels, 3))
    expected = stats.ttest_ind(samples[labels == 1], samples[labels != 1], equal_var=False, alternative="greater")
    assert found.shape == (600, 3)
    np.testing.assert_allclose(np.exp(found[:, 1]), expected.pvalue, rtol=1e-10)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_scale_of_the_samples_does_not_matter(scale):
    generator = np.random.default_rng(11)
    samples, labels = generator.normal(size=(30, 5)) + 3, np.arange(30) % 3
    expected = class_log_p(**moments(samples, labels, 3))
    np.testing.assert_allclose(class_log_p(**moments(scale * samples, labels, 3)), expected, rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_a_variance_of_rounding_alone_is_none(scale):
    generator = np.random.default_rng(12)
    samples, labels = scale * (0.3 + 1e-15 * generator.normal(size=(30, 5))), np.arange(30) % 3
    found = moments(samples, labels, 3)
    assert (found["variance"] > 0).all()
    assert np.all(class_log_p(**found) == 0)


def test_an_unknown_test():
    found = moments(np.random.default_rng(2).normal(size=(8, 3)), np.arange(8) % 2, 2)
    with pytest.raises(SettingError, match=r"test. is 'fisher', but it must be one of welch, student"):
        class_log_p(**found, test="fisher")


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


@pytest.mark.parametrize("a", [0.5, 3.0, 40.0, 2000.0])
def test_continued_fraction_is_scipys_incomplete_beta_function(a):
    # Up to the x beyond which it converges slowly, much nearer to the mean than the far tail.
    x = np.linspace(0.05, 0.9, 18) * (a + 1) / (a + 2.5)
    front = a * np.log(x) + 0.5 * np.log1p(-x) - np.log(a) - special.betaln(a, 0.5)
    expected = special.betainc(a, 0.5, x)
    held = expected > 1e-300
    assert held.any()
    found = _incomplete_beta_fraction(x, np.full_like(x, a), 0.5)
    np.testing.assert_allclose((np.exp(front) * found)[held], expected[held], rtol=2e-12)


def test_far_tail_of_one_degree_of_freedom_is_cauchys():
    t = np.array([1e285, 1e300])
    np.testing.assert_allclose(student_t_log_sf(t, np.ones(2)), -np.log(np.pi) - np.log(t), rtol=1e-14)


@pytest.mark.parametrize("freedom", [20.0, 400.0, 1e4, 1e7])
def test_far_tail_goes_on_where_the_survival_function_ends(freedom):
    # Down to 1e-300 scipy's own is good to many digits, by another way than ours.
    t = np.exp(np.linspace(np.log(20), np.log(1e16), 4000))
    survival = stats.t.sf(t, freedom)
    t, survival = t[(survival < 1e-281) & (survival > 1e-305)], survival[(survival < 1e-281) & (survival > 1e-305)]
    assert len(t) > 3
    np.testing.assert_allclose(student_t_log_sf(t, np.full_like(t, freedom)), np.log(survival), rtol=1e-12)


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
    expected = np.stack([welch_by_hand(samples, column) for column in weights.T], axis=1)
    np.testing.assert_allclose(class_log_p(**weighted_moments(samples, weights)), expected, rtol=1e-9)


def test_a_channel_of_one_image_alone_is_finite():
    samples, labels = np.zeros((20, 1)), np.arange(20) // 2
    samples[labels == 3] = 1.0
    log_p = class_log_p(**moments(samples, labels, 10))
    assert np.isfinite(log_p.astype(np.float32)).all()
    assert log_p[0, 3] == log_p.min() < -1e20
