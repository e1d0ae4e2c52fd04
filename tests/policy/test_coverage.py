"""Coverage and TokenCounts: which token counts occur, in which situation."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive_moe.policy.coverage import BUSY_FROM, MAX_TOKENS, Coverage, Situation, TokenCounts
from adaptive_moe.shape import SortingShape

SHAPE = SortingShape(8, 2, 64)


@st.composite
def spans(draw: st.DrawFn) -> list[tuple[int, int]]:
    edges = sorted(draw(st.sets(st.integers(1, 200), min_size=2, max_size=12)))
    return list(zip(edges[::2], edges[1::2], strict=False))


@given(spans())
def test_counts_are_the_sequence_their_spans_say(some: list[tuple[int, int]]) -> None:
    whole = [n for first, last in some for n in range(first, last + 1)]
    counts = TokenCounts(some)
    assert (list(counts), len(counts)) == (whole, len(whole))
    assert [counts[i] for i in range(-len(whole), len(whole))] == whole + whole
    assert counts[1:-1] == whole[1:-1]
    assert {n for n in range(202) if n in counts} == set(whole)
    for outside in (len(whole), -len(whole) - 1):
        with pytest.raises(IndexError, match=f"^{outside}$"):
            counts[outside]


def test_counts_are_shown_as_spans() -> None:
    assert repr(TokenCounts([(1, 1), (3, 9)])) == "TokenCounts(1, 3-9)"


def test_up_to_is_every_eager_count_and_each_captured_one_once() -> None:
    plain = Coverage(SHAPE, "policy 0", ((1, 64),), (2, 8), busy_from=9)
    assert Coverage.up_to(SHAPE, 64, (8, 2, 8)) == plain
    assert (plain.padding_rows, plain.extras) == (False, "")
    padded = Coverage(SHAPE, "opus", ((1, 64),), (), True, 3)
    assert Coverage.up_to(SHAPE, 64, baseline="opus", busy_from=3, padding_rows=True) == padded


def test_the_device_is_busy_above_the_largest_captured_size_or_where_it_is_said() -> None:
    assert Coverage.up_to(SHAPE, 64, (8, 2)).busy_from == 9
    assert Coverage.up_to(SHAPE, 64).busy_from == BUSY_FROM
    assert Coverage.up_to(SHAPE, 64, (8,), busy_from=1).busy_from == 1


def test_each_situation_has_the_counts_that_occur_in_it() -> None:
    coverage = Coverage(SHAPE, "policy 0", ((1, 3), (8, 9)), (4, 16))
    assert list(coverage.counts(Situation.EAGER)) == [1, 2, 3, 8, 9]
    assert list(coverage.counts(Situation.GRAPH)) == [4, 16]


def test_on_a_cpu_one_measured_time_decides() -> None:
    coverage = Coverage.up_to(SHAPE, 64, (8,)).on("cpu")
    assert not coverage.counts(Situation.GRAPH)
    assert coverage.busy_from == 1
    assert Coverage.up_to(SHAPE, 64, (8,)).on("cuda") == Coverage.up_to(SHAPE, 64, (8,))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"eager": ()}, r"^eager=\(\) is not accepted: give spans of token counts$"),
        ({"eager": ((0, 4),)}, r"eager: \(0, 4\)"),
        ({"eager": ((1, 4), (4, 8))}, r"eager: \(4, 8\)"),
        ({"eager": ((1, True),)}, "eager: "),
        (
            {"eager": ((1, MAX_TOKENS + 1),)},
            r"^eager: \(1, 1048577\) is not accepted: give rising token counts from 1 to 1048576$",
        ),
        ({"captured": (4, 2)}, r"captured: \(2, 2\)"),
        ({"busy_from": 0}, "busy_from=0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Coverage(**{"shape": SHAPE, "baseline": "policy 0", "eager": ((1, 64),), **fields})


def test_the_most_tokens_there_can_be_are_covered() -> None:
    assert Coverage.up_to(SHAPE, MAX_TOKENS).max_tokens == MAX_TOKENS


def test_a_coverage_is_described_by_its_shape_and_its_extras() -> None:
    coverage = Coverage.up_to(SHAPE, 64)
    assert coverage.describe() == SHAPE.describe()
    named = Coverage(SHAPE, "policy 0", ((1, 64),), extras="flat=True")
    assert named.describe() == f"{SHAPE.describe()}, flat=True"
