"""The page, the CSV and the pictures of the leaderboard, written from its runs."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from benchmarks.leaderboard import MEASUREMENTS, Network, fitting_methods
from benchmarks.neighbours import versions
from matplotlib.figure import Figure

import parchgrad as pg
from parchgrad._io.files import writing
from parchgrad.evaluation.leaderboard import DEFAULT
from parchgrad.evaluation.report import BASELINE, PairedRows, Verdict, title_of, verdict_of
from parchgrad.evaluation.rows import read_rows
from parchgrad.evaluation.scores import SCORES
from parchgrad.evaluation.significance import Ranking, Standing, rank_with_critical_difference, standings
from parchgrad.evaluation.summary import valid_mean
from parchgrad.visual import blend, save_figure
from parchgrad.visual.charts import LIGHT, style_axes
from parchgrad.workflows.demonstration import PHOTOGRAPHS, example_photographs

SMOOTHED = f"{DEFAULT} in SmoothGrad-8"
# Part of the run, score, and the group that the summary averages over.
COLUMNS = (
    ("grid-2", "mass_inside", "localisation"),
    ("grid-3", "mass_inside", "localisation"),
    ("rivals", "weighted_mass_inside", "localisation"),
    ("images", "weighted_mass_inside", "localisation"),
    ("images", "srg_zero", "SRG, zero"),
    ("images", "srg_blur", "SRG, blur"),
    ("images", "insertion", "insertion"),
    ("images", "deletion", "deletion"),
    ("images", "aopc", "AOPC"),
    ("steady", "stability_cosine@0.0001", "stability"),
    ("steady", "stability_cosine@0.001", "stability"),
    ("steady", "stability_cosine@0.01", "stability"),
    ("steady", "max_sensitivity", "stability"),
    ("steady", "randomisation_spearman@0.1", "random weights"),
    ("steady", "randomisation_spearman@1", "random weights"),
    ("images", "class_similarity", "another class"),
    ("images", "gini", ""),
)
GROUPS = tuple(dict.fromkeys(group for *_, group in COLUMNS if group))
TITLES = {
    ("grid-2", "mass_inside"): "grid 2 x 2 ↑",
    ("grid-3", "mass_inside"): "grid 3 x 3 ↑",
    ("rivals", "weighted_mass_inside"): "mass beside a rival ↑",
    ("images", "weighted_mass_inside"): "mass inside, by area ↑",
    ("steady", "stability_cosine@0.0001"): "cosine at 0.0001 ↑",
    ("steady", "stability_cosine@0.001"): "cosine at 0.001 ↑",
    ("steady", "stability_cosine@0.01"): "cosine at 0.01 ↑",
    ("steady", "randomisation_spearman@0.1"): "random weights, a tenth ↓",
    ("steady", "randomisation_spearman@1"): "random weights, all ↓",
    ("images", "class_similarity"): "another class ↓",
    ("images", "gini"): "Gini index",
}
PICTURES = 3


@dataclass(frozen=True, eq=False, kw_only=True)
class Results:
    """The results of one network.

    Attributes:
        network: the network.
        columns: paired rows and score by the title of the column.
        cost: time and memory by method, relative to the plain gradient, and the methods that are left out.
    """

    network: Network
    columns: Mapping[str, tuple[PairedRows, str]]
    cost: Mapping[str, Any]

    @classmethod
    def read(cls, network: Network, folder: Path) -> "Results":
        """Read the runs of a network; methods that no longer take part are ignored."""
        measured = [(folder / network.name / f"{task}.json").read_text(encoding="utf-8") for task in MEASUREMENTS]
        cost = {key: value for text in measured for key, value in json.loads(text).items()}
        paired = {
            part.name: PairedRows.of(
                [row for row in read_rows(folder / network.name / part.name) if row["setting"] in cost["time"]]
            )
            for part in network.parts
        }
        columns = {}
        for part, name, _ in COLUMNS:
            found = paired.get(part)
            if found is not None and any(not math.isnan(value) for value in found.column(DEFAULT, name)):
                columns[TITLES.get((part, name), title_of(name))] = found, name
        return cls(network=network, columns=columns, cost=cost)

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, in order."""
        return tuple(self.cost["time"])

    @cached_property
    def standings(self) -> Mapping[tuple[str, str], Standing]:
        """All methods in all columns against the default."""
        return standings(self.columns, reference=DEFAULT)

    @cached_property
    def rankings(self) -> Mapping[str, Ranking]:
        """The ranks in each column with a better direction."""
        return {
            column: rank_with_critical_difference(
                {title: paired.column(title, name) for title in paired.rows}, higher_is_better=better == "higher"
            )
            for column, (paired, name) in self.columns.items()
            if (better := SCORES[name.partition("@")[0]].better) != "neither"
        }

    def verdict(self, method: str, column: str) -> Verdict:
        """The verdict on a method against the default; open for the default itself."""
        return "open" if method == DEFAULT else self.standings[method, column].verdict

    def place(self, method: str, column: str) -> float:
        """Mean rank of a method in a column, from 0 (always first) to 1 (always last)."""
        ranking = self.rankings[column]
        return (ranking.ranks[method] - 1) / (len(ranking.ranks) - 1)

    def mean(self, method: str, column: str) -> float:
        """Mean score of a method; NaN if it has none."""
        paired, name = self.columns[column]
        return valid_mean(paired.column(method, name)).value

    def in_group(self, group: str) -> list[str]:
        """Columns of a group."""
        wanted = [TITLES.get((part, name), title_of(name)) for part, name, own in COLUMNS if own == group]
        return [column for column in wanted if column in self.columns]


