import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from parchgrad.core.partition import (
    channel_norms,
    channel_scales,
    in_ordinary_range,
    partition_gradient,
    restored_range,
    row_norms,
    without_autocast,
)
from parchgrad.errors import SettingError
from tests import reference
from tests.messages import check_message

GAMMAS = [math.inf, 2.0, 0.3]
CONSERVE = ["energy", "independent", "exact", "none"]
SPATIAL = [(), (1,), (7,), (3, 4), (1, 1), (2, 3, 2)]


def random_case(seed, batch=3, channels=6, spatial=(3, 4), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(batch, channels, *spatial, generator=generator, dtype=dtype)
    mask = torch.rand(batch, channels, generator=generator) < 0.4
    return gradient, mask


def soft_case(seed, **shape):
    """Weights all the way from 0 to 1, and factors of the places."""
    gradient, _ = random_case(seed, **shape)
    generator = torch.Generator().manual_seed(seed)
    weights = (1.5 * torch.rand(gradient.shape[:2], generator=generator, dtype=gradient.dtype) - 0.25).clamp(0, 1)
    places = torch.rand((len(gradient), *gradient.shape[2:]), generator=generator, dtype=gradient.dtype)
    return gradient, weights, places


soft_cases = st.builds(
    soft_case,
    st.integers(0, 2**31),
    batch=st.integers(1, 3),
    channels=st.integers(2, 9),
    spatial=st.sampled_from([(1,), (5,), (3, 4), (2, 3, 2)]),
)
cases = st.builds(
    random_case,
    st.integers(0, 2**31),
    batch=st.integers(1, 3),
    channels=st.integers(2, 9),
    spatial=st.sampled_from([(5,), (3, 4), (2, 3, 2)]),
)


@pytest.mark.parametrize("spatial", SPATIAL, ids=str)
@pytest.mark.parametrize("conserve", CONSERVE)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_equals_the_slow_reference(gamma, conserve, spatial):
    gradient, mask = random_case(3, batch=5, spatial=spatial)
    mask[0], mask[1] = True, False
    edited = partition_gradient(gradient, mask, gamma=gamma, conserve=conserve)
    np.testing.assert_allclose(edited, reference.edit(gradient, mask, gamma, conserve), rtol=1e-11, atol=1e-300)


@pytest.mark.parametrize("spatial", SPATIAL, ids=str)
@pytest.mark.parametrize("conserve", CONSERVE)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_soft_weights_equal_the_slow_reference(gamma, conserve, spatial):
    gradient, weights, places = soft_case(3, batch=5, spatial=spatial)
    for positions in (None, places):
        edited = partition_gradient(gradient, weights, position_weights=positions, gamma=gamma, conserve=conserve)
        expected = reference.edit(gradient, weights, gamma, conserve, positions)
        np.testing.assert_allclose(edited, expected, rtol=1e-10, atol=1e-300)


def test_hand_computed():
    gradient = torch.tensor([[[1.0, -1.0], [2.0, -2.0]]])
    mask = torch.tensor([[True, False]])
    # M = 2 and N = 8: beta = sqrt(10 / 2); the exact sum goes from (3, -3) to (1, -1); |g| from sqrt(10) to sqrt(2).
    for conserve, factor in [("independent", math.sqrt(5)), ("exact", 3.0), ("none", 1.0), ("energy", math.sqrt(5))]:
        edited = partition_gradient(gradient, mask, conserve=conserve)
        torch.testing.assert_close(edited, torch.tensor([[[factor, -factor], [0.0, 0.0]]]))
    # gamma = 3: g_hat = 3 sqrt(8 / 2) = 6, beta = sqrt(10 / (2 * 36 + 8)).
    edited = partition_gradient(gradient, mask, gamma=3.0, conserve="independent")
    torch.testing.assert_close(edited, math.sqrt(1 / 8) * torch.tensor([[[6.0, -6.0], [2.0, -2.0]]]))


def test_soft_weights_by_hand():
    gradient = torch.tensor([[[3.0, 4.0], [0.0, 12.0]]])
    weights, places = torch.tensor([[1.0, 0.5]]), torch.tensor([[1.0, 0.5]])
    # The places leave (3, 2) and (0, 6), norm 7; the weights (3, 2) and (0, 3), norm sqrt(22).
    edited = partition_gradient(gradient, weights, position_weights=places)
    torch.testing.assert_close(edited, 7 / math.sqrt(22) * torch.tensor([[[3.0, 2.0], [0.0, 3.0]]]))


@settings(max_examples=100, deadline=None)
@given(soft_cases, st.sampled_from(GAMMAS), st.booleans(), st.sampled_from([1e-20, 1.0, 1e18]))
def test_energy_keeps_the_norm_and_never_amplifies(case, gamma, is_wide, scale):
    gradient, weights, places = case
    gradient = scale * (gradient if is_wide else gradient.float())
    edited = partition_gradient(gradient, weights, position_weights=places, gamma=gamma, conserve="energy")
    weighted = row_norms((gradient * places.unsqueeze(1).to(gradient)).double())
    tolerance = 1e-10 if is_wide else 1e-5
    torch.testing.assert_close(row_norms(edited.double()), weighted, rtol=tolerance, atol=0)
    assert (row_norms(edited.double()) <= row_norms(gradient.double()) * (1 + tolerance)).all()


@settings(max_examples=60, deadline=None)
@given(cases, st.sampled_from(GAMMAS), st.sampled_from(CONSERVE))
def test_weights_of_zero_and_one_are_a_mask(case, gamma, conserve):
    gradient, mask = case
    by_mask = partition_gradient(gradient, mask, gamma=gamma, conserve=conserve)
    assert torch.equal(partition_gradient(gradient, mask.double(), gamma=gamma, conserve=conserve), by_mask)


@settings(max_examples=60, deadline=None)
@given(soft_cases, st.integers(0, 2**31))
def test_the_edit_changes_by_no_more_than_the_weights_allow(case, seed):
    # Weights that move by 1e-6 move the result of the energy way by about as much: nothing jumps.
    gradient, weights, places = case
    generator = torch.Generator().manual_seed(seed)
    moved = (weights + 1e-6 * torch.randn(weights.shape, generator=generator, dtype=weights.dtype)).clamp(0, 1)
    inner = (weights > 0.2).any(dim=1) & (weights < 0.8).any(dim=1)
    first, second = (partition_gradient(gradient, part, position_weights=places)[inner] for part in (weights, moved))
    kept = row_norms(gradient[inner] * weights[inner].reshape(*weights[inner].shape, *[1] * (gradient.dim() - 2)))
    bound = 1e-4 * row_norms(gradient[inner]) * (row_norms(gradient[inner]) / kept)
    assert (row_norms(first - second) <= bound).all()


@settings(max_examples=60, deadline=None)
@given(cases, st.sampled_from(GAMMAS))
def test_exact_keeps_the_variance_of_the_sum(case, gamma):
    gradient, mask = case
    before = gradient.flatten(2).sum(1).var(1)
    after = partition_gradient(gradient, mask, gamma=gamma, conserve="exact").flatten(2).sum(1).var(1)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=0)


