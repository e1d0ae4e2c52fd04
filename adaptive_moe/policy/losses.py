"""What a choice costs where it is not the best: over fills, over situations, between buckets. Pure.

The unit is microseconds a call, added to the step that waits for it: a ratio of two situations, or
of two fills, means nothing.
"""

import math
from collections.abc import Sequence

from adaptive_moe.policy.decision import OPEN, TIE_MARGINS, Rule, Standing, Verdict

# What a count between two buckets may lose, in margins, before another bucket goes between them.
REFINE_MARGINS = 3.0
# Standings that may turn out to cost nothing; its interval says whether that is sure.
HARMLESS = (Standing.FASTER, Standing.TIED, *OPEN)


def combine(verdicts: Sequence[Verdict], margin: float = Rule.margin) -> tuple[str, str]:
    """One candidate where nobody knows which of the verdicts will hold, and why that one.

    Verdicts of several fills (the host cannot know how many rows are real) or situations (nor
    whether the device is idle). A candidate replaces the baseline only where it is FASTER in one of
    them and loses in none. Of those the one whose largest loss against the fastest, in us, is
    least.
    """
    baseline = verdicts[0].baseline.candidate
    if len(verdicts) == 1:
        return verdicts[0].candidate, verdicts[0].reason
    names = [r.candidate for r in verdicts[0].results[1:]]
    fit = [name for name in names if _may_serve(verdicts, name, margin)]
    best = min(fit, key=lambda name: max(loss_us(v, name) for v in verdicts), default=baseline)
    where = ", ".join(dict.fromkeys(v.candidate for v in verdicts))
    if best != baseline:
        return best, f"{best} is faster in one and loses in none (winners: {where})"
    return best, f"kept {baseline}: nothing is faster in one and loses in none (winners: {where})"


def loses(verdict: Verdict, candidate: str, margin: float, sure_us: float = math.inf) -> bool:
    """May the candidate cost here what matters? What is not known to be harmless may.

    It loses where it is likelier slower by the margin than not, where it may be slower by more than
    a tie can be, and where what it may cost, in us, is not covered by the sure_us that it surely
    saves elsewhere.
    """
    if candidate == verdict.baseline.candidate:
        return False
    result, base = verdict.result(candidate), verdict.baseline.median_us
    if result is None or result.gain is None or result.gain_low is None or base is None:
        return True
    slower = result.gain < -margin or result.gain_low < -TIE_MARGINS * margin
    return result.standing not in HARMLESS or slower or -result.gain_low * base > sure_us


def saving_us(verdict: Verdict, candidate: str) -> float:
    """Microseconds a call that the candidate surely saves; negative: may cost, -inf: unknown."""
    result, base = verdict.result(candidate), verdict.baseline.median_us
    if result is None or result.gain_low is None or base is None:
        return -math.inf
    return result.gain_low * base


def loss_us(verdict: Verdict, candidate: str) -> float:
    """Microseconds a call over the fastest trusted candidate, at the most likely times."""
    ratios, base = _ratios(verdict), verdict.baseline.median_us or 0.0
    ratio = ratios.get(candidate, math.inf)
    return (ratio - min(ratios.values())) * base if math.isfinite(ratio) else math.inf


def _may_serve(verdicts: Sequence[Verdict], candidate: str, margin: float) -> bool:
    faster = [v for v in verdicts if _is_faster(v, candidate)]
    if not faster:
        return False
    sure_us = max(saving_us(v, candidate) for v in faster)
    return not any(loses(v, candidate, margin, sure_us) for v in verdicts)


def loss(verdict: Verdict, candidate: str) -> float:
    """Time of `candidate` over the fastest trusted candidate's in this bucket, 1.0 being equal.

    Infinite for one that was dropped: it must not be used on a neighbour's word.
    """
    ratios = _ratios(verdict)
    return ratios[candidate] / min(ratios.values()) if candidate in ratios else math.inf


def loss_if_asked(verdict: Verdict, candidate: str) -> float:
    """The same, and 1.0 for one that was not asked here, as it cannot serve."""
    return 1.0 if candidate in _unasked(verdict) else loss(verdict, candidate)


def needs_refining(below: Verdict, above: Verdict, rule: Rule) -> float:
    """How much a count between two neighbouring buckets may lose by taking the upper one's
    candidate.

    0.0 where nothing between can lose more than REFINE_MARGINS margins, as long as each candidate's
    time moves smoothly; else a time ratio less 1 (infinite where a dropped one is involved).
    The baseline may be a rule, which jumps from one algorithm to another somewhere between.
    """
    tolerance = REFINE_MARGINS * rule.margin
    unasked = _unasked(below) | _unasked(above)
    if {below.candidate, above.candidate} & unasked:
        return 0.0  # where it ends is another situation's to say
    lost = max(
        loss_if_asked(below, _fastest(above)),
        loss_if_asked(above, _fastest(below)),
        loss(below, above.candidate),
    )
    if lost - 1.0 > tolerance:
        return lost - 1.0
    if above.candidate == above.baseline.candidate:
        twins = (_twins(below, tolerance) ^ _twins(above, tolerance)) - unasked
        return max((abs(loss(v, c) - 1.0) for c in twins for v in (below, above)), default=0.0)
    return 0.0


def _unasked(verdict: Verdict) -> set[str]:
    """Who is known to be slower without having been measured."""
    return {
        r.candidate for r in verdict.results if r.gain is None and r.standing is Standing.SLOWER
    }


def _ratios(verdict: Verdict) -> dict[str, float]:
    """Time of each trusted candidate over the baseline's."""
    others = {r.candidate: 1.0 - r.gain for r in verdict.results if r.gain is not None}
    return {**others, verdict.baseline.candidate: 1.0}


def _fastest(verdict: Verdict) -> str:
    ratios = _ratios(verdict)
    return min(ratios, key=lambda name: ratios[name])


def _twins(verdict: Verdict, tolerance: float) -> set[str]:
    """Candidates that take as long as the baseline: what it most likely runs."""
    return {name for name, ratio in _ratios(verdict).items() if abs(ratio - 1.0) <= tolerance}


def _is_faster(verdict: Verdict, candidate: str) -> bool:
    result = verdict.result(candidate)
    return result is not None and result.standing is Standing.FASTER
