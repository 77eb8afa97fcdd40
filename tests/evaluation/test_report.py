import csv
import io
import math

import numpy as np
import pytest

from parchgrad.errors import InputError, SettingError
from parchgrad.evaluation.report import csv_table, markdown_table, relative_time, summarise, title_of
from parchgrad.evaluation.summary import compare

SETTINGS = ("gradient", "random map", "gradient, energy 0.1, all layers", "twin")


def made_up_rows(images=60):
    """Scores of which the first are known by how they are made."""
    generator = np.random.default_rng(0)
    base = {name: generator.uniform(0.3, 0.6, images) for name in ("aopc", "aopc_lerf", "mass_inside", "gini")}
    gain = {"gradient": 0.0, "random map": -0.2, "gradient, energy 0.1, all layers": 0.2, "twin": 0.0}
    rows = []
    for setting in SETTINGS:
        for index in range(images):
            noise = generator.normal(0, 0.1, 4) if setting != "gradient" else np.zeros(4)
            rows.append(
                {
                    "model": "m",
                    "setting": setting,
                    "index": index,
                    "seconds": 3.0 if "energy" in setting else 2.0,
                    "aopc": base["aopc"][index] + gain[setting] + noise[0],
                    "aopc@0.1": base["aopc"][index],
                    "aopc_lerf": base["aopc_lerf"][index] + gain[setting] + noise[1],
                    "mass_inside": math.nan if index % 3 else base["mass_inside"][index] + gain[setting] + noise[2],
                    "gini": base["gini"][index] + gain[setting] + noise[3],
                }
            )
    return rows


def column(rows, setting, name):
    return [row[name] for row in rows if row["setting"] == setting]


def test_cells_hold_means_and_paired_intervals():
    rows = made_up_rows()
    found = summarise(rows)
    assert found.settings == SETTINGS
    assert found.scores == ("aopc", "aopc_lerf", "mass_inside", "gini")
    assert found.images == 60
    for setting in SETTINGS[1:]:
        for name in found.scores:
            cell = found.cells[setting, name]
            values, baseline = column(rows, setting, name), column(rows, "gradient", name)
            assert cell.mean.value == pytest.approx(np.nanmean(values))
            assert cell.comparison == compare(values, baseline)
    assert found.cells["twin", "mass_inside"].mean.valid == 20
    assert found.cells["twin", "mass_inside"].comparison.images == 20
    assert found.cells["gradient", "aopc"].comparison is None


def test_parts_of_a_mosaic_are_drawn_together_and_scores_without_values_are_said():
    rows = made_up_rows()
    for row in rows:
        row["group"] = f"mosaic {row['index'] // 2}"
    found = summarise(rows, scores=["aopc"])
    cell = found.cells["twin", "aopc"]
    groups = [f"mosaic {index // 2}" for index in range(60)]
    expected = compare(column(rows, "twin", "aopc"), column(rows, "gradient", "aopc"), groups=groups)
    assert cell.comparison == expected
    assert cell.comparison.images == 30
    for row in rows:
        row.update(dict.fromkeys(("aopc", "aopc_lerf", "mass_inside", "gini", "aopc@0.1"), math.nan))
    with pytest.raises(InputError, match="No score in `rows` has a value"):
        summarise(rows)


def test_nobody_wins_where_the_interval_holds_zero_or_no_direction_is_better():
    found = summarise(made_up_rows())
    verdicts = {
        setting: [found.cells[setting, name].verdict for name in ("aopc", "aopc_lerf", "gini")] for setting in SETTINGS
    }
    assert verdicts["gradient"] == ["open", "open", "open"]
    assert verdicts["random map"] == ["worse", "better", "open"]
    assert verdicts["gradient, energy 0.1, all layers"] == ["better", "worse", "open"]
    assert verdicts["twin"] == ["open", "open", "open"]
    assert math.isnan(found.cells["twin", "gini"].rank)


