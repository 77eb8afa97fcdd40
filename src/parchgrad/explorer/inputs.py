"""What the explorer explains: an image, the settings of its view, and a loaded network."""

import math
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from PIL import Image
from torch import Tensor

from parchgrad._io.checks import check_kind
from parchgrad.core.gates import check_gates
from parchgrad.core.layers import LayerChoice, parse_layers
from parchgrad.core.selectors import check_softness
from parchgrad.data.images import opened_image, read_image, stored_frame
from parchgrad.errors import ImageError, SettingError
from parchgrad.explain.methods import METHODS
from parchgrad.explain.scores import Contrast
from parchgrad.models.classifier import Classifier, Prediction
from parchgrad.models.loading import OFFLINE_MODEL
from parchgrad.statistics import ChannelStatistics
from parchgrad.statistics.selectors import find_selector
from parchgrad.workflows.demonstration import PHOTOGRAPHS, example_photographs

__all__ = [
    "CELLS",
    "EXAMPLES",
    "GRAD_CAM",
    "ImageSource",
    "Network",
    "View",
    "check_image",
    "comparison_title",
    "method_title",
]

EXAMPLES = tuple(PHOTOGRAPHS)
"""Names of the images that come with scikit-image."""
ROWS = COLUMNS = 2
CELLS = ROWS * COLUMNS
"""Number of images in a mosaic."""
GRAD_CAM = "grad_cam"
"""Name of Grad-CAM as the third map."""
# Python expressions that load the examples.
_EXAMPLE_CODE = {name: f"data.{name}()" for name in EXAMPLES} | {"motorcycle": "data.stereo_motorcycle()[0]"}
_METHOD_TITLES = {name: name.replace("_", " ") for name in METHODS} | {"smoothgrad": "SmoothGrad"}
# Pillow reads other formats with system programs or rarely tested decoders.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")


@dataclass(frozen=True, kw_only=True)
class View:
    """Settings of an explanation and its display. None uses the selector's default.

    Attributes:
        network: name of a model; see `load_model`.
        target: class to explain; None uses the predicted one.
        against: explain the class rather than this one, `"runner-up"` or `"rest"`; see `Contrast`. None explains the
            class alone.
        selector: short name of a selector; see `find_selector`.
        method: attribution method; see `Explainer`.
        comparison: third map, beside the plain map and the ParchGrad map: `"grad_cam"`, a plain method (see
            `Explainer`), or the short name of a selector, which gets its defaults. None shows two maps only.
        layers: text of the layer choice; see `parse_layers`.
        quantile: share of the channels to keep, in (0, 1].
        softness: width of the ramp around the threshold, in [0, 1]; 0 is a hard cut. See `soft_weights`.
        gamma: factor of the kept signal relative to the rest, in (0, inf]; infinity prunes.
        gates: width of the soft gates in standard deviations, at least 0; 0 is the true derivative. See `soft_gate`.
        antialias: whether to smooth gradients at the input of strided operations; see `smooth_strides`.
        balance: whether to hold constant what makes operations nonlinear; see `Balance`.
        signed: whether to show signed maps.
        opacity: opacity of the maps over the image, in [0, 1].

    Raises:
        SettingError: if `softness`, `gates`, `antialias`, `balance` or `opacity` is out of range. `Explorer` checks
            the rest.

    Example:
        >>> view = View(selector="energy").resolved()
        >>> view.layers, view.softness, view.gates, view.antialias, view.balance
        ('0.5', 0.5, 1.0, True, True)
    """

    network: str = OFFLINE_MODEL
    target: int | None = None
    against: int | Literal["runner-up", "rest"] | None = None
    selector: str = "evidence"
    method: str = "gradient"
    comparison: str | None = GRAD_CAM
    layers: str | None = None
    quantile: float | None = None
    softness: float | None = None
    gamma: float = math.inf
    gates: float | None = None
    antialias: bool | None = None
    balance: bool | None = None
    signed: bool = False
    opacity: float = 1.0

    def __post_init__(self) -> None:
        if self.softness is not None:
            check_softness(self.softness)
        if self.gates is not None:
            check_gates(self.gates)
        for name in ("antialias", "balance"):
            if getattr(self, name) is not None:
                check_kind(f"`{name}`", getattr(self, name), bool, "Pass True, False or None", wanted="a boolean")
        if not 0 <= self.opacity <= 1:
            raise SettingError(f"`opacity` is {self.opacity}, but it must be in [0, 1].")

    @property
    def layer_choice(self) -> LayerChoice | None:
        """The parsed `layers`; None for the selector's default."""
        return None if self.layers is None else parse_layers(self.layers)

    def score(self, target: int) -> int | Contrast:
        """What to explain if `target` is the explained class: the class, or its contrast with `against`.

        Raises:
            SettingError: if `against` is the explained class, or neither a class, `"runner-up"` nor `"rest"`.
        """
        return target if self.against is None else Contrast(target=target, against=self.against)

    @property
    def titles(self) -> tuple[str, ...]:
        """Titles of the plain map, the ParchGrad map and the third map, if any.

        Example:
            >>> View().titles, View(method="smoothgrad", comparison=None).titles
            (('Gradient', 'ParchGrad', 'Grad-CAM'), ('SmoothGrad', 'SmoothGrad + ParchGrad'))
        """
        plain = method_title(self.method)
        titles = (plain, "ParchGrad" if self.method == View.method else f"{plain} + ParchGrad")
        if self.comparison is None:
            return titles
        third = comparison_title(self.comparison)
        # Another selector edits the same method.
        is_edit = self.comparison != GRAD_CAM and self.comparison not in METHODS
        return (*titles, f"{plain} + {third}" if is_edit and self.method != View.method else third)

    def with_defaults_of(self, selector: str) -> "View":
        """A view that explains the same with another selector and its default settings."""
        return View(
            network=self.network, target=self.target, against=self.against, selector=selector, method=self.method
        )

    def resolved(self) -> "View":
        """Replace every None except `target` and `against` by the selector's default.

        Raises:
            SettingError: if the selector is unknown.
        """
        suits = find_selector(self.selector).suits(self.softness)
        return replace(
            self,
            layers=str(suits.layers) if self.layers is None else self.layers,
            quantile=find_selector(self.selector).default("quantile") if self.quantile is None else self.quantile,
            softness=find_selector(self.selector).default("softness") if self.softness is None else self.softness,
            gates=suits.gates if self.gates is None else self.gates,
            antialias=suits.antialias if self.antialias is None else self.antialias,
            balance=suits.balance if self.balance is None else self.balance,
        )


