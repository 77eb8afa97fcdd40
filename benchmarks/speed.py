"""How long attribution takes with and without ParchGrad, compared with Captum and the research code's way.

    python benchmarks/speed.py                      # everything, about 40 minutes on two cores
    python benchmarks/speed.py --networks resnet18 --batches 1 --skip steps memory scaling

All variants run in one process, by turns; a ratio is the median over rounds of the ratio within a round. Weights are
random. Tables are printed, and all results written to outputs/speed.json.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path

import captum
import timm
import torch
import torchvision
from captum.attr import IntegratedGradients, NoiseTunnel, Saliency
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import parchgrad as pg

NETWORKS = ("resnet18", "resnet50", "vgg16_bn", "efficientnet_b0", "convnext_tiny", "vit_small_patch16_224")
QUANTILE = 0.1
STEPS = 25
ROWS_PER_PASS = 25
BASE = "Captum Saliency"

Way = Callable[[Tensor, Tensor], object]


def network(name: str) -> nn.Module:
    """Create a network of torchvision or timm with random weights."""
    torch.manual_seed(0)
    of_torchvision = getattr(torchvision.models, name, None)
    model: nn.Module = timm.create_model(name) if of_torchvision is None else of_torchvision(weights=None)
    return model.eval()


def photographs(batch: int, size: int = 224) -> tuple[Tensor, Tensor]:
    """Make random inputs (B, 3, size, size) and a different class for each."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)), torch.arange(batch)


# Settings by their names in the tables.
EDITS = {
    "plain": pg.Edit(selector=None),
    "plain with gates and strides": pg.Edit(selector=None, gates=pg.Edit().resolved().gates, antialias=True),
    "default": pg.Edit(),
    "default without gates, strides and balance": pg.Edit(gates=0.0, antialias=False, balance=False),
    "energy, all": pg.Edit(
        selector=pg.GradientEnergy(quantile=QUANTILE), layers="all", gates=0.0, antialias=False, balance=False
    ),
    "energy, all, hard": pg.Edit(selector=pg.GradientEnergy(quantile=QUANTILE, softness=0), layers="all"),
}


def explain(model: nn.Module, edit: pg.Edit, inputs: Tensor, target: Tensor, *, method: str = "gradient") -> Tensor:
    """Compute the attribution with this package."""
    explainer = pg.Explainer.from_edit(model, edit, method=method, internal_batch_size=ROWS_PER_PASS)
    return explainer.attribute(inputs, target)


def bare_block(model: nn.Module, edit: pg.Edit, inputs: Tensor, target: Tensor) -> Tensor:
    """Compute Captum's Saliency in a ParchGrad block."""
    settings = {item.name: getattr(edit, item.name) for item in fields(edit) if item.name != "selector"}
    with pg.ParchGrad(model, edit.selector, **settings):
        return saliency(model, inputs, target)


def saliency(model: nn.Module, inputs: Tensor, target: Tensor) -> Tensor:
    """Compute the plain gradient with Captum."""
    return Saliency(model).attribute(inputs.clone().requires_grad_(), target=target)


def integrated(model: nn.Module, inputs: Tensor, target: Tensor, *, rows: int = ROWS_PER_PASS) -> Tensor:
    """Compute integrated gradients with Captum, by default with as many rows per pass as this package."""
    return IntegratedGradients(model).attribute(
        inputs.clone().requires_grad_(), target=target, n_steps=STEPS, internal_batch_size=rows
    )


