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
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone

import torch
from torch import Tensor

from adaptive_moe.kernels import POLICIES, SortKernel
from adaptive_moe.kernels.environment import describe_environment
from adaptive_moe.policy.coverage import Coverage, Situation
from adaptive_moe.policy.evidence import SCHEMA, Bucket, Evidence, Rule
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.policy.verdict import LOT, LOTS
from adaptive_moe.tuning.explore import ClockFactory, Progress, Section, Session
from adaptive_moe.tuning.rounds import CalibrationFailedError

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
            session = Session(
                *(kernel, coverage, plan.first, plan.rule),
                expert_mask=expert_mask,
                earlier=usable,
                clock_factory=clock_factory,
                now=now,
                progress=progress,
            )
            budget_s = plan.seconds(len(kernel.candidates))
            buckets, cut_short = _measure(session, budget_s, plan.rule.max_rounds)
        exclusions = tuple(session.exclusions.by_name.values())
        del session
    except Exception as error:
        # Their frames hold tensors.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        if on_gpu:
            _give_memory_back()
    if not buckets:
        raise BudgetError(
            f"budget {plan.budget_s:g} s is too small for one round of any bucket of "
            f"{coverage.describe()}: give a larger budget"
        )
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
            cut_short=cut_short,
            excluded=exclusions,
            graph=buckets[Situation.GRAPH],
            eager=buckets[Situation.EAGER],
        )
    )


def _measure(
    session: Session, budget_s: float, max_rounds: int
) -> tuple[dict[Situation, tuple[Bucket, ...]], bool]:
    """Both passes over both situations: the buckets of each, none where no round fitted; and
    whether the budget ended before there was nothing left worth measuring."""
    sections = [Section(session, s) for s in Situation if session.coverage.counts(s)]

    def reserved_s() -> float:
        return sum(section.reserve() for section in sections)

    for section in sections:
        section.check_grid()
    deadline = session.now() + budget_s
    session.total = ahead = sum(len(section.grid) for section in sections)
    for section in sections:
        ahead = section.sketch(deadline, ahead, reserved_s)
    for place, section in enumerate(sections):
        free = deadline - session.now() - reserved_s()
        weights = [WEIGHT[one.situation] for one in sections[place:]]
        section.refine(session.now() + section.reserve() + free * weights[0] / sum(weights))
    _confirm(session, sections, deadline, max_rounds)
    # Estimates kept back more than it took: what that leaves goes to counts that had no turn.
    for section in sections:
        section.sketch_unmeasured(deadline)
    _confirm(session, sections, deadline, max_rounds)
    cut_short = session.now() >= deadline or any(section.cut_short for section in sections)
    if not any(section.was_measured for section in sections):
        return {}, cut_short
    found = {section.situation: section.buckets() for section in sections}
    return {situation: found.get(situation, ()) for situation in Situation}, cut_short


def _confirm(
    session: Session, sections: Sequence[Section], deadline: float, max_rounds: int
) -> None:
    """The second pass over both situations, of as many winners as there is time for."""
    # One lot of each winner, and again, so that the lots lie apart; then more where needed.
    lots = (*(LOT * lot for lot in range(1, LOTS + 1)), max(max_rounds, LOT * LOTS))
    while session.now() < deadline and (needed := sum(one.reserve() for one in sections)):
        free = deadline - session.now()
        for section in sections:
            section.choose_winners(free * section.reserve() / needed)
        for rounds in lots:
            for section in sections:
                section.confirm(rounds, deadline)


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
