"""A checker of the output contract of MoE sorting that knows no kernel: it proves our own sorts.

kernels/contract.py says what the contract is. Used by the tests and by calibration.wave64.
"""

import torch
from torch import Tensor

from adaptive_moe.kernels.contract import (
    TOKEN_BITS,
    TOKEN_MASK,
    SortingInputs,
    buffer_length,
)


def check_contract(
    inputs: SortingInputs,
    outputs: tuple[Tensor, ...],
    *,
    accumulate: bool = True,
) -> list[str]:
    """What is wrong with the outputs, one sentence each; empty where the contract holds.

    Synchronises with the device and reads num_local_tokens.
    """
    if not isinstance(outputs, tuple) or len(outputs) < 5:
        return [f"returned {type(outputs).__name__}, not the five outputs"]
    sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf = outputs[:5]
    num_rows, topk = inputs.topk_ids.shape
    # Longer buffers are right, too: a consumer goes by num_valid_ids and must only not overrun.
    length = buffer_length(num_rows, topk, inputs.num_experts, inputs.block_size, rounded=False)
    blocks = -(-length // inputs.block_size)
    problems = [
        f"{name} is {given.dtype} {list(given.shape)}, not {dtype} of {size} elements or more"
        for name, given, dtype, size in (
            ("sorted_ids", sorted_ids, torch.int32, length),
            ("sorted_weights", sorted_weights, torch.float32, length),
            ("sorted_expert_ids", sorted_expert_ids, torch.int32, blocks),
            ("num_valid_ids", num_valid_ids, torch.int32, 2),
        )
        if given.dtype != dtype or given.ndim != 1 or len(given) < size
    ]
    local_tokens = num_rows
    if inputs.num_local_tokens is not None:
        local_tokens = int(inputs.num_local_tokens.item())
    problems += _check_moe_buf(inputs, moe_buf, accumulate, local_tokens)
    if problems:
        return problems

    kept = torch.ones(inputs.num_experts, dtype=torch.bool, device=sorted_ids.device)
    if inputs.expert_mask is not None:
        kept = inputs.expert_mask.to(sorted_ids.device) != 0
    ids = inputs.topk_ids[:local_tokens].long()
    real = (ids >= 0) & (ids < inputs.num_experts)
    real &= kept[ids.clamp(0, inputs.num_experts - 1)]
    counts = torch.bincount(ids[real], minlength=inputs.num_experts)
    group_blocks = -(-counts // inputs.block_size)
    total = int(group_blocks.sum()) * inputs.block_size
    if num_valid_ids[:2].tolist() != [total, local_tokens]:
        return [f"num_valid_ids is {num_valid_ids.tolist()}, not {[total, local_tokens]}"]

    block_experts = torch.repeat_interleave(
        torch.arange(inputs.num_experts, device=ids.device), group_blocks
    )
    local_index = kept.long().cumsum(0) - 1
    if not torch.equal(sorted_expert_ids[: len(block_experts)].long(), local_index[block_experts]):
        problems.append("sorted_expert_ids names the wrong expert of a block")

    entries = sorted_ids[:total].long()
    token, slot = entries & TOKEN_MASK, entries >> TOKEN_BITS
    # How far into its expert's group an entry lies decides whether it must be padding.
    group_start = (group_blocks.cumsum(0) - group_blocks) * inputs.block_size
    expert = block_experts.repeat_interleave(inputs.block_size)
    position = torch.arange(total, device=ids.device) - group_start[expert]
    padding = position >= counts[expert]
    if not bool(((slot[padding] == topk) & (token[padding] >= local_tokens)).all()):
        problems.append("a group's tail does not hold padding entries")
    token, slot, expert = token[~padding], slot[~padding], expert[~padding]
    if not bool(((slot >= 0) & (slot < topk) & (token < local_tokens)).all()):
        return [*problems, "sorted_ids holds an entry that is no token of the batch"]
    if not torch.equal(ids[token, slot], expert):
        problems.append("sorted_ids puts an entry under an expert it was not routed to")
    elif torch.unique(token * topk + slot).numel() != token.numel():
        problems.append("sorted_ids holds an entry twice and misses another")
    if bool(((expert[1:] == expert[:-1]) & (token[1:] < token[:-1])).any()):
        problems.append("sorted_ids is not token-ascending within an expert")
    if not torch.equal(sorted_weights[:total][~padding], inputs.topk_weights[token, slot]):
        problems.append("sorted_weights does not hold its entry's weight")
    return problems


def _check_moe_buf(
    inputs: SortingInputs, moe_buf: Tensor, accumulate: bool, local_tokens: int
) -> list[str]:
    if not accumulate and inputs.expert_mask is None:
        return [] if moe_buf.numel() == 0 else ["moe_buf is not an empty placeholder"]
    wanted = [inputs.topk_ids.shape[0], inputs.model_dim]
    if moe_buf.dtype != inputs.dtype or list(moe_buf.shape) != wanted:
        return [f"moe_buf is {moe_buf.dtype} {list(moe_buf.shape)}, not {inputs.dtype} {wanted}"]
    # NaN is true as a bool, so poison that was left shows here as well.
    return ["moe_buf is not zeroed"] if bool(moe_buf[:local_tokens].any()) else []
