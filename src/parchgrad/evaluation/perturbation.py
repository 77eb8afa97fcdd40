"""Perturbation scores: does a classifier's probability fall when pixels with high attribution are replaced?

Pixels are replaced with the most relevant first (MoRF) or the least relevant first (LeRF). If a map is right, the
probability falls fast under MoRF and slowly under LeRF. Maps that are constant or not finite score NaN.

Sources: Samek et al. (2017), "Evaluating the Visualization of What a Deep Neural Network Has Learned" (AOPC); Chen et
al. (2019), "L-Shapley and C-Shapley" (log-odds); Petsiuk, Das, Saenko (2018), "RISE" (insertion, deletion); Bluecher,
Vielhaben, Strodthoff (2024), "Decoupling Pixel Flipping and Occlusion Strategy for Consistent XAI Benchmarks" (SRG).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from parchgrad._io.checks import check_whole_number
from parchgrad._io.extras import needs_extra
from parchgrad.errors import InputError, SettingError
from parchgrad.explain.outputs import Logits

with needs_extra("evaluation"):
    from torchvision.transforms.functional import gaussian_blur

__all__ = [
    "RATIOS",
    "Order",
    "Replacement",
    "Responses",
    "accuracy",
    "area_under_curve",
    "deletion",
    "even_steps",
    "fractional_difference",
    "has_order",
    "insertion",
    "log_odds",
    "perturb",
    "probability_drop",
    "rank_pixels",
    "replacement_images",
    "respond",
    "symmetric_relevance_gain",
]

Order = Literal["morf", "lerf"]
Replacement = Literal["zero", "mean", "blur", "noise"]
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Default shares of the pixels that are replaced."""

# Sigma as a share of the shorter side, wide enough to hide the content.
_BLUR = 0.05


@dataclass(frozen=True, eq=False, kw_only=True)
class Responses:
    """A classifier's responses to images with growing shares of their pixels replaced.

    Attributes:
        ratios: the R shares, in [0, 1].
        target: target class of each image, shape (B,).
        clean_target: log probability of `target` on the original image, shape (B,).
        clean_predicted: log probability of the class predicted on the original image, shape (B,).
        of_target: log probability of `target` at each share, shape (B, R).
        of_predicted: log probability of the originally predicted class at each share, shape (B, R).
        predicted: class predicted at each share, shape (B, R).
        valid: whether the image's map gives an order, shape (B,).
    """

    ratios: tuple[float, ...]
    target: Tensor
    clean_target: Tensor
    clean_predicted: Tensor
    of_target: Tensor
    of_predicted: Tensor
    predicted: Tensor
    valid: Tensor


def rank_pixels(heat: Tensor, *, order: Order = "morf", seed: int = 0) -> Tensor:
    """Rank the pixels by relevance.

    Args:
        heat: maps (B, H, W).
        order: `"morf"` gives rank 0 to the most relevant pixel, `"lerf"` to the least relevant.
        seed: random seed for ties, which break the same way in every map of that size.

    Returns:
        Ranks 0 to H * W - 1, shape (B, H, W), integer.

    Raises:
        SettingError: if `order` is unknown.
        InputError: if the maps do not have shape (B, H, W).

    Example:
        >>> rank_pixels(torch.tensor([[[0.1, 0.9], [0.5, 0.2]]]))
        tensor([[[3, 0],
                 [1, 2]]])
    """
    if order not in get_args(Order):
        raise SettingError(f"`order` is {order!r}, but it must be one of {', '.join(get_args(Order))}.")
    if heat.dim() != 3:
        raise InputError(f"`heat` has shape {tuple(heat.shape)}, but it must be (B, H, W); see heatmap().")
    flat = heat.flatten(1)
    shuffled = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(seed), device="cpu").to(
        heat.device
    )
    best_first = shuffled[flat[:, shuffled].argsort(dim=1, descending=order == "morf", stable=True)]
    places = torch.arange(flat.shape[1], device=heat.device).expand_as(best_first)
    return torch.empty_like(best_first).scatter_(1, best_first, places).reshape(heat.shape)


