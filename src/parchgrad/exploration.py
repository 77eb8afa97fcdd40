"""Explaining photographs under settings that change: maps, scores, and the script that reproduces them.

The web page only displays what this module computes.
"""

import functools
import math
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
from PIL import Image
from torch import Tensor

from parchgrad.attribution import Explainer, heatmap, signed_heatmap
from parchgrad.data.images import opened_image, read_image, stored_frame
from parchgrad.demo import PHOTOGRAPHS, example_photographs
from parchgrad.edit import Edit
from parchgrad.errors import ImageError, InputError, SettingError, StatisticsError, StatisticsWarning, TargetError
from parchgrad.evaluation.localisation import cell_shares, mosaic
from parchgrad.layers import LayerChoice, parse_layers
from parchgrad.models import OFFLINE_MODEL, Classifier, Prediction, load_model
from parchgrad.rules import check_antialias, check_gates
from parchgrad.selection import (
    SELECTORS_BY_NAME,
    STATISTICAL_SELECTORS,
    ClassWise,
    Selector,
    check_softness,
    default_edit,
    default_setting,
    make_selector,
)
from parchgrad.statistics import ChannelStatistics, RankedLayerStatistics
from parchgrad.visual import blend, blend_signed, panel, shared_top, signed_panel, tint, tint_signed
from parchgrad.visual.sweeps import QUANTILES, Sweep, quantile_sweep

__all__ = [
    "CELLS",
    "EXAMPLES",
    "Exploration",
    "Explorer",
    "Game",
    "Photograph",
    "View",
    "check_photograph",
    "tinted",
]

T = TypeVar("T")
EXAMPLES = tuple(PHOTOGRAPHS)
"""Names of the photographs that come with scikit-image."""
ROWS = COLUMNS = 2
CELLS = ROWS * COLUMNS
"""Photographs in a mosaic."""
# How Python reads the examples.
_EXAMPLE_CODE = {name: f"data.{name}()" for name in EXAMPLES} | {"motorcycle": "data.stereo_motorcycle()[0]"}
# Pillow hands other formats to programs of the system, or to decoders that few have looked at.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
# Pixels that go through a network in one pass: memory stays the same for mosaics and for methods of many passes.
_PIXELS_PER_PASS = 8 * 224 * 224
_FILTERS = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class View:
    """The settings of an explanation and its display. None takes what suits the selector.

    Attributes:
        network: name of a model; see `load_model`.
        target: class to explain; None is the predicted one.
        selector: short name of a selector; see `make_selector`.
        method: attribution method; see `Explainer`.
        layers: the edited convolutions as a user types them; see `parse_layers`.
        quantile: share of the channels to keep, in (0, 1].
        softness: width of the ramp around the threshold, in [0, 1]; 0 is a hard cut. See `soft_weights`.
        gamma: how many times stronger than the rest the kept signal becomes, in (0, inf]; infinity prunes.
        gates: width of the soft gates in standard deviations, 0 or more; 0 is the true derivative. See `soft_gate`.
        antialias: whether gradients at the input of strided operations are smoothed; see `smooth_strides`.
        signed: whether maps are shown with their sign.
        opacity: opacity of the maps over the photograph, in [0, 1].

    Raises:
        SettingError: if `softness`, `gates`, `antialias` or `opacity` is out of range. The explorer checks the rest.

    Example:
        >>> view = View(selector="energy").resolved()
        >>> view.layers, view.softness, view.gates, view.antialias
        ('0.5', 0.5, 1.0, True)
    """

    network: str = OFFLINE_MODEL
    target: int | None = None
    selector: str = "evidence"
    method: str = "gradient"
    layers: str | None = None
    quantile: float | None = None
    softness: float | None = None
    gamma: float = math.inf
    gates: float | None = None
    antialias: bool | None = None
    signed: bool = False
    opacity: float = 1.0

    def __post_init__(self) -> None:
        if self.softness is not None:
            check_softness(self.softness)
        if self.gates is not None:
            check_gates(self.gates)
        if self.antialias is not None:
            check_antialias(self.antialias)
        if not 0 <= self.opacity <= 1:
            raise SettingError(f"opacity is {self.opacity}, but it must lie in [0, 1].")

    def resolved(self) -> "View":
        """Put what suits the selector in place of every None, except `target`.

        Raises:
            SettingError: if the selector is unknown.
        """
        suits = default_edit(self.selector, softness=self.softness)
        return replace(
            self,
            layers=str(suits.layers) if self.layers is None else self.layers,
            quantile=default_setting(self.selector, "quantile") if self.quantile is None else self.quantile,
            softness=default_setting(self.selector, "softness") if self.softness is None else self.softness,
            gates=suits.gates if self.gates is None else self.gates,
            antialias=suits.antialias if self.antialias is None else self.antialias,
        )


