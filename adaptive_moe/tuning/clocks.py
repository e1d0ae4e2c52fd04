"""Clocks: how one sort call is timed in each situation. Injected everywhere.

A clock is given a *train*: calls that differ only in their inputs, so that every routing is in each
sample. `prepare(train)` does what must happen once (capture a graph, say) and returns the sampler.
That enqueues the train; what it returns waits, and gives microseconds a call. So samples can be
enqueued one behind the other, and the device never waits for the host to have read the last one.

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
about a third of a graph's sample. Enough, because between two samples there is then nothing that
depends on who ran before.
"""

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from adaptive_moe.policy.situation import Situation
from adaptive_moe.tuning.device import Graphs, Neutral, Spin, Train, gpu_event

# Waits for one sample and gives its microseconds a call; and what enqueues one.
Pending = Callable[[], float]
Sampler = Callable[[], Pending]
Events = Callable[[], Any]

# A replay costs 0.2 us more or less for one graph than for another that holds the same kernels
# (measured on an H200): half a percent of this, and each lot of the second pass has other graphs.
# A longer one costs more to capture, which is most of what a graph costs, than it takes off that.
REPLAY_US = 40.0
# Calls in a sample: of a graph's train as many, in whole lots of GRAPH_LOT, as last REPLAY_US.
# Busy: an event is good to half a microsecond, which four calls share.
GRAPH_LOT = 4
TRAIN_LENGTH = {Situation.GRAPH: 3 * GRAPH_LOT, Situation.BUSY: 4, Situation.IDLE: 2}

# Microseconds of backlog in front of a sample: to begin with, at least and at most.
BACKLOG_US, LEAST_BACKLOG_US, MAX_BACKLOG_US = 100.0, 10.0, 50_000.0
# How it follows the host: up where a sample came late, down a little for each that did not.
GROWTH, DECAY = 1.5, 31 / 32


class Clock(Protocol):
    def prepare(self, train: Train, call_us: float = 0.0) -> Sampler:
        """The sampler of this train.

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
        def sample() -> Pending:
            self.neutral()
            start = self.timer()
            for call in train:
                call()
            us = (self.timer() - start) * 1e6 / len(train)
            return lambda: us

        return sample


class BusyClock:
    """Events around calls that are all enqueued before the device reaches the first of them.

    A backlog keeps the device busy meanwhile, and then comes the neutral predecessor. A sample
    whose start event is done before its last call is enqueued has timed the host, and is no sample:
    the backlog grows, and it is taken again. A device that still runs the sample before needs less
    of it than an idle one.

    invalid: how many samples were none.
    """

    def __init__(
        self,
        neutral: Callable[[], object],
        spin: Callable[[float], object],
        events: Events = gpu_event,
    ) -> None:
        self.neutral, self.spin, self.events = neutral, spin, events
        self.invalid = 0
        # By whether the device was idle: whether `_last`, where the sample before ends, was done.
        self._backlog_us = {True: BACKLOG_US, False: BACKLOG_US}
        self._last: Any = None
        self._unused: list[tuple[Any, Any]] = []

    @property
    def backlog_us(self) -> float:
        """What the device is kept busy with, now and at most."""
        return max(self._backlog_us.values())

    def prepare(self, train: Train, call_us: float = 0.0) -> Sampler:
        def sample() -> Pending:
            start, end = self._unused.pop() if self._unused else (self.events(), self.events())
            while not self._ahead(train, start, end):
                self.invalid += 1

            def wait() -> float:
                end.synchronize()
                us = float(start.elapsed_time(end)) * 1e3 / len(train)
                self._unused.append((start, end))
                return us

            return wait

        return sample

    def _ahead(self, train: Train, start: Any, end: Any) -> bool:
        """Enqueue a sample: did the host get it all done before the device began with it?"""
        idle = self._last is None or self._last.query()
        backlog_us = self._backlog_us[idle]
        self.spin(backlog_us)
        self.neutral()
        start.record()
        for call in train:
            call()
        end.record()
        ahead = not start.query()
        self._last = end
        if not ahead and backlog_us >= MAX_BACKLOG_US:
            raise NeverAheadError(f"the host is not ahead behind {backlog_us:.0f} us of work")
        self._backlog_us[idle] = max(backlog_us * (DECAY if ahead else GROWTH), LEAST_BACKLOG_US)
        return ahead


class IdleClock:
    """Events around calls on a device that has nothing to do when the first of them is made.

    The neutral predecessor is waited for: while it still ran, the host would have a head start.
    """

    def __init__(self, neutral: Callable[[], object], events: Events = gpu_event) -> None:
        self.neutral, self.events = neutral, events

    def prepare(self, train: Train, call_us: float = 0.0) -> Sampler:
        over, start, end = self.events(), self.events(), self.events()

        def sample() -> Pending:
            self.neutral()
            over.record()
            over.synchronize()
            start.record()
            for call in train:
                call()
            end.record()
            end.synchronize()
            us = float(start.elapsed_time(end)) * 1e3 / len(train)
            return lambda: us

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
        self._busy = BusyClock(neutral, spin, events)

    def prepare(self, train: Train, call_us: float = 0.0) -> Sampler:
        calls = train[: calls_of(len(train), call_us)]
        replay = self._capture(calls)
        replay()  # the first replay uploads the graph
        enqueue = self._busy.prepare([replay])

        def sample() -> Pending:
            wait = enqueue()
            return lambda: wait() / len(calls)

        return sample


def at_once(sampler: Sampler) -> Callable[[], float]:
    """Samples that are waited for one by one."""

    def sample() -> float:
        wait = sampler()
        return wait()

    return sample


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
