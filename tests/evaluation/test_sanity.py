import math
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import parchgrad as pg
from parchgrad.errors import InputError, LayerError, SettingError
from parchgrad.evaluation.methods import maps_of, random_channels, random_map
from parchgrad.evaluation.sanity import (
    class_similarity,
    max_sensitivity,
    parameter_randomisation,
    randomised_models,
    spearman,
    structural_similarities,
)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_spearman_agrees_with_scipy_ties_included():
    first, second = torch.randint(0, 9, (4, 6, 7)).float(), torch.rand(4, 6, 7)
    second[1] = -(first[1] ** 3)
    expected = [stats.spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(spearman(first, second), expected, rtol=1e-12)
    assert spearman(first, second)[1].item() == pytest.approx(-1)
    second[0], first[2], first[3, 0, 0] = 1.0, 0.0, math.nan
    assert spearman(first, second).isnan().tolist() == [True, False, True, True]


def similarity_slowly(first, second, window=7):
    """Mean of the SSIM of all windows, from its definition with sample covariances."""
    found = []
    for row in range(first.shape[0] - window + 1):
        for column in range(first.shape[1] - window + 1):
            a = first[row : row + window, column : column + window].flatten()
            b = second[row : row + window, column : column + window].flatten()
            covariance = np.cov(a, b)
            luminance = (2 * a.mean() * b.mean() + 0.01**2) / (a.mean() ** 2 + b.mean() ** 2 + 0.01**2)
            contrast = (2 * covariance[0, 1] + 0.03**2) / (covariance[0, 0] + covariance[1, 1] + 0.03**2)
            found.append(luminance * contrast)
    return np.mean(found)


def test_structural_similarity_agrees_with_its_definition_at_any_scale():
    first, second = torch.rand(2, 12, 15).double(), torch.rand(2, 12, 15).double()
    second[1] = first[1] + 0.05 * second[1]
    for a, b, found in zip(first, second, structural_similarities(1e-20 * first, 50 * second), strict=True):
        expected = similarity_slowly((a / a.max()).numpy(), (b / b.max()).numpy())
        assert found.item() == pytest.approx(expected, rel=1e-9)
    first[0] = 0
    assert structural_similarities(first, second).isnan().tolist() == [True, False]
    with pytest.raises(InputError, match="3 x 3"):
        structural_similarities(first[:, :2], second[:, :2])
    with pytest.raises(InputError, match="cannot be compared"):
        structural_similarities(first, second[:1])


def test_randomisation_goes_through_the_modules_in_its_order_and_leaves_the_model(network):
    before = state(network)
    parameters = {
        "0": {"0.weight", "0.bias"},
        "2": {"2.weight", "2.bias"},
        "7": {"7.weight", "7.bias"},
        # Its weight and bias are ones and zeros before and after.
        "3": set(),
    }
    for order, names in (("top_down", "7320"), ("bottom_up", "0237"), ("independent", "0237")):
        expected = set()
        for step, (name, model) in enumerate(randomised_models(network, order=order, seed=1)):
            assert name == names[step]
            expected = parameters[name] | (expected if order != "independent" else set())
            assert changed(before, state(model)) == expected
            assert not model.training
    assert not changed(before, state(network))


def test_weights_are_drawn_as_torch_draws_them_by_seed_and_not_from_the_global_generator(network):
    torch.manual_seed(5)
    first = torch.rand(3)
    torch.manual_seed(5)
    drawn = {seed: state(list(randomised_models(network, seed=seed))[-1][1]) for seed in (0, 0, 1)}
    assert torch.equal(torch.rand(3), first)
    again = state(list(randomised_models(network, seed=0))[-1][1])
    assert not changed(drawn[0], again)
    assert {"0.weight", "2.weight", "7.weight"} <= changed(drawn[0], drawn[1])
    # Uniform within 1 / sqrt(fan-in).
    bound = 1 / math.sqrt(3 * 9)
    assert stats.kstest(drawn[0]["0.weight"].flatten() / bound, stats.uniform(-1, 2).cdf).pvalue > 1e-3


def test_threads_draw_the_weights_that_they_draw_alone(network):
    wanted = {seed: state(list(randomised_models(network, seed=seed))[-1][1]) for seed in range(4)}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            seeds = [0, 1, 2, 3] * 10
            found = list(pool.map(lambda seed: state(list(randomised_models(network, seed=seed))[-1][1]), seeds))
    finally:
        sys.setswitchinterval(interval)
    for seed, drawn in zip(seeds, found, strict=True):
        assert changed(wanted[seed], drawn) == set()


def test_parameters_without_an_initialisation_are_shuffled():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.arange(50.0))

    model = nn.Sequential(Scaled())
    ((_, found),) = randomised_models(model)
    assert not torch.equal(found[0].scale, model[0].scale)
    assert torch.equal(found[0].scale.sort().values, model[0].scale)


