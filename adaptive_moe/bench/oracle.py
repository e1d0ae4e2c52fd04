"""An exhaustive measurement of every policy, to judge a table by: dense, long and independent."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from adaptive_moe.kernels import SortKernel
from adaptive_moe.routing import Routing, default_mask, route, sorting_inputs
from adaptive_moe.shape import SortingShape
from adaptive_moe.timing import CallMode, clock_for

ROUTINGS = (Routing.UNIFORM, Routing.SKEWED)
# Its own seeds: the oracle never sees the routing a calibration was made on.
FIRST_SEED = 1000

# A policy this far behind after two looks is measured no further; its last look stands.
FAR_BEHIND = 6.0


@dataclass(frozen=True)
class OraclePoint:
    """us: each policy's time at num_tokens, from within-round ratios to policy 0."""

    num_tokens: int
    us: dict[int, float]

    def spread(self) -> float:
        return max(self.us.values()) / min(self.us.values())


def dense_counts(max_tokens: int, per_octave: int) -> list[int]:
    """1..max_tokens, every count at first, then per_octave a doubling."""
    steps = int(math.log2(max_tokens) * per_octave) + 1
    counts = {round(2 ** (i / per_octave)) for i in range(steps)} | {max_tokens}
    return sorted(c for c in counts if c <= max_tokens)


def measure_oracle(
    kernel: SortKernel, shape: SortingShape, mode: CallMode, counts: Sequence[int], rounds: int
) -> list[OraclePoint]:
    """Every policy at every count, `rounds` rounds of four interleaved visits each.

    A time is the second smallest of a round's visits; ratios are within rounds, their median is
    the result.
    """
    largest = max(counts)
    tokens = [
        route(shape, largest, ROUTINGS[i % 2], FIRST_SEED + i, kernel.device) for i in range(4)
    ]
    mask = default_mask(shape, kernel.device)
    clock = clock_for(mode, kernel.device)
    points = []
    for num_tokens in counts:
        train = [sorting_inputs(shape, t, num_tokens, mask) for t in tokens[: mode.train_length]]
        samplers = {
            policy: clock.prepare(
                [partial(kernel.moe_sorting, *inputs.arguments(policy)) for inputs in train]
            )
            for policy in kernel.policies
        }
        first = {policy: min(sample(), sample()) for policy, sample in samplers.items()}
        best = min(first.values())
        live = [p for p in kernel.policies if p == 0 or first[p] <= FAR_BEHIND * best]
        times: dict[int, list[float]] = {policy: [] for policy in live}
        for _ in range(rounds):
            visits: dict[int, list[float]] = {policy: [] for policy in live}
            for order in (live, live[::-1], live[1:] + live[:1], live[::-1]):
                for policy in order:
                    visits[policy].append(samplers[policy]())
            for policy in live:
                times[policy].append(sorted(visits[policy])[1])
            live = live[1:] + live[:1]
        base = statistics.median(times[0])
        us = {
            policy: base
            * statistics.median(a / b for a, b in zip(times[policy], times[0], strict=True))
            for policy in live
        }
        points.append(OraclePoint(num_tokens, {**first, **us}))
    return points
