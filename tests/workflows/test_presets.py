from dataclasses import replace

import pytest

from parchgrad.cli.evaluation import complete_presets
from parchgrad.errors import SettingError
from parchgrad.evaluation.leaderboard import LEADERBOARD_SCORES
from parchgrad.evaluation.scores import ScoreSettings
from parchgrad.evaluation.settings import Grid
from parchgrad.workflows.evaluation import DataSettings, read_settings
from parchgrad.workflows.presets import PRESETS, find_preset

GIVEN = {"model": "resnet18", "data": {"name": "imagenet", "root": "photos", "annotations": "boxes"}}


def test_the_paper_is_its_grid_on_500_images():
    found = read_settings(None, GIVEN, preset="paper")
    assert found.data == DataSettings(name="imagenet", root="photos", annotations="boxes", count=500)
    assert found.scores == ScoreSettings(families=("perturbation", "localisation"))
    assert found.grid == Grid(
        methods=("gradient", "input_x_gradient", "integrated_gradients", "smoothgrad"),
        selectors=("class", "instance"),
        quantiles=(0.05, 0.1),
        softnesses=(0.0,),
        layers=(0.3, 0.5, 0.9, 1.0),
        conserves=("independent", "none"),
    )
    edits = [setting for setting in found.grid.settings() if setting.selector in ("class", "instance")]
    assert len(edits) == 4 * 2 * 2 * 4 * 2
    # The paper has none of this package's rules.
    assert {(setting.gates, setting.antialias, setting.balance) for setting in edits} == {(0.0, False, False)}


def test_the_leaderboard_has_its_methods_and_scores_on_100_images():
    found = read_settings(None, {**GIVEN, "scores": {"steps": 5}}, preset="leaderboard")
    assert (found.compare, found.data.count) == ("leaderboard", 100)
    assert found.scores == replace(LEADERBOARD_SCORES, steps=5)
    with pytest.raises(SettingError, match="grid"):
        read_settings(None, {**GIVEN, "grid": {"selectors": ["energy"]}}, preset="leaderboard")


def test_a_file_goes_before_the_preset_and_overrides_before_both(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text('[data]\ncount = 60\n[grid]\nquantiles = 0.2\nlayers = "all"\n')
    overrides = {**GIVEN, "grid": {"layers": ["published"], "methods": None}}
    found = read_settings(path, overrides, preset="paper")
    assert (found.data.count, found.grid.quantiles, found.grid.layers) == (60, (0.2,), ("published",))
    assert len(found.grid.methods) == 4
    assert find_preset("paper")["grid"]["layers"] == [0.3, 0.5, 0.9, 1.0], "the preset stays as it is"


def test_an_unknown_preset_is_said():
    with pytest.raises(SettingError, match=r"`preset` is 'papers'.* paper"):
        read_settings(None, GIVEN, preset="papers")
    assert complete_presets("") == list(PRESETS)
    assert complete_presets("pa") == ["paper"]
