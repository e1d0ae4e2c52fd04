"""An MoE layer of the stand-in for AITER on a GPU, and a list of what was checked of it."""

import torch

from adaptive_moe.kernels.contract import SortingInputs, check_contract

# DeepSeek-V3's sort; vLLM's usual capture sizes and largest batch.
EXPERTS, TOPK, MODEL_DIM = 256, 8, 7168
CAPTURE_SIZES = (1, 2, 4, *range(8, 513, 8))
MAX_TOKENS = 16384


class Checks:
    """What was checked, in words, and what of it failed."""

    def __init__(self) -> None:
        self.done: dict[str, int] = {}
        self.failed: list[str] = []

    def that(self, what: str, holds: bool, detail: object = "") -> None:
        self.done[what] = self.done.get(what, 0) + 1
        if not holds:
            self.failed.append(f"{what}: {detail}")


class Layer:
    """One MoE layer's arguments for a batch, and a way to route it anew in place."""

    def __init__(self, fused_moe, num_tokens: int, model_dim: int = MODEL_DIM) -> None:
        zero = torch.zeros((), dtype=torch.bfloat16, device="cuda")
        self.fused_moe = fused_moe
        self.num_tokens, self.model_dim = num_tokens, model_dim
        self.hidden = zero.expand(num_tokens, model_dim)
        self.w1 = zero.expand(EXPERTS, 32, model_dim)
        self.w2 = zero.expand(EXPERTS, model_dim, 16)
        self.ids = torch.empty((num_tokens, TOPK), dtype=torch.int32, device="cuda")
        self.weights = torch.empty((num_tokens, TOPK), device="cuda")
        self.route(0)

    def route(self, seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        scores = torch.rand((self.num_tokens, EXPERTS), generator=generator, device="cuda")
        self.ids.copy_(scores.topk(TOPK, dim=1).indices)
        self.weights.copy_(torch.rand(self.weights.shape, generator=generator, device="cuda"))

    def __call__(self, policy: int = 0) -> torch.Tensor:
        return self.fused_moe(
            self.hidden,
            self.w1,
            self.w2,
            self.weights,
            self.ids,
            moe_sorting_dispatch_policy=policy,
        )

    def problems(self, outputs: tuple[torch.Tensor, ...]) -> list[str]:
        inputs = SortingInputs(self.ids, self.weights, EXPERTS, self.model_dim, torch.bfloat16, 32)
        return check_contract(inputs, outputs)
