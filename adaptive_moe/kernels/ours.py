"""Our Triton sort as candidates: where it runs, it knows every call but one for local ids."""

import functools
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_moe.kernels.identity import digest
from adaptive_moe.kernels.sorts import OtherSort

if TYPE_CHECKING:
    from adaptive_moe.kernels.call import SortCall
    from adaptive_moe.shape import SortingShape

BLOCK_SIZES = range(16, 257, 16)
PHASES = {"triton one-shot": 1, "triton multi-phase": 2}


def sorts(live: "SortCall", shape: "SortingShape") -> Iterator[OtherSort]:
    # A sixth result would be the local ids. Experts and topk of a SortingShape always fit.
    if live.device.type == "cpu" or live.rounded is None or live.num_outputs != 5:
        return
    if shape.block_size not in BLOCK_SIZES:
        return
    if find_spec("triton") is None:
        return
    # Loading Triton takes half a second, which a start saves where its stored table needs none.
    source = digest(sorted(Path(__file__).parent.glob("triton_*.py")))
    for name, policy in PHASES.items():
        call = functools.partial(_sort, policy, live.rounded)
        identity = f"{name} {source} triton {_triton_version()}"
        yield OtherSort(name, call, identity, takes_padding=True)


def _sort(policy: int, rounded: bool, *leading: Any) -> Any:
    *arguments, accumulate = leading
    return _moe_sorting()(*arguments, policy, accumulate=accumulate, rounded=rounded)


@functools.cache
def _moe_sorting() -> Callable[..., Any]:
    from adaptive_moe.kernels.triton_sort import moe_sorting

    return moe_sorting


@functools.cache
def _triton_version() -> str:
    for distribution in ("triton", "pytorch-triton-rocm", "pytorch-triton"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"
