"""Samples -> verdict: which policy a bucket gets, why, and how sure that is. Pure.

What is judged are *rounds*. A round visits every live policy SWEEPS times, interleaved (see
measure.py), and gives one time a policy: the median of its visits, so that a single disturbed visit
does not count. Statistics are on the logarithm of within-round ratios to policy 0:
what slows a whole round (clocks, neighbours, drift) cancels.

The interval around the mean log-ratio is an anytime-valid Student interval (Lai 1976; Wang and
Ramdas, "Anytime-valid t-tests and confidence sequences for Gaussian means with unknown variance",
2024): it may be looked at after every round without spending confidence, so the stopping rule is
simply "stop when settled". Rounds far off the others are pulled in to a fence first.

A policy is FASTER when its whole interval lies beyond the margin, TIED when it surely gains less
than is worth more rounds, and UNSETTLED in between. Nothing but FASTER ever leaves policy 0.
"""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

# Visits of each live policy in one round.
SWEEPS = 4
# Weight of the interval's prior on effect sizes, in rounds: small favours early decisions.
PRIOR_ROUNDS = 0.3
# What a policy must gain, in margins, to be worth more rounds than it takes to rule that out.
TIE_MARGINS = 2.5
# What a count between two buckets may lose, in margins, before another bucket goes between them.
REFINE_MARGINS = 3.0

REFERENCE_POLICY = 0


class Standing(enum.Enum):
    """Where one policy stands in one bucket, against policy 0."""

    REFERENCE = "reference"
    FASTER = "faster"
    TIED = "tied"
    SLOWER = "slower"
    UNSETTLED = "unsettled"
    HOPELESS = "hopeless"  # dropped at the first look
    WRONG = "wrong"  # its output broke the contract
    FAILED = "failed"  # it raised


@dataclass(frozen=True)
class Rule:
    """When a policy may replace policy 0.

    margin          fraction of policy 0's time it must surely save
    confidence      of that, however often the samples were looked at
    tie_confidence  of ruling a gain out; lower, because a mistake there costs only a small gain
    min_rounds      before any verdict
    max_rounds      after them what is unsettled stays policy 0
    """

    margin: float = 0.01
    confidence: float = 0.99
    tie_confidence: float = 0.95
    min_rounds: int = 4
    max_rounds: int = 200


@dataclass(frozen=True)
class Candidate:
    """What was measured of one policy in one bucket.

    round_us  one time a round in microseconds, paired with policy 0's first rounds; a policy whose
              standing is settled need not be measured further
    out       why it is no candidate, or None while it is
    reason    what happened, where `out` is set
    """

    policy: int
    round_us: tuple[float, ...] = ()
    out: Standing | None = None
    reason: str = ""


@dataclass(frozen=True)
class PolicyResult:
    """One policy's evidence. gain is the fraction of policy 0's time saved, with its interval."""

    policy: int
    standing: Standing
    median_us: float | None = None
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Verdict:
    """The policy of one bucket. settled: more rounds would not change it. reason: in words."""

    policy: int
    settled: bool
    rounds: int
    reason: str
    results: tuple[PolicyResult, ...]


