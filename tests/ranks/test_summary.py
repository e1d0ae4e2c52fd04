"""What one rank tells the others of one coverage: it fits, it is read as written, or refused."""

from dataclasses import replace

import numpy as np
import pytest

from adaptive_moe.policy.decision import Standing
from adaptive_moe.ranks.summary import decode, encode, max_rows, summarize
from tests.faults.made_up import PADDED
from tests.ranks.test_merging import plain_of, small

SUMMARY = summarize(small(1).evidence)
GOOD = encode(SUMMARY)


@pytest.mark.parametrize(("candidates", "rows"), [(1, 300), (3, 127), (8, 52), (73, 6)])
def test_as_many_rows_are_sent_as_there_is_room_for(candidates, rows):
    """A row has 16 bytes, and 34 for each candidate; 20 KiB of 64 KiB are for the header."""
    assert max_rows(candidates) == rows
    each = 16 + 34 * candidates
    assert 3 * rows * each <= 44 * 1024 < 3 * (rows + 1) * each
    names = [f"c{n}" for n in range(candidates)]
    counts = range(1, rows + 1)
    table = small(
        1,
        gains=(0.0,) * candidates,
        names=names,
        eager=counts,
        max_tokens=rows,
        rounds=0,
    )
    part = encode(summarize(table.evidence))
    assert len(part.partition(b"\n")[2]) == rows * each
    assert decode(part).sections[1].tokens.tolist() == list(counts)


def test_of_too_many_rows_some_are_sent_evenly_spaced_and_with_both_ends():
    """127 rows fit: all fills of 42 counts, 300 / 41 counts apart."""
    table = small(1, shape=PADDED, eager=range(1, 302), max_tokens=301, rounds=0)
    section = summarize(table.evidence).sections[1]
    assert section.fraction.tolist() == [0.125, 0.5, 1.0] * 42
    counts = section.tokens[::3].tolist()
    assert section.tokens.tolist() == sorted(3 * counts)
    assert (counts[:4], counts[-2:]) == ([1, 8, 16, 23], [294, 301])
    assert set(np.diff(counts).tolist()) == {7, 8}


def test_as_many_rows_as_fit_are_all_sent():
    table = small(1, eager=range(1, 128), max_tokens=127, rounds=0)
    assert len(summarize(table.evidence).sections[1].tokens) == 127


def test_a_bucket_of_other_candidates_is_no_tables():
    table = small(1)
    found = replace(table.evidence, candidates=("policy 0", "policy 1"))
    with pytest.raises(ValueError, match=r"^the bucket at 1 tokens has other candidates$"):
        summarize(found)


def test_reasons_are_sent_once_each_and_cut_and_not_more_than_there_is_room_for():
    """128 texts of 120 characters, the empty one among them; a reason beyond these is lost."""
    table = small(1, eager=range(1, 68), max_tokens=67, rounds=0)

    def failing(bucket):
        (fill,) = bucket.fills
        first, *others = fill.verdict.results
        results = [
            replace(one, standing=Standing.FAILED, reason=f"{one.candidate}, {name:02}" + "!" * 200)
            for one in others
            for name in [bucket.num_tokens % 66]
        ]
        verdict = replace(fill.verdict, results=(first, *results))
        return replace(bucket, fills=(replace(fill, verdict=verdict),))

    found = summarize(replace(table.evidence, busy=tuple(map(failing, table.evidence.busy))))
    reasons = [f"policy {p}, {n:02}" + "!" * 108 for n in range(1, 65) for p in (1, 2)]
    assert found.texts == ("", *reasons[:127])
    of = dict(enumerate(found.sections[1].reason.tolist(), 1))
    assert (of[1], of[2], of[63], of[64]) == ([0, 1, 2], [0, 3, 4], [0, 125, 126], [0, 127, 0])
    assert (of[65], of[66], of[67]) == ([0, 0, 0], [0, 0, 0], [0, 1, 2])
    assert decode(encode(found)).texts == found.texts


def test_who_measured_nothing_says_so():
    table = small(1)
    nothing = summarize(replace(table.evidence, busy=()))
    assert [len(section.tokens) for section in nothing.sections] == [0, 0, 0]
    assert plain_of(decode(encode(nothing))) == plain_of(nothing)


def changed(old, new):
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


COUNTS, KINDS = b'"sections": [0, 3, 0]', "not a summary: its %s are of another kind"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"[" * 100_000, "the JSON is nested too deeply"),
        (b"{}\n", "not a summary: KeyError 'sections'"),
        (b"7\n", "not a summary: AttributeError 'int' object has no attribute 'pop'"),
        (changed(b'"candidates": ["policy 0", ', b'"candidates": [0, '), KINDS % "texts"),
        (changed(b'"texts": [""]', b'"texts": []'), KINDS % "texts"),
        (changed(b'"texts": [""]', b'"texts": [7]'), KINDS % "texts"),
        (changed(b'"created": "2026-01-01T00:00:00+00:00"', b'"created": 7'), KINDS % "texts"),
        (changed(b'"seconds": 1.0', b'"seconds": -0.1'), KINDS % "seconds"),
        (changed(b'"budget_s": 0.75', b'"budget_s": Infinity'), KINDS % "seconds"),
        (changed(COUNTS, b'"sections": [0, 3]'), "not a summary: 2 situations, 3 candidates"),
        (
            changed(b'["policy 0", "policy 1", "policy 2"]', b"[]"),
            "not a summary: 3 situations, 0 candidates",
        ),
        (changed(COUNTS, b'"sections": [0, -3, 0]'), "not a summary: an array of shape (-3,)"),
        (changed(COUNTS, b'"sections": [0, 355, 0]'), "not a summary: an array of shape (355,)"),
        (changed(COUNTS, b'"sections": [0, 30, 0]'), "not a summary: an array of shape (4, 30, 3)"),
        (GOOD + b"x", "not a summary: 355 bytes of arrays, 354 expected"),
        (GOOD[:-1] + b"\x01", "not a summary: token counts, times or standings out of bounds"),
    ],
)
def test_what_is_wrong_with_a_summary_is_told(content, why):
    with pytest.raises(ValueError, match=r".") as raised:
        decode(content)
    assert str(raised.value) == why
