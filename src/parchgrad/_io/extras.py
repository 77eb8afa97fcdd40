"""Imports of packages that come with an extra, such as `parchgrad[models]`."""

from collections.abc import Iterator
from contextlib import contextmanager

from parchgrad.errors import MissingExtraError

__all__ = ["needs_extra"]


@contextmanager
def needs_extra(name: str) -> Iterator[None]:
    """Turn a failed import into an error that names the extra.

    Args:
        name: the extra that brings the packages imported in the block.

    Raises:
        MissingExtraError: if one of them is not installed.

    Example:
        >>> with needs_extra("models"):
        ...     import no_such_package
        Traceback (most recent call last):
        parchgrad.errors.MissingExtraError: no_such_package is not installed. Run `pip install 'parchgrad[models]'`.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"{error.name} is not installed. Run `pip install 'parchgrad[{name}]'`.") from error
