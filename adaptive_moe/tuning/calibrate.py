"""Coverage -> rounds -> evidence -> table: the whole of one shape's calibration.

    check    every candidate's output on everything that will be timed, outside the clock (kernels
             compile)
    sketch   a few rounds of the first buckets of each situation
    refine   whatever may still save most for its rounds: new buckets, more rounds
    confirm  a second pass, later: what would replace the baseline is measured again

Nothing here knows which kernel sorts, which clock times or who asked.
"""

import logging
import time
import traceback
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property, partial
from itertools import accumulate, count

import torch
from torch import Tensor

from adaptive_moe.kernels import POLICIES, Candidate, SortKernel
from adaptive_moe.kernels.contract import SortingInputs
from adaptive_moe.kernels.environment import describe_environment
from adaptive_moe.policy.buckets import first_buckets
from adaptive_moe.policy.coverage import Coverage, Situation
from adaptive_moe.policy.evidence import SCHEMA, Bucket, Evidence, Rule
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.policy.verdict import (
    LOT,
    LOTS,
    Choice,
    Judgement,
    Verdict,
    choose,
    rounds_to_confirm,
)
from adaptive_moe.tuning.clocks import Clock, Neutral, clock_for
from adaptive_moe.tuning.explore import SKETCH_ROUNDS, next_step
from adaptive_moe.tuning.inputs import Inputs
from adaptive_moe.tuning.rounds import (
    Bench,
    CalibrationFailedError,
    Exclusions,
    FillRounds,
    Times,
    check,
    confirm,
    measure,
)

__all__ = [
    "BudgetError",
    "CalibrationFailedError",
    "CalibrationRefusedError",
    "Plan",
    "calibrate",
]

logger = logging.getLogger("adaptive_moe")

CAPTURING = "the current stream is being captured into a graph: calibrate before or after capture"

# How refining shares the budget; what one situation leaves, the next one has. Most calls are
# replayed.
WEIGHT = {Situation.GRAPH: 2.0, Situation.EAGER: 1.0}
# What is kept back to confirm a bucket, over as many rounds of its first pass as that takes: fewer
# candidates, but prepared anew for each lot.
CONFIRM_COST = 1.2

ClockFactory = Callable[[Situation, torch.device], Clock]
Progress = Callable[[int, int, str], None]


class CalibrationRefusedError(RuntimeError):
    """Calibrating is not possible now; the text says why. Nothing was run."""


class BudgetError(ValueError):
    """The budget did not cover one round of any bucket."""


@dataclass(frozen=True)
class Plan:
    """How to calibrate; what for is the Coverage.

    first     token counts to begin with, empty for powers of two
    budget_s  wall-clock seconds for measuring the policies, checks and compilation excluded; where
              other sorts compete, too, there is as much more as there are more to measure
    """

    first: tuple[int, ...] = ()
    budget_s: float = 1.5
    rule: Rule = field(default_factory=Rule)

    def __post_init__(self) -> None:
        if not self.budget_s > 0:
            raise ValueError(f"budget_s={self.budget_s!r} is not accepted: give more than 0")

    def seconds(self, candidates: int) -> float:
        """The budget for so many candidates, the baseline among them."""
        return self.budget_s * max(1.0, (candidates - 1) / (len(POLICIES) - 1))


