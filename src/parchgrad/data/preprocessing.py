"""Convert images to network inputs and back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from parchgrad.data.images import check_proportions, to_rgb
from parchgrad.errors import InputError

__all__ = ["Preprocessing"]


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
