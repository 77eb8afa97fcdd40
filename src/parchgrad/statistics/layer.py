"""Statistics of one convolution, in read-only containers that validate their arrays."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor

from parchgrad.errors import StatisticsError
from parchgrad.statistics.compact import check_share
from parchgrad.statistics.t_tests import TTest, check_test, class_log_p

__all__ = ["PARTS_READ", "PICKLES", "AnyLayerStatistics", "LayerStatistics", "RankedLayerStatistics"]

PICKLES: Mapping[str, str] = {
    "log_p": "cls_p_values.pkl",
    "shapiro_p": "shapiro_p_values.pkl",
    "mean": "gap_mean.pkl",
    "std": "gap_std.pkl",
}
"""File of the original research code for each field of `RankedLayerStatistics`."""

PARTS_READ: Mapping[Literal["class", "instance"], tuple[str, ...]] = {
    "class": ("log_p", "shapiro_p"),
    "instance": ("shapiro_p", "mean", "std"),
}
"""Fields of `RankedLayerStatistics` that each selector needs."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerStatistics:
    """Statistics of one convolution's C channels over a data set of K classes.

    All values describe the GAP of a channel, the mean over space of relu(output). Arrays are float64 on the CPU.

    Attributes:
        count: number of images, shape ().
        mean: mean per channel, shape (C,).
        std: unbiased standard deviation per channel, shape (C,).
        class_count: number of images per class, shape (K,); the sum of their weights for predicted labels.
        class_mean: mean per channel and class, shape (C, K).
        class_variance: unbiased variance per channel and class, shape (C, K).
        shapiro_p: Shapiro-Wilk p-value per channel, in [0, 1], shape (C,).
        class_square: sum of squared weights per class, shape (K,); equals `class_count` for weights of zero or one.

    Raises:
        StatisticsError: if a shape does not match the others, or a value is not finite or out of range.

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
    class_square: Tensor = None  # type: ignore[assignment]  # __post_init__ replaces None by class_count

    def __post_init__(self) -> None:
        if self.class_square is None:
            object.__setattr__(self, "class_square", self.class_count)
        _copy_to_float64(self, [entry.name for entry in fields(self)])
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
        if channels < 1 or classes < 1:
            raise StatisticsError(f"There are {channels} channels and {classes} classes, but both must be positive.")
        # The variance of a class with at most one effective image is undefined and never read.
        has_variance = self.class_count.square() > self.class_square
        for name, shape in shapes.items():
            value = getattr(self, name)
            _check_shape(name, value, shape, channels, classes)
            highest = {"shapiro_p": 1.0, "class_variance": _LARGEST_SQUARE}.get(name, _LARGEST)
            lowest = -_LARGEST if name.endswith("mean") else 0.0
            _check_values(name, value[:, has_variance] if name == "class_variance" else value, lowest, highest)

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return self.mean.numel()

    @property
    def classes(self) -> int:
        """Number of classes K."""
        return self.class_count.numel()

    @property
    def effective_count(self) -> Tensor:
        """Effective number of images per class (Kish 1965), shape (K,); `class_count` for weights of zero or one."""
        return torch.where(self.class_square > 0, self.class_count.square() / self.class_square, 0.0)

    def class_log_p(self, test: TTest = "welch") -> Tensor:
        """Compute natural log p of "this channel is larger on this class than on the others", shape (C, K), float64.

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

    def restricted(self, classes: Sequence[int]) -> "LayerStatistics":
        """Keep the columns of some classes; `count`, `mean` and `std` still cover all, as the tests need."""
        index = list(classes)
        changes = {name: getattr(self, name)[..., index] for name in _CLASS_FIELDS}
        return LayerStatistics(**{entry.name: getattr(self, entry.name) for entry in fields(self)} | changes)


_CLASS_FIELDS = ("class_count", "class_square", "class_mean", "class_variance")


