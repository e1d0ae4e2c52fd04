"""Warm-up: what is measured, how, and what is kept; and with other ranks, that all end alike.

Ranks are threads here, each with a stand-in for AITER of its own, over one key-value store.
tests/contract/ has processes with the engines' own groups.
"""

import contextvars
import logging
import threading
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from adaptive_moe.disk import folder as store
from adaptive_moe.engines import others, own, process, warm_up
from adaptive_moe.engines.wanted import Batches
from adaptive_moe.hook.hook import AiterHook
from adaptive_moe.kernels import SortKernel, policy_candidates
from adaptive_moe.kernels.cpu_sort import moe_sorting
from adaptive_moe.policy.decision import Standing
from adaptive_moe.policy.environment import describe_environment
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.ranks import agreement
from adaptive_moe.ranks.agreement import Channel
from adaptive_moe.report import text
from adaptive_moe.settings import LogDetail, Mode, Settings
from adaptive_moe.tuning.calibrator import calibrate
from tests.aiter_standin.load import forget_aiter, load_aiter
from tests.engines.seen import hook_with, seen_call
from tests.faults.made_up import made_up_table
from tests.hook.at_once import at_once
from tests.hook.hooking import seam_of, sort_arguments
from tests.tables import make_table, measure_as

COUNTS = (1, 8, 64)
NO_MEMORY = torch.cuda.OutOfMemoryError("no memory left")
SHAPE_FLAG = contextvars.ContextVar("shape_flag")


class Rank:
    """One rank: its AITER and hook, its cache folder, and what it measured. `gain` is what it finds
    policy 1 to save. fails: by model_dim, what it raises instead of measuring. noise and rounds: of
    its samples. out: candidates that failed or were wrong, as made_up_table has it."""

    def __init__(self, cache, seed=0, *, gain=0.1, dims=(64,), fails=None, settings=None, **made):
        forget_aiter()
        self.cache, self.seed, self.gain, self.made = cache, seed, gain, made
        self.fails = fails or {}
        self.aiter = load_aiter("main")
        self.hook = AiterHook(Settings(mode=Mode.AUTO, cache_dir=str(cache), **(settings or {})))
        self.hook.install(self.aiter)
        self.measured, self.earlier = [], []
        for dim in dims:
            self.sort(8, dim)

    def sort(self, num_tokens, dim=64):
        ids = torch.arange(4, dtype=torch.int32).repeat(num_tokens, 1)
        self.aiter.moe_sorting(ids, torch.ones((num_tokens, 4)), 16, dim, torch.bfloat16)

    def measure(self, kernel, coverage, plan, *, expert_mask=None, earlier=None):
        self.measured.append(coverage.shape.model_dim)
        self.earlier.append(earlier)
        if coverage.shape.model_dim in self.fails:
            raise self.fails[coverage.shape.model_dim]
        table = made_up_table(
            self.seed,
            shape=coverage.shape,
            kernel=kernel.name,
            gains=(0.0, self.gain, -0.1),
            eager=COUNTS,
            graph=(),
            rounds=self.made.get("rounds", 12),
            noise=self.made.get("noise", 0.01),
            out=self.made.get("out"),
            names=[candidate.name for candidate in kernel.candidates],
            max_tokens=coverage.max_tokens,
            rule=plan.rule,
            budget_s=plan.budget_s,
            environment=describe_environment(kernel.device),
        )
        return PolicyTable(replace(table.evidence, coverage=coverage))

    def warm_up(self, channel):
        connect = None if channel is None else (lambda: channel)
        return warm_up.warm_up_hook(
            self.hook, Batches(64), measure=self.measure, connect=connect, engine="vllm 0.33.0"
        )

    def applied(self):
        """By model_dim, the table's text."""
        return {key.model_dim: table.to_json() for key, table in self.hook.tables.items()}

    def chosen(self):
        return {t.candidate(n) for t in self.hook.tables.values() for n in range(1, 65)}

    def files(self):
        return sorted((p.name, p.stat().st_mtime_ns) for p in self.cache.glob("*.json"))


def channels(size):
    store = dist.HashStore()
    return [Channel(rank, size, lambda: store) for rank in range(size)]


