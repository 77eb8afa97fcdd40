import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

import parchgrad as pg
from parchgrad.data.preprocessing import Preprocessing
from parchgrad.errors import ModelWarning, OutputError, SettingError, TargetError
from parchgrad.visual import blend, blend_signed, save_figure, shared_top, smooth


@pytest.fixture(scope="module")
def classifier():
    return pg.load_model("efficientnet_lite0")


@pytest.fixture(scope="module")
def images():
    return [Image.fromarray(data.coffee()), Image.fromarray(data.camera())]


@pytest.fixture(scope="module")
def explanations(classifier, images):
    return pg.explain_images(classifier, images, stability=True)


def test_maps_are_the_default_explainers(classifier, images, explanations):
    inputs = torch.stack([classifier.preprocess(image) for image in images])
    expected = pg.Explainer(classifier.model).attribute(inputs)
    plain = pg.Explainer(classifier.model, None).attribute(inputs)
    torch.testing.assert_close(torch.stack([found.attribution for found in explanations]), expected)
    torch.testing.assert_close(torch.stack([found.plain for found in explanations]), plain)
    assert [found.target.category for found in explanations] == ["espresso", "tripod"]
    np.testing.assert_allclose(explanations[1].picture, classifier.preprocess.picture(inputs[1]))


def test_the_stability_is_the_mean_cosine_of_noisy_copies(classifier, images, explanations):
    inputs = torch.stack([classifier.preprocess(image) for image in images])
    explainer, cosines = pg.Explainer(classifier.model), []
    # The same numbers for every image, scaled to its range.
    normal = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for image, target in zip(inputs, (967, 872), strict=True):
        clean = explainer.attribute(image[None], target)[0].double().abs().mean(dim=0)
        found = []
        for numbers in normal:
            noisy = image + 0.001 * (image.max() - image.min()) * numbers
            heat = explainer.attribute(noisy[None], target)[0].double().abs().mean(dim=0)
            found.append(float((clean * heat).sum() / (clean.norm() * heat.norm())))
        cosines.append(sum(found) / 4)
    assert [found.stability for found in explanations] == pytest.approx(cosines, abs=1e-4)
    assert min(cosines) > 0.99
    manifest = explanations[0].manifest()
    assert manifest["stability"] == {"cosine": explanations[0].stability, "noise": 0.001, "draws": 4}
    assert explanations[0].figure().texts[0].get_text().endswith("stability 1.00")


def test_the_stability_is_measured_only_when_asked_for():
    shapes, image = pg.load_model("shapes"), Image.fromarray(data.coffee())
    (found,) = pg.explain_images(shapes, [image])
    assert (found.stability, found.manifest()["stability"]) == (None, None)
    assert "stability" not in found.caption
    # A map that is zero everywhere has none, and JSON has no NaN.
    empty = replace(found, stability=math.nan)
    assert empty.manifest()["stability"]["cosine"] is None
    assert empty.caption.endswith("stability unknown (zero map)")


