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
from dataclasses import dataclass, field
from datetime import datetime, timezone

import torch
from torch import Tensor

from adaptive_moe.kernels import SortKernel
from adaptive_moe.kernels.contract import SortingInputs
from adaptive_moe.policy.buckets import check_domain, first_buckets
from adaptive_moe.policy.decision import Candidate, Rule, Standing, combine, decide
from adaptive_moe.policy.environment import describe_environment
from adaptive_moe.policy.table import SCHEMA, Bucket, Calibration, Fill, PolicyTable
from adaptive_moe.settings import MAX_TOKENS
from adaptive_moe.shape import SortingShape
from adaptive_moe.tuning.clocks import CallMode, Clock, clock_for
from adaptive_moe.tuning.explore import explore
from adaptive_moe.tuning.race import Exclusion, apply_exclusions, check_policies, measure
from adaptive_moe.tuning.routing import Routing, default_mask, fills, route, sorting_inputs

logger = logging.getLogger("adaptive_moe")

# A train rotates through these.
ROUTINGS = (Routing.UNIFORM, Routing.SKEWED)
INPUTS = max(mode.train_length for mode in CallMode)

CAPTURING = "the current stream is being captured into a graph: calibrate before or after capture"

Samples = list[Candidate]
ClockFactory = Callable[[CallMode, torch.device], Clock]
Progress = Callable[[int, int, str], None]


class CalibrationRefusedError(RuntimeError):
    """Calibrating is not possible now; the text says why. Nothing was run."""


class BudgetError(ValueError):
    """The budget did not cover one round of any bucket."""


@dataclass(frozen=True)
class Plan:
    """What to calibrate for.

    max_tokens     largest batch of an eager call, in tokens
    capture_sizes  token counts an engine captures into graphs; empty: no graph array of its own
    first          token counts to begin with, empty for powers of two
    budget_s       wall-clock seconds for measuring, checks and compilation excluded
    """

    max_tokens: int
    capture_sizes: tuple[int, ...] = ()
    first: tuple[int, ...] = ()
    budget_s: float = 0.75
    rule: Rule = field(default_factory=Rule)

    def __post_init__(self) -> None:
        check_domain("capture_sizes", self.capture_sizes)
        if not 1 <= self.max_tokens <= MAX_TOKENS:
            raise ValueError(
                f"max_tokens={self.max_tokens!r} is not accepted: give 1 to {MAX_TOKENS}"
            )
        if not self.budget_s > 0:
            raise ValueError(f"budget_s={self.budget_s!r} is not accepted: give more than 0")


def calibrate(
    kernel: SortKernel,
    shape: SortingShape,
    plan: Plan,
    *,
    expert_mask: Tensor | None = None,
    clock_factory: ClockFactory = clock_for,
    now: Callable[[], float] = time.monotonic,
    progress: Progress = lambda done, total, what: None,
) -> PolicyTable:
    """Measure `shape` on `kernel` and return its table with all evidence.

    expert_mask is the caller's own where it has one; else the shape's default. Raises
    CalibrationRefusedError while the current stream is being captured, BudgetError where not even
    one round fits. A policy that fails or is wrong only loses its candidacy.
    """
    on_gpu = kernel.device.type != "cpu"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        logger.warning("not calibrating %s: %s", shape.describe(), CAPTURING)
        raise CalibrationRefusedError(CAPTURING)
    begun = now()
    run = _Run(kernel, shape, plan, expert_mask, now, progress)
    graph_sizes: Sequence[int] = plan.capture_sizes if on_gpu else ()
    sections: list[tuple[CallMode, Sequence[int]]] = []
    if graph_sizes:
        sections.append((CallMode.GRAPH, check_domain("capture_sizes", graph_sizes)))
    sections.append((CallMode.EAGER, range(1, plan.max_tokens + 1)))
    try:
        run.check(sections)
        deadline = now() + plan.budget_s
        for left, (mode, domain) in zip(range(len(sections), 0, -1), sections, strict=True):
            clock = clock_factory(mode, kernel.device)
            # What one mode does not need, the next one has.
            run.section(mode, domain, clock, now() + (deadline - now()) / left)
        run.check_budget()
    finally:
        run.tokens.clear()
        if on_gpu:
            torch.cuda.empty_cache()
    return PolicyTable(
        Calibration(
            schema=SCHEMA,
            shape=shape,
            kernel=kernel.name,
            policies=kernel.policies,
            environment=describe_environment(kernel.device),
            rule=plan.rule,
            max_tokens=plan.max_tokens,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            seconds=round(now() - begun, 3),
            eager=run.buckets(CallMode.EAGER),
            graph=run.buckets(CallMode.GRAPH),
        )
    )


