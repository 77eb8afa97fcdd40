"""What to explain of a model's output: scores, which map an output to one number per row.

A score accepts the model's output, or what `logits=` extracts from it, and finds the logits in outputs of usual types;
see `find_logits`. Every other function of the output works as a score too.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from parchgrad._io.checks import check_kind, check_whole_number, is_number, is_whole_number
from parchgrad.core.partition import at_least_float32
from parchgrad.core.targets import check_target_range, describe_output, find_logits, find_named
from parchgrad.errors import InputError, ModelError, SettingError, TargetError
from parchgrad.explain.nonfinite import broken

__all__ = ["BoxScore", "ClassScore", "Contrast", "Detections", "Probability", "RegionScore", "Regression", "Similarity"]

Detections: TypeAlias = Callable[[Any], tuple[Tensor, Tensor]]
"""Extracts boxes (B, N, 4), as x1, y1, x2, y2, and class scores (B, N, K) from a detector's output."""

_BOXES = ("boxes", "pred_boxes")


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """The logit of a class, which is what an integer as `target` means.

    Attributes:
        target: index of the class.

    Raises:
        SettingError: if `target` is not an index.
        TargetError: if the network has no such class.
        ModelError: if its output has no logits (B, K).

    Source: Simonyan, Vedaldi, Zisserman (2014), "Deep Inside Convolutional Networks: Visualising Image Classification
    Models and Saliency Maps", section 3.

    Example:
        >>> ClassScore(target=1)(torch.tensor([[1.0, 5.0, 2.0]]))
        tensor([5.])
    """

    target: int

    def __post_init__(self) -> None:
        check_whole_number("target", self.target, 0)

    def __call__(self, output: Any) -> Tensor:
        """Pick the logit, (B, K) to (B,)."""
        return _column(_logits_in(output, "logits of shape (B, K)", least=2, most=2), self.target)


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """How much more a network favours one class than another: why this class rather than that one.

    Evidence that both classes share cancels, so the map shows what tells them apart. The default selector keeps only
    evidence for the target, so its map of a contrast is often close to that of the class alone. If the network favours
    the other class, the contrast is negative and little supports it: explain the other class rather than this one.

    Attributes:
        target: index of the class.
        against: index of the other class, for the difference of the logits; `"runner-up"` for the other class with the
            largest logit, row by row; or `"rest"` for the log-odds against all other classes,
            `logit - logsumexp(other logits)`.

    Raises:
        SettingError: if `target` is not an index, or `against` is not a different index, `"runner-up"` or `"rest"`.
        TargetError: if the network has no such class, or only one.
        ModelError: if its output has no logits (B, K).

    Source: Jacovi et al. (2021), "Contrastive Explanations for Model Interpretability"; Prabhushankar et al. (2020),
    "Contrastive Explanations in Neural Networks", for the differences.

    Example:
        >>> logits = torch.tensor([[1.0, 5.0, 2.0]])
        >>> Contrast(target=1, against=0)(logits), Contrast(target=1, against="runner-up")(logits)
        (tensor([4.]), tensor([3.]))
        >>> Contrast(target=1, against="rest")(logits), logits.softmax(dim=1)[:, 1].logit()
        (tensor([2.6867]), tensor([2.6867]))
    """

    target: int
    against: int | Literal["runner-up", "rest"]

    def __post_init__(self) -> None:
        check_whole_number("target", self.target, 0)
        if self.against in ("runner-up", "rest"):
            return
        if not is_whole_number(self.against) or self.against < 0 or self.against == self.target:
            raise SettingError(
                f"`against` is {self.against!r}, but it must be the index of a class other than {self.target}, "
                "'runner-up' or 'rest'."
            )

    def __call__(self, output: Any) -> Tensor:
        """Compare the logits, (B, K) to (B,)."""
        logits = _logits_in(output, "logits of shape (B, K)", least=2, most=2)
        own = _column(logits, self.target)
        if is_whole_number(self.against):
            return own - _column(logits, self.against)
        if logits.shape[1] < 2:
            raise TargetError("The model has only one class, so there is nothing to compare with. Use `Probability`.")
        others = torch.cat([logits[:, : self.target], logits[:, self.target + 1 :]], dim=1)
        return own - (others.amax(dim=1) if self.against == "runner-up" else others.logsumexp(dim=1))


