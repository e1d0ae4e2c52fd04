# Kernels have untyped arguments; the compile-time ones are capitalised, as is Triton's custom.
# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The device side of the Triton MoE sort; triton_sort.py has the contract and the launches.

Where an entry goes is the padded start of its expert, plus the expert's entries in earlier chunks,
plus those before it in its own chunk. `sort_kernel` needs nothing but the input for that: each of
its programs counts ALL entries by itself, which for a few thousand of them is cheaper than the
second launch that sharing the counts would take. Beyond that `count_kernel` goes first and leaves
the counts of each chunk, and `sort_kernel` reads those instead.

No program waits for another, none writes where another does, and memory sees no atomics: the sort
is stable and gives the same bits every time. Nothing depends on the width of a warp, so one source
serves NVIDIA (32) and AMD (64).
"""

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-(1 << 30))  # where hidden experts start: their positions stay negative

# While serving, a token count that happens to be 1 or a multiple of 16 must not start a
# compilation, nor must an input that is a slice, aligned to nothing.
_kernel = triton.jit(
    do_not_specialize=[
        "num_tokens", "topk", "num_experts", "block_size", "model_dim", "chunks", "group", "pads"
    ],
    do_not_specialize_on_alignment=[
        "topk_ids", "topk_weights", "expert_mask", "num_local_tokens"
    ],
)  # fmt: skip


@triton.jit
def _num_rows(num_tokens, num_local_tokens):
    """Rows that are real: under expert parallelism only the device knows how many."""
    rows = num_tokens
    if num_local_tokens is not None:
        rows = tl.minimum(tl.load(num_local_tokens), num_tokens)
    return rows


@triton.jit
def _zero(pointer, size, tile, step, TILE: tl.constexpr):
    """Zero the elements below `size` in tiles number `tile`, `tile + step`, ...

    Only the last tile is masked: whole tiles are 16-byte stores whatever `size` is.
    """
    offsets = tl.arange(0, TILE)
    zeros = tl.zeros([TILE], pointer.dtype.element_ty)
    whole = (size // TILE).to(tl.int32)
    while tile < whole:
        tl.store(pointer + tile.to(tl.int64) * TILE + offsets, zeros)
        tile += step
    if tile == whole:
        last = whole.to(tl.int64) * TILE + offsets
        tl.store(pointer + last, zeros, mask=last < size)


@triton.jit
def _load_ids(topk_ids, start, stop, num_experts, SIZE: tl.constexpr):
    """Expert of each entry from `start`, -1 past `stop` and where the id is no expert."""
    entry = start + tl.arange(0, SIZE)
    ids = tl.load(topk_ids + entry, mask=entry < stop, other=-1)
    return tl.where(ids < num_experts, tl.maximum(ids, -1), -1)


@triton.jit
def _histogram(ids, NUM_BINS: tl.constexpr):
    return tl.histogram(tl.maximum(ids, 0), NUM_BINS, mask=ids >= 0)


@triton.jit
def _count_tiles(
    topk_ids, at, split, stop, num_experts, NUM_BINS: tl.constexpr, TILE: tl.constexpr
):
    before = tl.zeros([NUM_BINS], tl.int32)
    total = tl.zeros([NUM_BINS], tl.int32)
    limit = tl.where(at < split, split, stop)
    ids = _load_ids(topk_ids, at, limit, num_experts, TILE)
    while at < stop:
        # The next tile is on its way while this one is counted.
        is_before = at < split
        at = tl.minimum(at + TILE, limit)
        limit = tl.where(at < split, split, stop)
        next_ids = _load_ids(topk_ids, at, limit, num_experts, TILE)
        some = _histogram(ids, NUM_BINS)
        total += some
        before += tl.where(is_before, some, 0)
        ids = next_ids
    return before, total


@triton.jit
def _count(
    topk_ids, at, split, stop, num_experts,
    NUM_BINS: tl.constexpr, SMALL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Entries per expert from `at` to `stop`: those before `split`, and all. A tile costs what it
    could hold, so few entries are counted in a small one."""
    if stop - at <= SMALL:
        before, total = _count_tiles(topk_ids, at, split, stop, num_experts, NUM_BINS, SMALL)
    else:
        before, total = _count_tiles(topk_ids, at, split, stop, num_experts, NUM_BINS, TILE)
    return before, total


