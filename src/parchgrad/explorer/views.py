"""Explain images under changing settings: maps, scores, and a script that reproduces them.

The web page only displays what this module computes.
"""

import functools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from parchgrad.core.edit import Edit
from parchgrad.core.layers import Convolution
from parchgrad.core.selectors import Selector
from parchgrad.errors import (
    InputError,
    LayerError,
    SettingError,
    StatisticsError,
    StatisticsWarning,
    TargetError,
)
from parchgrad.evaluation.localisation import cell_shares, mosaic
from parchgrad.evaluation.methods import grad_cam
from parchgrad.explain.explainer import Explainer
from parchgrad.explain.heatmap import heatmap, signed_heatmap
from parchgrad.explain.methods import METHODS
from parchgrad.explain.outputs import Logits
from parchgrad.explain.scores import Contrast
from parchgrad.explorer.inputs import CELLS, COLUMNS, GRAD_CAM, ROWS, ImageSource, Network, View
from parchgrad.explorer.settings import OwnNetwork
from parchgrad.explorer.snippet import mosaic_snippet, single_snippet
from parchgrad.models.classifier import Classifier, Prediction, label_of, name_against
from parchgrad.models.loading import load_model
from parchgrad.statistics import ChannelStatistics
from parchgrad.statistics.selectors import find_selector, registered_selectors
from parchgrad.visual import blend, blend_signed, panel, signed_panel, tint, tint_signed
from parchgrad.visual.sweeps import Sweep, quantile_sweep

__all__ = ["Exploration", "Explorer", "Game", "tinted"]

T = TypeVar("T")
# Pixels per pass, which bounds the memory for mosaics and methods with many rows.
_PIXELS_PER_PASS = 8 * 224 * 224
_FILTERS = threading.Lock()


@contextmanager
def _silent(category: type[Warning]) -> Iterator[None]:
    """Ignore warnings of a category, one thread at a time, since warning filters are global."""
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore", category)
        yield


@dataclass(frozen=True, eq=False, kw_only=True)
class Exploration:
    """Result for a single image.

    Attributes:
        image: the image.
        view: the settings.
        target: the explained class.
        against: name of the class that it is compared with, `"all others"` for the rest; None if the class is
            explained alone.
        predictions: the most probable classes, best first.
        classes: number of the network's classes.
        picture: the network's input as an image, (H, W, 3) in [0, 1].
        attribution: signed attribution with ParchGrad, (3, H, W), float32.
        plain: signed attribution by the same method without ParchGrad, (3, H, W), float32.
        comparison: attribution of the third map, (3, H, W), or (1, H, W) for Grad-CAM; None if there is none.
        layers: names of the edited layers.
        code: Python script that reproduces `attribution` and its picture.
    """

    image: ImageSource
    view: View
    target: Prediction
    against: str | None
    predictions: tuple[Prediction, ...]
    classes: int
    picture: NDArray[Any]
    attribution: Tensor
    plain: Tensor
    comparison: Tensor | None
    layers: tuple[str, ...]
    code: str

    def maps(self) -> tuple[Tensor, ...]:
        """The plain map, the ParchGrad map and the third map, signed or not as in the view, each (H, W)."""
        shown = (self.plain, self.attribution, self.comparison)
        return tuple(_heat(one.unsqueeze(0), self.view)[0] for one in shown if one is not None)

    def figure(self) -> Figure:
        """Draw the image next to its maps."""
        maps = [heat.unsqueeze(0) for heat in self.maps()]
        return _figure([self.picture], maps, [label_of(self.target, self.against)], self.view)


