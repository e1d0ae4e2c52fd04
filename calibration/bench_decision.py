"""Decision quality on simulated clocks, through the same `race` and `explore` as a calibration.

Noise of every sample: lognormal sigma 5%; 1% of samples times 5; 15% linear drift; a common factor
a round of sigma 5%. `bimodal` adds a clock that switches between two speeds 10% apart. All seeded.
"""

import argparse
import math
import random
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from adaptive_moe.policy.buckets import bucket_of
from adaptive_moe.policy.decision import SWEEPS, Candidate, Rule, Verdict, combine, decide
from adaptive_moe.policy.table import Bucket, Fill
from adaptive_moe.tuning.explore import SKETCH_ROUNDS, explore, more_rounds, promised
from adaptive_moe.tuning.race import first_look, race
from calibration.record import main, stamp

SIGMA = 0.05
OUTLIER_RATE, OUTLIER_FACTOR = 0.01, 5.0
# The drift happens within one bucket of this many samples: harsher than over a whole calibration.
DRIFT, DRIFT_SAMPLES = 0.15, 300
BIMODAL_FACTOR, SWITCH_RATE = 1.10, 0.02

MAX_TOKENS = 16384


class NoisyClock:
    """Samplers of policies with known true times (us), under the noise above."""

    def __init__(self, true_us: Mapping[int, float], rng: random.Random, *, bimodal: bool) -> None:
        self.true_us, self.rng, self.bimodal = true_us, rng, bimodal
        self.samples = 0
        self.slow = False
        self.round_factor = 1.0

    def next_round(self) -> bool:
        """Called once before each round, as `spent`: time never runs out here."""
        self.round_factor = math.exp(self.rng.gauss(0.0, SIGMA))
        return False

    def sample(self, policy: int) -> float:
        rng = self.rng
        drift = 1.0 + DRIFT * min(self.samples / DRIFT_SAMPLES, 1.0)
        self.samples += 1
        time = self.true_us[policy] * drift * self.round_factor * math.exp(rng.gauss(0.0, SIGMA))
        if rng.random() < OUTLIER_RATE:
            time *= OUTLIER_FACTOR
        if self.bimodal:
            self.slow ^= rng.random() < SWITCH_RATE
            time *= BIMODAL_FACTOR if self.slow else 1.0
        return time


def simulate_bucket(
    true_us: Mapping[int, float], rng: random.Random, *, bimodal: bool, rule: Rule
) -> tuple[Verdict, int]:
    """The verdict on one bucket with these true times, and how many samples it took.

    As `explore` does with time enough: a sketch, and more rounds where that is promising.
    """
    clock = NoisyClock(true_us, rng, bimodal=bimodal)

    def sampler(policy: int) -> Callable[[], float]:
        return lambda: clock.sample(policy)

    samplers = {policy: sampler(policy) for policy in true_us}
    candidates = [Candidate(policy) for policy in sorted(true_us)]
    candidates, _ = first_look(candidates, samplers)
    candidates = race(candidates, samplers, rule, SKETCH_ROUNDS, clock.next_round)
    rounds = SKETCH_ROUNDS
    while rounds < rule.max_rounds and promised(decide(candidates, rule), rule):
        rounds = more_rounds(rounds, rule)
        candidates = race(candidates, samplers, rule, rounds, clock.next_round)
    return decide(candidates, rule), clock.samples


def simulate_table(
    true_us: Callable[[int], Mapping[int, float]], rng: random.Random, *, bimodal: bool, rule: Rule
) -> dict[int, int]:
    """Policy of every bucket that a whole exploration of 1..MAX_TOKENS measures."""

    def measure(num_tokens: int, rounds: int) -> Bucket:
        verdict, _ = simulate_bucket(true_us(num_tokens), rng, bimodal=bimodal, rule=rule)
        policy, reason = combine([verdict])
        return Bucket(num_tokens, policy, reason, (Fill(1.0, verdict),))

    found = explore(range(1, MAX_TOKENS + 1), (), rule, measure, lambda: True)
    return {num_tokens: bucket.policy for num_tokens, bucket in found.items()}


def random_shape(rng: random.Random) -> Callable[[int], dict[int, float]]:
    """True times of a made-up shape: one-shot cheap but steep, multi-phase dear but flat, and
    policy 0 the one or the other by a threshold that is rarely where they cross."""
    one_fixed, two_fixed = rng.uniform(3, 8), rng.uniform(4, 16)
    crossing = 2 ** rng.uniform(2, 9)
    flat = rng.uniform(0.001, 0.01)
    steep = flat + max(two_fixed - one_fixed, 0.1) / crossing
    threshold = round(2 ** rng.uniform(3, 10))

    def times(num_tokens: int) -> dict[int, float]:
        one = one_fixed + steep * num_tokens
        two = two_fixed + flat * num_tokens
        return {0: one if num_tokens <= threshold else two, 1: one, 2: two}

    return times


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--buckets", type=int, default=4000, help="simulated buckets a case [4000]")
    parser.add_argument("--shapes", type=int, default=40, help="simulated shapes a clock [40]")
    parser.add_argument("--seed", type=int, default=1)


