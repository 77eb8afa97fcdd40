"""Models with several inputs, which are given as a tuple."""

import captum.attr
import numpy
import pytest
import torch
from torch import nn

import parchgrad as pg
from parchgrad.errors import InputError, ModelError, NonFiniteError, SettingError, TargetError
from parchgrad.explain.methods import METHODS
from parchgrad.explain.stability import cosine

_generator = torch.Generator().manual_seed(5)
COLOUR, DEPTH, DATA = (
    torch.randn(4, *shape, generator=_generator, dtype=torch.float64) for shape in ((3, 8, 8), (1, 8, 8), (5,))
)
TARGETS = torch.tensor([4, 0, 2, 1])
of_all = pytest.mark.parametrize("selector", [None, pg.Evidence()], ids=["plain", "evidence"])
# Captum's own notices that a method sets hooks.
quiet = pytest.mark.filterwarnings("ignore:Setting (backward|forward)")
CAPTUM = {
    "gradient": ("Saliency", {"abs": False}),
    "input_x_gradient": ("InputXGradient", {}),
    "integrated_gradients": ("IntegratedGradients", {"n_steps": 25}),
    "Saliency": ("Saliency", {}),
    "DeepLift": ("DeepLift", {}),
    "GuidedBackprop": ("GuidedBackprop", {}),
    "Deconvolution": ("Deconvolution", {}),
}


def four_channels():
    torch.manual_seed(1)
    layers = [nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)).double().eval()


