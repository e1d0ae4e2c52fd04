"""Calls from many threads, while tables and wrappers change."""

import threading

import torch

from adaptive_moe.hook.hook import AiterHook
from tests.hook.at_once import at_once
from tests.hook.hooking import AUTO, KEY, installed, seam_of, sort_arguments
from tests.tables import make_table


def test_no_call_is_lost_or_gets_a_wrong_policy_while_everything_changes(switch_often):
    """10,000 calls from 8 threads: shapes appear, tables are swapped, wrappers come and go."""
    arrived = []

    def answer(given):
        arrived.append(given["dispatch_policy"])
        return arrived[-1]

    module = seam_of(answer)
    original = module.moe_sorting
    hook = AiterHook(AUTO)
    hook.install(module)
    dims = range(64, 72)
    allowed = {dim: {0, 1 + dim % 2} for dim in dims}
    tables = {
        KEY._replace(model_dim=dim): make_table({1: 1 + dim % 2, 64: 1 + dim % 2}) for dim in dims
    }
    hook.set_tables(tables)
    problems, stop = [], threading.Event()
    race = threading.Barrier(11)

    def call(thread):
        ids = [torch.zeros((count, 4), dtype=torch.int32) for count in range(1, 9)]
        for number in range(1250):
            if number == 50:  # until here every call finds its table, from here anything goes
                race.wait()
            dim = dims[(number + thread) % len(dims)]
            try:
                got = module.moe_sorting(ids[number % 8], None, 16, dim, torch.bfloat16)
            except Exception as error:
                problems.append(error)
            else:
                if got not in allowed[dim]:
                    problems.append((dim, got))

    def swap_tables():
        race.wait()
        while not stop.is_set():
            hook.set_tables(dict.fromkeys(tables, make_table({64: 0})))
            hook.set_tables(tables)

    def come_and_go():
        race.wait()
        while not stop.is_set():
            hook.uninstall()
            hook.install(module)

    callers = [threading.Thread(target=call, args=(thread,)) for thread in range(8)]
    others = [threading.Thread(target=work) for work in (swap_tables, come_and_go, come_and_go)]
    for thread in callers + others:
        thread.start()
    for thread in callers:
        thread.join()
    stop.set()
    for thread in others:
        thread.join()
    assert problems == []
    assert len(arrived) == 10_000
    assert set(arrived) >= {1, 2}
    assert hook.counts().failed == 0
    hook.uninstall()
    assert module.moe_sorting is original


def test_counters_lose_no_call_under_threads(aiter, switch_often):
    hook = installed(aiter, tables={KEY: make_table({1: 2, 64: 2})})
    pick = hook.wrapped.wrapper
    arguments = sort_arguments(8)
    aiter._moe_sorting_impl = lambda *args, **kwargs: None
    start = threading.Barrier(8)

    def call():
        start.wait()
        for number in range(1250):
            pick(*arguments, flat=number % 2 == 0)
            hook.counts()  # reading at the same time must not disturb the count

    at_once(*[call] * 8)
    assert (hook.counts().chosen, hook.counts().passed, hook.counts().total) == (5000, 5000, 10_000)