def test_ranks_follow_the_direction_of_the_score():
    rows = made_up_rows()
    found = summarise(rows)
    table = np.array([column(rows, setting, "aopc_lerf") for setting in SETTINGS])
    expected = (table[:, None] > table[None]).sum(1).mean(1) + 1
    assert [found.cells[setting, "aopc_lerf"].rank for setting in SETTINGS] == pytest.approx(expected.tolist())


def test_a_setting_without_scores_leaves_the_others_ranked():
    rows = made_up_rows()
    expected = summarise([row for row in rows if row["setting"] != "twin"])
    found = summarise([{**row, "aopc": math.nan} if row["setting"] == "twin" else row for row in rows])
    for setting in SETTINGS[:3]:
        assert found.cells[setting, "aopc"].rank == expected.cells[setting, "aopc"].rank
    assert math.isnan(found.cells["twin", "aopc"].rank)
    assert found.cells["twin", "aopc"].verdict == "open"
    assert "| none valid |" in markdown_table(found).splitlines()[-1]
    # Nobody has boxes, so nobody asks how much lies in them.
    assert "mass_inside" not in summarise([{**row, "mass_inside": math.nan} for row in rows]).scores


def test_settings_are_compared_on_the_images_that_all_have():
    rows = [row for row in made_up_rows() if row["setting"] != "twin" or row["index"] < 5]
    found = summarise(rows)
    assert found.images == 5
    assert found.cells["gradient", "gini"].mean.value == pytest.approx(np.mean(column(rows, "gradient", "gini")[:5]))
    with pytest.raises(InputError, match="No image has rows of every setting"):
        summarise([*rows, {**rows[0], "setting": "late", "index": 999}])


def test_the_tables_say_the_same(tmp_path):
    found = summarise(made_up_rows())
    lines = markdown_table(found).splitlines()
    assert lines[0] == "| setting | AOPC ↑ | AOPC, LeRF ↓ | mass inside ↑ | Gini index | time |"
    energy = found.cells["gradient, energy 0.1, all layers", "aopc"]
    shown = f"**{energy.mean.value:.3f} ({energy.comparison.low:+.3f} to {energy.comparison.high:+.3f})**"
    cells = [cell.strip() for cell in lines[4].strip("|").split("|")]
    assert cells[:2] == ["gradient, energy 0.1, all layers", shown]
    assert cells[2].startswith("*")
    assert cells[3].startswith("**")
    assert cells[3].endswith(", 20 of 60 images**")
    assert cells[-1] == "1.50"
    assert relative_time(found, "twin") == 1.0
    read = list(csv.DictReader(io.StringIO(csv_table(found))))
    assert len(read) == 16
    (line,) = [row for row in read if row["setting"] == cells[0] and row["score"] == "aopc"]
    assert float(line["low"]) == energy.comparison.low
    assert line["verdict"] == "better"
    # A control is never marked.
    (line,) = [row for row in read if row["setting"] == "random map" and row["score"] == "aopc"]
    assert float(line["high"]) < 0
    assert line["verdict"] == "open"
    (line,) = [row for row in read if row["setting"] == "gradient" and row["score"] == "gini"]
    assert (line["difference"], line["rank"]) == ("", "")


def test_single_ratios_may_be_asked_for():
    found = summarise(made_up_rows(), scores=["aopc@0.1"])
    assert found.scores == ("aopc@0.1",)
    assert title_of("aopc@0.1") == "AOPC at 0.1 ↑"
    with pytest.raises(SettingError, match=r"`rows` has no score 'aopc@0\.2'.* aopc, aopc_lerf"):
        summarise(made_up_rows(), scores=["aopc@0.2"])
    with pytest.raises(SettingError, match="no score 'index'"):
        summarise(made_up_rows(), scores=["index"])


def test_rows_that_cannot_be_summarised():
    with pytest.raises(InputError, match="no model"):
        summarise([])
    rows = made_up_rows()
    with pytest.raises(InputError, match="`rows` is of m, n"):
        summarise([*rows, {**rows[0], "model": "n"}])
    with pytest.raises(SettingError, match="`baseline` is 'plain'"):
        summarise(rows, baseline="plain")
