import dataclasses
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

import parchgrad as pg
from parchgrad.errors import SettingError, StatisticsError, StatisticsWarning
from parchgrad.selection import (
    LayerSignal,
    Selection,
    Selector,
    _is_safe,
    default_quantile,
    keep_best,
    make_selector,
)
from parchgrad.statistics import RankedLayerStatistics
from tests import reference
from tests.conftest import random_statistics


def signal(gradient, observation=None, classes=None):
    return LayerSignal(layer="conv", gradient=gradient, observation=observation, classes=classes)


def chosen(mask):
    return [set(row.nonzero().flatten().tolist()) for row in mask]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=12), st.floats(0.01, 1.0))
def test_keep_best_counts_and_includes_ties(scores, quantile):
    mask = keep_best(torch.tensor([scores, scores]).float(), quantile)
    assert chosen(mask) == [reference.best_channels(scores, quantile)] * 2


@pytest.mark.parametrize("quantile", [0.01, 0.25, 0.5, 1.0])
def test_gradient_energy_is_the_sum_of_squares(quantile):
    gradient = torch.randn(3, 8, 4, 5, dtype=torch.float64)
    expected = [
        reference.best_channels([sum(g * g for g in channel.flatten().tolist()) for channel in row], quantile)
        for row in gradient
    ]
    assert chosen(pg.GradientEnergy(quantile=quantile).select(signal(gradient))) == expected


@pytest.mark.parametrize(
    "selector", [pg.GradientEnergy(quantile=0.3), pg.GradientTimesActivation(quantile=0.3), pg.Evidence(quantile=0.3)]
)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e20])
def test_scale_of_the_gradient_does_not_change_the_choice(selector, scale):
    gradient, output = torch.randn(3, 20, 4, 4), torch.randn(3, 20, 4, 4)
    observation = selector.observe(output)
    expected = selector.select(signal(gradient, observation))
    assert torch.equal(selector.select(signal(scale * gradient, observation)), expected)


def test_gradient_times_activation_is_signed_and_reads_the_output_before_it_is_overwritten():
    selector = pg.GradientTimesActivation(quantile=0.25)
    gradient = torch.randn(3, 8, 4, 5, dtype=torch.float64)
    output = torch.randn(3, 8, 4, 5, dtype=torch.float64)
    products = (gradient * output).flatten(2)
    expected = [reference.best_channels([sum(channel.tolist()) for channel in row], 0.25) for row in products]
    observation = selector.observe(output)
    nn.functional.relu_(output)
    assert chosen(selector.select(signal(gradient, observation))) == expected


@pytest.mark.parametrize("space", [(4, 5), (6,), (2, 2, 3), (1, 1)])
@pytest.mark.parametrize("quantile", [0.1, 0.25, 0.6])
def test_evidence_is_the_reference_and_reads_the_output_before_it_is_overwritten(space, quantile):
    selector = pg.Evidence(quantile=quantile, positions=quantile)
    gradient, output = (torch.randn(4, 8, *space, dtype=torch.float64) for _ in range(2))
    output[0, 3] = 0.1
    expected = [
        reference.evidence(*pair) for pair in zip(gradient.flatten(2).tolist(), output.flatten(2).tolist(), strict=True)
    ]
    observation = selector.observe(output)
    nn.functional.relu_(output)
    found = selector.partition(signal(gradient, observation))
    assert chosen(found.channel_mask) == [reference.best_channels(scores, quantile) for _, scores in expected]
    weights = found.position_weights
    assert weights.shape == (4, *space)
    assert chosen(weights.flatten(1) == 1) == [reference.best_channels(places, quantile) for places, _ in expected]
    assert set(weights.unique().tolist()) <= {0.1, 1.0}
    alone = pg.Evidence(quantile=quantile, positions=1).partition(signal(gradient, observation))
    assert torch.equal(alone.channel_mask, found.channel_mask)
    assert alone.position_weights is None


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("level", [0.0, 0.1, 1234.5])
def test_evidence_depends_on_neither_level_nor_scale_of_the_output(scale, level):
    selector = pg.Evidence(quantile=0.3)
    gradient, output = torch.randn(2, 10, 6, 6), torch.randn(2, 10, 6, 6)
    expected = selector.partition(signal(gradient, selector.observe(output)))
    other = (output.double() + level).to(torch.float64 if level else torch.float32) * scale
    found = selector.partition(signal(gradient.to(other) / scale, selector.observe(other)))
    assert torch.equal(found.channel_mask, expected.channel_mask)
    assert torch.equal(found.position_weights == 1, expected.position_weights == 1)


def test_a_channel_that_is_the_same_everywhere_is_no_evidence():
    # Its mean is rounded: what is left would be taken for a direction.
    output = torch.full((1, 2, 7, 9), 0.1)
    output[0, 1] += 1e-3 * torch.randn(7, 9)
    selector = pg.Evidence(quantile=0.5)
    observation = selector.observe(output)
    assert not observation[0, 0].any()
    gradient = torch.randn(1, 2, 7, 9)
    gradient[0, 0] *= 1e6
    gradient[0, 1] = observation[0, 1].reshape(7, 9)
    assert chosen(selector.select(signal(gradient, observation))) == [{1}]


def test_evidence_of_half_precision_is_summed_in_float32():
    selector = pg.Evidence(quantile=0.3, positions=0.3)
    output, gradient = (torch.randn(2, 10, 40, 50).bfloat16() for _ in range(2))
    expected = selector.partition(signal(gradient.float(), selector.observe(output.float())))
    found = selector.partition(signal(gradient, selector.observe(output)))
    with torch.autocast("cpu", torch.bfloat16):
        autocast = selector.partition(signal(gradient, selector.observe(output)))
    for one in (found, autocast):
        assert torch.equal(one.channel_mask, expected.channel_mask)
        assert torch.equal(one.position_weights, expected.position_weights)
    # What the study has chosen.
    assert pg.Evidence() == pg.Evidence(quantile=0.2, positions=0.4)