@settings(max_examples=60, deadline=None)
@given(cases)
def test_finite_gamma_makes_the_kept_sum_gamma_times_as_strong(case):
    gradient, mask = case
    edited = partition_gradient(gradient, mask, gamma=2.5, conserve="independent").flatten(2)
    both = mask.any(1) & ~mask.all(1)
    kept = torch.where(mask.unsqueeze(2), edited, 0).sum(1).std(1)[both]
    rest = torch.where(mask.unsqueeze(2), 0, edited).sum(1).std(1)[both]
    torch.testing.assert_close(kept, 2.5 * rest)


@settings(max_examples=60, deadline=None)
@given(cases, st.sampled_from(GAMMAS), st.sampled_from(CONSERVE), st.sampled_from([2.0**-100, 2.0**60, 1e-12, -3.0]))
def test_scaling_the_gradient_scales_the_result(case, gamma, conserve, scale):
    gradient, mask = case
    edited = partition_gradient(gradient, mask, gamma=gamma, conserve=conserve)
    scaled = partition_gradient(scale * gradient, mask, gamma=gamma, conserve=conserve)
    exactly = math.frexp(scale)[0] == 0.5
    torch.testing.assert_close(scaled, scale * edited, rtol=0 if exactly else 1e-12, atol=0)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-31, 2.0**90])
