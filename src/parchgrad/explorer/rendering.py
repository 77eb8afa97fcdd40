"""HTML of the explorer's page: results, messages, and its style."""

import html
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

from parchgrad._io.images import data_url
from parchgrad._io.templates import render
from parchgrad.explain.methods import METHODS
from parchgrad.explorer.inputs import CELLS, GRAD_CAM, View
from parchgrad.explorer.views import Exploration, Game, tinted
from parchgrad.models.classifier import Prediction, is_improbable
from parchgrad.statistics.selectors import find_selector
from parchgrad.visual.maps import COLOUR_MAP, SIGNED_COLOUR_MAP
from parchgrad.workflows.demonstration import example_photographs
from parchgrad.workflows.photographs import UNSTABLE

__all__ = [
    "describe_layers",
    "describe_stability",
    "message",
    "mosaic_page",
    "plain_number",
    "script",
    "single_page",
    "status",
    "style",
]

# Mean cosine between maps from which noise hardly changes them.
_STEADY = 0.9
_PLACES = ("top left", "top right", "bottom left", "bottom right")


def single_page(found: Exploration) -> str:
    """HTML of the result for one image."""
    maps = found.maps()
    images = tinted(maps, signed=found.view.signed)
    notes = ("without ParchGrad", _settings(found.view), _comparison_note(found.view))
    return _render(
        "explorer_single.html",
        found.view,
        image=found.image.name,
        picture=data_url(found.picture, "PNG"),
        maps=[
            {"title": title, "note": note if heat.any() else "zero everywhere", "image": data_url(image, "PNG")}
            for title, note, heat, image in zip(found.view.titles, notes, maps, images, strict=False)
        ],
        target=found.target,
        against=found.against,
        caution=_caution([found.target], found.classes),
    )


def mosaic_page(found: Game) -> str:
    """HTML of the result for a mosaic."""
    images = [tinted(list(maps), signed=found.view.signed) for maps in found.maps()]
    titles, shares = found.view.titles, found.shares()
    return _render(
        "explorer_mosaic.html",
        found.view,
        picture=data_url(found.picture),
        chance=1 / CELLS,
        means=[_mean_share(title, each) for title, each in zip(titles, shares, strict=True)],
        repeated=len({item.index for item in found.targets}) < CELLS,
        rows=[
            {
                "category": found.targets[cell].category,
                "place": _PLACES[cell],
                "cell": cell,
                "maps": [
                    {"title": title, "share": each[cell], "image": data_url(of_title[cell], "PNG")}
                    for title, each, of_title in zip(titles, shares, images, strict=True)
                ],
            }
            for cell in range(CELLS)
        ],
        caution=_caution(found.targets, found.classes),
    )


def describe_stability(stability: float) -> str:
    """Describe a stability, with a warning if it is low; NaN if the map is zero everywhere."""
    if math.isnan(stability):
        return status("Stability is undefined: the map is zero everywhere.")
    said = f"<strong>stability {stability:.2f}</strong>. "
    if stability < UNSTABLE:
        told = "Warning: invisible noise changes much of this map, so it explains little."
        return f"<span class='pg-status pg-warning' role='alert'>{said}{told}</span>"
    told = "hardly changes this map." if stability >= _STEADY else "changes parts of this map."
    return f"<span class='pg-status'>{said}Invisible noise {told}</span>"


def describe_layers(layers: Sequence[str]) -> str:
    """Describe the edited layers, of which there is at least one.

    Example:
        >>> describe_layers(["stem", "head"])
        '2 layers edited, from stem to head.'
    """
    if len(layers) == 1:
        return f"1 layer edited, {layers[0]}."
    return f"{len(layers)} layers edited, from {layers[0]} to {layers[-1]}."


def message(text: str, *, refused: bool = False) -> str:
    """HTML of a text in place of a result; `refused` marks an error."""
    return f"<div class='pg-message{' pg-refused' if refused else ''}' role='alert'>{html.escape(text)}</div>"


def status(text: str) -> str:
    """HTML of the status line."""
    return f"<span class='pg-status'>{html.escape(text)}</span>"


def plain_number(value: float) -> str:
    """Format with three significant digits, without an exponent.

    Example:
        >>> plain_number(12345.6), plain_number(0.25)
        ('12300', '0.25')
    """
    return f"{float(f'{value:.3g}'):g}"


def style() -> str:
    """Style sheet of the page, with the examples as thumbnails."""
    thumbnails = []
    for image in example_photographs():
        small = image.convert("RGB")
        small.thumbnail((240, 160))
        thumbnails.append(data_url(small))
    return render("explorer.css", thumbnails=thumbnails)


def script() -> str:
    """Script that the browser runs when the page is loaded."""
    return render("explorer.js")


def _settings(view: View) -> str:
    selector = find_selector(view.selector)
    settings = [selector.title.lower()]
    settings += [f"quantile {view.quantile:g}"] if selector.has("quantile") else []
    settings += [] if math.isinf(view.gamma) else [f"gamma {plain_number(view.gamma)}"]
    return ", ".join(settings)


def _comparison_note(view: View) -> str:
    if view.comparison == GRAD_CAM:
        return "last convolution"
    return "without ParchGrad" if view.comparison in METHODS else "default settings"


def _mean_share(title: str, shares: Sequence[float]) -> dict[str, Any]:
    """The mean share of the maps that are not zero everywhere, and how many are."""
    defined = [share for share in shares if not math.isnan(share)]
    return {"title": title, "value": np.mean(defined) if defined else math.nan, "empty": len(shares) - len(defined)}


def _caution(targets: Sequence[Prediction], classes: int) -> str:
    """Sentence about explained classes that the network finds improbable; empty if there are none."""
    named = [f"{item.category} {item.probability:.1%}" for item in targets if is_improbable(item, classes)]
    if not named:
        return ""
    return f"The network gives {', '.join(named)}: the map shows what changes its score, not that it is in the image."


def _render(template: str, view: View, **values: Any) -> str:
    colour_map = matplotlib.colormaps[SIGNED_COLOUR_MAP if view.signed else COLOUR_MAP]
    colours = [matplotlib.colors.to_hex(colour) for colour in colour_map(np.linspace(0, 1, 12))]
    return render(template, colours=colours, signed=view.signed, **values)
