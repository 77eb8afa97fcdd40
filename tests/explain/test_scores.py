"""Outputs of every kind, and what of them is explained."""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import captum.attr
import numpy
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large, fcn_resnet50, lraspp_mobilenet_v3_large
from transformers.modeling_outputs import ImageClassifierOutput

import parchgrad as pg
from parchgrad.errors import InputError, ModelError, ModelWarning, NonFiniteError, SettingError, TargetError
from parchgrad.explain.methods import METHODS
from tests.support import random_statistics, small_network

INPUTS = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
TARGETS = torch.tensor([4, 0, 2, 1])


@dataclass
class Answer:
    scores: Tensor
    features: Tensor


class Returns(nn.Module):
    """The small network, whose logits come in another kind of output."""

    def __init__(self, make):
        super().__init__()
        self.network, self.make = small_network(), make

    def forward(self, x):
        return self.make(self.network(x), x)


KINDS = {
    "tuple": (lambda logits, x: (x, logits), lambda output: output[1]),
    "dict": (lambda logits, x: {"aux": x, "out": logits}, lambda output: output["out"]),
    "dataclass": (Answer, lambda output: output.scores),
    # Not picked but computed.
    "maps": (lambda logits, x: logits.reshape(-1, 5, 1, 1).expand(-1, -1, 2, 2), lambda output: output.mean((2, 3))),
}


def statistical():
    return pg.ClassWise(random_statistics({"network.0": 6, "network.2": 6}), quantile=0.3)


@pytest.mark.parametrize("make_selector", [lambda: None, lambda: pg.GradientEnergy(quantile=0.3), statistical])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_callable_picks_the_logits(kind, method, make_selector):
    make, pick = KINDS[kind]
    selector = make_selector()
    plain = Returns(lambda logits, x: logits).eval()
    for target in (TARGETS, None):
        expected = pg.Explainer(plain, selector, layers="all", method=method).attribute(INPUTS, target)
        explainer = pg.Explainer(Returns(make).eval(), selector, layers="all", method=method, logits=pick)
        torch.testing.assert_close(explainer.attribute(INPUTS, target), expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass"])
def test_a_callable_picks_the_logits_of_a_block(kind):
    make, pick = KINDS[kind]
    selector, plain = statistical(), Returns(lambda logits, x: logits).eval()
    with pg.ParchGrad(plain, selector, layers="all"):
        expected = captum.attr.Saliency(plain).attribute(INPUTS.clone().requires_grad_(), target=TARGETS)
    model = Returns(make).eval()
    with pg.ParchGrad(model, selector, layers="all", logits=pick):
        saliency = captum.attr.Saliency(lambda x: pick(model(x)))
        found = saliency.attribute(INPUTS.clone().requires_grad_(), target=TARGETS)
    torch.testing.assert_close(found, expected)


def test_logits_that_are_computed_leave_a_block_without_a_class():
    make, pick = KINDS["maps"]
    model = Returns(make).eval()
    x = INPUTS.clone().requires_grad_()
    with (
        pg.ParchGrad(model, statistical(), layers="all", logits=lambda output: pick(output) * 1),
        pytest.raises(TargetError, match="target="),
    ):
        torch.autograd.grad(pick(model(x))[:, 2].sum(), x)


@pytest.mark.parametrize(
    ("pick", "words"),
    [
        (lambda output: output["logits"], r"^`logits` fails on the tuple .*\(TypeError"),
        (lambda output: output[7], r"^`logits` fails on the tuple .*\(IndexError"),
        (lambda output: output.logits, "AttributeError"),
        (lambda output: list(output), "^`logits` returns a list"),
    ],
)
@pytest.mark.parametrize("selector", [None, pg.GradientEnergy()])
def test_callables_that_pick_nothing(pick, words, selector):
    model = Returns(KINDS["tuple"][0]).eval()
    with pytest.raises(ModelError, match=words):
        pg.Explainer(model, selector, logits=pick).attribute(INPUTS, 1)
    with pytest.raises(ModelError, match=words), pg.ParchGrad(model, pg.GradientEnergy(), logits=pick):
        model(INPUTS.clone().requires_grad_())


@pytest.mark.parametrize("make", [lambda **options: pg.Explainer(small_network(), None, **options)])
def test_logits_must_be_a_function(make):
    with pytest.raises(SettingError, match="`logits` is 'out', but it must be a function"):
        make(logits="out")
    with pytest.raises(SettingError, match="`logits` is 'out', but it must be a function"):
        pg.ParchGrad(small_network(), pg.GradientEnergy(), logits="out")


class Named(NamedTuple):
    logits: Tensor
    features: Tensor


@pytest.mark.parametrize(
    "make",
    [
        lambda logits, x: {"logits": logits, "hidden": x},
        lambda logits, x: OrderedDict(out=logits, aux=logits),
        lambda logits, x: Named(logits, logits),
        lambda logits, x: (logits, x),
        lambda logits, x: [logits, None],
        lambda logits, x: ImageClassifierOutput(loss=logits.sum(), logits=logits, hidden_states=(x,)),
    ],
    ids=["dict", "ordered dict", "named tuple", "tuple", "list", "Hugging Face"],
)
def test_logits_are_found_in_outputs_of_usual_types(make):
    plain, model = Returns(lambda logits, x: logits).eval(), Returns(make).eval()
    for selector in (pg.GradientEnergy(), statistical()):
        expected = pg.Explainer(plain, selector, layers="all").attribute(INPUTS)
        torch.testing.assert_close(pg.Explainer(model, selector, layers="all").attribute(INPUTS), expected)
    score = pg.Contrast(target=2, against=1)
    expected = pg.Explainer(plain, selector, layers="all").attribute(INPUTS, score)
    torch.testing.assert_close(pg.Explainer(model, selector, layers="all").attribute(INPUTS, score), expected)
    # In a block too, the class is read off the logits.
    x = INPUTS.clone().requires_grad_()
    with pg.ParchGrad(model, selector, layers="all"):
        (found,) = torch.autograd.grad(score(model(x)).sum(), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda logits, x: {"a": logits, "b": x}, r"returns a dict with 'a' \(4, 5\), 'b' \(4, 3, 8, 8\).*`logits=`"),
        (lambda logits, x: (logits, logits), r"returns a tuple with 0 \(4, 5\), 1 \(4, 5\).*`logits=`"),
        (lambda logits, x: {"logits": logits, "out": logits}, "returns a dict with 'logits'.*`logits=`"),
        (Answer, "returns an Answer.*`logits=`"),
        (lambda logits, x: logits[:, :, None, None], r"returns shape \(4, 5, 1, 1\).*RegionScore"),
        (lambda logits, x: {"logits": logits[:, :, None, None]}, r"returns a dict.*RegionScore"),
        (lambda logits, x: logits[:, 0], r"returns shape \(4,\).*Regression"),
        (lambda logits, x: [{"boxes": logits}], "returns a list.*BoxScore"),
        (lambda logits, x: {"logits": logits[:, :, None], "pred_boxes": x}, "returns a dict.*detections="),
    ],
)
def test_outputs_without_logits_say_what_there_is_and_what_to_write(make, words):
    with pytest.raises(ModelError, match=words):
        pg.Explainer(Returns(make).eval(), None).attribute(INPUTS, 1)


