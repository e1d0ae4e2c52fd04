"""What the hook at AITER's seam costs a call, and what the vLLM plugin costs when it is not asked.

    python calibration/bench_hook.py [--before COMMIT] [--out FILE]

The same empty seam, with the arguments that AITER's fused_moe passes, is called bare and hooked, in
turn, which leaves the hook's own time; then a real sort. On a GPU the tensors are there, so that
the question about stream capture is part of it where captured and eager calls differ. --before adds
the hook of a commit of this repository, in the same rounds.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from adaptive_moe.engines.hook import AiterHook
from adaptive_moe.engines.key import Key
from adaptive_moe.engines.seam import Layer
from adaptive_moe.engines.wrapper import SORT_ARGUMENTS, _around
from adaptive_moe.kernels.aiter import SEAM
from adaptive_moe.settings import Mode, Settings
from calibration.earlier_hook import hook_of
from calibration.record import main, stamp
from tests.tables import make_table

CHECKOUT = Path(__file__).resolve().parent.parent
# DeepSeek-V3's sort for a small decode batch, where a call is shortest.
TOKENS, EXPERTS, TOPK, MODEL_DIM, BLOCK_SIZE = 8, 256, 8, 7168, 32
BASELINE, POLICY, OTHER = "policy 0", "policy 2", "another sort"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Loop = Callable[[int], None]

_REGISTRATION = """
import json, sys, time
from adaptive_moe.engines import vllm
before = set(sys.modules)
times = []
for _ in range(101):
    start = time.perf_counter_ns()
    vllm.register()
    times.append((time.perf_counter_ns() - start) / 1e3)
heavy = sorted({"torch", "numpy", "aiter", "vllm"} & set(sys.modules))
print(json.dumps([sorted(times)[50], max(times), sorted(set(sys.modules) - before), heavy]))
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=200, help="interleaved rounds [200]")
    parser.add_argument("--calls", type=int, default=1000, help="calls a sample [1000]")
    parser.add_argument("--before", help="also the hook of this commit; needs git")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All figures, medians; nanoseconds a call where a name does not say otherwise."""
    rounds, calls, before = args.rounds, args.calls, args.before
    loops = {
        "unwrapped": _loop(_nothing),
        "stays": _loop(_hooked(_nothing, BASELINE)),
        "policy": _loop(_hooked(_nothing, POLICY)),
        "asks": _loop(_hooked(_nothing, POLICY, BASELINE)),
        "other": _loop(_hooked(_nothing, OTHER)),
        "unwrapped_other": _loop_of_leading(_nothing_else),
        "least": _loop(_least()),
    }
    with ExitStack() as stack:
        if before:
            loops["before"] = _loop(stack.enter_context(hook_of(before, _nothing)))
        times = _interleaved(loops, rounds, calls)
    real = _real_sort()
    sort = {"unwrapped": _loop(real, 2), "hooked": _loop(_hooked(real, POLICY))}
    sorts = _interleaved(sort, rounds, max(1, calls // 100))
    registered, registered_first, imported, heavy = _registration()

    def more(name: str, than: str = "unwrapped") -> float:
        pairs = zip(times[name], times[than], strict=True)
        return round(statistics.median(a - b for a, b in pairs), 1)

    return {
        **stamp(DEVICE),
        "processor": _processor(),
        "device": DEVICE.type,
        "rounds": rounds,
        "calls_a_sample": calls,
        "hook_ns": more("policy"),
        "hook_stays_ns": more("stays"),
        "hook_asks_about_capture_ns": more("asks"),
        **({"before": before, "before_hook_ns": more("before")} if before else {}),
        "other_sort_over_policy_ns": more("other", "policy"),
        "other_sort_over_calling_it_ns": more("other", "unwrapped_other"),
        "least_wrapper_over_calling_it_ns": more("least", "unwrapped_other"),
        "unwrapped_empty_seam_ns": round(statistics.median(times["unwrapped"]), 1),
        "unwrapped_sort_us": round(statistics.median(sorts["unwrapped"]) / 1e3, 2),
        "ratio_to_sort": round(
            statistics.median(
                h / u for h, u in zip(sorts["hooked"], sorts["unwrapped"], strict=True)
            ),
            4,
        ),
        "plugin_unset_us": round(registered, 3),
        "plugin_unset_worst_us": round(registered_first, 3),
        "plugin_unset_imports": imported,
        "plugin_unset_heavy_modules": heavy,
    }


def _nothing(
    topk_ids: Any,
    topk_weights: Any,
    num_experts: Any,
    model_dim: Any,
    moebuf_dtype: Any,
    block_size: Any = 32,
    expert_mask: Any = None,
    num_local_tokens: Any = None,
    dispatch_policy: Any = 0,
    return_local_topk_ids: Any = False,
    accumulate: Any = True,
    flat: Any = False,
    output_aux: Any = False,
) -> Any:
    """AITER's seam, as on its main branch in August 2026, around nothing."""


