"""One exchange: every rank's message goes to the leader, one decision comes back to all.

Only the leader, the group's first rank, opens exchanges, and only what is open is joined:
    1  The leader takes the next number, a count kept in the store, abandons what a leader before it
       left open, and writes the number to `open`.
    2  Every other rank waits for an exchange that is open, sets its own key in it to its message,
       and waits for the outcome. Where that is "abandoned", it looks for the next one.
    3  The leader collects until all are there or its time is up, and sets the decision.
    4  The outcome is a key set once, by compare-and-set: by the leader to "decided", or by a rank
       that waited for it in vain to why there is none. An exchange with an outcome is over: nobody
       joins it, and who can read the outcome ends like everybody else.
Nobody counts its own arrivals, so a missed or additional call, a restarted rank or leader and a
store that an earlier run left behind cost one exchange at most: the next is open to all.

A late rank is told from an early one by looking twice. `look`, as its warm-up begins, finds the
number that is over already; the next is this rank's. If that is over too once it has measured, it
is late: it reads the outcome and goes, instead of waiting for an exchange that may never come, or
bringing old news to the next. `look` also says how long it may measure; all wait for the longest.

Nothing waits without a limit or holds what another needs, and the caller's thread never talks to
the store: it leaves an exchange behind whose store does not answer.
"""

import logging
from collections.abc import Callable, Mapping

from adaptive_moe.ranks.channel import Channel, KeyValueStore
from adaptive_moe.ranks.waiting import Patience, announce, bounded, read, wait

logger = logging.getLogger("adaptive_moe")

# The others wait for so many limits, the leader for one.
LONGER = 1.25
# An exchange as a whole, in limits: for the leader to come, for it to decide, and then some.
WHOLE = 3.0

_DECIDED = "decided"
_ABANDONED = "abandoned"
_OPEN, _NUMBER = "open", "number"

Decide = Callable[[Mapping[int, bytes | None]], bytes]


class NoDecisionError(RuntimeError):
    """The ranks have no decision; the text says why."""


def look(channel: Channel, limit_s: float, timeout_s: float = 5.0) -> int | None:
    """As a warm-up begins: the number of the latest exchange that is over for this rank, for
    `exchange`. Announces limit_s, how long the others may have to wait. None where the store fails
    or does not answer within timeout_s."""

    def work() -> int:
        store = channel.connect()
        announce(store, limit_s)
        return _over(store)

    try:
        return bounded(work, lambda: timeout_s)
    # A store can fail in any way its transport likes; the exchange itself will say how.
    except Exception as error:
        logger.debug("what exchange is over is not known: %s", short(error))
        return None


def exchange(
    channel: Channel, message: bytes, decide: Decide, limit_s: float, over: int | None = None
) -> bytes:
    """The decision, as all ranks read it. over: what `look` said, or None to look now.

    Raises NoDecisionError where the outcome is that there is none, TimeoutError where the store
    does not answer in time, and whatever else a store raises.
    """
    patience = Patience(limit_s)

    def work() -> bytes:
        turn = channel.turn
        if not turn.lock.acquire(timeout=limit_s):
            raise NoDecisionError("an earlier exchange of this process has not ended")
        try:
            store = channel.connect()
            patience.learn(store)
            patience.check()
            if channel.rank == 0:
                return _lead(store, channel, message, decide, patience)
            return _follow(store, channel, message, patience, over)
        finally:
            turn.lock.release()

    try:
        return bounded(work, lambda: WHOLE * patience.limit_s)
    finally:
        patience.left = True


def _lead(
    store: KeyValueStore, channel: Channel, message: bytes, decide: Decide, patience: Patience
) -> bytes:
    before, number = _number(read(store, _OPEN)), store.add(_NUMBER, 1)
    if before and _outcome(store, before, _ABANDONED) == _ABANDONED:
        _forget(store, before, channel.size)
    store.set(_OPEN, str(number))
    keys = {rank: f"{number}/from/{rank}" for rank in range(1, channel.size)}
    names = list(keys.values())
    everybody = wait(lambda: store.check(names), store, patience, 1.0, channel.size)
    messages: dict[int, bytes | None] = {0: message}
    for rank, key in keys.items():
        there = everybody or store.check([key])
        messages[rank] = bytes(store.get(key)) if there else None
    try:
        decision = decide(messages)
    # Whatever is wrong with the messages, the others must not wait until their time is up.
    except Exception as error:
        wanted = f"the leader could not decide: {short(error)}"
    else:
        store.set(f"{number}/decision", decision)
        wanted = _DECIDED
    outcome = _outcome(store, number, wanted)
    _forget(store, number, channel.size)
    return _decision(store, number, outcome)


def _follow(
    store: KeyValueStore, channel: Channel, message: bytes, patience: Patience, over: int | None
) -> bytes:
    turn, number = channel.turn, _over(store) if over is None else over
    if turn.number <= _number(read(store, _OPEN)):
        # Another thread's exchange, while this one waited for its turn, is not one it is late for.
        number = max(number, turn.number)
    while True:
        number = _next(store, channel, patience, number)
        turn.number = number
        if not store.check([f"{number}/outcome"]):
            store.set(f"{number}/from/{channel.rank}", message)
        key, size = f"{number}/outcome", channel.size
        wait(lambda: store.check([key]), store, patience, LONGER, size)  # noqa: B023
        waited = f"{patience.limit_s * LONGER:.3g} s"
        vain = f"rank {channel.rank} waited {waited} for the leader's decision in vain"
        outcome = _outcome(store, number, vain)
        if outcome != _ABANDONED:
            return _decision(store, number, outcome)


def _next(store: KeyValueStore, channel: Channel, patience: Patience, over: int) -> int:
    """The first exchange after `over` that was not abandoned: open, or over because this rank is
    late."""

    def opened() -> bool:
        return _number(read(store, _OPEN)) > over

    if not wait(opened, store, patience, LONGER, channel.size):
        waited = f"{patience.limit_s * LONGER:.3g} s"
        raise NoDecisionError(
            f"rank {channel.rank} waited {waited} for the leader to open an exchange in vain"
        )
    latest = _number(read(store, _OPEN))
    passed = range(over + 1, latest)
    outcomes = ((number, read(store, f"{number}/outcome")) for number in passed)
    return next((n for n, outcome in outcomes if outcome not in ("", _ABANDONED)), latest)


def _over(store: KeyValueStore) -> int:
    """The number of the latest exchange that nobody can join any more; 0 for none."""
    latest = _number(read(store, _OPEN))
    return latest if not latest or store.check([f"{latest}/outcome"]) else latest - 1


def _outcome(store: KeyValueStore, number: int, wanted: str) -> str:
    """Set the exchange's outcome if it has none; what it is now."""
    return bytes(store.compare_set(f"{number}/outcome", "", wanted)).decode()


def _decision(store: KeyValueStore, number: int, outcome: str) -> bytes:
    if outcome == _ABANDONED:
        raise NoDecisionError("another leader has opened an exchange meanwhile")
    if outcome != _DECIDED:
        raise NoDecisionError(outcome)
    return bytes(store.get(f"{number}/decision"))


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0


def _forget(store: KeyValueStore, number: int, size: int) -> None:
    """Messages may be large; outcome and decision stay for who comes late."""
    for rank in range(1, size):
        try:
            store.delete_key(f"{number}/from/{rank}")
        except Exception:  # not every store can
            return


def short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]
