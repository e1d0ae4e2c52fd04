"""Clocks: how one sort call is timed, matched to how serving runs it. Injected everywhere.

A clock is given a *train*: a few calls that differ only in their inputs, so that a repeat does not
just hit the cache and every routing is in each sample. `prepare(train)` does what must happen once
(capture a graph, say) and returns the sampler, which runs the train and returns microseconds a
call.

    WallClock   the CPU's clock around the train; kernels that run on the CPU
    EagerClock  GPU events around the train, launched call by call: the host's launch cost is in it,
                as an eager call of the engine pays it
    GraphClock  the train captured once, replayed between events: no launch cost, as in an engine's
                own captured graph
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from adaptive_moe.policy.situation import Situation

Train = Sequence[Callable[[], object]]
Sampler = Callable[[], float]

# A replay costs 0.2 us more or less for one graph than for another that holds the same kernels
# (measured on an H200); passes over the train make it so long that this is a quarter of a percent.
REPLAY_US = 80.0
# Capturing a call takes the host longer than the device takes to run it: no more passes than this.
MAX_PASSES = 8


# Calls in a train. Two eager ones, a routing each, give as sure a verdict as four or eight for the
# time they take (measured on an H200); in a graph more inputs cost little.
TRAIN_LENGTH = {Situation.GRAPH: 4, Situation.BUSY: 2, Situation.IDLE: 2}


class Clock(Protocol):
    def prepare(self, train: Train, call_us: float = 0.0) -> Sampler:
        """The sampler of this train, in microseconds a call.

        call_us: about what a call takes, 0.0 where that is not known yet. A clock that must repeat
        short calls to see them well repeats longer ones less; given inf, it does not repeat at all.
        """


class WallClock:
    """Wall-clock time of the train; `timer` returns seconds."""

    def __init__(self, timer: Callable[[], float] = time.perf_counter) -> None:
        self.timer = timer

    def prepare(self, train: Train, call_us: float = 0.0) -> Sampler:
        def sample() -> float:
            start = self.timer()
            for call in train:
                call()
            return (self.timer() - start) * 1e6 / len(train)

        return sample


class EagerClock:
    """GPU events around a train that the host launches call by call."""

    def prepare(self, train: Train, call_us: float = 0.0) -> Sampler:
        start, end = _events()

        def sample() -> float:
            start.record()
            for call in train:
                call()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e3 / len(train)

        return sample


class GraphClock:
    """GPU events around the replay of a graph that holds the train, captured on its own stream.

    Capture uses `thread_local` mode, a private memory pool shared by this clock's graphs (they
    never run at once and nobody reads their outputs) and none of torch's collect-and-empty-cache
    preamble: the process's allocator and capture state are left as found.
    """

    def __init__(self) -> None:
        stream: Any = torch.cuda.Stream
        self._stream = stream()
        self._pool = torch.cuda.graph_pool_handle()
        # torch forgets a pool with its last graph; this one lives as long as the clock.
        self._keeper = self._capture([lambda: torch.zeros(1, device="cuda")])

    def prepare(self, train: Train, call_us: float = 0.0) -> Sampler:
        passes = passes_over(len(train), call_us)
        graph = self._capture([*train] * passes)
        start, end = _events()

        def sample() -> float:
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e3 / (passes * len(train))

        sample()  # the first replay uploads the graph
        return sample

    def _capture(self, calls: Train) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                for call in calls:
                    call()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph


def passes_over(calls: int, call_us: float) -> int:
    """How often a graph repeats a train of so many calls, each of call_us, to last REPLAY_US."""
    if call_us * calls * MAX_PASSES <= REPLAY_US:
        return MAX_PASSES
    return max(1, math.ceil(REPLAY_US / (call_us * calls)))


def clock_for(situation: Situation, device: torch.device) -> Clock:
    """The clock that times a call the way it runs in that situation on `device`."""
    if device.type == "cpu":
        return WallClock()
    return GraphClock() if situation is Situation.GRAPH else EagerClock()


def _events() -> tuple[Any, Any]:
    # torch's stubs leave these two untyped in some releases and typed in others.
    event: Any = torch.cuda.Event
    return event(enable_timing=True), event(enable_timing=True)
