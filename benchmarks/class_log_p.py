"""Log p of 4,800 channels x 1,000 classes from moments, compared with a loop over scipy's t-test.

    python benchmarks/class_log_p.py

Prints the median time and memory of the former, and the relative time of the latter, measured on a sample of pairs.
"""

import resource
import statistics
import time

import numpy as np
import torch
from scipy import stats

from parchgrad.statistics.moments import moments_of_labels
from parchgrad.statistics.t_tests import class_log_p

CHANNELS, CLASSES, PER_CLASS = 4800, 1000, 20
DISTINCT = 480
ROUNDS = 5
PAIRS = (40, 5)


def peak_gigabytes() -> float:
    """Return the peak resident memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Measure and print the results."""
    labels = np.repeat(np.arange(CLASSES), PER_CLASS)
    samples = np.random.default_rng(0).gamma(2.0, size=(len(labels), DISTINCT))
    moments = moments_of_labels(torch.from_numpy(samples), torch.from_numpy(labels), CLASSES)
    copies = (CHANNELS // DISTINCT, 1)
    class_mean, class_variance = (np.tile(part.numpy().T, copies) for part in (moments.mean, moments.variance))
    mean, variance = np.tile(samples.mean(0), copies[0]), np.tile(samples.var(0, ddof=1), copies[0])
    weight = moments.weight.numpy()

    before, seconds = peak_gigabytes(), []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        log_p = class_log_p(weight, weight, class_mean, class_variance, len(labels), mean, variance)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    print(f"from moments: median {median:.2f} s, {peak_gigabytes() - before:.2f} GB more than the moments themselves")

    start = time.perf_counter()
    expected = [
        stats.ttest_ind(samples[labels == k, c], samples[labels != k, c], equal_var=False, alternative="greater").pvalue
        for k in range(PAIRS[0])
        for c in range(PAIRS[1])
    ]
    per_pair = (time.perf_counter() - start) / len(expected)
    print(f"scipy in a loop: {per_pair * CHANNELS * CLASSES / median:,.0f} times as long, from {len(expected)} pairs")
    found = np.exp(log_p[: PAIRS[1], : PAIRS[0]]).T.ravel()
    print(f"largest relative difference of p: {np.max(np.abs(found / expected - 1)):.1e}")


if __name__ == "__main__":
    main()
