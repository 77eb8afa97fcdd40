"""Soft gates and smooth strides in blocks, against the way back written out by hand."""

import contextlib
import copy
import functools
import gc
import math
import threading
import warnings
import weakref

import captum.attr
import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

import parchgrad as pg
from parchgrad.core import gates, rules
from parchgrad.core.engine import plain_gradients
from parchgrad.errors import (
    ModelWarning,
    SettingError,
)
from tests import reference
from tests.support import input_gradient, nothing_is_left, strided_network


def on_the_way_back(values, change):
    """The values, whose gradient is put through a function of arrays."""

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(_, values):
            return values.clone()

        @staticmethod
        def backward(_, gradient):
            return torch.from_numpy(change(gradient.numpy()))

    return Node.apply(values)


def rectified_by_hand(module, values, width):
    """The rectifier's value, with the reference's gate as its derivative."""
    high = {nn.ReLU6: 6.0}.get(type(module), math.inf)
    slope = getattr(module, "negative_slope", 0.0)
    gates = [reference.gate(row, width, 0.0, high) for row in values.detach().flatten(1).tolist()]
    derivative = slope + (1 - slope) * torch.tensor(gates, dtype=values.dtype).reshape(values.shape)

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(_, values):
            return module(values.clone())

        @staticmethod
        def backward(_, gradient):
            return gradient * derivative

    return Node.apply(values)


def pooled_by_hand(module, values, width):
    """The module's maxima, with the gradient shared as the reference shares it."""
    windows = [(value, value) if isinstance(value, int) else value for value in (module.kernel_size, module.stride)]
    windows += [(value, value) for value in (module.padding, module.dilation)]

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(_, values):
            return module(values)

        @staticmethod
        def backward(_, gradient):
            rows = zip(gradient.numpy(), values.detach().numpy(), strict=True)
            return torch.from_numpy(np.stack([reference.soft_winners(*row, windows, width) for row in rows]))

    return Node.apply(values)


def network_by_hand(model, value, selector, layers, gates, antialias, gamma=math.inf, conserve="energy"):
    """A chain of modules, run with the reference's formulas on the way back."""
    for name, module in model.named_children():
        stride = getattr(module, "stride", 1)
        stride = (stride, stride) if isinstance(stride, int) else stride
        if antialias and max(stride) > 1:
            smooth = lambda g, n=stride: np.stack([reference.smooth_strides(row, n) for row in g])  # noqa: E731
            value = on_the_way_back(value, smooth)
        if isinstance(module, (nn.ReLU, nn.ReLU6, nn.LeakyReLU)):
            value = rectified_by_hand(module, value, gates)
        elif gates and isinstance(module, nn.MaxPool2d):
            value = pooled_by_hand(module, value, gates)
        else:
            value = module(value)
        if selector is not None and name in layers:

            def edit(gradient, output):
                weights, places = weights_by_hand(selector, gradient, output)
                return reference.edit(gradient, weights, gamma, conserve, places)

            value = on_the_way_back(value, functools.partial(edit, output=value.detach().numpy()))
    return value


def weights_by_hand(selector, gradient, output):
    """The reference's weights of channels (B, C) and places (B, *S), or None."""
    flat = [values.reshape(*values.shape[:2], -1).tolist() for values in (gradient, output)]
    weights, places = [], []
    for g, z in zip(*flat, strict=True):
        if isinstance(selector, pg.Evidence):
            evidence, scores = reference.evidence(g, z)
            places.append(reference.place_weights(evidence, selector.positions, selector.softness))
        elif isinstance(selector, pg.GradientTimesActivation):
            scores = [sum(a * b for a, b in zip(*pair, strict=True)) for pair in zip(g, z, strict=True)]
        else:
            scores = [math.sqrt(sum(value**2 for value in channel)) for channel in g]
        threshold = reference.kth_largest(scores, selector.quantile)
        weights.append(reference.soft_weights(scores, threshold, selector.softness))
    shape = (len(gradient), *gradient.shape[2:])
    return np.array(weights), np.array(places).reshape(shape) if places else None


