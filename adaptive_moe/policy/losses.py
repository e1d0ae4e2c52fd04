"""What a choice costs where it is not the best: over fills, over situations, between buckets. Pure.

The unit is microseconds a call, added to the step that waits for it: a ratio of two situations, or
of two fills, means nothing.
"""

import math
from collections.abc import Sequence

from adaptive_moe.policy.decision import Rule, Standing, Verdict

# What a count between two buckets may lose, in margins, before another bucket goes between them.
REFINE_MARGINS = 3.0


def combine(verdicts: Sequence[Verdict]) -> tuple[str, str]:
    """One candidate for several fills of the same bucket, and why: the least worst-case loss.

    The host cannot know how many rows are real, so one candidate serves all fills. The baseline
    stays unless another's worst loss, in us, is smaller; a candidate that is not trusted in every
    fill is none.
    """
    if len(verdicts) == 1:
        return verdicts[0].candidate, verdicts[0].reason
    baseline = verdicts[0].baseline.candidate
    chosen = dict.fromkeys([baseline, *(v.candidate for v in verdicts)])
    worst = {name: max(cautious_loss_us(v, name) for v in verdicts) for name in chosen}
    best = min(chosen, key=lambda name: worst[name])
    if math.isinf(worst[best]):
        best = baseline
    where = ", ".join(v.candidate for v in verdicts)
    return best, f"{best} loses least in its worst fill (winners by fill: {where})"


def in_both(busy: Sequence[Verdict], idle: Sequence[Verdict], margin: float) -> str:
    """The candidate of an eager count whose device may be busy or idle.

    One that is faster in a situation, and loses in neither: of those the one whose least saving is
    largest. Else the baseline.
    """
    baseline = busy[0].baseline.candidate
    best, most = baseline, 0.0
    for name in (r.candidate for r in busy[0].results[1:]):
        fast = any(all(_is_faster(v, name) for v in fills) for fills in (busy, idle))
        saved = [saving_us(v, name) for v in (*busy, *idle)]
        if not fast or any(loses(v, name, margin) for v in (*busy, *idle)):
            continue
        # Each situation's least saving; what the better of the two brings decides among equals.
        value = max(min(saved[: len(busy)]), min(saved[len(busy) :]))
        if value > most:
            best, most = name, value
    return best


def saving_us(verdict: Verdict, candidate: str) -> float:
    """Microseconds a call that the candidate most likely saves; -inf where nobody knows."""
    result = verdict.result(candidate)
    base = verdict.baseline.median_us
    if result is None or result.gain is None or base is None:
        return -math.inf
    return result.gain * base


def loses(verdict: Verdict, candidate: str, margin: float) -> bool:
    """May the candidate cost more than the margin here? What is not known to be harmless may."""
    if candidate == verdict.baseline.candidate:
        return False
    result = verdict.result(candidate)
    if result is None or result.standing not in (Standing.FASTER, Standing.TIED):
        return True
    return (result.gain or 0.0) < -margin


def loss(verdict: Verdict, candidate: str) -> float:
    """Time of `candidate` over the fastest trusted candidate's in this bucket, 1.0 being equal.

    Infinite for one that was dropped: it must not be used on a neighbour's word.
    """
    ratios = _ratios(verdict)
    return ratios[candidate] / min(ratios.values()) if candidate in ratios else math.inf


def cautious_loss_us(verdict: Verdict, candidate: str) -> float:
    """Microseconds a call over the fastest trusted candidate; an unsettled one is taken at the
    worse end of its interval, and infinite where it has none."""
    ratios, base = _ratios(verdict), verdict.baseline.median_us or 0.0
    result = verdict.result(candidate)
    ratio = ratios.get(candidate, math.inf)
    if result is not None and result.standing is Standing.UNSETTLED:
        ratio = math.inf if result.gain_low is None else 1.0 - result.gain_low
    return (ratio - min(ratios.values())) * base if math.isfinite(ratio) else math.inf


def needs_refining(below: Verdict, above: Verdict, rule: Rule) -> float:
    """How much a count between two neighbouring buckets may lose by taking the upper one's
    candidate.

    0.0 where nothing between can lose more than REFINE_MARGINS margins, as long as each candidate's
    time moves smoothly; else a time ratio less 1 (infinite where a dropped one is involved).
    The baseline may be a rule, which jumps from one algorithm to another somewhere between.
    """
    tolerance = REFINE_MARGINS * rule.margin
    lost = max(
        loss(below, above.candidate),
        loss(below, _fastest(above)),
        loss(above, _fastest(below)),
    )
    if lost - 1.0 > tolerance:
        return lost - 1.0
    if above.candidate == above.baseline.candidate:
        twins = _twins(below, tolerance) ^ _twins(above, tolerance)
        return max((abs(loss(v, c) - 1.0) for c in twins for v in (below, above)), default=0.0)
    return 0.0


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
