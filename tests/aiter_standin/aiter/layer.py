"""fused_moe: what all versions do around the sort, called as the module's global that it is."""

import inspect

import torch

from aiter import ActivationType, QuantType
from aiter.version import VERSION, since


def make_fused_moe(module):
    """`module`: aiter.fused_moe, in which others may have put something else by any name."""

    def run(
        hidden_states,
        w2,
        topk_weight,
        topk_ids,
        expert_mask,
        quant_type,
        block_m,
        local_tokens,
        policy,
        output=None,
    ):
        M, topk = topk_ids.shape  # noqa: N806
        experts, model_dim, inter_dim = w2.shape
        dtype = hidden_states.dtype
        config = (module.get_padded_M(M), model_dim, inter_dim, experts, topk, dtype)
        config += (w2.dtype, w2.dtype, quant_type, False, ActivationType.Silu, False)
        keywords = {"is_ep": expert_mask is not None} if since("main") else {}
        keywords |= {"config_file": None} if since("september") else {}
        metadata = module.get_2stage_cfgs(*config, **keywords)
        block_size = metadata.block_m if block_m in (None, -1) else block_m
        global_experts = experts if expert_mask is None else expert_mask.numel()
        arguments = (topk_ids, topk_weight, global_experts, model_dim, dtype, block_size)
        into = {"output": output} if since("september") else {}
        flat = getattr(metadata, "flat", False)
        if not since("main"):
            outputs = module.moe_sorting(*arguments, expert_mask, local_tokens, policy)
        elif metadata.output_aux:
            aux = metadata.output_aux if since("september") else True
            outputs = module.moe_sorting(*arguments, accumulate=True, output_aux=aux, **into)
        else:
            outputs = module.moe_sorting(
                *arguments,
                expert_mask,
                local_tokens,
                policy,
                return_local_topk_ids=False,
                accumulate=not module.stage2_uses_route_reduce(metadata.stage2),
                flat=flat,
                **({} if flat else into),
            )
        result = torch.zeros((M, model_dim), dtype=dtype, device=topk_ids.device)
        result += _row_sums(topk_weight, outputs, flat).unsqueeze(1).to(dtype)
        return result

    run_op = run if VERSION == "v0.1.5" else _custom_op(run, int if since("main") else bool)

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
        output=None,
    ):
        result = run_op(
            hidden_states,
            w2,
            topk_weight,
            topk_ids,
            expert_mask,
            quant_type if VERSION == "v0.1.5" else quant_type.value,
            block_size_M or -1,
            num_local_tokens,
            moe_sorting_dispatch_policy,
            output,
        )
        return result if output is None else output.copy_(result)

    if not since("september"):
        # SGLang looks whether AITER takes an output before it passes one.
        parameters = inspect.signature(fused_moe).parameters.values()
        known = [parameter for parameter in parameters if parameter.name != "output"]
        fused_moe.__signature__ = inspect.Signature(known)
    return fused_moe


def _row_sums(topk_weight, outputs, flat):
    """In place of the GEMMs: the sum of each row's weights, read from the sort's own output."""
    if flat:
        return topk_weight.sum(1)
    sorted_ids, sorted_weights, _, num_valid_ids, _ = outputs[:5]
    # No host synchronisation: entries past num_valid_ids are masked out on the device.
    entries = torch.arange(sorted_ids.numel(), device=sorted_ids.device)
    token = sorted_ids & 0xFFFFFF
    real = (entries < num_valid_ids[0]) & (token < len(topk_weight))
    weights = torch.where(real, sorted_weights, torch.zeros_like(sorted_weights))
    rows = torch.zeros(len(topk_weight), dtype=torch.float32, device=sorted_ids.device)
    return rows.index_add_(0, torch.where(real, token, torch.zeros_like(token)).long(), weights)


def _custom_op(run, annotation):
    """run as a torch custom op, whose schema has the policy as `annotation`."""

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
        output: torch.Tensor | None,
    ) -> torch.Tensor:
        return run(
            hidden_states,
            w2,
            topk_weight,
            topk_ids,
            expert_mask,
            QuantType(quant_type),
            block_size_M,
            num_local_tokens,
            moe_sorting_dispatch_policy,
            output,
        )

    name = f"aiter_standin_{VERSION.replace('.', '_')}::fused_moe_"
    return torch.library.custom_op(name, fused_moe_, mutates_args=("output",))
