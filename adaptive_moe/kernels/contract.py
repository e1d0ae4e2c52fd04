"""The output contract of MoE sorting, and a checker of it that knows no kernel.

Inputs (M rows, on one device): topk_ids int32 [M, topk]; topk_weights float32 [M, topk];
expert_mask int32 [num_experts], 0 where another rank has the expert, or None; num_local_tokens
int32 [1], how many rows are real, or None for all M.

Outputs, with L = num_local_tokens or M:
    sorted_ids         int32 [buffer_length(...)]: `(slot << 24) | token`, grouped by expert in
                       expert order, token-ascending within an expert; each group is padded to a
                       multiple of block_size with `(topk << 24) | L`
    sorted_weights     float32, same length: the weight of each entry that is not padding
    sorted_expert_ids  int32 [ceil(len / block_size)]: one expert a block, as the local index where
                       expert_mask hides experts
    num_valid_ids      int32 [2]: entries that are defined (padding included), and L
    moe_buf            [M, model_dim] zeros, or an empty placeholder where the caller reduces itself
Only the first num_valid_ids[0] entries (and their blocks) are defined. Ids that are no expert, such
as the -1 of the rows that engines pad a batch with, are dropped like those of hidden experts.

Source: ROCm/aiter, `aiter/fused_moe.py` and `csrc/include/moe_sorting_opus.h`, main of 2026-08-22.
Its kernels write L into padding entries where its Python reference writes M; consumers test only
that the token is not below L, and so does this checker.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

TOKEN_BITS = 24
TOKEN_MASK = (1 << TOKEN_BITS) - 1


def buffer_length(
    num_tokens: int, topk: int, num_experts: int, block_size: int, *, rounded: bool
) -> int:
    """Entries to allocate for sorted_ids and sorted_weights: enough for whatever the routing is.

    rounded: up to whole blocks, as AITER allocates since ROCm/aiter#5573 (v0.1.22.post1).
    """
    length = num_tokens * topk + num_experts * block_size - topk
    return -(-length // block_size) * block_size if rounded else length


@dataclass(frozen=True)
class SortingInputs:
    """The arguments of one sort, in AITER's order."""

    topk_ids: Tensor
    topk_weights: Tensor
    num_experts: int
    model_dim: int
    dtype: torch.dtype
    block_size: int
    expert_mask: Tensor | None = None
    num_local_tokens: Tensor | None = None

    def arguments(self, dispatch_policy: object) -> tuple[object, ...]:
        """Positional arguments up to and including dispatch_policy, the ninth."""
        return (
            self.topk_ids,
            self.topk_weights,
            self.num_experts,
            self.model_dim,
            self.dtype,
            self.block_size,
            self.expert_mask,
            self.num_local_tokens,
            dispatch_policy,
        )


