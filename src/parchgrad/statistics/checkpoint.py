"""Checkpoints of a collection: written atomically, and resumed only under the same settings."""

import json
import re
from collections.abc import Mapping
from glob import escape
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from parchgrad._io.files import writing
from parchgrad._io.tensors import read_tensors
from parchgrad.errors import StatisticsError, reason_of

__all__ = ["check_parts", "differences", "part_of_process", "read_checkpoint", "remove_checkpoints", "write_checkpoint"]

_FORMAT = "parchgrad collection checkpoint 1"


def part_of_process(path: Path, rank: int, count: int) -> Path:
    """Return the path of one process's checkpoint; ranks count from zero.

    Example:
        >>> part_of_process(Path("a.checkpoint"), 0, 2).name
        'a-1-of-2.checkpoint'
    """
    return path if count == 1 else path.with_name(f"{path.stem}-{rank + 1}-of-{count}{path.suffix}")


def check_parts(path: Path, count: int) -> None:
    """Raise `StatisticsError` if a different number of processes wrote the checkpoints."""
    found = {int(part.stem.rsplit("-of-", 1)[1]): part for part in _parts(path)}
    if path.exists():
        found[1] = path
    others = found.keys() - {count}
    if others:
        raise StatisticsError(
            f"The checkpoint {str(found[min(others)])!r} was written by {min(others)} processes, but there are now "
            f"{count}. Start {min(others)}, or delete the checkpoint to start over."
        )


def write_checkpoint(path: Path, settings: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Replace the checkpoint atomically.

    Raises:
        OutputError: if the file cannot be written.
    """
    with writing(path) as temporary:
        contiguous = {name: value.contiguous() for name, value in tensors.items()}
        save_file(contiguous, temporary, {"format": _FORMAT, "settings": json.dumps(dict(settings))})


def read_checkpoint(path: Path, settings: Mapping[str, str]) -> dict[str, Tensor] | None:
    """Read a checkpoint; return None if it does not exist.

    Raises:
        StatisticsError: if the file is not a checkpoint, or was written with other settings; names them.
    """
    if not path.exists():
        return None
    try:
        header, tensors = read_tensors(path)
        if header.get("format") != _FORMAT:
            raise ValueError("not a checkpoint of this release")
        earlier = {str(name): str(text) for name, text in dict(json.loads(header["settings"])).items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StatisticsError(
            f"Cannot read the checkpoint {str(path)!r} ({reason_of(error)}). Delete it to start over."
        ) from error
    differing = differences(earlier, settings)
    if differing:
        raise StatisticsError(
            f"Cannot resume from the checkpoint {str(path)!r}, since {differing}. Restore the earlier settings, "
            "or delete the checkpoint to start over."
        )
    return tensors


def remove_checkpoints(path: str | Path) -> None:
    """Remove the checkpoints of all processes of a run, once its result is saved."""
    path = Path(path)
    for file in (path, *_parts(path)):
        file.unlink(missing_ok=True)


def _parts(path: Path) -> list[Path]:
    """Find the per-process checkpoints of this run, but not of runs whose names share the prefix."""
    name = re.compile(rf"{re.escape(path.stem)}-\d+-of-\d+{re.escape(path.suffix)}")
    return [file for file in path.parent.glob(f"{escape(path.stem)}-*") if name.fullmatch(file.name)]


def differences(earlier: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Describe the differences between two settings; empty if there are none.

    Example:
        >>> differences({"seed": "0", "model": "a"}, {"seed": "1", "model": "a"})
        "seed was '0' and is '1'"
    """
    names = [name for name in (*now, *(set(earlier) - set(now))) if earlier.get(name) != now.get(name)]
    return ", ".join(f"{name} was {_short(earlier.get(name))} and is {_short(now.get(name))}" for name in names)


def _short(value: str | None) -> str:
    return repr(value) if value is None or len(value) <= 60 else repr(value[:57] + "...")
