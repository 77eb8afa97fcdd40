"""The study in miniature: what `make study` runs still runs, and what it writes says what the rows say."""

import csv
import sys

import pytest
from benchmarks import study

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
