"""Pictures of attributions. Functions return figures or arrays; saving them is a separate step."""

from parchgrad.visual.maps import blend, normalise, overlay, panel, save_figure

__all__ = ["blend", "normalise", "overlay", "panel", "save_figure"]