@triton.jit
def _add_counts(counts, group, used, NUM_BINS: tl.constexpr, ROWS: tl.constexpr):
    """The same from what `count_kernel` left, of which `used` rows hold entries."""
    before = tl.zeros([ROWS, NUM_BINS], tl.int32)
    total = tl.zeros([ROWS, NUM_BINS], tl.int32)
    cells = tl.arange(0, ROWS)[:, None] * NUM_BINS + tl.arange(0, NUM_BINS)[None, :]
    first = group - group  # as a run-time value: the loop counts up from it
    while first < used:
        row = first + tl.arange(0, ROWS)[:, None]
        some = tl.load(counts + first * NUM_BINS + cells, mask=row < used, other=0)
        total += some
        before += tl.where(row < group, some, 0)
        first += ROWS
    return tl.sum(before, 0), tl.sum(total, 0)


@triton.jit
def _visible(expert_mask, num_experts, NUM_BINS: tl.constexpr):
    """Which bins are experts of this rank, and each one's index among them."""
    expert = tl.arange(0, NUM_BINS)
    local = expert
    visible = expert < num_experts
    if expert_mask is not None:
        visible = tl.load(expert_mask + expert, mask=visible, other=0) != 0
        local = tl.cumsum(visible.to(tl.int32), 0) - 1
    return visible, local


