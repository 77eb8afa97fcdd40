"""Layers by the path to the score: against all paths written out, and edits written as functions behind layers."""

import math
import warnings
from dataclasses import dataclass
from fractions import Fraction

import captum.attr
import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import parchgrad as pg
from parchgrad.core.engine import plain_gradients
from parchgrad.core.paths import Paths, exact_ratio
from parchgrad.errors import InputError, LayerError, ModelError, ModelWarning, StatisticsError
from tests import reference

TRUE = {"gates": 0, "antialias": False, "balance": False}


# The choice on a graph


@st.composite
def graphs(draw):
    """Draw the calls before each call of a graph without cycles, and the calls on a path to some of them."""
    count = draw(st.integers(1, 7))
    before = []
    for index in range(count):
        before.append(tuple(sorted(draw(st.sets(st.integers(0, index - 1), max_size=3)))) if index else ())
    ends = draw(st.sets(st.integers(0, count - 1), max_size=3))
    return tuple(before), ends


def paths_to(call, before):
    """List all paths that end at a call, as tuples of calls."""
    if not before[call]:
        return [(call,)]
    return [(*path, call) for earlier in before[call] for path in paths_to(earlier, before)]


@given(graph=graphs(), ratio=st.fractions(Fraction(1, 20), 1, max_denominator=20))
def test_the_choice_is_the_one_by_all_paths_written_out(graph, ratio):
    before, ends = graph
    paths = [path for end in ends for path in paths_to(end, before)]
    depths = {}
    for call in {call for path in paths for call in path}:
        earlier = max(len(path) - 1 for path in paths_to(call, before))
        longest = max(earlier + len(path) - path.index(call) for path in paths if call in path)
        depths[call] = Fraction(earlier, longest)
    expected = {call for call, depth in depths.items() if depth >= 1 - ratio or depth == max(depths.values())}
    found = Paths(layers=tuple(map(str, range(len(before)))), before=before).chosen(ratio, set(depths))
    assert found == set(map(str, expected))


@given(count=st.integers(1, 60), hundredths=st.integers(1, 100))
def test_a_chain_gives_its_last_share_in_exact_arithmetic(count, hundredths):
    chain = Paths(layers=tuple(map(str, range(count))), before=((), *((index,) for index in range(count - 1))))
    last = max(1, hundredths * count // 100)
    assert chain.chosen(exact_ratio(hundredths / 100)) == {str(index) for index in range(count - last, count)}


# Networks as people have them


def edited_by_hand(model, names, quantile):
    """Set hooks that put the gradient behind each layer through the reference's edit; return their handles."""

    class Edit(torch.autograd.Function):
        @staticmethod
        def forward(_, output):
            return output.clone()

        @staticmethod
        def backward(_, gradient):
            norms = gradient.flatten(2).norm(dim=2).tolist()
            weights = [reference.soft_weights(row, reference.kth_largest(row, quantile), 0.5) for row in norms]
            return torch.from_numpy(reference.edit(gradient, np.array(weights)))

    modules = dict(model.named_modules())
    return [modules[name].register_forward_hook(lambda module, inputs, output: Edit.apply(output)) for name in names]


def gradient_by_hand(model, names, x, score, quantile=0.3):
    leaf = x.clone().requires_grad_()
    handles = edited_by_hand(model, names, quantile)
    try:
        return torch.autograd.grad(score(model(leaf)).sum(), leaf)[0]
    finally:
        for handle in handles:
            handle.remove()


def assert_edited(model, layers, names, x, score, logits=None):
    """Compare an explainer's map and layers with the edit by hand behind the named layers."""
    selector = pg.GradientEnergy(quantile=0.3)
    expected = gradient_by_hand(model, names, x, score)
    explainer = pg.Explainer(model, selector, layers=layers, logits=logits, **TRUE)
    assert explainer.layers == layers
    assert explainer.edited_layers == ()
    for _ in range(2):
        found = explainer.attribute(x, score if logits is None else 1)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
        assert set(explainer.layers) == set(explainer.edited_layers) == set(names)
    return found


def chain(channels, count, dimensions=2):
    """Convolutions with rectifiers in between."""
    kind, layers = (nn.Conv1d, nn.Conv2d)[dimensions - 1], []
    for index in range(count):
        layers += [kind(channels if index == 0 else 5, 5, 3, padding=1), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class Heads(nn.Module):
    """A trunk of three convolutions with heads of one, two and three."""

    def __init__(self):
        super().__init__()
        self.trunk = chain(2, 3)
        self.heads = nn.ModuleList(nn.Sequential(*chain(5, count), nn.Conv2d(5, 4, 1)) for count in range(3))

    def forward(self, x):
        x = self.trunk(x)
        return {"heads": [head(x).mean((2, 3)) for head in self.heads]}


def double(model):
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.double().eval()


X = torch.randn(2, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("head", "layers", "names"),
    [
        (0, 0.5, ["trunk.4", "heads.0.0"]),
        (0, "all", ["trunk.0", "trunk.2", "trunk.4", "heads.0.0"]),
        (0, 0.1, ["heads.0.0"]),
        (1, 0.4, ["heads.1.0", "heads.1.2"]),
        (2, 0.5, ["heads.2.0", "heads.2.2", "heads.2.4"]),
        (2, 0.75, ["trunk.4", "heads.2.0", "heads.2.2", "heads.2.4"]),
    ],
)
def test_another_head_gives_no_layers(head, layers, names):
    model = double(Heads())
    assert_edited(model, layers, names, X, lambda output: output["heads"][head][:, 1])
    assert_edited(
        model, layers, names, X, lambda output: output["heads"][head][:, 1], logits=lambda output: output["heads"][head]
    )


def test_one_explainer_for_each_head_in_turn_and_for_both():
    model, selector = double(Heads()), pg.GradientEnergy(quantile=0.3)
    explainer = pg.Explainer(model, selector, layers=0.5, **TRUE)
    for used, names in (
        ((0,), ["trunk.4", "heads.0.0"]),
        ((2,), ["heads.2.0", "heads.2.2", "heads.2.4"]),
        ((0, 2), ["heads.0.0", "heads.2.0", "heads.2.2", "heads.2.4"]),
        ((0,), ["trunk.4", "heads.0.0"]),
    ):

        def score(output, used=used):
            return sum(output["heads"][head][:, 1] for head in used)

        found = explainer.attribute(X, score)
        torch.testing.assert_close(found, gradient_by_hand(model, names, X, score), rtol=1e-9, atol=1e-13)
        assert set(explainer.edited_layers) == set(names)


class Late(nn.Module):
    """Encoders of the first and the second channel, added late."""

    def __init__(self, first, second):
        super().__init__()
        self.colour, self.depth, self.head = chain(1, first), chain(1, second), nn.Linear(5, 4)

    def forward(self, x):
        features = self.colour(x[:, :1]) + self.depth(x[:, 1:])
        return self.head(features.mean((2, 3)))


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        (0.5, ["colour.4", "colour.6", "depth.2"]),
        (0.75, ["colour.2", "colour.4", "colour.6", "depth.2"]),
        (0.25, ["colour.6"]),
        (0.2, ["colour.6"]),
    ],
)
def test_branches_that_are_added_late_each_give_their_share(layers, names):
    found = assert_edited(double(Late(4, 2)), layers, names, X, lambda output: output[:, 1])
    assert (found.abs().amax((0, 2, 3)) > 0).all()


