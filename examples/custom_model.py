"""Explain your own network, without registering or changing it.

    python examples/custom_model.py

A small residual network that returns a dictionary learns to classify image textures: brick, grass and gravel (a few
seconds). Each test image then shows two textures side by side, and both classes are explained. The score is the share
of the map in the half of the explained class; chance is 0.5. The script prints it over 100 images, cut from a held-out
part of the textures, and writes outputs/examples/custom_model.png. `Evidence` is well ahead of the plain gradient.
`GradientEnergy`, which ignores what raises the score, is about equal to it on such a small network.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from skimage import data
from torch import Tensor, nn

import parchgrad as pg
from parchgrad.evaluation.localisation import cell_shares, mosaic
from parchgrad.visual import panel, save_figure

TEXTURES = ("brick", "grass", "gravel")
SELECTORS = {"plain gradient": None, "GradientEnergy": pg.GradientEnergy(quantile=0.25), "Evidence": pg.Evidence()}
SIZE = 64


class Network(nn.Module):
    """A network with in-place operations, a skip connection and a dictionary as output."""

    def __init__(self) -> None:
        """Create three convolutions and a linear layer."""
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 5, 2, padding=2), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.first = nn.Sequential(nn.Conv2d(16, 32, 3, 2, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
        self.head = nn.Linear(32, len(TEXTURES))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images (B, 1, H, W) to features (B, 32, H / 4, W / 4) and logits (B, K)."""
        features = self.first(self.stem(images))
        features = features + self.second(features)
        return {"features": features, "logits": self.head(features.mean(dim=(2, 3)))}


class Logits(nn.Sequential):
    """A wrapper that returns only the logits."""

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 1, H, W) to logits (B, K)."""
        return super().forward(images)["logits"]


def crop(photographs: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Crop random squares (N, 1, SIZE, SIZE) from the images (K, H, W) of these labels, with equal mean brightness."""
    height, width = photographs.shape[1:]
    tops, lefts = (torch.randint(end - SIZE, labels.shape, generator=generator) for end in (height, width))
    places = zip(labels, tops, lefts, strict=True)
    squares = torch.stack([photographs[k, y : y + SIZE, x : x + SIZE] for k, y, x in places]).unsqueeze(1)
    return (squares - squares.mean(dim=(2, 3), keepdim=True) + 0.5).clamp(0, 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, explain, and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/examples"))
    path = parser.parse_args(arguments).out / "custom_model.png"
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    photographs = torch.stack([torch.from_numpy(getattr(data, name)()) for name in TEXTURES]) / 255
    # Halve the size, so that a square shows several bricks.
    photographs = nn.functional.avg_pool2d(photographs, 2)
    network = Network()
    optimiser = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(150):
        labels = torch.randint(len(TEXTURES), (64,), generator=generator)
        optimiser.zero_grad()
        nn.functional.cross_entropy(
            network(crop(photographs[..., :160], labels, generator))["logits"], labels
        ).backward()
        optimiser.step()

    model = Logits(network).eval()
    pairs = torch.rand(100, len(TEXTURES), generator=generator).argsort(dim=1)[:, :2]
    halves = crop(photographs[..., 160:], pairs.flatten(), generator)
    print(f"accuracy: {(model(halves).argmax(dim=1) == pairs.flatten()).float().mean():.2f}", end="; ")
    print(f"convolutions: {', '.join(pg.find_convolutions(model))}")
    pictures = torch.cat([mosaic(pair, rows=1, columns=2) for pair in halves.split(2)]).repeat_interleave(2, dim=0)
    maps = {}
    for name, selector in SELECTORS.items():
        explainer = pg.Explainer(model, selector, layers="all")
        maps[name] = pg.heatmap(explainer.attribute(pictures, pairs.flatten()))
        # Rows alternate: the first of each pair explains the left half, the second the right half.
        shares = cell_shares(maps[name], rows=1, columns=2).unflatten(0, (-1, 2)).diagonal(dim1=1, dim2=2)
        print(f"share in its own half, {name}: {shares.mean():.2f}")
    shown = [picture.expand(3, -1, -1).movedim(0, -1) for picture in pictures[:4]]
    labels = [f"explained: {TEXTURES[label]}" for label in pairs.flatten()[:4]]
    save_figure(panel(shown, {name: list(found[:4]) for name, found in maps.items()}, labels=labels), path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