def caution(weights, target, **options):
    """The explanation of a grey image by a network whose logits are the logarithms of the weights."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, len(weights), 8), torch.nn.Flatten()).eval()
    model[0].weight.data.mul_(1e-3)
    model[0].bias.data = torch.tensor(weights).log()
    preprocess = Preprocessing(lambda image: torch.zeros(3, 8, 8), mean=(0,) * 3, std=(1,) * 3)
    small = pg.Classifier(model, preprocess, tuple("abcdefghijklmnopqrstuvwxyz"[: len(weights)]), "small")
    edit = pg.Edit(layers="all")
    return pg.explain_images(small, [Image.new("RGB", (8, 8))] * 2, edit, target=target, **options)


def test_an_improbable_class_comes_with_a_caution():
    many = [0.04, 0.06, *[0.9 / 18] * 18]
    for weights, target in (([0.3, 0.7], 0), ([0.4, 0.35, 0.25], 2), (many, 1), ([0.15, 0.85], "b")):
        (found, _) = caution(weights, target)
        assert found.caution is None
        assert found.manifest()["caution"] is None
    for weights, target in (([0.2, 0.8], 0), ([0.5, 0.36, 0.14], 2), (many, 0), ([0.02, 0.98], "a")):
        with pytest.warns(ModelWarning, match=r"improbable in image 1 \(.*%\), image 2 \(") as warned:
            found = caution(weights, target, internal_batch_size=1)
        # Once for all images.
        assert len(warned) == 1
        share = f"{100 * (weights[target] if isinstance(target, int) else 0.02):.2g}%"
        for each in found:
            assert share in each.caution
            assert each.caution in each.figure().texts[0].get_text().replace("\n", " ")
            assert each.manifest()["caution"] == each.caution


def test_random_weights_come_with_a_caution(images):
    torch.manual_seed(0)
    network = pg.load_model("resnet18", pretrained=False)
    with pytest.warns(ModelWarning, match=r"improbable in cup.jpg \(.*weights"):
        (found,) = pg.explain_images(network, images[:1], names=["cup.jpg"])
    assert found.target.probability < 0.05
    assert found.caution is not None


@pytest.mark.filterwarnings("ignore:The explained class is improbable:parchgrad.errors.ModelWarning")
def test_a_given_target_keeps_its_probability(classifier, images):
    (found,) = pg.explain_images(classifier, images[:1], target=968)
    assert found.target.category == "cup"
    assert found.target == next(prediction for prediction in found.predictions if prediction.index == 968)
    (found,) = pg.explain_images(classifier, images[:1], target=3)
    assert 0 < found.target.probability < found.predictions[-1].probability
    with pytest.raises(SettingError, match="selector of `edit` is None"):
        pg.explain_images(classifier, images[:1], pg.Edit(selector=None))
    for wrong in (None, pg.GradientEnergy()):
        with pytest.raises(SettingError, match=r"edit.* is of type \w+, but an Edit is needed"):
            pg.explain_images(classifier, images[:1], wrong)
    with pytest.raises(TargetError, match="`target` holds 1000"):
        pg.explain_images(classifier, images[:1], target=1000)


@pytest.mark.filterwarnings("ignore:In image .* the network favours:parchgrad.errors.ModelWarning")
@pytest.mark.filterwarnings("ignore:The explained class is improbable:parchgrad.errors.ModelWarning")
@pytest.mark.parametrize("against", [504, "runner-up", "rest"])
def test_a_class_rather_than_another(classifier, images, against):
    inputs = torch.stack([classifier.preprocess(image) for image in images])
    found = pg.explain_images(classifier, images, target=967, against=against, internal_batch_size=len(images))
    for row, explanation in enumerate(found):
        contrast = pg.Contrast(target=967, against=against)
        expected = pg.Explainer(classifier.model).attribute(inputs[row : row + 1], contrast)[0]
        torch.testing.assert_close(explanation.attribution, expected, rtol=1e-4, atol=1e-9)
        others = [each.category for each in explanation.predictions if each.index != 967]
        name = {504: "coffee mug", "runner-up": others[0], "rest": "all others"}[against]
        assert explanation.against == name
        assert f"espresso rather than {name}" in explanation.caption
        assert explanation.manifest()["settings"]["against"] == against


@pytest.mark.filterwarnings("ignore:The explained class is improbable:parchgrad.errors.ModelWarning")
def test_a_contrast_that_the_network_does_not_favour_is_warned_of(classifier, images):
    for against in (967, "runner-up", "rest"):
        with pytest.warns(ModelWarning, match="In image 1, the network favours the other side"):
            pg.explain_images(classifier, images[:1], target=3, against=against)


def test_files_hold_everything(explanations, tmp_path):
    panel, array, manifest = explanations[0].save(tmp_path / "out", "cup.v2")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cup.v2.json", "cup.v2.npy", "cup.v2.png"]
    with Image.open(panel) as saved:
        assert saved.width > 800
    assert np.array_equal(np.load(array), explanations[0].attribution.numpy())
    written = json.loads(manifest.read_text())
    assert written["target"]["category"] == "espresso"
    assert len(written["predictions"]) == 5
    assert (written["image"], written["manifest_version"]) == ("image 1", 3)
    settings = written["settings"]
    assert settings["method_options"] == {"abs": False}
    assert (settings["internal_batch_size"], settings["layers_choice"]) == (8, "auto")
    assert "CenterCrop" in settings["preprocessing"]
    assert settings["selector"] == {"name": "Evidence", "quantile": 0.2, "softness": 1.0, "positions": 0.4}
    assert (settings["gamma"], settings["conserve"], settings["method"]) == ("inf", "energy", "gradient")
    edit = pg.Edit().resolved()
    for name in ("gates", "antialias", "balance"):
        assert settings[name] == getattr(edit, name)
    assert len(settings["layers"]) == 36
    assert written["versions"]["parchgrad"] == pg.__version__
    with pytest.raises(OutputError, match="already exists"):
        explanations[1].save(tmp_path / "out", "cup.v2")
    explanations[1].save(tmp_path / "out", "cup.v2", force=True)
    assert json.loads(manifest.read_text())["target"]["category"] == "tripod"


def test_the_published_method_is_on_record(classifier, images):
    held = pg.ChannelStatistics.bundled("efficientnet_lite0")
    edit = pg.Edit(selector=pg.ClassWise(held, quantile=0.1, softness=0), layers="published", conserve="independent")
    (found,) = pg.explain_images(classifier, images[:1], edit)
    settings = found.settings
    assert (settings["layers_choice"], len(settings["layers"])) == ("published", 3)
    assert (settings["conserve"], settings["gates"]) == ("independent", 0)
    assert (settings["antialias"], settings["balance"]) == (False, False)
    assert settings["selector"]["softness"] == 0


def test_a_file_that_fails_leaves_none(explanations, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        explanations[0].save(tmp_path, "cup")
    assert list(tmp_path.iterdir()) == []


def test_method_options_are_on_record(classifier, images):
    options = {"samples": 2, "seed": 5}
    (found,) = pg.explain_images(classifier, images[:1], method="smoothgrad", method_options=options, names=["cup.jpg"])
    assert found.settings["method_options"] == {"samples": 2, "sigma": 0.15, "seed": 5}
    assert found.manifest()["image"] == "cup.jpg"


def test_the_figure_names_class_and_method(classifier, images):
    edit = pg.Edit(selector=pg.GradientEnergy(), gamma=2.0, layers=["conv_head"])
    (found,) = pg.explain_images(classifier, images[:1], edit, method="input_x_gradient")
    titles = [axes.get_title() for axes in found.figure().axes]
    assert titles[0].startswith("espresso (9")
    assert found.manifest()["settings"]["method_options"] == {}
    assert titles[1:3] == ["plain input x gradient", "ParchGrad"]
    assert found.caption == "ParchGrad with GradientEnergy, quantile 0.1, 1 layer"
    assert found.settings["gamma"] == 2.0
    assert not math.isinf(found.settings["gamma"])


def test_the_signed_figure_shows_means_over_colours(classifier, images):
    (found,) = pg.explain_images(classifier, images[:1])
    figure = found.signed_figure(shared_scale=True, smooth=0)
    maps = [values.double().mean(dim=0).numpy() for values in (found.plain, found.attribution)]
    top = shared_top(maps)
    for axes, values in zip(figure.axes[1:3], maps, strict=True):
        expected = blend_signed(found.picture, values, top=top)
        np.testing.assert_allclose(axes.images[0].get_array(), expected, atol=1e-4)
    assert figure.axes[3].get_xlim() == pytest.approx((-top, top))
    # By default each is smoothed and has its own scale.
    for axes, values in zip(found.signed_figure().axes[1:3], maps, strict=True):
        expected = blend_signed(found.picture, smooth(values, 2.24))
        np.testing.assert_allclose(axes.images[0].get_array(), expected, atol=1e-4)


def test_the_panel_is_drawn_as_asked(classifier, images, tmp_path):
    (found,) = pg.explain_images(classifier, images[:1])
    look = {"shared_scale": True, "smooth": 2.0, "colormap": "viridis"}
    panel, array, _ = found.save(tmp_path, "cup", form="svg", dpi=50, **look)
    assert [path.name for path in found.files(tmp_path, "cup", "svg")] == ["cup.svg", "cup.npy", "cup.json"]
    save_figure(found.figure(**look), tmp_path / "other.svg", dpi=50)
    assert panel.read_bytes() == (tmp_path / "other.svg").read_bytes()
    # The array is not smoothed.
    np.testing.assert_array_equal(np.load(array), found.attribution.numpy())
    maps = [values.abs().mean(dim=0).numpy() for values in (found.plain, found.attribution)]
    smoothed = [smooth(values, 2) for values in maps]
    drawn = found.figure(**look).axes[2].images[0].get_array()
    expected = blend(found.picture, smoothed[1], top=shared_top(smoothed), colormap="viridis")
    np.testing.assert_allclose(drawn, expected, atol=1e-4)
    np.testing.assert_allclose(found.figure().axes[1].images[0].get_array(), blend(found.picture, maps[0]), atol=1e-4)
