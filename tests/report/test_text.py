"""What people read, from hand-made results with known numbers."""

from dataclasses import replace

import pytest

from adaptive_moe.policy.coverage import Situation
from adaptive_moe.policy.savings import Savings, savings
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.policy.verdict import Judgement, Standing
from adaptive_moe.report.explain import explain, is_for
from adaptive_moe.report.text import (
    MOST_COLUMNS,
    advice,
    bucket_table,
    fixed_line,
    result_line,
    settled_words,
    start_line,
    table_lines,
)
from adaptive_moe.report.words import candidate_words, gain_words, span_words
from tests.report.making import (
    everything,
    failed,
    faster,
    open_still,
    table_of,
    tied,
    unmeasured,
    with_host,
)
from tests.tables import bucket, result


class TestTheOneLineOfAStart:
    def test_it_names_the_project_and_says_what_is_saved_of_what_and_where(self):
        line = start_line([everything(), table_of([tied(8)])])
        assert line.startswith("adaptive_moe: on, 2 shapes, ")
        assert "captured calls save 3 to 12% of the sort at 2 of 4 counts" in line
        assert line.endswith("; details below")

    def test_without_a_gain_it_says_how_much_is_open_and_what_happens_next(self):
        tables = [table_of([tied(1), open_still(8), open_still(64)])]
        line = start_line(tables)
        assert line.startswith("adaptive_moe: no gain found; 2 of 3 counts unsettled")
        assert line.endswith("the next start continues")
        assert "next start" not in start_line(tables, continues=False)
        assert "all settled" in start_line([table_of([tied(1)])])

    def test_without_a_table_it_says_that_nothing_changes(self):
        assert start_line([]).startswith("adaptive_moe: no table, so nothing changes")

    def test_it_fits_a_terminal_however_much_there_is(self):
        eager = [faster(n, 0.11) for n in range(1, 200)]
        graph = [faster(n, 0.11 + n / 1000) for n in range(1, 200)]
        many = [table_of(eager, graph)] * 100
        lines = [start_line(many), start_line([everything()] * 1000), start_line([with_host()])]
        assert all(len(line) <= MOST_COLUMNS for line in lines)
        assert "eager calls save 30% of the sort at 3 of 3 counts" in lines[2]

    def test_a_fixed_policy_is_said_with_the_variable_that_asked_for_it(self):
        line = fixed_line(2, "VLLM_ROCM_AITER_MOE_DISPATCH_POLICY=2")
        assert line == (
            "adaptive_moe: policy 2 for every call (VLLM_ROCM_AITER_MOE_DISPATCH_POLICY=2)"
        )


def test_the_result_is_one_sentence_with_model_device_gain_and_token_counts():
    assert result_line(everything()) == (
        "DeepSeek-V3, block 32, on AMD Instinct MI300X: captured calls, up to 12% off the sort at "
        "8 to 16 tokens; eager calls, up to 25% off the sort at 24 tokens; the baseline elsewhere"
    )


def test_nothing_found_and_found_everywhere_are_said_as_such():
    nothing = result_line(table_of([tied(1), open_still(8)]))
    assert nothing.startswith("16 experts, topk 4, dim 64, block 32, on test device: no gain found")
    assert nothing.endswith("1 of 2 counts not settled")
    assert "elsewhere" not in result_line(table_of([faster(1), faster(8)]))


def test_savings_are_numbers_for_whoever_draws_a_dashboard():
    assert savings(everything(), Situation.EAGER) == Savings(5, 3, 1, 0.25, 0.25)
    graph = savings(everything(), Situation.GRAPH)
    assert (graph.counts, graph.settled, graph.improved) == (4, 3, 2)
    assert savings(table_of([tied(1)]), Situation.GRAPH) == Savings(0, 0, 0, None, None)
    assert settled_words(everything()) == "6 of 9 counts settled in 1 start"


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([(1, 1)], "1 token"),
        ([(9, 24), (64, 64)], "9 to 24 and 64 tokens"),
        ([(1, 2), (5, 5), (725, 1024)], "1 to 2, 5 and 725 to 1,024 tokens"),
        ([(n, n) for n in range(1, 8, 2)], "4 spans from 1 to 7 tokens"),
    ],
)
def test_token_counts_are_said_in_few_words(spans, words):
    assert span_words(spans) == words


def test_a_table_in_a_log_begins_with_its_result_and_says_who_sorts_and_why_not():
    lines = table_lines(everything())
    assert lines[0] == result_line(everything())
    text = "\n".join(lines)
    assert "  captured: policy 1 (one-shot) at 8 to 16; else policy 0 (AITER's rule)" in text
    assert "  baseline policy 0 (AITER's rule); made by hand, on AMD Instinct MI300X" in text
    assert "measured in 1.23 s" in text
    assert "1 count not measured, 2 counts not settled, 3 counts tied" in text
    assert len(table_lines(everything(), with_counts=False)) < len(lines) - 9
    stored = "\n".join(table_lines(everything(), measured_now=False))
    assert "measured at 2026-01-01" in stored
    assert "1.23 s" not in stored


