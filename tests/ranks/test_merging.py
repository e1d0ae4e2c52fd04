"""The merge: a pure function of what ranks measured, which no jump on one of them can fool."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_moe.policy.buckets import bucket_of
from adaptive_moe.policy.decision import Result, Rule, Samples, Standing, confirm, decide
from adaptive_moe.policy.evidence import Bucket, Fill
from adaptive_moe.policy.situation import Situation
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.ranks.merging import VETOED, DisagreementError, merge
from adaptive_moe.ranks.summary import ORDER, Section, decode, encode, summarize
from tests.faults.made_up import EAGER, HERE, PADDED, SHAPE, made_up_table

quick = settings(max_examples=25)
seeds = st.integers(0, 10_000)
P0, P1, P2 = "policy 0", "policy 1", "policy 2"


def small(seed, **more):
    return made_up_table(
        seed, **{"eager": (1, 8, 64), "graph": (), "max_tokens": 64, "rounds": 12, **more}
    )


def noisy(seed):
    """Gains near the margin and refined anywhere, so that ranks decide differently; in all three
    situations."""
    chance = random.Random(seed)

    def counts(last):
        return sorted({1, 8, last, *chance.sample([n for n in (3, 5, 12, 16, 20) if n < last], 2)})

    return small(
        seed,
        gains=(0.0, 0.02, chance.choice((0.03, -0.05))),
        eager=counts(64),
        graph=counts(32),
        captured=range(1, 33),
        idle=counts(32),
        busy_from=33,
        speed=chance.uniform(0.8, 1.2),
        out=chance.choice((None, None, {2: (Standing.HOPELESS, "far slower")})),
    )


def merged(*tables):
    return merge([summarize(table.evidence) for table in tables])


def results(table, count, situation=Situation.BUSY):
    """By candidate, from the bucket measured at exactly that count."""
    (found,) = [b for b in table.evidence.section(situation) if b.num_tokens == count]
    return {r.candidate: r for r in found.fills[0].verdict.results}


def at(table, count):
    return table.candidate(count)


@quick
@given(seeds, st.booleans())
def test_a_rank_alone_decides_as_it_did(seed, padded):
    alone = replace_shape(seed) if padded else noisy(seed)
    assert merged(alone) == alone


def replace_shape(seed):
    return small(seed, shape=PADDED, gains=(0.0, 0.02, 0.03))


def test_an_interval_without_ends_has_none_after_merging_either():
    alone = small(1, rounds=2)
    assert results(alone, 8)[P1].gain is not None
    assert results(alone, 8)[P1].gain_low is None
    assert merged(alone) == alone


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
def test_no_rank_runs_what_one_that_measured_it_did_not_surely_gain_from(ranks):
    tables = [noisy(seed) for seed in ranks]
    found = merged(*tables)
    for situation in Situation:
        for bucket in found.evidence.section(situation):
            measured = [
                fill.verdict.result(bucket.candidate)
                for table in tables
                for other in table.evidence.section(situation)
                for fill in other.fills
                if other.num_tokens == bucket.num_tokens
            ]
            assert measured
            if bucket.candidate != P0:
                assert all(r.gain_low > found.evidence.rule.margin for r in measured)


def jumped(true_gain, times, rounds, at_round, count=8):
    """A table of one bucket whose baseline takes `times` as long from one round on, while the
    candidate is as fast as ever: what a clock that changes, or a neighbour, does to one rank."""
    chance = random.Random(rounds)
    base = [10.0 * chance.gauss(1.0, 0.003) for _ in range(rounds)]
    other = [(1.0 - true_gain) * us for us in base]
    base[at_round:] = [us * times for us in base[at_round:]]
    verdict = decide([Samples(P0, tuple(base)), Samples(P1, tuple(other))], Rule())
    buckets = (Bucket(count, verdict.candidate, verdict.reason, (Fill(1.0, verdict),)),)
    table = small(1, gains=(0.0, 0.0), eager=(8, 64))
    rest = table.evidence.busy[1:]
    return PolicyTable(replace(table.evidence, busy=(*buckets, *rest)))


@quick
@given(st.floats(1.2, 4.0), st.integers(4, 30), st.integers(0, 30), st.integers(1, 5))
def test_a_jump_of_the_baseline_on_one_rank_lifts_no_slower_candidate(times, rounds, start, honest):
    """20% slower was once called 48% faster: one rank's baseline, compared with another's time."""
    jumping = jumped(-0.2, times, rounds, min(start, rounds))
    others = [small(seed, gains=(0.0, -0.2), eager=(8, 64)) for seed in range(honest)]
    assert at(merged(jumping, *others), 8) == P0


@pytest.mark.parametrize("measured", [(8, 64), (4, 12, 64), (64,)])
def test_a_jump_where_no_other_rank_measured_is_vetoed_by_those_around(measured):
    jumping = jumped(-0.2, 3.0, 20, 0)
    assert at(jumping, 8) == P1
    others = small(2, gains=(0.0, -0.2), eager=measured)
    found = merged(jumping, others)
    assert at(found, 8) == P0
    if 8 not in measured:
        assert results(found, 8)[P1].reason == VETOED


def test_who_did_not_measure_a_count_has_no_say_for_it_but_a_veto():
    """B's bucket that serves 20 says policy 1 is no gain: that is not enough to stop A."""
    a = small(1, eager=(1, 16, 20, 64), gains=(0.0, 0.10))
    tied = small(2, eager=(1, 16, 64), gains=(0.0, 0.0))
    slower = small(2, eager=(1, 16, 64), gains=(0.0, -0.10))
    counts = [1, 16, 20, 64]
    for b, candidate in ((tied, P1), (slower, P0)):
        found = merged(a, b)
        assert [bucket.num_tokens for bucket in found.evidence.busy] == counts
        assert at(found, 20) == candidate
        assert at(found, 16) == P0
        assert results(found, 20)[P0].median_us == results(a, 20)[P0].median_us
    assert [bucket_of(20, [1, 16, 64])] == [2]


