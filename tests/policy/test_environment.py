"""What is said of the device and the process that measured: real of the CPU, made up of GPUs."""

import os
import platform
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adaptive_moe.policy.environment import Environment, describe_environment


def test_a_cpu_is_named_with_its_cores_and_the_threads_in_use() -> None:
    said = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: *(.*\S)", said.read_text() if said.exists() else "", re.M)
    name = models[0] if models else platform.processor() or platform.machine()
    assert describe_environment(torch.device("cpu")) == Environment(
        device=f"{name}, {os.cpu_count()} cores",
        arch=platform.machine(),
        compute_units=torch.get_num_threads(),
        runtime="",
        torch=torch.__version__,
        python=platform.python_version(),
    )


MI300X = ("AMD Instinct MI300X", "gfx942:sramecc+:xnack-", 304)
# torch for CUDA says the name once more where torch for ROCm says the architecture.
H100 = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3", 132)


@pytest.mark.parametrize(
    ("gpu", "hip", "cuda", "arch", "runtime"),
    [
        (MI300X, "6.4.2", None, "gfx942", "ROCm 6.4.2"),
        (H100, None, "12.8", "sm_90", "CUDA 12.8"),
    ],
)
def test_a_gpu_is_what_torch_says_of_that_device(
    monkeypatch: pytest.MonkeyPatch,
    gpu: tuple[str, str, int],
    hip: str | None,
    cuda: str | None,
    arch: str,
    runtime: str,
) -> None:
    second = torch.device("cuda", 1)
    name, gcn, units = gpu
    said = SimpleNamespace(
        name=name, gcnArchName=gcn, multi_processor_count=units, major=9, minor=0
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", {second: said}.__getitem__)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    python = platform.python_version()
    expected = Environment(name, arch, units, runtime, torch.__version__, python)
    assert describe_environment(second) == expected
