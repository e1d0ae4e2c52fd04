"""Does noise decide? One sort under every candidate's name, and the same calibration repeated.

aa_left        buckets, over all A/A calibrations, that left the baseline (must be none)
repeatability  share of token counts, ties aside, at which every repeated calibration chose the
               same candidate; a tie: what they chose takes the same time to within TIE_MARGINS
               margins, by the oracle's own measurement
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from adaptive_moe.cli import kernel as sorts
from adaptive_moe.cli import options
from adaptive_moe.cli.bench.oracle import OraclePoint, dense_counts, measure_oracle
from adaptive_moe.kernels import SortKernel
from adaptive_moe.models import find_model
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.decision import TIE_MARGINS
from adaptive_moe.policy.situation import Situation
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.settings import Settings
from adaptive_moe.tuning.calibrator import Plan, calibrate
from calibration.record import main, stamp

ORACLE_PASSES = 8


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernel", choices=("cpu", "triton"), default="cpu")
    parser.add_argument("--model", default="deepseek-v3")
    parser.add_argument("--aa", default="policy 2", help="what all names run [policy 2]")
    parser.add_argument("--calibrations", type=int, default=20, help="A/A calibrations [20]")
    parser.add_argument("--repeats", type=int, default=10, help="repeated calibrations [10]")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--budget", type=float, help="seconds a calibration [CPU 30, GPU 1.5]")


def run(args: argparse.Namespace) -> dict[str, Any]:
    kernel = sorts.load(args.kernel)
    on_cpu = kernel.device.type == "cpu"
    max_tokens = options.max_tokens_from(args, on_cpu=on_cpu)
    sizes = () if on_cpu else options.CAPTURE_SIZES
    plan = Plan(budget_s=args.budget or (options.CPU_BUDGET_S if on_cpu else Settings().budget_s))
    shape = find_model(args.model).shape()
    coverage = Coverage.up_to(shape, max_tokens, sizes).on(kernel.device.type)

    judged = left = bad_runs = 0
    for _ in range(args.calibrations):
        found = calibrate(always(kernel, args.aa), coverage, plan).evidence
        gone = sum(bucket.candidate != coverage.baseline for bucket in found.buckets)
        judged, left, bad_runs = judged + len(found.buckets), left + gone, bad_runs + bool(gone)

    tables = [calibrate(kernel, coverage, plan) for _ in range(args.repeats)]
    repeated = {}
    for situation in Situation:
        counts = coverage.counts(situation)
        if situation is not Situation.GRAPH:
            counts = [n for n in dense_counts(max_tokens, 8) if n in counts]
        if counts:
            oracle = measure_oracle(kernel, shape, situation, counts, ORACLE_PASSES)
            tie = TIE_MARGINS * plan.rule.margin
            captured = situation is Situation.GRAPH
            repeated[situation.value] = agreement(tables, oracle, tie, captured=captured)
    return {
        **stamp(kernel.device),
        "model": args.model,
        "aa_calibrations": args.calibrations,
        "aa_buckets": judged,
        "aa_left": left,
        "aa_calibrations_with_one": bad_runs,
        "repeats": args.repeats,
        "repeatability": min(share["outside_ties"] for share in repeated.values()),
        "repeatability_by_situation": repeated,
    }


def always(kernel: SortKernel, name: str) -> SortKernel:
    """The kernel with one candidate's sort under every name."""
    one = next(candidate for candidate in kernel.candidates if candidate.name == name)
    same = tuple(replace(candidate, bind=one.bind) for candidate in kernel.candidates)
    return replace(kernel, candidates=same)


def agreement(
    tables: Sequence[PolicyTable], oracle: Sequence[OraclePoint], tie: float, *, captured: bool
) -> dict[str, float]:
    """Share of the oracle's counts at which all tables agree: of all, and of those that matter."""
    same = outside = same_outside = 0
    for point in oracle:
        chosen = {table.candidate(point.num_tokens, captured=captured) for table in tables}
        times = [point.us[name] for name in chosen]
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
