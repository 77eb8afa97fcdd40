import contextlib
import contextvars
import copy
import gc
import math
import threading
import warnings
import weakref
from types import SimpleNamespace

import captum.attr
import pytest
import torch
from torch import nn
from torch.nn import functional

import parchgrad as pg
from parchgrad.core import session
from parchgrad.core.engine import plain_gradients
from parchgrad.core.selectors import Selection
from parchgrad.core.targets import read_classes
from parchgrad.errors import (
    InputError,
    LayerError,
    ModelError,
    ModelWarning,
    ParchGradError,
    SettingError,
    StatisticsError,
    TargetError,
)
from tests import reference
from tests.support import (
    Raises,
    all_selectors,
    hooks,
    input_gradient,
    nothing_is_left,
    random_statistics,
    small_network,
    strided_network,
)


class PinnedChannels(pg.Selector):
    """Every second channel, and a record of what the engine showed."""

    def __init__(self, needs_class=False):
        self.needs_class = needs_class
        self.seen = []

    def select(self, signal):
        self.seen.append(signal)
        return (torch.arange(signal.gradient.shape[1]) % 2 == 0).expand(signal.gradient.shape[:2])


def parities(channels):
    return (torch.arange(channels) % 2 == 0).unsqueeze(0)


def staged_gradient(stages, x, target=0, edited=None, gamma=math.inf, conserve="independent", weigh=None):
    """Input gradient by hand: stage by stage, the gradient at each edited stage's output put through the reference."""
    edited = range(len(stages) - 1) if edited is None else edited
    inputs, outputs, value = [], [], x
    for stage in stages:
        inputs.append(value.detach().clone().requires_grad_())
        outputs.append(stage(inputs[-1]))
        value = outputs[-1]
    gradient = torch.zeros_like(outputs[-1])
    gradient[:, target] = 1
    for index in reversed(range(len(stages))):
        if index in edited:
            mask = parities(gradient.shape[1]).expand(gradient.shape[:2])
            gradient = gradient if weigh is None else gradient * weigh(gradient).unsqueeze(1)
            gradient = torch.from_numpy(reference.edit(gradient.detach(), mask, gamma, conserve))
        (gradient,) = torch.autograd.grad(outputs[index], inputs[index], gradient)
    return gradient


def staged(*convolutions, spatial_size, inplace=True, classes=4):
    """A chain convolution - in-place ReLU - convolution ... - linear, as one model and as stages that share weights."""
    rectify = (lambda x: functional.relu(x)) if not inplace else nn.ReLU(inplace=True)
    head = nn.Linear(convolutions[-1].out_channels * spatial_size, classes)
    model = nn.Sequential()
    for convolution in convolutions:
        model.append(convolution).append(nn.ReLU(inplace=inplace))
    model.append(nn.Flatten()).append(head)
    model = model.double().eval()
    stages = [convolutions[0]]
    stages += [
        lambda value, layer=layer: layer(rectify(value.clone() if inplace else value)) for layer in convolutions[1:]
    ]
    stages.append(lambda value: head(functional.relu(value).flatten(1)))
    return model, stages


CHAINS = {
    "plain": lambda: (nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)),
    "strided": lambda: (nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1, stride=2)),
    "dilated": lambda: (nn.Conv2d(3, 6, 3, padding=2, dilation=2), nn.Conv2d(6, 8, 3, padding=1)),
    "grouped": lambda: (nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 9, 3, padding=1, groups=3)),
    "depthwise": lambda: (nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6)),
    "same": lambda: (nn.Conv2d(3, 6, 3, padding="same"), nn.Conv2d(6, 8, 2, padding="valid")),
    "reflect": lambda: (nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), nn.Conv2d(6, 8, 1)),
    "replicate": lambda: (nn.Conv2d(3, 6, 3, padding=1, padding_mode="replicate"), nn.Conv2d(6, 8, 1)),
    "circular": lambda: (nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"), nn.Conv2d(6, 8, 1)),
    "one position": lambda: (nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 4)),
    "signal": lambda: (nn.Conv1d(3, 6, 3, padding=1), nn.Conv1d(6, 8, 3, padding=1)),
    "volume": lambda: (nn.Conv3d(3, 6, 3, padding=1), nn.Conv3d(6, 8, 3, padding=1)),
}


WAYS = [(math.inf, "energy"), (math.inf, "independent"), (math.inf, "exact"), (1.5, "independent"), (1.5, "energy")]
TRUE = {"gates": 0, "antialias": False, "balance": False}
"""The true derivatives around the edited convolutions."""


@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "unfrozen"])
@pytest.mark.parametrize(("gamma", "conserve"), WAYS)
def test_equals_the_chain_rule_by_hand(kind, frozen, gamma, conserve):
    convolutions = CHAINS[kind]()
    dimensions = len(convolutions[0].kernel_size)
    x = torch.randn(2, 3, *[6, 6, 6][:dimensions], dtype=torch.float64)
    size = functional.relu(nn.Sequential(*convolutions)(x.float())).flatten(2).shape[2]
    model, stages = staged(*convolutions, spatial_size=size)
    model.requires_grad_(not frozen)
    with pg.ParchGrad(model, PinnedChannels(), layers="all", gamma=gamma, conserve=conserve, **TRUE):
        found = input_gradient(model, x)
    expected = staged_gradient(stages, x, gamma=gamma, conserve=conserve)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    assert not torch.allclose(found, input_gradient(model, x))


