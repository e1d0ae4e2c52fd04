"""Results -> choices: which candidate a bucket gets, why, and how sure that is. Pure.

This is the one judge: of what a calibration has measured so far, of what it stores, and of what a
stored table says.

What is judged are *rounds*: times of every candidate, interleaved, as ratios to the baseline's in
the same round, so that what slows a whole round cancels. A candidate is FASTER when its whole
interval (interval.py) lies beyond the margin, TIED when it surely gains less than is worth more
rounds, and UNSETTLED in between. Only FASTER ever replaces the baseline.

An interval knows the noise between its rounds, not what all of them share: seconds in which one
candidate runs slow, or a graph that was captured badly. So a FASTER candidate is measured again,
later and with everything prepared anew. Until both passes agree it is UNCONFIRMED.

A bucket has several *views* where one number cannot decide: one for each fill, as the host cannot
know how many rows are real; and for eager calls below `busy_from` the host's time beside the
device's, as either may bound the step. Then a candidate serves that is FASTER in one view, and that
likely loses nothing on the device and less on the host than it surely saves. The unit is
microseconds a call: a ratio of two views means nothing.
"""

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from adaptive_moe.policy.coverage import Situation
from adaptive_moe.policy.evidence import Bucket, Evidence, Exclusion, Fill, Ratios, Result, Rule
from adaptive_moe.policy.interval import half_width, pool

# What a candidate must gain, in margins, to be worth more rounds than it takes to rule that out.
TIE_MARGINS = 2.5
# What a count between two buckets may lose, in margins, before another bucket goes between them.
REFINE_MARGINS = 3.0
# A second pass comes in lots of so many rounds, each prepared anew and as far apart as the other
# buckets allow. A gain that surely exceeds CLEAR_GAIN is confirmed by one lot, others by LOTS.
LOT, LOTS = 5, 3
CLEAR_GAIN = 0.10
# A candidate needs host times of so many buckets to win by them: the rounds of one bucket are taken
# at one moment.
HOST_BUCKETS = 2
# Log ratios are capped here, so that exp() cannot overflow.
MOST_LOG_RATIO = 20.0


class Standing(enum.Enum):
    """Where one candidate stands in one view, against the baseline."""

    BASELINE = "baseline"
    FASTER = "faster"
    TIED = "tied"
    SLOWER = "slower"
    UNSETTLED = "unsettled"
    UNCONFIRMED = "unconfirmed"  # faster in the first pass, and not measured again yet
    DROPPED = "dropped"  # far slower than the fastest at the first look
    WRONG = "wrong"  # it returned something else than the baseline
    FAILED = "failed"  # it raised


# Standings that more rounds may still change.
OPEN = (Standing.UNSETTLED, Standing.UNCONFIRMED)


@dataclass(frozen=True)
class Judgement:
    """One candidate in one view: the fraction of the baseline's time it saves, and the interval.

    gain_low, gain_high  at the rule's confidence; None while there are too few rounds
    error                standard error of the gain
    """

    candidate: str
    standing: Standing
    median_us: float | None = None
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    error: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Verdict:
    """One view of a bucket. settled: more rounds would not change the candidate. judgements[0] is
    the baseline's. fraction: of the rows that are real; on_host: the view of the host's time."""

    candidate: str
    settled: bool
    rounds: int
    judgements: tuple[Judgement, ...]
    fraction: float = 1.0
    on_host: bool = False

    @property
    def baseline(self) -> Judgement:
        return self.judgements[0]

    def judgement(self, candidate: str) -> Judgement:
        """That candidate's; KeyError where it took no part."""
        for judgement in self.judgements:
            if judgement.candidate == candidate:
                return judgement
        raise KeyError(candidate)

    @property
    def faster(self) -> list[str]:
        return [j.candidate for j in self.judgements if j.standing is Standing.FASTER]


