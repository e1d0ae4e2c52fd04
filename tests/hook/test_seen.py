"""What is noted of a call, and that it can be made again as it was."""

import contextlib
import contextvars
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from adaptive_moe.hook.calls import is_rounded, sort_call
from adaptive_moe.kernels.call import Buffer
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.settings import Mode, Settings
from adaptive_moe.shape import SortingShape
from tests.aiter_standin.load import load_aiter
from tests.hook.hooking import (
    KEY,
    batch,
    installed,
    policy_of,
    policy_that_arrived,
    seam_of,
    sort_arguments,
)
from tests.tables import make_table

COVERAGE = Coverage.up_to(SortingShape(16, 4, 64), 64)


def test_unknown_shapes_run_as_they_came_and_are_noted_by_reference(any_aiter):
    hook = installed(any_aiter)
    mask = torch.ones(16, dtype=torch.int32)
    for count in (8, 100, 50, 100, 101):
        any_aiter.fused_moe(*batch(count), expert_mask=mask)
        assert policy_that_arrived() == 0
    (seen,) = hook.seen.values()
    assert seen.num_tokens == 101
    assert seen.expert_mask is mask
    assert seen.device == torch.device("cpu")
    assert hook.counts().unknown == hook.counts().total == 5


def test_a_batch_past_the_table_is_noted_so_that_a_later_warm_up_extends_it(aiter):
    hook = installed(aiter)
    aiter.fused_moe(*batch(8))
    hook.set_tables({KEY: make_table({1: 2, 64: 2})})
    aiter.fused_moe(*batch(300))
    assert policy_that_arrived() == 0
    assert hook.seen[KEY].num_tokens == 300


def test_every_argument_after_the_ninth_is_kept_and_none_of_the_batchs_tensors():
    module = seam_of(lambda given: (), accumulate=True, order="rising", output=None)
    hook = installed(module)
    module.moe_sorting(*sort_arguments(8), accumulate=False, output=torch.zeros(8, 64))
    (seen,) = hook.seen.values()
    assert dict(seen.extras) == {
        "accumulate": False,
        "order": "rising",
        "output": Buffer((64,), torch.float32),
    }
    # A call with another buffer is the same shape.
    module.moe_sorting(*sort_arguments(8), accumulate=False, output=torch.zeros(8, 64))
    assert len(hook.seen) == 1


def test_how_the_chooser_was_asked_is_kept(aiter):
    hook = installed(aiter)
    aiter.fused_moe(*batch(8), expert_mask=torch.ones(16, dtype=torch.int32))
    (seen,) = hook.seen.values()
    assert seen.config.rest[0] == 64  # model_dim: all but the token count
    assert dict(seen.config.keywords)["is_ep"] is True


@pytest.mark.parametrize(
    ("count", "length", "rounded"),
    [
        (8, 8 * 4 + 16 * 32 - 4, False),
        (8, 544, True),
        (8, 576, None),  # neither
        (9, 9 * 4 + 16 * 32 - 4, None),  # a whole number of blocks anyhow
    ],
)
def test_whether_buffers_are_rounded_is_read_off_the_outputs(count, length, rounded):
    assert is_rounded((torch.zeros(length),), count, KEY) is rounded


def test_the_first_call_tells_where_it_can(aiter):
    hook = installed(aiter)
    aiter.fused_moe(*batch(8))
    assert (hook.seen[KEY].rounded, hook.seen[KEY].num_outputs) == (False, 5)


@pytest.mark.parametrize(("version", "rounded"), [("main", False), ("september", True)])
def test_a_batch_that_cannot_tell_leaves_it_to_a_later_one(version, rounded):
    aiter = load_aiter(version)
    hook = installed(aiter)
    found = []
    for count in (1, 9, 10, 17):
        aiter.fused_moe(*batch(count))
        found.append(hook.seen[KEY].rounded)
    assert found == [None, None, rounded, rounded]
    assert hook.seen[KEY].num_outputs == 5


