"""Our sort behind AITER's seam, made as slow as AITER's was measured to be.

After the sort the device spins for what its policy took longer on an H100 (calibration/recorded).
So its policies cross where AITER's do.
"""

import functools
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adaptive_moe.cli.bench.paired import in_rounds
from adaptive_moe.cli.bench.recorded import Recorded, read_times, times_of
from adaptive_moe.cli.bench.seams import Seam, kernel_at, seam_of
from adaptive_moe.kernels.aiter_padding import one_shot_rows
from adaptive_moe.models import Model
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.situation import Situation
from adaptive_moe.tuning.clocks import at_once, clock_for
from adaptive_moe.tuning.device import Spin
from adaptive_moe.tuning.inputs import Inputs

RECORDED = Path(__file__).parent / "recorded" / "sort_implementations_h100.csv"
# One-shot was not recorded where it is hopeless.
HOPELESS = 4.0
# Where our own sort is timed.
LIVE = (1, 4, 16, 64, 256, 512, 1024, 2048, 4096)


class Wait:
    """Keeps the device busy for so long; on the CPU, the calling thread.

    least_us: what it costs to wait for nothing, a launch.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.least_us = 0.0
        if self.on_gpu:
            self.spin = Spin(device)
            times = at_once(
                clock_for(Situation.GRAPH, device).prepare([lambda: self.spin(5.0)] * 4)
            )
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


def slowed_seam(
    kernel: str, model: Model, block_size: int, scale: float, captured: Sequence[int]
) -> Seam:
    """The seam with the baseline as slow as AITER's, for one model; `captured` where steps are."""
    plain = seam_of(kernel)
    coverage = Coverage.up_to(model.shape(block_size, plain.dtype), LIVE[-1], captured)
    live: dict[int, tuple[int, float]] = {}
    with kernel_at(plain, coverage.on(plain.device.type), "policies") as own:
        clock = clock_for(Situation.GRAPH, own.device)
        inputs = Inputs(coverage, None, own.device)
        for count in LIVE:
            train = inputs.train(Situation.GRAPH, count, 1.0)[:4]
            samplers = {
                c.name: at_once(clock.prepare([c.bind(i) for i in train]))
                for c in own.candidates[1:]
                if c.bind(train[0])()
            }
            us = {n: min(t) for n, t in in_rounds(samplers, 0.02, far_behind=4.0).items()}
            best = min(us, key=lambda name: us[name])
            live[count] = int(best.removeprefix("policy ")), us[best]
    at = between({n: us for n, (_, us) in live.items()})

    def fastest(num_tokens: int) -> tuple[int, float]:
        near = min(LIVE, key=lambda n: abs(math.log(n / num_tokens)))
        return live[near][0], at(num_tokens)

    sort = plain.module.moe_sorting
    target = targets(read_times(RECORDED), model, scale)
    return seam_of(kernel, Slowed(sort, fastest, target, Wait(plain.device)))
