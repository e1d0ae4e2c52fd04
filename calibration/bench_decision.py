"""Decision quality on simulated clocks, through the same `race` and `explore` as a calibration.

Each clock of calibration/simulated.py, with its truth:

    false_switch_rate  identical candidates: share of buckets that left the baseline
    false_switch_rate_first_pass  ... that would have, had nobody been confirmed
    harm_rate          candidates 10% apart (sd): share of the switches to a truly slower one
    mean_regret        of these: true time of what was chosen over the best's, less 1
    found_Npct         a candidate N% faster: share of buckets that found it

and on the steady clock whole tables: how well two of them agree, what they lose, and how much of a
window of half an octave, in which the winner changes and changes back, they serve right.
"""

import argparse
import math
import random
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from adaptive_moe.policy.buckets import bucket_of
from adaptive_moe.policy.decision import (
    SWEEPS,
    Rule,
    Samples,
    Standing,
    Verdict,
    confirm,
    decide,
)
from adaptive_moe.policy.evidence import Bucket, Fill
from adaptive_moe.tuning.explore import SKETCH_ROUNDS, explore, more_rounds, promised
from adaptive_moe.tuning.race import LOT, LOTS, measure, measure_again, second
from calibration.record import main, stamp
from calibration.simulated import DEVICES, Device, SimulatedClock, Steady

RULE = Rule()
MAX_TOKENS = 16384
BASE, ONE, TWO = "policy 0", "policy 1", "policy 2"
Times = Mapping[str, float]
# Where finding is reported; on the others a gain of 10% only.
FRIENDLY = ("steady", "bimodal")


class Lone:
    """One bucket on a device of its own, as explore() measures it with time enough."""

    def __init__(self, device: Device, *, neutral: bool = True) -> None:
        self.device, self.clock = device, SimulatedClock(device, neutral)
        self.samples = [Samples(name) for name in device.true_us]

    def first(self, rounds: int) -> Verdict:
        """The first pass, brought to that many rounds."""
        device = self.device
        self.samples = measure(
            device.candidates(), [None], self.clock, self.samples, RULE, rounds, device.next_round
        )  # type: ignore[list-item]
        return decide(self.samples, RULE)

    def confirmed(self, *, alone: bool) -> Verdict:
        """The verdict after a second pass, which comes some time later, and whose lots lie apart
        where there are other buckets to confirm."""
        first, device = decide(self.samples, RULE), self.device
        faster = [r.candidate for r in first.results if r.standing is Standing.FASTER]
        if not faster:
            return first
        call_us = min(r.median_us for r in first.results if r.median_us)
        again = [Samples(name) for name in (BASE, *faster)]
        for lot, rounds in enumerate((*(LOT * n for n in range(1, LOTS + 1)), RULE.max_rounds)):
            if lot == 0 or not alone:
                device.elsewhere()
            again = measure_again(
                *(device.candidates(), [None], self.clock, again, RULE),  # type: ignore[list-item]
                *(rounds, device.next_round, call_us),
            )
        return confirm(first, decide(again, second(RULE)), RULE)


@dataclass(frozen=True)
class Outcome:
    """One simulated bucket: the truth, both verdicts, and the samples they took."""

    true_us: Times
    first: Verdict
    verdict: Verdict
    samples: int

    @property
    def switched(self) -> bool:
        return self.verdict.candidate != BASE

    def harm(self) -> bool:
        return self.true_us[self.verdict.candidate] > self.true_us[BASE]

    def regret(self) -> float:
        return self.true_us[self.verdict.candidate] / min(self.true_us.values()) - 1.0


def simulate_bucket(device: Device, *, neutral: bool = True, alone: bool = True) -> Outcome:
    """A sketch, more rounds where that is promising, and a second pass for a winner.

    alone: no other bucket has one.
    """
    bucket, rounds = Lone(device, neutral=neutral), SKETCH_ROUNDS
    first = bucket.first(rounds)
    while rounds < RULE.max_rounds and promised(first, RULE):
        rounds = more_rounds(rounds, RULE)
        first = bucket.first(rounds)
    return Outcome(device.true_us, first, bucket.confirmed(alone=alone), device.samples)


def simulate_table(
    true_us: Callable[[int], Times], new_device: Callable[[Times], Device]
) -> dict[int, str]:
    """What every bucket gets that a whole exploration of 1..MAX_TOKENS measures."""
    buckets: dict[int, Lone] = {}

    def measured(num_tokens: int, rounds: int) -> Bucket:
        if num_tokens not in buckets:
            buckets[num_tokens] = Lone(new_device(true_us(num_tokens)))
        verdict = buckets[num_tokens].first(rounds)
        return Bucket(num_tokens, verdict.candidate, verdict.reason, (Fill(1.0, verdict),))

    found = explore(range(1, MAX_TOKENS + 1), (), RULE, measured, lambda: True)
    return {
        num_tokens: buckets[num_tokens].confirmed(alone=False).candidate
        for num_tokens in sorted(found)
    }


def serves(table: Mapping[int, str], num_tokens: int) -> str:
    counts = list(table)
    return table[counts[bucket_of(num_tokens, counts)]]


