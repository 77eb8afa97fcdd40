import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import parchgrad as pg
from parchgrad.errors import SettingError, StatisticsError
from parchgrad.statistics.compact import compact_log_p, expand_log_p, keep_share
from tests.support import header, random_statistics


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**31), st.sampled_from([0.1, 0.5, 1.0]))
def test_order_survives_but_for_ties(channels, classes, seed, share):
    log_p = torch.from_numpy(-np.random.default_rng(seed).gamma(0.5, 50.0, size=(channels, classes)))
    kept = keep_share(log_p, share)
    for k in range(classes):
        count = max(1, round(share * channels))
        assert set(kept[:, k].nonzero().flatten().tolist()) == set(log_p[:, k].argsort()[:count].tolist())
    found = expand_log_p(compact_log_p(kept), channels)
    assert torch.equal(found < 0, kept < 0)
    for k in range(classes):
        order = kept[:, k].argsort(stable=True)
        assert (found[order, k].diff() >= 0).all()


def test_few_values_are_exact_and_many_are_close():
    few = -torch.arange(12.0).reshape(4, 3)
    torch.testing.assert_close(expand_log_p(compact_log_p(few), 4).round(decimals=1), few, rtol=0.02, atol=0.05)
    many = -torch.rand(500, 40, dtype=torch.float64) * 10 - 1
    found = expand_log_p(compact_log_p(many), 500).double()
    assert (found - many).abs().max() < 0.05
    assert found.unique().numel() <= 256


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": torch.tensor(3)}, "bit mask"),
        ({"classes": torch.tensor(-2)}, "bit mask"),
        ({"level": torch.zeros(3, dtype=torch.uint8)}, "bit mask"),
        ({"levels": torch.zeros(3)}, "wrong type or shape"),
        ({"held": torch.zeros(10)}, "wrong type or shape"),
    ],
)
def test_parts_that_do_not_fit(change, words):
    compact = compact_log_p(-torch.rand(10, 8) - 0.1)
    with pytest.raises(StatisticsError, match=words):
        expand_log_p({**compact, **change}, 10)


def test_a_compact_file_selects_the_same_channels(tmp_path):
    full = random_statistics({"a": 40, "b": 30}, classes=6, images=60)
    full.compact(share=0.5, test="student").save(tmp_path / "compact.safetensors")
    full.save(tmp_path / "full.safetensors")
    compact = pg.ChannelStatistics.load(tmp_path / "compact.safetensors")
    for quantile in (0.1, 0.3, 0.5):
        expected, found = (
            pg.ClassWise(each, quantile=quantile, softness=0, test="student").class_weights("a")
            for each in (full, compact)
        )
        # 120 values of 256 levels leave hardly a tie.
        assert (expected & ~found).sum() == 0
        assert (found & ~expected).sum() <= 2
        # Weights are as near as levels: 120 values of 256 leave a step of one.
        expected, found = (
            pg.ClassWise(each, quantile=quantile / 2, test="student").class_weights("a") for each in (full, compact)
        )
        assert (expected - found).abs().max() < 0.05
    torch.testing.assert_close(compact["b"].mean, full["b"].mean, rtol=1e-6, atol=0)
    wider = pg.ClassWise(compact, quantile=0.6, test="student")
    with pytest.raises(StatisticsError, match=r"quantile. is 0\.6, .* 50%"):
        wider.check({"a": 40})
    with pytest.raises(StatisticsError, match=r"test. is 'welch', .* 'student'"):
        compact["a"].class_log_p()
    with pytest.raises(StatisticsError, match="'student' test"):
        compact.compact(test="welch")
    assert compact.restrict(classes=[4, 2])["a"].classes == 2


def test_ranked_statistics_without_moments_are_compacted(tmp_path):
    ranked = random_statistics({"a": 40}, classes=6, images=60).compact(share=1.0)
    few = pg.ChannelStatistics({"a": dataclasses.replace(ranked["a"], mean=None, std=None)})
    few.compact(share=0.5).save(tmp_path / "few.safetensors")
    loaded = pg.ChannelStatistics.load(tmp_path / "few.safetensors")
    assert (loaded["a"].mean, loaded["a"].std, loaded["a"].share) == (None, None, 0.5)
    expected = ranked.compact(share=0.5)["a"]
    torch.testing.assert_close(loaded["a"].shapiro_p, expected.shapiro_p, rtol=1e-6, atol=0)
    assert torch.equal(loaded["a"].log_p < 0, expected.log_p < 0)


def test_shares_out_of_range():
    for share in (0, 1.5):
        with pytest.raises(SettingError, match="share` is"):
            random_statistics({"a": 4}).compact(share=share)


def test_a_damaged_compact_file_names_the_layer(tmp_path):
    path = tmp_path / "compact.safetensors"
    random_statistics({"a": 40}, classes=6).compact().save(path)
    tensors, metadata = load_file(path), header(path)
    save_file({**tensors, "a/level": tensors["a/level"][:-1].clone()}, path, metadata)
    with pytest.raises(StatisticsError, match=r"Layer 'a' in .* does not fit: .* bit mask"):
        pg.ChannelStatistics.load(path)
    for field, value in (("test", "t"), ("share", "half"), ("share", 2)):
        layers = metadata["layers"].replace('"welch"', f'"{value}"') if field == "test" else metadata["layers"]
        layers = layers.replace("0.5", f'"{value}"' if isinstance(value, str) else str(value))
        save_file(tensors, path, {**metadata, "layers": layers})
        with pytest.raises(StatisticsError, match=r"ayer 'a' in .* (does not fit|is invalid)"):
            pg.ChannelStatistics.load(path)


def test_alpha_on_compact_statistics_with_a_class_without_images():
    layer = random_statistics({"a": 20})["a"]
    no_image = torch.tensor([8, 8, 0, 8, 8])
    few = pg.ChannelStatistics({"a": dataclasses.replace(layer, class_count=no_image, class_square=no_image)})
    assert few.count_empty() == 1
    masks = [
        pg.ClassWise(each, alpha=1e-9, softness=0, test="student", normality_threshold=None).class_weights("a")
        for each in (few, few.compact(test="student"))
    ]
    assert torch.equal(*masks)
    soft = pg.ClassWise(few.compact(test="student"), alpha=1e-9, test="student").class_weights("a")
    assert (soft[2] == 1).all()


def test_a_few_bits_do_not_fill_the_memory(tmp_path):
    path = tmp_path / "compact.safetensors"
    random_statistics({"a": 40}, classes=6).compact().save(path)
    nothing = torch.zeros(40 * 10**6 // 8, dtype=torch.uint8)
    zeros = {"a/classes": torch.tensor(10**6), "a/held": nothing, "a/level": nothing[:0]}
    save_file({**load_file(path), **zeros}, path, header(path))
    with pytest.raises(StatisticsError, match=r"40 channels and 1000000 classes, but only 0 values"):
        pg.ChannelStatistics.load(path)
