"""decide() and confirm() on made-up samples."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_moe.policy.decision import (
    OPEN,
    OUT,
    Result,
    Rule,
    Samples,
    Standing,
    Verdict,
    conclude,
    confirm,
    decide,
    standing_of,
)
from adaptive_moe.policy.interval import PRIOR_ROUNDS
from adaptive_moe.policy.plain import from_plain, to_plain

RULE = Rule()

quick = settings(max_examples=60)
microseconds = st.floats(1.0, 1e4)


@st.composite
def measured(draw: st.DrawFn, standings: tuple[Standing | None, ...] = (None,)) -> list[Samples]:
    """Policy 0 and up to three others with any times and any number of rounds up to its own."""
    rounds = draw(st.integers(0, 24))
    found = [
        Samples("policy 0", tuple(draw(st.lists(microseconds, min_size=rounds, max_size=rounds))))
    ]
    for policy in range(1, draw(st.integers(1, 4))):
        times = draw(st.lists(microseconds, max_size=rounds))
        found.append(
            Samples(f"policy {policy}", tuple(times), draw(st.sampled_from(standings)), "made up")
        )
    return found


@st.composite
def steady(draw: st.DrawFn) -> list[Samples]:
    """Three policies 30% apart at most, under a few percent of noise: any standing can come out."""
    rng = random.Random(draw(st.integers(0, 1 << 30)))
    rounds = draw(st.integers(2, 24))
    sigma = draw(st.sampled_from((0.002, 0.02, 0.1)))
    return [
        Samples(
            f"policy {p}", tuple(10.0 * us * math.exp(rng.gauss(0, sigma)) for _ in range(rounds))
        )
        for p, us in enumerate([1.0, *draw(st.tuples(*[st.floats(0.7, 1.3)] * 2))])
    ]


def noisy(policy: int, us: float, rounds: int, seed: int, sigma: float = 0.02) -> Samples:
    rng = random.Random(f"{seed} {policy}")
    return Samples(
        f"policy {policy}", tuple(us * math.exp(rng.gauss(0, sigma)) for _ in range(rounds))
    )


def stands(verdict: Verdict, candidate: str) -> Standing:
    return next(r.standing for r in verdict.results if r.candidate == candidate)


@quick
@given(st.lists(microseconds, min_size=8, max_size=40))
def test_identical_samples_keep_policy_0_and_are_tied(times: list[float]) -> None:
    verdict = decide([Samples(f"policy {policy}", tuple(times)) for policy in (0, 1, 2)], RULE)
    assert (verdict.candidate, verdict.settled) == ("policy 0", True)
    assert [r.standing for r in verdict.results[1:]] == [Standing.TIED, Standing.TIED]


@settings(max_examples=200)
@given(st.lists(st.sampled_from((1.0, 1e3, 1e6)), min_size=2, max_size=12), st.integers(0, 3))
def test_a_verdict_on_a_machine_that_stalls_is_read_as_it_was_written(
    stalls: list[float], more: int
) -> None:
    """Its intervals are as wide as they come; a file that nobody can read is measured again."""
    times = [50.0 * stall for stall in stalls]
    baseline = Samples("policy 0", (50.0,) * (len(times) + more))
    verdict = decide([baseline, Samples("policy 1", tuple(times))], RULE)
    assert from_plain(Verdict, to_plain(verdict)) == verdict


@settings(max_examples=200)
@given(st.one_of(measured((None, *OUT)), steady()))
def test_nothing_but_a_faster_offered_policy_replaces_policy_0(candidates: list[Samples]) -> None:
    verdict = decide(candidates, RULE)
    offered = {c.candidate: c for c in candidates}
    assert [r.candidate for r in verdict.results] == list(offered)
    for result in verdict.results:
        if result.standing is Standing.FASTER:
            assert result.gain_low is not None
            assert result.gain_low > RULE.margin
            assert len(offered[result.candidate].round_us) >= RULE.min_rounds
    if verdict.candidate != "policy 0":
        assert offered[verdict.candidate].out is None
        assert stands(verdict, verdict.candidate) is Standing.FASTER
    elif verdict.settled:
        assert Standing.FASTER not in {r.standing for r in verdict.results}


@quick
@given(steady(), st.data())
def test_what_slows_a_whole_round_or_all_rounds_changes_nothing(
    candidates: list[Samples], data: st.DataObject
) -> None:
    rounds = len(candidates[0].round_us)
    # Powers of two scale floating-point numbers exactly, so that equality can be exact, too.
    powers = data.draw(st.lists(st.integers(-5, 5), min_size=rounds, max_size=rounds))
    scaled = [
        Samples(
            c.candidate, tuple(math.ldexp(t, k) for t, k in zip(c.round_us, powers, strict=False))
        )
        for c in candidates
    ]
    assert _without_times(decide(candidates, RULE)) == _without_times(decide(scaled, RULE))


def _without_times(verdict: Verdict) -> object:
    results = [(r.candidate, r.standing, r.gain, r.gain_low, r.gain_high) for r in verdict.results]
    return verdict.candidate, verdict.settled, verdict.reason, results


@quick
@given(st.integers(0, 1 << 30), st.sampled_from((1, 2)))
def test_a_clearly_faster_policy_wins_and_says_by_how_much(seed: int, better: int) -> None:
    times = {0: 10.0, 1: 10.0, 2: 10.0, better: 8.5}
    verdict = decide([noisy(p, us, 30, seed) for p, us in times.items()], RULE)
    assert (verdict.candidate, verdict.settled) == (f"policy {better}", True)
    assert f"policy {better} saves" in verdict.reason
    result = verdict.results[better]
    assert result.gain == pytest.approx(0.15, abs=0.03)
    assert result.gain_low < 0.15 < result.gain_high


def test_the_faster_of_two_faster_policies_wins() -> None:
    verdict = decide([noisy(p, us, 40, 0) for p, us in enumerate((10.0, 8.5, 7.0))], RULE)
    assert verdict.candidate == "policy 2"
    assert stands(verdict, "policy 1") is Standing.FASTER


def test_an_unsettled_rival_that_may_still_overtake_keeps_the_bucket_open() -> None:
    base, good = Samples("policy 0", (10.0,) * 12), Samples("policy 1", (9.0,) * 12)
    wild = Samples("policy 2", (5.0, 15.0) * 6)
    verdict = decide([base, good, wild], RULE)
    assert (verdict.candidate, verdict.settled) == ("policy 1", False)
    behind = decide([base, good, Samples("policy 2", (9.5, 10.1) * 6)], RULE)
    assert stands(behind, "policy 2") is Standing.UNSETTLED
    assert (behind.candidate, behind.settled) == ("policy 1", True)


def test_a_clearly_slower_policy_is_slower_not_tied() -> None:
    verdict = decide([noisy(0, 10.0, 20, 0), noisy(1, 12.0, 20, 0)], RULE)
    assert stands(verdict, "policy 1") is Standing.SLOWER
    assert (verdict.candidate, verdict.settled) == ("policy 0", True)


@pytest.mark.parametrize("rounds", [4, 20, 200])
def test_noise_for_ever_stays_unsettled_and_policy_0(rounds: int) -> None:
    verdict = decide(
        [Samples("policy 0", (10.0,) * rounds), Samples("policy 1", (6.0, 15.0) * (rounds // 2))],
        RULE,
    )
    assert (verdict.candidate, verdict.settled) == ("policy 0", False)
    assert stands(verdict, "policy 1") is Standing.UNSETTLED
    assert "1 unsettled" in verdict.reason


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
def test_too_few_rounds_settle_nothing_however_clear_they_look(rounds: int) -> None:
    verdict = decide(
        [Samples("policy 0", (10.0,) * rounds), Samples("policy 1", (1.0,) * rounds)], RULE
    )
    assert (verdict.candidate, verdict.settled, verdict.rounds) == ("policy 0", False, rounds)
    # What it most likely gains is known from the second one on; how sure that is, not yet.
    gain = pytest.approx(0.9) if rounds >= 2 else None
    median_us = 1.0 if rounds else None
    assert verdict.results[1] == Result("policy 1", Standing.UNSETTLED, median_us, gain)


def test_no_confidence_however_low_settles_before_the_least_rounds() -> None:
    rule = Rule(confidence=0.5, min_rounds=6)
    for rounds, candidate in ((5, "policy 0"), (6, "policy 1")):
        steadily = [Samples("policy 0", (10.0,) * rounds), Samples("policy 1", (8.0,) * rounds)]
        assert decide(steadily, rule).candidate == candidate


@quick
@given(st.sampled_from(OUT), st.integers(0, 30))
def test_an_excluded_policy_never_wins_and_its_reason_is_kept(out: Standing, rounds: int) -> None:
    fast = Samples("policy 1", (0.1,) * rounds, out, "for a reason")
    verdict = decide([Samples("policy 0", (10.0,) * rounds), fast], RULE)
    assert (verdict.candidate, verdict.settled) == ("policy 0", True)
    median_us = 0.1 if rounds else None
    assert verdict.results[1] == Result("policy 1", out, median_us, reason="for a reason")
    assert verdict.reason == f"kept policy 0: policy 1 {out.value} (for a reason)"


def test_without_a_trusted_policy_0_it_is_kept_and_nobody_is_compared_with_it() -> None:
    why = "raised RuntimeError: half way"
    samples = [
        Samples("policy 0", (10.0,) * 12, Standing.FAILED, why),
        Samples("policy 1", (8.0,) * 13),
        Samples("policy 2", (8.0,), Standing.WRONG, "one token's experts differ"),
    ]
    results = (
        Result("policy 0", Standing.FAILED, 10.0, reason=why),
        Result("policy 1", Standing.UNSETTLED),
        Result("policy 2", Standing.WRONG),
    )
    kept = Verdict("policy 0", True, 12, f"kept policy 0: it {why} itself", results)
    assert decide(samples, RULE) == kept
    # Nor does a second pass change that.
    assert confirm(kept, passes(10.0, 8.0), RULE) is kept


def test_one_wild_round_does_not_hide_a_gain() -> None:
    rng = random.Random(5)
    base = [10.0 * math.exp(rng.gauss(0, 0.01)) for _ in range(16)]
    fast = [8.5 * math.exp(rng.gauss(0, 0.01)) for _ in range(16)]
    fast[4] *= 5.0
    assert (
        decide([Samples("policy 0", tuple(base)), Samples("policy 1", tuple(fast))], RULE).candidate
        == "policy 1"
    )


def test_a_wider_margin_asks_for_a_larger_gain() -> None:
    candidates = [noisy(0, 10.0, 40, 1, 0.005), noisy(1, 9.5, 40, 1, 0.005)]
    assert decide(candidates, Rule(margin=0.01)).candidate == "policy 1"
    assert decide(candidates, Rule(margin=0.08)).candidate == "policy 0"


@pytest.mark.parametrize(
    ("candidates", "words"),
    [
        ([], "no samples to decide from: give the baseline's first"),
        (
            [Samples("policy 0", (1.0,)), Samples("policy 1", (1.0, 2.0))],
            "a candidate has more rounds than the baseline: rounds must be paired",
        ),
    ],
)
def test_samples_that_are_not_paired_with_policy_0_are_refused(
    candidates: list[Samples], words: str
) -> None:
    with pytest.raises(ValueError, match=f"^{words}$"):
        decide(candidates, RULE)


def test_the_interval_misses_the_truth_in_at_most_alpha_of_runs_looked_at_after_every_round() -> (
    None
):
    rng = random.Random(2024)
    rule = Rule(confidence=0.9)
    true_gain, runs, missed, widths = 0.2, 400, 0, []
    for _ in range(runs):
        base, other = [], []
        ever = False
        for number in range(1, 41):
            base.append(10.0 * math.exp(rng.gauss(0, 0.05)))
            other.append((1 - true_gain) * 10.0 * math.exp(rng.gauss(0, 0.05)))
            result = decide(
                [Samples("policy 0", tuple(base)), Samples("policy 1", tuple(other))], rule
            )
            low, high = result.results[1].gain_low, result.results[1].gain_high
            ever |= number >= 2 and not (_or(low, -math.inf) <= true_gain <= _or(high, math.inf))
        missed += ever
        widths.append(_or(high, math.inf) - _or(low, -math.inf))
    assert missed / runs <= 0.1
    # Nor is that bought with intervals that say nothing: 40 rounds of 5% noise pin it to 10 points.
    assert max(widths) < 0.1


def _or(bound: float | None, unknown: float) -> float:
    return unknown if bound is None else bound


@pytest.mark.parametrize("rounds", [5, 9, 14])
def test_at_the_interval_s_ends_the_mixture_s_evidence_is_exactly_one_over_alpha(
    rounds: int,
) -> None:
    """Integrates the mixture over effect sizes and scales numerically, without its closed form."""
    # Every other one of a rising series, then the rest: no round resembles the one before.
    rising = np.linspace(-0.04, 0.04, rounds)
    half = (rounds + 1) // 2
    deviations = np.empty(rounds)
    deviations[::2], deviations[1::2] = rising[:half], rising[half:][::-1]
    logs = math.log(0.8) + deviations
    times = tuple(10.0 * math.exp(x) for x in logs)
    result = decide(
        [Samples("policy 0", (10.0,) * rounds), Samples("policy 1", times)], RULE
    ).results[1]
    assert result.gain_low is not None
    assert result.gain_high is not None
    for gain in (result.gain_low, result.gain_high):
        evidence = _mixture_likelihood_ratio(logs, math.log1p(-gain))
        assert evidence == pytest.approx(1.0 / (1.0 - RULE.confidence), rel=0.01)


def _mixture_likelihood_ratio(values: np.ndarray, mean: float) -> float:
    """Effect size ~ N(0, 1/PRIOR_ROUNDS) against 0, scale under its invariant prior in both."""
    shifted = values - mean
    log_sigma = np.linspace(math.log(1e-3), math.log(30.0), 800)
    effect = np.linspace(-60.0, 60.0, 4001)
    sigma = np.exp(log_sigma)[:, None]

    def log_likelihood(size: np.ndarray) -> np.ndarray:
        total = sum((v / sigma - size) ** 2 for v in shifted)
        return -len(values) * np.log(sigma) - total / 2

    log_prior = -PRIOR_ROUNDS * effect**2 / 2 + math.log(PRIOR_ROUNDS / (2 * math.pi)) / 2
    null = log_likelihood(np.zeros(1))
    top = null.max()
    step = effect[1] - effect[0]
    alternative = np.exp(log_likelihood(effect[None, :]) + log_prior[None, :] - top).sum() * step
    return float(alternative / np.exp(null - top).sum())


@pytest.mark.parametrize(("us", "sigma", "tick"), [(40.0, 0.01, 0.5), (12.25, 0.02, 0.5)])
def test_identical_policies_on_a_clock_that_ticks_coarsely_stay_policy_0(
    us: float, sigma: float, tick: float
) -> None:
    rng = random.Random(7)

    def one_round() -> float:
        visits = [round(us * math.exp(rng.gauss(0, sigma)) / tick) * tick for _ in range(4)]
        return sorted(visits)[1]

    switched = 0
    for _ in range(600):
        rounds: list[list[float]] = [[], []]
        for _ in range(20):
            for times in rounds:
                times.append(one_round())
            found = [Samples(f"policy {p}", tuple(times)) for p, times in enumerate(rounds)]
            if decide(found, RULE).candidate != "policy 0":
                switched += 1
                break
    assert switched <= 2


# A winner is confirmed


def passes(*us: float, rounds: int = 30, seed: int = 0) -> Verdict:
    return decide([noisy(p, t, rounds, seed + p, 0.005) for p, t in enumerate(us)], RULE)


def test_a_winner_of_one_pass_replaces_nothing_until_it_is_confirmed() -> None:
    first = passes(10.0, 8.0, 10.0)
    verdict = confirm(first, None, RULE)
    assert first.candidate == "policy 1"
    assert (verdict.candidate, verdict.settled) == ("policy 0", False)
    assert verdict.rounds == first.rounds
    assert stands(verdict, "policy 1") is Standing.UNCONFIRMED
    assert verdict.reason == "kept policy 0: policy 1 unconfirmed, policy 2 tied"
    assert verdict.results[1].gain_low == RULE.margin
    # The others are what they were.
    assert verdict.results[2] == first.results[2]


@pytest.mark.parametrize("us", [(8.0, 8.4), (8.4, 8.0)])
def test_a_winner_of_both_passes_replaces_the_baseline_and_shows_both(
    us: tuple[float, float],
) -> None:
    first, second = passes(10.0, us[0]), passes(10.0, us[1], seed=5)
    verdict = confirm(first, second, RULE)
    assert (verdict.candidate, verdict.settled) == ("policy 1", True)
    assert verdict.rounds == first.rounds + second.rounds
    one, again, found = (v.results[1] for v in (first, second, verdict))
    assert found.gain == pytest.approx((one.gain + again.gain) / 2)
    assert found.gain_low == min(one.gain_low, again.gain_low)
    assert found.gain_high == max(one.gain_high, again.gain_high)


@pytest.mark.parametrize(
    ("us", "standing", "settled"),
    [(10.0, Standing.TIED, True), (12.0, Standing.SLOWER, True)],
)
def test_a_winner_that_the_second_pass_denies_is_none(
    us: float, standing: Standing, settled: bool
) -> None:
    verdict = confirm(passes(10.0, 8.0), passes(10.0, us, seed=3), RULE)
    assert (verdict.candidate, verdict.settled) == ("policy 0", settled)
    assert stands(verdict, "policy 1") is standing
    assert verdict.reason == f"kept policy 0: policy 1 {standing.value} (not confirmed)"


def test_a_second_pass_too_short_for_an_interval_leaves_a_winner_unconfirmed() -> None:
    first = passes(10.0, 8.0)
    verdict = confirm(first, passes(10.0, 8.4, rounds=2), RULE)
    assert stands(verdict, "policy 1") is Standing.UNCONFIRMED
    assert verdict.results[1].gain == first.results[1].gain


@pytest.mark.parametrize(("us", "sure"), [(8.4, True), (9.95, False)])
def test_a_second_pass_that_is_not_over_yet_says_no_more_than_that(us: float, sure: bool) -> None:
    """Its interval reaches down to the margin at least: who merges it comes to no winner either."""
    times = [noisy(p, t, 14, 3, 0.005) for p, t in enumerate((10.0, us))]
    second = decide(times, replace(RULE, min_rounds=15))
    low = second.results[1].gain_low
    assert low is not None
    assert (low > RULE.margin) == sure
    found = confirm(passes(10.0, 8.0), second, RULE).results[1]
    assert found == replace(second.results[1], gain_low=min(low, RULE.margin))
    assert found.standing is Standing.UNSETTLED


def test_a_winner_that_raises_in_the_second_pass_is_out() -> None:
    second = decide(
        [Samples("policy 0"), Samples("policy 1", (), Standing.FAILED, "raised OSError: x")], RULE
    )
    verdict = confirm(passes(10.0, 8.0), second, RULE)
    assert verdict.reason == "kept policy 0: policy 1 failed (raised OSError: x)"
    assert stands(verdict, "policy 1") is Standing.FAILED
    assert verdict.candidate == "policy 0"


def test_the_runner_up_serves_where_only_the_winner_is_not_confirmed() -> None:
    verdict = confirm(passes(10.0, 7.0, 8.0), passes(10.0, 10.0, 8.0, seed=3), RULE)
    assert verdict.candidate == "policy 2"


@settings(max_examples=200)
@given(st.one_of(measured((None, *OUT)), steady()), st.none() | measured((None, *OUT)) | steady())
def test_only_what_is_faster_in_both_passes_replaces_the_baseline_and_merging_agrees(
    one: list[Samples], two: list[Samples] | None
) -> None:
    first, second = decide(one, RULE), decide(two, RULE) if two else None
    verdict = confirm(first, second, RULE)
    for result in verdict.results:
        both = [v.result(result.candidate) if v else None for v in (first, second)]
        in_both = all(r is not None and r.standing is Standing.FASTER for r in both)
        if first.baseline.standing is Standing.BASELINE:
            assert (result.standing is Standing.FASTER) == in_both
        # Who judges the numbers alone comes to no other winner.
        if result.gain_low is not None and result.standing not in OUT:
            again = standing_of(result.gain, result.gain_low, result.gain_high, RULE.margin)
            assert (again is Standing.FASTER) == (result.standing is Standing.FASTER)
    if verdict.candidate != "policy 0":
        assert stands(verdict, verdict.candidate) is Standing.FASTER


@pytest.mark.parametrize("standing", OPEN)
def test_what_is_open_and_may_overtake_keeps_a_bucket_open(standing: Standing) -> None:
    base = Result("policy 0", Standing.BASELINE, 10.0, 0.0)
    best = Result("policy 1", Standing.FASTER, 8.0, 0.20, 0.15, 0.25)
    for high, settled in ((0.30, False), (0.20, True), (0.19, True), (None, False)):
        rival = Result("policy 2", standing, 8.2, 0.18, None if high is None else 0.01, high)
        verdict = conclude([base, best, rival], 9)
        saves = "policy 1 saves 20.0% (at least 15.0%)"
        assert verdict == Verdict("policy 1", settled, 9, saves, (base, best, rival))
        assert not conclude([base, rival], 9).settled


@pytest.mark.parametrize(
    ("gain", "low", "high", "standing"),
    [
        (0.75, 0.5, 1.25, Standing.UNSETTLED),  # it may gain no more than the margin
        (0.75, 0.5625, 1.0, Standing.FASTER),
        (0.25, 0.0, 1.125, Standing.TIED),
        (0.25, 0.0, 1.25, Standing.UNSETTLED),  # it may gain what is worth more rounds
        (-1.125, -2.0, 0.0, Standing.TIED),
        (-1.25, -2.0, 0.0, Standing.SLOWER),
    ],
)
def test_a_standing_is_a_matter_of_margins(
    gain: float, low: float, high: float, standing: Standing
) -> None:
    """A margin of 0.5: a tie is within 1.25 of the baseline."""
    assert standing_of(gain, low, high, 0.5) is standing


def test_the_only_candidate_is_kept() -> None:
    verdict = decide([Samples("policy 0", (10.0, 12.0))], RULE)
    base = Result("policy 0", Standing.BASELINE, 11.0, 0.0)
    kept = "kept policy 0: it is the only candidate"
    assert verdict == Verdict("policy 0", True, 2, kept, (base,))
    assert verdict.baseline is verdict.result("policy 0")
    assert verdict.result("policy 1") is None


def test_a_reason_says_who_was_not_measured_and_who_is_only_unsettled() -> None:
    none = decide([Samples("policy 0"), Samples("policy 1")], RULE)
    assert none.reason == "kept policy 0: policy 1 not measured"
    few = decide([Samples("policy 0", (9.0,)), Samples("policy 1", (5.0,))], RULE)
    assert few.reason == "kept policy 0: policy 1 unsettled"


@pytest.mark.parametrize("noise", [0.0005, 0.001, 0.003])
def test_a_tie_says_how_much_it_may_cost_at_most_and_so_vetoes_nobody(noise: float) -> None:
    """Who ties in one situation and wins in another serves both (losses.combine)."""
    for seed in range(30):
        rng = random.Random(seed)
        times = [(10.0 * math.exp(rng.gauss(0, noise)), 10.0) for _ in range(12)]
        for rounds in range(RULE.min_rounds, 13):
            ours, theirs = zip(*times[:rounds], strict=True)
            tied = decide([Samples("policy 0", theirs), Samples("policy 1", ours)], RULE)
            if stands(tied, "policy 1") is Standing.TIED:
                assert tied.results[1].gain_low is not None
                assert rounds == RULE.min_rounds + 1
                break
        else:
            pytest.fail("never tied")
