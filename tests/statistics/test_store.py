import contextlib
import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import parchgrad as pg
from parchgrad.errors import StatisticsError
from parchgrad.statistics import ChannelStatistics, LayerStatistics, RankedLayerStatistics, RowSample
from parchgrad.statistics.store import weight_digest
from tests.support import header, random_statistics, small_network

FIELDS = ("count", "mean", "std", "class_count", "class_mean", "class_variance", "shapiro_p")


def arrays():
    layer = random_statistics({"conv": 4}, classes=3)["conv"]
    return {name: getattr(layer, name) for name in FIELDS}


def test_a_read_only_mapping_in_float64():
    statistics = random_statistics({"a": 4, "b": 2}, classes=3)
    assert (list(statistics), len(statistics), statistics.classes) == (["a", "b"], 2, 3)
    assert all(getattr(statistics["a"], name).dtype == torch.float64 for name in FIELDS)
    assert statistics["b"].class_log_p().shape == (2, 3)
    with pytest.raises(TypeError):
        statistics["a"] = statistics["b"]


def test_what_is_given_is_copied():
    given = arrays()
    layers = {"conv": LayerStatistics(**given)}
    statistics = ChannelStatistics(layers)
    given["mean"] += 1
    layers["more"] = layers["conv"]
    assert list(statistics) == ["conv"]
    assert not torch.equal(statistics["conv"].mean, given["mean"])


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("std", torch.ones(5), r"std. has shape \(5,\), but 4 channels and 3 classes need \(4,\)"),
        ("class_mean", torch.ones(3, 4), r"class_mean. has shape \(3, 4\)"),
        ("count", torch.ones(2), "count. has shape"),
        ("mean", torch.full((4,), torch.nan), "mean` contains NaN"),
        (
            "class_mean",
            torch.full((4, 3), -1e61, dtype=torch.float64),
            r"outside \[-1e\+60, 1e\+60\]",
        ),
        (
            "class_variance",
            torch.full((4, 3), 1e121, dtype=torch.float64),
            r"outside \[0.0, 1e\+120\]",
        ),
        ("class_variance", torch.full((4, 3), torch.inf), "class_variance` contains NaN"),
        ("std", torch.full((4,), -1.0), r"std. has values outside \[0\.0, 1e\+60\]"),
        ("class_count", torch.full((3,), -1.0), "class_count` has values outside"),
        ("shapiro_p", torch.full((4,), 7.0), r"shapiro_p. has values outside \[0\.0, 1\.0\]"),
    ],
)
def test_arrays_that_do_not_fit(name, value, words):
    with pytest.raises(StatisticsError, match=words):
        LayerStatistics(**{**arrays(), name: value})


def test_layers_must_agree_on_the_classes():
    with pytest.raises(StatisticsError, match="at least one layer"):
        ChannelStatistics({})
    with pytest.raises(StatisticsError, match=r"'b' has statistics of 3 classes, .* 5"):
        ChannelStatistics({"a": random_statistics({"a": 2})["a"], "b": LayerStatistics(**arrays())})


def saved(tmp_path):
    # Names out of alphabetical order, with the dots that module names have.
    statistics = random_statistics({"features.10": 4, "features.2": 3, "head": 2}, classes=3)
    statistics = ChannelStatistics(statistics.layers, {"model": "tiny", "data": "12 photographs"})
    path = tmp_path / "tiny.safetensors"
    statistics.save(path)
    return statistics, path


def equal(first, second):
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in (*FIELDS, "class_square"))


def test_a_file_gives_back_everything(tmp_path):
    statistics, path = saved(tmp_path)
    loaded = ChannelStatistics.load(str(path))
    assert list(loaded) == ["features.10", "features.2", "head"]
    assert all(equal(loaded[name], statistics[name]) for name in statistics)
    assert dict(loaded.metadata) == {"model": "tiny", "data": "12 photographs"}
    statistics.restrict(["head"]).save(path)
    assert list(ChannelStatistics.load(path)) == ["head"]
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_restricting_keeps_order_and_makes_a_small_file(tmp_path):
    statistics, path = saved(tmp_path)
    small = statistics.restrict(["head", "features.10"])
    assert list(small) == ["features.10", "head"]
    assert equal(small["head"], statistics["head"])
    assert small.metadata == statistics.metadata
    small.save(tmp_path / "small.safetensors")
    assert (tmp_path / "small.safetensors").stat().st_size < path.stat().st_size
    with pytest.raises(StatisticsError, match=r"no layer 'tail'.* features\.10, features\.2, head"):
        statistics.restrict(["tail"])


