"""The scripts that measure ourselves measure what they say: sums done by hand."""

from adaptive_moe.cli.bench.oracle import OraclePoint
from calibration import bench_lookup as lookup
from calibration import bench_noise as noise
from tests.tables import CANDIDATES, make_table

P0, P1, P2 = CANDIDATES
SWEEP = [
    OraclePoint(1, {P0: 10.0, P1: 8.0, P2: 20.0}),
    OraclePoint(2, {P0: 10.0, P1: 10.0, P2: 5.0}),
]


def test_lookup_reads_what_the_table_holds_and_allocates_nothing():
    table = lookup.table_of(50)
    assert len(table.evidence.busy) == 50
    for bucket in table.evidence.busy:
        assert table.candidate(bucket.num_tokens) == bucket.candidate
    assert lookup.allocations(table.eager, range(1, 2000)) == 0


def test_repeatability_counts_agreement_and_leaves_ties_out():
    tables = [make_table({1: 1, 2: 2, 3: 0}), make_table({1: 1, 2: 0, 3: 1})]
    oracle = [*SWEEP, OraclePoint(3, {P0: 10.0, P1: 10.1, P2: 10.0})]
    found = noise.agreement(tables, oracle, tie=0.025, captured=False)
    # Agreed at 1 token; 2 and 0 differ twofold at 2 tokens; 0 and 1 are a tie at 3.
    assert found == {"of_all_counts": 0.3333, "outside_ties": 0.5, "counts": 3}
