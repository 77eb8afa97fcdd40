"""The leaderboard: the methods people use on the same images, with tests for the whole table.

    python -m benchmarks.leaderboard [--data ../shared/data] [--runs outputs/leaderboard] [--out docs/leaderboard]
    python -m benchmarks.leaderboard --networks shapes cifar10 --share 0.1     # a trial
    python -m benchmarks.leaderboard --method mine.py:make                     # one more method, from your file

Two processes share the images; if they are stopped, the same command resumes them. Then time and memory are measured,
and the page is written. Methods of other packages take part if they are installed: `pip install -e '.[leaderboard]'`.

Every method has its usual settings. All images are odd-numbered or drawn from new seeds: none was used to choose a
setting of this package. Rows are kept by title: after changing a method, pass another folder of runs.
"""

import argparse
import json
import math
import os
import runpy
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.cifar10 import labelled, load_resnet20
from benchmarks.neighbours import neighbours
from benchmarks.speed import by_turns, resident
from benchmarks.study import Photographs, load_lite1, part_of, shuffled
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

import parchgrad as pg
from parchgrad._io.files import writing
from parchgrad.data.samples import LabelledImages, Pairs, Sample, Samples
from parchgrad.data.shapes import GeneratedShapes
from parchgrad.evaluation.grid_pointing import Mosaics, make_mosaics
from parchgrad.evaluation.leaderboard import MakeMethod, leaderboard_methods, methods_that_fit
from parchgrad.evaluation.report import BASELINE
from parchgrad.evaluation.runs import TargetChoice, evaluate
from parchgrad.evaluation.scores import ScoreSettings

NETWORKS = ("shapes", "shapes_vit", "shapes_convnext", "cifar10", "efficientnet_lite0", "efficientnet_lite1")
PROCESSES = 2
ROUNDS = 3
FAITHFUL = ScoreSettings(
    families=("perturbation", "insertion", "relevance_gain", "localisation", "class_similarity", "sparsity"), steps=10
)
STEADY = ScoreSettings(
    families=("stability", "sensitivity", "randomisation"), noise_draws=1, samples=3, randomised=(0.1, 1.0)
)
PLACES = ScoreSettings(families=("localisation",))


@dataclass(frozen=True, eq=False, kw_only=True)
class Part:
    """A set of images of a network, and what is measured on them.

    Attributes:
        name: `"images"`, `"steady"`, `"rivals"`, `"grid-2"` or `"grid-3"`; also its folder.
        words: the images, in words.
        make: makes the images.
        settings: the scores.
        target: class to explain; in a mosaic, that of the cell.
        batch_size: number of images that are scored together.
    """

    name: str
    words: str
    make: Callable[[], Samples]
    settings: ScoreSettings
    target: TargetChoice = "label"
    batch_size: int = 8


@dataclass(frozen=True, eq=False, kw_only=True)
class Network:
    """A network of the leaderboard.

    Attributes:
        name: name of its folder.
        title: title on the page.
        model: the network.
        parts: what is measured; the first part has single images.
        unseen: other images, for channel statistics.
        labels: labels of `unseen`; see `collect_statistics`.
        together: number of images in the measurement of time and memory.
        rows: number of rows per pass; more large ones at a time are slower on a CPU.
        note: what to know about the images, and what is not measured and why.
    """

    name: str
    title: str
    model: nn.Module
    parts: tuple[Part, ...]
    unseen: Dataset[Any]
    labels: Any
    together: int = 8
    rows: int = 32
    note: str = ""


class OneCellEach(Dataset[Sample]):
    """One cell of each mosaic, the cells in turn: the fewest maps for as many independent scores."""

    def __init__(self, mosaics: Mosaics, cells: int) -> None:
        """Choose the cells."""
        self.mosaics, self.cells, self.categories = mosaics, cells, mosaics.categories
        self.fingerprint = f"one cell each of {mosaics.fingerprint}"

    def __len__(self) -> int:
        return len(self.mosaics) // self.cells

    def __getitem__(self, index: int) -> Sample:
        return self.mosaics[range(len(self))[index] * self.cells + index % self.cells]


