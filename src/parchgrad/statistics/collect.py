"""One pass over a data set: the GAP of every channel leaves each forward pass, and nothing else does."""

import difflib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from parchgrad.checks import check_whole_number
from parchgrad.errors import (
    InputError,
    LayerError,
    ModelError,
    ParchGradError,
    SettingError,
    StatisticsError,
    StatisticsWarning,
    reason_of,
    warn,
)
from parchgrad.files import locked, without_addresses
from parchgrad.hooks import TransientHook, UnmaskedFailures
from parchgrad.layers import (
    Convolution,
    LayerChoice,
    bare_model,
    check_evaluation_mode,
    choose_layers,
    find_convolutions,
)
from parchgrad.statistics.accumulate import COLLECTIONS, Accumulator, Progress
from parchgrad.statistics.checkpoint import check_parts, differences, part_of_process, read_checkpoint, write_checkpoint
from parchgrad.statistics.processes import Processes, joined_processes
from parchgrad.statistics.store import ChannelStatistics, weight_digest

__all__ = ["Labels", "LeftOut", "collect_gaps", "collect_statistics"]

Labels = Literal["given", "predicted"]

# Elements of an output that are rectified at once on the CPU: what is written stays in the cache until it is summed.
_ELEMENTS = 1 << 21

# Items that are looked at to tell a data set from another.
_PROBES = 64


@dataclass(frozen=True)
class LeftOut:
    """What a data set gives in place of an item that cannot be had; it is left out of the statistics, and warned of.

    Attributes:
        reason: in a sentence, without its full stop.
    """

    reason: str


_GAPS: ContextVar[dict[str, list[Tensor]] | None] = ContextVar("parchgrad_gaps", default=None)


