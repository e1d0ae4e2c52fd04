"""calibrate() with a kernel that sorts for real, on a clock that the kernel itself moves."""

import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
import torch

from adaptive_moe.kernels import SortKernel, cpu_sort, policy_candidates
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.decision import SWEEPS, Rule, Standing
from adaptive_moe.policy.evidence import Bucket
from adaptive_moe.policy.situation import Situation
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.shape import SortingShape
from adaptive_moe.tuning.calibrator import (
    CAPTURING,
    IDLE_ROUNDS,
    BudgetError,
    CalibrationFailedError,
    CalibrationRefusedError,
    Plan,
    _grid,
    _rule,
    _sections,
    calibrate,
)
from adaptive_moe.tuning.clocks import Clock, WallClock
from adaptive_moe.tuning.race import LOTS
from adaptive_moe.tuning.section import Section
from tests.tuning.engine import engine_defaults
from tests.tuning.made_up_gpu import DEVICE, Gpu, Graph

SHAPE = SortingShape(8, 2, 4, block_size=4)
CPU = torch.device("cpu")
Outputs = tuple[torch.Tensor, ...]


@dataclass
class Fake:
    """A kernel and its clock: each call takes what `us` says and returns what cpu_sort does.

    us(policy, rows, real rows) is in microseconds; `spoil` may change the outputs, `fail` raise.
    Nobody looks at the outputs of a timed call, so that one (memory is not poisoned then) sorts
    nothing. device: what the kernel says it runs on; situation: whose clock was made last.
    """

    us: Callable[[int, int, int], float]
    spoil: Callable[[int, int, Outputs], Outputs] = lambda policy, rows, outputs: outputs
    fail: Callable[[int, int], bool] = lambda policy, rows: False
    policies: tuple[int, ...] = (0, 1, 2)
    seconds: float = 0.0
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    timed_from: float = math.nan
    timed_calls: int = 0

    def sort(self, *arguments: Any) -> Outputs:
        self.calls.append(arguments)
        rows, policy, local = len(arguments[0]), arguments[8], arguments[7]
        self.seconds += 1e-6 * self.us(policy, rows, rows if local is None else int(local))
        if self.fail(policy, rows):
            raise RuntimeError("no kernel for this size")
        if not torch.are_deterministic_algorithms_enabled():
            return ()
        with CPU:
            return self.spoil(policy, rows, cpu_sort.moe_sorting(*arguments))

    def clock(self, situation: Situation, device: torch.device) -> Clock:
        assert (situation, device) == (Situation.BUSY, CPU)
        self.timed_from, self.timed_calls = self.seconds, len(self.calls)
        return WallClock(lambda: self.seconds)

    def calibrate(self, shape: SortingShape = SHAPE, **options: Any) -> PolicyTable:
        """options: of Plan, of Coverage.up_to, and of calibrate()."""
        known = ("expert_mask", "progress", "earlier")
        more = {k: options.pop(k) for k in known if k in options}
        cover = {k: options.pop(k) for k in ("captured", "baseline") if k in options}
        return calibrate(
            SortKernel("made up", CPU, policy_candidates(self.sort, policies=self.policies)),
            Coverage.up_to(shape, options.pop("max_tokens", 64), **cover),
            Plan(**{"budget_s": 60.0, **options}),
            clock_factory=self.clock,
            now=lambda: self.seconds,
            **more,
        )


def standings(bucket: Bucket) -> list[Standing]:
    """Of the others than the baseline, where all rows are real."""
    return [r.standing for r in bucket.fills[0].verdict.results[1:]]


def crossing(at: float, policy: int, rows: int) -> float:
    """1 is best up to `at` rows and 2 beyond; policy 0 is a fifth slower than the better one."""
    one, two = 50.0 + 50.0 * rows / at, 100.0
    return {0: 1.25 * min(one, two), 1: one, 2: two}[policy]


