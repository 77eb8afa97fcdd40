"""Reports: a self-contained page and two tables for one or more runs."""

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from parchgrad._io.extras import needs_extra
from parchgrad._io.files import check_outputs, writing_together
from parchgrad._io.images import data_url, to_bytes
from parchgrad._version import __version__
from parchgrad.errors import InputError, reason_of
from parchgrad.evaluation.examples import EXAMPLES_FILE, Example, Examples, choose_examples
from parchgrad.evaluation.report import (
    BASELINE,
    Cell,
    Summary,
    csv_table,
    markdown_table,
    relative_time,
    summarise,
    title_of,
)
from parchgrad.evaluation.rows import Row, read_rows
from parchgrad.evaluation.scores import HEADLINES, SCORES, at_ratio
from parchgrad.evaluation.summary import FEWEST
from parchgrad.visual.charts import DARK, LIGHT, Curve, Interval, curve_chart, interval_chart, scatter_chart
from parchgrad.visual.maps import paint

__all__ = ["HEADLINES", "Report", "make_report"]

_LEGEND = """Means over the images, followed by the interval of the difference from `{baseline}` on the same images
(paired bootstrap). Bold is better and italic is worse, if the interval excludes zero and covers at least {fewest}
images. Arrows show which direction is better. Time is relative to `{baseline}`.
"""

# Edge of an example picture in pixels, which keeps the page small.
_EDGE = 192

# More curves in one chart are hard to distinguish.
_MOST_CURVES = 7
_SWEPT = {
    "quantile": "share of the channels at or above the threshold",
    "softness": "width of the ramp, as a share of the threshold",
    "layers": "layers",
    "gamma": "gamma",
    "gates": "width of the gates, in standard deviations",
}
_GROUPS = ("Largest gains", "Smallest gains, or losses")
_OF_EVERY_METHOD = ("gates", "antialias", "balance")
_DESCRIBING = ("quantile", "softness", "layers", "gamma", "conserve", "masks", *_OF_EVERY_METHOD)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart of the page for light and dark mode.

    Attributes:
        title: title of the chart.
        note: one-sentence description.
        light: image for light mode, as a data URI.
        dark: image for dark mode, as a data URI.
    """

    title: str
    note: str
    light: str
    dark: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Report:
    """Results of one or more runs.

    Attributes:
        summaries: summary of each run.
        rows: rows of each run.
        examples: examples of each run; None if it has none.
        counts: number of images of each run in words, with the total if it is unfinished.
    """

    summaries: tuple[Summary, ...]
    rows: tuple[tuple[Row, ...], ...]
    examples: tuple[Examples | None, ...]
    counts: tuple[str, ...]

    @staticmethod
    def files(folder: str | Path) -> tuple[Path, Path, Path]:
        """Paths of the three files that `save` writes: the page and the two tables."""
        return Path(folder) / "report.html", Path(folder) / "report.md", Path(folder) / "report.csv"

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write the page and the Markdown and CSV tables; return the path of the page.

        Raises:
            OutputError: if a file exists and `force` is off, or cannot be written.
        """
        paths = self.files(folder)
        check_outputs(paths, force=force)
        parts = [
            _LEGEND.format(baseline=BASELINE, fewest=FEWEST),
            *(
                f"## {found.model}, {count}\n\n{markdown_table(found)}\n"
                for found, count in zip(self.summaries, self.counts, strict=True)
            ),
        ]
        tables = [csv_table(found).splitlines() for found in self.summaries]
        lines = [*tables[0][:1], *(line for found in tables for line in found[1:])]
        texts = self._page(), "\n".join(parts), "\n".join(lines) + "\n"
        with writing_together(paths, force=force) as drafts:
            for draft, text in zip(drafts, texts, strict=True):
                # File names may contain surrogates that UTF-8 cannot encode.
                draft.write_text(text, encoding="utf-8", errors="replace")
        return paths[0]

    def _page(self) -> str:
        with needs_extra("evaluation"):
            from jinja2 import Environment, PackageLoader

        runs = [
            {
                "summary": found,
                "count": count,
                "headers": [(title_of(name), name) for name in found.scores],
                "lines": [_table_line(found, setting) for setting in found.settings],
                "charts": _charts(found, rows),
                "examples": None if examples is None else _shown_examples(examples),
            }
            for found, rows, examples, count in zip(self.summaries, self.rows, self.examples, self.counts, strict=True)
        ]
        template = Environment(loader=PackageLoader("parchgrad"), autoescape=True).get_template("report.html")
        return template.render(runs=runs, version=__version__, baseline=BASELINE, fewest=FEWEST)


