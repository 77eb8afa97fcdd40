"""Channel statistics of a model, and their file: safetensors, never a pickle."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeGuard

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from parchgrad.checks import check_kind
from parchgrad.errors import OutputError, SettingError, StatisticsError, StatisticsWarning, reason_of, warn
from parchgrad.files import writing
from parchgrad.layers import Convolution, bare_model, find_convolutions
from parchgrad.statistics.compact import COMPACT_PARTS, compact_log_p, expand_log_p, keep_share
from parchgrad.statistics.layer import PICKLES, AnyLayerStatistics, LayerStatistics, RankedLayerStatistics
from parchgrad.statistics.tests import TTest
from parchgrad.tensor_files import read_tensors

__all__ = ["ChannelStatistics", "RowSample", "weight_digest"]

_FORMAT = "parchgrad channel statistics"
_VERSION = "1"
_SUFFIX = ".safetensors"
# More than any classifier has: what lists them would fill the memory.
_MOST_CLASSES = 1_000_000
# No layer has this name, since module names hold no colon.
_KEYS = ":keys"
_VIEWS = ("layers", "metadata", "weight_digests")


@dataclass(frozen=True, eq=False, kw_only=True)
class RowSample:
    """A random sample of at most 5,000 images, which the normality test saw and merging needs again.

    Attributes:
        keys: random key of each image, by which it was drawn, shape (N,), int64.
        rows: GAP of each of these images by layer, each (N, C).
    """

    keys: Tensor
    rows: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", MappingProxyType(dict(self.rows)))

    def __getstate__(self) -> dict[str, Any]:
        """Read-only views cannot be pickled; plain dicts take their place on the way."""
        return {**vars(self), "rows": dict(self.rows)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the view again."""
        vars(self).update(state, rows=MappingProxyType(state["rows"]))


def weight_digest(convolution: Convolution) -> str:
    """SHA-256 of a convolution's weight, the same on any device and in any wider dtype.

    Example:
        >>> convolution = nn.Conv2d(3, 8, 3)
        >>> weight_digest(convolution) == weight_digest(convolution.double())
        True
    """
    values = convolution.weight.detach().to("cpu", torch.float64).contiguous().numpy()
    return hashlib.sha256(str(values.shape).encode() + values.tobytes()).hexdigest()


