"""Recorded times: both forms of a file, and what is wrong with others."""

from pathlib import Path

import pytest

from adaptive_moe.cli.bench.recorded import read_times, times_of
from adaptive_moe.models import find_model
from adaptive_moe.policy.situation import Situation

RECORDED = Path(__file__).parents[2] / "calibration" / "recorded"


def test_times_recorded_side_by_side():
    found = read_times(RECORDED / "sort_implementations_h100.csv")
    times = times_of(found, find_model("mixtral-8x7b"), Situation.GRAPH, 1)
    assert times == {
        "recorded opus one shot": 3.65,
        "recorded opus multi": 4.37,
        "recorded ours one shot": 2.29,
        "recorded ours multi": 5.35,
    }
    # One-shot was not measured there.
    large = times_of(found, find_model("gpt-oss-120b"), Situation.GRAPH, 16384)
    assert list(large) == ["recorded opus multi", "recorded ours multi"]
    assert times_of(found, find_model("mixtral-8x7b"), Situation.BUSY, 1) == {}
    assert {one.model for one in found} == {
        *("mixtral-8x7b", "qwen3-235b", "gpt-oss-120b"),
        *("deepseek-v3", "kimi-k2-fused", "qwen3-next-80b"),
    }


def test_published_times_are_known_by_experts_and_topk():
    found = read_times(RECORDED / "moe_sorting_published.csv")
    model = find_model("deepseek-v3-fused")  # 257 experts, topk 9
    times = times_of(found, model, Situation.GRAPH, 1)
    assert times == {"recorded CK": 13.5, "recorded Opus": 13.5, "recorded FlyDSL": 9.7}
    assert times_of(found, find_model("deepseek-v3"), Situation.GRAPH, 1) == {}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "(none)"),
        ("model,tokens\na,1\n", "model, tokens and NAME_us"),
        ("model,a_us\na,1\n", "model, tokens and NAME_us"),
        ("model,tokens,time_us\na,1,2\n", "implementation and time_us"),
        ("model,tokens,a_us\na,few,2\n", "times.csv:2: 'few' tokens"),
        ("model,tokens,a_us\na,1,2\na,2,slow\n", "times.csv:3: '2' tokens in 'slow' us"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, text, wrong):
    path = tmp_path / "times.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"times\.csv") as refused:
        read_times(path)
    assert wrong in str(refused.value)
