"""Agreement: the merge is a pure function of what ranks measured, and no rank waits for ever."""

import json
import os
import random
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_moe.policy.buckets import bucket_of
from adaptive_moe.policy.decision import Rule, Standing
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.ranks.agreement import Channel, agree, open_channel
from adaptive_moe.ranks.merging import merge
from adaptive_moe.ranks.messages import (
    decide,
    encode_decision,
    encode_message,
    read_decision,
)
from adaptive_moe.ranks.summary import MAX_BYTES, canonical, decode, encode, summarize
from tests.faults.corrupt import listening
from tests.faults.made_up import EAGER, HERE, SHAPE, made_up_table

ROOT = Path(__file__).parents[2]
PADDED = replace(SHAPE, local_experts=32, num_local_tokens=True)
NAME = canonical(SHAPE)

quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10_000)


def small(seed, **more):
    return made_up_table(
        seed, **{"eager": (1, 8, 64), "graph": (), "max_tokens": 64, "rounds": 12, **more}
    )


def noisy(seed):
    """Gains near the margin and refined anywhere, so that ranks decide differently."""
    chance = random.Random(seed)
    counts = {1, 8, 64, *chance.sample((3, 5, 12, 16, 20, 32, 48), 3)}
    gains = (0.0, 0.02, chance.choice((0.03, -0.05)))
    return small(seed, gains=gains, eager=sorted(counts), speed=chance.uniform(0.8, 1.2))


def merged(*tables):
    return merge([summarize(table.evidence) for table in tables])


def results(table, count):
    """By policy, from the bucket measured at exactly that count."""
    (found,) = [b for b in table.evidence.eager if b.num_tokens == count]
    return {r.policy: r for r in found.fills[0].verdict.results}


def words(reason):
    return re.sub(r"[\d.]+%", "%", reason)


# The merge


@quick
@given(seeds)
def test_a_rank_alone_decides_as_it_did(seed):
    alone = noisy(seed)
    found = merged(alone)
    assert (found.eager, found.graph) == (alone.eager, alone.graph)
    for ours, theirs in zip(found.evidence.eager, alone.evidence.eager, strict=True):
        for mine, its in zip(ours.fills, theirs.fills, strict=True):
            assert mine.verdict.settled == its.verdict.settled
            # Not the percentages: what is merged was rounded once before.
            assert words(mine.verdict.reason) == words(its.verdict.reason)
            assert [r.standing for r in mine.verdict.results] == [
                r.standing for r in its.verdict.results
            ]


@quick
@given(st.lists(seeds, min_size=2, max_size=5, unique=True), st.randoms())
def test_the_order_of_ranks_does_not_matter_nor_do_repeats(ranks, chance):
    tables = [noisy(seed) for seed in ranks]
    shuffled = [*tables, tables[0]]
    chance.shuffle(shuffled)
    assert merged(*shuffled).to_json() == merged(*tables).to_json()


@quick
@given(st.lists(seeds, min_size=1, max_size=4))
def test_merging_what_was_merged_changes_nothing(ranks):
    once = merged(*(noisy(seed) for seed in ranks))
    restarted = PolicyTable.from_json(once.to_json())
    assert merged(restarted, restarted).to_json() == once.to_json()


@quick
@given(st.lists(seeds, min_size=1, max_size=4))
def test_no_rank_runs_what_one_of_them_did_not_surely_gain_from(ranks):
    """With ranks of one speed, a merged winner is beyond the margin on each rank's own evidence."""
    tables = [small(seed, gains=(0.0, 0.02, 0.03), noise=0.02) for seed in ranks]
    equal = [with_base_us(table, 10.0) for table in tables]
    found = merge(equal)
    for count in (1, 8, 64):
        policy = found.policy(count)
        lows = [results(table, count)[policy].gain_low for table in tables]
        assert policy == 0 or all(low is not None and low > 0.0099 for low in lows)


def with_base_us(table, base_us):
    summary = summarize(table.evidence)
    sections = [replace(s, base_us=np.full_like(s.base_us, base_us)) for s in summary.sections]
    return replace(summary, sections=tuple(sections))


def test_the_slowest_rank_decides():
    """All wait for it: what helps a rank that is twice as fast helps nobody."""
    helped, harmed = (0.0, 0.10), (0.0, -0.05)
    fast_helped = small(1, gains=helped, speed=2.0)
    slow_harmed = small(2, gains=harmed, speed=1.0)
    assert set(fast_helped.eager[1:]) == {1}
    assert set(merged(fast_helped, slow_harmed).eager[1:]) == {0}
    fast_harmed = small(3, gains=harmed, speed=2.0)
    slow_helped = small(4, gains=helped, speed=1.0)
    both = merged(fast_harmed, slow_helped)
    assert set(fast_harmed.eager[1:]) == {0}
    assert set(both.eager[1:]) == {1}
    for count in (1, 8, 64):
        slow, found = results(slow_helped, count), results(both, count)
        assert found[0].median_us == pytest.approx(slow[0].median_us, abs=1e-4)
        assert found[1].gain == pytest.approx(slow[1].gain, abs=1e-6)


