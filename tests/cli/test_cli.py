import io
import json
import pickle
import re
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torchvision.transforms.functional import to_tensor
from typer.main import get_command

import parchgrad
from parchgrad.cli import app, main
from parchgrad.cli.shared import interrupted_by_signals
from parchgrad.data.images import read_image
from parchgrad.data.preprocessing import Preprocessing
from parchgrad.errors import SettingError
from parchgrad.evaluation.settings import Grid
from parchgrad.models import loading as models
from parchgrad.models.classifier import Classifier
from parchgrad.models.detector import load_detector
from parchgrad.statistics.selectors import find_selector, registered_selectors
from parchgrad.visual import save_figure
from parchgrad.visual.animation import MOST_BYTES
from parchgrad.visual.maps import COLOUR_MAP, DPI
from parchgrad.visual.sweeps import quantile_sweep
from tests.support import cli, needs_links


@pytest.fixture(scope="session")
def coffee_bytes():
    file = io.BytesIO()
    Image.fromarray(data.coffee()).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def coffee(tmp_path, coffee_bytes):
    path = tmp_path / "coffee.png"
    path.write_bytes(coffee_bytes)
    return path


def test_explain_compares_with_another_class(capsys, coffee, tmp_path):
    for versus, index in (("cup", 968), ("rest", "rest")):
        out = tmp_path / versus
        code, printed, _ = cli(capsys, "explain", coffee, "--target", "espresso", "--versus", versus, "--out", out)
        assert code == 0
        assert "espresso (9" in printed
        assert json.loads((out / "coffee.json").read_text())["settings"]["against"] == index
    assert not np.array_equal(*(np.load(tmp_path / name / "coffee.npy") for name in ("cup", "rest")))
    code, _, said = cli(capsys, "explain", coffee, "--target", "cup", "--versus", "cup", "--out", tmp_path / "same")
    assert code == 2
    assert "--versus is 968, the class that is explained in image 1" in said


def test_explain_takes_a_box_of_a_detector(capsys, coffee, tmp_path, monkeypatch):
    torch.manual_seed(0)
    detector = load_detector("ssdlite320_mobilenet_v3_large", pretrained=False)
    monkeypatch.setattr("parchgrad.models.detector.load_detector", lambda name: detector)
    found = next(each for each in detector.detect(to_tensor(read_image(coffee))) if each.box[2] - each.box[0] > 40)
    corners = ",".join(map(str, found.box))
    options = ["--model", detector.name, "--label", found.category, "--no-balance", "--out", tmp_path / "out"]
    code, printed, said = cli(capsys, "explain", coffee, "--box", corners, *options)
    assert code == 0, said
    assert found.category in printed
    settings = json.loads((tmp_path / "out" / "coffee.json").read_text())["settings"]
    assert settings["box"] == list(found.box)
    assert np.load(tmp_path / "out" / "coffee.npy").shape == (3, *read_image(coffee).size[::-1])
    for wrong, words in (
        (["--box", "1,2,3"], "four numbers"),
        (["--box", "a"], "four numbers"),
        (["--box", corners, "--versus", "cup"], "--versus is set"),
        (["--box", corners, "--target", "cup"], "--target is set"),
        ([], "--box and --label belong together"),
    ):
        code, _, said = cli(capsys, "explain", coffee, *wrong, *options[:-1], tmp_path / "wrong")
        assert code == 2
        assert words in said


@pytest.mark.filterwarnings("always:The explained class is improbable:parchgrad.errors.ModelWarning")
def test_explain_writes_panel_map_and_manifest(capsys, coffee, tmp_path):
    out = tmp_path / "out"
    options = [
        "--target",
        "cup",
        "--quantile",
        "0.2",
        "--layers",
        "blocks.5.*",
        "--layers",
        "conv_head",
        "--gamma",
        "3",
    ]
    options += ["--conserve", "exact", "--selector", "activation", "--method", "input_x_gradient", "--out", out]
    options += ["--softness", "0.25", "--gates", "2", "--no-antialias", "--no-balance"]
    code, printed, said = cli(capsys, "explain", coffee, *options)
    assert code == 0
    assert "cup" in printed
    # Cup has 2%.
    assert re.search(r"Note: .* coffee\.png \(cup, ", said)
    assert "espresso (9" in printed
    assert sorted(path.name for path in out.iterdir()) == ["coffee.json", "coffee.npy", "coffee.png"]
    settings = json.loads((out / "coffee.json").read_text())["settings"]
    assert settings["selector"] == {"name": "GradientTimesActivation", "quantile": 0.2, "softness": 0.25}
    assert (settings["gates"], settings["antialias"], settings["balance"]) == (2.0, False, False)
    assert settings["layers_choice"] == ["blocks.5.*", "conv_head"]
    assert settings["layers"][-1] == "conv_head"
    assert (settings["gamma"], settings["conserve"], settings["method"]) == (3.0, "exact", "input_x_gradient")
    assert (settings["model"], settings["target_choice"]) == ("efficientnet_lite0", 968)
    assert np.load(out / "coffee.npy").shape == (3, 224, 224)