@pytest.mark.parametrize("kind", [pg.GradientEnergy, pg.GradientTimesActivation])
def test_half_precision_is_ranked_in_float32(kind):
    # Sums of 4,000 positions that differ by less than half precision resolves.
    gradient = torch.ones(1, 3, 4000, dtype=torch.bfloat16)
    gradient[0, 2, :10] = 1.5
    selector = kind(quantile=0.34)
    observation = selector.observe(torch.ones(1, 3, 4000))
    assert chosen(selector.select(signal(gradient, observation))) == [{2}]


def test_half_precision_gap_is_averaged_in_float32():
    output = torch.full((1, 1, 4096), 40.0, dtype=torch.float16)
    output[..., 0] = 0
    gap = pg.InstanceWise(random_statistics({"conv": 1}), alpha=0.5).observe(output)
    assert gap.dtype == torch.float32
    torch.testing.assert_close(gap, torch.tensor([[40 * 4095 / 4096]]))


def test_alpha_itself_is_kept():
    statistics = random_statistics({"conv": 6})
    p = float(statistics["conv"].class_log_p()[2, 1].exp())
    mask = pg.ClassWise(statistics, alpha=p * (1 + 1e-12)).select(
        signal(torch.zeros(1, 6, 1), classes=torch.tensor([1]))
    )
    assert 2 in chosen(mask)[0]


def test_a_signal_without_what_the_selector_needs():
    bare = signal(torch.zeros(1, 3, 1))
    statistics = random_statistics({"conv": 3})
    for selector, name in (
        (pg.GradientTimesActivation(), "observation"),
        (pg.Evidence(), "observation"),
        (pg.ClassWise(statistics, alpha=0.1), "classes"),
        (pg.InstanceWise(statistics, alpha=0.1), "observation"),
    ):
        sentence = f"^The layer signal comes without {name}, which this selector needs; see LayerSignal\\.$"
        with pytest.raises(SettingError, match=sentence):
            selector.select(bare)


def test_selectors_say_whether_they_need_a_class():
    gradient = torch.randn(2, 6, 3, 3)
    for selector in every_selector():
        bare = signal(gradient, selector.observe(gradient))
        if selector.needs_class:
            with pytest.raises(SettingError, match="without classes"):
                selector.select(bare)
        else:
            assert selector.select(bare).shape == (2, 6)


def test_random_channels_depend_on_seed_and_layer_alone():
    gradient = torch.zeros(4, 40, 2, 2)
    selector = pg.RandomChannels(quantile=0.25, seed=7)
    first = selector.select(signal(gradient))
    assert first.sum(1).tolist() == [10] * 4
    assert torch.equal(first, pg.RandomChannels(quantile=0.25, seed=7).select(signal(gradient + 1)))
    other_layer = selector.select(LayerSignal(layer="other", gradient=gradient))
    other_seed = pg.RandomChannels(quantile=0.25, seed=8).select(signal(gradient))
    assert not torch.equal(first, other_layer)
    assert not torch.equal(first, other_seed)


def test_random_channels_are_drawn_evenly():
    draws = sum(
        pg.RandomChannels(quantile=0.2, seed=seed).select(signal(torch.zeros(1, 10, 1))).long() for seed in range(500)
    )
    # 500 draws of 2 out of 10: 100 each on average.
    assert stats.chisquare(draws[0].numpy()).pvalue > 1e-3


def test_fixed_channels_per_layer_or_per_row():
    rows = torch.tensor([[True, False], [False, True]])
    assert torch.equal(pg.FixedChannels({"conv": rows}).select(signal(torch.zeros(2, 2, 3))), rows)
    same = pg.FixedChannels({"conv": rows[0]}).select(signal(torch.zeros(2, 2, 3)))
    assert torch.equal(same, rows[[0, 0]])
    wide = torch.tensor([[True, False, False]] * 2)
    assert torch.equal(pg.FixedChannels({"conv": wide}).select(signal(torch.zeros(2, 3, 3))), wide)
    sentence = (
        "The mask of layer 'conv' has 2 rows, but the pass has 3; give a mask of shape (C,), or one row per row of "
        "the pass."
    )
    with pytest.raises(SettingError, match=f"^{re.escape(sentence)}$"):
        pg.FixedChannels({"conv": wide}).select(signal(torch.zeros(3, 3, 3)))


@pytest.mark.parametrize("test", ["welch", "student"])
def test_class_wise_ranks_by_scipys_p_value(test):
    generator = torch.Generator().manual_seed(2)
    samples = torch.rand(60, 12, generator=generator, dtype=torch.float64)
    labels = torch.arange(60) % 3
    groups = [samples[labels == label] for label in range(3)]
    statistics = pg.ChannelStatistics({"conv": layer_of(samples, groups)})
    selector = pg.ClassWise(statistics, quantile=0.25, test=test)
    classes = torch.tensor([2, 0, 1, 2])
    expected = []
    for label in classes.tolist():
        rest = samples[labels != label]
        p = stats.ttest_ind(groups[label], rest, equal_var=test == "student", alternative="greater").pvalue
        expected.append(reference.best_channels((-p).tolist(), 0.25))
    assert chosen(selector.select(signal(torch.zeros(4, 12, 2), classes=classes))) == expected


