"""The commands evaluate and report."""

import math
import os
import sys
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from parchgrad.cli.shared import (
    MODEL_HELP,
    ClassesFile,
    ProgressBars,
    WeightsFile,
    check_selectors,
    complete_models,
    complete_selectors,
    console,
    error_console,
    make_table,
    parse_layers,
    place_of,
    printable,
)
from parchgrad.errors import SettingError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from parchgrad.evaluation.report import Summary

# Panels in the help of evaluate.
_ASKED = "Models, data and scores"
_COMPARED = "Settings to compare (repeat options to evaluate all combinations)"
# Style and sign of the outcomes in a report.
_SIGNS = {
    "better": ("green", "+"),
    "worse": ("red", "-"),
    "open": ("", "="),
    "few": ("", "?"),
    "control": ("yellow", "!"),
}


def complete_data(start: str) -> list[str]:
    """Complete the name of a data set."""
    known = ("shapes", "imagenet", "cifar10", "cifar100", "mnist", "fashion_mnist")
    return [name for name in known if name.startswith(start)]


def complete_presets(start: str) -> list[str]:
    """Complete the name of a preset."""
    # Known before the slow imports.
    return [name for name in ("paper", "leaderboard") if name.startswith(start)]


def evaluate(
    settings: Annotated[
        Path | None, typer.Argument(help=r"TOML file with model, \[data], \[grid] and \[scores].")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{MODEL_HELP} Repeatable.",
            autocompletion=complete_models,
            rich_help_panel=_ASKED,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Protocol: paper (the grid of the ParchGrad paper, 500 random images), or leaderboard (this package "
            "and other methods by all scores, 100 random images). The file and the options override its settings.",
            autocompletion=complete_presets,
            rich_help_panel=_ASKED,
        ),
    ] = None,
    weights: WeightsFile = None,
    classes: ClassesFile = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder of images, or a data set: shapes, imagenet, cifar10, cifar100, mnist or fashion_mnist.",
            autocompletion=complete_data,
            rich_help_panel=_ASKED,
        ),
    ] = None,
    root: Annotated[str | None, typer.Option(help="Folder of the data set.", rich_help_panel=_ASKED)] = None,
    annotations: Annotated[
        str | None,
        typer.Option("--boxes", help="Folder of ILSVRC's XML files, for imagenet.", rich_help_panel=_ASKED),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Number of images, chosen randomly.", rich_help_panel=_ASKED)
    ] = None,
    mosaics: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Number of mosaics for the grid pointing game, instead of single images; 0 for none.",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    target: Annotated[
        Literal["label", "predicted"] | None,
        typer.Option(help="Class to explain: that of the folder, or the predicted one.", rich_help_panel=_ASKED),
    ] = None,
    scores: Annotated[
        list[str] | None,
        typer.Option(
            help="Scores: perturbation, insertion, relevance_gain, localisation, sparsity, sensitivity, randomisation, "
            "class_similarity or stability; repeatable.",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Method: gradient, input_x_gradient, integrated_gradients, smoothgrad, or a Captum class name.",
            rich_help_panel=_COMPARED,
        ),
    ] = None,
    selector: Annotated[
        list[str] | None,
        typer.Option(
            help="Selector, or none; see `parchgrad selectors`.",
            autocompletion=complete_selectors,
            callback=check_selectors,
            rich_help_panel=_COMPARED,
            show_default="evidence",
        ),
    ] = None,
    quantile: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of the channels at or above the threshold, in (0, 1].",
            rich_help_panel=_COMPARED,
            show_default="0.1, for evidence 0.2",
        ),
    ] = None,
    softness: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            max=1,
            help="Width of the ramp around the threshold, in [0, 1]; 0 is a hard cut.",
            rich_help_panel=_COMPARED,
            show_default="0.5, for evidence 1",
        ),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers to edit: 'auto' (what suits the network), 'all', 'published', a ratio (0.5: the upper half of "
            "the path), or patterns ('layer3.*,conv1').",
            rich_help_panel=_COMPARED,
            show_default="0.5, for evidence auto",
        ),
    ] = None,
    gamma: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            help="Factor of the kept signal relative to the rest; 'inf' prunes the rest.",
            rich_help_panel=_COMPARED,
        ),
    ] = None,
    conserve: Annotated[
        list[str] | None,
        typer.Option(
            help="What a layer conserves: energy, independent, exact or none.",
            rich_help_panel=_COMPARED,
            show_default="energy",
        ),
    ] = None,
    gates: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            help="Width of the soft gates of rectifiers and max pooling, in standard deviations; 0 is the true "
            "derivative.",
            rich_help_panel=_COMPARED,
            show_default="1, for evidence 8; 0 for a hard cut or without a selector",
        ),
    ] = None,
    antialias: Annotated[
        list[bool] | None,
        typer.Option(
            "--antialias/--no-antialias",
            help="Smooth gradients at the input of strided operations.",
            rich_help_panel=_COMPARED,
            show_default="on; off for a hard cut or without a selector",
        ),
    ] = None,
    balance: Annotated[
        list[bool] | None,
        typer.Option(
            "--balance/--no-balance",
            help="Balance attention, normalisations, gates and smooth activations.",
            rich_help_panel=_COMPARED,
            show_default="on; off for a hard cut or without a selector",
        ),
    ] = None,
    masks: Annotated[
        list[str] | None,
        typer.Option(
            help="Masks: own, or the controls another (of another class) and shuffled.", rich_help_panel=_COMPARED
        ),
    ] = None,
    statistics: Annotated[
        str | None, typer.Option(help="File of channel statistics, for the selectors class and instance.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Number of images per pass.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed of random maps and random channels.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("outputs/evaluation"),
    device: Annotated[str, typer.Option(help="Device of the model: 'cpu', 'cuda', 'cuda:1', 'mps'.")] = "cpu",
) -> None:
    """Evaluate a grid of settings on a data set, together with controls.

    Settings come from a file, from flags, or from both; flags override the file.

    Run the same command again to resume; finished settings are skipped.

    With --preset, the report of each run is written into its folder, unless several processes share it.

    Several processes share the images: torchrun --nproc-per-node=2 -m parchgrad evaluate ...
    """
    first = os.environ.get("RANK", "0") == "0"
    with ExitStack() as shown:
        # Only one of several processes prints.
        if first:
            shown.enter_context(error_console.status("Starting"))
        from parchgrad.workflows.evaluation import DATA_SETS, evaluate_all, read_settings

        if data is not None and data not in DATA_SETS and root is None:
            if not os.path.isdir(data):
                known = ", ".join(name for name in DATA_SETS if name != "folder")
                raise SettingError(f"--data is {data!r}, which is neither a folder nor one of {known}. Check the path.")
            data, root = "folder" if annotations is None else "imagenet", data
        flags: dict[str, Any] = {
            "model": model,
            "data": {"name": data, "root": root, "annotations": annotations, "count": count, "mosaics": mosaics},
            "grid": {
                "methods": method,
                "selectors": selector,
                "quantiles": quantile,
                "softnesses": softness,
                "layers": layers and [parse_layers(text) for text in layers],
                "gammas": gamma,
                "conserves": conserve,
                "gates": gates,
                "antialiases": antialias,
                "balances": balance,
                "masks": masks,
            },
            "scores": {"families": scores},
            "target": target,
            "statistics": statistics,
            "weights": None if weights is None else str(weights),
            "classes": None if classes is None else str(classes),
            "batch_size": batch_size,
            "seed": seed,
        }
        asked = read_settings(settings, flags, preset=preset)
        place = place_of(device)
    try:
        # torch says on stdout what it downloads.
        with redirect_stdout(sys.stderr), ProgressBars(hidden=not first) as progress:
            runs = evaluate_all(asked, out, device=place, on_progress=progress.update)
    except KeyboardInterrupt:
        error_console.print("Stopped. Run the same command again to resume.", highlight=False)
        raise typer.Exit(130) from None
    if preset is not None and os.environ.get("WORLD_SIZE", "1") == "1":
        for run in runs:
            # A report in the folder of its run belongs to the run.
            report([run], out=run, force=True, score=None, confidence=0.95)
    elif first:
        folders = " ".join(str(run) for run in runs)
        console.print(f"View the results with: parchgrad report {escape(folders)}", highlight=False, soft_wrap=True)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    out: Annotated[Path, typer.Option(help="Folder for the page and the tables.")] = Path("outputs/report"),
    score: Annotated[
        list[str] | None, typer.Option(help="Score to show, such as aopc or aopc@0.1; repeatable.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Level of the intervals, in (0, 1).")] = 0.95,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing report.")] = False,
) -> None:
    """Report the results of runs, the verdict first: a page (report.html) and two tables (report.md, report.csv)."""
    with error_console.status("Comparing"):
        from parchgrad._io.files import check_outputs
        from parchgrad.evaluation.summary import FEWEST
        from parchgrad.workflows.report_page import Report, make_report

        check_outputs(Report.files(out), force=force)
        found = make_report(runs, scores=score, confidence=confidence)
        page = found.save(out, force=force)
    columns = found.summaries, found.counts, found.labels, found.verdicts, found.caveats
    for summary, count, labels, verdict, caveat in zip(*columns, strict=True):
        console.print(f"{printable(summary.model)}, {count}", style="bold", highlight=False)
        for statement in verdict:
            style, sign = _SIGNS[statement.outcome]
            line = Table.grid(padding=(0, 1, 0, 0))
            line.add_row(Text(sign, style=style), printable(statement.brief))
            console.print(line)
        if caveat:
            console.print(printable(caveat), style="dim", highlight=False)
        console.print()
        console.print(_table(summary, labels.names, all_scores=score is not None))
        for name, words in labels.shared.items():
            console.print(f"{printable(name)}: {printable(words)}.", style="dim", highlight=False)
        console.print()
    console.print(
        f"+ is better than the plain gradient and - is worse, by the {confidence:.0%} interval over at least {FEWEST} "
        "images or mosaics; controls have no sign. Arrows show which direction is better. Time is per map, relative to "
        "the plain gradient. The page shows all scores; --score selects those shown here.",
        highlight=False,
    )
    console.print(f"Open {escape(str(page))}", highlight=False, soft_wrap=True)


