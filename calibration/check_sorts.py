"""Is the sort that is chosen the one that is best, and does a step get shorter by what that saves?

The baseline is our own sort, made as slow as AITER's was measured to be (slowed.py), and our sorts
compete with it at their real speed: so they win and lose where they would. For each model, with
every sort competing:

    within_1pct     fraction of counts at which the table's choice takes at most 1% longer than the
                    best candidate by an oracle of its own, half of which names who is best, and
                    the other half what that takes
    got_of_promised what a step with the table got shorter by, over what the oracle's times of the
                    sort alone promise, both summed over the counts

    PYTHONPATH=. python3 calibration/check_sorts.py --out calibration/results/check_sorts.json

With `--seconds 60` every model gets its share of them: fewer counts, then fewer steps, and the
result names what was left out.
"""

import argparse
import functools
import gc
import itertools
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from adaptive_moe.cli.bench.layer import Step, layer_sizes
from adaptive_moe.cli.bench.oracle import measure_oracle
from adaptive_moe.cli.bench.seams import kernel_at, seam_of
from adaptive_moe.cli.bench.step import judge_model
from adaptive_moe.kernels import load_kernel
from adaptive_moe.models import Model, find_model
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.situation import Situation
from adaptive_moe.settings import read_settings
from adaptive_moe.tuning.calibrator import Plan, calibrate
from calibration import record
from calibration.slowed import slowed_seam
from calibration.sorts_figures import MEANING, figures, oracle_row, overall, promise

MODELS = "mixtral-8x7b,gpt-oss-120b,deepseek-v3,qwen3-next-80b"
CAPTURED = (*range(1, 9), *range(12, 33, 4), *range(48, 129, 16), *range(160, 513, 32))
EAGER = (600, 768, 1024, 1500, 2048, 3000, 4096)
# Steps, what matters most first: the last are left out first.
STEP_CAPTURED, STEP_EAGER = (1, 64, 16, 256, 4, 128, 32, 512), (2048, 768, 4096)
A_LOT = 8  # counts that the oracle measures between two looks at the time
ORACLE_PART = 0.5  # of the time that is left after calibrating; the rest is for the steps
STEP_S, POINT_S = 4.0, 0.3  # seconds, besides sampling


