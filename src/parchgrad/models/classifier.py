"""A network with its preprocessing and class names."""

import copy
import difflib
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from parchgrad._io.checks import check_kind, check_whole_number, is_whole_number
from parchgrad.core.targets import check_logits, pick_logits
from parchgrad.data.preprocessing import Preprocessing, as_preprocessing
from parchgrad.errors import ModelError, SettingError, TargetError
from parchgrad.explain.outputs import Logits, check_batch

__all__ = [
    "Classifier",
    "Prediction",
    "check_classifier",
    "find_category",
    "is_improbable",
    "label_of",
    "name_against",
]

_IMPROBABLE = 0.05


@dataclass(frozen=True)
class Prediction:
    """One predicted class: its index, name and softmax probability in [0, 1].

    Example:
        >>> print(Prediction(index=967, category="espresso", probability=0.983))
        espresso (98%)
    """

    index: int
    category: str
    probability: float

    def __str__(self) -> str:
        """Return name and probability."""
        return f"{self.category} ({self.probability:.0%})"


@dataclass(frozen=True, eq=False, repr=False)
class Classifier:
    """A network in evaluation mode with all that is needed to classify images.

    Attributes:
        model: the network, which returns logits (B, K) or an output with them, except for `shapes_segmenter` and
            `shapes_detector`.
        preprocess: the network's preprocessing; also `weights.transforms()` of torchvision, a composition of
            transforms, or an image processor of Hugging Face, which `as_preprocessing` converts.
        categories: names of the K classes.
        name: name of the network, as passed to `load_model`.
        synsets: WordNet ids of the K classes, which name ImageNet's folders; empty if the classes have none.
        logits: extracts the logits (B, K) from an unusual output, in a copy of `model` that shares its layers; None
            leaves that to `find_logits`.

    Raises:
        ModelError: if `model` is not a module.
        SettingError: if the preprocessing is of another kind, `categories` is a string, or `logits` is no function.

    Example:
        >>> import parchgrad as pg
        >>> classifier = pg.load_model("efficientnet_lite0")
        >>> classifier.find_category("espresso"), classifier.categories[872], classifier.synsets[872]
        (967, 'tripod', 'n04485082')
        >>> classifier
        Classifier(efficientnet_lite0: EfficientNet, 1000 classes)
    """

    model: nn.Module
    preprocess: Preprocessing
    categories: tuple[str, ...]
    name: str
    synsets: tuple[str, ...] = ()
    logits: InitVar[Callable[[Any], Tensor] | None] = None

    def __post_init__(self, logits: Callable[[Any], Tensor] | None) -> None:
        check_kind("`model`", self.model, nn.Module, "Pass the network", error=ModelError)
        object.__setattr__(self, "preprocess", as_preprocessing(self.preprocess))
        if isinstance(self.categories, str):
            raise SettingError("`categories` is a string, but it must be a sequence of names. Pass one name per class.")
        object.__setattr__(self, "categories", tuple(str(name) for name in self.categories))
        check_logits(logits)
        if logits is not None:
            object.__setattr__(self, "model", _returning(self.model, logits))

    def __str__(self) -> str:
        """Return name, network and number of classes."""
        return f"{self.name}: {type(self.model).__name__}, {len(self.categories)} classes"

    def __repr__(self) -> str:
        return f"Classifier({self})"

    def find_category(self, query: str | int) -> int:
        """Find a class by its index or case-insensitive name.

        Raises:
            TargetError: if no class, or more than one, has that name.
        """
        return find_category(query, self.categories, self.name)

    def predict(self, inputs: Tensor, *, count: int = 5) -> list[tuple[Prediction, ...]]:
        """Predict the `count` most probable classes per row of a preprocessed batch (B, 3, H, W), best first.

        Raises:
            InputError: if the inputs are not a finite floating-point batch, or do not fit the model.
            ModelError: if the number of class names does not match the logits.
            SettingError: if `count` is not a positive whole number.
        """
        check_whole_number("count", count, 1)
        check_batch(inputs)
        with torch.no_grad():
            logits = Logits(self.model, None)(inputs)
            if logits.shape[1] != len(self.categories):
                raise ModelError(
                    f"{self.name} has {logits.shape[1]} classes, but `categories` has {len(self.categories)} names. "
                    "Pass one per class."
                )
            # Rank by logits, since probabilities of nearly equal logits tie.
            best = logits.sort(dim=1, descending=True, stable=True).indices[:, :count]
            probabilities = logits.softmax(dim=1).gather(1, best)
        return [
            tuple(Prediction(i, self.categories[i], p) for i, p in zip(indices, row, strict=True))
            for indices, row in zip(best.tolist(), probabilities.tolist(), strict=True)
        ]