def grid(model: nn.Module, data: Callable[[], Samples], side: int, count: int, confidence: float, batch: int) -> Part:
    """Make the grid pointing game of `side` x `side` cells."""

    def make() -> Samples:
        mosaics = make_mosaics(
            model, data(), count=count, rows=side, columns=side, confidence=confidence, batch_size=8, seed=side
        )
        return OneCellEach(mosaics, side * side)

    return Part(
        name=f"grid-{side}",
        words=f"{count} mosaics of {side} x {side} images with a confidence of at least {confidence}, one cell of each",
        make=make,
        settings=PLACES,
        batch_size=batch,
    )


def shapes_network(name: str, title: str, share: float) -> Network:
    """Make a network for generated shapes, which have exact masks."""
    model = pg.load_model(name).model
    counts = {part: part_of(count, share) for part, count in (("images", 50), ("steady", 30), ("rivals", 60))}
    parts = [
        Part(
            name="images",
            words=f"{counts['images']} images",
            make=lambda: GeneratedShapes(count=counts["images"], seed=400),
            settings=FAITHFUL,
            batch_size=25,
        ),
        Part(
            name="rivals",
            words=f"{counts['rivals']} images with a shape of another class",
            make=lambda: GeneratedShapes(count=counts["rivals"], seed=401, rivals=1),
            settings=PLACES,
            batch_size=30,
        ),
        Part(
            name="steady",
            words=f"{counts['steady']} images",
            make=lambda: GeneratedShapes(count=counts["steady"], seed=402),
            settings=STEADY,
            batch_size=15,
        ),
    ]
    without = {
        "shapes": "The grid pointing game is left out, since random channels win it on this network: each place has "
        "its own logits.",
        "shapes_vit": "The grid pointing game is left out, since the network takes images of one size.",
    }
    if name not in without:
        confident = part_of(40, share)
        parts[2:2] = [
            grid(model, lambda: GeneratedShapes(count=600, seed=403), side, confident, 0.99, 20) for side in (2, 3)
        ]
    return Network(
        name=name,
        title=title,
        model=model,
        parts=tuple(parts),
        unseen=Pairs(GeneratedShapes(count=500, seed=200)),
        labels="given",
        note=without.get(name, ""),
    )


def cifar10_network(folder: Path, share: float) -> Network:
    """Make ResNet-20 with odd-numbered test images of CIFAR-10 that chose no setting."""
    images, training = labelled(folder / "test"), labelled(folder / "train")
    odd = Subset(images, range(1, len(images), 2))
    # The first 150 were used before the quantile was chosen.
    kept = shuffled(len(odd))[150:]
    model = load_resnet20(folder / "resnet20.th")

    def drawn(count: int) -> Callable[[], Samples]:
        return lambda: LabelledImages(Subset(odd, sorted(kept[:count])), categories=images.folders)

    counts = {part: part_of(count, share) for part, count in (("images", 150), ("steady", 60))}
    return Network(
        name="cifar10",
        title="ResNet-20, CIFAR-10",
        model=model,
        parts=(
            Part(
                name="images",
                words=f"{counts['images']} test images",
                make=drawn(counts["images"]),
                settings=FAITHFUL,
                target="predicted",
                batch_size=25,
            ),
            grid(model, drawn(len(kept)), 2, part_of(40, share), 0.99, 20),
            # The images that reach 0.99 make 19 mosaics.
            grid(model, drawn(len(kept)), 3, part_of(20, share), 0.98, 10),
            Part(
                name="steady",
                words=f"{counts['steady']} test images",
                make=drawn(counts["steady"]),
                settings=STEADY,
                target="predicted",
                batch_size=30,
            ),
        ),
        unseen=Subset(training, shuffled(len(training))[:1000]),
        labels="given",
    )