def collect_statistics(
    model: nn.Module,
    data: Dataset[Any] | Iterable[Any],
    *,
    layers: LayerChoice = "all",
    labels: Labels = "given",
    batch_size: int = 32,
    workers: int = 0,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 250,
    metadata: Mapping[str, str] | None = None,
    on_progress: Progress | None = None,
) -> ChannelStatistics:
    """Collect channel statistics in one pass over images.

    The GAP is the mean over space of relu(output); of a convolution that is called several times in a pass, the mean
    over the calls. Batches go to the model's device; an autocast block around the call is respected.

    Under torchrun, or in an initialised process group, every process must make the same call: each takes its share of
    the batches, and all get the whole result. With a checkpoint a run that was stopped at any moment goes on when it
    is started again, and ends as if it had never been stopped. Both need a data set that gives the same item for the
    same index every time, so no random augmentation.

    Args:
        model: a classifier whose output are the logits, shape (B, K), in evaluation mode.
        data: a data set, or batches of it such as a `DataLoader` gives. An item is an input and its class, or with
            predicted labels the input alone; a `LeftOut` of a data set is warned of and left out. An attribute
            `fingerprint` (text) of a data set stands for its content; without one, its type, length and 64 items do.
        layers: which convolutions; see `choose_layers`.
        labels: `"given"` takes the classes that the data name; `"predicted"` counts every image in every class with
            the model's own softmax probability, so that unlabelled images will do.
        batch_size: images in one pass, where `data` is a data set.
        workers: processes that load images, where `data` is a data set; 0 loads in this process.
        seed: seed of the sample of at most 5,000 images that the Shapiro-Wilk test sees.
        checkpoint: file to go on from and to write to; it stays when all is done, until you have saved the result.
        checkpoint_every: batches between two checkpoints.
        metadata: what to write into the statistics beside the labels, the seed and how many images were seen and left
            out; `model`, `preprocessing` and `data` are the customary names.
        on_progress: called with the stage (`"images"`, then `"normality"`), how many are done, and how many there are,
            where that is known.

    Returns:
        Statistics of every chosen layer over K classes.

    Raises:
        SettingError: if a setting is out of range, or batches are given where a data set is needed.
        StatisticsError: if there are no images, labels are missing or out of range, a layer takes no part, the
            checkpoint was made with another model, data or settings, or another process is lost.
        ModelError: if the model holds no convolution, is in training mode, or its output are no logits.
        OutputError: if the checkpoint cannot be written, or another run is writing it.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
        >>> images = [(torch.rand(3, 8, 8), index % 2) for index in range(10)]
        >>> statistics = collect_statistics(model, images, batch_size=4)
        >>> statistics["0"].class_count
        tensor([5., 5.], dtype=torch.float64)
    """
    # Joined first: a process that stops at a check must not leave the others waiting for it to join.
    with joined_processes() as processes:
        model = bare_model(model)
        check_evaluation_mode(model)
        _check_settings(data, labels, batch_size, workers, checkpoint_every, seed, metadata or {})
        chosen = choose_layers(model, layers)
        path, settings, identity = None, {}, None
        if _has_items(data):
            settings = _settings(model, data, list(chosen), labels, batch_size, seed, workers)
            identity = settings["data"]
            _check_agreement(settings, processes)
        elif checkpoint is not None or processes.count > 1:
            raise SettingError(
                f"data is a {type(data).__name__}, but checkpoints and several processes need a data set whose items "
                "can be fetched by index; give the data set itself, such as loader.dataset."
            )
        if checkpoint is not None:
            check_parts(Path(checkpoint), processes.count)
            path = part_of_process(Path(checkpoint), processes.rank, processes.count)
        batches = _Batches(data, batch_size, workers, labels, processes)
        # Two that go on from one checkpoint would write it by turns.
        with nullcontext() if path is None else locked(path):
            found = _collect(model, chosen, batches, seed, _Saver(path, settings, checkpoint_every), on_progress)
        for part in filter(None, processes.gather({} if found is None else found.tensors())):
            other = Accumulator.restored(part, seed=seed)
            if found is None:
                found = other
            else:
                found.merge(other)
        tensors: Mapping[str, Tensor] = {}
        if processes.rank == 0:
            if found is None or found.images < 2:
                images = 0 if found is None else found.images
                raise StatisticsError(f"The data hold {images} images, but statistics need at least two.")
            tensors = {**found.tensors(), "shapiro_p": found.shapiro_p(on_progress)}
        tensors = processes.broadcast(tensors)
    # By this merging knows images that it holds already.
    origin = {COLLECTIONS: _digest(tensors["rows"] if identity is None else identity)[:16]}
    left_out = 0 if identity is None else len(cast(Any, data)) - int(tensors["images"])
    if left_out:
        origin["left_out"] = str(left_out)
    return Accumulator.restored(tensors, seed=seed).statistics(
        {name: module.out_channels for name, module in chosen.items()},
        tensors["shapiro_p"],
        {"model": type(model).__name__, **(metadata or {}), "labels": labels, "seed": str(seed), **origin},
        {name: weight_digest(module) for name, module in chosen.items()},
    )


def _collect(
    model: nn.Module,
    chosen: Mapping[str, Convolution],
    batches: "_Batches",
    seed: int,
    saver: "_Saver",
    on_progress: Progress | None,
) -> Accumulator | None:
    """Gather the batches of this process, from where its checkpoint stands; nothing where it has no batch."""
    accumulator, done = saver.restored(batches, seed)
    device = next(model.parameters()).device
    if accumulator is not None and on_progress is not None:
        on_progress("images", batches.images_of(done) or accumulator.images, batches.images)
    is_whole = True
    with _gaps_of(chosen) as gaps:
        try:
            for batch in batches.after(done):
                if batch is not None:
                    numbers, inputs, given = batch
                    values, probabilities = _respond(model, inputs.to(device, non_blocking=True), gaps)
                    if accumulator is None:
                        accumulator = Accumulator(values.shape[1], probabilities.shape[1], seed=seed)
                    is_whole = False
                    accumulator.add(numbers, values, probabilities if given is None else given)
                done += 1
                is_whole = True
                if accumulator is not None:
                    saver.save_at_times(accumulator, done, is_last=done == batches.count)
                    if on_progress is not None:
                        # Those that are left out are done as well.
                        on_progress("images", batches.images_of(done) or accumulator.images, batches.images)
        except (KeyboardInterrupt, ParchGradError):
            # Unless a batch was just being added, nothing is lost.
            if is_whole and accumulator is not None:
                saver.save(accumulator, done)
            raise
    return accumulator


