"""Try ParchGrad on every family of classifiers in torchvision and timm, and write docs/models.md.

    python tools/survey_models.py [--only NAME ...] [--out PATH]

A family is a module of a library that registers classifiers. Of each the smallest network is built, offline and with
random weights, and its maps are held against what must be true of them; see `check_maps`. Ten minutes on one core.
"""

import argparse
import copy
import functools
import multiprocessing
import os
import re
import sys
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import parchgrad as pg
from parchgrad.errors import ModelWarning, ParchGradError
from parchgrad.layers import Convolution, LayerChoice, choose_layers, find_convolutions

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
SIZES = (64, 96, 128)
LAYERS = ("default", "all")
QUANTILE = 0.1
SECONDS = 600
OUTCOMES = ("works", "refused", "fails")


@dataclass(frozen=True, kw_only=True)
class Family:
    """A module of a library that registers classifiers."""

    library: str
    name: str
    variants: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of a family; a line of the page.

    Attributes:
        library: torchvision or timm.
        family: name of the module.
        variant: the smallest network of the family.
        size: side of the pictures in pixels; 0 where none was needed.
        edited: convolutions edited by default.
        convolutions: all of them.
        outcome: one of `OUTCOMES`.
        note: why, or what is to be known.
    """

    library: str
    family: str
    variant: str
    size: int
    edited: int
    convolutions: int
    outcome: str
    note: str


@dataclass(frozen=True, kw_only=True)
class Survey:
    """All rows, and the versions of the libraries they were made with."""

    versions: Mapping[str, str]
    rows: tuple[Row, ...]

    def count(self, outcome: str, library: str) -> int:
        """Number of a library's families with an outcome."""
        return sum(row.outcome == outcome and row.library == library for row in self.rows)


def find_families() -> list[Family]:
    """Find the families in the registries themselves, so that none is forgotten."""
    by_module = defaultdict(list)
    for name in torchvision.models.list_models(torchvision.models):
        by_module[torchvision.models.get_model_builder(name).__module__].append(name)
    families = [
        Family(library="torchvision", name=module.rsplit(".", 1)[1], variants=tuple(names))
        for module, names in by_module.items()
    ]
    # Networks by the name of test_ are timm's own toys.
    families += [
        Family(
            library="timm",
            name=module,
            variants=tuple(name for name in timm.list_models(module=module) if not name.startswith("test_")),
        )
        for module in timm.list_modules()
    ]
    return families


def build(library: str, variant: str) -> nn.Module:
    """Build a classifier with random weights, in evaluation mode; nothing is downloaded."""
    if library == "timm":
        model = timm.create_model(variant, pretrained=False)
    else:
        model = torchvision.models.get_model(variant, weights=None)
    return model.eval()


