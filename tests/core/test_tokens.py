"""Linear layers of tokens as layers, beside an edit of the reference in a hook."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

import parchgrad as pg
from parchgrad.core.tokens import TokenView, token_view
from parchgrad.errors import InputError, LayerError, ModelWarning
from tests import reference
from tests.support import enlivened, input_gradient, nothing_is_left, random_statistics

TRUE = {"gates": 0, "antialias": False, "balance": False}


def reference_edit(gradient, prefix, rows, choose):
    """Edit tokens (R, ..., C) by the equations: scores, norms and places of the image's tokens alone."""
    flat = gradient.reshape(rows, -1, gradient.shape[-1])
    found = flat.clone()
    for row in range(rows):
        patches = flat[row, prefix:].T.numpy()
        if not patches.any():
            continue
        weights, places = choose(patches, row)
        edited = reference.edit(patches[None], np.array([weights]), places=None if places is None else places[None])[0]
        weighted = patches if places is None else patches * places
        # The factor of a channel is the same everywhere.
        scales = (edited * weighted).sum(1) / np.maximum((weighted**2).sum(1), 1e-300)
        found[row, prefix:] = torch.from_numpy(edited.T)
        found[row, :prefix] = flat[row, :prefix] * torch.from_numpy(scales)
    return found.reshape(gradient.shape)


def loudest(quantile, softness):
    """The weights of GradientEnergy, by the reference."""

    def choose(patches, row):
        norms = np.linalg.norm(patches, axis=1).tolist()
        return reference.soft_weights(norms, reference.kth_largest(norms, quantile), softness), None

    return choose


def edited_by_hook(model, name, prefix, rows, choose):
    class Edit(torch.autograd.Function):
        @staticmethod
        def forward(_, output):
            return output.clone()

        @staticmethod
        def backward(_, gradient):
            return reference_edit(gradient, prefix, rows, choose)

    return dict(model.named_modules())[name].register_forward_hook(lambda module, inputs, output: Edit.apply(output))


@pytest.mark.parametrize(
    ("name", "layer", "prefix", "size"),
    [
        ("test_vit", "blocks.0.attn.qkv", 1, 32),
        ("test_vit", "blocks.2.mlp.fc1", 1, 32),
        ("test_vit", "blocks.5.attn.qkv", 1, 32),
        # Register tokens, and no class token.
        ("test_vit3", "blocks.1.attn.qkv", 1, 32),
        ("test_vit4", "blocks.1.mlp.fc2", 1, 32),
        ("test_convnext", "stages.1.blocks.0.mlp.fc1", 0, 64),
    ],
)
def test_token_layers_are_edited_as_the_equations_say(name, layer, prefix, size):
    if name not in timm.list_models():
        pytest.skip("this release of timm does not have the network")
    settings = {"img_size": size} if "vit" in name else {}
    model = enlivened(timm.create_model(name, num_classes=5, **settings)).eval().double()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    explainer = pg.Explainer(model, pg.GradientEnergy(quantile=0.3), layers=[layer], **TRUE)
    found = explainer.attribute(x, 1)
    assert explainer.edited_layers == (layer,)
    handle = edited_by_hook(model, layer, prefix, 2, loudest(0.3, 0.5))
    expected = input_gradient(model, x, 1)
    handle.remove()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
    assert not torch.allclose(found, input_gradient(model, x, 1), rtol=1e-6, atol=0)
    assert nothing_is_left(model)


def test_windows_belong_to_the_row_that_they_cut():
    model = enlivened(
        timm.create_model(
            "swin_tiny_patch4_window7_224", num_classes=5, img_size=56, embed_dim=24, depths=(2, 1), num_heads=(2, 4)
        )
    )
    model = model.eval().double()
    x = torch.randn(2, 3, 56, 56, dtype=torch.float64)
    for layer in ("layers.0.blocks.1.attn.qkv", "layers.0.blocks.0.mlp.fc1"):
        found = pg.Explainer(model, pg.GradientEnergy(quantile=0.3), layers=[layer], **TRUE).attribute(x, 1)
        handle = edited_by_hook(model, layer, 0, 2, loudest(0.3, 0.5))
        expected = input_gradient(model, x, 1)
        handle.remove()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


