"""Arguments of a call at the seam -> its Key, and a SeenCall to keep."""

import contextvars
from collections.abc import Mapping
from numbers import Real
from typing import Any

from adaptive_moe.engines.seam import Layer
from adaptive_moe.engines.seen import TRUE, Key, SeenCall
from adaptive_moe.kernels.aiter import BUFFERS, KNOWN, LEADING, UNSORTED, ConfigCall
from adaptive_moe.kernels.call import Buffer


class OddCallError(Exception):
    """The arguments of a call are none that we can read."""


def read(named: Mapping[str, Any], only_device: int | None) -> tuple[Key, int, bool]:
    """The key of a call, its token count, and whether it leaves nothing to choose. `named` are all
    that the wrapper binds, in order. The same key as the wrapper's own; OddCallError."""
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


def extras(layer: Layer, named: Mapping[str, Any], call: Any) -> dict[str, Any]:
    """The arguments after the ninth that reach the seam. `call` as in RareCalls.answer."""
    after = list(named)[len(LEADING) :]
    if call is None:
        return {name: named[name] for name in after}
    args, kwargs = call[:2]
    given = {*kwargs, *layer.names[: len(args)]}
    return {name: named[name] for name in after if name in given}


def seen_call(
    key: Key,
    num_tokens: int,
    named: Mapping[str, Any],
    passed: Mapping[str, Any],
    asked: tuple[tuple[Any, ...], dict[str, Any]] | None,
) -> SeenCall:
    """Everything to make the call again: passed are its extras, asked is how the chooser was asked
    just before. Holds references and allocates nothing on the device."""
    import torch

    device = named["topk_ids"].device
    args, kwargs = asked or ((), {})
    return SeenCall(
        key=key,
        num_tokens=num_tokens,
        device=device,
        baseline=named["dispatch_policy"],
        expert_mask=named["expert_mask"],
        extras={
            name: Buffer(tuple(value.shape[1:]), value.dtype)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in passed.items()
        },
        config=ConfigCall(args[1:], tuple(kwargs.items())) if args else None,
        context=contextvars.copy_context(),
        grad=torch.is_grad_enabled(),
        inference=torch.is_inference_mode_enabled(),
        stream=None if device.type == "cpu" else torch.cuda.current_stream(device),
    )
