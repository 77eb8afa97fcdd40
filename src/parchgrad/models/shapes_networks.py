"""Small networks that classify generated shapes: a residual network and three current architectures."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["SHAPES_NETWORKS", "ShapesConvNeXt", "ShapesMobileNet", "ShapesNetwork", "ShapesTransformer"]


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
            convolution(3, 16),
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
        self.path = convolution(channels, out_channels, kernel_size=1)
        # DeepLift needs a separate module per activation.
        self.inner = nn.Sequential(
            convolution(channels, out_channels), nn.ReLU(), convolution(out_channels, out_channels)
        )
        self.activation = nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.activation(self.inner(inputs) + self.path(inputs))
        return outputs


def convolution(
    channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Build a padded convolution with batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(
            channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, groups=groups, bias=False
        ),
        nn.BatchNorm2d(out_channels),
    )


class ShapesTransformer(nn.Module):
    """A vision transformer for images of 64 x 64 pixels.

    A convolutional stem makes 8 x 8 tokens with a stride of 8 pixels. Six pre-norm blocks process them and a class
    token. Parameters are named as in timm.

    Sources: Dosovitskiy et al. (2021), "An image is worth 16x16 words: transformers for image recognition at scale";
    Xiao et al. (2021), "Early convolutions help transformers see better", for the stem.

    The weights of `load_model("shapes_vit")` were trained on `GeneratedShapes` of 64 pixels with up to one rival.

    Attributes:
        num_prefix_tokens: number of tokens before those of the patches: 1, the class token.

    Example:
        >>> import torch
        >>> network = ShapesTransformer(10).eval()
        >>> network(torch.zeros(2, 3, 64, 64)).shape, network.patch_embed(torch.zeros(2, 3, 64, 64)).shape
        (torch.Size([2, 10]), torch.Size([2, 64, 96]))
    """

    num_prefix_tokens = 1

    def __init__(self, classes: int) -> None:
        """Initialise with random weights.

        Args:
            classes: number of classes.
        """
        super().__init__()
        width, patches = 96, 64
        self.patch_embed = _PatchEmbedding(width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.num_prefix_tokens + patches, width))
        self.blocks = nn.Sequential(*(_TransformerBlock(width, heads=4) for _ in range(6)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        # Shortens the first phase of training, in which the loss stays at chance.
        self.fc_norm = nn.BatchNorm1d(width, affine=False)
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (B, K) of normalised images (B, 3, 64, 64); apply a sigmoid for probabilities."""
        patches = self.patch_embed(inputs)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
        logits: Tensor = self.head(self.fc_norm(self.norm(self.blocks(tokens))[:, 0]))
        return logits


class _PatchEmbedding(nn.Module):
    """One token per 8 x 8 pixels, from five convolutions, three of them strided, and a projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_stem(width // 2), convolution(width // 2, width, stride=2), nn.ReLU())
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens: Tensor = self.proj(self.stem(inputs)).flatten(2).transpose(1, 2)
        return tokens


def _stem(channels: int) -> nn.Sequential:
    """Build a stem of four convolutions with a stride of 4 pixels, which learns faster than patches."""
    return nn.Sequential(
        convolution(3, channels // 2, stride=2),
        nn.ReLU(),
        convolution(channels // 2, channels // 2),
        nn.ReLU(),
        convolution(channels // 2, channels, stride=2),
        nn.ReLU(),
        convolution(channels, channels),
        nn.ReLU(),
    )


class _TransformerBlock(nn.Module):
    """Self-attention and an MLP, each after a layer normalisation and with a skip path."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _Mlp(width, 2 * width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        outputs: Tensor = tokens + self.mlp(self.norm2(tokens))
        return outputs


class _Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        # (B, N, 3 W) to three tensors (B, heads, N, W / heads).
        queries, keys, values = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        mixed = functional.scaled_dot_product_attention(queries, keys, values)
        outputs: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return outputs


class _Mlp(nn.Module):
    """Two linear layers over the last dimension with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.fc2(self.act(self.fc1(inputs)))
        return outputs


class ShapesConvNeXt(nn.Module):
    """A ConvNeXt for images of 64 x 64 pixels.

    A convolutional stem, then eight blocks in three stages of 48, 96 and 128 channels, with strides of 4, 8 and 16
    pixels. Parameters are named as in timm.

    Sources: Liu et al. (2022), "A ConvNet for the 2020s"; the stem is that of `ShapesTransformer`.

    The weights of `load_model("shapes_convnext")` were trained on `GeneratedShapes` of 64 pixels with up to one rival.

    Example:
        >>> import torch
        >>> network = ShapesConvNeXt(10).eval()
        >>> network(torch.zeros(2, 3, 64, 64)).shape, network.stages(network.stem(torch.zeros(2, 3, 64, 64))).shape
        (torch.Size([2, 10]), torch.Size([2, 128, 4, 4]))
    """

    def __init__(self, classes: int) -> None:
        """Initialise with random weights.

        Args:
            classes: number of classes.
        """
        super().__init__()
        self.stem = nn.Sequential(*_stem(48), _ChannelNorm(48))
        self.stages = nn.Sequential(
            _ConvNeXtStage(48, 48, blocks=2), _ConvNeXtStage(48, 96, blocks=4), _ConvNeXtStage(96, 128, blocks=2)
        )
        self.norm = nn.LayerNorm(128, eps=1e-6)
        # As in the transformer.
        self.fc_norm = nn.BatchNorm1d(128, affine=False)
        self.head = nn.Linear(128, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (B, K) of normalised images (B, 3, H, W); apply a sigmoid for probabilities."""
        features = self.norm(self.stages(self.stem(inputs)).mean(dim=(2, 3)))
        logits: Tensor = self.head(self.fc_norm(features))
        return logits


