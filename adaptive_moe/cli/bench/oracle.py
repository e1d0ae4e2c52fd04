"""An exhaustive measurement of every policy, to judge a table by: dense, long and independent."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from adaptive_moe.kernels import SortKernel
from adaptive_moe.kernels.contract import SortingInputs
from adaptive_moe.shape import SortingShape
from adaptive_moe.tuning.clocks import CallMode, Clock, clock_for
from adaptive_moe.tuning.routing import Routing, default_mask, route, sorting_inputs

ROUTINGS = (Routing.UNIFORM, Routing.SKEWED)
# Its own seeds: the oracle never sees the routing a calibration was made on.
FIRST_SEED = 1000

# Rounds of one pass: a multiple of 2 and of 3, so that each policy opens as many as the others.
ROUNDS_A_PASS = 6

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
    kernel: SortKernel, shape: SortingShape, mode: CallMode, counts: Sequence[int], passes: int
) -> list[OraclePoint]:
    """Every policy at every count, in that many passes over all counts.

    A policy's time is its mean over the passes: no count is judged by one moment of a machine that
    changes its speed from second to second. Replays of graphs hardly feel that, and are a tenth as
    noisy: a quarter of the passes does.
    """
    largest = max(counts)
    tokens = [
        route(shape, largest, ROUTINGS[i % 2], FIRST_SEED + i, kernel.device) for i in range(4)
    ]
    mask = default_mask(shape, kernel.device)
    clock = clock_for(mode, kernel.device)
    timed: dict[int, list[dict[int, float]]] = {count: [] for count in counts}
    for _ in range(-(-passes // 4) if mode is CallMode.GRAPH else passes):
        for count in counts:
            train = [sorting_inputs(shape, t, count, mask) for t in tokens[: mode.train_length]]
            timed[count].append(_one_pass(kernel, clock, train))
    return [
        OraclePoint(count, {p: statistics.fmean(us[p] for us in found) for p in kernel.policies})
        for count, found in timed.items()
    ]


def _one_pass(kernel: SortKernel, clock: Clock, train: Sequence[SortingInputs]) -> dict[int, float]:
    """Each policy's time in us, from ROUNDS_A_PASS rounds of four interleaved visits each.

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
    for number in range(ROUNDS_A_PASS):
        turn = number % len(live)
        order = live[turn:] + live[:turn]
        # Each order of the policies comes equally often: a call right after itself is faster.
        sweep = order[::-1] if number // len(live) % 2 else order
        visits: dict[int, list[float]] = {policy: [] for policy in live}
        for policy in (sweep + sweep[::-1]) * 2:
            visits[policy].append(samplers[policy]())
        for policy in live:
            times[policy].append(sorted(visits[policy])[1])
    base = statistics.median(times[0])
    ratios = {
        policy: statistics.median(a / b for a, b in zip(times[policy], times[0], strict=True))
        for policy in live
    }
    return first | {policy: base * ratio for policy, ratio in ratios.items()}
