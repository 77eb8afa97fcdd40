"""Small networks that segment generated shapes, or detect them."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from parchgrad.models.shapes_networks import ShapesNetwork, convolution

__all__ = ["DENSE_NETWORKS", "ShapesDetections", "ShapesDetector", "ShapesSegmenter"]


class ShapesSegmenter(nn.Module):
    """A U-Net for images of 64 x 64 pixels and larger, with one class per pixel.

    The encoder is that of `ShapesNetwork`. The decoder has one convolution for each of the resolutions above, over the
    upsampled features and the encoder's.

    Source: Ronneberger, Fischer, Brox (2015), "U-Net: Convolutional Networks for Biomedical Image Segmentation".

    The weights of `load_model("shapes_segmenter")` were trained on `GeneratedShapes` of 64 pixels with up to 2 rivals.

    Example:
        >>> import torch
        >>> ShapesSegmenter(10).eval()(torch.zeros(2, 3, 64, 80)).shape
        torch.Size([2, 11, 64, 80])
    """

    def __init__(self, classes: int) -> None:
        """Initialise with random weights.

        Args:
            classes: number of classes, without the background.
        """
        super().__init__()
        self.features = ShapesNetwork(classes).features
        self.decoder = nn.ModuleList(
            nn.Sequential(convolution(below + beside, beside), nn.ReLU())
            for below, beside in ((96, 64), (64, 32), (32, 16))
        )
        self.classifier = nn.Conv2d(16, classes + 1, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (B, K + 1, H, W) of normalised images (B, 3, H, W), the background last; apply a softmax."""
        levels, features = [], inputs
        for module in self.features:
            if isinstance(module, nn.MaxPool2d):
                levels.append(features)
            features = module(features)
        for merge, beside in zip(self.decoder, reversed(levels), strict=True):
            above = functional.interpolate(features, size=beside.shape[2:], mode="bilinear")
            features = merge(torch.cat([above, beside], dim=1))
        logits: Tensor = self.classifier(features)
        return logits


class ShapesDetections(NamedTuple):
    """What `ShapesDetector` returns: N = H W / 64 boxes per image, before any threshold or suppression.

    Attributes:
        boxes: corners x1, y1, x2, y2 in pixels, shape (B, N, 4).
        logits: logits of the classes in each box, shape (B, N, K); apply a sigmoid for probabilities.
    """

    boxes: Tensor
    logits: Tensor


class ShapesDetector(nn.Module):
    """A one-stage detector without anchors for images of 64 x 64 pixels and larger.

    The backbone is that of `ShapesNetwork`. Each position of its grid, with a stride of 8 pixels, predicts one box and
    its classes. Positions without a shape have low logits for every class. Up to four boxes match a shape, and
    non-maximum suppression keeps one.

    Source: Ge et al. (2021), "YOLOX: Exceeding YOLO Series in 2021", for the boxes and the heads.

    The weights of `load_model("shapes_detector")` were trained on `GeneratedShapes` of 64 pixels with up to 2 rivals.

    Example:
        >>> import torch
        >>> found = ShapesDetector(10).eval()(torch.zeros(2, 3, 64, 80))
        >>> found.boxes.shape, found.logits.shape
        (torch.Size([2, 80, 4]), torch.Size([2, 80, 10]))
    """

    stride = 8

    def __init__(self, classes: int) -> None:
        """Initialise with random weights.

        Args:
            classes: number of classes.
        """
        super().__init__()
        self.features = ShapesNetwork(classes).features
        self.box_head = nn.Sequential(convolution(96, 64), nn.ReLU(), nn.Conv2d(64, 4, 1))
        self.class_head = nn.Sequential(convolution(96, 64), nn.ReLU(), nn.Conv2d(64, classes, 1))

    def forward(self, inputs: Tensor) -> ShapesDetections:
        """Return boxes and logits of normalised images (B, 3, H, W), H and W multiples of 8."""
        features = self.features(inputs)
        shifts, sizes = self.box_head(features).flatten(2).transpose(1, 2).split(2, dim=2)
        centres = self.centres(features) + self.stride * shifts
        halves = self.stride * sizes.exp()
        logits = self.class_head(features).flatten(2).transpose(1, 2)
        return ShapesDetections(torch.cat([centres - halves, centres + halves], dim=2), logits)

    def centres(self, features: Tensor) -> Tensor:
        """Return the centres x, y of the grid of the features (B, C, H, W) in pixels, shape (H W, 2)."""
        down, across = (
            self.stride * (torch.arange(length, dtype=features.dtype, device=features.device) + 0.5)
            for length in features.shape[2:]
        )
        rows, columns = torch.meshgrid(down, across, indexing="ij")
        return torch.stack([columns.flatten(), rows.flatten()], dim=1)


DENSE_NETWORKS: Mapping[str, Callable[[int], nn.Module]] = MappingProxyType(
    {"shapes_segmenter": ShapesSegmenter, "shapes_detector": ShapesDetector}
)
"""Classes of the networks with other outputs than logits (B, K), by the names that `load_model` takes."""
