"""Where a step's sort is called (AITER's own fused_moe, or a module of ours with the same seam),
what can sort there, and how a bench switches between that."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from adaptive_moe.hook.hook import AiterHook
from adaptive_moe.kernels import Candidate, KernelUnavailableError, SortKernel, load_kernel
from adaptive_moe.kernels.aiter import MODULE, find_aiter
from adaptive_moe.kernels.contract import SortingInputs, compare, differences, expected
from adaptive_moe.kernels.sorts import GROUPS
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.settings import Mode, Settings
from adaptive_moe.shape import SortingShape
from calibration.layer import Experts
from calibration.timing import inputs_of

KERNELS = ("auto", "aiter", "triton", "cpu")
# vLLM's default capture sizes up to 512, which SGLang's resemble.
CAPTURE_SIZES = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
POLICIES, ALL = "policies", "all"


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


@dataclass(frozen=True)
class SeenShape:
    """One shape that was seen at a seam: what can sort it, and at which token counts it came."""

    kernel: SortKernel
    coverage: Coverage
    counts: tuple[int, ...]

    def offering(self, sorts: str) -> SortKernel:
        """The kernel with every candidate (ALL), or the policies of the baseline's backend."""
        some = (c for c in self.kernel.candidates if sorts == ALL or c.name.startswith("policy "))
        return replace(self.kernel, candidates=tuple(some))


def open_seam(kernel: str) -> Seam:
    """The seam of `aiter`, `triton` or `cpu`; `auto` is the first of these that is usable.

    Raises KernelUnavailableError saying why one cannot, or what importing AITER raises.
    """
    gpu, problem = torch.cuda.is_available(), find_aiter().problem
    if kernel == "auto":
        kernel = "cpu" if not gpu else "triton" if problem else "aiter"
    if kernel == "aiter":
        if problem:
            raise KernelUnavailableError(f"--kernel aiter cannot run here, {problem}")
        device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        module = import_module(MODULE)
        return Seam("aiter", module, device, "bfloat16", lambda _, p: _fused_moe(module, p))
    device = load_kernel(kernel).device  # says why it cannot run here
    if kernel == "cpu":
        # A second thread, where something else runs on its core, makes the first wait far longer
        # than a sort takes.
        torch.set_num_threads(1)
    module = ModuleType("seam")
    sort = import_module(f"adaptive_moe.kernels.{kernel}_sort").moe_sorting
    module.moe_sorting = as_seam(sort)  # type: ignore[attr-defined]
    # Accumulating in bfloat16 needs atomics that not every GPU has; the bytes are the same.
    dtype = "float16" if kernel == "triton" else "float32"
    return Seam(kernel, module, device, dtype, lambda shape, p: _sorted(module, shape, p))


def see(
    seam: Seam,
    shape: SortingShape,
    layer: Callable[[int], object],
    counts: Sequence[int],
    captured: Sequence[int],
    max_tokens: int = 0,
) -> list[SeenShape]:
    """What can sort the calls that `layer(num_tokens)` makes at the seam at each of the counts.

    AITER picks a block size by token count, so that there may be several shapes. Counts at which
    there is nothing to choose are in none. max_tokens: of the coverage, if more than the counts.
    RuntimeError where the hook cannot be installed.
    """
    hook = AiterHook(replace(Settings(), mode=Mode.AUTO, sorts=GROUPS["all"]))
    if not hook.install(seam.module):
        raise RuntimeError("the hook was not installed: the log says why")
    try:
        served: dict[Any, list[int]] = {}
        for count in sorted(counts):
            layer(count)
            for key, call in hook.seen.items():
                if call.num_tokens == count:
                    served.setdefault(key, []).append(count)
        busy_from = max(captured) + 1 if captured else None
        found = []
        for key, some in served.items():
            coverage = Coverage.up_to(
                replace(shape, block_size=key.block_size),
                max(max_tokens, *some) if len(served) == 1 else some[-1],
                [n for n in captured if n in some or len(served) == 1],
                baseline=key.baseline_name,
                busy_from=busy_from,
            ).on(seam.device.type)
            kernel = hook.kernel(hook.seen[key], key, coverage)
            found.append(SeenShape(kernel, coverage, tuple(some)))
        return found
    finally:
        hook.uninstall()


def sort_calls(seam: Seam, shape: SortingShape) -> Callable[[int], object]:
    """Calls the seam with batches of that shape, as a layer does."""

    def call(num_tokens: int) -> object:
        (inputs,) = inputs_of(shape, num_tokens, 1, seam.device)
        return seam.module.moe_sorting(*inputs.arguments(0))

    return call


def without_wrong(kernel: SortKernel, inputs: SortingInputs) -> tuple[SortKernel, dict[str, str]]:
    """The kernel without candidates that raise or return something else than the baseline, and why
    each of them is left out."""
    right, left_out = [kernel.baseline], {}
    answer = expected(kernel.baseline.bind(inputs)())
    for candidate in kernel.candidates[1:]:
        try:
            outputs = candidate.bind(inputs)()
            (problems,) = differences([compare(answer, outputs, inputs)])
        except Exception as error:
            problems = [f"{type(error).__name__}: {error}"]
        if problems:
            left_out[candidate.name] = problems[0]
        else:
            right.append(candidate)
    return replace(kernel, candidates=tuple(right)), left_out


class Switch:
    """While entered, the sort of a module is the candidate in `use`: all of them cost the host the
    same few microseconds more."""

    def __init__(self, module: ModuleType) -> None:
        self._module: Any = module
        self.use: Candidate | None = None

    def __enter__(self) -> "Switch":
        self._sort = self._module.moe_sorting
        self._module.moe_sorting = self._moe_sorting
        return self

    def __exit__(self, *_: object) -> None:
        self._module.moe_sorting = self._sort

    def _moe_sorting(
        self,
        topk_ids: Any,
        topk_weights: Any,
        num_experts: Any,
        model_dim: Any,
        moebuf_dtype: Any,
        block_size: Any = 32,
        expert_mask: Any = None,
        num_local_tokens: Any = None,
        dispatch_policy: Any = 0,
        *more: Any,
        **named: Any,
    ) -> Any:
        inputs = SortingInputs(
            *(topk_ids, topk_weights, num_experts, model_dim, moebuf_dtype),
            *(block_size, expert_mask, num_local_tokens),
        )
        if self.use is None:
            return self._sort(*inputs.arguments(dispatch_policy), *more, **named)
        return self.use.bind(inputs)()


def as_seam(sort: Callable[..., Any]) -> Callable[..., Any]:
    """A sort of nine arguments behind the parameters of AITER's seam, as of August 2026."""

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
        return_local_topk_ids: Any = False,
        accumulate: Any = True,
        flat: Any = False,
        output_aux: Any = False,
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
        from calibration import grouped_gemm

        return grouped_gemm.experts(x, outputs, w13, w2, shape.block_size)

    return experts
