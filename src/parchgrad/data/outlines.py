"""Outlines of simple shapes and their coverage of pixels. Pure functions."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["CUTTABLE", "OUTLINES", "Coverage", "Inside", "bar", "blob", "coverage", "cut", "wave"]

Coordinates: TypeAlias = NDArray[np.floating[Any]]
Mask: TypeAlias = NDArray[np.bool_]
Inside: TypeAlias = Callable[[Coordinates, Coordinates], Mask]
"""Whether points (x, y), in the outline's own units, lie inside; y points down, and the inside is within
[-2, 2] x [-2, 2]."""

# Samples along each side of a pixel.
_SUPERSAMPLING = 4


def _arrow(x: Coordinates, y: Coordinates) -> Mask:
    aside = abs(x)
    head = (y > -1) & (y < 0.05) & (aside < 0.8 * (y + 1))
    shaft = (y >= 0.05) & (y < 1) & (aside < 0.27)
    return head | shaft


def _crescent(x: Coordinates, y: Coordinates) -> Mask:
    return (x**2 + y**2 < 1) & ((x - 0.45) ** 2 + y**2 > 0.75**2)


def _cross(x: Coordinates, y: Coordinates) -> Mask:
    across, along = np.minimum(abs(x), abs(y)), np.maximum(abs(x), abs(y))
    return (across < 0.32) & (along < 1)


def _disc(x: Coordinates, y: Coordinates) -> Mask:
    return x**2 + y**2 < 1


def _heart(x: Coordinates, y: Coordinates) -> Mask:
    # A square on its corner plus a disc on each upper edge.
    down, up = (y + abs(x)) * math.sqrt(0.5), (y - abs(x)) * math.sqrt(0.5)
    return ((abs(up) < 0.6) & (abs(down) < 0.6)) | (down**2 + (up + 0.6) ** 2 < 0.6**2)


def _leaf(x: Coordinates, y: Coordinates) -> Mask:
    return x**2 + (abs(y) + 0.6) ** 2 < 1


def _ring(x: Coordinates, y: Coordinates) -> Mask:
    squared = x**2 + y**2
    return (squared < 1) & (squared > 0.55**2)


def _square(x: Coordinates, y: Coordinates) -> Mask:
    return np.maximum(abs(x), abs(y)) < 1


def _star(x: Coordinates, y: Coordinates) -> Mask:
    # A point inside a pentagram is beyond at most one of its five lines.
    beyond = np.zeros(np.broadcast(x, y).shape, np.int8)
    for corner in range(5):
        turn = 2 * math.pi * corner / 5
        beyond += math.sin(turn) * x + math.cos(turn) * y > math.cos(0.4 * math.pi)
    return beyond <= 1


def _triangle(x: Coordinates, y: Coordinates) -> Mask:
    return (y < 0.5) & (math.sqrt(3) * abs(x) - y < 1)


OUTLINES: Mapping[str, Inside] = {
    "arrow": _arrow,
    "crescent": _crescent,
    "cross": _cross,
    "disc": _disc,
    "heart": _heart,
    "leaf": _leaf,
    "ring": _ring,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}
"""The named shapes; no two are equal up to rotation and scale."""

CUTTABLE = ("cross", "disc", "star")
"""Shapes whose halves, cut at any angle, look like none of the others."""


def cut(inside: Inside, angle: float) -> Inside:
    """Return the half of an outline on one side of a line through its centre, at `angle` in radians."""
    cosine, sine = math.cos(angle), math.sin(angle)
    return lambda x, y: inside(x, y) & (cosine * y > sine * x)


def bar(x: Coordinates, y: Coordinates) -> Mask:
    """Outline of a straight bar with round ends, four times as long as wide."""
    beyond = np.maximum(np.abs(x) - 0.75, 0)
    inside: Mask = beyond**2 + y**2 < 0.25**2
    return inside


def wave(x: Coordinates, y: Coordinates) -> Mask:
    """Outline of a wavy ribbon."""
    return (abs(x) < 1.2) & (abs(y - 0.4 * np.sin(4 * x)) < 0.24)


def blob(amplitudes: Coordinates, phases: Coordinates) -> Inside:
    """Return a closed curve whose radius is 1 plus waves of 2, 3, ... periods per turn.

    Args:
        amplitudes: amplitude of each wave; their sum is below 1.
        phases: phase of each wave, in radians.
    """

    def inside(x: Coordinates, y: Coordinates) -> Mask:
        angle = np.arctan2(y, x)
        radius = np.ones_like(angle)
        for order, (amplitude, phase) in enumerate(zip(amplitudes, phases, strict=True), start=2):
            radius += amplitude * np.cos(order * angle + phase)
        return x**2 + y**2 < radius**2

    return inside


@dataclass(frozen=True)
class Coverage:
    """How much of each pixel a shape covers, within a window of the image.

    Attributes:
        rows: rows of the window.
        columns: columns of the window.
        share: covered share of each pixel in the window, in [0, 1].
    """

    rows: slice
    columns: slice
    share: NDArray[np.float32]


def coverage(inside: Inside, *, side: float, centre: tuple[float, float], angle: float, size: int) -> Coverage:
    """Compute the share of each pixel that an outline covers, from 4 x 4 samples.

    Args:
        inside: the outline.
        side: side of the square with the same area as the shape, in pixels.
        centre: column and row of the shape's centre of mass, in pixels from the upper left corner of the image.
        angle: rotation of the shape in radians.
        size: side of the image in pixels; the shape is clipped to it.

    Example:
        >>> drawn = coverage(OUTLINES["square"], side=2.0, centre=(2.5, 2.0), angle=0.0, size=4)
        >>> drawn.rows, drawn.share[:, :4]
        (slice(0, 4, None), array([[0. , 0. , 0. , 0. ],
               [0. , 0.5, 1. , 0.5],
               [0. , 0.5, 1. , 0.5],
               [0. , 0. , 0. , 0. ]], dtype=float32))
    """
    shape = _measure(inside)
    scale = side / math.sqrt(shape.area)
    # One more pixel on each side, and at least one pixel, even if empty.
    reach = shape.radius * scale + 1
    low, high = ([max(int(sign * reach + at), 0) for at in centre] for sign in (-1, 1))
    columns, rows = (slice(min(start, size - 1), min(stop + 1, size)) for start, stop in zip(low, high, strict=True))
    across, down = (
        (np.arange(at.start * _SUPERSAMPLING, at.stop * _SUPERSAMPLING, dtype=np.float32) + 0.5) / _SUPERSAMPLING
        for at in (columns, rows)
    )
    across, down = (across - np.float32(centre[0])) / scale, (down - np.float32(centre[1]))[:, None] / scale
    cosine, sine = math.cos(angle), math.sin(angle)
    x = cosine * across + sine * down + shape.centre[0]
    y = cosine * down - sine * across + shape.centre[1]
    found = inside(x, y).reshape(rows.stop - rows.start, _SUPERSAMPLING, -1)
    # Rows first: summing whole rows is fast, and the result is small.
    summed = found.sum(axis=1, dtype=np.float32).reshape(rows.stop - rows.start, -1, _SUPERSAMPLING).sum(axis=2)
    return Coverage(rows, columns, summed / np.float32(_SUPERSAMPLING**2))


@dataclass(frozen=True)
class _Measure:
    """Area, centre of mass, and largest distance from it, in the outline's units."""

    area: float
    centre: tuple[float, float]
    radius: float


def _measure(inside: Inside) -> _Measure:
    return _measure_finely(inside) if inside in _NAMED else _measured(inside, 32)


@cache
def _measure_finely(inside: Inside) -> _Measure:
    return _measured(inside, 1024)


_NAMED = frozenset(OUTLINES.values())


def _measured(inside: Inside, samples: int) -> _Measure:
    """Measure on a grid of samples x samples points."""
    along = ((np.arange(samples) + 0.5) * (4 / samples) - 2).astype(np.float32)
    found = inside(along[None, :], along[:, None])
    rows, columns = np.nonzero(found)
    x, y = along[columns].astype(np.float64), along[rows].astype(np.float64)
    centre = float(x.mean()), float(y.mean())
    radius = math.sqrt(float(((x - centre[0]) ** 2 + (y - centre[1]) ** 2).max())) + 4 / samples
    return _Measure(found.sum() * (4 / samples) ** 2, centre, radius)
