"""The design's equations again: slow, one number at a time, in float64, with nothing taken from the package."""

import math

import numpy as np


def variance(values):
    """Unbiased variance over space; of a single position its magnitude."""
    if len(values) == 1:
        return abs(values[0])
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def edit_sample(gradient, weights, gamma, conserve):
    """Edit one sample: gradient (C, S) and weights (C,) in [0, 1] as nested lists, result as an array (C, S)."""
    channels, positions = range(len(gradient)), range(len(gradient[0]))
    if all(weight == 1 for weight in weights) or all(weight == 0 for weight in weights):
        return np.array(gradient, dtype=np.float64)
    kept = [sum(weights[c] * gradient[c][s] for c in channels) for s in positions]
    rest = [sum((1 - weights[c]) * gradient[c][s] for c in channels) for s in positions]
    m, n = variance(kept), variance(rest)
    gain, damping, beta = 1.0, (0.0 if math.isinf(gamma) else 1.0), 1.0
    if m > 0:
        if not math.isinf(gamma):
            gain = gamma * math.sqrt(n / m)
        after = [gain * kept[s] + damping * rest[s] for s in positions]
        if conserve == "independent":
            beta = math.sqrt((m + n) / (m if math.isinf(gamma) else m * gain**2 + n))
        elif conserve == "exact":
            if variance(after) > 0:
                before = [kept[s] + rest[s] for s in positions]
                beta = math.sqrt(variance(before) / variance(after))
            else:
                gain = 1.0
    factors = [weight * gain + (1 - weight) * damping for weight in weights]
    if conserve == "energy":
        before = math.sqrt(sum(gradient[c][s] ** 2 for c in channels for s in positions))
        after = math.sqrt(sum((factors[c] * gradient[c][s]) ** 2 for c in channels for s in positions))
        beta = before / after if after > 0 else 1.0
    return np.array([[value * beta * factors[c] for value in gradient[c]] for c in channels], dtype=np.float64)


def edit(gradient, weights, gamma=math.inf, conserve="energy", places=None):
    """Edit a batch: arrays (B, C, *S), (B, C) and, of the places, (B, *S)."""
    weighted = np.asarray(gradient, dtype=np.float64)
    if places is not None:
        weighted = weighted * np.asarray(places, dtype=np.float64)[:, None]
    flat = weighted.reshape(*np.shape(gradient)[:2], -1)
    rows = [
        edit_sample(row.tolist(), np.asarray(of_row, dtype=np.float64).tolist(), gamma, conserve)
        for row, of_row in zip(flat, np.asarray(weights), strict=True)
    ]
    return np.stack(rows).reshape(np.shape(gradient))


def soft_weights(scores, threshold, softness):
    """Weights of one row of scores, by the formula of the design."""
    if softness == 0:
        return [1.0 if score >= threshold else 0.0 for score in scores]
    if not any(score > 0 for score in scores):
        return [1.0] * len(scores)
    if threshold <= 0:
        return [1.0 if score > 0 else 0.0 for score in scores]
    ramp = [(score / threshold - (1 - softness)) / (2 * softness) for score in scores]
    return [min(1.0, max(0.0, value)) if score > 0 else 0.0 for value, score in zip(ramp, scores, strict=True)]


def kth_largest(scores, share):
    """The k-th largest of a list, k = max(1, int(share n))."""
    return sorted(scores, reverse=True)[max(1, int(share * len(scores))) - 1]


def place_weights(evidence, share, softness, damping=0.1):
    """Factors of the places of one row, by the formula of the design."""
    threshold = kth_largest(evidence, share)
    if len(evidence) == 1:
        return [1.0]
    if softness == 0:
        return [1.0 if value >= threshold else damping for value in evidence]
    mean = sum(evidence) / len(evidence)
    spread = math.sqrt(sum((value - mean) ** 2 for value in evidence) / (len(evidence) - 1))
    ramp = [(value - threshold) / (softness * spread) + 0.5 for value in evidence]
    return [damping + (1 - damping) * min(1.0, max(0.0, value)) for value in ramp]


def gate(values, width, low=0.0, high=math.inf):
    """Derivative of a rectifier for the values (n,) of one row, by the formula of the design."""
    values = [float(value) for value in values]
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) if len(values) > 1 else 0.0
    if width == 0 or spread == 0:
        return [1.0 if low < value < high else 0.0 for value in values]
    found = []
    for value in values:
        rising = min(1.0, max(0.0, (value - low) / (width * spread) + 0.5))
        falling = 1.0 if math.isinf(high) else min(1.0, max(0.0, (high - value) / (width * spread) + 0.5))
        found.append(rising * falling)
    return found


def soft_winners(gradient, values, windows, width):
    """The gradient (C, *O) at the maxima of one row (C, *S), shared window by window."""
    size, stride, padding, dilation = windows
    spread = values.std(ddof=1)
    found = np.zeros_like(values)
    for window in np.ndindex(gradient.shape):
        shares = {}
        for offset in np.ndindex(*size):
            axes = zip(window[1:], stride, padding, offset, dilation, strict=True)
            place = tuple(number * step - margin + at * spacing for number, step, margin, at, spacing in axes)
            if all(0 <= at < length for at, length in zip(place, values.shape[1:], strict=True)):
                place = (window[0], *place)
                shares[place] = values[place]
        highest = max(shares.values())
        shares = {place: max(0.0, 1 + (value - highest) / (width * spread)) for place, value in shares.items()}
        for place, share in shares.items():
            found[place] += gradient[window] * share / sum(shares.values())
    return found


def smooth_line(values, stride):
    """A line convolved with the triangle of half-width `stride`, edges replicated."""
    found = []
    for place in range(len(values)):
        total = 0.0
        for offset in range(1 - stride, stride):
            at = min(len(values) - 1, max(0, place + offset))
            total += (stride - abs(offset)) / stride**2 * values[at]
        found.append(total)
    return found


def smooth_strides(gradient, strides):
    """One row (C, H, W), smoothed line by line and brought back to the norm that it had."""
    before = np.asarray(gradient, dtype=np.float64)
    after = np.apply_along_axis(lambda line: smooth_line(line.tolist(), strides[0]), 1, before)
    after = np.apply_along_axis(lambda line: smooth_line(line.tolist(), strides[1]), 2, after)
    norm = math.sqrt((after**2).sum())
    return after * (math.sqrt((before**2).sum()) / norm if norm > 0 else 1.0)


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
