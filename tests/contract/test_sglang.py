"""The plugin in a real SGLang, whose code runs on the CPU; run.py runs it in its environment."""

import contextlib
import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from processes import STANDIN
from sglang_worker import LARGEST_CAPTURE, PREFILL, capture_one, forward, sglang_with_plugin

HERE = Path(__file__).parent
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
    from adaptive_moe.engines import process

    arrived = []
    assert sglang.runner._MOE_SORTING_DISPATCH_POLICY == 2

    def one_layer():
        arrived.append(int(forward(sglang.runner, LARGEST_CAPTURE).policy))

    capture_one(sglang.backends[0], one_layer)
    (table,) = process.current().tables.values()
    # SGLang's own 2 where nothing is measured yet, and the table's policy from then on.
    assert arrived == [2, table.policy(LARGEST_CAPTURE)]
    assert table.policy(8) != 0  # which was made the slow one
    assert table.evidence.max_tokens == PREFILL
    for count in (1, 8, 100, PREFILL):
        assert int(forward(sglang.runner, count).policy) == table.policy(count)


def test_tensor_parallel_ranks_agree_and_a_second_start_measures_nothing(tmp_path):
    folders = f"{tmp_path / 'a'} {tmp_path / 'b'}"
    log = run(f"sglang_worker.py {folders}", **{VARIABLE: "auto"})
    first, second = json.loads(re.search(r"^RESULT (.*)$", log, re.MULTILINE).group(1))
    assert [rank["group"] for rank in first] == [[0, 1]] * 2
    assert all(rank["measured"] > 0 for rank in first)
    assert first[0]["tables"] == first[1]["tables"] != []
    assert [rank["measured"] for rank in second] == [0, 0]
    assert [rank["tables"] for rank in second] == [rank["tables"] for rank in first]
    assert {rank["policy"] for rank in first + second} <= {1, 2}  # 0 was made the slow one


def test_every_graph_backend_warms_up(sglang):
    from adaptive_moe.engines import process

    for number, backend in enumerate(sglang.backends):
        dim = 128 + 64 * number
        before = len(process.current().tables)
        capture_one(backend, lambda dim=dim: forward(sglang.runner, 8, dim=dim))
        assert len(process.current().tables) == before + 1, backend
        assert process.current().counts().failed == 0


def test_a_failure_of_ours_does_not_stop_the_capture(sglang, monkeypatch, caplog):
    from adaptive_moe.engines import process

    monkeypatch.setattr(process, "warm_up", lambda *arguments, agree: 1 / 0)
    runs = []
    capture_one(sglang.backends[0], lambda: runs.append(forward(sglang.runner, 8, dim=512)))
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
