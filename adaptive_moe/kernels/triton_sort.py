"""MoE sorting in Triton with AITER's output contract, as the policies that AITER's switch names.

`moe_sorting` groups the routed (token, slot) entries of a batch by expert and pads every group to
a multiple of `block_size`, so that each block of a grouped GEMM works for one expert. The policies
give the same answer and differ in how the work is laid out:

1  one-shot: a single launch, in which every program counts the whole batch by itself and then
   places its own chunk of it. Nothing is cheaper to launch, but every program's time grows with
   the batch: fastest up to 500 (512 experts) or 3,000 entries (128), hopeless with many more.
2  multi-phase: two launches and a workspace. The first counts experts per chunk of entries; in
   the second every chunk derives its own place from those counts. Pays for one more launch.
0  chooses between them by a rule (`one_shot_tokens`) that knows only the shape.

The kernels are in triton_kernels.py. Contract: ROCm/aiter, `aiter/fused_moe.py` and
`csrc/include/moe_sorting_opus.h`.
"""

import functools
from typing import Any

import torch
import triton

from adaptive_moe.kernels.contract import buffer_length
from adaptive_moe.kernels.triton_kernels import count_kernel, sort_kernel

# Tuned on an H100 (calibration/bench_triton_kernels.py). First, how many entries a program places
# at once, each compared with every other, and how many it counts at once. Counting a tile takes
# longer the more bins there are, so one-shot, which counts most, does it in smaller ones then.
FEW_BINS = 128
ONE_SHOT_FEW_BINS = (32, 512)
ONE_SHOT_MANY_BINS = (64, 256)
MULTI_PHASE = (128, 512)
MAX_CHUNKS = 256  # programs that place
MAX_ROWS = 64  # of counts, each of as few chunks as that allows; every program reads them all
PADS = 32  # programs that write padding
SCAN_TILE = 4096  # counts read at once
FILL_TILE = 2048  # elements of the output buffer zeroed at once
# Up to MANY_TILES of them are left to FEW_FILLS programs: more would crowd those that place.
FEW_FILLS, MANY_TILES, MAX_FILLS = 64, 2048, 65536
NUM_WARPS = 4

_BUFFER_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
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
    rounded: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort routed entries by expert, each expert's group padded to a multiple of `block_size`.

    topk_ids int32 and topk_weights float32, both [M, topk], contiguous, on the current device. Ids
    that are no expert, and experts that `expert_mask` (int32 [num_experts], 0 = on another rank)
    hides, are dropped. Where `num_local_tokens` (int32 [1]) is given, only so many rows are real;
    it is read on the device alone. With L real rows, the five results are

    sorted_ids int32 [buffer_length(..., rounded=rounded)]: `slot << 24 | token`, grouped by
        expert, in the order of the input within one; padding is `topk << 24 | L`
    sorted_weights float32, as long: the entry's weight; undefined at padding
    sorted_expert_ids int32 [one a block]: the expert, counted among the visible ones
    num_valid_ids int32 [2]: entries with padding, and L; what lies beyond them is undefined
    moe_buf [M, model_dim]: zeros; an empty [0, 0] where the caller reduces by itself
        (`accumulate=False`) and no expert is hidden

    Nothing waits for the device, so a call can be captured into a graph. The first call compiles:
    make one before with each policy (policy 0 runs either), with any number of tokens.
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
    length = buffer_length(num_tokens, topk, num_experts, block_size, rounded=rounded)
    sorted_ids = torch.empty(length, dtype=torch.int32, device=device)
    sorted_weights = torch.empty(length, dtype=torch.float32, device=device)
    sorted_expert_ids = torch.empty(-(-length // block_size), dtype=torch.int32, device=device)
    num_valid_ids = torch.empty(2, dtype=torch.int32, device=device)
    shape = (num_tokens, model_dim) if accumulate or expert_mask is not None else (0, 0)
    moe_buf = torch.empty(shape, dtype=moebuf_dtype, device=device)

    entries, size = num_tokens * topk, num_tokens * shape[1]
    bins = max(32, triton.next_power_of_2(num_experts))
    # On AMD, Triton addresses a buffer under 2 GiB with 32 bits.
    large = size * moebuf_dtype.itemsize >= 1 << 31
    variant = (device, moebuf_dtype, large, expert_mask is None, num_local_tokens is None, bins)
    tiles = -(-size // FILL_TILE)
    fills = min(tiles, FEW_FILLS if tiles <= MANY_TILES else MAX_FILLS)
    one_shot = dispatch_policy == 1 or (
        not dispatch_policy and num_tokens <= one_shot_tokens(num_experts)
    )
    chunk, count_tile = MULTI_PHASE
    if one_shot:
        chunk, count_tile = ONE_SHOT_FEW_BINS if bins <= FEW_BINS else ONE_SHOT_MANY_BINS
    chunks = max(1, min(-(-entries // chunk), MAX_CHUNKS))
    counts, group = None, 1
    if not one_shot:
        group = -(-chunks // MAX_ROWS)
        groups = -(-chunks // group)
        counts = torch.empty(groups * bins, dtype=torch.int32, device=device)
        _launch(
            count_kernel, groups, (2, *variant),
            (topk_ids, counts, num_local_tokens, num_tokens, topk, num_experts, chunks, group,
             bins, chunk, count_tile),
        )  # fmt: skip
    _launch(
        sort_kernel, chunks + PADS + fills, (1 if one_shot else 3, *variant),
        (topk_ids, topk_weights, counts, sorted_ids, sorted_weights, sorted_expert_ids,
         num_valid_ids, moe_buf, expert_mask, num_local_tokens, num_tokens, topk, num_experts,
         block_size, shape[1], chunks, group, PADS, bins, chunk, count_tile, SCAN_TILE // bins,
         FILL_TILE),
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