LOGITS = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 2.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (pg.ClassScore(target=2), [0.5, 2.0]),
        (pg.Contrast(target=0, against=1), [3.0, -3.0]),
        (pg.Contrast(target=0, against="runner-up"), [0.5, -3.0]),
        (
            pg.Contrast(target=0, against="rest"),
            [1 - math.log(math.exp(-2) + math.exp(0.5)), -math.log(math.exp(3) + math.exp(2))],
        ),
        (pg.Probability(target=1), [1 / (1 + math.exp(2)), 1 / (1 + math.exp(-3))]),
        (pg.Regression(index=1), [-2.0, 3.0]),
        (
            pg.Similarity(reference=torch.tensor([0.0, 3.0, 4.0])),
            [(-6 + 2) / (5 * math.sqrt(5.25)), (9 + 8) / (5 * math.sqrt(13))],
        ),
    ],
    ids=repr,
)
def test_values_by_hand(score, expected):
    torch.testing.assert_close(score(LOGITS), torch.tensor(expected, dtype=torch.float64))


def test_a_single_output_has_no_second_dimension():
    single = torch.tensor([0.0, math.log(3)])
    for output in (single, single[:, None]):
        torch.testing.assert_close(pg.Probability()(output), torch.tensor([0.5, 0.75]))
        assert torch.equal(pg.Regression()(output), single)


