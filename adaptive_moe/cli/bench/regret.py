"""Time lost by a calibrated table against an exhaustive oracle, per call mode.

The oracle measures every policy at every count of a dense sweep by itself, longer than the
calibration, and knows nothing of its samples. All figures are time ratios, 1.0 being equal:

    geomean_regret      the table's choice over the oracle's best, geometric mean over the sweep
    worst_regret        the largest of these; worst_regret_outside_ties: among counts where the
                        policies differ by more than the margin
    worst_vs_policy0    the table's choice over policy 0, largest
    gain_vs_best_static the best single policy over the table's choice, geometric mean
    same_speed          geomean and worst regret over the counts at which the machine ran as fast as
                        it did in the calibration
    other_mode_geomean  the regret of choosing by the other mode's array (the same on a CPU)
"""

import argparse
import math
from pathlib import Path
from typing import Any

from adaptive_moe import cli
from adaptive_moe.cli.bench.oracle import OraclePoint, dense_counts, measure_oracle
from adaptive_moe.kernels import load_kernel
from adaptive_moe.models import find_model
from adaptive_moe.policy.table import PolicyTable, runs
from adaptive_moe.settings import Settings
from adaptive_moe.shape import SortingShape
from adaptive_moe.tuning.calibrator import Plan, calibrate
from adaptive_moe.tuning.clocks import CallMode

# How far policy 0's time may be off its calibrated one for the machine to count as equally fast.
SPEED_BAND = 1.25


def add_options(parser: argparse.ArgumentParser) -> None:
    cli.add_shape_options(parser)
    parser.add_argument("--models", help="several known models, separated by commas")
    parser.add_argument(
        "--budget", type=float, help="seconds a calibration [30 on the CPU, else 1]"
    )
    parser.add_argument("--per-octave", type=int, default=16, help="sweep counts a doubling [16]")
    parser.add_argument("--oracle-passes", type=int, default=8, help="passes over the sweep [8]")
    parser.add_argument("--plot", type=Path, help="also draw the sweep of the first shape here")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from adaptive_moe.cli.bench import stamp

    kernel = load_kernel(args.kernel)
    on_cpu = kernel.device.type == "cpu"
    max_tokens = args.max_tokens or (cli.CPU_MAX_TOKENS if on_cpu else cli.GPU_MAX_TOKENS)
    plan = Plan(
        max_tokens=max_tokens,
        capture_sizes=() if on_cpu else tuple(n for n in cli.CAPTURE_SIZES if n <= max_tokens),
        budget_s=args.budget or (cli.CPU_BUDGET_S if on_cpu else Settings().budget_s),
    )
    shapes: dict[str, SortingShape] = {}
    if args.models:
        shapes = {n: find_model(n).shape(args.block_size) for n in args.models.split(",")}
    else:
        shapes = {args.model or "shape": cli.shape_from(args)}
    results = {}
    for name, shape in shapes.items():
        table = calibrate(kernel, shape, plan)
        sweeps = {CallMode.EAGER: dense_counts(max_tokens, args.per_octave)}
        if plan.capture_sizes:
            sweeps[CallMode.GRAPH] = list(plan.capture_sizes)
        points = {
            mode: measure_oracle(kernel, shape, mode, counts, args.oracle_passes)
            for mode, counts in sweeps.items()
        }
        results[name] = shape_result(table, points)
        if args.plot and len(results) == 1:
            from adaptive_moe.report.plot import draw

            draw(table, args.plot)
    return {**stamp(kernel.device), "kernel": kernel.name, "shapes": results}


def shape_result(table: PolicyTable, points: dict[CallMode, list[OraclePoint]]) -> dict[str, Any]:
    """The figures of one shape, the table it got and the whole sweep."""
    modes = {}
    for mode, sweep in points.items():
        mine, other = table.eager, table.graph
        if mode is CallMode.GRAPH:
            mine, other = other, mine
        modes[mode.value] = {
            **figures(mine, sweep, table.evidence.rule.margin),
            "other_mode_geomean": _round(_geomean(_regrets(other, sweep))),
            "same_speed": _same_speed(table, mode, mine, sweep),
            "table": runs(mine),
            "sweep_columns": ["num_tokens", "applied", *(f"policy {p} us" for p in sweep[0].us)],
            "sweep": [
                [p.num_tokens, at(mine, p.num_tokens), *(round(us, 3) for us in p.us.values())]
                for p in sweep
            ],
        }
    return {
        "shape": table.evidence.shape.describe(),
        "calibration_seconds": table.evidence.seconds,
        "modes": modes,
    }


def figures(array: bytes, sweep: list[OraclePoint], margin: float) -> dict[str, float]:
    """The ratios of the module's docstring for one array over one sweep."""
    regrets = _regrets(array, sweep)
    clear = [r for r, p in zip(regrets, sweep, strict=True) if p.spread() > 1.0 + margin]
    statics = [
        _geomean([p.us[policy] / p.us[at(array, p.num_tokens)] for p in sweep])
        for policy in sweep[0].us
        if all(policy in p.us for p in sweep)
    ]
    return {
        "geomean_regret": _round(_geomean(regrets)),
        "worst_regret": _round(max(regrets)),
        "worst_regret_outside_ties": _round(max(clear, default=1.0)),
        "worst_vs_policy0": _round(max(p.us[at(array, p.num_tokens)] / p.us[0] for p in sweep)),
        "gain_vs_best_static": _round(min(statics)),
        "gain_vs_policy0": _round(
            _geomean([p.us[0] / p.us[at(array, p.num_tokens)] for p in sweep])
        ),
    }


def _same_speed(
    table: PolicyTable, mode: CallMode, array: bytes, sweep: list[OraclePoint]
) -> dict[str, float]:
    """The regret where the oracle met the machine as fast as the calibration had: policy 0 within
    SPEED_BAND of what its bucket measured. A host that halves its speed moves eager crossovers."""
    captured = mode is CallMode.GRAPH
    same = []
    for point in sweep:
        result = table.bucket(point.num_tokens, captured=captured).fills[0].verdict.results[0]
        ratio = point.us[0] / (result.median_us or point.us[0])
        if 1.0 / SPEED_BAND <= ratio <= SPEED_BAND:
            same.append(point)
    regrets = _regrets(array, same) or [1.0]
    return {
        "counts": len(same),
        "of": len(sweep),
        "geomean_regret": _round(_geomean(regrets)),
        "worst_regret": _round(max(regrets)),
    }


def at(array: bytes, num_tokens: int) -> int:
    """What the hot path reads."""
    return array[min(num_tokens, len(array) - 1)]


def _regrets(array: bytes, sweep: list[OraclePoint]) -> list[float]:
    return [p.us[at(array, p.num_tokens)] / min(p.us.values()) for p in sweep]


def _geomean(ratios: list[float]) -> float:
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios))


def _round(ratio: float) -> float:
    return round(ratio, 4)