def layer_of(samples, groups, shapiro_p=None):
    return pg.LayerStatistics(
        count=torch.tensor(len(samples)),
        mean=samples.mean(0),
        std=samples.std(0),
        class_count=torch.tensor([len(group) for group in groups]),
        class_mean=torch.stack([group.mean(0) for group in groups], dim=1),
        class_variance=torch.stack([group.var(0) for group in groups], dim=1),
        shapiro_p=torch.zeros(samples.shape[1]) if shapiro_p is None else shapiro_p,
    )


def test_class_wise_orders_p_values_below_the_smallest_double():
    spread = torch.linspace(-1, 1, 300, dtype=torch.float64).unsqueeze(1) * torch.ones(1, 4)
    strong = spread + torch.tensor([0.0, 100.0, 300.0, 200.0])
    statistics = pg.ChannelStatistics({"conv": layer_of(torch.cat((strong, spread)), [strong, spread])})
    log_p = statistics["conv"].class_log_p("student")[:, 0]
    assert (log_p[1:] < math.log(1e-320)).all()
    selector = pg.ClassWise(statistics, quantile=0.25, test="student")
    assert chosen(selector.select(signal(torch.zeros(1, 4, 1), classes=torch.tensor([0])))) == [{2}]


def test_class_wise_alpha_keeps_p_values_up_to_it():
    statistics = random_statistics({"conv": 30})
    p = statistics["conv"].class_log_p().exp()
    mask = pg.ClassWise(statistics, alpha=0.3).select(signal(torch.zeros(2, 30, 1), classes=torch.tensor([1, 4])))
    assert torch.equal(mask, (p <= 0.3).T[[1, 4]])


def test_normality_gate_follows_the_ranking():
    statistics = random_statistics({"conv": 10})
    gate = torch.arange(10) % 2 == 0
    layer = pg.LayerStatistics(
        **{
            name: getattr(statistics["conv"], name)
            for name in ("count", "mean", "std", "class_count", "class_mean", "class_variance")
        },
        shapiro_p=torch.where(gate, 0.01, 0.5),
    )
    statistics = pg.ChannelStatistics({"conv": layer})
    one = signal(torch.zeros(1, 10, 1), observation=torch.rand(1, 10), classes=torch.tensor([3]))
    for kind in (pg.ClassWise, pg.InstanceWise):
        free = kind(statistics, quantile=0.5, normality_threshold=None).select(one)
        assert free.sum() == 5
        assert torch.equal(kind(statistics, quantile=0.5).select(one), free & gate)
        assert not kind(statistics, quantile=0.5, normality_threshold=1e-9).select(one).any()


def test_constant_channels_and_classes_without_images_are_never_significant():
    samples = torch.rand(20, 4, dtype=torch.float64)
    samples[:, 1] = 0.5
    groups = [samples[:10], samples[10:]]
    layer = layer_of(samples, groups)
    fields = ("mean", "std", "count", "shapiro_p")
    with_empty = pg.LayerStatistics(
        **{name: getattr(layer, name) for name in fields},
        class_count=torch.tensor([10, 10, 0]),
        class_mean=torch.cat((layer.class_mean, torch.zeros(4, 1)), dim=1),
        class_variance=torch.cat((layer.class_variance, torch.full((4, 1), math.nan)), dim=1),
    )
    statistics = pg.ChannelStatistics({"conv": with_empty})
    assert torch.equal(with_empty.class_log_p()[1], torch.zeros(3, dtype=torch.float64))
    mask = pg.ClassWise(statistics, quantile=0.25).select(signal(torch.zeros(1, 4, 1), classes=torch.tensor([2])))
    assert not mask.any()
    gap = torch.full((1, 4), 9.0)
    mask = pg.InstanceWise(statistics, alpha=0.05).select(signal(torch.zeros(1, 4, 1), observation=gap))
    assert chosen(mask) == [{0, 2, 3}]
    # Not even where all places of the ranking are theirs.
    samples[:, :3] = 0.1
    statistics = pg.ChannelStatistics({"conv": layer_of(samples, [samples[:10], samples[10:]])})
    mask = pg.InstanceWise(statistics, quantile=1.0).select(signal(torch.zeros(1, 4, 1), observation=gap))
    assert chosen(mask) == [{3}]


@pytest.mark.parametrize("settings_", [{"quantile": 0.2}, {"alpha": 0.4}])
def test_instance_wise_uses_the_upper_tail_of_the_normal(settings_):
    statistics = random_statistics({"conv": 20})
    selector = pg.InstanceWise(statistics, **settings_)
    output = torch.randn(3, 20, 4, 4, dtype=torch.float64) + 1
    layer = statistics["conv"]
    mask = selector.select(signal(torch.zeros(3, 20, 4, 4), observation=selector.observe(output)))
    for row, kept in zip(output, chosen(mask), strict=True):
        gap = [sum(max(value, 0.0) for value in channel.flatten().tolist()) / 16 for channel in row]
        p = [
            stats.norm.sf((value - mean) / std)
            for value, mean, std in zip(gap, layer.mean.tolist(), layer.std.tolist(), strict=True)
        ]
        if "alpha" in settings_:
            assert kept == {channel for channel, value in enumerate(p) if value <= 0.4}
        else:
            assert kept == reference.best_channels([-value for value in p], 0.2)


def test_instance_wise_orders_scores_whose_p_value_underflows():
    statistics = random_statistics({"conv": 3})
    layer = statistics["conv"]
    # 60 and 50 standard deviations out: both p-values are zero in float64.
    gap = layer.mean + torch.tensor([0.0, 50.0, 60.0]) * layer.std
    mask = pg.InstanceWise(statistics, quantile=0.34).select(signal(torch.zeros(1, 3, 1), observation=gap.unsqueeze(0)))
    assert chosen(mask) == [{2}]


