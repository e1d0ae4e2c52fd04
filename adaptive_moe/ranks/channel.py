"""How one rank reaches the others: the key-value store under torch.distributed. No collective.

It is the connection that torch has: a new one may stall all ranks, because the store's host looks
up the name of whoever connects. Nothing here waits for a key: that would keep others in this
process from the store.
"""

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch.distributed as dist


class KeyValueStore(Protocol):
    """What is used of torch.distributed.Store."""

    def set(self, key: str, value: bytes | str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def add(self, key: str, amount: int) -> int: ...
    def check(self, keys: list[str]) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...
    def delete_key(self, key: str) -> bool: ...


@dataclass
class Turn:
    """One exchange of a channel at a time in this process; number: the latest it came to."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    number: int = 0


@dataclass(frozen=True)
class Channel:
    """One rank's way to the others. connect: called on a thread of its own, once an exchange."""

    rank: int
    size: int
    connect: Callable[[], KeyValueStore]
    turn: Turn = field(default_factory=Turn, compare=False)


_turns: dict[str, Turn] = {}


def open_channel(group: "dist.ProcessGroup | None" = None, topic: str = "") -> Channel | None:
    """The channel of a process group (all ranks by default); None where there is just one rank.

    Groups of the same ranks are told apart by torch's name of them, which is the same on all ranks;
    whoever uses one group for two things at once gives each a `topic`.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return None
    group = group or dist.group.WORLD
    ranks = dist.get_process_group_ranks(group)
    if len(ranks) < 2:
        return None
    identity = repr((ranks, getattr(group, "group_name", ""), topic))
    name = f"adaptive_moe/{hashlib.sha256(identity.encode()).hexdigest()[:16]}"

    def connect() -> KeyValueStore:
        # The one part of torch.distributed without a public name, there since its first versions.
        from torch.distributed.distributed_c10d import _get_default_store

        store: Any = dist.PrefixStore(name, _get_default_store())  # type: ignore[attr-defined]
        return store  # type: ignore[no-any-return]

    rank = ranks.index(dist.get_rank())
    return Channel(rank, len(ranks), connect, _turns.setdefault(name, Turn()))
