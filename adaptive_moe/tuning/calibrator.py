"""Coverage -> samples -> verdicts -> table: the whole of one shape's calibration.

    check    every candidate's output on every first bucket, outside the clock (kernels compile)
    explore  a first pass over each situation: the first buckets, looks between, refinement
    confirm  a second pass, later: whoever would replace the baseline is measured again
    decide   from all samples, and with whatever was found wrong on the way left out

Nothing here knows which kernel sorts, which clock times or who asked.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial

import torch
from torch import Tensor

from adaptive_moe.kernels import POLICIES, SortKernel
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.decision import Rule
from adaptive_moe.policy.environment import describe_environment
from adaptive_moe.policy.evidence import SCHEMA, Bucket, Calibration
from adaptive_moe.policy.situation import Situation
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.tuning.clocks import Clock, clock_for
from adaptive_moe.tuning.device import Neutral
from adaptive_moe.tuning.errors import (
    BudgetError,
    CalibrationFailedError,
    CalibrationRefusedError,
)
from adaptive_moe.tuning.inputs import Inputs
from adaptive_moe.tuning.race import LOT, LOTS, short
from adaptive_moe.tuning.rightness import Rightness
from adaptive_moe.tuning.section import Section

__all__ = [
    "BudgetError",
    "CalibrationFailedError",
    "CalibrationRefusedError",
    "Plan",
    "calibrate",
]

logger = logging.getLogger("adaptive_moe")

CAPTURING = "the current stream is being captured into a graph: calibrate before or after capture"

# How the budget is shared; what one situation leaves, the next ones have. Most calls are replayed.
# The idle device is asked about the fewest counts, and its answers are as noisy as a host is: an
# extra launch shows in a few rounds, and what does not would take hundreds.
WEIGHT = {Situation.GRAPH: 6.0, Situation.BUSY: 3.0, Situation.IDLE: 1.0}
IDLE_ROUNDS = 20

ClockFactory = Callable[[Situation, torch.device], Clock]
Progress = Callable[[int, int, str], None]


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
    earlier: Calibration | None = None,
    clock_factory: ClockFactory | None = None,
    now: Callable[[], float] = time.monotonic,
    progress: Progress = lambda done, total, what: None,
) -> PolicyTable:
    """Measure what `coverage` names on `kernel`, and decide.

    Args:
        kernel: who sorts, and who may take the baseline's place.
        coverage: the token counts, and in which situations they come.
        plan: how to measure; by default 1.5 s by the default rule.
        expert_mask: the caller's own, int32 of [num_experts]; by default the shape's.
        earlier: evidence of the same kernel and shape; its settled buckets are not measured again.
        clock_factory: the clock of a situation on a device.
        now: seconds, for the budget.
        progress: called with buckets measured, buckets known of, and what comes next.

    Returns:
        The table with all its evidence. A candidate that fails, or returns something else than the
        baseline, only loses its candidacy.

    Raises:
        CalibrationRefusedError: the current stream is being captured.
        CalibrationFailedError: the baseline fails, for a reason of the moment.
        BudgetError: not even one round fits.
    """
    plan = plan or Plan()
    coverage = coverage.on(kernel.device.type)
    on_gpu = kernel.device.type != "cpu"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        logger.warning("not calibrating %s: %s", coverage.describe(), CAPTURING)
        raise CalibrationRefusedError(CAPTURING)
    begun = now()
    guard: AbstractContextManager[object] = nullcontext()
    if on_gpu:
        # One process may have layers on several GPUs: each is measured where it runs.
        guard = torch.cuda.device(kernel.device)
    try:
        with guard:
            sections = _sections(
                kernel, coverage, plan, expert_mask, earlier, clock_factory, now, progress
            )
            _measure(list(sections.values()), plan.seconds(len(kernel.candidates)))
            buckets = {situation: part.buckets() for situation, part in sections.items()}
    except (CalibrationFailedError, BudgetError):
        raise
    # Nothing that a kernel or a device does may end the process that asked.
    except Exception as error:
        raise CalibrationFailedError(short(error)) from error
    finally:
        if on_gpu:
            torch.cuda.empty_cache()
    _check_budget(buckets, coverage, plan)
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
            **{s.value: buckets.get(s, ()) for s in Situation},
        )
    )


def _sections(
    kernel: SortKernel,
    coverage: Coverage,
    plan: Plan,
    expert_mask: Tensor | None,
    earlier: Calibration | None,
    clock_factory: ClockFactory | None,
    now: Callable[[], float],
    progress: Progress,
) -> dict[Situation, Section]:
    """One for each situation that the coverage has counts in, with what is known already."""
    inputs = Inputs(coverage, expert_mask, kernel.device)
    rightness = Rightness(kernel, coverage, inputs, now)
    if clock_factory is None:
        clock_factory = partial(clock_for, neutral=Neutral(kernel.device))
    tell = _Told(progress)
    sections: dict[Situation, Section] = {}
    for situation in Situation:
        if domain := coverage.counts(situation):
            sections[situation] = Section(
                situation,
                domain,
                plan.first or _grid(coverage, situation),
                _settled(earlier, situation, kernel, inputs, plan.rule),
                inputs,
                rightness,
                partial(clock_factory, situation, kernel.device),
                _rule(plan, situation),
                lambda: now() - rightness.seconds,
                partial(tell, situation),
                sections,
            )
    tell.total = sum(len(section.grid) for section in sections.values())
    return sections


def _measure(sections: list[Section], budget_s: float) -> None:
    """Both passes over all situations. What one does not need, the next ones have."""
    for section in sections:
        section.check()
    now = sections[0].now
    deadline = now() + budget_s
    for place, section in enumerate(sections):
        free = deadline - now() - sum(done.reserve() for done in sections[:place])
        weights = [WEIGHT[one.situation] for one in sections[place:]]
        section.explore(now() + free * weights[0] / sum(weights))
    _confirm(sections, deadline)
    # Estimates kept back more than it took: what that leaves goes to counts that had no turn.
    for section in sections:
        section.fill(deadline)
    _confirm(sections, deadline)


def _confirm(sections: Sequence[Section], deadline: float) -> None:
    """The second pass over all situations, of as many winners as the time is for."""
    now = sections[0].now
    while now() < deadline and (needed := sum(section.reserve() for section in sections)):
        free = deadline - now()
        for section in sections:
            section.choose(free * section.reserve() / needed)
        # A lot of everybody, and again, so that the lots lie apart; then more for who needs it.
        for rounds in (*(LOT * lot for lot in range(1, LOTS + 1)), sections[0].rule.max_rounds):
            for section in sections:
                section.confirm(rounds, deadline)


def _grid(coverage: Coverage, situation: Situation) -> tuple[int, ...]:
    """The counts to begin with: powers of two.

    But powers of four for eager calls of as few tokens as graphs hold: those are rare, both
    situations must be measured for them, and the explorer still goes where there is something.
    """
    powers = [1 << k for k in range(coverage.max_tokens.bit_length())]
    if situation is Situation.GRAPH or not coverage.captured:
        return tuple(powers)
    return tuple(n for n in powers if n >= coverage.busy_from or n.bit_length() % 2)


def _rule(plan: Plan, situation: Situation) -> Rule:
    if situation is not Situation.IDLE:
        return plan.rule
    return replace(plan.rule, max_rounds=min(plan.rule.max_rounds, IDLE_ROUNDS))


def _settled(
    earlier: Calibration | None,
    situation: Situation,
    kernel: SortKernel,
    inputs: Inputs,
    rule: Rule,
) -> dict[int, Bucket]:
    """The earlier buckets of that situation that need no more rounds, refined ones and all."""
    names = tuple(candidate.name for candidate in kernel.candidates)
    if earlier is None or (earlier.candidates, earlier.rule) != (names, rule):
        return {}
    domain = inputs.coverage.counts(situation)
    return {
        bucket.num_tokens: bucket
        for bucket in earlier.section(situation)
        if bucket.num_tokens in domain
        and all(verdict.settled for verdict in bucket.verdicts)
        and tuple(f.fraction for f in bucket.fills) == inputs.fills(situation, bucket.num_tokens)
    }


def _check_budget(
    buckets: dict[Situation, tuple[Bucket, ...]], coverage: Coverage, plan: Plan
) -> None:
    """Raise BudgetError where no bucket was settled or got a round."""
    verdicts = [v for found in buckets.values() for bucket in found for v in bucket.verdicts]
    if not any(verdict.rounds or verdict.settled for verdict in verdicts):
        raise BudgetError(
            f"budget {plan.budget_s:g} s is too small for one round of any bucket of "
            f"{coverage.describe()}: give a larger budget"
        )


class _Told:
    """Progress over all situations: a bucket that nobody expected adds itself to the total."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.total, self.done = progress, 0, 0

    def __call__(self, situation: Situation, num_tokens: int) -> None:
        self.done += 1
        self.total = max(self.total, self.done)
        tokens = "token" if num_tokens == 1 else "tokens"
        self.progress(self.done, self.total, f"{num_tokens} {tokens}, {situation.value}")
