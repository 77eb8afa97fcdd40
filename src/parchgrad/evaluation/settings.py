"""Settings that a run compares, and grids of settings with their controls."""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, cast, get_args

import numpy as np
from torch import nn

from parchgrad._io.checks import check_kind, is_number
from parchgrad.core.edit import Edit
from parchgrad.core.layers import LAYER_SETS, parse_layers
from parchgrad.core.partition import Conserve
from parchgrad.core.selectors import EditDefaults, check_softness
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
from parchgrad.explain.explainer import Explainer
from parchgrad.explain.methods import replaces_rectifiers
from parchgrad.statistics import ChannelStatistics
from parchgrad.statistics.selectors import find_selector

__all__ = ["Grid", "Masks", "Setting", "make_method"]

Masks = Literal["own", "another", "shuffled"]

_CONTROL_METHODS: Mapping[str, Callable[[nn.Module, "Setting", int], Method]] = {
    "random_map": lambda model, setting, seed: random_map(seed=seed),
    "grad_cam": lambda model, setting, seed: grad_cam(
        model, gates=setting.gates or 0.0, antialias=bool(setting.antialias), balance=bool(setting.balance)
    ),
    "centre_blob": lambda model, setting, seed: centre_blob(),
}
_WITHOUT_GRADIENT = ("random_map", "centre_blob")
_MASK_TITLES: Mapping[Masks, str] = {"another": "masks of another class", "shuffled": "shuffled masks"}
_TITLES = {"grad_cam": "Grad-CAM", "smoothgrad": "SmoothGrad"}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A method to explain with.

    None becomes the selector's default, so settings are equal if they do the same. Without a selector, only `method`,
    `gates`, `antialias` and `balance` apply, and the others stay None.

    Attributes:
        method: method of the explainer, such as `"gradient"`, `"smoothgrad"` or a Captum class name; or a control:
            `"random_map"`, `"grad_cam"`, `"centre_blob"`.
        selector: short name of the selector, such as `"energy"`; None for the plain method.
        quantile: share of the channels at or above the threshold, in (0, 1].
        softness: width of the ramp around the threshold, in [0, 1]; 0 is a hard cut, which `"random"` always is.
        layers: which layers to edit; see `choose_layers`.
        gamma: factor of the kept signal relative to the rest, in (0, inf]; infinity prunes.
        conserve: what a layer conserves; see `partition_gradient`.
        gates: width of the soft gates of every rectifier; see `soft_gate`. 0 is the true derivative.
        antialias: whether to smooth gradients at the input of strided operations; see `smooth_strides`.
        balance: whether to hold constant what makes operations nonlinear; see `Balance`.
        masks: `"own"` uses the selection for the explained class; the controls for the gradient are `"another"`, the
            selection for another class, and `"shuffled"`, the same number of channels at random.

    Raises:
        SettingError: if the selector is unknown, a setting is out of range, or a control does not have it.

    Example:
        >>> Setting(selector="evidence") == Setting(selector="evidence", softness=1.0, layers="auto", conserve="energy")
        True
        >>> Setting(selector="energy", softness=0).gates
        0.0
    """

    method: str = "gradient"
    selector: str | None = None
    quantile: float | None = None
    softness: float | None = None
    layers: str | float | tuple[str, ...] | None = None
    gamma: float = math.inf
    conserve: Conserve | None = None
    gates: float | None = None
    antialias: bool | None = None
    balance: bool | None = None
    masks: Masks = "own"

    def __post_init__(self) -> None:
        check_kind("`method`", self.method, str, "Pass its name")
        for name in ("quantile", "softness", "gamma", "gates"):
            value = getattr(self, name)
            if value is None and name != "gamma":
                continue
            if not is_number(value):
                raise SettingError(f"`{name}` is {value!r}, but it must be a number.")
            # NumPy scalars cannot be written as JSON.
            self._set(**{name: float(value)})
        if isinstance(self.layers, list):
            self._set(layers=tuple(self.layers))
        if self.selector is not None:
            find_selector(self.selector)
        if self.selector is not None and self.method in _CONTROL_METHODS:
            raise SettingError(
                f"`selector` is {self.selector!r}, but the control {self.method!r} has none. Leave it out."
            )
        if self.softness is not None:
            check_softness(self.softness)
        # Edit checks the settings that it shares.
        Edit(
            selector=None,
            gamma=self.gamma,
            conserve=self.conserve,
            gates=self.gates,
            antialias=self.antialias,
            balance=self.balance,
        )
        if self.method in _WITHOUT_GRADIENT and (self.gates or self.antialias or self.balance):
            raise SettingError(
                f"The control {self.method!r} has no gradient. Leave out `gates`, `antialias` and `balance`."
            )
        if self.masks not in get_args(Masks):
            raise SettingError(f"`masks` is {self.masks!r}, but it must be one of {', '.join(get_args(Masks))}.")
        if self.masks != "own" and (self.selector is None or self.method != "gradient"):
            raise SettingError(
                f"`masks` is {self.masks!r}, which needs method='gradient' and a `selector`. Pass both or leave it out."
            )
        self._resolve()

    def _resolve(self) -> None:
        """Replace every None by the selector's default."""
        if self.selector is None:
            self._set(quantile=None, softness=None, layers=None, gamma=math.inf, conserve=None)
            self._fill(gates=0.0, antialias=False, balance=False)
            return
        selector = find_selector(self.selector)
        if not selector.has("softness"):
            self._set(softness=None)
        self._fill(**{name: selector.default(name) for name in ("quantile", "softness")})
        if not selector.has("quantile"):
            self._set(quantile=None)
        self._fill(**asdict(self._suits))
        self._set(layers=_settled(self.layers))

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _fill(self, **values: Any) -> None:
        self._set(**{name: value for name, value in values.items() if getattr(self, name) is None})

    @property
    def _suits(self) -> EditDefaults:
        """Defaults for the selector, its softness and the method."""
        if self.selector is None:
            return EditDefaults(gates=0.0, antialias=False, balance=False)
        found = find_selector(self.selector).suits(self.softness)
        return replace(found, gates=0.0) if replaces_rectifiers(self.method) else found

    @property
    def title(self) -> str:
        """Title for display, different for different settings.

        It omits the selector's defaults, except for quantile and layers.

        Example:
            >>> Setting(selector="energy", layers="all").title
            'gradient, energy 0.1, all layers'
            >>> Setting(method="grad_cam", gates=2).title
            'Grad-CAM, gates 2'
        """
        parts = [_TITLES.get(self.method, self.method.replace("_", " "))]
        suits = self._suits
        if self.selector is not None:
            parts.append(self.selector if self.quantile is None else f"{self.selector} {_number(self.quantile)}")
            if self.softness != find_selector(self.selector).default("softness"):
                parts.append(f"softness {_number(self.softness)}")
            parts.append(f"{_layers_words(self.layers)} layers")
            parts += [f"gamma {_number(self.gamma)}"] if math.isfinite(self.gamma) else []
            parts += [f"conserve {self.conserve}"] if self.conserve != suits.conserve else []
        parts += [f"gates {_number(self.gates)}"] if self.gates != suits.gates else []
        for name in ("antialias", "balance"):
            value = getattr(self, name)
            parts += [f"{name} {'on' if value else 'off'}"] if value != getattr(suits, name) else []
        parts += [_MASK_TITLES[self.masks]] if self.masks != "own" else []
        return ", ".join(parts)


