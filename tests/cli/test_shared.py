import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import parchgrad as pg
from parchgrad.cli.evaluation import complete_data
from parchgrad.cli.shared import SELECTORS, complete_models
from parchgrad.data.images import read_image
from parchgrad.evaluation.rows import read_rows
from parchgrad.models.own_networks import check_network_name
from parchgrad.statistics.selectors import find_selector, registered_selectors
from parchgrad.workflows.evaluation import DATA_SETS
from tests.support import cli, python


@pytest.fixture
def coffee(tmp_path):
    Image.effect_noise((70, 70), 60).save(tmp_path / "coffee.png")
    return tmp_path / "coffee.png"


def test_networks_of_ones_own_in_every_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    Path("own.py").write_text(
        "import parchgrad as pg, dataclasses\n"
        "def make():\n"
        "    shapes = pg.load_model('shapes', pretrained=False, num_classes=2)\n"
        "    return dataclasses.replace(shapes, categories=('intact', 'defect'), name='mine')\n"
    )
    torch.manual_seed(4)
    model = pg.load_model("shapes", pretrained=False, num_classes=2).model
    save_file(model.state_dict(), "own.safetensors")
    Path("classes.txt").write_text("intact\ndefect\n")
    labels = {"intact/a.png": 0, "defect/b.png": 1, "intact/c.png": 0, "defect/d.png": 1}
    for name in labels:
        Path("images", name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((70, 70), 60).convert("RGB").save(Path("images", name))
    own = ["--model", "own.py:make", "--weights", "own.safetensors"]
    named = ["--model", "shapes", "--weights", "own.safetensors", "--classes", "classes.txt"]
    for place, network in enumerate((own, named)):
        out = Path(f"out-{place}")
        assert cli(capsys, "explain", "images", *network, "--target", "defect", "--out", out)[0] == 0
        assert {json.loads((out / f"{stem}.json").read_text())["target"]["category"] for stem in "abcd"} == {"defect"}
        assert cli(capsys, "sweep", "images/intact", *network, "--values", "0.5", "--out", out / "sweep")[0] == 0
        assert cli(capsys, "animate", "images/intact", *network, "--values", "0.5,0.2", "--out", out / "gif")[0] == 0
        assert cli(capsys, "stats", "collect", "--data", "images", *network, "-o", out / "held.safetensors")[0] == 0
        options = ["--scores", "sparsity", "--statistics", out / "held.safetensors", "--selector", "class"]
        code, printed, _ = cli(capsys, "evaluate", *network, "--data", "images", *options, "--out", out / "runs")
        assert code == 0
        rows = read_rows(printed.split("parchgrad report ")[1].strip())
        assert {(row["image"], row["label"]) for row in rows} == set(labels.items())
    maps = [np.load(f"out-{place}/a.npy") for place in (0, 1)]
    assert np.array_equal(*maps)
    explainer = pg.Explainer(model.eval())
    inputs = pg.load_model("shapes").preprocess(read_image("images/intact/a.png")).unsqueeze(0)
    assert maps[0] == pytest.approx(explainer.attribute(inputs, 1)[0].numpy(), abs=1e-6)


def test_classes_are_listed_and_searched(capsys, tmp_path):
    code, printed, _ = cli(capsys, "classes", "resnet18", "ESPR")
    rows = [line.split(maxsplit=1)[0] for line in printed.splitlines()]
    assert (code, rows) == (0, ["index", "550", "967"])
    assert cli(capsys, "classes", "resnet18", "dragon")[0] == 0
    assert cli(capsys, "classes", "resnet18", "nothing of the kind")[0] == 2


def test_names_known_before_the_imports_are_those_of_the_package():
    assert set(SELECTORS) == {
        name for name in registered_selectors() if find_selector(name).kind.__module__.startswith("parchgrad")
    }
    for name in complete_models(""):
        check_network_name(name)
    assert set(complete_data("")) | {"folder"} == set(DATA_SETS)


def test_mistakes_are_found_before_the_slow_imports(coffee):
    for options in (["--quantile", "3"], ["--selector", "evidnce"], ["--weights", "nowhere.pth"], ["nowhere.png"]):
        code = f"""
import sys
from parchgrad.cli import main
try:
    main(["explain", {str(coffee)!r}, *{options!r}])
except SystemExit as stopped:
    assert stopped.code == 2, stopped.code
assert "torch" not in sys.modules
"""
        done = python("-c", code)
        assert done.returncode == 0, done.stderr


def test_names_are_completed(tmp_path):
    for words, expected in (
        ("explain --selector ev", "evidence"),
        ("explain --conserve en", "energy"),
        ("expl", "explain"),
    ):
        surroundings = {
            "_PARCHGRAD_COMPLETE": "complete_bash",
            "COMP_WORDS": f"parchgrad {words}",
            "COMP_CWORD": str(len(words.split())),
        }
        done = subprocess.run(
            [Path(sys.executable).with_name("parchgrad")],
            env={**os.environ, **surroundings},
            capture_output=True,
            text=True,
            check=False,
        )
        assert expected in done.stdout.split(), done.stderr
