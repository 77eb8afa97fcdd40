"""The command line. A thin front: it reads options, calls the library, and prints."""

import enum
import json
import logging
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from parchgrad._version import __version__
from parchgrad.errors import ParchGradError, SettingError, StatisticsWarning

if TYPE_CHECKING:
    import torch

    from parchgrad.models import Classifier, Prediction
    from parchgrad.statistics import ChannelStatistics

# The heavy imports stand inside the commands, so that --help answers at once.

app = typer.Typer(
    help="Saliency maps of convolutional networks one can trust.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
stats = typer.Typer(
    help="Collect channel statistics, for the selectors class and instance; show, merge and import them.",
    no_args_is_help=True,
)
app.add_typer(stats, name="stats")
# Panels of the help on evaluate.
_ASKED = "What is evaluated"
_COMPARED = "What is compared (each may be given several times, for all combinations)"
_out = Console()
_err = Console(stderr=True)


class SelectorName(str, enum.Enum):
    """The selectors by their short names."""

    energy = "energy"
    activation = "activation"
    evidence = "evidence"
    random = "random"
    class_wise = "class"
    instance = "instance"


class LabelsName(str, enum.Enum):
    """Where the classes of a collection come from."""

    given = "given"
    predicted = "predicted"


class DtypeName(str, enum.Enum):
    """Precision of the forward passes of a collection."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class ConserveName(str, enum.Enum):
    """What keeps a layer's variance."""

    independent = "independent"
    exact = "exact"
    none = "none"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; every error of this package ends it with one sentence and exit code 2."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning(warnings.showwarning)
        try:
            app(arguments)
        except ParchGradError as error:
            _err.print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
            sys.exit(2)


def _show_warning(otherwise: Callable[..., None]) -> Callable[..., None]:
    """Say this package's warnings in a line, and leave others as they are."""

    def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if issubclass(category, StatisticsWarning):
            _err.print(f"[bold yellow]Note:[/] {escape(str(message))}", soft_wrap=True, highlight=False)
        else:
            otherwise(message, category, *place)

    return show


def _print_version(wanted: bool) -> None:
    if wanted:
        _out.print(f"parchgrad {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def explain(
    images: Annotated[list[Path], typer.Argument(help="Photographs: JPEG, PNG or anything Pillow reads.")],
    model: Annotated[
        str, typer.Option(help="A torchvision or timm name; see `parchgrad models`.")
    ] = "efficientnet_lite0",
    target: Annotated[
        str | None, typer.Option(help="The class to explain, by name or index.", show_default="the predicted class")
    ] = None,
    selector: Annotated[
        SelectorName,
        typer.Option(
            help="What makes a channel matter: gradient energy, gradient x activation, its evidence for the class "
            "(best with --layers 0.75), chance, or by statistics its response to the class, or to this very image."
        ),
    ] = SelectorName.energy,
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="Channel statistics for the selectors class and instance; see `parchgrad stats`.",
            show_default="those that come with the package, for efficientnet_lite0",
        ),
    ] = None,
    quantile: Annotated[float, typer.Option(help="Share of the channels to keep, in (0, 1].")] = 0.1,
    layers: Annotated[
        str,
        typer.Option(
            help="'default' (the published set), 'all', a ratio (0.5: the upper half), or patterns: 'layer3.*,conv1'."
        ),
    ] = "default",
    gamma: Annotated[
        float, typer.Option(help="How much stronger than the rest the kept signal becomes; 'inf' prunes the rest.")
    ] = math.inf,
    conserve: Annotated[
        ConserveName, typer.Option(help="How the variance of a layer is kept.")
    ] = ConserveName.independent,
    method: Annotated[
        str,
        typer.Option(help="gradient, input_x_gradient, integrated_gradients, smoothgrad, or a Captum class name."),
    ] = "gradient",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("outputs/explain"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite earlier results.")] = False,
) -> None:
    """Explain photographs: a panel (.png), the raw signed map (.npy) and every setting (.json) for each."""
    with _err.status("Starting") as status:
        from parchgrad.data.images import read_image

        # All that can be wrong is looked at before the first file is written, and files before the long imports.
        photographs = [read_image(path) for path in images]

        from parchgrad.explanation import Explanation, explain_images
        from parchgrad.files import check_outputs
        from parchgrad.models import load_model
        from parchgrad.selection import STATISTICAL_SELECTORS, make_selector
        from parchgrad.statistics import ChannelStatistics

        # The hub, imported by now, logs every failed try; the error that follows says it once.
        logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
        stems = _distinct_stems(images)
        check_outputs([file for stem in stems for file in Explanation.files(out, stem)], force=force)
        needs_statistics = selector.value in STATISTICAL_SELECTORS
        if statistics is not None and not needs_statistics:
            raise SettingError(
                f"--statistics is given, but the selector {selector.value} uses none; add --selector class or instance."
            )
        held = None
        if needs_statistics:
            held = ChannelStatistics.bundled(model) if statistics is None else ChannelStatistics.load(statistics)
        chosen = make_selector(selector.value, quantile=quantile, statistics=held)
        status.update(f"Loading {escape(model)}")
        classifier = load_model(model)
        if held is not None:
            held.check_model(classifier.model)
        status.update("Explaining")
        with warnings.catch_warnings():
            # Captum's notice that a method sets hooks, which are gone by the time it is read.
            warnings.filterwarnings("ignore", message="Setting (backward|forward)")
            explanations = explain_images(
                classifier,
                photographs,
                chosen,
                target=None if target is None else classifier.find_category(target),
                layers=_parse_layers(layers),
                gamma=gamma,
                conserve=conserve.value,
                method=method,
                names=[path.name for path in images],
            )
        for found, stem in zip(explanations, stems, strict=True):
            found.save(out, stem, force=force)

    table = _table("photograph", "explained class", "also predicted")
    for path, found in zip(images, explanations, strict=True):
        others = [prediction for prediction in found.predictions if prediction.index != found.target.index][:3]
        table.add_row(escape(path.name), _share(found.target), ", ".join(_share(prediction) for prediction in others))
    _out.print(table)
    layers_edited = explanations[0].settings["layers"]
    _out.print(
        f"\n{len(layers_edited)} convolutions edited, {layers_edited[0]} to {layers_edited[-1]}", highlight=False
    )
    _out.print(f"Panels, maps and settings are in {escape(str(out))}", highlight=False, soft_wrap=True)