def lots(counts: Sequence[int], first: Sequence[int]) -> list[list[int]]:
    """The counts in lots: those of the steps first, then the others, each lot all over them."""
    rest = [count for count in counts if count not in first]
    number = max(1, len(rest) // A_LOT)
    return [sorted(first), *(lot for i in range(number) if (lot := rest[i::number]))]


def affordable(
    seconds: float, sampling: float, *, on_gpu: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Captured and eager counts of the steps that so many seconds are enough for, by what they
    took on an H100: sampling, and besides it POINT_S a point and STEP_S for weights and tables."""
    captured, eager = STEP_CAPTURED if on_gpu else (), STEP_EAGER

    def cost() -> float:
        # Large steps are sampled for twice the time, and eager ones in two situations.
        some = len(captured) * (sampling + POINT_S)
        return STEP_S + some + 2 * len(eager) * (2 * sampling + POINT_S)

    while (captured or eager) and cost() > seconds:
        if len(captured) > 2 * len(eager):
            captured = captured[:-1]
        else:
            eager = eager[:-1]
    return captured, eager


@contextmanager
def timed(seconds: dict[str, float], part: str, now: Callable[[], float]) -> Iterator[None]:
    begun = now()
    yield
    seconds[part] = round(now() - begun, 1)


def check(
    kernel: str,
    model: Model,
    args: argparse.Namespace,
    end: float,
    now: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """One model's figures, of as many counts and steps as are done by `end`."""
    left_out: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    part = functools.partial(timed, seconds, now=now)
    with part("baseline"):
        seam = slowed_seam(kernel, model, args.block_size, args.scale, CAPTURED)
    shape = model.shape(args.block_size, seam.dtype)
    coverage = Coverage.up_to(shape, max(EAGER), CAPTURED).on(seam.device.type)
    rows: list[dict[str, Any]] = []
    oracle: dict[Situation, dict[int, Mapping[str, float]]] = {}
    with kernel_at(seam, coverage, args.sorts) as sorts:
        with part("calibration"):
            table = calibrate(sorts, coverage, Plan(budget_s=args.budget))
        sweeps = {Situation.GRAPH: (CAPTURED, STEP_CAPTURED), Situation.BUSY: (EAGER, STEP_EAGER)}
        if not coverage.captured:
            del sweeps[Situation.GRAPH]
        todo = [(situation, lot) for situation, some in sweeps.items() for lot in lots(*some)]
        todo.sort(key=lambda one: not set(one[1]) & {*STEP_CAPTURED, *STEP_EAGER})
        oracle_end = now() + ORACLE_PART * (end - now())
        with part("oracle"):
            for place, (situation, lot) in enumerate(todo):
                if place >= len(sweeps) and now() > oracle_end:
                    left_out.setdefault(f"oracle, {situation.value}", []).extend(lot)
                    continue
                for point in measure_oracle(sorts, shape, situation, lot, args.oracle_passes):
                    oracle.setdefault(situation, {})[point.num_tokens] = point.us
                    rows.append(oracle_row(table, situation, point))
    rows.sort(key=lambda row: (row["situation"] != Situation.GRAPH.value, row["num_tokens"]))
    captured, eager = affordable(end - now(), args.sampling, on_gpu=seam.on_gpu)
    missing = {*(STEP_CAPTURED if seam.on_gpu else ()), *STEP_EAGER} - {*captured, *eager}
    if missing:
        left_out["step"] = sorted(missing)
    judged: dict[str, Any] = {}
    if captured or eager:
        settings = {"ADAPTIVE_MOE_SORTS": args.sorts, "ADAPTIVE_MOE_BUDGET_S": str(args.budget)}
        with part("step"):
            judged = judge_model(
                seam,
                layer_sizes(model, 8, args.block_size, seam.dtype),
                settings=read_settings(settings),
                captured=sorted(captured),
                eager=sorted(eager),
                layers=8,
                seconds=args.sampling,
            )["situations"]
    return {
        **figures(rows),
        "left_out_for_time": left_out,
        "seconds": seconds,
        **promise(judged, oracle),
        "oracle": rows,
        "step": judged,
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default=MODELS, help="models of the recorded times")
    parser.add_argument("--kernel", default="triton", help="cpu is a rehearsal [triton]")
    parser.add_argument("--sorts", default="all", help="as ADAPTIVE_MOE_SORTS [all]")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--scale", type=float, default=1.0, help="of the recorded times [1]")
    parser.add_argument("--budget", type=float, default=1.5, help="seconds a calibration [1.5]")
    parser.add_argument("--oracle-passes", type=int, default=16)
    parser.add_argument("--sampling", type=float, default=0.35, help="seconds a step [0.35]")
    parser.add_argument(
        "--seconds", type=float, default=math.inf,
        help="for all models: what does not fit is left out, and named [no end]",
    )  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    begun = time.monotonic()
    end = begun + args.seconds
    names = args.models.split(",")
    models = [find_model(name) for name in names]
    device = load_kernel(args.kernel).device
    if device.type == "cuda":
        compile_all(args.kernel, models, args.block_size)
    shapes: dict[str, dict[str, Any]] = {}
    for place, model in enumerate(models):
        left = end - time.monotonic()
        if left <= 0:
            shapes[model.name] = {"left_out_for_time": "all"}
            continue
        share = time.monotonic() + left / (len(models) - place)
        try:
            shapes[model.name] = check(args.kernel, model, args, share)
            print(f"{model.name}: {shapes[model.name]['seconds']}", file=sys.stderr, flush=True)
        except RuntimeError as error:  # out of memory, or no table: it costs this model only
            shapes[model.name] = {"failed": f"{type(error).__name__}: {error}"}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {
        **record.stamp(device),
        "meaning": MEANING,
        "seconds": round(time.monotonic() - begun, 1),
        "overall": overall(shapes),
        "shapes": shapes,
    }


def compile_all(kernel: str, models: Sequence[Model], block_size: int) -> None:
    """Every kernel of the models, by a process each: one after the other would take longer than
    what is measured."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(len(models)) as pool:
        pool.map(compile_one, [(kernel, model.name, block_size) for model in models], chunksize=1)


def compile_one(job: tuple[str, str, int]) -> None:
    kernel, model, block_size = job
    seam = seam_of(kernel)
    sizes = layer_sizes(find_model(model), 8, block_size, seam.dtype)
    step = Step(sizes, max(EAGER), seam.device)
    for policy, num_tokens in itertools.product((1, 2), (1, max(EAGER))):
        step.run(num_tokens, 1, seam.experts(sizes.shape, policy))
    torch.cuda.synchronize()


if __name__ == "__main__":
    record.main(__doc__, add_options, run)
