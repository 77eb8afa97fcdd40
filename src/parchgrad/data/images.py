"""Photographs from files."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from parchgrad.errors import ImageError

__all__ = ["read_image"]


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
    try:
        with Image.open(path) as opened:
            return _to_rgb(ImageOps.exif_transpose(opened))
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


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode; Pillow itself would clip wide integers and floats, and show what is transparent."""
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
