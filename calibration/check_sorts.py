"""Is the sort that is chosen the one that is best, and does a step get shorter by what that saves?

The baseline is our own sort behind AITER's seam, made as slow as AITER's was measured to be: after
it, the device spins for what its policy took longer on an H100 (calibration/recorded). So its
policies cross where AITER's do, and our sorts, which compete at their real speed, win and lose
where they would. For each model, with every sort competing:

    within_1pct     fraction of counts at which the table's choice takes at most 1% longer than the
                    best candidate by an oracle of its own
    got_of_promised what a step with the table got shorter by, over what the oracle's times of the
                    sort alone promise, both summed over the counts

    PYTHONPATH=. python3 calibration/check_sorts.py --out calibration/results/check_sorts.json
"""

import argparse
import functools
import math
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adaptive_moe.cli.bench.layer import layer_sizes
from adaptive_moe.cli.bench.oracle import measure_oracle
from adaptive_moe.cli.bench.paired import in_rounds
from adaptive_moe.cli.bench.recorded import Recorded, read_times, times_of
from adaptive_moe.cli.bench.seams import Seam, kernel_at, seam_of
from adaptive_moe.cli.bench.step import judge_model
from adaptive_moe.kernels import load_kernel
from adaptive_moe.kernels.aiter_padding import one_shot_rows
from adaptive_moe.models import Model, find_model
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.situation import Situation
from adaptive_moe.settings import read_settings
from adaptive_moe.tuning.calibrator import Plan, calibrate
from adaptive_moe.tuning.clocks import clock_for
from adaptive_moe.tuning.device import Spin
from adaptive_moe.tuning.inputs import Inputs
from calibration import record

RECORDED = Path(__file__).parent / "recorded" / "sort_implementations_h100.csv"
MODELS = "mixtral-8x7b,gpt-oss-120b,deepseek-v3,qwen3-next-80b"
CAPTURED = (*range(1, 9), *range(12, 33, 4), *range(48, 129, 16), *range(160, 513, 32))
EAGER = (600, 768, 1024, 1500, 2048, 3000, 4096)
STEP_CAPTURED, STEP_EAGER = (1, 4, 16, 32, 64, 128, 256, 512), (768, 2048, 4096)
# One-shot was not recorded where it is hopeless.
HOPELESS = 4.0


class Wait:
    """Keeps the device busy for so long; on the CPU, the calling thread.

    least_us: what it costs to wait for nothing, a launch.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.least_us = 0.0
        if self.on_gpu:
            self.spin = Spin(device)
            times = clock_for(Situation.GRAPH, device).prepare([lambda: self.spin(5.0)] * 4)
            self.least_us = max(0.0, min(times() for _ in range(20)) - 5.0)

    def __call__(self, us: float) -> None:
        if self.on_gpu:
            self.spin(us - self.least_us)
        else:
            end = time.perf_counter() + us * 1e-6
            while time.perf_counter() < end:
                pass


class Slowed:
    """Our sort, whose policies take as long as `target` says: (policy, num_tokens) -> us."""

    def __init__(
        self,
        sort: Callable[..., Any],
        fastest: Callable[[int], tuple[int, float]],
        target: Callable[[int, int], float],
        wait: Wait,
    ) -> None:
        self.sort, self.wait = sort, wait

        @functools.cache
        def plan(policy: int, num_tokens: int) -> tuple[int, float]:
            """The policy that really runs, and how much longer it is to take."""
            runs, us = fastest(num_tokens)
            return runs, target(policy, num_tokens) - us

        self.plan = plan

    def __call__(self, topk_ids: Any, weights: Any, experts: Any, *rest: Any) -> Any:
        num_tokens = topk_ids.shape[0]
        *arguments, policy = rest
        one_shot = policy == 1 or (policy == 0 and num_tokens <= one_shot_rows(experts))
        runs, more_us = self.plan(1 if one_shot else 2, num_tokens)
        outputs = self.sort(topk_ids, weights, experts, *arguments, runs)
        if more_us > self.wait.least_us:
            self.wait(more_us)
        return outputs


def between(times: Mapping[int, float]) -> Callable[[int], float]:
    """us at any count, straight on both logarithmic scales between those given."""
    counts = sorted(times)

    def at(num_tokens: int) -> float:
        right = min(max(bisect_right(counts, num_tokens), 1), len(counts) - 1)
        a, b = counts[right - 1], counts[right]
        part = math.log(num_tokens / a) / math.log(b / a)
        return math.exp(math.log(times[a]) * (1 - part) + math.log(times[b]) * part)

    return at


def targets(
    recorded: Sequence[Recorded], model: Model, scale: float
) -> Callable[[int, int], float]:
    """How long AITER's policies took, times scale."""
    counts = sorted({one.num_tokens for one in recorded if one.is_of(model)})
    rows = {n: times_of(recorded, model, Situation.GRAPH, n) for n in counts}
    multi = {n: scale * row["recorded opus multi"] for n, row in rows.items()}
    one = {
        n: scale * rows[n].get("recorded opus one shot", 0.0) or HOPELESS * multi[n] for n in counts
    }
    at = {1: between(one), 2: between(multi)}
    return lambda policy, num_tokens: at[policy](num_tokens)


