"""Load torchvision's object detectors by name, with their class names."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from parchgrad._io.checks import check_kind
from parchgrad._io.extras import needs_extra
from parchgrad.errors import InputError, ModelError, WeightsError, reason_of
from parchgrad.models.classifier import find_category

with needs_extra("models"):
    import torchvision
    from torchvision.models import detection
    from torchvision.ops import box_iou
    from torchvision.transforms.functional import to_tensor

__all__ = ["Detection", "Detector", "list_detectors", "load_detector"]


@dataclass(frozen=True)
class Detection:
    """One detected object: its class, corners x1, y1, x2, y2 in pixels, and score in [0, 1].

    Example:
        >>> print(Detection(index=18, category="dog", box=(3.2, 4.0, 90.7, 80.0), score=0.983))
        dog (98%) at 3,4,91,80
    """

    index: int
    category: str
    box: tuple[float, float, float, float]
    score: float

    def overlap(self, box: Sequence[float]) -> float:
        """Compute the intersection over union with another box.

        Example:
            >>> Detection(index=18, category="dog", box=(0.0, 0.0, 4.0, 4.0), score=0.9).overlap((0, 0, 4, 8))
            0.5
        """
        return float(box_iou(torch.tensor([self.box]), torch.tensor([[float(corner) for corner in box]]))[0, 0])

    def __str__(self) -> str:
        """Return name, score and box, as the command line takes it."""
        return f"{self.category} ({self.score:.0%}) at {','.join(f'{corner:.0f}' for corner in self.box)}"


@dataclass(frozen=True, eq=False)
class Detector:
    """A detector of torchvision in evaluation mode.

    Attributes:
        model: the network, which takes images (3, H, W) in [0, 1] of any size and returns a dictionary for each.
        categories: names of the classes; the first is the background.
        name: name of the network, as passed to `load_detector`.
    """

    model: nn.Module = field(repr=False)
    categories: tuple[str, ...] = field(repr=False)
    name: str

    def find_category(self, query: str) -> int:
        """Find a class by its index or case-insensitive name.

        Raises:
            TargetError: if no class, or more than one, has that name.
        """
        return find_category(query, self.categories, self.name)

    def detect(self, image: Image.Image | Tensor) -> list[Detection]:
        """Detect the objects in an image, or a tensor (3, H, W) with values in [0, 1], best first.

        Raises:
            InputError: if the image is neither.
        """
        pixels = to_tensor(image.convert("RGB")) if isinstance(image, Image.Image) else image
        remedy = "Pass a PIL image, or a tensor (3, H, W)"
        check_kind("`image`", pixels, Tensor, remedy, error=InputError, wanted="an image")
        is_image = pixels.dim() == 3 and pixels.is_floating_point()
        if not is_image or not 0 <= float(pixels.min()) <= float(pixels.max()) <= 1:
            raise InputError(
                f"`image` is {pixels.dtype} of shape {tuple(pixels.shape)}, but a tensor (3, H, W) with values in "
                "[0, 1] is needed. Pass a PIL image, or convert it with torchvision.transforms.functional.to_tensor."
            )
        pixels = pixels.to(next(self.model.parameters()))
        with torch.no_grad():
            (found,) = self.model([pixels])
        rows: Sequence[tuple[int, float, list[float]]] = list(
            zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
        )
        detections = [
            Detection(index, self.categories[index], (box[0], box[1], box[2], box[3]), score)
            for index, score, box in rows
        ]
        return sorted(detections, key=lambda each: -each.score)


def list_detectors() -> list[str]:
    """List the names of torchvision's detectors.

    Example:
        >>> "retinanet_resnet50_fpn" in list_detectors()
        True
    """
    return list(torchvision.models.list_models(detection))


def load_detector(name: str, *, pretrained: bool = True) -> Detector:
    """Load a detector of torchvision in evaluation mode, on the CPU, with its best weights.

    Args:
        name: name of a detector, such as `"fasterrcnn_resnet50_fpn"`; see `list_detectors`.
        pretrained: whether to load pretrained weights; False keeps random ones.

    Raises:
        ModelError: if torchvision has no such detector.
        WeightsError: if the weights cannot be loaded.

    Example:
        >>> detector = load_detector("ssdlite320_mobilenet_v3_large", pretrained=False)
        >>> detector.find_category("dog"), len(detector.categories)
        (18, 91)
    """
    remedy = "Pass a name such as 'fasterrcnn_resnet50_fpn'"
    check_kind("`name`", name, str, remedy, error=ModelError, wanted="the name of a detector")
    known = list_detectors()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=4, cutoff=0.4) or known[:4]
        raise ModelError(f"torchvision has no detector {name!r}. Close matches: {', '.join(near)}.")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        # The backbone's own weights would be downloaded too.
        model = torchvision.models.get_model(name, weights=weights if pretrained else None, weights_backbone=None)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        raise WeightsError(
            f"Cannot load the weights of {name} ({reason_of(error)}). "
            f"Download {weights.url} on a machine with internet access and put the file into {cache}."
        ) from error
    return Detector(model.eval(), tuple(weights.meta["categories"]), name)
