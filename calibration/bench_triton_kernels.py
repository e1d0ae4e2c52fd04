"""How fast the Triton sorts are: graph replays, against AITER's Opus kernels and against zeroing.

    python -m calibration.bench_triton_kernels --out calibration/results/triton_kernels.json

Needs a GPU. Every time is microseconds a call. A graph holds several calls with different inputs,
uniform and skewed routing alternating; all take turns in every round, and the median over the
rounds is reported. Beside the sorts stands zeroing moe_buf alone, and from 3,000 tokens on zeroing
it in three launches, and sorting without it. `--against` are recorded times of Opus on the same
kind of GPU (CSV: shape, M, and p0, p1, p2 for AITER's dispatch policies), compared best against
best. `--earlier` is a folder with the modules triton_*.py of an earlier commit: they
take turns with these, also in the host's time of an eager call. `--plot` draws the ratios.
"""

import argparse
import csv
import importlib.util
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from adaptive_moe.kernels import triton_parts, triton_sort
from calibration import record

SHAPES = {  # experts, topk, width of moe_buf
    "mixtral": (8, 2, 4096),
    "qwen3-235b": (128, 8, 4096),
    "gpt-oss-120b": (128, 4, 2880),
    "dsv3": (256, 8, 7168),
    "kimi-k2": (384, 8, 7168),
    "qwen3-next": (512, 10, 2048),
    "160/6": (160, 6, 5120),
    "64/6": (64, 6, 2048),
    "72/4": (72, 4, 3072),
    "16/1": (16, 1, 5120),
    "257/9": (257, 9, 7168),
    "512/22": (512, 22, 2048),
}
TOKENS = [
    1, 2, 3, 5, 7, 8, 12, 16, 20, 24, 32, 40, 64, 96, 200, 384, 512, 768, 1500, 3000, 8192, 16384
]  # fmt: skip
RANGES = {
    "1 to 8": (1, 8), "12 to 40": (12, 40), "64 to 384": (64, 384), "from 512 on": (512, 1 << 30)
}  # fmt: skip
HOST_TOKENS = (1, 16, 200)
# Each imports those before it.
PARTS = ("triton_parts", "triton_kernels", "triton_launches", "triton_sort")
BLOCK_SIZE = 32
CALLS = 16  # calls in one graph
ROUNDS = 15
HOST_CALLS = 300
Call = Callable[[torch.Tensor, torch.Tensor], object]
Inputs = Sequence[tuple[torch.Tensor, torch.Tensor]]


@triton.jit
def zero_kernel(buffer, size, first, end, TILE: triton.language.constexpr):  # noqa: N803
    step = triton.language.num_programs(0)
    triton_parts.zero(buffer, size, first + triton.language.program_id(0), end, step, TILE)


