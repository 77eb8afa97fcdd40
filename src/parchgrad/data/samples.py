"""What an evaluation data set holds: an image, its class, and where the class is seen."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Sample"]


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
    """

    image: Tensor
    label: int
    name: str
    boxes: Tensor | None = None
    mask: Tensor | None = None