def test_evidence_of_tokens_leaves_out_the_class_token():
    model = enlivened(timm.create_model("test_vit", num_classes=5, img_size=64)).eval().double()
    x, seen = torch.randn(2, 3, 64, 64, dtype=torch.float64), []
    handle = model.blocks[0].attn.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    selector = pg.Evidence(quantile=0.3, positions=0.5)
    found = pg.Explainer(model, selector, layers="blocks.0.attn.qkv", **TRUE).attribute(x, 1)
    handle.remove()
    patches = seen[0][:, 1:].mT.numpy()

    def choose(gradient, row):
        evidence, scores = reference.evidence(gradient.tolist(), patches[row].tolist())
        places = np.array(reference.place_weights(evidence, 0.5, 1.0))
        return reference.soft_weights(scores, reference.kth_largest(scores, 0.3), 1.0), places

    handle = edited_by_hook(model, "blocks.0.attn.qkv", 1, 2, choose)
    expected = input_gradient(model, x, 1)
    handle.remove()
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)


def test_values_of_the_first_block_under_balance():
    """Queries and keys get no gradient, so the channels that are kept are values."""
    model = enlivened(timm.create_model("test_vit", num_classes=5, img_size=32)).eval().double()
    kept = []

    class Watched(pg.Evidence):
        def select(self, signal):
            found = super().select(signal)
            kept.append(found.channel_weights)
            return found

    pg.Explainer(model, Watched(), layers="blocks.0.attn.qkv").attribute(torch.randn(2, 3, 32, 32).double(), 1)
    width = model.embed_dim
    assert not kept[0][:, : 2 * width].any()
    assert kept[0][:, 2 * width :].any(dim=1).all()


def test_networks_that_cut_patches_by_a_linear_layer():
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm, self.last = nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 5)

        def forward(self, x):
            cut = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3)
            return self.last(nn.functional.gelu(self.norm(self.embed(cut))).mean((1, 2)))

    model = Patches().double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    explainer = pg.Explainer(model, pg.GradientEnergy(quantile=0.3), layers="all", **TRUE)
    found = explainer.attribute(x, 1)
    assert explainer.edited_layers == ("embed",)
    handle = edited_by_hook(model, "embed", 0, 2, loudest(0.3, 0.5))
    torch.testing.assert_close(found, input_gradient(model, x, 1), rtol=1e-9, atol=1e-13)
    handle.remove()
    # By default too.
    assert pg.Explainer(model).attribute(x, 1).shape == x.shape


def test_the_batch_is_that_of_the_input_that_is_explained():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.cut, self.linear, self.last = nn.Conv2d(3, 4, 4, stride=4), nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, scale, images):
            return self.last(self.linear(self.cut(images * scale).flatten(2).mT).mean(1))

    model, images = Scaled().double().eval(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    for scale in (torch.ones(1, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)):

        def gradient(images, scale=scale):
            leaf = images.clone().requires_grad_()
            with pg.ParchGrad(model, pg.GradientEnergy(quantile=0.3), layers="linear", **TRUE):
                return torch.autograd.grad(model(scale, leaf)[:, 1].sum(), leaf)[0]

        rows = torch.cat([gradient(images[row : row + 1]) for row in range(3)])
        torch.testing.assert_close(gradient(images), rows, rtol=1e-9, atol=1e-15)


def test_empty_batches_and_inputs_without_a_batch():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval()
    with pg.ParchGrad(model, pg.GradientEnergy(), layers="0", **TRUE):
        x = torch.zeros(0, 3, requires_grad=True)
        assert torch.autograd.grad(model(x).sum(), x)[0].shape == (0, 3)
        with pytest.raises(InputError, match="layer '0' has no batch dimension"):
            model(torch.zeros(3, requires_grad=True))


def test_tokens_before_the_batch_are_edited_like_those_behind_it():
    """Torch's transformers have the batch second by default."""

    class Encoder(nn.Module):
        def __init__(self, batch_first):
            super().__init__()
            self.patches, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 5)
            self.token = nn.Parameter(torch.randn(1, 1, 8))
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, activation="gelu")
            self.batch_first = batch_first

        def forward(self, x):
            tokens = self.patches(x).flatten(2).mT
            tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1)
            tokens = self.layer(tokens if self.batch_first else tokens.transpose(0, 1))
            return self.head(tokens.mean(1 if self.batch_first else 0))

    first, second = Encoder(True).double().eval(), Encoder(False).double().eval()
    second.load_state_dict(first.state_dict())
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    found, expected = (
        pg.Explainer(model, layers=["layer.linear1", "layer.linear2"]).attribute(x, 1) for model in (second, first)
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)


