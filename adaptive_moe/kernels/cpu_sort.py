"""MoE sorting on the CPU: the embedded default, with AITER's policies and output contract.

Policy 1, one-shot: one stable sort of all entries by expert.
Policy 2, multi-phase: a counting sort, in phases over a mesh of experts by entries: mark, count,
turn the counts into places, scatter. No comparison, but work for each expert.
Policy 0 picks one of them by a rule of AITER's kind, which knows nothing of this machine.

So they cross: where there are few experts the mesh wins from some token count on, and where it does
depends on the machine.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from adaptive_moe.kernels.contract import TOKEN_BITS, buffer_length

# AITER's one-shot counts in a compute unit's 64 KiB of LDS, so that its policy 0 takes one-shot up
# to a token count that falls with the number of experts: 904 for 8, 56 for 128, none from 512 on.
ONE_SHOT_BYTES, BYTES_A_COUNTER = 64 * 1024, 9
MANY_EXPERTS = 512


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
        dispatch_policy = policy_zero(num_rows, num_experts)

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
    slots, tokens = (torch.arange(n, dtype=torch.int32) for n in (topk, local_tokens))
    entries = (slots << TOKEN_BITS) | tokens.unsqueeze(1)
    sorted_ids[destination] = entries.view(-1)[order]
    sorted_weights = torch.empty(length, dtype=torch.float32)
    sorted_weights[destination] = topk_weights[:local_tokens].reshape(-1)[order]
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


def policy_zero(num_tokens: int, num_experts: int) -> int:
    """What policy 0 runs: 1 where AITER's counters would fit, else 2."""
    fits = num_tokens * num_experts * BYTES_A_COUNTER <= ONE_SHOT_BYTES
    return 1 if fits and num_experts < MANY_EXPERTS else 2


class _Ranks(NamedTuple):
    order: Tensor | slice  # which entries, flat over (token, slot), in this order
    destination: Tensor  # int64, where in sorted_ids each of them goes
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
    mesh = keys == torch.arange(num_experts, dtype=keys.dtype).unsqueeze(1)
    # An entry's place in its group: how many entries of its expert there are up to it.
    places = mesh.cumsum(1, dtype=torch.int32)
    counts = mesh.sum(1)
    all_kept = int(counts.sum()) == keys.numel()
    order = slice(None) if all_kept else (keys < num_experts).nonzero().view(-1)
    kept = keys[order].long()
    base = _group_starts(counts, block_size) - 1
    destination = places[:, order].gather(0, kept.unsqueeze(0))[0] + base[kept]
    return _Ranks(order, destination, counts)


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