@dataclass(frozen=True, eq=False, kw_only=True)
class Game:
    """Result of the grid pointing game on one mosaic: the map of each class should light up in its own cell.

    Attributes:
        images: the four images, row by row.
        view: the settings; `target` and `against` are ignored.
        targets: predicted class of each image on its own.
        classes: number of the network's classes.
        picture: the mosaic, (2 H, 2 W, 3) in [0, 1].
        attribution: signed attribution with ParchGrad, (4, 3, 2 H, 2 W), one per class.
        plain: signed attribution without ParchGrad, same shape.
        comparison: attribution of the third map, same shape, or (4, 1, 2 H, 2 W) for Grad-CAM; None if there is none.
        code: Python script that reproduces `attribution` and `shares`.
    """

    images: tuple[ImageSource, ...]
    view: View
    targets: tuple[Prediction, ...]
    classes: int
    picture: NDArray[Any]
    attribution: Tensor
    plain: Tensor
    comparison: Tensor | None
    code: str

    def maps(self) -> tuple[Tensor, ...]:
        """The plain maps, the ParchGrad maps and the third maps, signed or not as in the view, each (4, 2 H, 2 W)."""
        return tuple(_heat(one, self.view) for one in self._shown())

    def shares(self) -> tuple[tuple[float, ...], ...]:
        """Share of each map in the cell of its class, in [0, 1], four for each of `maps`; NaN for an empty map."""
        return tuple(
            tuple(cell_shares(heatmap(one), rows=ROWS, columns=COLUMNS).diagonal().tolist()) for one in self._shown()
        )

    def figure(self) -> Figure:
        """Draw the mosaic next to the maps of each class."""
        scores = zip(self.targets, *self.shares()[:2], strict=True)
        labels = [f"{target.category}: {before:.2f}, with ParchGrad {after:.2f}" for target, before, after in scores]
        return _figure([self.picture] * CELLS, self.maps(), labels, self.view)

    def _shown(self) -> tuple[Tensor, ...]:
        return tuple(one for one in (self.plain, self.attribution, self.comparison) if one is not None)


def tinted(maps: Sequence[Tensor], *, signed: bool) -> list[NDArray[Any]]:
    """Colour maps, each on its own scale up to its 99.5th percentile.

    Args:
        maps: maps (H, W).
        signed: whether the maps are signed.

    Returns:
        Each map as (H, W, 4) in [0, 1].

    Example:
        >>> [picture.shape for picture in tinted([torch.eye(2)], signed=False)]
        [(2, 2, 4)]
    """
    colour = tint_signed if signed else tint
    return [colour(found) for found in maps]


@dataclass(frozen=True, eq=False)
class _Question:
    """What is explained: inputs (B, C, H, W), their classes and score, with a cache key."""

    network: Network
    inputs: Tensor
    targets: tuple[int, ...]
    score: int | Contrast | Tensor
    key: tuple[Hashable, ...]


