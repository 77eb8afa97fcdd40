"""Explain images: predictions, maps, figures and files, with every setting recorded."""

import importlib.metadata
import io
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from parchgrad._io.checks import check_kind, check_whole_number, is_number
from parchgrad._io.files import check_outputs, save_array, writing_together
from parchgrad.core.edit import Edit
from parchgrad.core.layers import LayerChoice
from parchgrad.core.selectors import Selector
from parchgrad.core.targets import integer_targets
from parchgrad.errors import InputError, ModelWarning, SettingError, warn
from parchgrad.explain.explainer import Explainer
from parchgrad.explain.heatmap import heatmap, signed_heatmap
from parchgrad.explain.scores import Contrast
from parchgrad.models.classifier import Classifier, Prediction, check_classifier, is_improbable, name_against
from parchgrad.statistics import ChannelStatistics
from parchgrad.visual import draw_box, panel, signed_panel
from parchgrad.visual.maps import COLOUR_MAP, DPI, draw_figure

__all__ = ["Explanation", "describe_explainer", "explain_images"]

UNSTABLE = 0.5
"""Below this stability, imperceptible noise changes the map."""


MANIFEST_VERSION = 3
_NOISE, _DRAWS = 0.001, 4
_PACKAGES = ("parchgrad", "torch", "torchvision", "timm", "captum", "numpy", "scipy", "matplotlib", "pillow")


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Explanation:
    """One explained image; notebooks show its figure.

    Attributes:
        name: name of the image.
        picture: the network's input as an image, (H, W, 3) in [0, 1].
        attribution: signed attribution with ParchGrad, (3, H, W).
        plain: signed attribution by the same method without ParchGrad, (3, H, W).
        target: the explained class.
        predictions: the most probable classes, best first.
        settings: every setting, ready for JSON.
        stability: mean cosine between the heat map and those of noisy copies, in [0, 1] (see `Explainer.stability`);
            NaN if the map is zero everywhere, None if it was not measured.
        against: name of the class that the explained one is compared with, `"all others"` for the rest; None if the
            class is explained alone.
        box: corners x1, y1, x2, y2 in pixels of the explained detection; None for a class of the whole image.
        caution: why the map may mislead, such as an improbable class; None if nothing is known against it.
    """

    name: str
    picture: NDArray[Any]
    attribution: Tensor
    plain: Tensor
    target: Prediction
    predictions: tuple[Prediction, ...]
    settings: Mapping[str, Any]
    stability: float | None = None
    against: str | None = None
    box: tuple[float, ...] | None = None
    caution: str | None = None

    def __repr__(self) -> str:
        measured = "" if self.stability is None else f", stability {_stability_text(self.stability)}"
        return f"Explanation({self.name}: {self.target}{measured})"

    def _repr_png_(self) -> bytes:
        """Return the figure as PNG, which notebooks show."""
        file = io.BytesIO()
        self.figure().savefig(file, format="png", dpi=100)
        return file.getvalue()

    def figure(self, *, shared_scale: bool = False, smooth: float | None = None, colormap: str = COLOUR_MAP) -> Figure:
        """Draw the image next to the plain map and the ParchGrad map.

        Args:
            shared_scale: see `panel`.
            smooth: see `panel`; None means 0.
            colormap: see `blend`.

        Raises:
            SettingError: if a setting is out of range.
        """
        return self._draw(partial(panel, colormap=colormap), heatmap, shared_scale=shared_scale, smooth=smooth or 0.0)

    def signed_figure(self, *, shared_scale: bool = False, smooth: float | None = None) -> Figure:
        """Draw the same with signed maps: positive attribution in red, negative in blue.

        Of a gradient, red means that a brighter pixel raises the score, and blue that a darker one does: a dark object
        is blue where it supports the class.

        Args:
            shared_scale: see `panel`.
            smooth: see `signed_panel`.

        Raises:
            SettingError: if `smooth` is out of range.
        """
        return self._draw(signed_panel, signed_heatmap, shared_scale=shared_scale, smooth=smooth)

    def _draw(self, draw: Callable[..., Figure], summarise: Callable[[Tensor], Tensor], **options: Any) -> Figure:
        """Draw the maps, with the box over the image and its maps."""
        plain, partitioned = summarise(torch.stack((self.plain, self.attribution))).float().cpu().numpy()
        maps = {f"plain {str(self.settings['method']).replace('_', ' ')}": [plain], "ParchGrad": [partitioned]}
        figure = draw([self.picture], maps, labels=[str(self.target)], caption=self.caption, **options)
        if self.box is not None:
            for axes in figure.axes[:3]:
                draw_box(axes, self.box)
        return figure

    @property
    def caption(self) -> str:
        """The edit in a few words, and any caution on a line of its own."""
        selector, count = self.settings["selector"], len(self.settings["layers"])
        parts = [
            None if self.against is None else f"{self.target.category} rather than {self.against}",
            f"ParchGrad with {selector['name']}",
            *(f"{name} {selector[name]:g}" for name in ("quantile", "alpha") if selector.get(name) is not None),
            f"{count} layer{'' if count == 1 else 's'}",
            None if self.stability is None else "stability " + _stability_text(self.stability),
        ]
        return "\n".join(filter(None, (", ".join(filter(None, parts)), self.caution)))

    def manifest(self) -> dict[str, Any]:
        """Settings, predictions and versions, ready for JSON."""
        stability = self.stability
        # JSON has no NaN.
        cosine = None if stability is None or math.isnan(stability) else stability
        return {
            "manifest_version": MANIFEST_VERSION,
            "image": self.name,
            "target": vars(self.target),
            "predictions": [vars(prediction) for prediction in self.predictions],
            "caution": self.caution,
            "stability": None if stability is None else {"cosine": cosine, "noise": _NOISE, "draws": _DRAWS},
            "settings": dict(self.settings),
            "versions": {
                "python": platform.python_version(),
                **{name: version for name in _PACKAGES if (version := _version(name)) is not None},
            },
        }

    @staticmethod
    def files(directory: str | Path, stem: str, form: str = "png") -> tuple[Path, Path, Path]:
        """Paths of the three files that `save` writes: panel, raw map and manifest."""
        folder = Path(directory)
        return folder / f"{stem}.{form}", folder / f"{stem}.npy", folder / f"{stem}.json"

    def save(
        self,
        directory: str | Path,
        stem: str | None = None,
        *,
        form: Literal["png", "pdf", "svg"] = "png",
        dpi: int = DPI,
        shared_scale: bool = False,
        smooth: float | None = None,
        colormap: str = COLOUR_MAP,
        force: bool = False,
    ) -> tuple[Path, Path, Path]:
        """Write the panel, the raw signed attribution (3, H, W) as .npy, and the manifest as JSON.

        Args:
            directory: folder of the files.
            stem: name of the files without suffix; None uses the image's name.
            form: format of the panel.
            dpi: resolution of the panel; see `save_figure`.
            shared_scale: see `panel`.
            smooth: see `figure`; the array is not smoothed.
            colormap: see `blend`.
            force: whether to overwrite files.

        Raises:
            OutputError: if a file exists and `force` is off, or cannot be written.
            SettingError: if a setting is out of range.
        """
        paths = self.files(directory, Path(self.name).stem if stem is None else stem, form)
        check_outputs(paths, force=force)
        text = json.dumps(self.manifest(), indent=2, allow_nan=False) + "\n"
        with writing_together(paths, force=force) as (drawn, saved, written):
            draw_figure(self.figure(shared_scale=shared_scale, smooth=smooth, colormap=colormap), drawn, dpi=dpi)
            save_array(self.attribution.cpu().numpy(), saved)
            written.write_text(text, encoding="utf-8")
        return paths