class Mean(nn.Module):
    """Three networks of different depth."""

    def __init__(self):
        super().__init__()
        self.members = nn.ModuleList(
            nn.Sequential(chain(2, count), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))
            for count in (2, 3, 5)
        )

    def forward(self, x):
        return torch.stack([member(x) for member in self.members]).mean(0)


def test_each_member_of_an_ensemble_gives_its_share():
    names = ["members.0.0.2", "members.1.0.4", "members.2.0.6", "members.2.0.8"]
    assert_edited(double(Mean()), 0.5, names, X, lambda output: output[:, 1])


class UNet(nn.Module):
    """Two levels with a skip connection and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1, stride=2)
        self.up, self.merge = nn.ConvTranspose2d(6, 5, 2, stride=2), nn.Conv2d(10, 5, 3, padding=1)
        self.last = nn.Conv2d(5, 3, 1)

    def forward(self, x):
        fine = functional.relu(self.first(x))
        coarse = functional.relu(self.second(fine))
        return self.last(functional.relu(self.merge(torch.cat((fine, self.up(coarse)), dim=1))))


@pytest.mark.parametrize(
    ("layers", "names"),
    [(0.4, ["merge", "last"]), (0.6, ["up", "merge", "last"]), ("all", ["first", "second", "up", "merge", "last"])],
)
def test_a_decoder_is_edited(layers, names):
    assert_edited(double(UNet()), layers, names, X, lambda output: output[:, 1].mean((1, 2)))


def small_resnet():
    torch.manual_seed(0)
    return double(torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4))


@pytest.mark.parametrize("layers", [0.5, 0.75, "all"])
def test_names_wrappers_fusing_and_exporting_play_no_part(layers):
    resnet = small_resnet()
    x = torch.randn(1, 3, 33, 33, dtype=torch.float64)

    class Wrapped(nn.Module):
        def __init__(self, inside):
            super().__init__()
            self.inside = inside

        def forward(self, x):
            return self.inside(x)

    extracted = torchvision.models.feature_extraction.create_feature_extractor(resnet, {"flatten": "features"})
    variants = {
        "children": nn.Sequential(*list(resnet.children())[:-1], nn.Flatten(), resnet.fc),
        "nested": Wrapped(Wrapped(nn.Sequential(nn.Identity(), resnet))),
        "traced": torch.fx.symbolic_trace(resnet),
        "extracted": nn.Sequential(Wrapped(extracted), Picked("features"), resnet.fc),
    }
    selector = pg.GradientEnergy(quantile=0.2)
    whole = pg.Explainer(resnet, selector, layers=layers, **TRUE)
    expected = whole.attribute(x, 1)
    convolutions = pg.find_convolutions(resnet)
    edited = {id(convolutions[name]) for name in whole.edited_layers}
    # The longest way has a convolution for the stem and two for each of four blocks; shortcuts stand beside them.
    shortcuts = {0.5: (3, 4), 0.75: (2, 3, 4), "all": (2, 3, 4)}[layers]
    count = {0.5: 4, 0.75: 6, "all": 9}[layers]
    assert len(edited) == count + len(shortcuts)
    assert {f"layer{stage}.0.downsample.0" for stage in shortcuts} < set(whole.edited_layers)
    for name, variant in variants.items():
        explainer = pg.Explainer(variant.eval(), selector, layers=layers, **TRUE)
        torch.testing.assert_close(explainer.attribute(x, 1), expected, rtol=1e-9, atol=1e-15, msg=name)
        modules = pg.find_convolutions(variant)
        if name != "extracted":
            assert {id(modules[layer]) for layer in explainer.edited_layers} == edited
        assert len(explainer.edited_layers) == len(edited)
    pairs = [[f"layer{stage}.0.conv{place}", f"layer{stage}.0.bn{place}"] for stage in range(1, 5) for place in (1, 2)]
    fused = torch.ao.quantization.fuse_modules(resnet, [["conv1", "bn1", "relu"], *pairs])
    explainer = pg.Explainer(fused.eval(), selector, layers=layers, **TRUE)
    explainer.attribute(x, 1)
    parts = {name.removesuffix(".0") if "downsample" not in name else name for name in explainer.edited_layers}
    assert parts == set(whole.edited_layers)


class Picked(nn.Module):
    def __init__(self, key):
        super().__init__()
        self.key = key

    def forward(self, output):
        return output[self.key]


class Twice(nn.Module):
    """A shared encoder, called for both channels, before more convolutions."""

    def __init__(self):
        super().__init__()
        self.encoder, self.merge, self.head = chain(1, 2), nn.Conv2d(5, 5, 3), nn.Linear(5, 4)

    def forward(self, x):
        both = self.encoder(x[:, :1]) + self.encoder(x[:, 1:]).square()
        return self.head(self.merge(both).mean((2, 3)))


@pytest.mark.parametrize(
    ("layers", "names"), [(0.4, ["merge"]), (0.7, ["encoder.2", "merge"]), ("all", ["encoder.0", "encoder.2", "merge"])]
)
def test_a_shared_encoder_called_twice(layers, names):
    assert_edited(double(Twice()), layers, names, X, lambda output: output[:, 1])


class Recurrent(nn.Module):
    """A convolution called four times in a row: its deepest call counts, and all are edited."""

    def __init__(self):
        super().__init__()
        self.stem, self.step, self.head = nn.Conv2d(2, 5, 3), nn.Conv2d(5, 5, 3, padding=1), nn.Linear(5, 4)

    def forward(self, x):
        x = self.stem(x)
        for _ in range(4):
            x = functional.relu(self.step(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(("layers", "names"), [(0.1, ["step"]), (0.9, ["step"]), (1.0, ["stem", "step"])])
def test_a_convolution_is_as_deep_as_its_deepest_call(layers, names):
    assert_edited(double(Recurrent()), layers, names, X, lambda output: output[:, 1])


class Cut(nn.Module):
    """A long branch that is cut off by `detach`, a constant one, and a short one."""

    def __init__(self):
        super().__init__()
        self.long, self.constant, self.short, self.head = chain(2, 6), chain(2, 2), chain(2, 2), nn.Linear(5, 4)
        self.prompt = nn.Parameter(torch.randn(1, 2, 6, 6))

    def forward(self, x):
        features = self.long(x.detach()) * self.short(x) + self.constant(self.prompt)
        return self.head(features.mean((2, 3)))


def test_what_does_not_lead_to_the_input_gives_no_layers():
    assert_edited(double(Cut()), 0.5, ["short.2"], X, lambda output: output[:, 1])
    assert_edited(double(Cut()), "all", ["short.0", "short.2"], X, lambda output: output[:, 1])


class Exits(nn.Module):
    """Four stages with an output behind the second and one behind the last."""

    def __init__(self):
        super().__init__()
        self.early, self.late, self.heads = chain(2, 2), chain(5, 2), nn.ModuleList(nn.Linear(5, 4) for _ in range(2))

    def forward(self, x):
        early = self.early(x)
        return self.heads[0](early.mean((2, 3))), self.heads[1](self.late(early).mean((2, 3)))


@pytest.mark.parametrize(
    ("output", "layers", "names"),
    [
        (0, 0.5, ["early.2"]),
        (0, 0.75, ["early.2"]),
        (1, 0.5, ["late.0", "late.2"]),
        (1, 0.75, ["early.2", "late.0", "late.2"]),
    ],
)
def test_an_output_that_skips_the_last_stage(output, layers, names):
    assert_edited(double(Exits()), layers, names, X, lambda outputs: outputs[output][:, 1])


def test_frames_flattened_into_the_batch_are_refused():
    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = nn.Sequential(chain(2, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))

        def forward(self, clip):
            return self.network(clip.flatten(0, 1))

    model, clips = double(Frames()), torch.randn(2, 3, 2, 6, 6, dtype=torch.float64)
    explainer = pg.Explainer(model, pg.GradientEnergy(quantile=0.3), **TRUE)
    for call in (
        explainer.attribute,
        explainer.predict,
        explainer.stability,
        lambda clips: explainer.attribute(clips, 1),
    ):
        with pytest.raises(ModelError, match=r"6 rows of logits for 2 inputs.*`target=`"):
            call(clips)

    def score(logits):
        return logits.unflatten(0, (-1, 3))[:, :, 1].sum(1)

    expected = gradient_by_hand(model, ["network.0.2"], clips, score)
    torch.testing.assert_close(explainer.attribute(clips, score), expected, rtol=1e-9, atol=1e-13)


# Convolutions of other kinds


class Deformable(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.offset = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, 18, 3, padding=1)
        self.mask, self.body = nn.Conv2d(5, 9, 1), torchvision.ops.DeformConv2d(5, 6, 3, padding=1)

    def forward(self, x):
        x = functional.relu(self.stem(x))
        return self.body(x, self.offset(x), self.mask(x).sigmoid()).mean((2, 3))


@pytest.mark.parametrize(
    ("layers", "names"),
    [(0.4, ["body"]), (0.75, ["offset", "mask", "body"]), ("all", ["stem", "offset", "mask", "body"])],
)
def test_deformable_convolutions_are_layers(layers, names):
    assert_edited(double(Deformable()), layers, names, X, lambda output: output[:, 1])


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("selector", [pg.Evidence(), pg.GradientTimesActivation(quantile=0.3)], ids=["evidence", "gxa"])
def test_transposed_convolutions_see_their_output(dimensions, selector):
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
    same = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    torch.manual_seed(0)
    transposed, plain = kind(2, 5, 3, padding=1), same(2, 5, 3, padding=1)
    # With stride 1 it is a convolution with a flipped kernel.
    plain.weight.data = transposed.weight.data.transpose(0, 1).flip(tuple(range(2, 2 + dimensions)))
    plain.bias = transposed.bias
    rest = [nn.ReLU(), nn.Flatten(), nn.Linear(5 * 4**dimensions, 3)]
    x = torch.randn(2, 2, *[4] * dimensions, dtype=torch.float64)
    found, expected = (
        pg.Explainer(nn.Sequential(first, *rest).double().eval(), selector, layers="all").attribute(x, 1)
        for first in (transposed, plain)
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


class Normalised(nn.Conv2d):
    """A convolution that holds its normalisation and activation, as detectron2's does."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, x):
        x = functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return functional.relu(self.norm(x))


