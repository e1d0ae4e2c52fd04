"""Two situations of one calibration, on a clock that the kernel moves as the situation says."""

from collections.abc import Callable
from typing import Any

import torch

from adaptive_moe.kernels import SortKernel, cpu_sort, policy_candidates
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.decision import Rule, Standing
from adaptive_moe.policy.situation import Situation
from adaptive_moe.shape import SortingShape
from adaptive_moe.tuning.asked import NOT_IN_GRAPH, SLOWER_BUSY
from adaptive_moe.tuning.clocks import Pending, Sampler, Train, WallClock
from adaptive_moe.tuning.inputs import Inputs
from adaptive_moe.tuning.race import LOT, LOTS
from adaptive_moe.tuning.rightness import Rightness
from adaptive_moe.tuning.section import Section

COVERAGE = Coverage.up_to(SortingShape(8, 2, 4, block_size=4), 64, busy_from=33)


class Bench:
    """us(situation, policy) is what a call takes. timed: who was, in which situation. rows: of the
    call that is timed. filled: the rows of each, and how many are real."""

    def __init__(
        self, us: Callable[[Situation, int], float], coverage: Coverage = COVERAGE
    ) -> None:
        self.us, self.seconds, self.rows = us, 0.0, 0
        self.situation: Situation | None = None
        self.timed: set[tuple[Situation, int]] = set()
        self.filled: set[tuple[int, int]] = set()
        candidates = policy_candidates(self.sort)
        kernel = SortKernel("made up", torch.device("cpu"), candidates)
        inputs = Inputs(coverage, None, kernel.device)
        rightness = Rightness(kernel, coverage, inputs, lambda: self.seconds)

        def section(situation: Situation, before: dict[Situation, Section]) -> Section:
            return Section(
                *(situation, coverage.counts(situation), (), {}, inputs, rightness),
                *(lambda: self.clock(situation), Rule()),
                *(lambda: self.seconds, lambda num_tokens: None, before),
            )

        before: dict[Situation, Section] = {}
        if coverage.captured:
            self.graph = before[Situation.GRAPH] = section(Situation.GRAPH, {})
        self.busy = before[Situation.BUSY] = section(Situation.BUSY, before)
        self.idle = section(Situation.IDLE, before)

    def clock(self, situation: Situation) -> WallClock:
        bench = self

        class Clock(WallClock):
            def prepare(self, train: Train, call_us: float = 0.0) -> Sampler:
                sample = super().prepare(train, call_us)

                def within() -> Pending:
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
        self.rows = len(arguments[0])
        self.filled.add((self.rows, int((arguments[0] >= 0).all(dim=1).sum())))
        self.seconds += 1e-6 * self.us(self.situation, arguments[8])
        return ()


def test_who_is_slower_on_a_busy_device_is_not_measured_on_an_idle_one() -> None:
    busy, idle = {0: 50.0, 1: 70.0, 2: 50.0}, {0: 90.0, 1: 60.0, 2: 60.0}
    bench = Bench(lambda s, policy: (busy if s is Situation.BUSY else idle)[policy])
    bench.busy.explore(1.0)
    bench.idle.explore(2.0)
    assert (Situation.IDLE, 2) in bench.timed
    assert (Situation.IDLE, 1) not in bench.timed
    for bucket in bench.idle.buckets():
        result = bucket.verdicts[0].results[1]
        assert (result.standing, result.reason) == (Standing.SLOWER, SLOWER_BUSY)


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


CAPTURED = Coverage.up_to(SortingShape(8, 2, 4, block_size=4), 64, (1, 2, 4, 8, 16, 32))


