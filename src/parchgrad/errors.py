"""Errors and warnings of parchgrad. Every error derives from `ParchGradError` and from a built-in exception."""

import sys
import warnings

__all__ = [
    "BlockError",
    "ImageError",
    "InputError",
    "LayerError",
    "MissingExtraError",
    "ModelError",
    "ModelWarning",
    "NonFiniteError",
    "OutputError",
    "ParchGradError",
    "SettingError",
    "StatisticsError",
    "StatisticsWarning",
    "TargetError",
    "WeightsError",
    "on_one_line",
    "reason_of",
    "warn",
]

# Maximum length of a quoted reason and of a whole message: text from a file may be of any length.
_LONGEST_REASON = 200
_LONGEST = 1000
# Packages whose frames `warn` skips to find the user's line.
_BETWEEN = {"parchgrad", "torch", "captum", "dataclasses", "contextlib"}


class ParchGradError(Exception):
    """Base class of this package's errors. Messages say what is wrong and how to fix it.

    A message is always one line of limited length, even if it quotes a file.
    """

    def __str__(self) -> str:
        line = on_one_line(super().__str__())
        # The remedy is at the end.
        return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"


class SettingError(ParchGradError, ValueError):
    """A setting is out of range, unknown, or contradicts another.

    Common causes: a share given in percent, a number given as a string, a misspelt name, or another method's option.
    """


class LayerError(ParchGradError, ValueError):
    """The chosen layers do not exist in the model, or are neither convolutions nor linear layers.

    Common causes: a pattern written for another architecture, or modules taken from a copy of the model.
    """


class ModelError(ParchGradError, ValueError):
    """The model cannot be explained as it is: unknown name, training mode, no convolution, unexpected output.

    Common causes: `model.eval()` was not called, a classifier was passed instead of its `.model`, or the model returns
    a dict or a spatial map.
    """


class InputError(ParchGradError, ValueError):
    """A tensor, a map, a settings file or the rows of a run cannot be used.

    Common causes: a missing batch dimension, channels in the last dimension, integer inputs that were not preprocessed,
    or a division by zero.
    """


class NonFiniteError(ParchGradError, ArithmeticError):
    """Scores or maps are NaN or infinite although the input is finite; the message names the layer where it began."""


class BlockError(ParchGradError, RuntimeError):
    """A `ParchGrad` block was entered twice, or left in another thread or task than it was entered in."""


class TargetError(ParchGradError, ValueError):
    """The class to explain does not exist, or does not fit the batch.

    Common causes: labels that count from 1 or belong to another data set, or not one target per row.
    """


class StatisticsError(ParchGradError, ValueError):
    """Channel statistics are missing, malformed, or belong to another model.

    Common causes: they were collected before further training, on other layers, or on data with other classes.
    """


class ModelWarning(UserWarning):
    """A model ran in a way that bypasses some or all of the edit.

    Common causes: the block never calls the model itself, or a chosen layer is not part of its forward pass.
    """


class StatisticsWarning(UserWarning):
    """Channel statistics can be used, but not exactly as requested.

    Common cause: the data contain a single image of some classes.
    """


class WeightsError(ParchGradError, OSError):
    """Pretrained weights are missing, damaged, or cannot be downloaded.

    Common causes: no network connection, or the package with the weights is not installed.
    """


class MissingExtraError(ParchGradError, ImportError):
    """A package is missing that comes with an extra; the message has the command that installs it.

    Common cause: `pip install parchgrad`, which brings only what explaining your own network needs.
    """


class ImageError(ParchGradError, OSError):
    """A file is not a readable image, or an image folder has the wrong layout.

    Common causes: a wrong path, an incomplete download, or images that are not in class folders.
    """


class OutputError(ParchGradError, OSError):
    """A result cannot be written to the requested path.

    Common causes: an earlier result is in the way, or the folder is not writable.
    """


def reason_of(error: BaseException) -> str:
    r"""Shorten another library's error to a phrase on one line, without control characters.

    Example:
        >>> reason_of(ValueError("bad\x1b[31m header:\n  byte 7."))
        'bad [31m header: byte 7'
    """
    text = getattr(error, "strerror", None) or str(error)
    if isinstance(error, KeyError):
        text = f"{text} is missing"
    line = " ".join(on_one_line(text).split()).rstrip(".") or type(error).__name__
    return line if len(line) <= _LONGEST_REASON else f"{line[: _LONGEST_REASON - 3]}..."


def on_one_line(text: str) -> str:
    r"""Replace line breaks and control characters by spaces.

    Example:
        >>> on_one_line("red \x1b[31m")
        'red  [31m'
    """
    return "".join(letter if letter.isprintable() else " " for letter in text)


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the user's line outside this package, where Python shows the same text only once.

    Example:
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn("Nothing was edited. Call the model.", ModelWarning)
        >>> str(caught[0].message)
        'Nothing was edited. Call the model.'
    """
    # Python 3.12 has `skip_file_prefixes` for this.
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
