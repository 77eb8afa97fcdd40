"""Try ParchGrad on every classifier family in torchvision and timm, and write docs/models.md.

    python tools/survey_models.py [--only NAME ...] [--out PATH]

A family is a module of a library that registers classifiers. The smallest network of each family is built offline with
random weights, and its maps are checked; see `check_maps`. This takes twenty minutes on one core.
"""

import argparse
import multiprocessing
import os
import re
import sys
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from survey_checks import FaultError, check_default, check_maps, enliven, workable_inputs
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import parchgrad as pg
from parchgrad.core.layers import candidate_layers, resolve_layers
from parchgrad.errors import ParchGradError

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
LIBRARIES = ("torchvision", "timm")
OUTCOMES = ("works", "refused", "fails")
LAYERS = (0.5, "all")
SECONDS = 600


@dataclass(frozen=True, kw_only=True)
class Family:
    """A module of a library that registers classifiers."""

    library: str
    name: str
    variants: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Result for a family, one line of the page.

    Attributes:
        library: name of the library, torchvision or timm.
        family: name of the module.
        variant: name of the smallest network of the family.
        outcome: one of `OUTCOMES`.
        parameters: number of parameters.
        size: side of the images in pixels; 0 if none were needed.
        convolutions: number of convolutions.
        on_path: number of those on the path from the input to the logits.
        edited: number of those that the default settings edit.
        note: reason for the outcome, or notes on the network.
    """

    library: str
    family: str
    variant: str = ""
    outcome: str = "fails"
    parameters: int = 0
    size: int = 0
    convolutions: int = 0
    on_path: int = 0
    edited: int = 0
    note: str = ""


def find_families() -> list[Family]:
    """Find all families in the registries of the libraries."""
    by_module = defaultdict(list)
    for name in torchvision.models.list_models(torchvision.models):
        by_module[torchvision.models.get_model_builder(name).__module__.rsplit(".", 1)[1]].append(name)
    # Networks named test_* are timm's own test models.
    in_timm = {
        module: [name for name in timm.list_models(module=module) if not name.startswith("test_")]
        for module in timm.list_modules()
    }
    return [
        Family(library=library, name=module, variants=tuple(names))
        for library, modules in zip(LIBRARIES, (by_module, in_timm), strict=True)
        for module, names in sorted(modules.items())
        if names
    ]


def build(library: str, variant: str) -> nn.Module:
    """Build a classifier with random weights, in evaluation mode, without a download."""
    if library == "timm":
        model = timm.create_model(variant, pretrained=False)
    else:
        model = torchvision.models.get_model(variant, weights=None)
    return model.eval()


class _WithoutFilling(TorchFunctionMode):
    """Skips in-place initialisation, which takes most of the time but does nothing on the meta device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def build_skeleton(library: str, variant: str) -> nn.Module:
    """Build a classifier on the meta device, unless its constructor computes with tensors."""
    try:
        with torch.device("meta"), _WithoutFilling():
            return build(library, variant)
    except (NotImplementedError, RuntimeError):
        return build(library, variant)


def count_parameters(model: nn.Module) -> int:
    """Count the values of all parameters of a network."""
    return sum(parameter.numel() for parameter in model.parameters())


def smallest(family: Family) -> tuple[str, nn.Module]:
    """Find the variant with the fewest parameters, and build it as a skeleton."""
    found = {variant: count_parameters(build_skeleton(family.library, variant)) for variant in family.variants}
    variant = min(found, key=lambda name: (found[name], name))
    return variant, build_skeleton(family.library, variant)


