"""What one calibration sorts: routed tokens, the expert mask, and how many rows are real."""

from bisect import bisect_left

import torch
from torch import Tensor

from adaptive_moe.kernels.contract import SortingInputs
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.situation import Situation
from adaptive_moe.tuning.clocks import GRAPH_LOT, TRAIN_LENGTH
from adaptive_moe.tuning.routing import Routing, default_mask, route, sorting_inputs

# A train alternates between these.
ROUTINGS = (Routing.UNIFORM, Routing.SKEWED)

# Fractions of real rows where the row count is only a capacity, and the device holds the real one.
CAPACITY_FILLS = (1.0, 1 / 8, 1 / 64)


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
        return [self.one(i, num_tokens, fill) for i in range(TRAIN_LENGTH[situation])]

    def one(self, number: int, num_tokens: int, fill: float) -> SortingInputs:
        """The inputs of one call; the same for the same number."""
        key = (number, num_tokens, fill)
        if key not in self._known:
            table = self.tables[number % len(self.tables)]
            first = (number // len(self.tables) * num_tokens) % (self.rows - num_tokens + 1)
            shape = self.coverage.shape
            self._known[key] = sorting_inputs(shape, table, num_tokens, self.mask, fill, first)
        return self._known[key]

    def fills(self, situation: Situation, num_tokens: int) -> tuple[float, ...]:
        """Fractions of real rows to measure at.

        Several where the row count is a capacity. A captured size that is filled up with rows of -1
        serves the batches above the next smaller size: it is measured with as many real rows as
        they have on average.
        """
        if self.coverage.shape.num_local_tokens:
            return CAPACITY_FILLS
        if situation is not Situation.GRAPH or not self.coverage.padding_rows:
            return (1.0,)
        sizes = self.coverage.captured
        place = bisect_left(sizes, num_tokens)
        least = sizes[place - 1] + 1 if place else 1
        return ((least + num_tokens) / 2 / num_tokens,)
