"""Channels: how one responds to a class and to the rest, and which were kept."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from parchgrad.checks import check_kind
from parchgrad.edit import Edit
from parchgrad.errors import InputError, SettingError
from parchgrad.recording import record_selections
from parchgrad.statistics.tests import class_log_p
from parchgrad.visual.charts import LIGHT, Theme, histogram_chart, style_axes

__all__ = ["KeptChannels", "gap_histogram", "kept_channels"]

# Natural log of p: below the first floats lose digits, below the second neither side varies and p is 0.
_SMALL, _NONE = math.log(1e-300), -1e29


def gap_histogram(
    gaps: ArrayLike, in_class: ArrayLike, *, channel: str = "channel", category: str = "class", theme: Theme = LIGHT
) -> Figure:
    """Draw how a channel responds to the images of a class and to the rest, with the p-value that `ClassWise` ranks by.

    Args:
        gaps: the channel's GAP in each image, its mean over space of relu(output), shape (N,); see `collect_gaps`.
        in_class: whether each image is of the class, boolean, shape (N,).
        channel: name of the channel.
        category: name of the class.
        theme: colours.

    Returns:
        A figure whose title gives the one-sided p-value of Welch's t-test: the mean over the class is larger. However
        small it is, it is written out; where neither side varies, the title says so.

    Raises:
        InputError: if the two do not match or are no numbers and booleans, values are not finite, or a side has fewer
            than two images.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> gaps = np.concatenate([generator.normal(2, 1, 20), generator.normal(0, 1, 200)])
        >>> figure = gap_histogram(gaps, np.arange(220) < 20, channel="conv_head, channel 7", category="espresso")
        >>> figure.axes[0].get_title()
        'conv_head, channel 7: p = 4.6e-09'
    """
    values, chosen = _numbers(gaps, "GAPs").astype(np.float64), _numbers(in_class, "choice of images")
    if values.ndim != 1 or chosen.shape != values.shape or chosen.dtype != np.bool_:
        raise InputError(
            f"GAPs of shape {values.shape} and a choice of images of shape {chosen.shape} and type {chosen.dtype} do "
            "not match; give numbers and booleans, both (N,)."
        )
    if not np.isfinite(values).all():
        raise InputError(f"The GAPs of {channel} hold NaN or infinite values; look for where they began.")
    inside, rest = values[chosen], values[~chosen]
    if min(inside.size, rest.size) < 2:
        raise InputError(
            f"{inside.size} images of {category} and {rest.size} others cannot be compared; give two of each at least."
        )
    return histogram_chart(
        {category: inside, "all other images": rest},
        x_label="GAP: mean over space of relu(output)",
        y_label="share of the images",
        title=f"{channel}: {_p_text(_welch_log_p(inside, rest))}",
        theme=theme,
    )


def _numbers(values: ArrayLike, name: str) -> NDArray[Any]:
    """An array of numbers or booleans; tensors from any device, with or without a gradient."""
    try:
        # NumPy has no bfloat16; float64 holds all that is in a tensor of floating-point numbers.
        if isinstance(values, Tensor):
            values = values.detach().cpu()
            values = (values.double() if values.is_floating_point() else values).numpy()
        found = np.asarray(values)
    except ValueError:
        found = np.asarray(None)
    if found.dtype.kind not in "biuf":
        raise InputError(f"The {name} of a histogram are no real numbers; give one number for each image, (N,).")
    return found


def _welch_log_p(inside: NDArray[np.float64], rest: NDArray[np.float64]) -> float:
    """Natural log of the p-value as channel statistics have it, from the moments."""
    every = np.concatenate([inside, rest])
    sizes = np.array([inside.size, rest.size], dtype=np.float64)
    (inside_mean, inside_variance), (rest_mean, rest_variance), (mean, variance) = map(_moments, (inside, rest, every))
    log_p = class_log_p(
        sizes,
        sizes,
        np.array([[inside_mean, rest_mean]]),
        np.array([[inside_variance, rest_variance]]),
        every.size,
        np.array([mean]),
        np.array([variance]),
    )
    return float(log_p[0, 0])


def _moments(values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and unbiased variance, exact where all values are equal."""
    deviations = values - values[0]
    return float(values[0] + deviations.mean()), float(deviations.var(ddof=1))


