"""What the hook at AITER's seam adds to a call, in microseconds: the mean and its 95% interval.

step  inside a real eager step (layer.py), from an idle device and with the host ahead: a hooked
      layer against an unhooked copy that sorts by the same policy, interleaved. `stays`: the
      table keeps the baseline; `chooses`: it takes policy 2 for 0. `host`: the host's clock
      around a step's enqueueing
loop  the same calls of an empty function with AITER's parameters, one after the other. `asks`:
      captured and eager calls differ at that count, so the stream is asked as well
cold  the loop, with the processor's caches filled with something else before each call, as the
      rest of a layer does in a step
nothing to choose  such calls in the loop: flat, output_aux, an empty batch
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch

from adaptive_moe.hook.hook import AiterHook
from adaptive_moe.models import find_model
from adaptive_moe.settings import Mode, Settings
from calibration.interleaved import Interval, Sample, difference, interleave
from calibration.layer import Experts, Step, layer_sizes
from calibration.record import counts, main, progress, stamp
from calibration.seams import KERNELS, Seam, as_seam, open_seam
from calibration.timing import EAGER, Timer
from tests.tables import make_table

NAMES = ("policy 0", "policy 1", "policy 2")
LAST = 16384
CACHES = 32 << 20  # bytes: more than a core's own caches hold
COLD_CALLS = 50  # of a sample
SORT = "moe_sorting"
# What an unhooked layer passes, and what the table says of eager and of captured calls.
CASES = {
    "stays": (0, {LAST: 0}, None),
    "chooses": (2, {LAST: 2}, None),
    "asks": (2, {LAST: 2}, {LAST: 0}),
}


@contextmanager
def hooked(
    module: ModuleType,
    call: Callable[[], object],
    eager: Mapping[int, int],
    graph: Mapping[int, int] | None,
) -> Iterator[Callable[..., Any]]:
    """The hook's function at the seam of `module`, with a table for what `call` does there."""
    hook = AiterHook(Settings(mode=Mode.AUTO))
    if not hook.install(module):
        raise RuntimeError("the hook was not installed: the log says why")
    wrapper = getattr(module, SORT)
    try:
        call()
        hook.set_tables({key: make_table(eager, graph, candidates=NAMES) for key in hook.seen})
        yield wrapper
    finally:
        # Where the hook's own function is in place again, it is taken out for good.
        setattr(module, SORT, wrapper)
        hook.uninstall()


def of_step(seam: Seam, args: argparse.Namespace) -> dict[str, Any]:
    """By case, token count and way to time it: us a call that the hooked layers take longer."""
    sizes = layer_sizes(find_model(args.model), args.tensor_parallel, 32, seam.dtype)
    step, timer = Step(sizes, max(args.counts), seam.device), Timer(seam.device)
    bare = getattr(seam.module, SORT)
    found: dict[str, Any] = {}
    for case, (policy, eager, graph) in CASES.items():
        unhooked, baseline = (seam.experts(sizes.shape, p) for p in (policy, 0))
        every = partial(layers_of_each, step, args.counts, baseline)
        with hooked(seam.module, every, eager, graph) as wrapper:
            for num_tokens in args.counts:
                batch = (num_tokens, args.layers)
                runs = {
                    "bare": at(seam, bare, partial(step.run, *batch, unhooked)),
                    "hooked": at(seam, wrapper, partial(step.run, *batch, baseline)),
                }
                for run in runs.values():
                    run()  # compiles
                row = found.setdefault(case, {}).setdefault(str(num_tokens), {})
                for situation in [s for s in timer.situations if s in EAGER]:
                    samples = {n: timer.sampler(situation, run) for n, run in runs.items()}
                    row[situation] = added(samples, args.seconds, args.layers)
                if seam.on_gpu:
                    samples = {n: partial(timer.host_us, run) for n, run in runs.items()}
                    row["host"] = added(samples, args.seconds, args.layers)
        progress(f"{case}: {found[case]}")
    return found


def layers_of_each(step: Step, some: Sequence[int], experts: Experts) -> None:
    """A layer of every batch, for the hook to see."""
    for num_tokens in some:
        step.run(num_tokens, 1, experts)


def at(seam: Seam, sort: Callable[..., Any], run: Callable[[], object]) -> Callable[[], object]:
    """The run with that sort at the seam."""

    def switched() -> object:
        seam.module.moe_sorting = sort  # type: ignore[attr-defined]
        return run()

    return switched


