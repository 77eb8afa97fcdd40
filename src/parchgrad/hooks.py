"""Hooks on modules and tensors that threads share: what copies of them do, whose pass it is, how a failure shows."""

import functools
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import torch

__all__ = ["TransientHook", "UnmaskedFailures", "current_backward_pass", "raise_masked_failure"]

# What Python says of an ordered dictionary that was changed while a loop went over it.
_CHANGED = ("OrderedDict mutated during iteration", "OrderedDict changed size during iteration")


class TransientHook(functools.partial[Any]):
    """A hook that stays behind when its module is copied or pickled: in the copy it does nothing.

    Example:
        >>> import copy
        >>> copy.deepcopy(TransientHook(print))("module", "inputs", "output")
    """

    def __deepcopy__(self, memo: object) -> Callable[..., None]:
        """Give the copy a function that does nothing."""
        return _do_nothing

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave a function that does nothing in a pickle."""
        return _nothing_to_do, ()


def _do_nothing(*arguments: object) -> None:
    """Stand where a hook was."""


def _nothing_to_do() -> Callable[..., None]:
    return _do_nothing


class UnmaskedFailures:
    """Re-raise the original exception of a pass that fails in the block; see `raise_masked_failure`.

    Example:
        >>> model = torch.nn.Conv1d(3, 1, 1)
        >>> def meddle(*of_pass):  # as another thread may
        ...     model.register_forward_hook(meddle).remove()
        >>> handles = [model.register_forward_hook(meddle, always_call=True) for _ in range(2)]
        >>> with UnmaskedFailures():  # without it: OrderedDict mutated during iteration
        ...     model(torch.ones(1, 4, 8))
        Traceback (most recent call last):
            ...
        RuntimeError: Given groups=1, weight of size [1, 3, 1], expected input[1, 4, 8] to have 3 channels, ...
    """

    def __enter__(self) -> None:
        """Nothing is set."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Re-raise the original exception where another error replaced it."""
        raise_masked_failure(error)


def raise_masked_failure(error: BaseException | None) -> None:
    """Re-raise the original exception of a pass if torch replaced it.

    When a module's pass fails, torch goes over the module's hooks to call those that are always called. Where another
    thread sets or removes one meanwhile, that loop ends in an error of its own.

    Example:
        >>> raise_masked_failure(ValueError("This is the failure itself."))
    """
    failure = error
    while failure is not None and _is_mask(failure):
        failure = failure.__context__
    if failure is None or failure is error:
        return
    context = failure.__context__
    try:
        raise failure
    finally:
        # Raising it here gave it another; and a failure that its own frame holds would keep the pass's tensors alive.
        failure.__context__ = context
        del error, failure


def _is_mask(error: BaseException) -> bool:
    """Whether torch's call of a module raised the error while it handled a failure of that same call."""
    if not isinstance(error, RuntimeError) or str(error) not in _CHANGED or error.__context__ is None:
        return False
    # None of an error that was never raised.
    last = _frames(error)[-1:]
    by_torch = any(frame.f_globals.get("__name__") == "torch.nn.modules.module" for frame in last)
    return by_torch and last[0] in _frames(error.__context__)


def _frames(error: BaseException) -> list[FrameType]:
    """Where an error came by, from where it was caught to where it was raised."""
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    return frames


def current_backward_pass() -> int:
    """Number of the backward pass under way, -1 outside of any: torch's hooks over several tensors tell them apart so.

    Example:
        >>> current_backward_pass()
        -1
    """
    number: int = torch._C._current_graph_task_id()
    return number
