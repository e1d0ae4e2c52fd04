"""AITER without an engine: measure once, then serve. Needs an AMD GPU and AITER."""

import torch
from aiter.fused_moe import fused_moe

import adaptive_moe

EXPERTS, TOPK, DIM, INTER, TOKENS = 8, 2, 4096, 1024, 4096

adaptive_moe.install()  # wraps AITER's sort; its calls are seen from now on
device = torch.device("cuda")
w1 = torch.randn(EXPERTS, 2 * INTER, DIM, dtype=torch.bfloat16, device=device)
w2 = torch.randn(EXPERTS, DIM, INTER, dtype=torch.bfloat16, device=device)


def layer(num_tokens: int) -> torch.Tensor:
    hidden = torch.randn(num_tokens, DIM, dtype=torch.bfloat16, device=device)
    weights, ids = torch.rand(num_tokens, EXPERTS, device=device).topk(TOPK)
    return fused_moe(hidden, w1, w2, weights, ids.int())


layer(TOKENS)  # a first forward shows the shape
print(adaptive_moe.warm_up(max_tokens=TOKENS))  # measures it, or finds it stored
layer(24)  # sorted by what was fastest for 24 tokens
print(adaptive_moe.counts())
