"""Agreement: the decision is a function of the messages, and what comes of it on each rank."""

import json
import logging
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.ranks import exchange as exchange_module
from adaptive_moe.ranks.agreement import LIMIT_S, Channel, agree, limit_for, look, open_channel
from adaptive_moe.ranks.channel import Turn
from adaptive_moe.ranks.messages import (
    decide,
    encode_decision,
    encode_message,
    read_decision,
)
from adaptive_moe.ranks.summary import MAX_BYTES, canonical, summarize
from tests.faults.corrupt import listening
from tests.faults.made_up import PADDED, SHAPE
from tests.ranks.test_merging import merged, noisy, small

ROOT = Path(__file__).parents[2]


def bring(table):
    return {table.evidence.coverage: table}


TABLE = small(1)
COVERAGE = TABLE.evidence.coverage
NAME = canonical(COVERAGE)
OTHER = small(2, shape=replace(SHAPE, topk=4))
GOOD = encode_message(bring(TABLE), {})
WITHOUT = "the ranks have no common table, the engine's own policy serves"


# Messages and the decision


@settings(max_examples=300)
@given(st.data())
def test_whatever_a_rank_sends_no_table_has_a_candidate_that_was_not_offered(data):
    """A damaged message voids all, or still gives a whole table of the candidates offered."""
    place = data.draw(st.integers(0, len(GOOD)))
    cut = data.draw(st.integers(0, 40))
    bad = GOOD[:place] + data.draw(st.binary(max_size=8)) + GOOD[place + cut :]
    found = read_decision(encode_decision(decide({0: GOOD, 1: bad})))
    for text in found.tables.values():
        assert set(PolicyTable.from_json(text).evidence.candidates) <= {
            "policy 0",
            "policy 1",
            "policy 2",
        }
    assert found.tables or found.missing or found.voided


def test_a_number_that_nobody_could_read_voids_its_coverage_only():
    far = summarize(TABLE.evidence)
    far.sections[1].numbers[2, 1, 1] = -1e19
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adaptive_moe.ranks.messages.summarize", lambda evidence: far)
        bad = encode_message(bring(TABLE), {})
    found = decide({0: encode_message(bring(TABLE) | bring(OTHER), {}), 1: bad})
    assert set(found.tables) == {canonical(OTHER.evidence.coverage)}
    assert "gain_low" in found.voided[NAME]


@pytest.mark.parametrize("bad", [b"", b"{}", b"\xff" * 50, b"[" * 100_000, GOOD[:-1], GOOD + b"x"])
def test_a_message_that_cannot_be_read_counts_as_a_missing_rank(bad):
    found = decide({0: GOOD, 1: bad})
    assert set(found.missing) == {"1"}
    assert found.tables == {}


def test_a_missing_rank_voids_everything():
    found = decide({0: GOOD, 1: None, 2: GOOD})
    assert found.missing == {"1": "did not take part in time"}
    assert (found.tables, found.voided) == ({}, {})


def test_a_rank_without_layers_is_not_missing():
    found = decide({0: GOOD, 1: encode_message({}, {})})
    assert set(found.tables) == {NAME}


def test_what_one_rank_could_not_calibrate_is_voided_and_the_rest_is_not():
    have = encode_message(bring(TABLE) | bring(OTHER), {})
    failed = encode_message(bring(small(3)), {OTHER.evidence.coverage: "out of memory"})
    found = decide({0: have, 1: failed})
    assert set(found.tables) == {NAME}
    why = "rank 1 could not calibrate it: out of memory"
    assert found.voided == {canonical(OTHER.evidence.coverage): why}


def test_ranks_that_asked_different_questions_name_the_field():
    other = small(2, kernel="aiter 0.1.8 opus")
    found = decide({0: GOOD, 1: encode_message(bring(other), {})})
    assert found.tables == {}
    assert "ranks differ in kernel (" in found.voided[NAME]


def test_a_table_under_another_name_is_refused():
    found = decide({0: encode_message({COVERAGE: OTHER}, {})})
    assert found.voided == {NAME: "a table of another coverage was sent for it"}


def test_other_captured_sizes_are_another_coverage():
    other = small(2, graph=(1, 2))
    found = decide({0: GOOD, 1: encode_message(bring(other), {})})
    assert set(found.tables) == {NAME, canonical(other.evidence.coverage)}


def test_the_decision_does_not_depend_on_which_rank_sent_what():
    messages = [encode_message(bring(noisy(seed)), {}) for seed in range(4)]
    forward = encode_decision(decide(dict(enumerate(messages))))
    backward = encode_decision(decide(dict(enumerate(messages[::-1]))))
    assert forward == backward


