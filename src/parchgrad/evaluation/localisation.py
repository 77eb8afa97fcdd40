"""Does a map point at the right place? Pure functions over batches of maps.

A map that is zero everywhere points nowhere, and an empty region can not be met: both give NaN, never a score.
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
    """Mark the pixels that lie in one of several boxes: those whose centre does.

    Args:
        boxes: left, top, right, bottom in pixels, right and bottom exclusive, shape (N, 4).
        height: of the map.
        width: of the map.

    Returns:
        Boolean region (H, W), false everywhere without a box.

    Raises:
        InputError: if the boxes are not of shape (N, 4).

    Example:
        >>> boxes_to_region(torch.tensor([[0.0, 0.0, 2.0, 1.0]]), height=2, width=3)
        tensor([[ True,  True, False],
                [False, False, False]])
    """
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise InputError(f"The boxes have shape {tuple(boxes.shape)}, but (N, 4) is needed: left, top, right, bottom.")
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
        InputError: if maps and regions do not match or have no pixels, or a map is negative somewhere.

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
    """Share of the mass in a region over the share of the area, `mu_in_w`: a map that knows nothing scores 1.

    Source: Kohlbrenner et al. (2020), equation 8.

    Args:
        heat: non-negative maps (B, H, W).
        region: boolean regions (B, H, W).

    Returns:
        `mass_inside` times the full area over the region's, shape (B,), float64; NaN where `mass_inside` is.

    Raises:
        InputError: if maps and regions do not match or have no pixels, or a map is negative somewhere.

    Example:
        >>> weighted_mass_inside(torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[True, False]]]))
        tensor([1.5000], dtype=torch.float64)
    """
    return mass_inside(heat, region) / area_share(region)


def area_share(region: Tensor) -> Tensor:
    """Share of the area that a region takes: the baseline of `mass_inside`, which a map that knows nothing scores.

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
    """Whether the highest point of a map lies in a region or near it; higher is better.

    Where several pixels share the highest value, the share of them that hit: what a draw among them would give.

    Source: Zhang et al. (2018), "Top-down Neural Attention by Excitation Backprop", section 4.1.

    Args:
        heat: non-negative maps (B, H, W).
        region: boolean regions (B, H, W).
        tolerance: how many pixels away still counts, by Euclidean distance, 0 or more; the source takes 15.

    Returns:
        Hits in [0, 1], shape (B,), float64; NaN for a map that is zero everywhere or not finite, or an empty region.

    Raises:
        InputError: if maps and regions do not match or have no pixels, or a map is negative somewhere.
        SettingError: if the tolerance is negative.

    Example:
        >>> heat, region = torch.tensor([[[0.0, 1.0, 0.0]]]), torch.tensor([[[True, False, False]]])
        >>> pointing_game(heat, region, tolerance=0), pointing_game(heat, region, tolerance=1)
        (tensor([0.], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    if not 0 <= tolerance < math.inf:
        raise SettingError(f"tolerance is {tolerance}, but it must be a number of pixels, 0 or more.")
    _check_regions(heat, region)
    highest = heat == heat.amax(dim=(1, 2), keepdim=True)
    hits = (highest & _widen(region, tolerance)).sum(dim=(1, 2)).double() / highest.sum(dim=(1, 2))
    return hits.masked_fill(~_can_be_met(heat, region), math.nan)


def _widen(region: Tensor, tolerance: float) -> Tensor:
    """Add all pixels within a distance of the region; what is made of an empty one counts nowhere."""
    near = [distance_transform_edt(~own) <= tolerance for own in region.cpu().numpy()]
    return torch.from_numpy(np.stack(near)).to(region.device) if near else region


def centre_gaussian(height: int, width: int, *, sigma: float = 0.25) -> Tensor:
    """A blob in the centre: the control for photographs, whose objects tend to stand there.

    Args:
        height: of the map.
        width: of the map.
        sigma: standard deviation, as a share of height and of width.

    Returns:
        Map (H, W) in (0, 1].

    Raises:
        SettingError: if `sigma` is not positive.

    Example:
        >>> centre_gaussian(1, 3)
        tensor([[0.4111, 1.0000, 0.4111]])
    """
    if not sigma > 0:
        raise SettingError(f"sigma is {sigma}, but it must be a positive share of the size.")
    down, across = (
        ((torch.arange(size) + 0.5) / size - 0.5).div(sigma).square().mul(-0.5).exp() for size in (height, width)
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
    """Draw images for the grid pointing game: confidently classified ones, of different classes in each mosaic.

    No image is drawn twice.

    Source: Bohle, Fritz, Schiele (2021), section 4.

    Args:
        probability: of each image for its own class, shape (N,).
        labels: class of each image, shape (N,).
        count: number of mosaics.
        cells: images in each.
        confidence: least probability of an image that takes part.
        seed: seed of the draw.

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
    shuffled = eligible[torch.randperm(len(eligible), generator=generator)]
    waiting: dict[int, list[int]] = {}
    for index, label in zip(shuffled.tolist(), labels[shuffled].tolist(), strict=True):
        waiting.setdefault(label, []).append(index)
    mosaics: list[list[int]] = []
    while len(mosaics) < count and len(waiting) >= cells:
        drawn = [list(waiting)[place] for place in torch.randperm(len(waiting), generator=generator).tolist()]
        # Classes with the most images left go first, so that as many mosaics as possible come about.
        chosen = sorted(drawn, key=lambda label: len(waiting[label]), reverse=True)[:cells]
        mosaics.append([waiting[label].pop() for label in chosen])
        waiting = {label: left for label, left in waiting.items() if left}
    if len(mosaics) < count:
        raise InputError(
            f"{count} mosaics of {cells} classes each were asked for, but {len(eligible)} images of "
            f"{len(set(labels[eligible].tolist()))} classes are classified with a probability of at least "
            f"{confidence}, which make {len(mosaics)}; ask for fewer, take images of more classes, or lower confidence."
        )
    # Within a mosaic, the classes with many images would always come first.
    places = torch.rand(count, cells, generator=generator).argsort(dim=1)
    return torch.tensor(mosaics, dtype=torch.long).reshape(count, cells).gather(1, places)


