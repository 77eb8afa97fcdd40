"""Choose which convolutions of a timm network are edited: by default, by ratio, or by name.

    python examples/timm_model.py                                     # offline, with random weights
    python examples/timm_model.py --model resnet50d --pretrained     # downloads the weights once

Any name of `timm.list_models()` with convolutions will do. Each choice of layers is listed with its convolutions and
with how much its map still resembles the plain gradient's (Pearson's correlation), and drawn into
outputs/examples/timm_model.png. With random weights the maps mean nothing: they show where the edit acts, not what a
network sees.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data

import parchgrad as pg
from parchgrad.data.images import read_image
from parchgrad.visual import panel, save_figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Explain one photograph with each choice of layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="convnext_atto", help="name of a timm network")
    parser.add_argument("--pretrained", action="store_true", help="load timm's weights, from the network at first")
    parser.add_argument("--photograph", type=Path, help="a photograph of your own")
    parser.add_argument("--out", type=Path, default=Path("outputs/examples"))
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    try:
        classifier = pg.load_model(given.model, pretrained=given.pretrained)
        photograph = read_image(given.photograph) if given.photograph else Image.fromarray(data.coffee())
    except pg.ParchGradError as error:
        sys.exit(str(error))
    model = classifier.model
    x = classifier.preprocess(photograph).unsqueeze(0)
    (best, *_), *_ = classifier.predict(x)
    print(f"{given.model}: {len(pg.find_convolutions(model))} convolutions, input {tuple(x.shape[1:])}")
    print(f"predicted: {best.category} ({best.probability:.1%}){'' if given.pretrained else ', by random weights'}")

    names = list(pg.find_convolutions(model))
    pattern = ".".join(names[len(names) * 3 // 4].split(".")[:2]) + "*"
    maps = {"plain gradient": pg.heatmap(pg.Explainer(model, None).attribute(x, best.index))[0]}
    for layers in ("default", 0.25, pattern, "all"):
        title = f"layers={layers!r}"
        explainer = pg.Explainer(model, pg.GradientEnergy(quantile=0.1), layers=layers)
        maps[title] = pg.heatmap(explainer.attribute(x, best.index))[0]
        alike = np.corrcoef(maps["plain gradient"].flatten(), maps[title].flatten())[0, 1]
        chosen = explainer.layers
        print(f"{title:22}{len(chosen):3} of {len(names)} convolutions, {chosen[0]} to {chosen[-1]};", end=" ")
        print(f"like the plain map: {alike:.2f}")
    path = given.out / "timm_model.png"
    picture = classifier.preprocess.picture(x[0])
    save_figure(panel([picture], {title: [heat] for title, heat in maps.items()}), path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