def make_report(
    folders: Sequence[str | Path], *, scores: Sequence[str] | None = None, confidence: float = 0.95, seed: int = 0
) -> Report:
    r"""Read runs and summarise each.

    Args:
        folders: folders of the runs.
        scores: names of the scores to show; None uses all means.
        confidence: level of the intervals, in (0, 1).
        seed: random seed of the bootstrap.

    Raises:
        InputError: if `folders` is empty, or a run is missing, damaged or has no image with rows of every setting.
        SettingError: if a score is unknown.

    Example:
        >>> import tempfile, json
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "run.json").write_text("{}")
        ...     row = {"model": "m", "setting": "gradient", "index": 0, "seconds": 1.0, "gini": 0.5}
        ...     _ = Path(folder, "rows-0.jsonl").write_text(json.dumps(row) + "\n")
        ...     make_report([folder]).summaries[0].scores
        ('gini',)
    """
    if not folders:
        raise InputError("`folders` is empty. Pass at least one folder that an evaluation wrote.")
    rows = tuple(tuple(read_rows(folder)) for folder in folders)
    found = tuple(_headlines_first(summarise(part, scores=scores, confidence=confidence, seed=seed)) for part in rows)
    examples = tuple(_read_examples(folder, part) for folder, part in zip(folders, rows, strict=True))
    counts = tuple(_count_words(folder, part.images) for folder, part in zip(folders, found, strict=True))
    return Report(summaries=found, rows=rows, examples=examples, counts=counts)


def _count_words(folder: str | Path, images: int) -> str:
    """The number of images in words, with the total if the run is unfinished."""
    try:
        asked = json.loads((Path(folder) / "run.json").read_text(encoding="utf-8")).get("images", images)
        if type(asked) is not int:
            raise ValueError("'images' is not a whole number")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(
            f"Cannot read the run in {str(folder)!r} ({reason_of(error)}). Run the evaluation again."
        ) from error
    return f"{images} images" if asked == images else f"{images} of {asked} images (unfinished run)"


def _headlines_first(summary: Summary) -> Summary:
    """Move the headline scores to the left of the table."""
    return replace(summary, scores=tuple(sorted(summary.scores, key=lambda name: name not in HEADLINES)))


def _read_examples(folder: str | Path, rows: Sequence[Row]) -> Examples | None:
    path = Path(folder) / EXAMPLES_FILE
    if not path.exists():
        return None
    found = Examples.load(path)
    # The file is outdated while settings are added to a run.
    return found if found.choice == choose_examples(rows) else None


def _table_line(summary: Summary, setting: str) -> dict[str, object]:
    cells = []
    for name in summary.scores:
        cell = summary.cells[setting, name]
        rank = "" if math.isnan(cell.rank) else f"rank {cell.rank:.1f}"
        cells.append({"cell": cell, "interval": _interval_text(cell), "mean": _number(cell.mean.value), "rank": rank})
    return {"setting": setting, "cells": cells, "time": _number(relative_time(summary, setting), digits=2)}


def _interval_text(cell: Cell) -> str:
    found = cell.comparison
    if found is None or math.isnan(found.low):
        return ""
    return f"{found.low:+.3f} to {found.high:+.3f}"


def _number(value: float, *, digits: int = 3) -> str:
    return "none" if math.isnan(value) else f"{value:.{digits}f}"


def _charts(summary: Summary, rows: Sequence[Row]) -> list[Chart]:
    """All charts that the rows have values for."""
    found = []
    shown = [name for name in HEADLINES if name in summary.scores]
    for name in shown:
        intervals = [
            Interval(
                label=setting,
                middle=cell.comparison.difference,
                low=cell.comparison.low,
                high=cell.comparison.high,
                verdict=cell.verdict,
            )
            for setting in summary.settings
            if (cell := summary.cells[setting, name]).comparison is not None and not math.isnan(cell.comparison.low)
        ]
        if intervals:
            found.append(
                _chart(
                    f"{title_of(name)}, against the plain gradient",
                    f"Mean difference on the same images, with its {summary.confidence:.0%} interval, coloured if it "
                    "is settled.",
                    partial(interval_chart, intervals, x_label="difference"),
                )
            )
    found += _curve_charts(summary, rows)
    for name in shown:
        found += _sweep_charts(summary, rows, name)
    points = {
        setting: (relative_time(summary, setting), summary.cells[setting, shown[0]].mean.value)
        for setting in summary.settings
        if shown and not math.isnan(summary.cells[setting, shown[0]].mean.value)
    }
    if points:
        found.append(
            _chart(
                "Cost against quality",
                "Time of a map relative to the plain gradient, as measured in this run. Random channels are explained "
                "one image at a time, the others in batches.",
                partial(
                    scatter_chart,
                    points,
                    x_label="time",
                    y_label=title_of(shown[0]),
                    colours=_colours(summary),
                ),
            )
        )
    return found


