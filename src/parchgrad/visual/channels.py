"""Figures about channels: how a channel responds to a class, and which channels an edit keeps."""

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

from parchgrad._io.checks import check_kind
from parchgrad.core.edit import Edit
from parchgrad.errors import InputError, SettingError
from parchgrad.explain.recording import record_selections
from parchgrad.statistics.t_tests import class_log_p
from parchgrad.visual.charts import LIGHT, Theme, histogram_chart, style_axes

__all__ = ["KeptChannels", "gap_histogram", "kept_channels"]

# Natural log of p: below the first, floats lose digits; below the second, neither side varies and p is 0.
_SMALL, _NONE = math.log(1e-300), -1e29


def gap_histogram(
    gaps: ArrayLike, in_class: ArrayLike, *, channel: str = "channel", category: str = "class", theme: Theme = LIGHT
) -> Figure:
    """Draw a channel's responses to a class and to all other images, with the p-value that `ClassWise` ranks by.

    Args:
        gaps: the channel's GAP in each image, its spatial mean of relu(output), shape (N,); see `collect_gaps`.
        in_class: whether each image belongs to the class, boolean, shape (N,).
        channel: name of the channel.
        category: name of the class.
        theme: colours.

    Returns:
        A figure whose title gives the p-value of Welch's one-sided t-test for a larger mean over the class. Tiny
        p-values are written in full; the title says where neither side varies.

    Raises:
        InputError: if `gaps` and `in_class` do not match or have the wrong type, values are not finite, or a side has
            fewer than two images.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> gaps = np.concatenate([generator.normal(2, 1, 20), generator.normal(0, 1, 200)])
        >>> figure = gap_histogram(gaps, np.arange(220) < 20, channel="conv_head, channel 7", category="espresso")
        >>> figure.axes[0].get_title()
        'conv_head, channel 7: p = 4.6e-09'
    """
    values, chosen = _numbers(gaps, "gaps").astype(np.float64), _numbers(in_class, "in_class")
    if values.ndim != 1 or chosen.shape != values.shape or chosen.dtype != np.bool_:
        raise InputError(
            f"`gaps` has shape {values.shape}, and `in_class` has shape {chosen.shape} and type {chosen.dtype}. Pass "
            "numbers (N,) and booleans (N,)."
        )
    if not np.isfinite(values).all():
        raise InputError(f"`gaps` of {channel} contains NaN or infinite values. Check the model's outputs.")
    inside, rest = values[chosen], values[~chosen]
    if min(inside.size, rest.size) < 2:
        raise InputError(
            f"`in_class` selects {inside.size} images of {category} and leaves {rest.size}. Pass at least two of each."
        )
    return histogram_chart(
        {category: inside, "all other images": rest},
        x_label="GAP: mean over space of relu(output)",
        y_label="share of the images",
        title=f"{channel}: {_p_text(_welch_log_p(inside, rest))}",
        theme=theme,
    )


def _numbers(values: ArrayLike, name: str) -> NDArray[Any]:
    """Convert numbers or booleans to an array; tensors may be on any device, with or without a gradient."""
    try:
        # NumPy has no bfloat16, and float64 holds every floating-point value exactly.
        if isinstance(values, Tensor):
            values = values.detach().cpu()
            values = (values.double() if values.is_floating_point() else values).numpy()
        found = np.asarray(values)
    except ValueError:
        found = np.asarray(None)
    if found.dtype.kind not in "biuf":
        raise InputError(f"`{name}` does not contain real numbers. Pass one value per image, shape (N,).")
    return found


def _welch_log_p(inside: NDArray[np.float64], rest: NDArray[np.float64]) -> float:
    """Natural log of the p-value, computed from moments as in the channel statistics."""
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
    # exp(log_p) underflows to 0 for smaller values.
    return f"p = {math.exp(log_p):.2g}" if log_p > _SMALL else f"p = {Decimal(log_p).exp():.1e}"


