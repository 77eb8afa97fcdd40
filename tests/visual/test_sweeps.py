from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import nn
from torchvision import transforms

import parchgrad as pg
from parchgrad.core.selectors import EditDefaults
from parchgrad.data.preprocessing import Preprocessing
from parchgrad.data.shapes import GeneratedShapes
from parchgrad.errors import SettingError, StatisticsError, TargetError
from parchgrad.explain.recording import record_selections
from parchgrad.models.classifier import Classifier
from parchgrad.visual import blend, relative, shared_top, smooth
from parchgrad.visual.animation import animate
from parchgrad.visual.channels import kept_channels
from parchgrad.visual.sweeps import alpha_sweep, quantile_sweep


@pytest.fixture(scope="module")
def classifier():
    return pg.load_model("efficientnet_lite0")


@pytest.fixture(scope="module")
def held():
    return pg.ChannelStatistics.bundled("efficientnet_lite0")


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(data.coffee())


def test_each_map_is_the_explainers_at_that_quantile(classifier, image):
    edit = pg.Edit(selector=pg.GradientEnergy(quantile=0.9, softness=0), layers=0.25)
    found = quantile_sweep(classifier, image, edit, quantiles=(0.4, 0.1), target=968)
    inputs = classifier.preprocess(image).unsqueeze(0)
    for quantile, heat in zip((0.4, 0.1), found.heats, strict=True):
        explainer = pg.Explainer(classifier.model, pg.GradientEnergy(quantile=quantile, softness=0), layers=0.25)
        np.testing.assert_allclose(heat, pg.heatmap(explainer.attribute(inputs, 968))[0], rtol=1e-5, atol=1e-9)
    plain = pg.heatmap(pg.Explainer(classifier.model, None).attribute(inputs, 968))[0]
    np.testing.assert_allclose(found.plain, plain, rtol=1e-5, atol=1e-9)
    assert (found.target.index, found.target.category) == (968, "cup")
    # In three pointwise layers fewer channels than the quantile have a gradient, so that all tie at the threshold.
    assert found.titles() == ("quantile 0.4, 3 of 12 layers plain", "quantile 0.1, 3 of 12 layers plain")
    assert 0.38 < found.kept[0] <= 0.41
    assert 0.085 < found.kept[1] <= 0.105


def test_without_quantiles_it_takes_those_that_compact_statistics_rank(classifier, image, held):
    edit = pg.Edit(selector=pg.ClassWise(held, quantile=0.2), layers=["conv_head"])
    # The bundled statistics rank the best half of the channels.
    assert quantile_sweep(classifier, image, edit).values == (0.5, 0.3, 0.2, 0.1, 0.05)


def test_alpha_replaces_the_quantile(classifier, image, held):
    edit = pg.Edit(selector=pg.ClassWise(held, quantile=0.2), layers=0.25)
    found = alpha_sweep(classifier, image, edit, alphas=(0.1, 0.01))
    inputs = classifier.preprocess(image).unsqueeze(0)
    for alpha, heat in zip((0.1, 0.01), found.heats, strict=True):
        explainer = pg.Explainer(classifier.model, pg.ClassWise(held, alpha=alpha), layers=0.25)
        np.testing.assert_allclose(heat, pg.heatmap(explainer.attribute(inputs))[0], rtol=1e-5, atol=1e-9)
    assert found.target.category == "espresso"
    assert found.titles()[0] == f"alpha 0.1: mean weight {found.kept[0]:.1%}"
    edit = pg.Edit(selector=pg.ClassWise(held, alpha=0.1), layers=0.25)
    again = quantile_sweep(classifier, image, edit, quantiles=(0.2,))
    explainer = pg.Explainer(classifier.model, pg.ClassWise(held, quantile=0.2), layers=0.25)
    np.testing.assert_allclose(again.heats[0], pg.heatmap(explainer.attribute(inputs))[0], rtol=1e-5, atol=1e-9)


