"""The plugin in a real SGLang, whose code runs on the CPU; run.py runs it in its environment."""

import contextlib
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from absent import make_importable
from worker import STANDIN

HERE = Path(__file__).parent
VARIABLE = "ADAPTIVE_MOE_DISPATCH_POLICY"
SGLANG_VARIABLE = "SGLANG_AITER_MOE_SORTING_DISPATCH_POLICY"
LARGEST_CAPTURE = 64
PREFILL = 2048


@pytest.fixture(scope="module")
def sglang():
    """SGLang's modules under test, with the plugin executed by SGLang's own loader."""
    sys.path.insert(0, str(STANDIN))
    os.environ[VARIABLE] = "auto"
    os.environ["ADAPTIVE_MOE_BUDGET_S"] = "5"  # enough on a busy machine; it ends when settled
    os.environ["AITER_STANDIN_SLOW"] = "0"
    make_importable("torchvision")
    torch.set_num_threads(1)
    from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig, PhaseConfig
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.layers.moe.moe_runner import aiter as runner
    from sglang.srt.model_executor.runner_backend import (
        breakable_cuda_graph_backend,
        full_cuda_graph_backend,
        tc_piecewise_cuda_graph_backend,
    )
    from sglang.srt.runtime_context import get_exec, publish
    from sglang.srt.server_args import ServerArgs

    publish(
        ServerArgs(model_path="dummy", device="cpu", chunked_prefill_size=PREFILL),
        role="scheduler",
    )
    sizes = CudaGraphConfig(decode=PhaseConfig(backend="full", bs=[1, 8, LARGEST_CAPTURE]))
    with get_exec().graph.override(cuda_graph_config=sizes):
        yield SimpleNamespace(
            runner=runner,
            backends=(
                full_cuda_graph_backend.FullCudaGraphBackend,
                breakable_cuda_graph_backend.BreakableCudaGraphBackend,
                tc_piecewise_cuda_graph_backend.TcPiecewiseCudaGraphBackend,
            ),
        )


def forward(runner, num_tokens, *, experts=16, topk=4, dim=64):
    """One MoE layer through SGLang's own runner; what arrived at the sort."""
    core = runner.AiterRunnerCore(runner.MoeRunnerConfig())
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.rand((num_tokens, experts), generator=generator).argsort(1)[:, :topk]
    core.run(
        runner.AiterRunnerInput(
            hidden_states=torch.zeros((num_tokens, dim), dtype=torch.bfloat16),
            topk_ids=ids.int().contiguous(),
            topk_weights=torch.rand((num_tokens, topk), generator=generator),
            quant_type=runner.AiterQuantType.NONE,
        ),
        runner.AiterMoeQuantInfo(
            w13_weight=torch.zeros((experts, 32, dim), dtype=torch.bfloat16),
            w2_weight=torch.zeros((experts, dim, 16), dtype=torch.bfloat16),
        ),
        {},
    )
    import aiter.sort

    return aiter.sort.calls[-1]


class CaptureBeginsError(Exception):
    """Raised in place of making a CUDAGraph, which the CPU cannot."""


def capture_one(backend_class, forward_fn, monkeypatch):
    """SGLang's real capture_one, up to the moment where it would begin to capture."""

    def begin(*args, **kwargs):
        raise CaptureBeginsError

    backend = backend_class.__new__(backend_class)
    backend._cuda_graph_runner = SimpleNamespace(captured_req_width=1)
    backend._device_module = SimpleNamespace(synchronize=lambda: None)
    backend._tp_group = SimpleNamespace(barrier=lambda: None)
    backend._precarve = SimpleNamespace(measure=contextlib.nullcontext)
    backend._reuse_output_buffer = False
    backend.deduped_cuda_graph = False
    module = sys.modules[backend_class.__module__]
    monkeypatch.setattr(torch.cuda, "CUDAGraph", begin)
    if hasattr(module, "BreakableCUDAGraph"):
        monkeypatch.setattr(module, "BreakableCUDAGraph", begin)
    with contextlib.suppress(CaptureBeginsError):
        backend.capture_one(SimpleNamespace(size=LARGEST_CAPTURE), forward_fn)