def write_page(networks: Sequence[Network], missing: Mapping[str, str], runs: Path, out: Path) -> None:
    """Write `index.md`, `leaderboard.csv` and the pictures."""
    found = [Results.read(network, runs) for network in networks]
    out.mkdir(parents=True, exist_ok=True)
    draw_cost(found, out / "quality-and-cost.png")
    pictured = next((each.network for each in found if each.network.name == "efficientnet_lite0"), None)
    if pictured is not None:
        draw_maps(pictured, runs, out / "maps.jpg")
    for path, text in ((out / "index.md", page(found, missing, pictured)), (out / "leaderboard.csv", table(found))):
        with writing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def page(found: Sequence[Results], missing: Mapping[str, str], pictured: Network | None) -> str:
    """Write the page."""
    sections = [
        "# Leaderboard",
        losses(found),
        "Written by `make leaderboard`. It compares the methods people use, each with its usual settings, on the same "
        f"images. {DEFAULT} is `pg.Explainer(model)`. **Bold** is better than it and *italic* is worse, after a "
        "correction for all comparisons of a table; everything else cannot be told apart from it, or has fewer than "
        "20 images with a score. Click a heading to sort. [leaderboard.csv](leaderboard.csv) has all intervals, effect "
        "sizes and p-values.",
        "Grid pointing rewards whoever suppresses the context, even if the network uses it. So does mass in a mask, "
        "but the background of generated shapes says nothing about the class. *SRG, blur* does not.",
        "## All networks",
        summary_text(),
        summary_table(found),
        "![Mean rank over the time of a map: SRG with a blur, and localisation](quality-and-cost.png)",
    ]
    if pictured is not None:
        names = ", ".join(name for name in list(PHOTOGRAPHS)[:PICTURES])
        sections += [
            "## The same three images",
            f"Photographs of scikit-image ({names}) explained on {pictured.title} by every method that fits it, "
            "each map on its own scale.",
            "![Three photographs under all methods](maps.jpg)",
        ]
    sections += ["## What was expected", expectations(found)]
    for each in found:
        sections += [
            f"## {each.network.title[0].upper()}{each.network.title[1:]}",
            network_text(each),
            score_table(each),
        ]
    return "\n\n".join([*sections, "## How it was measured", method_text(found, missing)]) + "\n"


