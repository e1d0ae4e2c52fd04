"""Which kernels a call of the Triton sort launches, with how many programs and what constants.

Plain arithmetic: nothing here touches a device. The kernels are in triton_kernels.py.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from adaptive_moe.kernels.contract import buffer_length
from adaptive_moe.kernels.triton_kernels import (
    count_kernel,
    one_shot_kernel,
    place_kernel,
    scan_kernel,
)
from adaptive_moe.shape import MAX_EXPERTS


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


@dataclass
class Launch:
    """One launch, but for the tensors of a call.

    programs   how many
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
class Launches:
    """What is constant for calls of one kind and token count.

    counts  size of the workspace
    ahead   kernels for fewer entries, not launched: compiled with the first such call, as a stored
            table is checked at its smallest and largest count only, and a capture must not compile
    """

    length: int
    blocks: int
    buffer: tuple[int, int]
    sort: Launch
    counts: int = 0
    count: Launch | None = None
    scan: Launch | None = None
    ahead: tuple[Launch, ...] = ()


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


def launches_for(
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
) -> Launches:
    """Arguments as `moe_sorting` takes them; of topk_ids only shape and device are read."""
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
    one_shot, held = most.get(dispatch_policy, 0), 0
    ahead: list[Launch] = []
    for tile in tuning.tiles:
        if held >= one_shot or num_experts not in tile.experts:
            continue
        held = tile.entries
        few = tile.chunk == tile.size
        # A few entries need bins only for the experts' indices among those of this rank.
        some, more = (bins if has_mask else 32, 0) if few else _bins(num_experts)
        name: tuple[object, ...] = ("one-shot", tile, some, more, *variant)
        chunks = max(1, -(-entries // tile.chunk))
        sort = Launch(
            one_shot_kernel, chunks + tuning.pads + fills(tiles), tile.num_warps, name,
            (num_tokens, topk, num_experts, block_size, buffer[1], chunks, tuning.pads,
             some, more, few, tile.entries == tile.size, tile.size, tile.chunk, tuning.fill_tile),
        )  # fmt: skip
        if entries <= min(held, one_shot):
            return Launches(length, blocks, buffer, sort, ahead=tuple(ahead))
        ahead.append(sort)

    many = entries * max(bins, 256) >= tuning.many_counts
    step = many + (many and entries > tuning.most_entries)
    chunk, chunks = tuning.chunks[step], max(1, -(-entries // tuning.chunks[step]))
    group = 1 if many else -(-chunks // tuning.max_rows)
    parts = -(-chunks // group)
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
    add_rows = max(1, tuning.scan_tile // bins)
    *fewer, sort = (
        Launch(
            place_kernel, chunks + tuning.pads + fills(tiles - ends[1]), tuning.num_warps,
            ("place", bins, one, *variant),
            (num_tokens, topk, num_experts, block_size, buffer[1], chunks, group, tuning.pads,
             ends[1], bins, _bits(tuning.chunks[one]), tuning.count_tile,
             add_rows if one == 0 else 0, tuning.fill_tile),
        )
        for one in range(step + 1)
    )  # fmt: skip
    ahead += fewer
    return Launches(length, blocks, buffer, sort, (parts + 1) * bins, count, scan, tuple(ahead))


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
