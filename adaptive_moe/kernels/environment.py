"""Where a calibration is measured, read off torch and this process."""

import os
import platform
from typing import TYPE_CHECKING, Any

from adaptive_moe.policy.evidence import Environment

if TYPE_CHECKING:
    import torch

# The same GPU reports a little more or less memory by driver version.
MEMORY_STEP = 16 << 30


def describe_environment(device: "torch.device") -> Environment:
    """The facts of `device` and of the host it is launched from."""
    import torch

    python, host = platform.python_version(), _cpu_model()
    if device.type == "cpu":
        name = f"{host}, {os.cpu_count()} cores"
        arch, threads = platform.machine(), torch.get_num_threads()
        return Environment(name, arch, threads, 0, "", torch.__version__, python, host)
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch, runtime = properties.gcnArchName.split(":")[0], f"ROCm {torch.version.hip}"
    else:
        arch, runtime = f"sm_{properties.major}{properties.minor}", f"CUDA {torch.version.cuda}"
    return Environment(
        device=properties.name,
        arch=arch,
        compute_units=properties.multi_processor_count,
        memory_gib=round(properties.total_memory / MEMORY_STEP) * 16,
        runtime=runtime,
        torch=torch.__version__,
        python=python,
        host=host,
    )


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the platform's own word will do
    return platform.processor() or platform.machine()