_poisoning = threading.RLock()


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within it torch.empty returns NaN or the largest integer, so that a kernel that leaves an
    output unwritten is seen. Every flag of torch is after it what it was before.

    One at a time in a process: the flags are the process's.

    Not by torch.use_deterministic_algorithms: that imports torch's compiler, which takes seconds,
    and sets a flag of it that it never sets back.
    """
    with _poisoning:
        yield from _poisoned()


def _poisoned() -> Iterator[None]:
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch._C._get_deterministic_fill_uninitialized_memory()
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    torch._C._set_deterministic_fill_uninitialized_memory(True)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(enabled, warn_only=warn_only)
        torch._C._set_deterministic_fill_uninitialized_memory(fill)


@dataclass(frozen=True)
class Expected:
    """What the baseline returned for some inputs, as far as a consumer reads it.

    The first four outputs, and of moe_buf and whatever follows it only what can be compared without
    keeping it: moe_buf is as large as the batch's activations.
    """

    sorted_ids: Tensor
    sorted_weights: Tensor
    sorted_expert_ids: Tensor
    num_valid_ids: Tensor
    moe_buf: tuple[torch.dtype, tuple[int, ...], bool]
    outputs: int


def expected(outputs: Sequence[Tensor]) -> Expected:
    """The baseline's outputs, to compare others with; ValueError where they are not a sort's."""
    if len(outputs) < 5:
        raise ValueError(f"the baseline returned {len(outputs)} outputs, not five or more")
    ids, weights, experts, valid, moe_buf = outputs[:5]
    return Expected(ids, weights, experts, valid, _buffer_facts(moe_buf), len(outputs))


def differences_from(
    right: Expected, outputs: Sequence[Tensor], inputs: SortingInputs
) -> list[str]:
    """In what the outputs differ from the baseline's, one sentence each; empty where a consumer
    reads the same.

    Compared are both counts of num_valid_ids, the entries before the first of them, their weights
    and their blocks' experts, and moe_buf. Padding entries only have to be padding, and buffers
    only long enough. Synchronises with the device.
    """
    if not isinstance(outputs, tuple | list) or len(outputs) != right.outputs:
        return [f"returned {_kind(outputs)}, where the baseline returns {right.outputs} outputs"]
    ids, weights, experts, valid = outputs[:4]
    problems = [
        f"{name} is {ours.dtype} {list(ours.shape)}, the baseline's {theirs.dtype} "
        f"{list(theirs.shape)}"
        for name, ours, theirs in (
            ("sorted_ids", ids, right.sorted_ids),
            ("sorted_weights", weights, right.sorted_weights),
            ("sorted_expert_ids", experts, right.sorted_expert_ids),
            ("num_valid_ids", valid, right.num_valid_ids),
        )
        if ours.dtype != theirs.dtype or ours.dim() != 1 or len(ours) < len(theirs)
    ]
    if _buffer_facts(outputs[4]) != right.moe_buf:
        problems.append("moe_buf has another dtype, shape or content")
    if problems:
        return problems
    ours, theirs = torch.stack((valid[:2], right.num_valid_ids[:2])).tolist()
    if ours != theirs:
        return [f"num_valid_ids is {ours}, the baseline's {theirs}"]
    total, blocks = ours[0], -(-ours[0] // inputs.block_size)
    topk = inputs.topk_ids.shape[1]
    padding = right.sorted_ids[:total] >> TOKEN_BITS == topk
    same = {
        "sorted_ids has other entries": torch.where(
            padding, ids[:total] >> TOKEN_BITS == topk, ids[:total] == right.sorted_ids[:total]
        ),
        "sorted_weights has other entries": padding
        | (weights[:total] == right.sorted_weights[:total]),
        "sorted_expert_ids has other experts": experts[:blocks] == right.sorted_expert_ids[:blocks],
    }
    # One wait for the device for all of them: a calibration compares hundreds of sorts.
    alike = torch.stack([one.all() for one in same.values()]).tolist()
    return [problem for problem, fine in zip(same, alike, strict=True) if not fine]


def _buffer_facts(moe_buf: Tensor) -> tuple[torch.dtype, tuple[int, ...], bool]:
    # NaN is true as a bool, so poison that was left shows here as well.
    return moe_buf.dtype, tuple(moe_buf.shape), not bool(moe_buf.any())


def _kind(outputs: object) -> str:
    count = f" of {len(outputs)}" if isinstance(outputs, tuple | list) else ""
    return f"{type(outputs).__name__}{count}"


def check_contract(
    inputs: SortingInputs,
    outputs: tuple[Tensor, ...],
    *,
    accumulate: bool = True,
    right: Sequence[Tensor] | None = None,
) -> list[str]:
    """What is wrong with the outputs, one sentence each; empty where the contract holds.

    right: the first four outputs of another sort of these inputs that was checked and had nothing
    wrong with it. What equals it is right, too, and that takes a fraction of the time to see.
    Synchronises with the device and reads num_local_tokens: for warm-up and tests only.
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
    problems += _check_moe_buf(inputs, moe_buf, accumulate)
    if problems or (right is not None and _equal(right, outputs, inputs)):
        return problems

    local_tokens = num_rows
    if inputs.num_local_tokens is not None:
        local_tokens = int(inputs.num_local_tokens.item())
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


def _equal(right: Sequence[Tensor], outputs: Sequence[Tensor], inputs: SortingInputs) -> bool:
    """Are the sorted parts the same, as far as they are defined?"""
    total = int(right[3][0])
    defined = (total, total, -(-total // inputs.block_size), 2)
    (ids, weights, experts, valid), theirs = (
        [tensor[:size] for tensor, size in zip(some, defined, strict=False)]
        for some in (right, outputs)
    )
    padding = ids >> TOKEN_BITS == inputs.topk_ids.shape[1]
    same = (ids == theirs[0]).all() & ((weights == theirs[1]) | padding).all()
    return bool(same & (experts == theirs[2]).all() & (valid == theirs[3]).all())


def _check_moe_buf(inputs: SortingInputs, moe_buf: Tensor, accumulate: bool) -> list[str]:
    if not accumulate and inputs.expert_mask is None:
        return [] if moe_buf.numel() == 0 else ["moe_buf is not an empty placeholder"]
    wanted = [inputs.topk_ids.shape[0], inputs.model_dim]
    if moe_buf.dtype != inputs.dtype or list(moe_buf.shape) != wanted:
        return [f"moe_buf is {moe_buf.dtype} {list(moe_buf.shape)}, not {inputs.dtype} {wanted}"]
    # NaN is true as a bool, so poison that was left shows here as well.
    return ["moe_buf is not zeroed"] if bool(moe_buf.any()) else []
