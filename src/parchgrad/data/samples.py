"""Samples of evaluation data sets: an image, its class, and where the class is visible."""

import hashlib
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from parchgrad.data.folders import PhotographFolder
from parchgrad.errors import ImageError, InputError, SettingError

__all__ = ["DrawnSamples", "LabelledImages", "Pairs", "Sample", "Samples", "as_samples"]

# Items hashed to identify a data set.
_PROBES = 64


@dataclass(frozen=True, eq=False, kw_only=True)
class Sample:
    """One image of an evaluation data set.

    Attributes:
        image: network input, shape (C, H, W).
        label: class index; None if unknown.
        name: name of the image, unique in its data set.
        boxes: boxes of objects of the class, shape (N, 4): left, top, right, bottom in pixels of `image`, right and
            bottom exclusive, so a box of the whole image is (0, 0, W, H); None if unknown.
        mask: pixels of the object, boolean, shape (H, W); None if unknown.
        group: common name of samples that are not independent, such as those of one mosaic; None for an independent
            sample.
    """

    image: Tensor
    label: int | None
    name: str
    boxes: Tensor | None = None
    mask: Tensor | None = None
    group: str | None = None


class Samples(Protocol):
    """An evaluation data set: samples by index, class names, and a digest that identifies it."""

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the classes."""

    @property
    def fingerprint(self) -> str:
        """Digest of the data and settings."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class DrawnSamples(Dataset[Sample]):
    """A random subset of a data set, in its order.

    Attributes:
        categories: names of the classes.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> pairs = TensorDataset(torch.rand(9, 3, 4, 4), torch.zeros(9, dtype=torch.long))
        >>> drawn = DrawnSamples(LabelledImages(pairs, categories=("cat",)), count=4, seed=1)
        >>> len(drawn), drawn[0].name < drawn[3].name
        (4, True)
    """

    def __init__(self, dataset: Samples, *, count: int, seed: int = 0) -> None:
        """Draw the subset without replacement.

        Args:
            dataset: the samples to draw from.
            count: number of samples.
            seed: random seed.

        Raises:
            SettingError: if `count` is not from 1 to the number of samples.
        """
        if not 1 <= count <= len(dataset):
            raise SettingError(f"`count` is {count}, but it must be from 1 to {len(dataset)}, the number of samples.")
        generator = torch.Generator().manual_seed(seed)
        self._dataset = dataset
        self._chosen = torch.randperm(len(dataset), generator=generator, device="cpu")[:count].sort().values.tolist()
        self.categories = dataset.categories

    @property
    def fingerprint(self) -> str:
        """Digest of the data set and the drawn indices."""
        described = f"{self._dataset.fingerprint} {self._chosen}"
        return f"{len(self)} drawn samples, {hashlib.sha256(described.encode()).hexdigest()}"

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Sample:
        return self._dataset[self._chosen[index]]


class Pairs(Dataset[tuple[Tensor, int | None]]):
    """Samples as (image, label) pairs, for `collect_statistics` and training loops.

    Attributes:
        fingerprint: digest of the samples.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> images = TensorDataset(torch.rand(9, 3, 4, 4), torch.zeros(9, dtype=torch.long))
        >>> image, label = Pairs(LabelledImages(images, categories=("cat",)))[2]
        >>> image.shape, label
        (torch.Size([3, 4, 4]), 0)
    """

    def __init__(self, samples: Samples) -> None:
        """Wrap any samples."""
        self._samples = samples

    @property
    def fingerprint(self) -> str:
        """Digest of the samples."""
        return self._samples.fingerprint

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int | None]:
        sample = self._samples[index]
        return sample.image, sample.label


class LabelledImages(Dataset[Sample]):
    """Samples of a data set of (image, label) pairs, such as torchvision's `ImageFolder` and `CIFAR10`, or of images.

    Images without labels can be explained for their predicted class. A sample's name is its file if known, else its
    index.

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
        """Take the class names from `dataset.classes`, also through a `Subset`.

        Args:
            dataset: map-style data set of an image (C, H, W) and a class index, or of images alone.
            categories: names of the classes, if the data set has none; empty for images without labels.

        Raises:
            SettingError: if the data set has no length or no class names.
        """
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise SettingError(
                f"{type(dataset).__name__} has no length or no items by index. Pass a map-style data set."
            )
        whole: Any = dataset
        while isinstance(whole, Subset):
            whole = whole.dataset
        found = categories if categories is not None else getattr(whole, "classes", ())
        if isinstance(found, str) or (not found and categories is None):
            raise SettingError(f"{type(whole).__name__} has no class names. Pass `categories=`.")
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
        if isinstance(item, Tensor):
            item = (item, None)
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise InputError(f"Item {index} is not an image or an (image, label) pair. Pass a data set of these.")
        image, label = item
        if not isinstance(image, Tensor):
            raise ImageError(
                f"The image of item {index} is of type {type(image).__name__}, but must be a tensor. Add a transform "
                "such as ToTensor()."
            )
        if image.dim() != 3 or not image.is_floating_point():
            raise ImageError(
                f"The image of item {index} has shape {tuple(image.shape)} and dtype {image.dtype}, but must be "
                "floating-point of shape (C, H, W). Add a transform such as ToTensor()."
            )
        label = None if label is None else self._label(index, label)
        return Sample(image=image, label=label, name=_name(self._dataset, index))

    def _label(self, index: int, label: Any) -> int:
        try:
            found = operator.index(label)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"The label of item {index} is {label!r:.40}, but it must be a class index.") from error
        if not 0 <= found < len(self.categories):
            raise InputError(
                f"The label of item {index} is {found}, but there are {len(self.categories)} classes. Name all of "
                "them in `categories=`."
            )
        return found


def as_samples(data: Any) -> Samples:
    """Return samples of any data set of images: samples themselves, or those of `LabelledImages`.

    Raises:
        SettingError: if the data set has no length, no items by index or no class names.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from torchvision.datasets import ImageFolder
        >>> from torchvision.transforms import ToTensor
        >>> with tempfile.TemporaryDirectory() as root:
        ...     Path(root, "cat").mkdir()
        ...     Image.new("RGB", (4, 4)).save(Path(root, "cat", "a.png"))
        ...     as_samples(ImageFolder(root, ToTensor()))[0].name
        'cat/a.png'
    """
    if all(hasattr(data, name) for name in ("__len__", "__getitem__", "categories", "fingerprint")):
        found: Samples = data
        return found
    whole = data
    while isinstance(whole, Subset):
        whole = whole.dataset
    if not hasattr(whole, "classes"):
        raise SettingError(
            f"`data` is of type {type(data).__name__}, but it must have labels, categories and a fingerprint. Wrap a "
            "data set of (image, label) pairs in parchgrad.data.samples.LabelledImages."
        )
    # Empty for images without labels.
    return LabelledImages(data, categories=tuple(whole.classes))


def _name(dataset: Any, index: int) -> str:
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, int(dataset.indices[index])
    if isinstance(dataset, PhotographFolder):
        return dataset.files[index].relative_to(dataset.root).as_posix()
    # As in the image folders of torchvision, which is not needed otherwise.
    entries = getattr(dataset, "samples", None)
    if isinstance(entries, list) and isinstance(entries[index], tuple) and hasattr(dataset, "root"):
        return Path(entries[index][0]).relative_to(dataset.root).as_posix()
    return str(index)
