"""The seam as ROCm/aiter has it: fused_moe -> (a torch custom op) -> moe_sorting, a module global.

v0.1.5  fused_moe is plain Python; moe_sorting ends with dispatch_policy
v0.1.9  a custom op in between, whose schema has the policy as bool: a 2 arrives as 1
main    the schema has int; moe_sorting also takes return_local_topk_ids, accumulate, flat and
        output_aux, and calls _moe_sorting_impl
"""

import functools
import os
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from aiter import ActivationType, QuantType
from aiter.sort import sort

VERSION = os.environ.get("AITER_STANDIN", "main")
BLOCK_SIZE_M = 32

# Backend flags, read at each call; the first versions have none, and one sort.
if VERSION == "main":
    _USE_CK_MOE_SORTING = os.environ.get("AITER_USE_CK_MOE_SORTING", "0") == "1"
    _USE_FLYDSL_MOE_SORTING = os.environ.get("AITER_USE_FLYDSL_MOE_SORTING", "0") == "1"


@dataclass
class MOEMetadata:
    stage1: object
    stage2: object
    block_m: int
    ksplit: int = 0
    flat: bool = False
    output_aux: bool = False


def get_padded_M(M):  # noqa: N802, N803
    if M >= 32768:
        return 131072 if M >= 131072 else 32768
    return 1 if M <= 1 else 1 << (M - 1).bit_length()


def fused_dynamic_mxfp8_quant_moe_sort(input, sorted_ids, *args, **kwargs):
    """SGLang's small-batch sort wraps this, too."""
    return input, sorted_ids


def stage2_uses_route_reduce(stage2):
    return stage2 == "reduce"


def _config(token, q_type):
    """Small batches get small blocks; a quantised layer reduces by itself when they are large."""
    if q_type == QuantType.per_1x128:
        return MOEMetadata(None, "atomic", 64 if token > 32 else 16)
    if q_type == QuantType.per_1x32:
        return MOEMetadata(None, "reduce" if token > 256 else "atomic", 32)
    if q_type == QuantType.per_Token:
        return MOEMetadata(None, None, 32, flat=token > 64)
    if q_type == QuantType.per_Tensor:
        return MOEMetadata(None, "atomic", 64, output_aux=token > 64)
    return MOEMetadata(None, "atomic", BLOCK_SIZE_M)


if VERSION == "v0.1.5":

    @functools.lru_cache(maxsize=1024)
    def get_2stage_cfgs(
        token, model_dim, inter_dim, expert, topk, dtype, q_dtype_a, q_dtype_w, q_type, *rest
    ):
        found = _config(token, q_type)
        return SimpleNamespace(stage1=None, stage2=None, block_m=found.block_m)

else:

    @functools.lru_cache(maxsize=2048)
    def get_2stage_cfgs(
        token,
        model_dim,
        inter_dim,
        expert,
        topk,
        dtype,
        q_dtype_a,
        q_dtype_w,
        q_type,
        *rest,
        is_ep=False,
    ):
        return _config(token, q_type)


def _unsorted(topk_ids, topk_weights, model_dim, moebuf_dtype):
    moe_buf = torch.empty((topk_ids.shape[0], model_dim), dtype=moebuf_dtype)
    return topk_ids, topk_weights, topk_ids, topk_ids, moe_buf


def _moe_sorting_impl(
    topk_ids,
    topk_weights,
    num_experts,
    model_dim,
    moebuf_dtype,
    block_size,
    expert_mask,
    num_local_tokens,
    dispatch_policy,
    use_opus,
    return_local_topk_ids=False,
    accumulate=True,
    output_aux=False,
):
    outputs = sort(
        topk_ids,
        topk_weights,
        num_experts,
        model_dim,
        moebuf_dtype,
        block_size,
        expert_mask,
        num_local_tokens,
        1 if output_aux else dispatch_policy,
        accumulate,
    )
    if output_aux:
        return (*outputs, None, None)
    return (*outputs, topk_ids) if return_local_topk_ids else outputs


if VERSION in ("v0.1.5", "v0.1.9"):

    def moe_sorting(
        topk_ids,
        topk_weights,
        num_experts,
        model_dim,
        moebuf_dtype,
        block_size=BLOCK_SIZE_M,
        expert_mask=None,
        num_local_tokens=None,
        dispatch_policy=0,
    ):
        return sort(
            topk_ids,
            topk_weights,
            num_experts,
            model_dim,
            moebuf_dtype,
            block_size,
            expert_mask,
            num_local_tokens,
            dispatch_policy,
        )

else:

    def moe_sorting(
        topk_ids,
        topk_weights,
        num_experts,
        model_dim,
        moebuf_dtype,
        block_size=BLOCK_SIZE_M,
        expert_mask=None,
        num_local_tokens=None,
        dispatch_policy=0,
        return_local_topk_ids=False,
        accumulate=True,
        flat=False,
        output_aux=False,
    ):
        if flat:
            return _unsorted(topk_ids, topk_weights, model_dim, moebuf_dtype)
        return _moe_sorting_impl(
            topk_ids,
            topk_weights,
            num_experts,
            model_dim,
            moebuf_dtype,
            block_size,
            expert_mask,
            num_local_tokens,
            dispatch_policy,
            use_opus=not _USE_CK_MOE_SORTING,
            return_local_topk_ids=return_local_topk_ids,
            accumulate=accumulate,
            output_aux=output_aux,
        )


