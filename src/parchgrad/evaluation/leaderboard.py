"""The methods and scores of the leaderboard: what people use, compared on the same images.

`make leaderboard` adds methods of other packages; see `benchmarks/leaderboard.py`.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from captum.attr import Occlusion
from torch import Tensor, nn

from parchgrad._io.checks import check_whole_number
from parchgrad.core.edit import DEFAULT_SELECTOR
from parchgrad.core.layers import find_convolutions, has_published_layers
from parchgrad.core.selectors import GradientEnergy, Selector
from parchgrad.errors import ModelWarning, reason_of
from parchgrad.evaluation.methods import Method, grad_cam, maps_of, random_map
from parchgrad.evaluation.report import BASELINE
from parchgrad.evaluation.scores import FAMILIES, ScoreSettings
from parchgrad.explain.explainer import Explainer
from parchgrad.explain.heatmap import heatmap
from parchgrad.explain.stability import noisy_copies
from parchgrad.statistics import ChannelStatistics
from parchgrad.statistics.selectors import ClassWise

__all__ = [
    "DEFAULT",
    "LEADERBOARD_SCORES",
    "MakeMethod",
    "leaderboard_methods",
    "methods_that_fit",
    "occlusion",
    "vargrad",
]

MakeMethod = Callable[[nn.Module], Method]
"""Makes a method for a model."""

DEFAULT = "ParchGrad"
"""Title of `Explainer(model)`, which the leaderboard compares the others with."""

LEADERBOARD_SCORES = ScoreSettings(
    families=FAMILIES,
    steps=10,
    samples=5,
    randomised=(0.1, 1.0),
    noise_draws=1,
)
"""Settings that compute all scores, in fewer passes than by default."""


def leaderboard_methods(
    model: nn.Module,
    *,
    statistics: ChannelStatistics | None = None,
    seed: int = 0,
    internal_batch_size: int = 32,
) -> dict[str, MakeMethod]:
    """List the methods of the leaderboard that need only this package and Captum, by title.

    Some fit certain networks only, such as guided backpropagation, which needs modules of type `nn.ReLU`; see
    `methods_that_fit`. Each method has its usual settings; none was tuned on the reported images.

    Args:
        model: classifier in evaluation mode, logits (B, K).
        statistics: channel statistics of the model, for the published method; None leaves it out.
        seed: random seed of random maps and noise.
        internal_batch_size: number of rows per pass, at least 1; on a CPU, a few large images at a time are fastest.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> methods = leaderboard_methods(model)
        >>> methods["occlusion"](model)(torch.rand(2, 3, 4, 4), torch.tensor([0, 1])).shape
        torch.Size([2, 4, 4])
    """
    last = list(find_convolutions(model))[-1]

    def guided_grad_cam(changed: nn.Module) -> Method:
        layer = changed.get_submodule(last)
        return explained(None, method="GuidedGradCam", layer=layer, interpolate_mode="bilinear")(changed)

    def explained(selector: Selector | None, **settings: Any) -> MakeMethod:
        return lambda changed: maps_of(
            Explainer(changed, selector, internal_batch_size=internal_batch_size, **settings)
        )

    found: dict[str, MakeMethod] = {
        BASELINE: explained(None),
        "random map": lambda changed: random_map(seed=seed),
        "input x gradient": explained(None, method="input_x_gradient"),
        "IG-25": explained(None, method="integrated_gradients", n_steps=25),
        "SmoothGrad-25": explained(None, method="smoothgrad", samples=25, seed=seed),
        "VarGrad-25": lambda changed: vargrad(changed, samples=25, seed=seed),
        "guided backpropagation": explained(None, method="GuidedBackprop"),
        "DeepLift": explained(None, method="DeepLift"),
        "Grad-CAM": lambda changed: grad_cam(changed, internal_batch_size=internal_batch_size),
        "guided Grad-CAM": guided_grad_cam,
        "occlusion": lambda changed: occlusion(changed, internal_batch_size=internal_batch_size),
        "balance": explained(None, balance=True),
        "ParchGrad, energy": explained(GradientEnergy()),
        DEFAULT: explained(DEFAULT_SELECTOR),
        f"{DEFAULT} in SmoothGrad-8": explained(DEFAULT_SELECTOR, method="smoothgrad", samples=8, seed=seed),
    }
    if statistics is not None:
        published = ClassWise(statistics, quantile=0.1, softness=0)
        layers = "published" if has_published_layers(model) else None
        found["ParchGrad, published"] = explained(published, layers=layers, conserve="independent")
    return found


def methods_that_fit(
    model: nn.Module, methods: Mapping[str, MakeMethod], images: Tensor, target: Tensor
) -> tuple[dict[str, MakeMethod], dict[str, str]]:
    """Try every method on a few images.

    Args:
        model: classifier in evaluation mode, logits (B, K).
        methods: for each title, a function that makes the method.
        images: preprocessed images (B, C, H, W) to try.
        target: class to explain in each, shape (B,).

    Returns:
        The methods that return finite maps (B, H, W), and why each of the others is left out.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> methods = leaderboard_methods(model)
        >>> fitting, left_out = methods_that_fit(model, methods, torch.rand(1, 3, 4, 4), torch.tensor([0]))
        >>> len(fitting), list(left_out)
        (11, ['guided backpropagation', 'DeepLift', 'guided Grad-CAM', 'balance'])
    """
    fitting, left_out = {}, {}
    plain = maps_of(Explainer(model, None))(images, target)
    for title, make in methods.items():
        try:
            with warnings.catch_warnings():
                # What a method warns of is said when it runs; where warnings are errors, it still fits.
                warnings.simplefilter("ignore", ModelWarning)
                heat = make(model)(images, target)
        except Exception as error:
            # Methods of other packages raise anything for networks they do not know.
            left_out[title] = reason_of(error)
            continue
        if heat.shape != plain.shape or not heat.isfinite().all():
            left_out[title] = f"its maps have shape {tuple(heat.shape)} or are not finite"
        elif title != BASELINE and torch.equal(heat, plain):
            left_out[title] = "it equals the plain gradient on this network"
        else:
            fitting[title] = make
    return fitting, left_out


def vargrad(model: nn.Module, *, samples: int = 25, sigma: float = 0.15, seed: int = 0) -> Method:
    """Make VarGrad maps: the variance of the gradient over noisy copies, averaged over colours.

    Source: Adebayo et al. (2018), "Local Explanation Methods for Deep Neural Networks Lack Sensitivity to Parameter
    Values".

    Args:
        model: classifier in evaluation mode, logits (B, K).
        samples: number of noisy copies of each image, at least 2.
        sigma: standard deviation of the noise as a share of the image's range.
        seed: random seed of the noise.

    Raises:
        SettingError: if a setting is out of range.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> vargrad(model, samples=4)(torch.rand(2, 3, 4, 4), torch.tensor([0, 1])).shape
        torch.Size([2, 4, 4])
    """
    check_whole_number("samples", samples, 2)
    explainer = Explainer(model, None)

    def method(images: Tensor, target: Tensor) -> Tensor:
        copies = noisy_copies(images, noise=sigma, draws=samples, seed=seed)
        gradients = torch.stack([explainer.attribute(copy, target) for copy in copies])
        return heatmap(gradients.var(dim=0))

    return method


def occlusion(model: nn.Module, *, share: float = 0.25, internal_batch_size: int = 32) -> Method:
    """Make occlusion maps: how much the logit falls while a square is zero, averaged over the squares on a pixel.

    The squares overlap by half; where the logit rises, the map is 0. Computed with Captum.

    Source: Zeiler, Fergus (2014), "Visualizing and Understanding Convolutional Networks", section 4.2.

    Args:
        model: classifier in evaluation mode, logits (B, K).
        share: side of the square as a share of the shorter side of the image, in (0, 1].
        internal_batch_size: number of images per forward pass.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> occlusion(model)(torch.rand(2, 3, 4, 4), torch.tensor([0, 1])).shape
        torch.Size([2, 4, 4])
    """
    explained = Occlusion(model)

    def method(images: Tensor, target: Tensor) -> Tensor:
        side = max(1, round(share * min(images.shape[2:])))
        with torch.no_grad():
            fall: Tensor = explained.attribute(
                images,
                sliding_window_shapes=(images.shape[1], side, side),
                strides=(images.shape[1], max(1, side // 2), max(1, side // 2)),
                target=target,
                perturbations_per_eval=max(1, internal_batch_size // len(images)),
            )
        return heatmap(fall.relu())

    return method