def losses(found: Sequence[Results]) -> str:
    """Say where the default loses: every column in which a method is better."""
    by_column: dict[str, list[str]] = {}
    for each in found:
        for column in each.rankings:
            better = [title for title in each.methods if each.verdict(title, column) == "better"]
            if better:
                first = min(better, key=lambda title: each.rankings[column].ranks[title])
                more = f" and {len(better) - 1} more" if len(better) > 1 else ""
                by_column.setdefault(column, []).append(f"{first}{more} on `{each.network.name}`")
    if not by_column:
        return f"**Where {DEFAULT} loses**: no method is better by any score, beyond what chance explains."
    told = "; ".join(f"in {_words(column)}, to {', '.join(where)}" for column, where in by_column.items())
    return f"**Where {DEFAULT} loses**: {told}."


def expectations(found: Sequence[Results]) -> str:
    """Say whether what was expected holds, network by network."""
    lines = []
    for each in found:
        behind = [
            f"{_words(column)} (first: {min(ranking.ranks, key=ranking.ranks.__getitem__)})"
            for column in each.in_group("localisation")
            if DEFAULT not in (ranking := each.rankings[column]).leaders
        ]
        lower = [_words(column) for column in each.in_group("stability") if each.verdict(BASELINE, column) == "better"]
        time = each.cost["time"][DEFAULT]
        lines.append(
            [
                f"`{each.network.name}`",
                _holds(behind),
                _holds(lower) if each.in_group("stability") else _shown(math.nan, 0),
                f"{time:.2f} {'holds' if time <= 1.3 else 'fails'}",
                smoothed_words(each),
            ]
        )
    header = ["network", "first in localisation", "as stable as the gradient", "at most 1.3 gradients", SMOOTHED]
    return (
        f"Expected before the run: {DEFAULT} is first in localisation or cannot be told apart from the first, "
        "is not below the plain gradient in stability, and costs at most 1.3 gradients; inside SmoothGrad-8, it is not "
        "below SmoothGrad-25 in SRG, and above it in localisation. The last column has single intervals, without "
        "correction.\n\n" + _markdown(header, lines, align="---")
    )


def smoothed_words(each: Results) -> str:
    """Compare the default inside SmoothGrad-8 with SmoothGrad-25."""
    by_verdict: dict[Verdict, list[str]] = {"better": [], "worse": [], "open": []}
    for column in (*each.in_group("SRG, zero"), *each.in_group("SRG, blur"), *each.in_group("localisation")):
        paired, name = each.columns[column]
        by_verdict[verdict_of(paired.compare(SMOOTHED, "SmoothGrad-25", name), name)].append(_words(column))
    words = {"better": "better", "worse": "worse", "open": "undecided"}
    return "; ".join(f"{words[verdict]}: {', '.join(own)}" for verdict, own in by_verdict.items() if own)


def _holds(exceptions: Sequence[str]) -> str:
    return f"fails: {', '.join(exceptions)}" if exceptions else "holds"


def summary_text() -> str:
    """Explain the table over all networks."""
    return (
        "Mean rank over images and networks, from 0 (always first) to 1 (always last); a dash where not measured. "
        "Time and memory of a map are relative to the plain gradient: the geometric mean over networks. A "
        "method that does not fit a network is left out there, so compare ranks of methods on the same networks."
    )


def summary_table(found: Sequence[Results]) -> str:
    """Write one row per method over all networks."""
    header = ["method", *GROUPS, "time", "memory", "networks"]
    lines = []
    for title in all_methods(found):
        own = [each for each in found if title in each.methods]
        cells = [_shown(average_place(own, title, group), 2) for group in GROUPS]
        costs = [_shown(_geometric([each.cost[kind][title] for each in own]), 1) for kind in ("time", "memory")]
        lines.append([f"**{title}**" if title == DEFAULT else title, *cells, *costs, str(len(own))])
    return _markdown(header, lines)


