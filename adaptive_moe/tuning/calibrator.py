"""Buckets x policies -> rounds -> verdicts -> table: the whole of one shape's calibration.

    check    every policy's output on every first bucket, outside the clock (kernels compile here)
    measure  the first buckets of each call mode, small to large, until settled or out of time
    refine   put buckets where neighbours differ, the costliest gap first, while time remains
    decide   once more, from all samples and with whatever was found wrong on the way left out

Nothing here knows which kernel sorts, which clock times or who asked.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone

import torch
from torch import Tensor

from adaptive_moe.kernels import SortKernel
from adaptive_moe.kernels.contract import SortingInputs
from adaptive_moe.policy.buckets import first_buckets
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.decision import Rule, Samples, Standing, decide
from adaptive_moe.policy.environment import describe_environment
from adaptive_moe.policy.evidence import SCHEMA, Bucket, Calibration, Fill
from adaptive_moe.policy.losses import combine
from adaptive_moe.policy.situation import Situation
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.tuning.clocks import TRAIN_LENGTH, Clock, clock_for
from adaptive_moe.tuning.explore import explore
from adaptive_moe.tuning.race import measure, short
from adaptive_moe.tuning.rightness import Exclusion, check_candidates
from adaptive_moe.tuning.routing import Routing, default_mask, fills, route, sorting_inputs

logger = logging.getLogger("adaptive_moe")

# A train rotates through these.
ROUTINGS = (Routing.UNIFORM, Routing.SKEWED)
INPUTS = max(TRAIN_LENGTH.values())

CAPTURING = "the current stream is being captured into a graph: calibrate before or after capture"

ClockFactory = Callable[[Situation, torch.device], Clock]
Progress = Callable[[int, int, str], None]


class CalibrationRefusedError(RuntimeError):
    """Calibrating is not possible now; the text says why. Nothing was run."""


class CalibrationFailedError(RuntimeError):
    """The baseline itself could not be measured, for a reason of the moment (out of memory, a
    device error), which the text gives. There is no table; the next start tries again."""


class BudgetError(ValueError):
    """The budget did not cover one round of any bucket."""


@dataclass(frozen=True)
class Plan:
    """How to calibrate; what for is the Coverage.

    first     token counts to begin with, empty for powers of two
    budget_s  wall-clock seconds for measuring, checks and compilation excluded
    """

    first: tuple[int, ...] = ()
    budget_s: float = 0.75
    rule: Rule = field(default_factory=Rule)

    def __post_init__(self) -> None:
        if not self.budget_s > 0:
            raise ValueError(f"budget_s={self.budget_s!r} is not accepted: give more than 0")


def calibrate(
    kernel: SortKernel,
    coverage: Coverage,
    plan: Plan | None = None,
    *,
    expert_mask: Tensor | None = None,
    earlier: Calibration | None = None,
    clock_factory: ClockFactory = clock_for,
    now: Callable[[], float] = time.monotonic,
    progress: Progress = lambda done, total, what: None,
) -> PolicyTable:
    """Measure what `coverage` names on `kernel` and return its table with all evidence.

    expert_mask is the caller's own where it has one; else the shape's default. earlier: evidence of
    the same kernel and shape; its settled buckets are not measured again. Raises
    CalibrationRefusedError while the current stream is being captured, CalibrationFailedError where
    the baseline fails, BudgetError where not even one round fits. Another candidate that fails or
    is wrong only loses its candidacy.
    """
    plan = plan or Plan()
    coverage = coverage.on(kernel.device.type)
    on_gpu = kernel.device.type != "cpu"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        logger.warning("not calibrating %s: %s", coverage.describe(), CAPTURING)
        raise CalibrationRefusedError(CAPTURING)
    begun = now()
    try:
        run = _Run(kernel, coverage, plan, expert_mask, earlier, now, progress)
        sections = [(s, found) for s in Situation if (found := coverage.counts(s))]
        run.check(sections)
        deadline = now() + plan.budget_s
        for left, (situation, domain) in zip(range(len(sections), 0, -1), sections, strict=True):
            clock = clock_factory(situation, kernel.device)
            # What one situation does not need, the next one has.
            run.section(situation, domain, clock, now() + (deadline - now()) / left)
        run.check_budget()
    except RuntimeError as error:
        if isinstance(error, CalibrationFailedError):
            raise
        raise CalibrationFailedError(short(error)) from error
    finally:
        if on_gpu:
            torch.cuda.empty_cache()
    return PolicyTable(
        Calibration(
            schema=SCHEMA,
            coverage=coverage,
            kernel=kernel.name,
            candidates=tuple(candidate.name for candidate in kernel.candidates),
            environment=describe_environment(kernel.device),
            rule=plan.rule,
            budget_s=plan.budget_s,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            seconds=round(now() - begun, 3),
            graph=run.buckets(Situation.GRAPH),
            busy=run.buckets(Situation.BUSY),
            idle=run.buckets(Situation.IDLE),
        )
    )


class _Run:
    """One calibration under way: its inputs, and which candidates are out."""

    def __init__(
        self,
        kernel: SortKernel,
        coverage: Coverage,
        plan: Plan,
        expert_mask: Tensor | None,
        earlier: Calibration | None,
        now: Callable[[], float],
        progress: Progress,
    ) -> None:
        shape = coverage.shape
        self.kernel, self.coverage, self.shape, self.plan = kernel, coverage, shape, plan
        self.now, self.progress = now, progress
        self.mask = default_mask(shape, kernel.device) if expert_mask is None else expert_mask
        self.excluded: dict[str, Exclusion] = {}
        largest = max(coverage.max_tokens, *coverage.captured, 0)
        self.tokens = [
            route(shape, largest, ROUTINGS[seed % len(ROUTINGS)], seed, kernel.device)
            for seed in range(INPUTS)
        ]
        self.checked: set[int] = set()
        self.surprised = False
        self.samples: dict[Situation, dict[int, list[list[Samples]]]] = {}
        self.kept = {s: _settled(earlier, s) for s in Situation}
        self.done = self.total = 0

    def check(self, sections: Sequence[tuple[Situation, Sequence[int]]]) -> None:
        """Check every candidate wherever measuring will begin, before any clock runs."""
        for _, domain in sections:
            grid = first_buckets(domain, self.plan.first)
            self.total += len(grid)
            for num_tokens in grid:
                self._check_once(num_tokens)

    def section(
        self, situation: Situation, domain: Sequence[int], clock: Clock, deadline: float
    ) -> None:
        """Measure one situation: every first bucket, then refinement, until the deadline."""
        ahead = len(first_buckets(domain, self.plan.first))
        samples = self.samples.setdefault(situation, {})

        def measure_bucket(num_tokens: int, rounds: int) -> Bucket:
            nonlocal ahead
            ahead -= 1
            if num_tokens in self.kept[situation]:
                return self.kept[situation][num_tokens]
            if num_tokens not in samples:
                self.total += ahead < 0
                self._check_once(num_tokens)
                samples[num_tokens] = [self._fresh() for _ in fills(self.shape)]
            # A noisy bucket may take its share and as much again, never what later ones need.
            slot = self.now() + 2.0 * (deadline - self.now()) / (max(ahead, 0) + 2)
            samples[num_tokens] = self._go_on(
                samples[num_tokens], num_tokens, situation, clock, rounds, slot
            )
            return self._bucket(num_tokens, samples[num_tokens])

        explore(
            domain,
            self.plan.first,
            self.plan.rule,
            measure_bucket,
            has_time=lambda: self.now() < deadline,
        )

    def buckets(self, situation: Situation) -> tuple[Bucket, ...]:
        """What the samples decide, with everything known by now about each candidate."""
        counts = self.coverage.counts(situation)
        found = {n: b for n, b in self.kept[situation].items() if n in counts}
        found |= {n: self._bucket(n, s) for n, s in self.samples.get(situation, {}).items()}
        return tuple(bucket for _, bucket in sorted(found.items()))

    def _bucket(self, num_tokens: int, samples: list[list[Samples]]) -> Bucket:
        parts = tuple(
            Fill(fraction, decide(self._without_excluded(one), self.plan.rule))
            for fraction, one in zip(fills(self.shape), samples, strict=True)
        )
        candidate, reason = combine([part.verdict for part in parts])
        return Bucket(num_tokens, candidate, reason, parts)

    def _fresh(self) -> list[Samples]:
        return [Samples(candidate.name) for candidate in self.kernel.candidates]

    def _without_excluded(self, samples: Sequence[Samples]) -> list[Samples]:
        """The samples with those excluded marked so, whatever they measured."""
        out = self.excluded
        return [
            replace(s, out=out[s.candidate].standing, reason=out[s.candidate].reason)
            if s.candidate in out
            else s
            for s in samples
        ]

    def _go_on(
        self,
        samples: Sequence[list[Samples]],
        num_tokens: int,
        situation: Situation,
        clock: Clock,
        rounds: int,
        deadline: float,
    ) -> list[list[Samples]]:
        """Those samples of one bucket, brought to `rounds` rounds as far as the deadline allows."""
        found = []
        logger.debug("%s at %d tokens, %s", self.shape.describe(), num_tokens, situation.value)
        for fraction, so_far in zip(fills(self.shape), samples, strict=True):
            train = [self._inputs(i, num_tokens, fraction) for i in range(TRAIN_LENGTH[situation])]
            raced = measure(
                self.kernel.candidates,
                train,
                clock,
                self._without_excluded(so_far),
                self.plan.rule,
                rounds,
                spent=lambda: self.now() > deadline,
            )
            for one in raced:
                if one.out is Standing.FAILED:
                    self._exclude(one.candidate, Exclusion(one.out, one.reason), num_tokens)
            found.append(raced)
        self.done += 1
        self.progress(min(self.done, self.total), self.total, f"{num_tokens} tokens")
        return found

    def _check_once(self, num_tokens: int) -> None:
        if num_tokens in self.checked:
            return
        self.checked.add(num_tokens)
        for fraction in fills(self.shape):
            inputs = self._inputs(num_tokens % INPUTS, num_tokens, fraction)
            found, surprises = check_candidates(
                self.kernel.candidates, inputs, self.shape.accumulate
            )
            for name, why in found.items():
                self._exclude(name, why, num_tokens)
            if surprises and not self.surprised:
                self.surprised = True
                logger.warning(
                    "%s is newer than this adaptive_moe knows: at %d tokens the baseline's %s; it "
                    "still defines what is right",
                    *(self.kernel.name, num_tokens, "; ".join(surprises)),
                )

    def _exclude(self, candidate: str, why: Exclusion, num_tokens: int) -> None:
        """From here on, and in every bucket measured before, it is no candidate."""
        if candidate == self.kernel.baseline.name:
            raise CalibrationFailedError(f"at {num_tokens} tokens {candidate} {why.reason}")
        if candidate not in self.excluded:
            self.excluded[candidate] = why
            shape = self.shape.describe()
            logger.warning(
                "%s is out for %s: at %d tokens it %s", candidate, shape, num_tokens, why.reason
            )

    def check_budget(self) -> None:
        """Raise BudgetError where no bucket was settled or got a round."""
        buckets = [bucket for situation in Situation for bucket in self.buckets(situation)]
        verdicts = [fill.verdict for bucket in buckets for fill in bucket.fills]
        if not any(verdict.rounds or verdict.settled for verdict in verdicts):
            raise BudgetError(
                f"budget {self.plan.budget_s:g} s is too small for one round of any bucket of "
                f"{self.shape.describe()}: give a larger budget"
            )

    def _inputs(self, index: int, num_tokens: int, fraction: float) -> SortingInputs:
        return sorting_inputs(self.shape, self.tokens[index], num_tokens, self.mask, fraction)


def _settled(earlier: Calibration | None, situation: Situation) -> dict[int, Bucket]:
    """The earlier buckets of that situation that need no more rounds."""
    return {
        bucket.num_tokens: bucket
        for bucket in (earlier.section(situation) if earlier else ())
        if all(verdict.settled for verdict in bucket.verdicts)
    }
