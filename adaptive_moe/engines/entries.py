"""What the hot path reads, and how it is made from a table."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from adaptive_moe.engines.counters import Counters
from adaptive_moe.kernels import POLICIES, policy_name
from adaptive_moe.policy.table import PolicyTable

_POLICY_OF = {policy_name(policy): policy for policy in POLICIES}

# In an entry's array: the answer differs between captured and eager calls, so ask.
ASK = 255


class Entries(dict[tuple[Any, ...], "Entry"]):
    """By key; never changed, but replaced whole: the hot path reads it without a lock.

    latest: the key of the latest call and its entry. Layers of one model mostly come with the same
    key, and comparing it takes half the time of hashing it.
    """

    __slots__ = ("latest",)

    def __init__(self, entries: Mapping[tuple[Any, ...], "Entry"]) -> None:
        super().__init__(entries)
        self.latest: tuple[Any, ...] = (None,) * len(Entry._fields)


class Entry(NamedTuple):
    """What becomes of the calls with one key.

    array    a byte a token count: an index into `choices`, 0 for the call as it came, or ASK
    both     where it is ASK: the arrays of eager and of captured calls
    choices  policies, and from index `plain` on other sorts
    stay, go what to count at index 0, and at any other
    grows    True where the last byte speaks for every count beyond
    """

    array: bytes
    both: tuple[bytes, bytes]
    choices: tuple[Any, ...]
    plain: int
    stay: Callable[[], int]
    go: Callable[[], int]
    grows: bool


def entry_for(
    table: PolicyTable,
    sorts: Mapping[str, Callable[..., Any]],
    off: Collection[str],
    counters: Counters,
) -> Entry:
    """What a table says, with `off` candidates, and those that nothing here answers to, replaced by
    the baseline. sorts: what the names of other sorts stand for."""
    names = table.evidence.candidates
    policies = [name for name in names[1:] if name in _POLICY_OF and name not in off]
    others = [name for name in names[1:] if name in sorts and name not in off]
    order = [names[0], *policies, *others]
    places = bytes(order.index(name) if name in order else 0 for name in names)
    length = max(len(table.eager), len(table.graph))
    both = tuple(
        _stretched(array.translate(places.ljust(256, b"\0")), length)
        for array in (table.eager, table.graph)
    )
    return Entry(
        array=_merged(*both),
        both=(both[0], both[1]),
        choices=(None, *(_POLICY_OF[name] for name in policies), *(sorts[name] for name in others)),
        plain=1 + len(policies),
        stay=counters.baseline.add,
        go=counters.chosen.add,
        grows=True,
    )


def unanswered(table: PolicyTable, sorts: Mapping[str, Callable[..., Any]]) -> list[str]:
    """The candidates of a table that are neither policies nor sorts known here."""
    names = table.evidence.candidates[1:]
    return [name for name in names if name not in _POLICY_OF and name not in sorts]


def left_alone(count: Callable[[], int], num_tokens: int, *, grows: bool) -> Entry:
    """Every call up to that many tokens as it came, counted by `count`."""
    array = bytes(num_tokens + 1)
    return Entry(array, (array, array), (None,), 1, count, count, grows)


def grown(entry: Entry, num_tokens: int) -> Entry:
    """The same up to that many tokens, and twice as many: the last byte speaks for all beyond."""
    length = 2 * num_tokens + 1
    both = (_stretched(entry.both[0], length), _stretched(entry.both[1], length))
    return entry._replace(array=_stretched(entry.array, length), both=both)


def _stretched(array: bytes, length: int) -> bytes:
    return array.ljust(length, array[-1:])


def _merged(eager: bytes, graph: bytes) -> bytes:
    if eager == graph:
        return eager
    return bytes(a if a == b else ASK for a, b in zip(eager, graph, strict=True))
