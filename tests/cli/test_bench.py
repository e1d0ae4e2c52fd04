"""adaptive-moe bench: sums done by hand, and figures where they were asked for."""

import json
from itertools import pairwise

import pytest

from adaptive_moe.cli.bench import BENCHES, regret
from adaptive_moe.cli.bench.oracle import OraclePoint, dense_counts
from adaptive_moe.policy.situation import Situation
from tests.cli import running
from tests.tables import make_table


def at(num_tokens, *us):
    return OraclePoint(num_tokens, {f"policy {i}": time for i, time in enumerate(us)})


SWEEP = [at(1, 10.0, 8.0, 20.0), at(2, 10.0, 10.0, 5.0)]
# Policy 1 at 1 token, and the baseline from 2 on.
TABLE = make_table({1: 1, 2: 0, 3: 2})


def test_regret_figures_by_hand():
    found = regret.figures_of(TABLE, SWEEP, captured=False)
    assert found["geomean_regret"] == pytest.approx(2**0.5, abs=1e-3)  # 1 and 2
    assert found["worst_regret"] == 2.0
    assert found["worst_over_baseline"] == 1.0
    # Policies 0, 1 and 2 everywhere: 10*10, 8*10 and 20*5, against the table's 8*10.
    assert found["gain_over_static"] == 1.0
    assert found["gain_over_baseline"] == pytest.approx((100 / 80) ** 0.5, abs=1e-3)


def test_the_best_is_named_by_one_half_of_the_passes_and_timed_by_the_other():
    whole = OraclePoint(4, {"policy 0": 10.5, "policy 1": 10.0})
    assert whole.over_best("policy 0") == 1.05
    # Policies 1 and 2 are the same: who looks best in a half is so by luck.
    halves = (
        {"policy 0": 12.0, "policy 1": 9.5, "policy 2": 10.0},
        {"policy 0": 12.0, "policy 1": 10.0, "policy 2": 9.5},
    )
    equals = OraclePoint(4, {"policy 0": 12.0, "policy 1": 9.75, "policy 2": 9.75}, halves)
    assert equals.over_best("policy 0") == 1.2
    assert equals.over_best("policy 1") == pytest.approx((1.0 + 9.5 / 10.0) / 2)


def test_ties_do_not_count_outside_ties():
    tied = at(3, 10.05, 10.2, 10.0)
    found = regret.figures_of(make_table({1: 1, 2: 2, 3: 0}), [*SWEEP, tied], captured=False)
    assert found["worst_regret"] == 1.005
    assert found["worst_regret_outside_ties"] == 1.005  # 10.2 is 2% over 10.0
    tied = at(3, 10.05, 10.0, 10.0)
    found = regret.figures_of(make_table({1: 1, 2: 2, 3: 0}), [*SWEEP, tied], captured=False)
    assert (found["worst_regret"], found["worst_regret_outside_ties"]) == (1.005, 1.0)


def test_each_situation_is_judged_by_its_own_array():
    table = make_table({1: 0, 2: 0}, {1: 1, 2: 2})
    found = regret.shape_result(table, {Situation.GRAPH: SWEEP, Situation.BUSY: SWEEP})
    situations = found["situations"]
    assert situations["graph"]["worst_regret"] == 1.0
    assert situations["graph"]["other_array_geomean"] == situations["busy"]["geomean_regret"]
    assert situations["busy"]["worst_regret"] == 2.0


def test_dense_counts_hold_every_small_count_and_both_ends():
    counts = dense_counts(1000, 16)
    assert counts[:12] == list(range(1, 13))
    assert counts[-1] == 1000
    assert all(b / a < 1.1 for a, b in pairwise(counts[12:]))


def test_users_keep_three_benches():
    assert list(BENCHES) == ["regret", "step", "sorts"]


def test_a_bench_prints_words_or_json_and_keeps_its_figures(tmp_path):
    kept = tmp_path / "step.json"
    words = ("bench", "step", "--kernel", "cpu", "--models", "qwen3-30b", "--eager", "1,4")
    small = ("--layers", "1", "--seconds", "0", "--budget", "0.2")
    done = running.run(*words, *small, "--out", str(kept), cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "qwen3-30b, as_it_comes: the table saves" in done.stdout
    found = json.loads(kept.read_text())
    assert found["bench"] == "step"
    assert {"command", "date", "environment"} <= found.keys()
    assert set(found["overall"]["as_it_comes"]) >= {
        *("mean_loss", "worst_loss", "worst_over_baseline")
    }
    # Neither read nor written: what a user's engines stored.
    assert [path.name for path in tmp_path.iterdir()] == ["step.json"]


def test_a_bench_of_what_is_not_here_says_so(tmp_path):
    done = running.run("bench", "step", "--kernel", "aiter", cache=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "--kernel aiter cannot run here, AITER is not installed" in done.stderr
