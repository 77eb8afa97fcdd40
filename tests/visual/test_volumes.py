"""Maps over volumes, clips and signals, and over images of another kind than photographs."""

import matplotlib.pyplot
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from parchgrad.errors import InputError, SettingError
from parchgrad.visual import clip_figure, normalise, overlay, paint, panel, signal_figure, strip, volume_figure
from parchgrad.visual.charts import LIGHT
from tests.messages import check_message

SHAPE = (12, 20, 16)


def generator():
    return np.random.default_rng(0)


def volume():
    """Grey values from 0 to 1, whose own window is therefore nearly the whole range."""
    return generator().uniform(size=SHAPE)


def ball(centre, radius=3.0, spacing=(1, 1, 1)):
    places = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
    squares = np.square((places - centre) * spacing).sum(axis=-1)
    return np.exp(-squares / (2 * radius**2))


def slices_of(figure):
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes[:3]]


def painted(heat, grey, at):
    """The three slices, each cut and painted by itself on the scale of the whole map."""
    scaled = np.clip(heat / np.percentile(heat, 99.9), 0, 1)
    d, h, w = at
    return [
        paint(grey[d], scaled[d]),
        paint(grey[:, :, w].T, scaled[:, :, w].T),
        paint(grey[:, h], scaled[:, h]),
    ]


@pytest.mark.parametrize("at", [(4, 11, 9), (0, 19, 3)])
def test_the_slices_are_those_through_the_voxel_on_one_scale(at):
    heat, grey = generator().gamma(0.5, size=SHAPE), volume()
    figure = volume_figure(heat, grey, at=at, window=(0, 1))
    for found, wanted in zip(slices_of(figure), painted(heat, grey, at), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-12)
    assert [axes.get_title() for axes in figure.axes[:3]] == [f"depth {at[0]}", f"width {at[2]}", f"height {at[1]}"]
    labels = [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes[:3]]
    assert labels == [("width", "height"), ("depth", "height"), ("width", "depth")]
    assert figure.get_suptitle() == f"Slices through the voxel at depth {at[0]}, height {at[1]}, width {at[2]}"
    assert figure.axes[3].get_xlim() == (0, 1)
    assert "99.9th percentile" in figure.axes[3].get_xlabel()
    assert matplotlib.pyplot.get_fignums() == []


def test_a_volume_is_cut_at_the_peak_and_not_at_a_single_voxel():
    heat = ball((4, 11, 9))
    assert "peak at depth 4, height 11, width 9" in volume_figure(heat, volume()).get_suptitle()
    # Brighter than the peak, but alone.
    heat[10, 2, 2] = 50
    figure = volume_figure(heat, volume(), window=(0, 1))
    for found, wanted in zip(slices_of(figure), painted(heat, volume(), (4, 11, 9)), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-12)
    # A map with nothing else is cut at the voxel.
    lonely = np.zeros(SHAPE)
    lonely[10, 2, 2] = 1
    assert "peak at depth 10, height 2, width 2" in volume_figure(lonely, volume()).get_suptitle()


def test_a_map_of_zeros_is_cut_in_the_middle():
    figure = volume_figure(np.zeros(SHAPE), np.ones(SHAPE))
    assert figure.get_suptitle() == "Slices through the centre of a map of zeros at depth 6, height 10, width 8"
    np.testing.assert_allclose(slices_of(figure)[0], paint(np.full((20, 16), 0.5), np.zeros((20, 16))))


def segments_of(axes):
    return sorted(np.asarray(line.get_segments()[0]).tolist() for line in axes.collections)


def test_crosshairs_meet_in_the_voxel_and_leave_it_visible():
    axes = volume_figure(ball((4, 11, 9)), volume(), at=(4, 11, 9)).axes[0]
    gap = 1.5
    assert segments_of(axes) == sorted(
        [
            [[-0.5, 11], [9 - gap, 11]],
            [[9 + gap, 11], [15.5, 11]],
            [[9, -0.5], [9, 11 - gap]],
            [[9, 11 + gap], [9, 19.5]],
        ]
    )
    assert axes.get_xlim() == (-0.5, 15.5)
    assert axes.get_ylim() == (19.5, -0.5)
    # At a corner, two of the four would be empty.
    assert len(segments_of(volume_figure(ball((4, 11, 9)), volume(), at=(0, 0, 0)).axes[0])) == 2


