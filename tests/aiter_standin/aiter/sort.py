"""The sort behind the stand-in's seam, and a record of how it was called.

The real one launches AITER's kernels; this one runs adaptive_moe's CPU or Triton kernel, which keep
the same output contract. AITER_STANDIN_SLOW names policies and backends, as in 0,1 or opus,ck, to
make slower, so that there is something to choose whatever the machine; failures.py makes sorts
fail.
`hazardous` has those that the real kernels would not have survived; here they go well.
"""

import os
import time
from collections import deque
from dataclasses import dataclass

import torch

from aiter import failures, hazards
from aiter.version import since


@dataclass(frozen=True)
class SortCall:
    """What arrived at the sort itself, below every wrapper."""

    policy: object
    num_tokens: int
    block_size: int
    masked: bool
    accumulate: bool
    captured: bool
    backend: str


calls: deque[SortCall] = deque(maxlen=100_000)
hazardous: deque[tuple[SortCall, str]] = deque(maxlen=1000)
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
    *,
    backend="ck",
    output=None,
):
    """The five outputs of AITER's; `output` is used for moe_buf where there is one."""
    on_gpu = topk_ids.is_cuda
    captured = on_gpu and torch.cuda.is_current_stream_capturing()
    accumulate = accumulate or expert_mask is not None
    call = SortCall(
        dispatch_policy,
        topk_ids.shape[0],
        block_size,
        expert_mask is not None,
        accumulate,
        captured,
        backend,
    )
    calls.append(call)
    # Nobody may wait for a GPU here; there, only what the arguments alone say is noted.
    padded = not on_gpu and bool((topk_ids < 0).any())
    hazard = hazards.hazard(topk_ids, num_experts, dispatch_policy, backend, padded)
    if hazard is not None:
        hazardous.append((call, hazard))
    slow = os.environ.get("AITER_STANDIN_SLOW", "").split(",")
    is_slow = str(int(dispatch_policy)) in slow or backend in slow
    failure = failures.failure_of(backend, dispatch_policy)
    failures.raise_if_due(failure)
    if on_gpu:
        from adaptive_moe.kernels.triton_sort import moe_sorting
    else:
        from adaptive_moe.kernels.cpu_sort import moe_sorting
    begun = time.perf_counter()
    sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf = moe_sorting(
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
        # Whole blocks, so that a GEMM that reads one to its end stays within the buffer.
        rounded=since("september"),
    )
    if is_slow:
        # Three times as long at least: on a busy machine a fixed time would be too small a share.
        time.sleep(0.001 + 2.0 * (time.perf_counter() - begun))
    if output is not None and accumulate:
        moe_buf = output.zero_()
    if failure == "wrong":
        failures.spoil(sorted_ids)
    outputs = (sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf)
    latest.append(outputs)
    return outputs
