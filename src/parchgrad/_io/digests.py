"""Digests of values."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parchgrad._io.files import without_addresses

__all__ = ["digest"]


def digest(value: Any) -> str:
    """Compute the SHA-256 of nested containers of tensors, arrays and plain values.

    Example:
        >>> digest({"a": torch.ones(2)}) == digest({"a": torch.ones(2)})
        True
    """
    found = hashlib.sha256()

    def update(part: Any) -> None:
        if isinstance(part, Tensor):
            flat = part.detach().cpu().contiguous()
            found.update(f"{part.dtype} {tuple(part.shape)}".encode())
            found.update(flat.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(part, np.ndarray):
            found.update(f"{part.dtype} {part.shape}".encode())
            found.update(np.ascontiguousarray(part).tobytes())
        elif isinstance(part, Mapping):
            for name, inner in part.items():
                found.update(str(name).encode())
                update(inner)
        elif isinstance(part, list | tuple):
            found.update(f"{len(part)} items".encode())
            for inner in part:
                update(inner)
        else:
            found.update(without_addresses(f"{part!r};").encode())

    update(value)
    return found.hexdigest()
