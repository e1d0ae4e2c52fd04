"""adaptive-moe bench: sums done by hand."""

from itertools import pairwise

import pytest

from adaptive_moe.cli.bench import regret
from adaptive_moe.cli.bench.oracle import OraclePoint, dense_counts

SWEEP = [
    OraclePoint(1, {0: 10.0, 1: 8.0, 2: 20.0}),
    OraclePoint(2, {0: 10.0, 1: 10.0, 2: 5.0}),
]


def test_regret_figures_by_hand():
    found = regret.figures(bytes([0, 1, 0]), SWEEP, margin=0.01)
    assert found["geomean_regret"] == pytest.approx(2**0.5, abs=1e-3)  # 1 and 2
    assert found["worst_regret"] == 2.0
    assert found["worst_vs_policy0"] == 1.0
    # Policies 0, 1 and 2 everywhere: 10*10, 8*10 and 20*5, against the table's 8*10.
    assert found["gain_vs_best_static"] == 1.0
    assert found["gain_vs_policy0"] == pytest.approx((100 / 80) ** 0.5, abs=1e-3)


def test_ties_do_not_count_outside_ties():
    tied = OraclePoint(3, {0: 10.05, 1: 10.0})
    found = regret.figures(bytes([0, 1, 2, 0]), [*SWEEP, tied], margin=0.01)
    assert found["worst_regret"] == 1.005
    assert found["worst_regret_outside_ties"] == 1.0


def test_the_hot_path_index_takes_the_last_beyond_the_end():
    assert [regret.at(bytes([9, 1, 2]), n) for n in (1, 2, 3, 99)] == [1, 2, 2, 2]


def test_dense_counts_hold_every_small_count_and_both_ends():
    counts = dense_counts(1000, 16)
    assert counts[:12] == list(range(1, 13))
    assert counts[-1] == 1000
    assert all(b / a < 1.1 for a, b in pairwise(counts[12:]))
