import itertools
import zlib
from dataclasses import replace

import captum
import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional

import parchgrad as pg
from parchgrad.core.selectors import Selection
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
from tests.support import random_statistics, small_network


def batch(count=3):
    return torch.randn(count, 3, 8, 8, dtype=torch.float64), torch.arange(count)


def strided_network(activation=nn.ReLU):
    """A classifier of 8 x 8 pictures with activations and strides between four convolutions."""
    return (
        nn.Sequential(
            *(nn.Conv2d(3, 6, 3, padding=1), activation(), nn.Conv2d(6, 6, 3, padding=1, stride=2), activation()),
            *(nn.Conv2d(6, 6, 3, padding=1), activation(), nn.MaxPool2d(2), nn.Conv2d(6, 6, 1), activation()),
            *(nn.Flatten(), nn.Linear(24, 5)),
        )
        .double()
        .eval()
    )


def energy(*, layers="all", quantile=0.34, softness=0.5, **settings):
    return pg.Edit(selector=pg.GradientEnergy(quantile=quantile, softness=softness), layers=layers, **settings)


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


def test_grad_cam_has_the_gates_of_its_equation():
    first, second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
    rest = nn.Sequential(second, nn.Flatten(), nn.Linear(80, 4))
    model = nn.Sequential(first, nn.ReLU(), rest).double().eval()
    images, target = batch()
    values = first(images).detach()
    rectified = values.relu().requires_grad_()
    (behind,) = torch.autograd.grad(rest(rectified)[torch.arange(3), target].sum(), rectified)
    gate = (values / (2 * values.flatten(1).std(dim=1)).reshape(3, 1, 1, 1) + 0.5).clamp(0, 1)
    coarse = ((gate * behind).mean((2, 3), keepdim=True) * values).sum(1, keepdim=True).relu()
    expected = functional.interpolate(coarse, (8, 8), mode="bilinear").squeeze(1)
    torch.testing.assert_close(grad_cam(model, layer="0", gates=2.0)(images, target), expected)
    assert not torch.allclose(grad_cam(model, layer="0")(images, target), expected)
    with pytest.raises(SettingError, match="`gates` is -1"):
        grad_cam(model, gates=-1.0)
    with pytest.raises(SettingError, match="`balance` is of type str"):
        grad_cam(model, balance="on")


@pytest.mark.parametrize(
    ("rules", "activation"),
    [
        ({"gates": 2.0}, nn.ReLU),
        ({"antialias": True}, nn.ReLU),
        ({"gates": 8.0, "antialias": True}, nn.ReLU),
        ({"balance": True}, nn.SiLU),
    ],
)
def test_grad_cam_follows_the_rules_of_the_backward_pass(rules, activation):
    model = strided_network(activation)
    images, target = batch()
    features = []
    handle = model[0].register_forward_hook(lambda module, inputs, output: features.append(output))
    with pg.ParchGrad(model, None, **rules):
        score = model(images)[torch.arange(3), target].sum()
        (gradient,) = torch.autograd.grad(score, features[0])
    handle.remove()
    coarse = (gradient.mean((2, 3), keepdim=True) * features[0]).sum(1, keepdim=True).relu()
    torch.testing.assert_close(grad_cam(model, layer="0", **rules)(images, target), coarse.detach().squeeze(1))
    assert not torch.allclose(grad_cam(model, layer="0")(images, target), coarse.detach().squeeze(1))


def test_grad_cam_is_plain_inside_a_block(network):
    images, target = batch()
    expected = grad_cam(network)(images, target)
    with pg.ParchGrad(network, pg.GradientEnergy(quantile=0.1), layers="all"):
        network(images)
        torch.testing.assert_close(grad_cam(network)(images, target), expected)


