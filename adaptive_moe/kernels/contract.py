"""The output contract of MoE sorting, and the comparison of a candidate with the baseline.

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
    moe_buf            [M, model_dim], rows before L zero and the others undefined; or an empty
                       placeholder where the caller reduces itself
Only the first num_valid_ids[0] entries (and their blocks) are defined. Ids that are no expert, such
as the -1 of the rows that engines pad a batch with, are dropped like those of hidden experts.

Source: ROCm/aiter, `aiter/fused_moe.py` and `csrc/include/moe_sorting_opus.h`, main of 2026-08-22.
Its kernels write L into padding entries where its Python reference writes M: consumers test only
that the token is not below L.
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

    moe_buf is as large as the batch's activations, so only its dtype and shape are kept, and which
    of its rows are not zero (bool [M]). `others` are the outputs after it: the local ids.
    """

    sorted_ids: Tensor
    sorted_weights: Tensor
    sorted_expert_ids: Tensor
    num_valid_ids: Tensor
    buffer: tuple[torch.dtype, tuple[int, ...]]
    dirty_rows: Tensor
    others: tuple[Tensor, ...]


def expected(outputs: Sequence[Tensor]) -> Expected:
    """The baseline's outputs, to compare others with; ValueError where they are not a sort's."""
    if len(outputs) < 5:
        raise ValueError(f"the baseline returned {len(outputs)} outputs, not five or more")
    ids, weights, experts, valid, moe_buf, *others = outputs
    buffer = (moe_buf.dtype, tuple(moe_buf.shape))
    return Expected(ids, weights, experts, valid, buffer, _dirty_rows(moe_buf), tuple(others))


@dataclass(frozen=True)
class Comparison:
    """One sort's outputs beside the baseline's, as far as it is known without waiting.

    problems  sentences that the host can say already
    words     on the device, int32: num_valid_ids of both, and a flag for each of `flags`; None
              where there are problems
    flags     what each flag means
    """

    problems: tuple[str, ...]
    words: Tensor | None = None
    flags: tuple[str, ...] = ()


def differences(comparisons: Sequence[Comparison]) -> list[list[str]]:
    """In what each differs from the baseline, one sentence each; empty where a consumer reads the
    same. Waits for the device once, for all of them."""
    waiting = [c.words for c in comparisons if c.words is not None]
    numbers = iter(torch.cat(waiting).tolist() if waiting else ())
    found = []
    for one in comparisons:
        if one.words is None:
            found.append(list(one.problems))
            continue
        ours, theirs = ([next(numbers), next(numbers)] for _ in range(2))
        wrong = [problem for problem in one.flags if next(numbers)]
        if ours != theirs:
            wrong = [f"num_valid_ids is {ours}, the baseline's {theirs}"]
        found.append(wrong)
    return found


def compare(right: Expected, outputs: Sequence[Tensor], inputs: SortingInputs) -> Comparison:
    """Compare what a consumer reads of a sort's outputs with the baseline's, without waiting.

    Compared are both counts of num_valid_ids, the entries before the first of them, their weights
    and their blocks' experts, and of moe_buf and what follows it the rows that are real. Padding
    entries only have to be padding, and buffers only long enough.
    """
    number = 5 + len(right.others)
    if not isinstance(outputs, tuple | list) or len(outputs) != number:
        return Comparison(
            (f"returned {_kind(outputs)}, where the baseline returns {number} outputs",)
        )
    ids, weights, experts, valid, moe_buf, *others = outputs
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
    problems += [
        f"output {number} is {ours.dtype} {list(ours.shape)}, the baseline's {theirs.dtype} "
        f"{list(theirs.shape)}"
        for number, (ours, theirs) in enumerate(zip(others, right.others, strict=True), 6)
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape
    ]
    if (moe_buf.dtype, tuple(moe_buf.shape)) != right.buffer:
        problems.append("moe_buf has another dtype or shape")
    problems += [
        f"output {number} is not contiguous"
        for number, output in enumerate(outputs, 1)
        if not output.is_contiguous()
    ]
    if problems:
        return Comparison(tuple(problems))

    # On the device, up to counts that only it knows.
    total, real = right.num_valid_ids[0], right.num_valid_ids[1]
    their_ids, their_experts = right.sorted_ids, right.sorted_expert_ids
    place = torch.arange(len(their_ids), device=ids.device)
    block_start = torch.arange(len(their_experts), device=ids.device) * inputs.block_size
    row = torch.arange(inputs.topk_ids.shape[0], device=ids.device)
    ids, weights, experts = ids[: len(place)], weights[: len(place)], experts[: len(block_start)]
    topk = inputs.topk_ids.shape[1]
    padding = their_ids >> TOKEN_BITS == topk
    is_padding = (ids >> TOKEN_BITS == topk) & (ids & TOKEN_MASK >= real)
    differ = {
        "sorted_ids has other entries": (place < total)
        & ~torch.where(padding, is_padding, ids == their_ids),
        "sorted_weights has other entries": (place < total)
        & ~padding
        & (weights != right.sorted_weights),
        "sorted_expert_ids has other experts": (block_start < total) & (experts != their_experts),
        "moe_buf has other content": _of_rows(_dirty_rows(moe_buf) != right.dirty_rows, row < real),
    }
    for number, (ours, theirs) in enumerate(zip(others, right.others, strict=True), 6):
        differ[f"output {number} has other content"] = _of_rows(ours != theirs, row < real)
    flags = torch.stack([one.any() for one in differ.values()]).int()
    words = torch.cat((valid[:2], right.num_valid_ids[:2], flags))
    return Comparison((), words, tuple(differ))


def _dirty_rows(moe_buf: Tensor) -> Tensor:
    # NaN is true as a bool, so poison that was left shows here as well.
    return moe_buf.any(1) if moe_buf.dim() == 2 else moe_buf.any().view(1)


def _of_rows(differs: Tensor, is_real: Tensor) -> Tensor:
    """`differs` in real rows alone, where it has a row for each of the batch's; else all of it."""
    if differs.shape[:1] != is_real.shape:
        return differs
    return differs & is_real.view(-1, *(1 for _ in differs.shape[1:]))


def _kind(outputs: object) -> str:
    count = f" of {len(outputs)}" if isinstance(outputs, tuple | list) else ""
    return f"{type(outputs).__name__}{count}"
