"""What the clocks make a device do besides sorting: a neutral write, a wait, a captured graph."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

Train = Sequence[Callable[[], object]]

# What the neutral predecessor writes at least: an L2 that reports less has a larger cache behind
# it (MI300X: 4 MiB an XCD), and a GEMM of a serving step writes as much.
NEUTRAL_BYTES = 32 << 20
CPU_NEUTRAL_BYTES = 4 << 20
# What a spin is measured with.
CYCLES = 200_000


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

    Not large writes: one of 50 MB takes an H100 9 us and a slow host 7, who hardly gets ahead so.
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
    and nobody reads their outputs) and none of torch's collect-and-empty-cache preamble: the
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
