"""The study in miniature: what `make study` runs still runs, and what it writes says what the rows say."""

import csv
import sys

import pytest
import torch
from benchmarks import architectures, outputs, study
from torch import nn
from torch.nn import functional

import parchgrad as pg
from parchgrad.evaluation.rows import read_rows
from parchgrad.evaluation.summary import compare, valid_mean


def test_every_question_compares_settings_that_differ_from_its_reference():
    for question in study.QUESTIONS:
        settings = (question.reference, *question.settings)
        assert len(set(settings)) == len(settings), question.title
        assert len({setting.title for setting in settings}) == len(settings)
    assert len({question.title for question in study.QUESTIONS}) == len(study.QUESTIONS)


def test_the_study_runs_and_says_what_its_rows_say(tmp_path, monkeypatch):
    runs, out = tmp_path / "runs", tmp_path / "out"
    arguments = ["--tracks", "shapes", "--share", "0.02", "--runs", str(runs), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["study.py", "--data", str(tmp_path), *arguments])
    study.main()
    text = (out / "results.md").read_text()
    assert text.count("\n## ") == len(study.QUESTIONS) + 1
    assert "nan" not in text
    rows = read_rows(runs / "odd" / "shapes")
    by_setting = {title: [row for row in rows if row["setting"] == title] for title in {row["setting"] for row in rows}}
    assert {len(found) for found in by_setting.values()} == {2}
    with (out / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    line = next(
        line for line in lines if (line["setting"], line["score"]) == (study.DEFAULT.title, "weighted_mass_inside")
    )
    scores, plain = (
        [row["weighted_mass_inside"] for row in by_setting[title]] for title in (study.DEFAULT.title, "gradient")
    )
    assert float(line["mean"]) == pytest.approx(valid_mean(scores).value)
    assert float(line["low"]) == pytest.approx(compare(scores, plain).low)
    assert {path.name for path in out.iterdir()} == {
        "results.md",
        "results.csv",
        "shapes-quantile.png",
        "shapes-layers.png",
        "shapes-gates.png",
    }


def test_the_study_of_architectures_runs_and_says_what_its_rows_say(tmp_path, monkeypatch, capsys):
    runs, out = tmp_path / "runs", tmp_path / "out"
    monkeypatch.setattr(
        sys,
        "argv",
        ["architectures.py", "--data", str(tmp_path), "--share", "0.02", "--runs", str(runs), "--out", str(out)],
    )
    monkeypatch.setattr(architectures, "NETWORKS", {"shapes_vit": "a transformer"})
    quick = tuple(
        each
        for each in architectures.SETTINGS
        if each.method not in architectures.MANY_PASSES and each.selector in (None, "evidence")
    )
    monkeypatch.setattr(architectures, "SETTINGS", quick)
    asked = architectures.settings_for(pg.load_model("shapes_vit").model)
    architectures.main()
    assert "has no data for them" in capsys.readouterr().err
    text = (out / "architectures.md").read_text()
    assert text.count("\n## ") == 2
    rows = read_rows(runs / "odd" / "shapes_vit-1")
    assert {row["setting"] for row in rows} == {architectures.ROLLOUT, *(setting.title for setting in asked)}
    with (out / "architectures.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["score"] == "weighted_mass_inside"]
    for title in (architectures.DEFAULT.title, architectures.ROLLOUT):
        found = [float(line["mean"]) for line in lines if line["setting"] == title]
        expected = valid_mean([row["weighted_mass_inside"] for row in rows if row["setting"] == title]).value
        assert found[1] == pytest.approx(expected)


def test_attention_rollout_by_hand():
    """Two layers with one head and known weights: the flow is the product of the averages with the identity."""
    weights = [torch.rand(1, 1, 5, 5).softmax(-1) for _ in range(2)]

    class Attention(nn.Module):
        def forward(self, images):
            for each in weights:
                # Queries whose scores are the logarithms of the weights.
                query, key = each.log() * 5**0.5, torch.eye(5)[None, None]
                functional.scaled_dot_product_attention(query, key, key)
            return images

    found = architectures.attention_rollout(Attention())(torch.zeros(1, 3, 4, 4), torch.tensor([0]))
    first, second = (0.5 * (each[0, 0] + torch.eye(5)) for each in weights)
    coarse = (second @ first)[0, 1:].reshape(1, 1, 2, 2)
    expected = functional.interpolate(coarse, size=(4, 4), mode="bilinear")[:, 0]
    torch.testing.assert_close(found, expected)


def test_the_study_of_outputs_runs_and_says_what_its_rows_say(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["outputs.py", "--share", "0.03", "--out", str(tmp_path)])
    kept, run = [], outputs.run
    monkeypatch.setattr(outputs, "run", lambda *arguments: kept.append(run(*arguments)) or kept[-1])
    outputs.main()
    text = (tmp_path / "outputs.md").read_text()
    assert text.count("\n## ") == len(outputs.TRACKS) == len(kept)
    assert text.count("mass inside the rival ↓") == len(outputs.TRACKS)
    assert "mass inside ↑" not in text
    with (tmp_path / "outputs.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["score"] for line in lines} == {"weighted_mass_inside", "mass_inside_rival"}
    for rows in kept:
        for title in {row["setting"] for row in rows}:
            values = {
                line["score"]: float(line["mean"])
                for line in lines
                if (line["model"], line["setting"]) == (rows[0]["model"], title)
            }
            own, rival = (
                valid_mean([row[name] for row in rows if row["setting"] == title]).value
                for name in ("weighted_mass_inside", "mass_inside")
            )
            assert values == pytest.approx({"weighted_mass_inside": own, "mass_inside_rival": rival})


def test_less_mass_inside_the_rival_is_better():
    rows = [
        {
            "model": "m",
            "setting": setting,
            "index": index,
            "seconds": 1.0,
            "weighted_mass_inside": 1.0,
            "mass_inside": share + index / 1000,
        }
        for setting, share in ((outputs.PLAIN, 0.3), ("less", 0.2), ("more", 0.4))
        for index in range(20)
    ]
    found = outputs.summarise_rows(rows)
    cells = {setting: found.cells[setting, "mass_inside"] for setting in found.settings}
    assert [cells[setting].verdict for setting in ("less", outputs.PLAIN, "more")] == ["better", "open", "worse"]
    assert [cells[setting].rank for setting in ("less", outputs.PLAIN, "more")] == [1, 2, 3]


def test_grad_cam_of_a_score_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    image = torch.randn(3, 6, 6)
    features = model[0](image[None]).detach()
    # The gradient of an average over 36 pixels behind a rectifier.
    gradient = model[4].weight[1].detach()[:, None, None] / 36 * (features[0] > 0)
    expected = (gradient.mean(dim=(1, 2))[:, None, None] * features[0]).sum(dim=0).relu()
    found = outputs.grad_cam(model)(image, lambda logits: logits[:, 1])
    torch.testing.assert_close(found, expected)
