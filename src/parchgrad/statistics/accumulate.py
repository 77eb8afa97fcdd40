"""What a collection gathers: moments of every channel, overall and per class, and a sample of rows."""

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from parchgrad.checks import check_kind
from parchgrad.errors import StatisticsError
from parchgrad.statistics.layer import LayerStatistics
from parchgrad.statistics.moments import Moments, merge, moments_of_labels, moments_of_weights
from parchgrad.statistics.store import ChannelStatistics, RowSample

__all__ = ["COLLECTIONS", "Accumulator", "Progress", "Stage", "merge_statistics"]

Stage = Literal["images", "normality"]
Progress: TypeAlias = Callable[[Stage, int, int | None], None]

COLLECTIONS = "collections"
"""Name of the metadata that tell the data sets: their digests, separated by spaces."""

# Shapiro-Wilk's approximation is not valid for more samples.
_SAMPLE = 5000
# Rows gathered before the moments are updated: an update passes over the classes of all channels.
_ROWS_PER_UPDATE = 1024
# Channels updated at once: temporary arrays stay small whatever the network.
_BLOCK = 1024
# Columns that one process tests at a time, and values from which on processes pay.
_COLUMNS = 64
_WORTH_PROCESSES = 4_000_000


class Accumulator:
    """Moments of C channels, overall and in each of K classes, and the rows of the images with the smallest keys.

    Rows wait until there are enough for an update. The key of an image follows from the seed and its number alone, so
    the sample depends neither on the order of images nor on who saw them.

    Attributes:
        images: number of images added.
    """

    def __init__(self, channels: int, classes: int, *, seed: int) -> None:
        """Start empty; the seed is of the keys."""
        self.images = 0
        self._seed = seed
        self._of_classes = _no_moments(classes, channels)
        self._of_all = _no_moments(1, channels)
        self._keys = torch.empty(0, dtype=torch.int64)
        self._rows = torch.empty(0, channels)
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._rows_waiting = 0

    def add(self, numbers: Tensor, values: Tensor, weights: Tensor) -> None:
        """Add a batch.

        Args:
            numbers: number of each image in the data, shape (B,), integer.
            values: GAP of each channel, shape (B, C).
            weights: class of each image, shape (B,), integer; or its weight in each class, shape (B, K).

        Raises:
            StatisticsError: if a value is not finite, or a class is out of range.
        """
        classes = self._of_classes.weight.numel()
        if weights.dim() not in (1, 2) or weights.shape != (len(values), classes)[: weights.dim()]:
            raise StatisticsError(
                f"The labels have shape {tuple(weights.shape)}, but there are {len(values)} images, {classes} "
                "classes; give one label for each image."
            )
        if weights.dim() == 1 and (int(weights.min()) < 0 or int(weights.max()) >= classes):
            raise StatisticsError(
                f"The data name classes {int(weights.min())} to {int(weights.max())}, but the model has {classes}; "
                "use data whose classes are the model's, or labels='predicted'."
            )
        # One sum tells for all: it is finite only where every part is.
        if not (torch.isfinite(values.sum()) and torch.isfinite(weights.sum())):
            raise StatisticsError(
                f"The model's response to one of the images {int(numbers[0])} to {int(numbers[-1])} is not finite; "
                "look for inputs that are not finite, or collect in a wider dtype."
            )
        self._sample(_keys(self._seed, numbers), values)
        self._waiting.append((values, weights))
        self._rows_waiting += len(values)
        self.images += len(values)
        if self._rows_waiting >= _ROWS_PER_UPDATE:
            self._update()

    def _sample(self, keys: Tensor, values: Tensor) -> None:
        """Keep the rows of the smallest keys, in place once the sample is full."""
        room = _SAMPLE - len(self._keys)
        if room > 0:
            self._keys = torch.cat((self._keys, keys[:room]))
            self._rows = torch.cat((self._rows.to(values.dtype), values[:room]))
            keys, values = keys[room:], values[room:]
        if len(keys) == 0 or keys.min() >= self._keys.max():
            return
        together = torch.cat((self._keys, keys))
        kept = torch.zeros(len(together), dtype=torch.bool)
        kept[together.argsort(stable=True)[:_SAMPLE]] = True
        leaving, incoming = (~kept[:_SAMPLE]).nonzero().flatten(), kept[_SAMPLE:].nonzero().flatten()
        self._keys[leaving], self._rows[leaving] = keys[incoming], values[incoming]

    def _update(self) -> None:
        """Merge the waiting rows into the moments."""
        if not self._waiting:
            return
        values, weights = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._rows_waiting = [], 0
        everyone = torch.ones(len(values), 1)
        _merge_into(self._of_all, slice(None), lambda columns: moments_of_weights(values[:, columns], everyone))
        if weights.dim() == 2:
            _merge_into(self._of_classes, slice(None), lambda columns: moments_of_weights(values[:, columns], weights))
        else:
            # Data sorted by class bring few classes at a time: only theirs are touched.
            present, labels = torch.unique(weights, return_inverse=True)
            _merge_into(
                self._of_classes,
                present,
                lambda columns: moments_of_labels(values[:, columns], labels, len(present)),
            )

    def merge(self, other: "Accumulator") -> None:
        """Add all that another accumulator of the same channels and classes holds."""
        for accumulator in (self, other):
            accumulator._update()
        for mine, theirs in ((self._of_all, other._of_all), (self._of_classes, other._of_classes)):
            _merge_into(mine, slice(None), partial(_columns, theirs))
        self._sample(other._keys, other._rows)
        self.images += other.images

    def tensors(self) -> dict[str, Tensor]:
        """All that is held, by name; `restored` takes it."""
        self._update()
        return {
            "images": torch.tensor(self.images),
            "keys": self._keys,
            "rows": self._rows,
            **{f"all/{name}": value for name, value in vars(self._of_all).items()},
            **{f"class/{name}": value for name, value in vars(self._of_classes).items()},
        }

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], *, seed: int) -> "Accumulator":
        """Go on from what `tensors` gave.

        Raises:
            KeyError: if a part is missing.
            ValueError: if the parts do not fit each other, or hold what no moments are.
        """
        classes, channels = tensors["class/mean"].shape
        if not classes or not channels:
            raise ValueError("it is of no channels or no classes")
        accumulator = cls(channels, classes, seed=seed)
        images, keys, rows = int(tensors["images"]), tensors["keys"], tensors["rows"]
        sampled = min(images, _SAMPLE)
        if keys.dtype != torch.int64 or keys.shape != (sampled,) or rows.shape != (sampled, channels):
            raise ValueError(f"its sample is not of {images} images")
        accumulator.images, accumulator._keys, accumulator._rows = images, keys, rows
        parts = {"rows": rows}
        for moments, prefix in ((accumulator._of_all, "all"), (accumulator._of_classes, "class")):
            for name, value in vars(moments).items():
                parts[f"{prefix}/{name}"] = found = tensors[f"{prefix}/{name}"]
                # Copying would stretch one number over all channels.
                if found.shape != value.shape or (name != "mean" and bool((found < 0).any())):
                    raise ValueError(f"{prefix}/{name} has another shape, or is negative")
                value.copy_(found)
        for name, found in parts.items():
            if not found.is_floating_point() or not torch.isfinite(found).all():
                raise ValueError(f"{name} holds what is no finite number")
        return accumulator

    def shapiro_p(self, on_progress: Progress | None = None) -> Tensor:
        """Shapiro-Wilk p-value of every channel over the sampled rows, shape (C,); 1 where the test is not defined."""
        rows = self._rows[self._keys.argsort(stable=True)]
        return torch.from_numpy(shapiro_p_values(rows.numpy(), on_progress))

    def statistics(
        self,
        channels: Mapping[str, int],
        shapiro_p: Tensor,
        metadata: Mapping[str, str],
        weight_digests: Mapping[str, str],
    ) -> ChannelStatistics:
        """Statistics of all that was added.

        Args:
            channels: number of channels of each layer, in the order of the columns.
            shapiro_p: what `shapiro_p` gave, shape (C,).
            metadata: see `ChannelStatistics`; the number of images is added.
            weight_digests: see `ChannelStatistics`.
        """
        self._update()
        order = self._keys.argsort(stable=True)
        rows = self._rows[order]
        layers, sampled, start = {}, {}, 0
        for name, count in channels.items():
            columns = slice(start, start + count)
            overall, by_class = _columns(self._of_all, columns), _columns(self._of_classes, columns)
            layers[name] = LayerStatistics(
                count=overall.weight[0],
                mean=overall.mean[0],
                std=overall.variance[0].sqrt(),
                class_count=by_class.weight,
                class_square=by_class.square,
                class_mean=by_class.mean.T,
                class_variance=by_class.variance.T,
                shapiro_p=shapiro_p[columns],
            )
            sampled[name] = rows[:, columns]
            start += count
        sample = RowSample(keys=self._keys[order], rows=sampled)
        return ChannelStatistics(
            layers, {**metadata, "images": str(self.images)}, weight_digests=weight_digests, sample=sample
        )

    @classmethod
    def of_statistics(cls, statistics: ChannelStatistics) -> "Accumulator":
        """Turn statistics back into what they were computed from."""
        sample = statistics.sample
        layers = [layer for layer in statistics.values() if isinstance(layer, LayerStatistics)]
        if sample is None or len(layers) < len(statistics):
            raise StatisticsError(
                "Statistics that were restricted or made compact lack what merging needs; merge the files that "
                "collecting wrote, and restrict the result."
            )
        channels = sum(layer.channels for layer in layers)
        accumulator = cls(channels, layers[0].classes, seed=0)
        of_classes = accumulator._of_classes
        of_classes.weight.copy_(layers[0].class_count)
        of_classes.square.copy_(layers[0].class_square)
        of_classes.mean.copy_(torch.cat([layer.class_mean for layer in layers]).T)
        freedom = torch.where(
            of_classes.effective_count > 1, of_classes.weight - of_classes.square / of_classes.weight, 0
        )
        variance = torch.cat([layer.class_variance for layer in layers]).T
        of_classes.m2.copy_(variance.nan_to_num(0) * freedom.unsqueeze(1))
        of_all = accumulator._of_all
        of_all.weight.fill_(layers[0].count.item())
        of_all.square.copy_(of_all.weight)
        of_all.mean.copy_(torch.cat([layer.mean for layer in layers]))
        of_all.m2.copy_(torch.cat([layer.std for layer in layers]).square() * (layers[0].count - 1))
        accumulator.images = int(layers[0].count)
        accumulator._keys = sample.keys.clone()
        accumulator._rows = torch.cat([sample.rows[name] for name in statistics], dim=1)
        return accumulator


