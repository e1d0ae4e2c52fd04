"""Ranks that agree over gloo, and ranks that are late, stopped, killed or have nothing to say."""

import hashlib
import logging
import os
import random
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from adaptive_moe.disk.folder import Store
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.decision import Standing
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.ranks.agreement import Agreement, agree, look, open_channel
from adaptive_moe.ranks.channel import Channel
from adaptive_moe.ranks.exchange import WHOLE

from .corrupt import listening
from .made_up import EAGER, GRAPH, SHAPE, key_of, made_up_table
from .processes import Child, finish, kill, start

OTHER = replace(SHAPE, topk=4)
SHORT = {"eager": EAGER[:6], "graph": GRAPH[:4], "max_tokens": 64}
# On top of what agree() itself allows: starting a thread, and a busy machine.
SLACK_S = 5.0

Work = Callable[[int], Any]


def noise(sizes: Sequence[int], runs: int) -> dict[str, Any]:
    """Ranks whose measurements differ: how often all of them end with the byte-identical table."""
    rows = []
    for size in sizes:

        def work(rank: int, size: int = size) -> list[list[str]]:
            hashes = []
            for run in range(runs):
                own = _noisy(1000 * run + rank)
                alone = own
                together = agree(_bring(own), {}, open_channel(), limit_s=60.0)
                # Alone, what counts is whether other policies would run, not other samples.
                hashes.append([(alone.eager + alone.graph).hex(), hash_of(together)])
            dist.barrier()
            return hashes

        begun = time.perf_counter()
        answers = results_of(world(size, work, store_in_rank_0=True), 600.0)
        seconds = time.perf_counter() - begun
        alone_differ = sum(len({a[run][0] for a in answers}) > 1 for run in range(runs))
        identical = sum(len({a[run][1] for a in answers}) == 1 for run in range(runs))
        rows.append(
            {
                "ranks": size,
                "runs": runs,
                "policies_differed_before": alone_differ,
                "identical_after": identical,
                "seconds": round(seconds, 1),
            }
        )
    return {"rows": rows, "failures": [r for r in rows if r["identical_after"] != runs]}


def faults(limit_s: float, names: Sequence[str] = ()) -> dict[str, Any]:
    """Each scenario of SCENARIOS once: who ended with what, how long it took, what was logged."""
    found: dict[str, Any] = {}
    failures: dict[str, Any] = {}
    for name, scenario in SCENARIOS.items():
        if names and name not in names:
            continue
        found[name] = scenario(limit_s)
        if not found[name]["as_expected"]:
            failures[name] = found[name]
    return {"limit_s": limit_s, "scenarios": found, "failures": failures}


def random_kills(kills: int, limit_s: float, seed: int = 0) -> dict[str, Any]:
    """A random one of four ranks is killed at a random moment of the exchange."""
    chance = random.Random(seed)
    ends: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    with hosted_store() as port:
        for number in range(kills):
            victim, delay = chance.randrange(4), chance.uniform(0.0, 0.03)

            def work(rank: int) -> Any:
                time.sleep(0.01 * (rank == 3))
                return _take_part(_bring(made_up_table(rank, **SHORT)), {}, limit_s)

            children = world(4, work, port=port, prefix=f"kill {number}")
            # world() returned when all had joined, so the delay hits the exchange.
            time.sleep(delay)
            kill(children[victim])
            answers = [finish(child, 3.0 * limit_s + 60.0) for child in children]
            survivors = [a for rank, a in enumerate(answers) if rank != victim]
            if not all("result" in a for a in survivors):
                failures[str(survivors)[:300]] += 1
                continue
            results = [a["result"] for a in survivors]
            if len({str(r["tables"]) for r in results}) != 1:
                failures["survivors ended with different tables"] += 1
            if max(r["seconds"] for r in results) > WHOLE * limit_s + SLACK_S:
                failures["a survivor waited too long"] += 1
            role = "leader" if victim == 0 else "another rank"
            end = "a table" if results[0]["tables"] else "the baseline"
            ends[f"{role} killed: survivors have {end}"] += 1
    return {"kills": kills, "ends": dict(ends), "failures": dict(failures)}


# Scenarios. Each says what must come out; `_judged` adds what did.


