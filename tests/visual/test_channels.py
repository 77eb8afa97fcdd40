import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils.data import TensorDataset

import parchgrad as pg
from parchgrad.errors import InputError, LayerError, SettingError
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
    with pytest.raises(LayerError, match="third"):
        collect_gaps(network, [images], "third")
    with pytest.raises(InputError, match="no batch at all"):
        collect_gaps(network, [], "second")


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


def test_a_constant_channel_says_nothing():
    figure = gap_histogram(np.ones(8), np.arange(8) < 3)
    assert figure.axes[0].get_title() == "channel: p = 1"


def test_images_that_cannot_be_compared():
    with pytest.raises(InputError, match="do not match"):
        gap_histogram(np.ones(4), np.ones(3, dtype=bool))
    with pytest.raises(InputError, match="do not match"):
        gap_histogram(np.ones(4), np.array([0, 1, 0, 1]))
    with pytest.raises(InputError, match="NaN or infinite"):
        gap_histogram([np.nan, 1, 2, 3], np.array([True, True, False, False]))
    with pytest.raises(InputError, match="1 images of cat and 3 others"):
        gap_histogram(np.ones(4), np.arange(4) < 1, category="cat")


def test_kept_channels_are_those_of_the_selector(network):
    image = torch.randn(1, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = kept_channels(network, pg.GradientEnergy(quantile=0.3), image, [1, 2], layers="all")
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


def test_channels_without_a_gradient_are_not_kept(network):
    network.head.weight.data[:, 3:] = 0
    image = torch.randn(1, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).abs()
    found = kept_channels(network, pg.GradientEnergy(quantile=0.5), image, [1], layers=["second"])
    assert found.count[0, 0] <= 3
    assert found.energy_share[0, 0] == 1
    assert found.overlap is None


def test_the_figure_shows_what_was_found(network):
    image = torch.randn(1, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = kept_channels(
        network, pg.GradientEnergy(quantile=0.3), image, [1, 2], categories=["cat", "dog"], layers="all"
    )
    rows = found.figure().axes
    assert [axes.get_ylabel() for axes in rows] == ["channels kept", "energy kept", "overlap"]
    np.testing.assert_allclose(rows[0].lines[1].get_ydata(), found.count[1] / [12, 20])
    np.testing.assert_allclose(rows[1].lines[0].get_ydata(), found.energy_share[0])
    labels = [text.get_text() for text in found.figure().legends[0].get_texts()]
    assert labels == ["cat", "dog", "kept for both, of those kept for either"]


def test_one_image_and_one_or_two_classes(network):
    image = torch.zeros(2, 3, 9, 9, dtype=torch.float64)
    with pytest.raises(InputError, match="of one image"):
        kept_channels(network, pg.GradientEnergy(), image, [0])
    for targets, names in (([], None), ([0, 1, 2], None), ([0], ["a", "b"])):
        with pytest.raises(SettingError, match="one class or two"):
            kept_channels(network, pg.GradientEnergy(), image[:1], targets, categories=names)
