from unittest.mock import Mock

import pytest
import torch
import torchvision
from torch import nn

import parchgrad as pg
from parchgrad.errors import LayerError, ModelError, SettingError, StatisticsError
from parchgrad.legacy import hook_wrapper
from tests.support import FOR_CLASSES, ROOT, published_choice, small_network, write_pickles, write_statistics

SETTINGS = {"quantile": 0.5, "alpha": None, "normality_threshold": 0.05, "gamma": 2.0, "conserve": "exact"}


FOR_IMAGES = ("shapiro_p_values", "gap_mean", "gap_std")


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("resnet50", torchvision.models.resnet50),
        ("vgg16", torchvision.models.vgg16_bn),
        ("efficient_b0", torchvision.models.efficientnet_b0),
    ],
)
def test_the_published_layers(name, build):
    with torch.device("meta"):
        model = build().eval()
    wrapper = pg.get_hook_wrapper(name, model, "cls")
    every = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [id(module) for module in wrapper.all_convolutions] == [id(module) for module in every]
    found = wrapper.get_default_hook_convolutions(None)
    assert [id(module) for module in found] == [id(module) for module in published_choice(name, model)]
    for ratio in (0.3, 0.5, 1.0):
        last = every[len(every) - int(ratio * len(every)) :]
        assert [id(module) for module in wrapper.get_default_hook_convolutions(ratio)] == [id(m) for m in last]
    assert len(wrapper.get_default_hook_convolutions(1e-9)) == 1


def test_setting_modules_replaces_those_before(network):
    wrapper = pg.get_hook_wrapper("resnet18", network, "cls")
    assert wrapper.hook_modules == []
    wrapper.set_hook_modules(module for module in (network[2], network[0]))
    assert [id(module) for module in wrapper.hook_modules] == [id(network[0]), id(network[2])]
    wrapper.set_hook_modules([network[2]], verbose=1)
    assert [id(module) for module in wrapper.hook_modules] == [id(network[2])]
    with pytest.raises(LayerError, match="`layers` contains a ReLU"):
        wrapper.set_hook_modules([network[1]])
    with pytest.raises(LayerError, match="non-empty list of convolutions or linear layers"):
        wrapper.set_hook_modules([])
    with pytest.raises(LayerError, match=r"a ratio must lie in \(0, 1\]"):
        wrapper.get_default_hook_convolutions(1.5)


def selector_of(wrapper):
    wrapper.set_hook_modules(wrapper.all_convolutions)
    return wrapper.edited_gradients(target=1, **SETTINGS).edit.selector


def test_statistics_of_models_of_the_hub_have_a_file_name_without_slashes(network, tmp_path):
    held = write_statistics(tmp_path / "hf-hub--someone--small.safetensors", network, 5)
    wrapper = pg.get_hook_wrapper("hf-hub:someone/small", network, "cls")
    wrapper.prepare_parchgrad(tmp_path)
    found = selector_of(wrapper).statistics["2"].class_log_p()
    torch.testing.assert_close(found, held["2"].class_log_p(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("place", ["file", "name", "library", "pickles", "inside"])
def test_every_place_of_statistics(network, tmp_path, place):
    wrapper = pg.get_hook_wrapper("vgg16", network, "cls")
    base = tmp_path / "vgg16"
    if place in ("pickles", "inside"):
        lists = write_pickles(base / "pickles", network, 5)
        base = base / "pickles" if place == "inside" else base
        expected = [p.double().log() for p in lists["cls_p_values"]]
    else:
        path = {"file": "any.safetensors", "name": "vgg16.safetensors", "library": "vgg16_bn.safetensors"}[place]
        statistics = write_statistics(base / path, network, 5)
        expected = [layer.class_log_p() for layer in statistics.values()]
        base = base / path if place == "file" else base
    wrapper.prepare_parchgrad(base_directory=str(base), device="cuda:0")
    selector = selector_of(wrapper)
    assert isinstance(selector, pg.ClassWise)
    found = [selector.statistics[name].class_log_p() for name in ("0", "2")]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "names", "other", "words"),
    [
        ("cls", FOR_CLASSES, FOR_IMAGES, r"without 'cls_p_values\.pkl'"),
        ("ins", FOR_IMAGES, FOR_CLASSES, r"without 'gap_mean\.pkl' and 'gap_std\.pkl'"),
    ],
)
def test_each_method_needs_its_own_pickles_only(network, tmp_path, method, names, other, words):
    write_pickles(tmp_path / "own", network, 5, names)
    write_pickles(tmp_path / "other", network, 5, other)
    wrapper = pg.get_hook_wrapper("vgg16", network, method)
    with pytest.raises(StatisticsError, match=words):
        wrapper.prepare_parchgrad(tmp_path / "other")
    wrapper.prepare_parchgrad(tmp_path / "own")
    wrapper.set_hook_modules(wrapper.all_convolutions)
    wrapper.edited_gradients(target=1, **SETTINGS)


