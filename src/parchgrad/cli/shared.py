"""What the commands share: consoles, options, tables and progress bars."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from parchgrad.errors import SettingError, on_one_line

if TYPE_CHECKING:
    import torch

    from parchgrad.models import Classifier, Prediction

# The heavy imports stand inside the commands, so that --help answers at once.

# Windows has no hang-up of the terminal.
_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

console = Console()
error_console = Console(stderr=True)


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
        self._progress = Progress(*columns, console=error_console, disable=hidden)
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


def move_model(classifier: "Classifier", device: str) -> "torch.device":
    """Move the model."""
    place = place_of(device)
    classifier.model.to(place)
    return place


def place_of(device: str) -> "torch.device":
    """The device of that name, made sure of; of several processes each takes a GPU of its own."""
    import torch

    try:
        place = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device)
        # Read as well, since on the device meta there are no numbers.
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError) as error:
        raise SettingError(
            f"The device {device!r} cannot be used ({str(error).splitlines()[0]}); try 'cpu'."
        ) from error
    return place


def printable(text: str) -> str:
    """A text of a file without what would steer a terminal."""
    return escape(on_one_line(text))


def parse_layers(text: str) -> str | float | list[str]:
    """Read a layer choice as `parchgrad.layers.parse_layers` does, which is imported when it is needed."""
    from parchgrad.layers import parse_layers as parse

    return parse(text)


def make_table(*columns: str) -> Table:
    """Make an empty table without borders."""
    return Table(*columns, box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")


def say_share(prediction: "Prediction") -> str:
    """Say a class and its probability."""
    return f"{prediction.category} {prediction.probability:.0%}"


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Let every signal that asks for the end interrupt like Ctrl-C, so that what is to be done before it is done."""
    if threading.current_thread() is not threading.main_thread():
        # Python takes signals there alone.
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        # Once: what cleans up is not to be cut off.
        for ending in _ENDING:
            signal.signal(ending, signal.SIG_IGN)
        raise KeyboardInterrupt

    # Set even where it is ignored, as a shell does for what runs in the background; but nohup means its hang-up.
    meant = [ending for ending in _ENDING if ending.name == "SIGHUP" and signal.getsignal(ending) == signal.SIG_IGN]
    earlier = {ending: signal.signal(ending, interrupt) for ending in _ENDING if ending not in meant}
    try:
        yield
    finally:
        for ending, handler in earlier.items():
            signal.signal(ending, handler)
