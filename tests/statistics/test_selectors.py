"""Errors of the selectors on channel statistics; tests/core/test_selectors.py has what they select."""

import math

import pytest
import torch

import parchgrad as pg
from parchgrad.errors import StatisticsError
from tests.messages import check_message
from tests.support import random_statistics, ranked


def without_images_of(label):
    layer = random_statistics({"conv": 3})["conv"]
    names = ("count", "mean", "std", "class_mean", "class_variance", "shapiro_p")
    counts = torch.where(torch.arange(5) == label, 0, layer.class_count)
    return pg.ChannelStatistics(
        {"conv": pg.LayerStatistics(class_count=counts, **{name: getattr(layer, name) for name in names})}
    )


def few_ranked():
    """All channels that are kept of the first class pass an alpha of exp(-1), so dropped ones might too."""
    return ranked([[-3.0, -3.0], [-2.0, -0.1], [-1.0, 0.0], [0.0, 0.0]], share=0.75)


@pytest.mark.parametrize("kind", [pg.ClassWise, pg.InstanceWise])
@pytest.mark.parametrize(
    ("channels", "facts"),
    [
        ({"head": 3, "conv": 3, "last": 3}, ("3 convolutions", "'conv'", "'tail'", "2 of the chosen", "'head'")),
        ({"conv": 3, "tail": 4}, ("'tail'", "2 channels", "4")),
    ],
)
def test_statistics_that_do_not_fit_the_layers(kind, channels, facts):
    selector = kind(random_statistics({"conv": 3, "body": 4, "tail": 2}), quantile=0.5)
    selector.check({"conv": 3})
    selector.check({"tail": 2, "conv": 3})
    with pytest.raises(StatisticsError) as caught:
        selector.check(channels)
    check_message(caught.value, *facts)


def test_statistics_that_do_not_fit_the_classes():
    selector = pg.ClassWise(random_statistics({"conv": 3}), quantile=0.5)
    selector.check_classes(5)
    for classes in (4, 6):
        with pytest.raises(StatisticsError) as caught:
            selector.check_classes(classes)
        check_message(caught.value, "5 classes", str(classes))


@pytest.mark.parametrize(
    ("use", "facts"),
    [
        (lambda: pg.ClassWise({}, quantile=0.1), ("`statistics`", "dict", "ChannelStatistics")),
        (lambda: pg.InstanceWise(None, quantile=0.1), ("`statistics`", "NoneType", "ChannelStatistics")),
        (
            lambda: pg.ClassWise(without_images_of(2), quantile=0.5).check_targets([1, 2]),
            ("class 2", "`labels='predicted'`"),
        ),
        (
            lambda: pg.ClassWise(few_ranked(), quantile=0.8).check({"conv": 4}),
            ("`quantile`", "0.8", "'conv'", "75%"),
        ),
        (
            lambda: pg.ClassWise(few_ranked(), alpha=math.exp(-1)).class_weights("conv"),
            ("`alpha`", str(math.exp(-1)), "'conv'", "`quantile=`"),
        ),
    ],
)
def test_an_error_names_what_the_statistics_lack(use, facts):
    with pytest.raises(StatisticsError) as caught:
        use()
    check_message(caught.value, *facts)


@pytest.mark.parametrize("kind", [pg.ClassWise, pg.InstanceWise])
def test_a_threshold_is_the_usual_quantile_unless_one_is_given(kind):
    statistics = random_statistics({"conv": 4})
    assert (kind(statistics).quantile, kind(statistics).alpha) == (0.1, None)
    assert (kind(statistics, quantile=0.3).quantile, kind(statistics, quantile=0.3).alpha) == (0.3, None)
    assert (kind(statistics, alpha=0.3).quantile, kind(statistics, alpha=0.3).alpha) == (None, 0.3)