def merge_statistics(parts: Iterable[ChannelStatistics], *, on_progress: Progress | None = None) -> ChannelStatistics:
    """Merge statistics of disjoint image sets, as if all images had been collected together.

    The same data set is recognised if it comes twice; images that stand in two different ones cannot be. The sample for
    the normality test is that of one run up to 5,000 images, and another of the same kind beyond.

    Args:
        parts: what `collect_statistics` gave for each set, over the same layers of the same model.
        on_progress: called with the stage `"normality"`, channels tested, channels in all.

    Raises:
        StatisticsError: if there are none, they differ in model, layers, classes, labels or preprocessing, hold the
            same images, or were restricted.

    Example:
        >>> import parchgrad as pg
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 2)).eval()
        >>> images = [(torch.rand(3, 8, 8), index % 2) for index in range(12)]
        >>> parts = [pg.collect_statistics(model, part) for part in (images[:4], images[4:])]
        >>> merge_statistics(parts)["0"].class_count
        tensor([6., 6.], dtype=torch.float64)
    """
    parts = list(parts)
    if not parts:
        raise StatisticsError("There are no statistics to merge; give at least one part.")
    for part in parts:
        remedy = "read files with ChannelStatistics.load(path), and give them in a list"
        check_kind("A part", part, ChannelStatistics, remedy, error=StatisticsError)
    first = parts[0]
    for number, part in enumerate(parts[1:], start=2):
        _check_mergeable(first, part, number)
    seen: dict[str, int] = {}
    for number, part in enumerate(parts, start=1):
        earlier = next((other for other, held in enumerate(parts[: number - 1], start=1) if _overlap(held, part)), None)
        if earlier is not None:
            raise StatisticsError(
                f"Parts {earlier} and {number} hold the same images; give every part once, each of its own images."
            )
        for collection in part.metadata.get(COLLECTIONS, "").split():
            if collection in seen:
                raise StatisticsError(
                    f"Parts {seen[collection]} and {number} hold the same images; give every part once, each of its "
                    "own images."
                )
            seen[collection] = number
    merged = Accumulator.of_statistics(first)
    for part in parts[1:]:
        merged.merge(Accumulator.of_statistics(part))
    metadata = {}
    for name in dict.fromkeys(name for part in parts for name in part.metadata):
        texts = dict.fromkeys(part.metadata[name] for part in parts if name in part.metadata)
        metadata[name] = (" " if name == COLLECTIONS else " + ").join(texts)
    channels = {name: layer.channels for name, layer in first.items()}
    return merged.statistics(channels, merged.shapiro_p(on_progress), metadata, first.weight_digests)


