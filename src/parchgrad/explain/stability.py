"""How much heat maps change between an image and noisy copies of it, whatever their scale."""

import math

import torch
from torch import Tensor

from parchgrad._io.checks import check_seed, check_whole_number, is_number
from parchgrad.errors import InputError, SettingError

__all__ = ["cosine", "noisy_copies", "standard_noise", "value_range"]


def noisy_copies(inputs: Tensor, *, noise: float, draws: int, seed: int, index: int = 0) -> Tensor:
    """Add Gaussian noise to each row, scaled to the range of that row.

    Every row gets the same standard normal numbers, drawn in float32 on the CPU. So a row's copies depend on neither
    its batch nor the device.

    Args:
        inputs: batch of shape (B, C, *S), floating point.
        noise: standard deviation of the noise as a share of the row's range (maximum minus minimum), 0 or more.
        draws: number of copies of each row, at least 1.
        seed: random seed.
        index: index among the inputs of a model with several; each gets noise of its own.

    Returns:
        The copies, shape (draws, B, C, *S), with the dtype and device of the inputs, detached.

    Raises:
        SettingError: if `noise`, `draws` or `seed` is out of range.
        InputError: if the inputs are not a floating-point batch, or their rows are empty.

    Example:
        >>> dark, bright = torch.zeros(1, 3, 8, 8), torch.linspace(0, 1, 192).reshape(1, 3, 8, 8)
        >>> copies = noisy_copies(torch.cat((dark, bright)), noise=0.01, draws=4, seed=0)
        >>> copies.shape
        torch.Size([4, 2, 3, 8, 8])
        >>> bool((copies[:, 0] == 0).all()), round((copies[:, 1] - bright).std().item(), 3)
        (True, 0.01)
    """
    if not is_number(noise) or not 0 <= noise < math.inf:
        raise SettingError(f"`noise` is {noise!r}. Pass a finite share of the input's range, 0 or more.")
    check_whole_number("draws", draws, 1)
    check_seed(seed)
    if not inputs.is_floating_point() or inputs.dim() < 2 or not inputs.shape[1:].numel():
        raise InputError(
            f"`inputs` has shape {tuple(inputs.shape)} and dtype {inputs.dtype}. Pass a floating-point batch of shape "
            "(B, C, *S) with at least one value per row."
        )
    # Half precision would round the noise twice.
    clean = inputs.detach().to(torch.promote_types(inputs.dtype, torch.float32))
    normal = standard_noise(clean, draws, seed, index).unsqueeze(1)
    return (clean + noise * value_range(clean) * normal).to(inputs.dtype)


def standard_noise(inputs: Tensor, count: int, seed: int, index: int = 0) -> Tensor:
    """Draw standard normal noise of the shape of one row, the same for every batch and device.

    Returns:
        Noise of the dtype and device of `inputs`, shape (count, *S) for inputs (B, *S).

    Example:
        >>> standard_noise(torch.zeros(5, 3, 8, 8), 2, seed=0).shape
        torch.Size([2, 3, 8, 8])
    """
    # Several inputs of the same shape must not share their noise.
    generator = torch.Generator().manual_seed(int(seed) + index)
    # The dtype is named, since otherwise the global default dtype would choose other numbers.
    return torch.randn(count, *inputs.shape[1:], generator=generator, device="cpu", dtype=torch.float32).to(inputs)


def value_range(inputs: Tensor) -> Tensor:
    """Compute the range of each row of (B, *S), shape (B, 1, ..., 1).

    Example:
        >>> value_range(torch.tensor([[1.0, 4.0], [2.0, 2.0]]))
        tensor([[3.],
                [0.]])
    """
    dimensions = tuple(range(1, inputs.dim()))
    return inputs.amax(dim=dimensions, keepdim=True) - inputs.amin(dim=dimensions, keepdim=True)


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Compute the cosine of two batches of heat maps, row by row, in float64.

    Each row is divided by its largest magnitude first, so that squares of tiny or huge values neither vanish nor
    overflow.

    Args:
        first: heat maps, shape (B, *S).
        second: heat maps of the same shape.

    Returns:
        Cosines in [-1, 1], shape (B,), float64; NaN where a map is zero everywhere or not finite. They are on the
        device of the maps, or on the CPU where that device has no float64 (MPS).

    Raises:
        InputError: if the shapes differ, or the maps are empty.

    Example:
        >>> cosine(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[4e-30, 3e-30], [1.0, 1.0]]))
        tensor([0.9600,    nan], dtype=torch.float64)
    """
    if first.shape != second.shape or first.dim() < 2 or not first.shape[1:].numel():
        raise InputError(
            f"Cannot compare heat maps of shapes {tuple(first.shape)} and {tuple(second.shape)}. Pass two batches of "
            "maps (B, *S) of the same shape, with at least one value per map."
        )
    one, other = (_peak_is_one(_to_float64(maps.flatten(1))) for maps in (first, second))
    product = (one * other).sum(dim=1)
    norms = torch.linalg.vector_norm(one, dim=1) * torch.linalg.vector_norm(other, dim=1)
    found: Tensor = (product / norms).clamp(-1, 1)
    return found


def _to_float64(maps: Tensor) -> Tensor:
    # MPS has no float64.
    return maps.cpu().double() if maps.device.type == "mps" else maps.double()


def _peak_is_one(maps: Tensor) -> Tensor:
    """Divide each row by its largest magnitude; rows that are zero or not finite become NaN somewhere."""
    return maps / maps.abs().amax(dim=1, keepdim=True)
