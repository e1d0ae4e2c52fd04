"""SortingShape: everything but the token count that changes what a sort costs."""

from dataclasses import dataclass

DTYPES = ("bfloat16", "float16", "float32")
MAX_EXPERTS = 1024
MAX_TOPK = 32
MAX_BLOCK_SIZE = 1024


@dataclass(frozen=True)
class SortingShape:
    """What one MoE layer asks of the sort, apart from num_tokens.

    num_experts   experts the router chooses from (global, with fused shared experts counted)
    topk          experts a token
    model_dim     columns of moe_buf, which the sort zeroes
    dtype         of moe_buf: bfloat16, float16 or float32
    block_size    rows of one expert-GEMM tile; each expert's group is padded to a multiple
    local_experts expert parallelism: experts this rank keeps (expert_mask), or num_experts
    num_local_tokens  True where the row count is a capacity and the device holds the real count
    accumulate    False where the caller reduces itself and moe_buf is an empty placeholder

    Raises ValueError naming the field, its value and what is accepted.
    """

    num_experts: int
    topk: int
    model_dim: int
    dtype: str = "bfloat16"
    block_size: int = 32
    local_experts: int | None = None
    num_local_tokens: bool = False
    accumulate: bool = True

    def __post_init__(self) -> None:
        _check_range("num_experts", self.num_experts, 1, MAX_EXPERTS)
        _check_range("topk", self.topk, 1, MAX_TOPK)
        _check_range("model_dim", self.model_dim, 1, 1 << 20)
        _check_range("block_size", self.block_size, 1, MAX_BLOCK_SIZE)
        if self.topk > self.num_experts:
            raise ValueError(
                f"topk={self.topk} is more than num_experts={self.num_experts}: "
                "a token goes to topk different experts, so give topk <= num_experts"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not accepted: give {', '.join(DTYPES)}")
        if self.local_experts is not None:
            _check_range("local_experts", self.local_experts, 1, self.num_experts)

    @property
    def has_expert_mask(self) -> bool:
        return self.local_experts is not None

    def describe(self) -> str:
        """One short phrase for logs, such as `256 experts, topk 8, dim 7168, block 32`."""
        parts = [
            f"{self.num_experts} experts, topk {self.topk}, dim {self.model_dim}",
            f"{self.dtype}, block {self.block_size}",
        ]
        if self.local_experts is not None:
            parts.append(f"{self.local_experts} local experts")
        if self.num_local_tokens:
            parts.append("padded rows")
        if not self.accumulate:
            parts.append("no moe_buf")
        return ", ".join(parts)


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name}={value!r} is not accepted: give an integer from {low} to {high}")
