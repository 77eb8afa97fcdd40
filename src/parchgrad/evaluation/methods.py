"""Methods that evaluations compare, including the controls that every claim must beat."""

import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from parchgrad.core.edit import Edit
from parchgrad.core.engine import ParchGrad
from parchgrad.core.layers import find_convolutions
from parchgrad.core.selectors import LayerSignal, RandomChannels, Selection, Selector
from parchgrad.core.targets import find_logits
from parchgrad.errors import LayerError, SettingError
from parchgrad.evaluation.localisation import centre_gaussian
from parchgrad.explain.explainer import Explainer
from parchgrad.explain.heatmap import heatmap
from parchgrad.explain.outputs import Logits, Score
from parchgrad.explain.recording import DelegatingSelector, RecordedSelection, record_selections

__all__ = [
    "CONTROLS",
    "Method",
    "centre_blob",
    "grad_cam",
    "make_controls",
    "maps_of",
    "masks_of_another_class",
    "random_channels",
    "random_map",
    "shuffled_masks",
]

Method = Callable[[Tensor, Tensor], Tensor]
"""Maps images (B, C, H, W) and the class to explain in each (B,) to non-negative maps (B, H, W)."""

CONTROLS = ("gradient", "random map", "random channels", "Grad-CAM", "centre blob")
"""Names of the controls, the plain gradient first."""


def maps_of(explainer: Explainer, score: Callable[[int], Score] | None = None) -> Method:
    """Method that returns an explainer's heat maps: magnitudes averaged over colours.

    Args:
        explainer: the explainer.
        score: makes the score to explain from the class of an image, such as
            `lambda target: Contrast(target=target, against="runner-up")`; None explains the class's logit.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> maps_of(Explainer(model, None))(torch.rand(2, 3, 4, 4), torch.tensor([0, 1])).shape
        torch.Size([2, 4, 4])
    """

    def method(images: Tensor, target: Tensor) -> Tensor:
        if score is None:
            return heatmap(explainer.attribute(images, target))
        return heatmap(torch.stack(explainer.attribute(list(images), [score(index) for index in target.tolist()])))

    return method


def random_map(*, seed: int = 0) -> Method:
    """Uniform noise in [0, 1), which any map must beat.

    Each image has its own map, which depends only on the seed and the image.

    Example:
        >>> images = torch.rand(2, 3, 4, 4)
        >>> method, target = random_map(seed=1), torch.tensor([0, 1])
        >>> bool((method(images, target)[1:] == method(images[1:], target[1:])).all())
        True
    """

    def method(images: Tensor, target: Tensor) -> Tensor:
        maps = [torch.rand(images.shape[2:], generator=_generator_of(image, seed), device="cpu") for image in images]
        return torch.stack(maps).to(images)

    return method


def centre_blob(*, sigma: float = 0.25) -> Method:
    """A centred Gaussian for every image, since objects tend to be in the centre.

    Args:
        sigma: standard deviation, as a share of height and width.

    Example:
        >>> centre_blob()(torch.zeros(1, 3, 1, 3), torch.tensor([0]))
        tensor([[[0.4111, 1.0000, 0.4111]]])
    """

    def method(images: Tensor, target: Tensor) -> Tensor:
        height, width = images.shape[2:]
        return centre_gaussian(height, width, sigma=sigma).to(images).expand(len(images), height, width)

    return method