def replacement_images(images: Tensor, replacement: Replacement, *, seed: int = 0) -> Tensor:
    """Make the images that replaced pixels are taken from.

    Args:
        images: preprocessed images (B, C, H, W).
        replacement: `"zero"`, the mean colour of normalised images; `"mean"`, each channel's mean; `"blur"`, a Gaussian
            blur with a sigma of a twentieth of the shorter side; `"noise"`, Gaussian noise with each channel's mean and
            standard deviation, from the same random numbers for every image.
        seed: random seed of the noise.

    Returns:
        Images (B, C, H, W).

    Raises:
        SettingError: if `replacement` is unknown.

    Example:
        >>> replacement_images(torch.tensor([[[[1.0, 3.0]]]]), "mean")
        tensor([[[[2., 2.]]]])
    """
    if replacement == "zero":
        return torch.zeros_like(images)
    mean = images.mean(dim=(2, 3), keepdim=True)
    if replacement == "mean":
        return mean.expand_as(images)
    if replacement == "blur":
        sigma = _BLUR * min(images.shape[2:])
        # Three sigmas on either side, within the limit of reflection padding.
        reach = min(math.ceil(3 * sigma), min(images.shape[2:]) - 1)
        # One direction after the other, since torchvision convolves with the whole square kernel.
        across: Tensor = gaussian_blur(images, [2 * reach + 1, 1], [sigma] * 2)
        blurred: Tensor = gaussian_blur(across, [1, 2 * reach + 1], [sigma] * 2)
        return blurred
    if replacement == "noise":
        noise = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(seed), device="cpu").to(images)
        return mean + noise * images.std(dim=(2, 3), keepdim=True)
    raise SettingError(f"`replacement` is {replacement!r}, but it must be one of {', '.join(get_args(Replacement))}.")


def perturb(images: Tensor, replaced_by: Tensor, ranks: Tensor, ratios: Tensor) -> Tensor:
    """Replace a share of the pixels of each image, lowest ranks first.

    Args:
        images: images (B, C, H, W).
        replaced_by: source of the replaced pixels, shape (B, C, H, W).
        ranks: rank of each pixel, shape (B, H, W); see `rank_pixels`.
        ratios: share for each image, in [0, 1], shape (B,), rounded to whole pixels.

    Returns:
        Images (B, C, H, W).

    Example:
        >>> image, ranks = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]), torch.tensor([[[3, 0, 1, 2]]])
        >>> perturb(image, torch.zeros_like(image), ranks, torch.tensor([0.5]))
        tensor([[[[1., 0., 0., 4.]]]])
    """
    counts = (ratios.double() * ranks[0].numel()).round()
    return torch.where((ranks < counts.reshape(-1, 1, 1)).unsqueeze(1), replaced_by, images)


def respond(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    heat: Tensor,
    *,
    order: Order = "morf",
    ratios: Sequence[float] = RATIOS,
    replacement: Replacement = "zero",
    seed: int = 0,
    internal_batch_size: int = 32,
) -> Responses:
    """Run a classifier on images with growing shares of their pixels replaced.

    Args:
        model: classifier in evaluation mode, logits (B, K).
        images: preprocessed images (B, C, H, W).
        target: explained class of each image, shape (B,).
        heat: maps (B, H, W), larger for more relevant pixels; may be signed.
        order: which pixels are replaced first; see `rank_pixels`.
        ratios: shares of the pixels that are replaced, in [0, 1].
        replacement: what replaces them; see `replacement_images`.
        seed: random seed for ties and noise.
        internal_batch_size: number of images per forward pass.

    Returns:
        The classifier's responses.

    Raises:
        SettingError: if a setting is out of range.
        InputError: if images, maps and classes do not match.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)).eval()
        >>> model[1].weight.data = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
        >>> image = torch.ones(1, 1, 2, 2)
        >>> found = respond(model, image, torch.tensor([0]), torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]), ratios=[0.25])
        >>> found.clean_target.exp(), found.of_target.exp()
        (tensor([0.9526], dtype=torch.float64), tensor([[0.7311]], dtype=torch.float64))
    """
    _check(images, target, heat, ratios)
    ranks = rank_pixels(heat, order=order, seed=seed)
    replaced_by = replacement_images(images, replacement, seed=seed)
    shares = torch.tensor(ratios, device=images.device, dtype=torch.float64)
    with torch.no_grad():
        clean = torch.cat([_log_probabilities(model, part) for part in torch.split(images, internal_batch_size)])
        classes = torch.stack((target, clean.argmax(dim=1)), dim=1)
        asked, predicted = [], []
        rows = torch.arange(len(images) * len(shares), device=images.device)
        for part in torch.split(rows, internal_batch_size):
            row = part.div(len(shares), rounding_mode="floor")
            given = perturb(images[row], replaced_by[row], ranks[row], shares[part % len(shares)])
            found = _log_probabilities(model, given)
            asked.append(found.gather(1, classes[row]))
            predicted.append(found.argmax(dim=1))
    of_target, of_predicted = torch.cat(asked).reshape(len(images), len(shares), 2).unbind(2)
    clean_target, clean_predicted = clean.gather(1, classes).unbind(1)
    return Responses(
        ratios=tuple(ratios),
        target=target,
        clean_target=clean_target,
        clean_predicted=clean_predicted,
        of_target=of_target,
        of_predicted=of_predicted,
        predicted=torch.cat(predicted).reshape(len(images), len(shares)),
        valid=has_order(heat),
    )


