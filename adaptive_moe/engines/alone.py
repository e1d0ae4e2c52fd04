"""One rank's tables before it hears of the others: stored by an earlier start, or measured now."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from adaptive_moe.disk import folder as store
from adaptive_moe.engines.coverage import Batches, Wanted, coverages
from adaptive_moe.engines.hook import AiterHook, Key
from adaptive_moe.kernels import SortKernel
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.decision import Rule
from adaptive_moe.policy.evidence import Calibration
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.settings import Mode, Settings

if TYPE_CHECKING:
    from adaptive_moe.tuning.calibrator import Plan

logger = logging.getLogger("adaptive_moe")

# `adaptive_moe.tuning.calibrator.calibrate`, or a stand-in for it.
Measure = Callable[..., PolicyTable]


@dataclass(frozen=True)
class Own:
    """A table of this rank, and where in the store it belongs, or came from."""

    wanted: Wanted
    table: PolicyTable
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
    batches: Batches,
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
    try:
        if not hook.seen and hook.settings.mode is Mode.AUTO and speaks:
            logger.warning(
                "auto has nothing to choose: nothing was sorted through AITER's fused_moe so far "
                "(a dense model, AITER's MoE switched off as by VLLM_ROCM_USE_AITER=0 or "
                "VLLM_ROCM_USE_AITER_MOE=0, or no forward yet)"
            )
        wanted, found.problems = coverages(hook, batches)
        if refused:
            found.failed = {one.coverage: refused for one in wanted}
            if wanted:
                found.problems.append(refused)
            return found
        found.kept = replace(store.open_store(hook.settings), quiet=not speaks) if wanted else None
        for one in wanted:
            _try(one, hook, found, measure, engine)
    except Exception as error:
        logger.exception("warm-up failed, the baseline serves what was not measured")
        found.problems.append(f"{type(error).__name__}: {error}")
    return found


def _try(one: Wanted, hook: AiterHook, found: Alone, measure: Measure, engine: str) -> None:
    assert found.kept is not None
    try:
        found.own[one.key] = _table_for(one, hook, found.kept, measure, engine)
    # A shape that fails (out of memory, no shape we know) costs only itself.
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        found.problems.append(f"{one.key.describe()}: {why}")
        found.failed[one.coverage] = why


def _table_for(
    one: Wanted, hook: AiterHook, kept: store.Store, measure: Measure, engine: str
) -> Own:
    """Measured as the seen call was made: in its context, on its device and stream."""
    settings, mask = hook.settings, one.seen.expert_mask
    kernel = hook.kernel(one.seen, one.key, one.coverage)
    plan = plan_for(settings)
    place = store.key_for(kernel, one.coverage, plan, engine)
    stored = kept.load(place)
    if stored is not None and not _may_go_on(stored, settings):
        return Own(one, stored, place, measured=False)
    earlier = _usable(stored or one.earlier, kernel, plan.rule)
    try:
        table = one.seen.as_called(
            measure, kernel, one.coverage, plan, expert_mask=mask, earlier=earlier
        )
    except Exception as error:
        if stored is None:
            raise
        logger.warning("%s stays as stored: %s", one.key.describe(), error)
        return Own(one, stored, place, measured=False)
    return Own(one, table, place, measured=True)


def _may_go_on(stored: PolicyTable, settings: Settings) -> bool:
    """Was it left unsettled by a budget that was smaller than today's?"""
    return not stored.settled and stored.evidence.budget_s < settings.budget_s


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
