"""The offline demonstration: four images, their mosaic, and a page that shows both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from parchgrad._io.extras import needs_extra
from parchgrad._io.files import check_outputs, writing_together
from parchgrad._io.images import data_url
from parchgrad._io.templates import render
from parchgrad._version import __version__
from parchgrad.core.edit import Edit
from parchgrad.core.selectors import GradientEnergy
from parchgrad.evaluation.localisation import cell_shares, mosaic
from parchgrad.explain.explainer import Explainer
from parchgrad.explain.heatmap import heatmap
from parchgrad.models.classifier import Classifier
from parchgrad.models.loading import OFFLINE_MODEL, load_model
from parchgrad.statistics import ChannelStatistics
from parchgrad.statistics.selectors import ClassWise
from parchgrad.visual import blend, panel
from parchgrad.visual.maps import COLOUR_MAP, draw_figure
from parchgrad.workflows.photographs import Explanation, explain_images

__all__ = ["PHOTOGRAPHS", "Demonstration", "demonstrate", "example_photographs"]

CHANCE = 0.25
PLAIN = "gradient"
PHOTOGRAPHS = {"cat": None, "coffee": "espresso", "camera": "tripod", "motorcycle": "moped"}
"""ImageNet class of each photograph in scikit-image, by its name there; None uses the predicted class."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Demonstration:
    """Results of the demonstration.

    Attributes:
        explanations: explanations by selector, one per photograph.
        mosaic: the four photographs as one image, (2 H, 2 W, 3) in [0, 1].
        mosaic_maps: heat maps of the mosaic by method, each (4, 2 H, 2 W), one per class.
        shares: share of each map in the cell of its class, by method, each (4,).
    """

    explanations: dict[str, tuple[Explanation, ...]]
    mosaic: NDArray[Any]
    mosaic_maps: dict[str, NDArray[Any]]
    shares: dict[str, NDArray[Any]]

    @staticmethod
    def files(directory: str | Path) -> tuple[Path, Path]:
        """Paths of the two files that `save` writes: the page and the overview."""
        return Path(directory) / "index.html", Path(directory) / "overview.jpg"

    def save(self, directory: str | Path, *, force: bool = False) -> Path:
        """Write the page and the overview figure; return the path of the page.

        Raises:
            OutputError: if a file exists and `force` is off, or cannot be written.
        """
        paths = self.files(directory)
        check_outputs(paths, force=force)
        with writing_together(paths, force=force) as (page, overview):
            draw_figure(self._overview(), overview, dpi=90)
            page.write_text(self._page(), encoding="utf-8")
        return paths[0]

    @property
    def categories(self) -> tuple[str, ...]:
        """The explained class of each photograph."""
        return tuple(explanation.target.category for explanation in next(iter(self.explanations.values())))

    def _maps(self) -> dict[str, list[NDArray[Any]]]:
        """Heat map of each photograph by method, the plain gradient first."""
        plain = [_heat(explanation.plain) for explanation in next(iter(self.explanations.values()))]
        return {PLAIN: plain} | {
            name: [_heat(explanation.attribution) for explanation in found] for name, found in self.explanations.items()
        }

    def _overview(self) -> Any:
        pictures = [explanation.picture for explanation in next(iter(self.explanations.values()))]
        return panel(pictures, self._maps(), labels=list(self.categories))

    def _page(self) -> str:
        maps_of_photographs = self._maps()
        return render(
            "demo.html",
            version=__version__,
            model=OFFLINE_MODEL,
            chance=CHANCE,
            colours=[matplotlib.colors.to_hex(c) for c in matplotlib.colormaps[COLOUR_MAP](np.linspace(0, 1, 12))],
            photographs=[
                {
                    "category": explanation.target.category,
                    "predictions": explanation.predictions[:3],
                    "picture": data_url(explanation.picture),
                    "maps": {
                        method: data_url(blend(explanation.picture, heats[index]))
                        for method, heats in maps_of_photographs.items()
                    },
                }
                for index, explanation in enumerate(next(iter(self.explanations.values())))
            ],
            mosaic=data_url(self.mosaic),
            rows=[
                {
                    "category": category,
                    "cell": ("top left", "top right", "bottom left", "bottom right")[index],
                    "maps": {
                        method: {
                            "picture": data_url(blend(self.mosaic, maps[index])),
                            "share": self.shares[method][index],
                        }
                        for method, maps in self.mosaic_maps.items()
                    },
                }
                for index, category in enumerate(self.categories)
            ],
            means={method: shares.mean() for method, shares in self.shares.items()},
        )


def demonstrate() -> Demonstration:
    """Explain scikit-image's photographs and play the grid pointing game on their mosaic.

    Raises:
        WeightsError: if the network's weights are not installed.
    """
    classifier = load_model(OFFLINE_MODEL)
    statistics = ChannelStatistics.bundled(OFFLINE_MODEL)
    shown = {
        "ParchGrad": Edit(),
        "gradient energy": Edit(selector=GradientEnergy()),
        "class-wise": Edit(selector=ClassWise(statistics, quantile=0.1)),
    }
    photographs = example_photographs()
    targets = [None if name is None else classifier.find_category(name) for name in PHOTOGRAPHS.values()]
    explanations = {
        name: tuple(
            explain_images(classifier, [image], edit, target=target)[0]
            for image, target in zip(photographs, targets, strict=True)
        )
        for name, edit in shown.items()
    }
    classes = [explanation.target.index for explanation in next(iter(explanations.values()))]
    return Demonstration(explanations=explanations, **_play(classifier, photographs, classes, shown))


def example_photographs() -> list[Image.Image]:
    """Read the photographs of `PHOTOGRAPHS`, in order, from scikit-image's files.

    Example:
        >>> [photograph.size for photograph in example_photographs()]
        [(451, 300), (600, 400), (512, 512), (741, 500)]
    """
    with needs_extra("demo"):
        from skimage import data

    # The motorcycle is a stereo pair with its disparity; use the left image.
    arrays = {
        "cat": data.cat(),
        "coffee": data.coffee(),
        "camera": data.camera(),
        "motorcycle": data.stereo_motorcycle()[0],
    }
    return [Image.fromarray(arrays[name]) for name in PHOTOGRAPHS]


def _play(
    classifier: Classifier,
    photographs: Sequence[Image.Image],
    classes: Sequence[int],
    shown: Mapping[str, Edit],
) -> dict[str, Any]:
    """Explain each class on one mosaic; the map should light up in the class's own cell."""
    inputs = mosaic(torch.stack([classifier.preprocess(image) for image in photographs]), rows=2, columns=2)
    maps, shares = {}, {}
    explainers = {name: Explainer.from_edit(classifier.model, edit) for name, edit in shown.items()}
    for method, explainer in {PLAIN: Explainer(classifier.model, None), **explainers}.items():
        heat = heatmap(explainer.attribute(inputs.expand(len(classes), -1, -1, -1), torch.tensor(classes)))
        maps[method] = heat.numpy()
        shares[method] = cell_shares(heat, rows=2, columns=2).diagonal().numpy()
    return {"mosaic": classifier.preprocess.picture(inputs[0]), "mosaic_maps": maps, "shares": shares}


def _heat(attribution: torch.Tensor) -> NDArray[Any]:
    heat: NDArray[Any] = heatmap(attribution.unsqueeze(0))[0].cpu().numpy()
    return heat