def test_named_modules_are_randomised_with_all_inside_them():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), nn.ReLU(), nn.Linear(4, 2))
    before = state(model)
    steps = [(name, changed(before, state(found))) for name, found in randomised_models(model, modules=["0", "2"])]
    inside = {"0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias"}
    assert steps == [("2", {"2.weight", "2.bias"}), ("0", inside | {"2.weight", "2.bias"})]
    for name in ("1", "nowhere"):
        with pytest.raises(LayerError, match=repr(name)):
            list(randomised_models(model, modules=[name]))
    with pytest.raises(SettingError, match="`order` is 'sideways'"):
        list(randomised_models(model, order="sideways"))


def test_a_map_of_the_weights_changes_and_one_of_the_image_alone_does_not(network):
    images, target = torch.randn(2, 3, 8, 8).double(), torch.tensor([0, 1])
    options = {"order": "top_down", "seeds": (0, 1)}
    blind = parameter_randomisation(network, lambda model: random_map(), images, target, **options)
    assert [(step.module, step.seed) for step in blind] == [(name, seed) for seed in (0, 1) for name in "7320"]
    for step in blind:
        torch.testing.assert_close(step.spearman, torch.ones(2).double())
        torch.testing.assert_close(step.structural_similarity, torch.ones(2).double())

    def gradient(model):
        return maps_of(pg.Explainer(model, None))

    steps = parameter_randomisation(network, gradient, images, target, **options)
    models = [found for seed in (0, 1) for found in map(_state_model(network), randomised_models(network, seed=seed))]
    for step, model in zip(steps, models, strict=True):
        before, after = gradient(network)(images, target), gradient(model)(images, target)
        torch.testing.assert_close(step.spearman, spearman(before, after))
    assert steps[-1].spearman.max() < 0.9


def _state_model(network):
    import copy

    return lambda step: copy.deepcopy(step[1])


def test_randomisation_may_be_compared_at_shares_of_the_way(network):
    images, target = torch.randn(2, 3, 8, 8).double(), torch.tensor([0, 1])

    def gradient(model):
        return maps_of(pg.Explainer(model, None))

    whole = parameter_randomisation(network, gradient, images, target, seeds=(0, 1))
    part = parameter_randomisation(network, gradient, images, target, seeds=(0, 1), shares=(1.0, 0.1, 0.25, 0.26))
    assert [step.module for step in part] == ["0", "7", "7", "3"] * 2
    for step, expected in zip(part, [whole[place] for place in (3, 0, 0, 1, 7, 4, 4, 5)], strict=True):
        torch.testing.assert_close(step.spearman, expected.spearman)
    with pytest.raises(SettingError, match=r"in \(0, 1\]"):
        parameter_randomisation(network, gradient, images, target, shares=(0.0,))