def test_layers_in_which_no_channel_passes_are_said_to_be_plain(classifier, image, held):
    edit = pg.Edit(selector=pg.InstanceWise(held, quantile=0.1, softness=0), layers=0.5)
    found = alpha_sweep(classifier, image, edit, alphas=(0.1, 1e-6, 1e-300))
    inputs = classifier.preprocess(image).unsqueeze(0)
    for place, alpha in enumerate((0.1, 1e-6, 1e-300)):
        chosen = replace(edit, selector=pg.InstanceWise(held, alpha=alpha, softness=0))
        records = record_selections(classifier.model, chosen, inputs)
        counts = [int(record.selection.channel_weights.sum()) for record in records]
        assert found.untouched[place] == counts.count(0)
        # Nearly all kept channels have a gradient in the upper half.
        shares = [count / record.channel_norms.numel() for count, record in zip(counts, records, strict=True) if count]
        assert found.kept[place] == pytest.approx(np.mean(shares), rel=0.2) if shares else np.isnan(found.kept[place])
    assert found.untouched[0] == 0
    assert 0 < found.untouched[1] < 24
    assert found.untouched[2] == 24
    assert found.titles()[1].endswith(f"%, {found.untouched[1]} of 24 layers plain")
    assert found.titles()[2] == "alpha 1e-300: plain, no channel passes"
    np.testing.assert_allclose(found.heats[2], found.plain, rtol=1e-4, atol=1e-8)


def test_a_class_that_the_statistics_do_not_know_is_refused():
    shapes = pg.load_model("shapes")
    samples = [(sample.image, sample.label) for sample in GeneratedShapes(count=60, seed=1) if sample.label < 3]
    held = pg.collect_statistics(shapes.model, samples, layers=0.5)
    image, inputs = Image.fromarray(data.cat()), torch.rand(2, 3, 64, 64)
    selector = pg.ClassWise(held, quantile=0.2)
    edit = pg.Edit(selector=selector, layers=0.5)
    assert quantile_sweep(shapes, image, edit, target=1, quantiles=(0.2,)).kept[0] > 0
    for refused in (
        lambda: quantile_sweep(shapes, image, edit, target=8),
        lambda: pg.Explainer(shapes.model, selector, layers=0.5).attribute(inputs, torch.tensor([1, 8])),
        lambda: pg.ParchGrad(shapes.model, selector, layers=0.5, target=8),
        lambda: kept_channels(shapes.model, inputs[:1], [1, 8], edit),
    ):
        with pytest.raises(StatisticsError, match="no image of class 8"):
            refused()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_sweep_takes_the_type_of_the_model(dtype):
    shapes = pg.load_model("shapes")
    shapes.model.to(dtype)
    image = Image.fromarray(data.cat())
    edit = pg.Edit(selector=pg.GradientEnergy(), layers="all")
    found = quantile_sweep(shapes, image, edit, quantiles=(0.3,), target=2)
    inputs = shapes.preprocess(image).unsqueeze(0).to(dtype)
    explainer = pg.Explainer(shapes.model, pg.GradientEnergy(quantile=0.3), layers="all")
    expected = pg.heatmap(explainer.attribute(inputs, 2))[0].double()
    np.testing.assert_allclose(found.heats[0], expected, rtol=1e-12)


def test_a_grey_network_is_drawn_on_grey_pictures():
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).eval()
    transform = transforms.Compose([transforms.Grayscale(), transforms.Resize((28, 20)), transforms.ToTensor()])
    preprocess = Preprocessing(transform, (0.0,), (1.0,))
    classifier = Classifier(model, preprocess, ("a", "b", "c"), "grey")
    found = quantile_sweep(classifier, Image.fromarray(data.cat()), quantiles=(0.5,))
    assert found.picture.shape == (28, 20, 3)
    assert (found.picture == found.picture[..., :1]).all()
    assert found.figure().axes[0].get_title().startswith(found.target.category)
    assert animate({"evidence": found}, panel_size=40).frames[0].ndim == 3


def test_other_methods_are_swept_too():
    shapes = pg.load_model("shapes")
    image = Image.fromarray(data.cat())
    settings = {"layers": "all", "gamma": 2.0, "conserve": "exact", "gates": 3.0, "antialias": False, "balance": False}
    edit = pg.Edit(selector=pg.GradientEnergy(softness=0.25), **settings)
    found = quantile_sweep(shapes, image, edit, quantiles=(0.3,), method="input_x_gradient")
    inputs = shapes.preprocess(image).unsqueeze(0)
    selector = pg.GradientEnergy(quantile=0.3, softness=0.25)
    explainer = pg.Explainer(shapes.model, selector, **settings, method="input_x_gradient")
    assert (found.edit.selector, {name: getattr(found.edit, name) for name in settings}) == (selector, settings)
    np.testing.assert_allclose(found.heats[0], pg.heatmap(explainer.attribute(inputs))[0], rtol=1e-5, atol=1e-9)
    assert (found.layers, found.method) == (explainer.layers, "input_x_gradient")


