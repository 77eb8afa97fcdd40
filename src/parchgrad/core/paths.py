"""The convolutions between a model's input and its outputs, and those that a ratio chooses by their depth."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from parchgrad.errors import LayerError

__all__ = ["Paths", "convolves", "exact_ratio", "trace", "unmarked"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Paths:
    """The calls of convolutions through which gradients flow from a model's outputs to its input.

    Attributes:
        layers: layer of each call; a call comes after all calls before it on a path from the input.
        before: indices of the nearest calls before each call.
        outputs: indices of the nearest calls before each output tensor.

    Example:
        >>> skip = Paths(layers=("stem", "branch", "shortcut"), before=((), (0,), (0,)), outputs=((1, 2),))
        >>> sorted(skip.chosen(Fraction("0.5"))), sorted(skip.chosen(Fraction(1)))
        (['branch', 'shortcut'], ['branch', 'shortcut', 'stem'])
    """

    layers: tuple[str, ...]
    before: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]

    def chosen(self, ratio: Fraction, outputs: Collection[int] | None = None) -> frozenset[str]:
        """Choose the layers whose relative depth is at least `1 - ratio`, and the deepest in any case.

        The relative depth of a call is the number of calls before it on the longest path from the input, divided by
        the number of calls on the longest path through it. A layer that is called several times is as deep as its
        deepest call.

        Args:
            ratio: in (0, 1]; 1 chooses all layers on the paths.
            outputs: indices of the outputs that the explained score uses; None means all.
        """
        used = self.outputs if outputs is None else [self.outputs[index] for index in outputs]
        depths: list[int] = []
        for calls in self.before:
            depths.append(1 + max((depths[call] for call in calls), default=-1))
        # Number of calls after each one; None where no used output depends on it.
        after: list[int | None] = [None] * len(depths)
        for calls in used:
            for call in calls:
                after[call] = 0
        for call in reversed(range(len(depths))):
            count = after[call]
            if count is not None:
                for earlier in self.before[call]:
                    after[earlier] = max(after[earlier] or 0, count + 1)
        relative = {
            call: Fraction(depth, depth + 1 + count)
            for call, (depth, count) in enumerate(zip(depths, after, strict=True))
            if count is not None
        }
        least = min(1 - ratio, max(relative.values(), default=Fraction(1)))
        return frozenset(self.layers[call] for call, depth in relative.items() if depth >= least)


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


def trace(roots: Iterable[Any], layers: Mapping[Any, str], is_source: Callable[[Any], bool]) -> tuple[Paths, list[Any]]:
    """Follow the nodes of autograd's graph from outputs back to the input.

    Args:
        roots: node of each output.
        layers: name of the layer of each node that stands for the call of a convolution.
        is_source: whether a node belongs to the input.

    Returns:
        The calls on the paths, and all nodes on them.

    Example:
        >>> import torch
        >>> x = torch.ones(2, requires_grad=True)
        >>> first = x.sin()
        >>> second = first.exp()
        >>> paths, nodes = trace(
        ...     [(first + second).grad_fn], {first.grad_fn: "sin", second.grad_fn: "exp"},
        ...     lambda node: getattr(node, "variable", None) is x)
        >>> paths.layers, paths.before, paths.outputs, len(nodes)
        (('sin', 'exp'), ((), (0,)), ((0, 1),), 4)
    """
    names: list[str] = []
    before: list[tuple[int, ...]] = []
    # Nearest calls before each visited node; None where it does not depend on the input.
    nearest: dict[Any, frozenset[int] | None] = {}
    roots = list(roots)
    stack = list(roots)
    while stack:
        node = stack[-1]
        if node in nearest:
            stack.pop()
            continue
        if is_source(node):
            nearest[node] = frozenset()
            continue
        earlier = [other for other, _ in node.next_functions if other is not None]
        waiting = [other for other in earlier if other not in nearest]
        if waiting:
            stack += waiting
            continue
        found = [calls for calls in map(nearest.__getitem__, earlier) if calls is not None]
        if not found:
            nearest[node] = None
        elif node in layers:
            nearest[node] = frozenset({len(names)})
            names.append(layers[node])
            before.append(tuple(sorted(frozenset().union(*found))))
        else:
            nearest[node] = found[0] if len(found) == 1 else frozenset().union(*found)
    paths = Paths(
        layers=tuple(names),
        before=tuple(before),
        outputs=tuple(tuple(sorted(nearest[root] or ())) for root in roots),
    )
    return paths, [node for node, calls in nearest.items() if calls is not None]


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
    return "conv" in node.name().lower()


def _attends(node: Any) -> bool:
    """Whether a node multiplies values by attention weights."""
    if "ScaledDotProduct" in node.name():
        return True
    if "Bmm" not in node.name():
        return False
    weights = node.next_functions[0][0]
    while weights is not None and any(kind in weights.name() for kind in ("View", "Expand", "Dropout", "ToCopy")):
        weights = weights.next_functions[0][0]
    return weights is not None and "Softmax" in weights.name()
