"""Warm-up: a table for every shape seen at the seam so far, the same on all ranks. Never while
serving.

    targets    which tables are wanted: shapes seen, and those AITER will ask for at other counts
    _alone     this rank's tables, stored by an earlier start or measured now, and what failed
    _agree     one exchange with the other ranks, which this rank comes to whatever became of it
    then       what was agreed is set, all tables at once, and stored where it is news

A dummy batch's own ids are never sorted here: they route every token to the same experts.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_moe import report, store
from adaptive_moe.agreement import Agreement, Channel, agree
from adaptive_moe.engines.aiter_hook import AiterHook, Key, SeenCall
from adaptive_moe.engines.seam import Layer
from adaptive_moe.kernels.aiter import SortRequest, live_kernel, request_at
from adaptive_moe.policy_table import PolicyTable
from adaptive_moe.settings import LogDetail, Mode, Settings
from adaptive_moe.shape import SortingShape

if TYPE_CHECKING:
    import torch

    from adaptive_moe.calibrator import Plan

logger = logging.getLogger("adaptive_moe")

# `adaptive_moe.calibrator.calibrate`, or a stand-in for it.
Measure = Callable[..., PolicyTable]
# How the other ranks are reached; None is for a rank that is alone.
Connect = Callable[[], Channel | None]


@dataclass(frozen=True)
class Target:
    """One table to make: for calls with this key, from a kernel called the same way.

    first: token counts to measure first, empty for the default grid. Where AITER uses this
    block_size for some counts only, the others need no measuring.
    """

    key: Key
    max_tokens: int
    capture_sizes: tuple[int, ...]
    first: tuple[int, ...]
    device: "torch.device"
    expert_mask: "torch.Tensor | None"


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

    def fail(self, call: "Target | SeenCall", why: str) -> None:
        try:
            self.failed[_shape(call)] = why
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
        _report(hook, list(tables.values()))
        if alone.kept is not None:
            news = {
                alone.own[key].place: table
                for key, table in tables.items()
                if not (alone.own[key].was_stored and alone.own[key].table == table)
            }
            alone.kept.publish(news)
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
            found.kept = found.kept or store.open_store(hook.settings)
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
    shape, plan = _shape(target), _plan(target, settings)
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


def targets(
    hook: AiterHook, layer: Layer | None, max_tokens: int, capture_sizes: Sequence[int]
) -> list[Target]:
    """The tables wanted, one a key: for what was seen, and what AITER asks at other counts."""
    wanted: dict[Key, Target] = {}
    for seen in list(hook.seen.values()):
        largest = max(max_tokens, seen.num_tokens)
        captured = _captured_rows(seen, max_tokens, capture_sizes)
        by_key = _keys_by_count(layer, seen, largest, captured)
        for key, counts in by_key.items():
            known = wanted.get(key)
            # Two layers can share a key; the first one seen with the largest batch speaks for both.
            if key in hook.tables or (known is not None and known.max_tokens >= max(counts)):
                continue
            wanted[key] = Target(
                key,
                max_tokens=max(counts),
                capture_sizes=tuple(sorted(counts & set(captured))),
                first=tuple(sorted(counts)) if len(by_key) > 1 else (),
                device=seen.device,
                expert_mask=seen.expert_mask,
            )
    return list(wanted.values())


def _captured_rows(
    seen: SeenCall, max_tokens: int, capture_sizes: Sequence[int]
) -> tuple[int, ...]:
    """The row counts of captured calls of this layer.

    Where data-parallel ranks pool their tokens, the sort gets a multiple of what each rank batches;
    the largest batch shows which. Padded layers are captured at their full capacity, too.
    """
    pooled = seen.num_tokens // max_tokens if seen.num_tokens % max_tokens == 0 else 1
    rows = {size * pooled for size in capture_sizes}
    if rows and seen.key.has_num_local_tokens:
        rows.add(seen.num_tokens)
    return tuple(sorted(rows))


def _keys_by_count(
    layer: Layer | None,
    seen: SeenCall,
    largest: int,
    captured: Sequence[int],
) -> dict[Key, set[int]]:
    """Each key this layer will come with, and token counts that bring it.

    AITER picks block_size (and whether the sort zeroes moe_buf) by token count, and a first forward
    shows one of them. It is asked for the others by the function that it asks itself, in the words
    it used. Where that cannot be done, only what was seen is known: a count with another block_size
    runs AITER's own policy.
    """
    counts = {1 << k for k in range(largest.bit_length())} | {largest, *captured}
    try:
        found = dict(_ask(layer, seen, counts | {seen.num_tokens}))
    except Exception as error:
        logger.debug("AITER's block sizes at other token counts are not known: %r", error)
        found = {}
    here = found.get(seen.num_tokens)
    if here is None or _key(seen, here) != seen.key:
        return {seen.key: counts}
    keys: dict[Key, set[int]] = {}
    for count in counts:
        if found[count].sorts:
            keys.setdefault(_key(seen, found[count]), set()).add(count)
    return keys


def _ask(
    layer: Layer | None, seen: SeenCall, counts: set[int]
) -> Iterator[tuple[int, SortRequest]]:
    if layer is None or layer.chooser is None or seen.config is None:
        return
    # With online tuning on, asking about a new count would start AITER's own tuner, for minutes.
    if os.environ.get("AITER_ONLINE_TUNE", "0") == "1":
        return
    for count in sorted(counts):
        yield count, request_at(layer.module, layer.chooser, seen.config, count)


def _key(seen: SeenCall, request: SortRequest) -> Key:
    accumulate = request.accumulate or seen.key.has_expert_mask
    return seen.key._replace(block_size=request.block_size, accumulate=accumulate)


def _shape(call: Target | SeenCall) -> SortingShape:
    key, mask = call.key, call.expert_mask
    return SortingShape(
        num_experts=int(key.num_experts),
        topk=int(key.topk),
        model_dim=int(key.model_dim),
        dtype=str(key.dtype).removeprefix("torch."),
        block_size=int(key.block_size),
        local_experts=None if mask is None else int((mask != 0).sum()),
        num_local_tokens=key.has_num_local_tokens,
        accumulate=key.accumulate,
    )


def _plan(target: Target, settings: Settings) -> "Plan":
    from adaptive_moe.calibrator import Plan
    from adaptive_moe.decision import Rule

    return Plan(
        max_tokens=target.max_tokens,
        capture_sizes=target.capture_sizes,
        first=settings.buckets or target.first,
        budget_s=settings.budget_s,
        rule=Rule(margin=settings.margin),
    )


def _calibrate(*args: Any, **kwargs: Any) -> PolicyTable:
    from adaptive_moe.calibrator import calibrate  # imports torch

    return calibrate(*args, **kwargs)


def _capturing() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def is_rank_zero() -> bool:
    """True on the rank that speaks for all: rank 0, or the only one."""
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _report(hook: AiterHook, tables: Sequence[PolicyTable]) -> None:
    if not tables or not is_rank_zero():
        return
    settings = hook.settings
    for table in tables:
        logger.info("%s", report.headline(table))
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
