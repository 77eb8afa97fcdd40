import pytest
import torch

from parchgrad.errors import StatisticsError
from parchgrad.statistics import ChannelStatistics, LayerStatistics
from tests.conftest import random_statistics

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
        ("std", torch.ones(5), r"std has shape \(5,\), but 4 channels and 3 classes need \(4,\)"),
        ("class_mean", torch.ones(3, 4), r"class_mean has shape \(3, 4\)"),
        ("count", torch.ones(2), "count has shape"),
        ("mean", torch.full((4,), torch.nan), "mean holds values that are not finite"),
        ("class_variance", torch.full((4, 3), torch.inf), "class_variance holds values"),
        ("std", torch.full((4,), -1.0), r"std holds values outside \[0, inf\]"),
        ("class_count", torch.full((3,), -1.0), "class_count holds values outside"),
        ("shapiro_p", torch.full((4,), 7.0), r"shapiro_p holds values outside \[0, 1.0\]"),
    ],
)
def test_arrays_that_do_not_fit(name, value, words):
    with pytest.raises(StatisticsError, match=words):
        LayerStatistics(**{**arrays(), name: value})


def test_layers_must_agree_on_the_classes():
    with pytest.raises(StatisticsError, match="at least one layer"):
        ChannelStatistics({})
    with pytest.raises(StatisticsError, match="'b' has statistics of 3 classes, the first layer of 5"):
        ChannelStatistics({"a": random_statistics({"a": 2})["a"], "b": LayerStatistics(**arrays())})
