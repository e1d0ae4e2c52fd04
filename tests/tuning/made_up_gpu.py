"""A made-up GPU, with a host and a device that each have their own time: a call takes the host a
while to enqueue, and the device starts it when it is free and the call is there.

The fixture `gpu` puts one in the place of torch.cuda's events, streams, graphs and spinning kernel.
Its tensors are on torch's meta device, which has no memory.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

DEVICE = torch.device("meta")
CYCLES_A_US = 1500.0


class Gpu:
    """Times in us. log: what ran on the device, in order, each with its start. told: what else
    torch.cuda was asked for. pools: those that graphs were given."""

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.log: list[tuple[str, float]] = []
        self.told: list[str] = []
        self.pools: list[Pool] = []
        self.capturing: Graph | None = None
        self.stream = Stream(self, "the current stream")
        self.properties = SimpleNamespace(L2_cache_size=50 << 20)

    def call(self, name: str, host_us: float, device_us: float) -> Callable[[], None]:
        def run() -> None:
            if self.capturing is not None:
                self.capturing.device_us += device_us
                return
            self.host += host_us
            start = max(self.host, self.device)
            self.log.append((name, start))
            self.device = start + device_us

        return run

    def neutral(self) -> None:
        self.call("neutral", 5.0, 20.0)()

    def spin(self, us: float) -> None:
        self.call("spin", 5.0, us)()

    def event(self) -> "Event":
        return Event(self)

    def ran(self) -> list[str]:
        return [name for name, _ in self.log]


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.gpu.host += 1.0
        self.at = max(self.gpu.host, self.gpu.device)
        self.gpu.device = self.at

    def query(self) -> bool:
        return self.at <= self.gpu.host

    def synchronize(self) -> None:
        self.gpu.host = max(self.gpu.host, self.at)

    def elapsed_time(self, end: "Event") -> float:
        return (end.at - self.at) / 1e3


class Stream:
    """Its name is what the log calls it."""

    def __init__(self, gpu: Gpu, name: str) -> None:
        self.gpu, self.name = gpu, name

    def wait_stream(self, other: "Stream") -> None:
        self.gpu.told.append(f"{self.name} waits for {other.name}")


class Graph:
    """What is called while it is captured does not run; its replay runs all of it at once."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.device_us = gpu, 0.0

    def capture_begin(self, *, pool: "Pool", capture_error_mode: str) -> None:
        self.pool = pool
        pool.graphs.add(self)
        self.gpu.told.append(f"captures on {self.gpu.stream.name}, {capture_error_mode}")
        self.gpu.capturing = self

    def capture_end(self) -> None:
        self.gpu.told.append("captured")
        self.gpu.capturing = None

    def replay(self) -> None:
        self.gpu.call("replay", 10.0, self.device_us)()


class Pool:
    """Memory that graphs share; it lives as long as one of them."""

    def __init__(self) -> None:
        self.graphs: weakref.WeakSet[Graph] = weakref.WeakSet()


def in_place_of_torch_cuda(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made_up = Gpu()

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        assert device == DEVICE
        made_up.told.append("on its device")
        yield

    @contextmanager
    def stream(side: Stream) -> Iterator[None]:
        before, made_up.stream = made_up.stream, side
        try:
            yield
        finally:
            made_up.stream = before

    def of_device(device: torch.device) -> Stream:
        assert device == DEVICE
        return Stream(made_up, "its own stream")

    def event(enable_timing: bool = False) -> Event:
        assert enable_timing is True
        return made_up.event()

    spun = iter([1e6])  # the first launch loads the kernel

    def sleep(cycles: int) -> None:
        made_up.call("spin", 5.0, next(spun, 0.0) + cycles / CYCLES_A_US)()

    def properties(device: torch.device) -> SimpleNamespace:
        assert device == DEVICE
        return made_up.properties

    def pool() -> Pool:
        made_up.pools.append(Pool())
        return made_up.pools[-1]

    for name, stand_in in {
        "device": on,
        "Event": event,
        "_sleep": sleep,
        "Stream": of_device,
        "stream": stream,
        "current_stream": lambda: made_up.stream,
        "CUDAGraph": lambda: Graph(made_up),
        "graph_pool_handle": pool,
        "get_device_properties": properties,
        "is_current_stream_capturing": lambda: made_up.capturing is not None,
        "empty_cache": lambda: made_up.told.append("gave its memory back"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return made_up
