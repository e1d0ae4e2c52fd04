"""An exhaustive measurement of every policy, to judge a table by: dense, long and independent."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from adaptive_moe.kernels import SortKernel
from adaptive_moe.kernels.contract import SortingInputs
from adaptive_moe.routing import Routing, default_mask, route, sorting_inputs
from adaptive_moe.shape import SortingShape
from adaptive_moe.timing import CallMode, Clock, clock_for

ROUTINGS = (Routing.UNIFORM, Routing.SKEWED)
# Its own seeds: the oracle never sees the routing a calibration was made on.
FIRST_SEED = 1000

# Times that the whole sweep is gone through.
PASSES = 5

# A policy this far behind after two looks is measured no further in that pass; its look stands.
FAR_BEHIND = 6.0


@dataclass(frozen=True)
class OraclePoint:
    """us: each policy's time at num_tokens."""

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
    """Every policy at every count: `rounds` rounds, in PASSES passes over all counts.

    A policy's time is its mean over the passes: no count is judged by one moment of a machine that
    changes its speed from second to second.
    """
    largest = max(counts)
    tokens = [
        route(shape, largest, ROUTINGS[i % 2], FIRST_SEED + i, kernel.device) for i in range(4)
    ]
    mask = default_mask(shape, kernel.device)
    clock = clock_for(mode, kernel.device)
    passes: dict[int, list[dict[int, float]]] = {count: [] for count in counts}
    for _ in range(PASSES):
        for count in counts:
            train = [sorting_inputs(shape, t, count, mask) for t in tokens[: mode.train_length]]
            passes[count].append(_one_pass(kernel, clock, train, max(1, rounds // PASSES)))
    return [
        OraclePoint(count, {p: statistics.fmean(us[p] for us in found) for p in kernel.policies})
        for count, found in passes.items()
    ]


def _one_pass(
    kernel: SortKernel, clock: Clock, train: Sequence[SortingInputs], rounds: int
) -> dict[int, float]:
    """Each policy's time in us, from rounds of four interleaved visits each.

    A time is the second smallest of a round's visits; ratios to policy 0 are within rounds, and
    their median is the result.
    """
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
    ratios = {
        policy: statistics.median(a / b for a, b in zip(times[policy], times[0], strict=True))
        for policy in live
    }
    return first | {policy: base * ratio for policy, ratio in ratios.items()}
