# Kernels have untyped arguments; the compile-time ones are capitalised, as is Triton's custom.
# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""MoE sorting in Triton with AITER's output contract, as the policies that AITER's switch names.

`moe_sorting` groups the routed (token, slot) entries of a batch by expert and pads every group to
a multiple of `block_size`, so that each block of a grouped GEMM works for one expert. The policies
give the same answer and differ in how the work is laid out:

1  one-shot: a single launch. Program 0 sorts the whole batch alone (histogram, padded prefix sum,
   scatter); the other programs zero the output buffer meanwhile. Nothing is cheaper to launch, but
   one program's time grows with the batch.
2  multi-phase: two launches and a workspace. The first counts experts per chunk of entries (and
   zeroes the output buffer); in the second every chunk derives its own place from those counts
   and scatters. It uses the whole GPU and pays for one more launch.
0  chooses between them by a rule (`one_shot_tokens`) that knows only the shape.

The sort is stable and needs no atomics in memory: an entry's position is the padded start of its
expert, plus the expert's entries in earlier chunks, plus those before it in its own chunk. Nothing
depends on the width of a warp, so one source serves NVIDIA (32) and AMD (64).

Contract: ROCm/aiter, `aiter/fused_moe.py` and `csrc/include/moe_sorting_opus.h`.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

# Tuned on an H200 with 256 experts, topk 8 (calibration/bench_triton_kernels.py).
ONE_SHOT_CHUNK = 64  # entries that one-shot ranks at once, each compared with every other
CHUNK = 128  # the same for multi-phase
MAX_CHUNKS = 128  # programs of a multi-phase sort; each reads the counts of all
COUNT_TILE = 512  # entries counted at once
SCAN_TILE = 8192  # counts read at once in the second phase
FILL_TILE = 2048  # elements of the output buffer zeroed at once
MAX_FILLS = 8192  # programs that zero it
NUM_WARPS = 4
HIDDEN = tl.constexpr(-(1 << 30))  # where hidden experts start: their positions stay negative

