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
    check_colormap,
    normalise,
    overlay,
    paint,
    panel,
    relative,
    save_figure,
    shared_top,
    signed_panel,
    smooth,
    strip,
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


def test_blend_is_the_grey_image_under_the_colour_map():
    image = np.zeros((2, 2, 3))
    image[0] = [0.2, 0.4, 0.6]
    heat = np.array([[0.0, 4.0], [0.0, 4.0]])
    found = blend(image, heat)
    grey = 0.2126 * 0.2 + 0.7152 * 0.4 + 0.0722 * 0.6
    silent = 0.65 * grey + 0.35 * np.array(matplotlib.colormaps["inferno"](0.0)[:3])
    np.testing.assert_allclose(found[0, 0], silent)
    np.testing.assert_allclose(found[:, 1], np.tile(matplotlib.colormaps["inferno"](1.0)[:3], (2, 1)))


def test_panel_lays_out_rows_and_columns_with_one_colour_bar(tmp_path):
    images = [np.full((8, 6, 3), 0.5), np.zeros((8, 6, 3))]
    heats = [np.ones((8, 6)), np.eye(8, 6)]
    figure = panel(images, {"gradient": heats, "ParchGrad": heats}, labels=["cat", "dog"])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["cat", "gradient", "ParchGrad", "dog", "gradient", "ParchGrad", ""]
    np.testing.assert_allclose(figure.axes[5].images[0].get_array(), blend(images[1], heats[1]))
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


def test_a_batch_of_one_map_is_that_map():
    image, heat = np.zeros((4, 4, 3)), np.eye(4)
    np.testing.assert_array_equal(blend(image, heat[None]), blend(image, heat))
    np.testing.assert_array_equal(blend_signed(image, -heat[None]), blend_signed(image, -heat))


def test_images_of_any_kind_are_the_same():
    levels = np.random.default_rng(5).integers(0, 256, size=(8, 6, 3), dtype=np.uint8)
    heat = np.random.default_rng(6).random((8, 6))
    expected = blend(levels / 255, heat)
    tensor = torch.from_numpy(levels)
    for image in (Image.fromarray(levels), levels, tensor, tensor.movedim(2, 0), tensor.movedim(2, 0) / 255):
        np.testing.assert_allclose(blend(image, heat), expected, atol=1e-7)
    grey = Image.fromarray(levels[..., 0])
    expected = blend(levels[..., 0] / 255, heat)
    for image in (grey, levels[None, ..., 0], levels[..., :1]):
        np.testing.assert_allclose(blend(image, heat), expected)


def test_tensors_are_maps_too():
    heat = torch.eye(4, requires_grad=True)
    np.testing.assert_allclose(blend(torch.zeros(4, 4, 3), heat), blend(np.zeros((4, 4, 3)), np.eye(4)))


def test_overlay_has_a_colour_bar():
    figure = overlay(np.zeros((4, 4, 3)), np.eye(4), title="cat")
    assert [axes.get_title() for axes in figure.axes] == ["cat", ""]
    assert "percentile" in figure.axes[1].get_xlabel()


@pytest.mark.parametrize("heat", [-np.ones((2, 2)), np.full((2, 2), np.nan), np.ones((2, 2, 2))])
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
    with pytest.raises(InputError, match=r"`image` has shape \(4, 4, 3\), .* \(5, 4\)"):
        blend(np.zeros((4, 4, 3)), np.zeros((5, 4)))
    with pytest.raises(InputError, match="`image` ranges from 0 to 255"):
        blend(np.full((4, 4, 3), 255) * np.eye(4)[..., None], np.zeros((4, 4)))
    with pytest.raises(SettingError, match="`percentile` is 150"):
        normalise(np.ones((2, 2)), percentile=150)
    with pytest.raises(InputError, match="`images` is empty"):
        panel([], {})
    with pytest.raises(InputError, match="`labels`"):
        panel([np.zeros((4, 4, 3))], {}, labels=["a", "b"])
    with pytest.raises(InputError, match="has 1 maps for 2 images"):
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
    image = generator.uniform(size=(20, 30, 3))
    for unit in (1, 1e-30, 1e30):
        found = blend(image, unit * sharp, top=top)
        np.testing.assert_allclose(found, paint(image, np.clip(multiples[1] / top, 0, 1)), atol=1e-9)


def test_a_signed_map_is_red_for_and_blue_against_the_class():
    image = np.full((1, 3, 3), 0.4)
    found = blend_signed(image, [[3.0, -3.0, 0.0]], top=1.5)
    red, blue = (np.array(matplotlib.colormaps["RdBu_r"](end)[:3]) for end in (1.0, 0.0))
    np.testing.assert_allclose(found[0, :2], [red, blue])
    np.testing.assert_allclose(found[0, 2], 0.65 * 0.4 + 0.35 * np.array(matplotlib.colormaps["RdBu_r"](0.5)[:3]))
    # Half way: a magnitude of half the scale.
    half = blend_signed(image, [[1.0, -3.0, 2.0]], top=1.0)[0, 0]
    weight = 0.35 + 0.65 * np.sqrt(0.5)
    np.testing.assert_allclose(half, (1 - weight) * 0.4 + weight * np.array(matplotlib.colormaps["RdBu_r"](0.75)[:3]))


