"""check_sorts: the baseline is as slow as it was measured to be, and sums done by hand."""

import pytest
import torch

from adaptive_moe.cli.bench.recorded import read_times
from adaptive_moe.models import find_model
from adaptive_moe.policy.situation import Situation
from calibration import check_sorts
from calibration.check_sorts import RECORDED, Slowed, Wait, between, targets


def test_between_what_was_measured_times_lie_straight_on_logarithmic_scales():
    at = between({1: 2.0, 4: 8.0, 16: 8.0})
    assert [at(n) for n in (1, 2, 4, 8, 16)] == pytest.approx([2.0, 4.0, 8.0, 8.0, 8.0])
    assert at(64) == pytest.approx(8.0)


def test_policies_are_to_take_what_was_recorded():
    target = targets(read_times(RECORDED), find_model("mixtral-8x7b"), 2.0)
    assert target(1, 1) == pytest.approx(2 * 3.65)
    assert target(2, 1) == pytest.approx(2 * 4.37)
    large = targets(read_times(RECORDED), find_model("deepseek-v3"), 1.0)
    assert large(1, 16384) == pytest.approx(4 * large(2, 16384))  # not recorded: hopeless


def test_a_slowed_sort_runs_the_fastest_and_waits_for_the_rest():
    ran, waited = [], []

    class Clock:
        least_us = 1.0
        __call__ = staticmethod(waited.append)

    def sort(*arguments):
        ran.append(arguments[-1])
        return "sorted"

    slowed = Slowed(sort, lambda n: (2, 5.0), lambda policy, n: {1: 30.0, 2: 5.5}[policy], Clock())
    few, many = torch.zeros((4, 2)), torch.zeros((2048, 2))
    for ids, policy in ((few, 0), (few, 1), (few, 2), (many, 0), (many, 7)):
        assert slowed(ids, None, 8, 64, None, 32, None, None, policy) == "sorted"
    # One-shot is to take 25 us more; half a microsecond is less than a launch, and left out.
    assert ran == [2] * 5
    assert waited == [25.0, 25.0]


def test_a_wait_on_the_cpu_takes_its_time():
    wait = Wait(torch.device("cpu"))
    begun = check_sorts.time.perf_counter()
    wait(2000.0)
    assert check_sorts.time.perf_counter() - begun >= 0.002


def test_what_a_step_got_of_what_was_promised():
    oracle = {
        Situation.GRAPH: {
            1: {"policy 0": 10.0, "ck": 6.0},
            8: {"policy 0": 10.0, "ck": 12.0},
        }
    }
    sweep = [
        {"num_tokens": 1, "chosen": "ck", "over_baseline_us": {"ck": [-3.0, -3.1, -2.9]}},
        {"num_tokens": 8, "chosen": "policy 0", "over_baseline_us": {"policy 0": [0.0, 0.0, 0.0]}},
    ]
    found = check_sorts._promise({"captured": {"sweep": sweep}}, oracle)["promise"]
    assert list(found) == ["captured"]
    assert found["captured"]["got_of_promised"] == 0.75
    assert found["captured"]["rows"] == [[1, "ck", 4.0, 3.0], [8, "policy 0", 0.0, 0.0]]
