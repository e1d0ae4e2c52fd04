"""Clocks: what a sample covers, on a made-up GPU. A real one's are in tests/kernels/test_gpu.py."""

import math
from collections.abc import Callable

import pytest
import torch

from adaptive_moe.policy.coverage import Situation
from adaptive_moe.tuning.clocks import (
    BACKLOG_US,
    GRAPH_LOT,
    LONG_CALL_US,
    MAX_BACKLOG_US,
    REPLAY_US,
    TRAIN_LENGTH,
    EagerClock,
    GraphClock,
    Neutral,
    NeverAheadError,
    Sample,
    Sampler,
    Spin,
    Train,
    WallClock,
    calls_in_graph,
    clock_for,
)
from tests.tuning.made_up_gpu import DEVICE, Gpu

GRAPH_CALLS = TRAIN_LENGTH[Situation.GRAPH]


def at_once(sampler: Sampler) -> Callable[[], float]:
    """Device time of samples that are waited for one by one."""
    return lambda: sampler()().device_us


def test_the_wall_clock_divides_the_trains_time_by_its_calls() -> None:
    now = iter([5.0, 5.000_120])
    ran: list[object] = []
    train = [lambda i=i: ran.append(i) for i in range(4)]
    sample = at_once(WallClock(lambda: next(now), lambda: ran.append("neutral")).prepare(train))
    assert sample() == pytest.approx(30.0)
    assert ran == ["neutral", 0, 1, 2, 3]


def test_on_a_cpu_long_calls_are_timed_in_a_short_train_of_both_routings() -> None:
    ran: list[int] = []
    train = [lambda i=i: ran.append(i) for i in range(4)]
    at_once(WallClock().prepare(train, call_us=LONG_CALL_US))()
    assert ran == [0, 1]


# Eager: the host is ahead


@pytest.mark.parametrize("host_us", [2.0, 30.0, 200.0, 3000.0])
def test_an_eager_sample_s_device_time_has_nothing_of_the_host_in_it(host_us: float) -> None:
    """However slow the host is: launches take it 1 to 150 times as long as the kernel runs."""
    gpu = Gpu()
    clock = EagerClock(gpu.neutral, gpu.spin, gpu.event)
    sample = at_once(clock.prepare([gpu.call("sort", host_us, 20.0)] * 2))
    assert sample() == pytest.approx(20.0)
    assert (clock.retaken > 0) == (host_us > 50.0)


def test_a_sample_whose_calls_came_late_is_none_and_is_taken_again_behind_more() -> None:
    gpu = Gpu()
    clock = EagerClock(gpu.neutral, gpu.spin, gpu.event)
    sample = at_once(clock.prepare([gpu.call("sort", 100.0, 20.0)] * 2))
    sample()
    spun = [start for name, start in gpu.log if name == "spin"]
    assert len(spun) == clock.retaken + 1 > 1
    assert gpu.ran() == ["spin", "neutral", "sort", "sort"] * len(spun)
    # What it took is kept for the next ones, of an idle device and of one still at work.
    for _ in range(5):
        sample()
    before, late = len(gpu.log), clock.retaken
    sample()
    assert gpu.ran()[before:] == ["spin", "neutral", "sort", "sort"]
    assert clock.retaken == late


def test_one_stall_of_the_host_is_not_paid_for_ever_after() -> None:
    gpu = Gpu()
    clock = EagerClock(gpu.neutral, gpu.spin, gpu.event)
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
    clock = EagerClock(gpu.neutral, gpu.spin, gpu.event)

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
    clock = EagerClock(gpu.neutral, gpu.spin, gpu.event)
    sampler = clock.prepare([gpu.call("sort", host_us, 20.0)] * 2)

    def round_of(visits: int) -> list[float]:
        waiting = [sampler() for _ in range(visits)]
        return [wait().device_us for wait in waiting]

    def time_of(run: Callable[[], object]) -> float:
        before = gpu.host
        run()
        return gpu.host - before

    for _ in range(20):  # until the backlogs are what they will be
        assert round_of(6) == pytest.approx([20.0] * 6)
    together = min(time_of(lambda: round_of(6)) for _ in range(20))
    alone = min(time_of(lambda: [round_of(1) for _ in range(6)]) for _ in range(20))
    assert together < 0.9 * alone


