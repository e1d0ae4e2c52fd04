"""Samples -> verdict: which candidate a bucket gets, why, and how sure that is. Pure.

What is judged are *rounds*. A round visits every live candidate SWEEPS times, interleaved
(tuning/race.py), and gives one time a candidate: the median of its visits. Statistics (interval.py)
are on the logarithm of within-round ratios to the baseline: what slows a whole round (clocks,
neighbours, drift) cancels.

A candidate is FASTER when its whole interval lies beyond the margin, TIED when it surely gains less
than is worth more rounds, and UNSETTLED in between. Nothing but FASTER ever leaves the baseline.

An interval knows the noise between the rounds it was made from, not what all of them share: a
stretch of seconds in which one candidate runs slow, or a graph that was captured badly. So whoever
is FASTER is measured again, later and with graphs captured anew, and only `confirm`ed where both
passes say so. Until then it is UNCONFIRMED, and no more than UNSETTLED is.

`conclude` is the one judge: of a calibration's own samples, through `decide` and `confirm`, and of
what several ranks measured, through ranks/merging.py.
"""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from adaptive_moe.policy.interval import half_width, median, moments

# Visits of each live candidate in one round: one each way. Rounds of four took 1.6 times as long to
# say the same on an H100, where few samples are disturbed; the fences see to those.
SWEEPS = 2
# What a candidate must gain, in margins, to be worth more rounds than it takes to rule that out.
TIE_MARGINS = 2.5
# The logarithm of the largest time ratio that is told from larger ones. On a machine that stalls a
# few rounds reach further: to where no float does, or nobody reads it from a file or a rank again.
MOST_LOG_RATIO = 20.0


class Standing(enum.Enum):
    """Where one candidate stands in one bucket, against the baseline."""

    BASELINE = "baseline"
    FASTER = "faster"
    TIED = "tied"
    SLOWER = "slower"
    UNSETTLED = "unsettled"
    UNCONFIRMED = "unconfirmed"  # faster in the first pass, and not measured again yet
    HOPELESS = "hopeless"  # dropped at the first look
    WRONG = "wrong"  # it returned something else than the baseline
    FAILED = "failed"  # it raised


# What more rounds may still change.
OPEN = (Standing.UNSETTLED, Standing.UNCONFIRMED)
# What no candidate comes back from.
OUT = (Standing.HOPELESS, Standing.FAILED, Standing.WRONG)


@dataclass(frozen=True)
class Rule:
    """When a candidate may replace the baseline.

    margin          fraction of the baseline's time it must surely save
    confidence      of that, however often the samples were looked at
    tie_confidence  of ruling a gain out; lower, because a mistake there costs only a small gain
    min_rounds      before any verdict
    max_rounds      after them what is unsettled stays with the baseline
    """

    margin: float = 0.01
    confidence: float = 0.99
    tie_confidence: float = 0.95
    min_rounds: int = 4
    max_rounds: int = 500


@dataclass(frozen=True)
class Samples:
    """What was measured of one candidate in one bucket.

    round_us  one time a round in microseconds, paired with the baseline's first rounds; a candidate
              whose standing is settled need not be measured further
    out       why it is no candidate any more, or None while it is
    reason    what happened, where `out` is set
    """

    candidate: str
    round_us: tuple[float, ...] = ()
    out: Standing | None = None
    reason: str = ""


@dataclass(frozen=True)
class Result:
    """One candidate's evidence: median us a call, and the fraction of the baseline's time that it
    saves with its interval."""

    candidate: str
    standing: Standing
    median_us: float | None = None
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Verdict:
    """The candidate of one bucket. settled: more rounds would not change it. reason: in words.
    results[0] is the baseline's."""

    candidate: str
    settled: bool
    rounds: int
    reason: str
    results: tuple[Result, ...]

    @property
    def baseline(self) -> Result:
        return self.results[0]

    def result(self, candidate: str) -> Result | None:
        """That candidate's evidence, or None where it took no part."""
        return next((r for r in self.results if r.candidate == candidate), None)


def decide(samples: Sequence[Samples], rule: Rule) -> Verdict:
    """The verdict that the samples of one pass support; the baseline's come first.

    Raises ValueError where there are none, or a candidate has more rounds than the baseline.
    """
    if not samples:
        raise ValueError("no samples to decide from: give the baseline's first")
    baseline, *others = samples
    rounds = len(baseline.round_us)
    if baseline.out is None and any(len(s.round_us) > rounds for s in others):
        raise ValueError("a candidate has more rounds than the baseline: rounds must be paired")
    first = Result(
        baseline.candidate,
        baseline.out or Standing.BASELINE,
        median(baseline.round_us),
        gain=0.0,
        reason=baseline.reason,
    )
    return conclude([first, *(_judge(s, baseline, rule) for s in others)], rounds)


