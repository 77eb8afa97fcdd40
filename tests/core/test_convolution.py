import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from parchgrad.core import convolution as module
from parchgrad.core.convolution import Geometry, partitioned_input_gradient, plain_geometry
from parchgrad.core.partition import channel_norms, channel_scales
from tests import reference


def dense_reference(convolution, x, gradient, weights, conserve="energy", places=None):
    """The reference's edit, and torch's own backward pass of the convolution behind it."""
    edited = reference.edit(gradient.double(), weights, math.inf, conserve, places)
    edited = torch.from_numpy(edited).to(gradient.dtype)
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(convolution(leaf), leaf, edited)[0]


def sent_back(gradient, weights, convolution, shape, *, weight=None, conserve="energy", gamma=math.inf, places=None):
    """The way of the engine: weigh the places, find the factors, send the gradient back."""
    wide = gradient if gradient.dtype.itemsize >= 4 else gradient.float()
    if places is not None:
        wide = wide * places.unsqueeze(1)
    scales = channel_scales(wide, channel_norms(wide), weights, gamma=gamma, conserve=conserve)
    weight = (convolution.weight.detach() if weight is None else weight).to(gradient.dtype)
    return partitioned_input_gradient(wide, scales, weight, plain_geometry(convolution), shape)


def random_masks(rows, channels, kept, distinct, groups=1, seed=0):
    """Masks of exactly `kept` channels, of which so many differ, dealt out to the rows by turns."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(distinct, channels, dtype=torch.bool)
    for mask in masks:
        mask[torch.randperm(channels, generator=generator)[:kept]] = True
    return masks[torch.arange(rows) % distinct]


SPARSE = {
    "3 x 3": (nn.Conv2d(5, 64, 3, padding=1), 6),
    "3 x 3, strided": (nn.Conv2d(5, 64, 3, padding=1, stride=2), 6),
    "uneven stride and kernel": (nn.Conv2d(5, 64, (3, 5), padding=(1, 2), stride=(2, 1)), 6),
    "stride beyond the kernel": (nn.Conv2d(5, 64, 2, stride=3), 6),
    "dilated": (nn.Conv2d(5, 64, 3, padding=2, dilation=2), 6),
    "no padding": (nn.Conv2d(5, 64, 3), 6),
    "same": (nn.Conv2d(5, 64, 3, padding="same"), 6),
    "1 x 1": (nn.Conv2d(16, 64, 1), 6),
    "1 x 1, strided": (nn.Conv2d(16, 64, 1, stride=2), 6),
    "1 x 1, padded": (nn.Conv2d(16, 64, 1, padding=1), 6),
    "one position": (nn.Conv2d(5, 64, 9), 6),
    "grouped": (nn.Conv2d(32, 128, 3, padding=1, groups=8), 8),
    "grouped 1 x 1": (nn.Conv2d(32, 128, 1, groups=4), 8),
    "grouped, few channels": (nn.Conv2d(32, 64, 3, padding=1, groups=16), 3),
    "depthwise": (nn.Conv2d(64, 64, 3, padding=1, groups=64), 6),
    "depthwise with a multiplier": (nn.Conv2d(32, 64, 5, padding=2, stride=2, groups=32), 6),
    "signal": (nn.Conv1d(5, 64, 3, padding=1), 6),
    "volume": (nn.Conv3d(3, 64, 3, padding=1), 6),
}


def prefer_sparse(monkeypatch):
    """Small layers are not worth it, but must be right."""
    for name in ("_COST_OF_A_KEPT_CHANNEL", "_COST_IN_GROUPS", "_POSITIONS_PER_WEIGHT"):
        monkeypatch.setattr(module, name, 0.5 if name.startswith("_COST") else 0)


@pytest.fixture
def is_sparse(monkeypatch):
    """Whether the sparse way was gone."""
    taken = []
    original = module._sparse_input_gradient
    monkeypatch.setattr(module, "_sparse_input_gradient", lambda *arguments: taken.append(True) or original(*arguments))
    return lambda: bool(taken)


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize(("rows", "distinct"), [(1, 1), (4, 1), (4, 4), (6, 2)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_sparse_equals_dense(kind, rows, distinct, dtype, tolerance, is_sparse, monkeypatch):
    prefer_sparse(monkeypatch)
    convolution, kept = SPARSE[kind]
    convolution = convolution.to(dtype)
    dimensions = len(convolution.kernel_size)
    x = torch.randn(rows, convolution.in_channels, *[9, 10, 9][:dimensions], dtype=dtype)
    x = x[..., :9] if kind == "one position" else x
    gradient = torch.randn_like(convolution(x))
    mask = random_masks(rows, convolution.out_channels, kept, distinct)
    soft = mask * torch.rand(mask.shape, dtype=dtype)
    places = torch.rand(rows, *gradient.shape[2:], dtype=dtype)
    for conserve, weights, positions in (
        ("energy", mask, None),
        ("independent", mask, None),
        ("exact", mask, None),
        ("none", mask, None),
        ("energy", soft, places),
        ("independent", soft, places),
    ):
        expected = dense_reference(convolution, x, gradient, weights, conserve, positions)
        found = sent_back(gradient, weights, convolution, x.shape, conserve=conserve, places=positions)
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()
        assert found.dtype == dtype
    assert is_sparse()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 7),
    groups=st.sampled_from([1, 2, 8, 32]),
    share=st.floats(0, 0.4),
    whole=st.sampled_from([None, True, False]),
    softness=st.sampled_from([0, 1]),
)
def test_any_weights_equal_dense(seed, rows, groups, share, whole, softness):
    """Rows of any number of channels, none and all included."""
    generator = torch.Generator().manual_seed(seed)
    convolution = nn.Conv2d(32, 64, 3, padding=1, groups=groups).double()
    x = torch.zeros(rows, 32, 6, 6, dtype=torch.float64)
    gradient = torch.randn(rows, 64, 6, 6, dtype=torch.float64, generator=generator)
    mask = torch.rand(rows, 64, generator=generator) < share
    # Rows that share masks, in unequal numbers.
    mask = mask[torch.randint(rows, (rows,), generator=generator)]
    if whole is not None:
        mask[0] = whole
    if softness:
        mask = mask * torch.rand(mask.shape, dtype=torch.float64, generator=generator)
    expected = dense_reference(convolution, x, gradient, mask)
    with pytest.MonkeyPatch.context() as patched:
        prefer_sparse(patched)
        found = sent_back(gradient, mask, convolution, x.shape)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("kind", ["3 x 3", "3 x 3, strided", "1 x 1", "1 x 1, strided", "depthwise"])
@pytest.mark.parametrize(("rows", "distinct"), [(1, 1), (4, 1), (4, 4), (6, 2)], ids=str)
def test_channels_last_is_kept(kind, rows, distinct, monkeypatch):
    prefer_sparse(monkeypatch)
    convolution, kept = SPARSE[kind]
    convolution = convolution.float()
    x = torch.randn(rows, convolution.in_channels, 9, 10)
    gradient = torch.randn_like(convolution(x)).contiguous(memory_format=torch.channels_last)
    mask = random_masks(rows, convolution.out_channels, kept, distinct)
    weight = convolution.weight.detach().contiguous(memory_format=torch.channels_last)
    found = sent_back(gradient, mask, convolution, x.shape, weight=weight)
    expected = dense_reference(convolution, x, gradient, mask)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 8, 2, padding="same"),
        weight_norm(nn.Conv2d(4, 8, 3)),
        type("Standardised", (nn.Conv2d,), {"forward": lambda self, x: x})(4, 8, 3),
        type("Padded", (nn.Conv2d,), {"_conv_forward": lambda self, x, weight, bias: x})(4, 8, 3),
    ],
    ids=["padding mode", "uneven padding", "computed weight", "forward", "_conv_forward"],
)
def test_variants_have_no_plain_geometry(convolution):
    assert plain_geometry(convolution) is None


def test_a_convolution_with_a_way_of_its_own_alone_has_no_plain_geometry():
    for name in ("forward", "_conv_forward"):
        convolution = nn.Conv2d(2, 4, 3)
        setattr(convolution, name, getattr(convolution, name))
        assert plain_geometry(convolution) is None


def test_geometry_of_uneven_numbers():
    convolution = nn.Conv3d(2, 4, (1, 3, 5), stride=(1, 2, 3), padding=(0, 1, 2), dilation=(1, 1, 2), groups=2)
    assert plain_geometry(convolution) == Geometry((1, 2, 3), (0, 1, 2), (1, 1, 2), 2)
    subclass = type("Named", (nn.Conv1d,), {})(2, 4, 3, padding="same", dilation=2)
    assert plain_geometry(subclass) == Geometry((1,), (2,), (2,), 1)


def test_the_way_follows_the_cost(is_sparse):
    convolution = nn.Conv2d(8, 64, 3, padding=1)
    x = torch.zeros(1, 8, 20, 20)
    gradient = torch.randn(1, 64, 20, 20)
    for kept in (64, 60):
        mask = random_masks(1, 64, kept, 1)
        found = sent_back(gradient, mask, convolution, x.shape)
        torch.testing.assert_close(found, dense_reference(convolution, x, gradient, mask), rtol=1e-4, atol=1e-4)
    sent_back(gradient, random_masks(1, 64, 6, 1), convolution, x.shape, gamma=2.0)
    assert not is_sparse()
    sent_back(gradient, random_masks(1, 64, 6, 1), convolution, x.shape)
    assert is_sparse()


@pytest.mark.parametrize("conserve", ["energy", "none"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_pruning_hides_no_broken_row_and_breaks_no_sound_one(value, conserve):
    convolution = nn.Conv2d(8, 64, 3, padding=1)
    gradient = torch.randn(2, 64, 20, 20)
    mask = random_masks(2, 64, 6, 2)
    shape = torch.Size((2, 8, 20, 20))
    expected = sent_back(gradient, mask, convolution, shape, conserve=conserve)
    gradient[0, ~mask[0]] = value
    found = sent_back(gradient, mask, convolution, shape, conserve=conserve)
    assert not found[0].isfinite().any()
    # The batch goes back the dense way then.
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)


def test_rows_that_share_masks_in_unequal_numbers(is_sparse):
    convolution = nn.Conv2d(8, 64, 3, padding=1).double()
    x = torch.zeros(5, 8, 12, 12, dtype=torch.float64)
    gradient = torch.randn(5, 64, 12, 12, dtype=torch.float64)
    mask = random_masks(2, 64, 6, 2)[[0, 1, 1, 0, 1]]
    found = sent_back(gradient, mask, convolution, x.shape)
    torch.testing.assert_close(found, dense_reference(convolution, x, gradient, mask), rtol=1e-10, atol=1e-13)
    assert is_sparse()


@pytest.mark.parametrize("conserve", ["independent", "exact"])
def test_a_kept_sum_without_variance_is_not_scaled(conserve, is_sparse):
    convolution = nn.Conv2d(8, 64, 3, padding=1)
    shape = torch.Size((2, 8, 20, 20))
    gradient = torch.randn(2, 64, 20, 20)
    mask = random_masks(2, 64, 6, 2)
    # Constant over space but for rounding.
    gradient[mask] = torch.randn(12, 1, 1) * (1 + 1e-8 * torch.randn(12, 20, 20)).float()
    found = sent_back(gradient, mask, convolution, shape, conserve=conserve)
    unscaled = sent_back(gradient, mask, convolution, shape, conserve="none")
    assert torch.equal(found, unscaled)
    assert is_sparse()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("conserve", ["energy", "independent"])
def test_half_precision_is_scaled_in_float32(conserve, dtype, is_sparse):
    convolution = nn.Conv2d(8, 512, 1).to(dtype)
    mask, shape = random_masks(1, 512, 50, 1), torch.Size((1, 8, 30, 30))
    # What the others sum to varies by less than half precision tells apart at that size.
    gradient = torch.full((1, 512, 30, 30), 4.0).to(dtype)
    gradient[:, ::2] += torch.randn(1, 1, 30, 30).sign().to(dtype) / 32
    gradient[mask] = torch.randn(50, 30, 30).to(dtype) / 32
    found = sent_back(gradient, mask, convolution, shape, conserve=conserve)
    expected = dense_reference(convolution, torch.zeros(shape, dtype=dtype), gradient, mask, conserve)
    assert found.dtype == dtype
    # One rounding of the edited gradient, and those of the convolution.
    assert (found - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        found = sent_back(gradient.float(), mask, convolution.float(), shape, conserve=conserve)
    expected = dense_reference(convolution, torch.zeros(shape), gradient.float(), mask, conserve)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert is_sparse()


def test_a_kept_sum_that_varies_by_its_rounding_alone_is_not_rescaled(is_sparse):
    convolution = nn.Conv2d(4, 64, 1)
    gradient, mask = torch.randn(1, 64, 4, 4), torch.zeros(1, 64, dtype=torch.bool)
    mask[0, 5] = True
    # More than the rounding of one channel, less than that of a sum over 64.
    gradient[0, 5] = 1 + 4 * torch.finfo(torch.float32).eps * (torch.arange(16).reshape(4, 4) % 2)
    x = torch.zeros(1, 4, 4, 4)
    found = sent_back(gradient, mask, convolution, x.shape, conserve="independent")
    assert is_sparse()
    torch.testing.assert_close(found, convolution.weight.detach()[5].reshape(1, 4, 1, 1).expand_as(found))


def test_a_convolution_that_was_changed_is_taken_as_it_is():
    convolution = nn.Conv2d(4, 8, 3, padding=1)
    convolution.padding, convolution.dilation = (2, 2), (2, 2)
    assert plain_geometry(convolution) == Geometry((1, 1), (2, 2), (2, 2), 1)
    convolution.padding, convolution.dilation, convolution.stride = 0, 1, 4
    assert plain_geometry(convolution) == Geometry((4, 4), (0, 0), (1, 1), 1)
    assert plain_geometry(nn.Conv2d(4, 8, 3, padding="valid")).padding == (0, 0)


def test_no_rows_give_no_rows():
    convolution = nn.Conv2d(8, 64, 3, padding=1)
    call = (convolution.weight.detach(), plain_geometry(convolution), torch.Size((0, 8, 20, 20)))
    found = partitioned_input_gradient(torch.zeros(0, 64, 20, 20), torch.zeros(0, 64), *call)
    assert found.shape == (0, 8, 20, 20)
