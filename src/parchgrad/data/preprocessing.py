"""Convert images to network inputs and back."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from parchgrad.data.images import check_proportions, to_rgb
from parchgrad.errors import InputError, SettingError

__all__ = ["Preprocessing", "as_preprocessing"]


@dataclass(frozen=True)
class Preprocessing:
    """Converts an image to a network's input, and an input back to an image.

    Attributes:
        transform: resizes, crops, scales to [0, 1] and normalises a PIL image to a tensor (3, H, W).
        mean: mean per colour channel that the transform subtracts, in units of [0, 1].
        std: standard deviation per colour channel that the transform divides by.
    """

    transform: Callable[[Image.Image], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def description(self) -> str:
        """The transform on one line, for metadata."""
        return " ".join(str(self.transform).split())

    def __call__(self, image: Image.Image) -> Tensor:
        """Preprocess one image of any mode to a tensor (3, H, W), or (1, H, W) if the transform is grey.

        Raises:
            ImageError: if the image has no pixels, or is more than a thousand times as long as wide.
        """
        check_proportions(image)
        return self.transform(to_rgb(image))

    def picture(self, inputs: Tensor) -> NDArray[Any]:
        """Undo the normalisation of an input (3, H, W) and return an array (H, W, 3) in [0, 1].

        A single channel becomes a grey image.

        Raises:
            InputError: if the input is not a single one.
        """
        if inputs.dim() != 3:
            raise InputError(
                f"`inputs` has shape {tuple(inputs.shape)}, but it must be (3, H, W). Pass one input of the batch."
            )
        mean, std = (torch.tensor(values, device="cpu").reshape(-1, 1, 1) for values in (self.mean, self.std))
        restored = (inputs.detach().float().cpu() * std + mean).clamp(0, 1)
        picture: NDArray[Any] = restored.expand(3, *restored.shape[1:]).permute(1, 2, 0).numpy()
        return picture


def as_preprocessing(transform: Any) -> Preprocessing:
    """Read the preprocessing of torchvision, timm or Hugging Face, with the mean and deviation that it normalises by.

    Args:
        transform: a `Preprocessing`; `weights.transforms()` of torchvision; a composition of transforms of torchvision
            or timm; or an image processor of Hugging Face.

    Raises:
        SettingError: if `transform` is none of these.

    Example:
        >>> from torchvision import transforms
        >>> steps = [transforms.ToTensor(), transforms.Normalize((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))]
        >>> as_preprocessing(transforms.Compose(steps)).mean
        (0.5, 0.4, 0.3)
    """
    if isinstance(transform, Preprocessing):
        return transform
    if hasattr(transform, "image_mean") and hasattr(transform, "image_std"):
        return Preprocessing(_Processor(transform), _floats(transform.image_mean), _floats(transform.image_std))
    found = [step for step in _steps(transform) if hasattr(step, "mean") and hasattr(step, "std")]
    if found:
        # The last one normalises what the network sees.
        return Preprocessing(transform, _floats(found[-1].mean), _floats(found[-1].std))
    if not callable(transform):
        raise SettingError(
            f"`preprocess` is of type {type(transform).__name__}, but it must turn a PIL image into a tensor. Pass "
            "weights.transforms(), a composition of transforms or an image processor."
        )
    raise SettingError(
        f"`preprocess` is of type {type(transform).__name__}, from which mean and deviation cannot be read. Pass "
        "parchgrad.data.preprocessing.Preprocessing(transform, mean, std), with 0 and 1 if it does not normalise."
    )


def _steps(transform: Any) -> list[Any]:
    """A transform and all those that it consists of."""
    parts = transform.transforms if hasattr(transform, "transforms") else transform
    inner = parts if isinstance(parts, nn.Sequential | nn.ModuleList | list | tuple) else ()
    return [transform, *(step for part in inner for step in _steps(part))]


@dataclass(frozen=True)
class _Processor:
    """An image processor of Hugging Face as a function of one image."""

    processor: Any

    def __call__(self, image: Image.Image) -> Tensor:
        pixels: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels


def _floats(values: Iterable[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