def test_what_no_sort_returns_is_nobodys_problem(caplog):
    for outputs in (None, (), "text", ("text",), (torch.tensor(1),), 3):
        module = seam_of(lambda given, outputs=outputs: outputs)
        hook = installed(module)
        assert module.moe_sorting(*sort_arguments(8)) is outputs
        assert hook.seen[KEY].rounded is None


def test_an_unknown_shape_after_warm_up_is_said_once_with_its_baseline(aiter, caplog):
    hook = installed(aiter, engine_policy=2)
    aiter.fused_moe(*batch(8))
    assert not caplog.records
    hook.end_warm_up((), None)
    for count in (8, 9, 10):
        aiter.fused_moe(*batch(count, dim=128), moe_sorting_dispatch_policy=2)
    assert [r.message for r in caplog.records] == [
        "sorting 8 tokens of 16 experts, topk 4, dim 128, bfloat16, block 32 was first seen after "
        "warm-up: the baseline, policy 2, serves it until the next warm_up()"
    ]


# How long it is kept


def test_a_warm_up_keeps_an_expert_mask_until_it_is_over(aiter):
    """A mask may be made for each call; one that its model keeps is there for a later warm-up."""
    hook = installed(aiter)
    mask = torch.ones(16, dtype=torch.int32)
    kept = weakref.ref(mask)
    aiter.fused_moe(*batch(8), expert_mask=mask)
    del mask
    gc.collect()
    (call,) = hook.wanted_by(None)
    assert call.expert_mask is kept()
    hook.set_tables({call.key: make_table({64: 2})})
    hook.end_warm_up((call.key,), None)
    assert [known.expert_mask for known in hook.wanted_by(None)] == [kept()]
    del call
    gc.collect()
    assert kept() is None
    assert hook.wanted_by(None) == []  # there is no layer left to measure for
    mask = torch.ones(16, dtype=torch.int32)
    aiter.fused_moe(*batch(300), expert_mask=mask)
    assert [call.expert_mask for call in hook.wanted_by(None)] == [mask]


class Worker:
    """An engine in this process, as its plugin names it."""


def test_what_one_engine_has_warmed_up_is_not_measured_for_another(aiter):
    hook, first, second = installed(aiter), Worker(), Worker()
    aiter.fused_moe(*batch(8))
    other = KEY._replace(model_dim=128)
    for owner in (first, None):
        assert [call.key for call in hook.wanted_by(owner)] == [KEY]
    hook.set_tables({KEY: make_table({64: 2})})
    hook.end_warm_up((KEY,), first)
    aiter.fused_moe(*batch(8, dim=128))
    assert [call.key for call in hook.wanted_by(second)] == [other]
    assert [call.key for call in hook.wanted_by(first)] == [KEY, other]


def test_an_engines_shapes_and_tables_go_when_it_is_gone(aiter, caplog):
    hook, worker = installed(aiter), Worker()
    aiter.fused_moe(*batch(8))
    hook.set_tables({KEY: make_table({64: 2}), KEY._replace(block_size=64): make_table({64: 2})})
    hook.end_warm_up(hook.tables, worker)
    aiter.fused_moe(*batch(8))
    assert policy_that_arrived() == 2
    del worker
    gc.collect()
    assert (dict(hook.seen), dict(hook.tables)) == ({}, {})
    aiter.fused_moe(*batch(8))  # the next engine's, with the same model
    assert policy_that_arrived() == 0
    assert [call.key for call in hook.wanted_by(Worker())] == [KEY]
    assert caplog.records == []  # nothing was warmed up for it yet


# Called again


LAYER = contextvars.ContextVar("layer", default="none")


def seen_in(module, call):
    """The SortCall of a call made within a context of its own."""
    hook = installed(module)
    contextvars.copy_context().run(call)
    (seen,) = hook.seen.values()
    return hook, seen


