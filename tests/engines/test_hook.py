"""The seam, on the stand-in for AITER: which policy arrives at the sort, and what is left alone."""

import functools
import inspect
import json
import logging
import sys
import threading
from types import ModuleType

import pytest
import torch

from adaptive_moe.engines.hook import MAX_SEEN, AiterHook, Key
from adaptive_moe.engines.warm_up import warm_up
from adaptive_moe.kernels.aiter import LEADING
from adaptive_moe.settings import LogDetail, Mode, Settings
from adaptive_moe.tuning.calibrator import CalibrationRefusedError
from tests.aiter_standin.load import VERSIONS, load_aiter
from tests.tables import make_table, measure_as

AUTO = Settings(mode=Mode.AUTO)
# Token count -> policy: different neighbours, so that an index that is off by one shows.
POLICIES = {1: 1, 2: 2, 3: 0, 4: 1, 64: 2, 128: 1}
KEY = Key(16, 4, 64, torch.bfloat16, 32, False, False, True)


@pytest.fixture(params=VERSIONS)
def any_aiter(request):
    return load_aiter(request.param)


@pytest.fixture
def aiter():
    return load_aiter("main")


def batch(num_tokens, *, experts=16, topk=4, dim=64, seed=0):
    """What fused_moe is called with: hidden_states, w1, w2, topk_weight, topk_ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand((num_tokens, experts), generator=generator).argsort(1)[:, :topk]
    return (
        torch.zeros((num_tokens, dim), dtype=torch.bfloat16),
        torch.zeros((experts, 32, dim), dtype=torch.bfloat16),
        torch.zeros((experts, dim, 16), dtype=torch.bfloat16),
        torch.rand((num_tokens, topk), generator=generator),
        ids.int().contiguous(),
    )


def sort_arguments(num_tokens, **shape):
    """The leading arguments of moe_sorting, as fused_moe passes them."""
    hidden, _, w2, weights, ids = batch(num_tokens, **shape)
    return [ids, weights, w2.shape[0], hidden.shape[1], hidden.dtype, 32, None, None, 0]


def sorted_with():
    """The policy and the rest of the latest call that arrived at the sort itself."""
    import aiter.sort

    return aiter.sort.calls[-1]


def latest_sorts(number):
    import aiter.sort

    return list(aiter.sort.calls)[-number:]


def number_of_sorts():
    import aiter.sort

    return len(aiter.sort.calls)


def installed(module, settings=AUTO, tables=None, **options):
    hook = AiterHook(settings, **options)
    assert hook.install(module)
    hook.set_tables(tables or {})
    return hook


# What arrives at the sort


def test_the_tables_policy_arrives_at_every_token_count(any_aiter):
    hook = installed(any_aiter, tables={KEY: make_table(POLICIES)})
    expected = {1: 1, 2: 2, 3: 0, 4: 1, 5: 2, 64: 2, 65: 1, 128: 1}
    for count, policy in expected.items():
        any_aiter.fused_moe(*batch(count))
        assert (sorted_with().num_tokens, int(sorted_with().policy)) == (count, policy)
    assert hook.counts().eager == hook.counts().total == len(expected)


def test_a_count_past_the_table_takes_the_last_policy(aiter):
    installed(aiter, tables={KEY: make_table({1: 0, 128: 2})})
    aiter.fused_moe(*batch(300))
    assert sorted_with().policy == 2


def test_results_are_what_aiter_gives_without_us(any_aiter):
    plain = any_aiter.fused_moe(*batch(33, seed=3))
    installed(any_aiter, tables={KEY: make_table({1: 2, 128: 2})})
    assert torch.equal(any_aiter.fused_moe(*batch(33, seed=3)), plain)
    assert int(sorted_with().policy) == 2


def test_a_captured_call_takes_the_graph_array_and_an_eager_one_the_other(aiter):
    captured = [False]
    hook = installed(
        aiter,
        tables={KEY: make_table({1: 1, 64: 1}, graph={1: 2, 64: 2})},
        is_capturing=lambda: captured[0],
    )
    for captured[0], policy in ((False, 1), (True, 2), (False, 1)):
        aiter.fused_moe(*batch(8))
        assert sorted_with().policy == policy
    assert (hook.counts().graph, hook.counts().eager) == (1, 2)


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
    assert sorted_with().policy == 2
    assert sorted_with().block_size == 32


def test_a_callers_own_policy_is_respected(aiter):
    hook = installed(aiter, tables={KEY: make_table({1: 2, 64: 2})})
    aiter.fused_moe(*batch(8), moe_sorting_dispatch_policy=1)
    assert sorted_with().policy == 1
    assert hook.counts().own == 1


def test_the_engines_own_default_gives_way_where_measured_and_stays_elsewhere(aiter):
    installed(aiter, tables={KEY: make_table({1: 1, 64: 1})}, engine_policy=2)
    aiter.fused_moe(*batch(8), moe_sorting_dispatch_policy=2)
    assert sorted_with().policy == 1
    aiter.fused_moe(*batch(8, dim=128), moe_sorting_dispatch_policy=2)
    assert sorted_with().policy == 2


@pytest.mark.parametrize("policy", [0, 1, 2])
def test_a_fixed_policy_always_arrives(any_aiter, policy):
    hook = installed(any_aiter, Settings(mode=Mode.FIXED, fixed_policy=policy))
    for asked in (0, 1, 2):  # v0.1.9's bool schema makes the 2 a 1 on its way
        any_aiter.fused_moe(*batch(8), moe_sorting_dispatch_policy=asked)
        assert sorted_with().policy is policy
    assert hook.counts().fixed == hook.counts().total == 3


def test_the_bool_schema_does_turn_a_two_into_a_one_without_us():
    load_aiter("v0.1.9").fused_moe(*batch(8), moe_sorting_dispatch_policy=2)
    assert sorted_with().policy is True


@pytest.mark.parametrize("mode", [AUTO, Settings(mode=Mode.FIXED, fixed_policy=2)])
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


def test_everything_but_the_policy_goes_through_untouched(aiter):
    received = {}

    def moe_sorting(
        topk_ids,
        topk_weights,
        num_experts,
        model_dim,
        moebuf_dtype,
        block_size=32,
        expert_mask=None,
        num_local_tokens=None,
        dispatch_policy=0,
        inserted_in_a_later_version="default",
        output=None,
    ):
        arguments = dict(locals())
        del arguments["received"]
        received.update(arguments)
        return "outputs"

    module = ModuleType("aiter.fused_moe")
    module.moe_sorting = moe_sorting
    key = Key(16, 4, 64, torch.bfloat16, 64, True, True, True)
    installed(module, tables={key: make_table({1: 2, 64: 2})})
    sent = sort_arguments(8)
    mask, rows, out = torch.ones(16), torch.tensor([3]), torch.zeros(1)
    sent[5:9] = [64, mask, rows, 0]
    assert module.moe_sorting(*sent, "given", output=out) == "outputs"
    assert received["dispatch_policy"] == 2
    sent[8] = 2
    expected = [*sent, "given", out]
    assert all(a is b for a, b in zip(received.values(), expected, strict=True))


DIFFERENT = {
    "num_experts": {"experts": 32},
    "topk": {"topk": 2},
    "model_dim": {"dim": 128},
    "dtype": {4: torch.float16},
    "block_size": {5: 64},
    "has_expert_mask": {6: torch.ones(16, dtype=torch.int32)},
    "has_num_local_tokens": {7: torch.tensor([8], dtype=torch.int32)},
    "accumulate": {"accumulate": False},
}


@pytest.mark.parametrize("field", Key._fields)
def test_shapes_are_told_apart_by(aiter, field):
    hook = installed(aiter, tables={KEY: make_table({1: 2, 64: 2})})
    change = DIFFERENT[field]
    arguments = sort_arguments(
        8, **{k: v for k, v in change.items() if k in ("experts", "topk", "dim")}
    )
    for position, value in change.items():
        if isinstance(position, int):
            arguments[position] = value
    options = {"accumulate": False} if field == "accumulate" else {}
    aiter.moe_sorting(*arguments, **options)
    assert sorted_with().policy == 0
    (noted,) = hook.seen
    assert [name for name in Key._fields if getattr(noted, name) != getattr(KEY, name)] == [field]


def test_a_masked_call_accumulates_whatever_it_says(aiter):
    masked = KEY._replace(has_expert_mask=True)
    installed(aiter, tables={masked: make_table({1: 2, 64: 2})})
    arguments = sort_arguments(8)
    arguments[6] = torch.ones(16, dtype=torch.int32)
    aiter.moe_sorting(*arguments, accumulate=False)
    assert sorted_with().policy == 2


# When something goes wrong


def test_our_failure_costs_one_log_line_and_no_call(aiter, caplog):
    def broken():
        raise RuntimeError("driver says no")

    hook = installed(aiter, tables={KEY: make_table({1: 2, 64: 2})}, is_capturing=broken)
    before = number_of_sorts()
    for _ in range(3):
        aiter.fused_moe(*batch(8))
        assert sorted_with().policy == 0
    assert number_of_sorts() == before + 3
    assert hook.counts().failed == 1
    (line,) = [r.message for r in caplog.records if r.name == "adaptive_moe"]
    assert "driver says no" in line
    assert "stepping aside" in line


def test_threads_that_fail_at_the_same_moment_share_the_line(aiter, caplog):
    together = threading.Barrier(4)

    def broken():
        together.wait(30.0)
        raise RuntimeError("driver says no")

    hook = installed(aiter, tables={KEY: make_table({1: 2, 64: 2})}, is_capturing=broken)
    threads = [threading.Thread(target=aiter.fused_moe, args=batch(8)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert hook.counts().failed == 4
    assert caplog.text.count("stepping aside") == 1


def test_aiters_own_exception_reaches_the_caller_after_one_call(aiter, caplog):
    calls = []

    def failing(*args, **kwargs):
        calls.append(args)
        raise ValueError("AITER's own")

    aiter._moe_sorting_impl = failing
    installed(aiter, tables={KEY: make_table({1: 2, 64: 2})})
    with pytest.raises(ValueError, match="AITER's own"):
        aiter.fused_moe(*batch(8))
    assert len(calls) == 1
    assert not [r for r in caplog.records if r.name == "adaptive_moe"]


def test_a_policy_aiter_does_not_name_is_warned_of(aiter, caplog):
    installed(aiter, Settings(mode=Mode.FIXED, fixed_policy=7))
    assert "policy 7 is not one AITER names" in caplog.text
    assert "0, 1, 2" in caplog.text


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (None, "has no moe_sorting"),
        (lambda topk_ids, topk_weights, num_experts, model_dim: None, "no dispatch_policy"),
        (lambda topk_ids, dispatch_policy, topk_weights: None, "does not begin with"),
    ],
)
def test_a_seam_we_do_not_know_is_refused_in_words_and_left_alone(function, says, caplog):
    module = ModuleType("aiter.fused_moe")
    if function is not None:
        module.moe_sorting = function
    assert AiterHook(AUTO).install(module) is False
    assert says in caplog.text
    assert getattr(module, "moe_sorting", None) is function


# Installing and uninstalling


def test_uninstall_restores_exactly_what_was_there(any_aiter):
    before = (any_aiter.moe_sorting, any_aiter.get_2stage_cfgs)
    hook = AiterHook(AUTO)
    hook.install(any_aiter)
    assert any_aiter.moe_sorting is not before[0]
    hook.uninstall()
    hook.uninstall()
    assert (any_aiter.moe_sorting, any_aiter.get_2stage_cfgs) == before


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
    assert (sorted_with().policy, len(calls)) == (2, 1)

    hook.uninstall()
    assert aiter.moe_sorting is theirs
    aiter.fused_moe(*batch(8))
    assert (sorted_with().policy, len(calls), hook.counts().total) == (0, 2, 1)

    hook.install(aiter)
    if wrap is wrap_openly:  # our layer can be seen below theirs, and is woken up
        assert aiter.moe_sorting is theirs
    aiter.fused_moe(*batch(8))
    assert (sorted_with().policy, len(calls), hook.counts().total) == (2, 3, 2)


@pytest.mark.parametrize("wrap", [wrap_openly, wrap_hiding])
def test_somebody_elses_wrapper_below_us_keeps_working(aiter, wrap):
    calls = []
    aiter.moe_sorting = theirs = wrap(aiter.moe_sorting, calls)
    hook = installed(aiter, tables={KEY: make_table({1: 2, 64: 2})})
    aiter.fused_moe(*batch(8))
    aiter.moe_sorting(**dict(zip(LEADING, sort_arguments(8), strict=True)))
    assert [call.policy for call in latest_sorts(2)] == [2, 2]
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
    assert sorted_with().policy == 2


def test_a_layer_thrown_out_by_somebody_is_put_back_by_install(aiter):
    original = aiter.moe_sorting
    hook = installed(aiter, tables={KEY: make_table({1: 2, 64: 2})})
    aiter.moe_sorting = original
    hook.install(aiter)
    aiter.fused_moe(*batch(8))
    assert sorted_with().policy == 2


# Shapes seen, and the warm-up


def test_unknown_shapes_run_as_aiter_chooses_and_are_noted_by_reference(aiter):
    hook = installed(aiter)
    mask = torch.ones(16, dtype=torch.int32)
    for count in (8, 100, 50):
        aiter.fused_moe(*batch(count), expert_mask=mask)
        assert sorted_with().policy == 0
    (seen,) = hook.seen.values()
    assert seen.num_tokens == 100
    assert seen.expert_mask is mask
    assert hook.counts().unknown == 3


def test_endless_new_shapes_do_not_fill_the_memory(aiter):
    hook = installed(aiter)
    for block_size in range(1, MAX_SEEN + 50):
        arguments = sort_arguments(1)
        arguments[5] = block_size
        aiter.moe_sorting(*arguments)
    assert len(hook.seen) == MAX_SEEN
    assert hook.counts().unknown == MAX_SEEN + 49


def test_an_unknown_shape_after_warm_up_is_said_once(aiter, caplog):
    hook = installed(aiter)
    aiter.fused_moe(*batch(8))
    assert not caplog.records
    warm_up(hook, 64, measure=measure_as({1: 0, 64: 0}))
    for _ in range(3):
        aiter.fused_moe(*batch(8, dim=128))
    lines = [r.message for r in caplog.records if "first seen after warm-up" in r.message]
    assert len(lines) == 1
    assert "dim 128" in lines[0]


def warmed_up(aiter, quant_type, max_tokens, capture_sizes=(), first_batch=300, **arguments):
    """Warm up after one forward of that layer; what `calibrate` was asked, by block_size and
    accumulate."""
    log = []
    hook = installed(aiter)
    aiter.fused_moe(*batch(first_batch), quant_type=quant_type, **arguments)
    made = warm_up(hook, max_tokens, capture_sizes, measure=measure_as({1: 2, 4096: 2}, log=log))
    assert made.problems == ()
    return hook, {(asked.shape.block_size, asked.shape.accumulate): asked for asked in log}


def test_block_sizes_of_other_token_counts_are_asked_of_aiter(aiter):
    from aiter import QuantType

    sizes = (1, 2, 16, 32, 33, 40, 64, 512)
    _, asked = warmed_up(aiter, QuantType.per_1x128, 4096, sizes)
    assert set(asked) == {(64, True), (16, True)}
    small, large = asked[16, True].plan, asked[64, True].plan
    assert (small.max_tokens, small.capture_sizes) == (32, (1, 2, 16, 32))
    assert (large.max_tokens, large.capture_sizes) == (4096, (33, 40, 64, 512))
    assert min(large.first) == 33
    for count in (1, 32, 33, 4096):
        aiter.fused_moe(*batch(count), quant_type=QuantType.per_1x128)
        assert sorted_with().policy == 2


def test_whether_the_sort_zeroes_moe_buf_is_asked_of_aiter_too(aiter):
    from aiter import QuantType

    _, asked = warmed_up(aiter, QuantType.per_1x32, 1024)
    assert set(asked) == {(32, True), (32, False)}
    assert asked[32, True].plan.max_tokens == 256
    assert asked[32, False].kernel.moe_sorting.keywords == {"accumulate": False}


def test_counts_at_which_aiter_does_not_sort_are_not_measured(aiter):
    from aiter import QuantType

    for quant_type in (QuantType.per_Token, QuantType.per_Tensor):
        _, asked = warmed_up(load_aiter("main"), quant_type, 4096, first_batch=40)
        (plan,) = [found.plan for found in asked.values()]
        assert plan.max_tokens == 64


@pytest.mark.parametrize("why", ["the caller sets it", "online tuning", "nobody asked it"])
def test_only_the_block_size_seen_is_measured_where_aiter_cannot_be_asked(aiter, why, monkeypatch):
    from aiter import QuantType

    log = []
    hook = installed(aiter)
    if why == "nobody asked it":  # vLLM's int4 path sorts without a choice of AITER's
        arguments = sort_arguments(300)
        arguments[5] = 64
        aiter.moe_sorting(*arguments)
    elif why == "online tuning":
        monkeypatch.setenv("AITER_ONLINE_TUNE", "1")
        aiter.fused_moe(*batch(300), quant_type=QuantType.per_1x128)
    else:
        aiter.fused_moe(*batch(300), quant_type=QuantType.per_1x128, block_size_M=128)
    warm_up(hook, 4096, (8, 512), measure=measure_as({1: 2, 4096: 2}, log=log))
    (asked,) = log
    assert asked.shape.block_size == (128 if why == "the caller sets it" else 64)
    assert (asked.plan.max_tokens, asked.plan.capture_sizes) == (4096, (8, 512))
    aiter.fused_moe(*batch(8), quant_type=QuantType.per_1x128)
    assert (sorted_with().block_size, sorted_with().policy) == (16, 0)


def test_the_callers_own_mask_is_measured_with(aiter):
    from aiter import QuantType

    mask = torch.zeros(16, dtype=torch.int32)
    mask[5:9] = 1
    _, asked = warmed_up(aiter, QuantType.No, 1024, expert_mask=mask)
    (found,) = asked.values()
    assert found.mask is mask
    assert found.shape.local_experts == 4


def test_pooled_and_padded_rows_are_measured_as_they_come(aiter):
    from aiter import QuantType

    # 4 data-parallel ranks of 256 tokens each pool 1024 rows; the rows are a capacity.
    _, asked = warmed_up(
        aiter,
        QuantType.No,
        256,
        (1, 8, 64),
        first_batch=1024,
        num_local_tokens=torch.tensor([700], dtype=torch.int32),
    )
    (found,) = asked.values()
    assert found.shape.num_local_tokens
    assert found.plan.max_tokens == 1024
    assert found.plan.capture_sizes == (4, 32, 256, 1024)


def test_a_batch_larger_than_announced_is_measured_too(aiter):
    from aiter import QuantType

    _, asked = warmed_up(aiter, QuantType.No, 100, first_batch=300)
    assert [found.plan.max_tokens for found in asked.values()] == [300]


def test_one_shape_that_fails_costs_only_itself(aiter, caplog):
    hook = installed(aiter)
    aiter.fused_moe(*batch(8))
    aiter.fused_moe(*batch(8, dim=128))

    def measure(kernel, shape, plan, *, expert_mask=None):
        if shape.model_dim == 128:
            raise torch.cuda.OutOfMemoryError("no memory for dim 128")
        return make_table({1: 2, 64: 2})

    made = warm_up(hook, 64, measure=measure)
    assert list(made.tables) == [KEY]
    assert "no memory for dim 128" in made.problems[0]
    assert "not calibrated, AITER's own policy serves it" in caplog.text
    aiter.fused_moe(*batch(8, dim=128))
    assert sorted_with().policy == 0
    aiter.fused_moe(*batch(8))
    assert sorted_with().policy == 2


def test_a_shape_we_cannot_describe_is_a_problem_not_a_failure(aiter):
    hook = installed(aiter)
    arguments = sort_arguments(8)
    arguments[3] = 0  # AITER's shared-expert path sorts with model_dim 0
    aiter.moe_sorting(*arguments)
    made = warm_up(hook, 64, measure=measure_as({1: 2, 64: 2}))
    assert made.tables == {}
    assert "model_dim=0" in made.problems[0]


def test_a_refused_calibration_leaves_everything_as_it_was(aiter, caplog):
    def refuse(*args, **kwargs):
        raise CalibrationRefusedError("the current stream is being captured into a graph")

    hook = installed(aiter)
    aiter.fused_moe(*batch(8))
    warm_up(hook, 64, measure=refuse)
    assert hook.tables == {}
    assert "being captured" in caplog.text


def test_a_second_warm_up_measures_only_what_is_new(aiter):
    log = []
    hook = installed(aiter)
    aiter.fused_moe(*batch(8))
    warm_up(hook, 64, measure=measure_as({1: 2, 64: 2}, log=log))
    aiter.fused_moe(*batch(8, dim=128))
    warm_up(hook, 64, measure=measure_as({1: 2, 64: 2}, log=log))
    assert [asked.shape.model_dim for asked in log] == [64, 128]


def test_nothing_is_measured_for_a_fixed_policy(aiter):
    log = []
    hook = installed(aiter, Settings(mode=Mode.FIXED, fixed_policy=1))
    aiter.fused_moe(*batch(8))
    assert warm_up(hook, 64, measure=measure_as({1: 2}, log=log)).tables == {}
    assert log == []


@pytest.mark.parametrize("version", VERSIONS)
def test_a_real_calibration_on_the_live_sort(version, caplog, tmp_path):
    """Nothing injected: AITER's own function is measured, unwrapped, and the log says so."""
    caplog.set_level(logging.INFO, "adaptive_moe")
    aiter = load_aiter(version)
    report = tmp_path / "report.json"
    hook = installed(aiter, Settings(mode=Mode.AUTO, budget_s=3.0, report=str(report)))
    mask = (torch.arange(16) % 2).int()
    aiter.fused_moe(*batch(64), expert_mask=mask)
    made = warm_up(hook, 64, (1, 8))
    assert made.problems == ()
    (table,) = made.tables.values()
    backend = "opus" if version == "main" else "ck"
    assert table.evidence.kernel == f"aiter 0.1.99 {backend}"
    assert all(
        r.standing.value not in ("wrong", "failed")
        for b in table.evidence.eager
        for f in b.fills
        for r in f.verdict.results
    )
    assert hook.counts().total == 1  # measuring went past the wrapper
    headline, lines = [r.message for r in caplog.records if r.levelno == logging.INFO]
    assert "16 experts, topk 4, dim 64" in headline
    assert "policy 2 us" in lines.splitlines()[0]
    (evidence,) = json.loads(report.read_text())
    assert evidence["shape"]["local_experts"] == 8
    aiter.fused_moe(*batch(64), expert_mask=mask)
    assert int(sorted_with().policy) == table.policy(64)