def mixed(limit_s: float) -> dict[str, Any]:
    """Warm from disk, cold, failed for one of two shapes, without any MoE layer."""
    with tempfile.TemporaryDirectory() as folder:
        warm = made_up_table(1, **SHORT)
        Store(Path(folder)).publish({key_of(warm): warm})

        def work(rank: int) -> Any:
            other = made_up_table(10 + rank, shape=OTHER, **SHORT)
            have: dict[Coverage, PolicyTable] = {}
            failed: dict[Coverage, str] = {}
            if rank == 0:
                loaded = Store(Path(folder)).load(key_of(warm))
                assert loaded is not None
                have = _bring(loaded.table, other)
            elif rank == 1:
                have = _bring(made_up_table(2, **SHORT), other)
            elif rank == 2:
                have = _bring(made_up_table(3, **SHORT))
                failed = {other.evidence.coverage: "out of memory"}
            return _take_part(have, failed, 10.0 * limit_s)

        answers = results_of(_hosted(4, work))
    tables = [a["tables"] for a in answers]
    return _judged(
        answers,
        # Shared where measured; the failed shape for nobody; nothing for who has no layer.
        [len(t) for t in tables] == [1, 1, 1, 0]
        and len({str(t) for t in tables[:3]}) == 1
        and all(OTHER.describe() not in t for t in tables[:3])
        and any("out of memory" in line for a in answers for line in a["log"]),
        10.0 * limit_s,
    )


def nobody_has_a_layer(limit_s: float) -> dict[str, Any]:
    answers = results_of(_hosted(2, lambda rank: _take_part({}, {}, 10.0 * limit_s)))
    quiet = all(a["tables"] == {} and a["log"] == [] for a in answers)
    return _judged(answers, quiet, 10.0 * limit_s)


def policy_wrong_on_one_rank(limit_s: float) -> dict[str, Any]:
    """What is fastest for three ranks gives wrong output on the fourth: nobody runs it."""

    def work(rank: int) -> Any:
        out = {1: (Standing.WRONG, "lost a token")} if rank == 3 else None
        return _take_part(_bring(made_up_table(rank, out=out, **SHORT)), {}, 10.0 * limit_s)

    answers = results_of(_hosted(4, work))
    return _judged(answers, all(a["policies"] == [0] for a in answers), 10.0 * limit_s)


def rank_asked_otherwise(limit_s: float) -> dict[str, Any]:
    def work(rank: int) -> Any:
        kernel = "aiter 0.1.8 opus" if rank == 1 else "aiter 0.1.9 opus"
        own = made_up_table(rank, kernel=kernel, **SHORT)
        return _take_part(_bring(own), {}, 10.0 * limit_s)

    answers = results_of(_hosted(3, work))
    told = any("kernel" in line and "0.1.8" in line for a in answers for line in a["log"])
    return _judged(answers, _all_baseline(answers) and told, 10.0 * limit_s)


def rank_sleeps(limit_s: float, sleeper: int = 2) -> dict[str, Any]:
    """It comes when all is decided, and must end like the others."""

    def work(rank: int) -> Any:
        over = look(_channel(), 0.0)
        if rank == sleeper:
            time.sleep(1.8 * limit_s)
        return _take_part(_bring(made_up_table(rank, **SHORT)), {}, limit_s, over)

    answers = results_of(_hosted(3, work))
    told = sum(bool(a["log"]) for a in answers)
    return _judged(answers, _all_baseline(answers) and told >= 1, limit_s)


def leader_sleeps(limit_s: float) -> dict[str, Any]:
    return rank_sleeps(limit_s, sleeper=0)


def rank_dies(limit_s: float, victim: int = 2) -> dict[str, Any]:
    """Killed before it says anything."""

    def work(rank: int) -> Any:
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return _take_part(_bring(made_up_table(rank, **SHORT)), {}, limit_s)

    answers = results_of(_hosted(3, work), dead=[victim])
    told = sum(bool(a["log"]) for a in answers)
    return _judged(answers, _all_baseline(answers) and told >= 1, limit_s)


def leader_dies(limit_s: float) -> dict[str, Any]:
    return rank_dies(limit_s, victim=0)


def leader_dies_with_the_store(limit_s: float) -> dict[str, Any]:
    def work(rank: int) -> Any:
        if rank == 0:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        return _take_part(_bring(made_up_table(rank, **SHORT)), {}, limit_s)

    answers = results_of(world(3, work, store_in_rank_0=True), dead=[0])
    told = all(a["log"] for a in answers)
    return _judged(answers, _all_baseline(answers) and told, limit_s)


