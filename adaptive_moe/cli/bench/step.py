"""What the choice of a sort brings a whole serving step, on the machine here: the judge.

A model-like step (layer.py) is timed whole, with the baseline, with each candidate alone and with
the table, one after the other in every round, in the three situations of serving:

    captured     the step is one graph, replayed
    busy         eager, the host ahead of the device: a backlog first
    as_it_comes  eager, from an idle device; the device waits for the host where it must

For each situation: mean_loss and worst_loss, the fraction of a step that the table loses against
the best candidate at each count; worst_over_baseline, the most it loses against the baseline
anywhere; saved, the mean fraction of a step that it saves over the baseline. A table's choice is
looked up in the candidates' own times: two instances of one graph differ by more than what is
looked for. `table_us` is the table's own step, hook included.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from adaptive_moe.cli.bench.layer import LayerSizes, Step, layer_sizes
from adaptive_moe.cli.bench.seams import Seam, open_seam
from adaptive_moe.cli.bench.step_figures import (
    AS_IT_COMES,
    BUSY,
    CAPTURED,
    TABLE,
    figures,
    overall,
    point,
)
from adaptive_moe.engines.hook import AiterHook
from adaptive_moe.engines.warm_up import warm_up
from adaptive_moe.kernels.contract import SortingInputs
from adaptive_moe.models import find_model
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.settings import Mode, Settings

MODELS = (
    "deepseek-v3,deepseek-v3-fused,kimi-k2,qwen3-235b,qwen3-next-80b,gpt-oss-120b,glm-4.5,"
    "llama-4-maverick,mixtral-8x7b"
)
CAPTURE_SIZES = (1, 2, 4, 8, 16, 24, 32, 64, 96, 128, 256, 512)
EAGER_COUNTS = (1, 5, 16, 61, 128, 250, 384, 513, 768, 904, 1200, 2048, 4096, 8192)
# A candidate this many times slower than the fastest step is timed no further: it is no rival, and
# what runs after it would feel it.
FAR_BEHIND = 1.5
MIN_ROUNDS, MAX_ROUNDS = 8, 120

Sample = Callable[[], float]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default=MODELS, help="known models, separated by commas")
    parser.add_argument("--kernel", choices=("auto", "aiter", "triton", "cpu"), default="auto")
    parser.add_argument("--tensor-parallel", type=int, default=8, help="ranks of the model [8]")
    parser.add_argument("--block-size", type=int, default=32, help="rows of a GEMM tile [32]")
    parser.add_argument("--baseline", type=int, default=0, help="the policy the engine passes [0]")
    parser.add_argument("--sorts", default="policies", help="who may compete [policies]")
    parser.add_argument("--layers", type=int, default=8, help="layers of a step [8]")
    parser.add_argument("--seconds", type=float, default=0.35, help="of sampling a point [0.35]")
    parser.add_argument("--captured", default="", help="captured counts, such as 1,8,64")
    parser.add_argument("--eager", default="", help="eager counts, such as 513,2048")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from adaptive_moe.cli.bench import stamp

    seam = open_seam(args.kernel)
    on_gpu = seam.device.type == "cuda"
    captured = _counts(args.captured) or CAPTURE_SIZES
    eager = _counts(args.eager) or EAGER_COUNTS
    results = {}
    for name in args.models.split(","):
        sizes = layer_sizes(find_model(name), args.tensor_parallel, args.block_size, seam.dtype)
        judged = _Judge(seam, sizes, args, captured if on_gpu else (), eager)
        results[name] = judged.result()
        _say(name, results[name]["situations"])
        del judged
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    return {
        **stamp(seam.device),
        "kernel": seam.name,
        "tensor_parallel": args.tensor_parallel,
        "layers": args.layers,
        "overall": overall([r["situations"] for r in results.values()]),
        "shapes": results,
    }


class _Judge:
    """One model: its step, its table, and every variant timed at every count."""

    def __init__(
        self,
        seam: Seam,
        sizes: LayerSizes,
        args: argparse.Namespace,
        captured: Sequence[int],
        eager: Sequence[int],
    ) -> None:
        self.seam, self.sizes, self.args = seam, sizes, args
        self.captured, self.eager = tuple(captured), tuple(eager)
        largest = max(*captured, *eager) if captured else max(eager)
        self.step = Step(sizes, args.layers, largest, seam.device)
        self.few = Step.__new__(Step)
        self.few.__dict__ = {**self.step.__dict__, "layers": max(2, args.layers // 4)}
        self.baseline = seam.experts(sizes, args.baseline)
        settings = Settings(mode=Mode.AUTO, sorts=tuple(args.sorts.split(",")))
        self.hook = AiterHook(settings, engine_policy=args.baseline)
        self.original = seam.module.moe_sorting
        self.hook.install(seam.module)
        try:
            self.step.run(largest, self.baseline)
            self.tables = dict(warm_up(self.hook, largest, self.captured).tables)
            (key, seen), *_ = self.hook.seen.items()
            self.kernel = self.hook.kernel(seen, key)
        finally:
            self.hook.uninstall()

    def result(self) -> dict[str, Any]:
        """The figures of the module's docstring, and the whole sweep."""
        situations = {}
        if self.captured:
            situations[CAPTURED] = self._situation(CAPTURED, self.captured, self._captured_samples)
            situations[BUSY] = self._situation(BUSY, self.eager, self._busy_samples)
        situations[AS_IT_COMES] = self._situation(AS_IT_COMES, self.eager, self._idle_samples)
        return {
            "shape": self.sizes.shape.describe(),
            "calibration_seconds": [t.evidence.seconds for t in self.tables.values()],
            "situations": situations,
        }

    def choice(self, num_tokens: int, captured: bool) -> str:
        """What the table runs, or the baseline where there is none."""
        table: PolicyTable | None = next(iter(self.tables.values()), None)
        if table is None:
            return self.kernel.baseline.name
        return table.candidate(num_tokens, captured=captured)

    def _situation(
        self, name: str, counts: Sequence[int], prepare: Callable[[int, str], Sample]
    ) -> dict[str, Any]:
        rows = []
        for num_tokens in counts:
            variants = [*(c.name for c in self.kernel.candidates), TABLE]
            layers = self._step(num_tokens).layers
            found = _sample_all({v: prepare(num_tokens, v) for v in variants}, self.args.seconds)
            us = {v: [t / layers for t in times] for v, times in found.items()}
            host = self._host_us(num_tokens) if name == BUSY else None
            rows.append(point(num_tokens, us, self.choice(num_tokens, name == CAPTURED), host))
        return figures(rows)

    def _step(self, num_tokens: int) -> Step:
        """Fewer layers where each takes long: what is looked for is a difference a layer."""
        return self.step if num_tokens <= 1024 else self.few

    @contextmanager
    def _sorting_as(self, variant: str) -> Iterator[None]:
        """Within it the seam sorts by the table, or by one candidate whatever is asked."""
        if variant == TABLE:
            self.hook.install(self.seam.module)
            try:
                yield
            finally:
                self.hook.uninstall()
            return
        (candidate,) = [c for c in self.kernel.candidates if c.name == variant]
        bind = candidate.bind

        def moe_sorting(*args: Any, **kwargs: Any) -> Any:
            return bind(SortingInputs(*args[:8]))()

        self.seam.module.moe_sorting = moe_sorting  # type: ignore[attr-defined]
        try:
            yield
        finally:
            self.seam.module.moe_sorting = self.original  # type: ignore[attr-defined]

    def _run(self, num_tokens: int, variant: str) -> None:
        with self._sorting_as(variant):
            self._step(num_tokens).run(num_tokens, self.baseline)

    def _captured_samples(self, num_tokens: int, variant: str) -> Sample:
        self._run(num_tokens, variant)  # compiles what is not compiled
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run(num_tokens, variant)
        start, end = _events()

        def sample() -> float:
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e3

        sample()
        return sample

    def _busy_samples(self, num_tokens: int, variant: str) -> Sample:
        """From behind a backlog that is long enough for the host to enqueue the whole step; where
        it was not, the sample is taken again behind a longer one."""
        start, end = _events()
        filler = torch.empty(64 << 20, dtype=torch.int32, device=self.seam.device)
        backlog = 4

        def sample() -> float:
            nonlocal backlog
            while True:
                for _ in range(backlog):
                    filler.zero_()
                start.record()
                self._run(num_tokens, variant)
                end.record()
                ahead = not start.query()
                end.synchronize()
                if ahead:
                    return float(start.elapsed_time(end)) * 1e3
                backlog *= 2

        return sample

    def _idle_samples(self, num_tokens: int, variant: str) -> Sample:
        wait = torch.cuda.synchronize if self.seam.device.type == "cuda" else lambda: None

        def sample() -> float:
            wait()
            begun = time.perf_counter()
            self._run(num_tokens, variant)
            wait()
            return (time.perf_counter() - begun) * 1e6

        return sample

    def _host_us(self, num_tokens: int) -> float:
        """What the host takes to enqueue a layer with the baseline."""
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            self._run(num_tokens, self.kernel.baseline.name)
            times.append((time.perf_counter() - begun) * 1e6)
        torch.cuda.synchronize()
        return min(times) / self._step(num_tokens).layers


