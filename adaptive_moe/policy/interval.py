"""The interval around a mean of rounds, valid however often one looks. Pure.

An anytime-valid Student interval (Lai 1976; Wang and Ramdas, "Anytime-valid t-tests and confidence
sequences for Gaussian means with unknown variance", 2024): it may be looked at after every round
without spending confidence, so the stopping rule is simply "stop when settled". Rounds far off the
others are pulled in to a fence first.

That holds for independent rounds. Rounds that resemble the ones before them count for less: the
interval widens by what their correlation says (`memory`). Few rounds say little about it, but it
takes away half of the false switches on a clock that drifts one candidate at a time, for 5% more
rounds (calibration/decision.py).
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from adaptive_moe.policy.evidence import Ratios

# Weight of the interval's prior on effect sizes, in rounds: small favours early decisions.
PRIOR_ROUNDS = 0.3
# The largest correlation of neighbouring rounds that the width allows for.
MOST_MEMORY = 0.8


def half_width(n: int, spread: float, alpha: float) -> float:
    """Half-width of the anytime-valid interval around a mean of n values; inf while n is too small.

    spread is their sum of squared deviations. The mixture t-statistic's likelihood ratio against
    mean m, with prior weight c, is sqrt(r) * ((1 + u) / (1 + r*u)) ** (n/2), where r = c/(c+n) and
    u = n*(mean - m)**2 / spread. The interval holds every m where it stays below 1/alpha; solving
    for u gives the closed form below.
    """
    r = PRIOR_ROUNDS / (PRIOR_ROUNDS + n)
    k = (1.0 / (alpha * alpha * r)) ** (1.0 / n)
    if k * r >= 1.0:
        return math.inf
    return math.sqrt((k - 1.0) / (1.0 - k * r) * spread / n)


def summarize(values: Sequence[float]) -> Ratios:
    """Rounds, mean, spread and memory of one or more values, outliers pulled in to the fences.

    The fences lie one inter-decile width outside the inner 80% of the values, some 3.8 standard
    deviations if they are normal. (A median absolute deviation would do with half of the values,
    but is 0 where a coarse clock makes half of them equal, and would then clip away all doubt.)
    """
    ordered = sorted(values)
    tail = len(ordered) // 10
    low, high = ordered[tail], ordered[-1 - tail]
    width = high - low
    least, most = low - width, high + width
    clipped = [min(max(v, least), most) for v in values]
    mean = math.fsum(clipped) / len(clipped)
    deviations = [v - mean for v in clipped]
    spread = math.fsum(d * d for d in deviations)
    return Ratios(len(clipped), mean, spread, memory(deviations, spread))


def pool(parts: Sequence[Ratios]) -> Ratios:
    """One or more sets of rounds as one: what their means differ by adds to the spread."""
    rounds = sum(part.rounds for part in parts)
    mean = math.fsum(part.rounds * part.mean for part in parts) / rounds
    spread = math.fsum(p.spread + p.rounds * (p.mean - mean) ** 2 for p in parts)
    return Ratios(rounds, mean, spread, max(part.memory for part in parts))


def memory(deviations: Sequence[float], spread: float) -> float:
    """How much wider the interval is for rounds that resemble the ones before: 1.0 if they do not.

    The standard error of the mean of an AR(1) series over that of as many independent values, by
    the correlation of each round with the next.
    """
    if spread <= 0.0:
        return 1.0
    together = math.fsum(a * b for a, b in pairwise(deviations)) / spread
    rho = min(max(together, 0.0), MOST_MEMORY)
    return math.sqrt((1.0 + rho) / (1.0 - rho))


def median(values: Sequence[float]) -> float | None:
    """The usual median; statistics.median is several times slower and this runs every round."""
    if not values:
        return None
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