def deletion(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    heat: Tensor,
    *,
    steps: int = 20,
    replacement: Replacement = "zero",
    seed: int = 0,
    internal_batch_size: int = 32,
) -> Tensor:
    """Area under the probability curve while pixels are deleted, the most relevant first; lower is better.

    Source: Petsiuk, Das, Saenko (2018), "RISE", section 4.

    Args:
        model: classifier in evaluation mode, logits (B, K).
        images: preprocessed images (B, C, H, W).
        target: explained class of each image, shape (B,).
        heat: maps (B, H, W).
        steps: number of equal steps, at least 1.
        replacement: what replaces deleted pixels; see `replacement_images`.
        seed: random seed for ties and noise.
        internal_batch_size: number of images per forward pass.

    Returns:
        Areas in [0, 1], shape (B,); NaN where the map gives no order.

    Raises:
        SettingError: if a setting is out of range.
        InputError: if images, maps and classes do not match.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2)).eval()
        >>> _ = model[1].weight.data.zero_(), model[1].bias.data.zero_()
        >>> deletion(model, torch.ones(1, 1, 1, 2), torch.tensor([0]), torch.tensor([[[1.0, 0.0]]]), steps=2)
        tensor([0.5000], dtype=torch.float64)
    """
    found = respond(
        model,
        images,
        target,
        heat,
        ratios=even_steps(steps),
        replacement=replacement,
        seed=seed,
        internal_batch_size=internal_batch_size,
    )
    return area_under_curve(found)


def insertion(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    heat: Tensor,
    *,
    steps: int = 20,
    replacement: Replacement = "blur",
    seed: int = 0,
    internal_batch_size: int = 32,
) -> Tensor:
    """Area under the probability curve while pixels are inserted, the most relevant first; higher is better.

    Inserting the most relevant pixels leaves the others deleted, so this is `deletion` with the reversed map and the
    same arguments. The image starts as `replacement`.

    Source: Petsiuk, Das, Saenko (2018), "RISE", section 4.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2)).eval()
        >>> _ = model[1].weight.data.zero_(), model[1].bias.data.zero_()
        >>> insertion(model, torch.ones(1, 1, 1, 2), torch.tensor([0]), torch.tensor([[[1.0, 0.0]]]), steps=2)
        tensor([0.5000], dtype=torch.float64)
    """
    # As float64, maps of unsigned integers can be negated too.
    reversed_heat = -heat.double()
    return deletion(
        model,
        images,
        target,
        reversed_heat,
        steps=steps,
        replacement=replacement,
        seed=seed,
        internal_batch_size=internal_batch_size,
    )


def probability_drop(responses: Responses) -> Tensor:
    """Drop in the probability of the target class at each share; its mean over the shares is the AOPC.

    Higher is better for MoRF, lower for LeRF.

    Returns:
        `p(x) - p(x_r)` in [-1, 1], shape (B, R), float64; NaN where the map gives no order.

    Source: Samek et al. (2017), equation 12, with probabilities.
    """
    drop = responses.clean_target.exp().unsqueeze(1) - responses.of_target.exp()
    return _where_valid(drop, responses)


def log_odds(responses: Responses) -> Tensor:
    """Logarithm of the ratio of the target's probability after replacement to before, at each share.

    Lower is better for MoRF, higher for LeRF.

    Returns:
        `log(p(x_r) / p(x))`, shape (B, R), float64; NaN where the map gives no order.

    Source: Chen et al. (2019), "L-Shapley and C-Shapley", section 5.
    """
    return _where_valid(responses.of_target - responses.clean_target.unsqueeze(1), responses)


def accuracy(responses: Responses) -> Tensor:
    """Whether the target class is predicted at each share, 0 or 1.

    If the targets are labels, the mean is the accuracy. Lower is better for MoRF, higher for LeRF.

    Returns:
        Shape (B, R), float64; NaN where the map gives no order.
    """
    return _where_valid((responses.predicted == responses.target.unsqueeze(1)).double(), responses)


