"""Generated images of labelled shapes with exact masks, without any download."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.random import Generator, Philox
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from parchgrad._io.checks import is_whole_number
from parchgrad.data.outlines import CUTTABLE, OUTLINES, Coverage, Inside, bar, blob, coverage, cut, wave
from parchgrad.data.samples import Sample
from parchgrad.errors import SettingError

__all__ = ["GENERATOR_VERSION", "MEAN", "SHAPE_CATEGORIES", "STD", "GeneratedShapes"]

Values: TypeAlias = NDArray[np.floating[Any]]
Picture: TypeAlias = NDArray[np.float32]

SHAPE_CATEGORIES: tuple[str, ...] = tuple(OUTLINES)
"""Names of the classes."""

MEAN = (0.5, 0.5, 0.5)
"""Mean subtracted from each colour channel, in units of [0, 1]."""

STD = (0.25, 0.25, 0.25)
"""Standard deviation that divides each colour channel, in units of [0, 1]."""

GENERATOR_VERSION = 1
"""Version of the generator; another one draws other images from the same settings."""

# Side of the square with a shape's area, as a share of the image's side; and the largest distance of any shape's point
# from its centre, in such sides.
_SIDES = (0.2, 0.38)
_REACH = 1.05

# Sizes of distractors, as shares of the shape's.
_DISTRACTOR_SIDES = (0.35, 0.75)

_SMALLEST = 32
_PLACES = 32


class GeneratedShapes(Dataset[Sample]):
    """Images of one shape each in front of clutter, with exact masks; only the outline depends on the class.

    Rotation, size, position, colours and textures have the same distribution for every class, as has the background:
    a smooth backdrop, lines, and distractors (blobs, bars, ribbons and halves of shapes). The shape is never covered.
    A pixel belongs to the mask if the shape covers at least half of it (4 x 4 samples).

    Image i depends only on the settings and i. Its class is i modulo the number of classes, so consecutive images
    differ in class, as the grid pointing game needs. Use different seeds for training and test sets.

    Attributes:
        categories: names of the classes.

    Example:
        >>> shapes = GeneratedShapes(count=1000, seed=0)
        >>> sample = shapes[17]
        >>> sample.image.shape, shapes.categories[sample.label], sample.boxes, int(sample.mask.sum())
        (torch.Size([3, 64, 64]), 'square', tensor([[30., 15., 51., 36.]]), 377)
    """

    categories = SHAPE_CATEGORIES

    def __init__(self, count: int, *, seed: int = 0, size: int = 64, distractors: int = 3, rivals: int = 0) -> None:
        """Check the settings; images are drawn on access.

        Args:
            count: number of images, at least 1.
            seed: random seed in [0, 2^63). The networks in this package were trained on the seeds 1 and 21.
            size: side of the images in pixels, at least 32. Shapes scale with it.
            distractors: number of distractors, at least 0.
            rivals: number of shapes of other classes, at least 0 and below the number of classes. They are as large as
                the shape; all shrink as their number grows. The mask contains only the shape of the class.

        Raises:
            SettingError: if a setting is out of range.
        """
        ranges = {
            "count": (count, 1, 2**63),
            "seed": (seed, 0, 2**63),
            "size": (size, _SMALLEST, 2**13),
            "distractors": (distractors, 0, 2**10),
            "rivals": (rivals, 0, len(self.categories)),
        }
        for name, (value, least, bound) in ranges.items():
            if not is_whole_number(value) or not least <= value < bound:
                raise SettingError(f"`{name}` is {value!r}, but it must be a whole number from {least} to {bound - 1}.")
        # The fingerprint uses JSON, which does not support numpy integers.
        self._count, self._seed = int(count), int(seed)
        self._scene = _Scene(int(size), int(distractors), int(rivals))

    @property
    def fingerprint(self) -> str:
        """Digest of the settings and the version of the generator."""
        scene = self._scene
        settings = [GENERATOR_VERSION, self._count, self._seed, scene.size, scene.distractors, scene.rivals]
        return f"{self._count} generated shapes, {hashlib.sha256(json.dumps(settings).encode()).hexdigest()}"

    def __len__(self) -> int:
        return self._count

    def classes(self, index: int) -> tuple[int, ...]:
        """Return the classes in image `index`: its own, then one per rival.

        Example:
            >>> GeneratedShapes(count=1000, rivals=2).classes(17)
            (7, 4, 3)
        """
        label = self._label(index)
        return _Plan.draw(self._generator(index), self._scene, label).classes

    def masks(self, index: int) -> Tensor:
        """Return the visible pixels of each shape in image `index`, boolean (1 + rivals, H, W), ordered like `classes`.

        No pixel is in two masks. The first one is that of the sample.

        Example:
            >>> shapes = GeneratedShapes(count=1000, rivals=2)
            >>> shapes.masks(17).sum(dim=(1, 2)), bool((shapes.masks(17)[0] == shapes[17].mask).all())
            (tensor([127, 125, 125]), True)
        """
        _, masks = _draw(self._generator(index), self._scene, self._label(index))
        return torch.from_numpy(masks)

    def __getitem__(self, index: int) -> Sample:
        label = self._label(index)
        picture, masks = _draw(self._generator(index), self._scene, label)
        mask = masks[0]
        # 8-bit levels hide platform differences in the last bit of cosines.
        levels = torch.from_numpy(np.rint(picture.clip(0, 1) * 255).transpose(2, 0, 1).copy())
        mean, std = (torch.tensor(values, device="cpu").reshape(-1, 1, 1) for values in (MEAN, STD))
        rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
        box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        return Sample(
            image=(levels / 255 - mean) / std,
            label=label,
            name=f"{index:06d}-{self.categories[label]}",
            boxes=torch.tensor([box], dtype=torch.float32, device="cpu"),
            mask=torch.from_numpy(mask),
        )

    def _label(self, index: int) -> int:
        if not 0 <= index < self._count:
            raise IndexError(f"`index` is {index}, but it must be from 0 to {self._count - 1}.")
        return int(index) % len(self.categories)

    def _generator(self, index: int) -> Generator:
        # A 128-bit key per image, so that neither order nor number of images matters.
        return Generator(Philox(key=np.array([self._seed, index], np.uint64)))


@dataclass(frozen=True)
class _Scene:
    """Settings of an image."""

    size: int
    distractors: int
    rivals: int


@dataclass(frozen=True)
class _Plan:
    """Sizes, places and classes of the objects in an image.

    Attributes:
        sides: sides of the objects in pixels: of the shape, its rivals, and the distractors.
        places: centres of the objects (column, row) in pixels.
        classes: classes of the shape and its rivals.
    """

    sides: Values
    places: list[tuple[float, float]]
    classes: tuple[int, ...]

    @classmethod
    def draw(cls, generator: Generator, scene: _Scene, label: int) -> "_Plan":
        """Draw the plan of an image of class `label`."""
        count = 1 + scene.rivals + scene.distractors
        sides = np.full(count, scene.size * generator.uniform(*_SIDES) / math.sqrt(1 + scene.rivals))
        sides[1 + scene.rivals :] *= generator.uniform(*_DISTRACTOR_SIDES, scene.distractors)
        places = _place(generator, sides * _REACH, scene.size)
        others = generator.permutation([index for index in range(len(SHAPE_CATEGORIES)) if index != label])
        return cls(sides, places, (label, *others[: scene.rivals].tolist()))


def _draw(generator: Generator, scene: _Scene, label: int) -> tuple[Picture, NDArray[np.bool_]]:
    """Draw an image (H, W, 3) in [0, 1] and the disjoint masks (1 + rivals, H, W) of its shape and rivals."""
    plan = _Plan.draw(generator, scene, label)
    size, count = scene.size, len(plan.sides)
    insides = [OUTLINES[SHAPE_CATEGORIES[index]] for index in plan.classes]
    insides += [_no_class(generator) for _ in range(scene.distractors)]
    palette = _Palette.draw(generator, count)
    picture = palette.backdrop(generator, size)
    _draw_lines(generator, picture, palette)
    angles = generator.uniform(0, 2 * math.pi, count)
    drawn = [
        coverage(inside, side=side, centre=place, angle=angle, size=size)
        for inside, side, place, angle in zip(insides, plan.sides.tolist(), plan.places, angles.tolist(), strict=True)
    ]
    # Back to front, so that nothing covers the shape.
    for index in reversed(range(count)):
        _paint(picture, drawn[index], palette.fill(generator, index, drawn[index], size))
    masks = np.zeros((len(plan.classes), size, size), np.bool_)
    for mask, each in zip(masks, drawn, strict=False):
        hidden = masks[:, each.rows, each.columns].any(axis=0)
        mask[each.rows, each.columns] = (each.share >= 0.5) & ~hidden
    return picture, masks


def _place(generator: Generator, radii: Values, size: int) -> list[tuple[float, float]]:
    """Place discs in the image, each at the first candidate clear of earlier discs, or else the clearest."""
    placed = np.empty((len(radii), 2))
    for index, radius in enumerate(radii):
        margin = min(radius, size / 2)
        candidates = generator.uniform(margin, size - margin, (_PLACES, 2))
        gaps = np.hypot(*(candidates[:, None] - placed[:index]).transpose(2, 0, 1)) - radii[:index] - radius
        nearest = gaps.min(axis=1, initial=0)
        placed[index] = candidates[nearest.argmax()]
    return [(float(column), float(row)) for column, row in placed]


def _no_class(generator: Generator) -> Inside:
    """Draw an outline of no class."""
    kind = generator.integers(5)
    if kind == 0:
        return bar
    if kind == 1:
        return wave
    if kind == 2:
        name = CUTTABLE[generator.integers(len(CUTTABLE))]
        return cut(OUTLINES[name], generator.uniform(0, 2 * math.pi))
    amplitudes = generator.uniform(0.3, 1, 4) * (0.3, 0.2, 0.12, 0.08)
    return blob(amplitudes, generator.uniform(0, 2 * math.pi, 4))


def _paint(picture: Picture, drawn: Coverage, fill: Picture) -> None:
    """Blend a fill into the part of the image that a shape covers."""
    window = picture[drawn.rows, drawn.columns]
    window += drawn.share[..., None] * (fill - window)


def _draw_lines(generator: Generator, picture: Picture, palette: "_Palette") -> None:
    """Draw thin lines, straight or wavy, across the whole image."""
    size = len(picture)
    for _ in range(generator.integers(2, 6)):
        x, y = _turned(generator, size, size)
        offset, bend = generator.uniform(-0.5, 0.5) * size, generator.uniform(0, 0.06) * size
        pace, phase = generator.uniform(3, 9) / size, generator.uniform(0, 2 * math.pi)
        half = generator.uniform(0.006, 0.016) * size
        away = abs(y - offset - bend * np.sin(pace * x + phase))
        share = (half + 0.5 - away).clip(0, 1)[..., None]
        picture += share * (palette.line(generator) - picture)


@dataclass(frozen=True)
class _Palette:
    """Colours of one image in Oklch (lightness, chroma, hue), with all objects distinct from the backdrop.

    Attributes:
        back: lightness of the backdrop.
        lightness: range of the objects' lightness.
        hues: hues of the objects, then of the backdrop, in turns.
    """

    back: float
    lightness: tuple[float, float]
    hues: Values

    @classmethod
    def draw(cls, generator: Generator, count: int) -> "_Palette":
        """Draw the colours of an image with `count` objects."""
        dark = generator.random() < 0.5
        back = generator.uniform(0.22, 0.42) if dark else generator.uniform(0.78, 0.92)
        lightness = (back + 0.26, 0.92) if dark else (0.34, back - 0.26)
        # Spread around the circle in random order.
        spread = generator.permutation(count + 1) + generator.uniform(-0.3, 0.3, count + 1)
        return cls(back, lightness, generator.random() + spread / (count + 1))

    def backdrop(self, generator: Generator, size: int) -> Picture:
        """Draw a smooth mixture of two colours with a faint texture."""
        smooth = _noise(generator, size, size, generator.uniform(1.5, 4))
        fine = _texture(generator, size, size, size)
        hue, other = self.hues[-1], self.hues[-1] + generator.uniform(-0.2, 0.2)
        first, second = self.back - 0.06, self.back + 0.06
        chroma = generator.uniform(0.02, 0.08, 2)
        mixture = 0.75 * smooth + 0.25 * fine
        return _mix(_colour(first, chroma[0], hue), _colour(second, chroma[1], other), mixture)

    def line(self, generator: Generator) -> Picture:
        """Draw the colour of a line, from the range of objects."""
        return _colour(generator.uniform(*self.lightness), generator.uniform(0.04, 0.14), generator.random())

    def fill(self, generator: Generator, index: int, drawn: Coverage, size: int) -> Picture:
        """Draw a texture of two colours over an object's window."""
        low, high = self.lightness
        first = generator.uniform(low, high)
        # Far enough apart for a visible texture, within the range.
        step = generator.uniform(0.12, 0.22)
        second = first + step if first + step < high else max(low, first - step)
        hue = self.hues[index]
        chroma = generator.uniform(0.07, 0.17, 2)
        other = hue + generator.uniform(-0.12, 0.12)
        height, width = drawn.share.shape
        texture = _texture(generator, height, width, size)
        return _mix(_colour(first, chroma[0], hue), _colour(second, chroma[1], other), texture)


