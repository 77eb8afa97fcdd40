import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional

import parchgrad as pg
from parchgrad import recording
from parchgrad.errors import LayerError, SettingError
from parchgrad.evaluation.methods import (
    CONTROLS,
    centre_blob,
    grad_cam,
    make_controls,
    maps_of,
    masks_of_another_class,
    random_channels,
    random_map,
    shuffled_masks,
)
from parchgrad.selection import Selection
from tests.conftest import random_statistics


def batch(count=3):
    return torch.randn(count, 3, 8, 8, dtype=torch.float64), torch.arange(count)


def test_grad_cam_agrees_with_its_equation():
    first, last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
    head = nn.Linear(5 * 16, 4)
    model = nn.Sequential(first, nn.ReLU(), last, nn.Flatten(), head).double().eval()
    images, target = batch()
    features = last(first(images).relu()).detach().requires_grad_()
    score = head(features.flatten(1))[torch.arange(3), target].sum()
    (gradient,) = torch.autograd.grad(score, features)
    coarse = (gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu()
    expected = functional.interpolate(coarse, (8, 8), mode="bilinear").squeeze(1)
    torch.testing.assert_close(grad_cam(model)(images, target), expected.detach())
    torch.testing.assert_close(grad_cam(model, internal_batch_size=2)(images, target), expected.detach())
    assert grad_cam(model, layer="0")(images, target).shape == (3, 8, 8)
    with pytest.raises(LayerError, match="'9'"):
        grad_cam(model, layer="9")


def test_grad_cam_is_plain_inside_a_block(network):
    images, target = batch()
    expected = grad_cam(network)(images, target)
    with pg.ParchGrad(network, pg.GradientEnergy(quantile=0.1), layers="all"):
        network(images)
        torch.testing.assert_close(grad_cam(network)(images, target), expected)


def test_random_maps_follow_from_seed_and_image_alone():
    images, target = batch(4)
    maps = random_map(seed=1)(images, target)
    assert torch.equal(random_map(seed=1)(images[[2, 0]], target[:2]), maps[[2, 0]])
    assert not torch.equal(random_map(seed=2)(images, target), maps)
    correlation = np.corrcoef(maps.flatten(1).numpy())
    assert np.abs(correlation - np.eye(4)).max() < 0.5
    assert maps.min() >= 0
    assert maps.max() < 1


def test_the_controls_are_what_their_names_say(network):
    images, target = batch()
    found = make_controls(network, layers="all", quantile=0.5, seed=3)
    assert tuple(found) == CONTROLS
    expected = {
        "gradient": pg.heatmap(pg.Explainer(network, None).attribute(images, target)),
        "random channels": random_channels(network, quantile=0.5, layers="all", seed=3)(images, target),
        "random map": random_map(seed=3)(images, target),
        "Grad-CAM": grad_cam(network)(images, target),
        "centre blob": centre_blob()(images, target),
    }
    for name, method in found.items():
        torch.testing.assert_close(method(images, target), expected[name])


def test_captum_methods_plug_in_by_name():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).double().eval()
    images, target = batch()
    heat = maps_of(pg.Explainer(model, None, method="InputXGradient"))(images, target)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[torch.arange(3), target].sum(), leaf)
    torch.testing.assert_close(heat, (images * gradient).abs().mean(1))


def test_random_controls_follow_the_image_and_neither_its_batch_nor_its_neighbours(network):
    images, target = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 5
    for control in (
        random_channels(network, quantile=0.34, layers="all", seed=3),
        shuffled_masks(network, pg.GradientEnergy(quantile=0.34), layers="all", seed=3),
    ):
        together = control(images, target)
        for row in range(6):
            torch.testing.assert_close(control(images[row : row + 1], target[row : row + 1])[0], together[row])
        twice = control(images[[0, 0]], target[[0, 0]])
        torch.testing.assert_close(twice[0], twice[1])


def test_random_channels_are_drawn_for_each_image(network):
    images, target = torch.randn(60, 3, 8, 8, dtype=torch.float64), torch.arange(60) % 5
    maps = random_channels(network, quantile=0.17, layers=["2"], seed=3)(images, target)
    drawn = []
    for channel in range(6):
        mask = torch.arange(6) == channel
        own = maps_of(pg.Explainer(network, pg.FixedChannels({"2": mask}), layers=["2"]))(images, target)
        drawn.append(torch.tensor([torch.allclose(a, b, rtol=1e-9, atol=0) for a, b in zip(own, maps, strict=True)]))
    counts = torch.stack(drawn).sum(dim=1)
    assert counts.sum() == 60
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    # A method of many passes keeps one draw for an image.
    steps = random_channels(network, quantile=0.17, layers=["2"], method="integrated_gradients", seed=3)
    assert steps(images[:2], target[:2]).shape == (2, 8, 8)


def masked_gradient(model, images, target, masks):
    """The map of a plain block with given masks, one image at a time."""
    found = []
    for row in range(len(images)):
        own = {name: mask[row] for name, mask in masks.items()}
        leaf = images[row : row + 1].clone().requires_grad_()
        with pg.ParchGrad(model, pg.FixedChannels(own), layers="all"):
            (gradient,) = torch.autograd.grad(model(leaf)[0, target[row]], leaf)
        found.append(gradient.abs().mean(1))
    return torch.cat(found)