class _Run:
    """One calibration under way: its inputs, and which policies are out for this shape."""

    def __init__(
        self,
        kernel: SortKernel,
        shape: SortingShape,
        plan: Plan,
        expert_mask: Tensor | None,
        now: Callable[[], float],
        progress: Progress,
    ) -> None:
        self.kernel, self.shape, self.plan = kernel, shape, plan
        self.now, self.progress = now, progress
        self.mask = default_mask(shape, kernel.device) if expert_mask is None else expert_mask
        self.excluded: dict[int, Exclusion] = {}
        largest = max(plan.max_tokens, *plan.capture_sizes, 0)
        self.tokens = [
            route(shape, largest, ROUTINGS[seed % len(ROUTINGS)], seed, kernel.device)
            for seed in range(INPUTS)
        ]
        self.checked: set[int] = set()
        self.samples: dict[CallMode, dict[int, list[Samples]]] = {}
        self.done = self.total = 0

    def check(self, sections: Sequence[tuple[CallMode, Sequence[int]]]) -> None:
        """Check every policy wherever measuring will begin, before any clock runs."""
        for _, domain in sections:
            grid = first_buckets(domain, self.plan.first)
            self.total += len(grid)
            for num_tokens in grid:
                self._check_once(num_tokens)

    def section(self, mode: CallMode, domain: Sequence[int], clock: Clock, deadline: float) -> None:
        """Measure one call mode: every first bucket, then refinement, until the deadline."""
        ahead = len(first_buckets(domain, self.plan.first))
        samples = self.samples.setdefault(mode, {})

        def measure_bucket(num_tokens: int, rounds: int) -> Bucket:
            nonlocal ahead
            ahead -= 1
            if num_tokens not in samples:
                self.total += ahead < 0
                self._check_once(num_tokens)
                samples[num_tokens] = [self._fresh() for _ in fills(self.shape)]
            # A noisy bucket may take its share and as much again, never what later ones need.
            slot = self.now() + 2.0 * (deadline - self.now()) / (max(ahead, 0) + 2)
            samples[num_tokens] = self._go_on(
                samples[num_tokens], num_tokens, mode, clock, rounds, slot
            )
            return self._bucket(num_tokens, samples[num_tokens])

        explore(
            domain,
            self.plan.first,
            self.plan.rule,
            measure_bucket,
            has_time=lambda: self.now() < deadline,
        )

    def buckets(self, mode: CallMode) -> tuple[Bucket, ...]:
        """What the samples decide, with everything known by now about each policy."""
        return tuple(
            self._bucket(n, found) for n, found in sorted(self.samples.get(mode, {}).items())
        )

    def _bucket(self, num_tokens: int, samples: list[Samples]) -> Bucket:
        parts = tuple(
            Fill(fraction, decide(apply_exclusions(one, self.excluded), self.plan.rule))
            for fraction, one in zip(fills(self.shape), samples, strict=True)
        )
        policy, reason = combine([part.verdict for part in parts])
        return Bucket(num_tokens, policy, reason, parts)

    def _fresh(self) -> Samples:
        return [Candidate(policy) for policy in self.kernel.policies]

    def _go_on(
        self,
        samples: Sequence[Samples],
        num_tokens: int,
        mode: CallMode,
        clock: Clock,
        rounds: int,
        deadline: float,
    ) -> list[Samples]:
        """Those samples of one bucket, brought to `rounds` rounds as far as the deadline allows."""
        found = []
        logger.debug("%s at %d tokens, %s calls", self.shape.describe(), num_tokens, mode.value)
        for fraction, so_far in zip(fills(self.shape), samples, strict=True):
            train = [self._inputs(i, num_tokens, fraction) for i in range(mode.train_length)]
            candidates = measure(
                self.kernel,
                train,
                clock,
                apply_exclusions(so_far, self.excluded),
                self.plan.rule,
                rounds,
                spent=lambda: self.now() > deadline,
            )
            for candidate in candidates:
                if candidate.out is Standing.FAILED:
                    why = Exclusion(Standing.FAILED, candidate.reason)
                    self._exclude(candidate.policy, why, num_tokens)
            found.append(candidates)
        self.done += 1
        self.progress(min(self.done, self.total), self.total, f"{num_tokens} tokens")
        return found

    def _check_once(self, num_tokens: int) -> None:
        if num_tokens in self.checked:
            return
        self.checked.add(num_tokens)
        for fraction in fills(self.shape):
            inputs = self._inputs(num_tokens % INPUTS, num_tokens, fraction)
            for policy, why in check_policies(self.kernel, inputs, self.shape.accumulate).items():
                self._exclude(policy, why, num_tokens)

    def _exclude(self, policy: int, why: Exclusion, num_tokens: int) -> None:
        """From here on, and in every bucket of this shape measured before, it is no candidate."""
        if policy not in self.excluded:
            self.excluded[policy] = why
            shape = self.shape.describe()
            logger.warning(
                "policy %d is out for %s: at %d tokens it %s", policy, shape, num_tokens, why.reason
            )

    def check_budget(self) -> None:
        """Raise BudgetError where no bucket was settled or got a round."""
        buckets = [bucket for mode in self.samples for bucket in self.buckets(mode)]
        verdicts = [fill.verdict for bucket in buckets for fill in bucket.fills]
        if not any(verdict.rounds or verdict.settled for verdict in verdicts):
            raise BudgetError(
                f"budget {self.plan.budget_s:g} s is too small for one round of any bucket of "
                f"{self.shape.describe()}: give a larger budget"
            )

    def _inputs(self, index: int, num_tokens: int, fraction: float) -> SortingInputs:
        return sorting_inputs(self.shape, self.tokens[index], num_tokens, self.mask, fraction)