def test_a_policy_that_costs_more_on_one_of_two_equal_ranks_is_not_run():
    tables = [small(1, gains=(0.0, 0.10, 0.05)), small(2, gains=(0.0, -0.02, 0.05))]
    assert set(tables[0].eager[1:]) == {1}
    assert set(merged(*tables).eager[1:]) == {2}


@pytest.mark.parametrize("standing", [Standing.WRONG, Standing.FAILED, Standing.HOPELESS])
def test_what_is_out_on_one_rank_is_out_on_all(standing):
    trusted = [small(seed, gains=(0.0, 0.3, 0.05)) for seed in range(3)]
    bad = small(9, gains=(0.0, 0.3, 0.05), out={1: (standing, "lost a token")})
    found = merged(*trusted, bad)
    assert set(merged(*trusted).eager[1:]) == {1}
    assert set(found.eager[1:]) == {2}
    assert results(found, 8)[1].standing is standing
    if standing is not Standing.HOPELESS:
        assert results(found, 8)[1].reason == "lost a token"


def test_without_a_trusted_policy_0_nothing_is_compared():
    bad = small(9, gains=(0.0, 0.3), out={0: (Standing.FAILED, "raised Boom")})
    found = merged(small(1, gains=(0.0, 0.3)), bad)
    assert set(found.eager[1:]) == {0}
    assert "policy 0 itself raised Boom" in found.evidence.eager[0].reason


def test_where_one_rank_measured_nothing_policy_0_stays():
    full, empty = small(1, gains=(0.0, 0.3)), small(2, gains=(0.0, 0.3), rounds=0)
    assert set(full.eager[1:]) == {1}
    assert set(merged(full, empty).eager[1:]) == {0}
    assert not merged(full, empty).evidence.eager[0].fills[0].verdict.settled


def test_where_one_rank_did_not_time_a_policy_the_others_do_not_speak_for_it():
    full = small(1, gains=(0.0, 0.3, 0.05))
    silent = summarize(full.evidence)
    for section in silent.sections:
        section.gains[..., 1] = np.nan
    found = merge([summarize(full.evidence), silent])
    assert set(full.eager[1:]) == {1}
    assert set(found.eager[1:]) == {2}


def test_a_count_one_rank_did_not_measure_is_served_by_its_own_bucket():
    """B has no bucket at 20: it speaks with the one at 32, and only its time is interpolated."""
    a = small(1, eager=(1, 16, 20, 32, 64), gains=(0.0, 0.10), noise=1e-4)
    b = small(2, eager=(1, 16, 32, 64), gains=(0.0, 0.05), noise=1e-4)
    found = merged(a, b)
    assert [bucket.num_tokens for bucket in found.evidence.eager] == [1, 16, 20, 32, 64]
    at_20, b_at_32 = results(found, 20), results(b, 32)
    assert at_20[1].gain == pytest.approx(b_at_32[1].gain, abs=1e-3)
    # Not B's time at 32, which would make the whole bucket look slower.
    assert at_20[0].median_us == pytest.approx(5.0 + 0.01 * 20, abs=0.01)
    known = [bucket.num_tokens for bucket in b.evidence.eager]
    assert known[bucket_of(20, known)] == 32


def test_fills_share_the_policy_with_the_least_worst_loss_after_merging_too():
    """Full batches gain from policy 1, nearly empty ones lose more than that by it."""
    full = small(1, shape=PADDED, gains=(0.0, 0.1))
    empty = small(2, shape=PADDED, gains=(0.0, -0.6))
    buckets = []
    for one, other in zip(full.evidence.eager, empty.evidence.eager, strict=True):
        fills = (other.fills[0], *one.fills[1:])
        buckets.append(replace(one, policy=0, fills=fills))
    mixed = PolicyTable(replace(full.evidence, eager=tuple(buckets)))
    assert [fill.verdict.policy for fill in buckets[0].fills] == [0, 1, 1]
    found = merged(mixed, mixed)
    assert [fill.verdict.policy for fill in found.evidence.eager[0].fills] == [0, 1, 1]
    assert set(found.eager[1:]) == {0}


def test_too_few_rounds_are_no_verdict_after_merging_either():
    hasty = Rule(confidence=0.5, min_rounds=4)
    alone = small(1, gains=(0.0, 0.3), rounds=3, rule=hasty)
    assert results(alone, 8)[1].gain_low > hasty.margin
    assert set(alone.eager[1:]) == {0}
    assert set(merged(alone).eager[1:]) == {0}


def test_machines_that_differ_are_named():
    other = replace(HERE, device="AMD Instinct MI325X", compute_units=256)
    found = merged(small(1), small(2, environment=other)).evidence.environment
    assert found.device == "AMD Instinct MI300X + AMD Instinct MI325X"
    assert found.compute_units == 256
    assert found.arch == HERE.arch


