"""Warm-up: what is measured, what comes from a store and is checked before it serves, and what a
shape that fails costs. With real processes and real stores: tests/store/."""

import contextvars
import logging
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from adaptive_moe.engines import warm_up
from adaptive_moe.engines.wanted import Batches
from adaptive_moe.hook.hook import AiterHook
from adaptive_moe.kernels import SortKernel, policy_candidates
from adaptive_moe.kernels.cpu_sort import moe_sorting
from adaptive_moe.kernels.environment import describe_environment
from adaptive_moe.policy.evidence import Exclusion
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.report import text
from adaptive_moe.settings import LogDetail, Mode, Settings
from adaptive_moe.store.text import read_any
from adaptive_moe.tuning.calibrate import calibrate
from tests.aiter_standin.load import forget_aiter, load_aiter
from tests.engines.seen import hook_with, seen_call
from tests.hook.hooking import policy_that_arrived, seam_of, sort_arguments
from tests.tables import bucket, make_evidence, make_table, measure_as, result

COUNTS = (1, 8, 64)
NO_MEMORY = torch.cuda.OutOfMemoryError("no memory left")
CALLER = contextvars.ContextVar("request_id")


class Start:
    """One start of an engine: its AITER and hook, the cache folder, and what it measured.

    gains: of policies 1 and 2 at every count; None where it is left open. fails: by model_dim, what
    it raises instead of measuring. wrong, failed: excluded candidates. settings: of the hook.
    """

    def __init__(self, cache, *, gains=(0.3, -0.2), dims=(64,), fails=None, settings=None, **out):
        forget_aiter()
        self.cache, self.gains, self.fails, self.out = cache, gains, fails or {}, out
        self.aiter = load_aiter("main")
        self.hook = AiterHook(Settings(mode=Mode.AUTO, cache_dir=str(cache), **(settings or {})))
        self.hook.install(self.aiter)
        self.measured, self.earlier = [], []
        for dim in dims:
            self.sort(8, dim)

    def sort(self, num_tokens, dim=64):
        ids = torch.arange(4, dtype=torch.int32).repeat(num_tokens, 1)
        self.aiter.moe_sorting(ids, torch.ones((num_tokens, 4)), 16, dim, torch.bfloat16)
        return policy_that_arrived()

    def measure(self, kernel, coverage, plan, *, expert_mask=None, earlier=None):
        self.measured.append(coverage.shape.model_dim)
        self.earlier.append(earlier)
        if coverage.shape.model_dim in self.fails:
            raise self.fails[coverage.shape.model_dim]
        names = [candidate.name for candidate in kernel.candidates]
        results = [result(names[0], 0.0)]
        for name, gain in zip(names[1:], self.gains, strict=True):
            if gain is None:
                results.append(result(name, 0.4, rounds=5, noise=0.3))
            else:
                results.append(result(name, gain, second=gain if gain > 0 else None))
        excluded = [Exclusion(n, True, "other entries") for n in self.out.get("wrong", ())]
        excluded += [Exclusion(n, False, "raised") for n in self.out.get("failed", ())]
        last = coverage.max_tokens
        evidence = make_evidence(
            [bucket(n, results) for n in (*(n for n in COUNTS if n < last), last)],
            coverage=coverage,
            kernel=kernel.name,
            rule=plan.rule,
            budget_s=plan.budget_s,
            environment=describe_environment(kernel.device),
            excluded=tuple(excluded),
            starts=earlier.starts + 1 if earlier else 1,
            cut_short=None in self.gains,
        )
        return PolicyTable(evidence)

    def warm_up(self, max_tokens=64, **options):
        options = {"measure": self.measure, "engine": "vllm 0.33.0", **options}
        known = {n: options.pop(n) for n in list(options) if n in ("captured", "padding_rows")}
        return warm_up.warm_up_hook(self.hook, Batches(max_tokens, **known), **options)

    def chosen(self):
        return {t.candidate(n) for t in self.hook.tables.values() for n in range(1, 65)}

    def files(self):
        return sorted((p.name, p.stat().st_mtime_ns) for p in self.cache.glob("*.json"))


@pytest.fixture(autouse=True)
def clean():
    yield
    forget_aiter()


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# Stored tables


def test_the_second_start_measures_nothing_and_writes_nothing(tmp_path, caplog):
    first = Start(tmp_path)
    assert set(first.warm_up().origins.values()) == {"measured"}
    before = first.files()
    second = Start(tmp_path)
    made = second.warm_up()
    assert (second.measured, set(made.origins.values())) == ([], {"stored"})
    assert second.chosen() == first.chosen() == {"policy 1"}
    assert second.sort(8) == 1
    assert (len(before), second.files()) == (1, before)
    assert warnings(caplog) == []


