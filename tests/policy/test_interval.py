"""interval.py: fences, and how much wider an interval is where rounds resemble each other."""

import math

import pytest

from adaptive_moe.policy.decision import Result, Rule, Samples, decide
from adaptive_moe.policy.interval import MOST_MEMORY, half_width, median, memory, moments


@pytest.mark.parametrize(
    ("deviations", "correlation"),
    [
        ((2.0, 2.0, -2.0, -2.0), 0.25),
        ((2.0, 2.0, 2.0, -2.0, -2.0, -2.0), 0.5),
        ((2.0, -2.0, 2.0, -2.0), 0.0),
        ([2.0] * 50 + [-2.0] * 50, MOST_MEMORY),
        ((0.0, 0.0, 0.0), 0.0),
    ],
)
def test_the_interval_widens_as_that_of_a_series_with_this_correlation(
    deviations: list[float], correlation: float
) -> None:
    spread = math.fsum(d * d for d in deviations)
    wider = math.sqrt((1.0 + correlation) / (1.0 - correlation))
    assert memory(deviations, spread) == pytest.approx(wider)


def test_the_unit_of_the_values_does_not_change_what_they_remember() -> None:
    values = (0.3, 0.5, 0.6, 0.2, 0.1, 0.4)
    assert moments(values)[2] > 1.0
    assert moments([1e-3 * v for v in values])[2] == pytest.approx(moments(values)[2])


def test_the_same_rounds_say_less_in_an_order_in_which_they_drift() -> None:
    drifting = [0.99, 0.99, 0.99, 1.01, 1.01, 1.01]

    def half(ratios: list[float]) -> float:
        rounds = [Samples("p0", (10.0,) * 6), Samples("p1", tuple(8.0 * r for r in ratios))]
        one: Result = decide(rounds, Rule()).results[1]
        assert one.gain is not None
        assert one.gain_low is not None
        return math.log1p(-one.gain_low) - math.log1p(-one.gain)

    steady = half([0.99, 1.01] * 3)
    assert half(drifting) == pytest.approx(math.sqrt(3.0) * steady)


def test_what_lies_beyond_the_fences_counts_as_if_it_lay_on_them() -> None:
    middle = [float(v) for v in range(1, 19)]
    # The inner 80% of 20 values are 2 to 17: one such width below, and one above.
    fenced = [-13.0, *middle, 32.0]
    assert moments([-1e3, *middle, 1e3]) == moments(fenced)
    mean, spread, _ = moments(fenced)
    assert mean == pytest.approx(9.5)
    assert spread == pytest.approx(math.fsum((v - 9.5) ** 2 for v in fenced))


def test_the_median_is_the_middle_or_between_the_two_in_the_middle() -> None:
    assert (median([3.0, 1.0, 7.0]), median([9.0, 1.0, 2.0, 4.0]), median([])) == (3.0, 3.0, None)


@pytest.mark.parametrize("alpha", [0.01, 1.0])
def test_one_round_has_no_interval_however_little_is_asked_of_it(alpha: float) -> None:
    assert half_width(1, 0.0, alpha) == math.inf