def test_grad_cam_of_another_score_agrees_with_captum():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 4)).double().eval()
    model.requires_grad_(False)
    images, target = batch()
    plain = captum.attr.LayerGradCam(model, model[0]).attribute(images, target, relu_attributions=True)
    expected = functional.interpolate(plain.detach(), (8, 8), mode="bilinear").squeeze(1)
    torch.testing.assert_close(grad_cam(model)(images, target), expected)
    contrasts = [pg.Contrast(target=index, against="rest") for index in target.tolist()]
    found = grad_cam(model, score=lambda index: pg.Contrast(target=index, against="rest"))(images, target)
    for row, contrast in enumerate(contrasts):
        of_row = captum.attr.LayerGradCam(lambda inputs, contrast=contrast: contrast(model(inputs)), model[0])
        coarse = of_row.attribute(images[row : row + 1], relu_attributions=True).detach()
        torch.testing.assert_close(found[row], functional.interpolate(coarse, (8, 8), mode="bilinear")[0, 0])
    assert not torch.allclose(found, expected)
    assert not model[0]._forward_hooks


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
    edit = energy(gates=2.0)
    found = make_controls(network, edit=edit, quantile=0.5, seed=3)
    assert tuple(found) == CONTROLS
    expected = {
        "gradient": pg.heatmap(pg.Explainer(network, None).attribute(images, target)),
        "random channels": random_channels(network, quantile=0.5, edit=edit, seed=3)(images, target),
        "random map": random_map(seed=3)(images, target),
        "Grad-CAM": grad_cam(network)(images, target),
        "centre blob": centre_blob()(images, target),
    }
    for name, method in found.items():
        torch.testing.assert_close(method(images, target), expected[name])


def test_maps_of_other_scores_than_a_logit():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).double().eval()
    images, target = batch()
    explainer = pg.Explainer(model, None)

    def against_the_next(label):
        return pg.Contrast(target=label, against=(label + 1) % 3)

    found = maps_of(explainer, against_the_next)(images, target)
    leaf = images.clone().requires_grad_()
    logits, rows = model(leaf), torch.arange(3)
    (gradient,) = torch.autograd.grad((logits[rows, target] - logits[rows, (target + 1) % 3]).sum(), leaf)
    torch.testing.assert_close(found, gradient.abs().mean(1))


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
        random_channels(network, quantile=0.34, edit=energy(), seed=3),
        shuffled_masks(network, energy(), seed=3),
    ):
        together = control(images, target)
        for row in range(6):
            torch.testing.assert_close(control(images[row : row + 1], target[row : row + 1])[0], together[row])
        twice = control(images[[0, 0]], target[[0, 0]])
        torch.testing.assert_close(twice[0], twice[1])


def test_random_channels_are_drawn_for_each_image(network):
    images, target = torch.randn(60, 3, 8, 8, dtype=torch.float64), torch.arange(60) % 5
    edit = pg.Edit(layers=["2"], gates=2.0)
    maps = random_channels(network, quantile=0.17, edit=edit, seed=3)(images, target)
    drawn = []
    for channel in range(6):
        mask = torch.arange(6) == channel
        fixed = replace(edit, selector=pg.FixedChannels({"2": mask}))
        own = maps_of(pg.Explainer.from_edit(network, fixed))(images, target)
        drawn.append(torch.tensor([torch.allclose(a, b, rtol=1e-9, atol=0) for a, b in zip(own, maps, strict=True)]))
    counts = torch.stack(drawn).sum(dim=1)
    assert counts.sum() == 60
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    # A method of many passes keeps one draw for an image.
    steps = random_channels(network, quantile=0.17, edit=edit, method="integrated_gradients", seed=3)
    assert steps(images[:2], target[:2]).shape == (2, 8, 8)


_ON, _OFF = ({"antialias": value, "balance": value} for value in (True, False))


@pytest.mark.parametrize(
    ("edit", "settings"),
    [
        (pg.Edit(), {"layers": 0.75, "conserve": "energy", "gates": 8.0, **_ON}),
        (energy(), {"layers": "all", "conserve": "energy", "gates": 1.0, **_ON}),
        (energy(softness=0), {"layers": "all", "conserve": "energy", "gates": 0.0, **_OFF}),
        (
            energy(layers=["4"], gamma=2.0, conserve="exact", gates=1.0, **_OFF),
            {"layers": ["4"], "gamma": 2.0, "conserve": "exact", "gates": 1.0, **_OFF},
        ),
    ],
)
def test_random_channels_keep_all_else_of_the_edit(edit, settings):
    network = strided_network()
    images, target = batch()
    for method in ("gradient", "input_x_gradient"):
        maps = random_channels(network, quantile=0.5, edit=edit, method=method, seed=3)(images, target)
        for row, (image, label) in enumerate(zip(images, target, strict=True)):
            selector = pg.RandomChannels(quantile=0.5, seed=zlib.crc32(image.numpy().tobytes(), 3))
            explainer = pg.Explainer(network, selector, method=method, **settings)
            own = pg.heatmap(explainer.attribute(image.unsqueeze(0), int(label)))
            torch.testing.assert_close(maps[row], own[0])


