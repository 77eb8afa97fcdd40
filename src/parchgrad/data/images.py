"""Photographs from files."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from parchgrad.checks import check_kind
from parchgrad.errors import ImageError, InputError

__all__ = ["read_image", "stored_frame", "to_rgb"]

_ORIENTATION = 0x0112


def read_image(path: str | Path) -> Image.Image:
    """Read a photograph as RGB, turned the way its camera recorded, on white where it is transparent.

    Args:
        path: any format that Pillow reads; of an animation the first frame.

    Raises:
        ImageError: if there is no such file, or it is no complete image, or an unreasonably large one.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "grey.png")
        ...     Image.new("L", (4, 3)).save(path)
        ...     read_image(path).size
        (4, 3)
    """
    with _opened(path) as opened:
        _check_numbers(opened, repr(str(path)))
        return to_rgb(ImageOps.exif_transpose(opened))


def stored_frame(path: str | Path) -> tuple[int, int, int]:
    """Width and height of a photograph's stored pixels, and the EXIF orientation by which `read_image` turns them.

    Args:
        path: any format that Pillow reads.

    Returns:
        Width, height, and the orientation from 1 (not turned) to 8.

    Raises:
        ImageError: if there is no such file, or it is no image.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path, exif = Path(folder, "turned.jpg"), Image.Exif()
        ...     exif[0x0112] = 6
        ...     Image.new("L", (4, 3)).save(path, exif=exif)
        ...     stored_frame(path), read_image(path).size
        ((4, 3, 6), (3, 4))
    """
    with _opened(path) as opened:
        orientation = opened.getexif().get(_ORIENTATION, 1)
        return *opened.size, orientation if orientation in range(1, 9) else 1


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """Open an image; whatever goes wrong with it becomes an `ImageError` of one sentence."""
    check_kind("path", path, (str, PathLike), "give one file at a time", error=ImageError, wanted="the path of a file")
    try:
        with Image.open(path) as opened:
            yield opened
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"There is no file {str(path)!r}; check the path.") from error
    except IsADirectoryError as error:
        raise ImageError(f"{str(path)!r} is a folder; name the image files in it.") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{str(path)!r} is no image that can be read; give a JPEG, PNG or similar file.") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{str(path)!r} has too many pixels ({error}); scale it down first.") from error
    except PermissionError as error:
        raise ImageError(f"{str(path)!r} may not be read; check its permissions.") from error
    except Exception as error:
        # Pillow's many decoders raise what they like on damaged files.
        reason = str(error).strip() or type(error).__name__
        raise ImageError(f"{str(path)!r} cannot be read ({reason}); the file may be cut off or damaged.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode; Pillow itself would clip wide integers and floats, and show what is transparent.

    Raises:
        InputError: if it is no image.
        ImageError: if it holds NaN or infinite values.

    Example:
        >>> to_rgb(Image.new("I;16", (1, 1), 65535)).getpixel((0, 0))
        (255, 255, 255)
    """
    remedy = "open a file with parchgrad.data.images.read_image(path), and turn an array with PIL.Image.fromarray"
    check_kind("The image", image, Image.Image, remedy, error=InputError, wanted="a PIL image")
    _check_numbers(image, "The image")
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if image.mode.startswith("I;16") or values.max(initial=0) > 255:
            values = values * (255 / 65535)
        elif image.mode == "F" and values.max(initial=0) <= 1:
            values = values * 255
        return Image.fromarray(values.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured).convert("RGB")
    return image.convert("RGB")


def _check_numbers(image: Image.Image, name: str) -> None:
    """Raise `ImageError` for an image whose pixels are not all numbers, which would be painted black or white."""
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise ImageError(f"{name} holds NaN or infinite values; give every pixel a number.")
