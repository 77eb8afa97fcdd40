"""Draw the pictures of docs/method.md, from the package's own functions and scikit-image's photographs.

python tools/draw_figures.py
"""

from pathlib import Path

from PIL import Image
from skimage import data

import parchgrad as pg
from parchgrad.visual import save_figure
from parchgrad.visual.sweeps import quantile_sweep

IMAGES = Path(__file__).parents[1] / "docs" / "images"


def main() -> None:
    """Write every picture."""
    classifier = pg.load_model("efficientnet_lite0")
    sweep = quantile_sweep(classifier, Image.fromarray(data.cat()), pg.GradientEnergy(), layers=0.5)
    save_figure(sweep.figure(columns=4), IMAGES / "method-sweep.jpg", dots_per_inch=90)


if __name__ == "__main__":
    main()
