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
    if not model.moe_intermediate_size or not model.attention:
        raise ValueError(
            f"model {model.name!r} has no step sizes: give one of calibration/models.toml, or add "
            "moe_intermediate_size and attention there"
        )
    wide, back = (-(-size // tensor_parallel) for size in model.attention)
    # Whole tiles, as engines pad them.
    width = math.ceil(model.moe_intermediate_size / tensor_parallel / 64) * 64
    return LayerSizes(model.shape(block_size, dtype), width, (wide, min(back, wide)))


class Step:
    """`layers` layers of those sizes on `device`, for batches of up to max_tokens."""

    def __init__(
        self, sizes: LayerSizes, layers: int, max_tokens: int, device: torch.device, seed: int = 0
    ) -> None:
        shape = sizes.shape
        self.sizes, self.layers, self.device = sizes, layers, device
        generator = torch.Generator(device).manual_seed(seed)
        dtype = getattr(torch, shape.dtype)

        def random(*dims: int) -> Tensor:
            found = torch.empty(dims, dtype=dtype, device=device)
            return found.normal_(0.0, dims[-1] ** -0.5, generator=generator)

        dim, experts = shape.model_dim, shape.num_experts
        self.x = torch.randn((max_tokens, dim), generator=generator, device=device).to(dtype)
        self.norm = torch.ones(dim, dtype=dtype, device=device)
        self.qkv = random(sizes.attention[0], dim)
        self.project = random(dim, sizes.attention[1])
        self.router = random(experts, dim)
        # Trained routers concentrate: expert popularity falls off as 1/rank.
        ranks = torch.randperm(experts, generator=generator, device=device) + 1
        self.popularity = -0.5 * torch.log(ranks.float())
        self.w13 = random(experts, 2 * sizes.width, dim)
        self.w2 = random(experts, dim, sizes.width)

    def run(self, num_tokens: int, experts: Experts) -> Tensor:
        """One step of a batch; nothing waits for the device."""
        topk, dim = self.sizes.shape.topk, self.sizes.shape.model_dim
        x = self.x[:num_tokens]
        for _ in range(self.layers):
            wide = F.linear(F.rms_norm(x, (dim,), self.norm), self.qkv)
            x = x + F.linear(wide[:, : self.sizes.attention[1]], self.project)
            h = F.rms_norm(x, (dim,), self.norm)
            scores = torch.softmax(F.linear(h, self.router).float() + self.popularity, dim=-1)
            weights, ids = scores.topk(topk, dim=-1)
            x = x + experts(h, weights, ids.int(), self.w13, self.w2)
        return x
