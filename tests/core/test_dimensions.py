"""Signals and volumes: networks of Conv1d and Conv3d against loops over positions in float64."""

import itertools
import math

import captum.attr
import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

import parchgrad as pg
from parchgrad.core.engine import plain_gradients
from parchgrad.errors import InputError
from parchgrad.visual import normalise
from tests import reference

TARGETS = torch.tensor([1, 2])
PUBLISHED = {"layers": "all", "conserve": "independent"}
"""With a hard cut: the method as it was published."""
SHAPES = {"signal": (3, 23), "volume": (2, 6, 5, 7)}
QUANTILE = 0.35
BY_ENERGY = pg.GradientEnergy(quantile=QUANTILE, softness=0)
both = pytest.mark.parametrize("kind", SHAPES)


def convolutions(kind):
    """Two convolutions with all that a convolution can do, differently in each dimension."""
    if kind == "signal":
        return nn.Conv1d(3, 8, 4, stride=2, padding=2), nn.Conv1d(8, 12, 3, padding=2, dilation=2, groups=2)
    return (
        nn.Conv3d(2, 8, (2, 3, 1), stride=(1, 2, 2), padding=(0, 1, 0)),
        nn.Conv3d(8, 12, (3, 2, 2), padding=(1, 1, 0), dilation=(1, 1, 2), groups=2),
    )


def network(kind):
    """A classifier (B, C, *S) to (B, 4)."""
    torch.manual_seed(3)
    first, second = convolutions(kind)
    # Small, so that along the way to a baseline of zero a sum over channels never is the same everywhere.
    first.bias.data *= 0.1
    second.bias.data *= 0.1
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), Mean(), nn.Linear(12, 4)).double().eval()


class Mean(nn.Module):
    """Mean over space."""

    def forward(self, x):
        return x.flatten(2).mean(2)


def batch(kind, rows=2, seed=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, *SHAPES[kind], generator=generator, dtype=torch.float64)