def store_stops_answering(limit_s: float) -> dict[str, Any]:
    """The process that hosts the store is stopped, not dead: connections stay open, and silent."""

    def work(rank: int) -> Any:
        if rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.3)
        return _take_part(_bring(made_up_table(rank, **SHORT)), {}, limit_s)

    children = world(3, work, store_in_rank_0=True)
    answers = results_of(children[1:])
    kill(children[0])
    finish(children[0])
    told = all(a["log"] for a in answers)
    return _judged(answers, _all_baseline(answers) and told, limit_s)


def rank_sends_garbage(limit_s: float) -> dict[str, Any]:
    """As a rank that runs another version would: what it sends is nothing we know."""
    from adaptive_moe.ranks import agreement

    def work(rank: int) -> Any:
        if rank == 1:
            agreement.encode_message = lambda tables, failed: b'{"format": 99}\n\x00\xff'
        return _take_part(_bring(made_up_table(rank, **SHORT)), {}, 10.0 * limit_s)

    answers = results_of(_hosted(3, work))
    told = any("format" in line for a in answers for line in a["log"])
    return _judged(answers, _all_baseline(answers) and told, 10.0 * limit_s)


def second_exchange(limit_s: float) -> dict[str, Any]:
    """A later warm-up starts afresh, also after one that a rank came too late to."""

    def work(rank: int) -> Any:
        over = look(_channel(), 0.0)
        if rank == 1:
            time.sleep(1.8 * limit_s)
        first = _take_part(_bring(made_up_table(rank, **SHORT)), {}, limit_s, over)
        second = _take_part(_bring(made_up_table(rank, **SHORT)), {}, 20.0 * limit_s)
        return {**second, "first": first["tables"]}

    answers = results_of(_hosted(2, work))
    good = (
        all(a["first"] == {} for a in answers)
        and len({str(a["tables"]) for a in answers}) == 1
        and all(a["tables"] for a in answers)
    )
    return _judged(answers, good, 20.0 * limit_s)


def groups_of_the_same_ranks(limit_s: float) -> dict[str, Any]:
    """Two groups with the same members, at the same time and not in the same order."""

    def work(rank: int) -> Any:
        groups = [dist.new_group([0, 1, 2]) for _ in range(2)]
        found: dict[int, dict[str, Any]] = {}

        def take_part(place: int) -> None:
            own = made_up_table(10 * place + rank, **SHORT)
            time.sleep(0.05 * (place == rank % 2))
            agreed = agree(_bring(own), {}, open_channel(groups[place]), limit_s=10.0 * limit_s)
            found[place] = {"table": hash_of(agreed), "seconds": agreed.seconds}

        threads = [threading.Thread(target=take_part, args=(place,)) for place in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        tables = {str(place): one["table"] for place, one in sorted(found.items())}
        return {
            "tables": tables,
            "seconds": max(one["seconds"] for one in found.values()),
            "log": [],
        }

    answers = results_of(_hosted(3, work))
    same = len({str(a["tables"]) for a in answers}) == 1
    apart = len(set(answers[0]["tables"].values()) - {None}) == 2
    return _judged(answers, same and apart, 10.0 * limit_s)


SCENARIOS: dict[str, Callable[[float], dict[str, Any]]] = {
    "warm, cold, failed and no MoE layer": mixed,
    "nobody has a MoE layer": nobody_has_a_layer,
    "a policy is wrong on one rank": policy_wrong_on_one_rank,
    "a rank runs another kernel": rank_asked_otherwise,
    "a rank sends garbage": rank_sends_garbage,
    "a rank sleeps past the limit": rank_sleeps,
    "the leader sleeps past the limit": leader_sleeps,
    "a rank dies": rank_dies,
    "the leader dies": leader_dies,
    "the leader dies, and the store with it": leader_dies_with_the_store,
    "the store stops answering": store_stops_answering,
    "a second exchange after a failed one": second_exchange,
    "two groups of the same ranks at once": groups_of_the_same_ranks,
}


def world(
    size: int,
    work: Work,
    *,
    store_in_rank_0: bool = False,
    port: int = 0,
    prefix: str = "",
) -> list[Child]:
    """`size` processes in one gloo group, each running work(rank); returns when all have joined.
    The store lives in rank 0, or where `port` says."""
    gate, opener = os.pipe()
    port = port or free_port()

    def join(rank: int) -> Any:
        os.close(gate)
        quiet = timedelta(seconds=60)
        if store_in_rank_0:
            dist.init_process_group(
                "gloo", f"tcp://127.0.0.1:{port}", quiet, world_size=size, rank=rank
            )
        else:
            tcp = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=quiet)
            store = dist.PrefixStore(prefix, tcp)
            dist.init_process_group("gloo", timeout=quiet, world_size=size, rank=rank, store=store)
        dist.barrier()
        os.write(opener, b".")
        return work(rank)

    children = [start(lambda rank=rank: join(rank)) for rank in range(size)]
    os.close(opener)
    joined = 0
    while joined < size and (part := os.read(gate, size)):
        joined += len(part)
    os.close(gate)
    return children


