"""Collect the GAP of every channel in one pass over a data set."""

import difflib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from fractions import Fraction
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from parchgrad._io.checks import check_whole_number
from parchgrad._io.digests import digest
from parchgrad._io.files import locked, without_addresses
from parchgrad.core.engine import choose_layers
from parchgrad.core.hooks import TransientHook
from parchgrad.core.layers import (
    Convolution,
    LayerChoice,
    bare_model,
    check_evaluation_mode,
    find_convolutions,
    resolve_layers,
)
from parchgrad.core.targets import find_logits
from parchgrad.errors import (
    InputError,
    LayerError,
    ModelError,
    ParchGradError,
    SettingError,
    StatisticsError,
    StatisticsWarning,
    reason_of,
)
from parchgrad.statistics.accumulate import COLLECTIONS, Accumulator, Progress
from parchgrad.statistics.batches import Batches, Labels, has_items, parts_of, started, unwrapped
from parchgrad.statistics.checkpoint import check_parts, differences, part_of_process, read_checkpoint, write_checkpoint
from parchgrad.statistics.processes import Processes, joined_processes
from parchgrad.statistics.store import ChannelStatistics, weight_digest

__all__ = ["collect_gaps", "collect_statistics"]

# Output elements rectified at once on the CPU, so that they stay in the cache until summed.
_ELEMENTS = 1 << 21
# Items hashed to identify a data set.
_PROBES = 64
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

    The GAP is the mean over space of relu(output), averaged over the calls if a convolution runs several times per
    pass. Batches are moved to the model's device; a surrounding autocast block is respected.

    Under torchrun, or in an initialised process group, every process must make the same call: each processes its
    share of the batches, and all return the full result. With a checkpoint, a run stopped at any moment resumes when
    started again, with the same result as an uninterrupted one. Both need a data set that returns the same item for
    the same index every time, so no random augmentation.

    Args:
        model: a classifier that returns logits (B, K), in evaluation mode.
        data: a data set, or batches such as a `DataLoader` yields. An item is an input and its class, or the input
            alone with predicted labels; `LeftOut` items are left out with a warning. A text attribute `fingerprint`
            of a data set identifies its content; without one, its type, length and 64 items do.
        layers: which convolutions; see `choose_layers`. For a ratio and `"all"`, the model is called once with the
            first image.
        labels: `"given"` uses the labels in the data; `"predicted"` counts every image in every class, weighted by
            the model's softmax probability, so that unlabelled images suffice.
        batch_size: images per pass, if `data` is a data set.
        workers: processes that load images, if `data` is a data set; 0 loads in this process.
        seed: seed of the sample of at most 5,000 images for the Shapiro-Wilk test.
        checkpoint: file to resume from and write to; it is kept at the end, until you have saved the result.
        checkpoint_every: batches between two checkpoints.
        metadata: texts to store besides the labels, the seed and the number of images seen and left out; by
            convention `model`, `preprocessing` and `data`.
        on_progress: called with the stage (`"images"`, then `"normality"`), the number done, and the total if known.

    Returns:
        Statistics of every chosen layer over K classes.

    Raises:
        SettingError: if a setting is out of range, or batches are given where a data set is needed.
        StatisticsError: if there are no images, labels are missing or out of range, a layer is not called, the
            checkpoint belongs to another model, data or settings, or another process is lost.
        ModelError: if the model has no convolution, is in training mode, or does not return logits.
        OutputError: if the checkpoint cannot be written, or another run is writing it.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
        >>> images = [(torch.rand(3, 8, 8), index % 2) for index in range(10)]
        >>> statistics = collect_statistics(model, images, batch_size=4)
        >>> statistics["0"].class_count
        tensor([5., 5.], dtype=torch.float64)
    """
    # Join first: a process that fails a check must not leave the others waiting for it to join.
    with joined_processes() as processes:
        model = bare_model(model)
        check_evaluation_mode(model)
        _check_settings(data, labels, batch_size, workers, checkpoint_every, seed, metadata or {})
        asked = resolve_layers(model, layers)
        linear = sorted(asked - find_convolutions(model).keys()) if isinstance(asked, frozenset) else []
        if linear:
            raise LayerError(
                f"`layers` contains the linear layer {linear[0]!r}, but statistics are of convolutions. Leave it out, "
                "and edit linear layers by a selector without statistics, such as Evidence."
            )
        path, settings, identity = None, {}, None
        if has_items(data):
            ratio = "all" if asked == 1 else str(asked)
            named = sorted(asked) if isinstance(asked, frozenset) else [ratio]
            settings = _settings(model, data, named, labels, batch_size, seed, workers)
            identity = settings["data"]
            _check_agreement(settings, processes)
        elif checkpoint is not None or processes.count > 1:
            raise SettingError(
                f"`data` is a {type(data).__name__}, but checkpoints and several processes need a data set with items "
                "by index. Pass the data set itself, such as `loader.dataset`."
            )
        if checkpoint is not None:
            check_parts(Path(checkpoint), processes.count)
            path = part_of_process(Path(checkpoint), processes.rank, processes.count)
        batches = Batches(data, batch_size, workers, labels, processes)
        # Of several processes, the first may have no image of its own.
        everything = batches if processes.count == 1 else Batches(data, batch_size, workers, labels, Processes())
        chosen = _choose(model, layers, asked, everything, processes)
        # Two runs that resume from one checkpoint would overwrite each other.
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
                raise StatisticsError(f"The data contain {images} images, but statistics need at least two.")
            tensors = {**found.tensors(), "shapiro_p": found.shapiro_p(on_progress)}
        tensors = processes.broadcast(tensors)
    # Lets merging detect duplicate images.
    origin = {COLLECTIONS: digest(tensors["rows"] if identity is None else identity)[:16]}
    left_out = 0 if identity is None else len(cast(Any, data)) - int(tensors["images"])
    if left_out:
        origin["left_out"] = str(left_out)
    return Accumulator.restored(tensors, seed=seed).statistics(
        {name: module.out_channels for name, module in chosen.items()},
        tensors["shapiro_p"],
        {"model": type(model).__name__, **(metadata or {}), "labels": labels, "seed": str(seed), **origin},
        {name: weight_digest(module) for name, module in chosen.items()},
    )


def _choose(
    model: nn.Module,
    layers: LayerChoice,
    asked: frozenset[str] | Fraction,
    batches: "Batches",
    processes: Processes,
) -> dict[str, Convolution]:
    """Choose the layers; a ratio and "all" choose by the graph of a pass with the first image."""
    if isinstance(asked, Fraction):
        found: Mapping[str, Tensor] = {}
        if processes.rank == 0:
            with warnings.catch_warnings():
                if processes.count > 1:
                    # Said again when the image's turn comes.
                    warnings.simplefilter("ignore", StatisticsWarning)
                inputs = batches.peek()
            if inputs is None:
                raise StatisticsError("The data contain 0 images, but statistics need at least two.")
            one = inputs[:1].to(next(model.parameters()).device)
            try:
                with _explaining_dtype(inputs):
                    # Selectors differ in whether they balance, which changes what lies on the path.
                    names: Iterable[str] = [
                        name
                        for balance in (True, False)
                        for name in choose_layers(model, layers, inputs=one, balance=balance)
                    ]
            except InputError:
                # Without gradients, "all" means every convolution.
                if asked < 1:
                    raise
                names = find_convolutions(model)
            found = dict.fromkeys(names, torch.zeros(0, device="cpu"))
        asked = frozenset(processes.broadcast(found))
        if not asked:
            raise LayerError(
                "No convolution lies between the model's input and its output. Name the layers to collect."
            )
    return {name: module for name, module in find_convolutions(model).items() if name in asked}


def _collect(
    model: nn.Module,
    chosen: Mapping[str, Convolution],
    batches: "Batches",
    seed: int,
    saver: "_Saver",
    on_progress: Progress | None,
) -> Accumulator | None:
    """Accumulate this process's batches, resuming from its checkpoint; None if it has no batch."""
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
                        # Images left out count as done.
                        on_progress("images", batches.images_of(done) or accumulator.images, batches.images)
        except (KeyboardInterrupt, ParchGradError):
            # A batch that was only partly added must not be saved.
            if is_whole and accumulator is not None:
                saver.save(accumulator, done)
            raise
    return accumulator


