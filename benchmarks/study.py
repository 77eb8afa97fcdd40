"""The study: what the method does on three networks, with every setting varied, from one command to `docs/study`.

    python -m benchmarks.study [--data ../shared/data] [--runs outputs/study] [--out docs/study]

Generated shapes come with the package. Two more networks take part where the folder of data is there: ResNet-20 on
CIFAR-10 (`cifar10`, see benchmarks/cifar10.py) and EfficientNet-Lite0 on one photograph for each ImageNet class
(`imagenet-one-per-class`). Started again after it was stopped, it goes on where it was.

Of CIFAR-10's test images and of the photographs only every second one is explained: on the others the selector
`Evidence`, its quantile and its layers were chosen. Statistics are collected on images that are not explained.

Rows of an earlier state of the package are taken as they are: after a change of a method, give another folder of runs.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.cifar10 import labelled, load_resnet20
from torch import nn
from torch.utils.data import Dataset, Subset

import parchgrad as pg
from parchgrad.cli.shared import ProgressBars
from parchgrad.data.images import read_image
from parchgrad.data.samples import DrawnSamples, LabelledImages, Pairs, Samples
from parchgrad.data.shapes import GeneratedShapes
from parchgrad.errors import StatisticsWarning
from parchgrad.evaluation.grid_pointing import make_mosaics
from parchgrad.evaluation.methods import Method, maps_of
from parchgrad.evaluation.report import Summary, csv_table, markdown_table, summarise, title_of
from parchgrad.evaluation.runs import Row, TargetChoice, evaluate, read_rows
from parchgrad.evaluation.scores import ScoreSettings
from parchgrad.evaluation.settings import Setting
from parchgrad.evaluation.summary import valid_mean
from parchgrad.files import writing
from parchgrad.statistics.collect import Labels
from parchgrad.statistics.tests import TTest
from parchgrad.visual import save_figure
from parchgrad.visual.charts import Curve, curve_chart

QUANTILES = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0)
LAYERS = ("default", 0.25, 0.5, 0.75, "all")
GAMMAS = (math.inf, 1.0, 2.0, 10.0)
PLAIN, GRAD_CAM = Setting(), Setting(method="grad_cam")
CONTROLS = (PLAIN, Setting(method="random_map"), GRAD_CAM, Setting(method="centre_blob"))
RANDOM = Setting(selector="random", layers=0.5)
ENERGY = Setting(selector="energy", layers=0.5)
ACTIVATION = Setting(selector="activation", layers=0.5)
EVIDENCE = Setting(selector="evidence", quantile=0.2, layers=0.75)
CLASS_WISE = Setting(selector="class", layers=0.5)
INSTANCE_WISE = Setting(selector="instance", layers=0.5)
# What a question without answers of its own on the mosaics costs them is time.
SINGLE_IMAGES = ("shapes", "cifar10", "photographs")
ALL_KEPT = {
    "energy": "the plain gradient.",
    "class": "all that pass the normality gate.",
    "evidence": "then places alone are weighed.",
}
NAMES = {"energy": "GradientEnergy", "evidence": "Evidence", "class": "ClassWise"}
STUDENT, NO_GATE, ANEW = "class, Student's test", "class, no normality gate", "class, statistics collected anew"
CHANNELS_ALONE, POSITIONS_ALONE = "evidence, channels alone", "evidence, positions alone"
AXES = {"quantile": "share of the channels that is kept", "layers": "layers"}
TRACKS = ("shapes", "cifar10", "photographs", "mosaics")
SANITY_SCORES = (
    "randomisation_spearman@0.1",
    "randomisation_spearman@0.5",
    "randomisation_spearman@1",
    "randomisation_similarity",
    "max_sensitivity",
)
SANITY_TEXT = (
    "Similarity of the map with the one of the network whose weights were drawn anew from the output down, a tenth of "
    "the modules, half of them, all; two draws. A map that stays the same does not show what the network has learned. "
    "Max-sensitivity is the largest change under noise that nobody sees."
)
HEADER = """# Results

