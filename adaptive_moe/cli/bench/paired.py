"""Rounds of several ways to do the same, and what the differences between them are worth."""

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Sample = Callable[[], float]

# Rounds in which everybody takes part, before those that are no rivals are left out.
LOOKS = 2
MIN_ROUNDS, MAX_ROUNDS = 8, 240


@dataclass(frozen=True)
class Difference:
    """The median of paired differences and its interval, which holds in 95% of cases whatever the
    differences' distribution (order statistics of the sign test; with fewer than 6 pairs, which
    cannot say so much, all of them)."""

    median: float
    low: float
    high: float


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """ours minus theirs, over the rounds that both took part in; ValueError without one."""
    ordered = sorted(a - b for a, b in zip(ours, theirs, strict=False))
    n = len(ordered)
    if not n:
        raise ValueError("no pairs to compare")
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    outer = _outer_rank(n)
    return Difference(middle, ordered[outer], ordered[n - 1 - outer])


def in_rounds(
    samplers: Mapping[str, Sample],
    seconds: float,
    *,
    far_behind: float,
    keep: Sequence[str] = (),
    now: Callable[[], float] = time.monotonic,
) -> dict[str, list[float]]:
    """A sample of each in every round, the order rotated and reversed, until the time is over.

    Whoever is far_behind times slower than the fastest after LOOKS rounds is sampled no further:
    it is no rival, and what runs after it would feel it. Those to keep stay.
    """
    collects = gc.isenabled()
    gc.disable()  # or one of the samplers pays for the garbage of all
    try:
        return _rounds(samplers, seconds, far_behind, keep, now)
    finally:
        if collects:
            gc.enable()


def _rounds(
    samplers: Mapping[str, Sample],
    seconds: float,
    far_behind: float,
    keep: Sequence[str],
    now: Callable[[], float],
) -> dict[str, list[float]]:
    names = list(samplers)
    times: dict[str, list[float]] = {name: [] for name in names}
    begun, number = now(), 0
    while number < MIN_ROUNDS or (number < MAX_ROUNDS and now() < begun + seconds):
        if number == LOOKS:
            least = {name: min(times[name]) for name in names}
            limit = far_behind * min(least.values())
            names = [name for name in names if least[name] <= limit or name in keep]
        turn = number % len(names)
        order = names[turn:] + names[:turn]
        for name in order[::-1] if number // len(names) % 2 else order:
            times[name].append(samplers[name]())
        number += 1
    return times


def _outer_rank(n: int) -> int:
    """How many of n ordered values lie outside on each side: the most that fewer than 2.5% of the
    cases leave there."""
    tail, rank = 0.0, 0
    for k in range(n // 2):
        tail += math.comb(n, k) * 0.5**n
        if tail > 0.025:
            break
        rank = k
    return rank
