"""Counters that lose no call, at the price of one C call each."""

import itertools
from dataclasses import dataclass, fields


class Counter:
    """Counts from any thread without a lock: `next` of itertools.count is one atomic step."""

    __slots__ = ("_steps", "add")

    def __init__(self) -> None:
        self._steps = itertools.count()
        self.add = self._steps.__next__

    def value(self) -> int:
        # Its text, `count(3)`, is the one way to read it that takes no step.
        return int(repr(self._steps)[len("count(") : -1])


@dataclass(frozen=True)
class Counts:
    """Calls of AITER's sort since install(), by what became of them. A captured call is counted
    when it is captured; replays never come by.

    chosen          a candidate other than the baseline answered, as the table says
    baseline        the baseline answered, as the table says
    fixed           the integer that the variable names was passed
    callers_policy  the caller's policy is neither 0 nor the engine's default: it was respected
    passed          nothing to choose: flat, output_aux, or an empty batch
    unreadable      we cannot read the arguments (symbolic sizes, no tensor): they went through
    unknown         no table for that shape (yet): the baseline answered
    fell_back       a candidate raised, and the baseline answered the same call
    failed          a failure of ours: the baseline answered
    """

    chosen: int
    baseline: int
    fixed: int
    callers_policy: int
    passed: int
    unreadable: int
    unknown: int
    fell_back: int
    failed: int

    @property
    def total(self) -> int:
        # A call that fell back was counted as chosen before.
        ways: list[int] = [getattr(self, field.name) for field in fields(self)]
        return sum(ways) - self.fell_back


class Counters(dict[str, Counter]):
    """A Counter for each field of Counts."""

    def __init__(self) -> None:
        super().__init__((field.name, Counter()) for field in fields(Counts))

    def read(self) -> Counts:
        return Counts(**{name: counter.value() for name, counter in self.items()})
