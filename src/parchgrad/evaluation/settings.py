"""What a run compares: ways of explaining by their settings, and grids of them with the controls that always come."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypedDict, get_args

import numpy as np
from torch import nn

from parchgrad.attribution import Explainer
from parchgrad.checks import check_kind, is_number
from parchgrad.errors import SettingError
from parchgrad.evaluation.methods import (
    Method,
    centre_blob,
    grad_cam,
    maps_of,
    masks_of_another_class,
    random_channels,
    random_map,
    shuffled_masks,
)
from parchgrad.layers import LayerChoice
from parchgrad.partition import Conserve
from parchgrad.selection import SELECTORS_BY_NAME, STATISTICAL_SELECTORS, default_quantile, make_selector
from parchgrad.statistics import ChannelStatistics

__all__ = ["Grid", "Masks", "Setting", "make_method"]

Masks = Literal["own", "another", "shuffled"]

_CONTROL_METHODS: Mapping[str, Callable[[nn.Module, int], Method]] = {
    "random_map": lambda model, seed: random_map(seed=seed),
    "grad_cam": lambda model, seed: grad_cam(model),
    "centre_blob": lambda model, seed: centre_blob(),
}
_MASK_TITLES: Mapping[Masks, str] = {"another": "masks of another class", "shuffled": "shuffled masks"}
_TITLES = {"grad_cam": "Grad-CAM", "smoothgrad": "SmoothGrad"}


class _EditSettings(TypedDict):
    layers: LayerChoice
    gamma: float
    conserve: Conserve


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way of explaining.

    Attributes:
        method: of the explainer, such as `"gradient"`, `"smoothgrad"` or a Captum class name; or a control:
            `"random_map"`, `"grad_cam"`, `"centre_blob"`.
        selector: short name of the selector, such as `"energy"`; None for the plain method, which ignores what follows.
        quantile: share of the channels to keep, in (0, 1].
        layers: which convolutions are edited; see `choose_layers`.
        gamma: see `partition_gradient`.
        conserve: see `partition_gradient`.
        masks: `"own"` are the selector's for the class that is explained; as controls of the gradient `"another"` are
            those for another class, and `"shuffled"` keep as many channels at random.

    Raises:
        SettingError: if there is no such selector, or a control is given one, or masks are given to what has none.
    """

    method: str = "gradient"
    selector: str | None = None
    quantile: float = 0.1
    layers: str | float | tuple[str, ...] = "default"
    gamma: float = math.inf
    conserve: Conserve = "independent"
    masks: Masks = "own"

    def __post_init__(self) -> None:
        check_kind("method", self.method, str, "give its name")
        for name in ("quantile", "gamma"):
            if not is_number(getattr(self, name)):
                raise SettingError(
                    f"{name} is {getattr(self, name)!r}, but it must be a number; write it without quotes."
                )
            # numpy's numbers have no JSON, which rows are written in.
            object.__setattr__(self, name, float(getattr(self, name)))
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        known = (*SELECTORS_BY_NAME, *STATISTICAL_SELECTORS)
        if self.selector is not None and self.selector not in known:
            raise SettingError(f"selector is {self.selector!r}, but it must be none or one of {', '.join(known)}.")
        if self.selector is not None and self.method in _CONTROL_METHODS:
            raise SettingError(f"The control {self.method!r} has no selector; leave {self.selector!r} out.")
        if self.masks not in get_args(Masks):
            raise SettingError(f"masks is {self.masks!r}, but it must be one of {', '.join(get_args(Masks))}.")
        if self.masks != "own" and (self.selector is None or self.method != "gradient"):
            raise SettingError(
                f"masks is {self.masks!r}, which is a control for the gradient with a selector alone; choose these, or "
                "leave it out."
            )

    @property
    def title(self) -> str:
        """What the setting is called where people read it; settings that differ have titles that do.

        Example:
            >>> Setting(selector="energy", layers="all").title
            'gradient, energy 0.1, all layers'
        """
        name = _TITLES.get(self.method, self.method.replace("_", " "))
        if self.selector is None:
            return name
        layers = "+".join(self.layers) if isinstance(self.layers, tuple) else f"{self.layers}"
        parts = [name, f"{self.selector} {self.quantile:g}", f"{layers} layers"]
        parts += [f"gamma {self.gamma:g}"] if math.isfinite(self.gamma) else []
        parts += [f"conserve {self.conserve}"] if self.conserve != "independent" else []
        parts += [_MASK_TITLES[self.masks]] if self.masks != "own" else []
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All combinations of settings, and the controls that always come with them.

    Any sequence or array of one axis is taken, and kept as a tuple.

    Attributes:
        methods: see `Setting.method`.
        selectors: see `Setting.selector`.
        quantiles: see `Setting.quantile`; None is the one that a selector has on its own.
        layers: see `Setting.layers`.
        gammas: see `Setting.gamma`.
        conserves: see `Setting.conserve`.
        masks: see `Setting.masks`.

    Raises:
        SettingError: if a single value is given where several are wanted.
    """

    methods: tuple[str, ...] = ("gradient",)
    selectors: tuple[str | None, ...] = ("energy",)
    quantiles: tuple[float | None, ...] = (None,)
    layers: tuple[str | float | tuple[str, ...], ...] = ("default",)
    gammas: tuple[float, ...] = (math.inf,)
    conserves: tuple[Conserve, ...] = ("independent",)
    masks: tuple[Masks, ...] = ("own",)

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, _values(item.name, getattr(self, item.name)))

    def settings(self) -> tuple[Setting, ...]:
        """The controls, the plain gradient first, then all combinations, each once.

        Every partitioned setting has its twin of random channels.

        Example:
            >>> [setting.title for setting in Grid().settings()][:3]
            ['gradient', 'random map', 'Grad-CAM']
            >>> [setting.title for setting in Grid().settings()][4:]
            ['gradient, random 0.1, default layers', 'gradient, energy 0.1, default layers']
        """
        found = [Setting(), *(Setting(method=name) for name in _CONTROL_METHODS)]
        edits = list(itertools.product(self.quantiles, self.layers, self.gammas, self.conserves))
        for method, selector in itertools.product(self.methods, self.selectors):
            found.append(Setting(method=method))
            if selector is None or method in _CONTROL_METHODS:
                continue
            for quantile, layers, gamma, conserve in edits:
                edit = Setting(
                    method=method,
                    selector=selector,
                    quantile=default_quantile(selector) if quantile is None else quantile,
                    layers=layers,
                    gamma=gamma,
                    conserve=conserve,
                )
                found.append(replace(edit, selector="random"))
                found += [replace(edit, masks=masks) for masks in self.masks if masks == "own" or method == "gradient"]
        return tuple(dict.fromkeys(found))


def _values(name: str, given: Any) -> tuple[Any, ...]:
    """A sequence or an array of one axis as a tuple of Python's own values, which has a hash and can be written."""
    if getattr(given, "ndim", None) == 1:
        return tuple(given.tolist())
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise SettingError(
            f"{name} is {given!r}, but it must be a tuple of values; for a single one write ({given!r},)."
        )
    own = (value.item() if isinstance(value, np.generic) else value for value in given)
    return tuple(tuple(value) if isinstance(value, list) else value for value in own)


