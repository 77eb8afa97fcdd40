"""NaN and infinite values are reported with the layer where they began."""

import pytest
import torch
from torch import nn

import parchgrad as pg
from parchgrad.diagnosis import check_weights, find_non_finite
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


def network_with(function, at=3):
    model = small_network()
    return nn.Sequential(*model[:at], Operation(function), *model[at:]).eval()


@both
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["0.weight", "2.bias", "3.running_var", "3.running_mean", "7.bias"])
def test_broken_weights_are_named(where, value, selector):
    model = small_network()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        tensors[where].view(-1)[-1] = value
    layer, name = where.split(".")
    with pytest.raises(NonFiniteError, match=f"The {name} of layer '{layer}' holds NaN or infinite"):
        pg.Explainer(model, selector, layers="all")


def test_sound_and_lazy_weights_pass():
    check_weights(small_network())
    check_weights(nn.Sequential(nn.LazyLinear(2)))


@both
def test_weights_broken_later_are_found_in_the_pass(selector):
    model = small_network()
    explainer = pg.Explainer(model, selector, layers="all")
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"which began in the output of layer '2' \(Conv2d\), whose input is fin"):
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
    ],
    ids=["output", "operation", "gradient", "gradient of an operation"],
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
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_pruning_does_not_hide_a_broken_gradient(value, gamma, conserve):
    # The broken channel is none of the kept ones.
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            broken = gradient.clone()
            broken[:, 5] = value
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
