"""Waiting, always within limits: for a key of the store, and for whoever talks to the store."""

import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from adaptive_moe.ranks.channel import KeyValueStore

# All ranks together ask the store this often a second while they wait, at most.
ASKS_PER_S = 5000
# No rank can make the others wait longer than this, whatever it says.
MOST_S = 3600.0

_LIMIT = "limit"

T = TypeVar("T")


class GoneError(Exception):
    """The caller has left; nobody is interested in the outcome."""


@dataclass
class Patience:
    """limit_s: how long this rank waits for one thing; grows to what others have said they need.
    left: the caller waits no more."""

    limit_s: float
    left: bool = False

    def check(self) -> None:
        """Whoever was left behind must not take part any more once the store answers."""
        if self.left:
            raise GoneError

    def learn(self, store: KeyValueStore) -> bool:
        """Take over a longer limit that a rank has announced; whether there is one."""
        said = min(_real(read(store, _LIMIT)), MOST_S)
        longer = said > self.limit_s
        self.limit_s = max(self.limit_s, said)
        return longer


def announce(store: KeyValueStore, limit_s: float) -> None:
    """Raise the limit in the store to this one. It never falls: too long a wait for a rank that is
    dead is better than too short a one for a rank that measures."""
    for _ in range(8):  # others raise it at the same time; whoever loses so often gives up
        text = read(store, _LIMIT)
        if _real(text) >= limit_s:
            return
        store.compare_set(_LIMIT, text, repr(limit_s))


def wait(
    there: Callable[[], bool], store: KeyValueStore, patience: Patience, limits: float, size: int
) -> bool:
    """Ask until it is there; False after so many limits."""
    begun = time.monotonic()
    pause, longest = 0.001, max(0.02, 2 * size / ASKS_PER_S)
    while not there():
        patience.check()
        left = begun + limits * patience.limit_s - time.monotonic()
        if left <= 0.0 and not patience.learn(store):
            return False
        time.sleep(max(0.0, min(pause, left)))
        pause = min(1.5 * pause, longest)
    patience.check()
    return True


def bounded(work: Callable[[], T], seconds: Callable[[], float]) -> T:
    """work()'s result or exception; TimeoutError after so many seconds, leaving it behind."""
    answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((work(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=run, name="adaptive-moe-exchange", daemon=True).start()
    begun = time.monotonic()
    while (left := begun + seconds() - time.monotonic()) > 0.0:
        try:
            result, error = answers.get(timeout=left)
        except queue.Empty:
            continue
        if error is not None:
            raise error
        return result  # type: ignore[return-value]
    raise TimeoutError(f"the ranks' store did not answer within {seconds():.3g} s")


def read(store: KeyValueStore, key: str) -> str:
    """The text under a key, empty where there is none; `get` alone would wait for it."""
    return bytes(store.get(key)).decode() if store.check([key]) else ""


def _real(text: str) -> float:
    """Seconds that a rank wrote, perhaps one of another version of this; 0.0 for nonsense."""
    try:
        seconds = float(text)
    except ValueError:
        return 0.0
    return seconds if 0.0 < seconds < math.inf else 0.0
