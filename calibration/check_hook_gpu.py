"""The hook on a GPU: the stand-in for AITER with the Triton sort, in eager calls and in graphs.

    python calibration/check_hook_gpu.py --out calibration/results/hook_gpu.json

Checks, and exits with 1 where one fails: seeing shapes allocates nothing; a captured call takes the
graph array and an eager one the eager array; replays are exact for every captured size, with other
routing than was captured; a warm-up asked for during capture refuses, and the capture survives; our
own sort, offered beside the policies, serves from eager calls and from graphs, and where it raises
the baseline answers; where there are two GPUs, layers on both are told apart.
Measures: the warm-up's time and memory (torch's own counters), and what the hook costs a call.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
from collections import deque
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from adaptive_moe.engines.hook import AiterHook
from adaptive_moe.engines.warm_up import warm_up
from adaptive_moe.report.text import headline
from adaptive_moe.settings import Mode, Settings
from calibration import bench_hook
from calibration.check_hook_sorts import check_other_sorts, check_two_gpus
from calibration.hooked_layer import (
    CAPTURE_SIZES,
    EXPERTS,
    MAX_TOKENS,
    MODEL_DIM,
    TOPK,
    Checks,
    Layer,
)
from calibration.record import stamp
from tests.aiter_standin.load import load_aiter

EAGER_COUNTS = (1, 7, 64, 500, 4096, MAX_TOKENS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds a shape [1.0]")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("check_hook_gpu: torch sees no GPU here; run it on a machine with one")
        return 2
    checks = Checks()
    aiter = load_aiter("main")
    with tempfile.TemporaryDirectory() as cache:
        hook = AiterHook(Settings(mode=Mode.AUTO, budget_s=options.budget, cache_dir=cache))
        see_shapes(aiter, hook, checks)
        warmed = measure_warm_up(hook, checks)
        again = measure_warm_start(hook, checks)
        (table,) = hook.tables.values()
        graphs = check_graphs(aiter, hook, table, checks)
        check_eager(aiter, hook, table, checks)
        check_refusal(aiter, hook, checks)
        check_other_sorts(aiter, hook, checks)
        check_two_gpus(aiter, hook, checks)
    result = {
        **stamp(torch.device("cuda", torch.cuda.current_device())),
        "capture_sizes": len(CAPTURE_SIZES),
        "max_tokens": MAX_TOKENS,
        "gpus": torch.cuda.device_count(),
        "decided": headline(table),
        **warmed,
        **again,
        **graphs,
        "hook": hook_cost(),
        "checks": checks.done,
        "failed": checks.failed,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    return 1 if checks.failed else 0


def see_shapes(aiter, hook: AiterHook, checks: Checks) -> None:
    """The engine's profile run: its memory is accounted for, so seeing must not add to it."""
    layer = Layer(aiter.fused_moe, MAX_TOKENS)
    layer()  # compiles the sort
    plain = memory_of(layer)
    hook.install(aiter)
    layer.fused_moe = aiter.fused_moe
    seen = memory_of(layer)
    checks.that("seeing shapes allocates nothing", plain == seen, (plain, seen))
    checks.that("the shape was seen", len(hook.seen) == 1, hook.seen)


def memory_of(call) -> tuple[int, int]:
    """(peak above what was allocated, what stays allocated) of one call, in bytes."""
    gc.collect()
    torch.cuda.synchronize()
    latest_outputs().clear()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    latest_outputs().clear()
    return peak, torch.cuda.memory_allocated() - before


def latest_outputs() -> deque:
    """The outputs of the latest sort, which the stand-in holds; see its sort.py."""
    return sys.modules["aiter.sort"].latest


def latest_call():
    """How the latest call arrived at the sort itself."""
    return sys.modules["aiter.sort"].calls[-1]


def measure_warm_up(hook: AiterHook, checks: Checks) -> dict[str, object]:
    """Measure twice: the first time the sort's kernels are compiled, too."""
    hook.settings = replace(hook.settings, recalibrate=True)
    buffers = one_call_bytes(hook.layer.seam)
    first = warm_up(hook, MAX_TOKENS, CAPTURE_SIZES)
    hook.drop_tables()
    latest_outputs().clear()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    # The stand-in itself must not hold on to outputs while they are counted.
    sort = sys.modules["aiter.sort"]
    kept, sort.latest = sort.latest, deque(maxlen=0)
    made = warm_up(hook, MAX_TOKENS, CAPTURE_SIZES)
    sort.latest = kept
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    latest_outputs().clear()
    gc.collect()
    torch.cuda.empty_cache()
    after = torch.cuda.memory_allocated()
    checks.that("one shape was calibrated", len(made.tables) == 1, made.problems)
    checks.that("memory is back where it was", after == before, (before, after))
    return {
        "warm_up_seconds": round(made.seconds, 3),
        "warm_up_seconds_with_compilation": round(first.seconds, 3),
        "one_call_bytes": buffers,
        "warm_up_peak_bytes": extra,
        "extra_memory_ratio": round(extra / buffers, 3),
        "allocated_before_and_after": [before, after],
        "reserved_before_and_after": [reserved, torch.cuda.memory_reserved()],
    }