Written by `make study`. Means over the images; in brackets the interval (95 %) of the difference to the reference, from
a paired bootstrap over the images, or over whole mosaics. Bold is better than the reference, italic worse, each where
the interval leaves out zero and stands on 20 images at least; the intervals are for one comparison each, so that some
of so many leave out zero by chance. Arrows point where a score is better. Time is that of a map over the
reference's, or the plain gradient's where it is in the table, as the machine took it in the run: of a run that was
continued beside other work it says little.

"""
SANITY = ScoreSettings(families=("randomisation", "sensitivity"), draws=2)
SANE = (*CONTROLS, RANDOM, ENERGY, replace(ENERGY, layers="all"), ACTIVATION, EVIDENCE, CLASS_WISE)


@dataclass(frozen=True, eq=False, kw_only=True)
class Track:
    """A network, the images on which its maps are judged, and by which scores.

    Attributes:
        name: of its run and its files.
        title: in the report.
        model: the network.
        data: the images that are explained.
        target: which class is explained.
        scores: which are shown, the first being what sentences and charts are about.
        families: which are had.
        batch_size: images scored together.
        unseen: images that are not explained, for statistics.
        labels: whether these have labels; see `collect_statistics`.
        sizes: how many of these are taken, in ascending order.
        sanity: number of images for the checks with other weights.
    """

    name: str
    title: str
    model: nn.Module
    data: Samples
    target: TargetChoice
    scores: tuple[str, ...]
    families: tuple[Any, ...]
    batch_size: int
    unseen: Dataset[Any]
    labels: Labels
    sizes: tuple[int, ...]
    sanity: int

    def collect(self, model: nn.Module, size: int) -> pg.ChannelStatistics:
        """Collect statistics of the network, or of one with other weights, on the first so many of these images."""
        images = Subset(self.unseen, range(size))
        return pg.collect_statistics(model, images, labels=self.labels, batch_size=self.batch_size)


@dataclass(frozen=True, eq=False, kw_only=True)
class Question:
    """Settings that are compared with a reference.

    Attributes:
        title: the question.
        text: what is varied, in a sentence or two.
        reference: what the others are compared with.
        settings: the others.
        own: titles of further methods, see `variants_of`.
        tracks: names of the tracks; none for all.
        axis: the setting that a chart is drawn over; empty for no chart.
    """

    title: str
    text: str
    reference: Setting
    settings: tuple[Setting, ...]
    own: Callable[[Track], Sequence[str]] = lambda track: ()
    tracks: tuple[str, ...] = ()
    axis: str = ""


def make_questions() -> list[Question]:
    """All that the study asks."""
    varied = [ENERGY, CLASS_WISE, EVIDENCE]
    found = [
        Question(
            title="Which selector?",
            text="All keep a tenth of the channels of the upper half of the convolutions, except `evidence`, which is "
            "made for a fifth of those of the upper three quarters. Compared with the plain gradient.",
            reference=PLAIN,
            settings=(*CONTROLS[1:], RANDOM, INSTANCE_WISE, CLASS_WISE, ENERGY, ACTIVATION, EVIDENCE),
        ),
        Question(
            title="Which selector, on equal grounds?",
            text="All keep a fifth of the channels of the upper three quarters, where `evidence` was tuned; it alone "
            "weighs places too, but not as `evidence, channels alone`. Compared with random channels.",
            reference=replace(RANDOM, quantile=0.2, layers=0.75),
            settings=(
                PLAIN,
                *(replace(setting, quantile=0.2, layers=0.75) for setting in (CLASS_WISE, ENERGY, ACTIVATION)),
                EVIDENCE,
            ),
            own=lambda track: [CHANNELS_ALONE],
        ),
        Question(
            title="Does Evidence earn its place?",
            text="`Evidence` is not in the paper. Compared with it: others as they are usually set, Grad-CAM, and its "
            "two parts by themselves. Its settings were chosen on the other half of CIFAR-10 and of the photographs, "
            "never on generated shapes; those of the others were not tuned.",
            reference=EVIDENCE,
            settings=(
                PLAIN,
                GRAD_CAM,
                CLASS_WISE,
                ENERGY,
                replace(ENERGY, layers="all"),
                ACTIVATION,
                replace(ACTIVATION, layers="all"),
                replace(EVIDENCE, quantile=0.1),
            ),
            own=lambda track: [CHANNELS_ALONE, POSITIONS_ALONE],
        ),
        Question(
            title="Does it help methods of many passes?",
            text="Integrated gradients and SmoothGrad of 25 passes, plain and with `Evidence` inside.",
            reference=EVIDENCE,
            settings=tuple(
                replace(setting, method=method)
                for method in ("integrated_gradients", "smoothgrad")
                for setting in (PLAIN, EVIDENCE)
            ),
            tracks=("shapes", "cifar10"),
        ),
    ]
    found += [
        Question(
            title=f"How many channels? {NAMES[str(setting.selector)]}",
            text="The share of the channels that is kept, from a hundredth (one channel of each layer at least) to "
            "all: " + ALL_KEPT[str(setting.selector)],
            reference=setting,
            settings=tuple(
                replace(setting, quantile=quantile) for quantile in QUANTILES if quantile != setting.quantile
            ),
            axis="quantile",
            tracks=SINGLE_IMAGES,
        )
        for setting in varied
    ]
    found += [
        Question(
            title=f"Which layers? {NAMES[str(setting.selector)]}",
            text="`default` is the published set of the network's family, else the upper half; a ratio is the upper "
            "part of the convolutions.",
            reference=setting,
            settings=tuple(replace(setting, layers=layers) for layers in LAYERS if layers != setting.layers),
            axis="layers",
            tracks=SINGLE_IMAGES,
        )
        for setting in varied
    ]
    for setting in (ENERGY, CLASS_WISE):
        name = NAMES[str(setting.selector)]
        found.append(
            Question(
                title=f"Prune or damp? {name}",
                text="A finite `gamma` damps the other channels until the kept ones are that many times as strong.",
                reference=setting,
                settings=tuple(replace(setting, gamma=gamma) for gamma in GAMMAS[1:]),
                tracks=SINGLE_IMAGES,
            )
        )
        found.append(
            Question(
                title=f"Does re-scaling matter? {name}",
                text="`none` prunes without re-scaling; `exact` measures the variance of the sum before and after.",
                reference=setting,
                settings=(replace(setting, conserve="none"), replace(setting, conserve="exact")),
                tracks=SINGLE_IMAGES,
            )
        )
    found += [
        Question(
            title=f"Do the masks know the class? {NAMES[str(setting.selector)]}",
            text="The gradient of the class with what is selected for another class, and with as many channels at "
            "random.",
            reference=setting,
            settings=(replace(setting, masks="another"), replace(setting, masks="shuffled")),
        )
        for setting in varied
    ]
    found.append(
        Question(
            title="Welch or Student, with or without the normality gate?",
            text="`ClassWise` takes Welch's test, and channels only whose responses are not normally distributed. Of a "
            "class of fewer than two images, as many are among the photographs, Student's test takes Welch's place.",
            reference=CLASS_WISE,
            settings=(),
            own=lambda track: [STUDENT, NO_GATE],
            tracks=SINGLE_IMAGES,
        )
    )
    found.append(
        Question(
            title="How many images do the statistics need?",
            text="`ClassWise` with statistics of fewer images.",
            reference=CLASS_WISE,
            settings=(),
            own=lambda track: [f"class, {size} images" for size in track.sizes[:-1]],
            tracks=SINGLE_IMAGES,
        )
    )
    return found


def class_wise(
    held: pg.ChannelStatistics, *, test: TTest = "welch", normality_threshold: float | None = 0.05
) -> Callable[[nn.Module], Method]:
    """`ClassWise` on the same layers as everywhere here, with settings that no grid has."""
    selector = pg.ClassWise(held, quantile=CLASS_WISE.quantile, test=test, normality_threshold=normality_threshold)
    return lambda model: maps_of(pg.Explainer(model, selector, layers=0.5))


def variants_of(held: Mapping[int, pg.ChannelStatistics]) -> dict[str, Callable[[nn.Module], Method]]:
    """Methods by their titles, from statistics by the number of their images."""
    *fewer, most = sorted(held)
    return {
        STUDENT: class_wise(held[most], test="student"),
        NO_GATE: class_wise(held[most], normality_threshold=None),
        **{f"class, {size} images": class_wise(held[size]) for size in fewer},
        CHANNELS_ALONE: evidence(positions=1),
        POSITIONS_ALONE: evidence(quantile=1),
    }


def evidence(*, quantile: float = 0.2, positions: float = 0.4) -> Callable[[nn.Module], Method]:
    """`Evidence` on the same layers as everywhere here, with one of its two parts switched off."""
    selector = pg.Evidence(quantile=quantile, positions=positions)
    return lambda model: maps_of(pg.Explainer(model, selector, layers=0.75))


class Photographs(Dataset[Any]):
    """Photographs of a folder, one for each class, in the order of the classes; with or without their class."""

    def __init__(self, folder: Path, classifier: pg.Classifier, *, with_class: bool) -> None:
        """Find the files."""
        self.files, self.classifier, self.with_class = sorted(folder.glob("*.jpg")), classifier, with_class

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        image = self.classifier.preprocess(read_image(self.files[index]))
        return (image, index) if self.with_class else image


def shuffled(count: int) -> list[int]:
    """Indices in an order of their own, so that the first ones are of all classes."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()