def _colour(lightness: float, chroma: float, hue: float) -> Picture:
    """Convert an Oklch colour to sRGB in [0, 1], clipped to the gamut.

    Source: Ottosson (2020), "A perceptual color space for image processing".

    Args:
        lightness: from 0 (black) to 1 (white).
        chroma: from 0 (grey) to about 0.3.
        hue: hue in turns.
    """
    a, b = chroma * math.cos(2 * math.pi * hue), chroma * math.sin(2 * math.pi * hue)
    linear = _CONES_TO_RGB @ (_OKLAB_TO_CONES @ (lightness, a, b)) ** 3
    linear = linear.clip(0, 1)
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return curve.astype(np.float32)


_OKLAB_TO_CONES = np.array(
    [
        [1, 0.3963377774, 0.2158037573],
        [1, -0.1055613458, -0.0638541728],
        [1, -0.0894841775, -1.2914855480],
    ]
)
_CONES_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


def _mix(first: Picture, second: Picture, share: Values) -> Picture:
    """Interpolate from the first colour (`share` 0) to the second (`share` 1)."""
    mixed: Picture = first + share.astype(np.float32)[..., None] * (second - first)
    return mixed


def _texture(generator: Generator, height: int, width: int, size: int) -> Values:
    """Draw a pattern in [0, 1] over a window of the image."""
    kind = _TEXTURES[generator.integers(len(_TEXTURES))]
    return kind(generator, height, width, size)


