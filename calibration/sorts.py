"""Every sort that can run here, side by side: us a call, and over the best policy of AITER's.

Replayed from a graph, and eager with the host ahead; uniform and skewed routing in turn. `--against
FILE` puts times that others took beside them: a CSV of calibration/recorded/, or one like it, with
the columns model (or experts and topk), tokens, and NAME_us, or implementation, policy, mode and
time_us.
"""

import argparse
import csv
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptive_moe.kernels import SortKernel
from adaptive_moe.kernels.contract import SortingInputs
from adaptive_moe.models import Model, find_model
from calibration.interleaved import interleave
from calibration.record import counts, main, progress, stamp
from calibration.seams import KERNELS, Seam, open_seam, see, sort_calls, without_wrong
from calibration.timing import CAPTURED, HOST_AHEAD, Timer, inputs_of

# Those of calibration/recorded/sort_implementations_h100.csv.
MODELS = "mixtral-8x7b,qwen3-235b,gpt-oss-120b,deepseek-v3,kimi-k2-fused,qwen3-next-80b"
COUNTS = "1,2,4,8,12,16,24,32,48,64,96,128,192,256,384,512,1024,2048,4096,8192,16384"
# A sort this many times slower than the fastest is looked at twice and timed no further.
FAR_BEHIND = 6.0
# Calls in a sample; fewer of large batches, of which one is long enough.
CALLS, LARGE, INSTANCES = 8, 2048, 2
# Modes of a CSV, and the situation that they come nearest to. Others are skipped.
MODES = {"": CAPTURED, "graph": CAPTURED, "eager": HOST_AHEAD, "events": HOST_AHEAD}

Recorded = tuple[Mapping[str, str], str, str, float]


def sweep(
    seam: Seam, model: Model, options: argparse.Namespace, recorded: Sequence[Recorded]
) -> dict[str, Any]:
    """Times and ratios of every sort of one model, by situation and count."""
    shape = model.shape(options.block_size, seam.dtype)
    # Of two tokens the hook can tell how long the baseline's buffers are.
    every = sorted({2, *options.counts})
    (seen,) = see(seam, shape, sort_calls(seam, shape), every, every if seam.on_gpu else ())
    timer = Timer(seam.device)
    left_out: dict[str, str] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for count in options.counts:
        train = inputs_of(shape, count, 2 if count > LARGE else CALLS, seam.device)
        kernel, wrong = without_wrong(seen.kernel, train[0])
        left_out |= {name: f"at {count} tokens: {why}" for name, why in wrong.items()}
        for situation in (CAPTURED, HOST_AHEAD) if seam.on_gpu else timer.situations:
            us = times(timer, situation, kernel, train, options.seconds)
            us |= recorded_times(recorded, model, situation, count)
            best = min(time for name, time in us.items() if name.startswith("policy "))
            rows.setdefault(situation, []).append(
                {
                    "num_tokens": count,
                    "us": {name: round(time, 3) for name, time in us.items()},
                    "ratio": {name: round(time / best, 4) for name, time in us.items()},
                }
            )
    return {"shape": shape.describe(), "left_out": left_out, "situations": rows}


def times(
    timer: Timer,
    situation: str,
    kernel: SortKernel,
    train: Sequence[SortingInputs],
    seconds: float,
) -> dict[str, float]:
    """Each candidate's median us a call."""
    found = interleave(samplers(timer, situation, kernel, train), seconds, far_behind=FAR_BEHIND)
    return {name: statistics.median(us) / len(train) for name, us in found.items()}


def samplers(
    timer: Timer, situation: str, kernel: SortKernel, train: Sequence[SortingInputs]
) -> dict[str, Callable[[], float]]:
    """Of each candidate, in us for the whole train."""

    def all_of(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
        def run() -> None:
            for call in calls:
                call()

        run()  # compiles
        return run

    return {
        c.name: timer.sampler(situation, all_of([c.bind(i) for i in train]), INSTANCES)
        for c in kernel.candidates
    }


def read_times(path: Path) -> Iterator[Recorded]:
    """(row, name, situation, us) of each time in the file; ValueError where it has no such column
    or a time is no number."""
    with path.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    names = [c for c in (rows[0] if rows else ()) if c.endswith("_us") and c != "time_us"]
    if not rows or "tokens" not in rows[0] or not (names or "time_us" in rows[0]):
        raise ValueError(f"{path}: give a CSV with tokens, and NAME_us or time_us")
    for row in rows:
        situation = MODES.get(row.get("mode") or "")
        if situation is None or not row["tokens"]:
            continue
        for column in names:
            if row[column]:
                name = column.removesuffix("_us").replace("_", " ")
                yield row, name, situation, float(row[column])
        if row.get("time_us"):
            name = f"{row['implementation']} {row.get('policy') or ''}".strip()
            yield row, name, situation, float(row["time_us"])


def recorded_times(
    recorded: Sequence[Recorded], model: Model, situation: str, num_tokens: int
) -> dict[str, float]:
    """What was recorded of that model there, by name; it is known by experts and topk, or by its
    own name."""
    numbers = (str(model.num_experts), str(model.topk))

    def is_of(row: Mapping[str, str]) -> bool:
        given = (row.get("experts") or "", row.get("topk") or "")
        return given == numbers if any(given) else row["model"] == model.name

    return {
        f"recorded {name}": us
        for row, name, where, us in recorded
        if (where, row["tokens"]) == (situation, str(num_tokens)) and is_of(row)
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default=MODELS, help="known models, separated by commas")
    parser.add_argument("--kernel", choices=KERNELS, default="auto", help="whose seam [auto]")
    parser.add_argument("--counts", type=counts, default=COUNTS, help="such as 1,64,512")
    parser.add_argument("--block-size", type=int, default=32, help="rows of a GEMM tile [32]")
    parser.add_argument("--seconds", type=float, default=0.03, help="of sampling a point [0.03]")
    parser.add_argument("--against", type=Path, help="CSV of published or recorded times")


def run(args: argparse.Namespace) -> dict[str, Any]:
    recorded = list(read_times(args.against)) if args.against else []
    seam = open_seam(args.kernel)
    shapes: dict[str, Any] = {}
    for name in args.models.split(","):
        shapes[name] = sweep(seam, find_model(name), args, recorded)
        progress(f"{name}: measured")
    return {
        **stamp(seam.device),
        "kernel": seam.name,
        "against": args.against.name if args.against else None,
        "shapes": shapes,
    }


if __name__ == "__main__":
    main(__doc__, add_options, run)
