"""The plugins and the process-wide hook, without an engine: small packages stand in for vLLM and
SGLang. tests/contract/ has the real ones."""

import importlib
import logging
import multiprocessing
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adaptive_moe.cli.doctor import diagnose
from adaptive_moe.engines import on_import, process, sglang, vllm
from adaptive_moe.engines.on_import import when_imported
from adaptive_moe.engines.warm_up import warm_up
from adaptive_moe.kernels.aiter import find_aiter
from adaptive_moe.settings import SettingsError
from tests.aiter_standin.load import ROOT, forget_aiter, load_aiter
from tests.tables import make_table, measure_as

NAME = "VLLM_ROCM_AITER_MOE_DISPATCH_POLICY"
NEUTRAL = "ADAPTIVE_MOE_DISPATCH_POLICY"
CHECKOUT = Path(__file__).resolve().parents[2]

VLLM = {
    "vllm/__init__.py": "",
    "vllm/envs.py": f"""
        import os
        environment_variables = {{"{NAME}": lambda: int(os.getenv("{NAME}", "0"))}}
        def __getattr__(name):
            return environment_variables[name]()
    """,
    "vllm/kernels.py": """
        warmed = []
        def kernel_warmup(worker, *, process_local_only=False):
            warmed.append((worker, process_local_only))
            return "theirs"
    """,
    "vllm/gpu_worker.py": "from vllm.kernels import kernel_warmup",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write files of throw-away packages, and make them importable while the test runs."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        importlib.invalidate_caches()

    yield write
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No variable set, no AITER imported, no hook and nothing waited for left behind."""
    monkeypatch.setattr(on_import._finder, "waiting", {})
    for name in (NAME, NEUTRAL, sglang.SGLANG_VARIABLE, "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(vllm, "KERNEL_WARMUP", "vllm.kernels")
    monkeypatch.setattr(process, "_hook", None)
    forget_aiter()
    ours = logging.getLogger("adaptive_moe")
    parent = ours.parent
    yield
    process.uninstall()
    forget_aiter()
    ours.parent = parent


def sort(aiter, num_tokens=8, dim=64, policy=0):
    ids = torch.arange(4, dtype=torch.int32).repeat(num_tokens, 1)
    weights = torch.ones((num_tokens, 4))
    aiter.moe_sorting(ids, weights, 16, dim, torch.bfloat16, 32, None, None, policy)
    return sys.modules["aiter.sort"].calls[-1].policy


# Plain use


def test_plain_use_from_install_to_uninstall():
    """install() before AITER is imported, a first forward, warm_up(), and off again."""
    original = load_aiter().moe_sorting.__code__
    forget_aiter()
    assert process.install()
    aiter = load_aiter()
    assert sort(aiter) == 0
    warm_up(process.current(), 64, measure=measure_as({1: 2, 64: 2}))
    assert sort(aiter) == 2
    assert (process.counts().eager, process.counts().unknown) == (1, 1)
    process.uninstall()
    assert aiter.moe_sorting.__code__ == original
    assert sort(aiter) == 0
    process.install()
    assert sort(aiter) == 2  # tables are kept


def test_install_after_aiter_was_imported_wraps_at_once():
    aiter = load_aiter()
    process.install()
    process.install()
    sort(aiter)
    assert process.counts().total == 1


def test_uninstall_before_aiter_is_imported_keeps_it_unwrapped():
    process.install()
    process.uninstall()
    assert not hasattr(load_aiter().moe_sorting, "__wrapped__")


def test_the_environment_decides_between_measuring_and_a_fixed_policy(monkeypatch):
    monkeypatch.setenv(NEUTRAL, "1")
    aiter = load_aiter()
    process.install()
    assert sort(aiter, policy=2) == 1
    monkeypatch.setenv(NEUTRAL, "auto")
    process.install()  # with other settings: the old layer goes
    assert sort(aiter) == 0
    assert process.counts().total == process.counts().unknown == 1


def test_doctor_shows_what_happened_to_the_calls_of_its_process(monkeypatch):
    def calls():
        return {found.topic: found.text for found in diagnose({})}["calls"]

    assert calls().startswith("none sorted in this process")
    aiter = load_aiter()
    process.install()
    sort(aiter)
    warm_up(process.current(), 64, measure=measure_as({1: 2, 64: 2}))
    sort(aiter)
    sort(aiter)
    assert calls() == "2 eager, 1 unknown"


def test_a_bad_variable_is_an_error_for_who_calls_install(monkeypatch):
    monkeypatch.setenv(NEUTRAL, "3x")
    with pytest.raises(SettingsError, match="3x"):
        process.install()


def test_warm_up_without_install_does_nothing():
    assert process.warm_up(64).tables == {}
    assert process.counts().total == 0


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"aiter/__init__.py": ""}, "PyPI's unrelated package"),
        (
            {"aiter/__init__.py": "", "aiter/fused_moe.py": "def moe_sorting(topk_ids): ..."},
            "takes no dispatch_policy",
        ),
        (
            {
                "aiter/__init__.py": "raise RuntimeError('imported')",
                "aiter/fused_moe.py": "def moe_sorting(dispatch_policy): ...",
            },
            None,
        ),
    ],
)
def test_pypis_and_old_aiters_are_told_from_ours(package, monkeypatch, files, says):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(ROOT)])
    package(files)
    problem = find_aiter().problem
    assert (problem is None) if says is None else (says in problem and "ROCm/aiter" in problem)


def test_a_missing_aiter_is_said_and_changes_nothing(monkeypatch, caplog):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(ROOT)])
    assert process.install() is False
    assert "AITER is not installed" in caplog.text


# when_imported


def test_actions_run_after_the_import_once_and_not_before(package):
    package({"waited_for.py": "value = 1"})
    seen = []
    when_imported("waited_for", lambda module: seen.append(module.value))
    assert seen == []
    module = importlib.import_module("waited_for")
    assert seen == [1]
    assert module.__loader__.get_source("waited_for") == "value = 1"
    when_imported("waited_for", lambda module: seen.append("at once"))
    assert seen == [1, "at once"]
    importlib.reload(module)
    assert seen == [1, "at once"]


def test_a_failing_action_does_not_reach_the_importer(package, caplog):
    package({"waited_for.py": "value = 1"})
    when_imported("waited_for", lambda module: 1 / 0)
    assert importlib.import_module("waited_for").value == 1
    assert "ZeroDivisionError" in caplog.text


def test_an_import_that_fails_is_waited_for_again(package, tmp_path):
    package({"waited_for.py": "raise ImportError('not yet')"})
    seen = []
    when_imported("waited_for", seen.append)
    with pytest.raises(ImportError, match="not yet"):
        importlib.import_module("waited_for")
    assert seen == []
    (tmp_path / "waited_for.py").write_text("value = 12345")
    assert importlib.import_module("waited_for").value == 12345
    assert len(seen) == 1


def test_a_module_that_does_not_exist_still_does_not(package):
    when_imported("no_such_module_here", print)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module_here")


# vLLM


@pytest.mark.parametrize("plugin", ["vllm", "sglang"])
def test_a_plugin_that_is_not_asked_imports_nothing(plugin):
    code = (
        "import sys\n"
        f"from adaptive_moe.engines.{plugin} import register\n"
        "before = set(sys.modules)\n"
        "register()\n"
        "assert set(sys.modules) == before, set(sys.modules) - before\n"
        f"assert not {{'torch', 'numpy', 'aiter', '{plugin}'}} & before\n"
    )
    environ = {k: v for k, v in os.environ.items() if "DISPATCH_POLICY" not in k}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CHECKOUT, env=environ)


def start_vllm(package, monkeypatch, value="auto"):
    package(VLLM)
    load_aiter()
    forget_aiter()
    monkeypatch.setenv(NAME, value)
    vllm.register()
    return importlib.import_module("vllm.envs")


@pytest.mark.parametrize(("value", "read"), [("auto", 0), ("AUTO", 0), ("2", 2)])
def test_vllm_reads_the_word(package, monkeypatch, value, read):
    assert getattr(start_vllm(package, monkeypatch, value), NAME) == read


def test_the_neutral_variable_is_read_by_vllm_too(package, monkeypatch):
    package(VLLM)
    monkeypatch.setenv(NEUTRAL, "2")
    vllm.register()
    assert getattr(importlib.import_module("vllm.envs"), NAME) == 2


def test_a_bad_value_is_logged_and_raised_where_vllm_reads_it(package, monkeypatch, caplog):
    envs = start_vllm(package, monkeypatch, "x")
    assert f"{NAME}='x' is not accepted" in caplog.text
    with pytest.raises(ValueError, match="auto, or an integer"):
        getattr(envs, NAME)
    assert not hasattr(load_aiter().moe_sorting, "__wrapped__")


@pytest.mark.parametrize("is_first_process", [True, False])
def test_without_aiter_vllm_reads_the_word_and_one_process_says_so(
    package, monkeypatch, caplog, is_first_process
):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(ROOT)])
    parent = None if is_first_process else "vLLM's front end"
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: parent)
    package(VLLM)
    monkeypatch.setenv(NAME, "auto")
    vllm.register()
    assert getattr(importlib.import_module("vllm.envs"), NAME) == 0
    kernels = importlib.import_module("vllm.kernels")
    assert not hasattr(kernels.kernel_warmup, "__wrapped__")
    assert process.current() is None
    said = "the dispatch policy has no effect here: AITER is not installed"
    assert (said in caplog.text) is is_first_process


@pytest.mark.parametrize("worker_imported_first", [True, False])
def test_kernel_warmup_warms_up_wherever_it_was_imported(
    package, monkeypatch, worker_imported_first
):
    package(VLLM)
    if worker_imported_first:
        importlib.import_module("vllm.gpu_worker")
    start_vllm(package, monkeypatch)
    vllm.register()  # plugins may be loaded twice
    gpu_worker = importlib.import_module("vllm.gpu_worker")
    kernels = importlib.import_module("vllm.kernels")
    assert gpu_worker.kernel_warmup is kernels.kernel_warmup
    assert not hasattr(kernels.kernel_warmup.__wrapped__, "__wrapped__")

    aiter = load_aiter()
    sort(aiter)
    asked = []
    monkeypatch.setattr(process, "warm_up", lambda **options: asked.append(options))
    worker = SimpleNamespace(
        vllm_config=SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_batched_tokens=8192),
            compilation_config=SimpleNamespace(cudagraph_capture_sizes=[1, 2, 4]),
        )
    )
    assert gpu_worker.kernel_warmup(worker) == "theirs"
    assert gpu_worker.kernel_warmup(worker, process_local_only=True) == "theirs"
    assert kernels.warmed == [(worker, False), (worker, True)]
    # Together with the other ranks, so not where only this one is told to.
    assert asked == [{"max_tokens": 8192, "capture_sizes": [1, 2, 4], "agree": True}]


def test_a_rank_that_sorted_nothing_comes_to_the_exchange_all_the_same(
    package, monkeypatch, caplog
):
    start_vllm(package, monkeypatch)
    load_aiter()
    came = []
    monkeypatch.setattr(process, "open_channel", came.append)
    worker = SimpleNamespace(
        vllm_config=SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_batched_tokens=8192),
            compilation_config=SimpleNamespace(cudagraph_capture_sizes=None),
        )
    )
    importlib.import_module("vllm.kernels").kernel_warmup(worker)
    assert came == [None]  # all ranks
    assert "auto has nothing to choose" in caplog.text


def test_a_warm_up_that_fails_is_logged_and_vllm_goes_on(package, monkeypatch, caplog):
    start_vllm(package, monkeypatch)
    kernels = importlib.import_module("vllm.kernels")
    sort(load_aiter())
    assert kernels.kernel_warmup(SimpleNamespace()) == "theirs"  # a worker without a config
    assert "warm-up failed" in caplog.text


def test_vllms_own_failure_in_kernel_warmup_is_vllms(package, monkeypatch):
    package({**VLLM, "vllm/kernels.py": "def kernel_warmup(worker):\n    raise KeyError('theirs')"})
    monkeypatch.setenv(NAME, "auto")
    load_aiter()
    vllm.register()
    kernels = importlib.import_module("vllm.kernels")
    with pytest.raises(KeyError, match="theirs"):
        kernels.kernel_warmup(None)


def test_registration_never_raises(monkeypatch, caplog):
    monkeypatch.setenv(NAME, "auto")
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it fails
    vllm.register()
    assert "vLLM goes on without it" in caplog.text


def test_a_vllm_without_kernel_warmup_is_told(package, monkeypatch, caplog):
    package({**VLLM, "vllm/kernels.py": ""})
    monkeypatch.setenv(NAME, "auto")
    load_aiter()
    vllm.register()
    importlib.import_module("vllm.kernels")
    assert "has no kernel_warmup" in caplog.text


def test_our_lines_take_vllms_handlers_and_level_set_up_later(package, monkeypatch, caplog):
    start_vllm(package, monkeypatch)
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    theirs = logging.getLogger("vllm")
    monkeypatch.setattr(theirs, "handlers", [handler])
    monkeypatch.setattr(theirs, "propagate", False)
    monkeypatch.setattr(theirs, "level", logging.INFO)
    theirs.manager._clear_cache()
    logging.getLogger("adaptive_moe").info("measured")
    logging.getLogger("adaptive_moe").debug("samples")
    assert lines == ["measured"]


# SGLang

SGLANG = {
    "sglang/__init__.py": "",
    "sglang/srt/__init__.py": "",
    "sglang/srt/environ.py": f"""
        class Field:
            def get(self):
                return 2
        class Envs:
            {sglang.SGLANG_VARIABLE} = Field()
        envs = Envs()
    """,
    "sglang/srt/runtime_context.py": """
        from types import SimpleNamespace
        config = SimpleNamespace(
            decode=SimpleNamespace(bs=[1, 8]),
            prefill=SimpleNamespace(bs=[256], backend="disabled"),
        )
        def get_exec():
            return SimpleNamespace(graph=SimpleNamespace(cuda_graph_config=config))
        def max_prefill_buffer_tokens():
            return 2048
    """,
    "sglang/srt/model_executor/__init__.py": "",
    "sglang/srt/model_executor/runner_backend/__init__.py": "",
    "sglang/srt/model_executor/runner_backend/full_cuda_graph_backend.py": """
        class FullCudaGraphBackend:
            def capture_one(self, shape_key, forward_fn, capture_inputs=None,
                            post_warmup_hook=None):
                for _ in range(2):
                    forward_fn()
                    if post_warmup_hook is not None:
                        post_warmup_hook()
                return "captured", forward_fn()
    """,
}


def start_sglang(package, monkeypatch):
    package(SGLANG)
    monkeypatch.setattr(sglang, "_seen_before", sglang._seen_before)  # put back afterwards
    monkeypatch.setenv(NEUTRAL, "auto")
    load_aiter()
    sglang.register()
    sglang.register()
    module = importlib.import_module(f"{sglang._BACKENDS}.full_cuda_graph_backend")
    backend = module.FullCudaGraphBackend
    assert not hasattr(backend.capture_one.__wrapped__, "__wrapped__")  # one layer, not two
    return backend()


def test_sglang_calibrates_after_the_first_eager_run_and_only_for_new_shapes(package, monkeypatch):
    backend = start_sglang(package, monkeypatch)
    backend._cuda_graph_runner = SimpleNamespace(captured_req_width=3)
    aiter, asked, hooked = sys.modules["aiter.fused_moe"], [], []

    def warm_up_by_hand(*arguments, agree):
        asked.append((*arguments, agree))
        warm_up(process.current(), *arguments, measure=measure_as({1: 1, 64: 1}))

    monkeypatch.setattr(process, "warm_up", warm_up_by_hand)
    policies = []
    result = backend.capture_one(
        "key",
        lambda: policies.append(sort(aiter, policy=2)),
        post_warmup_hook=lambda: hooked.append(len(policies)),
    )
    assert result == ("captured", None)
    assert policies == [2, 1, 1]  # SGLang's own until measured
    assert hooked == [1, 2]
    # Requests times tokens a request; prefill is not captured. No other ranks.
    assert asked == [(2048, (3, 24), False)]
    backend.capture_one("key", lambda: sort(aiter, policy=2))
    assert len(asked) == 1
    backend.capture_one("key", lambda: sort(aiter, dim=128, policy=2))
    assert len(asked) == 2


def test_sglangs_ranks_come_to_the_first_capture_whatever_they_saw(package, monkeypatch):
    """Over the group that SGLang's own barrier has just gathered, at the same captures."""
    backend = start_sglang(package, monkeypatch)
    backend._tp_group = SimpleNamespace(cpu_group="ranks of this stage")
    came = []
    monkeypatch.setattr(process, "open_channel", came.append)
    aiter = sys.modules["aiter.fused_moe"]
    backend.capture_one("a dense layer", lambda: None)
    assert came == ["ranks of this stage"]
    backend.capture_one("a dense layer", lambda: None)
    assert len(came) == 1
    backend.capture_one("a new shape", lambda: sort(aiter, policy=2))
    assert len(came) == 2


def test_a_users_sglang_policy_wins(package, monkeypatch, caplog):
    package(SGLANG)
    monkeypatch.setenv(NEUTRAL, "auto")
    monkeypatch.setenv(sglang.SGLANG_VARIABLE, "1")
    sglang.register()
    assert f"{sglang.SGLANG_VARIABLE}=1 is set and wins" in caplog.text
    assert process.current() is None


def test_a_failing_warm_up_does_not_stop_sglangs_capture(package, monkeypatch, caplog):
    backend = start_sglang(package, monkeypatch)
    monkeypatch.setattr(process, "warm_up", lambda *arguments, agree: 1 / 0)
    aiter = sys.modules["aiter.fused_moe"]
    assert backend.capture_one("key", lambda: sort(aiter, policy=2)) == ("captured", 2)
    assert "warm-up failed" in caplog.text


def test_an_sglang_without_that_backend_is_told(package, monkeypatch, caplog):
    full = "sglang/srt/model_executor/runner_backend/full_cuda_graph_backend.py"
    package({**SGLANG, full: "class SomethingElse: pass"})
    monkeypatch.setenv(NEUTRAL, "auto")
    load_aiter()
    sglang.register()
    importlib.import_module(f"{sglang._BACKENDS}.full_cuda_graph_backend")
    assert "has no FullCudaGraphBackend.capture_one" in caplog.text


def test_the_graph_table_is_for_what_sglang_captures():
    table = make_table({1: 0, 64: 0}, graph={3: 2, 24: 2})
    assert (table.policy(24, captured=True), table.policy(24)) == (2, 0)
