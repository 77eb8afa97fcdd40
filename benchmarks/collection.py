"""The cost of collecting channel statistics: time relative to a bare forward loop, and memory by number of images.

    python benchmarks/collection.py                # the overhead on EfficientNet-Lite0
    python benchmarks/collection.py --memory       # peak memory at 1x and 10x the images

Rounds are interleaved; a ratio is the median over rounds. Images are random and in memory.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import parchgrad as pg

BATCH = 32
CLASSES = 1000


class RandomImages(Dataset[tuple[Tensor, int]]):
    """Random images (3, 224, 224), sorted by class like folders; a few distinct ones repeat, which saves time."""

    def __init__(self, count: int) -> None:
        """Store the number of images, and generate the distinct ones."""
        self.count = count
        self.distinct = torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.distinct[index % len(self.distinct)], index * CLASSES // self.count


def bare(model: torch.nn.Module, data: RandomImages) -> None:
    """Run only the forward loop."""
    with torch.inference_mode():
        for inputs, _ in DataLoader(data, BATCH):
            model(inputs)


def overhead(images: int, rounds: int) -> None:
    """Print the time of each kind of collection, relative to the bare loop."""
    model, data = pg.load_model("efficientnet_lite0").model, RandomImages(images)
    collect = partial(pg.collect_statistics, model, data, batch_size=BATCH)
    ways: dict[str, Callable[[], object]] = {
        "bare forward loop": partial(bare, model, data),
        "upper half, labels given": partial(collect, layers=0.5),
        "all layers, labels given": partial(collect, layers="all"),
        "upper half, labels predicted": partial(collect, layers=0.5, labels="predicted"),
        "all layers, labels predicted": partial(collect, layers="all", labels="predicted"),
    }
    passes: dict[str, list[float]] = {name: [] for name in ways}
    tests: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            ended: list[float] = []
            if name != "bare forward loop":
                run = partial(
                    run,
                    on_progress=lambda stage, done, total, ended=ended: (
                        ended.append(time.perf_counter()) if stage == "images" and done == total else None
                    ),
                )
            start = time.perf_counter()
            run()
            stop = time.perf_counter()
            passes[name].append((ended[-1] if ended else stop) - start)
            tests[name].append(stop - start - passes[name][-1])
    print(f"{images} images, batches of {BATCH}, {rounds} interleaved rounds; medians")
    for name in ways:
        ratio = statistics.median(a / b for a, b in zip(passes[name], passes["bare forward loop"], strict=True))
        print(
            f"{name:30s} {statistics.median(passes[name]):7.2f} s  x {ratio:.3f}"
            f"   plus {statistics.median(tests[name]):5.2f} s once at the end"
        )


def peak(images: int) -> float:
    """Collect over this many images, and return the peak memory in GB."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 256, 16, 16),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(256, CLASSES),
    ).eval()
    pg.collect_statistics(model, RandomImages(images), batch_size=BATCH, labels="predicted")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def memory(images: int) -> None:
    """Print the peak memory at 1x and 10x the images, each in a separate process."""
    for count in (images, 10 * images):
        ran = subprocess.run(
            [sys.executable, __file__, "--peak", str(count)], check=True, capture_output=True, text=True
        )
        print(f"{count:8d} images: peak {json.loads(ran.stdout):.3f} GB")


def main() -> None:
    """Parse the arguments and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak(arguments.peak))
    elif arguments.memory:
        memory(6000)
    else:
        overhead(arguments.images, arguments.rounds)


if __name__ == "__main__":
    main()
