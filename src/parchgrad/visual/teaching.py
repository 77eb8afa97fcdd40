"""Two figures that explain the method: many weak channels against few strong ones, and the pattern strides leave."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch.nn import functional

from parchgrad._io.checks import check_whole_number
from parchgrad.errors import SettingError
from parchgrad.visual.charts import LIGHT, Theme, style_axes
from parchgrad.visual.maps import COLOUR_MAP

__all__ = ["GEOMETRIES", "SummedDirections", "checkerboard", "checkerboard_figure", "sum_directions"]

GEOMETRIES = ((1, 2), (2, 2), (3, 2), (4, 2), (3, 1))
"""Common kernels and strides of convolutions."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SummedDirections:
    """Gradients of channels as directions in a plane, and their sums.

    Attributes:
        strong: gradients in one direction, up to noise, (S, 2).
        weak: gradients of random directions, (W, 2).
    """

    strong: NDArray[np.float64]
    weak: NDArray[np.float64]

    @property
    def deviation(self) -> float:
        """Angle between the sum of all gradients and the sum of the strong ones, in degrees, in [0, 180]."""
        wanted, found = self.strong.sum(axis=0), self.strong.sum(axis=0) + self.weak.sum(axis=0)
        cosine = wanted @ found / (np.linalg.norm(wanted) * np.linalg.norm(found))
        return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))

    def figure(self, *, theme: Theme = LIGHT) -> Figure:
        """Draw the gradients tip to tail, the strong ones first, and both sums as arrows."""
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        figure.set_facecolor("none")
        axes = figure.subplots()
        style_axes(axes, theme)
        start = np.zeros((1, 2))
        strong = np.concatenate([start, self.strong.cumsum(axis=0)])
        weak = strong[-1] + np.concatenate([start, self.weak.cumsum(axis=0)])
        strong_colour, weak_colour, total_colour = theme.lines[0], theme.lines[1], theme.ink
        axes.plot(*strong.T, "-o", color=strong_colour, markersize=3, linewidth=1.4)
        axes.plot(*weak.T, "-", color=weak_colour, linewidth=0.9)
        for end, colour, text in (
            (strong[-1], strong_colour, f"sum of {len(self.strong)} strong"),
            (weak[-1], total_colour, f"sum of all, {self.deviation:.0f}° off"),
        ):
            axes.annotate(
                "", end, (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 2.2, "shrinkB": 0}
            )
            axes.plot([], [], color=colour, linewidth=2.2, label=text)
        axes.plot([], [], color=weak_colour, linewidth=0.9, label=f"{len(self.weak)} weak, tip to tail")
        axes.set_aspect("equal", adjustable="datalim")
        axes.tick_params(labelleft=False, labelbottom=False, length=0)
        figure.legend(
            loc="outside lower left", ncols=3, frameon=False, fontsize=9, labelcolor=theme.ink, columnspacing=1.5
        )
        return figure


def sum_directions(
    *, strong: int = 10, weak: int = 100, weakness: float = 0.5, spread: float = 0.5, seed: int = 1
) -> SummedDirections:
    """Generate gradients of a few strong channels that agree, and of many weak ones that do not.

    The sum of the weak gradients grows with the square root of their number: 100 at half the strength are as long as
    five strong ones, in a random direction. Pruning removes them.

    With the defaults the sum is off by 17 degrees; over many seeds the median is 15 degrees, the 90th percentile 41.

    Args:
        strong: number of strong gradients, of length 1 and similar direction; at least 1.
        weak: number of weak gradients, in uniformly random directions; at least 1.
        weakness: length of a weak gradient, positive.
        spread: standard deviation of the strong gradients' angle in radians, at least 0.
        seed: random seed.

    Raises:
        SettingError: if a setting is out of range.

    Source: after the motivation in Park, Jeon, Choi (2023).

    Example:
        >>> found = sum_directions()
        >>> found.strong.shape, found.weak.shape, found.deviation < 90
        ((10, 2), (100, 2), True)
    """
    check_whole_number("strong", strong, 1)
    check_whole_number("weak", weak, 1)
    # Written this way so that NaN fails too.
    if not 0 < weakness < math.inf:
        raise SettingError(f"`weakness` is {weakness}, but it must be finite and positive.")
    if not 0 <= spread < math.inf:
        raise SettingError(f"`spread` is {spread}, but it must be finite and at least 0.")
    generator = np.random.default_rng(seed)
    angles = generator.normal(0, spread, strong)
    chance = generator.uniform(0, 2 * np.pi, weak)
    return SummedDirections(strong=_unit(angles), weak=weakness * _unit(chance))


