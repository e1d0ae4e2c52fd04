"""Two situations of one calibration, on a clock that the kernel moves as the situation says."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from adaptive_moe.kernels import SortKernel, cpu_sort, policy_candidates
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.decision import Rule, Standing, Verdict
from adaptive_moe.policy.evidence import Bucket, Fill
from adaptive_moe.policy.situation import Situation
from adaptive_moe.shape import SortingShape
from adaptive_moe.tuning.asked import NOT_IN_GRAPH, SLOWER_BUSY
from adaptive_moe.tuning.calibrator import _confirm, _measure
from adaptive_moe.tuning.clocks import Pending, Sampler, Train, WallClock
from adaptive_moe.tuning.inputs import Inputs
from adaptive_moe.tuning.race import LOT, LOTS
from adaptive_moe.tuning.rightness import Rightness
from adaptive_moe.tuning.section import Section

COVERAGE = Coverage.up_to(SortingShape(8, 2, 4, block_size=4), 64, busy_from=33)


class Bench:
    """us(situation, policy) is what a call takes. timed: who was, in which situation. rows: of the
    call that is timed; real: so many of them by num_local_tokens. filled: the rows of each, and how
    many are real. checked: policy and rows of those that were not timed; wrong(policy, ids) says
    who then returns something else. spent: seconds in each situation. told: the counts in each, as
    they were told."""

    def __init__(
        self,
        us: Callable[[Situation, int], float],
        coverage: Coverage = COVERAGE,
        rule: Rule | None = None,
        kept: Mapping[int, Bucket] | None = None,
        wrong: Callable[[int, torch.Tensor], bool] = lambda policy, ids: False,
    ) -> None:
        self.us, self.seconds, self.wrong = us, 0.0, wrong
        self.rows = self.real = 0
        self.situation: Situation | None = None
        self.timed: set[tuple[Situation, int]] = set()
        self.filled: set[tuple[int, int]] = set()
        self._seen: set[int] = set()
        self.checked: set[tuple[int, int]] = set()
        self.spent: Counter[Situation] = Counter()
        self.told: list[tuple[Situation, int]] = []
        candidates = policy_candidates(self.sort)
        kernel = SortKernel("made up", torch.device("cpu"), candidates)
        inputs = Inputs(coverage, None, kernel.device)
        rightness = Rightness(kernel, coverage, inputs, lambda: self.seconds)

        def section(situation: Situation, before: dict[Situation, Section]) -> Section:
            return Section(
                *(situation, coverage.counts(situation), (), kept or {}, inputs, rightness),
                *(lambda: self.clock(situation), rule or Rule()),
                *(lambda: self.seconds, lambda n: self.told.append((situation, n)), before),
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
            self.checked.add((arguments[8], len(arguments[0])))
            outputs = cpu_sort.moe_sorting(*arguments)
            outputs[1][0] += self.wrong(arguments[8], arguments[0])
            return outputs
        self.timed.add((self.situation, arguments[8]))
        self.rows = len(arguments[0])
        self.real = self.rows if arguments[7] is None else int(arguments[7])
        if id(arguments[0]) not in self._seen:  # inputs are kept
            self._seen.add(id(arguments[0]))
            self.filled.add((self.rows, int((arguments[0] >= 0).all(dim=1).sum())))
        took = self.us(self.situation, arguments[8]) / 1e6
        self.seconds += took
        self.spent[self.situation] += took
        return ()


def test_who_is_slower_on_a_busy_device_is_not_measured_on_an_idle_one() -> None:
    busy, idle = {0: 50.0, 1: 70.0, 2: 50.0}, {0: 90.0, 1: 60.0, 2: 60.0}
    bench = Bench(lambda s, policy: (busy if s is Situation.BUSY else idle)[policy])
    bench.busy.explore(1.0)
    bench.idle.explore(2.0)
    assert (Situation.IDLE, 2) in bench.timed
    assert (Situation.IDLE, 1) not in bench.timed
    for bucket in bench.idle.buckets():
        results = bucket.verdicts[0].results
        assert [r.candidate for r in results] == ["policy 0", "policy 1", "policy 2"]
        assert (results[1].standing, results[1].reason) == (Standing.SLOWER, SLOWER_BUSY)


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
    # Nobody is even looked at.
    assert bench.timed == set()
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


# The time of the first pass. A call takes a 1024th of a second, so that all sums are exact.

TICK_US = 1e6 / 1024
# Four calls of three policies: one of each in a look, and two of each in a round.
LOOK, ROUND = 12, 24


def never_settled(bench: Callable[[], Bench]) -> Callable[[Situation, int], float]:
    """Each round takes as long, but policy 1 and 2 take turns to be thrice as fast."""
    calls: Counter[tuple[int, int]] = Counter()

    def us(situation: Situation, policy: int) -> float:
        calls[bench().rows, policy] += 1
        round_of = (calls[bench().rows, policy] - 5) // 8
        if policy == 0 or round_of < 0:
            return TICK_US
        return TICK_US * (1.5 if (round_of + policy) % 2 else 0.5)

    return us


def unsettled(max_tokens: int = 64) -> Bench:
    coverage = Coverage.up_to(COVERAGE.shape, max_tokens, busy_from=1)
    bench = Bench(never_settled(lambda: bench), coverage)
    return bench


def rounds_of(section: Section) -> list[int]:
    return [b.verdicts[0].rounds for b in section.buckets()]


@pytest.mark.parametrize(
    ("max_tokens", "ticks", "rounds"),
    [
        # The first of seven has two eighths, and five rounds in any case.
        (64, 4 * (LOOK + 5 * ROUND), [6, 5, 5, 4, 0, 0, 0]),
        (64, 4 * (LOOK + 5 * ROUND) - 1, [5, 5, 5, 5, 0, 0, 0]),
        (64, 4 * (LOOK + 4 * ROUND) - 1, [5, 5, 5, 1, 0, 0, 0]),
        (64, 10 * (LOOK + 6 * ROUND), [6, 6, 6, 6, 6, 6, 6]),
        # What is alone has all there is, to the end of the round that is begun.
        (1, LOOK, [0]),
        (1, LOOK + 1, [1]),
        (1, LOOK + 5 * ROUND, [6]),
        (1, LOOK + 5 * ROUND - 1, [5]),
        # A doubt has all that is left.
        (1, LOOK + 7 * ROUND + 1, [8]),
    ],
)
def test_a_bucket_has_its_share_and_as_much_again_and_as_many_rounds_as_a_verdict_takes(
    max_tokens: int, ticks: int, rounds: list[int]
) -> None:
    bench = unsettled(max_tokens)
    bench.busy.explore(ticks / 1024)
    found = rounds_of(bench.busy)
    assert [min(6, n) for n in found] == rounds if min(rounds) == 6 else found == rounds
    grid = [1, 2, 4, 8, 16, 32, 64][: len(rounds)]
    assert [n for _, n in bench.told][: len(grid)] == grid


@pytest.mark.parametrize(
    ("ticks", "rounds"), [(LOOK + 4 * ROUND - 1, 4), (LOOK + 4 * ROUND, 5), (1000, 6)]
)
def test_what_had_no_turn_is_sketched_as_far_as_time_goes_and_nothing_else(
    ticks: int, rounds: int
) -> None:
    bench = unsettled()
    bench.busy.explore(4 * (LOOK + 5 * ROUND) / 1024)
    bench.busy.fill(bench.seconds + ticks / 1024)
    found = rounds_of(bench.busy)
    assert found[:5] == [6, 5, 5, 4, rounds]
    assert found[5:] == ([6, 6] if ticks == 1000 else [0, 0])


def test_the_log_says_what_is_measured(caplog: pytest.LogCaptureFixture) -> None:
    bench = unsettled(1)
    with caplog.at_level(logging.DEBUG, "adaptive_moe"):
        bench.busy.explore(1e-3)
    assert [record.getMessage() for record in caplog.records] == [
        f"{COVERAGE.shape.describe()} at 1 tokens, busy",
        f"first look us: { {f'policy {p}': TICK_US for p in (0, 1, 2)} }",
    ]


# Whom it asks, and what it goes by


@pytest.mark.parametrize(
    ("num_tokens", "shared"),
    [
        (1, [1]),
        (3, [1, 2, 4]),
        (4, [2, 4]),
        (8, [4, 8]),
        (32, [16, 32]),
        (33, [16, 32, 64]),
        (99, [32, 64]),
    ],
)
def test_an_eager_bucket_goes_by_those_it_shares_counts_with(
    num_tokens: int, shared: list[int]
) -> None:
    """One of so many tokens serves down to a fourth of them."""
    verdicts = {1 << k: Verdict("policy 0", True, 8, f"of {1 << k}", ()) for k in range(7)}
    kept = {n: Bucket(n, "policy 0", "", (Fill(1.0, v),)) for n, v in verdicts.items()}
    bench = Bench(lambda s, policy: 50.0, kept=kept)
    bench.busy.explore(0.0)
    assert bench.busy.around(num_tokens) == [[verdicts[n]] for n in shared]
    assert bench.busy.buckets() == tuple(kept.values())


def test_who_is_asked_is_checked_first_and_nobody_else() -> None:
    """Policy 1 wins in graphs, which are of other counts than the eager calls begin with."""
    coverage = Coverage.up_to(COVERAGE.shape, 64, (2, 8, 32))
    bench = Bench(lambda s, p: 30.0 if p == 1 else 50.0, coverage)
    bench.graph.explore(1.0)
    bench.busy.explore(2.0)
    assert {(1, 1), (1, 4), (1, 16), (1, 64)} <= bench.checked
    bench = Bench(lambda s, p: 50.0, coverage)
    bench.graph.explore(1.0)
    bench.busy.explore(2.0)
    assert {rows for _, rows in bench.checked if rows <= 32} == {2, 8, 32}


@pytest.mark.parametrize("before", [True, False])
def test_who_is_wrong_only_where_rows_are_filled_up_is_found_by_a_graph_s_own_check(
    before: bool,
) -> None:
    padded = Coverage.up_to(COVERAGE.shape, 64, (8, 32), padding_rows=True)
    bench = Bench(
        lambda s, p: 30.0 if p == 1 else 50.0,
        padded,
        wrong=lambda policy, ids: policy == 1 and bool((ids < 0).any()),
    )
    bench.busy.check()
    assert "policy 1" not in bench.graph.rightness.excluded
    if before:
        bench.graph.check()
        assert "policy 1" in bench.graph.rightness.excluded
    bench.graph.explore(1.0)
    bench.busy.explore(bench.seconds + 1.0)
    assert {b.verdicts[0].results[1].standing for b in bench.busy.buckets()} == {Standing.WRONG}


def test_what_may_be_lost_in_another_fill_is_the_rule_s_to_say() -> None:
    """Policy 1 saves 40% where all rows are real, and costs 3% where few are."""
    coverage = Coverage.up_to(SortingShape(8, 2, 4, block_size=4, num_local_tokens=True), 8)

    def us(situation: Situation, policy: int) -> float:
        return 50.0 if policy != 1 else 30.0 if bench.real == bench.rows else 51.5

    for margin, chosen in ((0.01, "policy 0"), (0.05, "policy 1")):
        bench = Bench(us, replace(coverage, busy_from=1), Rule(margin=margin))
        bench.busy.explore(1.0)
        bench.busy.choose(1.0)
        bench.busy.confirm(LOT * LOTS, 9.0)
        assert bench.busy.buckets()[-1].candidate == chosen


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
    first, bench.filled, bench._seen = bench.filled, set(), set()
    bench.graph.choose(1.0)
    bench.graph.confirm(LOT * LOTS, bench.seconds + 1.0)
    assert bench.filled == first
    assert {real < rows for rows, real in first} == {True}
    fills = [fill.fraction for bucket in bench.graph.buckets() for fill in bucket.fills]
    assert fills == [4.5 / 8, 20.5 / 32]
    assert confirmed(bench.graph) == [8, 32]


def test_time_for_all_is_time_for_all_and_nobody_is_confirmed_unchosen() -> None:
    bench = Bench(lambda s, policy: 100.0 if policy != 1 else 50.0 + bench.rows / 2)
    bench.busy.explore(1.0)
    begun = bench.seconds
    bench.busy.confirm(LOT * LOTS, begun + 1.0)
    assert bench.seconds == begun
    # Who saves most comes first here, and so the sums are the same.
    bench.busy.choose(bench.busy.reserve())
    bench.busy.confirm(LOT * LOTS, begun + 1.0)
    assert confirmed(bench.busy) == [b.num_tokens for b in bench.busy.buckets()]


# Both passes over all situations


def test_situations_share_the_budget_as_their_calls_are_frequent() -> None:
    bench = Bench(never_settled(lambda: bench))
    _measure([bench.busy, bench.idle], 4.0)
    assert bench.spent[Situation.BUSY] == pytest.approx(3.0, abs=2 * ROUND / 1024)
    assert bench.spent[Situation.IDLE] == pytest.approx(1.0, abs=4 * ROUND / 1024)


def test_what_one_situation_does_not_need_the_next_ones_have() -> None:
    noisy = never_settled(lambda: bench)
    bench = Bench(lambda s, p: TICK_US / 8 if s is Situation.BUSY else noisy(s, p))
    _measure([bench.busy, bench.idle], 2.0)
    assert bench.spent[Situation.BUSY] < 0.5
    assert sum(bench.spent.values()) == pytest.approx(2.0, abs=ROUND / 1024)


def test_the_time_to_confirm_one_situation_s_winners_is_left_by_those_after_it() -> None:
    """Policy 1 wins in graphs, and no eager bucket is ever settled."""
    noisy = never_settled(lambda: bench)

    def us(situation: Situation, policy: int) -> float:
        if situation is Situation.GRAPH:
            return TICK_US / (16.0 if policy == 1 else 8.0)
        return noisy(situation, policy)

    bench = Bench(us, CAPTURED)
    _measure([bench.graph, bench.busy, bench.idle], 2.0)
    assert confirmed(bench.graph) == [1, 2, 4, 8, 16, 32]
    assert 1.5 < sum(bench.spent.values()) < 2.0 + ROUND / 1024
    assert bench.spent[Situation.IDLE] > 0.1


def test_situations_confirm_as_many_as_there_is_time_for_each_by_what_it_needs() -> None:
    bench = Bench(lambda s, p: TICK_US / (2.0 if p == 1 else 1.0), CAPTURED)
    bench.graph.explore(100.0)
    bench.busy.explore(200.0)
    needed = bench.graph.reserve() + bench.busy.reserve()
    before = bench.seconds
    _confirm([bench.graph, bench.busy], before)
    assert bench.seconds == before
    _confirm([bench.graph, bench.busy], before + 0.5 * needed)
    for section in (bench.graph, bench.busy):
        found = Counter(b.verdicts[0].results[1].standing for b in section.buckets())
        assert found.pop(Standing.UNSETTLED, 0) <= 1  # whom the end cut short
        assert set(found) == {Standing.FASTER, Standing.UNCONFIRMED}
        assert found[Standing.FASTER] >= 3