def shapes_track(share: float) -> Track:
    """The generated shapes, whose exact masks say where the class is."""
    return Track(
        name="shapes",
        title="Generated shapes, the network that comes with the package",
        model=pg.load_model("shapes").model,
        data=GeneratedShapes(count=part_of(200, share), seed=100),
        target="label",
        scores=("weighted_mass_inside", "mass_inside", "aopc", "aopc_morf", "aopc_lerf", "gini"),
        families=("perturbation", "localisation", "sparsity"),
        batch_size=50,
        unseen=Pairs(GeneratedShapes(count=2000, seed=200)),
        labels="given",
        sizes=tuple(part_of(size, share) for size in (200, 500, 2000)),
        sanity=part_of(48, share),
    )


def cifar10_track(folder: Path, share: float) -> Track:
    """The second half of CIFAR-10's test images here, explained for the predicted class."""
    images, training = labelled(folder / "test"), labelled(folder / "train")
    odd = Subset(images, range(1, len(images), 2))
    return Track(
        name="cifar10",
        title="CIFAR-10, ResNet-20",
        model=load_resnet20(folder / "resnet20.th"),
        data=LabelledImages(Subset(odd, sorted(shuffled(len(odd))[: part_of(500, share)])), categories=images.folders),
        target="predicted",
        scores=("aopc", "aopc_morf", "aopc_lerf", "accuracy_morf", "accuracy_lerf", "gini"),
        families=("perturbation", "sparsity"),
        batch_size=100,
        unseen=Subset(training, shuffled(len(training))),
        labels="given",
        sizes=tuple(part_of(size, share) for size in (300, 1000, 3000)),
        sanity=part_of(64, share),
    )


