from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from parchgrad.core.engine import choose_layers
from parchgrad.core.layers import (
    bare_model,
    candidate_layers,
    channel_count,
    find_convolutions,
    has_published_layers,
    resolve_layers,
)
from parchgrad.errors import LayerError, ModelError
from tests.support import small_network


@pytest.fixture(autouse=True)
def _without_weights():
    """Build networks without weights, which only their structure is looked at for."""
    with torch.device("meta"):
        yield


def transformer(name):
    # Old releases of timm read numbers off what they make.
    with torch.device("cpu"):
        return timm.create_model(name)


def chain(n, kind=nn.Conv2d):
    return nn.Sequential(*[kind(2, 2, 1) for _ in range(n)])


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_convolutions_are_found_by_type_in_module_order(kind):
    model = nn.Sequential(kind(2, 2, 1), nn.ModuleDict({"a": kind(2, 2, 1), "b": nn.Linear(2, 2)}), nn.ReLU())
    assert list(find_convolutions(model)) == ["0", "1.a"]


def test_transposed_and_deformable_convolutions_are_layers_and_shared_ones_are_listed_once():
    shared, transposed = nn.Conv2d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1)
    deformable = torchvision.ops.DeformConv2d(2, 2, 1)
    model = nn.Sequential(shared, transposed, shared, deformable)
    assert find_convolutions(model) == {"0": shared, "1": transposed, "3": deformable}


def test_a_convolution_alone_is_a_model():
    model = nn.Conv2d(1, 1, 1).eval()
    assert choose_layers(model, "all", inputs=torch.empty(1, 1, 2, 2)) == {"": model}


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(1.0, "0 1 2 3 4"), (1, "0 1 2 3 4"), (0.5, "3 4"), (0.6, "2 3 4"), (0.01, "4")],
)
def test_ratio_takes_the_last_convolutions_of_a_chain(ratio, expected):
    model = chain(5).eval()
    assert list(choose_layers(model, ratio, inputs=torch.empty(1, 2, 3, 3))) == expected.split()
    with torch.inference_mode():
        assert list(choose_layers(model, ratio, inputs=(torch.empty(1, 2, 3, 3),))) == expected.split()


def test_a_ratio_needs_inputs_that_it_does_not_change():
    x = torch.empty(1, 2, 3, 3)
    for layers in ("all", 0.5):
        with pytest.raises(LayerError, match="`inputs=`"):
            choose_layers(chain(5).eval(), layers)
        choose_layers(chain(5).eval(), layers, inputs=x)
    assert not x.requires_grad


def test_patterns_and_modules_keep_module_order():
    model = chain(5)
    assert list(choose_layers(model, ["4", "[01]"])) == ["0", "1", "4"]
    assert list(choose_layers(model, "[01]")) == ["0", "1"]
    assert list(choose_layers(model, [model[3], model[1], model[3]])) == ["1", "3"]


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (["layer9.*"], r"'layer9\.\*' matches none of the 20 convolutions.*: layer"),
        (["layer4"], r": layer4\.\*, layer4\.0\.conv1"),
        ("layer4.0.conv9", r": layer4\.0\.conv"),
        (["layer4.*", "zzz"], "'zzz' matches none"),
        (0.0, "ratio 0,"),
        (1.5, "ratio 1.5,"),
        (float("nan"), "ratio nan"),
        ([], "`layers` is .*, but it must be 'auto', 'all', 'published', a ratio"),
        ([1, 2], "`layers` is .*, but it must be 'auto', 'all', 'published', a ratio"),
        (True, "`layers` is .*, but it must be 'auto', 'all', 'published', a ratio"),
        (None, "`layers` is .*, but it must be 'auto', 'all', 'published', a ratio"),
        ([nn.Conv2d(1, 1, 1)], "^`layers` contains a Conv2d"),
        (np.array(["conv1", "layer4.*"]), "`layers` is array.* but it must be"),
        ([nn.ReLU()], "^`layers` contains a ReLU"),
    ],
    ids=str,
)
def test_bad_choices_name_the_remedy(layers, words):
    with pytest.raises(LayerError, match=words):
        choose_layers(torchvision.models.resnet18(), layers)


@pytest.mark.parametrize(
    ("name", "ratio"),
    [("resnet18", 0.75), ("mobilenetv3_small_050", 0.75), ("convnext_atto", 1), ("vit_tiny_patch16_224", 1)],
)
def test_auto_takes_all_layers_of_networks_that_normalise_tokens(name, ratio):
    model = transformer(name)
    assert resolve_layers(model, "auto") == resolve_layers(model, ratio)


def test_auto_knows_norms_of_other_libraries_by_their_names():
    class T5RMSNorm(nn.Module):
        pass

    assert resolve_layers(nn.Sequential(nn.Conv2d(2, 2, 1), T5RMSNorm()), "auto") == 1