@dataclass(frozen=True, eq=False, kw_only=True)
class KeptChannels:
    """Channels that each layer keeps, with a weight above 0, for one or two classes.

    Attributes:
        layers: names of the convolutions, from input to output; one that is called twice has two entries.
        channels: number of channels of each layer, (L,).
        categories: names of the T explained classes, one or two.
        untouched: whether all channels of the layer weigh the same, so that its whole gradient passes, boolean, (T, L).
        count: number of channels with a weight above 0 and a gradient, (T, L); in untouched layers, all with a
            gradient.
        energy_share: share of the layer's gradient energy (sum of squares) in the kept channels, (T, L); 1 in
            untouched layers, NaN where the layer has no gradient.
        overlap: channels kept for both classes as a share of those kept for either, (L,); NaN where none are kept or
            the layer is untouched for a class; None for a single class.
    """

    layers: tuple[str, ...]
    channels: NDArray[np.int64]
    categories: tuple[str, ...]
    untouched: NDArray[np.bool_]
    count: NDArray[np.int64]
    energy_share: NDArray[np.float64]
    overlap: NDArray[np.float64] | None

    def figure(self, *, theme: Theme = LIGHT) -> Figure:
        """Draw the share of channels, the share of energy, and the overlap, layer by layer.

        Hollow marks at the top of the first two rows are untouched layers.
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
        # Two columns if the names are short enough.
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


# Shape and size of each class's marks, chosen so that overlapping marks stay visible.
_MARKS = (("o", 6.0), ("D", 3.2), ("s", 3.8))


def _draw_layers(
    axes: Any, label: str, values: NDArray[Any], untouched: NDArray[np.bool_], number: int, theme: Theme
) -> dict[str, Any]:
    """Draw a mark for each layer, hollow if it is untouched."""
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
    """Find the channels with a weight above 0 in each layer, for one class or two, and their overlap.

    Args:
        model: classifier in evaluation mode, logits (B, K).
        inputs: one preprocessed image, shape (1, C, *S).
        targets: one class index, or two.
        edit: the edit, with a selector.
        categories: names of the classes; None uses "class" and the index.

    Raises:
        InputError: if `inputs` does not contain exactly one image.
        SettingError: if there are not one or two different classes, each with a name, or `edit` has no selector.
        ParchGradError: whatever `Explainer` raises.

    Example:
        >>> import parchgrad as pg
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)).eval()
        >>> edit = Edit(selector=pg.GradientEnergy(quantile=0.25, softness=0))
        >>> found = kept_channels(model, torch.rand(1, 3, 4, 4), [0, 1], edit)
        >>> found.layers, found.count.tolist()
        (('0',), [[2], [2]])
    """
    check_kind("`edit`", edit, Edit, "Pass one such as Edit(selector=GradientEnergy())", wanted="an Edit")
    if inputs.shape[0] != 1:
        raise InputError(
            f"`inputs` has shape {tuple(inputs.shape)}, but it must be one image (1, C, *S). Pass inputs[:1]."
        )
    names = tuple(categories) if categories is not None else tuple(f"class {index}" for index in targets)
    if len(targets) not in (1, 2) or len(names) != len(targets):
        raise SettingError(
            f"`targets` has {len(targets)} classes and `categories` has {len(names)} names. Pass one or two classes, "
            "each with a name."
        )
    if len(set(map(int, targets))) < len(targets):
        raise SettingError(f"Both `targets` are {int(targets[0])}. Pass two different classes.")
    # One row for each class.
    batch = inputs.expand(len(targets), *inputs.shape[1:])
    found = record_selections(model, edit, batch, list(targets))[::-1]
    untouched = [record.untouched.cpu().numpy() for record in found]
    # In an untouched layer, every channel with a gradient passes.
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
    """Energy of each channel (B, C), relative to the strongest in its row, since squares of small norms underflow."""
    peaks = norms.amax(dim=1, keepdim=True)
    unit = norms / torch.where(peaks > 0, peaks, torch.ones_like(peaks))
    energy: NDArray[np.float64] = unit.cpu().double().numpy() ** 2
    return energy