def checkerboard(*, kernel: int, stride: int, magnitude: float = 1.0, size: int = 16) -> NDArray[np.float64]:
    """Send a uniform gradient back through a convolution of equal weights, which makes it uneven.

    Every window that covers an input pixel adds to its gradient. If the stride does not divide the kernel, some pixels
    are covered by more windows than their neighbours.

    Args:
        kernel: side of the kernel, at least 1.
        stride: stride, at least 1.
        magnitude: gradient at every output position, positive.
        size: side of the output in windows, at least 1.

    Returns:
        Gradient at the input, away from the border, (size * stride, size * stride), for weights that sum to 1.

    Raises:
        SettingError: if a setting is out of range.

    Source: Odena, Dumoulin, Olah (2016), "Deconvolution and Checkerboard Artifacts", for generated images; Park, Jeon,
    Choi (2023) for gradients.

    Example:
        >>> checkerboard(kernel=3, stride=2, size=1) * 9
        array([[4., 2.],
               [2., 1.]])
    """
    for name, value in (("kernel", kernel), ("stride", stride), ("size", size)):
        check_whole_number(name, value, 1)
    if not 0 < magnitude < math.inf:
        raise SettingError(f"`magnitude` is {magnitude}, but it must be positive.")
    margin = -(-kernel // stride)
    windows = size + 2 * margin
    gradient = torch.full((1, 1, windows, windows), float(magnitude), dtype=torch.float64)
    weight = torch.full((1, 1, kernel, kernel), 1 / kernel**2, dtype=torch.float64)
    arrived = functional.conv_transpose2d(gradient, weight, stride=stride)[0, 0]
    inner = slice(margin * stride, (margin + size) * stride)
    found: NDArray[np.float64] = arrived[inner, inner].numpy()
    return found


def checkerboard_figure(
    *,
    geometries: Sequence[tuple[int, int]] = GEOMETRIES,
    magnitudes: Sequence[float] = (0.5, 1.0, 2.0),
    theme: Theme = LIGHT,
) -> Figure:
    """Draw the checkerboard for several kernels, strides and gradient magnitudes, on one scale.

    The pattern grows with the gradient, whether or not the channel matters for the class.

    Args:
        geometries: kernel and stride of each column.
        magnitudes: gradient magnitude of each row, positive.
        theme: colours.

    Raises:
        SettingError: if there is nothing to draw, or a setting is out of range.

    Example:
        >>> figure = checkerboard_figure(geometries=[(3, 2), (4, 2)], magnitudes=[1.0])
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['kernel 3, stride 2', 'kernel 4, stride 2']
    """
    if not geometries or not magnitudes:
        raise SettingError("`geometries` or `magnitudes` is empty. Pass at least one of each.")
    boards = [
        [checkerboard(kernel=kernel, stride=stride, magnitude=magnitude, size=6) for kernel, stride in geometries]
        for magnitude in magnitudes
    ]
    top = max(float(board.max()) for row in boards for board in row)
    figure = Figure(figsize=(1.75 * len(geometries) + 0.6, 1.75 * len(magnitudes) + 0.9), layout="constrained")
    figure.set_facecolor("none")
    grid = figure.subplots(len(magnitudes), len(geometries), squeeze=False)
    for row, (magnitude, shown) in enumerate(zip(magnitudes, boards, strict=True)):
        for axes, board, (kernel, stride) in zip(grid[row], shown, geometries, strict=True):
            axes.imshow(board, cmap=COLOUR_MAP, vmin=0, vmax=top, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(f"kernel {kernel}, stride {stride}", fontsize=9.5, color=theme.ink)
        grid[row, 0].set_ylabel(f"gradient {magnitude:g}", fontsize=9.5, color=theme.ink)
    _bar(figure, list(grid.flat), top, theme)
    return figure


def _bar(figure: Figure, axes: list[Any], top: float, theme: Theme) -> None:
    bar = figure.colorbar(ScalarMappable(Normalize(0, top), COLOUR_MAP), ax=axes, location="bottom", aspect=45)
    bar.set_label("gradient at each input pixel", fontsize=9, color=theme.ink)
    bar.ax.tick_params(labelsize=8, colors=theme.ink)
    bar.outline.set_visible(False)


def _unit(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)
