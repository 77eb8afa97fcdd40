import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import parchgrad as pg
from parchgrad.errors import LayerError
from parchgrad.evaluation.methods import CONTROLS, centre_blob, grad_cam, make_controls, maps_of, random_map


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
        "random channels": pg.heatmap(
            pg.Explainer(network, pg.RandomChannels(quantile=0.5, seed=3), layers="all").attribute(images, target)
        ),
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
