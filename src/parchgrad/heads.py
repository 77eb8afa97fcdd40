"""What of a model's output is explained: logits out of any kind of output, and one score for each row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from parchgrad.engine import check_target_range, pick_logits
from parchgrad.errors import InputError, ModelError, SettingError, TargetError
from parchgrad.layers import Convolution

__all__ = ["Logits", "Output", "RegionScore", "Score", "Scores"]

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
            where the network itself calls the class: the region is empty and the map zero where it does not.

    Raises:
        SettingError: if `target` is no index.
        TargetError: if the network has no such class.
        ModelError: if its output are no scores (B, K, *S).
        InputError: if the mask does not fit them.

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
        if not isinstance(self.target, int) or isinstance(self.target, bool) or self.target < 0:
            raise SettingError(f"target is {self.target!r}, but it must be the index of a class, from 0 on.")

    def __call__(self, scores: Tensor) -> Tensor:
        """Sum the class over the region, (B, K, *S) to (B,)."""
        if not isinstance(scores, Tensor) or scores.dim() < 3:
            raise ModelError(
                f"The model returns {_kind(scores)}, but a region needs scores of shape (B, K, *S); give logits, a "
                "function that picks them out of the output."
            )
        check_target_range(self.target, scores.shape[1])
        if self.mask is None:
            region = scores.argmax(dim=1) == self.target
        elif self.mask.shape == scores.shape[2:]:
            region = self.mask.to(scores.device)
        else:
            raise InputError(
                f"The mask has shape {tuple(self.mask.shape)}, but the model's scores have the spatial shape "
                f"{tuple(scores.shape[2:])}; resize the mask, and give one for all images."
            )
        of_class = scores[:, self.target]
        # Not multiplied: what is outside the region may be infinite.
        weights = region.to(of_class.dtype).expand_as(of_class)
        return torch.where(weights != 0, of_class * weights, 0).flatten(1).sum(dim=1)


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
            output = self.model(inputs)
        except (RuntimeError, ValueError, AssertionError) as error:
            mismatch = _mismatch(self.model, inputs, str(error))
            if mismatch is None:
                raise
            raise InputError(mismatch) from error
        return output if self._pick is None else pick_logits(output, self._pick)

    def note(self, scores: Tensor) -> None:
        """Take note of scores that are NaN or infinite; minus infinity is how classes are ruled out."""
        broken = (scores.isnan() | scores.isposinf()).any().detach()
        self._broken = broken if self._broken is None else self._broken | broken

    @property
    def was_finite(self) -> bool:
        """Whether every score so far was a number; reading it waits for the device."""
        return self._broken is None or not bool(self._broken)


class Logits(Output):
    """The logits of a classifier, (B, K)."""

    def __init__(self, model: nn.Module, highest_target: int, pick: Callable[[Any], Tensor] | None = None) -> None:
        """Wrap a model, see `Output`; `highest_target` is the highest class that is explained, -1 where none is."""
        super().__init__(model, pick)
        self._highest_target = highest_target

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, K)."""
        logits = super().forward(inputs)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise ModelError(
                f"The model returns {_kind(logits)}, but logits of shape (B, K) are needed; give logits, a function "
                "that picks them out of the output, or a target that makes a score of it."
            )
        check_target_range(self._highest_target, logits.shape[1])
        self.note(logits)
        return logits


class Scores(nn.Module):
    """One number for each row, made of a model's output by a function of the user."""

    def __init__(self, output: Output, score: Score) -> None:
        """Wrap a model's output, and the function."""
        super().__init__()
        self.output = output
        self.training = output.training
        self._score = score

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores (B,)."""
        scores = self._score(self.output(inputs))
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
        self.output.note(scores)
        return scores


def _kind(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _mismatch(model: nn.Module, inputs: Tensor, message: str) -> str | None:
    """Why a model may have refused these inputs, as far as its first convolution tells; None if it does not."""
    first = next((module for module in model.modules() if isinstance(module, Convolution)), None)
    if first is None:
        return None
    if inputs.dim() != len(first.kernel_size) + 2:
        return (
            f"The inputs have shape {tuple(inputs.shape)}, but the model's first convolution takes a batch with "
            f"{len(first.kernel_size) + 2} dimensions; add the batch dimension with inputs.unsqueeze(0)."
        )
    if "channels" in message and inputs.shape[1] != first.in_channels:
        if inputs.shape[-1] == first.in_channels:
            return (
                f"The inputs have shape {tuple(inputs.shape)} with the channels last; move them to the second place, "
                "as in inputs.movedim(-1, 1)."
            )
        return (
            f"The inputs have {inputs.shape[1]} channels, but the model's first convolution takes "
            f"{first.in_channels}; convert them first."
        )
    if inputs.dtype != first.weight.dtype and ("type" in message or "dtype" in message):
        return (
            f"The inputs are {inputs.dtype}, but the model's weights are {first.weight.dtype}; "
            "convert one of them with .to()."
        )
    return None
