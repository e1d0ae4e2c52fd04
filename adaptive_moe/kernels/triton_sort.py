"""MoE sorting in Triton with AITER's output contract, as the policies that AITER's switch names.

`moe_sorting` groups the routed (token, slot) entries of a batch by expert and pads every group to
a multiple of `block_size`, so that each block of a grouped GEMM works for one expert. The policies
give the same answer and differ in how the work is laid out:

1  one-shot: a single launch, in which every program counts the whole batch by itself and then
   places its own chunk of it. Nothing is cheaper to launch, but every program's time grows with
   the batch: fastest up to 1,000 (512 experts) or 4,000 entries (few experts). From there on a
   batch is sorted as under policy 2.
2  multi-phase: two launches and a workspace. The first counts experts per chunk of entries; in
   the second every chunk derives its own place from those counts. Large batches take a third
   between them, which adds the counts up.
0  chooses between them by a rule (`one_shot_tokens`) that knows only the shape.

The kernels are in triton_kernels.py. Contract: ROCm/aiter, `aiter/fused_moe.py` and
`csrc/include/moe_sorting_opus.h`.
"""

import functools
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from triton.runtime import JITFunction, driver

from adaptive_moe.kernels.contract import buffer_length
from adaptive_moe.kernels.triton_kernels import (
    count_kernel,
    one_shot_kernel,
    place_kernel,
    scan_kernel,
)
from adaptive_moe.shape import MAX_EXPERTS, MAX_TOPK

_BUFFER_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST_BOUND = 4096  # calls kept with what is constant for them


@dataclass(frozen=True)
class Tile:
    """How one-shot sorts up to `entries` of them.

    size     entries that a program looks at together: all, except in the largest tiles
    chunk    entries that a program places; all of them, with no bins to count experts in, if it is
             `size`
    experts  numbers of experts that it is for
    """

    entries: int
    size: int
    chunk: int
    num_warps: int
    experts: range = range(1, MAX_EXPERTS + 1)


@dataclass(frozen=True)
class Tuning:
    """Sizes tuned on an H200 (calibration/bench_triton_kernels.py); none changes a result.

    tiles        of one-shot, smallest first; with more entries it is multi-phase
    chunks       entries that a program of multi-phase places, powers of two: in two launches, in
                 three, and with more than most_entries
    max_rows     of counts, each of as few chunks as that allows; every program adds them up
    many_counts  a third launch adds up the counts from so many entries times bins on, of which at
                 least 256 count
    most_entries  that three launches sort in chunks of the middle size
    scan_rows    of counts that the third launch adds up at once, a power of two
    scan_tile    counts added up at once
    count_tile   entries counted at once
    small_tile   the same, of programs with no more than that to count
    fill_tiles   tiles of moe_buf zeroed beside counting, for each bin, where there are two
                 launches and a large buffer: about what is done while others count
    fill_shares  one in so many bytes of moe_buf is zeroed beside counting, and one beside adding
                 up, where there are three launches
    pads         programs that write padding
    fill_tile    elements of moe_buf zeroed at once
    few_fills    programs that zero up to many_tiles tiles: more would crowd those that place
    max_fills    programs that zero more than that
    local_fills  at most so many where only the device knows how many rows there are to zero
    """

    tiles: tuple[Tile, ...] = (
        Tile(16, 16, 16, 1),
        Tile(32, 32, 32, 4),
        Tile(128, 128, 16, 4),
        Tile(256, 256, 16, 4),
        Tile(512, 512, 16, 4, range(257, 385)),
        Tile(4096, 256, 32, 4, range(1, 257)),
        Tile(1024, 256, 32, 4, range(257, 385)),
        Tile(4096, 512, 32, 4, range(257, MAX_EXPERTS + 1)),
    )
    chunks: tuple[int, int, int] = (128, 256, 512)
    max_rows: int = 64
    many_counts: int = 1 << 24
    most_entries: int = 1 << 17
    scan_rows: int = 512
    scan_tile: int = 4096
    count_tile: int = 512
    small_tile: int = 256
    num_warps: int = 4
    fill_tiles: int = 4
    fill_shares: tuple[int, int] = (4, 8)
    pads: int = 32
    fill_tile: int = 2048
    few_fills: int = 64
    many_tiles: int = 2048
    max_fills: int = 65536
    local_fills: int = 2112


TUNING = Tuning()


@dataclass
class Launch:
    """One launch, but for the tensors of a call.

    programs   how many; none where it is only to be compiled and loaded
    variant    tells apart what the kernel is compiled for
    constants  the arguments after the tensors
    run        launches it, once it is compiled
    """

    kernel: Any
    programs: int
    num_warps: int
    variant: tuple[object, ...]
    constants: tuple[int, ...]
    run: Any = None


