"""Which token count to measure next, and how long. Pure.

Winners change at one or two token counts, so a few buckets and some bisection find what a dense
grid would. Each bucket of the grid is first sketched in a few rounds, enough for every clear case.
After that the next step is always the one that may save most for the rounds it takes:

    a gap    a new bucket between two neighbours that differ
    a doubt  more rounds for a bucket that is unsettled

What is judged here is the first pass alone: winners count as they will if they are confirmed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from adaptive_moe.policy.buckets import halfway
from adaptive_moe.policy.evidence import Rule
from adaptive_moe.policy.verdict import TIE_MARGINS, Choice, Standing, Verdict, gap_loss

# Rounds of a sketch: enough for what is clear.
SKETCH_ROUNDS = 6
# What a step must save, in margins, to be taken.
WORTH_MEASURING = 0.4
# What settling a doubt is worth beside a gap that may lose as much: it decides the counts that the
# bucket serves, and whether there is anything in the gaps on its two sides.
DOUBT_WEIGHT = 3.0


@dataclass(frozen=True)
class Step:
    """A bucket to measure next: up to `rounds` rounds, `more` of them new. saves: the time ratio
    that this may win, times the width in e-folds of tokens over which it does."""

    num_tokens: int
    rounds: int
    more: int
    saves: float


def next_step(
    choices: Mapping[int, Choice], asked: Mapping[int, int], domain: Sequence[int], rule: Rule
) -> Step | None:
    """The step that may save most for each round it takes, or None where none is worth taking.

    choices: of the buckets so far, by token count. asked: the rounds each was asked for.
    """
    steps = [*_gaps(choices, domain, rule), *_doubts(choices, asked, rule)]
    worth = [step for step in steps if step.saves > WORTH_MEASURING * rule.margin]
    return max(worth, key=lambda step: (step.saves / step.more, step.num_tokens), default=None)


def _gaps(choices: Mapping[int, Choice], domain: Sequence[int], rule: Rule) -> Iterator[Step]:
    """A new bucket inside each pair of neighbours that has room for one.

    The width matters because losing 5% at three token counts is not worth a bucket, while half a
    jump of 300% is.
    """
    for low, high in pairwise(sorted(choices)):
        middle = halfway(domain, low, high)
        if middle is not None:
            saves = gap_loss(choices[low], choices[high], rule) * math.log(high / low)
            yield Step(middle, SKETCH_ROUNDS, SKETCH_ROUNDS, saves)


def _doubts(choices: Mapping[int, Choice], asked: Mapping[int, int], rule: Rule) -> Iterator[Step]:
    """More rounds for each unsettled bucket that promises something: twice as many, then it is
    weighed against the others anew."""
    for below, num_tokens in pairwise([0, *sorted(choices)]):
        rounds = min(2 * asked[num_tokens], rule.max_rounds)
        promise = max(_promise(verdict, rule) for verdict in choices[num_tokens].device)
        if promise > 0.0 and rounds > asked[num_tokens]:
            # It serves the counts above the bucket below; with one added, the first has a width.
            width = math.log((num_tokens + 1) / (below + 1))
            saves = DOUBT_WEIGHT * promise * width
            yield Step(num_tokens, rounds, rounds - asked[num_tokens], saves)


def _promise(verdict: Verdict, rule: Rule) -> float:
    """What settling this verdict is expected to win: the time ratio less 1 that an unsettled
    candidate has over the one chosen; 0.0 where none may well gain enough to matter."""
    if verdict.settled:
        return 0.0
    chosen = verdict.judgement(verdict.candidate).gain or 0.0
    most = 0.0
    for judgement in verdict.judgements:
        if judgement.gain is None or judgement.standing is not Standing.UNSETTLED:
            continue
        gain, error = judgement.gain - chosen, judgement.error
        if gain + 2.0 * error > TIE_MARGINS * rule.margin:
            most = max(most, _expected_gain(gain, error) / (1.0 - judgement.gain))
    return most


def _expected_gain(gain: float, error: float) -> float:
    """The mean of what is above 0 of a normal variable, or of a gain that is sure."""
    if error <= 0.0:
        return gain
    z = gain / error
    density = math.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    return gain * 0.5 * math.erfc(-z / math.sqrt(2.0)) + error * density
