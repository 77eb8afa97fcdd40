"""The study of other outputs: a segmenter, a detector, and the contrast of two classes.

    python -m benchmarks.outputs [--half odd] [--out docs/study]

All networks and images come with the package. Each image has a shape and a rival of another class. The maps explain the
shape, and the scores measure how much of them lies on it and on the rival.

Settings are chosen on `--half even` and reported on `--half odd`, which are different images.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from benchmarks.study import part_of, sentence, write_pages
from torch import Tensor, nn
from torch.nn import functional

import parchgrad as pg
from parchgrad.cli.shared import ProgressBars
from parchgrad.core.layers import find_convolutions
from parchgrad.data.samples import Sample
from parchgrad.data.shapes import GeneratedShapes
from parchgrad.errors import ModelWarning
from parchgrad.evaluation.localisation import mass_inside, weighted_mass_inside
from parchgrad.evaluation.report import Cell, Summary, csv_table, markdown_table, summarise
from parchgrad.evaluation.rows import Row
from parchgrad.evaluation.settings import Setting
from parchgrad.evaluation.summary import compare, valid_mean
from parchgrad.explain.outputs import Score
from parchgrad.explain.scores import BoxScore, ClassScore, Contrast, RegionScore

COUNT = 100
PLAIN, DEFAULT = Setting().title, Setting(selector="evidence").title
SMOOTHGRAD, GRAD_CAM = "SmoothGrad, 16 passes", "Grad-CAM"
CONTRAST = "contrast"
HEADER = f"""# Segmentation, detection and contrasts

Written by `python -m benchmarks.outputs`, over {COUNT} generated images of a shape and a rival of another class. Means
over the images; in brackets is the 95 % interval of the difference from the plain gradient, from a paired bootstrap
over images. Bold is better than the plain gradient and italic is worse, if the interval excludes zero. No setting was
chosen on these images; that the detector is explained by its probabilities and not its logits was chosen on others.

Mass inside by area is the share of the map inside the explained shape's exact mask, divided by the mask's share of the
image; an uninformative map has 1. Mass inside the rival is the share of the map inside the rival's mask. It should be
low, except for a contrast, which also depends on the evidence for the rival. Images with a zero map have no score.
Grad-CAM is computed at the last convolution of the backbone. Times are relative to the plain gradient on the machine at
hand, which was busy.

"""

MakeMap = Callable[[Tensor, Score], Tensor]
"""Makes a non-negative map (H, W) of an image (C, H, W) and a score."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Scene:
    """An image with a rival.

    Attributes:
        sample: the image, and the label and box of the explained shape.
        rival: class of the rival.
        masks: masks of the shape and the rival (2, H, W).
    """

    sample: Sample
    rival: int
    masks: Tensor

    @property
    def label(self) -> int:
        """Class of the explained shape."""
        return int(self.sample.label)

    @property
    def box(self) -> Tensor:
        """Corners of the explained shape."""
        if self.sample.boxes is None:
            raise ValueError("A generated shape has a box.")
        return self.sample.boxes[0]


@dataclass(frozen=True, eq=False, kw_only=True)
class Track:
    """A network and what is explained of it.

    Attributes:
        name: name of the network.
        title: title in the report.
        scores: makes the score to explain, by its name in the report; the first one has an empty name.
    """

    name: str
    title: str
    scores: Mapping[str, Callable[[Scene], Score]]


def class_score(scene: Scene) -> Score:
    """Score the class of the shape."""
    return ClassScore(target=scene.label)


def contrast(scene: Scene) -> Score:
    """Score the class of the shape against that of the rival."""
    return Contrast(target=scene.label, against=scene.rival)


def region_score(scene: Scene) -> Score:
    """Score the region in which the network predicts the class of the shape."""
    return RegionScore(target=scene.label)


def box_score(scene: Scene) -> Score:
    """Score the detections that overlap the shape's box, by probability."""
    return BoxScore(box=scene.box, label=scene.label, detections=lambda found: (found.boxes, found.logits.sigmoid()))


TRACKS = (
    Track(name="shapes_segmenter", title="segmentation, the region of the predicted class", scores={"": region_score}),
    Track(name="shapes_detector", title="detection, the boxes that overlap the shape's", scores={"": box_score}),
    *(
        Track(
            name=name, title="classification, the logit and the contrast", scores={"": class_score, CONTRAST: contrast}
        )
        for name in ("shapes", "shapes_convnext")
    ),
)


def make_scenes(share: float, half: int) -> list[Scene]:
    """Make the images."""
    shapes = GeneratedShapes(count=part_of(COUNT, share), seed=310 + half, rivals=1)
    return [
        Scene(sample=shapes[index], rival=shapes.classes(index)[1], masks=shapes.masks(index))
        for index in range(len(shapes))
    ]


def methods_for(model: nn.Module) -> dict[str, MakeMap]:
    """Make the methods to compare."""
    return {
        DEFAULT: maps_of(pg.Explainer(model)),
        PLAIN: maps_of(pg.Explainer(model, None)),
        SMOOTHGRAD: maps_of(pg.Explainer(model, None, method="smoothgrad", samples=16)),
        GRAD_CAM: grad_cam(model),
    }


def maps_of(explainer: pg.Explainer) -> MakeMap:
    """Make an explainer's heat maps."""

    def make(image: Tensor, score: Score) -> Tensor:
        return pg.heatmap(explainer.attribute(image.unsqueeze(0), score))[0]

    return make


