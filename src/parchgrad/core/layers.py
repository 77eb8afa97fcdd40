"""Finding, naming and choosing the convolutions of a model."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import TypeAlias, TypeGuard

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from parchgrad._io.checks import is_number
from parchgrad.core.paths import exact_ratio
from parchgrad.errors import LayerError, ModelError

__all__ = [
    "Convolution",
    "LayerChoice",
    "bare_model",
    "check_evaluation_mode",
    "check_model",
    "find_convolutions",
    "has_published_layers",
    "last_layers",
    "parse_layers",
    "resolve_layers",
]

Convolution: TypeAlias = (
    nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
)
LayerChoice: TypeAlias = str | float | Sequence[str] | Sequence[nn.Module]


def check_model(model: nn.Module) -> None:
    """Raise `ModelError` unless `model` is a module."""
    if not isinstance(model, nn.Module):
        inner = getattr(model, "model", None)
        hint = "Pass its .model" if isinstance(inner, nn.Module) else "Pass the network itself"
        raise ModelError(f"The model is a {type(model).__name__}, but a torch.nn.Module is needed. {hint}.")


def bare_model(model: nn.Module) -> nn.Module:
    """Unwrap a DistributedDataParallel model, whose own passes wait for weight gradients.

    Raises:
        ModelError: if `model` is not a module, or is wrapped in DataParallel.

    Example:
        >>> model = nn.Conv1d(1, 4, 1)
        >>> bare_model(model) is model
        True
    """
    check_model(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel):
            place = f"model.{name}" if name else "model"
            raise ModelError(
                f"DataParallel ({place}) copies its module in every pass, which bypasses hooks. Use {place}.module "
                "instead, with one process per device as in DistributedDataParallel."
            )
    inside: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return inside


def check_evaluation_mode(model: nn.Module) -> None:
    """Raise `ModelError` unless `model` is a module and all of it is in evaluation mode."""
    check_model(model)
    if any(module.training for module in model.modules()):
        name = next(name for name, module in model.named_modules() if module.training)
        part = f"{type(model).__name__} (in {name!r})" if name else type(model).__name__
        raise ModelError(f"{part} is in training mode, which makes its output depend on the batch. Call model.eval().")


def find_convolutions(model: nn.Module) -> dict[str, Convolution]:
    """Find every convolution of a model in module order: Conv1d to 3d, transposed ones, and torchvision's DeformConv2d.

    Subclasses are included. A convolution registered under two names is listed under its first.

    Raises:
        ModelError: if the model has no convolution.

    Example:
        >>> list(find_convolutions(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))))
        ['0', '2']
    """
    model = bare_model(model)
    convolutions = {name: module for name, module in model.named_modules() if _is_convolution(module)}
    if not convolutions and any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ModelError(
            f"{type(model).__name__} has no convolution outside of TorchScript, which hooks cannot reach. Pass the "
            "model from before torch.jit."
        )
    if not convolutions:
        raise ModelError(
            f"{type(model).__name__} has no convolution, so there are no channels to partition. Use a convolutional "
            "network, or the plain method (selector=None)."
        )
    return convolutions


def _is_convolution(module: nn.Module) -> TypeGuard[Convolution]:
    """Whether a module is a convolution; deformable ones have the same attributes, but no common class."""
    if isinstance(module, Convolution):
        return True
    kinds = ((kind.__module__, kind.__name__) for kind in type(module).__mro__)
    return ("torchvision.ops.deform_conv", "DeformConv2d") in kinds


def resolve_layers(model: nn.Module, layers: LayerChoice) -> frozenset[str] | Fraction:
    """Check a choice of layers; return their names, or a ratio whose layers depend on a pass (see `choose_layers`).

    Raises:
        LayerError: if a pattern matches nothing, a ratio is out of range, a module is not a convolution of the model,
            or the paper has no layer set for it.
        ModelError: if the model has no convolution, or only those that cut patches for a transformer.

    Example:
        >>> model = nn.Sequential(*[nn.Conv1d(4, 4, 3) for _ in range(4)])
        >>> sorted(resolve_layers(model, ["0", "[23]"])), resolve_layers(model, 0.5), resolve_layers(model, "all")
        (['0', '2', '3'], Fraction(1, 2), Fraction(1, 1))
    """
    convolutions = find_convolutions(model)
    if (isinstance(layers, str) and layers in ("published", "all")) or is_number(layers):
        # Layers that are named explicitly are taken as given.
        _check_more_than_patches(model, convolutions)
    if isinstance(layers, bool) or layers is None:
        raise _not_a_choice(layers)
    if is_number(layers):
        return exact_ratio(float(layers))
    if isinstance(layers, str):
        if layers == "all":
            return Fraction(1)
        if layers == "published":
            return frozenset(_published(model, convolutions))
        return frozenset(_matching(convolutions, [layers]))
    if not isinstance(layers, Sequence):
        raise _not_a_choice(layers)
    patterns = [choice for choice in layers if isinstance(choice, str)]
    modules = [choice for choice in layers if isinstance(choice, nn.Module)]
    if len(patterns) == len(layers) > 0:
        return frozenset(_matching(convolutions, patterns))
    if len(modules) == len(layers) > 0:
        return frozenset(_named(convolutions, modules))
    raise _not_a_choice(layers)


def _check_more_than_patches(model: nn.Module, convolutions: Mapping[str, Convolution]) -> None:
    """Raise `ModelError` for transformers and mixers, whose convolutions only cut the image into patches."""
    cuts = all(module.kernel_size == module.stride and max(module.kernel_size) > 1 for module in convolutions.values())
    if len(convolutions) > 1:
        # A chain of halving convolutions is a convolutional network, unless layers normalise tokens in between.
        cuts = cuts and any(
            re.search("layer_?norm|rms_?norm", type(m).__name__, re.IGNORECASE) for m in model.modules()
        )
    else:
        (only,) = convolutions.values()
        # Patches may overlap. Users may assign a convolution one stride for all dimensions.
        step, side = only.stride if isinstance(only.stride, int) else min(only.stride), max(only.kernel_size)
        cuts = side > 1 and (step == side or (step >= _STEP_OF_PATCHES and 2 * step > side))
    if cuts and sum(isinstance(module, nn.Linear) for module in model.modules()) > _LINEAR_LAYERS_OF_A_HEAD:
        raise ModelError(
            f"{type(model).__name__} is not a convolutional network: its only convolutions "
            f"({', '.join(list(convolutions)[:3])}{', ...' if len(convolutions) > 3 else ''}) cut the image into "
            "patches, and their channels do not decide the class. Use a convolutional network, the plain method "
            "(selector=None), or name the layers explicitly."
        )


# As many as VGG and AlexNet have; patch networks with more count as transformers or mixers.
_LINEAR_LAYERS_OF_A_HEAD = 3
# Overlapping convolutions with a smaller stride are ordinary ones.
_STEP_OF_PATCHES = 4


def parse_layers(text: str) -> str | float | list[str]:
    """Parse a typed layer choice: a ratio, the name of a set, or comma-separated patterns.

    Example:
        >>> parse_layers("0.5"), parse_layers("all"), parse_layers("layer3.*, conv1")
        (0.5, 'all', ['layer3.*', 'conv1'])
    """
    try:
        return float(text)
    except ValueError:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        return parts[0] if len(parts) == 1 else parts


def _not_a_choice(layers: object) -> LayerError:
    return LayerError(
        f"`layers` is {layers!r}, but it must be 'all', 'published', a ratio in (0, 1], "
        "a non-empty list of name patterns, or a non-empty list of convolution modules."
    )


def last_layers(convolutions: Mapping[str, Convolution], ratio: float) -> list[str]:
    """Name the last `int(ratio * n)` of n convolutions in module order, at least one, as the research code does.

    Raises:
        LayerError: if the ratio is not in (0, 1].

    Example:
        >>> last_layers(find_convolutions(nn.Sequential(*[nn.Conv1d(4, 4, 3) for _ in range(4)])), 0.5)
        ['2', '3']
    """
    names = list(convolutions)
    return names[len(names) - max(1, int(exact_ratio(ratio) * len(names))) :]


def _published(model: nn.Module, convolutions: dict[str, Convolution]) -> list[str]:
    published = _published_names(model, convolutions)
    if not published:
        raise LayerError(
            f"The paper has no layer set for {type(model).__name__}, only for the {', '.join(_FAMILIES)} families. "
            "Pass a ratio such as layers=0.5, 'all', or name patterns."
        )
    return published


def _matching(convolutions: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Names that match any of the patterns; every pattern must match."""
    names = list(convolutions)
    chosen: list[str] = []
    for pattern in patterns:
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            near = _near(pattern, ["all", "published", *names])
            raise LayerError(
                f"The layer pattern {pattern!r} matches none of the {len(names)} convolutions. "
                f"Similar names: {', '.join(near)}."
            )
        chosen += matches
    return chosen


