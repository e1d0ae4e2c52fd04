"""The simulated clocks of calibration/simulated.py, and decisions on them, in small and seeded."""

import random
import statistics
from itertools import pairwise

import pytest

from calibration import decision, simulated
from calibration.decision import BASE, ONE, TWO
from calibration.simulated import DEVICES, Device, Steady

SAME = {BASE: 9.0, ONE: 9.0, TWO: 9.0}


def device(name, times=SAME, seed=5):
    return DEVICES[name](lambda _: times, random.Random(f"{name} {seed}"))


def chosen(name, times, calibrations=2):
    """What each bucket of a few calibrations gets."""
    tables = (device(name, times, seed).calibrate(64) for seed in range(calibrations))
    return {choice for table in tables for _, choice in decision.buckets(table)}


@pytest.mark.parametrize("name", ["bimodal", "capture_bias", "pays_after_policy_2", "stalls_4pct"])
def test_identical_candidates_stay_with_the_baseline(name):
    assert chosen(name, SAME) == {BASE}


@pytest.mark.parametrize("name", ["ticks", "heavy_tails", "ar1_07", "pays_after_policy_2"])
def test_a_gain_of_ten_percent_is_found(name):
    assert chosen(name, SAME | {TWO: 8.1}) == {TWO}


def test_without_the_neutral_predecessor_the_one_before_would_decide(monkeypatch):
    # What the call before costs is real: a device whose neutral call does nothing shows it.
    monkeypatch.setattr(simulated.PaysAfter, "neutral", lambda self: None)
    assert TWO in chosen("pays_after_policy_2", SAME)


def test_a_table_of_a_device_follows_its_true_times():
    def true_us(num_tokens):
        one, two = 4.0 + 0.1 * num_tokens, 8.0
        return {BASE: one if num_tokens <= 300 else two, ONE: one, TWO: two}

    table = Device(true_us, random.Random(2)).calibrate(512)
    for num_tokens in (1, 20, 60, 150, 290, 300, 301, 400, 512):
        times = true_us(num_tokens)
        assert times[table.candidate(num_tokens)] / min(times.values()) < 1.05


def test_figures_have_what_the_bench_says():
    found = decision.figures(13, 1, "capture_bias")
    assert found["buckets"] >= 13
    assert found["false_switch_rate"] == 0.0
    assert found["found_10pct"] > 0.5


def factors(made, number, name=BASE):
    """(seconds, factor) of so many calls one after the other."""
    found = []
    for _ in range(number):
        begun = made.seconds
        made.call(name, 10.0)
        found.append((made.seconds, (made.seconds - begun) * 1e5))
    return found


def test_the_steady_clock_has_the_outliers_it_claims():
    made = Steady(lambda _: SAME, random.Random(1))
    assert 60 < sum(factor > 3.5 for _, factor in factors(made, 10_000)) < 140


@pytest.mark.parametrize(("name", "rho"), [("ar1_07", 0.7), ("ar1_09", 0.9)])
def test_the_correlated_clocks_have_the_correlation_they_claim(name, rho):
    made, values = device(name), []
    for _ in range(20_000):
        made.seconds += simulated.ROUND_S
        made.factor(BASE)
        values.append(made.state[BASE][0])
    assert statistics.stdev(values) == pytest.approx(0.02, rel=0.1)
    assert statistics.correlation(values[1:], values[:-1]) == pytest.approx(rho, abs=0.03)


@pytest.mark.parametrize(
    ("name", "dwell"), [("two_speeds_dwell_10", 10), ("two_speeds_dwell_50", 50)]
)
def test_two_speeds_are_ten_percent_apart_and_last_as_long_as_they_claim(name, dwell):
    made = device(name)
    times = factors(made, 200_000)
    slow = [factor > 1.05 for _, factor in times]
    assert statistics.fmean(slow) == pytest.approx(0.5, abs=0.1)
    changes = sum(a != b for a, b in pairwise(slow))
    assert times[-1][0] / changes / simulated.ROUND_S == pytest.approx(dwell, rel=0.25)


@pytest.mark.parametrize(("name", "share"), [("stalls_4pct", 0.04), ("stalls_8pct", 0.08)])
def test_that_share_of_the_samples_stalls(name, share):
    made = device(name)
    stalled = 0
    for _ in range(5000):
        made.neutral()
        stalled += made.factor(BASE) > 3.0
    assert stalled / 5000 == pytest.approx(share, rel=0.25)


def test_what_is_prepared_together_has_one_bias_and_the_next_another():
    made = device("capture_bias")
    biases = []
    for _ in range(200):
        biases.append(made.bound(BASE))
        assert made.bound(BASE) == biases[-1]
        made.call(BASE, 10.0)
    assert statistics.stdev(biases) == pytest.approx(0.01, rel=0.3)
