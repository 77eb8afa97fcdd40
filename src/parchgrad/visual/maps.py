"""Heat maps over images."""

import difflib
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter

from parchgrad._io.checks import check_kind, check_whole_number, is_number
from parchgrad._io.files import writing
from parchgrad.errors import InputError, OutputError, SettingError
from parchgrad.visual.charts import as_written
from parchgrad.visual.drawing import (
    Pixels,
    add_colour_bar,
    as_array,
    as_picture,
    margins,
    own_scale,
    settle,
    show,
)

__all__ = [
    "COLOUR_MAP",
    "DPI",
    "SIGNED_COLOUR_MAP",
    "blend",
    "blend_signed",
    "check_colormap",
    "draw_figure",
    "normalise",
    "overlay",
    "paint",
    "panel",
    "relative",
    "save_figure",
    "shared_top",
    "signed_panel",
    "smooth",
    "strip",
    "tint",
    "tint_signed",
]

Picture: TypeAlias = NDArray[np.floating[Any]]
Column: TypeAlias = Sequence[ArrayLike]
Pictures: TypeAlias = Sequence[Pixels]

COLOUR_MAP = "inferno"
"""Colour map for magnitudes: perceptually uniform, and readable with any colour vision."""
SIGNED_COLOUR_MAP = "RdBu_r"
"""Colour map for signed maps: red supports the class, blue opposes it; readable with any colour vision."""
DPI = 200
"""Default resolution of pixel formats, in dots per inch."""
_PERCENTILE = 99.5
# Width of a picture in a figure of several, in inches.
_CELL = 3.1
_LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


def normalise(heat: ArrayLike, *, percentile: float = _PERCENTILE, top: float | None = None) -> Picture:
    """Scale a non-negative map so that a percentile, or a multiple of its mean, becomes 1; clip the rest.

    Clipping keeps single bright pixels from darkening the rest.

    Args:
        heat: map (H, W), or (1, H, W).
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
    values = _as_map(heat)
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
        values: map (H, W) or (1, H, W), signed or not.

    Returns:
        Map (H, W) with mean magnitude 1; zero everywhere if the map is.

    Raises:
        InputError: if the map is not two-dimensional, or contains non-finite values.

    Example:
        >>> relative([[0.0, 1.0], [-1.0, 2.0]])
        array([[ 0.,  1.],
               [-1.,  2.]])
    """
    found = _finite_map(values)
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


def smooth(values: ArrayLike, sigma: float) -> Picture:
    """Smooth a map with a Gaussian, reflected at the edges, which preserves its sum.

    Args:
        values: map (H, W) or (1, H, W), signed or not.
        sigma: standard deviation of the Gaussian in pixels, at least 0; 0 returns the map as it is.

    Returns:
        Map (H, W).

    Raises:
        InputError: if the map is not two-dimensional, or contains non-finite values.
        SettingError: if `sigma` is out of range.

    Example:
        >>> smooth([[0.0, 0.0, 1.0, 0.0, 0.0]], 0.5).round(2).tolist()
        [[0.0, 0.11, 0.79, 0.11, 0.0]]
    """
    found = _finite_map(values)
    if not (is_number(sigma) and 0 <= sigma < math.inf):
        raise SettingError(f"`sigma` is {sigma!r}, but it must be at least 0 and finite.")
    blurred: Picture = gaussian_filter(found, sigma)
    return blurred


def check_colormap(name: str) -> str:
    """Check that Matplotlib has a colour map of this name, and return it.

    Raises:
        SettingError: if there is none.

    Example:
        >>> check_colormap("magmas")
        Traceback (most recent call last):
        parchgrad.errors.SettingError: `colormap` is 'magmas', which Matplotlib lacks. Close matches: magma, magma_r.
    """
    if name not in matplotlib.colormaps:
        near = difflib.get_close_matches(str(name).lower(), list(matplotlib.colormaps), n=5)
        hint = f"Close matches: {', '.join(near)}" if near else "Pass 'viridis' or 'magma', for example"
        raise SettingError(f"`colormap` is {name!r}, which Matplotlib lacks. {hint}.")
    return name


