"""Balanced backward passes: each rule beside a slow one, and scores that their gradients add up to."""

import copy
import math
import re
import warnings

import captum.attr
import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import parchgrad as pg
from parchgrad.core import balance
from parchgrad.core.balance import Balance, norm_gradient, register_rule
from parchgrad.core.rules import BackwardRules
from parchgrad.errors import ModelError, ModelWarning, SettingError
from tests.support import contributions, enlivened, input_gradient, nothing_is_left

RNG = np.random.default_rng(0)


def values(*shape):
    return torch.from_numpy(RNG.standard_normal(shape)).requires_grad_()


def balanced(function, *inputs, seed):
    """Results and gradients of a function under the rules, and its plain result."""
    plain = function(*inputs)
    with BackwardRules(balance=True):
        result = function(*inputs)
    assert torch.equal(result, plain)
    return [
        None if found is None else found.numpy()
        for found in torch.autograd.grad(result, inputs, seed, allow_unused=True)
    ]


# Activations

RATIOS = {
    "gelu": (functional.gelu, lambda x: special.ndtr(x)),
    "gelu, tanh": (
        lambda x: functional.gelu(x, approximate="tanh"),
        lambda x: 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    ),
    "silu": (functional.silu, special.expit),
    "hardswish": (functional.hardswish, lambda x: np.clip(x / 6 + 0.5, 0, 1)),
    "mish": (functional.mish, lambda x: np.tanh(np.log1p(np.exp(x)))),
    "elu": (lambda x: functional.elu(x, 0.7), lambda x: np.where(x > 0, 1, 0.7 * np.expm1(x) / x)),
    "celu": (lambda x: functional.celu(x, 0.7), lambda x: np.where(x > 0, 1, 0.7 * np.expm1(x / 0.7) / x)),
    "selu": (functional.selu, lambda x: 1.0507009873554805 * np.where(x > 0, 1, 1.6732632423543772 * np.expm1(x) / x)),
    "tanh": (torch.tanh, lambda x: np.tanh(x) / x),
    "softsign": (functional.softsign, lambda x: 1 / (1 + np.abs(x))),
    "relu6": (functional.relu6, lambda x: np.clip(x, 0, 6) / x),
    "hardtanh": (lambda x: functional.hardtanh(x, -0.5, 2.0), lambda x: np.clip(x, -0.5, 2) / x),
    "square": (torch.square, lambda x: x),
    "cube": (lambda x: x**3, lambda x: x**2),
    "silu in place": (lambda x: functional.silu(x * 1, inplace=True), special.expit),
    "elu in place": (lambda x: functional.elu(x * 1, 1.0, True), lambda x: np.where(x > 0, 1, np.expm1(x) / x)),
    "tanh in place": (lambda x: (x * 1).tanh_(), lambda x: np.tanh(x) / x),
}


@pytest.mark.parametrize("name", RATIOS)
def test_activations_pass_the_gradient_times_their_ratio(name):
    function, ratio = RATIOS[name]
    x, seed = values(3, 50), torch.from_numpy(RNG.standard_normal((3, 50)))
    with torch.no_grad():
        x *= 4
    (found,) = balanced(function, x, seed=seed)
    np.testing.assert_allclose(found, seed.numpy() * ratio(x.detach().numpy()), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    ("function", "limit"),
    [
        (functional.gelu, 0.5),
        (functional.silu, 0.5),
        (functional.hardswish, 0.5),
        (functional.mish, 0.6),
        (functional.elu, 1),
        (functional.selu, 1.0507009873554805),
        (torch.tanh, 1),
        (torch.square, 0),
    ],
)
def test_at_zero_the_ratio_is_its_limit(function, limit):
    x = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    (found,) = balanced(function, x, seed=torch.ones(1, 3, dtype=torch.float64))
    np.testing.assert_allclose(found, limit, rtol=1e-12)
    # The ratio tends to it.
    near = torch.full((1, 1), 1e-9, dtype=torch.float64)
    assert float(function(near) / near) == pytest.approx(limit, abs=1e-6)


# Normalisations


def jacobian_by_hand(x, weight, epsilon, is_centred):
    """Jacobian of a normalisation of one vector with its denominator constant."""
    count = len(x)
    centred = np.eye(count) - (1 / count if is_centred else 0)
    power = np.mean((x - np.mean(x)) ** 2) if is_centred else np.mean(x**2)
    return np.diag(weight) @ centred / math.sqrt(power + epsilon)


