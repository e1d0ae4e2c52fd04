"""What goes wrong at the seam, and what it costs: never a call, and never more than that call."""

import threading
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from adaptive_moe.hook.slow_path import MAX_FAILURES, MAX_SEEN
from tests.hook.at_once import at_once
from tests.hook.hooking import (
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
    assert hook.counts().unreadable == hook.counts().total == 2 * MAX_FAILURES
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
        "a call ran as it came: choosing a sort raised RuntimeError: driver says no"
    ]


def broken():
    raise RuntimeError("driver says no")


def test_failures_that_repeat_make_the_hook_stand_aside(aiter, caplog):
    hook = installed(aiter, tables=DIFFER, is_capturing=broken)
    for _ in range(MAX_FAILURES + 5):
        aiter.fused_moe(*batch(8))
        assert policy_that_arrived() == 0
    assert hook.counts().failed == MAX_FAILURES
    assert hook.wrapped is None
    why = "choosing a sort raised RuntimeError: driver says no"
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
        assert hook.wrapped is not None, left
        aiter.fused_moe(*batch(8))
    assert hook.wrapped is None


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


def test_aiters_own_exception_of_the_baseline_reaches_the_caller_after_one_call(aiter, caplog):
    calls = []

    def failing(*args, **kwargs):
        calls.append(args)
        raise ValueError("AITER's own")

    aiter._moe_sorting_impl = failing
    hook = installed(aiter)
    for number in (1, 2):
        if number == 2:
            hook.set_tables({KEY: make_table({1: 0, 64: 0})})
        with pytest.raises(ValueError, match="AITER's own") as caught:
            aiter.fused_moe(*batch(8))
        assert len(calls) == number
        assert caught.value.__context__ is None  # not "during handling of" something of ours
    assert not lines(caplog)


# Candidates that raise while they serve


class Failing:
    """In place of AITER's implementation: raises for these policies; calls are those it was asked
    for."""

    def __init__(self, error, *policies):
        self.error, self.policies, self.calls = error, policies, []

    def __call__(self, *args, **kwargs):
        self.calls.append(args[8])
        if args[8] in self.policies:
            raise self.error
        return "outputs"


def test_a_policy_that_raises_hands_that_call_to_the_baseline_and_is_off(aiter, caplog):
    """Policy 2 needs a workspace: that memory runs out is the likely case."""
    hook = installed(aiter, tables={KEY: make_table({8: 2, 64: 1})})
    aiter._moe_sorting_impl = failing = Failing(RuntimeError("no workspace"), 2)
    assert [aiter.moe_sorting(*sort_arguments(8)) for _ in range(3)] == ["outputs"] * 3
    assert failing.calls == [2, 0, 0, 0]
    aiter.moe_sorting(*sort_arguments(64))
    assert failing.calls[-1] == 1
    assert lines(caplog) == [
        "policy 2 is off in this process and the baseline serves in its place: it raised "
        "RuntimeError: no workspace"
    ]
    counts = hook.counts()
    assert (counts.fell_back, counts.chosen, counts.baseline, counts.total) == (1, 2, 2, 4)
    hook.set_tables({KEY: make_table({64: 2})})  # off, whatever table comes
    aiter.moe_sorting(*sort_arguments(64))
    assert failing.calls[-1] == 0


def test_a_build_that_aiter_ends_with_a_message_ends_no_process(aiter, caplog):
    installed(aiter, tables={KEY: make_table({8: 2, 64: 1})})
    aiter._moe_sorting_impl = failing = Failing(SystemExit("[aiter] build failed"), 2)
    assert [aiter.moe_sorting(*sort_arguments(8)) for _ in range(2)] == ["outputs"] * 2
    assert failing.calls == [2, 0, 0]
    assert "raised SystemExit: [aiter] build failed" in caplog.text


@pytest.mark.parametrize("code", [None, 0, 1])
def test_a_process_that_is_told_to_end_ends(aiter, code, caplog):
    hook = installed(aiter, tables={KEY: make_table({64: 2})})
    aiter._moe_sorting_impl = Failing(SystemExit(code), 2)
    with pytest.raises(SystemExit):
        aiter.moe_sorting(*sort_arguments(8))
    assert lines(caplog) == []
    assert hook.counts().fell_back == 0


