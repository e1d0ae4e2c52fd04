"""Wrapping the seam and taking the wrapper out, whoever else wraps it."""

import functools
import inspect
from types import ModuleType

import pytest

from adaptive_moe.hook.hook import AiterHook
from adaptive_moe.kernels.aiter import LEADING
from tests.hook.hooking import (
    AUTO,
    KEY,
    arrived,
    batch,
    installed,
    policy_of,
    policy_that_arrived,
    seam_of,
    sort_arguments,
)
from tests.tables import make_table


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (
            None,
            "aiter.fused_moe has no moe_sorting: this is not the AITER we know; install AITER "
            "v0.1.5 or newer from https://github.com/ROCm/aiter",
        ),
        (
            lambda topk_ids, topk_weights: None,
            "this AITER's moe_sorting(topk_ids, topk_weights) takes no dispatch_policy, so there "
            "is nothing to choose: install AITER v0.1.5 or newer",
        ),
        (
            lambda topk_ids, dispatch_policy: None,
            "this AITER's moe_sorting(topk_ids, dispatch_policy) does not begin with topk_ids, "
            "topk_weights, num_experts, model_dim, moebuf_dtype, block_size, expert_mask, "
            "num_local_tokens, dispatch_policy: it is newer than this adaptive_moe knows; upgrade "
            "adaptive_moe",
        ),
    ],
)
def test_a_seam_we_do_not_know_is_refused_in_words_and_left_alone(function, says, caplog):
    module = ModuleType("aiter.fused_moe")
    if function is not None:
        module.moe_sorting = function
    assert AiterHook(AUTO).install(module) is False
    assert [r.message for r in caplog.records] == [f"nothing is changed: {says}"]
    assert getattr(module, "moe_sorting", None) is function


def test_uninstall_restores_exactly_what_was_there(any_aiter):
    before = (any_aiter.moe_sorting, any_aiter.get_2stage_cfgs)
    hook = AiterHook(AUTO)
    hook.install(any_aiter)
    assert any_aiter.moe_sorting is not before[0]
    hook.uninstall()
    hook.uninstall()
    assert (any_aiter.moe_sorting, any_aiter.get_2stage_cfgs) == before


def test_a_module_without_a_chooser_gets_none():
    module = seam_of(policy_of)
    hook = AiterHook(AUTO)
    assert hook.install(module)
    assert not hasattr(module, "get_2stage_cfgs")
    hook.uninstall()
    assert not hasattr(module, "get_2stage_cfgs")


def test_installing_twice_is_one_layer(aiter):
    hook = AiterHook(AUTO)
    original = aiter.moe_sorting
    assert hook.install(aiter)
    assert hook.install(aiter)
    aiter.fused_moe(*batch(8))
    assert hook.counts().total == 1
    hook.uninstall()
    assert aiter.moe_sorting is original


def test_the_wrapper_looks_like_what_it_wraps(any_aiter):
    signature = inspect.signature(any_aiter.moe_sorting)
    AiterHook(AUTO).install(any_aiter)
    assert inspect.signature(any_aiter.moe_sorting, follow_wrapped=False) == signature
    assert any_aiter.get_2stage_cfgs.cache_info() is not None
    any_aiter.get_2stage_cfgs.cache_clear()


