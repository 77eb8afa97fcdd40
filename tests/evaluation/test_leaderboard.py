import pytest
import torch
from torch import nn

import parchgrad as pg
from parchgrad.data.samples import Pairs
from parchgrad.data.shapes import GeneratedShapes
from parchgrad.errors import SettingError
from parchgrad.evaluation.leaderboard import (
    DEFAULT,
    leaderboard_methods,
    methods_that_fit,
    occlusion,
    vargrad,
)

# Captum's, on its backward hooks.
pytestmark = pytest.mark.filterwarnings("ignore:Setting (forward, )?backward hooks:UserWarning")


class Squares(nn.Module):
    """A score whose gradient is the input, beside one that is constant."""

    def forward(self, x):
        total = 0.5 * x.flatten(1).square().sum(dim=1)
        return torch.stack((total, 0 * total), dim=1)


def test_vargrad_is_the_variance_of_the_noise_where_the_gradient_is_the_input():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), Squares()).eval()
    model[0].weight.data, model[0].bias.data = torch.eye(2).reshape(2, 2, 1, 1), torch.zeros(2)
    images = torch.rand(2, 2, 6, 6)
    spread = images.flatten(1).amax(1) - images.flatten(1).amin(1)
    heat = vargrad(model, samples=4000, sigma=0.1)(images, torch.tensor([0, 0]))
    expected = (0.1 * spread).square().reshape(2, 1, 1).expand(2, 6, 6)
    torch.testing.assert_close(heat, expected, rtol=0.1, atol=0)
    with pytest.raises(SettingError, match="samples"):
        vargrad(model, samples=1)


def occluded_slowly(model, image, target, side):
    """Mean fall of the logit over all squares on a pixel, which half overlap."""
    height, width = image.shape[1:]
    total, count = torch.zeros(height, width), torch.zeros(height, width)
    # Captum moves the last square back into the image.
    starts = [sorted({*range(0, size - side + 1, side // 2), size - side}) for size in (height, width)]
    clean = model(image.unsqueeze(0))[0, target]
    for top in starts[0]:
        for left in starts[1]:
            changed = image.clone()
            changed[:, top : top + side, left : left + side] = 0
            total[top : top + side, left : left + side] += clean - model(changed.unsqueeze(0))[0, target]
            count[top : top + side, left : left + side] += 1
    return (total / count).relu()


@torch.no_grad()
def test_occlusion_is_the_mean_fall_of_the_logit():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    images, target = torch.rand(2, 3, 8, 8), torch.tensor([2, 1])
    heat = occlusion(model, share=0.5, internal_batch_size=3)(images, target)
    for image, index, found in zip(images, target.tolist(), heat, strict=True):
        torch.testing.assert_close(found, occluded_slowly(model, image, index, 4), rtol=1e-4, atol=1e-6)


def test_every_method_fits_a_small_network_and_the_published_one_has_statistics(shapes):
    model, images, target = shapes
    statistics = pg.collect_statistics(model, Pairs(GeneratedShapes(count=100, seed=8)), layers=0.5)
    methods = leaderboard_methods(model, statistics=statistics)
    fitting, left_out = methods_that_fit(model, methods, images[:2], target[:2])
    assert list(left_out) == ["balance"]
    assert {*fitting, "balance"} == {*leaderboard_methods(model), "ParchGrad, published"}
    torch.testing.assert_close(
        fitting[DEFAULT](model)(images, target), pg.heatmap(pg.Explainer(model).attribute(images, target))
    )


def test_a_method_that_raises_or_is_not_finite_is_left_out_with_the_reason(shapes):
    model, images, target = shapes

    def raises(changed):
        raise RuntimeError("it needs another network")

    methods = {
        "raises": raises,
        "not finite": lambda changed: lambda images, target: images.mean(1) / 0,
        "flat": lambda changed: lambda images, target: images.mean((1, 2, 3)),
    }
    fitting, left_out = methods_that_fit(model, methods, images, target)
    assert not fitting
    assert list(left_out) == list(methods)
    assert left_out["raises"] == "it needs another network"


@pytest.fixture(scope="module")
def shapes():
    data = GeneratedShapes(count=4, seed=9)
    samples = [data[index] for index in range(4)]
    model = pg.load_model("shapes").model
    return model, torch.stack([each.image for each in samples]), torch.tensor([each.label for each in samples])
