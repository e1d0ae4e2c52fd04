"""What people read, from hand-made verdicts with known numbers."""

from dataclasses import replace

import pytest

from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.decision import Result, Rule, Samples, Standing, decide
from adaptive_moe.policy.evidence import Bucket, Fill
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.report.explain import explain, is_for
from adaptive_moe.report.text import advice, bucket_table, gains, headline, summary
from adaptive_moe.report.words import candidate_words, gain_words
from adaptive_moe.shape import SortingShape
from tests.tables import make_table

NAMES = ("policy 0", "policy 1", "policy 2")


def verdict(zero: float, one: float | None, two: float, rounds: int = 8, **out):
    """Samples without noise; one=None: policy 1 is out as `out` says."""
    given = [Samples("policy 0", (zero,) * rounds), Samples("policy 2", (two,) * rounds)]
    given.insert(1, Samples("policy 1", **out) if one is None else Samples(NAMES[1], (one,) * 8))
    return decide(given, Rule())


ONE_FASTER = verdict(10.0, 8.0, 20.0)
TWO_FASTER = verdict(10.0, 14.0, 7.5)
ALL_TIED = verdict(10.0, 10.0, 10.0)
ONE_HOPELESS = verdict(
    10.0, None, 7.5, out=Standing.HOPELESS, reason="9.0 times the fastest at the first look"
)
ONE_FAILED = verdict(10.0, None, 10.0, out=Standing.FAILED, reason="raised ValueError: no")
UNSETTLED = decide([Samples(name, (10.0,) * 3) for name in NAMES], Rule())
NOTHING_MEASURED = decide([Samples(name) for name in NAMES], Rule())


def section(buckets):
    return tuple(Bucket(n, v.candidate, v.reason, (Fill(1.0, v),)) for n, v in buckets.items())


def table_of(busy, graph=None, idle=None, busy_from=1):
    shape = SortingShape(16, 4, 64)
    coverage = Coverage.up_to(shape, max(busy), tuple(graph or ()), busy_from=busy_from)
    found = make_table(dict.fromkeys(busy, 0), coverage=coverage, seconds=1.234).evidence
    sections = {"busy": busy, "graph": graph or {}, "idle": idle or {}}
    return PolicyTable(replace(found, **{name: section(b) for name, b in sections.items()}))


TABLE = table_of({1: ALL_TIED, 24: ONE_FASTER, 64: UNSETTLED, 4096: ONE_HOPELESS})


def test_the_summary_says_who_sorts_from_where_and_why_the_baseline_was_kept():
    assert summary(TABLE) == (
        "policy 0 (AITER's rule) up to 1 token, policy 1 (one-shot) 2 to 24, "
        "policy 0 (AITER's rule) 25 to 64, policy 2 (multi-phase) from 65; "
        "baseline kept: 1 bucket tied, 1 bucket unsettled"
    )


def test_one_candidate_everywhere_is_said_in_few_words():
    assert summary(table_of({8: ONE_FASTER})) == "policy 1 (one-shot) at every token count"
    assert gains(table_of({8: ONE_FASTER})) == "saves 20% at 1 bucket"


def test_a_candidate_of_one_count_is_said_to_be_at_it():
    table = table_of({8: ALL_TIED, 9: ONE_FASTER, 16: ALL_TIED})
    assert "8 tokens, policy 1 (one-shot) at 9, policy 0 (AITER's rule) from 10" in summary(table)


def test_graph_and_eager_are_told_apart_where_they_differ():
    table = table_of({16: ALL_TIED}, graph={16: ONE_FASTER})
    assert summary(table) == (
        "graph: policy 1 (one-shot) at every token count | "
        "eager: policy 0 (AITER's rule) at every token count; baseline kept: 1 bucket tied"
    )


def test_the_baseline_is_never_the_best_of_what_failed():
    out = [Samples("policy 1", out=Standing.FAILED), Samples("policy 2", out=Standing.WRONG)]
    both = decide([Samples("policy 0", (10.0,) * 8), *out], Rule())
    text = summary(table_of({8: ONE_FAILED, 16: verdict(10.0, 20.0, 20.0), 32: both}))
    assert "1 bucket where policy 1 failed, 1 bucket" in text
    assert "1 bucket where policy 1 failed, policy 2 was wrong" in text
    assert "1 bucket where it is fastest" in text


def test_the_headline_names_shape_kernel_device_baseline_gain_and_time():
    line = headline(TABLE)
    for part in (
        "16 experts, topk 4",
        "made by hand",
        "test device",
        "baseline policy 0 (AITER's rule)",
        "saves 20% to 25% at 2 buckets",
        "1.23 s",
    ):
        assert part in line
    assert "\n" not in line


