"""Other sorts at the seam: they answer calls, and where one raises the baseline does."""

import inspect
import sys
import threading
from types import ModuleType

import pytest
import torch

from adaptive_moe.kernels import cpu_sort
from adaptive_moe.kernels.sorts import REGISTRY, OtherSort
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.settings import Mode, Settings
from adaptive_moe.shape import SortingShape
from tests.aiter_standin.load import load_aiter
from tests.hook.at_once import at_once
from tests.hook.hooking import (
    KEY,
    arrived,
    batch,
    installed,
    number_of_sorts,
    policy_that_arrived,
    sort_arguments,
)
from tests.tables import make_table

COVERAGE = Coverage.up_to(SortingShape(16, 4, 64), 64)
SORTS = Settings(mode=Mode.AUTO, sorts=("policies", "bitonic", "radix"))


class Sort:
    """Another sort on the CPU: what it was called with, and what it raises."""

    def __init__(self):
        self.calls = []
        self.error = None
        self.together = None  # a barrier, where calls are to raise at the same moment

    def __call__(self, *leading):
        self.calls.append(leading)
        if self.together is not None:
            self.together.wait(30.0)
        if self.error is not None:
            raise self.error
        *arguments, accumulate = leading
        return cpu_sort.moe_sorting(*arguments, 2, accumulate=accumulate)


