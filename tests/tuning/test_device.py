"""What the clocks make a device do besides sorting, on a made-up GPU."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from adaptive_moe.tuning.device import Graphs, Neutral, Spin
from tests.tuning.made_up_gpu import DEVICE, Gpu

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.mark.parametrize(
    ("device", "properties", "written"),
    [
        (DEVICE, SimpleNamespace(L2_cache_size=50 * MIB), 50 * MIB),
        (DEVICE, SimpleNamespace(L2_cache_size=4 * MIB), 32 * MIB),
        (DEVICE, SimpleNamespace(), 32 * MIB),  # an older torch says nothing of it
        (CPU, SimpleNamespace(), 4 * MIB),
    ],
)
def test_the_neutral_predecessor_writes_as_much_as_the_l2_holds_or_a_gemm_writes(
    gpu: Gpu,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    properties: SimpleNamespace,
    written: int,
) -> None:
    gpu.properties = properties
    writes: list[tuple[str, int]] = []
    write = lambda tensor: writes.append((tensor.device.type, tensor.nbytes))  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "zero_", write)
    with torch.device("cpu" if device == DEVICE else "meta"):
        neutral = Neutral(device)
    neutral()
    neutral()
    assert writes == [(device.type, written)] * 2


@pytest.mark.parametrize("us", [10.0, 480.0])
def test_a_spin_lasts_as_long_as_it_is_told_whatever_a_cycle_is(gpu: Gpu, us: float) -> None:
    spin = Spin(DEVICE)
    assert gpu.told == ["on its device"]
    gpu.host = begun = gpu.device + 100.0
    spin(us)
    assert gpu.device - begun == pytest.approx(5.0 + us, rel=0.05)


ON_ITS_OWN = [
    "its own stream waits for the current stream",
    "captures on its own stream, thread_local",
    "captured",
    "the current stream waits for its own stream",
]


def test_graphs_are_captured_beside_the_process_and_share_a_pool_that_outlives_them(
    gpu: Gpu,
) -> None:
    graphs = Graphs(DEVICE)
    gpu.told.clear()
    replay: Callable[[], object] | None = graphs.capture([gpu.call("sort", 5.0, 3.0)] * 4)
    assert gpu.told == ON_ITS_OWN
    assert gpu.log == []
    assert replay is not None
    replay()
    assert (gpu.log, gpu.device) == ([("replay", 10.0)], 10.0 + 4 * 3.0)
    (pool,) = gpu.pools
    assert len(pool.graphs) == 2
    replay = None
    # torch would forget it with the last graph.
    assert len(pool.graphs) == 1
    del graphs
    assert len(pool.graphs) == 0


def test_a_capture_that_fails_is_ended(gpu: Gpu) -> None:
    graphs = Graphs(DEVICE)
    gpu.told.clear()
    with pytest.raises(ZeroDivisionError):
        graphs.capture([lambda: 1 / 0])
    assert gpu.told == ON_ITS_OWN[:3]
    graphs.capture([gpu.call("sort", 5.0, 3.0)])
    assert gpu.told[3:] == ON_ITS_OWN