@pytest.mark.parametrize("spacing", [(1, 1, 1), (3, 1, 0.5), (0.1, 0.4, 0.4)])
def test_slices_have_the_aspect_of_the_spacing_and_one_scale(spacing):
    figure = volume_figure(ball((4, 11, 9)), volume(), spacing=spacing)
    sides = dict(zip(("depth", "height", "width"), np.multiply(spacing, SHAPE), strict=True))
    pixels = []
    for axes in figure.axes[:3]:
        box = axes.get_window_extent()
        across, down = sides[axes.get_xlabel()], sides[axes.get_ylabel()]
        assert box.width / box.height == pytest.approx(across / down, rel=0.02)
        pixels.append(box.width / across)
    if min(sides.values()) > 0.2 * max(sides.values()):
        assert pixels == pytest.approx([pixels[0]] * 3, rel=0.05)


def test_long_volumes_lie_on_their_side():
    figure = volume_figure(np.ones((60, 8, 10)), generator().uniform(size=(60, 8, 10)))
    assert (figure.axes[2].get_xlabel(), figure.axes[2].get_ylabel()) == ("depth", "width")
    assert slices_of(figure)[2].shape[:2] == (10, 60)


def test_the_spacing_sets_how_far_a_map_is_smoothed():
    """Four voxels along depth outweigh brighter single ones only where smoothing reaches from one to the next."""
    heat, grey = np.zeros((10, 40, 5)), generator().uniform(size=(10, 40, 5))
    heat[3:7, 20, 2] = 0.5
    heat[5, 8, [0, 2, 4]] = 0.8
    assert "height 20, width 2" in volume_figure(heat, grey).get_suptitle()
    # 2% of 100 is a fifth of a voxel along depth.
    assert "depth 5, height 8, width 2" in volume_figure(heat, grey, spacing=(10, 1, 1)).get_suptitle()


def test_the_window_sets_black_and_white():
    grey = np.linspace(-1000, 1000, np.prod(SHAPE)).reshape(SHAPE)
    heat = ball((4, 11, 9))
    for window, ends in (((-200, 300), (-200, 300)), (None, np.percentile(grey, [0.5, 99.5]))):
        figure = volume_figure(heat, grey, window=window)
        scaled = np.clip((grey - ends[0]) / (ends[1] - ends[0]), 0, 1)
        np.testing.assert_allclose(slices_of(figure)[0], painted(heat, scaled, (4, 11, 9))[0], atol=1e-9)


def test_tensors_of_any_unit_give_the_same_volume():
    heat, grey = torch.rand(SHAPE, dtype=torch.float64, requires_grad=True), torch.rand(SHAPE)
    wanted = slices_of(volume_figure(heat, grey))
    for unit in (1e-30, 1e30):
        for found, slice_ in zip(slices_of(volume_figure(unit * heat.detach().numpy(), grey)), wanted, strict=True):
            np.testing.assert_allclose(found, slice_, atol=1e-9)


def test_volumes_that_cannot_be_drawn():
    heat = ball((4, 11, 9))
    for settings, facts in (
        ({"at": (12, 0, 0)}, ("`at` is (12, 0, 0)", str(SHAPE))),
        ({"at": (-1, 0, 0)}, ("`at` is (-1, 0, 0)",)),
        ({"at": (1, 2)}, ("`at` is (1, 2)",)),
        ({"at": 5}, ("`at` is 5",)),
        ({"at": (1.0, 2, 3)}, ("`at` is (1.0, 2, 3)",)),
        ({"spacing": (1, 0, 1)}, ("`spacing` is (1, 0, 1)",)),
        ({"spacing": 2.0}, ("`spacing` is 2.0",)),
        ({"spacing": (1, 1, float("inf"))}, ("`spacing`",)),
        ({"window": (1, 1)}, ("`window` is (1, 1)",)),
        ({"window": (0, float("nan"))}, ("`window`",)),
    ):
        with pytest.raises(SettingError) as raised:
            volume_figure(heat, volume(), **settings)
        check_message(raised.value, *facts)
    for values, body, facts in (
        (heat[None], volume(), ("`heat`", "(1, 12, 20, 16)", "(12, 20, 16)")),
        (heat, volume()[None], ("`volume`", "(1, 12, 20, 16)", "(D, H, W)")),
        (-heat, volume(), ("`heat` contains negative",)),
        (heat, np.full(SHAPE, np.nan), ("`volume` contains NaN",)),
        (np.zeros((0, 2, 2)), np.zeros((0, 2, 2)), ("`volume` has shape (0, 2, 2)",)),
    ):
        with pytest.raises(InputError) as raised:
            volume_figure(values, body)
        for fact in facts:
            assert fact in str(raised.value)


