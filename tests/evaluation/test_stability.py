import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import parchgrad as pg
from parchgrad.errors import InputError, SettingError
from parchgrad.evaluation.methods import maps_of
from parchgrad.evaluation.stability import stability
from parchgrad.explain.stability import cosine, noisy_copies
from tests.support import small_network

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
TARGET = torch.tensor([0, 1, 4])


def cosine_slowly(first, second):
    """By numpy's longest float, whose squares of 1e-30 neither vanish nor overflow."""
    first, second = (np.asarray(values).ravel().astype(np.longdouble) for values in (first, second))
    return float((first @ second) / np.sqrt((first @ first) * (second @ second)))


def stability_slowly(method, images, target, *, noises, draws, seed):
    """One image and one copy at a time; returns cosines, correlations and ratios of norms by level and image."""
    normal = torch.randn(draws, 1, *images.shape[1:], generator=torch.Generator().manual_seed(seed))
    found = np.empty((3, len(noises), len(images)))
    for level, noise in enumerate(noises):
        for row in range(len(images)):
            image = images[row : row + 1]
            clean = method(image, target[row : row + 1]).numpy().ravel()
            values = []
            for draw in range(draws):
                spread = noise * (image.numpy().max() - image.numpy().min())
                noisy = method(image + spread * normal[draw].double(), target[row : row + 1]).numpy().ravel()
                norms = math.sqrt(sum(clean**2)), math.sqrt(sum(noisy**2))
                values.append(
                    (
                        cosine_slowly(clean, noisy),
                        stats.spearmanr(clean, noisy).statistic,
                        max(norms) / min(norms),
                    )
                )
            found[:, level, row] = np.mean(values, axis=0)
    return found


def test_stability_agrees_with_a_slow_second_implementation():
    method = maps_of(pg.Explainer(small_network(), None))
    options = {"noises": (1e-3, 0.05, 2.0), "draws": 3, "seed": 7}
    found = stability(method, IMAGES, TARGET, **options)
    expected = stability_slowly(method, IMAGES, TARGET, **options)
    assert found.noises == options["noises"]
    for values, wanted in zip((found.cosine, found.spearman, found.norm_ratio), expected, strict=True):
        assert values.dtype == torch.float64
        np.testing.assert_allclose(values, wanted, rtol=1e-9)
    # Not trivially stable, or the comparison would say little.
    assert (found.cosine[1] < 0.9999).all()


def test_a_map_that_is_the_image_changes_by_the_noise_itself():
    # Range 5: the noise of level 0.2 is the standard normal numbers themselves.
    images = torch.tensor([0.0, 1.0, 2.0, 5.0]).reshape(1, 1, 2, 2)
    noise = torch.randn(1, 1, 1, 2, 2, generator=torch.Generator().manual_seed(3)).double().flatten()
    found = stability(lambda images, target: images[:, 0], images, torch.tensor([0]), noises=(0.2,), draws=1, seed=3)
    a = images.double().flatten()
    dot, noisy_square = 30 + a @ noise, 30 + 2 * a @ noise + noise @ noise
    assert found.cosine.item() == pytest.approx((dot / (30 * noisy_square).sqrt()).item(), rel=1e-6)
    ratio = (noisy_square / 30).sqrt().item()
    assert found.norm_ratio.item() == pytest.approx(max(ratio, 1 / ratio), rel=1e-6)
    # Of four ranks without ties: 1 - 6 * sum(d^2) / (4 * 15).
    ranks = (a + noise).argsort().argsort()
    assert found.spearman.item() == pytest.approx(1 - (ranks - torch.arange(4)).square().sum().item() / 10)


def test_a_constant_map_has_cosine_1_and_no_rank_correlation():
    found = stability(lambda images, target: torch.full((len(images), 8, 8), 3.0), IMAGES, TARGET)
    torch.testing.assert_close(found.cosine, torch.ones(3, 3).double(), rtol=0, atol=1e-15)
    torch.testing.assert_close(found.norm_ratio, torch.ones(3, 3).double(), rtol=0, atol=0)
    assert found.spearman.isnan().all()


@pytest.mark.parametrize("scale", [1e-35, 1.0, 1e35])
def test_a_factor_that_depends_on_the_image_changes_the_norm_alone(scale):
    pattern = torch.arange(16.0).reshape(4, 4)

    def method(images, target):
        # Twice as strong where the first value is above zero, which the first image is without noise.
        factor = torch.where(images[:, 0, 0, 0] > 0, 2.0, 1.0)
        return scale * factor[:, None, None] * pattern

    images = torch.zeros(1, 1, 4, 4)
    images[0, 0, 3, 3] = 1
    signs = torch.randn(6, 1, 1, 4, 4, generator=torch.Generator().manual_seed(1))[:, 0, 0, 0, 0] > 0
    assert 0 < signs.sum() < 6
    found = stability(method, images, torch.tensor([0]), noises=(0.01,), draws=6, seed=1)
    assert found.cosine.item() == pytest.approx(1, abs=1e-12)
    assert found.spearman.item() == pytest.approx(1, abs=1e-12)
    # A copy has the same norm, or twice as much.
    assert found.norm_ratio.item() == pytest.approx(1 + signs.double().mean().item(), rel=1e-6)


