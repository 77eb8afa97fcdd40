"""Accumulate the moments of every channel, overall and per class, and a random sample of rows."""

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

from parchgrad._io.checks import check_kind
from parchgrad.errors import StatisticsError
from parchgrad.statistics.layer import LayerStatistics
from parchgrad.statistics.moments import Moments, merge, moments_of_labels, moments_of_weights
from parchgrad.statistics.store import ChannelStatistics, RowSample

__all__ = ["COLLECTIONS", "Accumulator", "Progress", "Stage", "merge_statistics"]

Stage = Literal["images", "normality"]
Progress: TypeAlias = Callable[[Stage, int, int | None], None]

COLLECTIONS = "collections"
"""Metadata key for the digests of the data sets, separated by spaces."""

# Shapiro-Wilk's approximation is invalid for more samples.
_SAMPLE = 5000
# Rows per update of the moments: every update touches all classes and channels.
_ROWS_PER_UPDATE = 1024
# Channels updated at once, to keep temporary arrays small.
_BLOCK = 1024
# Columns that one process tests at a time, and the number of values above which processes pay off.
_COLUMNS = 64
_WORTH_PROCESSES = 4_000_000


class Accumulator:
    """Moments of C channels, overall and in each of K classes, and the rows of the images with the smallest keys.

    Rows are buffered until there are enough for an update. An image's key depends only on the seed and its number, so
    the sample does not depend on the order of the images or on which process saw them.

    Attributes:
        images: number of images added.
    """

    def __init__(self, channels: int, classes: int, *, seed: int) -> None:
        """Start empty; the keys depend on `seed`."""
        self.images = 0
        self._seed = seed
        self._of_classes = _no_moments(classes, channels)
        self._of_all = _no_moments(1, channels)
        self._keys = torch.empty(0, dtype=torch.int64, device="cpu")
        self._rows = torch.empty(0, channels, device="cpu")
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._rows_waiting = 0

    def add(self, numbers: Tensor, values: Tensor, weights: Tensor) -> None:
        """Add a batch.

        Args:
            numbers: index of each image in the data set, shape (B,), integer.
            values: GAP of each channel, shape (B, C).
            weights: class of each image, shape (B,), integer; or its weight per class, shape (B, K).

        Raises:
            StatisticsError: if a value is not finite, or a class is out of range.
        """
        classes = self._of_classes.weight.numel()
        if weights.dim() not in (1, 2) or weights.shape != (len(values), classes)[: weights.dim()]:
            raise StatisticsError(
                f"The labels have shape {tuple(weights.shape)}, but there are {len(values)} images and {classes} "
                "classes. Pass one label per image."
            )
        if weights.dim() == 1 and (int(weights.min()) < 0 or int(weights.max()) >= classes):
            raise StatisticsError(
                f"The labels range from {int(weights.min())} to {int(weights.max())}, but the model has {classes} "
                "classes. Use data with the model's classes, or pass `labels='predicted'`."
            )
        # The sum is finite only if every value is.
        if not (torch.isfinite(values.sum()) and torch.isfinite(weights.sum())):
            raise StatisticsError(
                f"The model's output for one of the images {int(numbers[0])} to {int(numbers[-1])} is not finite. "
                "Check the inputs for NaN or infinity, or collect in a wider dtype."
            )
        self._sample(_keys(self._seed, numbers), values)
        self._waiting.append((values, weights))
        self._rows_waiting += len(values)
        self.images += len(values)
        if self._rows_waiting >= _ROWS_PER_UPDATE:
            self._update()

    def _sample(self, keys: Tensor, values: Tensor) -> None:
        """Keep the rows with the smallest keys, in place once the sample is full."""
        room = _SAMPLE - len(self._keys)
        if room > 0:
            self._keys = torch.cat((self._keys, keys[:room]))
            self._rows = torch.cat((self._rows.to(values.dtype), values[:room]))
            keys, values = keys[room:], values[room:]
        if len(keys) == 0 or keys.min() >= self._keys.max():
            return
        together = torch.cat((self._keys, keys))
        kept = torch.zeros(len(together), dtype=torch.bool, device="cpu")
        kept[together.argsort(stable=True)[:_SAMPLE]] = True
        leaving, incoming = (~kept[:_SAMPLE]).nonzero().flatten(), kept[_SAMPLE:].nonzero().flatten()
        self._keys[leaving], self._rows[leaving] = keys[incoming], values[incoming]

    def _update(self) -> None:
        """Merge the buffered rows into the moments."""
        if not self._waiting:
            return
        values, weights = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._rows_waiting = [], 0
        everyone = torch.ones(len(values), 1, device="cpu")
        _merge_into(self._of_all, slice(None), lambda columns: moments_of_weights(values[:, columns], everyone))
        if weights.dim() == 2:
            _merge_into(self._of_classes, slice(None), lambda columns: moments_of_weights(values[:, columns], weights))
        else:
            # Update only the classes present: data sorted by class have few at a time.
            present, labels = torch.unique(weights, return_inverse=True)
            _merge_into(
                self._of_classes,
                present,
                lambda columns: moments_of_labels(values[:, columns], labels, len(present)),
            )

    def merge(self, other: "Accumulator") -> None:
        """Merge another accumulator with the same channels and classes."""
        for accumulator in (self, other):
            accumulator._update()
        for mine, theirs in ((self._of_all, other._of_all), (self._of_classes, other._of_classes)):
            _merge_into(mine, slice(None), partial(_columns, theirs))
        self._sample(other._keys, other._rows)
        self.images += other.images

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by name, for `restored`."""
        self._update()
        return {
            "images": torch.tensor(self.images, device="cpu"),
            "keys": self._keys,
            "rows": self._rows,
            **{f"all/{name}": value for name, value in vars(self._of_all).items()},
            **{f"class/{name}": value for name, value in vars(self._of_classes).items()},
        }

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], *, seed: int) -> "Accumulator":
        """Restore the state that `tensors` returned.

        Raises:
            KeyError: if a part is missing.
            ValueError: if the parts are inconsistent or are not valid moments.
        """
        classes, channels = tensors["class/mean"].shape
        if not classes or not channels:
            raise ValueError("it has no channels or no classes")
        accumulator = cls(channels, classes, seed=seed)
        images, keys, rows = int(tensors["images"]), tensors["keys"], tensors["rows"]
        sampled = min(images, _SAMPLE)
        if keys.dtype != torch.int64 or keys.shape != (sampled,) or rows.shape != (sampled, channels):
            raise ValueError(f"its sample does not match {images} images")
        accumulator.images, accumulator._keys, accumulator._rows = images, keys, rows
        parts = {"rows": rows}
        for moments, prefix in ((accumulator._of_all, "all"), (accumulator._of_classes, "class")):
            for name, value in vars(moments).items():
                parts[f"{prefix}/{name}"] = found = tensors[f"{prefix}/{name}"]
                # copy_ would broadcast a single number over all channels.
                if found.shape != value.shape or (name != "mean" and bool((found < 0).any())):
                    raise ValueError(f"{prefix}/{name} has the wrong shape or is negative")
                value.copy_(found)
        for name, found in parts.items():
            if not found.is_floating_point() or not torch.isfinite(found).all():
                raise ValueError(f"{name} is not floating-point or not finite")
        return accumulator

    def shapiro_p(self, on_progress: Progress | None = None) -> Tensor:
        """Return the Shapiro-Wilk p-value per channel over the sampled rows, shape (C,); 1 where undefined."""
        rows = self._rows[self._keys.argsort(stable=True)]
        return torch.from_numpy(shapiro_p_values(rows.numpy(), on_progress))

    def statistics(
        self,
        channels: Mapping[str, int],
        shapiro_p: Tensor,
        metadata: Mapping[str, str],
        weight_digests: Mapping[str, str],
    ) -> ChannelStatistics:
        """Return the statistics of all images added.

        Args:
            channels: number of channels per layer, in column order.
            shapiro_p: result of `shapiro_p`, shape (C,).
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
        """Rebuild the accumulator that statistics were computed from."""
        sample = statistics.sample
        layers = [layer for layer in statistics.values() if isinstance(layer, LayerStatistics)]
        if sample is None or len(layers) < len(statistics):
            raise StatisticsError(
                "Restricted or compact statistics cannot be merged. Merge the files written by the collection and "
                "restrict the result."
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

    Passing the same data set twice is an error; images shared by two different data sets go unnoticed. Up to 5,000
    images in total, the normality test uses the same sample as a single run; beyond that, another random sample.

    Args:
        parts: statistics of each set, from `collect_statistics` on the same layers of the same model.
        on_progress: called with the stage `"normality"`, the channels tested, and the total.

    Raises:
        StatisticsError: if `parts` is empty, or the parts differ in model, layers, classes, labels or preprocessing,
            contain the same images, or were restricted.

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
        raise StatisticsError("There are no statistics to merge. Pass at least one part.")
    for part in parts:
        remedy = "Read the files with `ChannelStatistics.load(path)` and pass them in a list"
        check_kind("A part", part, ChannelStatistics, remedy, error=StatisticsError)
    first = parts[0]
    for number, part in enumerate(parts[1:], start=2):
        _check_mergeable(first, part, number)
    seen: dict[str, int] = {}
    for number, part in enumerate(parts, start=1):
        earlier = next((other for other, held in enumerate(parts[: number - 1], start=1) if _overlap(held, part)), None)
        if earlier is not None:
            raise StatisticsError(
                f"Parts {earlier} and {number} contain the same images. Pass each set of images once."
            )
        for collection in part.metadata.get(COLLECTIONS, "").split():
            if collection in seen:
                raise StatisticsError(
                    f"Parts {seen[collection]} and {number} contain the same images. Pass each set of images once."
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
    """Whether the samples share keys and agree on those rows, so that both contain the same images."""
    if first.sample is None or second.sample is None:
        return False
    _, mine, theirs = np.intersect1d(first.sample.keys.numpy(), second.sample.keys.numpy(), return_indices=True)
    # Rounding depends on the batch size.
    return len(mine) > 0 and all(
        torch.allclose(rows[mine], second.sample.rows[name][theirs].to(rows.dtype), rtol=1e-4)
        for name, rows in first.sample.rows.items()
    )


def _check_mergeable(first: ChannelStatistics, part: ChannelStatistics, number: int) -> None:
    """Raise `StatisticsError` unless both were collected on the same layers of one model in the same way."""
    if list(first) != list(part):
        differing = next(iter(set(first) ^ set(part)), "order")
        raise StatisticsError(
            f"The layers of part {number} and the first part differ ({differing!r}). Collect the same layers in both."
        )
    for name, layer in part.items():
        if (layer.channels, layer.classes) != (first[name].channels, first[name].classes):
            raise StatisticsError(
                f"Layer {name!r} has {layer.channels} channels and {layer.classes} classes in part {number}, "
                f"but {first[name].channels} and {first[name].classes} in the first. Merge statistics of one model."
            )
        if part.weight_digests.get(name) != first.weight_digests.get(name):
            raise StatisticsError(
                f"The weights of layer {name!r} differ between part {number} and the first part. "
                "Merge statistics of one model."
            )
    for field in ("labels", "preprocessing"):
        if part.metadata.get(field) != first.metadata.get(field):
            raise StatisticsError(
                f"Part {number} was collected with {field} {part.metadata.get(field)!r}, but the first with "
                f"{first.metadata.get(field)!r}. Collect both in the same way."
            )


def shapiro_p_values(samples: NDArray[Any], on_progress: Progress | None = None) -> NDArray[np.float64]:
    """Compute the Shapiro-Wilk p-value of each column (N, C); 1, that is normal, where the test is undefined.

    Worker processes test blocks of columns, since scipy's test holds the GIL. This process does the work itself if
    there is little of it, forking is impossible, or a worker dies.
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
    # A daemonic process, such as a pool worker, may not fork.
    can_fork = sys.platform == "linux" and not multiprocessing.current_process().daemon
    if samples.size >= _WORTH_PROCESSES and can_fork:
        processes = len(os.sched_getaffinity(0))
        try:
            with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
                fill(_in_order(pool, (samples[:, block] for block in blocks), ahead=2 * processes), blocks)
        except (BrokenProcessPool, OSError):
            # A dead worker must not cost the collection: the rest is tested below.
            pass
    left = blocks[len(done) :]
    fill((_shapiro_of_block(samples[:, block]) for block in left), left)
    return p


def _in_order(pool: ProcessPoolExecutor, work: Iterable[NDArray[Any]], ahead: int) -> Iterator[NDArray[np.float64]]:
    """Yield results in block order, copying only a few blocks ahead."""
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
    """Hash each image's number into a key; the images with the smallest keys are a random sample of the stream.

    Splitmix64 (Steele, Lea, Flood 2014) without the last bit, so that keys sort as signed integers.
    """
    state = (numbers.numpy().astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    state += np.uint64(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((state ^ (state >> np.uint64(31))) >> np.uint64(1)).astype(np.int64))


def _no_moments(groups: int, channels: int) -> Moments:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device="cpu")

    return Moments(weight=zeros(groups), square=zeros(groups), mean=zeros(groups, channels), m2=zeros(groups, channels))


def _columns(moments: Moments, columns: slice) -> Moments:
    return Moments(
        weight=moments.weight, square=moments.square, mean=moments.mean[:, columns], m2=moments.m2[:, columns]
    )


def _merge_into(total: Moments, groups: Tensor | slice, part_of: Callable[[slice], Moments]) -> None:
    """Merge moments of some groups into the total in place, one block of columns at a time."""
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