def measure_warm_start(hook: AiterHook, checks: Checks) -> dict[str, object]:
    """Warm up as the next start would: the table is stored, so nothing is sorted."""
    hook.settings, measured = replace(hook.settings, recalibrate=False), hook.tables
    hook.drop_tables()
    sorted_before = len(sys.modules["aiter.sort"].calls)
    made = warm_up(hook, MAX_TOKENS, CAPTURE_SIZES)
    checks.that("a warm start sorts nothing", len(sys.modules["aiter.sort"].calls) == sorted_before)
    checks.that("and has the stored table", hook.tables == measured, made.problems)
    return {"warm_start_seconds": round(made.seconds, 4)}


def one_call_bytes(seam) -> int:
    """What one sort of the largest batch takes: its inputs, and what it allocates."""
    ids = torch.zeros((MAX_TOKENS, TOPK), dtype=torch.int32, device="cuda")
    weights = torch.zeros((MAX_TOKENS, TOPK), device="cuda")
    peak, _ = memory_of(lambda: seam(ids, weights, EXPERTS, MODEL_DIM, torch.bfloat16))
    return peak + ids.nbytes + weights.nbytes


def check_graphs(aiter, hook: AiterHook, table, checks: Checks) -> dict[str, object]:
    """Capture every size through the hook; replay each with three other routings."""
    ratios = []
    for size in CAPTURE_SIZES:
        layer = Layer(aiter.fused_moe, size)
        graph, outputs = capture(layer)
        call = latest_call()
        expected = policy_at(table, size, captured=True)
        checks.that("a captured call takes the graph array", call.captured, size)
        checks.that(
            "with the graph array's policy", call.policy == expected, (size, call.policy, expected)
        )
        counted = hook.counts()
        for seed in (1, 2, 3):
            layer.route(seed)
            for output in outputs:
                output.fill_(-1)
            graph.replay()
            torch.cuda.synchronize()
            checks.that("a replay is exact", not layer.problems(outputs), layer.problems(outputs))
        checks.that("a replay does not pass the hook", hook.counts() == counted, size)
        if size in (1, 64, 512):
            hook.uninstall()
            plain, _ = capture(layer, policy=expected)
            hook.install(aiter)
            ratios.append(replay_ratio(graph, plain))
    return {"replay_ratio_hooked_to_plain": ratios}


def capture(layer: Layer, policy: int = 0):
    """The graph of one call, and the sort's outputs in it."""
    layer.fused_moe = sys.modules["aiter.fused_moe"].fused_moe
    layer(policy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(policy)
    return graph, latest_outputs()[0]


def replay_ratio(one, other, rounds: int = 50, replays: int = 20) -> float:
    """Median ratio of replay times, in turn."""
    ratios = []
    for _ in range(rounds):
        times = []
        for graph in (one, other):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        ratios.append(times[0] / times[1])
    return round(statistics.median(ratios), 4)


def check_eager(aiter, hook: AiterHook, table, checks: Checks) -> None:
    for count in EAGER_COUNTS:
        layer = Layer(aiter.fused_moe, count)
        layer()
        call, expected = latest_call(), policy_at(table, count)
        checks.that("with the eager array's policy", call.policy == expected, (count, call))
        problems = layer.problems(latest_outputs()[0])
        checks.that("an eager call is exact", not problems, (count, problems))


def check_refusal(aiter, hook: AiterHook, checks: Checks) -> None:
    """A warm-up in the middle of a capture: nothing may run, and the capture must hold."""
    known = Layer(aiter.fused_moe, 64)
    Layer(aiter.fused_moe, 64, model_dim=1024)()  # a shape without a table yet
    known()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = warm_up(hook, 128, (1, 64))
        known()
    outputs = latest_outputs()[0]
    refused = bool(made.problems) and "being captured" in made.problems[0]
    checks.that("a warm-up during capture refuses", refused and not made.tables, made)
    known.route(5)
    graph.replay()
    torch.cuda.synchronize()
    checks.that("and the capture survives", not known.problems(outputs), known.problems(outputs))
    later = warm_up(hook, 128, (1, 64))
    checks.that("and a later warm-up works", len(later.tables) == 1, later.problems)


def policy_at(table, count: int, *, captured: bool = False) -> int:
    """The policy that the stand-in's sort must see."""
    return int(table.candidate(count, captured=captured).removeprefix("policy "))


def hook_cost() -> dict[str, object]:
    parser = argparse.ArgumentParser()
    bench_hook.add_options(parser)
    cost = bench_hook.run(parser.parse_args([]))
    return {name: value for name, value in cost.items() if name not in stamp()}


if __name__ == "__main__":
    sys.exit(main())
