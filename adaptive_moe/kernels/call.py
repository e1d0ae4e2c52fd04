"""A call of AITER's sort as it was seen: what tells it from others, and how to make it again."""

import contextvars
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from adaptive_moe.kernels import policy_name
from adaptive_moe.kernels.aiter import KNOWN, ConfigCall

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")

# Kept in a CallKey in place of a True, which as a part of a tuple would be the same as 1.
TRUE = "True"


class CallKey(NamedTuple):
    """What tells the calls of one table from others, as the call spells it. Plain tuples compare
    equal to it.

    accumulate  masked, or accumulate as passed: either makes moe_buf [num_tokens, model_dim]
    local_ids   return_local_topk_ids
    more        values of arguments that later AITERs have, and names of buffers that are given
    baseline    the policy the caller passes, or TRUE for a True
    device      the GPU's index; -1 on the CPU. Where the process sees one only, that one
    """

    num_experts: int
    topk: int
    model_dim: int
    dtype: "torch.dtype"
    block_size: int
    has_expert_mask: bool
    has_num_local_tokens: bool
    accumulate: bool
    local_ids: bool
    more: tuple[Any, ...]
    baseline: Any
    device: int

    @property
    def baseline_name(self) -> str:
        """As a candidate: `policy 0`."""
        return policy_name(self.baseline)

    def describe(self) -> str:
        return (
            f"{self.num_experts} experts, topk {self.topk}, dim {self.model_dim}, "
            f"{str(self.dtype).removeprefix('torch.')}, block {self.block_size}"
            + (f", cuda:{self.device}" if self.device > 0 else "")
        )


@dataclass(frozen=True)
class Buffer:
    """In place of a tensor of the batch, which is not kept: one such as this, a row a token."""

    row: tuple[int, ...]
    dtype: "torch.dtype"

    def make(self, num_tokens: int, device: "torch.device") -> "torch.Tensor":
        import torch

        return torch.empty((num_tokens, *self.row), dtype=self.dtype, device=device)


@dataclass(frozen=True)
class SortCall:
    """A call as it reached AITER's seam, without its batch. References only, nothing allocated.

    num_tokens   the largest batch with that key; the rest is of the first call
    module       AITER's; seam: its unwrapped function, which is what measuring calls
    baseline     the policy as the caller passes it: 0, 2, True
    mask         returns the expert mask, or None once that is gone; None for a call without one
    extras       every argument after the ninth by name, as passed; the batch's tensors as Buffer
    config       how AITER's chooser of block sizes was asked just before, if it was
    context      the caller's ContextVars, which some sorts read. What they hold lives as long
    grad, inference  the modes of torch it was called in
    stream       current on that device; None on the CPU
    rounded      whether the baseline rounds sorted_ids up to whole blocks; None: not known
    num_outputs  how many tensors the baseline returned
    """

    key: CallKey
    num_tokens: int
    module: ModuleType
    seam: Callable[..., Any]
    device: "torch.device"
    baseline: Any
    mask: "Callable[[], torch.Tensor | None] | None"
    extras: Mapping[str, Any]
    config: ConfigCall | None
    context: contextvars.Context
    grad: bool
    inference: bool
    stream: "torch.cuda.Stream | None"
    rounded: bool | None = None
    num_outputs: int = 0

    @property
    def expert_mask(self) -> "torch.Tensor | None":
        return None if self.mask is None else self.mask()

    @property
    def is_gone(self) -> bool:
        """Has the expert mask gone, and with it the layer that made this call?"""
        return self.mask is not None and self.mask() is None

    def without_keeping_mask(self) -> "SortCall":
        """The same call, whose expert mask lives as long as its model keeps it."""
        mask = self.expert_mask
        return self if mask is None else replace(self, mask=weakref.ref(mask))

    @property
    def local_ids(self) -> bool:
        return bool(self.extras.get("return_local_topk_ids", False))

    @property
    def is_known(self) -> bool:
        """Do we know every argument it was called with?"""
        buffers = any(isinstance(value, Buffer) for value in self.extras.values())
        return not buffers and set(KNOWN).issuperset(self.extras)

    def backend(self, policy: object) -> str:
        """The backend that really sorts under that policy: ck, the only one at first and the
        default until 2026, opus, or flydsl. AITER decides so at each call, by flags of its
        module."""
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

    def as_called(self, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Run a function where this call ran: in a copy of its context, on its device and stream,
        in its grad and inference mode. Everything is afterwards as it was."""
        return self.context.copy().run(lambda: self._in_place(function, *args, **kwargs))

    def _in_place(self, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        import torch

        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            if self.device.type != "cpu":
                stack.enter_context(torch.cuda.device(self.device))
                # Its own work on that stream comes first, as it does for the calls.
                stack.enter_context(torch.cuda.stream(self.stream))
            return function(*args, **kwargs)
