"""The SGLang plugin on packages that stand in for SGLang. tests/contract/ has the real one."""

import importlib
import multiprocessing
import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest

from adaptive_moe.engines import process, sglang
from adaptive_moe.engines.warm_up import warm_up_hook
from tests.aiter_standin.load import ROOT, load_aiter
from tests.engines.plugging import NAME, NEUTRAL, sort
from tests.tables import measure_as

pytestmark = pytest.mark.usefixtures("fresh_process")

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
        prefill_tokens = 2048
        def max_prefill_buffer_tokens():
            return prefill_tokens
        parallel = SimpleNamespace(dp_size=4)
        def get_parallel():
            return parallel
    """,
    "sglang/srt/utils/__init__.py": "",
    "sglang/srt/utils/common.py": """
        gathers = False
        def require_mlp_tp_gather():
            return gathers
    """,
    "sglang/srt/model_executor/model_runner.py": """
        class ModelRunner:
            def init_cuda_graphs(self, *args, **kwargs):
                return self.capture(*args, **kwargs)
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
                self.asked = shape_key, capture_inputs
                return "captured", forward_fn()
    """,
}


OLD_ENVIRON = {"sglang/srt/environ.py": "class Envs: pass\nenvs = Envs()"}


def start_sglang(package, monkeypatch, files=SGLANG):
    package(files)
    monkeypatch.setenv(NEUTRAL, "auto")
    load_aiter()
    sglang.register()
    sglang.register()
    module = importlib.import_module(f"{sglang._BACKENDS}.full_cuda_graph_backend")
    backend = module.FullCudaGraphBackend
    assert not hasattr(backend.capture_one.__wrapped__, "__wrapped__")  # one layer, not two
    return backend


def asked(monkeypatch):
    """What warm_up_for() is given; it does it with a made-up measurement."""
    found = []

    def by_hand(batches, agree=False):
        found.append({**vars(batches), "agree": agree})
        warm_up_hook(process.current(), batches, measure=measure_as({1: 2, 64: 2}))

    monkeypatch.setattr(process, "warm_up_for", by_hand)
    return found


def test_sglang_calibrates_after_the_first_eager_run_and_only_for_new_shapes(package, monkeypatch):
    backend = start_sglang(package, monkeypatch)()
    backend._cuda_graph_runner = SimpleNamespace(captured_req_width=3)
    aiter, found, hooked = sys.modules["aiter.fused_moe"], asked(monkeypatch), []
    policies = []
    result = backend.capture_one(
        "key",
        lambda: policies.append(sort(aiter, policy=2)),
        post_warmup_hook=lambda: hooked.append(len(policies)),
    )
    assert result == ("captured", None)
    assert policies == [2, 1, 1]  # SGLang's own until measured
    assert hooked == [1, 2]
    # Requests times tokens a request; prefill is not captured.
    (options,) = found
    assert (options["max_tokens"], options["captured"]) == (2048, (3, 24))
    (table,) = process.current().tables.values()
    assert table.evidence.coverage.baseline == "policy 2"
    backend.capture_one("key", lambda: sort(aiter, policy=2))
    assert len(found) == 1
    backend.capture_one("key", lambda: sort(aiter, dim=128, policy=2))
    assert len(found) == 2


def test_sglangs_capture_is_asked_as_it_was(package, monkeypatch):
    backend = start_sglang(package, monkeypatch)()
    asked(monkeypatch)
    assert backend.capture_one("key", lambda: "ran", "inputs") == ("captured", "ran")
    assert backend.asked == ("key", "inputs")
    backend.capture_one(shape_key="other", forward_fn=lambda: "ran")
    assert backend.asked == ("other", None)


@pytest.mark.parametrize(
    ("decode", "prefill", "backend", "sizes", "largest"),
    [
        ([1, 8], [256], "disabled", (3, 24), 24),
        ([1, 8], [256, 16], "full", (3, 16, 24, 256), 256),
        (None, [16], "full", (16,), 20),
        ([8], None, "full", (24,), 24),
        (None, None, "full", (), 20),
    ],
)
def test_the_sizes_of_both_kinds_of_graphs_are_calibrated_for(
    package, monkeypatch, decode, prefill, backend, sizes, largest
):
    one = start_sglang(package, monkeypatch)()
    one._cuda_graph_runner = SimpleNamespace(captured_req_width=3)
    context = importlib.import_module("sglang.srt.runtime_context")
    context.prefill_tokens = 20
    context.config.decode.bs, context.config.prefill.bs = decode, prefill
    context.config.prefill.backend = backend
    found, aiter = asked(monkeypatch), sys.modules["aiter.fused_moe"]
    one.capture_one("key", lambda: sort(aiter, policy=2))
    (options,) = found
    assert (options["captured"], options["max_tokens"]) == (sizes, largest)


def test_an_sglang_that_plans_no_graphs_or_no_tokens_has_at_least_one_token(package, monkeypatch):
    one = start_sglang(package, monkeypatch)()
    context = importlib.import_module("sglang.srt.runtime_context")
    context.config, context.prefill_tokens = None, 0
    found, aiter = asked(monkeypatch), sys.modules["aiter.fused_moe"]
    one.capture_one("key", lambda: sort(aiter, policy=2))
    assert (found[0]["captured"], found[0]["max_tokens"]) == ((), 1)


def test_a_runner_of_unknown_width_has_a_token_a_request(package, monkeypatch):
    one = start_sglang(package, monkeypatch)()
    one._cuda_graph_runner = SimpleNamespace()
    found, aiter = asked(monkeypatch), sys.modules["aiter.fused_moe"]
    one.capture_one("key", lambda: sort(aiter, policy=2))
    assert found[0]["captured"] == (1, 8)


def test_the_key_names_the_engine_and_its_version(package, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"0.5.23 of {name}")
    start_sglang(package, monkeypatch)
    assert process._engine == "sglang 0.5.23 of sglang"


def test_what_is_not_accepted_is_said_by_the_first_process_only(package, monkeypatch, caplog):
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: "SGLang's front end")
    monkeypatch.setenv("ADAPTIVE_MOE_BUDGET_S", "fast")
    start_sglang(package, monkeypatch)
    assert process.current() is not None
    assert caplog.records == []


@pytest.mark.parametrize(("files", "baseline"), [(SGLANG, 2), ({**SGLANG, **OLD_ENVIRON}, 0)])
def test_the_baseline_is_what_this_sglang_passes(package, monkeypatch, files, baseline):
    """0.5.20 and 0.5.21 know no variable and pass nothing."""
    start_sglang(package, monkeypatch, files)
    assert process.current().engine_policy == baseline


def test_each_graph_backend_is_warmed_up_for_once_and_for_new_shapes(package, monkeypatch):
    backend = start_sglang(package, monkeypatch)
    found, aiter = asked(monkeypatch), sys.modules["aiter.fused_moe"]
    decode, draft = backend(), backend()
    decode.capture_one("a dense layer", lambda: None)
    decode.capture_one("a dense layer", lambda: None)
    assert len(found) == 1
    decode.capture_one("a new shape", lambda: sort(aiter, policy=2))
    assert len(found) == 2
    draft.capture_one("a draft model", lambda: sort(aiter, policy=2))
    draft.capture_one("a draft model", lambda: sort(aiter, policy=2))
    assert len(found) == 3


def test_attention_ranks_are_pooled_where_sglang_gathers_their_tokens(package, monkeypatch):
    backend = start_sglang(package, monkeypatch)
    found, aiter = asked(monkeypatch), sys.modules["aiter.fused_moe"]
    backend().capture_one("key", lambda: sort(aiter, policy=2))
    importlib.import_module("sglang.srt.utils.common").gathers = True
    backend().capture_one("key", lambda: sort(aiter, policy=2))
    importlib.import_module("sglang.srt.runtime_context").parallel.num_dp_ranks = 8  # since 0.5.22
    backend().capture_one("key", lambda: sort(aiter, policy=2))
    assert [options["pooled"] for options in found] == [1, 4, 8]


def test_rows_of_padding_come_from_one_router_only(package, monkeypatch):
    backend = start_sglang(package, monkeypatch)
    found, aiter = asked(monkeypatch), sys.modules["aiter.fused_moe"]
    backend().capture_one("key", lambda: sort(aiter, policy=2))
    monkeypatch.setitem(sys.modules, "sglang.srt.multimodal.dsv41.vl_routing", object())
    backend().capture_one("key", lambda: sort(aiter, policy=2))
    assert [options["padding_rows"] for options in found] == [False, True]


# Without graphs


class EagerRunner:
    """SGLang's, as far as a dummy batch needs it."""

    def __init__(self, run, largest=512, width=1):
        self.run, self.attn_tp_size, self._eager_max_bs = run, 2, largest
        self.width = width
        self.model_runner = SimpleNamespace(
            spec_algorithm=SimpleNamespace(is_speculative=lambda: False), canary_manager=None
        )

    def _alloc_dummy_decode_buffers(self, max_bs, *, num_tokens_per_req=1):
        return f"buffers of {max_bs} x {num_tokens_per_req}"

    def _dummy_run(self, batch_size, run_ctx=None, *, buffers):
        assert buffers == f"buffers of {batch_size} x {self.width}"
        with run_ctx or nullcontext():
            self.run(batch_size)


