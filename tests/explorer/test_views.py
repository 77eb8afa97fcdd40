"""What the explorer shows, beside the library itself and beside the script it gives."""

import math
import threading
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from PIL import Image

import parchgrad as pg
from parchgrad.core.layers import parse_layers
from parchgrad.errors import (
    ImageError,
    InputError,
    LayerError,
    ParchGradError,
    SettingError,
    StatisticsError,
    TargetError,
)
from parchgrad.evaluation.localisation import mosaic
from parchgrad.explain.methods import METHODS
from parchgrad.explorer.inputs import EXAMPLES, ImageSource, View, check_image
from parchgrad.explorer.settings import OwnNetwork
from parchgrad.explorer.views import Explorer, _Recent
from parchgrad.statistics.selectors import find_selector
from parchgrad.visual import blend, blend_signed
from parchgrad.visual.animation import animate
from parchgrad.workflows.demonstration import example_photographs

STATISTICS = ("class", "instance")


@pytest.fixture(scope="module")
def explorer():
    return Explorer()


@pytest.fixture(scope="module")
def lite0():
    return pg.load_model("efficientnet_lite0")


@pytest.fixture(scope="module")
def networks(lite0):
    return {"efficientnet_lite0": lite0, "shapes": pg.load_model("shapes")}


# With statistics, which only one network brings, and without.
SELECTORS = [
    *(("shapes", name) for name in ("energy", "activation", "evidence", "random")),
    *(("efficientnet_lite0", name) for name in STATISTICS),
]


@pytest.fixture
def image(tmp_path, monkeypatch):
    """A file whose name is enough to find it, as in the script."""
    monkeypatch.chdir(tmp_path)
    example_photographs()[1].save("a cup's.png")
    return ImageSource("a cup's.png", tmp_path / "a cup's.png")


def same_map(found, expected):
    """Equal but for the rounding of other batch sizes."""
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("network", "selector"), SELECTORS)
def test_maps_are_those_of_the_explainer(explorer, networks, image, network, selector):
    settings = {"quantile": 0.2, "softness": 0.3, "gamma": 20.0, "gates": 3.0, "antialias": False, "balance": False}
    found = explorer.explore(image, View(network=network, selector=selector, layers="0.3", target=7, **settings))
    classifier = networks[network]
    inputs = classifier.preprocess(example_photographs()[1]).unsqueeze(0)
    # With all classes, where the explorer keeps the column of one.
    statistics = pg.ChannelStatistics.bundled("efficientnet_lite0")
    of_library = pg.Explainer(
        classifier.model,
        find_selector(selector).make(quantile=0.2, softness=0.3, statistics=statistics),
        layers=0.3,
        gamma=20.0,
        gates=3.0,
        antialias=False,
        balance=False,
    )
    assert torch.equal(found.attribution, of_library.attribute(inputs, 7)[0])
    assert torch.equal(found.plain, pg.Explainer(classifier.model, None).attribute(inputs, 7)[0])
    assert found.layers == of_library.layers
    logits = classifier.model(inputs)[0].detach()
    assert found.target.index == 7
    assert found.target.probability == pytest.approx(float(logits.softmax(0)[7]), rel=1e-5)
    assert [item.index for item in found.predictions] == logits.topk(5).indices.tolist()


def test_the_first_view_is_the_best_setting(explorer, lite0, image):
    found = explorer.explore(image, View())
    inputs = lite0.preprocess(example_photographs()[1]).unsqueeze(0)
    best = pg.Explainer(lite0.model)
    assert torch.equal(found.attribution, best.attribute(inputs)[0])
    assert "\nexplainer = pg.Explainer(classifier.model)\n" in found.code
    assert "selector" not in found.code
    same_map(run(found.code)["attribution"][0], found.attribution)
    edit = best.edit
    assert found.view == View(
        layers=str(edit.layers),
        quantile=edit.selector.quantile,
        softness=edit.selector.softness,
        gates=edit.gates,
        antialias=edit.antialias,
        balance=edit.balance,
    )


