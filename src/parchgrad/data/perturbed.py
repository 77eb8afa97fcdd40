"""Harder evaluation data: shuffled, blurred or noisy images with matching boxes and masks."""

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from parchgrad._io.checks import check_whole_number
from parchgrad._io.extras import needs_extra
from parchgrad.data.samples import Sample, Samples
from parchgrad.errors import InputError, SettingError

__all__ = ["Blur", "Jigsaw", "PerturbedMNIST"]

# Cut the Gaussian off at this many standard deviations, as scipy does.
_TRUNCATE = 4.0


@dataclass(frozen=True, eq=False)
class _Perturbed(Dataset[Sample], ABC):
    """Samples of another data set, each changed depending only on its index and the settings."""

    dataset: Samples

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.dataset.categories

    @property
    def fingerprint(self) -> str:
        """Digest of the settings and of the underlying data set."""
        settings = [(item.name, getattr(self, item.name)) for item in fields(self) if item.name != "dataset"]
        digest = hashlib.sha256(repr((type(self).__name__, settings, self.dataset.fingerprint)).encode())
        return f"{len(self)} images after {type(self).__name__}, {digest.hexdigest()}"

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        return self._change(self.dataset[index], index)

    @abstractmethod
    def _change(self, sample: Sample, index: int) -> Sample:
        """Change one sample."""