@pytest.fixture
def others(monkeypatch):
    module = ModuleType("somebodys.sorts")
    module.bitonic, module.radix = Sort(), Sort()
    module.sorts = lambda live, shape: iter(
        [OtherSort("bitonic", module.bitonic, "1"), OtherSort("radix", module.radix, "1")]
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("bitonic", "radix"):
        monkeypatch.setitem(REGISTRY, name, module.__name__)
    return module


def serving(aiter, choices, graph=None, **options):
    """A hook whose table has these candidates by index: policies 0, 1, 2, bitonic, radix."""
    hook = installed(aiter, SORTS, **options)
    aiter.fused_moe(*batch(8))
    kernel = hook.kernel(hook.seen[KEY], KEY, COVERAGE)
    names = [candidate.name for candidate in kernel.candidates]
    assert names == ["policy 0", "policy 1", "policy 2", "bitonic", "radix"]
    hook.set_tables({KEY: make_table(choices, graph, candidates=names)})
    return hook


def test_each_count_is_answered_by_the_sort_its_byte_names(aiter, others):
    serving(aiter, {1: 3, 2: 2, 3: 4, 4: 0, 64: 1})
    for count, bitonic, radix, policy in (
        (1, 1, 0, None),
        (2, 1, 0, 2),
        (3, 1, 1, None),
        (4, 1, 1, 0),
        (50, 1, 1, 1),
    ):
        before = number_of_sorts()
        aiter.fused_moe(*batch(count))
        assert (len(others.bitonic.calls), len(others.radix.calls)) == (bitonic, radix)
        assert number_of_sorts() - before == (policy is not None)
        if policy is not None:
            assert policy_that_arrived() == policy


def test_another_sort_gets_the_callers_arguments_and_its_results_go_back(aiter, others):
    serving(aiter, {64: 3})
    plain = aiter.fused_moe(*batch(33, seed=3))
    sent = sort_arguments(8)
    outputs = aiter.moe_sorting(*sent, accumulate=True)
    got = others.bitonic.calls[-1]
    assert all(a is b for a, b in zip(got, [*sent[:8], True], strict=True))
    assert len(outputs) == 5
    aiter_alone = aiter.fused_moe(*batch(33, seed=3), moe_sorting_dispatch_policy=1)
    assert torch.equal(plain, aiter_alone)


def test_another_sort_in_place_of_a_seam_that_always_accumulates_does_too(others):
    aiter = load_aiter("v0.1.5")
    assert "accumulate" not in inspect.signature(aiter.moe_sorting).parameters
    hook = serving(aiter, {64: 3})
    aiter.moe_sorting(*sort_arguments(8))
    assert others.bitonic.calls[-1][-1] is True
    assert hook.counts().fell_back == 0


def test_other_sorts_count_as_chosen_and_are_told_from_captured_calls(aiter, others):
    captured = [False]
    hook = serving(aiter, {64: 3}, {8: 1, 64: 1}, is_capturing=lambda: captured[0])
    for captured[0], calls in ((False, 1), (True, 1), (False, 2)):
        aiter.fused_moe(*batch(8))
        assert len(others.bitonic.calls) == calls
    assert hook.counts().chosen == 3


def test_a_sort_that_raises_hands_that_call_to_the_baseline_and_is_off(aiter, others, caplog):
    hook = serving(aiter, {2: 3, 8: 4, 64: 2})
    others.bitonic.error = RuntimeError("no such instruction")
    before = number_of_sorts()
    expected = aiter.fused_moe(*batch(2), moe_sorting_dispatch_policy=1)
    for attempt in range(3):
        assert torch.equal(aiter.fused_moe(*batch(2)), expected)
        assert policy_that_arrived() == 0
        assert number_of_sorts() == before + 2 + attempt
    assert len(others.bitonic.calls) == 1
    assert [r.message for r in caplog.records] == [
        "bitonic is off in this process and the baseline serves in its place: it raised "
        "RuntimeError: no such instruction"
    ]
    counts = hook.counts()
    assert (counts.fell_back, counts.chosen, counts.baseline) == (1, 1, 2)
    assert counts.total == counts.chosen + counts.baseline + counts.callers_policy + counts.unknown
    # The others go on.
    aiter.fused_moe(*batch(8))
    assert len(others.radix.calls) == 1
    aiter.fused_moe(*batch(64))
    assert policy_that_arrived() == 2
    # Until one of them raises too, which brings nobody back.
    others.radix.error = RuntimeError("nor this one")
    for count in (8, 2):
        aiter.fused_moe(*batch(count))
        assert policy_that_arrived() == 0
    assert (len(others.bitonic.calls), len(others.radix.calls)) == (1, 2)


def test_a_sort_that_is_off_stays_off_whatever_table_comes(aiter, others):
    hook = serving(aiter, {64: 3})
    others.bitonic.error = RuntimeError("no such instruction")
    aiter.fused_moe(*batch(8))
    others.bitonic.error = None
    kernel = hook.kernel(hook.seen[KEY], KEY, COVERAGE)
    names = [candidate.name for candidate in kernel.candidates]
    hook.set_tables({KEY: make_table({64: 3}, candidates=names)})
    aiter.fused_moe(*batch(8))
    assert policy_that_arrived() == 0
    assert len(others.bitonic.calls) == 1


def test_a_name_that_nothing_here_answers_to_is_the_baseline_and_said_once(aiter, caplog):
    names = ("policy 0", "quantum", "policy 1", "policy 2")
    hook = installed(aiter, tables={KEY: make_table({8: 1, 64: 3}, candidates=names)})
    hook.set_tables({KEY._replace(model_dim=128): make_table({64: 1})})
    aiter.fused_moe(*batch(8))
    assert policy_that_arrived() == 0
    aiter.fused_moe(*batch(64))
    assert policy_that_arrived() == 2
    assert [r.message for r in caplog.records] == [
        "nothing here sorts as 'quantum': the baseline serves in its place"
    ]


def test_a_baseline_that_fails_after_another_sort_fails_by_itself(aiter, others):
    hook = serving(aiter, {64: 3})
    others.bitonic.error = RuntimeError("ours")

    def failing(*args, **kwargs):
        raise ValueError("AITER's own")

    aiter._moe_sorting_impl = failing
    with pytest.raises(ValueError, match="AITER's own") as caught:
        aiter.fused_moe(*batch(8))
    assert caught.value.__context__ is None
    assert hook.counts().fell_back == 1


def test_a_sort_behind_a_wrapper_that_hides_the_seam_falls_back_to_the_call_as_made(aiter, others):
    made = []
    real = aiter.moe_sorting

    def theirs(*args, **kwargs):
        made.append((args, kwargs))
        return real(*args, **kwargs)

    aiter.moe_sorting = theirs
    serving(aiter, {64: 3})
    made.clear()
    aiter.fused_moe(*batch(8))
    assert made == []
    others.bitonic.error = RuntimeError("no")
    arguments = sort_arguments(8)
    aiter.moe_sorting(*arguments[:6], accumulate=True)
    ((args, kwargs),) = made
    assert all(a is b for a, b in zip(args, arguments[:6], strict=True))
    assert kwargs == {"accumulate": True}
    assert arrived()[0].policy == 0


def test_threads_in_which_a_sort_raises_get_every_call_answered(
    aiter, others, switch_often, caplog
):
    hook = serving(aiter, {64: 3})
    others.bitonic.together = threading.Barrier(8)
    others.bitonic.error = RuntimeError("no")
    before, start = number_of_sorts(), threading.Barrier(8)

    def call():
        start.wait()
        for _ in range(50):
            aiter.moe_sorting(*sort_arguments(8))

    at_once(*[call] * 8)
    assert number_of_sorts() - before == 400
    counts = hook.counts()
    assert counts.chosen + counts.baseline == 400
    assert counts.fell_back == counts.chosen == len(others.bitonic.calls)
    assert caplog.text.count("is off in this process") == 1
