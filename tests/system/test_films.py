"""Films, which ffmpeg writes and reads."""

import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from skimage import data

import parchgrad as pg
from parchgrad.visual.animation import save_animation
from parchgrad.visual.sweeps import quantile_sweep


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_ffmpeg_writes_the_same_frames(tmp_path):
    shapes, edit = pg.load_model("shapes"), pg.Edit(selector=pg.GradientEnergy(), layers="all")
    sweeps = {"energy": quantile_sweep(shapes, Image.fromarray(data.cat()), edit, quantiles=(0.5, 0.2, 0.1), target=3)}
    path = tmp_path / "sweep.mp4"
    moving = save_animation(sweeps, path, fading_frames=0)
    height, width = (length - length % 2 for length in moving.frames[0].shape[:2])
    command = ["ffmpeg", "-loglevel", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    found = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.uint8)
    found = found.reshape(-1, height, width, 3)
    assert len(found) == 30
    for number, frame in enumerate(moving.frames):
        assert np.abs(found[10 * number + 5].astype(float) - frame[:height, :width]).mean() < 9
