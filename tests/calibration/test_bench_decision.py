"""The simulated clocks and decisions of calibration/bench_decision.py, in small and seeded."""

import random

import pytest

from adaptive_moe.policy.decision import Rule
from calibration import bench_decision as decision


@pytest.mark.parametrize("bimodal", [False, True])
def test_simulated_decisions_meet_the_goals_in_small(bimodal):
    rng = random.Random(5)
    same, better, worse = {0: 9.0, 1: 9.0, 2: 9.0}, {0: 9.0, 1: 9.0, 2: 8.1}, {0: 9.0, 1: 9.9}

    def policies(true_us, count=40):
        return [
            decision.simulate_bucket(true_us, rng, bimodal=bimodal, rule=Rule())[0].policy
            for _ in range(count)
        ]

    assert set(policies(same)) == {0}
    assert set(policies(better)) == {2}
    assert set(policies(worse)) == {0}


def test_the_simulated_clock_has_the_noise_it_claims():
    clock = decision.NoisyClock({0: 10.0}, random.Random(1), bimodal=False)
    clock.samples = decision.DRIFT_SAMPLES
    times = sorted(clock.sample(0) for _ in range(4000))
    assert times[2000] == pytest.approx(11.5, rel=0.01)  # the whole drift
    spread = (times[3364] - times[636]) / 2 / times[2000]  # a standard deviation each way
    assert spread == pytest.approx(0.05, rel=0.15)
    assert 20 < sum(time > 40 for time in times) < 70  # 1% of 4000, times five


def test_simulated_tables_find_both_the_crossover_and_the_jump_of_policy_0():
    def true_us(num_tokens):
        one, two = 4.0 + 0.1 * num_tokens, 8.0
        return {0: one if num_tokens <= 300 else two, 1: one, 2: two}

    table = decision.simulate_table(true_us, random.Random(2), bimodal=False, rule=Rule())
    for num_tokens in (1, 20, 60, 150, 290, 300, 301, 400, 16384):
        times = true_us(num_tokens)
        chosen = table[decision._serving(table, num_tokens)]
        assert times[chosen] / min(times.values()) < 1.05