def _overlap(first: ChannelStatistics, second: ChannelStatistics) -> bool:
    """Whether the samples share keys, and have the same rows under all of them: then they are of the same images."""
    if first.sample is None or second.sample is None:
        return False
    _, mine, theirs = np.intersect1d(first.sample.keys.numpy(), second.sample.keys.numpy(), return_indices=True)
    # Passes of other sizes round otherwise.
    return len(mine) > 0 and all(
        torch.allclose(rows[mine], second.sample.rows[name][theirs].to(rows.dtype), rtol=1e-4)
        for name, rows in first.sample.rows.items()
    )


def _check_mergeable(first: ChannelStatistics, part: ChannelStatistics, number: int) -> None:
    """Raise `StatisticsError` unless both come from the same layers of one model, in the same way."""
    if list(first) != list(part):
        differing = next(iter(set(first) ^ set(part)), "order")
        raise StatisticsError(
            f"Part {number} holds other layers than the first ({differing!r}); collect both with the same layers."
        )
    for name, layer in part.items():
        if (layer.channels, layer.classes) != (first[name].channels, first[name].classes):
            raise StatisticsError(
                f"Layer {name!r} has {layer.channels} channels and {layer.classes} classes in part {number}, "
                f"{first[name].channels} and {first[name].classes} in the first; they are of different models."
            )
        if part.weight_digests.get(name) != first.weight_digests.get(name):
            raise StatisticsError(
                f"Layer {name!r} has other weights in part {number} than in the first; "
                "merge statistics of one model only."
            )
    for field in ("labels", "preprocessing"):
        if part.metadata.get(field) != first.metadata.get(field):
            raise StatisticsError(
                f"Part {number} was collected with {field} {part.metadata.get(field)!r}, the first with "
                f"{first.metadata.get(field)!r}; collect both in the same way."
            )