def grad_cam(model: nn.Module) -> MakeMap:
    """Make Grad-CAM maps of any score at the last convolution of the backbone."""
    backbone = getattr(model, "features", model)
    *_, layer = find_convolutions(backbone).values()

    def make(image: Tensor, score: Score) -> Tensor:
        seen: list[Tensor] = []
        handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            output = model(image.unsqueeze(0))
        finally:
            handle.remove()
        (gradient,) = torch.autograd.grad(score(output).sum(), seen)
        coarse = (gradient.mean(dim=(2, 3), keepdim=True) * seen[0]).sum(dim=1, keepdim=True).relu()
        return functional.interpolate(coarse.detach(), size=image.shape[1:], mode="bilinear")[0, 0]

    return make


def run(track: Track, scenes: Sequence[Scene], on_progress: Callable[[int, int], None]) -> list[Row]:
    """Explain all images by all methods, and return a row for each map."""
    model = pg.load_model(track.name).model
    methods = methods_for(model)
    rows = []
    for index, scene in enumerate(scenes):
        first: dict[str, Tensor] = {}
        for name, make_score in track.scores.items():
            for title, make in methods.items():
                start = time.perf_counter()
                heat = make(scene.sample.image, make_score(scene))
                seconds = time.perf_counter() - start
                own, rival = scene.masks[:, None]
                cosine = functional.cosine_similarity(heat.flatten(), first.setdefault(title, heat).flatten(), dim=0)
                rows.append(
                    {
                        "model": track.name,
                        "setting": f"{title}, {name}" if name else title,
                        "index": index,
                        "seconds": seconds,
                        "weighted_mass_inside": weighted_mass_inside(heat[None], own).item(),
                        # Of the rival, until the report is written.
                        "mass_inside": mass_inside(heat[None], rival).item(),
                        # Of a zero map, the cosine is undefined.
                        "cosine": cosine.item() if bool(heat.any() and first[title].any()) else math.nan,
                    }
                )
        on_progress(index + 1, len(scenes))
    return rows


def summarise_rows(rows: Sequence[Row]) -> Summary:
    """Summarise the rows, with less mass inside the rival as the better."""
    found = summarise(rows, scores=("weighted_mass_inside", "mass_inside"), baseline=PLAIN)
    return replace(
        found,
        cells={
            key: turned(cell, len(found.settings)) if key[1] == "mass_inside" else cell
            for key, cell in found.cells.items()
        },
    )


def turned(cell: Cell, settings: int) -> Cell:
    """Turn the verdict and the rank of a score around."""
    verdict = {"better": "worse", "worse": "better"}.get(cell.verdict, "open")
    return replace(cell, verdict=verdict, rank=settings + 1 - cell.rank)


def gain_over(rows: Sequence[Row], others: Sequence[str]) -> str:
    """Compare the default with other methods."""
    columns = {title: column(rows, title, "weighted_mass_inside") for title in (DEFAULT, *others)}
    found = {title: compare(columns[DEFAULT], columns[title]) for title in others}
    said = [f"`{title}` {each.difference:+.3f} ({each.low:+.3f} to {each.high:+.3f})" for title, each in found.items()]
    return f"The default minus others, mass inside by area: {'; '.join(said)}."


def likeness_of_contrast(rows: Sequence[Row]) -> str:
    """Compare the maps of the contrast with those of the logit, for each method."""
    titles = [title for title in dict.fromkeys(row["setting"] for row in rows) if title.endswith(f", {CONTRAST}")]
    said = [f"`{title}` {valid_mean(column(rows, title, 'cosine')).value:.3f}" for title in titles]
    return f"Mean cosine to the map of the logit: {'; '.join(said)}."


def column(rows: Sequence[Row], setting: str, score: str) -> list[float]:
    """Return a score of all images."""
    return [row[score] for row in rows if row["setting"] == setting]


def main() -> None:
    """Run all tracks, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, help="output folder (default: docs/study, or outputs/study-trial for a trial)"
    )
    parser.add_argument("--half", choices=("even", "odd"), default="odd", help="images to use")
    parser.add_argument("--share", type=float, default=1.0, help="share of the images to use, for a trial")
    arguments = parser.parse_args()
    half = ("even", "odd").index(arguments.half)
    is_trial = arguments.share < 1 or arguments.half == "even"
    out = arguments.out or Path("outputs/study-trial" if is_trial else "docs/study")
    scenes = make_scenes(arguments.share, half)
    sections, tables = [], []
    with warnings.catch_warnings(), ProgressBars() as progress:
        # Where the network does not find the shape, the map is zero and has no score.
        warnings.filterwarnings("ignore", category=ModelWarning)
        for track in TRACKS:
            rows = run(track, scenes, lambda done, total, name=track.name: progress.update(name, done, total))
            found = summarise_rows(rows)
            table = markdown_table(found).replace("mass inside ↑", "mass inside the rival ↓")
            said = [sentence(found, PLAIN), gain_over(rows, (SMOOTHGRAD, GRAD_CAM))]
            said += [likeness_of_contrast(rows)] if CONTRAST in track.scores else []
            text = "\n\n".join((f"## `{track.name}`: {track.title}", table, *said))
            sections.append(f"{text}\n")
            tables.append(csv_table(found).replace(",mass_inside,higher,", ",mass_inside_rival,lower,"))
    write_pages(out, "outputs", HEADER, sections, tables)


if __name__ == "__main__":
    main()
