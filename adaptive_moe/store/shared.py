"""The key-value store of torch.distributed: tables for the other ranks of this job.

No rank waits for another: a table is there or it is not. All candidates return the same output, so
ranks that run different tables compute the same.

This store is the engine's own connection, and must never suffer from us. So values have at most
4 MiB (above 8 MiB the libuv TCPStore drops the connection and breaks the process's default store
for good); timeouts are never set (a PrefixStore would change the default store's own); a key is
checked before it is read, because reading an absent one blocks. With a stopped server
`compare_set` ignores every timeout, so a daemon thread asks, a warm-up waits for it for at most 5 s
in total, and after one failure the store is not asked again in this process.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from adaptive_moe.store.key import TableKey
from adaptive_moe.store.text import MAX_BYTES

logger = logging.getLogger("adaptive_moe")

LIMIT_S = 5.0
NAME = "adaptive_moe"

# Set once something failed: the store is not asked again in this process.
_failed = threading.Event()


class KeyValueStore(Protocol):
    """What is used of torch.distributed.Store."""

    def check(self, keys: list[str], /) -> bool: ...
    def get(self, key: str, /) -> bytes: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


class SharedStore:
    """The store during one warm-up; use it as a context manager. Where this rank is alone, or the
    store failed, everything is absent. Nothing here raises.

    connect: makes the store; by default that of torch.distributed's default group. None: no store.
    """

    def __init__(self, connect: Callable[[], KeyValueStore | None] | None = None) -> None:
        self._connect = connect or default_store
        self._store: KeyValueStore | None = None
        self._left_s = LIMIT_S
        self._questions: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "SharedStore":
        return self

    def __exit__(self, *exception: object) -> None:
        self._questions.put(None)

    def get(self, key: TableKey) -> str | None:
        """The text under that key; None where it is absent."""

        def ask() -> bytes | None:
            store = self._open()
            return store.get(key.name) if store is not None and store.check([key.name]) else None

        return self._text(key, self._ask(ask))

    def put_if_absent(self, key: TableKey, text: str) -> str | None:
        """Publish a text, unless there is one. Returns what all ranks find from now on; None where
        that is not known, or the text is too long."""
        if len(text.encode("utf-8")) > MAX_BYTES:
            logger.warning("%s is not shared: it has more than %d bytes", key.name, MAX_BYTES)
            return None

        def ask() -> bytes | None:
            store = self._open()
            # With "" as what is expected, an absent key is set and a present one is returned.
            return None if store is None else store.compare_set(key.name, "", text)

        return self._text(key, self._ask(ask))

    def _open(self) -> KeyValueStore | None:
        if self._store is None:
            self._store = self._connect()
        return self._store

    def _ask(self, question: Callable[[], bytes | None]) -> bytes | None:
        """The answer, on a thread of its own and within the time that is left."""
        if _failed.is_set():
            return None
        answers: queue.SimpleQueue[bytes | Exception | None] = queue.SimpleQueue()

        def answer() -> None:
            try:
                answers.put(question())
            except Exception as error:
                answers.put(error)

        begun = time.monotonic()
        try:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=NAME, daemon=True)
                self._thread.start()
            self._questions.put(answer)
            found = answers.get(timeout=max(self._left_s, 0.0))
        except queue.Empty:
            found = TimeoutError(f"no answer within {LIMIT_S:g} s")
        except RuntimeError as error:  # no thread can be started
            found = error
        self._left_s -= time.monotonic() - begun
        if isinstance(found, Exception):
            _failed.set()
            logger.warning(
                "tables are not shared between ranks, each uses its own: torch.distributed's store "
                "failed: %s: %s",
                *(type(found).__name__, str(found).partition("\n")[0]),
            )
            return None
        return found

    def _work(self) -> None:
        while (question := self._questions.get()) is not None:
            question()

    def _text(self, key: TableKey, value: bytes | None) -> str | None:
        if value is None:
            return None
        try:
            if len(value) > MAX_BYTES:
                raise ValueError(f"it has more than {MAX_BYTES} bytes")
            return bytes(value).decode("utf-8")
        except ValueError as error:
            logger.warning("%s of another rank is not used: %s", key.name, error)
            return None


def default_store() -> KeyValueStore | None:
    """The store of torch.distributed's default group, under a name of ours and of that group: an
    engine may have had several. None where this process is alone."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
        return None
    name = f"{NAME}/{getattr(dist.group.WORLD, 'group_name', '')}/{dist.get_world_size()}"
    store: Any = dist.PrefixStore(name, _get_default_store())  # type: ignore[attr-defined]
    return store  # type: ignore[no-any-return]
