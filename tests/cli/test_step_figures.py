"""bench step: what hand-made samples must give."""

import random

import pytest

from adaptive_moe.cli.bench.paired import LOOKS, MAX_ROUNDS, MIN_ROUNDS, difference, in_rounds
from adaptive_moe.cli.bench.step_figures import (
    ABOVE,
    AS_IT_COMES,
    BUSY,
    CAPTURED,
    figures,
    overall,
    point,
)
from adaptive_moe.cli.bench.step_text import lines


def steady(**us):
    return {name.replace("_", " "): [float(time)] * 20 for name, time in us.items()}


def of(num_tokens, chosen, **us):
    return point(num_tokens, steady(**us), chosen)


def test_a_table_that_picks_the_worst_loses_what_that_costs():
    found = figures([of(8, "policy 1", policy_0=100, policy_1=120, policy_2=80, table=120)])
    assert found["mean_loss"] == found["worst_loss"] == 0.5  # 120 over 80
    assert found["mean_loss_surely"] == 0.5
    assert found["worst_over_baseline"] == pytest.approx(0.2)
    assert found["mean_saved"] == pytest.approx(-0.2)
    assert found["alone"]["policy 0"] == {"mean_loss": 0.25, "worst_loss": 0.25}
    assert found["alone"]["policy 2"] == {"mean_loss": 0.0, "worst_loss": 0.0}


def test_a_table_that_picks_the_best_loses_nothing_and_saves_the_difference():
    found = figures(
        [
            of(8, "policy 2", policy_0=100, policy_1=120, policy_2=80, table=81),
            of(16, "policy 0", policy_0=100, policy_1=120, policy_2=200, table=100),
        ]
    )
    # The table's own step is a graph of its own: the choice is looked up among the candidates.
    assert found["mean_loss"] == found["worst_loss"] == found["worst_over_baseline"] == 0.0
    assert (found["mean_saved"], found["most_saved"]) == (0.1, 0.2)
    assert found["alone"]["policy 2"] == {"mean_loss": 0.5, "worst_loss": 1.0}


def test_the_worst_count_is_named_and_counts_above_the_captured_have_their_own_figures():
    points = [
        of(8, "policy 1", policy_0=100, policy_1=110, table=110),
        of(64, "policy 1", policy_0=100, policy_1=104, table=104),
        of(128, "policy 0", policy_0=100, policy_1=104, table=100),
    ]
    found = figures(points, captured=(1, 8, 32))
    assert (found["worst_loss"], found["worst_at"]) == (pytest.approx(0.1), 8)
    assert (found[ABOVE]["worst_loss"], found[ABOVE]["mean_loss"]) == (0.04, 0.02)
    assert ABOVE not in figures(points, captured=(128,))
    assert ABOVE not in figures(points)


def test_what_slows_a_whole_round_cancels():
    rng = random.Random(1)
    rounds = [rng.uniform(80, 300) for _ in range(30)]
    us = {"policy 0": rounds, "policy 2": [r - 3.0 for r in rounds], "table": rounds}
    found = point(8, us, "policy 0")
    loss = found.loss["policy 0"]
    assert (loss.median, loss.low, loss.high) == pytest.approx((3.0, 3.0, 3.0))
    assert found.us["policy 0"] - found.us["policy 2"] == pytest.approx(3.0)
    assert found.surely_lost == pytest.approx(3.0 / found.us["policy 2"])


def test_a_tie_loses_nothing_for_sure():
    us = {"policy 0": [99.0, 101.2] * 10, "policy 1": [100.0] * 20, "table": [100.0] * 20}
    found = figures([point(8, us, "policy 0"), point(8, us, "policy 1")])
    # One of them seems best, and the other to lose; that is not known.
    assert found["worst_loss"] == pytest.approx(0.001)
    assert found["worst_loss_surely"] == 0.0


def test_who_was_left_out_after_a_stalled_look_is_no_best():
    """The baseline stalled in the only rounds that policy 2 took part in."""
    us = {"policy 0": [90.0, 80.0, *[10.0] * 8], "policy 1": [9.0] * 10, "policy 2": [30.0, 40.0]}
    found = point(64, us, "policy 1")
    assert found.us == {"policy 0": 10.0, "policy 1": 9.0, "policy 2": 9.0 + (21.0 + 31.0) / 2}
    assert found.best_us == 9.0