def _curve_charts(summary: Summary, rows: Sequence[Row]) -> list[Chart]:
    """Curves over the share of replaced pixels, the share of random weights, and the noise level."""
    found = []
    for title, note, name, lines, x_label, y_label in (
        (
            "Drop in probability",
            "Solid lines (most relevant pixels first) should be high, dashed lines (least relevant first) low.",
            "aopc",
            ("aopc_morf", "aopc_lerf"),
            "share of replaced pixels",
            "drop in probability",
        ),
        (
            "Similarity of maps under random weights",
            "Modules get random weights one after another. Maps that stay similar do not show what was learned.",
            "randomisation_spearman",
            ("randomisation_spearman",),
            "share of the modules",
            "rank correlation",
        ),
        (
            "Stability of maps under noise",
            "Cosine between the map of an image and the map of a noisy copy. A stable map stays near 1.",
            "stability_cosine",
            ("stability_cosine",),
            "standard deviation of the noise, as a share of the image's range",
            "cosine",
        ),
    ):
        if name not in summary.scores:
            continue
        ratios = sorted(
            {float(key.partition("@")[2]) for row in rows[:1] for key in row if key.startswith(f"{lines[0]}@")}
        )
        sign = -1 if SCORES[name].better == "higher" else 1
        leading = sorted(
            (setting for setting in summary.settings if setting != BASELINE),
            key=lambda setting: _sortable(sign * summary.cells[setting, name].mean.value),
        )
        # Noise levels are orders of magnitude apart: evenly spaced by name, they stay legible.
        by_name = SCORES[name].family == "stability"
        places = [f"{ratio:g}" if by_name else ratio for ratio in ratios]
        curves = []
        for setting in [BASELINE, *leading][:_MOST_CURVES]:
            own = [row for row in rows if row["setting"] == setting]
            for line, dashed in zip(lines, (False, True), strict=False):
                heights = [_mean(own, at_ratio(line, ratio)) for ratio in ratios]
                label = "" if dashed else setting
                colour = _colours(summary)[setting]
                curves.append(Curve(label=label, x=places, y=heights, colour=colour, dashed=dashed))
        if len(summary.settings) > _MOST_CURVES:
            note += f" Shows the plain gradient and the {_MOST_CURVES - 1} settings with the best {SCORES[name].title}."
        found.append(_chart(title, note, partial(curve_chart, curves, x_label=x_label, y_label=y_label)))
    return found


def _colours(summary: Summary) -> dict[str, int]:
    """One colour per setting for all charts; the best settings by the first score get unique colours."""
    first = summary.scores[0]
    sign = -1 if SCORES[first].better == "higher" else 1
    ranked = sorted(
        summary.settings,
        key=lambda setting: (setting != BASELINE, _sortable(sign * summary.cells[setting, first].mean.value)),
    )
    return {setting: number for number, setting in enumerate(ranked)}


def _sweep_charts(summary: Summary, rows: Sequence[Row], name: str) -> list[Chart]:
    """A score over each setting that has several values, with everything else fixed."""
    described = {row["setting"]: _described(row) for row in rows}
    varied = [key for key in _DESCRIBING if len({_shown(own[key]) for own in described.values() if key in own}) > 1]
    found = []
    for field, label in _SWEPT.items():
        lines: dict[str, list[tuple[str | float, float]]] = {}
        for setting, own in described.items():
            if field not in own:
                continue
            others = [_shown(own[key]) for key in ("method", "selector") if key in own]
            others += [f"{key} {_shown(own[key])}" for key in varied if key != field and key in own]
            lines.setdefault(", ".join(others), []).append(
                (_place(own[field]), summary.cells[setting, name].mean.value)
            )
        swept = {line: sorted(points, key=_order) for line, points in lines.items() if len(points) > 1}
        # The random twins alone are not a sweep.
        if any(", random" not in line for line in swept):
            curves = [
                Curve(label=line, x=[x for x, _ in points], y=[y for _, y in points], colour=number)
                for number, (line, points) in enumerate(swept.items())
            ]
            found.append(
                _chart(
                    f"{title_of(name)} by {field}",
                    "Mean over the images for each value, with everything else fixed.",
                    partial(curve_chart, curves, x_label=label, y_label=title_of(name)),
                )
            )
    return found


