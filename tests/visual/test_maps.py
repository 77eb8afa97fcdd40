import matplotlib
import matplotlib.pyplot
import numpy as np
import pytest
import torch
from PIL import Image

from parchgrad.errors import InputError, OutputError, SettingError
from parchgrad.visual import blend, normalise, overlay, panel, save_figure


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
        with pytest.raises(OutputError, match=r"names no picture format; end it in one of: .*\.png"):
            save_figure(figure, tmp_path / name)


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


def test_pictures_that_do_not_match():
    with pytest.raises(InputError, match="do not match"):
        blend(np.zeros((4, 4, 3)), np.zeros((5, 4)))
    with pytest.raises(InputError, match=r"from 0 to 255; scale it to \[0, 1\]"):
        blend(np.full((4, 4, 3), 255) * np.eye(4)[..., None], np.zeros((4, 4)))
    with pytest.raises(SettingError, match="percentile is 150"):
        normalise(np.ones((2, 2)), percentile=150)
    with pytest.raises(InputError, match="needs at least one"):
        panel([], {})
    with pytest.raises(InputError, match="as many labels"):
        panel([np.zeros((4, 4, 3))], {}, labels=["a", "b"])
    with pytest.raises(InputError, match="has 1 maps for 2 photographs"):
        panel([np.zeros((4, 4, 3))] * 2, {"gradient": [np.zeros((4, 4))]})


def test_maps_of_half_precision_are_drawn_as_any_others():
    heat = torch.rand(6, 6)
    for dtype in (torch.bfloat16, torch.float16):
        np.testing.assert_allclose(normalise(heat.to(dtype)), normalise(heat.to(dtype).double()))