def test_the_headline_of_a_stored_table_says_when_it_was_measured_not_how_long_that_took():
    line = headline(TABLE, measured_now=False)
    assert line.endswith(f"; as measured {TABLE.evidence.created}")
    assert "1.23 s" not in line


def test_nothing_is_saved_where_the_winner_of_a_situation_is_not_applied():
    assert "; saves nothing; " in headline(table_of({8: ALL_TIED}))
    # Faster while the device is busy, slower while it is idle: below busy_from it is not applied.
    table = table_of({8: ONE_FASTER}, idle={8: TWO_FASTER}, busy_from=9)
    assert table.candidate(8) == "policy 0"
    assert "; saves nothing; " in headline(table)


def test_the_bucket_table_has_each_time_the_saving_and_the_reason():
    head, tied, faster, _, hopeless = bucket_table(TABLE)
    columns = "tokens policy 0 us policy 1 us policy 2 us saves rounds verdict"
    assert head.split() == columns.split()
    assert tied.split()[:4] == ["1", "10.0", "10.0", "10.0"]
    assert faster.split()[:6] == ["24", "10.0", "8.0", "20.0", "20.0%", "8"]
    assert "policy 1 saves 20.0%" in faster
    # What was not timed is an empty cell, not a word in a column of microseconds.
    assert hopeless.split()[:5] == ["4096", "10.0", "7.5", "25.0%", "8"]


def test_what_was_not_measured_at_all_is_a_row_of_empty_cells():
    table = table_of({8: NOTHING_MEASURED})
    said = "kept policy 0: not measured, no time was left"
    assert bucket_table(table)[1].split(maxsplit=1) == ["8", said]
    assert explain(table, 8, captured=False)[2].strip() == said
    assert "baseline kept: 1 bucket not measured" in summary(table)
    once = decide([Samples(name, (10.0,)) for name in NAMES], Rule())
    assert "baseline kept: 1 bucket unsettled" in summary(table_of({8: once}))


def test_times_agree_with_what_is_saved_where_the_machine_changed_its_speed():
    """All rounds of policy 1 are from while it was slow, most of the baseline's are not."""
    slow_first = (40.0,) * 8 + (10.0,) * 12
    found = decide([Samples(NAMES[0], slow_first), Samples(NAMES[1], (32.0,) * 8)], Rule())
    assert [r.median_us for r in found.results] == [10.0, 32.0]
    row = bucket_table(table_of({8: found}))[1].split()
    assert row[:4] == ["8", "10.0", "8.0", "20.0%"]
    assert "policy 1 (one-shot): faster, 8.0 us, saves 20.0%" in "\n".join(
        explain(table_of({8: found}), 8, captured=False)
    )


def test_each_situation_has_its_block():
    table = table_of({8: ALL_TIED}, {8: ONE_FASTER}, {8: ALL_TIED}, busy_from=9)
    lines = bucket_table(table)
    assert lines[::3] == ["graph replay", "eager, device busy", "eager, device idle"]
    assert bucket_table(table_of({8: ALL_TIED}, {8: ONE_FASTER}))[0] == "graph replay"
    assert "graph" not in bucket_table(TABLE)[0]


def test_every_fill_of_a_padded_bucket_has_its_row():
    fills = (Fill(1.0, ALL_TIED), Fill(1 / 64, ONE_FASTER))
    found = replace(TABLE.evidence, busy=(Bucket(64, "policy 0", "least loss", fills),))
    lines = bucket_table(PolicyTable(found))
    assert ["64 (100% real)" in lines[1], "64 (1.56% real)" in lines[2]] == [True, True]


def test_a_fill_in_which_the_winner_was_not_measured_saves_nothing():
    fills = (Fill(1.0, ONE_FASTER), Fill(1 / 64, NOTHING_MEASURED))
    found = replace(TABLE.evidence, busy=(Bucket(64, "policy 1", "by hand", fills),))
    table = PolicyTable(found)
    assert gains(table) == "saves 20% at 1 bucket"
    assert (
        bucket_table(table)[2].split("real)")[1].strip()
        == "kept policy 1: not measured, no time was left"
    )


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        ((0.2, 0.12, 0.24), "saves 20.0% (surely 12.0% to 24.0%)"),
        ((-0.062, -0.08, 0.01), "takes 6.2% longer (surely -1.0% to 8.0%)"),
        ((0.0, -0.01, 0.01), "saves 0.0% (surely -1.0% to 1.0%)"),
        ((-0.1, None, None), "takes 10.0% longer (too few rounds for an interval)"),
        ((0.2, None, None), "saves 20.0% (too few rounds for an interval)"),
        ((0.2, None, 0.24), "saves 20.0% (too few rounds for an interval)"),
    ],
)
def test_a_gain_is_said_with_what_is_sure_of_it(gain, words):
    assert gain_words(Result("policy 1", Standing.UNSETTLED, 8.0, *gain)) == words