def test_a_table_of_the_cpu_sort_says_that_it_tunes_nothing():
    assert "tunes nothing" in "\n".join(table_lines(table_of([tied(1)], kernel="cpu")))
    assert "tunes nothing" not in "\n".join(table_lines(everything()))


def test_the_baseline_is_never_the_best_of_what_failed():
    assert "1 count where policy 1 failed" in "\n".join(table_lines(failed()))
    assert "raised ValueError: <none>" in bucket_table(failed())[1]


def test_the_rows_of_counts_have_each_time_the_saving_and_the_interval():
    rows = bucket_table(table_of([tied(1), faster(24), open_still(64), unmeasured(512)]))
    columns = "tokens policy 0 us policy 1 us policy 2 us saves rounds verdict"
    assert rows[0].split() == columns.split()
    assert rows[2].split()[:6] == ["24", "10.0", "8.0", "90.0", "20.0%", "20"]
    assert "policy 1 saves 20.0%, 99% interval 20.0% to 20.0%" in rows[2]
    assert "policy 1 saves 5.9%, 99% interval " in rows[3]
    assert ": not settled" in rows[3]
    # What was not timed is an empty cell, not a word in a column of microseconds.
    assert rows[4].split(maxsplit=1) == ["512", "not measured, no time was left"]


def test_captured_and_eager_calls_have_a_block_each():
    lines = bucket_table(everything())
    assert [line for line in lines if line in ("captured", "eager")] == ["captured", "eager"]
    assert "eager" not in bucket_table(table_of([tied(1)]))


def test_each_view_of_a_count_has_its_row():
    fills = [[result("policy 0", 0.0), result("policy 1", gain)] for gain in (0.0, 0.0)]
    padded = bucket(64, *fills, fractions=(1.0, 1 / 64))
    labels = [row.strip() for row in bucket_table(table_of([padded]))[1:]]
    assert labels[0].startswith("64 (100% real)")
    assert labels[1].startswith("64 (1.56% real)")
    host = bucket_table(with_host())[2].split()
    assert host[:5] == ["1", "host", "20.0", "14.0", "30.0%"]


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        ((0.2, 0.12, 0.24), "saves 20.0%, 99% interval 12.0% to 24.0%"),
        ((-0.062, -0.08, 0.01), "takes 6.2% longer, 99% interval -1.0% to 8.0%"),
        ((-0.1, None, None), "takes 10.0% longer, too few rounds for an interval"),
        ((0.2, None, 0.24), "saves 20.0%, too few rounds for an interval"),
    ],
)
def test_a_gain_is_said_with_its_interval_and_the_confidence_that_it_has(gain, words):
    assert gain_words(Judgement("policy 1", Standing.UNSETTLED, 8.0, *gain), 0.99) == words


def test_a_sort_whose_name_says_what_it_is_is_called_by_it():
    assert candidate_words("fused sort") == "fused sort"


def test_many_open_counts_are_explained_and_few_are_not():
    table = table_of([open_still(1), faster(2), unmeasured(4)], seconds=1.5, budget_s=1.0)
    text = " ".join(advice(table))
    assert "1 not settled and 1 not measured of 3 counts" in text
    assert "such as 4 s (--budget" in text
    # It had time left, so that more would change nothing.
    early = PolicyTable(replace(table.evidence, seconds=0.9))
    assert "when it is quiet. What" in advice(early)[1]
    assert advice(table_of([open_still(1), *(faster(n) for n in range(2, 8))])) == []


def test_explain_names_the_candidate_the_count_it_comes_from_and_the_evidence():
    lines = explain(everything(), 8, captured=True)
    assert lines[0] == "8 tokens, captured into a graph: policy 1 (one-shot)"
    assert lines[1] == "  measured at 8 tokens"
    text = "\n".join(lines)
    assert "policy 1 (one-shot): faster, 8.8 us, saves 12.0%, 99% interval" in text
    assert "policy 2 (multi-phase): far slower" in text
    assert "9.0 times the fastest at the first look" in text
    assert "at a confidence of 99%" in text
    assert "measured at 64 tokens, the next" in "\n".join(explain(everything(), 60, captured=False))


def test_explain_says_why_a_count_between_two_does_not_get_the_upper_ones_winner():
    lines = explain(everything(), 20, captured=False)
    assert lines[0] == "20 tokens, eager: policy 0 (AITER's rule)"
    assert "not at the measured count below" in "\n".join(lines)


def test_explain_shows_the_hosts_time_where_it_counts():
    text = "\n".join(explain(with_host(), 8, captured=False))
    assert "time of the device" in text
    assert "time of the host" in text
    assert "below 2048 tokens the device or the host may bound" in text


def test_explain_of_a_count_that_was_not_measured():
    assert "the baseline serves" in explain(everything(), 5000, captured=False)[1]
    assert "not for so many tokens" in "\n".join(explain(everything(), 5000, captured=False))
    assert not is_for(everything(), 5000)
    assert is_for(everything(), 4096)
