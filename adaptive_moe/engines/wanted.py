"""Which tables a warm-up is to make: one for every shape seen at the seam, and for those that the
same layers will ask for at other token counts; each for the counts that occur, and no others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256

from adaptive_moe.engines.block_sizes import Chooser, aiters_choosers, key_at, pieces_of
from adaptive_moe.hook.hook import AiterHook
from adaptive_moe.kernels.aiter import KNOWN
from adaptive_moe.kernels.call import Buffer, CallKey, SortCall
from adaptive_moe.policy.coverage import BUSY_FROM, MAX_TOKENS, Coverage, Span
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.shape import SortingShape

# Characters of an argument's value that are a part of a table's key; of a longer one it is a hash.
MAX_WORDS = 200


@dataclass(frozen=True)
class Batches:
    """What a warm-up is to make tables for, as one rank counts its tokens.

    max_tokens    the largest batch
    captured      token counts that will be captured into graphs
    pooled        ranks whose tokens reach the sort together, gathered from all of them
    padding_rows  may rows have ids of -1?
    busy_from     from so many tokens on the device is busy; None: above the captured sizes
    choosers      of layers that do not ask AITER's for their block_size; AITER's is always asked
    owner         what the layers belong to, such as an engine's worker: their tables go when it is
                  gone, and those of another owner are left as they are. None: of this process
    """

    max_tokens: int
    captured: tuple[int, ...] = ()
    pooled: int = 1
    padding_rows: bool = False
    busy_from: int | None = None
    choosers: tuple[Chooser, ...] = ()
    owner: object = None


@dataclass(frozen=True)
class Wanted:
    """One table to make: for calls with this key, as the call that was seen was made.

    earlier: the table there is already, which covers less.
    """

    key: CallKey
    seen: SortCall
    coverage: Coverage
    earlier: PolicyTable | None = None


def coverages(hook: AiterHook, batches: Batches) -> tuple[list[Wanted], list[str]]:
    """The tables wanted, one a key, and a sentence for each call that nothing can be made for.
    Where there is a table that covers all of it, none is wanted."""
    choosers = (*batches.choosers, *aiters_choosers(hook))
    wanted: dict[CallKey, Wanted] = {}
    problems = []
    for seen in hook.wanted_by(batches.owner):
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


def shape_of(key: CallKey, seen: SortCall) -> SortingShape:
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
    seen: SortCall, batches: Batches, choosers: Sequence[Chooser]
) -> Iterator[tuple[CallKey, list[Span], list[int]]]:
    """Each key the layer of that call will come with, the spans of counts and the captured counts
    that bring it."""
    # Pooled batches are multiples, as the ranks' captured batches are padded to one size.
    pooled = batches.pooled if seen.num_tokens % batches.pooled == 0 else 1
    captured = {size * pooled for size in batches.captured}
    if captured and seen.key.has_num_local_tokens:
        captured.add(seen.num_tokens)  # such layers are captured at their full capacity
    # No table covers more; larger batches run the baseline.
    last = min(max(batches.max_tokens * pooled, seen.num_tokens, *captured), MAX_TOKENS)
    spans: dict[CallKey, list[Span]] = {}
    for piece in pieces_of(seen, last, choosers):
        if piece.request.sorts:
            spans.setdefault(key_at(seen, piece), []).append((piece.first, piece.last))
    for key, found in spans.items():
        merged = _merged(found)
        yield key, merged, sorted(c for c in captured if any(a <= c <= b for a, b in merged))


def _cover(
    seen: SortCall,
    key: CallKey,
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
        extras=_extras(seen),
    )
    return coverage.on(seen.device.type)


def _extras(seen: SortCall) -> str:
    """The arguments that tell this call from others of that shape: `name=value`, each."""
    words = []
    if seen.key.local_ids:
        words.append("return_local_topk_ids=True")
    for name, value in seen.extras.items():
        if isinstance(value, Buffer):
            words.append(f"{name}=given")
        elif name not in KNOWN and value is not None:
            text = str(value)
            # An address is another one at each start, and would be a table of its own.
            if " at 0x" in text:
                text = type(value).__name__
            elif len(text) > MAX_WORDS:
                text = f"{type(value).__name__} {sha256(text.encode(errors='replace')).hexdigest()}"
            words.append(f"{name}={text}")
    return ",".join(words)


def _merged(spans: Sequence[Span]) -> list[Span]:
    found: list[Span] = []
    for first, last in sorted(spans):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found