class Explorer:
    """Explains images, with bounded caches of networks, statistics and maps. Thread-safe.

    Example:
        >>> explorer = Explorer()
        >>> found = explorer.explore(ImageSource("coffee"), View())
        >>> found.target.category, tuple(found.attribution.shape)
        ('espresso', (3, 224, 224))
    """

    def __init__(
        self,
        *,
        statistics: Mapping[str, str | Path] | None = None,
        own: OwnNetwork | None = None,
        networks: int = 3,
        megabytes: float = 64,
    ) -> None:
        """Set up empty caches.

        Args:
            statistics: file of channel statistics by network; other networks use bundled ones, if any.
            own: network of the user's own.
            networks: maximum number of cached networks.
            megabytes: maximum memory for cached maps.
        """
        self._own = own
        self._files = {name: Path(file) for name, file in (statistics or {}).items()}
        self._networks: _Recent[Network] = _Recent(networks, lambda network: 1)
        # Inputs and probabilities; maps with the names of the layers edited for them.
        self._tensors: _Recent[Tensor] = _Recent(int(megabytes * 0.5e6), lambda tensor: tensor.nbytes)
        self._maps: _Recent[tuple[Tensor, tuple[str, ...]]] = _Recent(
            int(megabytes * 0.5e6), lambda found: found[0].nbytes
        )
        # Statistics of a few classes, some hundred kilobytes each.
        self._columns: _Recent[ChannelStatistics] = _Recent(32, lambda statistics: 1)

    def classifier(self, name: str) -> Classifier:
        """Return a network, loading it if it is not cached.

        Raises:
            ModelError: if the network is unknown.
            WeightsError: if its weights are missing or cannot be downloaded.
            StatisticsError: if its statistics do not match it.
        """
        return self._network(name).classifier

    def holds(self, name: str) -> bool:
        """Whether a network is loaded.

        Example:
            >>> Explorer().holds("shapes")
            False
        """
        return self._networks.holds(name)

    def stability(self, image: ImageSource, view: View) -> float:
        """Measure the stability of an image's map under invisible noise; see `Explainer.stability`.

        Returns:
            Mean cosine with the maps of noisy copies, in [0, 1]; NaN if the map is zero everywhere.

        Raises:
            ParchGradError: if the image cannot be read, or a setting does not fit the network.

        Example:
            >>> Explorer().stability(ImageSource("coffee"), View(network="shapes")) > 0.9
            True
        """
        asked = self._question(image, view)
        return float(self._explainer(asked, view).stability(asked.inputs, asked.score)[0])

    def ranked(self, image: ImageSource, name: str) -> list[int]:
        """Rank the classes of a network for an image, most probable first.

        Raises:
            ParchGradError: if the image cannot be read, or the network cannot be loaded.
        """
        return self._probabilities(self._network(name), image).argsort(descending=True).tolist()

    def selectors(self, name: str) -> tuple[str, ...]:
        """Short names of the selectors that work for a network.

        Raises:
            ParchGradError: see `classifier`.

        Example:
            >>> "class" in Explorer().selectors("shapes")
            False
        """
        has_statistics = bool(self._network(name).statistics)
        return tuple(
            name for name, found in registered_selectors().items() if has_statistics or not found.needs_statistics
        )

    def comparisons(self, name: str) -> tuple[str, ...]:
        """Names of the third maps that work for a network; see `View.comparison`.

        Raises:
            ParchGradError: see `classifier`.

        Example:
            >>> Explorer().comparisons("shapes")[:3]
            ('grad_cam', 'gradient', 'input_x_gradient')
        """
        of_network = (GRAD_CAM,) if _suits_grad_cam(self.classifier(name).model) else ()
        return (*of_network, *METHODS, *self.selectors(name))

    def explore(self, image: ImageSource, view: View) -> Exploration:
        """Explain one image, using cached results where possible.

        Raises:
            ParchGradError: if the image cannot be read, or a setting does not fit the network.
        """
        asked = self._question(image, view)
        network, target = asked.network, asked.targets[0]
        probabilities = self._probabilities(network, image)
        predictions = tuple(network.prediction(index, probabilities) for index in self.ranked(image, view.network)[:5])
        partitioned, layers = self._edited(asked, view)
        against = name_against(view.against, target, predictions, network.classifier.categories)
        comparison = self._compared(asked, view)
        return Exploration(
            image=image,
            view=view.resolved(),
            target=network.prediction(target, probabilities),
            against=against,
            predictions=predictions,
            classes=len(network.classifier.categories),
            picture=network.classifier.preprocess.picture(asked.inputs[0]),
            attribution=partitioned[0],
            plain=self._plain(asked, view.method)[0],
            comparison=None if comparison is None else comparison[0],
            layers=layers,
            code=single_snippet(network, image, view, target, against),
        )

    def play(self, images: Sequence[ImageSource], view: View) -> Game:
        """Play the grid pointing game on a mosaic of four images.

        Raises:
            InputError: if there are not four images.
            ParchGradError: if an image cannot be read, or a setting does not fit the network.
        """
        if len(images) != CELLS:
            raise InputError(f"`images` has {len(images)} images, but a mosaic needs {CELLS}.")
        network = self._network(view.network)
        inputs = mosaic(torch.cat([self._inputs(network, image) for image in images]), rows=ROWS, columns=COLUMNS)
        each = [self._probabilities(network, image) for image in images]
        targets = tuple(int(probabilities.argmax()) for probabilities in each)
        key = (view.network, tuple(image.key for image in images), targets)
        asked = _Question(network, inputs.expand(CELLS, -1, -1, -1), targets, torch.tensor(targets), key)
        return Game(
            images=tuple(images),
            view=view.resolved(),
            targets=tuple(network.prediction(target, found) for target, found in zip(targets, each, strict=True)),
            classes=len(network.classifier.categories),
            picture=network.classifier.preprocess.picture(inputs[0]),
            attribution=self._edited(asked, view)[0],
            plain=self._plain(asked, view.method),
            comparison=self._compared(asked, view),
            code=mosaic_snippet(network, images, view, targets),
        )

    def sweep(self, image: ImageSource, view: View) -> Sweep:
        """Explain one image at all default quantiles that its selector supports.

        Raises:
            ParchGradError: if the image cannot be read, or a setting does not fit the network.

        Example:
            >>> Explorer().sweep(ImageSource("coffee"), View(network="shapes", target=0)).values
            (0.7, 0.5, 0.3, 0.2, 0.1, 0.05)
        """
        asked = self._question(image, view)
        edit = self._edit(asked, view)
        return quantile_sweep(
            asked.network.classifier, image.read(), edit, target=view.score(asked.targets[0]), method=view.method
        )

    def _network(self, name: str) -> Network:
        return self._networks.get(name, lambda: self._load(name))

    def _load(self, name: str) -> Network:
        own = self._own
        if own is not None and name == own.classifier.name:
            classifier, code = own.classifier, own.code
        else:
            classifier, code = load_model(name), f"pg.load_model({name!r})"
        file = self._files.get(name)
        if file is not None:
            return Network(classifier, ChannelStatistics.load(file, classifier.model), file.name, code)
        try:
            held = ChannelStatistics.bundled(name)
            # A network of the user's may have its name and other weights.
            held.check_model(classifier.model)
            return Network(classifier, held, code=code)
        except StatisticsError:
            return Network(classifier, code=code)

    def _inputs(self, network: Network, image: ImageSource) -> Tensor:
        classifier = network.classifier
        return self._tensors.get(
            ("inputs", classifier.name, image.key),
            lambda: classifier.preprocess(image.read()).unsqueeze(0),
        )

    def _probabilities(self, network: Network, image: ImageSource) -> Tensor:
        def predict() -> Tensor:
            with torch.no_grad():
                logits: Tensor = Logits(network.classifier.model, None)(self._inputs(network, image))
                return logits.softmax(dim=1)[0]

        return self._tensors.get(("probabilities", network.classifier.name, image.key), predict)

    def _question(self, image: ImageSource, view: View) -> _Question:
        network, ranked = self._network(view.network), self.ranked(image, view.network)
        target = ranked[0] if view.target is None else view.target
        if not 0 <= target < len(ranked):
            raise TargetError(
                f"`target` is {target}, but {view.network} has {len(ranked)} classes. Choose 0 to {len(ranked) - 1}."
            )
        if view.against == target:
            category = network.classifier.categories[target]
            raise SettingError(f"Cannot explain {category!r} rather than itself. Choose another class to compare with.")
        key = (view.network, image.key, target, view.against)
        return _Question(network, self._inputs(network, image), (target,), view.score(target), key)

    def _edited(self, asked: _Question, view: View) -> tuple[Tensor, tuple[str, ...]]:
        """The attribution with ParchGrad, and the names of the edited layers."""

        def explained() -> tuple[Tensor, tuple[str, ...]]:
            explainer = self._explainer(asked, view)
            return explainer.attribute(asked.inputs, asked.score), explainer.edited_layers

        # The display does not change the attribution, and the key of the question holds what is explained.
        settings = replace(view.resolved(), target=None, against=None, comparison=None, signed=False, opacity=1.0)
        return self._maps.get((*asked.key, *astuple(settings)), explained)

    def _plain(self, asked: _Question, method: str) -> Tensor:
        """The attribution by a method without ParchGrad."""

        def explained() -> tuple[Tensor, tuple[str, ...]]:
            return _explainer_of(asked, Edit(selector=None), method).attribute(asked.inputs, asked.score), ()

        return self._maps.get((*asked.key, method), explained)[0]

    def _compared(self, asked: _Question, view: View) -> Tensor | None:
        """The attribution of the third map, with one channel for Grad-CAM; None if there is none."""
        name = view.comparison
        if name is None:
            return None
        if name == GRAD_CAM:
            return self._maps.get((*asked.key, name), lambda: (_grad_cam(asked), ()))[0]
        if name in METHODS:
            return self._plain(asked, name)
        return self._edited(asked, view.with_defaults_of(name))[0]

    def _explainer(self, asked: _Question, view: View) -> Explainer:
        return _explainer_of(asked, self._edit(asked, view), view.method)

    def _edit(self, asked: _Question, view: View) -> Edit:
        return Edit(
            selector=self._selector(asked, view),
            layers=view.layer_choice,
            gamma=view.gamma,
            gates=view.gates,
            antialias=view.antialias,
            balance=view.balance,
        )

    def _selector(self, asked: _Question, view: View) -> Selector:
        statistics, classes = asked.network.statistics, tuple(sorted(set(asked.targets)))
        if view.selector == "class" and statistics is not None:
            # Computing the masks of all classes would take most of a second for every new quantile.
            restrict = functools.partial(statistics.restrict, classes=classes)
            statistics = self._columns.get((asked.network.classifier.name, classes), restrict)
        with _silent(StatisticsWarning):
            return find_selector(view.selector).make(
                quantile=view.quantile, softness=view.softness, statistics=statistics
            )


