"""What a calibration of the live AITER is valid for, and what rows of padding leave out."""

import contextvars
import os
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from adaptive_moe.kernels.live import live_kernel, name
from adaptive_moe.kernels.sorts import GROUPS, OtherSort, say_once
from adaptive_moe.policy.coverage import Coverage
from tests.kernels.living import SHAPE, candidates, inputs, live

# What a calibration is valid for


def test_the_name_tells_contents_apart(made, tmp_path):
    first = name(live(made))
    assert first == name(live(made))
    assert " opus, " in first
    (tmp_path / "aiter" / "fused_moe.py").write_text("# AITER, pulled\n")
    assert name(live(made)) != first


@pytest.mark.parametrize(
    "file",
    [
        "aiter/ops/moe_sorting_opus.py",
        "aiter/ops/flydsl/kernels/moe_sorting_kernel.py",
        "aiter_meta/csrc/include/moe_sorting_opus.h",
        "csrc/include/moe_sorting_opus.h",
        "csrc/py_itfs_cu/moe_sorting_opus_kernels.cu",
    ],
)
def test_the_sources_of_the_sorts_count_wherever_they_lie(made, tmp_path, file):
    source = tmp_path / file
    source.parent.mkdir(parents=True)
    source.write_text("one")
    first = name(live(made))
    source.write_text("another")
    assert name(live(made)) != first


def test_whoever_stands_in_for_aiters_function_is_named_and_counts(made):
    plain = name(live(made))
    own = made._moe_sorting_impl
    found = set()
    for text in ("return own(*args)", "return own(*args) or None"):
        scope = {"own": own, "__name__": "engine.small"}
        exec(f"def small_sort(*args):\n    {text}", scope)
        made._moe_sorting_impl = scope["small_sort"]
        found.add(name(live(made)))
    assert plain not in found
    assert len(found) == 2
    assert all("engine.small.small_sort" in each for each in found)


def loads(monkeypatch, file, module="aiter.jit.module_moe_sorting_opus"):
    built = ModuleType(module)
    built.__file__ = str(file)
    monkeypatch.setitem(sys.modules, module, built)


def again(made):
    """The same AITER in another process: what is loaded is looked at once in each."""
    other = ModuleType(made.__name__)
    vars(other).update(vars(made))
    return other


def test_the_built_sorts_that_are_loaded_count_by_content(made, tmp_path, monkeypatch):
    """AITER does not rebuild them when its sources change."""
    built = tmp_path / "module_moe_sorting_opus.so"
    built.write_text("one build")
    nothing_loaded = name(live(made))
    loads(monkeypatch, built)
    first = name(live(again(made)))
    assert first != nothing_loaded
    assert name(live(again(made))) == first
    built.write_text("another build")
    os.utime(built, (1.0, 1.0))
    assert name(live(again(made))) != first


def test_what_is_loaded_while_measuring_changes_nothing(made, tmp_path, monkeypatch):
    first = name(live(made))
    built = tmp_path / "module_moe_sorting.so"
    built.write_text("built meanwhile")
    loads(monkeypatch, built, "aiter.jit.module_moe_sorting")
    assert name(live(made)) == first
    # Nor does one whose file is gone cost anything.
    built.unlink()
    assert name(live(again(made))) == first


def test_the_backend_is_the_one_that_really_runs(with_flydsl):
    module = with_flydsl
    assert live(module).backend(0) == "opus"
    module._USE_FLYDSL_MOE_SORTING = True
    assert (live(module).backend(0), live(module).backend(2)) == ("flydsl", "opus")
    assert live(module, return_local_topk_ids=True).backend(0) == "opus"
    assert "flydsl or opus" in name(live(module))
    assert "opus or flydsl" in name(live(module, baseline=2))
    module.is_flydsl_available = lambda: False
    assert live(module).backend(0) == "opus"
    module._USE_CK_MOE_SORTING = True
    assert live(module).backend(0) == "ck"
    assert live(module, return_local_topk_ids=True).backend(0) == "opus"


def test_first_versions_sort_with_ck_unless_told(made):
    del made._USE_CK_MOE_SORTING, made._USE_FLYDSL_MOE_SORTING
    assert live(made).backend(0) == "ck"
    made._USE_OPUS_MOE_SORTING = True
    assert live(made).backend(0) == "opus"