def test_masks_of_another_class_are_swapped_and_the_gradient_is_kept(network):
    held = random_statistics({"0": 6, "2": 6})
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    right = torch.tensor([0, 1, 4])
    selector = pg.ClassWise(held, quantile=0.34)
    for distance, wrong in ((3, [3, 4, 2]), (None, [2, 3, 1])):
        method = masks_of_another_class(network, selector, layers="all", distance=distance)
        masks = {name: held[name].class_log_p().argsort(dim=0)[:2, wrong].T for name in ("0", "2")}
        of_wrong = {name: torch.zeros(3, 6, dtype=torch.bool).scatter_(1, best, True) for name, best in masks.items()}
        torch.testing.assert_close(method(images, right), masked_gradient(network, images, right, of_wrong))
    own = pg.heatmap(pg.Explainer(network, selector, layers="all").attribute(images, right))
    same = masks_of_another_class(network, selector, layers="all", distance=5)
    torch.testing.assert_close(same(images, right), own)
    assert not torch.allclose(method(images, right), own)
    with pytest.raises(LayerError):
        masks_of_another_class(network, selector, layers=["nowhere"])
    damped = masks_of_another_class(network, selector, layers="all", distance=5, gamma=2.0, conserve="none")
    other = pg.Explainer(network, selector, layers="all", gamma=2.0, conserve="none")
    torch.testing.assert_close(damped(images, right), pg.heatmap(other.attribute(images, right)))
    single = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 1)).eval()
    with pytest.raises(SettingError, match="no other"):
        masks_of_another_class(single, pg.GradientEnergy())(torch.rand(1, 3, 8, 8), torch.tensor([0]))


def test_a_convolution_that_is_called_twice_has_two_selections():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.body(self.body(self.stem(x).relu()).relu()).mean((2, 3)))

    model = Twice().double().eval()
    images, target = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2])
    selector = pg.GradientEnergy(quantile=0.34)
    own = maps_of(pg.Explainer(model, selector, layers="all"))(images, target)
    torch.testing.assert_close(masks_of_another_class(model, selector, layers="all", distance=3)(images, target), own)


def test_other_masks_come_with_what_the_selector_does_to_positions(network):
    images, target = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 4])

    class AllChannels(pg.Selector):
        def partition(self, signal):
            weights = (torch.arange(64.0).reshape(8, 8) % 3).expand(len(signal.gradient), 8, 8)
            return Selection(channel_mask=self.select(signal), position_weights=weights)

        def select(self, signal):
            return torch.ones(signal.gradient.shape[:2], dtype=torch.bool)

    own = maps_of(pg.Explainer(network, AllChannels(), layers=["2"]))(images, target)
    assert not torch.allclose(own, maps_of(pg.Explainer(network, None))(images, target))
    for control in (masks_of_another_class, shuffled_masks):
        torch.testing.assert_close(control(network, AllChannels(), layers=["2"])(images, target), own)


def test_controls_take_no_norms_that_nobody_reads(network, monkeypatch):
    def unread(*arguments, **options):
        raise AssertionError("norms of channels are taken")

    monkeypatch.setattr(recording, "safe_norm", unread)
    images, target = torch.rand(2, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1])
    for control in (masks_of_another_class, shuffled_masks):
        assert control(network, pg.GradientEnergy(quantile=0.34), layers="all")(images, target).any()


def test_shuffled_masks_keep_as_many_channels_at_random(network):
    images, target = torch.randn(40, 3, 8, 8, dtype=torch.float64), torch.arange(40) % 5

    class Varying(pg.Selector):
        def select(self, signal):
            counts = torch.arange(len(signal.gradient)) % 5 + 1
            return torch.arange(6) < counts.unsqueeze(1)

    seen = []
    maps = shuffled_masks(network, Varying(), layers=["2"], seed=3)(images, target)
    # Which mask was drawn is found by trying all of the size.
    for row in range(40):
        size = row % 5 + 1
        for kept in itertools.combinations(range(6), size):
            mask = torch.zeros(6, dtype=torch.bool)
            mask[list(kept)] = True
            with pg.ParchGrad(network, pg.FixedChannels({"2": mask}), layers=["2"]):
                leaf = images[row : row + 1].clone().requires_grad_()
                (gradient,) = torch.autograd.grad(network(leaf)[0, target[row]], leaf)
            if torch.allclose(gradient.abs().mean(1)[0], maps[row], rtol=1e-9, atol=0):
                seen += kept
                break
        else:
            pytest.fail(f"No mask of {size} channels gives the map of row {row}.")
    # 120 places among six channels.
    assert stats.chisquare(np.bincount(seen, minlength=6)).pvalue > 1e-3
    again = shuffled_masks(network, Varying(), layers=["2"], seed=3)
    torch.testing.assert_close(again(images, target), maps)
    assert not torch.allclose(shuffled_masks(network, Varying(), layers=["2"], seed=4)(images, target), maps)
