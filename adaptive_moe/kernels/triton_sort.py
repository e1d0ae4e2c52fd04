"""MoE sorting in Triton with AITER's output contract, as the policies that AITER's switch names.

`moe_sorting` groups the routed (token, slot) entries of a batch by expert and pads every group to
a multiple of `block_size`, so that each block of a grouped GEMM works for one expert. The policies
give the same answer and differ in how the work is laid out:

1  one-shot: a single launch, in which every program counts the whole batch by itself and then
   places its own chunk of it. Nothing is cheaper to launch, but every program's time grows with
   the batch: fastest up to 1,000 (512 experts) or 4,000 entries (few experts). From there on a
   batch is sorted as under policy 2.
2  multi-phase: two launches and a workspace. The first counts experts per chunk of entries; in
   the second every chunk derives its own place from those counts. Large batches take a third
   between them, which adds the counts up.
0  chooses between them by a rule (`one_shot_tokens`) that knows only the shape.

What is launched is in triton_launches.py, the kernels in triton_kernels.py. Contract: ROCm/aiter,
`aiter/fused_moe.py` and `csrc/include/moe_sorting_opus.h`.
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from triton.runtime import JITFunction, driver

from adaptive_moe.kernels.triton_kernels import place_kernel
from adaptive_moe.kernels.triton_launches import Launch, Launches, Tuning, launches_for
from adaptive_moe.shape import MAX_EXPERTS, MAX_TOPK

_BUFFER_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST_BOUND = 4096  # calls kept with what is constant for them
TUNING = Tuning()

_Tensors = tuple[torch.Tensor | None, ...]
_bound: dict[tuple[object, ...], Launches] = {}
_compiled: dict[tuple[object, ...], Any] = {}
_compiling = threading.Lock()


def _renew_lock() -> None:
    """In a child that was forked: a lock that no thread holds."""
    global _compiling  # noqa: PLW0603
    _compiling = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def _compile(launches: Sequence[tuple[Launch, _Tensors]]) -> None:
    """Compile and load what is not yet: the first by itself, which loads the compiler, the others
    side by side, since the compiler releases Python's lock."""
    kernel, tensor = launches[0][0].kernel, launches[0][1][0]
    if tensor is None or not tensor.is_cuda or not isinstance(kernel, JITFunction):
        return  # interpreted, under TRITON_INTERPRET=1
    device = torch.cuda.current_device()  # a new thread's is the first one

    def compile_one(launch: Launch, tensors: _Tensors) -> Any:
        torch.cuda.set_device(device)
        return launch.kernel.warmup(
            *tensors, *launch.constants, grid=(1,), num_warps=launch.num_warps
        )

    with _compiling:
        new = {one.variant: (one, with_) for one, with_ in launches if one.variant not in _compiled}
        if not new:
            return
        first, *others = new.values()
        made = [compile_one(*first)]
        if others:
            with ThreadPoolExecutor(min(len(others), len(os.sched_getaffinity(0)))) as pool:
                made += pool.map(compile_one, *zip(*others, strict=True))
        for variant, compiled in zip(new, made, strict=True):
            compiled[(1, 1, 1)]  # loads it
            _compiled[variant] = compiled


def _launch(launch: Launch, tensors: _Tensors) -> None:
    """Skips Triton's own look-up of the compiled variant, which takes longer than the launch, and
    hands it addresses, since it asks the driver about each tensor, and the stream, since it asks
    for the device first."""
    if launch.run is None:
        compiled = _compiled.get(launch.variant)
        if compiled is None:  # interpreted, under TRITON_INTERPRET=1
            launch.kernel[(launch.programs,)](
                *tensors, *launch.constants, num_warps=launch.num_warps
            )
            return
        launch.run = compiled[(launch.programs, 1, 1)]
    assert tensors[0] is not None
    launch.run(
        *[None if tensor is None else tensor.data_ptr() for tensor in tensors],
        *launch.constants,
        stream=driver.active.get_current_stream(tensors[0].get_device()),
    )