_BUFFER_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# While serving, a token count that happens to be 1 or a multiple of 16 must not start a
# compilation, nor must an input that is a slice, aligned to nothing.
_kernel = triton.jit(
    do_not_specialize=["num_tokens", "topk", "num_experts", "block_size", "model_dim", "chunks"],
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
def _fill(pointer, count, value, first, step, TILE: tl.constexpr):
    """Write `value` to `count` elements; the programs first, first + 1, ... of `step` share them.

    Only the last tile is masked: whole tiles are 16-byte stores whatever `count` is.
    """
    offsets = tl.arange(0, TILE)
    values = tl.full([TILE], value, pointer.dtype.element_ty)
    whole = (count // TILE).to(tl.int32)
    tile = first
    while tile < whole:
        tl.store(pointer + tile.to(tl.int64) * TILE + offsets, values)
        tile += step
    if tile == whole:
        last = whole.to(tl.int64) * TILE + offsets
        tl.store(pointer + last, values, mask=last < count)


@triton.jit
def _pad(sorted_ids, stop, rows, topk, num_experts, block_size, first, step, TILE: tl.constexpr):
    """Make every place that `stop` entries can reach a padding entry; they overwrite theirs."""
    bound = stop + tl.minimum(stop, num_experts) * (block_size - 1)
    _fill(sorted_ids, bound, (topk << 24) | rows, first, step, TILE)


@triton.jit
def _load_ids(topk_ids, start, stop, num_experts, SIZE: tl.constexpr):
    """Expert of each entry from `start`, -1 past `stop` and where the id is no expert."""
    entry = start + tl.arange(0, SIZE)
    ids = tl.load(topk_ids + entry, mask=entry < stop, other=-1)
    return tl.where(ids < num_experts, tl.maximum(ids, -1), -1)


@triton.jit
def _count(ids, NUM_BINS: tl.constexpr):
    return tl.histogram(tl.maximum(ids, 0), NUM_BINS, mask=ids >= 0)


@triton.jit
def _count_range(
    topk_ids, start, stop, ids, num_experts,
    NUM_BINS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Entries per expert from `start` to `stop`; `ids` are the experts of the first CHUNK."""
    totals = _count(ids, NUM_BINS)
    start += CHUNK
    while start < stop:
        totals += _count(_load_ids(topk_ids, start, stop, num_experts, TILE), NUM_BINS)
        start += TILE
    return totals


@triton.jit
def _layout(
    totals, expert_mask, num_valid_ids, rows, num_experts, block_size, NUM_BINS: tl.constexpr
):
    """From entries per expert: each one's first position and local index. Writes num_valid_ids."""
    expert = tl.arange(0, NUM_BINS)
    local = expert
    visible = expert < num_experts
    if expert_mask is not None:
        visible = tl.load(expert_mask + expert, mask=visible, other=0) != 0
        local = tl.cumsum(visible.to(tl.int32), 0) - 1
    padded = tl.where(visible, tl.cdiv(totals, block_size) * block_size, 0)
    if tl.program_id(0) == 0:
        tl.store(num_valid_ids, tl.sum(padded, 0))
        tl.store(num_valid_ids + 1, rows)
    return tl.where(visible, tl.cumsum(padded, 0) - padded, HIDDEN), local


@triton.jit
def _scatter(
    topk_ids, topk_weights, sorted_ids, sorted_weights, sorted_expert_ids, expert_mask,
    start, stop, ids, position, local, topk, num_experts, block_size,
    NUM_BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Place the entries from `start` to `stop`; `position` is where each expert's next one goes.

    `ids` are the experts of the first CHUNK, loaded early so that other work hides the latency.
    """
    lane = tl.arange(0, CHUNK)
    while start < stop:
        entry = start + lane
        weights = tl.load(topk_weights + entry, mask=entry < stop)
        start += CHUNK
        next_ids = _load_ids(topk_ids, start, stop, num_experts, CHUNK)
        # Summed down the columns, where one thread holds many rows: no exchange between threads.
        earlier = (ids[:, None] == ids[None, :]) & (lane[:, None] < lane[None, :])
        rank = tl.sum(earlier.to(tl.int32), 0)
        index = tl.maximum(ids, 0)
        target = tl.gather(position, index, 0) + rank
        keep = (ids >= 0) & (target >= 0)
        token = entry // topk
        tl.store(sorted_ids + target, ((entry - token * topk) << 24) | token, mask=keep)
        tl.store(sorted_weights + target, weights, mask=keep)
        # A block's first entry is never padding, so it is the one that names the block's expert.
        expert = index
        if expert_mask is not None:
            expert = tl.gather(local, index, 0)
        block = target // block_size
        tl.store(sorted_expert_ids + block, expert, mask=keep & (block * block_size == target))
        if start < stop:
            position += _count(ids, NUM_BINS)
        ids = next_ids


@_kernel
def _one_shot_kernel(
    topk_ids, topk_weights, sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf,
    expert_mask, num_local_tokens, num_tokens, topk, num_experts, block_size, model_dim,
    NUM_BINS: tl.constexpr, CHUNK: tl.constexpr, COUNT_TILE: tl.constexpr, FILL_TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program > 0:
        size = num_tokens.to(tl.int64) * model_dim
        _fill(moe_buf, size, 0, program - 1, tl.num_programs(0) - 1, FILL_TILE)
    else:
        zero = program  # as a run-time value: loops count up from it
        rows = _num_rows(num_tokens, num_local_tokens)
        stop = rows * topk
        ids = _load_ids(topk_ids, zero, stop, num_experts, CHUNK)
        totals = _count_range(topk_ids, zero, stop, ids, num_experts, NUM_BINS, CHUNK, COUNT_TILE)
        _pad(sorted_ids, stop, rows, topk, num_experts, block_size, zero, 1, COUNT_TILE)
        position, local = _layout(
            totals, expert_mask, num_valid_ids, rows, num_experts, block_size, NUM_BINS
        )
        tl.debug_barrier()  # padding first: other threads wrote it where entries now go
        _scatter(
            topk_ids, topk_weights, sorted_ids, sorted_weights, sorted_expert_ids, expert_mask,
            zero, stop, ids, position, local, topk, num_experts, block_size, NUM_BINS, CHUNK,
        )  # fmt: skip


@triton.jit
def _chunk(stop, program, chunks, CHUNK: tl.constexpr):
    """This program's entries, from and to: a multiple of CHUNK, the real ones evenly shared."""
    size = tl.cdiv(tl.cdiv(stop, chunks), CHUNK) * CHUNK
    return program * size, tl.minimum(program * size + size, stop), size


@_kernel
def _count_kernel(
    topk_ids, counts, sorted_ids, moe_buf, num_local_tokens,
    num_tokens, topk, num_experts, block_size, model_dim, chunks,
    NUM_BINS: tl.constexpr, CHUNK: tl.constexpr, COUNT_TILE: tl.constexpr, FILL_TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    rows = _num_rows(num_tokens, num_local_tokens)
    stop = rows * topk
    if program < chunks:
        start, end, _ = _chunk(stop, program, chunks, CHUNK)
        ids = _load_ids(topk_ids, start, end, num_experts, CHUNK)
        totals = _count_range(topk_ids, start, end, ids, num_experts, NUM_BINS, CHUNK, COUNT_TILE)
        tl.store(counts + program * NUM_BINS + tl.arange(0, NUM_BINS), totals)
    else:
        first, step = program - chunks, tl.num_programs(0) - chunks
        _pad(sorted_ids, stop, rows, topk, num_experts, block_size, first, step, COUNT_TILE)
        _fill(moe_buf, num_tokens.to(tl.int64) * model_dim, 0, first, step, FILL_TILE)


@_kernel
def _place_kernel(
    topk_ids, topk_weights, counts, sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids,
    expert_mask, num_local_tokens, num_tokens, topk, num_experts, block_size,
    NUM_BINS: tl.constexpr, CHUNK: tl.constexpr, SCAN_ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    rows = _num_rows(num_tokens, num_local_tokens)
    stop = rows * topk
    start, end, size = _chunk(stop, program, tl.num_programs(0), CHUNK)
    if (start < end) | (program == 0):
        ids = _load_ids(topk_ids, start, end, num_experts, CHUNK)
        total = tl.zeros([SCAN_ROWS, NUM_BINS], tl.int32)
        before = tl.zeros([SCAN_ROWS, NUM_BINS], tl.int32)
        column = tl.arange(0, NUM_BINS)[None, :]
        row = tl.arange(0, SCAN_ROWS)[:, None]
        used = tl.cdiv(stop, tl.maximum(size, 1)) - row  # rows of `counts` that hold entries
        first = 0
        while first * size < stop:
            some = tl.load(counts + (first + row) * NUM_BINS + column, mask=first < used, other=0)
            total += some
            before += tl.where(first + row < program, some, 0)
            first += SCAN_ROWS
        position, local = _layout(
            tl.sum(total, 0), expert_mask, num_valid_ids, rows, num_experts, block_size, NUM_BINS
        )
        _scatter(
            topk_ids, topk_weights, sorted_ids, sorted_weights, sorted_expert_ids, expert_mask,
            start, end, ids, position + tl.sum(before, 0), local, topk, num_experts, block_size,
            NUM_BINS, CHUNK,
        )  # fmt: skip


_compiled: dict[tuple[object, ...], Any] = {}


def _launch(
    kernel: Any, programs: int, variant: tuple[object, ...], args: tuple[object, ...]
) -> None:
    """Launch `programs` programs. Skips Triton's own look-up of the compiled variant, which takes
    longer than the launch; `variant` must tell apart whatever the kernel is specialised on."""
    compiled = _compiled.get(variant)
    if compiled is None:
        # Under TRITON_INTERPRET=1 there is nothing compiled to keep.
        compiled = kernel[(programs,)](*args, num_warps=NUM_WARPS)
        if compiled is not None:
            _compiled[variant] = compiled
    else:
        compiled[(programs, 1, 1)](*args)


@functools.cache
def one_shot_tokens(num_experts: int) -> int:
    """The most tokens that policy 0 sorts one-shot; with more it is multi-phase.

    The rule of AITER's `moe_sorting_is_oneshot`: one-shot if its table of one row a token and two
    more, one 4-byte column an expert and one more, fits in half of AMD's 64 KiB of shared memory
    (token rows come in eights), and never from 512 experts on. AITER sends 131,072 tokens and more
    to one-shot to avoid a fault of its multi-phase kernel; these kernels need no such exception.
    Cached because AITER's rule is compiled, and here every microsecond of the host counts.
    """
    rows = 32768 // 4 // (num_experts + 1) - 2
    return rows // 8 * 8 if num_experts < 512 else 0


def moe_sorting(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: torch.dtype,
    block_size: int = 32,
    expert_mask: torch.Tensor | None = None,
    num_local_tokens: torch.Tensor | None = None,
    dispatch_policy: int = 0,
    *,
    accumulate: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort routed entries by expert, each expert's group padded to a multiple of `block_size`.

    topk_ids int32 and topk_weights float32, both [M, topk], contiguous, on the current device. Ids
    that are no expert, and experts that `expert_mask` (int32 [num_experts], 0 = on another rank)
    hides, are dropped. Where `num_local_tokens` (int32 [1]) is given, only so many rows are real;
    it is read on the device alone. With L real rows, the five results are

    sorted_ids int32 [M*topk + num_experts*block_size - topk]: `slot << 24 | token`, grouped by
        expert, in the order of the input within one; padding is `topk << 24 | L`
    sorted_weights float32, as long: the entry's weight; undefined at padding
    sorted_expert_ids int32 [one a block]: the expert, counted among the visible ones
    num_valid_ids int32 [2]: entries with padding, and L; what lies beyond them is undefined
    moe_buf [M, model_dim]: zeros; an empty [0, 0] where the caller reduces by itself
        (`accumulate=False`) and no expert is hidden

    Nothing waits for the device, so a call can be captured into a graph (call it once before, with
    any number of tokens, since the first call compiles).
    """
    _check(topk_ids, topk_weights, num_experts, moebuf_dtype, block_size)
    if expert_mask is not None and (expert_mask.dtype, expert_mask.numel()) != (
        torch.int32, num_experts,
    ):  # fmt: skip
        raise ValueError(
            f"expert_mask is {expert_mask.dtype} with {expert_mask.numel()} elements; "
            f"accepted is int32 with one element an expert, {num_experts}"
        )
    num_tokens, topk = topk_ids.shape
    device = topk_ids.device
    length = num_tokens * topk + num_experts * block_size - topk
    sorted_ids = torch.empty(length, dtype=torch.int32, device=device)
    sorted_weights = torch.empty(length, dtype=torch.float32, device=device)
    sorted_expert_ids = torch.empty(-(-length // block_size), dtype=torch.int32, device=device)
    num_valid_ids = torch.empty(2, dtype=torch.int32, device=device)
    shape = (num_tokens, model_dim) if accumulate or expert_mask is not None else (0, 0)
    moe_buf = torch.empty(shape, dtype=moebuf_dtype, device=device)

    size = num_tokens * shape[1]
    bins = max(32, triton.next_power_of_2(num_experts))
    # On AMD, Triton addresses a buffer under 2 GiB with 32 bits.
    large = size * moebuf_dtype.itemsize >= 1 << 31
    variant = (device, moebuf_dtype, large, expert_mask is None, num_local_tokens is None, bins)
    if dispatch_policy == 1 or (not dispatch_policy and num_tokens <= one_shot_tokens(num_experts)):
        _launch(
            _one_shot_kernel, 1 + min(size // FILL_TILE + 1, MAX_FILLS), (1, *variant),
            (topk_ids, topk_weights, sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids,
             moe_buf, expert_mask, num_local_tokens, num_tokens, topk, num_experts, block_size,
             shape[1], bins, ONE_SHOT_CHUNK, COUNT_TILE, FILL_TILE),
        )  # fmt: skip
    else:
        chunks = max(1, min(-(-num_tokens * topk // CHUNK), MAX_CHUNKS))
        counts = torch.empty(chunks * bins, dtype=torch.int32, device=device)
        fills = min(max(size // FILL_TILE, length // COUNT_TILE) + 1, MAX_FILLS)
        _launch(
            _count_kernel, chunks + fills, (2, *variant),
            (topk_ids, counts, sorted_ids, moe_buf, num_local_tokens, num_tokens, topk,
             num_experts, block_size, shape[1], chunks, bins, CHUNK, COUNT_TILE, FILL_TILE),
        )  # fmt: skip
        _launch(
            _place_kernel, chunks, (3, *variant),
            (topk_ids, topk_weights, counts, sorted_ids, sorted_weights, sorted_expert_ids,
             num_valid_ids, expert_mask, num_local_tokens, num_tokens, topk, num_experts,
             block_size, bins, CHUNK, SCAN_TILE // bins),
        )  # fmt: skip
    return sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf


def _check(
    ids: torch.Tensor, weights: torch.Tensor, num_experts: int, dtype: torch.dtype, block_size: int
) -> None:
    """Raise ValueError, naming the value and what is accepted, for what cannot be sorted."""
    for name, tensor, wanted in (
        ("topk_ids", ids, torch.int32), ("topk_weights", weights, torch.float32)
    ):  # fmt: skip
        if tensor.dtype != wanted or tensor.shape != ids.shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}; "
                f"accepted is contiguous {wanted} [num_tokens, topk], the same shape for both"
            )
    if ids.dim() != 2 or not 1 <= ids.shape[1] <= min(16, num_experts) or len(ids) >= 1 << 24:
        raise ValueError(
            f"topk_ids is {list(ids.shape)} for {num_experts} experts; accepted are "
            "[num_tokens, topk] of under 2**24 tokens, topk from 1 to 16 and to num_experts"
        )
    if not 1 <= num_experts <= 1024:
        raise ValueError(f"num_experts is {num_experts}; accepted are 1 to 1024")
    if block_size % 16 or not 16 <= block_size <= 256:
        raise ValueError(f"block_size is {block_size}; accepted are multiples of 16 from 16 to 256")
    if dtype not in _BUFFER_DTYPES:
        raise ValueError(f"moebuf_dtype is {dtype}; accepted are bfloat16, float16 and float32")