@dataclass(frozen=True)
class Photograph:
    """A photograph in a file, or one of `EXAMPLES`.

    Attributes:
        name: of the file, or of the example.
        path: of the file; None for an example.

    Example:
        >>> Photograph("coffee").read().size
        (600, 400)
    """

    name: str
    path: Path | None = None

    @property
    def key(self) -> Hashable:
        """What tells it from others, and from another file that had its path before.

        Raises:
            ImageError: if there is no such file any more.
        """
        if self.path is None:
            return self.name
        try:
            state = self.path.stat()
        except OSError as error:
            raise ImageError(f"{self.name!r} is not here any more; give the file again.") from error
        return str(self.path), state.st_mtime_ns, state.st_size

    def read(self) -> Image.Image:
        """Read it as RGB.

        Raises:
            ImageError: if there is no such example or file, or the file is no complete image.
        """
        if self.path is not None:
            with _named_alone(self.path):
                return read_image(self.path)
        if self.name not in EXAMPLES:
            raise ImageError(f"There is no example photograph {self.name!r}; there are: {', '.join(EXAMPLES)}.")
        return example_photographs()[EXAMPLES.index(self.name)]

    def code(self) -> str:
        """The expression that reads it."""
        return f"read_image({self.name!r})" if self.path else f"Image.fromarray({_EXAMPLE_CODE[self.name]})"


def check_photograph(path: str | Path, *, megapixels: float) -> None:
    """Look at the head of a file, before any pixel is decoded.

    Args:
        path: of the file.
        megapixels: most pixels that it may have, in millions.

    Raises:
        ImageError: if it is no image of a common format, or one of too many pixels.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "wide.png")
        ...     Image.new("1", (4000, 1000)).save(path)
        ...     check_photograph(path, megapixels=4)
        ...     check_photograph(path, megapixels=3)
        Traceback (most recent call last):
        ...
        parchgrad.errors.ImageError: 'wide.png' has 4.0 megapixels, but 3 are the most; scale it down first.
    """
    path = Path(path)
    with _named_alone(path):
        width, height, _ = stored_frame(path)
        with opened_image(path) as opened:
            kind = opened.format
    if kind not in _FORMATS:
        raise ImageError(f"{path.name!r} is a {kind} file; give a JPEG, PNG, WebP or similar picture.")
    found = width * height / 1e6
    if found > megapixels:
        raise ImageError(
            f"{path.name!r} has {found:,.1f} megapixels, but {megapixels:g} are the most; scale it down first."
        )


@contextmanager
def _silent(category: type[Warning]) -> Iterator[None]:
    """Ignore warnings of a category; one thread at a time, since what is ignored is known to the whole process."""
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore", category)
        yield


@contextmanager
def _named_alone(path: Path) -> Iterator[None]:
    """Name a file in errors without its folder, which is the server's own business."""
    try:
        yield
    except ImageError as error:
        raise ImageError(str(error).replace(repr(str(path)), repr(path.name))) from error


@dataclass(frozen=True, eq=False, kw_only=True)
class Exploration:
    """One photograph as a view shows it.

    Attributes:
        photograph: which one.
        view: the settings.
        target: the explained class.
        predictions: the most probable classes, best first.
        picture: what the network saw, (H, W, 3) in [0, 1].
        attribution: signed attribution by ParchGrad, (3, H, W), float32.
        plain: signed attribution by the same method without it, (3, H, W), float32.
        layers: names of the edited convolutions.
        code: a Python script that gives `attribution` and the picture of it again.
    """

    photograph: Photograph
    view: View
    target: Prediction
    predictions: tuple[Prediction, ...]
    picture: NDArray[Any]
    attribution: Tensor
    plain: Tensor
    layers: tuple[str, ...]
    code: str

    def maps(self) -> tuple[Tensor, Tensor]:
        """The plain map and ParchGrad's, as the view wants them, each (H, W)."""
        plain, partitioned = _maps(torch.stack((self.plain, self.attribution)), self.view)
        return plain, partitioned

    def figure(self) -> Figure:
        """Draw the photograph beside the plain map and ParchGrad's."""
        plain, partitioned = self.maps()
        label = f"{self.target.category} ({self.target.probability:.0%})"
        return _figure([self.picture], [plain], [partitioned], [label], self.view)


