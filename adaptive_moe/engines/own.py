"""One rank's tables before it hears of the others: stored by an earlier start, or measured now."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from adaptive_moe.disk import folder as store
from adaptive_moe.engines.coverage import Wanted
from adaptive_moe.engines.hook import AiterHook, Key
from adaptive_moe.kernels import SortKernel
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.decision import Rule
from adaptive_moe.policy.evidence import Calibration
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.settings import Settings

if TYPE_CHECKING:
    from adaptive_moe.tuning.calibrator import Plan

logger = logging.getLogger("adaptive_moe")

# `adaptive_moe.tuning.calibrator.calibrate`, or a stand-in for it.
Measure = Callable[..., PolicyTable]


@dataclass(frozen=True)
class Own:
    """A table of this rank, who may answer by it, and where in the store it belongs, or came
    from."""

    wanted: Wanted
    table: PolicyTable
    kernel: SortKernel
    place: store.Key
    measured: bool


@dataclass
class Alone:
    """What became of this rank's shapes.

    failed: those without a table and why, as the others must know; problems: the same in words for
    the log here. All of them are failures of the moment: nothing of them is stored.
    """

    kept: store.Store | None = None
    own: dict[Key, Own] = field(default_factory=dict)
    failed: dict[Coverage, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def tables_of(
    hook: AiterHook,
    wanted: Sequence[Wanted],
    measure: Measure,
    *,
    engine: str,
    speaks: bool,
    refused: str,
) -> Alone:
    """Load or measure what is wanted. Never raises: other ranks wait for this one.

    speaks: on the rank that speaks for all; refused: why nothing may be measured now, or nothing.
    """
    found = Alone()
    if refused:
        found.failed = {one.coverage: refused for one in wanted}
        found.problems = [refused] if wanted else []
        return found
    for one in wanted:
        # A shape that fails (out of memory, no shape we know) costs only itself.
        try:
            found.kept = found.kept or replace(store.open_store(hook.settings), quiet=not speaks)
            found.own[one.key] = _table_for(one, hook, found.kept, measure, engine)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            found.problems.append(f"{one.key.describe()}: {why}")
            found.failed[one.coverage] = why
    return found


def _table_for(
    one: Wanted, hook: AiterHook, kept: store.Store, measure: Measure, engine: str
) -> Own:
    """Measured as the seen call was made: in its context, on its device and stream."""
    kernel = hook.kernel(one.seen, one.key, one.coverage)
    plan = plan_for(hook.settings)
    place = store.key_for(kernel, one.coverage, plan, engine)
    stored = kept.load(place, plan.budget_s)
    if stored is not None and not stored.unfinished:
        return Own(one, stored.table, kernel, place, measured=False)
    before = one.earlier if stored is None else stored.table
    try:
        table = one.seen.as_called(
            measure,
            kernel,
            one.coverage,
            plan,
            expert_mask=one.seen.expert_mask,
            earlier=_usable(before, kernel, plan.rule),
        )
    except Exception as error:
        if stored is None:
            raise
        logger.warning("%s stays as stored: %s", one.key.describe(), error)
        return Own(one, stored.table, kernel, place, measured=False)
    return Own(one, table, kernel, place, measured=True)


def _usable(table: PolicyTable | None, kernel: SortKernel, rule: Rule) -> Calibration | None:
    """Its evidence, where the same question was asked of the same sorts."""
    if table is None:
        return None
    found, names = table.evidence, tuple(candidate.name for candidate in kernel.candidates)
    same = (found.kernel, found.candidates, found.rule) == (kernel.name, names, rule)
    return found if same else None


def plan_for(settings: Settings) -> "Plan":
    """How to measure, by the user's settings."""
    from adaptive_moe.tuning.calibrator import Plan

    return Plan(
        first=settings.buckets, budget_s=settings.budget_s, rule=Rule(margin=settings.margin)
    )