def test_debug_shows_every_round_of_samples(aiter, caplog):
    caplog.set_level(logging.DEBUG, "adaptive_moe")
    hook = installed(aiter, Settings(mode=Mode.AUTO, budget_s=3.0))
    aiter.fused_moe(*batch(64))
    (table,) = warm_up(hook, 64).tables.values()
    rounds = sum(fill.verdict.rounds for b in table.evidence.eager for fill in b.fills)
    shown = [r for r in caplog.records if "samples us" in r.message]
    assert len(shown) == rounds > 0
    assert {r.levelno for r in shown} == {logging.DEBUG}
    # Each bucket's lines come after one that names it, and begin with its first look.
    lines = [r.message for r in caplog.records]
    looks = [i for i, line in enumerate(lines) if line.startswith("first look us")]
    assert len(looks) == len(table.evidence.eager)
    assert all(lines[i - 1].endswith("tokens, eager calls") for i in looks)


@pytest.mark.parametrize(("detail", "lines"), [(LogDetail.SUMMARY, 1), (LogDetail.TABLE, 2)])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_was_decided_is_said_once_a_shape_on_rank_0(
    aiter, caplog, monkeypatch, detail, lines, rank
):
    caplog.set_level(logging.INFO, "adaptive_moe")
    monkeypatch.setattr("adaptive_moe.engines.warm_up.is_rank_zero", lambda: rank == 0)
    hook = installed(aiter, Settings(mode=Mode.AUTO, log_detail=detail))
    aiter.fused_moe(*batch(8))
    aiter.fused_moe(*batch(8, dim=128))
    warm_up(hook, 64, measure=measure_as({1: 2, 64: 2}))
    said = [r.message for r in caplog.records if r.module == "warm_up"]
    assert len(said) == (0 if rank else 2 * lines)
    assert rank or "policy 2 at every token count; gain over policy 0" in said[0]


