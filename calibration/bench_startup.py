"""What a calibration costs: against an exhaustive sweep of the same grid, in the same run.

seconds_per_shape       wall clock of one calibration, kernels already compiled, the median
speedup_vs_exhaustive   time of triton.testing.do_bench (do_bench_cudagraph for graph calls) of
                        every policy at every count the calibration measured, over that
extra_memory_ratio      peak of memory the calibration allocated, over one largest call's own
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from adaptive_moe import cli
from adaptive_moe.kernels import SortKernel, load_kernel
from adaptive_moe.models import find_model
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.shape import SortingShape
from adaptive_moe.tuning.calibrator import Plan, calibrate
from adaptive_moe.tuning.routing import Routing, default_mask, route, sorting_inputs
from calibration.record import main, stamp


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default="deepseek-v3,gpt-oss-120b")
    parser.add_argument("--repeats", type=int, default=5, help="calibrations a shape [5]")


def run(args: argparse.Namespace) -> dict[str, Any]:
    kernel = load_kernel("triton")
    plan = Plan(cli.GPU_MAX_TOKENS, cli.CAPTURE_SIZES)
    shapes: dict[str, dict[str, Any]] = {}
    for name in args.models.split(","):
        shape = find_model(name).shape()
        calibrate(kernel, shape, plan)  # compiles
        own = largest_call_bytes(kernel, shape, plan.max_tokens)
        runs = [measured_calibration(kernel, shape, plan) for _ in range(args.repeats)]
        table = runs[-1][0]
        exhaustive = exhaustive_seconds(kernel, shape, table)
        seconds = statistics.median(seconds for _, seconds, _ in runs)
        shapes[name] = {
            "seconds_per_shape": round(seconds, 3),
            "seconds_each": [round(seconds, 3) for _, seconds, _ in runs],
            "exhaustive_seconds": round(exhaustive, 3),
            "speedup_vs_exhaustive": round(exhaustive / seconds, 2),
            "extra_memory_ratio": round(max(peak for _, _, peak in runs) / own, 3),
            "buckets": len(table.evidence.eager) + len(table.evidence.graph),
        }
    every = shapes.values()
    return {
        **stamp(kernel.device),
        "capture_sizes": len(plan.capture_sizes),
        "max_tokens": plan.max_tokens,
        "seconds_per_shape": max(s["seconds_per_shape"] for s in every),
        "speedup_vs_exhaustive": min(s["speedup_vs_exhaustive"] for s in every),
        "extra_memory_ratio": max(s["extra_memory_ratio"] for s in every),
        "shapes": shapes,
    }


def measured_calibration(
    kernel: SortKernel, shape: SortingShape, plan: Plan
) -> tuple[PolicyTable, float, int]:
    """The table, wall-clock seconds, and bytes at the peak beyond what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    begun = time.perf_counter()
    table = calibrate(kernel, shape, plan)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    left = torch.cuda.memory_allocated() - before
    if left:
        raise RuntimeError(f"a calibration left {left} bytes allocated")
    return table, seconds, torch.cuda.max_memory_allocated() - before


def largest_call_bytes(kernel: SortKernel, shape: SortingShape, max_tokens: int) -> int:
    """Bytes that one call of max_tokens allocates at its peak, inputs included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    tokens = route(shape, max_tokens, Routing.UNIFORM, 0, kernel.device)
    inputs = sorting_inputs(shape, tokens, max_tokens, default_mask(shape, kernel.device))
    torch.cuda.reset_peak_memory_stats()
    kernel.moe_sorting(*inputs.arguments(2))
    return torch.cuda.max_memory_allocated() - before


def exhaustive_seconds(kernel: SortKernel, shape: SortingShape, table: PolicyTable) -> float:
    """Wall-clock seconds of timing every policy at every measured count the usual way."""
    from triton.testing import do_bench, do_bench_cudagraph

    tokens = route(shape, table.evidence.max_tokens, Routing.UNIFORM, 0, kernel.device)
    mask = default_mask(shape, kernel.device)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for buckets, bench in (
        (table.evidence.eager, do_bench),
        (table.evidence.graph, do_bench_cudagraph),
    ):
        for bucket in buckets:
            inputs = sorting_inputs(shape, tokens, bucket.num_tokens, mask)
            for policy in kernel.policies:
                call = partial(kernel.moe_sorting, *inputs.arguments(policy))
                if bench is do_bench_cudagraph:
                    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
                        bench(call)
                else:
                    bench(call)
    torch.cuda.synchronize()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main(__doc__, add_options, run)