# Clips.


def clip(length=12):
    return generator().uniform(size=(length, 6, 8, 3)), generator().gamma(0.5, size=(length, 6, 8))


def test_frames_are_drawn_above_their_maps_on_one_scale():
    frames, heat = clip()
    heat[7] *= 10
    figure = clip_figure(heat, frames, count=4)
    chosen = [0, 4, 7, 11]
    assert [axes.get_title() for axes in figure.axes[:4]] == [f"frame {frame}" for frame in chosen]
    end = np.percentile(heat, 99.9)
    for column, frame in enumerate(chosen):
        above, below = (figure.axes[place].images[0].get_array() for place in (column, 4 + column))
        np.testing.assert_allclose(above, frames[frame])
        np.testing.assert_allclose(below, paint(frames[frame], np.clip(heat[frame] / end, 0, 1)), atol=1e-12)


def test_the_shares_are_those_by_hand_and_drawn_frames_are_dark():
    heat = np.zeros((6, 2, 2))
    heat[1, 0, 0], heat[3], heat[4, 1, 1] = 2.0, 1.0, 4.0
    figure = clip_figure(heat, np.ones((6, 2, 2)), count=3)
    chart = next(axes for axes in figure.axes if axes.get_ylabel() == "share of map")
    assert [bar.get_height() for bar in chart.patches] == pytest.approx([0, 0.2, 0, 0.4, 0.4, 0])
    assert [bar.get_x() + bar.get_width() / 2 for bar in chart.patches] == pytest.approx(range(6))
    dark = [bar.get_facecolor()[:3] == to_rgb(LIGHT.lines[0]) for bar in chart.patches]
    # Evenly spread: 0, 2 and 5; frame 3 has the largest share, and replaces its neighbour.
    assert dark == [True, False, False, True, False, True]
    assert figure.get_suptitle() == "Frame 3 has the largest share of the map: 40.0%"
    for unit in (1e-300, 1e300):
        again = clip_figure(unit * heat, np.ones((6, 2, 2)), count=3)
        assert again.get_suptitle() == figure.get_suptitle()


@pytest.mark.parametrize(
    ("length", "count", "largest", "drawn"),
    [
        (12, 1, 5, [5]),
        (12, 3, 5, [0, 5, 11]),
        (12, 3, 1, [1, 6, 11]),
        (12, 3, 11, [0, 6, 11]),
        (3, 8, 1, [0, 1, 2]),
        (1, 8, 0, [0]),
        (9, 5, 4, [0, 2, 4, 6, 8]),
    ],
)
def test_the_frame_with_the_largest_share_is_always_drawn(length, count, largest, drawn):
    heat = np.full((length, 2, 2), 0.1)
    heat[largest] = 1
    figure = clip_figure(heat, np.ones((length, 2, 2, 3)), count=count)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == [f"frame {frame}" for frame in drawn]


def test_a_map_of_zeros_has_no_largest_frame():
    assert clip_figure(np.zeros((4, 2, 2)), np.ones((4, 2, 2))).get_suptitle() == "The map is zero everywhere"


def test_grey_frames_are_drawn_as_colours():
    frames, heat = clip()
    grey, colours = frames[..., 0], np.repeat(frames[..., :1], 3, axis=3)
    one, other = clip_figure(heat, grey, title="waving"), clip_figure(heat, torch.from_numpy(colours), title="waving")
    assert one.get_suptitle() == "waving"
    for left, right in zip(one.axes[:16], other.axes[:16], strict=True):
        np.testing.assert_array_equal(left.images[0].get_array(), right.images[0].get_array())


