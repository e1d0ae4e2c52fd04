"""Coverage: which calls one table is for, and in which situations they come.

Everything that decides, stores or serves a table agrees on it by this one type.
"""

import enum
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import overload

from adaptive_moe.shape import SortingShape

MAX_TOKENS = 1 << 20
# Where nothing is captured: from so many tokens on, an eager step is bound by the device in every
# large model measured.
BUSY_FROM = 2048

Span = tuple[int, int]


class Situation(enum.Enum):
    """How a call reaches the device; what is fastest in one may be slowest in the other."""

    GRAPH = "graph"  # replayed from a captured graph
    EAGER = "eager"  # launched by the host


class TokenCounts(Sequence[int]):
    """A rising sequence of token counts, kept as spans of (first, last), both inclusive."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = tuple(spans)
        self._ends = list(accumulate(last - first + 1 for first, last in self.spans))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        span = bisect_right(self._ends, place)
        return self.spans[span][1] - (self._ends[span] - 1 - place)

    def __contains__(self, count: object) -> bool:
        return any(first <= count <= last for first, last in self.spans)  # type: ignore[operator]

    def __iter__(self) -> Iterator[int]:
        for first, last in self.spans:
            yield from range(first, last + 1)

    def __repr__(self) -> str:
        return f"TokenCounts({', '.join(f'{a}' if a == b else f'{a}-{b}' for a, b in self.spans)})"


@dataclass(frozen=True)
class Coverage:
    """What one table is for.

    shape         what is sorted
    baseline      the candidate that runs without us: what the caller passes, such as `policy 0`
    eager         spans (first, last) of the token counts of eager calls, rising
    captured      token counts captured into graphs, rising
    padding_rows  True where rows of -1 fill a captured batch up to its size
    busy_from     eager calls of at least so many tokens meet a device that is busy: device time
                  decides. Below, the host may be the slower one, and its time counts as well
    extras        arguments beyond the shape, such as `return_local_topk_ids=True`; empty for none

    Raises ValueError naming the field, its value and what is accepted.
    """

    shape: SortingShape
    baseline: str
    eager: tuple[Span, ...]
    captured: tuple[int, ...] = ()
    padding_rows: bool = False
    busy_from: int = BUSY_FROM
    extras: str = ""

    def __post_init__(self) -> None:
        if not self.eager:
            raise ValueError("eager=() is not accepted: give spans of token counts")
        _check_spans("eager", self.eager)
        _check_spans("captured", [(count, count) for count in self.captured])
        if self.busy_from < 1:
            raise ValueError(f"busy_from={self.busy_from!r} is not accepted: give 1 or more")

    @classmethod
    def up_to(
        cls,
        shape: SortingShape,
        max_tokens: int,
        captured: Sequence[int] = (),
        *,
        baseline: str = "policy 0",
        busy_from: int | None = None,
        padding_rows: bool = False,
    ) -> "Coverage":
        """Every eager count from 1 to max_tokens, and the captured ones.

        Without busy_from, eager calls meet a busy device above the largest captured size, or from
        BUSY_FROM on where nothing is captured.
        """
        sizes = tuple(sorted(set(captured)))
        if busy_from is None:
            busy_from = sizes[-1] + 1 if sizes else BUSY_FROM
        return cls(shape, baseline, ((1, max_tokens),), sizes, padding_rows, busy_from)

    def on(self, device_type: str) -> "Coverage":
        """The same on that kind of device: a CPU captures nothing, and its calls run when they are
        made, so one measured time decides."""
        return replace(self, captured=(), busy_from=1) if device_type == "cpu" else self

    @property
    def max_tokens(self) -> int:
        """The largest batch of an eager call."""
        return self.eager[-1][1]

    def counts(self, situation: Situation) -> TokenCounts:
        """The token counts that occur in that situation."""
        if situation is Situation.GRAPH:
            return TokenCounts([(count, count) for count in self.captured])
        return TokenCounts(self.eager)

    def describe(self) -> str:
        """One short phrase for logs."""
        words = [self.shape.describe()]
        if self.extras:
            words.append(self.extras)
        return ", ".join(words)


def _check_spans(name: str, spans: Sequence[Span]) -> None:
    before = 0
    for first, last in spans:
        numbers = all(isinstance(n, int) and not isinstance(n, bool) for n in (first, last))
        if not numbers or not before < first <= last <= MAX_TOKENS:
            raise ValueError(
                f"{name}: {(first, last)!r} is not accepted: give rising token counts from 1 to "
                f"{MAX_TOKENS}"
            )
        before = last
