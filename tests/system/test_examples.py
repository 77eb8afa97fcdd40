"""Every example runs as it says, the numbers it states are right, and ffmpeg reads the films that are written."""

import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import nn

import parchgrad as pg
from parchgrad.evaluation.localisation import cell_shares
from parchgrad.visual.animation import save_animation
from parchgrad.visual.sweeps import quantile_sweep
from tests.support import ROOT

EXAMPLES = ROOT / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers_of(lines, start):
    """The numbers with two decimals in the lines that start like this, the start left out."""
    return [float(n) for line in lines if line.startswith(start) for n in re.findall(r"\d\.\d\d\b", line[len(start) :])]


def width_of(path):
    with Image.open(path) as picture:
        return picture.width


def test_no_example_hides_a_module_of_the_standard_library():
    # A script's own folder comes first on the path: signal.py there breaks torch.
    assert not set(NAMES) & sys.stdlib_module_names


def test_an_example_runs_as_a_script_from_anywhere(tmp_path):
    command = [sys.executable, EXAMPLES / "conv1d_signal.py", "--help"]
    path = os.pathsep.join([str(Path(pg.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert "python examples/conv1d_signal.py" in found.stdout


def test_the_table_names_every_example():
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\)", table, flags=re.MULTILINE)) == NAMES
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| \[(\w+)\.py\]\(#", page, flags=re.MULTILINE)) == NAMES
    assert sorted(re.findall(r"literalinclude\} \.\./examples/(\w+)\.py$", page, flags=re.MULTILINE)) == NAMES
    for name in NAMES:
        assert f"python examples/{name}.py" in load(name).__doc__


def test_custom_model(tmp_path, capsys, monkeypatch):
    module, heats = load("custom_model"), []
    monkeypatch.setattr(module, "cell_shares", lambda heat, **cells: heats.append(heat) or cell_shares(heat, **cells))
    module.main(["--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    stated = [numbers_of(lines, f"share in its own half, {name}:")[0] for name in module.SELECTORS]
    for heat, share in zip(heats, stated, strict=True):
        left = heat[:, :, : module.SIZE].double().sum(dim=(1, 2)) / heat.double().sum(dim=(1, 2))
        expected = torch.cat([left[0::2], 1 - left[1::2]]).mean().item()
        assert share == pytest.approx(expected, abs=0.006)
    assert stated[2] > stated[0] + 0.2
    assert numbers_of(lines, "accuracy:")[0] > 0.95
    assert width_of(tmp_path / "custom_model.png") > 1000


def test_conv1d_signal(tmp_path, capsys):
    module = load("conv1d_signal")
    module.main(["--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    accuracy, chance = numbers_of(lines, "accuracy on new signals:")
    assert (accuracy > 0.9, chance) == (True, 0.19)
    stated = {name: numbers_of(lines, f"share on the burst, {name}:")[0] for name in module.SELECTORS}
    assert stated["Evidence"] > stated["plain gradient"] + 0.1
    # What the docstring says of the other selector.
    assert stated["GradientEnergy"] < stated["Evidence"] - 0.1

    generator = torch.Generator().manual_seed(0)
    model = module.train(generator)
    signals, kinds, inside = module.draw(300, generator)
    score = model(signals.requires_grad_())[torch.arange(300), kinds].sum()
    heat = torch.autograd.grad(score, signals)[0].abs().squeeze(1).double()
    expected = ((heat * inside).sum(dim=1) / heat.sum(dim=1)).mean().item()
    assert stated["plain gradient"] == pytest.approx(expected, abs=0.02)
    assert width_of(tmp_path / "conv1d_signal.png") > 1000


def test_bursts_are_where_the_example_says():
    module = load("conv1d_signal")
    signals, _, inside = module.draw(2000, torch.Generator().manual_seed(3))
    assert (inside.sum(dim=1) == module.BURST).all()
    noise = signals.squeeze(1)[~inside]
    assert noise.std().item() == pytest.approx(0.5, abs=0.01)
    # Noise and a burst of amplitude 1.5 under a squared sine: 0.25 + 1.5 ** 2 * 3 / 8 / 2.
    assert signals.squeeze(1)[inside].var().item() == pytest.approx(0.25 + 2.25 * 3 / 16, abs=0.02)


def test_timm_model(tmp_path, capsys):
    load("timm_model").main(["--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    torch.manual_seed(0)
    classifier = pg.load_model("convnext_atto", pretrained=False)
    names = [name for name, module in classifier.model.named_modules() if isinstance(module, nn.Conv2d)]
    assert lines[0].startswith(f"convnext_atto: {len(names)} convolutions, input (3, 224, 224)")
    chosen = [re.match(r"layers=(\S+) +(\d+) of", line).groups() for line in lines if line.startswith("layers=")]
    inside = [name for name in names if name.startswith("stages.2")]
    counts = [len(names), len(names) // 4, len(inside), len(names)]
    assert chosen == list(zip(["None", "0.25", "'stages.2*'", "'all'"], map(str, counts), strict=True))
    x = classifier.preprocess(Image.fromarray(data.coffee())).unsqueeze(0).requires_grad_()
    plain = torch.autograd.grad(classifier.model(x).max(), x)[0].abs().mean(dim=1).flatten()
    explainer = pg.Explainer(classifier.model, layers="all")
    edited = pg.heatmap(explainer.attribute(x)).flatten()
    expected = torch.corrcoef(torch.stack([plain, edited]).double())[0, 1].item()
    assert numbers_of(lines, "layers='all'")[-1] == pytest.approx(abs(expected), abs=0.006)
    # Maps of random weights are no picture to show.
    assert not list(tmp_path.iterdir())
    assert max(map(len, lines)) < 80


def test_timm_model_draws_what_a_trained_network_sees(tmp_path, capsys):
    load("timm_model").main(["--model", "efficientnet_lite0", "--pretrained", "--out", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[1].startswith("predicted: espresso (9")
    assert width_of(tmp_path / "timm_model.png") > 500


def test_a_network_that_does_not_exist_is_told_in_words():
    with pytest.raises(SystemExit, match=r"model 'convnext_att'.*convnext_atto"):
        load("timm_model").main(["--model", "convnext_att"])


def test_captum_composition(tmp_path, capsys, monkeypatch):
    module = load("captum_composition")
    monkeypatch.setattr(module, "SAMPLES", 2)
    module.main(["--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    stated = {line.split()[0]: tuple(map(float, line.split()[1:])) for line in lines[1:5]}
    assert all(partitioned > plain + 0.1 for plain, partitioned in stated.values())

    classifier = pg.load_model("efficientnet_lite0")
    photographs = [classifier.preprocess(Image.fromarray(array)) for array in (data.cat(), data.coffee())]
    x = torch.cat(photographs, dim=2).expand(2, -1, -1, -1).clone().requires_grad_()
    logits = classifier.model(x)
    (gradient,) = torch.autograd.grad(logits[0, 282] + logits[1, 967], x)
    for method, attribution in (("Saliency", gradient), ("InputXGradient", gradient * x)):
        heat = attribution.detach().abs().sum(dim=1).double().numpy()
        left = heat[:, :, :224].sum(axis=(1, 2)) / heat.sum(axis=(1, 2))
        assert stated[method][0] == pytest.approx((left[0] + 1 - left[1]) / 2, abs=0.006)
    explainer = pg.Explainer(classifier.model)
    heat = pg.heatmap(explainer.attribute(x, torch.tensor([282, 967]))).numpy()
    left = heat[:, :, :224].sum(axis=(1, 2)) / heat.sum(axis=(1, 2))
    assert stated["Saliency"][1] == pytest.approx((left[0] + 1 - left[1]) / 2, abs=0.006)
    assert {path.name for path in tmp_path.iterdir()} == {"captum_cat.png", "captum_espresso.png"}


def test_batch_over_a_folder(tmp_path, capsys):
    folder, out = tmp_path / "photographs", tmp_path / "out"
    (folder / "inner").mkdir(parents=True)
    Image.fromarray(data.coffee()).save(folder / "coffee.png")
    Image.fromarray(data.cat()).save(folder / "inner" / "cat.png")
    # Names that would be equal without their suffix, or with the folder in them.
    Image.fromarray(data.camera()).save(folder / "coffee.jpg")
    Image.fromarray(data.rocket()).save(folder / "inner-cat.png")
    (folder / "damaged.jpg").write_bytes(b"\xff\xd8 no photograph")
    load("batch_over_a_folder").main([str(folder), "--batch", "2", "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("skipped:") and "damaged.jpg" in line]) == 1
    with open(out / "maps.csv", newline="", encoding="utf-8") as table:
        rows = {row["photograph"]: row for row in csv.DictReader(table)}
    assert {name: row["class"] for name, row in rows.items()} == {
        "coffee": "tripod",
        "coffee-2": "espresso",
        "inner-cat": "tiger cat",
        "inner-cat-2": "missile",
    }
    assert max(len(line) for line in lines if "half of the map in" in line) < 80
    for name, row in rows.items():
        heat = np.sort(np.abs(np.load(out / "maps" / f"{name}.npy")).sum(axis=0, dtype=np.float64).ravel())
        # The smallest set of the strongest pixels that reaches half of the sum.
        count = next(n for n in range(1, heat.size) if heat[-n:].sum() >= heat.sum() / 2)
        assert float(row["half_parchgrad"]) == pytest.approx(count / heat.size, rel=0.01)
        assert float(row["half_parchgrad"]) < float(row["half_plain"])
        assert width_of(out / "maps" / f"{name}.png") > 500
    assert width_of(out / "overview.jpg") > 500


def test_an_empty_folder_is_told_in_words(tmp_path):
    with pytest.raises(SystemExit, match="No images in"):
        load("batch_over_a_folder").main([str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="batch"):
        load("batch_over_a_folder").main(["--batch", "0", "--out", str(tmp_path / "out")])


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
