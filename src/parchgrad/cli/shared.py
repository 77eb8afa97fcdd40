"""Consoles, options, tables and progress bars that the commands share."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from parchgrad.errors import ImageError, SettingError, on_one_line

if TYPE_CHECKING:
    import torch

    from parchgrad.models.classifier import Classifier


# Slow imports are inside the commands, so that --help is fast.

# Panels of the help, after that of the most common options.
OWN_NETWORK = "Network"
METHOD = "How channels are selected and edited; defaults depend on the selector"

SELECTORS = ("evidence", "energy", "activation", "class", "instance", "random")
"""Short names of this package's selectors, known before the slow imports."""


def complete_selectors(start: str) -> list[str]:
    """Complete the name of a selector."""
    return [name for name in SELECTORS if name.startswith(start)]


def check_selector(name: str) -> str:
    """Refuse the name of no selector, before the slow imports unless others may be registered by then."""
    if name not in (*SELECTORS, "none") and "torch" not in sys.modules:
        near = get_close_matches(name, SELECTORS, n=1, cutoff=0.4)
        hint = f"Perhaps you meant {near[0]!r}" if near else f"Use one of {', '.join(SELECTORS)}"
        raise SettingError(f"There is no selector {name!r}. {hint}, or register yours with --import.")
    return name


def check_selectors(names: list[str] | None) -> list[str] | None:
    """Check several names, as `check_selector`."""
    return names and [check_selector(name) for name in names]


def images_in(paths: Sequence[Path], out: Path) -> list[Path]:
    """Replace folders by the images in them, apart from results in `out`."""
    from parchgrad.data.images import IMAGE_SUFFIXES, find_files

    found: list[Path] = []
    for path in paths:
        inner = [path]
        if path.is_dir():
            inner = [file for file in find_files(path, IMAGE_SUFFIXES) if out.resolve() not in file.resolve().parents]
        if not inner:
            raise ImageError(f"The folder {str(path)!r} contains no images. Choose one with JPEG or PNG files.")
        found += inner
    return found


def complete_models(start: str) -> list[str]:
    """Complete the name of a model that needs no download."""
    # Others would take seconds to list.
    known = ("efficientnet_lite0", "shapes", "shapes_vit", "shapes_convnext", "shapes_mobilenet")
    return [name for name in known if name.startswith(start)]


MODEL_HELP = (
    "Model name from torchvision or timm (see `parchgrad models`), 'hf-hub:OWNER/NAME', or a function of yours that "
    "returns a module or a Classifier: 'file.py:function' or 'package.module:function'."
)
ModelName: TypeAlias = Annotated[str, typer.Option(help=MODEL_HELP, autocompletion=complete_models)]
ModelArgument: TypeAlias = Annotated[str, typer.Argument(help=MODEL_HELP, autocompletion=complete_models)]
WeightsFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="File of weights for --model: safetensors, or a pickle of tensors alone.",
        show_default="pretrained",
        rich_help_panel=OWN_NETWORK,
    ),
]
ClassesFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--classes",
        exists=True,
        dir_okay=False,
        help="File of class names: one per line, or JSON.",
        show_default="those of the model",
        rich_help_panel=OWN_NETWORK,
    ),
]

# Windows has no SIGHUP.
_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

console = Console()
error_console = Console(stderr=True)


class ProgressBars:
    """A bar for each stage, with rate and remaining time, counted from where a resumed run continues."""

    def __init__(self, *, hidden: bool = False) -> None:
        """Set up the columns; nothing is drawn before the first update, or if hidden."""
        columns = (
            TextColumn("{task.description:22s}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=error_console, disable=hidden)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "ProgressBars":
        return self

    def __exit__(self, *exception: object) -> None:
        # Stopping what never started prints an empty line.
        if self._tasks:
            self._progress.stop()

    def update(self, stage: str, done: int, total: int | None) -> None:
        """Show the progress of a stage."""
        known = {"images": ("Images", "images/s"), "normality": ("Testing for normality", "channels/s")}
        # In an evaluation, each model is a stage.
        label, unit = known.get(stage, (stage, "maps/s"))
        if stage not in self._tasks:
            self._progress.start()
            self._tasks[stage] = self._progress.add_task(label, completed=done, total=total, rate="")
        task = self._progress.tasks[self._tasks[stage]]
        rate = f"{task.speed:,.{0 if task.speed >= 10 else 1}f} {unit}" if task.speed else ""
        self._progress.update(task.id, completed=done, total=total, rate=rate)


def load_classifier(
    name: str, *, weights: Path | None = None, classes: Path | None = None, pretrained: bool = True
) -> "Classifier":
    """Load a network by name or from a function of the user's, with torch's messages about downloads on stderr."""
    from parchgrad.models.own_networks import load_network

    # huggingface_hub logs every failed attempt; the error that follows is enough.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    with redirect_stdout(sys.stderr):
        found = load_network(name, weights=weights, classes=classes, pretrained=pretrained)
    # Not for a function, which brings its own.
    if weights is not None and ":" not in name.removeprefix("hf-hub:"):
        how = escape(found.preprocess.description)
        error_console.print(
            f"[bold yellow]Note:[/] Images are preprocessed as for the pretrained {escape(name)}: {how}. If your "
            "training differs, pass a function that returns a Classifier as --model.",
            soft_wrap=True,
            highlight=False,
        )
    return found


def place_of(device: str) -> "torch.device":
    """Find a device and check that it works; "cuda" gives each of several processes its own GPU."""
    import torch

    try:
        place = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device)
        # Read a value too: the device meta has no data.
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError) as error:
        raise SettingError(
            f"--device is {device!r}, which does not work ({str(error).splitlines()[0]}). Try 'cpu'."
        ) from error
    return place


def printable(text: str) -> str:
    """Escape text from a file, including control characters and markup."""
    return escape(on_one_line(text))


def parse_layers(text: str) -> str | float | list[str]:
    """Call `parchgrad.core.layers.parse_layers`, imported lazily."""
    from parchgrad.core.layers import parse_layers as parse

    return parse(text)


def make_table(*columns: str) -> Table:
    """Make an empty table without borders."""
    return Table(*columns, box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Make termination signals raise KeyboardInterrupt like Ctrl-C, so that cleanup runs."""
    if threading.current_thread() is not threading.main_thread():
        # Python only allows signal handlers in the main thread.
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        # Ignore further signals, which would interrupt the cleanup.
        for ending in _ENDING:
            signal.signal(ending, signal.SIG_IGN)
        raise KeyboardInterrupt

    # Shells ignore SIGINT for background jobs, so override that, but respect the SIGHUP that nohup ignores.
    meant = [ending for ending in _ENDING if ending.name == "SIGHUP" and signal.getsignal(ending) == signal.SIG_IGN]
    earlier = {ending: signal.signal(ending, interrupt) for ending in _ENDING if ending not in meant}
    try:
        yield
    finally:
        for ending, handler in earlier.items():
            signal.signal(ending, handler)
