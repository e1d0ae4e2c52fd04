"""MoE sorting on the CPU: the embedded default, with AITER's policies and output contract.

Policy 1, one-shot: one stable sort of all entries by expert; few operations, so little overhead.
Policy 2, multi-phase: a counting sort in phases over chunks of the batch, each phase spread over
all cores: sort each chunk, count each chunk's experts, turn the counts into bases, scatter.
Policy 0 picks one-shot where its working set fits, as AITER's heuristic does.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from adaptive_moe.kernels.contract import TOKEN_BITS, buffer_length

# AITER's one-shot keeps its counters in a compute unit's 64 KiB of LDS; ours sorts 12 bytes an
# entry and is meant to stay within a core's own cache the same way.
ONE_SHOT_BYTES = 64 * 1024
ENTRY_BYTES = 12
MANY_EXPERTS = 512

# Entries a chunk: small enough for a core's first-level cache, large enough to pay for itself.
CHUNK = 2048


def moe_sorting(
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: torch.dtype,
    block_size: int = 32,
    expert_mask: Tensor | None = None,
    num_local_tokens: Tensor | None = None,
    dispatch_policy: int = 0,
    *,
    accumulate: bool = True,
    rounded: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sort routed tokens by expert; arguments and outputs as contract.py has them, `rounded` as its
    `buffer_length` has it.

    Any dispatch_policy but 0 and 1 is multi-phase, as in AITER. Raises ValueError for tensors that
    are not int32/float32 [M, topk] on the CPU.
    """
    _check(topk_ids, topk_weights, num_experts, block_size)
    num_rows, topk = topk_ids.shape
    local_tokens = num_rows if num_local_tokens is None else int(num_local_tokens[0])
    if dispatch_policy == 0:
        dispatch_policy = policy_zero(num_rows, topk, num_experts)

    ids = topk_ids[:local_tokens].reshape(-1)
    # Experts that are not here get the last key: they sort behind all others and fall off the end.
    hidden = (ids < 0) | (ids >= num_experts)
    if expert_mask is not None:
        hidden |= expert_mask[ids.clamp(0, num_experts - 1).long()] == 0
    keys = torch.where(hidden, num_experts, ids)
    rank = _one_shot if dispatch_policy == 1 else _multi_phase
    order, destination, counts = rank(keys, num_experts, block_size)

    length = buffer_length(num_rows, topk, num_experts, block_size, rounded=rounded)
    group_blocks = (counts + (block_size - 1)) // block_size
    total = int(group_blocks.sum()) * block_size
    sorted_ids = torch.empty(length, dtype=torch.int32)
    sorted_ids[:total] = (topk << TOKEN_BITS) | local_tokens
    sorted_ids[destination] = (order % topk << TOKEN_BITS | order // topk).int()
    sorted_weights = torch.empty(length, dtype=torch.float32)
    sorted_weights[destination] = topk_weights.reshape(-1)[order]
    local_index = torch.arange(num_experts, dtype=torch.int32)
    if expert_mask is not None:
        local_index = ((expert_mask != 0).cumsum(0) - 1).int()
    sorted_expert_ids = torch.empty(-(-length // block_size), dtype=torch.int32)
    sorted_expert_ids[: total // block_size] = local_index.repeat_interleave(group_blocks)
    num_valid_ids = torch.tensor([total, local_tokens], dtype=torch.int32)
    has_buffer = accumulate or expert_mask is not None
    moe_buf = torch.empty((num_rows, model_dim) if has_buffer else (0, 0), dtype=moebuf_dtype)
    moe_buf[:local_tokens] = 0
    return sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf


def policy_zero(num_tokens: int, topk: int, num_experts: int) -> int:
    """What policy 0 runs: 1 where the one-shot working set fits, else 2; many experts go to 2."""
    fits = num_tokens * topk * ENTRY_BYTES <= ONE_SHOT_BYTES
    return 1 if fits and num_experts < MANY_EXPERTS else 2


class _Ranks(NamedTuple):
    order: Tensor  # int64, flat (token, slot) index of each kept entry
    destination: Tensor  # int64, where in sorted_ids that entry goes
    counts: Tensor  # int64 [num_experts], entries of each expert


def _group_starts(counts: Tensor, block_size: int) -> Tensor:
    padded = (counts + (block_size - 1)) // block_size * block_size
    return padded.cumsum(0) - padded


def _one_shot(keys: Tensor, num_experts: int, block_size: int) -> _Ranks:
    counts = torch.bincount(keys, minlength=num_experts + 1)[:num_experts]
    keys, order = keys.sort(stable=True)
    kept = int(counts.sum())
    # Sorted entries are dense; each expert's group then moves to its padded start.
    shift = _group_starts(counts, block_size) - (counts.cumsum(0) - counts)
    destination = torch.arange(kept) + shift[keys[:kept].long()]
    return _Ranks(order[:kept], destination, counts)


def _multi_phase(keys: Tensor, num_experts: int, block_size: int) -> _Ranks:
    chunks = max(1, -(-keys.numel() // CHUNK))
    width = -(-keys.numel() // chunks) if keys.numel() else 1
    tail = chunks * width - keys.numel()
    grid = torch.nn.functional.pad(keys, (0, tail), value=num_experts).view(chunks, width)

    grid, order = grid.short().sort(dim=1, stable=True)
    bins = num_experts + 1
    row = torch.arange(chunks).unsqueeze(1)
    cells = (row * bins + grid).view(-1)
    histogram = torch.bincount(cells, minlength=chunks * bins).view(chunks, bins)
    counts = histogram[:, :num_experts].sum(0)
    # An entry's place: its expert's start, the earlier chunks' entries, its place in its own chunk.
    earlier_chunks = histogram.cumsum(0) - histogram
    earlier_in_row = histogram.cumsum(1) - histogram
    base = earlier_chunks - earlier_in_row
    base[:, :num_experts] += _group_starts(counts, block_size)
    destination = torch.arange(width) + base.view(-1)[cells].view(chunks, width)
    kept = grid < num_experts
    return _Ranks((order + row * width)[kept], destination[kept], counts)


def _check(topk_ids: Tensor, topk_weights: Tensor, num_experts: int, block_size: int) -> None:
    if topk_ids.ndim != 2 or topk_ids.dtype != torch.int32 or topk_ids.device.type != "cpu":
        raise ValueError(
            f"topk_ids is {topk_ids.dtype} {list(topk_ids.shape)} on {topk_ids.device}: "
            "give int32 [num_tokens, topk] on the CPU"
        )
    if topk_weights.shape != topk_ids.shape or topk_weights.dtype != torch.float32:
        raise ValueError(
            f"topk_weights is {topk_weights.dtype} {list(topk_weights.shape)}: "
            f"give float32 {list(topk_ids.shape)}"
        )
    if num_experts < 1 or block_size < 1:
        raise ValueError(
            f"num_experts={num_experts}, block_size={block_size}: both must be 1 or more"
        )
