"""The command line. A thin front: it reads options, calls the library, and prints."""

import enum
import logging
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from parchgrad._version import __version__
from parchgrad.errors import ParchGradError, SettingError

if TYPE_CHECKING:
    from parchgrad.models import Prediction

# The heavy imports stand inside the commands, so that --help answers at once.

app = typer.Typer(
    help="Saliency maps of convolutional networks one can trust.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_out = Console()
_err = Console(stderr=True)


class SelectorName(str, enum.Enum):
    """Selectors that need no statistics."""

    energy = "energy"
    activation = "activation"
    random = "random"


class ConserveName(str, enum.Enum):
    """What keeps a layer's variance."""

    independent = "independent"
    exact = "exact"
    none = "none"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; every error of this package ends it with one sentence and exit code 2."""
    try:
        app(arguments)
    except ParchGradError as error:
        _err.print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(2)


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
        SelectorName, typer.Option(help="What makes a channel matter: gradient energy, gradient x activation, chance.")
    ] = SelectorName.energy,
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
        from parchgrad.selection import SELECTORS_BY_NAME

        # The hub, imported by now, logs every failed try; the error that follows says it once.
        logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
        stems = _distinct_stems(images)
        check_outputs([file for stem in stems for file in Explanation.files(out, stem)], force=force)
        chosen = SELECTORS_BY_NAME[selector.value](quantile=quantile)
        status.update(f"Loading {escape(model)}")
        classifier = load_model(model)
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
    for index, explanation in enumerate(found.explanations):
        table.add_row(explanation.target.category, *(f"{shares[index]:.2f}" for shares in found.shares.values()))
    table.add_row("[bold]mean", *(f"[bold]{shares.mean():.2f}" for shares in found.shares.values()))
    _out.print("Share of the map in the cell that shows the class, 2 x 2 mosaic", style="bold")
    _out.print(table)
    _out.print(f"A map that knows nothing scores {CHANCE:.2f}. Higher is better.")
    _out.print(f"Look at {escape(str(page))}", highlight=False, soft_wrap=True)


def _parse_layers(text: str) -> str | float | list[str]:
    """A ratio where the text is a number, a set by name, or patterns separated by commas."""
    try:
        return float(text)
    except ValueError:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        return parts[0] if len(parts) == 1 else parts


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
