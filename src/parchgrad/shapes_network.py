"""The small convolutional network that tells generated shapes apart."""

from torch import Tensor, nn

__all__ = ["ShapesNetwork"]


class ShapesNetwork(nn.Module):
    """A residual network for pictures of 64 x 64 pixels and larger, with batch normalisation.

    Convolutional up to the mean over all places, so that it takes mosaics too.

    Example:
        >>> import torch
        >>> ShapesNetwork(10).eval()(torch.zeros(2, 3, 64, 128)).shape
        torch.Size([2, 10])
    """

    def __init__(self, classes: int) -> None:
        """Start with random weights.

        Args:
            classes: number of classes.
        """
        super().__init__()
        self.features = nn.Sequential(
            _convolution(3, 16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            _Block(16, 32),
            nn.MaxPool2d(2),
            _Block(32, 64),
            nn.MaxPool2d(2),
            _Block(64, 96),
        )
        self.classifier = nn.Linear(96, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits (B, K) of normalised pictures (B, 3, H, W)."""
        logits: Tensor = self.classifier(self.features(inputs).mean(dim=(2, 3)))
        return logits


class _Block(nn.Module):
    """Two convolutions beside a linear path."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        # A module of its own for each activation: DeepLift needs that.
        self.inner = nn.Sequential(
            _convolution(channels, out_channels), nn.ReLU(), _convolution(out_channels, out_channels)
        )
        self.path = _convolution(channels, out_channels, kernel_size=1)
        self.activation = nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.activation(self.inner(inputs) + self.path(inputs))
        return outputs


def _convolution(channels: int, out_channels: int, kernel_size: int = 3) -> nn.Sequential:
    """A convolution that keeps the size, and batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
    )