@dataclass(frozen=True, eq=False, repr=False)
class ChannelStatistics(Mapping[str, AnyLayerStatistics]):
    """A read-only mapping from layer name to its statistics, all over the same classes.

    Attributes:
        layers: statistics by the layer's name in the model.
        metadata: what they were collected from, text by name: `model`, `preprocessing`, `data`, `labels`, `images`.
        weight_digests: SHA-256 of each convolution's weight by layer name, where it is known.
        class_indices: classes of the model that the columns stand for; None where they are all of them.
        sample: the sampled images, where the statistics can be merged.
        model_classes: number of classes of the model; as many as the columns unless given.

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

    layers: Mapping[str, AnyLayerStatistics]
    metadata: Mapping[str, str] = field(default_factory=dict)
    weight_digests: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    class_indices: tuple[int, ...] | None = field(default=None, kw_only=True)
    sample: RowSample | None = field(default=None, kw_only=True)
    model_classes: int = field(default=0, kw_only=True)

    def __getstate__(self) -> dict[str, Any]:
        """Read-only views cannot be pickled; plain dicts take their place on the way."""
        return {**vars(self), **{name: dict(getattr(self, name)) for name in _VIEWS}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the views again."""
        vars(self).update(state, **{name: MappingProxyType(state[name]) for name in _VIEWS})

    def __post_init__(self) -> None:
        for name in _VIEWS:
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        if not self.layers:
            raise StatisticsError(
                "Channel statistics need at least one layer, but none is given; collect them, or load a file."
            )
        for name, layer in self.layers.items():
            if layer.classes != self.classes:
                raise StatisticsError(
                    f"Layer {name!r} has statistics of {layer.classes} classes, the first layer of {self.classes}; "
                    "all layers must come from one collection."
                )
        first = next(iter(self.layers.values()))
        for name, layer in self.layers.items():
            if isinstance(first, LayerStatistics) and isinstance(layer, LayerStatistics) and layer.count != first.count:
                raise StatisticsError(
                    f"Layer {name!r} has statistics of {layer.count:.0f} images, the first layer of {first.count:.0f}; "
                    "all layers must come from one collection."
                )
        if not self.model_classes:
            object.__setattr__(self, "model_classes", self.classes)
        indices = self.class_indices
        if indices is None and self.model_classes != self.classes:
            raise StatisticsError(
                f"The statistics are of {self.classes} classes, the model has {self.model_classes}; "
                "class_indices must say which classes they are."
            )
        if indices is not None and (
            len(indices) != self.classes
            or list(indices) != sorted(set(indices))
            or not all(0 <= i < self.model_classes for i in indices)
        ):
            raise StatisticsError(
                f"class_indices must be {self.classes} ascending classes from 0 to {self.model_classes - 1}, "
                f"but {len(indices)} are given: {indices[:10]}."
            )
        if self.sample is not None:
            self._check_sample(self.sample)

    def _check_sample(self, sample: RowSample) -> None:
        if sample.keys.dtype != torch.int64 or sample.keys.dim() != 1:
            raise StatisticsError(
                f"The keys of the sampled images are {sample.keys.dtype} of shape {tuple(sample.keys.shape)}, but "
                "whole numbers, int64 of shape (N,), are needed; collect the statistics again."
            )
        for name, layer in self.layers.items():
            shape = (len(sample.keys), layer.channels)
            if name not in sample.rows or tuple(sample.rows[name].shape) != shape:
                raise StatisticsError(
                    f"The sampled images of layer {name!r} must be rows of shape {shape}, one for each key; collect "
                    "the statistics again."
                )
            if sample.rows[name].dtype not in (torch.float32, torch.float64):
                raise StatisticsError(
                    f"The sampled images of layer {name!r} are {sample.rows[name].dtype}, not float32; convert them."
                )
            if not torch.isfinite(sample.rows[name]).all():
                raise StatisticsError(
                    f"The sampled images of layer {name!r} hold values that are not finite; collect the statistics "
                    "again."
                )

    @property
    def classes(self) -> int:
        """Number of classes K that the statistics hold, the same in every layer; 0 without p-values per class."""
        return next(iter(self.layers.values())).classes

    @property
    def test(self) -> TTest:
        """The test that compact or imported statistics are of; Welch's for others, which hold what any test needs."""
        layer = next(iter(self.values()))
        return "welch" if isinstance(layer, LayerStatistics) else layer.test

    def __repr__(self) -> str:
        channels = sum(layer.channels for layer in self.values())
        return f"ChannelStatistics({len(self)} layers, {channels} channels, {self.classes} classes)"

    def __getitem__(self, layer: str) -> AnyLayerStatistics:
        return self.layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def restrict(
        self, layers: Iterable[str] | None = None, classes: Iterable[int] | None = None
    ) -> "ChannelStatistics":
        """Keep some layers or classes only, for a smaller file; the sample that merging needs is left out.

        Args:
            layers: names of layers, kept in their present order; None keeps all.
            classes: classes of the model by index; None keeps all.

        Raises:
            StatisticsError: if a layer or class is not among them.
        """
        for name, value, kind in (("layers", layers, "names of layers"), ("classes", classes, "class indices")):
            if value is not None and (isinstance(value, str) or not isinstance(value, Iterable)):
                raise StatisticsError(
                    f"{name} is {value!r}, but it must be a list of {kind}; choose_layers(model, ...) gives the names "
                    "of a ratio or pattern, and [index] is a list of one class."
                )
        wanted = list(self) if layers is None else list(layers)
        unknown = set(wanted) - set(self.layers)
        if unknown:
            raise StatisticsError(f"The statistics do not hold layer {min(unknown)!r}; they hold {', '.join(self)}.")
        kept = {name: self[name] for name in self if name in set(wanted)}
        indices = self.class_indices
        if classes is not None:
            indices = tuple(sorted(set(classes.tolist() if isinstance(classes, Tensor) else classes)))
            if not indices:
                raise StatisticsError("No class is left to restrict to; give at least one.")
            columns = self.columns(indices)
            kept = {name: layer.restricted(columns) for name, layer in kept.items()}
        return ChannelStatistics(
            kept,
            self.metadata,
            weight_digests={name: digest for name, digest in self.weight_digests.items() if name in kept},
            class_indices=indices,
            model_classes=self.model_classes,
        )

    def columns(self, classes: Iterable[int]) -> list[int]:
        """Find the columns that stand for classes of the model.

        Raises:
            StatisticsError: if a class is not held.
        """
        self.require("class")
        place = {index: column for column, index in enumerate(self.class_indices or range(self.classes))}
        wanted = list(classes)
        missing = next((index for index in wanted if index not in place), None)
        if missing is not None:
            held = "only some classes" if self.class_indices is not None else f"classes 0 to {self.classes - 1}"
            raise StatisticsError(
                f"The statistics hold {held}, and not class {missing}; give statistics of all classes."
            )
        return [place[index] for index in wanted]

    def require(self, selector: Literal["class", "instance"]) -> None:
        """Check that every layer holds what the selector reads; only imported statistics may lack some of it.

        Args:
            selector: `"class"` for `ClassWise`, which reads p-values per class; `"instance"` for `InstanceWise`, which
                reads the mean and standard deviation per channel.

        Raises:
            StatisticsError: if a part is missing; it names the file of the research code that holds it.
        """
        for layer in self.values():
            if isinstance(layer, RankedLayerStatistics):
                layer.require(selector)

    def compact(self, *, share: float = 0.5, test: TTest = "welch") -> "ChannelStatistics":
        """Keep the log p of the best channels of each class in place of all moments, for a file 40 times smaller.

        The selectors take it for a `quantile` up to `share`; it cannot be merged. In the file a value is one of 256
        levels, so that a few neighbours in the ranking tie.

        Args:
            share: share of the channels whose log p is kept for each class, in (0, 1].
            test: the test whose log p are kept.

        Raises:
            SettingError: if `share` is out of range or `test` unknown.
            StatisticsError: if the statistics are compact already, and of another test, or lack p-values per
                class.
        """
        self.warn_of_fallback(test)
        layers = {
            name: RankedLayerStatistics(
                mean=layer.mean,
                std=layer.std,
                shapiro_p=layer.shapiro_p,
                log_p=keep_share(layer.class_log_p(test), share),
                test=test,
                share=share,
            )
            for name, layer in self.items()
        }
        few = self.count_fallbacks(test)
        note = {"fallback": f"Student's test for {few} of {self.classes} classes"} if few else {}
        return ChannelStatistics(
            layers,
            {**self.metadata, **note},
            weight_digests=self.weight_digests,
            class_indices=self.class_indices,
            model_classes=self.model_classes,
        )

    def count_fallbacks(self, test: TTest) -> int:
        """Count the classes of fewer than two images, for which Student's test takes Welch's place."""
        layer = next(iter(self.values()))
        if test != "welch" or not isinstance(layer, LayerStatistics):
            return 0
        return int(((layer.effective_count > 0) & (layer.effective_count < 2)).sum())

    def count_empty(self) -> int:
        """Count the classes that no image is of."""
        layer = next(iter(self.values()))
        return int((layer.effective_count == 0).sum()) if isinstance(layer, LayerStatistics) else 0

    def warn_of_fallback(self, test: TTest) -> None:
        """Warn where Student's test takes Welch's place, since some classes have fewer than two images."""
        few = self.count_fallbacks(test)
        if few:
            empty = self.count_empty()
            none = f", and {empty} more have none" if empty else ""
            warn(
                f"{few} of {self.classes} classes have fewer than two images{none}; Welch's test needs two, so "
                "that Student's takes its place for them.",
                StatisticsWarning,
            )

    def check_model(self, model: nn.Module) -> None:
        """Raise `StatisticsError` naming the first layer that the model lacks, or has otherwise than here."""
        model = bare_model(model)
        convolutions = find_convolutions(model)
        for name, layer in self.items():
            if name not in convolutions:
                raise StatisticsError(
                    f"The statistics hold layer {name!r}, which {type(model).__name__} does not have; "
                    "use the model that they were collected on, or collect statistics on this one."
                )
            convolution = convolutions[name]
            if layer.channels != convolution.out_channels:
                raise StatisticsError(
                    f"The statistics of layer {name!r} have {layer.channels} channels, the layer has "
                    f"{convolution.out_channels}; they were collected on another model."
                )
            if name in self.weight_digests and self.weight_digests[name] != weight_digest(convolution):
                raise StatisticsError(
                    f"The weights of layer {name!r} are not those that the statistics were collected with; "
                    "collect statistics on this model."
                )

    def save(self, path: str | Path, *, force: bool = True) -> None:
        """Write one safetensors file; it appears only when it is whole.

        Args:
            path: the file.
            force: whether an earlier file of that name is replaced.

        Raises:
            OutputError: if the file exists and `force` is off, or cannot be written.
        """
        check_kind("path", path, (str, PathLike), "name the file to write", error=OutputError, wanted="a path")
        tensors: dict[str, Tensor] = {}
        for name, layer in self.items():
            parts = vars(layer) if isinstance(layer, LayerStatistics) else _ranked_parts(layer)
            tensors |= {f"{name}/{part}": value.contiguous() for part, value in parts.items()}
        if self.sample is not None:
            tensors |= {f"{name}/sample": rows.contiguous() for name, rows in self.sample.rows.items()}
            tensors[_KEYS] = self.sample.keys.contiguous()
        # safetensors does not keep the order of tensors.
        header = {
            "layers": [self._description(name) for name in self],
            "metadata": dict(self.metadata),
            "classes": {"indices": self.class_indices, "of": self.model_classes},
        }
        texts = {"format": _FORMAT, "format_version": _VERSION} | {k: json.dumps(v) for k, v in header.items()}
        with writing(Path(path), force=force) as temporary:
            save_file(tensors, temporary, texts)

    def _description(self, name: str) -> dict[str, object]:
        layer = self[name]
        kind = {} if isinstance(layer, LayerStatistics) else {"test": layer.test, "share": layer.share}
        return {"name": name, "weight_sha256": self.weight_digests.get(name), **kind}

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> "ChannelStatistics":
        """Read a file written by `save`. Nothing in it is executed.

        Args:
            path: the file.
            model: the model that the statistics will serve; with it, names, channels and weights of every layer are
                checked.

        Raises:
            StatisticsError: if the file is missing, cut off, of another kind or version, holds what does not fit, or
                is of another model; the layer or field is named.
        """
        remedy = "give the path of a file that save wrote"
        check_kind("path", path, (str, PathLike), remedy, error=StatisticsError, wanted="a path")
        try:
            header, tensors = read_tensors(path)
        except FileNotFoundError as error:
            raise StatisticsError(f"There is no statistics file {str(path)!r}; check the path.") from error
        except (OSError, ValueError) as error:
            if Path(path).is_dir():
                raise StatisticsError(f"{str(path)!r} is a folder; give a statistics file in it.") from error
            raise StatisticsError(
                f"{str(path)!r} cannot be read as channel statistics ({reason_of(error)}); it may be cut off or of "
                "another kind."
            ) from error
        if header.get("format") != _FORMAT:
            raise StatisticsError(f"{str(path)!r} holds no channel statistics; collect some, or give another file.")
        if header.get("format_version") != _VERSION:
            raise StatisticsError(
                f"{str(path)!r} has format version {header.get('format_version')!r}, this release reads {_VERSION!r}; "
                "collect the statistics again, or install the release that wrote them."
            )
        described, metadata, classes = (_json(header, name, path) for name in ("layers", "metadata", "classes"))
        if not (_is_layer_list(described) and isinstance(metadata, dict) and isinstance(classes, dict)):
            raise StatisticsError(f"The header of {str(path)!r} is damaged; collect the statistics again.")
        layers = {str(entry["name"]): _layer_from(tensors, entry, path) for entry in described}
        if len(layers) < len(described):
            raise StatisticsError(f"A layer stands twice in the header of {str(path)!r}; collect the statistics again.")
        digests = {str(entry["name"]): str(entry["weight_sha256"]) for entry in described if entry.get("weight_sha256")}
        indices, outputs = classes.get("indices"), classes.get("of")
        if (
            not (indices is None or _is_list_of(indices, int))
            or not isinstance(outputs, int)
            or outputs > _MOST_CLASSES
        ):
            raise StatisticsError(
                f"The field 'classes' in the header of {str(path)!r} is damaged; collect the statistics again."
            )
        sample = None
        if _KEYS in tensors:
            rows = {name: tensors[f"{name}/sample"] for name in layers if f"{name}/sample" in tensors}
            sample = RowSample(keys=tensors[_KEYS], rows=rows)
        try:
            statistics = cls(
                layers,
                {str(name): str(value) for name, value in metadata.items()},
                weight_digests=digests,
                class_indices=None if indices is None else tuple(indices),
                model_classes=outputs,
                sample=sample,
            )
        except StatisticsError as error:
            raise StatisticsError(f"{str(path)!r} does not fit: {error}") from error
        if model is not None:
            statistics.check_model(model)
        return statistics

    @classmethod
    def bundled(cls, name: str) -> "ChannelStatistics":
        """Load the compact statistics that come with this package for a model of `load_model`.

        Raises:
            StatisticsError: if none come for this model.

        Example:
            >>> statistics = ChannelStatistics.bundled("efficientnet_lite0")
            >>> statistics.classes, list(statistics)[-1]
            (1000, 'conv_head')
        """
        folder = resources.files("parchgrad.statistics") / "bundled"
        names = sorted(entry.name.removesuffix(_SUFFIX) for entry in folder.iterdir() if entry.name.endswith(_SUFFIX))
        if name not in names:
            raise StatisticsError(
                f"No channel statistics come with this package for {name!r}, only for {', '.join(names)}; collect "
                f"some with `parchgrad stats collect --model {name} --data FOLDER -o FILE`, and give that file."
            )
        with resources.as_file(folder / f"{name}{_SUFFIX}") as path:
            return cls.load(path)


