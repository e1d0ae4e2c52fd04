"""What a calibration of the live AITER is valid for, and whom rows of padding leave out."""

import contextvars
from dataclasses import replace

import pytest
import torch

from adaptive_moe.kernels import live as live_module
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


# Rows of padding


def padded(max_tokens=4096, baseline="policy 0"):
    return Coverage.up_to(SHAPE, max_tokens, (8,), padding_rows=True, baseline=baseline)


UNGUARDED = """
struct MoeSortingKernel { eid = topk_id[i]; smem_tokens(curr_token_id, eid) = 1; };
struct MoeSortingMultiPhaseKernel_P0_v2 { if (x == eid) {} };
struct MoeSortingMultiPhaseKernel_P0_v1 { eid = r.x[j]; p_expert_mesh[eid * s] = 1; };
"""
GUARDED = UNGUARDED.replace("smem_tokens", "if (eid >= 0) smem_tokens").replace(
    "p_expert_mesh", "if (eid >= 0) p_expert_mesh"
)


@pytest.fixture
def opus_source(made, tmp_path):
    file = tmp_path / "csrc" / "include" / "moe_sorting_opus.h"
    file.parent.mkdir(parents=True)

    def write(text):
        file.write_text(text)
        live_module._unguarded.cache_clear()
        say_once.cache_clear()

    return write


def test_who_takes_minus_one_for_an_index_is_not_offered_rows_of_padding(made, opus_source, caplog):
    opus_source(UNGUARDED)
    assert candidates(live(made), ("policies",), padded()) == ["policy 0", "policy 2"]
    assert candidates(live(made), ("policies",), padded()) == ["policy 0", "policy 2"]
    (line,) = [r.message for r in caplog.records]
    assert line.startswith("policy 1 is not offered for 256 experts, topk 8")
    assert "update AITER" in line
    opus_source(GUARDED)
    every = ["policy 0", "policy 1", "policy 2"]
    assert candidates(live(made), ("policies",), padded()) == every
    opus_source(UNGUARDED)
    assert candidates(live(made), ("policies",), Coverage.up_to(SHAPE, 4096, (8,))) == every


def test_a_sort_without_guard_is_left_out_and_ours_stays(made, opus_source):
    pytest.importorskip("triton")
    opus_source(GUARDED)  # CK's own source is not there, so nothing says that it looks
    found = candidates(live(made), GROUPS["all"], padded())
    assert "ck" not in found
    assert "triton one-shot" in found
    assert "ck" in candidates(live(made), GROUPS["all"], Coverage.up_to(SHAPE, 64))