def _described(row: Row) -> dict[str, object]:
    """The settings of a row that apply to its method."""
    held = {key: value for key, value in row.items() if value is not None and value == value}
    keys = ("method", "selector", *(_DESCRIBING if "selector" in held else _OF_EVERY_METHOD))
    return {key: held[key] for key in keys if key in held}


def _shown_examples(examples: Examples) -> dict[str, object]:
    """Template data for the examples section."""
    choice = examples.choice
    title = SCORES[choice.score].title
    held = list(zip(choice.examples, examples.pictures, examples.maps, strict=True))
    return {
        "note": f"“{choice.leading}” has the best mean {title} among the settings that are not controls; the table "
        "shows whether it beats the plain gradient. Images are ranked by its gain over the plain gradient. Maps lie "
        "over the grey image, dark where low and violet to yellow where high; the maps of one image share one scale, "
        "in multiples of a map's mean.",
        "groups": [
            {
                "title": name,
                "images": [
                    {
                        "name": example.image,
                        "class": _class_words(example, examples.categories),
                        "score": _gain_words(example, choice.settings, choice.leading, title),
                        "pictures": [
                            {"title": "image", "value": "", "source": _embed(picture / 255)},
                            *(
                                {
                                    "title": setting,
                                    "value": _value(value),
                                    "source": _embed(paint(picture / 255, heat / 255)),
                                }
                                for setting, value, heat in zip(choice.settings, example.values, maps, strict=True)
                            ),
                        ],
                    }
                    for example, picture, maps in part
                ],
            }
            for name, part in zip(_GROUPS, (held[: len(choice.best)], held[len(choice.best) :]), strict=True)
            if part
        ],
    }


def _class_words(example: Example, categories: Mapping[int, str]) -> str:
    words = f"Class: {categories[example.target]}."
    if example.label != example.target:
        words += f" Its label is {categories[example.label]}."
    if example.predicted != example.target:
        words += f" The network predicts {categories[example.predicted]}."
    return words


def _gain_words(example: Example, settings: Sequence[str], leading: str, title: str) -> str:
    values = dict(zip(settings, map(_value, example.values), strict=True))
    words = f"{title}: {values[leading]} instead of {values[BASELINE]} with the plain gradient"
    if example.gain == 0:
        return f"{words}, no difference."
    return f"{words}, {abs(example.gain):.3f} {'better' if example.gain > 0 else 'worse'}."


def _value(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _place(value: object) -> str | float:
    """Position on the axis: numbers as they are, everything else by name."""
    return float(value) if isinstance(value, int | float) else _shown(value)


def _order(point: tuple[str | float, float]) -> tuple[bool, float, str]:
    place = point[0]
    return (False, place, "") if isinstance(place, float) else (True, 0.0, place)


def _shown(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _chart(title: str, note: str, draw: Callable[..., Figure]) -> Chart:
    """Draw a chart for light and dark mode; `draw` takes `theme`."""
    light, dark = (_picture(draw(theme=theme)) for theme in (LIGHT, DARK))
    return Chart(title=title, note=note, light=light, dark=dark)


def _picture(figure: Figure) -> str:
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=170, transparent=True)
    return data_url(Image.open(held), "PNG")


def _embed(picture: NDArray[Any]) -> str:
    """Encode a picture (H, W, 3) in [0, 1] as a small data URI."""
    drawn = Image.fromarray(to_bytes(picture))
    drawn.thumbnail((_EDGE, _EDGE), Image.Resampling.BOX)
    # Enlarge small images with sharp pixels.
    times = max(1, _EDGE // max(drawn.size))
    drawn = drawn.resize((times * drawn.width, times * drawn.height), Image.Resampling.NEAREST)
    return data_url(drawn, quality=85)


def _mean(rows: Sequence[Row], name: str) -> float:
    values = [row[name] for row in rows if not math.isnan(row.get(name, math.nan))]
    return sum(values) / len(values) if values else math.nan


def _sortable(value: float) -> float:
    """Replace NaN by infinity, so that it sorts last."""
    return math.inf if math.isnan(value) else value
