"""The grid pointing game on a folder of images, one per ImageNet class, in the order of the classes.

    python benchmarks/grid_pointing.py FOLDER [--mosaics 24] [--seed 0]

Prints the top-1 accuracy of EfficientNet-Lite0, then for each method the share of its map in the right cell of 2 x 2
mosaics of confidently classified images. Chance is 0.25.
"""

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import parchgrad as pg
from parchgrad.data.images import read_image
from parchgrad.errors import StatisticsWarning
from parchgrad.evaluation.localisation import cell_shares, mosaic

CONFIDENCE = 0.9
METHODS = {
    "plain gradient": pg.Edit(selector=None),
    "plain, gates and strides": pg.Edit(selector=None, gates=pg.Edit().resolved().gates, antialias=True),
    "default": pg.Edit(),
    "Evidence, hard": pg.Edit(selector=pg.Evidence(quantile=0.2, softness=0), conserve="independent"),
    "GradientEnergy": pg.Edit(selector=pg.GradientEnergy()),
    "GradientTimesActivation": pg.Edit(selector=pg.GradientTimesActivation()),
    "RandomChannels": pg.Edit(selector=pg.RandomChannels(), layers=0.75),
    "ClassWise, bundled file": pg.Edit(
        selector=pg.ClassWise(pg.ChannelStatistics.bundled("efficientnet_lite0"), quantile=0.1)
    ),
}


def read_photographs(classifier: pg.Classifier, files: Sequence[Path]) -> Tensor:
    """Read and preprocess images into one batch (N, 3, H, W)."""
    return torch.stack([classifier.preprocess(read_image(file)) for file in files])


def probabilities(classifier: pg.Classifier, inputs: Tensor) -> Tensor:
    """Compute softmax probabilities (N, K), a few rows at a time."""
    with torch.no_grad():
        return torch.cat([classifier.model(part).softmax(1) for part in torch.split(inputs, 8)])


def draw_mosaics(own_probability: Tensor, mosaics: int, seed: int) -> Tensor:
    """Choose four different, confidently classified images per mosaic; return class indices (mosaics, 4)."""
    confident = (own_probability > CONFIDENCE).nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    if len(confident) < 4 * mosaics:
        raise SystemExit(
            f"{mosaics} mosaics need {4 * mosaics} confidently classified images, but there are {len(confident)}."
        )
    return confident[torch.randperm(len(confident), generator=generator)[: 4 * mosaics]].reshape(mosaics, 4)


def play(explainer: pg.Explainer, inputs: Tensor, drawn: Tensor) -> Tensor:
    """Compute the share of each class's map in its own cell, shape (4 * mosaics,)."""
    shares = []
    for classes in drawn:
        picture = mosaic(inputs[classes], rows=2, columns=2).expand(4, -1, -1, -1)
        heat = pg.heatmap(explainer.attribute(picture, classes))
        shares.append(cell_shares(heat, rows=2, columns=2).diagonal())
    return torch.cat(shares)


def main() -> None:
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of .jpg files, one per class")
    parser.add_argument("--mosaics", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    classifier = pg.load_model("efficientnet_lite0")
    files = sorted(arguments.folder.glob("*.jpg"))
    if len(files) != len(classifier.categories):
        parser.error(f"{arguments.folder} contains {len(files)} .jpg files, but one per class is needed")
    inputs = read_photographs(classifier, files)
    probability = probabilities(classifier, inputs)
    labels = torch.arange(len(inputs))
    print(f"top-1 accuracy on {len(inputs)} images: {(probability.argmax(1) == labels).double().mean():.3f}")
    drawn = draw_mosaics(probability[labels, labels], arguments.mosaics, arguments.seed)
    # The bundled statistics may include these images, so also collect statistics without the explained ones.
    unseen = sorted(set(range(len(inputs))) - set(drawn.flatten().tolist()))
    held = pg.collect_statistics(
        classifier.model, [inputs[index] for index in unseen], layers=0.5, labels="predicted", batch_size=8
    )
    honest = {}
    with warnings.catch_warnings():
        # With few images per class, Student's test replaces Welch's for most.
        warnings.simplefilter("ignore", StatisticsWarning)
        honest["ClassWise, unseen"] = pg.Edit(selector=pg.ClassWise(held, quantile=0.1))
        honest["InstanceWise, unseen"] = pg.Edit(selector=pg.InstanceWise(held, quantile=0.1))
    for name, edit in {**METHODS, **honest}.items():
        shares = play(pg.Explainer.from_edit(classifier.model, edit), inputs, drawn)
        print(f"{name:45s} {shares.mean():.3f} +- {shares.std() / len(shares) ** 0.5:.3f}")


if __name__ == "__main__":
    main()
