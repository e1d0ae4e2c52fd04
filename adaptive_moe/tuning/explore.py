"""Which token count to measure next, and how long: sketch, look between, refine, settle. Pure.

Winners change at one or two token counts, so a few buckets and some bisection find what a dense
grid would. Each bucket of the grid is first sketched in a few rounds, enough for every clear case.

After that the next step is always the one that may save most for the rounds it takes:

    a gap    a new bucket between two neighbours that differ
    a doubt  more rounds for a bucket that is unsettled
    a look   into a wide gap between two that agree: a winner may come and go inside it, which
             bisection never sees. Two rounds at a count halfway; where they disagree with the
             bucket above by what would be refined, the count becomes a bucket. It is odd, as powers
             of two flatter a kernel whose wide path wants tokens*topk divisible by 4.
"""

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from adaptive_moe.policy.buckets import between, first_buckets
from adaptive_moe.policy.decision import TIE_MARGINS, Rule, Standing, Verdict
from adaptive_moe.policy.evidence import Bucket
from adaptive_moe.policy.losses import REFINE_MARGINS, loss_if_asked, needs_refining

# Rounds of a sketch: enough for what is clear. And of a look: a ratio with a second opinion.
SKETCH_ROUNDS = 6
LOOK_ROUNDS = 2
# Gaps narrower than this are not looked into: a window of half an octave shows in a wider one.
LOOK_RATIO = 1.5
# What a look may save, in margins over its whole gap: little, as there rarely is anything.
LOOK_PROMISE = 1.0
# What a step must save, in margins, to be taken.
WORTH_MEASURING = 0.4
# Standard errors in half a gain's interval, about: it holds at 99% however often one looks.
ERRORS = 4.5
# What settling a doubt is worth beside a gap that may lose as much: it decides the counts that the
# bucket serves, and whether there is anything in the gaps on its two sides.
DOUBT_WEIGHT = 3.0


@dataclass(frozen=True)
class Step:
    """A bucket to measure next: up to `rounds` rounds, `more` of them new. saves: the time ratio
    that this may win, times the width in e-folds of tokens over which it does. above: for a look,
    the bucket that serves the count."""

    num_tokens: int
    rounds: int
    more: int
    saves: float
    above: int | None = None


def explore(
    domain: Sequence[int],
    wanted: Sequence[int],
    rule: Rule,
    measure: Callable[[int, int], Bucket],
    has_time: Callable[[], bool],
    known: Mapping[int, Bucket] | None = None,
) -> dict[int, Bucket]:
    """Measure the first buckets, small to large, then whatever may still save most for its time.

    domain and wanted are as in buckets.first_buckets. measure(num_tokens, rounds) brings a bucket
    to that many rounds, fewer where it settles or time runs out, and goes on where it was before.
    known: settled buckets, which are built upon and not measured again.
    """
    found = dict(known or {})
    asked = dict.fromkeys(found, rule.max_rounds)
    for num_tokens in first_buckets(domain, wanted):
        if num_tokens not in found:
            found[num_tokens] = measure(num_tokens, SKETCH_ROUNDS)
            asked[num_tokens] = SKETCH_ROUNDS
    looked: set[int] = set()
    while has_time() and (step := next_step(found, asked, domain, rule, looked)) is not None:
        rounds, bucket = step.rounds, measure(step.num_tokens, step.rounds)
        if step.above is not None:
            looked.add(step.num_tokens)
            if not surprises(bucket, found[step.above], rule):
                continue
            rounds, bucket = SKETCH_ROUNDS, measure(step.num_tokens, SKETCH_ROUNDS)
        found[step.num_tokens], asked[step.num_tokens] = bucket, rounds
    return found


