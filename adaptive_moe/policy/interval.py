"""The interval around a mean of rounds, valid however often one looks. Pure.

An anytime-valid Student interval (Lai 1976; Wang and Ramdas, "Anytime-valid t-tests and confidence
sequences for Gaussian means with unknown variance", 2024): it may be looked at after every round
without spending confidence, so the stopping rule is simply "stop when settled". Rounds far off the
others are pulled in to a fence first.
"""

import math
from collections.abc import Sequence

# Weight of the interval's prior on effect sizes, in rounds: small favours early decisions.
PRIOR_ROUNDS = 0.3


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


def clipped_moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sum of squared deviations, with outliers pulled in to the fences.

    The fences lie one inter-decile width outside the inner 80% of the values, some 3.8 standard
    deviations if they are normal. (A median absolute deviation would do with half of the values,
    but is 0 where a coarse clock makes half of them equal, and would then clip away all doubt.)
    """
    ordered = sorted(values)
    tail = len(ordered) // 10
    low, high = ordered[tail], ordered[-1 - tail]
    width = high - low
    clipped = [min(max(v, low - width), high + width) for v in ordered]
    mean = math.fsum(clipped) / len(clipped)
    return mean, math.fsum((v - mean) ** 2 for v in clipped)


def median(values: Sequence[float]) -> float | None:
    """The usual median; statistics.median is several times slower and this runs every round."""
    if not values:
        return None
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
