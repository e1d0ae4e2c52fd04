"""Key: what tells the calls of one table from others, and how it is read off a call's arguments.

The wrapper spells the same key in its own source (wrapper.py), because a call of another function
would cost it as much as the look-up.
"""

from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

from adaptive_moe.kernels import policy_name
from adaptive_moe.kernels.aiter import BUFFERS, KNOWN, LEADING, UNSORTED

if TYPE_CHECKING:
    import torch

# Kept in a Key in place of a True, which as a part of a tuple would be the same as 1.
TRUE = "True"


class Key(NamedTuple):
    """What tells the calls of one table from others, as the call spells it. Plain tuples compare
    equal to it, and are what the hot path builds.

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


class OddCallError(Exception):
    """The arguments of a call are none that we can read."""


def read_key(named: Mapping[str, Any], only_device: int | None) -> tuple[Key, int, bool]:
    """The key of a call, its token count, and whether it leaves nothing to choose. `named` are all
    that the wrapper binds, in order. OddCallError."""
    import torch

    try:
        ids, asked = named["topk_ids"], named["dispatch_policy"]
        num_tokens, topk = ids.shape
        passed = not num_tokens or any(named.get(name) for name in UNSORTED)
        masked = named["expert_mask"] is not None
        unknown = [value for n, value in list(named.items())[len(LEADING) :] if n not in KNOWN]
        buffers = [name for name in BUFFERS if named.get(name) is not None]
        key = Key(
            num_experts=named["num_experts"],
            topk=topk,
            model_dim=named["model_dim"],
            dtype=named["moebuf_dtype"],
            block_size=named["block_size"],
            has_expert_mask=masked,
            has_num_local_tokens=named["num_local_tokens"] is not None,
            accumulate=masked or named.get("accumulate", True),
            local_ids=named.get("return_local_topk_ids", False),
            more=(*unknown, *buffers),
            baseline=TRUE if asked is True else asked,
            device=ids.get_device() if only_device is None else only_device,
        )
        hash(key)
    # Whatever these objects are, they may raise anything.
    except Exception as error:
        raise OddCallError from error
    numbers = (num_tokens, topk, key.num_experts, key.model_dim, key.block_size, asked)
    is_plain = (
        type(ids) is torch.Tensor
        and not ids.is_meta
        and all(isinstance(number, Real) for number in numbers)
        and isinstance(key.dtype, torch.dtype)
        # A tensor is hashed by identity: each call would be a key of its own.
        and not any(isinstance(value, torch.Tensor) for value in (*key, *key.more))
    )
    if not is_plain:
        raise OddCallError
    return key, num_tokens, passed
