"""Do the clocks keep their word on the GPU here? One JSON object, a line a check on the way.

busy       samples whose calls came late, and the backlog that it took
carry_over how much longer a policy takes after another one than after itself, with the neutral
           predecessor and without it, by graph replay
a_a        one policy under three names: buckets that left the baseline (must be none), and that
           would have left it had nobody been confirmed
cost       seconds a calibration with everything compiled, by what they went into
regret     the table's choice over the best of a dense sweep measured on its own
repeat     share of counts at which repeated calibrations agree where the times differ
"""

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from adaptive_moe.kernels import SortKernel, load_kernel, policy_candidates
from adaptive_moe.models import find_model
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.decision import Rule, Standing
from adaptive_moe.policy.situation import Situation
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.tuning import clocks
from adaptive_moe.tuning.calibrator import Plan, calibrate
from adaptive_moe.tuning.clocks import BusyClock, GraphClock, at_once, clock_for
from adaptive_moe.tuning.device import Graphs, Neutral, Spin
from adaptive_moe.tuning.inputs import Inputs
from calibration.record import main, stamp

SIZES = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))
MAX_TOKENS = 16384


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default="mixtral-8x7b,deepseek-v3,gpt-oss-120b")
    parser.add_argument("--aa", type=int, default=12, help="A/A calibrations [12]")
    parser.add_argument("--repeats", type=int, default=4, help="calibrations a model [4]")
    parser.add_argument("--budget", type=float, default=Plan().budget_s)


def run(args: argparse.Namespace) -> dict[str, Any]:
    kernel = load_kernel("triton")
    found: dict[str, Any] = {**stamp(kernel.device), "models": {}}
    neutral = Neutral(kernel.device)
    for name in args.models.split(","):
        coverage = Coverage.up_to(find_model(name).shape(), MAX_TOKENS, SIZES)
        plan = Plan(budget_s=args.budget)
        calibrate(kernel, coverage, plan)  # compiles
        sweeps = {s: _sweep(kernel, coverage, s, neutral) for s in Situation}
        tables, seconds = [], []
        for _ in range(args.repeats):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            tables.append(calibrate(kernel, coverage, plan))
            seconds.append(round(time.perf_counter() - begun, 3))
        found["models"][name] = {
            "seconds": seconds,
            "buckets": {s.value: len(tables[0].evidence.section(s)) for s in Situation},
            "standings": {s.value: _open(tables[-1], s) for s in Situation},
            "tables": {"eager": tables[0].runs(), "graph": tables[0].runs(captured=True)},
            "regret": {s.value: _judge(tables, sweeps[s], s) for s in Situation},
        }
        print(name, found["models"][name], flush=True)
    shape = find_model("deepseek-v3").shape()
    found["busy"] = _busy(kernel, Coverage.up_to(shape, MAX_TOKENS))
    print("busy", found["busy"], flush=True)
    found["carry_over"] = _carry_over(kernel, Coverage.up_to(shape, 512))
    print("carry_over", found["carry_over"], flush=True)
    found["a_a"] = _a_a(kernel, Coverage.up_to(shape, MAX_TOKENS, SIZES), args.aa, args.budget)
    print("a_a", found["a_a"], flush=True)
    return found


def _open(table: PolicyTable, situation: Situation) -> dict[str, int]:
    """How many candidates have which standing, over all buckets."""
    count: dict[str, int] = {}
    for bucket in table.evidence.section(situation):
        for result in bucket.verdicts[0].results[1:]:
            count[result.standing.value] = count.get(result.standing.value, 0) + 1
    return count


def _busy(kernel: SortKernel, coverage: Coverage) -> dict[str, Any]:
    """At small to large counts: late samples in 60, the backlog at the end, us by clock."""
    inputs, neutral = Inputs(coverage, None, kernel.device), Neutral(kernel.device)
    rows = []
    for num_tokens in (1, 64, 1024, 16384):
        clock = BusyClock(neutral, Spin(kernel.device))
        train = inputs.train(Situation.BUSY, num_tokens, 1.0)
        calls = [kernel.baseline.bind(one) for one in train]
        begun = time.perf_counter()
        for call in calls:
            call()
        host_us = (time.perf_counter() - begun) * 1e6 / len(calls)
        sample = at_once(clock.prepare(calls))
        sample()
        first, clock.invalid = clock.invalid, 0
        busy = statistics.median(sample() for _ in range(60))
        others = [
            statistics.median(take() for take in [at_once(c.prepare(calls))] for _ in range(20))
            for c in (
                clock_for(s, kernel.device, neutral) for s in (Situation.GRAPH, Situation.IDLE)
            )
        ]
        rows.append(
            [num_tokens, first, clock.invalid, round(clock.backlog_us)]
            + [round(us, 2) for us in (busy, *others, host_us)]
        )
    return {
        "columns": [
            "num_tokens",
            "late_first",
            "late_of_60",
            "backlog_us",
            "busy",
            "graph",
            "idle",
            "host",
        ],
        "rows": rows,
    }


