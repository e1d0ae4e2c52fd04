"""A model-like serving step: what surrounds a sort in a layer, at a model's sizes.

norm, attention-sized GEMMs (attention itself left out), norm, router, top-k, sort, expert GEMMs.
The layers of a step share their weights, which are far larger than any cache. Activations carry no
meaning; what matters is what the device and the host have to do around each sort.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from adaptive_moe.models import Model
from adaptive_moe.shape import SortingShape

# (x, topk_weights, topk_ids, w13, w2) -> the experts' output, sort and all.
Experts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

# Columns of an expert come in whole tiles of the GEMMs, as engines pad them.
TILE = 64


@dataclass(frozen=True)
class LayerSizes:
    """One rank's part of a layer under tensor parallelism.

    width      columns of one expert's hidden activations on this rank
    attention  width of the query, key and value projections together, and of what is projected back
    """

    shape: SortingShape
    width: int
    attention: tuple[int, int]


def layer_sizes(model: Model, tensor_parallel: int, block_size: int, dtype: str) -> LayerSizes:
    """The model's layer on one of so many ranks; ValueError where its sizes are not known."""
    if not model.moe_intermediate_size or len(model.attention) != 2:
        raise ValueError(
            f"model {model.name!r} has no step sizes: give one of calibration/models.toml, or add "
            "moe_intermediate_size and attention there"
        )
    if tensor_parallel < 1:
        raise ValueError(f"--tensor-parallel {tensor_parallel} is not accepted: give 1 or more")
    before, after = (math.ceil(size / tensor_parallel) for size in model.attention)
    width = math.ceil(model.moe_intermediate_size / tensor_parallel / TILE) * TILE
    return LayerSizes(model.shape(block_size, dtype), width, (before, after))


class Step:
    """Layers of those sizes on `device`, for batches of up to max_tokens."""

    def __init__(
        self, sizes: LayerSizes, max_tokens: int, device: torch.device, seed: int = 0
    ) -> None:
        shape = sizes.shape
        self.sizes = sizes
        generator = torch.Generator(device).manual_seed(seed)
        dtype = getattr(torch, shape.dtype)

        def random(*dims: int) -> Tensor:
            found = torch.empty(dims, dtype=dtype, device=device)
            return found.normal_(0.0, dims[-1] ** -0.5, generator=generator)

        def of_experts(*dims: int) -> Tensor:
            # On the CPU nothing multiplies by these: one number stands for all of them.
            on_cpu = device.type == "cpu"
            return torch.zeros(1, dtype=dtype).expand(dims) if on_cpu else random(*dims)

        dim, experts = shape.model_dim, shape.num_experts
        self.x = torch.randn((max_tokens, dim), generator=generator, device=device).to(dtype)
        self.norm = torch.ones(dim, dtype=dtype, device=device)
        self.qkv = random(sizes.attention[0], dim)
        self.project = random(dim, sizes.attention[1])
        self.router = random(experts, dim)
        # Trained routers concentrate: some experts are a priori more likely than others.
        ranks = torch.randperm(experts, generator=generator, device=device) + 1
        self.popularity = -0.5 * torch.log(ranks.float())
        self.w13 = of_experts(experts, 2 * sizes.width, dim)
        self.w2 = of_experts(experts, dim, sizes.width)

    def run(self, num_tokens: int, layers: int, experts: Experts) -> Tensor:
        """So many layers for one batch; nothing waits for the device."""
        topk, dim = self.sizes.shape.topk, self.sizes.shape.model_dim
        x = self.x[:num_tokens]
        for _ in range(layers):
            wide = F.linear(F.rms_norm(x, (dim,), self.norm), self.qkv)
            x = x + F.linear(wide[:, : self.sizes.attention[1]], self.project)
            h = F.rms_norm(x, (dim,), self.norm)
            scores = torch.softmax(F.linear(h, self.router).float() + self.popularity, dim=-1)
            weights, ids = scores.topk(topk, dim=-1)
            x = x + experts(h, weights, ids.int(), self.w13, self.w2)
        return x
