"""Channel statistics as read-only containers, and their file: safetensors, never a pickle."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from parchgrad.errors import StatisticsError
from parchgrad.files import writing
from parchgrad.statistics.tests import TTest, class_log_p

__all__ = ["ChannelStatistics", "LayerStatistics"]

_FORMAT = "parchgrad channel statistics"
_VERSION = "1"


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerStatistics:
    """Statistics of one convolution's C channels over a data set of K classes.

    Every number is of the GAP of a channel: the mean over space of relu(output). Arrays are kept in float64 on the CPU.

    Attributes:
        count: number of images, shape ().
        mean: mean per channel, shape (C,).
        std: unbiased standard deviation per channel, shape (C,).
        class_count: images per class, shape (K,); the sum of their weights where images belong to every class to some
            extent.
        class_mean: mean per channel and class, shape (C, K).
        class_variance: unbiased variance per channel and class, shape (C, K).
        shapiro_p: Shapiro-Wilk p-value per channel, in [0, 1], shape (C,).
        class_square: sum of the squared weights per class, shape (K,); `class_count` where weights are zero or one.

    Raises:
        StatisticsError: if a shape does not fit the others, or a number is not finite or out of its range.

    Example:
        >>> layer = LayerStatistics(
        ...     count=torch.tensor(40), mean=torch.tensor([1.0]), std=torch.tensor([0.5]),
        ...     class_count=torch.tensor([20, 20]), class_mean=torch.tensor([[1.3, 0.7]]),
        ...     class_variance=torch.tensor([[0.16, 0.16]]), shapiro_p=torch.tensor([0.01]))
        >>> layer.class_log_p().round(decimals=2)
        tensor([[-11.1200,  -0.0000]], dtype=torch.float64)
    """

    count: Tensor
    mean: Tensor
    std: Tensor
    class_count: Tensor
    class_mean: Tensor
    class_variance: Tensor
    shapiro_p: Tensor
    class_square: Tensor = None  # type: ignore[assignment]  # replaced by class_count as soon as it is made

    def __post_init__(self) -> None:
        if self.class_square is None:
            object.__setattr__(self, "class_square", self.class_count)
        for entry in fields(self):
            value = torch.as_tensor(getattr(self, entry.name)).detach().to("cpu", torch.float64, copy=True)
            object.__setattr__(self, entry.name, value)
        channels, classes = self.channels, self.classes
        shapes: dict[str, tuple[int, ...]] = {
            "count": (),
            "mean": (channels,),
            "std": (channels,),
            "class_count": (classes,),
            "class_mean": (channels, classes),
            "class_variance": (channels, classes),
            "shapiro_p": (channels,),
            "class_square": (classes,),
        }
        for name, shape in shapes.items():
            value = getattr(self, name)
            if tuple(value.shape) != shape:
                raise StatisticsError(
                    f"{name} has shape {tuple(value.shape)}, but {channels} channels and {classes} classes "
                    f"need {shape}; give arrays that belong to one layer."
                )
            # A class with no more than one effective image has no variance; such entries are not read.
            has_variance = self.class_count.square() > self.class_square
            readable = value[:, has_variance] if name == "class_variance" else value
            if not torch.isfinite(readable).all():
                raise StatisticsError(f"{name} holds values that are not finite; collect the statistics again.")
            highest = 1.0 if name == "shapiro_p" else torch.inf
            if not name.endswith("mean") and bool(((readable < 0) | (readable > highest)).any()):
                raise StatisticsError(f"{name} holds values outside [0, {highest}]; collect the statistics again.")

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return self.mean.numel()

    @property
    def classes(self) -> int:
        """Number of classes K."""
        return self.class_count.numel()

    def class_log_p(self, test: TTest = "welch") -> Tensor:
        """Log p of "this channel is larger on this class than on the others", shape (C, K), natural log, float64.

        Raises:
            SettingError: if `test` is not `"welch"` or `"student"`.
        """
        log_p = class_log_p(
            self.class_count.numpy(),
            self.class_square.numpy(),
            self.class_mean.numpy(),
            self.class_variance.numpy(),
            self.count.item(),
            self.mean.numpy(),
            self.std.square().numpy(),
            test=test,
        )
        return torch.from_numpy(log_p)


@dataclass(frozen=True, eq=False)
class ChannelStatistics(Mapping[str, LayerStatistics]):
    """A read-only mapping from layer name to `LayerStatistics`, all over the same classes.

    Attributes:
        layers: statistics by the layer's name in the model.
        metadata: what they were collected from, text by name.

    Raises:
        StatisticsError: if there is no layer, or the layers differ in their number of classes.

    Example:
        >>> layer = LayerStatistics(
        ...     count=torch.tensor(4), mean=torch.zeros(8), std=torch.ones(8), class_count=torch.tensor([2, 2]),
        ...     class_mean=torch.zeros(8, 2), class_variance=torch.ones(8, 2), shapiro_p=torch.zeros(8))
        >>> statistics = ChannelStatistics({"features.0": layer})
        >>> list(statistics), statistics.classes
        (['features.0'], 2)
    """

    layers: Mapping[str, LayerStatistics]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))
        object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))
        if not self.layers:
            raise StatisticsError("Channel statistics need at least one layer; none was given.")
        for name, layer in self.layers.items():
            if layer.classes != self.classes:
                raise StatisticsError(
                    f"Layer {name!r} has statistics of {layer.classes} classes, the first layer of {self.classes}; "
                    "all layers must come from one collection."
                )

    @property
    def classes(self) -> int:
        """Number of classes K, the same in every layer."""
        return next(iter(self.layers.values())).classes

    def __getitem__(self, layer: str) -> LayerStatistics:
        return self.layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def restrict(self, layers: Iterable[str]) -> "ChannelStatistics":
        """Keep some layers only, in their present order, for a smaller file.

        Raises:
            StatisticsError: if a layer is not among them.
        """
        wanted = set(layers)
        unknown = wanted - set(self.layers)
        if unknown:
            raise StatisticsError(f"The statistics do not hold layer {min(unknown)!r}; they hold {', '.join(self)}.")
        return ChannelStatistics({name: self[name] for name in self if name in wanted}, self.metadata)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, over an earlier one of that name; it appears only when it is whole.

        Raises:
            OutputError: if the file cannot be written.
        """
        tensors = {
            f"{name}/{entry.name}": getattr(layer, entry.name).contiguous()
            for name, layer in self.items()
            for entry in fields(LayerStatistics)
        }
        # safetensors does not keep the order of tensors.
        header = {"format": _FORMAT, "format_version": _VERSION, "layers": json.dumps(list(self))}
        header["metadata"] = json.dumps(dict(self.metadata))
        with writing(Path(path)) as temporary:
            save_file(tensors, temporary, header)

    @classmethod
    def load(cls, path: str | Path) -> "ChannelStatistics":
        """Read a file written by `save`. Nothing in it is executed.

        Raises:
            StatisticsError: if the file is missing, cut off, of another kind or version, or holds what does not fit;
                the layer or field is named.
        """
        try:
            with safe_open(path, framework="pt") as opened:
                header = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
        except FileNotFoundError as error:
            raise StatisticsError(f"There is no statistics file {str(path)!r}; check the path.") from error
        except (SafetensorError, OSError, ValueError) as error:
            raise StatisticsError(
                f"{str(path)!r} cannot be read as channel statistics ({error}); it may be cut off or of another kind."
            ) from error
        if header.get("format") != _FORMAT:
            raise StatisticsError(f"{str(path)!r} holds no channel statistics; collect some, or give another file.")
        if header.get("format_version") != _VERSION:
            raise StatisticsError(
                f"{str(path)!r} has format version {header.get('format_version')!r}, this release reads {_VERSION!r}; "
                "collect the statistics again, or install the release that wrote them."
            )
        names = _json(header, "layers", path)
        metadata = _json(header, "metadata", path)
        if not isinstance(names, list) or not isinstance(metadata, dict):
            raise StatisticsError(f"The header of {str(path)!r} is damaged; collect the statistics again.")
        layers = {str(name): _layer_from(tensors, str(name), path) for name in names}
        return cls(layers, {str(name): str(value) for name, value in metadata.items()})


def _json(header: Mapping[str, str], name: str, path: str | Path) -> object:
    try:
        value: object = json.loads(header[name])
    except (KeyError, ValueError, RecursionError) as error:
        raise StatisticsError(
            f"The field {name!r} in the header of {str(path)!r} is damaged; collect the statistics again."
        ) from error
    return value


def _layer_from(tensors: Mapping[str, Tensor], layer: str, path: str | Path) -> LayerStatistics:
    names = [entry.name for entry in fields(LayerStatistics)]
    missing = [name for name in names if f"{layer}/{name}" not in tensors]
    if missing:
        raise StatisticsError(f"Layer {layer!r} in {str(path)!r} lacks {missing[0]!r}; collect the statistics again.")
    try:
        return LayerStatistics(**{name: tensors[f"{layer}/{name}"] for name in names})
    except StatisticsError as error:
        raise StatisticsError(f"Layer {layer!r} in {str(path)!r} does not fit: {error}") from error
