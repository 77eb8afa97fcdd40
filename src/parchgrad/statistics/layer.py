"""Statistics of one convolution, as read-only containers whose arrays are checked."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor

from parchgrad.errors import StatisticsError
from parchgrad.statistics.compact import check_share
from parchgrad.statistics.tests import TTest, check_test, class_log_p

__all__ = ["PARTS_READ", "PICKLES", "AnyLayerStatistics", "LayerStatistics", "RankedLayerStatistics"]

PICKLES: Mapping[str, str] = {
    "log_p": "cls_p_values.pkl",
    "shapiro_p": "shapiro_p_values.pkl",
    "mean": "gap_mean.pkl",
    "std": "gap_std.pkl",
}
"""Files of the original research code by the field of `RankedLayerStatistics` that they fill."""

PARTS_READ: Mapping[Literal["class", "instance"], tuple[str, ...]] = {
    "class": ("log_p", "shapiro_p"),
    "instance": ("shapiro_p", "mean", "std"),
}
"""Fields of `RankedLayerStatistics` that each selector reads."""


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
            raise StatisticsError(f"There are {channels} channels and {classes} classes; there must be some.")
        # A class with no more than one effective image has no variance; such entries are not read.
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
        """Effective number of images per class (Kish 1965), shape (K,); `class_count` where weights are zero or one."""
        return torch.where(self.class_square > 0, self.class_count.square() / self.class_square, 0.0)

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

    def restricted(self, classes: Sequence[int]) -> "LayerStatistics":
        """Keep the columns of some classes; the others stay in `count`, `mean` and `std`, which the tests need."""
        index = list(classes)
        changes = {name: getattr(self, name)[..., index] for name in _CLASS_FIELDS}
        return LayerStatistics(**{entry.name: getattr(self, entry.name) for entry in fields(self)} | changes)


_CLASS_FIELDS = ("class_count", "class_square", "class_mean", "class_variance")


@dataclass(frozen=True, eq=False, kw_only=True)
class RankedLayerStatistics:
    """Statistics of one convolution whose class tests are done: log p in place of the moments of each class.

    What compact files and files of the original research code hold. Such statistics serve the selectors like any
    other, but cannot be merged, nor tested in another way. A part that only one selector reads may be missing.

    Attributes:
        mean: mean of the GAP per channel, shape (C,); None if missing.
        std: unbiased standard deviation per channel, shape (C,); None if missing.
        shapiro_p: Shapiro-Wilk p-value per channel, in [0, 1], shape (C,).
        log_p: natural log of the p-value per channel and class, shape (C, K), float32; 0 where it is not held. None if
            missing.
        test: the test that it comes from.
        share: share of the channels whose log p is held for each class, the best ones, in (0, 1].

    Raises:
        SettingError: if `test` or `share` is out of range.
        StatisticsError: if a shape does not fit the others, or a number is not finite or out of its range.

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
            raise StatisticsError(f"There are {self.channels} channels and {classes} classes; there must be some.")
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
        """Raise `StatisticsError` if a part that the selector reads is missing, and name its file."""
        missing = [PICKLES[part] for part in PARTS_READ[selector] if getattr(self, part) is None]
        if missing:
            what = "p-values per class" if selector == "class" else "the mean and standard deviation per channel"
            raise StatisticsError(
                f"The statistics lack {what}: they were imported without {' and '.join(map(repr, missing))}; "
                f"import them from a folder that holds {'it' if len(missing) == 1 else 'both'}, or collect new "
                "statistics."
            )

    def class_log_p(self, test: TTest = "welch") -> Tensor:
        """Log p as it is held, shape (C, K), in float64.

        Raises:
            StatisticsError: if `test` is another than the one it comes from, or `log_p` is missing.
        """
        check_test(test)
        self.require("class")
        if test != self.test:
            raise StatisticsError(
                f"The statistics hold p-values of the {self.test} test only, but {test!r} is asked for; "
                f"use test={self.test!r}, or collect the statistics again."
            )
        return cast(Tensor, self.log_p).double()

    def restricted(self, classes: Sequence[int]) -> "RankedLayerStatistics":
        """Keep the columns of some classes."""
        changes = {"log_p": self.class_log_p(self.test)[:, list(classes)]}
        return RankedLayerStatistics(**{entry.name: getattr(self, entry.name) for entry in fields(self)} | changes)


# Far beyond what float32 holds; the t-tests take squares of squares, which float64 holds of no more.
_LARGEST = 1e60
_LARGEST_SQUARE = 1e120
_NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)
AnyLayerStatistics: TypeAlias = LayerStatistics | RankedLayerStatistics


def _copy_to_float64(layer: AnyLayerStatistics, names: Iterable[str]) -> None:
    for name in names:
        given = torch.as_tensor(getattr(layer, name)).detach()
        if given.dtype not in _NUMBERS or given.layout is not torch.strided:
            raise StatisticsError(f"{name} is {given.dtype}, {given.layout}; give dense real numbers.")
        object.__setattr__(layer, name, given.to("cpu", torch.float64, copy=True))


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...], channels: int, classes: int) -> None:
    if tuple(value.shape) != shape:
        raise StatisticsError(
            f"{name} has shape {tuple(value.shape)}, but {channels} channels and {classes} classes "
            f"need {shape}; give arrays that belong to one layer."
        )


def _check_values(name: str, value: Tensor, lowest: float, highest: float) -> None:
    if not torch.isfinite(value).all():
        raise StatisticsError(f"{name} holds values that are not finite; collect the statistics again.")
    if bool(((value < lowest) | (value > highest)).any()):
        raise StatisticsError(f"{name} holds values outside [{lowest}, {highest}]; collect the statistics again.")