def _check_regions(heat: Tensor, region: Tensor) -> None:
    if heat.dim() != 3 or region.shape != heat.shape or region.dtype != torch.bool:
        raise InputError(
            f"Maps of shape {tuple(heat.shape)} need boolean regions of that shape (B, H, W); "
            f"got {region.dtype} of shape {tuple(region.shape)}."
        )
    _check_heat(heat)


def _check_heat(heat: Tensor) -> None:
    if heat.shape[1:].numel() == 0:
        raise InputError(f"Maps of shape {tuple(heat.shape)} have no pixels; give maps that have some.")
    if (heat < 0).any():
        raise InputError("The maps hold negative values; take their magnitude with heatmap() first.")


def _in_parts_of_the_peak(heat: Tensor) -> Tensor:
    """Maps (B, H, W) in float64 over their largest value: sums of huge values would overflow."""
    wide = heat.double()
    return wide / wide.amax(dim=(1, 2), keepdim=True)


def _can_be_met(heat: Tensor, region: Tensor) -> Tensor:
    """Whether the map points anywhere and the region holds a pixel, shape (B,)."""
    return heat.isfinite().all(dim=(1, 2)) & (heat > 0).any(dim=(1, 2)) & region.any(dim=(1, 2))


def mosaic(images: Tensor, *, rows: int, columns: int) -> Tensor:
    """Tile images of several classes into one picture: the input of the grid pointing game.

    Source: Bohle, Fritz, Schiele (2021), "Convolutional Dynamic Alignment Networks for Interpretable
    Classifications", section 4.

    Args:
        images: preprocessed images (rows * columns, C, H, W), placed row by row.
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
            f"A {rows} x {columns} mosaic needs {rows * columns} images (N, C, H, W); got shape {tuple(images.shape)}."
        )
    _, channels, height, width = images.shape
    grid = images.reshape(rows, columns, channels, height, width)
    return grid.permute(2, 0, 3, 1, 4).reshape(1, channels, rows * height, columns * width)


def cell_shares(heat: Tensor, *, rows: int, columns: int) -> Tensor:
    """Share of a map's mass that falls into each cell of a grid.

    Args:
        heat: non-negative maps (B, H, W); H and W are multiples of the grid.
        rows: number of rows of cells.
        columns: number of columns of cells.

    Returns:
        Shares (B, rows * columns), row by row, each row summing to 1, in the maps' type, or float64 of whole numbers;
        NaN for a map that is zero everywhere or not finite.

    Raises:
        InputError: if the grid does not divide the map, or the map has no pixels or is negative somewhere.

    Example:
        >>> cell_shares(torch.tensor([[[3.0, 0.0], [0.0, 1.0]]]), rows=2, columns=2)
        tensor([[0.7500, 0.0000, 0.0000, 0.2500]])
    """
    if heat.dim() != 3 or heat.shape[1] % rows or heat.shape[2] % columns:
        raise InputError(
            f"Maps of shape {tuple(heat.shape)} do not divide into {rows} x {columns} cells (B, H, W); give maps "
            "whose height and width do."
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
    # Whole numbers know no shares.
    return shares.to(heat.dtype) if heat.is_floating_point() else shares
