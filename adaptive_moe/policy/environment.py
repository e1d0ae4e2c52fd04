"""Where a calibration was measured: everything besides the shape that can change the answer."""

import os
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Environment:
    """device: GPU or CPU name; arch: gfx942, sm_90 or the CPU's; compute_units: CUs, SMs or the
    threads torch uses; runtime: ROCm or CUDA version, empty on the CPU."""

    device: str
    arch: str
    compute_units: int
    runtime: str
    torch: str
    python: str


def describe_environment(device: "torch.device") -> Environment:
    """Read the facts of `device` off torch and this process."""
    import torch

    python = platform.python_version()
    if device.type == "cpu":
        return Environment(
            _cpu_name(), platform.machine(), torch.get_num_threads(), "", torch.__version__, python
        )
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch, runtime = properties.gcnArchName.split(":")[0], f"ROCm {torch.version.hip}"
    else:
        arch, runtime = f"sm_{properties.major}{properties.minor}", f"CUDA {torch.version.cuda}"
    return Environment(
        properties.name,
        arch,
        properties.multi_processor_count,
        runtime,
        torch.__version__,
        python,
    )


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    except OSError:
        pass  # not Linux: the platform's own word will do
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
