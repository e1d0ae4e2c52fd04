"""calibrate(): what it measures, checks and decides, on a simulated kernel."""

import logging
import math
import random
import threading
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
import torch

from adaptive_moe.kernels import SortKernel
from adaptive_moe.policy.coverage import Coverage, Situation
from adaptive_moe.policy.evidence import Rule
from adaptive_moe.policy.verdict import Standing
from adaptive_moe.shape import SortingShape
from adaptive_moe.tuning.calibrate import (
    BudgetError,
    CalibrationFailedError,
    CalibrationRefusedError,
    Plan,
    calibrate,
)
from tests.tuning.engine import engine_defaults
from tests.tuning.simulated import CPU, SHAPE, Call, Simulated


def steady(*us: float):
    """Each policy takes as long at every count."""
    return lambda call: us[call.policy]


def crossing(at: float, policy: int, rows: int) -> float:
    """1 is best up to `at` rows and 2 beyond; policy 0 is a quarter slower than the better one."""
    one, two = 50.0 + 50.0 * rows / at, 100.0
    return {0: 1.25 * min(one, two), 1: one, 2: two}[policy]


@pytest.fixture
def both_situations(monkeypatch):
    """The simulated kernel runs on the CPU, where otherwise nothing is captured."""
    monkeypatch.setattr(Coverage, "on", lambda self, device_type: self)


# What is found.


@pytest.mark.parametrize("at", [3, 11, 40])
def test_a_planted_crossover_is_found_to_within_a_few_margins(at):
    table = Simulated(lambda call: crossing(at, call.policy, call.rows)).calibrate()
    for rows in range(1, 65):
        best = min(crossing(at, policy, rows) for policy in (1, 2))
        assert crossing(at, table.eager[rows], rows) <= 1.031 * best


def test_a_policy_0_that_switches_at_the_wrong_count_is_replaced_only_where_it_is_wrong():
    """Policy 0 runs what 1 runs up to 20 rows, but 1 stays the better choice up to 45."""

    def us(call: Call) -> float:
        one, two = (60.0, 90.0) if call.rows <= 45 else (90.0, 60.0)
        return {0: one if call.rows <= 20 else two, 1: one, 2: two}[call.policy]

    table = Simulated(us).calibrate()
    assert {table.candidate(n) for n in (*range(1, 21), *range(46, 65))} == {"policy 0"}
    assert {table.candidate(n) for n in range(22, 46)} == {"policy 1"}


@pytest.mark.parametrize("seed", range(3))
def test_identical_policies_leave_the_baseline_nowhere_whatever_the_noise(seed):
    rng = random.Random(seed)
    table = Simulated(lambda call: 100.0 * math.exp(rng.gauss(0.0, 0.03))).calibrate(budget_s=2.0)
    assert set(table.eager) == {0}


@pytest.mark.parametrize("seed", range(3))
def test_a_gain_of_a_tenth_is_found_while_eight_samples_in_a_hundred_stall(seed):
    rng = random.Random(seed)

    def us(call: Call) -> float:
        # A stall lasts for a whole sample, which its first call begins.
        kernel.stalled = rng.random() < 0.08 if len(kernel.timed()) % 4 == 1 else kernel.stalled
        usual = {0: 100.0, 1: 90.0, 2: 110.0}[call.policy] * math.exp(rng.gauss(0.0, 0.01))
        return usual * (3.0 if kernel.stalled else 1.0)

    kernel = Simulated(us)
    kernel.stalled = False
    table = kernel.calibrate(max_tokens=16, budget_s=20.0)
    assert set(table.eager[1:]) == {1}


def test_a_slow_sort_s_large_gain_is_found_at_every_count_within_the_default_budget():
    """1 ms a call, one candidate in five: rounds go to counts, not to what is clear already."""
    rng = random.Random(1)
    kernel = Simulated(
        lambda call: {0: 1000.0, 1: 200.0, 2: 1000.0}[call.policy] * math.exp(rng.gauss(0, 0.01))
    )
    table = kernel.calibrate(max_tokens=16384, budget_s=Plan().budget_s)
    assert set(table.eager[1:]) == {1}
    assert kernel.seconds < 1.2 * Plan().budget_s


