"""Read untrusted safetensors files."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.torch_version import TorchVersion

from parchgrad._io.files import refuse_special
from parchgrad.errors import reason_of

__all__ = ["SAFE_TORCH", "read_tensors"]

SAFE_TORCH = TorchVersion("2.10")
"""Earlier releases can be made to execute code by a pickle, even with `weights_only=True`."""


def read_tensors(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read metadata and tensors of a safetensors file, without executing anything in it.

    Raises:
        OSError: if the file does not exist or cannot be read.
        ValueError: if it is damaged or not a safetensors file.

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
        # Old releases of safetensors load to torch's default device.
        with torch.device("cpu"), safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
            return opened.metadata() or {}, tensors
    except (SafetensorError, ValueError, TypeError, OverflowError, RuntimeError, KeyError, AttributeError) as error:
        # Includes torch's errors for unsupported shapes and types.
        raise ValueError(reason_of(error)) from error