class _WithoutFilling(TorchFunctionMode):
    """Leaves out what fills tensors in place: on the meta device there is nothing to fill, and it takes most time."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def build_skeleton(library: str, variant: str) -> nn.Module:
    """Build a classifier whose parameters hold nothing, if its constructor does not compute with tensors."""
    try:
        with torch.device("meta"), _WithoutFilling():
            return build(library, variant)
    except NotImplementedError:
        return build(library, variant)


def smallest(family: Family) -> tuple[str, nn.Module]:
    """The variant with the fewest parameters, as a skeleton."""
    found = {}
    for variant in family.variants:
        model = build_skeleton(family.library, variant)
        found[variant] = sum(parameter.numel() for parameter in model.parameters())
    variant = min(found, key=lambda name: (found[name], name))
    return variant, build_skeleton(family.library, variant)


def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Add noise to every parameter that starts as a constant.

    Many networks start with branches, gains or classifiers at zero, so that their gradient is zero until they are
    trained: a map of zeros would say nothing about the edit.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and parameter.min() == parameter.max():
                spread = 0.1 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
                parameter += spread * torch.randn(parameter.shape, generator=generator)
    return model


def workable_inputs(model: nn.Module) -> Tensor:
    """Two pictures of noise, of the first size that the network takes; else of the size it is made for."""
    demanded = (getattr(model, "default_cfg", None) or {}).get("input_size", (3, 224, 224))[-1]
    sizes = [*SIZES, demanded]
    for size in sizes:
        inputs = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
        try:
            with torch.no_grad():
                model(inputs)
        except (RuntimeError, AssertionError, ValueError, IndexError):
            # Too small for the network, or not its fixed size.
            if size == sizes[-1]:
                raise
        else:
            return inputs
    raise AssertionError("sizes is never empty")


class Reference:
    """The partitioned gradient in another way: a hook on each convolution's output, and the design's equations.

    Attributes:
        tied: convolutions whose last kept channel and first pruned one differed by no more than rounding.
    """

    def __init__(self, model: nn.Module, layers: LayerChoice) -> None:
        """Take a network in float64 and the convolutions that are edited."""
        self._model = model
        self._convolutions = choose_layers(model, layers)
        self.tied: set[str] = set()

    def map(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Explain inputs (B, 3, H, W), in float64, for targets (B,)."""
        handles = [
            module.register_forward_hook(functools.partial(self._attach, name))
            for name, module in self._convolutions.items()
        ]
        try:
            return seeded_gradient(self._model, inputs, targets)
        finally:
            for handle in handles:
                handle.remove()

    def _attach(self, name: str, module: nn.Module, arguments: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(functools.partial(self._edit, name))

    def _edit(self, name: str, gradient: Tensor) -> Tensor:
        flat = gradient.flatten(2)
        energy = (flat / flat.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-300)).square().sum(dim=2)
        kept_count = max(1, int(QUANTILE * energy.shape[1]))
        last = energy.topk(kept_count, dim=1).values[:, -1:]
        mask = energy >= last
        near = (energy - last).abs() <= 1e-9 * last
        if (near.sum(dim=1) > 1).logical_and(last.squeeze(1) > 0).any():
            self.tied.add(name)
        kept, rest = ((flat * chosen.unsqueeze(2)).sum(dim=1) for chosen in (mask, ~mask))
        # A kept sum that is the same everywhere varies by its rounding alone.
        rounding = 1e-14 * flat.abs().sum(dim=1).amax(dim=1)
        if flat.shape[2] == 1:
            m, n = kept.abs()[:, 0], rest.abs()[:, 0]
            beta, usable = ((m + n) / m).sqrt(), m > rounding
        else:
            # Deviations rather than variances, whose squares of small numbers would vanish.
            m, n = kept.std(dim=1), rest.std(dim=1)
            beta, usable = torch.hypot(m, n) / m, m > rounding
        one_sided = mask.all(dim=1) | ~mask.any(dim=1)
        scale = torch.where(usable, beta, 1.0).unsqueeze(1) * mask
        scale = torch.where(one_sided.unsqueeze(1), 1.0, scale)
        return gradient * scale.reshape(*scale.shape, *[1] * (gradient.dim() - 2))


def seeded_gradient(model: nn.Module, inputs: Tensor, targets: Tensor, factor: float = 1.0) -> Tensor:
    """Gradient of the chosen logits, times a factor, straight from autograd."""
    leaf = inputs.clone().requires_grad_()
    logits = model(leaf)
    seed = torch.zeros_like(logits).scatter_(1, targets.unsqueeze(1), factor)
    return torch.autograd.grad(logits, leaf, seed)[0]


def hook_count(model: nn.Module) -> int:
    """Number of hooks of any kind on any module."""
    kinds = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value of each row's expected map."""
    peaks = expected.abs().flatten(1).amax(dim=1)
    return float(((found - expected).abs().flatten(1).amax(dim=1) / peaks).max())


class FaultError(Exception):
    """What must be true of a map is not."""


def check_maps(model: nn.Module, inputs: Tensor, layers: LayerChoice) -> list[str]:
    """Hold the maps of a network against what must be true of them.

    Args:
        model: float32, in evaluation mode.
        inputs: two different pictures, shape (2, 3, H, W).
        layers: which convolutions are edited.

    Returns:
        What is to be known.

    Raises:
        FaultError: with what is not true.
    """
    targets = torch.tensor([1, 3])
    selector = pg.GradientEnergy(quantile=QUANTILE)
    before = hook_count(model)
    notes = []

    def explain(network: nn.Module, x: Tensor, y: Tensor, chosen: pg.Selector = selector) -> Tensor:
        return pg.Explainer(network, chosen, layers=layers).attribute(x, y)

    single_precision = explain(model, inputs, targets)
    if not torch.isfinite(single_precision).all():
        raise FaultError("the map is not finite")
    plain = seeded_gradient(model, inputs, targets)
    if not (plain.flatten(1).abs().amax(dim=1) > 0).all():
        raise FaultError("the plain gradient is zero")
    _agree(explain(model, inputs, targets, pg.GradientEnergy(quantile=1.0)), plain, 1e-4, "with all channels kept")
    # In double precision, so that rounding decides about no channel.
    wide, pictures = copy.deepcopy(model).double(), inputs.double()
    layers, tied = without_ties(wide, pictures, targets, layers)
    if tied:
        notes.append(f"in {tied} convolutions the last channel kept and the first pruned are equal up to rounding")
    reference = Reference(wide, layers)
    found = explain(wide, pictures, targets)
    if not (found.flatten(1).abs().amax(dim=1) > 0).all():
        raise FaultError("the map is zero")
    _agree(found, reference.map(pictures, targets), 1e-6, "against the reference")
    plain = seeded_gradient(wide, pictures, targets)
    if not difference(found, plain) > 1e-3:
        raise FaultError("the map is the plain one")
    halves = [(pictures[row : row + 1], targets[row : row + 1]) for row in (0, 1)]
    rows = torch.cat([explain(wide, *half) for half in halves])
    _agree(rows, torch.cat([reference.map(*half) for half in halves]), 1e-6, "picture by picture")
    if difference(torch.cat([seeded_gradient(wide, *half) for half in halves]), plain) < 1e-6:
        _agree(rows, found, 1e-6, "a batch against its pictures")
    else:
        notes.append("torch's own gradient of a single picture is not that in a batch")
    with pg.ParchGrad(wide, selector, layers=layers):
        scaled = seeded_gradient(wide, pictures, targets, factor=2.0**-40)
    _agree(scaled * 2.0**40, found, 1e-6, "with a smaller seed")
    if hook_count(model) != before or hook_count(wide) != before:
        raise FaultError("hooks are left on the model")
    return notes