@dataclass(frozen=True)
class Choice:
    """What a bucket comes to: its candidate, why, and every view of it.

    settled  more rounds would hardly change it
    faster   the candidates that may serve here in the baseline's place
    """

    num_tokens: int
    candidate: str
    settled: bool
    reason: str
    verdicts: tuple[Verdict, ...]
    faster: tuple[str, ...]

    @property
    def baseline(self) -> str:
        return self.verdicts[0].baseline.candidate

    @property
    def device(self) -> list[Verdict]:
        """The views of the device's time, one for each fill."""
        return [verdict for verdict in self.verdicts if not verdict.on_host]

    @property
    def was_measured(self) -> bool:
        """False where no time was left for a single round."""
        return any(verdict.rounds or verdict.settled for verdict in self.device)


def choices(evidence: Evidence, situation: Situation) -> list[Choice]:
    """The choice of each bucket of that situation, by token count."""
    rule, buckets = evidence.rule, evidence.buckets(situation)
    excluded = {exclusion.candidate: exclusion for exclusion in evidence.excluded}
    found = [choose(bucket, rule, excluded) for bucket in buckets]
    if situation is Situation.EAGER:
        below = sum(bucket.num_tokens < evidence.coverage.busy_from for bucket in buckets)
        found[:below] = _with_host(buckets[:below], found[:below], rule)
    return found


def choose(
    bucket: Bucket,
    rule: Rule,
    excluded: Mapping[str, Exclusion],
    *,
    presume_confirmed: bool = False,
) -> Choice:
    """The choice by device time alone. presume_confirmed: as it will be if the second pass agrees
    with the first, which is what exploring goes by."""
    views = [
        judge_fill(fill, rule, excluded, presume_confirmed=presume_confirmed)
        for fill in bucket.fills
    ]
    return _combine(bucket.num_tokens, views, rule)


def judge_fill(
    fill: Fill, rule: Rule, excluded: Mapping[str, Exclusion], *, presume_confirmed: bool = False
) -> Verdict:
    """The verdict on one fill by device time. presume_confirmed: as it will be if the second pass
    agrees with the first."""
    baseline, *others = fill.results
    judgements = [Judgement(baseline.candidate, Standing.BASELINE, baseline.median_us, gain=0.0)]
    judgements += [_judge(result, rule, excluded, presume_confirmed) for result in others]
    rounds = sum(ratios.rounds for ratios in (baseline.first, baseline.second) if ratios)
    return _conclude(judgements, rounds, fill.fraction)


def rounds_to_confirm(gain_low: float) -> int:
    """Rounds of the second pass before it has a verdict on a gain of at least gain_low."""
    return LOT if gain_low > CLEAR_GAIN else LOT * LOTS


def standing_of(gain: float, low: float, likely_high: float, margin: float) -> Standing:
    """The standing of a candidate whose gain surely lies above `low` and likely below the other
    end."""
    if low > margin:
        return Standing.FASTER
    if likely_high < TIE_MARGINS * margin:
        # Surely not worth switching to; which word depends on what it most likely is.
        return Standing.TIED if gain > -TIE_MARGINS * margin else Standing.SLOWER
    return Standing.UNSETTLED


def judge_rounds(
    name: str, median_us: float | None, ratios: Ratios | None, rule: Rule, min_rounds: int
) -> Judgement:
    """What one pass says about one candidate."""
    if ratios is None or ratios.rounds < 2:
        return Judgement(name, Standing.UNSETTLED, median_us)
    n, mean, spread, memory = ratios.rounds, ratios.mean, ratios.spread, ratios.memory
    sure = memory * half_width(n, spread, 1.0 - rule.confidence)
    likely = half_width(n, spread, 1.0 - rule.tie_confidence)
    # expm1 turns a log ratio into the fraction of the baseline's time that is saved.
    gain, low, high, likely_high = (
        -math.expm1(min(log_ratio, MOST_LOG_RATIO))
        for log_ratio in (mean, mean + sure, mean - sure, mean - likely)
    )
    error = memory * math.sqrt(spread / (n * (n - 1))) * (1.0 - gain)
    standing = Standing.UNSETTLED
    if n >= min_rounds:
        standing = standing_of(gain, low, likely_high, rule.margin)
        # Without a finite interval a tie must not count: it would block a winner of another view.
        if standing is Standing.TIED and math.isinf(sure):
            standing = Standing.UNSETTLED
    if math.isinf(sure):
        return Judgement(name, standing, median_us, gain, error=error)
    return Judgement(name, standing, median_us, gain, low, high, error)


