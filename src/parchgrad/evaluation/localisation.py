"""Localisation scores: does a map point at the right place?

All functions work on batches of maps. A map that is zero everywhere, or an empty region, scores NaN.
"""

import math

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from parchgrad.errors import InputError, SettingError

__all__ = [
    "area_share",
    "boxes_to_region",
    "cell_shares",
    "centre_gaussian",
    "draw_mosaics",
    "mass_inside",
    "mosaic",
    "pointing_game",
    "weighted_mass_inside",
]


def boxes_to_region(boxes: Tensor, *, height: int, width: int) -> Tensor:
    """Mark the pixels whose centre lies in at least one box.

    Args:
        boxes: left, top, right, bottom in pixels, right and bottom exclusive, shape (N, 4).
        height: height of the map.
        width: width of the map.

    Returns:
        Boolean region (H, W), false everywhere if there are no boxes.

    Raises:
        InputError: if the boxes are not of shape (N, 4).

    Example:
        >>> boxes_to_region(torch.tensor([[0.0, 0.0, 2.0, 1.0]]), height=2, width=3)
        tensor([[ True,  True, False],
                [False, False, False]])
    """
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise InputError(f"`boxes` has shape {tuple(boxes.shape)}, but it must be (N, 4): left, top, right, bottom.")
    left, top, right, bottom = boxes.unsqueeze(2).unbind(1)
    across = torch.arange(width, device=boxes.device) + 0.5
    down = torch.arange(height, device=boxes.device) + 0.5
    columns, rows = (across > left) & (across < right), (down > top) & (down < bottom)
    return (rows.unsqueeze(2) & columns.unsqueeze(1)).any(dim=0)


def mass_inside(heat: Tensor, region: Tensor) -> Tensor:
    """Share of a map's mass that lies in a region, `mu_in`; higher is better.

    Source: Park, Jeon, Choi (2023), after Kohlbrenner et al. (2020), "Towards Best Practice in Explaining Neural
    Network Decisions with LRP", equation 7.

    Args:
        heat: non-negative maps (B, H, W).
        region: boolean regions (B, H, W).

    Returns:
        Shares in [0, 1], shape (B,), float64; NaN for a map that is zero everywhere or not finite, or an empty region.

    Raises:
        InputError: if maps and regions do not match or have no pixels, or a map has negative values.

    Example:
        >>> heat = torch.tensor([[[3.0, 1.0]], [[0.0, 0.0]]])
        >>> mass_inside(heat, torch.tensor([[[True, False]], [[True, False]]]))
        tensor([0.7500,    nan], dtype=torch.float64)
    """
    _check_regions(heat, region)
    wide = _in_parts_of_the_peak(heat)
    share = (wide * region).sum(dim=(1, 2)) / wide.sum(dim=(1, 2))
    return share.masked_fill(~_can_be_met(heat, region), math.nan)


def weighted_mass_inside(heat: Tensor, region: Tensor) -> Tensor:
    """Share of the mass in a region over its share of the area, `mu_in_w`; a uniform map scores 1.

    Source: Kohlbrenner et al. (2020), equation 8.

    Args:
        heat: non-negative maps (B, H, W).
        region: boolean regions (B, H, W).

    Returns:
        `mass_inside` times the full area over the region's, shape (B,), float64; NaN where `mass_inside` is.

    Raises:
        InputError: if maps and regions do not match or have no pixels, or a map has negative values.

    Example:
        >>> weighted_mass_inside(torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[True, False]]]))
        tensor([1.5000], dtype=torch.float64)
    """
    return mass_inside(heat, region) / area_share(region)


def area_share(region: Tensor) -> Tensor:
    """Share of the image that a region covers: the `mass_inside` of a uniform map.

    Args:
        region: boolean regions (B, H, W).

    Returns:
        Shares in [0, 1], shape (B,), float64.

    Example:
        >>> area_share(torch.tensor([[[True, False]]]))
        tensor([0.5000], dtype=torch.float64)
    """
    return region.double().mean(dim=(1, 2))


