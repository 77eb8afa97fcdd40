"""Load networks of one's own: from a function, or from a file of weights for a known architecture."""

import importlib.util
import json
import pickle
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from parchgrad._io.extras import needs_extra
from parchgrad._io.files import refuse_special
from parchgrad._io.tensors import SAFE_TORCH, read_tensors
from parchgrad.data.preprocessing import Preprocessing
from parchgrad.errors import InputError, ModelError, ModelWarning, WeightsError, reason_of, warn
from parchgrad.explain.outputs import Logits
from parchgrad.models.classifier import Classifier
from parchgrad.models.loading import check_model_name, load_model, timm_preprocessing

with needs_extra("models"):
    from torchvision.transforms._presets import ImageClassification

__all__ = ["check_network_name", "load_network"]

_NESTED = ("state_dict", "model_state_dict", "model")
_MOST_CLASS_BYTES = 10_000_000


def load_network(
    name: str,
    *,
    weights: str | Path | None = None,
    classes: str | Path | None = None,
    pretrained: bool = True,
) -> Classifier:
    r"""Load a classifier by name, or one of your own, in evaluation mode.

    A function is called without arguments. It returns a `Classifier`, or a module, which gets the preprocessing of its
    timm configuration, or else that of ImageNet with a warning. Its code is executed, so only name code that you trust.

    Args:
        name: a name for `load_model`, or a function: `"package.module:function"` or `"path/to/file.py:function"`.
        weights: file of the network's tensors: safetensors, or a pickle of tensors alone, such as
            `torch.save(model.state_dict(), path)` or a checkpoint with a `state_dict`. An architecture of `load_model`
            gets the number of classes in the file, and keeps the preprocessing of its pretrained weights.
        classes: file of class names: one per line, or JSON with a list or a dictionary from index to name. None keeps
            those of the network, or numbers the classes.
        pretrained: whether a network of `load_model` gets its pretrained weights, unless `weights` is given.

    Raises:
        ModelError: if there is no such model or function, the function returns neither a module nor a `Classifier`, or
            the number of class names differs from the number of classes.
        WeightsError: if the weights cannot be read, contain more than tensors, or do not fit the network.
        InputError: if the class names cannot be read.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> from torchvision.models import resnet18
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file(resnet18(num_classes=2).state_dict(), Path(folder, "parts.safetensors"))
        ...     _ = Path(folder, "classes.txt").write_text("intact\ndefect")
        ...     load_network("resnet18", weights=Path(folder, "parts.safetensors"), classes=Path(folder, "classes.txt"))
        Classifier(resnet18-parts: ResNet, 2 classes)
    """
    check_network_name(name)
    names = None if classes is None else _read_classes(Path(classes))
    state = None if weights is None else _read_weights(Path(weights))
    reference = _reference(name)
    if reference is not None:
        found = _call(name, *reference)
    elif state is None:
        found = load_model(name, pretrained=pretrained)
    else:
        found = _architecture_for(name, state)
    if weights is not None and state is not None:
        _load_state(found.model, state, Path(weights), name)
        found = replace(found, name=f"{name}-{Path(weights).stem}")
    if names is not None:
        count = len(found.categories) or _count_classes(found)
        if len(names) != count:
            raise ModelError(f"{found.name} has {count} classes, but `classes` has {len(names)} names. Pass one each.")
        found = replace(found, categories=names, synsets=())
    if not found.categories:
        found = replace(found, categories=tuple(f"class {index}" for index in range(_count_classes(found))))
    return found


def check_network_name(name: str) -> None:
    """Raise `ModelError` if `load_network` has no network of this name, without running or downloading anything."""
    reference = _reference(name) if isinstance(name, str) else None
    if reference is None:
        if isinstance(name, str) and Path(name).suffix in (".py", ".pt", ".pth", ".bin", ".ckpt", ".safetensors"):
            raise ModelError(
                f"{name!r} is a file. Name the function in it that makes the network, as in 'networks.py:make', or an "
                "architecture, and pass the file as `weights=`."
            )
        check_model_name(name)
    elif reference[0].endswith(".py") and not Path(reference[0]).is_file():
        raise ModelError(f"There is no file {reference[0]!r}. Check the path.")


def _reference(name: str) -> tuple[str, str] | None:
    """Split `"module:function"` or `"file.py:function"`; None for the name of a model."""
    place, _, function = name.rpartition(":")
    is_place = place.endswith(".py") or re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", place)
    return (place, function) if is_place and function.isidentifier() else None