def model_runner(run, capture=lambda: None, **parts):
    module = importlib.import_module(sglang.MODEL_RUNNER)
    runner = module.ModelRunner()
    facts = {
        "eager_runner": EagerRunner(run),
        "decode_cuda_graph_runner": None,
        "prefill_cuda_graph_runner": None,
        "is_draft_worker": False,
    }
    vars(runner).update({**facts, "capture": capture, **parts})
    return runner


def test_without_graphs_a_dummy_batch_shows_the_shapes(package, monkeypatch):
    start_sglang(package, monkeypatch)
    aiter, found, sizes = sys.modules["aiter.fused_moe"], asked(monkeypatch), []

    def run(batch_size):
        sizes.append(batch_size)
        sort(aiter, batch_size, policy=2)

    assert model_runner(run, capture=lambda: "theirs").init_cuda_graphs() == "theirs"
    assert sizes == [2 * sglang.DUMMY_REQUESTS]
    (options,) = found
    assert (options["max_tokens"], options["captured"]) == (2048, ())
    assert sort(aiter, policy=2) == 1


def test_a_small_server_has_a_small_dummy_batch(package, monkeypatch):
    start_sglang(package, monkeypatch)
    asked(monkeypatch)
    sizes = []
    runner = model_runner(sizes.append)
    runner.eager_runner = EagerRunner(sizes.append, largest=6)
    runner.init_cuda_graphs()
    assert sizes == [6]