def test_a_wrong_sort_beside_good_policies_stays_out_and_nothing_is_measured_again(tmp_path):
    Start(tmp_path, wrong=("policy 2",)).warm_up()
    second = Start(tmp_path)
    second.warm_up()
    assert second.measured == []
    (table,) = second.hook.tables.values()
    assert table.evidence.excluded == (Exclusion("policy 2", True, "other entries"),)


def test_a_candidate_that_failed_is_tried_again_by_later_starts(tmp_path):
    first = Start(tmp_path, failed=("policy 2",))
    first.warm_up()
    second = Start(tmp_path)
    second.warm_up()
    assert second.measured == [64]
    assert not next(iter(second.hook.tables.values())).failed
    third = Start(tmp_path)
    third.warm_up()
    assert third.measured == []


def test_what_a_start_left_open_is_continued_by_the_next(tmp_path):
    hurried = Start(tmp_path, gains=(0.3, None))
    hurried.warm_up()
    (left,) = hurried.hook.tables.values()
    assert left.open_counts
    second = Start(tmp_path)
    assert set(second.warm_up().origins.values()) == {"measured"}
    assert second.earlier == [left.evidence]


def test_another_engine_or_version_measures_for_itself(tmp_path):
    Start(tmp_path).warm_up()
    other = Start(tmp_path)
    other.warm_up(engine="vllm 0.34.0")
    assert other.measured == [64]


def test_a_request_id_in_the_callers_context_does_not_matter(tmp_path):
    def start():
        CALLER.set(object())
        return Start(tmp_path)

    for measured in ([64], []):
        one = contextvars.copy_context().run(start)
        one.warm_up()
        assert one.measured == measured


def test_every_key_is_made_before_anything_is_measured(tmp_path, monkeypatch):
    """Measuring may load a built sort, which the kernel's name is made of."""
    start, steps = Start(tmp_path, dims=(64, 128)), []
    real = warm_up.key_for
    monkeypatch.setattr(
        warm_up, "key_for", lambda *args, **named: steps.append("key") or real(*args, **named)
    )

    def measure(*args, **named):
        steps.append("measure")
        return start.measure(*args, **named)

    start.warm_up(measure=measure)
    assert steps == ["key", "key", "measure", "measure"]


def test_a_line_for_each_table_names_its_file(tmp_path, caplog):
    caplog.set_level(logging.INFO, "adaptive_moe")
    start = Start(tmp_path, dims=(64, 128))
    start.warm_up()
    lines = caplog.messages[-2:]
    names = [name for name, _ in start.files()]
    assert sorted(name for name in names if any(name in line for line in lines)) == names
    assert all(line.startswith(f"table kept in {tmp_path}") for line in lines)


# What a store had is checked before it serves


@pytest.mark.parametrize("kind", ["wrong", "raise", "oom"])
def test_a_stored_candidate_that_is_wrong_or_fails_here_is_replaced_by_one_that_is_right(
    tmp_path, monkeypatch, caplog, kind
):
    Start(tmp_path, gains=(0.3, 0.2)).warm_up()
    before = Start(tmp_path).files()
    monkeypatch.setenv("AITER_STANDIN_FAIL", f"policy=1,kind={kind}")
    second = Start(tmp_path)
    made = second.warm_up()
    assert (second.measured, made.problems) == ([], ())
    assert second.chosen() == {"policy 2"}
    (line,) = warnings(caplog)
    assert line.startswith("policy 1 is not used for 16 experts, topk 4")
    # It holds for this process: what is kept is as it was.
    assert second.files() == before
    monkeypatch.delenv("AITER_STANDIN_FAIL")
    third = Start(tmp_path)
    third.warm_up()
    assert third.chosen() == {"policy 1"}


def test_where_every_stored_candidate_is_wrong_the_baseline_serves(tmp_path, monkeypatch, caplog):
    Start(tmp_path, gains=(0.3, 0.2)).warm_up()
    second = Start(tmp_path)
    sorts, kernel = [], second.hook.kernel

    def spoilt(*args):
        """Policies 1 and 2 return the entries of another routing."""
        offered = kernel(*args)
        first, *others = offered.candidates
        others = [replace(c, bind=lambda inputs, c=c: spoil(c.bind(inputs))) for c in others]
        return replace(offered, candidates=(first, *others))

    def spoil(call):
        def sort():
            sorts.append(1)
            ids, *more = call()
            return (ids.flip(0), *more)

        return sort

    second.hook.kernel = spoilt
    second.warm_up()
    assert sorts
    assert second.chosen() == {"policy 0"}
    assert second.sort(8) == 0
    assert len(warnings(caplog)) == 2