def method_title(name: str) -> str:
    """Title of an attribution method.

    Example:
        >>> method_title("smoothgrad"), method_title("integrated_gradients"), method_title("DeepLift")
        ('SmoothGrad', 'Integrated gradients', 'DeepLift')
    """
    title = _METHOD_TITLES.get(name, name)
    return title[:1].upper() + title[1:]


def comparison_title(name: str) -> str:
    """Title of a third map; see `View.comparison`.

    Example:
        >>> comparison_title("grad_cam"), comparison_title("smoothgrad"), comparison_title("energy")
        ('Grad-CAM', 'Plain SmoothGrad', 'ParchGrad, gradient energy')
    """
    if name == GRAD_CAM:
        return "Grad-CAM"
    return f"Plain {_METHOD_TITLES[name]}" if name in METHODS else f"ParchGrad, {find_selector(name).title.lower()}"


@dataclass(frozen=True)
class ImageSource:
    """An image file, or one of `EXAMPLES`.

    Attributes:
        name: name of the file or example.
        path: path of the file; None for an example.

    Example:
        >>> ImageSource("coffee").read().size
        (600, 400)
    """

    name: str
    path: Path | None = None

    @property
    def key(self) -> Hashable:
        """Cache key, which changes if the file is replaced.

        Raises:
            ImageError: if the file no longer exists.
        """
        if self.path is None:
            return self.name
        try:
            state = self.path.stat()
        except OSError as error:
            raise ImageError(f"{self.name!r} no longer exists. Upload the file again.") from error
        return str(self.path), state.st_mtime_ns, state.st_size

    def read(self) -> Image.Image:
        """Read the image as RGB.

        Raises:
            ImageError: if the example or file does not exist, or the file is not a complete image.
        """
        if self.path is not None:
            with _named_alone(self.path):
                return read_image(self.path)
        if self.name not in EXAMPLES:
            raise ImageError(f"{self.name!r} is not an example. Use one of {', '.join(EXAMPLES)}.")
        return example_photographs()[EXAMPLES.index(self.name)]

    def code(self) -> str:
        """Python expression that reads the image."""
        return f"read_image({self.name!r})" if self.path else f"Image.fromarray({_EXAMPLE_CODE[self.name]})"


@dataclass(frozen=True, eq=False)
class Network:
    """A classifier with its statistics, the name of their file unless they are bundled, and the code that loads it."""

    classifier: Classifier
    statistics: ChannelStatistics | None = None
    file: str | None = None
    code: str = ""

    def prediction(self, index: int, probabilities: Tensor) -> Prediction:
        """Name a class and its probability, given those of all classes (K,)."""
        return Prediction(index, self.classifier.categories[index], float(probabilities[index]))


def check_image(path: str | Path, *, megapixels: float) -> None:
    """Check the format and size of an image file without decoding its pixels.

    Args:
        path: path of the file.
        megapixels: size limit in millions of pixels.

    Raises:
        ImageError: if the file is not an image in a common format, or is too large.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "wide.png")
        ...     Image.new("1", (4000, 1000)).save(path)
        ...     check_image(path, megapixels=4)
        ...     check_image(path, megapixels=3)
        Traceback (most recent call last):
        ...
        parchgrad.errors.ImageError: 'wide.png' has 4.0 megapixels, but the limit is 3. Scale it down first.
    """
    path = Path(path)
    with _named_alone(path):
        width, height, _ = stored_frame(path)
        with opened_image(path) as opened:
            kind = opened.format
    if kind not in _FORMATS:
        raise ImageError(f"{path.name!r} is a {kind} file. Use JPEG, PNG, WebP or another common format.")
    found = width * height / 1e6
    if found > megapixels:
        raise ImageError(
            f"{path.name!r} has {found:,.1f} megapixels, but the limit is {megapixels:g}. Scale it down first."
        )


@contextmanager
def _named_alone(path: Path) -> Iterator[None]:
    """Remove the server's folder from file names in errors."""
    try:
        yield
    except ImageError as error:
        raise ImageError(str(error).replace(repr(str(path)), repr(path.name))) from error
