"""A stand-in for AMD's AITER: the module structure around the seam, with a sort that runs here.

It imitates what ROCm/aiter has where adaptive_moe meets it, and nothing of adaptive_moe. The
environment variable AITER_STANDIN picks the version imitated, see version.py.
"""

import enum
import logging
from types import SimpleNamespace

import torch

logger = logging.getLogger("aiter")
dtypes = SimpleNamespace(
    i32=torch.int32,
    fp32=torch.float32,
    bf16=torch.bfloat16,
    fp16=torch.float16,
    fp8=torch.float8_e4m3fnuz,
    fp4x2=torch.uint8,
)


class ActivationType(enum.Enum):
    No = -1
    Silu = 0
    Gelu = 1
    Swiglu = 2


class QuantType(enum.Enum):
    No = 0
    per_Tensor = 1  # noqa: N815
    per_Token = 2  # noqa: N815
    per_1x32 = 3
    per_1x128 = 4