def _settled(layers: Any) -> Any:
    """Normalise equivalent layer choices to one form."""
    if is_number(layers):
        return float(layers)
    return (layers,) if isinstance(layers, str) and layers not in LAYER_SETS else layers


def _number(value: float | None) -> str:
    """A number in as few digits as identify it."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _layers_words(layers: str | float | tuple[str, ...] | None) -> str:
    if not isinstance(layers, tuple):
        return f"{layers}"
    return "+".join(name if _reads_as_pattern(name) else repr(name) for name in layers)


def _reads_as_pattern(name: str) -> bool:
    """Whether a pattern cannot be mistaken for a ratio, a set or several patterns."""
    plain = re.fullmatch(r"[\w.*?!\[\]-]+", name) is not None and name not in LAYER_SETS
    return plain and isinstance(parse_layers(name), str)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All combinations of settings, plus the controls.

    Accepts sequences and 1-D arrays, and stores them as tuples. None means each selector's default.

    Attributes:
        methods: see `Setting.method`.
        selectors: see `Setting.selector`.
        quantiles: see `Setting.quantile`.
        softnesses: see `Setting.softness`.
        layers: see `Setting.layers`.
        gammas: see `Setting.gamma`.
        conserves: see `Setting.conserve`.
        gates: see `Setting.gates`; they apply without a selector too.
        antialiases: see `Setting.antialias`; they apply without a selector too.
        balances: see `Setting.balance`; they apply without a selector too.
        masks: see `Setting.masks`.

    Raises:
        SettingError: if a field is a single value instead of a sequence.
    """

    methods: tuple[str, ...] = ("gradient",)
    selectors: tuple[str | None, ...] = ("evidence",)
    quantiles: tuple[float | None, ...] = (None,)
    softnesses: tuple[float | None, ...] = (None,)
    layers: tuple[str | float | tuple[str, ...] | None, ...] = (None,)
    gammas: tuple[float, ...] = (math.inf,)
    conserves: tuple[Conserve | None, ...] = (None,)
    gates: tuple[float | None, ...] = (None,)
    antialiases: tuple[bool | None, ...] = (None,)
    balances: tuple[bool | None, ...] = (None,)
    masks: tuple[Masks, ...] = ("own",)

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, _values(item.name, getattr(self, item.name)))

    def settings(self) -> tuple[Setting, ...]:
        """The controls, with the plain gradient first, then all combinations, without duplicates.

        Every setting with a selector comes with a twin that uses random channels.

        Example:
            >>> [setting.title for setting in Grid().settings()][:3]
            ['gradient', 'random map', 'Grad-CAM']
            >>> [setting.title for setting in Grid().settings()][4:]
            ['gradient, random 0.2, auto layers, gates 8', 'gradient, evidence 0.2, auto layers']
        """
        found = [Setting(), *(Setting(method=name) for name in _CONTROL_METHODS)]
        for method, selector in itertools.product(self.methods, self.selectors):
            found.append(Setting(method=method))
            if method in _WITHOUT_GRADIENT:
                continue
            rules = itertools.product(self.gates, self.antialiases, self.balances)
            if selector is None or method in _CONTROL_METHODS:
                found += [
                    Setting(method=method, gates=gates, antialias=antialias, balance=balance)
                    for gates, antialias, balance in rules
                ]
                continue
            for quantile, softness, layers, gamma, conserve, (gates, antialias, balance) in itertools.product(
                self.quantiles, self.softnesses, self.layers, self.gammas, self.conserves, rules
            ):
                edit = Setting(
                    method=method,
                    selector=selector,
                    quantile=quantile,
                    softness=softness,
                    layers=layers,
                    gamma=gamma,
                    conserve=conserve,
                    gates=gates,
                    antialias=antialias,
                    balance=balance,
                )
                found.append(replace(edit, selector="random"))
                found += [replace(edit, masks=masks) for masks in self.masks if masks == "own" or method == "gradient"]
        return tuple(dict.fromkeys(found))


