"""Synthetic routing to time a sort on: never a dummy batch's ids, which all name the same experts.

Two kinds are always mixed. Uniform: every expert equally likely. Skewed: expert popularity falls
off as 1/rank (Zipf), the way trained routers concentrate. A token's experts are always distinct.
"""

import enum
from collections.abc import Sequence
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
    popularity = torch.zeros(shape.num_experts, device=device)
    if routing is Routing.SKEWED:
        ranks = torch.randperm(shape.num_experts, generator=generator, device=device) + 1
        popularity = -torch.log(ranks.float())
    ids = torch.empty((max_tokens, shape.topk), dtype=torch.int32, device=device)
    for first in range(0, max_tokens, _ROWS):
        rows = ids[first : first + _ROWS]
        if routing is Routing.ONE_EXPERT:
            rows.copy_(torch.arange(shape.topk, device=device))
            continue
        noise = torch.rand(
            (rows.shape[0], shape.num_experts), generator=generator, device=device
        ).clamp_(1e-9, 1 - 1e-7)
        # Gumbel noise on log-popularity draws topk distinct experts in proportion to it.
        scores = noise.log_().neg_().log_().neg_().add_(popularity)
        rows.copy_(scores.topk(shape.topk, dim=1).indices)
    weights = torch.rand((max_tokens, shape.topk), generator=generator, device=device)
    return RoutedTokens(ids, weights / weights.sum(1, keepdim=True))


def sorting_inputs(
    shape: SortingShape,
    tokens: RoutedTokens,
    num_tokens: int,
    expert_mask: Tensor | None,
    fill: float = 1.0,
) -> SortingInputs:
    """The first num_tokens rows as one sort's arguments; `fill` of them real for padded shapes."""
    device = tokens.topk_ids.device
    local_tokens = None
    if shape.num_local_tokens:
        real = max(1, round(fill * num_tokens))
        local_tokens = torch.tensor([real], dtype=torch.int32, device=device)
    return SortingInputs(
        topk_ids=tokens.topk_ids[:num_tokens],
        topk_weights=tokens.topk_weights[:num_tokens],
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
    experts = torch.arange(shape.num_experts, device=device)
    return (experts < shape.local_experts).int()


def fills(shape: SortingShape) -> Sequence[float]:
    """Fractions of real rows to measure at: several where the row count is only a capacity."""
    return (1.0, 1 / 8, 1 / 64) if shape.num_local_tokens else (1.0,)
