"""Map boxes of an image to the network's input, by the geometry of the preprocessing steps."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from parchgrad._io.extras import needs_extra
from parchgrad.data.preprocessing import Preprocessing
from parchgrad.errors import SettingError

with needs_extra("models"):
    from timm.data import transforms as timm_transforms
    from torchvision import transforms
    from torchvision.transforms import v2
    from torchvision.transforms._presets import ImageClassification

__all__ = ["Placement", "find_placement", "turn_boxes"]

_CONTAINERS = (transforms.Compose, v2.Compose, nn.Sequential)
_RESIZES = (transforms.Resize, v2.Resize)
_CENTRE_CROPS = (transforms.CenterCrop, v2.CenterCrop, timm_transforms.CenterCropOrPad)

# Steps that leave the geometry unchanged, and their packages; by name, since not every version has them all.
_NEUTRAL = {
    "ConvertImageDtype",
    "Grayscale",
    "Identity",
    "MaybePILToTensor",
    "MaybeToTensor",
    "Normalize",
    "PILToTensor",
    "RGB",
    "ToDtype",
    "ToImage",
    "ToPureTensor",
    "ToTensor",
}
_PACKAGES = {"timm", "torch", "torchvision"}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Map from points of an image to points of the network's input: `scale * point + shift` along each axis.

    Points lie between pixels: (0, 0) is the top left corner of the first pixel.

    Attributes:
        scale: input pixels per image pixel, (x, y).
        shift: position of the image's top left corner in the input, in pixels, (x, y).
        width: width of the input in pixels.
        height: height of the input in pixels.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    shift: tuple[float, float] = (0.0, 0.0)
    width: int
    height: int

    def carry(self, boxes: Tensor) -> Tensor:
        """Map boxes of the image into the input and clip them; drop boxes outside of the crop.

        Args:
            boxes: left, top, right, bottom in image pixels, right and bottom exclusive, shape (N, 4).

        Returns:
            Boxes in input pixels, shape (M, 4) with M <= N, in the same order, dtype and device.

        Example:
            >>> half = Placement(scale=(0.5, 0.5), shift=(-10.0, 0.0), width=80, height=100)
            >>> half.carry(torch.tensor([[40.0, 20.0, 60.0, 300.0], [0.0, 0.0, 20.0, 20.0]]))
            tensor([[ 10.,  10.,  20., 100.]])
        """
        # In float64, so that rounding does not move a box edge across the edge of the crop.
        carried = boxes.double() * boxes.new_tensor(self.scale * 2, dtype=torch.float64)
        carried += boxes.new_tensor(self.shift * 2, dtype=torch.float64)
        limits = boxes.new_tensor((self.width, self.height) * 2, dtype=torch.float64)
        clipped = torch.minimum(carried.clamp(min=0), limits)
        return clipped[(clipped[:, 2:] > clipped[:, :2]).all(dim=1)].to(boxes)


def find_placement(transform: Callable[[Image.Image], Tensor], *, width: int, height: int) -> Placement:
    """Find where a preprocessing places an image of a given size, with its library's rounding.

    Supports torchvision's presets, `Resize` and `CenterCrop` of torchvision, `ResizeKeepRatio` and `CenterCropOrPad`
    of timm, steps that keep the geometry, and any composition of these.

    Args:
        transform: a preprocessing, such as `Classifier.preprocess`.
        width: width of the image in pixels.
        height: height of the image in pixels.

    Raises:
        SettingError: if a step is not supported.

    Example:
        >>> find_placement(ImageClassification(crop_size=224, resize_size=256), width=512, height=512)
        Placement(scale=(0.5, 0.5), shift=(-16.0, -16.0), width=224, height=224)
    """
    placement = Placement(width=width, height=height)
    for step in _steps(transform):
        placement = _follow(placement, step)
    return placement


def turn_boxes(boxes: Tensor, *, orientation: int, width: int, height: int) -> Tensor:
    """Rotate and flip boxes of an image's stored pixels as `read_image` does with the image.

    Args:
        boxes: left, top, right, bottom in stored pixels, right and bottom exclusive, shape (N, 4).
        orientation: the EXIF orientation, 1 to 8.
        width: stored width in pixels.
        height: stored height in pixels.

    Source: CIPA DC-008 (Exif 2.32), tag 0x0112.

    Example:
        >>> turn_boxes(torch.tensor([[0.0, 0.0, 3.0, 1.0]]), orientation=6, width=4, height=2)
        tensor([[1., 0., 2., 3.]])
    """
    across, down = boxes[:, 0::2], boxes[:, 1::2]
    if orientation >= 5:
        across, down, width, height = down, across, height, width
    if orientation in (2, 3, 6, 7):
        across = width - across.flip(1)
    if orientation in (3, 4, 7, 8):
        down = height - down.flip(1)
    return torch.stack([across, down], dim=2).flatten(1)


def _steps(transform: Any) -> Iterator[Any]:
    """Yield the steps of a transform in order. Compare types exactly: a subclass may behave differently."""
    if type(transform) is Preprocessing:
        yield from _steps(transform.transform)
    elif type(transform) is ImageClassification:
        yield transforms.Resize(transform.resize_size)
        yield transforms.CenterCrop(transform.crop_size)
    elif type(transform) in _CONTAINERS:
        for step in getattr(transform, "transforms", transform):
            yield from _steps(step)
    else:
        yield transform


def _follow(placement: Placement, step: Any) -> Placement:
    """Return the placement after one more step."""
    kind, width, height = type(step), placement.width, placement.height
    if kind.__name__ in _NEUTRAL and kind.__module__.partition(".")[0] in _PACKAGES:
        return placement
    if kind in _RESIZES:
        # The size does not depend on the interpolation, and this one is the cheapest.
        nearest = transforms.InterpolationMode.NEAREST
        return _stretch(placement, kind(step.size, interpolation=nearest, max_size=step.max_size))
    if kind is timm_transforms.ResizeKeepRatio and step.random_scale_prob == step.random_aspect_prob == 0:
        return _stretch(placement, step)
    if kind in _CENTRE_CROPS:
        down, across = step.size
        if (across > width and placement.shift[0] < 0) or (down > height and placement.shift[1] < 0):
            # Boxes would reach from the cropped part into the padding.
            raise SettingError(
                "Cannot map boxes through a preprocessing that crops the image and then pads it. Crop once."
            )
        shift = (placement.shift[0] + _centre(width, across), placement.shift[1] + _centre(height, down))
        return replace(placement, shift=shift, width=across, height=down)
    raise SettingError(
        f"Cannot map boxes through the preprocessing step {kind.__name__}. Preprocess with Resize and CenterCrop, as "
        "torchvision and timm do for evaluation."
    )


def _stretch(placement: Placement, resize: Callable[[Image.Image], Image.Image]) -> Placement:
    """Return the placement after a resize, which maps the full extent of the image onto the new size."""
    width, height = resize(Image.new("1", (placement.width, placement.height))).size
    across, down = width / placement.width, height / placement.height
    (scale_x, scale_y), (shift_x, shift_y) = placement.scale, placement.shift
    return Placement(
        scale=(scale_x * across, scale_y * down), shift=(shift_x * across, shift_y * down), width=width, height=height
    )


def _centre(length: int, crop: int) -> int:
    """Return the shift of a centre crop along an axis; positive where it pads a smaller image."""
    return (crop - length) // 2 if crop > length else -round((length - crop) / 2)