@pytest.mark.parametrize(("network", "selector"), SELECTORS)
@pytest.mark.parametrize("softness", [None, 0])
def test_what_is_not_given_suits_the_selector(explorer, networks, network, selector, softness):
    found = explorer.explore(ImageSource("coffee"), View(network=network, selector=selector, softness=softness))
    statistics, classifier = pg.ChannelStatistics.bundled("efficientnet_lite0"), networks[network]
    made = find_selector(selector).make(softness=softness, statistics=statistics)
    of_library = pg.Explainer(classifier.model, made)
    inputs = classifier.preprocess(example_photographs()[1]).unsqueeze(0)
    assert torch.equal(found.attribution, of_library.attribute(inputs)[0])
    assert found.view.gates == of_library.edit.gates
    assert found.view.antialias == of_library.edit.antialias
    assert found.view.balance == of_library.edit.balance
    # Nothing is written out that Explainer would choose itself.
    assert not any(setting in found.code for setting in ("layers=", "gates=", "antialias=", "balance="))
    assert ("softness=" in found.code) == (softness == 0 and selector != "random")


@pytest.mark.parametrize("view", [View(), View(selector="energy", softness=0, gates=0.0, layers="published")])
def test_stability_is_that_of_the_explainer(explorer, lite0, view):
    found = explorer.stability(ImageSource("coffee"), view)
    inputs = lite0.preprocess(example_photographs()[1]).unsqueeze(0)
    resolved = view.resolved()
    explainer = pg.Explainer(
        lite0.model,
        find_selector(view.selector).make(softness=view.softness),
        layers=parse_layers(resolved.layers),
        gates=resolved.gates,
        antialias=resolved.antialias,
        balance=resolved.balance,
    )
    assert found == pytest.approx(float(explainer.stability(inputs)), rel=1e-9)


@pytest.mark.parametrize(
    ("against", "name", "selector"),
    [(504, "coffee mug", "evidence"), ("runner-up", "cup", "class"), ("rest", "all others", "instance")],
)
def test_a_class_rather_than_another_is_a_contrast(explorer, lite0, image, against, name, selector):
    view = View(selector=selector, against=against, signed=True)
    found = explorer.explore(image, view)
    inputs = lite0.preprocess(example_photographs()[1]).unsqueeze(0)
    contrast = pg.Contrast(target=967, against=against)
    made = find_selector(selector).make(statistics=pg.ChannelStatistics.bundled("efficientnet_lite0"))
    of_library = pg.Explainer(lite0.model, made)
    assert torch.equal(found.attribution, of_library.attribute(inputs, contrast)[0])
    assert torch.equal(found.plain, pg.Explainer(lite0.model, None).attribute(inputs, contrast)[0])
    assert (found.target.category, found.against) == ("espresso", name)
    assert found.figure().axes[0].get_title() == f"{found.target}\nrather than {name}"
    # The class alone has other maps, whichever was asked for first.
    assert not torch.equal(found.plain, explorer.explore(image, View(selector=selector)).plain)
    given = run(found.code)
    assert torch.equal(given["attribution"][0], found.attribution)
    assert f"  # espresso rather than {name}\n" in found.code
    stability = explorer.stability(image, view)
    assert stability == pytest.approx(float(of_library.stability(inputs, contrast)), rel=1e-9)


