"""NaN and infinite values are reported with the layer where they began."""

import itertools
import threading
from functools import partial

import pytest
import torch
from torch import nn

import parchgrad as pg
from parchgrad.diagnosis import check_small_weights, find_non_finite
from parchgrad.errors import InputError, NonFiniteError
from tests.conftest import small_network

INPUTS = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
SELECTORS = [None, pg.GradientEnergy(quantile=0.3), pg.Evidence(), pg.GradientTimesActivation(quantile=0.3)]
both = pytest.mark.parametrize("selector", SELECTORS, ids=lambda selector: type(selector).__name__)


class Operation(nn.Module):
    """Applies a function, as a module or before one."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Within(nn.Module):
    """Applies a function to the logits, in its own forward."""

    def __init__(self, function):
        super().__init__()
        self.network, self.function = small_network(), function
        self.last = nn.Linear(5, 5).double()

    def forward(self, x):
        return self.last(self.function(self.network(x)))


class Behind(nn.Module):
    """Applies a function to the logits last of all, and one before, with the network called by keyword."""

    def __init__(self, function, before=lambda x: x):
        super().__init__()
        self.network, self.function, self.before = Named(), function, before

    def forward(self, x):
        return self.function(self.network(x=self.before(x)))


class Named(nn.Sequential):
    def __init__(self):
        super().__init__(*small_network())

    def forward(self, x):
        return super().forward(x)


class Twice(nn.Module):
    """Takes the root of a root, of zeros."""

    def __init__(self):
        super().__init__()
        self.root = Operation(torch.sqrt)

    def forward(self, x):
        # A copy, since a layer behind it may write into it.
        return self.root(self.root(x)).clone()


def network_with(function, at=3):
    model = small_network()
    return nn.Sequential(*model[:at], Operation(function), *model[at:]).eval()


def breaks(model, where, value):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        tensors[where].view(-1)[-1] = value


@both
@pytest.mark.parametrize(
    ("where", "value"),
    [
        *itertools.product(("0.bias", "2.bias", "3.bias", "7.bias"), (torch.nan, torch.inf)),
        *itertools.product(("3.weight", "3.running_var", "3.running_mean"), (torch.nan, torch.inf, -torch.inf)),
    ],
)
def test_broken_biases_scales_and_statistics_are_named_at_once(where, value, selector):
    # Each may silence a channel without a trace.
    model = small_network()
    breaks(model, where, value)
    layer, name = where.split(".")
    with pytest.raises(NonFiniteError, match=f"The {name} of layer '{layer}' holds NaN or infinite"):
        pg.Explainer(model, selector, layers="all")


@both
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["0.weight", "2.weight", "7.weight"])
def test_broken_weights_are_named_in_the_pass(where, value, selector):
    model = small_network()
    breaks(model, where, value)
    explainer = pg.Explainer(model, selector, layers="all")
    kind = "Linear" if where[0] == "7" else "Conv2d"
    with pytest.raises(NonFiniteError, match=rf"which began in the weight of layer '{where[0]}' \({kind}\); load so"):
        explainer.attribute(INPUTS, 4)


def test_a_class_ruled_out_by_its_bias_is_no_fault():
    model, sound = small_network(), small_network()
    model[7].bias.data[2] = -torch.inf
    expected = pg.Explainer(sound, pg.GradientEnergy(), layers="all").attribute(INPUTS, 3)
    torch.testing.assert_close(pg.Explainer(model, pg.GradientEnergy(), layers="all").attribute(INPUTS, 3), expected)


def test_a_class_ruled_out_by_its_bias_is_not_blamed_for_another_fault():
    model = small_network()
    model[7].bias.data[2] = -torch.inf
    model[7].weight.data.fill_(1e308)
    with pytest.raises(NonFiniteError, match=r"in the output of layer '7' \(Linear\), whose input is finite"):
        pg.Explainer(model, None).attribute(INPUTS.abs() * 1e9, 4)
    # Nor is a mask that is a parameter.
    behind = Behind(lambda z: z / 0).eval()
    behind.mask = nn.Parameter(torch.tensor([0.0, -torch.inf]))
    with pytest.raises(NonFiniteError, match=r"in an operation of the model \(Behind\) behind the layers in it; look"):
        pg.Explainer(behind, None).attribute(INPUTS, 4)


def test_what_cannot_be_read_or_is_no_fault_passes():
    check_small_weights(small_network())
    check_small_weights(nn.Sequential(nn.LazyLinear(2)))
    check_small_weights(small_network().to("meta"))
    model = nn.Module()
    model.bias = nn.Parameter(torch.tensor([1.0, 0.0]).to(torch.float8_e4m3fn), requires_grad=False)
    model.weight = nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False)
    # Positions are ruled out by it, and nobody calls it a weight.
    model.mask = nn.Parameter(torch.tensor([0, -torch.inf]), requires_grad=False)
    check_small_weights(model)


@both
def test_weights_broken_later_are_found_in_the_pass(selector):
    model = small_network()
    explainer = pg.Explainer(model, selector, layers="all")
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"which began in the weight of layer '2' \(Conv2d\)"):
        explainer.attribute(INPUTS, 1)
    with pytest.raises(NonFiniteError, match=r"The scores of row 0 of 4 .* layer '2' \(Conv2d\)"):
        explainer.attribute(INPUTS)
    with torch.inference_mode(), pytest.raises(NonFiniteError, match=r"layer '2'"):
        explainer.predict(INPUTS)


@both
@pytest.mark.parametrize(
    ("model", "place"),
    [
        (network_with(lambda x: x / 0), r"in the output of layer '3' \(Operation\), whose input is finite"),
        (Within(lambda x: x / 0), r"before layer 'last' \(Linear\), in an operation that is no module"),
        (network_with(lambda x: x + (x * 0).sqrt()), r"in the gradient, on its way back through layer '3' \(Oper"),
        (Within(lambda x: x + (x * 0).sqrt()), r"in the gradient, behind layer 'network.7' \(Linear\)"),
        (Behind(lambda z: z + torch.inf), r"in an operation of the model \(Behind\) behind the layers in it"),
        (Behind(lambda z: (z - 1e6).log()), r"in an operation of the model \(Behind\) behind the layers in it"),
        (Behind(lambda z: z, lambda x: x / 0), r"before layer 'network' \(Named\), in an operation that is no mod"),
        (network_with(lambda x: x.log() * 0, at=4), r"in the output of layer '4' \(Operation\)"),
        (
            network_with(nn.Sequential(Operation(lambda x: x * 0), Twice()), at=4),
            r"in the gradient, on its way back through layer '4.function.1.root'",
        ),
    ],
    ids=[
        "output",
        "operation",
        "gradient",
        "gradient of an operation",
        "last operation",
        "last logarithm",
        "by keyword",
        "minus infinity",
        "second call",
    ],
)
@pytest.mark.parametrize("method", ["gradient", "smoothgrad"])
def test_the_place_is_named_forward_and_back(model, place, selector, method):
    options = {"samples": 2} if method == "smoothgrad" else {}
    explainer = pg.Explainer(model.eval(), selector, layers="all", method=method, **options)
    with pytest.raises(NonFiniteError, match=rf"row 0 of 4 holds? NaN or infinite values, which began {place}"):
        explainer.attribute(INPUTS, 1)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert sum(hooks) == 0


def test_the_row_that_broke_is_named():
    model = network_with(lambda x: x / (x.flatten(1).sum(1).abs() > 1e-12).reshape(-1, 1, 1, 1), at=0)
    inputs = INPUTS.clone()
    inputs[2] = 0
    with pytest.raises(NonFiniteError, match=r"row 2 of 4 .* layer '0' \(Operation\)"):
        pg.Explainer(model, None).attribute(inputs, 1)


def test_a_score_that_is_not_explained_is_reported_too():
    # The map of class 0 is finite, but what class it is taken for is not to be trusted.
    model = nn.Sequential(small_network(), Operation(lambda z: torch.cat((z[:, :4], z[:, 4:].log()), dim=1))).eval()
    model[0][-1].bias.data[4] = -1e3
    with pytest.raises(NonFiniteError, match=r"The scores of row 0 of 4 .* layer '1' \(Operation\)"):
        pg.Explainer(model, None).attribute(INPUTS, 0)


def test_classes_ruled_out_by_minus_infinity_are_no_fault():
    ruled_out = torch.tensor([0, -torch.inf, 0, 0, 0], dtype=torch.float64)
    model = nn.Sequential(small_network(), Operation(lambda z: z + ruled_out)).eval()
    expected = pg.Explainer(small_network(), pg.GradientEnergy(), layers="all").attribute(INPUTS, 3)
    torch.testing.assert_close(pg.Explainer(model, pg.GradientEnergy(), layers="all").attribute(INPUTS, 3), expected)


@pytest.mark.parametrize("conserve", ["independent", "exact", "none"])
@pytest.mark.parametrize("gamma", [float("inf"), 3.0])
@pytest.mark.parametrize("kept", ["live", "dead", "constant"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_pruning_does_not_hide_a_broken_gradient(value, kept, gamma, conserve):
    # The broken channel is none of the kept ones.
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            broken = gradient.clone()
            broken[:, 5] = value
            if kept != "live":
                broken[:, 0] = 0.0 if kept == "dead" else 1.0
            return broken

    model = network_with(Breaks.apply)
    masks = {"2": torch.arange(6) < 1}
    explainer = pg.Explainer(model, pg.FixedChannels(masks), layers=["2"], gamma=gamma, conserve=conserve)
    with pytest.raises(NonFiniteError, match=r"in the gradient, on its way back through layer '3' \(Operation\)"):
        explainer.attribute(INPUTS, 1)


def test_what_only_the_methods_own_passes_meet_is_said():
    # Finite at the images, but not close to the zero baseline.
    model = network_with(lambda x: x / (x.abs().max() > 0.5), at=0)
    explainer = pg.Explainer(model, None, method="integrated_gradients", internal_batch_size=1)
    with pytest.raises(NonFiniteError, match=r"in the passes of integrated_gradients around the image"):
        explainer.attribute(INPUTS[:1] / INPUTS[0].abs().max(), 1)


def test_the_pass_of_no_single_row_is_said():
    # NaN, by way of a constant, at images of one brightness between the zero baseline and the second row alone.
    def hole(x):
        mean = x.mean((1, 2, 3), keepdim=True)
        return x + torch.where((mean > 2) & (mean < 3), torch.nan, 0.0)

    rows = torch.cat((torch.ones_like(INPUTS[:1]), torch.full_like(INPUTS[:1], 10.0)))
    explainer = pg.Explainer(network_with(hole, at=0), None, method="integrated_gradients")
    with pytest.raises(NonFiniteError, match=r"^The scores of integrated_gradients hold .* around the image, not in"):
        explainer.attribute(rows, 1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_inputs_are_refused_before_any_pass(value):
    inputs = INPUTS.clone()
    inputs[1, 0, 0, 0] = value
    with pytest.raises(InputError, match="The inputs hold NaN or infinite values"):
        pg.Explainer(small_network(), pg.GradientEnergy()).attribute(inputs, 1)


def test_nothing_is_found_in_a_sound_pass():
    model = small_network()
    assert find_non_finite(model, lambda inputs: model(inputs)[:, 1].sum(), INPUTS) is None
    assert find_non_finite(model, lambda inputs: torch.zeros(()), INPUTS) is None


def test_minus_infinity_that_rules_out_is_not_taken_for_the_fault():
    class Softmax(nn.Module):
        def __init__(self):
            super().__init__()
            self.soft, self.bad = nn.Softmax(dim=1), Operation(lambda x: x + (x * 0).sqrt())

        def forward(self, x):
            ruled_out = torch.zeros(x.shape[1], dtype=x.dtype).index_fill(0, torch.tensor(1), -torch.inf)
            return self.soft(self.bad(x) + ruled_out)

    model = nn.Sequential(small_network(), Softmax()).eval()
    with pytest.raises(NonFiniteError, match=r"in the gradient, on its way back through layer '1.bad'"):
        pg.Explainer(model, None).attribute(INPUTS, 0)


def test_the_row_is_the_one_that_broke_not_one_whose_class_is_ruled_out():
    class Rows(nn.Module):
        def forward(self, z):
            # The row is told by what is in it.
            is_third = (z.flatten(1).sum(1) - sums[2]).abs() < 1e-9
            values = torch.where(is_third, torch.nan, 0.0).unsqueeze(1) * torch.eye(5, dtype=z.dtype)[4]
            values = torch.where(values.isnan() & (torch.eye(5)[4] == 0), 0.0, values)
            return z + values + torch.tensor([-torch.inf, 0, 0, 0, 0], dtype=z.dtype)

    network = small_network()
    sums = network(INPUTS).flatten(1).sum(1).detach()
    model = nn.Sequential(network, Rows()).eval()
    with pytest.raises(NonFiniteError, match=r"The scores of row 2 of 4 .* layer '1'"):
        pg.Explainer(model, None).attribute(INPUTS, 1)


def test_a_function_of_the_user_is_diagnosed_with_the_rows_that_it_knows():
    masks = torch.rand(4, 5, dtype=torch.float64)
    model = network_with(lambda x: x / 0)
    with pytest.raises(NonFiniteError, match=r"layer '3' \(Operation\)"):
        pg.Explainer(model, None).attribute(INPUTS, lambda logits: (logits * masks).sum(1))


def test_a_score_that_breaks_behind_the_output_is_told_from_it():
    with pytest.raises(NonFiniteError, match="in the score that is made of the output, which is finite; "):
        pg.Explainer(small_network(), None).attribute(INPUTS, lambda logits: logits[:, 1] / 0)


def test_weights_of_a_layer_with_layers_in_it_are_named():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.attention = nn.Conv1d(3, 4, 1), nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            x = self.convolution(x.flatten(2)).mT
            return self.attention(x, x, x, need_weights=False)[0].mean(1)

    model = Attends().double().eval()
    model.attention.in_proj_weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"the in_proj_weight of layer 'attention' \(MultiheadAttention\)"):
        pg.Explainer(model, None).attribute(INPUTS, 0)


def test_a_weight_is_named_though_minus_infinity_came_in_beside_it():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(3, 1, batch_first=True)

        def forward(self, x):
            x = x.flatten(2).mT
            later = torch.full((64, 64), -torch.inf, dtype=x.dtype).triu(1)
            return self.attention(x, x, x, attn_mask=later, need_weights=False)[0].mean(1)

    model = Masked().double().eval()
    assert pg.Explainer(model, None).attribute(INPUTS, 0).isfinite().all()
    model.attention.in_proj_weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"the in_proj_weight of layer 'attention'"):
        pg.Explainer(model, None).attribute(INPUTS, 0)
    # Too large weights, and not the mask: either may be what made NaN.
    model.attention.in_proj_weight.data[:] = 1e200
    behind = (
        r"behind the layers in it, perhaps by minus infinity that came up before layer 'attention' .*; look at both"
    )
    with pytest.raises(
        NonFiniteError, match=rf"began in an operation of layer 'attention' \(MultiheadAttention\) {behind}"
    ):
        pg.Explainer(model, None).attribute(INPUTS, 0)


def test_minus_infinity_that_was_left_behind_is_not_named():
    rules_out = Operation(lambda z: torch.where(torch.arange(5) == 2, -torch.inf, z))
    model = nn.Sequential(small_network(), rules_out, nn.Softmax(1), Operation(lambda z: z / 0)).eval()
    with pytest.raises(
        NonFiniteError, match=r"began in the output of layer '3' \(Operation\), whose input is finite; run"
    ):
        pg.Explainer(model, None).attribute(INPUTS, 0)


def test_minus_infinity_in_a_weight_is_named_as_what_nan_may_come_of():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), Operation(lambda z: z - z)).double().eval()
    model[1].weight.data[0] = -torch.inf
    came_up = r"perhaps by minus infinity that came up in the weight of layer '1' \(Linear\); look at both"
    with pytest.raises(NonFiniteError, match=rf"began in the output of layer '2' \(Operation\), {came_up}"):
        pg.Explainer(model, None).attribute(INPUTS.abs() + 1, 0)


def test_minus_infinity_of_which_nan_comes_is_named_with_it():
    model = network_with(lambda x: (x * 0).abs().log(), at=2)
    came_up = (
        r"perhaps by minus infinity that came up in the output of layer '2' \(Operation\), whose input is finite; look"
    )
    with pytest.raises(NonFiniteError, match=rf"began in the output of layer '3' \(Conv2d\), {came_up}"):
        pg.Explainer(model, None).attribute(INPUTS, 0)


def test_of_a_weight_that_is_computed_its_origin_is_named():
    model = small_network()
    nn.utils.parametrizations.weight_norm(model[2]).eval()
    model[2].parametrizations.weight.original1.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"in the original1 of layer '2.parametrizations.weight'"):
        pg.Explainer(model, None).attribute(INPUTS, 1)
    # They are handed to a module, which is watched; of that nothing stays.
    assert not any(weight._backward_hooks for weight in model.parameters())


# torch announces that it will do without scripts.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_what_is_scripted_takes_no_hooks_and_is_left_out():
    model = nn.Sequential(small_network(), torch.jit.script(nn.Linear(5, 5).double().eval())).eval()
    model[1].weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"in an operation of the model \(Sequential\) behind the layers in it"):
        pg.Explainer(model, None).attribute(INPUTS, 0)


def test_a_diagnosis_sees_no_backward_pass_but_its_own():
    # A learned token is a weight that is handed to a module: gradients of every pass go by it.
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.mix = nn.Parameter(torch.ones(1, 3, 8, 8)), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return x + self.mix(self.token)

    torch.manual_seed(2)
    model = nn.Sequential(Token(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)).eval()

    def score(meanwhile, inputs):
        output = model(inputs)
        meanwhile()
        # The square root's slope is infinite, the score is not.
        return (output - output.detach()).sqrt().sum()

    def serve():
        model(INPUTS[:1].float()).sum().mul(torch.inf).backward()

    def serve_in_a_thread():
        thread = threading.Thread(target=serve)
        thread.start()
        thread.join()

    inputs = INPUTS[:1].float()
    alone = find_non_finite(model, partial(score, lambda: None), inputs)
    assert "behind layer '3'" in alone[0]
    assert find_non_finite(model, partial(score, serve_in_a_thread), inputs) == alone


def test_a_diagnosis_sees_no_pass_but_its_own():
    # Another thread's pass through the same modules is sound, and one within vmap may not be asked about numbers.
    model = nn.Sequential(
        Operation(lambda x: x / (x.flatten(1).sum(1) != 0).reshape(-1, 1, 1, 1)),
        *small_network(),
        Operation(lambda z: z / (z.abs().amax(1, keepdim=True) < 1e3)),
    ).eval()
    sound, black, bright = INPUTS[:2], torch.zeros_like(INPUTS[:1]), INPUTS[:1] * 1e9
    alone = {}
    for name, inputs in (("black", black), ("bright", bright)):
        with pytest.raises(NonFiniteError) as caught:
            pg.Explainer(model, None).attribute(inputs, 1)
        alone[name] = str(caught.value)
    assert alone["black"] != alone["bright"]
    found, failures, stop = {"black": set(), "bright": set()}, [], threading.Event()

    def diagnose(name, inputs):
        for _ in range(40):
            try:
                pg.Explainer(model, None).attribute(inputs, 1)
            except NonFiniteError as error:
                found[name].add(str(error))

    def serve():
        while not stop.is_set():
            try:
                torch.vmap(lambda x: model[1:](x.unsqueeze(0))[0])(sound)
            except Exception as error:
                failures.append(repr(error))
                return

    server = threading.Thread(target=serve)
    others = [
        threading.Thread(target=diagnose, args=("black", black)),
        threading.Thread(target=diagnose, args=("bright", bright)),
    ]
    server.start()
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    stop.set()
    server.join()
    assert failures == []
    assert found == {name: {message} for name, message in alone.items()}
