"""decide(), combine() and needs_refining() on made-up samples."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_moe.policy.decision import (
    PRIOR_ROUNDS,
    Candidate,
    PolicyResult,
    Rule,
    Standing,
    Verdict,
    combine,
    decide,
    loss,
    needs_refining,
)

RULE = Rule()
OUT = (Standing.HOPELESS, Standing.WRONG, Standing.FAILED)

quick = settings(max_examples=60, deadline=None)
microseconds = st.floats(1.0, 1e4)


@st.composite
def measured(draw: st.DrawFn, standings: tuple[Standing | None, ...] = (None,)) -> list[Candidate]:
    """Policy 0 and up to three others with any times and any number of rounds up to its own."""
    rounds = draw(st.integers(0, 24))
    found = [Candidate(0, tuple(draw(st.lists(microseconds, min_size=rounds, max_size=rounds))))]
    for policy in range(1, draw(st.integers(1, 4))):
        times = draw(st.lists(microseconds, max_size=rounds))
        found.append(Candidate(policy, tuple(times), draw(st.sampled_from(standings)), "made up"))
    return found


@st.composite
def steady(draw: st.DrawFn) -> list[Candidate]:
    """Three policies 30% apart at most, under a few percent of noise: any standing can come out."""
    rng = random.Random(draw(st.integers(0, 1 << 30)))
    rounds = draw(st.integers(2, 24))
    sigma = draw(st.sampled_from((0.002, 0.02, 0.1)))
    return [
        Candidate(p, tuple(10.0 * us * math.exp(rng.gauss(0, sigma)) for _ in range(rounds)))
        for p, us in enumerate([1.0, *draw(st.tuples(*[st.floats(0.7, 1.3)] * 2))])
    ]


def noisy(policy: int, us: float, rounds: int, seed: int, sigma: float = 0.02) -> Candidate:
    rng = random.Random(f"{seed} {policy}")
    return Candidate(policy, tuple(us * math.exp(rng.gauss(0, sigma)) for _ in range(rounds)))


def standing_of(verdict: Verdict, policy: int) -> Standing:
    return next(r.standing for r in verdict.results if r.policy == policy)


@quick
@given(st.lists(microseconds, min_size=8, max_size=40))
def test_identical_samples_keep_policy_0_and_are_tied(times: list[float]) -> None:
    verdict = decide([Candidate(policy, tuple(times)) for policy in (0, 1, 2)], RULE)
    assert (verdict.policy, verdict.settled) == (0, True)
    assert [r.standing for r in verdict.results[1:]] == [Standing.TIED, Standing.TIED]


@settings(max_examples=200, deadline=None)
@given(st.one_of(measured((None, *OUT)), steady()))
def test_nothing_but_a_faster_offered_policy_replaces_policy_0(candidates: list[Candidate]) -> None:
    verdict = decide(candidates, RULE)
    offered = {c.policy: c for c in candidates}
    assert [r.policy for r in verdict.results] == list(offered)
    for result in verdict.results:
        if result.standing is Standing.FASTER:
            assert result.gain_low is not None
            assert result.gain_low > RULE.margin
            assert len(offered[result.policy].round_us) >= RULE.min_rounds
    if verdict.policy != 0:
        assert offered[verdict.policy].out is None
        assert standing_of(verdict, verdict.policy) is Standing.FASTER
    elif verdict.settled:
        assert Standing.FASTER not in {r.standing for r in verdict.results}


@quick
@given(steady(), st.data())
def test_what_slows_a_whole_round_or_all_rounds_changes_nothing(
    candidates: list[Candidate], data: st.DataObject
) -> None:
    rounds = len(candidates[0].round_us)
    # Powers of two scale floating-point numbers exactly, so that equality can be exact, too.
    powers = data.draw(st.lists(st.integers(-5, 5), min_size=rounds, max_size=rounds))
    scaled = [
        Candidate(
            c.policy, tuple(math.ldexp(t, k) for t, k in zip(c.round_us, powers, strict=False))
        )
        for c in candidates
    ]
    assert _without_times(decide(candidates, RULE)) == _without_times(decide(scaled, RULE))


def _without_times(verdict: Verdict) -> object:
    results = [(r.policy, r.standing, r.gain, r.gain_low, r.gain_high) for r in verdict.results]
    return verdict.policy, verdict.settled, verdict.reason, results


@quick
@given(st.integers(0, 1 << 30), st.sampled_from((1, 2)))
def test_a_clearly_faster_policy_wins_and_says_by_how_much(seed: int, better: int) -> None:
    times = {0: 10.0, 1: 10.0, 2: 10.0, better: 8.5}
    verdict = decide([noisy(p, us, 30, seed) for p, us in times.items()], RULE)
    assert (verdict.policy, verdict.settled) == (better, True)
    assert f"policy {better} saves" in verdict.reason
    result = verdict.results[better]
    assert result.gain == pytest.approx(0.15, abs=0.03)
    assert result.gain_low < 0.15 < result.gain_high


def test_the_faster_of_two_faster_policies_wins() -> None:
    verdict = decide([noisy(p, us, 40, 0) for p, us in enumerate((10.0, 8.5, 7.0))], RULE)
    assert verdict.policy == 2
    assert standing_of(verdict, 1) is Standing.FASTER


def test_an_unsettled_rival_that_may_still_overtake_keeps_the_bucket_open() -> None:
    base, good = Candidate(0, (10.0,) * 12), Candidate(1, (9.0,) * 12)
    wild = Candidate(2, (5.0, 15.0) * 6)
    verdict = decide([base, good, wild], RULE)
    assert (verdict.policy, verdict.settled) == (1, False)
    behind = decide([base, good, Candidate(2, (9.5, 10.1) * 6)], RULE)
    assert standing_of(behind, 2) is Standing.UNSETTLED
    assert (behind.policy, behind.settled) == (1, True)


def test_a_clearly_slower_policy_is_slower_not_tied() -> None:
    verdict = decide([noisy(0, 10.0, 20, 0), noisy(1, 12.0, 20, 0)], RULE)
    assert standing_of(verdict, 1) is Standing.SLOWER
    assert (verdict.policy, verdict.settled) == (0, True)


@pytest.mark.parametrize("rounds", [4, 20, 200])
def test_noise_for_ever_stays_unsettled_and_policy_0(rounds: int) -> None:
    verdict = decide(
        [Candidate(0, (10.0,) * rounds), Candidate(1, (6.0, 15.0) * (rounds // 2))], RULE
    )
    assert (verdict.policy, verdict.settled) == (0, False)
    assert standing_of(verdict, 1) is Standing.UNSETTLED
    assert "1 unsettled" in verdict.reason


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
def test_too_few_rounds_settle_nothing_however_clear_they_look(rounds: int) -> None:
    verdict = decide([Candidate(0, (10.0,) * rounds), Candidate(1, (1.0,) * rounds)], RULE)
    assert (verdict.policy, verdict.settled, verdict.rounds) == (0, False, rounds)


def test_no_confidence_however_low_settles_before_the_least_rounds() -> None:
    rule = Rule(confidence=0.5, min_rounds=6)
    for rounds, policy in ((5, 0), (6, 1)):
        steadily = [Candidate(0, (10.0,) * rounds), Candidate(1, (8.0,) * rounds)]
        assert decide(steadily, rule).policy == policy


@quick
@given(st.sampled_from(OUT), st.integers(0, 30))
def test_an_excluded_policy_never_wins_and_its_reason_is_kept(out: Standing, rounds: int) -> None:
    fast = Candidate(1, (0.1,) * rounds, out, "for a reason")
    verdict = decide([Candidate(0, (10.0,) * rounds), fast], RULE)
    assert (verdict.policy, verdict.settled) == (0, True)
    assert verdict.results[1].standing is out
    assert verdict.results[1].gain is None
    assert "for a reason" in verdict.results[1].reason
    assert "for a reason" in verdict.reason


def test_without_a_trusted_policy_0_policy_0_is_kept() -> None:
    broken = Candidate(0, (), Standing.FAILED, "raised RuntimeError: no kernel")
    verdict = decide([broken, Candidate(1), Candidate(2)], RULE)
    assert (verdict.policy, verdict.settled) == (0, True)
    assert "raised RuntimeError: no kernel" in verdict.reason


def test_one_wild_round_does_not_hide_a_gain() -> None:
    rng = random.Random(5)
    base = [10.0 * math.exp(rng.gauss(0, 0.01)) for _ in range(16)]
    fast = [8.5 * math.exp(rng.gauss(0, 0.01)) for _ in range(16)]
    fast[4] *= 5.0
    assert decide([Candidate(0, tuple(base)), Candidate(1, tuple(fast))], RULE).policy == 1


def test_a_wider_margin_asks_for_a_larger_gain() -> None:
    candidates = [noisy(0, 10.0, 40, 1, 0.005), noisy(1, 9.5, 40, 1, 0.005)]
    assert decide(candidates, Rule(margin=0.01)).policy == 1
    assert decide(candidates, Rule(margin=0.08)).policy == 0


@pytest.mark.parametrize(
    ("candidates", "words"),
    [
        ([], "must be policy 0"),
        ([Candidate(1)], "must be policy 0"),
        ([Candidate(1), Candidate(0)], "must be policy 0"),
        ([Candidate(0, (1.0,)), Candidate(1, (1.0, 2.0))], "more rounds than policy 0"),
    ],
)
def test_samples_that_are_not_paired_with_policy_0_are_refused(
    candidates: list[Candidate], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        decide(candidates, RULE)


def test_policy_0_failing_half_way_is_a_verdict_not_an_error() -> None:
    broken = Candidate(0, (10.0,), Standing.FAILED, "raised RuntimeError: half way")
    verdict = decide([broken, Candidate(1, (9.0, 9.0))], RULE)
    assert (verdict.policy, verdict.settled) == (0, True)


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
            result = decide([Candidate(0, tuple(base)), Candidate(1, tuple(other))], rule)
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
    deviations = np.linspace(-0.04, 0.04, rounds)
    logs = math.log(0.8) + deviations
    times = tuple(10.0 * math.exp(x) for x in logs)
    result = decide([Candidate(0, (10.0,) * rounds), Candidate(1, times)], RULE).results[1]
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
            found = [Candidate(p, tuple(times)) for p, times in enumerate(rounds)]
            if decide(found, RULE).policy != 0:
                switched += 1
                break
    assert switched <= 2


# combine, loss, needs_refining: hand-made verdicts


def verdict(policy: int, gains: dict[int, float | None]) -> Verdict:
    """Gains over policy 0; None for a policy that was dropped."""
    results = [PolicyResult(0, Standing.REFERENCE, 10.0, 0.0)]
    for p, gain in gains.items():
        standing = Standing.HOPELESS if gain is None else Standing.TIED
        if p == policy:
            standing = Standing.FASTER
        results.append(PolicyResult(p, standing, 10.0, gain, gain, gain))
    return Verdict(policy, True, 9, f"made up for {policy}", tuple(results))


def test_one_fill_is_its_own_verdict() -> None:
    only = verdict(2, {1: 0.0, 2: 0.3})
    assert combine([only]) == (2, only.reason)


def test_several_fills_get_the_policy_whose_worst_loss_is_least() -> None:
    # Policy 1 is 20% faster where all rows are real and half as fast again where few are;
    # policy 2 is best where few are, and nowhere loses much.
    full = verdict(1, {1: 0.20, 2: 0.16})
    sparse = verdict(2, {1: -0.50, 2: 0.10})
    policy, reason = combine([full, sparse])
    assert policy == 2
    assert "1, 2" in reason
    # Losing equally, or more, than policy 0 is no reason to leave it.
    assert combine([verdict(1, {1: 0.2}), verdict(0, {1: -0.5})])[0] == 0


@quick
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.tuples(*[st.none() | st.floats(-3.0, 0.9)] * 2)),
        min_size=2,
        max_size=3,
    )
)
def test_combining_fills_never_takes_a_policy_that_no_fill_chose_or_that_one_dropped(
    drawn: list[tuple[int, tuple[float | None, float | None]]],
) -> None:
    fills = []
    for winner, gains in drawn:
        known = dict(enumerate(gains, 1))
        fills.append(verdict(0 if known.get(winner) is None else winner, known))
    policy, _ = combine(fills)
    assert policy in {v.policy for v in fills} | {0}
    worst = {p: max(loss(v, p) for v in fills) for p in {v.policy for v in fills} | {0}}
    assert worst[policy] == min(worst.values())
    if policy != 0:
        assert worst[policy] < worst[0]
        assert all(r.gain is not None for v in fills for r in v.results if r.policy == policy)


@pytest.mark.parametrize("low", [None, -3.0])
def test_a_policy_that_may_lose_in_an_unsettled_fill_does_not_serve_all_fills(
    low: float | None,
) -> None:
    full = verdict(2, {2: 0.10})
    lucky = PolicyResult(2, Standing.UNSETTLED, 5.0, 0.4, low, 0.9)
    barely = Verdict(0, False, 2, "kept 0", (PolicyResult(0, Standing.REFERENCE, 10.0, 0.0), lucky))
    assert combine([full, barely])[0] == 0


def test_a_policy_that_surely_loses_little_in_an_unsettled_fill_may_serve_all_fills() -> None:
    nearly = PolicyResult(2, Standing.UNSETTLED, 9.8, 0.02, -0.01, 0.05)
    long = Verdict(
        0, False, 200, "kept 0", (PolicyResult(0, Standing.REFERENCE, 10.0, 0.0), nearly)
    )
    assert combine([verdict(2, {2: 0.10}), long])[0] == 2


def test_loss_is_the_time_over_the_fastest_trusted_policy_s() -> None:
    found = verdict(2, {1: -1.0, 2: 0.5, 3: None})
    assert loss(found, 0) == pytest.approx(2.0)
    assert loss(found, 1) == pytest.approx(4.0)
    assert loss(found, 2) == 1.0
    assert loss(found, 3) == math.inf


CASES = {
    "same winner by as much": (verdict(1, {1: 0.2}), verdict(1, {1: 0.2}), 0.0),
    "tied either way": (verdict(0, {1: 0.01}), verdict(0, {1: -0.01}), 0.0),
    # Between them policy 2 of the upper bucket may cost what it costs at the lower one.
    "another winner": (verdict(1, {1: 0.2, 2: 0.0}), verdict(2, {1: 0.0, 2: 0.2}), 0.25),
    "winner dropped above": (verdict(1, {1: 0.2, 2: 0.1}), verdict(2, {1: None, 2: 0.2}), math.inf),
    "winner below, kept 0 above": (verdict(1, {1: 0.2}), verdict(0, {1: 0.01}), 0.25),
    # Policy 2 did not win above, but is the one that goes from half as slow again to a fifth off.
    "fastest above": (verdict(0, {2: -0.5}), verdict(0, {2: 0.2}), 0.5),
    # Policy 0 runs what 1 runs below and what 2 runs above: it jumps somewhere between.
    "policy 0 jumps": (verdict(0, {1: 0.0, 2: -0.5}), verdict(0, {1: -0.3, 2: 0.0}), 0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_a_gap_is_worth_as_much_as_a_count_inside_it_may_lose(name: str) -> None:
    below, above, worth = CASES[name]
    assert needs_refining(below, above, RULE) == pytest.approx(worth)


def test_a_wider_margin_refines_less() -> None:
    below, above = verdict(1, {1: 0.05}), verdict(0, {1: -0.02})
    assert needs_refining(below, above, Rule(margin=0.01)) > 0
    assert needs_refining(below, above, Rule(margin=0.05)) == 0