def _agree(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    off = difference(found, expected)
    # Put so that NaN fails too.
    if not off < tolerance:
        raise FaultError(f"{what}, the maps are {off:.1e} off")


def without_ties(model: nn.Module, inputs: Tensor, targets: Tensor, layers: LayerChoice) -> tuple[LayerChoice, int]:
    """Leave out the convolutions where rounding decides which of two channels is kept, and count them.

    An attention that weighs two branches by a softmax sends opposite gradients to them, whose energies are equal.
    """
    chosen, tied = list(choose_layers(model, layers)), 0
    while True:
        reference = Reference(model, chosen)
        reference.map(inputs, targets)
        for row in range(len(inputs)):
            reference.map(inputs[row : row + 1], targets[row : row + 1])
        if not reference.tied:
            return (chosen if tied else layers), tied
        chosen, tied = [name for name in chosen if name not in reference.tied], tied + len(reference.tied)


def only_cuts_patches(model: nn.Module) -> bool:
    """Whether every convolution steps as far as it is wide, from the picture itself: no feature map is convolved."""
    convolutions = find_convolutions(model).values()
    return all(
        module.in_channels == 3 and module.stride == module.kernel_size and max(module.kernel_size) > 1
        for module in convolutions
    )


def survey_family(family: Family) -> Row:
    """Build the smallest network of a family and try it."""
    variant, skeleton = smallest(family)
    facts = {"library": family.library, "family": family.name, "variant": variant}
    try:
        counts = {
            "edited": len(choose_layers(skeleton, "default")),
            "convolutions": len(find_convolutions(skeleton)),
        }
    except ParchGradError as error:
        convolutions = sum(isinstance(module, Convolution) for module in skeleton.modules())
        return Row(**facts, size=0, edited=0, convolutions=convolutions, outcome="refused", note=str(error))
    if only_cuts_patches(skeleton):
        return Row(**facts, **counts, size=0, outcome="refused", note="patch embedding only")
    del skeleton
    torch.manual_seed(0)
    model = enliven(build(family.library, variant))
    inputs = workable_inputs(model)
    notes = []
    for layers in LAYERS:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                notes += check_maps(model, inputs, layers)
        except FaultError as fault:
            note = f"{layers} convolutions: {fault}"
            return Row(**facts, **counts, size=inputs.shape[-1], outcome="fails", note=note)
        said = next((str(each.message) for each in caught if each.category is ModelWarning), "")
        unused = re.match(r"(\d+) of \d+ chosen convolutions were never called", said)
        if unused is not None and layers == "all":
            notes.append(f"{unused[1]} convolutions serve in training alone, which is said in a warning")
    if inputs.shape[-1] > max(SIZES):
        notes.append("of fixed size")
    return Row(**facts, **counts, size=inputs.shape[-1], outcome="works", note="; ".join(dict.fromkeys(notes)))


def survey_apart(family: Family, seconds: float = SECONDS) -> Row:
    """Try a family in a process of its own, which is ended when its time is up."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_report, args=(there, family))
    process.start()
    there.close()
    try:
        if here.poll(seconds):
            return here.recv()
        note = f"not done within {seconds:g} s"
    except EOFError:
        note = "the process ended without an answer"
    finally:
        process.kill()
        process.join()
    return _untried(family, note)


def _report(connection: Connection, family: Family) -> None:
    warnings.simplefilter("ignore")
    try:
        row = survey_family(family)
    except Exception as error:
        traceback.print_exc()
        row = _untried(family, f"{type(error).__name__}: {error}".splitlines()[0])
    connection.send(row)


def _untried(family: Family, note: str) -> Row:
    return Row(
        library=family.library,
        family=family.name,
        variant="",
        size=0,
        edited=0,
        convolutions=0,
        outcome="fails",
        note=note,
    )


HEADINGS = ("library", "family", "smallest network", "side, px", "edited by default", "convolutions", "outcome", "note")


def render(survey: Survey) -> str:
    """The page, from which `parse` reads the same survey again."""
    versions = ", ".join(f"{name} {version}" for name, version in survey.versions.items())
    counts = [
        f"| {library} | " + " | ".join(str(survey.count(outcome, library)) for outcome in OUTCOMES) + " |"
        for library in ("torchvision", "timm")
    ]
    lines = [" | ".join(_cell(getattr(row, each.name)) for each in fields(row)) for row in _sorted(survey.rows)]
    return "\n".join(
        [
            _INTRODUCTION,
            f"Made with {versions}.",
            "",
            "| families of | " + " | ".join(OUTCOMES) + " |",
            "|---|" + "--:|" * len(OUTCOMES),
            *counts,
            "",
            "| " + " | ".join(HEADINGS) + " |",
            "|---|---|---|--:|--:|--:|---|---|",
            *(f"| {line} |" for line in lines),
            "",
        ]
    )


def parse(page: str) -> Survey:
    """Read the survey out of a page that `render` wrote."""
    said = re.search(r"^Made with (.*)\.$", page, flags=re.MULTILINE)
    versions = dict(part.split(" ", 1) for part in said[1].split(", ")) if said else {}
    _, _, table = page.partition("| " + " | ".join(HEADINGS) + " |\n")
    rows = []
    for line in table.splitlines()[1:]:
        cells = [cell.strip().replace("&#124;", "|") for cell in line[1:-1].split("|")]
        values = {each.name: int(cell or 0) if each.type is int else cell for each, cell in _paired(cells)}
        rows.append(Row(**values))
    return Survey(versions=versions, rows=tuple(rows))


def _paired(cells: Sequence[str]) -> Iterator[tuple[Any, str]]:
    return zip(fields(Row), cells, strict=True)


def _cell(value: object) -> str:
    return "" if value == 0 else str(value).replace("|", "&#124;")


def _sorted(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row.library != "torchvision", row.family))


_INTRODUCTION = """\
# Networks that were tried

`make survey` writes this page anew. It finds every module that registers classifiers in torchvision and timm, builds
the smallest network of each with random weights, and explains two pictures of noise by the gradient with
`GradientEnergy(quantile=0.1)`: once with the default convolutions, once with all. A family *works* if

- the maps are finite, not zero, and not the plain ones;
- they equal, in double precision, those of a second and slower way: a hook on every convolution's output that applies
  [the method's equations](method.md) again;
- with all channels kept they are the plain gradient;
- a batch gives the maps of its single pictures;
- a seed of 2 to the power of -40 in place of 1 scales the map by as much;
- no hook is left on the network.

Gains, branches and classifiers that start at a constant get some noise first, since a network whose branches start at
zero has a gradient of zero before it is trained. A family is *refused*, in the words given, if it has no convolutions
whose channels could be partitioned.

Where two channels would have to be told apart by rounding alone, as in an attention that weighs two branches by a
softmax and sends opposite gradients to them, the convolution is left out of the comparison, and the note says so. Another
note says where plain autograd gives a picture on its own another gradient than in a batch, without ParchGrad: on the CPU
the backward pass of torch's BatchNorm misreads a transposed gradient of one row. Explain two pictures or more with such
networks, the same one twice if need be.

What the maps are worth is another question: see [the study](study/README.md).
"""


def main() -> int:
    """Try the families and write the page; the exit code is the number of those that fail."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these families alone, printed rather than written")
    parser.add_argument("--out", type=Path, default=PAGE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows = []
    for family in find_families():
        if arguments.only and family.name not in arguments.only:
            continue
        start = time.monotonic()
        row = survey_apart(family)
        rows.append(row)
        print(f"{time.monotonic() - start:5.1f} s  {row}", flush=True)
    versions = {module.__name__: module.__version__ for module in (torch, torchvision, timm)}
    if not arguments.only:
        arguments.out.write_text(render(Survey(versions=versions, rows=tuple(rows))), encoding="utf-8")
    return sum(row.outcome == "fails" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
