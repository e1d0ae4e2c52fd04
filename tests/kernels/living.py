"""Calls of an AITER made by hand, and who may answer them."""

import contextvars

import torch

from adaptive_moe.kernels.call import CallKey, SortCall
from adaptive_moe.kernels.contract import SortingInputs
from adaptive_moe.kernels.live import live_kernel
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.shape import SortingShape

SHAPE = SortingShape(256, 8, 7168)
GPU = torch.device("cuda", 0)


def live(module, *, baseline=0, rounded=True, num_outputs=5, device=GPU, **extras):
    """A call of SHAPE that reached that module's seam. extras: arguments after the ninth."""
    return SortCall(
        key=CallKey(
            *(256, 8, 7168, torch.bfloat16, 32, False, False, True, False, ()),
            *("True" if baseline is True else baseline, 0),
        ),
        num_tokens=8,
        module=module,
        seam=lambda *a, **k: "seam",
        device=device,
        baseline=baseline,
        mask=None,
        extras=extras,
        config=None,
        context=contextvars.Context(),
        grad=False,
        inference=False,
        stream=None,
        rounded=rounded,
        num_outputs=num_outputs,
    )


def inputs(num_tokens=4):
    """Of SHAPE."""
    ids = torch.zeros((num_tokens, 8), dtype=torch.int32)
    return SortingInputs(ids, torch.zeros((num_tokens, 8)), 256, 7168, torch.bfloat16, 32)


def candidates(found, wanted, coverage=None):
    coverage = coverage or Coverage.up_to(SHAPE, 64)
    kernel, _ = live_kernel(found, coverage, wanted)
    return [candidate.name for candidate in kernel.candidates]