def decide(candidates: Sequence[Candidate], rule: Rule) -> Verdict:
    """The verdict that these samples support. The first candidate must be policy 0.

    Raises ValueError where policy 0 is missing or a candidate has more rounds than it.
    """
    if not candidates or candidates[0].policy != REFERENCE_POLICY:
        raise ValueError(f"the first candidate must be policy 0, not {candidates[:1]!r}")
    reference = candidates[0]
    rounds = len(reference.round_us)
    if reference.out is not None:
        # Without a trusted policy 0 there is nothing to compare with, and 0 is what runs anyway.
        kept = tuple(
            PolicyResult(c.policy, c.out or Standing.UNSETTLED, reason=c.reason) for c in candidates
        )
        return Verdict(0, True, rounds, f"kept 0: policy 0 itself {reference.reason}", kept)
    if any(len(c.round_us) > rounds for c in candidates):
        raise ValueError("a candidate has more rounds than policy 0: rounds must be paired")

    base = PolicyResult(0, Standing.REFERENCE, _median(reference.round_us), gain=0.0)
    results = [_judge(c, reference, rule) for c in candidates[1:]]
    faster = [r for r in results if r.standing is Standing.FASTER]
    if not faster:
        settled = all(r.standing is not Standing.UNSETTLED for r in results)
        return Verdict(0, settled, rounds, _why_kept(results), (base, *results))

    best = max(faster, key=lambda r: r.gain or 0.0)
    # An unsettled rival only matters while it might still overtake the best.
    settled = not any(
        r.standing is Standing.UNSETTLED and (r.gain_high or 0.0) > (best.gain or 0.0)
        for r in results
    )
    reason = (
        f"policy {best.policy} saves {_percent(best.gain)} (at least {_percent(best.gain_low)})"
    )
    return Verdict(best.policy, settled, rounds, reason, (base, *results))


def combine(verdicts: Sequence[Verdict]) -> tuple[int, str]:
    """One policy for several fills of the same bucket: the least worst-case loss.

    The host cannot know how many rows are real, so one policy serves all fills. A policy's loss in
    a fill is its time over the fastest trusted time there, and at its interval's worse end where it
    is not settled; policy 0 stays unless another's worst loss is smaller. A policy that is not
    trusted in every fill is no candidate.
    """
    if len(verdicts) == 1:
        return verdicts[0].policy, verdicts[0].reason
    worst = {
        policy: max(_cautious_loss(v, policy) for v in verdicts)
        for policy in (r.policy for r in verdicts[0].results)
    }
    chosen = {v.policy for v in verdicts}
    best = min(chosen | {0}, key=lambda policy: (worst[policy], policy))
    if math.isinf(worst[best]):
        best = 0
    where = ", ".join(f"{v.policy}" for v in verdicts)
    return best, f"policy {best} loses least in its worst fill (winners by fill: {where})"


def loss(verdict: Verdict, policy: int) -> float:
    """Time of `policy` over the fastest trusted policy's in this bucket, 1.0 being equal.

    Infinite for a policy that was dropped: it must not be used on a neighbour's word.
    """
    ratios = _ratios(verdict)
    return ratios[policy] / min(ratios.values()) if policy in ratios else math.inf


def _cautious_loss(verdict: Verdict, policy: int) -> float:
    """`loss`, with an unsettled policy taken at the worse end of its interval."""
    result = next(r for r in verdict.results if r.policy == policy)
    if result.standing is not Standing.UNSETTLED:
        return loss(verdict, policy)
    if result.gain_low is None:
        return math.inf
    return (1.0 - result.gain_low) / min(_ratios(verdict).values())


def needs_refining(below: Verdict, above: Verdict, rule: Rule) -> float:
    """How much a count between two neighbouring buckets may lose by taking the upper one's policy.

    0.0 where nothing between can lose more than REFINE_MARGINS margins, as long as each policy's
    time moves smoothly; else a time ratio less 1 (infinite where a dropped policy is involved).
    Policy 0 is special: it is a rule, and jumps from one algorithm to another somewhere between.
    """
    tolerance = REFINE_MARGINS * rule.margin
    lost = max(
        loss(below, above.policy),
        loss(below, _fastest(above)),
        loss(above, _fastest(below)),
    )
    if lost - 1.0 > tolerance:
        return lost - 1.0
    if above.policy == REFERENCE_POLICY:
        twins = _twins(below, tolerance) ^ _twins(above, tolerance)
        return max((abs(loss(v, p) - 1.0) for p in twins for v in (below, above)), default=0.0)
    return 0.0


def _ratios(verdict: Verdict) -> dict[int, float]:
    """Time of each trusted policy over policy 0's."""
    return {
        REFERENCE_POLICY: 1.0,
        **{r.policy: 1.0 - r.gain for r in verdict.results if r.gain is not None},
    }


