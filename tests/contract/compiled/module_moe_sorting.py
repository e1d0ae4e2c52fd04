"""In place of AITER's compiled sort: our CPU sort, into the buffers that AITER's Python allocated.

`calls` holds what arrived; policies in `slow` take three times as long at least, so there is
something to choose whatever the machine; those in `broken` raise what is given for them.
"""

import time
from dataclasses import dataclass

import torch
from pybind import like_pybind

from adaptive_moe.kernels import cpu_sort


@dataclass(frozen=True)
class Sort:
    policy: int
    num_tokens: int
    num_experts: int
    block_size: int
    masked: bool


calls: list[Sort] = []
slow: set[int] = set()
broken: dict[int, Exception] = {}


@like_pybind
def moe_sorting_fwd(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    sorted_token_ids: torch.Tensor,
    sorted_weights: torch.Tensor,
    sorted_expert_ids: torch.Tensor,
    num_valid_ids: torch.Tensor,
    moe_buf: torch.Tensor,
    num_experts: int,
    unit_size: int,
    local_expert_mask: torch.Tensor | None = None,
    num_local_tokens: torch.Tensor | None = None,
    dispatch_policy: int = 0,
) -> None:
    masked = local_expert_mask is not None
    calls.append(Sort(dispatch_policy, topk_ids.shape[0], num_experts, unit_size, masked))
    if dispatch_policy in broken:
        raise broken[dispatch_policy]
    begun = time.perf_counter()
    outputs = cpu_sort.moe_sorting(
        topk_ids,
        topk_weights,
        num_experts,
        moe_buf.shape[1],
        moe_buf.dtype,
        unit_size,
        local_expert_mask,
        num_local_tokens,
        dispatch_policy,
    )
    allocated = (sorted_token_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf)
    for buffer, output in zip(allocated, outputs, strict=True):
        buffer[: len(output)] = output[: len(buffer)]
    if dispatch_policy in slow:
        time.sleep(0.002 + 2.0 * (time.perf_counter() - begun))
