"""Time lost by a calibrated table against an exhaustive oracle, in each situation.

The oracle measures every candidate at every count of a dense sweep by itself, longer than the
calibration, and knows nothing of its samples. All figures are time ratios, 1.0 being equal:

    geomean_regret       the table's choice over the oracle's best, geometric mean over the sweep
    worst_regret         the largest of these; worst_regret_outside_ties: among counts where the
                         candidates differ by more than the margin
    worst_over_baseline  the table's choice over the baseline, largest
    gain_over_static     the best single candidate over the table's choice, geometric mean
    gain_over_baseline   the baseline over the table's choice, geometric mean
    same_speed           geomean and worst regret over the counts at which the machine ran as fast
                         as it did in the calibration
    other_array_geomean  the regret of choosing by the other array (the same on a CPU)
"""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adaptive_moe.cli import options, output
from adaptive_moe.cli.bench.oracle import OraclePoint, dense_counts, measure_oracle
from adaptive_moe.cli.bench.seams import kernel_at, open_seam
from adaptive_moe.models import find_model
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.situation import Situation
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.settings import Settings, parse_budget
from adaptive_moe.shape import SortingShape
from adaptive_moe.tuning.calibrator import Plan, calibrate

# How far the baseline's time may be off its calibrated one for the machine to count as equally
# fast.
SPEED_BAND = 1.25


def add_options(parser: argparse.ArgumentParser) -> None:
    options.add_shape_options(parser)
    options.add_kernel_options(parser)
    parser.add_argument("--sorts", default="policies", help="as ADAPTIVE_MOE_SORTS [policies]")
    parser.add_argument("--models", help="several known models, separated by commas")
    options.add_budget(parser)
    parser.add_argument("--per-octave", type=int, default=16, help="sweep counts a doubling [16]")
    parser.add_argument("--oracle-passes", type=int, default=8, help="passes over the sweep [8]")
    parser.add_argument("--plot", metavar="FILE", help="also draw the first table, .svg or .png")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from adaptive_moe.cli.bench import stamp
    from adaptive_moe.report.plot import draw, plot_format

    seam = open_seam(args.kernel)
    on_cpu = not seam.on_gpu
    max_tokens = options.max_tokens_from(args, on_cpu=on_cpu)
    sizes = options.capture_sizes_from(args, max_tokens, on_cpu=on_cpu)
    budget_s = options.CPU_BUDGET_S if on_cpu else Settings.budget_s
    if args.budget is not None:
        budget_s = parse_budget("--budget", args.budget)
    plan = Plan(budget_s=budget_s)
    results = {}
    for model, shape in _shapes(args).items():
        coverage = Coverage.up_to(shape, max_tokens, sizes).on(seam.device.type)
        with kernel_at(seam, coverage, args.sorts) as kernel:
            table = calibrate(kernel, coverage, plan)
            points = {
                situation: measure_oracle(kernel, shape, situation, counts, args.oracle_passes)
                for situation, counts in _sweeps(coverage, args.per_octave)
            }
        results[model] = shape_result(table, points)
        if args.plot and len(results) == 1:
            output.write(args.plot, draw(table, plot_format(args.plot)))
    return {**stamp(seam.device), "kernel": seam.name, "sorts": args.sorts, "shapes": results}


def lines(figures: Mapping[str, Any]) -> Iterator[str]:
    """A line for each shape and situation."""
    yield f"time over the best candidate's on {figures['kernel']}, 1.0 being equal"
    for name, found in figures["shapes"].items():
        yield f"{name}: {found['shape']}, calibrated in {found['calibration_seconds']:.2f} s"
        for situation, one in found["situations"].items():
            yield (
                f"  {situation}: mean {one['geomean_regret']:.4f}, worst {one['worst_regret']:.4f}"
                f", at most {one['worst_over_baseline']:.4f} of the baseline; "
                f"gain over the baseline {one['gain_over_baseline']:.4f}"
            )


