"""NaN and infinite values are reported with the layer where they began."""

import threading

import pytest
import torch
from torch import nn

import parchgrad as pg
from parchgrad.errors import InputError, NonFiniteError
from parchgrad.explain.nonfinite import find_non_finite
from tests.support import small_network

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
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["0.weight", "2.weight", "7.weight", "2.bias", "3.weight"])
def test_broken_weights_are_named_in_the_pass(where, value, selector):
    model = small_network()
    breaks(model, where, value)
    explainer = pg.Explainer(model, selector, layers="all")
    layer, name = where.split(".")
    with pytest.raises(NonFiniteError, match=rf"which began in the {name} of layer '{layer}'"):
        explainer.attribute(INPUTS, 4)


def test_a_class_ruled_out_by_its_bias_is_no_fault():
    model, sound = small_network(), small_network()
    model[7].bias.data[2] = -torch.inf
    expected = pg.Explainer(sound, pg.GradientEnergy(), layers="all").attribute(INPUTS, 3)
    torch.testing.assert_close(pg.Explainer(model, pg.GradientEnergy(), layers="all").attribute(INPUTS, 3), expected)


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
        (network_with(lambda x: x / 0), r"in the output of layer '3' \(Operation\)"),
        (Within(lambda x: x / 0), r"before layer 'last' \(Linear\), in an operation that is not a module"),
        (network_with(lambda x: x + (x * 0).sqrt()), r"in the gradient, on its way back through layer '3' \(Oper"),
        (Within(lambda x: x + (x * 0).sqrt()), r"in the gradient of an operation after layer 'network.7' \(Linear\)"),
        (Behind(lambda z: z + torch.inf), r"in an operation of the model \(Behind\) after its layers"),
        (Behind(lambda z: (z - 1e6).log()), r"in an operation of the model \(Behind\) after its layers"),
        (Behind(lambda z: z, lambda x: x / 0), r"before layer 'network' \(Named\), in an operation that is not a mod"),
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
    with pytest.raises(NonFiniteError, match=rf"row 0 of 4 contains? NaN or infinite values, which began {place}"):
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
    with pytest.raises(NonFiniteError, match="in the passes of integrated_gradients"):
        explainer.attribute(INPUTS[:1] / INPUTS[0].abs().max(), 1)


def test_the_pass_of_no_single_row_is_said():
    # NaN, by way of a constant, at images of one brightness between the zero baseline and the second row alone.
    def hole(x):
        mean = x.mean((1, 2, 3), keepdim=True)
        return x + torch.where((mean > 2) & (mean < 3), torch.nan, 0.0)

    rows = torch.cat((torch.ones_like(INPUTS[:1]), torch.full_like(INPUTS[:1], 10.0)))
    explainer = pg.Explainer(network_with(hole, at=0), None, method="integrated_gradients")
    with pytest.raises(NonFiniteError, match=r"^The scores of integrated_gradients .* in the passes of"):
        explainer.attribute(rows, 1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_inputs_are_refused_before_any_pass(value):
    inputs = INPUTS.clone()
    inputs[1, 0, 0, 0] = value
    with pytest.raises(InputError, match="`inputs` contains NaN or infinite values"):
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
    with pytest.raises(NonFiniteError, match="in the score, which is computed from a finite output"):
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
    with pytest.raises(NonFiniteError, match=r"in an operation of the model \(Sequential\) after its layers"):
        pg.Explainer(model, None).attribute(INPUTS, 0)


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