def test_the_values_of_an_image_depend_neither_on_its_batch_nor_on_the_size_of_a_pass():
    calls = []
    own = maps_of(pg.Explainer(small_network(), pg.GradientEnergy(quantile=0.5), layers="all"))

    def method(images, target):
        calls.append(len(images))
        return own(images, target)

    whole = stability(method, IMAGES, TARGET, internal_batch_size=5)
    assert max(calls) == 5
    # The images, and four copies of each at three levels.
    assert sum(calls) == 3 + 3 * 4 * 3
    for row in range(3):
        alone = stability(method, IMAGES[row : row + 1], TARGET[row : row + 1], internal_batch_size=1)
        for name in ("cosine", "spearman", "norm_ratio"):
            torch.testing.assert_close(
                getattr(alone, name)[:, 0], getattr(whole, name)[:, row], rtol=1e-9, atol=0, msg=name
            )


def test_each_copy_is_explained_for_the_class_of_its_image():
    def method(images, target):
        # Constant in the image, and another map for each class.
        return target[:, None, None] + torch.arange(4.0).reshape(2, 2).pow(1 + target[:, None, None])

    found = stability(method, IMAGES, TARGET, draws=2)
    torch.testing.assert_close(found.cosine, torch.ones(3, 3).double())
    torch.testing.assert_close(found.norm_ratio, torch.ones(3, 3).double())


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_map_without_a_direction_has_no_score_and_spoils_no_other(value):
    def method(images, target):
        heat = images.abs().mean(1)
        # Class 1 alone: zero everywhere, or not finite.
        heat[target == 1] *= value
        return heat

    found = stability(method, IMAGES, TARGET)
    for values in (found.cosine, found.spearman, found.norm_ratio):
        assert values.isnan().all(dim=0).tolist() == [False, True, False]
        assert not values[:, [0, 2]].isnan().any()


@pytest.mark.parametrize(
    "options",
    [
        {"noises": ()},
        {"noises": (0.0,)},
        {"noises": (0.1, math.inf)},
        {"noises": (math.nan,)},
        {"noises": ("0.1",)},
        {"draws": 0},
        {"draws": 1.5},
        {"internal_batch_size": 0},
        {"seed": 2**63},
    ],
)
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(SettingError):
        stability(lambda images, target: images[:, 0], IMAGES, TARGET, **options)


def test_the_noise_has_the_spread_asked_for_and_is_the_same_for_every_row_in_units_of_its_range():
    inputs = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    inputs = torch.cat((inputs, 1e-20 * inputs[:1], 1e20 * inputs[1:], torch.full((1, 3, 32, 32), 7.0).double()))
    copies = noisy_copies(inputs, noise=0.05, draws=5, seed=4)
    assert copies.shape == (5, 5, 3, 32, 32)
    width = torch.tensor([row.max() - row.min() for row in inputs[:4]]).double()
    units = (copies - inputs)[:, :4] / width.reshape(4, 1, 1, 1) / 0.05
    torch.testing.assert_close(units, units[:, :1].expand_as(units), rtol=1e-9, atol=1e-9)
    assert stats.kstest(units[:, 0].flatten(), "norm").pvalue > 1e-3
    # Copies differ from each other.
    assert abs(np.corrcoef(units[0, 0].flatten(), units[1, 0].flatten())[0, 1]) < 0.1
    # A row without a range gets no noise.
    assert (copies[:, 4] == 7).all()