def _ranked_parts(layer: RankedLayerStatistics) -> dict[str, Tensor]:
    """What a file holds of a layer: float32, and log p in a compact form where little is lost by it."""
    held = {name: value for name in PICKLES if (value := getattr(layer, name)) is not None}
    if "log_p" in held and layer.share < 1:
        held |= compact_log_p(held.pop("log_p"))
    return {name: value.float() if name in PICKLES else value for name, value in held.items()}


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)


def _is_layer_list(value: object) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and all(isinstance(entry, dict) and "name" in entry for entry in value)


def _json(header: Mapping[str, str], name: str, path: str | Path) -> object:
    try:
        value: object = json.loads(header[name])
    except (KeyError, ValueError, RecursionError) as error:
        raise StatisticsError(
            f"The field {name!r} in the header of {str(path)!r} is damaged; collect the statistics again."
        ) from error
    return value


def _layer_from(tensors: Mapping[str, Tensor], entry: Mapping[str, Any], path: str | Path) -> AnyLayerStatistics:
    """One layer of a file; `entry` is its description in the header."""
    layer = str(entry["name"])
    ranked = "test" in entry
    share = entry.get("share", 1.0)
    parts: tuple[str, ...] = tuple(field.name for field in fields(LayerStatistics))
    if ranked:
        parts = ("shapiro_p", *(COMPACT_PARTS if share != 1 else ()))
    missing = next((part for part in parts if f"{layer}/{part}" not in tensors), None)
    if missing is not None:
        raise StatisticsError(f"Layer {layer!r} in {str(path)!r} lacks {missing!r}; collect the statistics again.")
    found = {part: tensors[f"{layer}/{part}"] for part in parts}
    try:
        if not ranked:
            return LayerStatistics(**found)
        compact = {part: found.pop(part) for part in COMPACT_PARTS if part in found}
        # Statistics imported from the research code may lack what one of the selectors reads.
        found |= {part: tensors[f"{layer}/{part}"] for part in PICKLES if f"{layer}/{part}" in tensors}
        if compact:
            found["log_p"] = expand_log_p(compact, found["shapiro_p"].numel())
        return RankedLayerStatistics(**found, test=entry["test"], share=share)
    except (StatisticsError, SettingError) as error:
        raise StatisticsError(f"Layer {layer!r} in {str(path)!r} does not fit: {error}") from error
    except TypeError as error:
        raise StatisticsError(
            f"Layer {layer!r} in {str(path)!r} is described wrongly ({reason_of(error)}); collect again."
        ) from error
