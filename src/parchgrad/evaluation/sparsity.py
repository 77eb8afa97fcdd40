"""Sparsity of attribution maps."""

import math

import torch
from torch import Tensor

from parchgrad.errors import InputError

__all__ = ["gini"]


def gini(heat: Tensor) -> Tensor:
    """Gini index of a map: 0 if all pixels are equal, near 1 if one pixel has all the mass.

    It measures how sparse a map is, not how correct.

    Source: Chalasani et al. (2020), "Concise Explanations of Neural Networks using Adversarial Training", section 2,
    after Hurley and Rickard (2009), "Comparing Measures of Sparsity".

    Args:
        heat: non-negative maps (B, H, W).

    Returns:
        Index in [0, 1), shape (B,), float64; NaN for a map that is zero everywhere or not finite.

    Raises:
        InputError: if a map has negative values.

    Example:
        >>> gini(torch.tensor([[[1.0, 1.0]], [[0.0, 1.0]], [[0.0, 0.0]]]))
        tensor([0.0000, 0.5000,    nan], dtype=torch.float64)
    """
    if (heat < 0).any():
        raise InputError("`heat` contains negative values. Take the magnitude with heatmap() first.")
    values = heat.double().flatten(1).sort(dim=1).values
    # Scale by the maximum, since sums of huge values overflow and those of tiny ones underflow.
    values = values / values[:, -1:]
    count = values.shape[1]
    weights = 2 * torch.arange(1, count + 1, device=heat.device, dtype=torch.float64) - count - 1
    index = (values * weights).sum(dim=1) / (count * values.sum(dim=1))
    return index.masked_fill(~heat.flatten(1).isfinite().all(dim=1), math.nan)