def image_network(folder: Path, share: float, lite: int) -> Network:
    """Make an EfficientNet-Lite with odd-numbered images, one for each ImageNet class."""
    classifier = pg.load_model("efficientnet_lite0") if lite == 0 else load_lite1()
    photographs = Photographs(folder, classifier, with_class=True)
    odd = Subset(photographs, range(1, len(photographs), 2))
    even = [2 * place for place in shuffled(len(odd))]

    def drawn(count: int) -> Callable[[], Samples]:
        chosen = sorted(shuffled(len(odd))[:count])
        return lambda: LabelledImages(Subset(odd, chosen), categories=classifier.categories)

    images, few = part_of((28, 20)[lite], share), part_of(20, share)
    # The highest that enough images reach.
    confidence = (0.95, 0.8)[lite]
    parts = [
        Part(
            name="images",
            words=f"{images} images",
            make=drawn(images),
            settings=FAITHFUL,
            target="predicted",
            batch_size=8,
        ),
        grid(classifier.model, drawn(len(odd)), 2, few, confidence, 2),
    ]
    if lite == 0:
        parts += [
            grid(classifier.model, drawn(len(odd)), 3, few, 0.8, 1),
            Part(
                name="steady",
                words=f"{few} images",
                make=drawn(few),
                settings=STEADY,
                target="predicted",
                batch_size=10,
            ),
        ]
    return Network(
        name=f"efficientnet_lite{lite}",
        title=f"EfficientNet-Lite{lite}, ImageNet",
        model=classifier.model,
        parts=tuple(parts),
        unseen=Subset(Photographs(folder, classifier, with_class=False), even[:200]),
        labels="predicted",
        together=1,
        rows=4,
        note=f"Of the 500 images, {(11, 1)[lite]} reach the published confidence of 0.99."
        + ("" if lite == 0 else " Stability, randomisation and 3 x 3 mosaics are left out for time."),
    )


def make_networks(data: Path, names: Sequence[str], share: float) -> tuple[list[Network], dict[str, str]]:
    """Make the networks whose data exist, and say why others are left out."""
    titles = {"shapes": "residual network, shapes", "shapes_vit": "transformer, shapes"}
    titles["shapes_convnext"] = "ConvNeXt, shapes"
    found, left_out = [], {}
    for name in names:
        folder = data / ("cifar10" if name == "cifar10" else "imagenet-one-per-class")
        if name in titles:
            found.append(shapes_network(name, titles[name], share))
        elif not folder.is_dir():
            left_out[name] = f"the data folder lacks a folder {folder.name} of images"
        elif name == "cifar10":
            found.append(cifar10_network(folder, share))
        else:
            found.append(image_network(folder, share, int(name[-1])))
    return found, left_out


def statistics_of(network: Network, folder: Path) -> pg.ChannelStatistics:
    """Load the channel statistics of a network, or collect them."""
    path = folder / network.name / "statistics.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        size = network.parts[0].batch_size
        pg.collect_statistics(network.model, network.unseen, labels=network.labels, batch_size=size).save(path)
    return pg.ChannelStatistics.load(path)


def fitting_methods(network: Network, folder: Path, own: Sequence[str]) -> tuple[dict[str, MakeMethod], dict[str, str]]:
    """List the methods that fit a network, and why the others do not."""
    image, target = images_of(network, 1)
    methods = {
        **leaderboard_methods(
            network.model, statistics=statistics_of(network, folder), internal_batch_size=network.rows
        ),
        **neighbours(image),
        **{reference.rpartition(":")[2]: own_method(reference) for reference in own},
    }
    return methods_that_fit(network.model, methods, image, target)


def own_method(reference: str) -> MakeMethod:
    """Load a function `make(model) -> method` from `file.py:make`."""
    path, _, name = reference.rpartition(":")
    found: MakeMethod = runpy.run_path(path)[name]
    return found


def images_of(network: Network, count: int) -> tuple[Tensor, Tensor]:
    """Return the first images of a network, and the classes predicted for them."""
    data = network.parts[0].make()
    images = torch.stack([data[index].image for index in range(min(count, len(data)))])
    with torch.no_grad():
        return images, network.model(images).argmax(dim=1)


def work(networks: Sequence[Network], folder: Path, own: Sequence[str]) -> None:
    """Score this process's share of all images."""
    for network in networks:
        methods, _ = fitting_methods(network, folder, own)
        for part in network.parts:
            evaluate(
                network.model,
                part.make(),
                (),
                folder / network.name / part.name,
                name=network.name,
                methods=methods,
                scores=replace(part.settings, internal_batch_size=network.rows),
                target=part.target,
                batch_size=part.batch_size,
            )


def measure_time(network: Network, folder: Path, own: Sequence[str]) -> dict[str, Any]:
    """Measure the time of every method as a ratio to the plain gradient, and say which are left out."""
    made, left_out = fitting_methods(network, folder, own)
    ways = {title: make(network.model) for title, make in made.items()}
    timed = by_turns(ways, *images_of(network, network.together), ROUNDS)
    return {"time": {title: entry["ratio"] for title, entry in timed.items()}, "left_out": left_out}


