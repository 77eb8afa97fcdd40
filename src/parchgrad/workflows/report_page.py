"""Reports: a self-contained page and two tables for one or more runs, the verdict first."""

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

from parchgrad._io.files import check_outputs, writing_together
from parchgrad._io.images import data_url, to_bytes
from parchgrad._io.templates import render
from parchgrad._version import __version__
from parchgrad.errors import InputError, reason_of
from parchgrad.evaluation.examples import EXAMPLES_FILE, Example, Examples, choose_examples
from parchgrad.evaluation.labels import Labels, describe, label_settings, name_of, words_of
from parchgrad.evaluation.report import (
    BASELINE,
    Cell,
    Summary,
    csv_table,
    mark_of,
    markdown_table,
    relative_time,
    summarise,
    title_of,
)
from parchgrad.evaluation.rows import Row, read_rows
from parchgrad.evaluation.scores import HEADLINES, SCORES, at_ratio
from parchgrad.evaluation.summary import FEWEST
from parchgrad.evaluation.verdict import Statement, caveat, conclude, state
from parchgrad.visual.charts import DARK, LIGHT, Curve, Interval, curve_chart, interval_chart, scatter_chart
from parchgrad.visual.maps import paint

__all__ = ["Report", "headlines_of", "make_report"]

_LEGEND = """Each cell is a mean over the images, followed by the interval of the difference from the plain gradient on
the same images (paired bootstrap). Bold is better and italic is worse, if the interval excludes zero and covers at
least {fewest} images or mosaics; controls, at the bottom, are not marked. Each interval covers a single comparison:
among many, some exclude zero by chance. Arrows show which direction is better. Time is relative to the plain gradient.
"""

# Edge of an example picture in pixels, which keeps the page small.
_EDGE = 192

