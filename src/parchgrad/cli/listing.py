"""The commands models, classes and selectors."""

from typing import Annotated

import typer
from rich.markup import escape

from parchgrad.cli.shared import (
    ClassesFile,
    ModelArgument,
    WeightsFile,
    console,
    load_classifier,
    make_table,
    printable,
)
from parchgrad.errors import SettingError


def models(
    pattern: Annotated[str | None, typer.Argument(help="Pattern of names, such as 'resnet*'.")] = None,
) -> None:
    """List the available models; timm's only if a pattern is given."""
    from parchgrad.models.loading import OFFLINE_MODEL, list_models

    entries = list_models(pattern or "*")
    if not entries:
        wider = f"*{(pattern or '').strip('*')}*"
        raise SettingError(f"No model matches {pattern!r}. Try `parchgrad models '{wider}'`, or '*' for all.")
    shown = [entry for entry in entries if pattern or entry.offline or entry.library != "timm"]
    table = make_table("name", "library", "weights")
    for entry in shown:
        elsewhere = escape("pip install 'parchgrad[demo]'") if entry.name == OFFLINE_MODEL else "to be downloaded"
        table.add_row(entry.name, entry.library, "installed" if entry.offline else elsewhere)
    console.print(table)
    if len(shown) < len(entries):
        hint = f"and {len(entries) - len(shown)} more from timm. Pass a pattern: parchgrad models 'convnext*'"
        console.print(hint, highlight=False, soft_wrap=True)


def classes(
    model: ModelArgument = "efficientnet_lite0",
    search: Annotated[str, typer.Argument(help="Part of a class name, in any case.", show_default=False)] = "",
    weights: WeightsFile = None,
    names: ClassesFile = None,
) -> None:
    """List the classes of a model, with the index and name that --target takes."""
    classifier = load_classifier(model, weights=weights, classes=names, pretrained=False)
    found = [
        (index, category)
        for index, category in enumerate(classifier.categories)
        if search.casefold() in category.casefold()
    ]
    if not found:
        raise SettingError(
            f"None of the {len(classifier.categories)} classes of {classifier.name} contains {search!r}. Search for "
            "less, or for nothing to list all."
        )
    table = make_table("index", "name", *(["WordNet id"] if classifier.synsets else []))
    for index, category in found:
        table.add_row(f"{index}", printable(category), *classifier.synsets[index : index + 1])
    console.print(table)


def selectors() -> None:
    """List the selectors, with those that `parchgrad --import` registers."""
    from parchgrad.statistics.selectors import registered_selectors

    table = make_table("name", "keeps", "needs")
    for name, found in registered_selectors().items():
        table.add_row(name, printable(found.summary), "statistics" if found.needs_statistics else "")
    console.print(table)