def test_only_the_bucket_that_serves_the_count_vetoes():
    """B is slower by policy 1 at 16 and below, which says nothing of 20."""
    a = small(1, eager=(8, 20, 64), gains=(0.0, 0.10))
    low, high = small(2, gains=(0.0, -0.10)), small(2, gains=(0.0, 0.10))
    busy = (*low.evidence.busy[:2], *high.evidence.busy[2:])
    b = PolicyTable(replace(low.evidence, busy=busy))
    found = merged(a, b)
    assert [at(found, n) for n in (8, 20, 64)] == [P0, P1, P1]


def test_the_least_gain_of_any_rank_decides():
    tables = [small(1, gains=(0.0, 0.10, 0.05)), small(2, gains=(0.0, -0.02, 0.05))]
    assert at(tables[0], 8) == P1
    assert at(merged(*tables), 8) == P2
    least = min(results(t, 8)[P2].gain for t in tables)
    lowest = min(results(t, 8)[P2].gain_low for t in tables)
    found = results(merged(*tables), 8)[P2]
    assert (found.gain, found.gain_low) == (least, lowest)


def test_the_time_of_the_slowest_rank_is_told():
    """Absolute times weigh fills and situations against each other; all wait for the slowest."""
    slow, fast = small(1, speed=1.0), small(2, speed=2.0)
    assert results(merged(slow, fast), 8)[P0].median_us == results(slow, 8)[P0].median_us


@pytest.mark.parametrize("standing", [Standing.WRONG, Standing.FAILED, Standing.HOPELESS])
def test_what_is_out_on_one_rank_is_out_on_all(standing):
    trusted = [small(seed, gains=(0.0, 0.3, 0.05)) for seed in range(3)]
    assert at(merged(*trusted), 8) == P1
    for counts in ((1, 8, 64), (2, 64)):
        bad = small(9, eager=counts, gains=(0.0, 0.3, 0.05), out={1: (standing, "lost a token")})
        found = merged(*trusted, bad)
        assert at(found, 8) == P2
        assert results(found, 8)[P1].standing is standing
        assert results(found, 8)[P1].reason == "lost a token"


def test_without_a_trusted_baseline_nothing_is_compared():
    bad = small(9, gains=(0.0, 0.3), out={0: (Standing.FAILED, "raised Boom")})
    found = merged(small(1, gains=(0.0, 0.3)), bad)
    assert at(found, 8) == P0
    assert "raised Boom" in found.evidence.busy[0].reason