QUANTILE = "quantile is {}, but it must lie in (0, 1]: the share of channels that is kept."
ONE_OF_TWO = "Exactly one of quantile and alpha must be given, but {}; give one."
ALPHA = "alpha is {}, but it must lie in (0, 1): the largest p-value that is kept."
NORMALITY = "normality_threshold is {}, but it must lie in (0, 1], or be None for no gate."
POSITIONS = "positions is {}, but it must lie in (0, 1]: the share of the places."
MASK = "The mask of layer 'conv' is {}, but it must be boolean of shape (C,) or (B, C)."


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda s: pg.GradientEnergy(quantile=0.0), QUANTILE.format("0.0")),
        (lambda s: pg.GradientTimesActivation(quantile=1.1), QUANTILE.format("1.1")),
        (lambda s: pg.Evidence(quantile=0), QUANTILE.format("0")),
        (lambda s: pg.Evidence(positions=0), POSITIONS.format("0")),
        (lambda s: pg.Evidence(positions=1.5), POSITIONS.format("1.5")),
        (lambda s: pg.Evidence(positions="all"), POSITIONS.format("'all'")),
        (lambda s: pg.RandomChannels(quantile=math.nan), QUANTILE.format("nan")),
        (lambda s: pg.GradientEnergy(quantile="a"), QUANTILE.format("'a'")),
        (lambda s: pg.RandomChannels(seed="a"), "seed is 'a', but it must be a whole number."),
        (
            lambda s: pg.FixedChannels([torch.ones(3) > 0]),
            "masks is of type list, but a dictionary is needed; give {name of a layer: mask}.",
        ),
        (
            lambda s: pg.FixedChannels({"conv": [True]}),
            "The mask of layer 'conv' is of type list, but a Tensor is needed; give a boolean tensor (C,) or (B, C).",
        ),
        (lambda s: pg.FixedChannels({"conv": torch.ones(3)}), MASK.format("torch.float32 of shape (3,)")),
        (lambda s: pg.FixedChannels({"conv": torch.ones(()) > 0}), MASK.format("torch.bool of shape ()")),
        (lambda s: pg.FixedChannels({"conv": torch.ones(1, 3, 1) > 0}), MASK.format("torch.bool of shape (1, 3, 1)")),
        (lambda s: pg.ClassWise(s), ONE_OF_TWO.format("neither is")),
        (lambda s: pg.ClassWise(s, quantile=0.1, alpha=0.1), ONE_OF_TWO.format("both are")),
        (lambda s: pg.InstanceWise(s, quantile=0.1, alpha=0.1), ONE_OF_TWO.format("both are")),
        *((lambda s, a=a: pg.InstanceWise(s, alpha=a), ALPHA.format(a)) for a in (0.0, 1.0, 1.5)),
        (lambda s: pg.ClassWise(s, quantile=2.0), QUANTILE.format("2.0")),
        *(
            (lambda s, t=t: pg.ClassWise(s, quantile=0.1, normality_threshold=t), NORMALITY.format(t))
            for t in (0.0, 1.5)
        ),
        (
            lambda s: pg.ClassWise(s, quantile=0.1, test="fisher"),
            "test is 'fisher', but it must be one of welch, student.",
        ),
    ],
)
def test_bad_settings(build, sentence):
    with pytest.raises(SettingError, match=f"^{re.escape(sentence)}$"):
        build(random_statistics({"conv": 3}))


def test_settings_at_the_ends_of_their_ranges():
    statistics = random_statistics({"conv": 3})
    assert pg.Evidence(positions=1).positions == 1
    # Every channel is far from normal, and all of them are the best.
    assert pg.ClassWise(statistics, quantile=1, normality_threshold=1).class_masks("conv").all()
    assert pg.InstanceWise(statistics, quantile=1.0).quantile == 1


def test_statistics_are_needed():
    with pytest.raises(StatisticsError, match=r"^statistics is a dict, but this selector needs ChannelStatistics\.$"):
        pg.ClassWise({}, quantile=0.1)


@pytest.mark.parametrize(
    ("channels", "sentence"),
    [
        (
            {"conv": 3, "head": 3},
            "The statistics are of 1 convolutions, from 'conv' to 'conv', but 1 others are chosen, such as 'head'; "
            "choose among theirs, or collect statistics of all.",
        ),
        (
            {"conv": 4},
            "The statistics of layer 'conv' have 3 channels, the layer has 4; they were collected on another model.",
        ),
    ],
)
def test_statistics_must_fit_the_layers(channels, sentence):
    for kind in (pg.ClassWise, pg.InstanceWise):
        selector = kind(random_statistics({"conv": 3}), quantile=0.5)
        selector.check({"conv": 3})
        with pytest.raises(StatisticsError, match=f"^{re.escape(sentence)}$"):
            selector.check(channels)


def test_statistics_must_fit_the_classes():
    selector = pg.ClassWise(random_statistics({"conv": 3}), quantile=0.5)
    sentence = "The statistics are of 5 classes, but the model's output has 7; collect statistics on this model."
    with pytest.raises(StatisticsError, match=f"^{re.escape(sentence)}$"):
        selector.check_classes(7)


@pytest.mark.parametrize(
    ("channels", "sentence"),
    [
        ({"head": 3}, "No mask is given for layer 'head'; give one, or leave the layer out of layers."),
        ({"conv": 3}, "The mask of layer 'conv' has 2 channels, the layer has 3; give one of its own."),
        ({"rows": 3}, "The mask of layer 'rows' has 2 channels, the layer has 3; give one of its own."),
    ],
)
def test_masks_must_fit_the_layers(channels, sentence):
    selector = pg.FixedChannels({"conv": torch.ones(2) > 0, "rows": torch.ones(3, 2) > 0})
    selector.check({"conv": 2, "rows": 2})
    with pytest.raises(SettingError, match=f"^{re.escape(sentence)}$"):
        selector.check(channels)


