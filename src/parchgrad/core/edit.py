"""`Edit`: which channels at which layers are edited, and how the gradient is propagated."""

import math
from dataclasses import dataclass, replace

from parchgrad._io.checks import check_kind
from parchgrad.core.gates import check_gates
from parchgrad.core.layers import LayerChoice
from parchgrad.core.partition import Conserve, check_edit_settings
from parchgrad.core.selectors import Evidence, Selector
from parchgrad.errors import SettingError

__all__ = ["DEFAULT_SELECTOR", "Edit"]

DEFAULT_SELECTOR: Selector = Evidence()
"""The selector with the best results in the study."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Edit:
    """Settings of the gradient edit.

    None means the selector's default; without a selector it leaves the gradient plain.

    Attributes:
        selector: rates how much each channel matters; None leaves all channels unchanged.
        layers: layers to edit; see `choose_layers`.
        gamma: strength of the kept signal relative to the rest, in (0, inf]; infinity prunes the rest.
        conserve: what each layer conserves: `"energy"`, `"independent"`, `"exact"` or `"none"`; see
            `partition_gradient`.
        gates: width of the soft gates of rectifiers and of the ramps of max pooling, in standard deviations; 0 is the
            true derivative. See `soft_gate` and `soft_winners`.
        antialias: whether to smooth gradients at the input of strided operations; see `smooth_strides`.
        balance: whether to hold constant what makes operations nonlinear: the denominators of normalisations, attention
            weights, gates, and f(x) / x of smooth activations; see `Balance`.

    Raises:
        SettingError: if a setting is out of range.

    Example:
        >>> edit = Edit(gates=2.0).resolved()
        >>> edit.layers, edit.conserve, edit.gates, edit.antialias, edit.balance
        ('auto', 'energy', 2.0, True, True)
    """

    selector: Selector | None = DEFAULT_SELECTOR
    layers: LayerChoice | None = None
    gamma: float = math.inf
    conserve: Conserve | None = None
    gates: float | None = None
    antialias: bool | None = None
    balance: bool | None = None

    def __post_init__(self) -> None:
        if self.selector is not None and not isinstance(self.selector, Selector):
            given = self.selector.__name__ if isinstance(self.selector, type) else repr(self.selector)
            raise SettingError(f"`selector` is {given}, but it must be an object such as GradientEnergy(), or None.")
        check_edit_settings(self.gamma, "energy" if self.conserve is None else self.conserve)
        if self.gates is not None:
            check_gates(self.gates)
        for name, value in (("`antialias`", self.antialias), ("`balance`", self.balance)):
            if value is not None:
                check_kind(name, value, bool, "Pass True, False or None", wanted="a boolean")

    @property
    def is_plain(self) -> bool:
        """Whether the gradient is left unchanged."""
        return self.selector is None and not (self.gates or self.antialias or self.balance)

    def resolved(self) -> "Edit":
        """Replace every None by the selector's default."""
        if self.selector is None:
            return replace(
                self,
                layers=None,
                conserve="none",
                gates=self.gates or 0.0,
                antialias=bool(self.antialias),
                balance=bool(self.balance),
            )
        suits = self.selector.defaults
        return replace(
            self,
            layers=suits.layers if self.layers is None else self.layers,
            conserve=suits.conserve if self.conserve is None else self.conserve,
            gates=suits.gates if self.gates is None else self.gates,
            antialias=suits.antialias if self.antialias is None else self.antialias,
            balance=suits.balance if self.balance is None else self.balance,
        )