def test_captured_and_eager_calls_get_what_was_measured_for_each(both_situations):
    def us(call: Call) -> float:
        captured = call.situation is Situation.GRAPH
        return {0: 100.0, 1: 70.0 if captured else 130.0, 2: 130.0 if captured else 70.0}[
            call.policy
        ]

    table = Simulated(us).calibrate(captured=(1, 8, 16), busy_from=1)
    assert table.runs(captured=True) == [(1, 16, "policy 1")]
    assert table.runs() == [(1, 64, "policy 2")]
    assert table.candidate(9, captured=True) == "policy 0"


def test_below_busy_from_the_host_s_time_has_its_say(both_situations):
    """Policy 2 saves 20 us on the device and costs 30 us of the host."""
    kernel = Simulated(steady(100.0, 100.0, 80.0), host_us=lambda call: (50, 50, 80)[call.policy])
    table = kernel.calibrate(captured=(1, 8, 16))
    assert {table.candidate(n) for n in range(1, 17)} == {"policy 0"}
    assert {table.candidate(n) for n in range(17, 65)} == {"policy 2"}
    assert table.runs(captured=True) == [(1, 16, "policy 2")]


def test_a_candidate_that_only_saves_the_host_s_time_serves_where_the_device_loses_nothing(
    both_situations,
):
    kernel = Simulated(steady(100.0, 100.0, 130.0), host_us=lambda call: (50, 30, 50)[call.policy])
    table = kernel.calibrate(captured=(16,))
    assert table.candidate(8) == "policy 1"
    assert table.candidate(8, captured=True) == table.candidate(64) == "policy 0"


def test_a_coarse_clock_that_reads_nothing_costs_no_table():
    readings = [0.0, 0.0, 100.0]

    def us(call: Call) -> float:
        readings.append(readings.pop(0))
        return readings[-1]

    assert Simulated(us).calibrate(budget_s=0.2).evidence.eager


# What is right.


def spoiled(when):
    """Policy 1 is faster, and its weights are wrong for some calls."""

    def spoil(call: Call, outputs):
        if call.policy == 1 and when(call):
            return (outputs[0], outputs[1] + 1.0, *outputs[2:])
        return outputs

    return Simulated(steady(100.0, 50.0, 90.0), spoil=spoil)


def test_a_candidate_that_is_wrong_for_a_popular_expert_is_found_at_every_count(caplog):
    table = spoiled(lambda call: call.skewed and call.rows >= 16).calibrate()
    assert set(table.eager[1:]) == {2}
    (exclusion,) = table.evidence.excluded
    assert (exclusion.candidate, exclusion.wrong) == ("policy 1", True)
    assert "policy 1 is not used" in caplog.text
    assert "sorted_weights" in caplog.text


@pytest.mark.parametrize("at", [1, 64])
def test_a_candidate_wrong_at_one_count_is_excluded_at_every_count(at):
    table = spoiled(lambda call: call.rows == at).calibrate()
    assert set(table.eager[1:]) == {2}


def test_a_candidate_found_wrong_while_refining_is_excluded_at_every_count():
    """32 tokens are of the grid, 33 to 63 are not; the crossover makes one of them a bucket."""
    kernel = spoiled(lambda call: 33 <= call.rows <= 63)
    kernel.us = lambda call: {0: 100.0, 1: 60.0 if call.rows <= 45 else 140.0, 2: 101.0}[
        call.policy
    ]
    assert set(kernel.calibrate().eager) == {0}


def test_whatever_is_timed_was_compared_before(both_situations):
    kernel = Simulated(lambda call: crossing(11, call.policy, call.rows))
    kernel.calibrate(captured=(1, 4, 8, 16, 24), padding_rows=True)
    compared = {(c.policy, c.rows, c.ids.data_ptr()) for c in kernel.calls if not c.timed}
    assert {(c.policy, c.rows, c.ids.data_ptr()) for c in kernel.timed()} <= compared


