"""What is evaluated: anything that makes a map of each image, the controls that every claim must beat among them."""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from captum.attr import LayerAttribution, LayerGradCam
from torch import Tensor, nn

from parchgrad.attribution import Explainer, heatmap
from parchgrad.engine import plain_gradients
from parchgrad.errors import LayerError, SettingError
from parchgrad.evaluation.localisation import centre_gaussian
from parchgrad.layers import LayerChoice, find_convolutions
from parchgrad.partition import Conserve
from parchgrad.recording import DelegatingSelector
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


def grad_cam(model: nn.Module, *, layer: str | None = None, internal_batch_size: int = 32) -> Method:
    """Grad-CAM by Captum, brought to the size of the image by bilinear interpolation.

    Source: Selvaraju et al. (2017), "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization".

    Args:
        model: classifier in evaluation mode, logits (B, K).
        layer: name of a convolution; None takes the last one.
        internal_batch_size: images in one pass.

    Raises:
        LayerError: if the model has no such convolution.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> grad_cam(model)(torch.rand(2, 3, 4, 4), torch.tensor([0, 1])).shape
        torch.Size([2, 4, 4])
    """
    convolutions = find_convolutions(model)
    if layer is not None and layer not in convolutions:
        raise LayerError(f"Grad-CAM was asked for at {layer!r}, but that is no convolution of the model; name one.")
    chosen = convolutions[layer or list(convolutions)[-1]]

    def method(images: Tensor, target: Tensor) -> Tensor:
        maps = []
        with plain_gradients(model):
            for part, classes in zip(
                torch.split(images, internal_batch_size), torch.split(target, internal_batch_size), strict=True
            ):
                coarse = LayerGradCam(model, chosen).attribute(part, target=classes, relu_attributions=True)
                fine = LayerAttribution.interpolate(coarse, tuple(images.shape[2:]), "bilinear")
                maps.append(fine.detach().squeeze(1))
        return torch.cat(maps)

    return method


def make_controls(
    model: nn.Module, *, layers: LayerChoice = "default", quantile: float = 0.1, seed: int = 0
) -> dict[str, Method]:
    """Make all of the controls, by the names in `CONTROLS`.

    Args:
        model: classifier in evaluation mode, logits (B, K).
        layers: convolutions of the random channels; see `choose_layers`.
        quantile: share of the channels that are kept at random, in (0, 1].
        seed: seed of the draws.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> list(make_controls(model))
        ['gradient', 'random map', 'random channels', 'Grad-CAM', 'centre blob']
    """
    found = (
        maps_of(Explainer(model, None)),
        random_map(seed=seed),
        random_channels(model, quantile=quantile, layers=layers, seed=seed),
        grad_cam(model),
        centre_blob(),
    )
    return dict(zip(CONTROLS, found, strict=True))


def random_channels(
    model: nn.Module,
    *,
    quantile: float = 0.1,
    layers: LayerChoice = "default",
    gamma: float = math.inf,
    conserve: Conserve = "independent",
    method: str = "gradient",
    seed: int = 0,
) -> Method:
    """Channels drawn at random, anew for each image: one draw for all would be good or bad by luck.

    The draw follows from the seed and the image alone, so that a noisy image has another one.

    Args:
        model: classifier in evaluation mode, logits (B, K).
        quantile: share of the channels that are kept, in (0, 1].
        layers: which convolutions are edited; see `choose_layers`.
        gamma: see `partition_gradient`.
        conserve: see `partition_gradient`.
        method: see `Explainer`.
        seed: of the draws.

    Raises:
        ParchGradError: if a setting does not fit the model; see `Explainer`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)).eval()
        >>> random_channels(model)(torch.rand(2, 3, 4, 4), torch.tensor([0, 1])).shape
        torch.Size([2, 4, 4])
    """

    def explainer(draw: int) -> Explainer:
        selector = RandomChannels(quantile=quantile, seed=draw)
        return Explainer(model, selector, layers=layers, gamma=gamma, conserve=conserve, method=method)

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