@pytest.mark.parametrize("selector", [pg.Evidence(), pg.GradientEnergy(quantile=0.3)], ids=["evidence", "energy"])
@pytest.mark.parametrize("layers", [0.5, "all", ["0"]])
def test_a_subclass_with_normalisation_is_edited_at_the_convolution_itself(selector, layers):
    parts = [Normalised(2, 6, 3, padding=1, stride=2), Normalised(6, 6, 3, padding=1)]
    rest = [nn.Flatten(), nn.Linear(54, 4)]
    together = double(nn.Sequential(*parts, *rest))
    apart = nn.Sequential()
    for part in parts:
        convolution = nn.Conv2d(part.in_channels, 6, 3, padding=1, stride=part.stride)
        convolution.weight, convolution.bias = part.weight, part.bias
        apart.append(nn.Sequential(convolution, part.norm, nn.ReLU()))
    apart.extend(rest)
    apart.eval()
    found = pg.Explainer(together, selector, layers=layers)
    expected = pg.Explainer(apart, selector, layers=["0.0"] if layers == ["0"] else layers)
    for _ in range(2):
        torch.testing.assert_close(found.attribute(X, 1), expected.attribute(X, 1), rtol=1e-9, atol=1e-15)
        assert [f"{name}.0" for name in found.edited_layers] == list(expected.edited_layers)
    # Rules that are active inside the module stay as they were after a failure there.
    with pytest.raises(InputError):
        found.attribute(X[:, :1], 1)
    torch.testing.assert_close(found.attribute(X, 1), expected.attribute(X, 1), rtol=1e-9, atol=1e-15)