def blend(
    image: Pixels,
    heat: ArrayLike,
    *,
    top: float | None = None,
    opacity: float = 1.0,
    colormap: str = COLOUR_MAP,
) -> Picture:
    """Lay a heat map over the greyed image: dark where the map is low, coloured where it is high.

    Args:
        image: PIL image, image (H, W, 3) or (3, H, W), or (H, W) if it is grey; in [0, 1], or uint8.
        heat: non-negative map (H, W), of any scale.
        top: end of the scale, in multiples of the map's mean, to compare maps (see `shared_top`); None uses a
            percentile of this map.
        opacity: opacity of the map, in [0, 1]; 0 shows the image in its own colours.
        colormap: name of a colour map of Matplotlib.

    Returns:
        Picture (H, W, 3) in [0, 1].

    Raises:
        InputError: if the two differ in size, or the map contains negative or non-finite values.
        SettingError: if a setting is out of range.

    Example:
        >>> blend(np.ones((2, 2, 3)), np.eye(2)).shape
        (2, 2, 3)
    """
    return paint(image, normalise(heat, top=top), opacity=opacity, colormap=colormap)


def paint(image: Pixels, values: ArrayLike, *, opacity: float = 1.0, colormap: str = COLOUR_MAP) -> Picture:
    """Lay a map that is already scaled over the greyed image, as `blend` does.

    Args:
        image: see `blend`.
        values: map (H, W) in [0, 1]; see `normalise`.
        opacity: opacity of the map, in [0, 1].
        colormap: see `blend`.

    Returns:
        Picture (H, W, 3) in [0, 1].

    Raises:
        InputError: if the two differ in size, or a value is out of range or not finite.
        SettingError: if `opacity` is out of range, or `colormap` unknown.

    Example:
        >>> paint(np.ones((1, 2, 3)), [[0.0, 1.0]], opacity=0).tolist()
        [[[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]]
    """
    scaled = as_array(values)
    if not np.isfinite(scaled).all():
        raise InputError("`values` contains NaN or infinite values. Check the model and its inputs.")
    if not ((scaled >= 0) & (scaled <= 1)).all():
        raise InputError("`values` has entries outside [0, 1]. Scale the map first; see normalise().")
    return _mix(image, _tinted(check_colormap(colormap), scaled, scaled), opacity)