@contextmanager
def hosted_store():
    """A store in a process of its own, so that any rank may die without it; yields its port."""
    port = free_port()

    def host() -> None:
        kept = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        while kept:
            time.sleep(60.0)

    child = start(host)
    try:
        yield port
    finally:
        kill(child)
        finish(child)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _hosted(size: int, work: Work) -> list[Child]:
    return _Hosted(size, work)


class _Hosted(list[Child]):
    """Children whose store is ended with them."""

    def __init__(self, size: int, work: Work) -> None:
        self.host = hosted_store()
        super().__init__(world(size, work, port=self.host.__enter__()))

    def end(self) -> None:
        self.host.__exit__(None, None, None)


def _take_part(
    tables: dict[Coverage, PolicyTable],
    failed: dict[Coverage, str],
    limit_s: float,
    over: int | None = None,
) -> dict[str, Any]:
    begun = time.monotonic()
    with listening(logging.WARNING) as lines:
        agreed = agree(tables, failed, _channel(), limit_s=limit_s, over=over)
    return {
        "tables": {one.describe(): _hash(table) for one, table in agreed.tables.items()},
        "policies": sorted({p for t in agreed.tables.values() for p in t.eager[1:] + t.graph[1:]}),
        "problems": list(agreed.problems),
        "log": lines,
        "seconds": round(time.monotonic() - begun, 3),
    }


def results_of(
    children: list[Child], seconds: float = 180.0, dead: Sequence[int] = ()
) -> list[dict[str, Any]]:
    answers = [finish(child, seconds) for child in children]
    if isinstance(children, _Hosted):
        children.end()
    for rank, answer in enumerate(answers):
        expected = "signal" if rank in dead else "result"
        if expected not in answer:
            raise AssertionError(f"rank {rank}: {answer}")
    return [a["result"] for a in answers if "result" in a]


def _judged(answers: list[dict[str, Any]], good: bool, limit_s: float) -> dict[str, Any]:
    longest = max(a["seconds"] for a in answers)
    return {
        "as_expected": good and longest <= WHOLE * limit_s + SLACK_S,
        "longest_s": longest,
        "tables": [len(a["tables"]) for a in answers],
        "log": sorted({line for a in answers for line in a["log"]}),
    }


def _all_baseline(answers: list[dict[str, Any]]) -> bool:
    return all(a["tables"] == {} and a["problems"] for a in answers)


def _noisy(seed: int) -> PolicyTable:
    """True gains near the margin, so that ranks decide differently; refined at different counts."""
    chance = random.Random(seed)
    more = chance.sample((3, 5, 6, 7, 12, 24, 48), 3)
    return made_up_table(
        seed,
        gains=(0.0, 0.02, 0.025),
        speed=chance.uniform(0.95, 1.05),
        eager=sorted({*EAGER[:8], *more}),
        graph=sorted({*GRAPH[:6], 5, chance.choice((3, 6, 12))}),
        captured=range(1, GRAPH[5] + 1),
        max_tokens=256,
        rounds=15,
    )


def _channel() -> Channel:
    channel = open_channel()
    assert channel is not None
    return channel


def _bring(*tables: PolicyTable) -> dict[Coverage, PolicyTable]:
    return {table.evidence.coverage: table for table in tables}


def hash_of(agreed: Agreement) -> str | None:
    """Of the one table that was agreed, or None."""
    return next((_hash(table) for table in agreed.tables.values()), None)


def _hash(table: PolicyTable) -> str:
    return hashlib.sha256(table.to_json().encode()).hexdigest()
