"""A whole step, timed in each of the three situations of serving; samplers return microseconds."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

from adaptive_moe.cli.bench.paired import Sample

# Two graphs of the same kernels differ by up to a few percent: a sampler goes round so many.
INSTANCES = 3
# A write of 256 MiB, a tenth of a millisecond on an H100: the device is busy, its caches are cold.
FILLER = 64 << 20
MOST_FILLERS = 4096

Run = Callable[[], object]


class StepClock:
    """Steps as they are captured, eager with the host ahead, or eager as they come, on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            self._filler = torch.empty(FILLER, dtype=torch.int32, device=device)
            event: Any = torch.cuda.Event
            self._start, self._end = event(enable_timing=True), event(enable_timing=True)
            stream: Any = torch.cuda.Stream
            self._stream = stream()
            self._fillers = 1

    def captured(self, run: Run) -> Sample:
        """Replays of the step, by turns of INSTANCES graphs of it."""
        self.wait()
        with torch.cuda.stream(self._stream):
            run()  # what is made at a first run, such as compiled kernels, belongs to no graph
        graphs = itertools.cycle([self._capture(run) for _ in range(INSTANCES)])

        def sample() -> float:
            graph = next(graphs)
            return self._behind(1, graph.replay)[0]

        for _ in range(INSTANCES):  # the first replay uploads a graph
            sample()
        return sample

    def busy(self, before: Run, run: Run) -> Sample:
        """`before`, then the step, enqueued whole before the device reaches it; where the host was
        too late, again behind a longer backlog. RuntimeError where no backlog is long enough."""

        def sample() -> float:
            before()
            while self._fillers <= MOST_FILLERS:
                us, ahead = self._behind(self._fillers, run)
                if ahead:
                    return us
                self._fillers *= 2
            raise RuntimeError("the host never got ahead of the device: something waits for it")

        return sample

    def as_it_comes(self, before: Run, run: Run) -> Sample:
        """`before`, then the step from an idle device to its end, by the host's clock."""

        def sample() -> float:
            before()
            self.wait()
            begun = time.perf_counter()
            run()
            self.wait()
            return (time.perf_counter() - begun) * 1e6

        return sample

    def host_us(self, run: Run) -> float:
        """What the host takes to enqueue a step, and sets the backlog by it."""
        times = []
        for _ in range(5):
            self.wait()
            begun = time.perf_counter()
            run()
            times.append((time.perf_counter() - begun) * 1e6)
        filler_us = min(self._behind(1, lambda: self._filler.zero_())[0] for _ in range(3))
        self._fillers = 1 + int(1.5 * min(times) / filler_us)
        return min(times)

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def _behind(self, fillers: int, run: Run) -> tuple[float, bool]:
        """Device time of `run` behind a backlog, and whether all of it was enqueued by then."""
        for _ in range(fillers):
            self._filler.zero_()
        self._start.record()
        run()
        self._end.record()
        ahead = not self._start.query()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) * 1e3, ahead

    def _capture(self, run: Run) -> torch.cuda.CUDAGraph:
        """As GraphClock in tuning/clocks.py; a pool of its own, since a step's memory is larger."""
        graph = torch.cuda.CUDAGraph()
        self.wait()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        return graph