def test_opacity_goes_from_the_image_to_the_map():
    image = np.zeros((1, 2, 3))
    image[...] = [0.2, 0.4, 0.6]
    heat = np.array([[0.0, 1.0]])
    np.testing.assert_allclose(blend(image, heat, opacity=0), image)
    grey = 0.2126 * 0.2 + 0.7152 * 0.4 + 0.0722 * 0.6
    bright = np.array(matplotlib.colormaps["inferno"](1.0)[:3])
    half = 0.5 * (0.5 * grey + 0.5 * image[0, 1]) + 0.5 * bright
    np.testing.assert_allclose(blend(image, heat, opacity=0.5)[0, 1], half)
    with pytest.raises(SettingError, match=r"`opacity` is 1.5"):
        blend(image, heat, opacity=1.5)


@pytest.mark.parametrize("sigma", [0.5, 1.5, 4.0])
def test_smoothing_is_a_gaussian_that_preserves_the_sum(sigma):
    values = np.random.default_rng(2).normal(size=(20, 30)) + 0.3
    found = smooth(values, sigma)
    # The weight of each place by its distance; mirrored copies continue the map beyond its edges.
    steps = np.arange(-round(4 * sigma), round(4 * sigma) + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    around = np.pad(values, len(steps) // 2, mode="symmetric")
    along = np.apply_along_axis(np.convolve, 0, around, weights, mode="valid")
    np.testing.assert_allclose(found, np.apply_along_axis(np.convolve, 1, along, weights, mode="valid"), atol=1e-12)
    assert found.sum() == pytest.approx(values.sum())
    assert found.std() < values.std()
    np.testing.assert_array_equal(smooth(values, 0), values)


@pytest.mark.parametrize("sigma", [-1, np.nan, np.inf, None, "2"])
def test_a_sigma_that_is_out_of_range(sigma):
    with pytest.raises(SettingError, match="`sigma` is"):
        smooth(np.eye(3), sigma)


def test_the_maps_of_a_figure_are_smoothed_before_they_are_scaled():
    generator = np.random.default_rng(4)
    image, signed = generator.uniform(size=(40, 60, 3)), generator.normal(size=(40, 60))
    for figure, expected in (
        (panel([image], {"a": [abs(signed)]}, smooth=2), blend(image, smooth(abs(signed), 2))),
        (strip(image, {"a": abs(signed)}, smooth=2), blend(image, smooth(abs(signed), 2))),
        (panel([image], {"a": [abs(signed)]}), blend(image, abs(signed))),
        (signed_panel([image], {"a": [signed]}), blend_signed(image, smooth(signed, 0.4))),
        (signed_panel([image], {"a": [signed]}, smooth=0), blend_signed(image, signed)),
    ):
        np.testing.assert_allclose(figure.axes[1].images[0].get_array(), expected)
    texts = [signed_panel([image], {"a": [signed]}, smooth=sigma).axes[-1].get_xlabel() for sigma in (None, 3, 0)]
    assert ["1%" in texts[0], "3 px" in texts[1], "Gaussian" in texts[2]] == [True, True, False]


def test_colours_are_those_of_the_chosen_map():
    image, heat = np.full((2, 2, 3), 0.5), np.array([[0.0, 4.0], [0.0, 4.0]])
    bright = np.array(matplotlib.colormaps["viridis"](1.0)[:3])
    for drawn in (
        blend(image, heat, colormap="viridis"),
        paint(image, heat / 4, colormap="viridis"),
        overlay(image, heat, colormap="viridis").axes[0].images[0].get_array(),
        panel([image], {"a": [heat]}, colormap="viridis").axes[1].images[0].get_array(),
        strip(image, {"a": heat}, colormap="viridis").axes[1].images[0].get_array(),
    ):
        np.testing.assert_allclose(drawn[:, 1], np.tile(bright, (2, 1)))
    for draw in (check_colormap, lambda name: blend(image, heat, colormap=name)):
        with pytest.raises(SettingError, match=r"`colormap` is 'virids'.* viridis"):
            draw("virids")


def test_by_default_each_map_has_its_own_scale():
    generator = np.random.default_rng(1)
    image, spread = generator.uniform(size=(12, 12, 3)), generator.uniform(size=(12, 12))
    sharp = spread**9
    figure = panel([image], {"spread": [spread], "sharp": [sharp]})
    for axes, heat in zip(figure.axes[1:3], (spread, sharp), strict=True):
        np.testing.assert_allclose(axes.images[0].get_array(), blend(image, heat))
    assert figure.axes[-1].get_xlim() == (0, 1)
    assert signed_panel([image], {"a": [sharp - 0.1]}).axes[-1].get_xlim() == (-1, 1)


def test_the_caption_is_inside_the_figure():
    caption = "A caption with many words, " * 12
    figure = panel([np.zeros((8, 8, 3))], {"a": [np.eye(8)]}, caption=caption)
    text = figure.texts[0]
    assert text.get_text().replace("\n", " ") == caption.strip()
    around = text.get_window_extent()
    assert around.x0 >= 0
    assert around.x1 <= figure.bbox.x1
    assert 0 <= around.y0 < around.y1 <= figure.axes[-1].get_tightbbox().y0


@pytest.mark.parametrize("suffix", ["pdf", "svg", "png"])
def test_equal_figures_are_equal_files(tmp_path, suffix):
    for name in ("a", "b"):
        save_figure(panel([np.zeros((8, 8, 3))], {"a": [np.eye(8)]}, labels=["cat"]), tmp_path / f"{name}.{suffix}")
    content = (tmp_path / f"a.{suffix}").read_bytes()
    assert content == (tmp_path / f"b.{suffix}").read_bytes()
    assert content.startswith({"pdf": b"%PDF", "svg": b"<?xml", "png": b"\x89PNG"}[suffix])


def test_the_resolution_sets_the_size_in_pixels(tmp_path):
    figure, sizes = overlay(np.zeros((8, 8, 3)), np.eye(8)), []
    for dpi in (50, 100):
        save_figure(figure, tmp_path / "a.png", dpi=dpi)
        with Image.open(tmp_path / "a.png") as saved:
            sizes.append(saved.width)
    assert sizes[1] == pytest.approx(2 * sizes[0], abs=2)
    save_figure(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.width > 700
    for wrong in (0, 99.5, "200"):
        with pytest.raises(SettingError, match="`dpi` is"):
            save_figure(figure, tmp_path / "b.png", dpi=wrong)
    with pytest.raises(OutputError, match="already exists"):
        save_figure(figure, tmp_path / "a.png", force=False)


def test_maps_of_a_panel_may_share_one_scale():
    generator = np.random.default_rng(1)
    images = [generator.uniform(size=(12, 12, 3)) for _ in range(2)]
    signed = {name: [generator.normal(size=(12, 12)) for _ in range(2)] for name in ("gradient", "ParchGrad")}
    heats = {name: [abs(values) for values in column] for name, column in signed.items()}
    for draw, blended, maps, ends in (
        (panel, blend, heats, 0),
        (signed_panel, blend_signed, signed, -1),
    ):
        figure = draw(images, maps, shared_scale=True, smooth=0)
        top = shared_top([*maps["gradient"], *maps["ParchGrad"]])
        bar = figure.axes[-1]
        assert bar.get_xlim() == pytest.approx((ends * top, top))
        assert "mean" in bar.get_xlabel()
        shown = np.asarray(figure.axes[5].images[0].get_array())
        np.testing.assert_allclose(shown, blended(images[1], maps["ParchGrad"][1], top=top), atol=1e-12)


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


def test_a_tinted_map_laid_over_the_grey_image_is_the_blended_one():
    generator = np.random.default_rng(3)
    image, signed = generator.random((6, 7, 3)), generator.normal(size=(6, 7))
    for opacity in (0.0, 0.3, 1.0):
        for draw, colour, values in ((blend, tint, np.abs(signed)), (blend_signed, tint_signed, signed)):
            found = colour(values, top=2.5)
            grey = image @ [0.2126, 0.7152, 0.0722]
            below = opacity * grey[..., None] + (1 - opacity) * image
            # Pillow's and a browser's way of laying one picture over another.
            over = below + opacity * found[..., 3:] * (found[..., :3] - below)
            np.testing.assert_allclose(draw(image, values, top=2.5, opacity=opacity), over, atol=1e-12)


def test_rows_of_wide_images_stand_as_close_as_those_of_square_ones():
    heights = {}
    for width in (4, 8):
        figure = panel([np.ones((4, width, 3))] * 2, {"gradient": [np.ones((4, width))] * 2})
        figure.canvas.draw()
        first, second = (figure.axes[row * 2].get_window_extent() for row in range(2))
        heights[width] = (first.y0 - second.y1) / figure.dpi
    assert heights[8] == pytest.approx(heights[4], abs=0.2)


def test_images_may_be_rounded_and_must_be_numbers():
    picture = np.random.default_rng(0).random((4, 5, 3))
    picture[0, 0], picture[3, 4] = 1, 0
    rounded = picture.copy()
    rounded[0, 0], rounded[3, 4] = 1 + 1e-7, -1e-7
    heat = np.random.default_rng(1).random((4, 5))
    assert np.array_equal(blend(rounded, heat), blend(picture, heat))
    for value in (np.nan, np.inf):
        rounded[0, 0] = value
        with pytest.raises(InputError, match="`image` contains NaN or infinite values"):
            blend(rounded, heat)
    rounded[0, 0] = 1.01
    with pytest.raises(InputError, match=r"`image` ranges from -1e-07 to 1\.01"):
        blend(rounded, heat)
