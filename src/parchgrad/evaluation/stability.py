"""Stability: does the heat map stay the same under imperceptible noise?

Unlike max-sensitivity, the cosine and the rank correlation ignore the scale of a map; the ratio of norms measures the
change of scale alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parchgrad._io.checks import check_whole_number, is_number
from parchgrad.errors import SettingError
from parchgrad.evaluation.methods import Method
from parchgrad.evaluation.sanity import spearman
from parchgrad.explain.stability import cosine, noisy_copies

__all__ = ["NOISES", "Stability", "check_noises", "stability"]

NOISES = (1e-4, 1e-3, 1e-2)
"""Default noise levels: standard deviations as shares of the image's range."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Stability:
    """How much the heat maps of noisy copies differ from the map of the image, averaged over the copies.

    Attributes:
        noises: noise levels, as shares of the image's range.
        cosine: mean cosine in [-1, 1], shape (len(noises), B), float64; NaN where a map is zero everywhere or not
            finite.
        spearman: mean rank correlation in [-1, 1], same shape; NaN where a map is constant or not finite.
        norm_ratio: mean ratio of the larger to the smaller Euclidean norm, at least 1, same shape; NaN where a map is
            zero everywhere or not finite.
    """

    noises: tuple[float, ...]
    cosine: Tensor
    spearman: Tensor
    norm_ratio: Tensor


def stability(
    method: Method,
    images: Tensor,
    target: Tensor,
    *,
    noises: Sequence[float] = NOISES,
    draws: int = 4,
    seed: int = 0,
    internal_batch_size: int = 32,
) -> Stability:
    """Compare the heat map of each image with those of noisy copies, for the same class.

    Every noise level scales the same random numbers.

    Args:
        method: the method to test.
        images: images (B, C, H, W).
        target: class of each image, shape (B,).
        noises: standard deviations of the Gaussian noise as shares of each image's range, positive.
        draws: number of noisy copies per image and level, at least 1.
        seed: random seed of the noise.
        internal_batch_size: largest number of images in one call of the method, at least 1.

    Returns:
        Similarities per level and image.

    Raises:
        SettingError: if a setting is out of range.
        InputError: if the images are not a floating-point batch.

    Example:
        >>> images = torch.linspace(0, 1, 32).reshape(2, 1, 4, 4)
        >>> found = stability(lambda images, target: images.mean(1), images, torch.tensor([0, 1]), noises=(0.001, 0.1))
        >>> bool((found.cosine[0] > found.cosine[1]).all()), bool((found.norm_ratio > 1).all())
        (True, True)
    """
    check_noises(noises)
    check_whole_number("internal_batch_size", internal_batch_size, 1)
    clean = _maps(method, images, target, internal_batch_size)
    similarities = []
    for noise in noises:
        copies = noisy_copies(images, noise=noise, draws=draws, seed=seed).flatten(0, 1)
        noisy = _maps(method, copies, target.repeat(draws), internal_batch_size)
        repeated = clean.repeat(draws, *[1] * (clean.dim() - 1))
        measured = (cosine(repeated, noisy), spearman(repeated, noisy), _norm_ratio(repeated, noisy))
        similarities.append(torch.stack([values.reshape(draws, len(images)).mean(dim=0) for values in measured]))
    cosines, correlations, ratios = torch.stack(similarities, dim=1)
    return Stability(noises=tuple(noises), cosine=cosines, spearman=correlations, norm_ratio=ratios)


def check_noises(noises: Sequence[float]) -> None:
    """Raise `SettingError` unless these are noise levels: at least one, each positive and finite.

    Example:
        >>> check_noises((0.001, 0.0))
        Traceback (most recent call last):
        parchgrad.errors.SettingError: `noises` is (0.001, 0.0). Pass one or more positive, finite noise levels.
    """
    if not len(noises) or not all(is_number(noise) and 0 < noise < math.inf for noise in noises):
        raise SettingError(f"`noises` is {noises!r}. Pass one or more positive, finite noise levels.")


def _maps(method: Method, images: Tensor, target: Tensor, internal_batch_size: int) -> Tensor:
    parts = zip(torch.split(images, internal_batch_size), torch.split(target, internal_batch_size), strict=True)
    return torch.cat([method(part, classes).detach() for part, classes in parts])


def _norm_ratio(first: Tensor, second: Tensor) -> Tensor:
    """Ratio of the larger to the smaller norm, shape (B,), float64."""
    (peak, norm), (other_peak, other_norm) = (_peak_and_norm(maps.double().flatten(1)) for maps in (first, second))
    ratio = (peak / other_peak) * (norm / other_norm)
    return torch.maximum(ratio, 1 / ratio)


def _peak_and_norm(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Peak magnitude of each row, and the norm relative to it, which is NaN where a row is zero or not finite."""
    peak = maps.abs().amax(dim=1)
    return peak, torch.linalg.vector_norm(maps / peak.unsqueeze(1), dim=1)
