"""Which tables a warm-up is to make: one for every shape seen at the seam, and for those that the
same layers will ask for at other token counts; each for the counts that occur, and no others."""

import logging
import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

from adaptive_moe.engines.hook import AiterHook, Key, SeenCall
from adaptive_moe.engines.seam import CHOOSER
from adaptive_moe.kernels.aiter import MODULE, SortRequest, request_at
from adaptive_moe.policy.coverage import BUSY_FROM, Coverage, Span
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.shape import SortingShape

logger = logging.getLogger("adaptive_moe")


@dataclass(frozen=True)
class Piece:
    """Token counts first to last, inclusive, that are sorted alike."""

    first: int
    last: int
    request: SortRequest


# Who picks block_size by token count for the layer of a call: 1 to `last` in pieces, rising and
# without gaps, or None where it is not this one that picks it.
Chooser = Callable[[SeenCall, int], "Sequence[Piece] | None"]


@dataclass(frozen=True)
class Batches:
    """What will be batched, as one rank counts its tokens.

    max_tokens    the largest batch
    captured      token counts captured into graphs
    pooled        ranks whose tokens reach the sort together, gathered from all of them
    padding_rows  may rows have ids of -1?
    busy_from     from so many tokens on the device is busy; None: above the captured sizes
    choosers      of layers that do not ask AITER's; AITER's own is always asked
    """

    max_tokens: int
    captured: tuple[int, ...] = ()
    pooled: int = 1
    padding_rows: bool = False
    busy_from: int | None = None
    choosers: tuple[Chooser, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """One table to make: for calls with this key, as the call that was seen was made.

    earlier: the table there is already, which covers less.
    """

    key: Key
    seen: SeenCall
    coverage: Coverage
    earlier: PolicyTable | None = None


def coverages(hook: AiterHook, batches: Batches) -> tuple[list[Wanted], list[str]]:
    """The tables wanted, one a key, and a sentence for each call that nothing can be made for.
    Where there is a table that covers all of it, none is wanted."""
    choosers = (*batches.choosers, *_aiters_own(hook))
    wanted: dict[Key, Wanted] = {}
    problems = []
    for seen in list(hook.seen.values()):
        try:
            for key, spans, captured in _by_key(seen, batches, choosers):
                earlier = hook.tables.get(key)
                known = None if earlier is None else earlier.evidence.coverage
                if key in wanted:
                    known = wanted[key].coverage
                coverage = _cover(seen, key, spans, captured, batches, known)
                if earlier is None or earlier.evidence.coverage != coverage:
                    # A call made with this very key knows it better than one with another block.
                    best = wanted[key].seen if key in wanted and seen.key != key else seen
                    wanted[key] = Wanted(key, best, coverage, earlier)
        # A layer that cannot be understood costs only itself.
        except Exception as error:
            problems.append(f"{seen.key.describe()}: {type(error).__name__}: {error}")
    return list(wanted.values()), problems


def shape_of(key: Key, seen: SeenCall) -> SortingShape:
    """What is sorted. ValueError where it is no shape we know."""
    mask = seen.expert_mask
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


def _by_key(
    seen: SeenCall, batches: Batches, choosers: Sequence[Chooser]
) -> Iterator[tuple[Key, list[Span], list[int]]]:
    """Each key the layer of that call will come with, the spans of counts and the captured counts
    that bring it."""
    # Pooled batches are multiples, as the ranks' captured batches are padded to one size.
    pooled = batches.pooled if seen.num_tokens % batches.pooled == 0 else 1
    captured = {size * pooled for size in batches.captured}
    if captured and seen.key.has_num_local_tokens:
        captured.add(seen.num_tokens)  # such layers are captured at their full capacity
    last = max(batches.max_tokens * pooled, seen.num_tokens, *captured)
    spans: dict[Key, list[Span]] = {}
    for piece in _pieces(seen, last, choosers):
        if piece.request.sorts:
            spans.setdefault(_key(seen, piece.request), []).append((piece.first, piece.last))
    for key, found in spans.items():
        merged = _merged(found)
        yield key, merged, sorted(c for c in captured if any(a <= c <= b for a, b in merged))


def _pieces(seen: SeenCall, last: int, choosers: Sequence[Chooser]) -> Sequence[Piece]:
    """1 to `last` as the layer's own chooser divides it: the one that explains what was seen. Where
    none does, only what was seen is known: a count with another block_size runs the baseline."""
    for choose in choosers:
        try:
            pieces = choose(seen, last) or ()
        # A chooser is the engine's or AITER's code, asked by somebody it does not know.
        except Exception as error:
            logger.debug("block sizes at other token counts are not known: %r", error)
            continue
        here = [p for p in pieces if p.first <= seen.num_tokens <= p.last]
        if here and here[0].request.sorts and _key(seen, here[0].request) == seen.key:
            return pieces
    return (Piece(1, last, SortRequest(seen.key.block_size, seen.key.accumulate, sorts=True)),)


def _aiters_own(hook: AiterHook) -> list[Chooser]:
    """AITER's chooser, asked by the function that it asks itself, in the words that were used.

    It is asked once for each class of counts that it tells apart, which get_padded_M names. Also
    where our layer stood aside: this rank must name its tables as the others do.
    """
    layer = hook.layer
    module: ModuleType | None = sys.modules.get(MODULE) if layer is None else layer.module
    asked = getattr(module, CHOOSER, None) if layer is None else layer.chooser
    pad = getattr(module, "get_padded_M", None)
    # With online tuning on, asking about a new count would start AITER's own tuner, for minutes.
    if module is None or asked is None or pad is None or _tunes_online():
        return []

    def choose(seen: SeenCall, last: int) -> list[Piece] | None:
        if seen.config is None:
            return None
        pieces = []
        first = 1
        while first <= last:
            end = first + bisect_right(range(first, last + 1), pad(first), key=pad) - 1
            request = seen.as_called(request_at, module, asked, seen.config, first)
            pieces.append(Piece(first, end, request))
            first = end + 1
        return pieces

    return [choose]


def _tunes_online() -> bool:
    return os.environ.get("AITER_ONLINE_TUNE", "0") == "1"


def _cover(
    seen: SeenCall,
    key: Key,
    spans: Sequence[Span],
    captured: Sequence[int],
    batches: Batches,
    known: Coverage | None,
) -> Coverage:
    """The coverage of one key, with what is covered already in it."""
    padding_rows = batches.padding_rows
    if known is not None:
        spans, captured = [*spans, *known.eager], sorted({*captured, *known.captured})
        padding_rows = padding_rows or known.padding_rows
    largest = max(captured, default=0)
    coverage = Coverage(
        shape_of(key, seen),
        key.baseline_name,
        tuple(_merged(spans)),
        tuple(captured),
        padding_rows=padding_rows,
        busy_from=batches.busy_from or (largest + 1 if largest else BUSY_FROM),
        context=_told_apart(key, seen),
    )
    return coverage.on(seen.device.type)


def _told_apart(key: Key, seen: SeenCall) -> str:
    """What else than the shape tells this call from others of the same shape."""
    words = [seen.context_values()]
    if key.local_ids:
        words.append("return_local_topk_ids=True")
    words += [str(value) for value in key.more if value]
    return ",".join(word for word in words if word)


def _key(seen: SeenCall, request: SortRequest) -> Key:
    accumulate = request.accumulate or seen.key.has_expert_mask
    return seen.key._replace(block_size=request.block_size, accumulate=accumulate)


def _merged(spans: Sequence[Span]) -> list[Span]:
    found: list[Span] = []
    for first, last in sorted(spans):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found
