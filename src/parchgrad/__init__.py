"""ParchGrad: partitioned channel gradients for saliency maps of convolutional networks one can trust."""

from parchgrad._version import __version__
from parchgrad.attribution import Explainer, heatmap
from parchgrad.engine import ParchGrad
from parchgrad.errors import ParchGradError
from parchgrad.layers import choose_layers, find_convolutions
from parchgrad.partition import partition_gradient
from parchgrad.selection import (
    ClassWise,
    FixedChannels,
    GradientEnergy,
    GradientTimesActivation,
    InstanceWise,
    RandomChannels,
    Selector,
)
from parchgrad.statistics import ChannelStatistics, LayerStatistics

__all__ = [
    "ChannelStatistics",
    "ClassWise",
    "Explainer",
    "FixedChannels",
    "GradientEnergy",
    "GradientTimesActivation",
    "InstanceWise",
    "LayerStatistics",
    "ParchGrad",
    "ParchGradError",
    "RandomChannels",
    "Selector",
    "__version__",
    "choose_layers",
    "find_convolutions",
    "heatmap",
    "partition_gradient",
]
