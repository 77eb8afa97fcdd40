"""Figures of attributions. Functions return figures or arrays; saving is a separate step."""

from parchgrad.visual.drawing import draw_box
from parchgrad.visual.maps import (
    blend,
    blend_signed,
    check_colormap,
    normalise,
    overlay,
    paint,
    panel,
    relative,
    save_figure,
    shared_top,
    signed_panel,
    smooth,
    strip,
    tint,
    tint_signed,
)
from parchgrad.visual.volumes import clip_figure, signal_figure, volume_figure

__all__ = [
    "blend",
    "blend_signed",
    "check_colormap",
    "clip_figure",
    "draw_box",
    "normalise",
    "overlay",
    "paint",
    "panel",
    "relative",
    "save_figure",
    "shared_top",
    "signal_figure",
    "signed_panel",
    "smooth",
    "strip",
    "tint",
    "tint_signed",
    "volume_figure",
]
