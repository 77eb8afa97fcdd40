"""What a block does in every pass, and the log of what happened in it."""

from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from parchgrad.core._torch import current_backward_pass
from parchgrad.core.edit import Edit
from parchgrad.core.layers import Layer, channel_count
from parchgrad.core.paths import Paths
from parchgrad.core.selectors import Selector
from parchgrad.errors import ModelWarning, warn

__all__ = ["Log", "Plan", "Route"]


class Route:
    """The layers that a plan edits: named ones, or those that a ratio chooses on the graph of a backward pass.

    Attributes:
        asked: names of layers, or a ratio; see `Paths.chosen`. Without convolutions, any ratio takes the first layers.
        was_inspected: whether parts that cannot be edited have been named.
        edited: names of the layers edited by the last block that edited any.
    """

    def __init__(
        self, asked: frozenset[str] | Fraction, selector: Selector | None, layers: Mapping[str, Layer]
    ) -> None:
        """Store the choice, and the selector with the layers to choose from, to check that they fit."""
        self.asked = asked
        self.was_inspected = False
        self.edited: Set[str] = frozenset()
        self._selector = selector
        self._channels = {name: channel_count(layer) for name, layer in layers.items()}
        self._has_convolutions = not all(isinstance(layer, nn.Linear) for layer in layers.values())

    @property
    def named(self) -> frozenset[str] | None:
        """The names asked for; None for a ratio."""
        return self.asked if isinstance(self.asked, frozenset) else None

    def chosen(self, paths: Paths, used: Collection[int] | None = None) -> frozenset[str]:
        """Choose the layers by the paths of a pass; see `Paths.chosen`.

        Raises:
            StatisticsError: if the selector has statistics of only some of them.
        """
        if isinstance(self.asked, frozenset):
            return self.asked
        found = paths.chosen(self.asked, used) if self._has_convolutions else paths.first(used)
        if self._selector is not None:
            self._selector.check({name: count for name, count in self._channels.items() if name in found})
        return found


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """What a block does in every pass.

    Attributes:
        model: the model whose gradient is edited.
        edit: the settings, with every None replaced.
        layers: convolutions, and linear layers to edit, by name, in module order; empty without a selector.
        route: the layers to edit.
        targets: class indices (B,) or (1,), instead of those read off the backward signal.
        pick_logits: extracts the logits from the model's output.
    """

    model: nn.Module
    edit: Edit
    layers: Mapping[str, Layer]
    route: Route
    targets: Tensor | None
    pick_logits: Callable[[Any], Tensor] | None

    @cached_property
    def highest_target(self) -> int:
        """The largest class index of `targets`."""
        return -1 if self.targets is None else int(self.targets.max())

    @cached_property
    def may_put_batch_second(self) -> bool:
        """Whether the model has attention of torch that takes tokens first, (T, B, C)."""
        return any(
            isinstance(module, nn.MultiheadAttention) and not module.batch_first for module in self.model.modules()
        )


class Log:
    """What happened in a block.

    Attributes:
        is_open: whether the block has not been left yet.
        is_silent: whether warnings are dropped.
        was_called: whether the model or a part of it was called.
        was_passed: whether a pass of the model came to its end.
        reached: layers that were called.
        recorded: those whose calls were recorded for a backward pass, at least once.
        unrecorded: those with a call that was not.
        touched: convolutions that a backward pass reached, edited or not.
        expected: named layers that a backward pass from the model's output should reach.
        met: layers to edit that a backward pass reached.
        edited: layers that were edited.
        started: ids of the backward passes that started at the model's output.
        touched_in: ids of the backward passes that reached a convolution.
        met_in: ids of the backward passes that reached a layer to edit.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self.is_open = True
        self.is_silent = False
        self.was_called = False
        self.was_passed = False
        self.reached: set[str] = set()
        self.recorded: set[str] = set()
        self.unrecorded: set[str] = set()
        self.touched: set[str] = set()
        self.expected: set[str] = set()
        self.met: set[str] = set()
        self.edited: set[str] = set()
        self.started: set[int] = set()
        self.touched_in: set[int] = set()
        self.met_in: set[int] = set()
        # Whether a gradient reached tokens of the image, by layer; read once, since that synchronises with the device.
        self._is_reached: dict[str, Tensor] = {}
        self._warned: set[str] = set()

    def touch(self, layer: str, gradient: Tensor | None = None) -> None:
        """Note that the running backward pass has reached a convolution."""
        self.touched.add(layer)
        self.touched_in.add(current_backward_pass())

    def note_tokens(self, layer: str, is_reached: Tensor) -> None:
        """Note whether the running backward pass reached tokens of the image in a layer."""
        earlier = self._is_reached.get(layer)
        self._is_reached[layer] = is_reached if earlier is None else earlier | is_reached

    @property
    def without_tokens(self) -> set[str]:
        """Layers in which every gradient reached class or register tokens alone, so that nothing was edited."""
        return {layer for layer, is_reached in self._is_reached.items() if not bool(is_reached)}

    @property
    def without_gradient(self) -> set[str]:
        """Layers to edit that no gradient reached, although one started at the model's output."""
        # A backward pass that failed on the way says nothing.
        return self.expected - self.edited if self.met == self.edited else set()

    @property
    def was_plain(self) -> bool:
        """Whether backward passes ran, but none of them reached a layer to edit."""
        return bool(self.started | self.touched_in) and not self.met_in

    @property
    def plain_passes(self) -> int:
        """Number of backward passes through convolutions that reached no layer to edit."""
        return len(self.touched_in - self.met_in)

    @property
    def never_recorded(self) -> bool:
        """Whether layers were called, but always without recording gradients."""
        return bool(self.unrecorded) and not self.recorded

    def warn_once(self, message: str) -> None:
        """Issue a warning, unless the block has issued the same one before."""
        if message not in self._warned and not self.is_silent:
            self._warned.add(message)
            warn(message, ModelWarning)