def test_restricted_classes_are_looked_up_and_others_refused():
    full = random_statistics({"conv": 8}, classes=5)
    some = pg.ClassWise(full.restrict(classes=[1, 4]), quantile=0.3)
    some.check_classes(5)
    signal = LayerSignal(layer="conv", gradient=torch.ones(3, 8, 1), classes=torch.tensor([4, 1, 4]))
    assert torch.equal(some.select(signal), pg.ClassWise(full, quantile=0.3).select(signal))
    other = LayerSignal(layer="conv", gradient=torch.ones(1, 8, 1), classes=torch.tensor([2]))
    with pytest.raises(StatisticsError, match="not class 2"):
        some.select(other)
    with pytest.raises(StatisticsError, match="of 5 classes, but the model's output has 2"):
        some.check_classes(2)


def test_single_images_of_a_class_are_said_once():
    statistics = random_statistics({"a": 4, "b": 4}, classes=5, images=8)
    with pytest.warns(StatisticsWarning, match="2 of 5 classes have fewer than two images") as said:
        selector = pg.ClassWise(statistics, quantile=0.5)
    assert len(said) == 1
    selector.class_masks("b")
    pg.ClassWise(statistics, quantile=0.5, test="student")


def test_the_warning_names_the_line_that_makes_the_selector():
    statistics = random_statistics({"conv": 4}, classes=5, images=8)
    with pytest.warns(StatisticsWarning) as said:
        pg.ClassWise(statistics, quantile=0.5)
    assert said[0].filename == __file__


def test_selectors_by_their_short_names():
    statistics = random_statistics({"conv": 4})
    assert make_selector("random", quantile=0.2) == pg.RandomChannels(quantile=0.2)
    assert isinstance(make_selector("class", quantile=0.2, statistics=statistics), pg.ClassWise)
    assert isinstance(make_selector("instance", quantile=0.2, statistics=statistics), pg.InstanceWise)
    for name in ("class", "instance"):
        sentence = f"The selector {name!r} needs channel statistics; collect some, or choose 'energy'."
        with pytest.raises(StatisticsError, match=f"^{re.escape(sentence)}$"):
            make_selector(name, quantile=0.2)
    sentence = "selector is 'best', but it must be one of energy, activation, evidence, random, class, instance."
    with pytest.raises(SettingError, match=f"^{re.escape(sentence)}$"):
        make_selector("best", quantile=0.2)


def test_a_selector_by_its_name_has_the_settings_that_are_given():
    statistics = random_statistics({"conv": 4})
    assert make_selector("random", quantile=0.2, seed=3) == pg.RandomChannels(quantile=0.2, seed=3)
    assert make_selector("random") == pg.RandomChannels()
    assert make_selector("energy") == pg.GradientEnergy()
    assert make_selector("activation", quantile=0.7) == pg.GradientTimesActivation(quantile=0.7)
    assert make_selector("evidence") == pg.Evidence()
    for name in ("class", "instance"):
        assert make_selector(name, statistics=statistics).quantile == default_quantile(name) == 0.1
        assert make_selector(name, statistics=statistics, quantile=0.3).statistics is statistics
    assert make_selector("class", statistics=statistics).test == "welch"
    assert make_selector("class", statistics=statistics.compact(test="student")).test == "student"


def near_ties(rows, channels=20):
    """Channels that are permutations of each other: their energies differ by rounding alone."""
    values = torch.randn(rows, 1, 300)
    return torch.stack([values[row, 0, torch.randperm(300)] for row in range(rows) for _ in range(channels)]).reshape(
        rows, channels, 300
    )


def test_energy_ranks_alike_at_any_scale_and_in_any_batch():
    gradient = near_ties(6)
    selector = pg.GradientEnergy(quantile=0.3)

    def masks(values):
        return selector.select(LayerSignal(layer="conv", gradient=values))

    expected = masks(gradient)
    for scale in (2.0**-100, 2.0**-74, 2.0**-50, 2.0**-31, 2.0**-29, 2.0**70, 2.0**100):
        assert torch.equal(masks(gradient * scale), expected)
    # A row of zeros, tiny and huge rows beside them change nothing.
    others = torch.cat((torch.zeros(1, 20, 300), gradient[:1] * 2.0**-90, gradient[1:2] * 2.0**90))
    assert torch.equal(masks(torch.cat((others, gradient)))[3:], expected)
    assert torch.equal(masks(torch.cat((others, gradient)))[1:3], expected[:2])
    alone = torch.cat([masks(row.unsqueeze(0)) for row in gradient])
    assert torch.equal(alone, expected)


def test_energy_at_the_ends_of_the_range():
    selector = pg.GradientEnergy(quantile=0.3)
    # Whole numbers keep all their digits as subnormals.
    gradient = -torch.randint(1, 16, (2, 20, 50)).float()
    gradient[:, :, 1:] *= torch.randint(0, 2, (2, 20, 49))
    expected = selector.select(LayerSignal(layer="conv", gradient=gradient.double()))
    for scale in (2.0**-148, 2.0**-145, 2.0**-126, 2.0**120, 2.0**123):
        assert torch.equal(selector.select(LayerSignal(layer="conv", gradient=gradient * scale)), expected)


