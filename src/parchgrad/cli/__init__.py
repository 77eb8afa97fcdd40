"""The command line. A thin front: it reads options, calls the library, and prints."""

import io
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.markup import escape

from parchgrad._version import __version__
from parchgrad.cli.evaluation import evaluate, report
from parchgrad.cli.explorer import explore
from parchgrad.cli.photographs import animate, demo, explain, models, sweep
from parchgrad.cli.shared import console, error_console
from parchgrad.cli.statistics import stats
from parchgrad.errors import ModelWarning, ParchGradError, StatisticsWarning

app = typer.Typer(
    help="Sharper saliency maps of convolutional networks, honestly evaluated.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for _command in (explain, sweep, animate, models, demo, explore, evaluate, report):
    app.command()(_command)
app.add_typer(stats, name="stats")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; every error of this package ends it with one sentence and exit code 2."""
    with _replacing_letters(), warnings.catch_warnings():
        warnings.showwarning = _show_warning(warnings.showwarning)
        # Pillow's notices of odd metadata and of many pixels, neither of which makes a photograph unreadable.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        # Captum's notice that a method sets hooks, which are gone by the time it is read.
        warnings.filterwarnings("ignore", message="Setting (backward|forward)")
        try:
            app(arguments)
        except ParchGradError as error:
            error_console.print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
            sys.exit(2)


@contextmanager
def _replacing_letters() -> Iterator[None]:
    """Write letters that the terminal's encoding lacks, as names of files may hold, by their numbers."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    strict = [stream for stream in streams if stream.errors == "strict"]
    for stream in strict:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream in strict:
            if not stream.closed:
                stream.reconfigure(errors="strict")


def _show_warning(otherwise: Callable[..., None]) -> Callable[..., None]:
    """Say this package's warnings in a line, each once, and leave others as they are."""
    said = set()

    def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if issubclass(category, StatisticsWarning | ModelWarning):
            # Python says them again from another line, and whenever any library has changed the filters.
            if str(message) in said:
                return
            said.add(str(message))
            error_console.print(f"[bold yellow]Note:[/] {escape(str(message))}", soft_wrap=True, highlight=False)
        else:
            otherwise(message, category, *place)

    return show


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"parchgrad {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
