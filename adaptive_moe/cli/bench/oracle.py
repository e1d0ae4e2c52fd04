"""An exhaustive measurement of every candidate, to judge a table by: dense, long, independent."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adaptive_moe.kernels import Candidate, SortKernel
from adaptive_moe.kernels.contract import SortingInputs
from adaptive_moe.policy.situation import Situation
from adaptive_moe.shape import SortingShape
from adaptive_moe.tuning.clocks import TRAIN_LENGTH, Clock, at_once, clock_for
from adaptive_moe.tuning.routing import Routing, default_mask, route, sorting_inputs

ROUTINGS = (Routing.UNIFORM, Routing.SKEWED)
# Its own seeds: the oracle never sees the routing a calibration was made on.
FIRST_SEED = 1000

# Rounds of one pass: a multiple of 2 and of 3, so that each of three candidates opens as many.
ROUNDS_A_PASS = 6

# A candidate this far behind after two looks is measured no further in that pass; its look stands.
FAR_BEHIND = 6.0


@dataclass(frozen=True)
class OraclePoint:
    """us: each candidate's time at num_tokens; halves: the same by every other pass, and by the
    passes between, or nothing."""

    num_tokens: int
    us: dict[str, float]
    halves: tuple[Mapping[str, float], ...] = ()

    def spread(self) -> float:
        return max(self.us.values()) / min(self.us.values())

    def over_best(self, name: str) -> float:
        """The candidate's time over the best one's, who is named by one half of the passes and
        timed by the other: the fastest of equals is so by luck, which no other can match."""
        if not self.halves:
            return self.us[name] / min(self.us.values())
        ratios = [
            timed[name] / timed[min(named, key=named.__getitem__)]
            for named, timed in itertools.permutations(self.halves)
        ]
        return statistics.fmean(ratios)


def dense_counts(max_tokens: int, per_octave: int) -> list[int]:
    """1..max_tokens, every count at first, then per_octave a doubling."""
    steps = int(math.log2(max_tokens) * per_octave) + 1
    counts = {round(2 ** (i / per_octave)) for i in range(steps)} | {max_tokens}
    return sorted(c for c in counts if c <= max_tokens)


def measure_oracle(
    kernel: SortKernel,
    shape: SortingShape,
    situation: Situation,
    counts: Sequence[int],
    passes: int,
) -> list[OraclePoint]:
    """Every candidate at every count, in that many passes over all counts.

    A candidate's time is its mean over the passes: no count is judged by one moment of a machine
    that changes its speed from second to second. Replays of graphs hardly feel that, and are a
    tenth as noisy: a quarter of the passes does.
    """
    largest = max(counts)
    length = TRAIN_LENGTH[situation]
    tokens = [
        route(shape, largest, ROUTINGS[i % 2], FIRST_SEED + i, kernel.device) for i in range(length)
    ]
    mask = default_mask(shape, kernel.device)
    clock = clock_for(situation, kernel.device)
    timed: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    for _ in range(-(-passes // 4) if situation is Situation.GRAPH else passes):
        for count in counts:
            train = [sorting_inputs(shape, t, count, mask) for t in tokens]
            timed[count].append(_one_pass(kernel.candidates, clock, train))
    return [
        OraclePoint(
            count, _mean(found), (_mean(found[::2]), _mean(found[1::2])) if found[1:] else ()
        )
        for count, found in timed.items()
    ]


def _mean(passes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(us[name] for us in passes) for name in passes[0]}


def _one_pass(
    candidates: Sequence[Candidate], clock: Clock, train: Sequence[SortingInputs]
) -> dict[str, float]:
    """Each candidate's time in us, from ROUNDS_A_PASS rounds of four interleaved visits each.

    A time is the second smallest of a round's visits; ratios to the baseline are within rounds, and
    their median is the result.
    """
    baseline = candidates[0].name
    samplers = {
        candidate.name: at_once(clock.prepare([candidate.bind(inputs) for inputs in train]))
        for candidate in candidates
    }
    first = {name: min(sample(), sample()) for name, sample in samplers.items()}
    best = min(first.values())
    live = [name for name in first if name == baseline or first[name] <= FAR_BEHIND * best]
    times: dict[str, list[float]] = {name: [] for name in live}
    for number in range(ROUNDS_A_PASS):
        turn = number % len(live)
        order = live[turn:] + live[:turn]
        # Each order of the candidates comes equally often: a call right after itself is faster.
        sweep = order[::-1] if number // len(live) % 2 else order
        visits: dict[str, list[float]] = {name: [] for name in live}
        for name in (sweep + sweep[::-1]) * 2:
            visits[name].append(samplers[name]())
        for name in live:
            times[name].append(sorted(visits[name])[1])
    base = statistics.median(times[baseline])
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[name], times[baseline], strict=True))
        for name in live
    }
    return first | {name: base * ratio for name, ratio in ratios.items()}