def test_clips_that_cannot_be_drawn():
    frames, heat = clip()
    for given, facts in (
        ((heat, frames.transpose(0, 3, 1, 2)), ("`frames` has shape (12, 3, 6, 8)", "(T, H, W, 3)")),
        ((heat[:3], frames), ("`heat` has shape (3, 6, 8)", "(12, 6, 8)")),
        ((heat, 255 * frames), ("`frames` ranges from",)),
    ):
        with pytest.raises(InputError) as raised:
            clip_figure(*given)
        for fact in facts:
            assert fact in str(raised.value)
    with pytest.raises(SettingError, match="`count` is 0"):
        clip_figure(heat, frames, count=0)


# Signals.


def test_a_signal_is_shaded_by_its_map():
    signal, heat = generator().normal(size=(2, 200)), generator().gamma(0.5, size=200)
    figure = signal_figure(heat, signal, rate=50, labels=["I", "II"], title="heart")
    assert figure.get_suptitle() == "heart"
    for row, axes in enumerate(figure.axes[:2]):
        times, values = axes.lines[0].get_data()
        np.testing.assert_allclose(times, np.arange(200) / 50)
        np.testing.assert_array_equal(values, signal[row])
        (shades,) = axes.images
        np.testing.assert_allclose(shades.get_array(), normalise(heat[None]))
        assert shades.get_clim() == (0, 1)
        # Each sample is in the middle of its shade.
        assert shades.get_extent()[:2] == pytest.approx((-0.01, 3.99))
        assert axes.get_xlim() == pytest.approx((-0.01, 3.99))
        assert shades.get_zorder() < axes.lines[0].get_zorder()
    assert [axes.get_ylabel() for axes in figure.axes[:2]] == ["I", "II"]
    assert "99.5th percentile" in figure.axes[2].get_xlabel()


def test_a_signal_of_one_channel_and_no_rate():
    heat, signal = torch.rand(50), torch.randn(50)
    figure = signal_figure(heat, signal)
    assert [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes[:1]] == [("sample", "signal")]
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_data()[0], np.arange(50))
    assert figure.get_suptitle() == ""


def test_signals_that_cannot_be_drawn():
    heat, signal = np.ones(20), np.ones((3, 20))
    for given, settings, error, fact in (
        ((heat[:5], signal), {}, InputError, r"`heat` has shape \(5,\)"),
        ((np.ones((3, 20)), signal), {}, InputError, r"`heat` has shape \(3, 20\)"),
        ((heat, signal[None]), {}, InputError, r"`signal` has shape \(1, 3, 20\)"),
        ((heat, np.full((3, 20), np.inf)), {}, InputError, "`signal` contains NaN or infinite"),
        ((heat, signal), {"labels": ["a"]}, InputError, "`labels` has 1 texts for 3 channels"),
        ((heat, signal), {"rate": 0}, SettingError, "`rate` is 0"),
        ((heat, signal), {"rate": float("nan")}, SettingError, "`rate` is nan"),
        ((heat, signal), {"rate": "100"}, SettingError, "`rate` is '100'"),
    ):
        with pytest.raises(error, match=fact):
            signal_figure(*given, **settings)


# Bands and spectrograms.


def test_maps_are_drawn_over_grey_images():
    grey, heat = generator().uniform(size=(8, 20)), generator().uniform(size=(8, 20))
    wanted = paint(np.repeat(grey[..., None], 3, axis=2), normalise(heat))
    for picture in (grey, grey[..., None], torch.from_numpy(grey)):
        np.testing.assert_allclose(overlay(picture, heat).axes[0].images[0].get_array(), wanted)
    for figure in (panel([grey], {"gradient": [heat]}), strip(grey, {"gradient": heat})):
        np.testing.assert_allclose(figure.axes[0].images[0].get_array(), np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("shape", [(8, 20, 12), (12, 8, 20), (2, 8, 20), (8, 20, 2), (20,), (0, 20)])
def test_other_bands_are_refused(shape):
    with pytest.raises(InputError) as raised:
        overlay(np.zeros(shape), np.zeros((8, 20)))
    check_message(raised.value, "`image`", str(shape), "choose three")


def test_a_wide_image_is_drawn_wide():
    widths = {}
    for width in (20, 40, 200, 4000):
        figure = overlay(np.zeros((20, width)), np.ones((20, width)))
        widths[width] = figure.get_figwidth()
    assert widths == pytest.approx({20: 4.6, 40: 4.6, 200: 10, 4000: 10})
