"""In place of AITER's compiled GEMMs: cheap stages that read what the sort wrote.

Each row of the result is the sum of its routing weights, so a wrong sort is a wrong result.
"""

import torch
from pybind import like_pybind


@like_pybind
def ck_moe_stage1(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    sorted_token_ids: torch.Tensor,
    sorted_expert_ids: torch.Tensor,
    num_valid_ids: torch.Tensor,
    out: torch.Tensor,
    topk: int,
    kernelName: str | None = None,  # noqa: N803
    w1_scale: torch.Tensor | None = None,
    a1_scale: torch.Tensor | None = None,
    block_m: int | None = 32,
    sorted_weights: torch.Tensor | None = None,
    quant_type: int = 0,
    activation: int = 0,
) -> None:
    out.zero_()


@like_pybind
def ck_moe_stage2(
    inter_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    sorted_token_ids: torch.Tensor,
    sorted_expert_ids: torch.Tensor,
    num_valid_ids: torch.Tensor,
    out: torch.Tensor,
    topk: int,
    kernelName: str | None = None,  # noqa: N803
    w2_scale: torch.Tensor | None = None,
    a2_scale: torch.Tensor | None = None,
    block_m: int | None = 32,
    sorted_weights: torch.Tensor | None = None,
    quant_type: int = 0,
    activation: int = 0,
) -> None:
    """Into `out`, which the sort has zeroed."""
    blocks = int(num_valid_ids[0]) // block_m
    assert sorted_expert_ids[:blocks].ge(0).all()
    assert sorted_expert_ids[:blocks].lt(len(w1)).all()
    add_weights(out, sorted_token_ids[: num_valid_ids[0]], sorted_weights)


@like_pybind
def fmoe(
    out: torch.Tensor,
    input: torch.Tensor,
    gate: torch.Tensor,
    down: torch.Tensor,
    sorted_token_ids: torch.Tensor,
    sorted_weights: torch.Tensor,
    sorted_expert_ids: torch.Tensor,
    num_valid_ids: torch.Tensor,
    topk: int,
) -> None:
    """Both stages at once, without a gate: AITER's choice for small unquantised batches."""
    add_weights(out, sorted_token_ids[: num_valid_ids[0]], sorted_weights)


def add_weights(out: torch.Tensor, sorted_ids: torch.Tensor, weights: torch.Tensor) -> None:
    token = (sorted_ids & 0xFFFFFF).long()
    real = token < len(out)
    rows = torch.zeros(len(out)).index_add_(0, token[real], weights[: len(token)][real])
    out += rows.unsqueeze(1).to(out.dtype)