@pytest.mark.parametrize("host_us", [2.0, 30.0, 200.0])
def test_the_host_s_time_is_read_around_the_same_calls(host_us: float) -> None:
    gpu = Gpu()
    clock = EagerClock(gpu.neutral, gpu.spin, gpu.event, timer=lambda: gpu.host * 1e-6)
    sampler = clock.prepare([gpu.call("sort", host_us, 20.0)] * 4)
    assert sampler()() == pytest.approx(Sample(20.0, host_us))


def test_one_interrupted_call_does_not_change_the_host_s_time() -> None:
    gpu = Gpu()
    clock = EagerClock(gpu.neutral, gpu.spin, gpu.event, timer=lambda: gpu.host * 1e-6)
    calls = [gpu.call("sort", host_us, 20.0) for host_us in (10.0, 10.0, 60.0, 10.0)]
    assert clock.prepare(calls)()().host_us == pytest.approx(10.0)


def test_every_eager_sample_follows_a_neutral_call() -> None:
    gpu = Gpu()
    clock = EagerClock(gpu.neutral, gpu.spin, gpu.event)
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
    calls = calls_in_graph(GRAPH_CALLS, call_us)
    assert GRAPH_LOT <= calls <= GRAPH_CALLS
    assert calls % GRAPH_LOT == 0
    assert calls == GRAPH_CALLS or calls * call_us >= REPLAY_US
    assert calls == GRAPH_LOT or (calls - GRAPH_LOT) * call_us < REPLAY_US


def test_an_infinitely_long_call_is_not_repeated() -> None:
    assert calls_in_graph(GRAPH_CALLS, math.inf) == GRAPH_LOT


def test_a_short_train_is_captured_whole() -> None:
    assert calls_in_graph(2, 0.0) == calls_in_graph(2, 5.0) == 2


def test_a_train_of_other_length_is_captured_in_whole_lots() -> None:
    assert [calls_in_graph(n, 0.0) for n in (7, 10, 12)] == [4, 8, 12]


def test_on_a_cpu_a_predecessor_that_is_given_is_the_one_that_runs() -> None:
    ran: list[str] = []
    clock = clock_for(Situation.EAGER, torch.device("cpu"), lambda: ran.append("given"))
    at_once(clock.prepare([lambda: ran.append("call")]))()
    assert ran == ["given", "call"]


def test_a_long_train_of_short_calls_is_captured_as_far_as_a_replay_is_long() -> None:
    assert calls_in_graph(1000, 0.2) == REPLAY_US / 0.2


@pytest.mark.parametrize(
    ("situation", "a_call", "ran"),
    [
        (Situation.GRAPH, 3.0, ["spin", "given", "replay"]),
        (Situation.EAGER, 3.0, ["spin", "given", *["sort"] * 4]),
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


@pytest.mark.parametrize(("reports", "writes"), [(50 << 20, 50 << 20), (4 << 20, 32 << 20)])
def test_the_neutral_call_writes_more_than_the_l2_holds(
    gpu: Gpu, reports: int, writes: int
) -> None:
    gpu.properties.L2_cache_size = reports
    assert Neutral(DEVICE)._buffer.numel() == writes


def test_a_spin_lasts_as_long_as_it_is_told_on_whatever_device(gpu: Gpu) -> None:
    spin = Spin(DEVICE)
    before = gpu.device = gpu.host = max(gpu.device, gpu.host)
    spin(250.0)
    assert gpu.device - before == pytest.approx(250.0, abs=6.0)


def test_graphs_are_captured_aside_in_one_pool_and_leave_the_stream_as_it_was(gpu: Gpu) -> None:
    clock = clock_for(Situation.GRAPH, DEVICE, gpu.neutral)
    for name in ("one", "two"):
        at_once(clock.prepare([gpu.call(name, 5.0, 3.0)] * 4))()
    assert len(gpu.pools) == 1
    assert gpu.stream.name == "the current stream"
    assert gpu.told.count("captures on its own stream, thread_local") == 3
