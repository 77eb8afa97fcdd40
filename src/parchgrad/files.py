"""Writing files so that nothing half-written is ever seen and nothing is lost."""

import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from parchgrad.errors import OutputError

__all__ = ["check_outputs", "distinct_stems", "without_addresses", "writing"]


def check_outputs(paths: Iterable[Path], *, force: bool) -> None:
    """Raise `OutputError` if one of the files exists and `force` is off, or its folder can be neither used nor made."""
    for path in paths:
        if not path.name or path.is_dir():
            raise OutputError(f"{str(path)!r} is a folder; name a file in it.")
        if path.exists() and not force:
            raise OutputError(
                f"{str(path)!r} exists already; choose another place, or overwrite it: force=True, or --force on the "
                "command line."
            )
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise OutputError(f"{str(path)!r} cannot be written below {str(folder)!r}; choose another folder.")


def distinct_stems(paths: Iterable[Path]) -> list[str]:
    """File names without suffix; those of equal names in several folders are numbered.

    Example:
        >>> distinct_stems([Path("a.jpg"), Path("a.png"), Path("other", "a.jpg"), Path("b.jpg")])
        ['a', 'a-2', 'a-3', 'b']
    """
    stems: list[str] = []
    for path in paths:
        stem, number = path.stem, 2
        while stem in stems:
            stem, number = f"{path.stem}-{number}", number + 1
        stems.append(stem)
    return stems


def without_addresses(text: str) -> str:
    """Take memory addresses out of a description, which differ from one process to the next.

    Example:
        >>> without_addresses("<function crop at 0x7f7c95ad6510>")
        '<function crop at 0x>'
    """
    return re.sub(r"\b0x[0-9a-fA-F]+", "0x", text)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; it takes its name when the block ends well, and is removed otherwise.

    Raises:
        OutputError: if the folder cannot be made or the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with writing(Path(folder, "new", "note.txt")) as temporary:
        ...         _ = temporary.write_text("hello")
        ...     Path(folder, "new", "note.txt").read_text()
        'hello'
    """
    # The suffix stays last: writers choose the format by it.
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        # safetensors makes files that nobody else may read, whatever the user's mask says.
        temporary.chmod(mode)
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{str(path)!r} cannot be written ({reason}); choose another folder.") from error
    finally:
        # Gone already where all went well; a folder that could not be made has no such file either.
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)
