"""What is evaluated: anything that makes a map of each image, the controls that every claim must beat among them."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from captum.attr import LayerAttribution, LayerGradCam
from torch import Tensor, nn

from parchgrad.attribution import Explainer, heatmap
from parchgrad.edit import Edit
from parchgrad.engine import ParchGrad
from parchgrad.errors import LayerError, SettingError
from parchgrad.evaluation.localisation import centre_gaussian
from parchgrad.layers import find_convolutions
from parchgrad.recording import DelegatingSelector, RecordedSelection, record_selections
from parchgrad.selection import LayerSignal, RandomChannels, Selection, Selector

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
"""Images (B, C, H, W) and the class to explain of each (B,) in, non-negative maps (B, H, W) out."""

CONTROLS = ("gradient", "random map", "random channels", "Grad-CAM", "centre blob")
"""Names of the controls, the plain gradient first."""


def maps_of(explainer: Explainer) -> Method:
    """Heat maps of an explainer: magnitudes averaged over colours.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> maps_of(Explainer(model, None))(torch.rand(2, 3, 4, 4), torch.tensor([0, 1])).shape
        torch.Size([2, 4, 4])
    """

    def method(images: Tensor, target: Tensor) -> Tensor:
        return heatmap(explainer.attribute(images, target))

    return method


def random_map(*, seed: int = 0) -> Method:
    """Noise, uniform in [0, 1): what any map must beat.

    Each image has a map of its own, which follows from the seed and the image alone.

    Example:
        >>> images = torch.rand(2, 3, 4, 4)
        >>> method, target = random_map(seed=1), torch.tensor([0, 1])
        >>> bool((method(images, target)[1:] == method(images[1:], target[1:])).all())
        True
    """

    def method(images: Tensor, target: Tensor) -> Tensor:
        maps = [torch.rand(images.shape[2:], generator=_generator_of(image, seed)) for image in images]
        return torch.stack(maps).to(images)

    return method


def centre_blob(*, sigma: float = 0.25) -> Method:
    """A Gaussian about the centre, the same for every image: objects tend to stand there.

    Args:
        sigma: standard deviation, as a share of height and of width.

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
    internal_batch_size: int = 32,
) -> Method:
    """Make Grad-CAM maps with Captum, resized to the image by bilinear interpolation.

    Source: Selvaraju et al. (2017), "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization".

    Args:
        model: classifier in evaluation mode, logits (B, K).
        layer: name of a convolution; None takes the last one.
        gates: width of the soft gates of every rectifier; see `soft_gate`. 0 is the published method.
        antialias: whether gradients at the input of strided operations are smoothed; see `smooth_strides`.
        internal_batch_size: images in one pass.

    Raises:
        LayerError: if the model has no such convolution.
        SettingError: if `gates` or `antialias` is out of range.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> grad_cam(model)(torch.rand(2, 3, 4, 4), torch.tensor([0, 1])).shape
        torch.Size([2, 4, 4])
    """
    convolutions = find_convolutions(model)
    if layer is not None and layer not in convolutions:
        raise LayerError(f"Grad-CAM was asked for at {layer!r}, but that is no convolution of the model; name one.")
    chosen = convolutions[layer or list(convolutions)[-1]]
    # Also keeps blocks around it out of these gradients.
    rules = ParchGrad(model, None, gates=gates, antialias=antialias)

    def method(images: Tensor, target: Tensor) -> Tensor:
        maps = []
        with rules:
            for part, classes in zip(
                torch.split(images, internal_batch_size), torch.split(target, internal_batch_size), strict=True
            ):
                coarse = LayerGradCam(model, chosen).attribute(part, target=classes, relu_attributions=True)
                fine = LayerAttribution.interpolate(coarse, tuple(images.shape[2:]), "bilinear")
                maps.append(fine.detach().squeeze(1))
        return torch.cat(maps)

    return method


def make_controls(model: nn.Module, *, edit: Edit = Edit(), quantile: float = 0.1, seed: int = 0) -> dict[str, Method]:
    """Make all controls of an edit, by the names in `CONTROLS`.

    Args:
        model: classifier in evaluation mode, logits (B, K).
        edit: the edit; its settings hold for the random channels too, and the other controls are plain.
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
    """Replace an edit's selector by channels drawn at random for each image, a control for which channels it keeps.

    One draw for all images would be good or bad by luck. It follows from the seed and the image alone, so that a noisy
    image gets another one.

    Args:
        model: classifier in evaluation mode, logits (B, K).
        quantile: share of the channels that are kept, in (0, 1].
        edit: the edit; what suits its selector is kept.
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
        # One by one, since a method may expand an image into many rows, all of one draw.
        draws = [_generator_of(image, seed).initial_seed() for image in images]
        return torch.cat(
            [
                heatmap(explainer(draw).attribute(images[place : place + 1], target[place : place + 1]))
                for place, draw in enumerate(draws)
            ]
        )

    return explain


def masks_of_another_class(model: nn.Module, edit: Edit, *, distance: int | None = None) -> Method:
    """Edit the gradient of a class with the selection for another class, a control for what a selection knows.

    If the selection depends on the class, these maps are worse than those with its own.

    Args:
        model: classifier in evaluation mode, logits (B, K), with two classes or more.
        edit: the edit, with a selector.
        distance: how many class indices away the other class is, cyclically; None takes half of all classes, since
            neighbours are often alike.

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
            classes = model(images[:1]).shape[1]
        if classes < 2:
            raise SettingError("The model has one class, so there is no other class to take masks of. Use two or more.")
        step = classes // 2 if distance is None else distance
        foreign = record_selections(model, edit, images, (target + step) % classes)
        return _replay(model, edit, foreign, images, target)

    return method


def shuffled_masks(model: nn.Module, edit: Edit, *, seed: int = 0) -> Method:
    """Permute the channel weights of each row, a control for how many channels an edit keeps.

    The permutation follows from the seed and the image alone, so that a noisy image gets another one. The weights of
    places stay as they are.

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
        raise SettingError("`edit` has no selector, so there are no masks to replace. Give one such as pg.Evidence().")
    return edit.selector


def _explainer(model: nn.Module, edit: Edit, selector: Selector) -> Explainer:
    # Selections are recorded, and replayed, for all rows of a pass.
    return Explainer.from_edit(model, replace(edit, selector=selector), internal_batch_size=None)


def _replay(model: nn.Module, edit: Edit, found: Sequence[RecordedSelection], images: Tensor, target: Tensor) -> Tensor:
    """The maps by what was selected in another pass."""
    return heatmap(_explainer(model, edit, _Replayer(_selector_of(edit), found)).attribute(images, target))


class _Replayer(DelegatingSelector):
    """Selects what was selected in another pass; a convolution that is called twice has two selections."""

    def __init__(self, selector: Selector, found: Sequence[RecordedSelection]) -> None:
        super().__init__(selector)
        self._given = list(found)

    def select(self, signal: LayerSignal) -> Selection:
        place = next(place for place, record in enumerate(self._given) if record.layer == signal.layer)
        return self._given.pop(place).selection


def _generator_of(image: Tensor, seed: int) -> torch.Generator:
    """Random numbers that follow from the seed and the image alone."""
    content = image.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return torch.Generator().manual_seed(zlib.crc32(content, seed))


def _shuffle_rows(weights: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Permute each row of (B, C) by a generator of its own."""
    places = torch.stack([torch.randperm(weights.shape[1], generator=generator) for generator in generators])
    return weights.gather(1, places.to(weights.device))