def _p_text(log_p: float) -> str:
    if log_p < _NONE:
        return "p < 1e-300, neither side varies"
    # A float would be 0 where its log is not.
    return f"p = {math.exp(log_p):.2g}" if log_p > _SMALL else f"p = {Decimal(log_p).exp():.1e}"


@dataclass(frozen=True, eq=False, kw_only=True)
class KeptChannels:
    """Which channels were kept in the layers of a network, for one class or two: those with a weight above 0.

    Attributes:
        layers: names of the convolutions, from input to output; one that is passed twice has two entries.
        channels: number of channels of each, (L,).
        categories: names of the T explained classes, one or two.
        untouched: where all channels weigh the same, so that the layer is left as it is and its whole gradient passes,
            boolean, (T, L).
        count: channels with a weight above 0 and a gradient, (T, L); in untouched layers all that had a gradient, since
            they pass.
        energy_share: share of the layer's gradient energy, the sum of squares, in the kept channels, (T, L); 1 in
            untouched layers, and NaN where the layer has no gradient.
        overlap: channels kept for both classes as a share of those kept for either, (L,); NaN where none are kept or
            the layer is untouched for a class, and None for one class.
    """

    layers: tuple[str, ...]
    channels: NDArray[np.int64]
    categories: tuple[str, ...]
    untouched: NDArray[np.bool_]
    count: NDArray[np.int64]
    energy_share: NDArray[np.float64]
    overlap: NDArray[np.float64] | None

    def figure(self, *, theme: Theme = LIGHT) -> Figure:
        """Draw share of the channels, share of the energy, and overlap, over the layers.

        Layers that are untouched stand at the top of the first two rows, by hollow marks.
        """
        rows = {
            "channels with\nweight > 0": self.count / self.channels,
            "share of energy\nin these": self.energy_share,
        }
        count = len(rows) + (self.overlap is not None)
        figure = Figure(layout="constrained")
        figure.set_facecolor("none")
        grid = figure.subplots(count, sharex=True)
        last, marks = grid[-1], dict[str, Any]()
        for axes, (y_label, values) in zip(grid, rows.items(), strict=False):
            style_axes(axes, theme, y_label=y_label)
            for number, (category, shares) in enumerate(zip(self.categories, values, strict=True)):
                marks |= _draw_layers(axes, category, shares, self.untouched[number], number, theme)
        if self.overlap is not None:
            style_axes(last, theme, y_label="overlap")
            label = "weight > 0 for both, of those for either"
            marks |= _draw_layers(last, label, self.overlap, np.zeros(len(self.layers), dtype=bool), 2, theme)
        last.set_xlabel("convolution, from the first edited one to the last", color=theme.ink, fontsize=9.5)
        for axes in figure.axes:
            axes.set_ylim(-0.06, 1.06)
        # Two columns where the names are short enough for them.
        columns = 2 if max(map(len, marks)) <= 40 else 1
        figure.set_size_inches(6.4, 1.75 * count + 0.4 + 0.19 * math.ceil(len(marks) / columns))
        figure.legend(
            list(marks.values()),
            list(marks),
            loc="outside lower left",
            ncols=columns,
            frameon=False,
            fontsize=8.5,
            labelcolor=theme.ink,
            columnspacing=1.5,
        )
        return figure


# Shape and size of the marks of a class, so that of two in one place both are seen.
_MARKS = (("o", 6.0), ("D", 3.2), ("s", 3.8))


