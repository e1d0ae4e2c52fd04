"""What the hook at AITER's seam costs a call, and what the vLLM plugin costs when it is not asked.

The same seam is called unwrapped and wrapped, in turn, with the arguments that AITER's fused_moe
passes: once around nothing, which leaves the hook's own time, and once around a real sort. On a GPU
the tensors are there, so that the question about stream capture is part of it.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from adaptive_moe.engines.hook import AiterHook, Key
from adaptive_moe.kernels.aiter import SEAM
from adaptive_moe.settings import Mode, Settings
from calibration.bench_lookup import table_of

# DeepSeek-V3's sort for a small decode batch, where a call is shortest.
TOKENS, EXPERTS, TOPK, MODEL_DIM, BLOCK_SIZE = 8, 256, 8, 7168, 32

_REGISTRATION = """
import json, sys, time
from adaptive_moe.engines import vllm
before = set(sys.modules)
times = []
for _ in range(101):
    start = time.perf_counter_ns()
    vllm.register()
    times.append((time.perf_counter_ns() - start) / 1e3)
heavy = sorted({"torch", "numpy", "aiter", "vllm"} & set(sys.modules))
print(json.dumps([sorted(times)[50], max(times), sorted(set(sys.modules) - before), heavy]))
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=200, help="interleaved rounds [200]")
    parser.add_argument("--calls", type=int, default=1000, help="calls a sample [1000]")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from adaptive_moe.cli.bench import stamp

    nothing = _interleaved(*_loops(_nothing), args)
    few = argparse.Namespace(rounds=args.rounds, calls=max(1, args.calls // 100))
    real = _interleaved(*_loops(_real_sort()), few)
    registered, registered_first, imported, heavy = _registration()
    return {
        **stamp(),
        "device": _device().type,
        "hook_ns": round(statistics.median(w - u for u, w in nothing), 1),
        "unwrapped_empty_seam_ns": round(statistics.median(u for u, _ in nothing), 1),
        "wrapped_empty_seam_ns": round(statistics.median(w for _, w in nothing), 1),
        "unwrapped_sort_us": round(statistics.median(u for u, _ in real) / 1e3, 2),
        "ratio_to_sort": round(statistics.median(w / u for u, w in real), 4),
        "plugin_unset_us": round(registered, 3),
        "plugin_unset_worst_us": round(registered_first, 3),
        "plugin_unset_imports": imported,
        "plugin_unset_heavy_modules": heavy,
    }


Seam = Callable[..., Any]


def _nothing(
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
    """AITER's seam, as on its main branch in August 2026, around nothing."""


def _real_sort() -> Seam:
    if _device().type == "cpu":
        from adaptive_moe.kernels.cpu_sort import moe_sorting
    else:
        from adaptive_moe.kernels.triton_sort import moe_sorting

    def sort(
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
    ) -> Any:
        return moe_sorting(
            topk_ids,
            topk_weights,
            num_experts,
            model_dim,
            moebuf_dtype,
            block_size,
            expert_mask,
            num_local_tokens,
            dispatch_policy,
            accumulate=accumulate,
        )

    return sort


def _loops(seam: Seam) -> tuple[Callable[[int], None], Callable[[int], None]]:
    """Loops over the seam, and over the same with the hook around it. Both sort by one policy: the
    first is given it, the second has it from its table."""
    import torch

    module = ModuleType("aiter.fused_moe")
    setattr(module, SEAM, seam)
    hook = AiterHook(Settings(mode=Mode.AUTO))
    hook.install(module)
    table = table_of(10)
    key = Key(EXPERTS, TOPK, MODEL_DIM, torch.bfloat16, BLOCK_SIZE, False, False, True)
    hook.set_tables({key: table})
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand((TOKENS, EXPERTS), generator=generator).argsort(1)[:, :TOPK]
    ids = ids.int().contiguous().to(_device())
    weights = torch.rand((TOKENS, TOPK), generator=generator).to(_device())
    leading = (ids, weights, EXPERTS, MODEL_DIM, torch.bfloat16, BLOCK_SIZE, None, None)
    return (
        functools.partial(_call, (*leading, table.policy(TOKENS)), seam),
        functools.partial(_call, (*leading, 0), getattr(module, SEAM)),
    )


def _call(arguments: tuple[Any, ...], seam: Seam, calls: int) -> None:
    ids, weights, experts, dim, dtype, block, mask, local_tokens, policy = arguments
    for _ in range(calls):
        seam(
            ids,
            weights,
            experts,
            dim,
            dtype,
            block,
            mask,
            local_tokens,
            policy,
            return_local_topk_ids=False,
            accumulate=True,
            flat=False,
        )


def _interleaved(
    bare: Callable[[int], None], hooked: Callable[[int], None], args: argparse.Namespace
) -> list[tuple[float, float]]:
    """Nanoseconds a call, (unwrapped, wrapped), one pair a round; who goes first alternates."""
    pairs = []
    for number in range(args.rounds + 1):
        times = {}
        for loop in (bare, hooked) if number % 2 else (hooked, bare):
            start = time.perf_counter_ns()
            loop(args.calls)
            times[loop] = (time.perf_counter_ns() - start) / args.calls
            _settle()
        pairs.append((times[bare], times[hooked]))
    return pairs[1:]  # the first round warms up


def _settle() -> None:
    import torch

    if _device().type != "cpu":
        torch.cuda.synchronize()


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _registration() -> tuple[float, float, list[str], list[str]]:
    """Median and worst microseconds of register() with no variable set, in a process of its own,
    what that imported, and which heavy modules there are."""
    environ = {k: v for k, v in os.environ.items() if "DISPATCH_POLICY" not in k}
    command = [sys.executable, "-c", _REGISTRATION]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"register() failed in a fresh process:\n{done.stderr}")
    median, worst, imported, heavy = json.loads(done.stdout)
    return median, worst, imported, heavy
