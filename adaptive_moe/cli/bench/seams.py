"""Where a step's sort is called: AITER's own fused_moe, or a module of ours with the same seam."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from adaptive_moe.cli.bench.layer import Experts
from adaptive_moe.cli.kernel import choose, load
from adaptive_moe.engines.hook import AiterHook
from adaptive_moe.kernels import SortKernel
from adaptive_moe.kernels.aiter import MODULE
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.settings import Mode, read_settings
from adaptive_moe.shape import SortingShape
from adaptive_moe.tuning.routing import Routing, default_mask, route, sorting_inputs


@dataclass(frozen=True)
class Seam:
    """name: of the kernel behind it; experts(shape, policy): a layer's experts, whose caller
    passes that policy to the sort of `module`."""

    name: str
    module: ModuleType
    device: torch.device
    dtype: str
    experts: Callable[[SortingShape, int], Experts]

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def open_seam(kernel: str) -> Seam:
    """The seam of `aiter`, `triton` or `cpu`; `auto` is the first of these that is usable.

    Raises KernelUnavailableError saying why one cannot, or what importing AITER raises.
    """
    name, _ = choose(kernel)
    if name == "aiter":
        gpu = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        module = import_module(MODULE)
        return Seam("aiter", module, device, "bfloat16", lambda _, p: _fused_moe(module, p))
    return seam_of(name)


def seam_of(kernel: str, sort: Callable[..., Any] | None = None) -> Seam:
    """A module with AITER's seam in front of the sort of `triton` or `cpu`, or of another that
    runs where that one does."""
    device = load(kernel).device  # says why it cannot run here
    module = ModuleType("adaptive_moe_seam")
    if sort is None:
        sort = import_module(f"adaptive_moe.kernels.{kernel}_sort").moe_sorting
    module.moe_sorting = _as_seam(sort)  # type: ignore[attr-defined]
    # Accumulating in bfloat16 needs atomics that not every GPU has; the bytes are the same.
    dtype = "float16" if kernel == "triton" else "float32"
    return Seam(kernel, module, device, dtype, lambda shape, p: _sorted(module, shape, p))


@contextmanager
def kernel_at(seam: Seam, coverage: Coverage, sorts: str) -> Iterator[SortKernel]:
    """What sorts behind the seam for such calls, as the hook offers it to a calibration; sorts as
    in ADAPTIVE_MOE_SORTS. RuntimeError where the hook cannot be installed."""
    shape, device = coverage.shape, seam.device
    settings = read_settings({"ADAPTIVE_MOE_SORTS": sorts})
    hook = AiterHook(replace(settings, mode=Mode.AUTO))
    if not hook.install(seam.module):
        raise RuntimeError("the hook was not installed: the log says why")
    try:
        # Of two tokens the hook can tell how long the baseline's buffers are.
        inputs = sorting_inputs(
            shape, route(shape, 2, Routing.UNIFORM, 0, device), 2, default_mask(shape, device)
        )
        seam.module.moe_sorting(*inputs.arguments(0))
        ((key, seen),) = hook.seen.items()
        yield hook.kernel(seen, key, coverage)
    finally:
        hook.uninstall()


def _as_seam(sort: Callable[..., Any]) -> Callable[..., Any]:
    """A sort of ours behind the parameters of AITER's seam, and those alone."""

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
        shape = (num_experts, model_dim, moebuf_dtype, block_size)
        return sort(topk_ids, topk_weights, *shape, expert_mask, num_local_tokens, dispatch_policy)

    return moe_sorting


def _fused_moe(module: ModuleType, policy: int) -> Experts:
    def experts(x: Any, weights: Any, ids: Any, w13: Any, w2: Any) -> Any:
        return module.fused_moe(x, w13, w2, weights, ids, moe_sorting_dispatch_policy=policy)

    return experts


def _sorted(module: ModuleType, shape: SortingShape, policy: int) -> Experts:
    """The sort, and expert GEMMs over what it sorted. Not on the CPU, where they would hide all
    else: a step there is a rehearsal."""

    def experts(x: Any, weights: Any, ids: Any, w13: Any, w2: Any) -> Any:
        outputs = module.moe_sorting(
            *(ids, weights, shape.num_experts, shape.model_dim, x.dtype, shape.block_size),
            *(None, None, policy),
        )
        if not x.is_cuda:
            return outputs[4]
        from adaptive_moe.cli.bench import grouped_gemm

        return grouped_gemm.experts(x, outputs, w13, w2, shape.block_size)

    return experts
