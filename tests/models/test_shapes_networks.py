import math
import re

import numpy as np
import pytest
import torch

from parchgrad.models.shapes_networks import (
    ShapesConvNeXt,
    ShapesMobileNet,
    ShapesNetwork,
    ShapesTransformer,
)


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


def test_the_transformer_attends_as_written_out():
    torch.manual_seed(0)
    attention = ShapesTransformer(5).double().blocks[0].attn
    tokens = torch.randn(2, 65, 96, dtype=torch.float64)
    with torch.no_grad():
        found, packed = attention(tokens), attention.qkv(tokens)
        heads = []
        for start in range(0, 96, 24):
            query, key, value = (packed[:, :, part + start : part + start + 24] for part in (0, 96, 192))
            heads.append((query @ key.mT / math.sqrt(24)).softmax(dim=2) @ value)
        torch.testing.assert_close(found, attention.proj(torch.cat(heads, dim=2)))


def test_the_transformer_classifies_by_the_class_token():
    torch.manual_seed(0)
    network = ShapesTransformer(5).eval()
    seen = []
    network.norm.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs))
    with torch.no_grad():
        logits = network(torch.randn(2, 3, 64, 64))
        assert seen[0].shape == (2, network.num_prefix_tokens + 64, 96)
        assert torch.equal(logits, network.head(network.fc_norm(seen[0][:, 0])))


@pytest.mark.parametrize("kind", [ShapesConvNeXt, ShapesMobileNet])
def test_the_convolutional_networks_take_larger_images(kind):
    assert kind(5).eval()(torch.zeros(2, 3, 96, 80)).shape == (2, 5)


def test_parameters_are_named_as_in_timm():
    timm = pytest.importorskip("timm")
    pairs = [
        (ShapesTransformer, "vit_tiny_patch16_224", ("patch_embed.stem.", "fc_norm.")),
        (ShapesConvNeXt, "convnext_atto", ("stem.", "norm.", "fc_norm.", "head.")),
    ]
    for kind, name, own in pairs:
        theirs, ours = (
            {re.sub(r"\d+", "0", key) for key in model.state_dict() if not key.startswith(own)}
            for model in (timm.create_model(name), kind(5))
        )
        assert ours <= theirs
        assert any(key.startswith(("blocks.0.attn.qkv", "stages.0.blocks.0.conv_dw")) for key in ours)
