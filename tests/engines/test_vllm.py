"""The vLLM plugin on small packages that stand in for vLLM. tests/contract/ has the real one."""

import importlib
import logging
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from adaptive_moe.engines import process, vllm
from adaptive_moe.settings import Mode
from tests.aiter_standin.load import ROOT, forget_aiter, load_aiter
from tests.engines.plugging import NAME, NEUTRAL, sort

pytestmark = pytest.mark.usefixtures("fresh_process")

CHECKOUT = Path(__file__).resolve().parents[2]

VLLM = {
    "vllm/__init__.py": "",
    "vllm/envs.py": f"""
        import os
        environment_variables = {{
            "{NAME}": lambda: int(os.getenv("{NAME}", "0")),
            "VLLM_MOE_SKIP_PADDING": lambda: bool(int(os.getenv("VLLM_MOE_SKIP_PADDING", "1"))),
        }}
        def __getattr__(name):
            return environment_variables[name]()
    """,
    "vllm/kernels.py": """
        warmed = []
        def kernel_warmup(worker, *others, process_local_only=False):
            warmed.append((worker, *others, process_local_only))
            return "theirs"
    """,
    "vllm/gpu_worker.py": """
        from vllm.kernels import kernel_warmup
        class Worker:
            def compile_or_warm_up_model(self, *args, **kwargs):
                kernel_warmup(self)
                return self.capture(*args, **kwargs)
    """,
}


def worker(max_tokens=8192, sizes=(1, 2, 4), **parallel):
    """What of a worker's configuration is read."""
    facts = {
        "data_parallel_size": 1,
        "enable_expert_parallel": False,
        "all2all_backend": "allgather_reducescatter",
        **parallel,
    }
    return SimpleNamespace(
        vllm_config=SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_batched_tokens=max_tokens),
            compilation_config=SimpleNamespace(cudagraph_capture_sizes=sizes),
            parallel_config=SimpleNamespace(**facts),
        )
    )


def asked(monkeypatch):
    """What warm_up_for() is given, instead of doing it."""
    found = []

    def by_hand(batches, agree=False):
        found.append({**vars(batches), "agree": agree})

    monkeypatch.setattr(process, "warm_up_for", by_hand)
    return found


@pytest.mark.processes
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


def start_vllm(package, monkeypatch, value="auto", name=NAME):
    package(VLLM)
    load_aiter()
    forget_aiter()
    monkeypatch.setenv(name, value)
    vllm.register()
    return importlib.import_module("vllm.envs")


@pytest.mark.parametrize(("value", "read"), [("auto", 0), ("AUTO", 0), ("2", 2)])
def test_vllm_reads_the_word(package, monkeypatch, value, read):
    assert getattr(start_vllm(package, monkeypatch, value), NAME) == read


def test_the_neutral_variable_is_none_of_vllms_business(package, monkeypatch):
    """It reaches the calls through the hook, whatever vLLM passes."""
    envs = start_vllm(package, monkeypatch, "auto", name=NEUTRAL)
    assert getattr(envs, NAME) == 0
    monkeypatch.setenv(NEUTRAL, "1")
    vllm.register()
    assert sort(load_aiter()) == 1


def test_vllms_parser_is_in_place_once_and_reads_what_is_set_later(package, monkeypatch):
    envs = start_vllm(package, monkeypatch)
    taught = envs.environment_variables[NAME]
    vllm.register()  # plugins may be loaded twice
    assert envs.environment_variables[NAME] is taught
    monkeypatch.setenv(NAME, "2")
    assert getattr(envs, NAME) == 2
    monkeypatch.setenv(NAME, "x")
    with pytest.raises(ValueError, match="invalid literal for int"):
        getattr(envs, NAME)
    monkeypatch.delenv(NAME)
    assert getattr(envs, NAME) == 0


def test_a_vllm_that_does_not_know_the_variable_reads_the_word(package, monkeypatch):
    package({**VLLM, "vllm/envs.py": "environment_variables = {}"})
    monkeypatch.setenv(NAME, "auto")
    vllm.register()
    assert importlib.import_module("vllm.envs").environment_variables[NAME]() == 0


