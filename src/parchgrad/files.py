"""Files: written so that nothing half-written is ever seen and nothing is lost, and read only where that ends."""

import errno
import hashlib
import io
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from parchgrad.errors import OutputError, reason_of

__all__ = [
    "check_outputs",
    "distinct_stems",
    "locked",
    "refuse_special",
    "remove_abandoned",
    "save_array",
    "without_addresses",
    "writing",
    "writing_together",
]

# Seconds after which nobody writes a temporary file any more.
_ABANDONED = 3600.0

# What the system says where a file system knows no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


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
    paths, inputs = list(paths), list(inputs)
    for path in (*paths, *inputs):
        _check_name(path)
    # Links lead there by another name, and some file systems tell no capitals.
    read: set[object] = {os.path.realpath(path) for path in inputs} | {*map(_identity, inputs)} - {None}
    seen = set[str]()
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            raise OutputError(f"Two results would be written to {str(path)!r}; rename an input, or take one at a time.")
        seen.add(real)
        if not read.isdisjoint((real, _identity(path))):
            raise OutputError(
                f"{str(path)!r} would be overwritten, and is what the results are made from; choose another folder."
            )
        if not path.name or os.path.isdir(path):
            raise OutputError(f"{str(path)!r} is a folder; name a file in it.")
        if os.path.lexists(path) and not force:
            raise _exists(path)
        _check_overwritable(path)
        folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            raise OutputError(f"{str(path)!r} cannot be written below {str(folder)!r}; choose another folder.")
        # A name can be too long for a folder that has yet to be made.
        _check_name(folder / path.name)


def _check_name(path: Path) -> None:
    try:
        os.lstat(path)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
            raise OutputError(f"{str(path)!r} cannot be a file ({reason_of(error)}); choose another name.") from error


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from any other, by whatever name; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _exists(path: Path) -> OutputError:
    return OutputError(
        f"{str(path)!r} exists already; choose another place, or overwrite it with --force (in Python force=True)."
    )


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


def save_array(values: NDArray[Any], path: Path) -> None:
    """Write an array as .npy, where a full disk is told by the system's error: `numpy.save` tells it by two numbers.

    Raises:
        OSError: if it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_array(np.arange(3), Path(folder, "a.npy"))
        ...     np.load(Path(folder, "a.npy"))
        array([0, 1, 2])
    """
    held = io.BytesIO()
    np.save(held, values, allow_pickle=False)
    path.write_bytes(held.getvalue())


def without_addresses(text: str) -> str:
    """Take memory addresses out of a description, which differ from one process to the next.

    Example:
        >>> without_addresses("<function crop at 0x7f7c95ad6510>")
        '<function crop at 0x>'
    """
    return re.sub(r"\b0x[0-9a-fA-F]+", "0x", text)


@contextmanager
def writing(path: Path, *, force: bool = True) -> Iterator[Path]:
    """Give a temporary path; what is written there becomes `path` when the block ends well, and is removed otherwise.

    A process that is killed leaves the earlier file, and beside it a temporary folder whose name starts with
    `.parchgrad-`; the next time that `path` is written, such folders in which nobody has written for an hour are
    removed. The permissions of the earlier file are kept. Where `path` is a link, what it leads to is replaced.

    Args:
        path: the file.
        force: whether a file that is there at the end of the block is replaced.

    Raises:
        OutputError: if the folder cannot be made, the file cannot be written, or it exists and `force` is off.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with writing(Path(folder, "new", "note.txt")) as temporary:
        ...         _ = temporary.write_text("hello")
        ...     Path(folder, "new", "note.txt").read_text()
        'hello'
    """
    with writing_together([path], force=force) as (temporary,):
        yield temporary


@contextmanager
def writing_together(paths: Sequence[Path], *, force: bool = True) -> Iterator[tuple[Path, ...]]:
    """Give temporary paths for files that belong together: none becomes its file before the last is on the disk.

    Args:
        paths: the files; for each see `writing`.
        force: see there.

    Raises:
        OutputError: see there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with writing_together([Path(folder, "a.txt"), Path(folder, "b.txt")]) as drafts:
        ...         _ = [draft.write_text("hello") for draft in drafts]
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['a.txt', 'b.txt']
    """
    for path in paths:
        _check_name(path)
        if not force and os.path.lexists(path):
            raise _exists(path)
    # Beside the file that a link leads to, since nothing is renamed from one file system to another.
    targets = [Path(os.path.realpath(path)) if os.path.islink(path) else path for path in paths]
    with ExitStack() as held:
        drafts = [held.enter_context(_draft(target)) for target in targets]
        with _naming(*paths):
            yield tuple(draft for draft, _ in drafts)
        for path, (draft, mode) in zip(paths, drafts, strict=True):
            with _naming(path):
                _settle(draft, mode)
        with ExitStack() as undone:
            for path, target, (draft, _) in zip(paths, targets, drafts, strict=True):
                with _naming(path):
                    if force:
                        draft.replace(target)
                    else:
                        _take_new_name(draft, path)
                        undone.callback(path.unlink, missing_ok=True)
            undone.pop_all()