@dataclass(frozen=True, kw_only=True)
class Probability:
    """The sigmoid of one output, the probability of a label in a network with a sigmoid for each.

    Its gradient is that of the logit times p (1 - p), so it vanishes where the network is certain; `ClassScore` keeps
    its size there. If the network already applies the sigmoid, use `Regression`.

    Attributes:
        target: index of the output; None if there is only one.

    Raises:
        SettingError: if `target` is not an index.
        TargetError: if the network has no such output, or several and `target` is None.
        ModelError: if its output has no logits (B, K) or (B,).

    Example:
        >>> Probability()(torch.tensor([0.0, 2.0])), Probability(target=1)(torch.tensor([[0.0, 2.0]]))
        (tensor([0.5000, 0.8808]), tensor([0.8808]))
    """

    target: int | None = None

    def __post_init__(self) -> None:
        if self.target is not None:
            check_whole_number("target", self.target, 0)

    def __call__(self, output: Any) -> Tensor:
        """Apply the sigmoid, (B, K) or (B,) to (B,)."""
        return _column(_logits_in(output, "logits of shape (B, K) or (B,)", least=1, most=2), self.target).sigmoid()


@dataclass(frozen=True, kw_only=True)
class Regression:
    """One number that a network predicts.

    Attributes:
        index: place of the number among the outputs; None if there is only one.

    Raises:
        SettingError: if `index` is not an index.
        TargetError: if the network has no such output, or several and `index` is None.
        ModelError: if its output has no values (B, K) or (B,).

    Source: Letzgus et al. (2022), "Toward Explainable Artificial Intelligence for Regression Models".

    Example:
        >>> Regression()(torch.tensor([[3.0], [4.0]])), Regression(index=1)(torch.tensor([[1.0, 5.0]]))
        (tensor([3., 4.]), tensor([5.]))
    """

    index: int | None = None

    def __post_init__(self) -> None:
        if self.index is not None:
            check_whole_number("index", self.index, 0)

    def __call__(self, output: Any) -> Tensor:
        """Pick the number, (B, K) or (B,) to (B,)."""
        return _column(_logits_in(output, "values of shape (B, K) or (B,)", least=1, most=2), self.index)


@dataclass(frozen=True, eq=False, kw_only=True)
class Similarity:
    """The cosine between an image's embedding and a reference, for encoders without classes.

    The reference may come from another image, or from a text in the same space, as with CLIP.

    Attributes:
        reference: embedding to compare with, shape (D,) or (1, D), finite and not zero.

    Raises:
        InputError: if the reference is not such a tensor.
        ModelError: if the network's output has no embedding (B, D) of the reference's size. It is taken from a tensor,
            or from `image_embeds` or `pooler_output` of a mapping.

    Source: Eberle et al. (2020), "Building and Interpreting Deep Similarity Models", for gradients of similarities.

    Example:
        >>> Similarity(reference=torch.tensor([0.0, 2.0]))(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        tensor([0.8000, 0.0000])
    """

    reference: Tensor

    def __post_init__(self) -> None:
        check_kind("`reference`", self.reference, Tensor, "Pass the embedding as a tensor", error=InputError)
        shape = tuple(self.reference.shape)
        if not self.reference.is_floating_point() or len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != 1):
            raise InputError(
                f"`reference` is {self.reference.dtype} of shape {shape}, but an embedding (D,) or (1, D) in floating "
                "point is needed. Pass one embedding at a time."
            )
        if not bool(self.reference.isfinite().all()) or not bool(self.reference.any()):
            raise InputError("`reference` is zero or contains NaN or infinite values. Pass a finite embedding.")

    def __call__(self, output: Any) -> Tensor:
        """Compute the cosine, (B, D) to (B,)."""
        embedding = find_named(output, ("image_embeds",))
        embedding = find_named(output, ("pooler_output",)) if embedding is None else embedding
        embedding = output if embedding is None else embedding
        reference = self.reference.detach().flatten()
        if not isinstance(embedding, Tensor) or embedding.dim() != 2 or embedding.shape[1] != len(reference):
            raise ModelError(
                f"The model returns {describe_output(output)}, but an embedding of shape (B, {len(reference)}) is "
                "needed, like the reference. Pass `logits=` to extract it."
            )
        wide = at_least_float32(embedding)
        return functional.cosine_similarity(wide, reference.to(wide).expand_as(wide), dim=1)


