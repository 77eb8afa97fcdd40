"""Sweeps: one photograph explained at several values of one setting."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from parchgrad.attribution import Explainer, heatmap
from parchgrad.errors import SettingError
from parchgrad.layers import LayerChoice
from parchgrad.models import Classifier, Prediction, check_classifier
from parchgrad.partition import Conserve
from parchgrad.recording import Recorder
from parchgrad.selection import Selector
from parchgrad.visual.maps import strip

__all__ = ["ALPHAS", "QUANTILES", "Sweep", "alpha_sweep", "quantile_sweep"]

QUANTILES = (0.7, 0.5, 0.3, 0.2, 0.1, 0.05)
"""From most channels to few."""
ALPHAS = (0.1, 0.05, 0.01, 1e-3, 1e-4, 1e-6)
"""From weak evidence to strong; a layer in which no channel passes is left as it is."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Sweep:
    """One photograph explained at several values of one setting.

    Attributes:
        setting: `"quantile"` or `"alpha"`.
        values: the values, in the order of the maps.
        picture: what the network saw, (H, W, 3) in [0, 1].
        heats: heat map at each value, (V, H, W).
        plain: heat map of the same method without ParchGrad, (H, W).
        kept: share of the channels that were kept and had a gradient, on average over the layers in which any was
            selected, at each value; NaN where there is no such layer.
        untouched: number of layers in which no channel was selected, so that they were left as they are, at each value.
        target: the explained class.
        selector: name of the selector's class.
        layers: names of the edited convolutions.
        gamma: see `Explainer`.
        conserve: see `Explainer`.
        method: the attribution method.
    """

    setting: str
    values: tuple[float, ...]
    picture: NDArray[Any]
    heats: NDArray[Any]
    plain: NDArray[Any]
    kept: tuple[float, ...]
    untouched: tuple[int, ...]
    target: Prediction
    selector: str
    layers: tuple[str, ...]
    gamma: float
    conserve: Conserve
    method: str

    def titles(self) -> tuple[str, ...]:
        """Say each value in words, with the share of the channels where that is not the value itself."""
        return tuple(map(self._title, self.values, self.kept, self.untouched))

    def _title(self, value: float, kept: float, untouched: int) -> str:
        said = f"{self.setting} {value:g}"
        if untouched == len(self.layers):
            return f"{said}: plain, no channel passes"
        said += f": {kept:.1%} kept" if self.setting == "alpha" else ""
        # What is left as it is looks like the plain map, and should not pass for another.
        return said + (f", {untouched} of {len(self.layers)} layers plain" if untouched else "")

    def figure(self, *, columns: int = 4) -> Figure:
        """Draw the photograph, the plain map and those of the sweep, all by one scale, in lines of `columns`."""
        maps: Mapping[str, NDArray[Any]] = {
            f"{self.method.replace('_', ' ')}, plain": self.plain,
            # Half of a long title would run into the next panel.
            **{title.replace(", ", "\n"): heat for title, heat in zip(self.titles(), self.heats, strict=True)},
        }
        label = f"{self.target.category} ({self.target.probability:.0%})"
        return strip(self.picture, maps, label=label, columns=columns)


def quantile_sweep(
    classifier: Classifier,
    image: Image.Image,
    selector: Selector,
    *,
    quantiles: Iterable[float] = QUANTILES,
    target: int | None = None,
    layers: LayerChoice = "default",
    gamma: float = math.inf,
    conserve: Conserve = "independent",
    method: str = "gradient",
) -> Sweep:
    """Explain a photograph at several quantiles, the shares of the channels that are kept.

    Args:
        classifier: the network.
        image: photograph of any size and mode.
        selector: which channels matter; its own quantile is replaced.
        quantiles: in (0, 1].
        target: the class to explain; None is the predicted one.
        layers: which convolutions are edited; see `choose_layers`.
        gamma: how many times stronger than the rest the kept signal becomes, in (0, inf].
        conserve: how the layer's variance is kept.
        method: an attribution method; see `Explainer`.

    Raises:
        SettingError: if the selector has no quantile, or one is out of range or given twice, or none is given.
        ParchGradError: whatever `Explainer` raises.

    Example:
        >>> import parchgrad as pg
        >>> shapes = pg.load_model("shapes")
        >>> image = Image.new("RGB", (64, 64), "grey")
        >>> quantile_sweep(shapes, image, pg.GradientEnergy(), quantiles=(0.5, 0.1)).heats.shape
        (2, 64, 64)
    """
    edit = _Edit(layers=layers, gamma=gamma, conserve=conserve, method=method)
    values = _values("quantile", quantiles)
    selectors = [_with_quantile(selector, value) for value in values]
    return _sweep("quantile", values, selectors, classifier, image, target, edit)


