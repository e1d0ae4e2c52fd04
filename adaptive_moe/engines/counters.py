"""Counters that lose no call, at the price of one C call each."""

import itertools
import threading
from dataclasses import dataclass


class Counter:
    """Counts from any thread without a lock: `next` of itertools.count is one atomic step.

    Reading takes a step of its own, so reads are counted too and taken off again.
    """

    __slots__ = ("_lock", "_reads", "_steps", "add")

    def __init__(self) -> None:
        self._steps = itertools.count()
        self._lock = threading.Lock()
        self._reads = 0
        self.add = self._steps.__next__

    def value(self) -> int:
        with self._lock:
            seen = next(self._steps) - self._reads
            self._reads += 1
            return seen


@dataclass(frozen=True)
class Counts:
    """Calls of the seam since it was installed, by what happened to their policy.

    graph, eager  the table's, from its graph and its eager array. A captured call is counted when
                  it is captured; replays never come by
    fixed         the integer the variable names
    own           the caller's own non-zero policy, respected
    passed        nothing to choose: flat, output_aux, or an empty batch
    unknown       no table for that shape (yet): AITER's own choice
    failed        our own failure: AITER's own choice
    """

    graph: int
    eager: int
    fixed: int
    own: int
    passed: int
    unknown: int
    failed: int

    @property
    def total(self) -> int:
        return sum(
            (self.graph, self.eager, self.fixed, self.own, self.passed, self.unknown, self.failed)
        )


class Counters:
    """One Counter for each field of Counts."""

    def __init__(self) -> None:
        self.graph = Counter()
        self.eager = Counter()
        self.fixed = Counter()
        self.own = Counter()
        self.passed = Counter()
        self.unknown = Counter()
        self.failed = Counter()

    def read(self) -> Counts:
        return Counts(**{name: counter.value() for name, counter in vars(self).items()})