def smoothed(model: nn.Module, inputs: Tensor, target: Tensor) -> Tensor:
    """Compute SmoothGrad with Captum, with as many rows per pass as this package."""
    return NoiseTunnel(Saliency(model)).attribute(
        inputs.clone().requires_grad_(),
        target=target,
        nt_samples=STEPS,
        nt_samples_batch_size=max(1, ROWS_PER_PASS // len(inputs)),
        stdevs=0.15,
    )


class ResearchWay:
    """The research code's way: image by image, all gradients, and each input gradient computed twice.

    A forward hook keeps inputs; a full backward hook edits the gradient at the output and calls `conv2d_input`. Such
    hooks break on in-place operations, so the network is copied without them.
    """

    def __init__(self, model: nn.Module) -> None:
        """Copy the network and hook all its convolutions."""
        self.model = copy.deepcopy(model)
        for module in self.model.modules():
            if hasattr(module, "inplace"):
                module.inplace = False
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(self.keep)
                module.register_full_backward_hook(self.edit)
        self.inputs: dict[nn.Module, Tensor] = {}

    def keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep the input of a convolution."""
        self.inputs[module] = inputs[0]

    def edit(self, module: nn.Conv2d, inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor, ...]) -> object:
        """Prune, re-scale, and compute the gradient at the input."""
        if inputs[0] is None:
            return None
        gradient = outputs[0]
        energy = gradient.square().sum(dim=(0, 2, 3))
        kept = energy >= energy.topk(max(1, int(QUANTILE * len(energy)))).values[-1]
        sums = gradient[:, kept].sum(1), gradient[:, ~kept].sum(1)
        of_kept, of_rest = (part.var() if part.numel() > 1 else part.abs().sum() for part in sums)
        edited = torch.zeros_like(gradient)
        edited[:, kept] = gradient[:, kept] * ((of_kept + of_rest) / of_kept).sqrt()
        settings = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups")}
        return (nn.grad.conv2d_input(self.inputs[module].shape, module.weight, edited, **settings),)

    def __call__(self, inputs: Tensor, target: Tensor) -> Tensor:
        """Explain image by image."""
        maps = []
        for image, category in zip(inputs, target, strict=True):
            self.model.zero_grad()
            leaf = image.unsqueeze(0).clone().requires_grad_()
            self.model(leaf)[0, category].backward()
            maps.append(leaf.grad)
        # Hold nothing between calls, so that the memory comparison is fair.
        self.inputs.clear()
        self.model.zero_grad()
        return torch.cat(maps)


def gradient_ways(model: nn.Module) -> dict[str, Way]:
    """Return the variants that compute one gradient per row."""
    return {
        BASE: partial(saliency, model),
        **{f"ParchGrad block, {name}": partial(bare_block, model, edit) for name, edit in EDITS.items()},
        "Explainer, plain": partial(explain, model, EDITS["plain"]),
        "Explainer, default": partial(explain, model, EDITS["default"]),
        "research code's way, all": ResearchWay(model),
    }


def step_ways(model: nn.Module) -> dict[str, dict[str, Way]]:
    """Return the variants that compute 25 gradients per row, by method, Captum's first."""
    return {
        title: {
            f"Captum {title}": theirs(model),
            **{
                f"{title}, {name}": partial(explain, model, EDITS[name], method=method)
                for name in ("plain", "default", "energy, all")
            },
        }
        for title, method, theirs in (
            (f"IG-{STEPS}", "integrated_gradients", lambda model: partial(integrated, model)),
            (f"SmoothGrad-{STEPS}", "smoothgrad", lambda model: partial(smoothed, model)),
        )
    }


Figures = dict[str, dict[str, float]]


def by_turns(ways: dict[str, Way], inputs: Tensor, target: Tensor, rounds: int, *, warm: bool = True) -> Figures:
    """Measure the median seconds of each variant, and the median over rounds of its ratio to the first one."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(rounds + warm):
        # Each variant goes first in turn.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            ways[name](inputs, target)
            if turn >= warm:
                seconds[name].append(time.perf_counter() - start)
    first = seconds[next(iter(ways))]
    return {
        name: {
            "seconds": statistics.median(times),
            "ratio": statistics.median(a / b for a, b in zip(times, first, strict=True)),
        }
        for name, times in seconds.items()
    }


def peak(name: str, batch: int, way: str) -> float:
    """Measure the peak memory of a variant in megabytes, minus that of the process before."""
    torch.set_flush_denormal(True)
    model = network(name)
    inputs, target = photographs(batch)
    found = gradient_ways(model)[way]
    # The first call loads kernels, which stay.
    found(inputs, target)
    # Reset the peak (proc(5)); the one of getrusage would include the peak of the parent process.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    for _ in range(3):
        found(inputs, target)
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """Read the process's memory in megabytes, now (`VmRSS`) or at the peak (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def measure_memory(name: str, batch: int) -> Figures:
    """Measure the peak memory of each variant, each in a separate process."""
    found: Figures = {}
    for way in (BASE, "ParchGrad block, default", "ParchGrad block, energy, all", "research code's way, all"):
        call = [sys.executable, __file__, "--peak", name, str(batch), way]
        # Return freed memory at once, so that resident memory is memory in use.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        ran = subprocess.run(call, check=True, capture_output=True, text=True, env=environment)
        found[way] = {"megabytes": json.loads(ran.stdout)}
    for entry in found.values():
        entry["ratio"] = entry["megabytes"] / found[BASE]["megabytes"]
    return found


def machine() -> dict[str, object]:
    """Describe the machine and the versions."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    return {
        "processor": next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor()),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "captum": captum.__version__,
        "parchgrad": pg.__version__,
    }


def show(title: str, results: dict[str, Figures], unit: str) -> None:
    """Print a table with one row per variant and one column per case."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("")
    for case in results:
        table.add_column(case, justify="right", no_wrap=True)
    for way in next(iter(results.values())):
        table.add_row(way, *(f"{ways[way]['ratio']:.2f}" for ways in results.values()))
    absolute = [f"{next(iter(ways.values()))[unit]:,.3f}" for ways in results.values()]
    table.add_row(f"[dim]1.00 corresponds to, {unit}", *(f"[dim]{value}" for value in absolute))
    console = Console(width=max(120, 40 + 18 * len(results)))
    console.print(title, style="bold")
    console.print(table)
    console.print()


def main() -> None:
    """Parse the arguments, measure, and print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--skip", nargs="+", default=[], choices=["gradient", "steps", "scaling", "memory"])
    parser.add_argument("--out", type=Path, default=Path("outputs/speed.json"))
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        name, batch, way = arguments.peak
        print(peak(name, int(batch), way))
        return
    # Gradients vanish in random networks; slow arithmetic on denormal numbers would distort the times.
    torch.set_flush_denormal(True)
    cases = [(name, batch) for name in arguments.networks for batch in arguments.batches]
    found: dict[str, object] = {"machine": machine(), "command": " ".join(sys.argv[1:])}
    if "gradient" not in arguments.skip:
        results: dict[str, Figures] = {}
        for name, batch in cases:
            rounds = arguments.rounds if batch == 1 else max(3, arguments.rounds // 2)
            results[f"{name} x {batch}"] = by_turns(gradient_ways(network(name)), *photographs(batch), rounds)
        show("One gradient, time relative to Captum Saliency", results, "seconds")
        found["gradient"] = results
    if "steps" not in arguments.skip:
        for title in (f"IG-{STEPS}", f"SmoothGrad-{STEPS}"):
            results = {}
            for name, batch in cases:
                ways, rounds = step_ways(network(name))[title], 3 if batch == 1 else 1
                results[f"{name} x {batch}"] = by_turns(ways, *photographs(batch), rounds, warm=batch == 1)
            show(f"{title}, time relative to Captum", results, "seconds")
            found[title] = results
    if "scaling" not in arguments.skip:
        name = arguments.networks[0]
        everything = gradient_ways(network(name))
        ways = {way: everything[way] for way in (BASE, "ParchGrad block, default", "ParchGrad block, energy, all")}
        by_batch = {f"{batch}": by_turns(ways, *photographs(batch), 5) for batch in (1, 2, 4, 8, 16, 32)}
        by_size = {f"{size}": by_turns(ways, *photographs(4, size), 5) for size in (64, 128, 224, 320, 448)}
        show(f"{name} by batch size, 224 pixels", by_batch, "seconds")
        show(f"{name} by image size, batch 4", by_size, "seconds")
        found["scaling"] = {"network": name, "batch size": by_batch, "image size": by_size}
    if "memory" not in arguments.skip and Path("/proc/self/status").exists():
        results = {f"{name} x {batch}": measure_memory(name, batch) for name, batch in cases}
        show("Peak memory relative to Captum Saliency", results, "megabytes")
        found["memory"] = results
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"Wrote all results to {arguments.out}")


if __name__ == "__main__":
    main()