def average_place(found: Sequence[Results], title: str, group: str) -> float:
    """Average a method's place over the columns of a group, then over networks."""
    places = [[each.place(title, column) for column in each.in_group(group)] for each in found]
    return valid_mean([valid_mean(own).value for own in places]).value


def network_text(each: Results) -> str:
    """Describe the images of a network, and what is left out."""
    parts = "; ".join(f"{_PARTS[part.name]}: {part.words}" for part in each.network.parts)
    said = [f"{parts[0].upper()}{parts[1:]}.", each.network.note]
    by_reason: dict[str, list[str]] = {}
    for title, reason in each.cost["left_out"].items():
        by_reason.setdefault(reason.rstrip("."), []).append(title)
    said += [f"Left out: {', '.join(titles)} ({reason})." for reason, titles in by_reason.items()]
    said.append("● marks the methods whose mean rank cannot be told apart from the best one's.")
    return " ".join(part for part in said if part)


def score_table(each: Results) -> str:
    """Write one row per method, with a column for each score."""
    lines = []
    for title in each.methods:
        cells = []
        for column in each.columns:
            mark = {"better": "**", "worse": "*", "open": ""}[each.verdict(title, column)]
            leads = " ●" if column in each.rankings and title in each.rankings[column].leaders else ""
            cells.append(f"{mark}{_shown(each.mean(title, column), 3)}{mark}{leads}")
        costs = [_shown(each.cost[kind][title], 2) for kind in ("time", "memory")]
        lines.append([f"**{title}**" if title == DEFAULT else title, *cells, *costs])
    return _markdown(["method", *each.columns, "time", "memory"], lines)


def method_text(found: Sequence[Results], missing: Mapping[str, str]) -> str:
    """Say how everything was measured, with sources."""
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    left_out = "".join(f"\n- `{name}` is left out: {reason}." for name, reason in missing.items())
    return _METHOD.format(used=used, default=DEFAULT, version=pg.__version__) + left_out


_PARTS = {
    "images": "faithfulness",
    "steady": "stability and randomisation",
    "rivals": "mass beside a rival",
    "grid-2": "grid 2 x 2",
    "grid-3": "grid 3 x 3",
}
_METHOD = """\
- **Methods**: parchgrad {version}, {used}. Captum has guided backpropagation, DeepLift, guided Grad-CAM and occlusion
  (squares of a quarter of the side, half overlapping); guided backpropagation and DeepLift act on `nn.ReLU` alone,
  which the transformer and the ConvNeXt have in the stem only. parchgrad's own Grad-CAM reads the last convolution.
  grad-cam has Grad-CAM++, HiResCAM, LayerCAM, Finer-CAM and Grad-CAM again, on the last layer with feature maps, or
  the last block of each stage below full resolution; it subtracts the minimum of each map. zennit has LRP, which here
  copies relevance to both branches of a residual sum. Heat maps are magnitudes averaged over colours, also of signed
  attributions such as integrated gradients; of CAMs, occlusion and LRP, the positive part. The published ParchGrad
  edits the paper's layers, where the paper has some for the network, else the upper half.
- **Tuning**: `{default}` and the other edits were chosen on even-numbered images of CIFAR-10 and EfficientNet-Lite0
  and on other shapes, none of which are here, and on no image of EfficientNet-Lite1. The other methods have the
  settings of their papers or packages; none was tuned here. Channel statistics of the published method come from
  other images.
- **Grid pointing** (Bohle, Fritz, Schiele 2021): the share of the map in the cell of its class. Images have the
  published confidence of 0.99 where enough do, else the number above. One cell of each mosaic is explained.
- **Mass** (Kohlbrenner et al. 2020): the share of the map in the exact mask, divided by the mask's share of the
  image.
- **SRG** (Bluecher, Vielhaben, Strodthoff 2024): area between the probability curves for least and most relevant
  pixels first, from 0 to 100 % in ten steps, replaced by zero or a Gaussian blur. **Insertion** (from a blur) and
  **deletion** (to zero): Petsiuk, Das, Saenko (2018). **AOPC** (Samek et al. 2017): most relevant minus least
  relevant first, to zero.
- **Cosine**: of the maps with and without Gaussian noise of a share of the image's range, one copy per level.
  **Max-sensitivity** (Yeh et al. 2019): within 0.02, three copies.
- **Random weights** (Adebayo et al. 2018): rank correlation with the map after the last tenth, or all, of the
  modules got new weights. **Another class** (Sixt, Granz, Landgraf 2020): rank correlation with the map of another
  class. **Gini index** (Chalasani et al. 2020): concentration; neither direction is better.
- **Tests**: each method is compared with `{default}` on the same images by a paired bootstrap (95 %, BCa) and
  Wilcoxon's signed-rank test with Holm's correction over all cells of a network's table. It counts as better or
  worse only if both agree, on at least 20 images. Effect sizes in the CSV are rank-biserial correlations. Ranks are
  compared by Friedman's test and Nemenyi's critical difference (Demsar 2006); a map without a score, such as one
  that is zero everywhere, ranks last.
- **Time and memory**: medians over rounds in which every method takes its turn, on one thread; peak memory of
  one call above that before it.

[Add your method in ten lines](../how_to/adding_to_the_leaderboard.md)."""