def collect_gaps(model: nn.Module, batches: Iterable[Any], layer: str) -> Tensor:
    """Collect the GAPs of one layer for inspection; statistics keep only their moments.

    Batches are moved to the model's device and dtype.

    Args:
        model: a classifier that returns logits (B, K), in evaluation mode.
        batches: such as a `DataLoader` yields: tensors of preprocessed images (B, C, *S), or tuples that start with
            one.
        layer: full name of one convolution.

    Returns:
        Mean over space of relu(output) for every image and channel, shape (N, C), in float32 or wider, on the CPU.

    Raises:
        LayerError: if the model has no convolution of exactly that name.
        ModelError: if the model is not a module, has no convolution, is in training mode, or does not return logits.
        InputError: if there are no batches, a data set or a tensor is given instead, or a batch is not floating-point.
        StatisticsError: if a batch has no tensor, or the layer is not called or sees another number of rows.

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
            f"`batches` is a {type(batches).__name__}, not batches of images. Pass a DataLoader or a list of tensors."
        )
    weight = next(model.parameters())
    rows = []
    with _gaps_of({layer: convolution}) as gaps:
        for batch in unwrapped(batches):
            inputs, _ = parts_of(batch)
            if not inputs.is_floating_point():
                raise InputError(f"A batch has dtype {inputs.dtype}, but must be floating-point. Preprocess it.")
            rows.append(_respond(model, inputs.to(weight), gaps)[0])
    if not rows:
        raise InputError("`batches` is empty. Pass at least one batch.")
    return torch.cat(rows)


def _convolution_named(model: nn.Module, name: str) -> Convolution:
    convolutions = find_convolutions(model)
    if not isinstance(name, str) or name not in convolutions:
        near = difflib.get_close_matches(str(name), convolutions, cutoff=0.3) or list(convolutions)[-3:]
        raise LayerError(
            f"`layer` is {name!r}, but it must be the full name of one of the {len(convolutions)} convolutions. Close "
            f"matches: {', '.join(near)}."
        )
    return convolutions[name]


@torch.no_grad()
def _respond(model: nn.Module, inputs: Tensor, gaps: dict[str, list[Tensor]]) -> tuple[Tensor, Tensor]:
    """Return GAPs of all channels (B, C) and softmax probabilities (B, K) of one batch, on the CPU."""
    for calls in gaps.values():
        calls.clear()
    with _explaining_dtype(inputs):
        logits = find_logits(model(inputs))
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"The output of {type(model).__name__} is {shape}, but statistics need logits of shape (B, K). "
            "Wrap the model so that it returns only the logits."
        )
    missing = next((name for name, calls in gaps.items() if not calls), None)
    if missing is not None:
        raise StatisticsError(f"The model did not call layer {missing!r}. Leave it out of `layers`.")
    folded = next((name for name, calls in gaps.items() if any(len(call) != len(inputs) for call in calls)), None)
    if folded is not None:
        raise StatisticsError(
            f"The number of rows in layer {folded!r} differs from the {len(inputs)} images of the batch. Leave it out "
            "of `layers`."
        )
    # One copy from the device for all layers.
    values = torch.cat([torch.stack(calls).mean(0) for calls in gaps.values()], dim=1)
    # In float64, since a row's weights must sum to one with the precision of the moments.
    return values.cpu(), logits.cpu().double().softmax(dim=1)


@contextmanager
def _explaining_dtype(inputs: Tensor) -> Iterator[None]:
    """Convert the error of a model that rejects images of integers."""
    try:
        yield
    except RuntimeError as error:
        if inputs.is_floating_point():
            raise
        raise InputError(
            f"The model rejects images of dtype {inputs.dtype} ({reason_of(error)}). Convert them to floating point "
            "as in training, for example with torchvision's ToTensor."
        ) from error


class _Saver:
    """Read and write the checkpoint of one process."""

    def __init__(self, path: Path | None, settings: Mapping[str, str], every: int) -> None:
        self._path, self._settings, self._every = path, settings, every

    def restored(self, batches: "Batches", seed: int) -> tuple[Accumulator | None, int]:
        """Return the checkpointed accumulator and the number of batches in it."""
        tensors = None if self._path is None else read_checkpoint(self._path, self._settings)
        if tensors is None:
            return None, 0
        try:
            found, done = Accumulator.restored(tensors, seed=seed), int(tensors["batches"])
            # There may be fewer, since items can be left out.
            if found.images > (batches.images_of(done) or 0):
                raise ValueError(f"it claims {found.images} images in {done} batches")
            return found, done
        except (KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise StatisticsError(
                f"The checkpoint {str(self._path)!r} is damaged ({reason_of(error)}). Delete it to start over."
            ) from error

    def save_at_times(self, accumulator: Accumulator, batches: int, *, is_last: bool) -> None:
        """Write a checkpoint after every `every` batches, and after the last."""
        if is_last or batches % self._every == 0:
            self.save(accumulator, batches)

    def save(self, accumulator: Accumulator, batches: int) -> None:
        """Write a checkpoint, if one is configured."""
        if self._path is not None:
            done = torch.tensor(batches, device="cpu")
            write_checkpoint(self._path, self._settings, {**accumulator.tensors(), "batches": done})


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
        raise SettingError(f"`labels` is {labels!r}, but it must be one of {', '.join(get_args(Labels))}.")
    for name, value, lowest in (
        ("batch_size", batch_size, 1),
        ("workers", workers, 0),
        ("checkpoint_every", checkpoint_every, 1),
        ("seed", seed, 0),
    ):
        check_whole_number(name, value, lowest)
    if not isinstance(data, Iterable) and not has_items(data):
        raise SettingError(f"`data` is a {type(data).__name__}, but it must be a data set or batches of one.")
    if workers and not has_items(data):
        raise SettingError(
            f"`workers` is {workers}, but every worker would iterate over the whole {type(data).__name__}. Use "
            "`workers=0`, or pass your own DataLoader."
        )
    unfit = next((name for name, text in metadata.items() if not isinstance(text, str)), None)
    if unfit is not None:
        raise SettingError(f"`metadata[{unfit!r}]` is {metadata[unfit]!r}, but it must be a string.")


def _settings(
    model: nn.Module, data: Any, layers: list[str], labels: Labels, batch_size: int, seed: int, workers: int
) -> dict[str, str]:
    """Describe everything the statistics depend on; a run resumes only if it is unchanged."""
    device = next(model.parameters()).device.type
    autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "off"
    return {
        "model": type(model).__name__,
        "architecture": digest(without_addresses(repr(model))),
        # Includes non-persistent buffers.
        "weights": digest([model.state_dict(), dict(model.named_buffers())]),
        "data": _fingerprint(data, workers),
        "layers": ", ".join(layers),
        "labels": labels,
        "batch_size": str(batch_size),
        "seed": str(seed),
        "autocast": autocast,
    }


def _check_agreement(settings: Mapping[str, str], processes: Processes) -> None:
    """Raise `StatisticsError` unless all processes made the same call."""
    names = list(settings)
    mine = {
        name: torch.tensor(list(value.encode()), dtype=torch.uint8, device="cpu") for name, value in settings.items()
    }
    theirs = processes.broadcast(mine)
    first = {name: bytes(theirs[name].tolist()).decode() for name in names}
    differing = differences(first, settings)
    if differing:
        raise StatisticsError(
            f"The call of process {processes.rank + 1} differs from the first's: {differing}. "
            "Use the same model, data and settings in all processes."
        )


def _fingerprint(data: Any, workers: int) -> str:
    """Identify a data set by its `fingerprint`, or else by its type, length, some items, and any tensors."""
    own = getattr(data, "fingerprint", None)
    if isinstance(own, str):
        return own
    count = min(_PROBES, len(data))
    probes = [index * (len(data) - 1) // max(1, count - 1) for index in range(count)]
    # Fetched by a worker if the items will be: workers would share files that the data set opens here.
    items = DataLoader(
        data,
        batch_size=None,
        sampler=probes,
        num_workers=min(1, workers),
        collate_fn=_as_it_is,
        generator=torch.Generator(),
    )
    # A TensorDataset is hashed whole; the items also reveal a transform.
    return f"{len(data)} items of {type(data).__name__}, {digest([list(started(items)), getattr(data, 'tensors', ())])}"


def _as_it_is(item: Any) -> Any:
    return item


def _gap(output: Tensor) -> Tensor:
    """Mean over space of relu(output): (B, C, *S) to (B, C), in float32 or wider."""
    at_once = max(1, _ELEMENTS // max(1, output.shape[1:].numel())) if output.device.type == "cpu" else len(output)
    positions, wide = tuple(range(2, output.dim())), torch.promote_types(output.dtype, torch.float32)
    return torch.cat([part.relu().mean(dim=positions, dtype=wide) for part in torch.split(output, at_once)])


@contextmanager
def _gaps_of(convolutions: Mapping[str, Convolution]) -> Iterator[dict[str, list[Tensor]]]:
    """Record the GAP of each convolution during forward passes of this thread or task."""
    gaps: dict[str, list[Tensor]] = {name: [] for name in convolutions}

    def hook_for(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if _GAPS.get() is gaps:
                if not isinstance(output, Tensor):
                    raise ModelError(
                        f"Layer {name!r} returns a {type(output).__name__} instead of a tensor. Leave it out of "
                        "`layers`."
                    )
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
