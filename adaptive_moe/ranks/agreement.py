"""The ranks of one engine end with one table a shape, or with none, and never wait for ever.

Ranks measure alone. Then every rank comes here once, whether it measured, found its tables on disk,
failed or has no MoE layer. No collective is entered: a collective with a rank missing hangs, and
leaves its group unusable. Ranks write to and read from the key-value store that torch.distributed
was initialised over, where every step can be given up:

    1  each rank sets its own key to its summaries
    2  the leader, the group's first rank, collects them until all are there or its time is up,
       decides, and sets the decision
    3  the outcome is one key, set once by compare-and-set: by the leader to "decided", or by
       whoever waited for it in vain to why there is no decision. What is there first stays

So whoever can read the outcome reads the same one: also who comes late, and who gave up just before
the leader decided. A rank that is missing when the leader's time is up voids all shapes: nobody
knows which it has. A shape that a rank could not calibrate, or was asked another question about, is
voided for all. A voided shape gets no table, which is policy 0.

What can still differ: a rank that cannot reach the store at all (its host died, the network is
cut) takes policy 0 after its time limit, while others may have a decision. That is harmless: every
policy sorts to the same output, and nothing a policy does is collective. It costs that rank time.

Every wait is bounded, on the caller's thread too: the exchange runs on a thread of its own, so that
not even a store that stops answering holds up the caller. It asks again and again, briefly, over
the connection that torch has: a wait would keep others in this process from the store, and a new
connection may stall all ranks, because the store's host looks up the name of whoever connects.
"""

import hashlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.ranks.messages import (
    Decision,
    decide,
    encode_decision,
    encode_message,
    read_decision,
)
from adaptive_moe.ranks.summary import canonical
from adaptive_moe.shape import SortingShape

if TYPE_CHECKING:
    import torch.distributed as dist

logger = logging.getLogger("adaptive_moe")

# How far apart ranks may come: one may build kernels while another has its tables on disk.
LIMIT_S = 120.0
# The others wait this fraction longer than the leader; so does the caller, once more.
GRACE = 0.25
# All ranks together ask the store this often a second while they wait, at most.
ASKS_PER_S = 5000

_DECIDED = "decided"
# AITER's own choice, policy 0; under SGLang what SGLang passes instead.
_WITHOUT = "the ranks have no common table, the engine's own policy serves"

T = TypeVar("T")


class KeyValueStore(Protocol):
    """What is used of torch.distributed.Store."""

    def set(self, key: str, value: bytes) -> None: ...
    def get(self, key: str) -> bytes: ...
    def add(self, key: str, amount: int) -> int: ...
    def check(self, keys: list[str]) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...
    def delete_key(self, key: str) -> bool: ...


@dataclass(frozen=True)
class Channel:
    """How one rank reaches the others. connect: called once an exchange, on its own thread."""

    rank: int
    size: int
    connect: Callable[[], KeyValueStore]


@dataclass(frozen=True)
class Agreement:
    """tables: of the shapes that have one, the same on every rank that has that shape.
    problems: why others have none, in words; they were logged."""

    tables: dict[SortingShape, PolicyTable]
    problems: tuple[str, ...] = ()
    seconds: float = 0.0


class NoDecisionError(RuntimeError):
    """The ranks have no decision; the text says why."""


