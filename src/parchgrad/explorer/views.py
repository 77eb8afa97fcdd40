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
from torch import Tensor

from parchgrad.core.edit import Edit
from parchgrad.core.selectors import Selector
from parchgrad.errors import InputError, SettingError, StatisticsError, StatisticsWarning, TargetError
from parchgrad.evaluation.localisation import cell_shares, mosaic
from parchgrad.explain.explainer import Explainer
from parchgrad.explain.heatmap import heatmap, signed_heatmap
from parchgrad.explain.scores import Contrast
from parchgrad.explorer.inputs import CELLS, COLUMNS, ROWS, Network, Photograph, View
from parchgrad.explorer.snippet import mosaic_snippet, single_snippet
from parchgrad.models.classifier import Classifier, Prediction, label_of, name_against
from parchgrad.models.loading import load_model
from parchgrad.statistics import ChannelStatistics
from parchgrad.statistics.selectors import find_selector, registered_selectors
from parchgrad.visual import blend, blend_signed, panel, shared_top, signed_panel, tint, tint_signed
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
        photograph: the image.
        view: the settings.
        target: the explained class.
        against: name of the class that it is compared with, `"all others"` for the rest; None if the class is
            explained alone.
        predictions: the most probable classes, best first.
        picture: the network's input as an image, (H, W, 3) in [0, 1].
        attribution: signed attribution with ParchGrad, (3, H, W), float32.
        plain: signed attribution by the same method without ParchGrad, (3, H, W), float32.
        layers: names of the edited layers.
        code: Python script that reproduces `attribution` and its picture.
    """

    photograph: Photograph
    view: View
    target: Prediction
    against: str | None
    predictions: tuple[Prediction, ...]
    picture: NDArray[Any]
    attribution: Tensor
    plain: Tensor
    layers: tuple[str, ...]
    code: str

    def maps(self) -> tuple[Tensor, Tensor]:
        """The plain map and the ParchGrad map, signed or not as in the view, each (H, W)."""
        plain, partitioned = _maps(torch.stack((self.plain, self.attribution)), self.view)
        return plain, partitioned

    def figure(self) -> Figure:
        """Draw the image next to the plain map and the ParchGrad map."""
        plain, partitioned = self.maps()
        label = label_of(self.target, self.against)
        return _figure([self.picture], [plain], [partitioned], [label], self.view)


@dataclass(frozen=True, eq=False, kw_only=True)
class Game:
    """Result of the grid pointing game on one mosaic: the map of each class should light up in its own cell.

    Attributes:
        photographs: the four images, row by row.
        view: the settings; `target` and `against` are ignored.
        targets: predicted class of each image on its own.
        picture: the mosaic, (2 H, 2 W, 3) in [0, 1].
        attribution: signed attribution with ParchGrad, (4, 3, 2 H, 2 W), one per class.
        plain: signed attribution without ParchGrad, same shape.
        shares: share of each ParchGrad map in the cell of its class, in [0, 1].
        plain_shares: share of each plain map in the cell of its class, in [0, 1].
        code: Python script that reproduces `attribution` and `shares`.
    """

    photographs: tuple[Photograph, ...]
    view: View
    targets: tuple[Prediction, ...]
    picture: NDArray[Any]
    attribution: Tensor
    plain: Tensor
    shares: tuple[float, ...]
    plain_shares: tuple[float, ...]
    code: str

    def maps(self) -> tuple[Tensor, Tensor]:
        """The plain maps and the ParchGrad maps, signed or not as in the view, each (4, 2 H, 2 W)."""
        return _maps(self.plain, self.view), _maps(self.attribution, self.view)

    def figure(self) -> Figure:
        """Draw the mosaic next to the plain map and the ParchGrad map of each class."""
        plain, partitioned = self.maps()
        scores = zip(self.targets, self.plain_shares, self.shares, strict=True)
        labels = [f"{target.category}: {before:.2f}, with ParchGrad {after:.2f}" for target, before, after in scores]
        return _figure([self.picture] * CELLS, list(plain), list(partitioned), labels, self.view)


def tinted(maps: Sequence[Tensor], *, signed: bool) -> tuple[float, list[NDArray[Any]]]:
    """Colour maps on a shared scale.

    Args:
        maps: maps (H, W).
        signed: whether the maps are signed.

    Returns:
        End of the scale, in multiples of a map's mean magnitude, and each map as (H, W, 4) in [0, 1].

    Example:
        >>> top, pictures = tinted([torch.eye(2)], signed=False)
        >>> top, pictures[0].shape
        (2.0, (2, 2, 4))
    """
    top = shared_top(maps)
    colour = tint_signed if signed else tint
    return top, [colour(found, top=top) for found in maps]


class Explorer:
    """Explains images, with bounded caches of networks, statistics and maps. Thread-safe.

    Example:
        >>> explorer = Explorer()
        >>> found = explorer.explore(Photograph("coffee"), View())
        >>> found.target.category, tuple(found.attribution.shape)
        ('espresso', (3, 224, 224))
    """

    def __init__(
        self,
        *,
        statistics: Mapping[str, str | Path] | None = None,
        networks: int = 3,
        megabytes: float = 64,
    ) -> None:
        """Set up empty caches.

        Args:
            statistics: file of channel statistics by network; other networks use bundled ones, if any.
            networks: maximum number of cached networks.
            megabytes: maximum memory for cached maps.
        """
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

    def stability(self, photograph: Photograph, view: View) -> float:
        """Measure the stability of an image's map under invisible noise; see `Explainer.stability`.

        Returns:
            Mean cosine with the maps of noisy copies, in [0, 1]; NaN if the map is zero everywhere.

        Raises:
            ParchGradError: if the image cannot be read, or a setting does not fit the network.

        Example:
            >>> Explorer().stability(Photograph("coffee"), View(network="shapes")) > 0.9
            True
        """
        network = self._network(view.network)
        inputs = self._inputs(network, photograph)
        target = self.explore(photograph, view).target.index
        return float(self._explainer(network, view, inputs, (target,)).stability(inputs, view.score(target))[0])

    def ranked(self, photograph: Photograph, name: str) -> list[int]:
        """Rank the classes of a network for an image, most probable first.

        Raises:
            ParchGradError: if the image cannot be read, or the network cannot be loaded.
        """
        return self._probabilities(self._network(name), photograph).argsort(descending=True).tolist()

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

    def explore(self, photograph: Photograph, view: View) -> Exploration:
        """Explain one image, using cached results where possible.

        Raises:
            ParchGradError: if the image cannot be read, or a setting does not fit the network.
        """
        network = self._network(view.network)
        inputs = self._inputs(network, photograph)
        probabilities = self._probabilities(network, photograph)
        ranked = self.ranked(photograph, view.network)
        target = ranked[0] if view.target is None else view.target
        if not 0 <= target < len(ranked):
            raise TargetError(
                f"`target` is {target}, but {view.network} has {len(ranked)} classes. Choose 0 to {len(ranked) - 1}."
            )
        if view.against == target:
            category = network.classifier.categories[target]
            raise SettingError(f"Cannot explain {category!r} rather than itself. Choose another class to compare with.")
        key = (view.network, photograph.key, target, view.against)
        partitioned, layers, plain = self._attribute(network, view, inputs, (target,), view.score(target), key)
        predictions = tuple(network.prediction(index, probabilities) for index in ranked[:5])
        against = name_against(view.against, target, predictions, network.classifier.categories)
        return Exploration(
            photograph=photograph,
            view=view.resolved(),
            target=network.prediction(target, probabilities),
            against=against,
            predictions=predictions,
            picture=network.classifier.preprocess.picture(inputs[0]),
            attribution=partitioned[0],
            plain=plain[0],
            layers=layers,
            code=single_snippet(network, photograph, view, target, against),
        )

    def play(self, photographs: Sequence[Photograph], view: View) -> Game:
        """Play the grid pointing game on a mosaic of four images.

        Raises:
            InputError: if there are not four images.
            ParchGradError: if an image cannot be read, or a setting does not fit the network.
        """
        if len(photographs) != CELLS:
            raise InputError(f"`photographs` has {len(photographs)} images, but a mosaic needs {CELLS}.")
        network = self._network(view.network)
        inputs = mosaic(
            torch.cat([self._inputs(network, photograph) for photograph in photographs]), rows=ROWS, columns=COLUMNS
        )
        each = [self._probabilities(network, photograph) for photograph in photographs]
        targets = tuple(int(probabilities.argmax()) for probabilities in each)
        key = (view.network, tuple(photograph.key for photograph in photographs), targets)
        inputs, classes = inputs.expand(CELLS, -1, -1, -1), torch.tensor(targets)
        partitioned, _, plain = self._attribute(network, view, inputs, targets, classes, key)
        return Game(
            photographs=tuple(photographs),
            view=view.resolved(),
            targets=tuple(network.prediction(target, found) for target, found in zip(targets, each, strict=True)),
            picture=network.classifier.preprocess.picture(inputs[0]),
            attribution=partitioned,
            plain=plain,
            shares=_own_shares(partitioned),
            plain_shares=_own_shares(plain),
            code=mosaic_snippet(network, photographs, view, targets),
        )

    def sweep(self, photograph: Photograph, view: View) -> Sweep:
        """Explain one image at all default quantiles that its selector supports.

        Raises:
            ParchGradError: if the image cannot be read, or a setting does not fit the network.

        Example:
            >>> Explorer().sweep(Photograph("coffee"), View(network="shapes", target=0)).values
            (0.7, 0.5, 0.3, 0.2, 0.1, 0.05)
        """
        network = self._network(view.network)
        target = self.explore(photograph, view).target.index
        edit = self._edit(network, view, (target,))
        return quantile_sweep(
            network.classifier, photograph.read(), edit, target=view.score(target), method=view.method
        )

    def _network(self, name: str) -> Network:
        return self._networks.get(name, lambda: self._load(name))

    def _load(self, name: str) -> Network:
        classifier = load_model(name)
        file = self._files.get(name)
        if file is not None:
            return Network(classifier, ChannelStatistics.load(file, classifier.model), file.name)
        try:
            return Network(classifier, ChannelStatistics.bundled(name))
        except StatisticsError:
            return Network(classifier)

    def _inputs(self, network: Network, photograph: Photograph) -> Tensor:
        classifier = network.classifier
        return self._tensors.get(
            ("inputs", classifier.name, photograph.key),
            lambda: classifier.preprocess(photograph.read()).unsqueeze(0),
        )

    def _probabilities(self, network: Network, photograph: Photograph) -> Tensor:
        def predict() -> Tensor:
            with torch.no_grad():
                probabilities: Tensor = network.classifier.model(self._inputs(network, photograph)).softmax(dim=1)[0]
                return probabilities

        return self._tensors.get(("probabilities", network.classifier.name, photograph.key), predict)

    def _attribute(
        self,
        network: Network,
        view: View,
        inputs: Tensor,
        targets: tuple[int, ...],
        score: int | Contrast | Tensor,
        key: tuple[Hashable, ...],
    ) -> tuple[Tensor, tuple[str, ...], Tensor]:
        """The attributions of the inputs with ParchGrad, the layers edited for them, and the plain attributions."""
        # The display does not change the attribution, and `key` holds what is explained.
        settings = astuple(replace(view.resolved(), target=None, against=None, signed=False, opacity=1.0))

        def explained(of: tuple[int, ...] | None) -> tuple[Tensor, tuple[str, ...]]:
            explainer = self._explainer(network, view, inputs, of)
            attribution = explainer.attribute(inputs, score)
            return attribution, explainer.edited_layers

        partitioned, layers = self._maps.get((*key, *settings), lambda: explained(targets))
        plain, _ = self._maps.get((*key, view.method), lambda: explained(None))
        return partitioned, layers, plain

    def _explainer(self, network: Network, view: View, inputs: Tensor, targets: tuple[int, ...] | None) -> Explainer:
        """The explainer for some classes under a view, or the plain one if `targets` is None."""
        rows = max(1, _PIXELS_PER_PASS // (inputs.shape[2] * inputs.shape[3]))
        edit = Edit(selector=None) if targets is None else self._edit(network, view, targets)
        return Explainer.from_edit(network.classifier.model, edit, method=view.method, internal_batch_size=rows)

    def _edit(self, network: Network, view: View, targets: tuple[int, ...]) -> Edit:
        return Edit(
            selector=self._selector(network, view, targets),
            layers=view.layer_choice,
            gamma=view.gamma,
            gates=view.gates,
            antialias=view.antialias,
            balance=view.balance,
        )

    def _selector(self, network: Network, view: View, targets: tuple[int, ...]) -> Selector:
        statistics = network.statistics
        if view.selector == "class" and statistics is not None:
            # Computing the masks of all classes would take most of a second for every new quantile.
            key = (network.classifier.name, tuple(sorted(set(targets))))
            statistics = self._columns.get(key, functools.partial(statistics.restrict, classes=targets))
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


def _maps(attribution: Tensor, view: View) -> Tensor:
    return signed_heatmap(attribution) if view.signed else heatmap(attribution)


def _figure(
    pictures: Sequence[NDArray[Any]],
    plain: Sequence[Tensor],
    partitioned: Sequence[Tensor],
    labels: Sequence[str],
    view: View,
) -> Figure:
    draw, lay = (signed_panel, blend_signed) if view.signed else (panel, blend)
    title = view.method.replace("_", " ")
    maps = {title: plain, f"{title} + ParchGrad": partitioned}
    figure = draw(pictures, maps, labels=labels, shared_scale=True, smooth=0.0)
    top = shared_top([*plain, *partitioned])
    # Panels have opaque maps, so redraw them; cells run row by row, each image before its two maps.
    for place, cells in enumerate(zip(pictures, plain, partitioned, strict=True)):
        for column in (1, 2):
            mixed = lay(cells[0], cells[column], top=top, opacity=view.opacity)
            figure.axes[3 * place + column].images[0].set_data(mixed)
    return figure


def _own_shares(attribution: Tensor) -> tuple[float, ...]:
    return tuple(cell_shares(heatmap(attribution), rows=ROWS, columns=COLUMNS).diagonal().tolist())
