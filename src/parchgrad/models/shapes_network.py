"""A small convolutional network that classifies generated shapes."""

from torch import Tensor, nn

__all__ = ["ShapesNetwork"]


class ShapesNetwork(nn.Module):
    """A residual network with batch normalisation for images of 64 x 64 pixels and larger.

    Each position of a grid with a stride of 8 pixels has its own logits, with a receptive field of 66 x 66 pixels. The
    odds of a class in an image are the sum of its odds over all positions, so a class is recognised anywhere and next
    to others, and a mosaic of images shows all their classes.

    Positions that see the class dominate the sum and its gradient, so even random channels win the grid pointing game.
    Compare maps by their mass inside the mask instead.

    The weights of `load_model("shapes")` were trained on `GeneratedShapes` of 64 pixels, scaled by 0.75 to 1.25, and on
    mosaics of them. They often misclassify the larger shapes in images from 96 pixels.

    Example:
        >>> import torch
        >>> ShapesNetwork(10).eval()(torch.zeros(2, 3, 64, 128)).shape
        torch.Size([2, 10])
    """

    def __init__(self, classes: int) -> None:
        """Initialise with random weights.

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
        """Return logits (B, K) of normalised images (B, 3, H, W); apply a sigmoid for probabilities."""
        places: Tensor = self.classifier(self.features(inputs).flatten(2).transpose(1, 2))
        return places.logsumexp(dim=1)


class _Block(nn.Module):
    """Two convolutions with a linear skip path."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        # Defined first, so that the network's last convolution, which Grad-CAM uses, is not 1 x 1.
        self.path = _convolution(channels, out_channels, kernel_size=1)
        # DeepLift needs a separate module per activation.
        self.inner = nn.Sequential(
            _convolution(channels, out_channels), nn.ReLU(), _convolution(out_channels, out_channels)
        )
        self.activation = nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.activation(self.inner(inputs) + self.path(inputs))
        return outputs


def _convolution(channels: int, out_channels: int, kernel_size: int = 3) -> nn.Sequential:
    """Build a size-preserving convolution with batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
    )