def _stability_text(stability: float) -> str:
    return "unknown (zero map)" if math.isnan(stability) else f"{stability:.2f}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def explain_images(
    classifier: Classifier,
    images: Sequence[Image.Image],
    edit: Edit = Edit(),
    *,
    target: int | str | None = None,
    against: int | Literal["runner-up", "rest"] | None = None,
    method: str = "gradient",
    method_options: Mapping[str, Any] | None = None,
    stability: bool = False,
    internal_batch_size: int = 8,
    names: Sequence[str] | None = None,
) -> list[Explanation]:
    """Explain images with ParchGrad, and without it for comparison.

    Args:
        classifier: the network.
        images: images of any size and mode.
        edit: the edit, with a selector.
        target: class to explain in every image, by index or name; None uses each image's predicted class.
        against: explain the class rather than this one; see `Contrast`.
        method: attribution method; see `Explainer`.
        method_options: options of the method.
        stability: whether to measure the stability of each map, which takes five more maps per image.
        internal_batch_size: number of rows per pass.
        names: names of the images.

    Returns:
        One explanation per image.

    Warns:
        ModelWarning: if an explained class is improbable: below 5%, or half of chance. Its map shows what the score
            depends on, and looks as sharp as that of a class in the image, even with random weights.

    Raises:
        SettingError: if `edit` has no selector, or a setting is out of range.
        ParchGradError: whatever `Explainer` raises.

    Example:
        >>> from skimage import data
        >>> import parchgrad as pg
        >>> classifier = pg.load_model("efficientnet_lite0")
        >>> (explanation,) = explain_images(classifier, [Image.fromarray(data.coffee())])
        >>> explanation.target.category, tuple(explanation.attribution.shape)
        ('espresso', (3, 224, 224))
    """
    check_classifier(classifier)
    if isinstance(target, str):
        target = classifier.find_category(target)
    _check_images(images, names)
    check_whole_number("internal_batch_size", internal_batch_size, 1)
    check_kind("`edit`", edit, Edit, "Pass one such as Edit(selector=GradientEnergy())", wanted="an Edit")
    if edit.selector is None:
        raise SettingError(
            "The selector of `edit` is None, but ParchGrad needs one. Pass Edit(selector=GradientEnergy()), for "
            "example."
        )
    remedy = "Pass the method's options by name"
    check_kind("`method_options`", method_options or {}, Mapping, remedy, wanted="a dictionary")
    options: dict[str, Any] = {
        "method": method,
        "internal_batch_size": internal_batch_size,
        **(method_options or {}),
    }
    explainer = Explainer.from_edit(classifier.model, edit, **options)
    plain = Explainer(classifier.model, None, **options)
    settings = {
        "model": classifier.name,
        "preprocessing": classifier.preprocess.description,
        "internal_batch_size": internal_batch_size,
        **describe_explainer(explainer, method),
        "target_choice": "predicted" if target is None else target,
        "against": against,
    }

    explanations = []
    for start in range(0, len(images), internal_batch_size):
        inputs = torch.stack([classifier.preprocess(image) for image in images[start : start + internal_batch_size]])
        inputs = inputs.to(next(classifier.model.parameters()))
        # Predict first, since its checks explain invalid inputs best.
        targets = explainer.predict(inputs) if target is None else integer_targets(target).expand(len(inputs))
        chosen = targets.tolist()
        parts: list[tuple[Tensor, Any]] = [(inputs, targets)]
        if against in chosen:
            raise SettingError(
                f"`against` is {against}, the class that is explained in image {start + chosen.index(against) + 1}. "
                "Pass another class, or `target`."
            )
        if against is not None:
            scores = [Contrast(target=index, against=against) for index in chosen]
            parts = list(zip(torch.split(inputs, 1), scores, strict=True))
        maps = zip(
            torch.cat([explainer.attribute(*part) for part in parts]),
            torch.cat([plain.attribute(*part) for part in parts]),
            strict=True,
        )
        stable: list[float | None] = [None] * len(inputs)
        if stability:
            stable = torch.cat([explainer.stability(*part, noise=_NOISE, draws=_DRAWS) for part in parts]).tolist()
        ranked = classifier.predict(inputs, count=len(classifier.categories))
        settings = {**settings, "layers": list(explainer.edited_layers)}
        if against is not None:
            _warn_of_unlikely(chosen, against, ranked, start)
        for row, (attribution, plain_attribution) in enumerate(maps):
            chosen_class = next(prediction for prediction in ranked[row] if prediction.index == chosen[row])
            explanations.append(
                Explanation(
                    name=names[start + row] if names else f"image {start + row + 1}",
                    picture=classifier.preprocess.picture(inputs[row]),
                    attribution=attribution,
                    plain=plain_attribution,
                    target=chosen_class,
                    predictions=ranked[row][:5],
                    settings=settings,
                    stability=stable[row],
                    against=name_against(against, chosen[row], ranked[row], classifier.categories),
                    caution=_caution(chosen_class, len(classifier.categories)),
                )
            )
    _warn_of_improbable(explanations)
    return explanations