@pytest.mark.parametrize("against", [None, 7])
def test_the_third_map_is_that_of_the_library(explorer, networks, image, against):
    classifier, target = networks["shapes"], 3 if against is None else pg.Contrast(target=3, against=against)
    inputs = classifier.preprocess(example_photographs()[1]).unsqueeze(0)
    last = [module for module in classifier.model.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    contrast = pg.ClassScore(target=3) if against is None else target
    score = LayerGradCam(lambda inputs: contrast(classifier.model(inputs)), last)
    coarse = score.attribute(inputs, relu_attributions=True).detach()
    expected = {
        "grad_cam": torch.nn.functional.interpolate(coarse, (64, 64), mode="bilinear")[0],
        "smoothgrad": pg.Explainer(classifier.model, None, method="smoothgrad").attribute(inputs, target)[0],
        "energy": pg.Explainer(classifier.model, pg.GradientEnergy()).attribute(inputs, target)[0],
        None: None,
    }
    for comparison, wanted in expected.items():
        # The settings of the selector itself do not reach the third map.
        view = View(network="shapes", target=3, against=against, comparison=comparison, quantile=0.7, gates=2)
        found = explorer.explore(image, view)
        if comparison is None:
            assert found.comparison is None
            assert len(found.maps()) == 2
            continue
        same_map(found.comparison, wanted)
        same_map(found.maps()[2], pg.heatmap(wanted.unsqueeze(0))[0])
        given = run(found.code)
        same_map(list(given["maps"].values())[2], found.maps()[2])


@pytest.mark.parametrize("comparison", ["grad_cam", "integrated_gradients", "activation"])
def test_the_third_maps_of_a_mosaic_are_scored(explorer, comparison, capsys):
    images = [ImageSource(name) for name in EXAMPLES]
    game = explorer.play(images, View(network="shapes", comparison=comparison))
    given = run(game.code)
    heats = game.maps()[2]
    same_map(list(given["maps"].values())[2], heats)
    for cell, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        heat = heats[cell].double()
        own = heat[64 * row : 64 * (row + 1), 64 * column : 64 * (column + 1)].sum() / heat.sum()
        assert game.shares()[2][cell] == pytest.approx(float(own), abs=1e-4, nan_ok=True)
    assert f"{np.nanmean(game.shares()[2]):.2f}" in capsys.readouterr().out.splitlines()[-1]


def test_grad_cam_is_not_offered_without_a_map_of_features(explorer, monkeypatch):
    assert explorer.comparisons("shapes")[0] == "grad_cam"
    patches = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 16, stride=16), torch.nn.Flatten(), torch.nn.Linear(128, 10))
    classifier = replace(pg.load_model("shapes"), model=patches.eval(), name="patches")
    monkeypatch.setattr("parchgrad.explorer.views.load_model", lambda name: classifier)
    fresh = Explorer()
    assert fresh.comparisons("patches")[0] == "gradient"
    with pytest.raises(LayerError, match="Grad-CAM needs a convolution after the patches"):
        fresh.explore(ImageSource("cat"), View(network="patches", layers="all"))
    assert len(fresh.explore(ImageSource("cat"), View(network="patches", layers="all", comparison=None)).maps()) == 2


def test_a_sweep_has_the_maps_of_the_contrast(explorer):
    cat, view = ImageSource("cat"), View(network="shapes", target=3, against=7, quantile=0.2)
    found = explorer.sweep(cat, view)
    heat = pg.heatmap(explorer.explore(cat, view).attribution.unsqueeze(0))[0]
    np.testing.assert_allclose(found.heats[found.values.index(0.2)], heat, rtol=1e-4, atol=1e-9)
    assert found.label.endswith(f"\nrather than {pg.load_model('shapes').categories[7]}")
    assert found.against in found.label
    alone = explorer.sweep(cat, replace(view, against=None))
    assert animate({"both": found}).frames[0].shape == animate({"both": alone}).frames[0].shape
    with pytest.raises(InputError, match="differ in setting, values or class"):
        animate({"one": found, "two": alone})


def test_a_mosaic_explains_its_classes_alone(explorer):
    images, view = [ImageSource(name) for name in EXAMPLES], View(network="shapes")
    alone = explorer.play(images, view).attribution
    assert torch.equal(Explorer().play(images, replace(view, against="rest")).attribution, alone)


@pytest.mark.parametrize("balance", [True, False])
def test_balance_reaches_the_explainer(monkeypatch, balance):
    edits = []

    class Recorded(pg.Explainer):
        @classmethod
        def from_edit(cls, model, edit, **options):
            edits.append(edit)
            return pg.Explainer.from_edit(model, edit, **options)

    # The networks on offer have nothing to balance, so the map does not show it.
    monkeypatch.setattr("parchgrad.explorer.views.Explainer", Recorded)
    Explorer().explore(ImageSource("cat"), View(network="shapes", balance=balance))
    assert {edit.balance for edit in edits if edit.selector is not None} == {balance}


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks")
def test_methods_with_rectifiers_of_their_own_need_no_gates(explorer, tmp_path, monkeypatch):
    # The script writes its picture here.
    monkeypatch.chdir(tmp_path)
    found = explorer.explore(ImageSource("cat"), View(network="shapes", method="DeepLift"))
    same_map(run(found.code)["attribution"][0], found.attribution)
    with pytest.raises(SettingError, match="replaces the backward pass of rectifiers"):
        explorer.explore(ImageSource("cat"), View(network="shapes", method="DeepLift", gates=2))


