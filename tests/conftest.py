from pathlib import Path

import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

from parchgrad.statistics import ChannelStatistics, LayerStatistics

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _with_harmless_pickles(monkeypatch):
    """Let older releases of torch, for which pickles are refused, read those of the tests."""
    if torch.__version__ < TorchVersion("2.10"):
        monkeypatch.setattr("parchgrad.legacy.pickles._SAFE_TORCH", TorchVersion("2.4"))


@pytest.fixture
def network():
    return small_network()


def small_network(channels=6, classes=5, dtype=torch.float64):
    """A frozen little classifier of 8 x 8 pictures with in-place operations behind its convolutions."""
    torch.manual_seed(1)
    return (
        nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * channels, classes),
        )
        .to(dtype)
        .eval()
    )


def random_statistics(channels_of, classes=5, seed=0, images=40):
    """Statistics of the given layers from random samples, with every channel far from normal."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, channels in channels_of.items():
        labels = torch.arange(images) % classes
        samples = torch.rand(images, channels, generator=generator, dtype=torch.float64)
        groups = [samples[labels == label] for label in range(classes)]
        layers[name] = LayerStatistics(
            count=torch.tensor(images),
            mean=samples.mean(0),
            std=samples.std(0),
            class_count=torch.tensor([len(group) for group in groups]),
            class_mean=torch.stack([group.mean(0) for group in groups], dim=1),
            class_variance=torch.stack([group.var(0) if len(group) > 1 else group[0] * 0 for group in groups], dim=1),
            shapiro_p=torch.full((channels,), 0.01),
        )
    return ChannelStatistics(layers)