def slowed_seam(kernel: str, model: Model, block_size: int, scale: float) -> Seam:
    """The seam with the baseline as slow as AITER's, for one model."""
    plain = seam_of(kernel)
    coverage = Coverage.up_to(model.shape(block_size, plain.dtype), max(EAGER), CAPTURED)
    counts = (1, 4, 16, 64, 256, 512, 1024, 2048, 4096)
    live: dict[int, tuple[int, float]] = {}
    with kernel_at(plain, coverage.on(plain.device.type), "policies") as own:
        clock = clock_for(Situation.GRAPH, own.device)
        inputs = Inputs(coverage, None, own.device)
        for count in counts:
            train = inputs.train(Situation.GRAPH, count, 1.0)[:4]
            samplers = {
                c.name: clock.prepare([c.bind(i) for i in train])
                for c in own.candidates[1:]
                if c.bind(train[0])()
            }
            us = {n: min(t) for n, t in in_rounds(samplers, 0.02, far_behind=4.0).items()}
            best = min(us, key=lambda name: us[name])
            live[count] = int(best.removeprefix("policy ")), us[best]
    at = between({n: us for n, (_, us) in live.items()})

    def fastest(num_tokens: int) -> tuple[int, float]:
        near = min(counts, key=lambda n: abs(math.log(n / num_tokens)))
        return live[near][0], at(num_tokens)

    sort = plain.module.moe_sorting
    target = targets(read_times(RECORDED), model, scale)
    return seam_of(kernel, Slowed(sort, fastest, target, Wait(plain.device)))


