"""What an evaluation data set holds: an image, its class, and where the class is seen."""

import hashlib
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.datasets import DatasetFolder

from parchgrad.data.folders import PhotographFolder
from parchgrad.errors import ImageError, InputError, SettingError

__all__ = ["DrawnSamples", "LabelledImages", "Pairs", "Sample", "Samples"]

# Items whose content tells a data set from another.
_PROBES = 64


@dataclass(frozen=True, eq=False, kw_only=True)
class Sample:
    """One image of an evaluation data set.

    Attributes:
        image: what the network takes, shape (C, H, W).
        label: class index.
        name: tells the image from the others of its data set.
        boxes: where objects of the class are, shape (N, 4): left, top, right, bottom in pixels of `image`, right and
            bottom exclusive, so that a box of the whole image is (0, 0, W, H); None where nothing is known.
        mask: pixels of the object, boolean, shape (H, W); None where nothing is known.
        group: name that samples share which are not independent of each other, as those of one mosaic; None for a
            sample of its own.
    """

    image: Tensor
    label: int
    name: str
    boxes: Tensor | None = None
    mask: Tensor | None = None
    group: str | None = None


class Samples(Protocol):
    """An evaluation data set: samples by index, the names of their classes, and a digest that tells it from others."""

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the classes."""

    @property
    def fingerprint(self) -> str:
        """A digest; another one means other data or settings."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class DrawnSamples(Dataset[Sample]):
    """Some samples of a data set, drawn at random, each once, in the order of the data set.

    Attributes:
        categories: those of the data set.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> pairs = TensorDataset(torch.rand(9, 3, 4, 4), torch.zeros(9, dtype=torch.long))
        >>> drawn = DrawnSamples(LabelledImages(pairs, categories=("cat",)), count=4, seed=1)
        >>> len(drawn), drawn[0].name < drawn[3].name
        (4, True)
    """

    def __init__(self, dataset: Samples, *, count: int, seed: int = 0) -> None:
        """Draw.

        Args:
            dataset: what is drawn from.
            count: how many samples.
            seed: of the draw.

        Raises:
            SettingError: if there are not as many.
        """
        if not 1 <= count <= len(dataset):
            raise SettingError(f"{count} samples cannot be drawn from {len(dataset)}; choose a count from 1 to that.")
        generator = torch.Generator().manual_seed(seed)
        self._dataset = dataset
        self._chosen = torch.randperm(len(dataset), generator=generator)[:count].sort().values.tolist()
        self.categories = dataset.categories

    @property
    def fingerprint(self) -> str:
        """Digest of the data set and of which samples were drawn."""
        described = f"{self._dataset.fingerprint} {self._chosen}"
        return f"{len(self)} drawn samples, {hashlib.sha256(described.encode()).hexdigest()}"

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Sample:
        return self._dataset[self._chosen[index]]


class Pairs(Dataset[tuple[Tensor, int]]):
    """Samples as the pairs (image, label) that `collect_statistics` and training loops take.

    Attributes:
        fingerprint: that of the samples.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> images = TensorDataset(torch.rand(9, 3, 4, 4), torch.zeros(9, dtype=torch.long))
        >>> image, label = Pairs(LabelledImages(images, categories=("cat",)))[2]
        >>> image.shape, label
        (torch.Size([3, 4, 4]), 0)
    """

    def __init__(self, samples: Samples) -> None:
        """Take any samples."""
        self._samples = samples

    @property
    def fingerprint(self) -> str:
        """Digest of the samples."""
        return self._samples.fingerprint

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        sample = self._samples[index]
        return sample.image, sample.label


class LabelledImages(Dataset[Sample]):
    """Samples of a data set of pairs (image, label), as torchvision's `ImageFolder`, `CIFAR10` and `MNIST` are.

    A sample is named by its file where the data set knows it, else by its index.

    Attributes:
        categories: names of the classes.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> pairs = TensorDataset(torch.rand(5, 3, 4, 4), torch.tensor([0, 1, 1, 0, 1]))
        >>> samples = LabelledImages(pairs, categories=("cat", "dog"))
        >>> samples[2].label, samples[2].name
        (1, '2')
    """

    def __init__(self, dataset: Dataset[Any], *, categories: tuple[str, ...] | None = None) -> None:
        """Take the class names from `dataset.classes`, or from that of the data set which it is a `Subset` of.

        Args:
            dataset: gives pairs of an image (C, H, W) and a class index, and knows its length.
            categories: names of the classes, where the data set has none.

        Raises:
            SettingError: if the data set has no length, or its classes no names.
        """
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise SettingError(
                f"{type(dataset).__name__} has no length or no items by index; give a map-style data set."
            )
        whole: Any = dataset
        while isinstance(whole, Subset):
            whole = whole.dataset
        found = categories if categories is not None else getattr(whole, "classes", ())
        if isinstance(found, str) or not found:
            raise SettingError(f"{type(whole).__name__} does not tell the names of its classes; give categories=.")
        self._dataset: Any = dataset
        self.categories = tuple(str(category) for category in found)

    @property
    def fingerprint(self) -> str:
        """Digest of the length, the classes, and up to 64 items spread over the data set."""
        digest = hashlib.sha256(repr(self.categories).encode())
        count = min(_PROBES, len(self))
        for probe in range(count):
            sample = self[probe * (len(self) - 1) // max(1, count - 1)]
            digest.update(repr((sample.name, sample.label, tuple(sample.image.shape), sample.image.dtype)).encode())
            digest.update(sample.image.detach().cpu().double().contiguous().numpy().tobytes())
        return f"{len(self)} labelled images, {digest.hexdigest()}"

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        item = self._dataset[index]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise InputError(f"Item {index} is no pair of an image and a label; give a data set of such pairs.")
        image, label = item
        if not isinstance(image, Tensor):
            raise ImageError(
                f"The image of item {index} is of type {type(image).__name__}, no tensor; give the data set a "
                "transform that makes tensors, as ToTensor() does."
            )
        if image.dim() != 3 or not image.is_floating_point():
            raise ImageError(
                f"The image of item {index} has shape {tuple(image.shape)} and {image.dtype}, but floating-point "
                "numbers of shape (C, H, W) are needed; add a transform, as ToTensor() is."
            )
        return Sample(image=image, label=self._label(index, label), name=_name(self._dataset, index))

    def _label(self, index: int, label: Any) -> int:
        try:
            found = operator.index(label)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"The label of item {index} is {label!r:.40}, but a class index is needed.") from error
        if not 0 <= found < len(self.categories):
            raise InputError(
                f"The label of item {index} is {found}, but there are {len(self.categories)} classes; give the names "
                "of all of them."
            )
        return found


def _name(dataset: Any, index: int) -> str:
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, int(dataset.indices[index])
    if isinstance(dataset, PhotographFolder):
        return dataset.files[index].relative_to(dataset.root).as_posix()
    if isinstance(dataset, DatasetFolder):
        return Path(dataset.samples[index][0]).relative_to(dataset.root).as_posix()
    return str(index)
