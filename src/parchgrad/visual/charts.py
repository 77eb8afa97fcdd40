"""Charts of evaluation results, for light and dark pages."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from parchgrad.errors import InputError, on_one_line

__all__ = [
    "DARK",
    "LIGHT",
    "Curve",
    "Interval",
    "Theme",
    "as_written",
    "curve_chart",
    "histogram_chart",
    "interval_chart",
    "scatter_chart",
    "style_axes",
]


# Width in inches: narrow, so that the text is legible on a phone too.
_WIDTH = 3.9
_WIDE = 6.4
# Characters of a legend label per inch of the figure, if there are two columns, and if there is one.
_LABEL_DENSITY = 5.5
_LINE_DENSITY = 14
_BINS = 40


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of a chart with a transparent background.

    Attributes:
        ink: colour of text and axes.
        faint: colour of grid lines.
        good: colour of results better than the baseline.
        bad: colour of results worse than the baseline.
        open: colour of undecided results.
        lines: colours of the curves in turn, distinguishable with any colour vision.
    """

    ink: str
    faint: str
    good: str
    bad: str
    open: str
    lines: tuple[str, ...]


LIGHT = Theme(
    ink="#1d1d22",
    faint="#d3d0c7",
    good="#00735c",
    bad="#b3400e",
    open="#7b7b86",
    lines=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#1d1d22"),
)
DARK = Theme(
    ink="#ececf0",
    faint="#3a3a44",
    good="#3fd0a8",
    bad="#ff8c5a",
    open="#9a9aa6",
    lines=("#56b4e9", "#ff9d57", "#3fd0a8", "#e6a3c8", "#f0e442", "#8fb7ff", "#ececf0"),
)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line of a chart.

    Attributes:
        label: legend label; empty for none.
        x: positions, numbers or names.
        y: heights; NaN leaves a gap.
        colour: index of the theme's line colour.
        dashed: whether the line is dashed.
    """

    label: str
    x: Sequence[float | str]
    y: Sequence[float]
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A row of an interval chart.

    Attributes:
        label: label next to the interval.
        middle: the estimate.
        low: lower end.
        high: upper end.
        verdict: `"better"`, `"worse"` or `"open"`.
    """

    label: str
    middle: float
    low: float
    high: float
    verdict: str


def as_written(text: str) -> str:
    r"""Escape a text for Matplotlib, which would read text between dollars as a formula.

    Example:
        >>> as_written("from $1 to $5")
        'from \\$1 to \\$5'
    """
    return "\n".join(map(on_one_line, text.split("\n"))).replace("$", r"\$")