class SlowConvolution:
    """A convolution as a sum over output positions and places of the kernel, forward and back; one sample, numpy."""

    def __init__(self, module):
        self.weight, self.bias = module.weight.detach().numpy(), module.bias.detach().numpy()
        self.stride, self.padding, self.dilation = module.stride, module.padding, module.dilation
        self.groups = module.groups

    def terms(self, spatial):
        """Shape of the output, and which input place meets which output place at which place of the kernel."""
        kernel = self.weight.shape[2:]
        geometry = list(zip(spatial, kernel, self.stride, self.padding, self.dilation, strict=True))
        outside = [(size + 2 * pad - step * (k - 1) - 1) // stride + 1 for size, k, stride, pad, step in geometry]
        found = []
        for out in itertools.product(*map(range, outside)):
            for k in itertools.product(*map(range, kernel)):
                place = tuple(
                    o * stride - pad + at * step
                    for o, at, (_, _, stride, pad, step) in zip(out, k, geometry, strict=True)
                )
                if all(0 <= p < size for p, size in zip(place, spatial, strict=True)):
                    found.append((out, k, place))
        return outside, found

    def rows(self):
        """Output and input channels of each group."""
        outputs, inputs = self.weight.shape[0] // self.groups, self.weight.shape[1]
        for group in range(self.groups):
            yield slice(group * outputs, (group + 1) * outputs), slice(group * inputs, (group + 1) * inputs)

    def forward(self, x):
        outside, terms = self.terms(x.shape[1:])
        found = np.zeros((len(self.weight), *outside)) + self.bias.reshape(-1, *[1] * len(outside))
        for out, k, place in terms:
            for outputs, inputs in self.rows():
                found[(outputs, *out)] += self.weight[(outputs, slice(None), *k)] @ x[(inputs, *place)]
        return found

    def backward(self, gradient, shape):
        found = np.zeros(shape)
        for out, k, place in self.terms(shape[1:])[1]:
            for outputs, inputs in self.rows():
                found[(inputs, *place)] += self.weight[(outputs, slice(None), *k)].T @ gradient[(outputs, *out)]
        return found


class SlowNetwork:
    """`network` once more; `masks` chooses channels: from a layer's name and its gradient (C, S), as lists."""

    def __init__(self, model):
        self.first, self.second = SlowConvolution(model[0]), SlowConvolution(model[2])
        self.weight, self.bias = model[5].weight.detach().numpy(), model[5].bias.detach().numpy()

    def outputs(self, x):
        """What both convolutions give for one sample."""
        first = self.first.forward(x)
        return first, self.second.forward(np.maximum(first, 0))

    def logits(self, x):
        last = np.maximum(self.outputs(x)[1], 0)
        return self.weight @ last.reshape(len(last), -1).mean(1) + self.bias

    def gradient(self, x, target, choose, gamma=math.inf, conserve="independent"):
        first, second = self.outputs(x)
        weights = self.weight[target].reshape(-1, *[1] * (second.ndim - 1))
        gradient = np.where(second > 0, weights / second[0].size, 0.0)
        return self.seeded(x, first, gradient, choose, gamma, conserve)

    def seeded(self, x, first, gradient, choose, gamma=math.inf, conserve="independent"):
        """From the gradient at the second convolution's output on."""
        gradient = edit(gradient, choose, "2", gamma, conserve)
        gradient = np.where(first > 0, self.second.backward(gradient, first.shape), 0.0)
        return self.first.backward(edit(gradient, choose, "0", gamma, conserve), x.shape)


def edit(gradient, choose, name, gamma, conserve):
    flat = gradient.reshape(len(gradient), -1).tolist()
    kept = choose(name, flat)
    mask = [channel in kept for channel in range(len(flat))]
    return reference.edit_sample(flat, mask, gamma, conserve).reshape(gradient.shape)


def by_energy(name, gradient):
    return reference.best_channels([sum(value**2 for value in channel) for channel in gradient], QUANTILE)


def everything(name, gradient):
    return set(range(len(gradient)))


def expected(model, x, targets, choose, **settings):
    slow = SlowNetwork(model)
    rows = zip(x.numpy(), targets.tolist(), strict=True)
    return torch.from_numpy(np.stack([slow.gradient(row, target, choose, **settings) for row, target in rows]))


def assert_same(found, reference_map):
    torch.testing.assert_close(found, reference_map, rtol=1e-9, atol=1e-14)


@both
def test_the_slow_network_is_the_network(kind):
    model, x = network(kind), batch(kind)
    slow = SlowNetwork(model)
    assert_same(model(x).detach(), torch.from_numpy(np.stack([slow.logits(row) for row in x.numpy()])))
    assert_same(pg.Explainer(model, None).attribute(x, TARGETS), expected(model, x, TARGETS, everything))


@both
@pytest.mark.parametrize(
    "settings",
    [
        {"conserve": "independent"},
        {"conserve": "energy"},
        {"conserve": "exact"},
        {"conserve": "none"},
        {"gamma": 2.0, "conserve": "independent"},
        {"gamma": 2.0, "conserve": "energy"},
        {"gamma": 0.5, "conserve": "exact"},
    ],
    ids=str,
)
def test_explainer(kind, settings):
    model, x = network(kind), batch(kind)
    explainer = pg.Explainer(model, BY_ENERGY, layers="all", **settings)
    found = explainer.attribute(x, TARGETS)
    assert_same(found, expected(model, x, TARGETS, by_energy, **settings))
    assert (found - expected(model, x, TARGETS, everything)).abs().max() > 1e-3 * found.abs().max()
    # Channels are averaged, and every spatial dimension stays.
    assert_same(pg.heatmap(found), found.abs().sum(1) / found.shape[1])


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_layer_by_name_within_the_context(kind, dtype):
    model, x = network(kind), batch(kind)
    wanted = expected(
        model, x, TARGETS, lambda name, gradient: (by_energy if name == "2" else everything)(name, gradient)
    )
    with pg.ParchGrad(model.to(dtype), BY_ENERGY, layers=["2"], conserve="independent"):
        found = captum.attr.Saliency(model).attribute(x.to(dtype).requires_grad_(), target=TARGETS, abs=False)
    error = (found.double() - wanted).abs().max() / wanted.abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 1e-12)


