"""Reads a call's arguments: its key, and everything that is needed to make it again.

The wrapper spells the same key in its own source (wrapper.py), because a call of another function
would cost it as much as the look-up.
"""

import contextvars
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

from adaptive_moe.kernels.aiter import BUFFERS, KNOWN, LEADING, UNSORTED, ConfigCall
from adaptive_moe.kernels.call import TRUE, Buffer, CallKey, SortCall

if TYPE_CHECKING:
    from adaptive_moe.hook.wrapped_module import WrappedModule


class UnreadableCallError(Exception):
    """The arguments of a call are none that we can read."""


def read_key(named: Mapping[str, Any], only_device: int | None) -> tuple[CallKey, int, bool]:
    """The key of a call, its token count, and whether it leaves nothing to choose. `named` are all
    that the wrapper binds, in order. UnreadableCallError."""
    import torch

    try:
        ids, policy = named["topk_ids"], named["dispatch_policy"]
        num_tokens, topk = ids.shape
        passed = not num_tokens or any(named.get(name) for name in UNSORTED)
        masked = named["expert_mask"] is not None
        unknown = [value for n, value in list(named.items())[len(LEADING) :] if n not in KNOWN]
        buffers = [name for name in BUFFERS if named.get(name) is not None]
        key = CallKey(
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
            baseline=TRUE if policy is True else policy,
            device=ids.get_device() if only_device is None else only_device,
        )
        hash(key)
    # Whatever these objects are, they may raise anything.
    except Exception as error:
        raise UnreadableCallError from error
    numbers = (num_tokens, topk, key.num_experts, key.model_dim, key.block_size, policy)
    is_plain = (
        type(ids) is torch.Tensor
        and not ids.is_meta
        and all(isinstance(number, Real) for number in numbers)
        and isinstance(key.dtype, torch.dtype)
        # A tensor is hashed by identity: each call would be a key of its own.
        and not any(isinstance(value, torch.Tensor) for value in (*key, *key.more))
    )
    if not is_plain:
        raise UnreadableCallError
    return key, num_tokens, passed


def sort_call(
    wrapped: "WrappedModule", key: CallKey, num_tokens: int, named: Mapping[str, Any], made: Any
) -> SortCall:
    """The call that is being made, of these arguments by name. made: as args and kwargs, where it
    reaches the seam so and not by name."""
    import torch

    device, mask = named["topk_ids"].device, named["expert_mask"]
    args, kwargs = wrapped.latest_config or ((), {})
    extras = {
        name: Buffer(tuple(value.shape[1:]), value.dtype)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in _extras(wrapped, named, made).items()
    }
    return SortCall(
        key=key,
        num_tokens=num_tokens,
        module=wrapped.module,
        seam=wrapped.seam,
        device=device,
        baseline=named["dispatch_policy"],
        mask=None if mask is None else lambda: mask,
        extras=extras,
        config=ConfigCall(args[1:], tuple(kwargs.items())) if args else None,
        context=contextvars.copy_context(),
        grad=torch.is_grad_enabled(),
        inference=torch.is_inference_mode_enabled(),
        stream=None if device.type == "cpu" else torch.cuda.current_stream(device),
    )


def is_rounded(outputs: Sequence[Any], num_tokens: int, key: CallKey) -> bool | None:
    """Is sorted_ids, the first output, rounded up to whole blocks? None where this batch cannot
    tell, or it has another length."""
    from adaptive_moe.kernels.contract import buffer_length  # imports torch

    call = (num_tokens, key.topk, key.num_experts, key.block_size)
    exact, rounded = (buffer_length(*call, rounded=whole) for whole in (False, True))
    length: int = outputs[0].shape[0]
    return {exact: False, rounded: True}.get(length) if exact != rounded else None


def _extras(wrapped: "WrappedModule", named: Mapping[str, Any], made: Any) -> dict[str, Any]:
    """The arguments after the ninth that reach the seam."""
    after = list(named)[len(LEADING) :]
    if made is None:
        return {name: named[name] for name in after}
    args, kwargs = made[:2]
    given = {*kwargs, *wrapped.names[: len(args)]}
    return {name: named[name] for name in after if name in given}