def test_a_raising_candidate_is_excluded_with_its_reason_and_the_others_are_measured(caplog):
    kernel = Simulated(steady(100.0, 50.0, 80.0), fail=lambda c: c.policy == 1 and c.rows >= 32)
    table = kernel.calibrate()
    assert set(table.eager[1:]) == {2}
    assert table.failed
    assert "no kernel for this size" in table.evidence.excluded[0].reason
    assert "RuntimeError" in caplog.text


def test_a_candidate_whose_build_aiter_ends_is_excluded_and_no_process_ends():
    error = SystemExit("[aiter] build failed")
    kernel = Simulated(steady(100.0, 50.0, 80.0), fail=lambda c: c.policy == 1, error=error)
    table = kernel.calibrate()
    assert set(table.eager[1:]) == {2}
    assert table.evidence.excluded[0].reason == "raised RuntimeError: [aiter] build failed"
    kernel = Simulated(steady(100.0, 50.0), fail=lambda c: c.policy == 1, error=SystemExit(0))
    with pytest.raises(SystemExit):
        kernel.calibrate()


def test_a_candidate_that_raises_only_while_it_is_timed_is_excluded():
    kernel = Simulated(steady(100.0, 50.0, 80.0), fail=lambda c: c.policy == 1 and c.timed)
    assert set(kernel.calibrate().eager[1:]) == {2}


@pytest.mark.parametrize("timed", [True, False])
def test_where_the_baseline_raises_there_is_no_table_but_the_reason(timed):
    kernel = Simulated(steady(1.0, 1.0, 1.0), fail=lambda c: c.policy == 0 and c.timed is timed)
    with pytest.raises(CalibrationFailedError, match="policy 0 raised RuntimeError: no kernel"):
        kernel.calibrate()


def test_an_error_of_the_caller_s_own_passes_as_it_is():
    def progress(done, total, what):
        raise ValueError("the caller's")

    with pytest.raises(ValueError, match="the caller's"):
        Simulated(steady(1.0, 1.0, 1.0)).calibrate(progress=progress)


# What is spent.


def test_a_budget_too_small_for_one_round_is_an_error_that_says_so():
    kernel = Simulated(lambda call: 1e6)
    ticks = iter(range(10**6))
    with pytest.raises(BudgetError, match=r"budget 0\.5 s is too small"):
        calibrate(
            SortKernel("made up", CPU, _candidates(kernel)),
            Coverage.up_to(SHAPE, 4),
            Plan(budget_s=0.5),
            clock_factory=kernel.clock,
            now=lambda: float(next(ticks)),
        )


def _candidates(kernel):
    from adaptive_moe.kernels import policy_candidates

    return policy_candidates(kernel.sort)


def test_every_first_bucket_is_measured_before_any_is_confirmed():
    kernel = Simulated(steady(100.0, 50.0, 80.0))
    told = []
    kernel.calibrate(progress=lambda done, total, what: told.append((done, total, what)))
    grid = [f"{n} token{'s' * (n > 1)}, eager" for n in (1, 2, 4, 8, 16, 32, 64)]
    assert [what for *_, what in told[:7]] == grid
    assert all(done <= total for done, total, _ in told)


def test_checks_and_compilation_are_not_on_the_budget():
    kernel = Simulated(steady(10.0, 5.0, 8.0), check_us=1e6)
    assert set(kernel.calibrate(budget_s=0.5).eager[1:]) == {1}


def test_the_second_pass_prepares_everything_anew():
    """A graph captured badly makes policy 1 look faster as often as it is prepared badly."""
    kernel = Simulated(steady(100.0, 100.0, 120.0))
    prepare = kernel.clock

    def clock(situation, device):
        inner = prepare(situation, device)

        class Biased:
            prepared = 0

            def prepare(self, train, call_us=0.0):
                sampler = inner.prepare(train, call_us)
                number, self.prepared = self.prepared, self.prepared + 1
                # The look and the first pass of one bucket prepare three candidates each.
                lucky = number in (1, 4)
                factor = 0.8 if lucky else 1.0

                def sample():
                    wait = sampler()
                    return lambda: wait()._replace(device_us=wait().device_us * factor)

                return sample

        return Biased()

    kernel.clock = clock
    table = kernel.calibrate(max_tokens=1)
    assert table.eager[1] == 0
    assert not table.eager_choices[0].device[0].faster