@dataclass(frozen=True)
class _Bound:
    """What is constant for calls of one kind and token count.

    counts  size of the workspace
    ahead   kernels for fewer entries: compiled with the first such call, as a stored table is
            checked at its smallest and largest count only, and a capture must not compile
    """

    length: int
    blocks: int
    buffer: tuple[int, int]
    sort: Launch
    counts: int = 0
    count: Launch | None = None
    scan: Launch | None = None
    ahead: tuple[Launch, ...] = ()


_Tensors = tuple[torch.Tensor | None, ...]
_bound: dict[tuple[object, ...], _Bound] = {}
_compiled: dict[tuple[object, ...], Any] = {}
_compiling = threading.Lock()


def _renew_lock() -> None:
    """In a child that was forked: a lock that no thread holds."""
    global _compiling  # noqa: PLW0603
    _compiling = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def _compile(launches: Sequence[tuple[Launch, _Tensors]]) -> None:
    """Compile and load what is not yet: the first by itself, which loads the compiler, the others
    side by side, since the compiler releases Python's lock."""
    kernel, tensor = launches[0][0].kernel, launches[0][1][0]
    if tensor is None or not tensor.is_cuda or not isinstance(kernel, JITFunction):
        return  # interpreted, under TRITON_INTERPRET=1
    device = torch.cuda.current_device()  # a new thread's is the first one

    def compile_one(launch: Launch, tensors: _Tensors) -> Any:
        torch.cuda.set_device(device)
        return launch.kernel.warmup(
            *tensors, *launch.constants, grid=(1,), num_warps=launch.num_warps
        )

    with _compiling:
        new = {one.variant: (one, with_) for one, with_ in launches if one.variant not in _compiled}
        if not new:
            return
        first, *others = new.values()
        made = [compile_one(*first)]
        if others:
            with ThreadPoolExecutor(min(len(others), len(os.sched_getaffinity(0)))) as pool:
                made += pool.map(compile_one, *zip(*others, strict=True))
        for variant, compiled in zip(new, made, strict=True):
            compiled[(1, 1, 1)]  # loads it
            _compiled[variant] = compiled


def _launch(launch: Launch, tensors: _Tensors) -> None:
    """Skips Triton's own look-up of the compiled variant, which takes longer than the launch, and
    hands it addresses, since it asks the driver about each tensor, and the stream, since it asks
    for the device first."""
    if launch.run is None:
        compiled = _compiled.get(launch.variant)
        if compiled is None:  # interpreted, under TRITON_INTERPRET=1
            launch.kernel[(launch.programs,)](
                *tensors, *launch.constants, num_warps=launch.num_warps
            )
            return
        launch.run = compiled[(launch.programs, 1, 1)]
    assert tensors[0] is not None
    launch.run(
        *[None if tensor is None else tensor.data_ptr() for tensor in tensors],
        *launch.constants,
        stream=driver.active.get_current_stream(tensors[0].get_device()),
    )


