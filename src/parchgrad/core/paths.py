"""The convolutions between a model's input and a score, and those that a ratio chooses by their depth."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from parchgrad.errors import LayerError

__all__ = ["Paths", "convolves", "exact_ratio", "trace", "unmarked"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Paths:
    """The calls of convolutions in a graph that depend on its input.

    Attributes:
        layers: layer of each call; a call comes after all calls before it on a path from the input.
        before: indices of the nearest calls before each call.

    Example:
        >>> paths = Paths(layers=("stem", "branch", "shortcut"), before=((), (0,), (0,)))
        >>> sorted(paths.chosen(Fraction("0.5"))), sorted(paths.chosen(Fraction(1)))
        (['branch', 'shortcut'], ['branch', 'shortcut', 'stem'])
    """

    layers: tuple[str, ...]
    before: tuple[tuple[int, ...], ...]

    def chosen(self, ratio: Fraction, used: Collection[int] | None = None) -> frozenset[str]:
        """Choose the layers whose relative depth is at least `1 - ratio`, and the deepest in any case.

        The relative depth of a call is the number of calls before it on the longest path from the input, divided by
        the number of calls on the longest path through it, from the input to the score. A layer that is called several
        times is as deep as its deepest call.

        Args:
            ratio: in (0, 1]; 1 chooses all layers on the paths.
            used: indices of the calls on a path to the score; None means all.
        """
        depths: list[int] = []
        for calls in self.before:
            depths.append(1 + max((depths[call] for call in calls), default=-1))
        on_path = set(range(len(depths)) if used is None else used)
        # Number of calls after each one, on the longest path to the score.
        after = [0] * len(depths)
        for call in sorted(on_path, reverse=True):
            for earlier in self.before[call]:
                after[earlier] = max(after[earlier], after[call] + 1)
        relative = {call: Fraction(depths[call], depths[call] + 1 + after[call]) for call in on_path}
        least = min(1 - ratio, max(relative.values(), default=Fraction(1)))
        return frozenset(self.layers[call] for call, depth in relative.items() if depth >= least)

    def first(self, used: Collection[int] | None = None) -> frozenset[str]:
        """Choose the layers of the calls with none before them.

        Args:
            used: indices of the calls on a path to the score; None means all.

        Example:
            >>> Paths(layers=("stem", "branch", "shortcut"), before=((), (0,), ())).first() == {"stem", "shortcut"}
            True
        """
        on_path = set(range(len(self.layers)) if used is None else used)
        return frozenset(self.layers[call] for call in on_path if on_path.isdisjoint(self.before[call]))


def exact_ratio(ratio: float) -> Fraction:
    """Convert a ratio to the fraction that its decimal digits say.

    Raises:
        LayerError: if the ratio is not in (0, 1].

    Example:
        >>> exact_ratio(0.29) * 100
        Fraction(29, 1)
    """
    if not 0 < ratio <= 1:
        raise LayerError(f"`layers` is the ratio {ratio:g}, but a ratio must lie in (0, 1]. Pass 1.0 for all layers.")
    return Fraction(repr(float(ratio)))


def trace(
    roots: Iterable[Any], layers: Mapping[Any, str], is_source: Callable[[Any], bool], stops: Iterable[Any] = ()
) -> tuple[Paths, list[Any], dict[Any, int]]:
    """Follow the nodes of autograd's graph back to the input.

    Args:
        roots: nodes to start from.
        layers: layer of each node that is a call of a convolution.
        is_source: whether a leaf belongs to the input.
        stops: further nodes of the input.

    Returns:
        The calls that depend on the input, all nodes that do, and the index of each call by its node.

    Example:
        >>> import torch
        >>> x = torch.ones(2, requires_grad=True)
        >>> first = x.sin()
        >>> second = first.exp()
        >>> paths, nodes, calls = trace(
        ...     [(first + second).grad_fn], {first.grad_fn: "sin", second.grad_fn: "exp"},
        ...     lambda node: node.variable is x)
        >>> paths.layers, paths.before, len(nodes), calls[second.grad_fn]
        (('sin', 'exp'), ((), (0,)), 4, 1)
    """
    names: list[str] = []
    before: list[tuple[int, ...]] = []
    calls: dict[Any, int] = {}
    # Nearest calls before each visited node; None where it does not depend on the input.
    nearest: dict[Any, frozenset[int] | None] = dict.fromkeys(stops, frozenset())
    stack = list(roots)
    while stack:
        node = stack[-1]
        if node in nearest:
            stack.pop()
            continue
        earlier = [other for other, _ in node.next_functions if other is not None]
        if not earlier:
            nearest[node] = frozenset() if is_source(node) else None
            continue
        waiting = [other for other in earlier if other not in nearest]
        if waiting:
            stack += waiting
            continue
        found = [indices for indices in map(nearest.__getitem__, earlier) if indices is not None]
        if not found:
            nearest[node] = None
        elif node in layers:
            calls[node] = len(names)
            nearest[node] = frozenset({len(names)})
            names.append(layers[node])
            before.append(tuple(sorted(frozenset().union(*found))))
        else:
            nearest[node] = found[0] if len(found) == 1 else frozenset().union(*found)
    on_paths = [node for node, indices in nearest.items() if indices is not None]
    return Paths(layers=tuple(names), before=tuple(before)), on_paths, calls


def unmarked(nodes: Collection[Any], layers: Collection[Any]) -> list[Any]:
    """List the nodes that convolve or attend and belong to no layer.

    Args:
        nodes: nodes on the paths; see `trace`.
        layers: nodes that stand for the call of a layer.

    Example:
        >>> import torch
        >>> x, weight = torch.ones(1, 1, 4, requires_grad=True), torch.ones(1, 1, 2)
        >>> node = torch.nn.functional.conv1d(x, weight).grad_fn
        >>> len(unmarked([node], [])), len(unmarked([node], [node]))
        (1, 0)
    """
    own = set(layers)
    for node in layers:
        # The node that edits a layer's output comes before the layer's own operation.
        while node is not None and node.name() != "_EditedConvolutionBackward" and not convolves(node):
            node = node.next_functions[0][0] if node.next_functions else None
        own.add(node)
    return [node for node in nodes if node not in own and (convolves(node) or _attends(node))]


def convolves(node: Any) -> bool:
    """Whether a node of the graph is a convolution of any kind."""
    return (
        re.search("convolution|conv_?(transpose|depthwise|tbc)|conv[123]d|deform_?conv", node.name(), re.I) is not None
    )


def _attends(node: Any) -> bool:
    """Whether a node multiplies values by attention weights."""
    if "ScaledDotProduct" in node.name():
        return True
    return "Bmm" in node.name() and any(_is_softmax(operand) for operand, _ in node.next_functions)


def _is_softmax(node: Any) -> bool:
    """Whether a node is a softmax, apart from changes of shape or type behind it."""
    while node is not None and any(kind in node.name().lower() for kind in _RESHAPING):
        node = node.next_functions[0][0]
    return node is not None and "Softmax" in node.name()


# Operations between a softmax and the product that keep its values; `einsum` permutes.
_RESHAPING = ("view", "reshape", "expand", "permute", "transpose", "squeeze", "clone", "dropout", "tocopy", "tbackward")
