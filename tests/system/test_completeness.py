"""Balanced networks of timm, torchvision and Hugging Face with random weights: contributions add up to the score."""

import pytest
import timm
import torch
import torchvision
from packaging.version import Version
from torch import nn

import parchgrad as pg
from tests.support import contributions, enlivened, nothing_is_left

transformers = pytest.importorskip("transformers", reason="Hugging Face's networks need transformers")

TIMM = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 64, "depth": 3}),
    "deit": ("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 3}),
    "beit": ("beit_base_patch16_224", {"img_size": 64, "depth": 2, "embed_dim": 96, "num_heads": 4}),
    "eva": ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 3}),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 56, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4)}),
    "swin v2": ("swinv2_tiny_window8_256", {"img_size": 64, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4)}),
    "convnext": ("convnext_atto", {}),
    "convnext v2": ("convnextv2_atto", {}),
    "maxvit": ("maxvit_rmlp_pico_rw_256", {"img_size": 64}),
    "coatnet": ("coatnet_pico_rw_224", {"img_size": 64}),
    "mixer": ("mixer_s32_224", {"img_size": 64}),
    "poolformer": ("poolformer_s12", {}),
    "efficientnet": ("efficientnet_b0", {}),
    "mobilenet v3": ("mobilenetv3_small_050", {}),
    "regnet y": ("regnety_002", {}),
    "resnet": ("resnet50", {}),
    "cait": ("cait_xxs24_224", {"img_size": 64, "depth": 2}),
    "convit": ("convit_tiny", {"img_size": 64, "depth": 11}),
    "starnet": ("starnet_s050", {}),
}
VISION = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MLP = {"intermediate_size": 64}


class Picked(nn.Module):
    """A network that returns one tensor."""

    def __init__(self, model, name, keyword="pixel_values"):
        super().__init__()
        self.model, self.name, self.keyword = model, name, keyword

    def forward(self, x):
        return getattr(self.model(**{self.keyword: x}), self.name)


def of_hugging_face(name, implementation):
    attention = {"attn_implementation": implementation}
    make = {
        "vit": lambda: (
            transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, **MLP, num_labels=5, **attention)),
            "logits",
        ),
        "dinov2": lambda: (
            transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**VISION, num_labels=5, **attention)),
            "logits",
        ),
        "dinov2, swiglu": lambda: (
            transformers.Dinov2ForImageClassification(
                transformers.Dinov2Config(**VISION, use_swiglu_ffn=True, num_labels=5, **attention)
            ),
            "logits",
        ),
        "clip": lambda: (
            transformers.CLIPVisionModelWithProjection(
                transformers.CLIPVisionConfig(**VISION, **MLP, projection_dim=5, **attention)
            ),
            "image_embeds",
        ),
        "siglip": lambda: (
            transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION, **MLP, **attention)),
            "pooler_output",
        ),
    }
    return Picked(*make[name]())


def assert_complete(model, x, dtype):
    model = enlivened(model).eval().to(dtype)
    x = x.to(dtype).requires_grad_()
    plain = model(x)
    with pg.ParchGrad(model, None, balance=True):
        output = model(x)
        score = output[0, 2]
        total = contributions(model, x, score)
    assert torch.equal(output, plain)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    assert abs(total - float(score.detach())) < tolerance * max(1, abs(float(score.detach())))
    assert nothing_is_left(model)


def picture(size):
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm(name, dtype):
    torch.manual_seed(0)
    variant, settings = TIMM[name]
    if variant not in timm.list_models():
        pytest.skip("this release of timm does not have the network")
    if name == "convit" and dtype == torch.float64 and Version(timm.__version__) < Version("1.0.20"):
        pytest.skip("older releases of timm mix float types in ConViT")
    assert_complete(timm.create_model(variant, num_classes=5, **settings), picture(settings.get("img_size", 64)), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["vit", "swin", "swin v2"])
def test_networks_of_torchvision(name, dtype):
    torch.manual_seed(0)
    swin = {"patch_size": [4, 4], "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": [7, 7]}
    made = {
        "vit": lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5),
        "swin": lambda: torchvision.models.SwinTransformer(**swin, num_classes=5),
        "swin v2": lambda: torchvision.models.SwinTransformer(
            **swin,
            num_classes=5,
            block=torchvision.models.swin_transformer.SwinTransformerBlockV2,
            downsample_layer=torchvision.models.swin_transformer.PatchMergingV2,
        ),
    }
    assert_complete(made[name](), picture(32 if name == "vit" else 56), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov2, swiglu", "clip", "siglip"])
def test_networks_of_hugging_face(name, implementation, dtype):
    torch.manual_seed(0)
    assert_complete(of_hugging_face(name, implementation), picture(32), dtype)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_networks_for_text(name):
    torch.manual_seed(0)
    if name == "bert":
        settings = transformers.BertConfig(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            num_labels=5,
        )
        model = transformers.BertForSequenceClassification(settings)
    else:
        settings = transformers.GPT2Config(
            vocab_size=50,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=16,
            num_labels=5,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        model = transformers.GPT2ForSequenceClassification(settings)
    assert_complete(Picked(model, "logits", "inputs_embeds"), torch.randn(1, 6, 32), torch.float64)


def test_a_network_of_hugging_face_is_explained_by_default():
    torch.manual_seed(0)
    model = enlivened(of_hugging_face("dinov2", "sdpa")).eval().double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    explainer = pg.Explainer(model)
    found = explainer.attribute(x, torch.tensor([1, 3]))
    assert explainer.edited_layers == ("model.dinov2.embeddings.patch_embeddings.projection",)
    for row, target in ((0, 1), (1, 3)):
        alone = pg.Explainer(model).attribute(x[row : row + 1], target)
        torch.testing.assert_close(alone[0], found[row], rtol=1e-9, atol=1e-15)
    # Tokens of a linear layer, with a class token before them.
    name = next(name for name, _ in model.named_modules() if name.endswith((".value", ".v_proj")))
    tokens = pg.Explainer(model, pg.GradientEnergy(), layers=[name])
    found = tokens.attribute(x, torch.tensor([1, 3]))
    assert tokens.edited_layers == (name,)
    for row, target in ((0, 1), (1, 3)):
        torch.testing.assert_close(tokens.attribute(x[row : row + 1], target)[0], found[row], rtol=1e-9, atol=1e-15)


def test_text_without_convolutions_is_edited_at_the_first_values():
    torch.manual_seed(0)
    settings = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=5
    )
    model = Picked(transformers.BertForSequenceClassification(settings).eval(), "logits", "inputs_embeds").eval()
    explainer = pg.Explainer(model)
    assert explainer.attribute(torch.randn(1, 6, 32), 1).any()
    assert [name.rsplit(".", 1)[1] for name in explainer.edited_layers] == ["value"]
