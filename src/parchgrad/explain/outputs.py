"""The model as attribution methods see it: checked inputs, and logits or one score per row of its output."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from parchgrad.core.layers import Convolution
from parchgrad.core.targets import check_target_range, describe_output, find_logits, find_named, pick_logits
from parchgrad.errors import InputError, ModelError, ParchGradError, TargetError, reason_of
from parchgrad.explain.nonfinite import broken

__all__ = ["Inputs", "Logits", "Output", "Score", "Scores", "check_batch", "check_images", "check_inputs", "name_of"]

Inputs: TypeAlias = Tensor | tuple[Tensor, ...]
"""A batch, or one batch for each argument of a model with several inputs."""

Score: TypeAlias = Callable[[Any], Tensor]
"""Maps a model's output, or the logits extracted from it, to one score per row, shape (B,)."""


class Output(nn.Module):
    """The model as attribution methods see it: explains bad inputs and extracts the logits."""

    def __init__(self, model: nn.Module, pick: Callable[[Any], Tensor] | None = None) -> None:
        """Wrap a model.

        Args:
            model: any module.
            pick: extracts the logits from its output; None leaves that to `find_logits`.
        """
        super().__init__()
        self.model = model
        self.training = model.training
        self._pick = pick
        self._broken: Tensor | None = None

    def forward(self, *inputs: Tensor) -> Any:
        """Return what `pick` extracts from the model's output."""
        try:
            output = self.model(*inputs)
        except (torch.OutOfMemoryError, ParchGradError):
            raise
        except (RuntimeError, ValueError, AssertionError) as error:
            mismatch = _mismatch(self.model, inputs, error)
            if mismatch is None:
                raise
            raise mismatch from error
        return output if self._pick is None else pick_logits(output, self._pick)

    def note(self, scores: Tensor) -> None:
        """Record scores that are NaN or plus infinity; minus infinity rules out a class."""
        found = broken(scores.detach()).any()
        self._broken = found if self._broken is None else self._broken | found

    @property
    def was_finite(self) -> bool:
        """Whether every score so far was finite; reading it synchronises with the device."""
        return self._broken is None or not bool(self._broken)


class Logits(Output):
    """The logits of a classifier, (B, K)."""

    def __init__(
        self, model: nn.Module, highest_target: int | None, pick: Callable[[Any], Tensor] | None = None
    ) -> None:
        """Wrap a model (see `Output`); `highest_target` is the highest explained class, if any."""
        super().__init__(model, pick)
        self._highest_target = highest_target

    @property
    def output(self) -> Output:
        """The module that calls the model."""
        return self

    def broken_rows(self, *inputs: Tensor) -> Tensor:
        """Find rows with a logit that is NaN or infinite, shape (B,)."""
        return broken(self(*inputs)).any(dim=1)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return logits (B, K)."""
        output = super().forward(*inputs)
        logits = find_logits(output)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise ModelError(
                f"The model returns {describe_output(output)}, but logits of shape (B, K) are needed. "
                f"{_remedy(output)}."
            )
        if logits.shape[0] != len(inputs[0]):
            raise ModelError(
                f"The model returns {logits.shape[0]} rows of logits for {len(inputs[0])} inputs. Pass a function as "
                "`target=` that returns one score per input."
            )
        if self._highest_target is not None:
            check_target_range(self._highest_target, logits.shape[1])
        self.note(logits)
        return logits


class Scores(nn.Module):
    """One score per row, computed from the model's output by a user's function."""

    def __init__(self, output: Output, score: Score) -> None:
        """Wrap the module that calls the model, and the function.

        Raises:
            TargetError: if the function is a class, which creates an object and not a score.
        """
        super().__init__()
        if isinstance(score, type):
            raise TargetError(f"`target` is the class {score.__name__} itself. Pass an instance of it.")
        self.output = output
        self.training = output.training
        self._score = score

    def broken_rows(self, *inputs: Tensor) -> Tensor:
        """Find rows with a score that is NaN or infinite, shape (B,)."""
        return broken(self._score(self.output(*inputs)))

    def why_zero(self, batch: tuple[Tensor, ...], row: int) -> str:
        """Explain why the map of a row is zero everywhere."""
        explain = getattr(self._score, "why_zero", None)
        with torch.no_grad():
            output = self.output(*(each[row : row + 1] for each in batch))
            if explain is not None and not bool(self._score(output).any()):
                return str(explain(output))
        return "the gradient of its score is zero, as in a saturated sigmoid or behind inactive ReLUs"

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return scores (B,)."""
        scores = self._score(self.output(*inputs))
        rows = len(inputs[0])
        if not isinstance(scores, Tensor) or scores.shape != (rows,):
            raise TargetError(
                f"`target` returns {describe_output(scores)} for {rows} rows, but it must return one score per row, "
                f"shape ({rows},). Sum or pick the rest, as in lambda output: output[:, 3]."
            )
        if torch.is_grad_enabled() and not scores.requires_grad:
            raise TargetError(
                "The score that `target` returns does not depend on the model's output, or is detached from it. "
                "Compute it from the output, without detach() or argmax()."
            )
        self.output.note(scores)
        return scores


