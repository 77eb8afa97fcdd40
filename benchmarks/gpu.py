"""Check, time and measure on one GPU: a table and a JSON, within eight minutes and without network.

    python -m benchmarks.gpu                           # on CUDA
    python -m benchmarks.gpu --device cpu --quick      # dry run: small batches, and checks in float32

First the checks of `benchmarks/device_checks.py` in each dtype, then images per second of a collection, then speed and
memory. Every case of the latter gets an equal share of the time that is left; what does not fit is marked. Variants run
by turns, and a time is the median over the rounds. Weights are random.
"""

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from benchmarks.device_checks import CHECKS, TOLERANCES, Outcome, check
from benchmarks.speed import STEPS, integrated, machine, network, photographs, saliency
from torch import Tensor, nn

import parchgrad as pg
from parchgrad._io.files import writing_together

NETWORKS = ("resnet50", "efficientnet_b0", "convnext_tiny", "vit_b_16")
BATCHES = (1, 32, 128)
MOST_ROUNDS = 15
# Rows per pass of integrated gradients, at least.
ROWS = 25
BASE = "Captum Saliency"
# Most batches of a collection, and seconds that its passes and bare ones may take.
MOST_COLLECTED = 32
COLLECTING = 10.0


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a variant took.

    Attributes:
        seconds: median time of a batch; NaN if nothing was measured.
        ratio: median over the rounds of its time relative to Captum's Saliency; NaN if nothing was measured.
        rounds: number of rounds.
        megabytes: peak of allocated memory above that before the call; NaN on the CPU.
        reason: why nothing was measured; empty if it was.
    """

    seconds: float = math.nan
    ratio: float = math.nan
    rounds: int = 0
    megabytes: float = math.nan
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Speed of a collection of channel statistics.

    Attributes:
        images: number of images.
        per_second: images per second of the passes.
        bare_per_second: images per second of bare forward passes.
        tests: seconds of the tests for normality at the end.
    """

    images: int
    per_second: float
    bare_per_second: float
    tests: float


Call = Callable[[], object]


def variants(model: nn.Module, inputs: Tensor, target: Tensor) -> dict[str, tuple[Call, int]]:
    """Return the calls to compare and about how many gradients each takes per image, Captum's Saliency first."""

    def explain(selector: pg.Selector | None) -> Call:
        explainer = pg.Explainer(model, selector, internal_batch_size=None)
        return partial(explainer.attribute, inputs, target)

    rows = max(len(inputs), ROWS)
    return {
        BASE: (partial(saliency, model, inputs, target), 1),
        "plain gradient": (explain(None), 1),
        "energy": (explain(pg.GradientEnergy()), 1),
        "default": (explain(pg.Evidence()), 1),
        f"Captum IG-{STEPS}": (partial(integrated, model, inputs, target, rows=rows), STEPS),
    }