def test_a_message_stays_small_however_many_buckets_there_are():
    table = small(
        1, shape=PADDED, eager=range(1, 301), graph=range(1, 301), max_tokens=300, rounds=5
    )
    message = encode_message(bring(table), {})
    assert len(message) <= MAX_BYTES
    assert len(encode_decision(decide({0: message}))) <= MAX_BYTES


# What comes of it on each rank


def world(size):
    store = dist.HashStore()
    return [Channel(rank, size, lambda: store) for rank in range(size)], store


def together(channels, tables, limit_s=30.0, failed=None):
    found = {}

    def take_part(channel):
        own = tables[channel.rank]
        missing = (failed or {}).get(channel.rank, {})
        found[channel.rank] = agree(bring(own) if own else {}, missing, channel, limit_s=limit_s)

    threads = [threading.Thread(target=take_part, args=(channel,)) for channel in channels]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert not any(thread.is_alive() for thread in threads)
    return found


def test_without_other_ranks_there_is_nothing_to_do():
    assert open_channel() is None
    assert agree(bring(TABLE), {}, None).tables == bring(TABLE)


def test_ranks_end_with_the_same_bytes():
    channels, _ = world(3)
    tables = [noisy(rank) for rank in range(3)]
    found = together(channels, tables)
    texts = {table.to_json() for agreed in found.values() for table in agreed.tables.values()}
    assert texts == {merged(*tables).to_json()}
    assert all(agreed.refused == {} == dict(agreed.problems) for agreed in found.values())


def test_a_warm_and_a_new_rank_end_with_the_same_table():
    """What was agreed before is brought again."""
    before = together(world(2)[0], [small(1), small(2)])[0].tables[COVERAGE]
    found = together(world(3)[0], [before, before, small(3)])
    assert {agreed.tables[COVERAGE] for agreed in found.values()} == {merged(before, small(3))}


def test_a_rank_that_never_comes_costs_all_tables_and_nothing_else():
    channels, _ = world(3)
    with listening() as lines:
        found = together(channels[:2], [small(1), small(2)], 0.2)
    for agreed in found.values():
        assert agreed.tables == {}
        assert "rank 2 did not take part in time" in agreed.problems[0]
        assert agreed.refused == {COVERAGE: "rank 2 did not take part in time"}
    assert lines == list(found[0].problems)


def test_each_coverage_is_told_agreed_or_not():
    channels, _ = world(2)
    found = {}

    def take_part(rank, tables, failed):
        found[rank] = agree(tables, failed, channels[rank], limit_s=30.0)

    other = OTHER.evidence.coverage
    thread = threading.Thread(target=take_part, args=(1, bring(small(3)), {other: "no memory"}))
    thread.start()
    with listening() as lines:
        take_part(0, bring(TABLE) | bring(OTHER), {})
    thread.join(30.0)
    assert set(found[0].tables) == set(found[1].tables) == {COVERAGE}
    assert found[0].refused == {other: "rank 1 could not calibrate it: no memory"}
    assert found[1].refused == {}
    why = "rank 1 could not calibrate it: no memory"
    assert lines == [f"{WITHOUT} {other.describe()}: {why}"] == list(found[0].problems)
    # A coverage that this rank has no table of is told by the name it has among the ranks.
    assert found[1].problems == (f"{WITHOUT} {canonical(other)}: {why}",)


def test_a_store_that_fails_costs_the_tables_and_one_line():
    def broken():
        raise ConnectionResetError("gone")

    with listening() as lines:
        found = agree(bring(TABLE), {}, Channel(1, 2, broken), limit_s=0.1)
    assert (found.tables, set(found.refused)) == ({}, {COVERAGE})
    assert lines == list(found.problems) == [found.refused[COVERAGE]]
    assert lines == [f"{WITHOUT} all shapes: ConnectionResetError: gone"]


def test_a_store_that_does_not_answer_costs_the_tables_and_the_time_that_was_given():
    never = threading.Event()
    found = agree(bring(TABLE), {}, Channel(1, 2, never.wait), limit_s=0.05)
    never.set()
    why = f"{WITHOUT} all shapes: the ranks' store did not answer within 0.15 s"
    assert (found.problems, found.refused) == ((why,), {COVERAGE: why})
    assert 0.15 <= found.seconds < 60.0


def test_of_many_missing_ranks_the_first_eight_are_told():
    few = "; ".join(f"rank {rank} did not take part in time" for rank in range(1, 9))
    for size, told in ((9, few), (11, f"{few}; and 2 more ranks")):
        with listening() as lines:
            found = agree(bring(TABLE), {}, world(size)[0][0], limit_s=0.05)
        assert found.refused == {COVERAGE: told}
        assert lines == list(found.problems) == [f"{WITHOUT} all shapes: {told}"]
        assert 0.05 <= found.seconds < 60.0


