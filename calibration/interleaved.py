"""Interleaved rounds: how every bench compares several ways to do the same.

A round visits each sampler twice, there and back, so that each runs equally early and late in it;
the order is rotated from round to round, and each full turn is followed by its mirror image. What
slows a whole round cancels, because only values of one round are compared. The interval around
their mean is the one that calibrations decide by.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from adaptive_moe.policy.interval import half_width, summarize

Sample = Callable[[], float]

# Rounds in which every sampler takes part, before those far behind are left out.
LOOKS = 2
MIN_ROUNDS, MAX_ROUNDS = 6, 1000
ALPHA = 0.05


@dataclass(frozen=True)
class Interval:
    """The mean over the rounds, and what it is within at 95%; infinite for too few rounds."""

    mean: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Does it exclude zero?"""
        return self.low > 0.0 or self.high < 0.0


def interval(values: Sequence[float]) -> Interval:
    """Of at least one value; ValueError without any."""
    if not values:
        raise ValueError("no rounds to compare")
    found = summarize(values)
    half = found.memory * half_width(found.rounds, found.spread, ALPHA)
    return Interval(found.mean, found.mean - half, found.mean + half)


def longer(times: Sequence[float], than: Sequence[float]) -> Interval:
    """By what fraction the first take longer, over the rounds that both took part in."""
    found = interval([math.log(a / b) for a, b in zip(times, than, strict=False)])
    return Interval(*(_fraction(log) for log in (found.mean, found.low, found.high)))


def difference(times: Sequence[float], than: Sequence[float]) -> Interval:
    """The first minus the second, over the rounds that both took part in."""
    return interval([a - b for a, b in zip(times, than, strict=False)])


def interleave(
    samplers: Mapping[str, Sample],
    seconds: float,
    *,
    far_behind: float = math.inf,
    keep: Sequence[str] = (),
    now: Callable[[], float] = time.monotonic,
) -> dict[str, list[float]]:
    """The mean of the two visits of each sampler in each round, until the time is over.

    A sampler that is far_behind times slower than the fastest after LOOKS rounds is sampled no
    further, because what runs after it would feel it; those to keep stay.
    """
    collects = gc.isenabled()
    gc.disable()  # a collection would be paid for by whichever sampler runs then
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
    end, number = now() + seconds, 0
    while number < MIN_ROUNDS or (number < MAX_ROUNDS and now() < end):
        if number == LOOKS:
            least = {name: min(times[name]) for name in names}
            limit = far_behind * min(least.values())
            names = [name for name in names if least[name] <= limit or name in keep]
        turn, start = divmod(number, len(names))
        ring = names[::-1] if turn % 2 else names
        order = [*ring[start:], *ring[:start]]
        there = {name: samplers[name]() for name in order}
        back = {name: samplers[name]() for name in reversed(order)}
        for name in names:
            times[name].append((there[name] + back[name]) / 2)
        number += 1
    return times


def _fraction(log_ratio: float) -> float:
    return math.expm1(min(log_ratio, 50.0))