def _flat(generator: Generator, height: int, width: int, size: int) -> Values:
    return np.full((height, width), generator.random(), np.float32)


def _gradient(generator: Generator, height: int, width: int, size: int) -> Values:
    x, _ = _turned(generator, height, width)
    return (0.5 + x / (0.4 * size)).clip(0, 1)


def _stripes(generator: Generator, height: int, width: int, size: int) -> Values:
    x, _, sharpness = _waves(generator, height, width, size)
    return (0.5 + sharpness * np.sin(x)).clip(0, 1)


def _checker(generator: Generator, height: int, width: int, size: int) -> Values:
    x, y, sharpness = _waves(generator, height, width, size)
    return (0.5 + 2 * sharpness * np.sin(x) * np.sin(y)).clip(0, 1)


def _dots(generator: Generator, height: int, width: int, size: int) -> Values:
    x, y, sharpness = _waves(generator, height, width, size)
    return (0.5 + sharpness * (np.cos(x) + np.cos(y) - 0.5)).clip(0, 1)


def _grain(generator: Generator, height: int, width: int, size: int) -> Values:
    return _noise(generator, height, width, max(height, width) / (generator.uniform(0.05, 0.1) * size))


_TEXTURES: tuple[Callable[[Generator, int, int, int], Values], ...] = (
    _flat,
    _gradient,
    _stripes,
    _checker,
    _dots,
    _grain,
)


