"""Clocks: what a sample covers, on a made-up GPU. A real one's are in tests/kernels/test_gpu.py."""

import math
from collections.abc import Callable

import pytest
import torch

from adaptive_moe.policy.situation import Situation
from adaptive_moe.tuning.clocks import (
    BACKLOG_US,
    GRAPH_LOT,
    MAX_BACKLOG_US,
    REPLAY_US,
    TRAIN_LENGTH,
    BusyClock,
    GraphClock,
    IdleClock,
    NeverAheadError,
    Train,
    WallClock,
    at_once,
    calls_of,
    clock_for,
)
from tests.tuning.made_up_gpu import DEVICE, Gpu

GRAPH_CALLS = TRAIN_LENGTH[Situation.GRAPH]


def test_the_wall_clock_divides_the_trains_time_by_its_calls() -> None:
    now = iter([5.0, 5.000_120])
    ran: list[object] = []
    train = [lambda i=i: ran.append(i) for i in range(4)]
    sample = at_once(WallClock(lambda: next(now), lambda: ran.append("neutral")).prepare(train))
    assert sample() == pytest.approx(30.0)
    assert ran == ["neutral", 0, 1, 2, 3]


# Busy: the host is ahead


@pytest.mark.parametrize("host_us", [2.0, 30.0, 200.0, 3000.0])
def test_a_busy_sample_has_nothing_of_the_host_in_it(host_us: float) -> None:
    """However slow the host is: launches take it 1 to 150 times as long as the kernel runs."""
    gpu = Gpu()
    clock = BusyClock(gpu.neutral, gpu.spin, gpu.event)
    sample = at_once(clock.prepare([gpu.call("sort", host_us, 20.0)] * 2))
    assert sample() == pytest.approx(20.0)
    assert (clock.invalid > 0) == (host_us > 50.0)


def test_a_sample_whose_calls_came_late_is_none_and_is_taken_again_behind_more() -> None:
    gpu = Gpu()
    clock = BusyClock(gpu.neutral, gpu.spin, gpu.event)
    sample = at_once(clock.prepare([gpu.call("sort", 100.0, 20.0)] * 2))
    sample()
    spun = [start for name, start in gpu.log if name == "spin"]
    assert len(spun) == clock.invalid + 1 > 1
    assert gpu.ran() == ["spin", "neutral", "sort", "sort"] * len(spun)
    # What it took is kept for the next ones, of an idle device and of one still at work.
    for _ in range(5):
        sample()
    before, late = len(gpu.log), clock.invalid
    sample()
    assert gpu.ran()[before:] == ["spin", "neutral", "sort", "sort"]
    assert clock.invalid == late


def test_one_stall_of_the_host_is_not_paid_for_ever_after() -> None:
    gpu = Gpu()
    clock = BusyClock(gpu.neutral, gpu.spin, gpu.event)
    stalls = iter([5000.0] * 12)

    def sort() -> None:
        gpu.call("sort", next(stalls, 5.0), 20.0)()

    sampler = clock.prepare([sort] * 2)
    at_once(sampler)()
    grown = clock.backlog_us
    assert grown > 3 * BACKLOG_US
    for _ in range(100):
        for wait in [sampler(), sampler()]:
            wait()
    assert clock.backlog_us < grown / 2


def test_calls_that_wait_for_the_device_themselves_are_an_error_and_not_a_loop() -> None:
    gpu = Gpu()
    clock = BusyClock(gpu.neutral, gpu.spin, gpu.event)

    def waits() -> None:
        gpu.call("sort", 5.0, 20.0)()
        gpu.host = max(gpu.host, gpu.device)

    with pytest.raises(NeverAheadError, match="not ahead behind"):
        at_once(clock.prepare([waits]))()
    assert clock.backlog_us < 2 * MAX_BACKLOG_US


@pytest.mark.parametrize("host_us", [30.0, 200.0])
def test_samples_enqueued_one_behind_the_other_wait_for_nobody(host_us: float) -> None:
    """While a sample runs the host enqueues the next, behind no more backlog than that leaves."""
    gpu = Gpu()
    clock = BusyClock(gpu.neutral, gpu.spin, gpu.event)
    sampler = clock.prepare([gpu.call("sort", host_us, 20.0)] * 2)

    def round_of(visits: int) -> list[float]:
        waiting = [sampler() for _ in range(visits)]
        return [wait() for wait in waiting]

    def time_of(run: Callable[[], object]) -> float:
        before = gpu.host
        run()
        return gpu.host - before

    for _ in range(20):  # until the backlogs are what they will be
        assert round_of(6) == pytest.approx([20.0] * 6)
    together = min(time_of(lambda: round_of(6)) for _ in range(20))
    alone = min(time_of(lambda: [round_of(1) for _ in range(6)]) for _ in range(20))
    assert together < 0.9 * alone