def wrap_openly(function, calls):
    @functools.wraps(function)
    def other(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return other


def wrap_hiding(function, calls):
    def other(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return other


@pytest.mark.parametrize("wrap", [wrap_openly, wrap_hiding])
def test_somebody_elses_wrapper_around_us_survives_uninstall_and_reinstall(aiter, wrap):
    table = {KEY: make_table({1: 2, 64: 2})}
    hook, calls = installed(aiter, tables=table), []
    aiter.moe_sorting = theirs = wrap(aiter.moe_sorting, calls)
    aiter.fused_moe(*batch(8))
    assert (policy_that_arrived(), len(calls)) == (2, 1)

    hook.uninstall()
    assert aiter.moe_sorting is theirs
    aiter.fused_moe(*batch(8))
    assert (policy_that_arrived(), len(calls), hook.counts().total) == (0, 2, 1)

    hook.install(aiter)
    if wrap is wrap_openly:  # our layer can be seen below theirs, and is woken up
        assert aiter.moe_sorting is theirs
    aiter.fused_moe(*batch(8))
    assert (policy_that_arrived(), len(calls), hook.counts().total) == (2, 3, 2)


@pytest.mark.parametrize("wrap", [wrap_openly, wrap_hiding])
def test_somebody_elses_wrapper_below_us_keeps_working(aiter, wrap):
    calls = []
    aiter.moe_sorting = theirs = wrap(aiter.moe_sorting, calls)
    hook = installed(aiter, tables={KEY: make_table({1: 2, 64: 2})})
    aiter.fused_moe(*batch(8))
    aiter.moe_sorting(**dict(zip(LEADING, sort_arguments(8), strict=True)))
    assert [call.policy for call in arrived(2)] == [2, 2]
    assert len(calls) == 2
    hook.uninstall()
    assert aiter.moe_sorting is theirs


def test_a_wrapper_below_us_that_takes_less_than_it_says_keeps_working(aiter):
    original = aiter.moe_sorting

    @functools.wraps(original)  # which claims the signature of what it wraps
    def theirs(*nine, accumulate, flat, return_local_topk_ids):
        assert len(nine) == 9
        return original(*nine, accumulate=accumulate, flat=flat)

    aiter.moe_sorting = theirs
    installed(aiter, tables={KEY: make_table({1: 2, 64: 2})})
    aiter.fused_moe(*batch(8))
    assert policy_that_arrived() == 2


def test_a_layer_thrown_out_by_somebody_is_put_back_by_install(aiter):
    original = aiter.moe_sorting
    hook = installed(aiter, tables={KEY: make_table({1: 2, 64: 2})})
    aiter.moe_sorting = original
    hook.install(aiter)
    aiter.fused_moe(*batch(8))
    assert policy_that_arrived() == 2


@pytest.mark.parametrize("wrap", [wrap_openly, wrap_hiding])
@pytest.mark.parametrize("options", [{}, {"accumulate": True, "flat": False}])
def test_a_wrapper_below_us_gets_each_call_as_it_was_made(aiter, wrap, options):
    made = []
    real = aiter.moe_sorting

    def recorder(*args, **kwargs):
        made.append((args, kwargs))
        return real(*args, **kwargs)

    aiter.moe_sorting = wrap(recorder, [])
    hook = installed(aiter, tables={KEY: make_table({4: 2, 64: 0})})
    few, many = sort_arguments(4), sort_arguments(40)
    aiter.moe_sorting(*few, **options)
    aiter.moe_sorting(*many, **options)
    aiter.moe_sorting(*many[:5], block_size=32, **options)
    aiter.moe_sorting(*few[:5], **options)
    kwargs = [kwargs for _, kwargs in made]
    assert [args[8] for args, _ in made[:2]] == [2, 0]
    assert kwargs[0] == kwargs[1] == options
    assert kwargs[2] == {"block_size": 32, **options}  # the baseline's call as it came
    assert kwargs[3] == {"dispatch_policy": 2, **options}
    assert hook.counts().total == 4
    assert hook.seen == {}


def test_what_a_later_aiter_takes_and_by_default_is_read_through_an_open_wrapper():
    def moe_sorting(
        topk_ids,
        topk_weights,
        num_experts,
        model_dim,
        moebuf_dtype,
        block_size=64,
        expert_mask=None,
        num_local_tokens=None,
        dispatch_policy=0,
        order="rising",
    ):
        return block_size, dispatch_policy, order

    module = ModuleType("aiter.fused_moe")
    module.moe_sorting = wrap_openly(moe_sorting, [])
    key = KEY._replace(block_size=64, more=("rising",))
    hook = installed(module, tables={key: make_table({64: 2})})
    five = sort_arguments(8)[:5]
    assert module.moe_sorting(*five) == (64, 2, "rising")
    assert module.moe_sorting(*five, order="falling") == (64, 0, "falling")
    assert module.moe_sorting(*five, block_size=32) == (32, 0, "rising")
    assert [(key.block_size, key.more) for key in hook.seen] == [
        (64, ("falling",)),
        (32, ("rising",)),
    ]


def test_a_default_that_a_hiding_wrapper_declares_is_its_block_size():
    module = ModuleType("aiter.fused_moe")
    module.moe_sorting = lambda *args, block_size=64, **kwargs: (args, block_size, kwargs)
    hook = installed(module, tables={KEY._replace(block_size=64): make_table({64: 2})})
    five = sort_arguments(8)[:5]
    assert module.moe_sorting(*five) == (tuple(five), 64, {"dispatch_policy": 2})
    assert hook.seen == {}


def test_a_wrapper_that_hides_all_but_the_policy_is_chosen_for():
    module = ModuleType("aiter.fused_moe")
    module.moe_sorting = lambda *args, dispatch_policy=0, **kwargs: (args, dispatch_policy, kwargs)
    hook = installed(module, tables={KEY: make_table({64: 2})})
    leading = tuple(sort_arguments(8)[:6])
    assert module.moe_sorting(*leading) == (leading, 2, {})
    assert module.moe_sorting(*leading, dispatch_policy=0) == (leading, 2, {})
    assert hook.counts().unreadable == 0


def test_what_a_hiding_wrapper_was_given_and_no_more_is_kept_for_the_measurement(aiter):
    aiter.moe_sorting = wrap_hiding(aiter.moe_sorting, [])
    hook = installed(aiter)
    aiter.moe_sorting(*sort_arguments(8), accumulate=False)
    (seen,) = hook.seen.values()
    assert dict(seen.extras) == {"accumulate": False}
    assert not seen.key.accumulate


def test_a_call_with_words_nobody_knows_passes_a_hiding_wrapper(aiter):
    taken = []
    aiter.moe_sorting = lambda *args, **kwargs: taken.append(kwargs)
    hook = installed(aiter, tables={KEY: make_table({1: 2, 64: 2})})
    aiter.moe_sorting(*sort_arguments(8), invented="yes")
    aiter.moe_sorting()
    assert taken == [{"invented": "yes"}, {}]
    assert hook.counts().unreadable == hook.counts().total == 2
