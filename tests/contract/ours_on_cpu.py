"""Our own sort as candidates where there is no GPU: offered as ever, sorting on the CPU.

Who is offered, for which calls and how they are made is kernels/ours.py's own; only in place of
its Triton kernels sorts the stand-in, as a backend of the name `triton`. (Triton's interpreter
takes more than a second a call.)
"""

import dataclasses
import functools

import torch
from aiter.sort import sort

from adaptive_moe.kernels import ours
from adaptive_moe.kernels.sorts import REGISTRY


def sorts(live, shape):
    as_on_a_gpu = dataclasses.replace(live, device=torch.device("cuda"))
    for one in ours.sorts(as_on_a_gpu, shape):
        yield dataclasses.replace(one, call=functools.partial(on_cpu, *one.call.args))


def on_cpu(policy, rounded, *leading):
    *arguments, accumulate = leading
    outputs = sort(*arguments, policy, accumulate, backend="triton")
    assert rounded  # as the stand-in's AITER does
    return outputs


def register():
    """In this process from now on."""
    for name, module in REGISTRY.items():
        if module == ours.__name__:
            REGISTRY[name] = __name__
