import copy
import math
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision

import parchgrad as pg
from parchgrad.errors import (
    InputError,
    LayerError,
    ModelError,
    NonFiniteError,
    SettingError,
    StatisticsError,
    TargetError,
)
from parchgrad.legacy.attribution_methods import get_input_attrib
from parchgrad.legacy.pickles import import_pickles
from parchgrad.legacy.pretrained_models import get_pretrained_model
from tests.support import ROOT, published_choice, random_statistics, small_network, write_pickles, write_statistics

PAGE = ROOT / "docs" / "coming_from_the_research_code.md"
CLASSES = 10

# The calls of the research code's README, with the flags of its tutorial.
SNIPPET = """
model = get_pretrained_model(encoder)
model.to(device)
model.eval()

wrapper = get_hook_wrapper(encoder, model, method)
wrapper.prepare_parchgrad(base_directory=base_dir, device=device)

layer_ratio = None
selected_convolutions = wrapper.get_default_hook_convolutions(layer_ratio)
wrapper.set_hook_modules(selected_convolutions)

from parchgrad.legacy.attribution_methods import get_input_attrib
input_attrib = get_input_attrib('grad')
attr = input_attrib(wrapper, x, y,
                    cls=y,
                    modify_gradient=False if flags.method == 'normal' else True,
                    quantile=None,
                    alpha=flags.alpha,
                    p_value_threshold=flags.p_value_threshold,
                    variance_conservation=flags.variance_conservation,
                    exact_variance=flags.exact_variance,
                    gamma_infinity=flags.gamma_infinity,
                    enable_forward_hook=True if flags.method == 'ins' else False,
)
"""


@pytest.fixture(scope="module")
def networks():
    """Random networks of ten classes, whose batch norms have seen pictures: signals would fade away otherwise."""
    torch.manual_seed(0)
    build = torchvision.models.get_model
    found = {name: build(name, num_classes=CLASSES) for name in ("resnet18", "vgg16_bn", "efficientnet_b0")}
    for model in found.values():
        model.eval()
        norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.train().momentum = 1.0
        with torch.no_grad():
            model(torch.randn(4, 3, 64, 64))
            model.eval()
            # No class is certain, so that the probabilities count.
            final = list(model.parameters())[-2]
            final /= model(torch.randn(1, 3, 64, 64)).abs().max()
    return found


def published(statistics, kind=pg.ClassWise, quantile=0.5):
    """A selector of the published method: a hard cut, with the true derivatives around it."""
    return kind(statistics, quantile=quantile, softness=0)


@pytest.fixture
def _loading(monkeypatch, networks):
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: networks[name])


def seeded_gradient(model, x, y):
    """Gradient of one image from a seed at the logits: the softmax probability of the class."""
    batch = x.unsqueeze(0).requires_grad_()
    logits = model(batch)
    seed = torch.zeros_like(logits)
    seed[:, y] = logits.detach().softmax(dim=1)[:, y]
    return torch.autograd.grad(logits, batch, seed)[0][0]