def check_inputs(inputs: Inputs) -> tuple[Tensor, ...]:
    """Return the inputs as a tuple.

    Raises:
        InputError: if they are not batches of finite floating-point numbers with the same number of rows, at least one
            of shape (B, C, *S) and the others (B, C, *S) or (B, F).

    Example:
        >>> [tuple(each.shape) for each in check_inputs((torch.rand(2, 3, 8, 8), torch.rand(2, 5)))]
        [(2, 3, 8, 8), (2, 5)]
    """
    if not isinstance(inputs, tuple):
        check_batch(inputs)
        return (inputs,)
    for index, each in enumerate(inputs):
        check_batch(each, f"inputs[{index}]", 2)
    if all(each.dim() == 2 for each in inputs):
        raise InputError("The tuple of inputs contains no image. Pass at least one tensor of shape (B, C, *S).")
    rows = [len(each) for each in inputs]
    if len(set(rows)) > 1:
        raise InputError(
            f"The inputs have {', '.join(map(str, rows))} rows, but each needs one row per image. Repeat or index them."
        )
    return inputs


def check_images(images: Sequence[Tensor], model: nn.Module) -> None:
    """Raise `InputError` unless a list holds images, each without a batch dimension."""
    if not images:
        raise InputError("`inputs` is an empty list. Pass at least one image.")
    dimensions = _dimensions_of(model)
    for image in images:
        if not isinstance(image, Tensor):
            raise InputError(
                f"`inputs` is of type list and contains a {type(image).__name__}, but a list holds one tensor (C, *S) "
                "for each image. Pass a tensor (B, C, *S), or convert each image."
            )
        if dimensions is not None and image.dim() == dimensions:
            raise InputError(
                f"`inputs` is of type list and contains a tensor of shape {tuple(image.shape)}, but a list holds one "
                "tensor (C, *S) for each image. Pass a tuple for several inputs, or leave out the batch dimension."
            )


def _dimensions_of(model: nn.Module) -> int | None:
    """Number of dimensions of a batch, judging by the model's first convolution; None if it has none."""
    first = next((module for module in model.modules() if isinstance(module, Convolution)), None)
    return None if first is None else len(first.kernel_size) + 2