@pytest.mark.parametrize("against", [1, "runner-up", "rest"])
def test_the_map_of_a_contrast_is_that_of_the_difference(against):
    model = small_network()
    x = INPUTS.clone().requires_grad_()
    logits = model(x)
    weights = torch.zeros_like(logits)
    weights[:, 2] = 1
    others = logits.detach().clone()
    others[:, 2] = -math.inf
    if against == "rest":
        weights -= others.softmax(dim=1)
    else:
        weights[torch.arange(4), others.argmax(dim=1) if against == "runner-up" else 1] -= 1
    (expected,) = torch.autograd.grad((weights * logits).sum(), x)
    found = pg.Explainer(model, None).attribute(INPUTS, pg.Contrast(target=2, against=against))
    torch.testing.assert_close(found, expected)


def test_a_batch_takes_a_list_of_scores():
    model, scores = small_network(), [pg.ClassScore(target=index) for index in TARGETS.tolist()]
    explainer = pg.Explainer(model, pg.GradientEnergy(), layers="all")
    torch.testing.assert_close(explainer.attribute(INPUTS, scores), explainer.attribute(INPUTS, TARGETS))
    with pytest.raises(TargetError, match="has 2 entries for 4 images"):
        explainer.attribute(INPUTS, scores[:2])
    with pytest.raises(TargetError, match="not a tuple"):
        explainer.attribute(tuple(INPUTS[:, None]), scores)
    with pytest.raises(InputError, match="Measure one at a time"):
        explainer.stability(list(INPUTS), scores[0])


def test_a_similarity_takes_the_embedding_of_encoders_of_hugging_face():
    reference, embedding = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    for output in ({"image_embeds": embedding, "pooler_output": reference}, {"pooler_output": embedding}):
        torch.testing.assert_close(pg.Similarity(reference=reference)(output), torch.tensor([0.5**0.5]))


def test_the_region_of_the_only_class_is_where_its_score_is_positive():
    scores = torch.tensor([[[1.0, -5.0, 2.0]], [[-1.0, -2.0, -3.0]]])
    assert pg.RegionScore(target=0)(scores).tolist() == [3.0, 0.0]


@pytest.mark.parametrize(
    ("error", "run", "words"),
    [
        (SettingError, lambda: pg.ClassScore(target=1.5), "`target` is 1.5"),
        (SettingError, lambda: pg.Contrast(target=1, against=1), "`against` is 1, .* other than 1"),
        (SettingError, lambda: pg.Contrast(target=1, against="next"), "`against` is 'next'"),
        (SettingError, lambda: pg.Contrast(target=1, against=-1), "`against` is -1"),
        (SettingError, lambda: pg.Regression(index=-1), "`index` is -1"),
        (InputError, lambda: pg.Similarity(reference=torch.zeros(3)), "`reference` is zero"),
        (InputError, lambda: pg.Similarity(reference=torch.ones(2, 3)), r"`reference` is .* shape \(2, 3\)"),
        (InputError, lambda: pg.Similarity(reference=[1.0]), "`reference` is of type list"),
        (TargetError, lambda: pg.ClassScore(target=3)(LOGITS), "index is 3, but the model has 3 outputs"),
        (TargetError, lambda: pg.Contrast(target=0, against=7)(LOGITS), "index is 7"),
        (TargetError, lambda: pg.Contrast(target=3, against="rest")(LOGITS), "index is 3"),
        (TargetError, lambda: pg.Contrast(target=0, against="rest")(LOGITS[:, :1]), "only one class"),
        (TargetError, lambda: pg.Regression()(LOGITS), "has 3 outputs. Pass the index"),
        (TargetError, lambda: pg.Probability()(LOGITS), "has 3 outputs. Pass the index"),
        (ModelError, lambda: pg.ClassScore(target=0)(LOGITS[:, 0]), r"returns shape \(2,\), but logits of shape"),
        (ModelError, lambda: pg.Regression()({"a": LOGITS}), r"returns a dict with 'a' \(2, 3\), but values"),
        (ModelError, lambda: pg.Similarity(reference=torch.ones(2))(LOGITS), r"embedding of shape \(B, 2\)"),
    ],
)
def test_bad_scores(error, run, words):
    with pytest.raises(error, match=words):
        run()


def test_a_map_of_nothing_is_warned_of():
    model = nn.Sequential(nn.Conv2d(3, 2, 1)).eval()
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([100.0, 0.0]))
    with pytest.warns(ModelWarning, match="rows 0, 1 are zero everywhere: the network predicts class 1 nowhere"):
        pg.Explainer(model, None).attribute(torch.rand(2, 3, 4, 4), pg.RegionScore(target=1))
    empty = pg.RegionScore(target=1, mask=torch.zeros(4, 4))
    with pytest.warns(ModelWarning, match="row 0 is zero everywhere: the scores in the mask do not depend"):
        pg.Explainer(model, None).attribute(torch.rand(1, 3, 4, 4), empty)
    with pytest.warns(ModelWarning, match="row 0 is zero everywhere: the gradient of its score is zero"):
        pg.Explainer(model, None).attribute(torch.rand(1, 3, 4, 4), lambda scores: 0 * scores.sum((1, 2, 3)))