def _caution(target: Prediction, classes: int) -> str | None:
    """Caution against the map of an improbable class."""
    if not is_improbable(target, classes):
        return None
    return (
        f"Caution: {target.category} has a probability of only {100 * target.probability:.2g}%. The map shows what its "
        "score depends on, not that it is in the image."
    )


def _warn_of_improbable(explanations: Sequence[Explanation]) -> None:
    improbable = [found for found in explanations if found.caution is not None]
    if improbable:
        named = [
            f"{found.name} ({found.target.category}, {100 * found.target.probability:.2g}%)" for found in improbable[:5]
        ]
        warn(
            f"The explained class is improbable in {', '.join(named)}{', ...' * (len(improbable) > 5)}. A map shows "
            "what the score depends on, not that the class is in the image. Check the weights and the target.",
            ModelWarning,
        )


def _warn_of_unlikely(
    targets: Sequence[int], against: int | str, ranked: Sequence[Sequence[Prediction]], start: int
) -> None:
    """Warn if a network favours the other side of a contrast, whose map then shows little."""
    for row, (target, predictions) in enumerate(zip(targets, ranked, strict=True)):
        shares = {each.index: each.probability for each in predictions}
        own = shares.pop(target)
        sides = {"runner-up": max(shares.values()), "rest": 1 - own}
        other = sides[against] if isinstance(against, str) else shares[against]
        if own < other:
            warn(
                f"In image {start + row + 1}, the network favours the other side of the contrast, so little supports "
                "the target. Explain the other class rather than this one.",
                ModelWarning,
            )


