"""Does a map point at the right place? Pure functions over batches of maps."""

from torch import Tensor

from parchgrad.errors import InputError

__all__ = ["cell_shares", "mosaic"]


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
        >>> import torch
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
        Shares (B, rows * columns), row by row, each row summing to 1; NaN for a map that is zero everywhere.

    Raises:
        InputError: if the grid does not divide the map, or the map is negative somewhere.

    Example:
        >>> import torch
        >>> cell_shares(torch.tensor([[[3.0, 0.0], [0.0, 1.0]]]), rows=2, columns=2)
        tensor([[0.7500, 0.0000, 0.0000, 0.2500]])
    """
    if heat.dim() != 3 or heat.shape[1] % rows or heat.shape[2] % columns:
        raise InputError(f"Maps of shape {tuple(heat.shape)} do not divide into {rows} x {columns} cells (B, H, W).")
    if (heat < 0).any():
        raise InputError("The maps hold negative values; take their magnitude with heatmap() first.")
    batch, height, width = heat.shape
    cells = heat.double().reshape(batch, rows, height // rows, columns, width // columns).sum(dim=(2, 4)).flatten(1)
    return (cells / cells.sum(dim=1, keepdim=True)).to(heat.dtype)
