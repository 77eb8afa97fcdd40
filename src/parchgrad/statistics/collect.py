"""One pass over a data set: the moments of every channel's GAP, and a sample of rows for the normality test."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from parchgrad.errors import SettingError, StatisticsError
from parchgrad.layers import Convolution, LayerChoice, check_evaluation_mode, check_model, choose_layers
from parchgrad.statistics.moments import Moments, merge, moments_of_labels, moments_of_weights
from parchgrad.statistics.store import ChannelStatistics, LayerStatistics

__all__ = ["Labels", "collect_statistics"]

Labels = Literal["given", "predicted"]

# Shapiro-Wilk's approximation is not valid for more samples.
_RESERVOIR = 5000
# Rows gathered before the moments are updated: an update passes over all classes of all channels.
_ROWS_PER_UPDATE = 1024

_GAPS: ContextVar[dict[str, list[Tensor]] | None] = ContextVar("parchgrad_gaps", default=None)


def collect_statistics(
    model: nn.Module,
    data: Dataset[Any] | Iterable[Any],
    *,
    layers: LayerChoice = "all",
    labels: Labels = "given",
    batch_size: int = 32,
    seed: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> ChannelStatistics:
    """Collect channel statistics in one pass; only the GAP of each channel leaves the forward pass.

    The GAP is the mean over space of relu(output); of a convolution that is called several times in a pass, the mean
    over the calls. Images go to the model's device; an autocast block around the call is respected.

    Args:
        model: a classifier whose output are the logits, shape (B, K), in evaluation mode.
        data: a data set, or batches of it such as a `DataLoader` gives. An item is an input and its class, or with
            predicted labels the input alone.
        layers: which convolutions; see `choose_layers`.
        labels: `"given"` takes the classes that the data name; `"predicted"` counts every image in every class with
            the model's own softmax probability, so that unlabelled images will do.
        batch_size: images in one pass, where `data` is a data set.
        seed: seed of the sample of at most 5,000 rows that the Shapiro-Wilk test sees.
        on_batch: called with the number of images after each batch, for a progress bar.

    Returns:
        Statistics of every chosen layer over K classes.

    Raises:
        SettingError: if a setting is out of range.
        StatisticsError: if there are no images, labels are missing or out of range, or a layer takes no part.
        ModelError: if the model holds no convolution, or is in training mode.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
        >>> images = [(torch.rand(3, 8, 8), index % 2) for index in range(10)]
        >>> statistics = collect_statistics(model, images, batch_size=4)
        >>> statistics["0"].class_count
        tensor([5., 5.], dtype=torch.float64)
    """
    check_model(model)
    check_evaluation_mode(model)
    if labels not in get_args(Labels):
        raise SettingError(f"labels is {labels!r}, but it must be one of {', '.join(get_args(Labels))}.")
    chosen = choose_layers(model, layers)
    device = next(model.parameters()).device
    collection = _Collection(list(chosen), seed)
    with _gaps_of(chosen) as gaps, torch.inference_mode():
        for inputs, given in _batches(data, batch_size, labels):
            gaps.update({name: [] for name in chosen})
            logits = model(inputs.to(device))
            missing = next((name for name, values in gaps.items() if not values), None)
            if missing is not None:
                raise StatisticsError(f"Layer {missing!r} was not called by the model; leave it out of layers.")
            weights = logits.float().softmax(dim=1).cpu() if given is None else given
            rows = {name: torch.stack(values).mean(0).cpu() for name, values in gaps.items()}
            collection.add(rows, weights, logits.shape[1])
            if on_batch is not None:
                on_batch(inputs.shape[0])
    return collection.result(
        {"model": type(model).__name__, "labels": labels, "images": str(collection.images), "seed": str(seed)}
    )


class _Collection:
    """The accumulator: moments per layer, rows waiting to be added, and the sample of rows."""

    def __init__(self, layers: list[str], seed: int) -> None:
        self.images = 0
        self._layers = layers
        self._seed = seed
        self._waiting: dict[str, list[Tensor]] = {name: [] for name in layers}
        self._weights: list[Tensor] = []
        self._rows_waiting = 0
        self._classes = 0
        self._of_classes: dict[str, Moments] = {}
        self._of_all: dict[str, Moments] = {}
        self._keys = np.empty(0, dtype=np.uint64)
        self._reservoir: dict[str, Tensor] = {}

    def add(self, rows: Mapping[str, Tensor], weights: Tensor, classes: int) -> None:
        """Add the GAPs (B, C) of one batch with its labels (B,), or class weights (B, K)."""
        if weights.dim() == 1 and (int(weights.min()) < 0 or int(weights.max()) >= classes):
            raise StatisticsError(
                f"The data name classes {int(weights.min())} to {int(weights.max())}, but the model has {classes}; "
                "use data whose classes are the model's, or labels='predicted'."
            )
        self._classes = classes
        for name, values in rows.items():
            self._waiting[name].append(values)
        self._weights.append(weights)
        self.images += len(weights)
        self._rows_waiting += len(weights)
        if self._rows_waiting >= _ROWS_PER_UPDATE:
            self._update()

    def _update(self) -> None:
        weights = torch.cat(self._weights)
        start = self.images - len(weights)
        keys = np.concatenate((self._keys, _keys(self._seed, start, len(weights))))
        kept = np.sort(np.argsort(keys, kind="stable")[:_RESERVOIR])
        for name in self._layers:
            values = torch.cat(self._waiting[name])
            everyone = torch.zeros(len(values), dtype=torch.long)
            by_class = (
                moments_of_labels(values, weights, self._classes)
                if weights.dim() == 1
                else moments_of_weights(values, weights)
            )
            overall = moments_of_labels(values, everyone, 1)
            if name in self._of_all:
                by_class, overall = merge(self._of_classes[name], by_class), merge(self._of_all[name], overall)
                values = torch.cat((self._reservoir[name], values))
            self._of_classes[name], self._of_all[name] = by_class, overall
            self._reservoir[name] = values[torch.from_numpy(kept)]
            self._waiting[name] = []
        self._keys, self._weights, self._rows_waiting = keys[kept], [], 0

    def result(self, metadata: Mapping[str, str]) -> ChannelStatistics:
        """Statistics of all that was added."""
        if self.images < 2:
            raise StatisticsError(f"The data hold {self.images} images, but statistics need at least two.")
        if self._rows_waiting:
            self._update()
        return ChannelStatistics({name: self._layer(name) for name in self._layers}, metadata)

    def _layer(self, name: str) -> LayerStatistics:
        overall, by_class = self._of_all[name], self._of_classes[name]
        return LayerStatistics(
            count=overall.weight[0],
            mean=overall.mean[0],
            std=overall.variance[0].sqrt(),
            class_count=by_class.weight,
            class_mean=by_class.mean.T,
            class_variance=by_class.variance.T,
            shapiro_p=torch.from_numpy(_shapiro_p(self._reservoir[name].double().numpy())),
            class_square=by_class.square,
        )


def _shapiro_p(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shapiro-Wilk p-value of each column (N, C); 1, hence normal, where the test is not defined."""
    p = np.ones(samples.shape[1])
    testable = np.flatnonzero(np.ptp(samples, axis=0) > 0) if len(samples) >= 3 else np.empty(0, dtype=np.int64)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        p[testable] = list(pool.map(lambda channel: stats.shapiro(samples[:, channel]).pvalue, testable))
    return p


