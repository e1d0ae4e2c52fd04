"""What one calibration sorts: routed tokens, the expert mask, and how many rows are real.

Never a dummy batch's ids, which all name the same experts. Two kinds of routing are always mixed.
Uniform: every expert equally likely. Skewed: expert popularity falls off as 1/rank (Zipf), the way
trained routers concentrate. A token's experts are always distinct.

Every dtype is named: an engine may have set torch's default to bfloat16 for the whole process.
"""

import enum
from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive_moe.kernels.contract import SortingInputs
from adaptive_moe.policy.coverage import Coverage, Situation
from adaptive_moe.shape import SortingShape
from adaptive_moe.tuning.clocks import GRAPH_LOT, TRAIN_LENGTH

# Fractions of real rows where the row count is only a capacity, and the device holds the real one.
CAPACITY_FILLS = (1.0, 1 / 8, 1 / 64)
# From so many rows on no rows of -1 are made: AITER's multi-phase kernel for large batches takes
# ids as indices without comparing them (read in v0.1.4 to v0.1.20).
PADDED_BELOW = 2048
# Rows routed at a time: bounds the [rows, num_experts] scratch.
_ROUTED_AT_ONCE = 4096
# Batches begin at multiples of so many rows, where ids of 4 bytes lie at multiples of 16.
_ALIGNED_ROWS = 4


class Routing(enum.Enum):
    UNIFORM = "uniform"
    SKEWED = "skewed"
    ONE_EXPERT = "all to one"  # the worst case; for tests, not for timing


# A train alternates between these.
ROUTINGS = (Routing.UNIFORM, Routing.SKEWED)


@dataclass(frozen=True)
class RoutedTokens:
    """Rows for the largest batch; smaller batches are views of some of its rows.

    topk_ids int32 [max_tokens, topk], topk_weights float32 [max_tokens, topk], rows summing to 1.
    """

    topk_ids: Tensor
    topk_weights: Tensor


class Inputs:
    """Rows routed once, for the largest batch; every sort of a calibration is a view of some.

    The calls of a train begin at different rows, so that they find nothing of each other's in a
    cache; at most GRAPH_LOT tables are routed, as routing a large batch takes time and memory.
    """

    def __init__(self, coverage: Coverage, expert_mask: Tensor | None, device: torch.device):
        shape = coverage.shape
        self.coverage = coverage
        self.mask = default_mask(shape, device) if expert_mask is None else expert_mask
        self.rows = max((coverage.max_tokens, *coverage.captured))
        self.tables = [
            route(shape, self.rows, ROUTINGS[seed % len(ROUTINGS)], seed, device)
            for seed in range(GRAPH_LOT)
        ]
        self._known: dict[tuple[int, int, float], SortingInputs] = {}

    def train(self, situation: Situation, num_tokens: int, fill: float) -> list[SortingInputs]:
        """What one sample runs through, both routings alike."""
        return [self._call(i, num_tokens, fill) for i in range(TRAIN_LENGTH[situation])]

    def fills(self, situation: Situation, num_tokens: int) -> tuple[float, ...]:
        """Fractions of real rows to measure at.

        Several where the row count is a capacity. A captured size that is filled up with rows of -1
        serves the batches above the next smaller size: it is measured with as many real rows as
        they have on average.
        """
        if self.coverage.shape.num_local_tokens:
            return CAPACITY_FILLS
        padded = situation is Situation.GRAPH and self.coverage.padding_rows
        if not padded or num_tokens >= PADDED_BELOW:
            return (1.0,)
        sizes = self.coverage.captured
        place = bisect_left(sizes, num_tokens)
        least = sizes[place - 1] + 1 if place else 1
        return ((least + num_tokens) / 2 / num_tokens,)

    def _call(self, number: int, num_tokens: int, fill: float) -> SortingInputs:
        """The inputs of one call; the same object for the same number."""
        key = (number, num_tokens, fill)
        if key not in self._known:
            table = self.tables[number % len(self.tables)]
            first = (number // len(self.tables) * num_tokens) % (self.rows - num_tokens + 1)
            first -= first % _ALIGNED_ROWS
            shape = self.coverage.shape
            self._known[key] = sorting_inputs(shape, table, num_tokens, self.mask, fill, first)
        return self._known[key]


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
    for first in range(0, max_tokens, _ROUTED_AT_ONCE):
        rows = ids[first : first + _ROUTED_AT_ONCE]
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