def photograph_tracks(folder: Path, share: float) -> list[Track]:
    """The second half of the photographs, alone and in mosaics; the first half makes the statistics."""
    classifier = pg.load_model("efficientnet_lite0")
    photographs = Photographs(folder, classifier, with_class=True)
    odd = Subset(photographs, range(1, len(photographs), 2))
    drawn = Subset(odd, sorted(shuffled(len(odd))[: part_of(80, share)]))
    even = Subset(Photographs(folder, classifier, with_class=False), [2 * place for place in shuffled(len(odd))])
    alone = Track(
        name="photographs",
        title="Photographs, EfficientNet-Lite0",
        model=classifier.model,
        data=LabelledImages(drawn, categories=classifier.categories),
        target="predicted",
        scores=("aopc", "aopc_morf", "aopc_lerf", "accuracy_morf", "accuracy_lerf", "gini"),
        families=("perturbation", "sparsity"),
        batch_size=8,
        unseen=even,
        labels="predicted",
        sizes=tuple(part_of(size, share) for size in (100, 250, 500)),
        sanity=part_of(20, share),
    )
    labelled_odd = LabelledImages(odd, categories=classifier.categories)
    tiled = replace(
        alone,
        name="mosaics",
        title="Mosaics of four photographs, EfficientNet-Lite0",
        data=make_mosaics(classifier.model, labelled_odd, count=part_of(24, share), batch_size=8),
        target="label",
        scores=("mass_inside", "gini"),
        families=("localisation", "sparsity"),
        sanity=0,
    )
    return [alone, tiled]