def test_a_subclass_whose_convolution_is_out_of_reach_is_refused_by_name_where_it_is_chosen():
    torch.manual_seed(0)
    fused = torch.ao.nn.intrinsic.qat.ConvBnReLU2d(
        2, 5, 3, qconfig=torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    )
    model = nn.Sequential(fused, nn.Conv2d(5, 5, 3), nn.Flatten(), nn.Linear(20, 4)).eval()
    x = X.float()
    with pytest.raises(ModelError, match=r"Layer '0' is of type ConvBnReLU2d, which does more than convolve"):
        pg.Explainer(model, layers="all").attribute(x, 1)
    with pytest.raises(ModelError, match=r"Layer '0'"):
        pg.Explainer(model, layers="0").attribute(x, 1)
    explainer = pg.Explainer(model, layers=0.5)
    explainer.attribute(x, 1)
    assert explainer.edited_layers == ("1",)


class Functional(nn.Module):
    """A convolution by function, and attention, around a layer."""

    def __init__(self, attention=True):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 2, 3, 3))
        self.layer, self.last = nn.Conv2d(4, 4, 3), nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True) if attention else None

    def forward(self, x):
        tokens = self.layer(functional.conv2d(x, self.kernel)).flatten(2).mT
        if self.attention is not None:
            tokens = self.attention(tokens, tokens, tokens, need_weights=self.weights)[0]
        return self.last(tokens.mean(1))

    weights = False