def _nothing_else(*leading: Any) -> Any:
    """Another sort, around nothing, as kernels/sorts.py makes them."""


_LEAST = """
def moe_sorting({heads}):
    return _choices[_array[topk_ids.shape[0]]]({sort_arguments})
"""


def _least() -> Callable[..., Any]:
    """What no wrapper in Python can do without: take the call, look its token count up, call."""
    module = ModuleType("aiter.fused_moe")
    setattr(module, SEAM, _nothing)
    scope = {"_choices": (None, _nothing_else), "_array": b"\1" * (TOKENS + 1)}
    return _around(Layer(module, threading.local()), _LEAST, {}, scope)


def _real_sort() -> Callable[..., Any]:
    if DEVICE.type == "cpu":
        from adaptive_moe.kernels.cpu_sort import moe_sorting
    else:
        from adaptive_moe.kernels.triton_sort import moe_sorting

    def sort(
        topk_ids: Any,
        topk_weights: Any,
        num_experts: Any,
        model_dim: Any,
        moebuf_dtype: Any,
        block_size: Any = 32,
        expert_mask: Any = None,
        num_local_tokens: Any = None,
        dispatch_policy: Any = 0,
        return_local_topk_ids: Any = False,
        accumulate: Any = True,
        flat: Any = False,
    ) -> Any:
        return moe_sorting(
            topk_ids,
            topk_weights,
            num_experts,
            model_dim,
            moebuf_dtype,
            block_size,
            expert_mask,
            num_local_tokens,
            dispatch_policy,
            accumulate=accumulate,
        )

    return sort


def _hooked(seam: Callable[..., Any], eager: str, graph: str | None = None) -> Callable[..., Any]:
    """The seam behind a hook whose table says so."""
    module = ModuleType("aiter.fused_moe")
    setattr(module, SEAM, seam)
    hook = AiterHook(Settings(mode=Mode.AUTO))
    hook.install(module)
    device = -1 if DEVICE.type == "cpu" else torch.cuda.current_device()
    key = Key(
        *(EXPERTS, TOPK, MODEL_DIM, torch.bfloat16, BLOCK_SIZE),
        *(False, False, True, False, (), 0, device),
    )
    hook._sorts[key] = {OTHER: _nothing_else}
    names = (BASELINE, POLICY, OTHER)
    hook.set_tables(
        {
            key: make_table(
                {16384: names.index(eager)},
                None if graph is None else {16384: names.index(graph)},
                candidates=names,
            )
        }
    )
    return getattr(module, SEAM)  # type: ignore[no-any-return]


def _arguments() -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand((TOKENS, EXPERTS), generator=generator).argsort(1)[:, :TOPK]
    weights = torch.rand((TOKENS, TOPK), generator=generator).to(DEVICE)
    ids = ids.int().contiguous().to(DEVICE)
    return ids, weights, EXPERTS, MODEL_DIM, torch.bfloat16, BLOCK_SIZE, None, None


def _loop(seam: Callable[..., Any], policy: int = 0) -> Loop:
    ids, weights, experts, dim, dtype, block, mask, local_tokens = _arguments()

    def loop(calls: int) -> None:
        for _ in range(calls):
            seam(
                ids,
                weights,
                experts,
                dim,
                dtype,
                block,
                mask,
                local_tokens,
                policy,
                return_local_topk_ids=False,
                accumulate=True,
                flat=False,
            )

    return loop


def _loop_of_leading(sort: Callable[..., Any]) -> Loop:
    """Another sort called directly, as somebody would who has no hook."""
    ids, weights, experts, dim, dtype, block, mask, local_tokens = _arguments()
    assert len(SORT_ARGUMENTS) == 9

    def loop(calls: int) -> None:
        for _ in range(calls):
            sort(ids, weights, experts, dim, dtype, block, mask, local_tokens, True)

    return loop


def _interleaved(loops: Mapping[str, Loop], rounds: int, calls: int) -> dict[str, list[float]]:
    """Nanoseconds a call of each, one sample a round; who goes first rotates."""
    names = list(loops)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter_ns()
            loops[name](calls)
            spent = (time.perf_counter_ns() - start) / calls
            if DEVICE.type != "cpu":
                torch.cuda.synchronize()
            if number:  # the first round warms up
                times[name].append(spent)
    return times


def _registration() -> tuple[float, float, list[str], list[str]]:
    """Median and worst microseconds of register() with no variable set, in a process of its own,
    what that imported, and which heavy modules there are."""
    environ = {k: v for k, v in os.environ.items() if "DISPATCH_POLICY" not in k}
    environ["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", _REGISTRATION]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"register() failed in a fresh process:\n{done.stderr}")
    median, worst, imported, heavy = json.loads(done.stdout)
    return median, worst, imported, heavy


def _processor() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text("utf-8"))
    return found[1] if found else ""


if __name__ == "__main__":
    main(__doc__, add_options, run)