def test_eager_calls_of_as_few_tokens_as_graphs_hold_ask_only_who_wins_in_graphs() -> None:
    """Policy 1 wins in graphs, policy 2 eagerly: above the captured sizes that is asked."""
    eager = {0: 50.0, 1: 45.0, 2: 30.0}
    graph = {0: 50.0, 1: 30.0, 2: 50.0}
    bench = Bench(lambda s, p: (graph if s is Situation.GRAPH else eager)[p], CAPTURED)
    bench.graph.explore(1.0)
    bench.busy.explore(2.0)
    bench.idle.explore(3.0)
    assert (Situation.IDLE, 2) not in bench.timed
    for bucket in (*bench.busy.buckets(), *bench.idle.buckets()):
        one, two = bucket.verdicts[0].results[1:]
        assert one.gain is not None
        if bucket.num_tokens <= 32:
            assert (two.standing, two.reason) == (Standing.SLOWER, NOT_IN_GRAPH)
        else:
            assert two.standing is Standing.UNCONFIRMED


def test_where_nobody_wins_in_graphs_no_eager_call_of_so_few_tokens_is_timed() -> None:
    bench = Bench(lambda s, p: 50.0 if p == 0 or s is Situation.GRAPH else 30.0, CAPTURED)
    bench.graph.explore(1.0)
    bench.busy.explore(2.0)
    bench.idle.explore(3.0)
    assert {b.verdicts[0].rounds > 0 for b in bench.busy.buckets() if b.num_tokens > 32} == {True}
    assert not any(b.verdicts[0].rounds for b in bench.busy.buckets() if b.num_tokens <= 32)
    assert (Situation.BUSY, 1) in bench.timed
    assert not any(s is Situation.IDLE for s, _ in bench.timed)


# The second pass


def saving_with_the_count() -> Bench:
    """Policy 1 saves more the more tokens there are."""
    bench = Bench(lambda s, policy: 100.0 if policy != 1 else 90.0 - bench.rows / 2)
    bench.busy.explore(1.0)
    return bench


def confirmed(section: Section) -> list[int]:
    return [b.num_tokens for b in section.buckets() if b.candidate == "policy 1"]


def test_who_saves_most_is_confirmed_first_and_then_as_many_as_there_is_time_for() -> None:
    bench = saving_with_the_count()
    busy, counts = bench.busy, [b.num_tokens for b in bench.busy.buckets()]
    assert confirmed(busy) == []
    # One at least, however little time is left.
    for seconds, those in ((0.0, counts[-1:]), (0.999, counts[1:]), (1.001, counts)):
        busy.choose(seconds * busy.reserve())
        busy.confirm(LOT * LOTS, bench.seconds + 1.0)
        assert confirmed(busy) == those
    assert busy.reserve() == 0.0


def test_a_second_pass_without_time_measures_nothing() -> None:
    bench = saving_with_the_count()
    bench.busy.choose(bench.busy.reserve() + 1.0)
    before = bench.seconds
    bench.busy.confirm(LOT * LOTS, before - 1e-9)
    assert bench.seconds == before
    assert confirmed(bench.busy) == []


def test_time_that_is_over_while_filling_leaves_the_rest_of_the_rounds() -> None:
    bench = Bench(lambda s, policy: 50.0 + policy)
    bench.busy.explore(0.0)
    bench.busy.fill(1e-6)
    rounds = [b.verdicts[0].rounds for b in bench.busy.buckets()]
    assert set(rounds) == {0}


def test_both_passes_fill_a_captured_size_as_the_batches_do_that_it_serves() -> None:
    padded = Coverage.up_to(COVERAGE.shape, 64, (8, 32), padding_rows=True)
    bench = Bench(lambda s, policy: 30.0 if policy == 1 else 50.0, padded)
    bench.graph.explore(1.0)
    first, bench.filled = bench.filled, set()
    bench.graph.choose(1.0)
    bench.graph.confirm(LOT * LOTS, bench.seconds + 1.0)
    assert bench.filled == first
    assert {real < rows for rows, real in first} == {True}
    fills = [fill.fraction for bucket in bench.graph.buckets() for fill in bucket.fills]
    assert fills == [4.5 / 8, 20.5 / 32]
    assert confirmed(bench.graph) == [8, 32]
