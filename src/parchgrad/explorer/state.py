"""What the server holds of one user's page, and checks of what the page sends."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from parchgrad.errors import ImageError, ParchGradError, SettingError
from parchgrad.explorer.inputs import ImageSource, View

__all__ = [
    "NothingYetError",
    "Refused",
    "Shown",
    "check_texts",
    "checked_number",
    "chosen_class",
    "compared_class",
    "stamp_of",
    "usable_images",
]

# Longest name or layer pattern, in characters.
_LONGEST_TEXT = 1000


class NothingYetError(ParchGradError):
    """The user has not provided all images yet."""


@dataclass(frozen=True)
class Refused:
    """Why a file was refused; empty if there is none."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Shown:
    """State of one user's page, to detect changes and to save what is displayed.

    Attributes:
        listed: image and network of the list of classes.
        target: class chosen from the list.
        against: what it is compared with; see `View`.
        network: network of the lists of selectors, layers and third maps.
        view: settings of the displayed result; None if there is an error instead.
        images: images of the displayed mosaic; empty for a single image.
        note: additional status text for `view`.
    """

    listed: tuple[ImageSource, str] | None = None
    target: int | None = None
    against: Any = None
    network: str = ""
    view: View | None = None
    images: tuple[ImageSource, ...] = ()
    note: str = ""


def usable_images(images: Sequence[ImageSource | Refused]) -> tuple[ImageSource, ...]:
    """Return the images, or raise why the first refused one was.

    Raises:
        ImageError: if an image was refused.
        NothingYetError: if an image is missing.
    """
    for item in images:
        if isinstance(item, Refused):
            raise ImageError(item.reason) if item.reason else NothingYetError("Drop an image or choose an example.")
    return tuple(item for item in images if isinstance(item, ImageSource))


def chosen_class(
    shown: Shown, image: ImageSource | Refused, network: str, target: int | None, stamp: str
) -> int | None:
    """The class to explain; None for the predicted class if the image or network is new.

    Raises:
        SettingError: if `target` is not a whole number.
    """
    if shown.listed != (image, network):
        return None
    if target is None or stamp != stamp_of(shown.listed):
        return shown.target
    if not isinstance(target, int):
        raise SettingError(f"`target` is {str(target)[:40]!r}, but it must be a whole number.")
    return target


def compared_class(shown: Shown, network: str, against: Any, stamp: str) -> Any:
    """What to compare the class with; None if the network is new, since its classes are others."""
    if shown.listed is None or shown.listed[1] != network:
        return None
    return against if stamp == stamp_of(shown.listed) else shown.against


def check_texts(**settings: object) -> None:
    """Check text values, since API clients can send anything.

    Raises:
        SettingError: if one is not a string, or is too long.
    """
    for name, value in settings.items():
        if not isinstance(value, str):
            raise SettingError(f"`{name}` is {str(value)[:40]!r}, but it must be a string.")
        if len(value) > _LONGEST_TEXT:
            raise SettingError(f"`{name}` has {len(value):,} characters, but it must have at most {_LONGEST_TEXT:,}.")


def checked_number(name: str, value: object, least: float, most: float) -> float:
    """Return a number from `least` to `most`.

    Raises:
        SettingError: if it is something else.

    Example:
        >>> checked_number("opacity", 0.5, 0, 1)
        0.5
    """
    if not isinstance(value, (int, float)) or not least <= value <= most:
        raise SettingError(f"`{name}` is {str(value)[:40]}, but it must be a number from {least} to {most}.")
    return value


def stamp_of(listed: object) -> str:
    """Short identifier of a list of classes."""
    return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]