# Targets that are functions


@pytest.mark.parametrize("make_selector", [lambda: None, lambda: pg.GradientEnergy(quantile=0.3), statistical])
@pytest.mark.parametrize("method", METHODS)
def test_a_callable_target_of_one_class_is_that_class(method, make_selector):
    model = Returns(lambda logits, x: logits).eval()
    explainer = pg.Explainer(model, make_selector(), layers="all", method=method, internal_batch_size=3)
    expected = explainer.attribute(INPUTS, 2)
    torch.testing.assert_close(explainer.attribute(INPUTS, lambda logits: logits[:, 2]), expected)
    make, pick = KINDS["dict"]
    inside = pg.Explainer(Returns(make).eval(), make_selector(), layers="all", method=method, logits=pick)
    torch.testing.assert_close(inside.attribute(INPUTS, lambda logits: logits[:, 2]), expected)


def test_a_callable_target_sees_the_whole_output_where_nothing_is_picked():
    make, pick = KINDS["dataclass"]
    model, selector = Returns(make).eval(), pg.GradientEnergy(quantile=0.3)
    found = pg.Explainer(model, selector, layers="all").attribute(INPUTS, lambda output: output.scores[:, 2])
    expected = pg.Explainer(model, selector, layers="all", logits=pick).attribute(INPUTS, 2)
    torch.testing.assert_close(found, expected)
    with pytest.raises(ModelError, match="Answer"):
        pg.Explainer(model, statistical(), layers="all").attribute(INPUTS, lambda output: output.scores[:, 2])


def test_a_plain_score_of_several_labels_is_the_sum_of_their_maps():
    model = small_network()
    explainer = pg.Explainer(model, None)
    found = explainer.attribute(INPUTS, lambda logits: logits[:, [1, 3]].sum(dim=1))
    torch.testing.assert_close(found, explainer.attribute(INPUTS, 1) + explainer.attribute(INPUTS, 3))


def test_an_edited_score_of_several_labels_is_the_gradient_in_a_block():
    model, selector = small_network(), pg.GradientEnergy(quantile=0.3)
    found = pg.Explainer(model, selector, layers="all").attribute(INPUTS, lambda logits: logits[:, [1, 3]].sum(dim=1))
    x = INPUTS.clone().requires_grad_()
    with pg.ParchGrad(model, selector, layers="all"):
        (expected,) = torch.autograd.grad(model(x)[:, [1, 3]].sum(), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (lambda logits: logits, r"`target` returns shape \(4, 5\) for 4 rows"),
        (lambda logits: logits.sum(), r"`target` returns shape \(\) for 4 rows"),
        (lambda logits: 3.0, "`target` returns a float"),
        (lambda logits: logits[:, 0].detach(), "`target` returns does not depend on the model's output"),
        (lambda logits: logits.argmax(dim=1), "`target` returns does not depend on the model's output"),
    ],
)
def test_callable_targets_that_are_no_scores(target, words):
    for selector in (None, pg.GradientEnergy()):
        with pytest.raises(TargetError, match=words):
            pg.Explainer(small_network(), selector).attribute(INPUTS, target)


# Segmentation


@pytest.fixture(scope="module", params=[fcn_resnet50, deeplabv3_mobilenet_v3_large, lraspp_mobilenet_v3_large])
def segmenter(request):
    torch.manual_seed(2)
    network = request.param(weights=None, weights_backbone=None, num_classes=4).eval()
    return network, torch.rand(2, 3, 64, 64)