# Messages and the decision


@quick
@given(seeds, st.booleans())
def test_a_summary_survives_its_encoding(seed, padded):
    table = small(seed, shape=PADDED if padded else SHAPE, graph=(1, 2, 4))
    before = summarize(table.evidence)
    after = decode(encode(before))
    assert canonical_of(after) == canonical_of(before)


def canonical_of(summary):
    arrays = [getattr(s, n).tolist() for s in summary.sections for n in vars(s)]
    return repr((replace(summary, sections=()), arrays))


GOOD = encode_message({SHAPE: small(1)}, {})


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_a_rank_sends_no_table_has_a_policy_that_was_not_offered(data):
    """A damaged message voids all, or still gives a whole table of the policies offered."""
    place = data.draw(st.integers(0, len(GOOD)))
    cut = data.draw(st.integers(0, 40))
    bad = GOOD[:place] + data.draw(st.binary(max_size=8)) + GOOD[place + cut :]
    found = read_decision(encode_decision(decide({0: GOOD, 1: bad})))
    for text in found.tables.values():
        table = PolicyTable.from_json(text)
        assert set(table.eager) | set(table.graph) <= {0, 1, 2}
    assert found.tables or found.missing or found.voided


@pytest.mark.parametrize("wrong", [b"", b"{}\n", b"[1]\n", b'{"sizes": [1, 1, 1]}\n'])
def test_what_is_no_summary_is_refused(wrong):
    good = encode(summarize(small(1).evidence))
    for content in (
        wrong,
        good[:-1],
        good + b"x",
        good.replace(b'"seconds": 1.0', b'"seconds": -1'),
    ):
        with pytest.raises(ValueError, match=r"."):
            decode(content)


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


def test_a_shape_that_one_rank_could_not_calibrate_is_voided_and_others_are_not():
    other = replace(SHAPE, topk=4)
    have = encode_message({SHAPE: small(1), other: small(2, shape=other)}, {})
    failed = encode_message({SHAPE: small(3)}, {other: "out of memory"})
    found = decide({0: have, 1: failed})
    assert set(found.tables) == {NAME}
    assert found.voided == {canonical(other): "rank 1 could not calibrate it: out of memory"}


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"kernel": "aiter 0.1.8 opus"}, "kernel"),
        ({"max_tokens": 128}, "max_tokens"),
        ({"gains": (0.0, 0.05)}, "policies"),
        ({"graph": (1, 2)}, "has_graph"),
    ],
)
def test_ranks_that_asked_different_questions_name_the_field(more, field):
    found = decide({0: GOOD, 1: encode_message({SHAPE: small(2, **more)}, {})})
    assert found.tables == {}
    assert f"ranks differ in {field} (" in found.voided[NAME]


def test_the_decision_does_not_depend_on_which_rank_sent_what():
    messages = [encode_message({SHAPE: noisy(seed)}, {}) for seed in range(4)]
    forward = encode_decision(decide(dict(enumerate(messages))))
    backward = encode_decision(decide(dict(enumerate(messages[::-1]))))
    assert forward == backward


def test_far_too_many_buckets_still_fit_and_keep_both_ends():
    table = small(
        1, shape=PADDED, eager=range(1, 301), graph=range(1, 301), max_tokens=300, rounds=5
    )
    message = encode_message({PADDED: table}, {})
    assert len(message) <= MAX_BYTES
    found = decide({0: message})
    buckets = json.loads(found.tables[canonical(PADDED)])["eager"]
    assert (buckets[0]["num_tokens"], buckets[-1]["num_tokens"]) == (1, 300)
    assert len(buckets) > 40
    assert len(encode_decision(found)) <= MAX_BYTES


# Real processes over gloo; `make faults` does more of the same.


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    out = tmp_path_factory.mktemp("faults") / "faults.json"
    command = [sys.executable, "-m", "tests.faults", "noise", "faults", "rank_kills", "--short"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*command, "--out", str(out)],
        cwd=ROOT,
        env=environ,
        check=False,
        capture_output=True,
        timeout=300,
    )
    return json.loads(out.read_text())["runs"]


def test_ranks_over_gloo_end_with_identical_tables(faults):
    for row in faults["noise"]["rows"]:
        assert row["policies_differed_before"] > 0
        assert row["identical_after"] == row["runs"] == 4


def test_late_stopped_dead_and_silent_ranks(faults):
    assert faults["faults"]["failures"] == {}
    assert len(faults["faults"]["scenarios"]) == 12


def test_ranks_killed_at_random_moments(faults):
    assert faults["rank_kills"]["failures"] == {}
    assert sum(faults["rank_kills"]["ends"].values()) == 4


def test_made_up_ranks_do_differ():
    assert len({noisy(seed).eager for seed in range(10)}) > 3
    assert set(EAGER) >= {1, 8, 64}
