"""Write files atomically and never overwrite them unasked."""

import errno
import io
import os
import re
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from parchgrad.errors import OutputError, ParchGradError, reason_of

__all__ = [
    "check_outputs",
    "distinct_stems",
    "folder_size",
    "locked",
    "refuse_special",
    "safe_stem",
    "save_array",
    "without_addresses",
    "writing",
    "writing_together",
]


def check_outputs(paths: Iterable[Path], *, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Check that files can be written, before any long computation.

    Args:
        paths: the files.
        force: whether existing files may be overwritten.
        inputs: input files, which are never overwritten.

    Raises:
        OutputError: if a file exists and `force` is False, its folder cannot be used or created, two paths are the
            same, or one is an input.

    Example:
        >>> check_outputs([Path("new", "a.png"), Path("new", "a.png")], force=False)
        Traceback (most recent call last):
        ...
        parchgrad.errors.OutputError: Two results would be written to 'new/a.png'. Rename an input, or proc...
    """
    read = {os.path.realpath(path) for path in inputs}
    seen = set[str]()
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            raise OutputError(
                f"Two results would be written to {str(path)!r}. Rename an input, or process one at a time."
            )
        seen.add(real)
        if real in read:
            raise OutputError(f"{str(path)!r} is an input and would be overwritten. Choose another folder.")
        if os.path.isdir(path):
            raise OutputError(f"{str(path)!r} is a folder. Name a file in it.")
        if os.path.lexists(path) and not force:
            raise _exists(path)
        folder = next(parent for parent in path.absolute().parents if os.path.exists(parent))
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            raise OutputError(f"Cannot write {str(path)!r} below {str(folder)!r}. Choose another folder.")


def _exists(path: Path) -> OutputError:
    return OutputError(f"{str(path)!r} already exists. Choose another path, or overwrite it with `force=True`.")


def refuse_special(path: str | Path) -> None:
    """Raise `OSError` if a path does not exist, or is a pipe, device or socket, which might never end.

    Example:
        >>> refuse_special(os.devnull)
        Traceback (most recent call last):
        ...
        OSError: [Errno 22] it is a pipe or device, not a plain file: ...
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is a pipe or device, not a plain file", str(path))


def distinct_stems(paths: Iterable[Path]) -> list[str]:
    """Return file names without suffix, numbering duplicates.

    Example:
        >>> distinct_stems([Path("a.jpg"), Path("a.png"), Path("other", "a.jpg"), Path("b.jpg")])
        ['a', 'a-2', 'a-3', 'b']
    """
    stems: dict[str, str] = {}
    numbers: Counter[str] = Counter()
    for path in paths:
        stem = path.stem
        # Some file systems ignore case.
        while stem.casefold() in stems:
            numbers[path.stem.casefold()] += 1
            stem = f"{path.stem}-{numbers[path.stem.casefold()] + 1}"
        stems[stem.casefold()] = stem
    return list(stems.values())


def safe_stem(name: str) -> str:
    """Turn a model's name into a file name: names on the Hugging Face Hub contain a colon and slashes.

    Names on the Hub cannot contain `--`, so two repositories never share a file name.

    Example:
        >>> safe_stem("hf-hub:timm/resnet18.a1_in1k"), safe_stem("resnet18")
        ('hf-hub--timm--resnet18.a1_in1k', 'resnet18')
    """
    return re.sub(r"[:/\\]", "--", name)


def save_array(values: NDArray[Any], path: Path) -> None:
    """Write an array as .npy; unlike `numpy.save`, raise the system's error on a full disk.

    Raises:
        OSError: if the file cannot be written.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_array(np.arange(3), Path(folder, "a.npy"))
        ...     np.load(Path(folder, "a.npy"))
        array([0, 1, 2])
    """
    held = io.BytesIO()
    np.save(held, values, allow_pickle=False)
    path.write_bytes(held.getvalue())


def without_addresses(text: str) -> str:
    """Remove memory addresses, which differ between processes, from a description.

    Example:
        >>> without_addresses("<function crop at 0x7f7c95ad6510>")
        '<function crop at 0x>'
    """
    return re.sub(r"\b0x[0-9a-fA-F]+", "0x", text)


@contextmanager
def writing(path: Path, *, force: bool = True) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` when the block succeeds, and is removed otherwise.

    A killed process leaves the earlier file, and beside it a temporary folder whose name starts with `.parchgrad-`. The
    permissions of the earlier file are kept. If `path` is a link, its target is replaced.

    Args:
        path: the file.
        force: whether to replace a file that exists at the end of the block.

    Raises:
        OutputError: if the folder cannot be created, the file cannot be written, or it exists and `force` is False.

    Example:
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
    """Yield temporary paths for files that belong together; none is replaced before all are on the disk.

    Args:
        paths: the files; see `writing`.
        force: see `writing`.

    Raises:
        OutputError: see `writing`.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with writing_together([Path(folder, "a.txt"), Path(folder, "b.txt")]) as drafts:
        ...         _ = [draft.write_text("hello") for draft in drafts]
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['a.txt', 'b.txt']
    """
    _check_absent(paths, force=force)
    # Beside a link's target, since renaming does not work across file systems.
    targets = [Path(os.path.realpath(path)) for path in paths]
    with ExitStack() as held:
        drafts = [held.enter_context(_draft(target)) for target in targets]
        with _naming(*paths):
            yield tuple(drafts)
        for path, target, draft in zip(paths, targets, drafts, strict=True):
            with _naming(path):
                _settle(draft, target)
        _check_absent(paths, force=force)
        for path, target, draft in zip(paths, targets, drafts, strict=True):
            with _naming(path):
                draft.replace(target)


def _check_absent(paths: Iterable[Path], *, force: bool) -> None:
    for path in paths:
        if not force and os.path.lexists(path):
            raise _exists(path)


@contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """Yield an empty file that will become `path`."""
    with _naming(path):
        if path.exists() and not path.is_file():
            raise OutputError(f"{str(path)!r} is not a regular file. Choose another path.")
        path.parent.mkdir(parents=True, exist_ok=True)
        # A folder, since some libraries write temporary files beside the file.
        folder = Path(tempfile.mkdtemp(prefix=".parchgrad-", dir=path.parent))
    try:
        with _naming(path):
            # Keep the suffix: writers choose the format by it.
            draft = folder / f"new{path.suffix}"
            draft.touch()
        yield draft
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _settle(draft: Path, target: Path) -> None:
    """Flush a draft to disk, with the permissions of the existing file or the default ones."""
    # Some file systems report a full disk only here. Windows flushes only files that are open for writing.
    with draft.open("r+b") as written:
        os.fsync(written.fileno())
    fresh = draft.with_name("permissions")
    fresh.touch()
    # safetensors creates files that only the owner can read.
    draft.chmod(stat.S_IMODE((target if target.exists() else fresh).stat().st_mode))


@contextmanager
def _naming(*paths: Path) -> Iterator[None]:
    """Convert errors while writing these files to `OutputError`."""
    try:
        yield
    except ParchGradError:
        raise
    except (OSError, SafetensorError) as error:
        # safetensors rephrases the system's errors.
        reason = reason_of(error)
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in reason
        remedy = "Free some space" if is_full else "Check its permissions"
        named = " or ".join(repr(str(path)) for path in paths)
        raise OutputError(f"Cannot write {named} ({reason}). {remedy}, or choose another folder.") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock for a path during the block.

    The operating system releases the lock when the process ends, however it ends. The lock file, hidden, empty and
    beside `path`, stays.

    Raises:
        OutputError: if another process holds the lock, or the folder cannot be written.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder, locked(Path(folder, "rows")), locked(Path(folder, "rows")):
        ...     pass
        Traceback (most recent call last):
        ...
        parchgrad.errors.OutputError: Another run is writing ...rows' (lock file ...). Wait for it to end...
    """
    # Imported lazily to keep --help fast.
    from filelock import FileLock, Timeout

    file = path.with_name(f".{path.name}.lock")
    # Never removed: deleting a lock that another process waits for would let two in.
    lock = FileLock(file, timeout=0)
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise OutputError(
                f"Another run is writing {str(path)!r} (lock file {str(file)!r}). Wait for it to end, or choose "
                "another path."
            ) from error
    try:
        yield
    finally:
        lock.release()


def folder_size(folder: Path) -> int:
    """Add up the sizes of the files in a folder, in bytes; files may disappear meanwhile.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a").write_bytes(b"12345")
        ...     folder_size(Path(folder))
        5
    """
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total
