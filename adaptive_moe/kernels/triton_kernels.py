# Kernels have untyped arguments; the compile-time ones are capitalised, as is Triton's custom.
# ruff: noqa: N803, N806
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The device side of the Triton MoE sort; triton_sort.py has the contract.

An entry goes to the padded start of its expert, plus the number of earlier entries of that expert.
`one_shot_kernel` needs nothing but the input for both: each of its programs counts ALL entries by
itself, which for some thousands of them is cheaper than the second launch that sharing the counts
would take. For larger batches `count_kernel` goes first and leaves the counts of groups of chunks
of entries, and each program of `place_kernel` adds those up; for the largest `scan_kernel` does so
between them.

No program waits for another, none writes where another does, and memory sees no atomics: the sort
is stable and gives the same bits every time.
"""

import triton
import triton.language as tl

from adaptive_moe.kernels.triton_parts import (
    by_expert,
    count_earlier,
    histogram,
    load_ids,
    load_visible_ids,
    num_rows,
    store_entries,
    store_padding,
    visible_experts,
    zero,
)

HIDDEN = tl.constexpr(-(1 << 30))  # where hidden experts start: their positions stay negative

# While serving, a token count that happens to be 1 or a multiple of 16 must not start a
# compilation, nor must an input that is a slice, aligned to nothing, nor a buffer of 2 GiB.
_kernel = triton.jit(
    do_not_specialize=[
        "num_tokens", "topk", "num_experts", "block_size", "model_dim", "chunks", "group", "pads",
        "parts", "part_size", "first_tile", "end_tile", "moe_buf",
    ],
    do_not_specialize_on_alignment=[
        "topk_ids", "topk_weights", "expert_mask", "num_local_tokens"
    ],
)  # fmt: skip


@triton.jit
def _histograms(ids, NUM_BINS: tl.constexpr, MORE_BINS: tl.constexpr, REST: tl.constexpr):
    """Entries of each of the first NUM_BINS experts, and of the MORE_BINS beyond: REST, or none.

    A bin is the lower bits of the id, tested once for both: `ids - NUM_BINS` spilled on AMD.
    """
    if MORE_BINS > 0:
        inside = (ids >= 0) & (ids < NUM_BINS)
        some = tl.histogram(ids & (NUM_BINS - 1), NUM_BINS, mask=inside)
        beyond = (ids >= NUM_BINS) & (ids < NUM_BINS + REST)
        more = tl.histogram(ids & (REST - 1), REST, mask=beyond)
    else:
        some = histogram(ids, NUM_BINS)
        more = tl.zeros([REST], tl.int32)
    return some, more


@triton.jit
def _count(topk_ids, at, stop, num_experts, NUM_BINS: tl.constexpr, TILE: tl.constexpr):
    """Entries per expert from `at` to `stop`."""
    total = tl.zeros([NUM_BINS], tl.int32)
    ids = load_ids(topk_ids, at, stop, num_experts, TILE)
    while at < stop:
        # The next tile is on its way while this one is counted.
        at += TILE
        next_ids = load_ids(topk_ids, at, stop, num_experts, TILE)
        total += histogram(ids, NUM_BINS)
        ids = next_ids
    return total


@triton.jit
def _add_counts(counts, at, used, NUM_BINS: tl.constexpr, ROWS: tl.constexpr):
    """Sums of the first `used` rows that `count_kernel` left: of those before row `at`, and all."""
    before = tl.zeros([ROWS, NUM_BINS], tl.int32)
    total = tl.zeros([ROWS, NUM_BINS], tl.int32)
    cells = tl.arange(0, ROWS)[:, None] * NUM_BINS + tl.arange(0, NUM_BINS)[None, :]
    first = at - at  # as a run-time value: the loop counts up from it
    while first < used:
        row = first + tl.arange(0, ROWS)[:, None]
        some = tl.load(counts + first * NUM_BINS + cells, mask=row < used, other=0)
        total += some
        before += tl.where(row < at, some, 0)
        first += ROWS
    return tl.sum(before, 0), tl.sum(total, 0)


@triton.jit
def _place_few(
    topk_ids, topk_weights, sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids,
    expert_mask, rows, offset, topk, num_experts, block_size, pads,
    NUM_BINS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sort up to TILE entries, with experts' starts found by comparing entries with each other.

    The program of offset -1 places them, and those from 0 on write every `pads`th of the padding.
    """
    stop = rows * topk
    entry = tl.arange(0, TILE)
    ids = load_visible_ids(topk_ids, expert_mask, 0, stop, num_experts, TILE)
    weights = tl.load(topk_weights + entry, mask=entry < stop)
    same = ids[:, None] == ids[None, :]
    # For each entry, how many have its expert, and in the upper half how many of them come before.
    both = tl.sum(tl.where(same, tl.where(entry[:, None] < entry[None, :], 0x10001, 1), 0), 0)
    count, rank = both & 0xFFFF, both >> 16
    keep = ids >= 0
    # Each block has one entry that leads it, so an expert starts behind the leaders of lower ones.
    leads = keep & (rank // block_size * block_size == rank)
    leader = tl.where(leads, ids, 1 << 20)
    start = tl.sum((leader[:, None] < ids[None, :]).to(tl.int32), 0) * block_size
    if offset < 0:
        expert = ids
        if expert_mask is not None:
            _, local = visible_experts(expert_mask, num_experts, NUM_BINS)
            expert = tl.gather(local, tl.maximum(ids, 0), 0)
        store_entries(
            sorted_ids, sorted_weights, sorted_expert_ids, entry, weights, expert, start + rank,
            keep, topk, block_size,
        )  # fmt: skip
    else:
        if offset == 0:
            tl.store(num_valid_ids, tl.sum(leads.to(tl.int32), 0) * block_size)
            tl.store(num_valid_ids + 1, rows)
        end = start + tl.cdiv(count, block_size) * block_size
        store_padding(
            sorted_ids, start + count, end, offset, pads, block_size, keep & (rank == 0),
            (topk << 24) | rows,
        )  # fmt: skip


@triton.jit
def _count_tiles(
    topk_ids, expert_mask, split, stop, num_experts,
    NUM_BINS: tl.constexpr, MORE_BINS: tl.constexpr, TILE: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """Entries per expert before `split`, a multiple of TILE, and all; likewise of the experts from
    NUM_BINS on, where there are MORE_BINS."""
    REST: tl.constexpr = MORE_BINS if MORE_BINS > 0 else 32
    before = tl.zeros([NUM_BINS], tl.int32)
    total = tl.zeros([NUM_BINS], tl.int32)
    more_before = tl.zeros([REST], tl.int32)
    more_total = tl.zeros([REST], tl.int32)
    ids = load_visible_ids(topk_ids, expert_mask, 0, stop, num_experts, TILE)
    if ONE_TILE:
        total, more_total = _histograms(ids, NUM_BINS, MORE_BINS, REST)
    else:
        at = split - split  # as a run-time value: the loop counts up from it
        while at < stop:
            # The next tile is on its way while this one is counted.
            is_before = at < split
            at += TILE
            next_ids = load_visible_ids(topk_ids, expert_mask, at, stop, num_experts, TILE)
            some, more = _histograms(ids, NUM_BINS, MORE_BINS, REST)
            total += some
            before += tl.where(is_before, some, 0)
            if MORE_BINS > 0:
                more_total += more
                more_before += tl.where(is_before, more, 0)
            ids = next_ids
    return before, total, more_before, more_total


@_kernel
def one_shot_kernel(
    topk_ids, topk_weights, sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids,
    moe_buf, expert_mask, num_local_tokens,
    num_tokens, topk, num_experts, block_size, model_dim, chunks, pads,
    NUM_BINS: tl.constexpr, MORE_BINS: tl.constexpr, FEW: tl.constexpr, ONE_TILE: tl.constexpr,
    TILE: tl.constexpr, CHUNK: tl.constexpr, FILL_TILE: tl.constexpr,
):  # fmt: skip
    """`chunks` programs place CHUNK entries each, `pads` write padding, and the others zero
    `moe_buf`.

    Experts are counted in NUM_BINS, and those beyond in MORE_BINS; not at all where the entries are
    FEW: up to TILE, placed by one program. ONE_TILE: TILE holds all entries.
    """
    program = tl.program_id(0)
    rows = num_rows(num_tokens, num_local_tokens)
    if program >= chunks + pads:
        elements = rows.to(tl.int64) * model_dim
        zero(
            moe_buf, elements, program - chunks - pads, tl.cdiv(elements, FILL_TILE).to(tl.int32),
            tl.num_programs(0) - chunks - pads, FILL_TILE,
        )  # fmt: skip
    elif FEW:
        _place_few(
            topk_ids, topk_weights, sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids,
            expert_mask, rows, program - chunks, topk, num_experts, block_size, pads,
            NUM_BINS, TILE,
        )  # fmt: skip
    else:
        stop = rows * topk
        start = program * CHUNK
        lane = tl.arange(0, CHUNK)
        ids = load_visible_ids(topk_ids, expert_mask, start, stop, num_experts, CHUNK)
        weights = tl.load(topk_weights + start + lane, mask=start + lane < stop)
        split = start // TILE * TILE
        near_ids = load_visible_ids(topk_ids, expert_mask, split, stop, num_experts, TILE)
        before, total, more_before, more_total = _count_tiles(
            topk_ids, expert_mask, split, stop, num_experts, NUM_BINS, MORE_BINS, TILE, ONE_TILE
        )
        padded = tl.cdiv(total, block_size) * block_size
        ends = tl.cumsum(padded, 0)
        position = ends - padded
        valid = tl.sum(padded, 0)
        more_padded = tl.cdiv(more_total, block_size) * block_size
        more_ends = valid + tl.cumsum(more_padded, 0)
        more_position = more_ends - more_padded
        if program < chunks:
            rank = count_earlier(ids, start - split + lane, near_ids, tl.arange(0, TILE), TILE)
            target = tl.gather(position + before, tl.minimum(tl.maximum(ids, 0), NUM_BINS - 1), 0)
            if MORE_BINS > 0:
                more = tl.minimum(tl.maximum(ids - NUM_BINS, 0), MORE_BINS - 1)
                more_target = tl.gather(more_position + more_before, more, 0)
                target = tl.where(ids < NUM_BINS, target, more_target)
            expert = ids
            if expert_mask is not None:
                ALL_BINS: tl.constexpr = NUM_BINS * 2 if MORE_BINS > 0 else NUM_BINS
                _, local = visible_experts(expert_mask, num_experts, ALL_BINS)
                expert = tl.gather(local, tl.maximum(ids, 0), 0)
            store_entries(
                sorted_ids, sorted_weights, sorted_expert_ids, start + lane, weights, expert,
                target + rank, ids >= 0, topk, block_size,
            )  # fmt: skip
        else:
            padding = (topk << 24) | rows
            if program == chunks:
                tl.store(num_valid_ids, valid + tl.sum(more_padded, 0))
                tl.store(num_valid_ids + 1, rows)
            store_padding(
                sorted_ids, position + total, ends, program - chunks, pads, block_size,
                total > 0, padding,
            )  # fmt: skip
            if MORE_BINS > 0:
                store_padding(
                    sorted_ids, more_position + more_total, more_ends, program - chunks, pads,
                    block_size, more_total > 0, padding,
                )  # fmt: skip


@_kernel
def count_kernel(
    topk_ids, counts, moe_buf, num_local_tokens,
    num_tokens, topk, num_experts, model_dim, parts, part_size, end_tile,
    NUM_BINS: tl.constexpr, SMALL_TILE: tl.constexpr, COUNT_TILE: tl.constexpr,
    FILL_TILE: tl.constexpr,
):  # fmt: skip
    """Entries per expert: each of `parts` programs counts `part_size` entries into a row of
    `counts`; rows without real entries are not written. The programs beyond zero the tiles of
    `moe_buf` before `end_tile`."""
    program = tl.program_id(0)
    rows = num_rows(num_tokens, num_local_tokens)
    if program >= parts:
        elements = rows.to(tl.int64) * model_dim
        step = tl.num_programs(0) - parts
        zero(moe_buf, elements, program - parts, end_tile, step, FILL_TILE)
    else:
        start = program * part_size
        end = tl.minimum(start + part_size, rows * topk)
        if start < end:
            # A tile costs what it could hold, so few entries are counted in a small one.
            if end - start <= SMALL_TILE:
                total = _count(topk_ids, start, end, num_experts, NUM_BINS, SMALL_TILE)
            else:
                total = _count(topk_ids, start, end, num_experts, NUM_BINS, COUNT_TILE)
            tl.store(counts + program * NUM_BINS + tl.arange(0, NUM_BINS), total)


@_kernel
def scan_kernel(
    counts, moe_buf, num_local_tokens,
    num_tokens, topk, model_dim, parts, part_size, first_tile, end_tile,
    NUM_BINS: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr, FILL_TILE: tl.constexpr,
):  # fmt: skip
    """Replace each row of `counts` by the sum of those before it, ROWS at once, and write their
    total to row `parts`: a program for BINS of the bins. The programs beyond zero the tiles of
    `moe_buf` from `first_tile` on, before `end_tile`."""
    program = tl.program_id(0)
    rows = num_rows(num_tokens, num_local_tokens)
    if program >= NUM_BINS // BINS:
        elements = rows.to(tl.int64) * model_dim
        first, step = program - NUM_BINS // BINS, tl.num_programs(0) - NUM_BINS // BINS
        zero(moe_buf, elements, first_tile + first, end_tile, step, FILL_TILE)
    else:
        used = tl.cdiv(rows * topk, part_size)
        bins = counts + program * BINS + tl.arange(0, BINS)
        row = tl.arange(0, ROWS)
        before = tl.zeros([BINS], tl.int32)
        first = used - used  # as a run-time value: the loop counts up from it
        while first < used:
            cells = bins[None, :] + (first + row)[:, None] * NUM_BINS
            mask = (first + row < used)[:, None]
            some = tl.load(cells, mask=mask, other=0)
            tl.store(cells, before[None, :] + tl.cumsum(some, 0) - some, mask=mask)
            before += tl.sum(some, 0)
            first += ROWS
        tl.store(bins + parts * NUM_BINS, before)


@_kernel
def place_kernel(
    topk_ids, topk_weights, counts, sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids,
    moe_buf, expert_mask, num_local_tokens,
    num_tokens, topk, num_experts, block_size, model_dim, chunks, group, pads, first_tile,
    NUM_BINS: tl.constexpr, CHUNK_BITS: tl.constexpr, COUNT_TILE: tl.constexpr,
    ADD_ROWS: tl.constexpr, FILL_TILE: tl.constexpr,
):  # fmt: skip
    """`chunks` programs place 2**CHUNK_BITS entries each, `pads` write padding, and the others zero
    `moe_buf` from its tile `first_tile` on.

    counts: what `count_kernel` left, a row for `group` chunks, of which ADD_ROWS are added up at
    once; or, where ADD_ROWS is 0, what `scan_kernel` left: a row for each chunk, and the total.
    """
    program = tl.program_id(0)
    rows = num_rows(num_tokens, num_local_tokens)
    if program >= chunks + pads:
        elements = rows.to(tl.int64) * model_dim
        zero(
            moe_buf, elements, first_tile + program - chunks - pads,
            tl.cdiv(elements, FILL_TILE).to(tl.int32),
            tl.num_programs(0) - chunks - pads, FILL_TILE,
        )  # fmt: skip
    else:
        CHUNK: tl.constexpr = 1 << CHUNK_BITS
        stop = rows * topk
        # Programs from `chunks` on stand behind all entries: what comes next there is padding.
        chunk = tl.minimum(program, chunks)
        start = tl.minimum(chunk * CHUNK, stop)
        if (start < stop) | (chunk == chunks):
            ids = load_ids(topk_ids, start, stop, num_experts, CHUNK)
            lane = tl.arange(0, CHUNK)
            weights = tl.load(topk_weights + start + lane, mask=start + lane < stop)
            if ADD_ROWS > 0:
                used = tl.cdiv(stop, group * CHUNK)
                before, total = _add_counts(counts, chunk // group, used, NUM_BINS, ADD_ROWS)
                first = chunk // group * group * CHUNK  # entry that the chunk's group begins with
                before += _count(topk_ids, first, start, num_experts, NUM_BINS, COUNT_TILE)
            else:
                before = tl.load(counts + chunk * NUM_BINS + tl.arange(0, NUM_BINS))
                total = tl.load(counts + chunks * NUM_BINS + tl.arange(0, NUM_BINS))
            visible, local = visible_experts(expert_mask, num_experts, NUM_BINS)
            padded = tl.where(visible, tl.cdiv(total, block_size) * block_size, 0)
            ends = tl.cumsum(padded, 0)
            position = tl.where(visible, ends - padded, HIDDEN) + before
            if chunk < chunks:
                if ADD_ROWS > 0:
                    place, index, keep = lane, tl.maximum(ids, 0), ids >= 0
                    # By way of shared memory: else Triton for AMD loads all ids into scalar
                    # registers, and there are too few.
                    all_ids = tl.gather(ids, lane, 0)
                    rank = count_earlier(ids, lane, all_ids, lane, CHUNK)
                else:
                    # For one program this takes longer, for many less: it has fewer instructions.
                    place, index, rank, keep = by_expert(ids, NUM_BINS, CHUNK_BITS)
                    weights = tl.gather(weights, place, 0)
                target = tl.gather(position, index, 0) + rank
                expert = index
                if expert_mask is not None:
                    expert = tl.gather(local, index, 0)
                store_entries(
                    sorted_ids, sorted_weights, sorted_expert_ids, start + place, weights, expert,
                    target, keep & (target >= 0), topk, block_size,
                )  # fmt: skip
            else:
                if program == chunks:
                    tl.store(num_valid_ids, tl.sum(padded, 0))
                    tl.store(num_valid_ids + 1, rows)
                store_padding(
                    sorted_ids, position, ends, program - chunks, pads, block_size, visible,
                    (topk << 24) | rows,
                )  # fmt: skip
