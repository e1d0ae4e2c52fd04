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

    shared_experts  those beside the routed ones; None where the source does not say
    shared_width    columns of a shared expert's hidden activations; 0: as those of a routed one
    quantisation    of the weights, such as quark or compressed-tensors; empty for none, or unknown

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
    shared_experts: int | None = 0
    moe_intermediate_size: int = 0
    attention: tuple[int, ...] = ()
    shared_width: int = 0
    quantisation: str = ""

    def shape(self, block_size: int = 32, dtype: str | None = None) -> SortingShape:
        return SortingShape(
            self.num_experts, self.topk, self.model_dim, dtype or self.dtype, block_size
        )

    def fused(self) -> "Model":
        """With the shared experts sorted among the routed ones, each token going to all of them.
        ModelError where the model has none, or some of another width."""
        if self.shared_experts is None:
            raise ModelError(
                f"{self.name}: {self.source} does not say whether it has shared experts: leave "
                "--fuse-shared out, or give their sum as --experts, --topk and --hidden"
            )
        if not self.shared_experts:
            raise ModelError(
                f"{self.name} ({self.source}) has no shared experts, so there is nothing to fuse: "
                "leave --fuse-shared out"
            )
        widths = {self.shared_width, self.moe_intermediate_size} - {0}
        if self.shared_width and len(widths) > 1:
            raise ModelError(
                f"{self.name} ({self.source}) has a shared expert of another width "
                f"({self.shared_width}) than the routed ones ({self.moe_intermediate_size}), so "
                "that one sort cannot serve both: leave --fuse-shared out"
            )
        return replace(
            self,
            name=self.name + FUSED,
            num_experts=self.num_experts + self.shared_experts,
            topk=self.topk + self.shared_experts,
            shared_experts=0,
        )
