"""Warm-up: measure the shapes seen at the seam so far, and set their tables. Never while serving.

    targets    which tables are wanted: shapes seen, and those AITER will ask for at other counts
    table_for  one table: the one place that decides where a table comes from
    set        all tables at once, at the end

A dummy batch's own ids are never sorted here: they route every token to the same experts.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_moe import report
from adaptive_moe.engines.aiter_hook import AiterHook, Key, SeenCall
from adaptive_moe.engines.seam import Layer
from adaptive_moe.kernels.aiter import SortRequest, live_kernel, request_at
from adaptive_moe.policy_table import PolicyTable
from adaptive_moe.settings import LogDetail, Settings
from adaptive_moe.shape import SortingShape
from adaptive_moe.store import key_for, open_store

if TYPE_CHECKING:
    import torch

    from adaptive_moe.calibrator import Plan

logger = logging.getLogger("adaptive_moe")

# `adaptive_moe.calibrator.calibrate`, or a stand-in for it.
Measure = Callable[..., PolicyTable]


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
    """What a warm-up did: tables made now, and a sentence for each shape that got none."""

    tables: dict[Key, PolicyTable]
    problems: tuple[str, ...]
    seconds: float


def warm_up(
    hook: AiterHook,
    max_tokens: int,
    capture_sizes: Sequence[int] = (),
    *,
    measure: Measure | None = None,
) -> WarmUp:
    """Make a table for every shape seen that has none, and set them.

    max_tokens is the largest batch to expect; capture_sizes are the token counts that will be
    captured into graphs. A shape that cannot be calibrated keeps AITER's own policy, with one
    warning. With a fixed policy no shape is noted, and so none measured. Takes up to
    ADAPTIVE_MOE_BUDGET_S a shape.
    """
    begun = time.monotonic()
    tables: dict[Key, PolicyTable] = {}
    problems: list[str] = []
    with hook.warming:
        layer = hook.layer
        if layer is None:
            return WarmUp({}, (), 0.0)
        if any(seen.device.type != "cpu" for seen in hook.seen.values()) and _capturing():
            problems.append("the current stream is being captured: warm up before or after capture")
        else:
            for target in targets(hook, layer, max_tokens, capture_sizes):
                try:
                    tables[target.key] = table_for(
                        target, layer, hook.settings, measure or _calibrate
                    )
                # A shape that fails (out of memory, no shape we know) costs only itself.
                except Exception as error:
                    problems.append(f"{target.key.describe()}: {type(error).__name__}: {error}")
        hook.set_tables(tables)
        hook.warmed_up = True
    for problem in problems:
        logger.warning("not calibrated, AITER's own policy serves it: %s", problem)
    _report(list(tables.values()), hook.settings)
    return WarmUp(tables, tuple(problems), time.monotonic() - begun)


def table_for(target: Target, layer: Layer, settings: Settings, measure: Measure) -> PolicyTable:
    """The table of one target: stored by an earlier start, or measured on the live kernel."""
    kernel = live_kernel(layer.module, layer.seam, target.device, target.key.accumulate)
    shape, plan = _shape(target), _plan(target, settings)
    store, key = open_store(settings), key_for(kernel, shape, plan)
    table = store.load(key)
    if table is None:
        table = measure(kernel, shape, plan, expert_mask=target.expert_mask)
        store.publish({key: table})
    return table


def targets(
    hook: AiterHook, layer: Layer, max_tokens: int, capture_sizes: Sequence[int]
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
    layer: Layer,
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


def _ask(layer: Layer, seen: SeenCall, counts: set[int]) -> Iterator[tuple[int, SortRequest]]:
    chooser = layer.chooser
    # With online tuning on, asking about a new count would start AITER's own tuner, for minutes.
    if chooser is None or seen.config is None or os.environ.get("AITER_ONLINE_TUNE", "0") == "1":
        return
    for count in sorted(counts):
        yield count, request_at(layer.module, chooser, seen.config, count)


def _key(seen: SeenCall, request: SortRequest) -> Key:
    accumulate = request.accumulate or seen.key.has_expert_mask
    return seen.key._replace(block_size=request.block_size, accumulate=accumulate)


def _shape(target: Target) -> SortingShape:
    key, mask = target.key, target.expert_mask
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


def _report(tables: Sequence[PolicyTable], settings: Settings) -> None:
    if not is_rank_zero():
        return
    for table in tables:
        logger.info("%s", report.headline(table))
        if settings.log_detail is not LogDetail.SUMMARY:
            logger.info("%s", "\n".join(report.bucket_table(table)))
    if settings.report and tables:
        text = "[" + ",\n".join(table.to_json() for table in tables) + "]\n"
        try:
            Path(settings.report).write_text(text, encoding="utf-8")
        except OSError as error:
            logger.warning(
                "ADAPTIVE_MOE_REPORT=%s was not written (%s): give a file in a folder that exists "
                "and is writable",
                *(settings.report, error),
            )
