"""next_step: which count to measure next, and how long, on made-up times."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_moe.policy.buckets import first_buckets
from adaptive_moe.policy.evidence import Rule
from adaptive_moe.policy.verdict import Choice, between, choose
from adaptive_moe.tuning.explore import SKETCH_ROUNDS, next_step
from tests.tables import bucket, result

RULE = Rule()
DOMAIN = range(1, 2049)
Times = Callable[[int], tuple[float, ...]]


def measured(num_tokens: int, times: tuple[float, ...], noise: float = 0.0) -> Choice:
    """Times of policy 0, 1, ... as fractions of policy 0's; three times the best is dropped."""
    results = [result("policy 0", 0.0)]
    for policy, us in enumerate(times[1:], start=1):
        gain, name = 1.0 - us / times[0], f"policy {policy}"
        dropped = us / min(times) if us > 3.0 * min(times) else None
        results.append(
            result(name, dropped=dropped)
            if dropped
            else result(name, gain, rounds=SKETCH_ROUNDS, noise=noise)
        )
    return choose(bucket(num_tokens, results), RULE, {}, presume_confirmed=True)


def explored(times: Times, domain=DOMAIN) -> tuple[dict[int, Choice], list[int]]:
    """Every step taken until none is worth it, and the counts that were not of the grid."""
    found = {n: measured(n, times(n)) for n in first_buckets(domain)}
    asked = dict.fromkeys(found, SKETCH_ROUNDS)
    added = []
    while step := next_step(found, asked, domain, RULE):
        added.append(step.num_tokens)
        found[step.num_tokens] = measured(step.num_tokens, times(step.num_tokens))
        asked[step.num_tokens] = step.rounds
    return found, added


def served(found: dict[int, Choice], num_tokens: int) -> str:
    if num_tokens in found:
        return found[num_tokens].candidate
    low = max(n for n in found if n < num_tokens)
    high = min(n for n in found if n > num_tokens)
    return between(found[low], found[high], RULE)


@pytest.mark.parametrize("at", [5, 17, 300, 1500])
def test_no_count_loses_much_around_a_crossover(at):
    def times(n: int) -> tuple[float, ...]:
        return 150.0, 50.0 + 50.0 * n / at, 100.0

    found, added = explored(times)
    assert len(added) < 12
    for n in DOMAIN:
        us = times(n)
        loss = us[int(served(found, n)[-1])] / min(us) - 1.0
        # A little more where so few counts lose it that measuring them would cost more.
        assert loss < 0.05


@pytest.mark.parametrize("threshold", [3, 90, 1111])
def test_a_sudden_change_of_winner_is_closed_in_on(threshold):
    found, _ = explored(lambda n: (100.0, 50.0, 200.0) if n <= threshold else (100.0, 200.0, 50.0))
    wrong = [n for n in DOMAIN if served(found, n) != f"policy {1 if n <= threshold else 2}"]
    assert len(wrong) <= 0.03 * threshold + 1


@pytest.mark.parametrize("threshold", [40, 1000])
def test_a_jump_of_the_baseline_between_two_buckets_that_keep_it_is_closed_in_on(threshold):
    """Policy 0 is a rule: it runs what 1 runs up to the threshold, and what 2 runs beyond."""
    found, added = explored(
        lambda n: (100.0, 100.0, 150.0) if n <= threshold else (100.0, 150.0, 100.0)
    )
    assert added
    low = max(n for n in found if n <= threshold)
    high = min(n for n in found if n > threshold)
    assert high <= 1.05 * low + 1


def test_where_nothing_differs_nothing_is_added():
    assert explored(lambda n: (100.0, 100.0, 101.0))[1] == []
    assert explored(lambda n: (100.0, 50.0, 101.0))[1] == []


@given(st.sets(st.integers(1, 500), min_size=1, max_size=20).map(sorted), st.integers(1, 500))
def test_it_ends_and_only_ever_measures_counts_of_the_domain(domain, at):
    found, added = explored(
        lambda n: (100.0, 20.0, 90.0) if n < at else (100.0, 90.0, 20.0), domain
    )
    assert set(found) <= set(domain)
    assert len(added) == len(set(added))


def test_the_costliest_gap_is_refined_first():
    found = {
        1: measured(1, (100.0, 100.0)),
        16: measured(16, (100.0, 90.0)),
        17: measured(17, (100.0, 90.0)),
        256: measured(256, (100.0, 250.0)),
    }
    step = next_step(found, dict.fromkeys(found, SKETCH_ROUNDS), range(1, 257), RULE)
    assert 17 < step.num_tokens < 256


def test_a_doubt_gets_twice_the_rounds_until_the_most():
    found = {n: measured(n, (100.0, 90.0), noise=0.2) for n in (1, 64)}
    step = next_step(found, {1: 6, 64: 12}, (1, 64), RULE)
    assert (step.num_tokens, step.rounds, step.more) == (64, 24, 12)
    assert next_step(found, {1: RULE.max_rounds, 64: RULE.max_rounds}, (1, 64), RULE) is None


def test_a_doubt_that_promises_nothing_is_left():
    found = {64: measured(64, (100.0, 130.0), noise=0.05)}
    assert next_step(found, {64: 6}, (64,), RULE) is None


def test_a_rival_that_cannot_gain_over_the_chosen_candidate_is_no_doubt():
    found = {64: measured(64, (100.0, 50.0, 95.0))}
    assert next_step(found, {64: 6}, (64,), RULE) is None
