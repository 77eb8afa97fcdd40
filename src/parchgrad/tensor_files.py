"""Reading safetensors files of others."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from parchgrad.errors import reason_of
from parchgrad.files import refuse_special

__all__ = ["read_tensors"]


def read_tensors(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the texts of a safetensors file's header, and its tensors. Nothing in it is executed.

    Raises:
        OSError: if there is no such file, or it may not be read.
        ValueError: if it is no such file, or damaged.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"a": torch.tensor([1.5])}, Path(folder, "a"), {"format": "mine"})
        ...     read_tensors(Path(folder, "a"))
        ({'format': 'mine'}, {'a': tensor([1.5000])})
    """
    refuse_special(path)
    try:
        with safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
            return opened.metadata() or {}, tensors
    except (SafetensorError, ValueError, TypeError, OverflowError, RuntimeError, KeyError, AttributeError) as error:
        # What torch says of shapes and types that it does not have.
        raise ValueError(reason_of(error)) from error
