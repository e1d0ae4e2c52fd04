"""What the wrapper looks up, and how it is made from a table."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from adaptive_moe.hook.counters import Counters
from adaptive_moe.kernels import POLICIES, policy_name
from adaptive_moe.policy.table import PolicyTable

_POLICY_OF = {policy_name(policy): policy for policy in POLICIES}

# In an entry's array: the answer differs between captured and eager calls, so ask.
ASK = 255


class Entries(dict[tuple[Any, ...], "Entry"]):
    """By key; never changed, but replaced whole: the wrapper reads it without a lock.

    latest: of the latest call, the arguments that make its key, and its entry, as the wrapper
    unpacks them. Layers of one model mostly come with the same arguments, and comparing them one
    by one takes less than building a key and hashing it. Empty before the first call.
    """

    __slots__ = ("latest",)

    def __init__(self, entries: Mapping[tuple[Any, ...], "Entry"]) -> None:
        super().__init__(entries)
        self.latest: tuple[Any, ...] = ()


class Entry(NamedTuple):
    """What becomes of the calls with one key.

    array    a byte a token count: an index into `choices`, 0 for the call as it came, or ASK
    both     where it is ASK: the arrays of eager and of captured calls
    choices  policies (int) and other sorts (functions)
    stay, go what to count at index 0, and at any other
    grows    whether a count past the end makes the arrays longer, by zeros
    """

    array: bytes
    both: tuple[bytes, bytes]
    choices: tuple[Any, ...]
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
    answers = {**_POLICY_OF, **sorts}
    names = table.evidence.candidates
    chosen = [name for name in names[1:] if name in answers and name not in off]
    places = bytes(chosen.index(name) + 1 if name in chosen else 0 for name in names)
    length = max(len(table.eager), len(table.graph))
    eager, graph = (
        _lengthened(array.translate(places.ljust(256, b"\0")), length)
        for array in (table.eager, table.graph)
    )
    return Entry(
        array=_merged(eager, graph),
        both=(eager, graph),
        choices=(None, *(answers[name] for name in chosen)),
        stay=counters["baseline"].add,
        go=counters["chosen"].add,
        grows=True,
    )


def unanswered(table: PolicyTable, sorts: Mapping[str, Callable[..., Any]]) -> list[str]:
    """The candidates of a table that are neither policies nor sorts known here."""
    names = table.evidence.candidates[1:]
    return [name for name in names if name not in _POLICY_OF and name not in sorts]


def left_alone(count: Callable[[], int], num_tokens: int, *, grows: bool) -> Entry:
    """Every call up to that many tokens as it came, counted by `count`."""
    array = bytes(num_tokens + 1)
    return Entry(array, (array, array), (None,), count, count, grows)


def grown(entry: Entry, num_tokens: int) -> Entry:
    """The same up to twice that many tokens: what was not measured gets the baseline."""
    length = 2 * num_tokens + 1
    eager, graph = (_lengthened(array, length) for array in entry.both)
    return entry._replace(array=_lengthened(entry.array, length), both=(eager, graph))


def _lengthened(array: bytes, length: int) -> bytes:
    return array.ljust(length, b"\0")


def _merged(eager: bytes, graph: bytes) -> bytes:
    if eager == graph:
        return eager
    return bytes(a if a == b else ASK for a, b in zip(eager, graph, strict=True))