# Idle: the device waits for the host


def test_an_idle_sample_begins_on_a_device_that_has_nothing_to_do() -> None:
    """The host's 30 us a call are all in it, those of the first call as well."""
    gpu = Gpu()
    sample = at_once(IdleClock(gpu.neutral, gpu.event).prepare([gpu.call("sort", 30.0, 5.0)] * 2))
    for _ in range(3):
        # From the start event to the end of the last call.
        assert sample() == pytest.approx((2 * 30.0 + 5.0) / 2)
        gpu.host += 50.0


@pytest.mark.parametrize("busy", [True, False])
def test_every_eager_sample_follows_a_neutral_call(busy: bool) -> None:
    gpu = Gpu()
    idle = IdleClock(gpu.neutral, gpu.event)
    clock = BusyClock(gpu.neutral, gpu.spin, gpu.event) if busy else idle
    one, two = (at_once(clock.prepare([gpu.call(name, 5.0, 5.0)] * 2)) for name in ("one", "two"))
    for sample in (one, one, two, one, two, two):
        before = len(gpu.log)
        sample()
        assert gpu.ran()[before:][-3] == "neutral"


# Graph: captured once, replayed


def replays(gpu: Gpu, captured: list[int]) -> Callable[[Train], Callable[[], None]]:
    """Capturing runs nothing; a replay takes the host 10 us and the device 3 a call."""

    def capture(calls: Train) -> Callable[[], None]:
        captured.append(len(calls))
        return gpu.call("replay", 10.0, 3.0 * len(calls))

    return capture


def test_a_graph_sample_is_a_replay_right_after_a_neutral_call_without_its_launch() -> None:
    gpu, captured = Gpu(), []
    clock = GraphClock(gpu.neutral, gpu.spin, replays(gpu, captured), gpu.event)
    sample = at_once(
        clock.prepare([lambda: pytest.fail("ran uncaptured")] * GRAPH_CALLS, call_us=3.0)
    )
    assert captured == [12]
    for _ in range(3):
        before = len(gpu.log)
        assert sample() == pytest.approx(3.0)
        assert gpu.ran()[before:] == ["spin", "neutral", "replay"]
        gpu.host = gpu.device + 50.0


@pytest.mark.parametrize("call_us", [0.0, 0.5, 2.2, 5.5, 7.3, 20.0, 1e3, 1e6])
def test_a_replay_is_long_enough_and_no_longer(call_us: float) -> None:
    calls = calls_of(GRAPH_CALLS, call_us)
    assert GRAPH_LOT <= calls <= GRAPH_CALLS
    assert calls % GRAPH_LOT == 0
    assert calls == GRAPH_CALLS or calls * call_us >= REPLAY_US
    assert calls == GRAPH_LOT or (calls - GRAPH_LOT) * call_us < REPLAY_US


def test_an_infinitely_long_call_is_not_repeated() -> None:
    assert calls_of(GRAPH_CALLS, math.inf) == GRAPH_LOT


def test_a_short_train_is_captured_whole() -> None:
    assert calls_of(2, 0.0) == calls_of(2, 5.0) == 2


def test_a_train_of_other_length_is_captured_in_whole_lots() -> None:
    assert [calls_of(n, 0.0) for n in (7, 10, 12)] == [4, 8, 12]


def test_on_a_cpu_a_predecessor_that_is_given_is_the_one_that_runs() -> None:
    ran: list[str] = []
    clock = clock_for(Situation.BUSY, torch.device("cpu"), lambda: ran.append("given"))
    at_once(clock.prepare([lambda: ran.append("call")]))()
    assert ran == ["given", "call"]


def test_a_long_train_of_short_calls_is_captured_as_far_as_a_replay_is_long() -> None:
    assert calls_of(1000, 0.2) == REPLAY_US / 0.2


@pytest.mark.parametrize(
    ("situation", "a_call", "ran"),
    [
        (Situation.GRAPH, 3.0, ["spin", "given", "replay"]),
        (Situation.BUSY, 3.0, ["spin", "given", *["sort"] * 4]),
        (Situation.IDLE, 7.0 + 3.0 / 4, ["given", *["sort"] * 4]),  # the host's 7 us are in it
    ],
)
def test_each_situation_of_a_gpu_has_its_clock(
    gpu: Gpu, situation: Situation, a_call: float, ran: list[str]
) -> None:
    clock = clock_for(situation, DEVICE, gpu.call("given", 5.0, 20.0))
    sample = at_once(clock.prepare([gpu.call("sort", 7.0, 3.0)] * 4))
    before = len(gpu.log)
    assert sample() == pytest.approx(a_call)
    assert gpu.ran()[before:] == ran