def together(*ranks):
    """All ranks warm up at the same time, and none of them takes as long as waiting in vain."""
    begun = time.monotonic()
    pairs = zip(ranks, channels(len(ranks)), strict=True)
    made = at_once(*(partial(rank.warm_up, channel) for rank, channel in pairs))
    assert time.monotonic() - begun < 30.0 < agreement.LIMIT_S
    return made


@pytest.fixture(autouse=True)
def clean():
    yield
    forget_aiter()


def test_ranks_that_measured_differently_run_the_same_tables(tmp_path):
    """What gains on one rank and loses on an equal one is run by neither."""
    ranks = [Rank(tmp_path / "a", 1, gain=0.1), Rank(tmp_path / "b", 2, gain=-0.02)]
    alone = Rank(tmp_path / "c", 1, gain=0.1)
    alone.warm_up(None)
    assert alone.chosen() == {"policy 1"}
    made = together(*ranks)
    assert ranks[0].applied() == ranks[1].applied() != {}
    assert ranks[0].chosen() == {"policy 0"}
    assert [set(one.origins.values()) for one in made] == [{"agreed"}, {"agreed"}]


def test_warm_cold_and_layerless_ranks_agree_and_next_time_nothing_is_measured(tmp_path):
    earlier = Rank(tmp_path / "warm", 1)
    earlier.warm_up(None)

    def start():
        warm, cold = Rank(tmp_path / "warm", 2), Rank(tmp_path / "cold", 3)
        without = Rank(tmp_path / "none", dims=())
        made = together(warm, cold, without)
        assert [m.problems for m in made] == [(), (), ()]
        assert warm.applied() == cold.applied() != {}
        assert without.applied() == {}
        return warm, cold, without

    warm, cold, without = start()
    assert (warm.measured, cold.measured, without.measured) == ([], [64], [])
    # What was agreed is what is stored: also where another table was before.
    before = warm.files(), cold.files()
    assert len(before[0]) == len(before[1]) == 1
    text = {path.read_text() for r in (warm, cold) for path in r.cache.glob("*.json")}
    assert len(text) == 1
    assert without.files() == []

    again = start()
    assert [rank.measured for rank in again] == [[], [], []]
    assert again[0].applied() == warm.applied()
    assert (again[0].files(), again[1].files()) == before  # nothing new, nothing written


def test_a_warm_start_writes_nothing(tmp_path, monkeypatch):
    Rank(tmp_path, 1).warm_up(None)
    written = []
    monkeypatch.setattr(store.Store, "publish", lambda self, tables: written.extend(tables))
    rank = Rank(tmp_path, 2)
    rank.warm_up(None)
    assert (rank.measured, written) == ([], [])
    assert rank.applied() != {}


def test_a_shape_that_one_rank_could_not_calibrate_is_run_by_none_and_not_stored(tmp_path, caplog):
    ranks = [
        Rank(tmp_path / "a", 1, dims=(64, 128)),
        Rank(tmp_path / "b", 2, dims=(64, 128), fails={128: NO_MEMORY}),
    ]
    made = together(*ranks)
    assert ranks[0].applied() == ranks[1].applied()
    assert list(ranks[0].applied()) == [64]
    assert "rank 1 could not calibrate it: OutOfMemoryError: no memory left" in made[0].problems[0]
    # What a rank measured serves the next start, agreed or not; what failed is nowhere.
    assert [len(rank.files()) for rank in ranks] == [2, 1]
    said = [r.message for r in caplog.records if "rank 1 could not calibrate" in r.message]
    assert len(said) == 1


def test_ranks_with_different_layers_each_keep_their_own(tmp_path):
    ranks = [Rank(tmp_path / "a", 1, dims=(64, 128)), Rank(tmp_path / "b", 2, dims=(128, 192))]
    together(*ranks)
    assert [sorted(rank.applied()) for rank in ranks] == [[64, 128], [128, 192]]
    assert ranks[0].applied()[128] == ranks[1].applied()[128]


def stood_aside(rank, monkeypatch):
    rank.hook.layer.active = False


