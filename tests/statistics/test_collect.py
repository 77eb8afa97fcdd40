import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import parchgrad as pg
from parchgrad.data.folders import PhotographFolder
from parchgrad.errors import ImageError, InputError, ModelError, SettingError, StatisticsError, StatisticsWarning
from parchgrad.statistics import accumulate, collect
from parchgrad.statistics.batches import LeftOut
from tests.support import assert_same, small_network

IMAGES = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
LABELS = torch.arange(60) % 5


def gaps(model):
    """GAPs of both convolutions of the small network, one image at a time."""
    first = [model[0](image.unsqueeze(0)) for image in IMAGES]
    second = [model[2](functional.relu(output)) for output in first]
    return {
        name: torch.stack([output.clamp(min=0).mean((0, 2, 3)) for output in outputs]).detach().numpy()
        for name, outputs in (("0", first), ("2", second))
    }


def check(layer, values, weights):
    np.testing.assert_allclose(layer.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(layer.std, values.std(0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(layer.class_count, weights.sum(0), rtol=1e-12)
    np.testing.assert_allclose(layer.class_square, (weights**2).sum(0), rtol=1e-12)
    for k in range(weights.shape[1]):
        np.testing.assert_allclose(
            layer.class_mean[:, k], np.average(values, axis=0, weights=weights[:, k]), rtol=1e-12
        )
        expected = np.cov(values.T, aweights=weights[:, k]).diagonal()
        np.testing.assert_allclose(layer.class_variance[:, k], expected, rtol=1e-10)
    np.testing.assert_allclose(layer.shapiro_p, [stats.shapiro(column).pvalue for column in values.T], rtol=1e-9)


@pytest.mark.parametrize("rows_per_update", [1, 16, 1024])
@pytest.mark.parametrize("labels", ["given", "predicted"])
def test_equals_numpy_on_gaps_one_by_one(monkeypatch, labels, rows_per_update):
    monkeypatch.setattr(accumulate, "_ROWS_PER_UPDATE", rows_per_update)
    model = small_network()
    statistics = pg.collect_statistics(model, TensorDataset(IMAGES, LABELS), labels=labels, batch_size=7)
    for name, values in gaps(model).items():
        check(statistics[name], values, model_weights(model, labels))
    assert list(statistics) == ["0", "2"]


def model_weights(model, labels):
    if labels == "given":
        return functional.one_hot(LABELS).double().numpy()
    return model(IMAGES).softmax(1).detach().numpy()


def test_statistics_serve_the_selectors_end_to_end():
    model = small_network()
    statistics = pg.collect_statistics(model, DataLoader(TensorDataset(IMAGES, LABELS), batch_size=16), layers=["2"])
    for selector in (pg.ClassWise(statistics, quantile=0.3), pg.InstanceWise(statistics, quantile=0.3)):
        maps = pg.Explainer(model, selector).attribute(IMAGES[:3], [0, 1, 2])
        assert torch.isfinite(maps).all()


def test_unlabelled_images_do_for_predicted_labels():
    model = small_network()
    with_labels = pg.collect_statistics(model, TensorDataset(IMAGES, LABELS), labels="predicted")
    bare = pg.collect_statistics(model, iter(torch.split(IMAGES, 20)), labels="predicted")
    torch.testing.assert_close(bare["2"].class_mean, with_labels["2"].class_mean, rtol=1e-6, atol=1e-9)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.conv(self.conv(x)).mean((2, 3)))


def test_a_convolution_called_twice_has_the_mean_of_its_calls():
    model = Twice().double().eval()
    layer = pg.collect_statistics(model, TensorDataset(IMAGES, LABELS % 2))["conv"]
    first = model.conv(IMAGES)
    expected = (first.relu().mean((2, 3)) + model.conv(first).relu().mean((2, 3))).mean(0) / 2
    torch.testing.assert_close(layer.mean, expected.detach())


def test_the_sample_of_rows_depends_on_seed_and_number_alone(monkeypatch):
    monkeypatch.setattr(accumulate, "_SAMPLE", 20)
    model, data = small_network(), TensorDataset(IMAGES, LABELS)

    def shapiro(seed, batch_size, rows_per_update):
        monkeypatch.setattr(accumulate, "_ROWS_PER_UPDATE", rows_per_update)
        return pg.collect_statistics(model, data, seed=seed, batch_size=batch_size)["0"].shapiro_p

    first = shapiro(0, 7, 10)
    torch.testing.assert_close(shapiro(0, 60, 1024), first)
    assert not torch.allclose(shapiro(1, 7, 10), first)
    # Every image is as likely as any other to be in the sample.
    numbers = torch.arange(60)
    drawn = torch.cat([accumulate._keys(seed, numbers).argsort()[:20] for seed in range(600)])
    kept = torch.bincount(drawn, minlength=60).numpy()
    assert stats.chisquare(kept).pvalue > 1e-3


def test_nothing_is_left_on_the_model_and_progress_is_told():
    model, seen = small_network(), []
    pg.collect_statistics(
        model, TensorDataset(IMAGES, LABELS), batch_size=25, on_progress=lambda *told: seen.append(told)
    )
    assert seen[:3] == [("images", 25, 60), ("images", 50, 60), ("images", 60, 60)]
    assert seen[-1] == ("normality", 12, 12)
    with pytest.raises(RuntimeError):
        pg.collect_statistics(model, TensorDataset(IMAGES[:, :1], LABELS))
    assert all(not module._forward_hooks for module in model.modules())
    with pytest.raises(ModelError, match=r"model\.eval\(\)"):
        pg.collect_statistics(model.train(), TensorDataset(IMAGES, LABELS))


def test_constant_channels_count_as_normal():
    assert accumulate.shapiro_p_values(np.ones((10, 2))).tolist() == [1.0, 1.0]
    assert accumulate.shapiro_p_values(np.arange(4.0).reshape(2, 2)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("data", "options", "error", "words"),
    [
        (TensorDataset(IMAGES, LABELS + 1), {}, StatisticsError, "from 1 to 5, but the model has 5"),
        (TensorDataset(IMAGES[:1], LABELS[:1]), {}, StatisticsError, "contain 1 images"),
        (iter([IMAGES]), {}, StatisticsError, "have no labels"),
        (TensorDataset(IMAGES), {}, StatisticsError, "have no labels"),
        (TensorDataset(IMAGES, LABELS.unsqueeze(1)), {}, StatisticsError, r"labels of shape \(32, 1\)"),
        (TensorDataset(IMAGES, LABELS + 0.5), {}, StatisticsError, r"type torch\.float32 for 32 inputs"),
        (TensorDataset(IMAGES, torch.rand(60, 5)), {}, StatisticsError, r"labels of shape \(32, 5\)"),
        (iter([("x", LABELS)]), {}, StatisticsError, "inputs of type str"),
        (iter([(IMAGES, LABELS)]), {"workers": 2}, SettingError, "workers` is 2"),
        (TensorDataset(IMAGES, LABELS), {"seed": -1}, SettingError, "seed` is -1"),
        (
            TensorDataset(IMAGES, LABELS),
            {"metadata": {"a": 1}},
            SettingError,
            r"metadata\['a'\]. is 1, but",
        ),
        (None, {}, SettingError, "data` is a NoneType"),
        (TensorDataset(IMAGES, LABELS), {"labels": "guessed"}, SettingError, "given, predicted"),
    ],
)
def test_data_that_cannot_be_used(data, options, error, words):
    with pytest.raises(error, match=words):
        pg.collect_statistics(small_network(), data, **options)


def test_autocast_around_the_call_is_respected():
    model, data = small_network(dtype=torch.float32), TensorDataset(IMAGES.float(), LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        layer = pg.collect_statistics(model, data, batch_size=60)["0"]
        output = model[0](IMAGES.float()).detach()
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(layer.mean, output.double().clamp(min=0).mean((0, 2, 3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(2, 5, 9), (2, 5, 7, 6), (3, 4, 3, 5, 2)])
@pytest.mark.parametrize("elements", [1, 13, 1 << 21])
def test_the_gap_in_parts_is_the_gap_of_any_layout(monkeypatch, shape, elements):
    monkeypatch.setattr(collect, "_ELEMENTS", elements)
    output = torch.randn(shape)
    layouts = [output, output.transpose(1, -1).contiguous().transpose(1, -1)]
    for laid in layouts:
        expected = np.maximum(output.double().numpy(), 0).mean(axis=tuple(range(2, len(shape))))
        np.testing.assert_allclose(collect._gap(laid), expected, rtol=1e-6)


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x):
        return self.conv(x), x


def test_models_whose_output_are_no_logits():
    data = TensorDataset(IMAGES, LABELS)
    with pytest.raises(ModelError, match=r"TwoOutputs is tuple, but statistics need logits of shape \(B, K\)"):
        pg.collect_statistics(TwoOutputs().double().eval(), data)
    with pytest.raises(ModelError, match=r"output of Sequential is \(32, 3, 6, 6\)"):
        pg.collect_statistics(nn.Sequential(nn.Conv2d(3, 3, 3)).double().eval(), data)


def test_layers_that_are_never_called_are_named():
    model = small_network()
    model.append(nn.Sequential(nn.Identity())).eval()
    model[8].never = nn.Conv2d(1, 1, 1)
    model[8].forward = lambda x: x
    with pytest.raises(StatisticsError, match=r"layer '8\.never'"):
        pg.collect_statistics(model.eval(), TensorDataset(IMAGES, LABELS), layers="*")
    assert list(pg.collect_statistics(model, TensorDataset(IMAGES, LABELS))) == ["0", "2"]


def test_a_data_set_of_inputs_alone_does_for_predicted_labels():
    model = small_network()
    alone = pg.collect_statistics(model, TensorDataset(IMAGES), labels="predicted")["0"]
    torch.testing.assert_close(alone.mean, pg.collect_statistics(model, TensorDataset(IMAGES, LABELS))["0"].mean)


class Caching(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.scale = small_network(), None

    def forward(self, x):
        if self.scale is None:
            self.scale = torch.ones_like(x)
        return self.body(x * self.scale[: len(x)])


def test_the_model_and_the_global_generator_are_as_before():
    model, state = Caching().eval(), torch.get_rng_state()
    pg.collect_statistics(model, TensorDataset(IMAGES, LABELS))
    assert torch.equal(torch.get_rng_state(), state)
    # What the model kept of a pass serves a gradient later.
    assert torch.isfinite(pg.Explainer(model, pg.GradientEnergy()).attribute(IMAGES[:2], 0)).all()


class Folding(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.conv(x.flatten(0, 1).unsqueeze(1)).mean((2, 3)).view(len(x), -1))


def test_a_layer_that_sees_other_rows_is_named():
    with pytest.raises(StatisticsError, match=r"layer 'conv' .* 32 images"):
        pg.collect_statistics(Folding().double().eval(), TensorDataset(IMAGES, LABELS))


def test_a_damaged_photograph_is_one_sentence_from_a_loading_process_too(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    folder = PhotographFolder(tmp_path, lambda image: torch.zeros(3, 8, 8, dtype=torch.float64))
    for workers in (0, 1):
        with pytest.raises(ImageError) as caught:
            pg.collect_statistics(small_network(), folder, labels="predicted", workers=workers)
        assert "a.png' is not a readable image" in str(caught.value)
        assert "\n" not in str(caught.value)


class Stream(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


@pytest.mark.parametrize("make", [list, Stream])
@pytest.mark.parametrize("gone", [[0], [3, 4, 5, 6, 7], [59], [*range(1, 60, 3)]])
def test_what_cannot_be_had_is_left_out(make, gone):
    # The second batch is left out as a whole, and of others the first or the last.
    pairs = list(zip(IMAGES, LABELS.tolist(), strict=True))
    items = [LeftOut(f"number {i} is gone") if i in gone else pair for i, pair in enumerate(pairs)]
    with pytest.warns(StatisticsWarning) as said:
        found = pg.collect_statistics(small_network(), make(items), batch_size=4)
    assert [str(entry.message) for entry in said] == [f"Left out: number {i} is gone." for i in gone]
    kept = [i for i in range(60) if i not in gone]
    for name, values in gaps(small_network()).items():
        check(found[name], values[kept], np.eye(5)[LABELS[kept]])
    assert found.metadata["images"] == str(len(kept))
    # No image is taken for another.
    assert len(set(found.sample.keys.tolist())) == len(kept)


def test_a_collection_of_which_all_is_left_out_is_said():
    with pytest.warns(StatisticsWarning), pytest.raises(StatisticsError, match="The data contain 0 images"):
        pg.collect_statistics(small_network(), [LeftOut("it is gone")] * 8, batch_size=4)


def test_images_of_whole_numbers_need_a_model_that_takes_them():
    images = torch.randint(0, 255, (12, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    data = [(image, index % 5) for index, image in enumerate(images)]
    network = small_network()
    with pytest.raises(InputError, match=r"dtype torch\.uint8 .*floating point"):
        pg.collect_statistics(network, data)

    class Scaling(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(x.double() / 255)

    found = pg.collect_statistics(Scaling().eval(), data)
    expected = pg.collect_statistics(network, [(image.double() / 255, label) for image, label in data])
    for name, layer in expected.items():
        assert torch.equal(found[f"network.{name}"].class_mean, layer.class_mean)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(IMAGES, LABELS.tolist(), strict=True))


class OwnBatches:
    def __iter__(self):
        yield IMAGES[:40], LABELS[:40].tolist()
        yield IMAGES[40:], LABELS[40:]


@pytest.mark.parametrize("labels", ["given", "predicted"])
@pytest.mark.parametrize(
    ("data", "workers"),
    [
        (TensorDataset(IMAGES, LABELS), 0),
        (TensorDataset(IMAGES, LABELS), 1),
        # Their labels become tensors when they are collated.
        (list(zip(IMAGES, LABELS.tolist(), strict=True)), 0),
        (Stream(), 0),
        (OwnBatches(), 0),
    ],
)
def test_the_default_device_does_not_matter(monkeypatch, data, workers, labels):
    # On meta, any tensor that the package makes there would hold no numbers.
    monkeypatch.setattr(accumulate, "_ROWS_PER_UPDATE", 16)
    monkeypatch.setattr(accumulate, "_SAMPLE", 20)
    model, options = small_network(), {"labels": labels, "batch_size": 7, "workers": workers}
    expected = pg.collect_statistics(model, data, **options)
    with torch.device("meta"):
        found = pg.collect_statistics(model, data, **options)
    assert_same(found, expected, rtol=0)


def test_checkpoints_files_and_selectors_under_another_default_device(tmp_path):
    model, halves = small_network(), [TensorDataset(IMAGES[part], LABELS[part]) for part in (slice(30), slice(30, 60))]
    options = {"batch_size": 7, "checkpoint": tmp_path / "checkpoint", "checkpoint_every": 2}

    def stop(stage, done, total):
        if done == 21:
            raise KeyboardInterrupt

    def compute(folder):
        first, second = (pg.collect_statistics(model, half, batch_size=7) for half in halves)
        merged = accumulate.merge_statistics([first, second])
        for name, held in (
            ("merged", merged),
            ("few", merged.restrict(classes=[1, 3])),
            ("compact", merged.compact(test="welch")),
        ):
            held.save(folder / name)
        merged, few, compact = (
            pg.ChannelStatistics.load(folder / name, model) for name in ("merged", "few", "compact")
        )
        selectors = (
            pg.ClassWise(merged, quantile=0.3),
            pg.ClassWise(few, alpha=0.4),
            pg.ClassWise(compact, quantile=0.3),
            pg.InstanceWise(merged, quantile=0.3),
        )
        targets = [1, 3]
        maps = [pg.Explainer(model, selector).attribute(IMAGES[:2], targets) for selector in selectors]
        ranks = [layer.class_log_p() for held in (merged, few, compact) for layer in held.values()]
        return merged, [*maps, *ranks, collect.collect_gaps(model, [IMAGES], "2")]

    (tmp_path / "cpu").mkdir()
    expected, numbers = compute(tmp_path / "cpu")
    (tmp_path / "meta").mkdir()
    with torch.device("meta"):
        with pytest.raises(KeyboardInterrupt):
            pg.collect_statistics(model, halves[0], on_progress=stop, **options)
        resumed = pg.collect_statistics(model, halves[0], **options)
        found, under_meta = compute(tmp_path / "meta")
    assert_same(resumed, pg.collect_statistics(model, halves[0], batch_size=7))
    assert_same(found, expected, rtol=0)
    assert all(map(torch.equal, under_meta, numbers))