def test_a_gain_that_only_the_first_pass_sees_replaces_nothing():
    def us(call: Call) -> float:
        early = kernel.seconds < 0.05
        return {0: 100.0, 1: 70.0 if early else 100.0, 2: 120.0}[call.policy]

    kernel = Simulated(us)
    table = kernel.calibrate(max_tokens=8)
    assert set(table.eager) == {0}


def test_a_refinement_that_is_cut_short_is_dropped_and_its_neighbours_speak():
    """Policy 1 wins by a quarter everywhere; between the grid's counts times are pure noise."""
    rng = random.Random(3)
    grid = {1, 2, 4, 8, 16, 32, 64}

    def us(call: Call) -> float:
        noise = 0.0 if call.rows in grid else 0.5
        crossed = 0.4 if call.policy == 2 and call.rows > 40 else 1.2
        usual = {0: 100.0, 1: 75.0, 2: 100.0 * crossed}[call.policy]
        return usual * math.exp(rng.gauss(0.0, noise))

    table = Simulated(us).calibrate(budget_s=0.6)
    # Between neighbours whose winners differ a count or two may have neither.
    assert sum(table.candidate(n) == "policy 0" for n in range(1, 65)) <= 2


def test_more_sorts_have_more_time_and_the_policies_alone_what_was_given():
    assert Plan(budget_s=2.0).seconds(3) == 2.0
    assert Plan(budget_s=2.0).seconds(5) == 4.0
    assert Plan(budget_s=2.0).seconds(1) == 2.0


@pytest.mark.parametrize("budget_s", [0.0, -1.0, math.nan])
def test_a_plan_that_cannot_be_is_refused_by_name(budget_s):
    with pytest.raises(ValueError, match="budget_s="):
        Plan(budget_s=budget_s)


def test_a_calibration_is_cut_short_only_where_more_seemed_worth_measuring():
    """A start continues the first of these, and not the second, which would end as it did."""
    rng = random.Random(1)

    def noisy(call: Call) -> float:
        return {0: 100.0, 1: 90.0, 2: 120.0}[call.policy] * math.exp(rng.gauss(0.0, 0.5))

    short = Simulated(noisy).calibrate(budget_s=0.3)
    assert (short.evidence.cut_short, short.unfinished) == (True, True)
    whole = Simulated(steady(100.0, 70.0, 120.0)).calibrate()
    assert (whole.evidence.cut_short, whole.unfinished) == (False, False)


# What an earlier calibration knew.


def test_what_is_settled_is_kept_and_not_measured_again():
    first = Simulated(lambda call: crossing(11, call.policy, call.rows)).calibrate()
    assert first.open_counts == 0
    again = Simulated(steady(1.0, 1.0, 1.0))
    table = again.calibrate(earlier=first.evidence)
    assert again.calls == []
    assert table.eager == first.eager
    assert table.evidence.starts == 2


def test_open_counts_and_new_ones_are_measured():
    noisy = random.Random(1)
    first = Simulated(
        lambda c: (
            {0: 100.0, 1: 70.0, 2: 120.0}[c.policy]
            * math.exp(noisy.gauss(0.0, 1.0 if c.rows == 16 else 0.0))
        )
    ).calibrate(budget_s=0.3, max_tokens=32)
    assert first.open_counts == 1
    again = Simulated(steady(100.0, 70.0, 120.0))
    table = again.calibrate(max_tokens=64, earlier=first.evidence)
    assert {call.rows for call in again.timed()} == {16, 64}
    assert (table.open_counts, set(table.eager[1:])) == (0, {1})


def test_a_winner_in_force_stays_where_measuring_again_settles_nothing():
    """A third sort that may be faster still leaves the bucket open, and policy 1 serves."""
    noisy = random.Random(1)

    def us(call: Call) -> float:
        usual = {0: 100.0, 1: 60.0, 2: 50.0}[call.policy]
        return usual * math.exp(noisy.gauss(0.0, 0.8 if call.policy == 2 else 0.0))

    first = Simulated(us).calibrate(max_tokens=1, budget_s=0.05)
    assert (first.open_counts, first.candidate(1)) == (1, "policy 1")
    table = Simulated(lambda call: 100.0 * math.exp(noisy.gauss(0.0, 1.0))).calibrate(
        max_tokens=1, budget_s=0.02, earlier=first.evidence
    )
    assert table.candidate(1) == "policy 1"


