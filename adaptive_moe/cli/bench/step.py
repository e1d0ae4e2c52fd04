"""What the choice of a sort brings a whole serving step, on the machine here: the judge.

A model-like step (layer.py) is timed whole, with the baseline, with each candidate alone and with
the table, all of them through the hook (variants.py) and one after the other in every round, in the
three situations of serving:

    captured     the step is one graph, replayed
    busy         eager, the host ahead of the device
    as_it_comes  eager, from an idle device; the device waits for the host where it must

For each shape and situation, as fractions of a step:

    mean_loss, worst_loss  what the table loses against the best candidate at each count
    mean_loss_surely, worst_loss_surely  as far as a 95% interval excludes that it loses less: of
                           candidates that take the same time, one always seems best
    worst_over_baseline    the most that the table loses against the baseline
    mean_saved, most_saved what it saves over the baseline
    alone                  what each candidate alone loses

A table's choice is looked up in the candidates' own times: two graphs of the same step differ by
more than what is looked for. The variant `table` in the sweep is the table's own step.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from adaptive_moe.cli import options
from adaptive_moe.cli.bench.layer import Experts, LayerSizes, Step, layer_sizes
from adaptive_moe.cli.bench.paired import Sample, in_rounds
from adaptive_moe.cli.bench.seams import Seam, open_seam
from adaptive_moe.cli.bench.step_clocks import StepClock
from adaptive_moe.cli.bench.step_figures import (
    AS_IT_COMES,
    BUSY,
    CAPTURED,
    Point,
    figures,
    overall,
    point,
)
from adaptive_moe.cli.bench.step_text import lines
from adaptive_moe.cli.bench.variants import TABLE, Variants
from adaptive_moe.models import find_model
from adaptive_moe.settings import Settings, parse_buckets, read_settings

__all__ = ["add_options", "lines", "run"]

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


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default=MODELS, help="known models, separated by commas")
    parser.add_argument(
        "--kernel", choices=options.KERNELS, default="auto", help="whose sort [auto]"
    )
    parser.add_argument("--tensor-parallel", type=int, default=8, help="ranks of the model [8]")
    parser.add_argument("--block-size", type=int, default=32, help="rows of a GEMM tile [32]")
    parser.add_argument("--baseline", type=int, default=0, help="the policy an engine passes [0]")
    parser.add_argument("--sorts", default="policies", help="as ADAPTIVE_MOE_SORTS [policies]")
    parser.add_argument("--layers", type=int, default=8, help="layers of a step [8]")
    parser.add_argument("--budget", type=float, default=Settings.budget_s, help="seconds a table")
    parser.add_argument("--seconds", type=float, default=0.35, help="of sampling a point [0.35]")
    parser.add_argument("--captured", default=CAPTURED_COUNTS, help="counts captured into graphs")
    parser.add_argument("--eager", default=EAGER_COUNTS, help="counts of eager steps")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from adaptive_moe.cli.bench import stamp

    seam = open_seam(args.kernel)
    settings = read_settings(
        {"ADAPTIVE_MOE_SORTS": args.sorts, "ADAPTIVE_MOE_BUDGET_S": str(args.budget)}
    )
    captured = parse_buckets("--captured", args.captured) if seam.on_gpu else ()
    eager = parse_buckets("--eager", args.eager)
    judge = partial(
        judge_model, seam, settings=settings, captured=captured, eager=eager,
        layers=args.layers, seconds=args.seconds, baseline=args.baseline,
    )  # fmt: skip
    shapes: dict[str, Any] = {}
    for name in args.models.split(","):
        sizes = layer_sizes(find_model(name), args.tensor_parallel, args.block_size, seam.dtype)
        begun = time.monotonic()
        try:
            shapes[name] = judge(sizes)
        except RuntimeError as error:  # out of memory, or no table: it costs this model only
            shapes[name] = {"failed": f"{type(error).__name__}: {error}"}
        seconds = round(time.monotonic() - begun, 1)
        shapes[name]["seconds"] = seconds
        print(f"{name}: judged in {seconds} s", file=sys.stderr, flush=True)
        gc.collect()
        if seam.on_gpu:
            torch.cuda.empty_cache()
    judged = [found["situations"] for found in shapes.values() if "situations" in found]
    if not judged:
        raise RuntimeError("; ".join(f"{name}: {s['failed']}" for name, s in shapes.items()))
    return {
        **stamp(seam.device),
        "kernel": seam.name,
        "baseline": f"policy {args.baseline}",
        "sorts": args.sorts,
        "tensor_parallel": args.tensor_parallel,
        "layers": args.layers,
        "overall": overall(judged),
        "shapes": shapes,
    }


def judge_model(
    seam: Seam,
    sizes: LayerSizes,
    *,
    settings: Settings,
    captured: Sequence[int],
    eager: Sequence[int],
    layers: int,
    seconds: float,
    baseline: int = 0,
) -> dict[str, Any]:
    """The figures of the module's docstring for one model, and the whole sweep.

    RuntimeError where its sort got no table, or the device has not enough memory.
    """
    counts = sorted({*captured, *eager})
    step = Step(sizes, counts[-1], seam.device)
    experts = seam.experts(sizes.shape, baseline)

    def one_layer(num_tokens: int) -> None:
        step.run(num_tokens, 1, experts)

    with Variants(seam.module, one_layer, counts, captured, settings, baseline) as variants:
        judged = _Judged(step, experts, variants, StepClock(seam.device), layers, seconds)
        situations = {}
        for situation, some in _plan(captured, eager, on_gpu=seam.on_gpu):
            begun = time.monotonic()
            points = [judged.point(situation, n) for n in some]
            seconds_here = round(time.monotonic() - begun, 1)
            situations[situation] = {**figures(points, captured), "seconds": seconds_here}
        return {
            "shape": sizes.shape.describe(),
            "calibration_seconds": [t.evidence.seconds for t in variants.tables.values()],
            "calls": asdict(variants.hook.counts()),
            "situations": situations,
        }


@dataclass(frozen=True)
class _Judged:
    """One model's step, who sorts in it, and how it is timed."""

    step: Step
    experts: Experts
    variants: Variants
    clock: StepClock
    layers: int
    seconds: float

    def point(self, situation: str, num_tokens: int) -> Point:
        """Every variant's step with so many tokens, in rounds."""
        names, layers = self.variants.at(num_tokens), self._depth(num_tokens)
        samplers = {name: self._sampler(situation, num_tokens, name) for name in names}
        host_us = None
        if situation == BUSY:
            self.variants.use(names[0])
            host_us = self.clock.host_us(self._step(num_tokens)) / layers
        seconds = self.seconds if num_tokens <= LARGE else 2 * self.seconds
        choice = self.variants.choice(num_tokens, captured=situation == CAPTURED)
        # What is said of the table rests on these, whatever a stall makes of their first rounds.
        keep = (names[0], choice, TABLE)
        times = in_rounds(samplers, seconds, far_behind=FAR_BEHIND, keep=keep)
        us = {name: [t / layers for t in found] for name, found in times.items()}
        return point(num_tokens, us, choice, host_us)

    def _sampler(self, situation: str, num_tokens: int, variant: str) -> Sample:
        run = self._step(num_tokens)
        self.variants.use(variant)
        run()  # compiles
        if situation == CAPTURED:
            return self.clock.captured(run)
        sample = (self.clock.busy if situation == BUSY else self.clock.as_it_comes)(run)

        def switched() -> float:
            self.variants.use(variant)
            return sample()

        return switched

    def _step(self, num_tokens: int) -> Callable[[], object]:
        return partial(self.step.run, num_tokens, self._depth(num_tokens), self.experts)

    def _depth(self, num_tokens: int) -> int:
        small = num_tokens <= LARGE
        return self.layers if small else max(1, self.layers * LARGE // num_tokens)


def _plan(
    captured: Sequence[int], eager: Sequence[int], *, on_gpu: bool
) -> list[tuple[str, Sequence[int]]]:
    """A CPU has only the last: nothing is captured, and nobody runs ahead of anybody."""
    first = [(CAPTURED, captured), (BUSY, eager)] if on_gpu else []
    return [(s, counts) for s, counts in [*first, (AS_IT_COMES, eager)] if counts]
