"""check_sorts: the baseline is as slow as it was measured to be, and sums done by hand."""

import time
from argparse import Namespace

import pytest
import torch

from adaptive_moe.cli.bench.recorded import read_times
from adaptive_moe.models import find_model
from adaptive_moe.policy.situation import Situation
from calibration import check_sorts, slowed
from calibration.check_sorts import affordable, check, lots, run
from calibration.slowed import RECORDED, Slowed, Wait, between, targets
from calibration.sorts_figures import figures, overall, promise


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

    slow = Slowed(sort, lambda n: (2, 5.0), lambda policy, n: {1: 30.0, 2: 5.5}[policy], Clock())
    few, many = torch.zeros((4, 2)), torch.zeros((2048, 2))
    for ids, policy in ((few, 0), (few, 1), (few, 2), (many, 0), (many, 7)):
        assert slow(ids, None, 8, 64, None, 32, None, None, policy) == "sorted"
    # One-shot is to take 25 us more; half a microsecond is less than a launch, and left out.
    assert ran == [2] * 5
    assert waited == [25.0, 25.0]


def test_a_wait_on_the_cpu_takes_its_time():
    wait = Wait(torch.device("cpu"))
    begun = time.perf_counter()
    wait(2000.0)
    assert time.perf_counter() - begun >= 0.002


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
    found = promise({"captured": {"sweep": sweep}}, oracle)["promise"]
    assert list(found) == ["captured"]
    assert found["captured"]["got_of_promised"] == 0.75
    assert found["captured"]["rows"] == [[1, "ck", 4.0, 3.0], [8, "policy 0", 0.0, 0.0]]


def test_what_the_oracle_had_no_time_for_is_in_no_sum():
    sweep = [{"num_tokens": 3, "chosen": "ck", "over_baseline_us": {"ck": [-3.0, -3.1, -2.9]}}]
    assert promise({"busy": {"sweep": sweep}}, {})["promise"] == {}


def test_lots_hold_every_count_once_and_those_of_the_steps_first():
    found = lots(check_sorts.CAPTURED, (4, 1, 64))
    assert found[0] == [1, 4, 64]
    assert sorted(count for lot in found for count in lot) == sorted(check_sorts.CAPTURED)
    assert all(max(lot) > 300 and min(lot) < 12 for lot in found[1:])
    assert lots((2, 4), (2, 4)) == [[2, 4]]


def test_the_steps_that_matter_most_are_made_as_long_as_there_is_time():
    every = check_sorts.STEP_CAPTURED, check_sorts.STEP_EAGER
    assert affordable(1e9, 0.35, on_gpu=True) == every
    assert affordable(0.0, 0.35, on_gpu=True) == ((), ())
    assert affordable(1e9, 0.35, on_gpu=False) == ((), check_sorts.STEP_EAGER)
    done = [affordable(seconds, 0.35, on_gpu=True) for seconds in range(5, 30)]
    for captured, eager in done:
        assert captured == every[0][: len(captured)]
        assert eager == every[1][: len(eager)]
    sizes = [len(captured) + len(eager) for captured, eager in done]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 5


def shape(counts, close, got, **more):
    done = {"counts": counts, "counts_within_1pct": close}
    captured = {"promised_us": 10.0, "got_us": got}
    return {**done, "promise": {"captured": captured}, "left_out_for_time": {}, **more}


def test_overall_sums_what_was_done_and_names_the_rest():
    found = overall({
        "a": shape(100, 100, 9.0),
        "b": shape(100, 97, 6.0, left_out_for_time={"step": [512]}),
        "c": {"left_out_for_time": "all"},
        "d": {"failed": "RuntimeError: no table"},
    })  # fmt: skip
    assert found["models"] == ["a", "b"]
    assert found["partial"] == {
        "b": {"step": [512]}, "c": "all", "d": "RuntimeError: no table"
    }  # fmt: skip
    assert (found["counts"], found["within_1pct"]) == (200, 0.985)
    assert found["captured_got_of_promised"] == 0.75
    assert found["busy_got_of_promised"] is None
    assert found["met"] == {
        "within_1pct": False, "captured_got_of_promised": False, "busy_got_of_promised": None
    }  # fmt: skip
    good = overall({"a": shape(100, 99, 8.0)})
    assert good["met"]["within_1pct"]
    assert good["met"]["captured_got_of_promised"]


def test_within_1pct_is_a_fraction_of_the_counts():
    over = ((1.0, 1.0), (1.01, 1.02), (1.0101, 1.03), (1.5, 2.0))
    assert figures([{"over_best": best, "over_least": least} for best, least in over]) == {
        "counts": 4, "counts_within_1pct": 2, "within_1pct": 0.5, "within_1pct_of_least": 0.25,
        "worst_over_best": 1.5,
    }  # fmt: skip


@pytest.fixture
def options(monkeypatch):
    """For a few counts on the CPU."""
    monkeypatch.setattr(check_sorts, "EAGER", (2, 3, 4))
    monkeypatch.setattr(check_sorts, "STEP_EAGER", (4, 2))
    monkeypatch.setattr(slowed, "LIVE", (1, 4))
    return Namespace(
        models="mixtral-8x7b", kernel="cpu", sorts="all", block_size=32, scale=1.0, budget=0.2,
        oracle_passes=1, sampling=0.01, seconds=1e9,
    )  # fmt: skip


def test_a_rehearsal_on_the_cpu_has_every_part(options):
    found = run(options)["shapes"]["mixtral-8x7b"]
    assert found["left_out_for_time"] == {}
    assert set(found["seconds"]) == {"baseline", "calibration", "oracle", "step"}
    assert [row["num_tokens"] for row in found["oracle"]] == [2, 3, 4]
    assert [row["num_tokens"] for row in found["step"]["as_it_comes"]["sweep"]] == [2, 4]


def test_at_its_end_a_model_has_the_first_lot_and_says_what_is_missing(options):
    found = check("cpu", find_model("mixtral-8x7b"), options, end=0.0, now=lambda: 1.0)
    assert [row["num_tokens"] for row in found["oracle"]] == [2, 4]
    assert found["left_out_for_time"] == {"oracle, busy": [3], "step": [2, 4]}
    assert found["step"] == {}


def test_without_time_nothing_is_run_and_that_is_said(options):
    options.seconds = 0.0
    found = run(options)
    assert found["shapes"] == {"mixtral-8x7b": {"left_out_for_time": "all"}}
    assert found["overall"]["within_1pct"] is None
    assert found["overall"]["partial"] == {"mixtral-8x7b": "all"}