@pytest.mark.parametrize("missing", [("mean", "std"), ("std",), ("log_p",)])
def test_ranked_statistics_without_some_parts_are_kept_as_they_are(tmp_path, missing):
    def without(layer):
        parts = {"mean": layer.mean, "std": layer.std, "shapiro_p": layer.shapiro_p, "log_p": layer.class_log_p()}
        return RankedLayerStatistics(**{name: parts[name] for name in parts if name not in missing}, test="welch")

    full = random_statistics({"a": 4, "b": 3}, classes=3)
    statistics = ChannelStatistics({name: without(layer) for name, layer in full.items()})
    statistics.restrict(["b"]).save(tmp_path / "some.safetensors")
    loaded = ChannelStatistics.load(tmp_path / "some.safetensors")
    assert (list(loaded), loaded["b"].channels, loaded.classes) == (["b"], 3, statistics.classes)
    for name in ("mean", "std", "shapiro_p", "log_p"):
        found, expected = getattr(loaded["b"], name), getattr(statistics["b"], name)
        assert (found is None) == (expected is None) == (name in missing)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    if "log_p" in missing:
        with pytest.raises(StatisticsError, match=r"'b' has statistics of 3 classes, .* 0"):
            ChannelStatistics({"a": statistics["a"], "b": full["b"]})


def rewrite(path, tensors=None, **changes):
    metadata = {**header(path), **changes}
    save_file(
        load_file(path) if tensors is None else tensors, path, {k: v for k, v in metadata.items() if v is not None}
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "weights"}, "contains no channel statistics"),
        ({"format": None}, "contains no channel statistics"),
        ({"format_version": "0"}, "format version '0', but this release reads '1'"),
        ({"layers": None}, "field 'layers'"),
        ({"layers": "["}, "field 'layers'"),
        ({"layers": "[" * 100_000}, "field 'layers'"),
        ({"layers": "3"}, "header of .* is damaged"),
        ({"metadata": "[]"}, "header of .* is damaged"),
        ({"layers": '["conv"]'}, "header of .* is damaged"),
        ({"layers": '[{"name": "conv"}]'}, "Layer 'conv' in .* lacks 'count'"),
        ({"layers": "[]"}, "at least one layer"),
    ],
)
def test_headers_that_do_not_fit(tmp_path, changes, words):
    _, path = saved(tmp_path)
    rewrite(path, **changes)
    with pytest.raises(StatisticsError, match=words):
        ChannelStatistics.load(path)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    _, path = saved(tmp_path)
    tensors = load_file(path)
    rewrite(path, {**tensors, "head/std": torch.ones(7)})
    with pytest.raises(StatisticsError, match=r"Layer 'head' in .* does not fit: .std. has shape \(7,\)"):
        ChannelStatistics.load(path)
    rewrite(path, {name: value for name, value in tensors.items() if name != "features.2/mean"})
    with pytest.raises(StatisticsError, match=r"Layer 'features\.2' in .* lacks 'mean'"):
        ChannelStatistics.load(path)


def test_files_of_another_kind(tmp_path):
    with pytest.raises(StatisticsError, match="There is no statistics file"):
        ChannelStatistics.load(tmp_path / "none.safetensors")
    with pytest.raises(StatisticsError, match="is a folder"):
        ChannelStatistics.load(tmp_path)
    torch.save({"a": torch.zeros(2)}, tmp_path / "pickle.pth")
    with pytest.raises(StatisticsError, match="as channel statistics"):
        ChannelStatistics.load(tmp_path / "pickle.pth")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bytes_are_an_error_or_change_numbers_only(tmp_path_factory, data):
    _, path = saved(tmp_path_factory.mktemp("fuzz"))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, 1500))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(StatisticsError):
        ChannelStatistics.load(path)