@pytest.mark.parametrize("is_centred", [True, False])
def test_layer_and_rms_norm_are_linear_but_for_their_denominator(is_centred):
    x, weight, bias = values(2, 3, 5), values(5), values(5)
    seed = torch.from_numpy(RNG.standard_normal((2, 3, 5)))
    if is_centred:
        found, of_bias = balanced(
            lambda x, bias: functional.layer_norm(x, (5,), weight.detach(), bias, 0.1), x, bias, seed=seed
        )
        np.testing.assert_allclose(of_bias, seed.numpy().sum((0, 1)), rtol=1e-12)
    else:
        (found,) = balanced(lambda x: functional.rms_norm(x, (5,), weight.detach(), 0.1), x, seed=seed)
    for index in np.ndindex(2, 3):
        jacobian = jacobian_by_hand(x[index].detach().numpy(), weight.detach().numpy(), 0.1, is_centred)
        np.testing.assert_allclose(found[index], seed[index].numpy() @ jacobian, rtol=1e-10)
    if is_centred:
        alone = norm_gradient(seed * weight, x.detach(), epsilon=0.1, is_centred=True)
        np.testing.assert_allclose(alone.detach(), found, rtol=1e-10)


@pytest.mark.parametrize(
    ("groups", "norm"),
    [
        (2, lambda x, weight, bias: functional.group_norm(x, 2, weight, bias, 0.1)),
        (6, lambda x, weight, bias: functional.instance_norm(x, weight=weight, bias=bias, eps=0.1)),
    ],
)
def test_group_and_instance_norm_are_linear_but_for_their_denominator(groups, norm):
    x, weight, bias = values(2, 6, 4, 3), values(6), values(6)
    seed = torch.from_numpy(RNG.standard_normal((2, 6, 4, 3)))
    found, of_bias = balanced(lambda x, bias: norm(x, weight.detach(), bias), x, bias, seed=seed)
    np.testing.assert_allclose(of_bias, seed.numpy().sum((0, 2, 3)), rtol=1e-12)
    wide = np.repeat(weight.detach().numpy(), 12).reshape(groups, -1)
    for row in range(2):
        grouped, seeds = x[row].detach().numpy().reshape(groups, -1), seed[row].numpy().reshape(groups, -1)
        for group in range(groups):
            expected = seeds[group] @ jacobian_by_hand(grouped[group], wide[group], 0.1, True)
            np.testing.assert_allclose(found[row].reshape(groups, -1)[group], expected, rtol=1e-9, atol=1e-12)


def test_norms_with_running_statistics_stay_linear():
    norm = nn.InstanceNorm2d(3, affine=True, track_running_stats=True).double().eval()
    x = values(2, 3, 4, 4)
    (found,) = balanced(norm, x, seed=torch.ones(2, 3, 4, 4, dtype=torch.float64))
    np.testing.assert_allclose(found, torch.autograd.grad(norm(x).sum(), x)[0])


# Attention


def attention_by_hand(query, key, seed):
    """Gradient at the values, with the weights constant."""
    scores = query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return weights.swapaxes(-1, -2) @ seed