def test_figures_are_drawn_as_asked(capsys, coffee, tmp_path):
    out = tmp_path / "out"
    options = ["--model", "shapes", "--signed", "--format", "svg", "--dpi", "60", "--out", out]
    look = ["--shared-scale", "--smooth", "2", "--colormap", "viridis"]
    code, _, said = cli(capsys, "explain", coffee, *options, *look)
    assert (code, said) == (0, "")
    assert sorted(path.name for path in out.iterdir()) == [
        "coffee-signed.svg",
        "coffee.json",
        "coffee.npy",
        "coffee.svg",
    ]
    (found,) = parchgrad.explain_images(parchgrad.load_model("shapes"), [Image.fromarray(data.coffee())])
    shown = {"shared_scale": True, "smooth": 2.0}
    for name, figure in (
        ("coffee", found.figure(colormap="viridis", **shown)),
        ("coffee-signed", found.signed_figure(**shown)),
    ):
        save_figure(figure, tmp_path / "expected.svg", dpi=60)
        assert (out / f"{name}.svg").read_bytes() == (tmp_path / "expected.svg").read_bytes()


def test_the_defaults_of_the_figures_are_those_of_the_library():
    for name in ("explain", "sweep", "animate"):
        defaults = {parameter.name: parameter.default for parameter in get_command(app).commands[name].params}
        assert defaults["colormap"] == COLOUR_MAP
        assert defaults["shared_scale"] is False
        assert defaults.get("dpi", DPI) == DPI
    assert 1000 * defaults["most_kilobytes"] == MOST_BYTES


@pytest.mark.parametrize("command", ["explain", "sweep", "animate"])
def test_what_cannot_be_drawn_is_refused_before_the_network_is_loaded(capsys, coffee, tmp_path, monkeypatch, command):
    monkeypatch.setattr("parchgrad.models.own_networks.load_model", lambda name, **options: pytest.fail("loaded"))
    for option, value, words in (
        ("--colormap", "virids", "--colormap is 'virids'.* viridis"),
        ("--selector", "none", "--selector is 'none'"),
        ("--smooth", "-1", "--smooth"),
    ):
        code, _, said = cli(capsys, command, coffee, option, value, "--out", tmp_path / "out")
        assert code == 2
        assert re.search(words, said)
    assert not (tmp_path / "out").exists()


def test_the_default_is_the_best_setting(capsys, coffee, tmp_path):
    code, printed, said = cli(capsys, "explain", coffee, "--stability", "--out", tmp_path / "out")
    assert (code, "Warning" in said) == (0, False)
    assert "36 layers edited, blocks." in printed
    classifier = models.load_model("efficientnet_lite0")
    explainer = parchgrad.Explainer(classifier.model)
    inputs = classifier.preprocess(Image.fromarray(data.coffee())).unsqueeze(0)
    found, expected = np.load(tmp_path / "out" / "coffee.npy"), explainer.attribute(inputs)[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    manifest = json.loads((tmp_path / "out" / "coffee.json").read_text())
    assert manifest["stability"]["cosine"] == pytest.approx(explainer.stability(inputs).item(), abs=1e-4)
    (row,) = (line for line in printed.splitlines() if line.startswith("coffee.png"))
    assert f"{manifest['stability']['cosine']:.2f}" in row.split()


def test_the_published_method_is_one_command_away(capsys, coffee, tmp_path):
    options = ["--selector", "class", "--layers", "published", "--softness", "0", "--conserve", "independent"]
    assert cli(capsys, "explain", coffee, *options, "--out", tmp_path / "out")[0] == 0
    classifier = models.load_model("efficientnet_lite0")
    held = parchgrad.ChannelStatistics.bundled("efficientnet_lite0")
    selector = parchgrad.ClassWise(held, quantile=0.1, softness=0)
    names = ["blocks.5.0.conv_dw", "blocks.6.0.conv_dw", "conv_head"]
    explainer = parchgrad.Explainer(
        classifier.model, selector, layers=names, conserve="independent", gates=0.0, antialias=False, balance=False
    )
    expected = explainer.attribute(classifier.preprocess(Image.fromarray(data.coffee())).unsqueeze(0))[0].numpy()
    found = np.load(tmp_path / "out" / "coffee.npy")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    settings = json.loads((tmp_path / "out" / "coffee.json").read_text())["settings"]
    assert (settings["layers"], settings["layers_choice"]) == (names, "published")
    code, _, said = cli(
        capsys, "explain", coffee, "--model", "shapes", "--layers", "published", "--out", tmp_path / "a"
    )
    assert (code, "The paper has no layer set" in said) == (2, True)


def test_an_unstable_map_comes_with_a_warning(capsys, coffee, tmp_path):
    hard = ["--selector", "energy", "--layers", "all", "--softness", "0", "--conserve", "independent"]
    code, printed, said = cli(capsys, "explain", coffee, *hard, "--stability", "--out", tmp_path / "out")
    assert code == 0
    cosine = json.loads((tmp_path / "out" / "coffee.json").read_text())["stability"]["cosine"]
    assert 0 < cosine < 0.5
    assert f"{cosine:.2f}" in printed
    assert said.startswith("Warning: 1 of 1 maps (coffee.png) have a stability below 0.5.")
    assert said.count("\n") == 1
    # Unless it is asked for, nothing is measured.
    code, printed, said = cli(capsys, "explain", coffee, *hard, "--out", tmp_path / "out", "--force")
    assert (code, "stability" in printed, said) == (0, False, "")


def test_images_of_equal_names_do_not_overwrite_each_other(capsys, coffee, tmp_path):
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "coffee.png"
    Image.fromarray(data.camera()).save(other)
    code, said, _ = cli(capsys, "explain", coffee, other, "--out", tmp_path / "out")
    assert code == 0
    found = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("coffee", "coffee-2")}
    assert {name: held["target"]["category"] for name, held in found.items()} == {
        "coffee": "espresso",
        "coffee-2": "tripod",
    }
    # Which is which stands in the table and on record.
    assert found["coffee-2"]["image"] == f"{other} (coffee-2)"
    assert "(coffee-2)" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "espreso"], "Close matches: espresso"),
        (["--target", "4000"], "0 to 999"),
        (["--quantile", "0"], "--quantile is 0.0"),
        (["--quantile", "3"], "'--quantile'"),
        (["--gamma", "0"], "--gamma is 0.0"),
        (["--gamma", "nan"], "'--gamma'"),
        (["--layers", "layer9.*"], "'layer9.*' matches none"),
        (["--layers", "2"], "ratio 2"),
        (["--layers", ","], "--layers is []"),
        (["--method", "magic"], "--method is 'magic'"),
        (["--model", "resnet-18"], "Close matches: resnet18"),
        (["--method", "LRP"], "--method is 'LRP'"),
        (["--method", "GuidedBackprop"], "acts on modules of type ReLU"),
        (["--method", "GradientShap"], "needs `baselines`"),
        (["--selector", "magic"], "--selector is 'magic'"),
        (["--conserve", "magic"], "'exact'"),
        (["--softness", "2"], "'--softness'"),
        (["--gates", "-1"], "'--gates'"),
        (["--layers", "default"], "'default' matches none"),
    ],
)
def test_bad_options_are_one_sentence_and_write_nothing(capsys, coffee, tmp_path, options, words):
    code, printed, errors = cli(capsys, "explain", coffee, *options, "--out", tmp_path / "out")
    assert code == 2
    assert words in " ".join(errors.replace("│", " ").split())
    assert "Traceback" not in errors
    assert printed == ""
    assert not (tmp_path / "out").exists()