def test_parts_that_convolve_or_attend_but_are_no_layers_are_named_once():
    for weights in (False, True):
        model = double(Functional())
        model.weights = weights
        explainer = pg.Explainer(model, layers="all", balance=False)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            explainer.attribute(X, 1)
            explainer.attribute(X, 1)
        (message,) = [str(warning.message) for warning in said if issubclass(warning.category, ModelWarning)]
        assert "'kernel'" in message
        assert "attention" in message
    # Named layers are a choice of their own.
    pg.Explainer(model, layers="layer").attribute(X, 1)


class Mixed(nn.Module):
    """A layer whose positions are mixed by a product of two tensors, given as a function."""

    def __init__(self, mix):
        super().__init__()
        self.layer, self.last, self.mix = nn.Conv2d(2, 4, 3), nn.Linear(4, 4), mix

    def forward(self, x):
        return self.last(self.mix(self.layer(x).flatten(2).mT).mean(1))


@pytest.mark.parametrize(
    ("mix", "attends"),
    [
        (lambda x: (x @ x.mT).softmax(-1) @ x, True),
        # torchvision's MaxVit
        (
            lambda x: torch.einsum("b i j, b j d -> b i d", torch.einsum("b i d, b j d -> b i j", x, x).softmax(-1), x),
            True,
        ),
        # EfficientViT and SHViT in timm: the values come first
        (lambda x: (x.mT @ (x @ x.mT).softmax(-1).mT).mT, True),
        # CoaT: a softmax over the positions of the keys
        (lambda x: x @ (x.softmax(1).mT @ x), True),
        (lambda x: x.softmax(1).mean(1, keepdim=True) * x, False),
        (lambda x: x @ (x.mT @ x), False),
    ],
    ids=["matmul", "einsum", "values-first", "factorised", "gate", "product"],
)
def test_attention_is_named_however_it_is_written(mix, attends):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pg.Explainer(double(Mixed(mix)), layers="all", balance=False).attribute(X, 1)
    messages = [str(warning.message) for warning in said if issubclass(warning.category, ModelWarning)]
    assert [message.startswith("The gradient stays plain in attention") for message in messages] == [True] * attends


# What is said


def test_errors_name_the_layers_on_the_path():
    model = double(Heads())
    explainer = pg.Explainer(model, layers="heads.1.*")
    with pytest.raises(LayerError, match=r"score: trunk.0, trunk.2, trunk.4, heads.0.0\."):
        explainer.attribute(X, lambda output: output["heads"][0][:, 1])
    assert explainer.layers == ("heads.1.0", "heads.1.2")


@pytest.fixture
def kept():
    """A chain whose output behind the second convolution is kept, and its input."""
    model = nn.Sequential(chain(2, 4), nn.Flatten(), nn.Linear(180, 4)).double().eval()
    outputs = []
    model[0][3].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    return model, X.clone().requires_grad_(), outputs


def test_a_score_inside_of_the_model_has_layers_of_its_own(kept):
    model, x, outputs = kept
    for layers, names in ((0.25, ["0.2"]), (0.5, ["0.2"]), ("all", ["0.0", "0.2"])):
        expected = gradient_by_hand(model, names, X, lambda _: outputs[-1].square())
        with pg.ParchGrad(model, pg.GradientEnergy(quantile=0.3), layers=layers, **TRUE) as block:
            model(x)
            found = torch.autograd.grad(outputs[-1].square().sum(), x)[0]
        torch.testing.assert_close(found, expected)
        assert list(block.edited_layers) == names


def test_a_gradient_taken_inside_of_the_model_is_never_plain_in_silence(kept):
    model, x, outputs = kept

    def inside():
        model(x)
        torch.autograd.grad(outputs[-1].sum(), x)

    with pytest.raises(LayerError, match=r"score: 0\.0, 0\.2"), pg.ParchGrad(model, layers=["0.6"], **TRUE):
        inside()
    with warnings.catch_warnings(record=True) as said, pg.ParchGrad(model, layers=["0.6"], **TRUE):
        warnings.simplefilter("always")
        torch.autograd.grad(model(x)[:, 1].sum(), x)
        inside()
    (message,) = [str(warning.message) for warning in said if issubclass(warning.category, ModelWarning)]
    assert message.startswith("1 of 2 backward passes")


def test_parts_called_alone_are_edited_by_the_depth_in_their_own_graph():
    model = nn.Sequential(chain(2, 2), chain(5, 2), nn.Flatten(), nn.Linear(180, 4)).double().eval()
    x = X.clone().requires_grad_()
    expected = gradient_by_hand(model, ["1.0", "1.2"], X, lambda output: output[:, 1])
    with pg.ParchGrad(model, pg.GradientEnergy(quantile=0.3), layers=0.5, **TRUE):
        found = torch.autograd.grad(model[3](model[2](model[1](model[0](x))))[:, 1].sum(), x)[0]
    torch.testing.assert_close(found, expected)


