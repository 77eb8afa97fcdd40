"""What of a model's output is explained: logits out of any kind of output, and one score for each row."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from parchgrad.checks import check_kind, check_whole_number
from parchgrad.diagnosis import broken
from parchgrad.engine import check_target_range, pick_logits
from parchgrad.errors import InputError, ModelError, TargetError
from parchgrad.hooks import UnmaskedFailures
from parchgrad.layers import Convolution
from parchgrad.partition import at_least_float32

__all__ = ["Logits", "Output", "RegionScore", "Score", "Scores", "check_inputs"]

Score: TypeAlias = Callable[[Any], Tensor]
"""What to explain of a model's output, or of the logits picked out of it: one number for each of its rows, (B,)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class RegionScore:
    """The sum of a class's scores over a region: what to explain of a segmentation network.

    Methods that look at several versions of an image (integrated gradients, SmoothGrad) call the region anew in each
    unless a mask is given.

    Attributes:
        target: index of the class.
        mask: the region, boolean or weights, shape (*S) of the scores, one for all images; None is, image by image,
            where the network itself calls the class. Where a region is empty the map is zero.

    Raises:
        SettingError: if `target` is no index.
        TargetError: if the network has no such class.
        ModelError: if its output are no scores (B, K, *S).
        InputError: if the mask is neither boolean nor finite numbers, or does not fit the scores.

    Source: Vinogradova et al. (2020), "Towards Interpretable Semantic Segmentation via Gradient-Weighted Class
    Activation Mapping", equation 2.

    Example:
        >>> scores = torch.tensor([[[1.0, 5.0, 2.0], [3.0, 4.0, 9.0]]])
        >>> RegionScore(target=1)(scores), RegionScore(target=1, mask=torch.tensor([True, True, False]))(scores)
        (tensor([12.]), tensor([7.]))
    """

    target: int
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        check_whole_number("target", self.target, 0)
        if self.mask is None:
            return
        check_kind("The mask", self.mask, Tensor, "give torch.as_tensor(mask)", error=InputError)
        if self.mask.layout != torch.strided:
            raise InputError("The mask is a sparse tensor, but a region needs a dense one; give mask.to_dense().")
        if self.mask.dtype != torch.bool and not self.mask.is_floating_point():
            raise InputError(
                f"The mask is {self.mask.dtype}, but a region is boolean or weights in floating point; give mask > 0."
            )
        if not bool(self.mask.isfinite().all()):
            raise InputError("The mask holds NaN or infinite values; give weights that are numbers, or a boolean mask.")

    def __call__(self, scores: Tensor) -> Tensor:
        """Sum the class over the region, (B, K, *S) to (B,)."""
        if not isinstance(scores, Tensor) or scores.dim() < 3:
            raise ModelError(
                f"The model returns {_kind(scores)}, but a region needs scores of shape (B, K, *S); give logits, a "
                "function that picks them out of the output."
            )
        check_target_range(int(self.target), scores.shape[1])
        if self.mask is None:
            region = scores.argmax(dim=1) == self.target
        elif self.mask.shape == scores.shape[2:]:
            region = self.mask.to(scores.device)
        else:
            raise InputError(
                f"The mask has shape {tuple(self.mask.shape)}, but the model's scores have the spatial shape "
                f"{tuple(scores.shape[2:])}; resize the mask, and give one for all images."
            )
        # The sum over a region leaves the range of half precision.
        of_class = at_least_float32(scores[:, self.target])
        # Not multiplied: what is outside the region may be infinite.
        weights = region.to(of_class.dtype).expand_as(of_class)
        sums = torch.where(weights != 0, of_class * weights, 0).flatten(1).sum(dim=1)
        if self.mask is not None:
            return sums
        # Where the network calls the class is not known where its scores are no numbers.
        return sums.masked_fill(broken(scores.detach()).flatten(1).any(dim=1), torch.nan)


class Output(nn.Module):
    """The model as attribution methods see it: what it is given is checked in words, what it returns is picked."""

    def __init__(self, model: nn.Module, pick: Callable[[Any], Tensor] | None = None) -> None:
        """Wrap a model.

        Args:
            model: any module.
            pick: picks the logits out of its output; None takes the output itself.
        """
        super().__init__()
        self.model = model
        self.training = model.training
        self._pick = pick
        self._broken: Tensor | None = None

    def forward(self, inputs: Tensor) -> Any:
        """What is picked out of the model's output."""
        try:
            with UnmaskedFailures():
                output = self.model(inputs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, AssertionError) as error:
            mismatch = _mismatch(self.model, inputs, str(error))
            if mismatch is None:
                raise
            raise mismatch from error
        return output if self._pick is None else pick_logits(output, self._pick)

    def note(self, scores: Tensor) -> None:
        """Take note of scores that are NaN or infinite, other than those of classes that are ruled out."""
        found = broken(scores.detach()).any()
        self._broken = found if self._broken is None else self._broken | found

    @property
    def was_finite(self) -> bool:
        """Whether every score so far was a number; reading it waits for the device."""
        return self._broken is None or not bool(self._broken)