def test_the_noise_follows_from_the_seed_and_from_nothing_else():
    inputs = torch.rand(4, 3, 5, 7)
    torch.manual_seed(5)
    expected_global = torch.rand(3)
    torch.manual_seed(5)
    first = noisy_copies(inputs, noise=0.1, draws=2, seed=0)
    assert torch.equal(torch.rand(3), expected_global), "the global generator is left alone"
    assert torch.equal(first, noisy_copies(inputs, noise=0.1, draws=2, seed=0))
    assert not torch.equal(first, noisy_copies(inputs, noise=0.1, draws=2, seed=1))
    assert torch.equal(first[:, 2:3], noisy_copies(inputs[2:3], noise=0.1, draws=2, seed=0))
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(first, noisy_copies(inputs, noise=0.1, draws=2, seed=0))
    finally:
        torch.set_default_dtype(torch.float32)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        other = noisy_copies(inputs.to(dtype), noise=0.1, draws=2, seed=0)
        assert other.dtype == dtype
        error = 4 * torch.finfo(dtype if dtype != torch.float64 else torch.float32).eps
        torch.testing.assert_close(other.double(), first.double(), rtol=error, atol=error)
    assert torch.equal(noisy_copies(inputs, noise=0, draws=2, seed=0), inputs.expand(2, -1, -1, -1, -1))
    tracked = inputs.clone().requires_grad_()
    assert not noisy_copies(tracked, noise=0.1, draws=2, seed=0).requires_grad
    # Volumes and series too.
    for shape in ((2, 3, 9), (2, 1, 3, 4, 5), (2, 6)):
        assert noisy_copies(torch.rand(shape), noise=0.1, draws=3, seed=0).shape == (3, *shape)


@pytest.mark.parametrize("noise", [-0.1, math.inf, math.nan, "0.1", True])
def test_noise_out_of_range_is_refused(noise):
    with pytest.raises(SettingError):
        noisy_copies(IMAGES, noise=noise, draws=1, seed=0)


@pytest.mark.parametrize("inputs", [torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3), torch.zeros(2, 0, 4, 4)])
def test_inputs_without_a_range_are_refused(inputs):
    with pytest.raises(InputError):
        noisy_copies(inputs, noise=0.1, draws=1, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_cosine_agrees_with_its_definition(dtype):
    first, second = torch.randn(4, 5, 6).to(dtype), torch.randn(4, 5, 6).to(dtype)
    expected = [cosine_slowly(a.double(), b.double()) for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(cosine(first, second), expected, rtol=1e-10)
    assert cosine(first, second).dtype == torch.float64


def test_cosine_by_hand_at_the_ends_of_float():
    # (3, 4) and (4, 3): 24 / 25. The smallest and largest magnitudes that float64 holds are no obstacle.
    tiny, huge = 5e-324, 1e308
    rows = [[3.0, 4.0], [3 * tiny, 4 * tiny], [0.3 * huge, 0.4 * huge], [1.0, 0.0], [1.0, -1.0]]
    first = torch.tensor(rows, dtype=torch.float64)
    second = torch.tensor([[4.0, 3.0], [4.0, 3.0], [4.0, 3.0], [0.0, 2.0], [-2.0, 2.0]]).double()
    assert cosine(first, second).tolist() == pytest.approx([0.96, 0.96, 0.96, 0.0, -1.0], abs=1e-15)


def test_rounding_does_not_lift_a_cosine_beyond_1():
    maps = torch.randn(2000, 9, dtype=torch.float64)
    assert cosine(maps, 3 * maps).max() <= 1
    assert cosine(maps, -3 * maps).min() >= -1


def test_cosine_of_maps_without_a_direction_is_nan():
    first = torch.tensor([[0.0, 0.0], [1.0, math.nan], [math.inf, 1.0], [-math.inf, math.inf], [1.0, 2.0]])
    ones = torch.ones(5, 2)
    for found in (cosine(first, ones), cosine(ones, first)):
        assert found.isnan().tolist() == [True] * 4 + [False]
    for shapes in (((2, 3), (2, 4)), ((2, 3), (1, 3)), ((3,), (3,)), ((2, 0), (2, 0))):
        with pytest.raises(InputError):
            cosine(*(torch.ones(shape) for shape in shapes))


values = st.floats(-1, 1, allow_subnormal=False).filter(lambda value: value == 0 or abs(value) > 1e-6)
pairs = st.lists(st.tuples(values, values), min_size=1, max_size=12)
scales = st.floats(-30, 30).map(lambda exponent: 10**exponent)


@given(pairs=pairs, one=scales, other=scales)
def test_cosine_is_symmetric_bounded_and_blind_to_scale(pairs, one, other):
    first, second = torch.tensor(pairs, dtype=torch.float64).T.unsqueeze(1)
    found = cosine(first, second)
    assert torch.equal(found.nan_to_num(2), cosine(second, first).nan_to_num(2))
    torch.testing.assert_close(cosine(one * first, other * second), found, rtol=0, atol=1e-12, equal_nan=True)
    empty = not first.any() or not second.any()
    assert found.isnan().item() == empty
    if empty:
        return
    assert -1 <= found.item() <= 1
    assert found.item() == pytest.approx(cosine_slowly(first, second), abs=1e-12)
    torch.testing.assert_close(cosine(first, one * first), torch.ones(1).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(cosine(first, -second), -found, rtol=0, atol=1e-12)