def part_of(count: int, share: float) -> int:
    """Some of the images, for a trial; two at least."""
    return max(2, int(share * count))


def make_tracks(data: Path, names: Sequence[str], share: float) -> list[Track]:
    """Make the tracks of some names whose data are there."""
    found = [shapes_track(share)] if "shapes" in names else []
    if "cifar10" in names and (data / "cifar10").is_dir():
        found.append(cifar10_track(data / "cifar10", share))
    if {"photographs", "mosaics"} & set(names) and (data / "imagenet-one-per-class").is_dir():
        found += [t for t in photograph_tracks(data / "imagenet-one-per-class", share) if t.name in names]
    return found


QUESTIONS = make_questions()


def asked_of(track: Track) -> list[Question]:
    """The questions that are asked on a track."""
    return [question for question in QUESTIONS if not question.tracks or track.name in question.tracks]


def run(track: Track, asked: Sequence[Question], folder: Path, progress: ProgressBars) -> list[Row]:
    """Evaluate all settings that the questions ask about on a track; return the rows."""
    held = {size: track.collect(track.model, size) for size in track.sizes}
    own = [title for question in asked for title in question.own(track)]
    variants = variants_of(held)
    evaluate(
        track.model,
        track.data,
        [setting for question in asked for setting in (question.reference, *question.settings)],
        folder,
        name=track.name,
        methods={title: variants[title] for title in own},
        scores=ScoreSettings(families=track.families),
        target=track.target,
        statistics=held[track.sizes[-1]],
        batch_size=track.batch_size,
        on_progress=lambda done, total: progress.update(track.name, done, total),
    )
    return read_rows(folder)


def check_sanity(track: Track, folder: Path, progress: ProgressBars) -> list[Row]:
    """Compare maps with those of other weights and of noisy images, on a few images; return the rows."""
    stage = f"{track.name}, other weights"
    size = track.sizes[-1]
    evaluate(
        track.model,
        DrawnSamples(track.data, count=track.sanity),
        SANE,
        folder,
        name=f"{track.name}, other weights",
        # What makes a method is asked anew for each model with other weights.
        methods={ANEW: lambda model: class_wise(track.collect(model, size))(model)},
        scores=SANITY,
        target=track.target,
        statistics=track.collect(track.model, size),
        # In one batch, since all of a batch share the models with other weights.
        batch_size=track.sanity,
        on_progress=lambda done, total: progress.update(stage, done, total),
    )
    return read_rows(folder)


def answer(question: Question, track: Track, rows: Sequence[Row]) -> str:
    """The table of one question on one track, and what it says in a sentence."""
    titles = [question.reference.title, *(setting.title for setting in question.settings), *question.own(track)]
    found = summarise(
        sorted((row for row in rows if row["setting"] in titles), key=lambda row: titles.index(row["setting"])),
        scores=[name for name in track.scores if any(not math.isnan(row[name]) for row in rows)],
        baseline=question.reference.title,
    )
    return f"**{track.title}** ({found.images} images)\n\n{markdown_table(found)}\n\n{sentence(found, titles[0])}\n"