def test_a_stored_table_does_not_serve_where_the_baseline_fails(tmp_path, monkeypatch):
    Start(tmp_path).warm_up()
    second = Start(tmp_path)
    monkeypatch.setenv("AITER_STANDIN_FAIL", "policy=0,kind=oom")
    made = second.warm_up()
    assert made.tables == {}
    assert "out of memory" in made.problems[0]


def test_what_was_measured_just_now_is_not_checked_again(tmp_path, monkeypatch):
    monkeypatch.setenv("AITER_STANDIN_FAIL", "policy=1,kind=wrong")
    start = Start(tmp_path)
    start.warm_up()
    assert start.chosen() == {"policy 1"}


# Shapes that fail


@pytest.mark.parametrize(
    "error", [NO_MEMORY, RuntimeError("HIP error: 719"), TypeError("expected int32")]
)
def test_a_failure_of_the_moment_is_said_and_tried_again_and_never_stored(tmp_path, caplog, error):
    failing = Start(tmp_path, fails={64: error}, dims=(64, 128))
    made = failing.warm_up()
    assert [key.model_dim for key in made.tables] == [128]
    (problem,) = made.problems
    assert str(error) in problem
    (line,) = warnings(caplog)
    assert "the next start tries again" in line
    assert str(error) in line
    again = Start(tmp_path, dims=(64, 128))
    again.warm_up()
    assert again.measured == [64]
    assert again.chosen() == {"policy 1"}


def test_while_a_graph_is_captured_nothing_is_measured(tmp_path, monkeypatch):
    start = Start(tmp_path)
    monkeypatch.setattr(warm_up, "_refusal", lambda hook: "captured")
    made = start.warm_up()
    assert (start.measured, made.tables, made.problems) == ([], {}, ("captured",))


def test_a_hook_that_stands_aside_measures_nothing(tmp_path):
    start = Start(tmp_path)
    start.hook.wrapped.active = False
    made = start.warm_up()
    assert (start.measured, made.tables) == ([], {})
    assert "not active" in made.problems[0]


def test_a_process_in_which_nothing_was_sorted_is_told_why_that_may_be(tmp_path, caplog):
    made = Start(tmp_path, dims=()).warm_up()
    assert (made.tables, made.problems) == ({}, ())
    (line,) = caplog.messages
    assert line.startswith("auto has nothing to choose: nothing was sorted through AITER's")


def test_layers_that_cannot_be_asked_about_cost_the_tables_and_are_said(tmp_path, caplog):
    start = Start(tmp_path)

    def fails(name):
        raise RuntimeError("half imported")

    del start.aiter.get_padded_M
    start.aiter.__getattr__ = fails
    made = start.warm_up()
    assert (made.tables, made.problems) == ({}, ("RuntimeError: half imported",))
    assert caplog.messages[0] == "what to calibrate is not known"


# Log and report


@pytest.mark.parametrize("name", ["start_line", "table_lines"])
def test_a_report_that_fails_costs_one_line_and_no_table(tmp_path, monkeypatch, caplog, name):
    def fails(*args, **named):
        raise ValueError("no words")

    monkeypatch.setattr(text, name, fails)
    start = Start(tmp_path)
    assert len(start.warm_up().tables) == 1
    assert start.sort(8) == 1
    (line,) = warnings(caplog)
    assert line.startswith("the tables are set")


def test_the_report_keeps_what_earlier_warm_ups_made(tmp_path):
    report = tmp_path / "report.txt"
    start = Start(tmp_path / "cache", settings={"report": str(report)})
    start.warm_up()
    start.sort(8, 128)
    start.warm_up()
    tables = [stored.table for stored in read_any(report)]
    assert tables == list(start.hook.tables.values())
    assert len(tables) == 2


@pytest.mark.parametrize("detail", LogDetail)
def test_a_table_is_logged_as_far_as_is_asked_and_with_when(tmp_path, caplog, detail):
    caplog.set_level(logging.INFO, "adaptive_moe")
    for measured_now in (True, False):
        caplog.clear()
        start = Start(tmp_path, settings={"log_detail": detail})
        (table,) = start.warm_up().tables.values()
        with_counts = detail is LogDetail.TABLE
        lines = text.table_lines(table, measured_now=measured_now, with_counts=with_counts)
        assert caplog.messages[:-1] == [text.start_line([table]), "\n".join(lines)]