def make_method(
    model: nn.Module, setting: Setting, *, statistics: ChannelStatistics | None = None, seed: int = 0
) -> Method:
    """Make the method that a setting describes.

    Args:
        model: classifier in evaluation mode, logits (B, K).
        setting: what is asked for.
        statistics: for the selectors that need some.
        seed: of random maps and random channels.

    Raises:
        ParchGradError: if the setting does not fit the model; see `Explainer`.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> make_method(model, Setting(selector="energy"))(torch.rand(1, 3, 4, 4), torch.tensor([0])).shape
        torch.Size([1, 4, 4])
    """
    if setting.method in _CONTROL_METHODS:
        return _CONTROL_METHODS[setting.method](model, seed)
    edit = _EditSettings(
        layers=list(setting.layers) if isinstance(setting.layers, tuple) else setting.layers,
        gamma=setting.gamma,
        conserve=setting.conserve,
    )
    if setting.selector == "random" and setting.masks == "own":
        return random_channels(model, quantile=setting.quantile, method=setting.method, seed=seed, **edit)
    selector = None
    if setting.selector is not None:
        selector = make_selector(setting.selector, quantile=setting.quantile, statistics=statistics, seed=seed)
    if selector is not None and setting.masks == "another":
        return masks_of_another_class(model, selector, **edit)
    if selector is not None and setting.masks == "shuffled":
        return shuffled_masks(model, selector, **edit, seed=seed)
    return maps_of(Explainer(model, selector, **edit, method=setting.method))
