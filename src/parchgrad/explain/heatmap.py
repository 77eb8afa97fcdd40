"""Heat maps: attributions averaged over channels, such as the colours of an image."""

from torch import Tensor

from parchgrad._io.checks import check_kind, is_whole_number
from parchgrad.errors import InputError, SettingError

__all__ = ["channel_dim_of", "heatmap", "signed_heatmap"]

# Numbers of channels that tell a clip (B, T, C, H, W) from a volume (B, C, D, H, W).
_COLOURS = (1, 3)


def heatmap(attribution: Tensor, *, channel_dim: int | None = None) -> Tensor:
    """Average the magnitude of an attribution over its channels: dimension 1, unless `channel_dim` names another.

    Args:
        attribution: shape (B, C, *S).
        channel_dim: dimension to average over, such as 2 for clips (B, T, C, H, W). None means 1, and raises an error
            if dimension 2 of five has 1 or 3 entries and dimension 1 does not: then dimension 1 may be the frames.

    Returns:
        Non-negative map, shape (B, *S): the attribution's without the channels.

    Raises:
        InputError: if there are no spatial dimensions, or the channel dimension is ambiguous.
        SettingError: if `channel_dim` is not a dimension, or is that of the batch.

    Example:
        >>> import torch
        >>> heatmap(torch.tensor([[[1.0, 0.0]], [[-2.0, 4.0]]]))
        tensor([[1., 0.],
                [2., 4.]])
        >>> heatmap(torch.ones(1, 16, 3, 8, 8), channel_dim=2).shape
        torch.Size([1, 16, 8, 8])
    """
    dimension = _checked(attribution, channel_dim)
    return attribution.abs().mean(dim=dimension)


def signed_heatmap(attribution: Tensor, *, channel_dim: int | None = None) -> Tensor:
    """Average an attribution over its channels with its sign: positive where it raises the score.

    Channels of opposite sign cancel, as they do in the score.

    Args:
        attribution: shape (B, C, *S).
        channel_dim: dimension to average over; see `heatmap`.

    Returns:
        Signed map, shape (B, *S): the attribution's without the channels.

    Raises:
        InputError: if there are no spatial dimensions, or the channel dimension is ambiguous.
        SettingError: if `channel_dim` is not a dimension, or is that of the batch.

    Example:
        >>> import torch
        >>> signed_heatmap(torch.tensor([[[1.0, 0.0]], [[-2.0, 4.0]]]))
        tensor([[ 1.,  0.],
                [-2.,  4.]])
    """
    dimension = _checked(attribution, channel_dim)
    return attribution.mean(dim=dimension)


def channel_dim_of(attribution: Tensor) -> int:
    """Guess the dimension of the channels from the shape: 2 in clips (B, T, C, H, W) of 1 or 3 channels, else 1.

    Example:
        >>> import torch
        >>> channel_dim_of(torch.zeros(1, 16, 3, 8, 8)), channel_dim_of(torch.zeros(1, 3, 16, 8, 8))
        (2, 1)
    """
    shape = attribution.shape
    return 2 if len(shape) == 5 and shape[1] not in _COLOURS and shape[2] in _COLOURS else 1


def _checked(attribution: Tensor, channel_dim: int | None) -> int:
    """Check an attribution, and return the dimension of its channels."""
    check_kind("The attribution", attribution, Tensor, "Pass a tensor (B, C, *S)", error=InputError)
    shape = tuple(attribution.shape)
    if not attribution.is_floating_point():
        raise InputError(f"The attribution is {attribution.dtype}, but a heat map needs floating point. Call .float().")
    if len(shape) < 3:
        raise InputError(
            f"The attribution has shape {shape}, but a heat map needs (B, C, *S): rows, channels and places. "
            "Add the missing dimensions, such as attribution[None] for one image (C, H, W)."
        )
    if channel_dim is None:
        if channel_dim_of(attribution) == 2:
            raise InputError(
                f"The attribution has shape {shape}, so dimension 1 may be the frames of a clip (B, T, C, H, W). Pass "
                f"`channel_dim=2` to average over its {shape[2]} channels, or `channel_dim=1` for a volume "
                "(B, C, D, H, W)."
            )
        return 1
    if not is_whole_number(channel_dim) or channel_dim % len(shape) == 0 or not -len(shape) < channel_dim < len(shape):
        raise SettingError(
            f"`channel_dim` is {channel_dim!r}, but the attribution has shape {shape}. Pass a dimension from 1 to "
            f"{len(shape) - 1}; dimension 0 is the batch."
        )
    return channel_dim
