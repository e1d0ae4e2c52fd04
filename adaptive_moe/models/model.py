"""One model's sort, and what a model-like step needs to know of it besides."""

from dataclasses import dataclass, replace

from adaptive_moe.shape import SortingShape

# Engines may append shared experts to the routed ones, so that one sort serves both.
FUSED = "-fused"


class ModelError(ValueError):
    """The model or config gives no sorting shape; the text says why and what would work."""


@dataclass(frozen=True)
class Model:
    """One public model's sort; `source` is where its numbers were read, dtype that of moe_buf.

    For a model-like step (calibration/), and 0 or empty where that is not known:
    moe_intermediate_size  columns of one expert's hidden activations
    attention  width of the query, key and value projections together, and of what is projected back
    """

    name: str
    num_experts: int
    topk: int
    model_dim: int
    source: str
    dtype: str = "bfloat16"
    shared_experts: int = 0
    moe_intermediate_size: int = 0
    attention: tuple[int, ...] = ()

    def shape(self, block_size: int = 32, dtype: str | None = None) -> SortingShape:
        return SortingShape(
            self.num_experts, self.topk, self.model_dim, dtype or self.dtype, block_size
        )

    def fused(self) -> "Model":
        """With the shared experts sorted among the routed ones, each token going to all of them.
        ModelError where the model has none."""
        if not self.shared_experts:
            raise ModelError(
                f"{self.name} ({self.source}) names no shared experts, so there is nothing to "
                "fuse: leave --fuse-shared out"
            )
        return replace(
            self,
            name=self.name + FUSED,
            num_experts=self.num_experts + self.shared_experts,
            topk=self.topk + self.shared_experts,
            shared_experts=0,
        )
