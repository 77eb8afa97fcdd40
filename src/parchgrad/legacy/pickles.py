"""Read pickled statistics of the original research code without executing untrusted code."""

import io
import math
import pickle
import pickletools
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from parchgrad._io.files import refuse_special
from parchgrad._io.tensors import SAFE_TORCH
from parchgrad.core._torch import rebuilt_tensor, storage_bytes
from parchgrad.core.layers import find_convolutions
from parchgrad.errors import StatisticsError, reason_of
from parchgrad.statistics.layer import PARTS_READ, PICKLES, RankedLayerStatistics
from parchgrad.statistics.store import ChannelStatistics

__all__ = ["import_pickles", "pickle_files", "read_tensor_list"]

# Opcodes for a list of tensors: constants, containers, the memo, and calls of the globals admitted below.
_OPCODE_NAMES = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 BINFLOAT BINBYTES
    SHORT_BINBYTES BINBYTES8 BINUNICODE SHORT_BINUNICODE BINUNICODE8 UNICODE EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE
    TUPLE TUPLE1 TUPLE2 TUPLE3 PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET MEMOIZE GLOBAL STACK_GLOBAL REDUCE
"""
_OPCODES = frozenset(_OPCODE_NAMES.split())
# A tensor takes about 40 opcodes, its storage 100; deep nesting would overflow the C stack and crash the process.
_MOST_OPCODES, _MOST_OF_STORAGE = 100_000, 1000


def import_pickles(folder: str | Path, model: nn.Module, *, name: str) -> ChannelStatistics:
    """Read the pickles of the original research code.

    Each file contains a list with one tensor per convolution, in module order. `ClassWise` needs `cls_p_values.pkl`,
    each (C, K), and `shapiro_p_values.pkl`, each (C,). `InstanceWise` needs `shapiro_p_values.pkl`, `gap_mean.pkl` and
    `gap_std.pkl`, each (C,). One of these sets must be complete.

    Statistics from pickles cannot be merged, and channels whose p-value underflowed to zero tie. The files do not
    record the weights they were computed with.

    Args:
        folder: folder with the files, or with a subfolder `pickles` of them.
        model: the network that the pickles were computed on.
        name: name of the network, stored in the metadata.

    Raises:
        StatisticsError: if neither set is complete, a file contains anything but a list of tensors, or does not fit
            the model.
        ModelError: if the model has no convolution.
    """
    files = dict(zip(PICKLES, pickle_files(folder), strict=True))
    place = files["shapiro_p"].parent
    missing = [part for part, file in files.items() if not file.exists()]
    if all(set(parts) & set(missing) for parts in PARTS_READ.values()):
        by_class, by_instance = (", ".join(repr(PICKLES[part]) for part in parts) for parts in PARTS_READ.values())
        raise StatisticsError(
            f"{str(place)!r} lacks {', '.join(repr(PICKLES[part]) for part in missing)}. Check the path. Selecting by "
            f"class needs {by_class}; selecting by image needs {by_instance}."
        )
    lists = {part: read_tensor_list(file) for part, file in files.items() if part not in missing}
    convolutions = find_convolutions(model)
    for part, tensors in lists.items():
        if len(tensors) != len(convolutions):
            raise StatisticsError(
                f"{PICKLES[part]!r} has {len(tensors)} layers, but {name} has {len(convolutions)} convolutions. "
                "Use the model that the pickles were computed on."
            )
    layers = {}
    for index, (layer, convolution) in enumerate(convolutions.items()):
        # Undefined p-values (of constant channels) become 1, undefined moments 0.
        held = {
            part: tensors[index].double().nan_to_num(0.0 if part in ("mean", "std") else 1.0)
            for part, tensors in lists.items()
        }
        if held["shapiro_p"].shape != (convolution.out_channels,):
            raise StatisticsError(
                f"{PICKLES['shapiro_p']!r} has p-values of shape {tuple(held['shapiro_p'].shape)} for layer {layer!r}, "
                f"which has {convolution.out_channels} channels in {name}. Use the model that the pickles were "
                "computed on."
            )
        if "log_p" in held:
            held["log_p"] = _log_p(held["log_p"], lists["log_p"][index].dtype, layer)
        try:
            layers[layer] = RankedLayerStatistics(**held, test="welch", share=1.0)
        except StatisticsError as error:
            raise StatisticsError(f"Layer {layer!r} in the pickles does not fit: {error}") from error
    return ChannelStatistics(layers, {"model": name, "data": f"pickles in {place.resolve().parent.name}"})


def _log_p(p: Tensor, dtype: torch.dtype, layer: str) -> Tensor:
    """Return the natural log of p-values that were stored in this dtype."""
    if bool(((p < 0) | (p > 1)).any()):
        raise StatisticsError(
            f"{PICKLES['log_p']!r} has values outside [0, 1] for layer {layer!r}. Use the file written by the research "
            "code."
        )
    # P-values that underflowed to zero rank before the smallest positive number.
    kind = torch.finfo(dtype)
    underflowed = math.log(kind.smallest_normal) + math.log(kind.eps) - 1
    return torch.where(p > 0, p.log(), underflowed)


def pickle_files(folder: str | Path) -> list[Path]:
    """List the paths of the four files in a folder or its subfolder `pickles`, existing or not.

    Example:
        >>> [file.name for file in pickle_files("resnet50")]
        ['cls_p_values.pkl', 'shapiro_p_values.pkl', 'gap_mean.pkl', 'gap_std.pkl']
    """
    root = Path(folder)
    # Both selectors need this file.
    if not (root / PICKLES["shapiro_p"]).exists() and (root / "pickles").is_dir():
        root = root / "pickles"
    return [root / file for file in PICKLES.values()]


def read_tensor_list(path: Path) -> list[Tensor]:
    """Read a pickled list of tensors, checking all opcodes before executing any and each global before use.

    Raises:
        StatisticsError: if the file is missing, damaged, or contains anything but a list of tensors; or if torch is
            older than 2.10, which may execute code in a pickle.
    """
    # Both are versions, not strings.
    if torch.__version__ < SAFE_TORCH:
        raise StatisticsError(
            f"torch {torch.__version__} may execute code hidden in {str(path)!r} (CVE-2026-24747). Import the pickles "
            f"where torch is at least {SAFE_TORCH}; the imported file then works with any version."
        )
    try:
        refuse_special(path)
        content = path.read_bytes()
        _check_opcodes(content)
        value = _TensorUnpickler(io.BytesIO(content)).load()
    except OSError as error:
        raise StatisticsError(f"Cannot read {str(path)!r} ({reason_of(error)}). Check the path.") from error
    except _RefusedError as error:
        raise StatisticsError(
            f"{str(path)!r} contains more than a list of tensors: {reason_of(error)}. It was not executed."
        ) from error
    except Exception as error:
        # The unpickler and torch raise all kinds of exceptions on damaged files.
        raise StatisticsError(
            f"{str(path)!r} is not a pickled list of tensors ({reason_of(error)}). Use an undamaged file."
        ) from error
    if not isinstance(value, list) or not all(_is_plain(entry) for entry in value):
        raise StatisticsError(
            f"{str(path)!r} does not contain a list of tensors. Use the pickles of the research code."
        )
    return value


def _is_plain(value: object) -> bool:
    """Whether it is a dense floating-point tensor on the CPU."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and value.is_floating_point()
    )