@functools.cache
def one_shot_tokens(num_experts: int) -> int:
    """The most tokens that policy 0 sorts one-shot; with more it is multi-phase.

    The rule of AITER's `moe_sorting_is_oneshot`: one-shot if its table of one row a token and two
    more, one 4-byte column an expert and one more, fits in half of AMD's 64 KiB of shared memory
    (token rows come in eights), and never from 512 experts on. AITER sends 131,072 tokens and more
    to one-shot to avoid a fault of its multi-phase kernel; these kernels need no such exception.
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
    rounded: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort routed entries by expert, each expert's group padded to a multiple of `block_size`.

    topk_ids int32 and topk_weights float32, both [M, topk], on the current device. Ids that are no
    expert, and experts that `expert_mask` (int32 [num_experts], 0 = on another rank) hides, are
    dropped. All three are contiguous. Where `num_local_tokens` (int32 [1]) is given, only so many
    rows are real; it is read on the device alone. With L real rows, the five results are

    sorted_ids int32 [buffer_length(..., rounded=rounded)]: `slot << 24 | token`, grouped by
        expert, in the order of the input within one; padding is `topk << 24 | L`
    sorted_weights float32, as long: the entry's weight; undefined at padding
    sorted_expert_ids int32 [one a block]: the expert, counted among the visible ones
    num_valid_ids int32 [2]: entries with padding, and L; what lies beyond them is undefined
    moe_buf [M, model_dim]: its first L rows are zeros; an empty [0, 0] where the caller reduces by
        itself (`accumulate=False`) and no expert is hidden

    Nothing waits for the device, so a call can be captured into a graph. The first call of a kind
    compiles, also what sorts fewer tokens: before a capture, call each policy with the fewest and
    the most tokens that it will have.
    """
    key = (
        topk_ids.shape, topk_weights.shape, topk_ids.dtype, topk_weights.dtype, topk_ids.device,
        num_experts, model_dim, moebuf_dtype, block_size,
        None if expert_mask is None else (
            expert_mask.dtype, expert_mask.shape, expert_mask.stride()
        ),
        None if num_local_tokens is None else num_local_tokens.dtype,
        dispatch_policy, accumulate, rounded,
    )  # fmt: skip
    bound = _bound.get(key)
    is_new = bound is None
    if bound is None or not (topk_ids.is_contiguous() and topk_weights.is_contiguous()):
        _check(topk_ids, topk_weights, num_experts, moebuf_dtype, block_size)
        _check_options(num_experts, expert_mask, num_local_tokens)
        bound = _bind(
            TUNING, topk_ids, num_experts, model_dim, moebuf_dtype, block_size,
            expert_mask is not None, num_local_tokens is not None, dispatch_policy,
            accumulate, rounded,
        )  # fmt: skip
    # Allocations are a third of the host's time, and take less of it without dtype and device.
    int32, float32 = topk_ids.new_empty, topk_weights.new_empty
    sorted_ids, sorted_weights = int32(bound.length), float32(bound.length)
    sorted_expert_ids, num_valid_ids = int32(bound.blocks), int32(2)
    # torch.empty takes 1 us longer.
    moe_buf = torch.empty_strided(
        bound.buffer, (bound.buffer[1], 1), dtype=moebuf_dtype, device=topk_ids.device
    )
    outputs = (sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf)
    one_shot: _Tensors = (topk_ids, topk_weights, *outputs, expert_mask, num_local_tokens)
    place = one_shot
    launches = [(bound.sort, one_shot)]
    if bound.count is not None:
        counts = int32(bound.counts)
        place = (topk_ids, topk_weights, counts, *outputs, expert_mask, num_local_tokens)
        launches = [(bound.count, (topk_ids, counts, moe_buf, num_local_tokens))]
        if bound.scan is not None:
            launches.append((bound.scan, (counts, moe_buf, num_local_tokens)))
        launches.append((bound.sort, place))
    if is_new:
        ahead = [
            (launch, place if launch.kernel is place_kernel else one_shot) for launch in bound.ahead
        ]
        _compile([*launches, *ahead])
    for launch, tensors in launches:
        _launch(launch, tensors)
    if is_new:
        # Only now: a call that failed is made anew.
        if len(_bound) >= _MOST_BOUND:
            _bound.clear()
        _bound[key] = bound
    return outputs


