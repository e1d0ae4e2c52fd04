"""Calls of an AITER made by hand, and who may answer them."""

import torch

from adaptive_moe.kernels.call import Live
from adaptive_moe.kernels.contract import SortingInputs
from adaptive_moe.kernels.live import live_kernel
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.shape import SortingShape

SHAPE = SortingShape(256, 8, 7168)
GPU = torch.device("cuda", 0)


def live(module, *, baseline=0, rounded=True, num_outputs=5, device=GPU, **extras):
    return Live(module, lambda *a, **k: "seam", device, baseline, extras, rounded, num_outputs)


def inputs(num_tokens=4):
    """Of SHAPE."""
    ids = torch.zeros((num_tokens, 8), dtype=torch.int32)
    return SortingInputs(ids, torch.zeros((num_tokens, 8)), 256, 7168, torch.bfloat16, 32)


def candidates(found, wanted, coverage=None):
    coverage = coverage or Coverage.up_to(SHAPE, 64)
    kernel, _ = live_kernel(found, coverage, wanted)
    return [candidate.name for candidate in kernel.candidates]
