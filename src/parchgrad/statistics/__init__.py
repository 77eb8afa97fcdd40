"""Channel statistics over a data set, and t-tests on them."""

from parchgrad.statistics.layer import LayerStatistics, RankedLayerStatistics

# Imported with the package, so that both are registered wherever statistics are used.
from parchgrad.statistics.selectors import ClassWise, InstanceWise
from parchgrad.statistics.store import ChannelStatistics, RowSample

__all__ = [
    "ChannelStatistics",
    "ClassWise",
    "InstanceWise",
    "LayerStatistics",
    "RankedLayerStatistics",
    "RowSample",
]
