import json

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

import parchgrad
from parchgrad import models
from parchgrad.cli import main
from parchgrad.models import Classifier, Preprocessing


@pytest.fixture
def coffee(tmp_path):
    path = tmp_path / "coffee.png"
    Image.fromarray(data.coffee()).save(path)
    return path


def run(capsys, *arguments):
    """Exit code, standard output and standard error of one call."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_explain_writes_panel_map_and_manifest(capsys, coffee, tmp_path):
    out = tmp_path / "out"
    options = ["--target", "cup", "--quantile", "0.2", "--layers", "blocks.5.*,conv_head", "--gamma", "3"]
    options += ["--conserve", "exact", "--selector", "activation", "--method", "input_x_gradient", "--out", out]
    code, printed, _ = run(capsys, "explain", coffee, *options)
    assert code == 0
    assert "cup" in printed
    assert "espresso 9" in printed
    assert sorted(path.name for path in out.iterdir()) == ["coffee.json", "coffee.npy", "coffee.png"]
    settings = json.loads((out / "coffee.json").read_text())["settings"]
    assert settings["selector"] == {"name": "GradientTimesActivation", "quantile": 0.2}
    assert settings["layers_choice"] == ["blocks.5.*", "conv_head"]
    assert settings["layers"][-1] == "conv_head"
    assert (settings["gamma"], settings["conserve"], settings["method"]) == (3.0, "exact", "input_x_gradient")
    assert (settings["model"], settings["target_choice"]) == ("efficientnet_lite0", 968)
    assert np.load(out / "coffee.npy").shape == (3, 224, 224)


def test_images_of_equal_names_do_not_overwrite_each_other(capsys, coffee, tmp_path):
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "coffee.png"
    Image.fromarray(data.camera()).save(other)
    code, _, _ = run(capsys, "explain", coffee, other, "--out", tmp_path / "out")
    assert code == 0
    categories = {
        name: json.loads((tmp_path / "out" / f"{name}.json").read_text())["target"]["category"]
        for name in ("coffee", "coffee-2")
    }
    assert categories == {"coffee": "espresso", "coffee-2": "tripod"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "espreso"], "near names: espresso"),
        (["--target", "4000"], "0 to 999"),
        (["--quantile", "0"], "quantile is 0.0"),
        (["--gamma", "0"], "gamma is 0.0"),
        (["--gamma", "nan"], "gamma is nan"),
        (["--layers", "layer9.*"], "'layer9.*' matches none"),
        (["--layers", "2"], "ratio 2"),
        (["--layers", ","], "layers is []"),
        (["--method", "magic"], "method 'magic' does not exist"),
        (["--model", "resnet-18"], "near names: resnet18"),
        (["--method", "LRP"], "method 'LRP' does not exist"),
        (["--method", "GuidedBackprop"], "acts on modules of type ReLU"),
        (["--method", "GradientShap"], "needs the option 'baselines'"),
        (["--selector", "magic"], "'energy'"),
        (["--conserve", "magic"], "'exact'"),
    ],
)
def test_bad_options_are_one_sentence_and_write_nothing(capsys, coffee, tmp_path, options, words):
    code, printed, errors = run(capsys, "explain", coffee, *options, "--out", tmp_path / "out")
    assert code == 2
    assert words in " ".join(errors.replace("│", " ").split())
    assert "Traceback" not in errors
    assert printed == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64, 3)), "Sequential holds no convolution"),
        (torch.nn.Sequential(torch.nn.Conv2d(1, 3, 8), torch.nn.Flatten()), "have 3 channels"),
    ],
)
def test_networks_that_cannot_be_explained(capsys, coffee, tmp_path, monkeypatch, model, words):
    def shrink(image):
        return torch.from_numpy(np.asarray(image.resize((8, 8)), dtype=np.float32) / 255).permute(2, 0, 1)

    classifier = Classifier(model.eval(), Preprocessing(shrink, (0.0,) * 3, (1.0,) * 3), ("a", "b", "c"), "tiny")
    monkeypatch.setattr(models, "load_model", lambda name: classifier)
    code, _, errors = run(capsys, "explain", coffee, "--out", tmp_path / "out")
    assert code == 2
    assert words in errors
    assert not (tmp_path / "out").exists()


def test_one_bad_image_stops_all_before_anything_is_written(capsys, coffee, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_text("text")
    code, _, errors = run(capsys, "explain", coffee, bad, "--out", tmp_path / "out")
    assert code == 2
    assert "bad.jpg' is no image that can be read" in errors
    assert errors.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_earlier_results_stay_unless_forced(capsys, coffee, tmp_path):
    arguments = ["explain", coffee, "--out", tmp_path / "out"]
    assert run(capsys, *arguments)[0] == 0
    code, _, errors = run(capsys, *arguments)
    assert code == 2
    assert "exists already; choose another folder" in errors
    assert run(capsys, *arguments, "--force")[0] == 0


def test_models(capsys):
    code, printed, _ = run(capsys, "models")
    assert code == 0
    assert "efficientnet_lite0   timm          installed with a package" in printed
    assert "resnet50" in printed
    assert "more from timm" in printed
    code, printed, _ = run(capsys, "models", "convnext_n*")
    assert "convnext_nano" in printed
    assert run(capsys, "models", "nothing*")[0] == 2


def test_version_and_help(capsys):
    assert run(capsys, "--version")[1].strip() == f"parchgrad {parchgrad.__version__}"
    code, printed, _ = run(capsys, "--help")
    assert code == 0
    for command in ("explain", "models", "demo"):
        assert command in printed


def test_demo(capsys, tmp_path):
    out = tmp_path / "demo"
    code, printed, _ = run(capsys, "demo", "--out", out)
    assert code == 0
    rows = [line.split() for line in printed.splitlines()]
    for category in ("espresso", "tripod", "moped", "mean"):
        gradient, partitioned = next((float(row[1]), float(row[2])) for row in rows if row[:1] == [category])
        assert partitioned > gradient + 0.1
    page = (out / "index.html").read_text()
    # Self-contained: nothing is fetched, every picture is in the page.
    assert page.count("data:image/jpeg;base64,") == 4 * 3 + 1 + 4 * 2
    assert "http" not in page
    assert (out / "overview.jpg").exists()
    assert run(capsys, "demo", "--out", out)[0] == 2