def _table(summary: "Summary", names: "Mapping[str, str]", *, all_scores: bool) -> Table:
    """The scores of a summary, the page's headlines by default, with the controls apart."""
    from parchgrad.evaluation.report import mark_of, relative_time, title_of
    from parchgrad.workflows.report_page import headlines_of

    shown = summary.scores if all_scores else headlines_of(summary)[:3]
    table = make_table("setting", *(printable(title_of(name)) for name in shown), "time")
    for column in table.columns[1:]:
        # Fold the names of settings before the numbers.
        column.min_width, column.max_width, column.justify = 7, 12, "right"
    for are_controls in (False, True):
        titles = [title for title in summary.settings if (title in summary.controls) == are_controls]
        if are_controls and titles:
            table.add_row()
            table.add_row(Text("Controls", style="bold"))
        for title in titles:
            cells = []
            for name in shown:
                value = summary.cells[title, name].mean.value
                # A sign as well as a colour, since logs have no colours.
                mark = mark_of(summary, title, name)
                style, sign = ("", " ") if mark == "open" else _SIGNS[mark]
                cells.append(Text(f"{'none' if math.isnan(value) else f'{value:.3f}'} {sign}", style=style))
            table.add_row(printable(names[title]), *cells, f"{relative_time(summary, title):.2f}")
    return table
