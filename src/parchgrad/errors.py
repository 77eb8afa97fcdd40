"""Everything that parchgrad raises on purpose: one tree, so that one `except` catches it."""

__all__ = [
    "ImageError",
    "InputError",
    "LayerError",
    "ModelError",
    "ModelWarning",
    "OutputError",
    "ParchGradError",
    "SettingError",
    "StatisticsError",
    "StatisticsWarning",
    "TargetError",
    "WeightsError",
    "reason_of",
]

# Letters of a reason in an error's sentence, and of the sentence; what a file holds may be of any length.
_LONGEST_REASON = 200
_LONGEST = 1000


class ParchGradError(Exception):
    """Base of all errors of this package; the message names what was wrong, where, and the remedy.

    It is one line of readable length, whatever the file holds that it quotes.
    """

    def __str__(self) -> str:
        line = _on_one_line(super().__str__())
        # The end has the remedy.
        return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"


class SettingError(ParchGradError):
    """A setting is out of its range, unknown, or contradicts another."""


class LayerError(ParchGradError):
    """The chosen layers do not exist in the model, or are no convolutions."""


class ModelError(ParchGradError):
    """The model cannot be explained as it is: unknown name, training mode, no convolution, odd output."""


class InputError(ParchGradError):
    """The input tensor cannot be explained: not finite, wrong shape or dtype."""


class TargetError(ParchGradError):
    """The class to explain does not exist, or does not fit the batch."""


class StatisticsError(ParchGradError):
    """Channel statistics are missing, malformed, or belong to another model."""


class ModelWarning(UserWarning):
    """A model was not run in the way in which it is edited."""


class StatisticsWarning(UserWarning):
    """Channel statistics serve, but in another way than was asked for."""


class WeightsError(ParchGradError):
    """Pretrained weights are missing, damaged, or cannot be downloaded."""


class ImageError(ParchGradError):
    """A file is no readable image."""


class OutputError(ParchGradError):
    """A result cannot be written where it was asked for."""


def reason_of(error: BaseException) -> str:
    r"""What another library's error says, as a part of a sentence: on one line, short, without what steers a terminal.

    Example:
        >>> reason_of(ValueError("bad\x1b[31m header:\n  byte 7."))
        'bad [31m header: byte 7'
    """
    text = getattr(error, "strerror", None) or str(error)
    if isinstance(error, KeyError):
        text = f"{text} is missing"
    line = " ".join(_on_one_line(text).split()).rstrip(".") or type(error).__name__
    return line if len(line) <= _LONGEST_REASON else f"{line[: _LONGEST_REASON - 3]}..."


def _on_one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)
