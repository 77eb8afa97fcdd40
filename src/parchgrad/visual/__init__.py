"""Figures of attributions. Functions return figures or arrays; saving is a separate step."""

from parchgrad.visual.maps import (
    blend,
    blend_signed,
    normalise,
    overlay,
    paint,
    panel,
    relative,
    save_figure,
    shared_top,
    signed_panel,
    strip,
    tint,
    tint_signed,
)
from parchgrad.visual.volumes import clip_figure, signal_figure, volume_figure

__all__ = [
    "blend",
    "blend_signed",
    "clip_figure",
    "normalise",
    "overlay",
    "paint",
    "panel",
    "relative",
    "save_figure",
    "shared_top",
    "signal_figure",
    "signed_panel",
    "strip",
    "tint",
    "tint_signed",
    "volume_figure",
]
