"""One-sided t-tests of every channel and class at once, straight from moments, as natural log p. Pure functions."""

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import special

from parchgrad.errors import SettingError

__all__ = ["TTest", "check_test", "class_log_p", "student_t_log_sf"]

TTest = Literal["welch", "student"]
Floats = NDArray[np.float64]

# A relative standard deviation up to this is rounding of sums over many samples.
_ROUNDING = 1e-12
# Below this scipy's survival function nears the smallest double, and the continued fraction takes over.
_UNDERFLOW = 1e-280


def check_test(test: str) -> None:
    """Raise `SettingError` unless `test` names a known t-test."""
    if test not in get_args(TTest):
        raise SettingError(f"test is {test!r}, but it must be one of {', '.join(get_args(TTest))}.")


def class_log_p(
    class_count: Floats,
    class_mean: Floats,
    class_variance: Floats,
    count: float,
    mean: Floats,
    variance: Floats,
    *,
    test: TTest = "welch",
) -> Floats:
    """Log p of "the mean over this class is larger than over all other classes", for every channel and class.

    Welch's test (unequal variances) uses the Welch-Satterthwaite degrees of freedom, Student's the pooled variance.
    Under Welch a class or rest with one sample has no variance of its own and falls back to Student. Where a test is
    not defined (a constant channel, a class without samples or without rest), p is 1.

    Args:
        class_count: samples per class, shape (K,).
        class_mean: mean per channel and class, shape (C, K).
        class_variance: unbiased variance per channel and class, shape (C, K); not read where the count is below 2.
        count: samples in all.
        mean: mean per channel over all samples, shape (C,).
        variance: unbiased variance per channel over all samples, shape (C,).
        test: `"welch"` or `"student"`.

    Returns:
        Natural log of the upper-tail p-value, shape (C, K), in float64; finite far below the smallest double.

    Raises:
        SettingError: if `test` is unknown.

    Example:
        >>> samples = np.array([[3.0, 4.0, 5.0, 0.0, 1.0, 2.0, 1.5]])
        >>> log_p = class_log_p(np.array([3.0, 4.0]), np.array([[4.0, 1.125]]), np.array([[1.0, 0.7291666667]]),
        ...                     7, samples.mean(1), samples.var(1, ddof=1))
        >>> np.exp(log_p).round(4)
        array([[0.0081, 0.9919]])
    """
    check_test(test)
    rest_count = count - class_count
    has_both = (class_count > 0) & (rest_count > 0)
    n_class, n_rest = np.where(has_both, class_count, 1.0), np.where(has_both, rest_count, 1.0)

    rest_mean = (count * mean[:, None] - n_class * class_mean) / n_rest
    difference = class_mean - rest_mean
    class_squares = np.where(n_class > 1, class_variance, 0.0) * np.maximum(n_class - 1, 0.0)
    between = difference**2 * n_class * n_rest / count
    rest_squares = np.maximum(variance[:, None] * (count - 1) - class_squares - between, 0.0)
    rest_squares = np.where(n_rest > 1, rest_squares, 0.0)

    student_freedom = np.broadcast_to(np.maximum(n_class + n_rest - 2, 0.0), difference.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        pooled = (class_squares + rest_squares) / student_freedom
        squared_error, freedom = pooled * (1 / n_class + 1 / n_rest), student_freedom
        if test == "welch":
            class_error = class_squares / (n_class - 1) / n_class
            rest_error = rest_squares / (n_rest - 1) / n_rest
            welch_freedom = (class_error + rest_error) ** 2 / (
                class_error**2 / (n_class - 1) + rest_error**2 / (n_rest - 1)
            )
            defined = (n_class > 1) & (n_rest > 1) & np.isfinite(welch_freedom)
            squared_error = np.where(defined, class_error + rest_error, squared_error)
            freedom = np.where(defined, welch_freedom, freedom)
        t = difference / np.sqrt(squared_error)

    # Moments of a constant channel carry the rounding of its mean.
    constant = np.broadcast_to((np.sqrt(variance) <= _ROUNDING * np.abs(mean))[:, None], t.shape)
    undefined = constant | ~np.broadcast_to(has_both, t.shape) | ~(freedom > 0) | np.isnan(t)
    log_p = student_t_log_sf(np.where(undefined, 0.0, t), np.where(undefined, 1.0, freedom))
    return np.where(undefined, 0.0, log_p)


def student_t_log_sf(t: Floats, freedom: Floats) -> Floats:
    """Natural log of P(T > t) for Student's t, elementwise, also where P itself underflows.

    The far tail is half the regularised incomplete beta function I_x(freedom / 2, 1 / 2) at
    x = freedom / (freedom + t^2), by its continued fraction (Abramowitz and Stegun 26.5.8).

    Args:
        t: the statistic, any shape; may be infinite.
        freedom: degrees of freedom, of the same shape, positive.

    Returns:
        Log p of the common shape; -inf only where `t` is infinite.

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
    """Continued fraction of the incomplete beta function by the modified Lentz recursion."""
    tiny = np.finfo(np.float64).tiny
    numerator = np.ones_like(x)
    denominator = 1 / (1 - (a + b) * x / (a + 1))
    value: Floats = denominator.copy()
    # The number of terms that converge grows with the square root of the degrees of freedom.
    for m in range(1, 100 + int(10 * np.sqrt(a.max()))):
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