# More curves or points in one chart are hard to distinguish; the tables have all settings.
_MOST_CURVES = 7
_MOST_POINTS = 20
_SWEPT = {
    "quantile": "share of the channels at or above the threshold",
    "softness": "width of the ramp, as a share of the threshold",
    "layers": "layers",
    "gamma": "gamma",
    "gates": "width of the gates, in standard deviations",
}
_GROUPS = ("Largest gains", "Smallest gains, or losses")


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
        labels: names of each run's settings.
        verdicts: sentences about the leading setting of each run.
        caveats: caveat to each verdict; empty if there is none.
    """

    summaries: tuple[Summary, ...]
    rows: tuple[tuple[Row, ...], ...]
    examples: tuple[Examples | None, ...]
    counts: tuple[str, ...]
    labels: tuple[Labels, ...]
    verdicts: tuple[tuple[Statement, ...], ...]
    caveats: tuple[str, ...]

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
        tables = [csv_table(found).splitlines() for found in self.summaries]
        lines = [*tables[0][:1], *(line for found in tables for line in found[1:])]
        texts = self._page(), self._markdown(), "\n".join(lines) + "\n"
        with writing_together(paths, force=force) as drafts:
            for draft, text in zip(drafts, texts, strict=True):
                # File names may contain surrogates that UTF-8 cannot encode.
                draft.write_text(text, encoding="utf-8", errors="replace")
        return paths[0]

    def _markdown(self) -> str:
        parts = []
        columns = self.summaries, self.counts, self.labels, self.verdicts, self.caveats
        for found, count, labels, verdict, caution in zip(*columns, strict=True):
            parts += [f"## {found.model}, {count}", "\n".join(map(_bullet, verdict))]
            parts += [caution] if caution else []
            parts += [f"{name}: {words}." for name, words in labels.shared.items()]
            names = {title: f"{name} (control)" for title, name in labels.names.items() if title in found.controls}
            settings = tuple(sorted(found.settings, key=found.controls.__contains__))
            parts.append(markdown_table(replace(found, settings=settings), {**labels.names, **names}))
        return "\n\n".join([*parts, _LEGEND.format(fewest=FEWEST)])

    def _page(self) -> str:
        columns = self.summaries, self.rows, self.examples, self.counts, self.labels, self.verdicts, self.caveats
        runs = []
        for found, rows, examples, count, labels, verdict, caution in zip(*columns, strict=True):
            shown = headlines_of(found)
            names = labels.names
            runs.append(
                {
                    "summary": found,
                    "count": count,
                    "verdict": verdict,
                    "caveat": caution,
                    "shared": labels.shared,
                    "tables": [_table(found, names, shown), _table(found, names, found.scores)],
                    "meanings": [(title_of(name), _meaning(name)) for name in found.scores],
                    "examples": None if examples is None else _shown_examples(examples, names),
                    "charts": _charts(found, rows, names),
                }
            )
        return render("report.html", runs=runs, version=__version__, fewest=FEWEST)


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
    labels = tuple(label_settings(part) for part in rows)
    conclusions = [
        conclude(part, scores=headlines_of(summary), confidence=confidence, seed=seed)
        for part, summary in zip(rows, found, strict=True)
    ]
    return Report(
        summaries=found,
        rows=rows,
        examples=tuple(_read_examples(folder, part) for folder, part in zip(folders, rows, strict=True)),
        counts=tuple(_count_words(folder, part.images) for folder, part in zip(folders, found, strict=True)),
        labels=labels,
        verdicts=tuple(state(part, own.names) for part, own in zip(conclusions, labels, strict=True)),
        caveats=tuple(caveat(part, own.names) for part, own in zip(conclusions, labels, strict=True)),
    )


def headlines_of(summary: Summary) -> tuple[str, ...]:
    """The headline scores of a summary, or all its scores if it has none."""
    return tuple(name for name in HEADLINES if name in summary.scores) or summary.scores


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


def _bullet(statement: Statement) -> str:
    return f"- **{statement.claim}**: {statement.numbers}"


def _meaning(name: str) -> str:
    score, _, ratio = name.partition("@")
    better = SCORES[score].better
    direction = "only describes the map" if better == "neither" else f"{better} is better"
    return f"{SCORES[score].meaning}{f', at {ratio}' if ratio else ''}; {direction}"


def _read_examples(folder: str | Path, rows: Sequence[Row]) -> Examples | None:
    path = Path(folder) / EXAMPLES_FILE
    if not path.exists():
        return None
    found = Examples.load(path)
    # The file is outdated while settings are added to a run.
    return found if found.choice == choose_examples(rows) else None


def _table(summary: Summary, names: Mapping[str, str], scores: Sequence[str]) -> dict[str, object]:
    """Template data of a table: one group of lines for the settings that count, and one for the controls."""
    lines = [
        {
            "setting": names[setting],
            "control": setting in summary.controls,
            "time": _number(relative_time(summary, setting), digits=2),
            "cells": [
                {
                    "cell": cell,
                    "mark": mark_of(summary, setting, name),
                    "mean": _number(cell.mean.value),
                    "interval": _interval_text(cell),
                    "rank": "" if math.isnan(cell.rank) else f"rank {cell.rank:.1f}",
                }
                for name in scores
                for cell in (summary.cells[setting, name],)
            ],
        }
        for setting in summary.settings
    ]
    groups = [[line for line in lines if line["control"] == control] for control in (False, True)]
    return {"headers": [title_of(name) for name in scores], "groups": groups}


def _interval_text(cell: Cell) -> str:
    found = cell.comparison
    if found is None or math.isnan(found.low):
        return ""
    return f"{found.low:+.3f} to {found.high:+.3f}"


def _number(value: float, *, digits: int = 3) -> str:
    return "none" if math.isnan(value) else f"{value:.{digits}f}"


def _charts(summary: Summary, rows: Sequence[Row], names: Mapping[str, str]) -> list[Chart]:
    """All charts that the rows have values for."""
    found = []
    shown = [name for name in HEADLINES if name in summary.scores]
    for name in shown:
        intervals = [
            Interval(
                label=names[setting],
                middle=cell.comparison.difference,
                low=cell.comparison.low,
                high=cell.comparison.high,
                verdict=cell.verdict,
            )
            for setting in _leading(summary, name, _MOST_POINTS)
            if setting not in summary.controls
            and (cell := summary.cells[setting, name]).comparison is not None
            and not math.isnan(cell.comparison.low)
        ]
        if intervals:
            note = (
                f"Mean difference on the same images, with its {summary.confidence:.0%} interval, coloured if settled. "
                f"Without controls.{_left_out(summary, name, _MOST_POINTS)}"
            )
            draw = partial(interval_chart, intervals, x_label="difference")
            found.append(_chart(f"{title_of(name)}, against the plain gradient", note, draw))
    found += _curve_charts(summary, rows, names)
    for name in shown:
        found += _sweep_charts(summary, rows, name)
    points = {
        names[setting]: (relative_time(summary, setting), summary.cells[setting, shown[0]].mean.value)
        for name in shown[:1]
        for setting in _leading(summary, name, _MOST_POINTS)
        if not math.isnan(summary.cells[setting, name].mean.value)
    }
    if points:
        found.append(
            _chart(
                "Cost against quality",
                "Time of a map relative to the plain gradient, as measured in this run. Random channels are explained "
                f"one image at a time, the others in batches.{_left_out(summary, shown[0], _MOST_POINTS)}",
                partial(
                    scatter_chart,
                    points,
                    x_label="time",
                    y_label=title_of(shown[0]),
                    colours={names[setting]: number for setting, number in _colours(summary).items()},
                ),
            )
        )
    return found


def _curve_charts(summary: Summary, rows: Sequence[Row], names: Mapping[str, str]) -> list[Chart]:
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
            "Cosine between the map of an image and the map of a noisy copy, by the noise's standard deviation. A "
            "stable map stays near 1.",
            "stability_cosine",
            ("stability_cosine",),
            "noise, as a share of the image's range",
            "cosine",
        ),
    ):
        if name not in summary.scores:
            continue
        ratios = sorted(
            {float(key.partition("@")[2]) for row in rows[:1] for key in row if key.startswith(f"{lines[0]}@")}
        )
        # Noise levels are orders of magnitude apart: evenly spaced by name, they stay legible.
        by_name = SCORES[name].family == "stability"
        places = [f"{ratio:g}" if by_name else ratio for ratio in ratios]
        curves = []
        for setting in _leading(summary, name, _MOST_CURVES):
            own = [row for row in rows if row["setting"] == setting]
            for line, dashed in zip(lines, (False, True), strict=False):
                heights = [_mean(own, at_ratio(line, ratio)) for ratio in ratios]
                label = "" if dashed else names[setting]
                colour = _colours(summary)[setting]
                curves.append(Curve(label=label, x=places, y=heights, colour=colour, dashed=dashed))
        note += _left_out(summary, name, _MOST_CURVES)
        found.append(_chart(title, note, partial(curve_chart, curves, x_label=x_label, y_label=y_label)))
    return found


def _colours(summary: Summary) -> dict[str, int]:
    """One colour per setting for all charts; the best settings by the first score get unique colours."""
    ranked = _leading(summary, summary.scores[0], len(summary.settings))
    return {setting: number for number, setting in enumerate(ranked)}


def _leading(summary: Summary, name: str, most: int) -> list[str]:
    """The plain gradient, then the settings with the best score, controls last."""
    sign = -1 if SCORES[name].better == "higher" else 1
    return sorted(
        summary.settings,
        key=lambda setting: (
            setting != BASELINE,
            setting in summary.controls,
            _sortable(sign * summary.cells[setting, name].mean.value),
        ),
    )[:most]


def _left_out(summary: Summary, name: str, most: int) -> str:
    """Say which settings a chart shows if it leaves some out."""
    if len(summary.settings) <= most:
        return ""
    return f" Shows the plain gradient and the {most - 1} other settings with the best {SCORES[name].title}."


def _sweep_charts(summary: Summary, rows: Sequence[Row], name: str) -> list[Chart]:
    """A score over each setting that has several values, with everything else fixed."""
    described = {row["setting"]: describe(row) for row in rows}
    found = []
    for field, label in _SWEPT.items():
        lines: dict[str, list[tuple[str | float, float]]] = {}
        edited = set()
        for setting, own in described.items():
            if field not in own:
                continue
            alike = [other for other in described.values() if name_of(other) == name_of(own)]
            others = [key for key in own if key != field and len({str(other.get(key)) for other in alike}) > 1]
            line = ", ".join([name_of(own), *(words_of(key, own[key]) for key in others)])
            lines.setdefault(line, []).append((_place(own[field]), summary.cells[setting, name].mean.value))
            edited |= set() if setting in summary.controls else {line}
        swept = {line: sorted(points, key=_order) for line, points in lines.items() if len(points) > 1}
        # Controls alone are not a sweep.
        if edited & swept.keys():
            note = "Mean over the images for each value, with everything else fixed."
            if len(swept) > _MOST_CURVES:
                best = max if SCORES[name].better == "higher" else min
                spread = {line: best(y for _, y in swept[line]) for line in edited & swept.keys()}
                ranked = sorted(spread, key=spread.__getitem__, reverse=best is max)[:_MOST_CURVES]
                swept = {line: swept[line] for line in ranked}
                note += f" Shows the {len(swept)} lines with the best value, without controls."
            curves = [
                Curve(label=line, x=[x for x, _ in points], y=[y for _, y in points], colour=number)
                for number, (line, points) in enumerate(swept.items())
            ]
            found.append(
                _chart(
                    f"{title_of(name)} by {field}",
                    note,
                    partial(curve_chart, curves, x_label=label, y_label=title_of(name)),
                )
            )
    return found


def _shown_examples(examples: Examples, names: Mapping[str, str]) -> dict[str, object]:
    """Template data for the examples section."""
    choice = examples.choice
    title = SCORES[choice.score].title
    held = list(zip(choice.examples, examples.pictures, examples.maps, strict=True))
    return {
        "note": f"Images are ranked by the gain in {title} of {names[choice.leading]} over the plain gradient. Maps "
        "lie over the grey image, dark where low and violet to yellow where high. Each map has its own scale, up to "
        "its 99.5th percentile.",
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
                                    "title": names[setting],
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
    if isinstance(value, int | float):
        return float(value)
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _order(point: tuple[str | float, float]) -> tuple[bool, float, str]:
    place = point[0]
    return (False, place, "") if isinstance(place, float) else (True, 0.0, place)


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
