"""Type checks of arguments: numbers, whole numbers and instances."""

import numbers
from typing import Any, TypeGuard

from parchgrad.errors import ParchGradError, SettingError

__all__ = ["check_kind", "check_seed", "check_whole_number", "is_number", "is_whole_number"]


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number, including numpy's but not booleans.

    Example:
        >>> import numpy as np
        >>> is_number(0.1), is_number(np.float32(0.1)), is_number(True), is_number("0.1")
        (True, True, False, False)
    """
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole_number(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number, including numpy's but not booleans.

    Example:
        >>> import numpy as np
        >>> is_whole_number(2), is_whole_number(np.int64(2)), is_whole_number(True), is_whole_number(2.0)
        (True, True, False, False)
    """
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_whole_number(name: str, value: object, least: int) -> None:
    """Raise `SettingError` unless the parameter `name` is a whole number of at least `least`.

    Example:
        >>> check_whole_number("steps", 2.5, 1)
        Traceback (most recent call last):
        parchgrad.errors.SettingError: `steps` is 2.5, but it must be a whole number of at least 1.
    """
    if not is_whole_number(value) or value < least:
        raise SettingError(f"`{name}` is {value!r}, but it must be a whole number of at least {least}.")


def check_seed(seed: object) -> None:
    """Raise `SettingError` unless a seed is a whole number that torch accepts.

    Example:
        >>> check_seed(0.5)
        Traceback (most recent call last):
        parchgrad.errors.SettingError: `seed` is 0.5, but it must be a whole number of fewer than 64 bits.
    """
    if not is_whole_number(seed) or abs(seed) >= 2**63:
        raise SettingError(f"`seed` is {seed!r}, but it must be a whole number of fewer than 64 bits.")


def check_kind(
    name: str, value: object, kind: Any, remedy: str, *, error: type[ParchGradError] = SettingError, wanted: str = ""
) -> None:
    """Raise an error unless the argument is an instance of a class or of one of several classes.

    Args:
        name: name of the argument in the message.
        value: the argument.
        kind: a class, or a tuple of classes.
        remedy: what to pass instead, without a full stop.
        error: class of the error.
        wanted: description of what is needed; defaults to the class name.

    Example:
        >>> check_kind("`selector`", "energy", dict, "Pass a dictionary")
        Traceback (most recent call last):
        parchgrad.errors.SettingError: `selector` is of type str, but a dict is needed. Pass a dictionary.
    """
    if not isinstance(value, kind):
        needed = wanted or f"a {kind.__name__}"
        raise error(f"{name} is of type {type(value).__name__}, but {needed} is needed. {remedy}.")
