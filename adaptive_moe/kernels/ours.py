"""Our Triton sort as candidates: where it runs, it knows every call but one for local ids."""

import functools
from collections.abc import Iterator
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
    try:
        import triton

        from adaptive_moe.kernels.triton_sort import moe_sorting
    except ImportError:
        return
    source = digest(sorted(Path(__file__).parent.glob("triton_*.py")))
    for name, policy in PHASES.items():
        yield OtherSort(
            name,
            functools.partial(_sort, moe_sorting, policy, live.rounded),
            f"{name} {source} triton {triton.__version__}",
        )


def _sort(moe_sorting: Any, policy: int, rounded: bool, *leading: Any) -> Any:
    *arguments, accumulate = leading
    return moe_sorting(*arguments, policy, accumulate=accumulate, rounded=rounded)
