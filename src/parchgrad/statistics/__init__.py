"""Channel statistics over an image set, and the tests that read them."""

from parchgrad.statistics.store import ChannelStatistics, LayerStatistics

__all__ = ["ChannelStatistics", "LayerStatistics"]