class Patches(torch.nn.Module):
    """Cuts images of 8 x 8 into 4 tokens."""

    def forward(self, images):
        return torch.nn.functional.unfold(images, 4, stride=4).transpose(1, 2)


class Tokens(torch.nn.Module):
    """A transformer without convolutions: one embedding, one layer of attention, and a head of three classes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cut, self.embed = Patches(), torch.nn.Linear(48, 8)
        self.norm, self.qkv = torch.nn.LayerNorm(8), torch.nn.Linear(8, 24)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, images):
        tokens = self.embed(self.cut(images))
        attended = torch.nn.functional.scaled_dot_product_attention(*self.qkv(self.norm(tokens)).chunk(3, dim=-1))
        return self.head((tokens + attended).mean(dim=1))


def load_tiny(monkeypatch, model):
    """Make every command load this network of 8 x 8 images and three classes."""

    def shrink(image):
        return torch.from_numpy(np.asarray(image.resize((8, 8)), dtype=np.float32) / 255).permute(2, 0, 1)

    classifier = Classifier(model.eval(), Preprocessing(shrink, (0.0,) * 3, (1.0,) * 3), ("a", "b", "c"), "tiny")
    monkeypatch.setattr("parchgrad.models.own_networks.load_model", lambda name, **options: classifier)


@pytest.mark.parametrize(
    ("options", "layers", "said"),
    [
        ([], ["embed"], "embed edited"),
        (["--layers", "qkv,embed", "--selector", "energy"], ["embed", "qkv"], "2 layers edited, embed to qkv"),
    ],
)
def test_layers_without_convolutions_are_named(capsys, coffee, tmp_path, monkeypatch, options, layers, said):
    load_tiny(monkeypatch, Tokens())
    code, printed, errors = cli(capsys, "explain", coffee, *options, "--out", tmp_path / "out")
    assert (code, "Warning" in errors) == (0, False), errors
    assert said in printed.splitlines()
    settings = json.loads((tmp_path / "out" / "coffee.json").read_text())["settings"]
    assert (settings["layers"], settings["balance"]) == (layers, True)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.BatchNorm1d(3)), "no convolution"),
        (torch.nn.Sequential(torch.nn.Conv2d(1, 3, 8), torch.nn.Flatten()), "takes 1 channels"),
    ],
)
def test_networks_that_cannot_be_explained(capsys, coffee, tmp_path, monkeypatch, model, words):
    load_tiny(monkeypatch, model)
    code, _, errors = cli(capsys, "explain", coffee, "--out", tmp_path / "out")
    assert code == 2
    assert words in errors
    assert not (tmp_path / "out").exists()


def test_one_bad_image_stops_all_before_anything_is_written(capsys, coffee, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_text("text")
    code, _, errors = cli(capsys, "explain", coffee, bad, "--out", tmp_path / "out")
    assert code == 2
    assert "bad.jpg' is not a readable image" in errors
    assert errors.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_earlier_results_stay_unless_forced(capsys, coffee, tmp_path):
    arguments = ["explain", coffee, "--model", "shapes", "--out", tmp_path / "out"]
    assert cli(capsys, *arguments)[0] == 0
    code, _, errors = cli(capsys, *arguments)
    assert code == 2
    assert "already exists" in errors
    assert cli(capsys, *arguments, "--force")[0] == 0


def test_models(capsys):
    code, printed, _ = cli(capsys, "models")
    assert code == 0
    assert "efficientnet_lite0   timm          installed" in printed
    assert "resnet50" in printed
    assert "more from timm" in printed
    code, printed, _ = cli(capsys, "models", "convnext_n*")
    assert "convnext_nano" in printed
    assert cli(capsys, "models", "nothing*")[0] == 2


def test_selectors(capsys):
    code, printed, _ = cli(capsys, "selectors")
    assert code == 0
    rows = {line.split()[0]: line for line in printed.splitlines()}
    assert {name: row.endswith("statistics") for name, row in rows.items() if name != "name"} == {
        name: found.needs_statistics for name, found in registered_selectors().items()
    }


def test_errors_name_the_option(capsys, coffee):
    for option, value in (("--quantile", "0"), ("--gamma", "0"), ("--selector", "best")):
        errors = cli(capsys, "explain", coffee, "--model", "shapes", option, value)[2]
        assert f"{option} is" in errors
    errors = cli(capsys, "explain", coffee, "--selector", "random", "--softness", "1")[2]
    assert "--softness" in errors
    assert "random" in errors


def test_version_and_help(capsys):
    assert cli(capsys, "--version")[1].strip() == f"parchgrad {parchgrad.__version__}"
    code, printed, _ = cli(capsys, "--help")
    assert code == 0
    for command in ("explain", "models", "demo"):
        assert command in printed


def test_demo(capsys, tmp_path):
    out = tmp_path / "demo"
    code, printed, _ = cli(capsys, "demo", "--out", out)
    assert code == 0
    rows = [line.split() for line in printed.splitlines()]
    for category in ("espresso", "tripod", "moped", "mean"):
        gradient, best, energy, class_wise = next(
            [float(share) for share in row[1:]] for row in rows if row[:1] == [category]
        )
        assert min(energy, class_wise) > gradient
        assert best > max(0.95, energy, class_wise)
    page = (out / "index.html").read_text()
    # Self-contained: nothing is fetched, every picture is in the page.
    assert page.count("data:image/jpeg;base64,") == 4 * 5 + 1 + 4 * 4
    assert "http" not in page
    assert (out / "overview.jpg").exists()
    assert cli(capsys, "demo", "--out", out)[0] == 2


def test_photographs_are_explained_a_few_at_a_time(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("parchgrad.cli.photographs._AT_ONCE", 2)
    rng, held = np.random.default_rng(0), []
    images = [tmp_path / f"{index}.png" for index in range(5)]
    for path in images:
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    options = ["--model", "shapes", "--layers", "all", "--out"]
    assert cli(capsys, "explain", *images, *options, tmp_path / "all")[0] == 0
    for path in (images[0], images[2], images[4]):
        assert cli(capsys, "explain", path, *options, tmp_path / "one")[0] == 0
        found, alone = (np.load(tmp_path / folder / f"{path.stem}.npy") for folder in ("all", "one"))
        np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-5 * abs(alone).max())

    # What is done stays, whatever becomes of the rest.
    from parchgrad.workflows import photographs as explanation

    explain_images = explanation.explain_images

    def stop(classifier, photographs, *given, **options):
        held.append(len(photographs))
        if len(held) == 3:
            raise KeyboardInterrupt
        return explain_images(classifier, photographs, *given, **options)

    monkeypatch.setattr(explanation, "explain_images", stop)
    code, _, said = cli(capsys, "explain", *images, *options, tmp_path / "stopped")
    assert (code, held) == (130, [2, 2, 1])
    assert "Stopped. 4 of 5 images are done" in said
    assert len([*(tmp_path / "stopped").glob("*.npy")]) == 4


@pytest.fixture
def photographs(tmp_path):
    """Two classes of three photographs each, in folders by WordNet id."""
    pictures = {"n07920052": data.coffee(), "n02123045": data.cat()}
    for synset, picture in pictures.items():
        (tmp_path / "photographs" / synset).mkdir(parents=True)
        for index in range(3):
            Image.fromarray(picture[index * 20 :]).reduce(2).save(tmp_path / "photographs" / synset / f"{index}.png")
    return tmp_path / "photographs"


LAYERS = ("--layers", "blocks.6.0.*,conv_head")


def test_statistics_from_a_folder_to_an_explanation(capsys, photographs, tmp_path, coffee):
    file = tmp_path / "lite0.safetensors"
    options = ["--data", photographs, *LAYERS, "--batch-size", "4", "-o", file]
    code, printed, said = cli(capsys, "stats", "collect", *options)
    assert code == 0, said
    assert "4 layers, 3,904 channels, 2 of 1000 classes, 6 images" in printed
    assert [entry.name for entry in tmp_path.glob("*checkpoint*")] == [".lite0.safetensors.checkpoint.lock"]
    statistics = parchgrad.ChannelStatistics.load(file)
    assert statistics["conv_head"].class_count.nonzero().flatten().tolist() == [281, 967]
    assert statistics.metadata["data"] == "6 photographs in photographs, 2 class folders by WordNet id"

    code, printed, _ = cli(capsys, "stats", "show", file, "--target", "espresso", "--top", "2")
    best = statistics["conv_head"].class_log_p()[:, 967].argsort(stable=True)[:2].tolist()
    (line,) = (line for line in printed.splitlines() if line.startswith("conv_head"))
    assert [int(part.rstrip(":")) for part in line.split() if part.endswith(":")] == best
    assert all(len(line) <= 80 for line in printed.splitlines() if line.startswith(("blocks", "conv")))
    assert "blocks.6.0.conv_dw" in printed
    for command in (["stats", "show", file], ["explain", coffee, "--selector", "class", "--statistics", file, *LAYERS]):
        code, _, said = cli(capsys, *command, "--target", "golden retriever")
        assert code == 2
        assert "no image of class 207" in said
    code, _, said = cli(capsys, "stats", "show", tmp_path)
    assert code == 2
    assert "is a folder." in said
    code, printed, _ = cli(capsys, "stats", "show", file, "--quantile", "0.05")
    (line,) = (line.split() for line in printed.splitlines() if line.startswith("conv_head"))
    gated = int((statistics["conv_head"].shapiro_p < 0.05).sum())
    assert line[1:3] == ["1280", str(gated)]

    for selector, name in (("class", "ClassWise"), ("instance", "InstanceWise")):
        out = tmp_path / selector
        options = ["--selector", selector, "--statistics", file, *LAYERS, "--out", out]
        code, _, said = cli(capsys, "explain", coffee, *options)
        assert code == 0, said
        settings = json.loads((out / "coffee.json").read_text())["settings"]
        assert settings["selector"]["name"] == name
        assert settings["selector"]["statistics"]["data"].startswith("6 photographs")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows does not hang up.")
@pytest.mark.parametrize("earlier", [signal.SIG_IGN, signal.SIG_DFL])
def test_signals_interrupt_but_for_what_nohup_ignores(earlier):
    kept = {number: signal.signal(number, earlier) for number in (signal.SIGHUP, signal.SIGTERM)}
    try:
        with interrupted_by_signals():
            assert (signal.getsignal(signal.SIGHUP) == signal.SIG_IGN) == (earlier == signal.SIG_IGN)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        assert all(signal.getsignal(number) == earlier for number in kept)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


# The command line says it in its own way.
@needs_links
@pytest.mark.filterwarnings("always::parchgrad.errors.StatisticsWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_photograph_costs_itself_alone(capsys, photographs, tmp_path, workers):
    file = tmp_path / "one.safetensors"
    options = ["stats", "collect", "--model", "shapes", "--data", photographs, "--labels", "predicted"]
    options += ["--batch-size", "2", "--workers", workers]
    sound = (photographs / "n02123045" / "1.png").read_bytes()
    # All of the second batch, but for the seventh photograph none that the fingerprint looks at.
    for index in range(3, 6):
        Image.fromarray(data.cat()).reduce(2).save(photographs / "n02123045" / f"{index}.png")
    damaged = [photographs / "n02123045" / "2.png", photographs / "n02123045" / "3.png"]
    for path in damaged:
        path.write_bytes(sound[: len(sound) // 2])
    code, _, said = cli(capsys, *options, "-o", file)
    assert code == 2
    assert "--skip-unreadable" in said
    assert (tmp_path / "one.safetensors.checkpoint").exists()
    assert f"Error: Cannot read '{damaged[0]}'" in " ".join(said.split())
    code, _, said = cli(capsys, *options, "-o", file, "--skip-unreadable")
    assert (code, said.count("Left out: ")) == (0, 2)
    assert all(f"Cannot read '{path}'" in said for path in damaged)
    assert "9/9" in said
    found = parchgrad.ChannelStatistics.load(file)
    assert (found.metadata["images"], found.metadata["left_out"]) == ("7", "2")

    # The first photograph, which the fingerprint looks at, and a link that leads nowhere.
    first, nowhere = photographs / "n02123045" / "0.png", photographs / "n02123045" / "9.png"
    first_sound = first.read_bytes()
    first.write_bytes(sound[: len(sound) // 2])
    nowhere.symlink_to("nowhere.png")
    code, _, said = cli(capsys, *options, "-o", tmp_path / "fewer.safetensors")
    assert code == 2
    assert "--skip-unreadable" in said
    code, _, said = cli(capsys, *options, "-o", tmp_path / "fewer.safetensors", "--skip-unreadable")
    assert (code, said.count("Left out: ")) == (0, 4)
    nowhere.unlink()
    first.write_bytes(first_sound)
    code, _, said = cli(capsys, "stats", "collect", "--data", "nowhere", "-o", file, "--force")
    assert (code, said.strip()) == (2, "Error: There is no folder 'nowhere'. Check the path.")

    # As if they had never been there, but for the order of the sums.
    for path in damaged:
        path.unlink()
    assert cli(capsys, *options, "--workers", 0, "-o", tmp_path / "other.safetensors")[0] == 0
    other = parchgrad.ChannelStatistics.load(tmp_path / "other.safetensors")
    for name, layer in found.items():
        for part in ("mean", "std", "class_mean", "class_variance"):
            torch.testing.assert_close(getattr(layer, part), getattr(other[name], part), rtol=1e-5, atol=1e-8)


def test_statistics_go_on_after_a_stop_and_merge(capsys, photographs, tmp_path, monkeypatch):
    file = tmp_path / "one.safetensors"
    options = ["--data", photographs, "--labels", "predicted", *LAYERS, "--batch-size", "2", "--checkpoint-every", "1"]

    class StoppedError(Exception):
        pass

    def stop(self, stage, done, total):
        if done >= 4:
            raise StoppedError

    # Ctrl-C, and what a cluster sends.
    for number, name in ((signal.SIGINT, "other"), (signal.SIGTERM, "third")):

        def end(self, stage, done, total, number=number):
            signal.raise_signal(number)

        with monkeypatch.context() as patched:
            patched.setattr("parchgrad.cli.shared.ProgressBars.update", end)
            code, _, said = cli(capsys, "stats", "collect", *options, "-o", tmp_path / f"{name}.safetensors")
        assert (code, said.strip()) == (130, "Stopped. Run the same command again to resume from the checkpoint.")
        assert (tmp_path / f"{name}.safetensors.checkpoint").exists()
    with monkeypatch.context() as patched:
        patched.setattr("parchgrad.cli.shared.ProgressBars.update", stop)
        with pytest.raises(StoppedError):
            main([str(part) for part in ["stats", "collect", *options, "-o", file]])
    assert (tmp_path / "one.safetensors.checkpoint").exists()
    code, _, said = cli(capsys, "stats", "collect", *options, "-o", file)
    assert code == 0, said
    assert int(parchgrad.ChannelStatistics.load(file)["conv_head"].count) == 6

    (photographs / "n02123045" / "0.png").unlink()
    other = tmp_path / "two.safetensors"
    assert cli(capsys, "stats", "collect", *options, "--seed", "5", "-o", other)[0] == 0
    code, printed, said = cli(capsys, "stats", "merge", file, other, "-o", tmp_path / "both.safetensors")
    assert code == 0, said
    assert "11 images" in printed
    code, _, said = cli(capsys, "stats", "merge", file, file, "-o", tmp_path / "twice.safetensors")
    assert code == 2
    assert "Parts 1 and 2 " in said


def test_bundled_statistics_need_no_set_up(capsys, coffee, tmp_path):
    code, _, said = cli(capsys, "explain", coffee, "--selector", "class", "--layers", "0.5", "--out", tmp_path / "out")
    assert code == 0, said
    settings = json.loads((tmp_path / "out" / "coffee.json").read_text())["settings"]
    assert settings["selector"]["statistics"]["images"] == "1000"
    bundled = Path(parchgrad.__file__).parent / "statistics" / "bundled" / "efficientnet_lite0.safetensors"
    code, printed, _ = cli(capsys, "stats", "show", bundled)
    assert code == 0
    assert all(len(line) <= 80 for line in printed.splitlines() if not line.startswith("preprocessing"))


def test_pickles_of_the_research_code_are_imported(capsys, tmp_path):
    convolutions = parchgrad.find_convolutions(parchgrad.load_model("resnet18", pretrained=False).model).values()
    channels = [convolution.out_channels for convolution in convolutions]
    lists = {
        "cls_p_values": [torch.rand(count, 1000) for count in channels],
        **{name: [torch.rand(count) for count in channels] for name in ("shapiro_p_values", "gap_mean", "gap_std")},
    }
    for name, tensors in lists.items():
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(tensors, pickle.HIGHEST_PROTOCOL))
    file = tmp_path / "resnet18.safetensors"
    code, printed, said = cli(capsys, "stats", "import-pickles", tmp_path, "--model", "resnet18", "-o", file)
    assert code == 0, said
    assert "20 layers, 4,800 channels, 1000 of 1000 classes" in printed
    code, _, said = cli(capsys, "stats", "import-pickles", tmp_path, "--model", "resnet34", "-o", tmp_path / "other")
    assert code == 2
    assert re.search("20 layers.* resnet34 .*36", said)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["explain", "coffee.png", "--selector", "class", "--model", "resnet18"], "'resnet18'"),
        (["explain", "coffee.png", "--statistics", "coffee.png"], "the selector evidence has none"),
        (["explain", "coffee.png", "--selector", "class", "--statistics", "coffee.png"], "as channel statistics"),
        (["explain", "coffee.png", "--device", "gpu"], "--device is 'gpu'"),
        (["explain", "coffee.png", "--device", "meta"], "--device is 'meta'"),
        (["explain", "coffee.png", "--selector", "class", "--layers", "all"], "such as 'conv_stem'"),
        (["stats", "collect", "--data", ".", "-o", "x"], "outside class folders"),
        (["stats", "collect", "--data", "none", "-o", "x"], "There is no folder 'none'"),
        (["stats", "collect", "--data", ".", "-o", "x", "--device", "warp"], "--device is 'warp'"),
        (["stats", "collect", "--data", ".", "-o", "coffee.png"], "already exists"),
        (["stats", "collect", "--data", ".", "--labels", "predicted", "--batch-size", "0", "-o", "x"], "size is 0"),
        (["stats", "show", "coffee.png"], "as channel statistics"),
        (["stats", "import-pickles", ".", "--model", "resnet18", "-o", "x"], "cls_p_values.pkl"),
    ],
)  # fmt: skip
def test_mistakes_with_statistics_are_one_sentence(capsys, coffee, monkeypatch, arguments, words):
    monkeypatch.chdir(coffee.parent)
    code, _, said = cli(capsys, *arguments)
    assert code == 2
    assert said.startswith("Error: ")
    assert words in said
    assert said.count("\n") == 1


def test_an_evaluation_from_settings_to_a_report(capsys, tmp_path, monkeypatch):
    names = ("espresso", "cup", "tripod")
    for name, picture in zip(names, (data.coffee(), data.coffee()[:, 150:450], data.camera()), strict=True):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.fromarray(picture).save(tmp_path / "photos" / name / "photo.png")
    monkeypatch.chdir(tmp_path)
    Path("study.toml").write_text(
        'model = "efficientnet_lite0"\n[data]\nname = "folder"\nroot = "photos"\n'
        '[grid]\nlayers = [["conv_head"]]\n[scores]\nfamilies = ["sparsity"]\n'
    )
    code, printed, said = cli(capsys, "evaluate", "study.toml", "--out", "runs")
    assert code == 0, said
    assert "parchgrad report runs/efficientnet_lite0" in printed
    written = Path("runs/efficientnet_lite0/rows-0.jsonl").read_text()
    rows = [json.loads(line) for line in written.splitlines()]
    assert len(rows) == 3 * 6
    assert {(row["image"], row["label"]) for row in rows} == {
        ("cup/photo.png", 968),
        ("espresso/photo.png", 967),
        ("tripod/photo.png", 872),
    }
    assert cli(capsys, "evaluate", "study.toml", "--out", "runs")[0] == 0
    assert Path("runs/efficientnet_lite0/rows-0.jsonl").read_text() == written
    code, printed, _ = cli(capsys, "report", "runs/efficientnet_lite0", "--out", "report", "--score", "gini")
    assert code == 0
    assert "efficientnet_lite0, 3 images" in printed
    assert "Evidence: quantile 0.2, softness 1, layers conv_head," in printed
    assert sorted(path.name for path in Path("report").iterdir()) == ["report.csv", "report.html", "report.md"]
    for arguments, words in (
        (("report", "runs/efficientnet_lite0", "--out", "report"), "already exists"),
        (("report", "runs"), "does not contain a run"),
        (("evaluate", "nowhere.toml"), "Cannot read 'nowhere.toml'"),
        (("evaluate", "study.toml", "--device", "moon"), "--device is 'moon'"),
        (("evaluate",), "does not set --model and --data"),
        (("evaluate", "--model", "shapes", "--root", "photos"), "'data.name' is missing"),
        (("evaluate", "--model", "shapes", "--data", "shapes"), "needs 'count'"),
        (("evaluate", "--model", "shapes", "--data", "forms"), "--data is 'forms'"),
        (("evaluate", "study.toml", "--conserve", "all"), "'grid.conserves' in the settings is 'all'"),
        (("evaluate", "study.toml", "--scores", "all"), "'scores.families' in the settings is 'all'"),
        (("evaluate", "study.toml", "--selector", "best"), "--selector is 'best'"),
    ):
        code, _, said = cli(capsys, *arguments)
        assert code == 2
        assert words in said
        assert said.count("\n") == 1


def test_an_evaluation_by_flags_is_that_of_a_file(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(
        "parchgrad.workflows.evaluation.evaluate_all", lambda settings, *_, **__: asked.append(settings) or ()
    )
    Path("study.toml").write_text(
        'model = ["shapes", "resnet18"]\ntarget = "predicted"\nstatistics = "held"\nbatch_size = 2\nseed = 5\n'
        '[data]\nname = "imagenet"\nroot = "photos"\nannotations = "boxes"\ncount = 9\nmosaics = 4\n'
        '[grid]\nmethods = ["smoothgrad", "Saliency"]\nselectors = ["none", "class"]\nquantiles = [0.2, 0.3]\n'
        'layers = ["all", 0.5, "conv1", ["layer3.*", "layer4.*"]]\ngammas = [inf, 2]\nconserves = ["exact", "none"]\n'
        "softnesses = [0, 0.5]\ngates = [0, 2]\nantialiases = [true, false]\nbalances = [true, false]\n"
        '[scores]\nfamilies = ["sparsity", "insertion"]\n'
    )
    flags = shlex.split(
        "--model shapes --model resnet18 --target predicted --statistics held --batch-size 2 --seed 5 "
        "--data imagenet --root photos --boxes boxes --count 9 --mosaics 4 "
        "--method smoothgrad --method Saliency --selector none --selector class --quantile 0.2 --quantile 0.3 "
        "--layers all --layers 0.5 --layers conv1 --layers layer3.*,layer4.* --gamma inf --gamma 2 "
        "--conserve exact --conserve none --softness 0 --softness 0.5 --gates 0 --gates 2 --antialias --no-antialias "
        "--balance --no-balance "
        "--scores sparsity --scores insertion"
    )
    Path("other.toml").write_text(
        'model = "vgg16"\n[data]\nname = "shapes"\ncount = 1\n[grid]\nmethods = ["IntegratedGradients"]\n'
    )
    for arguments in (["study.toml"], flags, ["other.toml", *flags]):
        code, _, said = cli(capsys, "evaluate", *arguments)
        assert code == 0, said
    assert asked[0] == asked[1] == asked[2]


def test_the_help_of_evaluate_says_the_defaults():
    command = get_command(app).commands["evaluate"]
    shown = {parameter.name: getattr(parameter, "show_default", None) for parameter in command.params}
    energy, evidence = (find_selector(name).suits() for name in ("energy", "evidence"))
    softness, other = (find_selector(name).default("softness") for name in ("energy", "evidence"))
    assert shown["selector"] == Grid().selectors[0] == "evidence"
    shares = [find_selector(name).default("quantile") for name in ("energy", "class", "evidence")]
    assert shown["quantile"] == f"{shares[0]:g}, for evidence {shares[2]:g}"
    assert shares[0] == shares[1]
    assert shown["softness"] == f"{softness:g}, for evidence {other:g}"
    assert shown["layers"] == f"{energy.layers:g}, for evidence {evidence.layers}"
    assert shown["conserve"] == energy.conserve == evidence.conserve
    assert (
        shown["gates"] == f"{energy.gates:g}, for evidence {evidence.gates:g}; 0 for a hard cut or without a selector"
    )
    for name in ("antialias", "balance"):
        assert shown[name].startswith("on; off") == getattr(energy, name) == getattr(evidence, name)


def test_a_sweep_is_a_panel_of_the_values(capsys, coffee, tmp_path):
    out = tmp_path / "out"
    options = ["--layers", "0.25", "--values", "0.5,0.1", "--target", "cup", "--columns", "2", "--out", out]
    code, printed, _ = cli(capsys, "sweep", coffee, *options)
    assert code == 0
    assert [path.name for path in out.iterdir()] == ["coffee.png"]
    classifier = parchgrad.load_model("efficientnet_lite0")
    found = quantile_sweep(
        classifier,
        Image.fromarray(data.coffee()),
        parchgrad.Edit(layers=0.25),
        quantiles=(0.5, 0.1),
        target=968,
    )
    for share in found.kept:
        assert f"{share:.1%}" in printed
    save_figure(found.figure(columns=2), tmp_path / "expected.png")
    with Image.open(out / "coffee.png") as drawn, Image.open(tmp_path / "expected.png") as expected:
        assert drawn.size == expected.size
        assert np.abs(np.asarray(drawn, dtype=float) - np.asarray(expected, dtype=float)).mean() < 0.1
    code, _, said = cli(capsys, "sweep", coffee, *options)
    assert (code, "already exists" in said) == (2, True)


def test_a_sweep_over_alpha_needs_a_selector_that_has_one(capsys, coffee, tmp_path):
    options = ["--over", "alpha", "--layers", "0.25", "--out", tmp_path / "out"]
    code, printed, _ = cli(capsys, "sweep", coffee, *options, "--selector", "instance")
    assert code == 0
    assert "alpha" in printed
    assert "mean weight" in printed
    code, _, said = cli(capsys, "sweep", coffee, *options, "--force")
    assert code == 2
    assert re.search("--over is alpha.* evidence", said)


def test_every_option_of_a_sweep_reaches_it(capsys, coffee, tmp_path, monkeypatch):
    asked = {}

    def swept(classifier, image, edit, **others):
        asked.update(others, **vars(edit))
        raise SettingError("Stop here.")

    monkeypatch.setattr("parchgrad.visual.sweeps.quantile_sweep", swept)
    options = ["--selector", "activation", "--values", "0.4,0.2", "--layers", "all", "--gamma", "3"]
    options += ["--conserve", "exact", "--method", "smoothgrad", "--target", "1", "--model", "shapes"]
    options += ["--softness", "0.25", "--gates", "2", "--no-antialias", "--no-balance"]
    for command in ("sweep", "animate"):
        asked.clear()
        assert cli(capsys, command, coffee, *options, "--out", tmp_path / "out")[0] == 2
        assert asked == {
            "selector": parchgrad.GradientTimesActivation(softness=0.25),
            "quantiles": (0.4, 0.2),
            "layers": "all",
            "gamma": 3.0,
            "conserve": "exact",
            "gates": 2.0,
            "antialias": False,
            "balance": False,
            "method": "smoothgrad",
            "target": 1,
        }


def test_a_selector_has_its_own_share_unless_told(capsys, coffee, tmp_path):
    for place, (options, share) in enumerate(((["--quantile", "0.3"], 0.3), ([], 0.2))):
        out = tmp_path / str(place)
        assert (
            cli(capsys, "explain", coffee, "--selector", "evidence", "--model", "shapes", *options, "--out", out)[0]
            == 0
        )
        assert json.loads((out / "coffee.json").read_text())["settings"]["selector"]["quantile"] == share


def test_a_second_panel_shows_signs(capsys, coffee, tmp_path):
    code, printed, _ = cli(capsys, "explain", coffee, "--signed", "--out", tmp_path / "out")
    assert code == 0
    assert "36 layers edited, blocks." in printed
    with (
        Image.open(tmp_path / "out" / "coffee-signed.png") as signed,
        Image.open(tmp_path / "out" / "coffee.png") as own,
    ):
        blue, plain = (np.asarray(picture.convert("RGB"), dtype=float) for picture in (signed, own))
    # Blue and red, where the other panel runs from violet to yellow.
    assert (blue[..., 2] - blue[..., 0] > 90).sum() > 20 * (plain[..., 2] - plain[..., 0] > 90).sum()


def test_an_animation_plays_its_selectors_side_by_side(capsys, coffee, tmp_path):
    out = tmp_path / "out"
    options = ["--selector", "energy", "--selector", "evidence", "--layers", "0.25", "--values", "0.5,0.1"]
    code, printed, _ = cli(capsys, "animate", coffee, *options, "--out", out)
    assert code == 0
    assert "Gradient energy" in printed
    assert (out / "coffee.gif").stat().st_size <= 500_000
    with Image.open(out / "coffee.gif") as moving:
        # Two values, two frames between them each way; four panels.
        assert moving.n_frames == 6
        assert moving.width > 3 * moving.height
    code, _, _ = cli(capsys, "animate", coffee, *options, "--out", out, "--format", "webp", "--most-kilobytes", "100")
    assert code == 0
    assert (out / "coffee.webp").stat().st_size <= 100_000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--values", "a,b"], "numbers separated by commas"),
        (["--values", ","], "numbers separated by commas"),
        (["--values", "0.5,2"], "--quantile is 2"),
        (["--statistics", "x.safetensors"], "'--statistics'"),
        (["--layers", "nothing"], "nothing"),
        (["--target", "nobody"], "no class named"),
    ],
)
def test_mistakes_with_sweeps_are_one_sentence(capsys, coffee, tmp_path, options, words):
    for command in ("sweep", "animate"):
        code, _, said = cli(capsys, command, coffee, *options, "--out", tmp_path / "out")
        assert code == 2
        assert words in said
        assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