def test_a_rank_without_time_for_a_count_does_not_silence_the_others():
    """Its bucket has no rounds: it measured nothing there, and has no vote."""
    full, empty = small(1, gains=(0.0, 0.3)), small(2, gains=(0.0, 0.3), rounds=0)
    assert at(full, 8) == P1
    assert at(merged(full, empty), 8) == P1
    for nothing in (merged(empty), merged(empty, empty)):
        verdict = nothing.evidence.busy[0].fills[0].verdict
        assert (verdict.candidate, verdict.settled, verdict.rounds) == (P0, False, 0)
        assert verdict.results[1] == Result(P1, Standing.UNSETTLED)
    broken = small(2, gains=(0.0, 0.3), rounds=0, out={1: (Standing.FAILED, "raised Boom")})
    assert at(merged(full, broken), 8) == P0


def test_the_rounds_told_are_the_fewest_of_those_who_voted():
    tables = [small(seed, rounds=rounds) for seed, rounds in enumerate((9, 12, 0))]
    assert {fill.verdict.rounds for b in merged(*tables).evidence.busy for fill in b.fills} == {9}


def test_where_one_rank_that_measured_did_not_time_a_candidate_the_others_do_not_speak_for_it():
    full = small(1, gains=(0.0, 0.3, 0.05))
    silent = summarize(full.evidence)
    for section in silent.sections:
        section.numbers[1:, :, 1] = float("nan")
        section.standing[:, 1] = 2  # unsettled
    found = merge([summarize(full.evidence), silent])
    assert at(full, 8) == P1
    assert at(found, 8) == P2


def test_fills_share_the_candidate_with_the_least_worst_loss_after_merging_too():
    """Full batches gain from policy 1, nearly empty ones lose more than that by it."""
    full = small(1, shape=PADDED, gains=(0.0, 0.1))
    empty = small(2, shape=PADDED, gains=(0.0, -0.6))
    buckets = tuple(
        replace(one, candidate=P0, fills=(other.fills[0], *one.fills[1:]))
        for one, other in zip(full.evidence.busy, empty.evidence.busy, strict=True)
    )
    mixed = PolicyTable(replace(full.evidence, busy=buckets))
    found = merged(mixed, mixed)
    assert [fill.verdict.candidate for fill in found.evidence.busy[0].fills] == [P0, P1, P1]
    assert at(found, 8) == P0


def test_a_fill_that_only_one_rank_measured_is_vetoed_by_the_nearest_of_the_others():
    """As captured sizes are measured as filled as they will be."""
    one = small(1, eager=(8,), gains=(0.0, 0.1), max_tokens=8)
    (bucket,) = one.evidence.busy

    def filled(table, fraction):
        (found,) = table.evidence.busy
        fills = (replace(found.fills[0], fraction=fraction),)
        return PolicyTable(replace(table.evidence, busy=(replace(found, fills=fills),)))

    slower = small(2, eager=(8,), gains=(0.0, -0.1), max_tokens=8)
    found = merged(filled(one, 0.5), filled(one, 1.0))
    assert [(f.fraction, f.verdict.candidate) for f in found.evidence.busy[0].fills] == [
        (0.5, P1),
        (1.0, P1),
    ]
    found = merged(filled(one, 0.5), filled(slower, 1.0))
    assert [f.verdict.candidate for f in found.evidence.busy[0].fills] == [P0, P0]
    assert bucket.candidate == P1


def test_ranks_that_were_offered_different_candidates_merge_the_common_ones():
    """By name, wherever they stand; who was not offered one may have a reason."""
    a = small(1, gains=(0.0, 0.3, 0.05), names=(P0, "flydsl", P2))
    b = small(2, gains=(0.0, 0.05, -0.1), names=(P0, P2, P1))
    found = merged(a, b)
    assert found.evidence.candidates == (P0, P2)
    assert at(found, 8) == P2
    assert merged(b, a) == found
    turned = small(3, names=(P0, P2, P1))
    assert merged(small(4), turned) == merged(turned, small(4))
    assert results(found, 8)[P2].gain == min(results(t, 8)[P2].gain for t in (a, b))