def ramp(gradient):
    """Weights that differ at every position of every row."""
    shape = (len(gradient), *gradient.shape[2:])
    return torch.linspace(0.1, 1, math.prod(shape), dtype=gradient.dtype).reshape(shape)


class PinnedPositions(PinnedChannels):
    def select(self, signal):
        return Selection(channel_weights=super().select(signal), position_weights=ramp(signal.gradient))


@pytest.mark.parametrize("kind", ["plain", "strided", "depthwise", "reflect", "one position", "signal", "volume"])
@pytest.mark.parametrize(("gamma", "conserve"), WAYS)
def test_positions_are_weighed_before_the_channels_are_partitioned(kind, gamma, conserve):
    convolutions = CHAINS[kind]()
    dimensions = len(convolutions[0].kernel_size)
    x = torch.randn(2, 3, *[6, 6, 6][:dimensions], dtype=torch.float64)
    size = functional.relu(nn.Sequential(*convolutions)(x.float())).flatten(2).shape[2]
    model, stages = staged(*convolutions, spatial_size=size)
    with pg.ParchGrad(model, PinnedPositions(), layers="all", gamma=gamma, conserve=conserve, **TRUE):
        found = input_gradient(model, x)
    expected = staged_gradient(stages, x, gamma=gamma, conserve=conserve, weigh=ramp)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("shape", [(2,), (2, 1), (8, 8), (1, 8, 8), (2, 5, 5), (2, 1, 8, 8)])
