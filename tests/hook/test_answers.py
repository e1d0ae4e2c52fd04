"""The seam, on the stand-in for AITER: who answers a call, and what is left alone."""

import functools
import inspect

import pytest
import torch

from adaptive_moe.kernels.aiter import LEADING
from adaptive_moe.kernels.call import CallKey
from adaptive_moe.settings import Mode, Settings
from tests.aiter_standin.load import load_aiter
from tests.hook.hooking import (
    KEY,
    POLICIES,
    TWO,
    arrived,
    batch,
    installed,
    policy_that_arrived,
    seam_of,
    sort_arguments,
)
from tests.tables import make_table


def test_the_tables_policy_arrives_at_every_token_count(any_aiter):
    hook = installed(any_aiter, tables={KEY: make_table(POLICIES)})
    expected = {1: 1, 2: 2, 3: 0, 4: 1, 5: 2, 64: 2, 65: 1, 128: 1}
    for count, policy in expected.items():
        any_aiter.fused_moe(*batch(count))
        (call,) = arrived()
        assert (call.num_tokens, int(call.policy)) == (count, policy)
    counts = hook.counts()
    assert (counts.chosen, counts.baseline, counts.total) == (7, 1, len(expected))


def test_a_count_past_the_table_takes_the_baseline(aiter):
    """Nothing was measured there."""
    hook = installed(aiter, tables={KEY: make_table({1: 2, 128: 2})})
    for count, policy in ((128, 2), (129, 0), (300, 0), (299, 0), (5000, 0), (128, 2)):
        aiter.fused_moe(*batch(count))
        assert policy_that_arrived() == policy
    assert (hook.counts().chosen, hook.counts().baseline, hook.counts().total) == (2, 4, 6)
    assert hook.seen == {}  # nothing to measure: there is a table


def test_a_captured_count_past_the_captured_ones_takes_the_baseline(aiter):
    captured = [True]
    tables = {KEY: make_table({1: 1, 64: 1}, {1: 2, 8: 2})}
    installed(aiter, tables=tables, is_capturing=lambda: captured[0])
    for captured[0], count, policy in ((True, 8, 2), (True, 65, 0), (False, 64, 1), (False, 65, 0)):
        aiter.fused_moe(*batch(count))
        assert policy_that_arrived() == policy


def test_results_are_what_aiter_gives_without_us(any_aiter):
    plain = any_aiter.fused_moe(*batch(33, seed=3))
    installed(any_aiter, tables={KEY: make_table({1: 2, 128: 2})})
    assert torch.equal(any_aiter.fused_moe(*batch(33, seed=3)), plain)
    assert int(policy_that_arrived()) == 2


def test_captured_calls_take_the_graph_array_and_eager_ones_the_other(aiter):
    captured = [False]
    installed(
        aiter,
        tables={KEY: make_table({1: 1, 64: 1}, {1: 2, 8: 2, 64: 2})},
        is_capturing=lambda: captured[0],
    )
    for captured[0], policy in ((False, 1), (True, 2), (False, 1)):
        aiter.fused_moe(*batch(8))
        assert policy_that_arrived() == policy


def test_the_stream_is_asked_only_where_captured_and_eager_calls_differ(aiter):
    asked = []

    def is_capturing():
        asked.append(True)
        return True

    installed(
        aiter,
        tables={KEY: make_table({8: 1, 9: 2, 64: 2}, {1: 1, 8: 1, 9: 0, 64: 0})},
        is_capturing=is_capturing,
    )
    for count, policy, questions in ((1, 1, 0), (8, 1, 0), (9, 0, 1), (64, 0, 2), (500, 0, 2)):
        aiter.fused_moe(*batch(count))
        assert (policy_that_arrived(), len(asked)) == (policy, questions)


@pytest.mark.parametrize("how", ["position", "keyword", "left out", "past the ninth"])
def test_the_policy_is_found_however_the_caller_passes_it(aiter, how):
    installed(aiter, tables={KEY: make_table({1: 2, 64: 2})})
    arguments = sort_arguments(8)
    if how == "position":
        aiter.moe_sorting(*arguments)
    elif how == "keyword":
        aiter.moe_sorting(**dict(zip(LEADING, arguments, strict=True)))
    elif how == "left out":
        aiter.moe_sorting(*arguments[:5])  # and with AITER's own default block_size
    else:
        aiter.moe_sorting(*arguments, False, True, False)
    assert policy_that_arrived() == 2
    assert arrived()[0].block_size == 32


