"""Streaming, mergeable weighted moments of many groups at once. Pure functions on float64 tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Moments", "merge", "moments_of_labels", "moments_of_weights"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Moments:
    """Moments of C channels in each of G groups, in float64.

    Attributes:
        weight: sum of the sample weights, shape (G,).
        square: sum of the squared weights, shape (G,); equals `weight` for weights of zero or one.
        mean: weighted mean, shape (G, C); zero in a group without weight.
        m2: weighted sum of squared deviations from that mean, shape (G, C).
    """

    weight: Tensor
    square: Tensor
    mean: Tensor
    m2: Tensor

    @property
    def effective_count(self) -> Tensor:
        """Effective number of samples per group (Kish 1965), shape (G,): `weight**2 / square`; zero without weight."""
        return torch.where(self.square > 0, self.weight.square() / self.square, 0.0)

    @property
    def variance(self) -> Tensor:
        """Unbiased variance, shape (G, C), for reliability weights: `m2 / (weight - square / weight)`.

        NaN for groups with at most one effective sample.
        """
        freedom = self.weight - self.square / self.weight
        return self.m2 / torch.where(self.effective_count > 1, freedom, torch.nan).unsqueeze(1)


def moments_of_labels(values: Tensor, labels: Tensor, groups: int) -> Moments:
    """Compute moments of samples that each belong to one group.

    Args:
        values: samples (B, C).
        labels: group of each sample, shape (B,), integer in [0, groups).
        groups: number of groups G.

    Example:
        >>> moments_of_labels(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1]), 3).mean.flatten()
        tensor([2., 5., 0.], dtype=torch.float64)
    """
    values = values.double()
    weight = torch.bincount(labels, minlength=groups).double()
    zeros = values.new_zeros(groups, values.shape[1])
    mean = zeros.index_add(0, labels, values) / weight.clamp(min=1).unsqueeze(1)
    m2 = zeros.index_add(0, labels, (values - mean[labels]).square())
    return Moments(weight=weight, square=weight, mean=mean, m2=m2)


def moments_of_weights(values: Tensor, weights: Tensor) -> Moments:
    """Compute moments of samples weighted in every group.

    Args:
        values: samples (B, C).
        weights: weight of each sample in each group, in [0, 1], shape (B, G).

    Example:
        >>> moments = moments_of_weights(torch.tensor([[0.0], [4.0]]), torch.tensor([[0.5, 1.0], [0.5, 0.0]]))
        >>> moments.mean.flatten(), moments.effective_count
        (tensor([2., 0.], dtype=torch.float64), tensor([2., 1.], dtype=torch.float64))
    """
    values, weights = values.double(), weights.double()
    weight, square = weights.sum(0), weights.square().sum(0)
    # Deviations from a common centre avoid cancellation in the squares.
    centre = values.mean(0)
    deviations = values - centre
    safe = torch.where(weight > 0, weight, torch.ones_like(weight)).unsqueeze(1)
    offset = weights.T @ deviations / safe
    m2 = (weights.T @ deviations.square() - weight.unsqueeze(1) * offset.square()).clamp(min=0)
    mean = torch.where(weight.unsqueeze(1) > 0, centre + offset, torch.zeros_like(offset))
    return Moments(weight=weight, square=square, mean=mean, m2=m2)


def merge(first: Moments, second: Moments) -> Moments:
    """Combine the moments of two disjoint sets of samples (Chan, Golub, LeVeque 1979).

    Example:
        >>> labels = torch.tensor([0])
        >>> parts = [moments_of_labels(torch.tensor([[value]]), labels, 1) for value in (1.0, 4.0)]
        >>> merge(*parts).mean, merge(*parts).m2
        (tensor([[2.5000]], dtype=torch.float64), tensor([[4.5000]], dtype=torch.float64))
    """
    weight = first.weight + second.weight
    share = torch.where(weight > 0, second.weight / weight, torch.zeros_like(weight)).unsqueeze(1)
    difference = second.mean - first.mean
    return Moments(
        weight=weight,
        square=first.square + second.square,
        mean=first.mean + difference * share,
        m2=first.m2 + second.m2 + difference.square() * (first.weight.unsqueeze(1) * share),
    )