def run(args: argparse.Namespace) -> dict[str, Any]:
    rule = Rule()
    clocks = {}
    for name, bimodal in (("unimodal", False), ("bimodal", True)):
        rng = random.Random(f"{args.seed} {name}")
        clocks[name] = _figures(args.buckets, args.shapes, rng, bimodal=bimodal, rule=rule)
    return {
        **stamp(),
        "seed": args.seed,
        "sweeps_a_round": SWEEPS,
        **clocks["unimodal"],
        "bimodal": clocks["bimodal"],
    }


def _figures(
    buckets: int, shapes: int, rng: random.Random, *, bimodal: bool, rule: Rule
) -> dict[str, Any]:
    def one(true_us: Mapping[int, float]) -> _Outcome:
        return _Outcome(true_us, *simulate_bucket(true_us, rng, bimodal=bimodal, rule=rule))

    def many(count: int, true_us: Callable[[], Mapping[int, float]]) -> list[_Outcome]:
        return [one(true_us()) for _ in range(count)]

    same = many(buckets, lambda: {0: 10.0, 1: 10.0, 2: 10.0})
    figures: dict[str, Any] = {
        "buckets_a_case": buckets,
        "false_switch_rate": statistics.fmean(o.verdict.policy != 0 for o in same),
        "rounds_identical": statistics.median(o.verdict.rounds for o in same),
    }
    for percent in (10, 5, 3):
        # Either policy may be the better one; the other is what policy 0 itself runs.
        gain = 1.0 - percent / 100
        found = many(buckets, lambda gain=gain: {0: 10.0, 1: 10.0, 2: 10.0 * gain})  # type: ignore[misc]
        figures[f"found_{percent}pct"] = statistics.fmean(o.verdict.policy == 2 for o in found)
        figures[f"median_rounds_{percent}pct"] = statistics.median(o.verdict.rounds for o in found)
        figures[f"median_samples_{percent}pct"] = statistics.median(o.samples for o in found)
    mixed = many(
        buckets, lambda: {0: 10.0, **{p: 10.0 * math.exp(rng.gauss(0.0, 0.1)) for p in (1, 2)}}
    )
    switched = [o for o in mixed if o.verdict.policy != 0]
    figures["harm_rate"] = sum(o.ratio() > 1.0 for o in switched) / max(len(switched), 1)
    figures["switches"] = len(switched)
    figures["mean_regret"] = statistics.fmean(o.regret() for o in mixed)
    return figures | _agreement(shapes, rng, bimodal=bimodal, rule=rule)


def _agreement(shapes: int, rng: random.Random, *, bimodal: bool, rule: Rule) -> dict[str, Any]:
    """Two calibrations of each shape, compared where the policies truly differ by over a margin."""
    same = counted = 0
    regret = []
    for _ in range(shapes):
        true_us = random_shape(rng)
        first, second = (simulate_table(true_us, rng, bimodal=bimodal, rule=rule) for _ in range(2))
        for num_tokens in range(1, MAX_TOKENS + 1):
            times = true_us(num_tokens)
            one, two = (table[_serving(table, num_tokens)] for table in (first, second))
            regret.append(times[one] / min(times.values()) - 1.0)
            low, high = sorted((times[1], times[2]))
            if high / low - 1.0 > rule.margin:
                counted += 1
                # Two numbers for one algorithm (policy 0 and what it runs) are no disagreement.
                same += times[one] == times[two]
    return {
        "shapes": shapes,
        "agreement": same / counted,
        "token_counts_compared": counted,
        "mean_regret_of_tables": statistics.fmean(regret),
        "worst_regret_of_tables": max(regret),
    }


def _serving(table: Mapping[int, int], num_tokens: int) -> int:
    counts = sorted(table)
    return counts[bucket_of(num_tokens, counts)]


class _Outcome:
    def __init__(self, true_us: Mapping[int, float], verdict: Verdict, samples: int) -> None:
        self.true_us, self.verdict, self.samples = true_us, verdict, samples

    def ratio(self) -> float:
        """True time of what was chosen over policy 0's."""
        return self.true_us[self.verdict.policy] / self.true_us[0]

    def regret(self) -> float:
        return self.true_us[self.verdict.policy] / min(self.true_us.values()) - 1.0


if __name__ == "__main__":
    main(__doc__, add_options, run)