@dataclass(frozen=True, eq=False, kw_only=True)
class Game:
    """The grid pointing game on one mosaic: each class is explained, its own cell should light up.

    Attributes:
        photographs: the four, row by row.
        view: the settings; its `target` is unused.
        targets: the predicted class of each photograph on its own.
        picture: the mosaic, (2 H, 2 W, 3) in [0, 1].
        attribution: signed attribution by ParchGrad, (4, 3, 2 H, 2 W), one per class.
        plain: the same without it.
        shares: share of each ParchGrad map in the cell of its class, in [0, 1].
        plain_shares: the same of the plain maps.
        code: a Python script that gives `attribution` and `shares` again.
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
        """The plain maps and ParchGrad's, as the view wants them, each (4, 2 H, 2 W)."""
        return _maps(self.plain, self.view), _maps(self.attribution, self.view)

    def figure(self) -> Figure:
        """Draw the mosaic beside the plain map and ParchGrad's, class by class."""
        plain, partitioned = self.maps()
        scores = zip(self.targets, self.plain_shares, self.shares, strict=True)
        labels = [f"{target.category}: {before:.2f}, with ParchGrad {after:.2f}" for target, before, after in scores]
        return _figure([self.picture] * CELLS, list(plain), list(partitioned), labels, self.view)


def tinted(maps: Sequence[Tensor], *, signed: bool) -> tuple[float, list[NDArray[Any]]]:
    """Colour maps that are compared by one scale.

    Args:
        maps: each (H, W).
        signed: whether they are signed.

    Returns:
        Where the scale ends, in multiples of a map's mean magnitude, and each map as (H, W, 4) in [0, 1].

    Example:
        >>> top, pictures = tinted([torch.eye(2)], signed=False)
        >>> top, pictures[0].shape
        (2.0, (2, 2, 4))
    """
    top = shared_top(maps)
    colour = tint_signed if signed else tint
    return top, [colour(found, top=top) for found in maps]