@triton.jit
def _place(
    topk_ids, topk_weights, sorted_ids, sorted_weights, sorted_expert_ids, has_mask: tl.constexpr,
    start, stop, ids, weights, position, local, topk, num_experts, block_size,
    NUM_BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Place the entries from `start` to `stop`; `position` is where each expert's next one goes.

    `ids` and `weights` are those of the first CHUNK, loaded early so that counting hides it.
    """
    lane = tl.arange(0, CHUNK)
    while start < stop:
        entry = start + lane
        start += CHUNK
        next_ids = _load_ids(topk_ids, start, stop, num_experts, CHUNK)
        next_weights = tl.load(topk_weights + start + lane, mask=start + lane < stop)
        # An entry j comes after i within an expert if its key is larger by 1 to j: one unsigned
        # comparison. Summed down the columns, of which one thread holds many rows.
        key = ids * CHUNK + lane
        gap = (key[None, :] - 1 - key[:, None]).to(tl.uint32, bitcast=True)
        rank = tl.sum((gap < lane[None, :].to(tl.uint32)).to(tl.int32), 0)
        index = tl.maximum(ids, 0)
        target = tl.gather(position, index, 0) + rank
        keep = (ids >= 0) & (target >= 0)
        token = entry // topk
        tl.store(sorted_ids + target, ((entry - token * topk) << 24) | token, mask=keep)
        tl.store(sorted_weights + target, weights, mask=keep)
        # A block's first entry is never padding, so it is the one that names the block's expert.
        expert = index
        if has_mask:
            expert = tl.gather(local, index, 0)
        block = target // block_size
        tl.store(sorted_expert_ids + block, expert, mask=keep & (block * block_size == target))
        if start < stop:
            position += _histogram(ids, NUM_BINS)
        ids = next_ids
        weights = next_weights


@triton.jit
def _chunk_size(stop, chunks, CHUNK: tl.constexpr):
    """Entries in a chunk, a multiple of CHUNK: the real ones, whose number the host does not know,
    are evenly shared."""
    return tl.cdiv(tl.cdiv(stop, chunks), CHUNK) * CHUNK


@_kernel
def count_kernel(
    topk_ids, counts, num_local_tokens, num_tokens, topk, num_experts, chunks, group,
    NUM_BINS: tl.constexpr, CHUNK: tl.constexpr, COUNT_TILE: tl.constexpr,
):  # fmt: skip
    """Entries per expert: a program counts `group` chunks into a row of `counts`."""
    program = tl.program_id(0)
    stop = _num_rows(num_tokens, num_local_tokens) * topk
    size = group * _chunk_size(stop, chunks, CHUNK)
    start = tl.minimum(program * size, stop)
    end = tl.minimum(start + size, stop)
    _, total = _count(topk_ids, start, start, end, num_experts, NUM_BINS, CHUNK, COUNT_TILE)
    tl.store(counts + program * NUM_BINS + tl.arange(0, NUM_BINS), total)


@_kernel
def sort_kernel(
    topk_ids, topk_weights, counts, sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids,
    moe_buf, expert_mask, num_local_tokens,
    num_tokens, topk, num_experts, block_size, model_dim, chunks, group, pads,
    NUM_BINS: tl.constexpr, CHUNK: tl.constexpr, COUNT_TILE: tl.constexpr,
    SCAN_ROWS: tl.constexpr, FILL_TILE: tl.constexpr,
):  # fmt: skip
    """`chunks` programs place entries, `pads` write padding, and the others zero `moe_buf`.

    counts: what `count_kernel` left, or None where every program counts for itself.
    """
    program = tl.program_id(0)
    if program >= chunks + pads:
        first, step = program - chunks - pads, tl.num_programs(0) - chunks - pads
        _zero(moe_buf, num_tokens.to(tl.int64) * model_dim, first, step, FILL_TILE)
    else:
        rows = _num_rows(num_tokens, num_local_tokens)
        stop = rows * topk
        size = _chunk_size(stop, chunks, CHUNK)
        # Programs from `chunks` on stand behind all entries: what comes next there is padding.
        chunk = tl.minimum(program, chunks)
        start = tl.where(chunk < chunks, tl.minimum(chunk * size, stop), stop)
        end = tl.minimum(start + size, stop)
        if (start < end) | (chunk == chunks):
            ids = _load_ids(topk_ids, start, end, num_experts, CHUNK)
            entry = start + tl.arange(0, CHUNK)
            weights = tl.load(topk_weights + entry, mask=entry < end)
            if counts is None:
                before, total = _count(
                    topk_ids, program - program, start, stop, num_experts,
                    NUM_BINS, CHUNK, COUNT_TILE,
                )  # fmt: skip
            else:
                used = tl.cdiv(stop, tl.maximum(group * size, 1))
                before, total = _add_counts(counts, chunk // group, used, NUM_BINS, SCAN_ROWS)
                first = chunk // group * group * size  # entry that the chunk's group begins with
                _, within = _count(
                    topk_ids, first, first, start, num_experts, NUM_BINS, CHUNK, COUNT_TILE
                )
                before += within
            visible, local = _visible(expert_mask, num_experts, NUM_BINS)
            padded = tl.where(visible, tl.cdiv(total, block_size) * block_size, 0)
            ends = tl.cumsum(padded, 0)
            position = tl.where(visible, ends - padded, HIDDEN) + before
            if chunk < chunks:
                _place(
                    topk_ids, topk_weights, sorted_ids, sorted_weights, sorted_expert_ids,
                    expert_mask is not None, start, end, ids, weights, position, local,
                    topk, num_experts, block_size, NUM_BINS, CHUNK,
                )  # fmt: skip
            else:
                if program == chunks:
                    tl.store(num_valid_ids, tl.sum(padded, 0))
                    tl.store(num_valid_ids + 1, rows)
                # Each takes one in `pads` of every expert's padding, fewer than block_size.
                offset = program - chunks
                while offset < block_size:
                    place = position + offset
                    mask = visible & (place < ends)
                    tl.store(sorted_ids + place, (topk << 24) | rows, mask=mask)
                    offset += pads
