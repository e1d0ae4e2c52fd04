"""Which token count to measure next, and how long: sketch a grid, refine gaps, settle doubts. Pure.

Winners change at one or two token counts, so a few buckets and some bisection find what a dense
grid would. Each bucket is first sketched in a few rounds, enough for every clear case: where the
time goes after that is decided with all of them in view, the costliest gap first.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from adaptive_moe.buckets import between, first_buckets
from adaptive_moe.decision import TIE_MARGINS, Rule, Standing, Verdict, needs_refining
from adaptive_moe.policy_table import Bucket

# Rounds of a sketch.
SKETCH_ROUNDS = 10
# What a gap must cost, in margins times its width, to get another bucket.
WORTH_REFINING = 0.1


def explore(
    domain: Sequence[int],
    wanted: Sequence[int],
    rule: Rule,
    measure: Callable[[int, int], Bucket],
    has_time: Callable[[], bool],
) -> dict[int, Bucket]:
    """Measure the first buckets, small to large, then whatever may still cost most.

    domain and wanted are as in buckets.first_buckets. measure(num_tokens, rounds) brings a bucket
    to that many rounds, fewer where it settles or time runs out, and goes on where it was before.
    """
    found = {n: measure(n, SKETCH_ROUNDS) for n in first_buckets(domain, wanted)}
    asked = dict.fromkeys(found, SKETCH_ROUNDS)
    while has_time():
        gap = worst_gap(found, domain, rule)
        # Where a gap is only a doubt about one of its ends, more buckets would only be more doubts.
        near = found if gap is None else _neighbours(found, gap)
        open_to = {n: bucket for n, bucket in near.items() if asked[n] < rule.max_rounds}
        if (doubt := greatest_doubt(open_to, rule)) is not None:
            asked[doubt] = more_rounds(asked[doubt], rule)
            found[doubt] = measure(doubt, asked[doubt])
        elif gap is not None:
            asked[gap] = SKETCH_ROUNDS
            found[gap] = measure(gap, SKETCH_ROUNDS)
        else:
            break
    return found


def more_rounds(rounds: int, rule: Rule) -> int:
    """To how many a doubt is brought: twice as many, then it is weighed against the others anew."""
    return min(2 * rounds, rule.max_rounds)


def worst_gap(found: Mapping[int, Bucket], domain: Sequence[int], rule: Rule) -> int | None:
    """The count inside the neighbours that may lose most, or None where none may lose enough."""
    gaps = [
        (cost, middle)
        for low, high in pairwise(sorted(found))
        if (cost := gap_cost(found[low], found[high], rule)) > WORTH_REFINING * rule.margin
        and (middle := between(domain, low, high)) is not None
    ]
    return max(gaps)[1] if gaps else None


def _neighbours(found: Mapping[int, Bucket], gap: int) -> dict[int, Bucket]:
    low, high = max(n for n in found if n < gap), min(n for n in found if n > gap)
    return {low: found[low], high: found[high]}


def gap_cost(low: Bucket, high: Bucket, rule: Rule) -> float:
    """What counts between two neighbours may lose, times the gap's width in e-folds of tokens.

    The width matters because losing 5% at three token counts is not worth a bucket, while half a
    jump of 300% is; the loss is needs_refining's, over the fills the worst.
    """
    lost = max(
        needs_refining(a.verdict, b.verdict, rule)
        for a, b in zip(low.fills, high.fills, strict=True)
    )
    return lost * math.log(high.num_tokens / low.num_tokens)


def greatest_doubt(found: Mapping[int, Bucket], rule: Rule) -> int | None:
    """The bucket with the most to gain from more rounds, or None."""
    doubts = [
        (promise, num_tokens)
        for num_tokens, bucket in found.items()
        if (promise := max(promised(fill.verdict, rule) for fill in bucket.fills)) > 0.0
    ]
    return max(doubts)[1] if doubts else None


def promised(verdict: Verdict, rule: Rule) -> float:
    """What an unsettled policy may well gain over the one chosen; 0.0 where it is too little.

    Taken is a gain half-way up its interval's upper half, some two standard errors above the mean.
    """
    if verdict.settled:
        return 0.0
    gains = {r.policy: r.gain for r in verdict.results if r.gain is not None}
    likely = [
        r.gain if r.gain_high is None else (r.gain + r.gain_high) / 2.0
        for r in verdict.results
        if r.gain is not None and r.standing is Standing.UNSETTLED
    ]
    promise = max(likely, default=0.0) - gains.get(verdict.policy, 0.0)
    return promise if promise > TIE_MARGINS * rule.margin else 0.0
