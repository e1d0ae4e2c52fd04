# Kernels have untyped arguments; the compile-time ones are capitalised, as is Triton's custom.
# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Expert GEMMs over sorted tokens, as plain as they can be: what runs right after the sort.

Not tuned: they stand for the GEMMs of a serving step in what they do to the device (its caches, its
queue), by reading every expert's weights that a batch needs and nothing else. The rows that they
read and the experts that they use are the sort's outputs, on the device.
"""

import torch
import triton
import triton.language as tl

BLOCK_N, BLOCK_K = 64, 64
TOKEN_MASK = tl.constexpr((1 << 24) - 1)


@triton.jit
def _gate_up_kernel(
    x, w, hidden, sorted_ids, sorted_expert_ids, num_valid_ids, num_tokens, dim, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """hidden [sorted entries, width] = silu(x @ gate) * (x @ up); w [experts, 2 * width, dim]."""
    first = tl.program_id(1) * BLOCK_M
    if first < tl.load(num_valid_ids):
        row = first + tl.arange(0, BLOCK_M)
        token = tl.load(sorted_ids + row) & TOKEN_MASK
        real = token < num_tokens
        expert = tl.load(sorted_expert_ids + tl.program_id(1)).to(tl.int64)
        column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        rows = x + token.to(tl.int64)[:, None] * dim + k[None, :]
        weights = w + expert * 2 * width * dim + column[None, :].to(tl.int64) * dim + k[:, None]
        up_weights = weights + width.to(tl.int64) * dim
        for start in range(0, dim, BLOCK_K):
            inside = k < dim - start
            a = tl.load(rows + start, mask=real[:, None] & inside[None, :], other=0.0)
            mask = (column < width)[None, :] & inside[:, None]
            gate += tl.dot(a, tl.load(weights + start, mask=mask, other=0.0))
            up += tl.dot(a, tl.load(up_weights + start, mask=mask, other=0.0))
        result = gate * tl.sigmoid(gate) * up
        target = hidden + row.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(target, result.to(hidden.dtype.element_ty), mask=(column < width)[None, :])


@triton.jit
def _down_kernel(
    hidden, w, moe_buf, sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids,
    num_tokens, dim, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """moe_buf [num_tokens, dim] += weight * (hidden @ down); w [experts, dim, width]."""
    first = tl.program_id(1) * BLOCK_M
    if first < tl.load(num_valid_ids):
        row = first + tl.arange(0, BLOCK_M)
        token = tl.load(sorted_ids + row) & TOKEN_MASK
        real = token < num_tokens
        expert = tl.load(sorted_expert_ids + tl.program_id(1)).to(tl.int64)
        column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        rows = hidden + row.to(tl.int64)[:, None] * width + k[None, :]
        weights = w + expert * dim * width + column[None, :].to(tl.int64) * width + k[:, None]
        for start in range(0, width, BLOCK_K):
            inside = k < width - start
            a = tl.load(rows + start, mask=inside[None, :], other=0.0)
            mask = (column < dim)[None, :] & inside[:, None]
            total += tl.dot(a, tl.load(weights + start, mask=mask, other=0.0))
        total *= tl.load(sorted_weights + row, mask=real, other=0.0)[:, None]
        target = moe_buf + token.to(tl.int64)[:, None] * dim + column[None, :]
        keep = real[:, None] & (column < dim)[None, :]
        tl.atomic_add(target, total.to(moe_buf.dtype.element_ty), mask=keep, sem="relaxed")


def experts(
    x: torch.Tensor, outputs: tuple[torch.Tensor, ...], w13: torch.Tensor, w2: torch.Tensor,
    block_size: int,
) -> torch.Tensor:  # fmt: skip
    """The experts' part of a layer, accumulated into the sort's own zeroed moe_buf.

    x [num_tokens, dim], w13 [experts, 2 * width, dim], w2 [experts, dim, width], all of one dtype;
    outputs: the five results of the sort. Nothing waits for the device.
    """
    sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf = outputs[:5]
    num_tokens, dim = x.shape
    width = w2.shape[2]
    blocks = sorted_expert_ids.numel()
    hidden = x.new_empty((blocks * block_size, width))
    sizes = (num_tokens, dim, width)
    _gate_up_kernel[(triton.cdiv(width, BLOCK_N), blocks)](
        x, w13, hidden, sorted_ids, sorted_expert_ids, num_valid_ids, *sizes,
        BLOCK_M=block_size, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=4, num_stages=3,
    )  # fmt: skip
    _down_kernel[(triton.cdiv(dim, BLOCK_N), blocks)](
        hidden, w2, moe_buf, sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, *sizes,
        BLOCK_M=block_size, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=4, num_stages=3,
    )  # fmt: skip
    return moe_buf
