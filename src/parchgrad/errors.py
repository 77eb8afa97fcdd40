"""Everything that parchgrad raises on purpose: one tree, so that one `except` catches it."""

import sys
import warnings

__all__ = [
    "ImageError",
    "InputError",
    "LayerError",
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

# Letters of a reason in an error's sentence, and of the sentence; what a file holds may be of any length.
_LONGEST_REASON = 200
_LONGEST = 1000
# Code of other modules that stands between the user's line and ours.
_BETWEEN = {"parchgrad", "dataclasses", "contextlib"}


class ParchGradError(Exception):
    """Base of all errors of this package; the message names what was wrong, where, and the remedy.

    It is one line of readable length, whatever the file holds that it quotes.
    """

    def __str__(self) -> str:
        line = on_one_line(super().__str__())
        # The end has the remedy.
        return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"


class SettingError(ParchGradError):
    """A setting is out of its range, unknown, or contradicts another.

    Usually a share is given in percent, a number as a text, a name has a typing error, or an option belongs to another
    method.
    """


class LayerError(ParchGradError):
    """The chosen layers do not exist in the model, or are no convolutions.

    Usually a pattern is written for another architecture, or modules are taken from a copy of the model.
    """


class ModelError(ParchGradError):
    """The model cannot be explained as it is: unknown name, training mode, no convolution, odd output.

    Usually `model.eval()` was not called, a classifier is given in place of its `.model`, or the output is a dictionary
    or a map.
    """


class InputError(ParchGradError):
    """What is looked at cannot be: a tensor, a map, a file of settings or the rows of a run.

    Usually the batch dimension is missing, the channels stand last, whole numbers were not preprocessed, or something
    was divided by zero.
    """


class NonFiniteError(ParchGradError):
    """Scores or maps are NaN or infinite, though the input is not; the message names the layer where it began."""


class TargetError(ParchGradError):
    """The class to explain does not exist, or does not fit the batch.

    Usually the model has other classes than the labels, which are counted from 0, or there is not one for each row.
    """


class StatisticsError(ParchGradError):
    """Channel statistics are missing, malformed, or belong to another model.

    Usually they were collected before the model was trained further, on other layers, or on data of other classes.
    """


class ModelWarning(UserWarning):
    """A model was not run in the way in which it is edited.

    Usually the block holds no call of the model itself, or layers are chosen that take no part in its pass.
    """


class StatisticsWarning(UserWarning):
    """Channel statistics serve, but in another way than was asked for.

    Usually the data hold a single image of some classes.
    """


class WeightsError(ParchGradError):
    """Pretrained weights are missing, damaged, or cannot be downloaded.

    Usually there is no network, or an extra of the package is not installed.
    """


class ImageError(ParchGradError):
    """A file is no readable image, or images do not stand where they should.

    Usually a path is wrong, a download was cut off, or photographs are in no class folders.
    """


class OutputError(ParchGradError):
    """A result cannot be written where it was asked for.

    Usually there is an earlier result, or the folder may not be written to.
    """


def reason_of(error: BaseException) -> str:
    r"""What another library's error says, as a part of a sentence: on one line, short, without what steers a terminal.

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
    r"""Put spaces in place of line breaks, and of what would steer a terminal.

    Example:
        >>> on_one_line("red \x1b[31m")
        'red  [31m'
    """
    return "".join(letter if letter.isprintable() else " " for letter in text)


def warn(message: str, category: type[Warning]) -> None:
    """Warn of the line outside of this package that led here, where Python shows the same words once.

    Example:
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn("Nothing was edited; call the model.", ModelWarning)
        >>> str(caught[0].message)
        'Nothing was edited; call the model.'
    """
    # From Python 3.12 on `skip_file_prefixes` would do.
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