def _carry_over(kernel: SortKernel, coverage: Coverage) -> dict[str, Any]:
    """Policy 2 after 1 over 2 after 2, less 1, and the other way round; graph replays."""
    inputs, graphs = Inputs(coverage, None, kernel.device), Graphs(kernel.device)
    nothing = torch.zeros(1, device=kernel.device)
    rows = []
    for num_tokens in (16, 64, 256):
        row: list[Any] = [num_tokens]
        for before in (Neutral(kernel.device), lambda: nothing.add_(1)):
            clock = GraphClock(before, Spin(kernel.device), graphs.capture)
            train = inputs.train(Situation.GRAPH, num_tokens, 1.0)
            one, two = (
                at_once(clock.prepare([c.bind(i) for i in train], 5.0))
                for c in kernel.candidates[1:]
            )
            for mine, other in ((two, one), (one, two)):
                after_other, after_self = [], []
                for _ in range(60):
                    other()
                    after_other.append(mine())
                    after_self.append(mine())
                ratio = statistics.median(after_other) / statistics.median(after_self) - 1.0
                row.append(round(ratio, 4))
        rows.append(row)
    return {
        "columns": ["num_tokens", "two_neutral", "one_neutral", "two_without", "one_without"],
        "rows": rows,
    }


def _a_a(kernel: SortKernel, coverage: Coverage, times: int, budget: float) -> dict[str, int]:
    sort = kernel.candidates[2].bind

    def always(*arguments: Any) -> Any:
        from adaptive_moe.kernels.contract import SortingInputs

        return sort(SortingInputs(*arguments[:8]))()

    same = SortKernel("one policy, three names", kernel.device, policy_candidates(always))
    count = {"buckets": 0, "left": 0, "unconfirmed_or_denied": 0}
    for _ in range(times):
        evidence = calibrate(same, coverage, Plan(budget_s=budget)).evidence
        for bucket in evidence.buckets:
            count["buckets"] += 1
            count["left"] += bucket.candidate != evidence.candidates[0]
            count["unconfirmed_or_denied"] += any(
                r.standing is Standing.UNCONFIRMED or r.reason == "not confirmed"
                for r in bucket.verdicts[0].results
            )
    return count


Sweep = dict[int, dict[str, float]]


def _sweep(kernel: SortKernel, coverage: Coverage, situation: Situation, neutral: Any) -> Sweep:
    """Each candidate's us at four counts an octave, measured apart from any calibration."""
    domain = coverage.counts(situation)
    counts = [round(2 ** (k / 4)) for k in range(int(4 * math.log2(domain[-1])) + 1)]
    counts = sorted({n for n in counts if n in domain} | {domain[0], domain[-1]})
    clock = clock_for(situation, kernel.device, neutral)
    return {n: _times(kernel, coverage, clock, situation, n) for n in counts}


def _judge(tables: Sequence[PolicyTable], sweep: Sweep, situation: Situation) -> dict[str, Any]:
    """Mean and worst regret of all tables, what is worst over the baseline, and their agreement.

    Of eager counts that may meet either device only what the baseline loses is said.
    """
    tie, captured = 2.5 * Rule().margin, situation is Situation.GRAPH
    busy_from = tables[0].evidence.coverage.busy_from
    regrets, over, same, outside = [], [], 0, 0
    worst: Any = None
    for num_tokens, us in sweep.items():
        chosen = [t.candidate(num_tokens, captured=captured) for t in tables]
        base = next(iter(us.values()))
        over.append(max(us[name] for name in chosen) / base - 1.0)
        if captured or num_tokens >= busy_from:
            regret = statistics.fmean(us[name] for name in chosen) / min(us.values()) - 1.0
            regrets.append(regret)
            if regret == max(regrets):
                worst = [num_tokens, chosen[0], {k: round(v, 2) for k, v in us.items()}]
        times = [us[name] for name in chosen]
        if max(times) / min(times) - 1.0 > tie or len(set(chosen)) == 1:
            outside += 1
            same += len(set(chosen)) == 1
    return {
        "counts": len(regrets),
        "mean_regret": round(statistics.fmean(regrets), 4) if regrets else None,
        "worst_regret": round(max(regrets), 4) if regrets else None,
        "worst_at": worst,
        "worst_over_baseline": round(max(over), 4),
        "agree_outside_ties": round(same / outside, 4),
    }


def _times(
    kernel: SortKernel, coverage: Coverage, clock: clocks.Clock, situation: Situation, n: int
) -> dict[str, float]:
    """Each candidate's us, by ratios within rounds, from two preparations."""
    inputs = _INPUTS.setdefault(coverage, Inputs(coverage, None, kernel.device))
    train = inputs.train(situation, n, 1.0)[::-1]
    ratios: dict[str, list[float]] = {c.name: [] for c in kernel.candidates}
    base = []
    live = list(kernel.candidates)
    for _ in range(2):
        samplers = {c.name: at_once(clock.prepare([c.bind(i) for i in train], 5.0)) for c in live}
        looks = {name: min(sample(), sample()) for name, sample in samplers.items()}
        live = [
            c
            for c in live
            if c.name == kernel.baseline.name or looks[c.name] < 3 * min(looks.values())
        ]
        for turn in range(6):
            order = live[turn % len(live) :] + live[: turn % len(live)]
            seen: dict[str, list[float]] = {c.name: [] for c in order}
            for candidate in [*order, *order[::-1]] * 2:
                seen[candidate.name].append(samplers[candidate.name]())
            middle = {name: statistics.median(us) for name, us in seen.items()}
            base.append(middle[kernel.baseline.name])
            for name, us in middle.items():
                ratios[name].append(us / middle[kernel.baseline.name])
    us = statistics.median(base)
    return {name: us * statistics.median(found) for name, found in ratios.items() if found}


_INPUTS: dict[Coverage, Inputs] = {}

if __name__ == "__main__":
    main(__doc__, add_options, run)