ATTENTION = {
    "fused": functional.scaled_dot_product_attention,
    "matmul": lambda q, k, v: (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v,
    "functional": lambda q, k, v: (
        functional.dropout(
            functional.softmax(torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.shape[-1]), dim=-1), 0.1, False
        )
        .to(v.dtype)
        .matmul(v)
    ),
    "einsum": lambda q, k, v: torch.einsum(
        "bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).div(math.sqrt(q.shape[-1])).softmax(-1), v
    ),
    "values first": lambda q, k, v: (v.mT @ (k @ q.mT / math.sqrt(q.shape[-1])).softmax(-2)).mT,
    "batched": lambda q, k, v: torch.bmm(
        torch.baddbmm(
            torch.zeros(1, dtype=q.dtype), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=q.shape[-1] ** -0.5
        ).softmax(-1),
        v.flatten(0, 1),
    ).reshape(v.shape),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_passes_the_gradient_through_its_values_alone(name):
    query, key, value = values(2, 3, 5, 4), values(2, 3, 5, 4), values(2, 3, 5, 4)
    seed = torch.from_numpy(RNG.standard_normal((2, 3, 5, 4)))
    of_query, of_key, found = balanced(ATTENTION[name], query, key, value, seed=seed)
    assert of_query is None or not of_query.any()
    assert of_key is None or not of_key.any()
    expected = attention_by_hand(query.detach().numpy(), key.detach().numpy(), seed.numpy())
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_masks_and_weights_mixed_across_heads_are_constant_too():
    query, key, value, mask = values(2, 3, 5, 4), values(2, 3, 5, 4), values(2, 3, 5, 4), values(2, 3, 5, 5)
    mixing = values(3, 3).detach()

    def talking(query, key, value, mask):
        weights = (query @ key.mT + mask).softmax(-1)
        return torch.einsum("gh,bhij->bgij", mixing, weights) @ value

    for attend in (functional.scaled_dot_product_attention, talking):
        seed = torch.ones(2, 3, 5, 4, dtype=torch.float64)
        *constant, found = balanced(
            lambda q, k, m, v, attend=attend: attend(q, k, v, m), query, key, mask, value, seed=seed
        )
        assert all(each is None or not each.any() for each in constant)
        with torch.no_grad():
            result = attend(query, key, value, mask)
        assert float((torch.from_numpy(found) * value.detach()).sum()) == pytest.approx(float(result.sum()), rel=1e-10)


@pytest.mark.parametrize("weights", [True, False])
def test_the_attention_module_of_torch(weights):
    module = nn.MultiheadAttention(8, 2, batch_first=True).double().eval().requires_grad_(False)
    x, seed = values(2, 5, 8), torch.from_numpy(RNG.standard_normal((2, 5, 8)))
    (found,) = balanced(lambda x: module(x, x, x, need_weights=weights)[0], x, seed=seed)
    tokens, matrix = x.detach().numpy(), module.in_proj_weight.detach().numpy()
    query, key = (
        (tokens @ part.T + bias).reshape(2, 5, 2, 4).swapaxes(1, 2)
        for part, bias in zip(np.split(matrix, 3)[:2], np.split(module.in_proj_bias.detach().numpy(), 3), strict=False)
    )
    behind = (seed.numpy() @ module.out_proj.weight.detach().numpy()).reshape(2, 5, 2, 4).swapaxes(1, 2)
    of_values = attention_by_hand(query, key, behind).swapaxes(1, 2).reshape(2, 5, 8)
    np.testing.assert_allclose(found, of_values @ np.split(matrix, 3)[2], rtol=1e-9)


# Gates and products


def gated(kind):
    """A gated product of two halves, with the gate's values for numpy."""
    return {
        "sigmoid": (lambda a, b: a * b.sigmoid(), special.expit),
        "gate first": (lambda a, b: torch.sigmoid(b) * a, special.expit),
        "hardsigmoid": (lambda a, b: a * functional.hardsigmoid(b), lambda b: np.clip(b / 6 + 0.5, 0, 1)),
        "clamped": (lambda a, b: a * (functional.relu6(b + 3) / 6), lambda b: np.clip(b / 6 + 0.5, 0, 1)),
        "glu": (lambda a, b: functional.glu(torch.cat([a, b], -1)), special.expit),
        "swiglu": (lambda a, b: functional.silu(b) * a, lambda b: b * special.expit(b)),
        "tanh": (lambda a, b: a * (1 + torch.tanh(b)), lambda b: 1 + np.tanh(b)),
        "relu": (lambda a, b: a * b.relu(), lambda b: np.maximum(b, 0)),
        "in place": (lambda a, b: (a * 1).mul_(b.sigmoid()), special.expit),
        "gate in place": (lambda a, b: (b.sigmoid() * 1).mul_(a), special.expit),
        "keyword": (lambda a, b: torch.mul(a, other=b.sigmoid()), special.expit),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        *("sigmoid", "gate first", "hardsigmoid", "clamped", "glu", "swiglu", "tanh", "relu"),
        *("in place", "gate in place", "keyword"),
    ],
)
def test_gates_are_constant(kind):
    function, gate = gated(kind)
    a, b, seed = values(2, 3, 6), values(2, 3, 6), torch.from_numpy(RNG.standard_normal((2, 3, 6)))
    of_values, of_gate = balanced(function, a, b, seed=seed)
    np.testing.assert_allclose(of_values, seed.numpy() * gate(b.detach().numpy()), rtol=1e-10)
    assert of_gate is None or not of_gate.any()


@pytest.mark.parametrize(
    ("product", "signal"),
    [
        # The last is the signal; what is constant of it, by numpy.
        (lambda a, b: a.tanh() * b.sigmoid(), lambda a, b: (np.tanh(a) / a * special.expit(b), None)),
        (
            lambda a, b: a * (b.sigmoid() * (2 * b).sigmoid()),
            lambda a, b: (special.expit(b) * special.expit(2 * b), None),
        ),
        (lambda a, b: a * b.sigmoid() ** 2, lambda a, b: (special.expit(b) ** 2, None)),
        (lambda a, b: a * functional.softplus(b), lambda a, b: (np.logaddexp(0, b), None)),
        (lambda a, b: functional.silu(b) * a.clamp(-7, 7), lambda a, b: (b * special.expit(b), None)),
        (lambda a, b: a * torch.cat([b.sigmoid(), b.softmax(-1)], -1)[..., :6], lambda a, b: (special.expit(b), None)),
    ],
    ids=["tanh and sigmoid", "two gates", "squared gate", "softplus", "clamped signal", "joined gates"],
)
def test_gates_of_gates_and_bounded_signals(product, signal):
    a, b, seed = values(2, 3, 6), values(2, 3, 6), torch.from_numpy(RNG.standard_normal((2, 3, 6)))
    of_signal, of_gate = balanced(product, a, b, seed=seed)
    expected, _ = signal(a.detach().numpy(), b.detach().numpy())
    np.testing.assert_allclose(of_signal, seed.numpy() * expected, rtol=1e-9)
    assert of_gate is None or not of_gate.any()


