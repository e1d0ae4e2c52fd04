"""Where a step's sort is called: AITER's own fused_moe, or a module of ours with the same seam."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from adaptive_moe.cli.bench.layer import Experts, LayerSizes
from adaptive_moe.kernels import load_kernel
from adaptive_moe.kernels.aiter import MODULE, find_aiter


@dataclass(frozen=True)
class Seam:
    """experts(sizes, policy): a layer's experts whose caller passes that policy."""

    """Where the sort is called: AITER's own fused_moe, or a module of ours with the same seam."""

    name: str
    module: ModuleType
    device: torch.device
    dtype: str
    experts: Callable[[LayerSizes, int], Experts]


def open_seam(kernel: str) -> Seam:
    """The seam of `aiter`, `triton` or `cpu`; `auto` is the first of these that can run here."""
    gpu = torch.cuda.is_available()
    if kernel == "auto":
        kernel = "aiter" if find_aiter().problem is None else "triton" if gpu else "cpu"
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    if kernel == "aiter":
        module = import_module(MODULE)
        return Seam("aiter", module, device, "bfloat16", partial(_aiter, module))
    load_kernel(kernel)  # says why it cannot run here
    module = ModuleType("adaptive_moe_seam")
    if kernel == "triton":
        from adaptive_moe.kernels.triton_sort import moe_sorting

        module.moe_sorting = _as_seam(moe_sorting)  # type: ignore[attr-defined]
        # Accumulating in bfloat16 needs atomics that not every GPU has; the bytes are the same.
        return Seam(
            "triton", module, device, "float16", lambda sizes, p: _grouped(module, sizes, p)
        )
    from adaptive_moe.kernels import cpu_sort

    module.moe_sorting = _as_seam(cpu_sort.moe_sorting)  # type: ignore[attr-defined]
    cpu = torch.device("cpu")
    return Seam("cpu", module, cpu, "float32", partial(_sorted_only, module))


def _as_seam(sort: Callable[..., Any]) -> Callable[..., Any]:
    """A sort of ours behind the parameters of AITER's seam."""

    def moe_sorting(
        topk_ids: Any,
        topk_weights: Any,
        num_experts: Any,
        model_dim: Any,
        moebuf_dtype: Any,
        block_size: Any = 32,
        expert_mask: Any = None,
        num_local_tokens: Any = None,
        dispatch_policy: Any = 0,
    ) -> Any:
        return sort(
            topk_ids,
            topk_weights,
            num_experts,
            model_dim,
            moebuf_dtype,
            block_size,
            expert_mask,
            num_local_tokens,
            dispatch_policy,
        )

    return moe_sorting


def _aiter(module: ModuleType, sizes: LayerSizes, policy: int) -> Experts:
    def experts(x: Any, weights: Any, ids: Any, w13: Any, w2: Any) -> Any:
        return module.fused_moe(x, w13, w2, weights, ids, moe_sorting_dispatch_policy=policy)

    return experts


def _grouped(module: ModuleType, sizes: LayerSizes, policy: int) -> Experts:
    from adaptive_moe.cli.bench import grouped_gemm

    shape = sizes.shape

    def experts(x: Any, weights: Any, ids: Any, w13: Any, w2: Any) -> Any:
        outputs = module.moe_sorting(
            ids, weights, shape.num_experts, shape.model_dim, x.dtype, shape.block_size,
            None, None, policy,
        )  # fmt: skip
        return grouped_gemm.experts(x, outputs, w13, w2, shape.block_size)

    return experts


def _sorted_only(module: ModuleType, sizes: LayerSizes, policy: int) -> Experts:
    """Without expert GEMMs: on the CPU they would hide everything, and a step is a rehearsal."""
    shape = sizes.shape

    def experts(x: Any, weights: Any, ids: Any, w13: Any, w2: Any) -> Any:
        return module.moe_sorting(
            ids, weights, shape.num_experts, shape.model_dim, x.dtype, shape.block_size,
            None, None, policy,
        )[4]  # fmt: skip

    return experts