def _fastest(verdict: Verdict) -> int:
    ratios = _ratios(verdict)
    return min(ratios, key=lambda policy: ratios[policy])


def _twins(verdict: Verdict, tolerance: float) -> set[int]:
    """Policies that take as long as policy 0: what it most likely runs."""
    return {p for p, ratio in _ratios(verdict).items() if abs(ratio - 1.0) <= tolerance}


def _judge(candidate: Candidate, reference: Candidate, rule: Rule) -> PolicyResult:
    median = _median(candidate.round_us)
    if candidate.out is not None:
        return PolicyResult(candidate.policy, candidate.out, median, reason=candidate.reason)
    # Only the rounds it took part in: zip stops at the shorter, its own.
    pairs = zip(candidate.round_us, reference.round_us, strict=False)
    ratios = [math.log(ours / theirs) for ours, theirs in pairs]
    if len(ratios) < 2:
        return PolicyResult(candidate.policy, Standing.UNSETTLED, median)
    mean, spread = _clipped_moments(ratios)
    sure = half_width(len(ratios), spread, 1.0 - rule.confidence)
    likely = half_width(len(ratios), spread, 1.0 - rule.tie_confidence)
    # expm1 turns a log-ratio into the fraction of policy 0's time that is saved.
    gain, low, high, tie_high = (
        -math.expm1(log_ratio) for log_ratio in (mean, mean + sure, mean - sure, mean - likely)
    )
    standing = Standing.UNSETTLED
    if len(ratios) >= rule.min_rounds:
        if low > rule.margin:
            standing = Standing.FASTER
        elif tie_high < TIE_MARGINS * rule.margin:
            # Surely not worth switching to; which word depends on what it most likely is.
            standing = Standing.TIED if gain > -TIE_MARGINS * rule.margin else Standing.SLOWER
    bounds = (None, None) if math.isinf(sure) else (low, high)
    return PolicyResult(candidate.policy, standing, median, gain, *bounds)


def half_width(n: int, spread: float, alpha: float) -> float:
    """Half-width of the anytime-valid interval around a mean of n values; inf while n is too small.

    spread is their sum of squared deviations. The mixture t-statistic's likelihood ratio against
    mean m, with prior weight c, is sqrt(r) * ((1 + u) / (1 + r*u)) ** (n/2), where r = c/(c+n) and
    u = n*(mean - m)**2 / spread. The interval holds every m where it stays below 1/alpha; solving
    for u gives the closed form below.
    """
    r = PRIOR_ROUNDS / (PRIOR_ROUNDS + n)
    k = (1.0 / (alpha * alpha * r)) ** (1.0 / n)
    if k * r >= 1.0:
        return math.inf
    return math.sqrt((k - 1.0) / (1.0 - k * r) * spread / n)


def _clipped_moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sum of squared deviations, with outliers pulled in to the fences.

    The fences lie one inter-decile width outside the inner 80% of the values, some 3.8 standard
    deviations if they are normal. (A median absolute deviation would do with half of the values,
    but is 0 where a coarse clock makes half of them equal, and would then clip away all doubt.)
    """
    ordered = sorted(values)
    tail = len(ordered) // 10
    low, high = ordered[tail], ordered[-1 - tail]
    width = high - low
    clipped = [min(max(v, low - width), high + width) for v in ordered]
    mean = math.fsum(clipped) / len(clipped)
    return mean, math.fsum((v - mean) ** 2 for v in clipped)


def _median(values: Sequence[float]) -> float | None:
    """The usual median; statistics.median is several times slower and this runs every round."""
    if not values:
        return None
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _why_kept(results: Sequence[PolicyResult]) -> str:
    words = [
        f"{r.policy} {r.standing.value}{f' ({r.reason})' if r.reason else ''}" for r in results
    ]
    return "kept 0: " + (", ".join(words) if words else "it is the only policy")


def _percent(fraction: float | None) -> str:
    return f"{100.0 * (fraction or 0.0):.1f}%"