@pytest.mark.parametrize("masked", [False, True])
def test_segmentation_explains_a_class_over_a_region(segmenter, masked):
    network, images = segmenter
    with torch.no_grad():
        scores = network(images)["out"]
    target = int(scores.argmax(dim=1).flatten().bincount().argmax())
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[10:40, 20:50] = True
    region = mask.expand(2, -1, -1) if masked else scores.argmax(dim=1) == target
    assert region.any()

    def score(images):
        return (network(images)["out"][:, target] * region).sum()

    x = images.clone().requires_grad_()
    (plain,) = torch.autograd.grad(score(x), x)
    with pg.ParchGrad(network, pg.GradientEnergy(), layers="backbone.*", balance=False):
        x = images.clone().requires_grad_()
        (edited,) = torch.autograd.grad(score(x), x)
    assert edited.abs().max() > 0
    assert (edited - plain).abs().max() > 0.1 * plain.abs().max()
    chosen = pg.RegionScore(target=target, mask=mask if masked else None)
    for selector, expected in ((None, plain), (pg.GradientEnergy(), edited)):
        explainer = pg.Explainer(
            network, selector, layers="backbone.*", balance=False, logits=lambda output: output["out"]
        )
        found = explainer.attribute(images, chosen)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_regions_by_hand():
    scores = torch.tensor([[[[1.0, 5.0], [2.0, 0.0]], [[3.0, 4.0], [9.0, 1.0]]]])
    assert pg.RegionScore(target=0)(scores).tolist() == [5.0]
    assert pg.RegionScore(target=1)(scores).tolist() == [13.0]
    assert pg.RegionScore(target=1, mask=torch.tensor([[1.0, 0.5], [0.0, 0.0]]))(scores).tolist() == [5.0]
    # What is outside counts for nothing, whatever it is.
    scores[0, 1, 1, 1] = torch.inf
    assert pg.RegionScore(target=1, mask=torch.tensor([[True, True], [False, False]]))(scores).tolist() == [7.0]


def test_a_class_that_no_pixel_is_called_by_has_an_empty_map():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)).double().eval()
    model[1].bias.data = torch.tensor([1e3, 0.0], dtype=torch.float64)
    with pytest.warns(ModelWarning, match="class 1 nowhere"):
        found = pg.Explainer(model, None).attribute(INPUTS, pg.RegionScore(target=1))
    assert torch.equal(found, torch.zeros_like(INPUTS))


@pytest.mark.parametrize(
    ("error", "options", "scores", "words"),
    [
        (SettingError, {"target": -1}, None, "`target` is -1, but it must be a whole number of at least 0"),
        (SettingError, {"target": True}, None, "`target` is True"),
        (TargetError, {"target": 2}, torch.ones(1, 2, 3, 3), "`target` holds 2, .* 2 classes"),
        (ModelError, {"target": 0}, torch.ones(1, 2), r"returns shape \(1, 2\), but scores of shape"),
        (ModelError, {"target": 0}, {"out": 1}, "returns a dict, but scores of shape"),
        (
            InputError,
            {"target": 0, "mask": torch.ones(1, 3, 3)},
            torch.ones(1, 2, 3, 3),
            r"mask has shape \(1, 3, 3\), but the model's scores have the spatial shape \(3, 3\)",
        ),
    ],
)
def test_bad_regions(error, options, scores, words):
    with pytest.raises(error, match=words):
        pg.RegionScore(**options)(scores)


# Found by trying what users may do


class Unused(nn.Module):
    """Its second convolution takes no part, and its output is of any kind."""

    def __init__(self, make):
        super().__init__()
        self.a, self.b, self.make = nn.Conv2d(3, 5, 1).double(), nn.Conv2d(3, 5, 1).double(), make

    def forward(self, x):
        return self.make(self.a(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "target"),
    [
        (lambda logits: {"out": logits}, lambda output: output["out"][:, 1]),
        (lambda logits: (logits, 3), lambda output: output[0][:, 1]),
        (lambda logits: Answer(logits, logits), lambda output: output.scores[:, 1]),
    ],
    ids=["dict", "tuple", "dataclass"],
)
def test_layers_that_take_no_part_are_told_whatever_the_output(make, target):
    with pytest.raises(ModelError, match="None of the chosen layers was called"):
        pg.Explainer(Unused(make).eval(), pg.GradientEnergy(), layers=["b"]).attribute(INPUTS, target)


@pytest.mark.parametrize("rows", [1, 4], ids=["every row", "one row"])
def test_scores_that_are_nan_are_told_though_the_region_avoids_them(rows):
    class Breaks(nn.Module):
        def forward(self, maps):
            return torch.where(torch.arange(len(maps)).reshape(-1, 1, 1, 1) % rows == 0, torch.nan, maps)

    model = nn.Sequential(nn.Conv2d(3, 4, 3).double(), Breaks()).eval()
    with pytest.raises(NonFiniteError, match=r"The scores of row 0 of 4 .* layer '1' \(Breaks\)"):
        pg.Explainer(model, pg.GradientEnergy(), layers=["0"]).attribute(INPUTS, pg.RegionScore(target=1))


