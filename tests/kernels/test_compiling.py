"""Kernels compile side by side, are loaded at once, and a failure leaves nothing half done."""

import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from adaptive_moe.kernels import triton_sort
from adaptive_moe.kernels.triton_launches import Launch

TENSOR: Any = SimpleNamespace(is_cuda=True)


class Kernel:
    """A kernel that compiles when `meet` lets it; `loaded` and `compiled` count."""

    def __init__(self, meet: Any = None) -> None:
        self.meet, self.compiled, self.loaded = meet, 0, 0

    def warmup(self, *arguments: object, grid: tuple[int, ...], num_warps: int) -> "Kernel":
        if self.meet is not None:
            self.meet()
        self.compiled += 1
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        self.loaded += 1
        return lambda *_, **__: None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the threads set their device to. The GPU in use is number 3."""
    devices: list[int] = []
    monkeypatch.setattr(triton_sort, "JITFunction", Kernel)
    monkeypatch.setattr(triton_sort, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    return devices


def launch(name: str, kernel: Kernel) -> tuple[Launch, tuple[Any, ...]]:
    return Launch(kernel, 1, 4, (name,), ()), (TENSOR,)


def test_the_first_loads_the_compiler_and_the_others_compile_side_by_side(gpu: list[int]) -> None:
    meet = threading.Barrier(3)
    first, *others = [Kernel(), *(Kernel(lambda: meet.wait(60)) for _ in range(3))]
    launches = [launch(f"{number}", kernel) for number, kernel in enumerate([first, *others])]
    triton_sort._compile([*launches, launches[0]])
    assert [kernel.compiled for kernel in (first, *others)] == [1, 1, 1, 1]
    assert [kernel.loaded for kernel in (first, *others)] == [1, 1, 1, 1]
    assert gpu == [3, 3, 3, 3]
    triton_sort._compile(launches)
    assert first.compiled == 1


def test_one_that_fails_is_compiled_by_the_next_call(gpu: list[int]) -> None:
    failures = [OSError("no space left")]

    def fail() -> None:
        if failures:
            raise failures.pop()

    good, bad = Kernel(), Kernel(fail)
    launches = [launch("good", good), launch("bad", bad)]
    with pytest.raises(OSError, match="no space left"):
        triton_sort._compile(launches)
    triton_sort._compile(launches)
    assert (bad.compiled, bad.loaded, good.loaded) == (1, 1, 1)


def test_a_call_that_failed_is_bound_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_sort, "_bound", {})
    compiled: list[int] = []

    def fails_once(launches: list[Any]) -> None:
        compiled.append(len(launches))
        if len(compiled) == 1:
            raise OSError("no space left")

    monkeypatch.setattr(triton_sort, "_compile", fails_once)
    monkeypatch.setattr(triton_sort, "_launch", lambda *_: None)
    ids = torch.zeros(4, 1, dtype=torch.int32)
    with pytest.raises(OSError, match="no space left"):
        triton_sort.moe_sorting(ids, ids.float(), 8, 8, torch.bfloat16)
    for _ in range(2):
        triton_sort.moe_sorting(ids, ids.float(), 8, 8, torch.bfloat16)
    assert compiled == [1, 1]