def test_another_baseline_is_another_question():
    a, b = small(1), small(2, names=(P2, P1, P0), rule=Rule(margin=0.02))
    with pytest.raises(DisagreementError) as raised:
        merged(a, b)
    fields = (
        "coverage.baseline ('policy 2', elsewhere 'policy 0'); rule.margin (0.02, elsewhere 0.01)"
    )
    assert str(raised.value) == f"ranks differ in {fields}"


@pytest.mark.parametrize("field", ["subject", "environment"])
def test_a_summary_of_something_else_is_named(field):
    odd = replace(summarize(small(1).evidence), **{field: "[]"})
    with pytest.raises(ValueError, match=f"^{field}: "):
        merge([odd])


def edited(seed=1, **arrays):
    """A rank's summary of 1, 8 and 64 tokens with other arrays in one situation: by name, what is
    put where."""
    found = summarize(small(seed, gains=(0.0, 0.3)).evidence)
    for name, (place, value) in arrays.items():
        getattr(found.sections[1], name)[place] = value
    return found


PLACE = {standing: place for place, standing in enumerate(ORDER)}


def told(table, count=8):
    """(standing, reason) of policy 1."""
    found = results(table, count)[P1]
    return found.standing, found.reason


def test_of_two_reasons_on_two_ranks_one_is_told_whoever_comes_first():
    """The worse standing's; of the same standing, the first in the alphabet; but never none."""
    wrong, failed = (
        [small(n, out={1: (standing, f"{word} token")}) for n, word in enumerate(("lost", "a", ""))]
        for standing in (Standing.WRONG, Standing.FAILED)
    )
    for tables in (wrong, wrong[::-1], [*failed, *wrong]):
        assert told(merged(*tables)) == (Standing.WRONG, " token")
    assert told(merged(failed[0], wrong[0])) == (Standing.WRONG, "lost token")
    silent = small(4, out={1: (Standing.WRONG, "")})
    assert told(merged(silent, wrong[0])) == told(merged(wrong[0], silent))
    assert told(merged(silent)) == (Standing.WRONG, "")


def test_a_rank_that_measured_nothing_in_one_situation_is_no_rank_there():
    full = small(1, gains=(0.0, 0.3))
    nothing, something = summarize(replace(full.evidence, busy=())), summarize(full.evidence)
    assert merge([nothing, something, nothing]) == merge([something]) == full


def test_times_are_of_ranks_that_voted_and_timed_the_candidate():
    """8 tokens is the second row. Without rounds a rank has no vote, and its time is not told;
    nor does a rank hide another's time that timed the baseline alone."""
    at_8 = (0, 1, 1)
    slow, silent = (edited(2, numbers=(at_8, value)) for value in (77.0, float("nan")))
    mine = edited(1, numbers=(at_8, 33.0))
    no_vote = edited(3, rounds=(1, 0), numbers=(at_8, 99.0))
    assert results(merge([mine, slow]), 8)[P1].median_us == 77.0
    assert results(merge([mine, silent, no_vote]), 8)[P1].median_us == 33.0
    assert results(merge([silent, silent]), 8)[P1].median_us is None


def test_an_interval_that_one_rank_cannot_tell_has_no_ends():
    open_ended = edited(2, numbers=((slice(2, 4), 1, 1), float("nan")))
    open_ended.sections[1].standing[1, 1] = PLACE[Standing.UNSETTLED]
    found = results(merge([edited(1), open_ended]), 8)[P1]
    assert found.gain == pytest.approx(0.3, abs=0.02)
    assert (found.gain_low, found.gain_high) == (None, None)


def test_a_veto_says_how_the_candidate_stands_where_it_was_measured():
    """A rank without 8 tokens vetoes there by its 64: what is out stays so with its own reason, or
    with none; what is surely slower is out there; what is merely no gain is no veto. One round is
    a measurement: whoever has it votes, and does not veto."""
    # Other reasons, before and after the veto's in the alphabet.
    here = replace(edited(), texts=("", "a token lost", "wrong"))

    def elsewhere(standing, eager=(1, 64), rounds=None):
        found = summarize(small(2, gains=(0.0, 0.3), eager=eager).evidence)
        found.sections[1].standing[1, 1] = PLACE[standing]
        if rounds is not None:
            found.sections[1].rounds[:] = rounds
        return found

    for standing, expected in (
        (Standing.TIED, (Standing.FASTER, "")),
        (Standing.SLOWER, (Standing.HOPELESS, VETOED)),
        (Standing.HOPELESS, (Standing.HOPELESS, "")),
        (Standing.FAILED, (Standing.FAILED, "")),
    ):
        assert told(merge([here, elsewhere(standing)])) == expected
    at_8 = elsewhere(Standing.SLOWER, (1, 8, 64), rounds=1)
    assert told(merge([here, at_8])) == (Standing.SLOWER, "")