def test_the_calls_on_the_page_run_on_the_two_published_pickles(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval()
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: model)
    page = ROOT / "docs" / "coming_from_the_research_code.md"
    calls = next(block for block in page.read_text().split("```python\n") if "prepare_parchgrad" in block).split("```")[
        0
    ]
    x, y, maps = torch.randn(3, 64, 64), torch.tensor([3]), []
    for folder, names in (("two", FOR_CLASSES), ("four", (*FOR_CLASSES, "gap_mean", "gap_std"))):
        write_pickles(tmp_path / folder / "pickles", model, 10, names)
        found = {"encoder": "resnet18", "device": "cpu", "base_dir": str(tmp_path / folder), "x": x, "y": y}
        exec(compile(calls, str(page), "exec"), found)
        assert found["method"] == "cls"
        maps.append(found["attr"])
    assert maps[0].any()
    torch.testing.assert_close(*maps, rtol=0, atol=0)


def test_a_statistics_file_comes_before_pickles(network, tmp_path):
    write_pickles(tmp_path / "pickles", network, 5)
    write_statistics(tmp_path / "resnet18.safetensors", network, 5)
    wrapper = pg.get_hook_wrapper("resnet18", network, "ins")
    wrapper.prepare_parchgrad(tmp_path)
    selector = selector_of(wrapper)
    assert isinstance(selector, pg.InstanceWise)
    assert isinstance(selector.statistics["0"], pg.LayerStatistics)


def test_compact_statistics_of_another_test(network, tmp_path):
    write_statistics(tmp_path / "full.safetensors", network, 5)
    full = pg.ChannelStatistics.load(tmp_path / "full.safetensors")
    full.compact(test="student").save(tmp_path / "few.safetensors")
    wrapper = pg.get_hook_wrapper("resnet18", network, "cls")
    wrapper.prepare_parchgrad(tmp_path / "few.safetensors")
    masks = selector_of(wrapper).class_weights("2")
    published = pg.ClassWise(full, quantile=0.5, softness=0, test="student")
    assert masks.dtype == torch.bool
    assert torch.equal(masks, published.class_weights("2"))


def test_selectors_are_made_once_for_each_setting(network, tmp_path, monkeypatch):
    made = Mock(wraps=hook_wrapper._make_selector)
    monkeypatch.setattr(hook_wrapper, "_make_selector", made)
    write_statistics(tmp_path / "resnet18.safetensors", network, 5)
    wrapper = pg.get_hook_wrapper("resnet18", network, "cls")
    wrapper.prepare_parchgrad(tmp_path)
    wrapper.set_hook_modules(wrapper.all_convolutions)
    for _ in range(3):
        for quantile in (0.2, 0.5):
            wrapper.edited_gradients(target=1, **SETTINGS | {"quantile": quantile})
    assert made.call_count == 2
    wrapper.prepare_parchgrad(tmp_path)
    wrapper.edited_gradients(target=1, **SETTINGS)
    assert made.call_count == 3


def test_the_normal_method_reads_nothing(network, tmp_path):
    wrapper = pg.get_hook_wrapper("resnet18", network, "normal")
    wrapper.prepare_parchgrad(base_directory=tmp_path / "missing", device="cpu")
    with pytest.raises(SettingError, match="'normal' does not edit"):
        wrapper.edited_gradients(target=1, **SETTINGS)


def test_statistics_that_are_missing_or_of_another_network(network, tmp_path):
    wrapper = pg.get_hook_wrapper("vgg16", network, "cls")
    wrapper.set_hook_modules(wrapper.all_convolutions)
    with pytest.raises(StatisticsError, match=r"wrapper\.prepare_parchgrad\(base_directory=...\)"):
        wrapper.edited_gradients(target=1, **SETTINGS)
    with pytest.raises(StatisticsError, match="There is no statistics file"):
        wrapper.prepare_parchgrad(tmp_path / "missing")
    with pytest.raises(StatisticsError, match=r"neither 'vgg16.safetensors' nor 'vgg16_bn.safetensors' nor"):
        wrapper.prepare_parchgrad(tmp_path)
    (tmp_path / "pickles").mkdir()
    with pytest.raises(StatisticsError, match=r"pickles' lacks 'cls_p_values\.pkl', 'shapiro_p_values\.pkl', 'gap"):
        wrapper.prepare_parchgrad(tmp_path)
    other = small_network(channels=8)
    write_statistics(tmp_path / "other.safetensors", other, 5)
    with pytest.raises(StatisticsError, match="have 8 channels, but the layer has 6"):
        wrapper.prepare_parchgrad(tmp_path / "other.safetensors")
    write_pickles(tmp_path / "other" / "pickles", other, 5)
    with pytest.raises(StatisticsError, match=r"'0', which has 6 channels in vgg16"):
        wrapper.prepare_parchgrad(tmp_path / "other")


def test_unknown_names_and_methods(network):
    with pytest.raises(ModelError, match=r"model 'resnet-18'.*resnet18"):
        pg.get_hook_wrapper("resnet-18", network, "cls")
    with pytest.raises(SettingError, match="method` is 'class', but it must be one of cls, ins, normal"):
        pg.get_hook_wrapper("resnet18", network, "class")
    with pytest.raises(ModelError, match=r"a torch\.nn\.Module is needed"):
        pg.get_hook_wrapper("resnet18", "resnet18", "cls")
    for name in ("inceptionv3", "convnext_tiny", "resnet50.a1_in1k", "shapes"):
        assert pg.get_hook_wrapper(name, network, "cls").name == name
    wrapper = pg.get_hook_wrapper("resnet18", nn.Linear(3, 2), "cls")
    with pytest.raises(ModelError, match="Linear has no convolution"):
        wrapper.get_default_hook_convolutions()
