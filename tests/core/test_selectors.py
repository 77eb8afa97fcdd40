import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

import parchgrad as pg
from parchgrad.core.selectors import (
    REGISTERED,
    EditDefaults,
    LayerSignal,
    RankingSelector,
    RegisteredSelector,
    as_selection,
    check_softness,
    kth_largest,
    register_selector,
    soft_weights,
)
from parchgrad.errors import SettingError, StatisticsError, StatisticsWarning
from parchgrad.statistics.selectors import find_selector, registered_selectors
from tests import reference
from tests.messages import check_message
from tests.support import random_statistics, ranked, small_network


def signal(gradient, observation=None, classes=None):
    return LayerSignal(layer="conv", gradient=gradient, observation=observation, classes=classes)


def weights_by_hand(scores, quantile, softness):
    rows = [reference.soft_weights(row, reference.kth_largest(row, quantile), softness) for row in scores.tolist()]
    return torch.tensor(rows, dtype=scores.dtype)


def chosen(mask):
    return [set(row.nonzero().flatten().tolist()) for row in mask]


@pytest.mark.parametrize("quantile", [0.01, 0.25, 0.5, 1.0])
def test_gradient_energy_ranks_by_the_norm(quantile):
    gradient = torch.randn(3, 8, 4, 5, dtype=torch.float64)
    expected = [
        reference.best_channels([sum(g * g for g in channel.flatten().tolist()) for channel in row], quantile)
        for row in gradient
    ]
    assert chosen(pg.GradientEnergy(quantile=quantile, softness=0).select(signal(gradient))) == expected
    # The score is the root, which the ramp tells from the sum of squares.
    norms = gradient.flatten(2).square().sum(2).sqrt()
    for softness in (0.3, 1):
        found = pg.GradientEnergy(quantile=quantile, softness=softness).select(signal(gradient))
        torch.testing.assert_close(found, weights_by_hand(norms, quantile, softness))


def test_gradient_times_activation_is_signed_and_reads_the_output_before_it_is_overwritten():
    selector = pg.GradientTimesActivation(quantile=0.25, softness=0)
    gradient = torch.randn(3, 8, 4, 5, dtype=torch.float64)
    output = torch.randn(3, 8, 4, 5, dtype=torch.float64)
    products = (gradient * output).flatten(2)
    expected = [reference.best_channels([sum(channel.tolist()) for channel in row], 0.25) for row in products]
    observation = selector.observe(output)
    nn.functional.relu_(output)
    assert chosen(selector.select(signal(gradient, observation))) == expected
    for softness in (0.3, 1):
        found = pg.GradientTimesActivation(quantile=0.25, softness=softness).select(signal(gradient, observation))
        torch.testing.assert_close(found, weights_by_hand(products.sum(2), 0.25, softness))


SCORES = st.lists(st.integers(-4, 4) | st.floats(-4, 4, width=16), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(SCORES, st.floats(0.01, 1.0), st.sampled_from([0, 1e-3, 0.3, 0.5, 1]), st.sampled_from([None, -1.0, 0.0, 2.0]))
def test_soft_weights_are_the_reference(scores, share, softness, threshold):
    rows = torch.tensor([scores, scores[::-1]], dtype=torch.float64)
    thresholds = kth_largest(rows, share)
    assert thresholds.flatten().tolist() == [reference.kth_largest(scores, share)] * 2
    # Those of each row, or one for all.
    found = soft_weights(rows, thresholds if threshold is None else threshold, softness)
    at = reference.kth_largest(scores, share) if threshold is None else threshold
    expected = [reference.soft_weights(row, at, softness) for row in rows.tolist()]
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)
    if softness == 0:
        assert found.dtype == torch.bool
        if threshold is None:
            assert chosen(found)[0] == reference.best_channels(scores, share)
    else:
        assert ((found >= 0) & (found <= 1)).all()


def test_a_small_softness_comes_to_the_hard_cut():
    scores = torch.rand(5, 40, dtype=torch.float64)
    hard = soft_weights(scores, kth_largest(scores, 0.3), 0)
    soft = soft_weights(scores, kth_largest(scores, 0.3), 1e-6)
    assert (((soft - 0.5).abs() < 1e-6).sum(1) == 1).all()
    assert torch.equal(soft > 0.5 - 1e-6, hard)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.1, 0.5, 1.0]), st.floats(0.05, 1.0))
