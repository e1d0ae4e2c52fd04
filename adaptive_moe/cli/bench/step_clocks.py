"""A whole step, timed in each of the three situations of serving by the clocks that time a sort."""

import itertools
import time
from collections.abc import Callable

import torch

from adaptive_moe.cli.bench.paired import Sample
from adaptive_moe.policy.situation import Situation
from adaptive_moe.tuning.clocks import BusyClock, at_once, clock_for
from adaptive_moe.tuning.device import Graphs, Neutral, Spin

# Two graphs of the same kernels differ by up to a few percent, and no number of replays of one
# takes that out: a sampler goes round so many.
INSTANCES = 10

Run = Callable[[], object]


class StepClock:
    """Samplers of whole steps on `device`, in microseconds a step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        neutral = Neutral(device)
        self._as_it_comes = clock_for(Situation.IDLE, device, neutral)
        if device.type != "cpu":
            spin = Spin(device)
            self._graphs = Graphs(device)
            self._replays = BusyClock(neutral, spin)
            self._busy = BusyClock(neutral, spin)

    def captured(self, run: Run) -> Sample:
        """Replays of the step, by turns of INSTANCES graphs of it. It must have run before."""
        replays = [self._graphs.capture([run]) for _ in range(INSTANCES)]
        for replay in replays:  # the first replay uploads a graph
            replay()
        turns = itertools.cycle(replays)

        def replay_next() -> None:
            next(turns)()

        return at_once(self._replays.prepare([replay_next]))

    def busy(self, run: Run) -> Sample:
        """The eager step, all of it enqueued before the device reaches it."""
        return at_once(self._busy.prepare([run]))

    def as_it_comes(self, run: Run) -> Sample:
        """The eager step, from an idle device."""
        return at_once(self._as_it_comes.prepare([run]))

    def host_us(self, run: Run) -> float:
        """What the host takes to enqueue a step."""
        times = []
        for _ in range(5):
            torch.cuda.synchronize(self.device)
            begun = time.perf_counter()
            run()
            times.append((time.perf_counter() - begun) * 1e6)
        return min(times)
