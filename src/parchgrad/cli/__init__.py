"""The command line: read options, call the library, print results."""

import io
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from parchgrad._version import __version__
from parchgrad.cli.evaluation import evaluate, report
from parchgrad.cli.explorer import explore
from parchgrad.cli.listing import classes, models, selectors
from parchgrad.cli.photographs import animate, demo, explain, sweep
from parchgrad.cli.shared import console, error_console
from parchgrad.cli.statistics import stats
from parchgrad.errors import ModelWarning, ParchGradError, SettingError, StatisticsWarning, reason_of

app = typer.Typer(
    help="Saliency maps that show which part matters, for CNNs and vision transformers, with honest evaluation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for _command in (explain, sweep, animate, evaluate, report, explore, demo, models, classes, selectors):
    app.command()(_command)
app.add_typer(stats, name="stats")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; print parchgrad's errors on one line and exit with code 2."""
    with _replacing_letters(), warnings.catch_warnings():
        warnings.showwarning = _show_warning(warnings.showwarning)
        # Pillow warns about odd metadata and large images, which are still readable.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        # Captum warns about its temporary hooks.
        warnings.filterwarnings("ignore", message="Setting (backward|forward)")
        try:
            app(arguments)
        except ParchGradError as error:
            said = escape(_naming_options(str(error)))
            error_console.print(f"[bold red]Error:[/] {said}", soft_wrap=True, highlight=False)
            sys.exit(2)


def _naming_options(text: str) -> str:
    """Name the options of the commands in place of the parameters that they set."""
    group = typer.main.get_command(app)
    commands = [*getattr(group, "commands", {}).values()]
    commands += [inner for command in commands for inner in getattr(command, "commands", {}).values()]
    options: dict[str, str] = {
        item.name: item.opts[0] for command in commands for item in command.params if item.opts[0][:2] == "--"
    }

    def option(found: re.Match[str]) -> str:
        name = options.get(found[1], "")
        value = (found[2] or "").lstrip("=").strip("'")
        return (f"{name} {value}" if value and value != "True" else name) or found[0]

    return re.sub(r"`(\w+)(=[^`]*)?`", option, text)


@contextmanager
def _replacing_letters() -> Iterator[None]:
    """Escape characters that the terminal's encoding lacks, for example in file names."""
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
    """Print this package's warnings on one line, each once, and pass on others."""
    said = set()

    def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if issubclass(category, StatisticsWarning | ModelWarning):
            # Python repeats them from other lines, and whenever a library changes the filters.
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
    modules: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            metavar="MODULE",
            help="Import a module first, for example to register selectors.",
        ),
    ] = None,
) -> None:
    if modules:
        # As `python -m` does.
        sys.path.insert(0, str(Path.cwd()))
    for name in modules or ():
        if not all(part.isidentifier() for part in name.split(".")) or name.endswith(".py"):
            raise SettingError(f"--import is {name!r}, but it must be a module, such as `selectors` for selectors.py.")
        try:
            import_module(name)
        except ImportError as error:
            raise SettingError(
                f"--import {name} failed ({reason_of(error)}). Pass a module in this folder or in an installed package."
            ) from error
