"""The commands of `parchgrad stats`: collect, show, merge and import-pickles."""

import json
import math
import os
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer
from rich.markup import escape

from parchgrad.cli.shared import (
    MODEL_HELP,
    ClassesFile,
    ModelName,
    ProgressBars,
    WeightsFile,
    console,
    error_console,
    interrupted_by_signals,
    load_classifier,
    make_table,
    parse_layers,
    place_of,
    printable,
)

if TYPE_CHECKING:
    from parchgrad.statistics import ChannelStatistics

stats = typer.Typer(
    help="Collect, show, merge and import channel statistics, for the selectors class and instance.",
    no_args_is_help=True,
)

_NO_CLASSES = "no p-values per class"


@stats.command()
def collect(
    data: Annotated[
        Path, typer.Option(help="Folder of images: one folder per class, or any folder with predicted labels.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output file, such as lite0.safetensors.")],
    model: ModelName = "efficientnet_lite0",
    weights: WeightsFile = None,
    classes: ClassesFile = None,
    labels: Annotated[
        Literal["given", "predicted"],
        typer.Option(help="Labels: 'given' by the class folders, or 'predicted' probabilities of the model."),
    ] = "given",
    layers: Annotated[
        str,
        typer.Option(
            help="Layers: 'all', a ratio (0.5: the upper half of the path), patterns ('layer3.*,conv1'), or "
            "'published'."
        ),
    ] = "all",
    batch_size: Annotated[int, typer.Option(help="Number of images per pass.")] = 32,
    workers: Annotated[
        int, typer.Option(help="Number of processes that read images; 0 reads in the main process.")
    ] = 0,
    device: Annotated[str, typer.Option(help="Device of the model: 'cpu', 'cuda', 'cuda:1', 'mps'.")] = "cpu",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="Precision of the forward passes; below float32 with autocast."),
    ] = "float32",
    seed: Annotated[int, typer.Option(help="Random seed of the image sample for the normality test.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(help="Number of batches between checkpoints.")] = 250,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Skip unreadable images with a warning.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Collect channel statistics in one pass over a folder of images.

    Run the same command again to resume after it was stopped.

    Several processes share the images: torchrun --nproc-per-node=2 -m parchgrad stats collect ...
    """
    with ExitStack() as shown:
        # Only one of several processes prints.
        if os.environ.get("RANK", "0") == "0":
            shown.enter_context(error_console.status("Starting"))
        import torch

        from parchgrad._io.files import check_outputs
        from parchgrad.data.images import IMAGE_SUFFIXES, find_files
        from parchgrad.statistics.checkpoint import remove_checkpoints
        from parchgrad.statistics.processes import is_first_process
        from parchgrad.workflows.collection import collect_from_folder

        check_outputs([out], force=force, inputs=find_files(data, IMAGE_SUFFIXES) if force and data.is_dir() else ())
        classifier = load_classifier(model, weights=weights, classes=classes)
        place = place_of(device)
        classifier.model.to(place)
    precision = torch.autocast(place.type, getattr(torch, dtype), enabled=dtype != "float32")
    checkpoint = out.with_name(f"{out.name}.checkpoint")
    try:
        # Clusters stop jobs with a signal; write a checkpoint as for Ctrl-C. With several processes, leave signals
        # alone: a process that waits for others could not be stopped otherwise.
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        with (
            interrupted_by_signals() if alone else nullcontext(),
            ProgressBars(hidden=not is_first_process()) as progress,
            precision,
        ):
            found = collect_from_folder(
                classifier,
                data,
                labels=labels,
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
        # Several processes have checkpoints with suffixes.
        kept = any(file.name.startswith(checkpoint.name) for file in checkpoint.parent.glob("*"))
        left = "Run the same command again to resume from the checkpoint." if kept else "There is no checkpoint."
        if is_first_process():
            error_console.print(f"Stopped. {left}", highlight=False)
        raise typer.Exit(130) from None
    if is_first_process():
        found.save(out, force=force)
        remove_checkpoints(checkpoint)
        _say_saved(found, out)


@stats.command()
def show(
    file: Annotated[Path, typer.Argument(help="File written by `parchgrad stats collect`.")],
    quantile: Annotated[float, typer.Option(help="Share of the channels at or above the threshold, in (0, 1].")] = 0.1,
    target: Annotated[str | None, typer.Option(help="Class, by name or index, whose best channels to show.")] = None,
    top: Annotated[int, typer.Option(help="Number of best channels to show.", min=1)] = 3,
) -> None:
    """Show statistics by layer: the number of channels, of those that pass the normality gate, and of selected ones."""
    with error_console.status("Reading"):
        from parchgrad.statistics import ChannelStatistics
        from parchgrad.statistics.selectors import ClassWise, InstanceWise

        held = ChannelStatistics.load(file)
        selector: ClassWise | InstanceWise = InstanceWise(held, quantile=quantile, softness=0)
        if held.classes or target is not None:
            selector = ClassWise(held, quantile=quantile, softness=0, test=held.test)
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
                    selected = selector.class_weights(name).sum(dim=1)
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
    files: Annotated[list[Path], typer.Argument(help="Files collected on disjoint sets of images.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output file.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Merge statistics of separate runs, as if collected in one run."""
    with error_console.status("Reading"):
        from parchgrad._io.files import check_outputs
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
    folder: Annotated[Path, typer.Argument(help="Folder 'pickles' of a network, or its parent.")],
    model: Annotated[str, typer.Option(help=f"Network of the pickles. {MODEL_HELP}")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Output file.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Import pickles of the original research code, without executing anything in them.

    The selector class needs cls_p_values.pkl and shapiro_p_values.pkl.

    The selector instance needs shapiro_p_values.pkl, gap_mean.pkl and gap_std.pkl.
    """
    with error_console.status("Reading"):
        from parchgrad._io.files import check_outputs
        from parchgrad.legacy.pickles import import_pickles as read_pickles
        from parchgrad.legacy.pickles import pickle_files

        check_outputs([out], force=force, inputs=pickle_files(folder))
        # Only the architecture matters, not the weights.
        found = read_pickles(folder, load_classifier(model, pretrained=False).model, name=model)
    found.save(out, force=force)
    _say_saved(found, out)


def _find_class(held: "ChannelStatistics", query: str) -> tuple[int, str]:
    """Column and name of a class by its index or name."""
    from parchgrad.models.classifier import find_category

    try:
        categories = [str(category) for category in json.loads(held.metadata["categories"])]
    except (KeyError, ValueError, TypeError, RecursionError):
        categories = [f"class {index}" for index in range(held.model_classes)]
    index = find_category(query, categories, held.metadata.get("model", "the model"))
    return held.columns([index])[0], categories[index]


def _decades(log_p: float) -> str:
    """Log10 of a p-value; -inf if neither the class nor the rest varies."""
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
    console.print(f"View it with: parchgrad stats show {escape(str(out))}", highlight=False, soft_wrap=True)