def next_step(
    found: Mapping[int, Bucket],
    asked: Mapping[int, int],
    domain: Sequence[int],
    rule: Rule,
    looked: Container[int] = (),
) -> Step | None:
    """The step that may save most for each round it takes, or None where none is worth taking.

    asked: the rounds that each bucket was asked for so far. looked: counts looked at already.
    """
    steps = [*gaps(found, domain, rule), *doubts(found, asked, rule)]
    steps += [step for step in looks(found, domain, rule) if step.num_tokens not in looked]
    worth = [step for step in steps if step.saves > WORTH_MEASURING * rule.margin]
    return max(worth, key=lambda step: (step.saves / step.more, step.num_tokens), default=None)


def gaps(found: Mapping[int, Bucket], domain: Sequence[int], rule: Rule) -> Iterator[Step]:
    """A new bucket inside each pair of neighbours that has room for one."""
    for low, high in pairwise(sorted(found)):
        middle = between(domain, low, high)
        if middle is not None:
            saves = gap_cost(found[low], found[high], rule)
            yield Step(middle, SKETCH_ROUNDS, SKETCH_ROUNDS, saves)


def looks(found: Mapping[int, Bucket], domain: Sequence[int], rule: Rule) -> Iterator[Step]:
    """A look into each wide gap between neighbours that agree."""
    for low, high in pairwise(sorted(found)):
        middle = between(domain, low, high) if high > LOOK_RATIO * low else None
        if middle is not None and gap_cost(found[low], found[high], rule) == 0.0:
            saves = LOOK_PROMISE * rule.margin * math.log(high / low)
            yield Step(_odd(domain, low, middle), LOOK_ROUNDS, LOOK_ROUNDS, saves, high)


def surprises(look: Bucket, above: Bucket, rule: Rule) -> bool:
    """Does the candidate of the bucket above lose at this count what would be worth a bucket?"""
    lost = max(loss_if_asked(verdict, above.candidate) for verdict in look.verdicts)
    return lost - 1.0 > REFINE_MARGINS * rule.margin


def _odd(domain: Sequence[int], low: int, count: int) -> int:
    near = (count, count - 1)
    return next((n for n in near if n % 2 and n > low and n in domain), count)


def doubts(found: Mapping[int, Bucket], asked: Mapping[int, int], rule: Rule) -> Iterator[Step]:
    """More rounds for each unsettled bucket that promises something."""
    for below, num_tokens in pairwise([0, *sorted(found)]):
        rounds = more_rounds(asked[num_tokens], rule)
        promise = max(promised(fill.verdict, rule) for fill in found[num_tokens].fills)
        if promise > 0.0 and rounds > asked[num_tokens]:
            # It serves the counts above the bucket below; with one added, the first has a width.
            width = math.log((num_tokens + 1) / (below + 1))
            saves = DOUBT_WEIGHT * promise * width
            yield Step(num_tokens, rounds, rounds - asked[num_tokens], saves)


def more_rounds(rounds: int, rule: Rule) -> int:
    """To how many a doubt is brought: twice as many, then it is weighed against the others anew."""
    return min(2 * rounds, rule.max_rounds)


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


def promised(verdict: Verdict, rule: Rule) -> float:
    """What settling this verdict is expected to win: the time ratio less 1 that an unsettled
    candidate has over the one chosen, where it has any; 0.0 where none may well gain enough to
    matter.
    """
    if verdict.settled:
        return 0.0
    found = verdict.result(verdict.candidate)
    chosen = (found.gain if found else None) or 0.0
    most = 0.0
    for result in verdict.results:
        if result.gain is None or result.standing is not Standing.UNSETTLED:
            continue
        gain = result.gain - chosen
        error = 0.0 if result.gain_high is None else (result.gain_high - result.gain) / ERRORS
        if gain + 2.0 * error > TIE_MARGINS * rule.margin:
            most = max(most, _expected_gain(gain, error) / (1.0 - result.gain))
    return most


def _expected_gain(gain: float, error: float) -> float:
    """The mean of what is above 0 of a normal variable, or of a gain that is sure."""
    if error <= 0.0:
        return gain
    z = gain / error
    density = math.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    return gain * 0.5 * math.erfc(-z / math.sqrt(2.0)) + error * density
