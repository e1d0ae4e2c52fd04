"""An engine's first forward without the engine, on the stand-in for AITER."""

import inspect
import sys
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

from adaptive_moe.engines.rehearsal import (
    EngineCalls,
    MoeLayer,
    RehearsalError,
    calls_of,
    rehearse,
)
from adaptive_moe.shape import SortingShape
from tests.aiter_standin.load import ROOT, load_aiter
from tests.engines.hooking import AUTO

pytestmark = pytest.mark.usefixtures("fresh_process")

CPU = torch.device("cpu")
SHAPE = SortingShape(16, 4, 64)
# A rank that keeps 6 of the experts, in batches filled up to a capacity.
PART = SortingShape(16, 4, 64, "float16", local_experts=6, num_local_tokens=True)
PLAIN = EngineCalls("plain")


def rehearsed(layer, num_tokens=40, calls=PLAIN):
    return rehearse(layer, num_tokens, calls, AUTO, CPU)


def watched(module, monkeypatch):
    """The arguments by name of the calls of AITER's fused_moe, which runs as ever."""
    theirs, found = module.fused_moe, []
    signature = inspect.signature(theirs)

    def fused_moe(*args, **kwargs):
        found.append(signature.bind(*args, **kwargs).arguments)
        with torch.device("cpu"):
            return theirs(*args, **kwargs)

    monkeypatch.setattr(module, "fused_moe", fused_moe)
    return found


