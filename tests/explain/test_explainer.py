import pickle

import captum.attr
import pytest
import torch
from torch import nn

import parchgrad as pg
from parchgrad.errors import InputError, ModelError, SettingError, TargetError
from parchgrad.explain.methods import METHODS
from parchgrad.statistics.selectors import registered_selectors
from tests.support import random_statistics, small_network

INPUTS = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
TARGETS = torch.tensor([4, 0, 2, 1])


def captum_map(model, name, **options):
    x = INPUTS.clone().requires_grad_()
    return getattr(captum.attr, name)(model).attribute(x, target=TARGETS, **options).detach()


PLAIN = {
    "gradient": lambda model: captum_map(model, "Saliency", abs=False),
    "input_x_gradient": lambda model: captum_map(model, "InputXGradient"),
    "integrated_gradients": lambda model: captum_map(model, "IntegratedGradients", n_steps=25),
    "Saliency": lambda model: captum_map(model, "Saliency"),
    "IntegratedGradients": lambda model: captum_map(model, "IntegratedGradients"),
    "DeepLift": lambda model: captum_map(model, "DeepLift"),
    "GuidedBackprop": lambda model: captum_map(model, "GuidedBackprop"),
    "Deconvolution": lambda model: captum_map(model, "Deconvolution"),
}


