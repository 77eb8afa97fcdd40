import math

import numpy as np
import pytest

from parchgrad.evaluation.report import pair_rows
from parchgrad.evaluation.summary import FEWEST, Comparison, compare
from parchgrad.evaluation.verdict import Conclusion, Finding, Leader, caveat, conclude, find_leader, state

EDIT, OTHER, TWIN = "edit", "other edit", "twin"
SELECTORS = {EDIT: "evidence", OTHER: "energy", TWIN: "random"}
NAMES = {
    "gradient": "plain gradient",
    EDIT: "Evidence",
    OTHER: "Gradient energy",
    TWIN: "random channels",
    "random map": "random map",
}


def rows_of(means, images=40, spread=0.1, seed=0):
    """Rows with normal scores around these means, by setting and score; None is undefined."""
    generator = np.random.default_rng(seed)
    noise = {score: generator.normal(0, spread, images) for own in means.values() for score in own}
    return [
        {
            "model": "m",
            "setting": title,
            "selector": SELECTORS.get(title, math.nan),
            "index": index,
            "seconds": 1.0,
            **{
                # Images differ, and settings differ a little on each image.
                score: math.nan if mean is None else mean + noise[score][index] + generator.normal(0, 0.02)
                for score, mean in own.items()
            },
        }
        for title, own in means.items()
        for index in range(images)
    ]


def aopc_rows(scores):
    """Rows with these values of AOPC, by setting."""
    return [
        {
            "model": "m",
            "setting": title,
            "selector": "energy" if title.startswith("edit") else None,
            "index": index,
            "aopc": score,
        }
        for title, own in scores.items()
        for index, score in enumerate(own)
    ]


def verdicts(findings):
    return {(finding.rival, finding.score): finding.outcome for finding in findings}


def test_the_leader_is_compared_with_each_kind_of_rival_and_the_best_control():
    rows = rows_of(
        {
            "gradient": {"aopc": 0.2, "deletion": 0.5, "mass_inside": 0.3, "gini": 0.5},
            EDIT: {"aopc": 0.6, "deletion": 0.5, "mass_inside": 0.4, "gini": 0.9},
            OTHER: {"aopc": 0.5, "deletion": 0.2, "mass_inside": 0.4, "gini": 0.5},
            "Grad-CAM": {"aopc": 0.4, "deletion": 0.9, "mass_inside": 0.8, "gini": 0.5},
            "SmoothGrad": {"aopc": 0.3, "deletion": 0.1, "mass_inside": 0.9, "gini": 0.5},
            "random map": {"aopc": 0.0, "deletion": 0.3, "mass_inside": 0.1, "gini": 0.5},
            TWIN: {"aopc": 0.6, "deletion": 0.9, "mass_inside": 0.2, "gini": 0.5},
        }
    )
    found = conclude(rows)
    assert found.leader == Leader(setting=EDIT, score="aopc", competing=2)
    assert verdicts(found.findings) == {
        ("gradient", "aopc"): "better",
        ("gradient", "deletion"): "open",
        ("gradient", "mass_inside"): "better",
        (OTHER, "aopc"): "better",
        # Lower is better.
        (OTHER, "deletion"): "worse",
        (OTHER, "mass_inside"): "open",
        # The best of the others by the leading score.
        ("Grad-CAM", "aopc"): "better",
        ("Grad-CAM", "deletion"): "better",
        ("Grad-CAM", "mass_inside"): "worse",
    }
    # Each score has its own best control; that no direction is better leaves out a score.
    assert verdicts(found.controls) == {
        (TWIN, "aopc"): "open",
        ("random map", "deletion"): "worse",
        (TWIN, "mass_inside"): "better",
    }
    assert verdicts(conclude(rows, scores=["deletion"]).findings).keys() == {
        (rival, "deletion") for rival in ("gradient", OTHER, "Grad-CAM")
    }


def test_intervals_are_those_of_a_second_bootstrap():
    rows = rows_of({"gradient": {"aopc": 0.2}, EDIT: {"aopc": 0.25}}, spread=1.0)
    (finding,) = conclude(rows).findings
    columns = [np.array([row["aopc"] for row in rows if row["setting"] == title]) for title in (EDIT, "gradient")]
    differences = columns[0] - columns[1]
    generator = np.random.default_rng(1)
    means = [generator.choice(differences, len(differences)).mean() for _ in range(4000)]
    low, high = np.percentile(means, [2.5, 97.5])
    assert finding.comparison.difference == pytest.approx(differences.mean())
    # The tolerance is a twentieth of the interval.
    assert finding.comparison.low == pytest.approx(low, abs=0.05 * (high - low))
    assert finding.comparison.high == pytest.approx(high, abs=0.05 * (high - low))


