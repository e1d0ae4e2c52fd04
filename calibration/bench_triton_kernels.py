"""How fast the Triton sorts are: graph replays and eager calls, against zeroing moe_buf alone.

    python calibration/bench_triton_kernels.py --out calibration/results/triton_kernels.json

Needs a GPU. Every time is microseconds a call. A graph holds several calls with different inputs;
the policies take turns in every round, and the median over the rounds is reported. With
`--vllm-moe-so` (vLLM's `_moe_C*.so`, of a vLLM built for the installed torch) its
`moe_align_block_size` is timed beside them, and with `--sglang-align` (SGLang's
`moe_align_small_numel.py`) its small Triton sort; neither zeroes a buffer nor carries weights, so
they are compared with sorts called with `accumulate=False`. `--against` takes recorded times of
other sorts (CSV: model as in SHAPES, tokens, columns that end in `_us`) and prints what ours take
of the best of them, best against best. The committed run used vLLM 0.23.0's
library, built for torch 2.11, and SGLang 0.5.23's file, both as shipped.
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
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from adaptive_moe.kernels.triton_sort import moe_sorting

SHAPES = {  # experts, topk, width of moe_buf
    "mixtral": (8, 2, 4096),
    "qwen3-235b": (128, 8, 4096),
    "gpt-oss": (128, 4, 2880),
    "dsv3": (256, 8, 7168),
    "kimi-shared": (385, 9, 7168),
    "qwen3-next": (512, 10, 2048),
}
TOKENS = [
    1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192, 16384
]  # fmt: skip
BLOCK_SIZE = 32
CALLS = 16  # calls in one graph or one eager train
ROUNDS = 15
Call = Callable[[torch.Tensor, torch.Tensor], object]


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


def capture(
    call: Call, inputs: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> torch.cuda.CUDAGraph:
    """CALLS calls, the inputs in rotation, as one graph; compiled and warmed before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(*inputs[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            call(*inputs[i % len(inputs)])
    return graph


def interleaved(bodies: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Microseconds a call of each body (CALLS calls long); all take turns in every round."""
    samples: dict[str, list[float]] = {name: [] for name in bodies}
    names = list(bodies)
    for round_ in range(rounds + 2):
        events = {}
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            bodies[name]()
            end.record()
            events[name] = (start, end)
        torch.cuda.synchronize()
        if round_ >= 2:
            for name, (start, end) in events.items():
                samples[name].append(start.elapsed_time(end) * 1e3 / CALLS)
    return {name: round(statistics.median(values), 2) for name, values in samples.items()}


def sort_call(policy: int, shape: tuple[int, int, int], *, accumulate: bool = True) -> Call:
    num_experts, _, model_dim = shape

    def call(ids: torch.Tensor, weights: torch.Tensor) -> object:
        return moe_sorting(
            ids, weights, num_experts, model_dim, torch.bfloat16, BLOCK_SIZE,
            dispatch_policy=policy, accumulate=accumulate,
        )  # fmt: skip

    return call


def zero_call(model_dim: int) -> Call:
    def call(ids: torch.Tensor, _: torch.Tensor) -> object:
        return torch.empty(len(ids), model_dim, dtype=torch.bfloat16, device="cuda").zero_()

    return call


def align_buffers(numel: int, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    length = numel + num_experts * (BLOCK_SIZE - 1)
    sizes = (length, -(-length // BLOCK_SIZE), 2)
    a, b, c = (torch.empty(size, dtype=torch.int32, device="cuda") for size in sizes)
    return a, b, c


def vllm_call(num_experts: int) -> Call:
    def call(ids: torch.Tensor, _: torch.Tensor) -> object:
        sorted_ids, experts, total = align_buffers(ids.numel(), num_experts)
        torch.ops._moe_C.moe_align_block_size(
            ids, num_experts, BLOCK_SIZE, sorted_ids, experts, total[:1], None
        )
        return sorted_ids, experts, total

    return call


def load_sglang(path: str) -> Callable[..., None]:
    """SGLang's file as shipped; of SGLang it needs one question about the GPU, answered here."""
    for name in ("sglang", "sglang.kernels", "sglang.kernels.jit", "sglang.kernels.jit.utils"):
        sys.modules.setdefault(name, types.ModuleType(name))
    utils: Any = sys.modules["sglang.kernels.jit.utils"]
    utils.is_arch_support_pdl = lambda: torch.cuda.get_device_capability()[0] >= 9
    spec = importlib.util.spec_from_file_location("moe_align_small_numel", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Callable[..., None] = module.moe_align_small_numel
    return function


def sglang_call(function: Callable[..., None], num_experts: int) -> Call:
    def call(ids: torch.Tensor, _: torch.Tensor) -> object:
        buffers = align_buffers(ids.numel(), num_experts)
        function(ids, num_experts + 1, BLOCK_SIZE, *buffers)
        return buffers

    return call


def measure(
    calls: dict[str, Call], inputs: list[tuple[torch.Tensor, torch.Tensor]], rounds: int
) -> dict[str, dict[str, float]]:
    graphs = {name: capture(call, inputs) for name, call in calls.items()}
    graph_us = interleaved({name: graph.replay for name, graph in graphs.items()}, rounds)
    for graph in graphs.values():
        graph.reset()

    def train(call: Call) -> Callable[[], None]:
        def body() -> None:
            for i in range(CALLS):
                call(*inputs[i % len(inputs)])

        return body

    eager_us = interleaved({name: train(call) for name, call in calls.items()}, rounds)
    return {"graph_us": graph_us, "eager_us": eager_us}


def read_recorded(path: Path) -> dict[tuple[str, int], float]:
    """(model, tokens) -> microseconds of the fastest other sort. Columns named ours_* are older
    times of these kernels and do not count."""
    with path.open(newline="") as file:
        return {
            (row["model"], int(row["tokens"])): min(
                float(value)
                for name, value in row.items()
                if name.endswith("_us") and not name.startswith("ours") and value
            )
            for row in csv.DictReader(file)
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vllm-moe-so", help="path of vLLM's _moe_C library")
    parser.add_argument("--sglang-align", help="path of SGLang's moe_align_small_numel.py")
    parser.add_argument("--against", type=Path, help="CSV of recorded times of other sorts")
    arguments = parser.parse_args()
    others: dict[str, str] = {"vllm": "not given", "sglang": "not given"}
    if arguments.vllm_moe_so:
        try:
            torch.ops.load_library(arguments.vllm_moe_so)
            others["vllm"] = "loaded"
        except OSError as error:
            others["vllm"] = str(error)
    sglang = None
    if arguments.sglang_align:
        sglang = load_sglang(arguments.sglang_align)
        others["sglang"] = "loaded"

    recorded = read_recorded(arguments.against) if arguments.against else {}
    began = time.time()
    rows = []
    for (model, shape), num_tokens in itertools.product(SHAPES.items(), TOKENS):
        num_experts, topk, model_dim = shape
        inputs = [
            routing(kind, num_tokens, num_experts, topk, seed)
            for seed, kind in enumerate(("uniform", "skewed") * 2)
        ]
        calls = {
            "one_shot": sort_call(1, shape),
            "multi_phase": sort_call(2, shape),
            "zero": zero_call(model_dim),
            "one_shot_no_buf": sort_call(1, shape, accumulate=False),
            "multi_phase_no_buf": sort_call(2, shape, accumulate=False),
        }
        if others["vllm"] == "loaded":
            calls["vllm_align"] = vllm_call(num_experts)
        if sglang is not None and num_tokens * topk <= 64:  # where SGLang uses it
            calls["sglang_small"] = sglang_call(sglang, num_experts)
        row: dict[str, Any] = {
            "model": model, "num_experts": num_experts, "topk": topk, "model_dim": model_dim,
            "num_tokens": num_tokens, "routing": "uniform and skewed alternating",
            **measure(calls, inputs, ROUNDS if num_tokens <= 1024 else 5),
        }  # fmt: skip
        if (model, num_tokens) in recorded:
            graph = row["graph_us"]
            best = min(graph["one_shot"], graph["multi_phase"])
            row["of_the_recorded_best"] = round(best / recorded[model, num_tokens], 3)
        rows.append(row)
    result = {
        "command": "python calibration/bench_triton_kernels.py",
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "block_size": BLOCK_SIZE,
        "dtype": "bfloat16",
        "calls_a_graph": CALLS,
        "rounds": ROUNDS,
        "others": others,
        "against": arguments.against.name if arguments.against else None,
        "seconds": round(time.time() - began, 1),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print_table(rows)
    print(others, f"{result['seconds']} s")


def print_table(rows: list[dict[str, Any]]) -> None:
    print("model tokens | graph us: one-shot multi zero, of the recorded best | eager us: 1 2")
    for row in rows:
        graph, eager = row["graph_us"], row["eager_us"]
        print(
            f"{row['model']:11s} {row['num_tokens']:6d} | {graph['one_shot']:8.2f} "
            f"{graph['multi_phase']:7.2f} {graph['zero']:7.2f} "
            f"{row.get('of_the_recorded_best', '-'):>6} | "
            f"{eager['one_shot']:8.2f} {eager['multi_phase']:7.2f}"
        )


if __name__ == "__main__":
    main()