@pytest.mark.usefixtures("_loading")
@pytest.mark.parametrize(
    ("encoder", "source", "method"),
    # Every pair of an encoder and a source, an encoder and a method, and a source and a method.
    [
        (encoder, ("pickles", "file")[(row + column) % 2], method)
        for row, encoder in enumerate(("resnet18", "vgg16", "efficient_b0"))
        for column, method in enumerate(("cls", "ins", "normal"))
    ],
)
def test_the_published_snippet(networks, tmp_path, encoder, source, method):
    name = {"resnet18": "resnet18", "vgg16": "vgg16_bn", "efficient_b0": "efficientnet_b0"}[encoder]
    base_dir = tmp_path / encoder
    if source == "pickles":
        write_pickles(base_dir / "pickles", networks[name], CLASSES)
        statistics = import_pickles(base_dir, networks[name], name=encoder)
    else:
        statistics = write_statistics(base_dir / f"{encoder}.safetensors", networks[name], CLASSES)
    flags = SimpleNamespace(
        method=method,
        alpha=0.4,
        p_value_threshold=0.05,
        variance_conservation=True,
        exact_variance=False,
        gamma_infinity=True,
    )
    x, y = torch.randn(3, 64, 64), torch.tensor([3])
    names = {
        "get_pretrained_model": get_pretrained_model,
        "get_hook_wrapper": pg.get_hook_wrapper,
        "device": "cpu",
        "base_dir": str(base_dir),
        "encoder": encoder,
        "method": method,
        "flags": flags,
        "x": x,
        "y": y,
    }
    exec(compile(SNIPPET, "snippet", "exec"), names)

    model = names["model"]
    assert model is networks[name]
    plain = seeded_gradient(model, x, 3)
    selector = {
        "cls": pg.ClassWise(statistics, alpha=0.4, softness=0),
        "ins": pg.InstanceWise(statistics, alpha=0.4, softness=0),
        "normal": None,
    }[method]
    expected = plain
    if selector is not None:
        layers = published_choice(encoder, model) if encoder != "resnet18" else ["layer[34].*.conv?"]
        with pg.ParchGrad(model, selector, layers=layers, conserve="independent"):
            expected = seeded_gradient(model, x, 3)
        assert (expected - plain).abs().max() > 0.01 * plain.abs().max()
    assert plain.abs().max() > 0
    assert names["attr"].shape == (64, 64)
    atol = 1e-6 * float(expected.abs().max())
    torch.testing.assert_close(names["attr"], expected.abs().mean(0), rtol=1e-5, atol=atol)


STATISTICS = random_statistics({"0": 6, "2": 6})
LAYERS = ["0", "2"]


@pytest.fixture
def wrapper(network, tmp_path):
    STATISTICS.save(tmp_path / "resnet18.safetensors")
    found = pg.get_hook_wrapper("resnet18", network, "cls")
    found.prepare_parchgrad(base_directory=tmp_path, device="cpu")
    found.set_hook_modules(found.all_convolutions)
    return found


@pytest.fixture
def x():
    return torch.randn(3, 8, 8, dtype=torch.float64)


# What each of the three switches stands for: gamma and conserve.
SWITCHES = {
    (True, False, True): (math.inf, "independent"),
    (True, True, True): (math.inf, "exact"),
    (False, False, True): (math.inf, "none"),
    (False, True, True): (math.inf, "none"),
    (True, False, False): (1.0, "independent"),
    (True, True, False): (1.0, "exact"),
    (False, False, False): (1.0, "none"),
    (False, True, False): (1.0, "none"),
}


@pytest.mark.parametrize(("switches", "setting"), SWITCHES.items())
def test_every_combination_of_the_switches(wrapper, x, switches, setting):
    conservation, exact, infinite = switches
    gamma, conserve = setting
    found = get_input_attrib("grad")(
        wrapper,
        x,
        torch.tensor([2]),
        cls=torch.tensor([2]),
        quantile=0.5,
        p_value_threshold=0.05,
        variance_conservation=conservation,
        exact_variance=exact,
        gamma_infinity=infinite,
    )
    with pg.ParchGrad(wrapper.model, published(STATISTICS), layers=LAYERS, gamma=gamma, conserve=conserve):
        expected = seeded_gradient(wrapper.model, x, 2)
    assert torch.equal(found, expected.abs().mean(0))


def test_the_switches_differ(wrapper, x):
    """So that the test above cannot pass by chance."""
    maps = [
        get_input_attrib("grad")(
            wrapper, x, 2, quantile=0.5, variance_conservation=a, exact_variance=b, gamma_infinity=c
        )
        for a, b, c in SWITCHES
        if a or not b
    ]
    assert all(not torch.allclose(one, two) for i, one in enumerate(maps) for two in maps[:i])


def test_a_finite_gamma_of_ones_own(wrapper, x):
    found = get_input_attrib("grad")(wrapper, x, 2, quantile=0.5, gamma_infinity=False, gamma=4.0)
    with pg.ParchGrad(wrapper.model, published(STATISTICS), layers=LAYERS, gamma=4.0, conserve="independent"):
        expected = seeded_gradient(wrapper.model, x, 2)
    assert torch.equal(found, expected.abs().mean(0))
    unread = get_input_attrib("grad")(wrapper, x, 2, quantile=0.5, gamma=4.0)
    assert torch.equal(unread, get_input_attrib("grad")(wrapper, x, 2, quantile=0.5))


