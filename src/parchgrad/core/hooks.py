"""Helpers for hooks on modules that threads share."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["TransientHook", "current_backward_pass", "tensors_in"]


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


def current_backward_pass() -> int:
    """Return the id of the running backward pass, or -1 outside of any, as torch's multi-tensor hooks do.

    Example:
        >>> current_backward_pass()
        -1
    """
    number: int = torch._C._current_graph_task_id()
    return number


def tensors_in(values: Any) -> list[Tensor]:
    """Collect the floating-point tensors in nested tuples, lists and dicts, such as a module's inputs or output.

    Example:
        >>> tensors_in({"out": torch.zeros(1), "classes": [torch.tensor(1)]})
        [tensor([0.])]
    """
    found, _ = torch.utils._pytree.tree_flatten(values)
    return [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point()]