def alpha_sweep(
    classifier: Classifier,
    image: Image.Image,
    selector: Selector,
    *,
    alphas: Iterable[float] = ALPHAS,
    target: int | None = None,
    layers: LayerChoice = "default",
    gamma: float = math.inf,
    conserve: Conserve = "independent",
    method: str = "gradient",
) -> Sweep:
    """Explain a photograph at several significance levels, the largest p-values of channels that are kept.

    Args:
        classifier: the network.
        image: photograph of any size and mode.
        selector: `ClassWise` or `InstanceWise`; its own quantile or alpha is replaced.
        alphas: in (0, 1).
        target: the class to explain; None is the predicted one.
        layers: which convolutions are edited; see `choose_layers`.
        gamma: how many times stronger than the rest the kept signal becomes, in (0, inf].
        conserve: how the layer's variance is kept.
        method: an attribution method; see `Explainer`.

    Raises:
        SettingError: if the selector has no alpha, or one is out of range or given twice, or none is given.
        ParchGradError: whatever `Explainer` raises.

    Example:
        >>> import parchgrad as pg
        >>> lite0, held = pg.load_model("efficientnet_lite0"), pg.ChannelStatistics.bundled("efficientnet_lite0")
        >>> selector = pg.InstanceWise(held, quantile=0.1)
        >>> found = alpha_sweep(lite0, Image.new("RGB", (64, 64)), selector, alphas=(0.1, 0.01), layers=["conv_head"])
        >>> found.kept[0] >= found.kept[1]
        True
    """
    edit = _Edit(layers=layers, gamma=gamma, conserve=conserve, method=method)
    values = _values("alpha", alphas)
    selectors = [_with_alpha(selector, value) for value in values]
    return _sweep("alpha", values, selectors, classifier, image, target, edit)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Edit:
    """Everything about an explanation but its selector."""

    layers: LayerChoice
    gamma: float
    conserve: Conserve
    method: str

    def explainer(self, model: nn.Module, selector: Selector | None) -> Explainer:
        return Explainer(
            model, selector, layers=self.layers, gamma=self.gamma, conserve=self.conserve, method=self.method
        )


def _sweep(
    setting: str,
    values: tuple[float, ...],
    selectors: Sequence[Selector],
    classifier: Classifier,
    image: Image.Image,
    target: int | None,
    edit: _Edit,
) -> Sweep:
    check_classifier(classifier)
    inputs = classifier.preprocess(image).unsqueeze(0).to(next(classifier.model.parameters()))
    plain = edit.explainer(classifier.model, None)
    index = int(plain.predict(inputs)) if target is None else target
    heats, kept, untouched = [], [], []
    for selector in selectors:
        recorder = Recorder(selector)
        explainer = edit.explainer(classifier.model, recorder)
        heats.append(_heat(explainer.attribute(inputs, index)))
        selected = [record for record in recorder.found if not record.untouched.all()]
        shares = [record.kept.float().mean() for record in selected]
        kept.append(float(torch.stack(shares).mean()) if shares else math.nan)
        # A layer that is passed several times counts as edited if it was in one of them.
        reached = {record.layer for record in recorder.found}
        untouched.append(len(reached - {record.layer for record in selected}))
    (predictions,) = classifier.predict(inputs, count=len(classifier.categories))
    return Sweep(
        setting=setting,
        values=values,
        picture=classifier.preprocess.picture(inputs[0]),
        heats=np.stack(heats),
        plain=_heat(plain.attribute(inputs, index)),
        kept=tuple(kept),
        untouched=tuple(untouched),
        target=next(prediction for prediction in predictions if prediction.index == index),
        selector=type(selectors[0]).__name__,
        layers=explainer.layers,
        gamma=edit.gamma,
        conserve=edit.conserve,
        method=edit.method,
    )


def _values(setting: str, values: Iterable[float]) -> tuple[float, ...]:
    """The values as plain numbers, each once as it is written in titles."""
    try:
        found = tuple(map(float, values))
    except (TypeError, ValueError) as error:
        raise SettingError(
            f"{setting}s is {values!r}, but it must be a list of numbers; give (0.5, 0.2, 0.1)."
        ) from error
    if not found:
        raise SettingError(f"A sweep over no {setting} at all was asked for; give one value at least.")
    written = [f"{value:g}" for value in found]
    twice = next((text for text in written if written.count(text) > 1), None)
    if twice is not None:
        raise SettingError(f"{setting} {twice} stands twice in a sweep; give each value once.")
    return found


def _heat(attribution: Tensor) -> NDArray[Any]:
    heat: NDArray[Any] = heatmap(attribution)[0].cpu().double().numpy()
    return heat


def _with_quantile(selector: Selector, quantile: float) -> Selector:
    names = _settings_of(selector)
    if "quantile" not in names:
        raise SettingError(f"{type(selector).__name__} has no quantile that could be swept; choose another selector.")
    return _replace(selector, quantile=quantile, **({"alpha": None} if "alpha" in names else {}))


def _with_alpha(selector: Selector, alpha: float) -> Selector:
    if "alpha" not in _settings_of(selector):
        raise SettingError(
            f"{type(selector).__name__} ranks without p-values and has no alpha that could be swept; choose ClassWise "
            "or InstanceWise, or sweep the quantile."
        )
    return _replace(selector, quantile=None, alpha=alpha)


def _settings_of(selector: Selector) -> set[str]:
    return {member.name for member in fields(selector)} if is_dataclass(selector) else set()


def _replace(selector: Selector, **settings: float | None) -> Selector:
    changed: Selector = replace(cast(Any, selector), **settings)
    return changed