@both
def test_integrated_gradients(kind):
    # Gauss-Legendre, which is Captum's default.
    model, x = network(kind), batch(kind)
    nodes, weights = np.polynomial.legendre.leggauss(3)
    parts = [
        weight / 2 * expected(model, (node + 1) / 2 * x, TARGETS, by_energy)
        for node, weight in zip(nodes, weights, strict=True)
    ]
    explainer = pg.Explainer(model, BY_ENERGY, method="integrated_gradients", n_steps=3, **PUBLISHED)
    wanted = sum(parts) * x
    # Captum holds nodes and weights in single precision.
    assert (explainer.attribute(x, TARGETS) - wanted).abs().max() < 1e-6 * wanted.abs().max()


@both
def test_statistics_and_the_channels_that_they_choose(kind):
    model, x = network(kind), batch(kind)
    items = list(zip(batch(kind, rows=24, seed=5), [0, 1, 2] * 8, strict=True))
    statistics = pg.collect_statistics(model, items, batch_size=7)
    slow = SlowNetwork(model)
    layers = zip(*[slow.outputs(item.numpy()) for item, _ in items], strict=True)
    chosen = {}
    for name, outputs in zip(("0", "2"), layers, strict=True):
        gap = np.stack([np.maximum(output, 0).reshape(len(output), -1).mean(1) for output in outputs])
        found = statistics[name]
        np.testing.assert_allclose(found.mean, gap.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.std, gap.std(0, ddof=1), rtol=1e-12)
        of_class = np.array([label for _, label in items])
        for target in (1, 2):
            inside, outside = gap[of_class == target], gap[of_class != target]
            p = scipy.stats.ttest_ind(inside, outside, equal_var=False, alternative="greater").pvalue
            assert np.isfinite(p).all()
            np.testing.assert_allclose(found.class_log_p()[:, target], np.log(p), rtol=1e-9)
            chosen[name, target] = reference.best_channels((-np.log(p)).tolist(), QUANTILE)
    selector = pg.ClassWise(statistics, quantile=QUANTILE, softness=0, normality_threshold=None)
    found = pg.Explainer(model, selector, **PUBLISHED).attribute(x, TARGETS)
    rows = [
        expected(model, x[row : row + 1], TARGETS[row : row + 1], lambda name, _, at=target: chosen[name, at])
        for row, target in enumerate(TARGETS.tolist())
    ]
    assert_same(found, torch.cat(rows))


@both
@pytest.mark.parametrize("own_region", [True, False])
def test_segmentation_of_signals_and_volumes(kind, own_region):
    """A head of scores at each place; the region is given, or where the network calls the class."""
    model, x = network(kind), batch(kind)
    head = {"signal": nn.Conv1d, "volume": nn.Conv3d}[kind](12, 4, 1).double()
    head.weight.data *= 20
    segmenter = nn.Sequential(*model[:4], head).eval()
    slow, weight, bias = SlowNetwork(model), head.weight.detach().flatten(1).numpy(), head.bias.detach().numpy()
    maps = []
    for row in x.numpy():
        first, second = slow.outputs(row)
        last = np.maximum(second, 0).reshape(len(second), -1)
        scores = weight @ last + bias[:, None]
        if own_region:
            region = np.arange(scores.shape[1]) % 3 == 1
        else:
            region = scores.argmax(0) == 1
            assert 0 < region.sum() < region.size
        gradient = np.where(second.reshape(len(second), -1) > 0, np.outer(weight[1], region), 0.0)
        maps.append(slow.seeded(row, first, gradient.reshape(second.shape), by_energy))
    region = torch.arange(scores.shape[1]).reshape(second.shape[1:]) % 3 == 1
    explainer = pg.Explainer(segmenter, BY_ENERGY, layers=["0", "2"], conserve="independent")
    found = explainer.attribute(x, pg.RegionScore(target=1, mask=region if own_region else None))
    assert_same(found, torch.from_numpy(np.stack(maps)))


@both
def test_the_context_leaves_signals_and_volumes_as_they_were(kind):
    model, x = network(kind), batch(kind).requires_grad_()
    (before,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    pg.Explainer(model, pg.GradientEnergy(quantile=QUANTILE), layers="all").attribute(x.detach(), 1)
    (after,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    assert torch.equal(before, after)
    with plain_gradients(model):
        assert torch.equal(torch.autograd.grad(model(x)[:, 1].sum(), x)[0], before)


@both
def test_pictures_are_drawn_of_pictures_alone(kind):
    heat = pg.heatmap(batch(kind))[0]
    with pytest.raises(InputError, match=r"has shape \(.*\)"):
        normalise(heat)