@dataclass(frozen=True, eq=False, kw_only=True)
class RegionScore:
    """The sum of a class's scores over a region, to explain a segmentation network.

    Without a mask, methods that use several versions of an image (integrated gradients, SmoothGrad) find the region
    anew in each.

    Attributes:
        target: index of the class.
        mask: the region, boolean or weights, with the spatial shape (*S) of the scores, one for all images; None uses
            the region where the network predicts the class, image by image: where its score is the largest, or, if it
            is the only class, positive. An empty region gives a zero map, and a warning.

    Raises:
        SettingError: if `target` is not an index.
        TargetError: if the network has no such class.
        ModelError: if its output is not scores of shape (B, K, *S).
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
        check_kind("The mask", self.mask, Tensor, "Pass torch.as_tensor(mask)", error=InputError)
        if self.mask.layout != torch.strided:
            raise InputError("The mask is a sparse tensor, but a region needs a dense one. Pass mask.to_dense().")
        if self.mask.dtype != torch.bool and not self.mask.is_floating_point():
            raise InputError(
                f"The mask is {self.mask.dtype}, but it must be boolean, or weights in floating point. Pass mask > 0."
            )
        if not bool(self.mask.isfinite().all()):
            raise InputError("The mask contains NaN or infinite values. Pass finite weights or a boolean mask.")

    def __call__(self, output: Any) -> Tensor:
        """Sum the class over the region, (B, K, *S) to (B,)."""
        scores = _logits_in(output, "scores of shape (B, K, *S)", least=3, most=math.inf)
        check_target_range(int(self.target), scores.shape[1])
        if find_named(output, _BOXES) is not None:
            raise ModelError(
                f"The model returns {describe_output(output)}, but a region needs scores of shape (B, K, *S) without "
                "boxes. Pass a `BoxScore`."
            )
        if self.mask is None:
            region = scores[:, 0] > 0 if scores.shape[1] == 1 else scores.argmax(dim=1) == self.target
        elif self.mask.shape == scores.shape[2:]:
            region = self.mask.to(scores.device)
        else:
            raise InputError(
                f"The mask has shape {tuple(self.mask.shape)}, but the model's scores have the spatial shape "
                f"{tuple(scores.shape[2:])}. Resize the mask, and pass one for all images."
            )
        # A sum over a region may overflow half precision.
        of_class = at_least_float32(scores[:, self.target])
        # Not multiplied: scores outside of the region may be infinite.
        weights = region.to(of_class.dtype).expand_as(of_class)
        sums = torch.where(weights != 0, of_class * weights, 0).flatten(1).sum(dim=1)
        if self.mask is not None:
            return sums
        # Without finite scores the predicted region is unknown.
        return sums.masked_fill(broken(scores.detach()).flatten(1).any(dim=1), torch.nan)

    def why_zero(self, output: Any) -> str:
        """Explain why the score of the only row of an output is zero."""
        if self.mask is not None:
            return "the scores in the mask do not depend on that image"
        return f"the network predicts class {self.target} nowhere"


@dataclass(frozen=True, kw_only=True)
class BoxScore:
    """The summed scores of a detector's boxes that overlap a box, for one label.

    The choice of the boxes carries no gradient. Methods that use several versions of an image choose anew in each, so
    integrated gradients do not add up exactly. A row without such a box scores 0. Scores of torchvision's detectors are
    probabilities, so with `balance` a warning names their softmax or sigmoid.

    Attributes:
        box: corners x1, y1, x2, y2 in pixels of the image.
        label: index of the class; in torchvision's detectors, 0 is the background.
        iou: least intersection over union with `box`, in (0, 1].
        detections: extracts boxes (B, N, 4) and class scores (B, N, K) from the output; None reads the lists of
            dictionaries of torchvision's detectors. Return probabilities: among logits, boxes that the detector rejects
            count as much as those that it accepts.

    Raises:
        SettingError: if `box` has no area, `label` is not an index, or `iou` is out of range.
        ModelError: if the output is not that of a detector.
        TargetError: if the network has no such class.

    Source: Petsiuk et al. (2021), "Black-box Explanation of Object Detectors via Saliency Maps", for the overlap.

    Example:
        >>> boxes, scores = torch.tensor([[0.0, 0.0, 4.0, 4.0], [9.0, 9.0, 12.0, 12.0]]), torch.tensor([0.9, 0.8])
        >>> output = [{"boxes": boxes, "labels": torch.tensor([3, 3]), "scores": scores}]
        >>> BoxScore(box=(0, 0, 4, 5), label=3)(output)
        tensor([0.9000])
    """

    box: Sequence[float]
    label: int
    iou: float = 0.5
    detections: Detections | None = None

    def __post_init__(self) -> None:
        corners = self.box.tolist() if isinstance(self.box, Tensor) else list(self.box)
        if len(corners) != 4 or not all(is_number(corner) for corner in corners):
            raise SettingError(f"`box` is {self.box!r}, but it must be four numbers: x1, y1, x2, y2.")
        if not (corners[0] < corners[2] and corners[1] < corners[3]):
            raise SettingError(f"`box` is {tuple(corners)}, but it must have an area: x1 < x2 and y1 < y2.")
        object.__setattr__(self, "box", tuple(float(corner) for corner in corners))
        check_whole_number("label", self.label, 0)
        if not is_number(self.iou) or not 0 < self.iou <= 1:
            raise SettingError(f"`iou` is {self.iou!r}, but it must lie in (0, 1].")
        if self.detections is not None and not callable(self.detections):
            raise SettingError(f"`detections` is {self.detections!r}, but it must be a function of the output.")

    def __call__(self, output: Any) -> Tensor:
        """Sum the scores of the boxes, of a detector's output to (B,)."""
        # Not multiplied: scores of other boxes may be infinite.
        return torch.stack(
            [torch.where(self._overlaps(boxes), scores, 0).sum() for boxes, scores in self._rows(output)]
        )

    def why_zero(self, output: Any) -> str:
        """Explain why the score of the only row of an output is zero."""
        ((boxes, scores),) = self._rows(output)
        best = scores.detach().topk(min(3, len(scores)))
        found = [
            f"{tuple(round(corner) for corner in boxes[place].tolist())} with a score of {score:.2f}"
            for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        seen = f"the best of that label: {'; '.join(found)}" if found else "none of that label anywhere"
        box = tuple(round(corner) for corner in self.box)
        return f"no detection of label {self.label} overlaps the box {box} by an IoU of {self.iou:g} ({seen})"

    def _rows(self, output: Any) -> list[tuple[Tensor, Tensor]]:
        """Boxes (N, 4) and the label's scores (N,) of each row."""
        return _detections_in(output, self.label) if self.detections is None else self._dense(output)

    def _dense(self, output: Any) -> list[tuple[Tensor, Tensor]]:
        """Boxes (N, 4) and the label's scores (N,) of each row, by the user's function."""
        found = self.detections(output) if self.detections is not None else None
        is_pair = isinstance(found, tuple | list) and len(found) == 2 and all(isinstance(e, Tensor) for e in found)
        boxes, scores = found if is_pair and found is not None else (None, None)
        if boxes is None or scores is None or boxes.dim() != 3 or boxes.shape[2] != 4 or scores.dim() != 3:
            raise ModelError(
                f"`detections` returns {describe_output(found)}, but boxes (B, N, 4) and class scores (B, N, K) are "
                "needed. Return a tuple of both."
            )
        if boxes.shape[:2] != scores.shape[:2]:
            raise ModelError(
                f"`detections` returns boxes {tuple(boxes.shape)} and scores {tuple(scores.shape)}, but they must "
                "agree in their first two dimensions. Transpose one of them."
            )
        if bool((boxes[..., 2:] < boxes[..., :2]).any()):
            raise ModelError(
                "`detections` returns boxes whose x2 or y2 is smaller than x1 or y1. Convert them to x1, y1, x2, y2, "
                "as torchvision.ops.box_convert does."
            )
        check_target_range(int(self.label), scores.shape[2])
        return list(zip(boxes, scores[:, :, self.label], strict=True))

    def _overlaps(self, boxes: Tensor) -> Tensor:
        """Which boxes (N, 4) overlap the box enough, (N,)."""
        boxes = at_least_float32(boxes.detach())
        box = torch.tensor(self.box, dtype=boxes.dtype, device=boxes.device)
        sides = (torch.minimum(boxes[:, 2:], box[2:]) - torch.maximum(boxes[:, :2], box[:2])).clamp(min=0)
        common = sides.prod(dim=1)
        areas = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1) + (box[2:] - box[:2]).prod()
        overlaps: Tensor = common / (areas - common) >= self.iou
        return overlaps


