"""Heat maps over images."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from parchgrad._io.checks import check_kind
from parchgrad._io.files import writing
from parchgrad.errors import InputError, OutputError, SettingError
from parchgrad.visual.drawing import add_colour_bar, as_array, as_photograph, margins, own_scale, settle, show

__all__ = [
    "COLOUR_MAP",
    "SIGNED_COLOUR_MAP",
    "blend",
    "blend_signed",
    "draw_figure",
    "normalise",
    "overlay",
    "paint",
    "panel",
    "relative",
    "save_figure",
    "shared_top",
    "signed_panel",
    "strip",
    "tint",
    "tint_signed",
]

Picture: TypeAlias = NDArray[np.floating[Any]]
Column: TypeAlias = Sequence[ArrayLike]

COLOUR_MAP = "inferno"
"""Colour map for magnitudes: perceptually uniform, and readable with any colour vision."""
SIGNED_COLOUR_MAP = "RdBu_r"
"""Colour map for signed maps: red supports the class, blue opposes it; readable with any colour vision."""
_PERCENTILE = 99.5
_SHARED_SCALE = "|attribution|, in multiples of each map's mean"
_SIGNED_SCALE = "attribution, in multiples of each map's mean magnitude: for the class (red), against it (blue)"
_LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


def normalise(heat: ArrayLike, *, percentile: float = _PERCENTILE, top: float | None = None) -> Picture:
    """Scale a non-negative map so that a percentile, or a multiple of its mean, becomes 1; clip the rest.

    Clipping keeps single bright pixels from darkening the rest.

    Args:
        heat: map (H, W).
        percentile: percentile that becomes 1, in (0, 100]; ignored if `top` is given.
        top: value that becomes 1, in multiples of the map's mean, to compare maps; see `shared_top`.

    Returns:
        Map (H, W) in [0, 1]; zero everywhere if the map is.

    Raises:
        InputError: if the map is not two-dimensional, or contains negative or non-finite values.
        SettingError: if `percentile` or `top` is out of range.

    Example:
        >>> normalise([[0.0, 1.0], [2.0, 4.0]], percentile=100)
        array([[0.  , 0.25],
               [0.5 , 1.  ]])
    """
    _check_percentile(percentile)
    values = as_array(heat)
    if values.ndim != 2:
        raise InputError(f"`heat` has shape {values.shape}, but it must be one map (H, W).")
    if not np.isfinite(values).all() or (values < 0).any():
        raise InputError("`heat` contains negative, NaN or infinite values. Pass a heat map; see heatmap().")
    if top is not None:
        scaled: Picture = np.clip(relative(values) / _checked_top(top), 0, 1)
        return scaled
    # The percentile is 0 for a map that is zero nearly everywhere; fall back to its maximum.
    end = np.percentile(values, percentile) or values.max()
    if end > 0:
        values = np.clip(values / end, 0, 1)
    return values


def relative(values: ArrayLike) -> Picture:
    """Divide a map by its mean magnitude, so that maps of different methods and images are comparable.

    Args:
        values: map (H, W), signed or not.

    Returns:
        Map (H, W) with mean magnitude 1; zero everywhere if the map is.

    Raises:
        InputError: if the map is not two-dimensional, or contains non-finite values.

    Example:
        >>> relative([[0.0, 1.0], [-1.0, 2.0]])
        array([[ 0.,  1.],
               [-1.,  2.]])
    """
    found = as_array(values)
    if found.ndim != 2:
        raise InputError(f"The map has shape {found.shape}, but it must be (H, W).")
    if not np.isfinite(found).all():
        raise InputError("The map contains NaN or infinite values. Check the model and its inputs.")
    # Scale by the peak first: the mean of huge values overflows, and that of tiny ones underflows.
    peak = np.abs(found).max(initial=0)
    if peak == 0:
        return found
    found = found / peak
    multiples: Picture = found / np.abs(found).mean()
    return multiples


def shared_top(maps: Iterable[ArrayLike], *, percentile: float = _PERCENTILE) -> float:
    """Find the end of a shared scale: the 90th percentile of the maps' own ends.

    The median would clip the details of concentrated maps; the maximum would let one outlier darken all others.

    Args:
        maps: maps (H, W), signed or not; maps that are zero everywhere are ignored.
        percentile: percentile of a map's magnitude at which its own scale ends, in (0, 100].

    Returns:
        The end of the scale, in multiples of a map's mean magnitude; 1 if every map is zero.

    Raises:
        InputError: if a map is not two-dimensional, or contains non-finite values.
        SettingError: if `percentile` is out of range.

    Example:
        >>> shared_top([[[1.0, 1.0, 1.0, 1.0]], [[0.0, 0.0, 0.0, 4.0]], [[0.0, 1.0, 0.0, 1.0]]], percentile=100)
        3.6
    """
    _check_percentile(percentile)
    tops = [np.percentile(magnitude, percentile) or magnitude.max() for magnitude in map(np.abs, map(relative, maps))]
    counting = [top for top in tops if top > 0]
    return float(np.percentile(counting, 90)) if counting else 1.0


def blend(photograph: ArrayLike, heat: ArrayLike, *, top: float | None = None, opacity: float = 1.0) -> Picture:
    """Lay a heat map over the greyed image: dark where the map is low, coloured where it is high.

    Args:
        photograph: image (H, W, 3), or (H, W) if it is grey, in [0, 1].
        heat: non-negative map (H, W), of any scale.
        top: end of the scale, in multiples of the map's mean, to compare maps (see `shared_top`); None uses a
            percentile of this map.
        opacity: opacity of the map, in [0, 1]; 0 shows the image in its own colours.

    Returns:
        Picture (H, W, 3) in [0, 1].

    Raises:
        InputError: if the two differ in size, or the map contains negative or non-finite values.
        SettingError: if a setting is out of range.

    Example:
        >>> blend(np.ones((2, 2, 3)), np.eye(2)).shape
        (2, 2, 3)
    """
    return paint(photograph, normalise(heat, top=top), opacity=opacity)


def paint(photograph: ArrayLike, values: ArrayLike, *, opacity: float = 1.0) -> Picture:
    """Lay a map that is already scaled over the greyed image, as `blend` does.

    Args:
        photograph: image (H, W, 3), or (H, W) if it is grey, in [0, 1].
        values: map (H, W) in [0, 1]; see `normalise`.
        opacity: opacity of the map, in [0, 1].

    Returns:
        Picture (H, W, 3) in [0, 1].

    Raises:
        InputError: if the two differ in size, or a value is out of range or not finite.
        SettingError: if `opacity` is out of range.

    Example:
        >>> paint(np.ones((1, 2, 3)), [[0.0, 1.0]], opacity=0).tolist()
        [[[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]]
    """
    scaled = as_array(values)
    if not np.isfinite(scaled).all():
        raise InputError("`values` contains NaN or infinite values. Check the model and its inputs.")
    if not ((scaled >= 0) & (scaled <= 1)).all():
        raise InputError("`values` has entries outside [0, 1]. Scale the map first; see normalise().")
    return _mix(photograph, _tinted(COLOUR_MAP, scaled, scaled), opacity)


def blend_signed(
    photograph: ArrayLike, signed: ArrayLike, *, top: float | None = None, opacity: float = 1.0
) -> Picture:
    """Lay a signed map over the greyed image: red where it supports the class, blue where it opposes it.

    Args:
        photograph: image (H, W, 3), or (H, W) if it is grey, in [0, 1].
        signed: map (H, W), of any scale; see `signed_heatmap`.
        top: end of the scale on either side, in multiples of the map's mean magnitude; None uses a percentile.
        opacity: opacity of the map, in [0, 1]; 0 shows the image in its own colours.

    Returns:
        Picture (H, W, 3) in [0, 1].

    Raises:
        InputError: if the two differ in size, or the map contains non-finite values.
        SettingError: if a setting is out of range.

    Example:
        >>> blend_signed(np.ones((2, 2, 3)), [[1.0, -1.0], [0.0, 0.0]]).shape
        (2, 2, 3)
    """
    return _mix(photograph, tint_signed(signed, top=top), opacity)


def tint(heat: ArrayLike, *, top: float | None = None) -> Picture:
    """Colour a heat map as a transparent layer, which over the greyed image gives what `blend` draws.

    Args:
        heat: non-negative map (H, W), of any scale.
        top: end of the scale; see `blend`.

    Returns:
        Colours and opacity (H, W, 4) in [0, 1].

    Raises:
        InputError: if the map contains negative or non-finite values.
        SettingError: if `top` is out of range.

    Example:
        >>> tint([[0.0, 1.0]])[..., 3].tolist()
        [[0.35, 1.0]]
    """
    scaled = normalise(heat, top=top)
    return _tinted(COLOUR_MAP, scaled, scaled)


def tint_signed(signed: ArrayLike, *, top: float | None = None) -> Picture:
    """Colour a signed map as a transparent layer; see `tint` and `blend_signed`.

    Args:
        signed: map (H, W), of any scale.
        top: end of the scale on either side; see `blend_signed`.

    Returns:
        Colours and opacity (H, W, 4) in [0, 1].

    Raises:
        InputError: if the map contains non-finite values.
        SettingError: if `top` is out of range.

    Example:
        >>> tint_signed([[0.0, -1.0]])[..., 3].tolist()
        [[0.35, 1.0]]
    """
    values = np.clip(relative(signed) / (shared_top([signed]) if top is None else _checked_top(top)), -1, 1)
    return _tinted(SIGNED_COLOUR_MAP, 0.5 + values / 2, np.abs(values))


def overlay(photograph: ArrayLike, heat: ArrayLike, *, title: str = "") -> Figure:
    """Draw a heat map over its image, with a colour bar.

    Args:
        photograph: image (H, W, 3), or (H, W) if it is grey, in [0, 1].
        heat: non-negative map (H, W).
        title: title of the picture.

    Returns:
        A figure that pyplot does not manage.

    Raises:
        InputError: if the two do not match.

    Example:
        >>> overlay(np.ones((4, 4, 3)), np.eye(4), title="cat").axes[0].get_title()
        'cat'
    """
    picture = blend(photograph, heat)
    # Wide pictures, such as spectrograms, would be strips too low to read.
    width = min(max(4.6, 2.3 * picture.shape[1] / picture.shape[0]), 10.0)
    figure = Figure(figsize=(width, 4.6), layout=margins())
    axes = figure.subplots()
    show(axes, picture, title)
    add_colour_bar(figure, [axes], COLOUR_MAP, (0, 1), own_scale(_PERCENTILE))
    return settle(figure)


def panel(photographs: Column, maps: Mapping[str, Column], *, labels: Sequence[str] | None = None) -> Figure:
    """Draw one image per row, next to its maps; all maps share one scale, in multiples of a map's mean.

    Args:
        photographs: images (H, W, 3), or (H, W) if they are grey, in [0, 1].
        maps: maps (H, W) of all images, by column title.
        labels: title of each image; default "photograph".

    Returns:
        A figure that pyplot does not manage.

    Raises:
        InputError: if a column does not have one map per image, or a map does not match its image.

    Example:
        >>> figure = panel([np.ones((4, 4, 3))], {"gradient": [np.eye(4)], "ParchGrad": [np.eye(4)]})
        >>> [axes.get_title() for axes in figure.axes[:3]]
        ['photograph', 'gradient', 'ParchGrad']
    """
    top = shared_top(heat for column in maps.values() for heat in column)
    cells = _cells(photographs, maps, labels, lambda picture, heat: blend(picture, heat, top=top))
    figure, axes = _lay_out(cells, 1 + len(maps))
    add_colour_bar(figure, axes, COLOUR_MAP, (0, top), _SHARED_SCALE)
    return settle(figure)


def strip(
    photograph: ArrayLike, maps: Mapping[str, ArrayLike], *, label: str = "photograph", columns: int = 4
) -> Figure:
    """Draw an image and its maps in rows of `columns`; all maps share one scale.

    Args:
        photograph: image (H, W, 3), or (H, W) if it is grey, in [0, 1].
        maps: maps (H, W) by title.
        label: title of the image.
        columns: number of pictures per row, at least 1.

    Returns:
        A figure that pyplot does not manage.

    Raises:
        InputError: if a map does not match the image.
        SettingError: if `columns` is below 1.

    Example:
        >>> figure = strip(np.ones((4, 4, 3)), {"q = 0.5": np.eye(4), "q = 0.1": np.eye(4)}, label="cat", columns=2)
        >>> [axes.get_title() for axes in figure.axes[:3]]
        ['cat', 'q = 0.5', 'q = 0.1']
    """
    if columns < 1:
        raise SettingError(f"`columns` is {columns}, but it must be at least 1.")
    top = shared_top(maps.values())
    cells = [
        (label, as_photograph(photograph)),
        *((name, blend(photograph, heat, top=top)) for name, heat in maps.items()),
    ]
    figure, axes = _lay_out(cells, columns)
    add_colour_bar(figure, axes, COLOUR_MAP, (0, top), _SHARED_SCALE)
    return settle(figure)


def signed_panel(photographs: Column, maps: Mapping[str, Column], *, labels: Sequence[str] | None = None) -> Figure:
    """Draw one image per row, next to its signed maps; all share one diverging scale around zero.

    Args:
        photographs: images (H, W, 3), or (H, W) if they are grey, in [0, 1].
        maps: signed maps (H, W) of all images, by column title; see `signed_heatmap`.
        labels: title of each image; default "photograph".

    Returns:
        A figure that pyplot does not manage.

    Raises:
        InputError: if a column does not have one map per image, or a map does not match its image.

    Example:
        >>> figure = signed_panel([np.ones((4, 4, 3))], {"gradient": [np.eye(4) - 0.5]})
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['photograph', 'gradient']
    """
    top = shared_top(signed for column in maps.values() for signed in column)
    cells = _cells(photographs, maps, labels, lambda picture, signed: blend_signed(picture, signed, top=top))
    figure, axes = _lay_out(cells, 1 + len(maps))
    add_colour_bar(figure, axes, SIGNED_COLOUR_MAP, (-top, top), _SIGNED_SCALE)
    return settle(figure)


def draw_figure(figure: Figure, path: Path, *, dots_per_inch: int = 120) -> None:
    """Write a figure without any checks; the suffix sets the format.

    Raises:
        OSError: if the file cannot be written.
    """
    figure.savefig(path, dpi=dots_per_inch, bbox_inches="tight", pad_inches=0.12)


def save_figure(figure: Figure, path: str | Path, *, dots_per_inch: int = 120, force: bool = True) -> None:
    """Write a figure; the suffix sets the format.

    Args:
        figure: the figure.
        path: output file.
        dots_per_inch: resolution of pixel formats.
        force: whether to overwrite an existing file.

    Raises:
        InputError: if `figure` is not a figure.
        OutputError: if the suffix is not supported, the file exists and `force` is off, or it cannot be written.
    """
    check_kind("`figure`", figure, Figure, "Draw one first, such as overlay(photograph, heat)", error=InputError)
    path = Path(path)
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise OutputError(f"{str(path)!r} does not have an image suffix. Use one of .{', .'.join(sorted(formats))}.")
    with writing(path, force=force) as temporary:
        draw_figure(figure, temporary, dots_per_inch=dots_per_inch)


def _check_percentile(percentile: float) -> None:
    if not 0 < percentile <= 100:
        raise SettingError(f"`percentile` is {percentile}, but it must be in (0, 100].")


def _checked_top(top: float) -> float:
    if not 0 < top < math.inf:
        raise SettingError(f"`top` is {top}, but it must be positive. Pass shared_top(maps), for example.")
    return top


def _tinted(colours: str, places: Picture, strength: Picture) -> Picture:
    """Colours of a colour map, more transparent where the strength is low."""
    found: Picture = matplotlib.colormaps[colours](places)
    found[..., 3] = 0.35 + 0.65 * np.sqrt(strength)
    return found


def _mix(photograph: ArrayLike, tinted: Picture, opacity: float) -> Picture:
    """Lay a tinted map over the image, which turns grey as the map becomes opaque."""
    if not 0 <= opacity <= 1:
        raise SettingError(f"`opacity` is {opacity}, but it must be in [0, 1].")
    picture = as_photograph(photograph)
    if picture.shape != (*tinted.shape[:2], 3):
        raise InputError(
            f"`photograph` has shape {picture.shape}, but the map has shape {tinted.shape[:2]}. Resize one to match "
            "the other."
        )
    grey = (picture @ _LUMINANCE)[..., None]
    weight = opacity * tinted[..., 3:]
    mixed: Picture = (1 - weight) * (opacity * grey + (1 - opacity) * picture) + weight * tinted[..., :3]
    return mixed


def _cells(
    photographs: Column,
    maps: Mapping[str, Column],
    labels: Sequence[str] | None,
    draw: Callable[[ArrayLike, ArrayLike], Picture],
) -> list[tuple[str, Picture]]:
    """Title and picture of each cell, row by row: an image, then its maps drawn over it."""
    if not photographs:
        raise InputError("`photographs` is empty. Pass at least one.")
    if labels is not None and len(labels) != len(photographs):
        raise InputError(f"`labels` has {len(labels)} texts for {len(photographs)} images. Pass one for each.")
    for name, column in maps.items():
        if len(column) != len(photographs):
            raise InputError(
                f"Column {name!r} has {len(column)} maps for {len(photographs)} photographs. Pass one map for each."
            )
    return [
        cell
        for row, photograph in enumerate(photographs)
        for cell in (
            (labels[row] if labels else "photograph", as_photograph(photograph)),
            *((name, draw(photograph, column[row])) for name, column in maps.items()),
        )
    ]


def _lay_out(cells: Sequence[tuple[str, Picture]], columns: int) -> tuple[Figure, list[Any]]:
    columns = min(columns, len(cells))
    shapes = [picture.shape for _, picture in cells]
    # Rows are only as high as their pictures and titles: equal rows would leave gaps between wide pictures.
    heights = [
        0.15 + 3.1 * max(height / width for height, width, _ in shapes[start : start + columns])
        for start in range(0, len(cells), columns)
    ]
    figure = Figure(figsize=(3.1 * columns, sum(heights) + 0.6), layout=margins())
    grid = list(figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights).flat)
    for axes, (title, picture) in zip(grid, cells, strict=False):
        show(axes, picture, title)
    for empty in grid[len(cells) :]:
        empty.set_axis_off()
    return figure, grid
