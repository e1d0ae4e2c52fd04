"""explore() on made-up times: which counts it measures, how long, and what it closes in on."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import NormalDist, fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_moe.policy.buckets import bucket_of
from adaptive_moe.policy.decision import Result, Rule, Samples, Standing, Verdict, decide
from adaptive_moe.policy.evidence import Bucket, Fill
from adaptive_moe.tuning.explore import (
    ERRORS,
    LOOK_ROUNDS,
    SKETCH_ROUNDS,
    WORTH_MEASURING,
    doubts,
    explore,
    gap_cost,
    gaps,
    looks,
    next_step,
    promised,
    surprises,
)

RULE = Rule()
quick = settings(max_examples=100)
Times = dict[int, float]
DOMAIN = range(1, 2049)
POWERS = [1 << k for k in range(12)]
LOOKS = 10  # one between each two from 2 to 2048


class Measured:
    """Buckets from exact times, or noisy ones where `noise` says so; and what was asked for."""

    def __init__(
        self, us: Callable[[int], Times], noise: Callable[[int], float] = lambda n: 1.0
    ) -> None:
        self.us, self.noise = us, noise
        self.asked: list[int] = []
        self.rounds: list[int] = []

    def rounds_of(self, num_tokens: int) -> list[int]:
        asked = zip(self.asked, self.rounds, strict=True)
        return [rounds for n, rounds in asked if n == num_tokens]

    def __call__(self, num_tokens: int, rounds: int) -> Bucket:
        self.asked.append(num_tokens)
        self.rounds.append(rounds)
        times, noise = self.us(num_tokens), self.noise(num_tokens)
        best = min(times.values())

        def samples(policy: int) -> tuple[float, ...]:
            us = times[policy]
            if policy == 0:
                return (us,) * rounds
            return ((us * noise, us / noise) * rounds)[:rounds]

        candidates = [
            Samples(f"policy {p}", samples(p))
            if p == 0 or times[p] < 3 * best
            else Samples(f"policy {p}", out=Standing.HOPELESS)
            for p in sorted(times)
        ]
        verdict = decide(candidates, RULE)
        return Bucket(num_tokens, verdict.candidate, verdict.reason, (Fill(1.0, verdict),))


def explored(
    us: Callable[[int], Times], domain: Sequence[int] = DOMAIN, wanted: Sequence[int] = ()
) -> tuple[dict[int, Bucket], list[int]]:
    measured = Measured(us)
    return explore(domain, wanted, RULE, measured, lambda: True), measured.asked


def around(found: dict[int, Bucket], threshold: int) -> tuple[int, int]:
    """The measured neighbours that have the threshold between them."""
    return max(n for n in found if n <= threshold), min(n for n in found if n > threshold)


def closed_in(found: dict[int, Bucket], threshold: int, lost: float) -> bool:
    """Whether what the gap may still lose is not worth measuring, averaged over an e-fold."""
    low, high = around(found, threshold)
    return high - low == 1 or lost * math.log(high / low) <= WORTH_MEASURING * RULE.margin


@settings(max_examples=60)
@given(st.integers(2, 2000))
def test_no_count_loses_more_than_three_margins_around_a_crossover(at: int) -> None:
    def us(num_tokens: int) -> Times:
        one, two = 5.0 + 5.0 * num_tokens / at, 10.0
        return {0: 1.5 * min(one, two), 1: one, 2: two}

    found, asked = explored(us)
    counts = sorted(found)
    for num_tokens in DOMAIN:
        times = us(num_tokens)
        applied = found[counts[bucket_of(num_tokens, counts)]].candidate
        lost = times[int(applied[-1])] / min(times.values()) - 1
        assert lost <= 3.01 * RULE.margin or lost / num_tokens <= RULE.margin / 10
    assert len(asked) <= 12 + 12 + LOOKS


def step(threshold: int, below: Times, above: Times) -> Callable[[int], Times]:
    return lambda num_tokens: below if num_tokens <= threshold else above


@settings(max_examples=60)
@given(st.integers(1, 2047))
def test_a_sudden_change_of_winner_is_closed_in_on(threshold: int) -> None:
    found, asked = explored(step(threshold, {0: 10, 1: 7, 2: 10}, {0: 10, 1: 10, 2: 7}))
    low, high = around(found, threshold)
    assert (found[low].candidate, found[high].candidate) == ("policy 1", "policy 2")
    assert closed_in(found, threshold, 10 / 7 - 1)
    assert threshold > 140 or (low, high) == (threshold, threshold + 1)
    assert len(asked) <= 12 + 12 + LOOKS


@settings(max_examples=60)
@given(st.integers(1, 2047))
def test_a_jump_of_policy_0_between_two_buckets_that_keep_it_is_closed_in_on(
    threshold: int,
) -> None:
    """Policy 0 runs what 1 runs up to the threshold and what 2 runs beyond it. It is tied at both
    ends of the gap, so only its twins betray the jump."""
    found, asked = explored(step(threshold, {0: 8, 1: 8, 2: 12}, {0: 8, 1: 12, 2: 8}))
    assert closed_in(found, threshold, 0.5)
    assert threshold > 140 or around(found, threshold) == (threshold, threshold + 1)
    assert all(bucket.candidate == "policy 0" for bucket in found.values())
    assert len(asked) <= 12 + 12 + LOOKS


@settings(max_examples=40)
@given(st.integers(1, 2047))
def test_the_count_at_which_a_winner_becomes_hopeless_is_found_exactly(threshold: int) -> None:
    found, _ = explored(step(threshold, {0: 10, 1: 7, 2: 9}, {0: 10, 1: 99, 2: 9}))
    assert (found[threshold].candidate, found[threshold + 1].candidate) == (
        "policy 1",
        "policy 2",
    )


def test_where_nothing_differs_only_the_first_buckets_are_kept_small_to_large() -> None:
    found, asked = explored(lambda num_tokens: {0: 10, 1: 8, 2: 11})
    assert asked[:12] == POWERS
    assert list(found) == POWERS
    assert {b.candidate for b in found.values()} == {"policy 1"}
    found, _ = explored(lambda num_tokens: {0: 10, 1: 10, 2: 12}, wanted=(5, 50))
    assert list(found) == [1, 5, 50, 2048]


def test_where_neighbours_agree_a_short_look_between_them_at_an_odd_count() -> None:
    measured = Measured(lambda num_tokens: {0: 10, 1: 8, 2: 11})
    explore(DOMAIN, (), RULE, measured, lambda: True)
    looked = measured.asked[12:]
    assert len(looked) == LOOKS
    assert all(n % 2 for n in looked)
    assert set(measured.rounds[12:]) == {LOOK_ROUNDS}
    for low, high in pairwise(POWERS[1:]):
        assert [low < n < high for n in looked].count(True) == 1


def test_what_can_be_captured_is_all_that_is_looked_at() -> None:
    sizes = [1, 2, 4, *range(8, 513, 8)]
    _, asked = explored(lambda num_tokens: {0: 10, 1: 8, 2: 11}, domain=sizes)
    assert set(asked) <= set(sizes)


@settings(max_examples=60)
@given(st.floats(5.0, 10.5), st.sampled_from((0, 1)))
def test_a_window_of_half_an_octave_is_found_though_both_ends_agree(
    start: float, outside: int
) -> None:
    """Policy 2 is a fifth faster from 2**start to a little over half an octave above."""
    low, high = 2.0**start, 2.0 ** (start + 0.55)
    usual = {0: 10.0, 1: 10.0, 2: 12.0} | {outside: 9.0}

    def us(num_tokens: int) -> Times:
        return {0: 10.0, 1: 10.0, 2: 8.0} if low <= num_tokens <= high else usual

    found, _ = explored(us)
    counts = sorted(found)
    inside = [n for n in DOMAIN if low <= n <= high]
    served = [found[counts[bucket_of(n, counts)]].candidate == "policy 2" for n in inside]
    assert sum(served) >= 0.8 * len(inside) - 1


def test_buckets_that_are_known_are_built_upon_and_not_measured_again() -> None:
    us = step(100, {0: 10, 1: 7, 2: 10}, {0: 10, 1: 10, 2: 7})
    known, _ = explored(us)
    again = Measured(us)
    found = explore(DOMAIN, (), RULE, again, lambda: True, known)
    assert found == known
    # All that is done again are looks, which leave nothing behind.
    assert set(again.rounds) <= {LOOK_ROUNDS}
    fewer = {n: b for n, b in known.items() if n not in (64, 128)}
    again = Measured(us)
    explore(DOMAIN, (), RULE, again, lambda: True, fewer)
    assert again.asked[:2] == [64, 128]


times = st.fixed_dictionaries({p: st.sampled_from((5.0, 9.0, 10.0, 10.1, 40.0)) for p in (0, 1, 2)})


@settings(max_examples=40)
@given(
    st.sets(st.integers(1, 400), min_size=1, max_size=40).map(sorted),
    st.lists(times, min_size=1, max_size=6),
    st.sampled_from((1.0, 1.02, 1.5)),
)
def test_it_ends_and_only_ever_measures_counts_of_the_domain(
    domain: list[int], wild: list[Times], noise: float
) -> None:
    measured = Measured(lambda n: wild[n % len(wild)], lambda n: noise if n % 2 else 1.0)
    found = explore(domain, (), RULE, measured, lambda: True)
    assert set(found) <= set(measured.asked) <= set(domain)
    # What is not kept was looked at, and once.
    for count in set(measured.asked) - set(found):
        assert measured.rounds_of(count) == [LOOK_ROUNDS]
    # A count is sketched once, and each time it is gone on with it gets twice the rounds.
    for count in found:
        rounds = measured.rounds_of(count)
        rounds = rounds[rounds[0] == LOOK_ROUNDS :]
        assert rounds[0] == SKETCH_ROUNDS
        assert rounds[1:] == [min(2 * r, RULE.max_rounds) for r in rounds[:-1]]
        assert len(rounds) == len(set(rounds))
    # It ended because nothing that matters is left to refine, not because it gave up.
    for low, high in pairwise(sorted(found)):
        if gap_cost(found[low], found[high], RULE) > WORTH_MEASURING * RULE.margin:
            assert not [n for n in domain if low < n < high]


def test_without_time_only_the_first_buckets_are_measured() -> None:
    measured = Measured(step(100, {0: 10, 1: 7}, {0: 10, 1: 14}))
    explore(DOMAIN, (), RULE, measured, lambda: False)
    assert measured.asked == POWERS


def test_refinement_stops_when_time_is_up() -> None:
    measured = Measured(step(100, {0: 10, 1: 7}, {0: 10, 1: 14}))
    explore(DOMAIN, (), RULE, measured, lambda: len(measured.asked) < 14)
    assert len(measured.asked) == 14
    assert max(measured.rounds) < RULE.max_rounds


def test_the_costliest_gap_is_refined_first() -> None:
    def us(num_tokens: int) -> Times:
        if num_tokens <= 10:
            return {0: 10, 1: 9}  # little is lost around 10 ...
        return {0: 10, 1: 12} if num_tokens <= 500 else {0: 10, 1: 4}  # ... and much around 500

    measured = Measured(us)
    wanted = (1, 8, 16, 256, 1024)
    explore(range(1, 1025), wanted, RULE, measured, lambda: len(measured.asked) < 6)
    assert 256 < measured.asked[5] < 1024
    found = {n: measured(n, 12) for n in wanted}
    costs = {step.num_tokens: step.saves for step in gaps(found, DOMAIN, RULE)}
    assert sorted(costs) == [3, 11, 64, 512]
    assert costs[512] > costs[11] > 0
    assert costs[3] == costs[64] == 0


def test_the_wider_of_two_gaps_that_lose_alike_costs_more() -> None:
    measured = Measured(lambda n: {0: 10, 1: 8} if n in (4, 64) else {0: 10, 1: 12})
    four, eight, sixty_four, thousand = (measured(n, 12) for n in (4, 8, 64, 1024))
    assert gap_cost(sixty_four, thousand, RULE) > gap_cost(four, eight, RULE) > 0


def test_the_worst_of_several_fills_decides_what_a_gap_costs() -> None:
    measured = Measured(lambda n: {0: 10, 1: 8} if n == 4 else {0: 10, 1: 12})
    same, differs = measured(4, 12).fills[0], measured(8, 12).fills[0]
    low = Bucket(4, "policy 1", "", (same, same))
    assert gap_cost(low, Bucket(8, "policy 1", "", (same, same)), RULE) == 0
    cost = gap_cost(low, Bucket(8, "policy 1", "", (same, differs)), RULE)
    assert cost == pytest.approx(0.25 * math.log(2))


def test_doubts_are_settled_the_most_promising_first_until_they_are_or_promise_too_little() -> None:
    gains = {4: 0.03, 16: 0.10, 64: 0.06}
    measured = Measured(
        lambda n: {0: 10.0, 1: 10.0 * (1 - gains.get(n, 0.0))},
        noise=lambda n: 1.1 if n in gains else 1.0,
    )
    found = explore((1, 4, 16, 64, 256), (1, 4, 16, 64, 256), RULE, measured, lambda: True)
    assert sorted(set(measured.asked[5:]), key=measured.asked[5:].index) == [16, 64, 4]
    assert measured.rounds_of(1) == measured.rounds_of(256) == [SKETCH_ROUNDS]
    assert [found[n].candidate for n in (16, 64)] == ["policy 1"] * 2
    assert max(measured.rounds_of(16)) < max(measured.rounds_of(64))


def test_a_doubt_without_promise_is_not_worth_more_rounds() -> None:
    measured = Measured(lambda n: {0: 10.0, 1: 9.99}, noise=lambda n: 1.05 if n in (4, 16) else 1.0)
    found = explore((1, 4, 16), (1, 4, 16), RULE, measured, lambda: True)
    assert measured.rounds_of(1) == [SKETCH_ROUNDS]
    assert max(measured.rounds) <= 4 * SKETCH_ROUNDS
    assert not found[4].fills[0].verdict.settled


def test_a_rival_that_cannot_gain_over_the_chosen_policy_is_no_doubt() -> None:
    chosen = Result("policy 1", Standing.FASTER, 8.0, 0.20, 0.15, 0.25)
    base = Result("policy 0", Standing.BASELINE, 10.0, 0.0)

    def verdict(high: float) -> Verdict:
        rival = Result("policy 2", Standing.UNSETTLED, 8.1, 0.19, 0.10, high)
        return Verdict("policy 1", False, SKETCH_ROUNDS, "", (base, chosen, rival))

    assert promised(verdict(0.24), RULE) == 0.0
    assert 0.0 < promised(verdict(0.35), RULE) < 0.05


def unsure(num_tokens: int, gain: float, high: float) -> Bucket:
    base = Result("policy 0", Standing.BASELINE, 10.0, 0.0)
    rival = Result("policy 1", Standing.UNSETTLED, 9.0, gain, 2 * gain - high, high)
    verdict = Verdict("policy 0", False, SKETCH_ROUNDS, "", (base, rival))
    return Bucket(num_tokens, "policy 0", "", (Fill(1.0, verdict),))


@quick
@given(st.floats(-0.2, 0.5), st.floats(0.001, 0.5), st.floats(0.001, 0.3))
def test_a_doubt_promises_more_the_more_it_seems_to_gain_and_never_less_than_that(
    gain: float, width: float, more: float
) -> None:
    def promise(gain: float) -> float:
        return promised(unsure(8, gain, gain + width).fills[0].verdict, RULE)

    assert promise(gain) <= promise(min(gain + more, 0.8))
    assert promise(gain) == 0.0 or promise(gain) >= gain


@pytest.mark.parametrize(("gain", "width"), [(0.10, 0.15), (-0.02, 0.30), (0.05, 0.01), (0.0, 0.2)])
def test_a_doubt_promises_the_mean_of_what_it_may_gain(gain: float, width: float) -> None:
    likely = NormalDist(gain, width / ERRORS)
    mean = fmean(max(likely.inv_cdf((i + 0.5) / 2000), 0.0) for i in range(2000))
    promise = promised(unsure(8, gain, gain + width).fills[0].verdict, RULE)
    assert promise == pytest.approx(mean / (1.0 - gain), rel=0.01)


def test_a_doubt_without_an_interval_promises_what_it_seems_to_gain() -> None:
    base = Result("policy 0", Standing.BASELINE, 10.0, 0.0)
    rival = Result("policy 1", Standing.UNSETTLED, 8.0, 0.2)
    assert promised(Verdict("policy 0", False, 2, "", (base, rival)), RULE) == pytest.approx(0.25)


def test_a_doubt_is_asked_for_twice_the_rounds_and_worth_the_counts_it_serves() -> None:
    found = {n: unsure(n, 0.10, 0.25) for n in (4, 8, 64)}
    asked = {4: 10, 8: 40, 64: RULE.max_rounds}
    four, eight = doubts(found, asked, RULE)
    assert (four.num_tokens, four.rounds, four.more) == (4, 20, 10)
    assert (eight.num_tokens, eight.rounds, eight.more) == (8, 80, 40)
    # It serves 1 to 4, or 5 to 8.
    assert four.saves / eight.saves == pytest.approx(math.log(5) / math.log(9 / 5))


def test_of_two_doubts_alike_the_one_that_takes_fewer_rounds_comes_first() -> None:
    found = {n: unsure(n, 0.10, 0.25) for n in (1, 8, 64)}
    few, many = {1: 200, 8: 10, 64: 40}, {1: 200, 8: 160, 64: 40}
    by_few, by_many = (next_step(found, asked, (1, 8, 64), RULE) for asked in (few, many))
    assert by_few is not None
    assert by_many is not None
    # 64 serves more counts, and so would save more; but not four times as much.
    assert (by_few.num_tokens, by_many.num_tokens) == (8, 64)


def test_time_goes_to_a_clear_gap_before_a_doubt_that_promises_little() -> None:
    """A crossover with 20% at stake, and everywhere else a policy that may be 1% faster."""

    def us(num_tokens: int) -> Times:
        return {0: 10, 1: 8, 2: 9.9} if num_tokens <= 700 else {0: 10, 1: 12, 2: 9.9}

    measured = Measured(us, noise=lambda n: 1.05)
    explore(DOMAIN, (), RULE, measured, lambda: len(measured.asked) < 12 + 2)
    assert all(512 < n < 1024 for n in measured.asked[12:])


@pytest.mark.parametrize(
    ("domain", "low", "high", "count"),
    [
        (DOMAIN, 100, 151, 123),  # halfway, in ratio
        (DOMAIN, 100, 160, 125),  # odd: 126 less 1
        (DOMAIN, 1, 4, 2),  # as 1 is measured
        (DOMAIN, 100, 150, None),  # narrow
        (DOMAIN, 1, 2, None),
        ((100, 110, 126, 160), 100, 160, 126),  # 125 is not of the domain
        ((100, 160), 100, 160, None),
    ],
)
def test_a_look_is_halfway_into_a_wide_gap_and_may_save_a_margin_over_all_of_it(
    domain: Sequence[int], low: int, high: int, count: int | None
) -> None:
    measured = Measured(lambda n: {0: 10, 1: 8})
    found = {n: measured(n, 12) for n in (low, high)}
    wanted = [] if count is None else [(count, LOOK_ROUNDS, LOOK_ROUNDS, high)]
    steps = list(looks(found, domain, RULE))
    assert [(s.num_tokens, s.rounds, s.more, s.above) for s in steps] == wanted
    assert [s.saves for s in steps] == pytest.approx([0.01 * math.log(high / low)] * len(steps))
    # Nor twice, nor where the gap costs something by itself.
    assert not wanted or next_step(found, {low: 500, high: 500}, domain, RULE) == steps[0]
    assert next_step(found, {low: 500, high: 500}, domain, RULE, {count}) is None
    differs = Measured(lambda n: {0: 10, 1: 8 if n == low else 12})
    assert list(looks({n: differs(n, 12) for n in (low, high)}, domain, RULE)) == []


@pytest.mark.parametrize(("us", "surprised"), [(7.0, False), (8.23, False), (8.25, True)])
def test_a_look_surprises_where_the_choice_above_loses_more_than_three_margins(
    us: float, surprised: bool
) -> None:
    above = Measured(lambda n: {0: 10, 1: 8, 2: 9})(64, 12)
    look = Measured(lambda n: {0: 10, 1: us, 2: 8})(45, 2)
    assert surprises(look, above, RULE) is surprised


def test_where_nothing_is_to_be_saved_no_step_is_worth_taking() -> None:
    """Even by a rule for which the smallest saving matters."""
    exact = Rule(margin=0.0)
    measured = Measured(lambda n: {0: 10, 1: 8})
    found = {n: measured(n, 12) for n in (1, 2048)}
    assert next_step(found, {1: 12, 2048: 12}, DOMAIN, exact) is None
    assert not surprises(measured(45, 2), found[2048], exact)


def test_only_who_is_unsettled_and_was_measured_promises_more_than_a_tie_can_be() -> None:
    base = Result("policy 0", Standing.BASELINE, 10.0, 0.0)

    def promise(*others: Result) -> float:
        return promised(Verdict("policy 0", False, 2, "", (base, *others)), Rule(margin=0.02))

    unsettled = Result("policy 1", Standing.UNSETTLED, 9.0, 0.1)
    assert promise() == 0.0
    assert promise(unsettled) == pytest.approx(1 / 9)
    assert promise(unsettled, Result("policy 2", Standing.UNSETTLED)) == pytest.approx(1 / 9)
    assert promise(unsettled, Result("policy 2", Standing.TIED, 5.0, 0.5)) == pytest.approx(1 / 9)
    # Of two the better one.
    better = Result("policy 2", Standing.UNSETTLED, 8.0, 0.2)
    assert promise(unsettled, better) == promise(better, unsettled) == pytest.approx(0.25)
    # A tie is no more than 2.5 margins.
    assert promise(Result("policy 1", Standing.UNSETTLED, 9.5, 0.05)) == 0.0
    assert promise(Result("policy 1", Standing.UNSETTLED, 9.4, 0.06)) == pytest.approx(6 / 94)
