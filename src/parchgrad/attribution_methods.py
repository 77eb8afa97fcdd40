"""The attribution methods of the original research code, by its names, as a thin shell around Explainer."""

import difflib
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from parchgrad.attribution import Explainer, heatmap
from parchgrad.diagnosis import check_small_weights, find_non_finite
from parchgrad.engine import Target, integer_targets, plain_gradients
from parchgrad.errors import InputError, NonFiniteError, SettingError, TargetError
from parchgrad.heads import Logits
from parchgrad.hook_wrapper import HookWrapper
from parchgrad.layers import check_evaluation_mode
from parchgrad.partition import Conserve

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
        hint = f"perhaps {near[0]!r} is meant" if near else f"it must be one of {', '.join(_METHODS)}"
        raise SettingError(f"There is no attribution method {name!r} in the research code; {hint}.")
    return InputAttribution(_METHODS[name])


@dataclass(frozen=True)
class InputAttribution:
    """An attribution method that takes a hook wrapper and one image; made by `get_input_attrib`.

    Attributes:
        method: the name of the method in `Explainer`.
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

        The gradient starts at the logit of `y`, weighted by the softmax probability of `y`, which counts as a constant.
        Methods with several passes weight each of them by the probability that is found in it.

        Args:
            wrapper: the network, its statistics and the convolutions to edit; see `get_hook_wrapper`.
            x: one preprocessed image, shape (C, H, W).
            y: class to explain, a number or a tensor of one.
            cls: class whose channels `"cls"` keeps; None is `y`.
            modify_gradient: whether to edit the gradient; never done where the wrapper's method is `"normal"`.
            quantile: share of the channels to keep, in (0, 1]; where it is given, `alpha` is not read.
            alpha: largest p-value to keep, in (0, 1).
            p_value_threshold: largest Shapiro-Wilk p-value of the channels to keep, in (0, 1]; None keeps any.
            variance_conservation: whether to re-scale the layer to the variance it had: `conserve="independent"`, or
                `"exact"` by the next argument; without it `"none"`.
            exact_variance: whether to measure the variance rather than to take the groups as uncorrelated.
            gamma_infinity: whether to prune the other channels; else they are damped by `gamma`.
            gamma: how many times stronger than the rest the kept signal becomes, in (0, inf); read where
                `gamma_infinity` is off. The research code read it there without setting it.
            enable_forward_hook: has no meaning any more: outputs are looked at where a selector needs them.

        Returns:
            Magnitude of the attribution averaged over colours, shape (H, W), on the CPU.

        Raises:
            InputError: if `x` is no single finite image, or does not fit the network.
            TargetError: if `y` or `cls` is not one class of the network.
            SettingError: if a setting is out of range.
            StatisticsError: if the wrapper's statistics were not read, or do not fit.
            LayerError: if no convolutions were set.
            ModelError: if the network is in training mode.
            NonFiniteError: if weights, scores or the map are NaN or infinite; it names the layer where that began.
        """
        if not isinstance(wrapper, HookWrapper):
            raise SettingError(
                f"wrapper is a {type(wrapper).__name__}, but it must be made by get_hook_wrapper(name, model, method)."
            )
        check_evaluation_mode(wrapper.model)
        if not isinstance(x, Tensor) or x.dim() != 3:
            found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"type {type(x).__name__}"
            raise InputError(f"x is of {found}, but one image (C, H, W) is explained; for batches use Explainer.")
        explained = _one_class(y, "y")
        check_small_weights(wrapper.model)
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
    """Name the layer of a network that the explainer does not look into."""
    found = find_non_finite(model, lambda part: seeds(part)[:, explained].sum(), x.unsqueeze(0))
    if found is None:
        return error
    place, remedy = found
    return NonFiniteError(f"The map of x holds NaN or infinite values, which began {place}; {remedy}.")


def _conserve(variance_conservation: bool, exact_variance: bool) -> Conserve:
    if not variance_conservation:
        return "none"
    return "exact" if exact_variance else "independent"


def _one_class(target: Target, name: str) -> int:
    classes = integer_targets(target)
    if classes.numel() != 1:
        raise TargetError(f"{name} names {classes.numel()} classes, but one image is explained; give one class.")
    return int(classes)


class _ProbabilitySeeds(nn.Module):
    """Logits times their softmax probabilities held constant: a seed of 1 here is the probability at the logit."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # In a tuple, where nn.Module does not look: Explainer's own plain gradients would end the edit around it.
        self._hidden = (Logits(model, None),)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self._hidden[0](inputs)
        return logits * torch.softmax(logits, dim=1).detach()
