import math

import numpy as np
import pytest
import torch

from parchgrad.models.shapes_network import ShapesNetwork


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return ShapesNetwork(5).double().eval()


def test_the_odds_of_a_picture_are_the_sum_of_the_odds_at_all_places(network):
    inputs = torch.randn(2, 3, 64, 80, dtype=torch.float64)
    with torch.no_grad():
        features, logits = network.features(inputs), network(inputs)
    weights, bias = network.classifier.weight.tolist(), network.classifier.bias.tolist()
    assert features.shape == (2, 96, 8, 10)
    for row in range(2):
        places = features[row].flatten(1).T.tolist()
        for index in range(5):
            odds = [math.exp(np.dot(weights[index], place) + bias[index]) for place in places]
            assert logits[row, index].item() == pytest.approx(math.log(sum(odds)), abs=1e-9)


def test_a_place_sees_the_66_pixels_around_it(network):
    inputs = torch.randn(1, 3, 160, 160, dtype=torch.float64, requires_grad=True)
    # Column 10 of the grid stands for the pixels from 80 to 87.
    network.features(inputs)[0, :, 10, 10].sum().backward()
    rows, columns = inputs.grad[0].abs().sum(dim=0).nonzero(as_tuple=True)
    seen = [rows.min().item(), rows.max().item(), columns.min().item(), columns.max().item()]
    # Pooling passes on one pixel of four, so that the outermost may be missed.
    assert seen == pytest.approx([80 - 29, 87 + 29, 80 - 29, 87 + 29], abs=4)
    assert min(seen) >= 80 - 29
    assert max(seen) <= 87 + 29
