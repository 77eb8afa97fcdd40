"""Heat maps over photographs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from parchgrad.errors import InputError, OutputError, SettingError
from parchgrad.files import writing

__all__ = ["COLOUR_MAP", "blend", "normalise", "overlay", "panel", "save_figure"]

Picture: TypeAlias = NDArray[np.floating[Any]]

COLOUR_MAP = "inferno"
"""Perceptually uniform, and readable with any colour vision."""
_PERCENTILE = 99.5
_BAR_LABEL = f"|attribution|, relative to each map's {_PERCENTILE:g}th percentile"


def normalise(heat: ArrayLike, *, percentile: float = _PERCENTILE) -> Picture:
    """Scale a non-negative map so that a percentile of it becomes 1, and clip what lies above.

    Clipping keeps single bright pixels from darkening the rest.

    Args:
        heat: map (H, W).
        percentile: in (0, 100].

    Returns:
        Map (H, W) in [0, 1]; zero everywhere if the percentile is zero and so is the map.

    Raises:
        InputError: if the map is not two-dimensional, or holds negative or non-finite values.
        SettingError: if `percentile` is out of range.

    Example:
        >>> normalise([[0.0, 1.0], [2.0, 4.0]], percentile=100)
        array([[0.  , 0.25],
               [0.5 , 1.  ]])
    """
    if not 0 < percentile <= 100:
        raise SettingError(f"percentile is {percentile}, but it must lie in (0, 100].")
    values = _array(heat)
    if values.ndim != 2:
        raise InputError(f"The map has shape {values.shape}, but one map (H, W) is needed.")
    if not np.isfinite(values).all() or (values < 0).any():
        raise InputError("The map holds negative, NaN or infinite values; a heat map is needed, see heatmap().")
    top = np.percentile(values, percentile)
    # A map that is zero at nearly every pixel still has something to show.
    top = top if top > 0 else values.max()
    if top > 0:
        values = np.clip(values / top, 0, 1)
    return values


def blend(photograph: ArrayLike, heat: ArrayLike) -> Picture:
    """Lay a heat map over the grey photograph: dark where it is silent, coloured where it speaks.

    Args:
        photograph: (H, W, 3) in [0, 1].
        heat: non-negative map (H, W), of any scale.

    Returns:
        Picture (H, W, 3) in [0, 1].

    Raises:
        InputError: if the two differ in size, or the map is no heat map.

    Example:
        >>> blend(np.ones((2, 2, 3)), np.eye(2)).shape
        (2, 2, 3)
    """
    picture, values = _array(photograph), normalise(heat)
    if picture.shape != (*values.shape, 3):
        raise InputError(f"A photograph of shape {picture.shape} and a map of shape {values.shape} do not match.")
    if picture.min() < 0 or picture.max() > 1:
        raise InputError(f"The photograph ranges from {picture.min():g} to {picture.max():g}; scale it to [0, 1].")
    grey = (picture @ np.array([0.2126, 0.7152, 0.0722]))[..., None]
    colours = matplotlib.colormaps[COLOUR_MAP](values)[..., :3]
    # The photograph shows through where there is little to say, and gives way where there is much.
    opacity = 0.35 + 0.65 * np.sqrt(values)[..., None]
    blended: Picture = (1 - opacity) * grey + opacity * colours
    return blended


def overlay(photograph: ArrayLike, heat: ArrayLike, *, title: str = "") -> Figure:
    """Draw one heat map over its photograph, with a colour bar.

    Args:
        photograph: (H, W, 3) in [0, 1].
        heat: non-negative map (H, W).
        title: text above the picture.

    Returns:
        A figure of its own, unknown to pyplot.

    Raises:
        InputError: if the two do not match.

    Example:
        >>> overlay(np.ones((4, 4, 3)), np.eye(4), title="cat").axes[0].get_title()
        'cat'
    """
    figure = Figure(figsize=(4.6, 4.6), layout=_layout())
    axes = figure.subplots()
    _show(axes, blend(photograph, heat), title)
    _colour_bar(figure, [axes])
    return figure


def panel(
    photographs: Sequence[ArrayLike],
    maps: Mapping[str, Sequence[ArrayLike]],
    *,
    labels: Sequence[str] | None = None,
) -> Figure:
    """Draw photographs row by row, each beside its maps; all maps share one colour bar.

    Args:
        photographs: pictures (H, W, 3) in [0, 1].
        maps: for each column's title the maps (H, W) of all photographs.
        labels: title of each photograph; default "photograph".

    Returns:
        A figure of its own, unknown to pyplot.

    Raises:
        InputError: if a column has not one map per photograph, or a map does not match its photograph.

    Example:
        >>> figure = panel([np.ones((4, 4, 3))], {"gradient": [np.eye(4)], "ParchGrad": [np.eye(4)]})
        >>> [axes.get_title() for axes in figure.axes[:3]]
        ['photograph', 'gradient', 'ParchGrad']
    """
    if not photographs or (labels is not None and len(labels) != len(photographs)):
        raise InputError(f"A panel of {len(photographs)} photographs needs at least one, and as many labels.")
    for name, column in maps.items():
        if len(column) != len(photographs):
            raise InputError(f"Column {name!r} has {len(column)} maps for {len(photographs)} photographs.")
    rows, columns = len(photographs), 1 + len(maps)
    shapes = [np.shape(photograph) for photograph in photographs]
    height = 3.1 * max(shape[0] / shape[1] for shape in shapes) + 0.15
    figure = Figure(figsize=(3.1 * columns, height * rows + 0.6), layout=_layout())
    grid = figure.subplots(rows, columns, squeeze=False)
    for row, photograph in enumerate(photographs):
        _show(grid[row, 0], _array(photograph), labels[row] if labels else "photograph")
        for axes, (name, column) in zip(grid[row, 1:], maps.items(), strict=True):
            _show(axes, blend(photograph, column[row]), name)
    _colour_bar(figure, list(grid.flat))
    return figure


def save_figure(figure: Figure, path: str | Path, *, dots_per_inch: int = 120) -> None:
    """Write a figure, over an earlier one of that name; the format follows the suffix.

    Raises:
        OutputError: if the suffix names no format, or the file cannot be written.
    """
    path = Path(path)
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise OutputError(f"{str(path)!r} names no picture format; end it in one of: .{', .'.join(sorted(formats))}.")
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=dots_per_inch, bbox_inches="tight", pad_inches=0.12)


def _array(values: ArrayLike) -> NDArray[np.float64]:
    """Numbers of any kind; tensors from any device, with or without a gradient."""
    return np.asarray(values.detach().double().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)


def _layout() -> ConstrainedLayoutEngine:
    # A margin in inches: titles would touch the edge.
    return ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.06)


def _show(axes: Any, picture: NDArray[Any], title: str) -> None:
    axes.imshow(np.clip(picture, 0, 1), interpolation="nearest")
    axes.set_title(title, fontsize=11)
    axes.set_axis_off()


def _colour_bar(figure: Figure, axes: list[Any]) -> None:
    scale = ScalarMappable(Normalize(0, 1), COLOUR_MAP)
    bar = figure.colorbar(scale, ax=axes, location="bottom", shrink=0.7, aspect=45, pad=0.02)
    bar.set_label(_BAR_LABEL, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
