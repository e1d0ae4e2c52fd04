"""What people read, from hand-made verdicts with known numbers."""

from dataclasses import replace

import pytest

from adaptive_moe.policy.decision import Candidate, PolicyResult, Rule, Standing, Verdict, decide
from adaptive_moe.policy.table import Bucket, Fill, PolicyTable
from adaptive_moe.report.text import bucket_table, explain, headline, summary
from tests.tables import make_table

ONE_FASTER = decide(
    [Candidate(0, (10.0,) * 8), Candidate(1, (8.0,) * 8), Candidate(2, (20.0,) * 8)], Rule()
)
ALL_TIED = decide([Candidate(p, (10.0,) * 8) for p in (0, 1, 2)], Rule())
ONE_HOPELESS = decide(
    [
        Candidate(0, (10.0,) * 8),
        Candidate(1, (), Standing.HOPELESS, "9.0 times the fastest at the first look"),
        Candidate(2, (7.5,) * 8),
    ],
    Rule(),
)
UNSETTLED = Verdict(
    0, False, 3, "kept 0: 1 unsettled", (PolicyResult(0, Standing.REFERENCE, 10.0, 0.0),)
)


def table_of(*buckets: tuple[int, Verdict], graph: tuple[tuple[int, Verdict], ...] = ()):
    def made(pairs):
        return tuple(Bucket(n, v.policy, v.reason, (Fill(1.0, v),)) for n, v in pairs)

    found = make_table({n: v.policy for n, v in buckets}).evidence
    return PolicyTable(replace(found, eager=made(buckets), graph=made(graph), seconds=1.234))


TABLE = table_of((1, ALL_TIED), (24, ONE_FASTER), (64, UNSETTLED), (4096, ONE_HOPELESS))


def test_the_summary_says_which_policy_from_where_and_what_was_kept():
    assert summary(TABLE) == (
        "policy 0 up to 1 tokens, 1 from 2 to 24, 0 from 25 to 64, 2 from 65; "
        "1 bucket tied, 1 bucket unsettled, kept 0"
    )


def test_one_policy_everywhere_is_said_in_few_words():
    assert summary(table_of((8, ONE_FASTER))) == "policy 1 at every token count"


def test_graph_and_eager_are_told_apart_where_they_differ():
    table = table_of((16, ALL_TIED), graph=((16, ONE_FASTER),))
    assert summary(table) == (
        "graph: policy 1 at every token count | "
        "eager: policy 0 at every token count; 1 bucket tied, kept 0"
    )


def test_the_headline_names_shape_kernel_device_gain_and_time():
    line = headline(TABLE)
    for part in ("16 experts, topk 4", "made by hand", "test device", "20% to 25%", "1.23 s"):
        assert part in line
    assert "\n" not in line


def test_the_headline_of_a_stored_table_says_when_it_was_measured_not_how_long_that_took():
    line = headline(TABLE, measured_now=False)
    assert line.endswith(f"; as measured {TABLE.evidence.created}")
    assert "1.23 s" not in line


def test_the_headline_says_where_nothing_was_gained():
    assert "gain over policy 0 none" in headline(table_of((8, ALL_TIED)))


def test_the_bucket_table_has_each_policys_median_the_gain_and_the_reason():
    head, tied, faster, _, hopeless = bucket_table(TABLE)
    columns = "tokens policy 0 us policy 1 us policy 2 us gain rounds verdict"
    assert head.split() == columns.split()
    assert tied.split()[:4] == ["1", "10.0", "10.0", "10.0"]
    assert faster.split()[:6] == ["24", "10.0", "8.0", "20.0", "20.0%", "8"]
    assert hopeless.split()[:6] == ["4096", "10.0", "hopeless", "7.5", "25.0%", "8"]
    assert "policy 1 saves 20.0%" in faster


def test_every_fill_of_a_padded_bucket_has_its_row():
    fills = (Fill(1.0, ALL_TIED), Fill(1 / 64, ONE_FASTER))
    found = replace(TABLE.evidence, eager=(Bucket(64, 0, "least loss", fills),), max_tokens=64)
    lines = bucket_table(PolicyTable(found))
    assert ["64 (100% real)" in lines[1], "64 (1.56% real)" in lines[2]] == [True, True]


@pytest.mark.parametrize(
    ("num_tokens", "policy", "served"),
    [
        (24, 1, "measured at 24 tokens)"),
        (20, 1, "measured at 24 tokens, the next bucket up"),
        (99999, 2, "measured at 4096 tokens, the largest measured"),
    ],
)
def test_explain_names_policy_bucket_reason_and_evidence(num_tokens, policy, served):
    text = "\n".join(explain(TABLE, num_tokens, captured=False))
    assert f"{num_tokens} tokens, eager: policy {policy}" in text
    assert served in text
    assert f"policy {policy} saves" in text
    assert "margin 1.0%, confidence 99%" in text
    assert "2026-01-01" in text


def test_explain_says_why_a_policy_was_dropped():
    text = "\n".join(explain(TABLE, 4096, captured=False))
    assert "policy 1: hopeless: 9.0 times the fastest at the first look" in text


def test_explain_follows_the_graph_array_for_captured_calls():
    table = table_of((16, ALL_TIED), graph=((16, ONE_FASTER),))
    assert explain(table, 8, captured=True)[0].startswith("8 tokens, graph-captured: policy 1")
    assert explain(table, 8, captured=False)[0].startswith("8 tokens, eager: policy 0")
