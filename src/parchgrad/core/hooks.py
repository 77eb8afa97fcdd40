"""Helpers for hooks on modules that threads share."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from parchgrad.core._torch import leaves

__all__ = ["TransientHook", "tensors_in"]


class TransientHook(functools.partial[Any]):
    """A hook that does nothing in a copied or pickled module.

    Example:
        >>> import copy
        >>> copy.deepcopy(TransientHook(print))("module", "inputs", "output")
    """

    def __deepcopy__(self, memo: object) -> Callable[..., None]:
        """Replace the hook by a no-op in the copy."""
        return _do_nothing

    def __reduce__(self) -> tuple[Any, ...]:
        """Replace the hook by a no-op in the pickle."""
        return _nothing_to_do, ()


def _do_nothing(*arguments: object) -> None:
    """No-op in place of a hook."""


def _nothing_to_do() -> Callable[..., None]:
    return _do_nothing


def tensors_in(values: Any) -> list[Tensor]:
    """Collect the floating-point tensors in nested tuples, lists and dicts, such as a module's inputs or output.

    Example:
        >>> import torch
        >>> tensors_in({"out": torch.zeros(1), "classes": [torch.tensor(1)]})
        [tensor([0.])]
    """
    return [leaf for leaf in leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