def test_energy_far_below_the_largest_is_ranked_all_the_same():
    selector = pg.GradientEnergy(quantile=0.1)
    gradient = 1e-7 * torch.randn(3, 64, 49)
    gradient[::2, 0] = torch.randn(49)
    mask = selector.select(LayerSignal(layer="conv", gradient=gradient))
    assert torch.equal(mask, selector.select(LayerSignal(layer="conv", gradient=gradient.double())))
    assert mask.sum(1).tolist() == [6, 6, 6]
    # The squares of the others vanish in float32, that of the largest does not.
    gradient[::2, 0] *= 1e8
    for scale in (2.0**-54, 2.0**-51, 2.0**-49, 2.0**-30, 1.0):
        assert torch.equal(selector.select(LayerSignal(layer="conv", gradient=scale * gradient[::2])), mask[::2])


def test_energy_of_half_precision_gradients():
    gradient = torch.randn(2, 20, 50)
    selector = pg.GradientEnergy(quantile=0.3)
    expected = selector.select(LayerSignal(layer="conv", gradient=gradient.double()))
    assert torch.equal(selector.select(LayerSignal(layer="conv", gradient=gradient)), expected)
    half = gradient.half()
    expected = selector.select(LayerSignal(layer="conv", gradient=half.double()))
    assert torch.equal(selector.select(LayerSignal(layer="conv", gradient=half)), expected)


def test_a_layer_of_dead_channels_hides_no_class():
    def layer(mean, variance):
        return pg.LayerStatistics(
            count=torch.tensor(60),
            mean=mean.mean().reshape(1),
            std=torch.tensor([float(variance)]),
            class_count=torch.tensor([20, 20, 20]),
            class_mean=mean.unsqueeze(0),
            class_variance=torch.full((1, 3), float(variance)),
            shapiro_p=torch.tensor([0.01]),
        )

    dead, alive = layer(torch.zeros(3), 0), layer(torch.tensor([2.0, 0.0, 1.0]), 1)
    for layers in ({"dead": dead, "alive": alive}, {"alive": alive, "dead": dead}):
        held = pg.ChannelStatistics(layers)
        for statistics in (held, held.compact(share=1.0)):
            pg.ClassWise(statistics, quantile=1.0).check_targets([0, 2, 7, -1])


def test_a_selector_without_places_partitions_by_its_mask_alone():
    class Largest(Selector):
        def select(self, signal):
            return keep_best(signal.gradient.flatten(2).sum(2), 0.1)

    gradient = torch.randn(3, 6, 2, 2)
    found = Largest().partition(signal(gradient))
    assert isinstance(found, Selection)
    assert torch.equal(found.channel_mask, Largest().select(signal(gradient)))
    assert found.position_weights is None


def every_selector(channels=6):
    statistics = random_statistics({"conv": channels})
    return [
        pg.GradientEnergy(quantile=0.3),
        pg.GradientTimesActivation(quantile=0.3),
        pg.Evidence(quantile=0.3),
        pg.RandomChannels(quantile=0.3),
        pg.FixedChannels({"conv": torch.arange(channels) < 2}),
        pg.ClassWise(statistics, quantile=0.3),
        pg.ClassWise(statistics, alpha=0.3),
        pg.InstanceWise(statistics, quantile=0.3),
        pg.InstanceWise(statistics, alpha=0.3, normality_threshold=None),
    ]


@pytest.mark.parametrize("selector", every_selector(), ids=lambda selector: type(selector).__name__)
def test_no_number_is_read_off_a_device(selector):
    # A tensor of the meta device holds none: reading one, or mixing it with another device, is an error.
    selector = dataclasses.replace(selector)
    gradient = torch.empty(3, 6, 4, 4, device="meta")
    classes = torch.empty(3, dtype=torch.long, device="meta")
    found = selector.partition(signal(gradient, selector.observe(gradient), classes))
    assert found.channel_mask.device.type == "meta"
    assert found.channel_mask.shape == (3, 6)
    weights = found.position_weights
    assert weights is None or (weights.device.type == "meta" and weights.shape == (3, 4, 4))
    if isinstance(selector, pg.ClassWise):
        assert [mask.device.type for mask in selector._masks.values()] == ["meta"]


@pytest.mark.parametrize("selector", every_selector(), ids=lambda selector: type(selector).__name__)
def test_a_pass_without_rows(selector):
    gradient = torch.empty(0, 6, 4, 4)
    observation = selector.observe(gradient)
    found = selector.partition(signal(gradient, observation, torch.empty(0, dtype=torch.long)))
    assert found.channel_mask.shape == (0, 6)


@pytest.mark.parametrize("selector", every_selector()[:3], ids=lambda selector: type(selector).__name__)
def test_a_layer_without_space(selector):
    gradient, output = torch.randn(4, 6), torch.randn(4, 6)
    found = selector.select(signal(gradient, selector.observe(output)))
    single = selector.select(signal(gradient.unsqueeze(2), selector.observe(output.unsqueeze(2))))
    assert torch.equal(found, single)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("selector", every_selector()[:3], ids=lambda selector: type(selector).__name__)
