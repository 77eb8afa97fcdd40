"""Soft gates and smooth strides against slow references; what comes of them in whole networks is in test_engine.py."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import parchgrad as pg
from parchgrad.core import gates, rules, strides
from parchgrad.core.gates import Windows, check_gates, soft_gate, soft_winners
from parchgrad.core.rules import BackwardRules
from parchgrad.core.strides import smooth_strides
from parchgrad.errors import ModelError, SettingError
from tests import reference


def gate_by_hand(values, width, low=0.0, high=math.inf):
    rows = [reference.gate(row, width, low, high) for row in values.double().flatten(1).tolist()]
    return torch.tensor(rows, dtype=torch.float64).reshape(values.shape)


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
BOUNDS = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0), "hardtanh": (-1.0, 1.5), "upper alone": (-math.inf, 1.0)}


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.lists(st.floats(-8, 8, width=16), min_size=4, max_size=4), min_size=1, max_size=3),
    width=st.sampled_from([0, 0.1, 1, 2.0, 8.0]),
    kind=st.sampled_from(sorted(BOUNDS)),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_soft_gate_is_the_reference(rows, width, kind, dtype):
    values = torch.tensor(rows, dtype=dtype).reshape(len(rows), 2, 2)
    # Of a row that is almost constant, the deviation itself is rounding.
    if dtype != torch.float64:
        values = values.round()
    low, high = BOUNDS[kind]
    found = soft_gate(values, width, low=low, high=high)
    assert (found.dtype, found.shape) == (values.dtype, values.shape)
    expected = gate_by_hand(values, width, low, high)
    # Without deviation beside values of another size, the ramp is of no width.
    spread = values.double().flatten(1).std(dim=1)
    clear = (spread > 1e-3 * (1 + values.double().flatten(1).abs().amax(dim=1))) | (spread == 0)
    assert ((found.double() - expected).abs() <= TOLERANCE[dtype])[clear].all()


def test_rows_of_one_value_and_constant_rows_have_the_true_derivative():
    single = torch.tensor([[-1.0], [0.0], [2.0], [7.0]])
    assert soft_gate(single, 4.0, high=6.0).flatten().tolist() == [0, 0, 1, 0]
    constant = torch.tensor([-0.1, 0.0, 0.1]).reshape(3, 1, 1).expand(3, 7, 9)
    assert soft_gate(constant, 4.0)[:, 0, 0].tolist() == [0, 0, 1]
    # Beside rows that vary, which are as they are alone.
    mixed = torch.cat((constant[2:].clone(), torch.randn(2, 7, 9)))
    found = soft_gate(mixed, 4.0)
    assert (found[0] == 1).all()
    for row in (1, 2):
        torch.testing.assert_close(found[row : row + 1], soft_gate(mixed[row : row + 1], 4.0))
    assert soft_gate(torch.zeros(0, 3, 2), 2.0).shape == (0, 3, 2)


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**-6, 2.0**20])
def test_gates_of_a_relu_depend_on_no_scale(scale):
    values = torch.randn(3, 4, 5, 5)
    assert torch.equal(soft_gate(scale * values, 2.0), soft_gate(values, 2.0))


def test_gates_of_values_whose_squares_are_too_small_are_the_true_derivative():
    generator = torch.Generator().manual_seed(0)
    for values in (torch.randn(1, count, 1, 1, generator=generator) * 1e-27 for count in range(2, 200)):
        assert torch.equal(soft_gate(values, 2.0, high=6.0), (values > 0).float())


def test_gates_move_with_the_values_alone():
    """A small change of what enters moves a gate by at most so much: no derivative jumps any more."""
    values = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    change = 1e-6 * torch.randn(values.shape, dtype=torch.float64)
    moved = (soft_gate(values + change, 2.0) - soft_gate(values, 2.0)).abs().max()
    assert moved <= 2 * change.abs().max() / (2.0 * values.std())


@pytest.mark.parametrize("width", [2.0, 0.0])
def test_no_number_of_a_gate_is_read_off_a_device(width):
    assert soft_gate(torch.empty(2, 3, 4, device="meta"), width, high=6.0).device.type == "meta"


def test_settings_out_of_range():
    for wrong in (-1, -1e-9, math.inf, math.nan, "wide", None, True):
        with pytest.raises(SettingError, match=f"`gates` is {wrong!r}"):
            check_gates(wrong)
    for wrong in (1, 0, "yes"):
        for name in ("antialias", "balance"):
            with pytest.raises(SettingError, match=f"`{name}` is of type {type(wrong).__name__}"):
                pg.Edit(**{name: wrong})
    for right in (0, 2, 0.5, np.float64(3)):
        check_gates(right)


# Every way to call a rectifier

SLOPES = torch.tensor([0.1, 0.5, -0.2, 0.9])
RELU = (0.0, math.inf, 0.0)
CALLS = {
    "nn.ReLU": (nn.ReLU(), RELU),
    "nn.ReLU in place": (nn.ReLU(inplace=True), RELU),
    "nn.ReLU6": (nn.ReLU6(), (0.0, 6.0, 0.0)),
    "nn.ReLU6 in place": (nn.ReLU6(inplace=True), (0.0, 6.0, 0.0)),
    "nn.Hardtanh": (nn.Hardtanh(), (-1.0, 1.0, 0.0)),
    "nn.Hardtanh of other bounds, in place": (nn.Hardtanh(0.5, 2.0, inplace=True), (0.5, 2.0, 0.0)),
    "nn.LeakyReLU": (nn.LeakyReLU(), (0.0, math.inf, 0.01)),
    "nn.LeakyReLU in place": (nn.LeakyReLU(0.3, inplace=True), (0.0, math.inf, 0.3)),
    "nn.PReLU": (nn.PReLU(), (0.0, math.inf, 0.25)),
    "nn.PReLU per channel": (nn.PReLU(4), (0.0, math.inf, SLOPES)),
    "F.relu": (functional.relu, RELU),
    "F.relu by name": (lambda x: functional.relu(input=x), RELU),
    "F.relu in place": (lambda x: functional.relu(x, inplace=True), RELU),
    "F.relu in place by place": (lambda x: functional.relu(x, True), RELU),
    "F.relu_": (functional.relu_, RELU),
    "F.relu6": (functional.relu6, (0.0, 6.0, 0.0)),
    "F.relu6 in place": (lambda x: functional.relu6(input=x, inplace=True), (0.0, 6.0, 0.0)),
    "F.hardtanh": (functional.hardtanh, (-1.0, 1.0, 0.0)),
    "F.hardtanh by name": (lambda x: functional.hardtanh(x, max_val=2.0, min_val=-0.5), (-0.5, 2.0, 0.0)),
    "F.hardtanh_": (lambda x: functional.hardtanh_(x, -0.5, 2.0), (-0.5, 2.0, 0.0)),
    "F.leaky_relu": (lambda x: functional.leaky_relu(x, 0.2), (0.0, math.inf, 0.2)),
    "F.leaky_relu in place": (lambda x: functional.leaky_relu(x, 0.2, inplace=True), (0.0, math.inf, 0.2)),
    "F.leaky_relu_": (functional.leaky_relu_, (0.0, math.inf, 0.01)),
    "F.prelu": (lambda x: functional.prelu(x, SLOPES.to(x.dtype)), (0.0, math.inf, SLOPES)),
    "torch.relu": (torch.relu, RELU),
    "torch.relu_": (torch.relu_, RELU),
    "torch.prelu by name": (lambda x: torch.prelu(input=x, weight=SLOPES[1:2].to(x.dtype)), (0.0, math.inf, 0.5)),
    "Tensor.relu": (lambda x: x.relu(), RELU),
    "Tensor.relu_": (lambda x: x.relu_(), RELU),
    "Tensor.prelu": (lambda x: x.prelu(SLOPES.to(x.dtype)), (0.0, math.inf, SLOPES)),
}
SPACES = [(), (5,), (4, 5), (2, 3, 4)]


def derivative_by_hand(values, bounds, width):
    low, high, slope = bounds
    if isinstance(slope, torch.Tensor):
        slope = slope.double().reshape(-1, *[1] * (values.dim() - 2))
    return slope + (1 - slope) * gate_by_hand(values, width, low, high)


def weighted(call, dtype):
    """The call, with slopes per channel and a weight of its dtype where it is a module."""
    if isinstance(call, nn.PReLU):
        call = copy.deepcopy(call).to(dtype)
        if call.weight.numel() > 1:
            call.weight.data.copy_(SLOPES)
    return call


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("way", CALLS)
def test_every_call_of_a_rectifier_keeps_its_values_and_softens_its_derivative(way, space, dtype):
    call, bounds = CALLS[way]
    call = weighted(call, dtype)
    leaf = (3 * torch.randn(3, 4, *space, dtype=torch.float32)).to(dtype).requires_grad_()
    seed = torch.randn(leaf.shape).to(dtype)
    wanted = call(leaf.clone())
    for width in (0.3, 2.0):
        with BackwardRules(gates=width, antialias=True):
            source = leaf.clone()
            output = call(source)
        assert torch.equal(output, wanted)
        assert (output.dtype, output.shape) == (dtype, leaf.shape)
        # What is computed in place is in place.
        assert ("in place" in way or way.endswith("_")) == (output.data_ptr() == source.data_ptr())
        (found,) = torch.autograd.grad(output, leaf, seed)
        expected = seed.double() * derivative_by_hand(leaf.detach(), bounds, width)
        assert (found.double() - expected).abs().max() <= 10 * TOLERANCE[dtype] * seed.double().abs().max()
        assert found.dtype == dtype
    # Without rules the derivative is the true one.
    (plain,) = torch.autograd.grad(call(leaf.clone()), leaf, seed)
    assert not torch.allclose(plain, found)


@pytest.mark.parametrize(
    ("cut", "is_smoothed"),
    [
        (nn.Conv2d(3, 4, 4, stride=4), False),
        (nn.Conv2d(3, 4, (4, 3), stride=(4, 4)), False),
        (nn.AvgPool2d(4), False),
        (nn.MaxPool2d(5, 5), False),
        (nn.Conv2d(3, 4, 3, stride=3), True),
        (nn.Conv2d(3, 4, 5, stride=4), True),
        (nn.Conv2d(3, 4, (5, 4), stride=4), True),
    ],
)
def test_patches_are_not_smoothed(cut, is_smoothed):
    """Pixels of patches that do not overlap all count once; smoothing would blur the map by a patch."""
    x = torch.randn(2, 3, 20, 20, requires_grad=True)
    with BackwardRules(antialias=True):
        result = cut(x)
    (found,) = torch.autograd.grad(result.square().sum(), x)
    (true,) = torch.autograd.grad(cut(x).square().sum(), x)
    assert torch.equal(found, true) != is_smoothed
    # The same at a layer that is edited.
    if isinstance(cut, nn.Conv2d):
        model = nn.Sequential(cut, nn.Flatten(), nn.LazyLinear(2)).eval()
        model(x)
        masks = pg.FixedChannels({"0": torch.ones(4, dtype=torch.bool)})
        edited, plain = (pg.Explainer(model, masks, gates=0, antialias=on).attribute(x, 1) for on in (True, False))
        assert torch.allclose(edited, plain) != is_smoothed


def test_every_rectifier_and_strided_operation_of_the_tables_is_tried():
    seen = []

    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Watching():
        for call, _ in CALLS.values():
            weighted(call, torch.float32)(torch.randn(2, 4, 3, requires_grad=True).clone())
        for call, dimensions, _ in STRIDED.values():
            call(torch.randn(2, 4, *[9] * dimensions, requires_grad=True))
    assert set(gates._RECTIFIERS) <= set(seen)
    assert set(strides._STRIDED) <= set(seen)


@pytest.mark.parametrize("call", [functional.relu_, nn.ReLU6(inplace=True), lambda x: x.relu_()])
def test_a_view_is_rectified_in_place(call):
    leaf = torch.randn(2, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(leaf.shape, dtype=torch.float64)

    def run():
        whole = leaf * 2
        call(whole[:, 1:3])
        return whole

    expected = run()
    with BackwardRules(gates=2.0, antialias=False):
        whole = run()
    assert torch.equal(whole, expected)
    high = 6.0 if isinstance(call, nn.ReLU6) else math.inf
    derivative = torch.full_like(leaf, 2.0)
    derivative[:, 1:3] *= gate_by_hand(2 * leaf.detach()[:, 1:3], 2.0, 0.0, high)
    torch.testing.assert_close(torch.autograd.grad(whole, leaf, seed)[0], seed * derivative)


def test_operations_in_place_around_a_rectifier():
    leaf = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def run(rectify):
        value = leaf.clone()
        value += 0.1
        value = rectify(value)
        value *= 3
        return rectify(value.sub_(0.2))

    with BackwardRules(gates=2.0, antialias=False):
        maps = [torch.autograd.grad(run(rectify).square().sum(), leaf)[0] for rectify in (torch.relu, torch.relu_)]
    torch.testing.assert_close(*maps)
    first = leaf.detach() + 0.1
    second = 3 * first.relu() - 0.2
    by_hand = 2 * second.relu() * gate_by_hand(second, 2.0) * 3 * gate_by_hand(first, 2.0)
    torch.testing.assert_close(maps[0], by_hand)


def test_what_an_operation_saved_may_not_be_overwritten_by_a_rectifier():
    leaf = torch.randn(2, 3, 5, requires_grad=True)
    with BackwardRules(gates=2.0, antialias=False):
        value = leaf.exp()
        output = functional.relu_(value)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_rules_leave_alone_what_records_no_gradient():
    values = torch.randn(2, 3, 4)
    with BackwardRules(gates=2.0, antialias=True):
        assert functional.relu(values).grad_fn is None
        with torch.no_grad():
            assert functional.relu(values.clone().requires_grad_()).grad_fn is None
        # A row of values has no rows.
        leaf = torch.randn(5, requires_grad=True)
        (found,) = torch.autograd.grad(functional.relu(leaf).sum(), leaf)
        assert torch.equal(found, (leaf > 0).float())
        weight = torch.randn(3, 2, 1, requires_grad=True)
        output = functional.conv1d(torch.randn(2, 2, 6), weight, stride=2)
        assert torch.autograd.grad(output.sum(), weight)[0].shape == weight.shape


def test_weights_of_a_rectifier_get_no_gradient_through_a_soft_gate_and_stand_in_nobodys_way():
    slope, leaf = nn.PReLU(), torch.randn(2, 3, 4, requires_grad=True)
    with BackwardRules(gates=2.0, antialias=False):
        slope(leaf).sum().backward()
    assert slope.weight.grad is None
    assert leaf.grad is not None


# Smooth strides


def smooth_by_hand(gradient, strides):
    """Row by row, line by line, in any number of dimensions."""
    rows = []
    for row in gradient.double().numpy():
        after = row
        for axis, stride in enumerate(strides, 1):
            after = np.apply_along_axis(lambda line, n=stride: reference.smooth_line(line.tolist(), n), axis, after)
        norm = math.sqrt((after**2).sum())
        rows.append(after * (math.sqrt((row**2).sum()) / norm if norm > 0 else 1.0))
    return torch.from_numpy(np.stack(rows))


SIZES = {1: (9,), 2: (7, 6), 3: (4, 5, 3)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize(
    "strides", [n for d in (1, 2) for n in itertools.product((1, 2, 3), repeat=d)] + [(2, 2, 2), (1, 3, 2), (3, 1, 1)]
)
def test_smooth_strides_is_the_reference(strides, dtype):
    gradient = torch.randn(3, 4, *SIZES[len(strides)]).to(dtype)
    gradient[1] = 0
    before = gradient.clone()
    found = smooth_strides(gradient, strides)
    assert torch.equal(gradient, before)
    assert found.dtype == dtype
    expected = smooth_by_hand(gradient, strides)
    assert (found.double() - expected).abs().max() <= TOLERANCE[dtype] * 10
    if len(strides) == 2:
        same = torch.from_numpy(np.stack([reference.smooth_strides(row, strides) for row in gradient.numpy()]))
        torch.testing.assert_close(expected, same)
    norms = found.double().flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, gradient.double().flatten(1).norm(dim=1), rtol=10 * TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-40, 2.0**60])
def test_smoothing_scales_exactly(scale):
    gradient = torch.randn(3, 4, 7, 6)
    # Each row in a unit of its own.
    scales = torch.tensor([scale, 1.0, scale**0.5]).reshape(3, 1, 1, 1)
    assert torch.equal(smooth_strides(scales * gradient, (2, 3)), scales * smooth_strides(gradient, (2, 3)))


def test_a_row_is_smoothed_as_it_is_alone():
    scales = torch.tensor([1e-40, 1.0, 1e40], dtype=torch.float64).reshape(3, 1, 1, 1)
    gradient = scales * torch.randn(3, 4, 7, 6, dtype=torch.float64)
    whole = smooth_strides(gradient, (2, 2))
    for row in range(3):
        alone = smooth_strides(gradient[row : row + 1], (2, 2))[0]
        assert (whole[row] - alone).abs().max() <= 1e-14 * alone.abs().max()


def test_smoothing_stays_in_single_precision_under_autocast():
    gradient = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = smooth_strides(gradient, (2, 2))
    assert torch.equal(found, smooth_strides(gradient, (2, 2)))


def test_a_gradient_without_rows_or_on_another_device():
    assert smooth_strides(torch.zeros(0, 3, 4, 4), (2, 2)).shape == (0, 3, 4, 4)
    assert smooth_strides(torch.empty(2, 3, 4, 4, device="meta"), (2, 2)).device.type == "meta"


@pytest.mark.parametrize("pool", [nn.MaxPool1d(2), nn.MaxPool2d(2), nn.AvgPool3d(2)], ids=repr)
def test_a_sample_without_a_batch_dimension(pool):
    dimensions = int(type(pool).__name__[-2])
    leaf = torch.randn(4, *[6] * dimensions, dtype=torch.float64, requires_grad=True)
    (plain,) = torch.autograd.grad(pool(leaf).square().sum(), leaf)
    with BackwardRules(gates=0, antialias=True):
        (found,) = torch.autograd.grad(pool(leaf).square().sum(), leaf)
    torch.testing.assert_close(found, smooth_by_hand(plain.unsqueeze(0), [2] * dimensions)[0])


def kernel(dimensions):
    return torch.randn(5, 4, *[3] * dimensions, generator=torch.Generator().manual_seed(dimensions)).double()


def by_name(function, dimensions, **options):
    return lambda x: function(input=x, weight=kernel(dimensions).to(x.dtype), **options)


STRIDED = {
    "nn.Conv1d": (nn.Conv1d(4, 5, 3, stride=2), 1, (2,)),
    "nn.Conv2d": (nn.Conv2d(4, 5, 3, stride=(2, 3), padding=1), 2, (2, 3)),
    "nn.Conv2d of groups": (nn.Conv2d(4, 6, 3, stride=2, groups=2, dilation=2, padding="valid"), 2, (2, 2)),
    "nn.Conv2d strided in one dimension": (nn.Conv2d(4, 5, 3, stride=(1, 2)), 2, (1, 2)),
    "nn.Conv3d": (nn.Conv3d(4, 5, 3, stride=(1, 2, 3)), 3, (1, 2, 3)),
    "F.conv1d by name": (by_name(functional.conv1d, 1, stride=3), 1, (3,)),
    "F.conv2d by place": (lambda x: functional.conv2d(x, kernel(2).to(x.dtype), None, 2, 1), 2, (2, 2)),
    "F.conv2d by name": (by_name(functional.conv2d, 2, stride=(3, 2)), 2, (3, 2)),
    "F.conv2d of one number": (by_name(functional.conv2d, 2, stride=(3,)), 2, (3, 3)),
    "F.conv3d": (by_name(functional.conv3d, 3, stride=[2, 1, 1]), 3, (2, 1, 1)),
    "nn.MaxPool1d": (nn.MaxPool1d(3, 2), 1, (2,)),
    "nn.MaxPool2d": (nn.MaxPool2d(2), 2, (2, 2)),
    "nn.MaxPool2d with indices": (nn.MaxPool2d((3, 2), (2, 1), return_indices=True), 2, (2, 1)),
    "nn.MaxPool3d": (nn.MaxPool3d(2), 3, (2, 2, 2)),
    "F.max_pool1d": (lambda x: functional.max_pool1d(x, 2), 1, (2,)),
    "F.max_pool2d by name": (lambda x: functional.max_pool2d(x, kernel_size=3, stride=2, padding=1), 2, (2, 2)),
    "F.max_pool1d_with_indices": (lambda x: functional.max_pool1d(x, 3, return_indices=True), 1, (3,)),
    "F.max_pool3d_with_indices": (lambda x: functional.max_pool3d(x, 3, 2, return_indices=True), 3, (2, 2, 2)),
    "torch.max_pool1d": (lambda x: torch.max_pool1d(x, 2), 1, (2,)),
    "torch.max_pool2d": (lambda x: torch.max_pool2d(x, 3, 2), 2, (2, 2)),
    "torch.max_pool3d": (lambda x: torch.max_pool3d(x, 2), 3, (2, 2, 2)),
    "nn.AvgPool1d": (nn.AvgPool1d(2), 1, (2,)),
    "nn.AvgPool2d": (nn.AvgPool2d(3, stride=(1, 2)), 2, (1, 2)),
    "nn.AvgPool3d": (nn.AvgPool3d(2), 3, (2, 2, 2)),
    "F.avg_pool2d by name": (lambda x: functional.avg_pool2d(input=x, kernel_size=2), 2, (2, 2)),
}


def first_of(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("way", STRIDED)
def test_every_strided_operation_keeps_its_values_and_sends_back_a_smooth_gradient(way):
    call, dimensions, strides = STRIDED[way]
    call = copy.deepcopy(call).double() if isinstance(call, nn.Module) else call
    leaf = torch.randn(2, 4, *[9] * dimensions, dtype=torch.float64, requires_grad=True)
    wanted = call(leaf)
    (plain,) = torch.autograd.grad(first_of(wanted).square().sum(), leaf)
    with BackwardRules(gates=0, antialias=True):
        output = call(leaf)
    assert all(map(torch.equal, output, wanted)) if isinstance(output, tuple) else torch.equal(output, wanted)
    (found,) = torch.autograd.grad(first_of(output).square().sum(), leaf)
    torch.testing.assert_close(found, smooth_by_hand(plain, strides))
    assert not torch.allclose(found, plain)
    if way not in POOLED:
        with BackwardRules(gates=2.0, antialias=False):
            (found,) = torch.autograd.grad(first_of(call(leaf)).square().sum(), leaf)
        assert torch.equal(found, plain)


@pytest.mark.parametrize(
    "call",
    [
        nn.Conv2d(4, 5, 3).double(),
        nn.Conv1d(4, 5, 3, padding="same").double(),
        nn.AvgPool2d(3, stride=1),
        nn.AdaptiveAvgPool2d(2),
        nn.Upsample(scale_factor=2),
    ],
)
def test_operations_without_a_stride_are_left_alone(call):
    dimensions = 1 if isinstance(call, nn.Conv1d) else 2
    leaf = torch.randn(2, 4, *[9] * dimensions, dtype=torch.float64, requires_grad=True)
    (plain,) = torch.autograd.grad(call(leaf).square().sum(), leaf)
    with BackwardRules(gates=2.0, antialias=True):
        output = call(leaf)
    assert torch.equal(torch.autograd.grad(output.square().sum(), leaf)[0], plain)


# Soft winners


# How the windows lie: size, stride, padding, dilation.
POOLED = {
    "nn.MaxPool1d": ((3,), (2,), (0,), (1,)),
    "nn.MaxPool2d": ((2, 2), (2, 2), (0, 0), (1, 1)),
    "nn.MaxPool2d with indices": ((3, 2), (2, 1), (0, 0), (1, 1)),
    "nn.MaxPool3d": ((2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1)),
    "F.max_pool1d": ((2,), (2,), (0,), (1,)),
    "F.max_pool2d by name": ((3, 3), (2, 2), (1, 1), (1, 1)),
    "F.max_pool1d_with_indices": ((3,), (3,), (0,), (1,)),
    "F.max_pool3d_with_indices": ((3, 3, 3), (2, 2, 2), (0, 0, 0), (1, 1, 1)),
    "torch.max_pool1d": ((2,), (2,), (0,), (1,)),
    "torch.max_pool2d": ((3, 3), (2, 2), (0, 0), (1, 1)),
    "torch.max_pool3d": ((2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1)),
}
POOLS = {
    **{way: (STRIDED[way][0], windows) for way, windows in POOLED.items()},
    "without a stride": (nn.MaxPool2d(3, stride=1, padding=1), ((3, 3), (1, 1), (1, 1), (1, 1))),
    "dilated": (nn.MaxPool2d(2, stride=(2, 1), dilation=(3, 2)), ((2, 2), (2, 1), (0, 0), (3, 2))),
    "with gaps": (nn.MaxPool1d(2, stride=4), ((2,), (4,), (0,), (1,))),
    "beyond the end": (nn.MaxPool2d((2, 3), (2, 3), (0, 1), ceil_mode=True), ((2, 3), (2, 3), (0, 1), (1, 1))),
}


def winners_by_hand(gradient, values, windows, width):
    rows = zip(gradient.double().numpy(), values.detach().double().numpy(), strict=True)
    return torch.from_numpy(np.stack([reference.soft_winners(*row, windows, width) for row in rows]))


@pytest.mark.parametrize("width", [0.3, 4.0])
@pytest.mark.parametrize("way", POOLS)
def test_max_pooling_keeps_its_values_and_shares_its_gradient(way, width):
    call, windows = POOLS[way]
    leaf = torch.randn(2, 3, *[7] * len(windows[0]), dtype=torch.float64, requires_grad=True)
    wanted = call(leaf)
    with BackwardRules(gates=width, antialias=False):
        output = call(leaf)
    assert all(map(torch.equal, output, wanted)) if isinstance(output, tuple) else torch.equal(output, wanted)
    gradient = torch.randn_like(first_of(wanted))
    found, plain = (torch.autograd.grad(first_of(one), leaf, gradient)[0] for one in (output, wanted))
    torch.testing.assert_close(found, winners_by_hand(gradient, leaf, windows, width))
    assert not torch.allclose(found, plain)
    # Nothing is lost, and by a ramp of no width to speak of the winner takes all.
    torch.testing.assert_close(found.flatten(1).sum(dim=1), gradient.flatten(1).sum(dim=1))
    narrow = soft_winners(gradient, leaf.detach(), first_of(wanted).detach(), Windows(*windows), 1e-9)
    torch.testing.assert_close(narrow, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_winners_of_lower_precision(dtype):
    leaf = torch.randn(2, 3, 6, 6).to(dtype).requires_grad_()
    with BackwardRules(gates=2.0, antialias=False):
        output = functional.max_pool2d(leaf, 2)
    gradient = torch.randn_like(output)
    (found,) = torch.autograd.grad(output, leaf, gradient)
    expected = winners_by_hand(gradient, leaf, ((2, 2), (2, 2), (0, 0), (1, 1)), 2.0)
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() <= 10 * TOLERANCE[dtype]


def test_winners_move_with_the_values_alone():
    windows = Windows((3, 3), (2, 2), (1, 1), (1, 1))

    def shares(values):
        maxima = functional.max_pool2d(values, 3, 2, 1)
        return soft_winners(torch.ones_like(maxima), values, maxima, windows, 1.0)

    values = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    # A step of 1e-6 would move the gradient from one place to another where the winner takes all.
    step = 1e-6 * torch.randn_like(values)
    assert (shares(values + step) - shares(values)).abs().max() < 1e-4
    for scale in (2.0**-100, 2.0**60):
        assert torch.equal(shares(scale * values), shares(values))


def test_padding_by_minus_infinity_is_the_padding_of_the_pool_itself():
    leaf = torch.randn(2, 3, 7, 7, dtype=torch.float64).relu().requires_grad_()
    with BackwardRules(gates=2.0, antialias=False):
        padded = functional.pad(leaf, (1, 1, 1, 1), value=-math.inf)
        output = functional.max_pool2d(padded, 3, 2)
    seed = torch.randn_like(output)
    (found,) = torch.autograd.grad(output, leaf, seed)
    # Minus infinity counts as 0 in the deviation.
    zeros = functional.pad(leaf.detach(), (1, 1, 1, 1))
    width = 2.0 * (zeros.flatten(1).std(dim=1) / leaf.detach().flatten(1).std(dim=1)).reshape(2, 1, 1, 1)
    for row in range(2):
        expected = soft_winners(
            *(part[row : row + 1].detach() for part in (seed, leaf, output)),
            Windows((3, 3), (2, 2), (1, 1), (1, 1)),
            float(width[row]),
        )
        torch.testing.assert_close(found[row : row + 1], expected)


def test_equal_values_share_equally():
    values = torch.full((2, 1, 4, 4), 3.0)
    values[1, 0, 0] = torch.tensor([5.0, 5.0, 3.0, 3.0])
    leaf = values.requires_grad_()
    with BackwardRules(gates=0.5, antialias=False):
        output = functional.max_pool2d(leaf, 2)
    found = torch.autograd.grad(output.sum(), leaf)[0][:, 0]
    assert (found[0] == 0.25).all()
    assert found[1, :2].tolist() == [[0.5, 0.5, 0.25, 0.25], [0, 0, 0.25, 0.25]]


def test_maxima_may_be_overwritten_and_what_was_pooled_may_not():
    source = torch.randn(2, 3, 6, 6, requires_grad=True)
    with BackwardRules(gates=2.0, antialias=False):
        expected = torch.autograd.grad(functional.relu(functional.max_pool2d(source * 1, 2)).sum(), source)[0]
        found = torch.autograd.grad(functional.relu_(functional.max_pool2d(source * 1, 2)).sum(), source)[0]
        values = source * 1
        output = functional.max_pool2d(values, 2)
        values.add_(1)
    assert torch.equal(found, expected)
    with pytest.raises(ModelError, match="max pooling"):
        output.sum().backward()


@pytest.mark.parametrize("shape", [(0, 3, 6, 6), (3, 6, 6)])
def test_winners_without_rows_or_of_a_single_sample(shape):
    leaf = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with BackwardRules(gates=2.0, antialias=False):
        output = functional.max_pool2d(leaf, 2)
    gradient = torch.randn_like(output)
    (found,) = torch.autograd.grad(output, leaf, gradient)
    if leaf.dim() == 3:
        expected = winners_by_hand(gradient.unsqueeze(0), leaf.unsqueeze(0), ((2, 2), (2, 2), (0, 0), (1, 1)), 2.0)[0]
        torch.testing.assert_close(found, expected)
    else:
        assert found.shape == shape


# Nesting


def test_the_innermost_rules_apply():
    leaf = torch.randn(2, 4, 9, 9, dtype=torch.float64, requires_grad=True)
    pool = nn.AvgPool2d(2)
    seed = torch.randn(2, 4, 4, 4, dtype=torch.float64)

    def maps():
        return torch.autograd.grad(functional.relu(leaf).sum(), leaf)[0], torch.autograd.grad(pool(leaf), leaf, seed)[0]

    def is_as(width, antialias):
        gate, stride = maps()
        with torch.no_grad():
            wanted = gate_by_hand(leaf, width), smooth_by_hand(plain, (2, 2)) if antialias else plain
        return torch.allclose(gate, wanted[0]) and torch.allclose(stride, wanted[1])

    plain = maps()[1]
    outer = BackwardRules(gates=4.0, antialias=True)
    with outer:
        assert is_as(4.0, True)
        with BackwardRules(gates=1.0, antialias=False):
            assert is_as(1.0, False)
            with BackwardRules(gates=0, antialias=False):
                assert is_as(0, False)
                assert rules.has_active_rules()
            assert is_as(1.0, False)
        assert is_as(4.0, True)
        with pytest.raises(ZeroDivisionError), BackwardRules(gates=0, antialias=True):
            raise ZeroDivisionError
        assert is_as(4.0, True)
    assert is_as(0, False)
    assert not rules.has_active_rules()
    assert torch.overrides._get_current_function_mode_stack() == []


def test_rules_left_in_another_order_leave_none_behind():
    first, second = BackwardRules(gates=4.0, antialias=True), BackwardRules(gates=1.0, antialias=False)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert not rules.has_active_rules()
    assert torch.overrides._get_current_function_mode_stack() == []


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_single_window_over_the_whole_map_keeps_its_derivative(dimensions):
    leaf = torch.randn(2, 3, *(5, 4, 6)[:dimensions], dtype=torch.float64, requires_grad=True)
    name = f"max_pool{dimensions}d"
    with BackwardRules(gates=8.0, antialias=True):
        output = getattr(functional, name)(leaf, leaf.shape[2:])
    (found,) = torch.autograd.grad(output.sum(), leaf)
    (expected,) = torch.autograd.grad(getattr(functional, f"adaptive_{name}")(leaf, 1).sum(), leaf)
    assert torch.equal(found, expected)


def test_a_stride_as_long_as_the_input_leaves_no_grid():
    gradient = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    assert torch.equal(smooth_strides(gradient, (6, 7)), gradient)
    torch.testing.assert_close(smooth_strides(gradient, (2, 5)), smooth_strides(gradient, (2, 1)))
    # Also where the convolution is a chosen one.
    model = nn.Sequential(nn.Conv2d(3, 4, 6, stride=6), nn.Flatten()).double().eval()
    leaf = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    everything = pg.FixedChannels({"0": torch.ones(4)})
    with pg.ParchGrad(model, everything, layers="all", gates=0, antialias=True):
        (found,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(found, torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)[0])


def test_a_window_of_minus_infinity_alone_passes_nothing_on():
    leaf = torch.randn(1, 2, 6, dtype=torch.float64, requires_grad=True)
    with BackwardRules(gates=2.0, antialias=False):
        masked = leaf.masked_fill(torch.arange(6) >= 4, -math.inf)
        output = functional.max_pool1d(masked, 2).amax(dim=2)
    (found,) = torch.autograd.grad(output.sum(), leaf)
    assert found.isfinite().all()
    assert not found[..., 4:].any()
    torch.testing.assert_close(found.sum(), torch.tensor(2.0, dtype=torch.float64))