def test_a_rank_that_is_late_leaves_with_what_became_of_it():
    """Told by what `look` said, instead of waiting for an exchange that may never come."""
    (leader, late), _ = world(2)
    over = look(late, 0.1)
    agree(bring(TABLE), {}, leader, limit_s=0.1)
    found = agree(bring(TABLE), {}, late, limit_s=0.1, over=over)
    assert found.refused == {COVERAGE: "rank 1 did not take part in time"}


def test_a_table_that_nobody_brought_to_the_decision_is_refused():
    """A rank that was restarted reads what came of what it brought before."""
    (leader, rank), _ = world(2)
    assert together([leader, rank], [TABLE, TABLE])[1].tables
    again = replace(rank, turn=Turn())
    found = agree(bring(OTHER), {}, again, limit_s=0.1, over=0)
    assert (found.tables, found.problems) == ({}, ())
    assert found.refused == {OTHER.evidence.coverage: "the leader lost it"}


def test_one_rank_says_aloud_how_many_tables_all_run(caplog):
    with caplog.at_level(logging.DEBUG, "adaptive_moe"):
        found = together(world(2)[0], [TABLE, TABLE])
    seconds = {rank: f"{agreed.seconds:.3f} s" for rank, agreed in found.items()}
    told = sorted((record.levelno, record.getMessage()) for record in caplog.records)
    assert told == [
        (level, f"2 ranks run the same 1 tables, agreed in {seconds[rank]}")
        for rank, level in ((1, logging.DEBUG), (0, logging.INFO))
    ]
    assert all(0.0 < agreed.seconds < 60.0 for agreed in found.values())


def test_a_decision_that_cannot_be_read_costs_the_tables(monkeypatch):
    monkeypatch.setattr(exchange_module, "_decision", lambda *_: b"\x00")
    found = together(world(2)[0], [small(1), small(2)])
    assert all(agreed.tables == {} and agreed.problems for agreed in found.values())


def test_the_limit_grows_with_what_may_have_to_be_measured():
    assert limit_for(0, 0.75) == LIMIT_S
    assert limit_for(2, 60.0) == LIMIT_S + 240.0


def test_groups_of_the_same_ranks_have_channels_of_their_own(monkeypatch):
    """Two sub-groups with identical members, two uses of one group; and none for a rank alone."""

    class Group:
        def __init__(self, name):
            self.group_name = name

    members = {"a": [3, 5], "b": [3, 5], "alone": [5]}
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 5)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: members[group.group_name])
    shared = dist.HashStore()
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: shared)
    a, b, topic = open_channel(Group("a")), open_channel(Group("b")), open_channel(Group("a"), "x")
    assert (a.rank, a.size) == (1, 2)
    assert open_channel(Group("alone")) is None
    for channel in (a, b, topic):
        assert not channel.connect().check(["open"])
        channel.connect().set("open", "1")
    assert len({id(channel.turn) for channel in (a, b, topic)}) == 3
    again = open_channel(Group("a"))
    assert again.turn is a.turn
    assert again.connect().check(["open"])


# Real processes over gloo; `make faults` does more of the same.


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    out = tmp_path_factory.mktemp("faults") / "faults.json"
    names = ["noise", "faults", "rank_kills", "steps"]
    command = [sys.executable, "-m", "tests.faults", *names, "--short", "--out", str(out)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environ, check=False, capture_output=True, timeout=300)
    return json.loads(out.read_text())["runs"]


@pytest.mark.processes
def test_ranks_over_gloo_end_with_identical_tables(faults):
    for row in faults["noise"]["rows"]:
        assert row["policies_differed_before"] > 0
        assert row["identical_after"] == row["runs"] == 4


@pytest.mark.processes
def test_late_stopped_dead_and_silent_ranks(faults):
    assert faults["faults"]["failures"] == {}
    assert len(faults["faults"]["scenarios"]) == 13


@pytest.mark.processes
def test_ranks_killed_at_random_moments(faults):
    assert faults["rank_kills"]["failures"] == {}
    assert sum(faults["rank_kills"]["ends"].values()) == 4


@pytest.mark.processes
def test_ranks_that_are_out_of_step_are_back_at_the_next_exchange(faults):
    found = faults["steps"]
    assert found["failures"] == {}
    assert found["exchanges"] == found["back_in_step"] == 12
    assert len(found["events"]) >= 6