def test_ordinary_gradients_do_not_pay_for_the_ends_of_the_range(selector, rows, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError

    monkeypatch.setattr("parchgrad.selection.safe_norm", refuse)
    monkeypatch.setattr("torch.frexp", refuse)
    gradient, output = torch.randn(rows, 6, 4, 4), torch.randn(rows, 6, 4, 4)
    assert selector.select(signal(gradient, selector.observe(output))).sum(1).tolist() == [1] * rows


SCALES = {
    "tiny and huge": [1.0, 2.0**-140, 2.0**-120, 2.0**-75, 2.0**75, 2.0**120],
    "tiny": [1.0, 2.0**-140, 2.0**-120, 2.0**-75, 2.0**-40, 1.0],
}


@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("space", [(1, 1), (5, 5)])
@pytest.mark.parametrize("selector", every_selector()[:3], ids=lambda selector: type(selector).__name__)
def test_rows_of_every_scale_in_one_batch(selector, space, scales):
    # Whole numbers keep all their digits as subnormals.
    gradient, output = (torch.randint(-15, 16, (6, 20, *space)).float() for _ in range(2))
    if space == (5, 5):
        output -= output.flatten(2).mean(2)[..., None, None].round()
    expected = selector.select(signal(gradient.double(), selector.observe(output.double())))
    scales = torch.tensor(scales).reshape(6, 1, 1, 1)
    for scaled, observed in ((gradient, output), (gradient * scales, output), (gradient * scales, output * scales)):
        if isinstance(selector, pg.GradientTimesActivation) and observed is not output:
            observed = output * scales.flip(0)
        found = selector.select(signal(scaled, selector.observe(observed)))
        assert torch.equal(found, expected)
        for row in range(6):
            alone = signal(scaled[row : row + 1], selector.observe(observed[row : row + 1]))
            assert torch.equal(selector.select(alone), expected[row : row + 1])


def test_only_what_was_read_is_known_to_be_safe():
    assert _is_safe(torch.ones(2, 3, 4))
    for unknown in (torch.ones(2, 3, 4, device="meta"), torch.ones(2, 0, 4), torch.ones(0, 3, 4)):
        assert not _is_safe(unknown)
    for scale in (2.0**-31, 2.0**31, 0.0):
        assert not _is_safe(torch.tensor([1.0, scale]).reshape(2, 1, 1))


@pytest.mark.parametrize("scale", [2.0**-660, 2.0**660])
@pytest.mark.parametrize("selector", every_selector()[:3], ids=lambda selector: type(selector).__name__)
def test_double_precision_far_beyond_where_squares_vanish(selector, scale):
    gradient, output = (torch.randn(3, 20, 4, 4, dtype=torch.float64) for _ in range(2))
    observation = selector.observe(output)
    expected = selector.select(signal(gradient, observation))
    if isinstance(selector, pg.Evidence):
        scale = math.sqrt(scale) / 2**90 if scale > 1 else math.sqrt(scale) * 2**90
    assert torch.equal(selector.select(signal(gradient * scale, observation)), expected)


@pytest.mark.parametrize("selector", every_selector()[:3], ids=lambda selector: type(selector).__name__)
def test_a_row_without_gradient_keeps_every_channel(selector):
    gradient, output = torch.randn(3, 6, 4, 4), torch.randn(3, 6, 4, 4)
    gradient[1] = 0
    mask = selector.select(signal(gradient, selector.observe(output)))
    assert mask.sum(1).tolist() == [1, 6, 1]


@pytest.mark.parametrize("selector", every_selector()[:3], ids=lambda selector: type(selector).__name__)
def test_huge_gradients_where_subnormal_numbers_are_flushed_to_zero(selector):
    gradient, output = torch.randn(3, 20, 4, 4), torch.randn(3, 20, 4, 4)
    gradient *= 3e38 / gradient.abs().max()
    expected = selector.select(signal(gradient.double(), selector.observe(output.double())))
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    try:
        found = selector.select(signal(gradient, selector.observe(output)))
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("space", [(3,), (7, 7), (56, 56)])
def test_levels_alone_leave_nothing_of_a_channel(space):
    levels = 10 ** (6 * torch.rand(2, 30) - 3)
    output = levels.reshape(2, 30, *[1] * len(space)) * torch.ones(2, 30, *space)
    varied = output.clone()
    varied[:, ::2] += 1e-2 * levels[:, ::2].reshape(2, 15, *[1] * len(space)) * torch.randn(2, 15, *space)
    assert not pg.Evidence().observe(output).any()
    observed = pg.Evidence().observe(varied)
    assert not observed[:, 1::2].any()
    # What varies by a hundredth of its level is taken as it is, in its own unit.
    flat = varied[:, ::2].flatten(2)
    assert torch.equal(observed[:, ::2], flat - flat.mean(2, keepdim=True))


def test_the_output_of_a_single_place_is_observed_as_it_is():
    output = torch.randn(3, 6, 1, 1)
    observed = pg.Evidence().observe(output)
    assert torch.equal(observed, output.flatten(2))
    output.zero_()
    assert observed.all()


def test_channels_at_the_very_threshold():
    layer = pg.LayerStatistics(
        count=torch.tensor(40),
        mean=torch.zeros(3),
        std=torch.ones(3),
        class_count=torch.tensor([20, 20]),
        class_mean=torch.tensor([[1.0, -1.0]] * 3),
        class_variance=torch.ones(3, 2),
        shapiro_p=torch.tensor([0.05, 0.04, 0.0], dtype=torch.float64),
    )
    statistics = pg.ChannelStatistics({"conv": layer})
    # A p-value of alpha itself is kept, one of the normality threshold itself is not.
    observation = torch.tensor([[9.0, 0.0, -1e-6]], dtype=torch.float64)
    found = pg.InstanceWise(statistics, alpha=0.5).select(signal(torch.zeros(1, 3, 1), observation))
    assert found.tolist() == [[False, True, False]]
    assert pg.ClassWise(statistics, quantile=1.0).class_masks("conv")[0].tolist() == [False, True, True]


def test_a_constant_channel_takes_no_place_of_another():
    statistics = random_statistics({"conv": 4})
    layer = statistics["conv"]
    fields = ("count", "class_count", "class_mean", "class_variance", "shapiro_p")
    std, mean = layer.std.clone(), layer.mean
    std[2] = 0
    layer = pg.LayerStatistics(mean=mean, std=std, **{name: getattr(layer, name) for name in fields})
    gap = mean + torch.tensor([0.3, 0.1, 5.0, 0.2]) * layer.std.max()
    expected = max((float((gap[c] - mean[c]) / std[c]), c) for c in (0, 1, 3))[1]
    for value in (float(gap[2]) + 5, float(mean[2])):
        gap[2] = value
        found = pg.InstanceWise(pg.ChannelStatistics({"conv": layer}), quantile=0.25).select(
            signal(torch.zeros(1, 4, 1), gap.unsqueeze(0))
        )
        assert chosen(found) == [{expected}]


def test_every_layer_and_class_has_its_own_mask():
    statistics = random_statistics({"a": 30, "b": 30}, seed=4)
    selector = pg.ClassWise(statistics, quantile=0.2)
    for layer in ("a", "b", "a"):
        one = LayerSignal(layer=layer, gradient=torch.zeros(5, 30, 1), classes=torch.arange(5))
        expected = [
            reference.best_channels((-statistics[layer].class_log_p()[:, label]).tolist(), 0.2) for label in range(5)
        ]
        assert chosen(selector.select(one)) == expected


def test_a_class_beyond_all_that_are_held():
    some = pg.ClassWise(random_statistics({"conv": 8}).restrict(classes=[1, 2]), quantile=0.3)
    for missing in (0, 3, 4):
        with pytest.raises(StatisticsError, match=f"not class {missing}"):
            some.select(signal(torch.ones(2, 8, 1), classes=torch.tensor([1, missing])))


@pytest.mark.parametrize("empty", [0, 2, 4])
def test_targets_without_images(empty):
    layer = random_statistics({"conv": 3})["conv"]
    fields = ("count", "mean", "std", "class_mean", "class_variance", "shapiro_p")
    counts = torch.where(torch.arange(5) == empty, 0, layer.class_count)
    layer = pg.LayerStatistics(class_count=counts, **{name: getattr(layer, name) for name in fields})
    selector = pg.ClassWise(pg.ChannelStatistics({"conv": layer}), quantile=0.5)
    # Whether the model has a class is for others to say.
    selector.check_targets([label for label in range(-1, 7) if label != empty])
    sentence = (
        f"The statistics hold no image of class {empty}, so that nothing is known about it; collect them with images "
        "of this class, or with predicted labels."
    )
    with pytest.raises(StatisticsError, match=f"^{re.escape(sentence)}$"):
        selector.check_targets([1, empty, 3])


def ranked(log_p, share):
    channels = len(log_p)
    layer = RankedLayerStatistics(
        mean=torch.zeros(channels),
        std=torch.ones(channels),
        shapiro_p=torch.zeros(channels),
        log_p=torch.tensor(log_p),
        test="welch",
        share=share,
    )
    return pg.ChannelStatistics({"conv": layer})


def test_one_image_is_enough_to_know_a_class():
    statistics = random_statistics({"conv": 4}, classes=5, images=9)
    pg.ClassWise(statistics, quantile=0.5, test="student").check_targets([4])


@pytest.mark.parametrize("layers", [("a", "b"), ("b", "a")])
def test_targets_that_no_layer_of_ranked_statistics_knows(layers):
    # The first layer knows the first class by one channel of two, the second layer the second class.
    known = {"a": ranked([[-3.0, 0.0, 0.0], [0.0, 0.0, 0.0]], 0.5), "b": ranked([[0.0, -2.0, 0.0]] * 2, 0.5)}
    statistics = pg.ChannelStatistics({layer: known[layer]["conv"] for layer in layers})
    selector = pg.ClassWise(statistics, quantile=0.5)
    selector.check_targets([0, 1])
    with pytest.raises(StatisticsError, match="no image of class 2"):
        selector.check_targets([0, 2])


def test_a_quantile_beyond_what_compact_statistics_rank():
    statistics = ranked([[-3.0, 0.0], [-2.0, -1.0], [0.0, -4.0], [0.0, 0.0]], 0.5)
    pg.ClassWise(statistics, quantile=0.5).check({"conv": 4})
    pg.ClassWise(statistics, alpha=0.05).check({"conv": 4})
    sentence = (
        "The statistics of layer 'conv' are compact: they rank the best 50% of the channels only, but quantile is "
        "0.6; lower it, or collect full statistics."
    )
    with pytest.raises(StatisticsError, match=f"^{re.escape(sentence)}$"):
        pg.ClassWise(statistics, quantile=0.6).check({"conv": 4})


def test_alpha_on_compact_statistics():
    # The first class holds p-values on both sides of alpha, the second none at all.
    log_p = [[-3.0, 0.0], [-1.0, 0.0], [-0.5, 0.0], [0.0, 0.0]]
    masks = pg.ClassWise(ranked(log_p, 0.75), alpha=math.exp(-1)).class_masks("conv")
    assert masks.tolist() == [[True, True, False, False], [False] * 4]
    # Where all that are held pass, more may.
    sentence = (
        "The statistics of layer 'conv' are compact, with too few channels for alpha={}; lower it, use a quantile, or "
        "collect full statistics."
    )
    for last in (-1.0, -1.5):
        few = [[-3.0, -3.0], [-2.0, -0.1], [last, 0.0], [0.0, 0.0]]
        with pytest.raises(StatisticsError, match=f"^{re.escape(sentence.format(math.exp(-1)))}$"):
            pg.ClassWise(ranked(few, 0.75), alpha=math.exp(-1)).class_masks("conv")
    # Unless there are no others.
    masks = pg.ClassWise(ranked([[-3.0, -3.0], [-2.0, -1.5]], 1.0), alpha=math.exp(-1)).class_masks("conv")
    assert masks.all()
    assert pg.ClassWise(ranked(few, 0.75), quantile=0.75).class_masks("conv").sum(1).tolist() == [3, 4]