def added(samples: Mapping[str, Sample], seconds: float, calls: int) -> dict[str, Any]:
    """us a call of `hooked` beyond `bare`, beside what `bare` takes."""
    times = interleave(samples, seconds)
    per_call = {name: [us / calls for us in some] for name, some in times.items()}
    return {
        **rounded(difference(per_call["hooked"], per_call["bare"])),
        "bare_us": round(sorted(per_call["bare"])[len(per_call["bare"]) // 2], 3),
    }


def rounded(one: Interval) -> dict[str, Any]:
    bounds = [round(x, 4) if abs(x) < 1e9 else None for x in (one.low, one.high)]
    return {"mean_us": round(one.mean, 4), "interval_us": bounds}


def of_loop(seam: Seam, seconds: float, calls: int) -> dict[str, Any]:
    """us a call that the hook adds to calls of a function that does nothing."""
    found: dict[str, Any] = {"calls": {}, "cold": {}, "nothing to choose": {}}
    for case, (_, eager, graph) in CASES.items():
        found["calls"][case] = loop_of(seam, eager, graph, {}, 8, seconds, calls)
        found["cold"][case] = loop_of(seam, eager, graph, {}, 8, seconds, COLD_CALLS, cold=True)
    nothing: dict[str, tuple[dict[str, Any], int]] = {
        "flat": ({"flat": True}, 8),
        "output_aux": ({"output_aux": True}, 8),
        "empty": ({}, 0),
    }
    for case, (options, num_tokens) in nothing.items():
        found["nothing to choose"][case] = loop_of(
            seam, {LAST: 2}, None, options, num_tokens, seconds, calls
        )
    return found


def loop_of(
    seam: Seam,
    eager: Mapping[int, int],
    graph: Mapping[int, int] | None,
    options: Mapping[str, Any],
    num_tokens: int,
    seconds: float,
    calls: int,
    *,
    cold: bool = False,
) -> dict[str, Any]:
    module, bare = ModuleType("seam"), as_seam(lambda *_: None)
    module.moe_sorting = bare  # type: ignore[attr-defined]
    ids = torch.zeros((8, 8), dtype=torch.int32, device=seam.device)
    weights = torch.zeros((8, 8), device=seam.device)
    leading = (256, 7168, torch.bfloat16, 32, None, None, 0)
    other = np.zeros(CACHES, np.uint8)

    def loop(sort: Callable[..., Any], rows: int, some: Mapping[str, Any]) -> float:
        batch = (ids[:rows], weights[:rows])
        if cold:
            total = 0.0
            for _ in range(calls):
                other[::64].sum()
                begun = time.perf_counter()
                sort(*batch, *leading, accumulate=True, **some)
                total += time.perf_counter() - begun
            return total * 1e6
        begun = time.perf_counter()
        for _ in range(calls):
            sort(*batch, *leading, accumulate=True, **some)
        return (time.perf_counter() - begun) * 1e6

    def seen() -> None:
        module.moe_sorting(ids, weights, *leading, accumulate=True)

    with hooked(module, seen, eager, graph) as wrapper:
        samples = {
            name: partial(loop, sort, num_tokens, options)
            for name, sort in (("bare", bare), ("hooked", wrapper))
        }
        return added(samples, seconds, calls)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="qwen3-235b", help="whose step [qwen3-235b]")
    parser.add_argument("--kernel", choices=KERNELS, default="auto", help="whose seam [auto]")
    parser.add_argument("--counts", type=counts, default="4,64,512", help="tokens [4,64,512]")
    parser.add_argument("--tensor-parallel", type=int, default=8, help="ranks of the model [8]")
    parser.add_argument("--layers", type=int, default=8, help="layers of a step [8]")
    parser.add_argument("--seconds", type=float, default=1.0, help="of sampling a point [1.0]")
    parser.add_argument("--calls", type=int, default=1000, help="calls of a loop's sample [1000]")


def run(args: argparse.Namespace) -> dict[str, Any]:
    seam = open_seam(args.kernel)
    return {
        **stamp(seam.device),
        "kernel": seam.name,
        "model": args.model,
        "layers": args.layers,
        "step": of_step(seam, args),
        "loop": of_loop(seam, args.seconds, args.calls),
    }


if __name__ == "__main__":
    main(__doc__, add_options, run)