def test_position_weights_that_do_not_fit(network, shape):
    class Misfit(PinnedChannels):
        def select(self, signal):
            return Selection(channel_weights=super().select(signal), position_weights=torch.ones(shape))

    with (
        pg.ParchGrad(network, Misfit(), layers="all"),
        pytest.raises(SettingError, match=r"`position_weights` is torch\.float32 of shape"),
    ):
        input_gradient(network, torch.randn(2, 3, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize(
    "weights", [torch.ones(2, 5), torch.ones(6), torch.ones(2, 6).long(), torch.ones(1, 6), torch.ones(2, 6, 1), "all"]
)
def test_channel_weights_that_do_not_fit(network, weights):
    class Misfit(pg.Selector):
        def select(self, signal):
            return weights

    with pg.ParchGrad(network, Misfit(), layers="all"), pytest.raises(SettingError, match="channel_weights"):
        input_gradient(network, torch.randn(2, 3, 8, 8, dtype=torch.float64))


class Residual(nn.Module):
    """Two convolutions, one of them called twice, with a functional in-place addition of the skip path."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x):
        x = functional.relu_(self.stem(x))
        for _ in range(2):
            out = self.body(x)
            out += x
            x = functional.relu_(out)
        return self.head(x.mean((2, 3)))


def test_residual_branches_in_place_additions_and_a_convolution_used_twice():
    model = Residual().double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)

    # By hand: both calls of `body` are edited, the skip path is not.
    def edited(layer, value):
        """The layer's output, whose backward is the reference edit."""

        class Edit(torch.autograd.Function):
            @staticmethod
            def forward(_, output):
                return output.clone()

            @staticmethod
            def backward(_, gradient):
                mask = parities(gradient.shape[1]).expand(gradient.shape[:2])
                return torch.from_numpy(reference.edit(gradient, mask))

        return Edit.apply(layer(value))

    leaf = x.clone().requires_grad_()
    value = functional.relu(edited(model.stem, leaf))
    for _ in range(2):
        value = functional.relu(edited(model.body, value) + value)
    expected = torch.autograd.grad(model.head(value.mean((2, 3)))[:, 1].sum(), leaf)[0]

    selector = PinnedChannels()
    with pg.ParchGrad(model, selector, layers="all", **TRUE):
        found = input_gradient(model, x, target=1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    assert [signal.layer for signal in selector.seen] == ["body", "body", "stem"]


def test_all_channels_kept_is_the_plain_gradient_bit_for_bit(network):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for selector in (
        pg.GradientEnergy(quantile=1.0, softness=0),
        pg.FixedChannels({name: torch.ones(6) for name in ("0", "2")}),
        None,
    ):
        with pg.ParchGrad(network, selector, layers="all", **TRUE):
            found = input_gradient(network, x)
        assert torch.equal(found, input_gradient(network, x))


def test_seed_scaled_by_a_constant_scales_the_map(network):
    for dtype, scale, tolerance in [
        (torch.float64, 1e-12, 1e-14),
        (torch.float64, 1e-150, 1e-14),
        (torch.float32, 1e-12, 1e-6),
        (torch.float32, 2.0**-70, 0.0),
    ]:
        network, x = network.to(dtype), torch.randn(2, 3, 8, 8, dtype=dtype, requires_grad=True)
        for selector in (pg.GradientEnergy(quantile=0.3), pg.GradientEnergy(quantile=0.3, softness=0), pg.Evidence()):
            with pg.ParchGrad(network, selector, layers="all"):
                score = network(x)[:, 2].sum()
                found = torch.autograd.grad(score, x, retain_graph=True)[0]
                scaled = torch.autograd.grad(scale * score, x)[0]
            assert (scaled / scale - found).abs().max() <= tolerance * found.abs().max()


# The class of each row


def test_read_classes_takes_the_largest_positive_seed_else_the_largest_magnitude():
    seeds = torch.tensor([[0.0, 1.0, -3.0], [0.0, -2.0, -1.0], [0.0, 0.0, 0.0], [5.0, 4.0, 6.0]])
    assert read_classes(seeds).tolist() == [1, 1, 0, 2]
    assert read_classes(torch.tensor([-1.0, 2.0])).tolist() == [0, 0]
    maps = torch.zeros(1, 3, 2, 2)
    maps[0, 1] = torch.tensor([[1.0, -10.0], [4.0, 5.0]])
    maps[0, 2] = 0.1
    assert read_classes(maps).tolist() == [1]


METHODS = {
    "Saliency": lambda model, x, y: captum.attr.Saliency(model).attribute(x, target=y),
    "InputXGradient": lambda model, x, y: captum.attr.InputXGradient(model).attribute(x, target=y),
    "IntegratedGradients": lambda model, x, y: captum.attr.IntegratedGradients(model).attribute(
        x, target=y, n_steps=5, internal_batch_size=4
    ),
    "NoiseTunnel": lambda model, x, y: captum.attr.NoiseTunnel(captum.attr.Saliency(model)).attribute(
        x, target=y, nt_samples=3, stdevs=0.1
    ),
    "GradientShap": lambda model, x, y: captum.attr.GradientShap(model).attribute(x, torch.zeros_like(x), target=y),
    "GuidedGradCam": lambda model, x, y: captum.attr.GuidedGradCam(model, model[2]).attribute(x, target=y),
}


# GuidedGradCam's own notice that it sets hooks, and the engine's that it therefore leaves the rectifiers alone.
@pytest.mark.filterwarnings("ignore:Soft gates are off")
@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU activations")
@pytest.mark.parametrize("method", METHODS)
def test_classes_are_read_off_whatever_the_method_expands(network, method):
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([4, 0, 2])
    selector = PinnedChannels(needs_class=True)
    with pg.ParchGrad(network, selector, layers="all"):
        METHODS[method](network, x, targets)
    assert selector.seen
    # The rows of the steps of one image lie apart in a batch, those of its noise samples together.
    orders = {}
    for signal in selector.seen:
        orders.setdefault(signal.layer, []).extend(signal.classes.tolist())
    copies = {"IntegratedGradients": 5, "NoiseTunnel": 3, "GradientShap": 5}.get(method, 1)
    together, apart = targets.repeat_interleave(copies).tolist(), targets.repeat(copies).tolist()
    assert all(order in (together, apart, 2 * targets.tolist()) for order in orders.values())


def test_class_behind_a_softmax_is_the_explained_one(network):
    selector = PinnedChannels(needs_class=True)
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    with pg.ParchGrad(network, selector):
        network(x).softmax(1)[torch.arange(5), torch.arange(5)].sum().backward()
    assert selector.seen[0].classes.tolist() == [0, 1, 2, 3, 4]


def test_target_overrides_the_class(network):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for target, expected in [(3, [3, 3]), ([1, 4], [1, 4]), (torch.tensor(2), [2, 2])]:
        selector = PinnedChannels(needs_class=True)
        with pg.ParchGrad(network, selector, target=target):
            input_gradient(network, x)
        assert selector.seen[0].classes.tolist() == expected


def test_class_wise_and_instance_wise_equal_their_masks_given_by_hand(network):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    statistics = random_statistics({"0": 6, "2": 6})
    for selector in (
        pg.ClassWise(statistics, quantile=0.4, softness=0),
        pg.InstanceWise(statistics, quantile=0.4, softness=0),
    ):
        with pg.ParchGrad(network, selector, layers="all"):
            found = input_gradient(network, x, target=3)
        outputs = {"0": network[0](x), "2": network[2](functional.relu(network[0](x)))}
        masks = {}
        for name, output in outputs.items():
            layer = statistics[name]
            if isinstance(selector, pg.ClassWise):
                scores = [[-p for p in layer.class_log_p()[:, 3].tolist()]] * 2
            else:
                scores = ((output.clamp(min=0).mean((2, 3)) - layer.mean) / layer.std).tolist()
            kept = [reference.best_channels(row, 0.4) for row in scores]
            masks[name] = torch.tensor([[channel in row for channel in range(6)] for row in kept])
        with pg.ParchGrad(network, pg.FixedChannels(masks), layers="all", **TRUE):
            expected = input_gradient(network, x, target=3)
        assert torch.equal(found, expected)


def test_a_convolution_as_the_models_output_knows_its_class():
    model = nn.Sequential(nn.Conv2d(3, 5, 3)).double().eval()
    selector = PinnedChannels(needs_class=True)
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    with pg.ParchGrad(model, selector, layers="all"):
        model(x)[:, 3].sum().backward()
    assert selector.seen[0].classes.tolist() == [3]


def test_targets_that_do_not_fit(network):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    statistics = random_statistics({"2": 6})
    for target, words in [
        ([0, 1, 2], "`target` has 3 classes, but the pass has 2 rows"),
        (5, "`target` holds 5, .* 5 classes"),
    ]:
        with (
            pytest.raises(TargetError, match=words),
            pg.ParchGrad(network, pg.ClassWise(statistics, quantile=0.5), target=target),
        ):
            input_gradient(network, x)
    for target in (-1, 1.5, True, [], "cat", [[1]]):
        with pytest.raises(TargetError):
            pg.ParchGrad(network, pg.GradientEnergy(), target=target)
    six_classes = small_network(classes=6)
    with (
        pytest.raises(StatisticsError, match=r"5 classes, .* output has 6"),
        pg.ParchGrad(six_classes, pg.ClassWise(statistics, quantile=0.5)),
    ):
        input_gradient(six_classes, x)


def test_no_class_without_the_models_output(network):
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    with pg.ParchGrad(network, PinnedChannels(needs_class=True), layers="all", **TRUE):
        part = network[:3](x).sum()
        with pytest.raises(TargetError, match="target="):
            part.backward()
    with pg.ParchGrad(network, PinnedChannels(needs_class=True), layers="all", target=1, **TRUE):
        network[:3](x).sum().backward()


# Forward passes


def test_several_forwards_in_one_context_keep_their_classes_apart(network):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    selector = PinnedChannels(needs_class=True)
    with pg.ParchGrad(network, selector):
        first, second = network(x), network(x)
        with torch.no_grad():
            assert torch.equal(network(x), first)
        second[:, 1].sum().backward()
        first[:, 4].sum().backward()
    assert [signal.classes.tolist() for signal in selector.seen] == [[1, 1], [4, 4]]


def test_backward_after_leaving_the_block_is_still_edited(network):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    with pg.ParchGrad(network, PinnedChannels(), layers="all"):
        score = network(x)[:, 0].sum()
        inside = torch.autograd.grad(score, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(score, x)[0], inside)


def test_second_derivatives_are_refused(network):
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    with (
        pytest.raises(SettingError, match=r"Second derivatives \(create_graph=True\)"),
        pg.ParchGrad(network, PinnedChannels(), layers="all"),
    ):
        torch.autograd.grad(network(x).sum(), x, create_graph=True)
    # Of the rules alone as well.
    for settings in ({"gates": 2}, {"antialias": True}):
        model, x = strided_network(), torch.randn(1, 3, 17, 15, dtype=torch.float64, requires_grad=True)
        with pytest.raises(SettingError, match="create_graph=True"), pg.ParchGrad(model, None, **settings):
            torch.autograd.grad(model(x).sum(), x, create_graph=True)


def test_the_class_of_an_earlier_backward_pass_is_not_reused(network):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    selector = PinnedChannels(needs_class=True)
    kept = []
    handle = network[5].register_forward_hook(lambda module, inputs, output: kept.append(output))
    with pg.ParchGrad(network, selector):
        network(x)[:, 4].sum().backward(retain_graph=True)
        with pytest.raises(TargetError, match="target="):
            kept[0].sum().backward()
    handle.remove()
    assert [signal.classes.tolist() for signal in selector.seen] == [[4, 4]]


@pytest.mark.parametrize("kind", ["plain", "reflect"])
def test_the_edit_is_in_what_passes_on_to_the_input(kind):
    model, _ = staged(*CHAINS[kind](), spatial_size=36, inplace=False)
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64, requires_grad=True)

    def at(layer):
        return captum.attr.LayerGradientXActivation(model, model[layer]).attribute(x, target=1)

    def earlier_hook(module, inputs, output):
        kept.append(output)

    plain, kept = {layer: at(layer) for layer in (0, 2)}, []
    handle = model[2].register_forward_hook(earlier_hook)
    with pg.ParchGrad(model, PinnedChannels(), layers=["2"], **TRUE):
        torch.testing.assert_close(at(2), plain[2])
        assert not torch.allclose(at(0), plain[0])
        # A hook from before the block sees the tensor that takes part.
        score = model(x)[:, 1].sum()
        assert torch.autograd.grad(score, kept[-1])[0].shape == kept[-1].shape
    handle.remove()


def test_weights_get_no_gradient_from_an_edited_convolution(network):
    network.requires_grad_(True)
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    with pg.ParchGrad(network, PinnedChannels(), layers="all"):
        network(x)[:, 1].sum().backward()
    assert network[0].weight.grad is None
    assert network[2].weight.grad is None
    assert x.grad is not None


def test_where_no_input_asks_for_its_gradient_nothing_is_in_the_way(network):
    """Attribution to a layer, of inputs that need no gradient: the layers before it are out of play."""
    network.requires_grad_(True)
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    with pg.ParchGrad(network, PinnedChannels(), layers="all"):
        assert torch.autograd.grad(network(x)[:, 1].sum(), network[0].weight)[0].abs().max() > 0
        found = captum.attr.LayerGradCam(network, network[0]).attribute(x, target=1)
    assert found.shape == (1, 1, 8, 8)


def doubled(module, inputs, output):
    return 2 * output if isinstance(module, nn.Conv2d) else output


def convolved(module, inputs, output):
    if not isinstance(module, nn.Conv2d):
        return output
    weight = torch.linspace(-1, 1, 9 * output.shape[1] ** 2, dtype=output.dtype).reshape(*[output.shape[1]] * 2, 3, 3)
    return nn.functional.conv2d(output, weight, padding=1)


@pytest.mark.parametrize("doubled", [doubled, convolved])
def test_what_other_hooks_put_in_place_is_not_lost(network, doubled):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    selector = pg.FixedChannels({name: torch.ones(6, dtype=torch.bool) for name in ("0", "2")})
    handle = nn.modules.module.register_module_forward_hook(doubled)
    try:
        expected = input_gradient(network, x)
        with pg.ParchGrad(network, selector, layers="all", **TRUE):
            torch.testing.assert_close(input_gradient(network, x), expected)
    finally:
        handle.remove()
    with pg.ParchGrad(network, selector, layers="all", **TRUE):
        handles = [network[index].register_forward_hook(doubled, prepend=True) for index in (0, 2)]
        torch.testing.assert_close(input_gradient(network, x), expected)
        for handle in handles:
            handle.remove()


def test_chosen_layers_that_were_never_called_are_named(network):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.unused = network, nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.network(x)

    model, x = Half().double().eval(), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    with (
        pytest.warns(ModelWarning, match=r"^1 of 3 chosen layers .*\(unused\)"),
        pg.ParchGrad(model, PinnedChannels(), layers=["network.*", "unused"]),
    ):
        found = input_gradient(model, x)
    with pg.ParchGrad(model, PinnedChannels(), layers=["network.*"]):
        torch.testing.assert_close(input_gradient(model, x), found)
    # A part of the model alone is no pass of the model.
    with pg.ParchGrad(model, PinnedChannels(), layers="all", **TRUE):
        network[:2](x)


@pytest.mark.parametrize("where", ["inside", "behind the block", "in a plain block", "in another thread"])
def test_checkpointed_parts_are_edited(network, where):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x):
            x = torch.utils.checkpoint.checkpoint(self.network[:5], x, use_reentrant=False)
            return self.network[5:](x)

    model = Checkpointed().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    with pg.ParchGrad(network, PinnedChannels(), layers="all"):
        expected = input_gradient(network, x, target=1)
    found = []

    def backward():
        found.append(torch.autograd.grad(score, x)[0])

    with pg.ParchGrad(model, PinnedChannels(), layers="all"):
        score = model(x)[:, 1].sum()
        if where == "inside":
            backward()
        elif where == "in a plain block":
            with plain_gradients(model):
                backward()
        elif where == "in another thread":
            thread = threading.Thread(target=backward)
            thread.start()
            thread.join()
    if where == "behind the block":
        backward()
    torch.testing.assert_close(found[0], expected)


def test_a_weight_changed_before_the_backward_pass_is_noticed(network):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    with pg.ParchGrad(network, PinnedChannels(), layers="all"):
        score = network(x).sum()
        with torch.no_grad():
            network[2].weight += 1
        with pytest.raises(ModelError, match="weight of a convolution was changed"):
            score.backward()


def test_an_output_changed_in_place_that_others_need_is_noticed(network):
    """Torch's own check: what an operation saved may not be overwritten."""
    kept = []
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    said = pytest.raises(RuntimeError, match="modified by an inplace operation")
    with said, pg.ParchGrad(network, PinnedChannels(), layers="all", balance=False):
        handle = network[0].register_forward_hook(lambda module, inputs, output: kept.append(output.square()))
        score = network(x).sum() + kept[0].sum()
        handle.remove()
        score.backward()


def test_an_empty_batch(network):
    for selector in (pg.GradientEnergy(), pg.Evidence(), pg.RandomChannels()):
        with pg.ParchGrad(network, selector, layers="all"):
            assert input_gradient(network, torch.zeros(0, 3, 8, 8, dtype=torch.float64)).shape == (0, 3, 8, 8)


class Delegating(nn.Conv2d):
    """A convolution that hands over to another one inside it."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.inner = nn.Conv2d(*arguments)

    def forward(self, x):
        return self.inner(x)


def test_one_operation_is_edited_once():
    model = nn.Sequential(Delegating(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).double().eval()
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    selector = PinnedChannels()
    with pg.ParchGrad(model, selector, layers="all"):
        input_gradient(model, x)
    assert [signal.layer for signal in selector.seen] == ["0.inner"]


def test_blocks_on_a_model_and_on_a_part_of_it_do_not_add_up(network):
    wrapper = nn.Sequential(nn.Identity(), network).eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with pg.ParchGrad(network, pg.RandomChannels(quantile=0.5), layers="all"):
        expected = input_gradient(wrapper, x)
    with (
        pg.ParchGrad(wrapper, pg.GradientEnergy(quantile=0.2), layers="all"),
        pg.ParchGrad(network, pg.RandomChannels(quantile=0.5), layers="all"),
    ):
        assert torch.equal(input_gradient(wrapper, x), expected)


def test_a_plain_explainer_is_plain_inside_a_block(network):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with pg.ParchGrad(network, pg.GradientEnergy(quantile=0.2), layers="all"):
        found = pg.Explainer(network, None).attribute(x, 1)
        assert not torch.equal(input_gradient(network, x, 1), found)
    assert torch.equal(found, input_gradient(network, x, 1))


class Functional(nn.Module):
    """A convolution that is used past its module."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(functional.conv2d(x, self.conv.weight).mean((2, 3)))


def test_nothing_edited_is_an_error_where_the_output_hides_its_tensors_too():
    class Hidden(Functional):
        def forward(self, x):
            return SimpleNamespace(logits=super().forward(x))

    model, x = Hidden().eval(), torch.randn(1, 3, 8, 8)
    with pg.ParchGrad(model, pg.GradientEnergy(), layers="all"):
        with torch.no_grad():
            assert model(x).logits.shape == (1, 3)
        with pytest.raises(ModelError, match="None of the chosen layers was called"):
            model(x)


def test_nothing_edited_is_an_error_not_a_plain_map():
    model = Functional().eval()
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    with pg.ParchGrad(model, pg.GradientEnergy(), layers="all"):
        with torch.no_grad():
            model(x)
        with pytest.raises(ModelError, match="None of the chosen layers was called"):
            model(x)
    assert hooks(model) == 0


def test_compiled_models_and_parts_are_refused(network):
    block = pg.ParchGrad(network, pg.GradientEnergy())
    part = nn.Sequential(nn.Identity(), torch.compile(small_network(), backend="eager"))
    in_place = small_network()
    in_place[2].compile(backend="eager")
    for model in (torch.compile(network, backend="eager"), part.eval(), in_place):
        with pytest.raises(ModelError, match=r"compiled by torch\.compile.*_orig_mod"):
            pg.ParchGrad(model, pg.GradientEnergy())
    network.compile(backend="eager")
    with pytest.raises(ModelError, match=r"compiled by torch\.compile"), block:
        pass
    assert hooks(network) == 0


# PyTorch says that tracing is on its way out.
@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_torchscript_is_refused(network):
    traced = torch.jit.trace(network, torch.randn(1, 3, 8, 8, dtype=torch.float64))
    for model in (traced, nn.Sequential(nn.Identity(), traced).eval()):
        with pytest.raises(ModelError, match="TorchScript"):
            pg.ParchGrad(model, None, gates=4.0)


def test_a_block_in_which_the_model_is_not_called_warns(network):
    compiled = torch.compile(network, backend="eager")
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        compiled(x)
    block = pg.ParchGrad(network, pg.GradientEnergy(), layers="all", **TRUE)
    with pytest.warns(ModelWarning, match="Nothing was edited: Sequential"), block:
        pass
    # A compiled wrapper made before the block may run past its hooks; then it warns, and else it is edited.
    plain = input_gradient(network, x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with block:
            found = input_gradient(compiled, x)
    said = any(issubclass(warning.category, ModelWarning) for warning in caught)
    assert said == torch.allclose(found, plain)


def test_transforms_of_torch_func_are_refused(network):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with (
        pytest.raises(ModelError, match=r"not work within transforms of torch\.func"),
        pg.ParchGrad(network, pg.GradientEnergy(), layers="all"),
    ):
        torch.func.grad(lambda inputs: network(inputs)[:, 0].sum())(x)
    with (
        pytest.raises(ModelError, match=r"not work within transforms of torch\.func"),
        pg.ParchGrad(network, pg.GradientEnergy(), layers="all"),
    ):
        torch.func.vmap(lambda row: network(row.unsqueeze(0)))(x)
    # Before any rules act, also where they come before the first chosen convolution, or without any.
    for settings in ({"layers": ["2"]}, {"selector": None, "gates": 2}):
        with pytest.raises(ModelError, match=r"torch\.func"), pg.ParchGrad(network, **settings):
            torch.func.grad(lambda inputs: network(inputs)[:, 0].sum())(x)
        assert nothing_is_left(network)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("layers", ["all", ["0"]])
def test_autocast_around_everything_keeps_the_scale(dtype, tolerance, layers):
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 300, 3), nn.ReLU(), nn.Conv2d(300, 300, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4800, 4)
    ).eval()
    x = torch.randn(2, 3, 8, 8)
    block = pg.ParchGrad(model, pg.RandomChannels(quantile=0.1), layers=layers)
    with block:
        expected = input_gradient(model, x)
    with torch.autocast("cpu", dtype), block:
        around = input_gradient(model, x)
    # As is the custom: the forward pass alone under autocast.
    leaf = x.clone().requires_grad_()
    with block:
        with torch.autocast("cpu", dtype):
            score = model(leaf)[:, 0].float().sum()
        (behind,) = torch.autograd.grad(score, leaf)
    half = copy.deepcopy(model).to(dtype)
    with pg.ParchGrad(half, pg.RandomChannels(quantile=0.1), layers=layers):
        of_half = input_gradient(half, x.to(dtype))
    assert of_half.dtype == dtype
    assert float((of_half.float() - expected).norm() / expected.norm()) < tolerance
    for found in (around, behind):
        assert found.dtype == torch.float32
        assert float((found - expected).norm() / expected.norm()) < tolerance


