"""Sanity checks: a map should depend on the trained weights and the class, but not on imperceptible noise.

Sources: Adebayo et al. (2018), "Sanity Checks for Saliency Maps"; Sixt, Granz, Landgraf (2020), "When Explanations Lie:
Why Many Modified BP Attributions Fail".
"""

import copy
import math
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from captum.metrics import sensitivity_max
from scipy.stats import rankdata
from torch import Tensor, nn

from parchgrad._io.checks import check_whole_number
from parchgrad._io.extras import needs_extra
from parchgrad.errors import InputError, LayerError, SettingError
from parchgrad.evaluation.methods import Method

with needs_extra("evaluation"):
    from skimage.metrics import structural_similarity

__all__ = [
    "RandomisationOrder",
    "RandomisationStep",
    "class_similarity",
    "max_sensitivity",
    "parameter_randomisation",
    "randomised_models",
    "spearman",
    "structural_similarities",
]

RandomisationOrder = Literal["top_down", "bottom_up", "independent"]


@dataclass(frozen=True, eq=False, kw_only=True)
class RandomisationStep:
    """Similarity of maps before and after weights were randomised.

    Attributes:
        module: name of the module that was randomised last.
        seed: random seed of the weights.
        spearman: rank correlation of the maps, in [-1, 1], shape (B,).
        structural_similarity: structural similarity of the maps, in [-1, 1], shape (B,).
    """

    module: str
    seed: int
    spearman: Tensor
    structural_similarity: Tensor


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Rank correlation of two maps, with average ranks for ties.

    Args:
        first: maps (B, H, W).
        second: maps of the same shape.

    Returns:
        Correlations in [-1, 1], shape (B,), float64; NaN where one map is constant or not finite.

    Raises:
        InputError: if the shapes differ.

    Example:
        >>> spearman(torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[1.0, 3.0, 2.0]]]))
        tensor([0.5000], dtype=torch.float64)
    """
    _check_pair(first, second)
    flat = torch.stack((first, second)).flatten(2).cpu().double()
    ranks = torch.from_numpy(rankdata(flat.numpy(), axis=2))
    centred = ranks - ranks.mean(dim=2, keepdim=True)
    found: Tensor = (centred[0] * centred[1]).sum(dim=1) / centred.square().sum(dim=2).sqrt().prod(dim=0)
    return found.masked_fill(~flat.isfinite().all(dim=2).all(dim=0), math.nan).to(first.device)


def structural_similarities(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity (SSIM) of two maps, each divided by its maximum, computed with scikit-image.

    Source: Wang et al. (2004), "Image Quality Assessment: From Error Visibility to Structural Similarity".

    Args:
        first: non-negative maps (B, H, W).
        second: maps of the same shape.

    Returns:
        Similarities in [-1, 1], shape (B,), float64; NaN where one map is zero everywhere or not finite.

    Raises:
        InputError: if the shapes differ, or the maps are smaller than 3 x 3.

    Example:
        >>> heat = torch.rand(1, 8, 8)
        >>> structural_similarities(heat, 3 * heat).round(decimals=6)
        tensor([1.], dtype=torch.float64)
    """
    _check_pair(first, second)
    if min(first.shape[1:]) < 3:
        raise InputError(
            f"The maps have shape {tuple(first.shape)}, but SSIM needs at least 3 x 3 pixels. Pass larger maps."
        )
    both = torch.stack((first, second)).cpu().double()
    scaled = (both / both.amax(dim=(2, 3), keepdim=True)).numpy()
    # The default window, or the largest odd one that fits.
    window = min(7, (min(first.shape[1:]) - 1) // 2 * 2 + 1)
    found = [
        structural_similarity(one, other, win_size=window, data_range=1.0)
        if np.isfinite(one).all() and np.isfinite(other).all()
        else math.nan
        for one, other in zip(*scaled, strict=True)
    ]
    return torch.tensor(found, dtype=torch.float64, device=first.device)


def randomised_models(
    model: nn.Module, *, order: RandomisationOrder = "top_down", seed: int = 0, modules: Sequence[str] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Copy a model and reinitialise its weights module by module, as torch initialises them.

    The orders top down and bottom up start at the last and first module and are cumulative; independent randomises one
    module at a time. Modules without `reset_parameters` have their parameters' entries shuffled.

    Args:
        model: the trained model, which stays unchanged.
        order: `"top_down"`, `"bottom_up"` or `"independent"`.
        seed: random seed of the weights.
        modules: names of the modules from the bottom up, each with its submodules; None uses every module with its own
            parameters.

    Yields:
        Name of the module that was randomised last, and the model, which later iterations may change.

    Raises:
        SettingError: if `order` is unknown.
        LayerError: if a module does not exist or has no parameters.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        >>> [name for name, _ in randomised_models(model)]
        ['3', '0']
    """
    if order not in get_args(RandomisationOrder):
        raise SettingError(f"`order` is {order!r}, but it must be one of {', '.join(get_args(RandomisationOrder))}.")
    known = dict(model.named_modules())
    names = _parametrised(model) if modules is None else list(modules)
    for name in names:
        if name not in known or not any(True for _ in known[name].parameters()):
            raise LayerError(
                f"`modules` names {name!r}, which is not a module with parameters. Pass names of the model."
            )
    working = copy.deepcopy(model)
    for name in reversed(names) if order == "top_down" else names:
        if order == "independent":
            working = copy.deepcopy(model)
        for place, module in working.get_submodule(name).named_modules():
            _randomise(module, seed=_seed_of(seed, f"{name}.{place}"))
        yield name, working


def parameter_randomisation(
    model: nn.Module,
    make_method: Callable[[nn.Module], Method],
    images: Tensor,
    target: Tensor,
    *,
    order: RandomisationOrder = "top_down",
    seeds: Sequence[int] = (0,),
    modules: Sequence[str] | None = None,
    shares: Sequence[float] | None = None,
) -> list[RandomisationStep]:
    """Compare maps of a trained model with maps after randomising its weights; lower similarity is better.

    A map that stays the same does not show what the model has learned. Methods with channel statistics may collect
    them again in `make_method` or reuse those of the trained model: report both.

    Args:
        model: the trained model, in evaluation mode.
        make_method: makes the method for a model.
        images: images (B, C, H, W).
        target: class of each image, shape (B,).
        order: see `randomised_models`.
        seeds: random seeds, with one run for each.
        modules: see `randomised_models`.
        shares: steps to compare, as shares of the modules randomised so far, in (0, 1]; None compares every step.

    Returns:
        A step for each seed and each module or share, in order.

    Raises:
        SettingError: if `order` is unknown, or a share is out of range.
        LayerError: if a module does not exist.

    Example:
        >>> import parchgrad as pg
        >>> from parchgrad.evaluation.methods import maps_of
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> images, target = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
        >>> steps = parameter_randomisation(model, lambda m: maps_of(pg.Explainer(m, None)), images, target)
        >>> [step.module for step in steps]
        ['3', '0']
    """
    if shares is not None and not all(0 < share <= 1 for share in shares):
        raise SettingError(f"`shares` is {tuple(shares)}, but it must be shares of the modules, in (0, 1].")
    before = make_method(model)(images, target)
    names = _parametrised(model) if modules is None else list(modules)
    places = range(len(names)) if shares is None else [math.ceil(share * len(names)) - 1 for share in shares]
    steps = []
    for seed in seeds:
        found = {}
        for place, (name, changed) in enumerate(randomised_models(model, order=order, seed=seed, modules=names)):
            if place in places:
                after = make_method(changed)(images, target)
                found[place] = RandomisationStep(
                    module=name,
                    seed=seed,
                    spearman=_kept_order(before, after),
                    structural_similarity=structural_similarities(before, after),
                )
        steps += [found[place] for place in places]
    return steps


def max_sensitivity(
    method: Method,
    images: Tensor,
    target: Tensor,
    *,
    radius: float = 0.02,
    samples: int = 10,
    seed: int = 0,
    internal_batch_size: int = 32,
) -> Tensor:
    """Largest relative change of a map under uniform noise on the image, computed with Captum; lower is better.

    Source: Yeh et al. (2019), "On the (In)fidelity and Sensitivity of Explanations", definition 3.

    Args:
        method: the method to test.
        images: images (B, C, H, W).
        target: class of each image, shape (B,).
        radius: bound of the noise, in units of the preprocessed image, positive.
        samples: number of noisy copies of each image, at least 1.
        seed: random seed of the noise, which is the same for every image.
        internal_batch_size: number of noisy images per call of the method, but at least the number of images.

    Returns:
        `max |map(x + noise) - map(x)| / |map(x)|`, shape (B,), float64; NaN where the map is zero everywhere.

    Raises:
        SettingError: if `radius` or `samples` is out of range.

    Example:
        >>> max_sensitivity(lambda images, target: images[:, 0] * 0 + 1, torch.rand(2, 3, 4, 4), torch.tensor([0, 1]))
        tensor([0., 0.], dtype=torch.float64)
    """
    if not radius > 0:
        raise SettingError(f"`radius` is {radius}, but it must be positive.")
    check_whole_number("samples", samples, 1)
    generator = torch.Generator().manual_seed(seed)

    def perturbed(inputs: tuple[Tensor, ...] | Tensor, within: float) -> tuple[Tensor, ...]:
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        # Copies of one image are consecutive; every image gets the same noise.
        shape = (len(given[0]) // len(images), *images.shape[1:])
        noise = within * (2 * torch.rand(shape, generator=generator, device="cpu", dtype=torch.float64) - 1)
        return tuple(part + noise.repeat(len(images), *[1] * (part.dim() - 1)).to(part) for part in given)

    def explain(inputs: tuple[Tensor, ...] | Tensor, target: Tensor) -> tuple[Tensor]:
        rows = inputs[0] if isinstance(inputs, tuple) else inputs
        # Captum repeats the targets of several images, but not that of a single one. In float64, the squares of tiny
        # gradients do not underflow.
        return (method(rows, target.expand(len(rows))).double(),)

    found: Tensor = sensitivity_max(
        explain,
        images,
        perturb_func=perturbed,
        perturb_radius=radius,
        n_perturb_samples=samples,
        target=target,
        # Captum needs at least one copy of each image, and no more than there are.
        max_examples_per_batch=min(max(internal_batch_size, len(images)), samples * len(images)),
    )
    clean = method(images, target).flatten(1)
    return found.masked_fill((clean == 0).all(dim=1), math.nan)


def class_similarity(
    method: Method, images: Tensor, target: Tensor, heat: Tensor, *, classes: int, seed: int = 0
) -> Tensor:
    """Rank correlation of a map with the map of another class of the same image; lower is better.

    The other class is a random number of classes further, the same number for every image.

    Source: Sixt, Granz, Landgraf (2020), the random logit test, with the rank correlation instead of SSIM.

    Args:
        method: the method to test.
        images: images (B, C, H, W).
        target: explained class of each image, shape (B,).
        heat: maps of `target`, shape (B, H, W).
        classes: number of classes, at least 2.
        seed: random seed of the other class.

    Returns:
        Correlations in [-1, 1], shape (B,), float64; 0 where only the map of the other class is constant, NaN where
        `heat` is constant or a map is not finite.

    Raises:
        SettingError: if `classes` is below 2.

    Example:
        >>> images, target = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
        >>> def method(images, target):
        ...     return images[:, 0]
        >>> class_similarity(method, images, target, images[:, 0], classes=3).round(decimals=6)
        tensor([1., 1.], dtype=torch.float64)
    """
    check_whole_number("classes", classes, 2)
    step = torch.randint(1, classes, (), generator=torch.Generator().manual_seed(seed), device="cpu").item()
    return _kept_order(heat, method(images, (target + int(step)) % classes).detach())


def _kept_order(before: Tensor, after: Tensor) -> Tensor:
    """Rank correlation (B,) of maps before and after a change; 0 where only the map after it is constant."""
    constant = [(maps == maps.flatten(1)[:, :1, None]).flatten(1).all(dim=1) for maps in (before, after)]
    found = spearman(before, after)
    return found.masked_fill(~constant[0] & constant[1] & before.isfinite().flatten(1).all(dim=1), 0.0)


def _parametrised(model: nn.Module) -> list[str]:
    """Names of the modules that have parameters of their own."""
    return [name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]


# Serialises use of the global random generators.
_DRAWING = threading.Lock()


def _randomise(module: nn.Module, *, seed: int) -> None:
    """Randomise the parameters of a module, but not of its submodules."""
    if not any(True for _ in module.parameters(recurse=False)):
        return
    reset = getattr(module, "reset_parameters", None)
    with torch.no_grad():
        if callable(reset):
            devices = {parameter.device for parameter in module.parameters() if parameter.is_cuda}
            # torch's initialisation uses the global generators, which all threads share.
            with _DRAWING, torch.random.fork_rng(devices=sorted(devices, key=str)):
                torch.manual_seed(seed)
                reset()
            return
        generator = torch.Generator().manual_seed(seed)
        for parameter in module.parameters(recurse=False):
            order = torch.randperm(parameter.numel(), generator=generator, device="cpu").to(parameter.device)
            parameter.copy_(parameter.flatten()[order].reshape(parameter.shape))


def _seed_of(seed: int, name: str) -> int:
    return zlib.crc32(f"{seed}/{name}".encode())


def _check_pair(first: Tensor, second: Tensor) -> None:
    if first.dim() != 3 or first.shape != second.shape:
        raise InputError(
            f"Maps of shapes {tuple(first.shape)} and {tuple(second.shape)} cannot be compared. Pass two batches of "
            "maps (B, H, W) of the same size."
        )
