import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from skimage import data

import parchgrad as pg
from parchgrad.errors import InputError, OutputError, SettingError
from parchgrad.visual import animation, blend, normalise, paint, shared_top, smooth
from parchgrad.visual.animation import Animation, animate, check_format, save_animation
from parchgrad.visual.sweeps import quantile_sweep

QUANTILES = (0.5, 0.2, 0.1)


def sweep_of(array, selector, quantiles=QUANTILES, target=3):
    shapes = pg.load_model("shapes")
    edit = pg.Edit(selector=selector, layers="all")
    return quantile_sweep(shapes, Image.fromarray(array), edit, quantiles=quantiles, target=target)


@pytest.fixture(scope="module")
def sweeps():
    return {
        "gradient energy": sweep_of(data.cat(), pg.GradientEnergy()),
        "evidence": sweep_of(data.cat(), pg.Evidence()),
    }


@pytest.fixture(autouse=True)
def _small_panels(monkeypatch):
    """Try panels of a quarter of the area; larger ones take most of the time."""
    monkeypatch.setattr(animation, "_SIZES", tuple(size // 2 for size in animation._SIZES))


@pytest.mark.parametrize("shared_scale", [False, True])
def test_the_panels_are_the_maps(sweeps, shared_scale):
    # At the size of the maps nothing is resampled.
    moving = animate(sweeps, panel_size=64, fading_frames=1, shared_scale=shared_scale, smooth=0.5, colormap="viridis")
    assert len(moving.frames) == len(moving.durations) == 6
    first = sweeps["gradient energy"]
    plain, *heats = (smooth(heat, 0.5) for heat in (first.plain, *first.heats, *sweeps["evidence"].heats))
    top = shared_top([plain, *heats]) if shared_scale else None
    line, step = round(9 * 1.7), 64 + 8
    for place in range(3):
        held = moving.frames[2 * place]
        shown = [plain, heats[place], heats[3 + place]]
        expected = [first.picture, *(blend(first.picture, heat, top=top, colormap="viridis") for heat in shown)]
        for number, picture in enumerate(expected):
            left = 8 + number * step
            panel = held[line : line + 64, left : left + 64]
            np.testing.assert_allclose(panel / 255, picture, atol=1.51 / 255)
    # Half way between two values the map is their mean, and from the last it goes to the first.
    for frame, (before, after) in ((1, (0, 1)), (5, (2, 0))):
        mixed = sum(normalise(heats[place], top=top) for place in (before, after)) / 2
        panel = moving.frames[frame][line : line + 64, 8 + 2 * step : 8 + 2 * step + 64]
        np.testing.assert_allclose(panel / 255, paint(first.picture, mixed, colormap="viridis"), atol=2.5 / 255)
    assert moving.durations[0] > moving.durations[1]


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_a_file_plays_what_was_animated(sweeps, tmp_path, suffix):
    path = tmp_path / f"sweep.{suffix}"
    moving = save_animation(sweeps, path)
    assert path.stat().st_size <= animation.MOST_BYTES
    with Image.open(path) as saved:
        assert saved.n_frames == len(moving.frames)
        assert saved.info.get("loop") == 0
        for number, frame in enumerate(moving.frames):
            saved.seek(number)
            shown = np.asarray(saved.convert("RGB"), dtype=float)
            # A palette, or what WebP loses; what is coloured stays coloured.
            assert np.abs(shown - frame).mean() < 9
            assert np.corrcoef(shown.ravel(), frame.ravel())[0, 1] > 0.98
            if suffix == "gif":
                assert (shown[:3, :3] == 255).all()


def played(path):
    """The frames of a file as they are shown."""
    with Image.open(path) as saved:
        frames = []
        for number in range(saved.n_frames):
            saved.seek(number)
            frames.append(np.array(saved.convert("RGB")))
    return frames


def panels_of(frame, moving):
    """The panels beside the image."""
    rows, columns = moving.image_area
    step = columns.stop - columns.start + 8
    lefts = range(columns.start + step, frame.shape[1] - 8, step)
    return [frame[rows, left : left + columns.stop - columns.start] for left in lefts]


def test_equal_maps_are_equal_in_the_file(sweeps, tmp_path):
    # One panel moves through the plain map, which the panel beside the image shows all the time.
    first = sweeps["gradient energy"]
    heats = first.heats.copy()
    heats[1] = first.plain
    moving = save_animation({"a": replace(first, heats=heats)}, tmp_path / "sweep.gif", fading_frames=3)
    frames = played(tmp_path / "sweep.gif")
    plain, other = panels_of(frames[4], moving)
    np.testing.assert_array_equal(plain, other)
    assert not np.array_equal(*panels_of(frames[0], moving))
    # And where nothing moves but a fade passes, equal colours stay equal.
    for shown, frame in zip(frames, moving.frames, strict=True):
        for drawn, found in zip(panels_of(frame, moving), panels_of(shown, moving), strict=True):
            colours = np.concatenate([drawn, found], axis=2).reshape(-1, 6)
            assert len(np.unique(colours, axis=0)) == len(np.unique(colours[:, :3], axis=0))


def test_small_steps_of_a_map_are_shown(tmp_path):
    # Few colours, all of them and the paper in every frame, so that the palette holds each.
    steps = [40 + 9 * step for step in range(12)]
    levels = [np.full((90, 180, 3), level, dtype=np.uint8) for level in steps]
    for frame in levels:
        frame[80:] = np.repeat([*steps, 255], 15)[:180, None]
        frame[:10] = 255
    moving = Animation(frames=tuple(levels), durations=(900, 90, 90) * 4, image_area=(slice(10, 80), slice(10, 80)))
    path = tmp_path / "steps.gif"
    path.write_bytes(animation._gif(moving))
    for shown, frame in zip(played(path), moving.frames, strict=True):
        np.testing.assert_array_equal(shown[:, 90:], frame[:, 90:])


def test_the_image_is_dithered(sweeps, tmp_path):
    moving = save_animation(sweeps, tmp_path / "sweep.gif")
    for shown in played(tmp_path / "sweep.gif")[::3]:
        image, found = moving.frames[0][moving.image_area], shown[moving.image_area]
        # The nearest colours of the file to each pixel, and means over places as the eye takes them.
        colours = np.unique(found.reshape(-1, 3), axis=0)
        nearest = colours[np.square(image[:, :, None].astype(int) - colours).sum(axis=3).argmin(axis=2)]
        errors = [np.abs(block_means(picture) - block_means(image)).mean() for picture in (found, nearest)]
        assert errors[0] < 0.8 * errors[1]


def block_means(picture):
    height, width = (length - length % 8 for length in picture.shape[:2])
    return picture[:height, :width].reshape(height // 8, 8, width // 8, 8, 3).mean(axis=(1, 3))


def test_without_ffmpeg_a_film_is_refused(sweeps, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(OutputError, match="needs ffmpeg"):
        save_animation(sweeps, tmp_path / "sweep.mp4")
    assert list(tmp_path.iterdir()) == []
    # Before anything is rendered.
    with pytest.raises(OutputError, match="needs ffmpeg"):
        save_animation({}, tmp_path / "sweep.mp4")
    with pytest.raises(OutputError, match="needs ffmpeg"):
        check_format(tmp_path / "sweep.MP4")
    check_format("sweep.gif")
    check_format("sweep.WEBP")
    for wrong in ("sweep.avi", "sweep", ""):
        with pytest.raises(OutputError, match=r"\.gif, \.webp, \.mp4"):
            check_format(wrong)


def test_panels_shrink_until_the_file_fits(sweeps, tmp_path, monkeypatch):
    large = save_animation(sweeps, tmp_path / "large.gif")
    small = save_animation(sweeps, tmp_path / "small.gif", most_bytes=150_000)
    assert small.frames[0].shape[1] < large.frames[0].shape[1]
    assert (tmp_path / "small.gif").stat().st_size <= 150_000
    rendered = []
    monkeypatch.setattr(
        animation, "animate", lambda *given, **options: rendered.append(1) or animate(*given, **options)
    )
    again = save_animation(sweeps, tmp_path / "small.gif", most_bytes=150_000)
    assert again.frames[0].shape == small.frames[0].shape
    assert len(rendered) <= 4
    with pytest.raises(OutputError, match=r"more than 1,000.*`most_bytes`"):
        save_animation(sweeps, tmp_path / "none.gif", most_bytes=1000)
    assert not (tmp_path / "none.gif").exists()


def test_the_largest_panels_that_fit_are_found(sweeps, tmp_path):
    # Slowly: all sizes from the largest on.
    weights = {size: len(animation._gif(animate(sweeps, panel_size=size))) for size in animation._SIZES}
    for size in animation._SIZES[1::3]:
        expected = next(each for each, weight in weights.items() if weight <= weights[size])
        _, columns = save_animation(sweeps, tmp_path / "sweep.gif", most_bytes=weights[size]).image_area
        assert columns.stop - columns.start == expected


@pytest.mark.parametrize("shape", [(1200, 40), (40, 1200)])
def test_long_pictures_have_panels_of_the_same_area(sweeps, tmp_path, shape):
    generator = np.random.default_rng(0)
    sweep = replace(
        sweeps["evidence"],
        picture=np.full((*shape, 3), 0.5),
        plain=generator.random(shape),
        heats=generator.random((3, *shape)),
    )
    rows, columns = animate({"a": sweep}, panel_size=100).image_area
    height, width = rows.stop - rows.start, columns.stop - columns.start
    assert height * width == pytest.approx(100**2, rel=0.05)
    assert height / width == pytest.approx(shape[0] / shape[1], rel=0.05)
    # The image is one grey, and all around it is paper.
    (frame, *_) = animate({"a": sweep}, panel_size=100).frames
    assert (frame[rows, columns] == 128).all()
    assert (frame[rows, : columns.start] == 255).all()
    assert (frame[rows, columns.stop : columns.stop + 8] == 255).all()
    # Narrow panels stand far enough apart for their captions.
    assert frame.shape[1] == 8 + 3 * (max(width, 64) + 8)
    save_animation({"a": sweep}, tmp_path / "long.gif", most_bytes=200_000)
    assert (tmp_path / "long.gif").stat().st_size <= 200_000


def test_sweeps_that_do_not_belong_together(sweeps, tmp_path):
    first = sweeps["evidence"]
    with pytest.raises(InputError, match="`sweeps` is empty"):
        animate({})
    for other in (
        sweep_of(data.cat(), pg.GradientEnergy(), quantiles=(0.5, 0.2)),
        sweep_of(data.cat(), pg.GradientEnergy(), target=4),
    ):
        with pytest.raises(InputError, match="values or class"):
            animate({"a": first, "b": other})
    with pytest.raises(InputError, match="different images"):
        animate({"a": first, "b": sweep_of(data.coffee(), pg.GradientEnergy())})
    with pytest.raises(InputError, match="methods 'gradient' and 'input_x_gradient'"):
        animate({"a": first, "b": replace(first, method="input_x_gradient")})
    for wrong in (8, 64.5, math.nan, "64"):
        with pytest.raises(
            SettingError, match=f"`panel_size` is {wrong!r}, but it must be a whole number of at least 32"
        ):
            animate(sweeps, panel_size=wrong)
    for wrong in (-1, 1.5, None):
        with pytest.raises(SettingError, match=f"`fading_frames` is {wrong!r}, but it must be a whole number"):
            animate(sweeps, fading_frames=wrong)
        with pytest.raises(SettingError, match=f"`fading_frames` is {wrong!r}, but it must be a whole number"):
            save_animation(sweeps, tmp_path / "sweep.gif", fading_frames=wrong)
    for wrong in (0, -5, math.nan):
        with pytest.raises(SettingError, match=f"`most_bytes` is {wrong}"):
            save_animation(sweeps, tmp_path / "sweep.gif", most_bytes=wrong)
    with pytest.raises(OutputError, match=r"\.gif, \.webp, \.mp4"):
        save_animation(sweeps, tmp_path / "sweep.avi")
