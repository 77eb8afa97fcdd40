import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from skimage import data

import parchgrad as pg
from parchgrad.errors import InputError, OutputError, SettingError
from parchgrad.visual import blend, relative, shared_top
from parchgrad.visual.animation import animate, save_animation
from parchgrad.visual.sweeps import quantile_sweep

QUANTILES = (0.5, 0.2, 0.1)


def sweep_of(array, selector, quantiles=QUANTILES, target=3):
    shapes = pg.load_model("shapes")
    return quantile_sweep(shapes, Image.fromarray(array), selector, quantiles=quantiles, layers="all", target=target)


@pytest.fixture(scope="module")
def sweeps():
    return {
        "gradient energy": sweep_of(data.cat(), pg.GradientEnergy()),
        "evidence": sweep_of(data.cat(), pg.Evidence()),
    }


def test_the_panels_are_the_maps_by_one_scale(sweeps):
    # At the size of the maps nothing is resampled.
    moving = animate(sweeps, panel_size=64, fading_frames=1)
    assert len(moving.frames) == len(moving.durations) == 6
    first = sweeps["gradient energy"]
    heats = [first.plain, *first.heats, *sweeps["evidence"].heats]
    top = shared_top(heats)
    line, step = round(9 * 1.7), 64 + 8
    for place in range(3):
        held = moving.frames[2 * place]
        expected = [first.picture, blend(first.picture, first.plain, top=top)]
        expected += [blend(first.picture, sweep.heats[place], top=top) for sweep in sweeps.values()]
        for number, picture in enumerate(expected):
            left = 8 + number * step
            panel = held[line : line + 64, left : left + 64]
            np.testing.assert_allclose(panel / 255, picture, atol=1.51 / 255)
    # Half way between two values the map is their mean, and from the last it goes to the first.
    for frame, (before, after) in ((1, (0, 1)), (5, (2, 0))):
        mixed = sum(relative(first.heats[place]) for place in (before, after)) / 2
        panel = moving.frames[frame][line : line + 64, 8 + 2 * step : 8 + 2 * step + 64]
        np.testing.assert_allclose(panel / 255, blend(first.picture, mixed, top=top), atol=2.5 / 255)
    assert moving.durations[0] > moving.durations[1]


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_a_file_plays_what_was_animated(sweeps, tmp_path, suffix):
    path = tmp_path / f"sweep.{suffix}"
    moving = save_animation(sweeps, path)
    assert path.stat().st_size <= 500_000
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


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_ffmpeg_writes_the_same_frames(sweeps, tmp_path):
    path = tmp_path / "sweep.mp4"
    moving = save_animation(sweeps, path, fading_frames=0)
    height, width = (length - length % 2 for length in moving.frames[0].shape[:2])
    command = ["ffmpeg", "-loglevel", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    found = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.uint8)
    found = found.reshape(-1, height, width, 3)
    assert len(found) == 30
    for number, frame in enumerate(moving.frames):
        assert np.abs(found[10 * number + 5].astype(float) - frame[:height, :width]).mean() < 9


def test_without_ffmpeg_a_film_is_refused(sweeps, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(OutputError, match="needs the program ffmpeg"):
        save_animation(sweeps, tmp_path / "sweep.mp4")
    assert list(tmp_path.iterdir()) == []


def test_panels_shrink_until_the_file_fits(sweeps, tmp_path):
    large = save_animation(sweeps, tmp_path / "large.gif")
    small = save_animation(sweeps, tmp_path / "small.gif", most_bytes=150_000)
    assert small.frames[0].shape[1] < large.frames[0].shape[1]
    assert (tmp_path / "small.gif").stat().st_size <= 150_000
    with pytest.raises(OutputError, match=r"more than 1,000; sweep over fewer values, or allow more bytes"):
        save_animation(sweeps, tmp_path / "none.gif", most_bytes=1000)
    assert not (tmp_path / "none.gif").exists()


def test_sweeps_that_do_not_belong_together(sweeps, tmp_path):
    first = sweeps["evidence"]
    with pytest.raises(InputError, match="no sweep at all"):
        animate({})
    for other in (
        sweep_of(data.cat(), pg.GradientEnergy(), quantiles=(0.5, 0.2)),
        sweep_of(data.cat(), pg.GradientEnergy(), target=4),
    ):
        with pytest.raises(InputError, match="not over the same values"):
            animate({"a": first, "b": other})
    with pytest.raises(InputError, match="different photographs"):
        animate({"a": first, "b": sweep_of(data.coffee(), pg.GradientEnergy())})
    with pytest.raises(SettingError, match="panel_size is 8"):
        animate(sweeps, panel_size=8)
    with pytest.raises(OutputError, match=r"end it in \.gif, \.webp, \.mp4"):
        save_animation(sweeps, tmp_path / "sweep.avi")
