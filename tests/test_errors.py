"""Errors and warnings: what is said, in which class, where, how often, and how it ends a command."""

import importlib.util
import io
import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import captum.attr
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import parchgrad as pg
from parchgrad import errors
from parchgrad.cli import main
from parchgrad.data.images import read_image
from parchgrad.data.shapes import GeneratedShapes
from parchgrad.evaluation.runs import evaluate
from parchgrad.evaluation.scores import ScoreSettings
from parchgrad.evaluation.settings import Grid, Setting
from parchgrad.visual.sweeps import quantile_sweep
from tests.support import ROOT, SURROUNDINGS, cli, python, random_statistics, small_network

PACKAGE = Path(pg.__file__).parent

# What is raised beside this package's errors, and why.
OTHERS = {
    ("", "AttributeError"): "a module's __getattr__ has to",
    ("_io.files", "OSError"): "becomes the error of what reads the file",
    ("_io.tensors", "ValueError"): "becomes the error of what reads the file",
    ("cli", "typer.Exit"): "it ends a command",
    ("cli.evaluation", "typer.Exit"): "it ends a command",
    ("cli.photographs", "typer.Exit"): "it ends a command",
    ("cli.shared", "KeyboardInterrupt"): "other signals end a command as Ctrl-C does",
    ("cli.statistics", "typer.Exit"): "it ends a command",
    ("data.shapes", "IndexError"): "ends a loop over the items",
    ("evaluation.examples", "ValueError"): "becomes an InputError that names the file",
    ("evaluation.rows", "ValueError"): "becomes an InputError that names the line",
    ("explain.outputs", "mismatch"): "an InputError, if one fits",
    ("explorer.guard", "MultiPartException"): "the web server's own, which it answers",
    ("legacy.attribution_methods", "_within"): "a NonFiniteError with the name of a layer of the user's",
    ("legacy.pickles", "_RefusedError"): "becomes a StatisticsError that names the file",
    ("models.own_networks", "ValueError"): "becomes an InputError that names the file",
    ("statistics.accumulate", "ValueError"): "becomes a StatisticsError that names the checkpoint",
    ("statistics.batches", "type"): "an error of this package that a loading process raised",
    ("statistics.checkpoint", "ValueError"): "becomes a StatisticsError that names the file",
    ("statistics.collect", "ValueError"): "becomes a StatisticsError that names the checkpoint",
    ("workflows.evaluation", "reason"): "a SettingError of the settings, out of pydantic's error",
    ("workflows.report_page", "ValueError"): "becomes an InputError that names the file",
}
# What has no remedy or no full stop of its own, and why.
UNSTYLED = {
    "Drop an image or choose an example.": "asks for what is missing",
    "«reason»": "ends with an error of this package",
}


@pytest.fixture(scope="module")
def source():
    pytest.importorskip("sphinx", reason="The page of errors is made by an extension of Sphinx.")
    path = ROOT / "docs" / "extensions" / "error_messages.py"
    spec = importlib.util.spec_from_file_location("error_messages", path)
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their own module up.
    sys.modules["error_messages"] = module
    try:
        spec.loader.exec_module(module)
        yield module.Source(PACKAGE)
    finally:
        del sys.modules["error_messages"]


def test_only_errors_of_this_package_are_raised(source):
    found = {(raised.module, raised.made.split("(")[0]) for raised in source.others}
    assert found == set(OTHERS)


def test_every_message_is_a_sentence_with_a_remedy(source):
    assert len(source.messages) > 300
    used = set()
    for message in source.messages:
        text, place = message.text, f"{message.module}:{message.line}"
        excuse = next((words for words in UNSTYLED if text.endswith(words)), None)
        used.add(excuse)
        if excuse is None:
            assert re.search(r"[^.]\.$", text), place
            # What is wrong, then what to give: in a sentence of its own, or as a requirement.
            remedy = re.search(r"[.] [A-Z`«]|\b(must|needs?|needed)\b|; see \w+\(\)", text)
            assert remedy or "Warning" in message.kind, place
            assert not re.search(r"[!?] [A-Z]", text), place
        assert "\n" not in text, place
        assert not re.search(r"/(work|tmp|home|root|usr)\b", text), place
    assert used == {None, *UNSTYLED}, "what is excused is there"