@app.command()
def models(
    pattern: Annotated[str | None, typer.Argument(help="Name pattern, such as 'resnet*'.")] = None,
) -> None:
    """List the models that can be loaded; timm's many only on request."""
    from parchgrad.models import list_models

    entries = list_models(pattern or "*")
    if not entries:
        raise SettingError(f"No model matches {pattern!r}; try `parchgrad models '*{pattern}*'`, or '*' for all.")
    shown = [entry for entry in entries if pattern or entry.offline or entry.library != "timm"]
    table = _table("name", "library", "weights")
    for entry in shown:
        table.add_row(entry.name, entry.library, "installed with a package" if entry.offline else "downloaded once")
    _out.print(table)
    if len(shown) < len(entries):
        hint = f"and {len(entries) - len(shown)} more from timm; give a pattern: parchgrad models 'convnext*'"
        _out.print(hint, highlight=False, soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("outputs/demo"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an earlier page.")] = False,
) -> None:
    """Explain four photographs and play the grid pointing game on them; offline, one page to look at."""
    with _err.status("Explaining four photographs and their mosaic"):
        from parchgrad.demo import CHANCE, Demonstration, demonstrate
        from parchgrad.files import check_outputs

        check_outputs(Demonstration.files(out), force=force)
        found = demonstrate()
        page = found.save(out, force=force)
    table = _table("class", *found.shares)
    for index, category in enumerate(found.categories):
        table.add_row(category, *(f"{shares[index]:.2f}" for shares in found.shares.values()))
    table.add_row("[bold]mean", *(f"[bold]{shares.mean():.2f}" for shares in found.shares.values()))
    _out.print("Share of the map in the cell that shows the class, 2 x 2 mosaic", style="bold")
    _out.print(table)
    _out.print(f"A map that knows nothing scores {CHANCE:.2f}. Higher is better.")
    _out.print(f"Look at {escape(str(page))}", highlight=False, soft_wrap=True)


@app.command()
def explore(
    host: Annotated[str, typer.Option(help="Address to serve at; 0.0.0.0 opens it to other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to serve at; 0 takes one that is free.")] = 7860,
    model: Annotated[
        str, typer.Option(help="The network chosen first, by its torchvision or timm name.")
    ] = "efficientnet_lite0",
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="Channel statistics of that network, for the selectors class and instance.",
            show_default="those that come with the package, for efficientnet_lite0",
        ),
    ] = None,
    max_megabytes: Annotated[float, typer.Option(help="Size of the largest file that is taken.")] = 20,
    max_megapixels: Annotated[float, typer.Option(help="Size of the largest photograph that is taken.")] = 50,
    open_browser: Annotated[bool, typer.Option("--open/--no-browser", help="Open the page in a browser.")] = True,
) -> None:
    """Explore photographs on a page in the browser, offline; needs the extra web."""
    with ExitStack() as served:
        with _err.status("Starting"):
            from parchgrad.web import WebSettings, is_loopback, serve

            logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
            settings = WebSettings(
                host=host,
                port=port,
                network=model,
                statistics=statistics,
                max_megabytes=max_megabytes,
                max_megapixels=max_megapixels,
                # What strangers type is not downloaded.
                any_network=is_loopback(host),
            )
            url = served.enter_context(serve(settings, open_browser=open_browser))
        _out.print(f"Look at {url} (Ctrl-C ends it)", highlight=False, soft_wrap=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
        _err.print("Stopping.", highlight=False)


@app.command()
def evaluate(
    settings: Annotated[
        Path | None, typer.Argument(help=r"A TOML file: model, \[data], \[grid] and \[scores].")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A torchvision or timm name, or 'shapes'; may be given several times.", rich_help_panel=_ASKED
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="shapes, folder, imagenet, cifar10, cifar100, mnist or fashion_mnist.", rich_help_panel=_ASKED
        ),
    ] = None,
    root: Annotated[str | None, typer.Option(help="Folder of the images.", rich_help_panel=_ASKED)] = None,
    annotations: Annotated[
        str | None, typer.Option(help="Folder of ILSVRC's XML files, for imagenet.", rich_help_panel=_ASKED)
    ] = None,
    count: Annotated[int | None, typer.Option(help="Images, drawn at random.", rich_help_panel=_ASKED)] = None,
    mosaics: Annotated[
        int | None,
        typer.Option(
            help="Mosaics for the grid pointing game, in place of single images; 0 for none.", rich_help_panel=_ASKED
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Which class is explained: label or predicted.", rich_help_panel=_ASKED)
    ] = None,
    scores: Annotated[
        list[str] | None,
        typer.Option(
            help="perturbation, insertion, localisation, sparsity, sensitivity or randomisation; several times if you "
            "like.",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="gradient, input_x_gradient, integrated_gradients, smoothgrad, or a Captum class name.",
            rich_help_panel=_COMPARED,
        ),
    ] = None,
    selector: Annotated[
        list[str] | None,
        typer.Option(help="energy, activation, evidence, class, instance, or none.", rich_help_panel=_COMPARED),
    ] = None,
    quantile: Annotated[
        list[float] | None,
        typer.Option(help="Share of the channels to keep, in (0, 1].", rich_help_panel=_COMPARED),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            help="'default', 'all', a ratio (0.5: the upper half), or patterns: 'layer3.*,conv1'.",
            rich_help_panel=_COMPARED,
        ),
    ] = None,
    gamma: Annotated[
        list[float] | None,
        typer.Option(
            help="How much stronger than the rest the kept signal becomes; 'inf' prunes the rest.",
            rich_help_panel=_COMPARED,
        ),
    ] = None,
    conserve: Annotated[
        list[str] | None, typer.Option(help="independent, exact or none.", rich_help_panel=_COMPARED)
    ] = None,
    masks: Annotated[
        list[str] | None,
        typer.Option(
            help="own, and as controls another (those of another class) and shuffled.", rich_help_panel=_COMPARED
        ),
    ] = None,
    statistics: Annotated[
        str | None, typer.Option(help="Channel statistics for the selectors class and instance.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in one pass.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of random maps and random channels.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("outputs/evaluation"),
    device: Annotated[str, typer.Option(help="Where the model runs: 'cpu', 'cuda', 'cuda:1', 'mps'.")] = "cpu",
) -> None:
    """Evaluate a grid of settings on a data set, the controls always among them.

    What is asked for stands in a file, in flags, or in both, where a flag goes before the file.

    Started again after it was stopped, it goes on where it was; finished settings are skipped.

    Several processes share the images: torchrun --nproc-per-node=2 -m parchgrad evaluate ...
    """
    first = os.environ.get("RANK", "0") == "0"
    with ExitStack() as shown:
        # Of several processes one speaks.
        if first:
            shown.enter_context(_err.status("Starting"))
        from parchgrad.configuration import evaluate_all, read_settings

        flags: dict[str, Any] = {
            "model": model,
            "data": {"name": data, "root": root, "annotations": annotations, "count": count, "mosaics": mosaics},
            "grid": {
                "methods": method,
                "selectors": selector,
                "quantiles": quantile,
                "layers": layers and [_parse_layers(text) for text in layers],
                "gammas": gamma,
                "conserves": conserve,
                "masks": masks,
            },
            "scores": {"families": scores},
            "target": target,
            "statistics": statistics,
            "batch_size": batch_size,
            "seed": seed,
        }
        asked = read_settings(settings, flags)
        place = _place(device)
    try:
        with ProgressBars(hidden=not first) as progress:
            runs = evaluate_all(asked, out, device=place, on_progress=progress.update)
    except KeyboardInterrupt:
        _err.print("Stopped. The same command goes on where it was.", highlight=False)
        raise typer.Exit(130) from None
    if first:
        folders = " ".join(str(run) for run in runs)
        _out.print(f"Look at the results with: parchgrad report {escape(folders)}", highlight=False, soft_wrap=True)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of evaluations.")],
    out: Annotated[Path, typer.Option(help="Folder for the page and the tables.")] = Path("outputs/report"),
    score: Annotated[
        list[str] | None, typer.Option(help="A score to show, such as aopc or aopc@0.1; may be given several times.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Level of the intervals, in (0, 1).")] = 0.95,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an earlier report.")] = False,
) -> None:
    """Report what evaluations found: a page (report.html) and two tables (report.md, report.csv)."""
    with _err.status("Comparing"):
        from parchgrad.evaluation.report import relative_time, title_of
        from parchgrad.evaluation.summary import FEWEST
        from parchgrad.files import check_outputs
        from parchgrad.reporting import HEADLINES, Report, make_report

        check_outputs(Report.files(out), force=force)
        found = make_report(runs, scores=score, confidence=confidence)
        page = found.save(out, force=force)
    colours = {"better": "[green]", "worse": "[red]", "open": ""}
    for summary, count in zip(found.summaries, found.counts, strict=True):
        # The page has room for all, the terminal for a few.
        shown = summary.scores if score else [name for name in HEADLINES if name in summary.scores][:3]
        table = _table("setting", *(title_of(name) for name in shown), "time")
        for column in table.columns[1:]:
            # Titles of settings are folded before numbers are.
            column.min_width, column.max_width, column.justify = 7, 12, "right"
        for setting in summary.settings:
            cells = [summary.cells[setting, name] for name in shown]
            texts = ["none" if math.isnan(cell.mean.value) else f"{cell.mean.value:.3f}" for cell in cells]
            marked = [f"{colours[cell.verdict]}{text}" for cell, text in zip(cells, texts, strict=True)]
            table.add_row(escape(setting), *marked, f"{relative_time(summary, setting):.2f}")
        _out.print(f"{escape(summary.model)}, {count}", style="bold", highlight=False)
        _out.print(table)
        _out.print()
    _out.print(
        f"Green is better than the plain gradient, red worse, each by its {confidence:.0%} interval on {FEWEST} images "
        "at least; arrows point where a score is better. The page has all scores, --score shows others here.",
        highlight=False,
    )
    _out.print(f"Look at {escape(str(page))}", highlight=False, soft_wrap=True)


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
    force: Annotated[bool, typer.Option("--force", help="Overwrite an earlier file.")] = False,
) -> None:
    """Collect channel statistics in one pass over photographs.

    Started again after it was stopped, it goes on where it was.

    Several processes share the photographs: torchrun --nproc-per-node=2 -m parchgrad stats collect ...
    """
    with ExitStack() as shown:
        # Of several processes one speaks.
        if os.environ.get("RANK", "0") == "0":
            shown.enter_context(_err.status("Starting"))
        import torch

        from parchgrad.collection import collect_from_folder
        from parchgrad.files import check_outputs
        from parchgrad.models import load_model
        from parchgrad.statistics.checkpoint import remove_checkpoints
        from parchgrad.statistics.processes import is_first_process

        check_outputs([out], force=force)
        classifier = load_model(model)
        place = _move(classifier, device)
    precision = torch.autocast(place.type, getattr(torch, dtype.value), enabled=dtype is not DtypeName.float32)
    checkpoint = out.with_name(f"{out.name}.checkpoint")
    try:
        with ProgressBars(hidden=not is_first_process()) as progress, precision:
            found = collect_from_folder(
                classifier,
                data,
                labels=labels.value,
                layers=_parse_layers(layers),
                batch_size=batch_size,
                workers=workers,
                seed=seed,
                checkpoint=checkpoint,
                checkpoint_every=checkpoint_every,
                on_progress=progress.update,
            )
    except KeyboardInterrupt:
        left = "The same command goes on from its checkpoint." if checkpoint.exists() else "Nothing was kept."
        _err.print(f"Stopped. {left}", highlight=False)
        raise typer.Exit(130) from None
    if is_first_process():
        found.save(out)
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
    with _err.status("Reading"):
        from parchgrad.selection import ClassWise
        from parchgrad.statistics import ChannelStatistics

        held = ChannelStatistics.load(file)
        selector = ClassWise(held, quantile=quantile, test=held.test)
        selector.check({name: layer.channels for name, layer in held.items()})
        if target is None:
            table = _table("layer", *("channels", "not normal", "selected", "fewest", "most"))
            for name, layer in held.items():
                gated = int((layer.shapiro_p < cast(float, selector.normality_threshold)).sum())
                selected = selector.class_masks(name).sum(dim=1)
                mean = f"{selected.double().mean():.1f}"
                table.add_row(
                    _shown(name), f"{layer.channels}", f"{gated}", mean, f"{selected.min()}", f"{selected.max()}"
                )
            title = f"Channels selected for a class at quantile {quantile:g}: mean, fewest and most"
        else:
            column, label = _find_class(held, target)
            selector.check_known([column if held.class_indices is None else held.class_indices[column]])
            table = _table("layer", *(f"{place + 1}." for place in range(top)))
            for name, layer in held.items():
                best = layer.class_log_p(selector.test)[:, column].sort(stable=True)
                pairs = zip(best.indices[:top].tolist(), best.values[:top].tolist(), strict=True)
                table.add_row(_shown(name), *(f"{channel}: {_decades(value)}" for channel, value in pairs))
            title = f"Channels that respond most to {label}: number and log10 of the p-value"
        for place, shown in enumerate(table.columns):
            shown.justify, shown.overflow = "right" if place else "left", "fold"
    for name, text in {**held.metadata, "classes": f"{held.classes} of {held.model_classes}"}.items():
        if name not in ("categories", "collections"):
            _out.print(f"[bold]{_shown(name)}[/]: {_shown(text)}", highlight=False, soft_wrap=True)
    _out.print(f"\n{escape(title)}", style="bold", highlight=False, soft_wrap=True)
    _out.print(table)


