"""Sorts that would have taken the GPU down, had they reached AITER's own kernels.

One-shot sorts as many tokens in turn as fit into LDS; where none fit its loop does not end. Before
the September of 2026 some kernels indexed with an expert id of -1, a row of padding.
"""

import torch

from aiter.version import since

# Fewer tokens are sorted by other multi-phase kernels, which compare ids and never index with them.
MANY_TOKENS = {"ck": 2048, "opus": 2048, "flydsl": 2049}
MANY_EXPERTS = 512


def hazard(
    topk_ids: torch.Tensor, num_experts: int, policy: object, backend: str, padded: bool
) -> str | None:
    """What would have become of the GPU; None where nothing. `padded`: there are ids of -1."""
    num_tokens, rows = len(topk_ids), one_shot_rows(num_experts)
    fits = num_tokens <= rows and num_experts < MANY_EXPERTS
    one_shot = backend != "flydsl" and (policy == 1 or (policy == 0 and fits))
    if one_shot and rows == 0:
        return f"one-shot hangs with {num_experts} experts"
    if not padded or since("september"):
        return None
    if one_shot and num_tokens > rows:
        return "one-shot in turns writes before its rows"
    if not one_shot and num_tokens >= MANY_TOKENS[backend]:
        return f"{backend} writes before its mesh"
    return None


def one_shot_rows(num_experts: int) -> int:
    """How many tokens one-shot sorts at once in 64 KiB: counters for each of them and expert."""
    return max(0, 64 * 1024 // 8 // (num_experts + 1) - 2) // 8 * 8