def collect_gaps(model: nn.Module, batches: Iterable[Any], layer: str) -> Tensor:
    """Collect the GAPs of one layer, to look at: statistics keep their moments alone.

    Batches go to the model's device and dtype.

    Args:
        model: classifier in evaluation mode, logits (B, K).
        batches: such as a `DataLoader` gives: each a tensor of preprocessed images (B, C, *S), or such a tensor and
            whatever follows it, which is not read.
        layer: name of one convolution, in full.

    Returns:
        Mean over space of relu(output) for every image and channel, shape (N, C), in float32 or wider, on the CPU.

    Raises:
        LayerError: if the model has no convolution of exactly that name.
        ModelError: if the model is no module, holds no convolution, is in training mode, or its output are no logits.
        InputError: if there are no batches at all, a data set or a tensor is given in their place, or a batch holds
            other than floating-point numbers.
        StatisticsError: if a batch holds no tensor, or the layer takes no part in the pass or sees other rows.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(4, 2)).eval()
        >>> model[0].weight.data = torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1)
        >>> collect_gaps(model, [torch.tensor([[[[1.0, 2.0]]], [[[-3.0, 0.0]]]])], "0")
        tensor([[1.5000, 0.0000],
                [0.0000, 1.5000]])
    """
    model = bare_model(model)
    check_evaluation_mode(model)
    convolution = _convolution_named(model, layer)
    if isinstance(batches, Tensor | Dataset) or not isinstance(batches, Iterable):
        raise InputError(
            f"batches is a {type(batches).__name__}, but GAPs are collected of batches of images; give a DataLoader, "
            "or a list of tensors."
        )
    weight = next(model.parameters())
    rows = []
    with _gaps_of({layer: convolution}) as gaps:
        for batch in _unwrapped(batches):
            inputs, _ = _parts_of(batch)
            if not inputs.is_floating_point():
                raise InputError(f"A batch holds {inputs.dtype}, but floating-point numbers are needed; preprocess it.")
            rows.append(_respond(model, inputs.to(weight), gaps)[0])
    if not rows:
        raise InputError("GAPs of no batch at all were asked for; give one at least.")
    return torch.cat(rows)


def _convolution_named(model: nn.Module, name: str) -> Convolution:
    convolutions = find_convolutions(model)
    if not isinstance(name, str) or name not in convolutions:
        near = difflib.get_close_matches(str(name), convolutions, cutoff=0.3) or list(convolutions)[-3:]
        raise LayerError(
            f"layer is {name!r}, but it must be the full name of one of the {len(convolutions)} convolutions; near "
            f"names: {', '.join(near)}."
        )
    return convolutions[name]


@torch.no_grad()
def _respond(model: nn.Module, inputs: Tensor, gaps: dict[str, list[Tensor]]) -> tuple[Tensor, Tensor]:
    """GAPs of all channels (B, C) and softmax probabilities (B, K) of one batch, on the CPU."""
    for calls in gaps.values():
        calls.clear()
    with UnmaskedFailures():
        logits = model(inputs)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"The output of {type(model).__name__} is {shape}, but statistics need logits of shape (B, K); "
            "wrap the model so that it returns them alone."
        )
    missing = next((name for name, calls in gaps.items() if not calls), None)
    if missing is not None:
        raise StatisticsError(f"Layer {missing!r} was not called by the model; leave it out of layers.")
    folded = next((name for name, calls in gaps.items() if any(len(call) != len(inputs) for call in calls)), None)
    if folded is not None:
        raise StatisticsError(
            f"Layer {folded!r} sees another number of rows than the {len(inputs)} images of the batch; leave it out of "
            "layers."
        )
    # All layers leave the device in one copy.
    values = torch.cat([torch.stack(calls).mean(0) for calls in gaps.values()], dim=1)
    # Weights of a row must add up to one as exactly as the moments are kept.
    return values.cpu(), logits.cpu().double().softmax(dim=1)