def _call(name: str, place: str, function: str) -> Classifier:
    file = Path(place) if place.endswith(".py") else None
    with _importing_from(Path.cwd() if file is None else file.parent.resolve()):
        module = _import_module(place) if file is None else _import_file(file)
        make = getattr(module, function, None)
        if make is None:
            raise ModelError(f"{place!r} has no function {function!r}. Check the name.")
        made = make() if callable(make) and not isinstance(make, nn.Module) else make
    if isinstance(made, Classifier):
        made.model.eval()
        return made
    if not isinstance(made, nn.Module):
        raise ModelError(
            f"{name!r} returns a {type(made).__name__}. Return a torch.nn.Module or a parchgrad.Classifier."
        )
    names = getattr(getattr(made, "config", None), "id2label", None) or {}
    categories = tuple(str(names[index]) for index in sorted(names))
    return Classifier(made.eval(), _preprocessing_of(made, name), categories, name)


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Let modules be imported from a folder, and forget them afterwards: another network may have others so named."""
    known = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - known:
            root = name.partition(".")[0]
            origin = getattr(sys.modules.get(root), "__file__", None)
            if origin in (str(folder / f"{root}.py"), str(folder / root / "__init__.py")):
                del sys.modules[name]


def _import_file(path: Path) -> ModuleType:
    module_name = f"_parchgrad_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{str(path)!r} cannot be imported. Check its name.")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look up their module.
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ModelError(
            f"There is no module {name!r} in this folder or in an installed package. Check the name, or name the file, "
            "as in 'networks.py:make'."
        ) from error


def _preprocessing_of(model: nn.Module, name: str) -> Preprocessing:
    found = timm_preprocessing(model)
    if found is not None:
        return found
    warn(
        f"{name} returns a module without preprocessing. Images are resized to 256 pixels, cropped to 224 and "
        "normalised as for ImageNet. Return a parchgrad.Classifier with the preprocessing of its training if that "
        "differs.",
        ModelWarning,
    )
    transform = ImageClassification(crop_size=224)
    return Preprocessing(transform, tuple(transform.mean), tuple(transform.std))


def _count_classes(classifier: Classifier) -> int:
    image = classifier.preprocess(Image.new("RGB", (256, 256))).unsqueeze(0)
    image = image.to(next(classifier.model.parameters(), image))
    with torch.no_grad():
        return int(Logits(classifier.model, None)(image).shape[1])


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a network, without executing anything in the file."""
    try:
        refuse_special(path)
        if path.suffix == ".safetensors":
            return read_tensors(path)[1]
        if torch.__version__ < SAFE_TORCH:
            raise WeightsError(
                f"torch {torch.__version__} can execute code hidden in {path.name}. Update torch to {SAFE_TORCH} or "
                "later, or save the weights as safetensors."
            )
        with warnings.catch_warnings():
            # torch warns about odd files before it raises an error.
            warnings.filterwarnings("ignore", module=r"torch\.")
            held: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{str(path)!r} contains more than tensors, which could execute code. Save the tensors alone with "
            "torch.save(model.state_dict(), path), or load the file in a function of your own and name that."
        ) from error
    except (OSError, ValueError, RuntimeError, EOFError, LookupError) as error:
        raise WeightsError(f"Cannot read weights from {str(path)!r} ({reason_of(error)}). Check the file.") from error
    for key in _NESTED:
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    if not isinstance(held, Mapping) or not held or not all(isinstance(value, Tensor) for value in held.values()):
        raise WeightsError(
            f"{str(path)!r} contains no dictionary of tensors. Save one with torch.save(model.state_dict(), path)."
        )
    return {str(key): value for key, value in held.items()}


def _architecture_for(name: str, state: Mapping[str, Tensor]) -> Classifier:
    """Build an architecture with the number of classes in its weights."""
    found = load_model(name, pretrained=False)
    own = found.model.state_dict()
    fitted = _without_prefix(state, own)
    counts = {
        value.shape[0]
        for key, value in fitted.items()
        if key in own and value.shape != own[key].shape and value.shape[1:] == own[key].shape[1:]
    }
    if len(counts) != 1:
        return found
    return load_model(name, pretrained=False, num_classes=counts.pop())


def _without_prefix(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop prefixes that wrappers add to all names, such as those of DataParallel, torch.compile and Lightning."""
    found = dict(state)
    while found and all("." in key for key in found):
        firsts = {key.partition(".")[0] for key in found}
        if len(firsts) > 1 or any(key.partition(".")[0] in firsts for key in own):
            break
        found = {key.partition(".")[2]: value for key, value in found.items()}
    return found


def _load_state(model: nn.Module, state: Mapping[str, Tensor], path: Path, name: str) -> None:
    own = model.state_dict()
    fitted = _without_prefix(state, own)
    # Auxiliary heads of Inception and GoogLeNet are None after training.
    fitted = {key: value for key, value in fitted.items() if getattr(model, key.partition(".")[0], key) is not None}
    absent = [key for key in own if key not in fitted]
    strange = [key for key in fitted if key not in own]
    other = [key for key in fitted if key in own and fitted[key].shape != own[key].shape]
    found = [
        f"{title} {keys[0]!r}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
        for title, keys in (("lacks", absent), ("also has", strange), ("has another shape of", other))
        if keys
    ]
    if found:
        raise WeightsError(
            f"The weights in {path.name} do not fit {name}: the file {', '.join(found)}. Pass the network they were "
            "saved from."
        )
    model.load_state_dict(fitted)


def _read_classes(path: Path) -> tuple[str, ...]:
    """Read class names, one per line, or from JSON."""
    try:
        refuse_special(path)
        if path.stat().st_size > _MOST_CLASS_BYTES:
            raise ValueError(f"it has more than {_MOST_CLASS_BYTES:,} bytes")
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix != ".json":
            return tuple(line.strip() for line in text.splitlines() if line.strip())
        held = json.loads(text)
        if isinstance(held, dict):
            held = [held[str(index)] for index in range(len(held))]
        if not isinstance(held, list) or not all(isinstance(each, str) for each in held):
            raise ValueError("it must be a list of names, or a dictionary from index to name")
        return tuple(held)
    except KeyError as error:
        raise InputError(f"{str(path)!r} has no class {error}. Number the classes from 0 without gaps.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"Cannot read class names from {str(path)!r} ({reason_of(error)}). Check the file.") from error
