"""Everything that parchgrad raises on purpose: one tree, so that one `except` catches it."""

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
]


class ParchGradError(Exception):
    """Base of all errors of this package; the message names what was wrong, where, and the remedy."""


class SettingError(ParchGradError):
    """A setting is out of its range, unknown, or contradicts another."""


class LayerError(ParchGradError):
    """The chosen layers do not exist in the model, or are no convolutions."""


class ModelError(ParchGradError):
    """The model cannot be explained as it is: unknown name, training mode, no convolution, odd output."""


class InputError(ParchGradError):
    """The input tensor cannot be explained: not finite, wrong shape or dtype."""


class NonFiniteError(ParchGradError):
    """Scores or maps are NaN or infinite, though the input is not; the message names the layer where it began."""


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
