import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import parchgrad as pg
from parchgrad.data.samples import Sample
from parchgrad.errors import InputError, ModelError, OutputError, SettingError, TargetError
from parchgrad.evaluation.localisation import boxes_to_region
from parchgrad.evaluation.methods import (
    centre_blob,
    grad_cam,
    maps_of,
)
from parchgrad.evaluation.rows import read_rows
from parchgrad.evaluation.runs import evaluate
from parchgrad.evaluation.scores import FAMILIES, ScoreSettings, score_maps
from parchgrad.evaluation.settings import Grid, Setting
from tests.support import SCORES, SETTINGS, Noise, close, comparable, order, random_statistics, run, small_network


def test_rows_are_what_the_scores_of_each_image_say(tmp_path):
    network, data = small_network(), Noise()
    rows = run(tmp_path, name="small")
    assert [(row["setting"], row["index"]) for row in rows] == [
        (setting.title, index) for setting in SETTINGS for index in range(7)
    ]
    methods = (
        maps_of(pg.Explainer(network, None)),
        centre_blob(),
        maps_of(pg.Explainer(network, pg.GradientEnergy(quantile=0.34), layers="all")),
    )
    for row, (method, index) in zip(rows, [(method, index) for method in methods for index in range(7)], strict=True):
        sample = data[index]
        image, target = sample.image.double().unsqueeze(0), torch.tensor([sample.label])
        region = sample.mask
        if sample.boxes is not None:
            region = boxes_to_region(sample.boxes, height=8, width=8)
        found = score_maps(network, method, image, target, method(image, target), [region], SCORES)
        for name, value in found.items():
            expected = "NaN" if value.isnan() else pytest.approx(value.item(), rel=1e-9, abs=1e-12)
            assert row[name] == expected, name
        probability = network(image).softmax(1)[0]
        assert row["predicted"] == probability.argmax().item()
        assert row["probability"] == pytest.approx(probability.max().item())
        assert (row["label"], row["target"], row["image"], row["model"]) == (
            sample.label,
            sample.label,
            sample.name,
            "small",
        )
    settings = {name: rows[-1][name] for name in vars(Setting())}
    assert settings == {
        "method": "gradient",
        "selector": "energy",
        "quantile": 0.34,
        "softness": 0.5,
        "layers": "all",
        "gamma": "inf",
        "conserve": "energy",
        "gates": 1.0,
        "antialias": True,
        "balance": True,
        "masks": "own",
    }
    missing, rules = ("selector", "quantile", "softness", "layers"), ("gates", "antialias", "balance")
    plain = {name: rows[0][name] for name in (*missing, *rules)}
    assert plain == {**dict.fromkeys(missing, "NaN"), **dict.fromkeys(rules, 0)}


def test_the_predicted_class_may_be_explained(tmp_path):
    rows = run(tmp_path, target="predicted")
    assert all(row["target"] == row["predicted"] for row in rows)
    assert any(row["label"] != row["target"] for row in rows)
    with pytest.raises(SettingError, match="`target` is 'best'"):
        run(tmp_path, target="best")


def test_a_run_goes_on_and_finished_settings_cost_nothing(tmp_path):
    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", settings=SETTINGS[:1])

    class Counting(Noise):
        loaded = 0

        def __getitem__(self, index):
            Counting.loaded += 1
            return super().__getitem__(index)

    assert run(tmp_path / "parts", data=Counting(), settings=SETTINGS[:1])
    assert Counting.loaded == 0
    told = []
    close(run(tmp_path / "parts", data=Counting(), on_progress=lambda *counts: told.append(counts)), whole)
    # The examples are loaded again when all is there.
    assert Counting.loaded == 7 + 6
    assert told[0] == (10, 21)
    assert told[-1] == (21, 21)


@pytest.mark.parametrize("cut", [1, 30, 400, 4000])
def test_a_line_that_was_cut_off_is_had_again(tmp_path, cut):
    whole = run(tmp_path)
    file = tmp_path / "rows-0.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    close(run(tmp_path), whole)
    assert len(file.read_text().splitlines()) == 21
    # A power cut may leave a length without its content.
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-2]) + bytes(cut))
    close(run(tmp_path), whole)
    assert len(file.read_text().splitlines()) == 21


