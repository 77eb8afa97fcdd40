"""The logits in a model's output, and the class to explain: given, or read off the gradient at the logits."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from parchgrad.errors import ModelError, SettingError, TargetError

__all__ = [
    "Target",
    "check_logits",
    "check_target_count",
    "check_target_range",
    "describe_output",
    "find_logits",
    "find_named",
    "integer_targets",
    "pick_logits",
    "read_classes",
    "without_boxes",
]

Target = int | Sequence[int] | Tensor


def check_logits(pick: object) -> None:
    """Raise `SettingError` unless `pick` is a function or None."""
    if pick is not None and not callable(pick):
        raise SettingError(f"`logits` is {pick!r}, but it must be a function that extracts them from the output.")


def pick_logits(output: Any, pick: Callable[[Any], Tensor]) -> Tensor:
    """Extract the logits from a model's output.

    Raises:
        ModelError: if the function fails on this output, or does not return a tensor.

    Example:
        >>> pick_logits({"out": torch.ones(1, 2)}, lambda output: output["out"])
        tensor([[1., 1.]])
    """
    try:
        found = pick(output)
    except (TypeError, LookupError, AttributeError) as error:
        kind = type(output).__name__
        raise ModelError(
            f"`logits` fails on the {kind} that the model returns ({type(error).__name__}: {error}). Pass a function "
            f"that accepts a {kind}."
        ) from error
    if not isinstance(found, Tensor):
        raise ModelError(
            f"`logits` returns a {type(found).__name__}, but a tensor is needed. Return one of the tensors in the "
            "model's output."
        )
    return found


def find_logits(output: Any) -> Any:
    """Find the logits in a model's output of any type.

    These are a tensor itself; the only tensor under the name `logits` or `out` of a mapping or named tuple, such as a
    `ModelOutput` of Hugging Face; and the first entry of a tuple if it alone has the shape (B, K). Any other output is
    returned unchanged.

    Example:
        >>> logits = torch.ones(1, 2)
        >>> [find_logits(output) is logits for output in (logits, {"out": logits, "aux": logits}, (logits, None))]
        [True, True, True]
        >>> find_logits((logits, logits)) is logits
        False
    """
    found = find_named(output, ("logits", "out"))
    if found is not None:
        return found
    if isinstance(output, tuple | list):
        matrices = [each for each in output if isinstance(each, Tensor) and each.dim() == 2]
        if len(matrices) == 1 and output[0] is matrices[0]:
            return matrices[0]
    return output


def find_named(output: Any, names: Sequence[str]) -> Tensor | None:
    """Find the only tensor of a mapping or named tuple under one of several names; None if there are none or several.

    Example:
        >>> find_named({"embedding": torch.ones(1), "loss": 2.0}, ["embedding", "loss"])
        tensor([1.])
    """
    found = [value for name, value in _entries(output) if name in names and isinstance(value, Tensor)]
    return found[0] if len(found) == 1 else None


def describe_output(output: Any) -> str:
    """Describe an output in a message: its type, and the shapes of the tensors in it.

    Example:
        >>> describe_output({"boxes": torch.ones(2, 9, 4), "loss": 0.5})
        "a dict with 'boxes' (2, 9, 4)"
        >>> describe_output([]), describe_output(torch.ones(2))
        ('a list', 'shape (2,)')
    """
    if isinstance(output, Tensor):
        return f"shape {tuple(output.shape)}"
    parts = [f"{name!r} {tuple(value.shape)}" for name, value in _entries(output) if isinstance(value, Tensor)]
    kind = type(output).__name__
    article = "an" if kind[:1].lower() in ("a", "e", "i", "o", "u") else "a"
    return f"{article} {kind}" + (f" with {', '.join(parts)}" if parts else "")


def without_boxes(output: Any) -> Any:
    """Return an output without the boxes of detections, which are rarely explained.

    Example:
        >>> without_boxes([{"boxes": torch.zeros(1, 4), "scores": torch.ones(1)}])
        [tensor([1.])]
    """
    if isinstance(output, list) and all(isinstance(row, Mapping) and "scores" in row for row in output):
        return [row["scores"] for row in output]
    entries = _entries(output)
    if any(name in ("boxes", "pred_boxes") for name, _ in entries):
        return [value for name, value in entries if name not in ("boxes", "pred_boxes")]
    return output


def _entries(output: Any) -> list[tuple[Any, Any]]:
    """The entries of a mapping, named tuple or sequence, with their names or places."""
    if isinstance(output, Mapping):
        return list(output.items())
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return list(zip(cast(Any, output)._fields, output, strict=True))
    return list(enumerate(output)) if isinstance(output, tuple | list) else []


def read_classes(gradient: Tensor) -> Tensor:
    """Read the explained class of each row off the gradient at the logits.

    It is the largest positive entry of the row, or the entry of largest magnitude if none is positive. For a map per
    class, positive entries or magnitudes are summed over the map.

    Args:
        gradient: gradient at the logits, shape (B, K, *S); (B,) counts as one class.

    Returns:
        Class indices, shape (B,).

    Example:
        >>> read_classes(torch.tensor([[0.0, 1.0, -3.0], [0.0, -2.0, -1.0]]))
        tensor([1, 1])
    """
    if gradient.dim() == 1:
        gradient = gradient.unsqueeze(1)
    maps = gradient.flatten(2) if gradient.dim() > 2 else gradient.unsqueeze(2)
    # Not a plain sum: weights of both signs, such as a region minus its surroundings, would cancel.
    largest, classes = maps.clamp_min(0).sum(dim=2).max(dim=1)
    return torch.where(largest > 0, classes, maps.abs().sum(dim=2).argmax(dim=1))


def integer_targets(target: Target) -> Tensor:
    """Convert a target to class indices (N,) of dtype int64; a single class gives N = 1.

    Raises:
        TargetError: if `target` holds anything but integers, or a negative one.
    """
    try:
        # A number belongs to no device yet, whatever the default device.
        targets = target if isinstance(target, Tensor) else torch.as_tensor(target, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TargetError(
            f"`target` is {target!r}, but it must be a class index or one per row. Use `Classifier.find_category` to "
            "find the index of a name."
        ) from error
    inexact = targets.is_floating_point() or targets.is_complex()
    if inexact or targets.dtype == torch.bool or targets.dim() > 1 or targets.numel() == 0:
        raise TargetError(
            f"`target` is {targets.dtype} of shape {tuple(targets.shape)}, but it must be an integer class index "
            "or one per row, shape (B,)."
        )
    if int(targets.min()) < 0:
        raise TargetError(f"`target` holds {int(targets.min())}, but class indices start at 0. Pass 0 or more.")
    return targets.reshape(-1).long()


def check_target_range(highest: int, classes: int) -> None:
    """Raise `TargetError` if the highest target is out of range for this many classes."""
    if highest >= classes:
        raise TargetError(
            f"`target` holds {highest}, but the model has {classes} classes. Pass indices from 0 to {classes - 1}."
        )


def check_target_count(targets: Tensor, rows: int, what: str) -> None:
    """Raise `TargetError` unless there is one target for all rows of a batch or pass, or one per row."""
    if targets.numel() not in (1, rows):
        raise TargetError(
            f"`target` has {targets.numel()} classes, but the {what} has {rows} rows. Pass one class per row, or one "
            "for all."
        )