def open_judgements(verdict: Verdict, rule: Rule) -> list[Judgement]:
    """The candidates that more rounds may well put in the place of the verdict's."""
    chosen = verdict.judgement(verdict.candidate).gain or 0.0
    worth = chosen + TIE_MARGINS * rule.margin
    return [
        j
        for j in verdict.judgements
        if j.standing is Standing.UNCONFIRMED
        or (
            j.standing is Standing.UNSETTLED
            and (j.gain is None or j.gain_low is None or j.gain + 2.0 * j.error > worth)
        )
    ]


def loss(verdict: Verdict, candidate: str) -> float:
    """Time of `candidate` over the fastest trusted candidate's in this view, 1.0 being equal.

    Infinite for one without a gain, such as a dropped one: a neighbour's result must not bring it
    into use.
    """
    ratios = _ratios(verdict)
    return ratios[candidate] / min(ratios.values()) if candidate in ratios else math.inf


def gap_loss(below: Choice, above: Choice, rule: Rule) -> float:
    """How much a count between two neighbouring buckets may lose by taking the upper one's
    candidate.

    0.0 where nothing between can lose more than REFINE_MARGINS margins, as long as each candidate's
    time moves smoothly; else a time ratio less 1 (infinite where a dropped candidate is involved).
    The baseline may be a rule, which jumps from one algorithm to another somewhere between.
    """
    tolerance = REFINE_MARGINS * rule.margin
    pairs = list(zip(below.device, above.device, strict=True))
    lost = max(
        max(loss(a, _fastest(b)), loss(b, _fastest(a)), loss(a, above.candidate)) for a, b in pairs
    )
    if lost - 1.0 > tolerance:
        return lost - 1.0
    if above.candidate == above.baseline:
        return max(
            (
                abs(loss(view, name) - 1.0)
                for a, b in pairs
                for name in _twins(a, tolerance) ^ _twins(b, tolerance)
                for view in (a, b)
            ),
            default=0.0,
        )
    return 0.0


def between(below: Choice, above: Choice, rule: Rule) -> str:
    """The candidate of the counts between two neighbouring buckets.

    The upper bucket's, where it cannot lose much. In a gap that is left open, because the budget
    ended or the host loses in the lower bucket, a candidate that beat the baseline in both buckets:
    the upper's, the lower's, or none.
    """
    highs = [v.judgement(above.candidate).gain_high or 0.0 for v in below.verdicts if v.on_host]
    # From busy_from on the host's time has no say.
    host_counts = any(view.on_host for view in above.verdicts)
    host_loses = host_counts and min(highs, default=0.0) < -REFINE_MARGINS * rule.margin
    if gap_loss(below, above, rule) == 0.0 and not host_loses:
        return above.candidate
    in_both = {*below.faster} & {*above.faster}
    return next((c.candidate for c in (above, below) if c.candidate in in_both), above.baseline)


def _judge(
    result: Result, rule: Rule, excluded: Mapping[str, Exclusion], presume_confirmed: bool
) -> Judgement:
    name, middle = result.candidate, result.median_us
    if name in excluded:
        standing = Standing.WRONG if excluded[name].wrong else Standing.FAILED
        return Judgement(name, standing, middle, reason=excluded[name].reason)
    if result.dropped is not None:
        reason = f"{result.dropped:.1f} times the fastest at the first look"
        return Judgement(name, Standing.DROPPED, middle, reason=reason)
    first = judge_rounds(name, middle, result.first, rule, rule.min_rounds)
    if first.standing is not Standing.FASTER or presume_confirmed:
        return first
    return _confirmed(first, result, rule)