def masks_of_another_class(
    model: nn.Module,
    selector: Selector,
    *,
    layers: LayerChoice = "default",
    gamma: float = math.inf,
    conserve: Conserve = "independent",
    distance: int | None = None,
) -> Method:
    """A control for what a selection knows of the class: the gradient of the class with the selection for another.

    Where the selection carries what tells the class, the maps are worse than by its own.

    Args:
        model: classifier in evaluation mode, logits (B, K), of two classes at least.
        selector: which channels matter, and which places.
        layers: which convolutions are edited; see `choose_layers`.
        gamma: see `partition_gradient`.
        conserve: see `partition_gradient`.
        distance: how many class indices away the other class is, cyclically; None takes half of all classes, since
            neighbours are often alike.

    Raises:
        SettingError: if a setting is out of range, or from a model of one class.
        LayerError: if the layers are not in the model.

    Example:
        >>> import parchgrad as pg
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)).eval()
        >>> method = masks_of_another_class(model, pg.GradientEnergy(quantile=0.5))
        >>> method(torch.rand(2, 3, 4, 4), torch.tensor([0, 1])).shape
        torch.Size([2, 4, 4])
    """
    edit = _Edit(model=model, layers=layers, gamma=gamma, conserve=conserve)
    edit.explainer(selector)  # Checks the settings before the first image.

    def method(images: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            classes = model(images[:1]).shape[1]
        if classes < 2:
            raise SettingError(
                "The model has one class, so that there is no other whose masks could be taken; choose a model of "
                "several."
            )
        step = classes // 2 if distance is None else distance
        foreign = edit.record(selector, images, (target + step) % classes)
        return edit.replay(selector, foreign, images, target)

    return method


def shuffled_masks(
    model: nn.Module,
    selector: Selector,
    *,
    layers: LayerChoice = "default",
    gamma: float = math.inf,
    conserve: Conserve = "independent",
    seed: int = 0,
) -> Method:
    """A control for how many channels are kept: as many in each row and layer as the selector keeps, at random.

    The draw follows from the seed and the image alone, so that a noisy image has another one. What a selector does to
    places stays as it is.

    Args:
        model: classifier in evaluation mode, logits (B, K).
        selector: how many channels.
        layers: which convolutions are edited; see `choose_layers`.
        gamma: see `partition_gradient`.
        conserve: see `partition_gradient`.
        seed: of the random masks.

    Raises:
        SettingError: if a setting is out of range.
        LayerError: if the layers are not in the model.

    Example:
        >>> import parchgrad as pg
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)).eval()
        >>> method = shuffled_masks(model, pg.GradientEnergy(quantile=0.5))
        >>> method(torch.rand(2, 3, 4, 4), torch.tensor([0, 1])).shape
        torch.Size([2, 4, 4])
    """
    edit = _Edit(model=model, layers=layers, gamma=gamma, conserve=conserve)
    edit.explainer(selector)  # Checks the settings before the first image.

    def method(images: Tensor, target: Tensor) -> Tensor:
        own = edit.record(selector, images, target)
        generators = [_generator_of(image, seed) for image in images]
        shuffled = [
            (layer, replace(found, channel_mask=_shuffle_rows(found.channel_mask, generators))) for layer, found in own
        ]
        return edit.replay(selector, shuffled, images, target)

    return method


@dataclass(frozen=True, eq=False, kw_only=True)
class _Edit:
    """Everything about a partitioned gradient but its selector."""

    model: nn.Module
    layers: LayerChoice
    gamma: float
    conserve: Conserve

    def explainer(self, selector: Selector) -> Explainer:
        return Explainer(
            self.model,
            selector,
            layers=self.layers,
            gamma=self.gamma,
            conserve=self.conserve,
            # Selections are had, and given, for all rows of a pass.
            internal_batch_size=None,
        )

    def record(self, selector: Selector, images: Tensor, target: Tensor) -> list[tuple[str, Selection]]:
        """What is selected in each layer, in the order of the backward pass."""
        listener = _Listener(selector)
        self.explainer(listener).attribute(images, target)
        return listener.found

    def replay(
        self, selector: Selector, found: Sequence[tuple[str, Selection]], images: Tensor, target: Tensor
    ) -> Tensor:
        """The maps by what was selected in another pass."""
        return heatmap(self.explainer(_Replayer(selector, found)).attribute(images, target))


class _Listener(DelegatingSelector):
    """Notes what is selected; the norms that a `Recorder` takes beside are of no use here."""

    def __init__(self, selector: Selector) -> None:
        super().__init__(selector)
        self.found: list[tuple[str, Selection]] = []

    def partition(self, signal: LayerSignal) -> Selection:
        selection = super().partition(signal)
        self.found.append((signal.layer, selection))
        return selection


class _Replayer(DelegatingSelector):
    """Gives what was selected in another pass, of a convolution that was called twice one after the other."""

    def __init__(self, selector: Selector, found: Sequence[tuple[str, Selection]]) -> None:
        super().__init__(selector)
        self._given = list(found)

    def partition(self, signal: LayerSignal) -> Selection:
        place = next(place for place, (layer, _) in enumerate(self._given) if layer == signal.layer)
        return self._given.pop(place)[1]


def _generator_of(image: Tensor, seed: int) -> torch.Generator:
    """Random numbers that follow from the seed and the image alone."""
    content = image.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return torch.Generator().manual_seed(zlib.crc32(content, seed))


def _shuffle_rows(mask: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Move the kept channels of each row of (B, C) to places drawn from a generator of its own."""
    places = torch.stack([torch.randperm(mask.shape[1], generator=generator) for generator in generators])
    return mask.gather(1, places.to(mask.device))