def all_methods(found: Sequence[Results]) -> list[str]:
    """All methods, in the order of the network that most fit."""
    widest = max(found, key=lambda each: len(each.methods))
    return list(dict.fromkeys([*widest.methods, *(title for each in found for title in each.methods)]))


def table(found: Sequence[Results]) -> str:
    """Write everything as CSV, one line per network, column and method."""
    lines = []
    for each in found:
        for column, (paired, name) in each.columns.items():
            ranking = each.rankings.get(column)
            for title in each.methods:
                mean = valid_mean(paired.column(title, name))
                standing = each.standings.get((title, column))
                line: dict[str, Any] = {
                    "network": each.network.name,
                    "column": _words(column),
                    "score": name,
                    "better": SCORES[name.partition("@")[0]].better,
                    "method": title,
                    "mean": mean.value,
                    "standard_error": mean.standard_error,
                    "valid": mean.valid,
                    "images": mean.total,
                    "rank": ranking and ranking.ranks[title],
                    "critical_difference": ranking and ranking.critical_difference,
                    "friedman_p": ranking and ranking.p,
                    "leads": ranking and title in ranking.leaders,
                    "difference": standing and standing.comparison.difference,
                    "low": standing and standing.comparison.low,
                    "high": standing and standing.comparison.high,
                    "pairs": standing and standing.comparison.images,
                    "p_holm": standing and standing.p,
                    "effect": standing and standing.effect,
                    "verdict": standing and standing.verdict,
                    "time": each.cost["time"][title],
                    "memory": each.cost["memory"][title],
                }
                lines.append({key: None if value != value else value for key, value in line.items()})
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def draw_cost(found: Sequence[Results], path: Path) -> None:
    """Draw the mean rank over the time of a map; names stand beside the chart in the order of the ranks."""
    groups = ("SRG, blur", "localisation")
    figure = Figure(figsize=(5.4, 9.8), layout="constrained")
    figure.set_facecolor("white")
    for axes, group in zip(figure.subplots(2, 1), groups, strict=True):
        style_axes(axes, LIGHT, x_label="time of a map, in plain gradients", y_label=f"{group}: mean rank, 0 is best")
        points = {}
        for title in all_methods(found):
            own = [each for each in found if title in each.methods and title != "random map"]
            rank = average_place(own, title, group)
            if own and not math.isnan(rank):
                points[title] = _geometric([each.cost["time"][title] for each in own]), rank
        axes.set_xscale("log")
        axes.invert_yaxis()
        ordered = sorted(points, key=lambda title: points[title][1])
        low, high = min(rank for _, rank in points.values()), max(rank for _, rank in points.values())
        for place, title in enumerate(ordered):
            time, rank = points[title]
            own = title.startswith("ParchGrad")
            colour = LIGHT.good if own else LIGHT.open
            axes.scatter([time], [rank], s=30, color=colour, zorder=3)
            # Evenly spaced, so that no name covers another.
            height = low + (high - low) * place / max(1, len(ordered) - 1)
            axes.annotate(
                title,
                (time, rank),
                xytext=(1.04, height),
                textcoords=axes.get_yaxis_transform(),
                va="center",
                fontsize=9,
                fontweight="bold" if title == DEFAULT else "normal",
                color=LIGHT.good if own else LIGHT.ink,
                arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.45, "linewidth": 0.7, "relpos": (0, 0.5)},
            )
        fastest, slowest = (edge(time for time, _ in points.values()) for edge in (min, max))
        ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100) if 0.7 * fastest <= tick <= 1.4 * slowest]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    save_figure(figure, path)