def _near(pattern: str, names: list[str]) -> list[str]:
    """Return up to five names that the user may have meant: those below the pattern, else similar ones."""
    stem = pattern.rstrip("*").rstrip(".")
    below = [name for name in names if name.startswith(stem + ".")] if stem else []
    if below:
        return [f"{stem}.*", *below[:4]]
    return difflib.get_close_matches(pattern, names, n=5, cutoff=0.3) or names[-5:]


def _named(convolutions: dict[str, Convolution], modules: Sequence[nn.Module]) -> list[str]:
    names = {id(module): name for name, module in convolutions.items()}
    for module in modules:
        if id(module) not in names:
            raise LayerError(
                f"`layers` contains a {type(module).__name__} that is not a convolution of this model. Pass "
                "convolutions of the model itself."
            )
    return [names[id(module)] for module in modules]


def has_published_layers(model: nn.Module) -> bool:
    """Whether the paper has a layer set for this network.

    Example:
        >>> has_published_layers(nn.Sequential(nn.Conv1d(4, 4, 3)))
        False
    """
    return bool(_published_names(bare_model(model), find_convolutions(model)))


def _published_names(model: nn.Module, convolutions: dict[str, Convolution]) -> list[str]:
    """Published layer set of the model's family; empty if there is none."""
    for prefix, module in model.named_modules():
        # The network may be inside a wrapper, for example one that normalises the input.
        family = next((parent.__name__ for parent in type(module).__mro__ if parent.__name__ in _FAMILIES), None)
        if family is not None:
            start = f"{prefix}." if prefix else ""
            inside = {name.removeprefix(start): conv for name, conv in convolutions.items() if name.startswith(start)}
            chosen = [start + name for name in _FAMILIES[family](inside)]
            if chosen:
                return chosen
    return []


