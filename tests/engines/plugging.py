"""What tests of plugins call."""

import sys

import torch

NAME = "VLLM_ROCM_AITER_MOE_DISPATCH_POLICY"
NEUTRAL = "ADAPTIVE_MOE_DISPATCH_POLICY"


def sort(aiter, num_tokens=8, dim=64, policy=0):
    """What policy arrives at the sort."""
    ids = torch.arange(4, dtype=torch.int32).repeat(num_tokens, 1)
    weights = torch.ones((num_tokens, 4))
    aiter.moe_sorting(ids, weights, 16, dim, torch.bfloat16, 32, None, None, policy)
    return sys.modules["aiter.sort"].calls[-1].policy