def _draw_layers(
    axes: Any, label: str, values: NDArray[Any], untouched: NDArray[np.bool_], number: int, theme: Theme
) -> dict[str, Any]:
    """Draw a mark for each layer, hollow where it is untouched; without lines, since neighbours differ in kind."""
    places, (mark, size), colour = np.arange(1, len(values) + 1), _MARKS[number], theme.lines[number]
    style = {"linestyle": "none", "marker": mark, "markersize": size, "color": colour}
    (filled,) = axes.plot(places, np.where(untouched, np.nan, values), markeredgewidth=0, **style)
    handles = {label: filled}
    if untouched.any():
        hollow = {**style, "markersize": size + 1.5, "markerfacecolor": "none", "markeredgewidth": 1.0}
        (handles[f"{label}: layer left as it is"],) = axes.plot(places[untouched], np.ones(untouched.sum()), **hollow)
    return handles


def kept_channels(
    model: nn.Module,
    inputs: Tensor,
    targets: Sequence[int],
    edit: Edit = Edit(),
    *,
    categories: Sequence[str] | None = None,
) -> KeptChannels:
    """Find the channels that weigh more than 0 in each layer, for one class or two, and how far two overlap.

    Args:
        model: classifier in evaluation mode, logits (B, K).
        inputs: one preprocessed image, shape (1, C, *S).
        targets: one class index, or two.
        edit: what is done to the gradient, with a selector.
        categories: names of the classes; None takes "class" and the index.

    Raises:
        InputError: if there is not one image.
        SettingError: if there are not one or two different classes, or as many names, or `edit` has no selector.
        ParchGradError: whatever `Explainer` raises.

    Example:
        >>> import parchgrad as pg
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)).eval()
        >>> edit = Edit(selector=pg.GradientEnergy(quantile=0.25, softness=0))
        >>> found = kept_channels(model, torch.rand(1, 3, 4, 4), [0, 1], edit)
        >>> found.layers, found.count.tolist()
        (('0',), [[2], [2]])
    """
    check_kind("edit", edit, Edit, "pass one such as Edit(selector=GradientEnergy())", wanted="an Edit")
    if inputs.shape[0] != 1:
        raise InputError(
            f"The inputs have shape {tuple(inputs.shape)}, but kept channels are of one image (1, C, *S); give "
            "inputs[:1]."
        )
    names = tuple(categories) if categories is not None else tuple(f"class {index}" for index in targets)
    if len(targets) not in (1, 2) or len(names) != len(targets):
        raise SettingError(
            f"{len(targets)} targets and {len(names)} categories are given, but one class or two can be looked at; "
            "give a name for each."
        )
    if len(set(map(int, targets))) < len(targets):
        raise SettingError(f"Both targets are {int(targets[0])}, but two classes are compared; give different ones.")
    # One row for each class: the image twice.
    batch = inputs.expand(len(targets), *inputs.shape[1:])
    found = record_selections(model, edit, batch, list(targets))[::-1]
    untouched = [record.untouched.cpu().numpy() for record in found]
    # All that has a gradient passes in an untouched layer.
    passing = [record.kept | (record.untouched.unsqueeze(1) & (record.channel_norms > 0)) for record in found]
    kept = [mask.cpu().numpy() for mask in passing]
    energy = [_energy(record.channel_norms) for record in found]
    with np.errstate(invalid="ignore"):
        shares = [(part * mask).sum(axis=1) / part.sum(axis=1) for part, mask in zip(energy, kept, strict=True)]
        overlap = [
            np.nan if left.any() else mask.all(axis=0).sum() / np.float64(mask.any(axis=0).sum())
            for mask, left in zip(kept, untouched, strict=True)
        ]
    return KeptChannels(
        layers=tuple(record.layer for record in found),
        channels=np.array([mask.shape[1] for mask in kept]),
        categories=names,
        untouched=np.stack(untouched, axis=1),
        count=np.stack([mask.sum(axis=1) for mask in kept], axis=1),
        energy_share=np.stack(shares, axis=1),
        overlap=np.array(overlap) if len(targets) == 2 else None,
    )


def _energy(norms: Tensor) -> NDArray[np.float64]:
    """Energy of each channel (B, C), by the strongest channel of its row: squares of small norms would vanish."""
    peaks = norms.amax(dim=1, keepdim=True)
    unit = norms / torch.where(peaks > 0, peaks, torch.ones_like(peaks))
    energy: NDArray[np.float64] = unit.cpu().double().numpy() ** 2
    return energy
