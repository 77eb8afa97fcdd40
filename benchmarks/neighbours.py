"""Methods of other packages for the leaderboard: class activation maps of grad-cam, and LRP of zennit.

`pip install -e '.[leaderboard]'` installs both; the leaderboard leaves out what is missing.
"""

import copy
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from parchgrad.errors import MissingExtraError, ModelError
from parchgrad.evaluation.leaderboard import MakeMethod
from parchgrad.evaluation.methods import Method

# Leaf modules with parameters that epsilon-plus has rules for.
_RULED = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)


def neighbours(image: Tensor) -> dict[str, MakeMethod]:
    """List the methods of other packages by title; making one raises if its package is missing or the network unfit.

    Args:
        image: an image of the usual size (1, C, H, W), to find layers by the size of their outputs.
    """
    return {
        "Grad-CAM, last features": lambda model: _cam("GradCAM", model, feature_layers(model, image)[-1:]),
        "Grad-CAM++": lambda model: _cam("GradCAMPlusPlus", model, feature_layers(model, image)[-1:]),
        "HiResCAM": lambda model: _cam("HiResCAM", model, feature_layers(model, image)[-1:]),
        "LayerCAM": lambda model: _cam("LayerCAM", model, feature_layers(model, image)[-1:]),
        "LayerCAM, all stages": lambda model: _cam("LayerCAM", model, feature_layers(model, image)),
        "Finer-CAM": lambda model: finer_cam(model, feature_layers(model, image)[-1]),
        "LRP, epsilon-plus": lrp,
    }


def feature_layers(model: nn.Module, image: Tensor) -> list[str]:
    """Find the block that ends each stage, the first stage first, and last the last layer with feature maps.

    A stage is what has feature maps of one size, smaller than the image. A block has modules but no weights of its own.

    Args:
        model: classifier in evaluation mode.
        image: an image (1, C, H, W).

    Raises:
        ModelError: if the network has few layers with feature maps (B, C, H, W), such as a transformer.
    """
    height, width = image.shape[2:]
    found: list[tuple[str, nn.Module, int]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            # Some networks have (B, H, W, C) inside.
            spatial = (
                isinstance(output, Tensor) and output.dim() == 4 and output.shape[2] * width == output.shape[3] * height
            )
            found.append((name, module, output.shape[2] if spatial else 0))

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for each in hooks:
            each.remove()
    spatial = [place for place, (_, _, size) in enumerate(found) if size > 1]
    weighted = [place for place, (_, module, _) in enumerate(found) if _has_weights(module)]
    if not spatial or sum(place <= spatial[-1] for place in weighted) < len(weighted) / 2:
        raise ModelError(
            "Most of its layers have no feature maps (B, C, H, W), so grad-cam needs a layer and a reshaping by hand."
        )
    blocks = {size: name for name, module, size in found if 1 < size < height and _is_block(module)}
    last, _, smallest = found[spatial[-1]]
    return [*(name for size, name in sorted(blocks.items(), reverse=True) if size > smallest), last]


def _is_block(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and not _has_weights(module)


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _cam(kind: str, model: nn.Module, layers: Sequence[str]) -> Method:
    """Class activation maps of grad-cam, resized as it does; several layers are averaged."""
    package = _package("pytorch_grad_cam", "grad-cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    # The package computes gradients of the weights too, and keeps them.
    own = copy.deepcopy(model)
    modules = [own.get_submodule(name) for name in layers]

    def method(images: Tensor, target: Tensor) -> Tensor:
        with torch.enable_grad(), getattr(package, kind)(model=own, target_layers=modules) as cam:
            maps = cam(input_tensor=images, targets=[ClassifierOutputTarget(index) for index in target.tolist()])
        return torch.from_numpy(maps).to(images)

    return method


def finer_cam(model: nn.Module, layer: str) -> Method:
    """Finer-CAM of grad-cam: Grad-CAM of the class against the three most similar ones, image by image."""
    package = _package("pytorch_grad_cam", "grad-cam")
    own = copy.deepcopy(model)

    def method(images: Tensor, target: Tensor) -> Tensor:
        with torch.enable_grad(), package.FinerCAM(own, [own.get_submodule(layer)]) as cam:
            maps = [
                torch.from_numpy(cam(images[place : place + 1], target_idx=index))
                for place, index in enumerate(target.tolist())
            ]
        return torch.cat(maps).to(images)

    return method


def lrp(model: nn.Module) -> Method:
    """LRP of zennit by its composite epsilon-plus, with batch normalisation merged; the positive relevance.

    Residual sums pass the relevance on to both branches, since zennit's canonizer is for torchvision's ResNet alone.

    Raises:
        ModelError: if a layer with parameters is neither a convolution, linear, nor batch normalisation.
    """
    _package("zennit", "zennit")
    from zennit.attribution import Gradient
    from zennit.composites import EpsilonPlus

    own = _with_folded_norms(model)
    without = {
        type(module).__name__ for module in own.modules() if _has_weights(module) and not isinstance(module, _RULED)
    }
    if without:
        raise ModelError(f"Epsilon-plus has no rule for its layers of type {', '.join(sorted(without))}.")

    def method(images: Tensor, target: Tensor) -> Tensor:
        composite = EpsilonPlus()

        def start(logits: Tensor) -> Tensor:
            return torch.zeros_like(logits).scatter_(1, target.unsqueeze(1), 1.0)

        with torch.enable_grad(), Gradient(model=own, composite=composite) as attributor:
            _, relevance = attributor(images, start)
        return relevance.detach().sum(dim=1).relu()

    return method


def _with_folded_norms(model: nn.Module) -> nn.Module:
    """Copy a model and move each batch normalisation into the convolution before it.

    zennit's canonizer passes over normalisations that have modules inside, such as timm's with the rectifier.
    """
    own = copy.deepcopy(model)
    for before, norm in pairwise([module for module in own.modules() if _has_weights(module)]):
        if isinstance(before, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            mean, variance = norm.running_mean, norm.running_var
            before.weight, before.bias = fuse_conv_bn_weights(
                before.weight, before.bias, mean, variance, norm.eps, norm.weight, norm.bias
            )
            norm.eps = 0.0
            with torch.no_grad():
                for kept, value in ((mean, 0.0), (variance, 1.0), (norm.weight, 1.0), (norm.bias, 0.0)):
                    kept.fill_(value)
    return own


def versions() -> Mapping[str, str]:
    """Return the versions of the other packages that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("captum", "grad-cam", "zennit"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _package(module: str, name: str) -> Any:
    if importlib.util.find_spec(module) is None:
        raise MissingExtraError(f"{name} is not installed. Run `pip install -e '.[leaderboard]'`.")
    return importlib.import_module(module)
