"""Layers of tokens: linear layers of transformers, whose last dimension holds the channels."""

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from parchgrad.errors import InputError

__all__ = ["TokenView", "token_view"]


class TokenView(NamedTuple):
    """How the output of a linear layer holds the tokens of a batch.

    Attributes:
        rows: number of rows of the batch. The layer may have a multiple of them, such as one per window.
        prefix: number of tokens before those of the image, such as class and register tokens.
        is_batch_second: whether the tokens come in the first dimension, as in torch's transformers by default.

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
    is_batch_second: bool = False

    def flat(self, values: Tensor) -> Tensor:
        """Gather the tokens of each row of the batch, shape (B, T, C)."""
        first = values.transpose(0, 1) if self.is_batch_second else values
        tokens = math.prod(first.shape[:-1]) // self.rows if self.rows else math.prod(first.shape[1:-1])
        return first.reshape(self.rows, tokens, values.shape[-1])

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
        edited = torch.cat([before, patches.transpose(1, 2)], dim=1)
        return edited.transpose(0, 1) if self.is_batch_second else edited.reshape(values.shape)


def token_view(
    shape: torch.Size, rows: int, positions: Collection[int], *, may_put_batch_second: bool = False
) -> TokenView:
    """Tell how an output holds the tokens of a batch.

    Tokens beyond one for each position of the nearest grid come first, unless there are twice as many or the layer sees
    windows. Outputs (T, B, C) have their batch second.

    Args:
        shape: shape of the output, (..., C).
        rows: number of rows of the batch; an output of fewer, or of another multiple, counts as its own.
        positions: numbers of positions of the convolutions before it.
        may_put_batch_second: whether the model has attention that takes (T, B, C).

    Raises:
        InputError: if the shape fits a batch in the second dimension, and also windows or a batch in the first.

    Example:
        >>> token_view(torch.Size([2, 197, 384]), 2, {196}), token_view(torch.Size([8, 49, 96]), 2, {3136})
        (TokenView(rows=2, prefix=1, is_batch_second=False), TokenView(rows=2, prefix=0, is_batch_second=False))
    """
    is_batch_second = len(shape) == 3 and shape[0] != rows == shape[1]
    is_square = len(shape) == 3 and shape[0] == rows == shape[1] and may_put_batch_second
    if rows > 1 and (is_square or (is_batch_second and shape[0] % rows == 0)):
        raise InputError(
            f"Cannot tell which dimension of an output of shape {tuple(shape)} for {rows} rows holds the batch. Use "
            "another batch size, or `internal_batch_size=`."
        )
    rows = rows if is_batch_second or (rows and shape[0] % rows == 0) else shape[0]
    prefix = 0
    if len(shape) == 3 and (is_batch_second or shape[0] == rows):
        tokens = shape[0 if is_batch_second else 1]
        grid = max((count for count in positions if count <= tokens), default=0)
        prefix = tokens - grid if tokens < 2 * grid else 0
    return TokenView(rows, prefix, is_batch_second)
