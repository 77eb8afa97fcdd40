"""Summarise the rows of a run in tables."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from parchgrad.errors import InputError, SettingError
from parchgrad.evaluation.labels import is_control
from parchgrad.evaluation.rows import Row
from parchgrad.evaluation.scores import SCORES, Direction
from parchgrad.evaluation.summary import Comparison, Mean, compare, rank_methods, valid_mean

__all__ = [
    "BASELINE",
    "Cell",
    "PairedRows",
    "Summary",
    "Verdict",
    "csv_table",
    "mark_of",
    "markdown_table",
    "pair_rows",
    "relative_time",
    "score_words",
    "summarise",
    "title_of",
    "verdict_of",
]

BASELINE = "gradient"
"""The setting that others are compared with."""

Verdict = Literal["better", "worse", "open"]
_ARROWS: Mapping[Direction, str] = {"higher": "↑", "lower": "↓", "neither": ""}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One score of one setting.

    Attributes:
        mean: mean over the images.
        comparison: comparison with the baseline on the same images; None for the baseline itself.
        rank: mean rank among all settings over the images, 1 for the best; NaN if neither direction is better.
        verdict: `"better"` or `"worse"` than the baseline if that is settled, else `"open"`; see `Comparison`.
    """

    mean: Mean
    comparison: Comparison | None
    rank: float
    verdict: Verdict


@dataclass(frozen=True, eq=False, kw_only=True)
class Summary:
    """The results of a run.

    Attributes:
        model: name of the model.
        images: number of images.
        settings: titles of the settings, in order of appearance.
        controls: titles of the settings that only check others; see `is_control`.
        scores: names of the scores, in the order of `SCORES`.
        cells: results by setting and score.
        seconds: median time of a map in seconds, by setting.
        confidence: level of the intervals, in (0, 1).
    """

    model: str
    images: int
    settings: tuple[str, ...]
    controls: frozenset[str]
    scores: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]
    seconds: Mapping[str, float]
    confidence: float


@dataclass(frozen=True, eq=False, kw_only=True)
class PairedRows:
    """Rows of one model, by setting, on the images that all settings have.

    Attributes:
        model: name of the model.
        rows: rows by setting, in order of appearance, each for the same images in the same order.
        groups: group of each image, if some depend on each other, such as the cells of a mosaic; else None.
    """

    model: str
    rows: Mapping[str, Sequence[Row]]
    groups: Sequence[str] | None

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "PairedRows":
        """Pair the rows of one run; see `read_rows`.

        Raises:
            InputError: if there are no rows or several models, or no image has rows of every setting.
        """
        models = list(dict.fromkeys(str(row["model"]) for row in rows))
        if len(models) != 1:
            raise InputError(f"`rows` is of {', '.join(models) or 'no model'}. Pass the rows of one model.")
        paired = pair_rows(rows)
        first = next(iter(paired.values()))
        if not first:
            raise InputError("No image has rows of every setting. Run the evaluation again until it is finished.")
        named = [row.get("group") for row in first]
        groups = None
        if any(isinstance(group, str) for group in named):
            pairs = zip(first, named, strict=True)
            groups = [group if isinstance(group, str) else f"image {row['index']}" for row, group in pairs]
        return cls(model=models[0], rows=paired, groups=groups)

    def column(self, setting: str, score: str) -> list[float]:
        """Scores of a setting; NaN where undefined."""
        return [float(row.get(score, math.nan)) for row in self.rows[setting]]

    def compare(self, setting: str, other: str, score: str, *, confidence: float = 0.95, seed: int = 0) -> Comparison:
        """Compare a setting with another one by a score; see `parchgrad.evaluation.summary.compare`."""
        return compare(
            self.column(setting, score),
            self.column(other, score),
            groups=self.groups,
            confidence=confidence,
            seed=seed,
        )