# The baseline


def test_the_engines_own_default_is_a_baseline_as_zero_is(aiter):
    table = make_table({1: 1, 8: 0, 64: 0}, candidates=TWO)
    hook = installed(aiter, tables={KEY._replace(baseline=2): table}, engine_policy=2)
    for count, policy in ((1, 0), (8, 2), (64, 2)):
        aiter.fused_moe(*batch(count), moe_sorting_dispatch_policy=2)
        assert policy_that_arrived() == policy
    # A caller that passes 0 has another baseline, and no table.
    aiter.fused_moe(*batch(1), moe_sorting_dispatch_policy=0)
    assert policy_that_arrived() == 0
    assert [key.baseline for key in hook.seen] == [0]
    assert (hook.counts().chosen, hook.counts().baseline, hook.counts().unknown) == (1, 2, 1)


def test_what_a_bool_schema_makes_of_the_engines_default_is_a_baseline(caplog):
    aiter = load_aiter("v0.1.9")
    key = KEY._replace(baseline="True")
    candidates = ("policy True", "policy 0", "policy 2")
    table = make_table({1: 2, 8: 0, 64: 0}, candidates=candidates)
    hook = installed(aiter, tables={key: table}, engine_policy=2)
    aiter.fused_moe(*batch(1), moe_sorting_dispatch_policy=2)
    assert policy_that_arrived() == 2
    for count in (8, 300):
        aiter.fused_moe(*batch(count), moe_sorting_dispatch_policy=2)
        assert policy_that_arrived() is True
    assert hook.counts().callers_policy == 0
    assert not caplog.records


def test_a_true_is_noted_as_the_baseline_it_is():
    aiter = load_aiter("v0.1.9")
    hook = installed(aiter, engine_policy=2)
    aiter.fused_moe(*batch(8), moe_sorting_dispatch_policy=2)
    (seen,) = hook.seen.values()
    assert seen.baseline is True
    assert seen.key.baseline_name == "policy True"


def test_a_callers_own_one_is_not_taken_for_the_schemas_true(aiter):
    key = KEY._replace(baseline="True")
    hook = installed(
        aiter,
        tables={key: make_table({1: 1, 64: 1}, candidates=("policy True", "policy 0"))},
        engine_policy=2,
    )
    aiter.moe_sorting(*sort_arguments(8)[:8], 1)
    assert policy_that_arrived() == 1
    assert hook.counts().callers_policy == 1


@pytest.mark.parametrize("engine_policy", [0, 2])
def test_any_other_policy_is_the_callers_own_choice(aiter, engine_policy):
    hook = installed(aiter, tables={KEY: make_table({1: 2, 64: 2})}, engine_policy=engine_policy)
    for count in (8, 8, 40, 4000):
        aiter.fused_moe(*batch(count), moe_sorting_dispatch_policy=1)
        assert policy_that_arrived() == 1
    assert hook.counts().callers_policy == hook.counts().total == 4
    assert hook.seen == {}


def test_a_true_is_the_callers_own_one_where_the_engine_asks_for_none():
    """v0.1.9's bool schema makes it of the 1."""
    aiter = load_aiter("v0.1.9")
    hook = installed(aiter)
    aiter.fused_moe(*batch(8), moe_sorting_dispatch_policy=1)
    assert policy_that_arrived() is True
    assert (hook.counts().callers_policy, dict(hook.seen)) == (1, {})


# A fixed policy


@pytest.mark.parametrize("policy", [0, 1, 2])
def test_a_fixed_policy_always_arrives(any_aiter, policy):
    hook = installed(any_aiter, Settings(mode=Mode.FIXED, fixed_policy=policy))
    for asked in (0, 1, 2):  # v0.1.9's bool schema makes the 2 a True on its way
        any_aiter.fused_moe(*batch(8), moe_sorting_dispatch_policy=asked)
        assert policy_that_arrived() is policy
    assert hook.counts().fixed == hook.counts().total == 3


