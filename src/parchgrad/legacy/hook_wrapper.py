"""The hook wrapper of the original research code, as a thin wrapper around selectors and ParchGrad."""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn

from parchgrad._io.checks import is_number
from parchgrad._io.files import safe_stem
from parchgrad.core.engine import ParchGrad, choose_layers
from parchgrad.core.layers import Convolution, Layer, bare_model, find_convolutions, has_published_layers, last_layers
from parchgrad.core.partition import Conserve
from parchgrad.core.selectors import Selector
from parchgrad.core.targets import Target
from parchgrad.errors import LayerError, SettingError, StatisticsError
from parchgrad.legacy.pickles import import_pickles
from parchgrad.legacy.pretrained_models import ENCODERS
from parchgrad.statistics import ChannelStatistics
from parchgrad.statistics.selectors import ClassWise, InstanceWise

__all__ = ["HookWrapper", "get_hook_wrapper"]

Method = Literal["cls", "ins", "normal"]
_METHODS = get_args(Method)
# Each selector caches the masks of all classes, a few megabytes.
_SELECTORS_KEPT = 8


def get_hook_wrapper(name: str, model: nn.Module, method: Method) -> "HookWrapper":
    """Wrap a network for `attribution_methods.get_input_attrib`, as the original research code did.

    Args:
        name: a name of the research code (see `ENCODERS`), or any name that `load_model` accepts.
        model: the network of that name.
        method: `"cls"` selects channels by class, `"ins"` by image, `"normal"` does not edit.

    Raises:
        ModelError: if there is no such network, or `model` is not a module.
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
    """A network with its statistics and the convolutions to edit, from `get_hook_wrapper`.

    Hooks exist only while an `edited_gradients` block is open.

    Attributes:
        name: name of the network.
        model: the network.
        method: `"cls"`, `"ins"` or `"normal"`.
    """

    def __init__(self, name: str, model: nn.Module, method: Method) -> None:
        """See `get_hook_wrapper`."""
        model = bare_model(model)
        if method not in _METHODS:
            raise SettingError(f"`method` is {method!r}, but it must be one of {', '.join(_METHODS)}.")
        if name not in ENCODERS:
            # torchvision and timm are only needed for their own names.
            from parchgrad.models.loading import check_model_name

            check_model_name(name)
        self.name = name
        self.model = model
        self.method = method
        self._hook_modules: list[Layer] = []
        self._selector_for: Callable[[float | None, float | None, float | None], Selector] | None = None

    @property
    def all_convolutions(self) -> list[Convolution]:
        """Every convolution of the network, in module order."""
        return list(find_convolutions(self.model).values())

    @property
    def hook_modules(self) -> list[Layer]:
        """The convolutions set by `set_hook_modules`, in module order."""
        return list(self._hook_modules)

    def prepare_parchgrad(
        self, base_directory: str | Path, device: str | torch.device | None = None, verbose: int = 0
    ) -> None:
        """Read the statistics; does nothing for the method `"normal"`.

        Args:
            base_directory: a statistics file, a folder with `NAME.safetensors` for the network's name (with `--` for a
                colon or slash), or a folder of the research code, with pickles in it or in its folder `pickles`. Method
                `"cls"` needs `cls_p_values.pkl` and `shapiro_p_values.pkl`; method `"ins"` needs
                `shapiro_p_values.pkl`, `gap_mean.pkl` and `gap_std.pkl`.
            device: ignored; statistics are moved to the network's device.
            verbose: ignored; nothing is printed.

        Raises:
            StatisticsError: if the statistics are missing or damaged, lack what the method needs, or belong to another
                network.
        """
        if self.method == "normal":
            return
        statistics = _read_statistics(Path(base_directory), self.name, self.model)
        statistics.require("instance" if self.method == "ins" else "class")
        # Ranking all classes takes longer than an image, and loops over images repeat the same settings.
        cache = functools.lru_cache(_SELECTORS_KEPT)
        self._selector_for = cache(functools.partial(_make_selector, self.method, statistics))

    def get_default_hook_convolutions(self, layer_ratio: float | str | None = None) -> list[Layer]:
        """Choose the convolutions to edit.

        Args:
            layer_ratio: r in (0, 1] for the last `int(r * n)` of n convolutions, at least one; None for the layers
                published for the family, else 0.5 (see `choose_layers`).

        Raises:
            LayerError: if the ratio is out of range.
            ModelError: if the network has no convolution.
        """
        if layer_ratio is None:
            layer_ratio = "published" if has_published_layers(self.model) else 0.5
        if not is_number(layer_ratio):
            return list(choose_layers(self.model, layer_ratio).values())
        convolutions = find_convolutions(self.model)
        return [convolutions[name] for name in last_layers(convolutions, layer_ratio)]

    def set_hook_modules(self, modules: Iterable[nn.Module], verbose: int = 0) -> None:
        """Set the convolutions to edit, replacing earlier ones.

        Args:
            modules: convolutions of the network.
            verbose: ignored; nothing is printed.

        Raises:
            LayerError: if there are none, or one is not a convolution of the network.
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
        """Return a context that edits the network's gradients; see `ParchGrad` and `ClassWise`.

        Args:
            target: class whose channels are kept.
            quantile: share of channels to keep, in (0, 1]; overrides `alpha`.
            alpha: largest p-value to keep, in (0, 1).
            normality_threshold: largest Shapiro-Wilk p-value of kept channels, in (0, 1]; None keeps any.
            gamma: factor of the kept signal relative to the rest, in (0, inf].
            conserve: how to conserve the layer's variance.

        Raises:
            StatisticsError: if no statistics were read, or they lack a chosen layer.
            LayerError: if no convolutions were set.
            SettingError: if a setting is out of range, or the method is `"normal"`.
        """
        if self.method == "normal":
            raise SettingError("The method 'normal' does not edit gradients. Create the wrapper with 'cls' or 'ins'.")
        if self._selector_for is None:
            raise StatisticsError(
                "No channel statistics were read. Call `wrapper.prepare_parchgrad(base_directory=...)` first."
            )
        if not self._hook_modules:
            raise LayerError(
                "No convolutions to edit were set. Call "
                "`wrapper.set_hook_modules(wrapper.get_default_hook_convolutions())` first."
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
    """Read statistics from a file, a file named after the network in a folder, or pickles in a folder."""
    if not base.is_dir():
        return ChannelStatistics.load(base, model)
    names = list(dict.fromkeys((safe_stem(name), ENCODERS.get(name, safe_stem(name)))))
    for path in (base / f"{stem}.safetensors" for stem in names):
        if path.is_file():
            return ChannelStatistics.load(path, model)
    if not (base / "pickles").is_dir() and not any(base.glob("*.pkl")):
        raise StatisticsError(
            f"{str(base)!r} contains neither {' nor '.join(repr(f'{stem}.safetensors') for stem in names)} nor the "
            "research code's folder 'pickles'. Collect statistics on this model and save them there."
        )
    return import_pickles(base, model, name=name)
