"""The plugin in a real SGLang, whose code runs on the CPU; run.py runs it in its environment."""

import contextlib
import functools
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
from competing import NO_SORT, SETTINGS, Engine, assert_refused, assert_start
from processes import STANDIN
from sglang_worker import (
    LARGEST_CAPTURE,
    PREFILL,
    capture_one,
    forward,
    run_layer,
    sglang_with_plugin,
)

HERE = Path(__file__).parent
VERSION = tuple(map(int, os.environ["CONTRACT_VERSION"].split(".")))
# Before it SGLang passes AITER no policy and knows no variable for one.
PASSES_A_POLICY = VERSION >= (0, 5, 22)
BASELINE = 2 if PASSES_A_POLICY else 0
HAS_A_SMALL_SORT = VERSION >= (0, 5, 21)
VARIABLE = "ADAPTIVE_MOE_DISPATCH_POLICY"
SGLANG_VARIABLE = "SGLANG_AITER_MOE_SORTING_DISPATCH_POLICY"


@pytest.fixture(scope="module")
def sglang():
    os.environ[VARIABLE] = "auto"
    with sglang_with_plugin() as found:
        yield found


def run(code, **environ):
    environ = {**os.environ, **environ}
    environ["PYTHONPATH"] = os.pathsep.join([environ["PYTHONPATH"], str(STANDIN)])
    done = subprocess.run(
        [sys.executable, *(["-c", code] if "\n" in code else code.split())],
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


@pytest.mark.skipif(not PASSES_A_POLICY, reason="this SGLang knows no such variable")
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


def test_calibration_comes_between_the_first_eager_run_and_the_first_capture(sglang):
    arrived = []
    measured = aiter_calls()

    def one_layer():
        arrived.append(forward(sglang.runner, LARGEST_CAPTURE).policy)

    capture_one(sglang.backends[0], one_layer)
    # What runs without us where nothing is measured yet, and what is measured from then on: 1,
    # which is the only one that was not made slow.
    assert arrived == [BASELINE, 1]
    assert max(call.num_tokens for call in measured()) == PREFILL
    for count in (1, 8, 100, PREFILL):
        assert forward(sglang.runner, count).policy == 1


def test_the_baseline_stays_where_it_is_fastest(sglang, monkeypatch):
    others = ",".join(str(policy) for policy in (0, 1, 2) if policy != BASELINE)
    monkeypatch.setenv("AITER_STANDIN_SLOW", others)
    measured = aiter_calls()
    capture_one(sglang.backends[0], lambda: forward(sglang.runner, 8, dim=320))
    assert {call.policy for call in measured()} >= {0, 1, 2}
    for count in (1, 8, 100, PREFILL):
        assert forward(sglang.runner, count, dim=320).policy == BASELINE


def test_what_was_never_measured_runs_the_baseline(sglang):
    for count in (1, 8, 100, PREFILL):
        assert forward(sglang.runner, count, dim=384).policy == BASELINE


def test_without_graphs_sglang_shows_its_shapes_and_all_is_calibrated(sglang, monkeypatch):
    """ModelRunner.init_cuda_graphs itself, with nothing to capture; the dummy batch is SGLang's own
    to make, so only how it is asked for is held against its code."""
    import sglang.srt.model_executor.model_runner as module
    from sglang.srt.model_executor.runner.base_runner import BaseRunner

    asked = []

    class Eager:
        attn_tp_size, _eager_max_bs = 1, 8
        model_runner = SimpleNamespace(
            spec_algorithm=SimpleNamespace(is_speculative=lambda: False), canary_manager=None
        )

        def _alloc_dummy_decode_buffers(self, *args, **kwargs):
            inspect.signature(BaseRunner._alloc_dummy_decode_buffers).bind(self, *args, **kwargs)
            return "buffers"

        def _dummy_run(self, *args, **kwargs):
            inspect.signature(BaseRunner._dummy_run).bind(self, *args, **kwargs)
            asked.append(kwargs["batch_size"])
            forward(sglang.runner, kwargs["batch_size"], dim=448)

    nothing = SimpleNamespace(runner=None)
    captured = SimpleNamespace(
        eager_runner=Eager(), prefill=nothing, decode=nothing, memory_usage={}, time_usage={}
    )
    monkeypatch.setattr(module, "capture_cuda_graphs", lambda **options: captured)
    monkeypatch.setattr(module, "prebuild_deepep_v2_buffer", lambda **options: None, raising=False)
    runner = module.ModelRunner.__new__(module.ModelRunner)
    runner.is_draft_worker, runner.model, runner.tp_group = False, None, None
    runner.init_cuda_graphs()
    assert asked == [8]
    assert forward(sglang.runner, 8, dim=448).policy == 1


def aiter_calls():
    """What arrives at the sort from now on, when asked."""
    import aiter.sort

    before = len(aiter.sort.calls)
    return lambda: list(aiter.sort.calls)[before:]


def test_tensor_parallel_ranks_share_tables_and_a_second_start_measures_nothing(tmp_path):
    folders = f"{tmp_path / 'a'} {tmp_path / 'b'}"
    log = run(
        f"sglang_worker.py {folders}",
        **{VARIABLE: "auto", "ADAPTIVE_MOE_BUDGET_S": "30", "ADAPTIVE_MOE_MARGIN": "0.3"},
    )
    first, second = json.loads(re.search(r"^RESULT (.*)$", log, re.MULTILINE).group(1))
    assert [rank["group"] for rank in first] == [[0, 1]] * 2
    assert first[0]["tables"] == first[1]["tables"] != []
    # Tables are told apart by what was measured: another measurement is another table.
    assert [rank["tables"] for rank in second] == [rank["tables"] for rank in first]
    assert [rank["policy"] for rank in first + second] == [1] * 4  # 0 and 2 were made slow


def test_every_graph_backend_warms_up(sglang):
    from adaptive_moe.engines import process

    for number, backend in enumerate(sglang.backends):
        dim = 128 + 64 * number
        capture_one(backend, lambda dim=dim: forward(sglang.runner, 8, dim=dim))
        assert forward(sglang.runner, 8, dim=dim).policy == 1, backend
        assert process.counts().failed == 0


def test_a_failure_of_ours_does_not_stop_the_capture(sglang, monkeypatch, caplog):
    from adaptive_moe.engines import process

    monkeypatch.setattr(process, "warm_up_for", lambda *arguments, **options: 1 / 0)
    runs = []
    capture_one(sglang.backends[0], lambda: runs.append(forward(sglang.runner, 8, dim=512)))
    assert [call.policy for call in runs] == [BASELINE] * 2
    assert "warm-up failed" in caplog.text


def test_plugins_loaded_twice_are_one_layer(sglang):
    from adaptive_moe.engines import process

    before = [backend.capture_one for backend in sglang.backends]
    load_plugins()
    assert [backend.capture_one for backend in sglang.backends] == before
    already = process.counts().total
    forward(sglang.runner, 8)
    assert process.counts().total == already + 1


def load_plugins():
    from sglang.srt import plugins

    plugins._plugins_loaded = False
    plugins.load_plugins()


@pytest.mark.parametrize("sorts", SETTINGS)
def test_the_sorts_that_were_asked_for_compete_serve_and_are_named(sglang, sorts, tmp_path):
    layer = functools.partial(run_layer, sglang.runner)  # the shape of competing.py

    def warm_up():
        capture_one(sglang.backends[0], lambda: layer(LARGEST_CAPTURE))

    engine = Engine(f"policy {BASELINE}", False, load_plugins, warm_up, layer)
    assert_start(engine, sorts, tmp_path / "cache")


def test_a_sort_that_nobody_has_is_refused_in_one_line_and_sglang_starts(
    sglang, monkeypatch, caplog
):
    monkeypatch.setenv("ADAPTIVE_MOE_SORTS", NO_SORT)
    assert_refused(load_plugins, caplog)
    assert forward(sglang.runner, 8, dim=576).policy == BASELINE


@pytest.fixture
def small_sort(monkeypatch):
    """SGLang's patch of AITER, applied by its own code as on a gfx950, with its kernel replaced by
    one that notes its call: how many tokens, and whether it was to quantise them as well."""
    import aiter.fused_moe
    import sglang.kernels.ops.moe.moe_sorting_small as small

    seen = []

    def run_small_sort(topk_ids, *others):
        seen.append((topk_ids.shape[0], small._pending_quant_input.get() is not None))

    patched = ("fused_moe", "_moe_sorting_impl", "fused_dynamic_mxfp8_quant_moe_sort")
    before = {name: getattr(aiter.fused_moe, name) for name in patched}
    monkeypatch.setattr(small, "is_gfx95_supported", lambda: True)
    monkeypatch.setattr(small, "_small_sort_supported", lambda ids, *a, **k: ids.shape[0] <= 4)
    monkeypatch.setattr(small, "_run_small_sort", run_small_sort)
    small.apply_aiter_small_moe_sort_patch.cache_clear()
    small.apply_aiter_small_moe_sort_patch()
    yield seen
    for name, original in before.items():
        setattr(aiter.fused_moe, name, original)


@pytest.mark.skipif(not HAS_A_SMALL_SORT, reason="this SGLang has no such sort")
def test_sglangs_own_small_sort_keeps_working_below_us(sglang, small_sort):
    from adaptive_moe.engines import process

    already, sorts = process.counts(), aiter_calls()
    with contextlib.suppress(RuntimeError, IndexError):  # its outputs were never written
        forward(sglang.runner, 4)
    assert (small_sort, sorts()) == ([(4, False)], [])
    assert forward(sglang.runner, 100).num_tokens == 100
    assert len(small_sort) == 1
    assert process.counts().total == already.total + 2


@pytest.mark.skipif(not HAS_A_SMALL_SORT, reason="this SGLang has no such sort")
def test_what_is_measured_is_sglangs_small_sort_as_it_serves(sglang, small_sort):
    """It quantises as well in layers of MXFP4 and MXFP8, as SGLang's own context says."""

    def one_layer():
        with contextlib.suppress(RuntimeError, IndexError):  # its outputs were never written
            forward(sglang.runner, 4, dim=2048, mxfp8=True)

    capture_one(sglang.backends[0], lambda: None)  # what earlier tests left to be measured
    small_sort.clear()
    capture_one(sglang.backends[0], one_layer)
    serving, measured = small_sort[:1], small_sort[1:]
    assert serving == [(4, True)]
    assert len(measured) > 2  # besides SGLang's second run
    assert {emits for _, emits in measured} == {True}


def test_a_copied_cache_folder_is_what_the_next_start_finds(tmp_path):
    """Two ranks measure once; then both, and one with a copied cache folder, measure nothing."""
    here, there, copied = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    environ = {VARIABLE: "auto", "ADAPTIVE_MOE_BUDGET_S": "30", "ADAPTIVE_MOE_MARGIN": "0.3"}

    def starts(*folders):
        log = run(f"sglang_worker.py {' '.join(map(str, folders))}", **environ)
        return json.loads(re.search(r"^RESULT (.*)$", log, re.MULTILINE).group(1))

    first, again = starts(here, there)
    shutil.copytree(here, copied)
    for ranks in (again, *starts(copied, there)):
        assert [rank["tables"] for rank in ranks] == [rank["tables"] for rank in first]