class _Saver:
    """The checkpoint of one process: where it stands, under which settings, how often it is written."""

    def __init__(self, path: Path | None, settings: Mapping[str, str], every: int) -> None:
        self._path, self._settings, self._every = path, settings, every

    def restored(self, batches: "_Batches", seed: int) -> tuple[Accumulator | None, int]:
        """What was gathered, and the number of batches that is."""
        tensors = None if self._path is None else read_checkpoint(self._path, self._settings)
        if tensors is None:
            return None, 0
        try:
            found, done = Accumulator.restored(tensors, seed=seed), int(tensors["batches"])
            # Some may have been left out.
            if found.images > (batches.images_of(done) or 0):
                raise ValueError(f"it says that {done} batches hold {found.images} images")
            return found, done
        except (KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise StatisticsError(
                f"The checkpoint {str(self._path)!r} is damaged ({reason_of(error)}); delete it to start anew."
            ) from error

    def save_at_times(self, accumulator: Accumulator, batches: int, *, is_last: bool) -> None:
        """Write what was gathered, where it is time to."""
        if is_last or batches % self._every == 0:
            self.save(accumulator, batches)

    def save(self, accumulator: Accumulator, batches: int) -> None:
        """Write what was gathered, where there is a checkpoint."""
        if self._path is not None:
            write_checkpoint(self._path, self._settings, {**accumulator.tensors(), "batches": torch.tensor(batches)})


class _Batches:
    """The batches of one process: every n-th of n processes, so that a batch is the same whoever takes it."""

    def __init__(self, data: Any, batch_size: int, workers: int, labels: Labels, processes: Processes) -> None:
        self._data, self._workers, self._labels = data, workers, labels
        self._batch_size = batch_size
        self._numbers: list[range] | None = None
        self.count: int | None = None
        self.images: int | None = None
        if _has_items(data):
            starts = range(0, len(data), batch_size)[processes.rank :: processes.count]
            self._numbers = [range(start, min(start + batch_size, len(data))) for start in starts]
            self.count, self.images = len(self._numbers), sum(len(numbers) for numbers in self._numbers)

    def images_of(self, done: int) -> int | None:
        """Number of images in the first `done` batches; None where there are not as many."""
        if self._numbers is None or not 0 <= done <= len(self._numbers):
            return None
        return sum(len(numbers) for numbers in self._numbers[:done])

    def after(self, done: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None] | None]:
        """Numbers, inputs and given labels of each batch but the first `done`; no labels where they are predicted.

        None stands for a batch of which all is left out.
        """
        batches: Iterable[Any] = self._data
        # A generator of its own: the loader would draw from the global one.
        generator = torch.Generator()
        if self._numbers is not None:
            left: Any = self._numbers[done:]
            batches = DataLoader(
                self._data, batch_sampler=left, num_workers=self._workers, generator=generator, collate_fn=_Kept.of
            )
        elif isinstance(self._data, IterableDataset):
            batches = DataLoader(self._data, self._batch_size, generator=generator, collate_fn=_Kept.of)
        first = 0
        for index, batch in enumerate(_unwrapped(batches)):
            kept = batch if isinstance(batch, _Kept) else _Kept.whole(batch)
            for reason in kept.reasons:
                warn(f"{reason}; it is left out.", StatisticsWarning)
            if self._numbers is not None:
                first = self._numbers[done + index].start
            numbers = first + torch.tensor(kept.places, dtype=torch.int64)
            first += len(kept.places) + len(kept.reasons)
            if not kept.places:
                yield None
                continue
            inputs, given = _parts_of(kept.batch)
            yield numbers, inputs, _classes(given, len(inputs)) if self._labels == "given" else None


class _Kept(NamedTuple):
    """What is had of a batch: the places in it, the items together, and why others are left out."""

    places: list[int]
    batch: Any
    reasons: list[str]

    @classmethod
    def of(cls, items: list[Any]) -> "_Kept":
        places = [place for place, item in enumerate(items) if not isinstance(item, LeftOut)]
        reasons = [item.reason for item in items if isinstance(item, LeftOut)]
        return cls(places, default_collate([items[place] for place in places]) if places else None, reasons)

    @classmethod
    def whole(cls, batch: Any) -> "_Kept":
        inputs, _ = _parts_of(batch)
        return cls(list(range(len(inputs))), batch, [])