class _RefusedError(Exception):
    """The pickle contains something other than a list of tensors."""


def _check_opcodes(content: bytes) -> None:
    """Refuse every opcode that a list of tensors does not need, and every global not admitted.

    STACK_GLOBAL takes its names from the stack, so the unpickler checks those.
    """
    end = 0
    for count, (opcode, argument, position) in enumerate(pickletools.genops(content)):
        end = position or 0
        if count == _MOST_OPCODES:
            raise _RefusedError(f"more than {count:,} steps")
        if opcode.name not in _OPCODES:
            raise _RefusedError(f"the opcode {opcode.name}")
        if opcode.name == "GLOBAL" and tuple(str(argument).split(" ", 1)) not in _ADMITTED:
            raise _RefusedError(f"the global {str(argument).replace(' ', '.')}")
        # The memo allocates a list up to its largest index.
        if "PUT" in opcode.name and int(cast(int, argument)) > len(content):
            raise _RefusedError(f"a memo of {argument} entries")
    if end + 1 != len(content):
        raise _RefusedError(f"{len(content) - end - 1} bytes after its end")


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return one of the few functions that rebuild tensors, and refuse all others."""
        if (module, name) not in _ADMITTED:
            raise _RefusedError(f"the global {module}.{name}")
        return _ADMITTED[module, name]


def _load_storage(content: bytes) -> Any:
    """Load a storage, a torch file within the pickle, without trusting it as torch's own function does."""
    # torch writes five pickles and the values here; an archive could expand to any size.
    if content[:1] != b"\x80":
        raise _RefusedError("an archive instead of a storage")
    stream = io.BytesIO(content)
    for name in ("magic number", "version", "system", "storage", "keys"):
        for count, _ in enumerate(pickletools.genops(stream)):
            if count == _MOST_OF_STORAGE:
                raise _RefusedError(f"a storage whose {name} takes more than {count:,} steps")
    with warnings.catch_warnings():
        # torch warns about odd files before it raises an error.
        warnings.filterwarnings("ignore", module=r"torch\.")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _rebuild_tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> Tensor:
    """Rebuild a tensor within its storage; torch would extend a too small one with arbitrary memory."""
    if not isinstance(storage, torch.storage.TypedStorage):
        raise _RefusedError(f"a tensor over a {type(storage).__name__}")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise _RefusedError("a tensor of invalid size or stride")
    held = storage_bytes(storage) // storage.dtype.itemsize
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if 0 not in size and (last >= held or math.prod(size) > held):
        raise _RefusedError("a tensor beyond its storage")
    return rebuilt_tensor(storage, offset, size, stride)


def _no_hooks() -> OrderedDict[str, Any]:
    """Return empty backward hooks; an OrderedDict with content would hash untrusted objects."""
    return OrderedDict()


_ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch.storage", "_load_from_bytes"): _load_storage,
    ("collections", "OrderedDict"): _no_hooks,
}