def _confirmed(first: Judgement, result: Result, rule: Rule) -> Judgement:
    """A FASTER judgement, after what the second pass says about it, if anything."""
    needed = max(rule.min_rounds, rounds_to_confirm(first.gain_low or 0.0))
    second = judge_rounds(first.candidate, first.median_us, result.second, rule, needed)
    if second.gain_low is None or (result.second and result.second.rounds < needed):
        return replace(first, standing=Standing.UNCONFIRMED)
    if second.standing is Standing.UNSETTLED:
        return second
    if second.standing is not Standing.FASTER:
        return replace(second, reason="not confirmed by the second pass")
    return replace(
        second,
        gain=((first.gain or 0.0) + (second.gain or 0.0)) / 2,
        gain_low=min(first.gain_low or 0.0, second.gain_low),
        gain_high=max(first.gain_high or 0.0, second.gain_high or 0.0),
        error=max(first.error, second.error),
    )


def _conclude(
    judgements: Sequence[Judgement], rounds: int, fraction: float, *, on_host: bool = False
) -> Verdict:
    """The verdict that these judgements support; the first is the baseline's."""
    baseline, *others = judgements
    faster = [j for j in others if j.standing is Standing.FASTER]
    open_still = [j for j in others if j.standing in OPEN]
    best, settled = baseline, not open_still
    if faster:
        # Of several winners that cannot be told apart the surer one; of two that can be, the
        # faster one has the higher lower end anyway.
        best = max(faster, key=lambda j: j.gain_low or 0.0)
        # An unsettled rival only matters while it might still overtake the best.
        settled = not any(
            j.gain_high is None or j.gain_high > (best.gain or 0.0) for j in open_still
        )
    return Verdict(best.candidate, settled, rounds, tuple(judgements), fraction, on_host)


def _combine(num_tokens: int, views: Sequence[Verdict], rule: Rule) -> Choice:
    """One candidate for all views of a bucket."""
    baseline = views[0].baseline.candidate
    device = [view for view in views if not view.on_host]
    settled = all(view.settled or not open_judgements(view, rule) for view in device)
    if len(views) == 1:
        view, name = views[0], views[0].candidate
        reason = _why_kept(view) if name == baseline else _why_chosen(view, name)
        return Choice(num_tokens, name, settled, reason, tuple(views), tuple(view.faster))
    worth_us = {}
    for name in (j.candidate for j in views[0].judgements[1:]):
        if (worth := _worth_us(views, name, rule)) is not None:
            worth_us[name] = worth
    faster = tuple(worth_us)
    if not faster:
        reason = f"kept {baseline}: nothing is faster in one view and loses in no other; " + (
            "; ".join(f"{_view_words(view)}: {_why_kept(view)}" for view in views)
        )
        return Choice(num_tokens, baseline, settled, reason, tuple(views), ())
    best = max(faster, key=lambda name: worth_us[name])
    won = [view for view in views if best in view.faster]
    reason = "; ".join(f"{_view_words(view)}: {_why_chosen(view, best)}" for view in won)
    return Choice(num_tokens, best, settled, reason, tuple(views), faster)


def _worth_us(views: Sequence[Verdict], candidate: str, rule: Rule) -> float | None:
    """Microseconds a call that the candidate surely saves in its best view, less what it likely
    costs in its worst; None where it may not serve."""
    saved_us, lost_us = 0.0, 0.0
    for view in views:
        judgement, base_us = view.judgement(candidate), view.baseline.median_us
        if judgement.gain is None or base_us is None:
            return None
        if judgement.standing is Standing.FASTER:
            saved_us = max(saved_us, (judgement.gain_low or 0.0) * base_us)
            continue
        lost = judgement.error - judgement.gain
        # Device time is exact, and a loss there is lost in every step that the device bounds.
        if not view.on_host and lost > rule.margin:
            return None
        lost_us = max(lost_us, lost * base_us)
    return saved_us - lost_us if saved_us > lost_us else None