def _parts_of(batch: Any) -> tuple[Tensor, Sequence[Any]]:
    """Inputs of a batch, and what follows them: the labels, or nothing."""
    inputs, given = (batch[0], batch[1:]) if isinstance(batch, list | tuple) and batch else (batch, ())
    if not isinstance(inputs, Tensor):
        raise StatisticsError(
            f"The data give inputs of type {type(inputs).__name__}, but they must be tensors; use a transform "
            "or a collate function that makes them."
        )
    return inputs, given


def _classes(given: Any, count: int) -> Tensor:
    """The labels of a batch as integers (B,)."""
    if not given:
        raise StatisticsError("The data hold no labels; give items (input, class), or use labels='predicted'.")
    try:
        labels = torch.as_tensor(given[0]).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise StatisticsError(
            f"The data give labels of type {type(given[0]).__name__}, but each must be one whole number, the index of "
            "the class."
        ) from error
    if tuple(labels.shape) != (count,) or labels.is_floating_point() or labels.is_complex():
        raise StatisticsError(
            f"The data give labels of shape {tuple(labels.shape)} and type {labels.dtype} for {count} inputs, but each "
            "must be one whole number, the index of the class."
        )
    return labels.long()


def _unwrapped(batches: Iterable[Any]) -> Iterator[Any]:
    """Batches as they come; an error of a loading process without the traceback that torch puts into its text."""
    try:
        yield from batches
    except ParchGradError as error:
        lines = str(error.args[0]).strip().splitlines()
        if len(lines) < 2:
            raise
        raise type(error)(lines[-1].split(": ", 1)[-1]) from error
    except (TypeError, RuntimeError) as error:
        if re.match(r"DataLoader worker .* (exited|killed)", str(error)):
            raise StatisticsError(
                f"A process that loads images has ended ({reason_of(error)}); start it again, with fewer workers if "
                "the memory was full."
            ) from error
        # What torch says when it cannot make a batch of the items.
        kind = re.search(r"collate: .* found <class '([\w.]+)'>", str(error))
        sizes = re.search(r"equal size, but got (\[.*?\]) at entry 0 and (\[.*?\]) at entry", str(error))
        if kind is not None:
            raise StatisticsError(
                f"The data give items of type {kind[1]}, but they must be tensors; use a transform or a collate "
                "function that makes them."
            ) from error
        if sizes is not None:
            raise StatisticsError(
                f"The data give inputs of shapes {sizes[1]} and {sizes[2]}; bring them to one size, or take "
                "batch_size=1."
            ) from error
        raise


def _check_settings(
    data: object,
    labels: str,
    batch_size: object,
    workers: object,
    checkpoint_every: object,
    seed: object,
    metadata: Mapping[str, str],
) -> None:
    """Raise `SettingError` if a setting is out of its range."""
    if labels not in get_args(Labels):
        raise SettingError(f"labels is {labels!r}, but it must be one of {', '.join(get_args(Labels))}.")
    for name, value, lowest in (
        ("batch_size", batch_size, 1),
        ("workers", workers, 0),
        ("checkpoint_every", checkpoint_every, 1),
        ("seed", seed, 0),
    ):
        check_whole_number(name, value, lowest)
    if not isinstance(data, Iterable) and not _has_items(data):
        raise SettingError(f"data is a {type(data).__name__}, but it must be a data set or batches of one.")
    if workers and not _has_items(data):
        raise SettingError(
            f"workers is {workers}, but every worker would go through all of a {type(data).__name__}; use workers=0, "
            "or give batches of a DataLoader of your own."
        )
    unfit = next((name for name, text in metadata.items() if not isinstance(text, str)), None)
    if unfit is not None:
        raise SettingError(f"metadata[{unfit!r}] is {metadata[unfit]!r}, but it must be text.")


def _has_items(data: object) -> bool:
    """Whether items can be fetched by index; lists of items are data sets too, as torch's own loader takes them."""
    return not isinstance(data, IterableDataset) and hasattr(data, "__getitem__") and hasattr(data, "__len__")