def test_a_report_that_cannot_be_written_is_said(aiter, caplog, tmp_path):
    hook = installed(aiter, Settings(mode=Mode.AUTO, report=str(tmp_path / "no" / "report.json")))
    aiter.fused_moe(*batch(8))
    made = warm_up(hook, 64, measure=measure_as({1: 2, 64: 2}))
    assert len(made.tables) == 1
    assert "was not written" in caplog.text


# Many threads


@pytest.fixture
def switch_often():
    usual = sys.getswitchinterval()
    sys.setswitchinterval(usual / 1000)
    yield
    sys.setswitchinterval(usual)


def test_no_call_is_lost_or_gets_a_wrong_policy_while_everything_changes(switch_often):
    """10,000 calls from 8 threads; shapes appear, tables are swapped, layers come and go.

    Threads switch a thousand times as often as usual, so that they meet at the awkward places.
    """
    arrived = []

    def moe_sorting(
        topk_ids,
        topk_weights,
        num_experts,
        model_dim,
        moebuf_dtype,
        block_size=32,
        expert_mask=None,
        num_local_tokens=None,
        dispatch_policy=0,
    ):
        arrived.append((model_dim, topk_ids.shape[0], dispatch_policy))
        return dispatch_policy

    module = ModuleType("aiter.fused_moe")
    module.moe_sorting = moe_sorting
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
            hook.tables = {}
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
    assert {policy for _, _, policy in arrived} >= {1, 2}
    assert hook.counts().failed == 0
    hook.uninstall()
    assert module.moe_sorting is moe_sorting