def shapiro_p_values(samples: NDArray[Any], on_progress: Progress | None = None) -> NDArray[np.float64]:
    """Shapiro-Wilk p-value of each column (N, C); 1, hence normal, where the test is not defined.

    Blocks of columns go to processes, since scipy's test holds the interpreter's lock; where they are few, processes
    cannot be forked or one is lost, this one does it all.
    """
    channels = samples.shape[1]
    blocks = [slice(start, start + _COLUMNS) for start in range(0, channels, _COLUMNS)]
    p = np.empty(channels)

    def fill(tested: Iterable[NDArray[np.float64]], left: list[slice]) -> None:
        for block, values in zip(left, tested, strict=True):
            p[block] = values
            done.append(block)
            if on_progress is not None:
                on_progress("normality", min(block.stop, channels), channels)

    done: list[slice] = []
    # A daemonic process, such as a worker of a pool, may have no children.
    can_fork = sys.platform == "linux" and not multiprocessing.current_process().daemon
    if samples.size >= _WORTH_PROCESSES and can_fork:
        processes = len(os.sched_getaffinity(0))
        try:
            with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
                fill(_in_order(pool, (samples[:, block] for block in blocks), ahead=2 * processes), blocks)
        except (BrokenProcessPool, OSError):
            # What is left is tested below: a lost process must not cost the collection.
            pass
    left = blocks[len(done) :]
    fill((_shapiro_of_block(samples[:, block]) for block in left), left)
    return p


def _in_order(pool: ProcessPoolExecutor, work: Iterable[NDArray[Any]], ahead: int) -> Iterator[NDArray[np.float64]]:
    """Results in the order of the blocks, of which only a few are copied ahead."""
    waiting: deque[Future[NDArray[np.float64]]] = deque()
    for block in work:
        waiting.append(pool.submit(_shapiro_of_block, np.ascontiguousarray(block)))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _shapiro_of_block(samples: NDArray[Any]) -> NDArray[np.float64]:
    columns = samples.astype(np.float64).T
    defined = [len(column) >= 3 and np.ptp(column) > 0 for column in columns]
    return np.array([stats.shapiro(c).pvalue if fit else 1.0 for c, fit in zip(columns, defined, strict=True)])


def _keys(seed: int, numbers: Tensor) -> Tensor:
    """A random key per image, from its number alone: the images of the smallest keys are a sample of any stream.

    Splitmix64 (Steele, Lea, Flood 2014), without the last bit so that keys sort as signed integers.
    """
    state = (numbers.numpy().astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    state += np.uint64(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((state ^ (state >> np.uint64(31))) >> np.uint64(1)).astype(np.int64))


def _no_moments(groups: int, channels: int) -> Moments:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)

    return Moments(weight=zeros(groups), square=zeros(groups), mean=zeros(groups, channels), m2=zeros(groups, channels))


def _columns(moments: Moments, columns: slice) -> Moments:
    return Moments(
        weight=moments.weight, square=moments.square, mean=moments.mean[:, columns], m2=moments.m2[:, columns]
    )


def _merge_into(total: Moments, groups: Tensor | slice, part_of: Callable[[slice], Moments]) -> None:
    """Merge the moments of some groups into the total, in place, a block of columns at a time."""
    weight, square = total.weight[groups], total.square[groups]
    merged = None
    for columns in _blocks(total.mean.shape[1]):
        mine = Moments(weight=weight, square=square, mean=total.mean[groups, columns], m2=total.m2[groups, columns])
        merged = merge(mine, part_of(columns))
        total.mean[groups, columns], total.m2[groups, columns] = merged.mean, merged.m2
    if merged is not None:
        total.weight[groups], total.square[groups] = merged.weight, merged.square


def _blocks(channels: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, channels, _BLOCK))