def shape_result(
    table: PolicyTable, points: Mapping[Situation, Sequence[OraclePoint]]
) -> dict[str, Any]:
    """The figures of one shape, the table it got and the whole sweep."""
    situations = {}
    for situation, sweep in points.items():
        captured = situation is Situation.GRAPH
        situations[situation.value] = {
            **figures_of(table, sweep, captured=captured),
            "other_array_geomean": _round(_geomean(_regrets(table, sweep, captured=not captured))),
            "same_speed": _same_speed(table, situation, sweep),
            "table": table.runs(captured=captured),
            "sweep_columns": ["num_tokens", "applied", *(f"{name} us" for name in sweep[0].us)],
            "sweep": [
                [
                    p.num_tokens,
                    table.candidate(p.num_tokens, captured=captured),
                    *(round(us, 3) for us in p.us.values()),
                ]
                for p in sweep
            ],
        }
    return {
        "shape": table.evidence.coverage.shape.describe(),
        "calibration_seconds": table.evidence.seconds,
        "situations": situations,
    }


def figures_of(
    table: PolicyTable, sweep: Sequence[OraclePoint], *, captured: bool
) -> dict[str, float]:
    """The ratios of the module's docstring for one array over one sweep."""
    found = table.evidence
    regrets = _regrets(table, sweep, captured=captured)
    clear = [r for r, p in zip(regrets, sweep, strict=True) if p.spread() > 1.0 + found.rule.margin]
    chosen = [p.us[table.candidate(p.num_tokens, captured=captured)] for p in sweep]
    over = {
        name: [p.us[name] / us for p, us in zip(sweep, chosen, strict=True)] for name in sweep[0].us
    }
    baseline = over[found.coverage.baseline]
    return {
        "geomean_regret": _round(_geomean(regrets)),
        "worst_regret": _round(max(regrets)),
        "worst_regret_outside_ties": _round(max(clear, default=1.0)),
        "worst_over_baseline": _round(max(1.0 / ratio for ratio in baseline)),
        "gain_over_static": _round(min(_geomean(ratios) for ratios in over.values())),
        "gain_over_baseline": _round(_geomean(baseline)),
    }


def _shapes(args: argparse.Namespace) -> dict[str, SortingShape]:
    if args.models:
        block = args.block_size or 32
        return {name: find_model(name).shape(block) for name in args.models.split(",")}
    return {args.model or "shape": options.shape_from(args)}


def _sweeps(coverage: Coverage, per_octave: int) -> Iterator[tuple[Situation, list[int]]]:
    """The counts to judge in each situation in which calls of that coverage happen."""
    for situation in Situation:
        counts = coverage.counts(situation)
        if situation is Situation.GRAPH and counts:
            yield situation, list(counts)
        elif counts:
            yield situation, [n for n in dense_counts(counts[-1], per_octave) if n in counts]


def _same_speed(
    table: PolicyTable, situation: Situation, sweep: Sequence[OraclePoint]
) -> dict[str, float]:
    """The regret where the oracle met the machine as fast as the calibration had: the baseline
    within SPEED_BAND of its bucket's time. A host that halves its speed moves crossovers."""
    same = []
    for point in sweep:
        bucket = table.bucket(point.num_tokens, situation)
        calibrated = bucket.fills[0].verdict.baseline.median_us if bucket else None
        now = point.us[table.evidence.coverage.baseline]
        if 1.0 / SPEED_BAND <= now / (calibrated or now) <= SPEED_BAND:
            same.append(point)
    regrets = _regrets(table, same, captured=situation is Situation.GRAPH) or [1.0]
    return {
        "counts": len(same),
        "of": len(sweep),
        "geomean_regret": _round(_geomean(regrets)),
        "worst_regret": _round(max(regrets)),
    }


def _regrets(table: PolicyTable, sweep: Sequence[OraclePoint], *, captured: bool) -> list[float]:
    return [
        p.us[table.candidate(p.num_tokens, captured=captured)] / min(p.us.values()) for p in sweep
    ]


def _geomean(ratios: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios))


def _round(ratio: float) -> float:
    return round(ratio, 4)
