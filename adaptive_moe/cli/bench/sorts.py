"""Every sort that can run here, side by side: times a call, and ratios to the best policy of the
baseline's backend, replayed from a graph and eager with the device busy.

`--against FILE` puts published or recorded times beside them: a CSV of calibration/recorded/, or
one like it (recorded.py).
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptive_moe.cli import options, output
from adaptive_moe.cli.bench.paired import in_rounds
from adaptive_moe.cli.bench.recorded import Recorded, read_times, times_of
from adaptive_moe.cli.bench.seams import Seam, kernel_at, open_seam
from adaptive_moe.cli.bench.sorts_text import draw, lines
from adaptive_moe.kernels import SortKernel
from adaptive_moe.kernels.contract import SortingInputs, differences_from, expected
from adaptive_moe.models import Model, find_model
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.situation import Situation
from adaptive_moe.report.plot import plot_format
from adaptive_moe.settings import parse_buckets
from adaptive_moe.tuning.clocks import Clock, at_once, clock_for
from adaptive_moe.tuning.inputs import Inputs

__all__ = ["add_options", "lines", "run"]

# Those of calibration/recorded/sort_implementations_h100.csv.
MODELS = "mixtral-8x7b,qwen3-235b,gpt-oss-120b,deepseek-v3,kimi-k2-fused,qwen3-next-80b"
COUNTS = "1,2,4,8,12,16,24,32,48,64,96,128,192,256,384,512,1024,2048,4096,8192,16384"
# A sort this many times slower than the fastest is looked at twice and timed no further.
FAR_BEHIND = 6.0
# A graph holds as few calls as it may of a batch with more entries: one-shot sorts are slow then.
LARGE = 1 << 13


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default=MODELS, help="known models, separated by commas")
    parser.add_argument(
        "--kernel", choices=options.KERNELS, default="auto", help="whose seam [auto]"
    )
    parser.add_argument("--counts", default=COUNTS, help="token counts, such as 1,64,512")
    parser.add_argument("--block-size", type=int, default=32, help="rows of a GEMM tile [32]")
    parser.add_argument("--seconds", type=float, default=0.03, help="of sampling a point [0.03]")
    parser.add_argument("--against", type=Path, help="CSV of published or recorded times")
    parser.add_argument("--plot", metavar="FILE", help="also draw it, .svg or .png")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from adaptive_moe.cli.bench import stamp

    counts = parse_buckets("--counts", args.counts)
    recorded = read_times(args.against) if args.against else []
    seam = open_seam(args.kernel)
    results: dict[str, Any] = {}
    for name in args.models.split(","):
        model = find_model(name)
        results[name] = sweep(seam, model, counts, args.block_size, args.seconds, recorded)
        print(f"{name}: measured", file=sys.stderr, flush=True)
    if args.plot:
        situations = {name: found["situations"] for name, found in results.items()}
        output.write(args.plot, draw(situations, plot_format(args.plot)))
    return {
        **stamp(seam.device),
        "kernel": seam.name,
        "against": args.against.name if args.against else None,
        "shapes": results,
    }


def sweep(
    seam: Seam,
    model: Model,
    counts: Sequence[int],
    block_size: int,
    seconds: float,
    recorded: Sequence[Recorded] = (),
) -> dict[str, Any]:
    """Times and ratios of every sort of one model, by situation and count."""
    shape = model.shape(block_size, seam.dtype)
    situations = (Situation.GRAPH, Situation.BUSY) if seam.on_gpu else (Situation.BUSY,)
    coverage = Coverage.up_to(shape, max(counts), counts).on(seam.device.type)
    with kernel_at(seam, coverage, "all") as kernel:
        inputs = Inputs(coverage, None, kernel.device)
        clocks = {s: clock_for(s, kernel.device) for s in situations}
        rows: dict[str, list[dict[str, Any]]] = {s.value: [] for s in situations}
        left_out: dict[str, str] = {}
        for count in counts:
            right = _right(kernel, inputs.one(0, count, 1.0), left_out)
            for situation, clock in clocks.items():
                train = inputs.train(situation, count, 1.0)
                us = times(right, train, clock, seconds)
                others = times_of(recorded, model, situation, count)
                rows[situation.value].append(row(count, us, others))
        return {
            "shape": shape.describe(),
            "sorts": [candidate.name for candidate in kernel.candidates],
            "left_out": left_out,
            "situations": rows,
        }


def _right(kernel: SortKernel, inputs: SortingInputs, left_out: dict[str, str]) -> SortKernel:
    """The kernel without those that raise or return something else; and why they are left out."""
    right = [kernel.baseline]
    answer = expected(kernel.baseline.bind(inputs)())
    for candidate in kernel.candidates[1:]:
        try:
            problems = differences_from(answer, candidate.bind(inputs)(), inputs)
        except (RuntimeError, ValueError) as error:
            problems = [f"{type(error).__name__}: {error}"]
        if problems:
            at = f"at {inputs.topk_ids.shape[0]} tokens"
            left_out.setdefault(candidate.name, f"{at}: {problems[0]}")
        else:
            right.append(candidate)
    return SortKernel(kernel.name, kernel.device, tuple(right))


def times(
    kernel: SortKernel, train: Sequence[SortingInputs], clock: Clock, seconds: float
) -> dict[str, float]:
    """Each candidate's median us a call, from interleaved rounds."""
    call_us = float("inf") if train[0].topk_ids.numel() > LARGE else 0.0
    samplers = {
        candidate.name: at_once(clock.prepare([candidate.bind(i) for i in train], call_us))
        for candidate in kernel.candidates
    }
    found = in_rounds(samplers, seconds, far_behind=FAR_BEHIND)
    return {name: statistics.median(us) for name, us in found.items()}


def row(num_tokens: int, us: Mapping[str, float], others: Mapping[str, float]) -> dict[str, Any]:
    """One count: us of each sort, and over the best of the baseline's own policies."""
    best = min(time for name, time in us.items() if name.startswith("policy "))
    everyone = {**us, **others}
    return {
        "num_tokens": num_tokens,
        "us": {name: round(time, 3) for name, time in everyone.items()},
        "ratio": {name: round(time / best, 4) for name, time in everyone.items()},
    }
