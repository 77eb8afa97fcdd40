"""Read images from files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from parchgrad._io.checks import check_kind
from parchgrad._io.files import refuse_special
from parchgrad.errors import ImageError, InputError, reason_of

__all__ = [
    "IMAGE_SUFFIXES",
    "cannot_read",
    "check_proportions",
    "find_files",
    "opened_image",
    "read_image",
    "stored_frame",
    "to_rgb",
]

IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".avif",
    ".jp2",
)
"""Suffixes of the files that count as images."""


_ORIENTATION = 0x0112
# Pillow would run these in Ghostscript.
_PROGRAMS = ("EPS",)
# Preprocessing scales the shorter side up to the input size: a single row of pixels would take gigabytes.
_LONGEST = 1000
# Premultiplied modes, which Pillow converts only to these.
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
# Bicubic and Lanczos scaling overshoot an edge by up to a fifth.
_OVERSHOOT = 1.25


def read_image(path: str | Path) -> Image.Image:
    """Read an image as RGB, with EXIF orientation applied and transparency on white.

    Args:
        path: file in any format that Pillow reads; of animations, the first frame.

    Raises:
        ImageError: if the file does not exist, is not a complete image, has more than 178 million pixels, or is more
            than a thousand times as long as wide.

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
        # In place, to avoid a copy of a large image.
        ImageOps.exif_transpose(opened, in_place=True)
        return to_rgb(opened)


def check_proportions(image: Image.Image) -> None:
    """Raise `ImageError` if an image has no pixels, or is more than a thousand times as long as wide.

    Example:
        >>> check_proportions(Image.new("1", (2000, 2)))
        >>> check_proportions(Image.new("1", (2001, 2)))
        Traceback (most recent call last):
        ...
        parchgrad.errors.ImageError: An image of 2001 x 2 pixels is too narrow. Crop it to a less extreme shape.
    """
    _check_image(image)
    short, long = sorted(image.size)
    if short == 0 or long > _LONGEST * short:
        raise ImageError(
            f"An image of {image.width} x {image.height} pixels is too narrow. Crop it to a less extreme shape."
        )


def _check_image(image: object) -> None:
    remedy = "Open a file with `parchgrad.data.images.read_image(path)`, or convert an array with `PIL.Image.fromarray`"
    check_kind("The image", image, Image.Image, remedy, error=InputError, wanted="a PIL image")


def stored_frame(path: str | Path) -> tuple[int, int, int]:
    """Read an image's stored width and height, and the EXIF orientation that `read_image` applies.

    Args:
        path: file in any format that Pillow reads.

    Returns:
        Width, height, and the orientation from 1 (upright) to 8.

    Raises:
        ImageError: if the file does not exist or is not an image.

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
        # For a rotated TIFF, Pillow reports the size after rotation.
        tags = opened.tag_v2 if isinstance(opened, TiffImageFile) else {}
        stored = (tags[IMAGEWIDTH], tags[IMAGELENGTH]) if tags else opened.size
        return *stored, orientation if orientation in range(1, 9) else 1


@contextmanager
def opened_image(path: str | Path) -> Iterator[Image.Image]:
    """Open an image without decoding it; convert any exception in the block to `ImageError`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "wrong.gif")
        ...     Image.new("L", (4, 3)).save(path, "PNG")
        ...     with opened_image(path) as image:
        ...         image.format
        'PNG'
    """
    check_kind(
        "`path`", path, (str, PathLike), "Pass one file at a time", error=ImageError, wanted="the path of a file"
    )
    try:
        refuse_special(path)
        # Given a path, Pillow maps rotated TIFFs into memory with the wrong size.
        with Path(path).open("rb") as file, Image.open(file) as opened:
            if opened.format in _PROGRAMS:
                raise ImageError(
                    f"it is an {opened.format} file, which is a program rather than pixels. Use a JPEG or PNG."
                )
            yield opened
    except ImageError as error:
        raise ImageError(f"Cannot use {str(path)!r}: {error}") from error
    except FileNotFoundError as error:
        raise ImageError(f"There is no file {str(path)!r}. Check the path.") from error
    except IsADirectoryError as error:
        raise ImageError(f"{str(path)!r} is a folder. Name the image files in it.") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{str(path)!r} is not a readable image. Use a JPEG, PNG or similar file.") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{str(path)!r} has too many pixels ({reason_of(error)}). Scale it down first.") from error
    except PermissionError as error:
        raise ImageError(f"No permission to read {str(path)!r}. Check its permissions.") from error
    except Exception as error:
        # Pillow's decoders raise all kinds of exceptions on damaged files.
        raise ImageError(
            f"Cannot read {str(path)!r} ({reason_of(error)}). Use an intact JPEG, PNG or similar file."
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode; Pillow itself would clip wide integers and floats, and ignore transparency.

    White is 65535 for 16-bit modes, PNG and PGM. For other 32-bit integers it is 255, 65535 or 2 ** 31, for
    floating-point numbers 1, 255 or 65535: the first that the brightest pixel does not exceed. Floating-point numbers
    may exceed it by a quarter, since rescaling overshoots. Values outside are clipped.

    Raises:
        InputError: if it is not an image.
        ImageError: if it contains NaN or infinite values.

    Example:
        >>> to_rgb(Image.new("I;16", (1, 1), 65535)).getpixel((0, 0))
        (255, 255, 255)
    """
    _check_image(image)
    _check_numbers(image)
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
    """Return the value of white in an image of wide numbers."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return 65535.0
    whites, tolerance = ((1.0, 255.0, 65535.0), _OVERSHOOT) if image.mode == "F" else ((255.0, 65535.0, 2.0**31), 1.0)
    return next((white for white in whites if brightest <= tolerance * white), whites[-1])


def _check_numbers(image: Image.Image) -> None:
    """Raise `ImageError` if pixels are NaN or infinite, which would turn black or white."""
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise ImageError("The image contains NaN or infinite values. Replace them with finite numbers.")


def find_files(root: Path, suffixes: tuple[str, ...]) -> tuple[Path, ...]:
    """Find the files below a folder with one of the suffixes (lower case), sorted.

    Skip hidden files and folders. Follow links, but read every folder once: at its own place, or else through the
    first link to it.

    Raises:
        ImageError: if a folder cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("b.xml", "a.XML", ".hidden.xml", "notes.txt"):
        ...         Path(root, name).touch()
        ...     [file.name for file in find_files(Path(root), (".xml",))]
        ['a.XML', 'b.xml']
    """
    found: list[Path] = []
    seen = set[str]()

    def stop(error: OSError) -> None:
        # os.walk would silently skip an unreadable folder.
        raise cannot_read(error.filename, error) from error

    waiting = [str(root)]
    while waiting:
        links = []
        for folder, inner, names in os.walk(waiting.pop(0), onerror=stop):
            place = os.path.realpath(folder)
            inner[:] = [] if place in seen else [name for name in inner if name[0] != "."]
            if place not in seen:
                found += [Path(folder, name) for name in names if name[0] != "." and name.lower().endswith(suffixes)]
            seen.add(place)
            links += [path for path in (os.path.join(folder, name) for name in inner) if os.path.islink(path)]
        waiting += sorted(links)
    return tuple(sorted(found))


def cannot_read(place: str | Path, error: OSError) -> ImageError:
    """Make the error for a file or folder that cannot be read."""
    return ImageError(f"Cannot read {str(place)!r} ({reason_of(error)}). Check its permissions.")