def test_too_few_images_settle_nothing():
    rows = rows_of({"gradient": {"aopc": 0.2}, EDIT: {"aopc": 0.9}, TWIN: {"aopc": 0.1}}, images=FEWEST - 1)
    found = conclude(rows)
    assert verdicts([*found.findings, *found.controls]) == {("gradient", "aopc"): "few", (TWIN, "aopc"): "few"}
    assert [statement.outcome for statement in state(found, NAMES)] == ["few"]
    more = rows_of({"gradient": {"aopc": 0.2}, EDIT: {"aopc": 0.9}, TWIN: {"aopc": 0.1}}, images=FEWEST)
    assert [statement.outcome for statement in state(conclude(more), NAMES)] == ["better", "better"]


def test_images_without_a_score_do_not_count():
    rows = rows_of({"gradient": {"aopc": 0.2, "mass_inside": 0.3}, EDIT: {"aopc": 0.9, "mass_inside": 0.5}})
    for row in rows:
        row["mass_inside"] = row["mass_inside"] if row["index"] < 5 else math.nan
    assert verdicts(conclude(rows).findings) == {("gradient", "aopc"): "better", ("gradient", "mass_inside"): "few"}
    # A score that the leader does not have says nothing about it.
    rows = [{**row, "mass_inside": math.nan} if row["setting"] == EDIT else row for row in rows]
    assert verdicts(conclude(rows).findings) == {("gradient", "aopc"): "better"}


def test_nobody_leads_among_controls_alone():
    rows = rows_of({"gradient": {"aopc": 0.2}, "random map": {"aopc": 0.0}, TWIN: {"aopc": 0.9}})
    assert find_leader(pair_rows(rows)) is None
    assert conclude(rows) is None
    (statement,) = state(None, NAMES)
    assert statement.outcome == "few"
    assert find_leader(pair_rows(rows_of({"gradient": {"gini": 0.2}, EDIT: {"gini": 0.9}}))) is None
    # Only the plain gradient has the first headline score.
    rows = rows_of({"gradient": {"aopc": 0.2, "deletion": 0.5}, EDIT: {"aopc": None, "deletion": 0.4}})
    assert conclude(rows).leader == Leader(setting=EDIT, score="deletion", competing=1)


def test_an_edit_without_a_rival_is_compared_with_the_controls():
    found = conclude(rows_of({EDIT: {"aopc": 0.5}, TWIN: {"aopc": 0.1}}))
    assert found.findings == ()
    assert [statement.outcome for statement in state(found, NAMES)] == ["few", "better"]
    alone = conclude(rows_of({EDIT: {"aopc": 0.5}}))
    assert [statement.outcome for statement in state(alone, NAMES)] == ["few"]


def test_intervals_widen_with_the_number_of_candidates():
    titles = [f"edit {place}" for place in range(5)]
    generator = np.random.default_rng(0)
    scores = {title: generator.normal(0, 0.1, 40) for title in ("gradient", "random map", "centre blob", *titles)}

    def expected(leading, rival, candidates):
        return compare(scores[leading], scores[rival], confidence=1 - 0.1 / candidates)

    found = conclude(aopc_rows(scores), confidence=0.9)
    leading = found.leader.setting
    assert leading == max(titles, key=lambda title: scores[title].mean())
    for finding in (*found.findings, *found.controls):
        assert finding.comparison == expected(leading, finding.rival, 5)
    # A single edit against the better of two controls.
    single = {title: own for title, own in scores.items() if title not in titles[1:]}
    found = conclude(aopc_rows(single), confidence=0.9)
    (plain,), (control,) = found.findings, found.controls
    assert plain.comparison == expected(titles[0], "gradient", 1)
    assert control.comparison == expected(titles[0], control.rival, 2)


def test_without_a_selector_another_method_leads():
    rows = rows_of({"gradient": {"aopc": 0.2}, "SmoothGrad": {"aopc": 0.4}, "mine": {"aopc": 0.3}, TWIN: {"aopc": 0.9}})
    found = conclude(rows)
    assert found.leader == Leader(setting="SmoothGrad", score="aopc", competing=2)
    assert verdicts(found.findings) == {("gradient", "aopc"): "better", ("mine", "aopc"): "better"}
    assert verdicts(found.controls) == {(TWIN, "aopc"): "worse"}


def finding(rival, score, verdict, images=40):
    comparison = Comparison(difference=0.25, low=0.125, high=0.5, images=images)
    return Finding(rival=rival, score=score, comparison=comparison, verdict=verdict)


def test_small_differences_are_not_shown_as_zero():
    comparison = Comparison(difference=0.0004, low=-0.00002, high=0.002, images=40)
    small = Finding(rival="gradient", score="aopc", comparison=comparison, verdict="open")
    leader = Leader(setting=EDIT, score="aopc", competing=1)
    (statement,) = state(Conclusion(leader=leader, findings=(small,), controls=()), NAMES)
    assert statement.numbers == "AOPC +4e-04 [-2e-05, +0.002]"