def moe_sorting(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: torch.dtype,
    block_size: int = 32,
    expert_mask: torch.Tensor | None = None,
    num_local_tokens: torch.Tensor | None = None,
    dispatch_policy: int = 0,
    *,
    accumulate: bool = True,
    rounded: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort routed entries by expert, each expert's group padded to a multiple of `block_size`.

    topk_ids int32 and topk_weights float32, both [M, topk], on the current device. Ids that are no
    expert, and experts that `expert_mask` (int32 [num_experts], 0 = on another rank) hides, are
    dropped. All three are contiguous. Where `num_local_tokens` (int32 [1]) is given, only so many
    rows are real; it is read on the device alone. With L real rows, the five results are

    sorted_ids int32 [buffer_length(..., rounded=rounded)]: `slot << 24 | token`, grouped by
        expert, in the order of the input within one; padding is `topk << 24 | L`
    sorted_weights float32, as long: the entry's weight; undefined at padding
    sorted_expert_ids int32 [one a block]: the expert, counted among the visible ones
    num_valid_ids int32 [2]: entries with padding, and L; what lies beyond them is undefined
    moe_buf [M, model_dim]: its first L rows are zeros; an empty [0, 0] where the caller reduces by
        itself (`accumulate=False`) and no expert is hidden

    Nothing waits for the device, so a call can be captured into a graph. The first call of a kind
    compiles, also what sorts fewer tokens: before a capture, call each policy with the fewest and
    the most tokens that it will have.
    """
    key = (
        topk_ids.shape, topk_weights.shape, topk_ids.dtype, topk_weights.dtype, topk_ids.device,
        num_experts, model_dim, moebuf_dtype, block_size,
        None if expert_mask is None else (
            expert_mask.dtype, expert_mask.shape, expert_mask.stride()
        ),
        None if num_local_tokens is None else num_local_tokens.dtype,
        dispatch_policy, accumulate, rounded,
    )  # fmt: skip
    bound = _bound.get(key)
    is_new = bound is None
    if bound is None or not (topk_ids.is_contiguous() and topk_weights.is_contiguous()):
        _check(topk_ids, topk_weights, num_experts, moebuf_dtype, block_size)
        _check_options(num_experts, expert_mask, num_local_tokens)
        bound = launches_for(
            TUNING, topk_ids, num_experts, model_dim, moebuf_dtype, block_size,
            expert_mask is not None, num_local_tokens is not None, dispatch_policy,
            accumulate, rounded,
        )  # fmt: skip
    # Allocations are a third of the host's time, and take less of it without dtype and device.
    int32, float32 = topk_ids.new_empty, topk_weights.new_empty
    sorted_ids, sorted_weights = int32(bound.length), float32(bound.length)
    sorted_expert_ids, num_valid_ids = int32(bound.blocks), int32(2)
    # torch.empty takes longer to read the same arguments.
    moe_buf = torch.empty_strided(
        bound.buffer, (bound.buffer[1], 1), dtype=moebuf_dtype, device=topk_ids.device
    )
    outputs = (sorted_ids, sorted_weights, sorted_expert_ids, num_valid_ids, moe_buf)
    one_shot: _Tensors = (topk_ids, topk_weights, *outputs, expert_mask, num_local_tokens)
    place = one_shot
    launches = [(bound.sort, one_shot)]
    if bound.count is not None:
        counts = int32(bound.counts)
        place = (topk_ids, topk_weights, counts, *outputs, expert_mask, num_local_tokens)
        launches = [(bound.count, (topk_ids, counts, moe_buf, num_local_tokens))]
        if bound.scan is not None:
            launches.append((bound.scan, (counts, moe_buf, num_local_tokens)))
        launches.append((bound.sort, place))
    if is_new:
        ahead = [
            (launch, place if launch.kernel is place_kernel else one_shot) for launch in bound.ahead
        ]
        _compile([*launches, *ahead])
    for launch, tensors in launches:
        _launch(launch, tensors)
    if is_new:
        # Only now: a call that failed is made anew.
        if len(_bound) >= _MOST_BOUND:
            _bound.clear()
        _bound[key] = bound
    return outputs


def _check(
    ids: torch.Tensor,
    weights: torch.Tensor,
    num_experts: int,
    dtype: torch.dtype,
    block_size: int,
) -> None:
    """Raise ValueError, naming the value and what is accepted, for what cannot be sorted."""
    for name, tensor, wanted in (
        ("topk_ids", ids, torch.int32), ("topk_weights", weights, torch.float32)
    ):  # fmt: skip
        if tensor.dtype != wanted or tensor.shape != ids.shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}; "
                f"accepted is contiguous {wanted} [num_tokens, topk], the same shape for both"
            )
    # With more, a workspace could have 2 GiB, and Triton for AMD would compile anew.
    few = len(ids) < 1 << 24 and ids.numel() <= 1 << 27
    if ids.dim() != 2 or not 1 <= ids.shape[1] <= min(MAX_TOPK, num_experts) or not few:
        raise ValueError(
            f"topk_ids is {list(ids.shape)} for {num_experts} experts; accepted are [num_tokens, "
            f"topk] of under 2**24 tokens and up to 2**27 entries, topk from 1 to {MAX_TOPK} and "
            "to num_experts"
        )
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"num_experts is {num_experts}; accepted are 1 to {MAX_EXPERTS}")
    if block_size % 16 or not 16 <= block_size <= 256:
        raise ValueError(f"block_size is {block_size}; accepted are multiples of 16 from 16 to 256")
    if dtype not in _BUFFER_DTYPES:
        raise ValueError(f"moebuf_dtype is {dtype}; accepted are bfloat16, float16 and float32")


def _check_options(
    num_experts: int, expert_mask: torch.Tensor | None, num_local_tokens: torch.Tensor | None
) -> None:
    if expert_mask is not None and (
        expert_mask.dtype != torch.int32
        or expert_mask.numel() != num_experts
        or not expert_mask.is_contiguous()
    ):
        raise ValueError(
            f"expert_mask is {expert_mask.dtype} with {expert_mask.numel()} elements, strides "
            f"{expert_mask.stride()}; accepted is contiguous int32 with one element an expert, "
            f"{num_experts}"
        )
    if num_local_tokens is not None and num_local_tokens.dtype != torch.int32:
        raise ValueError(f"num_local_tokens is {num_local_tokens.dtype}; accepted is int32")
