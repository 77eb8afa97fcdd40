"""Finding, naming and choosing the layers of a model that can be edited: convolutions and linear layers."""

import difflib
import fnmatch
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from fractions import Fraction
from typing import TypeAlias, TypeGuard

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from parchgrad._io.checks import is_number
from parchgrad.core.paths import exact_ratio
from parchgrad.errors import LayerError, ModelError

__all__ = [
    "LAYER_SETS",
    "Convolution",
    "Layer",
    "LayerChoice",
    "bare_model",
    "candidate_layers",
    "channel_count",
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
Layer: TypeAlias = Convolution | nn.Linear
LayerChoice: TypeAlias = str | float | Sequence[str] | Sequence[nn.Module]
LAYER_SETS = ("auto", "all", "published")
"""Names of layer choices; see `choose_layers`."""


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


def channel_count(layer: Layer) -> int:
    """Return the number of channels of a layer's output."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def resolve_layers(model: nn.Module, layers: LayerChoice) -> frozenset[str] | Fraction:
    """Check a choice of layers; return their names, or a ratio whose layers depend on a pass (see `choose_layers`).

    Raises:
        LayerError: if a pattern matches nothing, a ratio is out of range, a module is not a layer of the model, or the
            paper has no layer set for it.
        ModelError: if the model has neither convolutions nor linear layers.

    Example:
        >>> model = nn.Sequential(*[nn.Conv1d(4, 4, 3) for _ in range(4)])
        >>> sorted(resolve_layers(model, ["0", "[23]"])), resolve_layers(model, 0.5), resolve_layers(model, "all")
        (['0', '2', '3'], Fraction(1, 2), Fraction(1, 1))
    """
    model = bare_model(model)
    convolutions, linear = _layers_of(model)
    if isinstance(layers, bool) or layers is None:
        raise _not_a_choice(layers)
    if is_number(layers):
        return exact_ratio(float(layers))
    if isinstance(layers, str):
        if layers == "all":
            return Fraction(1)
        if layers == "auto":
            return Fraction(1) if _normalises_tokens(model) else Fraction(3, 4)
        if layers == "published":
            return frozenset(_published(model, convolutions))
        return frozenset(_matching(convolutions, linear, [layers]))
    if not isinstance(layers, Sequence):
        raise _not_a_choice(layers)
    patterns = [choice for choice in layers if isinstance(choice, str)]
    modules = [choice for choice in layers if isinstance(choice, nn.Module)]
    if len(patterns) == len(layers) > 0:
        return frozenset(_matching(convolutions, linear, patterns))
    if len(modules) == len(layers) > 0:
        return frozenset(_named({**convolutions, **linear}, modules))
    raise _not_a_choice(layers)


def candidate_layers(model: nn.Module, asked: frozenset[str] | Fraction) -> dict[str, Layer]:
    """Find the modules that a resolved choice chooses from: all convolutions, and the linear layers that it names.

    A network without convolutions, such as a transformer that cuts its patches itself, has all its linear layers, of
    which a ratio chooses the first on each path.

    Example:
        >>> model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(6, 6), nn.Linear(6, 6))
        >>> list(candidate_layers(model, Fraction(1))), list(candidate_layers(model, frozenset({"2"})))
        (['0'], ['0', '2'])
    """
    convolutions, linear = _layers_of(model)
    named = asked if isinstance(asked, frozenset) else frozenset()
    found = {*convolutions, *named} or set(linear)
    every: dict[str, Layer] = {**convolutions, **linear}
    return {name: every[name] for name, _ in model.named_modules() if name in found}


def _layers_of(model: nn.Module) -> tuple[dict[str, Convolution], dict[str, nn.Linear]]:
    """Convolutions and linear layers by name, in module order; one of both may be empty."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    try:
        return find_convolutions(model), linear
    except ModelError:
        if not linear:
            raise
        return {}, linear


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


def _normalises_tokens(model: nn.Module) -> bool:
    """Whether a network normalises each token or position, as transformers and ConvNeXts do, with few convolutions."""
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    return any("LayerNorm" in kind or "RMSNorm" in kind for kind in kinds)


def _not_a_choice(layers: object) -> LayerError:
    return LayerError(
        f"`layers` is {layers!r}, but it must be 'auto', 'all', 'published', a ratio in (0, 1], "
        "a non-empty list of name patterns, or a non-empty list of convolutions or linear layers."
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


def _matching(convolutions: Collection[str], linear: Collection[str], patterns: Sequence[str]) -> set[str]:
    """Names that match any of the patterns: of convolutions, or of linear layers if a pattern matches none of those."""
    chosen: set[str] = set()
    for pattern in patterns:
        matches = next(filter(None, (fnmatch.filter(names, pattern) for names in (convolutions, linear))), None)
        if matches is None:
            near = _near(pattern, [*LAYER_SETS, *convolutions, *linear])
            raise LayerError(
                f"The layer pattern {pattern!r} matches none of the {len(convolutions)} convolutions and {len(linear)} "
                f"linear layers. Similar names: {', '.join(near)}."
            )
        chosen.update(matches)
    return chosen


def _near(pattern: str, names: list[str]) -> list[str]:
    """Return up to five names that the user may have meant: those below the pattern, else similar ones."""
    stem = pattern.rstrip("*").rstrip(".")
    below = [name for name in names if name.startswith(stem + ".")] if stem else []
    if below:
        return [f"{stem}.*", *below[:4]]
    return difflib.get_close_matches(pattern, names, n=5, cutoff=0.3) or names[-5:]


def _named(layers: Mapping[str, nn.Module], modules: Sequence[nn.Module]) -> set[str]:
    names = {id(module): name for name, module in layers.items()}
    for module in modules:
        if id(module) not in names:
            raise LayerError(
                f"`layers` contains a {type(module).__name__} that is not a convolution or linear layer of this model. "
                "Pass layers of the model itself."
            )
    return {names[id(module)] for module in modules}


def has_published_layers(model: nn.Module) -> bool:
    """Whether the paper has a layer set for this network.

    Example:
        >>> has_published_layers(nn.Sequential(nn.Conv1d(4, 4, 3)))
        False
    """
    return bool(_published_names(bare_model(model), _layers_of(bare_model(model))[0]))


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