def test_a_vllm_without_a_table_of_parsers_is_told_and_served(package, monkeypatch, caplog):
    package({**VLLM, "vllm/envs.py": ""})
    monkeypatch.setenv(NAME, "auto")
    aiter = load_aiter()
    vllm.register()
    (line,) = caplog.records
    assert line.getMessage() == (
        "this vLLM has no vllm.envs.environment_variables, so it cannot be taught the word auto: "
        f"set ADAPTIVE_MOE_DISPATCH_POLICY=auto instead of {NAME}"
    )
    assert process.current().wrapped.module is aiter
    found = asked(monkeypatch)
    importlib.import_module("vllm.kernels").kernel_warmup(worker())
    assert found[0]["padding_rows"] is False


@pytest.mark.parametrize("value", ["x", "2.0", "3x"])
def test_a_bad_value_of_vllms_own_raises_as_vllms_int_would_and_is_said(
    package, monkeypatch, caplog, value
):
    envs = start_vllm(package, monkeypatch, value)
    with pytest.raises(ValueError, match=f"invalid literal for int.*{value}"):
        getattr(envs, NAME)
    assert f"{NAME}={value!r} is not accepted" in caplog.text
    assert not hasattr(load_aiter().moe_sorting, "__wrapped__")


@pytest.mark.parametrize(("value", "read"), [(" 2 ", 2), ("300", 300), ("-1", -1), ("1_0", 10)])
def test_what_vllm_accepts_it_reads_as_without_us(package, monkeypatch, value, read):
    assert getattr(start_vllm(package, monkeypatch, value), NAME) == read


@pytest.mark.parametrize("value", ["off", "None", "FALSE", ""])
def test_off_is_a_word_that_vllm_reads(package, monkeypatch, value):
    monkeypatch.setenv(NEUTRAL, "off")  # so that the plugin is asked at all where NAME is empty
    envs = start_vllm(package, monkeypatch, value)
    assert getattr(envs, NAME) == 0
    assert not hasattr(load_aiter().moe_sorting, "__wrapped__")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (NEUTRAL, "3x"),
        ("ADAPTIVE_MOE_BUDGET_S", "fast"),
        ("ADAPTIVE_MOE_SORTS", "?"),
        ("ADAPTIVE_MOE_BUGET_S", "1"),
    ],
)
@pytest.mark.parametrize("asks", [None, "auto", "2"])
def test_nothing_of_ours_makes_vllm_raise(package, monkeypatch, caplog, name, value, asks):
    package(VLLM)
    load_aiter()
    forget_aiter()
    monkeypatch.setenv(name, value)
    if asks is not None:
        monkeypatch.setenv(NAME, asks)
    vllm.register()
    envs = importlib.import_module("vllm.envs")
    assert getattr(envs, NAME) == (2 if asks == "2" else 0)
    (line,) = [r.message for r in caplog.records if name in r.message]
    assert "is not" in line


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
    said = "the dispatch policy has no effect here: AITER is not installed (no module named aiter)"
    assert [line.getMessage() for line in caplog.records] == ([said] if is_first_process else [])


def test_what_is_not_accepted_is_said_by_the_first_process_only(package, monkeypatch, caplog):
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: "vLLM's front end")
    monkeypatch.setenv("ADAPTIVE_MOE_BUDGET_S", "fast")
    start_vllm(package, monkeypatch)
    assert process.current().settings.mode is Mode.AUTO
    assert caplog.records == []


@pytest.mark.parametrize("worker_imported_first", [True, False])
def test_kernel_warmup_warms_up_wherever_it_was_imported(
    package, monkeypatch, worker_imported_first
):
    package(VLLM)
    if worker_imported_first:
        importlib.import_module("vllm.gpu_worker")
    start_vllm(package, monkeypatch)
    gpu_worker = importlib.import_module("vllm.gpu_worker")
    kernels = importlib.import_module("vllm.kernels")
    wrapped = kernels.kernel_warmup
    vllm.register()  # plugins may be loaded twice
    assert gpu_worker.kernel_warmup is kernels.kernel_warmup is wrapped
    assert not hasattr(kernels.kernel_warmup.__wrapped__, "__wrapped__")

    aiter = load_aiter()
    sort(aiter)
    found, one = asked(monkeypatch), worker()
    assert gpu_worker.kernel_warmup(one, "more") == "theirs"
    assert gpu_worker.kernel_warmup(one, process_local_only=True) == "theirs"
    assert kernels.warmed == [(one, "more", False), (one, True)]
    (options,) = found
    assert (options["max_tokens"], options["captured"]) == (8192, (1, 2, 4))
    assert options["owner"] is one


