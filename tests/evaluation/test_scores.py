import math

import pytest
import torch

import parchgrad as pg
from parchgrad.errors import SettingError
from parchgrad.evaluation import localisation, perturbation
from parchgrad.evaluation.methods import maps_of
from parchgrad.evaluation.sanity import class_similarity, max_sensitivity, parameter_randomisation
from parchgrad.evaluation.scores import FAMILIES, SCORES, ScoreSettings, at_ratio, score_maps
from parchgrad.evaluation.stability import stability


def gradient_of(model):
    return maps_of(pg.Explainer(model, None))


@pytest.fixture
def scored(network):
    images, target = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2])
    method = gradient_of(network)
    heat = method(images, target)
    region = torch.rand(8, 8) > 0.5
    settings = ScoreSettings(
        families=FAMILIES,
        ratios=(0.25, 0.75),
        replacement="mean",
        steps=3,
        tolerance=28,
        samples=2,
        randomised=(0.25, 0.75),
        draws=2,
        noises=(0.25, 0.75),
        noise_draws=3,
        seed=5,
    )
    regions = [region, None, ~region]
    found = score_maps(network, method, images, target, heat, regions, settings, make_method=gradient_of)
    return network, method, images, target, heat, region, found


def test_every_score_is_there_by_its_name(scored):
    *_, found = scored
    by_ratio = {at_ratio(name, ratio) for name, score in SCORES.items() if score.by_ratio for ratio in (0.25, 0.75)}
    assert set(found) == {*SCORES, *by_ratio}
    assert all(values.shape == (3,) and values.dtype == torch.float64 for values in found.values())


def test_scores_are_what_their_functions_say(scored):
    network, method, images, target, heat, region, found = scored
    morf, lerf = (
        perturbation.respond(network, images, target, heat, order=order, ratios=(0.25, 0.75), replacement="mean")
        for order in ("morf", "lerf")
    )
    drop = perturbation.probability_drop(morf) - perturbation.probability_drop(lerf)
    torch.testing.assert_close(found["aopc"], drop.mean(1))
    torch.testing.assert_close(found["aopc@0.75"], drop[:, 1])
    torch.testing.assert_close(found["log_odds_lerf@0.25"], perturbation.log_odds(lerf)[:, 0])
    torch.testing.assert_close(found["accuracy_morf"], perturbation.accuracy(morf).mean(1))
    torch.testing.assert_close(found["fractional_difference_lerf"], perturbation.fractional_difference(lerf).mean(1))
    torch.testing.assert_close(found["insertion"], perturbation.insertion(network, images, target, heat, steps=3))
    torch.testing.assert_close(found["deletion"], perturbation.deletion(network, images, target, heat, steps=3))
    for replacement in ("zero", "blur"):
        options = {"ratios": (0, 1 / 3, 2 / 3, 1), "replacement": replacement, "seed": 5}
        kept, lost = (
            perturbation.respond(network, images, target, heat, order=order, **options) for order in ("lerf", "morf")
        )
        gain = perturbation.area_under_curve(kept) - perturbation.area_under_curve(lost)
        torch.testing.assert_close(found[f"srg_{replacement}"], gain)
    regions = torch.stack((region, region, ~region))
    for name, expected in (
        ("mass_inside", localisation.mass_inside(heat, regions)),
        ("weighted_mass_inside", localisation.weighted_mass_inside(heat, regions)),
        # The tolerance is given for 224 pixels; these images have 8.
        ("pointing_game", localisation.pointing_game(heat, regions, tolerance=1)),
    ):
        expected[1] = math.nan
        torch.testing.assert_close(found[name], expected, equal_nan=True)
    covered = region.sum().item() / 64
    assert found["region_share"].tolist() == pytest.approx([covered, math.nan, 1 - covered], nan_ok=True)
    torch.testing.assert_close(found["max_sensitivity"], max_sensitivity(method, images, target, samples=2, seed=5))
    # The first and the third of four modules.
    steps = parameter_randomisation(network, gradient_of, images, target, seeds=(5, 6))
    first, third = ((steps[place].spearman + steps[place + 4].spearman) / 2 for place in (0, 2))
    torch.testing.assert_close(found["randomisation_spearman@0.75"], third)
    torch.testing.assert_close(found["randomisation_spearman"], (first + third) / 2)
    alike = (steps[0].structural_similarity + steps[4].structural_similarity) / 2
    torch.testing.assert_close(found["randomisation_similarity@0.25"], alike)
    classes = network(images).shape[1]
    alike = class_similarity(method, images, target, heat, classes=classes, seed=5)
    torch.testing.assert_close(found["class_similarity"], alike)
    steady = stability(method, images, target, noises=(0.25, 0.75), draws=3, seed=5)
    for name in ("cosine", "spearman", "norm_ratio"):
        values = getattr(steady, name)
        torch.testing.assert_close(found[f"stability_{name}"], (values[0] + values[1]) / 2)
        torch.testing.assert_close(found[f"stability_{name}@0.75"], values[1])


def test_only_the_families_asked_for_are_had(network):
    images, target, heat = torch.randn(1, 3, 8, 8).double(), torch.tensor([0]), torch.rand(1, 8, 8)
    found = score_maps(network, lambda *_: heat, images, target, heat, [None], ScoreSettings(families=("sparsity",)))
    assert list(found) == ["gini"]
    with pytest.raises(SettingError, match="`families` contains 'faithfulness'"):
        ScoreSettings(families=("faithfulness",))
    with pytest.raises(SettingError, match="internal_batch_size` is 0"):
        ScoreSettings(internal_batch_size=0)
    for name, value in (
        ("draws", 0),
        ("steps", 0),
        ("samples", 0),
        ("ratios", (2.0,)),
        ("ratios", ()),
        ("randomised", (0.0,)),
        ("noises", ()),
        ("noises", (0.0,)),
        ("noises", (math.inf,)),
        ("noise_draws", 0),
        ("tolerance", -1),
        ("radius", 0),
        ("order", "sideways"),
        ("replacement", "nothing"),
    ):
        with pytest.raises(SettingError, match=name):
            ScoreSettings(**{name: value})
    with pytest.raises(SettingError, match="`make_method` is None"):
        score_maps(
            network, gradient_of(network), images, target, heat, [None], ScoreSettings(families=("randomisation",))
        )