def test_defaults_are_those_of_the_research_code(wrapper, x):
    found = get_input_attrib("grad")(wrapper, x, 2, quantile=0.5)
    said = get_input_attrib("grad")(
        wrapper,
        x,
        2,
        cls=2,
        modify_gradient=True,
        quantile=0.5,
        alpha=0.001,
        p_value_threshold=0.05,
        variance_conservation=True,
        exact_variance=False,
        gamma_infinity=True,
        enable_forward_hook=False,
    )
    assert torch.equal(found, said)


def test_channels_of_another_class(wrapper, x):
    found = get_input_attrib("grad")(wrapper, x, torch.tensor([2]), cls=torch.tensor([4]), quantile=0.5)
    with pg.ParchGrad(wrapper.model, published(STATISTICS), layers=LAYERS, target=4, conserve="independent"):
        expected = seeded_gradient(wrapper.model, x, 2)
    assert torch.equal(found, expected.abs().mean(0))
    assert not torch.allclose(found, get_input_attrib("grad")(wrapper, x, 2, quantile=0.5))


@pytest.mark.parametrize("threshold", [0.005, 0.05, None])
def test_the_gate_on_normality(wrapper, x, threshold):
    # Every channel has p = 0.01: below 0.005 none is left, and the layer passes unchanged.
    found = get_input_attrib("grad")(wrapper, x, 2, alpha=0.5, p_value_threshold=threshold)
    plain = seeded_gradient(wrapper.model, x, 2)
    assert torch.equal(found, plain.abs().mean(0)) == (threshold == 0.005)


def nodes_and_weights():
    nodes, weights = np.polynomial.legendre.leggauss(25)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


def independent_map(name, model, x, y):
    """Each method again, pass by pass, every pass weighted by its own probability."""
    if name == "grad":
        return seeded_gradient(model, x, y)
    if name == "inputgrad":
        return x * seeded_gradient(model, x, y)
    if name == "ig":
        pairs = zip(*nodes_and_weights(), strict=True)
        return x * sum(weight * seeded_gradient(model, x * node, y) for node, weight in pairs)
    noise = torch.randn(25, *x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    spread = 0.15 * (x.max() - x.min())
    return torch.stack([seeded_gradient(model, x + spread * sample, y) for sample in noise]).mean(0)


@pytest.mark.parametrize("name", ["grad", "inputgrad", "ig", "smoothgrad"])
@pytest.mark.parametrize("method", ["cls", "ins", "normal"])
def test_every_method(wrapper, x, name, method, tmp_path):
    wrapper = pg.get_hook_wrapper("resnet18", wrapper.model, method)
    wrapper.prepare_parchgrad(tmp_path)
    wrapper.set_hook_modules(wrapper.get_default_hook_convolutions(1.0))
    found = get_input_attrib(name)(wrapper, x, torch.tensor([1]), quantile=0.5)
    expected = independent_map(name, wrapper.model, x, 1)
    if method != "normal":
        selector = published(STATISTICS, pg.ClassWise if method == "cls" else pg.InstanceWise)
        with pg.ParchGrad(wrapper.model, selector, layers=LAYERS, conserve="independent"):
            expected = independent_map(name, wrapper.model, x, 1)
    torch.testing.assert_close(found, expected.abs().mean(0), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["grad", "inputgrad"])
def test_one_pass_is_the_new_map_times_the_probability(wrapper, x, name):
    method = {"grad": "gradient", "inputgrad": "input_x_gradient"}[name]
    explainer = pg.Explainer(wrapper.model, published(STATISTICS), layers=LAYERS, method=method, conserve="exact")
    probability = wrapper.model(x.unsqueeze(0)).softmax(1)[0, 3].detach()
    expected = probability * pg.heatmap(explainer.attribute(x.unsqueeze(0), target=3))[0]
    found = get_input_attrib(name)(wrapper, x, 3, quantile=0.5, exact_variance=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_the_plain_gradient_on_request(wrapper, x):
    expected = seeded_gradient(wrapper.model, x, 2).abs().mean(0)
    bare = pg.get_hook_wrapper("resnet18", wrapper.model, "cls")
    for plain in (wrapper, bare):
        assert torch.equal(get_input_attrib("grad")(plain, x, 2, modify_gradient=False), expected)
    # Also within a block of someone else.
    with pg.ParchGrad(wrapper.model, pg.GradientEnergy(quantile=0.2), layers="all"):
        assert torch.equal(get_input_attrib("grad")(bare, x, 2, modify_gradient=False), expected)
        wrapper.model(x.unsqueeze(0).requires_grad_())


def hooks_of(model):
    return [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), len(m._backward_pre_hooks))
        for m in model.modules()
    ]


