# Kernels have untyped arguments; the compile-time ones are capitalised, as is Triton's custom.
# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What the Triton kernels are made of: reading entries, counting and ranking them, writing them.

Nothing here depends on the width of a warp, so one source serves NVIDIA (32) and AMD (64).
"""

import triton
import triton.language as tl


@triton.jit
def num_rows(num_tokens, num_local_tokens):
    """Rows that are real: under expert parallelism only the device knows how many."""
    rows = num_tokens
    if num_local_tokens is not None:
        rows = tl.minimum(tl.load(num_local_tokens), num_tokens)
    return rows


@triton.jit
def zero(pointer, size, tile, end, step, TILE: tl.constexpr):
    """Zero the elements below `size` in tiles number `tile`, `tile + step`, ... before `end`.

    Only the last tile is masked: whole tiles are 16-byte stores whatever `size` is.
    """
    offsets = tl.arange(0, TILE)
    zeros = tl.zeros([TILE], pointer.dtype.element_ty)
    whole = (size // TILE).to(tl.int32)
    stop = tl.minimum(whole, end)
    # Torch's buffers are aligned, which Triton is told here: not to compile for each alignment.
    while tile < stop:
        tl.store(tl.multiple_of(pointer + tile.to(tl.int64) * TILE, 16) + offsets, zeros)
        tile += step
    if (tile == whole) & (tile < end):
        first = whole.to(tl.int64) * TILE
        at = tl.multiple_of(pointer + first, 16) + offsets
        tl.store(at, zeros, mask=first + offsets < size)


@triton.jit
def load_ids(topk_ids, start, stop, num_experts, SIZE: tl.constexpr):
    """Expert of each entry from `start`, -1 past `stop` and where the id is no expert."""
    entry = start + tl.arange(0, SIZE)
    ids = tl.load(topk_ids + entry, mask=entry < stop, other=-1)
    return tl.where(ids < num_experts, tl.maximum(ids, -1), -1)


@triton.jit
def load_visible_ids(topk_ids, expert_mask, start, stop, num_experts, SIZE: tl.constexpr):
    """The same, -1 also where another rank has the expert."""
    ids = load_ids(topk_ids, start, stop, num_experts, SIZE)
    if expert_mask is not None:
        ids = tl.where(tl.load(expert_mask + tl.maximum(ids, 0)) != 0, ids, -1)
    return ids


@triton.jit
def histogram(ids, NUM_BINS: tl.constexpr):
    """Entries of each expert; there are at most NUM_BINS experts."""
    return tl.histogram(tl.maximum(ids, 0), NUM_BINS, mask=ids >= 0)


@triton.jit
def visible_experts(expert_mask, num_experts, NUM_BINS: tl.constexpr):
    """Which bins are experts of this rank, and each one's index among them."""
    expert = tl.arange(0, NUM_BINS)
    local = expert
    visible = expert < num_experts
    if expert_mask is not None:
        visible = tl.load(expert_mask + expert, mask=visible, other=0) != 0
        local = tl.cumsum(visible.to(tl.int32), 0) - 1
    return visible, local


@triton.jit
def count_earlier(ids, entry, all_ids, all_entries, SIZE: tl.constexpr):
    """How many of all entries have the expert of each entry and come before it. Entries are numbers
    below SIZE.

    An entry j comes before i within an expert if its key is smaller by 1 to i: one unsigned
    comparison. Summed down the columns, of which one thread holds many rows.
    """
    key = ids * SIZE + entry
    gap = (key[None, :] - 1 - (all_ids * SIZE + all_entries)[:, None]).to(tl.uint32, bitcast=True)
    return tl.sum((gap < entry[None, :].to(tl.uint32)).to(tl.int32), 0)


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def _sort(keys, BITS: tl.constexpr):
    """2**BITS different keys in order: a bitonic network of shuffles and integer arithmetic. (With
    the masks of tl.sort an AMD wave runs out of registers.)"""
    lane = tl.reshape(tl.arange(0, 1 << BITS), [2] * BITS)
    keys = tl.reshape(keys, [2] * BITS)
    for stage in tl.static_range(1, BITS + 1):
        for bit in tl.static_range(stage - 1, -1, -1):
            # The other of a pair is `keys ^ pair`; -1 where the lower of the two is to be.
            pair = tl.xor_sum(keys, BITS - 1 - bit, keep_dims=True)
            lower = (((lane >> bit) ^ (lane >> stage)) & 1) - 1
            keys ^= lower
            keys = tl.maximum(keys, keys ^ pair) ^ lower
    return tl.reshape(keys, [1 << BITS])


@triton.jit
def by_expert(ids, NUM_BINS: tl.constexpr, BITS: tl.constexpr):
    """2**BITS entries in the order of their experts, those of none last: place of each among `ids`,
    expert, how many with that expert come before it, and whether it has one (else the others mean
    nothing)."""
    lane = tl.arange(0, 1 << BITS)
    key = _sort((tl.where(ids >= 0, ids, NUM_BINS) << BITS) + lane, BITS)
    expert = tl.minimum(key >> BITS, NUM_BINS - 1)
    begins = expert != tl.gather(expert, tl.maximum(lane - 1, 0), 0)
    first = tl.associative_scan(tl.where(begins, lane, 0), 0, _later)
    return key & ((1 << BITS) - 1), expert, lane - first, key < (NUM_BINS << BITS)


@triton.jit
def store_entries(
    sorted_ids, sorted_weights, sorted_expert_ids, entry, weights, expert, target, keep, topk,
    block_size,
):  # fmt: skip
    """Write what is to keep to its `target`, and a block's expert where its first entry goes."""
    token = entry // topk
    tl.store(sorted_ids + target, ((entry - token * topk) << 24) | token, mask=keep)
    tl.store(sorted_weights + target, weights, mask=keep)
    # A block's first entry is never padding, so it is the one that names the block's expert.
    block = target // block_size
    tl.store(sorted_expert_ids + block, expert, mask=keep & (block * block_size == target))


@triton.jit
def store_padding(sorted_ids, place, end, offset, step, block_size, keep, padding):
    """Every `step`th place from `place + offset` to `end`, fewer than block_size."""
    while offset < block_size:
        at = place + offset
        tl.store(sorted_ids + at, padding, mask=keep & (at < end))
        offset += step
