"""ParchGrad: partitioned channel gradients for sharper saliency maps of convolutional networks."""

from importlib import import_module
from typing import TYPE_CHECKING

from parchgrad._version import __version__

if TYPE_CHECKING:
    from parchgrad.core.balance import register_rule
    from parchgrad.core.edit import Edit
    from parchgrad.core.engine import ParchGrad, choose_layers
    from parchgrad.core.layers import find_convolutions
    from parchgrad.core.partition import partition_gradient
    from parchgrad.core.selectors import (
        Evidence,
        FixedChannels,
        GradientEnergy,
        GradientTimesActivation,
        LayerSignal,
        RandomChannels,
        Selection,
        Selector,
    )
    from parchgrad.errors import ParchGradError
    from parchgrad.explain.explainer import Explainer
    from parchgrad.explain.heatmap import heatmap, signed_heatmap
    from parchgrad.explain.scores import (
        BoxScore,
        ClassScore,
        Contrast,
        Probability,
        RegionScore,
        Regression,
        Similarity,
    )
    from parchgrad.legacy.hook_wrapper import get_hook_wrapper
    from parchgrad.legacy.pretrained_models import get_pretrained_model
    from parchgrad.models.classifier import Classifier
    from parchgrad.models.detector import Detector, load_detector
    from parchgrad.models.loading import load_model
    from parchgrad.statistics import ChannelStatistics, LayerStatistics, RankedLayerStatistics
    from parchgrad.statistics.accumulate import merge_statistics
    from parchgrad.statistics.collect import collect_statistics
    from parchgrad.statistics.selectors import ClassWise, InstanceWise
    from parchgrad.workflows.collection import collect_from_folder
    from parchgrad.workflows.detection import explain_box
    from parchgrad.workflows.photographs import Explanation, explain_images

__all__ = [
    "BoxScore",
    "ChannelStatistics",
    "ClassScore",
    "ClassWise",
    "Classifier",
    "Contrast",
    "Detector",
    "Edit",
    "Evidence",
    "Explainer",
    "Explanation",
    "FixedChannels",
    "GradientEnergy",
    "GradientTimesActivation",
    "InstanceWise",
    "LayerSignal",
    "LayerStatistics",
    "ParchGrad",
    "ParchGradError",
    "Probability",
    "RandomChannels",
    "RankedLayerStatistics",
    "RegionScore",
    "Regression",
    "Selection",
    "Selector",
    "Similarity",
    "__version__",
    "choose_layers",
    "collect_from_folder",
    "collect_statistics",
    "explain_box",
    "explain_images",
    "find_convolutions",
    "get_hook_wrapper",
    "get_pretrained_model",
    "heatmap",
    "load_detector",
    "load_model",
    "load_network",
    "merge_statistics",
    "partition_gradient",
    "register_rule",
    "signed_heatmap",
]

# Names are imported when first used: torch, Captum and timm take seconds, which `parchgrad --help` need not wait for.
_MODULES = {
    "core.balance": ("register_rule",),
    "core.edit": ("Edit",),
    "core.engine": ("ParchGrad", "choose_layers"),
    "core.layers": ("find_convolutions",),
    "core.partition": ("partition_gradient",),
    "core.selectors": (
        "Evidence",
        "FixedChannels",
        "GradientEnergy",
        "GradientTimesActivation",
        "LayerSignal",
        "RandomChannels",
        "Selection",
        "Selector",
    ),
    "errors": ("ParchGradError",),
    "explain.explainer": ("Explainer",),
    "explain.heatmap": ("heatmap", "signed_heatmap"),
    "explain.scores": (
        "BoxScore",
        "ClassScore",
        "Contrast",
        "Probability",
        "RegionScore",
        "Regression",
        "Similarity",
    ),
    "legacy.hook_wrapper": ("get_hook_wrapper",),
    "legacy.pretrained_models": ("get_pretrained_model",),
    "models.classifier": ("Classifier",),
    "models.detector": ("Detector", "load_detector"),
    "models.loading": ("load_model",),
    "models.own_networks": ("load_network",),
    "statistics": ("ChannelStatistics", "LayerStatistics", "RankedLayerStatistics"),
    "statistics.accumulate": ("merge_statistics",),
    "statistics.collect": ("collect_statistics",),
    "statistics.selectors": ("ClassWise", "InstanceWise"),
    "workflows.collection": ("collect_from_folder",),
    "workflows.detection": ("explain_box",),
    "workflows.photographs": ("Explanation", "explain_images"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'parchgrad' has no attribute {name!r}")
    value = getattr(import_module(f"parchgrad.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
