import numpy as np
import pytest
from PIL import Image
from skimage import data

import parchgrad as pg
from parchgrad.errors import SettingError, StatisticsError, TargetError
from parchgrad.visual import relative, shared_top
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
    found = quantile_sweep(
        classifier, image, pg.GradientEnergy(quantile=0.9), quantiles=(0.4, 0.1), layers=0.25, target=968
    )
    inputs = classifier.preprocess(image).unsqueeze(0)
    for quantile, heat in zip((0.4, 0.1), found.heats, strict=True):
        explainer = pg.Explainer(classifier.model, pg.GradientEnergy(quantile=quantile), layers=0.25)
        np.testing.assert_allclose(heat, pg.heatmap(explainer.attribute(inputs, 968))[0], rtol=1e-5, atol=1e-9)
    plain = pg.heatmap(pg.Explainer(classifier.model, None).attribute(inputs, 968))[0]
    np.testing.assert_allclose(found.plain, plain, rtol=1e-5, atol=1e-9)
    assert (found.target.index, found.target.category) == (968, "cup")
    assert found.titles() == ("quantile 0.4", "quantile 0.1")
    # A few channels of a tenth have no gradient.
    assert 0.38 < found.kept[0] <= 0.41
    assert 0.085 < found.kept[1] <= 0.105


def test_alpha_replaces_the_quantile(classifier, image, held):
    found = alpha_sweep(classifier, image, pg.ClassWise(held, quantile=0.2), alphas=(0.1, 0.01), layers=0.25)
    inputs = classifier.preprocess(image).unsqueeze(0)
    for alpha, heat in zip((0.1, 0.01), found.heats, strict=True):
        explainer = pg.Explainer(classifier.model, pg.ClassWise(held, alpha=alpha), layers=0.25)
        np.testing.assert_allclose(heat, pg.heatmap(explainer.attribute(inputs))[0], rtol=1e-5, atol=1e-9)
    assert found.target.category == "espresso"
    assert found.titles()[0] == f"alpha 0.1 ({found.kept[0]:.1%} kept)"
    again = quantile_sweep(classifier, image, pg.ClassWise(held, alpha=0.1), quantiles=(0.2,), layers=0.25)
    explainer = pg.Explainer(classifier.model, pg.ClassWise(held, quantile=0.2), layers=0.25)
    np.testing.assert_allclose(again.heats[0], pg.heatmap(explainer.attribute(inputs))[0], rtol=1e-5, atol=1e-9)


def test_other_methods_are_swept_too():
    shapes = pg.load_model("shapes")
    image = Image.fromarray(data.cat())
    found = quantile_sweep(
        shapes, image, pg.GradientEnergy(), quantiles=(0.3,), method="input_x_gradient", layers="all", gamma=2.0
    )
    inputs = shapes.preprocess(image).unsqueeze(0)
    explainer = pg.Explainer(
        shapes.model, pg.GradientEnergy(quantile=0.3), layers="all", gamma=2.0, method="input_x_gradient"
    )
    np.testing.assert_allclose(found.heats[0], pg.heatmap(explainer.attribute(inputs))[0], rtol=1e-5, atol=1e-9)


def test_the_figure_has_one_scale(classifier, image):
    found = quantile_sweep(classifier, image, pg.GradientEnergy(), quantiles=(0.4, 0.1), layers=["conv_head"])
    figure = found.figure(columns=2)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[1:4] == ["gradient, plain", "quantile 0.4", "quantile 0.1"]
    assert titles[0].startswith("espresso (")
    top = shared_top([found.plain, *found.heats])
    assert figure.axes[-1].get_xlim()[1] == pytest.approx(top)
    tops = [np.percentile(relative(heat), 99.5) for heat in (found.plain, *found.heats)]
    assert top == pytest.approx(np.median(tops))


def test_what_cannot_be_swept(classifier, image, held):
    with pytest.raises(SettingError, match="over no quantile at all"):
        quantile_sweep(classifier, image, pg.GradientEnergy(), quantiles=())
    with pytest.raises(SettingError, match="quantile is 2"):
        quantile_sweep(classifier, image, pg.GradientEnergy(), quantiles=(0.5, 2))
    with pytest.raises(SettingError, match="FixedChannels has no quantile"):
        quantile_sweep(classifier, image, pg.FixedChannels({}))
    with pytest.raises(SettingError, match="GradientEnergy ranks without p-values"):
        alpha_sweep(classifier, image, pg.GradientEnergy())
    with pytest.raises(StatisticsError, match="compact"):
        alpha_sweep(classifier, image, pg.ClassWise(held, quantile=0.1), alphas=(0.5,), layers=["conv_head"])
    with pytest.raises(TargetError):
        quantile_sweep(classifier, image, pg.GradientEnergy(), target=1000)


def test_the_model_keeps_nothing(classifier, image):
    quantile_sweep(classifier, image, pg.GradientEnergy(), quantiles=(0.1,), layers=["conv_head"])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in classifier.model.modules())
    assert all(parameter.grad is None for parameter in classifier.model.parameters())