@contextmanager
def _draft(path: Path) -> Iterator[tuple[Path, int]]:
    """An empty file for what will be `path`, with the permissions that it will have."""
    with _naming(path):
        _check_overwritable(path)
        # A folder, since some libraries write by way of temporary files of their own, which would be left there.
        folder = path.with_name(f"{_draft_prefix(path)}{secrets.token_hex(8)}")
        # The suffix stays: writers choose the format by it.
        draft = folder / f"new{path.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path, seconds=_ABANDONED)
        # Nobody else reads a draft, since the file may be one that nobody else reads.
        folder.mkdir(mode=0o700)
    try:
        with _naming(path):
            draft.touch()
            mode = stat.S_IMODE(os.stat(path if os.path.exists(path) else draft).st_mode)
        yield draft, mode
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _draft_prefix(path: Path) -> str:
    """What the names of the folders for drafts of `path` begin with: short, and nobody else's."""
    return f".parchgrad-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}-"


def _settle(draft: Path, mode: int) -> None:
    # Some file systems say only here that there was no room.
    with draft.open("rb+") as written:
        # safetensors makes files that nobody else may read, whatever the user's mask says.
        draft.chmod(mode)
        os.fsync(written.fileno())


def _take_new_name(draft: Path, path: Path) -> None:
    try:
        # Unlike renaming, it never replaces a file.
        os.link(draft, path)
    except OSError as error:
        # Where there are no links, what is there is looked for at the last moment at least.
        if os.path.lexists(path):
            raise _exists(path) from error
        draft.replace(path)


@contextmanager
def _naming(*paths: Path) -> Iterator[None]:
    """Tell errors of writing these files as an `OutputError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors tells the system's errors in its own words.
        reason = reason_of(error)
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in reason
        remedy = "make room" if is_full else "check its permissions"
        named = " or ".join(repr(str(path)) for path in paths)
        raise OutputError(f"{named} cannot be written ({reason}); {remedy}, or choose another folder.") from error


def remove_abandoned(path: Path, *, seconds: float = 0.0) -> None:
    """Remove what a killed process left of writing `path`, where nobody has touched it for a time.

    Args:
        path: what was written.
        seconds: how long ago; 0 where nobody else can be writing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in (".parchgrad-59700155e034d16d-0123456789abcdef", ".parchgrad-notes"):
        ...         Path(folder, name).mkdir()
        ...     remove_abandoned(Path(folder, "note.txt"))
        ...     [file.name for file in Path(folder).iterdir()]
        ['.parchgrad-notes']
    """
    for left in path.parent.glob(f"{_draft_prefix(path)}{'[0-9a-f]' * 16}"):
        # Another process may have been quicker, and what may not be removed is in nobody's way.
        with suppress(OSError):
            # A link of that name leads to what is somebody else's.
            inner = list(left.iterdir()) if _is_folder(left) else [left]
            if all(map(_is_of_a_draft, inner)):
                written = max(file.lstat().st_mtime for file in (left, *inner))
                if time.time() - written >= seconds:
                    shutil.rmtree(left)


def _is_folder(path: Path) -> bool:
    return stat.S_ISDIR(path.lstat().st_mode)


def _is_of_a_draft(path: Path) -> bool:
    """Whether something in a folder for drafts was written by this package, or by safetensors on its behalf."""
    return stat.S_ISREG(path.lstat().st_mode) and re.match(r"new(\.|$)|\.tmp", path.name) is not None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let nobody else, in whatever process, into such a block for the same path.

    The lock is the operating system's: it ends with the process that holds it, however that ends. Its file, hidden,
    empty and beside `path`, stays. On file systems that know no locks there is none.

    Raises:
        OutputError: if somebody else is in such a block, or its folder cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, locked(Path(folder, "rows")), locked(Path(folder, "rows")):
        ...     pass
        Traceback (most recent call last):
        ...
        parchgrad.errors.OutputError: ...rows' is being written by another run; wait for its end (it holds...
    """
    # Imported where it is needed, so that --help answers at once.
    from filelock import FileLock, Timeout

    file = path.with_name(f".{path.name}.lock")
    _check_name(file)
    if os.path.islink(file):
        raise OutputError(f"{str(file)!r} is a link, but must be a lock; remove it, or choose another place.")
    # It is left there: who removes a lock that somebody waits for lets two in.
    lock = FileLock(file, timeout=0, fallback_to_soft=False)
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise OutputError(
                f"{str(path)!r} is being written by another run; wait for its end (it holds {str(file)!r}), or choose "
                "another place."
            ) from error
        except OSError as error:
            # On a file system that knows no locks nobody holds one.
            if error.errno not in _NO_LOCKS:
                raise
    try:
        yield
    finally:
        lock.release()