def routing(
    kind: str, num_tokens: int, num_experts: int, topk: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """topk_ids int32 and topk_weights float32, both [num_tokens, topk], on the GPU.

    uniform: every set of experts is as likely; skewed: popularity falls with rank as a trained
    router's does (a Zipf law of exponent 0.8, ranks shuffled). A token's experts are distinct.
    """
    generator = torch.Generator("cuda").manual_seed(seed)
    noise = torch.rand(num_tokens, num_experts, device="cuda", generator=generator)
    gumbel = -torch.log(-torch.log(noise.clamp(1e-9, 1 - 1e-7)))
    if kind == "skewed":
        rank = torch.randperm(num_experts, device="cuda", generator=generator) + 1
        gumbel -= 0.8 * rank.log()
    scores, ids = gumbel.topk(topk, dim=1)
    return ids.int().contiguous(), torch.softmax(scores, 1).float().contiguous()


def capture(call: Call, inputs: Inputs) -> torch.cuda.CUDAGraph:
    """CALLS calls, the inputs in rotation, as one graph; compiled and warmed before."""
    call(*inputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            call(*inputs[i % len(inputs)])
    return graph


def replayed(calls: dict[str, Call], inputs: Inputs, rounds: int) -> dict[str, float]:
    """Microseconds of each call in graph replay; all take turns in every round."""
    graphs = {name: capture(call, inputs) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for round_ in range(rounds + 2):
        events = {}
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graphs[name].replay()
            end.record()
            events[name] = (start, end)
        torch.cuda.synchronize()
        if round_ >= 2:
            for name, (start, end) in events.items():
                samples[name].append(start.elapsed_time(end) * 1e3 / CALLS)
    for graph in graphs.values():
        graph.reset()
    return {name: round(statistics.median(values), 3) for name, values in samples.items()}


def enqueued(calls: dict[str, Call], inputs: Inputs, rounds: int) -> dict[str, float]:
    """Microseconds that the host takes to enqueue each call; all take turns in every round."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            for i in range(HOST_CALLS):
                call(*inputs[i % len(inputs)])
            samples[name].append((time.perf_counter() - began) / HOST_CALLS * 1e6)
    return {name: round(statistics.median(values), 2) for name, values in samples.items()}


def sort_call(
    sort: Callable[..., object], policy: int, shape: tuple[int, int, int], **options: bool
) -> Call:
    num_experts, _, model_dim = shape
    arguments = (num_experts, model_dim, torch.bfloat16, BLOCK_SIZE, None, None, policy)
    return lambda ids, weights: sort(ids, weights, *arguments, **options)


def zero_call(model_dim: int, launches: int = 1) -> Call:
    """Zeroes moe_buf alone, with twice as many programs as an H200 has multiprocessors."""

    def call(ids: torch.Tensor, _: torch.Tensor) -> object:
        buffer = torch.empty(len(ids), model_dim, dtype=torch.bfloat16, device="cuda")
        tile = triton_sort.TUNING.fill_tile
        tiles = -(-buffer.numel() // tile)
        for i in range(launches):
            first, end = tiles * i // launches, tiles * (i + 1) // launches
            zero_kernel[(264,)](buffer, buffer.numel(), first, end, tile)
        return buffer

    return call


def load_earlier(folder: Path) -> Callable[..., object]:
    """moe_sorting of the files in that folder, which are left under other names."""
    kept = dict(sys.modules)
    try:
        for part in PARTS:
            path = folder / f"{part}.py"
            if path.exists():
                spec = importlib.util.spec_from_file_location(f"earlier_{part}", path)
                assert spec is not None
                assert spec.loader is not None
                module = importlib.util.module_from_spec(spec)
                sys.modules[f"earlier_{part}"] = module
                spec.loader.exec_module(module)
                sys.modules[f"adaptive_moe.kernels.{part}"] = module
    finally:
        for part in PARTS:
            name = f"adaptive_moe.kernels.{part}"
            sys.modules[name] = kept[name]
    sort: Callable[..., object] = module.moe_sorting
    return sort


def read_recorded(path: Path) -> dict[tuple[str, int], float]:
    """(shape, tokens) -> microseconds of Opus under its fastest policy."""
    with path.open(newline="") as file:
        return {
            (row["shape"], int(row["M"])): min(
                float(row[policy]) for policy in ("p0", "p1", "p2") if row[policy]
            )
            for row in csv.DictReader(file)
        }


def measure_row(
    name: str, num_tokens: int, earlier: Callable[..., object] | None
) -> dict[str, Any]:
    shape = SHAPES[name]
    num_experts, topk, model_dim = shape
    inputs = [
        routing(kind, num_tokens, num_experts, topk, seed)
        for seed, kind in enumerate(("uniform", "skewed") * 2)
    ]
    calls = {
        "one_shot": sort_call(triton_sort.moe_sorting, 1, shape),
        "multi_phase": sort_call(triton_sort.moe_sorting, 2, shape),
    }
    if earlier is not None and topk <= 16:
        if num_tokens * topk <= 8192:  # beyond, its time grows with the square
            calls["earlier_one_shot"] = sort_call(earlier, 1, shape)
        calls["earlier_multi_phase"] = sort_call(earlier, 2, shape)
    row: dict[str, Any] = {"shape": name, "tokens": num_tokens}
    if name == "dsv3" and num_tokens in HOST_TOKENS:
        row["host_us"] = enqueued(calls, inputs, ROUNDS)
    calls["zero"] = zero_call(model_dim)
    if num_tokens >= 3000:
        calls["zero_in_three"] = zero_call(model_dim, launches=3)
        calls["without_moe_buf"] = sort_call(triton_sort.moe_sorting, 2, shape, accumulate=False)
    row["graph_us"] = replayed(calls, inputs, ROUNDS if num_tokens <= 3000 else 7)
    return row


def worst_of_ranges(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found = {}
    for words, (first, last) in RANGES.items():
        ratios = sorted(
            (row["of_opus"], f"{row['shape']} at {row['tokens']}")
            for row in rows
            if "of_opus" in row and first <= row["tokens"] <= last
        )
        if ratios:
            found[words] = {
                "worst": ratios[-1][0], "where": ratios[-1][1],
                "median": round(statistics.median(ratio for ratio, _ in ratios), 3),
            }  # fmt: skip
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for name in SHAPES:
        mine = [row for row in rows if row["shape"] == name]
        compared = [row for row in mine if "of_opus" in row]
        tokens = [row["tokens"] for row in compared]
        axes[0].plot(tokens, [row["of_opus"] for row in compared], marker=".", label=name)
        axes[1].plot(
            [row["tokens"] for row in mine],
            [row["best_us"] / row["graph_us"]["zero"] for row in mine],
            marker=".",
        )
    axes[0].set_ylabel("our best sort / best Opus policy")
    axes[1].set_ylabel("our best sort / zeroing moe_buf alone")
    axes[1].set_ylim(bottom=0.9)
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--against", type=Path, help="CSV of recorded times of Opus")
    parser.add_argument("--earlier", type=Path, help="folder with the kernels of another commit")
    parser.add_argument("--plot", type=Path, help="draw the ratios here (.png)")
    arguments = parser.parse_args()
    earlier = load_earlier(arguments.earlier) if arguments.earlier else None
    recorded = read_recorded(arguments.against) if arguments.against else {}
    began, rows = time.time(), []
    for num_tokens, name in itertools.product(TOKENS, SHAPES):
        row = measure_row(name, num_tokens, earlier)
        graph = row["graph_us"]
        row["best_us"] = min(graph["one_shot"], graph["multi_phase"])
        if (name, num_tokens) in recorded:
            row["of_opus"] = round(row["best_us"] / recorded[name, num_tokens], 3)
        rows.append(row)
    result = {
        "command": "python -m calibration.bench_triton_kernels",
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "block_size": BLOCK_SIZE,
        "dtype": "bfloat16",
        "calls_a_graph": CALLS,
        "rounds": ROUNDS,
        "routing": "uniform and skewed alternating",
        "against": arguments.against.name if arguments.against else None,
        "shapes, [experts, topk, width of moe_buf]": SHAPES,
        "tuning": str(triton_sort.TUNING),
        "seconds": round(time.time() - began, 1),
        "of_opus": worst_of_ranges(rows),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(record.as_text(result) + "\n")
    if arguments.plot:
        draw(rows, arguments.plot)
    print(json.dumps(result["of_opus"], indent=1))
    for row in rows:
        if "host_us" in row or row["tokens"] in (1, 16384):
            print(row)
    print(f"{result['seconds']} s")


if __name__ == "__main__":
    main()