def survey_family(family: Family) -> Row:
    """Build the smallest network of a family and check its maps."""
    variant, skeleton = smallest(family)
    facts: dict[str, Any] = {
        "library": family.library,
        "family": family.name,
        "variant": variant,
        "parameters": count_parameters(skeleton),
    }
    try:
        candidates = candidate_layers(skeleton, resolve_layers(skeleton, "all"))
        facts["convolutions"] = sum(not isinstance(layer, nn.Linear) for layer in candidates.values())
    except ParchGradError as error:
        said, _, _ = str(error).partition(". ")
        return Row(**facts, outcome="refused", note=said)
    del skeleton
    torch.manual_seed(0)
    model = enliven(build(family.library, variant))
    inputs = workable_inputs(model)
    facts["size"] = inputs.shape[-1]
    facts["on_path"] = len(pg.choose_layers(model, "all", inputs=inputs, balance=False))
    notes = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            facts["edited"] = len(check_default(model, inputs))
    except FaultError as fault:
        return Row(**facts, outcome="fails", note=f"default: {fault}")
    for word, pattern in (("plain", "stays plain in (.*?): "), ("not balanced", "is not balanced in (.*?), so")):
        said = [re.match(f"The gradient {pattern}", str(each.message)) for each in caught]
        notes += sorted({f"{word}: {found[1]}" for found in said if found is not None})
    with warnings.catch_warnings():
        # The published method does not balance, so attention is named.
        warnings.filterwarnings("ignore", "The gradient stays plain")
        for layers in LAYERS:
            try:
                notes += check_maps(model, inputs, layers)
            except FaultError as fault:
                return Row(**facts, outcome="fails", note=f"{layers} convolutions: {fault}")
    return Row(**facts, outcome="works", note="; ".join(dict.fromkeys(notes)))


def survey_apart(family: Family, seconds: float = SECONDS) -> Row:
    """Survey a family in its own process, which is killed after a time limit."""
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
    return Row(library=family.library, family=family.name, note=note)


def _report(connection: Connection, family: Family) -> None:
    warnings.simplefilter("ignore")
    try:
        row = survey_family(family)
    except Exception as error:
        traceback.print_exc()
        note = f"{type(error).__name__}: {error}".splitlines()[0]
        row = Row(library=family.library, family=family.name, note=note)
    connection.send(row)


def installed() -> str:
    """Return the versions of the libraries, as shown on the page."""
    return ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, torchvision, timm))


def render(rows: Sequence[Row], versions: str) -> str:
    """Render the page: counts of the outcomes, then the families by outcome."""
    counts = [
        [library, *(sum((row.library, row.outcome) == (library, outcome) for row in rows) for outcome in OUTCOMES)]
        for library in LIBRARIES
    ]
    parts = [_INTRODUCTION, f"Made with {versions}.\n", _table(("families of", *OUTCOMES), counts, "lrrr")]
    for library in LIBRARIES:
        working = [
            (
                *(row.family, row.variant, f"{row.parameters / 1e6:.1f}", row.size),
                *(row.convolutions, row.on_path, row.edited, row.note),
            )
            for row in rows
            if (row.library, row.outcome) == (library, "works")
        ]
        parts += [f"## Families of {library} {_ENDINGS['works']}\n", _table(_OF_WORKING, working, "llrrrrrl")]
    for outcome in OUTCOMES[1:]:
        others = [row for row in rows if row.outcome == outcome]
        if others:
            lines = [f"- {row.library} **{row.family}**, `{row.variant}`: {row.note}\n" for row in others]
            parts += [f"## Families {_ENDINGS[outcome]}\n", "".join(lines)]
    return "\n".join(parts)


_ENDINGS = {"works": "that work", "refused": "that are refused", "fails": "that fail"}
_OF_WORKING = ("family", "smallest network", "millions", "px", "convolutions", "on the path", "edited", "note")


