"""The sort behind the stand-in's seam, and a record of how it was called.

The real one launches AITER's kernels; this one runs adaptive_moe's CPU or Triton kernel, which keep
the same output contract. AITER_STANDIN_SLOW names a policy to make a millisecond slower, so that
there is something to choose whatever the machine.
"""

import os
import time
from collections import deque
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SortCall:
    """What arrived at the sort itself, below every wrapper."""

    policy: object
    num_tokens: int
    block_size: int
    masked: bool
    accumulate: bool
    captured: bool


calls: deque[SortCall] = deque(maxlen=100_000)
# The outputs of the latest sort; a captured graph writes to them again at each replay.
latest: deque[tuple[torch.Tensor, ...]] = deque(maxlen=1)


def sort(
    topk_ids,
    topk_weights,
    num_experts,
    model_dim,
    moebuf_dtype,
    block_size,
    expert_mask,
    num_local_tokens,
    dispatch_policy,
    accumulate=True,
):
    on_gpu = topk_ids.is_cuda
    captured = on_gpu and torch.cuda.is_current_stream_capturing()
    accumulate = accumulate or expert_mask is not None
    calls.append(
        SortCall(
            dispatch_policy,
            topk_ids.shape[0],
            block_size,
            expert_mask is not None,
            accumulate,
            captured,
        )
    )
    if os.environ.get("AITER_STANDIN_SLOW") == str(int(dispatch_policy)):
        time.sleep(0.001)
    if on_gpu:
        from adaptive_moe.kernels.triton_sort import moe_sorting
    else:
        from adaptive_moe.kernels.cpu_sort import moe_sorting
    outputs = moe_sorting(
        topk_ids,
        topk_weights,
        num_experts,
        model_dim,
        moebuf_dtype,
        int(block_size),
        expert_mask,
        num_local_tokens,
        int(dispatch_policy),
        accumulate=accumulate,
    )
    latest.append(outputs)
    return outputs