class Explorer:
    """Networks, statistics and maps that were looked at lately, each in bounded number; threads may share it.

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
        """Set the bounds; nothing is loaded before it is looked at.

        Args:
            statistics: file of channel statistics by network; others have those that come with the package, if any.
            networks: most networks held at once.
            megabytes: most memory for maps.
        """
        self._files = {name: Path(file) for name, file in (statistics or {}).items()}
        self._networks: _Recent[_Network] = _Recent(networks, lambda network: 1)
        self._tensors: _Recent[Tensor] = _Recent(int(megabytes * 1e6), lambda tensor: tensor.nbytes)
        # Of one class or a few, some hundred kilobytes each.
        self._columns: _Recent[ChannelStatistics] = _Recent(32, lambda statistics: 1)

    def classifier(self, name: str) -> Classifier:
        """Load a network, unless it is held.

        Raises:
            ModelError: if no library knows it.
            WeightsError: if its weights cannot be had.
            StatisticsError: if its statistics do not fit it.
        """
        return self._network(name).classifier

    def holds(self, name: str) -> bool:
        """Whether a network is loaded by now.

        Example:
            >>> Explorer().holds("shapes")
            False
        """
        return self._networks.holds(name)

    def stability(self, photograph: Photograph, view: View) -> float:
        """Measure how steady the map of a photograph is under invisible noise; see `Explainer.stability`.

        Returns:
            Mean cosine with the maps of noisy copies, in [0, 1]; NaN if the map is zero everywhere.

        Raises:
            ParchGradError: if the photograph cannot be read, or a setting does not fit the network.

        Example:
            >>> Explorer().stability(Photograph("coffee"), View(network="shapes")) > 0.9
            True
        """
        network = self._network(view.network)
        inputs = self._inputs(network, photograph)
        target = self.explore(photograph, view).target.index
        return float(self._explainer(network, view, inputs, (target,)).stability(inputs, target)[0])

    def selectors(self, name: str) -> tuple[str, ...]:
        """Short names of the selectors that a network can be looked at with.

        Raises:
            ParchGradError: as `classifier` does.

        Example:
            >>> Explorer().selectors("shapes")
            ('energy', 'activation', 'evidence', 'random')
        """
        more = STATISTICAL_SELECTORS if self._network(name).statistics else ()
        return (*SELECTORS_BY_NAME, *more)

    def explore(self, photograph: Photograph, view: View) -> Exploration:
        """Look at one photograph; what was worked out lately is not worked out again.

        Raises:
            ParchGradError: if the photograph cannot be read, or a setting does not fit the network.
        """
        network = self._network(view.network)
        inputs = self._inputs(network, photograph)
        probabilities = self._probabilities(network, photograph)
        ranked = probabilities.argsort(descending=True).tolist()
        target = ranked[0] if view.target is None else view.target
        if not 0 <= target < len(ranked):
            raise TargetError(
                f"Class {target} is out of range: {view.network} has {len(ranked)} classes; choose one of them."
            )
        key = (view.network, photograph.key, target)
        explainer, partitioned, plain = self._attribute(network, view, inputs, (target,), key)
        return Exploration(
            photograph=photograph,
            view=view.resolved(),
            target=network.prediction(target, probabilities),
            predictions=tuple(network.prediction(index, probabilities) for index in ranked[:5]),
            picture=network.classifier.preprocess.picture(inputs[0]),
            attribution=partitioned[0],
            plain=plain[0],
            layers=explainer.layers,
            code=_single_code(network, photograph, view, target),
        )

    def play(self, photographs: Sequence[Photograph], view: View) -> Game:
        """Play the grid pointing game on a mosaic of four photographs.

        Raises:
            InputError: if there are not four.
            ParchGradError: if one cannot be read, or a setting does not fit the network.
        """
        if len(photographs) != CELLS:
            raise InputError(f"A mosaic needs {CELLS} photographs, but {len(photographs)} are given; give as many.")
        network = self._network(view.network)
        inputs = mosaic(
            torch.cat([self._inputs(network, photograph) for photograph in photographs]), rows=ROWS, columns=COLUMNS
        )
        each = [self._probabilities(network, photograph) for photograph in photographs]
        targets = tuple(int(probabilities.argmax()) for probabilities in each)
        key = (view.network, tuple(photograph.key for photograph in photographs), targets)
        _, partitioned, plain = self._attribute(network, view, inputs.expand(CELLS, -1, -1, -1), targets, key)
        return Game(
            photographs=tuple(photographs),
            view=view.resolved(),
            targets=tuple(network.prediction(target, found) for target, found in zip(targets, each, strict=True)),
            picture=network.classifier.preprocess.picture(inputs[0]),
            attribution=partitioned,
            plain=plain,
            shares=_own_shares(partitioned),
            plain_shares=_own_shares(plain),
            code=_game_code(network, photographs, view, targets),
        )

    def sweep(self, photograph: Photograph, view: View) -> Sweep:
        """Look at one photograph at several quantiles, those that its selector can serve.

        Raises:
            ParchGradError: if the photograph cannot be read, or a setting does not fit the network.

        Example:
            >>> Explorer().sweep(Photograph("coffee"), View(network="shapes", target=0)).values
            (0.7, 0.5, 0.3, 0.2, 0.1, 0.05)
        """
        network = self._network(view.network)
        target = self.explore(photograph, view).target.index
        edit = self._edit(network, view, (target,))
        most = 1.0
        if isinstance(edit.selector, ClassWise):
            # Compact statistics rank the best channels only.
            held = edit.selector.statistics.values()
            most = min((layer.share for layer in held if isinstance(layer, RankedLayerStatistics)), default=1.0)
        return quantile_sweep(
            network.classifier,
            photograph.read(),
            edit,
            quantiles=[quantile for quantile in QUANTILES if quantile <= most],
            target=target,
            method=view.method,
        )

    def _network(self, name: str) -> "_Network":
        return self._networks.get(name, lambda: self._load(name))

    def _load(self, name: str) -> "_Network":
        classifier = load_model(name)
        file = self._files.get(name)
        if file is not None:
            return _Network(classifier, ChannelStatistics.load(file, classifier.model), file.name)
        try:
            return _Network(classifier, ChannelStatistics.bundled(name))
        except StatisticsError:
            return _Network(classifier)

    def _inputs(self, network: "_Network", photograph: Photograph) -> Tensor:
        classifier = network.classifier
        return self._tensors.get(
            ("inputs", classifier.name, photograph.key),
            lambda: classifier.preprocess(photograph.read()).unsqueeze(0),
        )

    def _probabilities(self, network: "_Network", photograph: Photograph) -> Tensor:
        def predict() -> Tensor:
            with torch.no_grad():
                probabilities: Tensor = network.classifier.model(self._inputs(network, photograph)).softmax(dim=1)[0]
                return probabilities

        return self._tensors.get(("probabilities", network.classifier.name, photograph.key), predict)

    def _attribute(
        self, network: "_Network", view: View, inputs: Tensor, targets: tuple[int, ...], key: tuple[Hashable, ...]
    ) -> tuple[Explainer, Tensor, Tensor]:
        """The explainer, and the attributions of the inputs with ParchGrad and without it."""
        explainer = self._explainer(network, view, inputs, targets)
        plain = self._explainer(network, view, inputs, None)
        # The display does not change the attribution.
        settings = astuple(replace(view.resolved(), target=None, signed=False, opacity=1.0))
        classes = torch.tensor(targets)
        return (
            explainer,
            self._tensors.get((*key, *settings), lambda: explainer.attribute(inputs, classes)),
            self._tensors.get((*key, view.method), lambda: plain.attribute(inputs, classes)),
        )

    def _explainer(self, network: "_Network", view: View, inputs: Tensor, targets: tuple[int, ...] | None) -> Explainer:
        """The explainer of some classes under a view; the plain one for None."""
        rows = max(1, _PIXELS_PER_PASS // (inputs.shape[2] * inputs.shape[3]))
        edit = Edit(selector=None) if targets is None else self._edit(network, view, targets)
        return Explainer.from_edit(network.classifier.model, edit, method=view.method, internal_batch_size=rows)

    def _edit(self, network: "_Network", view: View, targets: tuple[int, ...]) -> Edit:
        return Edit(
            selector=self._selector(network, view, targets),
            layers=_layers(view),
            gamma=view.gamma,
            gates=view.gates,
            antialias=view.antialias,
        )

    def _selector(self, network: "_Network", view: View, targets: tuple[int, ...]) -> Selector:
        statistics = network.statistics
        if view.selector == "class" and statistics is not None:
            # The masks of all classes would take most of a second for every new quantile.
            key = (network.classifier.name, tuple(sorted(set(targets))))
            statistics = self._columns.get(key, functools.partial(statistics.restrict, classes=targets))
        with _silent(StatisticsWarning):
            return make_selector(view.selector, quantile=view.quantile, softness=view.softness, statistics=statistics)


@dataclass(frozen=True, eq=False)
class _Network:
    """A classifier with its statistics, and the name of their file unless they come with the package."""

    classifier: Classifier
    statistics: ChannelStatistics | None = None
    file: str | None = None

    def prediction(self, index: int, probabilities: Tensor) -> Prediction:
        return Prediction(index, self.classifier.categories[index], float(probabilities[index]))


class _Recent(Generic[T]):
    """Values that were asked for lately, up to a total size."""

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
        # Outside of the lock: two threads may make the same value, but none waits for another's.
        made = make()
        with self._lock:
            if key not in self._held:
                self._held[key] = made
                self._total += self._size(made)
            while self._total > self._limit and len(self._held) > 1:
                self._total -= self._size(self._held.popitem(last=False)[1])
        return made


def _layers(view: View) -> LayerChoice | None:
    return None if view.layers is None else parse_layers(view.layers)


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
    figure = draw(pictures, {title: plain, f"{title} + ParchGrad": partitioned}, labels=labels)
    top = shared_top([*plain, *partitioned])
    # A panel has opaque maps; its cells run row by row, each photograph before its two maps.
    for place, cells in enumerate(zip(pictures, plain, partitioned, strict=True)):
        for column in (1, 2):
            mixed = lay(cells[0], cells[column], top=top, opacity=view.opacity)
            figure.axes[3 * place + column].images[0].set_data(mixed)
    return figure


def _own_shares(attribution: Tensor) -> tuple[float, ...]:
    return tuple(cell_shares(heatmap(attribution), rows=ROWS, columns=COLUMNS).diagonal().tolist())


def _single_code(network: _Network, photograph: Photograph, view: View, target: int) -> str:
    """A script that gives the attribution of one photograph, and its picture, again."""
    kind = ("blend_signed", "signed_heatmap") if view.signed else ("blend", "heatmap")
    opacity = f", opacity={view.opacity:g}" if view.opacity < 1 else ""
    return f"""\
{_imports([photograph], numeric=(), visual=(kind[0], "shared_top"))}
{_explainers(network, view)}