WHOLE = {
    "best": (pg.Evidence(), {}, {"layers": ("3", "6")}),
    "evidence": (pg.Evidence(quantile=0.3, softness=0.5), {"layers": "all", "gates": 2}, {}),
    "energy": (pg.GradientEnergy(quantile=0.3), {"layers": "all", "antialias": False}, {}),
    "exact": (pg.GradientEnergy(quantile=0.3, softness=1), {"layers": "all", "conserve": "exact", "gates": 4.0}, {}),
    "damped": (pg.GradientEnergy(quantile=0.4), {"layers": "all", "gamma": 2.0}, {}),
    "damped evidence": (pg.Evidence(quantile=0.4), {"layers": "all", "gamma": 2.0, "conserve": "independent"}, {}),
    "activation": (pg.GradientTimesActivation(quantile=0.3), {"layers": "all", "conserve": "independent"}, {}),
    "published": (
        pg.GradientEnergy(quantile=0.3, softness=0),
        {"layers": "all", "conserve": "independent"},
        {"gates": 0, "antialias": False},
    ),
    "hard with rules": (pg.Evidence(softness=0), {"layers": "all", "gates": 2, "antialias": True}, {}),
    "rules alone": (None, {"gates": 2, "antialias": True}, {"layers": ()}),
    "gates alone": (None, {"gates": 0.5}, {"layers": (), "antialias": False}),
    "strides alone": (None, {"antialias": True}, {"layers": (), "gates": 0}),
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "unfrozen"])
def test_the_whole_way_back_is_the_references(kind, frozen):
    selector, settings, implied = WHOLE[kind]
    model = strided_network()
    x = torch.randn(2, 3, 17, 15, dtype=torch.float64)
    # The study chooses the widths that suit a selector.
    suits = {} if selector is None else {"gates": selector.defaults.gates, "antialias": selector.defaults.antialias}
    by_hand = {**suits, **settings, **implied}
    if by_hand["layers"] == "all":
        by_hand["layers"] = ("0", "3", "6")
    leaf = x.clone().requires_grad_()
    score = network_by_hand(model, leaf, selector, **by_hand)[:, 2].sum()
    expected = torch.autograd.grad(score, leaf)[0]
    model.requires_grad_(not frozen)
    with pg.ParchGrad(model, selector, **settings) as block:
        found = input_gradient(model, x, target=2)
    assert block.layers == by_hand["layers"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
    assert found.abs().max() > 1e-5
    assert not torch.allclose(found, input_gradient(model, x, target=2))


class AsFunctions(nn.Module):
    """The strided network's modules, called as functions where torch has any."""

    def __init__(self):
        super().__init__()
        self.body = strided_network()

    def forward(self, x):
        x = self.body[0](x).relu_()
        x = functional.max_pool2d(x, 3, stride=2, padding=1)
        x = functional.hardtanh_(self.body[4](self.body[3](x)), 0.0, 6.0)
        x = functional.leaky_relu(self.body[6](x), negative_slope=0.1)
        return self.body[10](functional.avg_pool2d(input=x, kernel_size=2).flatten(1))


def test_functions_are_passed_on_as_modules_are():
    x = torch.randn(2, 3, 17, 15, dtype=torch.float64)
    with pg.ParchGrad(strided_network(), layers="all") as block:
        expected = input_gradient(block._plan.model, x)
    with pg.ParchGrad(AsFunctions().eval(), layers="all") as block:
        found = input_gradient(block._plan.model, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("selector", [pg.Evidence(), None], ids=["evidence", "plain"])
def test_values_of_the_forward_pass_stay_bit_for_bit(selector, dtype):
    model, x = strided_network(dtype), torch.randn(2, 3, 17, 15, dtype=dtype)
    seen = []
    for module in model:
        module.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    with torch.no_grad():
        model(x)
    expected, seen = seen, []
    with pg.ParchGrad(model, selector, layers="all", gates=2, antialias=True):
        model(x.clone().requires_grad_())
    assert len(seen) == len(expected) == 11
    assert all(torch.equal(found, other) for found, other in zip(seen, expected, strict=True))


@pytest.mark.parametrize(("dtype", "least"), [(torch.float16, 0.999), (torch.bfloat16, 0.99)])
def test_half_precision_goes_back_as_single_precision_does(dtype, least):
    x = torch.randn(2, 3, 17, 15)
    maps = []
    for kind in (torch.float32, dtype):
        model = strided_network(dtype).to(kind)
        with pg.ParchGrad(model, layers="all"):
            maps.append(input_gradient(model, x.to(dtype).to(kind)))
    single, half = maps
    assert half.dtype == dtype
    assert (functional.cosine_similarity(half.float().flatten(1), single.flatten(1)) > least).all()
    ratio = half.float().flatten(1).norm(dim=1) / single.flatten(1).norm(dim=1)
    assert ((ratio - 1).abs() < 0.1).all()


@pytest.mark.parametrize("name", ["test_convnext", "test_byobnet", "test_nfnet"])
@pytest.mark.parametrize(
    "selector", [pg.Evidence(), pg.GradientEnergy(), pg.GradientTimesActivation()], ids=lambda each: type(each).__name__
)
def test_single_precision_is_enough_where_the_kept_sum_hardly_varies(name, selector):
    torch.manual_seed(0)
    x, model = torch.randn(2, 3, 64, 64), timm.create_model(name).eval()
    wide = copy.deepcopy(model).double()

    def deviation(**settings):
        narrow = pg.Explainer(model, selector, **settings).attribute(x, 1)
        exact = pg.Explainer(wide, selector, **settings).attribute(x.double(), 1)
        return float(((narrow - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).max())

    assert deviation() < 2e-5
    # The variance of the kept sum is rounding alone.
    if name == "test_convnext" and not isinstance(selector, pg.Evidence):
        assert deviation(conserve="independent") > 0.1


class Nested(nn.Module):
    """A model in whose middle another one stands."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.before = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.inner = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.ReLU(inplace=True))
        self.after = nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 5))

    def forward(self, x):
        return self.after(self.inner(self.before(x)))


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        ({"gates": 8.0, "antialias": True}, {"gates": 0, "antialias": False}),
        ({"gates": 8.0, "antialias": True}, {"gates": 2.0, "antialias": False}),
        ({"gates": 4.0, "antialias": False}, {"gates": 0, "antialias": True}),
        ({"gates": 0, "antialias": False}, {"gates": 2.0, "antialias": True}),
    ],
    ids=str,
)
def test_each_of_nested_blocks_has_its_own_rules(outer, inner):
    model = Nested().double().eval()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64, requires_grad=True)
    by_hand = network_by_hand(model.before, x, None, (), **outer)
    by_hand = network_by_hand(model.inner, by_hand, None, (), **inner)
    by_hand = network_by_hand(model.after, by_hand, None, (), **outer)
    expected = torch.autograd.grad(by_hand[:, 1].sum(), x)[0]
    with pg.ParchGrad(model, None, **outer), pg.ParchGrad(model.inner, None, **inner):
        found = input_gradient(model, x, target=1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
    # The block that was entered last decides over what it covers: here over everything.
    with pg.ParchGrad(model.inner, None, **inner), pg.ParchGrad(model, None, **outer):
        found = input_gradient(model, x, target=1)
    with pg.ParchGrad(model, None, **outer):
        assert torch.equal(found, input_gradient(model, x, target=1))


def test_a_plain_block_inside_has_the_true_derivatives():
    model, x = strided_network(), torch.randn(2, 3, 17, 15, dtype=torch.float64)
    expected = input_gradient(model, x)
    with pg.ParchGrad(model, layers="all"):
        edited = input_gradient(model, x)
        with pg.ParchGrad(model, None):
            assert torch.equal(input_gradient(model, x), expected)
        with plain_gradients(model):
            assert torch.equal(input_gradient(model, x), expected)
        assert torch.equal(input_gradient(model, x), edited)
        # Another model is none of the block's business.
        assert torch.equal(input_gradient(strided_network(), x), expected)
    assert not torch.allclose(edited, expected)


def test_without_gradients_nothing_stands_in_the_way_of_the_model():
    # Under any mode of torch's, the encoder would leave its fast way, whose values differ in their last digits.
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Conv1d(3, 8, 3, stride=2), Transposed(), encoder, nn.Flatten(), nn.LazyLinear(4)).eval()
    x = torch.randn(2, 3, 17)
    with torch.no_grad():
        expected = model(x)
        with warnings.catch_warnings(record=True) as said, pg.ParchGrad(model, layers="all"):
            warnings.simplefilter("always")
            assert torch.equal(model(x), expected)
            # Nor does a part on its own need a warning.
            model[0](x)
        (warning,) = said
        assert "no pass in this block recorded gradients" in str(warning.message)


class Transposed(nn.Module):
    def forward(self, x):
        return x.mT


def test_a_chosen_convolution_with_a_stride_gives_no_gradient_to_its_weight():
    model, x = strided_network(), torch.randn(2, 3, 17, 15, dtype=torch.float64, requires_grad=True)
    for weight in model.parameters():
        weight.requires_grad_()
    strided = [module for module in pg.find_convolutions(model).values() if max(module.stride) > 1]
    with pg.ParchGrad(model, layers="all"):
        model(x)[:, 0].sum().backward()
    assert strided
    assert all(module.weight.grad is None for module in strided)


def test_a_part_called_on_its_own_has_the_true_derivatives_and_warns_once():
    model, x = strided_network(), torch.randn(2, 3, 17, 15, dtype=torch.float64, requires_grad=True)
    every = pg.FixedChannels({"0": torch.ones(6)})
    with (
        pytest.warns(ModelWarning, match="called on its own") as said,
        pg.ParchGrad(model, every, layers=["0"], antialias=False),
    ):
        found = [torch.autograd.grad(model[:3](x).sum(), x)[0] for _ in range(2)]
    assert len(said) == 1
    expected = torch.autograd.grad(model[:3](x).sum(), x)[0]
    assert all(torch.equal(each, expected) for each in found)


class Failing(nn.Module):
    """Fails in the middle of a pass, of what it is told."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        if x.requires_grad and self.error is not None:
            raise self.error
        return x


@pytest.mark.parametrize("error", [ZeroDivisionError("no"), KeyboardInterrupt(), GeneratorExit()], ids=repr)
@pytest.mark.parametrize("times", [1, 3])
def test_no_rules_are_left_of_a_pass_that_fails(error, times):
    model = strided_network().insert(6, Failing(error)).eval()
    x = torch.randn(2, 3, 17, 15, dtype=torch.float64)
    with pytest.raises(type(error)), pg.ParchGrad(model, layers="all"):
        model(x.clone().requires_grad_())
    assert nothing_is_left(model)
    # Caught in the block, whose next pass is as any other.
    with pg.ParchGrad(model, layers="all"):
        for _ in range(times):
            with pytest.raises(type(error)):
                model(x.clone().requires_grad_())
        model[6].error = None
        found = input_gradient(model, x)
    assert nothing_is_left(model)
    with pg.ParchGrad(model, layers="all"):
        assert torch.equal(input_gradient(model, x), found)
    # In nested blocks, and in the model's own hooks.
    wrapper = nn.Sequential(nn.Identity(), model).eval()
    model[6].error = error
    with pytest.raises(type(error)), pg.ParchGrad(wrapper), pg.ParchGrad(model, None), pg.ParchGrad(model):
        wrapper(x.clone().requires_grad_())
    assert nothing_is_left(wrapper)
    model[6].error = None
    for register in (model.register_forward_pre_hook, model.register_forward_hook):
        # Set behind the block's own hooks.
        block = pg.ParchGrad(model, layers="all")
        block.__enter__()
        handle = register(raise_division)
        with pytest.raises(ZeroDivisionError), block_that_is_open(block):
            model(x.clone().requires_grad_())
        handle.remove()
        assert nothing_is_left(model)


def raise_division(*arguments):
    raise ZeroDivisionError


@contextlib.contextmanager
def block_that_is_open(block):
    try:
        yield
    except BaseException as error:
        block.__exit__(type(error), error, error.__traceback__)
        raise


def test_a_block_left_in_the_middle_of_a_pass_leaves_no_rules():
    model = strided_network()
    block = pg.ParchGrad(model, layers="all")

    def leave(module, inputs):
        block.__exit__(None, None, None)

    x = torch.randn(2, 3, 17, 15, dtype=torch.float64, requires_grad=True)
    handle = model[5].register_forward_pre_hook(leave)
    block.__enter__()
    model(x)
    handle.remove()
    assert nothing_is_left(model)


@pytest.mark.parametrize("selector", [pg.Evidence(), None], ids=["evidence", "plain"])
def test_gates_and_strides_hold_nothing_of_a_graph_that_is_gone(selector, monkeypatch):
    made, soft_gate = [], gates.soft_gate

    def watched(*arguments, **settings):
        found = soft_gate(*arguments, **settings)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(gates, "soft_gate", watched)
    model = strided_network()
    x = torch.randn(2, 3, 17, 15, dtype=torch.float64, requires_grad=True)
    outputs = []
    for module in model:
        module.register_forward_hook(lambda module, inputs, output: outputs.append(weakref.ref(output)))
    gc.disable()
    try:
        with pg.ParchGrad(model, selector, layers="all", gates=2, antialias=True):
            score = model(x)[:, 1].sum()
            # That of LeakyReLU is gone: its derivative is made of it.
            assert [found() is None for found in made] == [False, False, True]
            torch.autograd.grad(score, x)
            del score
            assert [found() for found in made + outputs] == [None] * (3 + 11)
    finally:
        gc.enable()


@pytest.mark.parametrize("where", ["inside", "behind the block"])
def test_checkpointed_strides_and_gates(where):
    model = strided_network()
    x = torch.randn(2, 3, 17, 15, dtype=torch.float64, requires_grad=True)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = model

        def forward(self, x):
            x = torch.utils.checkpoint.checkpoint(self.network[:4], x, use_reentrant=self.reentrant)
            x = torch.utils.checkpoint.checkpoint(self.network[4:8], x, use_reentrant=self.reentrant)
            return self.network[8:](x)

    checkpointed = Checkpointed().eval()
    checkpointed.reentrant = False
    with pg.ParchGrad(model, layers="all"):
        expected = input_gradient(model, x)
    with pg.ParchGrad(checkpointed, layers="all"):
        score = checkpointed(x)[:, 0].sum()
        found = torch.autograd.grad(score, x)[0] if where == "inside" else None
    if found is None:
        found = torch.autograd.grad(score, x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-16)
    assert nothing_is_left(checkpointed)
    # The other way calls the parts anew, where no rules are.
    checkpointed.reentrant = True
    with pytest.warns(ModelWarning, match="called on its own"), pg.ParchGrad(checkpointed, layers="all"):
        checkpointed(x)[:, 0].sum().backward()


REPLACING = ["DeepLift", "GuidedBackprop", "Deconvolution"]


def rectifiers_of_their_own():
    """Captum's hooks need rectifiers that are not in place."""
    model = strided_network()
    for module in model:
        if hasattr(module, "inplace"):
            module.inplace = False
    return model


# Captum's own notices that a method sets hooks.
@pytest.mark.filterwarnings("ignore:Setting (backward|forward)")
@pytest.mark.parametrize("method", REPLACING)
def test_soft_gates_are_off_where_a_method_replaces_rectifiers(method):
    model = rectifiers_of_their_own()
    x = torch.randn(2, 3, 17, 15, dtype=torch.float64)

    def attribute():
        return getattr(captum.attr, method)(model).attribute(x.clone().requires_grad_(), target=1).detach()

    with pg.ParchGrad(model, layers="all", gates=0):
        expected = attribute()
    with pg.ParchGrad(model, layers="all") as block, pytest.warns(ModelWarning, match="Soft gates are off") as said:
        found = [attribute(), attribute()]
    assert [str(warning.category.__name__) for warning in said].count("ModelWarning") == 1
    assert all(torch.equal(each, expected) for each in found)
    # As soon as its hooks are gone, the gates are back.
    with block:
        again = input_gradient(model, x, 1)
    with pg.ParchGrad(strided_network(), layers="all") as other:
        torch.testing.assert_close(again, input_gradient(other._plan.model, x, 1), rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("place", [1, 2], ids=["relu", "pool"])
def test_soft_gates_stay_where_a_method_only_looks_at_a_layer(place):
    model = rectifiers_of_their_own()
    x = torch.randn(2, 3, 17, 15, dtype=torch.float64)

    def attribute():
        method = captum.attr.LayerGradientXActivation(model, model[place])
        return method.attribute(x.clone().requires_grad_(), target=1).detach()

    with pg.ParchGrad(model, None, gates=4):
        found = attribute()
        # The same by autograd, without any hook of Captum's.
        activation = model[: place + 1](x.clone().requires_grad_())
    with pg.ParchGrad(model, None, gates=4):
        pass_through = {}
        handle = model[place].register_forward_hook(lambda module, inputs, output: pass_through.update(output=output))
        score = model(x.clone().requires_grad_())[:, 1].sum()
        handle.remove()
        gradient = torch.autograd.grad(score, pass_through["output"])[0]
    torch.testing.assert_close(found, gradient * activation.detach())
    assert not torch.allclose(found, attribute())


def test_threads_with_rules_of_their_own_do_not_see_each_other():
    model, x = strided_network(), torch.randn(2, 3, 17, 15, dtype=torch.float64)
    settings = [
        (None, {}),
        (None, {"gates": 2.0}),
        (None, {"antialias": True}),
        (pg.Evidence(), {}),
        (pg.GradientEnergy(softness=0), {"layers": "all"}),
    ]

    def explain(selector, options):
        with pg.ParchGrad(model, selector, **options):
            return input_gradient(model, x)

    expected = [explain(*each) for each in settings]
    assert all(not torch.allclose(a, b) for i, a in enumerate(expected) for b in expected[:i])
    wrong, barrier = [], threading.Barrier(len(settings))

    def work(index):
        barrier.wait()
        for _ in range(15):
            if not (torch.equal(explain(*settings[index]), expected[index]) and nothing_is_active()):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(settings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert nothing_is_left(model)


def nothing_is_active():
    return torch.overrides._get_current_function_mode_stack() == [] and not rules.has_active_rules()


def test_the_edit_says_what_suits_the_selector(network):
    def settings(*arguments, **options):
        edit = pg.ParchGrad(network, *arguments, **options).edit
        return edit.layers, edit.conserve, edit.gates, edit.antialias

    for arguments in ((), (pg.Evidence(),), (pg.GradientEnergy(),), (pg.RandomChannels(),)):
        suits = (arguments[0] if arguments else pg.Evidence()).defaults
        assert settings(*arguments) == (suits.layers, suits.conserve, suits.gates, suits.antialias)
        assert suits.conserve == "energy"
        assert suits.gates > 0
        assert suits.antialias
    assert settings(pg.GradientEnergy(softness=0)) == (0.5, "energy", 0.0, False)
    assert settings(pg.Evidence(softness=0), gates=3, conserve="exact") == ("auto", "exact", 3, False)
    assert settings(pg.Evidence(), gates=0, antialias=False, layers="all") == ("all", "energy", 0, False)
    assert settings(None)[2:] == (0.0, False)
    assert pg.ParchGrad(network, None).edit.is_plain
    assert not pg.ParchGrad(network, None, gates=2).edit.is_plain
    for wrong in (-1, math.inf, math.nan, "wide", True):
        with pytest.raises(SettingError, match="gates"):
            pg.ParchGrad(network, gates=wrong)
    for wrong in (1, "yes", 0.5):
        with pytest.raises(SettingError, match="antialias"):
            pg.ParchGrad(network, antialias=wrong)


def test_a_plain_block_takes_any_model_and_is_left_in_silence(network):
    """Without anything to edit, a model without convolutions or in training mode, or no call at all, is fine."""
    with pg.ParchGrad(network, None):
        pass
    network.train()
    with pg.ParchGrad(network, None):
        assert network(torch.randn(2, 3, 8, 8, dtype=torch.float64)).shape == (2, 5)
    linear, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double().eval(), torch.randn(2, 3).double()
    with pg.ParchGrad(linear, None):
        plain = input_gradient(linear, x)
    leaf = x.clone().requires_grad_()
    by_hand = network_by_hand(linear, leaf, None, (), gates=2, antialias=True)
    with pg.ParchGrad(linear, None, gates=2, antialias=True):
        found = input_gradient(linear, x)
    torch.testing.assert_close(found, torch.autograd.grad(by_hand[:, 0].sum(), leaf)[0])
    assert not torch.allclose(found, plain)