def test_other_sorts_count_by_their_identity(made, added):
    def named():
        kernel, _ = live_kernel(live(made), Coverage.up_to(SHAPE, 64), ("bitonic",))
        return kernel.name

    first = named()
    assert first != name(live(made))
    added.sorts = lambda live, shape: iter([OtherSort("bitonic", print, "bitonic 1.1")])
    assert named() != first


# In the context of the seen call

BATCH = contextvars.ContextVar("activations of the batch", default=None)
SCALES = contextvars.ContextVar("of each expert")


@pytest.mark.parametrize("who", ["policy 0", "policy 2", "bitonic"])
def test_a_batch_in_the_context_is_not_given_to_more_tokens_than_it_has(made, added, who):
    """A sort that reads a row of it for each token would read past its end."""

    def sort(*arguments, **extras):
        return BATCH.get(), SCALES.get()

    added.sorts = lambda live, shape: iter([OtherSort("bitonic", sort, "bitonic 1.0")])
    call = replace(live(made), seam=sort)
    kernel, _ = live_kernel(call, Coverage.up_to(SHAPE, 64), ("policies", "bitonic"))
    (candidate,) = (c for c in kernel.candidates if c.name == who)
    seen, scales = torch.zeros(8, 2), torch.tensor(1.0)

    def measured(num_tokens):
        BATCH.set(seen)
        SCALES.set(scales)
        return candidate.bind(inputs(num_tokens))()

    for num_tokens, batch in ((1, seen), (8, seen), (9, None), (64, None)):
        found = contextvars.copy_context().run(measured, num_tokens)
        assert found[0] is batch
        assert found[1] is scales


# Rows of padding, whose expert ids are -1


@pytest.fixture(autouse=True)
def nothing_said_yet():
    say_once.cache_clear()


def padded(baseline="policy 0"):
    return Coverage.up_to(SHAPE, 4096, (8,), padding_rows=True, baseline=baseline)


@pytest.mark.parametrize("baseline", [0, False])
def test_with_rows_of_padding_baseline_0_is_offered_policy_2_only(made, baseline):
    found = candidates(live(made, baseline=baseline), ("policies",), padded())
    assert found == [f"policy {baseline}", "policy 2"]


@pytest.mark.parametrize("baseline", [2, True])
def test_with_rows_of_padding_another_baseline_is_offered_no_policy(made, baseline):
    coverage = padded(f"policy {baseline}")
    found = candidates(live(made, baseline=baseline), ("policies",), coverage)
    assert found == [f"policy {baseline}"]


def test_with_rows_of_padding_aiters_other_backends_are_not_offered(with_flydsl):
    with_flydsl._USE_CK_MOE_SORTING = True  # so that Opus is another backend
    words = ("ck", "opus", "flydsl")
    without = Coverage.up_to(SHAPE, 64)
    assert candidates(live(with_flydsl), words, without) == ["policy 0", *words]
    assert candidates(live(with_flydsl), words, padded()) == ["policy 0"]


def test_with_rows_of_padding_our_own_sorts_are_offered(made):
    pytest.importorskip("triton")
    for baseline in (0, 2, True):
        coverage = padded(f"policy {baseline}")
        found = candidates(live(made, baseline=baseline), GROUPS["all"], coverage)
        assert found[-2:] == ["triton one-shot", "triton multi-phase"]


def test_with_rows_of_padding_a_registered_sort_says_for_itself(made, added):
    for takes, offered in ((True, ["policy 0", "bitonic"]), (False, ["policy 0"])):
        sort = OtherSort("bitonic", print, "bitonic 1.0", takes_padding=takes)
        added.sorts = lambda live, shape, sort=sort: iter([sort])
        assert candidates(live(made), ("bitonic",), padded()) == offered


def test_what_is_not_offered_is_said_once_with_the_reason(made, caplog):
    for _ in range(2):
        candidates(live(made), ("policies", "ck"), padded())
    policy, ck = caplog.messages
    assert policy.startswith("policy 1 is not offered for 256 experts, topk 8")
    assert ck.startswith("ck is not offered for 256 experts, topk 8")
    assert all("rows of padding have expert ids of -1" in line for line in (policy, ck))


def test_without_rows_of_padding_every_policy_is_offered(made, caplog):
    found = candidates(live(made), ("policies",), Coverage.up_to(SHAPE, 4096, (8,)))
    assert found == ["policy 0", "policy 1", "policy 2"]
    assert caplog.messages == []