def test_models_without_convolutions():
    with pytest.raises(ModelError, match="ReLU has no convolution"):
        choose_layers(nn.ReLU(), "all")
    # The first linear layer on the path takes the place of the patch embedding, whatever the order of registration.
    linear = nn.Sequential(OrderedDict(a=nn.Linear(2, 3), b=nn.Linear(3, 2))).eval()
    assert list(candidate_layers(linear, resolve_layers(linear, "all"))) == ["a", "b"]
    assert list(choose_layers(linear, "all", inputs=torch.empty(1, 4, 2))) == ["a"]
    linear = nn.ModuleDict({"last": nn.Linear(3, 2), "first": nn.Linear(2, 3)})
    linear.forward = lambda x: linear["last"](linear["first"](x))
    assert list(choose_layers(linear.eval(), 0.5, inputs=torch.empty(1, 4, 2))) == ["first"]


def test_linear_layers_are_chosen_by_name_alone():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ModuleDict({"conv": nn.Conv2d(2, 2, 1), "fc": nn.Linear(2, 2)}))
    assert list(choose_layers(model, "1.fc")) == ["1.fc"]
    assert list(choose_layers(model, ["1.f*", "0"])) == ["0", "1.fc"]
    assert list(choose_layers(model, [model[1]["fc"]])) == ["1.fc"]
    # A pattern that matches convolutions stands for these alone.
    assert list(choose_layers(model, "1.*")) == ["1.conv"]
    assert list(candidate_layers(model, resolve_layers(model, "all"))) == ["0", "1.conv"]
    assert list(candidate_layers(model, resolve_layers(model, "1.fc"))) == ["0", "1.conv", "1.fc"]
    assert [channel_count(layer) for layer in choose_layers(model, ["0", "1.fc"]).values()] == [2, 2]
    with pytest.raises(LayerError, match=r"none of the 2 convolutions and 1 linear layers\. Similar names: .*1\.fc"):
        resolve_layers(model, "1.fx")


# torch announces that it will do without scripts.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_model_of_torchscript_is_refused_as_such():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(1, 1, 1)).eval())
    with pytest.raises(ModelError, match="TorchScript"):
        choose_layers(scripted, "all")


@pytest.mark.parametrize("library", [torchvision.models.resnet18, lambda: timm.create_model("resnet18")])
def test_published_layers_of_resnets(library):
    names = list(choose_layers(library(), "published"))
    assert names == [f"layer{stage}.{block}.conv{i}" for stage in (3, 4) for block in (0, 1) for i in (1, 2)]


def test_published_layers_of_deep_resnets_counts_the_blocks_convolutions():
    # layer3 holds 6 bottlenecks and layer4 3, of three convolutions each.
    assert len(choose_layers(torchvision.models.resnet50(), "published")) == 27


def test_published_layers_of_vgg():
    names = list(choose_layers(torchvision.models.vgg16_bn(), "published"))
    assert names == [f"features.{i}" for i in (20, 24, 27, 30, 34, 37, 40)][-6:]
    # timm's VGG has convolutions behind `features`, which are not of the set.
    assert all(name.startswith("features.") for name in choose_layers(timm.create_model("vgg11"), "published"))


def test_published_layers_of_efficientnets():
    names = list(choose_layers(torchvision.models.efficientnet_b0(), "published"))
    assert names == ["features.6.0.block.1.0", "features.7.0.block.1.0", "features.8.0"]
    names = list(choose_layers(timm.create_model("tf_efficientnet_lite0"), "published"))
    assert names == ["blocks.5.0.conv_dw", "blocks.6.0.conv_dw", "conv_head"]


def test_published_layers_are_found_inside_a_wrapper_and_without_attention():
    wrapped = nn.Sequential(nn.Identity(), torchvision.models.resnet18())
    alone = choose_layers(torchvision.models.resnet18(), "published")
    assert list(choose_layers(wrapped, "published")) == [f"1.{name}" for name in alone]
    assert len(choose_layers(timm.create_model("seresnet50"), "published")) == 27
    assert has_published_layers(wrapped)


@pytest.mark.parametrize(
    "model",
    # This EfficientNet has one stage less.
    [small_network, lambda: chain(5), torchvision.models.squeezenet1_1, torchvision.models.efficientnet_v2_s],
)
def test_networks_without_published_layers_are_refused_by_name(model):
    model = model()
    assert not has_published_layers(model)
    with pytest.raises(LayerError, match=type(model).__name__):
        choose_layers(model, "published")
    with pytest.raises(LayerError, match="'default' matches none"):
        choose_layers(model, "default")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mixer_s32_224", "hiera_tiny_224"])
def test_the_patch_embedding_is_a_layer_like_others(name):
    with torch.device("cpu"):
        model, inputs = timm.create_model(name).eval(), torch.rand(1, 3, 224, 224)
    embedding = next(iter(find_convolutions(model)))
    for layers in (0.25, "all"):
        assert list(choose_layers(model, layers, inputs=inputs)) == [embedding]
    with pytest.raises(LayerError, match="no layer set"):
        choose_layers(model, "published")


def test_bare_models_are_themselves():
    model = chain(2)
    assert bare_model(model) is model