def test_norms_by_a_negative_power():
    x, seed = values(2, 3, 6), torch.from_numpy(RNG.standard_normal((2, 3, 6)))
    for power in (lambda v: v**-0.5, lambda v: torch.pow(v, -0.5), torch.rsqrt, lambda v: 1 / v.sqrt()):
        (found,) = balanced(lambda x, power=power: x * power(x.pow(2).mean(-1, keepdim=True)), x, seed=seed)
        steepness = 1 / np.sqrt((x.detach().numpy() ** 2).mean(-1, keepdims=True))
        np.testing.assert_allclose(found, seed.numpy() * steepness, rtol=1e-9)


def test_attention_to_constant_values_keeps_its_gradient():
    key, value = nn.Parameter(values(2, 3, 5, 4).detach()), nn.Parameter(values(2, 3, 5, 4).detach())
    query, seed = values(2, 3, 5, 4), torch.ones(2, 3, 5, 4, dtype=torch.float64)
    with BackwardRules(balance=True, weights={id(key), id(value)}):
        result = functional.scaled_dot_product_attention(query, key, value)
    (found,) = torch.autograd.grad(result, query, seed)
    expected = torch.autograd.grad(functional.scaled_dot_product_attention(query, key, value), query, seed)[0]
    torch.testing.assert_close(found, expected)


def test_the_gate_of_squeeze_and_excitation_and_of_a_norm_of_responses():
    reduce, expand = nn.Conv2d(4, 2, 1).double(), nn.Conv2d(2, 4, 1).double()

    def excite(x):
        return x * torch.sigmoid(expand(functional.silu(reduce(x.mean((2, 3), keepdim=True)))))

    def respond(x):
        norms = x.norm(p=2, dim=(2, 3), keepdim=True)
        return x * (norms / (norms.mean(1, keepdim=True) + 1e-6))

    for function in (excite, respond):
        x, seed = values(2, 4, 3, 3), torch.from_numpy(RNG.standard_normal((2, 4, 3, 3)))
        (found,) = balanced(function, x, seed=seed)
        with torch.no_grad():
            gate = function(x) / x
        np.testing.assert_allclose(found, seed.numpy() * gate.numpy(), rtol=1e-9)


@pytest.mark.parametrize(
    ("product", "count"),
    [
        (lambda a, b: a * b, 2),
        (lambda a, b: (a * 1).mul_(b), 2),
        (lambda a, b: a @ b.mT, 2),
        (lambda a, b: torch.einsum("bij,bkj->bik", a, b), 2),
        (lambda a, b: torch.einsum("bij,bkj,bij->bik", [a, b, a.detach() * 2]), 2),
        (lambda a, b: torch.addcmul(torch.zeros(1, dtype=a.dtype), a, b), 2),
        (lambda a, b: torch.stack([functional.linear(one, two) for one, two in zip(a, b, strict=True)]), 2),
        (lambda a, b: torch.einsum("bij,bij,bij->bij", a, b, a), 3),
    ],
)
def test_products_without_a_gate_share_the_gradient(product, count):
    a, b = values(2, 3, 3), values(2, 3, 3)
    shape = product(a, b).shape
    seed = torch.from_numpy(RNG.standard_normal(tuple(shape)))
    found = balanced(product, a, b, seed=seed)
    expected = torch.autograd.grad(product(a, b), (a, b), seed)
    for each, true in zip(found, expected, strict=True):
        np.testing.assert_allclose(each, true.numpy() / count, rtol=1e-10)


def test_divisors_are_constant_and_weights_stay_factors():
    a, b, weight = values(2, 5), values(2, 5), nn.Parameter(values(5).detach())
    seed = torch.ones(2, 5, dtype=torch.float64)
    of_values, of_divisor = balanced(lambda a, b: a / b, a, b, seed=seed)
    np.testing.assert_allclose(of_values, 1 / b.detach().numpy())
    assert of_divisor is None
    # A scale that depends on weights alone is not a gate, however it is computed.
    with BackwardRules(balance=True, weights={id(weight)}):
        result = a * weight.sigmoid().reshape(1, 5) + a * weight
    (found,) = torch.autograd.grad(result.sum(), a)
    np.testing.assert_allclose(found, (weight.sigmoid() + weight).detach().expand(2, 5).numpy())