def seconds_of(call: Call, device: torch.device) -> float:
    """Time a call, by events on CUDA."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def megabytes_of(call: Call, device: torch.device) -> float:
    """Measure the peak of allocated memory during a call; NaN on the CPU."""
    if device.type != "cuda":
        call()
        return math.nan
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def measure(calls: Mapping[str, tuple[Call, int]], device: torch.device, seconds: float) -> dict[str, Figures]:
    """Measure calls by turns within a time budget, leaving out those that do not fit."""
    end = time.perf_counter() + seconds
    held: dict[str, float] = {}
    costs: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name, (call, gradients) in calls.items():
        expected = gradients * costs.get(BASE, 0.0)
        # Three calls at least: the first loads kernels, one measures memory, and one is a round.
        if (name != BASE and BASE not in costs) or 3 * expected > end - time.perf_counter():
            reasons[name] = reasons.get(BASE, "no time")
            continue
        try:
            call()
            held[name] = megabytes_of(call, device)
            costs[name] = seconds_of(call, device)
        except torch.cuda.OutOfMemoryError:
            reasons[name] = "no memory"
        if name in reasons and device.type == "cuda":
            # Not in the handler, where the exception still holds the tensors of the call.
            torch.cuda.empty_cache()
    left = (end - time.perf_counter()) / sum(costs.values()) if costs else 0.0
    # Without time for a round, the calls above are one.
    rounds = min(MOST_ROUNDS, max(0, int(left)))
    times = {name: [] if rounds else [cost] for name, cost in costs.items()}
    names = list(costs)
    for turn in range(rounds):
        # Each variant goes first in turn.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(seconds_of(calls[name][0], device))
    return {
        name: Figures(reason=reasons[name])
        if name in reasons
        else Figures(
            seconds=statistics.median(times[name]),
            ratio=statistics.median(own / base for own, base in zip(times[name], times[BASE], strict=True)),
            rounds=len(times[name]),
            megabytes=held[name],
        )
        for name in calls
    }


def collect(model: nn.Module, device: torch.device, batch: int) -> Rate:
    """Measure how many images per second a collection takes; images are on the device already."""
    inputs, labels = photographs(batch)
    inputs = inputs.to(device)

    def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(count):
            yield inputs, labels

    def bare(count: int) -> None:
        with torch.inference_mode():
            for images, _ in batches(count):
                model(images)

    seconds_of(partial(bare, 1), device)
    each = seconds_of(partial(bare, 1), device)
    count = max(2, min(MOST_COLLECTED, int(COLLECTING / (3 * each))))
    alone = seconds_of(partial(bare, count), device)
    ended = []

    def note(stage: str, done: int, total: int | None) -> None:
        if stage == "normality" and not ended:
            ended.append(time.perf_counter())

    start = time.perf_counter()
    pg.collect_statistics(model, batches(count), on_progress=note)
    stop = time.perf_counter()
    return Rate(
        images=count * batch,
        per_second=count * batch / (ended[0] - start),
        bare_per_second=count * batch / alone,
        tests=stop - ended[0],
    )


def described(device: torch.device) -> dict[str, object]:
    """Describe the machine, the device and the versions."""
    found = {**machine(), "device": str(device)}
    if device.type == "cuda":
        precision = {True: "TF32", False: "float32"}
        found |= {
            "device": torch.cuda.get_device_name(device),
            "memory": f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "convolutions in": precision[torch.backends.cudnn.allow_tf32],
            "products in": precision[torch.backends.cuda.matmul.allow_tf32],
        }
    return found


def without_nan(value: object) -> object:
    """Replace NaN by None, since JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def number(value: float, digits: int = 2) -> str:
    """Write a number; nothing for NaN."""
    return "" if math.isnan(value) else f"{value:,.{digits}f}"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table."""
    rows = [header, ["---"] + ["---:"] * (len(header) - 1), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def markdown(
    machine: Mapping[str, object],
    checks: Sequence[Outcome],
    rates: Mapping[str, Rate],
    cases: Mapping[str, Mapping[str, Figures]],
) -> str:
    """Write all results as a page."""
    parts = [f"# Measured on {machine['device']}", ", ".join(f"{name}: {value}" for name, value in machine.items())]
    if checks:
        by_name: dict[str, dict[str, str]] = {one.name: {} for one in checks}
        for one in checks:
            remarks = ["" if one.passed else " **too far**", "" if one.repeats else " other bits"]
            by_name[one.name][one.dtype] = f"{one.error:.1e}{''.join(remarks)}"
        dtypes = list(dict.fromkeys(one.dtype for one in checks))
        bounds = ", ".join(dict.fromkeys(f"{one.dtype} {one.tolerance:g}" for one in checks))
        parts += [
            "## The same as the CPU in float64",
            f'Norm of the difference over the norm; at most {bounds}. TF32 is off here. "Other bits": a second call '
            "gave a slightly different result.",
            table(["", *dtypes], [[name, *(own.get(dtype, "") for dtype in dtypes)] for name, own in by_name.items()]),
        ]
    if rates:
        lines = [
            [name, str(rate.images), *(number(value, 0) for value in (rate.per_second, rate.bare_per_second)),
             number(rate.tests, 1)]
            for name, rate in rates.items()
        ]  # fmt: skip
        parts += [
            "## Collecting statistics",
            "Images per second of the passes over all layers and of bare forward passes, then the tests for normality "
            "once at the end.",
            table(["", "images", "images/s", "bare images/s", "tests, s"], lines),
        ]
    if cases:
        names = list(next(iter(cases.values())))
        relative = [
            [name, *(own[way].reason or number(own[way].ratio) for way in names), number(1000 * own[BASE].seconds, 1),
             str(own[BASE].rounds)]
            for name, own in cases.items()
        ]  # fmt: skip
        parts += [
            "## Time relative to Captum's Saliency",
            "Median over interleaved rounds of a whole batch in float32.",
            table(["", *names, "1.00 is, ms", "rounds"], relative),
        ]
        if any(not math.isnan(own[BASE].megabytes) for own in cases.values()):
            lines = [
                [name, *(own[way].reason or number(own[way].megabytes, 0) for way in names)]
                for name, own in cases.items()
            ]
            parts += [
                "## Peak memory in MiB",
                "What a call allocates at most, without the weights and the images.",
                table(["", *names], lines),
            ]
    return "\n\n".join(parts) + "\n"


def run_checks(device: torch.device, dtypes: Sequence[torch.dtype]) -> list[Outcome]:
    """Run all checks in the given dtypes."""
    found = []
    for name in CHECKS:
        for dtype in dtypes:
            found.append(check(name, device, dtype))
            one = found[-1]
            print(f"{name}, {one.dtype}: {one.error:.1e}{'' if one.passed else ', too far'}", flush=True)
    return found


def main() -> None:
    """Parse the arguments, measure, and print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--minutes", type=float, help="for everything; 7.5, or 3 with --quick")
    parser.add_argument("--quick", action="store_true", help="only the checks in float32, and small batches")
    parser.add_argument("--skip", nargs="+", default=[], choices=["checks", "collection", "speed"])
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --quick is a dry run")
    if device.type == "cuda":
        # Events are recorded on the current device.
        torch.cuda.set_device(device)
    # Gradients vanish in random networks; slow arithmetic on denormal numbers would distort the times.
    torch.set_flush_denormal(True)
    # The shapes networks name operations that are not balanced, and Captum its hooks.
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    end = started + 60 * (arguments.minutes or (3 if arguments.quick else 7.5))
    batches = arguments.batches or ((1, 2) if arguments.quick else BATCHES)
    dtypes = [torch.float32] if arguments.quick else list(TOLERANCES)
    checks = [] if "checks" in arguments.skip else run_checks(device, dtypes)
    rates: dict[str, Rate] = {}
    if "collection" not in arguments.skip:
        for name in arguments.networks:
            rates[name] = collect(network(name).to(device), device, 2 if arguments.quick else 64)
            print(f"{name}: {rates[name].per_second:,.0f} images per second", flush=True)
    cases: dict[str, dict[str, Figures]] = {}
    wanted = [] if "speed" in arguments.skip else [(name, batch) for batch in batches for name in arguments.networks]
    for place, (name, batch) in enumerate(wanted):
        share = max(end - time.perf_counter(), 0.0) / (len(wanted) - place)
        model = network(name).to(device).requires_grad_(False)
        inputs, target = (tensor.to(device) for tensor in photographs(batch))
        cases[f"{name} x {batch}"] = measure(variants(model, inputs, target), device, share)
        print(f"{name} x {batch}: done after {time.perf_counter() - started:.0f} s", flush=True)
    found = {
        "machine": described(device),
        "checks": [asdict(one) | {"passed": one.passed} for one in checks],
        "collection": {name: asdict(rate) for name, rate in rates.items()},
        "speed": {case: {way: asdict(own) for way, own in ways.items()} for case, ways in cases.items()},
        "seconds": time.perf_counter() - started,
    }
    page = markdown(found["machine"], checks, rates, cases)
    arguments.out.mkdir(parents=True, exist_ok=True)
    paths = arguments.out / "gpu.md", arguments.out / "gpu.json"
    with writing_together(paths, force=True) as drafts:
        for draft, text in zip(drafts, (page, json.dumps(without_nan(found), indent=2) + "\n"), strict=True):
            draft.write_text(text, encoding="utf-8")
    print(page)
    print(f"Wrote {paths[0]} and {paths[1]} after {found['seconds']:.0f} s")
    failed = [f"{one.name} in {one.dtype}" for one in checks if not one.passed]
    if failed:
        parser.exit(1, f"Too far from the CPU: {', '.join(failed)}\n")


if __name__ == "__main__":
    main()