def _settings(
    model: nn.Module, data: Any, layers: list[str], labels: Labels, batch_size: int, seed: int, workers: int
) -> dict[str, str]:
    """All that the statistics depend on, in words: a run may go on only where none of it has changed."""
    device = next(model.parameters()).device.type
    autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "off"
    return {
        "model": type(model).__name__,
        "architecture": _digest(without_addresses(repr(model))),
        # Buffers that are not saved count too.
        "weights": _digest([model.state_dict(), dict(model.named_buffers())]),
        "data": _fingerprint(data, workers),
        "layers": ", ".join(layers),
        "labels": labels,
        "batch_size": str(batch_size),
        "seed": str(seed),
        "autocast": autocast,
    }


def _check_agreement(settings: Mapping[str, str], processes: Processes) -> None:
    """Raise `StatisticsError` unless all processes were called in the same way."""
    names = list(settings)
    mine = {name: torch.tensor(list(value.encode()), dtype=torch.uint8) for name, value in settings.items()}
    theirs = processes.broadcast(mine)
    first = {name: bytes(theirs[name].tolist()).decode() for name in names}
    differing = differences(first, settings)
    if differing:
        raise StatisticsError(
            f"Process {processes.rank + 1} was called otherwise than the first: {differing}; "
            "call all processes with the same model, data and settings."
        )


def _fingerprint(data: Any, workers: int) -> str:
    """What tells a data set from another: its own word, or its type, length, some of its items, and any tensors."""
    own = getattr(data, "fingerprint", None)
    if isinstance(own, str):
        return own
    count = min(_PROBES, len(data))
    probes = [index * (len(data) - 1) // max(1, count - 1) for index in range(count)]
    # Fetched as the items will be: what a data set opens in this process, its workers would share.
    items = DataLoader(
        data,
        batch_size=None,
        sampler=probes,
        num_workers=min(1, workers),
        collate_fn=_as_it_is,
        generator=torch.Generator(),
    )
    # All of the tensors, where they are at hand: a transform in between shows in the items.
    return f"{len(data)} items of {type(data).__name__}, {_digest([list(items), getattr(data, 'tensors', ())])}"


def _as_it_is(item: Any) -> Any:
    return item


def _digest(value: Any) -> str:
    """SHA-256 over nested containers of tensors, arrays and plain values."""
    digest = hashlib.sha256()

    def update(part: Any) -> None:
        if isinstance(part, Tensor):
            flat = part.detach().cpu().contiguous()
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(flat.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(part, np.ndarray):
            digest.update(f"{part.dtype} {part.shape}".encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        elif isinstance(part, Mapping):
            for name, inner in part.items():
                digest.update(str(name).encode())
                update(inner)
        elif isinstance(part, list | tuple):
            for inner in part:
                update(inner)
        else:
            digest.update(without_addresses(repr(part)).encode())

    update(value)
    return digest.hexdigest()


def _gap(output: Tensor) -> Tensor:
    """Mean over space of relu(output) of shape (B, C, *S), (B, C), in float32 or wider."""
    at_once = max(1, _ELEMENTS // max(1, output.shape[1:].numel())) if output.device.type == "cpu" else len(output)
    positions, wide = tuple(range(2, output.dim())), torch.promote_types(output.dtype, torch.float32)
    return torch.cat([part.relu().mean(dim=positions, dtype=wide) for part in torch.split(output, at_once)])


@contextmanager
def _gaps_of(convolutions: Mapping[str, Convolution]) -> Iterator[dict[str, list[Tensor]]]:
    """Hooks that note the GAP of each convolution, for forward passes of this thread or task."""
    gaps: dict[str, list[Tensor]] = {name: [] for name in convolutions}

    def hook_for(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if _GAPS.get() is gaps:
                gaps[name].append(_gap(output))

        return hook

    token = _GAPS.set(gaps)
    handles = []
    try:
        for name, convolution in convolutions.items():
            handles.append(convolution.register_forward_hook(TransientHook(hook_for(name))))
        yield gaps
    finally:
        for handle in handles:
            handle.remove()
        _GAPS.reset(token)