def fractional_difference(responses: Responses) -> Tensor:
    """Share of the predicted class's probability that is lost at each share of pixels.

    Higher is better for MoRF, lower for LeRF.

    Returns:
        `1 - p(x_r) / p(x)`, at most 1, shape (B, R), float64; NaN where the map gives no order.
    """
    kept = (responses.of_predicted - responses.clean_predicted.unsqueeze(1)).exp()
    return _where_valid(1 - kept, responses)


def area_under_curve(responses: Responses) -> Tensor:
    """Area under the target's probability over the shares, by the trapezoidal rule, divided by their range.

    Returns:
        Shape (B,), float64, in [0, 1]; NaN where the map gives no order.

    Raises:
        SettingError: if there are fewer than two shares, or they do not ascend.
    """
    ratios = torch.tensor(responses.ratios, dtype=torch.float64, device=responses.target.device)
    if len(ratios) < 2 or not bool((ratios.diff() > 0).all()):
        raise SettingError(
            f"`ratios` is {responses.ratios}, but an area needs at least two ratios, in ascending order."
        )
    area = torch.trapezoid(responses.of_target.exp(), ratios, dim=1) / (ratios[-1] - ratios[0])
    return _where_valid(area, responses)


def symmetric_relevance_gain(morf: Responses, lerf: Responses) -> Tensor:
    """Area between the probability curves of LeRF and MoRF (SRG); higher is better, and 0 for a random order.

    Unlike one curve alone, it ranks methods much the same whatever replaces the pixels.

    Source: Bluecher, Vielhaben, Strodthoff (2024), "Decoupling Pixel Flipping and Occlusion Strategy for Consistent XAI
    Benchmarks", with probabilities.

    Args:
        morf: responses with the most relevant pixels replaced first; shares from 0 to 1 give the full area.
        lerf: responses with the least relevant replaced first, at the same shares.

    Returns:
        Area under `lerf` minus area under `morf`, shape (B,), float64, in [-1, 1]; NaN where the map gives no order.

    Raises:
        SettingError: if the shares differ, do not ascend, or are fewer than two.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False)).eval()
        >>> model[1].weight.data = torch.tensor([[9.0, 0.0], [0.0, 0.0]])
        >>> given = (model, torch.ones(1, 1, 1, 2), torch.tensor([0]), torch.tensor([[[1.0, 0.0]]]))
        >>> curves = [respond(*given, order=order, ratios=even_steps(2)) for order in ("morf", "lerf")]
        >>> symmetric_relevance_gain(*curves)
        tensor([0.2499], dtype=torch.float64)
    """
    if morf.ratios != lerf.ratios:
        raise SettingError("`morf` and `lerf` have different ratios. Replace the same shares of the pixels in both.")
    return area_under_curve(lerf) - area_under_curve(morf)


def even_steps(steps: int) -> tuple[float, ...]:
    """Shares from 0 to 1 in equal steps.

    Raises:
        SettingError: if `steps` is not a whole number of at least 1.

    Example:
        >>> even_steps(4)
        (0.0, 0.25, 0.5, 0.75, 1.0)
    """
    check_whole_number("steps", steps, 1)
    return tuple(step / steps for step in range(steps + 1))


def has_order(heat: Tensor) -> Tensor:
    """Whether each map of (B, H, W) is finite and not constant, shape (B,)."""
    flat = heat.flatten(1)
    return flat.isfinite().all(dim=1) & (flat != flat[:, :1]).any(dim=1)


def _log_probabilities(model: nn.Module, images: Tensor) -> Tensor:
    logits: Tensor = Logits(model, None)(images)
    return logits.double().log_softmax(dim=1)


def _where_valid(values: Tensor, responses: Responses) -> Tensor:
    return values.masked_fill(~responses.valid.reshape(-1, *[1] * (values.dim() - 1)), math.nan)


def _check(images: Tensor, target: Tensor, heat: Tensor, ratios: Sequence[float]) -> None:
    if not ratios or not all(0 <= ratio <= 1 for ratio in ratios):
        raise SettingError(f"`ratios` is {tuple(ratios)}, but it must be shares of the pixels, in [0, 1].")
    if images.dim() != 4 or heat.shape != (images.shape[0], *images.shape[2:]):
        raise InputError(
            f"`images` has shape {tuple(images.shape)} and `heat` has shape {tuple(heat.shape)}. Pass images "
            "(B, C, H, W) and maps (B, H, W) of the same size."
        )
    if target.shape != images.shape[:1] or target.is_floating_point():
        raise InputError(
            f"`target` is {target.dtype} of shape {tuple(target.shape)}, but it must be one class index for each of "
            f"the {images.shape[0]} images."
        )