def check(kernel: str, model: Model, args: argparse.Namespace) -> dict[str, Any]:
    seam = slowed_seam(kernel, model, args.block_size, args.scale)
    shape = model.shape(args.block_size, seam.dtype)
    coverage = Coverage.up_to(shape, max(EAGER), CAPTURED).on(seam.device.type)
    sweeps = {Situation.GRAPH: CAPTURED, Situation.BUSY: EAGER}
    if not coverage.captured:
        del sweeps[Situation.GRAPH]
    rows: list[dict[str, Any]] = []
    oracle: dict[Situation, dict[int, Mapping[str, float]]] = {}
    with kernel_at(seam, coverage, args.sorts) as sorts:
        table = calibrate(sorts, coverage, Plan(budget_s=args.budget))
        for situation, counts in sweeps.items():
            steps = STEP_CAPTURED if situation is Situation.GRAPH else STEP_EAGER
            every = sorted({*counts, *steps})
            points = measure_oracle(sorts, shape, situation, every, args.oracle_passes)
            oracle[situation] = {p.num_tokens: p.us for p in points}
            for p in points:
                chosen = table.candidate(p.num_tokens, captured=situation is Situation.GRAPH)
                bucket = table.bucket(p.num_tokens, situation)
                us = {name: round(t, 3) for name, t in p.us.items()}
                over = round(p.us[chosen] / min(p.us.values()), 4)
                rows.append({
                    "situation": situation.value, "num_tokens": p.num_tokens,
                    "chosen": chosen, "over_best": over, "us": us,
                    "reason": bucket.reason if bucket else None,
                })  # fmt: skip
    settings = read_settings(
        {"ADAPTIVE_MOE_SORTS": args.sorts, "ADAPTIVE_MOE_BUDGET_S": str(args.budget)}
    )
    judged = judge_model(
        seam,
        layer_sizes(model, 8, args.block_size, seam.dtype),
        settings=settings,
        captured=STEP_CAPTURED if seam.on_gpu else (),
        eager=STEP_EAGER,
        layers=8,
        seconds=args.seconds,
    )["situations"]
    return {
        "counts": len(rows),
        "within_1pct": round(sum(r["over_best"] <= 1.01 for r in rows) / len(rows), 4),
        "worst_over_best": max(r["over_best"] for r in rows),
        **_promise(judged, oracle),
        "oracle": rows,
        "step": judged,
    }


def _promise(judged: Mapping[str, Any], oracle: Mapping[Situation, Any]) -> dict[str, Any]:
    """us a layer that the oracle's times promise, and what the step got, by situation and count."""
    found: dict[str, Any] = {}
    for name, situation in (("captured", Situation.GRAPH), ("busy", Situation.BUSY)):
        rows = []
        for row in judged.get(name, {}).get("sweep", ()):
            us = oracle[situation][row["num_tokens"]]
            baseline = next(iter(us))
            promised = us[baseline] - us[row["chosen"]]
            got = -row["over_baseline_us"][row["chosen"]][0]
            rows.append([row["num_tokens"], row["chosen"], round(promised, 3), round(got, 3)])
        if rows:
            promised, got = (sum(row[i] for row in rows) for i in (2, 3))
            found[name] = {
                "promised_us": round(promised, 3),
                "got_us": round(got, 3),
                "got_of_promised": round(got / promised, 4) if promised else None,
                "columns": ["num_tokens", "chosen", "promised us", "got us"],
                "rows": rows,
            }
    return {"promise": found}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default=MODELS, help="models of the recorded times")
    parser.add_argument("--kernel", default="triton", help="cpu is a rehearsal [triton]")
    parser.add_argument("--sorts", default="all", help="as ADAPTIVE_MOE_SORTS [all]")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--scale", type=float, default=1.0, help="of the recorded times [1]")
    parser.add_argument("--budget", type=float, default=1.5, help="seconds a calibration [1.5]")
    parser.add_argument("--oracle-passes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.35, help="of sampling a step [0.35]")


def run(args: argparse.Namespace) -> dict[str, Any]:
    shapes = {}
    for name in args.models.split(","):
        begun = time.monotonic()
        shapes[name] = check(args.kernel, find_model(name), args)
        shapes[name]["seconds"] = round(time.monotonic() - begun, 1)
        print(f"{name}: {shapes[name]['seconds']} s", file=sys.stderr, flush=True)
    counts = sum(s["counts"] for s in shapes.values())
    close = sum(s["counts"] * s["within_1pct"] for s in shapes.values())
    overall: dict[str, Any] = {"counts": counts, "within_1pct": round(close / counts, 4)}
    for name in ("captured", "busy"):
        some = [s["promise"][name] for s in shapes.values() if name in s["promise"]]
        promised, got = (sum(s[key] for s in some) for key in ("promised_us", "got_us"))
        if promised:
            overall[f"{name}_got_of_promised"] = round(got / promised, 4)
    return {**record.stamp(load_kernel(args.kernel).device), "overall": overall, "shapes": shapes}


if __name__ == "__main__":
    record.main(__doc__, add_options, run)