def _run(
    hidden_states, w2, topk_weight, topk_ids, expert_mask, quant_type, block_m, local_tokens, policy
):
    """What all versions do around the sort. The stages themselves are left out: each row of the
    result is the sum of its weights, read from the sort's own output."""
    M, topk = topk_ids.shape  # noqa: N806
    experts, model_dim, inter_dim = w2.shape
    global_experts = experts if expert_mask is None else expert_mask.numel()
    dtype = hidden_states.dtype
    config = (
        get_padded_M(M),
        model_dim,
        inter_dim,
        experts,
        topk,
        dtype,
        w2.dtype,
        w2.dtype,
        quant_type,
        False,
        ActivationType.Silu,
        False,
    )
    keywords = {"is_ep": expert_mask is not None} if VERSION == "main" else {}
    metadata = get_2stage_cfgs(*config, **keywords)
    block_size = metadata.block_m if block_m in (None, -1) else block_m
    arguments = (topk_ids, topk_weight, global_experts, model_dim, dtype, block_size)
    if VERSION != "main":
        outputs = moe_sorting(*arguments, expert_mask, local_tokens, policy)
    elif metadata.output_aux:
        outputs = moe_sorting(*arguments, accumulate=True, output_aux=True)
    else:
        outputs = moe_sorting(
            *arguments,
            expert_mask,
            local_tokens,
            policy,
            return_local_topk_ids=False,
            accumulate=not stage2_uses_route_reduce(metadata.stage2),
            flat=metadata.flat,
        )
    sorted_ids, sorted_weights, _, num_valid_ids, _ = outputs[:5]
    result = torch.zeros((M, model_dim), dtype=dtype, device=topk_ids.device)
    if getattr(metadata, "flat", False):
        return result + topk_weight.sum(1, keepdim=True).to(dtype)
    # No host synchronisation: entries past num_valid_ids are masked out on the device.
    entries = torch.arange(sorted_ids.numel(), device=sorted_ids.device)
    token = sorted_ids & 0xFFFFFF
    real = (entries < num_valid_ids[0]) & (token < M)
    weights = torch.where(real, sorted_weights, torch.zeros_like(sorted_weights))
    row = torch.zeros(M, dtype=torch.float32, device=topk_ids.device)
    row.index_add_(0, torch.where(real, token, torch.zeros_like(token)).long(), weights)
    return result + row.unsqueeze(1).to(dtype)


def _custom_op(annotation):
    """fused_moe_ as a torch custom op whose schema has the policy as `annotation`."""

    def fused_moe_(
        hidden_states: torch.Tensor,
        w2: torch.Tensor,
        topk_weight: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_mask: torch.Tensor | None,
        quant_type: int,
        block_size_M: int,  # noqa: N803
        num_local_tokens: torch.Tensor | None,
        moe_sorting_dispatch_policy: annotation,
    ) -> torch.Tensor:
        return _run(
            hidden_states,
            w2,
            topk_weight,
            topk_ids,
            expert_mask,
            QuantType(quant_type),
            block_size_M,
            num_local_tokens,
            moe_sorting_dispatch_policy,
        )

    name = f"aiter_standin_{annotation.__name__}::fused_moe_"
    return torch.library.custom_op(name, fused_moe_, mutates_args=())


# Registered once a process, whatever this module is imported as later.
if VERSION != "v0.1.5":
    fused_moe_ = _custom_op(bool if VERSION == "v0.1.9" else int)


def fused_moe(
    hidden_states,
    w1,
    w2,
    topk_weight,
    topk_ids,
    expert_mask=None,
    activation=ActivationType.Silu,
    quant_type=QuantType.No,
    doweight_stage1=False,
    w1_scale=None,
    w2_scale=None,
    a1_scale=None,
    a2_scale=None,
    block_size_M=None,  # noqa: N803
    num_local_tokens=None,
    moe_sorting_dispatch_policy=0,
    dtype=None,
    hidden_pad=0,
    intermediate_pad=0,
    bias1=None,
    bias2=None,
    swiglu_limit=None,
    gate_mode=None,
):
    if VERSION == "v0.1.5":
        return _run(
            hidden_states,
            w2,
            topk_weight,
            topk_ids,
            expert_mask,
            quant_type,
            block_size_M,
            num_local_tokens,
            moe_sorting_dispatch_policy,
        )
    return fused_moe_(
        hidden_states,
        w2,
        topk_weight,
        topk_ids,
        expert_mask,
        quant_type.value,
        block_size_M or -1,
        num_local_tokens,
        moe_sorting_dispatch_policy,
    )
