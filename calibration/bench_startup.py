"""What a calibration costs: against an exhaustive sweep of the same grid, in the same run.

seconds_per_shape       wall clock of one calibration, kernels already compiled, the median
speedup_vs_exhaustive   time of triton.testing.do_bench (do_bench_cudagraph for graph calls) of
                        every candidate at every bucket of every situation, over that
speedup_where_measured  the same of only those that the calibration measured: the others it knew
                        from another situation
extra_memory_ratio      peak of memory the calibration allocated, over one largest call's own
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from adaptive_moe.cli import options
from adaptive_moe.kernels import SortKernel, load_kernel
from adaptive_moe.models import find_model
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.situation import Situation
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
    plan = Plan()
    shapes: dict[str, dict[str, Any]] = {}
    for name in args.models.split(","):
        shape = find_model(name).shape()
        coverage = Coverage.up_to(shape, options.GPU_MAX_TOKENS, options.CAPTURE_SIZES)
        calibrate(kernel, coverage, plan)  # compiles
        own = largest_call_bytes(kernel, shape, coverage.max_tokens)
        runs = [measured_calibration(kernel, coverage, plan) for _ in range(args.repeats)]
        table = runs[-1][0]
        exhaustive, measured = exhaustive_seconds(kernel, table)
        seconds = statistics.median(seconds for _, seconds, _ in runs)
        shapes[name] = {
            "seconds_per_shape": round(seconds, 3),
            "seconds_each": [round(seconds, 3) for _, seconds, _ in runs],
            "exhaustive_seconds": round(exhaustive, 3),
            "speedup_vs_exhaustive": round(exhaustive / seconds, 2),
            "speedup_where_measured": round(measured / seconds, 2),
            "extra_memory_ratio": round(max(peak for _, _, peak in runs) / own, 3),
            "buckets": len(table.evidence.buckets),
        }
    every = shapes.values()
    return {
        **stamp(kernel.device),
        "capture_sizes": len(options.CAPTURE_SIZES),
        "max_tokens": options.GPU_MAX_TOKENS,
        "seconds_per_shape": max(s["seconds_per_shape"] for s in every),
        "speedup_vs_exhaustive": min(s["speedup_vs_exhaustive"] for s in every),
        "speedup_where_measured": min(s["speedup_where_measured"] for s in every),
        "extra_memory_ratio": max(s["extra_memory_ratio"] for s in every),
        "shapes": shapes,
    }


def measured_calibration(
    kernel: SortKernel, coverage: Coverage, plan: Plan
) -> tuple[PolicyTable, float, int]:
    """The table, wall-clock seconds, and bytes at the peak beyond what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    begun = time.perf_counter()
    table = calibrate(kernel, coverage, plan)
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
    kernel.candidates[-1].bind(inputs)()
    return torch.cuda.max_memory_allocated() - before


def exhaustive_seconds(kernel: SortKernel, table: PolicyTable) -> tuple[float, float]:
    """Wall-clock seconds of timing every candidate at every bucket of every situation the usual
    way, and of those alone that have rounds of their own."""
    from triton.testing import do_bench, do_bench_cudagraph

    coverage = table.evidence.coverage
    shape = coverage.shape
    tokens = route(shape, coverage.max_tokens, Routing.UNIFORM, 0, kernel.device)
    mask = default_mask(shape, kernel.device)
    every = measured = 0.0
    for situation in Situation:
        for bucket in table.evidence.section(situation):
            inputs = sorting_inputs(shape, tokens, bucket.num_tokens, mask)
            verdict = bucket.verdicts[0]
            for candidate in kernel.candidates:
                call = candidate.bind(inputs)
                torch.cuda.synchronize()
                begun = time.perf_counter()
                if situation is Situation.GRAPH:
                    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
                        do_bench_cudagraph(call)
                else:
                    do_bench(call)
                torch.cuda.synchronize()
                took = time.perf_counter() - begun
                result = verdict.result(candidate.name)
                every += took
                measured += took if verdict.rounds and result and result.median_us else 0.0
    return every, measured


if __name__ == "__main__":
    main(__doc__, add_options, run)
