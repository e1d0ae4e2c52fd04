"""Clocks: how one sort call is timed in each situation. Injected everywhere.

A clock is given a *train*: calls that differ only in their inputs, so that every routing is in each
sample. `prepare(train)` does what must happen once (capture a graph, say) and returns the sampler,
which runs the train and returns microseconds a call.

    WallClock   the CPU's clock around the train; kernels that run on the CPU
    GraphClock  the train captured once and replayed: no launch cost, as in an engine's own graph
    BusyClock   the train launched call by call behind a backlog, so that the host is ahead: device
                time and the gaps between kernels count, the host's time does not
    IdleClock   the same on a device that has nothing to do: the host's time is all in it

**Nobody pays for a neighbour.** Every sample follows the same predecessor (`Neutral`), on every
clock: a write as large as the L2 or larger, as the GEMM is that runs before a sort in serving. It
takes with it whatever the sample before left behind: lines in the L2 (it writes more than the L2
holds, and a sample's calls read inputs of their own, so none finds its ids there), write-backs that
are under way, and the clocks of a device that was idle. It costs 20 to 30 us a sample on an H100,
about a fifth of a graph's sample. Enough, because between two samples there is then nothing that
depends on who ran before.
"""

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from adaptive_moe.policy.situation import Situation
from adaptive_moe.tuning.device import Graphs, Neutral, Spin, Train, gpu_event

Sampler = Callable[[], float]
Events = Callable[[], Any]

# A replay costs 0.2 us more or less for one graph than for another that holds the same kernels
# (measured on an H200): half a percent of this, and each lot of the second pass has other graphs.
# A longer one costs more to capture, which is most of what a graph costs, than it takes off that.
REPLAY_US = 40.0
# Calls in a sample: of a graph's train as many, in whole lots of GRAPH_LOT, as last REPLAY_US.
# Busy: an event is good to half a microsecond, which four calls share.
GRAPH_LOT = 4
TRAIN_LENGTH = {Situation.GRAPH: 3 * GRAPH_LOT, Situation.BUSY: 4, Situation.IDLE: 2}

# Microseconds of backlog in front of a sample, to begin with and at most. A replay is enqueued at
# once; calls of a Python function are not.
BACKLOG_US, GRAPH_BACKLOG_US, MAX_BACKLOG_US = 100.0, 10.0, 50_000.0


class Clock(Protocol):
    def prepare(self, train: Train, call_us: float = 0.0) -> Sampler:
        """The sampler of this train, in microseconds a call.

        call_us: about what a call takes, 0.0 where that is not known yet. A clock that must run
        many short calls to see them well runs fewer longer ones; given inf, as few as it can.
        """


class NeverAheadError(RuntimeError):
    """The device reached the start of a sample before the host had enqueued it, however long the
    backlog: the calls wait for the device themselves."""


class WallClock:
    """Wall-clock time of the train; `timer` returns seconds."""

    def __init__(
        self,
        timer: Callable[[], float] = time.perf_counter,
        neutral: Callable[[], object] = lambda: None,
    ) -> None:
        self.timer, self.neutral = timer, neutral

    def prepare(self, train: Train, call_us: float = 0.0) -> Sampler:
        def sample() -> float:
            self.neutral()
            start = self.timer()
            for call in train:
                call()
            return (self.timer() - start) * 1e6 / len(train)

        return sample


class BusyClock:
    """Events around calls that are all enqueued before the device reaches the first of them.

    A backlog keeps the device busy meanwhile, and then comes the neutral predecessor. A sample
    whose start event is done before its last call is enqueued has timed the host, and is no sample:
    the backlog grows by half, and it is taken again. A longer backlog stays, but for an eighth a
    sampler, so that one stall of the host is not paid for ever after.

    backlog_us: how much of it, now. invalid: how many samples were none.
    """

    def __init__(
        self,
        neutral: Callable[[], object],
        spin: Callable[[float], object],
        events: Events = gpu_event,
        least_us: float = BACKLOG_US,
    ) -> None:
        self.neutral, self.spin, self.events, self.least_us = neutral, spin, events, least_us
        self.backlog_us = least_us
        self.invalid = 0

    def prepare(self, train: Train, call_us: float = 0.0) -> Sampler:
        self.backlog_us = max(self.least_us, self.backlog_us * 7 / 8)
        start, end = self.events(), self.events()

        def sample() -> float:
            while True:
                self.spin(self.backlog_us)
                self.neutral()
                start.record()
                for call in train:
                    call()
                end.record()
                ahead = not start.query()
                end.synchronize()
                if ahead:
                    return float(start.elapsed_time(end)) * 1e3 / len(train)
                self._grow()

        return sample

    def _grow(self) -> None:
        self.invalid += 1
        if self.backlog_us >= MAX_BACKLOG_US:
            raise NeverAheadError(f"the host is not ahead behind {self.backlog_us:.0f} us of work")
        self.backlog_us *= 1.5


class IdleClock:
    """Events around calls on a device that has nothing to do when the first of them is made.

    The neutral predecessor is waited for: while it still ran, the host would have a head start.
    """

    def __init__(self, neutral: Callable[[], object], events: Events = gpu_event) -> None:
        self.neutral, self.events = neutral, events

    def prepare(self, train: Train, call_us: float = 0.0) -> Sampler:
        over, start, end = self.events(), self.events(), self.events()

        def sample() -> float:
            self.neutral()
            over.record()
            over.synchronize()
            start.record()
            for call in train:
                call()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e3 / len(train)

        return sample


class GraphClock:
    """The replay of a graph that holds the train, enqueued like one busy call.

    So the time of the graph's launch is hidden behind the neutral predecessor, as it is in a step
    behind the nodes before.
    """

    def __init__(
        self,
        neutral: Callable[[], object],
        spin: Callable[[float], object],
        capture: Callable[[Train], Callable[[], object]],
        events: Events = gpu_event,
    ) -> None:
        self._capture = capture
        self._busy = BusyClock(neutral, spin, events, GRAPH_BACKLOG_US)

    def prepare(self, train: Train, call_us: float = 0.0) -> Sampler:
        calls = train[: calls_of(len(train), call_us)]
        replay = self._capture(calls)
        replay()  # the first replay uploads the graph
        sample = self._busy.prepare([replay])
        return lambda: sample() / len(calls)


def calls_of(train: int, call_us: float) -> int:
    """How many calls of a train a graph holds, each of call_us, to last REPLAY_US: whole lots."""
    lots = max(1, train // GRAPH_LOT)
    if call_us * GRAPH_LOT > 0.0:
        lots = min(lots, max(1, math.ceil(REPLAY_US / (call_us * GRAPH_LOT))))
    return min(train, lots * GRAPH_LOT)


def clock_for(
    situation: Situation, device: torch.device, neutral: Callable[[], object] | None = None
) -> Clock:
    """The clock that times a call the way it runs in that situation on `device`.

    neutral: the predecessor of each sample, where it is shared with other clocks.
    """
    neutral = neutral or Neutral(device)
    if device.type == "cpu":
        return WallClock(neutral=neutral)
    if situation is Situation.GRAPH:
        return GraphClock(neutral, Spin(device), Graphs(device).capture)
    return BusyClock(neutral, Spin(device)) if situation is Situation.BUSY else IdleClock(neutral)
