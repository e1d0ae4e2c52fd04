"""The benchmarks measure what they say: small seeded runs, and sums done by hand."""

import random
from itertools import pairwise

import pytest

from adaptive_moe.cli.bench import decision, lookup, noise, regret
from adaptive_moe.cli.bench.oracle import OraclePoint, dense_counts
from adaptive_moe.policy.decision import Rule


@pytest.mark.parametrize("bimodal", [False, True])
def test_simulated_decisions_meet_the_goals_in_small(bimodal):
    rng = random.Random(5)
    same, better, worse = {0: 9.0, 1: 9.0, 2: 9.0}, {0: 9.0, 1: 9.0, 2: 8.1}, {0: 9.0, 1: 9.9}

    def policies(true_us, count=40):
        return [
            decision.simulate_bucket(true_us, rng, bimodal=bimodal, rule=Rule())[0].policy
            for _ in range(count)
        ]

    assert set(policies(same)) == {0}
    assert set(policies(better)) == {2}
    assert set(policies(worse)) == {0}


def test_the_simulated_clock_has_the_noise_it_claims():
    clock = decision.NoisyClock({0: 10.0}, random.Random(1), bimodal=False)
    clock.samples = decision.DRIFT_SAMPLES
    times = sorted(clock.sample(0) for _ in range(4000))
    assert times[2000] == pytest.approx(11.5, rel=0.01)  # the whole drift
    spread = (times[3364] - times[636]) / 2 / times[2000]  # a standard deviation each way
    assert spread == pytest.approx(0.05, rel=0.15)
    assert 20 < sum(time > 40 for time in times) < 70  # 1% of 4000, times five


def test_simulated_tables_find_both_the_crossover_and_the_jump_of_policy_0():
    def true_us(num_tokens):
        one, two = 4.0 + 0.1 * num_tokens, 8.0
        return {0: one if num_tokens <= 300 else two, 1: one, 2: two}

    table = decision.simulate_table(true_us, random.Random(2), bimodal=False, rule=Rule())
    for num_tokens in (1, 20, 60, 150, 290, 300, 301, 400, 16384):
        times = true_us(num_tokens)
        chosen = table[decision._serving(table, num_tokens)]
        assert times[chosen] / min(times.values()) < 1.05


def test_lookup_reads_what_the_table_holds_and_allocates_nothing():
    table = lookup.table_of(50)
    assert len(table.evidence.eager) == 50
    for bucket in table.evidence.eager:
        assert table.eager[bucket.num_tokens] == bucket.policy
    assert lookup.allocations(table.eager, range(1, 2000)) == 0


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


def test_repeatability_counts_agreement_and_leaves_ties_out():
    arrays = [bytes([0, 1, 2, 0]), bytes([0, 1, 0, 1])]
    oracle = [*SWEEP, OraclePoint(3, {0: 10.0, 1: 10.1, 2: 10.0})]
    found = noise.agreement(arrays, oracle, tie=0.025)
    # Agreed at 1 token; 2 and 0 differ twofold at 2 tokens; 0 and 1 are a tie at 3.
    assert found == {"of_all_counts": 0.3333, "outside_ties": 0.5, "counts": 3}


def test_dense_counts_hold_every_small_count_and_both_ends():
    counts = dense_counts(1000, 16)
    assert counts[:12] == list(range(1, 13))
    assert counts[-1] == 1000
    assert all(b / a < 1.1 for a, b in pairwise(counts[12:]))