def test_restricting_to_classes_keeps_their_tests(tmp_path):
    statistics = random_statistics({"a": 6, "b": 4}, classes=5, images=60)
    path = tmp_path / "some.safetensors"
    statistics.restrict(classes=[3, 1]).save(path)
    some = ChannelStatistics.load(path)
    assert (some.class_indices, some.classes, some.model_classes) == ((1, 3), 2, 5)
    torch.testing.assert_close(some["a"].class_log_p(), statistics["a"].class_log_p()[:, [1, 3]], rtol=1e-9, atol=1e-12)
    assert torch.equal(some["a"].std, statistics["a"].std)
    again = some.restrict(["b"], classes=[3])
    assert (list(again), again.class_indices) == (["b"], (3,))
    assert again.columns([3]) == [0]
    with pytest.raises(StatisticsError, match="only some classes, but not class 2"):
        some.restrict(classes=[2])
    with pytest.raises(StatisticsError, match="classes 0 to 4, but not class 9"):
        statistics.restrict(classes=[9])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_classes": 9}, "class_indices="),
        ({"class_indices": (0, 1)}, "class_indices` must be 3 ascending classes"),
        ({"class_indices": (0, 1, 1)}, "class_indices` must be 3 ascending classes"),
        ({"class_indices": (2, 0, 1)}, r"but 3 are given: \(2, 0, 1\)"),
        ({"class_indices": (0, 1, 7), "model_classes": 5}, "from 0 to 4"),
        ({"sample": RowSample(keys=torch.arange(2), rows={})}, "images of layer 'conv' must be rows of shape"),
        ({"sample": RowSample(keys=torch.arange(2), rows={"conv": torch.ones(3, 4)})}, r"of shape \(2, 4\)"),
        ({"sample": RowSample(keys=torch.arange(1), rows={"conv": torch.full((1, 4), torch.nan)})}, "NaN or infinite"),
    ],
)
def test_classes_and_samples_that_do_not_fit(changes, words):
    with pytest.raises(StatisticsError, match=words):
        ChannelStatistics({"conv": LayerStatistics(**arrays())}, **changes)


def collected(model):
    images = [(torch.randn(3, 8, 8, dtype=torch.float64), index % 5) for index in range(20)]
    return pg.collect_statistics(model, images, metadata={"model": "tiny", "preprocessing": "none"})


def test_a_collection_is_kept_whole_and_checked_against_its_model(tmp_path):
    model, path = small_network(), tmp_path / "tiny.safetensors"
    statistics = collected(model)
    statistics.save(path)
    loaded = ChannelStatistics.load(path, model)
    assert all(equal(loaded[name], statistics[name]) for name in statistics)
    expected = {"model": "tiny", "preprocessing": "none", "labels": "given", "seed": "0", "images": "20"}
    assert {name: text for name, text in loaded.metadata.items() if name != "collections"} == expected
    assert loaded.weight_digests == {name: weight_digest(model.get_submodule(name)) for name in ("0", "2")}
    assert torch.equal(loaded.sample.keys, statistics.sample.keys)
    assert torch.equal(loaded.sample.rows["2"], statistics.sample.rows["2"])


def with_other_weights():
    model = small_network()
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] += 1e-6
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (with_other_weights(), "other weights of layer '2'"),
        (small_network(channels=5), "layer '0' have 6 channels, but the layer has 5"),
        (torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3)), "other weights of layer '0'"),
        (
            torch.nn.Sequential(torch.nn.Identity(), torch.nn.Conv2d(3, 6, 3)),
            "Sequential has no layer",
        ),
    ],
)
def test_another_model_is_told_by_the_layer(tmp_path, model, words):
    path = tmp_path / "tiny.safetensors"
    collected(small_network()).save(path)
    with pytest.raises(StatisticsError, match=words):
        ChannelStatistics.load(path, model)


def test_digests_hold_across_dtypes_and_are_of_the_values():
    convolution = torch.nn.Conv2d(3, 4, 3)
    values = convolution.weight.detach().double().numpy()
    expected = hashlib.sha256(b"(4, 3, 3, 3)" + values.tobytes()).hexdigest()
    assert weight_digest(convolution) == weight_digest(convolution.double()) == expected
    assert weight_digest(convolution.half()) != expected


def test_files_follow_the_users_mask(tmp_path):
    (tmp_path / "plain").touch()
    collected(small_network()).save(tmp_path / "tiny.safetensors")
    assert (tmp_path / "tiny.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_bundled_statistics_fit_the_network_that_they_are_of():
    statistics = ChannelStatistics.bundled("efficientnet_lite0")
    model = pg.load_model("efficientnet_lite0").model
    statistics.check_model(model)
    upper_half = pg.choose_layers(model, 0.5, inputs=torch.rand(1, 3, 64, 64))
    assert set(pg.choose_layers(model, "published")) < set(statistics) == set(upper_half)
    assert (statistics.classes, statistics.metadata["labels"]) == (1000, "predicted")
    files = Path(pg.__file__).parent.glob("statistics/bundled/*")
    assert sum(file.stat().st_size for file in files) <= 12e6
    with pytest.raises(StatisticsError, match="for 'resnet18', only for efficientnet_lite0"):
        ChannelStatistics.bundled("resnet18")