class Logits(Output):
    """The logits of a classifier, (B, K)."""

    def __init__(
        self, model: nn.Module, highest_target: int | None, pick: Callable[[Any], Tensor] | None = None
    ) -> None:
        """Wrap a model, see `Output`; `highest_target` is the highest class that is explained, None where none is."""
        super().__init__(model, pick)
        self._highest_target = highest_target

    @property
    def head(self) -> Output:
        """What calls the model."""
        return self

    def broken_rows(self, inputs: Tensor) -> Tensor:
        """Which rows have a logit that is NaN or infinite, shape (B,)."""
        return broken(self(inputs)).any(dim=1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, K)."""
        logits = super().forward(inputs)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise ModelError(
                f"The model returns {_kind(logits)}, but logits of shape (B, K) are needed; give logits, a function "
                "that picks them out of the output, or a target that makes a score of it."
            )
        if self._highest_target is not None:
            check_target_range(self._highest_target, logits.shape[1])
        self.note(logits)
        return logits


class Scores(nn.Module):
    """One number for each row, made of a model's output by a function of the user."""

    def __init__(self, head: Output, score: Score) -> None:
        """Wrap what calls the model, and the function.

        Raises:
            TargetError: if the function is a class, which makes an object rather than a score.
        """
        super().__init__()
        if isinstance(score, type):
            raise TargetError(f"target is the class {score.__name__} itself; give one of its objects.")
        self.head = head
        self.training = head.training
        self._score = score

    def broken_rows(self, inputs: Tensor) -> Tensor:
        """Which rows have a score that is NaN or infinite, shape (B,)."""
        return broken(self._score(self.head(inputs)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores (B,)."""
        scores = self._score(self.head(inputs))
        rows = inputs.shape[0]
        if not isinstance(scores, Tensor) or scores.shape != (rows,):
            raise TargetError(
                f"target returns {_kind(scores)} for {rows} rows, but one score for each is needed, shape ({rows},); "
                "sum or pick the rest, as in lambda output: output[:, 3]."
            )
        if torch.is_grad_enabled() and not scores.requires_grad:
            raise TargetError(
                "What target returns does not depend on the model's output, or was cut off from it; return a score "
                "that is computed from the output, without detach() or argmax()."
            )
        self.head.note(scores)
        return scores


def check_inputs(inputs: Tensor) -> None:
    """Raise `InputError` unless the inputs are a batch (B, C, *S) of finite floating-point numbers."""
    if not isinstance(inputs, Tensor):
        raise InputError(f"The inputs are a {type(inputs).__name__}, but a tensor (B, C, *S) is needed.")
    if inputs.dim() < 3 or inputs.shape[0] == 0:
        raise InputError(f"The inputs have shape {tuple(inputs.shape)}, but a non-empty batch (B, C, *S) is needed.")
    if not inputs.is_floating_point():
        raise InputError(f"The inputs are {inputs.dtype}, but gradients need floating point; preprocess them first.")
    if inputs.layout != torch.strided:
        raise InputError(f"The inputs are {inputs.layout}, but a dense tensor is needed; take inputs.to_dense().")
    if not torch.isfinite(inputs).all():
        raise InputError("The inputs hold NaN or infinite values; look for a division by zero in the preprocessing.")


def _kind(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _mismatch(model: nn.Module, inputs: Tensor, message: str) -> InputError | None:
    """Why a model may have refused these inputs, as far as its first convolution tells; None if it does not."""
    first = next((module for module in model.modules() if isinstance(module, Convolution)), None)
    if first is None:
        return None
    if inputs.dim() != len(first.kernel_size) + 2 and re.search(r"\dD\b|batched|dim|mat1|shape|size", message):
        return InputError(
            f"The inputs have shape {tuple(inputs.shape)}, but the model's first convolution takes a batch with "
            f"{len(first.kernel_size) + 2} dimensions; add the batch dimension with inputs.unsqueeze(0) where it is "
            "missing, else bring the inputs to the size that the model takes."
        )
    if "channels" in message and inputs.shape[1] != first.in_channels:
        if inputs.shape[-1] == first.in_channels:
            return InputError(
                f"The inputs have shape {tuple(inputs.shape)} with the channels last; move them to the second place, "
                "as in inputs.movedim(-1, 1)."
            )
        return InputError(
            f"The inputs have {inputs.shape[1]} channels, but the model's first convolution takes "
            f"{first.in_channels}; convert them first."
        )
    if inputs.dtype != first.weight.dtype and ("type" in message or "dtype" in message):
        return InputError(
            f"The inputs are {inputs.dtype}, but the model's weights are {first.weight.dtype}; "
            "convert one of them with .to()."
        )
    return None