def test_a_sort_whose_name_says_what_it_is_is_called_by_it():
    assert candidate_words("fused sort") == "fused sort"


def test_many_open_buckets_are_explained_and_few_are_not():
    many = table_of({1: UNSETTLED, 2: ONE_FASTER, 4: NOTHING_MEASURED})
    text = " ".join(advice(many))
    assert "1 unsettled and 1 not measured of 3 buckets" in text
    assert "such as 4 s (--budget" in text
    # It had time left, so that more would change nothing.
    early = PolicyTable(replace(many.evidence, seconds=0.9))
    assert "when it is quiet. What" in advice(early)[1]
    few = {1: UNSETTLED} | dict.fromkeys(range(2, 8), ONE_FASTER)
    assert advice(table_of(few)) == []
    quarter = {1: UNSETTLED} | dict.fromkeys(range(2, 5), ONE_FASTER)
    assert advice(table_of(quarter))[0].startswith("1 unsettled of 4 buckets: ")


@pytest.mark.parametrize(
    ("num_tokens", "words", "served"),
    [
        (24, "policy 1 (one-shot)", "measured at 24 tokens"),
        (20, "policy 1 (one-shot)", "measured at 24 tokens, the next bucket up"),
        (99999, "policy 2 (multi-phase)", "measured at 4096 tokens, the largest measured"),
    ],
)
def test_explain_names_the_candidate_the_bucket_the_reason_and_the_evidence(
    num_tokens, words, served
):
    lines = explain(TABLE, num_tokens, captured=False)
    assert lines[0] == f"{num_tokens} tokens, eager: {words}"
    assert lines[1] == f"  eager, {served}"
    text = "\n".join(lines)
    assert f"{words}: faster, " in text
    assert "margin 1.0%, confidence 99%" in text
    assert "2026-01-01" in text


def test_a_table_for_some_counts_says_for_which():
    """As each block size that AITER picks by token count has its own."""
    table = table_of({64: ALL_TIED, 128: ONE_FASTER})
    coverage = replace(table.evidence.coverage, eager=((33, 64), (100, 100), (120, 128)))
    table = PolicyTable(replace(table.evidence, coverage=coverage))
    assert "block 32, 33 to 64, 100, 120 to 128 tokens, on made by hand" in headline(table)
    assert "block 32, up to 4096 tokens, on made by hand" in headline(TABLE)
    unfit = "this table is not for so many tokens"
    for count, fits in ((33, True), (100, True), (8, False), (110, False), (129, False)):
        assert is_for(table, count) is fits
        assert (unfit in "\n".join(explain(table, count, captured=False))) is not fits


def test_explain_says_why_a_candidate_was_dropped_and_what_a_slower_one_costs():
    text = "\n".join(explain(TABLE, 4096, captured=False))
    assert "policy 1 (one-shot): hopeless: 9.0 times the fastest at the first look" in text
    assert "takes 100.0% longer (surely" in "\n".join(explain(TABLE, 24, captured=False))


def test_explain_follows_the_graph_array_for_captured_calls():
    table = table_of({16: ALL_TIED}, graph={16: ONE_FASTER})
    captured = explain(table, 8, captured=True)
    assert captured[0] == "8 tokens, captured into a graph: policy 1 (one-shot)"
    assert captured[1].startswith("  graph replay, measured at 16")
    assert explain(table, 8, captured=False)[0] == "8 tokens, eager: policy 0 (AITER's rule)"


def test_explain_shows_both_situations_below_busy_from_and_one_above():
    table = table_of({8: ONE_FASTER, 64: ONE_FASTER}, idle={8: TWO_FASTER}, busy_from=9)
    below = "\n".join(explain(table, 8, captured=False))
    assert "device busy" in below
    assert "device idle" in below
    assert "below 9 tokens an eager call may find the device busy or idle" in below
    assert "for graphs" not in below
    above = "\n".join(explain(table, 64, captured=False))
    assert "device idle" not in above


def test_explain_shows_graphs_where_they_have_a_say_in_eager_calls():
    """One that is faster in both eager situations is not applied where graphs choose another."""
    both = {8: ONE_FASTER, 64: ONE_FASTER}
    table = table_of(both, graph={16: TWO_FASTER}, idle=both, busy_from=17)
    lines = explain(table, 8, captured=False)
    assert lines[0] == "8 tokens, eager: policy 0 (AITER's rule)"
    assert lines[1] == "  graph replay, measured at 16 tokens, the next bucket up"
    assert "loses in neither, and is the choice for graphs, too" in "\n".join(lines)
