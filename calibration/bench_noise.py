"""Does noise decide? The same policy under three names, and the same calibration repeated.

aa_nonzero_buckets   buckets, over all A/A calibrations, that left policy 0 (must be none)
repeatability        share of token counts, ties aside, at which every repeated calibration
                     chose the same policy; a tie: what they chose takes the same time to within
                     TIE_MARGINS margins, by the oracle's own measurement
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from adaptive_moe import cli
from adaptive_moe.cli.bench.oracle import OraclePoint, dense_counts, measure_oracle
from adaptive_moe.cli.bench.regret import at
from adaptive_moe.kernels import SortKernel, load_kernel
from adaptive_moe.models import find_model
from adaptive_moe.policy.decision import TIE_MARGINS
from adaptive_moe.settings import Settings
from adaptive_moe.tuning.calibrator import Plan, calibrate
from adaptive_moe.tuning.clocks import CallMode
from calibration.record import main, stamp

ORACLE_PASSES = 8


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernel", choices=cli.KERNELS, default="cpu")
    parser.add_argument("--model", default="deepseek-v3")
    parser.add_argument("--aa-policy", type=int, default=2, help="what all three names run [2]")
    parser.add_argument("--calibrations", type=int, default=20, help="A/A calibrations [20]")
    parser.add_argument("--repeats", type=int, default=10, help="repeated calibrations [10]")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--budget", type=float, help="seconds a calibration [CPU 30, GPU 0.75]")


def run(args: argparse.Namespace) -> dict[str, Any]:
    kernel = load_kernel(args.kernel)
    on_cpu = kernel.device.type == "cpu"
    max_tokens = args.max_tokens or (cli.CPU_MAX_TOKENS if on_cpu else cli.GPU_MAX_TOKENS)
    sizes = () if on_cpu else tuple(n for n in cli.CAPTURE_SIZES if n <= max_tokens)
    budget = args.budget or (cli.CPU_BUDGET_S if on_cpu else Settings().budget_s)
    plan = Plan(max_tokens, sizes, budget_s=budget)
    shape = find_model(args.model).shape()

    same = replace(kernel, moe_sorting=always(kernel, args.aa_policy))
    judged = left = bad_runs = 0
    for _ in range(args.calibrations):
        found = calibrate(same, shape, plan).evidence
        policies = [bucket.policy for bucket in (*found.eager, *found.graph)]
        judged += len(policies)
        left += sum(policy != 0 for policy in policies)
        bad_runs += any(policies)

    tables = [calibrate(kernel, shape, plan) for _ in range(args.repeats)]
    modes = {CallMode.EAGER: dense_counts(max_tokens, 8), CallMode.GRAPH: list(sizes)}
    repeated = {}
    for mode, counts in modes.items():
        if not counts:
            continue
        oracle = measure_oracle(kernel, shape, mode, counts, ORACLE_PASSES)
        arrays = [t.graph if mode is CallMode.GRAPH else t.eager for t in tables]
        repeated[mode.value] = agreement(arrays, oracle, TIE_MARGINS * plan.rule.margin)
    return {
        **stamp(kernel.device),
        "model": args.model,
        "aa_calibrations": args.calibrations,
        "aa_buckets": judged,
        "aa_nonzero_buckets": left,
        "aa_calibrations_with_one": bad_runs,
        "repeats": args.repeats,
        "repeatability": min(share["outside_ties"] for share in repeated.values()),
        "repeatability_by_mode": repeated,
    }


def always(kernel: SortKernel, policy: int) -> Callable[..., Any]:
    """The kernel's sort with every dispatch policy replaced by this one."""

    def moe_sorting(*args: Any) -> Any:
        return kernel.moe_sorting(*args[:8], policy)

    return moe_sorting


def agreement(
    arrays: Sequence[bytes], oracle: Sequence[OraclePoint], tie: float
) -> dict[str, float]:
    """Share of the oracle's counts at which all arrays agree: of all, and of those that matter."""
    same = outside = same_outside = 0
    for point in oracle:
        chosen = {at(array, point.num_tokens) for array in arrays}
        times = [point.us[policy] for policy in chosen]
        is_tie = len(chosen) > 1 and max(times) / min(times) - 1.0 <= tie
        same += len(chosen) == 1
        outside += not is_tie
        same_outside += len(chosen) == 1
    return {
        "of_all_counts": round(same / len(oracle), 4),
        "outside_ties": round(same_outside / outside, 4),
        "counts": len(oracle),
    }


if __name__ == "__main__":
    main(__doc__, add_options, run)
