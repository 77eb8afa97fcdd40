"""Batches for a collection from any kind of data."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from parchgrad.errors import ParchGradError, StatisticsError, StatisticsWarning, warn
from parchgrad.statistics.processes import Processes

__all__ = ["Batches", "Labels", "LeftOut", "has_items", "parts_of", "started", "unwrapped"]

Labels = Literal["given", "predicted"]


@dataclass(frozen=True)
class LeftOut:
    """Returned by a data set for an item it cannot provide; the collection warns and leaves it out.

    Attributes:
        reason: a sentence without its full stop.
    """

    reason: str


class Batches:
    """The batches of one process: every n-th one of n processes, so batches do not depend on the process."""

    def __init__(self, data: Any, batch_size: int, workers: int, labels: Labels, processes: Processes) -> None:
        """Accept data as `collect_statistics` does."""
        self._data, self._workers, self._labels = data, workers, labels
        self._batch_size = batch_size
        self._numbers: list[range] | None = None
        # What `peek` has fetched already, and the rest.
        self._fetched: tuple[list[Any], Iterator[Any]] | None = None
        self.count: int | None = None
        self.images: int | None = None
        if has_items(data):
            starts = range(0, len(data), batch_size)[processes.rank :: processes.count]
            self._numbers = [range(start, min(start + batch_size, len(data))) for start in starts]
            self.count, self.images = len(self._numbers), sum(len(numbers) for numbers in self._numbers)

    def images_of(self, done: int) -> int | None:
        """Return the number of images in the first `done` batches; None if there are fewer batches."""
        if self._numbers is None or not 0 <= done <= len(self._numbers):
            return None
        return sum(len(numbers) for numbers in self._numbers[:done])

    def peek(self) -> Tensor | None:
        """Fetch the inputs of the first batch, which `after(0)` still yields; None if there is no batch."""
        fetched: list[Any] = []
        rest = self.after(0)
        for batch in rest:
            fetched.append(batch)
            if batch is not None:
                break
        self._fetched = fetched, rest
        return None if not fetched or fetched[-1] is None else fetched[-1][1]

    def after(self, done: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None] | None]:
        """Yield numbers, inputs and labels of each batch after the first `done`; labels are None if predicted.

        Yield None for a batch whose items are all left out.
        """
        fetched, self._fetched = self._fetched, None
        if fetched is not None and done == 0:
            yield from fetched[0]
            yield from fetched[1]
            return
        batches: Iterable[Any] = self._data
        # Keep the loader from drawing on the caller's random state.
        generator = torch.Generator()
        if self._numbers is not None:
            left: Any = self._numbers[done:]
            batches = started(
                DataLoader(
                    self._data, batch_sampler=left, num_workers=self._workers, generator=generator, collate_fn=_Kept.of
                )
            )
        elif isinstance(self._data, IterableDataset):
            batches = started(DataLoader(self._data, self._batch_size, generator=generator, collate_fn=_Kept.of))
        first = 0
        for index, batch in enumerate(unwrapped(batches)):
            kept = batch if isinstance(batch, _Kept) else _Kept.whole(batch)
            for reason in kept.reasons:
                warn(f"Left out: {reason}.", StatisticsWarning)
            if self._numbers is not None:
                first = self._numbers[done + index].start
            numbers = first + torch.tensor(kept.places, dtype=torch.int64, device="cpu")
            first += len(kept.places) + len(kept.reasons)
            if not kept.places:
                yield None
                continue
            inputs, given = parts_of(kept.batch)
            yield numbers, inputs, _classes(given, len(inputs)) if self._labels == "given" else None


class _Kept(NamedTuple):
    """The items of a batch that are kept: their positions, collated, and why others are left out."""

    places: list[int]
    batch: Any
    reasons: list[str]

    @classmethod
    def of(cls, items: list[Any]) -> "_Kept":
        places = [place for place, item in enumerate(items) if not isinstance(item, LeftOut)]
        reasons = [item.reason for item in items if isinstance(item, LeftOut)]
        # Labels become tensors here.
        with torch.device("cpu"):
            batch = default_collate([items[place] for place in places]) if places else None
        return cls(places, batch, reasons)

    @classmethod
    def whole(cls, batch: Any) -> "_Kept":
        inputs, _ = parts_of(batch)
        return cls(list(range(len(inputs))), batch, [])


def parts_of(batch: Any) -> tuple[Tensor, Sequence[Any]]:
    """Split a batch into inputs and what follows them: the labels, or nothing."""
    inputs, given = (batch[0], batch[1:]) if isinstance(batch, list | tuple) and batch else (batch, ())
    if not isinstance(inputs, Tensor):
        raise StatisticsError(
            f"The data contain inputs of type {type(inputs).__name__}, but they must be tensors. Use a transform or "
            "a collate function that returns tensors."
        )
    return inputs, given


def _classes(given: Any, count: int) -> Tensor:
    """Return the labels of a batch as integers (B,)."""
    if not given:
        raise StatisticsError("The data have no labels. Pass items (input, class), or use `labels='predicted'`.")
    try:
        labels = torch.as_tensor(given[0], device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise StatisticsError(
            f"The data contain labels of type {type(given[0]).__name__}, but each must be a whole number, the class "
            "index."
        ) from error
    if tuple(labels.shape) != (count,) or labels.is_floating_point() or labels.is_complex():
        raise StatisticsError(
            f"The data contain labels of shape {tuple(labels.shape)} and type {labels.dtype} for {count} inputs, but "
            "each must be a whole number, the class index."
        )
    return labels.long()


def started(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start a loader under any default device: torch draws the loader's seed there, but its generator is on the CPU."""
    with torch.device("cpu"):
        return iter(loader)


def unwrapped(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield batches; strip the traceback that torch puts into the message of a worker's error."""
    try:
        yield from batches
    except ParchGradError as error:
        lines = str(error.args[0]).strip().splitlines()
        if len(lines) < 2:
            raise
        raise type(error)(lines[-1].split(": ", 1)[-1]) from error


def has_items(data: object) -> bool:
    """Whether items can be fetched by index; like torch's loader, this accepts lists."""
    return not isinstance(data, IterableDataset) and hasattr(data, "__getitem__") and hasattr(data, "__len__")