def test_what_was_wrong_stays_out_and_what_raised_is_tried_again():
    wrong = spoiled(lambda call: True).calibrate()
    again = Simulated(steady(100.0, 50.0, 90.0))
    assert again.calibrate(earlier=wrong.evidence).evidence.excluded == wrong.evidence.excluded
    assert not [call for call in again.calls if call.policy == 1]

    raised = Simulated(steady(100.0, 50.0, 90.0), fail=lambda c: c.policy == 1).calibrate()
    table = Simulated(steady(100.0, 50.0, 90.0)).calibrate(earlier=raised.evidence)
    assert (set(table.eager[1:]), table.failed) == ({1}, False)


def test_what_still_raises_is_checked_and_nothing_else_is_measured():
    def fails(call: Call) -> bool:
        return call.policy == 1

    raised = Simulated(steady(100.0, 50.0, 90.0), fail=fails).calibrate()
    again = Simulated(steady(100.0, 50.0, 90.0), fail=fails)
    table = again.calibrate(earlier=raised.evidence)
    assert again.timed() == []
    assert (table.eager, table.failed) == (raised.eager, True)


def test_another_rule_is_another_question():
    first = Simulated(steady(100.0, 70.0, 120.0)).calibrate()
    again = Simulated(steady(100.0, 70.0, 120.0))
    table = again.calibrate(earlier=first.evidence, rule=Rule(margin=0.2))
    assert again.timed()
    assert table.evidence.starts == 1


# What it is measured with.


def test_every_train_mixes_both_routings():
    kernel = Simulated(steady(100.0, 50.0, 80.0))
    kernel.calibrate(max_tokens=256, first=(256,))
    kinds = [call.skewed for call in kernel.timed() if call.rows == 256]
    assert kinds.count(True) == kinds.count(False)


def test_the_caller_s_expert_mask_reaches_every_call():
    mask = torch.tensor([0, 1] * 4, dtype=torch.int32)
    kernel = Simulated(steady(100.0, 50.0, 80.0))
    kernel.calibrate(replace(SHAPE, local_experts=4), expert_mask=mask)
    assert all(call.mask is mask for call in kernel.calls)


def test_a_capacity_gets_the_candidate_that_loses_at_no_fill():
    shape = replace(SHAPE, num_local_tokens=True)

    def us(call: Call) -> float:
        sparse = call.real < call.rows / 2
        return {0: 100.0, 1: 140.0 if sparse else 50.0, 2: 90.0}[call.policy]

    table = Simulated(us).calibrate(shape, max_tokens=64)
    assert table.candidate(64) == "policy 2"
    assert len(table.evidence.eager[-1].fills) == 3


def test_a_capacity_s_counts_are_whole_with_a_small_budget():
    """Each fill has rounds of its own: none is left without because another one had its share."""
    shape = replace(SHAPE, num_local_tokens=True)
    table = Simulated(steady(100.0, 50.0, 80.0)).calibrate(shape, budget_s=2.5)
    assert {table.candidate(n) for n in range(1, 65)} == {"policy 1"}
    assert table.open_counts == 0


def test_with_a_budget_for_some_counts_each_start_settles_more_of_them():
    evidence, settled = None, []
    for _ in range(4):
        table = Simulated(steady(100.0, 70.0, 120.0)).calibrate(budget_s=0.06, earlier=evidence)
        evidence = table.evidence
        settled.append(sum(choice.settled for choice in table.eager_choices))
    assert settled == sorted(settled)
    assert 0 < settled[0] < settled[1] < settled[-1] == 7


def test_a_kernel_of_the_baseline_alone_has_a_table_of_zeros():
    kernel = Simulated(steady(100.0), policies=(0,))
    assert set(kernel.calibrate().eager) == {0}
    assert kernel.calls == []