def test_a_runner_that_speculates_and_has_a_canary_runs_as_sglang_runs_it(package, monkeypatch):
    start_sglang(package, monkeypatch)
    found, steps = asked(monkeypatch), []

    @contextmanager
    def noted(name):
        steps.append(f"into {name}")
        yield
        steps.append(f"out of {name}")

    eager = EagerRunner(steps.append, width=3)
    eager.model_context = lambda: noted("model")
    vars(eager.model_runner).update(
        spec_algorithm=SimpleNamespace(is_speculative=lambda: True),
        decode_num_tokens_per_req=lambda: 3,
        canary_manager=SimpleNamespace(
            with_active_single_forward_manager=lambda index: noted(f"canary {index}")
        ),
    )
    model_runner(None, eager_runner=eager).init_cuda_graphs()
    assert steps == ["into model", "into canary 0", 64, "out of canary 0", "out of model"]
    assert len(found) == 1
    # A SGLang that has no canaries.
    del eager.model_runner.canary_manager
    steps.clear()
    model_runner(None, eager_runner=eager).init_cuda_graphs()
    assert steps == ["into model", 64, "out of model"]


def test_sglangs_arguments_and_an_unset_runner_are_as_they_were(package, monkeypatch):
    start_sglang(package, monkeypatch)
    found, came = asked(monkeypatch), []
    runner = model_runner(lambda batch_size: None, lambda *args, **kw: came.append((args, kw)))
    del runner.decode_cuda_graph_runner
    del runner.prefill_cuda_graph_runner
    runner.init_cuda_graphs(False, more=1)
    assert came == [((False,), {"more": 1})]
    assert len(found) == 1


@pytest.mark.parametrize(
    "parts",
    [
        {"decode_cuda_graph_runner": object()},
        {"prefill_cuda_graph_runner": object()},
        {"is_draft_worker": True},
    ],
)
def test_where_graphs_were_captured_no_dummy_batch_runs(package, monkeypatch, parts):
    start_sglang(package, monkeypatch)
    found, ran = asked(monkeypatch), []
    model_runner(ran.append, **parts).init_cuda_graphs()
    assert (found, ran) == ([], [])


def test_a_dummy_batch_that_fails_costs_a_line(package, monkeypatch, caplog):
    start_sglang(package, monkeypatch)
    found = asked(monkeypatch)
    model_runner(lambda batch_size: 1 / 0).init_cuda_graphs()
    assert len(found) == 1
    said = [line.getMessage() for line in caplog.records]
    problem = "ZeroDivisionError('division by zero')"
    assert f"no dummy batch could show the model's shapes: {problem}" in said


def test_sglangs_own_failure_while_capturing_is_sglangs(package, monkeypatch):
    start_sglang(package, monkeypatch)

    def capture():
        raise KeyError("theirs")

    with pytest.raises(KeyError, match="theirs"):
        model_runner(None, capture).init_cuda_graphs()


