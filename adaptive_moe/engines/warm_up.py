"""Warm-up: a table for every shape seen at the seam so far, the same on all ranks. Never while
serving.

    targets    which tables are wanted (targets.py)
    _alone     this rank's tables, stored by an earlier start or measured now, and what failed
    _agree     one exchange with the other ranks, which this rank comes to whatever became of it
    then       what was agreed is set, all tables at once, and stored where it is news

A dummy batch's own ids are never sorted here: they route every token to the same experts.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adaptive_moe.disk import folder as store
from adaptive_moe.engines.coverage import Target, plan_for, shape_of, targets
from adaptive_moe.engines.hook import AiterHook, Key, SeenCall
from adaptive_moe.engines.seam import Layer
from adaptive_moe.kernels.aiter import live_kernel
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.ranks.agreement import Agreement, Channel, agree
from adaptive_moe.report import text as report
from adaptive_moe.settings import LogDetail, Mode, Settings
from adaptive_moe.shape import SortingShape

logger = logging.getLogger("adaptive_moe")

# `adaptive_moe.tuning.calibrator.calibrate`, or a stand-in for it.
Measure = Callable[..., PolicyTable]
# How the other ranks are reached; None is for a rank that is alone.
Connect = Callable[[], Channel | None]


@dataclass(frozen=True)
class WarmUp:
    """What a warm-up did: tables set now, and a sentence for each shape that got none."""

    tables: dict[Key, PolicyTable]
    problems: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class _Own:
    """This rank's table of a shape, and where in the store it belongs, or came from."""

    shape: SortingShape
    table: PolicyTable
    place: store.Key
    was_stored: bool

    def is_news(self, agreed: PolicyTable) -> bool:
        """Is what the ranks run something else than what is stored here?"""
        return not (self.was_stored and self.table == agreed)


