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

__all__ = [
    "blend",
    "blend_signed",
    "normalise",
    "overlay",
    "paint",
    "panel",
    "relative",
    "save_figure",
    "shared_top",
    "signed_panel",
    "strip",
    "tint",
    "tint_signed",
]
