"""Ranks over gloo that share tables, and ranks that are missing, killed, late or restarted; and a
store that dies or falls silent. No rank may wait for another.

Each rank has a folder of its own and a stand-in that measures: it sleeps, and comes to a table that
no other rank comes to.
"""

import hashlib
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from adaptive_moe.policy.evidence import Evidence
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.store.folder import Folder
from adaptive_moe.store.shared import LIMIT_S, SharedStore
from adaptive_moe.store.tables import Stores, table_for
from adaptive_moe.store.text import to_text
from tests.store.making import HERE, REQUEST, key_for_table, made_table

from .damaged import listening
from .processes import Child, finish, kill, start

# On top of what the store may cost a rank: starting a thread, and a busy machine.
SLACK_S = 3.0

Work = Callable[[int], Any]


def run(size: int, late_s: float, names: Sequence[str] = ()) -> dict[str, Any]:
    """Each of SCENES once with so many ranks: which rank ended with which table, and how long it
    took beyond its own measuring. late_s: how late a late rank is."""
    scenes: dict[str, Any] = {}
    for name, scene in SCENES.items():
        if not names or name in names:
            with tempfile.TemporaryDirectory() as folder:
                scenes[name] = scene(Path(folder), size, late_s)
    failures = {name: scene for name, scene in scenes.items() if not scene["as_expected"]}
    return {"ranks": size, "scenes": scenes, "failures": failures}


def warm_up(folder: Path, rank: int, *, torch: str = HERE.torch, dies: bool = False) -> Any:
    """One rank's warm-up of one shape."""
    mine = made_table(seconds=1.0 + rank, environment=replace(HERE, torch=torch))
    measured_s = 0.0

    def measure(earlier: Evidence | None) -> PolicyTable:
        nonlocal measured_s
        begun = time.monotonic()
        time.sleep(0.5 + 0.1 * rank)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        measured_s = time.monotonic() - begun
        return mine

    begun = time.monotonic()
    with listening() as lines, SharedStore() as shared:
        stores = Stores(Folder(folder / str(rank)), shared)
        served = table_for(key_for_table(mine), stores, measure, 1.5)
    return {
        "table": hashlib.sha256(to_text(REQUEST, served.table).encode()).hexdigest()[:8],
        "origin": served.origin,
        "kept": served.is_kept,
        "beyond_measuring_s": round(time.monotonic() - begun - measured_s, 3),
        "log": lines,
    }


# Scenes


def all_come(folder: Path, size: int, late_s: float) -> dict[str, Any]:
    """And the start after that measures nothing, on any rank."""

    def work(rank: int) -> Any:
        return warm_up(folder, rank)

    first, second = results_of(world(size, work)), results_of(world(size, work))
    nothing_measured = all(answer["origin"] == "stored" for answer in second)
    return _judged([*first, *second], 1, nothing_measured)


def one_is_missing(folder: Path, size: int, late_s: float) -> dict[str, Any]:
    """It is in the group, and never warms up."""

    def work(rank: int) -> Any:
        return warm_up(folder, rank) if rank else time.sleep(600.0)

    with hosted_store() as (port, _):
        children = world(size, work, port=port)
        answers = results_of(children[1:])
        kill(children[0])
        finish(children[0])
    return _judged(answers, 1)


def one_is_killed_while_measuring(folder: Path, size: int, late_s: float) -> dict[str, Any]:
    def work(rank: int) -> Any:
        return warm_up(folder, rank, dies=rank == 1)

    with hosted_store() as (port, _):
        return _judged(results_of(world(size, work, port=port), dead=[1]), 1)


def all_are_restarted_after_that(folder: Path, size: int, late_s: float) -> dict[str, Any]:
    """As torchrun does it: over the same store, under another name. Only the rank that was killed
    has nothing in its folder."""
    with hosted_store() as (port, _):
        first = world(size, lambda r: warm_up(folder, r, dies=r == 1), port=port, name="first")
        answers = results_of(first, dead=[1])
        again = results_of(world(size, lambda r: warm_up(folder, r), port=port, name="second"))
    others_measured = any(a["origin"] == "measured" for n, a in enumerate(again) if n != 1)
    return _judged([*answers, *again], 1, not others_measured)


def one_is_late(folder: Path, size: int, late_s: float) -> dict[str, Any]:
    """It measures nothing, and uses what the others do."""

    def work(rank: int) -> Any:
        time.sleep(late_s * (rank == 1))
        return warm_up(folder, rank)

    with hosted_store() as (port, _):
        answers = results_of(world(size, work, port=port))
    return _judged(answers, 1, answers[1]["origin"] == "shared")


