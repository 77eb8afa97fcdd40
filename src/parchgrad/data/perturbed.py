"""Evaluation data made harder: shuffled, blurred, or lost in noise, each with where the object then is."""

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import gaussian_blur

from parchgrad.checks import check_whole_number
from parchgrad.data.samples import Sample, Samples
from parchgrad.errors import InputError, SettingError

__all__ = ["Blur", "Jigsaw", "PerturbedMNIST"]

# Beyond this many standard deviations a Gaussian is cut off, as in scipy.
_TRUNCATE = 4.0


@dataclass(frozen=True, eq=False)
class _Perturbed(Dataset[Sample], ABC):
    """Samples of another data set, each changed by its index and the settings alone."""

    dataset: Samples

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.dataset.categories

    @property
    def fingerprint(self) -> str:
        """Digest of the settings and of the data set that is changed."""
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
    """Cut each image into cells and swap some of them; mask and boxes go with the cells.

    A box becomes the boxes of its pieces, box by box. Where no cell ends elsewhere, the sample stays as it was.

    Attributes:
        dataset: the samples; the grid must divide their height and width.
        grid: number of rows and of columns of cells.
        shuffles: how often two different cells change places, drawn at random; one swap may undo another.
        seed: of the draws, which depend on it and the index alone.

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
            raise SettingError(f"A grid of one cell cannot be shuffled {self.shuffles} times; take grid=2 or more.")

    def _change(self, sample: Sample, index: int) -> Sample:
        height, width = sample.image.shape[-2:]
        if height % self.grid or width % self.grid:
            raise InputError(
                f"A grid of {self.grid} x {self.grid} cells does not divide the {width} x {height} pixels of "
                f"{sample.name!r}; take another grid."
            )
        generator, cells = _generator(self.seed, index), self.grid**2
        order = list(range(cells))
        for _ in range(self.shuffles):
            one, two = torch.randperm(cells, generator=generator)[:2].tolist()
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
    """Blur each image with a Gaussian; boxes and mask stay.

    The image is mirrored beyond its edges. A blur below an eighth of a pixel changes nothing in floating point.

    Attributes:
        dataset: the samples.
        magnitude: standard deviation of the Gaussian in pixels, from 0 (no blur).

    Raises:
        SettingError: if the magnitude is negative or not finite.
        InputError: from an item that is smaller than four standard deviations.

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
            raise SettingError(f"magnitude is {self.magnitude}, but it must be a finite number of pixels from 0.")

    def _change(self, sample: Sample, index: int) -> Sample:
        radius = int(_TRUNCATE * self.magnitude + 0.5)
        if radius == 0:
            return sample
        if radius >= min(sample.image.shape[-2:]):
            raise InputError(
                f"A blur of {self.magnitude} pixels reaches beyond {sample.name!r} of shape "
                f"{tuple(sample.image.shape)}; take a smaller magnitude."
            )
        # One axis after the other, at a cost of the width of the Gaussian instead of its area.
        size, sigma = 2 * radius + 1, [float(self.magnitude)] * 2
        return replace(sample, image=gaussian_blur(gaussian_blur(sample.image, [size, 1], sigma), [1, size], sigma))


@dataclass(frozen=True, eq=False)
class PerturbedMNIST(_Perturbed):
    """Put each digit at a random place of a larger canvas of noise.

    Noise is uniform in [0, epsilon] and shows through where the digit is dark: `digit + (1 - digit) * noise`. The box
    is tight around all pixels that the digit touches, which the mask marks. Place and pattern of the noise are the
    same for every epsilon.

    Attributes:
        dataset: samples of digits in [0, 1] on a background of 0, as MNIST with `ToTensor()` gives them.
        epsilon: strength of the noise, in [0, 1].
        canvas: width and height of the canvas, in pixels.
        seed: of place and noise, which depend on it and the index alone.

    Raises:
        SettingError: if a setting is out of range.
        InputError: from an item that holds no digit on a background of 0, or is larger than the canvas.

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
            raise SettingError(f"epsilon is {self.epsilon}, but it must be in [0, 1].")
        check_whole_number("canvas", self.canvas, 1)
        check_whole_number("seed", self.seed, 0)

    def _change(self, sample: Sample, index: int) -> Sample:
        tile = sample.image
        channels, height, width = tile.shape
        if max(height, width) > self.canvas:
            raise InputError(
                f"{sample.name!r} has {width} x {height} pixels, more than the canvas of {self.canvas}; enlarge it."
            )
        touched = (tile > 0).any(dim=0)
        if not bool(((tile >= 0) & (tile <= 1)).all()) or not bool(touched.any()) or bool(touched.all()):
            raise InputError(
                f"{sample.name!r} holds no digit in [0, 1] on a background of 0; give digits that are not normalised."
            )
        generator = _generator(self.seed, index)
        top = int(torch.randint(self.canvas - height + 1, (), generator=generator))
        left = int(torch.randint(self.canvas - width + 1, (), generator=generator))
        noise = self.epsilon * torch.rand(channels, self.canvas, self.canvas, generator=generator)
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
    """Put cell `order[place]` of a picture (*, H, W) to each place, row by row."""
    *front, height, width = picture.shape
    cell = (height // grid, width // grid)
    cells = picture.reshape(*front, grid, cell[0], grid, cell[1]).movedim(-2, -3)
    placed = cells.reshape(*front, grid**2, *cell)[..., order, :, :]
    return placed.reshape(*front, grid, grid, *cell).movedim(-3, -2).reshape(picture.shape)


def _generator(seed: int, index: int) -> torch.Generator:
    """A generator for one item, far from those of its neighbours and of other seeds."""
    state = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
