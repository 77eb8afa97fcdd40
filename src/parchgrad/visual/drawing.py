"""Parts that the figures of maps share: pictures, axes, colour bars and layout."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from parchgrad.data.images import to_rgb
from parchgrad.errors import InputError
from parchgrad.visual.charts import as_written

__all__ = [
    "OUTLINE",
    "Pixels",
    "add_colour_bar",
    "as_array",
    "as_picture",
    "draw_box",
    "margins",
    "own_scale",
    "settle",
    "show",
]

Pixels: TypeAlias = ArrayLike | Image.Image
"""An image of any kind that `as_picture` takes."""
OUTLINE = withStroke(linewidth=2.0, foreground="#000000")
"""A dark outline, with which light lines are visible over bright places too."""
# Rounding error of float16 colours.
_ROUNDING = 1e-3


def as_array(values: ArrayLike) -> NDArray[np.float64]:
    """Convert numbers to an array; tensors may be on any device, with or without a gradient."""
    return np.asarray(values.detach().cpu().double() if isinstance(values, Tensor) else values, dtype=np.float64)


def as_picture(image: Pixels, name: str = "image") -> NDArray[np.float64]:
    """Convert an image to an array, and clip it to [0, 1].

    Args:
        image: PIL image, image (H, W, 3) or (3, H, W), or grey image (H, W), (H, W, 1) or (1, H, W); in [0, 1], or
            uint8.
        name: name of the argument in messages.

    Returns:
        Image (H, W, 3).

    Raises:
        InputError: if the shape is wrong, or a value is out of range or not finite.

    Example:
        >>> as_picture(np.full((3, 4, 5), 51, dtype=np.uint8)).shape
        (4, 5, 3)
    """
    if isinstance(image, Image.Image):
        image = np.asarray(to_rgb(image))
    picture = as_array(image)
    if str(getattr(image, "dtype", "")) in ("uint8", "torch.uint8"):
        picture = picture / 255
    if picture.ndim == 3 and picture.shape[0] in (1, 3) and picture.shape[2] not in (1, 3):
        picture = np.moveaxis(picture, 0, 2)
    if picture.size == 0 or not (picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] in (1, 3))):
        raise InputError(
            f"`{name}` has shape {picture.shape}, but it must be (H, W, 3) or (3, H, W), or (H, W) if it is grey. Pass "
            "one image, and choose three channels if it has more bands."
        )
    if not np.isfinite(picture).all():
        raise InputError(f"`{name}` contains NaN or infinite values. Pass finite pixels.")
    if picture.min() < -_ROUNDING or picture.max() > 1 + _ROUNDING:
        raise InputError(
            f"`{name}` ranges from {picture.min():g} to {picture.max():g}. Scale it to [0, 1], or pass uint8."
        )
    grey = picture.reshape(*picture.shape[:2], -1)
    return np.broadcast_to(grey, (*grey.shape[:2], 3)).clip(0, 1)


def draw_box(axes: Axes, box: Sequence[float]) -> None:
    """Draw a box over the picture of an axes.

    Args:
        axes: axes of a figure, such as `strip(...).axes[1]`.
        box: corners x1, y1, x2, y2 in pixels, from the upper left corner of the picture.

    Example:
        >>> axes = Figure().subplots()
        >>> draw_box(axes, (10, 20, 50, 40))
        >>> axes.patches[0].get_xy(), axes.patches[0].get_width()
        ((9.5, 19.5), 40.0)
    """
    left, top, right, bottom = map(float, box)
    # The centre of the first pixel is at 0, its corner at -0.5.
    frame = Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, edgecolor="white")
    frame.set_path_effects([OUTLINE])
    axes.add_patch(frame)


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
