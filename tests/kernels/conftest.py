"""An AITER of files and functions made by hand, for tests of what is offered beside it."""

import sys
from types import ModuleType

import pytest

from adaptive_moe.kernels import sorts
from adaptive_moe.kernels.sorts import REGISTRY, OtherSort


def implementation(log):
    def _moe_sorting_impl(
        topk_ids,
        topk_weights,
        num_experts,
        model_dim,
        moebuf_dtype,
        block_size,
        expert_mask,
        num_local_tokens,
        dispatch_policy,
        use_opus,
        return_local_topk_ids=False,
        accumulate=True,
        output_aux=False,
    ):
        log.append((dispatch_policy, use_opus, return_local_topk_ids, accumulate))
        return "outputs"

    return _moe_sorting_impl


@pytest.fixture
def made(tmp_path, monkeypatch):
    """An AITER of files and one function; made.log has the calls of its implementation."""
    for variable in sorts.BACKEND_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    package = tmp_path / "aiter"
    (package / "jit").mkdir(parents=True)
    (package / "fused_moe.py").write_text("# AITER\n")
    (package / "jit" / "module_moe_sorting.so").write_text("CK")
    module = ModuleType("aiter.fused_moe")
    module.__file__ = str(package / "fused_moe.py")
    module.log = []
    module._moe_sorting_impl = implementation(module.log)
    module._USE_CK_MOE_SORTING = False
    module._USE_FLYDSL_MOE_SORTING = False
    module.is_flydsl_available = lambda: False
    return module


@pytest.fixture
def with_flydsl(made, monkeypatch, tmp_path):
    """And FlyDSL's kernels, which keep what they are called with in `sorted`."""
    kernels = ModuleType("aiter.ops.flydsl.kernels.moe_sorting_kernel")
    file = tmp_path / "moe_sorting_kernel.py"
    file.write_text("has_local_tokens = True\n")
    kernels.__file__ = str(file)
    kernels.sorted = []
    kernels.moe_sorting_flydsl = lambda *args: kernels.sorted.append(args)
    names = ("aiter", "aiter.ops", "aiter.ops.flydsl", "aiter.ops.flydsl.kernels")
    for package in names:
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    made.is_flydsl_available = lambda: True
    made.kernels = kernels
    return made


@pytest.fixture
def added(monkeypatch):
    """One module, and one line."""
    module = ModuleType("somebodys.sort")
    module.sorts = lambda live, shape: iter(
        [OtherSort("bitonic", lambda *leading: ("bitonic", *leading), "bitonic 1.0")]
    )
    monkeypatch.setitem(sys.modules, "somebodys.sort", module)
    monkeypatch.setitem(REGISTRY, "bitonic", "somebodys.sort")
    return module