@pytest.mark.parametrize(("network", "selector"), SELECTORS)
def test_the_script_gives_the_map_and_the_picture_again(explorer, image, network, selector):
    view = View(
        network=network,
        selector=selector,
        layers="0.3",
        quantile=0.15,
        softness=0.8,
        gates=4,
        antialias=False,
        balance=False,
        opacity=0.7,
        signed=selector == "energy",
    )
    found = explorer.explore(image, view)
    given = run(found.code)
    assert ("softness=0.8" in found.code) == (selector != "random")
    assert "layers=0.3, gates=4, antialias=False, balance=False)" in found.code
    same_map(given["attribution"][0], found.attribution)
    draw = blend_signed if view.signed else blend
    for name, heat in zip(("plain", "parchgrad", "grad_cam"), found.maps(), strict=True):
        written = np.asarray(Image.open(f"{name}.png").convert("RGB")) / 255
        assert np.abs(written - draw(found.picture, heat, opacity=0.7)).max() < 0.02


@pytest.mark.parametrize(("signed", "opacity"), [(False, 1), (True, 0.4), (False, 0)])
def test_the_figure_has_the_opacity_of_the_maps(explorer, signed, opacity):
    view = View(network="shapes", layers="all", signed=signed, opacity=opacity)
    found, game = (
        explorer.explore(ImageSource("cat"), view),
        explorer.play([ImageSource(name) for name in EXAMPLES], view),
    )
    draw = blend_signed if signed else blend
    for shown, columns in ((found, [[one] for one in found.maps()]), (game, game.maps())):
        assert len(columns) == 3
        wanted = [
            picture
            for maps in zip(*columns, strict=True)
            for picture in (shown.picture, *(draw(shown.picture, one, opacity=opacity) for one in maps))
        ]
        drawn = [axes.images[0].get_array() for axes in shown.figure().axes if axes.images]
        assert len(drawn) >= len(wanted)
        for one, expected in zip(drawn, wanted, strict=False):
            np.testing.assert_allclose(one, expected, atol=1e-6)


def test_layers_without_statistics_are_told_with_what_can_be_chosen(explorer):
    # The statistics that come with the package are of the upper half.
    with pytest.raises(StatisticsError, match=r"25 of the chosen ones, such as 'conv_stem'"):
        explorer.explore(ImageSource("cat"), View(selector="class", layers="all"))


def test_a_damaged_image_is_named_without_its_folder(explorer, tmp_path):
    example_photographs()[0].save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:20_000])
    check_image(tmp_path / "cut.jpg", megapixels=50)
    with pytest.raises(ImageError, match=r"^Cannot read 'cut.jpg'") as told:
        explorer.explore(ImageSource("cut.jpg", tmp_path / "cut.jpg"), View(network="shapes"))
    assert str(tmp_path) not in str(told.value)


@pytest.mark.parametrize("method", METHODS)
def test_the_script_gives_the_map_of_every_method_again(explorer, image, method):
    view = View(network="shapes", method=method, layers="all", gamma=7.5, quantile=0.3)
    found = explorer.explore(image, view)
    same_map(run(found.code)["attribution"][0], found.attribution)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_script_reads_the_examples(explorer, tmp_path, monkeypatch, example):
    monkeypatch.chdir(tmp_path)
    found = explorer.explore(ImageSource(example), View(network="shapes", layers="features.5.*,features.7.*"))
    same_map(run(found.code)["attribution"][0], found.attribution)


def run(code):
    given = {}
    with warnings.catch_warnings():
        # Written by the explorer: nothing of the user but a file's name is in it.
        exec(compile(code, "script", "exec"), given)
    return given


