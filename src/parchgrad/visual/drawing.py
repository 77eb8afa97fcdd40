"""Parts that the figures of maps share: pictures, axes, colour bars and layout."""

from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from parchgrad.errors import InputError
from parchgrad.visual.charts import as_written

__all__ = ["add_colour_bar", "as_array", "as_photograph", "margins", "own_scale", "settle", "show"]

# Rounding error of float16 colours.
_ROUNDING = 1e-3


def as_array(values: ArrayLike) -> NDArray[np.float64]:
    """Convert numbers to an array; tensors may be on any device, with or without a gradient."""
    return np.asarray(values.detach().cpu().double() if isinstance(values, Tensor) else values, dtype=np.float64)


def as_photograph(values: ArrayLike, name: str = "photograph") -> NDArray[np.float64]:
    """Check an image and clip it to [0, 1].

    Args:
        values: image (H, W, 3), or grey image (H, W) or (H, W, 1), in [0, 1].
        name: name of the argument in messages.

    Returns:
        Image (H, W, 3).

    Raises:
        InputError: if the shape is wrong, or a value is out of range or not finite.
    """
    picture = as_array(values)
    if picture.size == 0 or not (picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] in (1, 3))):
        raise InputError(
            f"`{name}` has shape {picture.shape}, but it must be (H, W, 3), or (H, W) if it is grey. Move its channels "
            "last, and choose three if it has more bands."
        )
    if not np.isfinite(picture).all():
        raise InputError(f"`{name}` contains NaN or infinite values. Pass finite pixels.")
    if picture.min() < -_ROUNDING or picture.max() > 1 + _ROUNDING:
        raise InputError(f"`{name}` ranges from {picture.min():g} to {picture.max():g}. Scale it to [0, 1].")
    grey = picture.reshape(*picture.shape[:2], -1)
    return np.broadcast_to(grey, (*grey.shape[:2], 3)).clip(0, 1)


def margins() -> ConstrainedLayoutEngine:
    """Make a layout with a margin in inches, without which titles would touch the edge."""
    return ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.06)


def settle(figure: Figure) -> Figure:
    """Lay a figure out twice: after the first pass, Matplotlib leaves titles past the edge."""
    for _ in range(2):
        figure.draw_without_rendering()
    return figure


def show(axes: Any, picture: NDArray[Any], title: str, *, size: float = 11) -> None:
    """Draw a picture (H, W, 3) without axes, under a title of `size` points."""
    axes.imshow(np.clip(picture, 0, 1), interpolation="nearest")
    axes.set_title(as_written(title), fontsize=size)
    axes.set_axis_off()


def own_scale(percentile: float) -> str:
    """Label the scale of a single map, which ends at a percentile.

    Example:
        >>> own_scale(99.5)
        "|attribution|, relative to the map's 99.5th percentile"
    """
    return f"|attribution|, relative to the map's {percentile:g}th percentile"


def add_colour_bar(
    figure: Figure, axes: list[Any], colours: str | Colormap, ends: tuple[float, float], label: str
) -> None:
    """Draw a colour bar from one end to the other below the axes."""
    bar = figure.colorbar(
        ScalarMappable(Normalize(*ends), colours), ax=axes, location="bottom", shrink=0.7, aspect=45, pad=0.02
    )
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
