"""One rank's own tables: stored by an earlier start, or measured now; and whoever they choose made
ready to serve. What the other ranks say to them comes between the two (others.py)."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from adaptive_moe.disk import folder as store
from adaptive_moe.engines.wanted import Wanted
from adaptive_moe.hook.hook import AiterHook
from adaptive_moe.kernels import POLICIES, Candidate, SortKernel, policy_name
from adaptive_moe.kernels.call import CallKey
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.decision import Rule
from adaptive_moe.policy.evidence import Calibration
from adaptive_moe.policy.situation import Situation
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.settings import Settings

if TYPE_CHECKING:
    from adaptive_moe.tuning.calibrator import Plan

logger = logging.getLogger("adaptive_moe")

# `adaptive_moe.tuning.calibrator.calibrate`, or a stand-in for it.
Measure = Callable[..., PolicyTable]


@dataclass(frozen=True)
class OwnTable:
    """A table of this rank, who may answer by it, and where in the store it belongs, or came
    from."""

    wanted: Wanted
    table: PolicyTable
    kernel: SortKernel
    place: store.Key
    measured: bool


@dataclass
class OwnTables:
    """What became of this rank's shapes.

    failed: those without a table and why, as the others must know; problems: the same in words for
    the log here. All of them are failures of the moment: nothing of them is stored.
    """

    kept: store.Store | None = None
    tables: dict[CallKey, OwnTable] = field(default_factory=dict)
    failed: dict[Coverage, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def make_own(
    hook: AiterHook,
    wanted: Sequence[Wanted],
    measure: Measure,
    *,
    engine: str,
    speaks: bool,
    refused: str,
) -> OwnTables:
    """Load or measure what is wanted. Never raises: other ranks wait for this one.

    speaks: on the rank that speaks for all; refused: why nothing may be measured now, or nothing.
    """
    own = OwnTables()
    if refused:
        own.failed = {one.coverage: refused for one in wanted}
        own.problems = [refused] if wanted else []
        return own
    for one in wanted:
        # A shape that fails (out of memory, no shape we know) costs only itself.
        try:
            own.kept = own.kept or replace(store.open_store(hook.settings), quiet=not speaks)
            own.tables[one.key] = _table_for(one, hook, own.kept, measure, engine)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            own.problems.append(f"{one.key.describe()}: {why}")
            own.failed[one.coverage] = why
    return own


def _table_for(
    one: Wanted, hook: AiterHook, kept: store.Store, measure: Measure, engine: str
) -> OwnTable:
    """Measured as the seen call was made: in its context, on its device and stream."""
    kernel = hook.kernel(one.seen, one.key, one.coverage)
    plan = _plan(hook.settings)
    place = store.key_for(kernel, one.coverage, plan, engine)
    stored = kept.load(place, plan.budget_s)
    if stored is not None and not stored.unfinished:
        return OwnTable(one, stored.table, kernel, place, measured=False)
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
        return OwnTable(one, stored.table, kernel, place, measured=False)
    return OwnTable(one, table, kernel, place, measured=True)


def _usable(table: PolicyTable | None, kernel: SortKernel, rule: Rule) -> Calibration | None:
    """Its evidence, where the same question was asked of the same sorts."""
    if table is None:
        return None
    found, names = table.evidence, tuple(candidate.name for candidate in kernel.candidates)
    same = (found.kernel, found.candidates, found.rule) == (kernel.name, names, rule)
    return found if same else None


def _plan(settings: Settings) -> "Plan":
    from adaptive_moe.tuning.calibrator import Plan

    return Plan(
        first=settings.buckets, budget_s=settings.budget_s, rule=Rule(margin=settings.margin)
    )


def make_ready(own: OwnTable, table: PolicyTable) -> None:
    """Call each sort that is no policy once wherever the table was measured or captured and chooses
    it, as the seen call was made.

    Such sorts compile when they are first called. That must not happen while a graph is captured,
    nor in a served batch; and a table that was stored or agreed has called nobody here. One that
    raises is left to the hook: the baseline answers in its place.
    """
    policies = {own.kernel.baseline.name, *map(policy_name, POLICIES)}
    others = {c.name: c for c in own.kernel.candidates if c.name not in policies}
    calls = [(others[name], count) for name, count in _chosen(table) if name in others]
    if not calls:
        return
    try:
        own.wanted.seen.as_called(_call_each, own, calls)
    except Exception as error:
        logger.debug("not every sort was called before it serves: %r", error)


def _chosen(table: PolicyTable) -> list[tuple[str, int]]:
    found = table.evidence
    counts = {(n, True) for n in found.coverage.captured}
    counts |= {(bucket.num_tokens, False) for bucket in found.section(Situation.BUSY)}
    return sorted({(table.candidate(n, captured=captured), n) for n, captured in counts})


def _call_each(own: OwnTable, calls: list[tuple[Candidate, int]]) -> None:
    from adaptive_moe.tuning.routing import Routing, default_mask, route, sorting_inputs

    shape, device, mask = own.wanted.coverage.shape, own.kernel.device, own.wanted.seen.expert_mask
    if mask is None:
        mask = default_mask(shape, device)
    tokens = route(shape, max(count for _, count in calls), Routing.UNIFORM, 0, device)
    for candidate, count in calls:
        candidate.bind(sorting_inputs(shape, tokens, count, mask))()