def calibrate(
    kernel: SortKernel,
    coverage: Coverage,
    plan: Plan | None = None,
    *,
    expert_mask: Tensor | None = None,
    earlier: Evidence | None = None,
    clock_factory: ClockFactory | None = None,
    now: Callable[[], float] = time.monotonic,
    progress: Progress = lambda done, total, what: None,
) -> PolicyTable:
    """Measure what `coverage` names on `kernel`, and decide.

    Args:
        kernel: the sort, and the candidates that may take the baseline's place.
        coverage: the token counts, and in which situations they come.
        plan: how to measure; by default 1.5 s by the default rule.
        expert_mask: the caller's own, int32 of [num_experts]; by default the shape's.
        earlier: evidence of the same kernel and shape. What it settled is not measured again, and
            the winners it has in force stay unless measuring settles otherwise.
        clock_factory: the clock of a situation on a device.
        now: seconds, for the budget.
        progress: called with buckets measured, buckets expected, and what comes next.

    Returns:
        The table with all its evidence. A candidate that fails, or returns something else than the
        baseline, only loses its candidacy.

    Raises:
        CalibrationRefusedError: the current stream is being captured.
        CalibrationFailedError: the baseline fails.
        BudgetError: not even one round fits.
    """
    plan = plan or Plan()
    coverage = coverage.on(kernel.device.type)
    on_gpu = kernel.device.type != "cpu"
    guard: AbstractContextManager[object] = nullcontext()
    if on_gpu:
        if torch.cuda.is_current_stream_capturing():
            raise CalibrationRefusedError(CAPTURING)
        # One process may have layers on several GPUs: each is measured where it runs.
        guard = torch.cuda.device(kernel.device)
    begun = now()
    usable = earlier if earlier and _same_question(earlier, kernel, plan.rule) else None
    try:
        with guard:
            run = _Run(kernel, coverage, plan, expert_mask, usable, clock_factory, now, progress)
            buckets = run.measure()
        exclusions = tuple(run.exclusions.by_name.values())
        del run
    except Exception as error:
        # Their frames hold tensors.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        if on_gpu:
            _give_memory_back()
    return PolicyTable(
        Evidence(
            schema=SCHEMA,
            coverage=coverage,
            kernel=kernel.name,
            candidates=tuple(candidate.name for candidate in kernel.candidates),
            environment=describe_environment(kernel.device),
            rule=plan.rule,
            budget_s=plan.budget_s,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            seconds=round(now() - begun, 3),
            starts=usable.starts + 1 if usable else 1,
            excluded=exclusions,
            graph=buckets[Situation.GRAPH],
            eager=buckets[Situation.EAGER],
        )
    )


class _Run:
    """What all of one calibration shares, and its two sections."""

    def __init__(
        self,
        kernel: SortKernel,
        coverage: Coverage,
        plan: Plan,
        expert_mask: Tensor | None,
        earlier: Evidence | None,
        clock_factory: ClockFactory | None,
        now: Callable[[], float],
        progress: Progress,
    ) -> None:
        self.kernel, self.coverage, self.plan, self.earlier = kernel, coverage, plan, earlier
        self.inputs = Inputs(coverage, expert_mask, kernel.device)
        self.exclusions = Exclusions(coverage.baseline, coverage.describe())
        if earlier is not None:
            # What was wrong stays wrong for this key; what raised may have passed.
            wrong = {one.candidate: one for one in earlier.excluded if one.wrong}
            self.exclusions.by_name.update(wrong)
        self.clock_factory = clock_factory or partial(clock_for, neutral=Neutral(kernel.device))
        self.checking_s = 0.0
        self._now, self._progress = now, progress
        self._checked: set[int] = set()
        self._done = 0
        self.sections = [_Section(self, s) for s in Situation if coverage.counts(s)]

    def now(self) -> float:
        """Seconds, without those of checking: no budget is spent on it."""
        return self._now() - self.checking_s

    def check(self, inputs: Sequence[SortingInputs], num_tokens: int) -> None:
        """Compare every candidate with the baseline on each of these that is new."""
        begun = self._now()
        # A calibration keeps its inputs, so that an id stands for one of them.
        new = [one for one in inputs if id(one) not in self._checked]
        self._checked.update(map(id, new))
        check(self.kernel.candidates, new, num_tokens, self.exclusions)
        self.checking_s += self._now() - begun

    def tell(self, situation: Situation, num_tokens: int) -> None:
        """Progress: a bucket that was not expected adds itself to the total."""
        self._done += 1
        expected = sum(len(section.grid) for section in self.sections)
        tokens = "token" if num_tokens == 1 else "tokens"
        what = f"{num_tokens} {tokens}, {situation.value}"
        self._progress(self._done, max(expected, self._done), what)

    def measure(self) -> dict[Situation, tuple[Bucket, ...]]:
        """Both passes over both situations; BudgetError where no round fitted."""
        for section in self.sections:
            section.check_grid()
        deadline = self.now() + self.plan.seconds(len(self.kernel.candidates))
        ahead = sum(len(section.grid) for section in self.sections)
        for section in self.sections:
            ahead = section.sketch(deadline, ahead)
        for place, section in enumerate(self.sections):
            free = deadline - self.now() - self.reserve()
            weights = [WEIGHT[one.situation] for one in self.sections[place:]]
            section.refine(self.now() + section.reserve() + free * weights[0] / sum(weights))
        self._confirm(deadline)
        # Estimates kept back more than it took: what that leaves goes to counts that had no turn.
        for section in self.sections:
            section.sketch_unmeasured(deadline)
        self._confirm(deadline)
        found = {section.situation: section.buckets() for section in self.sections}
        if not any(section.was_measured for section in self.sections):
            raise BudgetError(
                f"budget {self.plan.budget_s:g} s is too small for one round of any bucket of "
                f"{self.coverage.describe()}: give a larger budget"
            )
        return {situation: found.get(situation, ()) for situation in Situation}

    def reserve(self) -> float:
        """Seconds that confirming every winner will take whose second pass has not begun."""
        return sum(section.reserve() for section in self.sections)

    def _confirm(self, deadline: float) -> None:
        """The second pass over both situations, of as many winners as there is time for."""
        while self.now() < deadline and (needed := self.reserve()):
            free = deadline - self.now()
            for section in self.sections:
                section.choose_winners(free * section.reserve() / needed)
            # One lot of each winner, and again, so that the lots lie apart; then more where needed.
            most = self.plan.rule.max_rounds
            for rounds in (*(LOT * lot for lot in range(1, LOTS + 1)), max(most, LOT * LOTS)):
                for section in self.sections:
                    section.confirm(rounds, deadline)