@dataclass
class _Alone:
    """What became of this rank's shapes before it heard of other ranks.

    failed: shapes without a table and why, as the others must know; problems: the same in words
    for the log here.
    """

    kept: store.Store | None = None
    own: dict[Key, _Own] = field(default_factory=dict)
    failed: dict[SortingShape, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def fail(self, call: Target | SeenCall, why: str) -> None:
        try:
            self.failed[shape_of(call)] = why
        except ValueError as error:  # no shape we know; then no other rank has a table for it
            logger.debug("%s has no name among ranks: %s", call.key.describe(), error)


def warm_up(
    hook: AiterHook,
    max_tokens: int,
    capture_sizes: Sequence[int] = (),
    *,
    measure: Measure | None = None,
    connect: Connect | None = None,
) -> WarmUp:
    """Make a table for every shape seen that has none, and set them.

    max_tokens is the largest batch to expect; capture_sizes are the token counts that will be
    captured into graphs. A shape that cannot be calibrated keeps AITER's own policy, with one
    warning. With a fixed policy no shape is noted, and so none measured. Takes up to
    ADAPTIVE_MOE_BUDGET_S a shape.

    With `connect`, all ranks that it reaches end with the same tables, and all of them must call
    this equally often: once nothing is left to measure, a rank waits for those that are not there
    yet, and after agreement.LIMIT_S does without tables.
    """
    begun = time.monotonic()
    with hook.warming:
        alone = _alone(hook, max_tokens, capture_sizes, measure or _calibrate)
        for problem in alone.problems:
            logger.warning("not calibrated, AITER's own policy serves it: %s", problem)
        agreed = _agree(alone, connect)
        tables = {
            key: agreed.tables[own.shape]
            for key, own in alone.own.items()
            if own.shape in agreed.tables
        }
        hook.set_tables(tables)
        hook.warmed_up = True
        news = [key for key, table in tables.items() if alone.own[key].is_news(table)]
        _report(hook, tables, news)
        if alone.kept is not None:
            alone.kept.publish({alone.own[key].place: tables[key] for key in news})
    return WarmUp(tables, (*alone.problems, *agreed.problems), time.monotonic() - begun)


def _alone(
    hook: AiterHook, max_tokens: int, capture_sizes: Sequence[int], measure: Measure
) -> _Alone:
    """Load or measure. Never raises: other ranks wait for this one."""
    found = _Alone()
    layer = hook.layer
    try:
        if not hook.seen and hook.settings.mode is Mode.AUTO and is_rank_zero():
            logger.warning(
                "auto has nothing to choose: nothing was sorted through AITER's fused_moe so far "
                "(a dense model, AITER's MoE switched off as by VLLM_ROCM_USE_AITER=0 or "
                "VLLM_ROCM_USE_AITER_MOE=0, or no forward yet)"
            )
        refused = _refusal(hook, layer)
        if refused and layer is not None:
            found.problems.append(refused)
        for target in targets(hook, layer, max_tokens, capture_sizes):
            if layer is None or refused:
                found.fail(target, refused)
                continue
            found.kept = found.kept or replace(
                store.open_store(hook.settings), quiet=not is_rank_zero()
            )
            try:
                found.own[target.key] = _table_for(
                    target, layer, hook.settings, found.kept, measure
                )
            # A shape that fails (out of memory, no shape we know) costs only itself.
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                found.problems.append(f"{target.key.describe()}: {why}")
                found.fail(target, why)
    except Exception as error:
        logger.exception("warm-up failed, AITER's own policy serves what was not measured")
        for seen in list(hook.seen.values()):
            if seen.key not in found.own:
                found.fail(seen, f"{type(error).__name__}: {error}")
    return found


def _refusal(hook: AiterHook, layer: Layer | None) -> str:
    """Why nothing may be measured now, or nothing."""
    if layer is None:
        return "adaptive_moe is not active in that process"
    if any(seen.device.type != "cpu" for seen in hook.seen.values()) and _capturing():
        return "the current stream is being captured: warm up before or after capture"
    return ""


def _table_for(
    target: Target, layer: Layer, settings: Settings, kept: store.Store, measure: Measure
) -> _Own:
    """The table of one target: stored by an earlier start, or measured on the live kernel."""
    kernel = live_kernel(layer.module, layer.seam, target.device, target.key.accumulate)
    shape, plan = shape_of(target), plan_for(target, settings)
    place = store.key_for(kernel, shape, plan)
    table = kept.load(place)
    if table is not None:
        return _Own(shape, table, place, was_stored=True)
    table = measure(kernel, shape, plan, expert_mask=target.expert_mask)
    return _Own(shape, table, place, was_stored=False)


def _agree(alone: _Alone, connect: Connect | None) -> Agreement:
    """What the ranks run of this rank's tables: all of them, where it is alone."""
    tables = {own.shape: own.table for own in alone.own.values()}
    try:
        channel = None if connect is None else connect()
    except Exception as error:
        problem = f"nothing was agreed, no table is used: {type(error).__name__}: {error}"
        logger.warning("%s", problem)
        return Agreement({}, (problem,))
    return agree(tables, alone.failed, channel)


def _calibrate(*args: Any, **kwargs: Any) -> PolicyTable:
    from adaptive_moe.tuning.calibrator import calibrate  # imports torch

    return calibrate(*args, **kwargs)


def _capturing() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def is_rank_zero() -> bool:
    """True on the rank that speaks for all: rank 0, or the only one."""
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _report(hook: AiterHook, tables: Mapping[Key, PolicyTable], news: Sequence[Key]) -> None:
    if not tables or not is_rank_zero():
        return
    settings = hook.settings
    for key, table in tables.items():
        logger.info("%s", report.headline(table, measured_now=key in news))
        if settings.log_detail is not LogDetail.SUMMARY:
            logger.info("%s", "\n".join(report.bucket_table(table)))
    if settings.report:
        # Those of earlier warm-ups too: the file is written anew each time.
        text = "[" + ",\n".join(table.to_json() for table in hook.tables.values()) + "]\n"
        try:
            Path(settings.report).write_text(text, encoding="utf-8")
        except OSError as error:
            logger.warning(
                "ADAPTIVE_MOE_REPORT=%s was not written (%s): give a file in a folder that exists "
                "and is writable",
                *(settings.report, error),
            )