def test_counters_lose_no_call_under_threads(aiter, switch_often):
    hook = installed(aiter, tables={KEY: make_table({1: 2, 64: 2})})
    pick = hook.layer._wrapper
    arguments = sort_arguments(8)
    aiter._moe_sorting_impl = lambda *args, **kwargs: None
    start = threading.Barrier(8)

    def call():
        start.wait()
        for number in range(1250):
            pick(*arguments, flat=number % 2 == 0)
            hook.counts()  # reading at the same time must not disturb the count

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (hook.counts().eager, hook.counts().passed, hook.counts().total) == (5000, 5000, 10_000)


# Stored tables


def test_a_second_start_takes_its_tables_from_the_store_and_measures_only_when_asked(caplog):
    def never(*args, **kwargs):
        raise RuntimeError("measured again")

    def start(measure, **more):
        settings = Settings(mode=Mode.AUTO, budget_s=3.0, **more)
        aiter = load_aiter("main")
        hook = installed(aiter, settings)
        aiter.fused_moe(*batch(64))
        return warm_up(hook, 64, measure=measure)

    caplog.set_level(logging.INFO, "adaptive_moe")
    first, second = start(None), start(never)
    assert second.problems == ()
    measured, stored = [r.message for r in caplog.records if "gain over policy 0" in r.message]
    created = next(iter(first.tables.values())).evidence.created
    assert measured.endswith(" s")
    assert stored.endswith(f"as measured {created}")
    assert second.tables == first.tables != {}
    (problem,) = start(never, recalibrate=True).problems
    assert "measured again" in problem