def test_findings_in_sentences():
    found = Conclusion(
        leader=Leader(setting=EDIT, score="aopc", competing=2),
        findings=(
            finding("gradient", "aopc", "better"),
            finding("gradient", "insertion", "better"),
            finding("gradient", "mass_inside", "better"),
            finding("gradient", "stability_cosine", "better"),
            finding("gradient", "randomisation_spearman", "worse"),
            finding("gradient", "deletion", "open"),
            finding("gradient", "pointing_game", "open", images=FEWEST - 1),
            finding(OTHER, "max_sensitivity", "worse"),
        ),
        controls=(
            finding(TWIN, "aopc", "open"),
            finding(TWIN, "mass_inside", "better"),
            finding(TWIN, "deletion", "worse"),
            finding("random map", "insertion", "worse"),
            finding(TWIN, "pointing_game", "open", images=2),
        ),
    )
    numbers = "+0.250 [+0.125, +0.500]"
    statements = state(found, NAMES)
    # A line of a terminal has one difference.
    assert [statement.brief.count("+0.250") for statement in statements] == [1] * len(statements)
    assert [(statement.outcome, statement.claim, statement.numbers) for statement in statements] == [
        (
            "better",
            "Evidence is more faithful (AOPC and insertion), localises better (mass inside) and is steadier "
            "(stability cosine) than the plain gradient",
            f"AOPC {numbers}; insertion {numbers}; mass inside {numbers}; stability cosine {numbers}",
        ),
        (
            "worse",
            "Evidence depends less on the weights (random weights Spearman) than the plain gradient",
            f"random weights Spearman {numbers}",
        ),
        ("open", "Evidence and the plain gradient cannot be told apart by deletion", f"deletion {numbers}"),
        (
            "few",
            "Too few images or mosaics (fewer than 20) to compare Evidence with the plain gradient by pointing game",
            f"pointing game {numbers}",
        ),
        ("worse", "Evidence is less steady (max-sensitivity) than Gradient energy", f"max-sensitivity {numbers}"),
        (
            "better",
            "Evidence is better than the best control by mass inside",
            f"mass inside {numbers} against random channels",
        ),
        (
            "worse",
            "Evidence is worse than a control (random channels; random map) by deletion and insertion",
            f"deletion {numbers} against random channels; insertion {numbers} against random map",
        ),
        (
            "control",
            "Evidence and a control cannot be told apart by AOPC",
            f"AOPC {numbers} against random channels",
        ),
    ]


def test_the_leader_is_that_of_the_images_it_is_judged_on():
    rows = [
        {"model": "m", "setting": title, "selector": name, "index": index, "seconds": 1.0, "aopc": float(index) + more}
        for title, name, more, first in (
            ("gradient", math.nan, 0, 20),
            (EDIT, "evidence", 0, 25),
            (OTHER, "energy", 0.5, 0),
        )
        for index in range(first, 60)
    ]
    # Over all of its rows, the first edit has the better mean: it lacks the images with low scores.
    assert np.mean([row["aopc"] for row in rows if row["setting"] == EDIT]) > np.mean(
        [row["aopc"] for row in rows if row["setting"] == OTHER]
    )
    found = conclude(rows)
    assert found.leader.setting == OTHER
    assert {(each.rival, each.comparison.difference) for each in found.findings} == {("gradient", 0.5), (EDIT, 0.5)}


def test_a_score_that_a_rival_lacks_says_nothing():
    rows = rows_of({"gradient": {"aopc": 0.2, "mass_inside": None}, EDIT: {"aopc": 0.6, "mass_inside": 0.4}})
    assert verdicts(conclude(rows).findings) == {("gradient", "aopc"): "better"}


def test_a_leader_chosen_from_several_does_not_win_by_chance():
    edits, images, runs = 24, 40, 300
    generator = np.random.default_rng(0)
    titles = ["gradient", *(f"edit {place}" for place in range(edits))]
    won = naive = 0
    for _ in range(runs):
        # Images differ more than settings do.
        scores = generator.normal(0, 0.05, (len(titles), images)) + generator.normal(0, 0.1, images)
        findings = conclude(aopc_rows(dict(zip(titles, scores, strict=True)))).findings
        won += verdicts(findings)["gradient", "aopc"] == "better"
        # Of a normal distribution, 2.5 % lie beyond 1.96 standard errors.
        gains = scores[1 + scores[1:].mean(1).argmax()] - scores[0]
        naive += gains.mean() > 1.96 * gains.std(ddof=1) / math.sqrt(images)
    assert naive / runs > 0.15
    # The nominal rate is 0.025, and its standard error is 0.009.
    assert won / runs < 0.025 + 2 * 0.009


def test_only_a_choice_needs_a_caveat():
    means = {"gradient": {"aopc": 0.2}, EDIT: {"aopc": 0.4}}
    assert caveat(None, NAMES) == ""
    assert caveat(conclude(rows_of(means)), NAMES) == ""
    assert "Gradient energy" in caveat(conclude(rows_of({**means, OTHER: {"aopc": 0.5}})), NAMES)