def pair_rows(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group rows by setting, in order of appearance, on the images that all settings have, in order of their index.

    Example:
        >>> rows = [{"setting": "a", "index": 1}, {"setting": "a", "index": 0}, {"setting": "b", "index": 1}]
        >>> pair_rows(rows)
        {'a': [{'setting': 'a', 'index': 1}], 'b': [{'setting': 'b', 'index': 1}]}
    """
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        found.setdefault(row["setting"], {})[row["index"]] = row
    common = sorted(set.intersection(*map(set, found.values()))) if found else []
    return {title: [own[index] for index in common] for title, own in found.items()}


def summarise(
    rows: Sequence[Row],
    *,
    scores: Sequence[str] | None = None,
    baseline: str = BASELINE,
    confidence: float = 0.95,
    seed: int = 0,
) -> Summary:
    """Average the rows of one model, and compare every setting with the baseline on the same images.

    Only images with rows of every setting count.

    Args:
        rows: rows of one run; see `read_rows`.
        scores: names of the scores, which may be at single ratios (`"aopc@0.1"`); None uses all means.
        baseline: title of the setting that others are compared with.
        confidence: level of the intervals, in (0, 1).
        seed: random seed of the bootstrap.

    Raises:
        InputError: if there are no rows or several models, or no image has rows of every setting.
        SettingError: if a score or the baseline is unknown.

    Example:
        >>> rows = [
        ...     {"model": "m", "setting": setting, "index": index, "seconds": 1.0, "gini": index + gain}
        ...     for setting, gain in (("gradient", 0.0), ("other", 0.5)) for index in range(3)
        ... ]
        >>> cell = summarise(rows).cells["other", "gini"]
        >>> cell.mean.value, cell.comparison.difference, cell.verdict
        (1.5, 0.5, 'open')
    """
    paired = PairedRows.of(rows)
    if baseline not in paired.rows:
        raise SettingError(f"`baseline` is {baseline!r}, but it must be one of {', '.join(paired.rows)}.")
    held = set().union(*(row for row in rows))
    # Scores without any value, such as localisation without boxes, are left out by default.
    known = [name for name in SCORES if any(not math.isnan(row.get(name, math.nan)) for row in rows)]
    known = known if scores is None else list(scores)
    if not known:
        raise InputError("No score in `rows` has a value. Evaluate other scores, or data with regions.")
    for name in known:
        if name not in held or _base(name) not in SCORES:
            raise SettingError(f"`rows` has no score {name!r}. Use one of {', '.join(sorted(held & set(SCORES)))}.")
    cells = {}
    for name in known:
        columns = {title: paired.column(title, name) for title in paired.rows}
        better = SCORES[_base(name)].better
        ranks = dict.fromkeys(columns, math.nan)
        if better != "neither":
            # Ranking drops images with a missing score, so a setting without any would leave none.
            ranked = {title: values for title, values in columns.items() if not all(map(math.isnan, values))}
            ranks |= rank_methods(ranked, higher_is_better=better == "higher")
        for title, values in columns.items():
            found = None
            if title != baseline:
                found = paired.compare(title, baseline, name, confidence=confidence, seed=seed)
            cells[title, name] = Cell(
                mean=valid_mean(values), comparison=found, rank=ranks[title], verdict=verdict_of(found, name)
            )
    return Summary(
        model=paired.model,
        images=len(paired.rows[baseline]),
        settings=tuple(paired.rows),
        controls=frozenset(title for title, own in paired.rows.items() if is_control(title, own[0])),
        scores=tuple(known),
        cells=cells,
        seconds={title: statistics.median([row["seconds"] for row in own]) for title, own in paired.rows.items()},
        confidence=confidence,
    )


def markdown_table(summary: Summary, names: Mapping[str, str] | None = None) -> str:
    """Write a summary as a Markdown table: a row for each setting, a column for each score.

    A cell has the mean and the interval of the difference from the baseline, in bold if better than the baseline, in
    italics if worse, and plain if undecided or a control.

    Args:
        summary: the summary.
        names: names of the settings by title (see `label_settings`); None uses the titles.

    Example:
        >>> rows = [{"model": "m", "setting": "gradient", "index": i, "seconds": 1.0, "gini": 0.5} for i in range(2)]
        >>> print(markdown_table(summarise(rows)))
        | setting | Gini index | time |
        |---|---:|---:|
        | gradient | 0.500 | 1.00 |
    """
    header = ["setting", *(title_of(name) for name in summary.scores), "time"]
    lines = [_line(header), "|---" + "|---:" * (len(header) - 1) + "|"]
    for setting in summary.settings:
        cells = [_shown(summary.cells[setting, name], mark_of(summary, setting, name)) for name in summary.scores]
        label = setting if names is None else names[setting]
        lines.append(_line([label, *cells, f"{relative_time(summary, setting):.2f}"]))
    return "\n".join(lines)


def csv_table(summary: Summary) -> str:
    """Write a summary as CSV: a line with all details for each setting and score; see `mark_of` for the verdicts.

    Example:
        >>> rows = [{"model": "m", "setting": "gradient", "index": i, "seconds": 1.0, "gini": 0.5} for i in range(2)]
        >>> csv_table(summarise(rows)).splitlines()[1]
        'm,gradient,gini,neither,0.5,0.0,2,2,,,,,,open,1.0'
    """
    lines = []
    for (setting, name), cell in summary.cells.items():
        against = cell.comparison
        lines.append(
            {
                "model": summary.model,
                "setting": setting,
                "score": name,
                "better": SCORES[_base(name)].better,
                "mean": _known(cell.mean.value),
                "standard_error": _known(cell.mean.standard_error),
                "valid": cell.mean.valid,
                "images": cell.mean.total,
                "difference": None if against is None else _known(against.difference),
                "low": None if against is None else _known(against.low),
                "high": None if against is None else _known(against.high),
                "pairs": None if against is None else against.images,
                "rank": _known(cell.rank),
                "verdict": mark_of(summary, setting, name),
                "relative_time": relative_time(summary, setting),
            }
        )
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def title_of(name: str) -> str:
    """Title of a score, with an arrow that shows which direction is better.

    Example:
        >>> title_of("aopc_lerf@0.1")
        'AOPC, LeRF at 0.1 ↓'
    """
    return f"{score_words(name)} {_ARROWS[SCORES[_base(name)].better]}".rstrip()


def score_words(name: str) -> str:
    """Title of a score without an arrow.

    Example:
        >>> score_words("aopc_lerf@0.1")
        'AOPC, LeRF at 0.1'
    """
    ratio = f" at {name.partition('@')[2]}" if "@" in name else ""
    return f"{SCORES[_base(name)].title}{ratio}"


def verdict_of(comparison: Comparison | None, score: str) -> Verdict:
    """Judge a comparison by the direction of the score.

    Example:
        >>> lower = Comparison(difference=-0.2, low=-0.3, high=-0.1, images=40)
        >>> verdict_of(lower, "aopc"), verdict_of(lower, "deletion"), verdict_of(lower, "gini")
        ('worse', 'better', 'open')
    """
    better = SCORES[_base(score)].better
    if comparison is None or not comparison.settled or better == "neither":
        return "open"
    return "better" if (comparison.difference > 0) == (better == "higher") else "worse"


def mark_of(summary: Summary, setting: str, score: str) -> Verdict:
    """The verdict that a table shows: controls are never marked, since they only check others."""
    return "open" if setting in summary.controls else summary.cells[setting, score].verdict


def relative_time(summary: Summary, setting: str) -> float:
    """Median time of a map relative to the baseline, or to the first setting if there is no baseline."""
    base = summary.seconds.get(BASELINE, summary.seconds[summary.settings[0]])
    return summary.seconds[setting] / base if base > 0 else math.nan


def _shown(cell: Cell, verdict: Verdict) -> str:
    if not cell.mean.valid:
        return "none valid"
    text = f"{cell.mean.value:.3f}"
    if cell.comparison is not None and not math.isnan(cell.comparison.low):
        text += f" ({cell.comparison.low:+.3f} to {cell.comparison.high:+.3f})"
    if cell.mean.valid < cell.mean.total:
        text += f", {cell.mean.valid} of {cell.mean.total} images"
    mark = {"better": "**", "worse": "*", "open": ""}[verdict]
    return f"{mark}{text}{mark}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _base(name: str) -> str:
    return name.partition("@")[0]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
