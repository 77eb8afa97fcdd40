"""The hook wrapper of the original research code: a thin shell around layers, statistics, selectors and ParchGrad."""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn

from parchgrad.engine import ParchGrad, Target
from parchgrad.errors import LayerError, SettingError, StatisticsError
from parchgrad.layers import Convolution, bare_model, choose_layers, find_convolutions, has_published_layers
from parchgrad.models import check_model_name
from parchgrad.models.pretrained_models import ENCODERS
from parchgrad.partition import Conserve
from parchgrad.selection import ClassWise, InstanceWise, Selector
from parchgrad.statistics import ChannelStatistics
from parchgrad.statistics.pickles import import_pickles

__all__ = ["HookWrapper", "get_hook_wrapper"]

Method = Literal["cls", "ins", "normal"]
_METHODS = get_args(Method)
# Masks of all classes are kept with each selector: some megabytes.
_SELECTORS_KEPT = 8


def get_hook_wrapper(name: str, model: nn.Module, method: Method) -> "HookWrapper":
    """Wrap a network for `attribution_methods.get_input_attrib`, as the original research code did.

    Args:
        name: a name of the research code (see `ENCODERS`), or any name that `load_model` takes.
        model: the network of that name.
        method: `"cls"` selects channels by class, `"ins"` by image, `"normal"` is the plain method.

    Raises:
        ModelError: if no network has this name, or `model` is no module.
        SettingError: if the method is unknown.

    Example:
        >>> from parchgrad import load_model
        >>> wrapper = get_hook_wrapper("resnet18", load_model("resnet18", pretrained=False).model, "cls")
        >>> convolutions = wrapper.get_default_hook_convolutions()
        >>> wrapper.set_hook_modules(convolutions)
        >>> len(wrapper.all_convolutions), len(convolutions)
        (20, 8)
    """
    return HookWrapper(name, model, method)