def test_by_default_each_map_is_the_best_settings_at_that_quantile(classifier, image):
    found = quantile_sweep(classifier, image, quantiles=(0.3, 0.2))
    inputs = classifier.preprocess(image).unsqueeze(0)
    np.testing.assert_allclose(
        found.heats[1], pg.heatmap(pg.Explainer(classifier.model).attribute(inputs))[0], rtol=1e-5, atol=1e-9
    )
    assert (found.edit.layers, found.edit.conserve, len(found.layers)) == ("auto", "energy", 36)
    # Weights above 0 reach below the threshold.
    assert found.kept[1] > 0.2


class Restless(pg.GradientEnergy):
    """Other settings suit it at other quantiles."""

    @property
    def defaults(self):
        return EditDefaults(layers=self.quantile, gates=10 * self.quantile)


def test_the_other_settings_are_those_of_the_first_value():
    shapes, image = pg.load_model("shapes"), Image.fromarray(data.cat())
    found = quantile_sweep(shapes, image, pg.Edit(selector=Restless()), quantiles=(0.5, 0.2))
    assert (found.edit.layers, found.edit.gates) == (0.5, 5.0)
    explainer = pg.Explainer(shapes.model, pg.GradientEnergy(quantile=0.2), layers=0.5, gates=5.0)
    expected = pg.heatmap(explainer.attribute(shapes.preprocess(image).unsqueeze(0)))[0]
    np.testing.assert_allclose(found.heats[1], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
def test_methods_that_replace_rectifiers_are_swept_without_gates():
    shapes, image = pg.load_model("shapes"), Image.fromarray(data.cat())
    found = quantile_sweep(shapes, image, quantiles=(0.5,), method="GuidedBackprop")
    assert found.edit.gates == 0


def test_the_figure_shows_all_maps(classifier, image):
    found = quantile_sweep(classifier, image, pg.Edit(layers=["conv_head"]), quantiles=(0.4, 0.1))
    figure = found.figure(columns=2, shared_scale=True)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[1:4] == ["plain gradient", "quantile 0.4", "quantile 0.1"]
    assert titles[0].startswith("espresso (")
    top = shared_top([found.plain, *found.heats])
    assert figure.axes[-1].get_xlim()[1] == pytest.approx(top)
    tops = [np.percentile(relative(heat), 99.5) for heat in (found.plain, *found.heats)]
    assert top == pytest.approx(np.percentile(tops, 90))
    assert "GradientEnergy" not in figure.texts[0].get_text()
    assert "Evidence" in figure.texts[0].get_text()
    for axes, heat in zip(found.figure(smooth=1, colormap="magma").axes[1:4], (found.plain, *found.heats), strict=True):
        expected = blend(found.picture, smooth(heat, 1), colormap="magma")
        np.testing.assert_allclose(axes.images[0].get_array(), expected)


def test_what_cannot_be_swept(classifier, image, held):
    with pytest.raises(SettingError, match="`quantiles` is empty"):
        quantile_sweep(classifier, image, quantiles=())
    for twice in ((0.5, 0.1, 0.5), (0.1, 0.10000000001)):
        with pytest.raises(SettingError, match=r"`quantiles` contains 0\.\d twice"):
            quantile_sweep(classifier, image, quantiles=twice)
    with pytest.raises(SettingError, match="`quantile` is 2"):
        quantile_sweep(classifier, image, quantiles=(0.5, 2))
    with pytest.raises(SettingError, match="FixedChannels has no quantile"):
        quantile_sweep(classifier, image, pg.Edit(selector=pg.FixedChannels({})))
    with pytest.raises(SettingError, match="An edit without a selector has no quantile"):
        quantile_sweep(classifier, image, pg.Edit(selector=None))
    with pytest.raises(SettingError, match="`edit` is of type GradientEnergy"):
        quantile_sweep(classifier, image, pg.GradientEnergy())
    with pytest.raises(SettingError, match="GradientEnergy ranks without p-values"):
        alpha_sweep(classifier, image, pg.Edit(selector=pg.GradientEnergy()))
    edit = pg.Edit(selector=pg.ClassWise(held, quantile=0.1), layers=["conv_head"])
    with pytest.raises(StatisticsError, match="compact"):
        alpha_sweep(classifier, image, edit, alphas=(0.5,))
    with pytest.raises(TargetError):
        quantile_sweep(classifier, image, target=1000)


def test_the_model_keeps_nothing(classifier, image):
    quantile_sweep(classifier, image, quantiles=(0.1,))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in classifier.model.modules())
    assert all(parameter.grad is None for parameter in classifier.model.parameters())
