"""FlyDSL's sort below AITER's own call of it: buffers and workspace are the caller's."""

from aiter.sort import sort


def moe_sorting_flydsl(
    topk_ids,
    topk_weights,
    sorted_ids,
    sorted_weights,
    sorted_expert_ids,
    num_valid_ids,
    moe_buf,
    num_experts,
    unit_size,
    expert_mask=None,
    num_local_tokens=None,  # has_local_tokens: read on the device
    workspace=None,
):
    model_dim = moe_buf.shape[1]
    arguments = (topk_ids, topk_weights, num_experts, model_dim, moe_buf.dtype, unit_size)
    accumulate = moe_buf.numel() > 0
    found = sort(
        *arguments, expert_mask, num_local_tokens, 0, accumulate, backend="flydsl", output=moe_buf
    )
    # Only what is defined: AITER of before September allocates less than whole blocks.
    for ours, theirs in zip((sorted_ids, sorted_weights), found[:2], strict=True):
        shorter = min(len(ours), len(theirs))
        ours[:shorter].copy_(theirs[:shorter])
    sorted_expert_ids.copy_(found[2][: len(sorted_expert_ids)])
    num_valid_ids.copy_(found[3])