def test_soft_weights_move_with_the_scores_alone(seed, softness, share):
    """The ramp is 1 / (2 o t) steep, and so does its threshold move it: nothing jumps where channels swap ranks."""
    generator = torch.Generator().manual_seed(seed)
    scores = 0.5 + torch.rand(3, 20, generator=generator, dtype=torch.float64)
    change = 1e-4 * (2 * torch.rand(3, 20, generator=generator, dtype=torch.float64) - 1)
    before, after = (soft_weights(values, kth_largest(values, share), softness) for values in (scores, scores + change))
    threshold = kth_largest(scores, share)
    bound = change.abs().amax(1, keepdim=True) / (2 * softness * threshold) * (1 + scores / threshold)
    assert ((after - before).abs() <= 1.01 * bound).all()


SPACES = [(4, 5), (6,), (2, 2, 3), (1, 1)]


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("share", [0.1, 0.25, 0.6])
@pytest.mark.parametrize("softness", [0, 0.5, 1])
def test_evidence_is_the_reference_and_reads_the_output_before_it_is_overwritten(space, share, softness):
    selector = pg.Evidence(quantile=share, softness=softness, positions=share)
    gradient, output = (torch.randn(4, 8, *space, dtype=torch.float64) for _ in range(2))
    # A channel that is the same everywhere points nowhere.
    output[0, 3] = 0.1
    expected = [
        reference.evidence(*pair) for pair in zip(gradient.flatten(2).tolist(), output.flatten(2).tolist(), strict=True)
    ]
    observation = selector.observe(output)
    nn.functional.relu_(output)
    found = selector.select(signal(gradient, observation))
    scores = torch.tensor([scores for _, scores in expected], dtype=torch.float64)
    wanted = weights_by_hand(scores, share, softness)
    torch.testing.assert_close(found.channel_weights.double(), wanted, rtol=1e-9, atol=1e-12)
    alone = dataclasses.replace(selector, positions=1).select(signal(gradient, observation))
    assert torch.equal(alone.channel_weights, found.channel_weights)
    assert alone.position_weights is None
    if math.prod(space) == 1:
        # All that there is.
        assert found.position_weights is None
        return
    assert found.position_weights.shape == (4, *space)
    wanted = [reference.place_weights(places, share, softness) for places, _ in expected]
    found = found.position_weights.flatten(1)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("softness", [0, 0.5, 1])
def test_places_of_the_same_evidence_keep_their_gradient(softness):
    selector = pg.Evidence(softness=softness)
    # Each place says the same, or nothing at all.
    output = torch.randn(2, 1, 6).repeat(1, 4, 1)
    gradient = 1 / (output - output.mean(2, keepdim=True))
    gradient[1] = 0
    gradient[0] = gradient[0].sign() * 2.0 ** gradient[0].abs().log2().round()
    observation = selector.observe(output)._replace(values=1 / gradient.masked_fill(gradient == 0, 1.0))
    found = selector.select(signal(gradient, observation))
    assert (found.position_weights == 1).all()


def test_a_channel_that_is_the_same_everywhere_is_no_evidence():
    # Its mean is rounded: what is left would be taken for a direction.
    output = torch.full((1, 2, 7, 9), 0.1)
    output[0, 1] += 1e-3 * torch.randn(7, 9)
    selector = pg.Evidence(quantile=0.5, softness=0)
    observation = selector.observe(output)
    assert observation.norms[0].isinf().tolist() == [True, False]
    gradient = torch.randn(1, 2, 7, 9)
    gradient[0, 1] = observation.values[0, 1].reshape(7, 9)
    assert chosen(selector.select(signal(gradient, observation)).channel_weights) == [{1}]


@pytest.mark.parametrize("output", [[[0.0, 0.0, 0.0], [1.0, 2.0, 4.0]], [[0.0], [1.0]], [[0.0], [-2.0]]], ids=str)
def test_a_channel_of_zeros_is_no_evidence(output):
    selector = pg.Evidence(quantile=0.5, softness=0)
    observation = selector.observe(torch.tensor([output]))
    assert observation.norms[0].isinf().tolist() == [True, False]
    # The evidence is the sum of squares, positive: only the channel that varies has any.
    found = selector.select(signal(observation.values, observation))
    assert found.channel_weights.tolist() == [[False, True]]