@dataclass(frozen=True, eq=False)
class Jigsaw(_Perturbed):
    """Cut each image into cells and swap some of them, together with mask and boxes.

    Boxes are split at the cells. If every cell ends up in its place, the sample is unchanged.

    Attributes:
        dataset: the samples; the grid must divide their height and width.
        grid: number of rows and of columns of cells.
        shuffles: number of random swaps of two different cells; one swap may undo another.
        seed: random seed; the swaps depend only on it and the index.

    Raises:
        SettingError: if a setting is out of range.
        InputError: from an item that the grid does not divide.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> from parchgrad.data.samples import LabelledImages
        >>> pairs = TensorDataset(torch.arange(4.0).reshape(1, 1, 2, 2), torch.tensor([0]))
        >>> Jigsaw(LabelledImages(pairs, categories=("cat",)), grid=2, shuffles=1)[0].image
        tensor([[[3., 1.],
                 [2., 0.]]])
    """

    grid: int = field(kw_only=True)
    shuffles: int = field(kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        check_whole_number("grid", self.grid, 1)
        check_whole_number("shuffles", self.shuffles, 0)
        check_whole_number("seed", self.seed, 0)
        if self.grid == 1 and self.shuffles:
            raise SettingError(
                f"`shuffles` is {self.shuffles}, but a grid of one cell cannot be shuffled. Use `grid=2` or more."
            )

    def _change(self, sample: Sample, index: int) -> Sample:
        height, width = sample.image.shape[-2:]
        if height % self.grid or width % self.grid:
            raise InputError(
                f"`grid` is {self.grid}, which does not divide the {width} x {height} pixels of {sample.name!r}. "
                "Choose another grid."
            )
        generator, cells = _generator(self.seed, index), self.grid**2
        order = list(range(cells))
        for _ in range(self.shuffles):
            one, two = torch.randperm(cells, generator=generator, device="cpu")[:2].tolist()
            order[one], order[two] = order[two], order[one]
        if order == sorted(order):
            return sample
        return replace(
            sample,
            image=_rearrange(sample.image, order, self.grid),
            boxes=None if sample.boxes is None else self._pieces(sample.boxes, order, width, height),
            mask=None if sample.mask is None else _rearrange(sample.mask, order, self.grid),
        )

    def _pieces(self, boxes: Tensor, order: list[int], width: int, height: int) -> Tensor:
        """Cut boxes (N, 4) at the cells and move the pieces with them, shape (P, 4)."""
        place = torch.arange(len(order), device=boxes.device)
        cell = boxes.new_tensor((width // self.grid, height // self.grid))
        corners = torch.stack([place % self.grid, place // self.grid], dim=1) * cell
        source = corners[torch.tensor(order, device=boxes.device)]
        start = torch.maximum(boxes[:, None, :2], source)
        end = torch.minimum(boxes[:, None, 2:], source + cell)
        moved = torch.cat([start, end], dim=2) + (corners - source).repeat(1, 2)
        return moved[(end > start).all(dim=2)]


@dataclass(frozen=True, eq=False)
class Blur(_Perturbed):
    """Blur each image with a Gaussian; boxes and mask are unchanged.

    Images are mirrored at their edges. A blur below an eighth of a pixel has no effect.

    Attributes:
        dataset: the samples.
        magnitude: standard deviation of the Gaussian in pixels, from 0 (no blur).

    Raises:
        SettingError: if the magnitude is negative or not finite.
        InputError: from an item smaller than four standard deviations.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> from parchgrad.data.samples import LabelledImages
        >>> pairs = TensorDataset(torch.eye(5).reshape(1, 1, 5, 5), torch.tensor([0]))
        >>> Blur(LabelledImages(pairs, categories=("cat",)), magnitude=0.5)[0].image[0, 2]
        tensor([0.0233, 0.1675, 0.6414, 0.1675, 0.0233])
    """

    magnitude: float = field(kw_only=True)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.magnitude) and self.magnitude >= 0):
            raise SettingError(
                f"`magnitude` is {self.magnitude}, but it must be a finite number of pixels, at least 0."
            )

    def _change(self, sample: Sample, index: int) -> Sample:
        radius = int(_TRUNCATE * self.magnitude + 0.5)
        if radius == 0:
            return sample
        if radius >= min(sample.image.shape[-2:]):
            raise InputError(
                f"`magnitude` is {self.magnitude}, too large for {sample.name!r} of shape "
                f"{tuple(sample.image.shape)}. Choose a smaller one."
            )
        # Two one-dimensional passes are cheaper than a two-dimensional one.
        size, sigma = 2 * radius + 1, [float(self.magnitude)] * 2
        with needs_extra("models"):
            from torchvision.transforms.functional import gaussian_blur
        return replace(sample, image=gaussian_blur(gaussian_blur(sample.image, [size, 1], sigma), [1, size], sigma))


@dataclass(frozen=True, eq=False)
class PerturbedMNIST(_Perturbed):
    """Place each digit at random on a larger canvas of noise.

    Noise is uniform in [0, epsilon] and shows where the digit is dark: `digit + (1 - digit) * noise`. The mask marks
    all nonzero pixels of the digit, and the box is tight around them. Position and noise pattern do not depend on
    epsilon.

    Attributes:
        dataset: samples of digits in [0, 1] on a background of 0, such as MNIST with `ToTensor()`.
        epsilon: noise strength in [0, 1].
        canvas: width and height of the canvas in pixels.
        seed: random seed; position and noise depend only on it and the index.

    Raises:
        SettingError: if a setting is out of range.
        InputError: from an item without a digit on a background of 0, or larger than the canvas.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> from parchgrad.data.samples import LabelledImages
        >>> tile = torch.zeros(1, 1, 3, 3)
        >>> tile[..., 1, :2] = 1
        >>> digits = LabelledImages(TensorDataset(tile, torch.tensor([0])), categories=("dash",))
        >>> sample = PerturbedMNIST(digits, epsilon=0.0, canvas=8)[0]
        >>> left, top, right, bottom = sample.boxes[0].int().tolist()
        >>> right - left, bottom - top, sample.image[0, top, left:right].tolist()
        (2, 1, [1.0, 1.0])
    """

    epsilon: float = field(kw_only=True)
    canvas: int = field(kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 1:
            raise SettingError(f"`epsilon` is {self.epsilon}, but it must be in [0, 1].")
        check_whole_number("canvas", self.canvas, 1)
        check_whole_number("seed", self.seed, 0)

    def _change(self, sample: Sample, index: int) -> Sample:
        tile = sample.image
        channels, height, width = tile.shape
        if max(height, width) > self.canvas:
            raise InputError(
                f"`canvas` is {self.canvas}, but {sample.name!r} has {width} x {height} pixels. Enlarge it."
            )
        touched = (tile > 0).any(dim=0)
        if not bool(((tile >= 0) & (tile <= 1)).all()) or not bool(touched.any()) or bool(touched.all()):
            raise InputError(
                f"{sample.name!r} is not a digit in [0, 1] on a background of 0. Use digits without normalisation."
            )
        generator = _generator(self.seed, index)
        top = int(torch.randint(self.canvas - height + 1, (), generator=generator, device="cpu"))
        left = int(torch.randint(self.canvas - width + 1, (), generator=generator, device="cpu"))
        noise = self.epsilon * torch.rand(channels, self.canvas, self.canvas, generator=generator, device="cpu")
        image = noise.to(tile)
        under = image[:, top : top + height, left : left + width]
        under.copy_(tile + (1 - tile) * under)
        mask = torch.zeros(self.canvas, self.canvas, dtype=torch.bool, device=tile.device)
        mask[top : top + height, left : left + width] = touched
        rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        boxes = torch.stack(edges).to(torch.float32).unsqueeze(0)
        return replace(sample, image=image, boxes=boxes, mask=mask)


def _rearrange(picture: Tensor, order: list[int], grid: int) -> Tensor:
    """Move cell `order[place]` of an image (*, H, W) to each place, row by row."""
    *front, height, width = picture.shape
    cell = (height // grid, width // grid)
    cells = picture.reshape(*front, grid, cell[0], grid, cell[1]).movedim(-2, -3)
    placed = cells.reshape(*front, grid**2, *cell)[..., order, :, :]
    return placed.reshape(*front, grid, grid, *cell).movedim(-3, -2).reshape(picture.shape)


def _generator(seed: int, index: int) -> torch.Generator:
    """Return a generator for one item, independent of other items and seeds."""
    state = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
