"""calibration.sorts: a rehearsal on the CPU, and recorded times from both forms of a file."""

from argparse import ArgumentParser
from pathlib import Path

import pytest

from adaptive_moe.models import find_model
from calibration import sorts
from calibration.sorts import read_times, recorded_times
from calibration.timing import AS_IT_COMES, CAPTURED, HOST_AHEAD

RECORDED = Path(__file__).parents[2] / "calibration" / "recorded"


def test_a_rehearsal_on_the_cpu_has_every_sort_and_count():
    parser = ArgumentParser()
    sorts.add_options(parser)
    words = ["--kernel", "cpu", "--models", "mixtral-8x7b", "--counts", "1,8", "--seconds", "0"]
    found = sorts.run(parser.parse_args(words))["shapes"]["mixtral-8x7b"]
    rows = found["situations"][AS_IT_COMES]
    assert [row["num_tokens"] for row in rows] == [1, 8]
    for row in rows:
        assert list(row["us"]) == ["policy 0", "policy 1", "policy 2"]
        assert min(row["ratio"].values()) == 1.0
    assert found["left_out"] == {}


def test_times_recorded_side_by_side():
    found = list(read_times(RECORDED / "sort_implementations_h100.csv"))
    assert recorded_times(found, find_model("mixtral-8x7b"), CAPTURED, 1) == {
        "recorded opus one shot": 3.65,
        "recorded opus multi": 4.37,
        "recorded ours one shot": 2.29,
        "recorded ours multi": 5.35,
    }
    # One-shot was not measured there.
    large = recorded_times(found, find_model("gpt-oss-120b"), CAPTURED, 16384)
    assert list(large) == ["recorded opus multi", "recorded ours multi"]
    assert recorded_times(found, find_model("mixtral-8x7b"), HOST_AHEAD, 1) == {}


def test_published_times_are_known_by_experts_and_topk_and_name_no_person():
    path = RECORDED / "moe_sorting_published.csv"
    found = list(read_times(path))
    fused = find_model("deepseek-v3-fused")  # 257 experts, topk 9
    times = recorded_times(found, fused, CAPTURED, 1)
    assert times == {"recorded CK": 13.5, "recorded Opus": 13.5, "recorded FlyDSL": 9.7}
    assert recorded_times(found, find_model("deepseek-v3"), CAPTURED, 1) == {}
    assert "reviewer tj" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["", "model,tokens\na,1\n", "model,a_us\na,1\n"])
def test_a_file_without_times_is_refused(tmp_path, text):
    path = tmp_path / "times.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"times\.csv: give a CSV"):
        list(read_times(path))