@pytest.mark.parametrize("at", [3, 11, 40])
def test_a_planted_crossover_is_found_to_within_a_few_margins(at: int) -> None:
    table = Fake(lambda policy, rows, real: crossing(at, policy, rows)).calibrate()
    assert table.graph is table.eager
    for rows in range(1, 65):
        best = min(crossing(at, policy, rows) for policy in (1, 2))
        assert crossing(at, table.eager[rows], rows) <= 1.031 * best


def test_a_policy_0_that_switches_at_the_wrong_count_is_replaced_just_where_it_is_wrong() -> None:
    """Policy 0 runs what 1 runs up to 20 rows, but 1 stays the better choice up to 45."""

    def us(policy: int, rows: int, real: int) -> float:
        one, two = (60.0, 90.0) if rows <= 45 else (90.0, 60.0)
        return {0: one if rows <= 20 else two, 1: one, 2: two}[policy]

    table = Fake(us).calibrate()
    assert list(table.eager[1:]) == [0] * 20 + [1] * 25 + [0] * 19


def test_identical_policies_give_policy_0_everywhere_in_few_calls() -> None:
    fake = Fake(lambda policy, rows, real: 50.0)
    table = fake.calibrate()
    assert set(table.eager) == {0}
    assert {b.num_tokens for b in table.evidence.busy} == {1, 2, 4, 8, 16, 32, 64}
    assert {s for b in table.evidence.busy for s in standings(b)} == {Standing.TIED}


def test_on_the_cpu_capture_sizes_give_no_array_of_their_own() -> None:
    table = Fake(lambda policy, rows, real: 50.0).calibrate(captured=(1, 2, 4))
    assert table.graph is table.eager
    assert table.evidence.graph == ()


def test_the_first_buckets_are_those_asked_for() -> None:
    table = Fake(lambda policy, rows, real: 50.0).calibrate(first=(5, 20))
    assert [b.num_tokens for b in table.evidence.busy] == [1, 5, 20, 64]


def test_the_table_keeps_what_it_was_measured_for_and_reads_back_equal() -> None:
    fake = Fake(lambda policy, rows, real: crossing(11, policy, rows))
    table = fake.calibrate(budget_s=2e-2)
    found = table.evidence
    assert (found.coverage.shape, found.kernel, found.budget_s) == (SHAPE, "made up", 2e-2)
    assert found.candidates == ("policy 0", "policy 1", "policy 2")
    assert found.coverage.max_tokens == 64
    assert found.seconds == pytest.approx(fake.seconds, abs=1e-3)
    assert found.environment.torch == torch.__version__
    begun = datetime.fromisoformat(found.created)
    assert begun.utcoffset() == timedelta(0)
    assert begun.microsecond == 0
    assert PolicyTable.from_json(table.to_json()) == table


# What is wrong or raises


def spoiled(outputs: Outputs) -> Outputs:
    outputs[0][0] += 1
    return outputs


def test_a_wrong_policy_is_out_however_fast_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake = Fake(
        lambda policy, rows, real: {0: 50.0, 1: 1.0, 2: 40.0}[policy],
        lambda policy, rows, outputs: spoiled(outputs) if policy == 1 else outputs,
    )
    with caplog.at_level(logging.WARNING, "adaptive_moe"):
        table = fake.calibrate()
    assert set(table.eager[1:]) == {2}
    (message,) = [record.getMessage() for record in caplog.records]
    assert "policy 1 is out for 8 experts" in message
    assert "sorted_ids" in message
    for bucket in table.evidence.busy:
        result = bucket.fills[0].verdict.results[1]
        assert result.standing is Standing.WRONG
        assert "sorted_ids" in result.reason


def test_a_policy_wrong_only_at_the_largest_count_is_out_for_every_count() -> None:
    fake = Fake(
        lambda policy, rows, real: {0: 50.0, 1: 20.0, 2: 50.0}[policy],
        lambda policy, rows, outputs: spoiled(outputs) if policy == 1 and rows > 60 else outputs,
    )
    table = fake.calibrate()
    assert set(table.eager) == {0}
    assert all(
        b.fills[0].verdict.results[1].standing is Standing.WRONG for b in table.evidence.busy
    )
    # Found before any clock ran, so no time went into it.
    assert 1 not in {arguments[8] for arguments in fake.calls[fake.timed_calls :]}


