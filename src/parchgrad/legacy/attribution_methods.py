"""The attribution methods of the original research code, as a thin wrapper around Explainer."""

import difflib
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from parchgrad.core.engine import plain_gradients
from parchgrad.core.layers import check_evaluation_mode
from parchgrad.core.partition import Conserve
from parchgrad.core.targets import Target, integer_targets
from parchgrad.errors import InputError, NonFiniteError, SettingError, TargetError
from parchgrad.explain.explainer import Explainer
from parchgrad.explain.heatmap import heatmap
from parchgrad.explain.nonfinite import find_non_finite
from parchgrad.explain.outputs import Logits
from parchgrad.legacy.hook_wrapper import HookWrapper

__all__ = ["InputAttribution", "get_input_attrib"]

_METHODS: Mapping[str, str] = MappingProxyType(
    {
        "grad": "gradient",
        "inputgrad": "input_x_gradient",
        "ig": "integrated_gradients",
        "smoothgrad": "smoothgrad",
    }
)


def get_input_attrib(name: str) -> "InputAttribution":
    """Get an attribution method by its name in the original research code.

    Args:
        name: `"grad"`, `"inputgrad"`, `"ig"` or `"smoothgrad"`.

    Raises:
        SettingError: if there is no such method.

    Example:
        >>> from parchgrad import get_hook_wrapper, load_model
        >>> classifier = load_model("shapes")
        >>> wrapper = get_hook_wrapper("shapes", classifier.model, "normal")
        >>> input_attrib = get_input_attrib("grad")
        >>> input_attrib(wrapper, torch.rand(3, 64, 64), torch.tensor([2])).shape
        torch.Size([64, 64])
    """
    if name not in _METHODS:
        near = difflib.get_close_matches(str(name), _METHODS, n=1)
        hint = f"Closest match: {near[0]!r}" if near else f"Use one of {', '.join(_METHODS)}"
        raise SettingError(f"The research code has no attribution method {name!r}. {hint}.")
    return InputAttribution(_METHODS[name])


@dataclass(frozen=True)
class InputAttribution:
    """An attribution method for a hook wrapper and one image, from `get_input_attrib`.

    Attributes:
        method: name of the method in `Explainer`.
    """

    method: str

    def __call__(
        self,
        wrapper: HookWrapper,
        x: Tensor,
        y: Target,
        *,
        cls: Target | None = None,
        modify_gradient: bool = True,
        quantile: float | None = None,
        alpha: float | None = None,
        p_value_threshold: float | None = 0.05,
        variance_conservation: bool = True,
        exact_variance: bool = False,
        gamma_infinity: bool = True,
        gamma: float = 1.0,
        enable_forward_hook: bool = True,
    ) -> Tensor:
        """Attribute the score of class `y` to the pixels of one image.

        The gradient starts at the logit of `y`, weighted by the softmax probability of `y` as a constant. Methods with
        several passes weight each pass by its own probability.

        Args:
            wrapper: the network, its statistics and the convolutions to edit; see `get_hook_wrapper`.
            x: one preprocessed image, shape (C, H, W).
            y: class to explain, an integer or a tensor with one element.
            cls: class whose channels `"cls"` keeps; defaults to `y`.
            modify_gradient: whether to edit the gradient; ignored if the wrapper's method is `"normal"`.
            quantile: share of channels to keep, in (0, 1]; overrides `alpha`.
            alpha: largest p-value to keep, in (0, 1).
            p_value_threshold: largest Shapiro-Wilk p-value of kept channels, in (0, 1]; None keeps any.
            variance_conservation: whether to rescale the layer to its original variance, as `conserve="independent"`,
                or `"exact"` with `exact_variance`; False means `"none"`.
            exact_variance: whether to measure the variance instead of assuming uncorrelated groups.
            gamma_infinity: whether to prune the other channels instead of damping them by `gamma`.
            gamma: factor of the kept signal relative to the rest, in (0, inf); ignored if `gamma_infinity`. The
                research code read it without setting it.
            enable_forward_hook: ignored; outputs are observed if a selector needs them.

        Returns:
            Magnitude of the attribution averaged over colours, shape (H, W), on the CPU.

        Raises:
            InputError: if `x` is not a single finite image, or does not fit the network.
            TargetError: if `y` or `cls` is not one class of the network.
            SettingError: if a setting is out of range.
            StatisticsError: if the wrapper's statistics were not read, or do not fit.
            LayerError: if no convolutions were set.
            ModelError: if the network is in training mode.
            NonFiniteError: if weights, scores or the map are NaN or infinite; names the first such layer.
        """
        if not isinstance(wrapper, HookWrapper):
            raise SettingError(
                f"`wrapper` is a {type(wrapper).__name__}. Create one with get_hook_wrapper(name, model, method)."
            )
        check_evaluation_mode(wrapper.model)
        if not isinstance(x, Tensor) or x.dim() != 3:
            found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"type {type(x).__name__}"
            raise InputError(f"`x` has {found}, but must be one image (C, H, W). Use Explainer for batches.")
        explained = _one_class(y, "y")
        seeds = _ProbabilitySeeds(wrapper.model).eval()
        explainer = Explainer(seeds, None, method=self.method)
        block: AbstractContextManager[object] = plain_gradients(wrapper.model)
        if modify_gradient and wrapper.method != "normal":
            block = wrapper.edited_gradients(
                target=explained if cls is None else _one_class(cls, "cls"),
                quantile=quantile,
                alpha=alpha,
                normality_threshold=p_value_threshold,
                gamma=math.inf if gamma_infinity else gamma,
                conserve=_conserve(variance_conservation, exact_variance),
            )
        with block:
            try:
                attribution = explainer.attribute(x.unsqueeze(0), target=explained)
            except NonFiniteError as error:
                raise _within(error, wrapper.model, seeds, x, explained) from error
        return heatmap(attribution)[0].cpu()


def _within(error: NonFiniteError, model: nn.Module, seeds: nn.Module, x: Tensor, explained: int) -> NonFiniteError:
    """Name the layer, which the explainer cannot find behind `_ProbabilitySeeds`."""
    place = find_non_finite(model, lambda part: seeds(part)[:, explained].sum(), x.unsqueeze(0))
    return (
        error
        if place is None
        else NonFiniteError(f"The map of `x` contains NaN or infinite values, which began {place}.")
    )


def _conserve(variance_conservation: bool, exact_variance: bool) -> Conserve:
    if not variance_conservation:
        return "none"
    return "exact" if exact_variance else "independent"


def _one_class(target: Target, name: str) -> int:
    classes = integer_targets(target)
    if classes.numel() != 1:
        raise TargetError(f"`{name}` has {classes.numel()} classes, but `x` is one image. Pass one class.")
    return int(classes)


class _ProbabilitySeeds(nn.Module):
    """Logits times their detached softmax probabilities, so the gradient at a logit is its probability."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # In a tuple, hidden from nn.Module: Explainer's own plain gradients would end the surrounding edit.
        self._hidden = (Logits(model, None),)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self._hidden[0](inputs)
        return logits * torch.softmax(logits, dim=1).detach()