class HookWrapper:
    """A network with its statistics and the convolutions to edit; made by `get_hook_wrapper`.

    Nothing is hung on the network: hooks are there while `edited_gradients` is open, and no longer.

    Attributes:
        name: the network's name.
        model: the network.
        method: `"cls"`, `"ins"` or `"normal"`.
    """

    def __init__(self, name: str, model: nn.Module, method: Method) -> None:
        """See `get_hook_wrapper`."""
        model = bare_model(model)
        if method not in _METHODS:
            raise SettingError(f"method is {method!r}, but it must be one of {', '.join(_METHODS)}.")
        if name not in ENCODERS:
            check_model_name(name)
        self.name = name
        self.model = model
        self.method = method
        self._hook_modules: list[Convolution] = []
        self._selector_for: Callable[[float | None, float | None, float | None], Selector] | None = None

    @property
    def all_convolutions(self) -> list[Convolution]:
        """Every convolution of the network, in module order."""
        return list(find_convolutions(self.model).values())

    @property
    def hook_modules(self) -> list[Convolution]:
        """The convolutions set by `set_hook_modules`, in module order."""
        return list(self._hook_modules)

    def prepare_parchgrad(
        self, base_directory: str | Path, device: str | torch.device | None = None, verbose: int = 0
    ) -> None:
        """Read the statistics; the method `"normal"` needs none and reads nothing.

        Args:
            base_directory: a statistics file; or a folder that holds `NAME.safetensors`, NAME being the network's; or
                a folder of the research code, with pickles in it or in its folder `pickles`. Method `"cls"` needs
                `cls_p_values.pkl` and `shapiro_p_values.pkl`; method `"ins"` needs `shapiro_p_values.pkl`,
                `gap_mean.pkl` and `gap_std.pkl`.
            device: has no meaning any more: what is needed goes where the network is.
            verbose: has no meaning any more: nothing is printed.

        Raises:
            StatisticsError: if there are no statistics, they lack what the method needs, or they are damaged or of
                another network.
        """
        if self.method == "normal":
            return
        statistics = _read_statistics(Path(base_directory), self.name, self.model)
        statistics.require("instance" if self.method == "ins" else "class")
        # Ranking all classes takes longer than an image, and loops over images come back with the same settings.
        cache = functools.lru_cache(_SELECTORS_KEPT)
        self._selector_for = cache(functools.partial(_make_selector, self.method, statistics))

    def get_default_hook_convolutions(self, layer_ratio: float | str | None = None) -> list[Convolution]:
        """Choose the convolutions to edit.

        Args:
            layer_ratio: r in (0, 1], the last `int(r * n)` of n convolutions, at least one; None is the set published
                for the family, else 0.5 (see `choose_layers`).

        Raises:
            LayerError: if the ratio is out of range.
            ModelError: if the network holds no convolution.
        """
        if layer_ratio is None:
            layer_ratio = "published" if has_published_layers(self.model) else 0.5
        return list(choose_layers(self.model, layer_ratio).values())

    def set_hook_modules(self, modules: Iterable[nn.Module], verbose: int = 0) -> None:
        """Set the convolutions to edit, in place of those set before.

        Args:
            modules: convolutions of the network.
            verbose: has no meaning any more: nothing is printed.

        Raises:
            LayerError: if there are none, or one is no convolution of the network.
        """
        self._hook_modules = list(choose_layers(self.model, list(modules)).values())

    def edited_gradients(
        self,
        *,
        target: Target,
        quantile: float | None,
        alpha: float | None,
        normality_threshold: float | None,
        gamma: float,
        conserve: Conserve,
    ) -> ParchGrad:
        """Make the block in which the network's gradients are edited; see `ParchGrad` and `ClassWise`.

        Args:
            target: class whose channels are kept.
            quantile: share of the channels to keep, in (0, 1]; where it is given `alpha` is not read.
            alpha: largest p-value to keep, in (0, 1).
            normality_threshold: the gate on the Shapiro-Wilk p-value, in (0, 1]; None switches it off.
            gamma: how many times stronger than the rest the kept signal becomes, in (0, inf].
            conserve: how the layer's variance is kept.

        Raises:
            StatisticsError: if no statistics were read, or they lack a layer that was set.
            LayerError: if no convolutions were set.
            SettingError: if a setting is out of range, or the method is `"normal"`.
        """
        if self.method == "normal":
            raise SettingError("The method 'normal' edits no gradient; make the wrapper with 'cls' or 'ins'.")
        if self._selector_for is None:
            raise StatisticsError(
                "No channel statistics were read; call wrapper.prepare_parchgrad(base_directory=...) first."
            )
        if not self._hook_modules:
            raise LayerError(
                "No convolution to edit was set; call "
                "wrapper.set_hook_modules(wrapper.get_default_hook_convolutions()) first."
            )
        selector = self._selector_for(quantile, alpha if quantile is None else None, normality_threshold)
        return ParchGrad(self.model, selector, layers=self._hook_modules, gamma=gamma, conserve=conserve, target=target)


def _make_selector(
    method: Method,
    statistics: ChannelStatistics,
    quantile: float | None,
    alpha: float | None,
    normality_threshold: float | None,
) -> Selector:
    if method == "ins":
        return InstanceWise(
            statistics, quantile=quantile, alpha=alpha, softness=0, normality_threshold=normality_threshold
        )
    return ClassWise(
        statistics,
        quantile=quantile,
        alpha=alpha,
        softness=0,
        normality_threshold=normality_threshold,
        test=statistics.test,
    )


def _read_statistics(base: Path, name: str, model: nn.Module) -> ChannelStatistics:
    """Read the statistics at a place: a file, a file of the network's name in a folder, or pickles in one."""
    if not base.is_dir():
        return ChannelStatistics.load(base, model)
    names = list(dict.fromkeys((name, ENCODERS.get(name, name))))
    for path in (base / f"{stem}.safetensors" for stem in names):
        if path.is_file():
            return ChannelStatistics.load(path, model)
    if not (base / "pickles").is_dir() and not any(base.glob("*.pkl")):
        raise StatisticsError(
            f"{str(base)!r} holds neither {' nor '.join(repr(f'{stem}.safetensors') for stem in names)} nor the "
            "research code's folder 'pickles'; collect statistics on this model and save them there."
        )
    return import_pickles(base, model, name=name)
