"""Record the selections of one backward pass, to inspect or replay them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from parchgrad.core.edit import Edit
from parchgrad.core.selectors import EditDefaults, LayerSignal, Selection, Selector, as_selection
from parchgrad.core.targets import Target
from parchgrad.errors import SettingError
from parchgrad.explain.explainer import Explainer

__all__ = ["DelegatingSelector", "RecordedSelection", "Recorder", "record_selections"]


@dataclass(frozen=True, eq=False, kw_only=True)
class RecordedSelection:
    """Selection in one convolution in one pass.

    Attributes:
        layer: name of the convolution.
        selection: the selection.
        channel_norms: spatial norm of each channel's gradient before the edit, shape (B, C). Rows of extreme magnitude
            are divided by a power of two.
    """

    layer: str
    selection: Selection
    channel_norms: Tensor

    @property
    def kept(self) -> Tensor:
        """Channels with nonzero weight and gradient, boolean, shape (B, C).

        If later layers leave most channels without a gradient, hundreds of ties at zero may be selected.
        """
        return (self.selection.channel_weights > 0) & (self.channel_norms > 0)

    @property
    def untouched(self) -> Tensor:
        """Rows whose weights are all 1 or all 0, so that every channel passes, boolean, shape (B,)."""
        weights = self.selection.channel_weights
        return (weights == 1).all(dim=1) | (weights == 0).all(dim=1)


class DelegatingSelector(Selector):
    """Delegate to another selector; a base class for wrappers.

    Example:
        >>> import torch, parchgrad as pg
        >>> selector = DelegatingSelector(pg.GradientEnergy(quantile=0.5, softness=0))
        >>> signal = LayerSignal(layer="conv", gradient=torch.tensor([[[3.0, 4.0], [0.0, 1.0]]]))
        >>> selector.select(signal).channel_weights
        tensor([[ True, False]])
    """

    def __init__(self, selector: Selector) -> None:
        """Store the inner selector."""
        self._selector = selector
        self.needs_class = selector.needs_class  # type: ignore[misc]  # follows the inner selector

    @property
    def defaults(self) -> EditDefaults:
        """Defaults of the inner selector (see `Selector.defaults`)."""
        return self._selector.defaults

    def check(self, channels: Mapping[str, int]) -> None:
        """Run the check of the inner selector (see `Selector.check`)."""
        self._selector.check(channels)

    def check_classes(self, classes: int) -> None:
        """Run the check of the inner selector (see `Selector.check_classes`)."""
        self._selector.check_classes(classes)

    def check_targets(self, targets: Sequence[int]) -> None:
        """Run the check of the inner selector (see `Selector.check_targets`)."""
        self._selector.check_targets(targets)

    def observe(self, output: Tensor) -> Any:
        """Observe with the inner selector (see `Selector.observe`)."""
        return self._selector.observe(output)

    def select(self, signal: LayerSignal) -> Selection:
        """Select with the inner selector (see `Selector.select`)."""
        return as_selection(self._selector.select(signal))


class Recorder(DelegatingSelector):
    """Record what another selector selects. It holds the state of passes, so use it in one thread only.

    Attributes:
        found: recorded selections, in the order of the backward passes.

    Example:
        >>> import torch, parchgrad as pg
        >>> recorder = Recorder(pg.GradientEnergy(quantile=0.5, softness=0))
        >>> signal = LayerSignal(layer="conv", gradient=torch.tensor([[[3.0, 4.0], [0.0, 1.0]]]))
        >>> recorder.select(signal).channel_weights
        tensor([[ True, False]])
        >>> recorder.found[0].channel_norms.round(decimals=3).tolist()
        [[5.0, 1.0]]
    """

    def __init__(self, selector: Selector) -> None:
        """Store the inner selector."""
        super().__init__(selector)
        self.found: list[RecordedSelection] = []

    def select(self, signal: LayerSignal) -> Selection:
        """Select and record (see `Selector.select`)."""
        found = super().select(signal)
        self.found.append(RecordedSelection(layer=signal.layer, selection=found, channel_norms=signal.channel_norms))
        return found


def record_selections(
    model: nn.Module, edit: Edit, inputs: Tensor, target: Target | None = None
) -> list[RecordedSelection]:
    """Record the selection of each layer in one backward pass.

    Args:
        model: classifier in evaluation mode, logits (B, K).
        edit: settings of the edit, with a selector.
        inputs: preprocessed batch, shape (B, C, *S).
        target: class index for all rows, one per row, or None for the predicted class.

    Returns:
        One record for each pass through a convolution, in the order of the backward pass: the last layer first.

    Raises:
        SettingError: if `edit` has no selector.
        ParchGradError: whatever `Explainer` raises.

    Example:
        >>> import torch, parchgrad as pg
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> edit = Edit(selector=pg.GradientEnergy(quantile=0.5), layers="all")
        >>> found = record_selections(model, edit, torch.rand(2, 3, 4, 4))
        >>> [(record.layer, tuple(record.selection.channel_weights.shape)) for record in found]
        [('1', (2, 4)), ('0', (2, 8))]
    """
    if edit.selector is None:
        raise SettingError("`edit` has no selector, so there is nothing to record. Give one such as pg.Evidence().")
    recorder = Recorder(edit.selector)
    # A single pass, so that each record covers all rows.
    Explainer.from_edit(model, replace(edit, selector=recorder), internal_batch_size=None).attribute(inputs, target)
    return recorder.found
