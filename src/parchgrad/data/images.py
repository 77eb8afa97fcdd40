"""Photographs from files."""

from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from parchgrad.errors import ImageError

__all__ = ["read_image"]


def read_image(path: str | Path) -> Image.Image:
    """Read a photograph as RGB, turned the way its camera recorded.

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
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):
                # Pillow would clip 16 bits to 8 rather than scale them.
                image = image.convert("I").point(lambda value: value / 257).convert("L")
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise ImageError(f"There is no file {str(path)!r}; check the path.") from error
    except IsADirectoryError as error:
        raise ImageError(f"{str(path)!r} is a folder; name the image files in it.") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{str(path)!r} is no image that can be read; give a JPEG, PNG or similar file.") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{str(path)!r} has too many pixels ({error}); scale it down first.") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"{str(path)!r} cannot be read ({error}); the file may be cut off or damaged.") from error
