"""interval.py: fences, memory, and rounds that are pooled."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_moe.policy.evidence import Ratios, Rule
from adaptive_moe.policy.interval import MOST_MEMORY, half_width, median, pool, summarize
from adaptive_moe.policy.verdict import Standing, judge_rounds

logs = st.lists(st.floats(-1.0, 1.0), min_size=1, max_size=30)


@pytest.mark.parametrize(
    ("values", "correlation"),
    [
        ((2.0, 2.0, -2.0, -2.0), 0.25),
        ((2.0, 2.0, 2.0, -2.0, -2.0, -2.0), 0.5),
        ((2.0, -2.0, 2.0, -2.0), 0.0),
        ([2.0] * 50 + [-2.0] * 50, MOST_MEMORY),
        ((0.0, 0.0, 0.0), 0.0),
    ],
)
def test_the_interval_widens_as_that_of_a_series_with_this_correlation(values, correlation):
    wider = math.sqrt((1.0 + correlation) / (1.0 - correlation))
    assert summarize(values).memory == pytest.approx(wider)


def test_the_same_rounds_say_less_in_an_order_in_which_they_drift():
    drift = [math.log(0.8) + d for d in (-0.01, -0.01, -0.01, 0.01, 0.01, 0.01)]
    mixed = [math.log(0.8) + d for d in (-0.01, 0.01, -0.01, 0.01, -0.01, 0.01)]

    def half(values):
        judged = judge_rounds("p1", 8.0, summarize(values), Rule(), 4)
        return math.log1p(-judged.gain_low) - math.log1p(-judged.gain)

    assert half(drift) == pytest.approx(math.sqrt(3.0) * half(mixed))


def test_what_lies_beyond_the_fences_counts_as_if_it_lay_on_them():
    middle = [0.1 * v for v in range(1, 19)]
    # The inner 80% of 20 values are 0.2 to 1.7: one such width below, and one above.
    found = summarize([-19.0, *middle, 19.0])
    fenced = summarize([-1.3, *middle, 3.2])
    assert (found.mean, found.spread) == pytest.approx((fenced.mean, fenced.spread))


@given(logs, logs)
def test_pooled_rounds_are_as_many_with_their_common_mean_and_spread(one, other):
    found = pool([_exact(one), _exact(other)])
    whole = _exact([*one, *other])
    assert found.rounds == whole.rounds
    assert found.mean == pytest.approx(whole.mean, abs=1e-9)
    assert found.spread == pytest.approx(whole.spread, abs=1e-9)


def test_pooled_rounds_remember_as_the_worst_of_them():
    assert pool([Ratios(4, 0.0, 1.0, 1.5), Ratios(4, 0.0, 1.0, 2.5)]).memory == 2.5


def test_the_interval_holds_however_often_one_looks():
    """1,000 series of 200 normal values: at 99% the mean lies outside at some look in few."""
    rng = random.Random(5)
    missed = 0
    for _ in range(1000):
        values, total, squares, out = [], 0.0, 0.0, False
        for n in range(1, 201):
            value = rng.gauss(0.0, 1.0)
            values.append(value)
            total, squares = total + value, squares + value * value
            spread = squares - total * total / n
            out = out or (n > 3 and abs(total / n) > half_width(n, spread, 0.01))
        missed += out
    assert missed <= 20


def test_the_median_is_the_middle_or_between_the_two_in_the_middle():
    assert (median([3.0, 1.0, 7.0]), median([9.0, 1.0, 2.0, 4.0]), median([])) == (3.0, 3.0, None)


def test_a_candidate_far_off_the_scale_is_still_judged():
    assert judge_rounds("p1", 1.0, summarize([1e9] * 6), Rule(), 4).standing is Standing.SLOWER


def _exact(values):
    """Without fences, which depend on what is summarized together."""
    mean = math.fsum(values) / len(values)
    return Ratios(len(values), mean, math.fsum((v - mean) ** 2 for v in values))
