"""The judge, through what it makes of results: `choose` for one bucket, `choices` for a section."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_moe.policy.coverage import Coverage, Situation
from adaptive_moe.policy.evidence import Bucket, Exclusion, Rule
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.policy.verdict import (
    CLEAR_GAIN,
    LOT,
    LOTS,
    Choice,
    Standing,
    between,
    choose,
    gap_loss,
)
from adaptive_moe.shape import SortingShape
from tests.tables import bucket, make_evidence, result

RULE = Rule()
BASE = result("policy 0", 0.0)
gains = st.floats(-1.0, 0.6)


def judged(*results, **options) -> Choice:
    return choose(bucket(8, [BASE, *results]), RULE, {}, **options)


def standing(choice: Choice, name: str = "policy 1") -> Standing:
    return choice.device[0].judgement(name).standing


def one(gain, **fields):
    return result("policy 1", gain, **fields)


def two(gain, **fields):
    return result("policy 2", gain, **fields)


@pytest.mark.parametrize(
    ("gain", "noise", "expected"),
    [
        (0.10, 0.0, Standing.UNCONFIRMED),
        (0.011, 0.0, Standing.UNCONFIRMED),
        (0.009, 0.0, Standing.TIED),
        (0.0, 0.0, Standing.TIED),
        (-0.02, 0.0, Standing.TIED),
        (-0.03, 0.0, Standing.SLOWER),
        (0.10, 0.2, Standing.UNSETTLED),
        (0.0, 0.2, Standing.UNSETTLED),
    ],
)
def test_a_first_pass_places_a_candidate_by_its_interval(gain, noise, expected):
    assert standing(judged(one(gain, noise=noise))) is expected


def test_only_a_gain_that_both_passes_find_replaces_the_baseline():
    assert judged(one(0.2)).candidate == "policy 0"
    assert judged(one(0.2, second=0.2)).candidate == "policy 1"
    refuted = judged(one(0.2, second=-0.1))
    assert (refuted.candidate, refuted.settled) == ("policy 0", True)
    assert standing(refuted) is Standing.SLOWER
    assert judged(one(0.2), presume_confirmed=True).candidate == "policy 1"


def test_a_confirmed_gain_spans_both_passes():
    choice = judged(one(0.2, second=0.3, noise=0.001))
    found = choice.device[0].judgement("policy 1")
    assert found.gain == pytest.approx(0.25, abs=0.001)
    assert found.gain_low < 0.2
    assert found.gain_high > 0.3


@pytest.mark.parametrize(
    ("gain", "rounds", "expected"),
    [
        (CLEAR_GAIN + 0.05, LOT, Standing.FASTER),
        (CLEAR_GAIN - 0.05, LOT, Standing.UNCONFIRMED),
        (CLEAR_GAIN - 0.05, LOT * LOTS, Standing.FASTER),
    ],
)
def test_a_clear_gain_is_confirmed_by_one_lot_and_a_doubtful_one_by_three(gain, rounds, expected):
    first = one(gain)
    choice = judged(replace(first, second=replace(first.first, rounds=rounds)))
    assert standing(choice) is expected


def test_fewer_rounds_than_a_verdict_takes_settle_nothing():
    choice = judged(one(0.5, rounds=RULE.min_rounds - 1))
    assert (standing(choice), choice.settled) == (Standing.UNSETTLED, False)
    assert not judged(one(None)).settled


def test_of_winners_that_cannot_be_told_apart_the_surer_one_serves():
    noisy, steady = one(0.30, second=0.30, noise=0.08), two(0.29, second=0.29, noise=0.001)
    assert judged(noisy, steady).candidate == "policy 2"
    assert judged(one(0.4, second=0.4), steady).candidate == "policy 1"


def test_an_unsettled_rival_matters_only_while_it_might_overtake():
    winner = one(0.3, second=0.3)
    assert judged(winner, two(-0.1, noise=0.02)).settled
    assert not judged(winner, two(0.3, noise=0.2)).settled


@pytest.mark.parametrize(("gain", "settled"), [(0.02, False), (-0.03, True)])
def test_a_doubt_that_promises_nothing_leaves_a_bucket_settled(gain, settled):
    choice = judged(one(gain, noise=0.1))
    assert (standing(choice), choice.settled) == (Standing.UNSETTLED, settled)


@pytest.mark.parametrize("wrong", [True, False])
def test_an_excluded_candidate_never_serves_and_says_why(wrong):
    excluded = {"policy 1": Exclusion("policy 1", wrong, "returned nonsense")}
    results = [BASE, one(0.3, second=0.3), two(0.1, second=0.1)]
    choice = choose(bucket(8, results), RULE, excluded)
    assert choice.candidate == "policy 2"
    assert standing(choice) is (Standing.WRONG if wrong else Standing.FAILED)
    alone = choose(bucket(8, results[:2]), RULE, excluded)
    assert "returned nonsense" in alone.reason


def test_a_dropped_candidate_is_out_of_its_bucket_with_its_ratio():
    choice = judged(result("policy 1", dropped=3.46))
    assert (choice.candidate, choice.settled) == ("policy 0", True)
    assert "3.5 times the fastest at the first look" in choice.reason


@given(st.lists(st.tuples(gains, gains, st.floats(0.0, 0.1)), min_size=1, max_size=3))
def test_whatever_is_chosen_surely_beat_the_baseline_in_both_passes(measured):
    results = [
        result(f"policy {place}", first, second=second, noise=noise)
        for place, (first, second, noise) in enumerate(measured, start=1)
    ]
    choice = judged(*results)
    if choice.candidate != "policy 0":
        first, second, _ = measured[int(choice.candidate[-1]) - 1]
        assert min(first, second) > RULE.margin
        assert choice.candidate in choice.faster


# Fills: the host cannot know how many rows are real.


def filled(*gains_by_fill, **fields) -> Choice:
    fills = [[BASE, one(gain, second=gain if gain > 0 else None)] for gain in gains_by_fill]
    fractions = [2.0**-place for place in range(len(fills))]
    return choose(bucket(8, *fills, fractions=fractions), RULE, {})


def test_a_candidate_serves_all_fills_or_none():
    assert filled(0.3, 0.2).candidate == "policy 1"
    assert filled(0.3, 0.0).candidate == "policy 1"
    assert filled(0.3, -0.02).candidate == "policy 0"
    assert filled(0.0, 0.0).candidate == "policy 0"


# The host's time, below busy_from.


def section(*buckets: Bucket, busy_from: int = 100, rule: Rule = RULE) -> list[Choice]:
    shape = SortingShape(16, 4, 64)
    coverage = Coverage.up_to(shape, 200, busy_from=busy_from)
    evidence = make_evidence(buckets, coverage=coverage, rule=rule)
    return list(PolicyTable(evidence).choices(Situation.EAGER))


def timed(num_tokens: int, device: float, host: float, **fields) -> Bucket:
    second = device if device > RULE.margin else None
    measured = result("policy 1", device, second=second, host=host, **fields)
    return bucket(num_tokens, [result("policy 0", 0.0, host=0.0), measured])


@pytest.mark.parametrize(
    ("device", "host", "serves"),
    [
        (0.3, 0.0, True),  # 3 us of 10 saved on the device, none of 20 lost on the host
        (0.3, -0.1, True),  # 2 us lost on the host
        (0.3, -0.2, False),  # 4 us
        (0.0, 0.3, True),  # 6 us saved on the host, the device takes as long
        (-0.1, 0.3, False),  # 1 us lost on the device, in every step that it bounds
        (0.0, 0.0, False),
        (0.2, 0.2, True),
    ],
)
def test_below_busy_from_a_gain_in_one_time_must_cover_the_loss_in_the_other(device, host, serves):
    both = section(timed(8, device, host), timed(16, device, host))
    assert {choice.candidate == "policy 1" for choice in both} == {serves}


def test_from_busy_from_on_the_device_decides_alone():
    assert section(timed(100, 0.3, -2.0), timed(200, 0.3, -2.0))[0].candidate == "policy 1"


def test_one_bucket_alone_never_wins_by_the_host_s_time():
    assert section(timed(8, 0.0, 0.3), timed(100, 0.0, 0.3))[0].candidate == "policy 0"


def test_the_host_s_time_is_pooled_where_a_candidate_stands_alike_on_the_device():
    """Each bucket alone is too noisy to veto; where the baseline runs another kernel its launches
    differ, and the rounds say nothing about them."""
    alike = [timed(n, 0.3, -0.5, rounds=6, noise=0.001) for n in (8, 16, 32)]
    other = [timed(n, 0.0, 0.4) for n in (64, 96)]
    found = section(*alike, *other)
    assert [c.candidate for c in found] == ["policy 0"] * 3 + ["policy 1"] * 2


def test_without_the_host_s_time_the_device_decides():
    measured = [bucket(n, [BASE, one(0.3, second=0.3)]) for n in (8, 16)]
    assert [c.candidate for c in section(*measured)] == ["policy 1"] * 2


# Between two buckets.


def at(num_tokens: int, *gains: float) -> Choice:
    results = [
        result(f"policy {place}", gain, second=gain if gain > RULE.margin else None)
        for place, gain in enumerate(gains, start=1)
    ]
    return choose(bucket(num_tokens, [BASE, *results]), RULE, {})


def test_between_two_buckets_that_agree_their_candidate_serves():
    assert between(at(8, 0.3), at(64, 0.2), RULE) == "policy 1"


def test_in_an_open_gap_only_a_candidate_that_won_in_both_serves():
    assert between(at(8, 0.3, 0.5), at(64, 0.3, 0.1), RULE) == "policy 1"
    assert between(at(8, 0.3, -0.5), at(64, 0.3, 0.6), RULE) == "policy 1"
    assert between(at(8, -0.3, 0.5), at(64, 0.3, -0.5), RULE) == "policy 0"
    assert between(at(8, -0.2), at(64, 0.3), RULE) == "policy 0"


def test_what_a_gap_may_lose():
    assert gap_loss(at(8, 0.3), at(64, 0.3), RULE) == 0.0
    assert gap_loss(at(8, 0.0), at(64, 0.25), RULE) == pytest.approx(1 / 0.75 - 1.0)
    dropped = choose(bucket(8, [BASE, result("policy 1", dropped=4.0)]), RULE, {})
    assert gap_loss(dropped, at(64, 0.3), RULE) == float("inf")


def test_a_baseline_that_changes_its_algorithm_leaves_a_gap():
    """It takes as long as policy 1 below and as policy 2 above: somewhere between it jumps."""
    assert gap_loss(at(8, 0.0, -0.3), at(64, -0.3, 0.0), RULE) > 0.2
