"""The rows of a run and their files."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from parchgrad._io.files import refuse_special
from parchgrad.errors import InputError, OutputError, reason_of
from parchgrad.evaluation.scores import SCORES

__all__ = ["Row", "read_rows"]

Row = dict[str, Any]
"""Scores of one map by name, along with its model, setting and image."""
# Fields of a row other than scores, by type; missing values are null.
_TEXTS = ("model", "setting", "image", "group", "method", "selector", "conserve", "masks")
_WHOLE_NUMBERS = ("index", "label", "target", "predicted")
_NUMBERS = ("probability", "seconds", "quantile", "softness", "gates")
_NEEDED = ("model", "setting", "index", "seconds")
# Start of every row as `_score` and `json.dumps` write it.
_ROW_START = b'{"model": '
# Sums of cubes of larger numbers overflow a float.
_LARGEST = 1e100


def read_rows(folder: str | Path) -> list[Row]:
    """Read the rows of a run from all processes, ordered by setting (in order of appearance) and image.

    Raises:
        InputError: if the folder has no run, or one of its files is damaged.
    """
    place = Path(folder)
    if not (place / "run.json").is_file():
        raise InputError(f"{str(folder)!r} does not contain a run. Pass a folder that an evaluation wrote.")
    found: dict[tuple[str, int], Row] = {}
    for file in sorted(place.glob("rows-*.jsonl")):
        for number, line in enumerate(_complete_lines(file), start=1):
            try:
                row = _checked_row(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"Line {number} of {str(file)!r} is not a row of a run ({reason_of(error)}). Remove it and run the "
                    "evaluation again."
                ) from error
            found.setdefault((row["setting"], row["index"]), row)
    order = {title: place for place, title in enumerate(dict.fromkeys(title for title, _ in found))}
    return [found[key] for key in sorted(found, key=lambda key: (order[key[0]], key[1]))]


def _checked_row(value: object) -> Row:
    """Check a decoded line and replace null by NaN; raise ValueError if it is not a row that an evaluation wrote."""
    if not isinstance(value, dict) or not value.keys() >= set(_NEEDED):
        raise ValueError(f"it needs {', '.join(_NEEDED)}")
    row = {field: math.nan if found is None else found for field, found in value.items()}
    for field, found in row.items():
        if value[field] is None:
            fits = field not in (*_NEEDED, *_WHOLE_NUMBERS)
        elif field in _TEXTS:
            fits = isinstance(found, str)
        elif field in _WHOLE_NUMBERS:
            fits = type(found) is int and 0 <= found <= _LARGEST
        elif field == "gamma":
            fits = found == "inf" or _is_number(found)
        elif field == "layers":
            fits = isinstance(found, str) or _is_number(found)
            fits = fits or (isinstance(found, list) and all(isinstance(name, str) for name in found))
        elif field in ("antialias", "balance"):
            fits = isinstance(found, bool)
        elif field in _NUMBERS or field in SCORES:
            fits = _is_number(found)
        else:
            # Unknown fields of other releases are accepted, but scores at invalid ratios are not.
            score, _, ratio = field.partition("@")
            fits = score not in SCORES or (_is_number(found) and _is_level(score, float(ratio)))
        if not fits:
            raise ValueError(f"{field[:40]!r} has an invalid value")
    return row


def _is_number(value: object) -> bool:
    # Written this way so that NaN fails too.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_level(score: str, level: float) -> bool:
    """Whether a score can be reported at this share or noise level; only noise levels may exceed 1."""
    return 0 <= level <= 1 or (SCORES[score].family == "stability" and 1 < level < math.inf)


class RowFile:
    """Appends rows to a file one batch at a time, after cutting off a line that an interrupted run left unfinished."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> "RowFile":
        try:
            if self._path.is_symlink():
                raise self._cannot("it is a link")
            if self._path.exists():
                refuse_special(self._path)
                self._cut()
            # Unbuffered: after a write failed on a full disk, closing would try to write the buffer again.
            self._file = self._path.open("ab", buffering=0)
        except OutputError:
            raise
        except OSError as error:
            raise self._cannot(reason_of(error)) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _cut(self) -> None:
        whole = sum(len(line) for line in _complete_lines(self._path))
        with self._path.open("rb") as file:
            file.seek(whole)
            # Some file systems leave zeros after a power cut.
            unfinished = file.read().rstrip(b"\0")
        # Never cut a line that an evaluation did not write.
        if not (_ROW_START.startswith(unfinished) or unfinished.startswith(_ROW_START)):
            raise self._cannot("its last line is not a row of a run")
        os.truncate(self._path, whole)

    def append(self, rows: Sequence[Row]) -> None:
        left = memoryview("".join(f"{_line_of(row)}\n" for row in rows).encode())
        try:
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._cannot(reason_of(error)) from error

    def _cannot(self, reason: str) -> OutputError:
        return OutputError(f"Cannot write {str(self._path)!r} ({reason}). Choose another folder.")


def _line_of(row: Row) -> str:
    """Encode a row as a line, and check that it can be read again."""
    try:
        line = json.dumps({key: _plain(value) for key, value in row.items()}, allow_nan=False)
        _checked_row(json.loads(line))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"Cannot write the row of {row['setting']!r} and image {row['image']!r} ({reason_of(error)}). Pass samples "
            "and settings with values of the documented types."
        ) from error
    return line


def _plain(value: object) -> object:
    """Replace NaN and infinity by None, since JSON has neither."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _complete_lines(file: Path) -> Iterator[bytes]:
    try:
        refuse_special(file)
        with file.open("rb") as opened:
            yield from (line for line in opened if line.endswith(b"\n"))
    except OSError as error:
        raise InputError(f"Cannot read {str(file)!r} ({reason_of(error)}). Choose another folder.") from error
