import matplotlib
import matplotlib.pyplot
import numpy as np
import pytest
import torch
from PIL import Image

from parchgrad.errors import InputError, OutputError, SettingError
from parchgrad.visual import (
    blend,
    blend_signed,
    normalise,
    overlay,
    paint,
    panel,
    relative,
    save_figure,
    shared_top,
    signed_panel,
    tint,
    tint_signed,
)


def test_normalise_clips_at_the_percentile():
    heat = np.arange(101.0).reshape(1, 101)
    found = normalise(heat, percentile=80)
    np.testing.assert_allclose(found[0, :81], np.arange(81) / 80)
    assert (found[0, 81:] == 1).all()
    assert np.array_equal(normalise(np.zeros((3, 3))), np.zeros((3, 3)))
    # One bright pixel in a thousand: the percentile is zero, the pixel is still shown.
    lonely = np.zeros((40, 50))
    lonely[3, 4] = 7
    assert normalise(lonely)[3, 4] == 1


def test_blend_is_the_grey_photograph_under_the_colour_map():
    photograph = np.zeros((2, 2, 3))
    photograph[0] = [0.2, 0.4, 0.6]
    heat = np.array([[0.0, 4.0], [0.0, 4.0]])
    found = blend(photograph, heat)
    grey = 0.2126 * 0.2 + 0.7152 * 0.4 + 0.0722 * 0.6
    silent = 0.65 * grey + 0.35 * np.array(matplotlib.colormaps["inferno"](0.0)[:3])
    np.testing.assert_allclose(found[0, 0], silent)
    np.testing.assert_allclose(found[:, 1], np.tile(matplotlib.colormaps["inferno"](1.0)[:3], (2, 1)))


def test_panel_lays_out_rows_and_columns_with_one_colour_bar(tmp_path):
    photographs = [np.full((8, 6, 3), 0.5), np.zeros((8, 6, 3))]
    heats = [np.ones((8, 6)), np.eye(8, 6)]
    figure = panel(photographs, {"gradient": heats, "ParchGrad": heats}, labels=["cat", "dog"])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["cat", "gradient", "ParchGrad", "dog", "gradient", "ParchGrad", ""]
    np.testing.assert_allclose(figure.axes[5].images[0].get_array(), blend(photographs[1], heats[1]))
    assert matplotlib.pyplot.get_fignums() == []
    for name in ("a.png", "a.jpg", "a.pdf"):
        save_figure(figure, tmp_path / name)
    with Image.open(tmp_path / "a.png") as saved:
        pixels = np.asarray(saved.convert("L"))
        assert pixels.std() > 10
        # No title touches the edge.
        assert (pixels[:4] > 250).all()
    save_figure(figure, tmp_path / "a.png")
    for name in ("a.xyz", "a"):
        with pytest.raises(OutputError, match=r"image suffix.*\.png"):
            save_figure(figure, tmp_path / name)


@pytest.mark.parametrize("title", ["ParchGrad", "integrated gradients\n+ ParchGrad"])
def test_a_figure_that_is_saved_by_itself_has_whole_titles(tmp_path, title):
    figure = panel([np.zeros((224, 224, 3))], {"gradient": [np.eye(224)], title: [np.eye(224)]})
    figure.savefig(tmp_path / "own.png")
    with Image.open(tmp_path / "own.png") as saved:
        assert (np.asarray(saved.convert("L"))[:2] > 250).all()


def test_tensors_are_maps_too():
    heat = torch.eye(4, requires_grad=True)
    np.testing.assert_allclose(blend(torch.zeros(4, 4, 3), heat), blend(np.zeros((4, 4, 3)), np.eye(4)))


def test_overlay_has_a_colour_bar():
    figure = overlay(np.zeros((4, 4, 3)), np.eye(4), title="cat")
    assert [axes.get_title() for axes in figure.axes] == ["cat", ""]
    assert "percentile" in figure.axes[1].get_xlabel()


@pytest.mark.parametrize("heat", [-np.ones((2, 2)), np.full((2, 2), np.nan), np.ones((1, 2, 2))])
def test_maps_that_cannot_be_shown(heat):
    with pytest.raises(InputError):
        normalise(heat)