def _values(name: str, given: Any) -> tuple[Any, ...]:
    """Convert a sequence or 1-D array to a tuple of Python values, which can be hashed and written as JSON."""
    if getattr(given, "ndim", None) == 1:
        return tuple(given.tolist())
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise SettingError(f"`{name}` is {given!r}, but it must be a sequence. For a single value, pass ({given!r},).")
    own = (value.item() if isinstance(value, np.generic) else value for value in given)
    return tuple(tuple(value) if isinstance(value, list) else value for value in own)


def make_method(
    model: nn.Module, setting: Setting, *, statistics: ChannelStatistics | None = None, seed: int = 0
) -> Method:
    """Make the method that a setting describes.

    Args:
        model: classifier in evaluation mode, logits (B, K).
        setting: the setting.
        statistics: channel statistics, for the selectors that need them.
        seed: random seed of random maps and random channels.

    Raises:
        ParchGradError: if the setting does not fit the model; see `Explainer`.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> make_method(model, Setting(selector="energy"))(torch.rand(1, 3, 4, 4), torch.tensor([0])).shape
        torch.Size([1, 4, 4])
    """
    if setting.method in _CONTROL_METHODS:
        return _CONTROL_METHODS[setting.method](model, setting, seed)
    selector = None
    if setting.selector is not None:
        selector = find_selector(setting.selector).make(
            quantile=setting.quantile,
            softness=setting.softness,
            statistics=statistics,
            seed=seed,
        )
    edit = Edit(
        selector=selector,
        layers=setting.layers,
        gamma=setting.gamma,
        conserve=setting.conserve,
        gates=setting.gates,
        antialias=setting.antialias,
        balance=setting.balance,
    )
    if setting.masks == "another":
        return masks_of_another_class(model, edit)
    if setting.masks == "shuffled":
        return shuffled_masks(model, edit, seed=seed)
    if setting.selector == "random":
        quantile = cast(float, setting.quantile)
        return random_channels(model, quantile=quantile, edit=edit, method=setting.method, seed=seed)
    return maps_of(Explainer.from_edit(model, edit, method=setting.method))