def random_shape(rng: random.Random) -> Callable[[int], Times]:
    """True times of a made-up shape: one-shot cheap but steep, multi-phase dear but flat, and
    policy 0 the one or the other by a threshold that is rarely where they cross."""
    one_fixed, two_fixed = rng.uniform(3, 8), rng.uniform(4, 16)
    crossing = 2 ** rng.uniform(2, 9)
    flat = rng.uniform(0.001, 0.01)
    steep = flat + max(two_fixed - one_fixed, 0.1) / crossing
    threshold = round(2 ** rng.uniform(3, 10))

    def times(num_tokens: int) -> Times:
        one = one_fixed + steep * num_tokens
        two = two_fixed + flat * num_tokens
        return {BASE: one if num_tokens <= threshold else two, ONE: one, TWO: two}

    return times


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--buckets", type=int, default=2000, help="simulated buckets a case [2000]")
    parser.add_argument("--shapes", type=int, default=40, help="simulated shapes [40]")
    parser.add_argument("--windows", type=int, default=100, help="simulated windows [100]")
    parser.add_argument("--quick", action="store_true", help="a twentieth of all that")
    parser.add_argument("--clocks", nargs="+", choices=DEVICES, default=list(DEVICES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)


def run(args: argparse.Namespace) -> dict[str, Any]:
    share = 20 if args.quick else 1
    buckets, shapes, windows = (-(-n // share) for n in (args.buckets, args.shapes, args.windows))
    with ProcessPoolExecutor(args.processes) as pool:
        tables = pool.submit(whole_tables, shapes, windows, args.seed)
        clocks = pool.map(partial(figures, buckets, args.seed), args.clocks)
        return {
            **stamp(),
            "seed": args.seed,
            "sweeps_a_round": SWEEPS,
            "buckets_a_case": buckets,
            "clocks": dict(zip(args.clocks, clocks, strict=True)),
            "tables": tables.result(),
        }


def figures(buckets: int, seed: int, name: str) -> dict[str, Any]:
    """What the module's docstring names, for one clock."""
    rng = random.Random(f"{seed} {name}")

    def many(true_us: Callable[[], Times], *, alone: bool = False) -> list[Outcome]:
        devices = (DEVICES[name](true_us(), rng) for _ in range(buckets))
        return [simulate_bucket(device, alone=alone) for device in devices]

    same = many(lambda: {BASE: 10.0, ONE: 10.0, TWO: 10.0}, alone=True)
    first = [o.first.candidate != BASE for o in same]
    mixed = many(
        lambda: {BASE: 10.0, **{p: 10.0 * math.exp(rng.gauss(0.0, 0.1)) for p in (ONE, TWO)}}
    )
    switched = [o for o in mixed if o.switched]
    found: dict[str, Any] = {
        "false_switch_rate": statistics.fmean(o.switched for o in same),
        "false_switch_rate_first_pass": statistics.fmean(first),
        "samples_identical": statistics.median(o.samples for o in same),
        "harm_rate": sum(o.harm() for o in switched) / max(len(switched), 1),
        "switches": len(switched),
        "mean_regret": statistics.fmean(o.regret() for o in mixed),
    }
    for percent in (10, 5, 3) if name in FRIENDLY else (10,):
        # Either may be the better one; the other is what the baseline itself runs.
        better = 10.0 * (1.0 - percent / 100)
        outcomes = many(lambda better=better: {BASE: 10.0, ONE: 10.0, TWO: better})  # type: ignore[misc]
        found[f"found_{percent}pct"] = statistics.fmean(
            o.verdict.candidate == TWO for o in outcomes
        )
        found[f"median_samples_{percent}pct"] = statistics.median(o.samples for o in outcomes)
    return found


def whole_tables(shapes: int, windows: int, seed: int) -> dict[str, Any]:
    """Tables of 1..MAX_TOKENS on the steady clock."""
    rng = random.Random(f"{seed} tables")

    def table_of(true_us: Callable[[int], Times]) -> dict[int, str]:
        return simulate_table(true_us, lambda times: Steady(times, rng))

    same = counted = 0
    regret = []
    for _ in range(shapes):
        true_us = random_shape(rng)
        one, two = table_of(true_us), table_of(true_us)
        for num_tokens in range(1, MAX_TOKENS + 1):
            times = true_us(num_tokens)
            a, b = times[serves(one, num_tokens)], times[serves(two, num_tokens)]
            regret.append(a / min(times.values()) - 1.0)
            low, high = sorted((times[ONE], times[TWO]))
            if high / low - 1.0 > RULE.margin:
                counted += 1
                # Two names for one algorithm (the baseline and what it runs) are no disagreement.
                same += a == b
    served = [window_served(table_of, rng) for _ in range(windows)]
    return {
        "shapes": shapes,
        "agreement": same / counted,
        "token_counts_compared": counted,
        "mean_regret": statistics.fmean(regret),
        "worst_regret": max(regret),
        "windows": windows,
        "windows_found": statistics.fmean(share >= 0.5 for share in served),
        "windows_mean_share_served": statistics.fmean(served),
    }


def window_served(
    table_of: Callable[[Callable[[int], Times]], Mapping[int, str]], rng: random.Random
) -> float:
    """Share of a window of half an octave that gets its own winner, which saves 10% there and
    loses as much outside."""
    start = rng.uniform(4.0, math.log2(MAX_TOKENS) - 0.5)
    low, high = 2.0**start, 2.0 ** (start + 0.5)

    def true_us(num_tokens: int) -> Times:
        inside = low <= num_tokens <= high
        return {BASE: 10.0, ONE: 9.0 if inside else 11.0, TWO: 10.0}

    table = table_of(true_us)
    counts = range(math.ceil(low), math.floor(high) + 1)
    return statistics.fmean(serves(table, n) == ONE for n in counts)


if __name__ == "__main__":
    main(__doc__, add_options, run)