def test_how_tokens_are_told_apart():
    assert token_view(torch.Size([4, 17, 8]), 4, {16}) == TokenView(4, 1)
    assert token_view(torch.Size([4, 16, 8]), 4, {16}) == TokenView(4, 0)
    # Merged tokens, a grid, windows, an unknown grid, another batch, and more than one token for each position.
    assert token_view(torch.Size([4, 4, 8]), 4, {16}) == TokenView(4, 0)
    assert token_view(torch.Size([4, 4, 5, 8]), 4, {16}) == TokenView(4, 0)
    assert token_view(torch.Size([8, 17, 8]), 4, {16}) == TokenView(4, 0)
    assert token_view(torch.Size([4, 17, 8]), 4, set()) == TokenView(4, 0)
    assert token_view(torch.Size([3, 17, 8]), 4, {16}) == TokenView(3, 1)
    assert token_view(torch.Size([4, 32, 8]), 4, {16}) == TokenView(4, 0)
    assert token_view(torch.Size([17, 4, 8]), 4, {16}) == TokenView(4, 1, is_batch_second=True)
    # The grid is the nearest of several.
    assert token_view(torch.Size([4, 401, 8]), 4, {196, 400, 784}) == TokenView(4, 1)
    with pytest.raises(InputError, match=r"\(8, 4, 8\) for 4 rows"):
        token_view(torch.Size([8, 4, 8]), 4, {16})
    # As many tokens as rows: only networks that put tokens first leave a doubt.
    assert token_view(torch.Size([4, 4, 8]), 4, {4}) == TokenView(4, 0)
    with pytest.raises(InputError, match=r"\(4, 4, 8\) for 4 rows"):
        token_view(torch.Size([4, 4, 8]), 4, {4}, may_put_batch_second=True)
    assert token_view(torch.Size([1, 1, 8]), 1, {1}, may_put_batch_second=True) == TokenView(1, 0)


def test_a_network_without_convolutions_is_edited_at_the_first_layers_it_calls():
    """Torch's attention never calls its own projections, which are registered first."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(40, 3)).double().eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    explainer = pg.Explainer(model)
    found = explainer.attribute(x, 1)
    assert explainer.edited_layers == ("0.layers.0.linear1",)
    torch.testing.assert_close(found, pg.Explainer(model, layers=["0.layers.0.linear1"]).attribute(x, 1))
    assert not torch.allclose(found, pg.Explainer(model, None, gates=8, balance=True).attribute(x, 1))
    # A layer of vectors has one position.
    assert TokenView(4, 0).patches(torch.zeros(4, 8)).shape == (4, 8, 1)


def test_layers_behind_the_last_attention_have_nothing_to_edit():
    """There, the gradient is that of the class token alone."""
    model = timm.create_model("test_vit", num_classes=5, img_size=32).eval()
    last = f"blocks.{len(model.blocks) - 1}.mlp.fc1"
    x = torch.randn(2, 3, 32, 32)
    for selector in (pg.Evidence(), pg.GradientEnergy()):
        with pytest.raises(LayerError, match="only class or register tokens"):
            pg.Explainer(model, selector, layers=[last]).attribute(x, 1)
        explainer = pg.Explainer(model, selector, layers=[last, "blocks.0.mlp.fc1"])
        with pytest.warns(ModelWarning, match=rf"1 of the chosen layers \({last}\)"):
            found = explainer.attribute(x, 1)
        assert explainer.edited_layers == ("blocks.0.mlp.fc1",)
        torch.testing.assert_close(found, pg.Explainer(model, selector, layers=["blocks.0.mlp.fc1"]).attribute(x, 1))


def test_what_is_said_of_layers_that_do_not_fit():
    model = timm.create_model("test_vit", num_classes=5, img_size=32).eval()
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(LayerError, match="statistics are of convolutions"):
        pg.collect_statistics(model, [(x[0], 0)], layers=["blocks.0.attn.qkv"])
    statistics = random_statistics({"patch_embed.proj": model.embed_dim})
    with pytest.raises(pg.ParchGradError, match=r"blocks\.0\.attn\.qkv"):
        pg.Explainer(model, pg.ClassWise(statistics, quantile=0.1), layers=["blocks.0.attn.qkv"])
    # The projection inside torch's own attention is never called as a module.
    attention = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(40, 3)
    ).eval()
    layers = ["0.self_attn.out_proj", "0.linear1"]
    with pytest.warns(ModelWarning, match="1 of 2 chosen layers were never called"):
        pg.Explainer(attention, layers=layers).attribute(torch.randn(2, 5, 8), 1)
