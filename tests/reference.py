"""The design's equations again: slow, one number at a time, in float64, with nothing taken from the package."""

import math

import numpy as np


def variance(values):
    """Unbiased variance over space; of a single position its magnitude."""
    if len(values) == 1:
        return abs(values[0])
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def edit_sample(gradient, mask, gamma, conserve):
    """Edit one sample: gradient (C, S) and mask (C,) as nested lists, result as an array (C, S)."""
    channels, positions = len(gradient), len(gradient[0])
    if all(mask) or not any(mask):
        return np.array(gradient, dtype=np.float64)
    kept = [sum(gradient[c][s] for c in range(channels) if mask[c]) for s in range(positions)]
    rest = [sum(gradient[c][s] for c in range(channels) if not mask[c]) for s in range(positions)]
    m, n = variance(kept), variance(rest)
    gain, damping, beta = 1.0, (0.0 if math.isinf(gamma) else 1.0), 1.0
    if m > 0:
        if not math.isinf(gamma):
            gain = gamma * math.sqrt(n / m)
        after = [gain * kept[s] + damping * rest[s] for s in range(positions)]
        if conserve == "independent":
            beta = math.sqrt((m + n) / (m if math.isinf(gamma) else m * gain**2 + n))
        elif conserve == "exact":
            if variance(after) > 0:
                before = [kept[s] + rest[s] for s in range(positions)]
                beta = math.sqrt(variance(before) / variance(after))
            else:
                gain = 1.0
    return np.array(
        [[value * beta * (gain if mask[c] else damping) for value in gradient[c]] for c in range(channels)],
        dtype=np.float64,
    )


def edit(gradient, mask, gamma=math.inf, conserve="independent"):
    """Edit a batch: arrays (B, C, *S) and (B, C)."""
    flat = np.asarray(gradient, dtype=np.float64).reshape(*np.shape(gradient)[:2], -1)
    rows = [
        edit_sample(row.tolist(), chosen.tolist(), gamma, conserve)
        for row, chosen in zip(flat, np.asarray(mask), strict=True)
    ]
    return np.stack(rows).reshape(np.shape(gradient))


def best_channels(scores, quantile):
    """Indices of the k = max(1, int(q C)) largest scores of a list, with everything tied with the last of them."""
    kept = max(1, int(quantile * len(scores)))
    last = sorted(scores, reverse=True)[kept - 1]
    return {channel for channel, score in enumerate(scores) if score >= last}


def evidence(gradient, output):
    """Evidence of one sample, gradient and output (C, S) as nested lists: at each place, and scores of the channels."""
    channels, positions = range(len(gradient)), range(len(gradient[0]))
    means = [sum(output[c]) / len(positions) if len(positions) > 1 else 0.0 for c in channels]
    centred = [[output[c][s] - means[c] for s in positions] for c in channels]
    places = [sum(gradient[c][s] * centred[c][s] for c in channels) for s in positions]
    norms = [math.sqrt(sum(value**2 for value in centred[c])) or 1.0 for c in channels]
    scores = [sum(max(0.0, places[s]) * gradient[c][s] * centred[c][s] for s in positions) / norms[c] for c in channels]
    return places, scores