def _returning(model: nn.Module, logits: Callable[[Any], Tensor]) -> nn.Module:
    """Copy a model without copying its layers, whose names stay the same, and let the copy return its logits."""
    copied = copy.copy(model)
    copied.forward = partial(_pick_from, model, logits)
    return copied


def _pick_from(model: nn.Module, logits: Callable[[Any], Tensor], *inputs: Any) -> Tensor:
    return pick_logits(model.forward(*inputs), logits)


def is_improbable(prediction: Prediction, classes: int) -> bool:
    """Whether a class is so improbable that its map may mislead: below 5%, or below half of chance.

    Example:
        >>> unlikely = Prediction(0, "tabby", 0.1)
        >>> is_improbable(unlikely, 2), is_improbable(unlikely, 1000)
        (True, False)
    """
    return prediction.probability < max(_IMPROBABLE, 0.5 / classes)


def check_classifier(classifier: object) -> None:
    """Raise `ModelError` unless the argument is a `Classifier`."""
    remedy = "Load one with `load_model(name)`, or wrap your network with `Classifier(...)`"
    check_kind("`classifier`", classifier, Classifier, remedy, error=ModelError)


def find_category(query: str | int, categories: Sequence[str], model: str) -> int:
    """Find a class by its index or case-insensitive name.

    Args:
        query: index or name.
        categories: names of the classes.
        model: name of the model, for error messages.

    Raises:
        TargetError: if no class, or more than one, has that name.

    Example:
        >>> find_category("Tabby", ["pug", "tabby"], "resnet18")
        1
    """
    if not is_whole_number(query):
        check_kind("The class", query, str, "Pass its name or index", error=TargetError, wanted="a name")
    query = str(query)
    if query.strip().isdecimal():
        index = int(query)
        if index < len(categories):
            return index
        raise TargetError(
            f"Class {index} is out of range. Choose one of the {len(categories)} classes of {model}, from 0 to "
            f"{len(categories) - 1}."
        )
    wanted = query.strip().casefold()
    names = [category.casefold() for category in categories]
    matches = [index for index, name in enumerate(names) if name == wanted]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise TargetError(f"{len(matches)} classes are named {query!r}. Pass one of the indices {matches}.")
    containing = [name for name in names if wanted and wanted in name]
    near = sorted(containing, key=lambda name: wanted not in name.split())[:5]
    near = near or difflib.get_close_matches(wanted, names, n=5, cutoff=0.5)
    hint = f"Close matches: {', '.join(near)}" if near else f"Pass its index, or a name such as {categories[0]!r}"
    raise TargetError(f"{model} has no class named {query!r}. {hint}.")


def name_against(
    against: int | str | None, target: int, ranked: Sequence[Prediction], categories: Sequence[str]
) -> str | None:
    """Name the class that the explained one is compared with.

    Args:
        against: index of the class, `"runner-up"` or `"rest"`; see `Contrast`. None if there is none.
        target: index of the explained class.
        ranked: the most probable classes, best first, at least two.
        categories: names of the classes.

    Example:
        >>> ranked = [Prediction(1, "pug", 0.7), Prediction(0, "tabby", 0.2)]
        >>> name_against("runner-up", 1, ranked, ["tabby", "pug"]), name_against("rest", 1, ranked, ["tabby", "pug"])
        ('tabby', 'all others')
    """
    if against == "runner-up":
        return next(prediction.category for prediction in ranked if prediction.index != target)
    if against == "rest":
        return "all others"
    return None if against is None else categories[int(against)]


def label_of(target: Prediction, against: str | None) -> str:
    r"""Label a map with its class, and with the class that it is compared with.

    Example:
        >>> label_of(Prediction(1, "pug", 0.7), "tabby")
        'pug (70%)\nrather than tabby'
    """
    return str(target) if against is None else f"{target}\nrather than {against}"
