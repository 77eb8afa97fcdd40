"""The verdict of a run: what the leading setting does better than others, in sentences."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from parchgrad.evaluation.labels import is_control, is_edit
from parchgrad.evaluation.methods import CONTROLS
from parchgrad.evaluation.report import BASELINE, PairedRows, Verdict, score_words, verdict_of
from parchgrad.evaluation.rows import Row
from parchgrad.evaluation.scores import HEADLINES, SCORES, Family
from parchgrad.evaluation.summary import FEWEST, Comparison, Mean, valid_mean

__all__ = ["Conclusion", "Finding", "Leader", "Outcome", "Statement", "caveat", "conclude", "find_leader", "state"]

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
        score: name of the score that decides, the first of `HEADLINES` for which a competing setting has values.
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
        comparison: the leading setting minus the rival, on the same images; see `conclude` for the interval.
        verdict: `"better"` or `"worse"` if that is settled, else `"open"`.
    """

    rival: str
    score: str
    comparison: Comparison
    verdict: Verdict

    @property
    def outcome(self) -> Outcome:
        """The verdict, or `"few"` if there are too few images or mosaics for any."""
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
        outcome: `"better"`, `"worse"`, `"open"` (cannot be told apart), `"few"` (too few images or mosaics), or
            `"control"` (cannot be told from a control).
        claim: the sentence, without a full stop.
        numbers: differences of means with their intervals.
        brief: a shorter sentence, with the first difference only.
    """

    outcome: Outcome
    claim: str
    numbers: str
    brief: str


def find_leader(rows: Mapping[str, Sequence[Row]]) -> Leader | None:
    """Find the setting that leads a run.

    Settings with a selector compete, or all other methods except the controls if there are none. A setting cannot lead
    if it has the score for fewer than half as many images as another.

    Args:
        rows: rows of one run by setting, on the same images; see `pair_rows`.

    Returns:
        The leader; None if no setting competes or none that does has a headline score.

    Example:
        >>> settings = (("gradient", None, 0.9), ("a", "energy", 0.2), ("b", "evidence", 0.3), ("c", "random", 0.8))
        >>> rows = {title: [{"selector": name, "aopc": value}] for title, name, value in settings}
        >>> find_leader(rows)
        Leader(setting='b', score='aopc', competing=2)
    """
    described = {title: own[0] for title, own in rows.items() if own}
    edits = [title for title, row in described.items() if is_edit(title, row)]
    others = [title for title, row in described.items() if title not in CONTROLS and not is_control(title, row)]
    competing = edits or others
    for score in HEADLINES:
        means = {title: valid_mean([row.get(score, math.nan) for row in rows[title]]) for title in competing}
        best = _best(means, score)
        if best is not None:
            return Leader(setting=best, score=score, competing=len(competing))
    return None


def conclude(
    rows: Sequence[Row], *, scores: Iterable[str] = HEADLINES, confidence: float = 0.95, seed: int = 0
) -> Conclusion | None:
    """Compare the leading setting with its rivals and the controls on the same images.

    The leading setting and some rivals are chosen by the scores that then compare them. Intervals allow for that by a
    Bonferroni correction: their level is 1 - (1 - `confidence`) / n, where n is the number of settings that the leading
    one was chosen from, or the rival if those are more.

    Args:
        rows: rows of one run; see `read_rows`.
        scores: names of the scores; those without values or without a better direction are ignored.
        confidence: level of the intervals before the correction, in (0, 1).
        seed: random seed of the bootstrap.

    Returns:
        The conclusion, without scores that the leading setting and a rival share on no image; None if no setting leads.

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
    paired = PairedRows.of(rows)
    leader = find_leader(paired.rows)
    if leader is None:
        return None
    groups: dict[str, list[str]] = {"edits": [], "methods": [], "controls": []}
    for title, own in paired.rows.items():
        if title not in (leader.setting, BASELINE):
            kind = "controls" if is_control(title, own[0]) else "edits" if is_edit(title, own[0]) else "methods"
            groups[kind].append(title)

    def best(titles: Iterable[str], score: str) -> str | None:
        return _best({title: valid_mean(paired.column(title, score)) for title in titles}, score)

    def findings(rivals: Mapping[str, str], candidates: int) -> list[Finding]:
        """Compare by each score with its rival, chosen from so many candidates."""
        level = 1 - (1 - confidence) / max(leader.competing, candidates)
        found = []
        for score, rival in rivals.items():
            comparison = paired.compare(leader.setting, rival, score, confidence=level, seed=seed)
            if comparison.images:
                verdict = verdict_of(comparison, score)
                found.append(Finding(rival=rival, score=score, comparison=comparison, verdict=verdict))
        return found

    judged = [name for name in scores if not math.isnan(valid_mean(paired.column(leader.setting, name)).value)]
    judged = [name for name in judged if SCORES[name.partition("@")[0]].better != "neither"]
    rivals = {BASELINE: 1} if BASELINE in paired.rows else {}
    for titles in (groups["edits"], groups["methods"]):
        if (second := best(titles, leader.score)) is not None:
            rivals[second] = len(titles)
    controls = {name: rival for name in judged if (rival := best(groups["controls"], name)) is not None}
    return Conclusion(
        leader=leader,
        findings=tuple(
            finding for rival, count in rivals.items() for finding in findings(dict.fromkeys(judged, rival), count)
        ),
        controls=tuple(findings(controls, len(groups["controls"]))),
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
        >>> statement.brief
        'Evidence is better than Grad-CAM by mass inside (+0.200)'
    """
    if conclusion is None:
        return (_no_verdict("no setting besides the plain gradient, Grad-CAM and controls has a headline score"),)
    leading, said = names[conclusion.leader.setting], []
    for rival in dict.fromkeys(finding.rival for finding in conclusion.findings):
        other = names[rival]
        other = f"the {other}" if other.startswith("plain ") else other
        for outcome, found in _by_outcome([each for each in conclusion.findings if each.rival == rival]).items():
            said.append(
                Statement(
                    outcome=outcome,
                    claim=_claim(outcome, leading, other, found),
                    numbers=_numbers(found),
                    brief=_brief(outcome, leading, other, found),
                )
            )
    if not said:
        said.append(_no_verdict(f"{leading} shares no score that can rank it with a setting other than a control"))
    for outcome, found in _by_outcome([each for each in conclusion.controls if each.outcome != "few"]).items():
        which = "; ".join(dict.fromkeys(names[each.rival] for each in found))
        control = {"better": "the best control", "worse": f"a control ({which})"}.get(outcome, "a control")
        settled = f"{_opening(outcome, leading, control)} by {_scores(found)}"
        said.append(
            Statement(
                outcome="control" if outcome == "open" else outcome,
                claim=_claim(outcome, leading, control, found) if outcome == "open" else settled,
                numbers=_numbers(found, names),
                brief=_brief(outcome, leading, control, found),
            )
        )
    return tuple(said)


def caveat(conclusion: Conclusion | None, names: Mapping[str, str]) -> str:
    """Say that the leading setting was chosen from several; empty if it was not.

    Args:
        conclusion: the conclusion; None if no setting leads.
        names: names of the settings by title; see `label_settings`.

    Example:
        >>> chosen = Leader(setting="a", score="aopc", competing=8)
        >>> caveat(Conclusion(leader=chosen, findings=(), controls=()), {"a": "Evidence"}).split(" by ")[0]
        'Evidence was chosen from 8 settings'
    """
    if conclusion is None or conclusion.leader.competing == 1:
        return ""
    leader = conclusion.leader
    return (
        f"{names[leader.setting]} was chosen from {leader.competing} settings by its mean {score_words(leader.score)} "
        "on these images, which favours its differences. The verdict allows for that choice (Bonferroni), not for the "
        "number of scores."
    )


def _no_verdict(reason: str) -> Statement:
    return Statement(outcome="few", claim="No verdict", numbers=reason, brief=f"No verdict: {reason}")


def _by_outcome(findings: Sequence[Finding]) -> dict[Outcome, list[Finding]]:
    """Findings by outcome, the best outcome first."""
    outcomes: tuple[Outcome, ...] = ("better", "worse", "open", "few")
    grouped = {outcome: [each for each in findings if each.outcome == outcome] for outcome in outcomes}
    return {outcome: found for outcome, found in grouped.items() if found}


def _best(means: Mapping[str, Mean], score: str) -> str | None:
    """The setting with the best mean; one over a few lucky images does not count."""
    most = max((mean.valid for mean in means.values()), default=0)
    sign = -1 if SCORES[score.partition("@")[0]].better == "lower" else 1
    counting = [title for title, mean in means.items() if mean.valid and 2 * mean.valid >= most]
    return max(counting, key=lambda title: sign * means[title].value, default=None)


def _claim(outcome: Outcome, leading: str, rival: str, findings: Sequence[Finding]) -> str:
    if outcome == "few":
        few = f"Too few images or mosaics (fewer than {FEWEST})"
        return f"{few} to compare {leading} with {rival} by {_scores(findings)}"
    if outcome == "open":
        return f"{leading} and {rival} cannot be told apart by {_scores(findings)}"
    by_claim: dict[str, list[Finding]] = {}
    for each in findings:
        family = SCORES[each.score.partition("@")[0]].family
        by_claim.setdefault(_CLAIMS[family][outcome == "worse"], []).append(each)
    claims = _listed([f"{claim} ({_scores(found)})" for claim, found in by_claim.items()])
    return f"{leading} {claims} than {rival}"


def _brief(outcome: Outcome, leading: str, rival: str, findings: Sequence[Finding]) -> str:
    """A sentence with the first difference, short enough for a line of a terminal."""
    first, *others = findings
    more = f" and {len(others)} more" if others else ""
    return f"{_opening(outcome, leading, rival)} by {_name(first)} ({_signed(first.comparison.difference)}){more}"


def _opening(outcome: Outcome, leading: str, rival: str) -> str:
    if outcome == "few":
        return f"Too few images or mosaics to compare with {rival}"
    return f"No clear difference from {rival}" if outcome == "open" else f"{leading} is {outcome} than {rival}"


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