class Checkpointed(nn.Module):
    """A convolution outside of two checkpointed parts."""

    def __init__(self, *, reentrant):
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(2, 5, 3, padding=1), chain(5, 2), chain(5, 2)
        self.reentrant = reentrant

    def forward(self, x):
        x = self.stem(x)
        for part in (self.first, self.second):
            x = checkpoint(part, x, use_reentrant=self.reentrant)
        return x.mean((2, 3))


def test_checkpointed_parts():
    every = ["stem", "first.0", "first.2", "second.0", "second.2"]
    assert_edited(double(Checkpointed(reentrant=False)), 0.5, every[-2:], X, lambda output: output[:, 1])
    assert_edited(double(Checkpointed(reentrant=False)), "all", every, X, lambda output: output[:, 1])
    hidden = double(Checkpointed(reentrant=True))
    hidden.reentrant = False
    expected = gradient_by_hand(hidden, every, X, lambda output: output[:, 1])
    hidden.reentrant = True
    x = X.clone().requires_grad_()
    with pg.ParchGrad(hidden, pg.GradientEnergy(quantile=0.3), layers="all", **TRUE) as block:
        hidden(x)[:, 1].sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-9, atol=1e-13)
    assert set(block.edited_layers) == set(every)
    with pytest.raises(LayerError, match="use_reentrant"), pg.ParchGrad(hidden, layers=0.5, **TRUE):
        hidden(x)[:, 1].sum().backward()


# Passes that differ


class EarlyExit(nn.Module):
    """As deep as the input is bright."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = chain(2, 2), chain(5, 2), nn.Linear(5, 4)

    def forward(self, x):
        x = self.first(x * 1)
        if x.sum() > self.threshold:
            x = self.second(x)
        return self.head(x.mean((2, 3)))


def test_every_pass_has_the_layers_of_its_own_graph():
    model = double(EarlyExit())
    names = {math.inf: ("first.2",), -math.inf: ("second.0", "second.2")}
    explainer = pg.Explainer(model, layers=0.5)
    for threshold in (math.inf, -math.inf, math.inf, -math.inf):
        model.threshold = threshold
        found = explainer.attribute(X, 1)
        assert explainer.edited_layers == names[threshold]
        assert torch.equal(found, pg.Explainer(model, layers=0.5).attribute(X, 1))


class Wired(nn.Module):
    """The same calls, one behind the other or side by side."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.c = nn.Conv2d(2, 5, 3), *(nn.Conv2d(5, 5, 1) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        if self.cascade:
            return self.c(self.b(self.a(x))).square().mean((2, 3))
        return (self.a(x) + self.b(x) + self.c(x)).square().mean((2, 3))


def test_the_same_calls_in_another_graph():
    model, x = double(Wired()), X.clone().requires_grad_()
    block = pg.ParchGrad(model, pg.GradientEnergy(quantile=0.3), layers=0.5, **TRUE)
    for cascade, names in ((True, ("b", "c")), (False, ("a", "b", "c")), (True, ("b", "c"))):
        model.cascade = cascade
        with block:
            torch.autograd.grad(model(x)[:, 1].sum(), x)
        assert block.edited_layers == names
    model = double(nn.Sequential(*(nn.Conv2d(2, 2, 1) for _ in range(3))))
    block = pg.ParchGrad(model, pg.GradientEnergy(quantile=0.6), layers=0.5, **TRUE)
    for score, names in (
        (lambda x: model(x) + model(2 * x), ("2",)),
        (lambda x: model(model(x)), ("0", "1", "2")),
        (lambda x: model(x) + model(2 * x), ("2",)),
    ):
        with block:
            torch.autograd.grad(score(x)[:, 1].sum(), x)
        assert block.edited_layers == names