HostGroup = tuple[str, str]


def _host_group(choice: Choice, candidate: str) -> HostGroup:
    """A candidate and its standing on the device. Host times are pooled within one group: where the
    standing changes, a baseline that is a rule runs another kernel, with other launches."""
    standing = choice.device[0].judgement(candidate).standing
    if standing in (Standing.FASTER, Standing.UNCONFIRMED):
        return candidate, "faster"
    return candidate, "slower" if standing in (Standing.SLOWER, Standing.DROPPED) else "equal"


def _with_host(buckets: Sequence[Bucket], chosen: Sequence[Choice], rule: Rule) -> list[Choice]:
    """The same choices by the device's and the host's time; as they are where no host time was
    read.

    The host enqueues the same launches for any token count, so its time is pooled over the buckets
    in which a candidate stands alike on the device.
    """
    parts: dict[HostGroup, list[Ratios]] = {}
    for bucket, choice in zip(buckets, chosen, strict=True):
        for fill in bucket.fills:
            for result in fill.results[1:]:
                if result.host is not None:
                    parts.setdefault(_host_group(choice, result.candidate), []).append(result.host)
    host = {relation: (len(some), pool(some)) for relation, some in parts.items()}
    if not host:
        return list(chosen)
    return [
        _combine(
            choice.num_tokens, [*choice.verdicts, _host_view(bucket, choice, host, rule)], rule
        )
        for bucket, choice in zip(buckets, chosen, strict=True)
    ]


def _host_view(
    bucket: Bucket, choice: Choice, host: Mapping[HostGroup, tuple[int, Ratios]], rule: Rule
) -> Verdict:
    baseline, *others = bucket.fills[0].results
    judgements = [Judgement(baseline.candidate, Standing.BASELINE, baseline.host_us, gain=0.0)]
    for result in others:
        name = result.candidate
        buckets, ratios = host.get(_host_group(choice, name), (0, None))
        judgement = judge_rounds(name, result.host_us, ratios, rule, rule.min_rounds)
        out = choice.device[0].judgement(name).gain is None
        if out or (judgement.standing is Standing.FASTER and buckets < HOST_BUCKETS):
            judgement = Judgement(name, Standing.UNSETTLED, result.host_us)
        judgements.append(judgement)
    rounds = baseline.host.rounds if baseline.host else 0
    return _conclude(judgements, rounds, 1.0, on_host=True)


def _ratios(verdict: Verdict) -> dict[str, float]:
    """Time of each trusted candidate over the baseline's."""
    return {j.candidate: 1.0 - j.gain for j in verdict.judgements if j.gain is not None}


def _fastest(verdict: Verdict) -> str:
    ratios = _ratios(verdict)
    return min(ratios, key=lambda name: ratios[name])


def _twins(verdict: Verdict, tolerance: float) -> set[str]:
    """Candidates that take as long as the baseline: what it most likely runs."""
    return {name for name, ratio in _ratios(verdict).items() if abs(ratio - 1.0) <= tolerance}


def _view_words(view: Verdict) -> str:
    if view.on_host:
        return "host"
    return f"device, {100 * view.fraction:.3g}% real" if view.fraction < 1.0 else "device"


def _why_chosen(view: Verdict, name: str) -> str:
    judgement = view.judgement(name)
    return f"{name} saves {_percent(judgement.gain)} (at least {_percent(judgement.gain_low)})"


def _why_kept(view: Verdict) -> str:
    name, others = view.baseline.candidate, view.judgements[1:]
    words = [f"{j.candidate} {_word(j)}{f' ({j.reason})' if j.reason else ''}" for j in others]
    return f"kept {name}: " + (", ".join(words) if words else "it is the only candidate")


def _word(judgement: Judgement) -> str:
    unmeasured = judgement.standing is Standing.UNSETTLED and judgement.median_us is None
    return "not measured" if unmeasured else judgement.standing.value


def _percent(fraction: float | None) -> str:
    return f"{100.0 * (fraction or 0.0):.1f}%"