x = classifier.preprocess({photograph.code()}).unsqueeze(0)
target = {target}  # {_comment(network.classifier.categories[target])}
attribution = explainer.attribute(x, target=target)

# Beside the plain map, on one scale.
heat = pg.{kind[1]}(attribution)[0]
plain_heat = pg.{kind[1]}(plain.attribute(x, target=target))[0]
top = shared_top([plain_heat, heat])
picture = {kind[0]}(classifier.preprocess.picture(x[0]), heat, top=top{opacity})
imsave("map.png", picture.clip(0, 1))
"""


def _game_code(network: _Network, photographs: Sequence[Photograph], view: View, targets: Sequence[int]) -> str:
    """A script that plays the grid pointing game on a mosaic again."""
    read = "".join(f"    {photograph.code()},\n" for photograph in photographs)
    names = ", ".join(_comment(network.classifier.categories[target]) for target in targets)
    return f"""\
{_imports(photographs, numeric=("import torch",), visual=())}
{_explainers(network, view)}

photographs = [
{read}]
images = torch.stack([classifier.preprocess(photograph) for photograph in photographs])
x = mosaic(images, rows={ROWS}, columns={COLUMNS})
targets = torch.tensor({list(targets)})  # {names}
x = x.expand(len(targets), -1, -1, -1)
attribution = explainer.attribute(x, target=targets)

