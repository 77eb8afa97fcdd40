"""One-sided t-tests of all channels and classes at once, from moments to natural log p. Pure functions."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import special

from parchgrad.errors import SettingError

__all__ = ["TTest", "check_test", "class_log_p", "student_t_log_sf"]

TTest = Literal["welch", "student"]
Floats = NDArray[np.float64]

# Relative standard deviations up to this are rounding error.
_ROUNDING = 1e-12
# Below this scipy's survival function nears the smallest double, so the continued fraction is used.
_UNDERFLOW = 1e-280
_BLOCK = 256
# Log p for infinite t (neither group varies): finite in float32 too, and below all others.
_SEPARATED = -1e30


def check_test(test: str) -> None:
    """Raise `SettingError` unless `test` names a known t-test."""
    if test not in get_args(TTest):
        raise SettingError(f"`test` is {test!r}, but it must be one of {', '.join(get_args(TTest))}.")


def class_log_p(
    class_weight: Floats,
    class_square: Floats,
    class_mean: Floats,
    class_variance: Floats,
    count: float,
    mean: Floats,
    variance: Floats,
    *,
    test: TTest = "welch",
) -> Floats:
    """Compute log p of "the mean over this class exceeds the mean over all others", per channel and class.

    Welch's test (unequal variances) uses the Welch-Satterthwaite degrees of freedom, Student's the pooled variance.
    Weighted samples count with their effective number (Kish 1965), the squared sum of the weights over the sum of
    their squares; the remaining weights form the rest of a class. Welch's test falls back to Student's if a group has
    fewer than two effective samples. Where a test is undefined (a constant channel, a class without samples or without
    rest), p is 1.

    Args:
        class_weight: sum of the sample weights per class, shape (K,); the count for weights of zero or one.
        class_square: sum of squared weights per class, shape (K,).
        class_mean: weighted mean per channel and class, shape (C, K).
        class_variance: unbiased weighted variance per channel and class, shape (C, K); ignored for classes with at
            most one effective sample.
        count: total number of samples.
        mean: mean per channel over all samples, shape (C,).
        variance: unbiased variance per channel over all samples, shape (C,).
        test: `"welch"` or `"student"`.

    Returns:
        Natural log of the upper-tail p-value, shape (C, K), in float64; finite far below the smallest double.

    Raises:
        SettingError: if `test` is unknown.

    Example:
        >>> samples, sizes = np.array([[3.0, 4.0, 5.0, 0.0, 1.0, 2.0, 1.5]]), np.array([3.0, 4.0])
        >>> log_p = class_log_p(sizes, sizes, np.array([[4.0, 1.125]]), np.array([[1.0, 0.7291666667]]),
        ...                     7, samples.mean(1), samples.var(1, ddof=1))
        >>> np.exp(log_p).round(4)
        array([[0.0081, 0.9919]])
    """
    check_test(test)

    def part(rows: slice) -> Floats:
        of_class = (class_weight, class_square, class_mean[rows], class_variance[rows])
        return _log_p_of_channels(*of_class, count, mean[rows], variance[rows], test)

    # Blocks fit the caches, and numpy releases the GIL.
    blocks = [slice(start, start + _BLOCK) for start in range(0, len(mean), _BLOCK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.concatenate(list(pool.map(part, blocks)))


def _log_p_of_channels(
    weight: Floats,
    square: Floats,
    class_mean: Floats,
    class_variance: Floats,
    count: float,
    mean: Floats,
    variance: Floats,
    test: TTest,
) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        # NaN for a class without samples, whose test is undefined.
        size = weight**2 / square
        class_m2 = np.where(size > 1, class_variance * (weight - square / weight), 0.0)
        # Sums of the remaining weights 1 - w and of their squares.
        rest_weight, rest_square = count - weight, count - 2 * weight + square
        rest_size = np.where(rest_square > 0, rest_weight**2 / rest_square, 0.0)
        rest_mean, rest_m2 = _rest_of_each_class(weight, class_mean, class_m2, count, mean, variance * (count - 1))
        rest_variance = np.where(rest_size > 1, rest_m2 / (rest_weight - rest_square / rest_weight), 0.0)
        own_variance = np.where(size > 1, class_variance, 0.0)

        difference = class_mean - rest_mean
        freedom = np.broadcast_to(size + rest_size - 2, difference.shape)
        pooled = (own_variance * (size - 1) + rest_variance * (rest_size - 1)) / freedom
        squared_error = pooled * (1 / size + 1 / rest_size)
        if test == "welch":
            class_error, rest_error = own_variance / size, rest_variance / rest_size
            welch_freedom = (class_error + rest_error) ** 2 / (
                class_error**2 / (size - 1) + rest_error**2 / (rest_size - 1)
            )
            defined = (size >= 2) & (rest_size >= 2) & np.isfinite(welch_freedom)
            squared_error = np.where(defined, class_error + rest_error, squared_error)
            freedom = np.where(defined, welch_freedom, freedom)
        t = difference / np.sqrt(squared_error)
        # A constant channel's moments contain the rounding error of its mean.
        constant = (np.sqrt(variance) <= _ROUNDING * np.abs(mean))[:, None]
        defined = ~constant & (rest_weight > 0) & (freedom > 0) & ~np.isnan(t)
    log_p: Floats = np.zeros_like(t)
    log_p[defined] = student_t_log_sf(t[defined], freedom[defined])
    return np.maximum(log_p, _SEPARATED)


def _rest_of_each_class(
    weight: Floats, mean: Floats, m2: Floats, count: float, total_mean: Floats, total_m2: Floats
) -> tuple[Floats, Floats]:
    """Compute mean and m2 of all samples outside each class, each (C, K), by merging the other classes.

    Subtracting the class from the total instead would cancel for a class far from the rest.
    """
    before = _running_merge(weight, mean, m2)
    behind = _running_merge(weight[::-1], mean[:, ::-1], m2[:, ::-1])
    after = (behind[0][::-1], behind[1][:, ::-1], behind[2][:, ::-1])
    # Samples of no listed class: statistics may be restricted to some classes.
    before_last = (before[0][-1:], before[1][:, -1:], before[2][:, -1:])
    everything = _merge(before_last, (weight[-1:], mean[:, -1:], m2[:, -1:]))
    other_weight = count - everything[0]
    other_weight = np.where(other_weight > _ROUNDING * count, other_weight, 0.0)
    safe = np.where(other_weight > 0, other_weight, 1.0)
    other_mean = (count * total_mean[:, None] - everything[0] * everything[1]) / safe
    between = (other_mean - everything[1]) ** 2 * everything[0] * other_weight / count
    other_m2 = np.where(other_weight > 0, np.maximum(total_m2[:, None] - everything[2] - between, 0.0), 0.0)
    other = (other_weight, other_mean, other_m2)
    _, rest_mean, rest_m2 = _merge(_merge(before, after), other)
    return rest_mean, rest_m2


def _running_merge(weight: Floats, mean: Floats, m2: Floats) -> tuple[Floats, Floats, Floats]:
    """Compute weight, mean and m2 of all classes before each class; zero for the first."""
    channels, classes = mean.shape
    weights = np.concatenate([[0.0], np.cumsum(weight)[:-1]])
    means, m2s = np.zeros((classes, channels)), np.zeros((classes, channels))
    # Classes first, so that each step of the loop reads contiguous channels.
    mean, m2 = np.ascontiguousarray(mean.T), np.ascontiguousarray(m2.T)
    for k in range(1, classes):
        together = weights[k]
        share = weight[k - 1] / together if together > 0 else 0.0
        difference = mean[k - 1] - means[k - 1]
        means[k] = means[k - 1] + difference * share
        m2s[k] = m2s[k - 1] + m2[k - 1] + difference**2 * (weights[k - 1] * share)
    return weights, means.T, m2s.T


def _merge(
    first: tuple[Floats, Floats, Floats], second: tuple[Floats, Floats, Floats]
) -> tuple[Floats, Floats, Floats]:
    """Apply Chan's update to (weight, mean, m2), elementwise."""
    weight = first[0] + second[0]
    share = second[0] / np.where(weight > 0, weight, 1.0)
    difference = second[1] - first[1]
    return weight, first[1] + difference * share, first[2] + second[2] + difference**2 * (first[0] * share)


