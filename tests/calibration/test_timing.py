"""How a step is timed on a GPU, on one that is made up: a host's clock and a device's queue."""

import pytest
import torch

from calibration import timing
from calibration.timing import AS_IT_COMES, BACKLOG_US, CAPTURED, HOST_AHEAD, Timer


class MadeUp:
    """host: the host's time in us; free: when the device has done all that is enqueued."""

    def __init__(self):
        self.host, self.free = 0.0, 0.0
        self.captures = 0

    def enqueue(self, device_us, host_us=0.0):
        self.host += host_us
        self.free = max(self.free, self.host) + device_us

    def synchronize(self, *_):
        self.host = max(self.host, self.free)

    def event(self):
        made = self

        class Event:
            def record(self):
                self.at = max(made.free, made.host)

            def query(self):
                return made.host >= self.at

            def synchronize(self):
                made.host = max(made.host, self.at)

            def elapsed_time(self, end):
                return (end.at - self.at) / 1e3

        return Event()

    def capture(self, calls):
        """Each graph takes as many us as graphs were captured so far."""
        self.captures += 1
        us = float(self.captures)
        return lambda: self.enqueue(us)


@pytest.fixture
def made(monkeypatch):
    gpu = MadeUp()
    monkeypatch.setattr(timing, "Neutral", lambda _: lambda: gpu.enqueue(20.0))
    monkeypatch.setattr(timing, "Spin", lambda _: gpu.enqueue)
    monkeypatch.setattr(timing, "Graphs", lambda _: gpu)
    monkeypatch.setattr(timing, "gpu_event", gpu.event)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    return gpu


@pytest.fixture
def timer(made):
    return Timer(torch.device("cuda", 0))


def step(made, layers=8, device_us=10.0, host_us=50.0):
    def run():
        for _ in range(layers):
            made.enqueue(device_us, host_us)

    return run


def test_with_the_host_ahead_only_the_device_counts(made, timer):
    sample = timer.sampler(HOST_AHEAD, step(made))
    assert [sample() for _ in range(20)] == pytest.approx([80.0] * 20)


def test_as_it_comes_the_host_counts_where_it_is_slower(made, timer):
    assert timer.sampler(AS_IT_COMES, step(made))() == pytest.approx(410.0)
    assert timer.sampler(AS_IT_COMES, step(made, device_us=90.0))() == pytest.approx(770.0)


def test_replays_go_round_all_graphs(made, timer):
    sample = timer.sampler(CAPTURED, step(made), instances=3)
    assert [sample() for _ in range(6)] == pytest.approx([1.0, 2.0, 3.0] * 2)


def test_a_step_that_waits_for_the_device_is_never_ahead(made, timer):
    def waits():
        made.enqueue(1.0)
        made.synchronize()

    with pytest.raises(RuntimeError, match="not ahead"):
        timer.sampler(HOST_AHEAD, waits)()


def test_a_backlog_that_grew_for_a_slow_host_shrinks_again(made, timer):
    timer.sampler(HOST_AHEAD, step(made, host_us=200.0))()
    fast, begun = timer.sampler(HOST_AHEAD, step(made, host_us=1.0)), made.free
    for _ in range(500):
        fast()
    assert (made.free - begun) / 500 < 3 * BACKLOG_US


def test_a_cpu_has_one_situation():
    assert Timer(torch.device("cpu")).situations == (AS_IT_COMES,)