def test_nested_contexts_only_the_innermost_acts(network):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    outer, inner = pg.GradientEnergy(quantile=0.2), pg.RandomChannels(quantile=0.5)

    def alone(selector):
        with pg.ParchGrad(network, selector, layers="all"):
            return input_gradient(network, x)

    again = pg.ParchGrad(network, outer, layers="all")
    with again:
        with pg.ParchGrad(network, inner, layers="all"):
            assert torch.equal(input_gradient(network, x), alone(inner))
            with again:
                assert torch.equal(input_gradient(network, x), alone(outer))
            other = small_network()
            with pg.ParchGrad(other, inner):
                input_gradient(other, x)
                assert torch.equal(input_gradient(network, x), alone(inner))
        assert torch.equal(input_gradient(network, x), alone(outer))
    with again:
        assert torch.equal(input_gradient(network, x), alone(outer))
    assert hooks(network) == 0


def test_threads_on_one_model_do_not_see_each_other(network):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    selectors = [None, pg.GradientEnergy(quantile=0.2), pg.Evidence(), pg.RandomChannels(quantile=0.5)]

    def explain(selector):
        if selector is None:
            return input_gradient(network, x)
        with pg.ParchGrad(network, selector, layers="all"):
            return input_gradient(network, x)

    expected = [explain(selector) for selector in selectors]
    wrong, barrier = [], threading.Barrier(len(selectors))

    def work(index):
        barrier.wait()
        for _ in range(25):
            if not torch.equal(explain(selectors[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(selectors))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert hooks(network) == 0


# The model stays as it was


def snapshot(model):
    state = copy.deepcopy(model.state_dict())
    flags = [(module.training, getattr(module, "inplace", None), sorted(vars(module))) for module in model.modules()]
    return state, flags, [(p.requires_grad, p.grad is None) for p in model.parameters()]


@pytest.mark.parametrize("selector", all_selectors(), ids=lambda selector: type(selector).__name__)
@pytest.mark.parametrize("event", ["normal", "bad target", "model raises", "backward raises", "interrupted"])
def test_no_hook_is_left_and_the_model_is_what_it_was(selector, event):
    model = small_network()
    if event == "model raises":
        model.append(Raises().eval())
    before = snapshot(model)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = {
        "normal": contextlib.nullcontext(),
        "bad target": pytest.raises(IndexError),
        "model raises": pytest.raises(ZeroDivisionError),
        "backward raises": pytest.raises(OverflowError),
        "interrupted": pytest.raises(KeyboardInterrupt),
    }[event]
    with expected, pg.ParchGrad(model, selector, layers="all"):
        assert hooks(model) > 0
        if event == "interrupted":
            raise KeyboardInterrupt
        if event == "backward raises":
            leaf = x.clone().requires_grad_()
            leaf.register_hook(raise_overflow)
            model(leaf).sum().backward()
        captum.attr.Saliency(model).attribute(x.requires_grad_(), target=99 if event == "bad target" else 1)
    assert nothing_is_left(model)
    state, flags, parameters = snapshot(model)
    assert all(torch.equal(value, before[0][name]) for name, value in state.items())
    assert flags == before[1]
    if event != "backward raises":
        assert parameters == before[2]
    # A forward that failed leaves no state for the next one.
    assert torch.isfinite(input_gradient(small_network(), x)).all()


def raise_overflow(gradient):
    raise OverflowError


def test_a_failed_forward_does_not_disturb_the_next_one(network):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    selector = PinnedChannels(needs_class=True)
    with pg.ParchGrad(network, selector, layers="all"):
        with pytest.raises(RuntimeError):
            network(x[:, :1])
        input_gradient(network, x, target=2)
    assert {tuple(signal.classes.tolist()) for signal in selector.seen} == {(2, 2)}


def test_the_graph_is_freed_without_the_garbage_collector(network):
    kept = []

    class Watched(pg.GradientTimesActivation):
        def observe(self, output):
            copy_ = super().observe(output)
            kept.append(weakref.ref(copy_))
            return copy_

    gc.disable()
    try:
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
        with pg.ParchGrad(network, Watched(), layers="all"):
            output = network(x)
            # The copies of the activations hang on the graph's nodes.
            alive = [weakref.ref(output), *kept]
            assert all(reference() is not None for reference in alive)
            del output
            assert [reference() for reference in alive] == [None] * 3
    finally:
        gc.enable()


def test_wrong_arguments(network):
    with pytest.raises(SettingError, match="must be an object"):
        pg.ParchGrad(network, pg.GradientEnergy)
    with pytest.raises(SettingError, match="`gamma` is -1"):
        pg.ParchGrad(network, pg.GradientEnergy(), gamma=-1)
    with pytest.raises(ModelError, match=r"model\.module"):
        pg.ParchGrad(nn.DataParallel(network), pg.GradientEnergy())
    with pytest.raises(ModelError, match="has no convolution"):
        pg.ParchGrad(nn.ReLU(), pg.GradientEnergy())
    network[3].train()
    with (
        pytest.raises(ModelError, match=r"Sequential \(in '3'\) is in training mode.*model\.eval\(\)"),
        pg.ParchGrad(network, pg.GradientEnergy()),
    ):
        pass
    assert hooks(network) == 0


def test_inputs_without_a_batch_dimension_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    with (
        pytest.raises(InputError, match="layer '0' has no batch dimension"),
        pg.ParchGrad(model, pg.GradientEnergy()),
    ):
        model(torch.randn(3, 6, 6, requires_grad=True))


def test_a_model_without_one_output_tensor_needs_a_target(network):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x):
            return x, self.network(x)

    model = Pair().eval()
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    selector = PinnedChannels(needs_class=True)
    with pytest.raises(ModelError, match="tuple"), pg.ParchGrad(model, selector):
        model(x)
    selector = PinnedChannels(needs_class=True)
    with pg.ParchGrad(model, selector, target=2):
        model(x)[1][:, 2].sum().backward()
    assert selector.seen[0].classes.tolist() == [2]


def test_leaving_in_another_thread_is_an_error_and_leaves_no_hook(network):
    block = pg.ParchGrad(network, pg.GradientEnergy(), layers="all")
    errors = []

    def leave():
        try:
            block.__exit__(None, None, None)
        except ParchGradError as error:
            errors.append(error)

    block.__enter__()
    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    assert "another thread" in str(errors[0])
    assert hooks(network) == 0
    # Whoever is still in it is told.
    with pytest.raises(ParchGradError, match="already left"):
        contextvars.copy_context().run(block.__exit__, None, None, None)
    # The abandoned block does not stand in the way of others.
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    selector = PinnedChannels()
    with pg.ParchGrad(network, selector, layers="all"):
        input_gradient(network, x)
    assert len(selector.seen) == 2
    # Nor is it kept alive.
    assert session.SESSIONS.get() == ()
    with pytest.raises(ParchGradError, match="another thread"):
        pg.ParchGrad(network, pg.GradientEnergy()).__exit__(None, None, None)


def test_leaving_elsewhere_closes_nobody_elses_entrance(network):
    """Of a block entered here and there, it is not known which entrance a third place means."""
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    block = pg.ParchGrad(network, pg.GradientEnergy(quantile=0.3), layers="all")
    there = contextvars.copy_context()
    there.run(block.__enter__)
    with block:
        expected = input_gradient(network, x)
        with pytest.raises(ParchGradError, match="another thread"):
            contextvars.Context().run(block.__exit__, None, None, None)
        assert torch.equal(input_gradient(network, x), expected)
        assert torch.equal(there.run(input_gradient, network, x), expected)
    there.run(block.__exit__, None, None, None)
    assert hooks(network) == 0


def test_an_interrupted_entrance_leaves_no_hook(network, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(network[2], "register_forward_hook", interrupt)
    with pytest.raises(KeyboardInterrupt), pg.ParchGrad(network, pg.GradientEnergy(), layers="all"):
        pass
    monkeypatch.undo()
    assert hooks(network) == 0


# What is said of gradients that do not arrive


class TwoHeads(nn.Module):
    """A trunk with two heads that both run in every pass."""

    def __init__(self):
        super().__init__()
        self.trunk, self.first, self.second = nn.Conv1d(2, 4, 3), nn.Conv1d(4, 3, 3), nn.Conv1d(4, 3, 3)

    def forward(self, x):
        features = self.trunk(x).relu()
        return self.first(features).mean(dim=2), self.second(features).mean(dim=2)


@pytest.fixture
def two_heads():
    return TwoHeads().double().eval()


def gradient_of_first(model, x):
    return torch.autograd.grad(model(x)[0][:, 1].sum(), x)[0]


def test_layers_that_no_gradient_reaches_are_an_error_or_named_once(two_heads):
    x = torch.randn(2, 2, 9, dtype=torch.float64, requires_grad=True)
    with pytest.raises(LayerError, match=r"\(second\)"), pg.ParchGrad(two_heads, pg.GradientEnergy(), layers="second"):
        gradient_of_first(two_heads, x)
    with pg.ParchGrad(two_heads, pg.GradientEnergy(), layers=["trunk", "first"]):
        expected = gradient_of_first(two_heads, x)
    every = pg.ParchGrad(two_heads, pg.GradientEnergy(), layers="*")
    with warnings.catch_warnings(record=True) as said, every:
        warnings.simplefilter("always")
        assert torch.equal(gradient_of_first(two_heads, x), expected)
        gradient_of_first(two_heads, x)
    (warning,) = said
    assert issubclass(warning.category, ModelWarning)
    assert "1 of 3 chosen layers (second)" in str(warning.message)
    # Only what is on the path is meant by "all".
    with pg.ParchGrad(two_heads, pg.GradientEnergy(), layers="all"):
        assert torch.equal(gradient_of_first(two_heads, x), expected)
    # Each head has its own pass.
    with pg.ParchGrad(two_heads, pg.GradientEnergy(), layers="all"):
        for head in range(2):
            torch.autograd.grad(two_heads(x)[head].sum(), x)
    # The backward pass may follow after the block.
    with pg.ParchGrad(two_heads, pg.GradientEnergy(), layers="second"):
        output = two_heads(x)
    with pytest.warns(ModelWarning, match="after the block"):
        torch.autograd.grad(output[0].sum(), x)


def test_an_explainer_raises_no_plain_map_as_its_own(two_heads):
    x = torch.randn(2, 2, 9, dtype=torch.float64)
    for selector in (pg.GradientEnergy(), pg.Evidence()):
        explainer = pg.Explainer(two_heads, selector, layers="second", logits=lambda output: output[0])
        with pytest.raises(LayerError, match="No gradient reached the chosen layers"):
            explainer.attribute(x, 1)
        with pytest.raises(LayerError, match="No gradient reached the chosen layers"):
            pg.Explainer(two_heads, selector, layers="second").attribute(x, lambda output: output[0][:, 1])


def test_a_method_without_gradients_is_told(network):
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    occlusion = captum.attr.Occlusion(network)
    expected = occlusion.attribute(x, sliding_window_shapes=(3, 4, 4), target=1)
    with pytest.warns(ModelWarning, match="Occlusion"), pg.ParchGrad(network):
        found = occlusion.attribute(x, sliding_window_shapes=(3, 4, 4), target=1)
    assert torch.equal(found, expected)


def test_a_convolution_that_returns_no_tensor_is_named():
    class Pair(nn.Conv1d):
        def forward(self, x):
            return super().forward(x), None

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.last = Pair(2, 4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.last(self.pair(x)[0].mean(dim=2))

    model, x = Model().eval(), torch.randn(2, 2, 9)
    with pytest.raises(ModelError, match=r"Layer 'pair' returns a tuple"):
        pg.Explainer(model).attribute(x, 1)
    with pytest.raises(ModelError, match=r"Layer 'pair' returns a tuple"):
        pg.collect_statistics(model, [(row, 0) for row in x])


def test_several_backward_passes_at_once_are_refused(network):
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    seeds = torch.eye(5, dtype=torch.float64)[:, None].expand(5, 2, 5)
    with pytest.raises(SettingError, match="is_grads_batched"), pg.ParchGrad(network):
        torch.autograd.grad(network(x), x, seeds, is_grads_batched=True)
