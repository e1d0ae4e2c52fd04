"""Which candidates the calls took that were captured into graphs.

Counting costs a call something, so it lasts only while an engine starts: entries of the hook are
put behind arrays that count, and put back. Replays never come by.
"""

from collections import Counter
from typing import Any

from adaptive_moe.engines.entries import ASK, Entry
from adaptive_moe.policy.table import PolicyTable


class Captured:
    """Counts of captured calls by candidate."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def read(self) -> dict[str, int]:
        """By candidate, the most frequent first."""
        return dict(self._counts.most_common())

    def watched(self, entry: Entry, table: PolicyTable) -> Entry:
        """The same entry, which asks at each call whether it is captured, and counts if so."""
        eager, graph = entry.both
        counting: Any = _Counting(graph, table, self._counts)
        return entry._replace(array=bytes((ASK,)) * len(graph), both=(eager, counting))


class _Counting:
    """In place of the array of captured calls, as far as the hook uses it: a count is looked up,
    and the last choice may be stretched over more counts."""

    def __init__(self, array: bytes, table: PolicyTable, counts: "Counter[str]") -> None:
        self._array, self._table, self._counts = array, table, counts

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, place: Any) -> Any:
        found = self._array[place]
        if isinstance(place, int):
            names = self._table.evidence.candidates
            # Index 0 is the baseline, also in place of a candidate that is off.
            name = self._table.candidate(place, captured=True) if found else names[0]
            self._counts[name] += 1
        return found

    def __add__(self, more: bytes) -> "_Counting":
        return _Counting(self._array + more, self._table, self._counts)
