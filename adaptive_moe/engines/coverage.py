"""Which tables a warm-up is to make: for the shapes seen at the seam, and for those that AITER will
ask for at other token counts."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptive_moe.engines.hook import AiterHook, Key, SeenCall
from adaptive_moe.engines.seam import Layer
from adaptive_moe.kernels.aiter import SortRequest, request_at
from adaptive_moe.settings import Settings
from adaptive_moe.shape import SortingShape

if TYPE_CHECKING:
    import torch

    from adaptive_moe.tuning.calibrator import Plan

logger = logging.getLogger("adaptive_moe")


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


def shape_of(call: Target | SeenCall) -> SortingShape:
    """What is sorted. ValueError where it is no shape we know."""
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


def plan_for(target: Target, settings: Settings) -> "Plan":
    """What to calibrate the target for, by the user's settings."""
    from adaptive_moe.policy.decision import Rule
    from adaptive_moe.tuning.calibrator import Plan

    return Plan(
        max_tokens=target.max_tokens,
        capture_sizes=target.capture_sizes,
        first=settings.buckets or target.first,
        budget_s=settings.budget_s,
        rule=Rule(margin=settings.margin),
    )
