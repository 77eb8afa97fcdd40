"""The study of architectures: a transformer, a ConvNeXt and a MobileNet, with and without balance and partition.

    python -m benchmarks.architectures [--half odd] [--data ../shared/data] [--out docs/study]

The three networks for generated shapes come with the package. Each explains images of one shape, and of a shape beside
a rival of another class. Pretrained networks of timm are included if their weights are in the local cache and the data
folder has `imagenet-one-per-class`; nothing is downloaded. If it is stopped, the same command resumes it.

Settings are chosen on `--half even` and reported on `--half odd`, which are different images.
"""

import argparse
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.study import Photographs, part_of, sentence, shuffled, write_pages
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.data import Subset

import parchgrad as pg
from parchgrad.cli.shared import ProgressBars
from parchgrad.core.layers import resolve_layers
from parchgrad.data.samples import LabelledImages, Samples
from parchgrad.data.shapes import GeneratedShapes
from parchgrad.errors import ModelWarning, ParchGradError
from parchgrad.evaluation.methods import Method
from parchgrad.evaluation.report import csv_table, markdown_table, summarise
from parchgrad.evaluation.rows import Row, read_rows
from parchgrad.evaluation.runs import evaluate
from parchgrad.evaluation.scores import ScoreSettings
from parchgrad.evaluation.settings import Setting

NETWORKS = {"shapes_vit": "a transformer", "shapes_convnext": "a ConvNeXt", "shapes_mobilenet": "a MobileNet"}
PRETRAINED = ("vit_base_patch16_224", "deit_small_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny")
DEFAULT, ROLLOUT = Setting(selector="evidence"), "attention rollout"
SETTINGS = (
    *(DEFAULT, Setting(), Setting(method="random_map"), Setting(method="centre_blob"), Setting(method="grad_cam")),
    *(Setting(method=name) for name in ("input_x_gradient", "integrated_gradients", "smoothgrad")),
    Setting(balance=True),
    Setting(selector="evidence", balance=False),
    replace(DEFAULT, selector="random"),
    *(Setting(selector=name, layers="auto") for name in ("activation", "energy")),
    Setting(selector="evidence", antialias=False),
    Setting(selector="evidence", gates=0.0),
)
# Left out on the larger networks.
MANY_PASSES = ("integrated_gradients", "smoothgrad")
STEADY = ("stability_cosine@0.0001", "stability_cosine@0.001", "stability_cosine@0.01")
HEADER = """# Transformers, ConvNeXts and gated networks

Written by `python -m benchmarks.architectures`. Means over the images; in brackets is the 95 % interval of the
difference from the plain gradient, from a paired bootstrap over images. Bold is better than the plain gradient and
italic is worse, if the interval excludes zero. The settings were chosen on other images.

Mass inside by area is the share of the map inside the shape's exact mask, divided by the mask's share of the image; an
uninformative map has 1. Beside a rival, only the explained shape counts, and shapes are smaller. Times are relative to
the plain gradient on the machine at hand, which was busy; [speed](../how_to/speed_and_memory.md) is measured apart.

"""


@dataclass(frozen=True, eq=False, kw_only=True)
class Track:
    """A network and its images.

    Attributes:
        name: name of its run.
        title: title in the report.
        model: the network.
        data: images to explain.
        settings: settings to compare.
        scores: names of the scores to show; the sentence uses the first one.
        families: groups of scores to compute.
    """

    name: str
    title: str
    model: nn.Module
    data: Samples
    settings: tuple[Setting, ...]
    scores: tuple[str, ...]
    families: tuple[Any, ...]


def settings_for(model: nn.Module) -> tuple[Setting, ...]:
    """Return the settings to compare on a network, with the layers that the default does not choose for it."""
    others = 0.75 if resolve_layers(model, "auto") == resolve_layers(model, "all") else "all"
    return (*SETTINGS, replace(DEFAULT, layers=others))


def make_tracks(data: Path, share: float, half: int) -> list[Track]:
    """Make the tracks of all networks that can be had offline."""
    found = []
    for name, kind in NETWORKS.items():
        model = pg.load_model(name).model
        for rivals in (0, 1):
            images = GeneratedShapes(count=part_of(100, share), seed=300 + 2 * half + rivals, rivals=rivals)
            scores = ("weighted_mass_inside", "aopc", *STEADY) if rivals == 0 else ("weighted_mass_inside",)
            families = ("localisation", "perturbation", "stability") if rivals == 0 else ("localisation",)
            found.append(
                Track(
                    name=f"{name}-{rivals}",
                    title=f"`{name}`, {kind}, {('single shapes', 'beside a rival')[rivals]}",
                    model=model,
                    data=images,
                    settings=settings_for(model),
                    scores=scores,
                    families=families,
                )
            )
    return found + pretrained_tracks(data / "imagenet-one-per-class", share, half)