def confirm(first: Verdict, second: Verdict | None, rule: Rule) -> Verdict:
    """The verdict of two passes: nobody replaces the baseline who is not FASTER in both.

    second: of the baseline and whoever was FASTER in the first, or None where nobody was measured
    again yet. Results can be judged once more by their numbers alone, as merging does: the interval
    of a confirmed one spans both passes', and that of an unconfirmed one reaches down to the margin
    at least.
    """
    if first.baseline.standing in OUT:
        return first
    results = [
        _confirmed(one, second.result(one.candidate) if second else None, rule)
        if one.standing is Standing.FASTER
        else one
        for one in first.results
    ]
    return conclude(results, first.rounds + (second.rounds if second else 0))


def _confirmed(one: Result, again: Result | None, rule: Rule) -> Result:
    """A FASTER result, after what the second pass says about it, if anything."""
    if again is None or (again.standing is Standing.UNSETTLED and again.gain_low is None):
        return replace(one, standing=Standing.UNCONFIRMED, gain_low=rule.margin)
    both = (one, again)
    low = min(r.gain_low or 0.0 for r in both)
    if again.standing is Standing.UNSETTLED:
        return replace(again, gain_low=min(low, rule.margin))
    if again.standing is not Standing.FASTER:
        return replace(again, reason=again.reason or "not confirmed")
    return replace(
        again,
        gain=sum(r.gain or 0.0 for r in both) / 2,
        gain_low=low,
        gain_high=max(r.gain_high or 0.0 for r in both),
    )


def conclude(results: Sequence[Result], rounds: int) -> Verdict:
    """The verdict that judged results support; the first is the baseline's."""
    baseline, *others = results
    name = baseline.candidate
    if baseline.standing in OUT:
        # Without a trusted baseline there is nothing to compare with.
        kept = tuple(
            Result(r.candidate, r.standing if r.standing in OUT else Standing.UNSETTLED)
            if r is not baseline
            else replace(r, gain=None)
            for r in results
        )
        return Verdict(name, True, rounds, f"kept {name}: it {baseline.reason} itself", kept)
    faster = [r for r in others if r.standing is Standing.FASTER]
    open_still = [r for r in others if r.standing in OPEN]
    if not faster:
        return Verdict(name, not open_still, rounds, _why_kept(name, others), tuple(results))
    best = max(faster, key=lambda r: r.gain or 0.0)
    # An unsettled rival only matters while it might still overtake the best.
    rivals = any(r.gain_high is None or r.gain_high > (best.gain or 0.0) for r in open_still)
    reason = f"{best.candidate} saves {_percent(best.gain)} (at least {_percent(best.gain_low)})"
    return Verdict(best.candidate, not rivals, rounds, reason, tuple(results))


def standing_of(gain: float, low: float, high: float, margin: float) -> Standing:
    """The standing of a candidate whose gain surely lies above `low` and likely below `high`."""
    if low > margin:
        return Standing.FASTER
    if high < TIE_MARGINS * margin:
        # Surely not worth switching to; which word depends on what it most likely is.
        return Standing.TIED if gain > -TIE_MARGINS * margin else Standing.SLOWER
    return Standing.UNSETTLED


def _judge(samples: Samples, baseline: Samples, rule: Rule) -> Result:
    name, middle = samples.candidate, median(samples.round_us)
    if samples.out is not None:
        return Result(name, samples.out, middle, reason=samples.reason)
    # Only the rounds it took part in: zip stops at the shorter, its own.
    pairs = zip(samples.round_us, baseline.round_us, strict=False)
    ratios = [math.log(ours / theirs) for ours, theirs in pairs]
    if len(ratios) < 2:
        return Result(name, Standing.UNSETTLED, middle)
    mean, spread, memory = moments(ratios)
    sure = memory * half_width(len(ratios), spread, 1.0 - rule.confidence)
    likely = half_width(len(ratios), spread, 1.0 - rule.tie_confidence)
    # expm1 turns a log-ratio into the fraction of the baseline's time that is saved.
    gain, low, high, tie_high = (
        -math.expm1(min(log_ratio, MOST_LOG_RATIO))
        for log_ratio in (mean, mean + sure, mean - sure, mean - likely)
    )
    standing = Standing.UNSETTLED
    if len(ratios) >= rule.min_rounds:
        standing = standing_of(gain, low, tie_high, rule.margin)
        # A tie whose gain may be anything at `confidence` would still veto who wins elsewhere.
        if standing is Standing.TIED and math.isinf(sure):
            standing = Standing.UNSETTLED
    bounds = (None, None) if math.isinf(sure) else (low, high)
    return Result(name, standing, middle, gain, *bounds)


def _why_kept(name: str, others: Sequence[Result]) -> str:
    words = [f"{r.candidate} {_word(r)}{f' ({r.reason})' if r.reason else ''}" for r in others]
    return f"kept {name}: " + (", ".join(words) if words else "it is the only candidate")


def _word(result: Result) -> str:
    unmeasured = result.standing is Standing.UNSETTLED and result.median_us is None
    return "not measured" if unmeasured else result.standing.value


def _percent(fraction: float | None) -> str:
    return f"{100.0 * (fraction or 0.0):.1f}%"
