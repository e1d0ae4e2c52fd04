"""One situation of one calibration: its buckets, explored in one pass and confirmed in a second.

The second pass comes after the first of every situation and prepares everything anew: it shares
neither the moment nor a captured graph with the first.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, count

from adaptive_moe.policy.buckets import bucket_of, first_buckets
from adaptive_moe.policy.decision import Result, Rule, Samples, Standing, Verdict, confirm, decide
from adaptive_moe.policy.evidence import Bucket, Fill
from adaptive_moe.policy.losses import combine, loss_us
from adaptive_moe.policy.situation import Situation
from adaptive_moe.tuning.asked import APART, unasked
from adaptive_moe.tuning.clocks import Clock
from adaptive_moe.tuning.explore import SKETCH_ROUNDS, explore
from adaptive_moe.tuning.inputs import Inputs
from adaptive_moe.tuning.race import LOT, LOTS, measure, measure_again, second
from adaptive_moe.tuning.rightness import Exclusion, Rightness

logger = logging.getLogger("adaptive_moe")

# What is kept back to confirm a bucket, over what its first pass took. It takes 1.8 times as long
# (fewer candidates, but prepared for each lot, and thrice the rounds); but who is cut short is not
# confirmed at all, while what is left over goes to others.
CONFIRM_COST = 2.6


@dataclass
class Measured:
    """What was sampled in one bucket: both passes, each by fill.

    seconds: what the first pass took. saves: us a call that its winner saves, 0.0 without one.
    """

    first: list[list[Samples]]
    second: list[list[Samples]] = field(default_factory=list)
    seconds: float = 0.0
    saves: float = 0.0

    @property
    def rounds(self) -> int:
        """The baseline's, of the first pass; as many as the fill with the fewest has."""
        return min(len(samples[0].round_us) for samples in self.first)


