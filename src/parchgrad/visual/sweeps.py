"""Sweeps: one image explained at several values of one setting."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from parchgrad._io.checks import check_kind
from parchgrad.core.edit import Edit
from parchgrad.core.selectors import Selector
from parchgrad.errors import SettingError
from parchgrad.explain.explainer import Explainer
from parchgrad.explain.heatmap import heatmap
from parchgrad.explain.recording import Recorder
from parchgrad.explain.scores import Contrast
from parchgrad.models.classifier import Classifier, Prediction, check_classifier, label_of, name_against
from parchgrad.statistics import RankedLayerStatistics
from parchgrad.statistics.selectors import ClassWise
from parchgrad.visual.maps import COLOUR_MAP, strip

__all__ = ["ALPHAS", "QUANTILES", "Sweep", "alpha_sweep", "quantile_sweep"]

QUANTILES = (0.7, 0.5, 0.3, 0.2, 0.1, 0.05)
"""Default quantiles, from many channels to few."""
ALPHAS = (0.1, 0.05, 0.01, 1e-3, 1e-4, 1e-6)
"""Default significance levels, from weak evidence to strong; a layer without passing channels stays unedited."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Sweep:
    """One image explained at several values of one setting.

    Attributes:
        setting: `"quantile"` or `"alpha"`.
        values: the values, in the order of the maps.
        picture: the network's input as an image, (H, W, 3) in [0, 1].
        heats: heat map at each value, (V, H, W).
        plain: heat map of the same method without ParchGrad, (H, W).
        kept: mean weight of a channel over the edited layers, at each value, in [0, 1]; a channel without a gradient
            counts as 0. NaN where no layer was edited.
        untouched: number of unedited layers, whose channels all weigh the same, at each value.
        target: the explained class.
        against: name of the class that it is compared with; None if it is explained alone.
        edit: the edit with all defaults resolved, and the selector of the first value.
        layers: names of the edited layers.
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
    against: str | None = None
    edit: Edit
    layers: tuple[str, ...]
    method: str

    @property
    def label(self) -> str:
        """The explained class, and the class that it is compared with."""
        return label_of(self.target, self.against)

    def titles(self) -> tuple[str, ...]:
        """Title each value, with the mean weight (for alpha) and the number of unedited layers."""
        return tuple(map(self._title, self.values, self.kept, self.untouched))

    def _title(self, value: float, kept: float, untouched: int) -> str:
        said = f"{self.setting} {value:g}"
        if untouched == len(self.layers):
            return f"{said}: plain, no channel passes"
        said += f": mean weight {kept:.1%}" if self.setting == "alpha" else ""
        # Unedited layers make the map look plain, so the title mentions them.
        return said + (f", {untouched} of {len(self.layers)} layers plain" if untouched else "")

    @property
    def plain_title(self) -> str:
        """Title of the plain map."""
        return f"plain {self.method.replace('_', ' ')}"

    def figure(
        self, *, columns: int = 4, shared_scale: bool = False, smooth: float = 0.0, colormap: str = COLOUR_MAP
    ) -> Figure:
        """Draw the image, the plain map and the maps of the sweep in rows of `columns`.

        Args:
            columns: number of pictures per row, at least 1.
            shared_scale: see `panel`.
            smooth: see `panel`.
            colormap: see `blend`.

        Raises:
            SettingError: if a setting is out of range.
        """
        count = len(self.layers)
        return strip(
            self.picture,
            {self.plain_title: self.plain, **dict(zip(self.titles(), self.heats, strict=True))},
            label=self.label,
            columns=columns,
            shared_scale=shared_scale,
            smooth=smooth,
            colormap=colormap,
            caption=f"{type(self.edit.selector).__name__} on {count} layer{'' if count == 1 else 's'}",
        )


def quantile_sweep(
    classifier: Classifier,
    image: Image.Image,
    edit: Edit = Edit(),
    *,
    quantiles: Iterable[float] | None = None,
    target: int | Contrast | None = None,
    method: str = "gradient",
) -> Sweep:
    """Explain an image at several quantiles: shares of the channels at or above the threshold.

    Args:
        classifier: the network.
        image: image of any size and mode.
        edit: the edit; its selector's quantile is replaced.
        quantiles: quantiles, in (0, 1]; None uses those of `QUANTILES` that the selector can apply, since compact
            statistics rank only some channels.
        target: class to explain, alone or as a `Contrast`; None uses the predicted one.
        method: attribution method; see `Explainer`.

    Raises:
        SettingError: if the selector has no quantile, or `quantiles` is empty, out of range or has duplicates.
        ParchGradError: whatever `Explainer` raises.

    Example:
        >>> import parchgrad as pg
        >>> shapes = pg.load_model("shapes")
        >>> quantile_sweep(shapes, Image.new("RGB", (64, 64), "grey"), quantiles=(0.5, 0.1)).heats.shape
        (2, 64, 64)
    """
    if quantiles is None:
        quantiles = [value for value in QUANTILES if value <= _share_ranked(edit)]
    values = _values("quantile", quantiles)
    return _sweep("quantile", values, _with_quantile, classifier, image, edit, target=target, method=method)


def _share_ranked(edit: Edit) -> float:
    """Share of the channels whose rank for each class is known."""
    if not isinstance(edit, Edit) or not isinstance(edit.selector, ClassWise):
        return 1.0
    held = edit.selector.statistics.values()
    return min((layer.share for layer in held if isinstance(layer, RankedLayerStatistics)), default=1.0)


def alpha_sweep(
    classifier: Classifier,
    image: Image.Image,
    edit: Edit,
    *,
    alphas: Iterable[float] = ALPHAS,
    target: int | None = None,
    method: str = "gradient",
) -> Sweep:
    """Explain an image at several significance levels: p-values at the threshold.

    Args:
        classifier: the network.
        image: image of any size and mode.
        edit: the edit, with `ClassWise` or `InstanceWise`; the selector's quantile or alpha is replaced.
        alphas: significance levels, in (0, 1).
        target: class to explain; None uses the predicted one.
        method: attribution method; see `Explainer`.

    Raises:
        SettingError: if the selector has no alpha, or `alphas` is empty, out of range or has duplicates.
        ParchGradError: whatever `Explainer` raises.

    Example:
        >>> import parchgrad as pg
        >>> lite0, held = pg.load_model("efficientnet_lite0"), pg.ChannelStatistics.bundled("efficientnet_lite0")
        >>> edit = Edit(selector=pg.InstanceWise(held, quantile=0.1), layers=["conv_head"])
        >>> found = alpha_sweep(lite0, Image.new("RGB", (64, 64)), edit, alphas=(0.1, 0.01))
        >>> found.kept[0] >= found.kept[1]
        True
    """
    values = _values("alpha", alphas)
    return _sweep("alpha", values, _with_alpha, classifier, image, edit, target=target, method=method)


def _sweep(
    setting: str,
    values: tuple[float, ...],
    vary: Callable[[Selector | None, float], Selector],
    classifier: Classifier,
    image: Image.Image,
    edit: Edit,
    *,
    target: int | Contrast | None,
    method: str,
) -> Sweep:
    check_classifier(classifier)
    check_kind("`edit`", edit, Edit, "Pass one such as Edit(selector=GradientEnergy())", wanted="an Edit")
    selectors = [vary(edit.selector, value) for value in values]
    # Resolve the defaults once: they might depend on the value.
    first = Explainer.from_edit(classifier.model, replace(edit, selector=selectors[0]), method=method)
    inputs = classifier.preprocess(image).unsqueeze(0).to(next(classifier.model.parameters()))
    plain = Explainer(classifier.model, None, method=method)
    score = int(plain.predict(inputs)) if target is None else target
    index, against = (score.target, score.against) if isinstance(score, Contrast) else (score, None)
    heats, kept, untouched = [], [], []
    for selector in selectors:
        recorder = Recorder(selector)
        explainer = Explainer.from_edit(classifier.model, replace(first.edit, selector=recorder), method=method)
        heats.append(_heat(explainer.attribute(inputs, score)))
        selected = [record for record in recorder.found if not record.untouched.all()]
        shares = [(record.selection.channel_weights * (record.channel_norms > 0)).float().mean() for record in selected]
        kept.append(float(torch.stack(shares).mean()) if shares else math.nan)
        # A layer that is called several times counts as edited if one call was.
        reached = {record.layer for record in recorder.found}
        untouched.append(len(reached - {record.layer for record in selected}))
    (predictions,) = classifier.predict(inputs, count=len(classifier.categories))
    return Sweep(
        setting=setting,
        values=values,
        picture=classifier.preprocess.picture(inputs[0]),
        heats=np.stack(heats),
        plain=_heat(plain.attribute(inputs, score)),
        kept=tuple(kept),
        untouched=tuple(untouched),
        target=next(prediction for prediction in predictions if prediction.index == index),
        against=name_against(against, index, predictions, classifier.categories),
        edit=first.edit,
        layers=explainer.edited_layers,
        method=method,
    )


def _values(setting: str, values: Iterable[float]) -> tuple[float, ...]:
    """Check the values, which must differ as written in titles."""
    try:
        found = tuple(map(float, values))
    except (TypeError, ValueError) as error:
        raise SettingError(
            f"`{setting}s` is {values!r}, but it must be a list of numbers. Pass (0.5, 0.2, 0.1), for example."
        ) from error
    if not found:
        raise SettingError(f"`{setting}s` is empty. Pass at least one value.")
    written = [f"{value:g}" for value in found]
    twice = next((text for text in written if written.count(text) > 1), None)
    if twice is not None:
        raise SettingError(f"`{setting}s` contains {twice} twice. Pass each value once.")
    return found


def _heat(attribution: Tensor) -> NDArray[Any]:
    heat: NDArray[Any] = heatmap(attribution)[0].cpu().double().numpy()
    return heat


def _with_quantile(selector: Selector | None, quantile: float) -> Selector:
    names = _settings_of(selector)
    if "quantile" not in names:
        raise SettingError(f"{_name_of(selector)} has no quantile to sweep. Choose another selector.")
    return _replace(selector, quantile=quantile, **({"alpha": None} if "alpha" in names else {}))


def _with_alpha(selector: Selector | None, alpha: float) -> Selector:
    if "alpha" not in _settings_of(selector):
        raise SettingError(
            f"{_name_of(selector)} ranks without p-values and has no alpha to sweep. Choose ClassWise or InstanceWise, "
            "or sweep the quantile."
        )
    return _replace(selector, quantile=None, alpha=alpha)


def _name_of(selector: Selector | None) -> str:
    return "An edit without a selector" if selector is None else type(selector).__name__


def _settings_of(selector: Selector | None) -> set[str]:
    return {member.name for member in fields(selector)} if is_dataclass(selector) else set()


def _replace(selector: Selector | None, **settings: float | None) -> Selector:
    changed: Selector = replace(cast(Any, selector), **settings)
    return changed