def grad_cam(
    model: nn.Module,
    *,
    layer: str | None = None,
    gates: float = 0.0,
    antialias: bool = False,
    balance: bool = False,
    score: Callable[[int], Score] | None = None,
    internal_batch_size: int = 32,
) -> Method:
    """Make Grad-CAM maps, resized to the image by bilinear interpolation.

    Source: Selvaraju et al. (2017), "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization".

    Args:
        model: classifier in evaluation mode, logits (B, K).
        layer: name of a convolution; None uses the last one that the score depends on.
        gates: width of the soft gates of every rectifier; see `soft_gate`. 0 is the published method.
        antialias: whether to smooth gradients at the input of strided operations; see `smooth_strides`.
        balance: whether to hold constant what makes operations nonlinear; see `Balance`.
        score: makes the score to explain from the class of an image; see `maps_of`. None explains the class's logit.
        internal_batch_size: number of images per pass.

    Raises:
        LayerError: if `layer` is not a convolution of the model, or the score depends on none.
        SettingError: if `gates`, `antialias` or `balance` is out of range.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> grad_cam(model)(torch.rand(2, 3, 4, 4), torch.tensor([0, 1])).shape
        torch.Size([2, 4, 4])
    """
    convolutions = find_convolutions(model)
    if layer is not None and layer not in convolutions:
        raise LayerError(f"`layer` is {layer!r}, but Grad-CAM needs a convolution. Pass one of the model's.")
    candidates = list(reversed(convolutions.values())) if layer is None else [convolutions[layer]]
    # Also shields these gradients from enclosing ParchGrad blocks.
    rules = ParchGrad(model, None, gates=gates, antialias=antialias, balance=balance)

    def coarse_maps(images: Tensor, target: Tensor) -> Tensor:
        for candidate in candidates:
            features, output = _features_and_output(model, candidate, images)
            logits = find_logits(output)
            if score is None:
                scores = logits.gather(1, target.unsqueeze(1))
            else:
                scores = torch.cat([score(index)(logits[row : row + 1]) for row, index in enumerate(target.tolist())])
            # A convolution may be registered and not be used, or only for another output.
            gradient = None
            if features is not None:
                (gradient,) = torch.autograd.grad(scores.sum(), features, allow_unused=True)
            if features is not None and gradient is not None:
                weights = gradient.mean(dim=tuple(range(2, gradient.dim())), keepdim=True)
                return (weights * features.detach()).sum(dim=1, keepdim=True).relu()
        raise LayerError("Grad-CAM needs a convolution that the score depends on. Pass another `layer`.")

    def method(images: Tensor, target: Tensor) -> Tensor:
        maps = []
        with rules, torch.enable_grad():
            for part, classes in zip(
                torch.split(images, internal_batch_size), torch.split(target, internal_batch_size), strict=True
            ):
                coarse = coarse_maps(part, classes)
                maps.append(functional.interpolate(coarse, tuple(images.shape[2:]), mode="bilinear").squeeze(1))
        return torch.cat(maps)

    return method


def _features_and_output(model: nn.Module, layer: nn.Module, images: Tensor) -> tuple[Tensor | None, Any]:
    """Output of a layer, None if it is not called, and of the model, which other threads may use meanwhile."""
    thread = threading.get_ident()
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if threading.get_ident() != thread:
            return None
        found.append(output)
        # A rectifier in place must not change what was kept.
        return output.clone()

    hook = layer.register_forward_hook(keep)
    try:
        # A model with frozen weights has a gradient only if its input has one.
        output = model(images.detach().requires_grad_())
    finally:
        hook.remove()
    return found[-1] if found else None, output


def make_controls(model: nn.Module, *, edit: Edit = Edit(), quantile: float = 0.1, seed: int = 0) -> dict[str, Method]:
    """Make all controls for an edit, by the names in `CONTROLS`.

    Args:
        model: classifier in evaluation mode, logits (B, K).
        edit: the edit; its settings apply to the random channels, and the other controls are plain.
        quantile: share of the channels that are kept at random, in (0, 1].
        seed: random seed.

    Raises:
        SettingError: if `edit` has no selector.
        ParchGradError: if a setting does not fit the model; see `Explainer`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> list(make_controls(model))
        ['gradient', 'random map', 'random channels', 'Grad-CAM', 'centre blob']
    """
    found = (
        maps_of(Explainer(model, None)),
        random_map(seed=seed),
        random_channels(model, quantile=quantile, edit=edit, seed=seed),
        grad_cam(model),
        centre_blob(),
    )
    return dict(zip(CONTROLS, found, strict=True))


def random_channels(
    model: nn.Module,
    *,
    quantile: float = 0.1,
    edit: Edit = Edit(),
    method: str = "gradient",
    seed: int = 0,
) -> Method:
    """Replace an edit's selector by random channels for each image, a control for which channels it keeps.

    The channels depend only on the seed and the image, so a noisy copy gets different ones.

    Args:
        model: classifier in evaluation mode, logits (B, K).
        quantile: share of the channels that are kept, in (0, 1].
        edit: the edit; the defaults of its own selector still apply.
        method: see `Explainer`.
        seed: random seed.

    Raises:
        SettingError: if `edit` has no selector.
        ParchGradError: if a setting does not fit the model; see `Explainer`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)).eval()
        >>> random_channels(model)(torch.rand(2, 3, 4, 4), torch.tensor([0, 1])).shape
        torch.Size([2, 4, 4])
    """
    _selector_of(edit)
    settled = edit.resolved()

    def explainer(draw: int) -> Explainer:
        drawn = replace(settled, selector=RandomChannels(quantile=quantile, seed=draw))
        return Explainer.from_edit(model, drawn, method=method)

    explainer(seed)  # Checks the settings before the first image.

    def explain(images: Tensor, target: Tensor) -> Tensor:
        # One by one, since a method may expand an image into many rows, which must all share its channels.
        draws = [_generator_of(image, seed).initial_seed() for image in images]
        return torch.cat(
            [
                heatmap(explainer(draw).attribute(images[place : place + 1], target[place : place + 1]))
                for place, draw in enumerate(draws)
            ]
        )

    return explain


