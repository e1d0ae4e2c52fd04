"""The simulated clocks and decisions of calibration/bench_decision.py, in small and seeded."""

import random
import statistics
from itertools import pairwise

import pytest

from calibration import bench_decision as decision
from calibration.bench_decision import BASE, ONE, TWO, simulate_bucket
from calibration.simulated import DEVICES, Device, Steady

SAME = {BASE: 9.0, ONE: 9.0, TWO: 9.0}


def outcomes(name, true_us, count=40, **options):
    rng = random.Random(f"{name} 5")
    return [simulate_bucket(DEVICES[name](true_us, rng), **options) for _ in range(count)]


def chosen(name, true_us, count=40, **options):
    return [o.verdict.candidate for o in outcomes(name, true_us, count, **options)]


@pytest.mark.parametrize("name", ["steady", "bimodal"])
def test_simulated_decisions_meet_the_goals_in_small(name):
    assert set(chosen(name, SAME)) == {BASE}
    assert set(chosen(name, SAME | {TWO: 8.1})) == {TWO}
    assert set(chosen(name, {BASE: 9.0, ONE: 9.9})) == {BASE}


@pytest.mark.parametrize("name", ["pays_after_policy_2", "wins_after_policy_0"])
def test_nobody_pays_for_a_neighbour_because_each_sample_follows_the_neutral_call(name):
    assert set(chosen(name, SAME)) == {BASE}
    # What it takes away is real: without it all is decided by who ran before.
    assert chosen(name, SAME, neutral=False).count(BASE) < 10
    # Nor does it hide what is true.
    assert set(chosen(name, SAME | {TWO: 8.1})) == {TWO}


@pytest.mark.parametrize("name", ["ar1_09", "two_speeds_dwell_50", "capture_bias"])
def test_the_second_pass_ends_most_false_switches_of_the_first(name):
    found = outcomes(name, SAME, 150)
    first = sum(o.first.candidate != BASE for o in found)
    both = sum(o.switched for o in found)
    assert first >= 5
    assert both <= first / 3


def test_the_steady_clock_has_the_noise_it_claims():
    device = Steady({BASE: 10.0}, random.Random(1))
    device.samples = 1000
    times = sorted(10.0 * device.factor(BASE) for _ in range(4000))
    assert times[2000] == pytest.approx(11.5, rel=0.01)  # the whole drift
    spread = (times[3364] - times[636]) / 2 / times[2000]  # a standard deviation each way
    assert spread == pytest.approx(0.05, rel=0.15)
    assert 20 < sum(time > 40 for time in times) < 70  # 1% of 4000, times five


@pytest.mark.parametrize(("name", "rho"), [("ar1_07", 0.7), ("ar1_09", 0.9)])
def test_the_correlated_clocks_have_the_correlation_they_claim(name, rho):
    device = DEVICES[name]({BASE: 10.0}, random.Random(1))
    values = []
    for _ in range(20_000):
        device.next_round()
        values.append(device.state[BASE])
    assert statistics.stdev(values) == pytest.approx(0.02, rel=0.1)
    assert statistics.correlation(values, values[1:] + values[:1]) == pytest.approx(rho, abs=0.03)


@pytest.mark.parametrize(
    ("name", "dwell"), [("two_speeds_dwell_10", 10), ("two_speeds_dwell_50", 50)]
)
def test_two_speeds_are_ten_percent_apart_and_last_as_long_as_they_claim(name, dwell):
    device = DEVICES[name]({BASE: 10.0, ONE: 10.0}, random.Random(1))
    factors = [device.factor(BASE) for _ in range(20_000)]
    slow = [factor > 1.05 for factor in factors]
    assert statistics.fmean(slow) == pytest.approx(0.5, abs=0.1)
    changes = sum(a != b for a, b in pairwise(slow))
    assert 20_000 / changes == pytest.approx(dwell, rel=0.15)


def test_a_captured_graph_keeps_its_bias_and_the_next_has_another():
    device = DEVICES["capture_bias"](SAME, random.Random(1))
    clock = decision.SimulatedClock(device)
    means = []
    for _ in range(50):
        sample = clock.prepare([lambda: device.call(BASE)])
        means.append(statistics.fmean(sample()() for _ in range(100)))
    assert statistics.stdev(means) / 9.0 == pytest.approx(0.01, rel=0.35)


def test_what_runs_after_policy_2_pays_and_after_the_neutral_call_does_not():
    device = DEVICES["pays_after_policy_2"](SAME, random.Random(1))

    def time_after(before):
        before()
        begun = device.seconds
        device.call(ONE)
        return (device.seconds - begun) * 1e6

    after_two = statistics.fmean(time_after(lambda: device.call(TWO)) for _ in range(200))
    after_neutral = statistics.fmean(time_after(device.neutral) for _ in range(200))
    assert after_two / after_neutral == pytest.approx(1.1, abs=0.01)


def test_simulated_tables_find_the_crossover_and_the_jump_of_the_baseline():
    def true_us(num_tokens):
        one, two = 4.0 + 0.1 * num_tokens, 8.0
        return {BASE: one if num_tokens <= 300 else two, ONE: one, TWO: two}

    rng = random.Random(2)
    table = decision.simulate_table(true_us, lambda times: Device(times, rng))
    for num_tokens in (1, 20, 60, 150, 290, 300, 301, 400, 16384):
        times = true_us(num_tokens)
        assert times[decision.serves(table, num_tokens)] / min(times.values()) < 1.05
