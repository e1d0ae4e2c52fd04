"""What the choice of a sort is worth in a whole serving step, on the machine here: the judge.

A model-like step (layer.py) is timed whole, once with each candidate as its sort, interleaved, in
the three situations of serving (timing.py). A calibration of the same calls gives a table of
AITER's policies, and another of all sorts. For each shape, situation and set of candidates, as
fractions of a step:

    mean_loss, worst_loss  what the table, and each candidate alone, loses against the best
                           candidate at each count
    surely                 ... as far as a 95% interval excludes that it loses less: of candidates
                           that take the same time, one always seems best
    mean_saved, most_saved what it saves over the baseline
    worst_over_baseline    the most that it takes longer than the baseline

Eager figures are split at busy_from, from which on the device's result alone decides. What a table
costs is looked up in the candidates' own times: two graphs of one step differ by more than what is
looked for. What the hook itself costs is in hook.py.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from adaptive_moe.kernels import Candidate, SortKernel
from adaptive_moe.models import find_model
from adaptive_moe.policy.table import PolicyTable
from calibration.interleaved import Sample, interleave
from calibration.layer import LayerSizes, Step, layer_sizes
from calibration.losses import TABLE, Point, figures, overall
from calibration.record import counts, main, progress, stamp
from calibration.seams import (
    ALL,
    KERNELS,
    POLICIES,
    Seam,
    SeenShape,
    Switch,
    open_seam,
    see,
    without_wrong,
)
from calibration.timing import CAPTURED, Plan, Timer, calibrate, inputs_of

MODELS = (
    "deepseek-v3,deepseek-v3-fused,kimi-k2,qwen3-235b,qwen3-next-80b,gpt-oss-120b,glm-4.5,"
    "llama-4-maverick,mixtral-8x7b"
)
CAPTURED_COUNTS = "1,2,4,8,16,24,32,64,96,128,256,512"
EAGER_COUNTS = "1,5,16,61,128,250,384,513,768,904,1200,2048,4096,8192"
# With more tokens than this a step has fewer layers, as each takes longer, and is sampled for twice
# the time: GEMMs at a GPU's power limit are noisier than the difference that is looked for.
LARGE = 1024
# A candidate whose step takes so many times the fastest's is no rival.
FAR_BEHIND = 1.5


class Judge:
    """A model's step at a seam; while entered, timed with any candidate as its sort."""

    def __init__(self, seam: Seam, sizes: LayerSizes, max_tokens: int, layers: int, policy: int):
        self.seam, self.sizes, self.layers = seam, sizes, layers
        self.step = Step(sizes, max_tokens, seam.device)
        self.experts = seam.experts(sizes.shape, policy)
        self.timer = Timer(seam.device)
        self.switch = Switch(seam.module)

    def __enter__(self) -> "Judge":
        self.switch.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.switch.__exit__()

    def one_layer(self, num_tokens: int) -> object:
        return self.step.run(num_tokens, 1, self.experts)

    def depth(self, num_tokens: int) -> int:
        """Layers of a step with so many tokens."""
        small = num_tokens <= LARGE
        return self.layers if small else max(1, self.layers * LARGE // num_tokens)

    def times(
        self,
        situation: str,
        num_tokens: int,
        candidates: Iterable[Candidate],
        seconds: float,
        keep: Sequence[str] = (),
    ) -> dict[str, list[float]]:
        """Microseconds a layer of each candidate's step in each round."""
        depth = self.depth(num_tokens)
        run = partial(self.step.run, num_tokens, depth, self.experts)
        samplers = {c.name: self._sampler(situation, run, c) for c in candidates}
        seconds *= 1 if num_tokens <= LARGE else 2
        found = interleave(samplers, seconds, far_behind=FAR_BEHIND, keep=keep)
        return {name: [us / depth for us in times] for name, times in found.items()}

    def host_us(self, num_tokens: int, candidate: Candidate) -> float:
        """What the host takes to enqueue a layer with that candidate."""
        depth, self.switch.use = self.depth(num_tokens), candidate
        run = partial(self.step.run, num_tokens, depth, self.experts)
        return min(self.timer.host_us(run) for _ in range(5)) / depth

    def _sampler(self, situation: str, run: Callable[[], object], candidate: Candidate) -> Sample:
        self.switch.use = candidate
        run()  # compiles
        sample = self.timer.sampler(situation, run)
        if situation == CAPTURED:
            return sample

        def switched() -> float:
            self.switch.use = candidate
            return sample()

        return switched


def judge(seam: Seam, sizes: LayerSizes, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of the module's docstring for one model.

    RuntimeError where nothing can be chosen, or the device has not enough memory.
    """
    captured = options.captured if seam.on_gpu else ()
    every = sorted({*captured, *options.eager})
    model = Judge(seam, sizes, every[-1], options.layers, options.baseline)
    shapes = see(seam, sizes.shape, model.one_layer, every, captured)
    if not shapes:
        raise RuntimeError("nothing to choose: no call of the step is sorted by a policy")
    left_out: dict[str, str] = {}
    points: dict[str, list[Point]] = {situation: [] for situation in model.timer.situations}
    with model:
        for shape in shapes:
            tables = _tables(shape, options)
            for n in shape.counts:
                host_us = model.host_us(n, shape.kernel.baseline)
                (inputs,) = inputs_of(shape.coverage.shape, n, 1, seam.device)
                kernel, wrong = without_wrong(shape.offering(options.sets[-1]), inputs)
                left_out |= wrong
                for situation, some in points.items():
                    if n in (captured if situation == CAPTURED else options.eager):
                        chosen = _chosen(tables, kernel, n, situation == CAPTURED)
                        keep = (kernel.baseline.name, *chosen.values())
                        us = model.times(situation, n, kernel.candidates, options.seconds, keep)
                        some.append(Point(n, us, chosen, host_us))
    busy_from = shapes[0].coverage.busy_from
    return {
        "shape": sizes.shape.describe(),
        "busy_from": busy_from,
        "left_out": left_out,
        "situations": {
            situation: figures(some, 0 if situation == CAPTURED else busy_from)
            for situation, some in points.items()
            if some
        },
    }


def _tables(shape: SeenShape, options: argparse.Namespace) -> dict[str, PolicyTable]:
    plan = Plan(budget_s=options.budget)
    return {s: calibrate(shape.offering(s), shape.coverage, plan) for s in options.sets}


def _chosen(
    tables: Mapping[str, PolicyTable], kernel: SortKernel, num_tokens: int, captured: bool
) -> dict[str, str]:
    """By table; the baseline where what it chooses is not there."""
    names = {c.name for c in kernel.candidates}
    choices = {s: t.candidate(num_tokens, captured=captured) for s, t in tables.items()}
    return {s: name if name in names else kernel.baseline.name for s, name in choices.items()}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default=MODELS, help="known models, separated by commas")
    parser.add_argument("--kernel", choices=KERNELS, default="auto", help="whose seam [auto]")
    parser.add_argument("--sorts", choices=(POLICIES, ALL), default=ALL, help="candidates [all]")
    parser.add_argument("--tensor-parallel", type=int, default=8, help="ranks of the model [8]")
    parser.add_argument("--block-size", type=int, default=32, help="rows of a GEMM tile [32]")
    parser.add_argument("--baseline", type=int, default=0, help="the policy an engine passes [0]")
    parser.add_argument("--layers", type=int, default=8, help="layers of a step [8]")
    parser.add_argument("--budget", type=float, default=Plan().budget_s, help="seconds a table")
    parser.add_argument("--seconds", type=float, default=0.15, help="of sampling a point [0.15]")
    parser.add_argument("--captured", type=counts, default=CAPTURED_COUNTS, help="captured counts")
    parser.add_argument("--eager", type=counts, default=EAGER_COUNTS, help="counts of eager steps")


def run(args: argparse.Namespace) -> dict[str, Any]:
    args.sets = (POLICIES,) if args.sorts == POLICIES else (POLICIES, ALL)
    seam = open_seam(args.kernel)
    shapes: dict[str, Any] = {}
    for name in args.models.split(","):
        sizes = layer_sizes(find_model(name), args.tensor_parallel, args.block_size, seam.dtype)
        begun = time.monotonic()
        try:
            shapes[name] = judge(seam, sizes, args)
        except RuntimeError as error:  # out of memory, or no table: it costs this model only
            shapes[name] = {"failed": f"{type(error).__name__}: {error}"}
        shapes[name]["seconds"] = round(time.monotonic() - begun, 1)
        progress(_line(name, shapes[name]))
        gc.collect()
        if seam.on_gpu:
            torch.cuda.empty_cache()
    return {
        **stamp(seam.device),
        "kernel": seam.name,
        "baseline": f"policy {args.baseline}",
        "tensor_parallel": args.tensor_parallel,
        "layers": args.layers,
        "overall": overall([s["situations"] for s in shapes.values() if "situations" in s]),
        "shapes": shapes,
    }


def _line(name: str, shape: Mapping[str, Any]) -> str:
    parts = [shape.get("failed", "")]
    for situation, found in shape.get("situations", {}).items():
        for sorts, variants in found["sets"].items():
            table = variants[TABLE]
            parts.append(
                f"{situation}, {sorts}: loses {table['mean_loss']:.3%}, at most "
                f"{table['worst_loss']:.2%}; saves {table['mean_saved']:.2%}"
            )
    return f"{name}, {shape['seconds']} s" + "".join(f"\n  {part}" for part in parts if part)


if __name__ == "__main__":
    main(__doc__, add_options, run)
