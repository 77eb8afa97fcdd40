"""The private names of torch that the package needs, all in one place."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from functools import lru_cache
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = [
    "are_transforms_active",
    "current_backward_pass",
    "forward_hooks",
    "function_of",
    "has_plain_forward",
    "has_saved_tensor_hooks",
    "in_place_changes",
    "is_batched",
    "is_compiled",
    "leaves",
    "map_tensors",
    "open_body",
    "own_parameter",
    "rebuilt_tensor",
    "storage_bytes",
    "will_run",
    "without_function_modes",
]


def are_transforms_active() -> bool:
    """Whether the caller runs inside a transform of torch.func."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active


def current_backward_pass() -> int:
    """Return the id of the running backward pass, or -1 outside of any.

    Example:
        >>> current_backward_pass()
        -1
    """
    number: int = torch._C._current_graph_task_id()
    return number


def will_run(node: Any) -> bool:
    """Whether the running backward pass goes through a node of the graph, now, before or later."""
    runs: bool = torch._C._will_engine_execute_node(node)
    return runs


def is_batched(values: Tensor) -> bool:
    """Whether a gradient stands for several backward passes at once, as with `is_grads_batched=True`."""
    batched: bool = torch._C._functorch.is_legacy_batchedtensor(values)
    return batched


def without_function_modes() -> AbstractContextManager[object]:
    """Hide the calls of a block from torch's function modes."""
    hidden: AbstractContextManager[object] = torch._C.DisableTorchFunction()
    return hidden


@lru_cache
def open_body(function: Any) -> Callable[..., Any]:
    """Copy a function of torch that is written in Python, so that function modes intercept the calls inside of it."""
    names = [name for name in function.__globals__ if name.startswith("has_torch_function")]
    copied = FunctionType(
        function.__code__, {**function.__globals__, **dict.fromkeys(names, _never)}, function.__name__
    )
    copied.__defaults__, copied.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return copied


def _never(*arguments: object) -> bool:
    return False


def function_of(node: Any) -> Any:
    """Return the autograd function in Python of a node of the graph, or None if the node is one of torch's own."""
    return getattr(type(node), "_forward_cls", None)


def has_saved_tensor_hooks() -> bool:
    """Whether hooks intercept what operations save for the backward pass, as in checkpointed parts of a model."""
    # Torch tells since 2.8; before, balanced checkpointed parts fail with torch's CheckpointError.
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


def in_place_changes(values: Tensor) -> int | None:
    """Count the in-place changes of a tensor; None for inference tensors, which have no counter."""
    return None if values.is_inference() else values._version


def leaves(values: Any) -> list[Any]:
    """Flatten nested tuples, lists, dicts and registered dataclasses such as the outputs of Hugging Face's models.

    Example:
        >>> leaves({"logits": 1, "hidden": (2, [3])})
        [1, 2, 3]
    """
    found: list[Any] = torch.utils._pytree.tree_flatten(values)[0]
    return found


def map_tensors(function: Callable[[Any], Any], values: Any) -> Any:
    """Apply a function to every leaf of nested tuples, lists, dicts and registered dataclasses.

    Example:
        >>> map_tensors(lambda leaf: leaf + 1, {"a": (1, [2])})
        {'a': (2, [3])}
    """
    return torch.utils._pytree.tree_map(function, values)


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile wraps this module or was applied to it in place."""
    # Direct look-ups avoid nn.Module's slow __getattr__.
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """Return a module's parameter, or None where it is computed in every pass, as a parametrized weight is."""
    return module._parameters.get(name)


def forward_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """List the hooks that are called before and after a module's forward pass."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def has_plain_forward(convolution: nn.Module) -> bool:
    """Whether a convolution computes as the library's class does, with no forward of its own or of its class."""
    own = vars(convolution)
    return "forward" not in own and "_conv_forward" not in own and _has_plain_forward(cast(Hashable, type(convolution)))


@lru_cache(maxsize=256)
def _has_plain_forward(found: Any) -> bool:
    kind = next((kind for kind in found.__mro__ if kind.__module__ in _CONVOLUTIONS), None)
    if kind is None:
        return False
    return all(getattr(found, name, None) is getattr(kind, name, None) for name in ("forward", "_conv_forward"))


# Modules that define the libraries' classes of convolutions.
_CONVOLUTIONS = ("torch.nn.modules.conv", "torchvision.ops.deform_conv")


def storage_bytes(storage: torch.storage.TypedStorage) -> int:
    """Return the size of a typed storage; the public ways warn that such storages are deprecated."""
    return storage._untyped_storage.nbytes()


def rebuilt_tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Make a tensor over a typed storage, as torch's pickles do. It extends a storage that is too small."""
    rebuild: Callable[..., Tensor] = torch._utils._rebuild_tensor_v2
    return rebuild(storage, offset, size, stride, False, OrderedDict())