def check_batch(inputs: Tensor, name: str = "inputs", dimensions: int = 3) -> None:
    """Raise `InputError` unless the inputs are a batch of finite floating-point numbers.

    Args:
        inputs: batch of shape (B, C, *S), or (B, F) with 2 dimensions.
        name: what the message calls it.
        dimensions: least number of dimensions.
    """
    wanted = "(B, C, *S)" if dimensions > 2 else "(B, C, *S) or (B, F)"
    if not isinstance(inputs, Tensor):
        raise InputError(
            f"`{name}` is of type {type(inputs).__name__}, but a tensor {wanted} is needed, or a tuple of tensors for "
            "several inputs. Convert an array with torch.from_numpy, and an image as in training, such as "
            "classifier.preprocess(image).unsqueeze(0)."
        )
    if inputs.dim() < dimensions or inputs.shape[0] == 0:
        raise InputError(f"`{name}` has shape {tuple(inputs.shape)}, but a non-empty batch {wanted} is needed.")
    if not inputs.is_floating_point():
        raise InputError(
            f"`{name}` is {inputs.dtype}, but gradients need floating point. Preprocess images first. Pass the "
            "embeddings of category indices, or fix the indices in a wrapper of the model."
        )
    if inputs.layout != torch.strided:
        raise InputError(f"`{name}` is {inputs.layout}, but a dense tensor is needed. Pass {name}.to_dense().")
    if not torch.isfinite(inputs).all():
        raise InputError(f"`{name}` contains NaN or infinite values. Look for a division by zero in the preprocessing.")


def name_of(index: int, inputs: Sequence[Tensor]) -> str:
    """Name an input in a message.

    Example:
        >>> name_of(0, [torch.rand(1)]), name_of(1, [torch.rand(1), torch.rand(1)])
        ('inputs', 'inputs[1]')
    """
    return "inputs" if len(inputs) == 1 else f"inputs[{index}]"


def _remedy(output: Any) -> str:
    """Say how to explain an output without logits."""
    logits = find_logits(output)
    dimensions = logits.dim() if isinstance(logits, Tensor) else 0
    if isinstance(output, list) and output and isinstance(output[0], Mapping) and "boxes" in output[0]:
        return "Pass target=parchgrad.BoxScore(box=..., label=...) to explain a detection"
    if find_named(output, ("boxes", "pred_boxes")) is not None:
        return "Pass target=parchgrad.BoxScore(box=..., label=..., detections=...) to explain a detection"
    if dimensions > 2:
        return "Pass target=parchgrad.RegionScore(target=...) to explain a class's scores over a region"
    if dimensions == 1:
        return "Pass target=parchgrad.Regression() to explain one number per row"
    return (
        "Pass `logits=` to extract them, such as lambda output: output['logits'], or a score or function as `target=` "
        "that returns one number per row"
    )


def _mismatch(model: nn.Module, inputs: tuple[Tensor, ...], error: Exception) -> InputError | None:
    """Explain why a model may have rejected these inputs, judging by its first convolution; None if they fit it."""
    first = next((module for module in model.modules() if isinstance(module, Convolution)), None)
    dimensions = _dimensions_of(model)
    if first is None or dimensions is None:
        return None
    # Any of several inputs may be the one for this convolution.
    candidates = [index for index, each in enumerate(inputs) if each.dim() == dimensions]
    of_other_types = [index for index, each in enumerate(inputs) if each.dtype != first.weight.dtype]
    index = candidates[0] if candidates else 0
    name = name_of(index, inputs)
    if not candidates:
        needs, remedy = f"needs {dimensions} dimensions", f"Add a missing batch dimension with {name}.unsqueeze(0)"
    elif all(inputs[i].shape[1] != first.in_channels for i in candidates) and "channels" in str(error):
        needs = f"takes {first.in_channels} channels"
        are_last = inputs[index].shape[-1] == first.in_channels
        remedy = f"Move the channels with {name}.movedim(-1, 1)" if are_last else "Pass as many as it takes"
    elif of_other_types:
        index = of_other_types[0]
        needs, remedy = f"has weights of type {first.weight.dtype}", "Convert one of them with .to()"
    else:
        return None
    name, shape, dtype = name_of(index, inputs), tuple(inputs[index].shape), inputs[index].dtype
    return InputError(
        f"The model failed ({reason_of(error)}) on `{name}` of shape {shape} and type {dtype}, but its first "
        f"convolution {needs}. {remedy}."
    )
