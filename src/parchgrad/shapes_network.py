"""The small convolutional network that tells generated shapes apart."""

from torch import Tensor, nn

__all__ = ["ShapesNetwork"]


class ShapesNetwork(nn.Module):
    """A residual network for pictures of 64 x 64 pixels and larger, with batch normalisation.

    Each place of an 8 pixels wide grid has its own logits, which it finds in the 66 x 66 pixels around it. The odds of
    a class in a picture are the sum of its odds at all places: a class is found by its shape, wherever it is and
    whatever is beside it, so that a mosaic of pictures shows the classes of all.

    The sum is led by the places that see the class, and its gradient comes from them: even random channels win the grid
    pointing game by it. What tells maps apart here is their mass inside the mask.

    The weights that `load_model("shapes")` gives it were trained on `GeneratedShapes` of 64 pixels, at 0.75 to 1.25 of
    their size, and on mosaics of them. The larger shapes of larger pictures, from 96 pixels on, it often mistakes.

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
        """Return the logits (B, K) of normalised pictures (B, 3, H, W): a sigmoid makes them probabilities."""
        places: Tensor = self.classifier(self.features(inputs).flatten(2).transpose(1, 2))
        return places.logsumexp(dim=1)


class _Block(nn.Module):
    """Two convolutions beside a linear path."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        # First, so that the last convolution of the network, which Grad-CAM takes, is none of a single pixel.
        self.path = _convolution(channels, out_channels, kernel_size=1)
        # A module of its own for each activation: DeepLift needs that.
        self.inner = nn.Sequential(
            _convolution(channels, out_channels), nn.ReLU(), _convolution(out_channels, out_channels)
        )
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