def test_a_layer_of_an_input_without_a_gradient_counts_as_the_input():
    """As for Captum's layer methods, which take the gradient at a layer inside of the model."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 4, 1)).double()
    ids = {id(weight) for weight in model.parameters()}
    for first in (
        lambda x: model(x),
        lambda x: functional.linear(x.flatten(1), model[0].weight.new_ones(4, 16) * model[0].bias.sum()),
    ):
        with BackwardRules(balance=True, weights=ids, is_input_traced=False):
            hidden = first(torch.ones(1, 1, 4, 4, dtype=torch.float64))
            result = hidden * hidden.sigmoid()
        (found,) = torch.autograd.grad(result.sum(), hidden)
        torch.testing.assert_close(found, hidden.sigmoid())


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(6), nn.BatchNorm1d(4).eval(), nn.GroupNorm(2, 4)], ids=["layer", "batch", "group"]
)
def test_a_norm_of_an_input_without_a_gradient_counts_as_the_input(norm):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.embed, self.last = norm, nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            tokens = self.embed(self.norm(x))
            return self.last(((tokens @ tokens.mT).softmax(-1) @ tokens).mean(1))

    model, x = Own().double().eval(), torch.randn(2, 4, 6, dtype=torch.float64)
    with pg.ParchGrad(model, None, balance=True):
        method = captum.attr.LayerGradientXActivation(model, model.embed)
        found, expected = (method.attribute(each, target=1) for each in (x, x.clone().requires_grad_()))
    torch.testing.assert_close(found, expected)
    with pg.ParchGrad(model, None):
        plain = captum.attr.LayerGradientXActivation(model, model.embed).attribute(x, target=1)
    assert not torch.allclose(found, plain)


# Completeness


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name",
    ["vit", "vit2", "vit3", "convnext", "convnext2", "convnext3", "efficientnet", "byobnet", "resnet", "mambaout"],
)
def test_what_a_network_receives_adds_up_to_its_score(name, dtype):
    model = enlivened(timm.create_model(f"test_{name}", num_classes=7)).eval().to(dtype)
    size = 160 if "vit" in name else 64
    x = torch.randn(2, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain = model(x)
    with pg.ParchGrad(model, None, balance=True):
        output = model(x)
        score = output[1, 2]
        total = contributions(model, x, score)
    assert torch.equal(output, plain)
    assert abs(total - float(score.detach())) < (1e-4 if dtype == torch.float32 else 1e-9)
    if name not in ("resnet",):
        # Plain gradients do not add up.
        assert abs(contributions(model, x, plain[1, 2]) - float(score.detach())) > 1e-6
    assert nothing_is_left(model)


def test_inside_of_captums_methods_and_of_any_edit():
    model = enlivened(timm.create_model("test_vit", num_classes=7, img_size=32)).eval().double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    targets = torch.tensor([0, 3])
    with pg.ParchGrad(model, None, balance=True):
        by_block = captum.attr.InputXGradient(model).attribute(x.clone().requires_grad_(), target=targets)
    explainer = pg.Explainer(model, None, balance=True, method="input_x_gradient")
    torch.testing.assert_close(explainer.attribute(x, targets), by_block, rtol=1e-10, atol=1e-14)
    plain = pg.Explainer(model, None, method="input_x_gradient").attribute(x, targets)
    assert (plain - by_block).abs().max() > 0.1 * by_block.abs().max()
    # All channels of the patch embedding kept: the balanced gradient.
    masks = {"patch_embed.proj": torch.ones(model.embed_dim, dtype=torch.bool)}
    edited = pg.Explainer(model, pg.FixedChannels(masks), gates=0, antialias=False, method="input_x_gradient")
    torch.testing.assert_close(edited.attribute(x, targets), by_block, rtol=1e-10, atol=1e-14)


@pytest.mark.skipif(torch.__version__ < (2, 8), reason="older torch does not tell whether a part is checkpointed")
@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_mambaout"])
def test_checkpointed_blocks(name):
    model = enlivened(timm.create_model(name, num_classes=7)).eval().double()
    x = torch.randn(1, 3, 160 if "vit" in name else 64, 160 if "vit" in name else 64, dtype=torch.float64)
    expected = pg.Explainer(model).attribute(x, 1)
    blocks = [module for kind in ("blocks", "stages") for module in getattr(model, kind, ())]
    assert blocks
    for block in blocks:
        block.forward = lambda y, run=block.forward: checkpoint(run, y, use_reentrant=False)
    assert torch.equal(pg.Explainer(model).attribute(x, 1), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    model = enlivened(timm.create_model("test_vit", num_classes=7)).eval()
    x = torch.randn(2, 3, 160, 160)
    expected = pg.Explainer(model).attribute(x, 1)
    narrow = pg.Explainer(copy.deepcopy(model).to(dtype)).attribute(x.to(dtype), 1)
    assert narrow.dtype == dtype
    with torch.autocast("cpu", dtype=dtype):
        cast = pg.Explainer(model).attribute(x, 1)
    for found in (narrow.float(), cast):
        assert (functional.cosine_similarity(found.flatten(1), expected.flatten(1)) > 0.99).all()


# Rules of users, and what is not balanced


class Squash(nn.Module):
    def forward(self, x, *, power=1.0):
        return x * torch.exp(-power * x.abs().mean(1, keepdim=True)).cos()


@pytest.fixture
def registered():
    known = dict(balance.STAND_INS)
    yield
    balance.STAND_INS.clear()
    balance.STAND_INS.update(known)


def said(run):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in found if issubclass(each.category, ModelWarning)]


@pytest.mark.usefixtures("registered")
def test_a_rule_of_a_users_own_module():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.squash, self.last = nn.Conv2d(3, 4, 3, bias=False), Squash(), nn.Linear(4, 5, bias=False)

        def forward(self, x):
            return self.last(functional.gelu(self.squash(self.first(x), power=0.3)).exp().log().mean((2, 3)))

    model = Own().double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    explainer = pg.Explainer(model, None, balance=True)
    (message,) = said(lambda: [explainer.attribute(x, 1) for _ in range(2)])
    assert re.search("not balanced in .*exp.*log", message)
    assert "cos" in message

    @register_rule(Squash)
    def squash(module, x, *, power):
        return x * torch.exp(-power * x.abs().mean(1, keepdim=True)).cos().detach()

    @register_rule(torch.Tensor.exp)
    def straight(x):
        return x * (x.exp() / x).detach()

    @register_rule(torch.Tensor.log)
    def back(x):
        return x * (x.log() / x).detach()

    output = model(x)

    def whole():
        with pg.ParchGrad(model, None, balance=True):
            found = model(x)
            assert torch.equal(found, output)
            assert abs(contributions(model, x, found[0, 1]) - float(found[0, 1].detach())) < 1e-9

    assert said(whole) == []
    assert nothing_is_left(model)


@pytest.mark.usefixtures("registered")
def test_rules_that_do_not_fit():
    for wrong in (Squash(), "gelu"):
        with pytest.raises(SettingError, match="class of modules or a function"):
            register_rule(wrong)

    @register_rule(Squash)
    def squash(module, x):
        return x[:, :1]

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Squash(), nn.Flatten(), nn.Linear(64, 2)).eval()
    with pytest.raises(ModelError, match=r"'squash' returns \(1, 1, 4, 4\), but the operation returns \(1, 4, 4, 4\)"):
        pg.Explainer(model, None, balance=True).attribute(torch.randn(1, 3, 6, 6), 1)

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.last = Pair(), model

        def forward(self, x):
            return self.last(self.pair(x)[0])

    for rule, words in (
        (lambda module, x: 2 * x, "returns other values than the operation"),
        (lambda x: x, r"fails \(.*positional argument"),
    ):
        register_rule(Squash)(rule)
        with pytest.raises(ModelError, match=words):
            pg.Explainer(model, None, balance=True).attribute(torch.randn(1, 3, 6, 6), 1)
    register_rule(Pair)(squash)
    with pytest.raises(ModelError, match="'squash' is for an operation that returns a tuple"):
        pg.Explainer(First().eval(), None, balance=True).attribute(torch.randn(1, 3, 6, 6), 1)
    assert nothing_is_left(model)
    # Without balance, it plays no part.
    pg.Explainer(model, None).attribute(torch.randn(1, 3, 6, 6), 1)


@pytest.mark.usefixtures("registered")
def test_operations_that_can_have_no_rule():
    class Convolution(nn.Conv2d):
        pass

    def own(x):
        return x.log1p()

    def reported(x):
        if torch.overrides.has_torch_function_unary(x):
            return torch.overrides.handle_torch_function(reported, (x,), x)
        return x * x.abs().log1p()

    for wrong, words in ((Convolution, "a layer that is edited itself"), (own, "function own, whose calls torch")):
        with pytest.raises(SettingError, match=words):
            register_rule(wrong)

    @register_rule(reported)
    def rule(x):
        return x * x.abs().log1p().detach()

    model, x = Applied(reported).double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    with pg.ParchGrad(model, None, balance=True):
        score = model(x)[0, 1]
        assert abs(contributions(model, x, score) - float(score.detach())) < 1e-9


@pytest.mark.usefixtures("registered")
def test_a_rule_may_call_its_module():
    class Curved(nn.Module):
        def forward(self, x):
            return x * x.abs().log1p()

    @register_rule(Curved)
    def curved(module, x):
        return x * (module(x) / x).detach()

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Curved(), nn.Flatten(), nn.Linear(64, 2)).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    with pg.ParchGrad(model, None, balance=True):
        score = model(x)[0, 1]
        assert abs(contributions(model, x, score) - float(score.detach())) < 1e-9


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("spelling", [functional.softmax, torch.softmax, torch.Tensor.softmax])
def test_a_rule_for_a_gate_leaves_it_a_gate(spelling):
    """With a rule for softmax, attention still sends its gradient through the values alone."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts, self.softmax = nn.ModuleList(nn.Conv1d(4, 4, 1) for _ in range(3)), nn.Softmax(-1)

        def forward(self, x):
            query, key, value = (part(x) for part in self.parts)
            return (self.softmax(query.mT @ key) @ value.mT).mean(1)

    model, x = Attention().double().eval(), torch.randn(2, 4, 5, dtype=torch.float64)

    def gradients():
        with pg.ParchGrad(model, None, balance=True):
            weights = [part.weight for part in model.parts]
            return torch.autograd.grad(model(x.requires_grad_())[:, 1].sum(), [x, *weights], allow_unused=True)

    expected = gradients()
    assert expected[1] is expected[2] is None

    @register_rule(spelling)
    def rule(x, *args, **named):
        return x * (torch.softmax(x, *args, **named) / x).detach()

    for found, other in zip(gradients(), expected, strict=True):
        assert (found is None) == (other is None)
        if found is not None:
            torch.testing.assert_close(found, other)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: nn.Softplus(), "softplus"),
        (lambda: nn.Sigmoid(), "sigmoid"),
        (lambda: nn.BatchNorm2d(4, track_running_stats=False), "batch_norm"),
        (lambda: Mapped(lambda x: (x * x + 1).log10()), "log10"),
        (lambda: Mapped(lambda x: nn.LSTM(16, 16)(x.flatten(2))[0].reshape(x.shape)), "(rnn|lstm|sigmoid)"),
        (lambda: Mapped(lambda x: nn.Bilinear(4, 4, 4)(x, 2 * x)), "trilinear"),
        (lambda: nn.ReLU(), None),
        (lambda: nn.MaxPool2d(2, 1, 1), None),
    ],
)
def test_balance_alone_names_what_it_cannot_balance(make, named):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), make(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)).eval()
    found = said(lambda: pg.Explainer(model, None, balance=True).attribute(torch.randn(1, 3, 6, 6), 1))
    assert len(found) == (named is not None)
    assert named is None or re.search(f"not balanced in [a-z_, ]*{named}", found[0])