def describe_explainer(explainer: Explainer, method: str) -> dict[str, Any]:
    """Describe the method and the edit, ready for JSON."""
    settled = explainer.edit
    return {
        "method": method,
        "method_options": {name: _describe(value) for name, value in explainer.method_options.items()},
        "selector": _describe(settled.selector),
        "layers_choice": _describe_layers(settled.layers),
        # JSON has no infinity.
        "gamma": "inf" if math.isinf(settled.gamma) else float(settled.gamma),
        "conserve": settled.conserve,
        "gates": float(settled.gates or 0),
        "antialias": settled.antialias,
        "balance": settled.balance,
    }


def _check_images(images: object, names: Sequence[str] | None) -> None:
    if isinstance(images, str) or not isinstance(images, Sequence):
        raise InputError(
            f"`images` is of type {type(images).__name__}, but it must be a list of PIL images. Open files with "
            "parchgrad.data.images.read_image(path)."
        )
    if names is not None and (isinstance(names, str) or len(names) != len(images)):
        raise SettingError(f"`names` is {names!r}, but it must be a list of {len(images)} names, one per image.")


def _describe_layers(layers: LayerChoice | None) -> object:
    if is_number(layers):
        return float(layers)
    if isinstance(layers, str):
        return layers
    return [_describe(layer) for layer in cast(Sequence[object], layers)]


def _describe(value: object) -> object:
    """Convert a selector or layer choice to JSON: its class and its simple settings."""
    if isinstance(value, Selector):
        plain = (str, int, float, bool, np.generic, type(None))
        settings: dict[str, object] = {
            name: _describe(v) for name, v in vars(value).items() if isinstance(v, plain) and not name.startswith("_")
        }
        held, hidden = getattr(value, "statistics", None), ("categories", "collections")
        if isinstance(held, ChannelStatistics):
            settings["statistics"] = {name: text for name, text in held.metadata.items() if name not in hidden}
        return {"name": type(value).__name__, **settings}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (nn.Module, Tensor)):
        return type(value).__name__
    return value if isinstance(value, (str, int, float, type(None))) else repr(value)
