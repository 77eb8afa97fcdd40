"""Class-wise selection on CIFAR-10: statistics of training images, the grid pointing game on test images.

    python benchmarks/cifar10.py ../shared/data/cifar10

The folder contains `train` and `test`, each with one folder of images per class, and `resnet20.th`. For each method,
prints the share of the map in the right cell of 2 x 2 mosaics of confidently classified test images of different
classes. Chance is 0.25.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision import transforms

import parchgrad as pg
from parchgrad.data.folders import PhotographFolder
from parchgrad.evaluation.localisation import cell_shares, mosaic

CONFIDENCE = 0.9
TRANSFORM = transforms.Compose(
    [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
)


class Block(nn.Module):
    """Two convolutions and a shortcut, which with a stride skips pixels and pads the channels with zeros."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        """Create the layers, with the names in the weights file."""
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        # Modules, which DeepLift, guided backpropagation and LRP act on.
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.stride, self.padding = stride, (channels - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        shortcut = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return self.relu2(out + shortcut)


class ResNet20(nn.Module):
    """The 20-layer ResNet for CIFAR-10 (He et al. 2016, section 4.2)."""

    def __init__(self) -> None:
        """Create the layers, with the names in the weights file."""
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.pool, self.linear = nn.AdaptiveAvgPool2d(1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to logits (B, 10)."""
        x = self.relu(self.bn1(self.conv1(x)))
        return self.linear(self.pool(self.layer3(self.layer2(self.layer1(x)))).flatten(1))


def load_resnet20(path: Path) -> ResNet20:
    """Load the usual weights file, whose names start with `module.`."""
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    model = ResNet20()
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return model.eval()


def labelled(folder: Path) -> PhotographFolder:
    """Open the images in a folder, whose sorted class folders are CIFAR-10's classes in order."""
    images = PhotographFolder(folder, TRANSFORM)
    return images.with_classes({name: index for index, name in enumerate(images.folders)})


def draw_mosaics(model: nn.Module, images: PhotographFolder, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Make random mosaics (count, 3, 64, 64) of four confidently classified images; return them with their classes."""
    inputs, labels = (torch.stack([torch.as_tensor(item[part]) for item in images]) for part in range(2))
    with torch.no_grad():
        probability = torch.cat([model(part).softmax(1) for part in torch.split(inputs, 100)])
    print(f"accuracy on {len(inputs)} test images: {(probability.argmax(1) == labels).double().mean():.3f}")
    confident = probability[torch.arange(len(labels)), labels] > CONFIDENCE
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(count):
        classes = torch.randperm(10, generator=generator)[:4]
        pools = [(confident & (labels == k)).nonzero().flatten() for k in classes]
        drawn.append(torch.stack([pool[torch.randint(len(pool), (), generator=generator)] for pool in pools]))
    chosen = torch.stack(drawn)
    return torch.stack([mosaic(inputs[four], rows=2, columns=2)[0] for four in chosen]), labels[chosen]


def play(explainer: pg.Explainer, mosaics: Tensor, classes: Tensor) -> Tensor:
    """Compute the share of each class's map in its own cell, shape (4 * count,)."""
    repeated = mosaics.repeat_interleave(4, dim=0)
    heat = pg.heatmap(explainer.attribute(repeated, classes.flatten()))
    cells = torch.arange(4).repeat(len(mosaics))
    return cell_shares(heat, rows=2, columns=2)[torch.arange(len(cells)), cells]


def scores(folder: Path, *, mosaics: int = 100, seed: int = 0) -> dict[str, Tensor]:
    """Collect statistics on the training images, and score each method on mosaics of the test images."""
    model = load_resnet20(folder / "resnet20.th")
    held = pg.collect_statistics(model, labelled(folder / "train"), layers=0.5, batch_size=100)
    inputs, classes = draw_mosaics(model, labelled(folder / "test"), mosaics, seed)
    selectors = {
        "plain gradient": None,
        "ClassWise(0.3), upper half": pg.ClassWise(held, quantile=0.3),
        "InstanceWise(0.3), upper half": pg.InstanceWise(held, quantile=0.3),
        "RandomChannels(0.3), upper half": pg.RandomChannels(quantile=0.3),
        "GradientEnergy(0.3), upper half": pg.GradientEnergy(quantile=0.3),
    }
    return {
        name: play(pg.Explainer(model, selector, layers=0.5), inputs, classes) for name, selector in selectors.items()
    }


def main() -> None:
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of CIFAR-10 and the weights")
    parser.add_argument("--mosaics", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name, shares in scores(arguments.folder, mosaics=arguments.mosaics, seed=arguments.seed).items():
        print(f"{name:35s} {shares.mean():.3f} +- {shares.std() / len(shares) ** 0.5:.3f}")


if __name__ == "__main__":
    main()