def two_versions_of_torch(folder: Path, size: int, late_s: float) -> dict[str, Any]:
    def work(rank: int) -> Any:
        return warm_up(folder, rank, torch="2.13.0" if rank % 2 else "2.9.0")

    answers = results_of(world(size, work))
    apart = [{a["table"] for a in answers[place::2]} for place in (0, 1)]
    return _judged(answers, 2, [len(tables) for tables in apart] == [1, 1])


def store_is_killed(folder: Path, size: int, late_s: float) -> dict[str, Any]:
    return _store_fails(folder, size, signal.SIGKILL)


def store_is_stopped(folder: Path, size: int, late_s: float) -> dict[str, Any]:
    """Its connections stay open, and silent."""
    return _store_fails(folder, size, signal.SIGSTOP)


def _store_fails(folder: Path, size: int, number: int) -> dict[str, Any]:
    """Each rank uses its own table, after one line."""
    with hosted_store() as (port, host):

        def work(rank: int) -> Any:
            if rank == 0:
                os.kill(host, number)
            time.sleep(0.5)
            return warm_up(folder, rank)

        answers = results_of(world(size, work, port=port))
    own = all(a["origin"] == "measured" and len(a["log"]) == 1 for a in answers)
    return _judged(answers, size, own, lines=size)


SCENES: dict[str, Callable[[Path, int, float], dict[str, Any]]] = {
    "all come, and the next start": all_come,
    "one is missing": one_is_missing,
    "one is killed while measuring": one_is_killed_while_measuring,
    "all are restarted after that": all_are_restarted_after_that,
    "one is late": one_is_late,
    "two versions of torch": two_versions_of_torch,
    "the store is killed": store_is_killed,
    "the store is stopped": store_is_stopped,
}


def _judged(
    answers: list[dict[str, Any]], tables: int, good: bool = True, lines: int = 0
) -> dict[str, Any]:
    """tables: how many different ones there should be; lines: of the logs of all ranks."""
    longest = max(a["beyond_measuring_s"] for a in answers)
    found = {a["table"] for a in answers}
    log = [line for a in answers for line in a["log"]]
    kept = all(a["kept"] for a in answers)
    in_time = longest <= LIMIT_S + SLACK_S
    return {
        "as_expected": good and in_time and kept and len(found) == tables and len(log) == lines,
        "different_tables": len(found),
        "origins": [a["origin"] for a in answers],
        "longest_beyond_measuring_s": longest,
        "log": sorted(set(log)),
    }


# Processes


def world(size: int, work: Work, *, port: int = 0, name: str = "") -> list[Child]:
    """`size` processes in one gloo group, each running work(rank); returns when all have joined.
    The store lives in rank 0, or where `port` says, there under that name."""
    gate, opener = os.pipe()
    own_port = 0 if port else free_port()

    def join(rank: int) -> Any:
        os.close(gate)
        quiet = timedelta(seconds=60)
        options: dict[str, Any] = {"timeout": quiet, "world_size": size, "rank": rank}
        if port:
            tcp = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=quiet)
            dist.init_process_group("gloo", store=dist.PrefixStore(name, tcp), **options)
        else:
            dist.init_process_group("gloo", f"tcp://127.0.0.1:{own_port}", **options)
        dist.barrier()
        os.write(opener, b".")
        answer = work(rank)
        if not port:
            dist.barrier()  # rank 0 holds the store until all are done
        return answer

    children = [start(lambda rank=rank: join(rank)) for rank in range(size)]
    os.close(opener)
    joined = 0
    while joined < size and (part := os.read(gate, size)):
        joined += len(part)
    os.close(gate)
    return children


@contextmanager
def hosted_store() -> Iterator[tuple[int, int]]:
    """A store in a process of its own, so that any rank may die without it; yields its port and
    that process's id."""
    port = free_port()

    def host() -> None:
        kept = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        while kept:
            time.sleep(60.0)

    child = start(host)
    try:
        yield port, child.pid
    finally:
        kill(child)
        finish(child)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def results_of(
    children: Sequence[Child], seconds: float = 180.0, dead: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """What each child returned, without those that died as expected."""
    answers = [finish(child, seconds) for child in children]
    for rank, answer in enumerate(answers):
        expected = "signal" if rank in dead else "result"
        if expected not in answer:
            raise AssertionError(f"rank {rank}: {answer}")
    return [answer["result"] for answer in answers if "result" in answer]
