"""How the benches time a call or a whole step in each situation of serving, in microseconds.

    captured    replays of graphs that hold it
    host ahead  eager, all of it enqueued behind a backlog before the device reaches it
    as it comes eager, from an idle device, which waits for the host where it must

On a CPU there is only the last. Every sample follows the same large write, so that it starts from
the same state of the caches. All that the benches take from the inside of adaptive_moe's tuning
and of its tables is imported here.
"""

import itertools
import time
from collections.abc import Callable

import torch

from adaptive_moe.kernels.contract import SortingInputs
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.shape import SortingShape
from adaptive_moe.tuning.calibrate import Plan, calibrate
from adaptive_moe.tuning.clocks import Graphs, Neutral, Spin, WallClock, gpu_event
from adaptive_moe.tuning.inputs import Routing, default_mask, route, sorting_inputs
from calibration.interleaved import Sample

__all__ = ["CAPTURED", "EAGER", "Plan", "Timer", "WallClock", "buckets", "calibrate", "inputs_of"]

CAPTURED, HOST_AHEAD, AS_IT_COMES = "captured", "eager, host ahead", "eager, as it comes"
EAGER = (HOST_AHEAD, AS_IT_COMES)

# Two graphs of the same kernels differ by up to a few percent, and no number of replays of one
# takes that out: a sampler goes round so many.
INSTANCES = 10
# Microseconds of work in front of a sample: at first and at least, and at most; how that follows
# the host, up where a sample came late and down a little where it did not.
BACKLOG_US, MAX_BACKLOG_US = 100.0, 100_000.0
GROWTH, DECAY = 1.5, 31 / 32

# The benches' own seeds: they never see the routing that a calibration was made on.
FIRST_SEED = 1000
ROUTINGS = (Routing.UNIFORM, Routing.SKEWED)

Run = Callable[[], object]


class Timer:
    """Makes samplers on one device. What is sampled must have run once before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type != "cpu"
        self._neutral = Neutral(device)
        self._backlog_us = {True: BACKLOG_US, False: BACKLOG_US}  # by whether a graph is replayed
        if self.on_gpu:
            self._spin, self._graphs = Spin(device), Graphs(device)

    @property
    def situations(self) -> tuple[str, ...]:
        return (CAPTURED, *EAGER) if self.on_gpu else (AS_IT_COMES,)

    def sampler(self, situation: str, run: Run, instances: int = INSTANCES) -> Sample:
        """Takes one sample of `run` in that situation."""
        if situation == AS_IT_COMES:
            return self._as_it_comes(run)
        if situation == HOST_AHEAD:
            return self._host_ahead(run, replays=False)
        replays = [self._graphs.capture([run]) for _ in range(instances)]
        for replay in replays:  # the first replay uploads a graph
            replay()
        turns = itertools.cycle(replays)

        def replay_next() -> None:
            next(turns)()

        return self._host_ahead(replay_next, replays=True)

    def host_us(self, run: Run) -> float:
        """What the host takes to enqueue it on an idle device, or to run it on a CPU."""
        self._neutral()
        self._wait()
        begun = time.perf_counter()
        run()
        us = (time.perf_counter() - begun) * 1e6
        self._wait()
        return us

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def _as_it_comes(self, run: Run) -> Sample:
        if not self.on_gpu:
            return lambda: self.host_us(run)
        start, end = gpu_event(), gpu_event()

        def sample() -> float:
            self._neutral()
            self._wait()
            start.record()
            run()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e3

        return sample

    def _host_ahead(self, run: Run, *, replays: bool) -> Sample:
        start, end = gpu_event(), gpu_event()

        def sample() -> float:
            while True:
                backlog_us = self._backlog_us[replays]
                self._spin(backlog_us)
                self._neutral()
                start.record()
                run()
                end.record()
                ahead = not start.query()
                end.synchronize()
                if ahead:
                    self._backlog_us[replays] = max(backlog_us * DECAY, BACKLOG_US)
                    return float(start.elapsed_time(end)) * 1e3
                # The device began before the host was done: that timed the host, and is no sample.
                if backlog_us > MAX_BACKLOG_US:
                    raise RuntimeError(f"the host is not ahead behind {backlog_us:.0f} us of work")
                self._backlog_us[replays] = backlog_us * GROWTH

        return sample


def inputs_of(
    shape: SortingShape, num_tokens: int, number: int, device: torch.device
) -> list[SortingInputs]:
    """Arguments of so many sorts, uniform and skewed routing in turn."""
    mask = default_mask(shape, device)
    routed = (
        route(shape, num_tokens, ROUTINGS[i % 2], FIRST_SEED + i, device) for i in range(number)
    )
    return [sorting_inputs(shape, tokens, num_tokens, mask) for tokens in routed]


def buckets(table: PolicyTable) -> list[tuple[int, str]]:
    """(token count, chosen candidate) of everything that was measured for a table."""
    found = (*table.graph_choices, *table.eager_choices)
    return [(choice.num_tokens, choice.candidate) for choice in found]
