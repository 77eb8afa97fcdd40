import dataclasses
import os
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.utils.data import DataLoader

import parchgrad as pg
from parchgrad.errors import StatisticsError
from parchgrad.statistics import ChannelStatistics, LayerStatistics, accumulate
from parchgrad.statistics.accumulate import Accumulator, merge_statistics
from tests.support import NUMBERS, assert_same, small_network

CHANNELS = {"a": 2, "b": 3}


def samples(count, seed=0):
    """GAPs (count, 5), classes and soft weights of three classes."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(count, 5, generator=generator, dtype=torch.float64) ** 3 + 10
    labels = torch.randint(0, 3, (count,), generator=generator)
    return values, labels, torch.rand(count, 3, generator=generator, dtype=torch.float64).softmax(1)


def gathered(values, weights, first=0, classes=3):
    accumulator = Accumulator(values.shape[1], classes, seed=0)
    accumulator.add(torch.arange(first, first + len(values)), values, weights)
    return accumulator


def statistics_of(accumulator, **metadata):
    return accumulator.statistics(CHANNELS, accumulator.shapiro_p(), metadata, {"a": "1", "b": "2"})


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("class/mean", lambda part: part[:, :0], "no channels or no classes"),
        ("class/mean", lambda part: part[:0], "no channels or no classes"),
        ("keys", lambda part: part[1:], "sample .* 20 images"),
        ("keys", lambda part: part.double(), "sample .* 20 images"),
        ("rows", lambda part: part[1:], "sample .* 20 images"),
        ("rows", lambda part: part[:, 1:], "sample .* 20 images"),
        ("images", lambda part: part + 1, "sample .* 21 images"),
        ("class/weight", lambda part: -part, "class/weight has the wrong shape or is negative"),
        ("all/mean", lambda part: part[:, :1], "all/mean has the wrong shape"),
        ("all/mean", lambda part: part * torch.nan, "all/mean is not floating-point or not finite"),
        ("class/mean", lambda part: part * torch.inf, "class/mean is not floating-point or not finite"),
        ("rows", lambda part: part * torch.nan, "rows is not floating-point or not finite"),
        ("all/mean", lambda part: part.long(), "all/mean is not floating-point or not finite"),
    ],
)
def test_a_damaged_state_is_not_gone_on_from(name, change, words):
    values, labels, _ = samples(20)
    held = gathered(values, labels).tensors()
    assert Accumulator.restored(held, seed=0).images == 20
    with pytest.raises(ValueError, match=words):
        Accumulator.restored({**held, name: change(held[name])}, seed=0)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=2, max_size=5), st.booleans())
def test_parts_merged_equal_the_whole(sizes, soft):
    values, labels, weights = samples(sum(sizes))
    given_weights = weights if soft else labels
    whole = statistics_of(gathered(values, given_weights))
    bounds = np.cumsum([0, *sizes])
    parts = [
        statistics_of(gathered(values[low:high], given_weights[low:high], first=low)) for low, high in pairwise(bounds)
    ]
    merged = merge_statistics(parts)
    assert_same(merged, whole, rtol=1e-9)
    assert merged.metadata["images"] == str(len(values))
    assert torch.equal(merged.sample.keys, whole.sample.keys)


def test_a_full_sample_keeps_the_smallest_keys_in_place(monkeypatch):
    monkeypatch.setattr(accumulate, "_SAMPLE", 50)
    values, labels, _ = samples(400)
    accumulator = Accumulator(5, 3, seed=7)
    for low in range(0, 400, 16):
        numbers = torch.arange(low, min(low + 16, 400))
        accumulator.add(numbers, values[numbers], labels[numbers])
    best = accumulate._keys(7, torch.arange(400)).argsort()[:50]
    sample = statistics_of(accumulator).sample
    assert torch.equal(torch.cat([sample.rows["a"], sample.rows["b"]], dim=1), values[best])
    # The order in which images come does not matter.
    backwards = Accumulator(5, 3, seed=7)
    backwards.add(torch.arange(399, -1, -1), values.flip(0), labels.flip(0))
    assert torch.equal(statistics_of(backwards).sample.keys, sample.keys)


def test_only_the_classes_that_come_are_touched():
    values, _, _ = samples(6)
    accumulator = gathered(values[:4], torch.tensor([0, 0, 2, 2]))
    before = accumulator.tensors()["class/mean"].clone()
    accumulator.add(torch.tensor([4, 5]), values[4:], torch.tensor([2, 2]))
    after = accumulator.tensors()["class/mean"]
    assert torch.equal(after[:2], before[:2])
    torch.testing.assert_close(after[2], values[2:].mean(0))


@pytest.mark.parametrize("worth", [1, 1 << 40])
def test_shapiro_agrees_with_scipy_and_tells_its_progress(monkeypatch, worth):
    monkeypatch.setattr(accumulate, "_WORTH_PROCESSES", worth)
    monkeypatch.setattr(accumulate, "_COLUMNS", 2)
    generator = np.random.default_rng(0)
    rows = np.column_stack([generator.normal(size=300), generator.gamma(1.0, size=300), np.full(300, 2.0)])
    told = []
    p = accumulate.shapiro_p_values(rows, lambda *what: told.append(what))
    np.testing.assert_array_equal(p[:2], [stats.shapiro(column).pvalue for column in rows.T[:2]])
    assert p[2] == 1
    assert told[-1] == ("normality", 3, 3)


def test_responses_that_are_not_finite_are_named():
    values, labels, _ = samples(4)
    values[2, 1] = torch.nan
    with pytest.raises(StatisticsError, match="one of the images 8 to 11 is not finite"):
        gathered(values, labels, first=8)


def parts():
    values, labels, _ = samples(40)
    return [
        statistics_of(gathered(values[:25], labels[:25]), labels="given", data="x", collections="1"),
        statistics_of(gathered(values[25:], labels[25:], first=25), labels="given", data="y", collections="2"),
    ]


def test_merged_metadata_say_what_went_in():
    merged = merge_statistics(parts())
    assert dict(merged.metadata) == {"labels": "given", "data": "x + y", "images": "40", "collections": "1 2"}
    assert merge_statistics([merged]).metadata["data"] == "x + y"


def changed(statistics, **changes):
    return dataclasses.replace(statistics, **changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda part: changed(part, weight_digests={"a": "1", "b": "3"}), "layer 'b' .* part 2"),
        (
            lambda part: changed(part, metadata={"labels": "predicted"}),
            "labels 'predicted', .* 'given'",
        ),
        (lambda part: changed(part, layers={"a": part["a"]}, sample=None), "layers of part 2"),
        (lambda part: part.restrict(["a", "b"]), "cannot be merged"),
        (lambda part: part.compact(), "cannot be merged"),
        (lambda part: parts()[0], "Parts 1 and 2 "),
    ],
)
def test_parts_that_do_not_belong_together(change, words):
    first, second = parts()
    with pytest.raises(StatisticsError, match=words):
        merge_statistics([first, change(second)])


def test_nothing_to_merge_and_other_shapes():
    with pytest.raises(StatisticsError, match="no statistics to merge"):
        merge_statistics([])
    wide = {**{name: getattr(parts()[0]["a"], name) for name in NUMBERS}, "class_count": torch.ones(4)}
    wide |= {"class_square": torch.ones(4), "class_mean": torch.ones(2, 4), "class_variance": torch.ones(2, 4)}
    first = parts()[0].restrict(["a"])
    with pytest.raises(StatisticsError, match="4 classes in part 2"):
        merge_statistics([first, ChannelStatistics({"a": LayerStatistics(**wide)})])


def test_merging_real_collections_of_one_data_set_in_two_files(tmp_path):
    model = small_network()
    images = torch.randn(50, 3, 8, 8, dtype=torch.float64)
    data = [(image, index % 5) for index, image in enumerate(images)]
    whole = pg.collect_statistics(model, data)
    for name, part in (("first", data[:20]), ("second", data[20:])):
        pg.collect_statistics(model, part, seed=1).save(tmp_path / name)
    parts = [ChannelStatistics.load(tmp_path / name) for name in ("first", "second")]
    merged = pg.merge_statistics(iter(parts))
    again = pg.collect_statistics(model, data[20:], seed=5, batch_size=3)
    for twice in ([merged, parts[1]], [parts[1], merged], [*parts, again]):
        with pytest.raises(StatisticsError, match="contain the same images"):
            merge_statistics(twice)
    assert_same(merged, whole, rtol=1e-10)
    # Known by the rows of its images, where the data cannot be told: batches, and a part of a whole.
    batches = pg.collect_statistics(model, DataLoader(data[20:], batch_size=8), seed=1)
    for twice in ([parts[1], batches], [pg.collect_statistics(model, data[:20], seed=0), whole]):
        with pytest.raises(StatisticsError, match="contain the same images"):
            merge_statistics(twice)


TESTS_ITSELF = accumulate._shapiro_of_block
PARENT = os.getpid()


def lost_in_a_child(samples):
    if os.getpid() != PARENT:
        os._exit(1)
    return TESTS_ITSELF(samples)


def test_a_lost_process_does_not_cost_the_collection(monkeypatch):
    values = np.random.default_rng(0).random((30, 130))
    expected = [stats.shapiro(column).pvalue for column in values.T]
    monkeypatch.setattr(accumulate, "_WORTH_PROCESSES", 1)
    monkeypatch.setattr(accumulate, "_shapiro_of_block", lost_in_a_child)
    told = []
    np.testing.assert_array_equal(accumulate.shapiro_p_values(values, lambda *all_: told.append(all_[1])), expected)
    assert told == [64, 128, 130]
    monkeypatch.setattr(accumulate.multiprocessing.current_process(), "_config", {"daemon": True})
    monkeypatch.setattr(accumulate, "ProcessPoolExecutor", None)
    np.testing.assert_array_equal(accumulate.shapiro_p_values(values), expected)