def test_names_of_files_stay_text_in_the_script(explorer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "x')) + print('gone'.png"
    example_photographs()[0].save(tmp_path / name)
    found = explorer.explore(ImageSource(name, tmp_path / name), View(network="shapes"))
    same_map(run(found.code)["attribution"][0], found.attribution)


def test_the_score_of_a_mosaic_is_its_mass_in_the_cell_of_the_class(explorer, capsys):
    images = [ImageSource(name) for name in EXAMPLES]
    view = View(network="shapes", layers="all")
    game = explorer.play(images, view)
    shapes = pg.load_model("shapes")
    inputs = torch.stack([shapes.preprocess(image) for image in example_photographs()])
    classes = shapes.model(inputs).argmax(dim=1)
    whole = mosaic(inputs, rows=2, columns=2)
    explainer, plain = pg.Explainer(shapes.model, layers="all"), pg.Explainer(shapes.model, None)
    for cell, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        for found, shares in ((plain, game.shares()[0]), (explainer, game.shares()[1])):
            heat = found.attribute(whole, int(classes[cell]))[0].abs().double().sum(dim=0)
            own = heat[64 * row : 64 * (row + 1), 64 * column : 64 * (column + 1)].sum() / heat.sum()
            assert shares[cell] == pytest.approx(float(own), abs=1e-4)
    assert [target.index for target in game.targets] == classes.tolist()
    given = run(game.code)
    same_map(given["attribution"], game.attribution)
    said = capsys.readouterr().out
    for name, shares in zip(("plain", "ParchGrad", "Grad-CAM"), game.shares(), strict=True):
        assert f"{name} {np.nanmean(shares):.2f}" in said
    with pytest.raises(InputError, match="`images` has 3 images"):
        explorer.play(images[:3], view)


def test_a_sweep_takes_the_quantiles_that_the_statistics_serve(explorer):
    view = View(selector="class", layers="0.2", target=967)
    found = explorer.sweep(ImageSource("coffee"), view)
    assert found.values == (0.5, 0.3, 0.2, 0.1, 0.05)
    heat = pg.heatmap(explorer.explore(ImageSource("coffee"), view).attribution.unsqueeze(0))[0]
    np.testing.assert_allclose(found.heats[3], heat, rtol=1e-4, atol=1e-9)


def test_statistics_of_a_file_serve_their_network(tmp_path):
    shapes = pg.load_model("shapes")
    path = tmp_path / "held.safetensors"
    pg.collect_statistics(
        shapes.model, torch.utils.data.TensorDataset(torch.rand(30, 3, 64, 64), torch.arange(30) % 10)
    ).save(path)
    explorer = Explorer(statistics={"shapes": path})
    assert explorer.selectors("shapes")[-2:] == STATISTICS
    found = explorer.explore(ImageSource("cat"), View(network="shapes", selector="class", target=4, quantile=0.3))
    selector = pg.ClassWise(pg.ChannelStatistics.load(path), quantile=0.3)
    inputs = shapes.preprocess(example_photographs()[0]).unsqueeze(0)
    expected = pg.Explainer(shapes.model, selector).attribute(inputs, 4)[0]
    assert torch.equal(found.attribution, expected)
    assert "pg.ChannelStatistics.load('held.safetensors', classifier.model)" in found.code


def test_a_network_of_ones_own_is_explored_and_loaded_by_the_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    own = pg.load_model("shapes", pretrained=False, num_classes=2)
    torch.save(own.model.state_dict(), "own.pth")
    (tmp_path / "classes.txt").write_text("intact\ndefect")
    options = {"weights": "own.pth", "classes": "classes.txt"}
    classifier = pg.load_network("shapes", **options)
    code = "pg.load_network('shapes', weights='own.pth', classes='classes.txt')"
    explorer = Explorer(own=OwnNetwork(classifier, code), networks=1)
    # The own network stays when others are loaded in between.
    explorer.classifier("shapes")
    found = explorer.explore(ImageSource("cat"), View(network="shapes-own", target=1))
    assert found.target.category == "defect"
    inputs = own.preprocess(example_photographs()[0]).unsqueeze(0)
    assert torch.equal(found.attribution, pg.Explainer(own.model).attribute(inputs, 1)[0])
    same_map(run(found.code)["attribution"][0], found.attribution)


def test_outputs_of_hugging_face_and_other_weights_of_a_known_name(explorer):
    class Wrapped(torch.nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x):
            return {"logits": self.body(x)}

    shapes = pg.load_model("shapes")
    classifier = pg.Classifier(Wrapped(shapes.model).eval(), shapes.preprocess, shapes.categories, "wrapped")
    found = Explorer(own=OwnNetwork(classifier, "")).explore(ImageSource("cat"), View(network="wrapped"))
    expected = explorer.explore(ImageSource("cat"), View(network="shapes"))
    assert found.target == expected.target
    for one, other in zip(found.maps(), expected.maps(), strict=True):
        torch.testing.assert_close(one, other)
    # The bundled statistics are of other weights.
    random = pg.load_model("efficientnet_lite0", pretrained=False)
    assert "class" not in Explorer(own=OwnNetwork(random, "")).selectors("efficientnet_lite0")


def test_what_is_wrong_is_said(explorer, tmp_path):
    cup = ImageSource("coffee")
    for changes, error in (
        ({"target": 10}, TargetError),
        ({"target": -1}, TargetError),
        ({"against": 10}, TargetError),
        ({"against": -1}, SettingError),
        ({"against": "next"}, SettingError),
        ({"against": ["rest"]}, SettingError),
        ({"layers": "nothing.*"}, LayerError),
        ({"layers": ""}, LayerError),
        ({"layers": "nan"}, LayerError),
        ({"layers": "published"}, LayerError),
        ({"quantile": 0.0}, SettingError),
        ({"gamma": math.nan}, SettingError),
        ({"method": "magic"}, SettingError),
        ({"comparison": "magic"}, SettingError),
        ({"selector": "class"}, ParchGradError),
        ({"network": "shape"}, ParchGradError),
    ):
        with pytest.raises(error):
            explorer.explore(cup, View(**{"network": "shapes", **changes}))
    predicted = explorer.ranked(cup, "shapes")[0]
    for target in (predicted, None):
        with pytest.raises(SettingError, match=r"^Cannot explain '\w+' rather than itself\. Choose another class"):
            explorer.explore(cup, View(network="shapes", target=target, against=predicted))
    wrong = ({"opacity": 1.5}, {"softness": 1.1}, {"softness": math.nan}, {"gates": -1}, {"antialias": 1})
    for changes in (*wrong, {"balance": 0}):
        with pytest.raises(SettingError, match=next(iter(changes))):
            View(**changes)
    with pytest.raises(SettingError, match="'magic'"):
        View(selector="magic").resolved()
    with pytest.raises(ImageError, match="'dog' is not an example"):
        explorer.explore(ImageSource("dog"), View(network="shapes"))
    with pytest.raises(ImageError, match=r"'gone.png' no longer exists"):
        explorer.explore(ImageSource("gone.png", tmp_path / "gone.png"), View(network="shapes"))


# Pillow's own notice of many pixels.
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_files_are_looked_at_before_they_are_decoded(tmp_path):
    wide = tmp_path / "wide.png"
    Image.new("1", (12_000, 10_000)).save(wide)
    with pytest.raises(ImageError, match=r"^'wide.png' has 120.0 megapixels, but the limit is 50"):
        check_image(wide, megapixels=50)
    script = tmp_path / "picture.png"
    script.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ImageError, match="EPS file"):
        check_image(script, megapixels=50)
    text = tmp_path / "text.png"
    text.write_text("no picture")
    with pytest.raises(ImageError, match=r"^'text.png' is not a readable image"):
        check_image(text, megapixels=50)