def masks_of_another_class(model: nn.Module, edit: Edit, *, distance: int | None = None) -> Method:
    """Edit the gradient of a class with the selection for another class, a control for class dependence.

    If the selection depends on the class, these maps are worse than those with the right selection.

    Args:
        model: classifier in evaluation mode, logits (B, K), with two classes or more.
        edit: the edit, with a selector.
        distance: cyclic distance between the class indices; None uses half the number of classes, since neighbours are
            often similar.

    Raises:
        SettingError: if `edit` has no selector, a setting is out of range, or the model has one class.
        LayerError: if the layers are not in the model.

    Example:
        >>> import parchgrad as pg
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)).eval()
        >>> method = masks_of_another_class(model, Edit(selector=pg.GradientEnergy(quantile=0.5)))
        >>> method(torch.rand(2, 3, 4, 4), torch.tensor([0, 1])).shape
        torch.Size([2, 4, 4])
    """
    _explainer(model, edit, _selector_of(edit))  # Checks the settings before the first image.

    def method(images: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            classes = Logits(model, None)(images[:1]).shape[1]
        if classes < 2:
            raise SettingError("Masks of another class need a model with at least two classes, but this one has one.")
        step = classes // 2 if distance is None else distance
        foreign = record_selections(model, edit, images, (target + step) % classes)
        return _replay(model, edit, foreign, images, target)

    return method


def shuffled_masks(model: nn.Module, edit: Edit, *, seed: int = 0) -> Method:
    """Permute the channel weights of each row, a control for how many channels an edit keeps.

    The permutation depends only on the seed and the image, so a noisy copy gets a different one. Spatial weights stay
    the same.

    Args:
        model: classifier in evaluation mode, logits (B, K).
        edit: the edit, with a selector.
        seed: random seed.

    Raises:
        SettingError: if `edit` has no selector, or a setting is out of range.
        LayerError: if the layers are not in the model.

    Example:
        >>> import parchgrad as pg
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)).eval()
        >>> method = shuffled_masks(model, Edit(selector=pg.GradientEnergy(quantile=0.5)))
        >>> method(torch.rand(2, 3, 4, 4), torch.tensor([0, 1])).shape
        torch.Size([2, 4, 4])
    """
    _explainer(model, edit, _selector_of(edit))  # Checks the settings before the first image.

    def method(images: Tensor, target: Tensor) -> Tensor:
        generators = [_generator_of(image, seed) for image in images]
        shuffled = record_selections(model, edit, images, target)
        for place, record in enumerate(shuffled):
            weights = _shuffle_rows(record.selection.channel_weights, generators)
            shuffled[place] = replace(record, selection=replace(record.selection, channel_weights=weights))
        return _replay(model, edit, shuffled, images, target)

    return method


def _selector_of(edit: Edit) -> Selector:
    if edit.selector is None:
        raise SettingError("`edit` has no selector, so there are no masks to replace. Pass Edit(selector=Evidence()).")
    return edit.selector


def _explainer(model: nn.Module, edit: Edit, selector: Selector) -> Explainer:
    # Selections are recorded, and replayed, for all rows of a pass.
    return Explainer.from_edit(model, replace(edit, selector=selector), internal_batch_size=None)


def _replay(model: nn.Module, edit: Edit, found: Sequence[RecordedSelection], images: Tensor, target: Tensor) -> Tensor:
    """Make maps with selections recorded in another pass."""
    return heatmap(_explainer(model, edit, _Replayer(_selector_of(edit), found)).attribute(images, target))


class _Replayer(DelegatingSelector):
    """Replays selections from another pass; a convolution that is called twice has two."""

    def __init__(self, selector: Selector, found: Sequence[RecordedSelection]) -> None:
        super().__init__(selector)
        self._given = list(found)

    def select(self, signal: LayerSignal) -> Selection:
        place = next(place for place, record in enumerate(self._given) if record.layer == signal.layer)
        return self._given.pop(place).selection


def _generator_of(image: Tensor, seed: int) -> torch.Generator:
    """Random generator that depends only on the seed and the image."""
    content = image.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return torch.Generator().manual_seed(zlib.crc32(content, seed))


def _shuffle_rows(weights: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Permute each row of (B, C) with its own generator."""
    places = torch.stack(
        [torch.randperm(weights.shape[1], generator=generator, device="cpu") for generator in generators]
    )
    return weights.gather(1, places.to(weights.device))
