"""Exchanges that ranks miss, repeat or come late to, and whether all are in step at the next one.

Between two of them ranks meet in a collective, as an engine's ranks do.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.ranks.agreement import Agreement, agree, look, open_channel
from adaptive_moe.ranks.channel import Channel

from .made_up import EAGER, GRAPH, made_up_table
from .ranks import hash_of, hosted_store, results_of, world

SHORT = {"eager": EAGER[:6], "graph": GRAPH[:4], "max_tokens": 64, "rounds": 12}
SIZE = 4
# Long enough that only a rank that is out of step could use it up.
PATIENT_S = 30.0

# What one rank brings: its table of the latest agreement, a table it has just measured, or nothing.
STATES = ("warm", "cold", "stood aside")
# What happens to the victim of an exchange, and whether the others should come to a table anyway.
EVENTS: dict[str, bool] = {
    "nothing": True,
    "a little late": True,
    "late": False,
    "missed": False,
    "doubled": True,
    "twice at once": True,
    "a dead leader's exchange is open": True,
}


def run(exchanges: int, limit_s: float, seed: int = 0) -> dict[str, Any]:
    """So many disturbed exchanges, each followed by one that is not."""
    chance = random.Random(seed)
    script = []
    for _ in range(exchanges):
        states = [[chance.choice(STATES) for _ in range(SIZE)] for _ in range(2)]
        for state in states:
            state[chance.randrange(SIZE)] = chance.choice(STATES[:2])
        script.append((chance.choice(list(EVENTS)), chance.randrange(SIZE), states))

    def work(rank: int) -> Any:
        channel = open_channel()
        assert channel is not None
        own = made_up_table(rank, **SHORT)
        found = []
        for number, (event, victim, states) in enumerate(script):
            step = []
            for part, state in enumerate(states):
                if state[rank] == "cold":
                    own = made_up_table(1000 * number + 100 * part + rank, **SHORT)
                bring = None if state[rank] == "stood aside" else own
                what = event if part == 0 and rank == victim else "nothing"
                if part == 0 and event == "twice at once":
                    what = event
                dist.barrier()
                got = _take_part(channel, bring, what, PATIENT_S if part else limit_s)
                own = next(iter(got.tables.values()), own)
                step.append({"table": hash_of(got), "problems": list(got.problems)})
            found.append(step)
        return found

    with hosted_store() as port:
        answers = results_of(world(SIZE, work, port=port), 30.0 * exchanges + 60.0)
    return _judged(script, answers)


def _take_part(channel: Channel, own: PolicyTable | None, event: str, limit_s: float) -> Agreement:
    tables = {} if own is None else {own.evidence.coverage: own}

    def once() -> Agreement:
        return agree(tables, {}, channel, limit_s=limit_s, over=over)

    # Not announced: the patient exchanges would make the others as patient.
    over = look(channel, 0.0)
    act: dict[str, Callable[[], Any]] = {
        "late": lambda: time.sleep(1.6 * limit_s),
        "a little late": lambda: time.sleep(0.3 * limit_s),
        "a dead leader's exchange is open": lambda: _leave_open(channel),
    }
    act.get(event, lambda: None)()
    if event == "missed":
        return Agreement({})
    if event == "twice at once":
        other = threading.Thread(target=once)
        other.start()
        first = once()
        other.join()
        return first
    first = once()
    if event == "doubled":
        over = look(channel, 0.0)
        once()
    return first


def _leave_open(channel: Channel) -> None:
    """As a leader does that dies while it collects. In one step: a dead leader opens nothing over
    what a live one has opened since."""
    store = channel.connect()
    known = bytes(store.get("open")).decode() if store.check(["open"]) else ""
    if not known or store.check([f"{int(known)}/outcome"]):
        store.compare_set("open", known, str(store.add("number", 1)))


def _judged(script: list[Any], answers: list[Any]) -> dict[str, Any]:
    failures: Counter[str] = Counter()
    events: Counter[str] = Counter()
    states: Counter[str] = Counter()
    in_step = agreed = 0
    for number, (event, victim, brought) in enumerate(script):
        role = "the leader" if victim == 0 else "a rank"
        name = event if event in ("nothing", "twice at once") else f"{role}: {event}"
        events[name] += 1
        for part in range(2):
            got = [answer[number][part] for answer in answers]
            tables = {one["table"] for one in got} - {None}
            states.update(brought[part])
            wanted = [s != "stood aside" for s in brought[part]]
            if len(tables) > 1:
                failures[f"{name}: different tables"] += 1
            everybody = [one["table"] is not None for one in got] == wanted
            if part and everybody:
                in_step += 1
            elif part or (EVENTS[event] and not everybody):
                failures[f"{name}: {'then ' * part}{[one['problems'] for one in got]}"[:400]] += 1
            agreed += not part and everybody
    return {
        "exchanges": len(script),
        "events": dict(events),
        "brought": dict(states),
        "agreed_all_the_same": agreed,
        "back_in_step": in_step,
        "failures": dict(failures),
    }