@contextmanager
def other_defaults():
    """torch as an engine or a user may have set it."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(usual)


@pytest.mark.parametrize(
    ("quant", "kind", "dtype", "packed", "block_size"),
    [
        ("none", "No", torch.float16, 1, 32),
        ("fp8", "per_Token", torch.float8_e4m3fnuz, 1, 32),
        ("fp8-block", "per_1x128", torch.float8_e4m3fnuz, 1, 64),
        ("mxfp4", "per_1x32", torch.uint8, 2, 32),
    ],
)
def test_a_layer_is_called_as_an_engine_calls_it(
    any_aiter, monkeypatch, quant, kind, dtype, packed, block_size
):
    """With tensors of the layer's shapes on the device asked for, in one element of memory each."""
    found = watched(any_aiter, monkeypatch)
    with other_defaults():
        hook = rehearsed(MoeLayer(PART, 96, quant))
    (call,) = found
    options = {"expert_mask", "quant_type", "num_local_tokens"}
    assert set(call) == {"hidden_states", "w1", "w2", "topk_weight", "topk_ids"} | options
    weights = {
        "hidden_states": ((40, 64), torch.float16),
        "w1": ((6, 192, 64 // packed), dtype),
        "w2": ((6, 64, 96 // packed), dtype),
    }
    routed = {
        "topk_weight": ((40, 4), torch.float32),
        "topk_ids": ((40, 4), torch.int32),
        "expert_mask": ((16,), torch.int32),
        "num_local_tokens": ((1,), torch.int32),
    }
    for name, facts in {**weights, **routed}.items():
        assert (tuple(call[name].shape), call[name].dtype) == facts, name
        assert call[name].device == CPU
    assert all(call[name].untyped_storage().nbytes() <= 2 for name in weights)
    assert call["quant_type"] is sys.modules["aiter"].QuantType[kind]
    assert call["expert_mask"].tolist() == 6 * [1] + 10 * [0]
    assert call["num_local_tokens"].tolist() == [40]
    # Tokens go to different experts, evenly: each of 16 has 10 of the 160, more or less.
    counts = call["topk_ids"].flatten().bincount(minlength=16)
    assert counts.min() >= 3
    assert counts.max() <= 20
    assert all(len(set(row)) == 4 for row in call["topk_ids"].tolist())
    assert call["topk_weight"].sum(1).allclose(torch.ones(()).float())

    ((key, seen),) = hook.seen.items()
    assert key[:8] == (16, 4, 64, torch.float16, block_size, True, True, True)
    assert (seen.num_tokens, key.baseline) == (40, 0)
    assert seen.config.rest[:7] == (64, 96 // packed, 6, 4, torch.float16, dtype, dtype)


@pytest.mark.parametrize(("block_size", "seen"), [(None, 32), (128, 128)])
@pytest.mark.parametrize(("policy", "passed"), [(0, None), (2, 2)])
def test_a_layer_with_all_its_experts_and_what_is_asked_for_besides(
    aiter, monkeypatch, block_size, seen, policy, passed
):
    found = watched(aiter, monkeypatch)
    hook = rehearsed(MoeLayer(SHAPE, 96, block_size=block_size), 8, EngineCalls("engine", policy))
    (call,) = found
    assert (call["w1"].shape, call["w1"].dtype) == ((16, 192, 64), torch.bfloat16)
    assert call["expert_mask"] is call["num_local_tokens"] is None
    assert call.get("block_size_M") == block_size
    assert call.get("moe_sorting_dispatch_policy") == passed
    (key,) = hook.seen
    assert (key.block_size, key.baseline, key.has_expert_mask) == (seen, policy, False)
    assert (hook.settings, hook.engine_policy) == (AUTO, policy)


def test_nothing_is_run_after_the_sort_and_aiter_is_left_as_it_was(aiter, monkeypatch):
    """The rows of weights that have no memory would have been read."""
    theirs, came = aiter.moe_sorting, []
    monkeypatch.setattr("aiter.layer._row_sums", lambda *parts: came.append(parts))
    hook = rehearsed(MoeLayer(SHAPE, 96), 8)
    assert len(sys.modules["aiter.sort"].calls) == 1
    assert came == []
    assert aiter.moe_sorting.__wrapped__ is theirs
    hook.uninstall()
    assert aiter.moe_sorting is theirs


def no_sort(module):
    module.fused_moe = lambda *args, **kwargs: None


def no_gpu(module):
    def fused_moe(*args, **kwargs):
        raise ValueError("no kernel for this GPU")

    module.fused_moe = fused_moe


def no_seam(module):
    del module.moe_sorting


@pytest.mark.parametrize(
    ("breaks", "quant", "problem"),
    [
        (no_sort, "none", "AITER's fused_moe did not come to its sort: it returned without one"),
        (
            no_gpu,
            "none",
            "AITER's fused_moe did not come to its sort: ValueError: no kernel for this GPU",
        ),
        (
            no_seam,
            "none",
            "aiter.fused_moe has no sort that can be chosen for: see the warning above",
        ),
        # The stand-in leaves the sort out for more than 64 tokens of such a layer.
        (lambda module: None, "fp8", "AITER sorts this layer in a way that no policy changes"),
    ],
)
def test_a_layer_without_a_sort_to_choose_is_told(aiter, breaks, quant, problem):
    breaks(aiter)
    theirs = getattr(aiter, "moe_sorting", None)
    with pytest.raises(RehearsalError) as told:
        rehearsed(MoeLayer(SHAPE, 96, quant), 65)
    assert str(told.value) == problem
    if theirs is not None:
        assert aiter.moe_sorting.__wrapped__ is theirs


def test_a_sort_that_fails_has_not_been_seen(aiter, monkeypatch):
    monkeypatch.setenv("AITER_STANDIN_FAIL", "policy=0,kind=raise")
    with pytest.raises(RehearsalError, match=r"sort: RuntimeError: .*this sort failed"):
        rehearsed(MoeLayer(SHAPE, 96), 8)


def test_an_aiter_that_cannot_be_imported_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiter.fused_moe", None)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    with pytest.raises(RehearsalError) as told:
        rehearsed(MoeLayer(SHAPE, 96), 8)
    problem = "import of aiter.fused_moe halted; None in sys.modules"
    assert str(told.value) == f"aiter.fused_moe cannot be imported: {problem}"


# Who asks


def installed(engine, version):
    """What the package of an engine has, and its metadata."""
    metadata = f"Metadata-Version: 2.1\nName: {engine}\nVersion: {version}\n"
    return {
        f"{engine}-{version}.dist-info/METADATA": metadata,
        f"{engine}/__init__.py": "",
    }


VLLM = {
    **installed("vllm", "0.33.0"),
    "vllm/envs.py": 'environment_variables = {"VLLM_MOE_SKIP_PADDING": lambda: True}',
}
SMALL_SORT = "sglang.kernels.ops.moe.moe_sorting_small"
SGLANG = {
    **installed("sglang", "0.5.23"),
    "sglang/srt/__init__.py": "",
    "sglang/srt/environ.py": """
        class Two:
            def get(self):
                return "2"
        class envs:
            SGLANG_AITER_MOE_SORTING_DISPATCH_POLICY = Two()
    """,
    **{f"sglang/kernels/{path}__init__.py": "" for path in ("", "ops/", "ops/moe/")},
    "sglang/kernels/ops/moe/moe_sorting_small.py": """
        patched = []
        def apply_aiter_small_moe_sort_patch():
            patched.append("aiter")
    """,
}


def test_no_engine_passes_aiters_own_choice():
    assert calls_of("plain") == EngineCalls("plain", policy=0, padding_rows=False)


def test_vllm_passes_aiters_own_choice_and_may_have_rows_of_padding(package):
    package(VLLM)
    assert calls_of("vllm") == EngineCalls("vllm 0.33.0", policy=0, padding_rows=True)


@pytest.mark.parametrize("padding", [False, True])
def test_sglang_passes_its_own_policy_and_has_a_sort_for_small_batches(
    package, monkeypatch, padding
):
    package(SGLANG)
    if padding:
        router = "sglang.srt.multimodal.dsv41.vl_routing"
        monkeypatch.setitem(sys.modules, router, ModuleType(router))
    assert calls_of("sglang") == EngineCalls("sglang 0.5.23", policy=2, padding_rows=padding)
    assert sys.modules[SMALL_SORT].patched == ["aiter"]


def test_an_sglang_without_a_sort_for_small_batches_goes_without(package):
    package({k: v for k, v in SGLANG.items() if "small" not in k})
    assert calls_of("sglang") == EngineCalls("sglang 0.5.23", policy=2)


@pytest.mark.parametrize(
    ("engine", "files", "problem"),
    [
        ("vllm", {}, "No package metadata was found for vllm"),
        ("vllm", installed("vllm", "0.33.0"), "cannot import name 'envs' from 'vllm'"),
        ("sglang", installed("sglang", "0.5.23"), "No module named 'sglang.srt'"),
    ],
)
def test_an_engine_that_is_not_installed_is_told(package, engine, files, problem):
    package(files)
    with pytest.raises(RehearsalError) as told:
        calls_of(engine)
    before, _, after = str(told.value).partition(problem)
    assert before == f"--for {engine} needs {engine} installed here ("
    rest = "): a table is kept for its version; run this where it serves, or leave --for out"
    assert after.endswith(rest)


def test_what_was_rehearsed_is_what_the_engine_asks_of_the_hook(monkeypatch):
    """The same key as of an engine's forward with tensors of its own: so its table is found."""
    aiter = load_aiter()
    hook = rehearsed(MoeLayer(SHAPE, 96), 40)
    (key,) = hook.seen
    hidden = torch.zeros((8, 64), dtype=torch.bfloat16)
    w1, w2 = torch.zeros((16, 192, 64)), torch.zeros((16, 64, 96))
    ids = torch.arange(4, dtype=torch.int32).repeat(8, 1)
    aiter.fused_moe(hidden, w1, w2, torch.ones((8, 4)), ids)
    assert list(hook.seen) == [key]
