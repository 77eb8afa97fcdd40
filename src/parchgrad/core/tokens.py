"""Layers of tokens: linear layers of transformers, whose last dimension holds the channels."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["TokenView", "token_view"]


class TokenView(NamedTuple):
    """How the output of a linear layer holds the tokens of a batch.

    Attributes:
        rows: number of rows of the batch. The layer may have a multiple of them, such as one per window.
        prefix: number of tokens before those of the image, such as class and register tokens.

    Example:
        >>> view = TokenView(rows=1, prefix=1)
        >>> patches = view.patches(torch.tensor([[[9.0, 9.0], [1.0, 2.0], [3.0, 4.0]]]))
        >>> patches
        tensor([[[1., 3.],
                 [2., 4.]]])
        >>> view.scaled(torch.ones(1, 3, 2), 2 * patches, torch.tensor([[5.0, 0.0]]))
        tensor([[[5., 0.],
                 [2., 4.],
                 [6., 8.]]])
    """

    rows: int
    prefix: int

    def flat(self, values: Tensor) -> Tensor:
        """Gather the tokens of each row of the batch, shape (B, T, C)."""
        return values.reshape(self.rows, -1, values.shape[-1])

    def patches(self, values: Tensor) -> Tensor:
        """Return the tokens of the image with their channels first, shape (B, C, S)."""
        return self.flat(values)[:, self.prefix :].transpose(1, 2)

    def scaled(self, values: Tensor, patches: Tensor, scales: Tensor) -> Tensor:
        """Put edited tokens of the image in place, and scale the channels of those before them alike.

        Args:
            values: the tokens before the edit, in the layer's shape.
            patches: edited tokens of the image, shape (B, C, S).
            scales: factor of each channel, shape (B, C).
        """
        before = self.flat(values)[:, : self.prefix] * scales.unsqueeze(1)
        return torch.cat([before, patches.transpose(1, 2)], dim=1).reshape(values.shape)


def token_view(shape: torch.Size, rows: int, positions: int) -> TokenView:
    """Tell how an output holds the tokens of a batch.

    Tokens beyond one for each position of the patch embedding come first, unless there are twice as many or the layer
    sees windows.

    Args:
        shape: shape of the output, (..., C).
        rows: number of rows of the batch; an output of fewer, or of another multiple, counts as its own.
        positions: number of positions of the patch embedding; 0 if unknown.

    Example:
        >>> token_view(torch.Size([2, 197, 384]), 2, 196), token_view(torch.Size([8, 49, 96]), 2, 3136)
        (TokenView(rows=2, prefix=1), TokenView(rows=2, prefix=0))
    """
    rows = rows if rows and shape[0] % rows == 0 else shape[0]
    beyond = shape[1] - positions if len(shape) == 3 and shape[0] == rows else 0
    return TokenView(rows, beyond if 0 < beyond < positions else 0)
