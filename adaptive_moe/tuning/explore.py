"""One situation of a calibration: which token count to measure next, and how long.

Winners change at one or two token counts, so a few buckets and some bisection find what a dense
grid would. Each bucket of the grid is first sketched in a few rounds, enough for every clear case.
After that the next step is always the one that may save most for the rounds it takes:

    a gap    a new bucket between two neighbours that differ
    a doubt  more rounds for a bucket that is unsettled

Exploring goes by the first pass alone: winners count as they will if they are confirmed. The second
pass comes after the first of both situations and prepares everything anew: it shares neither the
moment nor a captured graph with the first.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, count, pairwise

import torch
from torch import Tensor

from adaptive_moe.kernels import Candidate, SortKernel
from adaptive_moe.kernels.contract import SortingInputs
from adaptive_moe.policy.buckets import first_buckets, halfway
from adaptive_moe.policy.coverage import Coverage, Situation
from adaptive_moe.policy.evidence import Bucket, Evidence, Rule
from adaptive_moe.policy.verdict import (
    Choice,
    Judgement,
    Verdict,
    choose,
    gap_loss,
    open_judgements,
    rounds_to_confirm,
)
from adaptive_moe.tuning.clocks import Clock, Neutral, clock_for
from adaptive_moe.tuning.inputs import Inputs
from adaptive_moe.tuning.rounds import (
    Bench,
    Exclusions,
    FillRounds,
    Times,
    check,
    confirm,
    measure,
)

ClockFactory = Callable[[Situation, torch.device], Clock]
Progress = Callable[[int, int, str], None]

# Rounds of a sketch: enough for what is clear.
SKETCH_ROUNDS = 6
# What a step must save, in margins, to be taken.
WORTH_MEASURING = 0.4
# A doubt counts so many times a gap of the same loss: its result decides a whole bucket, and
# whether the gaps on both sides matter.
DOUBT_WEIGHT = 3.0
# Time of a confirming round over one of the first pass: fewer candidates, but each lot is prepared
# anew.
CONFIRM_COST = 1.2
LEAST_S = 1e-6


class Session:
    """What both situations of one calibration share.

    exclusions: the candidates that may not serve, so far. total: buckets expected, for progress.
    """

    def __init__(
        self,
        kernel: SortKernel,
        coverage: Coverage,
        first: Sequence[int],
        rule: Rule,
        *,
        expert_mask: Tensor | None,
        earlier: Evidence | None,
        clock_factory: ClockFactory | None,
        now: Callable[[], float],
        progress: Progress,
    ) -> None:
        self.kernel, self.coverage, self.first, self.rule = kernel, coverage, first, rule
        self.earlier = earlier
        self.inputs = Inputs(coverage, expert_mask, kernel.device)
        self.exclusions = Exclusions(coverage.baseline, coverage.describe())
        if earlier is not None:
            # What was wrong stays wrong for this key; what raised may have passed.
            wrong = {one.candidate: one for one in earlier.excluded if one.wrong}
            self.exclusions.by_name.update(wrong)
        self.clock_factory = clock_factory or partial(clock_for, neutral=Neutral(kernel.device))
        self.total = 0
        self._now, self._progress = now, progress
        self._checking_s = 0.0
        self._checked: set[int] = set()
        self._done = 0

    def now(self) -> float:
        """Seconds, without those of checking: no budget is spent on it."""
        return self._now() - self._checking_s

    def check(self, inputs: Sequence[SortingInputs], num_tokens: int) -> None:
        """Compare every candidate with the baseline on each of these that is new."""
        begun = self._now()
        # A session keeps its inputs, so an id stands for one of them.
        new = [one for one in inputs if id(one) not in self._checked]
        self._checked.update(map(id, new))
        check(self.kernel.candidates, new, num_tokens, self.exclusions)
        self._checking_s += self._now() - begun

    def report_progress(self, situation: Situation, num_tokens: int) -> None:
        """Progress: a bucket that was not expected adds itself to the total."""
        self._done += 1
        self.total = max(self.total, self._done)
        tokens = "token" if num_tokens == 1 else "tokens"
        self._progress(self._done, self.total, f"{num_tokens} {tokens}, {situation.value}")


@dataclass
class _Measured:
    """One bucket: its fills, the seconds of its first pass, the rounds that were asked for, and how
    it was judged last, with so many exclusions."""

    fills: list[FillRounds]
    seconds: float = 0.0
    asked: int = 0
    presumed: Choice | None = None
    exclusions: int = 0

    @property
    def has_rounds(self) -> bool:
        return all(fill.rounds for fill in self.fills)

    @property
    def is_confirming(self) -> bool:
        return any(fill.second for fill in self.fills)


class Section:
    """One situation of a run: its buckets, explored in one pass and confirmed in a second."""

    def __init__(self, session: Session, situation: Situation) -> None:
        self.session, self.situation, self.rule = session, situation, session.rule
        self.domain = session.coverage.counts(situation)
        self.measured: dict[int, _Measured] = {}
        # True if the time for refining ended while steps worth taking were left.
        self.cut_short = False
        self._winners: list[int] = []
        earlier = session.earlier.buckets(situation) if session.earlier else ()
        self.earlier = {
            bucket.num_tokens: bucket
            for bucket in earlier
            if bucket.num_tokens in self.domain
            and tuple(fill.fraction for fill in bucket.fills)
            == session.inputs.fills(situation, bucket.num_tokens)
        }

    @cached_property
    def bench(self) -> Bench:
        """Made when first needed: a clock takes memory, and all may be known already."""
        session = self.session
        kernel, make = session.kernel, session.clock_factory
        candidates: dict[str, Candidate] = {c.name: c for c in kernel.candidates}
        clock = make(self.situation, kernel.device)
        return Bench(candidates, clock, self.rule, session.exclusions)

    @property
    def kept(self) -> dict[int, Choice]:
        """The earlier buckets that need no more rounds."""
        found = {n: self._choose(bucket) for n, bucket in self.earlier.items()}
        return {n: choice for n, choice in found.items() if choice.settled}

    @property
    def grid(self) -> list[int]:
        """The counts measured in any case."""
        wanted = self.session.first or _powers(self.session.coverage, self.situation)
        kept = self.kept
        return [n for n in first_buckets(self.domain, wanted) if n not in kept]

    @property
    def was_measured(self) -> bool:
        """Did any bucket get a round, or need none, as where only the baseline is left?"""
        return bool(self.kept) or any(
            one.has_rounds or self._presumed(n).settled for n, one in self.measured.items()
        )

    def check_grid(self) -> None:
        """Check the grid before any clock runs: a candidate wrong at any count is out.

        From the largest on: a sort may then compile at once what smaller counts need, too."""
        for num_tokens in reversed(self.grid):
            self._check(num_tokens)

    def sketch(self, deadline: float, ahead: int, reserved_s: Callable[[], float]) -> int:
        """A few rounds at each count of the grid, as far as the winners among them can be confirmed
        as well: what is settled stays, and the next start continues with the rest.

        ahead: grid counts of all sections still to come; the result is what is left of them.
        reserved_s: seconds that confirming the winners of all sections will take.
        """
        for num_tokens in self.grid:
            # A noisy bucket may take its share and as much again, never what later ones need.
            ends = deadline - reserved_s()
            slot = self.session.now() + 2.0 * (ends - self.session.now()) / (ahead + 1)
            ahead -= 1
            self._first_pass(num_tokens, SKETCH_ROUNDS, slot, ends)
        return ahead

    def refine(self, deadline: float) -> None:
        """New buckets and more rounds, until the deadline less what confirming will take."""

        def time_left() -> float:
            return deadline - self.session.now() - self.reserve()

        choices = self.kept | {n: self._presumed(n) for n in self.measured}
        asked = dict.fromkeys(choices, self.rule.max_rounds)
        asked |= {n: one.asked for n, one in self.measured.items()}
        while step := next_step(choices, asked, self.domain, self.rule):
            if time_left() <= 0.0:
                self.cut_short = True
                return
            slot = self.session.now() + time_left()
            self._first_pass(step.num_tokens, step.rounds, slot, slot)
            choices[step.num_tokens] = self._presumed(step.num_tokens)
            asked[step.num_tokens] = step.rounds

    def sketch_unmeasured(self, deadline: float) -> None:
        """A sketch of every bucket of the grid that had no time."""
        for num_tokens, one in self.measured.items():
            if not one.has_rounds and self.session.now() < deadline:
                self._first_pass(num_tokens, SKETCH_ROUNDS, deadline, deadline)

    def reserve(self) -> float:
        """Seconds that confirming every winner will take whose second pass has not begun."""
        return sum(self._cost(n) for n in self._unconfirmed())

    def choose_winners(self, seconds: float) -> None:
        """The winners to confirm next in so much time: as many as fit, first those that save most
        for what confirming them takes.

        Partial confirmation gives no verdict.
        """
        winners = sorted(self._unconfirmed(), key=lambda n: -self._saved_us(n) / self._cost(n))
        costs = accumulate(map(self._cost, winners))
        fits = [n for n, cost in zip(winners, costs, strict=True) if cost <= seconds]
        self._winners = fits or winners[:1]

    def confirm(self, rounds: int, deadline: float) -> None:
        """The second pass of the chosen winners, brought to so many rounds."""
        for num_tokens in self._winners:
            self.session.report_progress(self.situation, num_tokens)
            for fill in self.measured[num_tokens].fills:
                confirm(
                    *(self.bench, fill, rounds, num_tokens),
                    spent=lambda: self.session.now() > deadline,
                )

    def buckets(self) -> tuple[Bucket, ...]:
        """The evidence, by token count, with everything known by now about each candidate.

        A refinement that was cut short is left out: its neighbours were measured better. An
        earlier bucket stays where measuring again did not settle it.
        """
        grid = {*self.grid, *self.earlier}
        found = dict(self.earlier)
        for num_tokens in self.measured:
            bucket = self._bucket(num_tokens)
            choice = self._choose(bucket)
            known = found.get(num_tokens)
            if choice.settled or choice.candidate != choice.baseline:
                found[num_tokens] = bucket
            elif num_tokens in grid:
                in_force = known is not None and self._choose(known).candidate != choice.baseline
                found[num_tokens] = known if known is not None and in_force else bucket
        return tuple(found[n] for n in sorted(found))

    def _first_pass(self, num_tokens: int, rounds: int, slot: float, deadline: float) -> None:
        """The first pass of one bucket, brought to `rounds` rounds at each fill.

        A bucket begun before the deadline gets the rounds of a verdict, and more until its slot
        ends: fewer rounds give no verdict.
        """
        self.session.report_progress(self.situation, num_tokens)
        self._check(num_tokens)
        one = self.measured.setdefault(num_tokens, self._fresh(num_tokens))
        one.asked = max(one.asked, rounds)
        begun = self.session.now()
        if begun >= deadline:
            return
        for fill in one.fills:
            asked = count()

            def spent(asked: "count[int]" = asked, fill: FillRounds = fill) -> bool:
                few = next(asked) + fill.rounds <= self.rule.min_rounds
                return not few and self.session.now() > slot

            measure(self.bench, fill, rounds, num_tokens, spent)
        one.seconds += self.session.now() - begun
        one.presumed = None

    def _check(self, num_tokens: int) -> None:
        for fraction in self.session.inputs.fills(self.situation, num_tokens):
            inputs = self.session.inputs.train(self.situation, num_tokens, fraction)
            self.session.check(inputs, num_tokens)

    def _fresh(self, num_tokens: int) -> _Measured:
        names = [candidate.name for candidate in self.session.kernel.candidates]
        inputs = self.session.inputs
        return _Measured(
            [
                FillRounds(
                    fraction,
                    inputs.train(self.situation, num_tokens, fraction),
                    {name: Times() for name in names},
                )
                for fraction in inputs.fills(self.situation, num_tokens)
            ]
        )

    def _bucket(self, num_tokens: int) -> Bucket:
        return Bucket(num_tokens, tuple(f.results() for f in self.measured[num_tokens].fills))

    def _choose(self, bucket: Bucket, *, presume_confirmed: bool = False) -> Choice:
        excluded = self.session.exclusions.by_name
        return choose(bucket, self.rule, excluded, presume_confirmed=presume_confirmed)

    def _presumed(self, num_tokens: int) -> Choice:
        """The choice of the first pass; judged again where rounds or exclusions came since."""
        one, exclusions = self.measured[num_tokens], len(self.session.exclusions.by_name)
        if one.presumed is None or one.exclusions != exclusions:
            one.presumed = self._choose(self._bucket(num_tokens), presume_confirmed=True)
            one.exclusions = exclusions
        return one.presumed

    def _unconfirmed(self) -> list[int]:
        """Buckets that have a winner whose second pass has not begun."""
        return [n for n, one in self.measured.items() if not one.is_confirming and self._won(n)]

    def _won(self, num_tokens: int) -> list[tuple[Verdict, Judgement]]:
        """The winner of each fill that has one, by the first pass."""
        return [
            (verdict, verdict.judgement(verdict.candidate))
            for verdict in self._presumed(num_tokens).device
            if verdict.faster
        ]

    def _cost(self, num_tokens: int) -> float:
        """Seconds that confirming this winner will take."""
        one = self.measured[num_tokens]
        needed = max(rounds_to_confirm(won.gain_low or 0.0) for _, won in self._won(num_tokens))
        rounds = sum(fill.rounds for fill in one.fills) / len(one.fills)
        return max(CONFIRM_COST * one.seconds * needed / max(rounds, 1.0), LEAST_S)

    def _saved_us(self, num_tokens: int) -> float:
        return max(
            (winner.gain or 0.0) * (verdict.baseline.median_us or 0.0)
            for verdict, winner in self._won(num_tokens)
        )


def _powers(coverage: Coverage, situation: Situation) -> tuple[int, ...]:
    """The counts to begin with: powers of two, and the last count below `busy_from`.

    But powers of four for eager calls of as few tokens as graphs hold: those are rare. Refining
    adds counts there where the winner changes.
    """
    powers = [1 << k for k in range(coverage.max_tokens.bit_length())]
    if situation is Situation.GRAPH:
        return tuple(powers)
    if coverage.captured:
        powers = [n for n in powers if n >= coverage.busy_from or n.bit_length() % 2]
    edge = coverage.busy_from - 1
    if 1 <= edge <= coverage.max_tokens and edge in coverage.counts(Situation.EAGER):
        powers.insert(bisect_left(powers, edge), edge)
    return tuple(dict.fromkeys(powers))


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
            # It serves the counts above the bucket below; 1 is added so that the first has a width.
            width = math.log((num_tokens + 1) / (below + 1))
            saves = DOUBT_WEIGHT * promise * width
            yield Step(num_tokens, rounds, rounds - asked[num_tokens], saves)


def _promise(verdict: Verdict, rule: Rule) -> float:
    """What settling this verdict is expected to win: the time ratio less 1 that an unsettled
    candidate has over the one chosen; 0.0 where none may well gain enough to matter."""
    if verdict.settled:
        return 0.0
    chosen = verdict.judgement(verdict.candidate).gain or 0.0
    return max(
        (
            _expected_gain(judgement.gain - chosen, judgement.error) / (1.0 - judgement.gain)
            for judgement in open_judgements(verdict, rule)
            if judgement.gain is not None
        ),
        default=0.0,
    )


def _expected_gain(gain: float, error: float) -> float:
    """The mean of what is above 0 of a normal variable, or of a gain that is sure."""
    if error <= 0.0:
        return gain
    z = gain / error
    density = math.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    return gain * 0.5 * math.erfc(-z / math.sqrt(2.0)) + error * density
