"""What ranks write to each other: what is refused, and in which words."""

import json
import zlib
from dataclasses import replace

import pytest

from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.ranks.messages import (
    FORMAT,
    Decision,
    decide,
    encode_decision,
    encode_message,
    read_decision,
)
from adaptive_moe.ranks.summary import canonical
from tests.faults.made_up import PADDED, SHAPE
from tests.ranks.test_merging import small

TABLE = small(1)
COVERAGE, NAME = TABLE.evidence.coverage, canonical(TABLE.evidence.coverage)
OTHER = small(2, shape=replace(SHAPE, topk=4))
ANOTHER_FORMAT = "sent a message of another format: ranks run different versions"
UNREADABLE = "sent a message that cannot be read"
ANOTHER_DECISION = "not a decision of this format: ranks run different versions"
OTHER_FIELDS = "not a decision: other fields than expected"


def message(header, rest=b""):
    return json.dumps(header).encode() + b"\n" + rest


def header(sizes, failed=None, form=FORMAT):
    return {"format": form, "sizes": sizes, "failed": {} if failed is None else failed}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "did not take part in time"),
        (message([]), ANOTHER_FORMAT),
        (message({"sizes": {}, "failed": {}}), ANOTHER_FORMAT),
        (message(header({}, form=1)), ANOTHER_FORMAT),
        (b"[" * 100_000, "the JSON is nested too deeply"),
        (message({"format": FORMAT, "sizes": {}}), UNREADABLE),
        (message(header({}, [])), UNREADABLE),
        (message(header({}, {"one": 1})), UNREADABLE),
        (message(header([])), UNREADABLE),
        (message(header({str(n): 1 for n in range(257)})), UNREADABLE),
        (message(header({"one": 0})), "sent a summary of 0 bytes, 65536 are accepted"),
        (message(header({"one": -1})), "sent a summary of -1 bytes, 65536 are accepted"),
        (message(header({"one": "1"})), "sent a summary of '1' bytes, 65536 are accepted"),
        (message(header({"one": 1.5})), "sent a summary of 1.5 bytes, 65536 are accepted"),
        (message(header({"one": 65537})), "sent a summary of 65537 bytes, 65536 are accepted"),
        (message(header({"one": 65536}), b"{"), "sent a message that was cut"),
        (message(header({"one": 1, "two": 1}), b"{"), "sent a message that was cut"),
        (message(header({"one": 1}), b"{}"), "sent a message that was cut"),
        # Of the sizes that are accepted, the least and the largest; as summaries they are none.
        (message(header({"one": 1}), b"7"), "not a summary: AttributeError 'int' object has no"),
        (message(header({"one": 65536}), b"{}" + b"\n" * 65534), "not a summary: KeyError 'sect"),
        (message(header({str(n): 2 for n in range(256)}), b"{}" * 256), "not a summary: KeyError"),
    ],
)
def test_why_a_rank_counts_as_missing(content, why):
    good = encode_message({COVERAGE: TABLE}, {})
    found = decide({0: good, 1: content, 2: good})
    assert (found.tables, found.voided, set(found.missing)) == ({}, {}, {"1"})
    assert found.missing["1"].startswith(why)
    assert found.missing["1"] == why or why.startswith("not a summary")


def test_every_rank_that_cannot_be_read_is_told():
    found = decide({2: None, 0: b"{}", 1: encode_message({}, {})})
    assert found.missing == {"0": ANOTHER_FORMAT, "2": "did not take part in time"}


@pytest.mark.parametrize("bad", [TABLE, OTHER])
def test_of_two_coverages_that_differ_in_one_the_other_has_its_table(bad):
    tables = {one.evidence.coverage: one for one in (TABLE, OTHER)}
    coverage = bad.evidence.coverage
    other = replace(bad, evidence=replace(bad.evidence, kernel="aiter 0.1.8 opus"))
    messages = {0: encode_message(tables, {}), 1: encode_message({coverage: other}, {})}
    found = decide(messages)
    assert found.voided == {
        canonical(coverage): "ranks differ in kernel "
        "('aiter 0.1.9 opus', elsewhere 'aiter 0.1.8 opus')"
    }
    assert set(found.tables) == {canonical(one) for one in tables if one != coverage}


def test_of_several_ranks_that_could_not_calibrate_the_first_is_told():
    failed = [encode_message({}, {COVERAGE: why}) for why in ("x" * 201, "another reason")]
    found = decide({0: encode_message({COVERAGE: TABLE}, {}), 2: failed[1], 1: failed[0]})
    assert found == Decision(
        voided={NAME: f"rank 1 could not calibrate it: {'x' * 200}"}, tables={}, missing={}
    )


def test_a_table_with_far_too_many_candidates_is_not_exchanged():
    """With 73 there is room for two rows of three fills in each situation, which are both ends."""

    def with_candidates(count):
        names = ["policy 0", *(f"c{n}" for n in range(1, count))]
        return small(1, shape=PADDED, gains=(0.0,) * count, names=names, rounds=0)

    some, many = with_candidates(73), with_candidates(74)
    coverage = some.evidence.coverage
    found = decide({0: encode_message({coverage: some}, {})}).tables[canonical(coverage)]
    kept = PolicyTable.from_json(found).evidence.busy
    assert [(bucket.num_tokens, len(bucket.fills)) for bucket in kept] == [(1, 3), (64, 3)]
    found = decide({0: encode_message({coverage: many, COVERAGE: TABLE}, {})})
    why = "its table cannot be exchanged: too many candidates to exchange"
    assert found.voided == {canonical(coverage): f"rank 0 could not calibrate it: {why}"}
    assert set(found.tables) == {NAME}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"no", "not a decision: Error -3 while decompressing data: "),
        (zlib.compress(b"[" * 100_000), "the JSON is nested too deeply"),
        (zlib.compress(b"[]"), ANOTHER_DECISION),
        (zlib.compress(b"{}"), ANOTHER_DECISION),
        (zlib.compress(b'{"format": 1, "tables": {}, "voided": {}}'), ANOTHER_DECISION),
        (zlib.compress(b'{"format": 2, "tables": {}, "voided": {}}'), OTHER_FIELDS),
        (zlib.compress(b'{"format": 2, "tables": {}, "voided": {}, "missing": []}'), OTHER_FIELDS),
        (
            zlib.compress(b'{"format": 2, "tables": {}, "voided": {}, "missing": {"1": 7}}'),
            OTHER_FIELDS,
        ),
    ],
)
def test_what_is_no_decision_is_refused(content, why):
    with pytest.raises(ValueError, match=r".") as raised:
        read_decision(content)
    assert str(raised.value).startswith(why)


def test_a_decision_is_read_as_it_was_written():
    assert FORMAT == 2
    found = Decision({"a": "table"}, {"b": "why"}, {"3": "did not take part in time"})
    assert read_decision(encode_decision(found)) == found
    assert read_decision(encode_decision(Decision())) == Decision({}, {}, {})