@pytest.mark.parametrize("spatial", [(1,), (3, 4)])
@pytest.mark.parametrize("conserve", CONSERVE)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_scaling_is_exact_in_float32_far_below_where_squares_vanish(gamma, conserve, spatial, scale):
    gradient, mask = random_case(5, batch=40, spatial=spatial, dtype=torch.float32)
    edited = partition_gradient(gradient, mask, gamma=gamma, conserve=conserve)
    scaled = partition_gradient(scale * gradient, mask, gamma=gamma, conserve=conserve)
    torch.testing.assert_close(scaled, scale * edited, rtol=0, atol=0)


@settings(max_examples=60, deadline=None)
@given(cases, st.sampled_from(GAMMAS), st.sampled_from(CONSERVE), st.randoms(use_true_random=False))
def test_permuting_channels_permutes_the_result(case, gamma, conserve, random):
    gradient, mask = case
    order = list(range(gradient.shape[1]))
    random.shuffle(order)
    edited = partition_gradient(gradient, mask, gamma=gamma, conserve=conserve)
    permuted = partition_gradient(gradient[:, order], mask[:, order], gamma=gamma, conserve=conserve)
    torch.testing.assert_close(permuted, edited[:, order], rtol=1e-10, atol=1e-13)


@settings(max_examples=30, deadline=None)
@given(cases, st.sampled_from(GAMMAS), st.sampled_from(CONSERVE))
def test_all_or_no_channels_leave_the_gradient_bit_for_bit(case, gamma, conserve):
    gradient, mask = case
    for whole in (torch.ones_like(mask), torch.zeros_like(mask)):
        assert torch.equal(partition_gradient(gradient, whole, gamma=gamma, conserve=conserve), gradient)


@pytest.mark.parametrize("conserve", CONSERVE[1:])
def test_kept_sum_without_variance_is_pruned_but_not_scaled(conserve):
    gradient, mask = random_case(7)
    mask[:] = torch.tensor([True, True, False, False, False, False])
    gradient[:, :2] = torch.tensor([0.1, 0.7], dtype=torch.float64).reshape(2, 1, 1)
    expected = torch.where(mask[:, :, None, None], gradient, 0)
    torch.testing.assert_close(partition_gradient(gradient, mask, conserve=conserve), expected, rtol=0, atol=0)
    assert torch.equal(partition_gradient(gradient, mask, gamma=2.0, conserve=conserve), gradient)


def test_autocast_around_the_backward_pass_changes_nothing():
    gradient, mask = random_case(17, channels=300, dtype=torch.float32)
    expected = partition_gradient(gradient, mask, conserve="independent")
    with torch.autocast("cpu", torch.bfloat16):
        found = partition_gradient(gradient, mask, conserve="independent")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("channels", [64, 2048])
def test_small_variations_of_a_large_sum_are_no_rounding(channels):
    # A standard deviation of 1e-4 of the mean is real in float32: the result equals that in float64.
    gradient = torch.rand(1, channels, 14, 14) * (1 + 1e-4 * torch.randn(1, 1, 14, 14))
    mask = torch.arange(channels).unsqueeze(0) < channels // 4
    found = partition_gradient(gradient, mask, conserve="independent")
    wide = partition_gradient(gradient.double(), mask, conserve="independent")
    torch.testing.assert_close(found.double(), wide, rtol=1e-2, atol=1e-6)


def test_a_sum_that_cancels_up_to_rounding_counts_as_constant():
    gradient = torch.randn(1, 512, 1, 1).expand(1, 512, 14, 14).clone()
    gradient[:, 256:512] = -gradient[:, :256] * (1 + 1e-7 * torch.randn(1, 256, 14, 14))
    gradient = torch.cat((gradient, torch.randn(1, 64, 14, 14)), dim=1)
    mask = torch.arange(576).unsqueeze(0) < 512
    assert torch.equal(partition_gradient(gradient, mask, conserve="independent")[:, :512], gradient[:, :512])


