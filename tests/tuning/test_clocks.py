"""Clocks: what a sample covers. The GPU's clocks run in test_gpu.py."""

import pytest

from adaptive_moe.tuning.clocks import MAX_PASSES, REPLAY_US, WallClock, passes_over


def test_the_wall_clock_divides_the_trains_time_by_its_calls() -> None:
    now = iter([5.0, 5.000_120])
    ran: list[int] = []
    train = [lambda i=i: ran.append(i) for i in range(4)]
    sample = WallClock(timer=lambda: next(now)).prepare(train)
    assert sample() == pytest.approx(30.0)
    assert ran == [0, 1, 2, 3]


@pytest.mark.parametrize("call_us", [0.0, 0.5, 2.2, 5.5, 7.3, 20.0, 1e3, 1e6])
def test_a_replay_is_long_enough_and_no_longer(call_us: float) -> None:
    passes = passes_over(4, call_us)
    assert 1 <= passes <= MAX_PASSES
    assert passes == MAX_PASSES or passes * 4 * call_us >= REPLAY_US
    assert passes == 1 or (passes - 1) * 4 * call_us < REPLAY_US


def test_an_infinitely_long_call_is_not_repeated() -> None:
    assert passes_over(4, float("inf")) == 1