def _bind(
    tuning: Tuning,
    topk_ids: torch.Tensor,
    num_experts: int,
    model_dim: int,
    dtype: torch.dtype,
    block_size: int,
    has_mask: bool,
    has_local: bool,
    dispatch_policy: int,
    accumulate: bool,
    rounded: bool,
) -> _Bound:
    num_tokens, topk = topk_ids.shape
    entries = num_tokens * topk
    length = buffer_length(num_tokens, topk, num_experts, block_size, rounded=rounded)
    blocks = -(-length // block_size)
    buffer = (num_tokens, model_dim) if accumulate or has_mask else (0, 0)
    tiles = -(-buffer[0] * buffer[1] // tuning.fill_tile)
    bins = _all_bins(num_experts)
    variant = (topk_ids.device, dtype, has_mask, has_local, tuning)

    def fills(tiles: int) -> int:
        few = tiles <= tuning.many_tiles
        return min(
            tiles,
            tuning.few_fills if few else tuning.local_fills if has_local else tuning.max_fills,
        )

    # Entries that the policy sorts one-shot, and those that the tiles so far can hold.
    most = {0: one_shot_tokens(num_experts) * topk, 1: tuning.tiles[-1].entries}
    one_shot, held, ahead = most.get(dispatch_policy, 0), 0, []
    for tile in tuning.tiles:
        if held >= one_shot or num_experts not in tile.experts:
            continue
        held = tile.entries
        few = tile.chunk == tile.size
        # A few entries need bins only for the experts' indices among those of this rank.
        some, more = (bins if has_mask else 32, 0) if few else _bins(num_experts)
        name: tuple[object, ...] = ("one-shot", tile, some, more, *variant)
        is_one = tile.entries == tile.size
        constants: tuple[int, ...] = (
            some, more, few, is_one, tile.size, tile.chunk, tuning.fill_tile
        )  # fmt: skip
        if entries > min(held, one_shot):
            batch = (0, topk, num_experts, block_size, 0, 0, 0)
            ahead.append(Launch(one_shot_kernel, 0, tile.num_warps, name, (*batch, *constants)))
            continue
        chunks = max(1, -(-entries // tile.chunk))
        batch = (num_tokens, topk, num_experts, block_size, buffer[1], chunks, tuning.pads)
        programs = chunks + tuning.pads + fills(tiles)
        sort = Launch(one_shot_kernel, programs, tile.num_warps, name, (*batch, *constants))
        return _Bound(length, blocks, buffer, sort, ahead=tuple(ahead))

    many = entries * max(bins, 256) >= tuning.many_counts
    step = many + (many and entries > tuning.most_entries)
    chunk, chunks = tuning.chunks[step], max(1, -(-entries // tuning.chunks[step]))
    group = 1 if many else -(-chunks // tuning.max_rows)
    parts = -(-chunks // group)
    add_rows = (max(1, tuning.scan_tile // bins), 0, 0)  # of each step

    def place(step: int, programs: int, *batch: int) -> Launch:
        constants = (
            bins, _bits(tuning.chunks[step]), tuning.count_tile, add_rows[step], tuning.fill_tile
        )  # fmt: skip
        name = ("place", bins, step, *variant)
        return Launch(place_kernel, programs, tuning.num_warps, name, (*batch, *constants))

    first = min(tiles // 3, tuning.fill_tiles * bins) if tiles > tuning.many_tiles else 0
    scan, ends = None, (first, first)
    if many:
        first = tiles // tuning.fill_shares[0]
        ends = (first, first + tiles // tuning.fill_shares[1])
        some = min(bins, tuning.scan_tile // tuning.scan_rows)
        scan = Launch(
            scan_kernel, bins // some + fills(ends[1] - ends[0]), tuning.num_warps,
            ("scan", bins, *variant),
            (num_tokens, topk, buffer[1], parts, chunk, *ends, bins, some, tuning.scan_rows,
             tuning.fill_tile),
        )  # fmt: skip
    count = Launch(
        count_kernel, parts + fills(ends[0]), tuning.num_warps, ("count", bins, *variant),
        (num_tokens, topk, num_experts, buffer[1], parts, group * chunk, ends[0],
         bins, tuning.small_tile, tuning.count_tile, tuning.fill_tile),
    )  # fmt: skip
    sort = place(
        step, chunks + tuning.pads + fills(tiles - ends[1]),
        num_tokens, topk, num_experts, block_size, buffer[1], chunks, group, tuning.pads, ends[1],
    )  # fmt: skip
    fewer = (0, topk, num_experts, block_size, 0, 0, 1, 0, 0)
    ahead += [place(fewer_step, 0, *fewer) for fewer_step in range(step)]
    return _Bound(length, blocks, buffer, sort, (parts + 1) * bins, count, scan, tuple(ahead))


def _bits(size: int) -> int:
    """The least b for which 2**b is at least `size`."""
    return (size - 1).bit_length()


def _all_bins(num_experts: int) -> int:
    return max(32, 1 << _bits(num_experts))


def _bins(num_experts: int) -> tuple[int, int]:
    """Bins for so many experts, in one power of two or, of many, in two that are much smaller."""
    bins = _all_bins(num_experts)
    lower = bins // 2
    rest = max(32, 1 << _bits(num_experts - lower))
    return (lower, rest) if lower > max(64, rest) else (bins, 0)


def _check(
    ids: torch.Tensor,
    weights: torch.Tensor,
    num_experts: int,
    dtype: torch.dtype,
    block_size: int,
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
    # With more, a workspace could have 2 GiB, and Triton for AMD would compile anew.
    few = len(ids) < 1 << 24 and ids.numel() <= 1 << 27
    if ids.dim() != 2 or not 1 <= ids.shape[1] <= min(MAX_TOPK, num_experts) or not few:
        raise ValueError(
            f"topk_ids is {list(ids.shape)} for {num_experts} experts; accepted are [num_tokens, "
            f"topk] of under 2**24 tokens and up to 2**27 entries, topk from 1 to {MAX_TOPK} and "
            "to num_experts"
        )
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"num_experts is {num_experts}; accepted are 1 to {MAX_EXPERTS}")
    if block_size % 16 or not 16 <= block_size <= 256:
        raise ValueError(f"block_size is {block_size}; accepted are multiples of 16 from 16 to 256")
    if dtype not in _BUFFER_DTYPES:
        raise ValueError(f"moebuf_dtype is {dtype}; accepted are bfloat16, float16 and float32")


def _check_options(
    num_experts: int, expert_mask: torch.Tensor | None, num_local_tokens: torch.Tensor | None
) -> None:
    if expert_mask is not None and (
        expert_mask.dtype != torch.int32
        or expert_mask.numel() != num_experts
        or not expert_mask.is_contiguous()
    ):
        raise ValueError(
            f"expert_mask is {expert_mask.dtype} with {expert_mask.numel()} elements, strides "
            f"{expert_mask.stride()}; accepted is contiguous int32 with one element an expert, "
            f"{num_experts}"
        )
    if num_local_tokens is not None and num_local_tokens.dtype != torch.int32:
        raise ValueError(f"num_local_tokens is {num_local_tokens.dtype}; accepted is int32")