def _table(headings: Sequence[str], lines: Iterable[Iterable[object]], alignment: str) -> str:
    rule = ["--:" if side == "r" else "---" for side in alignment]
    rows = [headings, rule, *([str(cell) for cell in line] for line in lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def read_page(page: str) -> tuple[list[Row], str]:
    """Parse the rows and the versions of a page written by `render`."""
    rows = []
    parts = re.split(r"^## Families (.*)\n", page, flags=re.MULTILINE)
    for title, part in zip(parts[1::2], parts[2::2], strict=True):
        if title.endswith(_ENDINGS["works"]):
            for line in re.findall(r"^\| (.*) \|$", part, flags=re.MULTILINE)[2:]:
                family, variant, millions, *counts, note = line.split(" | ")
                size, convolutions, on_path, edited = map(int, counts)
                facts = {"parameters": round(1e6 * float(millions)), "size": size, "note": note.strip()}
                facts |= {"convolutions": convolutions, "on_path": on_path, "edited": edited, "outcome": "works"}
                rows.append(Row(library=title.split()[1], family=family, variant=variant, **facts))
        else:
            outcome = next(outcome for outcome in OUTCOMES if title == _ENDINGS[outcome])
            for library, family, variant, note in re.findall(
                r"^- (\S+) \*\*(.*)\*\*, `(.*)`: (.*)$", part, re.MULTILINE
            ):
                rows.append(Row(library=library, family=family, variant=variant, outcome=outcome, note=note))
    versions = re.search(r"^Made with (.*)\.$", page, flags=re.MULTILINE)
    return rows, versions[1] if versions else ""


_INTRODUCTION = """\
# Tested networks

`make survey` generates this page. It finds every module in torchvision and timm that registers classifiers, builds
the smallest network of each with random weights, and explains two noise images by the gradient with
`GradientEnergy(quantile=0.1, softness=0)`: once with `layers=0.5`, the upper half of the path from the input to the
logits ([which layers](method.md#which-layers)), and once with `layers="all"`. A family *works* if

- the maps are finite, not zero, and differ from the plain gradient;
- in double precision, they equal those of a second, slower implementation, which applies [the method's
  equations](method.md) in a hook on each convolution's output;
- with all channels kept, they equal the plain gradient;
- the maps of a batch equal those of its single images;
- scaling the gradient at the output by 2 to the power of -40 scales the maps by the same factor;
- the weights are unchanged, and no hook is left on the network;
- the default settings also give maps that are finite, not zero, differ from the plain gradient and do not depend on
  the batch, and leave the logits unchanged.

Scales, branches and classifiers that start at a constant get some noise first, since a network whose branches start
at zero has a zero gradient. The images have 64 pixels a side, or as many as the network needs.

A family is *refused*, with the error message below, if it has neither convolutions nor linear layers. Transformers are
edited at their patch embedding, or at the first linear layers that they call if they have no convolution, and
balanced; see [Transformers and modern CNNs](how_to/transformers.md). Networks from the Hugging Face Hub
(`hf-hub:OWNER/NAME`) belong to timm's families.

The tables list the parameters in millions, the side of the images in pixels, and the number of convolutions: all of
them, those on the path from the input to the logits, and those that the default settings edit. Convolutions off the
path belong to auxiliary heads (GoogLeNet, Inception) or encode positions (EdgeNeXt, XCiT). Those inside of gates, which
balance holds constant, are not edited by default. The notes:

- *plain*: operations on the path that convolve, but are not convolution modules. Their gradient is not edited, and a
  warning names them. Fixed filters, such as the blurs of TResNet, are passed over.
- *defaults only*: the network is too large for double precision, so that only the default settings were checked.
- *not balanced*: operations on the path that are neither linear nor covered by a rule; a warning names them.
- *n ties*: convolutions left out of the comparison, since two channels differ only by rounding. An attention that
  weights two branches by a softmax sends opposite gradients to them. The second number is that for `layers="all"`.
- *single differs*: plain autograd, without ParchGrad, gives a single image another gradient than in a batch: on the
  CPU, the backward pass of torch's `BatchNorm2d` misreads the transposed gradient of a single row. Explain at least
  two images at a time with such networks, or the same image twice.

These checks say nothing about the quality of the maps; see [the study](study/README.md).
"""


def main() -> int:
    """Survey the families and write the page; the exit code is the number of failing families."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="survey only these families, and print the results instead of writing them",
    )
    parser.add_argument("--out", type=Path, default=PAGE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows = []
    for family in find_families():
        if arguments.only and family.name not in arguments.only:
            continue
        start = time.monotonic()
        rows.append(survey_apart(family))
        print(f"{time.monotonic() - start:5.1f} s  {rows[-1]}", flush=True)
    if not arguments.only:
        arguments.out.write_text(render(rows, installed()), encoding="utf-8")
    return sum(row.outcome == "fails" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