def out_of_place(model):
    """Captum's methods that set hooks on ReLU do not work on in-place ones."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


# Captum's own notices that a method sets hooks.
@pytest.mark.filterwarnings("ignore:Setting (backward|forward)")
@pytest.mark.parametrize("method", PLAIN)
def test_plain_methods_are_captums(method):
    model = out_of_place(small_network())
    found = pg.Explainer(model, None, method=method).attribute(INPUTS, TARGETS)
    torch.testing.assert_close(found, PLAIN[method](model), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("method", ["gradient", "input_x_gradient", "integrated_gradients"])
def test_partitioned_methods_are_captums_inside_the_block(method):
    model, selector = small_network(), pg.GradientEnergy(quantile=0.3)
    found = pg.Explainer(model, selector, layers="all", method=method).attribute(INPUTS, TARGETS)
    with pg.ParchGrad(model, selector, layers="all"):
        expected = PLAIN[method](model)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    assert not torch.allclose(found, PLAIN[method](model))


def test_smoothgrad_of_one_image_is_captums_noise_tunnel():
    model = small_network(dtype=torch.float32)
    x = INPUTS[:1].float()
    sigma = 0.2 * float(x.max() - x.min())
    torch.manual_seed(11)
    tunnel = captum.attr.NoiseTunnel(captum.attr.Saliency(model))
    expected = tunnel.attribute(x.clone().requires_grad_(), nt_samples=9, stdevs=sigma, target=3, abs=False)
    found = pg.Explainer(model, None, method="smoothgrad", samples=9, sigma=0.2, seed=11).attribute(x, 3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_smoothgrad_takes_a_seed_and_leaves_the_global_generator():
    model = small_network()
    maps = [pg.Explainer(model, None, method="smoothgrad", samples=3, seed=s).attribute(INPUTS, 0) for s in (1, 1, 2)]
    assert torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0], maps[2])
    state = torch.get_rng_state()
    pg.Explainer(model, None, method="smoothgrad", samples=3).attribute(INPUTS, 0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "selector",
    [None, pg.GradientEnergy(quantile=0.3), pg.GradientEnergy(quantile=0.3, softness=0), pg.Evidence()],
    ids=["plain", "energy", "hard", "evidence"],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_equals_its_rows_and_memory_bounds_change_nothing(method, selector):
    model = small_network()

    def explain(inputs, targets, size=32):
        explainer = pg.Explainer(model, selector, layers="all", method=method, internal_batch_size=size)
        return explainer.attribute(inputs, targets)

    whole = explain(INPUTS, TARGETS)
    rows = [explain(x.unsqueeze(0), int(y)) for x, y in zip(INPUTS, TARGETS, strict=True)]
    torch.testing.assert_close(whole, torch.cat(rows), rtol=1e-9, atol=1e-13)
    for size in (1, 3, None):
        torch.testing.assert_close(explain(INPUTS, TARGETS, size), whole, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_internal_batch_size_bounds_every_pass(method):
    model, sizes = small_network(), []
    handle = model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    pg.Explainer(model, pg.GradientEnergy(), method=method, internal_batch_size=3).attribute(INPUTS)
    handle.remove()
    assert max(sizes) <= 3


def test_no_target_explains_the_predicted_class():
    model = small_network()
    # Centred logits: each row wins another class.
    model[-1].bias.data -= model(INPUTS).mean(0).detach()
    explainer = pg.Explainer(model, pg.GradientEnergy(quantile=0.5))
    predicted = model(INPUTS).argmax(1)
    assert len(set(predicted.tolist())) > 1
    assert torch.equal(explainer.predict(INPUTS), predicted)
    assert torch.equal(explainer.attribute(INPUTS), explainer.attribute(INPUTS, predicted))


@pytest.mark.parametrize("target", [2, torch.tensor(2), [2, 2, 2, 2], torch.tensor([2, 2, 2, 2], dtype=torch.int32)])
def test_targets_in_every_form(target):
    explainer = pg.Explainer(small_network(), None)
    assert torch.equal(explainer.attribute(INPUTS, target), explainer.attribute(INPUTS, torch.full((4,), 2)))


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_works_under_grad_guards_and_leaves_the_inputs_alone(guard):
    explainer = pg.Explainer(small_network(), pg.GradientEnergy(quantile=0.5))
    expected = explainer.attribute(INPUTS, 1)
    with guard():
        x = INPUTS.clone()
        found = explainer.attribute(x, 1)
    assert torch.equal(found, expected)
    assert not found.requires_grad
    leaf = INPUTS.clone().requires_grad_()
    explainer.attribute(leaf, 1)
    assert leaf.grad is None
    assert not INPUTS.requires_grad


def test_options_reach_captum():
    model = small_network()
    options = {"n_steps": 7, "baselines": 0.5}
    found = pg.Explainer(model, None, method="integrated_gradients", **options).attribute(INPUTS, TARGETS)
    expected = captum_map(model, "IntegratedGradients", **options)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    # An option of the constructor.
    found = pg.Explainer(model, None, method="IntegratedGradients", multiply_by_inputs=False).attribute(INPUTS, TARGETS)
    x = INPUTS.clone().requires_grad_()
    expected = captum.attr.IntegratedGradients(model, multiply_by_inputs=False).attribute(x, target=TARGETS)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_baselines_per_row_go_with_their_rows():
    model, baselines = small_network(), torch.randn_like(INPUTS)
    options = {"method": "integrated_gradients", "baselines": baselines, "n_steps": 4}
    found = pg.Explainer(model, None, internal_batch_size=3, **options).attribute(INPUTS, TARGETS)
    expected = captum_map(model, "IntegratedGradients", n_steps=4, baselines=baselines)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_baselines_that_do_not_fit():
    explainer = pg.Explainer(
        small_network(), None, method="IntegratedGradients", baselines=torch.zeros_like(INPUTS[:3])
    )
    with pytest.raises(SettingError, match="There are 3 baselines for 4 rows"):
        explainer.attribute(INPUTS, TARGETS)
    scalar = pg.Explainer(small_network(), None, method="IntegratedGradients", baselines=torch.zeros_like(INPUTS[:1]))
    zero = pg.Explainer(small_network(), None, method="IntegratedGradients")
    torch.testing.assert_close(scalar.attribute(INPUTS, 1), zero.attribute(INPUTS, 1))


@pytest.mark.parametrize("rows", [0, 7])
@pytest.mark.parametrize("size", [2, None])
def test_there_is_a_baseline_for_each_row_or_one(rows, size):
    options = {"method": "integrated_gradients", "internal_batch_size": size}
    explainer = pg.Explainer(small_network(), None, baselines=torch.zeros(rows, 3, 8, 8), **options)
    with pytest.raises(SettingError, match=f"There are {rows} baselines for {len(INPUTS)} rows"):
        explainer.attribute(INPUTS, TARGETS)


def test_baselines_follow_the_type_of_the_inputs():
    model, baselines = small_network(dtype=torch.float32), torch.rand(1, 3, 8, 8)
    found, expected = (
        pg.Explainer(model, None, method="integrated_gradients", baselines=given).attribute(INPUTS.float(), TARGETS)
        for given in (baselines.double(), baselines)
    )
    torch.testing.assert_close(found, expected)


def test_a_baseline_for_each_channel_is_one_for_every_pixel():
    model, colours = small_network(), torch.tensor([0.1, 0.2, 0.3], dtype=INPUTS.dtype).reshape(1, 3, 1, 1)
    found = pg.Explainer(model, None, method="IntegratedGradients", baselines=colours, n_steps=4)
    expected = captum_map(model, "IntegratedGradients", n_steps=4, baselines=colours.expand_as(INPUTS))
    torch.testing.assert_close(found.attribute(INPUTS, TARGETS), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("method", ["integrated_gradients", "DeepLift", "GradientShap", "DeepLiftShap"])
@pytest.mark.parametrize(
    ("baselines", "named"),
    [
        ("black", "'black'"),
        (True, "a bool"),
        ([0], "a list"),
        (torch.zeros(()), r"a tensor of torch.float32 and shape \(\)"),
        (torch.zeros(3, 8, 8), r"a tensor of torch.float32 and shape \(3, 8, 8\)"),
        (torch.zeros(5, 3, 8, 8, dtype=torch.bool), r"a tensor of torch.bool and shape \(5, 3, 8, 8\)"),
        (torch.zeros(2, 3, 4, 4), r"a tensor of torch.float32 and shape \(2, 3, 4, 4\)"),
    ],
)
def test_baselines_of_another_kind_are_refused(method, baselines, named):
    explainer = pg.Explainer(out_of_place(small_network()), None, method=method, baselines=baselines)
    with pytest.raises(SettingError, match=rf"`baselines` is {named}, but .*3, 8, 8\)"):
        explainer.attribute(INPUTS, TARGETS)


# Captum's own notices that a method sets hooks.
@pytest.mark.filterwarnings("ignore:Setting (backward|forward)")
@pytest.mark.parametrize("method", ["DeepLift", "DeepLiftShap", "GradientShap", "GuidedBackprop", "GuidedGradCam"])
def test_captums_other_methods_batch_bound_and_clean_up(method):
    model, sizes = out_of_place(small_network()), []
    options = {
        "DeepLiftShap": {"baselines": torch.randn_like(INPUTS[:2])},
        "GradientShap": {"baselines": torch.zeros_like(INPUTS[:1]), "n_samples": 4},
        "GuidedGradCam": {"layer": model[2]},
    }.get(method, {})
    handle = model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    explainer = pg.Explainer(
        model, pg.GradientEnergy(quantile=0.3), layers="all", method=method, internal_batch_size=4, **options
    )
    whole = explainer.attribute(INPUTS, TARGETS)
    assert max(sizes) <= 4
    handle.remove()
    assert all(not module._forward_hooks and not module._backward_hooks for module in model.modules())
    if method != "GradientShap":
        rows = [explainer.attribute(INPUTS[i : i + 1], int(TARGETS[i])) for i in range(len(INPUTS))]
        torch.testing.assert_close(whole, torch.cat(rows), rtol=1e-9, atol=1e-12)


def test_methods_that_would_do_nothing_of_their_own_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(144, 2)).eval()
    with pytest.raises(ModelError, match="GuidedBackprop acts on modules of type ReLU, but Sequential"):
        pg.Explainer(model, None, method="GuidedBackprop")
    with pytest.raises(ModelError, match="DeepLift acts on modules of type ReLU, ELU"):
        pg.Explainer(model, None, method="DeepLift")


def test_an_explainer_can_be_pickled():
    explainer = pg.Explainer(small_network(), pg.GradientEnergy(quantile=0.3), method="smoothgrad", samples=3)
    copied = pickle.loads(pickle.dumps(explainer))
    assert torch.equal(copied.attribute(INPUTS, 1), explainer.attribute(INPUTS, 1))


def test_one_dimensional_signals_and_float32():
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(40, 3)).eval()
    x = torch.randn(2, 2, 12)
    attribution = pg.Explainer(model, pg.GradientEnergy(quantile=0.5), layers="all").attribute(x, [0, 2])
    with pg.ParchGrad(model, pg.GradientEnergy(quantile=0.5), layers="all"):
        leaf = x.clone().requires_grad_()
        model(leaf)[[0, 1], [0, 2]].sum().backward()
    torch.testing.assert_close(attribution, leaf.grad)
    assert attribution.dtype == torch.float32


# Captum's own notices that a method sets hooks.
@pytest.mark.filterwarnings("ignore:Setting (backward|forward)")
@pytest.mark.parametrize("method", ["DeepLift", "GuidedBackprop", "Deconvolution"])
def test_methods_that_replace_rectifiers_go_without_soft_gates(method):
    model = out_of_place(small_network())
    for gates in (2, 0.5):
        with pytest.raises(SettingError, match=f"`gates` is {gates}"):
            pg.Explainer(model, method=method, gates=gates)
    implied, said = pg.Explainer(model, method=method), pg.Explainer(model, method=method, gates=0)
    assert implied.edit.gates == said.edit.gates == 0
    assert implied.edit.antialias
    assert implied.edit.balance
    found = implied.attribute(INPUTS, TARGETS)
    assert torch.equal(found, said.attribute(INPUTS, TARGETS))
    assert not torch.allclose(found, pg.Explainer(model, None, method=method).attribute(INPUTS, TARGETS))


def test_an_explainer_made_of_an_edit_is_the_one_made_of_its_parts():
    model = small_network()
    edit = pg.Edit(selector=pg.GradientEnergy(quantile=0.4), gamma=2.0, conserve="exact", gates=3.0, balance=False)
    made = pg.Explainer.from_edit(model, edit, method="input_x_gradient")
    said = pg.Explainer(
        model,
        edit.selector,
        gamma=2.0,
        conserve="exact",
        gates=3.0,
        layers=0.5,
        antialias=True,
        balance=False,
        method="input_x_gradient",
    )
    assert torch.equal(made.attribute(INPUTS, TARGETS), said.attribute(INPUTS, TARGETS))
    names = ("layers", "gamma", "gates", "antialias", "balance")
    settings = [[getattr(each.edit, name) for name in names] for each in (made, said)]
    assert settings == [[0.5, 2.0, 3.0, True, False]] * 2
    assert pg.Explainer.from_edit(model, pg.Edit(selector=None)).edit.is_plain


def test_without_a_selector_rules_still_apply_where_they_are_asked_for():
    model = small_network()
    with pg.ParchGrad(model, None, gates=2):
        expected = PLAIN["gradient"](model)
    assert torch.equal(pg.Explainer(model, None, gates=2).attribute(INPUTS, TARGETS), expected)
    assert not torch.allclose(expected, PLAIN["gradient"](model))


def test_layers_are_those_of_the_block():
    model, x = small_network(), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    for selector, layers, asked, edited in (
        (pg.GradientEnergy(), "all", "all", ("0", "2")),
        (pg.Evidence(), None, "auto", ("2",)),
        (pg.GradientEnergy(), None, 0.5, ("2",)),
        (pg.Evidence(), 1, 1.0, ("0", "2")),
        (pg.Evidence(), ["2", "0"], ("0", "2"), ("0", "2")),
        (None, None, (), ()),
    ):
        explainer = pg.Explainer(model, selector, layers=layers)
        assert explainer.layers == asked
        assert explainer.edited_layers == ()
        explainer.attribute(x, 1)
        assert explainer.layers == explainer.edited_layers == edited


def test_heatmap_is_the_mean_magnitude_over_colours():
    attribution = torch.tensor([[[[1.0, -2.0]], [[-3.0, 0.0]]]])
    assert torch.equal(pg.heatmap(attribution), torch.tensor([[[2.0, 1.0]]]))
    with pytest.raises(InputError, match=r"needs \(B, C, \*S\)"):
        pg.heatmap(torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (torch.full((1, 3, 8, 8), torch.nan, dtype=torch.float64), "NaN or infinite"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(3, 8, dtype=torch.float64), "a non-empty batch"),
        (torch.zeros(3, 8, 8, dtype=torch.float64), r"inputs\.unsqueeze\(0\)"),
        (torch.zeros(1, 3, 8, 8), "torch.float32, but .* torch.float64"),
        ([[1.0]], "type list"),
        (torch.zeros(1, 3, 8, 8).to_sparse(), r"is torch.sparse_coo, .*inputs\.to_dense\(\)"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.float64), r"inputs\.movedim\(-1, 1\)"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.float64), "a non-empty batch"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.float64), "first convolution takes 3 channels"),
    ],
)
def test_bad_inputs(inputs, words):
    with pytest.raises(InputError, match=words):
        pg.Explainer(small_network(), pg.GradientEnergy()).attribute(inputs)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (5, "`target` holds 5, .* 5 classes"),
        (-1, "`target` holds -1"),
        (torch.tensor(1j), "torch.complex64 of shape"),
        ([0, 1], "`target` has 2 classes, but the batch has 4 rows"),
        (torch.zeros(4), "must be an integer"),
        ("cat", "must be a class index"),
    ],
)
@pytest.mark.parametrize("selector", [None, pg.GradientEnergy()], ids=["plain", "energy"])
def test_bad_targets(selector, target, words):
    with pytest.raises(TargetError, match=words):
        pg.Explainer(small_network(), selector).attribute(INPUTS, target)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "gradients"}, "'gradients'.*: gradient"),
        ({"method": "LayerGradCam"}, "'LayerGradCam'"),
        ({"method": "NoiseTunnel"}, "'NoiseTunnel'"),
        ({"samples": 3}, "`samples` .*'gradient'"),
        ({"method": "smoothgrad", "nt_samples": 3}, ": samples, seed, sigma"),
        ({"method": "smoothgrad", "samples": 0}, "`samples` is 0"),
        ({"method": "integrated_gradients", "inputs": 3}, "`inputs` is not an option"),
        ({"method": "GradientShap"}, "needs `baselines`"),
        ({"method": "GuidedGradCam"}, "needs `layer`"),
        ({"internal_batch_size": 0}, "`internal_batch_size` is 0"),
        ({"internal_batch_size": 2.5}, "`internal_batch_size` is 2.5"),
        ({"method": "LRP"}, "'LRP'"),
        ({"method": "integrated_gradients", "n_steps": 0}, "`n_steps` is 0"),
        ({"method": "smoothgrad", "samples": 2.5}, "`samples` is 2.5"),
        ({"method": "smoothgrad", "sigma": -1}, "`sigma` is -1"),
    ],
)
def test_bad_settings(options, words):
    with pytest.raises(SettingError, match=words):
        pg.Explainer(small_network(), None, **options)


# Captum's own notice that a method sets hooks.
@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks")
def test_models_that_cannot_be_explained():
    classifier = pg.load_model("resnet18", pretrained=False)
    with pytest.raises(ModelError, match=r"is a Classifier, .*its \.model"):
        pg.Explainer(classifier, None)
    with pytest.raises(ModelError, match="is a str"):
        pg.Explainer("resnet18", pg.GradientEnergy())
    with pytest.raises(ModelError, match=r"DeepLift failed .* module of its own"):
        pg.Explainer(classifier.model, None, method="DeepLift").attribute(torch.randn(1, 3, 64, 64), 1)
    model = small_network()
    with pytest.raises(ModelError, match=r"model\.eval\(\)"):
        pg.Explainer(model.train(), None).attribute(INPUTS)
    with pytest.raises(ModelError, match=r"model\.eval\(\)"):
        pg.Explainer(model, None).predict(INPUTS)
    model = model[:3].eval()
    with pytest.raises(ModelError, match=r"returns shape \(4, 6, 8, 8\), but logits of shape \(B, K\)"):
        pg.Explainer(model, None).attribute(INPUTS)


def test_errors_of_the_model_itself_pass_through():
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(3, 3)).double().eval()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        pg.Explainer(mlp, None).attribute(INPUTS)
    model = nn.Sequential(small_network()[:3], nn.Flatten(), nn.Linear(3, 3)).double().eval()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        pg.Explainer(model, None).attribute(INPUTS)


def test_an_explainer_says_what_it_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).eval()
    assert repr(pg.Explainer(model, None, method="smoothgrad")) == "Explainer(Sequential, smoothgrad, plain)"
    edited = pg.Explainer(model, pg.GradientEnergy(quantile=0.2), method="integrated_gradients")
    settings = "Sequential, integrated_gradients, GradientEnergy(quantile=0.2, softness=0.5)"
    assert repr(edited) == f"Explainer({settings}, layers=0.5)"
    edited.attribute(torch.randn(1, 3, 4, 4), 1)
    assert repr(edited) == f"Explainer({settings}, 1 layers)"


def test_the_stability_is_that_of_one_class_though_noise_turns_the_prediction():
    model = small_network()
    inputs = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    # No class leads by much, so that noise decides.
    model[7].bias.data -= model(inputs).detach().mean(dim=0)
    explainer = pg.Explainer(model, layers="all")
    predicted = explainer.predict(inputs)
    span = (inputs.flatten(1).amax(1) - inputs.flatten(1).amin(1)).reshape(-1, 1, 1, 1)
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert (explainer.predict(inputs + 0.3 * span * noise) != predicted).any()
    found = explainer.stability(inputs, noise=0.3, draws=4)
    assert torch.equal(found, explainer.stability(inputs, predicted, noise=0.3, draws=4))


def test_more_rows_of_logits_than_inputs_are_refused():
    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = small_network()

        def forward(self, clips):
            return self.network(clips.flatten(0, 1))

    model, clips = Frames().eval(), torch.randn(2, 3, 3, 8, 8, dtype=torch.float64)
    for target in (None, 1):
        with pytest.raises(ModelError, match="6 rows of logits for 2 inputs"):
            pg.Explainer(model).attribute(clips, target)
    found = pg.Explainer(model).attribute(clips, lambda logits: logits.unflatten(0, (-1, 3))[:, 0, 1])
    of_frames = pg.Explainer(model.network).attribute(clips[:, 0], 1)
    torch.testing.assert_close(found[:, 0], of_frames)


@pytest.mark.parametrize("method", ["gradient", "smoothgrad"])
def test_the_default_device_does_not_matter(method):
    # On meta, any tensor that the package makes there would hold no numbers.
    network, statistics = small_network(), random_statistics({"0": 6, "2": 6})
    kept = torch.arange(6) < 2
    for selector in (
        None,
        *(found.make(quantile=0.3, statistics=statistics) for found in registered_selectors().values()),
        pg.FixedChannels({"0": kept, "2": kept}),
    ):
        explainer = pg.Explainer(network, selector, layers="all", method=method)
        expected = explainer.attribute(INPUTS, 1), explainer.stability(INPUTS)
        with torch.device("meta"):
            found = explainer.attribute(INPUTS, 1), explainer.stability(INPUTS)
        assert all(map(torch.equal, found, expected))
