"""Warm-up with other ranks: what each of them has done, and that all of them end alike.

Ranks are threads here, each with a stand-in for AITER of its own, over one key-value store.
tests/contract/ has processes with the engines' own groups.
"""

import functools
import threading
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from adaptive_moe.engines import process, warm_up
from adaptive_moe.engines.hook import AiterHook
from adaptive_moe.ranks import agreement
from adaptive_moe.ranks.agreement import Channel
from adaptive_moe.settings import Mode, Settings
from tests.aiter_standin.load import forget_aiter, load_aiter
from tests.faults.made_up import made_up_table

COUNTS = (1, 8, 64)


class Rank:
    """One rank: its AITER and hook, its cache folder, and what it measured. `gain` is what it finds
    policy 1 to save; one that fails says so instead of measuring."""

    def __init__(self, cache, seed=0, *, gain=0.1, dims=(64,), fails=None):
        forget_aiter()
        self.cache, self.seed, self.gain, self.fails = cache, seed, gain, fails
        self.aiter = load_aiter("main")
        self.hook = AiterHook(Settings(mode=Mode.AUTO, cache_dir=str(cache)))
        self.hook.install(self.aiter)
        self.measured = []
        for dim in dims:
            self.sort(8, dim)

    def sort(self, num_tokens, dim=64):
        ids = torch.arange(4, dtype=torch.int32).repeat(num_tokens, 1)
        self.aiter.moe_sorting(ids, torch.ones((num_tokens, 4)), 16, dim, torch.bfloat16)

    def measure(self, kernel, shape, plan, *, expert_mask=None):
        self.measured.append(shape.model_dim)
        if shape.model_dim == self.fails:
            raise torch.cuda.OutOfMemoryError("no memory left")
        from adaptive_moe.policy.environment import describe_environment

        return made_up_table(
            self.seed,
            shape=shape,
            kernel=kernel.name,
            gains=(0.0, self.gain, -0.1),
            eager=COUNTS,
            graph=(),
            rounds=12,
            max_tokens=plan.max_tokens,
            rule=plan.rule,
            environment=describe_environment(kernel.device),
        )

    def warm_up(self, channel):
        connect = None if channel is None else (lambda: channel)
        return warm_up.warm_up(self.hook, 64, measure=self.measure, connect=connect)

    def applied(self):
        """By model_dim, the table's text."""
        return {key.model_dim: table.to_json() for key, table in self.hook.tables.items()}

    def policies(self):
        return {policy for table in self.hook.tables.values() for policy in table.eager[1:]}

    def files(self):
        return sorted((p.name, p.stat().st_mtime_ns) for p in self.cache.glob("*.json"))


def channels(size):
    store = dist.HashStore()
    return [Channel(rank, size, lambda: store) for rank in range(size)]


def together(*ranks):
    """All ranks warm up at the same time, and none of them takes as long as waiting in vain."""
    made, begun = {}, time.monotonic()

    def run(number, rank, channel):
        made[number] = rank.warm_up(channel)

    threads = [
        threading.Thread(target=run, args=(number, rank, channel))
        for number, (rank, channel) in enumerate(zip(ranks, channels(len(ranks)), strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert time.monotonic() - begun < 30.0 < agreement.LIMIT_S
    return [made[number] for number in range(len(ranks))]


@pytest.fixture(autouse=True)
def clean():
    yield
    forget_aiter()


def test_ranks_that_measured_differently_run_the_same_tables(tmp_path):
    """What gains on one rank and loses on an equal one is run by neither."""
    ranks = [Rank(tmp_path / "a", 1, gain=0.1), Rank(tmp_path / "b", 2, gain=-0.02)]
    alone = Rank(tmp_path / "c", 1, gain=0.1)
    alone.warm_up(None)
    assert alone.policies() == {1}
    together(*ranks)
    assert ranks[0].applied() == ranks[1].applied() != {}
    assert ranks[0].policies() == {0}


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
    monkeypatch.setattr("adaptive_moe.disk.folder.write_file", lambda *file: written.append(file))
    rank = Rank(tmp_path, 2)
    rank.warm_up(None)
    assert (rank.measured, written) == ([], [])
    assert rank.applied() != {}


def test_a_shape_that_one_rank_could_not_calibrate_is_run_by_none_and_not_stored(tmp_path, caplog):
    ranks = [
        Rank(tmp_path / "a", 1, dims=(64, 128)),
        Rank(tmp_path / "b", 2, dims=(64, 128), fails=128),
    ]
    made = together(*ranks)
    assert ranks[0].applied() == ranks[1].applied()
    assert list(ranks[0].applied()) == [64]
    assert "rank 1 could not calibrate it: OutOfMemoryError: no memory left" in made[0].problems[0]
    assert [len(rank.files()) for rank in ranks] == [1, 1]
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
    real = warm_up.targets
    monkeypatch.setattr(
        warm_up, "targets", lambda hook, *more: 1 / 0 if hook is broken else real(hook, *more)
    )


def is_being_captured(rank, monkeypatch):
    broken = rank.hook
    real = warm_up._refusal
    monkeypatch.setattr(
        warm_up, "_refusal", lambda hook, layer: "captured" if hook is broken else real(hook, layer)
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
    assert good.files() == bad.files() == []


def test_a_rank_that_never_comes_costs_the_tables_and_one_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(warm_up, "agree", functools.partial(agreement.agree, limit_s=0.3))
    rank = Rank(tmp_path, 1)
    made = rank.warm_up(channels(2)[0])
    assert rank.measured == [64]
    assert rank.applied() == {}
    assert rank.files() == []
    (line,) = [r.message for r in caplog.records if r.name == "adaptive_moe"]
    assert "rank 1 did not take part in time" in line
    assert made.problems == (line,)
    rank.sort(8)  # still served
    assert rank.hook.counts().failed == 0


def test_a_group_that_cannot_be_reached_costs_the_tables_and_one_line(tmp_path, caplog):
    def connect():
        raise RuntimeError("no such group")

    rank = Rank(tmp_path, 1)
    made = warm_up.warm_up(rank.hook, 64, measure=rank.measure, connect=connect)
    assert made.tables == rank.applied() == {}
    (line,) = [r.message for r in caplog.records if r.name == "adaptive_moe"]
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