def test_an_edit_without_a_selector_has_no_control(network):
    plain = pg.Edit(selector=None, gates=2.0)
    for control in (
        lambda: random_channels(network, edit=plain),
        lambda: make_controls(network, edit=plain),
        lambda: masks_of_another_class(network, plain),
        lambda: shuffled_masks(network, plain),
    ):
        with pytest.raises(SettingError, match="`edit` has no selector"):
            control()


def masked_gradient(model, images, target, masks, **settings):
    """The map of a block with given masks, one image at a time."""
    found = []
    for row in range(len(images)):
        own = {name: mask[row] for name, mask in masks.items()}
        leaf = images[row : row + 1].clone().requires_grad_()
        with pg.ParchGrad(model, pg.FixedChannels(own), layers="all", **settings):
            (gradient,) = torch.autograd.grad(model(leaf)[0, target[row]], leaf)
        found.append(gradient.abs().mean(1))
    return torch.cat(found)


def test_masks_of_another_class_are_swapped_and_the_gradient_is_kept(network):
    held = random_statistics({"0": 6, "2": 6})
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    right = torch.tensor([0, 1, 4])
    hard = {"conserve": "independent", "gates": 0.0, "antialias": False}
    edit = pg.Edit(selector=pg.ClassWise(held, quantile=0.34, softness=0), layers="all", **hard)
    for distance, wrong in ((3, [3, 4, 2]), (None, [2, 3, 1])):
        method = masks_of_another_class(network, edit, distance=distance)
        masks = {name: held[name].class_log_p().argsort(dim=0)[:2, wrong].T for name in ("0", "2")}
        of_wrong = {name: torch.zeros(3, 6, dtype=torch.bool).scatter_(1, best, True) for name, best in masks.items()}
        torch.testing.assert_close(method(images, right), masked_gradient(network, images, right, of_wrong, **hard))
    own = pg.heatmap(pg.Explainer.from_edit(network, edit).attribute(images, right))
    same = masks_of_another_class(network, edit, distance=5)
    torch.testing.assert_close(same(images, right), own)
    assert not torch.allclose(method(images, right), own)
    soft = pg.Edit(selector=pg.ClassWise(held, quantile=0.34), layers="all", gates=2.0)
    weights = {name: soft.selector.class_weights(name)[[3, 4, 2]] for name in ("0", "2")}
    assert ((weights["2"] > 0) & (weights["2"] < 1)).any()
    found = masks_of_another_class(network, soft, distance=3)(images, right)
    torch.testing.assert_close(found, masked_gradient(network, images, right, weights, gates=2.0))
    with pytest.raises(LayerError):
        masks_of_another_class(network, replace(edit, layers=["nowhere"]))
    damped = replace(edit, gamma=2.0, conserve="none")
    other = pg.heatmap(pg.Explainer.from_edit(network, damped).attribute(images, right))
    torch.testing.assert_close(masks_of_another_class(network, damped, distance=5)(images, right), other)
    single = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 1)).eval()
    with pytest.raises(SettingError, match="two classes"):
        masks_of_another_class(single, energy())(torch.rand(1, 3, 8, 8), torch.tensor([0]))


def test_a_convolution_that_is_called_twice_has_two_selections():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.body(self.body(self.stem(x).relu()).relu()).mean((2, 3)))

    model = Twice().double().eval()
    images, target = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2])
    own = maps_of(pg.Explainer.from_edit(model, energy()))(images, target)
    torch.testing.assert_close(masks_of_another_class(model, energy(), distance=3)(images, target), own)