def test_rows_of_a_panel_are_as_high_as_their_pictures():
    wide, square = np.zeros((20, 40, 3)), np.zeros((20, 20, 3))
    figure = panel([wide, wide, square], {"gradient": [np.eye(20, 40), np.eye(20, 40), np.eye(20)]})
    figure.draw_without_rendering()
    first, second, third = (figure.axes[number].get_window_extent() for number in (0, 2, 4))
    assert first.width / first.height == pytest.approx(2, rel=0.02)
    # Between rows there is a title's room, not that of a square.
    assert first.y0 - second.y1 < 0.3 * first.height
    assert second.y0 - third.y1 < 0.3 * first.height


def test_pictures_that_do_not_match():
    with pytest.raises(InputError, match=r"`photograph` has shape \(4, 4, 3\), .* \(5, 4\)"):
        blend(np.zeros((4, 4, 3)), np.zeros((5, 4)))
    with pytest.raises(InputError, match="`photograph` ranges from 0 to 255"):
        blend(np.full((4, 4, 3), 255) * np.eye(4)[..., None], np.zeros((4, 4)))
    with pytest.raises(SettingError, match="`percentile` is 150"):
        normalise(np.ones((2, 2)), percentile=150)
    with pytest.raises(InputError, match="`photographs` is empty"):
        panel([], {})
    with pytest.raises(InputError, match="`labels`"):
        panel([np.zeros((4, 4, 3))], {}, labels=["a", "b"])
    with pytest.raises(InputError, match="has 1 maps for 2 photographs"):
        panel([np.zeros((4, 4, 3))] * 2, {"gradient": [np.zeros((4, 4))]})


def test_maps_of_half_precision_are_drawn_as_any_others():
    heat = torch.rand(6, 6)
    for dtype in (torch.bfloat16, torch.float16):
        np.testing.assert_allclose(normalise(heat.to(dtype)), normalise(heat.to(dtype).double()))


def test_one_scale_serves_maps_of_any_unit():
    generator = np.random.default_rng(0)
    spread, sharp = generator.uniform(size=(20, 30)), generator.uniform(size=(20, 30)) ** 8
    multiples = [heat / heat.mean() for heat in (spread, sharp)]
    tops = sorted(np.percentile(values, 99.5) for values in multiples)
    top = shared_top([spread, 1e-30 * sharp])
    assert top == pytest.approx(0.1 * tops[0] + 0.9 * tops[1])
    # One concentrated map among eleven clips; an empty map does not count.
    assert shared_top([*[spread] * 10, sharp, 0 * sharp]) == pytest.approx(tops[0])
    assert shared_top([0 * sharp]) == 1
    photograph = generator.uniform(size=(20, 30, 3))
    for unit in (1, 1e-30, 1e30):
        found = blend(photograph, unit * sharp, top=top)
        np.testing.assert_allclose(found, paint(photograph, np.clip(multiples[1] / top, 0, 1)), atol=1e-9)


def test_a_signed_map_is_red_for_and_blue_against_the_class():
    photograph = np.full((1, 3, 3), 0.4)
    found = blend_signed(photograph, [[3.0, -3.0, 0.0]], top=1.5)
    red, blue = (np.array(matplotlib.colormaps["RdBu_r"](end)[:3]) for end in (1.0, 0.0))
    np.testing.assert_allclose(found[0, :2], [red, blue])
    np.testing.assert_allclose(found[0, 2], 0.65 * 0.4 + 0.35 * np.array(matplotlib.colormaps["RdBu_r"](0.5)[:3]))
    # Half way: a magnitude of half the scale.
    half = blend_signed(photograph, [[1.0, -3.0, 2.0]], top=1.0)[0, 0]
    weight = 0.35 + 0.65 * np.sqrt(0.5)
    np.testing.assert_allclose(half, (1 - weight) * 0.4 + weight * np.array(matplotlib.colormaps["RdBu_r"](0.75)[:3]))