@dataclass
class _Measured:
    """One bucket: its fills, the seconds of its first pass, and the rounds that were asked for."""

    fills: list[FillRounds]
    seconds: float = 0.0
    asked: int = 0

    @property
    def has_rounds(self) -> bool:
        return all(fill.rounds for fill in self.fills)

    @property
    def is_confirming(self) -> bool:
        return any(fill.second for fill in self.fills)


class _Section:
    """One situation of a run: its buckets, explored in one pass and confirmed in a second."""

    def __init__(self, run: _Run, situation: Situation) -> None:
        self.run, self.situation, self.rule = run, situation, run.plan.rule
        self.domain = run.coverage.counts(situation)
        self.measured: dict[int, _Measured] = {}
        self._winners: list[int] = []
        earlier = run.earlier.buckets(situation) if run.earlier else ()
        self.earlier = {
            bucket.num_tokens: bucket
            for bucket in earlier
            if bucket.num_tokens in self.domain
            and tuple(fill.fraction for fill in bucket.fills)
            == run.inputs.fills(situation, bucket.num_tokens)
        }

    @cached_property
    def bench(self) -> Bench:
        """Made when first needed: a clock takes memory, and all may be known already."""
        kernel, make = self.run.kernel, self.run.clock_factory
        candidates: dict[str, Candidate] = {c.name: c for c in kernel.candidates}
        clock = make(self.situation, kernel.device)
        return Bench(candidates, clock, self.rule, self.run.exclusions)

    @property
    def kept(self) -> dict[int, Choice]:
        """The earlier buckets that need no more rounds."""
        found = {n: self._choose(bucket) for n, bucket in self.earlier.items()}
        return {n: choice for n, choice in found.items() if choice.settled}

    @property
    def grid(self) -> list[int]:
        """The counts measured in any case."""
        wanted = self.run.plan.first or _powers(self.run.coverage, self.situation)
        kept = self.kept
        return [n for n in first_buckets(self.domain, wanted) if n not in kept]

    @property
    def was_measured(self) -> bool:
        """Did any bucket get a round, or need none, as where only the baseline is left?"""
        return bool(self.kept) or any(
            one.has_rounds or self._presumed(n).settled for n, one in self.measured.items()
        )

    def check_grid(self) -> None:
        """Check the grid before any clock runs: a candidate wrong at its last count is out."""
        for num_tokens in self.grid:
            self._check(num_tokens)

    def sketch(self, deadline: float, ahead: int) -> int:
        """A few rounds at each count of the grid, as far as the winners among them can be confirmed
        as well: what is settled stays, and the next start continues with the rest.

        ahead: grid counts of all sections still to come; the result is what is left of them.
        """
        for num_tokens in self.grid:
            # A noisy bucket may take its share and as much again, never what later ones need.
            ends = deadline - self.run.reserve()
            slot = self.run.now() + 2.0 * (ends - self.run.now()) / (ahead + 1)
            ahead -= 1
            self._first_pass(num_tokens, SKETCH_ROUNDS, slot, ends)
        return ahead

    def refine(self, deadline: float) -> None:
        """New buckets and more rounds, until the deadline less what confirming will take."""

        def time_left() -> float:
            return deadline - self.run.now() - self.reserve()

        choices = self.kept | {n: self._presumed(n) for n in self.measured}
        while time_left() > 0.0:
            asked = {n: one.asked for n, one in self.measured.items()}
            for num_tokens in choices:
                asked.setdefault(num_tokens, self.rule.max_rounds)
            step = next_step(choices, asked, self.domain, self.rule)
            if step is None:
                return
            slot = self.run.now() + time_left()
            self._first_pass(step.num_tokens, step.rounds, slot, slot)
            choices[step.num_tokens] = self._presumed(step.num_tokens)

    def sketch_unmeasured(self, deadline: float) -> None:
        """A sketch of every bucket of the grid that had no time."""
        for num_tokens, one in self.measured.items():
            if not one.has_rounds and self.run.now() < deadline:
                self._first_pass(num_tokens, SKETCH_ROUNDS, deadline, deadline)

    def reserve(self) -> float:
        """The same for the winners of this situation."""
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
            self.run.tell(self.situation, num_tokens)
            for fill in self.measured[num_tokens].fills:
                confirm(
                    *(self.bench, fill, rounds, num_tokens),
                    spent=lambda: self.run.now() > deadline,
                )

    def buckets(self) -> tuple[Bucket, ...]:
        """The evidence, by token count, with everything known by now about each candidate.

        A refinement that was cut short is left out: its neighbours know more. An earlier bucket
        stays where measuring again did not settle it.
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
        ends: fewer would tell nothing.
        """
        self.run.tell(self.situation, num_tokens)
        self._check(num_tokens)
        one = self.measured.setdefault(num_tokens, self._fresh(num_tokens))
        one.asked = max(one.asked, rounds)
        begun = self.run.now()
        if begun >= deadline:
            return
        for fill in one.fills:
            asked = count()

            def spent(asked: "count[int]" = asked, fill: FillRounds = fill) -> bool:
                few = next(asked) + fill.rounds <= self.rule.min_rounds
                return not few and self.run.now() > slot

            measure(self.bench, fill, rounds, num_tokens, spent)
        one.seconds += self.run.now() - begun

    def _check(self, num_tokens: int) -> None:
        for fraction in self.run.inputs.fills(self.situation, num_tokens):
            inputs = self.run.inputs.train(self.situation, num_tokens, fraction)
            self.run.check(inputs, num_tokens)

    def _fresh(self, num_tokens: int) -> _Measured:
        names = [candidate.name for candidate in self.run.kernel.candidates]
        inputs = self.run.inputs
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
        excluded = self.run.exclusions.by_name
        return choose(bucket, self.rule, excluded, presume_confirmed=presume_confirmed)

    def _presumed(self, num_tokens: int) -> Choice:
        return self._choose(self._bucket(num_tokens), presume_confirmed=True)

    def _unconfirmed(self) -> list[int]:
        """Buckets that have a winner whose second pass has not begun."""
        return [
            n for n, one in self.measured.items() if not one.is_confirming and self._won(n)
        ]

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
        return CONFIRM_COST * one.seconds * needed / max(rounds, 1.0)

    def _saved_us(self, num_tokens: int) -> float:
        return max(
            (winner.gain or 0.0) * (verdict.baseline.median_us or 0.0)
            for verdict, winner in self._won(num_tokens)
        )


def _powers(coverage: Coverage, situation: Situation) -> tuple[int, ...]:
    """The counts to begin with: powers of two, and the last count below `busy_from`.

    But powers of four for eager calls of as few tokens as graphs hold: those are rare, and
    exploring still goes where there is something.
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


def _same_question(earlier: Evidence, kernel: SortKernel, rule: Rule) -> bool:
    names = tuple(candidate.name for candidate in kernel.candidates)
    return (earlier.kernel, earlier.candidates, earlier.rule) == (kernel.name, names, rule)


def _give_memory_back() -> None:
    """The allocator's unused blocks. On a lost device this raises as well: what ended the
    calibration is what the caller must hear."""
    try:
        torch.cuda.empty_cache()
    except Exception as error:
        logger.debug("the allocator's cache was not emptied: %r", error)
