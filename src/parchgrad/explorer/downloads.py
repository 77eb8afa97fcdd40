"""Files that the explorer's page offers: the figure, the animation and the raw attribution."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from parchgrad._io.files import save_array, writing
from parchgrad.errors import SettingError
from parchgrad.explorer.rendering import plain_number
from parchgrad.explorer.views import Exploration, Explorer, Game
from parchgrad.statistics.selectors import find_selector
from parchgrad.visual import save_figure
from parchgrad.visual.animation import save_animation

__all__ = ["DOWNLOADS", "file_name"]

# Enough for full-size panels.
_LARGEST_GIF = 4_000_000


def _save_png(explorer: Explorer, found: Exploration | Game, path: Path) -> None:
    save_figure(found.figure(), path)


def _save_npy(explorer: Explorer, found: Exploration | Game, path: Path) -> None:
    with writing(path) as temporary:
        save_array(found.attribution.numpy(), temporary)


def _save_gif(explorer: Explorer, found: Exploration | Game, path: Path) -> None:
    if isinstance(found, Game):
        raise SettingError("A GIF needs a single image. Switch to the tab 'One image'.")
    save_animation({found.view.titles[1]: explorer.sweep(found.image, found.view)}, path, most_bytes=_LARGEST_GIF)


DOWNLOADS: Mapping[str, tuple[str, Callable[[Explorer, Exploration | Game, Path], None]]] = {
    "png": ("Figure (PNG)", _save_png),
    "gif": ("All quantiles (GIF)", _save_gif),
    "npy": ("Raw attribution (npy)", _save_npy),
}
"""Text of the button, and the function that writes the file, by suffix."""


def file_name(found: Exploration | Game, kind: str) -> str:
    """Name of a download after what it shows and its settings; `kind` is its suffix."""
    view = found.view
    shown = (
        [
            found.image.name.rsplit(".", 1)[0],
            found.target.category,
            "" if found.against is None else f"rather than {found.against}",
        ]
        if isinstance(found, Exploration)
        else ["mosaic", *(item.category for item in found.targets)]
    )
    settings = [view.network, view.method, view.selector, f"layers {view.layers}"]
    settings += [f"q{view.quantile:g}"] if find_selector(view.selector).has("quantile") else []
    settings += [f"s{view.softness:g}", f"gates{view.gates:g}", *(["strides"] if view.antialias else [])]
    settings += ["balance"] if view.balance else []
    settings += [] if math.isinf(view.gamma) else [f"gamma{plain_number(view.gamma)}"]
    settings += [f"with {view.comparison}"] if kind == "png" and view.comparison else []
    settings += ["signed"] if view.signed else []

    def joined(parts: Sequence[str]) -> str:
        return "_".join(re.sub(r"[^\w.]+", "-", part).strip("-.")[:40] for part in parts if part)

    # Shorten the class names only: the settings tell files apart.
    return f"{joined(shown)[:100]}_{joined(settings)}.{kind}"
