"""What an engine's start pays: imports, one calibration a shape, and a warm start.

register_us     the vLLM plugin's register() in a process without any of our variables set:
                first call and median, and which heavy modules it imported (none)
import_ms       importing torch, and importing calibrate() after it
seconds         one calibration each, in the order of --models and --sorts; the very first one
                of the process is `first_in_process`, which loads or compiles kernels
peak_mib        of device memory that a calibration allocates, beside that of one largest call
warm_start_ms   warm_up() where an earlier start stored the table
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adaptive_moe.engines.wanted import Batches
from adaptive_moe.engines.warm_up import warm_up_hook
from adaptive_moe.hook.hook import AiterHook
from adaptive_moe.models import find_model
from adaptive_moe.settings import Mode, Settings
from calibration.record import main, progress, stamp
from calibration.seams import (
    ALL,
    CAPTURE_SIZES,
    KERNELS,
    POLICIES,
    Seam,
    open_seam,
    see,
    sort_calls,
)
from calibration.timing import Plan, calibrate

CHECKOUT = Path(__file__).resolve().parent.parent
REGISTER = """
import json, sys, time
from adaptive_moe.engines import vllm
times = []
for _ in range(101):
    begun = time.perf_counter()
    vllm.register()
    times.append((time.perf_counter() - begun) * 1e6)
heavy = sorted({"torch", "numpy", "aiter", "vllm"} & set(sys.modules))
print(json.dumps({"first": times[0], "median": sorted(times)[50], "heavy_modules": heavy}))
"""
IMPORTS = """
import json, time
begun = time.perf_counter()
import torch
middle = time.perf_counter()
from adaptive_moe import calibrate
end = time.perf_counter()
print(json.dumps({"torch": (middle - begun) * 1e3, "calibrate": (end - middle) * 1e3}))
"""


def in_process(code: str) -> dict[str, Any]:
    """What a fresh process prints as JSON, without any of our variables."""
    environ = {k: v for k, v in os.environ.items() if "DISPATCH_POLICY" not in k}
    environ["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"a fresh process failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return {k: round(v, 2) if isinstance(v, float) else v for k, v in found.items()}


def calibrations(seam: Seam, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each, wall clock."""
    captured = CAPTURE_SIZES if seam.on_gpu else ()
    plan = Plan(budget_s=args.budget)
    shapes: dict[str, Any] = {}
    first = 0.0
    for name in args.models.split(","):
        shape = find_model(name).shape(32, seam.dtype)
        calls = sort_calls(seam, shape)
        (seen,) = see(seam, shape, calls, (1, 2), captured, args.max_tokens)
        call = peak_mib(seam, partial(calls, args.max_tokens))
        shapes[name] = {"one_call_mib": call, "seconds": {}, "peak_mib": {}}
        for sorts in (POLICIES, ALL):
            kernel, seconds, peaks = seen.offering(sorts), [], []
            for _ in range(args.repeats):
                begun = time.perf_counter()
                peaks.append(peak_mib(seam, partial(calibrate, kernel, seen.coverage, plan)))
                seconds.append(round(time.perf_counter() - begun, 3))
            first = first or seconds[0]
            shapes[name]["seconds"][sorts] = seconds
            shapes[name]["peak_mib"][sorts] = max(peaks)
        progress(f"{name}: {shapes[name]}")
    return {"first_in_process": first, "shapes": shapes}


def peak_mib(seam: Seam, call: Callable[[], object]) -> float:
    """Of device memory that a call allocates beyond what was there; 0 on the CPU."""
    if not seam.on_gpu:
        call()
        return 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / (1 << 20), 1)


def warm_start(seam: Seam, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of warm_up(): the first measures and stores, the others find that."""
    shape = find_model(args.models.split(",")[0]).shape(32, seam.dtype)
    captured = CAPTURE_SIZES if seam.on_gpu else ()
    calls, times = sort_calls(seam, shape), []
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(mode=Mode.AUTO, budget_s=args.budget, cache_dir=folder)
        for _ in range(6):
            hook = AiterHook(settings)
            if not hook.install(seam.module):
                raise RuntimeError("the hook was not installed: the log says why")
            try:
                calls(2)
                begun = time.perf_counter()
                warm_up_hook(hook, Batches(args.max_tokens, tuple(captured)))
                times.append((time.perf_counter() - begun) * 1e3)
            finally:
                hook.uninstall()
    return {"cold": round(times[0], 1), "warm": round(statistics.median(times[1:]), 2)}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default="deepseek-v3,qwen3-235b,gpt-oss-120b")
    parser.add_argument("--kernel", choices=KERNELS, default="auto", help="whose seam [auto]")
    parser.add_argument("--repeats", type=int, default=3, help="calibrations a shape [3]")
    parser.add_argument("--max-tokens", type=int, default=8192, help="largest batch [8192]")
    parser.add_argument("--budget", type=float, default=Plan().budget_s, help="seconds a table")


def run(args: argparse.Namespace) -> dict[str, Any]:
    seam = open_seam(args.kernel)
    return {
        **stamp(seam.device),
        "kernel": seam.name,
        "capture_sizes": len(CAPTURE_SIZES) if seam.on_gpu else 0,
        "max_tokens": args.max_tokens,
        "register_us": in_process(REGISTER),
        "import_ms": in_process(IMPORTS),
        **calibrations(seam, args),
        "warm_start_ms": warm_start(seam, args),
    }


if __name__ == "__main__":
    main(__doc__, add_options, run)