class _ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _ConvNeXtStage(nn.Module):
    """Blocks of one width, after a downsampling layer if the width changes."""

    def __init__(self, channels: int, out_channels: int, blocks: int) -> None:
        super().__init__()
        self.downsample = (
            nn.Identity()
            if channels == out_channels
            else nn.Sequential(_ChannelNorm(channels), nn.Conv2d(channels, out_channels, 2, stride=2))
        )
        self.blocks = nn.Sequential(*(_ConvNeXtBlock(out_channels) for _ in range(blocks)))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.blocks(self.downsample(inputs))
        return outputs


class _ConvNeXtBlock(nn.Module):
    """A depthwise convolution and an MLP over the channels, scaled per channel, with a skip path."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = _Mlp(channels, 4 * channels)
        self.gamma = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, inputs: Tensor) -> Tensor:
        channels_last = self.conv_dw(inputs).permute(0, 2, 3, 1)
        outputs: Tensor = inputs + (self.gamma * self.mlp(self.norm(channels_last))).permute(0, 3, 1, 2)
        return outputs


class ShapesMobileNet(nn.Module):
    """A MobileNetV3 for images of 64 x 64 pixels and larger.

    Seven inverted residual blocks with batch normalisation and squeeze-and-excitation, with strides of 4 and 8 pixels.

    Source: Howard et al. (2019), "Searching for MobileNetV3".

    The weights of `load_model("shapes_mobilenet")` were trained on `GeneratedShapes` of 64 pixels with up to one rival.

    Example:
        >>> import torch
        >>> ShapesMobileNet(10).eval()(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(self, classes: int) -> None:
        """Initialise with random weights.

        Args:
            classes: number of classes.
        """
        super().__init__()
        self.stem = nn.Sequential(*convolution(3, 16, kernel_size=3, stride=2), nn.Hardswish())
        self.blocks = nn.Sequential(
            _InvertedResidual(16, 48, 24, kernel_size=3, stride=2, activation=nn.ReLU),
            _InvertedResidual(24, 72, 24, kernel_size=3, activation=nn.ReLU),
            _InvertedResidual(24, 72, 40, kernel_size=5, stride=2, excite=True),
            _InvertedResidual(40, 120, 40, kernel_size=5, excite=True),
            _InvertedResidual(40, 120, 40, kernel_size=5, excite=True),
            _InvertedResidual(40, 160, 64, kernel_size=5, excite=True),
            _InvertedResidual(64, 192, 64, kernel_size=5, excite=True),
        )
        self.conv_head = nn.Sequential(*convolution(64, 256, kernel_size=1), nn.Hardswish())
        self.classifier = nn.Linear(256, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (B, K) of normalised images (B, 3, H, W); apply a sigmoid for probabilities."""
        logits: Tensor = self.classifier(self.conv_head(self.blocks(self.stem(inputs))).mean(dim=(2, 3)))
        return logits


class _InvertedResidual(nn.Module):
    """Widen, convolve each channel, and narrow, with a skip path if the shape stays the same."""

    def __init__(
        self,
        channels: int,
        hidden: int,
        out_channels: int,
        *,
        kernel_size: int,
        stride: int = 1,
        excite: bool = False,
        activation: type[nn.Module] = nn.Hardswish,
    ) -> None:
        super().__init__()
        self.conv_pw = nn.Sequential(*convolution(channels, hidden, kernel_size=1), activation())
        self.conv_dw = nn.Sequential(
            *convolution(hidden, hidden, kernel_size=kernel_size, stride=stride, groups=hidden), activation()
        )
        self.se = _SqueezeExcite(hidden) if excite else nn.Identity()
        self.conv_pwl = convolution(hidden, out_channels, kernel_size=1)
        self.has_skip = stride == 1 and channels == out_channels

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.conv_pwl(self.se(self.conv_dw(self.conv_pw(inputs))))
        return inputs + outputs if self.has_skip else outputs


class _SqueezeExcite(nn.Module):
    """Scale each channel by a gate in [0, 1] that depends on all channels' means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, channels // 4, 1)
        self.act = nn.ReLU()
        self.conv_expand = nn.Conv2d(channels // 4, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, inputs: Tensor) -> Tensor:
        means = inputs.mean(dim=(2, 3), keepdim=True)
        outputs: Tensor = inputs * self.gate(self.conv_expand(self.act(self.conv_reduce(means))))
        return outputs


SHAPES_NETWORKS: Mapping[str, Callable[[int], nn.Module]] = MappingProxyType(
    {
        "shapes": ShapesNetwork,
        "shapes_vit": ShapesTransformer,
        "shapes_convnext": ShapesConvNeXt,
        "shapes_mobilenet": ShapesMobileNet,
    }
)
"""Classes of the networks by the names that `load_model` takes."""
