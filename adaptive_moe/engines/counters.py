"""Counters that lose no call, at the price of one C call each."""

import itertools
import threading
from dataclasses import dataclass, fields


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
    """Calls of the seam since it was installed, by what became of them. A captured call is counted
    when it is captured; replays never come by.

    chosen     a candidate other than the baseline answered, as the table says
    baseline   the baseline answered, as the table says
    fixed      the integer the variable names was passed
    own        the caller's own policy, neither 0 nor the engine's default: respected
    passed     nothing to choose: flat, output_aux, or an empty batch
    odd        arguments we cannot read (symbolic sizes, no tensor): went through as they came
    unknown    no table for that shape (yet): the baseline answered
    fell_back  another sort raised, and the baseline answered the same call
    failed     our own failure: the baseline answered
    """

    chosen: int
    baseline: int
    fixed: int
    own: int
    passed: int
    odd: int
    unknown: int
    fell_back: int
    failed: int

    @property
    def total(self) -> int:
        # A call that fell back was counted as chosen before.
        ways: list[int] = [getattr(self, field.name) for field in fields(self)]
        return sum(ways) - self.fell_back


class Counters:
    """One Counter for each field of Counts."""

    def __init__(self) -> None:
        self.chosen = Counter()
        self.baseline = Counter()
        self.fixed = Counter()
        self.own = Counter()
        self.passed = Counter()
        self.odd = Counter()
        self.unknown = Counter()
        self.fell_back = Counter()
        self.failed = Counter()

    def read(self) -> Counts:
        return Counts(**{name: counter.value() for name, counter in vars(self).items()})
