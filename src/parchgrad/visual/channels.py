"""Channels: how one responds to a class and to the rest, and which were kept."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import Tensor, nn

from parchgrad.errors import InputError, SettingError
from parchgrad.layers import LayerChoice
from parchgrad.partition import Conserve
from parchgrad.recording import record_selections
from parchgrad.selection import Selector
from parchgrad.visual.charts import LIGHT, Curve, Theme, histogram_chart, stacked_chart

__all__ = ["KeptChannels", "gap_histogram", "kept_channels"]


def gap_histogram(
    gaps: ArrayLike, in_class: ArrayLike, *, channel: str = "channel", category: str = "class", theme: Theme = LIGHT
) -> Figure:
    """Draw how a channel responds to the images of a class and to the rest, with the p-value that `ClassWise` ranks by.

    Args:
        gaps: the channel's GAP in each image, its mean over space of relu(output), shape (N,); see `collect_gaps`.
        in_class: whether each image is of the class, boolean, shape (N,).
        channel: name of the channel.
        category: name of the class.
        theme: colours.

    Returns:
        A figure whose title gives the one-sided p-value of Welch's t-test: the mean over the class is larger.

    Raises:
        InputError: if the two do not match, values are not finite, or a side has fewer than two images.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> gaps = np.concatenate([generator.normal(2, 1, 20), generator.normal(0, 1, 200)])
        >>> figure = gap_histogram(gaps, np.arange(220) < 20, channel="conv_head, channel 7", category="espresso")
        >>> figure.axes[0].get_title()
        'conv_head, channel 7: p = 4.6e-09'
    """
    values, chosen = np.asarray(gaps, dtype=np.float64), np.asarray(in_class)
    if values.ndim != 1 or chosen.shape != values.shape or chosen.dtype != np.bool_:
        raise InputError(
            f"GAPs of shape {values.shape} and a choice of images of shape {chosen.shape} and type {chosen.dtype} do "
            "not match; give numbers and booleans, both (N,)."
        )
    if not np.isfinite(values).all():
        raise InputError(f"The GAPs of {channel} hold NaN or infinite values; look for where they began.")
    inside, rest = values[chosen], values[~chosen]
    if min(inside.size, rest.size) < 2:
        raise InputError(
            f"{inside.size} images of {category} and {rest.size} others cannot be compared; give two of each at least."
        )
    if inside.std() == 0 == rest.std():
        # As for the statistics, a channel without variance says nothing.
        p = 1.0
    else:
        p = float(stats.ttest_ind(inside, rest, equal_var=False, alternative="greater").pvalue)
    return histogram_chart(
        {category: inside, "all other images": rest},
        x_label="GAP: mean over space of relu(output)",
        y_label="share of the images",
        title=f"{channel}: p = {p:.2g}",
        theme=theme,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class KeptChannels:
    """Which channels were kept in the layers of a network, for one class or two.

    Attributes:
        layers: names of the convolutions, from input to output; one that is passed twice has two entries.
        channels: number of channels of each, (L,).
        categories: names of the T explained classes, one or two.
        count: channels that were kept and had a gradient, (T, L).
        energy_share: share of the layer's gradient energy, the sum of squares, in the kept channels, (T, L); NaN where
            the layer has none.
        overlap: channels kept for both classes as a share of those kept for either, (L,); NaN where none are kept, and
            None for one class.
    """

    layers: tuple[str, ...]
    channels: NDArray[np.int64]
    categories: tuple[str, ...]
    count: NDArray[np.int64]
    energy_share: NDArray[np.float64]
    overlap: NDArray[np.float64] | None

    def figure(self, *, theme: Theme = LIGHT) -> Figure:
        """Draw share of the channels, share of the energy, and overlap, over the layers."""
        places = list(range(1, len(self.layers) + 1))

        def curves(values: NDArray[Any]) -> list[Curve]:
            return [
                Curve(label=category, x=places, y=row.tolist(), colour=number)
                for number, (category, row) in enumerate(zip(self.categories, values, strict=True))
            ]

        rows = {
            "channels kept": curves(self.count / self.channels),
            "energy kept": curves(self.energy_share),
        }
        if self.overlap is not None:
            both = Curve(label="kept for both, of those kept for either", x=places, y=self.overlap.tolist(), colour=2)
            rows["overlap"] = [both]
        figure = stacked_chart(rows, x_label="convolution, from the first edited one to the last", theme=theme)
        for axes in figure.axes:
            axes.set_ylim(-0.04, 1.04)
        return figure


def kept_channels(
    model: nn.Module,
    selector: Selector,
    inputs: Tensor,
    targets: Sequence[int],
    *,
    categories: Sequence[str] | None = None,
    layers: LayerChoice = "default",
    gamma: float = math.inf,
    conserve: Conserve = "independent",
) -> KeptChannels:
    """Find which channels are kept in each layer for one class, or for two of which the overlap is asked.

    Args:
        model: classifier in evaluation mode, logits (B, K).
        selector: which channels matter.
        inputs: one preprocessed image, shape (1, C, *S).
        targets: one class index, or two.
        categories: their names; None takes "class" and the index.
        layers: which convolutions are edited; see `choose_layers`.
        gamma: see `partition_gradient`.
        conserve: see `partition_gradient`.

    Raises:
        InputError: if there is not one image.
        SettingError: if there are not one or two classes, or as many names.
        ParchGradError: whatever `Explainer` raises.

    Example:
        >>> import parchgrad as pg
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)).eval()
        >>> found = kept_channels(model, pg.GradientEnergy(quantile=0.25), torch.rand(1, 3, 4, 4), [0, 1])
        >>> found.layers, found.count.tolist()
        (('0',), [[2], [2]])
    """
    if inputs.shape[0] != 1:
        raise InputError(f"The inputs have shape {tuple(inputs.shape)}, but kept channels are of one image (1, C, *S).")
    names = tuple(categories) if categories is not None else tuple(f"class {index}" for index in targets)
    if len(targets) not in (1, 2) or len(names) != len(targets):
        raise SettingError(
            f"{len(targets)} targets and {len(names)} categories are given, but one class or two can be looked at."
        )
    # One row for each class: the image twice.
    batch = inputs.expand(len(targets), *inputs.shape[1:])
    found = record_selections(
        model, selector, batch, list(targets), layers=layers, gamma=gamma, conserve=conserve
    )[::-1]  # fmt: skip
    kept = [record.kept.cpu().numpy() for record in found]
    energy = [_energy(record.channel_norms) for record in found]
    with np.errstate(invalid="ignore"):
        shares = [(part * mask).sum(axis=1) / part.sum(axis=1) for part, mask in zip(energy, kept, strict=True)]
        overlap = [mask.all(axis=0).sum() / np.float64(mask.any(axis=0).sum()) for mask in kept]
    return KeptChannels(
        layers=tuple(record.layer for record in found),
        channels=np.array([mask.shape[1] for mask in kept]),
        categories=names,
        count=np.stack([mask.sum(axis=1) for mask in kept], axis=1),
        energy_share=np.stack(shares, axis=1),
        overlap=np.array(overlap) if len(targets) == 2 else None,
    )


def _energy(norms: Tensor) -> NDArray[np.float64]:
    """Energy of each channel (B, C), by the strongest channel of its row: squares of small norms would vanish."""
    peaks = norms.amax(dim=1, keepdim=True)
    unit = norms / torch.where(peaks > 0, peaks, torch.ones_like(peaks))
    energy: NDArray[np.float64] = unit.double().cpu().numpy() ** 2
    return energy