def student_t_log_sf(t: Floats, freedom: Floats) -> Floats:
    """Compute the natural log of P(T > t) for Student's t, elementwise, even where P underflows.

    The far tail is half the regularised incomplete beta function I_x(freedom / 2, 1 / 2) at
    x = freedom / (freedom + t^2), by its continued fraction (Abramowitz and Stegun 26.5.8).

    Args:
        t: the statistic, any shape; may be infinite.
        freedom: degrees of freedom, same shape, positive.

    Returns:
        Log p, same shape; -inf only where `t` is infinite.

    Example:
        >>> student_t_log_sf(np.array([0.0, 2.0, 1e3]), np.array([5.0, 5.0, 500.0])).round(3)
        array([-6.930000e-01, -2.977000e+00, -1.904377e+03])
    """
    survival = special.stdtr(freedom, -t)
    far = survival < _UNDERFLOW
    log_p: Floats = np.log(np.where(far, 1.0, survival))
    if far.any():
        log_p[far] = _far_tail(t[far], freedom[far])
    return log_p


def _far_tail(t: Floats, freedom: Floats) -> Floats:
    a, b = freedom / 2, 0.5
    # Log x and log (1 - x) of x = freedom / (freedom + t^2), without forming t^2 (which may overflow).
    log_ratio = 2 * np.log(t) - np.log(freedom)
    log_x = -np.logaddexp(0.0, log_ratio)
    log_complement = -np.logaddexp(0.0, -log_ratio)
    front = a * log_x + b * log_complement - np.log(a) - special.betaln(a, b)
    result: Floats = front + np.log(_incomplete_beta_fraction(np.exp(log_x), a, b)) - np.log(2.0)
    result[np.isinf(t)] = -np.inf
    return result


def _incomplete_beta_fraction(x: Floats, a: Floats, b: float) -> Floats:
    """Evaluate the continued fraction of the incomplete beta function with the modified Lentz recursion."""
    tiny = np.finfo(np.float64).tiny
    numerator = np.ones_like(x)
    denominator = 1 / (1 - (a + b) * x / (a + 1))
    value: Floats = denominator.copy()
    # In the far tail fewer than ten terms suffice for any degrees of freedom.
    for m in range(1, 100):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            denominator = 1 / np.maximum(1 + term * denominator, tiny)
            numerator = 1 + term / numerator
            step = denominator * numerator
            value = value * step
        if np.all(np.abs(step - 1) < 1e-15):
            break
    return value
