"""Choose which convolutions of a timm network to edit: by default, by ratio, or by name.

    python examples/timm_model.py                                          # offline, with random weights
    python examples/timm_model.py --model efficientnet_lite0 --pretrained  # offline with parchgrad[demo]
    python examples/timm_model.py --model resnet50d --pretrained           # downloads the weights once

Any name in `timm.list_models()` works if the network has convolutions. For each choice of layers, the script prints the
convolutions and the Pearson correlation between its map and the plain gradient's. With --pretrained it also draws the
maps to outputs/examples/timm_model.png; maps of random weights are not worth drawing.
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
from parchgrad.visual import save_figure, strip


def main(arguments: Sequence[str] | None = None) -> None:
    """Explain one image with each choice of layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="convnext_atto", help="timm model name")
    parser.add_argument("--pretrained", action="store_true", help="load pretrained weights, and draw the maps")
    parser.add_argument("--photograph", type=Path, help="your own image (default: scikit-image's coffee)")
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
    print(f"predicted: {best.category} ({best.probability:.1%}){'' if given.pretrained else ', with random weights'}")

    names = list(pg.find_convolutions(model))
    pattern = ".".join(names[len(names) * 3 // 4].split(".")[:2]) + "*"
    maps = {"plain gradient": pg.heatmap(pg.Explainer(model, None).attribute(x, best.index))[0]}
    for layers in (None, 0.25, pattern, "all"):
        title = f"layers={layers!r}"
        explainer = pg.Explainer(model, layers=layers)
        maps[title] = pg.heatmap(explainer.attribute(x, best.index))[0]
        alike = np.corrcoef(maps["plain gradient"].flatten(), maps[title].flatten())[0, 1]
        chosen = explainer.edited_layers
        print(f"{title:22}{len(chosen):3} of {len(names)} convolutions; like the plain map: {alike:.2f}")
        print(f"    {chosen[0]} to {chosen[-1]}")
    if given.pretrained:
        path = given.out / "timm_model.png"
        save_figure(strip(classifier.preprocess.picture(x[0]), maps, label=best.category, columns=3), path)
        print(f"wrote {path}")
    else:
        print("no figure for random weights; add --pretrained")


if __name__ == "__main__":
    main()
