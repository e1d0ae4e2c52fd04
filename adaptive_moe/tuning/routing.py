"""Synthetic routing to time a sort on: never a dummy batch's ids, which all name the same experts.

Two kinds are always mixed. Uniform: every expert equally likely. Skewed: expert popularity falls
off as 1/rank (Zipf), the way trained routers concentrate. A token's experts are always distinct.

Every dtype is named: an engine may have set torch's default to bfloat16 for the whole process.
"""

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive_moe.kernels.contract import SortingInputs
from adaptive_moe.shape import SortingShape

# Rows routed at a time: bounds the [rows, num_experts] scratch.
_ROWS = 4096


class Routing(enum.Enum):
    UNIFORM = "uniform"
    SKEWED = "skewed"
    ONE_EXPERT = "all to one"  # the worst case; for tests, not for timing


@dataclass(frozen=True)
class RoutedTokens:
    """Rows for the largest batch; smaller batches are views of its first rows.

    topk_ids int32 [max_tokens, topk], topk_weights float32 [max_tokens, topk], rows summing to 1.
    """

    topk_ids: Tensor
    topk_weights: Tensor


def route(
    shape: SortingShape, max_tokens: int, routing: Routing, seed: int, device: torch.device
) -> RoutedTokens:
    """Routed rows on `device`, the same for a seed; torch's own generators stay untouched."""
    generator = torch.Generator(device).manual_seed(seed)
    popularity: Tensor | float = 0.0
    if routing is Routing.SKEWED:
        ranks = torch.randperm(shape.num_experts, generator=generator, device=device) + 1
        popularity = -torch.log(ranks.float())
    ids = torch.empty((max_tokens, shape.topk), dtype=torch.int32, device=device)
    for first in range(0, max_tokens, _ROWS):
        rows = ids[first : first + _ROWS]
        if routing is Routing.ONE_EXPERT:
            rows.copy_(torch.arange(shape.topk, dtype=torch.int32, device=device))
            continue
        noise = torch.rand(
            (rows.shape[0], shape.num_experts),
            generator=generator,
            dtype=torch.float32,
            device=device,
        )
        # Gumbel noise on log-popularity draws topk distinct experts in proportion to it.
        scores = noise.log_().neg_().log_().neg_().add_(popularity)
        rows.copy_(scores.topk(shape.topk, dim=1).indices)
    weights = torch.rand(
        (max_tokens, shape.topk), generator=generator, dtype=torch.float32, device=device
    )
    return RoutedTokens(ids, weights / weights.sum(1, keepdim=True))


def sorting_inputs(
    shape: SortingShape,
    tokens: RoutedTokens,
    num_tokens: int,
    expert_mask: Tensor | None,
    fill: float = 1.0,
    first: int = 0,
) -> SortingInputs:
    """num_tokens rows, from row `first` on, as one sort's arguments; `fill` of them real.

    The others lie behind the real ones: past num_local_tokens where the shape has one, else rows
    whose ids are -1, as engines fill a captured batch up to its size.
    """
    device = tokens.topk_ids.device
    rows = slice(first, first + num_tokens)
    topk_ids, local_tokens = tokens.topk_ids[rows], None
    real = max(1, round(fill * num_tokens))
    if shape.num_local_tokens:
        local_tokens = torch.tensor([real], dtype=torch.int32, device=device)
    elif real < num_tokens:
        topk_ids = topk_ids.clone()
        topk_ids[real:] = -1
    return SortingInputs(
        topk_ids=topk_ids,
        topk_weights=tokens.topk_weights[rows],
        num_experts=shape.num_experts,
        model_dim=shape.model_dim,
        dtype=getattr(torch, shape.dtype),
        block_size=shape.block_size,
        expert_mask=expert_mask,
        num_local_tokens=local_tokens,
    )


def default_mask(shape: SortingShape, device: torch.device) -> Tensor | None:
    """An expert-parallel rank's mask where the shape has one: its first local_experts experts."""
    if shape.local_experts is None:
        return None
    mask = torch.zeros(shape.num_experts, dtype=torch.int32, device=device)
    mask[: shape.local_experts] = 1
    return mask