def test_an_sglang_without_that_moment_is_told(package, monkeypatch, caplog):
    runner = "sglang/srt/model_executor/model_runner.py"
    start_sglang(package, monkeypatch, {**SGLANG, runner: "class Another: pass"})
    importlib.import_module(sglang.MODEL_RUNNER)
    (said,) = {line.getMessage() for line in caplog.records}
    assert said == (
        "this SGLang has no ModelRunner.init_cuda_graphs, so nothing will be calibrated with "
        "--disable-cuda-graph and the baseline stays there: use SGLang 0.5.20 to 0.5.23"
    )


# What SGLang's user set, and what goes wrong


def test_a_users_sglang_policy_wins(package, monkeypatch, caplog):
    package(SGLANG)
    monkeypatch.setenv(NEUTRAL, "auto")
    monkeypatch.setenv(sglang.SGLANG_VARIABLE, "1")
    sglang.register()
    (line,) = caplog.records
    assert line.getMessage() == (
        f"{sglang.SGLANG_VARIABLE}=1 is set and wins: adaptive_moe leaves SGLang's policy alone; "
        "unset it to have policies measured"
    )
    assert process.current() is None


def test_a_failing_warm_up_does_not_stop_sglangs_capture(package, monkeypatch, caplog):
    backend = start_sglang(package, monkeypatch)()
    monkeypatch.setattr(process, "warm_up_for", lambda *arguments, **options: 1 / 0)
    aiter = sys.modules["aiter.fused_moe"]
    assert backend.capture_one("key", lambda: sort(aiter, policy=2)) == ("captured", 2)
    assert "warm-up failed" in caplog.text


def test_a_warm_up_that_fails_before_it_begins_fails_once(package, monkeypatch, caplog):
    """A traceback for each captured graph would hide everything else."""
    backend = start_sglang(package, monkeypatch)()
    monkeypatch.setattr(sglang, "_capture_sizes", lambda width: 1 / 0)
    aiter = sys.modules["aiter.fused_moe"]
    for _ in range(3):
        assert backend.capture_one("key", lambda: sort(aiter, policy=2)) == ("captured", 2)
    assert caplog.text.count("warm-up failed") == 1


def test_an_sglang_without_that_backend_is_told(package, monkeypatch, caplog):
    full = "sglang/srt/model_executor/runner_backend/full_cuda_graph_backend.py"
    package({**SGLANG, full: "class SomethingElse: pass"})
    monkeypatch.setenv(NEUTRAL, "auto")
    load_aiter()
    sglang.register()
    importlib.import_module(f"{sglang._BACKENDS}.full_cuda_graph_backend")
    (line,) = caplog.records
    assert line.getMessage() == (
        "this SGLang has no FullCudaGraphBackend.capture_one, so nothing will be calibrated with "
        "that graph backend and the baseline stays: use SGLang 0.5.20 to 0.5.23"
    )


def test_a_bad_variable_of_ours_is_one_warning_and_sglang_starts(package, monkeypatch, caplog):
    package(SGLANG)
    monkeypatch.setenv(NEUTRAL, "3x")
    load_aiter()
    sglang.register()
    sglang.register()
    (line,) = [r.message for r in caplog.records if NEUTRAL in r.message]
    assert "is not accepted" in line
    assert process.current() is None


def test_without_aiter_sglang_is_left_as_it_is(package, monkeypatch, caplog):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(ROOT)])
    package(SGLANG)
    monkeypatch.setenv(NEUTRAL, "auto")
    sglang.register()
    runner = importlib.import_module(sglang.MODEL_RUNNER).ModelRunner
    assert not hasattr(runner.init_cuda_graphs, "__wrapped__")
    (line,) = caplog.records
    assert line.getMessage() == (
        "nothing is changed: AITER is not installed (no module named aiter)"
    )


def test_a_fixed_policy_needs_no_warm_up(package, monkeypatch):
    package(SGLANG)
    monkeypatch.setenv(NEUTRAL, "1")
    aiter = load_aiter()
    sglang.register()
    runner = importlib.import_module(sglang.MODEL_RUNNER).ModelRunner
    assert not hasattr(runner.init_cuda_graphs, "__wrapped__")
    assert sort(aiter, policy=2) == 1


def test_registration_never_raises(monkeypatch, caplog):
    monkeypatch.setenv(NEUTRAL, "auto")
    monkeypatch.setitem(sys.modules, "sglang", None)  # importing it fails
    sglang.register()
    (line,) = caplog.records
    assert line.getMessage() == "adaptive_moe could not start; SGLang goes on without it"


@pytest.mark.parametrize("name", [NAME, NEUTRAL])
def test_off_is_off(package, monkeypatch, name, caplog):
    package(SGLANG)
    monkeypatch.setenv(name, "off")
    load_aiter()
    sglang.register()
    assert process.current() is None
    assert caplog.records == []
