import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.integrate import trapezoid
from torch import nn

from parchgrad.errors import InputError, SettingError
from parchgrad.evaluation.perturbation import (
    accuracy,
    area_under_curve,
    deletion,
    even_steps,
    fractional_difference,
    insertion,
    log_odds,
    perturb,
    probability_drop,
    rank_pixels,
    replacement_images,
    respond,
    symmetric_relevance_gain,
)

RATIOS = (0.0, 0.13, 0.5, 1.0)


def linear_model(weight):
    """Two classes: the logit of class 0 is a weighted sum of the pixels, that of class 1 is zero."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(len(weight), 2, bias=False)).eval()
    model[1].weight.data = torch.stack((torch.tensor(weight), torch.zeros(len(weight))))
    return model


def slowly(model, images, target, heat, *, order, ratios, replacement, seed):
    """Probabilities of all classes (B, R + 1, K), image by image and pixel by pixel, the untouched image first."""
    batch, channels, height, width = images.shape
    tie_breaker = torch.randperm(height * width, generator=torch.Generator().manual_seed(seed)).tolist()
    noise = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(seed)).to(images).numpy()
    found = []
    for row in range(batch):
        image, flat = images[row].numpy(), heat[row].flatten().tolist()
        sign = -1 if order == "morf" else 1
        pixels = sorted(range(len(flat)), key=lambda pixel: (sign * flat[pixel], tie_breaker.index(pixel)))
        mean, std = image.mean((1, 2), keepdims=True), image.std((1, 2), keepdims=True, ddof=1)
        other = {
            "zero": np.zeros_like(image),
            "mean": np.broadcast_to(mean, image.shape),
            "noise": mean + noise * std,
        }[replacement]
        answers = []
        for ratio in (0.0, *ratios):
            changed = image.copy()
            for pixel in pixels[: round(ratio * len(pixels))]:
                place = divmod(pixel, width)
                for channel in range(channels):
                    changed[channel][place] = other[channel][place]
            with torch.no_grad():
                answers.append(model(torch.from_numpy(changed).unsqueeze(0))[0].softmax(0).numpy())
        found.append(answers)
    return np.array(found)


@pytest.mark.parametrize("order", ["morf", "lerf"])
@pytest.mark.parametrize("replacement", ["zero", "mean", "noise"])
def test_every_score_agrees_with_a_slow_second_implementation(network, order, replacement):
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    # Few values, hence many ties.
    heat = torch.randint(0, 5, (3, 8, 8)).double()
    target = torch.tensor([0, 4, 2])
    options = {"order": order, "ratios": RATIOS, "replacement": replacement, "seed": 7}
    found = respond(network, images, target, heat, internal_batch_size=5, **options)
    expected = slowly(network, images, target, heat, **options)
    rows = np.arange(3)
    of_target = expected[rows, :, target.numpy()]
    predicted = expected[:, 0].argmax(1)
    of_predicted = expected[rows, :, predicted]
    close = {"rtol": 1e-9, "atol": 1e-12}
    np.testing.assert_allclose(probability_drop(found), of_target[:, :1] - of_target[:, 1:], **close)
    np.testing.assert_allclose(log_odds(found), np.log(of_target[:, 1:] / of_target[:, :1]), **close)
    np.testing.assert_allclose(fractional_difference(found), 1 - of_predicted[:, 1:] / of_predicted[:, :1], **close)
    np.testing.assert_array_equal(accuracy(found), expected[:, 1:].argmax(2) == target.numpy()[:, None])
    area = [trapezoid(row[1:], RATIOS) for row in of_target]
    np.testing.assert_allclose(area_under_curve(found), area, **close)


@pytest.mark.parametrize("replacement", ["zero", "mean"])
def test_the_relevance_gain_agrees_with_a_slow_second_implementation(network, replacement):
    images, heat = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randint(0, 5, (2, 8, 8)).double()
    target, ratios = torch.tensor([1, 3]), even_steps(4)
    curves = {
        order: respond(network, images, target, heat, order=order, ratios=ratios, replacement=replacement)
        for order in ("morf", "lerf")
    }
    found = symmetric_relevance_gain(**curves)
    for row in range(2):
        kept, lost = (
            slowly(network, images, target, heat, order=order, ratios=ratios, replacement=replacement, seed=0)[
                row, 1:, target[row]
            ]
            for order in ("lerf", "morf")
        )
        # By hand: five points, of which the inner three count twice.
        area = [(curve[0] + 2 * sum(curve[1:4]) + curve[4]) / 8 for curve in (kept, lost)]
        assert found[row].item() == pytest.approx(area[0] - area[1], rel=1e-9)
    assert torch.equal(symmetric_relevance_gain(curves["lerf"], curves["morf"]), -found)
    other = respond(network, images, target, heat, ratios=(0.0, 1.0))
    with pytest.raises(SettingError, match="ratios"):
        symmetric_relevance_gain(other, curves["lerf"])


def test_a_linear_model_by_hand():
    model = linear_model([4.0, 2.0, 1.0, 0.0])
    images, heat = torch.ones(1, 1, 2, 2), torch.tensor([[[4.0, 2.0], [1.0, 0.0]]])
    target, ratios = torch.tensor([0]), (0.25, 0.5, 0.75)

    def probability(logit):
        return 1 / (1 + math.exp(-logit))

    morf = respond(model, images, target, heat, ratios=ratios)
    lerf = respond(model, images, target, heat, ratios=ratios, order="lerf")
    for found, logits in ((morf, (3, 1, 0)), (lerf, (7, 6, 4))):
        expected = [probability(7) - probability(logit) for logit in logits]
        assert probability_drop(found)[0].tolist() == pytest.approx(expected, rel=1e-6)
        expected = [math.log(probability(logit) / probability(7)) for logit in logits]
        assert log_odds(found)[0].tolist() == pytest.approx(expected, rel=1e-6)
    # At a logit of zero both classes are as probable, and the first is taken.
    assert accuracy(morf).tolist() == [[1.0, 1.0, 1.0]]
    logits = [7, 3, 1, 0, 0]
    area = sum(probability(a) + probability(b) for a, b in itertools.pairwise(logits)) / 8
    assert deletion(model, images, target, heat, steps=4).item() == pytest.approx(area, rel=1e-6)
    # Inserted from nothing: 0, 4, 6, 7, 7.
    logits = [0, 4, 6, 7, 7]
    area = sum(probability(a) + probability(b) for a, b in itertools.pairwise(logits)) / 8
    found = insertion(model, images, target, heat, steps=4, replacement="zero")
    assert found.item() == pytest.approx(area, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bool])
def test_to_insert_is_to_delete_the_others(network, dtype):
    # With ties, which both orders must break alike.
    images, target, heat = torch.randn(3, 3, 8, 8).double(), torch.tensor([0, 1, 2]), torch.randint(0, 3, (3, 8, 8))
    ratios = [0.0, 0.25, 0.5, 0.75, 1.0]
    found = respond(network, images, target, heat.to(dtype), order="lerf", ratios=ratios, replacement="blur", seed=2)
    area = insertion(network, images, target, heat.to(dtype), steps=4, seed=2)
    assert torch.equal(area, area_under_curve(found))


def test_batches_give_what_images_give_one_by_one(network):
    images, heat, target = torch.randn(4, 3, 8, 8).double(), torch.rand(4, 8, 8), torch.tensor([0, 1, 2, 3])
    for replacement in ("zero", "mean", "blur", "noise"):
        options = {"ratios": RATIOS, "replacement": replacement, "seed": 3}
        whole = respond(network, images, target, heat, internal_batch_size=7, **options)
        for row in range(4):
            part = slice(row, row + 1)
            alone = respond(network, images[part], target[part], heat[part], internal_batch_size=1, **options)
            torch.testing.assert_close(whole.of_target[part], alone.of_target)
            torch.testing.assert_close(whole.of_predicted[part], alone.of_predicted)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31), st.booleans())
def test_ranks_are_a_permutation_that_sorts_the_map(height, width, seed, many_ties):
    generator = torch.Generator().manual_seed(seed)
    heat = torch.rand(2, height, width, generator=generator)
    heat = (3 * heat).floor() if many_ties else heat
    for order, sign in (("morf", -1), ("lerf", 1)):
        ranks = rank_pixels(heat, order=order, seed=seed).flatten(1)
        assert torch.equal(ranks.sort(dim=1).values, torch.arange(height * width).expand(2, -1))
        sorted_by_rank = heat.flatten(1).gather(1, ranks.argsort(dim=1))
        assert bool(((sign * sorted_by_rank).diff(dim=1) >= 0).all())


def test_ties_are_broken_by_the_seed_and_not_by_place():
    heat = torch.zeros(1, 16, 16)
    first = rank_pixels(heat, seed=0)
    assert torch.equal(first, rank_pixels(heat, seed=0))
    assert not torch.equal(first, rank_pixels(heat, seed=1))
    # The middle rank of the upper half of the picture would be 63.5 if ties went by place.
    assert abs(first[0, :8].double().mean() - 127.5) < 20


def test_replacements_by_hand_and_against_scipy():
    images = torch.randn(2, 3, 40, 60, dtype=torch.float64)
    assert torch.equal(replacement_images(images, "zero"), torch.zeros_like(images))
    mean = replacement_images(images, "mean")
    torch.testing.assert_close(mean[1, 2], images[1, 2].mean().expand(40, 60))
    blurred = replacement_images(images, "blur")
    expected = ndimage.gaussian_filter(images[0, 0].numpy(), sigma=2.0, mode="mirror", radius=6)
    np.testing.assert_allclose(blurred[0, 0], expected, atol=1e-6)
    noise = replacement_images(images, "noise", seed=4)
    torch.testing.assert_close(noise.mean((2, 3)), images.mean((2, 3)), atol=0.1, rtol=0)
    torch.testing.assert_close(noise.std((2, 3)), images.std((2, 3)), atol=0.1, rtol=0)
    assert torch.equal(noise, replacement_images(images, "noise", seed=4))
    with pytest.raises(SettingError, match="`replacement` is 'inpaint'"):
        replacement_images(images, "inpaint")


def test_a_share_is_rounded_to_whole_pixels():
    image, ranks = torch.ones(1, 1, 1, 10), torch.arange(10).reshape(1, 1, 10)
    for ratio, pixels in ((0.3, 3), (0.7, 7), (0.04, 0), (0.06, 1), (1.0, 10)):
        assert perturb(image, 0 * image, ranks, torch.tensor([ratio])).sum() == 10 - pixels


def test_maps_without_an_order_give_no_score():
    model = linear_model([1.0, 2.0, 3.0, 4.0])
    heat = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[1.0, math.nan], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]])
    found = respond(model, torch.ones(3, 1, 2, 2), torch.zeros(3, dtype=torch.long), heat)
    for score in (probability_drop, log_odds, accuracy, fractional_difference, area_under_curve):
        assert score(found).isnan().reshape(3, -1).all(1).tolist() == [True, True, False]


def test_nothing_of_the_model_changes_and_nothing_is_recorded(network):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    found = respond(network, images, torch.tensor([0, 1]), torch.rand(2, 8, 8))
    assert not found.of_target.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_settings_and_shapes_that_do_not_fit(network):
    images, target, heat = torch.randn(2, 3, 8, 8).double(), torch.tensor([0, 1]), torch.rand(2, 8, 8)
    with pytest.raises(SettingError, match="`ratios`"):
        respond(network, images, target, heat, ratios=(0.5, 1.5))
    with pytest.raises(SettingError, match="`ratios`"):
        respond(network, images, target, heat, ratios=())
    with pytest.raises(SettingError, match="`order` is 'random'"):
        respond(network, images, target, heat, order="random")
    with pytest.raises(SettingError, match="steps` is 0"):
        deletion(network, images, target, heat, steps=0)
    with pytest.raises(SettingError, match="at least two"):
        area_under_curve(respond(network, images, target, heat, ratios=(0.5,)))
    with pytest.raises(InputError, match=r"`images` .* `heat`"):
        respond(network, images, target, heat[:, :4])
    with pytest.raises(InputError, match="one class index for each"):
        respond(network, images, torch.tensor([0]), heat)
