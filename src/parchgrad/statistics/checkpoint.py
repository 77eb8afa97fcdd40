"""Checkpoints of a collection: written whole or not at all, and read again only under the same settings."""

import json
import re
from collections.abc import Mapping
from glob import escape
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from parchgrad.errors import StatisticsError, reason_of
from parchgrad.files import remove_abandoned, writing
from parchgrad.tensor_files import read_tensors

__all__ = ["check_parts", "differences", "part_of_process", "read_checkpoint", "remove_checkpoints", "write_checkpoint"]

_FORMAT = "parchgrad collection checkpoint 1"


def part_of_process(path: Path, rank: int, count: int) -> Path:
    """Name the checkpoint of one of several processes, counted from zero.

    Example:
        >>> part_of_process(Path("a.checkpoint"), 0, 2).name
        'a-1-of-2.checkpoint'
    """
    return path if count == 1 else path.with_name(f"{path.stem}-{rank + 1}-of-{count}{path.suffix}")


def check_parts(path: Path, count: int) -> None:
    """Raise `StatisticsError` if there are checkpoints of another number of processes than now."""
    found = {int(part.stem.rsplit("-of-", 1)[1]): part for part in _parts(path)}
    if path.exists():
        found[1] = path
    others = found.keys() - {count}
    if others:
        raise StatisticsError(
            f"The checkpoint {str(found[min(others)])!r} was made by {min(others)} processes, and now there are "
            f"{count}; start as many, or delete the checkpoint to start anew."
        )


def write_checkpoint(path: Path, settings: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint over an earlier one; a process killed at any moment leaves one of the two.

    Raises:
        OutputError: if the file cannot be written.
    """
    with writing(path) as temporary:
        contiguous = {name: value.contiguous() for name, value in tensors.items()}
        save_file(contiguous, temporary, {"format": _FORMAT, "settings": json.dumps(dict(settings))})


def read_checkpoint(path: Path, settings: Mapping[str, str]) -> dict[str, Tensor] | None:
    """Read a checkpoint, or nothing where there is none; what a killed process left half-written is removed.

    Raises:
        StatisticsError: if the file is no checkpoint, or was made with other settings, which are named.
    """
    remove_abandoned(path)
    if not path.exists():
        return None
    try:
        header, tensors = read_tensors(path)
        if header.get("format") != _FORMAT:
            raise ValueError("it is a file of another kind or release")
        earlier = {str(name): str(text) for name, text in dict(json.loads(header["settings"])).items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StatisticsError(
            f"The checkpoint {str(path)!r} cannot be read ({reason_of(error)}); delete it to start anew."
        ) from error
    differing = differences(earlier, settings)
    if differing:
        raise StatisticsError(
            f"The checkpoint {str(path)!r} cannot be resumed, since {differing}; restore what was, "
            "or delete the checkpoint to start anew."
        )
    return tensors


def remove_checkpoints(path: str | Path) -> None:
    """Remove the checkpoints of all processes of a run, once its result is saved."""
    path = Path(path)
    for file in (path, *_parts(path)):
        file.unlink(missing_ok=True)


def _parts(path: Path) -> list[Path]:
    """The checkpoints of several processes of this run, and not those of a run whose name only begins alike."""
    name = re.compile(rf"{re.escape(path.stem)}-\d+-of-\d+{re.escape(path.suffix)}")
    return [file for file in path.parent.glob(f"{escape(path.stem)}-*") if name.fullmatch(file.name)]


def differences(earlier: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Say what differs between two settings, in words; empty where nothing does.

    Example:
        >>> differences({"seed": "0", "model": "a"}, {"seed": "1", "model": "a"})
        "seed was '0' and is '1'"
    """
    names = [name for name in (*now, *(set(earlier) - set(now))) if earlier.get(name) != now.get(name)]
    return ", ".join(f"{name} was {_short(earlier.get(name))} and is {_short(now.get(name))}" for name in names)


def _short(value: str | None) -> str:
    return repr(value) if value is None or len(value) <= 60 else repr(value[:57] + "...")