def _turned(generator: Generator, height: int, width: int) -> tuple[Values, Values]:
    """Return pixel coordinates relative to a window's centre, rotated by a random angle."""
    angle = generator.uniform(0, 2 * math.pi)
    cosine, sine = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    x = np.arange(width, dtype=np.float32) - np.float32((width - 1) / 2)
    y = (np.arange(height, dtype=np.float32) - np.float32((height - 1) / 2))[:, None]
    return cosine * x + sine * y, cosine * y - sine * x


def _waves(generator: Generator, height: int, width: int, size: int) -> tuple[Values, Values, float]:
    """Return coordinates in radians for a random period, and the sharpness of edges one pixel wide."""
    pace = 2 * math.pi / (size * generator.uniform(0.07, 0.14))
    x, y = _turned(generator, height, width)
    phases = generator.uniform(0, 2 * math.pi, 2).astype(np.float32)
    return x * np.float32(pace) + phases[0], y * np.float32(pace) + phases[1], 1 / pace


def _noise(generator: Generator, height: int, width: int, cells: float) -> Values:
    """Draw smooth noise in [0, 1] by blending values on a grid."""
    rows, columns = (_blend(length, cells * length / max(height, width)) for length in (height, width))
    knots = generator.random((rows.shape[1], columns.shape[1])).astype(np.float32)
    noise: Values = rows @ knots @ columns.T
    return noise


def _blend(length: int, cells: float) -> Values:
    """Return each pixel's weights of the knots, shape (length, knots); they sum to 1."""
    at = np.linspace(0, cells, length, dtype=np.float32)
    near = (1 - abs(at[:, None] - np.arange(math.ceil(cells) + 1, dtype=np.float32))).clip(0, 1)
    weights: Values = near * near * (3 - 2 * near)
    return weights
