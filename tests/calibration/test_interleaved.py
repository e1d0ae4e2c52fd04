"""The one way in which benches compare: orders, ends and intervals by hand."""

import itertools
import random
from collections import Counter

import pytest

from calibration.interleaved import MIN_ROUNDS, difference, interleave, interval, longer


def recording(log, times):
    """Samplers that say so when they run, and take what they are given."""
    return {name: lambda name=name: log.append(name) or float(times[name]) for name in times}


def test_a_round_goes_there_and_back_and_all_run_equally_often_in_every_place():
    log = []
    found = interleave(recording(log, {"a": 1, "b": 2, "c": 4}), 0.0, now=lambda: 0.0)
    assert found == {"a": [1.0] * MIN_ROUNDS, "b": [2.0] * MIN_ROUNDS, "c": [4.0] * MIN_ROUNDS}
    rounds = [log[i : i + 6] for i in range(0, len(log), 6)]
    assert all(one == one[::-1] for one in rounds)
    assert Counter(one[0] for one in rounds) == {"a": 2, "b": 2, "c": 2}
    after = Counter(pair for one in rounds for pair in itertools.pairwise(one[:3]))
    assert after["a", "b"] == after["b", "a"] == after["c", "a"] == 2


def test_rounds_go_on_until_the_time_is_over():
    clock = itertools.count()
    found = interleave({"a": lambda: 1.0}, 30.0, now=lambda: next(clock))
    assert len(found["a"]) == MIN_ROUNDS + 29  # the end was set by one look at the clock


def test_what_is_far_behind_is_left_out_unless_it_is_to_stay():
    samplers = recording([], {"a": 1, "b": 9, "c": 9})
    found = interleave(samplers, 0.0, far_behind=6.0, keep=["c"], now=lambda: 0.0)
    assert [len(found[name]) for name in "abc"] == [MIN_ROUNDS, 2, MIN_ROUNDS]


def test_longer_is_a_fraction_within_rounds():
    base = [10.0, 20.0, 40.0, 10.0, 30.0, 10.0, 20.0, 10.0]
    found = longer([1.1 * us for us in base], base)
    assert found.mean == pytest.approx(0.1)
    assert found.is_clear
    assert longer([22.0], [20.0]).mean == pytest.approx(0.1)  # one round, and nothing is sure
    assert not longer([22.0], [20.0]).is_clear


def test_difference_holds_what_is_true_and_tells_noise_from_it():
    rng = random.Random(3)
    ours = [12.0 + rng.gauss(0.0, 1.0) for _ in range(200)]
    base = [10.0 + rng.gauss(0.0, 1.0) for _ in range(200)]
    found = difference(ours, base)
    assert found.low < 2.0 < found.high
    assert found.is_clear
    assert not difference(base, [10.0 + rng.gauss(0.0, 1.0) for _ in base]).is_clear


def test_without_rounds_there_is_nothing_to_say():
    with pytest.raises(ValueError, match="no rounds"):
        interval([])