def blend_signed(image: Pixels, signed: ArrayLike, *, top: float | None = None, opacity: float = 1.0) -> Picture:
    """Lay a signed map over the greyed image: red where it supports the class, blue where it opposes it.

    Args:
        image: see `blend`.
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
    return _mix(image, tint_signed(signed, top=top), opacity)


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


def overlay(image: Pixels, heat: ArrayLike, *, title: str = "", colormap: str = COLOUR_MAP) -> Figure:
    """Draw a heat map over its image, with a colour bar.

    Args:
        image: see `blend`.
        heat: non-negative map (H, W); see `smooth` for a smoother one.
        title: title of the picture.
        colormap: see `blend`.

    Returns:
        A figure that pyplot does not manage.

    Raises:
        InputError: if the two do not match.
        SettingError: if `colormap` is unknown.

    Example:
        >>> overlay(np.ones((4, 4, 3)), np.eye(4), title="cat").axes[0].get_title()
        'cat'
    """
    picture = blend(image, heat, colormap=colormap)
    # Wide pictures, such as spectrograms, would be strips too low to read.
    width = min(max(4.6, 2.3 * picture.shape[1] / picture.shape[0]), 10.0)
    figure = Figure(figsize=(width, 4.6), layout=margins())
    axes = figure.subplots()
    show(axes, picture, title)
    add_colour_bar(figure, [axes], colormap, (0, 1), own_scale(_PERCENTILE))
    return settle(figure)


def panel(
    images: Pictures,
    maps: Mapping[str, Column],
    *,
    labels: Sequence[str] | None = None,
    shared_scale: bool = False,
    smooth: float = 0.0,
    colormap: str = COLOUR_MAP,
    caption: str = "",
) -> Figure:
    """Draw one image per row, next to its maps.

    Args:
        images: see `blend`.
        maps: maps (H, W) of all images, by column title.
        labels: title of each image; default "image".
        shared_scale: whether all maps share one scale, in multiples of a map's mean, which shows whose attribution is
            concentrated; otherwise each map is scaled by itself, which shows where it is high (see `normalise`).
        smooth: standard deviation in pixels of a Gaussian that smooths the maps, at least 0.
        colormap: see `blend`.
        caption: text below the figure.

    Returns:
        A figure that pyplot does not manage.

    Raises:
        InputError: if a column does not have one map per image, or a map does not match its image.
        SettingError: if a setting is out of range.

    Example:
        >>> figure = panel([np.ones((4, 4, 3))], {"gradient": [np.eye(4)], "ParchGrad": [np.eye(4)]})
        >>> [axes.get_title() for axes in figure.axes[:3]]
        ['image', 'gradient', 'ParchGrad']
    """
    cells, kind = _rows(images, maps, labels), _magnitudes(colormap)
    return _draw(cells, 1 + len(maps), kind, shared_scale=shared_scale, sigma=smooth, caption=caption)


def strip(
    image: Pixels,
    maps: Mapping[str, ArrayLike],
    *,
    label: str = "image",
    columns: int = 4,
    shared_scale: bool = False,
    smooth: float = 0.0,
    colormap: str = COLOUR_MAP,
    caption: str = "",
) -> Figure:
    """Draw an image and its maps in rows of `columns`.

    Args:
        image: see `blend`.
        maps: maps (H, W) by title.
        label: title of the image.
        columns: number of pictures per row, at least 1.
        shared_scale: see `panel`.
        smooth: see `panel`.
        colormap: see `blend`.
        caption: text below the figure.

    Returns:
        A figure that pyplot does not manage.

    Raises:
        InputError: if a map does not match the image.
        SettingError: if a setting is out of range.

    Example:
        >>> figure = strip(np.ones((4, 4, 3)), {"q = 0.5": np.eye(4), "q = 0.1": np.eye(4)}, label="cat", columns=2)
        >>> [axes.get_title() for axes in figure.axes[:3]]
        ['cat', 'q = 0.5', 'q = 0.1']
    """
    check_whole_number("columns", columns, 1)
    cells = _rows([image], {name: [heat] for name, heat in maps.items()}, [label])
    kind = _magnitudes(colormap)
    return _draw(cells, columns, kind, shared_scale=shared_scale, sigma=smooth, caption=caption)


def signed_panel(
    images: Pictures,
    maps: Mapping[str, Column],
    *,
    labels: Sequence[str] | None = None,
    shared_scale: bool = False,
    smooth: float | None = None,
    caption: str = "",
) -> Figure:
    """Draw one image per row, next to its signed maps, on a diverging scale around zero.

    Args:
        images: see `blend`.
        maps: signed maps (H, W) of all images, by column title; see `signed_heatmap`.
        labels: title of each image; default "image".
        shared_scale: see `panel`.
        smooth: standard deviation in pixels of a Gaussian that smooths the maps, at least 0. None uses 1% of the
            shorter side, since the sign of a gradient varies from pixel to pixel.
        caption: text below the figure.

    Returns:
        A figure that pyplot does not manage.

    Raises:
        InputError: if a column does not have one map per image, or a map does not match its image.
        SettingError: if `smooth` is out of range.

    Example:
        >>> figure = signed_panel([np.ones((4, 4, 3))], {"gradient": [np.eye(4) - 0.5]})
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['image', 'gradient']
    """
    cells = _rows(images, maps, labels)
    return _draw(cells, 1 + len(maps), _SIGNED, shared_scale=shared_scale, sigma=smooth, caption=caption)


def draw_figure(figure: Figure, path: Path, *, dpi: int = DPI) -> None:
    """Write a figure without any checks; the suffix sets the format. Equal figures give equal files.

    Raises:
        OSError: if the file cannot be written.
    """
    # Matplotlib writes the time into these formats, and random names into SVG.
    metadata = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(path.suffix.lower())
    with matplotlib.rc_context({"svg.hashsalt": "parchgrad"}):
        figure.savefig(path, dpi=dpi, bbox_inches="tight", pad_inches=0.12, metadata=metadata)


def save_figure(figure: Figure, path: str | Path, *, dpi: int = DPI, force: bool = True) -> None:
    """Write a figure; the suffix sets the format: .png, .pdf, .svg or another of Matplotlib's.

    Like Matplotlib's `savefig`, it overwrites an existing file, unless `force` is off.

    Args:
        figure: the figure.
        path: output file.
        dpi: resolution in dots per inch, at least 1; in vector formats, that of the maps.
        force: whether to overwrite an existing file.

    Raises:
        InputError: if `figure` is not a figure.
        SettingError: if `dpi` is not a positive whole number.
        OutputError: if the suffix is not supported, the file exists and `force` is off, or it cannot be written.
    """
    check_kind("`figure`", figure, Figure, "Draw one first, such as overlay(image, heat)", error=InputError)
    check_whole_number("dpi", dpi, 1)
    path = Path(path)
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise OutputError(f"{str(path)!r} does not have an image suffix. Use one of .{', .'.join(sorted(formats))}.")
    with writing(path, force=force) as temporary:
        draw_figure(figure, temporary, dpi=dpi)


def _as_map(values: ArrayLike) -> Picture:
    found = as_array(values)
    if found.ndim == 3 and len(found) == 1:
        found = found[0]
    if found.ndim != 2:
        raise InputError(f"The map has shape {found.shape}, but it must be (H, W). Pass one map, such as heat[0].")
    return found


def _finite_map(values: ArrayLike) -> Picture:
    found = _as_map(values)
    if not np.isfinite(found).all():
        raise InputError("The map contains NaN or infinite values. Check the model and its inputs.")
    return found


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


def _mix(image: Pixels, tinted: Picture, opacity: float) -> Picture:
    """Lay a tinted map over the image, which turns grey as the map becomes opaque."""
    if not 0 <= opacity <= 1:
        raise SettingError(f"`opacity` is {opacity}, but it must be in [0, 1].")
    picture = as_picture(image)
    if picture.shape != (*tinted.shape[:2], 3):
        raise InputError(
            f"`image` has shape {picture.shape}, but the map has shape {tinted.shape[:2]}. Resize one to match "
            "the other."
        )
    grey = (picture @ _LUMINANCE)[..., None]
    weight = opacity * tinted[..., 3:]
    mixed: Picture = (1 - weight) * (opacity * grey + (1 - opacity) * picture) + weight * tinted[..., :3]
    return mixed


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """How figures show maps of one kind, magnitudes or signed.

    Attributes:
        lay: lays a map over its image, given the end of the scale.
        colours: name of the colour map.
        start: start of the scale, as a share of its end: 0 or -1.
        meaning: what the colours show.
        smoothing: default standard deviation of the smoothing, as a share of the shorter side.
    """

    lay: Callable[..., Picture]
    colours: str
    start: int
    meaning: str
    smoothing: float


def _magnitudes(colormap: str) -> _Kind:
    lay = partial(blend, colormap=check_colormap(colormap))
    return _Kind(lay=lay, colours=colormap, start=0, meaning="|attribution|", smoothing=0.0)


_SIGNED = _Kind(
    lay=blend_signed,
    colours=SIGNED_COLOUR_MAP,
    start=-1,
    meaning="attribution, positive (red) or negative (blue)",
    smoothing=0.01,
)


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """A picture of a figure: an image, or a map over it."""

    title: str
    image: Pixels
    heat: ArrayLike | None = None


def _rows(images: Pictures, maps: Mapping[str, Column], labels: Sequence[str] | None) -> list[_Cell]:
    """Cells row by row: an image, then its maps."""
    if not len(images):
        raise InputError("`images` is empty. Pass at least one.")
    if labels is not None and len(labels) != len(images):
        raise InputError(f"`labels` has {len(labels)} texts for {len(images)} images. Pass one for each.")
    for name, column in maps.items():
        if len(column) != len(images):
            raise InputError(f"Column {name!r} has {len(column)} maps for {len(images)} images. Pass one map for each.")
    return [
        cell
        for row, image in enumerate(images)
        for cell in (
            _Cell(title=labels[row] if labels else "image", image=image),
            *(_Cell(title=name, image=image, heat=column[row]) for name, column in maps.items()),
        )
    ]


def _draw(
    cells: Sequence[_Cell], columns: int, kind: _Kind, *, shared_scale: bool, sigma: float | None, caption: str
) -> Figure:
    """Draw images and maps in rows of `columns`, with a colour bar and a caption."""
    maps = [None if cell.heat is None else _smoothed(cell.heat, kind, sigma) for cell in cells]
    top = shared_top(heat for heat in maps if heat is not None) if shared_scale else None
    pictures = [
        (cell.title, as_picture(cell.image) if heat is None else kind.lay(cell.image, heat, top=top))
        for cell, heat in zip(cells, maps, strict=True)
    ]
    figure, axes = _lay_out(pictures, columns, caption)
    end = 1.0 if top is None else top
    scale = (
        f"each map on its own scale: 1 is its {_PERCENTILE:g}th percentile"
        if top is None
        else "all maps on one scale, in multiples of a map's mean"
    )
    label = "\n".join(filter(None, (f"{kind.meaning}; {scale}", _smoothing_text(kind, sigma))))
    label = _wrapped(label, figure.get_figwidth())
    add_colour_bar(figure, axes, kind.colours, (kind.start * end, end), label)
    return settle(figure)


def _smoothed(heat: ArrayLike, kind: _Kind, sigma: float | None) -> Picture:
    found = as_array(heat)
    return smooth(heat, kind.smoothing * min(found.shape[-2:]) if sigma is None else sigma)


def _smoothing_text(kind: _Kind, sigma: float | None) -> str:
    """Mention the standard deviation of the smoothing, if there is one."""
    if sigma is None:
        return f"smoothed with a Gaussian of {kind.smoothing:.0%} of the shorter side" if kind.smoothing else ""
    return f"smoothed with a Gaussian of {sigma:g} px" if sigma else ""


def _wrapped(text: str, width: float, size: float = 9) -> str:
    """Wrap each line of a text of `size` points to a width in inches."""
    # A letter is about 0.58 times as wide as the size of the type.
    letters = max(12, int(width * 72 / (0.58 * size)))
    return "\n".join(textwrap.fill(line, letters) for line in text.splitlines())


def _lay_out(cells: Sequence[tuple[str, Picture]], columns: int, caption: str) -> tuple[Figure, list[Any]]:
    columns = min(columns, len(cells))
    titled = [(_wrapped(title, _CELL, 11), picture) for title, picture in cells]
    # Rows are only as high as their pictures and titles: equal rows would leave gaps between wide pictures.
    heights = [
        max(0.17 * title.count("\n") + 0.27 + _CELL * picture.shape[0] / picture.shape[1] for title, picture in row)
        for row in (titled[start : start + columns] for start in range(0, len(cells), columns))
    ]
    width = _CELL * columns
    below = _wrapped(caption, width - 0.3)
    size = (width, sum(heights) + 0.8 + 0.17 * (below.count("\n") + 2) * bool(below))
    figure = Figure(figsize=size, layout=margins())
    grid = list(figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights).flat)
    for axes, (title, picture) in zip(grid, titled, strict=False):
        show(axes, picture, title)
    for empty in grid[len(cells) :]:
        empty.set_axis_off()
    if below:
        figure.supxlabel(as_written(below), fontsize=9)
    return figure, grid