def _keys(seed: int, start: int, count: int) -> NDArray[np.uint64]:
    """A random key per image, from its number alone: the images of the smallest keys are a sample of any stream.

    Splitmix64 (Steele, Lea, Flood 2014).
    """
    state = np.arange(start + 1, start + count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state += np.uint64(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    keys: NDArray[np.uint64] = state ^ (state >> np.uint64(31))
    return keys


@contextmanager
def _gaps_of(convolutions: Mapping[str, Convolution]) -> Iterator[dict[str, list[Tensor]]]:
    """Hooks that note the GAP of each convolution, for forward passes of this thread or task."""
    gaps: dict[str, list[Tensor]] = {}

    def hook_for(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if _GAPS.get() is gaps:
                positions = tuple(range(2, output.dim()))
                gaps[name].append(
                    output.relu().mean(dim=positions, dtype=torch.promote_types(output.dtype, torch.float32))
                )

        return hook

    token = _GAPS.set(gaps)
    handles = []
    try:
        for name, convolution in convolutions.items():
            handles.append(convolution.register_forward_hook(hook_for(name)))
        yield gaps
    finally:
        for handle in handles:
            handle.remove()
        _GAPS.reset(token)


def _batches(
    data: Dataset[Any] | Iterable[Any], batch_size: int, labels: Labels
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Inputs and given labels of each batch; no labels where they are predicted."""
    # Lists of items are data sets too, as torch's own loader takes them.
    is_data_set = isinstance(data, Dataset) or (hasattr(data, "__getitem__") and hasattr(data, "__len__"))
    batches: Iterable[Any] = (
        DataLoader(cast(Dataset[Any], data), batch_size) if is_data_set else cast(Iterable[Any], data)
    )
    for batch in batches:
        inputs, given = (batch[0], batch[1]) if isinstance(batch, list | tuple) else (batch, None)
        if labels == "given" and given is None:
            raise StatisticsError("The data hold no labels; give items (input, class), or use labels='predicted'.")
        yield inputs, None if labels == "predicted" else torch.as_tensor(given).long().cpu()
