"""What goes wrong at the seam, and what it costs: never a call, and never more than that call."""

import threading
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from adaptive_moe.engines.rare import MAX_FAILURES, MAX_SEEN
from tests.engines.at_once import at_once
from tests.engines.hooking import (
    KEY,
    batch,
    installed,
    number_of_sorts,
    policy_of,
    policy_that_arrived,
    seam_of,
    sort_arguments,
)
from tests.tables import make_table

# Two arrays, so that the stream is asked.
DIFFER = {KEY: make_table({1: 2, 64: 2}, {1: 1, 64: 1})}


def lines(caplog):
    return [r.message for r in caplog.records if r.name == "adaptive_moe"]


# Calls we cannot read


class Unhashable(int):
    __hash__ = None


class Shapeless:
    @property
    def shape(self):
        raise RuntimeError("no shape here")


def symbolic_ids(topk=4):
    """A size of 1 is never symbolic: with that topk the token count alone is."""
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env) as mode:
        return mode.from_tensor(torch.zeros((8, topk), dtype=torch.int32), static_shapes=False)


ODD = {
    "no tensor": lambda: {0: [[0, 1], [2, 3]]},
    "no matrix": lambda: {0: torch.zeros(8, dtype=torch.int32)},
    "three dimensions": lambda: {0: torch.zeros((2, 8, 4), dtype=torch.int32)},
    "no storage": lambda: {0: torch.zeros((8, 4), dtype=torch.int32, device="meta")},
    "symbolic sizes": lambda: {0: symbolic_ids()},
    "unhashable": lambda: {2: Unhashable(16)},
    "a property that raises": lambda: {0: Shapeless()},
    "a count in a tensor": lambda: {2: torch.tensor(16)},
    "no dtype": lambda: {4: "bfloat16"},
    "no policy": lambda: {8: None},
    "a policy in a tensor": lambda: {8: torch.tensor(0)},
}


@pytest.mark.parametrize("what", ODD)
def test_a_call_we_cannot_read_costs_itself_alone(what, caplog):
    received = []
    aiter = seam_of(lambda given: received.append(list(given.values())))
    hook = installed(aiter)
    odd = sort_arguments(8)
    for place, value in ODD[what]().items():
        odd[place] = value
    for _ in range(2 * MAX_FAILURES):
        aiter.moe_sorting(*odd)
        assert all(a is b for a, b in zip(received.pop(), odd, strict=True))
    assert hook.seen == {}
    assert hook.counts().odd == hook.counts().total == 2 * MAX_FAILURES
    hook.set_tables({KEY: make_table({1: 2, 64: 2})})
    aiter.moe_sorting(*sort_arguments(8))
    assert received.pop()[8] == 2
    assert not lines(caplog)


@pytest.mark.parametrize("topk", [1, 4])
def test_symbolic_sizes_get_no_guard_of_ours(topk):
    aiter = seam_of(policy_of)
    installed(aiter, tables={KEY._replace(topk=topk): make_table({1: 2, 64: 2})})
    arguments = sort_arguments(8, topk=topk)
    assert aiter.moe_sorting(*arguments) == 2
    ids = symbolic_ids(topk)
    assert aiter.moe_sorting(ids, *arguments[1:]) == 0
    assert ids.fake_mode.shape_env.guards == []


# Failures of our own


def test_our_failure_costs_that_call_its_choice_and_one_log_line(aiter, caplog):
    answers = iter([RuntimeError("driver says no")] * 2)

    def is_capturing():
        answer = next(answers, None)
        if answer is not None:
            raise answer
        return False

    hook = installed(aiter, tables=DIFFER, is_capturing=is_capturing)
    before = number_of_sorts()
    aiter.fused_moe(*batch(8))
    assert policy_that_arrived() == 0
    aiter.fused_moe(*batch(8))
    assert policy_that_arrived() == 2  # a passing failure has not switched us off
    assert number_of_sorts() == before + 2
    assert hook.counts().failed == 1
    assert lines(caplog) == [
        "a call ran as it came: choosing who sorts raised RuntimeError: driver says no"
    ]


def broken():
    raise RuntimeError("driver says no")


def test_failures_that_repeat_make_the_hook_stand_aside(aiter, caplog):
    hook = installed(aiter, tables=DIFFER, is_capturing=broken)
    for _ in range(MAX_FAILURES + 5):
        aiter.fused_moe(*batch(8))
        assert policy_that_arrived() == 0
    assert hook.counts().failed == MAX_FAILURES
    assert hook.layer is None
    why = "choosing who sorts raised RuntimeError: driver says no"
    assert lines(caplog) == [
        f"a call ran as it came: {why}",
        f"stepping aside in this process, everything runs as it came: {why}",
    ]


def test_install_brings_back_a_hook_that_stood_aside(aiter):
    failing = [True]

    def is_capturing():
        if failing[0]:
            broken()
        return False

    hook = installed(aiter, tables=DIFFER, is_capturing=is_capturing)
    for _ in range(MAX_FAILURES):
        aiter.fused_moe(*batch(8))
    failing[0] = False
    assert hook.install(aiter)
    aiter.fused_moe(*batch(8))
    assert policy_that_arrived() == 2
    failing[0] = True
    for left in range(MAX_FAILURES, 0, -1):  # counted anew
        assert hook.layer is not None, left
        aiter.fused_moe(*batch(8))
    assert hook.layer is None


def test_threads_that_fail_at_the_same_moment_share_the_lines(aiter, caplog):
    together = threading.Barrier(4)
    first_time = threading.local()

    def is_capturing():
        if not hasattr(first_time, "over"):
            first_time.over = True
            together.wait(30.0)
        broken()

    hook = installed(aiter, tables=DIFFER, is_capturing=is_capturing)
    at_once(*[partial(aiter.fused_moe, *batch(8))] * 4)
    assert hook.counts().failed == 4
    assert caplog.text.count("driver says no") == 1


def test_aiters_own_exception_reaches_the_caller_after_one_call(aiter, caplog):
    calls = []

    def failing(*args, **kwargs):
        calls.append(args)
        raise ValueError("AITER's own")

    aiter._moe_sorting_impl = failing
    hook = installed(aiter)
    for expected in (1, 2):
        if expected == 2:
            hook.set_tables({KEY: make_table({1: 2, 64: 2})})
        with pytest.raises(ValueError, match="AITER's own") as caught:
            aiter.fused_moe(*batch(8))
        assert len(calls) == expected
        assert caught.value.__context__ is None  # not "during handling of" something of ours
    assert not lines(caplog)


def test_endless_new_shapes_do_not_fill_the_memory():
    aiter = seam_of(lambda given: (torch.zeros(1),))
    hook = installed(aiter)
    for block_size in range(1, MAX_SEEN + 50):
        arguments = sort_arguments(1)
        arguments[5] = block_size
        aiter.moe_sorting(*arguments)
    assert len(hook.seen) == MAX_SEEN
    assert len(hook.layer.entries) == MAX_SEEN
    assert (hook.counts().unknown, hook.counts().failed) == (MAX_SEEN + 49, 0)


def test_endless_own_policies_do_not_fill_the_memory_either():
    aiter = seam_of(policy_of)
    hook = installed(aiter)
    for policy in range(3, 3 * MAX_SEEN):
        aiter.moe_sorting(*sort_arguments(1)[:8], policy)
    assert len(hook.layer.entries) <= 2 * MAX_SEEN
    assert hook.counts().own == 3 * MAX_SEEN - 3