def test_a_policy_found_wrong_while_refining_is_out_for_every_count() -> None:
    def us(policy: int, rows: int, real: int) -> float:
        return {0: 50.0, 1: 20.0 if rows < 30 else 60.0, 2: 60.0}[policy]

    fake = Fake(
        us,
        lambda policy, rows, outputs: (
            spoiled(outputs) if policy == 1 and rows in range(3, 64) else outputs
        ),
    )
    table = fake.calibrate(first=(2, 64), max_tokens=64)
    assert len(table.evidence.busy) > 3
    assert set(table.eager) == {0}
    assert table.evidence.busy[0].fills[0].verdict.results[1].standing is Standing.WRONG


def test_a_raising_policy_is_out_with_its_reason_and_the_others_are_measured() -> None:
    fake = Fake(
        lambda policy, rows, real: {0: 50.0, 1: 1.0, 2: 40.0}[policy],
        fail=lambda policy, rows: policy == 1 and rows == 16,
    )
    table = fake.calibrate()
    assert set(table.eager[1:]) == {2}
    result = table.evidence.busy[0].fills[0].verdict.results[1]
    assert result.standing is Standing.FAILED
    assert result.reason == "raised RuntimeError: no kernel for this size"


def test_a_policy_that_raises_only_while_it_is_timed_is_out_for_every_count(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = 0

    def fail(policy: int, rows: int) -> bool:
        nonlocal calls
        calls += (policy, rows) == (1, 16)
        return (policy, rows) == (1, 16) and calls > 5

    fake = Fake(lambda policy, rows, real: {0: 50.0, 1: 20.0, 2: 50.0}[policy], fail=fail)
    with caplog.at_level(logging.WARNING, "adaptive_moe"):
        table = fake.calibrate()
    assert set(table.eager) == {0}
    assert [record.getMessage() for record in caplog.records] == [
        "policy 1 is out for 8 experts, topk 2, dim 4, bfloat16, block 4: at 16 tokens it raised "
        "RuntimeError: no kernel for this size"
    ]


@pytest.mark.parametrize("at", [1, 16, 64])
def test_where_the_baseline_raises_there_is_no_table_but_the_reason(at: int) -> None:
    fake = Fake(
        lambda policy, rows, real: {0: 50.0, 1: 20.0, 2: 30.0}[policy],
        fail=lambda policy, rows: policy == 0 and rows == at,
    )
    with pytest.raises(CalibrationFailedError, match=f"at {at} tokens policy 0 raised.*no kernel"):
        fake.calibrate()


def test_a_baseline_that_raises_only_while_it_is_timed_is_a_failure_as_well() -> None:
    fake = Fake(
        lambda policy, rows, real: {0: 50.0, 1: 20.0, 2: 30.0}[policy],
        fail=lambda policy, rows: policy == 0 and len(fake.calls) > 100,
    )
    with pytest.raises(CalibrationFailedError, match="policy 0 raised RuntimeError: no kernel"):
        fake.calibrate()


def test_whatever_else_breaks_is_a_failure_of_the_moment() -> None:
    def progress(*step: object) -> None:
        raise MemoryError("no room")

    with pytest.raises(CalibrationFailedError, match="MemoryError: no room"):
        Fake(lambda *_: 9.0).calibrate(progress=progress)


def test_a_failure_that_passes_leaves_a_table_that_is_not_sound() -> None:
    us = lambda policy, rows, real: {0: 50.0, 1: 20.0, 2: 30.0}[policy]  # noqa: E731
    assert Fake(us).calibrate().sound
    failing = Fake(us, fail=lambda policy, rows: policy == 1 and len(failing.calls) == 40)
    table = failing.calibrate()
    assert not table.sound
    assert set(table.eager[1:]) == {2}


def test_candidates_that_are_all_hopeless_or_out_keep_the_baseline_without_an_error() -> None:
    fake = Fake(
        lambda policy, rows, real: {0: 1.0, 1: 50.0, 2: 70.0}[policy],
        fail=lambda policy, rows: policy == 2,
    )
    table = fake.calibrate()
    assert set(table.eager) == {0}
    assert set(standings(table.evidence.busy[0])) == {Standing.HOPELESS, Standing.FAILED}


def test_a_kernel_of_the_baseline_alone_has_a_table_of_zeros() -> None:
    assert set(Fake(lambda *_: 9.0, policies=(0,)).calibrate().eager) == {0}


# Time


def test_first_calls_that_compile_are_neither_timed_nor_on_the_budget() -> None:
    seen: set[tuple[int, int]] = set()

    def us(policy: int, rows: int, real: int) -> float:
        compiles = (policy, rows) not in seen
        seen.add((policy, rows))
        return 1e9 if compiles else {0: 50.0, 1: 40.0, 2: 50.0}[policy]

    table = Fake(us).calibrate(budget_s=0.5)
    assert set(table.eager[1:]) == {1}
    assert table.evidence.seconds > 1e4
    for bucket in table.evidence.busy:
        medians = [result.median_us for result in bucket.fills[0].verdict.results]
        assert medians == pytest.approx([50.0, 40.0, 50.0], rel=1e-3)


def jumpy() -> Callable[[int, int, int], float]:
    """Policies 1 and 2 seem to gain a little, but jump up and down from round to round."""
    calls: Counter[tuple[int, int]] = Counter()

    def us(policy: int, rows: int, real: int) -> float:
        calls[policy, rows] += 1
        # One call is the check and four are the first look; a round has eight.
        rounds = (calls[policy, rows] - 6) // 8
        return 50.0 if policy == 0 or rounds < 0 else 75.0 if (rounds + policy) % 2 else 30.0

    return us


@pytest.mark.parametrize("budget_s", [0.1, 0.3])
def test_where_nothing_settles_the_budget_is_used_kept_and_shared_by_all_buckets(
    budget_s: float,
) -> None:
    fake = Fake(jumpy())
    table = fake.calibrate(budget_s=budget_s)
    slowest_round = 3 * (SWEEPS + 1) * 4 * 75e-6  # with a first look before it
    spent = fake.seconds - fake.timed_from
    assert 0.9 * budget_s <= spent <= budget_s + slowest_round
    assert set(table.eager) == {0}
    for bucket in table.evidence.busy:
        assert bucket.fills[0].verdict.rounds > 0
        assert not bucket.fills[0].verdict.settled


def test_what_is_settled_leaves_its_time_to_others() -> None:
    fake = Fake(lambda policy, rows, real: {0: 50.0, 1: 40.0, 2: 50.0}[policy])
    fake.calibrate(budget_s=60.0)
    assert fake.seconds - fake.timed_from < 0.2


def test_a_budget_too_small_for_one_round_is_an_error_that_says_so() -> None:
    fake = Fake(lambda policy, rows, real: 50.0)
    with pytest.raises(BudgetError) as raised:
        fake.calibrate(budget_s=1e-5)
    assert str(raised.value) == (
        "budget 1e-05 s is too small for one round of any bucket of 8 experts, topk 2, dim 4, "
        "bfloat16, block 4: give a larger budget"
    )


@pytest.mark.parametrize(("first", "at_first"), [((), 7), ((5, 20), 4)])
def test_progress_rises_to_its_total_and_names_the_token_count(
    first: tuple[int, ...], at_first: int
) -> None:
    told: list[tuple[int, int, str]] = []
    table = Fake(lambda policy, rows, real: crossing(11, policy, rows)).calibrate(
        first=first, progress=lambda *step: told.append(step)
    )
    counts = [b.num_tokens for b in table.evidence.busy]
    assert len(counts) > at_first
    assert {what for _, _, what in told} >= {f"{n} token{'s' * (n > 1)}, busy" for n in counts}
    assert [done for done, _, _ in told] == list(range(1, len(told) + 1))
    assert all(a[1] <= b[1] and b[0] <= b[1] for a, b in pairwise(told))
    assert {what.split()[0].isdigit() for _, _, what in told} == {True}
    assert told[0] == (1, at_first, "1 token, busy")
    assert told[-1][0] == told[-1][1]


# What reaches the kernel


def test_every_sample_mixes_different_routings() -> None:
    fake = Fake(lambda policy, rows, real: 50.0)
    fake.calibrate(max_tokens=16, first=(16,))
    timed = [a[0] for a in fake.calls[fake.timed_calls :] if a[8] == 0 and len(a[0]) == 16]
    assert not torch.equal(timed[0], timed[1])
    for ids in timed[:2]:
        assert all(len(set(row)) == SHAPE.topk for row in ids.tolist())


def test_the_caller_s_expert_mask_reaches_every_call() -> None:
    mask = torch.tensor([0, 1, 1, 0, 1, 0, 1, 0], dtype=torch.int32)
    fake = Fake(lambda policy, rows, real: 50.0)
    fake.calibrate(SortingShape(8, 2, 4, local_experts=4), expert_mask=mask, max_tokens=8)
    assert fake.calls
    assert all(arguments[6] is mask for arguments in fake.calls)


def test_without_one_a_rank_keeps_its_first_experts() -> None:
    fake = Fake(lambda policy, rows, real: 50.0)
    fake.calibrate(SortingShape(8, 2, 4, local_experts=3), max_tokens=8)
    assert all(a[6].tolist() == [1, 1, 1, 0, 0, 0, 0, 0] for a in fake.calls)
    plain = Fake(lambda policy, rows, real: 50.0)
    plain.calibrate(max_tokens=8)
    assert all(a[6] is None and a[7] is None for a in plain.calls)


PADDED = SortingShape(8, 2, 4, block_size=4, num_local_tokens=True)


def test_padded_rows_are_measured_at_several_fills() -> None:
    fake = Fake(lambda policy, rows, real: 50.0)
    table = fake.calibrate(PADDED)
    assert {int(a[7]) for a in fake.calls if len(a[0]) == 64} == {64, 8, 1}
    assert [f.fraction for f in table.evidence.busy[-1].fills] == [1.0, 1 / 8, 1 / 64]


def test_padded_rows_get_the_candidate_that_loses_in_no_fill() -> None:
    def us(policy: int, rows: int, real: int) -> float:
        # Policy 1 is best where all rows are real, but much the worst where few are.
        full = {0: 60.0, 1: 50.0, 2: 53.0}
        sparse = {0: 60.0, 1: 90.0, 2: 45.0}
        return full[policy] if real == rows else sparse[policy]

    table = Fake(us).calibrate(PADDED, first=(32, 64), max_tokens=64)
    assert table.candidate(64) == "policy 2"
    assert [f.verdict.candidate for f in table.evidence.busy[-1].fills] == [
        "policy 1",
        "policy 2",
        "policy 2",
    ]


def test_a_winner_of_the_sparse_fills_alone_is_confirmed_in_these() -> None:
    us = lambda policy, rows, real: 40.0 if policy == 1 and real < rows else 50.0  # noqa: E731
    table = Fake(us).calibrate(PADDED, first=(64,))
    winners = [f.verdict.candidate for f in table.evidence.busy[-1].fills]
    assert winners == ["policy 0", "policy 1", "policy 1"]
    # It is equal in the full one, and serves.
    assert table.candidate(64) == "policy 1"


def test_a_policy_wrong_at_one_fill_only_is_out() -> None:
    def spoil(policy: int, rows: int, outputs: Outputs) -> Outputs:
        sparse = int(outputs[3][1]) < rows
        return spoiled(outputs) if policy == 2 and sparse else outputs

    table = Fake(lambda policy, rows, real: {0: 50.0, 1: 50.0, 2: 20.0}[policy], spoil).calibrate(
        PADDED
    )
    assert set(table.eager) == {0}


# A winner is confirmed


def fooled(until: int) -> Callable[[int, int, int], float]:
    """Policy 1 is a fifth faster in its first calls at each count, and the same after."""
    calls: Counter[int] = Counter()

    def us(policy: int, rows: int, real: int) -> float:
        calls[rows] += policy == 1
        return 40.0 if policy == 1 and calls[rows] <= until else 50.0

    return us


def test_who_is_faster_in_the_first_pass_only_replaces_nothing() -> None:
    """One check, four calls of a look, and eight in each of the five rounds that settle it."""
    table = Fake(fooled(1 + 4 + 8 * 5)).calibrate()
    assert set(table.eager) == {0}
    for bucket in table.evidence.busy:
        assert standings(bucket)[0] is Standing.TIED
        assert "not confirmed" in bucket.reason


def test_who_is_faster_in_both_passes_is_confirmed() -> None:
    table = Fake(fooled(1 << 30)).calibrate()
    assert set(table.eager[1:]) == {1}
    assert table.settled


def test_the_second_pass_comes_after_the_first_of_every_bucket_and_prepares_anew() -> None:
    fake = Fake(fooled(1 << 30))
    prepared: list[tuple[int, int]] = []
    told: list[float] = []

    class Preparing(WallClock):
        def prepare(self, train: Any, call_us: float = 0.0) -> Any:
            arguments = train[0].args
            prepared.append((len(arguments[0]), arguments[8]))
            told.append(call_us)
            return super().prepare(train, call_us)

    fake.clock = lambda situation, device: Preparing(lambda: fake.seconds)  # type: ignore[method-assign]
    table = fake.calibrate()
    grid = [b.num_tokens for b in table.evidence.busy]
    # Of the baseline and the winner, and only of them, for each of LOTS lots.
    last = prepared[-2 * LOTS * len(grid) :]
    # Its lots lie apart: each count has one before any has the next.
    assert last == last[: 2 * len(grid)] * LOTS
    assert sorted(last[: 2 * len(grid)]) == [(n, p) for n in grid for p in (0, 1)]
    assert told[-len(last) :] == pytest.approx([40.0] * len(last))
    assert {n for n, _ in prepared[: -2 * LOTS * len(grid)]} >= set(grid)


def test_time_for_confirming_is_kept_back() -> None:
    """Refinement that never ends: yet what was found by then is confirmed."""
    jump = jumpy()

    def us(policy: int, rows: int, real: int) -> float:
        if policy == 2:
            return jump(policy, rows, real)
        return 50.0 if policy == 0 else 35.0

    table = Fake(us).calibrate(budget_s=0.3)
    found = Counter(s for b in table.evidence.busy for s in standings(b)[:1])
    # A bucket begun last may have no verdict; whatever was found to be faster is confirmed.
    assert found.pop(Standing.UNSETTLED, 0) <= 1
    assert set(found) == {Standing.FASTER}


def test_where_not_all_winners_can_be_confirmed_those_that_save_most_are() -> None:
    """Winners at every count, and time for a few: not a third of the way with each of them."""

    def us(policy: int, rows: int, real: int) -> float:
        return 100.0 if policy == 0 else 99.0 if policy == 2 else 50.0 + rows / 4

    whole = Fake(us).calibrate()
    assert {s for b in whole.evidence.busy for s in standings(b)[:1]} == {Standing.FASTER}
    found = {}
    for budget_s in (0.07, 0.09, 0.11):
        busy = Fake(us).calibrate(budget_s=budget_s).evidence.busy
        found[budget_s] = [b.num_tokens for b in busy if standings(b)[0] is Standing.FASTER]
    assert 1 <= len(found[0.07]) < len(whole.evidence.busy)
    assert len(found[0.07]) <= len(found[0.09]) <= len(found[0.11])
    # What saves most is at the smallest counts.
    assert found[0.07] == [b.num_tokens for b in whole.evidence.busy][: len(found[0.07])]
    # Nor does it matter when that is.
    late = Fake(us, seconds=1024.0).calibrate(budget_s=0.07).evidence
    assert [b.num_tokens for b in late.busy if standings(b)[0] is Standing.FASTER] == found[0.07]
    assert late.seconds < 1.0


# What is known already


def test_more_sorts_have_more_time_and_the_policies_alone_what_was_given() -> None:
    plan = Plan(budget_s=0.5)
    assert [plan.seconds(candidates) for candidates in (1, 2, 3, 5)] == [0.5, 0.5, 0.5, 1.0]


def test_settled_buckets_of_an_earlier_calibration_are_kept_refined_ones_and_all() -> None:
    us = lambda policy, rows, real: crossing(11, policy, rows)  # noqa: E731
    fake = Fake(us)
    first, first_calls = fake.calibrate(), len(fake.calls)
    assert first.settled
    again = Fake(us)
    table = again.calibrate(earlier=first.evidence)
    assert table.evidence.busy == first.evidence.busy
    assert table.eager == first.eager
    # Nothing but looks between the buckets.
    assert len(again.calls) < 300 < first_calls


def test_unsettled_buckets_and_new_counts_are_measured() -> None:
    us = lambda policy, rows, real: crossing(11, policy, rows)  # noqa: E731
    first = Fake(us).calibrate(max_tokens=16)
    unsure = replace(
        first.evidence.busy[0],
        fills=tuple(
            replace(f, verdict=replace(f.verdict, settled=False))
            for f in first.evidence.busy[0].fills
        ),
    )
    earlier = replace(first.evidence, busy=(unsure, *first.evidence.busy[1:]))
    table = Fake(us).calibrate(earlier=earlier, max_tokens=64)
    found = {b.num_tokens: b for b in table.evidence.busy}
    assert {1, 16, 32, 64} <= set(found)
    assert found[1] != unsure
    assert found[1].verdicts[0].settled
    kept = {b.num_tokens: b for b in first.evidence.busy[1:]}
    assert {n: found[n] for n in kept} == kept


@pytest.mark.parametrize(
    "options", [{"rule": Rule(margin=0.02)}, {"baseline": "policy 1"}, {"policies": (0, 1)}]
)
def test_what_was_decided_by_another_rule_or_among_others_is_not_kept(
    options: dict[str, Any],
) -> None:
    us = lambda policy, rows, real: crossing(11, policy, rows)  # noqa: E731
    first = Fake(us).calibrate().evidence
    fake = Fake(us, policies=options.pop("policies", (0, 1, 2)))
    if "baseline" in options:
        first = replace(first, candidates=("policy 1", "policy 0", "policy 2"))
        options = {}
    fake.calibrate(earlier=first, **options)
    assert len(fake.calls) > 200


# The process it runs in


def test_a_default_dtype_of_bfloat16_and_another_default_device_change_nothing() -> None:
    """As ATOM sets the first for its whole process."""
    us = lambda policy, rows, real: crossing(11, policy, rows)  # noqa: E731
    usual = Fake(us)
    usual.calibrate(SortingShape(8, 2, 4, local_experts=4))
    with engine_defaults():
        fake = Fake(us)
        table = fake.calibrate(SortingShape(8, 2, 4, local_experts=4))
    assert table.sound
    dtypes = {tuple(getattr(a, "dtype", None) for a in call[:7]) for call in fake.calls}
    assert dtypes == {tuple(getattr(a, "dtype", None) for a in call[:7]) for call in usual.calls}
    for one, other in zip(fake.calls, usual.calls, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("budget_s", [0.0, -1.0, float("nan")])
def test_a_plan_that_cannot_be_is_refused_by_name(budget_s: float) -> None:
    with pytest.raises(ValueError, match=f"budget_s={budget_s}"):
        Plan(budget_s=budget_s)


# What only a GPU reaches: a CPU has one situation


def test_eager_calls_as_small_as_graphs_begin_with_every_other_power_of_two() -> None:
    captured = Coverage.up_to(SHAPE, 64, (1, 2, 4, 8), busy_from=16)
    assert _grid(captured, Situation.GRAPH) == (1, 2, 4, 8, 16, 32, 64)
    assert _grid(captured, Situation.BUSY) == (1, 4, 16, 32, 64)
    assert _grid(replace(captured, busy_from=8), Situation.BUSY) == (1, 4, 8, 16, 32, 64)
    assert _grid(replace(captured, captured=()), Situation.BUSY) == (1, 2, 4, 8, 16, 32, 64)


@pytest.mark.parametrize(("given", "idle"), [(500, IDLE_ROUNDS), (8, 8)])
def test_the_idle_device_has_few_rounds_and_the_others_those_given(given: int, idle: int) -> None:
    plan = Plan(rule=Rule(margin=0.02, max_rounds=given))
    assert _rule(plan, Situation.GRAPH) == _rule(plan, Situation.BUSY) == plan.rule
    assert _rule(plan, Situation.IDLE) == replace(plan.rule, max_rounds=idle)


def test_each_situation_has_its_counts_and_rounds_and_all_are_told_as_one() -> None:
    kernel = SortKernel("made up", CPU, policy_candidates(Fake(lambda *_: 9.0).sort))
    told: list[tuple[int, int, str]] = []

    def sections(plan: Plan) -> dict[Situation, Section]:
        return _sections(
            *(kernel, Coverage.up_to(SHAPE, 64, (1, 2, 4, 8, 12)), plan, None, None, None),
            *(lambda: 0.0, lambda *step: told.append(step)),
        )

    found = sections(Plan())
    assert {s: (part.grid, part.rule) for s, part in found.items()} == {
        Situation.GRAPH: ([1, 2, 4, 8, 12], Rule()),
        Situation.BUSY: ([1, 4, 16, 32, 64], Rule()),
        Situation.IDLE: ([1, 4, 12], Rule(max_rounds=IDLE_ROUNDS)),
    }
    for situation, num_tokens in [(Situation.GRAPH, 1), *[(Situation.IDLE, 12)] * 13]:
        found[situation].told(num_tokens)
    assert told[:2] == [(1, 13, "1 token, graph"), (2, 13, "12 tokens, idle")]
    # One more than was expected.
    assert told[-1] == (14, 14, "12 tokens, idle")
    # Each knows of those before it, and of no other.
    assert [list(part.before) for part in found.values()] == [list(found)[:n] for n in range(3)]
    assert [part.grid for part in sections(Plan(first=(3, 5))).values()] == [
        [1, 4, 8, 12],
        [1, 3, 5, 64],
        [1, 3, 5, 12],
    ]


def on_the_gpu() -> PolicyTable:
    return calibrate(
        SortKernel("made up", DEVICE, policy_candidates(Fake(lambda *_: 9.0).sort)),
        Coverage.up_to(SHAPE, 64, (1, 2)),
    )


def test_while_a_graph_is_captured_nothing_is_run(
    gpu: Gpu, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.capturing = Graph(gpu)
    with (
        caplog.at_level(logging.WARNING, "adaptive_moe"),
        pytest.raises(CalibrationRefusedError) as raised,
    ):
        on_the_gpu()
    assert str(raised.value) == CAPTURING
    assert [record.getMessage() for record in caplog.records] == [
        f"not calibrating 8 experts, topk 2, dim 4, bfloat16, block 4: {CAPTURING}"
    ]
    assert (gpu.told, gpu.log) == ([], [])


def test_a_gpu_is_measured_where_the_kernel_runs_and_has_its_memory_back(gpu: Gpu) -> None:
    """Though all that is done there fails: the meta device draws no random numbers."""
    with pytest.raises(CalibrationFailedError, match="RuntimeError"):
        on_the_gpu()
    assert gpu.told == ["on its device", "gave its memory back"]