def test_a_warm_up_with_nothing_new_has_no_line_of_a_start(tmp_path, caplog):
    caplog.set_level(logging.INFO, "adaptive_moe")
    start = Start(tmp_path)
    start.warm_up()
    caplog.clear()
    start.warm_up()
    assert caplog.messages == []


def test_what_a_warm_up_did_in_a_line():
    key = seen_call().key
    made = warm_up.WarmUp({key: make_table({64: 1})}, ("one", "two"), 1.234, {key: "stored"})
    assert repr(made) == (
        "WarmUp([16 experts, topk 4, dim 64, bfloat16, block 32 stored], 2 problems, 1.23 s)"
    )


# Coverage that grows


def test_a_later_warm_up_with_larger_batches_extends_the_table(tmp_path):
    start = Start(tmp_path)
    start.warm_up()
    (before,) = start.hook.tables.values()
    start.warm_up()
    start.warm_up(50)
    assert start.measured == [64]
    start.warm_up(128)
    assert start.measured == [64, 64]
    assert start.earlier == [None, before.evidence]
    (after,) = start.hook.tables.values()
    assert after.evidence.coverage.eager == ((1, 128),)


@pytest.mark.parametrize(("busy_from", "said"), [(77, 77), (None, 5)])
def test_the_users_variable_is_the_last_word_on_a_busy_device(tmp_path, busy_from, said):
    asked = []
    settings = Settings(mode=Mode.AUTO, cache_dir=str(tmp_path), busy_from=busy_from)
    hook = gpu_hook(seen_call(8, device=0), settings=settings)

    def measure(kernel, coverage, plan, **options):
        asked.append(coverage.busy_from)
        return make_table({64: 1})

    warm_up.warm_up_hook(hook, Batches(64, (8,), busy_from=5), measure=measure)
    assert asked == [said]


# In the caller's context


def test_measuring_runs_as_the_seen_call_ran(tmp_path):
    def look(kernel, *arguments, **options):
        found.append(
            (CALLER.get("unset"), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        )
        CALLER.set("changed")
        return measure_as({64: 1})(kernel, *arguments, **options)

    def call():
        CALLER.set("mxfp4")
        with torch.inference_mode():
            start.sort(8)

    found, start = [], Start(tmp_path, dims=())
    contextvars.copy_context().run(call)
    start.warm_up(measure=look)
    assert found == [("mxfp4", False, True)]
    assert CALLER.get("unset") == "unset"


def test_a_calibration_under_another_default_dtype_finds_every_policy_right(tmp_path):
    """As ATOM sets it, for the whole process."""
    start = Start(tmp_path, settings={"budget_s": 3.0})
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = start.warm_up(8, measure=calibrate)
    finally:
        torch.set_default_dtype(before)
    assert made.problems == ()
    (table,) = made.tables.values()
    assert table.evidence.excluded == ()


def test_the_calibrator_sorts_with_the_layers_own_mask(tmp_path):
    masks, mask = [], torch.arange(16, dtype=torch.int32) % 2
    module = seam_of(lambda given: masks.append(given["expert_mask"]))
    hook = AiterHook(Settings(mode=Mode.AUTO, cache_dir=str(tmp_path)))
    hook.install(module)
    arguments = sort_arguments(8)
    arguments[6] = mask
    module.moe_sorting(*arguments)
    masks.clear()
    assert hook.counts().unknown == 1
    warm_up.warm_up_hook(hook, Batches(8))  # with calibrate(), which nothing sorts for here
    assert masks
    assert all(one is mask for one in masks)


def gpu_hook(*seen, settings):
    """A hook that saw calls on GPUs, whose kernel is the CPU's."""
    hook = hook_with(*seen)
    hook.wrapped = SimpleNamespace(module=None, chooser=None)
    hook.settings, hook.warming = settings, threading.Lock()
    hook.set_tables = hook.tables.update
    hook.kernel = lambda seen, key, coverage: SortKernel(
        "cpu", torch.device("cpu"), policy_candidates(moe_sorting)
    )
    return hook


def test_layers_on_two_gpus_of_one_kind_share_what_is_measured_on_the_first(tmp_path):
    settings = Settings(mode=Mode.AUTO, cache_dir=str(tmp_path))
    hook = gpu_hook(seen_call(8, device=0), seen_call(8, device=1), settings=settings)
    log = []
    made = warm_up.warm_up_hook(hook, Batches(64), measure=measure_as({64: 1}, log=log))
    assert {key.device: origin for key, origin in made.origins.items()} == {
        0: "measured",
        1: "stored",
    }
    assert len(log) == 1