def test_a_measurement_runs_in_the_context_of_the_call_and_leaves_none_behind(aiter):
    def call():
        LAYER.set("experts")
        aiter.fused_moe(*batch(8))

    def measure(number, *, and_more):
        found = LAYER.get()
        LAYER.set("measured")
        return found, number, and_more

    _, seen = seen_in(aiter, call)
    for _ in range(2):
        assert seen.as_called(measure, 1, and_more=2) == ("experts", 1, 2)
    assert LAYER.get() == "none"


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_a_measurement_runs_in_the_calls_grad_and_inference_mode(aiter, inference, grad):
    def call():
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            aiter.fused_moe(*batch(8))

    def modes():
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    _, seen = seen_in(aiter, call)
    for outer in (True, False):
        with torch.inference_mode(not inference), torch.set_grad_enabled(outer):
            before = modes()
            assert seen.as_called(modes) == (inference, grad)
            assert modes() == before


def test_a_call_on_a_gpu_is_made_again_on_its_device_and_stream(monkeypatch):
    """On a torch that says what it is told: there is no GPU here."""
    within = []

    @contextlib.contextmanager
    def entered(what):
        within.append(what)
        yield
        within.remove(what)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    device = torch.device("cuda", 1)
    named = {
        "topk_ids": SimpleNamespace(device=device),
        "dispatch_policy": 0,
        "expert_mask": None,
    }
    wrapped = installed(seam_of(policy_of)).wrapped
    seen = sort_call(wrapped, KEY._replace(device=1), 8, named, None)
    assert (seen.device, seen.stream) == (device, "stream of cuda:1")
    assert seen.as_called(within.copy) == [device, "stream of cuda:1"]
    assert within == []


def test_a_measured_call_passes_what_the_seen_one_passed():
    passed = []
    later = {"return_local_topk_ids": False, "accumulate": True, "order": "rising", "output": None}
    aiter = seam_of(lambda given: passed.append(list(given.values())[8:]) or (), **later)
    hook = installed(aiter, Settings(mode=Mode.AUTO))
    buffer = torch.zeros((8, 64))
    aiter.moe_sorting(
        *sort_arguments(8), return_local_topk_ids=True, accumulate=False, order="x", output=buffer
    )
    (seen,) = hook.seen.values()
    for key, accumulate in ((seen.key, False), (seen.key._replace(accumulate=True), True)):
        kernel = hook.kernel(seen, key, COVERAGE)
        assert [c.name for c in kernel.candidates] == ["policy 0", "policy 1", "policy 2"]
        for policy, candidate in enumerate(kernel.candidates):
            candidate.bind(inputs(24))()
            *given, output = passed.pop()
            assert given == [policy, True, accumulate, "x"]
            assert (tuple(output.shape), output.dtype) == ((24, 64), torch.float32)
    assert hook.counts().total == 1  # measuring went past the wrapper


def inputs(num_tokens):
    from adaptive_moe.kernels.contract import SortingInputs

    return SortingInputs(*sort_arguments(num_tokens)[:6])


def test_the_baseline_is_measured_with_the_very_object_that_came():
    aiter = load_aiter("v0.1.9")
    hook = installed(aiter, engine_policy=2)
    aiter.fused_moe(*batch(8), moe_sorting_dispatch_policy=2)
    (seen,) = hook.seen.values()
    kernel = hook.kernel(seen, seen.key, COVERAGE)
    assert [c.name for c in kernel.candidates] == ["policy True", "policy 0", "policy 2"]
    kernel.baseline.bind(inputs(8))()
    assert policy_that_arrived() is True


def test_a_kernel_needs_the_hook_in_place(aiter):
    hook = installed(aiter)
    aiter.fused_moe(*batch(8))
    hook.uninstall()
    with pytest.raises(RuntimeError) as refused:
        hook.kernel(hook.seen[KEY], KEY, COVERAGE)
    says = "adaptive_moe is not active in this process: install() it first"
    assert str(refused.value) == says
