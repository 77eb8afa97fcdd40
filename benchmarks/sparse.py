"""When it pays to propagate only a convolution's kept channels: the basis of the cost rule in convolution.py.

    python benchmarks/sparse.py

For layers of common networks, quantiles and batches whose rows all differ: the time of the sparse way relative to the
dense one, measured by turns, and which of the two the rule chooses. Takes minutes.
"""

import argparse
import itertools
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from parchgrad.core import convolution as module
from parchgrad.core.convolution import partitioned_input_gradient, plain_geometry

# Input channels, output channels, kernel, stride, groups, input size.
LAYERS = (
    (3, 64, 7, 2, 1, 224),
    (64, 64, 3, 1, 1, 56),
    (128, 128, 3, 1, 1, 28),
    (512, 512, 3, 1, 1, 7),
    (64, 64, 3, 1, 1, 112),
    (64, 256, 1, 1, 1, 56),
    (512, 128, 1, 1, 1, 28),
    (512, 1024, 1, 2, 1, 28),
    (128, 128, 3, 1, 32, 56),
    (96, 96, 3, 2, 96, 112),
    (672, 672, 5, 1, 672, 14),
    (1152, 48, 1, 1, 1, 1),
)


def ratio(layer: tuple[int, ...], rows: int, quantile: float, rounds: int) -> tuple[float, bool]:
    """Measure the time of the sparse way relative to the dense one, and whether the rule chooses it."""
    inputs, outputs, kernel, stride, groups, size = layer
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)
    geometry, weight = plain_geometry(convolution), convolution.weight.detach()
    shape = torch.Size((rows, inputs, size, size))
    gradient = torch.randn_like(convolution(torch.zeros(shape)))
    scores = torch.rand(rows, outputs)
    mask = scores >= scores.topk(max(1, int(quantile * outputs)), dim=1).values[:, -1:]
    scales = mask.float()
    assert geometry is not None
    costs = {name: getattr(module, name) for name in ("_COST_OF_A_KEPT_CHANNEL", "_COST_IN_GROUPS")}
    seconds: dict[float, list[float]] = {0.0: [], 1e9: []}
    try:
        for _, forced in itertools.product(range(rounds + 1), seconds):
            for name in costs:
                setattr(module, name, forced)
            start = time.perf_counter()
            partitioned_input_gradient(gradient, scales, weight, geometry, shape)
            seconds[forced].append(time.perf_counter() - start)
    finally:
        for name, cost in costs.items():
            setattr(module, name, cost)
    positions = gradient.shape[2:].numel()
    taken = module._find_kept(mask, groups, positions) is not None
    return statistics.median(a / b for a, b in zip(seconds[0.0][1:], seconds[1e9][1:], strict=True)), taken


def main() -> None:
    """Measure and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    table = Table(title="sparse / dense; * if the rule chooses the sparse way", title_justify="left", box=None)
    table.add_column("in, out, kernel, stride, groups, size")
    cases = list(itertools.product((1, 8), (0.1, 0.3, 0.5)))
    for rows, quantile in cases:
        table.add_column(f"{rows} x q{quantile:g}", justify="right")
    with torch.no_grad():
        for layer in LAYERS:
            found = [ratio(layer, rows, quantile, arguments.rounds) for rows, quantile in cases]
            table.add_row(str(layer), *(f"{value:.2f}{'*' if taken else ' '}" for value, taken in found))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
