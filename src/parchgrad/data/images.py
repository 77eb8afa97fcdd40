"""Photographs from files."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from parchgrad.checks import check_kind
from parchgrad.errors import ImageError, InputError, reason_of
from parchgrad.files import refuse_special

__all__ = ["check_proportions", "opened_image", "read_image", "stored_frame", "to_rgb"]

_ORIENTATION = 0x0112
# Pillow would have Ghostscript run these.
_PROGRAMS = ("EPS",)
# A network's preprocessing scales the shorter side up to its own: a row of pixels would take gigabytes.
_LONGEST = 1000
# Premultiplied modes, which Pillow converts to these alone.
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
# Bicubic and Lanczos scaling overshoot an edge by up to a fifth.
_OVERSHOOT = 1.25


def read_image(path: str | Path) -> Image.Image:
    """Read a photograph as RGB, turned the way its camera recorded, on white where it is transparent.

    Args:
        path: any format that Pillow reads; of an animation the first frame.

    Raises:
        ImageError: if there is no such file, or it is no complete image, or one of more than 178 million pixels, or
            more than a thousand times as long as wide.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "grey.png")
        ...     Image.new("L", (4, 3)).save(path)
        ...     read_image(path).size
        (4, 3)
    """
    with opened_image(path) as opened:
        check_proportions(opened)
        _check_numbers(opened, "it")
        # In place, since a large photograph is held as few times as may be.
        ImageOps.exif_transpose(opened, in_place=True)
        return to_rgb(opened)


def check_proportions(image: Image.Image) -> None:
    """Raise `ImageError` if an image has no pixels, or is more than a thousand times as long as wide.

    Example:
        >>> check_proportions(Image.new("1", (2000, 2)))
        >>> check_proportions(Image.new("1", (2001, 2)))
        Traceback (most recent call last):
        ...
        parchgrad.errors.ImageError: An image of 2001 x 2 pixels is too narrow to be looked at; cut a wider part out.
    """
    _check_image(image)
    short, long = sorted(image.size)
    if short == 0 or long > _LONGEST * short:
        raise ImageError(
            f"An image of {image.width} x {image.height} pixels is too narrow to be looked at; cut a wider part out."
        )


def _check_image(image: object) -> None:
    remedy = "open a file with parchgrad.data.images.read_image(path), and turn an array with PIL.Image.fromarray"
    check_kind("The image", image, Image.Image, remedy, error=InputError, wanted="a PIL image")


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
    with opened_image(path) as opened:
        check_proportions(opened)
        orientation = opened.getexif().get(_ORIENTATION, 1)
        # Of a turned TIFF Pillow gives the size that it will have.
        tags = opened.tag_v2 if isinstance(opened, TiffImageFile) else {}
        stored = (tags[IMAGEWIDTH], tags[IMAGELENGTH]) if tags else opened.size
        return *stored, orientation if orientation in range(1, 9) else 1


@contextmanager
def opened_image(path: str | Path) -> Iterator[Image.Image]:
    """Open an image without decoding it; whatever goes wrong with it in the block becomes an `ImageError`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "wrong.gif")
        ...     Image.new("L", (4, 3)).save(path, "PNG")
        ...     with opened_image(path) as image:
        ...         image.format
        'PNG'
    """
    check_kind("path", path, (str, PathLike), "give one file at a time", error=ImageError, wanted="the path of a file")
    try:
        refuse_special(path)
        # Given a path, Pillow maps the pixels of some TIFFs into memory, by the size that they have once turned.
        with Path(path).open("rb") as file, Image.open(file) as opened:
            if opened.format in _PROGRAMS:
                raise ImageError(
                    f"it is an {opened.format} file, which is a program rather than pixels; give a JPEG or PNG."
                )
            yield opened
    except ImageError as error:
        raise ImageError(f"{str(path)!r} cannot be used: {error}") from error
    except FileNotFoundError as error:
        raise ImageError(f"There is no file {str(path)!r}; check the path.") from error
    except IsADirectoryError as error:
        raise ImageError(f"{str(path)!r} is a folder; name the image files in it.") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{str(path)!r} is no image that can be read; give a JPEG, PNG or similar file.") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{str(path)!r} has too many pixels ({reason_of(error)}); scale it down first.") from error
    except PermissionError as error:
        raise ImageError(f"{str(path)!r} may not be read; check its permissions.") from error
    except Exception as error:
        # Pillow's many decoders raise what they like on damaged files.
        raise ImageError(
            f"{str(path)!r} cannot be read ({reason_of(error)}); give a whole JPEG, PNG or similar file."
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode; Pillow itself would clip wide integers and floats, and show what is transparent.

    White is what the mode or the file says: 65535 of 16 bits, of a PNG and of a PGM. Other integers of 32 bits end at
    255, at 65535 or at 2 ** 31 - 1, floating-point numbers at 1, at 255 or at 65535: the first that the brightest pixel
    does not exceed, or of floating-point numbers by no more than a quarter, which scaling may overshoot by. What lies
    outside is clipped.

    Raises:
        InputError: if it is no image.
        ImageError: if it holds NaN or infinite values.

    Example:
        >>> to_rgb(Image.new("I;16", (1, 1), 65535)).getpixel((0, 0))
        (255, 255, 255)
    """
    _check_image(image)
    _check_numbers(image, "The image")
    if image.mode.startswith("I") or image.mode == "F":
        values = np.array(image, dtype=np.float32)
        values *= np.float32(255 / _white(image, float(values.max(initial=0))))
        levels = np.rint(values.clip(0, 255, out=values), out=values).astype(np.uint8)
        return Image.fromarray(levels).convert("RGB")
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        coloured = image if image.mode == "RGBA" else image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured).convert("RGB")
    return image.convert("RGB")


def _white(image: Image.Image, brightest: float) -> float:
    """The number that stands for white in an image of wide numbers."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return 65535.0
    whites, tolerance = ((1.0, 255.0, 65535.0), _OVERSHOOT) if image.mode == "F" else ((255.0, 65535.0, 2.0**31), 1.0)
    return next((white for white in whites if brightest <= tolerance * white), whites[-1])


def _check_numbers(image: Image.Image, name: str) -> None:
    """Raise `ImageError` for an image whose pixels are not all numbers, which would be painted black or white."""
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise ImageError(f"{name} holds NaN or infinite values; give every pixel a number.")