def test_a_candidate_that_raises_while_another_thread_uninstalls_falls_back(aiter):
    hook = installed(aiter, tables={KEY: make_table({64: 2})}, is_capturing=lambda: False)

    def fail_uninstalled(*args, **kwargs):
        if args[8] == 2:
            hook.uninstall()
            raise RuntimeError("gone")
        return "outputs"

    aiter._moe_sorting_impl = fail_uninstalled
    assert aiter.moe_sorting(*sort_arguments(8)) == "outputs"
    assert hook.counts().fell_back == 1


def test_a_baseline_is_never_off(aiter):
    hook = installed(aiter, tables={KEY: make_table({64: 2})}, engine_policy=2)
    aiter._moe_sorting_impl = Failing(RuntimeError("no workspace"), 2)
    aiter.moe_sorting(*sort_arguments(8))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no workspace"):
            aiter.moe_sorting(*sort_arguments(8)[:8], 2)
    assert hook.counts().fell_back == 1


def test_where_the_baseline_fails_too_its_own_exception_reaches_the_caller(aiter):
    hook = installed(aiter, tables={KEY: make_table({64: 2})})
    aiter._moe_sorting_impl = failing = Failing(ValueError("AITER's own"), 0, 2)
    with pytest.raises(ValueError, match="AITER's own") as caught:
        aiter.moe_sorting(*sort_arguments(8))
    assert failing.calls == [2, 0]
    assert caught.value.__context__ is None
    assert hook.counts().fell_back == 1


def test_under_capture_only_a_candidate_that_ran_out_of_memory_falls_back(aiter, caplog):
    """What another one launched before it raised would run again at each replay."""
    captured = [True]
    tables = {KEY: make_table({64: 2}, {8: 2, 64: 2})}
    hook = installed(aiter, tables=tables, is_capturing=lambda: captured[0])
    aiter._moe_sorting_impl = failing = Failing(RuntimeError("launch failed"), 2)
    with pytest.raises(RuntimeError, match="launch failed"):
        aiter.moe_sorting(*sort_arguments(8))
    assert failing.calls == [2]
    assert hook.counts().fell_back == 0
    assert aiter.moe_sorting(*sort_arguments(8)) == "outputs"  # it is off
    assert failing.calls == [2, 0]
    assert len(lines(caplog)) == 1

    aiter._moe_sorting_impl = failing = Failing(torch.cuda.OutOfMemoryError("full"), 1)
    hook.set_tables({KEY: make_table({64: 1}, {8: 1, 64: 1})})
    assert aiter.moe_sorting(*sort_arguments(8)) == "outputs"
    assert failing.calls == [1, 0]
    assert hook.counts().fell_back == 1


def test_where_nothing_says_whether_a_graph_is_captured_the_exception_passes_on(aiter):
    installed(aiter, tables={KEY: make_table({64: 2}, {8: 2, 64: 2})}, is_capturing=broken)
    aiter._moe_sorting_impl = Failing(RuntimeError("launch failed"), 2)
    with pytest.raises(RuntimeError, match="launch failed"):
        aiter.moe_sorting(*sort_arguments(8))


def test_endless_new_shapes_do_not_fill_the_memory():
    aiter = seam_of(lambda given: (torch.zeros(1),))
    hook = installed(aiter)
    for block_size in range(1, MAX_SEEN + 50):
        arguments = sort_arguments(1)
        arguments[5] = block_size
        aiter.moe_sorting(*arguments)
    assert len(hook.seen) == MAX_SEEN
    assert len(hook.wrapped.entries) == MAX_SEEN
    assert (hook.counts().unknown, hook.counts().failed) == (MAX_SEEN + 49, 0)


def test_endless_own_policies_do_not_fill_the_memory_either():
    aiter = seam_of(policy_of)
    hook = installed(aiter)
    for policy in range(3, 3 * MAX_SEEN):
        aiter.moe_sorting(*sort_arguments(1)[:8], policy)
    assert len(hook.wrapped.entries) <= 2 * MAX_SEEN
    assert hook.counts().callers_policy == 3 * MAX_SEEN - 3