@dataclass(frozen=True, eq=False, kw_only=True)
class RankedLayerStatistics:
    """Statistics of one convolution with log p per class instead of the class moments.

    Compact files and files of the original research code contain these. The selectors accept them like any other
    statistics, but they cannot be merged or re-tested. A field that only one selector needs may be missing.

    Attributes:
        mean: mean of the GAP per channel, shape (C,); None if missing.
        std: unbiased standard deviation per channel, shape (C,); None if missing.
        shapiro_p: Shapiro-Wilk p-value per channel, in [0, 1], shape (C,).
        log_p: natural log of the p-value per channel and class, shape (C, K), float32; 0 where not kept. None if
            missing.
        test: the t-test behind `log_p`.
        share: share of channels, the best ones, whose log p is kept for each class, in (0, 1].

    Raises:
        SettingError: if `test` or `share` is out of range.
        StatisticsError: if a shape does not match the others, or a value is not finite or out of range.

    Example:
        >>> layer = RankedLayerStatistics(
        ...     mean=torch.zeros(2), std=torch.ones(2), shapiro_p=torch.zeros(2), test="welch",
        ...     log_p=torch.tensor([[-9.0, -0.1, -3.0], [-0.2, -4.0, -5.0]]))
        >>> layer.channels, layer.classes
        (2, 3)
    """

    mean: Tensor | None = None
    std: Tensor | None = None
    shapiro_p: Tensor
    log_p: Tensor | None = None
    test: TTest
    share: float = 1.0

    def __post_init__(self) -> None:
        check_test(self.test)
        check_share(self.share)
        _copy_to_float64(self, [name for name in PICKLES if getattr(self, name) is not None])
        size: tuple[int, ...] = ()
        if self.log_p is not None:
            object.__setattr__(self, "log_p", self.log_p.float())
            size = self.log_p.shape
        classes = size[1] if len(size) == 2 else 0
        if self.channels < 1 or (len(size) == 2 and classes < 1):
            raise StatisticsError(
                f"There are {self.channels} channels and {classes} classes, but both must be positive."
            )
        per_channel = (self.channels,)
        for name, shape, lowest, highest in (
            ("mean", per_channel, -torch.inf, torch.inf),
            ("std", per_channel, 0.0, torch.inf),
            ("shapiro_p", per_channel, 0.0, 1.0),
            ("log_p", (self.channels, classes), -torch.inf, 0.0),
        ):
            value = getattr(self, name)
            if value is not None:
                _check_shape(name, value, shape, self.channels, classes)
                _check_values(name, value, lowest, highest)

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return self.shapiro_p.numel()

    @property
    def classes(self) -> int:
        """Number of classes K; 0 if `log_p` is missing."""
        return 0 if self.log_p is None else self.log_p.shape[1]

    def require(self, selector: Literal["class", "instance"]) -> None:
        """Raise `StatisticsError`, naming the file, if a field that the selector needs is missing."""
        missing = [PICKLES[part] for part in PARTS_READ[selector] if getattr(self, part) is None]
        if missing:
            what = "p-values per class" if selector == "class" else "the mean and standard deviation per channel"
            raise StatisticsError(
                f"The statistics lack {what}: they were imported without {' and '.join(map(repr, missing))}. "
                f"Import them from a folder with {'this file' if len(missing) == 1 else 'both files'}, or collect new "
                "statistics."
            )

    def class_log_p(self, test: TTest = "welch") -> Tensor:
        """Return the stored log p, shape (C, K), in float64.

        Raises:
            StatisticsError: if `test` is not the stored one, or `log_p` is missing.
        """
        check_test(test)
        self.require("class")
        if test != self.test:
            raise StatisticsError(
                f"`test` is {test!r}, but the statistics only contain p-values of the {self.test!r} test. "
                f"Use `test={self.test!r}`, or collect the statistics again."
            )
        return cast(Tensor, self.log_p).double()

    def restricted(self, classes: Sequence[int]) -> "RankedLayerStatistics":
        """Keep the columns of some classes."""
        changes = {"log_p": self.class_log_p(self.test)[:, list(classes)]}
        return RankedLayerStatistics(**{entry.name: getattr(self, entry.name) for entry in fields(self)} | changes)


# Far above the float32 range; the t-tests square squares, which would overflow float64 for larger values.
_LARGEST = 1e60
_LARGEST_SQUARE = 1e120
_NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)
AnyLayerStatistics: TypeAlias = LayerStatistics | RankedLayerStatistics


def _copy_to_float64(layer: AnyLayerStatistics, names: Iterable[str]) -> None:
    for name in names:
        given = torch.as_tensor(getattr(layer, name), device="cpu").detach()
        if given.dtype not in _NUMBERS or given.layout is not torch.strided:
            raise StatisticsError(f"`{name}` is {given.dtype}, {given.layout}. Pass a dense, real-valued array.")
        object.__setattr__(layer, name, given.to("cpu", torch.float64, copy=True))


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...], channels: int, classes: int) -> None:
    if tuple(value.shape) != shape:
        raise StatisticsError(
            f"`{name}` has shape {tuple(value.shape)}, but {channels} channels and {classes} classes "
            f"need {shape}. Pass arrays of one layer."
        )


def _check_values(name: str, value: Tensor, lowest: float, highest: float) -> None:
    if not torch.isfinite(value).all():
        raise StatisticsError(f"`{name}` contains NaN or infinite values. Collect the statistics again.")
    if bool(((value < lowest) | (value > highest)).any()):
        raise StatisticsError(f"`{name}` has values outside [{lowest}, {highest}]. Collect the statistics again.")
