from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import parchgrad as pg
from parchgrad.errors import InputError, LayerError, ModelError, SettingError, StatisticsError
from parchgrad.explain.recording import record_selections
from parchgrad.statistics.collect import collect_gaps
from parchgrad.visual.channels import gap_histogram, kept_channels


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 20, 3)
        self.head = nn.Linear(20, 4)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 3

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu().mean(dim=(2, 3)))


@pytest.fixture
def network():
    return Network().double().eval()


def test_gaps_are_means_of_rectified_outputs(network):
    images = torch.randn(7, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = collect_gaps(network, torch.split(images, 3), "second")
    with torch.no_grad():
        expected = network.second(network.first(images).relu()).relu().mean(dim=(2, 3))
    torch.testing.assert_close(found, expected)
    assert not network.second._forward_hooks
    # Batches with labels are those of a data set's loader; numbers go to the type of the model.
    pairs = DataLoader(TensorDataset(images.half(), torch.zeros(7, dtype=torch.long)), batch_size=3)
    torch.testing.assert_close(collect_gaps(network, pairs, "second"), expected, atol=2e-3, rtol=2e-3)
    assert collect_gaps(network.float(), [images], "second").dtype == torch.float32


def test_batches_go_to_the_device_of_the_model(network):
    # Where there is one device alone, moving shows in what the model is given.
    given = []

    class Elsewhere(torch.Tensor):
        def to(self, target, **options):
            given.append(target)
            return torch.Tensor.to(self.as_subclass(torch.Tensor), target, **options)

    collect_gaps(network, [torch.zeros(2, 3, 9, 9).as_subclass(Elsewhere)], "second")
    assert given[0] is network.first.weight


def test_gaps_of_what_they_cannot_be_collected_of(network):
    images = torch.randn(7, 3, 9, 9, dtype=torch.float64)
    for wrong, near in (("third", "first"), ("*", "first, second"), ("secon?", "second"), (None, "")):
        with pytest.raises(LayerError, match=rf"must be the full name of one of the 2 convolutions.*{near}"):
            collect_gaps(network, [images], wrong)
    with pytest.raises(InputError, match=r"batches. is empty"):
        collect_gaps(network, [], "second")
    for wrong in (images, TensorDataset(images), 3):
        with pytest.raises(InputError, match="Pass a DataLoader or a list of tensors"):
            collect_gaps(network, wrong, "second")
    with pytest.raises(InputError, match=r"torch\.uint8"):
        collect_gaps(network, [images.byte()], "second")
    for wrong in (["a"], [()]):
        with pytest.raises(StatisticsError, match="must be tensors"):
            collect_gaps(network, wrong, "second")
    with pytest.raises(ModelError, match=r"torch\.nn\.Module is needed"):
        collect_gaps("network", [images], "second")
    with pytest.raises(ModelError, match="in training mode"):
        collect_gaps(Network().double(), [images], "second")
    assert not network.second._forward_hooks


def test_the_p_value_is_the_one_of_the_statistics(network):
    images = torch.randn(60, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(60) % 4
    held = pg.collect_statistics(network, TensorDataset(images, labels), layers=["second"])
    gaps = collect_gaps(network, torch.split(images, 16), "second").numpy()
    for channel, label in ((0, 0), (5, 3)):
        figure = gap_histogram(gaps[:, channel], (labels == label).numpy(), channel=f"channel {channel}")
        p = held["second"].class_log_p("welch")[channel, label].exp().item()
        inside, rest = gaps[labels == label, channel], gaps[labels != label, channel]
        assert stats.ttest_ind(inside, rest, equal_var=False, alternative="greater").pvalue == pytest.approx(p)
        assert figure.axes[0].get_title() == f"channel {channel}: p = {p:.2g}"
        means = [line.get_xdata()[0] for line in figure.axes[0].lines]
        np.testing.assert_allclose(means, [inside.mean(), rest.mean()])


@pytest.mark.parametrize("value", [1.0, 0.1, 0.0, 1e-30])
def test_a_constant_channel_says_nothing(value):
    figure = gap_histogram(np.full(8, value), np.arange(8) < 3)
    assert figure.axes[0].get_title() == "channel: p = 1"


def test_sides_that_do_not_vary_are_told_apart_as_the_statistics_do():
    inside = np.arange(6) < 3
    for high, low in ((1.0, 0.0), (0.3, 0.1)):
        figure = gap_histogram(np.where(inside, high, low), inside)
        assert figure.axes[0].get_title() == "channel: p < 1e-300, neither side varies"
        figure = gap_histogram(np.where(inside, low, high), inside)
        assert figure.axes[0].get_title() == "channel: p = 1"


def log_tail(density, t):
    """Natural log of the integral of a density from t on, by its ratio to the density at t."""
    start = density.logpdf(t)
    integral = integrate.quad(lambda u: np.exp(density.logpdf(t + u) - start), 0, 20, points=[0.1, 1], limit=200)[0]
    return start + np.log(integral)


def test_p_values_below_the_smallest_float_are_written_out():
    half = 600
    noise = np.tile([-1.0, 1.0], half // 2)
    # Groups of one size and variance have 2 (n - 1) degrees of freedom.
    density = stats.t(2 * (half - 1))
    for difference in (0.1, 2.0, 5.0, 6.0):
        figure = gap_histogram(np.concatenate([noise + difference, noise]), np.arange(2 * half) < half)
        t = difference / np.sqrt(2 / half * noise.var(ddof=1))
        expected = log_tail(density, t) / np.log(10)
        mantissa, _, exponent = figure.axes[0].get_title().split("p = ")[1].partition("e")
        assert np.log10(float(mantissa)) + int(exponent or 0) == pytest.approx(expected, abs=0.03)
    assert expected < -400


def test_gaps_may_be_tensors_of_any_kind():
    values = torch.tensor([3.0, 4.0, 5.5, 1.0, 0.0, 2.0])
    inside = torch.arange(6) < 3
    expected = stats.ttest_ind(values[:3].numpy(), values[3:].numpy(), equal_var=False, alternative="greater").pvalue
    for gaps in (values, values.clone().requires_grad_(), values.bfloat16(), values.tolist()):
        for chosen in (inside, inside.numpy(), inside.tolist()):
            assert gap_histogram(gaps, chosen).axes[0].get_title() == f"channel: p = {expected:.2g}"


def test_images_that_cannot_be_compared():
    with pytest.raises(InputError, match=r"`gaps` has shape .* `in_class` has shape"):
        gap_histogram(np.ones(4), np.ones(3, dtype=bool))
    with pytest.raises(InputError, match=r"`gaps` has shape .* `in_class` has shape"):
        gap_histogram(np.ones(4), np.array([0, 1, 0, 1]))
    for wrong in (["a", "b", "c", "d"], [[1.0], [1.0, 2.0]], np.ones(4) * 1j):
        with pytest.raises(InputError, match="`gaps`"):
            gap_histogram(wrong, np.arange(4) < 2)
    with pytest.raises(InputError, match="NaN or infinite"):
        gap_histogram([np.nan, 1, 2, 3], np.array([True, True, False, False]))
    with pytest.raises(InputError, match=r"1 images of cat .* 3"):
        gap_histogram(np.ones(4), np.arange(4) < 1, category="cat")


def test_kept_channels_are_those_of_the_selector(network):
    image = torch.randn(1, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    hard = pg.Edit(selector=pg.GradientEnergy(quantile=0.3, softness=0), layers="all")
    found = kept_channels(network, image, [1, 2], hard)
    assert found.layers == ("first", "second")
    assert found.channels.tolist() == [12, 20]
    masks = []
    for row, target in enumerate((1, 2)):
        # By hand: the gradient at the last layer, its best channels, the edit, and so on downwards.
        x = image.clone().requires_grad_()
        low = network.first(x)
        high = network.second(low.relu())
        score = network.head(high.relu().mean(dim=(2, 3)))[0, target]
        upper = torch.autograd.grad(score, high, retain_graph=True)[0]
        energy = upper[0].square().sum(dim=(1, 2))
        best = energy.topk(6).indices
        mask = torch.zeros(20, dtype=torch.bool)
        mask[best] = True
        assert found.count[row, 1] == int((mask & (energy > 0)).sum())
        assert found.energy_share[row, 1] == pytest.approx(float(energy[mask].sum() / energy.sum()))
        edited = pg.partition_gradient(upper, mask.unsqueeze(0))
        lower = torch.autograd.grad(high, low, edited)[0][0].square().sum(dim=(1, 2))
        kept = torch.zeros(12, dtype=torch.bool)
        kept[lower.topk(3).indices] = True
        assert found.energy_share[row, 0] == pytest.approx(float(lower[kept].sum() / lower.sum()))
        masks.append(((kept & (lower > 0)), mask & (energy > 0)))
    for layer in (0, 1):
        first, second = masks[0][layer], masks[1][layer]
        assert found.overlap[layer] == pytest.approx(float((first & second).sum() / (first | second).sum()))


def test_soft_weights_reach_below_the_threshold(network):
    image = torch.randn(1, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    edit = pg.Edit(selector=pg.GradientEnergy(quantile=0.3, softness=0.5), layers=["second"], gates=0, antialias=False)
    found = kept_channels(network, image, [1], edit)
    x = image.clone()
    high = network.second(network.first(x).relu())
    score = network.head(high.relu().mean(dim=(2, 3)))[0, 1]
    norms = torch.autograd.grad(score, high)[0][0].square().sum(dim=(1, 2)).sqrt()
    # k = 6 of 20; the ramp starts at half of the threshold.
    kept = norms > 0.5 * norms.topk(6).values[-1]
    assert found.count.tolist() == [[int(kept.sum())]]
    assert int(kept.sum()) > 6
    energy = norms.square()
    assert found.energy_share[0, 0] == pytest.approx(float(energy[kept].sum() / energy.sum()))


def test_channels_without_a_gradient_are_not_kept(network):
    network.head.weight.data[:, 3:] = 0
    image = torch.randn(1, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).abs()
    edit = pg.Edit(selector=pg.GradientEnergy(quantile=0.5, softness=0), layers=["second"])
    found = kept_channels(network, image, [1], edit)
    assert found.count[0, 0] <= 3
    assert found.energy_share[0, 0] == 1
    assert found.overlap is None


class Silent(pg.GradientEnergy):
    """Selects nothing for one class in the last layer."""

    needs_class = True

    def select(self, signal):
        mask = super().select(signal)
        return mask & (signal.classes != 2).unsqueeze(1) if signal.layer == "second" else mask


def test_layers_where_nothing_is_selected_are_left_as_they_are(network):
    network.head.weight.data[:, 15:] = 0
    image = torch.randn(1, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).abs()
    silent = pg.Edit(selector=Silent(quantile=0.3, softness=0), layers="all")
    found = kept_channels(network, image, [1, 2], silent, categories=["cat", "dog"])
    assert found.untouched.tolist() == [[False, False], [False, True]]
    usual = kept_channels(network, image, [1, 2], replace(silent, selector=pg.GradientEnergy(quantile=0.3, softness=0)))
    assert found.count[0].tolist() == usual.count[0].tolist()
    # All that has a gradient passes: channels whose weight is not zero, and that are not cut off by a relu.
    with torch.no_grad():
        alive = (network.second(network.first(image).relu())[0] > 0).any(dim=(1, 2)) & (torch.arange(20) < 15)
    assert found.count[1, 1] == int(alive.sum())
    assert found.energy_share[1, 1] == 1
    assert found.energy_share[0].tolist() == usual.energy_share[0].tolist()
    assert np.isnan(found.overlap).tolist() == [False, True]
    rows = found.figure().axes
    for axes in rows[:2]:
        _, filled, hollow = axes.lines
        assert np.isnan(filled.get_ydata()).tolist() == [False, True]
        assert (hollow.get_xdata().tolist(), hollow.get_ydata().tolist()) == ([2], [1])
        assert hollow.get_markerfacecolor() == "none"
    labels = [text.get_text() for text in found.figure().legends[0].get_texts()]
    assert labels == ["cat", "dog", "dog: layer left as it is", "weight > 0 for both, of those for either"]
    (single,) = record_selections(network, replace(silent, layers=["second"]), image.expand(2, 3, 9, 9), [1, 2])
    assert single.untouched.tolist() == [False, True]


def test_the_figure_shows_what_was_found(network):
    image = torch.randn(1, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    edit = pg.Edit(selector=pg.GradientEnergy(quantile=0.3), layers="all")
    found = kept_channels(network, image, [1, 2], edit, categories=["cat", "dog"])
    rows = found.figure().axes
    titles = ["channels with\nweight > 0", "share of energy\nin these", "overlap"]
    assert [axes.get_ylabel() for axes in rows] == titles
    np.testing.assert_allclose(rows[0].lines[1].get_ydata(), found.count[1] / [12, 20])
    np.testing.assert_allclose(rows[1].lines[0].get_ydata(), found.energy_share[0])
    labels = [text.get_text() for text in found.figure().legends[0].get_texts()]
    assert labels == ["cat", "dog", "weight > 0 for both, of those for either"]
    # Where both classes have equal shares, both are seen, and neighbouring layers are of other kinds.
    first, second = rows[0].lines
    assert first.get_markersize() > second.get_markersize() + 2
    assert {line.get_linestyle() for line in rows[1].lines} == {"None"}


def test_one_image_and_one_or_two_classes(network):
    image = torch.zeros(2, 3, 9, 9, dtype=torch.float64)
    with pytest.raises(InputError, match=r"`inputs` has shape \(2, 3, 9, 9\)"):
        kept_channels(network, image, [0])
    for targets, names in (([], None), ([0, 1, 2], None), ([0], ["a", "b"])):
        with pytest.raises(SettingError, match="`targets` has"):
            kept_channels(network, image[:1], targets, categories=names)
    with pytest.raises(SettingError, match="Both `targets` are 1"):
        kept_channels(network, image[:1], [1, 1])
    with pytest.raises(SettingError, match="`edit` has no selector"):
        kept_channels(network, image[:1], [1], pg.Edit(selector=None))
    with pytest.raises(SettingError, match="`edit` is of type GradientEnergy"):
        kept_channels(network, image[:1], [1], pg.GradientEnergy())
