"""Heat maps over volumes, clips and signals."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter

from parchgrad._io.checks import check_whole_number, is_number, is_whole_number
from parchgrad.errors import InputError, SettingError
from parchgrad.visual.charts import LIGHT, as_written, style_axes
from parchgrad.visual.drawing import OUTLINE, add_colour_bar, as_array, as_picture, margins, own_scale, settle, show
from parchgrad.visual.maps import COLOUR_MAP, normalise, paint

__all__ = ["clip_figure", "signal_figure", "volume_figure"]

# A peak fills a larger share of the slices or frames that show it than of the whole map.
_PERCENTILE = 99.9
_SIGNAL_PERCENTILE = 99.5
_SMOOTHING = 0.02
# Shortest side in inches that has several ticks.
_THIN = 0.8
_AXES = ("depth", "height", "width")
_PALE = "#aad9f4"
_SHADES = LinearSegmentedColormap.from_list("shades", ["#ffffff", LIGHT.lines[1]])


def volume_figure(
    heat: ArrayLike,
    volume: ArrayLike,
    *,
    at: Sequence[int] | None = None,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    window: tuple[float, float] | None = None,
    title: str = "",
) -> Figure:
    """Draw three orthogonal slices of a heat map over a grey volume, with crosshairs, on one scale.

    Args:
        heat: non-negative map (D, H, W), of any scale; its 99.9th percentile is the end of the scale.
        volume: grey volume (D, H, W), of any scale.
        at: voxel (d, h, w) that the slices meet in. None uses the peak of the map after clipping to the scale and
            Gaussian smoothing by 2% of the longest side, since a single voxel of a gradient may be noise; the centre
            if the map is zero everywhere.
        spacing: size of a voxel along depth, height and width, in any unit.
        window: values of the volume drawn black and white; None uses its 0.5th and 99.5th percentiles.
        title: title of the figure; empty states where the slices are.

    Returns:
        A figure that pyplot does not manage. Axes are in voxels; slices have the aspect that `spacing` gives.

    Raises:
        InputError: if the two do not match, or contain NaN or infinite values, or the map contains negative ones.
        SettingError: if `at` is outside the volume, or `spacing` or `window` is out of range.

    Example:
        >>> heat = np.zeros((4, 8, 8))
        >>> heat[1, 2, 3] = 1
        >>> [axes.get_title() for axes in volume_figure(heat, np.random.rand(4, 8, 8)).axes[:3]]
        ['depth 1', 'width 3', 'height 2']
    """
    body = _numbers(volume, "volume", 3, "(D, H, W)", "Pass one channel of one row, such as x[0, 0]")
    scaled = _scaled(heat, body.shape, "volume", _PERCENTILE)
    if np.shape(spacing) != (3,) or not all(is_number(size) and 0 < size < math.inf for size in spacing):
        raise SettingError(f"`spacing` is {spacing!r}. Pass three positive sizes of a voxel: depth, height and width.")
    sizes = np.asarray(spacing, dtype=np.float64)
    place = _peak(scaled, sizes) if at is None else _place(at, body.shape)
    grey = _windowed(body, window)
    sides = sizes * body.shape
    # Of each slice: the dimension it cuts, and those of its rows and columns. The first two share their rows.
    slices = ((0, 1, 2), (2, 1, 0), (1, 0, 2) if sides[0] <= sides[2] else (1, 2, 0))
    # Very thin slices still need space for their labels.
    widths = [max(sides[columns], 0.2 * sides.max()) for _, _, columns in slices]
    tallest = max(sides[rows] for _, rows, _ in slices)
    inches = min(8.0 / sum(widths), 4.5 / tallest)
    # Enough height lets the widths set the scale, which all slices then share; the sides are for the title.
    side = max(6.0 - inches * sum(widths), 0.02) / inches / 2
    size = (inches * (sum(widths) + 2 * side) + 1.6, max(inches * tallest, 1.2) + 1.8)
    figure = Figure(figsize=size, layout=margins())
    grid = figure.add_gridspec(1, 5, width_ratios=[side, *widths, side])
    panels = [figure.add_subplot(grid[column]) for column in (1, 2, 3)]
    for axes, (across, rows, columns) in zip(panels, slices, strict=True):
        picture, values = (np.take(each, place[across], axis=across) for each in (grey, scaled))
        if rows > columns:
            picture, values = picture.T, values.T
        axes.imshow(paint(picture, values), interpolation="nearest", aspect=sizes[rows] / sizes[columns])
        # A gap around the voxel leaves it visible.
        gaps = np.maximum(0.06 * min(sides[rows], sides[columns]) / sizes, 1.5)
        axes.autoscale(False)
        for dimension, draw, other in ((columns, axes.hlines, rows), (rows, axes.vlines, columns)):
            middle, gap, end = place[dimension], gaps[dimension], body.shape[dimension] - 0.5
            # A line along a very thin slice would cover it.
            ends = [] if inches * sides[other] < _THIN / 2 else [(-0.5, middle - gap), (middle + gap, end)]
            for start, stop in ends:
                if start < stop:
                    line = draw(place[other], start, stop, color=LIGHT.lines[5], linewidth=0.9)
                    line.set_path_effects([OUTLINE])
        axes.set_title(f"{_AXES[across]} {place[across]}", fontsize=11)
        axes.set_xlabel(_AXES[columns], fontsize=9)
        axes.set_ylabel(_AXES[rows], fontsize=9)
        axes.tick_params(labelsize=8)
        for axis, dimension in ((axes.xaxis, columns), (axes.yaxis, rows)):
            if inches * sides[dimension] < _THIN:
                axis.set_ticks([place[dimension]])
            else:
                axis.set_major_locator(MaxNLocator(4, integer=True))
    add_colour_bar(figure, panels, COLOUR_MAP, (0, 1), own_scale(_PERCENTILE))
    for axes in panels:
        # The colour bar moved them to the bottom of their cells.
        axes.set_anchor("C")
    meeting = ", ".join(f"{name} {index}" for name, index in zip(_AXES, place, strict=True))
    where = (
        "the voxel" if at is not None else "the smoothed map's peak" if scaled.any() else "the centre of a map of zeros"
    )
    figure.suptitle(as_written(title or f"Slices through {where} at {meeting}"), fontsize=11.5)
    return settle(figure)


def clip_figure(heat: ArrayLike, frames: ArrayLike, *, count: int = 8, title: str = "") -> Figure:
    """Draw frames of a clip above their maps, on one scale, and the share of the map in each frame over time.

    Args:
        heat: non-negative map (T, H, W), of any scale; its 99.9th percentile is the end of the scale.
        frames: frames (T, H, W, 3), or (T, H, W) if they are grey, in [0, 1].
        count: number of frames to draw, at least 1, at equal distances. The frame with the largest share of the map is
            always among them: it replaces the nearest one.
        title: title of the figure; empty states which frame has the largest share.

    Returns:
        A figure that pyplot does not manage.

    Raises:
        InputError: if the two do not match, or contain NaN or infinite values, or the map contains negative ones.
        SettingError: if `count` is below 1.

    Example:
        >>> heat = np.zeros((16, 4, 4))
        >>> heat[6] = 1
        >>> [axes.get_title() for axes in clip_figure(heat, np.ones((16, 4, 4, 3)), count=3).axes[:3]]
        ['frame 0', 'frame 6', 'frame 15']
    """
    check_whole_number("count", count, 1)
    pictures = as_array(frames)
    if pictures.size == 0 or not (pictures.ndim == 3 or (pictures.ndim == 4 and pictures.shape[3] == 3)):
        raise InputError(
            f"`frames` has shape {pictures.shape}, but it must be (T, H, W, 3), or (T, H, W) if it is grey. Move its "
            "channels last."
        )
    scaled = _scaled(heat, pictures.shape[:3], "frames", _PERCENTILE)
    shares = _shares(as_array(heat))
    largest = int(shares.argmax())
    chosen = _spread(len(shares), count, largest)
    width = min(max(9.6 / len(chosen), 0.9), 2.4)
    height = width * pictures.shape[1] / pictures.shape[2]
    # The rest is for titles, labels, the colour bar and the chart.
    size = (max((width + 0.12) * len(chosen) + 0.9, 4.8), 2 * height + 3.2)
    figure = Figure(figsize=size, layout=margins())
    grid = figure.add_gridspec(3, len(chosen), height_ratios=[height, height, 1.1])
    above, below = ([figure.add_subplot(grid[row, column]) for column in range(len(chosen))] for row in range(2))
    for upper, lower, frame in zip(above, below, chosen, strict=True):
        picture = as_picture(pictures[frame], "frames")
        show(upper, picture, f"frame {frame}", size=9)
        show(lower, paint(picture, scaled[frame]), "")
    add_colour_bar(figure, below, COLOUR_MAP, (0, 1), own_scale(_PERCENTILE))
    for upper, lower in zip(above, below, strict=True):
        # Each map is close to its frame.
        upper.set_anchor("S")
        lower.set_anchor("N")
    chart = figure.add_subplot(grid[2, :])
    style_axes(chart, LIGHT, x_label="frame; those drawn above are dark", y_label="share of map")
    colours = [LIGHT.lines[0] if frame in chosen else _PALE for frame in range(len(shares))]
    # Gaps between many narrow bars would only make them pale.
    chart.bar(range(len(shares)), shares, color=colours, width=0.85 if len(shares) <= 64 else 1.0)
    chart.set_xlim(-0.5, len(shares) - 0.5)
    chart.set_ylim(0, 1.08 * shares.max() or 1)
    chart.xaxis.set_major_locator(MaxNLocator(integer=True))
    chart.yaxis.set_major_locator(MaxNLocator(4))
    chart.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    found = f"Frame {largest} has the largest share of the map: {shares[largest]:.1%}"
    figure.suptitle(as_written(title or (found if shares.any() else "The map is zero everywhere")), fontsize=11.5)
    return settle(figure)


def signal_figure(
    heat: ArrayLike,
    signal: ArrayLike,
    *,
    rate: float | None = None,
    labels: Sequence[str] | None = None,
    title: str = "",
) -> Figure:
    """Draw a signal, one row per channel, shaded where its heat map is high.

    Args:
        heat: non-negative map (L,), of any scale; its 99.5th percentile is the end of the scale.
        signal: signal (C, L), or (L,) of one channel, in any unit.
        rate: samples per second; None numbers the samples instead.
        labels: label of each channel; default "channel" and its index, or "signal" if there is one.
        title: title of the figure.

    Returns:
        A figure that pyplot does not manage.

    Raises:
        InputError: if the map, the signal and the labels do not match, or contain NaN or infinite values, or the map
            contains negative ones.
        SettingError: if `rate` is out of range.

    Example:
        >>> figure = signal_figure([0.0, 2.0, 1.0, 0.0], [[1.0, 2.0, 3.0, 2.0], [0.0, 1.0, 0.0, 1.0]], rate=100)
        >>> [axes.get_ylabel() for axes in figure.axes[:2]], figure.axes[1].get_xlabel()
        (['channel 0', 'channel 1'], 'time in seconds')
    """
    if rate is not None and not (is_number(rate) and 0 < rate < math.inf):
        raise SettingError(f"`rate` is {rate!r}, but it must be positive. Pass the samples per second.")
    values = as_array(signal)
    lines = _numbers(
        values[None] if values.ndim == 1 else values, "signal", 2, "(C, L) or (L,)", "Pass one row, such as x[0]"
    )
    channels, length = lines.shape
    scaled = _scaled(heat, (length,), "signal", _SIGNAL_PERCENTILE)
    # Longer names would run into each other in low rows.
    kind = "channel " if channels < 8 else ""
    names = labels or (["signal"] if channels == 1 else [f"{kind}{index}" for index in range(channels)])
    if len(names) != channels:
        raise InputError(f"`labels` has {len(names)} texts for {channels} channels. Pass one for each.")
    step = 1.0 if rate is None else 1 / rate
    height = 1.7 if channels == 1 else max(0.6, 1.3 - 0.1 * channels)
    figure = Figure(figsize=(8.6, height * channels + 1.3), layout=margins())
    rows = list(figure.subplots(channels, sharex=True, squeeze=False)[:, 0])
    for axes, line, name in zip(rows, lines, names, strict=True):
        style_axes(axes, LIGHT, y_label=as_written(name))
        axes.plot(np.arange(length) * step, line, color=LIGHT.ink, linewidth=0.9)
        low, high = axes.get_ylim()
        ends = (-0.5 * step, (length - 0.5) * step, low, high)
        axes.imshow(scaled[None], cmap=_SHADES, vmin=0, vmax=1, extent=ends, aspect="auto", zorder=0)
        axes.grid(visible=False)
        axes.yaxis.set_major_locator(MaxNLocator(3))
    rows[-1].set_xlabel("sample" if rate is None else "time in seconds", color=LIGHT.ink, fontsize=9.5)
    add_colour_bar(figure, rows, _SHADES, (0, 1), own_scale(_SIGNAL_PERCENTILE))
    if title:
        figure.suptitle(as_written(title), fontsize=11.5)
    return settle(figure)


def _numbers(values: ArrayLike, name: str, dimensions: int, wanted: str, remedy: str) -> NDArray[np.float64]:
    """Check a volume or a signal."""
    found = as_array(values)
    if found.ndim != dimensions or found.size == 0:
        raise InputError(f"`{name}` has shape {found.shape}, but it must be {wanted}. {remedy}.")
    if not np.isfinite(found).all():
        raise InputError(f"`{name}` contains NaN or infinite values. Pass finite numbers.")
    return found


def _scaled(heat: ArrayLike, shape: tuple[int, ...], other: str, percentile: float) -> NDArray[np.floating]:
    """Scale a map of any number of dimensions to [0, 1] as one."""
    values = as_array(heat)
    if values.shape != shape:
        raise InputError(
            f"`heat` has shape {values.shape}, but `{other}` needs a map of shape {shape}. Pass one map without "
            "channels, such as heatmap(attribution)[0]."
        )
    return normalise(values.reshape(len(values), -1), percentile=percentile).reshape(shape)


def _peak(scaled: NDArray[np.floating], sizes: NDArray[np.float64]) -> tuple[int, ...]:
    """Voxel where the smoothed map is largest."""
    if not scaled.any():
        return tuple(side // 2 for side in scaled.shape)
    smooth = gaussian_filter(scaled, _SMOOTHING * (sizes * scaled.shape).max() / sizes, mode="constant", truncate=3)
    return tuple(map(int, np.unravel_index(smooth.argmax(), scaled.shape)))


def _place(at: Sequence[int], shape: tuple[int, ...]) -> tuple[int, ...]:
    fits = np.shape(at) == (3,) and all(
        is_whole_number(index) and 0 <= index < side for index, side in zip(at, shape, strict=True)
    )
    if not fits:
        raise SettingError(f"`at` is {at!r}, but the volume has shape {shape}. Pass the indices (d, h, w) of a voxel.")
    return tuple(map(int, at))


def _windowed(volume: NDArray[np.float64], window: tuple[float, float] | None) -> NDArray[np.float64]:
    """Scale a volume to grey in [0, 1]."""
    if window is None:
        low, high = np.percentile(volume, [0.5, 99.5])
        if low == high:
            low, high = volume.min(), volume.max()
        if low == high:
            return np.full_like(volume, 0.5)
    else:
        low, high = window
        if not (is_number(low) and is_number(high) and -math.inf < low < high < math.inf):
            raise SettingError(f"`window` is {window!r}. Pass two finite values, the smaller one first.")
    grey: NDArray[np.float64] = np.clip((volume - low) / (high - low), 0, 1)
    return grey


def _shares(heat: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of a map in each frame; 0 if the map is zero everywhere."""
    # Scale by the peak first: the sum of huge values overflows, and that of tiny ones underflows.
    peak = heat.max()
    sums = (heat / peak if peak > 0 else heat).sum(axis=(1, 2))
    shares: NDArray[np.float64] = sums / (sums.sum() or 1)
    return shares


def _spread(length: int, count: int, wanted: int) -> list[int]:
    """Up to `count` indices at equal distances, one of which is replaced by the wanted one if it is not among them."""
    spread = np.linspace(0, length - 1, min(count, length)).round().astype(int)
    if wanted not in spread:
        spread[np.abs(spread - wanted).argmin()] = wanted
    return list(map(int, spread))