def test_what_is_outside_of_a_mask_has_no_say():
    scores = torch.tensor([[[1.0, torch.inf], [2.0, torch.nan]]])
    assert pg.RegionScore(target=0, mask=torch.tensor([True, False]))(scores).tolist() == [1.0]
    assert pg.RegionScore(target=0)(scores).isnan().all()


def test_a_region_of_half_precision_is_summed_beyond_its_range():
    scores = torch.full((1, 2, 512, 512), 4.0, dtype=torch.float16)
    assert pg.RegionScore(target=0, mask=torch.ones(512, 512))(scores).tolist() == [4.0 * 512 * 512]


def test_a_target_of_numpy_is_a_number():
    assert pg.RegionScore(target=numpy.int64(1))(torch.tensor([[[1.0], [3.0]]])).tolist() == [3.0]


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (numpy.ones((3, 3)), r"The mask is of type ndarray.*torch.as_tensor\(mask\)"),
        ([[1.0]], "The mask is of type list"),
        (torch.full((3, 3), 255, dtype=torch.uint8), "The mask is torch.uint8.*mask > 0"),
        (torch.ones(3, 3, dtype=torch.complex64), "The mask is torch.complex64"),
        (torch.tensor([[torch.nan]]), "The mask contains NaN"),
        (torch.eye(3).to_sparse(), r"sparse tensor.*mask.to_dense\(\)"),
    ],
)
def test_masks_that_are_none(mask, words):
    with pytest.raises(InputError, match=words):
        pg.RegionScore(target=0, mask=mask)


def test_the_class_of_a_region_less_its_surroundings_is_the_regions():
    """Weights that cancel leave no doubt about the class: the map is that with the class given."""
    scores = nn.Sequential(*small_network()[:5], nn.Conv2d(6, 5, 1).double()).eval()
    weights = torch.ones(8, 8, dtype=torch.float64)
    weights[:, 4:] = -1
    region = pg.RegionScore(target=2, mask=weights)
    statistics = random_statistics({"0": 6, "2": 6})
    selector = pg.ClassWise(statistics, quantile=0.3)
    found = pg.Explainer(scores, selector, layers=["0", "2"]).attribute(INPUTS, region)
    x = INPUTS.clone().requires_grad_()
    with pg.ParchGrad(scores, selector, layers=["0", "2"], target=2):
        (expected,) = torch.autograd.grad(region(scores(x)).sum(), x)
    torch.testing.assert_close(found, expected)


def test_the_class_of_a_region_is_no_region():
    with pytest.raises(TargetError, match="`target` is the class RegionScore"):
        pg.Explainer(small_network(), None).attribute(INPUTS, pg.RegionScore)


def test_scores_of_weights_alone():
    model = small_network()
    with pytest.raises(TargetError, match="`target` returns does not depend on the inputs"):
        pg.Explainer(model, None).attribute(INPUTS, lambda logits: model[7].bias[1].expand(len(logits)))
    with pytest.raises(ModelError, match="The logits do not depend on the inputs"):
        pg.Explainer(Constant().eval(), None).attribute(INPUTS, 1)


@pytest.mark.parametrize("selector", [None, pg.GradientEnergy()])
def test_logits_without_a_graph(selector):
    class Cut(nn.Sequential):
        def forward(self, inputs):
            with torch.no_grad():
                return super().forward(inputs)

    model = Cut(*small_network()).eval().requires_grad_(False)
    with pytest.raises(ModelError, match="The logits do not depend on the inputs"):
        pg.Explainer(model, selector, layers="all").attribute(INPUTS, 1)


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return self.weight.expand(len(x), 5)


@pytest.mark.parametrize("target", [None, 3])
def test_an_image_without_its_batch_is_told(target):
    # Convolutions take it, and the head then meets other sizes.
    head = [nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10)]
    explainer = pg.Explainer(nn.Sequential(*head).eval(), None)
    with pytest.raises(InputError, match=r"shape \(3, 32, 32\).*inputs.unsqueeze\(0\)"):
        explainer.attribute(torch.rand(3, 32, 32), target)


@pytest.mark.parametrize(
    ("error", "raised"), [(torch.OutOfMemoryError, torch.OutOfMemoryError), (ValueError, InputError)]
)
def test_why_the_model_failed_stays_in_the_error(error, raised):
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(1, 4, 1)

        def forward(self, x):
            raise error("some reason")

    with pytest.raises(raised, match="some reason"):
        pg.Explainer(Fails().eval(), None).attribute(torch.ones(2, 1, 8), 1)