def test_only_vllms_modules_that_hold_kernel_warmup_get_ours(package, monkeypatch, caplog):
    package({**VLLM, "of_a_user.py": "from vllm.kernels import kernel_warmup"})
    of_a_user = importlib.import_module("of_a_user")
    worker_module = importlib.import_module("vllm.gpu_worker")
    theirs = importlib.import_module("vllm.kernels").kernel_warmup
    monkeypatch.setitem(sys.modules, "vllm.lazy", object())
    start_vllm(package, monkeypatch)
    assert of_a_user.kernel_warmup is theirs
    assert worker_module.kernel_warmup.__wrapped__ is theirs
    assert "kernel_warmup" not in vars(sys.modules["vllm"])
    assert caplog.records == []


@pytest.mark.parametrize(
    ("parallel", "pooled"),
    [
        ({}, 1),
        ({"data_parallel_size": 4}, 4),
        ({"data_parallel_size": 4, "enable_expert_parallel": True}, 4),
        (
            {"data_parallel_size": 4, "enable_expert_parallel": True, "all2all_backend": "naive"},
            4,
        ),
        (
            {
                "data_parallel_size": 4,
                "enable_expert_parallel": True,
                "all2all_backend": "mori_low_latency",
            },
            1,
        ),
        ({"data_parallel_size": 4, "all2all_backend": "mori_low_latency"}, 4),
    ],
)
def test_data_parallel_ranks_are_pooled_where_vllm_gathers_their_tokens(
    package, monkeypatch, parallel, pooled
):
    start_vllm(package, monkeypatch)
    found = asked(monkeypatch)
    importlib.import_module("vllm.kernels").kernel_warmup(worker(**parallel))
    assert found[0]["pooled"] == pooled


@pytest.mark.parametrize(("value", "padding"), [(None, True), ("0", False), ("1", True)])
def test_rows_of_padding_can_come_where_vllm_skips_them(package, monkeypatch, value, padding):
    if value is not None:
        monkeypatch.setenv("VLLM_MOE_SKIP_PADDING", value)
    start_vllm(package, monkeypatch)
    found = asked(monkeypatch)
    kernels = importlib.import_module("vllm.kernels")
    kernels.kernel_warmup(worker())
    assert found[0]["padding_rows"] is padding
    importlib.import_module("vllm.envs").environment_variables.pop("VLLM_MOE_SKIP_PADDING")
    kernels.kernel_warmup(worker())  # a vLLM that has no such variable
    assert found[1]["padding_rows"] is False


def test_the_int4_layers_own_chooser_is_watched_and_asked(package, monkeypatch):
    int4 = "vllm/int4.py"
    package({**VLLM, int4: "def try_get_optimal_config(num_experts, inter_dim): return {1: {}}"})
    monkeypatch.setattr(vllm, "INT4", "vllm.int4")
    start_vllm(package, monkeypatch)
    module = importlib.import_module("vllm.int4")
    found = asked(monkeypatch)
    module.try_get_optimal_config(16, 512)
    importlib.import_module("vllm.kernels").kernel_warmup(worker())
    (chooser,) = found[0]["choosers"]
    assert chooser.asked == {(16, 512): {1: {}}}


def test_the_key_names_the_engine_and_its_version(package, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.33.0")
    start_vllm(package, monkeypatch)
    load_aiter()
    assert process._engine == "vllm 0.33.0"
    assert process.current().settings.mode is Mode.AUTO


def test_a_process_that_sorted_nothing_says_so(package, monkeypatch, caplog):
    start_vllm(package, monkeypatch)
    load_aiter()
    importlib.import_module("vllm.kernels").kernel_warmup(worker(sizes=None))
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
    # Nor does it import it by name; and its worker is another.
    package({"vllm/gpu_worker.py": ""})
    importlib.import_module("vllm.gpu_worker")
    (line,) = caplog.records
    assert line.getMessage() == (
        "this vLLM has no kernel_warmup, so nothing will be calibrated and the baseline stays: use "
        "a vLLM from 0.22.1 to 0.33.0, or call adaptive_moe.warm_up() yourself"
    )


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
