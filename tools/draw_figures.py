"""Draw the figures of README.md and docs/method.md from scikit-image's images and generated shapes.

python tools/draw_figures.py
"""

import shutil
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from skimage import data
from torch.utils.data import DataLoader

import parchgrad as pg
from parchgrad.data.samples import Pairs
from parchgrad.data.shapes import GeneratedShapes
from parchgrad.evaluation.methods import grad_cam, maps_of
from parchgrad.statistics.collect import collect_gaps
from parchgrad.visual import save_figure
from parchgrad.visual.channels import gap_histogram, kept_channels
from parchgrad.visual.maps import tint
from parchgrad.visual.sweeps import quantile_sweep
from parchgrad.visual.teaching import checkerboard_figure, sum_directions
from parchgrad.workflows.demonstration import demonstrate, example_photographs

IMAGES = Path(__file__).parents[1] / "docs" / "images"


def save_on_white(figure: Figure, name: str) -> None:
    """Save a figure on white, since pages may have a dark background."""
    figure.set_facecolor("white")
    save_figure(figure, IMAGES / name)


def draw_hero() -> None:
    """Draw two images explained by the default and by common methods, each map on its own scale."""
    classifier = pg.load_model("efficientnet_lite0")
    inputs = torch.stack([classifier.preprocess(picture) for picture in example_photographs()[1:3]])
    explainer = pg.Explainer(classifier.model)
    target = explainer.predict(inputs)
    methods = {
        "plain gradient": maps_of(pg.Explainer(classifier.model, None)),
        "SmoothGrad, 16 passes": maps_of(pg.Explainer(classifier.model, None, method="smoothgrad", samples=16)),
        "Grad-CAM": grad_cam(classifier.model),
        "ParchGrad, 1 pass": maps_of(explainer),
    }
    columns = {"": [classifier.preprocess.picture(image) for image in inputs]}
    columns |= {title: [tint(heat) for heat in method(inputs, target)] for title, method in methods.items()}
    figure = Figure(figsize=(12.5, 5.3), layout="constrained")
    axes = figure.subplots(len(inputs), len(columns))
    for place, (title, cells) in enumerate(columns.items()):
        axes[0, place].set_title(title, fontsize=13)
        for axis, cell in zip(axes[:, place], cells, strict=True):
            axis.imshow(cell)
            # Maps are partly transparent.
            axis.set_facecolor("black")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    for axis, index in zip(axes[:, 0], target.tolist(), strict=True):
        axis.set_ylabel(classifier.categories[index], fontsize=13)
    save_figure(figure, IMAGES / "hero.jpg", dpi=80)


def draw_demonstration() -> None:
    """Draw the overview that `parchgrad demo` writes."""
    with tempfile.TemporaryDirectory() as folder:
        demonstrate().save(folder)
        shutil.copy(Path(folder, "overview.jpg"), IMAGES / "demo.jpg")


def draw_noise() -> None:
    """Draw how many weak channels change the direction of the sum, and the pattern that strides leave."""
    save_on_white(sum_directions().figure(), "method-directions.png")
    save_on_white(checkerboard_figure(), "method-checkerboard.png")


def draw_sweep() -> None:
    """Draw a cat explained with fewer and fewer channels."""
    classifier = pg.load_model("efficientnet_lite0")
    sweep = quantile_sweep(classifier, Image.fromarray(data.cat()), pg.Edit(selector=pg.GradientEnergy()))
    save_figure(sweep.figure(columns=4), IMAGES / "method-sweep.jpg", dpi=90)


def draw_kept_channels() -> None:
    """Draw which channels are kept for each of two classes in one image."""
    classifier = pg.load_model("efficientnet_lite0")
    both = torch.cat(
        [classifier.preprocess(Image.fromarray(picture)) for picture in (data.cat(), data.coffee())], dim=2
    )
    categories = ("tiger cat", "espresso")
    targets = [classifier.find_category(category) for category in categories]
    edit = pg.Edit(selector=pg.GradientEnergy(), layers="all")
    kept = kept_channels(classifier.model, both.unsqueeze(0), targets, edit, categories=categories)
    save_on_white(kept.figure(), "method-kept.png")


def draw_responses() -> None:
    """Draw how a layer's best channel for a class responds to that class and to all others."""
    shapes, category = pg.load_model("shapes"), "star"
    label = shapes.find_category(category)
    # Choose the channel on other images than those shown.
    held = pg.collect_statistics(shapes.model, Pairs(GeneratedShapes(count=1200, seed=1)), layers=0.5)
    layer = list(held)[-1]
    channel = int(held[layer].class_log_p()[:, label].argmin())
    pairs = Pairs(GeneratedShapes(count=1200, seed=2))
    batches = DataLoader(pairs, batch_size=64)
    gaps = collect_gaps(shapes.model, (images for images, _ in batches), layer)[:, channel]
    in_class = torch.tensor([found for _, found in pairs]) == label
    figure = gap_histogram(gaps, in_class.numpy(), channel=f"{layer}, channel {channel}", category=category)
    save_on_white(figure, "method-responses.png")


if __name__ == "__main__":
    draw_hero()
    draw_demonstration()
    draw_noise()
    draw_sweep()
    draw_kept_channels()
    draw_responses()
