"""PolicyTable: arrays derived from evidence, the baseline wherever nothing was measured."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_moe.policy.coverage import Coverage, Situation
from adaptive_moe.policy.evidence import Exclusion, Ratios
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.shape import SortingShape
from tests.tables import CANDIDATES, bucket, make_evidence, make_table, result, winning

SHAPE = SortingShape(16, 4, 64)


@given(st.dictionaries(st.integers(1, 300), st.integers(0, 2), min_size=1, max_size=8))
def test_each_measured_count_has_its_own_choice_and_each_other_one_of_a_neighbour_or_none(given_):
    table = make_table(given_)
    counts = sorted(given_)
    for n in range(1, counts[-1] + 1):
        above = next(c for c in counts if c >= n)
        if n in given_:
            assert table.eager[n] == given_[n]
        else:
            assert table.eager[n] in (given_[above], 0)
    assert len(table.eager) == counts[-1] + 1


def test_past_the_coverage_the_baseline_serves():
    table = make_table({8: 1, 64: 2}, {8: 1})
    assert table.candidate(64) == "policy 2"
    assert table.candidate(65) == table.candidate(10**6) == "policy 0"
    assert table.candidate(9, captured=True) == "policy 0"


def test_counts_that_do_not_occur_have_the_baseline():
    coverage = Coverage(SHAPE, "policy 0", ((1, 8), (33, 64)), busy_from=1)
    table = PolicyTable(make_evidence([winning(8, 1), winning(64, 1)], coverage=coverage))
    assert [table.eager[n] for n in (1, 8, 9, 32, 33, 64)] == [1, 1, 0, 0, 1, 1]


def test_a_captured_call_has_another_candidate_only_at_sizes_that_were_captured():
    coverage = Coverage.up_to(SHAPE, 64, (8, 16, 24), busy_from=1)
    evidence = make_evidence([winning(64, 2)], [winning(8, 1), winning(24, 1)], coverage=coverage)
    table = PolicyTable(evidence)
    assert [n for n in range(1, 25) if table.graph[n]] == [8, 16, 24]
    assert table.runs(captured=True) == [(8, 24, "policy 1")]


def test_without_graph_evidence_captured_calls_have_the_baseline():
    table = make_table({64: 1})
    assert table.graph == b""
    assert table.candidate(64, captured=True) == "policy 0"


def test_eager_and_captured_calls_have_arrays_of_their_own():
    table = make_table({8: 1}, {8: 2})
    assert (table.candidate(8), table.candidate(8, captured=True)) == ("policy 1", "policy 2")


def test_a_bucket_above_busy_from_says_nothing_about_counts_below_it():
    coverage = Coverage.up_to(SHAPE, 64, busy_from=40)
    table = PolicyTable(make_evidence([winning(8, 1), winning(64, 1)], coverage=coverage))
    assert [table.eager[n] for n in (8, 9, 39, 40, 64)] == [1, 0, 0, 1, 1]


def test_runs_are_of_equal_candidates_over_the_counts_that_occur():
    table = make_table({8: 1, 9: 0, 64: 0})
    assert table.runs() == [(1, 8, "policy 1"), (9, 64, "policy 0")]
    assert table.runs(captured=True) == []


def test_open_counts_are_those_that_more_rounds_may_change():
    doubtful = bucket(64, [result("policy 0", 0.0), result("policy 1", 0.1, noise=0.2)])
    settled = winning(8, 1, CANDIDATES[:2])
    assert PolicyTable(make_evidence([settled, doubtful])).open_counts == 1
    assert make_table({8: 1, 64: 2}).open_counts == 0


def test_what_raised_may_pass_and_what_was_wrong_stays_wrong():
    evidence = make_evidence([winning(8, 1)])
    raised, wrong = (Exclusion("policy 1", w, "why") for w in (False, True))
    for exclusion, failed in ((raised, True), (wrong, False)):
        table = PolicyTable(replace(evidence, excluded=(exclusion,)))
        assert (table.failed, table.candidate(8)) == (failed, "policy 0")


def test_the_choice_of_a_count_is_that_of_the_bucket_at_or_above_it():
    table = PolicyTable(make_evidence([winning(8, 1), winning(64, 2)]))
    assert table.choice_at(9, Situation.EAGER).num_tokens == 64
    assert table.choice_at(65, Situation.EAGER) is None
    assert table.choice_at(8, Situation.GRAPH) is None


@pytest.mark.parametrize("odd", [0, -1, True, 1.0, "8", None])
def test_what_is_no_token_count_is_refused(odd):
    with pytest.raises(ValueError, match="num_tokens="):
        make_table({8: 1}).candidate(odd)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"schema": 1}, "schema 1 is not"),
        ({"candidates": ("policy 1", "policy 0", "policy 2")}, "is not the baseline"),
        ({"candidates": ("policy 0", "policy 1", "policy 1")}, "different names"),
        ({"candidates": ("policy 0", "policy 1", "policy 3")}, "not of the candidates"),
        ({"eager": ()}, "without eager buckets"),
        ({"eager": (winning(64, 1), winning(8, 1))}, "must rise"),
        ({"eager": (winning(65, 1),)}, "65 tokens .eager. are not in the coverage"),
        ({"eager": (bucket(8),)}, "no results at 8 tokens"),
    ],
)
def test_evidence_that_is_not_whole_makes_no_table(fields, words):
    evidence = make_evidence([winning(64, 1)])
    with pytest.raises(ValueError, match=words):
        PolicyTable(replace(evidence, **fields))


@pytest.mark.parametrize(
    "numbers", [(0, 0.0, 0.0, 1.0), (4, 0.0, -1.0, 1.0), (4, 0.0, 0.0, 0.5), (4, float("nan"), 0.0)]
)
def test_measurements_that_cannot_be_are_refused(numbers):
    with pytest.raises(ValueError, match="impossible measurement"):
        Ratios(*numbers)


def test_a_gap_does_not_take_what_the_hosts_time_forbids_at_its_lower_end():
    """At 8 tokens policy 1 costs half of the host's time more; at 64 it saves on the device."""
    eager = [
        bucket(8, [result("policy 0", 0.0, host=0.0), result("policy 1", 0.0, host=-0.5)]),
        bucket(
            64,
            [
                result("policy 0", 0.0, host=0.0),
                result("policy 1", 0.025, second=0.025, host=0.0),
            ],
        ),
    ]
    coverage = Coverage.up_to(SortingShape(16, 4, 64), 64)
    table = PolicyTable(make_evidence(eager, coverage=coverage))
    assert [table.candidate(n) for n in (8, 9, 63, 64)] == ["policy 0"] * 3 + ["policy 1"]
