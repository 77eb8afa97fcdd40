"""What a selector chose: the selections of one backward pass, kept to be looked at or replayed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from parchgrad.attribution import Explainer
from parchgrad.engine import Target
from parchgrad.layers import LayerChoice
from parchgrad.partition import Conserve, at_least_float32, safe_norm
from parchgrad.selection import LayerSignal, Selection, Selector

__all__ = ["RecordedSelection", "Recorder", "record_selections"]


@dataclass(frozen=True, eq=False, kw_only=True)
class RecordedSelection:
    """What was selected in one convolution, in one pass.

    Attributes:
        layer: name of the convolution.
        selection: what was selected.
        channel_norms: norm over space of each channel's gradient, before it was edited, shape (B, C).
    """

    layer: str
    selection: Selection
    channel_norms: Tensor

    @property
    def kept(self) -> Tensor:
        """Channels that were kept and send something back, boolean, shape (B, C).

        Where later layers leave most channels without a gradient, ties at zero may be selected by the hundred.
        """
        return self.selection.channel_mask & (self.channel_norms > 0)


class Recorder(Selector):
    """Selects as another selector does, and keeps what it selects. It holds the state of passes: for one thread alone.

    Attributes:
        found: what was selected, in the order of the backward passes.

    Example:
        >>> import torch, parchgrad as pg
        >>> recorder = Recorder(pg.GradientEnergy(quantile=0.5))
        >>> recorder.select(LayerSignal(layer="conv", gradient=torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])))
        tensor([[ True, False]])
        >>> recorder.found[0].channel_norms.round(decimals=3).tolist()
        [[5.0, 1.0]]
    """

    def __init__(self, selector: Selector) -> None:
        """Take the selector that decides."""
        self._selector = selector
        self.needs_class = selector.needs_class  # type: ignore[misc]  # as the selector inside says it for its class
        self.found: list[RecordedSelection] = []

    def check(self, channels: Mapping[str, int]) -> None:
        """Check what the selector inside checks (see `Selector.check`)."""
        self._selector.check(channels)

    def check_classes(self, classes: int) -> None:
        """Check what the selector inside checks (see `Selector.check_classes`)."""
        self._selector.check_classes(classes)

    def check_targets(self, targets: Sequence[int]) -> None:
        """Check what the selector inside checks (see `Selector.check_targets`)."""
        self._selector.check_targets(targets)

    def observe(self, output: Tensor) -> Tensor | None:
        """Keep what the selector inside keeps (see `Selector.observe`)."""
        return self._selector.observe(output)

    def partition(self, signal: LayerSignal) -> Selection:
        """Select, and keep it (see `Selector.partition`)."""
        found = self._selector.partition(signal)
        norms = safe_norm(at_least_float32(signal.gradient.flatten(2)), dim=2)
        self.found.append(RecordedSelection(layer=signal.layer, selection=found, channel_norms=norms))
        return found

    def select(self, signal: LayerSignal) -> Tensor:
        """Select, and keep it (see `Selector.select`)."""
        return self.partition(signal).channel_mask


def record_selections(
    model: nn.Module,
    selector: Selector,
    inputs: Tensor,
    target: Target | None = None,
    *,
    layers: LayerChoice = "default",
    gamma: float = float("inf"),
    conserve: Conserve = "independent",
) -> list[RecordedSelection]:
    """Record what is selected in each layer while a gradient flows back.

    Args:
        model: classifier in evaluation mode, logits (B, K).
        selector: which channels matter.
        inputs: preprocessed batch, shape (B, C, *S).
        target: class index for all rows, one per row, or None for the predicted class.
        layers: which convolutions are edited; see `choose_layers`.
        gamma: see `partition_gradient`.
        conserve: see `partition_gradient`.

    Returns:
        One record for each pass through a convolution, in the order of the backward pass: the last layer first.

    Raises:
        ParchGradError: whatever `Explainer` raises.

    Example:
        >>> import torch, parchgrad as pg
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> found = record_selections(model, pg.GradientEnergy(quantile=0.5), torch.rand(2, 3, 4, 4), layers="all")
        >>> [(record.layer, tuple(record.selection.channel_mask.shape)) for record in found]
        [('1', (2, 4)), ('0', (2, 8))]
    """
    recorder = Recorder(selector)
    # Selections are had for all rows of a pass.
    explainer = Explainer(model, recorder, layers=layers, gamma=gamma, conserve=conserve, internal_batch_size=None)
    explainer.attribute(inputs, target)
    return recorder.found