def test_a_candidate_far_behind_was_looked_at_and_its_loss_is_kept():
    us = {"policy 0": [100.0] * 20, "policy 1": [900.0] * LOOKS, "table": [100.0] * 20}
    found = figures([point(8, us, "policy 0")])
    assert found["alone"]["policy 1"]["worst_loss"] == 8.0
    assert found["sweep"][0]["loss_us"]["policy 1"] == [800.0, 800.0, 800.0]


def test_a_candidate_looked_at_in_slow_rounds_is_not_slow_for_that():
    us = {"policy 0": [300.0] * LOOKS + [100.0] * 20, "policy 1": [330.0] * LOOKS}
    found = point(8, {**us, "table": us["policy 0"]}, "policy 0")
    assert found.us["policy 1"] == 130.0
    assert found.lost("policy 1") == pytest.approx(0.3)


def test_overall_is_the_mean_of_means_and_the_worst_of_worsts():
    good = figures([of(64, "policy 0", policy_0=100, policy_1=120, table=100)], captured=(32,))
    bad = figures([of(64, "policy 1", policy_0=100, policy_1=120, table=120)], captured=(32,))
    found = overall([{CAPTURED: good, BUSY: bad}, {CAPTURED: bad, BUSY: bad}])
    assert found[CAPTURED]["mean_loss"] == pytest.approx(0.1)
    assert found[CAPTURED]["worst_loss"] == pytest.approx(0.2)
    assert found[BUSY][ABOVE]["mean_loss"] == pytest.approx(0.2)
    assert AS_IT_COMES not in found


def test_the_words_name_the_loss_of_each_and_device_over_host():
    us = steady(policy_0=100, policy_1=125, table=100)
    found = figures([point(64, us, "policy 0", host_us=200.0)])
    text = "\n".join(
        lines(
            {
                "layers": 8,
                "kernel": "cpu",
                "baseline": "policy 0",
                "overall": overall([{BUSY: found}]),
                "shapes": {"a model": {"situations": {BUSY: found}}, "another": {"failed": "why"}},
            }
        )
    )
    assert "25.00% 25.00 [25.00 25.00]" in text
    assert " 0.50 " in text  # 100 us of the device over 200 of the host
    assert "another: why" in text


def test_differences_of_pairs():
    assert difference([3.0, 5.0, 4.0], [1.0, 1.0, 1.0]).median == 3.0
    # The first rounds, which both took part in.
    assert difference([3.0, 5.0], [1.0, 1.0, 900.0]).median == 3.0
    with pytest.raises(ValueError, match="no pairs"):
        difference([], [1.0])


def test_the_interval_of_a_median_holds_in_most_cases():
    # 20 pairs: the sixth of each side (P(at most 5 of 20 below the median) = 2.07%).
    found = difference([float(i) for i in range(20)], [0.0] * 20)
    assert (found.low, found.high) == (5.0, 14.0)
    rng = random.Random(3)
    held = sum(
        (d := difference([rng.gauss(1.0, 1.0) for _ in range(20)], [0.0] * 20)).low <= 1.0 <= d.high
        for _ in range(400)
    )
    assert held / 400 > 0.93
    few = difference([1.0, 2.0, 3.0], [0.0] * 3)
    assert (few.low, few.high) == (1.0, 3.0)


def taken(names, seconds=0.0, tick=0.0, **options):
    """Rounds of samplers that take 1 us but for `slow`, and the order they were asked in."""
    order, clock = [], [0.0]

    def sampler(name):
        def sample():
            order.append(name)
            clock[0] += tick
            return 10.0 if name == "slow" else 1.0

        return sample

    found = in_rounds(
        {name: sampler(name) for name in names},
        seconds,
        far_behind=2.0,
        now=lambda: clock[0],
        **options,
    )
    return found, order


def test_rounds_go_on_while_there_is_time_and_no_longer():
    assert len(taken("ab")[0]["a"]) == MIN_ROUNDS
    assert len(taken("ab", seconds=20.0, tick=0.5)[0]["a"]) == 20
    assert len(taken("ab", seconds=1.0)[0]["a"]) == MAX_ROUNDS


def test_every_order_comes_up():
    _, order = taken("abc")
    rounds = ["".join(order[i : i + 3]) for i in range(0, 18, 3)]
    assert rounds == ["abc", "bca", "cab", "cba", "acb", "bac"]


def test_who_is_far_behind_is_left_out_unless_it_is_to_stay():
    found, order = taken(["a", "slow", "b"])
    assert (len(found["slow"]), len(found["a"])) == (LOOKS, MIN_ROUNDS)
    assert "slow" not in order[3 * LOOKS :]
    kept, _ = taken(["a", "slow", "b"], keep=["slow"])
    assert len(kept["slow"]) == MIN_ROUNDS