def curve_chart(curves: Sequence[Curve], *, x_label: str, y_label: str, theme: Theme = LIGHT) -> Figure:
    """Draw curves over one axis, with a legend below them.

    Raises:
        InputError: if there are no curves.

    Example:
        >>> figure = curve_chart([Curve(label="a", x=[0, 1], y=[0.5, 1.0])], x_label="share", y_label="drop")
        >>> figure.axes[0].get_xlabel()
        'share'
    """
    if not curves:
        raise InputError("`curves` is empty. Pass at least one curve.")
    figure = _figure(2.6, [curve.label for curve in curves])
    axes = _axes(figure, theme, x_label, y_label)
    for curve in curves:
        colour = theme.lines[curve.colour % len(theme.lines)]
        # Once the colours repeat, the marks change.
        mark = "os^Dv"[curve.colour // len(theme.lines) % 5]
        style = "--" if curve.dashed else "-"
        names = any(isinstance(place, str) for place in curve.x)
        places = [
            as_written(place if isinstance(place, str) else f"{place:g}") if names else place for place in curve.x
        ]
        axes.plot(places, curve.y, style, color=colour, marker=mark, markersize=3.5, linewidth=1.6, label=curve.label)
    _legend(figure, theme)
    return figure


def histogram_chart(
    groups: Mapping[str, ArrayLike], *, x_label: str, y_label: str, title: str = "", theme: Theme = LIGHT
) -> Figure:
    """Draw one histogram per group over a shared axis, as shares of the group, with the group means.

    Args:
        groups: values (N,) by group name.
        x_label: label of the values.
        y_label: label of the heights.
        title: title of the chart.
        theme: colours.

    Raises:
        InputError: if there is no group, or one is empty or contains non-finite values.

    Example:
        >>> figure = histogram_chart({"class": [1.0, 2.0], "rest": [0.0, 1.0]}, x_label="GAP", y_label="share")
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['class (n = 2)', 'rest (n = 2)']
    """
    arrays = {label: np.asarray(values, dtype=np.float64) for label, values in groups.items()}
    for label, values in arrays.items():
        if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
            raise InputError(f"Group {label!r} is empty, not 1-D or not finite. Pass `groups` of finite numbers (N,).")
    if not arrays:
        raise InputError("`groups` is empty. Pass at least one group.")
    figure = _figure(3.0, arrays, width=_WIDE)
    axes = _axes(figure, theme, x_label, y_label)
    axes.set_title(as_written(title), color=theme.ink, fontsize=10)
    edges = np.histogram_bin_edges(np.concatenate(list(arrays.values())), bins=_BINS)
    for number, (label, values) in enumerate(arrays.items()):
        colour = theme.lines[number % len(theme.lines)]
        heights = np.histogram(values, edges)[0] / values.size
        axes.stairs(heights, edges, fill=True, color=colour, alpha=0.35)
        axes.stairs(heights, edges, color=colour, linewidth=1.4, label=f"{label} (n = {values.size:,})")
        axes.axvline(float(values.mean()), color=colour, linewidth=1.4, linestyle="--")
    _legend(figure, theme)
    return figure


def interval_chart(intervals: Sequence[Interval], *, x_label: str, theme: Theme = LIGHT) -> Figure:
    """Draw estimates with their intervals, one per row, with a line at zero.

    Raises:
        InputError: if there are no intervals.

    Example:
        >>> found = Interval(label="a", middle=0.2, low=0.1, high=0.3, verdict="better")
        >>> interval_chart([found], x_label="difference").axes[0].get_xlabel()
        'difference'
    """
    if not intervals:
        raise InputError("`intervals` is empty. Pass at least one interval.")
    labels = [_wrapped(found.label, _WIDTH) for found in intervals]
    # Every row has the height of the longest label.
    row = 0.4 + 0.17 * max(label.count("\n") for label in labels)
    figure = Figure(figsize=(_WIDTH, 0.7 + row * len(intervals)), layout="constrained")
    axes = _axes(figure, theme, x_label, "")
    colours = {"better": theme.good, "worse": theme.bad, "open": theme.open}
    axes.locator_params(axis="x", nbins=5)
    for place, (found, label) in enumerate(zip(intervals, labels, strict=True)):
        colour = colours[found.verdict]
        # The line at zero stops below the labels.
        axes.vlines(0, place - 0.15, place + 0.25, color=theme.ink, linewidth=0.9)
        axes.plot([found.low, found.high], [place, place], color=colour, linewidth=2.2, solid_capstyle="round")
        axes.plot([found.middle], [place], "o", color=colour, markersize=5)
        # Above the interval, a long label does not take the width of the chart.
        axes.text(0, place - 0.22, as_written(label), transform=axes.get_yaxis_transform(), color=theme.ink, fontsize=9)
    axes.set_yticks([])
    axes.set_ylim(len(intervals) - 0.5, -0.8)
    return figure


def scatter_chart(
    points: Mapping[str, tuple[float, float]],
    *,
    x_label: str,
    y_label: str,
    colours: Mapping[str, int] | None = None,
    theme: Theme = LIGHT,
) -> Figure:
    """Draw points, with their labels in a legend so that they cannot overlap.

    Args:
        points: coordinates by label.
        x_label: label of the first coordinate.
        y_label: label of the second coordinate.
        colours: index of the theme's line colour by label, to match other charts; None uses them in turn.
        theme: colours.

    Raises:
        InputError: if there are no points.

    Example:
        >>> len(scatter_chart({"a": (1.0, 2.0)}, x_label="cost", y_label="quality").axes[0].lines)
        1
    """
    if not points:
        raise InputError("`points` is empty. Pass at least one point.")
    figure = _figure(2.6, points)
    axes = _axes(figure, theme, x_label, y_label)
    for place, (label, (x, y)) in enumerate(points.items()):
        number = place if colours is None else colours[label]
        colour = theme.lines[number % len(theme.lines)]
        mark = "os^Dv"[number // len(theme.lines) % 5]
        axes.plot([x], [y], mark, color=colour, markersize=7, label=label)
    _legend(figure, theme)
    return figure


def _figure(height: float, labels: Iterable[str], *, width: float = _WIDTH) -> Figure:
    """A figure for a chart of this size in inches, plus its legend."""
    shown = [label for label in labels if label]
    columns = _legend_columns(shown, width)
    lines = math.ceil(sum(_wrapped(label, width).count("\n") + 1 for label in shown) / columns)
    return Figure(figsize=(width, height + 0.2 * lines), layout="constrained")


def _legend(figure: Figure, theme: Theme) -> None:
    # List labels that several axes share only once.
    shown = {
        as_written(_wrapped(label, figure.get_figwidth())): handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    labels = list(shown)
    if labels:
        figure.legend(
            list(shown.values()),
            labels,
            loc="outside lower left",
            ncols=_legend_columns(labels, figure.get_figwidth()),
            frameon=False,
            fontsize=9,
            labelcolor=theme.ink,
            columnspacing=1.5,
        )


def _wrapped(label: str, width: float) -> str:
    """Break a label into lines that fit a figure of this width in inches."""
    return textwrap.fill(label, int(_LINE_DENSITY * width), break_on_hyphens=False)


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """Two columns if the labels are short enough, else one."""
    return 2 if max(map(len, labels), default=0) <= _LABEL_DENSITY * width else 1


def _axes(figure: Figure, theme: Theme, x_label: str, y_label: str) -> Any:
    figure.set_facecolor("none")
    axes = figure.subplots()
    style_axes(axes, theme, x_label=x_label, y_label=y_label)
    return axes


def style_axes(axes: Any, theme: Theme, *, x_label: str = "", y_label: str = "") -> None:
    """Apply a theme's ink, grid and spines to axes, with a transparent background."""
    axes.set_facecolor("none")
    axes.set_xlabel(x_label, color=theme.ink, fontsize=9.5)
    axes.set_ylabel(y_label, color=theme.ink, fontsize=9.5)
    axes.tick_params(colors=theme.ink, labelsize=9)
    axes.grid(visible=True, color=theme.faint, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.faint)
