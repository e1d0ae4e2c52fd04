"""Does noise decide? One sort under every candidate's name, and the same calibration repeated.

    aa_left        buckets that left the baseline although all candidates are the same sort (should
                   be none)
    repeatability  share of token counts, ties aside, at which every repeated calibration chose the
                   same candidate. A tie: the sorts chosen differ by no more than the margin alone,
                   or the whole step does not tell them apart

A run of counts at which calibrations chose differently in the same way is judged at its middle.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adaptive_moe.kernels import SortKernel
from adaptive_moe.models import find_model
from adaptive_moe.policy.table import PolicyTable
from calibration.interleaved import interleave, longer
from calibration.layer import layer_sizes
from calibration.record import main, progress, stamp
from calibration.seams import (
    ALL,
    CAPTURE_SIZES,
    KERNELS,
    POLICIES,
    Seam,
    SeenShape,
    open_seam,
    see,
    sort_calls,
)
from calibration.sorts import samplers
from calibration.step import Judge
from calibration.timing import CAPTURED, Plan, buckets, calibrate, inputs_of

MODELS = "deepseek-v3,qwen3-235b"
LAYERS, TENSOR_PARALLEL = 8, 8
# Eager counts are looked at so many to a doubling.
PER_OCTAVE = 8
CALLS = 8


@dataclass(frozen=True)
class Difference:
    """A run of counts at which repeated calibrations did not choose the same."""

    counts: tuple[int, ...]
    chosen: tuple[str, ...]


def identical(kernel: SortKernel) -> SortKernel:
    """The kernel with the baseline's sort under every name."""
    same = (replace(candidate, bind=kernel.baseline.bind) for candidate in kernel.candidates)
    return replace(kernel, candidates=tuple(same))


def a_a(shapes: Sequence[SeenShape], number: int, plan: Plan) -> dict[str, int]:
    """Calibrations of identical candidates, by turns of the shapes, until so many buckets."""
    judged = left = calibrations = 0
    for shape in itertools.cycle(shapes):
        table = calibrate(identical(shape.kernel), shape.coverage, plan)
        choices = [choice for _, choice in buckets(table)]
        judged, calibrations = judged + len(choices), calibrations + 1
        left += sum(choice != shape.coverage.baseline for choice in choices)
        if judged >= number:
            break
    return {"aa_calibrations": calibrations, "aa_buckets": judged, "aa_left": left}


def differences(
    tables: Sequence[PolicyTable], counts: Sequence[int], *, captured: bool
) -> Iterator[Difference]:
    def chosen(num_tokens: int) -> tuple[str, ...]:
        return tuple(sorted({t.candidate(num_tokens, captured=captured) for t in tables}))

    for names, some in itertools.groupby(counts, chosen):
        if len(names) > 1:
            yield Difference(tuple(some), names)


def repeatability(
    seam: Seam, model: Judge, shape: SeenShape, sorts: str, repeats: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Of captured and of eager counts, for one shape and set of candidates."""
    kernel, plan = shape.offering(sorts), Plan(budget_s=args.budget)
    tables = [calibrate(kernel, shape.coverage, plan) for _ in range(repeats)]
    captured = shape.coverage.captured
    found = {}
    for name, counts in (("captured", captured), ("eager", dense(shape.coverage.max_tokens))):
        if not counts:
            continue
        open_counts = ties = 0
        worst: list[Any] = []
        for one in differences(tables, counts, captured=name == "captured"):
            if is_tie(seam, model, kernel, one, args.seconds, captured=name == "captured"):
                ties += len(one.counts)
            else:
                open_counts += len(one.counts)
                worst.append([one.counts[0], one.counts[-1], *one.chosen])
        agreed = len(counts) - open_counts - ties
        found[name] = {
            "counts": len(counts),
            "ties": ties,
            "same": agreed,
            "repeatability": round(agreed / max(agreed + open_counts, 1), 4),
            "differ": worst,
        }
    return found


def is_tie(
    seam: Seam, model: Judge, kernel: SortKernel, one: Difference, seconds: float, *, captured: bool
) -> bool:
    """Do all of the chosen take the same, alone to within the margin, or by the whole step?"""
    num_tokens = one.counts[len(one.counts) // 2]
    some = replace(kernel, candidates=tuple(c for c in kernel.candidates if c.name in one.chosen))
    situations = [s for s in model.timer.situations if (s == CAPTURED) == captured]
    train = inputs_of(model.sizes.shape, num_tokens, CALLS, seam.device)
    alone = interleave(samplers(model.timer, situations[0], some, train), seconds / 4)
    apart = [longer(alone[a], alone[b]).mean for a, b in itertools.permutations(alone, 2)]
    if max(apart) <= Plan().rule.margin:
        return True
    with model:
        for situation in situations:
            us = model.times(situation, num_tokens, some.candidates, seconds, one.chosen)
            if any(longer(us[a], us[b]).is_clear for a, b in itertools.combinations(us, 2)):
                return False
    return True


def dense(last: int) -> list[int]:
    """Counts from 1 to the last, PER_OCTAVE to a doubling."""
    steps = range(PER_OCTAVE * last.bit_length())
    return sorted({min(round(2 ** (i / PER_OCTAVE)), last) for i in steps})


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default=MODELS, help="known models, separated by commas")
    parser.add_argument("--kernel", choices=KERNELS, default="auto", help="whose seam [auto]")
    parser.add_argument("--buckets", type=int, default=500, help="A/A buckets [500]")
    parser.add_argument("--repeats", type=int, default=4, help="calibrations a shape [4]")
    parser.add_argument("--max-tokens", type=int, default=8192, help="largest batch [8192]")
    parser.add_argument("--budget", type=float, default=Plan().budget_s, help="seconds a table")
    parser.add_argument("--seconds", type=float, default=0.2, help="of judging a tie [0.2]")


def run(args: argparse.Namespace) -> dict[str, Any]:
    seam = open_seam(args.kernel)
    captured = [n for n in CAPTURE_SIZES if n <= args.max_tokens] if seam.on_gpu else []
    shapes = {}
    for name in args.models.split(","):
        sizes = layer_sizes(find_model(name), TENSOR_PARALLEL, 32, seam.dtype)
        calls = sort_calls(seam, sizes.shape)
        (seen,) = see(seam, sizes.shape, calls, (1, 2), captured, args.max_tokens)
        shapes[name] = sizes, seen
    found = a_a([seen for _, seen in shapes.values()], args.buckets, Plan(budget_s=args.budget))
    progress(f"identical candidates: {found}")
    repeated: dict[str, Any] = {}
    for name, (sizes, seen) in shapes.items() if args.repeats > 1 else ():
        model = Judge(seam, sizes, args.max_tokens, LAYERS, 0)
        repeated[name] = {
            sorts: repeatability(seam, model, seen, sorts, args.repeats, args)
            for sorts in (POLICIES, ALL)
        }
        progress(f"{name}: {repeated[name]}")
    return {**stamp(seam.device), "kernel": seam.name, **found, "repeats": args.repeats,
            "repeatability": repeated}  # fmt: skip


if __name__ == "__main__":
    main(__doc__, add_options, run)