class Fused(nn.Module):
    """Concatenates colour and depth."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, colour, depth):
        return self.network(torch.cat((colour, depth), dim=1))


class Patient(nn.Module):
    """Classifies an image together with measurements (B, 5)."""

    def __init__(self, prepare=lambda data: data):
        super().__init__()
        torch.manual_seed(2)
        self.image = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten())
        self.data = nn.Sequential(nn.Linear(5, 8), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(104, 12), nn.Tanh(), nn.Linear(12, 5))
        self.prepare = prepare
        self.double().eval()

    def forward(self, image, data):
        return self.head(torch.cat((self.image(image), self.data(self.prepare(data))), dim=1))


def captum_maps(model, method, inputs, **options):
    name, defaults = CAPTUM.get(method, (method, {}))
    leaves = tuple(each.clone().requires_grad_() for each in inputs)
    return getattr(captum.attr, name)(model).attribute(leaves, target=TARGETS, **{**defaults, **options})


def same(found, expected, rtol=1e-9, atol=1e-13):
    assert isinstance(found, tuple)
    assert all(not each.requires_grad for each in found)
    torch.testing.assert_close(found, tuple(expected), rtol=rtol, atol=atol)


@quiet
@pytest.mark.parametrize("method", CAPTUM)
@of_all
def test_two_images_have_the_maps_of_one_image_with_the_channels_of_both(selector, method):
    network, options = four_channels(), {"layers": "all", "method": method, "internal_batch_size": 3}
    whole = pg.Explainer(network, selector, **options).attribute(torch.cat((COLOUR, DEPTH), dim=1), TARGETS)
    found = pg.Explainer(Fused(network).eval(), selector, **options).attribute((COLOUR, DEPTH), TARGETS)
    same(found, (whole[:, :3], whole[:, 3:]))


@of_all
def test_gradients_of_an_image_and_its_measurements_by_hand(selector):
    model = Patient()
    leaves = COLOUR.clone().requires_grad_(), DATA.clone().requires_grad_()
    with pg.ParchGrad(model, selector, layers="all"):
        expected = torch.autograd.grad(model(*leaves)[range(4), TARGETS].sum(), leaves)
    explainer = pg.Explainer(model, selector, layers="all")
    same(explainer.attribute((COLOUR, DATA), TARGETS), expected)
    product = pg.Explainer(model, selector, layers="all", method="input_x_gradient")
    same(product.attribute((COLOUR, DATA), TARGETS), (COLOUR * expected[0], DATA * expected[1]))
    assert COLOUR.grad is None
    assert not COLOUR.requires_grad


@quiet
@pytest.mark.parametrize("method", CAPTUM)
def test_methods_for_an_image_and_its_measurements_are_captums(method):
    model = Patient()
    found = pg.Explainer(model, None, method=method).attribute((COLOUR, DATA), TARGETS)
    same(found, [each.detach() for each in captum_maps(model, method, (COLOUR, DATA))])


def test_integrated_gradients_of_both_inputs_add_up_to_the_change_of_the_score():
    model = Patient()
    explainer = pg.Explainer(model, None, method="integrated_gradients", n_steps=100, baselines=(0.5, DATA[:1]))
    found = explainer.attribute((COLOUR, DATA), 3)
    with torch.no_grad():
        change = model(COLOUR, DATA)[:, 3] - model(torch.full_like(COLOUR, 0.5), DATA[:1].expand(4, -1))[:, 3]
    torch.testing.assert_close(found[0].sum((1, 2, 3)) + found[1].sum(1), change, rtol=0, atol=5e-3)


def test_smoothgrad_by_hand():
    model, seed, samples, sigma = Patient(), 3, 6, 0.2
    drawn = [
        torch.randn(samples, *each.shape[1:], generator=torch.Generator().manual_seed(seed + index)).double()
        for index, each in enumerate((COLOUR, DATA))
    ]
    spans = [each.flatten(1).amax(1) - each.flatten(1).amin(1) for each in (COLOUR, DATA)]
    expected = [torch.zeros_like(COLOUR), torch.zeros_like(DATA)]
    for sample in range(samples):
        colour = COLOUR + sigma * spans[0].reshape(4, 1, 1, 1) * drawn[0][sample]
        leaves = colour.requires_grad_(), (DATA + sigma * spans[1].reshape(4, 1) * drawn[1][sample]).requires_grad_()
        for total, gradient in zip(
            expected, torch.autograd.grad(model(*leaves)[range(4), TARGETS].sum(), leaves), strict=True
        ):
            total += gradient / samples
    options = {"method": "smoothgrad", "samples": samples, "sigma": sigma, "seed": seed}
    same(pg.Explainer(model, None, internal_batch_size=7, **options).attribute((COLOUR, DATA), TARGETS), expected)


def test_inputs_of_the_same_shape_get_noise_of_their_own():
    class Difference(nn.Module):
        def forward(self, first, second):
            return (first - second).flatten(1).square().sum(dim=1, keepdim=True)

    explainer = pg.Explainer(Difference().eval(), None, method="smoothgrad", samples=2)
    first, second = explainer.attribute((COLOUR, COLOUR.clone()), 0)
    # The same noise would cancel.
    assert first.any()
    torch.testing.assert_close(first, -second)


@pytest.mark.parametrize("method", METHODS)
@of_all
def test_a_batch_equals_its_rows_and_memory_bounds_change_nothing(method, selector):
    model, sizes = Patient(), []

    def explain(inputs, targets, size=32):
        explainer = pg.Explainer(model, selector, layers="all", method=method, internal_batch_size=size)
        return explainer.attribute(inputs, targets)

    whole = explain((COLOUR, DATA), TARGETS)
    rows = [explain((COLOUR[i : i + 1], DATA[i : i + 1]), int(TARGETS[i])) for i in range(4)]
    same(whole, map(torch.cat, zip(*rows, strict=True)))
    model.register_forward_pre_hook(lambda module, inputs: sizes.append([len(each) for each in inputs]))
    same(explain((COLOUR, DATA), TARGETS, 3), whole)
    assert all(image == data <= 3 for image, data in sizes)


@quiet
@pytest.mark.parametrize("method", ["integrated_gradients", "DeepLift"])
@pytest.mark.parametrize("size", [3, None])
def test_a_baseline_for_each_input(method, size):
    model, of_rows = Patient(), torch.randn_like(DATA)
    steps = {} if method == "DeepLift" else {"n_steps": 4}
    colours = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64).reshape(1, 3, 1, 1)
    for given, expanded in (
        (0.5, (0.5, torch.full_like(DATA, 0.5))),
        ((0.5, 0), (0.5, 0)),
        ((0.25, of_rows), (0.25, of_rows)),
        ((colours, of_rows.float()), (colours.expand_as(COLOUR), of_rows.float().double())),
    ):
        explainer = pg.Explainer(model, None, method=method, baselines=given, internal_batch_size=size, **steps)
        expected = captum_maps(model, method, (COLOUR, DATA), baselines=expanded, **steps)
        same(explainer.attribute((COLOUR, DATA), TARGETS), [each.detach() for each in expected])


@quiet
@pytest.mark.parametrize("method", ["DeepLiftShap", "GradientShap"])
def test_samples_of_baselines_for_each_input(method):
    model, samples = Patient(), (torch.randn_like(COLOUR[:3]), torch.randn_like(DATA[:3]))

    def drawn(explain):
        torch.manual_seed(0)
        numpy.random.seed(0)
        return [each.detach() for each in explain()]

    explainer = pg.Explainer(model, None, method=method, baselines=samples, internal_batch_size=None)
    found = drawn(lambda: explainer.attribute((COLOUR, DATA), TARGETS))
    same(tuple(found), drawn(lambda: captum_maps(model, method, (COLOUR, DATA), baselines=samples)))


@quiet
def test_guided_grad_cam_takes_several_images_of_any_size():
    class Halved(Fused):
        def forward(self, colour, depth):
            return super().forward(colour, nn.functional.interpolate(depth, scale_factor=2))

    network = four_channels()
    model, small = Halved(network).eval(), DEPTH[:, :, ::2, ::2]
    found = pg.Explainer(model, None, method="GuidedGradCam", layer=network[2]).attribute((COLOUR, small), TARGETS)
    expected = captum.attr.GuidedGradCam(model, network[2]).attribute(
        (COLOUR.clone().requires_grad_(), small.clone().requires_grad_()), target=TARGETS
    )
    same(found, [each.detach() for each in expected])
    patient = Patient()
    with pytest.raises(SettingError, match=r"GuidedGradCam resizes .* 4, 2 dimensions"):
        pg.Explainer(patient, None, method="GuidedGradCam", layer=patient.image[2]).attribute((COLOUR, DATA), 1)


def test_without_a_target_the_predicted_class_is_explained():
    model = Patient()
    model.head[2].bias.data -= model(COLOUR, DATA).detach().mean(0)
    predicted = model(COLOUR, DATA).argmax(dim=1)
    assert len(set(predicted.tolist())) > 1
    explainer = pg.Explainer(model, layers="all", internal_batch_size=3)
    assert torch.equal(explainer.predict((COLOUR, DATA)), predicted)
    same(explainer.attribute((COLOUR, DATA)), explainer.attribute((COLOUR, DATA), predicted), rtol=0, atol=0)


def test_a_tuple_of_one_gives_a_tuple_of_one():
    explainer = pg.Explainer(four_channels(), layers="all", method="integrated_gradients", n_steps=3, baselines=(0.5,))
    inputs = torch.cat((COLOUR, DEPTH), dim=1)
    same(explainer.attribute((inputs,), TARGETS), [explainer.attribute(inputs, TARGETS)], rtol=0, atol=0)
    assert torch.equal(explainer.stability((inputs,))[0], explainer.stability(inputs))


@pytest.mark.parametrize("method", METHODS)
def test_functions_for_the_logits_and_the_target(method):
    class Answers(Patient):
        def forward(self, image, data):
            return {"out": super().forward(image, data)}

    expected = pg.Explainer(Patient(), layers="all", method=method).attribute((COLOUR, DATA), 2)
    plain = pg.Explainer(Answers(), layers="all", method=method)
    same(plain.attribute((COLOUR, DATA), lambda output: output["out"][:, 2]), expected)
    picked = pg.Explainer(Answers(), layers="all", method=method, logits=lambda output: output["out"])
    same(picked.attribute((COLOUR, DATA), 2), expected)


def test_stability_by_hand():
    explainer, seed, noise = pg.Explainer(Patient(), layers="all"), 7, 0.1
    image, data = explainer.attribute((COLOUR, DATA), TARGETS)
    expected = []
    drawn = [
        torch.randn(3, *each.shape[1:], generator=torch.Generator().manual_seed(seed + index)).double()
        for index, each in enumerate((COLOUR, DATA))
    ]
    span = [each.flatten(1).amax(1) - each.flatten(1).amin(1) for each in (COLOUR, DATA)]
    for draw in range(3):
        noisy = COLOUR + noise * span[0].reshape(4, 1, 1, 1) * drawn[0][draw]
        maps = explainer.attribute((noisy, DATA + noise * span[1].reshape(4, 1) * drawn[1][draw]), TARGETS)
        expected.append((cosine(pg.heatmap(image), pg.heatmap(maps[0])), cosine(data.abs(), maps[1].abs())))
    expected = [torch.stack(each).mean(dim=0) for each in zip(*expected, strict=True)]
    assert 0 < expected[0].min() < 0.99
    same(explainer.stability((COLOUR, DATA), TARGETS, noise=noise, draws=3, seed=seed), expected)


# Errors


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ((), "contains no image"),
        ((DATA, DATA), "contains no image"),
        ([COLOUR, DATA], "`inputs` is of type list .* Pass a tuple for several inputs"),
        ((COLOUR, [1.0]), r"`inputs\[1\]` is of type list"),
        ((COLOUR, DATA[:3]), "The inputs have 4, 3 rows"),
        ((COLOUR, DATA[:, 0]), r"`inputs\[1\]` has shape \(4,\), but a non-empty batch \(B, C, \*S\) or \(B, F\)"),
        ((COLOUR, DATA.long()), r"`inputs\[1\]` is torch.int64, .* embeddings of category indices, or .* a wrapper"),
        ((COLOUR, DATA / 0), r"`inputs\[1\]` contains NaN"),
        ((COLOUR, DATA.to_sparse()), r"`inputs\[1\]` is torch.sparse_coo, .* Pass inputs\[1\]\.to_dense"),
        ((COLOUR, DATA.float()), r"on `inputs\[1\]` .* torch.float32, but its first convolution has .* torch.float64"),
        ((COLOUR[:, :2], DATA), r"on `inputs\[0\]` of shape \(4, 2, 8, 8\) .* takes 3 channels"),
        ((COLOUR.movedim(1, -1), DATA), r"inputs\[0\]\.movedim\(-1, 1\)"),
        ((COLOUR[0], DATA[:3]), r"inputs\[0\]\.unsqueeze\(0\)"),
    ],
)
def test_bad_inputs(inputs, words):
    with pytest.raises(InputError, match=words):
        pg.Explainer(Patient(), None).attribute(inputs, 1)


def test_inputs_in_the_wrong_order_fail_as_they_do_in_the_model():
    with pytest.raises(RuntimeError, match="Expected"):
        pg.Explainer(Patient(), layers="all").attribute((DATA, COLOUR), 1)


@pytest.mark.parametrize(
    ("method", "baselines", "words"),
    [
        ("IntegratedGradients", COLOUR, "The number of inputs is 2, but `baselines` holds 1. Pass a tuple"),
        ("IntegratedGradients", (0, 0, 0), "The number of inputs is 2, but `baselines` holds 3"),
        ("IntegratedGradients", (0, "mean"), r"`baselines\[1\]` is 'mean', but .* \(1 or 4, 5\)"),
        ("IntegratedGradients", (0, DATA[:3]), r"There are 3 baselines for 4 rows in `baselines\[1\]`"),
        ("DeepLift", (DATA, 0), r"`baselines\[0\]` is a tensor of .* \(4, 5\), but"),
        ("GradientShap", (COLOUR, 0), r"`baselines\[1\]` is a int, but GradientShap needs samples"),
        ("DeepLiftShap", (COLOUR, DATA[:3]), "`baselines` holds 4, 3 samples, but DeepLiftShap"),
    ],
)
def test_baselines_that_do_not_fit(method, baselines, words):
    with pytest.raises(SettingError, match=words):
        pg.Explainer(Patient(), None, method=method, baselines=baselines).attribute((COLOUR, DATA), 1)


@quiet
@pytest.mark.parametrize("method", [*CAPTUM, "smoothgrad"])
@pytest.mark.parametrize("target", [1, lambda logits: logits[:, 1]], ids=["class", "function"])
def test_an_input_that_the_score_ignores_is_named(method, target):
    model = Patient(prepare=torch.detach)
    explainer = pg.Explainer(model, layers="all", method=method)
    with pytest.raises(ModelError, match=r"The score does not depend on `inputs\[1\]`\. Leave it out of the tuple"):
        explainer.attribute((COLOUR, DATA), target)


def test_scores_that_ignore_all_inputs():
    class Constant(Patient):
        def forward(self, image, data):
            return self.head[2].bias.expand(len(image), 5)

    explainer = pg.Explainer(Constant(), None)
    with pytest.raises(ModelError, match="The logits do not depend on the inputs"):
        explainer.attribute((COLOUR, DATA), 1)
    with pytest.raises(TargetError, match="`target` returns does not depend on the inputs"):
        explainer.attribute((COLOUR, DATA), lambda logits: logits[:, 1])


@of_all
def test_a_map_that_is_not_finite_is_named_with_its_input(selector):
    data = DATA.abs()
    data[2, 1] = 0
    # A square root is not balanced.
    model, options = Patient(prepare=torch.sqrt), {"layers": "all", "balance": False}
    explainer = pg.Explainer(model, selector, internal_batch_size=3, **options)
    words = r"The map of `inputs\[1\]` in row 2 of 4 contains .* began in the gradient of an operation on the inputs"
    with pytest.raises(NonFiniteError, match=words):
        explainer.attribute((COLOUR, data), TARGETS)
    broken = Patient(prepare=lambda data: torch.where(data == 0, torch.nan, data))
    with pytest.raises(NonFiniteError, match=r"The scores of row 2 of 4 .* began before layer 'data'"):
        pg.Explainer(broken, selector, layers="all").attribute((COLOUR, data))
