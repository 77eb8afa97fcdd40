"""ParchGrad: partitioned channel gradients for sharper saliency maps of convolutional networks."""

from importlib import import_module
from typing import TYPE_CHECKING

from parchgrad._version import __version__

if TYPE_CHECKING:
    from parchgrad.attribution import Explainer, heatmap, signed_heatmap
    from parchgrad.collection import collect_from_folder
    from parchgrad.edit import Edit
    from parchgrad.engine import ParchGrad
    from parchgrad.errors import ParchGradError
    from parchgrad.explanation import Explanation, explain_images
    from parchgrad.heads import RegionScore
    from parchgrad.hook_wrapper import get_hook_wrapper
    from parchgrad.layers import choose_layers, find_convolutions
    from parchgrad.models import Classifier, load_model
    from parchgrad.models.pretrained_models import get_pretrained_model
    from parchgrad.partition import partition_gradient
    from parchgrad.selection import (
        ClassWise,
        Evidence,
        FixedChannels,
        GradientEnergy,
        GradientTimesActivation,
        InstanceWise,
        LayerSignal,
        RandomChannels,
        Selection,
        Selector,
    )
    from parchgrad.statistics import ChannelStatistics, LayerStatistics, RankedLayerStatistics
    from parchgrad.statistics.accumulate import merge_statistics
    from parchgrad.statistics.collect import collect_statistics

__all__ = [
    "ChannelStatistics",
    "ClassWise",
    "Classifier",
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
    "RandomChannels",
    "RankedLayerStatistics",
    "RegionScore",
    "Selection",
    "Selector",
    "__version__",
    "choose_layers",
    "collect_from_folder",
    "collect_statistics",
    "explain_images",
    "find_convolutions",
    "get_hook_wrapper",
    "get_pretrained_model",
    "heatmap",
    "load_model",
    "merge_statistics",
    "partition_gradient",
    "signed_heatmap",
]

# Names are imported when first used: torch, Captum and timm take seconds, which `parchgrad --help` need not wait for.
_MODULES = {
    "attribution": ("Explainer", "heatmap", "signed_heatmap"),
    "edit": ("Edit",),
    "engine": ("ParchGrad",),
    "errors": ("ParchGradError",),
    "explanation": ("Explanation", "explain_images"),
    "heads": ("RegionScore",),
    "hook_wrapper": ("get_hook_wrapper",),
    "layers": ("choose_layers", "find_convolutions"),
    "models": ("Classifier", "load_model"),
    "models.pretrained_models": ("get_pretrained_model",),
    "partition": ("partition_gradient",),
    "selection": (
        "ClassWise",
        "Evidence",
        "FixedChannels",
        "GradientEnergy",
        "GradientTimesActivation",
        "InstanceWise",
        "LayerSignal",
        "RandomChannels",
        "Selection",
        "Selector",
    ),
    "collection": ("collect_from_folder",),
    "statistics": ("ChannelStatistics", "LayerStatistics", "RankedLayerStatistics"),
    "statistics.accumulate": ("merge_statistics",),
    "statistics.collect": ("collect_statistics",),
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