def test_max_sensitivity_of_a_linear_map_lies_within_its_bound_and_follows_the_seed():
    weight = torch.rand(1, 3, 8, 8)

    def method(images, target):
        return (weight * images).sum(1)

    images, target = torch.rand(4, 3, 8, 8) + 1, torch.tensor([0, 1, 2, 3])
    found = max_sensitivity(method, images, target, radius=0.1, samples=20, seed=3)
    assert torch.equal(found, max_sensitivity(method, images, target, radius=0.1, samples=20, seed=3))
    # Neither the batch nor the size of a pass changes the noise, and a pass holds no more than it may.
    sizes = []

    def watched(images, target):
        sizes.append(len(images))
        return method(images, target)

    small = max_sensitivity(watched, images, target, radius=0.1, samples=20, seed=3, internal_batch_size=9)
    torch.testing.assert_close(small, found)
    assert max(sizes) <= 9
    for row in range(4):
        one = max_sensitivity(method, images[row : row + 1], target[row : row + 1], radius=0.1, samples=20, seed=3)
        torch.testing.assert_close(one, found[row : row + 1])
    assert not torch.equal(found, max_sensitivity(method, images, target, radius=0.1, samples=20, seed=4))
    clean = method(images, target).flatten(1).norm(dim=1)
    bound = 0.1 * weight.sum(1).norm() / clean
    assert bool((found < bound).all())
    # Independent uniform noise: the squared change has the expectation radius^2 / 3 * sum of squared weights.
    typical = 0.1 / math.sqrt(3) * weight.norm() / clean
    assert bool((found > 0.9 * typical).all())
    assert bool((found < 1.6 * typical).all())
    heat = max_sensitivity(lambda images, target: 1e-30 * method(images, target), images, target, radius=0.1, seed=3)
    torch.testing.assert_close(heat, max_sensitivity(method, images, target, radius=0.1, seed=3), rtol=1e-4, atol=0)
    assert max_sensitivity(lambda images, target: 0 * images[:, 0], images, target).isnan().all()
    doubled = max_sensitivity(method, images, target, radius=0.2, samples=20, seed=3)
    torch.testing.assert_close(doubled, 2 * found, rtol=1e-4, atol=0)
    for name in ("radius", "samples"):
        with pytest.raises(SettingError, match=f"`{name}` is 0"):
            max_sensitivity(method, images, target, **{name: 0})


def test_max_sensitivity_of_a_single_image_gives_every_copy_its_class(network):
    images, target = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 3])
    # It explains one image at a time, each with its own class.
    method = random_channels(network, edit=pg.Edit(layers="all"), quantile=0.3)
    both = max_sensitivity(method, images, target, samples=3)
    alone = [max_sensitivity(method, images[row : row + 1], target[row : row + 1], samples=3) for row in range(2)]
    torch.testing.assert_close(torch.cat(alone), both)


def test_a_map_that_vanishes_for_another_class_is_as_different_as_an_unrelated_one():
    images, target, varied = torch.zeros(3, 1, 4, 4), torch.zeros(3, dtype=torch.long), torch.rand(3, 4, 4)
    void = torch.zeros(3, 4, 4)
    varied[2, 0, 0] = math.nan
    values = class_similarity(lambda _, classes: void, images, target, varied, classes=2)
    assert values[:2].tolist() == [0, 0]
    assert values[2].isnan()
    assert class_similarity(lambda _, classes: varied, images, target, void, classes=2).isnan().all()


def test_class_similarity_compares_with_one_other_class_for_all_images():
    maps = torch.rand(5, 6, 7)
    images, target = torch.zeros(3, 1, 6, 7), torch.tensor([0, 4, 2])
    found = {}
    for seed in range(20):
        values = class_similarity(lambda _, classes: maps[classes], images, target, maps[target], classes=5, seed=seed)
        by_step = [
            [stats.spearmanr(maps[k].flatten(), maps[(k + step) % 5].flatten()).statistic for k in target.tolist()]
            for step in range(5)
        ]
        fitting = [step for step in range(5) if np.allclose(values, by_step[step])]
        assert len(fitting) == 1
        found[fitting[0]] = values
    # Every other class, but never the same one.
    assert set(found) == {1, 2, 3, 4}
    with pytest.raises(SettingError, match="classes"):
        class_similarity(lambda images, target: images[:, 0], images, target, maps[target], classes=1)


def test_max_sensitivity_agrees_with_a_loop_over_the_same_noise():
    images, target = torch.rand(2, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1])

    def method(images, target):
        return images[:, 0] ** 2 + target.reshape(-1, 1, 1)

    found = max_sensitivity(method, images, target, radius=0.1, samples=3, seed=4)
    generator = torch.Generator().manual_seed(4)
    noise = [0.1 * (2 * torch.rand(1, 1, 4, 4, generator=generator, dtype=torch.float64) - 1) for _ in range(3)]
    for row in range(2):
        clean = method(images[row : row + 1], target[row : row + 1])
        changes = [method(images[row : row + 1] + each, target[row : row + 1]) - clean for each in noise]
        assert found[row].item() == pytest.approx(max(float(each.norm() / clean.norm()) for each in changes))