class Mapped(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(_, x):
        return 2 * x.sin()

    @staticmethod
    def backward(_, gradient):
        return gradient


def test_networks_that_are_linear_in_pieces_have_nothing_to_say():
    silent = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3), nn.Softmax(1)
    )
    assert said(lambda: pg.Explainer(silent.eval()).attribute(torch.randn(1, 3, 6, 6), 1)) == []
    # Once an operation is balanced, those that are not are named, such as this softmax outside of attention.
    silent[1] = nn.GELU().eval()
    (message,) = said(lambda: pg.Explainer(silent).attribute(torch.randn(1, 3, 6, 6), 1))
    assert "not balanced in softmax," in message

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(64, 3))

        def forward(self, x):
            return self.body(Doubled.apply(x))

    (message,) = said(lambda: pg.Explainer(Own().eval()).attribute(torch.randn(1, 3, 6, 6), 1))
    assert "not balanced in Doubled," in message


class Applied(nn.Module):
    """A convolution, GELU and a function, and a score."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), function

    def forward(self, x):
        return self.last(self.function(functional.gelu(self.first(x)).flatten(2).mT).mean(1))


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda x: torch.ops.aten.mul(x, x), "mul"),
        (lambda x: torch.ops.aten.matmul(torch.ops.aten.matmul(x, x.mT), x), "bmm"),
        (lambda x: torch.ops.aten.gelu(x), "gelu"),
        (lambda x: torch.ops.aten.scaled_dot_product_attention(x, x, x), "(softmax|scaled_dot_product)"),
        (lambda x: torch.logsumexp(x, 1, keepdim=True), "logsumexp"),
        (lambda x: x * x, None),
        (lambda x: x / x.norm(), None),
        (lambda x: x * 2 + x.relu() - x.abs(), None),
        (lambda x: x - x.mean(1, keepdim=True), None),
    ],
)
def test_what_no_rule_saw_is_named(function, named):
    model, x = Applied(function).eval(), torch.randn(2, 3, 6, 6)
    found = said(lambda: pg.Explainer(model, None, balance=True).attribute(x, 1))
    assert len(found) == (named is not None)
    assert named is None or re.search(f"not balanced in [a-z_, ]*{named}", found[0])


def test_reentrant_checkpointing_is_named():
    model = Applied(lambda x: checkpoint(lambda y: functional.gelu(y), x, use_reentrant=True)).eval()
    model.first.requires_grad_(False)

    def run():
        x = torch.randn(2, 3, 6, 6, requires_grad=True)
        with pg.ParchGrad(model, None, balance=True):
            model(x)[0, 1].backward()

    assert any("CheckpointFunction" in message for message in said(run))


def test_weights_may_be_replaced_between_blocks():
    model = Applied(lambda x: x).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    block = pg.ParchGrad(model, None, balance=True)
    for _ in range(2):
        with block:
            score = model(x)[0, 1]
            assert abs(contributions(model, x, score) - float(score.detach())) < 1e-9
        model.last, model.first = nn.Linear(4, 5).double().eval(), nn.Conv2d(3, 4, 3).double().eval()


@pytest.mark.usefixtures("registered")
def test_rules_of_functions_hold_for_methods_and_before_gates():
    calls = []

    @register_rule(torch.sin)
    def sine(x):
        calls.append("sin")
        return x * (x.sin() / x).detach()

    @register_rule(functional.relu)
    def rectify(x, inplace=False):
        calls.append("relu")
        return x * (x.relu() / x).detach()

    x = values(2, 3)
    with BackwardRules(balance=True, gates=2.0):
        result = x.sin() + functional.relu(x)
    assert calls == ["sin", "relu"]
    (found,) = torch.autograd.grad(result.sum(), x)
    np.testing.assert_allclose(found, ((x.sin() + x.relu()) / x).detach())


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(4), nn.RMSNorm(4), nn.Sequential(nn.Unflatten(-1, (4, 1)), nn.GroupNorm(2, 4), nn.Flatten())],
    ids=["layer", "rms", "group"],
)
def test_an_empty_batch(norm):
    model = nn.Sequential(nn.Linear(3, 4), norm, nn.GELU(), nn.Linear(4, 2)).eval()
    x = torch.zeros(0, 3, requires_grad=True)
    with pg.ParchGrad(model, None, balance=True):
        assert torch.autograd.grad(model(x).sum(), x)[0].shape == (0, 3)


@given(st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(0, 2**31))
def test_any_small_network_of_balanced_parts_adds_up(depth, width, residual, seed):
    torch.manual_seed(seed)
    kinds = [nn.GELU, nn.SiLU, nn.Hardswish, nn.Mish, nn.ELU, nn.ReLU, lambda: nn.LayerNorm(2 * width), nn.Tanh]

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2 * width, 4 * width)
            self.act = kinds[int(torch.randint(len(kinds), ()))]()

        def forward(self, x):
            inner = self.act(functional.glu(self.linear(x)))
            return x + inner if residual else inner

    model = nn.Sequential(*[Part() for _ in range(depth)], nn.Linear(2 * width, 1)).double().eval()
    x = torch.randn(2, 2 * width, dtype=torch.float64, requires_grad=True)
    with pg.ParchGrad(model, None, balance=True):
        score = model(x)[1, 0]
        assert abs(contributions(model, x, score) - float(score.detach())) < 1e-9 * max(1, abs(float(score.detach())))


def test_second_derivatives_are_refused_and_gradients_are_linear_in_the_seed():
    model = enlivened(timm.create_model("test_vit", num_classes=7, img_size=32)).eval().double()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    with pg.ParchGrad(model, None, balance=True):
        score = model(x)[0, 1]
        with pytest.raises(SettingError, match="create_graph=True"):
            torch.autograd.grad(score, x, create_graph=True)
        one, many = (torch.autograd.grad(factor * model(x)[0, 1], x)[0] for factor in (1, 2.0**-40))
    assert torch.equal(one * 2.0**-40, many)
    assert not torch.allclose(one, input_gradient(model, x))


def test_ranks_follow_what_reshapes_and_shifts():
    rules = Balance(weights=())
    x = values(2, 3, 4)
    for gate in (
        x.softmax(-1).transpose(0, 1).reshape(-1)[None],
        (1 - x.sigmoid()) * 2 + x.softmax(1),
        torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6),
        1 + torch.tanh(x),
        x.softmax(-1) @ torch.ones(4, 4, dtype=torch.float64),
    ):
        assert rules._rank(gate.grad_fn) >= 2
    for other in (x, x + x.sigmoid(), x.clamp(-7, 7), x.sigmoid() @ torch.ones(4, 4, dtype=torch.float64), x.cumsum(0)):
        assert rules._rank(other.grad_fn) == 0
    assert rules._rank(x.relu().unsqueeze(0).grad_fn) == 1
