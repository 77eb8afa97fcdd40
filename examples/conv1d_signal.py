"""Explain a network on signals: ParchGrad edits Conv1d and Conv3d like Conv2d.

    python examples/conv1d_signal.py

A small Conv1d network learns to classify a burst hidden in noise by its pitch: rising, falling or steady (a few
seconds). The score is the share of the map on the burst, which covers a fifth of the signal. The script prints it over
300 new signals and writes outputs/examples/conv1d_signal.png. `Evidence` is well ahead of the plain gradient.
`GradientEnergy`, which ignores whether a channel raises the score, is about equal to it.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import parchgrad as pg
from parchgrad.visual import save_figure
from parchgrad.visual.charts import LIGHT

KINDS = ("rising", "falling", "steady")
LENGTH, BURST = 256, 48
SELECTORS = {"plain gradient": None, "GradientEnergy": pg.GradientEnergy(quantile=0.25), "Evidence": pg.Evidence()}


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Generate signals (N, 1, L), the kind of each burst (N,) and the mask of its position (N, L)."""
    kinds = torch.randint(len(KINDS), (count,), generator=generator)
    starts = torch.randint(LENGTH - BURST + 1, (count, 1), generator=generator)
    place = (torch.arange(LENGTH) - starts) / BURST
    inside = (place >= 0) & (place < 1)
    turns = torch.stack([3 * place + 4 * place**2, 11 * place - 4 * place**2, 7 * place])[kinds, torch.arange(count)]
    burst = 1.5 * (math.pi * place).sin() ** 2 * (2 * math.pi * turns).sin() * inside
    return (burst + 0.5 * torch.randn(count, LENGTH, generator=generator)).unsqueeze(1), kinds, inside


def train(generator: torch.Generator) -> nn.Module:
    """Train the network on signals generated on the fly."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for channels, width in ((1, 16), (16, 32), (32, 32)):
        blocks += [nn.Conv1d(channels, width, 9, padding=4), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        blocks += [nn.MaxPool1d(2)]
    network = nn.Sequential(*blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, len(KINDS)))
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(300):
        signals, kinds, _ = draw(64, generator)
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(signals), kinds).backward()
        optimiser.step()
    return network.eval()


def figure(signals: Tensor, inside: Tensor, maps: dict[str, Tensor], titles: Sequence[str]) -> Figure:
    """Draw one column per signal, with its maps below and the burst shaded."""
    drawn = Figure(figsize=(3.6 * len(signals), 1.3 * (1 + len(maps)) + 0.4), layout="constrained")
    grid = drawn.subplots(1 + len(maps), len(signals), sharex=True, sharey="row", squeeze=False)
    rows = {"signal": signals[:, 0]} | {name: found / found.mean(dim=1, keepdim=True) for name, found in maps.items()}
    for number, (name, values) in enumerate(rows.items()):
        for column, axes in enumerate(grid[number]):
            burst = inside[column].nonzero().flatten()
            axes.axvspan(burst[0].item(), burst[-1].item() + 1, color=LIGHT.lines[1], alpha=0.15, linewidth=0)
            if number == 0:
                axes.plot(values[column], color=LIGHT.ink, linewidth=0.8)
                axes.set_title(titles[column], fontsize=10.5)
            else:
                axes.fill_between(range(LENGTH), values[column], color=LIGHT.lines[0], linewidth=0)
                axes.set_ylim(0, 1.05 * values.max().item())
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
        grid[number, 0].set_ylabel(name, fontsize=9.5)
    drawn.supxlabel("time; bursts are shaded, maps are in multiples of their mean", fontsize=9)
    return drawn


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, explain, and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/examples"))
    out = parser.parse_args(arguments).out
    generator = torch.Generator().manual_seed(0)
    model = train(generator)
    signals, kinds, inside = draw(300, generator)
    accuracy = (model(signals).argmax(dim=1) == kinds).float().mean()
    print(f"accuracy on new signals: {accuracy:.2f}; a uniform map has {BURST / LENGTH:.2f} on the burst")
    maps = {}
    for name, selector in SELECTORS.items():
        maps[name] = pg.heatmap(pg.Explainer(model, selector, layers="all").attribute(signals, kinds))
        print(f"share on the burst, {name}: {((maps[name] * inside).sum(dim=1) / maps[name].sum(dim=1)).mean():.2f}")
    shown = [int((kinds == kind).nonzero()[0]) for kind in range(len(KINDS))]
    titles = [f"{kind} pitch" for kind in KINDS]
    path = out / "conv1d_signal.png"
    save_figure(figure(signals[shown], inside[shown], {name: m[shown] for name, m in maps.items()}, titles), path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