def test_other_masks_come_with_what_the_selector_does_to_positions(network):
    images, target = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 4])

    class AllChannels(pg.Selector):
        def select(self, signal):
            places = (torch.arange(64.0).reshape(8, 8) % 3 / 2).expand(len(signal.gradient), 8, 8)
            channels = torch.ones(signal.gradient.shape[:2], dtype=torch.bool)
            return Selection(channel_weights=channels, position_weights=places)

    edit = pg.Edit(selector=AllChannels(), layers=["2"], gates=0.0, antialias=False)
    own = maps_of(pg.Explainer.from_edit(network, edit))(images, target)
    assert not torch.allclose(own, maps_of(pg.Explainer(network, None))(images, target))
    for control in (masks_of_another_class, shuffled_masks):
        torch.testing.assert_close(control(network, edit)(images, target), own)


def test_shuffled_masks_keep_as_many_channels_at_random(network):
    images, target = torch.randn(40, 3, 8, 8, dtype=torch.float64), torch.arange(40) % 5

    class Varying(pg.Selector):
        def select(self, signal):
            counts = torch.arange(len(signal.gradient)) % 5 + 1
            return torch.arange(6) < counts.unsqueeze(1)

    seen = []
    edit = pg.Edit(selector=Varying(), layers=["2"], gates=0.0, antialias=False)
    maps = shuffled_masks(network, edit, seed=3)(images, target)
    # Which mask was drawn is found by trying all of the size.
    for row in range(40):
        size = row % 5 + 1
        for kept in itertools.combinations(range(6), size):
            mask = torch.zeros(6, dtype=torch.bool)
            mask[list(kept)] = True
            with pg.ParchGrad(network, pg.FixedChannels({"2": mask}), layers=["2"], gates=0, antialias=False):
                leaf = images[row : row + 1].clone().requires_grad_()
                (gradient,) = torch.autograd.grad(network(leaf)[0, target[row]], leaf)
            if torch.allclose(gradient.abs().mean(1)[0], maps[row], rtol=1e-9, atol=0):
                seen += kept
                break
        else:
            pytest.fail(f"No mask of {size} channels gives the map of row {row}.")
    # 120 places among six channels.
    assert stats.chisquare(np.bincount(seen, minlength=6)).pvalue > 1e-3
    again = shuffled_masks(network, edit, seed=3)
    torch.testing.assert_close(again(images, target), maps)
    assert not torch.allclose(shuffled_masks(network, edit, seed=4)(images, target), maps)


def test_shuffled_weights_are_those_of_the_row_in_another_order(network):
    images, target = batch(4)
    weights = torch.tensor([1.0, 0.5, 0.25, 0.0, 0.0, 0.0], dtype=torch.float64)
    edit = pg.Edit(selector=pg.FixedChannels({"2": weights}), layers=["2"], gates=2.0)
    maps = shuffled_masks(network, edit, seed=3)(images, target)
    orders = torch.stack([weights[list(order)] for order in set(itertools.permutations(range(6)))]).unique(dim=0)
    assert len(orders) == 120
    every = pg.Explainer.from_edit(
        network, replace(edit, selector=pg.FixedChannels({"2": orders})), internal_batch_size=None
    )
    drawn = []
    for image, label, heat in zip(images, target, maps, strict=True):
        candidates = pg.heatmap(every.attribute(image.expand(120, -1, -1, -1), int(label)))
        fits = torch.isclose(candidates, heat, rtol=1e-9, atol=0).flatten(1).all(dim=1)
        assert fits.sum() == 1
        drawn.append(int(fits.nonzero()))
    assert len(set(drawn)) > 1


def test_grad_cam_takes_the_last_convolution_that_the_score_depends_on():
    class Extra(nn.Module):
        def __init__(self, *, runs):
            super().__init__()
            self.body = small_network(dtype=torch.float32)
            self.unused, self.runs = nn.Conv2d(3, 2, 3), runs

        def forward(self, x):
            aside = self.unused(x) if self.runs else None
            return {"logits": self.body(x), "aside": aside}

    x, target = torch.rand(2, 3, 8, 8), torch.tensor([1, 3])
    for runs in (False, True):
        model = Extra(runs=runs).eval()
        torch.testing.assert_close(grad_cam(model)(x, target), grad_cam(model.body)(x, target))
        with pytest.raises(LayerError, match="score depends on"):
            grad_cam(model, layer="unused")(x, target)
