"""Heat maps: attributions averaged over colour channels."""

from torch import Tensor

from parchgrad._io.checks import check_kind
from parchgrad.errors import InputError

__all__ = ["heatmap", "signed_heatmap"]


def heatmap(attribution: Tensor) -> Tensor:
    """Average the magnitude of an attribution over colour channels.

    Args:
        attribution: shape (B, C, *S).

    Returns:
        Non-negative map, shape (B, *S).

    Raises:
        InputError: if there are no spatial dimensions.

    Example:
        >>> import torch
        >>> heatmap(torch.tensor([[[1.0, 0.0]], [[-2.0, 4.0]]]))
        tensor([[1., 0.],
                [2., 4.]])
    """
    _check_map(attribution)
    return attribution.abs().mean(dim=1)


def signed_heatmap(attribution: Tensor) -> Tensor:
    """Average an attribution over colour channels with its sign: positive where it raises the score.

    Colour channels of opposite sign cancel, as they do in the score.

    Args:
        attribution: shape (B, C, *S).

    Returns:
        Signed map, shape (B, *S).

    Raises:
        InputError: if there are no spatial dimensions.

    Example:
        >>> import torch
        >>> signed_heatmap(torch.tensor([[[1.0, 0.0]], [[-2.0, 4.0]]]))
        tensor([[ 1.,  0.],
                [-2.,  4.]])
    """
    _check_map(attribution)
    return attribution.mean(dim=1)


def _check_map(attribution: Tensor) -> None:
    check_kind("The attribution", attribution, Tensor, "Pass a tensor (B, C, *S)", error=InputError)
    if not attribution.is_floating_point():
        raise InputError(f"The attribution is {attribution.dtype}, but a heat map needs floating point. Call .float().")
    if attribution.dim() < 3:
        raise InputError(f"The attribution has shape {tuple(attribution.shape)}, but a heat map needs (B, C, *S).")
