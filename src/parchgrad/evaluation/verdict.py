"""The verdict of a run: what the leading setting does better than others, in sentences."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from parchgrad.evaluation.labels import is_control, is_edit
from parchgrad.evaluation.methods import CONTROLS
from parchgrad.evaluation.report import BASELINE, PairedRows, Verdict, score_words, verdict_of
from parchgrad.evaluation.rows import Row
from parchgrad.evaluation.scores import HEADLINES, SCORES, Family
from parchgrad.evaluation.summary import FEWEST, Comparison, Mean, valid_mean

__all__ = ["Conclusion", "Finding", "Leader", "Outcome", "Statement", "conclude", "find_leader", "state"]

Outcome = Literal["better", "worse", "open", "few", "control"]

# What a higher quality means, and a lower one.
_CLAIMS: Mapping[Family, tuple[str, str]] = {
    "perturbation": ("is more faithful", "is less faithful"),
    "insertion": ("is more faithful", "is less faithful"),
    "relevance_gain": ("is more faithful", "is less faithful"),
    "localisation": ("localises better", "localises worse"),
    "sensitivity": ("is steadier", "is less steady"),
    "stability": ("is steadier", "is less steady"),
    "randomisation": ("depends more on the weights", "depends less on the weights"),
    "class_similarity": ("depends more on the class", "depends less on the class"),
}


@dataclass(frozen=True, kw_only=True)
class Leader:
    """The setting that a report is about.

    Attributes:
        setting: title of the setting with the best mean of the score among the settings that compete.
        score: name of the score that decides, the first of `HEADLINES` with values.
        competing: number of settings that compete.
    """

    setting: str
    score: str
    competing: int


@dataclass(frozen=True, kw_only=True)
class Finding:
    """How the leading setting compares with another one by a score.

    Attributes:
        rival: title of the other setting.
        score: name of the score.
        comparison: the leading setting minus the rival, on the same images.
        verdict: `"better"` or `"worse"` if that is settled, else `"open"`.
    """

    rival: str
    score: str
    comparison: Comparison
    verdict: Verdict

    @property
    def outcome(self) -> Outcome:
        """The verdict, or `"few"` if there are too few images for any."""
        return self.verdict if self.comparison.images >= FEWEST else "few"


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """What a run says about its leading setting.

    Attributes:
        leader: the leading setting.
        findings: comparisons with the plain gradient, the second-best edit and the best other method, as far as the run
            has them, each by every score.
        controls: comparison with the best control of each score.
    """

    leader: Leader
    findings: tuple[Finding, ...]
    controls: tuple[Finding, ...]


@dataclass(frozen=True, kw_only=True)
class Statement:
    """A sentence of the verdict, and the numbers behind it.

    Attributes:
        outcome: `"better"`, `"worse"`, `"open"` (cannot be told apart), `"few"` (too few images), or `"control"` (a
            control does as well).
        claim: the sentence, without a full stop.
        numbers: differences of means with their intervals.
    """

    outcome: Outcome
    claim: str
    numbers: str


def find_leader(rows: Sequence[Mapping[str, Any]]) -> Leader | None:
    """Find the setting that leads a run.

    Settings with a selector compete, or all other methods except the controls if there are none. A setting cannot lead
    if it has the score for fewer than half as many images as another.

    Args:
        rows: rows of one run; see `read_rows`.

    Returns:
        The leader; None if no setting competes or no row has a headline score.

    Example:
        >>> settings = (("gradient", None, 0.9), ("a", "energy", 0.2), ("b", "evidence", 0.3), ("c", "random", 0.8))
        >>> rows = [{"setting": title, "selector": name, "aopc": value} for title, name, value in settings]
        >>> find_leader(rows)
        Leader(setting='b', score='aopc', competing=2)
    """
    score = next((name for name in HEADLINES if any(not math.isnan(row.get(name, math.nan)) for row in rows)), None)
    if score is None:
        return None
    by_setting: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_setting.setdefault(row["setting"], []).append(row)
    edits = [title for title, own in by_setting.items() if is_edit(title, own[0])]
    others = [title for title, own in by_setting.items() if title not in CONTROLS and not is_control(title, own[0])]
    competing = edits or others
    means = {title: valid_mean([row.get(score, math.nan) for row in by_setting[title]]) for title in competing}
    best = _best(means, score)
    return None if best is None else Leader(setting=best, score=score, competing=len(competing))


def conclude(
    rows: Sequence[Row], *, scores: Iterable[str] = HEADLINES, confidence: float = 0.95, seed: int = 0
) -> Conclusion | None:
    """Compare the leading setting with its rivals and the controls on the same images.

    Args:
        rows: rows of one run; see `read_rows`.
        scores: names of the scores; those without values or without a better direction are ignored.
        confidence: level of the intervals, in (0, 1).
        seed: random seed of the bootstrap.

    Returns:
        The conclusion; None if no setting leads.

    Raises:
        InputError: if there are no rows or several models, or no image has rows of every setting.

    Example:
        >>> rows = [
        ...     {"model": "m", "setting": title, "selector": name, "index": index, "aopc": index + gain}
        ...     for title, name, gain in (("gradient", None, 0.0), ("edit", "energy", 0.5)) for index in range(20)
        ... ]
        >>> finding, = conclude(rows).findings
        >>> finding.rival, finding.score, finding.comparison.difference, finding.verdict
        ('gradient', 'aopc', 0.5, 'better')
    """
    leader = find_leader(rows)
    if leader is None:
        return None
    paired = PairedRows.of(rows)
    groups: dict[str, list[str]] = {"edits": [], "methods": [], "controls": []}
    for title, own in paired.rows.items():
        if title not in (leader.setting, BASELINE):
            kind = "controls" if is_control(title, own[0]) else "edits" if is_edit(title, own[0]) else "methods"
            groups[kind].append(title)

    def best(titles: Iterable[str], score: str) -> str | None:
        return _best({title: valid_mean(paired.column(title, score)) for title in titles}, score)

    def finding(rival: str, score: str) -> Finding:
        comparison = paired.compare(leader.setting, rival, score, confidence=confidence, seed=seed)
        return Finding(rival=rival, score=score, comparison=comparison, verdict=verdict_of(comparison, score))

    judged = [name for name in scores if not math.isnan(valid_mean(paired.column(leader.setting, name)).value)]
    judged = [name for name in judged if SCORES[name.partition("@")[0]].better != "neither"]
    plain = [BASELINE] if BASELINE in paired.rows else []
    rivals = [*plain, best(groups["edits"], leader.score), best(groups["methods"], leader.score)]
    strongest = {name: best(groups["controls"], name) for name in judged}
    return Conclusion(
        leader=leader,
        findings=tuple(finding(rival, name) for rival in rivals if rival is not None for name in judged),
        controls=tuple(finding(rival, name) for name, rival in strongest.items() if rival is not None),
    )


def state(conclusion: Conclusion | None, names: Mapping[str, str]) -> tuple[Statement, ...]:
    """Put a conclusion into sentences: one for each rival and outcome, then the controls.

    Args:
        conclusion: the conclusion; None if no setting leads.
        names: names of the settings by title; see `label_settings`.

    Example:
        >>> higher = Comparison(difference=0.2, low=0.1, high=0.3, images=40)
        >>> finding = Finding(rival="b", score="mass_inside", comparison=higher, verdict="better")
        >>> leader = Leader(setting="a", score="mass_inside", competing=1)
        >>> names = {"a": "Evidence", "b": "Grad-CAM"}
        >>> (statement,) = state(Conclusion(leader=leader, findings=(finding,), controls=()), names)
        >>> statement.claim, statement.numbers
        ('Evidence localises better (mass inside) than Grad-CAM', 'mass inside +0.200 [+0.100, +0.300]')
    """
    if conclusion is None or not conclusion.findings:
        return (Statement(outcome="few", claim="No verdict", numbers="no setting has a score that could rank it"),)
    leading, said = names[conclusion.leader.setting], []
    for rival in dict.fromkeys(finding.rival for finding in conclusion.findings):
        other = names[rival]
        other = f"the {other}" if other.startswith("plain ") else other
        by_outcome: dict[Outcome, list[Finding]] = {"better": [], "worse": [], "open": [], "few": []}
        for finding in conclusion.findings:
            if finding.rival == rival:
                by_outcome[finding.outcome].append(finding)
        for outcome, found in by_outcome.items():
            if found:
                claim = _claim(outcome, leading, other, found)
                said.append(Statement(outcome=outcome, claim=claim, numbers=_numbers(found)))
    beaten = [finding for finding in conclusion.controls if finding.outcome == "better"]
    level = [finding for finding in conclusion.controls if finding.outcome in ("worse", "open")]
    if beaten:
        claim = f"{leading} is better than the best control by {_scores(beaten)}"
        said.append(Statement(outcome="better", claim=claim, numbers=_numbers(beaten, names)))
    if level:
        claim = f"{_scores(level)} {'does' if len(level) == 1 else 'do'} not tell {leading} from a control"
        said.append(Statement(outcome="control", claim=claim, numbers=_numbers(level, names)))
    return tuple(said)


def _best(means: Mapping[str, Mean], score: str) -> str | None:
    """The setting with the best mean; one over a few lucky images does not count."""
    most = max((mean.valid for mean in means.values()), default=0)
    sign = -1 if SCORES[score.partition("@")[0]].better == "lower" else 1
    counting = [title for title, mean in means.items() if mean.valid and 2 * mean.valid >= most]
    return max(counting, key=lambda title: sign * means[title].value, default=None)


def _claim(outcome: Outcome, leading: str, rival: str, findings: Sequence[Finding]) -> str:
    if outcome == "few":
        return f"Too few images (fewer than {FEWEST}) to compare {leading} with {rival} by {_scores(findings)}"
    if outcome == "open":
        return f"{leading} and {rival} cannot be told apart by {_scores(findings)}"
    by_claim: dict[str, list[Finding]] = {}
    for each in findings:
        family = SCORES[each.score.partition("@")[0]].family
        by_claim.setdefault(_CLAIMS[family][outcome == "worse"], []).append(each)
    claims = _listed([f"{claim} ({_scores(found)})" for claim, found in by_claim.items()])
    return f"{leading} {claims} than {rival}"


def _scores(findings: Sequence[Finding]) -> str:
    return _listed([_name(each) for each in findings])


def _numbers(findings: Sequence[Finding], names: Mapping[str, str] | None = None) -> str:
    """Differences and their intervals; `names` adds the other setting."""
    parts = []
    for each in findings:
        found = each.comparison
        interval = "" if math.isnan(found.low) else f" [{_signed(found.low)}, {_signed(found.high)}]"
        rival = "" if names is None else f" against {names[each.rival]}"
        parts.append(f"{_name(each)} {_signed(found.difference)}{interval}{rival}")
    return "; ".join(parts)


def _name(finding: Finding) -> str:
    """Title of the score, without a comma that would read as a list."""
    return score_words(finding.score).replace(",", "")


def _signed(value: float) -> str:
    """Three decimals, or the first digit of what would read as zero."""
    return f"{value:+.3f}" if value == 0 or abs(value) >= 0.0005 else f"{value:+.0e}"


def _listed(parts: Sequence[str]) -> str:
    """Join parts by commas and "and"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