def test_opacity_goes_from_the_photograph_to_the_map():
    photograph = np.zeros((1, 2, 3))
    photograph[...] = [0.2, 0.4, 0.6]
    heat = np.array([[0.0, 1.0]])
    np.testing.assert_allclose(blend(photograph, heat, opacity=0), photograph)
    grey = 0.2126 * 0.2 + 0.7152 * 0.4 + 0.0722 * 0.6
    bright = np.array(matplotlib.colormaps["inferno"](1.0)[:3])
    half = 0.5 * (0.5 * grey + 0.5 * photograph[0, 1]) + 0.5 * bright
    np.testing.assert_allclose(blend(photograph, heat, opacity=0.5)[0, 1], half)
    with pytest.raises(SettingError, match=r"`opacity` is 1.5"):
        blend(photograph, heat, opacity=1.5)


def test_maps_of_a_panel_share_one_scale():
    generator = np.random.default_rng(1)
    photographs = [generator.uniform(size=(12, 12, 3)) for _ in range(2)]
    signed = {name: [generator.normal(size=(12, 12)) for _ in range(2)] for name in ("gradient", "ParchGrad")}
    heats = {name: [abs(values) for values in column] for name, column in signed.items()}
    for draw, blended, maps, ends in (
        (panel, blend, heats, 0),
        (signed_panel, blend_signed, signed, -1),
    ):
        figure = draw(photographs, maps)
        top = shared_top([*maps["gradient"], *maps["ParchGrad"]])
        bar = figure.axes[-1]
        assert bar.get_xlim() == pytest.approx((ends * top, top))
        assert "mean" in bar.get_xlabel()
        shown = np.asarray(figure.axes[5].images[0].get_array())
        np.testing.assert_allclose(shown, blended(photographs[1], maps["ParchGrad"][1], top=top), atol=1e-12)


@pytest.mark.parametrize("top", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_ends_at_a_positive_number(top):
    with pytest.raises(SettingError, match="`top` is"):
        blend(np.zeros((2, 2, 3)), np.eye(2), top=top)


def test_values_that_cannot_be_painted():
    with pytest.raises(InputError, match="`values`"):
        paint(np.zeros((2, 2, 3)), 2 * np.eye(2))
    with pytest.raises(InputError, match="NaN or infinite"):
        relative([[np.inf, 1.0]])
    with pytest.raises(InputError, match=r"shape \(2,\)"):
        relative([1.0, 2.0])


def test_a_tinted_map_laid_over_the_grey_photograph_is_the_blended_one():
    generator = np.random.default_rng(3)
    photograph, signed = generator.random((6, 7, 3)), generator.normal(size=(6, 7))
    for opacity in (0.0, 0.3, 1.0):
        for draw, colour, values in ((blend, tint, np.abs(signed)), (blend_signed, tint_signed, signed)):
            found = colour(values, top=2.5)
            grey = photograph @ [0.2126, 0.7152, 0.0722]
            below = opacity * grey[..., None] + (1 - opacity) * photograph
            # Pillow's and a browser's way of laying one picture over another.
            over = below + opacity * found[..., 3:] * (found[..., :3] - below)
            np.testing.assert_allclose(draw(photograph, values, top=2.5, opacity=opacity), over, atol=1e-12)


def test_rows_of_wide_photographs_stand_as_close_as_those_of_square_ones():
    heights = {}
    for width in (4, 8):
        figure = panel([np.ones((4, width, 3))] * 2, {"gradient": [np.ones((4, width))] * 2})
        figure.canvas.draw()
        first, second = (figure.axes[row * 2].get_window_extent() for row in range(2))
        heights[width] = (first.y0 - second.y1) / figure.dpi
    assert heights[8] == pytest.approx(heights[4], abs=0.2)


def test_photographs_may_be_rounded_and_must_be_numbers():
    picture = np.random.default_rng(0).random((4, 5, 3))
    picture[0, 0], picture[3, 4] = 1, 0
    rounded = picture.copy()
    rounded[0, 0], rounded[3, 4] = 1 + 1e-7, -1e-7
    heat = np.random.default_rng(1).random((4, 5))
    assert np.array_equal(blend(rounded, heat), blend(picture, heat))
    for value in (np.nan, np.inf):
        rounded[0, 0] = value
        with pytest.raises(InputError, match="`photograph` contains NaN or infinite values"):
            blend(rounded, heat)
    rounded[0, 0] = 1.01
    with pytest.raises(InputError, match=r"`photograph` ranges from -1e-07 to 1\.01"):
        blend(rounded, heat)