def _detections_in(output: Any, label: int) -> list[tuple[Tensor, Tensor]]:
    """Boxes (N, 4) and scores (N,) of a label in each row of a torchvision detector's output."""
    keys = {"boxes", "labels", "scores"}
    if not isinstance(output, list) or not all(isinstance(row, Mapping) and keys <= set(row) for row in output):
        raise ModelError(
            f"The model returns {describe_output(output)}, but a box needs a list of dictionaries with 'boxes', "
            "'labels' and 'scores'. Pass `detections=` to extract boxes (B, N, 4) and class scores (B, N, K)."
        )
    found = []
    for row in output:
        is_label = row["labels"] == label
        found.append((row["boxes"][is_label], row["scores"][is_label]))
    return found


def _logits_in(output: Any, wanted: str, *, least: int, most: float) -> Tensor:
    """Find logits with a number of dimensions between two bounds in an output."""
    logits = find_logits(output)
    if not isinstance(logits, Tensor) or not least <= logits.dim() <= most:
        raise ModelError(
            f"The model returns {describe_output(output)}, but {wanted} are needed. Pass `logits=` to extract them."
        )
    return logits


def _column(values: Tensor, index: int | None) -> Tensor:
    """One column of values (B, K), or the values (B,) or (B, 1) themselves."""
    matrix = values.unsqueeze(1) if values.dim() == 1 else values
    count = matrix.shape[1]
    if index is None:
        if count > 1:
            raise TargetError(f"The model has {count} outputs. Pass the index of one of them.")
        index = 0
    if index >= count:
        raise TargetError(f"The index is {index}, but the model has {count} outputs. Pass 0 to {count - 1}.")
    return matrix[:, index]