def test_processes_that_share_the_images_write_the_rows_of_one(tmp_path):
    whole = run(tmp_path / "whole")
    for rank in range(2):
        run(tmp_path / "shared", process=(rank, 2))
    counts = [len((tmp_path / "shared" / f"rows-{rank}.jsonl").read_text().splitlines()) for rank in range(2)]
    assert counts == [12, 9]
    close(sorted(comparable(read_rows(tmp_path / "shared")), key=order), sorted(whole, key=order))
    # Another number of processes finds everything done.
    run(tmp_path / "shared")
    assert (tmp_path / "shared" / "rows-0.jsonl").read_text().count("\n") == 12


def test_a_run_of_something_else_is_not_mixed_in(tmp_path, monkeypatch):
    run(tmp_path)
    with pytest.raises(SettingError, match="different seed"):
        run(tmp_path, seed=1)
    other = Noise(5)
    other.fingerprint = "other noise"
    with pytest.raises(SettingError, match="different data, images\\."):
        run(tmp_path, data=other)
    with pytest.raises(SettingError, match="different target"):
        run(tmp_path, target="predicted")
    held = random_statistics({"0": 6, "2": 6})
    with pytest.raises(SettingError, match="different statistics"):
        run(tmp_path, statistics=held)
    with monkeypatch.context() as patched:
        patched.setattr("parchgrad.evaluation.runs.__version__", "0.0.1")
        with pytest.raises(SettingError, match="different parchgrad"):
            run(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("parchgrad.evaluation.runs._FORMAT", 1)
        with pytest.raises(SettingError, match="the format of another"):
            run(tmp_path)
    changed = small_network()
    with torch.no_grad():
        changed[0].bias[0] += 1e-6
    with pytest.raises(SettingError, match="different weights"):
        evaluate(changed, Noise(), SETTINGS, tmp_path, scores=SCORES)


def test_damaged_rows_and_folders_are_said(tmp_path):
    run(tmp_path)
    with (tmp_path / "rows-0.jsonl").open("a") as file:
        file.write("not a row\n")
    with pytest.raises(InputError, match=r"Line 22 of .*rows-0.jsonl"):
        read_rows(tmp_path)
    with pytest.raises(InputError, match="nowhere'"):
        read_rows(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        run(tmp_path / "file" / "below")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run.json"):
        run(tmp_path)


def test_methods_of_ones_own_run_beside_the_settings(tmp_path):
    scores = ScoreSettings(families=("perturbation", "randomisation"), ratios=(0.2, 0.6), randomised=(1.0,))
    for folder, methods in (("own", {"mine": grad_cam}), ("named", {})):
        settings = [Setting(), *([] if methods else [Setting(method="grad_cam")])]
        evaluate(small_network(), Noise(), settings, tmp_path / folder, scores=scores, batch_size=3, methods=methods)
    own, named = (comparable(read_rows(tmp_path / folder)) for folder in ("own", "named"))
    describing = {"setting", *vars(Setting())}
    assert [(row["setting"], row["method"], row["selector"]) for row in own[7:8]] == [("mine", "mine", "NaN")]
    close(
        [{key: value for key, value in row.items() if key not in describing} for row in own],
        [{key: value for key, value in row.items() if key not in describing} for row in named],
    )
    with pytest.raises(SettingError, match=r"Two methods .* 'gradient'"):
        evaluate(small_network(), Noise(), [Setting()], tmp_path / "twice", methods={"gradient": grad_cam})


def test_stability_is_kept_by_noise_level(tmp_path):
    # Unlike shares, a noise level may exceed 1.
    scores = ScoreSettings(families=("stability",), noises=(1e-5, 0.01, 2.5), noise_draws=2)
    settings = [Setting(), Setting(method="centre_blob")]
    evaluate(small_network(), Noise(count=2), settings, tmp_path, scores=scores)
    levels = ("", "@1e-05", "@0.01", "@2.5")
    names = {f"stability_{score}{level}" for score in ("cosine", "spearman", "norm_ratio") for level in levels}
    rows = read_rows(tmp_path)
    assert len(rows) == 4
    assert all({name for name in row if name.startswith("stability")} == names for row in rows)
    for row in rows[2:]:
        assert [row[f"stability_cosine{level}"] for level in levels] == pytest.approx([1] * 4)
        assert [row[f"stability_norm_ratio{level}"] for level in levels] == pytest.approx([1] * 4)
    for row in rows[:2]:
        cosines = [row[f"stability_cosine{level}"] for level in levels]
        assert cosines[0] == pytest.approx(sum(cosines[1:]) / 3)
        assert 1 - 1e-6 < cosines[1] <= 1
        assert cosines[3] < cosines[1]


def test_what_would_end_badly_is_said_first(tmp_path):
    training = small_network().train()
    before = {name: value.clone() for name, value in training.state_dict().items()}
    with pytest.raises(ModelError, match="training mode"):
        evaluate(training, Noise(), [Setting(method="centre_blob")], tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in training.state_dict().items())
    for process in ((2, 2), (0, 0), (-1, 2)):
        with pytest.raises(SettingError, match="`process`"):
            run(tmp_path, process=process)

    class Beyond(Noise):
        def __getitem__(self, index):
            return Sample(image=torch.randn(3, 8, 8), label=5, name=f"{index}")

    with pytest.raises(TargetError, match="has 5 classes"):
        run(tmp_path, data=Beyond())


def a_row(**fields):
    return json.dumps({"model": "m", "setting": "s", "image": "i", "index": 0, "seconds": 1.0, "label": 0, **fields})


def test_a_row_is_read(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "rows-0.jsonl").write_text(f"{a_row()}\n")
    assert [row["label"] for row in read_rows(tmp_path)] == [0]
    (tmp_path / "rows-0.jsonl").write_text(f"{a_row(antialias=False, balance=True, gates=2, softness=None)}\n")
    assert [(row["antialias"], row["balance"], row["gates"]) for row in read_rows(tmp_path)] == [(False, True, 2)]


@pytest.mark.parametrize(
    "row",
    [
        '{"setting": [], "index": 0}',
        '{"setting": "a", "index": "0"}',
        "[" * 100_000,
        "3",
        a_row(index=-1),
        a_row(label=-1),
        a_row(label=0.5),
        a_row(label=True),
        a_row(antialias="on"),
        a_row(antialias=1),
        a_row(balance="on"),
        a_row(balance=1),
        a_row(gates=True),
        a_row(softness="soft"),
        a_row(index=10**101),
        a_row(**{"aopc@2": 0.5}),
        a_row(**{"stability_cosine@inf": 0.5}),
        a_row(**{"stability_cosine@-0.1": 0.5}),
    ],
)
def test_rows_that_are_none_are_said(tmp_path, row):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "rows-0.jsonl").write_text(f"{row}\n")
    with pytest.raises(InputError, match="not a row of a run"):
        read_rows(tmp_path)


def test_images_of_several_sizes_are_said(tmp_path):
    class Uneven(Noise):
        def __getitem__(self, index):
            return Sample(image=torch.randn(3, 8, 8 + index), label=0, name=f"{index}")

    with pytest.raises(InputError, match=r"\(3, 8, 8\) and \(3, 8, 9\)"):
        run(tmp_path, data=Uneven())


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        ({"group": 3}, [Setting()], "'group'"),
        ({"label": torch.tensor(1)}, [Setting()], "Object of type Tensor is not JSON serializable"),
        ({}, [Setting(selector="energy", gamma=1e101)], "'gamma'"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(tmp_path, change, settings, words):
    class Odd(Noise):
        def __getitem__(self, index):
            return replace(super().__getitem__(index), **change)

    with pytest.raises(InputError, match=rf"image 'noise 0' \({words}"):
        run(tmp_path, data=Odd(), settings=settings)
    assert read_rows(tmp_path) == []


@pytest.mark.filterwarnings("ignore::parchgrad.errors.StatisticsWarning")
def test_the_default_device_does_not_matter(tmp_path):
    # On meta, any tensor that the package makes there would hold no numbers.
    network, data = small_network(), [Noise()[index] for index in range(2)]
    samples = Listed(data)
    settings = (
        *Grid(selectors=("class",)).settings(),
        Setting(selector="instance"),
        Setting(method="smoothgrad"),
        Setting(selector="energy", masks="another"),
        Setting(selector="energy", masks="shuffled"),
    )
    scores = ScoreSettings(
        families=FAMILIES,
        ratios=(0.5,),
        replacement="noise",
        steps=2,
        tolerance=28,
        samples=2,
        randomised=(0.5,),
        draws=1,
        noises=(0.5,),
        noise_draws=2,
    )

    def rows(folder, statistics):
        evaluate(network, samples, settings, folder, scores=scores, batch_size=3, statistics=statistics)
        return comparable(read_rows(folder))

    first, second = random_statistics({"0": 6, "2": 6}), random_statistics({"0": 6, "2": 6})
    expected = rows(tmp_path / "cpu", first)
    assert len(expected) == 2 * len(settings)
    with torch.device("meta"):
        assert rows(tmp_path / "meta", second) == expected
    examples = "examples.safetensors"
    torch.testing.assert_close(load_file(tmp_path / "meta" / examples), load_file(tmp_path / "cpu" / examples))


class Listed:
    categories, fingerprint = Noise.categories, "listed"

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]
