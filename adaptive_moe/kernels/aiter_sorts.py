"""AITER's other backends as candidates, called past its flags: another thread may read those.

CK and Opus take the backend as an argument of `_moe_sorting_impl`, since v0.1.11; FlyDSL's sort is
called with a workspace of its own: AITER keeps one a device and replaces it by a larger one, which
a graph captured with the smaller one would go on writing to.

Read in ROCm/aiter v0.1.11 to main of 2026-08-22.
"""

import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_moe.kernels.aiter import IMPLEMENTATION
from adaptive_moe.kernels.identity import digest
from adaptive_moe.kernels.sorts import OtherSort

if TYPE_CHECKING:
    from adaptive_moe.kernels.call import SortCall
    from adaptive_moe.shape import SortingShape

_TEN = (
    *("topk_ids", "topk_weights", "num_experts", "model_dim", "moebuf_dtype", "block_size"),
    *("expert_mask", "num_local_tokens", "dispatch_policy", "use_opus"),
)
_KNOWN = {*_TEN, "return_local_topk_ids", "accumulate", "output_aux", "output"}
_FLYDSL = "aiter.ops.flydsl.kernels.moe_sorting_kernel"
# In the source of a FlyDSL that reads num_local_tokens on the device; before, the host waited.
_ON_DEVICE = "has_local_tokens"


def sorts(seen: "SortCall", shape: "SortingShape") -> Iterator[OtherSort]:
    if seen.num_outputs != 5 + seen.local_ids:
        return
    yield from _ck_and_opus(seen)
    yield from _flydsl(seen, shape)


def _ck_and_opus(seen: "SortCall") -> Iterator[OtherSort]:
    standing = getattr(seen.module, IMPLEMENTATION, None)
    if standing is None:
        return
    implementation = inspect.unwrap(standing)
    names = tuple(inspect.signature(implementation).parameters)
    if names[: len(_TEN)] != _TEN or not _KNOWN.issuperset(names):
        return
    options: dict[str, Any] = {}
    if seen.local_ids:
        options["return_local_topk_ids"] = True
    takes_accumulate = "accumulate" in names
    # Without that parameter it always accumulates, as then does whoever calls it.
    call = functools.partial(_implementation, implementation, takes_accumulate)
    if not seen.local_ids and has_ck(Path(seen.module.__file__ or "").parent):
        yield OtherSort("ck", functools.partial(call, False, options), "ck")
    # Where no function replaces it, Opus under policy 0 is AITER's default already.
    if seen.backend(0) != "opus" or standing is not implementation:
        yield OtherSort("opus", functools.partial(call, True, options), "opus")


def _implementation(
    implementation: Callable[..., Any],
    takes_accumulate: bool,
    use_opus: bool,
    options: Mapping[str, Any],
    *leading: Any,
) -> Any:
    *arguments, accumulate = leading
    if takes_accumulate:
        return implementation(*arguments, 0, use_opus, accumulate=accumulate, **options)
    return implementation(*arguments, 0, use_opus, **options)


def has_ck(package: Path, environ: Mapping[str, str] = os.environ) -> bool:
    """Can this AITER sort with CK: is that module built, or are there sources to build it from?
    Wheels without CK exist."""
    if any(package.glob("jit/module_moe_sorting.*so")):
        return True
    named = environ.get("CK_DIR")
    roots = [package.parent / "aiter_meta" / "3rdparty", package.parent / "3rdparty"]
    folders = [Path(named)] if named else [root / "composable_kernel" for root in roots]
    header = "example/ck_tile/13_moe_sorting/moe_sorting_api.hpp"
    return any((folder / header).is_file() for folder in folders)


def _flydsl(seen: "SortCall", shape: "SortingShape") -> Iterator[OtherSort]:
    available = getattr(seen.module, "is_flydsl_available", None)
    if available is None or not available() or seen.backend(0) == "flydsl":
        return
    if seen.local_ids or seen.rounded is None:
        return
    try:
        kernels = importlib.import_module(_FLYDSL)
    except ImportError:
        return
    file = Path(kernels.__file__ or "")
    if shape.num_local_tokens and not (file.is_file() and _ON_DEVICE in file.read_text("utf-8")):
        return
    call = functools.partial(_sort_by_flydsl, kernels.moe_sorting_flydsl, seen.rounded)
    source = digest([file]) if file.is_file() else ""
    yield OtherSort("flydsl", call, f"flydsl {source}")


def _sort_by_flydsl(
    sort: Callable[..., Any],
    rounded: bool,
    topk_ids: Any,
    topk_weights: Any,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: Any,
    block_size: int,
    expert_mask: Any,
    num_local_tokens: Any,
    accumulate: bool,
) -> Any:
    import torch

    from adaptive_moe.kernels.contract import buffer_length

    num_tokens, topk = topk_ids.shape
    device = topk_ids.device
    length = buffer_length(num_tokens, topk, num_experts, block_size, rounded=rounded)
    blocks = -(-length // block_size)
    shape = (num_tokens, model_dim) if accumulate or expert_mask is not None else (0, 0)
    outputs = (
        torch.empty(length, dtype=torch.int32, device=device),
        torch.empty(length, dtype=torch.float32, device=device),
        torch.empty(blocks, dtype=torch.int32, device=device),
        torch.empty(2, dtype=torch.int32, device=device),
        torch.empty(shape, dtype=moebuf_dtype, device=device),
    )
    # Without a workspace it makes one in the call, of the graph's pool where one is captured.
    sort(
        *(topk_ids, topk_weights, *outputs, num_experts, block_size),
        *(expert_mask, num_local_tokens, None),
    )
    return outputs
