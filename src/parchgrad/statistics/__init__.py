"""Channel statistics over an image set, and the tests that read them."""

from parchgrad.statistics.layer import LayerStatistics, RankedLayerStatistics
from parchgrad.statistics.store import ChannelStatistics, RowSample

__all__ = ["ChannelStatistics", "LayerStatistics", "RankedLayerStatistics", "RowSample"]