def test_a_policy_aiter_does_not_name_is_said_with_what_aiter_makes_of_it(aiter, caplog):
    installed(aiter, Settings(mode=Mode.FIXED, fixed_policy=7))
    assert [r.message for r in caplog.records] == [
        "policy 7 is no policy of AITER's, which takes it as 2, multi-phase"
    ]


def hiding(function):
    """Another tool's wrapper: what it takes cannot be told, and it passes all of it on."""
    return lambda *args, **kwargs: function(*args, **kwargs)  # noqa: PLW0108


@pytest.mark.parametrize("wrap", [lambda function: function, hiding])
def test_a_call_that_cannot_be_read_keeps_its_own_policy_and_is_counted(wrap):
    received = []
    module = seam_of(lambda given: received.append(dict(given)), invented="no")
    module.moe_sorting = wrap(module.moe_sorting)
    hook = installed(module, Settings(mode=Mode.FIXED, fixed_policy=2))
    odd = [[[0, 1]], *sort_arguments(8)[1:]]  # a list has no shape
    module.moe_sorting(*odd, invented="yes")
    (given,) = received
    assert all(a is b for a, b in zip(given.values(), [*odd, "yes"], strict=True))
    assert hook.counts().unreadable == hook.counts().total == 1


# Calls that are left alone


@pytest.mark.parametrize("mode", [Settings(Mode.AUTO), Settings(Mode.FIXED, fixed_policy=2)])
@pytest.mark.parametrize("option", ["flat", "output_aux", "empty"])
def test_calls_that_do_not_sort_by_policy_are_left_alone(aiter, option, mode):
    seen = []
    real = aiter.moe_sorting

    @functools.wraps(real)
    def recording(*args, **kwargs):
        seen.append(inspect.signature(real).bind(*args, **kwargs).arguments)
        return real(*args, **kwargs)

    aiter.moe_sorting = recording
    hook = installed(aiter, mode, tables={KEY: make_table({1: 2, 64: 2})})
    if option == "empty":
        aiter._moe_sorting_impl = lambda *args, **kwargs: None
        aiter.moe_sorting(*sort_arguments(0))
    else:
        aiter.moe_sorting(*sort_arguments(8), **{option: True})
    assert len(seen) == 1
    assert seen[0]["dispatch_policy"] == 0
    assert hook.counts().passed == hook.counts().total == 1
    assert hook.seen == {}


def test_calls_with_nothing_to_choose_do_not_leave_the_wrapper(aiter, monkeypatch):
    """They are all that some models make: they must cost no more than the others."""

    def unread(*arguments):
        raise AssertionError("the slow path was taken")

    hook = installed(aiter)
    monkeypatch.setattr("adaptive_moe.hook.slow_path.read_key", unread)
    aiter._moe_sorting_impl = lambda *args, **kwargs: None
    aiter.moe_sorting(*sort_arguments(8), flat=True)
    aiter.moe_sorting(*sort_arguments(8), output_aux="opus")
    aiter.moe_sorting(*sort_arguments(0))
    assert (hook.counts().passed, hook.counts().failed) == (3, 0)
    hook.uninstall()


def test_everything_but_the_policy_goes_through_untouched():
    received = {}

    def answer(given):
        received.update(given)
        return "outputs"

    module = seam_of(answer, inserted_in_a_later_version="default", output=None)
    key = CallKey(
        *(16, 4, 64, torch.bfloat16, 64, True, True, True, False),
        *(("given", "output"), 0, -1),
    )
    installed(module, tables={key: make_table({2: 2, 8: 0})})
    for count, policy in ((2, 2), (8, 0)):
        sent = sort_arguments(count)
        mask, rows, out = torch.ones(16), torch.tensor([3]), torch.zeros(1)
        sent[5:9] = [64, mask, rows, 0]
        assert module.moe_sorting(*sent, "given", output=out) == "outputs"
        sent[8] = policy
        expected = [*sent, "given", out]
        assert all(a is b for a, b in zip(received.values(), expected, strict=True))