def test_messages_are_read_off_the_source_with_places_and_halves(source):
    said = {message.text: message for message in source.messages}
    # Of a helper that makes errors, of a common check, with alternatives, and a warning.
    (empty,) = [m for text, m in said.items() if "has an empty box" in text]
    assert empty.kind == "ImageError"
    assert empty.text.startswith("The annotation «path» has an empty box («left», «top», «right», «bottom»). ")
    wrong, remedy = empty.halves()
    assert wrong.endswith("«bottom»).")
    assert remedy == "Replace it with the file from ILSVRC's archive."
    (check,) = [m for text, m in said.items() if text.startswith("The attribution is of type «type», but a Tensor is")]
    assert (check.kind, check.module) == ("InputError", "explain.heatmap")
    remedy = "the share of channels at or above the threshold."
    quantile = said[f"`quantile` is «quantile», but it must lie in (0, 1]: {remedy}"]
    assert quantile.halves() == (
        "`quantile` is «quantile».",
        f"It must lie in (0, 1]: {remedy}",
    )
    assert {m.module for m in source.messages if m.kind == "ModelWarning"} == {
        "core.engine",
        "core.passes",
        "explain.explainer",
        "models.own_networks",
        "workflows.evaluation",
        "workflows.photographs",
    }
    assert {m.module for m in source.messages if m.kind == "StatisticsWarning"} == {
        "statistics.batches",
        "statistics.store",
    }


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What the lines below take."""
    shapes = pg.load_model("shapes")
    folder = tmp_path_factory.mktemp("given")
    return {
        "C": shapes,
        "m": shapes.model,
        "S": GeneratedShapes(count=2, seed=0),
        "x": torch.rand(2, 3, 64, 64),
        "E": pg.Explainer(shapes.model, pg.GradientEnergy()),
        "image": Image.new("RGB", (70, 70)),
        "stats": random_statistics({"0": 6, "2": 6}),
        "net": small_network(),
        "folder": folder,
        "sweep": quantile_sweep,
        "Saliency": captum.attr.Saliency,
        "nan": math.nan,
        **{item.__name__: item for item in (evaluate, Grid, Setting, ScoreSettings, GeneratedShapes, read_image)},
        "pg": pg,
        "np": np,
        "nn": nn,
        "torch": torch,
    }


WRONG = """
evaluate(C, S, Grid().settings(), folder) | ModelError: The model is a Classifier,.* its .model
evaluate(m, S, Grid(), folder) | SettingError: grid.settings()
evaluate(m, S, Setting(), folder) | SettingError: a list of settings is needed
evaluate(m, S, "gradient", folder) | SettingError: An item of `settings` is of type str
evaluate(m, S, ["gradient"], folder) | SettingError: An item of `settings` is of type str
evaluate(m, S, Grid().settings(), folder, batch_size="2") | SettingError: `batch_size` is '2'
evaluate(m, S, Grid().settings(), folder, batch_size=True) | SettingError: `batch_size` is True
evaluate(m, S, Grid().settings(), folder, batch_size=1.5) | SettingError: `batch_size` is 1.5
evaluate(m, S, Grid().settings(), folder, scores=["perturbation"]) | SettingError: ScoreSettings
evaluate(m, S, Grid().settings(), folder, methods=["gradient"]) | SettingError: `methods` is of type list
evaluate(m, S, Grid().settings(), folder, statistics="x") | StatisticsError: ChannelStatistics.load
evaluate(m, "photos", Grid().settings(), folder) | SettingError: `data` is of type str
evaluate(m, [(x[0], 1)], Grid().settings(), folder) | SettingError: LabelledImages
ScoreSettings(steps="2") | SettingError: `steps` is '2'
ScoreSettings(draws=True) | SettingError: `draws` is True
Grid(selectors="energy") | SettingError: pass \\('energy',\\)
Grid(methods="gradient") | SettingError: pass \\('gradient',\\)
Grid(quantiles=0.1) | SettingError: `quantiles` is 0.1
Grid(layers=0.5) | SettingError: `layers` is 0.5
Setting(selector="energy", quantile="0.1") | SettingError: `quantile` is '0.1'
Setting(gamma=None) | SettingError: `gamma` is None
Setting(balance=0) | SettingError: `balance` is of type int
Grid(balances=True) | SettingError: `balances` is True
Setting(method=None) | SettingError: `method` is of type NoneType
GeneratedShapes(count=True) | SettingError: `count` is True
GeneratedShapes("10") | SettingError: `count` is '10'
GeneratedShapes(10.0) | SettingError: `count` is 10.0
stats.restrict(layers=0.75) | StatisticsError: `layers` is 0.75,
stats.restrict(layers="0") | StatisticsError: `layers` is '0'
stats.restrict(classes=3) | StatisticsError: `classes` is 3
stats.restrict(classes=["dog"]) | StatisticsError: not class dog
stats.compact(share="0.5") | SettingError: `share` is '0.5'
stats.compact(share=True) | SettingError: `share` is True
stats.save(None) | OutputError: `path` is of type NoneType
stats.save(folder) | OutputError: not a regular file
stats.check_model(C) | ModelError: its .model
pg.ChannelStatistics.load(folder) | StatisticsError: is a folder
pg.ChannelStatistics.load(None) | StatisticsError: `path` is of type NoneType
pg.ChannelStatistics.bundled(None) | StatisticsError: for None
pg.merge_statistics(["a.safetensors"]) | StatisticsError: A part is of type str
pg.collect_statistics(m, ["a.jpg", "b.jpg"]) | StatisticsError: inputs of type str
pg.collect_statistics(m, "folder") | StatisticsError: inputs of type str
pg.collect_statistics(m, folder) | SettingError: `data` is a PosixPath
pg.collect_statistics(C, [(x[0], 0), (x[1], 1)]) | ModelError: its .model
pg.collect_statistics(m, [(x[0], "disc"), (x[1], "ring")]) | StatisticsError: labels of type tuple
pg.collect_statistics(m, [(x[0], 0), (x[1], 1)], batch_size=True) | SettingError: `batch_size` is True
pg.collect_from_folder(m, folder) | ModelError: `classifier` is of type ShapesNetwork
pg.collect_from_folder(C, None) | ImageError: `root` is of type NoneType
pg.Explainer(m, pg.GradientEnergy) | SettingError: such as GradientEnergy\\(\\)
pg.ParchGrad(m, pg.GradientEnergy) | SettingError: such as GradientEnergy\\(\\)
pg.Explainer(m, "energy") | SettingError: `selector` is 'energy'
pg.Explainer(C, pg.GradientEnergy()) | ModelError: its .model
pg.Explainer("resnet18", pg.GradientEnergy()) | ModelError: The model is a str
pg.Explainer(nn.Sequential, pg.GradientEnergy()) | ModelError: The model is a type
pg.Explainer(m, None, method=None) | SettingError: `method` is of type NoneType
pg.Explainer(m, None, method=Saliency) | SettingError: `method` is of type type
pg.Explainer(m, None, method=["gradient"]) | SettingError: `method` is of type list
pg.Explainer(m, None, internal_batch_size=True) | SettingError: `internal_batch_size` is True
pg.Explainer(m, None, method="smoothgrad", samples=True) | SettingError: `samples` is True
pg.Explainer(m, None, method="smoothgrad", samples="25") | SettingError: `samples` is '25'
pg.Explainer(m, None, method="smoothgrad", sigma=True) | SettingError: `sigma` is True
pg.Explainer(m, None, method="smoothgrad", seed=2**70) | SettingError: `seed` is 11805
pg.Explainer(m, None, method="integrated_gradients", n_steps=True) | SettingError: `n_steps` is True
pg.Explainer(m, pg.GradientEnergy(), gamma="inf") | SettingError: `gamma` is 'inf'
pg.Explainer(m, pg.GradientEnergy(), gamma=True) | SettingError: `gamma` is True
pg.Explainer(m, pg.GradientEnergy(), conserve=["exact"]) | SettingError: `conserve` is \\['exact'\\]
pg.Explainer(m, pg.GradientEnergy(), layers=True) | LayerError: `layers` is True
pg.Explainer(m, pg.GradientEnergy(), layers=nan) | LayerError: ratio nan
pg.Explainer(m, pg.GradientEnergy(), layers={"conv1"}) | LayerError: `layers` is {'conv1'}
E.attribute(x.numpy()) | InputError: type ndarray
E.attribute(image) | InputError: type Image
E.attribute(x[0]) | InputError: inputs.unsqueeze
E.attribute(x, "disc") | TargetError: `target` is 'disc'
E.attribute(x, 1.0) | TargetError: torch.float32
E.attribute(x, True) | TargetError: torch.bool
pg.heatmap(np.ones((1, 3, 4, 4))) | InputError: The attribution is of type ndarray
pg.heatmap(None) | InputError: The attribution is of type NoneType
pg.heatmap(torch.ones(1, 3, 4, dtype=torch.int64)) | InputError: torch.int64
pg.signed_heatmap(np.ones((1, 3, 4, 4))) | InputError: The attribution is of type ndarray
pg.load_model(5) | ModelError: `name` is of type int
pg.load_model(None) | ModelError: `name` is of type NoneType
pg.load_model(net) | ModelError: Classifier
pg.load_model("resnet18", weights=5) | SettingError: no weights 5
pg.get_pretrained_model(5) | ModelError: `name` is of type int
pg.explain_images(C, "photo.jpg", pg.Edit()) | InputError: `images` is of type str
pg.explain_images(C, image, pg.Edit()) | InputError: `images` is of type Image
pg.explain_images(C, x, pg.Edit()) | InputError: `images` is of type Tensor
pg.explain_images(C, ["photo.jpg"]) | InputError: The image is of type str,.*read_image
pg.explain_images(C, [x[0]]) | InputError: The image is of type Tensor
pg.explain_images(C, [np.zeros((70, 70, 3), np.uint8)]) | InputError: fromarray
pg.explain_images(m, [image]) | ModelError: `classifier` is of type ShapesNetwork
pg.explain_images("resnet18", [image]) | ModelError: `classifier` is of type str
pg.explain_images(C, [image], None) | SettingError: `edit` is of type NoneType
pg.explain_images(C, [image], pg.GradientEnergy()) | SettingError: `edit` is of type GradientEnergy
pg.explain_images(C, [image], internal_batch_size=None) | SettingError: `internal_batch_size` is None
pg.explain_images(C, [image], internal_batch_size=True) | SettingError: `internal_batch_size` is True
pg.explain_images(C, [image, image], names=["a"]) | SettingError: a list of 2
pg.explain_images(C, [image], names="a") | SettingError: a list of 1
pg.explain_images(C, [image], method_options=5) | SettingError: `method_options` is of type int
sweep(m, image) | ModelError: `classifier` is of type ShapesNetwork
sweep(C, image, quantiles=0.1) | SettingError: `quantiles` is 0.1
sweep(C, image, quantiles="0.1") | SettingError: `quantiles` is '0.1'
C.predict(x.numpy()) | InputError: type ndarray
C.predict(x[0]) | InputError: inputs.unsqueeze
C.predict(x, count="3") | SettingError: `count` is '3'
C.preprocess("photo.jpg") | InputError: The image is of type str
C.find_category(3.5) | TargetError: The class is of type float
read_image(None) | ImageError: `path` is of type NoneType
read_image(["a.jpg"]) | ImageError: `path` is of type list
pg.choose_layers(C, 0.5) | ModelError: its .model
pg.find_convolutions("resnet18") | ModelError: The model is a str
pg.get_hook_wrapper("shapes", m, ["cls"]) | SettingError: `method` is
pg.GradientEnergy(quantile="0.1") | SettingError: `quantile` is '0.1'
pg.GradientEnergy(quantile=True) | SettingError: `quantile` is True
pg.GradientEnergy(quantile=nan) | SettingError: `quantile` is nan
pg.GradientEnergy(quantile=10) | SettingError: `quantile` is 10
pg.GradientEnergy(softness="0.5") | SettingError: `softness` is '0.5'
pg.GradientEnergy(softness=2) | SettingError: `softness` is 2
pg.Edit(selector=pg.Evidence) | SettingError: `selector` is Evidence
pg.Edit(gates=-1) | SettingError: `gates` is -1
pg.Edit(antialias=1) | SettingError: `antialias` is of type int
pg.Edit(balance="off") | SettingError: `balance` is of type str
pg.Explainer(m, gates=nan) | SettingError: `gates` is nan
pg.ParchGrad(m, None, gates="wide") | SettingError: `gates` is 'wide'
pg.Explainer(m, layers="published") | LayerError: ShapesNetwork
pg.Explainer(m, layers="default") | LayerError: 'default'
pg.GradientTimesActivation(quantile=[0.1]) | SettingError: `quantile` is \\[0.1\\]
pg.RandomChannels(seed="a") | SettingError: `seed` is 'a'
pg.Evidence(positions="0.5") | SettingError: `positions` is '0.5'
pg.Evidence(positions=True) | SettingError: `positions` is True
pg.ClassWise(stats, alpha="0.1") | SettingError: `alpha` is '0.1'
pg.ClassWise(stats, quantile=True) | SettingError: `quantile` is True
pg.ClassWise(stats, quantile=0.1, normality_threshold="0.05") | SettingError: `normality_threshold` is '0.05'
pg.ClassWise(stats, quantile=0.1, normality_threshold=True) | SettingError: `normality_threshold` is True
pg.ClassWise("lite0.safetensors", quantile=0.1) | StatisticsError: `statistics` is a str
pg.FixedChannels({"0": [True, False]}) | SettingError: of type list
pg.FixedChannels({"0": np.ones(3, bool)}) | SettingError: of type ndarray
pg.FixedChannels(None) | SettingError: `masks` is of type NoneType
pg.partition_gradient(torch.ones(1, 2, 3), [[True, False]]) | SettingError: `channel_weights` is of type list
pg.partition_gradient(torch.ones(1, 1, 3, dtype=torch.int64), torch.ones(1, 1) > 0) | SettingError: torch.int64
"""
ROWS = [line.split(" | ") for line in WRONG.strip().splitlines()]


@pytest.mark.parametrize(("typed", "said"), ROWS, ids=[typed for typed, _ in ROWS])
def test_what_people_type_wrong(given, typed, said):
    kind, words = said.split(": ", 1)
    with pytest.raises(getattr(errors, kind)) as caught:
        eval(typed, dict(given))
    message = str(caught.value)
    assert re.search(words, message)
    assert re.search(r"[^.]\.$", message)
    assert "\n" not in message
    assert "site-packages" not in message
    assert str(PACKAGE) not in message


def test_numbers_of_numpy_serve_as_numbers(given):
    x, model = given["x"], given["m"]
    plain = pg.Explainer(model, pg.GradientEnergy(quantile=0.5), layers=0.5, gamma=2.0, internal_batch_size=1)
    same = pg.Explainer(
        model,
        pg.GradientEnergy(quantile=np.float32(0.5)),
        layers=np.float32(0.5),
        gamma=np.float64(2),
        internal_batch_size=np.int64(1),
    )
    assert torch.equal(plain.attribute(x, 1), same.attribute(x, np.int64(1)))
    noisy = {"method": "smoothgrad", "samples": 2, "sigma": 0.5, "seed": 3}
    same = {"method": "smoothgrad", "samples": np.int64(2), "sigma": np.float32(0.5), "seed": np.int64(3)}
    assert torch.equal(
        pg.Explainer(model, None, **noisy).attribute(x, 1), pg.Explainer(model, None, **same).attribute(x, 1)
    )
    (found,) = pg.explain_images(
        given["C"],
        [given["image"]],
        pg.Edit(
            selector=pg.GradientEnergy(quantile=np.float32(0.5), softness=np.float32(0.25)),
            layers=np.float32(0.5),
            gamma=np.float32(2),
            gates=np.float32(2),
        ),
    )
    assert found.manifest()["settings"]["selector"] == {"name": "GradientEnergy", "quantile": 0.5, "softness": 0.25}
    assert Setting(selector="energy", quantile=np.float32(0.5)) == Setting(selector="energy", quantile=0.5)
    assert Setting(selector="energy", layers=["a*"]) == Setting(selector="energy", layers=("a*",))
    assert GeneratedShapes(np.int64(10), seed=np.int64(3)).fingerprint == GeneratedShapes(10, seed=3).fingerprint
    held = given["stats"].restrict(classes=torch.tensor([2, 0]))
    assert held.class_indices == (0, 2)


def test_warnings_are_shown_once_for_each_cause_and_name_the_users_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        from dataclasses import replace
        import torch
        from torch import nn
        import parchgrad as pg
        class Net(nn.Module):
            def __init__(self, idle):
                super().__init__()
                self.used, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
                self.idle = nn.ModuleList(nn.Conv2d(3, 4, 3) for _ in range(idle))
            def forward(self, x):
                return self.head(self.used(x).mean((2, 3)))
        x = torch.rand(2, 3, 8, 8)
        for idle in (1, 2):
            explainer = pg.Explainer(Net(idle).eval(), pg.GradientEnergy(), layers="*")
            for _ in range(50):
                explainer.attribute(x, 0)  # idle
        for _ in range(50):
            with pg.ParchGrad(Net(0).eval(), pg.GradientEnergy(), layers="all"):  # empty
                pass
        images = [(torch.rand(3, 8, 8), int(index == 0)) for index in range(5)]
        found = pg.collect_statistics(Net(0).eval(), images)
        for _ in range(50):
            selector = pg.ClassWise(found, quantile=0.1)  # single
        for share in (0.2, 0.3):
            replace(selector, quantile=share)  # replaced
            found.compact(share=share)  # compact
        """)
    )
    ended = python(script)
    assert ended.returncode == 0, ended.stderr
    lines = script.read_text().splitlines()
    found = re.findall(r"^(.*):(\d+): (\w+): (.*)$", ended.stderr, flags=re.MULTILINE)
    assert {file for file, *_ in found} == {str(script)}
    comments = [lines[int(number) - 1].split("# ")[1] for _, number, *_ in found]
    assert comments == ["idle", "idle", "empty", "single", "replaced", "compact"]
    idle = [text for _, _, kind, text in found if kind == "ModelWarning"]
    assert [text[:13] for text in idle] == ["1 of 2 chosen", "2 of 3 chosen", "Nothing was e"]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.toml").write_text("model = [")
    Image.new("RGB", (70, 70), "red").save(tmp_path / "red.png")
    return tmp_path


# Images of one colour are of no class.
@pytest.mark.filterwarnings("default::parchgrad.errors.StatisticsWarning", "default:The explained class is improbable")
def test_a_warning_is_said_once_by_a_command(desk, capsys):
    model = pg.load_model("shapes").model
    images = [(torch.rand(3, 64, 64), int(index == 0)) for index in range(5)]
    pg.collect_statistics(model, images, layers=0.5).save("few.safetensors")
    Image.new("RGB", (70, 70), "blue").save("blue.png")
    asked = ["--model", "shapes", "--selector", "class", "--statistics", "few.safetensors", "--target", "0"]
    for command in (["sweep", "--values", "0.5,0.2", "--layers", "0.5"], ["explain", "--layers", "0.5"]):
        code, _, said = cli(capsys, command[0], "red.png", "blue.png", *asked, *command[1:], "--out", command[0])
        assert code == 0
        assert said.count("fewer than two images") == 1
        assert "Note: 1 of 10 classes" in said


# For every command a file that is missing, a folder for a file, and what is unknown or out of range.
MISTAKES = """
explain none.png
explain folder
explain bad.toml
explain red.png --model nonsuch
explain red.png --model shapes --target dragon
explain red.png --model shapes --target 99
explain red.png --model shapes --quantile 10
explain red.png --model shapes --quantile ten
explain red.png --model shapes --layers nope
explain red.png --model shapes --layers 7
explain red.png --model shapes --layers ,
explain red.png --model shapes --gamma -1
explain red.png --model shapes --method nope
explain red.png --model shapes --selector class
explain red.png --model shapes --out red.png
explain red.png --nope
sweep none.png
sweep folder
sweep red.png --model nonsuch
sweep red.png --model shapes --values a,b
sweep red.png --model shapes --values 0,2
sweep red.png --model shapes --columns 0
sweep red.png --model shapes --target dragon
animate none.png
animate folder
animate red.png --model nonsuch
animate red.png --format bmp
animate red.png --most-kilobytes ten
models zzz
models --nope
demo --out red.png
demo --nope
evaluate
evaluate none.toml
evaluate folder
evaluate bad.toml
evaluate red.png
evaluate --model nonsuch --data shapes --count 2
evaluate --model shapes --data nonsuch
evaluate --model shapes --data shapes
evaluate --model shapes --data shapes --count ten
evaluate --model shapes --data shapes --count 0
evaluate --model shapes --data shapes --count 2 --device warp
evaluate --model shapes --data shapes --count 2 --quantile 10
evaluate --model shapes --data shapes --count 2 --layers nope
evaluate --model shapes --data shapes --count 2 --selector nope
evaluate --model shapes --data shapes --count 2 --scores nope
evaluate --model shapes --data shapes --count 2 --batch-size 0
evaluate --model shapes --data shapes --count 2 --out red.png
evaluate --model shapes --data folder --root none
report
report none
report folder
report red.png
report folder --confidence 2
stats nope
stats collect
stats collect --data none -o x
stats collect --data red.png -o x
stats collect --data folder -o x
stats collect --data . -o x --model nonsuch
stats collect --data . -o folder
stats collect --data . -o x --device warp
stats collect --data . -o x --labels nope
stats collect --data . -o x --labels predicted --model shapes --layers nope
stats collect --data . -o x --labels predicted --model shapes --workers -1
stats collect --data . -o x --batch-size ten
stats show none
stats show folder
stats show red.png
stats merge
stats merge none -o x
stats merge folder -o x
stats import-pickles none --model shapes -o x
stats import-pickles folder --model nonsuch -o x
explore --port x
explore --nope
nope
"""


@pytest.mark.parametrize("typed", MISTAKES.strip().splitlines())
def test_every_mistake_ends_a_command_with_a_sentence(desk, capsys, typed):
    before = sorted(desk.rglob("*"))
    code, out, said = cli(capsys, *typed.split(" "))
    assert code == 2
    assert "Traceback" not in said
    # Words that no command knows are answered by Typer, in a box.
    usage = said.startswith("Usage:")
    assert usage or (said.startswith("Error: ") and said.count("\n") == 1 and said.endswith(".\n")), said
    assert not out
    # An evaluation makes its folder before it asks for the weights.
    assert sorted(desk.rglob("*")) == before


def test_ctrl_c_leaves_no_traceback(desk, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("parchgrad.data.images.read_image", interrupted)
    code, _, said = cli(capsys, "explain", "red.png")
    assert code == 130
    assert "Traceback" not in said


def test_letters_that_a_terminal_lacks_are_written_as_numbers(desk, monkeypatch):
    Image.new("RGB", (70, 70), "red").save("k\N{LATIN SMALL LETTER A WITH DIAERESIS}se.png")
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    endings = []
    for name in ("k\N{LATIN SMALL LETTER A WITH DIAERESIS}se.png", "\N{LATIN SMALL LETTER O WITH DIAERESIS}.png"):
        with pytest.raises(SystemExit) as ended:
            main(["explain", name, "--model", "shapes", "--out", "out"])
        endings.append(ended.value.code)
    for stream in streams.values():
        stream.flush()
        assert stream.errors == "strict", "as it was before"
    assert endings == [0, 2]
    assert rb"k\xe4se.png" in streams["stdout"].buffer.getvalue()
    assert rb"There is no file '\xf6.png'" in streams["stderr"].buffer.getvalue()


def test_a_narrow_terminal_folds_no_error(desk, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    code, _, said = cli(capsys, "explain", "none.png")
    assert (code, said) == (2, "Error: There is no file 'none.png'. Check the path.\n")


@pytest.mark.skipif(os.name == "nt", reason="Windows has other pipes.")
@pytest.mark.parametrize("ending", ["| head -1", ">&-", ">&- 2>&-"])
def test_output_that_nobody_reads_leaves_no_traceback(desk, ending):
    command = f"'{sys.executable}' -m parchgrad --help {ending}"
    ended = subprocess.run(command, shell=True, **SURROUNDINGS, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0
    assert not ended.stderr