def sentence(found: Summary, reference: str) -> str:
    """Say which settings are settled to be better or worse than the reference by the first score."""
    name = found.scores[0]
    by_verdict: dict[str, list[str]] = {"better": [], "worse": [], "open": []}
    for setting in found.settings:
        cell = found.cells[setting, name]
        if cell.comparison is not None:
            by_verdict[cell.verdict].append(f"`{setting}`")
    said = [
        f"{word}: {', '.join(by_verdict[verdict])}"
        for verdict, word in (("better", "better"), ("worse", "worse"), ("open", "not settled"))
        if by_verdict[verdict]
    ]
    return f"By {title_of(name)}, compared with `{reference}`, {'; '.join(said)}."


def draw(axis: str, track: Track, asked: Sequence[Question], rows: Sequence[Row], path: Path) -> None:
    """Draw the first score over a setting, a curve for each selector that it was varied for."""
    name, curves = track.scores[0], []
    for question in asked:
        settings = sorted((question.reference, *question.settings), key=lambda one: place_of(one, axis))
        means = [valid_mean([row[name] for row in rows if row["setting"] == one.title]).value for one in settings]
        places = [getattr(one, axis) for one in settings]
        curves.append(Curve(label=NAMES[str(question.reference.selector)], x=places, y=means, colour=len(curves)))
    figure = curve_chart(curves, x_label=AXES[axis], y_label=title_of(name))
    # Pages that show it may be dark.
    figure.set_facecolor("white")
    if axis == "quantile":
        figure.axes[0].set_xscale("log")
    save_figure(figure, path)


def place_of(setting: Setting, axis: str) -> int:
    """Where a setting stands on its axis."""
    return {"quantile": QUANTILES, "layers": LAYERS}[axis].index(getattr(setting, axis))


def main() -> None:
    """Run what is there, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--runs", type=Path, default=Path("outputs/study"))
    parser.add_argument("--out", type=Path, help="docs/study by default, unless it is a trial")
    parser.add_argument("--tracks", nargs="*", choices=TRACKS, default=TRACKS, help="which of the tracks")
    parser.add_argument("--share", type=float, default=1.0, help="share of the images, for a trial")
    arguments = parser.parse_args()
    tracks, sections, tables = make_tracks(arguments.data, arguments.tracks, arguments.share), [], []
    absent = set(arguments.tracks) - {track.name for track in tracks}
    if absent:
        print(
            f"Without {', '.join(sorted(absent))}: there are no data for them below {arguments.data}.", file=sys.stderr
        )
    if not tracks:
        parser.error("nothing is left to study")
    is_trial = arguments.share < 1 or len(tracks) < len(TRACKS)
    out = arguments.out or Path("outputs/study-trial" if is_trial else "docs/study")
    rows, sane = {}, {}
    with warnings.catch_warnings(), ProgressBars() as progress:
        # A photograph for each class is few: Student's test takes Welch's place.
        warnings.simplefilter("ignore", StatisticsWarning)
        for track in tracks:
            rows[track.name] = run(track, asked_of(track), arguments.runs / track.name, progress)
            if track.sanity:
                sane[track.name] = check_sanity(track, arguments.runs / f"{track.name}-weights", progress)
    for question in QUESTIONS:
        parts = [answer(question, track, rows[track.name]) for track in tracks if question in asked_of(track)]
        sections.append(f"## {question.title}\n\n{question.text}\n\n" + "\n".join(parts))
    parts = []
    for track in tracks:
        if track.sanity:
            found = summarise(sane[track.name], scores=SANITY_SCORES)
            parts.append(f"**{track.title}** ({found.images} images)\n\n{markdown_table(found)}\n")
            tables.append(csv_table(found))
        tables.append(csv_table(summarise(rows[track.name], scores=track.scores)))
        for axis in AXES:
            asked = [question for question in asked_of(track) if question.axis == axis]
            if asked:
                draw(axis, track, asked, rows[track.name], out / f"{track.name}-{axis}.png")
    sections.append(f"## Do the maps depend on the weights, and not on noise?\n\n{SANITY_TEXT}\n\n" + "\n".join(parts))
    lines = tables[0].splitlines()[:1] + [line for table in tables for line in table.splitlines()[1:]]
    for name, text in (("results.md", HEADER + "\n".join(sections)), ("results.csv", "\n".join(lines) + "\n")):
        with writing(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