# Share of each map in the cell of its class; a map that knows nothing has {1 / CELLS:g}.
shares = cell_shares(pg.heatmap(attribution), rows={ROWS}, columns={COLUMNS}).diagonal()
plain_shares = cell_shares(pg.heatmap(plain.attribute(x, target=targets)), rows={ROWS}, columns={COLUMNS}).diagonal()
print(f"plain {{plain_shares.mean():.2f}}, ParchGrad {{shares.mean():.2f}}")
"""


def _imports(photographs: Sequence[Photograph], *, numeric: Sequence[str], visual: Sequence[str]) -> str:
    of_others, own = list(numeric), ["import parchgrad as pg"]
    if visual:
        of_others.append("from matplotlib.image import imsave")
    if any(photograph.path is None for photograph in photographs):
        of_others += ["from PIL import Image", "from skimage import data"]
    if any(photograph.path is not None for photograph in photographs):
        own.append("from parchgrad.data.images import read_image")
    if visual:
        own.append(f"from parchgrad.visual import {', '.join(visual)}")
    else:
        own.append("from parchgrad.evaluation.localisation import cell_shares, mosaic")
    # Plain imports stand before those of names.
    return "\n".join([*sorted(of_others, key=lambda line: line.startswith("from")), "", *own, ""])


def _explainers(network: _Network, view: View) -> str:
    """The lines that load the network, and make the explainers with ParchGrad and without it."""
    lines = [f"classifier = pg.load_model({view.network!r})"]
    name, view, suits = view.selector, view.resolved(), default_edit(view.selector, softness=view.softness)
    arguments = [
        f"{setting}={value!r}"
        for setting, value in (("quantile", view.quantile), ("softness", view.softness))
        # Random channels have no softness.
        if value != default_setting(name, setting) and (setting, name) != ("softness", "random")
    ]
    if name in STATISTICAL_SELECTORS and network.statistics is not None:
        source = f"bundled({view.network!r})" if network.file is None else f"load({network.file!r}, classifier.model)"
        lines.append(f"statistics = pg.ChannelStatistics.{source}")
        kind, test = ("ClassWise", network.statistics.test) if name == "class" else ("InstanceWise", "welch")
        # Their quantile has no default, since alpha may take its place.
        arguments = ["statistics", f"quantile={view.quantile!r}", *(a for a in arguments if a.startswith("softness"))]
        arguments += [] if test == "welch" else [f"test={test!r}"]
    else:
        kind = SELECTORS_BY_NAME[name].__name__
    explained = ["classifier.model"]
    if name != View.selector or arguments:
        lines.append(f"selector = pg.{kind}({', '.join(arguments)})")
        explained.append("selector")
    method = [] if view.method == "gradient" else [f"method={view.method!r}"]
    explained += [
        f"{setting}={value!r}"
        for setting, value, usual in (
            ("layers", _layers(view), suits.layers),
            ("gamma", view.gamma, math.inf),
            ("gates", view.gates, suits.gates),
            ("antialias", view.antialias, suits.antialias),
        )
        if value != usual
    ]
    lines += [
        f"explainer = pg.Explainer({', '.join([*explained, *method])})",
        f"plain = pg.Explainer({', '.join(['classifier.model', 'None', *method])})",
    ]
    return "\n".join(lines)


def _comment(text: str) -> str:
    """A class name that stays within its line."""
    return "".join(character if character.isprintable() else " " for character in text)
