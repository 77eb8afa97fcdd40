"""Reading the pickled statistics of the original research code without trusting them."""

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

from parchgrad.errors import StatisticsError, reason_of
from parchgrad.files import refuse_special
from parchgrad.layers import find_convolutions
from parchgrad.statistics.layer import RankedLayerStatistics
from parchgrad.statistics.store import ChannelStatistics

__all__ = ["import_pickles", "pickle_files", "read_tensor_list"]

_FILES = ("cls_p_values", "shapiro_p_values", "gap_mean", "gap_std")

# What pickling a list of tensors needs: constants, containers, the memo, and calls of the globals admitted below.
_OPCODE_NAMES = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 BINFLOAT BINBYTES
    SHORT_BINBYTES BINBYTES8 BINUNICODE SHORT_BINUNICODE BINUNICODE8 UNICODE EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE
    TUPLE TUPLE1 TUPLE2 TUPLE3 PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET MEMOIZE GLOBAL STACK_GLOBAL REDUCE
"""
_OPCODES = frozenset(_OPCODE_NAMES.split())
# A tensor takes 40, and the storage of one 100; what is nested deeper than the stack of C would end the process.
_MOST_OPCODES, _MOST_OF_STORAGE = 100_000, 1000


def import_pickles(folder: str | Path, model: nn.Module, *, name: str) -> ChannelStatistics:
    """Read `cls_p_values.pkl`, `shapiro_p_values.pkl`, `gap_mean.pkl` and `gap_std.pkl` of the original research code.

    Each holds a list with a tensor for every convolution in module order: (C, K), and three times (C,). They hold
    p-values rather than moments: such statistics serve the selectors, but cannot be merged, and channels whose p has
    underflowed to zero tie. Nothing tells whether the weights are the model's.

    Args:
        folder: the folder that holds the four files, or one that holds them in a folder `pickles`.
        model: the network they are of.
        name: its name, for the record.

    Raises:
        StatisticsError: if a file is missing, holds anything but a list of tensors, or does not fit the model.
        ModelError: if the model holds no convolution.
    """
    files = pickle_files(folder)
    lists = {file.stem: read_tensor_list(file) for file in files}
    convolutions = find_convolutions(model)
    for file, tensors in lists.items():
        if len(tensors) != len(convolutions):
            raise StatisticsError(
                f"'{file}.pkl' holds {len(tensors)} layers, but {name} has {len(convolutions)} convolutions; "
                "name the model that the pickles are of."
            )
    layers = {}
    for layer, convolution, p, *others in zip(convolutions, convolutions.values(), *lists.values(), strict=True):
        if p.dim() != 2 or len(p) != convolution.out_channels:
            raise StatisticsError(
                f"Layer {layer!r} has p-values of shape {tuple(p.shape)}, but {convolution.out_channels} channels; "
                "name the model that the pickles are of."
            )
        # What is not defined, as of a constant channel, counts as p = 1; a normality test that failed, as normal.
        known = p.double().nan_to_num(1.0)
        if bool(((known < 0) | (known > 1)).any()):
            raise StatisticsError(
                f"'cls_p_values.pkl' holds values outside [0, 1] for layer {layer!r}; give the file that the research "
                "code wrote."
            )
        shapiro_p, mean, std = (part.double().nan_to_num(fill) for part, fill in zip(others, (1, 0, 0), strict=True))
        # What has underflowed ranks before the smallest number there is.
        kind = torch.finfo(p.dtype)
        underflowed = math.log(kind.smallest_normal) + math.log(kind.eps) - 1
        log_p = torch.where(known > 0, known.log(), underflowed)
        try:
            layers[layer] = RankedLayerStatistics(mean=mean, std=std, shapiro_p=shapiro_p, log_p=log_p, test="welch")
        except StatisticsError as error:
            raise StatisticsError(f"Layer {layer!r} in the pickles does not fit: {error}") from error
    return ChannelStatistics(layers, {"model": name, "data": f"pickles in {files[0].parent.resolve().parent.name}"})


def pickle_files(folder: str | Path) -> list[Path]:
    """The four files of a folder, or of a folder `pickles` in it, whether they are there or not.

    Example:
        >>> [file.name for file in pickle_files("resnet50")]
        ['cls_p_values.pkl', 'shapiro_p_values.pkl', 'gap_mean.pkl', 'gap_std.pkl']
    """
    root = Path(folder)
    if not (root / f"{_FILES[0]}.pkl").exists() and (root / "pickles").is_dir():
        root = root / "pickles"
    return [root / f"{file}.pkl" for file in _FILES]


def read_tensor_list(path: Path) -> list[Tensor]:
    """Read a pickled list of tensors. Opcodes are looked at before the first is carried out, globals before each.

    Raises:
        StatisticsError: if the file is missing, damaged, or holds anything but a list of tensors.
    """
    try:
        refuse_special(path)
        content = path.read_bytes()
        _check_opcodes(content)
        value = _TensorUnpickler(io.BytesIO(content)).load()
    except OSError as error:
        raise StatisticsError(f"{str(path)!r} cannot be read ({reason_of(error)}); check the path.") from error
    except _RefusedError as error:
        raise StatisticsError(
            f"{str(path)!r} holds more than a list of tensors: {reason_of(error)}; it was not executed."
        ) from error
    except Exception as error:
        # A damaged pickle makes the unpickler and torch raise what they like.
        raise StatisticsError(
            f"{str(path)!r} is no pickled list of tensors ({reason_of(error)}); the file is damaged."
        ) from error
    if not isinstance(value, list) or not all(_is_plain(entry) for entry in value):
        raise StatisticsError(f"{str(path)!r} holds no list of tensors; give the pickles of the research code.")
    return value


def _is_plain(value: object) -> bool:
    """Whether it is a dense tensor of floating-point numbers with all its values in memory."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and value.is_floating_point()
    )


