"""What a choice costs: over fills and situations, in us, and between two buckets."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_moe.policy.decision import TIE_MARGINS, Result, Rule, Standing, Verdict, conclude
from adaptive_moe.policy.losses import (
    combine,
    loses,
    loss,
    loss_if_asked,
    loss_us,
    needs_refining,
    saving_us,
)

RULE = Rule()
MARGIN = RULE.margin
quick = settings(max_examples=200)


def verdict(
    gains: dict[int, float | None], winner: int = 0, base_us: float = 10.0, width: float = 0.005
) -> Verdict:
    """Gains over the baseline, known to within width; None for a candidate that was dropped. What
    wins is FASTER, the others TIED where they lose less than a tie can, else SLOWER."""
    results = [Result("policy 0", Standing.BASELINE, base_us, 0.0)]
    for p, gain in gains.items():
        name = f"policy {p}"
        if gain is None:
            results.append(Result(name, Standing.HOPELESS, 10.0))
            continue
        standing = Standing.TIED if gain > -TIE_MARGINS * MARGIN else Standing.SLOWER
        standing = Standing.FASTER if p == winner else standing
        results.append(Result(name, standing, base_us, gain, gain - width, gain + width))
    return Verdict(f"policy {winner}", True, 9, f"made up for {winner}", tuple(results))


def test_one_verdict_is_its_own_answer() -> None:
    only = verdict({1: 0.0, 2: 0.3}, 2)
    assert combine([only]) == ("policy 2", only.reason)


def test_several_fills_get_the_candidate_that_loses_in_none_and_least_in_its_worst() -> None:
    full = verdict({1: 0.20, 2: 0.16}, 1)
    sparse = verdict({1: -0.50, 2: 0.10}, 2)
    assert combine([full, sparse, full]) == (
        "policy 2",
        "policy 2 is faster in one and loses in none (winners: policy 1, policy 2)",
    )


@pytest.mark.parametrize("better", [1, 2])
def test_of_two_that_lose_in_none_the_one_that_loses_least_of_the_best_serves(better: int) -> None:
    """By 0.4 us where the other is best; the other by 2 us in return."""
    other = 3 - better
    fills = [
        verdict({1: 0.16, 2: 0.16} | {other: 0.20}, other),
        verdict({1: 0.1, 2: 0.1} | {better: 0.3}, better),
    ]
    assert combine(fills)[0] == f"policy {better}"


def test_what_is_slower_in_two_of_three_fills_serves_none_however_much_it_saves_in_one() -> None:
    fills = [verdict({1: 0.5}, 1), verdict({1: -0.04}), verdict({1: -0.04})]
    assert combine(fills) == (
        "policy 0",
        "kept policy 0: nothing is faster in one and loses in none (winners: policy 1, policy 0)",
    )


def test_faster_in_one_and_tied_in_the_other_serves_both() -> None:
    assert combine([verdict({1: 0.05}, 1), verdict({1: 0.0})])[0] == "policy 1"
    assert combine([verdict({1: 0.0}), verdict({1: 0.05}, 1)])[0] == "policy 1"


def test_tied_in_both_is_no_reason_to_leave_the_baseline() -> None:
    assert combine([verdict({1: 0.02}), verdict({1: 0.02})])[0] == "policy 0"


def test_a_small_loss_of_much_counts_more_than_a_large_gain_of_little() -> None:
    """10% of 4 us on the busy device are less than what 1% of 90 us may cost on the idle one."""
    busy, idle = verdict({1: 0.10}, 1, base_us=4.0), verdict({1: -0.008}, base_us=90.0)
    assert combine([busy, idle])[0] == "policy 0"
    assert combine([verdict({1: 0.10}, 1, base_us=40.0), idle])[0] == "policy 1"


def test_a_tie_so_uncertain_that_it_may_be_a_loss_is_one() -> None:
    """TIED says that nothing is to be won, not that nothing is to be lost."""
    busy = verdict({1: 0.3}, 1)
    for width, candidate in ((0.02, "policy 1"), (0.04, "policy 0")):
        assert combine([busy, verdict({1: -0.005}, width=width)])[0] == candidate


@pytest.mark.parametrize("standing", [Standing.UNSETTLED, Standing.UNCONFIRMED, Standing.SLOWER])
def test_what_is_open_serves_where_its_interval_says_that_it_cannot_lose(
    standing: Standing,
) -> None:
    def unsure(low: float | None) -> Verdict:
        high = None if low is None else 0.06
        rival = Result("policy 1", standing, 9.8, 0.02, low, high)
        return Verdict("policy 0", False, 9, "", (verdict({}).baseline, rival))

    harmless = standing is not Standing.SLOWER
    busy = verdict({1: 0.3}, 1)
    assert combine([busy, unsure(-0.01)])[0] == ("policy 1" if harmless else "policy 0")
    assert combine([busy, unsure(-0.03)])[0] == "policy 0"
    assert combine([busy, unsure(None)])[0] == "policy 0"


standings = st.sampled_from([s for s in Standing if s is not Standing.BASELINE])


@st.composite
def results(draw: st.DrawFn, name: str) -> Result:
    standing = draw(standings)
    if draw(st.booleans()):
        return Result(name, Standing.UNSETTLED if standing is Standing.FASTER else standing)
    gain = draw(st.floats(-1.0, 0.8))
    low, high = gain - draw(st.floats(0.0, 0.1)), gain + draw(st.floats(0.0, 0.1))
    if standing is Standing.FASTER and low <= MARGIN:
        standing = Standing.UNSETTLED
    return Result(name, standing, 5.0, gain, low, high)


@st.composite
def verdicts(draw: st.DrawFn) -> Verdict:
    base = Result("policy 0", Standing.BASELINE, draw(st.floats(1.0, 1000.0)), 0.0)
    return conclude([base, *(draw(results(f"policy {p}")) for p in (1, 2))], 9)


@quick
@given(st.lists(verdicts(), min_size=2, max_size=6))
def test_whatever_replaces_the_baseline_is_faster_somewhere_and_loses_nowhere(
    several: list[Verdict],
) -> None:
    candidate, _ = combine(several, MARGIN)
    if candidate == "policy 0":
        return
    found = [v.result(candidate) for v in several]
    assert any(r is not None and r.standing is Standing.FASTER for r in found)
    sure = max(saving_us(v, candidate) for v in several)
    for v, result in zip(several, found, strict=True):
        assert not loses(v, candidate, MARGIN)
        assert result is not None
        assert result.gain is not None
        assert result.gain >= -MARGIN
        # In the worst case of any one of them it costs less than it surely saves in another.
        assert -saving_us(v, candidate) <= sure


@quick
@given(st.lists(verdicts(), min_size=2, max_size=4), st.randoms())
def test_the_order_of_the_verdicts_does_not_matter(several: list[Verdict], random: object) -> None:
    shuffled = list(several)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert combine(several, MARGIN)[0] == combine(shuffled, MARGIN)[0]


@quick
@given(st.lists(verdicts(), min_size=2, max_size=4), verdicts())
def test_one_more_verdict_never_makes_a_loser_serve(several: list[Verdict], more: Verdict) -> None:
    """What loses in some verdict serves in no larger set that holds it."""
    candidate, _ = combine([*several, more], MARGIN)
    for v in several:
        assert candidate == "policy 0" or not loses(v, candidate, MARGIN)


@quick
@given(verdicts())
def test_the_same_verdict_twice_is_that_verdict(one: Verdict) -> None:
    assert combine([one, one], MARGIN)[0] == one.candidate


@pytest.mark.parametrize(
    ("gain", "low", "sure_us", "lost"),
    [
        # Of 16 us, with a margin of 0.25: a tie is within 0.625.
        (-0.25, -0.625, 10.0, False),
        (-0.2501, -0.625, 10.0, True),  # likelier slower by more than the margin
        (-0.25, -0.6251, 10.0, True),  # it may be slower by more than a tie can be
        (-0.25, -0.625, 9.99, True),  # it may cost more than is saved elsewhere
        (0.25, 0.125, 0.0, False),
    ],
)
def test_a_tie_loses_where_what_it_may_cost_matters(
    gain: float, low: float, sure_us: float, lost: bool
) -> None:
    base = Result("policy 0", Standing.BASELINE, 16.0, 0.0)
    tied = Result("policy 1", Standing.TIED, 16.0, gain, low, 0.5)
    found = Verdict("policy 0", True, 9, "", (base, tied))
    assert loses(found, "policy 1", 0.25, sure_us) is lost
    assert saving_us(found, "policy 1") == 16.0 * low


def test_who_was_not_measured_may_cost_anything_but_the_baseline_nothing() -> None:
    base = Result("policy 0", Standing.BASELINE, 16.0, 0.0)
    unsure = Result("policy 1", Standing.UNSETTLED, 12.0, 0.25)
    for results in (
        (base,),
        (base, unsure),
        (replace(base, median_us=None), replace(unsure, gain_low=0.1)),
    ):
        found = Verdict("policy 0", False, 3, "", results)
        assert loses(found, "policy 1", MARGIN)
        assert saving_us(found, "policy 1") == -math.inf
        assert not loses(found, "policy 0", MARGIN)


def test_loss_is_over_the_fastest_trusted_candidate() -> None:
    found = verdict({1: -1.0, 2: 0.5, 3: None}, 2)
    assert [loss(found, f"policy {p}") for p in range(4)] == [2.0, 4.0, 1.0, math.inf]
    assert [loss_us(found, f"policy {p}") for p in range(4)] == [5.0, 15.0, 0.0, math.inf]


CASES = {
    "same winner by as much": (verdict({1: 0.2}, 1), verdict({1: 0.2}, 1), 0.0),
    "tied either way": (verdict({1: 0.01}), verdict({1: -0.01}), 0.0),
    # Between them policy 2 of the upper bucket may cost what it costs at the lower one.
    "another winner": (verdict({1: 0.2, 2: 0.0}, 1), verdict({1: 0.0, 2: 0.2}, 2), 0.25),
    "winner dropped above": (
        verdict({1: 0.2, 2: 0.1}, 1),
        verdict({1: None, 2: 0.2}, 2),
        math.inf,
    ),
    "winner below, kept 0 above": (verdict({1: 0.2}, 1), verdict({1: 0.01}), 0.25),
    # Policy 2 did not win above, but is the one that goes from half as slow again to a fifth off.
    "fastest above": (verdict({2: -0.5}), verdict({2: 0.2}), 0.5),
    # Policy 0 runs what 1 runs below and what 2 runs above: it jumps somewhere between.
    "policy 0 jumps": (verdict({1: 0.0, 2: -0.5}), verdict({1: -0.3, 2: 0.0}), 0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_a_gap_is_worth_as_much_as_a_count_inside_it_may_lose(name: str) -> None:
    below, above, worth = CASES[name]
    assert needs_refining(below, above, RULE) == pytest.approx(worth)


def test_a_wider_margin_refines_less() -> None:
    below, above = verdict({1: 0.05}, 1), verdict({1: -0.02})
    assert needs_refining(below, above, Rule(margin=0.01)) > 0
    assert needs_refining(below, above, Rule(margin=0.05)) == 0


def unasked(found: Verdict, policy: int) -> Verdict:
    """The same, had the policy not been measured because another situation rules it out."""
    name = f"policy {policy}"
    out = Result(name, Standing.SLOWER, reason="not measured")
    results = tuple(out if r.candidate == name else r for r in found.results)
    return replace(found, results=results)


def test_who_is_not_asked_cannot_lose() -> None:
    found = unasked(verdict({1: 0.2, 2: -0.25, 3: None}, 1), 2)
    policies = [f"policy {p}" for p in range(4)]
    assert [loss_if_asked(found, p) for p in policies] == [1.25, 1.0, 1.0, math.inf]
    assert loss(found, "policy 2") == math.inf


def test_a_gap_that_loses_what_is_tolerated_and_no_more_is_left() -> None:
    """With a margin of 0.25 that is 0.75: what policy 1, the fastest above, costs below."""
    below, above = verdict({1: -0.75}), verdict({1: 0.25})
    assert needs_refining(below, above, Rule(margin=0.25)) == 0.0
    assert needs_refining(verdict({1: -0.76}), above, Rule(margin=0.25)) == pytest.approx(0.76)


def test_where_a_winner_that_is_not_asked_above_ends_is_not_looked_for() -> None:
    below, above = verdict({1: 0.2, 2: 0.0}, 1), verdict({1: 0.1, 2: 0.0})
    assert needs_refining(below, above, RULE) > 0.1
    assert needs_refining(below, unasked(above, 1), RULE) == 0.0
    assert needs_refining(unasked(above, 1), below, RULE) == 0.0


def test_who_is_not_asked_at_one_end_does_not_count_between_two_that_keep_the_baseline() -> None:
    below, above = verdict({1: 0.0, 2: -0.5}), verdict({1: -0.5, 2: 0.0})
    assert needs_refining(below, above, RULE) == pytest.approx(0.5)
    for policy in (1, 2):
        below, above = unasked(below, policy), unasked(above, policy)
    assert needs_refining(below, above, RULE) == 0.0


def test_others_that_differ_are_looked_for_beside_one_that_is_not_asked() -> None:
    below, above = unasked(verdict({1: 0.0, 2: 0.2}, 2), 1), verdict({1: 0.0, 2: -0.2})
    assert needs_refining(below, above, RULE) == pytest.approx(0.25)