@pytest.mark.parametrize("conserve", ["energy", "independent", "exact"])
def test_huge_gamma_is_infinite_gamma(conserve):
    gradient, mask = random_case(19, dtype=torch.float32)
    found = partition_gradient(gradient, mask, gamma=1e300, conserve=conserve)
    torch.testing.assert_close(found, partition_gradient(gradient, mask, conserve=conserve))


def test_a_sum_that_is_constant_up_to_its_rounding_counts_as_constant():
    # A layer in front of global average pooling: every channel constant, the sum varies by rounding alone.
    weights = torch.randn(1, 512, 1, 1)
    gradient = weights.expand(1, 512, 14, 14) * (1 + 1e-7 * torch.randn(1, 512, 14, 14))
    mask = torch.arange(512).unsqueeze(0) < 50
    edited = partition_gradient(gradient, mask, conserve="independent")
    assert torch.equal(edited[:, :50], gradient[:, :50])


@pytest.mark.parametrize("gamma", [2.0, 0.5])
def test_edited_sum_without_variance_stays(gamma):
    # The rest is constant: g_hat is zero, and the edited sum has no variance left to scale by.
    gradient, mask = random_case(11)
    mask[:] = torch.tensor([True, True, True, False, False, False])
    gradient[:, 3:] = 0.25
    for conserve in ("energy", "independent", "exact"):
        assert torch.equal(partition_gradient(gradient, mask, gamma=gamma, conserve=conserve), gradient)
    pruned = partition_gradient(gradient, mask, gamma=gamma, conserve="none")
    np.testing.assert_allclose(pruned, reference.edit(gradient, mask, gamma, "none"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("conserve", ["energy", "independent"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_half_precision_is_summed_and_scaled_in_float32(dtype, gamma, conserve):
    # 400 channels of 300 sum to 120,000, beyond the largest float16.
    gradient = (300 + 30 * torch.randn(1, 400, 3, 3)).to(dtype)
    mask = torch.arange(400).unsqueeze(0) < 200
    edited = partition_gradient(gradient, mask, gamma=gamma, conserve=conserve)
    assert edited.dtype == dtype
    wide = partition_gradient(gradient.float(), mask, gamma=gamma, conserve=conserve)
    assert torch.equal(edited, wide.to(dtype))


def test_memory_formats_and_the_incoming_tensor():
    gradient, mask = random_case(13)
    kept = gradient.clone()
    channels_last = gradient.to(memory_format=torch.channels_last)
    edited = partition_gradient(gradient, mask)
    assert torch.equal(gradient, kept)
    assert edited.data_ptr() != gradient.data_ptr()
    torch.testing.assert_close(partition_gradient(channels_last, mask), edited)
    assert partition_gradient(gradient[:0], mask[:0]).shape == (0, 6, 3, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 6, 3, 4), (2, 0, 3, 4), (2, 6, 0, 4), (0, 6)])
@pytest.mark.parametrize("conserve", CONSERVE)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_nothing_to_edit(shape, gamma, conserve, dtype):
    gradient, mask = torch.zeros(shape, dtype=dtype), torch.ones(shape[:2], dtype=torch.bool)
    places = torch.ones(shape[0], *shape[2:])
    edited = partition_gradient(gradient, mask, position_weights=places, gamma=gamma, conserve=conserve)
    assert edited.shape == shape
    assert in_ordinary_range(gradient) == (gradient, None)


def test_a_single_number_is_weighted_and_brought_into_range():
    gradient, mask = torch.tensor([[[3e-30]]]), torch.tensor([[True]])
    edited = partition_gradient(gradient, mask, position_weights=torch.tensor([[0.5]]))
    assert edited.item() == pytest.approx(1.5e-30)
    assert 0.5 <= in_ordinary_range(gradient)[0].item() <= 1


@pytest.mark.parametrize("conserve", CONSERVE)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_row_of_zeros_amplifies_no_channel(gamma, conserve):
    gradient, weights = torch.zeros(2, 3, 4), torch.tensor([[1.0, 0.5, 0.0], [0.3, 0.3, 0.3]])
    scales = channel_scales(gradient, channel_norms(gradient), weights, gamma=gamma, conserve=conserve)
    torch.testing.assert_close(scales, weights if math.isinf(gamma) else torch.ones_like(weights))


def test_a_gamma_beyond_float32_is_applied():
    gradient, mask = random_case(31, batch=2, spatial=(5,), dtype=torch.float32)
    mask[:] = torch.tensor([True, True, True, False, False, False])
    gradient[:, 3:] *= 1e-4
    edited = partition_gradient(gradient, mask, gamma=1e40, conserve="none")
    np.testing.assert_allclose(edited, reference.edit(gradient, mask, 1e40, "none"), rtol=1e-4)


@pytest.mark.parametrize("spatial", [(1,), (3, 4)])
@pytest.mark.parametrize("conserve", CONSERVE)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_kept_sum_of_nothing_is_pruned_but_not_scaled(gamma, conserve, spatial):
    # Its rounding error is zero as well: zero divided by zero must not reach the result.
    gradient, mask = random_case(23, spatial=spatial)
    mask[:] = torch.tensor([True, False, False, True, False, False])
    gradient[:, [0, 3]] = 0
    edited = partition_gradient(gradient, mask, gamma=gamma, conserve=conserve)
    assert torch.equal(edited, gradient * 0 if math.isinf(gamma) else gradient)


def test_sums_that_cancel_each_other_up_to_rounding_leave_nothing_to_conserve():
    kept = torch.randn(1, 256, 14, 14)
    gradient = torch.cat((kept, -kept * (1 + 1e-7 * torch.randn_like(kept))), dim=1)
    mask = torch.arange(512).unsqueeze(0) < 256
    assert torch.equal(partition_gradient(gradient, mask, gamma=1.0, conserve="exact"), gradient)


def test_rows_of_extreme_size_come_into_range_by_powers_of_two():
    # The squares of the ends are beyond float32 itself.
    whole = torch.tensor([[3.0, -4.0], [12.0, 0.0]])
    sizes = torch.tensor([2.0**-140, 2.0**-100, 1.0, 2.0**120, 0.0])
    rows = whole * sizes.reshape(-1, 1, 1)
    scaled, unit = in_ordinary_range(rows)
    assert torch.equal(torch.frexp(unit).mantissa, torch.full((5,), 0.5))
    assert torch.equal(scaled.double() * unit.double().reshape(-1, 1, 1), rows.double())
    peaks = scaled.abs().amax(dim=(1, 2))
    assert ((peaks[1:4] >= 0.5) & (peaks[1:4] <= 1)).all()
    assert in_ordinary_range(whole.unsqueeze(0))[1] is None


def test_rows_that_end_or_leave_the_range_of_float32():
    # The unit of the largest numbers is finite, and a row that is not finite stays as it is.
    rows = torch.tensor([[[3.4e38, -3e38]], [[math.inf, 3.0]], [[math.nan, 2.0**40]]])
    scaled, unit = in_ordinary_range(rows)
    assert unit.tolist()[1:] == [1.0, 1.0]
    assert 0 < unit[0] < math.inf
    assert scaled[0].abs().max() <= 4
    torch.testing.assert_close(restored_range(scaled, unit), rows, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("factor", [1e-300, 1e-200, 1e-45, 1e45, 1e200, 1e300])
def test_rows_in_the_wide_range_of_float64(factor):
    rows = factor * torch.tensor([[[3.0, -4.0]], [[0.0, 1.0]]], dtype=torch.float64)
    scaled, unit = in_ordinary_range(rows)
    assert ((scaled.abs().amax(dim=(1, 2)) >= 0.5) & (scaled.abs().amax(dim=(1, 2)) <= 1)).all()
    assert torch.equal(restored_range(scaled, unit), rows)


def test_norms_that_are_known_are_not_computed_again():
    rows = torch.ones(1, 2, 3)
    assert in_ordinary_range(rows, torch.full((1, 2), 1.7))[1] is None
    assert in_ordinary_range(rows, torch.full((1, 2), 1e30))[1] is not None
    # The default edit reads the norms alone, not the gradient.
    unread = torch.full_like(rows, math.nan)
    scales = channel_scales(unread, torch.tensor([[3.0, 4.0]]), torch.eye(2)[:1], gamma=math.inf, conserve="energy")
    torch.testing.assert_close(scales, torch.tensor([[5 / 3, 0.0]]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("conserve", CONSERVE)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_row_that_is_not_finite_spoils_no_other(gamma, conserve, value):
    gradient, mask = random_case(37)
    mask[1] = torch.tensor([True, True, True, False, False, False])
    expected = partition_gradient(gradient, mask, gamma=gamma, conserve=conserve)
    # In a channel that is pruned.
    gradient[1, 4, 0, 0] = value
    edited = partition_gradient(gradient, mask, gamma=gamma, conserve=conserve)
    assert torch.equal(edited[::2], expected[::2])
    assert edited[1].isnan().all()


class WidestCopies(TorchDispatchMode):
    """Numbers of elements of every float64 tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.sizes = [0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.dtype == torch.float64:
            self.sizes.append(found.numel())
        return found


@pytest.mark.parametrize("conserve", CONSERVE)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_gradient_is_never_copied_into_a_wider_type(gamma, conserve):
    gradient, mask = random_case(29, channels=40, dtype=torch.float32)
    places = torch.ones(3, 3, 4, dtype=torch.float64)
    with WidestCopies() as copies:
        partition_gradient(gradient, mask, position_weights=places, gamma=gamma, conserve=conserve)
    assert max(copies.sizes) < gradient.numel() / 10


@pytest.mark.parametrize("conserve", CONSERVE)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_no_number_is_read_off_the_device(gamma, conserve):
    # A tensor of the meta device holds none: reading one is an error. Nor does it know autocast.
    gradient, mask = torch.empty(3, 6, 4, 4, device="meta"), torch.ones(3, 6, dtype=torch.bool, device="meta")
    assert partition_gradient(gradient, mask, gamma=gamma, conserve=conserve).device.type == "meta"


def test_autocast_is_switched_off_inside_only():
    with torch.autocast("cpu", torch.bfloat16):
        with without_autocast("cpu"):
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")


MASK_FACTS = ("`channel_weights`", "(3, 6, 3, 4)", "shape (3, 6)")
PLACE_FACTS = ("`position_weights`", "(3, 6, 3, 4)", "shape (3, 3, 4)")


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        *(({"gamma": gamma}, ("`gamma`", repr(gamma))) for gamma in (0.0, 0, -1.0, math.nan, "inf", None)),
        ({"conserve": "all"}, ("`conserve`", "'all'", ", ".join(CONSERVE))),
        ({"gradient": [1.0]}, ("`gradient`", "list", "Tensor", "torch.as_tensor")),
        ({"channel_weights": [True]}, ("`channel_weights`", "list", "Tensor", "torch.as_tensor")),
        ({"gradient": torch.ones(3, 6, 3, 4, dtype=torch.long)}, ("`gradient`", "torch.int64", ".float()")),
        ({"channel_weights": torch.ones(3, 6, dtype=torch.long)}, (*MASK_FACTS, "torch.int64")),
        ({"channel_weights": torch.ones(3, 5, dtype=torch.bool)}, (*MASK_FACTS, "torch.bool", "(3, 5)")),
        ({"channel_weights": torch.ones(2, 6)}, (*MASK_FACTS, "torch.float32", "(2, 6)")),
        ({"position_weights": torch.ones(3, 3, 5)}, (*PLACE_FACTS, "torch.float32", "(3, 3, 5)")),
        ({"position_weights": torch.ones(6, 3, 4)}, (*PLACE_FACTS, "torch.float32", "(6, 3, 4)")),
        ({"position_weights": torch.ones(3, 4)}, (*PLACE_FACTS, "torch.float32", "(3, 4)")),
        ({"position_weights": torch.ones(3, 3, 4, dtype=torch.long)}, (*PLACE_FACTS, "torch.int64")),
    ],
)
def test_an_error_names_the_argument_and_what_it_needs(changes, facts):
    gradient, mask = random_case(0)
    arguments = {"gradient": gradient, "channel_weights": mask, **changes}
    with pytest.raises(SettingError) as caught:
        partition_gradient(**arguments)
    check_message(caught.value, *facts)