def pointing_game(heat: Tensor, region: Tensor, *, tolerance: float = 15.0) -> Tensor:
    """Whether the maximum of a map lies in a region or near it; higher is better.

    If several pixels share the maximum, the score is the share of them that hit.

    Source: Zhang et al. (2018), "Top-down Neural Attention by Excitation Backprop", section 4.1.

    Args:
        heat: non-negative maps (B, H, W).
        region: boolean regions (B, H, W).
        tolerance: Euclidean distance in pixels that still counts as a hit, at least 0; the source uses 15.

    Returns:
        Hits in [0, 1], shape (B,), float64; NaN for a map that is zero everywhere or not finite, or an empty region.

    Raises:
        InputError: if maps and regions do not match or have no pixels, or a map has negative values.
        SettingError: if `tolerance` is negative.

    Example:
        >>> heat, region = torch.tensor([[[0.0, 1.0, 0.0]]]), torch.tensor([[[True, False, False]]])
        >>> pointing_game(heat, region, tolerance=0), pointing_game(heat, region, tolerance=1)
        (tensor([0.], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    if not 0 <= tolerance < math.inf:
        raise SettingError(f"`tolerance` is {tolerance}, but it must be a number of pixels, at least 0.")
    _check_regions(heat, region)
    highest = heat == heat.amax(dim=(1, 2), keepdim=True)
    hits = (highest & _widen(region, tolerance)).sum(dim=(1, 2)).double() / highest.sum(dim=(1, 2))
    return hits.masked_fill(~_can_be_met(heat, region), math.nan)


def _widen(region: Tensor, tolerance: float) -> Tensor:
    """Add all pixels within a distance of the region. The result for an empty region is never used."""
    near = [distance_transform_edt(~own) <= tolerance for own in region.cpu().numpy()]
    return torch.from_numpy(np.stack(near)).to(region.device) if near else region


def centre_gaussian(height: int, width: int, *, sigma: float = 0.25) -> Tensor:
    """A centred Gaussian: a control, since objects tend to be in the centre of photographs.

    Args:
        height: height of the map.
        width: width of the map.
        sigma: standard deviation, as a share of height and width.

    Returns:
        Map (H, W) in (0, 1].

    Raises:
        SettingError: if `sigma` is not positive.

    Example:
        >>> centre_gaussian(1, 3)
        tensor([[0.4111, 1.0000, 0.4111]])
    """
    if not sigma > 0:
        raise SettingError(f"`sigma` is {sigma}, but it must be positive.")
    down, across = (
        ((torch.arange(size, device="cpu") + 0.5) / size - 0.5).div(sigma).square().mul(-0.5).exp()
        for size in (height, width)
    )
    return down.unsqueeze(1) * across


def draw_mosaics(
    probability: Tensor,
    labels: Tensor,
    *,
    count: int,
    cells: int = 4,
    confidence: float = 0.9,
    seed: int = 0,
) -> Tensor:
    """Choose confidently classified images for the grid pointing game, with different classes in each mosaic.

    No image is used twice.

    Source: Bohle, Fritz, Schiele (2021), section 4.

    Args:
        probability: probability of each image's own class, shape (N,).
        labels: class of each image, shape (N,).
        count: number of mosaics.
        cells: number of images per mosaic.
        confidence: minimum probability of an image's own class.
        seed: random seed.

    Returns:
        Indices of images, shape (count, cells).

    Raises:
        InputError: if there are not enough such images.

    Example:
        >>> drawn = draw_mosaics(torch.tensor([0.95, 0.5, 0.99]), torch.tensor([0, 1, 2]), count=1, cells=2)
        >>> drawn.sort().values
        tensor([[0, 2]])
    """
    generator = torch.Generator().manual_seed(seed)
    eligible = (probability >= confidence).nonzero().flatten()
    shuffled = eligible[torch.randperm(len(eligible), generator=generator, device="cpu")]
    waiting: dict[int, list[int]] = {}
    for index, label in zip(shuffled.tolist(), labels[shuffled].tolist(), strict=True):
        waiting.setdefault(label, []).append(index)
    mosaics: list[list[int]] = []
    while len(mosaics) < count and len(waiting) >= cells:
        drawn = [
            list(waiting)[place] for place in torch.randperm(len(waiting), generator=generator, device="cpu").tolist()
        ]
        # Using classes with the most images left first makes the most mosaics.
        chosen = sorted(drawn, key=lambda label: len(waiting[label]), reverse=True)[:cells]
        mosaics.append([waiting[label].pop() for label in chosen])
        waiting = {label: left for label, left in waiting.items() if left}
    if len(mosaics) < count:
        raise InputError(
            f"`count` is {count}, but only {len(mosaics)} mosaics of {cells} classes can be made: {len(eligible)} "
            f"images of {len(set(labels[eligible].tolist()))} classes have a probability of at least {confidence}. "
            "Lower `count` or `confidence`, or use images of more classes."
        )
    # Shuffle the cells: the classes with many images would always come first.
    places = torch.rand(count, cells, generator=generator, device="cpu").argsort(dim=1)
    return torch.tensor(mosaics, dtype=torch.long, device="cpu").reshape(count, cells).gather(1, places)


def _check_regions(heat: Tensor, region: Tensor) -> None:
    if heat.dim() != 3 or region.shape != heat.shape or region.dtype != torch.bool:
        raise InputError(
            f"`heat` has shape {tuple(heat.shape)} and `region` is {region.dtype} of shape {tuple(region.shape)}, but "
            "both must be (B, H, W), and `region` boolean."
        )
    _check_heat(heat)


def _check_heat(heat: Tensor) -> None:
    if heat.shape[1:].numel() == 0:
        raise InputError(f"`heat` has shape {tuple(heat.shape)}, but it must have at least one pixel.")
    if (heat < 0).any():
        raise InputError("`heat` contains negative values. Take the magnitude with heatmap() first.")


def _in_parts_of_the_peak(heat: Tensor) -> Tensor:
    """Divide maps (B, H, W) by their maximum, in float64, since sums of huge values would overflow."""
    wide = heat.double()
    return wide / wide.amax(dim=(1, 2), keepdim=True)


def _can_be_met(heat: Tensor, region: Tensor) -> Tensor:
    """Whether the map is finite and not zero, and the region not empty, shape (B,)."""
    return heat.isfinite().all(dim=(1, 2)) & (heat > 0).any(dim=(1, 2)) & region.any(dim=(1, 2))


def mosaic(images: Tensor, *, rows: int, columns: int) -> Tensor:
    """Tile images into one, the input of the grid pointing game.

    Source: Bohle, Fritz, Schiele (2021), "Convolutional Dynamic Alignment Networks for Interpretable
    Classifications", section 4.

    Args:
        images: preprocessed images (rows * columns, C, H, W), row by row.
        rows: number of rows of cells.
        columns: number of columns of cells.

    Returns:
        One input of shape (1, C, rows * H, columns * W).

    Raises:
        InputError: if the number of images is not `rows * columns`.

    Example:
        >>> mosaic(torch.arange(4.0).reshape(4, 1, 1, 1), rows=2, columns=2)
        tensor([[[[0., 1.],
                  [2., 3.]]]])
    """
    if images.dim() != 4 or images.shape[0] != rows * columns:
        raise InputError(
            f"`images` has shape {tuple(images.shape)}, but a {rows} x {columns} mosaic needs {rows * columns} images "
            "(N, C, H, W)."
        )
    _, channels, height, width = images.shape
    grid = images.reshape(rows, columns, channels, height, width)
    return grid.permute(2, 0, 3, 1, 4).reshape(1, channels, rows * height, columns * width)


def cell_shares(heat: Tensor, *, rows: int, columns: int) -> Tensor:
    """Share of a map's mass in each cell of a grid.

    Args:
        heat: non-negative maps (B, H, W); H and W are multiples of `rows` and `columns`.
        rows: number of rows of cells.
        columns: number of columns of cells.

    Returns:
        Shares (B, rows * columns), row by row, summing to 1 per map, in the maps' type (float64 for integer maps); NaN
        for a map that is zero everywhere or not finite.

    Raises:
        InputError: if the grid does not divide the map, or the map has no pixels or has negative values.

    Example:
        >>> cell_shares(torch.tensor([[[3.0, 0.0], [0.0, 1.0]]]), rows=2, columns=2)
        tensor([[0.7500, 0.0000, 0.0000, 0.2500]])
    """
    if heat.dim() != 3 or heat.shape[1] % rows or heat.shape[2] % columns:
        raise InputError(
            f"`heat` has shape {tuple(heat.shape)}, which does not divide into {rows} x {columns} cells. Pass maps "
            "(B, H, W) with a height and width that do."
        )
    _check_heat(heat)
    batch, height, width = heat.shape
    cells = (
        _in_parts_of_the_peak(heat)
        .reshape(batch, rows, height // rows, columns, width // columns)
        .sum(dim=(2, 4))
        .flatten(1)
    )
    shares = cells / cells.sum(dim=1, keepdim=True)
    shares = shares.masked_fill(~heat.isfinite().all(dim=(1, 2)).unsqueeze(1), math.nan)
    # An integer type cannot hold shares.
    return shares.to(heat.dtype) if heat.is_floating_point() else shares
