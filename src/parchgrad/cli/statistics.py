"""Commands on channel statistics: collect, show, merge, import-pickles."""

import enum
import json
import math
import os
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.markup import escape

from parchgrad.cli.shared import (
    ProgressBars,
    console,
    error_console,
    interrupted_by_signals,
    make_table,
    move_model,
    parse_layers,
    printable,
)

if TYPE_CHECKING:
    from parchgrad.statistics import ChannelStatistics

stats = typer.Typer(
    help="Collect channel statistics, for the selectors class and instance; show, merge and import them.",
    no_args_is_help=True,
)

_NO_CLASSES = "no p-values per class"


class LabelsName(str, enum.Enum):
    """Where the classes of a collection come from."""

    given = "given"
    predicted = "predicted"


class DtypeName(str, enum.Enum):
    """Precision of the forward passes of a collection."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@stats.command()
def collect(
    data: Annotated[
        Path, typer.Option(help="A folder of photographs: a folder for each class, or any with predicted labels.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write, such as lite0.safetensors.")],
    model: Annotated[
        str, typer.Option(help="A torchvision or timm name; see `parchgrad models`.")
    ] = "efficientnet_lite0",
    labels: Annotated[
        LabelsName,
        typer.Option(help="'given': the class folders tell; 'predicted': the model's own probabilities do."),
    ] = LabelsName.given,
    layers: Annotated[
        str, typer.Option(help="'all', 'default', a ratio (0.5: the upper half), or patterns: 'layer3.*,conv1'.")
    ] = "all",
    batch_size: Annotated[int, typer.Option(help="Images in one pass.")] = 32,
    workers: Annotated[int, typer.Option(help="Processes that read photographs; 0 reads between the passes.")] = 0,
    device: Annotated[str, typer.Option(help="Where the model runs: 'cpu', 'cuda', 'cuda:1', 'mps'.")] = "cpu",
    dtype: Annotated[
        DtypeName, typer.Option(help="Precision of the passes; below float32 by autocast.")
    ] = DtypeName.float32,
    seed: Annotated[int, typer.Option(help="Seed of the sample of images for the normality test.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="Batches between two checkpoints.")] = 250,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave photographs out that cannot be read, and name them.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an earlier file.")] = False,
) -> None:
    """Collect channel statistics in one pass over photographs.

    Started again after it was stopped, it goes on where it was.

    Several processes share the photographs: torchrun --nproc-per-node=2 -m parchgrad stats collect ...
    """
    with ExitStack() as shown:
        # Of several processes one speaks.
        if os.environ.get("RANK", "0") == "0":
            shown.enter_context(error_console.status("Starting"))
        import torch

        from parchgrad.collection import collect_from_folder
        from parchgrad.data.folders import PHOTOGRAPH_SUFFIXES, find_files
        from parchgrad.files import check_outputs
        from parchgrad.models import load_model
        from parchgrad.statistics.checkpoint import remove_checkpoints
        from parchgrad.statistics.processes import is_first_process

        check_outputs(
            [out], force=force, inputs=find_files(data, PHOTOGRAPH_SUFFIXES) if force and data.is_dir() else ()
        )
        classifier = load_model(model)
        place = move_model(classifier, device)
    precision = torch.autocast(place.type, getattr(torch, dtype.value), enabled=dtype is not DtypeName.float32)
    checkpoint = out.with_name(f"{out.name}.checkpoint")
    try:
        # A cluster asks for the end by a signal, after which the checkpoint is written as after Ctrl-C. One of several
        # processes may wait for others, which nothing but the signal itself ends.
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        with (
            interrupted_by_signals() if alone else nullcontext(),
            ProgressBars(hidden=not is_first_process()) as progress,
            precision,
        ):
            found = collect_from_folder(
                classifier,
                data,
                labels=labels.value,
                layers=parse_layers(layers),
                batch_size=batch_size,
                workers=workers,
                seed=seed,
                checkpoint=checkpoint,
                checkpoint_every=checkpoint_every,
                skip_unreadable=skip_unreadable,
                on_progress=progress.update,
            )
    except KeyboardInterrupt:
        # Each of several processes has one of its own, beside this name.
        kept = any(file.name.startswith(checkpoint.name) for file in checkpoint.parent.glob("*"))
        left = "The same command goes on from its checkpoint." if kept else "Nothing was kept."
        if is_first_process():
            error_console.print(f"Stopped. {left}", highlight=False)
        raise typer.Exit(130) from None
    if is_first_process():
        found.save(out, force=force)
        remove_checkpoints(checkpoint)
        _say_saved(found, out)


@stats.command()
def show(
    file: Annotated[Path, typer.Argument(help="A file that `parchgrad stats collect` wrote.")],
    quantile: Annotated[float, typer.Option(help="Share of the channels to keep, in (0, 1].")] = 0.1,
    target: Annotated[str | None, typer.Option(help="A class, by name or index: show its best channels.")] = None,
    top: Annotated[int, typer.Option(help="How many of its best channels.", min=1)] = 3,
) -> None:
    """Show what statistics hold: layer by layer the channels, how many pass the gate, and how many are selected."""
    with error_console.status("Reading"):
        from parchgrad.selection import ClassWise, InstanceWise
        from parchgrad.statistics import ChannelStatistics

        held = ChannelStatistics.load(file)
        selector: ClassWise | InstanceWise = InstanceWise(held, quantile=quantile)
        if held.classes or target is not None:
            selector = ClassWise(held, quantile=quantile, test=held.test)
        selector.check({name: layer.channels for name, layer in held.items()})
        if target is None:
            columns, title = ["channels", "not normal"], "Channels that pass the normality gate"
            if held.classes:
                columns += ["selected", "fewest", "most"]
                title = f"Channels selected for a class at quantile {quantile:g}: mean, fewest and most"
            table = make_table("layer", *columns)
            for name, layer in held.items():
                gated = int((layer.shapiro_p < cast(float, selector.normality_threshold)).sum())
                row = [printable(name), f"{layer.channels}", f"{gated}"]
                if isinstance(selector, ClassWise):
                    selected = (selector.class_weights(name) > 0).sum(dim=1)
                    row += [f"{selected.double().mean():.1f}", f"{selected.min()}", f"{selected.max()}"]
                table.add_row(*row)
        else:
            column, label = _find_class(held, target)
            selector.check_targets([column if held.class_indices is None else held.class_indices[column]])
            table = make_table("layer", *(f"{place + 1}." for place in range(top)))
            for name, layer in held.items():
                best = layer.class_log_p(held.test)[:, column].sort(stable=True)
                pairs = zip(best.indices[:top].tolist(), best.values[:top].tolist(), strict=True)
                table.add_row(printable(name), *(f"{channel}: {_decades(value)}" for channel, value in pairs))
            title = f"Channels that respond most to {label}: number and log10 of the p-value"
        for place, shown in enumerate(table.columns):
            shown.justify, shown.overflow = "right" if place else "left", "fold"
    classes = f"{held.classes} of {held.model_classes}" if held.classes else _NO_CLASSES
    for name, text in {**held.metadata, "classes": classes}.items():
        if name not in ("categories", "collections"):
            console.print(f"[bold]{printable(name)}[/]: {printable(text)}", highlight=False, soft_wrap=True)
    console.print(f"\n{printable(title)}", style="bold", highlight=False, soft_wrap=True)
    console.print(table)


@stats.command()
def merge(
    files: Annotated[list[Path], typer.Argument(help="Files of disjoint sets of images.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite an earlier file.")] = False,
) -> None:
    """Merge statistics that were collected apart, as if all images had been seen in one run."""
    with error_console.status("Reading"):
        from parchgrad.files import check_outputs
        from parchgrad.statistics import ChannelStatistics
        from parchgrad.statistics.accumulate import merge_statistics

        check_outputs([out], force=force, inputs=files)
        parts = [ChannelStatistics.load(file) for file in files]
    with ProgressBars() as progress:
        found = merge_statistics(parts, on_progress=progress.update)
    found.save(out, force=force)
    _say_saved(found, out)


@stats.command()
def import_pickles(
    folder: Annotated[
        Path, typer.Argument(help="The folder of a network, with a folder 'pickles' in it, or that one.")
    ],
    model: Annotated[str, typer.Option(help="The network that they are of, by its torchvision or timm name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite an earlier file.")] = False,
) -> None:
    """Import the pickles of the original research code; nothing in them is executed.

    The selector class needs cls_p_values.pkl and shapiro_p_values.pkl.

    The selector instance needs shapiro_p_values.pkl, gap_mean.pkl and gap_std.pkl.
    """
    with error_console.status("Reading"):
        from parchgrad.files import check_outputs
        from parchgrad.models import load_model
        from parchgrad.statistics.pickles import import_pickles as read_pickles
        from parchgrad.statistics.pickles import pickle_files

        check_outputs([out], force=force, inputs=pickle_files(folder))
        # Names and channels are those of the architecture, whatever its weights.
        found = read_pickles(folder, load_model(model, pretrained=False).model, name=model)
    found.save(out, force=force)
    _say_saved(found, out)


def _find_class(held: "ChannelStatistics", query: str) -> tuple[int, str]:
    """Column and name of a class by its index or name."""
    from parchgrad.models import find_category

    try:
        categories = [str(category) for category in json.loads(held.metadata["categories"])]
    except (KeyError, ValueError, TypeError, RecursionError):
        categories = [f"class {index}" for index in range(held.model_classes)]
    index = find_category(query, categories, held.metadata.get("model", "the model"))
    return held.columns([index])[0], categories[index]


def _decades(log_p: float) -> str:
    """Log10 of a p-value; what no number can tell, since a class and its rest do not vary, as -inf."""
    return f"{log_p / math.log(10):.1f}" if log_p > -1e9 else "-inf"


def _say_saved(found: "ChannelStatistics", out: Path) -> None:
    channels = sum(layer.channels for layer in found.values())
    seen = f"{found.classes - found.count_empty()} of {found.classes} classes" if found.classes else _NO_CLASSES
    console.print(
        f"{len(found)} layers, {channels:,} channels, {seen}, "
        f"{found.metadata.get('images', 'unknown number of')} images",
        highlight=False,
    )
    console.print(f"Saved {escape(str(out))} ({out.stat().st_size / 1e6:,.1f} MB)", highlight=False, soft_wrap=True)
    console.print(f"Look inside with: parchgrad stats show {escape(str(out))}", highlight=False, soft_wrap=True)