def test_threads_get_their_own_maps(explorer):
    views = [View(network="shapes", layers="all", target=target, quantile=0.25) for target in range(10)]
    found = [None] * 40

    def look(place):
        found[place] = explorer.explore(ImageSource(EXAMPLES[place % 4]), views[place % 10])

    threads = [threading.Thread(target=look, args=(place,)) for place in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shapes = pg.load_model("shapes")
    alone = pg.Explainer(shapes.model, pg.Evidence(quantile=0.25), layers="all")
    inputs = torch.stack([shapes.preprocess(image) for image in example_photographs()])
    for place, one in enumerate(found):
        expected = alone.attribute(inputs[place % 4 : place % 4 + 1], place % 10)[0]
        assert torch.equal(one.attribution, expected)


def test_what_was_asked_for_lately_is_held_up_to_a_size():
    made = []

    def make(name, size):
        return lambda: made.append(name) or torch.zeros(size)

    recent = _Recent(100 * 4, lambda tensor: tensor.nbytes)
    recent.get("a", make("a", 40))
    recent.get("b", make("b", 40))
    recent.get("a", make("a", 40))
    recent.get("c", make("c", 40))
    recent.get("a", make("a", 40))
    assert made == ["a", "b", "c"]
    recent.get("b", make("b", 40))
    assert made == ["a", "b", "c", "b"]
    # Larger than the limit, yet given and held alone.
    assert len(recent.get("d", make("d", 1000))) == 1000
    recent.get("d", make("d", 1000))
    assert made[4:] == ["d"]
