"""Channel statistics of a model and their safetensors file."""

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

from parchgrad._io.checks import check_kind, is_whole_number
from parchgrad._io.files import writing
from parchgrad._io.tensors import read_tensors
from parchgrad.core.layers import Convolution, bare_model, find_convolutions
from parchgrad.errors import OutputError, SettingError, StatisticsError, StatisticsWarning, reason_of, warn
from parchgrad.statistics.compact import COMPACT_PARTS, compact_log_p, expand_log_p, keep_share
from parchgrad.statistics.layer import PICKLES, AnyLayerStatistics, LayerStatistics, RankedLayerStatistics
from parchgrad.statistics.t_tests import TTest

__all__ = ["ChannelStatistics", "RowSample", "weight_digest"]

_FORMAT = "parchgrad channel statistics"
_VERSION = "1"
_SUFFIX = ".safetensors"
# More than any classifier has; a larger number in a file would exhaust memory.
_MOST_CLASSES = 1_000_000
# Cannot clash with a layer: module names contain no colon.
_KEYS = ":keys"
_VIEWS = ("layers", "metadata", "weight_digests")


@dataclass(frozen=True, eq=False, kw_only=True)
class RowSample:
    """The random sample of at most 5,000 images behind the normality test; merging needs it again.

    Attributes:
        keys: random key by which each image was sampled, shape (N,), int64.
        rows: GAPs of these images by layer, each (N, C).
    """

    keys: Tensor
    rows: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", MappingProxyType(dict(self.rows)))

    def __getstate__(self) -> dict[str, Any]:
        """Replace the read-only view, which cannot be pickled, by a plain dict."""
        return {**vars(self), "rows": dict(self.rows)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the read-only view."""
        vars(self).update(state, rows=MappingProxyType(state["rows"]))


def weight_digest(convolution: Convolution) -> str:
    """Compute the SHA-256 of a convolution's weight, independent of device and wider dtypes.

    Example:
        >>> convolution = nn.Conv2d(3, 8, 3)
        >>> weight_digest(convolution) == weight_digest(convolution.double())
        True
    """
    values = convolution.weight.detach().to("cpu", torch.float64).contiguous().numpy()
    return hashlib.sha256(str(values.shape).encode() + values.tobytes()).hexdigest()


@dataclass(frozen=True, eq=False, repr=False)
class ChannelStatistics(Mapping[str, AnyLayerStatistics]):
    """A read-only mapping from layer name to statistics, all over the same classes.

    Attributes:
        layers: statistics by the layer's name in the model.
        metadata: provenance, text by name: `model`, `preprocessing`, `data`, `labels`, `images`.
        weight_digests: SHA-256 of each convolution's weight by layer name, where known.
        class_indices: the model's class of each column; None for all classes.
        sample: the sampled images; None if the statistics cannot be merged.
        model_classes: number of classes of the model; defaults to the number of columns.

    Raises:
        StatisticsError: if there is no layer, or layers differ in the number of classes.

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
        """Replace the read-only views, which cannot be pickled, by plain dicts."""
        return {**vars(self), **{name: dict(getattr(self, name)) for name in _VIEWS}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the read-only views."""
        vars(self).update(state, **{name: MappingProxyType(state[name]) for name in _VIEWS})

    def __post_init__(self) -> None:
        for name in _VIEWS:
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        if not self.layers:
            raise StatisticsError(
                "Channel statistics need at least one layer, but none is given. Collect them, or load a file."
            )
        for name, layer in self.layers.items():
            if layer.classes != self.classes:
                raise StatisticsError(
                    f"Layer {name!r} has statistics of {layer.classes} classes, but the first layer of {self.classes}. "
                    "All layers must come from one collection."
                )
        first = next(iter(self.layers.values()))
        for name, layer in self.layers.items():
            if isinstance(first, LayerStatistics) and isinstance(layer, LayerStatistics) and layer.count != first.count:
                raise StatisticsError(
                    f"Layer {name!r} has statistics of {layer.count:.0f} images, but the first layer of "
                    f"{first.count:.0f}. All layers must come from one collection."
                )
        if not self.model_classes:
            object.__setattr__(self, "model_classes", self.classes)
        indices = self.class_indices
        if indices is None and self.model_classes != self.classes:
            raise StatisticsError(
                f"The statistics have {self.classes} classes, but the model has {self.model_classes}. "
                "Pass `class_indices=` to say which they are."
            )
        if indices is not None and (
            len(indices) != self.classes
            or list(indices) != sorted(set(indices))
            or not all(0 <= i < self.model_classes for i in indices)
        ):
            raise StatisticsError(
                f"`class_indices` must be {self.classes} ascending classes from 0 to {self.model_classes - 1}, "
                f"but {len(indices)} are given: {indices[:10]}."
            )
        if self.sample is not None:
            self._check_sample(self.sample)

    def _check_sample(self, sample: RowSample) -> None:
        if sample.keys.dtype != torch.int64 or sample.keys.dim() != 1:
            raise StatisticsError(
                f"The keys of the sampled images are {sample.keys.dtype} of shape {tuple(sample.keys.shape)}, but must "
                "be int64 of shape (N,). Collect the statistics again."
            )
        for name, layer in self.layers.items():
            shape = (len(sample.keys), layer.channels)
            if name not in sample.rows or tuple(sample.rows[name].shape) != shape:
                raise StatisticsError(
                    f"The sampled images of layer {name!r} must be rows of shape {shape}, one per key. Collect the "
                    "statistics again."
                )
            if sample.rows[name].dtype not in (torch.float32, torch.float64):
                raise StatisticsError(
                    f"The sampled images of layer {name!r} are {sample.rows[name].dtype}, not float32. Convert them."
                )
            if not torch.isfinite(sample.rows[name]).all():
                raise StatisticsError(
                    f"The sampled images of layer {name!r} contain NaN or infinite values. Collect the statistics "
                    "again."
                )

    @property
    def classes(self) -> int:
        """Number of classes K in the statistics, the same in every layer; 0 without p-values per class."""
        return next(iter(self.layers.values())).classes

    @property
    def test(self) -> TTest:
        """The test of compact or imported statistics; `"welch"` for full ones, which support any test."""
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
        """Keep only some layers or classes, for a smaller file that cannot be merged.

        Args:
            layers: names of layers, kept in the current order; None keeps all.
            classes: class indices of the model; None keeps all.

        Raises:
            StatisticsError: if the statistics lack a layer or class.
        """
        for name, value, kind in (("layers", layers, "names of layers"), ("classes", classes, "class indices")):
            if value is not None and (isinstance(value, str) or not isinstance(value, Iterable)):
                raise StatisticsError(
                    f"`{name}` is {value!r}, but it must be a list of {kind}. `choose_layers(model, ...)` returns the "
                    "names for a ratio or pattern; pass one class as `[index]`."
                )
        wanted = list(self) if layers is None else list(layers)
        unknown = set(wanted) - set(self.layers)
        if unknown:
            raise StatisticsError(f"The statistics have no layer {min(unknown)!r}. Choose from {', '.join(self)}.")
        kept = {name: self[name] for name in self if name in set(wanted)}
        indices = self.class_indices
        if classes is not None:
            listed = classes.tolist() if isinstance(classes, Tensor) else classes
            # NumPy's integers cannot be written to a file's metadata.
            indices = tuple(sorted({int(index) if is_whole_number(index) else index for index in listed}))
            if not indices:
                raise StatisticsError("`classes` is empty. Pass at least one class.")
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
        """Find the columns of classes of the model.

        Raises:
            StatisticsError: if a class is missing.
        """
        self.require("class")
        place = {index: column for column, index in enumerate(self.class_indices or range(self.classes))}
        wanted = list(classes)
        missing = next((index for index in wanted if index not in place), None)
        if missing is not None:
            held = "only some classes" if self.class_indices is not None else f"classes 0 to {self.classes - 1}"
            raise StatisticsError(
                f"The statistics contain {held}, but not class {missing}. Use statistics of all classes."
            )
        return [place[index] for index in wanted]

    def require(self, selector: Literal["class", "instance"]) -> None:
        """Check that every layer has what the selector needs; only imported statistics may lack some of it.

        Args:
            selector: `"class"` for `ClassWise`, which needs p-values per class; `"instance"` for `InstanceWise`, which
                needs the mean and standard deviation per channel.

        Raises:
            StatisticsError: if a part is missing; it names the research code's file for it.
        """
        for layer in self.values():
            if isinstance(layer, RankedLayerStatistics):
                layer.require(selector)

    def compact(self, *, share: float = 0.5, test: TTest = "welch") -> "ChannelStatistics":
        """Keep only the log p of the best channels of each class, for a file 40 times smaller.

        The selectors accept the result for a `quantile` up to `share`; it cannot be merged. The file stores values at
        256 levels, so a few neighbours in the ranking tie.

        Args:
            share: share of channels whose log p is kept for each class, in (0, 1].
            test: the t-test.

        Raises:
            SettingError: if `share` is out of range or `test` unknown.
            StatisticsError: if the statistics are already compact with another test, or lack p-values per class.
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
        """Count the classes with fewer than two images, which use Student's test instead of Welch's."""
        layer = next(iter(self.values()))
        if test != "welch" or not isinstance(layer, LayerStatistics):
            return 0
        return int(((layer.effective_count > 0) & (layer.effective_count < 2)).sum())

    def count_empty(self) -> int:
        """Count the classes without images."""
        layer = next(iter(self.values()))
        return int((layer.effective_count == 0).sum()) if isinstance(layer, LayerStatistics) else 0

    def warn_of_fallback(self, test: TTest) -> None:
        """Warn if some classes have too few images for Welch's test."""
        few = self.count_fallbacks(test)
        if few:
            empty = self.count_empty()
            none = f", and {empty} more have none" if empty else ""
            warn(
                f"{few} of {self.classes} classes have fewer than two images{none}. Student's test is used for them, "
                "since Welch's needs two.",
                StatisticsWarning,
            )

    def check_model(self, model: nn.Module) -> None:
        """Raise `StatisticsError` naming the first layer that does not match the model."""
        model = bare_model(model)
        convolutions = find_convolutions(model)
        for name, layer in self.items():
            if name not in convolutions:
                raise StatisticsError(
                    f"{type(model).__name__} has no layer {name!r}, but the statistics do. "
                    "Use the model that they were collected on, or collect statistics on this one."
                )
            convolution = convolutions[name]
            if layer.channels != convolution.out_channels:
                raise StatisticsError(
                    f"The statistics of layer {name!r} have {layer.channels} channels, but the layer has "
                    f"{convolution.out_channels}. Collect statistics on this model."
                )
            if name in self.weight_digests and self.weight_digests[name] != weight_digest(convolution):
                raise StatisticsError(
                    f"The statistics were collected with other weights of layer {name!r}. "
                    "Collect statistics on this model."
                )

    def save(self, path: str | Path, *, force: bool = True) -> None:
        """Write one safetensors file, atomically.

        Args:
            path: the file.
            force: whether to replace an existing file.

        Raises:
            OutputError: if the file exists and `force` is False, or it cannot be written.
        """
        check_kind("`path`", path, (str, PathLike), "Name the file to write", error=OutputError, wanted="a path")
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
            model: if given, check names, channels and weights of every layer against this model.

        Raises:
            StatisticsError: if the file is missing, truncated, inconsistent, of another kind or version, or belongs to
                another model; names the layer or field.
        """
        remedy = "Pass the path of a file written by `save`"
        check_kind("`path`", path, (str, PathLike), remedy, error=StatisticsError, wanted="a path")
        try:
            header, tensors = read_tensors(path)
        except FileNotFoundError as error:
            raise StatisticsError(f"There is no statistics file {str(path)!r}. Check the path.") from error
        except (OSError, ValueError) as error:
            if Path(path).is_dir():
                raise StatisticsError(f"{str(path)!r} is a folder. Pass a statistics file in it.") from error
            raise StatisticsError(
                f"Cannot read {str(path)!r} as channel statistics ({reason_of(error)}). The file may be truncated or "
                "of another kind."
            ) from error
        if header.get("format") != _FORMAT:
            raise StatisticsError(f"{str(path)!r} contains no channel statistics. Collect some, or pass another file.")
        if header.get("format_version") != _VERSION:
            raise StatisticsError(
                f"{str(path)!r} has format version {header.get('format_version')!r}, but this release reads "
                f"{_VERSION!r}. Collect the statistics again, or install the release that wrote them."
            )
        described, metadata, classes = (_json(header, name, path) for name in ("layers", "metadata", "classes"))
        if not (_is_layer_list(described) and isinstance(metadata, dict) and isinstance(classes, dict)):
            raise StatisticsError(f"The header of {str(path)!r} is damaged. Collect the statistics again.")
        layers = {str(entry["name"]): _layer_from(tensors, entry, path) for entry in described}
        if len(layers) < len(described):
            raise StatisticsError(f"The header of {str(path)!r} lists a layer twice. Collect the statistics again.")
        digests = {str(entry["name"]): str(entry["weight_sha256"]) for entry in described if entry.get("weight_sha256")}
        indices, outputs = classes.get("indices"), classes.get("of")
        if (
            not (indices is None or _is_list_of(indices, int))
            or not isinstance(outputs, int)
            or outputs > _MOST_CLASSES
        ):
            raise StatisticsError(
                f"The field 'classes' in the header of {str(path)!r} is damaged. Collect the statistics again."
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
        """Load the compact statistics bundled with this package for a model of `load_model`.

        Raises:
            StatisticsError: if there are none for this model.

        Example:
            >>> statistics = ChannelStatistics.bundled("efficientnet_lite0")
            >>> statistics.classes, list(statistics)[-1]
            (1000, 'conv_head')
        """
        folder = resources.files("parchgrad.statistics") / "bundled"
        names = sorted(entry.name.removesuffix(_SUFFIX) for entry in folder.iterdir() if entry.name.endswith(_SUFFIX))
        if name not in names:
            raise StatisticsError(
                f"This package has no channel statistics for {name!r}, only for {', '.join(names)}. Collect some with "
                f"`parchgrad stats collect --model {name} --data FOLDER -o FILE`, and pass `statistics=FILE`."
            )
        with resources.as_file(folder / f"{name}{_SUFFIX}") as path:
            return cls.load(path)


def _ranked_parts(layer: RankedLayerStatistics) -> dict[str, Tensor]:
    """Return a layer's tensors for the file: float32, and compact log p if only some channels are kept."""
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
            f"The field {name!r} in the header of {str(path)!r} is damaged. Collect the statistics again."
        ) from error
    return value


def _layer_from(tensors: Mapping[str, Tensor], entry: Mapping[str, Any], path: str | Path) -> AnyLayerStatistics:
    """Build one layer from a file; `entry` is its description in the header."""
    layer = str(entry["name"])
    ranked = "test" in entry
    share = entry.get("share", 1.0)
    parts: tuple[str, ...] = tuple(field.name for field in fields(LayerStatistics))
    if ranked:
        parts = ("shapiro_p", *(COMPACT_PARTS if share != 1 else ()))
    missing = next((part for part in parts if f"{layer}/{part}" not in tensors), None)
    if missing is not None:
        raise StatisticsError(f"Layer {layer!r} in {str(path)!r} lacks {missing!r}. Collect the statistics again.")
    found = {part: tensors[f"{layer}/{part}"] for part in parts}
    try:
        if not ranked:
            return LayerStatistics(**found)
        compact = {part: found.pop(part) for part in COMPACT_PARTS if part in found}
        # Imported statistics may lack what one of the selectors needs.
        found |= {part: tensors[f"{layer}/{part}"] for part in PICKLES if f"{layer}/{part}" in tensors}
        if compact:
            found["log_p"] = expand_log_p(compact, found["shapiro_p"].numel())
        return RankedLayerStatistics(**found, test=entry["test"], share=share)
    except (StatisticsError, SettingError) as error:
        raise StatisticsError(f"Layer {layer!r} in {str(path)!r} does not fit: {error}") from error
    except TypeError as error:
        raise StatisticsError(
            f"The header entry of layer {layer!r} in {str(path)!r} is invalid ({reason_of(error)}). Collect the "
            "statistics again."
        ) from error
