"""Clocks: how one sort call is timed in each situation. Injected everywhere.

A clock is given a *train*: calls that differ only in their inputs, so that every routing is in each
sample. `prepare(train)` does what must happen once (capture a graph, say) and returns the sampler.
That enqueues the train; what it returns waits, and gives a Sample. So samples can be enqueued one
behind the other, and the device never waits for the host to have read the last one.

    WallClock   the CPU's clock around the train; kernels that run on the CPU
    GraphClock  the train captured once and replayed: no launch cost, as in an engine's own graph
    EagerClock  the train launched call by call behind a backlog, so that the host is ahead. The
                device's events give what the device takes; the host's clock around each call gives
                what the host takes to enqueue it

**Every sample starts from the same cache state**, so a time does not depend on which candidate ran
before. Each follows the same predecessor (`Neutral`): a write as large as the L2 or larger, as the
GEMM is that runs before a sort in serving. It replaces whatever the sample before left behind:
lines in the L2 (a sample's calls read inputs of their own, so none finds its ids there),
write-backs that are under way, and the clocks of a device that was idle. It costs 20 to 30 us a
sample on an H100, about a third of a graph's sample.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from adaptive_moe.policy.coverage import Situation

Train = Sequence[Callable[[], object]]


class Sample(NamedTuple):
    """Microseconds a call: what the device takes, and what the host takes to enqueue it where that
    is read."""

    device_us: float
    host_us: float | None = None


# Waits for one sample; and what enqueues one.
Pending = Callable[[], Sample]
Sampler = Callable[[], Pending]
Events = Callable[[], Any]

# A replay costs 0.2 us more or less for one graph than for another that holds the same kernels
# (measured on an H200): half a percent of this, and each lot of the second pass has other graphs.
# A longer one costs more to capture, which is most of what a graph costs, than it takes off that.
REPLAY_US = 40.0
# Calls in a sample: of a graph's train as many, in whole lots of GRAPH_LOT, as last REPLAY_US.
# Eager: an event is good to half a microsecond, which four calls share.
GRAPH_LOT = 4
TRAIN_LENGTH = {Situation.GRAPH: 3 * GRAPH_LOT, Situation.EAGER: 4}
# On the CPU, calls that last so long are seen well in a train of one call for each routing.
LONG_CALL_US, SHORT_TRAIN = 200.0, 2

# Microseconds of backlog in front of a sample: to begin with, at least and at most.
BACKLOG_US, LEAST_BACKLOG_US, MAX_BACKLOG_US = 100.0, 10.0, 50_000.0
# How it follows the host: up where a sample came late, down a little for each that did not.
GROWTH, DECAY = 1.5, 31 / 32

# What the neutral predecessor writes at least: an L2 that reports less has a larger cache behind
# it (MI300X: 4 MiB an XCD), and a GEMM of a serving step writes as much.
NEUTRAL_BYTES = 32 << 20
CPU_NEUTRAL_BYTES = 4 << 20
# What a spin is measured with.
CYCLES = 200_000


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
        calls = train[:SHORT_TRAIN] if call_us >= LONG_CALL_US else train

        def sample() -> Pending:
            self.neutral()
            start = self.timer()
            for call in calls:
                call()
            taken = Sample((self.timer() - start) * 1e6 / len(calls))
            return lambda: taken

        return sample


class EagerClock:
    """Events around calls that are all enqueued before the device reaches the first of them.

    A backlog keeps the device busy meanwhile, and then comes the neutral predecessor. A sample
    whose start event is done before its last call is enqueued has timed the host, and is no sample:
    the backlog grows, and it is taken again. A device that still runs the sample before needs less
    of it than an idle one.

    Host time is the median over the train's calls: an interrupt hits one of them.

    retaken: how many samples were taken again. timer returns seconds.
    """

    def __init__(
        self,
        neutral: Callable[[], object],
        spin: Callable[[float], object],
        events: "Events | None" = None,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.neutral, self.spin, self.timer = neutral, spin, timer
        self.events = events or gpu_event
        self.retaken = 0
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
            while (host_us := self._enqueue(train, start, end)) is None:
                self.retaken += 1

            def wait() -> Sample:
                end.synchronize()
                device_us = float(start.elapsed_time(end)) * 1e3 / len(train)
                self._unused.append((start, end))
                return Sample(device_us, host_us)

            return wait

        return sample

    def _enqueue(self, train: Train, start: Any, end: Any) -> float | None:
        """Enqueue a sample: the host's time for a call, or None where the device began with it
        before the host was done."""
        idle = self._last is None or self._last.query()
        backlog_us = self._backlog_us[idle]
        self.spin(backlog_us)
        self.neutral()
        start.record()
        took = []
        for call in train:
            begun = self.timer()
            call()
            took.append(self.timer() - begun)
        end.record()
        ahead = not start.query()
        self._last = end
        if not ahead and backlog_us >= MAX_BACKLOG_US:
            raise NeverAheadError(f"the host is not ahead behind {backlog_us:.0f} us of work")
        self._backlog_us[idle] = max(backlog_us * (DECAY if ahead else GROWTH), LEAST_BACKLOG_US)
        return statistics.median(took) * 1e6 if ahead else None


class GraphClock:
    """The replay of a graph that holds the train, enqueued like one eager call.

    So the time of the graph's launch is hidden behind the neutral predecessor, as it is in a step
    behind the nodes before.
    """

    def __init__(
        self,
        neutral: Callable[[], object],
        spin: Callable[[float], object],
        capture: Callable[[Train], Callable[[], object]],
        events: "Events | None" = None,
    ) -> None:
        self._capture = capture
        self._replays = EagerClock(neutral, spin, events)

    def prepare(self, train: Train, call_us: float = 0.0) -> Sampler:
        calls = train[: calls_in_graph(len(train), call_us)]
        replay = self._capture(calls)
        replay()  # the first replay uploads the graph
        enqueue = self._replays.prepare([replay])

        def sample() -> Pending:
            wait = enqueue()
            return lambda: Sample(wait().device_us / len(calls))

        return sample


def calls_in_graph(train: int, call_us: float) -> int:
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
    return EagerClock(neutral, Spin(device))


def gpu_event() -> Any:
    # torch's stubs leave this untyped in some releases and typed in others.
    event: Any = torch.cuda.Event
    return event(enable_timing=True)


class Neutral:
    """The predecessor of every sample: one write of more than the L2 holds, enqueued."""

    def __init__(self, device: torch.device) -> None:
        size = CPU_NEUTRAL_BYTES
        if device.type != "cpu":
            properties: Any = torch.cuda.get_device_properties(device)
            size = max(getattr(properties, "L2_cache_size", 0), NEUTRAL_BYTES)
        self._buffer = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self._buffer.zero_()


class Spin:
    """Keeps the device busy for about so many microseconds, for one launch.

    Large writes would not do: one of 50 MB takes an H100 9 us and a slow host 7 to launch.
    """

    def __init__(self, device: torch.device) -> None:
        # What one of its cycles is differs by vendor and generation, so that is measured.
        cuda: Any = torch.cuda
        self._spin = cuda._sleep
        start, end = gpu_event(), gpu_event()
        with torch.cuda.device(device):
            for _ in range(2):  # the first launch loads the kernel
                start.record()
                self._spin(CYCLES)
                end.record()
                end.synchronize()
        self._cycles_a_us = CYCLES / (float(start.elapsed_time(end)) * 1e3)

    def __call__(self, us: float) -> None:
        self._spin(int(us * self._cycles_a_us))


class Graphs:
    """Captures on a stream of its own.

    In `thread_local` mode, with a private memory pool shared by its graphs (they never run at once
    and their outputs are not read) and none of torch's collect-and-empty-cache preamble: the
    process's allocator and capture state are left as found.
    """

    def __init__(self, device: torch.device) -> None:
        stream: Any = torch.cuda.Stream
        self._stream = stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        # torch forgets a pool with its last graph; this one lives as long as the clock.
        self._keeper = self.capture([lambda: torch.zeros(1, device=device)])

    def capture(self, calls: Train) -> Callable[[], object]:
        """A call that replays the graph of these calls."""
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
        return graph.replay