def draw_maps(network: Network, runs: Path, path: Path) -> None:
    """Draw the same three photographs under all methods: a row for each method."""
    classifier = pg.load_model("efficientnet_lite0")
    photographs = dict(zip(PHOTOGRAPHS, example_photographs(), strict=True))
    chosen = list(PHOTOGRAPHS)[:PICTURES]
    inputs = torch.stack([classifier.preprocess(photographs[name]) for name in chosen])
    with torch.no_grad():
        predicted = classifier.model(inputs).argmax(dim=1).tolist()
    target = torch.tensor(
        [
            likely if PHOTOGRAPHS[name] is None else classifier.find_category(str(PHOTOGRAPHS[name]))
            for name, likely in zip(chosen, predicted, strict=True)
        ]
    )
    pictures = [classifier.preprocess.picture(image) for image in inputs]
    methods, _ = fitting_methods(network, runs, ())
    rows: list[tuple[str, list[Any]]] = [("image", pictures)]
    for title, make in methods.items():
        maps = make(network.model)(inputs, target).detach()
        rows.append((title, [blend(picture, heat.numpy()) for picture, heat in zip(pictures, maps, strict=True)]))
    figure = Figure(figsize=(5.2, 1.22 * len(rows)))
    figure.set_facecolor("white")
    grid = figure.subplots(len(rows), PICTURES, squeeze=False)
    for (title, shown), axes in zip(rows, grid, strict=True):
        for picture, each in zip(shown, axes, strict=True):
            each.imshow(picture)
            each.axis("off")
        axes[0].text(
            -0.06,
            0.5,
            title.replace(", ", ",\n").replace(" in ", "\nin "),
            transform=axes[0].transAxes,
            ha="right",
            va="center",
            fontsize=9,
            fontweight="bold" if title == DEFAULT else "normal",
            color=LIGHT.ink,
        )
    figure.subplots_adjust(left=0.28, right=0.995, top=0.998, bottom=0.002, wspace=0.03, hspace=0.03)
    save_figure(figure, path, dpi=120)


def _words(column: str) -> str:
    """Title of a column without its arrow, and without commas, which would read as a list."""
    return column.rstrip(" ↑↓").replace(",", "")


def _shown(value: float, digits: int) -> str:
    return "\N{EN DASH}" if math.isnan(value) else f"{value:.{digits}f}"


def _geometric(values: Sequence[float]) -> float:
    positive = [math.log(value) for value in values if value > 0]
    return math.exp(sum(positive) / len(positive)) if positive else math.nan


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]], *, align: str = "---:") -> str:
    rows = [header, ["---", *[align] * (len(header) - 1)], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
