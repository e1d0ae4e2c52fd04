"""Two situations of one calibration, on a clock that the kernel moves as the situation says."""

from collections.abc import Callable
from typing import Any

import torch

from adaptive_moe.kernels import SortKernel, cpu_sort, policy_candidates
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.decision import Rule, Standing
from adaptive_moe.policy.situation import Situation
from adaptive_moe.shape import SortingShape
from adaptive_moe.tuning.clocks import Sampler, Train, WallClock
from adaptive_moe.tuning.inputs import Inputs
from adaptive_moe.tuning.rightness import Rightness
from adaptive_moe.tuning.section import RULED_OUT, Section

COVERAGE = Coverage.up_to(SortingShape(8, 2, 4, block_size=4), 64, busy_from=33)


class Bench:
    """us(situation, policy) is what a call takes. timed: who was, in which situation."""

    def __init__(self, us: Callable[[Situation, int], float]) -> None:
        self.us, self.seconds = us, 0.0
        self.situation: Situation | None = None
        self.timed: set[tuple[Situation, int]] = set()
        candidates = policy_candidates(self.sort)
        kernel = SortKernel("made up", torch.device("cpu"), candidates)
        inputs = Inputs(COVERAGE, None, kernel.device)
        rightness = Rightness(kernel, COVERAGE, inputs, lambda: self.seconds)

        def section(situation: Situation, other: Section | None) -> Section:
            return Section(
                *(situation, COVERAGE.counts(situation), (), {}, inputs, rightness),
                *(lambda: self.clock(situation), Rule()),
                *(lambda: self.seconds, lambda num_tokens: None, other),
            )

        self.busy = section(Situation.BUSY, None)
        self.idle = section(Situation.IDLE, self.busy)

    def clock(self, situation: Situation) -> WallClock:
        bench = self

        class Clock(WallClock):
            def prepare(self, train: Train, call_us: float = 0.0) -> Sampler:
                sample = super().prepare(train, call_us)

                def within() -> float:
                    bench.situation = situation
                    try:
                        return sample()
                    finally:
                        bench.situation = None

                return within

        return Clock(lambda: self.seconds)

    def sort(self, *arguments: Any) -> tuple[torch.Tensor, ...]:
        if self.situation is None:
            return cpu_sort.moe_sorting(*arguments)
        self.timed.add((self.situation, arguments[8]))
        self.seconds += 1e-6 * self.us(self.situation, arguments[8])
        return ()


def test_who_is_slower_on_a_busy_device_is_not_measured_on_an_idle_one() -> None:
    busy, idle = {0: 50.0, 1: 70.0, 2: 50.0}, {0: 90.0, 1: 60.0, 2: 60.0}
    bench = Bench(lambda s, policy: (busy if s is Situation.BUSY else idle)[policy])
    bench.busy.explore(1.0)
    assert bench.busy.losers(5) == {"policy 1"}
    bench.idle.explore(2.0)
    assert (Situation.IDLE, 2) in bench.timed
    assert (Situation.IDLE, 1) not in bench.timed
    for bucket in bench.idle.buckets():
        result = bucket.verdicts[0].results[1]
        assert (result.standing, result.reason) == (Standing.SLOWER, RULED_OUT)


def test_a_bucket_begun_has_the_rounds_of_a_verdict_and_the_others_none() -> None:
    bench = Bench(lambda s, policy: 50.0 + policy)
    bench.busy.explore(0.012)
    rounds = [b.verdicts[0].rounds for b in bench.busy.buckets()]
    assert rounds[0] >= Rule().min_rounds
    assert rounds[-1] == 0
    assert sum(0 < n < Rule().min_rounds for n in rounds) <= 1  # where the time ended


def test_time_that_is_left_goes_to_counts_that_had_no_turn() -> None:
    bench = Bench(lambda s, policy: 50.0 + policy)
    bench.busy.explore(0.0)
    assert not any(b.verdicts[0].rounds for b in bench.busy.buckets())
    bench.busy.fill(1.0)
    assert all(b.verdicts[0].rounds for b in bench.busy.buckets())


def test_the_idle_device_is_asked_about_counts_below_busy_from_alone() -> None:
    bench = Bench(lambda s, policy: 50.0)
    bench.busy.explore(1.0)
    bench.idle.explore(2.0)
    assert max(b.num_tokens for b in bench.idle.buckets()) == 32
    assert max(b.num_tokens for b in bench.busy.buckets()) == 64


def test_where_everybody_loses_on_the_busy_device_the_idle_one_is_not_asked() -> None:
    bench = Bench(lambda s, policy: 50.0 if policy == 0 else 70.0)
    bench.busy.explore(1.0)
    bench.idle.explore(2.0)
    assert not {s for s, _ in bench.timed} - {Situation.BUSY}
    assert all(b.verdicts[0].settled for b in bench.idle.buckets())
