"""Every sort that can run here, side by side: times a call, and ratios to the best policy of the
baseline's backend, replayed from a graph and eager with the device busy.

`--against FILE` puts published or recorded times beside them: CSV with the columns model, tokens and
one `NAME_us` for each sort, as calibration/ keeps them.
"""

import argparse
import csv
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptive_moe.kernels import SortKernel
from adaptive_moe.kernels.contract import SortingInputs
from adaptive_moe.models import find_model
from adaptive_moe.policy.situation import Situation
from adaptive_moe.shape import SortingShape

MODELS = "mixtral-8x7b,qwen3-235b,gpt-oss-120b,deepseek-v3,kimi-k2-fused,qwen3-next-80b-fused"
COUNTS = (
    *(1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512),
    *(1024, 2048, 4096, 8192, 16384),
)
ROUNDS = 12
# A sort this many times slower than the fastest is looked at twice and timed no further.
FAR_BEHIND = 6.0


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default=MODELS, help="known models, separated by commas")
    parser.add_argument("--kernel", choices=("auto", "aiter", "triton", "cpu"), default="auto")
    parser.add_argument("--counts", default="", help="token counts, such as 1,64,512")
    parser.add_argument("--block-size", type=int, default=32, help="rows of a GEMM tile [32]")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"a point [{ROUNDS}]")
    parser.add_argument("--against", type=Path, help="CSV of published or recorded times")
    parser.add_argument("--plot", type=Path, help="also draw the first model here (.svg or .png)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from adaptive_moe.cli.bench import stamp
    from adaptive_moe.settings import parse_buckets

    counts = parse_buckets("--buckets", args.counts) or COUNTS
    others = read_times(args.against) if args.against else {}
    results: dict[str, Any] = {}
    device = None
    for name in args.models.split(","):
        kernel = every_sort(args.kernel, find_model(name).shape(args.block_size))
        device = kernel.device
        on_gpu = device.type == "cuda"
        situations = (Situation.GRAPH, Situation.BUSY) if on_gpu else (Situation.BUSY,)
        shape = find_model(name).shape(args.block_size)
        results[name] = {
            s.value: _sweep(kernel, shape, s, counts, args.rounds, others.get(name, {}))
            for s in situations
        }
        print("\n".join(table(name, results[name])), file=sys.stderr)
        if args.plot and len(results) == 1:
            draw(name, results[name], args.plot)
    return {**stamp(device), "against": str(args.against or ""), "shapes": results}


def every_sort(kernel: str, shape: SortingShape) -> SortKernel:
    """The kernel with every sort that this machine has for the shape, whoever made it."""
    from adaptive_moe.cli.bench.seams import open_seam

    return open_seam(kernel).kernel(shape, sorts=("all",))


def _sweep(
    kernel: SortKernel,
    shape: SortingShape,
    situation: Situation,
    counts: Sequence[int],
    rounds: int,
    others: Mapping[int, Mapping[str, float]],
) -> list[dict[str, Any]]:
    from adaptive_moe.tuning.clocks import TRAIN_LENGTH, clock_for
    from adaptive_moe.tuning.routing import Routing, default_mask, route, sorting_inputs

    clock = clock_for(situation, kernel.device)
    routings = (Routing.UNIFORM, Routing.SKEWED)
    tokens = [
        route(shape, max(counts), routings[i % 2], 2000 + i, kernel.device)
        for i in range(TRAIN_LENGTH[situation])
    ]
    mask = default_mask(shape, kernel.device)
    rows = []
    for count in counts:
        train = [sorting_inputs(shape, t, count, mask) for t in tokens]
        us = {**times(kernel, train, clock, rounds), **others.get(count, {})}
        rows.append(row(count, us, kernel))
    return rows


def times(
    kernel: SortKernel, train: Sequence[SortingInputs], clock: Any, rounds: int
) -> dict[str, float]:
    """Each candidate's median us a call, from interleaved rounds; a sort that fails is left out."""
    samplers = {}
    for candidate in kernel.candidates:
        try:
            candidate.bind(train[0])()  # compiles
            samplers[candidate.name] = clock.prepare([candidate.bind(i) for i in train])
        except (RuntimeError, ValueError) as error:
            print(f"{candidate.name} cannot run here: {error}", file=sys.stderr)
    first = {name: min(sample(), sample()) for name, sample in samplers.items()}
    live = [name for name in first if first[name] <= FAR_BEHIND * min(first.values())]
    found: dict[str, list[float]] = {name: [] for name in live}
    for number in range(rounds):
        order = live[number % len(live) :] + live[: number % len(live)]
        for name in order[::-1] if number // len(live) % 2 else order:
            found[name].append(samplers[name]())
    return first | {name: statistics.median(us) for name, us in found.items()}


def row(num_tokens: int, us: Mapping[str, float], kernel: SortKernel) -> dict[str, Any]:
    """One count: us of each sort, and over the best of the baseline's own policies."""
    policies = [c.name for c in kernel.candidates if c.name.startswith("policy ") and c.name in us]
    best = min(us[name] for name in policies)
    return {
        "num_tokens": num_tokens,
        "us": {name: round(time, 3) for name, time in us.items()},
        "ratio": {name: round(time / best, 4) for name, time in us.items()},
    }


def read_times(path: Path) -> dict[str, dict[int, dict[str, float]]]:
    """model -> tokens -> sort -> us; ValueError naming what the file lacks."""
    with path.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    if not rows or not {"model", "tokens"} <= rows[0].keys():
        raise ValueError(f"{path} has no columns model and tokens: give a CSV with NAME_us columns")
    found: dict[str, dict[int, dict[str, float]]] = {}
    for one in rows:
        known = found.setdefault(one["model"], {}).setdefault(int(one["tokens"]), {})
        for column, text in one.items():
            if column.endswith("_us") and text:
                known[column.removesuffix("_us")] = float(text)
    return found


def table(name: str, situations: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Aligned lines: us of each sort at each count, the fastest marked."""
    lines = []
    for situation, rows in situations.items():
        sorts = list(dict.fromkeys(sort for one in rows for sort in one["us"]))
        cells = [["tokens", *sorts]]
        for one in rows:
            fastest = min(one["us"], key=one["us"].get)
            cells.append(
                [
                    str(one["num_tokens"]),
                    *(
                        f"{one['us'][s]:.2f}{'*' if s == fastest else ' '}"
                        if s in one["us"]
                        else ""
                        for s in sorts
                    ),
                ]
            )
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        lines.append(f"{name}, {situation}: us a call, * the fastest")
        lines += [
            "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells
        ]
    return lines


def draw(name: str, situations: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Ratios to the best policy against tokens, a panel a situation."""
    from matplotlib.figure import Figure

    markers = "osD^vPX*<>"
    figure = Figure(figsize=(6.5 * len(situations), 4.5), layout="constrained")
    for index, (situation, rows) in enumerate(situations.items()):
        axes: Any = figure.add_subplot(1, len(situations), index + 1)
        sorts = list(dict.fromkeys(sort for one in rows for sort in one["ratio"]))
        for number, sort in enumerate(sorts):
            points = [(r["num_tokens"], r["ratio"][sort]) for r in rows if sort in r["ratio"]]
            axes.plot(
                *zip(*points, strict=True),
                marker=markers[number % len(markers)],
                ls=("-", "--", ":", "-.")[number % 4],
                ms=4,
                lw=1.2,
                label=sort,
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylim(0.3, 2.0)
        axes.set_xlabel("tokens")
        axes.set_ylabel("time over the best policy's")
        axes.set_title(f"{name}, {situation}", fontsize=10)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