def open_channel(group: "dist.ProcessGroup | None" = None) -> Channel | None:
    """The channel of a process group (all ranks by default); None where there is just one rank."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return None
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    if len(ranks) < 2:
        return None
    name = hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]

    def connect() -> KeyValueStore:
        # The one part of torch.distributed without a public name, there since its first versions.
        from torch.distributed.distributed_c10d import _get_default_store

        store: Any = dist.PrefixStore(  # type: ignore[attr-defined]
            f"adaptive_moe/{name}", _get_default_store()
        )
        return store  # type: ignore[no-any-return]

    return Channel(ranks.index(dist.get_rank()), len(ranks), connect)


def agree(
    tables: Mapping[SortingShape, PolicyTable],
    failed: Mapping[SortingShape, str],
    channel: Channel | None,
    *,
    limit_s: float = LIMIT_S,
) -> Agreement:
    """Exchange once with the other ranks, and return what all of them run.

    Every rank must call this the same number of times; `failed` says why a shape of this rank has
    no table. Without a channel there is nobody to agree with: the tables are returned as they are.
    Never raises and never waits longer than limit_s and half as much again.
    """
    begun = time.monotonic()
    if channel is None:
        return Agreement(dict(tables))
    try:
        message = encode_message(tables, failed)
        content = _bounded(
            lambda: _exchange(channel, message, limit_s), limit_s * (1.0 + 2.0 * GRACE)
        )
        decision = read_decision(content)
        agreed = _ours(tables, decision)
    # A store can fail in any way its transport likes; that must only cost the tables.
    except Exception as error:
        known = isinstance(error, (NoDecisionError, TimeoutError))
        problem = f"{_WITHOUT} all shapes: {error if known else _short(error)}"
        logger.warning("%s", problem)
        return Agreement({}, (problem,), time.monotonic() - begun)
    problems = _problems(tables, decision)
    seconds = time.monotonic() - begun
    # One rank says it aloud, or a large engine says it a thousand times.
    quiet = channel.rank != 0
    for problem in problems:
        logger.log(logging.DEBUG if quiet else logging.WARNING, "%s", problem)
    if agreed:
        said = f"{channel.size} ranks run the same {len(agreed)} tables, agreed in {seconds:.3f} s"
        logger.log(logging.DEBUG if quiet else logging.INFO, "%s", said)
    return Agreement(agreed, problems, seconds)


def _exchange(channel: Channel, message: bytes, limit_s: float) -> bytes:
    """The decision, in bytes; NoDecisionError where the outcome is that there is none."""
    begun = time.monotonic()
    store = channel.connect()
    # Counted in the store, so that it also outlives a rank that is replaced.
    number = store.add(f"arrivals/{channel.rank}", 1)
    outcome_key = f"{number}/outcome"
    store.set(f"{number}/from/{channel.rank}", message)
    if channel.rank == 0:
        outcome = _lead(store, channel.size, number, begun + limit_s)
    else:
        deadline = begun + limit_s * (1.0 + GRACE)
        _wait(lambda: store.check([outcome_key]), deadline, channel.size)
        waited = f"{limit_s * (1.0 + GRACE):.3g} s"
        outcome = f"rank {channel.rank} waited {waited} for the leader's decision in vain"
    first = bytes(store.compare_set(outcome_key, "", outcome)).decode()
    if channel.rank == 0:
        _forget(store, [f"{number}/from/{rank}" for rank in range(channel.size)])
    if first != _DECIDED:
        raise NoDecisionError(first)
    return bytes(store.get(f"{number}/decision"))


def _lead(store: KeyValueStore, size: int, number: int, deadline: float) -> str:
    """Collect, decide, set the decision; the outcome that the leader wants."""
    keys = [f"{number}/from/{rank}" for rank in range(size)]
    everybody = _wait(lambda: store.check(keys), deadline, size)
    messages = {
        rank: bytes(store.get(key)) if everybody or store.check([key]) else None
        for rank, key in enumerate(keys)
    }
    try:
        decision = encode_decision(decide(messages))
    # Whatever is wrong with the messages, the others must not wait until their time is up.
    except Exception as error:
        return f"the leader could not decide: {_short(error)}"
    store.set(f"{number}/decision", decision)
    return _DECIDED


def _wait(there: Callable[[], bool], deadline: float, size: int) -> bool:
    pause, longest = 0.001, max(0.02, size / ASKS_PER_S)
    while not there():
        left = deadline - time.monotonic()
        if left <= 0.0:
            return False
        time.sleep(min(pause, left))
        pause = min(1.5 * pause, longest)
    return True


def _forget(store: KeyValueStore, keys: list[str]) -> None:
    for key in keys:
        try:
            store.delete_key(key)
        except Exception as error:  # not every store can
            logger.debug("summaries stay in the store: %s", error)
            return


def _bounded(work: Callable[[], T], seconds: float) -> T:
    """work()'s result or exception; TimeoutError after that many seconds, leaving it behind."""
    answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((work(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=run, name="adaptive-moe-agreement", daemon=True).start()
    try:
        result, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"the ranks' store did not answer within {seconds:.3g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def _ours(
    tables: Mapping[SortingShape, PolicyTable], decision: Decision
) -> dict[SortingShape, PolicyTable]:
    names = {shape: canonical(shape) for shape in tables}
    return {
        shape: PolicyTable.from_json(decision.tables[name])
        for shape, name in names.items()
        if name in decision.tables
    }


def _problems(tables: Mapping[SortingShape, PolicyTable], decision: Decision) -> tuple[str, ...]:
    if decision.missing:
        few = [f"rank {rank} {why}" for rank, why in list(decision.missing.items())[:8]]
        more = len(decision.missing) - len(few)
        words = "; ".join(few) + (f"; and {more} more ranks" if more else "")
        return (f"{_WITHOUT} all shapes: {words}",)
    described = {canonical(shape): shape.describe() for shape in tables}
    return tuple(
        f"{_WITHOUT} {described.get(name, name)}: {why}" for name, why in decision.voided.items()
    )


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]