def test_why_a_candidate_that_was_measured_is_no_gain_is_still_told():
    tied = edited(standing=((1, 1), PLACE[Standing.TIED]), reason=((1, 1), 1))
    found = merge([replace(tied, texts=("", "not confirmed")), edited(2)])
    assert told(found) == (Standing.TIED, "not confirmed")
    assert "policy 1 tied (not confirmed)" in found.evidence.busy[1].reason


@pytest.mark.parametrize("fills", [(1.0,), (0.5, 1.0)])
def test_of_too_many_counts_both_ends_and_those_that_most_ranks_measured_are_kept(fills):
    """With two candidates there is room for 178 rows. Of 1 to 400, one rank measured the counts
    below 51, two the others up to 399, and one the last. What failed at counts that are not kept
    says nothing of those that are."""

    def rank(counts):
        found = summarize(small(1, gains=(0.0, 0.3), eager=(1,), max_tokens=400).evidence)
        (row,) = found.sections[1:2]
        many = len(counts) * len(fills)
        tokens = np.repeat(np.array(counts, np.int32), len(fills))
        standing = np.repeat(row.standing, many, axis=0)
        standing[(tokens > 1) & (tokens < 51), 1] = PLACE[Standing.FAILED]
        busy = Section(
            tokens,
            np.tile(np.array(fills), len(counts)),
            np.repeat(row.rounds, many),
            standing,
            np.repeat(row.reason, many, axis=0),
            np.repeat(row.numbers, many, axis=1),
        )
        return replace(found, sections=(found.sections[0], busy, found.sections[2]))

    room = 178 // len(fills)
    found = merge([rank(range(1, 400)), rank(range(51, 401))]).evidence.busy
    assert [one.num_tokens for one in found] == [1, *range(51, 51 + room - 2), 400]
    assert {tuple(fill.fraction for fill in one.fills) for one in found} == {fills}
    assert {one.candidate for one in found} == {P1}


def test_who_is_not_confirmed_on_one_rank_runs_on_none():
    """Every standing has its place; this one is better than unsettled, and no more than that."""
    assert set(ORDER) == set(Standing)
    sure, waiting = small(1, gains=(0.0, 0.3)), small(2, gains=(0.0, 0.3))
    busy = tuple(unconfirmed(bucket) for bucket in waiting.evidence.busy)
    waiting = PolicyTable(replace(waiting.evidence, busy=busy))
    assert at(sure, 8) == P1
    found = merged(sure, waiting)
    assert at(found, 8) == P0
    assert results(found, 8)[P1].standing is Standing.UNCONFIRMED
    assert not found.settled


def unconfirmed(bucket):
    """The bucket before its winner was measured a second time."""
    verdict = confirm(bucket.fills[0].verdict, None, Rule())
    return Bucket(bucket.num_tokens, verdict.candidate, verdict.reason, (Fill(1.0, verdict),))


def test_too_few_rounds_are_no_verdict_after_merging_either():
    hasty = Rule(confidence=0.5, min_rounds=4)
    alone = small(1, gains=(0.0, 0.3), rounds=3, rule=hasty)
    assert results(alone, 8)[P1].gain_low > hasty.margin
    assert at(alone, 8) == at(merged(alone), 8) == P0


def test_the_budget_that_surely_was_given_is_the_least():
    found = merged(small(1, budget_s=0.75), small(2, budget_s=5.0))
    assert found.evidence.budget_s == 0.75


def test_machines_that_differ_are_named():
    other = replace(HERE, device="AMD Instinct MI325X", compute_units=256)
    found = merged(small(1), small(2, environment=other)).evidence.environment
    assert found.device == "AMD Instinct MI300X + AMD Instinct MI325X"
    assert found.compute_units == 256
    assert found.arch == HERE.arch


