"""Calibrating on a real GPU: skipped where torch sees none (CI), run on one before release."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU that torch can see", allow_module_level=True)

from adaptive_moe.kernels import Candidate, SortKernel, load_kernel  # noqa: E402
from adaptive_moe.policy.coverage import Coverage, Situation  # noqa: E402
from adaptive_moe.policy.table import PolicyTable  # noqa: E402
from adaptive_moe.policy.verdict import Standing  # noqa: E402
from adaptive_moe.shape import SortingShape  # noqa: E402
from adaptive_moe.tuning.calibrate import (  # noqa: E402
    CalibrationRefusedError,
    Plan,
    calibrate,
)
from adaptive_moe.tuning.clocks import clock_for  # noqa: E402

COVERAGE = Coverage.up_to(SortingShape(128, 4, 2880), 512, (1, 8, 64, 256), padding_rows=True)
PLAN = Plan(budget_s=0.5)


@pytest.fixture(scope="module")
def kernel() -> SortKernel:
    found = load_kernel("triton")
    calibrate(found, COVERAGE, PLAN)  # compiles
    return found


def standings(table: PolicyTable, situation: Situation, candidate: str) -> set[Standing]:
    return {
        view.judgement(candidate).standing
        for choice in table.choices(situation)
        for view in choice.device
    }


def replaced(kernel: SortKernel, place: int, action) -> SortKernel:
    """The kernel, with `action(call)` in place of one candidate's call."""
    original = kernel.candidates[place]

    def bind(inputs):
        call = original.bind(inputs)
        return lambda: action(call)

    candidates = list(kernel.candidates)
    candidates[place] = Candidate(original.name, bind)
    return replace(kernel, candidates=tuple(candidates))


def test_both_arrays_are_measured_and_memory_is_given_back(kernel):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    table = calibrate(kernel, COVERAGE, PLAN)
    assert [c.num_tokens for c in table.graph_choices][:: len(table.graph_choices) - 1] == [1, 256]
    assert table.eager_choices[-1].num_tokens == 512
    assert all(choice.was_measured for choice in table.graph_choices)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before[0]
    assert torch.cuda.memory_reserved() <= before[1]


def test_below_busy_from_the_host_s_time_is_read_beside_the_device_s(kernel):
    table = calibrate(kernel, COVERAGE, Plan(budget_s=2.0))
    for choice in table.eager_choices:
        on_host = [view for view in choice.verdicts if view.on_host]
        assert len(on_host) == (choice.num_tokens < COVERAGE.busy_from)
        assert all(view.baseline.median_us > 0.0 for view in on_host)


def test_while_capturing_it_refuses_and_the_capture_survives(kernel):
    ones = torch.zeros(4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ones += 1
        with pytest.raises(CalibrationRefusedError, match="captured"):
            calibrate(kernel, COVERAGE, PLAN)
        ones += 1
    graph.replay()
    torch.cuda.synchronize()
    assert ones.tolist() == [2.0] * 4


def test_a_candidate_out_of_memory_is_dropped_and_the_rest_goes_on(kernel):
    before = torch.cuda.memory_allocated()
    greedy = replaced(kernel, 2, lambda call: torch.empty(1 << 45, device="cuda"))
    table = calibrate(greedy, COVERAGE, PLAN)
    for situation in Situation:
        assert standings(table, situation, "policy 2") == {Standing.FAILED}
        assert Standing.FAILED not in standings(table, situation, "policy 1")
    assert set(table.eager[1:]) | set(table.graph[1:]) <= {0, 1}
    assert table.failed
    assert torch.cuda.memory_allocated() == before


def test_a_candidate_that_leaves_its_buffer_unwritten_is_wrong(kernel):
    def unzeroed(call):
        *sorted_outputs, moe_buf = call()
        return (*sorted_outputs, torch.empty_like(moe_buf))

    table = calibrate(replaced(kernel, 1, unzeroed), COVERAGE, PLAN)
    assert standings(table, Situation.EAGER, "policy 1") == {Standing.WRONG}
    assert 1 not in table.eager[1:] + table.graph[1:]


def test_one_policy_under_three_names_stays_with_the_baseline(kernel):
    two = kernel.candidates[2]
    same = tuple(Candidate(one.name, two.bind) for one in kernel.candidates)
    table = calibrate(replace(kernel, candidates=same), COVERAGE, PLAN)
    assert set(table.eager[1:]) | set(table.graph[1:]) == {0}


@pytest.mark.parametrize("situation", Situation)
def test_clocks_time_what_they_are_given_and_graphs_may_come_and_go(situation):
    clock = clock_for(situation, torch.device("cuda"))
    value = torch.zeros(1024, device="cuda")
    for _ in range(3):
        sample = clock.prepare([lambda: value.add_(torch.ones_like(value))])
        assert sample()().device_us > 0.0
        del sample
    assert value[0].item() > 0


def test_after_a_call_with_the_most_tokens_any_fewer_can_be_captured():
    from adaptive_moe.kernels import cpu_sort, triton_sort

    def sort(sort_by, ids, policy):
        weights = torch.ones_like(ids, dtype=torch.float32)
        return sort_by(ids, weights, 300, 64, torch.float32, 32, None, None, policy)

    drawn = torch.rand(40_000, 300).topk(8).indices.int()
    for policy, most in ((1, 500), (2, 40_000)):
        sort(triton_sort.moe_sorting, drawn[:most].cuda(), policy)
        compiled = set(triton_sort._compiled)
        for num_tokens in (1, 3, 10, 20, 100, most // 2):
            ids = drawn[:num_tokens].cuda()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = sort(triton_sort.moe_sorting, ids, policy)
            graph.replay()
            wanted = sort(cpu_sort.moe_sorting, drawn[:num_tokens], policy)
            num_valid = int(wanted[3][0])
            assert found[3].tolist() == wanted[3].tolist()
            assert found[0][:num_valid].tolist() == wanted[0][:num_valid].tolist()
        assert set(triton_sort._compiled) == compiled