def test_a_far_slower_candidate_is_dropped_at_the_first_look_and_one_stall_drops_none():
    kernel = Simulated(steady(100.0, 50.0, 900.0))
    table = kernel.calibrate(max_tokens=1)
    judged = table.eager_choices[0].device[0].judgement("policy 2")
    assert judged.standing is Standing.DROPPED
    assert len([c for c in kernel.timed() if c.policy == 2]) == 4

    stalls = iter([1.0] * 4 + [20.0] * 4)
    stalled = Simulated(lambda c: (100.0, 50.0)[c.policy] * next(stalls, 1.0), policies=(0, 1))
    assert stalled.calibrate(max_tokens=1).candidate(1) == "policy 1"


def test_the_baseline_is_never_dropped_however_slow():
    assert Simulated(steady(900.0, 50.0, 60.0)).calibrate(max_tokens=1).candidate(1) == "policy 1"


def test_the_evidence_says_what_was_measured_and_when():
    kernel = Simulated(steady(100.0, 50.0, 80.0))
    evidence = kernel.calibrate(baseline="policy 0", budget_s=7.0).evidence
    assert (evidence.kernel, evidence.budget_s) == ("made up", 7.0)
    assert evidence.candidates == ("policy 0", "policy 1", "policy 2")
    assert 0.0 < evidence.seconds <= 7.0
    age = datetime.now().astimezone() - datetime.fromisoformat(evidence.created)
    assert timedelta(seconds=-2) < age < timedelta(minutes=5)


# What the process notices.


def test_a_default_dtype_of_bfloat16_and_another_default_device_change_nothing():
    usual = Simulated(steady(100.0, 50.0, 80.0)).calibrate()
    with engine_defaults():
        table = Simulated(steady(100.0, 50.0, 80.0)).calibrate()
    assert table.eager == usual.eager


def test_calibrations_at_once_leave_torch_s_flags_as_they_were():
    start = threading.Barrier(2)

    def run():
        start.wait()
        for _ in range(3):
            Simulated(steady(100.0, 50.0, 80.0)).calibrate(max_tokens=8)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.fixture
def gpu_kernel(monkeypatch):
    """A kernel on a GPU that is not there; emptied: what became of the allocator's cache."""
    from contextlib import nullcontext

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    kernel = Simulated(steady(1.0, 1.0, 1.0))
    return SortKernel("gpu", torch.device("cuda", 0), _candidates(kernel))


def test_while_a_graph_is_captured_nothing_is_run(gpu_kernel, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(CalibrationRefusedError, match="being captured"):
        calibrate(gpu_kernel, Coverage.up_to(SHAPE, 8))


def test_on_a_lost_device_the_caller_hears_what_ended_the_calibration(gpu_kernel, monkeypatch):
    def lost():
        raise RuntimeError("device lost")

    def no_memory(*arguments, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.cuda, "empty_cache", lost)
    monkeypatch.setattr("adaptive_moe.tuning.explore.Inputs", no_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        calibrate(gpu_kernel, Coverage.up_to(SHAPE, 8))


def test_the_memory_is_given_back_when_nothing_refers_to_it_any_more(gpu_kernel, monkeypatch):
    """Also after an error, whose traceback holds the frames that held tensors."""
    import weakref

    held, alive = [], []

    class Inputs:
        def __init__(self, *arguments):
            tensor = torch.zeros(4)
            held.append(weakref.ref(tensor))
            raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(held[0]()))
    monkeypatch.setattr("adaptive_moe.tuning.explore.Inputs", Inputs)
    with pytest.raises(RuntimeError, match="out of memory"):
        calibrate(gpu_kernel, Coverage.up_to(SHAPE, 8))
    assert alive == [None]


def test_samples_are_in_the_log_for_those_who_ask(caplog):
    caplog.set_level(logging.DEBUG, "adaptive_moe")
    Simulated(steady(100.0, 50.0, 80.0)).calibrate(max_tokens=1)
    assert "samples us" in caplog.text


def test_topk_up_to_32_is_measured():
    shape = SortingShape(64, 22, 4, block_size=4)
    table = Simulated(steady(100.0, 50.0, 80.0)).calibrate(shape)
    assert (set(table.eager[1:]), table.evidence.excluded) == ({1}, ())