class _RefusedError(Exception):
    """The pickle holds something that a list of tensors does not."""


def _check_opcodes(content: bytes) -> None:
    """Refuse every opcode that a list of tensors does not need, and every global but those admitted.

    The names of a STACK_GLOBAL are on the stack; the unpickler refuses those that it does not admit.
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
        # The memo is a list as long as its largest index.
        if "PUT" in opcode.name and int(cast(int, argument)) > len(content):
            raise _RefusedError(f"a memo of {argument} entries")
    if end + 1 != len(content):
        raise _RefusedError(f"{len(content) - end - 1} bytes behind its end")


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Give the few functions that tensors are rebuilt by, and refuse all others."""
        if (module, name) not in _ADMITTED:
            raise _RefusedError(f"the global {module}.{name}")
        return _ADMITTED[module, name]


def _load_storage(content: bytes) -> Any:
    """A storage is a file of torch's own within the pickle; torch's version of this function trusts it."""
    # All releases of torch write five pickles and the numbers here; an archive could be of any size inside.
    if content[:1] != b"\x80":
        raise _RefusedError("an archive in place of a storage")
    stream = io.BytesIO(content)
    for name in ("magic number", "version", "system", "storage", "keys"):
        for count, _ in enumerate(pickletools.genops(stream)):
            if count == _MOST_OF_STORAGE:
                raise _RefusedError(f"a storage whose {name} takes more than {count:,} steps")
    with warnings.catch_warnings():
        # It says more of odd files than the error that follows.
        warnings.filterwarnings("ignore", module=r"torch\.")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _rebuild_tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> Tensor:
    """A tensor within its storage; torch would grow a storage that is too small by whatever stands in memory."""
    if not isinstance(storage, torch.storage.TypedStorage):
        raise _RefusedError(f"a tensor over a {type(storage).__name__}")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise _RefusedError("a tensor of odd size or stride")
    # The public ways to ask for its size warn that this kind of storage will go.
    held = storage._untyped_storage.nbytes() // storage.dtype.itemsize
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if 0 not in size and (last >= held or math.prod(size) > held):
        raise _RefusedError("a tensor beyond its storage")
    rebuild: Callable[..., Tensor] = torch._utils._rebuild_tensor_v2
    return rebuild(storage, offset, size, stride, False, OrderedDict())


def _no_hooks() -> OrderedDict[str, Any]:
    """The hooks of a tensor's backward pass; a dict of more would hash what it is given."""
    return OrderedDict()


_ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch.storage", "_load_from_bytes"): _load_storage,
    ("collections", "OrderedDict"): _no_hooks,
}
