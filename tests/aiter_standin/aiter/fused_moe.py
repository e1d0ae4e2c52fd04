"""The seam as ROCm/aiter has it: fused_moe -> (a torch custom op) -> moe_sorting, a module global.

v0.1.5     fused_moe is plain Python; moe_sorting ends with dispatch_policy
v0.1.9     a custom op in between, whose schema has the policy as bool: a 2 arrives as True
main       the schema has int; moe_sorting also takes return_local_topk_ids, accumulate, flat and
           output_aux, calls _moe_sorting_impl, and may run FlyDSL in its place
september  sorts into whole blocks; output_aux is a constant; output, the caller's buffer for the
           result, is sorted into (zeroed) and returned
"""

import functools
import os
import sys
from types import SimpleNamespace

import torch

from aiter import ActivationType, QuantType, dtypes  # noqa: F401
from aiter.chooser import (
    AUX_SORT_NONE,
    AUX_SORT_OPUS,  # noqa: F401
    BLOCK_SIZE_M,
    MOEMetadata,  # noqa: F401
    choose,
    get_padded_M,  # noqa: F401
)
from aiter.layer import make_fused_moe
from aiter.sort import sort
from aiter.version import VERSION, since

# Backend flags, read at each call; the first versions have none, and one sort.
if since("main"):
    _USE_CK_MOE_SORTING = os.environ.get("AITER_USE_CK_MOE_SORTING", "0") == "1"
    _USE_FLYDSL_MOE_SORTING = os.environ.get("AITER_USE_FLYDSL_MOE_SORTING", "0") == "1"


def is_flydsl_available():
    return True


def fused_dynamic_mxfp8_quant_moe_sort(input, sorted_ids, *args, **kwargs):
    """SGLang's small-batch sort wraps this, too."""
    return input, sorted_ids


def stage2_uses_route_reduce(stage2):
    return stage2 == "reduce"


if VERSION == "v0.1.5":

    @functools.lru_cache(maxsize=1024)
    def get_2stage_cfgs(
        token, model_dim, inter_dim, expert, topk, dtype, q_dtype_a, q_dtype_w, q_type, *rest
    ):
        found = choose(token, q_type)
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
        config_file=None,
    ):
        return choose(token, q_type)


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
    output_aux=AUX_SORT_NONE,
    output=None,
):
    """CK's sort or Opus's. Only Opus knows of local ids and of what output_aux asks for."""
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
        backend="opus" if use_opus or return_local_topk_ids or output_aux else "ck",
        output=output,
    )
    if output_aux:
        return (*outputs, None, None)
    return (*outputs, topk_ids) if return_local_topk_ids else outputs


def _flydsl_moe_sorting(
    topk_ids,
    topk_weights,
    num_experts,
    model_dim,
    moebuf_dtype,
    block_size,
    expert_mask,
    num_local_tokens,
    accumulate=True,
    output=None,
):
    """FlyDSL's sort, which has no policies."""
    arguments = (topk_ids, topk_weights, num_experts, model_dim, moebuf_dtype, block_size)
    rest = (expert_mask, num_local_tokens, 0, accumulate)
    return sort(*arguments, *rest, backend="flydsl", output=output)


def _moe_sorting(
    topk_ids,
    topk_weights,
    num_experts,
    model_dim,
    moebuf_dtype,
    block_size,
    expert_mask,
    num_local_tokens,
    dispatch_policy,
    return_local_topk_ids,
    accumulate,
    flat,
    output_aux,
    output=None,
):
    arguments = (topk_ids, topk_weights, num_experts, model_dim, moebuf_dtype, block_size)
    if flat:
        assert output is None, "a flat layer's buffer is larger than its result"
        return _unsorted(topk_ids, topk_weights, model_dim, moebuf_dtype)
    if (
        not _USE_CK_MOE_SORTING
        and _USE_FLYDSL_MOE_SORTING
        and is_flydsl_available()
        and not return_local_topk_ids
        and not output_aux
        and dispatch_policy == 0
    ):
        return _flydsl_moe_sorting(
            *arguments, expert_mask, num_local_tokens, accumulate, output=output
        )
    return _moe_sorting_impl(
        *arguments,
        expert_mask,
        num_local_tokens,
        dispatch_policy,
        use_opus=not _USE_CK_MOE_SORTING,
        return_local_topk_ids=return_local_topk_ids,
        accumulate=accumulate,
        output_aux=output_aux,
        output=output,
    )


if not since("main"):

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
        arguments = (topk_ids, topk_weights, num_experts, model_dim, moebuf_dtype, block_size)
        return sort(*arguments, expert_mask, num_local_tokens, dispatch_policy)

elif not since("september"):

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
        arguments = (topk_ids, topk_weights, num_experts, model_dim, moebuf_dtype, block_size)
        rest = (dispatch_policy, return_local_topk_ids, accumulate, flat, output_aux)
        return _moe_sorting(*arguments, expert_mask, num_local_tokens, *rest)

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
        output_aux=AUX_SORT_NONE,
        output=None,
    ):
        arguments = (topk_ids, topk_weights, num_experts, model_dim, moebuf_dtype, block_size)
        rest = (dispatch_policy, return_local_topk_ids, accumulate, flat, output_aux, output)
        return _moe_sorting(*arguments, expert_mask, num_local_tokens, *rest)


fused_moe = make_fused_moe(sys.modules[__name__])
