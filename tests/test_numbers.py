"""Numbers at the edge: tiny, huge, negative, constant, wide, narrow, and none at all."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import parchgrad as pg
from parchgrad import visual
from parchgrad.data.images import read_image, to_rgb
from parchgrad.data.preprocessing import Preprocessing
from parchgrad.data.shapes import GeneratedShapes
from parchgrad.errors import ImageError, InputError
from parchgrad.evaluation import localisation
from parchgrad.evaluation.methods import maps_of
from parchgrad.evaluation.scores import FAMILIES, ScoreSettings, score_maps
from parchgrad.evaluation.sparsity import gini
from parchgrad.models.classifier import Classifier
from parchgrad.statistics.selectors import registered_selectors
from tests.support import cli, random_statistics, small_network

INPUTS = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
TARGETS = torch.tensor([0, 2, 4])
STATISTICS = random_statistics({"0": 6, "2": 6})
SELECTORS = {name: found.make(quantile=0.4, statistics=STATISTICS) for name, found in registered_selectors().items()}
SELECTORS["hard"] = pg.GradientEnergy(quantile=0.4, softness=0)
SETTINGS = [{}, {"conserve": "independent"}, {"conserve": "exact"}, {"gamma": 2.0}]
BROKEN = [math.nan, math.inf, -math.inf]
PHOTOGRAPH = np.full((8, 8, 3), 0.5)
HEAT = np.random.default_rng(0).random((8, 8))

every_selector = pytest.mark.parametrize("selector", SELECTORS.values(), ids=SELECTORS)


def explain(model, selector, inputs=INPUTS, targets=TARGETS, **settings):
    return pg.Explainer(model, selector, layers="all", **settings).attribute(inputs, targets)


def scaled(factor, dtype):
    """The small network, with its logits times a factor."""
    model = small_network(dtype=dtype)
    model[-1].weight.data *= factor
    model[-1].bias.data *= factor
    return model


def with_one(values, value):
    broken = np.array(values, dtype=np.float64)
    broken[(2, 3, 1)[: broken.ndim]] = value
    return broken


# Tiny and huge.


@every_selector
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("method", ["gradient", "integrated_gradients"])
@pytest.mark.parametrize("exponent", [-100, 100])
def test_gradients_of_any_magnitude_are_edited_alike(selector, settings, method, exponent):
    # 2 to the power of -100 is 8e-31: its square is beyond single precision.
    if method == "integrated_gradients":
        settings = {**settings, "method": method, "n_steps": 3}
    inputs = INPUTS.float()
    expected = explain(scaled(1, torch.float32), selector, inputs, **settings)
    found = explain(scaled(2.0**exponent, torch.float32), selector, inputs, **settings)
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(found * 2.0**-exponent, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("unit", [1e-30, 1e-300, 1e-310, 1e30, 1e307])
def test_maps_of_any_magnitude_are_drawn_and_scored_alike(unit):
    for scale in (visual.normalise, visual.relative):
        np.testing.assert_allclose(scale(unit * HEAT), scale(HEAT), rtol=0, atol=1e-10)
    for draw in (
        lambda heat: visual.blend(PHOTOGRAPH, heat),
        lambda heat: visual.blend_signed(PHOTOGRAPH, -heat),
        lambda heat: visual.tint(heat, top=2.0),
    ):
        # Rounding may decide between two of the colour map's 256 levels.
        np.testing.assert_allclose(draw(unit * HEAT), draw(HEAT), rtol=0, atol=0.02)
    heat, region = torch.from_numpy(HEAT)[None], torch.arange(64).reshape(1, 8, 8) % 5 < 2
    for score in (
        lambda maps: localisation.mass_inside(maps, region),
        lambda maps: localisation.pointing_game(maps, region, tolerance=0),
        lambda maps: localisation.cell_shares(maps, rows=2, columns=4),
        gini,
    ):
        torch.testing.assert_close(score(unit * heat), score(heat), rtol=1e-10, atol=1e-12)
    inside = HEAT[region[0].numpy()].sum() / HEAT.sum()
    np.testing.assert_allclose(localisation.mass_inside(heat, region), inside)


# Negative.


@pytest.mark.parametrize("settings", [*SETTINGS, {"gamma": 0.5, "conserve": "exact"}], ids=str)
def test_a_class_that_everything_speaks_against(settings):
    """All weights are positive but the last: each pixel speaks against the class, as much as its mirror for it."""
    model = small_network()
    for parameter in model.parameters():
        parameter.data.abs_()
    model[0].bias.data.zero_()
    speaks_for = explain(model, SELECTORS["energy"], INPUTS.abs(), **settings)
    model[-1].weight.data.neg_()
    against = explain(model, SELECTORS["energy"], INPUTS.abs(), **settings)
    assert (against < 0).all()
    torch.testing.assert_close(against, -speaks_for, rtol=1e-12, atol=0)
    torch.testing.assert_close(pg.heatmap(against), -against.mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(pg.signed_heatmap(against), against.mean(1), rtol=1e-12, atol=0)


def test_a_negative_map_is_blue_all_over_and_no_heat_map():
    drawn = visual.blend_signed(PHOTOGRAPH, -HEAT - 1)
    assert (drawn[..., 2] > drawn[..., 0] + 0.05).all()
    mirrored = visual.blend_signed(PHOTOGRAPH, HEAT + 1)
    assert (mirrored[..., 0] > mirrored[..., 2] + 0.05).all()
    assert visual.shared_top([-HEAT]) == visual.shared_top([HEAT])
    figure = visual.signed_panel([PHOTOGRAPH], {"against": [-HEAT]})
    np.testing.assert_array_equal(figure.axes[1].images[0].get_array(), visual.blend_signed(PHOTOGRAPH, -HEAT))
    negative, region = -torch.from_numpy(HEAT)[None], torch.ones(1, 8, 8, dtype=torch.bool)
    for needs_magnitudes in (
        lambda: visual.normalise(-HEAT),
        lambda: visual.overlay(PHOTOGRAPH, -HEAT),
        lambda: localisation.mass_inside(negative, region),
        lambda: localisation.weighted_mass_inside(negative, region),
        lambda: localisation.pointing_game(negative, region),
        lambda: localisation.cell_shares(negative, rows=2, columns=2),
        lambda: gini(negative),
    ):
        with pytest.raises(InputError, match=r"negative.*heatmap\(\)"):
            needs_magnitudes()


# Constant.


@every_selector
@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_constant_images(selector, value):
    model, inputs = small_network(), torch.full_like(INPUTS, value)
    gradient = explain(model, selector, inputs)
    assert gradient.isfinite().all()
    # The noise of SmoothGrad is a share of the image's range.
    torch.testing.assert_close(
        explain(model, selector, inputs, method="smoothgrad", samples=2), gradient, rtol=1e-12, atol=1e-15
    )
    torch.testing.assert_close(
        explain(model, selector, inputs, method="input_x_gradient"), value * gradient, rtol=1e-12, atol=1e-15
    )
    if value == 0:
        assert not explain(model, selector, inputs, method="integrated_gradients", n_steps=3).any()


def test_images_that_are_all_the_same_tell_no_channel_from_another():
    model = small_network()
    statistics = pg.collect_statistics(model, [(torch.full((3, 8, 8), 0.5).double(), n % 5) for n in range(10)])
    for name in ("0", "2"):
        assert (statistics[name].class_log_p() == 0).all()
        assert (statistics[name].shapiro_p == 1).all()
    # The gate lets no channel through, so that every layer is left as it is.
    found = explain(model, pg.ClassWise(statistics, quantile=0.4), gates=0, antialias=False)
    torch.testing.assert_close(found, explain(model, None), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("colour", ["black", "white"])
def test_a_photograph_of_one_colour(capsys, tmp_path, colour):
    path, out = tmp_path / "plain.png", tmp_path / "out"
    Image.new("RGB", (80, 60), colour).save(path)
    code, _, errors = cli(capsys, "explain", path, "--model", "shapes", "--out", out)
    assert (code, errors) == (0, "")
    assert np.isfinite(np.load(out / "plain.npy")).all()
    assert json.loads((out / "plain.json").read_text())["target"]


def test_a_dead_network_has_an_empty_map_which_is_drawn_silent_and_not_scored():
    model = small_network()
    model[0].bias.data -= 1e3
    model[2].bias.data -= 1e3
    for selector in (None, *SELECTORS.values()):
        assert not explain(model, selector).any()
    silent = visual.blend(PHOTOGRAPH, np.zeros((8, 8)))
    assert (silent == silent[0, 0]).all()
    assert np.isfinite(silent).all()
    assert visual.shared_top([np.zeros((8, 8))]) == 1
    method = maps_of(pg.Explainer(model, SELECTORS["energy"], layers="all"))
    heat = method(INPUTS, TARGETS)
    regions = [torch.arange(64).reshape(8, 8) % 2 == 0] * 3
    found = score_maps(model, method, INPUTS, TARGETS, heat, regions, ScoreSettings(families=FAMILIES[:5]))
    assert (found.pop("region_share") == 0.5).all()
    assert all(values.isnan().all() for values in found.values())


# Wide and narrow.


@pytest.fixture(scope="module")
def shapes():
    drawn = GeneratedShapes(count=6, seed=2)
    return pg.load_model("shapes").model, torch.stack([drawn[index].image for index in range(6)])


def angles(found, expected):
    """Cosine of each row with what it should be."""
    return nn.functional.cosine_similarity(found.double().flatten(1), expected.double().flatten(1))


@pytest.mark.parametrize("selector", [None, pg.GradientEnergy(quantile=0.2), pg.Evidence()], ids=str)
def test_double_single_and_bfloat16_autocast_agree(shapes, selector):
    model, inputs = shapes
    targets = torch.arange(6) % 4
    single = pg.Explainer(model, selector).attribute(inputs, targets)
    with torch.autocast("cpu", torch.bfloat16):
        brain = pg.Explainer(model, selector).attribute(inputs, targets)
    double = pg.Explainer(model.double(), selector).attribute(inputs.double(), targets)
    model.float()
    assert (single.dtype, brain.dtype, double.dtype) == (torch.float32, torch.float32, torch.float64)
    assert pg.heatmap(double).dtype == torch.float64
    assert (angles(single, double) > 1 - 1e-9).all()
    assert ((single - double).abs().amax((1, 2, 3)) < 1e-5 * double.abs().amax((1, 2, 3))).all()
    # Eight bits of mantissa leave the plain gradient itself about as far off.
    assert (angles(brain, single) > 0.95).all()
    norms = brain.flatten(1).norm(dim=1) / single.flatten(1).norm(dim=1)
    assert ((norms - 1).abs() < 0.1).all()


# No numbers.

DRAWN = {
    "normalise": lambda heat, _: visual.normalise(heat),
    "normalise to a top": lambda heat, _: visual.normalise(heat, top=2.0),
    "relative": lambda heat, _: visual.relative(heat),
    "smooth": lambda heat, _: visual.smooth(heat, 1.0),
    "shared_top": lambda heat, _: visual.shared_top([HEAT, heat]),
    "tint": lambda heat, _: visual.tint(heat),
    "tint_signed": lambda heat, _: visual.tint_signed(heat, top=2.0),
    "blend": lambda heat, photograph: visual.blend(photograph, heat),
    "blend at opacity 0": lambda heat, photograph: visual.blend(photograph, heat, opacity=0),
    "blend_signed": lambda heat, photograph: visual.blend_signed(photograph, heat),
    "paint": lambda heat, photograph: visual.paint(photograph, heat),
    "overlay": lambda heat, photograph: visual.overlay(photograph, heat),
    "panel": lambda heat, photograph: visual.panel([photograph], {"a": [heat]}),
    "signed_panel": lambda heat, photograph: visual.signed_panel([photograph], {"a": [heat]}),
    "strip": lambda heat, photograph: visual.strip(photograph, {"a": heat}),
    "volume_figure": lambda heat, _: visual.volume_figure(np.asarray(heat)[None], HEAT[None]),
    "clip_figure": lambda heat, photograph: visual.clip_figure(np.asarray(heat)[None], photograph[None]),
    "signal_figure": lambda heat, _: visual.signal_figure(np.asarray(heat).ravel(), HEAT.ravel()),
}


def test_all_that_draws_maps_is_tried():
    assert {name.split()[0] for name in DRAWN} == {*visual.__all__} - {"check_colormap", "draw_box", "save_figure"}


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("kind", DRAWN)
def test_what_is_no_number_is_never_painted(kind, value):
    draw = DRAWN[kind]
    draw(HEAT, PHOTOGRAPH)
    with pytest.raises(InputError, match="NaN or infinite values"):
        draw(with_one(HEAT, value), PHOTOGRAPH)
    with pytest.raises(InputError, match="NaN or infinite values"):
        # What heatmap() is given it gives on, so that the picture says so.
        draw(pg.heatmap(torch.from_numpy(with_one(HEAT, value))[None, None])[0], PHOTOGRAPH)
    if kind.startswith(("blend", "paint", "overlay", "panel", "signed_panel", "strip", "clip_figure")):
        with pytest.raises(InputError, match=r"`(image|frames)` contains NaN or infinite values"):
            draw(HEAT, with_one(PHOTOGRAPH, value))


@pytest.mark.parametrize("value", BROKEN)
def test_photographs_without_maps_are_checked_too(value):
    for draw in (visual.panel, visual.signed_panel):
        with pytest.raises(InputError, match="`image` contains NaN or infinite values"):
            draw([with_one(PHOTOGRAPH, value)], {})
    with pytest.raises(InputError, match="`image` contains NaN or infinite values"):
        visual.strip(with_one(PHOTOGRAPH, value), {})
    with pytest.raises(InputError, match=r"`image` has shape \(4, 8, 8\)"):
        visual.strip(np.ones((4, 8, 8)), {})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_maps_that_are_no_numbers_have_no_score_and_spoil_no_other(value):
    model = small_network()
    regions = [torch.arange(64).reshape(8, 8) % 3 == 0] * 3
    settings = ScoreSettings(families=FAMILIES, steps=3, samples=2, ratios=(0.25,), randomised=(1.0,))

    def spoilt(network):
        whole = maps_of(pg.Explainer(network, None))

        def method(images, target):
            heat = whole(images, target)
            # The second image is known by its corner, which noise leaves negative.
            heat[images[:, 0, 0, 0] < -50, 2, 3] = value
            return heat

        return method

    images = INPUTS.clone()
    images[1, 0, 0, 0] = -100
    heat = spoilt(model)(images, TARGETS)
    assert heat.isfinite().flatten(1).all(1).tolist() == [True, False, True]
    found = score_maps(model, spoilt(model), images, TARGETS, heat, regions, settings, make_method=spoilt)
    found.pop("region_share")
    for name, values in found.items():
        assert values.isnan().tolist() == [False, True, False], name
    shares = localisation.cell_shares(heat, rows=2, columns=2)
    assert shares.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("value", BROKEN)
def test_photographs_that_hold_no_numbers_are_refused(capsys, tmp_path, value):
    values = with_one(HEAT, value).astype(np.float32)
    with pytest.raises(ImageError, match=r"^The image contains NaN or infinite values"):
        to_rgb(Image.fromarray(values))
    path = tmp_path / "measured.tif"
    Image.fromarray(values).save(path)
    with pytest.raises(
        ImageError,
        match=r"measured\.tif.*NaN or infinite values",
    ):
        read_image(path)
    code, printed, errors = cli(capsys, "explain", path, "--model", "shapes", "--out", tmp_path / "out")
    assert (code, printed) == (2, "")
    assert "measured.tif" in errors
    assert "NaN or infinite values" in errors
    assert not (tmp_path / "out").exists()


class Division(nn.Module):
    """Finite on the way there, and not on the way back."""

    def forward(self, x):
        return x + (x * 0).sqrt()


@pytest.mark.parametrize("where", ["weights", "gradient"])
def test_no_file_is_written_of_a_network_whose_maps_are_no_numbers(capsys, tmp_path, monkeypatch, where):
    model = small_network(dtype=torch.float32)
    if where == "weights":
        model[2].weight.data[0, 0, 0, 0] = math.nan
    else:
        model.insert(3, Division())

    def shrink(image):
        return torch.from_numpy(np.asarray(image.resize((8, 8)), dtype=np.float32) / 255).permute(2, 0, 1)

    classifier = Classifier(model.eval(), Preprocessing(shrink, (0.0,) * 3, (1.0,) * 3), tuple("abcde"), "tiny")
    monkeypatch.setattr("parchgrad.models.own_networks.load_model", lambda name, **options: classifier)
    path = tmp_path / "photograph.png"
    Image.fromarray((255 * PHOTOGRAPH).astype(np.uint8)).save(path)
    code, printed, errors = cli(capsys, "explain", path, "--out", tmp_path / "out")
    assert (code, printed) == (2, "")
    assert "NaN or infinite values" in errors
    assert "layer '2'" in errors or "layer '3' (Division)" in errors
    assert not (tmp_path / "out").exists()