def test_only_convolutions_that_the_gradient_passes_through_count():
    class Merged(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.merge = chain(1, 1), chain(1, 6), chain(5, 2)

        def forward(self, x, y):
            return self.merge(self.left(x) + self.right(y)).mean((2, 3))

    model = double(Merged())
    x, y = X[:, :1].clone().requires_grad_(), X[:, 1:].clone()
    for needs_gradient in (False, True):
        block = pg.ParchGrad(model, pg.GradientEnergy(quantile=0.3), layers=0.5, **TRUE)
        with block:
            torch.autograd.grad(model(x, y.requires_grad_(needs_gradient))[:, 1].sum(), x)
        assert block.edited_layers == ("merge.2",)


def test_the_depth_at_a_hidden_layer_does_not_depend_on_the_input():
    model = nn.Sequential(chain(2, 4), nn.Flatten(), nn.Linear(180, 4)).double().eval()
    for needs_gradient in (False, True):
        block = pg.ParchGrad(model, pg.GradientEnergy(quantile=0.3), layers=0.75, **TRUE)
        with block:
            captum.attr.LayerGradCam(model, model[0][1]).attribute(X.clone().requires_grad_(needs_gradient), target=1)
        assert block.edited_layers == ("0.4", "0.6")
    with pytest.raises(LayerError, match="no convolution"), block:
        captum.attr.LayerGradCam(model, model[0][6]).attribute(X, target=1)


def test_models_before_a_block_and_blocks_of_several_models():
    first, second = double(nn.Sequential(*chain(2, 3), nn.Conv2d(5, 2, 1))), double(chain(2, 4))
    block, x = pg.ParchGrad(second, layers=0.5, **TRUE), X.clone().requires_grad_()
    with block:
        torch.autograd.grad(second(first(x))[:, 1].sum(), x)
    assert block.edited_layers == ("4", "6")
    with pg.ParchGrad(first, layers=0.5, **TRUE), block:
        torch.autograd.grad(second(first(x))[:, 1].sum(), x)
    assert block.edited_layers == ("4", "6")


def test_neurons_after_the_whole_model():
    model = nn.Sequential(chain(2, 4), nn.Flatten(), nn.Linear(180, 4)).double().eval()
    x = X.clone().requires_grad_()
    with pg.ParchGrad(model, layers=0.5, **TRUE) as block:
        captum.attr.Saliency(model).attribute(x, target=1)
        captum.attr.NeuronGradient(model, model[0][3]).attribute(x, (0, 1, 1))
    assert block.edited_layers == ("0.2", "0.4", "0.6")


def test_a_refused_layer_leaves_no_hook_on_inputs_and_may_be_left_out():
    class Pair(nn.Conv2d):
        def forward(self, x):
            return super().forward(x), x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.rest = Pair(2, 5, 3, padding=1), chain(5, 3)

        def forward(self, x):
            return self.rest(self.pair(x)[0]).mean((2, 3))

    model, x = double(Model()), X.clone().requires_grad_()
    given = x * 1
    with (
        pytest.raises(ModelError, match=r"'pair' returns a tuple.*without it"),
        pg.ParchGrad(model, layers="all", **TRUE),
    ):
        torch.autograd.grad(model(given)[:, 1].sum(), x)
    assert not given._backward_hooks
    with pg.ParchGrad(model, layers=0.25, **TRUE) as block:
        torch.autograd.grad(model(x)[:, 1].sum(), x)
    assert block.edited_layers == ("rest.4",)


def test_fixed_filters_and_collections_are_passed_over_in_silence():
    class Blurred(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)
            self.register_buffer("kernel", torch.full((4, 1, 2, 2), 0.25))

        def forward(self, x):
            return self.last(functional.conv2d(self.first(x), self.kernel, groups=4).mean((2, 3)))

    pg.Explainer(double(Blurred()), layers="all").attribute(X, 1)
    model = double(Functional())
    assert list(pg.collect_statistics(model, [(row, 0) for row in X])) == ["layer"]


class Lists(nn.Module):
    """One score per row in a list, as detectors return, with a tensor that stands elsewhere for each batch size."""

    def __init__(self):
        super().__init__()
        self.trunk, self.boxes, self.scores = chain(2, 2), chain(5, 1), chain(5, 2)

    def forward(self, x):
        x = self.trunk(x)
        boxes, scores = self.boxes(x).mean((1, 2, 3)), self.scores(x).mean((1, 2, 3))
        return {"boxes": list(boxes), "scores": list(scores)}


def test_outputs_whose_number_differs_with_the_batch():
    explainer = pg.Explainer(double(Lists()), pg.GradientEnergy(quantile=0.3), layers=0.5, **TRUE)

    def score(output):
        return torch.stack(output["scores"])

    both = explainer.attribute(X, score)
    rows = torch.cat([explainer.attribute(X[row : row + 1], score) for row in (0, 1)])
    assert explainer.edited_layers == ("scores.0", "scores.2")
    torch.testing.assert_close(rows, both)
    torch.testing.assert_close(explainer.attribute(X, score), both)


def test_a_score_of_two_outputs_and_a_convolution_that_they_share():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.deep, self.shared = chain(2, 3), nn.Conv2d(5, 5, 3, padding=1)
            self.flat = nn.Conv2d(2, 5, 1)

        def forward(self, x):
            return self.shared(self.flat(x)).mean((2, 3)), self.shared(self.deep(x)).square().mean((2, 3))

    model = double(Shared())
    for used in ((0, 1), (1, 0)):
        assert_edited(model, 0.3, ["shared"], X, lambda out, used=used: out[used[0]][:, 1] + 2 * out[used[1]][:, 2])
    late = double(Heads())
    both = ["heads.2.4"]
    assert_edited(late, 0.1, both, X, lambda output: output["heads"][0][:, 1] + output["heads"][2][:, 1])
    assert_edited(late, 0.1, both, X, lambda output: output["heads"][2][:, 1] + output["heads"][0][:, 1])


@dataclass
class Output:
    first: torch.Tensor
    second: torch.Tensor


def test_outputs_that_hide_their_tensors_and_gradients_of_one_of_two_inputs():
    class Hiding(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.near, self.far = chain(2, 3), chain(5, 1), chain(5, 6)

        def forward(self, x):
            x = self.trunk(x)
            return Output(self.near(x).mean((2, 3)), self.far(x).mean((2, 3)))

    assert_edited(double(Hiding()), 0.5, ["trunk.4", "near.0"], X, lambda output: output.first[:, 1])
    branches = double(Branches())
    block = pg.ParchGrad(branches, pg.GradientEnergy(quantile=0.3), layers="all", **TRUE)
    x, y = (X[:, :1].clone().requires_grad_() for _ in range(2))
    for inputs, names in (
        ((x,), ("left.0", "left.2")),
        ((x, y), ("left.0", "left.2", "right.0", "right.2", "right.4")),
    ):
        with block:
            torch.autograd.grad(branches(x, y)[:, 1].sum(), inputs)
        assert block.edited_layers == names


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = chain(1, 2), chain(1, 3)

    def forward(self, x, y):
        return (self.left(x) + self.right(y)).mean((2, 3))


def test_blocks_inside_of_others_leave_no_trace_in_them():
    model, x = double(Heads()), X.clone().requires_grad_()
    block = pg.ParchGrad(model, pg.GradientEnergy(quantile=0.3), layers="all", **TRUE)
    with block, plain_gradients(model.trunk):
        torch.autograd.grad(model(x)["heads"][0].sum(), x)
    assert block.edited_layers == ("heads.0.0",)
    with block:
        torch.autograd.grad(model(x)["heads"][0].sum(), x)
    assert block.edited_layers == ("trunk.0", "trunk.2", "trunk.4", "heads.0.0")
    # What an inner block decides over is not the outer one's.
    with pg.ParchGrad(model, layers=["heads.0.0"], **TRUE), plain_gradients(model.heads):
        torch.autograd.grad(model(x)["heads"][0].sum(), x)
    with pg.ParchGrad(model, layers="all", **TRUE), pg.ParchGrad(model.trunk, layers="all", **TRUE):
        torch.autograd.grad(model(x)["heads"][0].sum(), x)


def test_gradients_of_other_models_at_the_same_input_are_none_of_its_business():
    model, other, x = double(Twice()), double(Late(2, 2)), X.clone().requires_grad_()
    with pg.ParchGrad(model, layers="all", **TRUE):
        torch.autograd.grad(model(x)[:, 1].sum(), x)
        torch.autograd.grad(other(x)[:, 1].sum() + x.square().sum(), x)
    with pg.ParchGrad(model, layers="all", **TRUE):
        model(x)
        torch.autograd.grad(other(x)[:, 1].sum(), x)


def test_inputs_are_left_without_hooks():
    class Passing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = chain(2, 2)

        def forward(self, x):
            before = x.clone()
            x += self.body(before)[:, :2]
            return x.mean((2, 3)), before, x

    model, x = double(Passing()), X.clone().requires_grad_()
    given = x * 1
    with pg.ParchGrad(model, pg.GradientEnergy(quantile=0.3), layers=0.5, **TRUE) as block:
        torch.autograd.grad(model(given)[0][:, 1].sum(), x)
    assert block.edited_layers == ("body.2",)
    assert not x._backward_hooks
    assert not given._backward_hooks


def test_an_interruption_inside_of_a_convolution_leaves_nothing():
    class Interrupted(Normalised):
        def forward(self, x):
            super().forward(x)
            raise KeyboardInterrupt

    model = double(nn.Sequential(Interrupted(2, 5, 3)))
    before = torch.overrides._get_current_function_mode_stack()
    with pytest.raises(KeyboardInterrupt), pg.ParchGrad(model, layers="all"):
        model(X)
    assert torch.overrides._get_current_function_mode_stack() == before


def test_whole_numbers_have_no_paths():
    class Scaling(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(chain(3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))

        def forward(self, x):
            return self.body(x / 255)

    model = Scaling().eval()
    images = [(torch.randint(0, 255, (3, 6, 6), dtype=torch.uint8), index % 3) for index in range(12)]
    with pytest.raises(InputError, match="whole numbers"):
        pg.collect_statistics(model, images, layers=0.5)
    assert len(pg.collect_statistics(model, images)) == 4


def test_layers_are_chosen_for_inputs_of_any_kind():
    branches = double(Branches())
    x, y = X[:, :1], X[:, 1:]
    for inputs in ((x, y), {"x": x, "y": y}, {"y": y, "x": x}):
        assert list(pg.choose_layers(branches, 0.5, inputs=inputs)) == ["left.2", "right.4"]


def test_statistics_of_some_layers_fit_where_a_ratio_chooses_these():
    model = nn.Sequential(chain(3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)).eval()
    images = [(torch.rand(3, 6, 6), index % 3) for index in range(30)]
    statistics = pg.collect_statistics(model, images, layers=0.5, batch_size=7)
    assert list(statistics) == ["0.4", "0.6"]
    selector = pg.ClassWise(statistics, quantile=0.4, normality_threshold=None)
    explainer, x = pg.Explainer(model, selector, layers=0.5), torch.rand(2, 3, 6, 6)
    explainer.attribute(x, 1)
    assert explainer.edited_layers == ("0.4", "0.6")
    with pytest.raises(StatisticsError, match=r"'0\.2'"):
        pg.Explainer(model, selector, layers=0.75).attribute(x, 1)
