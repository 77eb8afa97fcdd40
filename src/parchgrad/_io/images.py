"""Convert images to bytes and data URLs."""

import base64
import io
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["data_url", "to_bytes"]


def to_bytes(picture: NDArray[Any]) -> NDArray[np.uint8]:
    """Convert an image with values in [0, 1] to bytes.

    Example:
        >>> to_bytes(np.array([0.0, 0.5, 1.2]))
        array([  0, 128, 255], dtype=uint8)
    """
    found: NDArray[np.uint8] = (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)
    return found


def data_url(picture: Image.Image | NDArray[Any], kind: Literal["PNG", "JPEG"] = "JPEG", *, quality: int = 90) -> str:
    """Encode an image as a data URL, to embed it in a page.

    Args:
        picture: an image, or an array (H, W, 3 or 4) in [0, 1].
        kind: image format; PNG keeps transparency.
        quality: JPEG quality in [1, 95].

    Example:
        >>> data_url(Image.new("RGB", (1, 1)))[:27]
        'data:image/jpeg;base64,/9j/'
    """
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(to_bytes(picture))
    held = io.BytesIO()
    options = {"quality": quality} if kind == "JPEG" else {"compress_level": 1}
    image.save(held, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(held.getvalue()).decode('ascii')}"