class _Recent(Generic[T]):
    """A cache of recently used values, up to a total size."""

    def __init__(self, limit: int, size: Callable[[T], int]) -> None:
        self._limit, self._size = limit, size
        self._held: OrderedDict[Hashable, T] = OrderedDict()
        self._total = 0
        self._lock = threading.Lock()

    def holds(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._held

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        # Outside the lock: two threads may make the same value, but neither waits for the other.
        made = make()
        with self._lock:
            if key not in self._held:
                self._held[key] = made
                self._total += self._size(made)
            while self._total > self._limit and len(self._held) > 1:
                self._total -= self._size(self._held.popitem(last=False)[1])
        return made


def _explainer_of(asked: _Question, edit: Edit, method: str) -> Explainer:
    rows = max(1, _PIXELS_PER_PASS // (asked.inputs.shape[2] * asked.inputs.shape[3]))
    return Explainer.from_edit(asked.network.classifier.model, edit, method=method, internal_batch_size=rows)


def _suits_grad_cam(model: nn.Module) -> bool:
    """Whether the last convolution has a map of features, not just the patches of the image, as in a transformer."""
    last = next((module for module in reversed(list(model.modules())) if isinstance(module, Convolution)), None)
    return last is not None and (max(last.kernel_size) == 1 or last.stride != last.kernel_size)


def _grad_cam(asked: _Question) -> Tensor:
    """The Grad-CAM map, (B, 1, H, W)."""
    model, score = asked.network.classifier.model, asked.score
    if not _suits_grad_cam(model):
        raise LayerError(
            f"Grad-CAM needs a convolution after the patches, and {asked.network.classifier.name} has none. Choose "
            "another third map."
        )
    method = grad_cam(model, score=(lambda _: score) if isinstance(score, Contrast) else None)
    return method(asked.inputs, torch.tensor(asked.targets)).unsqueeze(1)


def _heat(attribution: Tensor, view: View) -> Tensor:
    return signed_heatmap(attribution) if view.signed else heatmap(attribution)


def _figure(pictures: Sequence[NDArray[Any]], maps: Sequence[Tensor], labels: Sequence[str], view: View) -> Figure:
    """Draw each picture next to its maps, which are given as (B, H, W) for each title."""
    draw, lay = (signed_panel, blend_signed) if view.signed else (panel, blend)
    figure = draw(pictures, dict(zip(view.titles, map(list, maps), strict=True)), labels=labels, smooth=0.0)
    # Panels have opaque maps, so redraw them; cells run row by row, each image before its maps.
    for row, picture in enumerate(pictures):
        for place, heats in enumerate(maps, start=1):
            mixed = lay(picture, heats[row], opacity=view.opacity)
            figure.axes[(1 + len(maps)) * row + place].images[0].set_data(mixed)
    return figure