def measure_memory(network: Network, folder: Path, own: Sequence[str]) -> dict[str, Any]:
    """Measure the peak memory of every method as a ratio to the plain gradient."""
    made, _ = fitting_methods(network, folder, own)
    images, target = images_of(network, network.together)
    peaks = {}
    for title, make in made.items():
        way = make(network.model)
        # The first call loads kernels, which stay.
        way(images, target)
        peaks[title] = peak_of(way, images, target)
    # Less than a megabyte is noise.
    return {"memory": {title: max(peak, 1.0) / max(peaks[BASELINE], 1.0) for title, peak in peaks.items()}}


MEASUREMENTS = {"time": measure_time, "memory": measure_memory}


def peak_of(way: Callable[[Tensor, Tensor], object], images: Tensor, target: Tensor) -> float:
    """Measure the peak memory of a call in megabytes, above that before it; NaN where the system is not Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return math.nan
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    way(images, target)
    return resident("VmHWM") - before


def start(arguments: Sequence[str], rank: int, count: int, **variables: str) -> "subprocess.Popen[str]":
    """Start this script again as one of several processes with one thread each."""
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **variables,
    }
    call = [sys.executable, "-m", "benchmarks.leaderboard", *arguments]
    return subprocess.Popen(call, env=environment, text=True)


def wait_for(processes: Sequence["subprocess.Popen[str]"]) -> None:
    """Wait for all processes, and end the others if one fails."""
    try:
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            time.sleep(0.2)
    finally:
        for process in processes:
            process.terminate()
    if any(codes):
        raise SystemExit("A process failed; see above. The same command resumes the run.")


def main() -> None:
    """Run the two processes, measure the cost, and write the page; or do a part of it as one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--runs", type=Path, help="folder of the rows (default: in outputs)")
    parser.add_argument("--out", type=Path, help="output folder (default: docs/leaderboard; of a trial, a subfolder)")
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--share", type=float, default=1.0, help="share of the images to use, for a trial")
    parser.add_argument("--method", action="append", default=[], help="FILE.py:FUNCTION that makes one more method")
    parser.add_argument("--task", choices=("work", *MEASUREMENTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.runs is None:
        # Other images need other rows.
        trial = "" if arguments.share == 1 else f"-{arguments.share:g}"
        arguments.runs = Path(f"outputs/leaderboard{trial}")
    torch.set_flush_denormal(True)
    # Captum speaks of its hooks, and channel statistics of classes with few images.
    warnings.simplefilter("ignore")
    networks, missing = make_networks(arguments.data, arguments.networks, arguments.share)
    if arguments.task == "work":
        work(networks, arguments.runs, arguments.method)
        return
    if arguments.task is not None:
        for network in networks:
            found = MEASUREMENTS[arguments.task](network, arguments.runs, arguments.method)
            with writing(arguments.runs / network.name / f"{arguments.task}.json") as temporary:
                temporary.write_text(json.dumps(found, indent=2), encoding="utf-8")
        return
    for name, reason in missing.items():
        print(f"Skipping {name}: {reason}.", file=sys.stderr)
    for network in networks:
        # Once, before the processes need them.
        _, left_out = fitting_methods(network, arguments.runs, arguments.method)
        own = {reference.rpartition(":")[2] for reference in arguments.method}
        for title in own & set(left_out):
            print(f"{title} does not fit {network.name}: {left_out[title]}", file=sys.stderr)
    again = sys.argv[1:]
    # Freed memory is kept: to ask the system for large images again took a third of the time.
    kept = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33)}
    wait_for([start([*again, "--task", "work"], rank, PROCESSES, **kept) for rank in range(PROCESSES)])
    wait_for([start([*again, "--task", "time"], 0, 1)])
    # Freed memory is returned at once, so that resident memory is memory in use.
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    wait_for([start([*again, "--task", "memory"], 0, 1, **returned)])

    from benchmarks.leaderboard_page import write_page

    is_trial = arguments.share < 1 or set(arguments.networks) != set(NETWORKS)
    out = arguments.out or (arguments.runs / "page" if is_trial else Path("docs/leaderboard"))
    write_page(networks, missing, arguments.runs, out)
    print(f"Wrote {out / 'index.md'}")


if __name__ == "__main__":
    main()
