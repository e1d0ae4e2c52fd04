"""Paired samples of several ways to do the same: medians of differences, and how sure they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """The median of paired differences and its interval, which holds in 95% of cases whatever the
    differences' distribution (order statistics of the sign test)."""

    median: float
    low: float
    high: float

    @property
    def resolved(self) -> bool:
        """Is it surely not zero?"""
        return self.low > 0.0 or self.high < 0.0


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """ours minus theirs, pair by pair; ValueError without a pair."""
    ordered = sorted(a - b for a, b in zip(ours, theirs, strict=True))
    n = len(ordered)
    if not n:
        raise ValueError("no pairs to compare")
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    outer = _outer_rank(n)
    return Difference(middle, ordered[outer], ordered[n - 1 - outer])


def _outer_rank(n: int) -> int:
    """How many ordered values may be left out on each side: a binomial's 2.5% quantile, less 1."""
    tail, rank = 0.0, 0
    for k in range(n // 2):
        tail += math.comb(n, k) * 0.5**n
        if tail > 0.025:
            break
        rank = k
    return rank