class Section:
    """Measures the counts of `domain` in one situation.

    wanted: counts to begin with. kept: settled buckets of an earlier calibration, which are not
    measured again. now: seconds, but for those of checking. told(num_tokens): called before each
    step. before: the situations explored before this one, which say whom not to ask (asked.py).
    """

    def __init__(
        self,
        situation: Situation,
        domain: Sequence[int],
        wanted: Sequence[int],
        kept: Mapping[int, Bucket],
        inputs: Inputs,
        rightness: Rightness,
        clock: Callable[[], Clock],
        rule: Rule,
        now: Callable[[], float],
        told: Callable[[int], None],
        before: Mapping[Situation, "Section"],
    ) -> None:
        self.situation, self.domain, self.wanted, self.kept = situation, domain, wanted, kept
        self.inputs, self.rightness, self.rule = inputs, rightness, rule
        self.now, self.told, self.before = now, told, dict(before)
        self.candidates = rightness.kernel.candidates
        self.measured: dict[int, Measured] = {}
        # The clock is made when first needed: it takes memory, and all may be known already.
        self.clock = cache(clock)
        self._buckets: list[int] = []
        self._to_confirm: list[int] = []

    @property
    def grid(self) -> list[int]:
        """The counts measured in any case."""
        return [n for n in first_buckets(self.domain, self.wanted) if n not in self.kept]

    def check(self) -> None:
        """Check the grid before any clock runs: who is wrong at its last count is out at all."""
        for num_tokens in self.grid:
            self.rightness.check(self.situation, num_tokens)

    def explore(self, deadline: float) -> None:
        """The first pass: the grid, looks between, and refinement, until the deadline less what
        confirming will take."""
        ahead = len(self.grid)

        def left() -> float:
            return deadline - self.now() - self.reserve()

        def measure_bucket(num_tokens: int, rounds: int) -> Bucket:
            nonlocal ahead
            ahead -= 1
            # A noisy bucket may take its share and as much again, never what later ones need. But
            # rounds too few for a verdict help nobody: each one begun gets as many as that takes.
            slot = self.now() + 2.0 * left() / (max(ahead, 0) + 2)
            asked = count()

            def spent() -> bool:
                few = next(asked) <= self.rule.min_rounds
                return left() <= 0.0 if few else self.now() > slot

            self._go_on(num_tokens, rounds if left() > 0.0 else 0, spent)
            return self._presumed(num_tokens)

        self._buckets = sorted(
            explore(
                *(self.domain, self.wanted, self.rule, measure_bucket),
                has_time=lambda: left() > 0.0,
                known=self.kept,
            )
        )

    def fill(self, deadline: float) -> None:
        """A sketch of every bucket that the first pass had no time for."""
        for num_tokens, bucket in self.measured.items():
            if not bucket.rounds and self.now() < deadline:
                self._go_on(num_tokens, SKETCH_ROUNDS, lambda: self.now() > deadline)

    def reserve(self) -> float:
        """Seconds that confirming will take every winner whose second pass has not begun."""
        return sum(CONFIRM_COST * self.measured[n].seconds for n in self._unconfirmed())

    def choose(self, seconds: float) -> None:
        """Who is to be confirmed next, in so much time: the winners that save most, as many as fit.

        A third of the way with everybody would confirm nobody.
        """
        winners = sorted(self._unconfirmed(), key=lambda n: -self.measured[n].saves)
        costs = accumulate(CONFIRM_COST * self.measured[n].seconds for n in winners)
        fits = [n for n, cost in zip(winners, costs, strict=True) if cost <= seconds]
        self._to_confirm = fits or winners[:1]

    def confirm(self, rounds: int, deadline: float) -> None:
        """The second pass of those chosen, brought to so many rounds."""
        for num_tokens in self._to_confirm:
            self._again(num_tokens, rounds, deadline)

    def _unconfirmed(self) -> list[int]:
        return [n for n, bucket in self.measured.items() if bucket.saves and not bucket.second]

    def around(self, num_tokens: int) -> list[list[Verdict]]:
        """The first pass's verdicts, by fill, of each bucket that an eager one of so many tokens
        shares counts with."""
        first, last = (bucket_of(n, self._buckets) for n in (num_tokens // APART + 1, num_tokens))
        return [
            list(self.kept[n].verdicts) if n in self.kept else self._first(n)
            for n in self._buckets[first : last + 1]
        ]

    def buckets(self) -> tuple[Bucket, ...]:
        """What the samples decide, with everything known by now about each candidate."""
        return tuple(
            self.kept[n] if n in self.kept else self._bucket(n, self._verdicts(n))
            for n in self._buckets
        )

    def _go_on(self, num_tokens: int, rounds: int, spent: Callable[[], bool]) -> None:
        """The first pass of one bucket, brought to `rounds` rounds, or until the time is spent."""
        self.told(num_tokens)
        fills = self.inputs.fills(self.situation, num_tokens)
        if num_tokens not in self.measured:
            fresh = self._fresh(num_tokens)
            if any(one.out is None for one in fresh[1:]):
                self.rightness.check(self.situation, num_tokens)
            self.measured[num_tokens] = Measured([fresh for _ in fills])
        bucket, begun = self.measured[num_tokens], self.now()
        bucket.first = [
            self._race(num_tokens, fill, samples, rounds, spent) if rounds else samples
            for fill, samples in zip(fills, bucket.first, strict=True)
        ]
        bucket.seconds += self.now() - begun
        verdicts = self._first(num_tokens)
        won = [v for v in verdicts if v.candidate != v.baseline.candidate]
        bucket.saves = max((loss_us(v, v.baseline.candidate) for v in won), default=0.0)

    def _fresh(self, num_tokens: int) -> list[Samples]:
        """Nothing measured yet; and nothing to measure of whom the other situations rule out."""
        out: dict[str, str] = {}
        if num_tokens < self.inputs.coverage.busy_from:
            graph, busy = (self.before.get(s) for s in (Situation.GRAPH, Situation.BUSY))
            captured = graph is not None and num_tokens <= graph.domain[-1]
            out = unasked(
                [candidate.name for candidate in self.candidates[1:]],
                graph.around(num_tokens) if graph and captured else None,
                busy.around(num_tokens) if busy else None,
            )
        return [
            Samples(c.name, (), Standing.SLOWER, out[c.name]) if c.name in out else Samples(c.name)
            for c in self.candidates
        ]

    def _again(self, num_tokens: int, rounds: int, deadline: float) -> None:
        """The second pass of one bucket: the baseline, and whoever was FASTER in the first."""
        self.told(num_tokens)
        bucket, first = self.measured[num_tokens], self._first(num_tokens)
        if not bucket.second:
            bucket.second = [
                [Samples(r.candidate) for r in (v.baseline, *_faster(v))] for v in first
            ]
        fills = self.inputs.fills(self.situation, num_tokens)
        for place, (fill, verdict) in enumerate(zip(fills, first, strict=True)):
            if len(bucket.second[place]) < 2:
                continue
            bucket.second[place] = measure_again(
                self.candidates,
                self.inputs.train(self.situation, num_tokens, fill),
                self.clock(),
                self.rightness.without_excluded(bucket.second[place]),
                self.rule,
                min(rounds, max(self.rule.max_rounds, LOT * LOTS)),
                spent=lambda: self.now() > deadline,
                call_us=min(r.median_us for r in verdict.results if r.median_us),
            )
            self._exclude_failed(bucket.second[place], num_tokens)

    def _race(
        self,
        num_tokens: int,
        fill: float,
        samples: Sequence[Samples],
        rounds: int,
        spent: Callable[[], bool],
    ) -> list[Samples]:
        shape = self.inputs.coverage.shape
        logger.debug("%s at %d tokens, %s", shape.describe(), num_tokens, self.situation.value)
        raced = measure(
            self.candidates,
            self.inputs.train(self.situation, num_tokens, fill),
            self.clock(),
            self.rightness.without_excluded(samples),
            self.rule,
            rounds,
            spent,
        )
        self._exclude_failed(raced, num_tokens)
        return raced

    def _exclude_failed(self, raced: Sequence[Samples], num_tokens: int) -> None:
        for one in raced:
            if one.out is Standing.FAILED:
                self.rightness.exclude(one.candidate, Exclusion(one.out, one.reason), num_tokens)

    def _first(self, num_tokens: int) -> list[Verdict]:
        """The verdicts of the first pass alone, by fill."""
        samples = self.measured[num_tokens].first
        return [decide(self.rightness.without_excluded(one), self.rule) for one in samples]

    def _verdicts(self, num_tokens: int) -> list[Verdict]:
        """The verdicts of both passes, by fill."""
        first, rule = self._first(num_tokens), second(self.rule)
        samples = self.measured[num_tokens].second
        again = [decide(self.rightness.without_excluded(one), rule) for one in samples]
        return [
            confirm(verdict, again[place] if again else None, self.rule)
            for place, verdict in enumerate(first)
        ]

    def _presumed(self, num_tokens: int) -> Bucket:
        """The bucket as it will be if its winner is confirmed: what exploring goes by."""
        return self._bucket(num_tokens, self._first(num_tokens))

    def _bucket(self, num_tokens: int, verdicts: Sequence[Verdict]) -> Bucket:
        fills = self.inputs.fills(self.situation, num_tokens)
        parts = tuple(Fill(f, verdict) for f, verdict in zip(fills, verdicts, strict=True))
        return Bucket(num_tokens, *combine(verdicts, self.rule.margin), parts)


def _faster(verdict: Verdict) -> list[Result]:
    return [r for r in verdict.results if r.standing is Standing.FASTER]