def raises(rank, monkeypatch):
    broken = rank.hook
    real = own._table_for
    monkeypatch.setattr(
        own,
        "_table_for",
        lambda one, hook, *more: 1 / 0 if hook is broken else real(one, hook, *more),
    )


def is_being_captured(rank, monkeypatch):
    broken = rank.hook
    real = warm_up._refusal
    monkeypatch.setattr(
        warm_up, "_refusal", lambda hook: "captured" if hook is broken else real(hook)
    )


@pytest.mark.parametrize("breaks", [stood_aside, raises, is_being_captured])
def test_a_rank_where_we_broke_down_still_comes_and_is_not_waited_for(
    tmp_path, monkeypatch, breaks
):
    good, bad = Rank(tmp_path / "a", 1), Rank(tmp_path / "b", 2)
    breaks(bad, monkeypatch)
    made = together(good, bad)
    assert bad.measured == []
    assert good.applied() == bad.applied() == {}
    assert "rank 1 could not calibrate it" in made[0].problems[0]
    assert (len(good.files()), bad.files()) == (1, [])


def test_a_rank_that_never_comes_costs_the_tables_and_one_line_but_not_the_work(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(others, "limit_for", lambda coverages, budget_s: 0.3)
    rank = Rank(tmp_path, 1)
    made = rank.warm_up(channels(2)[0])
    assert rank.measured == [64]
    assert rank.applied() == {}
    (line,) = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert "rank 1 did not take part in time" in line
    assert made.problems == (line,)
    rank.sort(8)  # still served
    assert rank.hook.counts().failed == 0
    again = Rank(tmp_path, 2)
    again.warm_up(None)
    assert again.measured == []
    assert again.chosen() == {"policy 1"}


def test_a_group_that_cannot_be_reached_costs_the_tables_and_one_line(tmp_path, caplog):
    def connect():
        raise RuntimeError("no such group")

    rank = Rank(tmp_path, 1)
    made = warm_up.warm_up_hook(rank.hook, Batches(64), measure=rank.measure, connect=connect)
    assert made.tables == rank.applied() == {}
    (line,) = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert "no such group" in line


def test_nothing_is_exchanged_unless_the_caller_says_that_all_ranks_come(monkeypatch):
    asked = []
    monkeypatch.setattr(process, "_hook", None)
    monkeypatch.setattr(process, "open_channel", asked.append)
    process.warm_up(64)
    assert asked == []
    group = object()
    process.warm_up(64, agree=True)
    process.warm_up(64, agree=group)
    assert asked == [None, group]


def test_the_report_keeps_what_earlier_warm_ups_made(tmp_path):
    rank = Rank(tmp_path, 1)
    report = tmp_path / "report.txt"
    rank.hook.settings = replace(rank.hook.settings, report=str(report))
    rank.warm_up(None)
    rank.sort(8, 128)
    rank.warm_up(None)
    assert report.read_text().count('"schema"') == 2


@pytest.mark.parametrize("detail", LogDetail)
def test_a_table_is_logged_as_far_as_is_asked_and_with_when(tmp_path, caplog, detail):
    caplog.set_level(logging.INFO, "adaptive_moe")
    table_too = detail is LogDetail.TABLE
    for measured_now in (True, False):
        rank = Rank(tmp_path, 1, settings={"log_detail": detail})
        (table,) = rank.warm_up(None).tables.values()
        expected = [text.headline(table, measured_now=measured_now)]
        expected += ["\n".join(text.bucket_table(table))] if table_too else []
        (file,) = tmp_path.glob("*.json")
        *said, last = caplog.messages[-len(expected) - 1 :]
        assert said == expected
        assert last.startswith(f"table kept in {file}: 16 experts, topk 4")
    # Twice all of it, and once where the table was found.
    assert len(caplog.messages) == 2 * len(expected) + 3


def test_a_table_that_could_not_be_written_has_no_file_in_the_log(tmp_path, caplog):
    caplog.set_level(logging.INFO, "adaptive_moe")
    (tmp_path / "cache").write_text("in the way")
    assert len(Rank(tmp_path / "cache", 1).warm_up(None).tables) == 1
    assert "kept in" not in caplog.text


def test_a_process_in_which_nothing_was_sorted_is_told_why_that_may_be(tmp_path, caplog):
    made = Rank(tmp_path, dims=()).warm_up(None)
    assert (made.tables, made.problems) == ({}, ())
    assert made.seconds >= 0.0
    assert caplog.messages == [
        "auto has nothing to choose: nothing was sorted through AITER's fused_moe so far (a dense "
        "model, AITER's MoE switched off as by VLLM_ROCM_USE_AITER=0 or "
        "VLLM_ROCM_USE_AITER_MOE=0, or no forward yet)"
    ]


def test_layers_that_cannot_be_asked_about_cost_the_tables_and_are_said(tmp_path, caplog):
    rank = Rank(tmp_path)

    def fails(name):
        raise RuntimeError("half imported")

    del rank.aiter.get_padded_M
    rank.aiter.__getattr__ = fails
    made = rank.warm_up(None)
    assert (made.tables, made.problems) == ({}, ("RuntimeError: half imported",))
    assert caplog.messages == [
        "what to calibrate is not known",
        "not calibrated this time, the baseline serves it and the next start tries again: "
        "RuntimeError: half imported",
    ]


# Outcome apart from evidence


@pytest.mark.parametrize(
    "error", [NO_MEMORY, RuntimeError("HIP error: 719"), TypeError("expected int32")]
)
def test_a_failure_of_the_moment_is_said_and_tried_again_and_never_stored(tmp_path, caplog, error):
    failing = Rank(tmp_path, 1, fails={64: error})
    made = failing.warm_up(None)
    assert made.tables == {}
    assert str(error) in made.problems[0]
    (line,) = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert "the next start tries again" in line
    assert str(error) in line
    assert failing.files() == []
    again = Rank(tmp_path, 2)
    again.warm_up(None)
    assert again.measured == [64]
    assert again.chosen() == {"policy 1"}


@pytest.mark.parametrize("standing", [Standing.FAILED, Standing.WRONG])
def test_a_table_in_which_a_candidate_failed_serves_this_process_only(tmp_path, standing):
    rank = Rank(tmp_path, 1, out={2: (standing, "it raised")})
    rank.warm_up(None)
    assert rank.chosen() == {"policy 1"}
    assert rank.files() == []
    again = Rank(tmp_path, 2)
    again.warm_up(None)
    assert again.measured == [64]
    assert len(again.files()) == 1


UNSETTLED = {"rounds": 5, "noise": 0.3}


def test_what_a_small_budget_left_unsettled_is_gone_on_with_by_a_larger_one(tmp_path):
    hurried = Rank(tmp_path, 1, gain=0.0, settings={"budget_s": 0.1}, **UNSETTLED)
    hurried.warm_up(None)
    (left,) = hurried.hook.tables.values()
    assert not left.settled
    for seconds in (0.1, 0.05):
        same = Rank(tmp_path, 2, settings={"budget_s": seconds})
        same.warm_up(None)
        assert same.measured == []
    larger = Rank(tmp_path, 3, settings={"budget_s": 1.0})
    larger.warm_up(None)
    assert larger.earlier == [left.evidence]
    assert larger.chosen() == {"policy 1"}
    once_more = Rank(tmp_path, 4, settings={"budget_s": 9.0})
    once_more.warm_up(None)
    assert once_more.measured == []  # all is settled
    assert once_more.applied() == larger.applied()


def test_what_is_stored_serves_where_going_on_with_it_fails(tmp_path):
    hurried = Rank(tmp_path, 1, gain=0.0, settings={"budget_s": 0.1}, **UNSETTLED)
    hurried.warm_up(None)
    failing = Rank(tmp_path, 2, fails={64: NO_MEMORY}, settings={"budget_s": 1.0})
    assert failing.warm_up(None).problems == ()
    assert failing.measured == [64]
    assert failing.applied() == hurried.applied()


def test_another_engine_or_version_measures_for_itself(tmp_path):
    Rank(tmp_path, 1).warm_up(None)
    other = Rank(tmp_path, 2)
    warm_up.warm_up_hook(other.hook, Batches(64), measure=other.measure, engine="vllm 0.34.0")
    assert other.measured == [64]


# Coverage that grows


def test_a_later_warm_up_with_larger_batches_extends_the_table(tmp_path):
    rank = Rank(tmp_path, 1)
    rank.warm_up(None)
    (before,) = rank.hook.tables.values()
    warm_up.warm_up_hook(rank.hook, Batches(64), measure=rank.measure)
    warm_up.warm_up_hook(rank.hook, Batches(50), measure=rank.measure)
    assert rank.measured == [64]
    warm_up.warm_up_hook(rank.hook, Batches(128), measure=rank.measure)
    assert rank.measured == [64, 64]
    assert rank.earlier == [None, before.evidence]
    (after,) = rank.hook.tables.values()
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
            (SHAPE_FLAG.get("unset"), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        )
        SHAPE_FLAG.set("changed")
        return measure_as({64: 1})(kernel, *arguments, **options)

    def call():
        SHAPE_FLAG.set("mxfp4")
        with torch.inference_mode():
            rank.sort(8)

    found, rank = [], Rank(tmp_path, dims=())
    contextvars.copy_context().run(call)
    warm_up.warm_up_hook(rank.hook, Batches(64), measure=look)
    assert found == [("mxfp4", False, True)]
    assert SHAPE_FLAG.get("unset") == "unset"
    (table,) = rank.hook.tables.values()
    assert "shape_flag=mxfp4" in table.evidence.coverage.context


def test_a_calibration_under_another_default_dtype_finds_every_policy_right(tmp_path):
    """As ATOM sets it, for the whole process."""
    rank = Rank(tmp_path, settings={"budget_s": 3.0})
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = warm_up.warm_up_hook(rank.hook, Batches(8), measure=calibrate)
    finally:
        torch.set_default_dtype(before)
    assert made.problems == ()
    (table,) = made.tables.values()
    assert table.sound


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
    warm_up.warm_up_hook(
        hook, Batches(8)
    )  # by default with calibrate(), which nothing sorts for here
    assert masks
    assert all(one is mask for one in masks)


def test_what_a_warm_up_did_in_a_line():
    key = seen_call().key
    made = warm_up.WarmUp({key: make_table({64: 1})}, ("one", "two"), 1.234, {key: "stored"})
    assert repr(made) == (
        "WarmUp([16 experts, topk 4, dim 64, bfloat16, block 32 stored], 2 problems, 1.23 s)"
    )


def gpu_hook(*seen, settings):
    """A hook that saw calls on GPUs, whose kernel is the CPU's."""
    hook = hook_with(*seen)
    hook.layer = SimpleNamespace(module=None, chooser=None)
    hook.settings, hook.warming = settings, threading.Lock()
    hook.set_tables = hook.tables.update
    hook.kernel = lambda seen, key, coverage: SortKernel(
        "cpu", torch.device("cpu"), policy_candidates(moe_sorting)
    )
    return hook


def two_gpus(tmp_path):
    settings = Settings(mode=Mode.AUTO, cache_dir=str(tmp_path))
    return gpu_hook(seen_call(8, device=0), seen_call(8, device=1), settings=settings)


def test_layers_on_two_gpus_are_measured_each_on_its_own(tmp_path):
    chosen = iter([1, 2])

    def measure(kernel, coverage, plan, **options):
        return make_table({64: next(chosen)}, kernel=kernel.name)

    hook = two_gpus(tmp_path)
    made = warm_up.warm_up_hook(hook, Batches(64), measure=measure)
    assert {key.device: table.candidate(8) for key, table in made.tables.items()} == {
        0: "policy 1",
        1: "policy 2",
    }


def test_with_other_ranks_both_gpus_of_a_process_run_what_was_agreed(tmp_path):
    ranks = [Rank(tmp_path / str(number), number, dims=()) for number in (0, 1)]
    for rank in ranks:
        rank.hook = two_gpus(rank.cache)
    made = together(*ranks)
    assert [len(one.tables) for one in made] == [2, 2]
    assert len({table.to_json() for one in made for table in one.tables.values()}) == 1
