"""How a call reached AITER's seam: all of it but its batch and its shape."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from adaptive_moe.kernels.aiter import KNOWN

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Buffer:
    """In place of a tensor of the batch, which is not kept: one such as this, a row a token."""

    row: tuple[int, ...]
    dtype: "torch.dtype"

    def make(self, num_tokens: int, device: "torch.device") -> "torch.Tensor":
        import torch

        return torch.empty((num_tokens, *self.row), dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Live:
    """How a call reached AITER's seam, but for its batch and its shape.

    seam         the unwrapped function: measuring it must neither be counted nor steered
    baseline     the policy the caller passes
    extras       the arguments after the ninth as passed, by name
    rounded      whether the baseline rounds sorted_ids up to whole blocks; None: not known
    num_outputs  how many tensors it returned
    """

    module: ModuleType
    seam: Callable[..., Any]
    device: "torch.device"
    baseline: Any
    extras: Mapping[str, Any]
    rounded: bool | None
    num_outputs: int

    @property
    def local_ids(self) -> bool:
        return bool(self.extras.get("return_local_topk_ids", False))

    @property
    def is_known(self) -> bool:
        """Do we know every argument it was called with?"""
        buffers = any(isinstance(value, Buffer) for value in self.extras.values())
        return not buffers and set(KNOWN).issuperset(self.extras)

    def backend(self, policy: object) -> str:
        """Who really sorts under that policy: ck, the only one at first and the default until 2026,
        opus, or flydsl. As AITER decides at each call, by flags of its module."""
        flags = vars(self.module)
        ck = flags.get("_USE_CK_MOE_SORTING")
        if ck is None and not flags.get("_USE_OPUS_MOE_SORTING") and not self.local_ids:
            return "ck"
        if ck and not self.local_ids:
            return "ck"
        available = flags.get("is_flydsl_available")
        asked = not ck and flags.get("_USE_FLYDSL_MOE_SORTING") and policy == 0
        if asked and not self.local_ids and available is not None and available():
            return "flydsl"
        return "opus"


def is_rounded(
    outputs: Sequence[Any], num_tokens: int, topk: int, num_experts: int, block_size: int
) -> bool | None:
    """Is sorted_ids, the first output, rounded up to whole blocks? None where this batch cannot
    tell, or it has another length."""
    from adaptive_moe.kernels.contract import buffer_length  # imports torch

    call = (num_tokens, topk, num_experts, block_size)
    exact, rounded = (buffer_length(*call, rounded=whole) for whole in (False, True))
    length: int = outputs[0].shape[0]
    return {exact: False, rounded: True}.get(length) if exact != rounded else None
