"""Explain one detection of an object detector."""

from collections.abc import Sequence

from PIL import Image
from torchvision.transforms.functional import to_tensor

from parchgrad._io.checks import check_kind
from parchgrad.core.edit import Edit
from parchgrad.errors import InputError, SettingError, TargetError
from parchgrad.explain.explainer import Explainer
from parchgrad.explain.scores import BoxScore
from parchgrad.models.classifier import Prediction
from parchgrad.models.detector import Detector
from parchgrad.workflows.photographs import Explanation, describe_explainer

__all__ = ["explain_box"]


def explain_box(
    detector: Detector,
    image: Image.Image,
    edit: Edit = Edit(balance=False),
    *,
    box: Sequence[float],
    label: int,
    iou: float = 0.5,
    method: str = "gradient",
    name: str = "image",
) -> Explanation:
    """Explain the detections that overlap a box with ParchGrad, and without it for comparison.

    Args:
        detector: the detector.
        image: image of any size and mode.
        edit: the edit, with a selector. `balance` is off by default, since most detectors end in a softmax.
        box: corners x1, y1, x2, y2 in pixels.
        label: class of the detections; see `Detector.find_category`.
        iou: least intersection over union of a detection with the box.
        method: attribution method; see `Explainer`.
        name: name of the image.

    Raises:
        TargetError: if no detection of the class overlaps the box; the message lists the best ones.
        SettingError: if `edit` has no selector, or a setting is out of range.
        ParchGradError: whatever `Explainer` raises.

    Example:
        >>> import torch
        >>> import parchgrad as pg
        >>> _ = torch.manual_seed(0)
        >>> detector = pg.load_detector("ssdlite320_mobilenet_v3_large", pretrained=False)
        >>> image = Image.new("RGB", (64, 48))
        >>> first = detector.detect(to_tensor(image))[0]
        >>> explanation = explain_box(detector, image, box=first.box, label=first.index)
        >>> explanation.target.category == first.category, tuple(explanation.attribution.shape)
        (True, (3, 48, 64))
    """
    check_kind("`image`", image, Image.Image, "Open it with PIL.Image.open", error=InputError, wanted="a PIL image")
    if edit.selector is None:
        raise SettingError("The selector of `edit` is None, but ParchGrad needs one. Pass Edit(), for example.")
    score = BoxScore(box=box, label=label, iou=iou)
    pixels = to_tensor(image.convert("RGB")).to(next(detector.model.parameters()))
    detections = detector.detect(pixels)
    chosen = [each for each in detections if each.index == label and each.overlap(score.box) >= iou]
    if not chosen:
        seen = "; ".join(map(str, detections[:5])) or "nothing"
        raise TargetError(
            f"No {detector.categories[label]} is detected at {','.join(f'{corner:g}' for corner in score.box)}. The "
            f"best detections: {seen}. Pass the box and label of one of them, or a lower `iou`."
        )
    explainer = Explainer.from_edit(detector.model, edit, method=method)
    plain = Explainer(detector.model, None, method=method)
    attribution, without = (each.attribute(pixels.unsqueeze(0), score)[0] for each in (explainer, plain))
    predictions = [Prediction(each.index, each.category, each.score) for each in detections]
    return Explanation(
        name=name,
        picture=pixels.movedim(0, -1).cpu().numpy(),
        attribution=attribution,
        plain=without,
        target=Prediction(label, detector.categories[label], chosen[0].score),
        predictions=tuple(predictions[:5]),
        settings={
            "model": detector.name,
            **describe_explainer(explainer, method),
            "box": list(score.box),
            "iou": iou,
            "detections": len(chosen),
            "layers": list(explainer.edited_layers),
        },
        box=tuple(score.box),
    )