def _resnet_names(convolutions: dict[str, Convolution]) -> list[str]:
    """Block convolutions of the last two stages, without downsampling and squeeze-and-excitation."""
    return [name for name in convolutions if re.fullmatch(r"layer[34]\.\d+\.conv\d+(\.conv)?", name)]


def _vgg_names(convolutions: dict[str, Convolution]) -> list[str]:
    features = {name: module for name, module in convolutions.items() if name.startswith("features.")}
    return last_layers(features, 0.5) if features else []


def _efficientnet_names(convolutions: dict[str, Convolution]) -> list[str]:
    """First depthwise convolution of each of the last two stages, and the head; empty if a variant lacks one."""
    depthwise = [name for name, module in convolutions.items() if module.groups == module.in_channels > 1]
    # torchvision counts the stem as features[0], timm does not: features[6] is blocks[5].
    for *stages, head in (
        ("features.6.0.", "features.7.0.", "features.8.0"),
        ("blocks.5.0.", "blocks.6.0.", "conv_head"),
    ):
        firsts = [next((name for name in depthwise if name.startswith(stage)), None) for stage in stages]
        found = [name for name in (*firsts, head) if name is not None and name in convolutions]
        if len(found) == 3:
            return found
    return []


_FAMILIES: Mapping[str, Callable[[dict[str, Convolution]], list[str]]] = {
    "ResNet": _resnet_names,
    "VGG": _vgg_names,
    "EfficientNet": _efficientnet_names,
}