def test_far_too_many_buckets_still_fit_and_keep_both_ends():
    many = [
        made_up_table(
            seed,
            shape=PADDED,
            eager=range(seed, 301, 2),
            graph=range(1, 301),
            max_tokens=300,
            rounds=5,
        )
        for seed in (1, 2)
    ]
    parts = [encode(summarize(table.evidence)) for table in many]
    assert all(len(part) <= 64 * 1024 for part in parts)
    found = merge([decode(part) for part in parts])
    for buckets in (found.evidence.graph, found.evidence.busy):
        assert (buckets[0].num_tokens, buckets[-1].num_tokens) == (1, 300)
        assert len(buckets) > 20
    assert merged(found, found) == found


@quick
@given(seeds, st.booleans())
def test_a_summary_survives_its_encoding(seed, padded):
    table = replace_shape(seed) if padded else noisy(seed)
    before = summarize(table.evidence)
    after = decode(encode(before))
    assert plain_of(after) == plain_of(before)


def plain_of(summary):
    arrays = [getattr(s, n).tolist() for s in summary.sections for n in vars(s)]
    return repr((replace(summary, sections=()), arrays))


@pytest.mark.parametrize("wrong", [b"", b"{}\n", b"[1]\n", b'{"sections": [1, 1, 1]}\n', b"7\n"])
def test_what_is_no_summary_is_refused(wrong):
    good = encode(summarize(small(1).evidence))
    decode(good)
    for content in (
        wrong,
        good[:-1],
        good + b"x",
        good.replace(b'"seconds": 1.0', b'"seconds": -1'),
        good.replace(b'"seconds": 1.0', b'"seconds": "1"'),
        good.replace(b'"texts": [""]', b'"texts": []'),
        good.replace(b'"texts": [""]', b'"texts": [7]'),
        good.replace(b'"sections": [0, 3, 0]', b'"sections": [0, 3]'),
        good.replace(b'"sections": [0, 3, 0]', b'"sections": [0, -3, 0]'),
        good[:-1] + b"\xff",
    ):
        with pytest.raises(ValueError, match=r"."):
            decode(content)


@pytest.mark.parametrize(
    ("array", "place", "value"),
    [
        ("tokens", 0, 0),
        ("tokens", 1, 100),  # more than the next
        ("fraction", 0, -0.1),
        ("fraction", 0, 1.5),
        ("fraction", 0, float("nan")),
        ("rounds", 0, -1),
        ("standing", (0, 1), len(ORDER)),
        ("reason", (0, 1), 1),
        ("numbers", (0, 0, 1), 0.0),
        ("numbers", (0, 0, 1), float("inf")),
    ],
)
def test_a_number_that_cannot_be_is_refused(array, place, value):
    found = summarize(small(1).evidence)
    getattr(found.sections[1], array)[place] = value
    with pytest.raises(ValueError, match="out of bounds"):
        decode(encode(found))


def test_the_outermost_numbers_that_can_be_are_read():
    found = summarize(small(1).evidence)
    section = found.sections[1]
    section.fraction[0], section.rounds[0], section.numbers[0, 0, 1] = 0.0, 0, 0.25
    found = replace(found, texts=tuple(map(str, range(128))), seconds=0.0, budget_s=0.0)
    assert plain_of(decode(encode(found))) == plain_of(found)
    for wrong in (
        replace(found, texts=(*found.texts, "one more")),
        replace(found, seconds=float("inf")),
        replace(found, budget_s=float("nan")),
    ):
        with pytest.raises(ValueError, match="of another kind"):
            decode(encode(wrong))


def test_a_row_count_larger_than_any_array_is_refused():
    good = encode(summarize(small(1).evidence))
    with pytest.raises(ValueError, match="an array of shape"):
        decode(good.replace(b'"sections": [0, 3, 0]', b'"sections": [0, %d, 0]' % 10**30))


def test_made_up_ranks_do_differ():
    assert len({noisy(seed).eager for seed in range(10)}) > 3
    assert set(EAGER) >= {1, 8, 64}
    assert PADDED.num_local_tokens != SHAPE.num_local_tokens
