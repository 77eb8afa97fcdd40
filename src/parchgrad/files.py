"""Files: written so that nothing half-written is ever seen and nothing is lost, and read only where that ends."""

import errno
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from safetensors import SafetensorError

from parchgrad.errors import OutputError, reason_of

__all__ = [
    "check_outputs",
    "distinct_stems",
    "locked",
    "refuse_special",
    "remove_abandoned",
    "without_addresses",
    "writing",
]

# Seconds after which nobody writes a temporary file any more.
_ABANDONED = 3600.0


def check_outputs(paths: Iterable[Path], *, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Look at every file that is to be written, before anything takes long.

    Args:
        paths: the files.
        force: whether files that exist may be overwritten. What is neither a file nor a folder, such as `/dev/null`,
            never is.
        inputs: files that the results are made from, which are never overwritten either.

    Raises:
        OutputError: if one of them exists and `force` is off, its folder can be neither used nor made, two of them are
            the same, or one is among the inputs.

    Example:
        >>> check_outputs([Path("new", "a.png"), Path("new", "a.png")], force=False)
        Traceback (most recent call last):
        ...
        parchgrad.errors.OutputError: Two results would be written to 'new/a.png'; rename an input, or take...
    """
    # The functions of os.path take what cannot be looked at for missing, where those of Path raise.
    read, seen = {os.path.realpath(path) for path in inputs}, set[Path]()
    for path in paths:
        if path in seen:
            raise OutputError(f"Two results would be written to {str(path)!r}; rename an input, or take one at a time.")
        seen.add(path)
        if os.path.realpath(path) in read:
            raise OutputError(
                f"{str(path)!r} would be overwritten, and is what the results are made from; choose another folder."
            )
        if not path.name or os.path.isdir(path):
            raise OutputError(f"{str(path)!r} is a folder; name a file in it.")
        if os.path.lexists(path) and not force:
            raise OutputError(
                f"{str(path)!r} exists already; choose another place, or overwrite it: force=True, or --force on the "
                "command line."
            )
        _check_overwritable(path)
        folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            raise OutputError(f"{str(path)!r} cannot be written below {str(folder)!r}; choose another folder.")


def _check_overwritable(path: Path) -> None:
    if os.path.exists(path) and not os.path.isfile(path):
        raise OutputError(f"{str(path)!r} cannot be written, since it is no plain file; choose another place.")


def refuse_special(path: str | Path) -> None:
    """Raise `OSError` where a path names a pipe, a device or a socket, reading which may never end, or nothing at all.

    Example:
        >>> refuse_special("/dev/zero")
        Traceback (most recent call last):
        ...
        OSError: [Errno 22] it is a pipe or device, not a plain file: '/dev/zero'
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is a pipe or device, not a plain file", str(path))


def distinct_stems(paths: Iterable[Path]) -> list[str]:
    """File names without suffix; those of equal names in several folders are numbered.

    Example:
        >>> distinct_stems([Path("a.jpg"), Path("a.png"), Path("other", "a.jpg"), Path("b.jpg")])
        ['a', 'a-2', 'a-3', 'b']
    """
    stems: dict[str, str] = {}
    for path in paths:
        stem, number = path.stem, 2
        # Some file systems tell no capitals.
        while stem.casefold() in stems:
            stem, number = f"{path.stem}-{number}", number + 1
        stems[stem.casefold()] = stem
    return list(stems.values())


def without_addresses(text: str) -> str:
    """Take memory addresses out of a description, which differ from one process to the next.

    Example:
        >>> without_addresses("<function crop at 0x7f7c95ad6510>")
        '<function crop at 0x>'
    """
    return re.sub(r"\b0x[0-9a-fA-F]+", "0x", text)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Give a temporary path; what is written there becomes `path` when the block ends well, and is removed otherwise.

    A process that is killed leaves the earlier file, and beside it a temporary folder whose name starts with a dot; the
    next time that `path` is written, such folders in which nobody has written for an hour are removed.

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
    # A folder, since some libraries write by way of temporary files of their own, which would be left beside `path`.
    folder = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    # The suffix stays last: writers choose the format by it.
    temporary = folder / f"new{path.suffix}"
    _check_overwritable(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path, seconds=_ABANDONED)
        folder.mkdir()
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        # safetensors makes files that nobody else may read, whatever the user's mask says.
        temporary.chmod(mode)
        # Some file systems say only here that there was no room.
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _cannot_write(path: Path, error: Exception) -> OutputError:
    # safetensors tells the system's errors in its own words.
    reason = reason_of(error)
    is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in reason
    remedy = "make room" if is_full else "check its permissions"
    return OutputError(f"{str(path)!r} cannot be written ({reason}); {remedy}, or choose another folder.")


def remove_abandoned(path: Path, *, seconds: float = 0.0) -> None:
    """Remove what a killed process left of writing `path`, where nobody has touched it for a time.

    Args:
        path: what was written.
        seconds: how long ago; 0 where nobody else can be writing.

    Raises:
        OSError: if it may not be removed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in (".note.0123abcd.txt", ".notes.0123abcd.txt"):
        ...         Path(folder, name).mkdir()
        ...     remove_abandoned(Path(folder, "note.txt"))
        ...     [file.name for file in Path(folder).iterdir()]
        ['.notes.0123abcd.txt']
    """
    hexadecimal = "[0-9a-f]" * 8
    for left in path.parent.glob(f".{escape(path.stem)}.{hexadecimal}{escape(path.suffix)}"):
        # Another process may have been quicker.
        with suppress(FileNotFoundError):
            written = max(file.stat().st_mtime for file in (left, *left.glob("*")))
            if time.time() - written < seconds:
                continue
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let nobody else, in whatever process, into such a block for the same path.

    The lock is the operating system's: it ends with the process that holds it, however that ends.

    Raises:
        OutputError: if somebody else is in such a block, or its folder cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, locked(Path(folder, "rows")), locked(Path(folder, "rows")):
        ...     pass
        Traceback (most recent call last):
        ...
        parchgrad.errors.OutputError: ...rows' is being written by another run; wait for its end, or choose another...
    """
    # Imported where it is needed, so that --help answers at once.
    from filelock import FileLock, Timeout

    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file, timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise OutputError(
            f"{str(path)!r} is being written by another run; wait for its end, or choose another place."
        ) from error
    except OSError as error:
        raise _cannot_write(path, error) from error
    except NotImplementedError:
        # On a file system that knows no locks nobody holds one.
        pass
    try:
        yield
    finally:
        if lock.is_locked:
            # While it is held; Windows does not remove what is open, and an empty file is left there.
            with suppress(OSError):
                file.unlink()
            lock.release()
