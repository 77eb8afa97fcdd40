"""The encoders of the original research code, by its names."""

from collections.abc import Mapping
from types import MappingProxyType

from torch import nn

__all__ = ["ENCODERS", "get_pretrained_model"]

ENCODERS: Mapping[str, str] = MappingProxyType(
    {
        **{name: name for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "convnext_tiny")},
        "vgg16": "vgg16_bn",
        "efficient_b0": "efficientnet_b0",
        "inceptionv3": "inception_v3",
    }
)
"""torchvision's names by the research code's names; `vgg16` is the variant with batch norm."""

# Statistics of the research code do not fit torchvision's newer default weights.
_WEIGHTS = "IMAGENET1K_V1"


def get_pretrained_model(name: str) -> nn.Module:
    """Load a pretrained network in evaluation mode on the CPU; new code should use `load_model`.

    Args:
        name: a name of the research code (see `ENCODERS`) for torchvision's first ImageNet weights, or any name that
            `load_model` accepts, for its default weights.

    Raises:
        ModelError: if there is no such network, or it has no classifier.
        WeightsError: if the weights are missing, damaged, or cannot be downloaded.

    Example:
        >>> model = get_pretrained_model("efficientnet_lite0")
        >>> model.training
        False
    """
    # The names need no other packages, but the networks do.
    from parchgrad.models.loading import load_model

    if name in ENCODERS:
        return load_model(ENCODERS[name], weights=_WEIGHTS).model
    return load_model(name).model