def _sample_all(samplers: dict[str, Sample], seconds: float) -> dict[str, list[float]]:
    """Rounds of all variants, the order rotated and reversed, until the time is over."""
    first = {name: min(sample(), sample()) for name, sample in samplers.items()}
    best = min(first.values())
    live = [name for name in samplers if first[name] <= FAR_BEHIND * best or name == TABLE]
    live += [name for name in list(samplers)[:1] if name not in live]  # the baseline stays
    times: dict[str, list[float]] = {name: [] for name in live}
    begun, number = time.monotonic(), 0
    while number < MIN_ROUNDS or (number < MAX_ROUNDS and time.monotonic() < begun + seconds):
        turn = number % len(live)
        order = live[turn:] + live[:turn]
        for name in order[::-1] if number // len(live) % 2 else order:
            times[name].append(samplers[name]())
        number += 1
    return times


def _say(name: str, situations: dict[str, Any]) -> None:
    """What a person reads while it runs; the JSON has everything."""
    for situation, found in situations.items():
        print(
            f"{name}, {situation}: loses {found['mean_loss']:.3%} of a step, at most "
            f"{found['worst_loss']:.3%} (at {found['worst_at']} tokens); saves "
            f"{found['mean_saved']:.2%}, at most {found['most_saved']:.2%} over the baseline",
            file=sys.stderr,
        )


def _counts(text: str) -> tuple[int, ...]:
    from adaptive_moe.settings import parse_buckets

    return parse_buckets("--buckets", text)


def _events() -> tuple[Any, Any]:
    event: Any = torch.cuda.Event
    return event(enable_timing=True), event(enable_timing=True)