@pytest.mark.parametrize("name", ["grad", "ig"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_not_changed(tmp_path, x, name, fails):
    model = small_network()
    before = copy.deepcopy(model)
    attributes = [sorted(vars(module)) for module in model.modules()]
    STATISTICS.save(tmp_path / "resnet18.safetensors")
    wrapper = pg.get_hook_wrapper("resnet18", model, "cls")
    wrapper.prepare_parchgrad(tmp_path, "cpu")
    wrapper.set_hook_modules(wrapper.get_default_hook_convolutions(1.0))
    if fails:
        with pytest.raises(TargetError):
            get_input_attrib(name)(wrapper, x, 99, quantile=0.5)
    else:
        image = x.clone().requires_grad_()
        found = get_input_attrib(name)(wrapper, image, 2, quantile=0.5)
        assert not found.requires_grad
        assert image.grad is None
        assert torch.equal(image, x)
    assert hooks_of(model) == hooks_of(before)
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert [module.inplace for module in model.modules() if hasattr(module, "inplace")] == [True, True]
    assert not any(module.training for module in model.modules())
    for parameter, other in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter, other)
        assert parameter.requires_grad == other.requires_grad
        assert parameter.grad is None
    assert all(map(torch.equal, model.buffers(), before.buffers()))


def test_half_precision_and_another_size(tmp_path):
    model = small_network(dtype=torch.bfloat16)
    STATISTICS.save(tmp_path / "resnet18.safetensors")
    wrapper = pg.get_hook_wrapper("resnet18", model, "ins")
    wrapper.prepare_parchgrad(tmp_path)
    wrapper.set_hook_modules(wrapper.all_convolutions)
    x = torch.randn(3, 9, 13, dtype=torch.bfloat16)
    found = get_input_attrib("grad")(wrapper, x, torch.tensor(2), quantile=0.5)
    assert found.dtype == torch.bfloat16
    with pg.ParchGrad(model, published(STATISTICS, pg.InstanceWise), layers=LAYERS, conserve="independent"):
        expected = seeded_gradient(model, x, 2)
    torch.testing.assert_close(found, expected.abs().mean(0))


def test_what_cannot_be_explained_is_said_in_words(wrapper, x):
    grad = get_input_attrib("grad")
    for shape in ((1, 3, 8, 8), (8, 8)):
        with pytest.raises(InputError, match=r"x` has shape .*, but must be one image \(C, H, W\)"):
            grad(wrapper, torch.zeros(shape), 2, quantile=0.5)
    with pytest.raises(InputError, match="x` has type str"):
        grad(wrapper, "photo.jpg", 2, quantile=0.5)
    with pytest.raises(InputError, match="first convolution takes 3 channels"):
        grad(wrapper, x[:1], 2, quantile=0.5)
    with pytest.raises(InputError, match="NaN or infinite"):
        grad(wrapper, x * math.nan, 2, quantile=0.5)
    with pytest.raises(TargetError, match=r"`target` holds 5, .* 5 classes"):
        grad(wrapper, x, torch.tensor([5]), quantile=0.5)
    with pytest.raises(TargetError, match="`target` is None, but it must be a class index"):
        grad(wrapper, x, None, quantile=0.5)
    with pytest.raises(TargetError, match="y` has 2 classes"):
        grad(wrapper, x, torch.tensor([1, 2]), quantile=0.5)
    with pytest.raises(TargetError, match="cls` has 2 classes"):
        grad(wrapper, x, 1, cls=[1, 2], quantile=0.5)
    with pytest.raises(TargetError, match="`target` holds 7"):
        grad(wrapper, x, 1, cls=7, quantile=0.5)


def test_settings_that_are_out_of_range(wrapper, x):
    grad = get_input_attrib("grad")
    assert torch.equal(grad(wrapper, x, 2), grad(wrapper, x, 2, quantile=0.1))
    for settings, words in (
        ({"quantile": 0}, "`quantile` is 0"),
        ({"alpha": 1.5}, "alpha` is 1.5"),
        ({"quantile": 0.5, "p_value_threshold": 2}, "normality_threshold` is 2"),
        ({"quantile": 0.5, "gamma_infinity": False, "gamma": -1}, "`gamma` is -1"),
    ):
        with pytest.raises(SettingError, match=words):
            grad(wrapper, x, 2, **settings)
    with pytest.raises(SettingError, match="wrapper` is a Sequential"):
        grad(wrapper.model, x, 2, quantile=0.5)
    with pytest.raises(SettingError, match=r"method 'gradd'.*'grad'"):
        get_input_attrib("gradd")
    with pytest.raises(SettingError, match="grad, inputgrad, ig, smoothgrad"):
        get_input_attrib("LRP")


def test_wrappers_that_are_not_ready(wrapper, x, tmp_path):
    grad = get_input_attrib("grad")
    bare = pg.get_hook_wrapper("resnet18", wrapper.model, "cls")
    with pytest.raises(StatisticsError, match="prepare_parchgrad"):
        grad(bare, x, 2, quantile=0.5)
    bare.prepare_parchgrad(tmp_path)
    with pytest.raises(LayerError, match=r"wrapper.set_hook_modules\(wrapper.get_default_hook_convolutions\(\)\)"):
        grad(bare, x, 2, quantile=0.5)
    STATISTICS.restrict(layers=["2"]).save(tmp_path / "few.safetensors")
    bare.prepare_parchgrad(tmp_path / "few.safetensors")
    bare.set_hook_modules(bare.all_convolutions)
    with pytest.raises(StatisticsError, match="such as '0'"):
        grad(bare, x, 2, quantile=0.5)
    wrapper.model.train()
    with pytest.raises(ModelError, match=r"in training mode.* model\.eval\(\)"):
        grad(wrapper, x, 2, quantile=0.5)


def test_inception_without_its_auxiliary_head(monkeypatch, tmp_path):
    build = torchvision.models.get_model

    def random(name, weights):
        assert weights is torchvision.models.Inception_V3_Weights.IMAGENET1K_V1
        return build(name, weights=None, init_weights=False, num_classes=CLASSES, aux_logits=True)

    monkeypatch.setattr(torchvision.models, "get_model", random)
    model = get_pretrained_model("inceptionv3")
    assert model.AuxLogits is None
    wrapper = pg.get_hook_wrapper("inceptionv3", model, "cls")
    statistics = write_statistics(tmp_path / "inceptionv3.safetensors", model, CLASSES)
    wrapper.prepare_parchgrad(tmp_path)
    wrapper.set_hook_modules(wrapper.get_default_hook_convolutions())
    x = torch.randn(3, 299, 299)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = get_input_attrib("grad")(wrapper, x, 4, quantile=0.3)
    selector = published(statistics, quantile=0.3)
    with pg.ParchGrad(model, selector, layers=wrapper.hook_modules, conserve="independent"):
        expected = seeded_gradient(model, x, 4)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected.abs().mean(0), rtol=1e-5, atol=0)


def test_the_blocks_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    torch.testing.assert_close(names["attr"], names["heat"] * names["probability"])
    assert names["attr"].shape == (224, 224)
    assert names["attr"].max() > 0


@pytest.mark.parametrize("modify_gradient", [False, True])
def test_what_is_not_finite_is_named_within_the_network(modify_gradient):
    model = torchvision.models.resnet18(num_classes=CLASSES).eval()
    wrapper = pg.get_hook_wrapper("resnet18", model, "normal")
    wrapper.set_hook_modules(wrapper.get_default_hook_convolutions(None))
    x = torch.randn(3, 64, 64)
    model.layer2[0].conv1.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"in the weight of layer 'layer2.0.conv1' \(Conv2d\)"):
        get_input_attrib("grad")(wrapper, x, 1, modify_gradient=modify_gradient)