@pytest.mark.parametrize("softness", [0, 1])
def test_evidence_of_half_precision_is_summed_in_float32(softness):
    selector = pg.Evidence(quantile=0.3, softness=softness, positions=0.3)
    output, gradient = (torch.randn(2, 10, 40, 50).bfloat16() for _ in range(2))
    expected = selector.select(signal(gradient.float(), selector.observe(output.float())))
    found = selector.select(signal(gradient, selector.observe(output)))
    with torch.autocast("cpu", torch.bfloat16):
        autocast = selector.select(signal(gradient, selector.observe(output)))
    for one in (found, autocast):
        assert torch.equal(one.channel_weights, expected.channel_weights)
        assert torch.equal(one.position_weights, expected.position_weights)
    # What the study has chosen.
    assert pg.Evidence() == pg.Evidence(quantile=0.2, softness=1.0, positions=0.4)


@pytest.mark.parametrize("exponent", [-100, -40, 30, 60])
@pytest.mark.parametrize("softness", [0, 0.5, 1])
@pytest.mark.parametrize("kind", [pg.GradientEnergy, pg.GradientTimesActivation, pg.Evidence])
def test_maps_scale_exactly_with_the_seed(kind, softness, exponent):
    """Selectors themselves need not know of the ends of the range: the engine brings each row into it."""
    network, x = small_network(dtype=torch.float32), torch.randn(3, 3, 8, 8, requires_grad=True)
    with pg.ParchGrad(network, kind(quantile=0.3, softness=softness), layers="all", gates=2, antialias=True):
        output = network(x)
        seed = torch.randn(3, 5)
        expected = torch.autograd.grad(output, x, seed, retain_graph=True)[0]
        # Each row in a unit of its own.
        scales = 2.0 ** torch.tensor([exponent, 0, exponent // 2])
        found = torch.autograd.grad(output, x, scales.unsqueeze(1) * seed)[0]
    assert torch.equal(found, scales.reshape(3, 1, 1, 1) * expected)
    assert expected.abs().max() > 1e-4


def test_class_wise_weights_rise_with_minus_log_p():
    statistics = random_statistics({"conv": 30})
    log_p = statistics["conv"].class_log_p()
    classes = torch.tensor([1, 4, 1])
    one = signal(torch.zeros(3, 30, 1), classes=classes)
    for softness in (0.3, 1):
        found = pg.ClassWise(statistics, quantile=0.2, softness=softness).select(one)
        assert found.dtype == torch.float32
        wanted = weights_by_hand(-log_p.T[classes], 0.2, softness)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)
        # The weight is half at p = alpha.
        found = pg.ClassWise(statistics, alpha=0.3, softness=softness).select(one)
        rows = [reference.soft_weights(row, -math.log(0.3), softness) for row in (-log_p.T[classes]).tolist()]
        torch.testing.assert_close(found.double(), torch.tensor(rows, dtype=torch.float64), rtol=0, atol=1e-6)


def test_instance_wise_weights_rise_with_the_standard_score():
    statistics = random_statistics({"conv": 30})
    layer = statistics["conv"]
    scores = torch.randn(3, 30, dtype=torch.float64)
    # A row without any that stands out passes unchanged.
    scores[2] = -scores[2].abs()
    one = signal(torch.zeros(3, 30, 1), observation=layer.mean + scores * layer.std)
    for softness in (0.3, 1):
        found = pg.InstanceWise(statistics, quantile=0.2, softness=softness).select(one)
        torch.testing.assert_close(found, weights_by_hand(scores, 0.2, softness), rtol=0, atol=1e-9)
        assert (found[2] == 1).all()
        for alpha in (0.1, 0.7):
            found = pg.InstanceWise(statistics, alpha=alpha, softness=softness).select(one)
            threshold = float(stats.norm.isf(alpha))
            rows = [reference.soft_weights(row, threshold, softness) for row in scores.tolist()]
            torch.testing.assert_close(found, torch.tensor(rows, dtype=torch.float64), rtol=0, atol=1e-9)


def test_what_suits_a_selector_depends_on_its_softness():
    statistics = random_statistics({"conv": 3})
    for kind, first in ((pg.ClassWise, (statistics,)), (pg.InstanceWise, (statistics,)), (pg.GradientEnergy, ())):
        soft, hard = (kind(*first, quantile=0.1, softness=softness).defaults for softness in (0.5, 0))
        assert (soft.layers, soft.conserve, soft.antialias) == (0.5, "energy", True)
        # The study chooses how wide.
        assert soft.gates > 0
        assert (hard.layers, hard.conserve, hard.gates, hard.antialias) == (0.5, "energy", 0.0, False)
    assert (pg.Evidence().defaults.layers, pg.Evidence(softness=0).defaults.layers) == ("auto", "auto")
    assert pg.RandomChannels().defaults == pg.FixedChannels({}).defaults == EditDefaults()


@pytest.mark.parametrize("kind", [pg.GradientEnergy, pg.GradientTimesActivation])
def test_half_precision_is_ranked_in_float32(kind):
    # Sums of 4,000 positions that differ by less than half precision resolves.
    gradient = torch.ones(1, 3, 4000, dtype=torch.bfloat16)
    gradient[0, 2, :10] = 1.5
    selector = kind(quantile=0.34, softness=0)
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
    mask = pg.ClassWise(statistics, alpha=p * (1 + 1e-12), softness=0).select(
        signal(torch.zeros(1, 6, 1), classes=torch.tensor([1]))
    )
    assert 2 in chosen(mask)[0]


def test_a_signal_without_what_the_selector_needs():
    bare = signal(torch.zeros(1, 3, 1))
    statistics = random_statistics({"conv": 3})
    for selector, name in (
        (pg.GradientTimesActivation(softness=0), "observation"),
        (pg.Evidence(), "observation"),
        (pg.ClassWise(statistics, alpha=0.1), "classes"),
        (pg.InstanceWise(statistics, alpha=0.1), "observation"),
    ):
        with pytest.raises(SettingError, match=f"without {name}"):
            selector.select(bare)


def test_selectors_say_whether_they_need_a_class():
    gradient = torch.randn(2, 6, 3, 3)
    for selector in EVERY.values():
        bare = signal(gradient, selector.observe(gradient))
        if selector.needs_class:
            with pytest.raises(SettingError, match="without classes"):
                selector.select(bare)
        else:
            assert as_selection(selector.select(bare)).channel_weights.shape == (2, 6)


def test_random_channels_depend_on_seed_and_layer_alone():
    gradient = torch.zeros(4, 40, 2, 2)
    selector = pg.RandomChannels(quantile=0.25, seed=7)
    first = selector.select(signal(gradient))
    assert first.dtype == torch.bool
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
    weights = torch.tensor([[0.2, 1.0], [0.0, 0.7]])
    assert torch.equal(pg.FixedChannels({"conv": weights}).select(signal(torch.zeros(2, 2, 3))), weights)
    same = pg.FixedChannels({"conv": weights[0]}).select(signal(torch.zeros(2, 2, 3)))
    assert torch.equal(same, weights[[0, 0]])
    with pytest.raises(SettingError) as caught:
        pg.FixedChannels({"conv": wide}).select(signal(torch.zeros(3, 3, 3)))
    check_message(caught.value, "'conv'", "2 rows", "3", "(C,)")


@pytest.mark.parametrize("test", ["welch", "student"])
def test_class_wise_ranks_by_scipys_p_value(test):
    generator = torch.Generator().manual_seed(2)
    samples = torch.rand(60, 12, generator=generator, dtype=torch.float64)
    labels = torch.arange(60) % 3
    groups = [samples[labels == label] for label in range(3)]
    statistics = pg.ChannelStatistics({"conv": layer_of(samples, groups)})
    selector = pg.ClassWise(statistics, quantile=0.25, softness=0, test=test)
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
    selector = pg.ClassWise(statistics, quantile=0.25, softness=0, test="student")
    assert chosen(selector.select(signal(torch.zeros(1, 4, 1), classes=torch.tensor([0])))) == [{2}]


def test_class_wise_alpha_keeps_p_values_up_to_it():
    statistics = random_statistics({"conv": 30})
    p = statistics["conv"].class_log_p().exp()
    selector = pg.ClassWise(statistics, alpha=0.3, softness=0)
    mask = selector.select(signal(torch.zeros(2, 30, 1), classes=torch.tensor([1, 4])))
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
        free = kind(statistics, quantile=0.5, softness=0, normality_threshold=None).select(one)
        assert free.sum() == 5
        assert torch.equal(kind(statistics, quantile=0.5, softness=0).select(one), free & gate)
        assert not kind(statistics, quantile=0.5, softness=0, normality_threshold=1e-9).select(one).any()
        # The ramp stands where it stood; where the gate leaves nothing, the layer passes unchanged.
        free = kind(statistics, quantile=0.5, softness=1, normality_threshold=None).select(one)
        assert torch.equal(kind(statistics, quantile=0.5, softness=1).select(one), free * gate)
        assert (kind(statistics, quantile=0.5, softness=1, normality_threshold=1e-9).select(one) == 1).all()


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
    of_empty = signal(torch.zeros(1, 4, 1), classes=torch.tensor([2]))
    assert not pg.ClassWise(statistics, quantile=0.25, softness=0).class_weights("conv")[2].any()
    # All weights would be equal, so the map would be plain.
    for softness in (0, 0.5):
        with pytest.raises(StatisticsError, match="class 2"):
            pg.ClassWise(statistics, quantile=0.25, softness=softness).select(of_empty)
    gap = torch.full((1, 4), 9.0)
    assert pg.InstanceWise(statistics, alpha=0.05).select(signal(torch.zeros(1, 4, 1), gap))[0, 1] == 0
    mask = pg.InstanceWise(statistics, alpha=0.05, softness=0).select(signal(torch.zeros(1, 4, 1), observation=gap))
    assert chosen(mask) == [{0, 2, 3}]
    # Not even where all places of the ranking are theirs.
    samples[:, :3] = 0.1
    statistics = pg.ChannelStatistics({"conv": layer_of(samples, [samples[:10], samples[10:]])})
    mask = pg.InstanceWise(statistics, quantile=1.0, softness=0).select(signal(torch.zeros(1, 4, 1), observation=gap))
    assert chosen(mask) == [{3}]


@pytest.mark.parametrize("settings_", [{"quantile": 0.2}, {"alpha": 0.4}])
def test_instance_wise_uses_the_upper_tail_of_the_normal(settings_):
    statistics = random_statistics({"conv": 20})
    selector = pg.InstanceWise(statistics, softness=0, **settings_)
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
    mask = pg.InstanceWise(statistics, quantile=0.34, softness=0).select(
        signal(torch.zeros(1, 3, 1), observation=gap.unsqueeze(0))
    )
    assert chosen(mask) == [{2}]


QUANTILE, ALPHA, NORMALITY = "`quantile` is {}", "`alpha` is {}", "`normality_threshold` is {}"
SOFTNESS, POSITIONS, SHAPES = "`softness` is {}", "`positions` is {}", ("(C,)", "(B, C)")


@pytest.mark.parametrize(
    ("build", "facts"),
    [
        (lambda s: pg.GradientEnergy(quantile=0.0), QUANTILE.format("0.0")),
        (lambda s: pg.GradientTimesActivation(quantile=1.1), QUANTILE.format("1.1")),
        (lambda s: pg.Evidence(quantile=0), QUANTILE.format("0")),
        (lambda s: pg.Evidence(positions=0), POSITIONS.format("0")),
        (lambda s: pg.Evidence(positions=1.5), POSITIONS.format("1.5")),
        (lambda s: pg.Evidence(positions="all"), POSITIONS.format("'all'")),
        (lambda s: pg.RandomChannels(quantile=math.nan), QUANTILE.format("nan")),
        (lambda s: pg.GradientEnergy(quantile="a"), QUANTILE.format("'a'")),
        (lambda s: pg.RandomChannels(seed="a"), "`seed` is 'a'"),
        (lambda s: pg.FixedChannels([torch.ones(3) > 0]), ("`masks`", "list", "dictionary", "{layer name: ")),
        (lambda s: pg.FixedChannels({"conv": [True]}), ("'conv'", "list", "Tensor", *SHAPES)),
        (lambda s: pg.FixedChannels({"conv": torch.ones(3).long()}), ("'conv'", "torch.int64", "(3,)", *SHAPES)),
        *(
            (lambda s, w=w: pg.FixedChannels({"conv": torch.tensor([0.5, w])}), ("'conv'", "outside [0, 1]"))
            for w in (-0.1, 1.5, math.nan)
        ),
        *(
            (lambda s, k=k, o=o: k(softness=o), SOFTNESS.format(repr(o)))
            for k in (pg.GradientEnergy, pg.GradientTimesActivation, pg.Evidence)
            for o in (-0.1, 1.5, math.nan, "soft", None, True)
        ),
        (lambda s: pg.ClassWise(s, quantile=0.1, softness=2), SOFTNESS.format("2")),
        (lambda s: pg.InstanceWise(s, quantile=0.1, softness=-1), SOFTNESS.format("-1")),
        (lambda s: check_softness(1.01), SOFTNESS.format("1.01")),
        (lambda s: pg.FixedChannels({"conv": torch.ones(()) > 0}), ("'conv'", "torch.bool", "()", *SHAPES)),
        (lambda s: pg.FixedChannels({"conv": torch.ones(1, 3, 1) > 0}), ("'conv'", "torch.bool", "(1, 3, 1)", *SHAPES)),
        (lambda s: pg.ClassWise(s, quantile=0.1, alpha=0.1), ("`quantile`", "`alpha`", "0.1")),
        (lambda s: pg.InstanceWise(s, quantile=0.1, alpha=0.1), ("`quantile`", "`alpha`", "0.1")),
        *((lambda s, a=a: pg.InstanceWise(s, alpha=a), ALPHA.format(a)) for a in (0.0, 1.0, 1.5)),
        (lambda s: pg.ClassWise(s, quantile=2.0), QUANTILE.format("2.0")),
        *(
            (lambda s, t=t: pg.ClassWise(s, quantile=0.1, normality_threshold=t), NORMALITY.format(t))
            for t in (0.0, 1.5)
        ),
        (lambda s: pg.ClassWise(s, quantile=0.1, test="fisher"), ("`test`", "'fisher'", "welch", "student")),
    ],
)
def test_an_error_names_the_setting_and_its_value(build, facts):
    with pytest.raises(SettingError) as caught:
        build(random_statistics({"conv": 3}))
    check_message(caught.value, *([facts] if isinstance(facts, str) else facts))


def test_settings_at_the_ends_of_their_ranges():
    statistics = random_statistics({"conv": 3})
    assert pg.Evidence(positions=1, softness=1).positions == 1
    assert pg.GradientEnergy(softness=0.0) == pg.GradientEnergy(softness=0)
    # Every channel is far from normal, and all of them are the best.
    assert pg.ClassWise(statistics, quantile=1, softness=0, normality_threshold=1).class_weights("conv").all()
    assert pg.InstanceWise(statistics, quantile=1.0).quantile == 1


@pytest.mark.parametrize(
    ("channels", "facts"),
    [
        ({"head": 3}, ("`masks`", "'head'")),
        ({"conv": 3}, ("'conv'", "2 channels", "3")),
        ({"rows": 3}, ("'rows'", "2 channels", "3")),
    ],
)
def test_masks_must_fit_the_layers(channels, facts):
    selector = pg.FixedChannels({"conv": torch.ones(2) > 0, "rows": torch.ones(3, 2) > 0})
    selector.check({"conv": 2, "rows": 2})
    with pytest.raises(SettingError) as caught:
        selector.check(channels)
    check_message(caught.value, *facts)


def test_restricted_classes_are_looked_up_and_others_refused():
    full = random_statistics({"conv": 8}, classes=5)
    some = pg.ClassWise(full.restrict(classes=[1, 4]), quantile=0.3)
    some.check_classes(5)
    signal = LayerSignal(layer="conv", gradient=torch.ones(3, 8, 1), classes=torch.tensor([4, 1, 4]))
    assert torch.equal(some.select(signal), pg.ClassWise(full, quantile=0.3).select(signal))
    other = LayerSignal(layer="conv", gradient=torch.ones(1, 8, 1), classes=torch.tensor([2]))
    with pytest.raises(StatisticsError, match="not class 2"):
        some.select(other)
    with pytest.raises(StatisticsError, match=r"5 classes, .* output has 2"):
        some.check_classes(2)


def test_single_images_of_a_class_are_said_once():
    statistics = random_statistics({"a": 4, "b": 4}, classes=5, images=8)
    with pytest.warns(StatisticsWarning, match="2 of 5 classes have fewer than two images") as said:
        selector = pg.ClassWise(statistics, quantile=0.5)
    assert len(said) == 1
    selector.class_weights("b")
    pg.ClassWise(statistics, quantile=0.5, test="student")


def test_the_warning_names_the_line_that_makes_the_selector():
    statistics = random_statistics({"conv": 4}, classes=5, images=8)
    with pytest.warns(StatisticsWarning) as said:
        pg.ClassWise(statistics, quantile=0.5)
    assert said[0].filename == __file__


def test_a_registered_selector_keeps_its_names_and_none_is_replaced():
    @dataclasses.dataclass(frozen=True)
    class Loudest(pg.GradientEnergy):
        share: float = 0.5

    class Bare(pg.Selector):
        pass

    described = {"title": "Loudest", "summary": "channels of the loudest gradient"}
    try:
        assert register_selector("loudest", **described)(Loudest) is Loudest
        assert find_selector("loudest") == RegisteredSelector(name="loudest", kind=Loudest, **described)
        assert list(registered_selectors())[-1] == "loudest"
        with pytest.raises(SettingError) as caught:
            register_selector("loudest", **described)(pg.Evidence)
        check_message(caught.value, "'loudest'")
        assert find_selector("loudest").kind is Loudest
    finally:
        REGISTERED.pop("loudest", None)
    with pytest.raises(SettingError) as caught:
        register_selector("bare", **described)(Bare)
    check_message(caught.value, "Bare", "@dataclass", "@register_selector")

    @dataclasses.dataclass(frozen=True)
    class Required(pg.GradientEnergy):
        share: float = dataclasses.field(kw_only=True)

    with pytest.raises(SettingError) as caught:
        register_selector("required", **described)(Required)
    check_message(caught.value, "'share'", "Required")
    assert "bare" not in registered_selectors()


def test_selectors_by_their_short_names():
    statistics = random_statistics({"conv": 4})
    assert find_selector("random").make(quantile=0.2) == pg.RandomChannels(quantile=0.2)
    assert isinstance(find_selector("class").make(quantile=0.2, statistics=statistics), pg.ClassWise)
    assert isinstance(find_selector("instance").make(quantile=0.2, statistics=statistics), pg.InstanceWise)
    for name in ("class", "instance"):
        with pytest.raises(StatisticsError) as caught:
            find_selector(name).make(quantile=0.2)
        check_message(caught.value, repr(name), "statistics", "'energy'")
    with pytest.raises(SettingError) as caught:
        find_selector("best")
    check_message(caught.value, "`selector`", "'best'", ", ".join(registered_selectors()))


def test_a_selector_by_its_name_has_the_settings_that_are_given():
    statistics = random_statistics({"conv": 4})
    assert find_selector("random").make(quantile=0.2, seed=3) == pg.RandomChannels(quantile=0.2, seed=3)
    assert find_selector("random").make() == pg.RandomChannels()
    assert find_selector("energy").make() == pg.GradientEnergy()
    assert find_selector("activation").make(quantile=0.7) == pg.GradientTimesActivation(quantile=0.7)
    assert find_selector("evidence").make() == pg.Evidence()
    assert find_selector("evidence").make(softness=0.2) == pg.Evidence(softness=0.2)
    assert find_selector("random").make(softness=0.2) == pg.RandomChannels()
    assert (find_selector("evidence").default("softness"), find_selector("random").default("softness")) == (1.0, 0)
    for name in ("energy", "activation", "evidence", "random"):
        assert find_selector(name).suits() == find_selector(name).make().defaults
    for name in ("class", "instance"):
        assert find_selector(name).suits() == find_selector(name).make(statistics=statistics).defaults
        assert find_selector(name).suits(0).gates == 0
    for name in ("class", "instance"):
        assert (
            find_selector(name).make(statistics=statistics).quantile == find_selector(name).default("quantile") == 0.1
        )
        assert (
            find_selector(name).make(statistics=statistics).softness == find_selector(name).default("softness") == 0.5
        )
        assert find_selector(name).make(statistics=statistics, softness=0).softness == 0
        assert find_selector(name).make(statistics=statistics, quantile=0.3).statistics is statistics
    assert find_selector("class").make(statistics=statistics).test == "welch"
    assert find_selector("class").make(statistics=statistics.compact(test="student")).test == "student"


def test_energy_of_half_precision_gradients():
    gradient = torch.randn(2, 20, 50)
    selector = pg.GradientEnergy(quantile=0.3, softness=0)
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


STATISTICS = random_statistics({"conv": 6})
BY_NAME = {name: found.make(quantile=0.3, statistics=STATISTICS) for name, found in registered_selectors().items()}
EVERY = BY_NAME | {
    "hard evidence": pg.Evidence(quantile=0.3, softness=0),
    "mask": pg.FixedChannels({"conv": torch.arange(6) < 2}),
    "weights": pg.FixedChannels({"conv": torch.linspace(0, 1, 6)}),
    "class, alpha": pg.ClassWise(STATISTICS, alpha=0.3),
    "instance, alpha": pg.InstanceWise(STATISTICS, alpha=0.3, normality_threshold=None),
}
every_selector = pytest.mark.parametrize("selector", EVERY.values(), ids=EVERY)
every_ranking = pytest.mark.parametrize("selector", [s for s in EVERY.values() if isinstance(s, RankingSelector)])


@every_selector
def test_no_number_is_read_off_a_device(selector):
    # A tensor of the meta device holds none: reading one, or mixing it with another device, is an error.
    selector = dataclasses.replace(selector)
    gradient = torch.empty(3, 6, 4, 4, device="meta")
    classes = torch.empty(3, dtype=torch.long, device="meta")
    found = as_selection(selector.select(signal(gradient, selector.observe(gradient), classes)))
    assert found.channel_weights.device.type == "meta"
    assert found.channel_weights.shape == (3, 6)
    weights = found.position_weights
    assert weights is None or (weights.device.type == "meta" and weights.shape == (3, 4, 4))
    if isinstance(selector, pg.ClassWise):
        assert [mask.device.type for mask in selector._cached.values()] == ["meta"]


@every_selector
def test_a_pass_without_rows(selector):
    gradient = torch.empty(0, 6, 4, 4)
    observation = selector.observe(gradient)
    found = as_selection(selector.select(signal(gradient, observation, torch.empty(0, dtype=torch.long))))
    assert found.channel_weights.shape == (0, 6)


@every_ranking
def test_a_layer_without_space(selector):
    gradient, output = torch.randn(4, 6), torch.randn(4, 6)
    found = as_selection(selector.select(signal(gradient, selector.observe(output))))
    single = as_selection(selector.select(signal(gradient.unsqueeze(2), selector.observe(output.unsqueeze(2)))))
    assert torch.equal(found.channel_weights, single.channel_weights)
    assert found.position_weights is single.position_weights is None


@every_ranking
def test_a_row_without_gradient_keeps_every_channel(selector):
    gradient, output = torch.randn(3, 6, 4, 4), torch.randn(3, 6, 4, 4)
    gradient[1] = 0
    weights = as_selection(selector.select(signal(gradient, selector.observe(output)))).channel_weights
    assert (weights[1] == 1).all()
    assert (weights[::2] < 1).any(dim=1).all()


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
    found = pg.InstanceWise(statistics, alpha=0.5, softness=0).select(signal(torch.zeros(1, 3, 1), observation))
    assert found.tolist() == [[False, True, False]]
    assert pg.ClassWise(statistics, quantile=1.0, softness=0).class_weights("conv")[0].tolist() == [False, True, True]


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
        found = pg.InstanceWise(pg.ChannelStatistics({"conv": layer}), quantile=0.25, softness=0).select(
            signal(torch.zeros(1, 4, 1), gap.unsqueeze(0))
        )
        assert chosen(found) == [{expected}]


def test_every_layer_and_class_has_its_own_mask():
    statistics = random_statistics({"a": 30, "b": 30}, seed=4)
    selector = pg.ClassWise(statistics, quantile=0.2, softness=0)
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
    with pytest.raises(StatisticsError, match=f"no image of class {empty}"):
        selector.check_targets([1, empty, 3])


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
    with pytest.raises(StatisticsError, match=r"quantile. is 0\.6, .* layer 'conv' .* 50%"):
        pg.ClassWise(statistics, quantile=0.6).check({"conv": 4})


def test_alpha_on_compact_statistics():
    # The first class holds p-values on both sides of alpha, the second none at all.
    log_p = [[-3.0, 0.0], [-1.0, 0.0], [-0.5, 0.0], [0.0, 0.0]]
    selector = pg.ClassWise(ranked(log_p, 0.75), alpha=math.exp(-1), softness=0)
    assert selector.class_weights("conv").tolist() == [[True, True, False, False], [False] * 4]
    soft = pg.ClassWise(ranked(log_p, 0.75), alpha=math.exp(-1), softness=1).class_weights("conv")
    torch.testing.assert_close(soft, torch.tensor([[1.0, 0.5, 0.25, 0.0], [1.0] * 4]))
    # Where all that are held pass, more may.
    for last in (-1.0, -1.5):
        few = [[-3.0, -3.0], [-2.0, -0.1], [last, 0.0], [0.0, 0.0]]
        with pytest.raises(StatisticsError, match=rf"`alpha` is {math.exp(-1)}, .* 'conv'"):
            pg.ClassWise(ranked(few, 0.75), alpha=math.exp(-1), softness=0).class_weights("conv")
    # Unless there are no others.
    masks = pg.ClassWise(ranked([[-3.0, -3.0], [-2.0, -1.5]], 1.0), alpha=math.exp(-1), softness=0).class_weights(
        "conv"
    )
    assert masks.all()
    assert pg.ClassWise(ranked(few, 0.75), quantile=0.75, softness=0).class_weights("conv").sum(1).tolist() == [3, 4]