def run(code, **environ):
    environ = {**os.environ, **environ}
    environ["PYTHONPATH"] = os.pathsep.join([environ["PYTHONPATH"], str(STANDIN)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environ,
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_sglang_discovers_the_entry_point():
    (found,) = [e for e in entry_points(group="sglang.srt.plugins") if e.name == "adaptive_moe"]
    assert found.value == "adaptive_moe.engines.sglang:register"


def test_unset_it_imports_nothing_and_wraps_nothing():
    out = run(
        "import sys\n"
        "from importlib.metadata import entry_points\n"
        "(ours,) = [e for e in entry_points(group='sglang.srt.plugins')"
        " if e.name == 'adaptive_moe']\n"
        "ours.load()()\n"
        "heavy = {'torch', 'numpy', 'sglang', 'aiter', 'adaptive_moe.settings'}\n"
        "assert not heavy & set(sys.modules)\n",
    )
    assert out == ""


def test_a_users_own_sglang_policy_wins_and_is_logged():
    out = run(
        "import logging\n"
        "logging.basicConfig()\n"
        "from sglang.srt.plugins import load_plugins\n"
        "load_plugins()\n"
        "import aiter.fused_moe\n"
        "assert not hasattr(aiter.fused_moe.moe_sorting, '__wrapped__')\n",
        **{VARIABLE: "auto", SGLANG_VARIABLE: "1"},
    )
    assert f"{SGLANG_VARIABLE}=1 is set and wins" in out


def test_calibration_comes_between_the_first_eager_run_and_the_first_capture(sglang, monkeypatch):
    from adaptive_moe.engines import process

    arrived = []
    assert sglang.runner._MOE_SORTING_DISPATCH_POLICY == 2

    def one_layer():
        arrived.append(int(forward(sglang.runner, LARGEST_CAPTURE).policy))

    capture_one(sglang.backends[0], one_layer, monkeypatch)
    (table,) = process.current().tables.values()
    # SGLang's own 2 where nothing is measured yet, and the table's policy from then on.
    assert arrived == [2, table.policy(LARGEST_CAPTURE)]
    assert table.policy(8) != 0  # which was made the slow one
    assert table.evidence.max_tokens == PREFILL
    for count in (1, 8, 100, PREFILL):
        assert int(forward(sglang.runner, count).policy) == table.policy(count)


def test_every_graph_backend_warms_up(sglang, monkeypatch):
    from adaptive_moe.engines import process

    for number, backend in enumerate(sglang.backends):
        dim = 128 + 64 * number
        before = len(process.current().tables)
        capture_one(backend, lambda dim=dim: forward(sglang.runner, 8, dim=dim), monkeypatch)
        assert len(process.current().tables) == before + 1, backend
        assert process.current().counts().failed == 0


def test_a_failure_of_ours_does_not_stop_the_capture(sglang, monkeypatch, caplog):
    from adaptive_moe.engines import process

    monkeypatch.setattr(process, "warm_up", lambda *arguments, agree: 1 / 0)
    runs = []
    capture_one(
        sglang.backends[0],
        lambda: runs.append(forward(sglang.runner, 8, dim=512)),
        monkeypatch,
    )
    assert [call.policy for call in runs] == [2, 2]
    assert "warm-up failed" in caplog.text


def test_plugins_loaded_twice_are_one_layer(sglang):
    from sglang.srt import plugins

    from adaptive_moe.engines import process

    before = [backend.capture_one for backend in sglang.backends]
    plugins._plugins_loaded = False
    plugins.load_plugins()
    assert [backend.capture_one for backend in sglang.backends] == before
    already = process.counts().total
    forward(sglang.runner, 8)
    assert process.counts().total == already + 1


def test_sglangs_own_small_sort_keeps_working_below_us(sglang, monkeypatch):
    """Its patch of AITER, applied by its own code as on a gfx950, with its kernel replaced."""
    import sglang.kernels.ops.moe.moe_sorting_small as small

    small_sorts = []

    def run_small_sort(topk_ids, *others):
        small_sorts.append(topk_ids.shape[0])

    monkeypatch.setattr(small, "is_gfx95_supported", lambda: True)
    monkeypatch.setattr(small, "_small_sort_supported", lambda ids, *a, **k: ids.shape[0] <= 4)
    monkeypatch.setattr(small, "_run_small_sort", run_small_sort)
    small.apply_aiter_small_moe_sort_patch.cache_clear()
    small.apply_aiter_small_moe_sort_patch()
    import aiter.sort

    from adaptive_moe.engines import process

    already, sorts = process.counts(), len(aiter.sort.calls)
    with contextlib.suppress(RuntimeError, IndexError):  # its outputs were never written
        forward(sglang.runner, 4)
    assert (small_sorts, len(aiter.sort.calls)) == ([4], sorts)
    assert forward(sglang.runner, 100).num_tokens == 100
    assert small_sorts == [4]
    assert process.counts().eager == already.eager + 2
    # What is measured is what serves: the unwrapped seam goes through SGLang's sort as well.
    layer = process.current().layer
    layer.seam(torch.zeros((2, 4), dtype=torch.int32), torch.zeros((2, 4)), 16, 64, torch.bfloat16)
    assert small_sorts == [4, 2]