def pretrained_tracks(folder: Path, share: float, half: int) -> list[Track]:
    """Make the tracks of pretrained networks whose weights are in the local cache."""
    if not folder.is_dir():
        print(f"Skipping {', '.join(PRETRAINED)}: {folder} has no data for them.", file=sys.stderr)
        return []
    os.environ["HF_HUB_OFFLINE"] = "1"
    found = []
    for name in PRETRAINED:
        try:
            classifier = pg.load_model(name)
        except ParchGradError as error:
            print(f"Skipping {name}: {error}", file=sys.stderr)
            continue
        photographs = Photographs(folder, classifier, with_class=True)
        chosen = [place for place in shuffled(len(photographs)) if place % 2 == half][: part_of(24, share)]
        found.append(
            Track(
                name=name,
                title=f"`{name}`, photographs",
                model=classifier.model,
                data=LabelledImages(Subset(photographs, sorted(chosen)), categories=classifier.categories),
                settings=tuple(each for each in settings_for(classifier.model) if each.method not in MANY_PASSES),
                scores=("aopc", *STEADY),
                families=("perturbation", "stability"),
            )
        )
    return found


class _Attention(TorchFunctionMode):
    """Keep the attention weights of every layer, shape (B, heads, N, N)."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function is functional.scaled_dot_product_attention:
            query, key = args[:2]
            self.weights.append((query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1))
        return function(*args, **(kwargs or {}))


def attention_rollout(model: nn.Module) -> Method:
    """Make attention rollout of the class token, resized to the image; the same map for every class.

    Source: Abnar, Zuidema (2020), "Quantifying Attention Flow in Transformers".
    """

    def method(images: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad(), _Attention() as attention:
            model(images)
        flow = torch.eye(attention.weights[0].shape[-1])
        for weights in attention.weights:
            mixed = weights.mean(dim=1) + torch.eye(weights.shape[-1])
            flow = mixed / mixed.sum(dim=-1, keepdim=True) @ flow
        patches = flow[:, 0, 1:]
        side = round(patches.shape[1] ** 0.5)
        coarse = patches.reshape(-1, 1, side, side)
        return functional.interpolate(coarse, size=images.shape[2:], mode="bilinear").squeeze(1)

    return method


def methods_of(track: Track) -> dict[str, Callable[[nn.Module], Method]]:
    """Return the methods of a track that no setting names; rollout needs a class token that attends to all patches."""
    return {ROLLOUT: attention_rollout} if re.search("vit|deit", track.name) else {}


def run(track: Track, folder: Path, progress: ProgressBars) -> list[Row]:
    """Evaluate all settings on a track, and return their rows."""
    evaluate(
        track.model,
        track.data,
        track.settings,
        folder,
        name=track.name,
        methods=methods_of(track),
        scores=ScoreSettings(families=track.families),
        batch_size=25,
        on_progress=lambda done, total: progress.update(track.name, done, total),
    )
    return read_rows(folder)


def main() -> None:
    """Run all tracks, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--runs", type=Path, default=Path("outputs/architectures"))
    parser.add_argument(
        "--out", type=Path, help="output folder (default: docs/study, or outputs/study-trial for a trial)"
    )
    parser.add_argument("--half", choices=("even", "odd"), default="odd", help="images to use")
    parser.add_argument("--share", type=float, default=1.0, help="share of the images to use, for a trial")
    arguments = parser.parse_args()
    half = ("even", "odd").index(arguments.half)
    is_trial = arguments.share < 1 or arguments.half == "even"
    out = arguments.out or Path("outputs/study-trial" if is_trial else "docs/study")
    sections, tables = [], []
    with warnings.catch_warnings(), ProgressBars() as progress:
        # Without balance, attention is named.
        warnings.filterwarnings("ignore", "The gradient stays plain", ModelWarning)
        for track in make_tracks(arguments.data, arguments.share, half):
            rows = run(track, arguments.runs / arguments.half / track.name, progress)
            found = summarise(rows, scores=track.scores, baseline=Setting().title)
            sections.append(
                f"## {track.title}\n\n{found.images} images.\n\n{markdown_table(found)}\n\n"
                f"{sentence(found, Setting().title)}\n"
            )
            tables.append(csv_table(found))
    write_pages(out, "architectures", HEADER, sections, tables)


if __name__ == "__main__":
    main()