@stats.command()
def merge(
    files: Annotated[list[Path], typer.Argument(help="Files of disjoint sets of images.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite an earlier file.")] = False,
) -> None:
    """Merge statistics that were collected apart, as if all images had been seen in one run."""
    with _err.status("Reading"):
        from parchgrad.files import check_outputs
        from parchgrad.statistics import ChannelStatistics
        from parchgrad.statistics.accumulate import merge_statistics

        check_outputs([out], force=force)
        parts = [ChannelStatistics.load(file) for file in files]
    with ProgressBars() as progress:
        found = merge_statistics(parts, on_progress=progress.update)
    found.save(out)
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
    """Import the pickles of the original research code; nothing in them is executed."""
    with _err.status("Reading"):
        from parchgrad.files import check_outputs
        from parchgrad.models import load_model
        from parchgrad.statistics.pickles import import_pickles as read_pickles

        check_outputs([out], force=force)
        # Names and channels are those of the architecture, whatever its weights.
        found = read_pickles(folder, load_model(model, pretrained=False).model, name=model)
    found.save(out)
    _say_saved(found, out)


class ProgressBars:
    """A bar for each stage, with the rate and the time left; on a resumed run both count from where it goes on."""

    def __init__(self, *, hidden: bool = False) -> None:
        """Set the columns up; nothing is drawn before the block is entered, and nothing at all where hidden."""
        columns = (
            TextColumn("{task.description:22s}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=_err, disable=hidden)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "ProgressBars":
        return self

    def __exit__(self, *exception: object) -> None:
        # Stopping what never started prints an empty line.
        if self._tasks:
            self._progress.stop()

    def update(self, stage: str, done: int, total: int | None) -> None:
        """Take what the library tells of its progress."""
        known = {"images": ("Images", "images/s"), "normality": ("Testing for normality", "channels/s")}
        # Of an evaluation each model is a stage.
        label, unit = known.get(stage, (stage, "maps/s"))
        if stage not in self._tasks:
            self._progress.start()
            self._tasks[stage] = self._progress.add_task(label, completed=done, total=total, rate="")
        task = self._progress.tasks[self._tasks[stage]]
        rate = f"{task.speed:,.0f} {unit}" if task.speed else ""
        self._progress.update(task.id, completed=done, total=total, rate=rate)


def _move(classifier: "Classifier", device: str) -> "torch.device":
    """Move the model."""
    place = _place(device)
    classifier.model.to(place)
    return place


def _place(device: str) -> "torch.device":
    """The device of that name, made sure of; of several processes each takes a GPU of its own."""
    import torch

    try:
        place = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise SettingError(
            f"The device {device!r} cannot be used ({str(error).splitlines()[0]}); try 'cpu'."
        ) from error
    return place


def _find_class(held: "ChannelStatistics", query: str) -> tuple[int, str]:
    """Column and name of a class by its index or name."""
    from parchgrad.models import find_category

    try:
        categories = [str(category) for category in json.loads(held.metadata["categories"])]
    except (KeyError, ValueError, TypeError):
        categories = [f"class {index}" for index in range(held.model_classes)]
    index = find_category(query, categories, held.metadata.get("model", "the model"))
    return held.columns([index])[0], categories[index]


def _shown(text: str) -> str:
    """A text of a file without what would steer a terminal."""
    return escape("".join(character if character.isprintable() else " " for character in text))


def _decades(log_p: float) -> str:
    """Log10 of a p-value; what no number can tell, since a class and its rest do not vary, as -inf."""
    return f"{log_p / math.log(10):.1f}" if log_p > -1e9 else "-inf"


def _say_saved(found: "ChannelStatistics", out: Path) -> None:
    channels = sum(layer.channels for layer in found.values())
    seen = found.classes - found.count_empty()
    _out.print(
        f"{len(found)} layers, {channels:,} channels, {seen} of {found.classes} classes, "
        f"{found.metadata.get('images', 'unknown number of')} images",
        highlight=False,
    )
    _out.print(f"Saved {escape(str(out))} ({out.stat().st_size / 1e6:,.1f} MB)", highlight=False, soft_wrap=True)
    _out.print(f"Look inside with: parchgrad stats show {escape(str(out))}", highlight=False, soft_wrap=True)


def _parse_layers(text: str) -> str | float | list[str]:
    from parchgrad.layers import parse_layers

    return parse_layers(text)


def _distinct_stems(paths: Sequence[Path]) -> list[str]:
    """File names without suffix; those of equal names in several folders are numbered."""
    stems: list[str] = []
    for path in paths:
        stem, number = path.stem, 2
        while stem in stems:
            stem, number = f"{path.stem}-{number}", number + 1
        stems.append(stem)
    return stems


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")


def _share(prediction: "Prediction") -> str:
    return f"{prediction.category} {prediction.probability:.0%}"


if __name__ == "__main__":
    main()
