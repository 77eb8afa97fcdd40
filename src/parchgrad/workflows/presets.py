"""Published protocols as settings of an evaluation."""

from collections.abc import Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

from parchgrad.errors import SettingError
from parchgrad.evaluation.leaderboard import LEADERBOARD_SCORES

__all__ = ["PRESETS", "find_preset"]

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "paper": {
            # The grid has 199 methods, so all 50,000 validation images would take days and fill the memory.
            "data": {"count": 500},
            "grid": {
                "methods": ["gradient", "input_x_gradient", "integrated_gradients", "smoothgrad"],
                "selectors": ["class", "instance"],
                "quantiles": [0.05, 0.1],
                # A hard cut also turns off gates, smooth strides and balance, which the paper does not have.
                "softnesses": [0.0],
                "layers": [0.3, 0.5, 0.9, 1.0],
                "conserves": ["independent", "none"],
            },
            "scores": {"families": ["perturbation", "localisation"]},
        },
        "leaderboard": {
            "data": {"count": 100},
            "compare": "leaderboard",
            "scores": asdict(LEADERBOARD_SCORES),
        },
    }
)
"""Presets by name, with the tables of a settings file.

`"paper"` is the grid of Park, Jeon, Choi (2023), "Partitioned Channel Gradient for Reliable Input Attribution",
on 500 random images; `"leaderboard"` has the methods of `leaderboard_methods` and all scores on 100 random images.
"""


def find_preset(name: str) -> Mapping[str, Any]:
    """Look up the tables of a preset; see `read_settings`.

    Raises:
        SettingError: if there is no such preset.

    Example:
        >>> find_preset("paper")["grid"]["layers"]
        [0.3, 0.5, 0.9, 1.0]
    """
    if name not in PRESETS:
        raise SettingError(f"`preset` is {name!r}, but it must be one of {', '.join(PRESETS)}.")
    return PRESETS[name]
