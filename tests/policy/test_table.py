"""PolicyTable: one byte a token count, derived from evidence that survives JSON exactly."""

import copy
import dataclasses
import json
import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.decision import Result, Rule, Samples, Standing, Verdict, confirm, decide
from adaptive_moe.policy.evidence import SCHEMA, Bucket, Fill
from adaptive_moe.policy.losses import combine
from adaptive_moe.policy.plain import from_plain
from adaptive_moe.policy.situation import Situation
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.shape import SortingShape
from tests.tables import CANDIDATES, make_table

SHAPE = SortingShape(8, 2, 64, local_experts=4, num_local_tokens=True)


def coverage(**other: Any) -> Coverage:
    facts: dict[str, Any] = {"max_tokens": 32, "captured": (), "busy_from": 1, **other}
    return Coverage.up_to(SHAPE, **facts)


@pytest.fixture(scope="module")
def usual() -> PolicyTable:
    return make_table({1: 1, 4: 1, 8: 0, 32: 2}, graph={2: 2, 8: 1})


def test_each_token_count_has_one_byte_from_the_bucket_not_below_it(usual: PolicyTable) -> None:
    assert usual.eager[1:] == bytes([1] * 4 + [0] * 4 + [2] * 24)
    assert usual.graph[1:] == bytes([2] * 2 + [1] * 6)
    assert (len(usual.eager), len(usual.graph)) == (33, 9)


def test_counts_up_to_max_tokens_beyond_the_last_bucket_take_its_candidate() -> None:
    table = make_table({1: 1, 8: 2}, coverage=coverage(max_tokens=12))
    assert table.eager[1:] == bytes([1] + [2] * 11)


def test_where_nothing_is_captured_both_arrays_are_the_same() -> None:
    only_eager = make_table({1: 1, 8: 2})
    assert only_eager.graph is only_eager.eager


def test_a_byte_is_an_index_into_the_candidates_and_0_the_baseline() -> None:
    names = ("policy 2", "opus", "policy 0")
    table = make_table({1: 1, 4: 0, 8: 2}, candidates=names)
    assert table.eager[1:] == bytes([1, 0, 0, 0, 2, 2, 2, 2])
    assert [table.candidate(n) for n in (1, 4, 8)] == ["opus", "policy 2", "policy 0"]


def test_candidate_reads_the_array_that_the_call_s_capture_state_picks(usual: PolicyTable) -> None:
    for num_tokens in range(1, 33):
        assert usual.candidate(num_tokens) == CANDIDATES[usual.eager[num_tokens]]
    for num_tokens in range(1, 9):
        name = CANDIDATES[usual.graph[num_tokens]]
        assert usual.candidate(num_tokens, captured=True) == name


@pytest.mark.parametrize(("captured", "last"), [(False, 2), (True, 1)])
def test_counts_past_the_end_take_the_last_bucket_s_winner(
    usual: PolicyTable, captured: bool, last: int
) -> None:
    for num_tokens in (33, 1 << 20, 1 << 70):
        assert usual.candidate(num_tokens, captured=captured) == CANDIDATES[last]
    # The hot path has no such argument check: it catches IndexError and takes the last byte.
    array = usual.graph if captured else usual.eager
    with pytest.raises(IndexError):
        array[33]
    assert array[-1] == last


@pytest.mark.parametrize("odd", [0, -1, True, False, 1.0, "1", None])
def test_what_is_no_token_count_is_an_error_and_never_a_candidate(
    usual: PolicyTable, odd: Any
) -> None:
    with pytest.raises(ValueError, match=f"num_tokens={odd!r}.*integer >= 1"):
        usual.candidate(odd)


def test_bucket_is_the_evidence_of_a_situation(usual: PolicyTable) -> None:
    for captured, situation in ((False, Situation.BUSY), (True, Situation.GRAPH)):
        for num_tokens in range(1, 40):
            found = usual.bucket(num_tokens, situation)
            assert found is not None
            assert found.candidate == usual.candidate(num_tokens, captured=captured)
    assert usual.bucket(5, Situation.BUSY).num_tokens == 8  # type: ignore[union-attr]
    assert usual.bucket(33, Situation.GRAPH).num_tokens == 8  # type: ignore[union-attr]
    assert usual.bucket(5, Situation.IDLE) is None


# Eager calls below busy_from may meet a busy device or an idle one


def eager(busy: dict[int, int], idle: dict[int, int], **other: Any) -> list[int]:
    cover = coverage(**{"max_tokens": max(busy), **other})
    return list(make_table(busy, idle=idle, coverage=cover).eager[1:])


def test_from_busy_from_on_the_busy_verdict_decides_alone() -> None:
    assert eager({4: 1, 8: 2}, {}, busy_from=1) == [1] * 4 + [2] * 4
    # Below it, losers on the idle device (all but its winner lose 20%) are none.
    assert eager({4: 1, 8: 2}, {3: 0}, busy_from=4) == [0] * 3 + [1] + [2] * 4


def test_below_busy_from_what_wins_in_one_and_loses_in_the_other_is_not_taken() -> None:
    assert eager({8: 1, 16: 2}, {8: 2, 15: 2}, busy_from=16) == [0] * 8 + [2] * 8
    assert eager({8: 1, 16: 2}, {8: 1, 15: 1}, busy_from=16) == [1] * 8 + [0] * 7 + [2]


def test_of_as_few_tokens_as_graphs_hold_only_their_choice_is_taken_eagerly_too() -> None:
    both = make_table(
        {16: 1, 32: 1},
        idle={16: 1},
        graph={4: 1, 8: 0, 12: 2, 16: 1},
        coverage=coverage(captured=(4, 8, 12, 16), busy_from=17),
    )
    assert both.eager[1:] == bytes([1] * 4 + [0] * 8 + [1] * 4 + [1] * 16)


def test_the_largest_graph_s_choice_counts_also_where_it_holds_more_than_any_eager_call() -> None:
    for size in (32, 64):
        for index in (1, 2):
            cover = coverage(captured=(size,), busy_from=size + 1)
            table = make_table({32: 1}, idle={32: 1}, graph={size: index}, coverage=cover)
            assert table.eager[1:] == bytes([1 if index == 1 else 0] * 32)


def test_the_calibration_s_own_margin_says_what_loses() -> None:
    """On the idle device policy 1 ties, and most likely takes a fifth longer."""
    cover = coverage(max_tokens=8, busy_from=9)
    for margin, index in ((0.01, 0), (0.2, 1)):
        own = {"standing": Standing.TIED, "rule": Rule(margin=margin), "coverage": cover}
        assert make_table({8: 1}, idle={8: 0}, **own).eager[1:] == bytes([index] * 8)


def test_counts_below_busy_from_are_never_served_by_busy_verdicts_alone() -> None:
    """Though the busy bucket that serves them lies above it."""
    assert eager({4: 1, 64: 1}, {4: 1, 9: 0}, busy_from=10, max_tokens=64) == (
        [1] * 4 + [0] * 5 + [1] * 55
    )


def test_without_idle_buckets_nothing_below_busy_from_leaves_the_baseline() -> None:
    assert eager({4: 1, 64: 1}, {}, busy_from=10, max_tokens=64) == [0] * 9 + [1] * 55


NO_BUSY = "a calibration without busy buckets has no table: calibrate again"


def test_without_a_busy_bucket_there_is_no_table() -> None:
    with pytest.raises(ValueError, match=f"^{NO_BUSY}$"):
        make_table({}, idle={1: 1}, coverage=coverage())


def test_a_table_cannot_be_changed(usual: PolicyTable) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        usual.eager = b"\2"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        usual.evidence.busy[0].candidate = 2  # type: ignore[misc]
    assert type(usual.eager) is bytes
    assert type(usual.graph) is bytes


WRONG: dict[str, Any] = {
    "counts that fall": ({8: 1, 4: 1}, {}, "must rise"),
    "a count of 0": ({0: 1, 4: 1}, {}, "must rise from 1"),
    "a bucket past max_tokens": ({1: 1, 64: 1}, {}, "^max_tokens=32 is not from 64 to 1048576$"),
    "another schema": ({1: 1}, {"schema": SCHEMA + 1}, "calibrate again"),
    "another baseline": ({1: 1}, {"candidates": ("policy 1", "policy 0")}, "not the baseline"),
    "a name twice": ({1: 1}, {"candidates": ("policy 0", "policy 1", "policy 1")}, "different"),
    "a candidate not offered": ({1: 2}, {"candidates": ("policy 0", "policy 1")}, "not one of"),
    "too many": ({1: 0}, {"candidates": ("policy 0", *map(str, range(300)))}, "at most 256"),
}


@pytest.mark.parametrize("name", WRONG)
def test_evidence_that_is_not_whole_makes_no_table(name: str) -> None:
    busy, other, words = WRONG[name]
    buckets = tuple(
        make_table({max(n, 1): i}, coverage=coverage(max_tokens=max(n, 1))).evidence.busy[0]
        for n, i in busy.items()
    )
    buckets = tuple(
        dataclasses.replace(b, num_tokens=n) for b, n in zip(buckets, busy, strict=True)
    )
    found = dataclasses.replace(make_table({1: 0}, coverage=coverage()).evidence, busy=buckets)
    with pytest.raises(ValueError, match=words):
        PolicyTable(dataclasses.replace(found, **other))


def test_a_byte_holds_as_many_candidates_as_there_may_be() -> None:
    names = ("policy 0", *map(str, range(255)))
    assert make_table({1: 255}, candidates=names).candidate(1) == "254"


def test_graph_evidence_is_held_to_the_same() -> None:
    found = make_table({1: 1}, graph={4: 1, 8: 1}).evidence
    with pytest.raises(ValueError, match=r"^bucket token counts must rise from 1: \[8, 4\]$"):
        PolicyTable(dataclasses.replace(found, graph=found.graph[::-1]))
    with pytest.raises(ValueError, match=r"must rise from 1: \[4, 4\]$"):
        PolicyTable(dataclasses.replace(found, graph=found.graph[:1] * 2))


@pytest.mark.parametrize(
    ("standing", "sound"),
    [(s, s not in (Standing.WRONG, Standing.FAILED)) for s in Standing],
)
def test_a_table_with_something_wrong_or_failed_is_not_sound(
    standing: Standing, sound: bool
) -> None:
    for where in ("busy", "graph", "idle"):
        table = make_table({1: 1}, graph={1: 1}, idle={1: 1})
        (bucket,) = getattr(table.evidence, where)
        verdict = bucket.fills[0].verdict
        odd = dataclasses.replace(
            verdict, results=(*verdict.results[:2], Result("policy 2", standing))
        )
        odd_bucket = dataclasses.replace(bucket, fills=(bucket.fills[0], Fill(0.5, odd)))
        evidence = dataclasses.replace(table.evidence, **{where: (odd_bucket,)})
        assert PolicyTable(evidence).sound is sound


@settings(max_examples=50)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=40))
def test_runs_are_the_array_again(chosen: list[int]) -> None:
    found = make_table(dict(enumerate(chosen, 1))).runs()
    names = [CANDIDATES[index] for index in chosen]
    assert [name for first, last, name in found for _ in range(first, last + 1)] == names
    assert found[0][0] == 1
    assert all(a[1] + 1 == b[0] and a[2] != b[2] for a, b in pairwise(found))


# JSON


@st.composite
def tables(draw: st.DrawFn) -> PolicyTable:
    """Verdicts of any kind, as few or many rounds give them, with several fills."""
    seed = draw(st.integers(0, 1 << 30))
    rng = random.Random(seed)

    def verdict() -> Verdict:
        rounds = draw(st.integers(0, 9))
        samples = [Samples(p, tuple(rng.uniform(5, 15) for _ in range(rounds))) for p in CANDIDATES]
        if draw(st.booleans()):
            out = draw(st.sampled_from((Standing.HOPELESS, Standing.WRONG, Standing.FAILED)))
            samples[1] = dataclasses.replace(samples[1], out=out, reason="é \u2028 \"'\\")
        return decide(samples, Rule())

    def fill(fraction: float) -> Fill:
        return Fill(fraction, confirm(verdict(), draw(st.just(None)) or verdict(), Rule()))

    def buckets(counts: set[int]) -> tuple[Bucket, ...]:
        found = []
        for num_tokens in sorted(counts):
            parts = (fill(1.0), fill(0.125))
            found.append(Bucket(num_tokens, *combine([f.verdict for f in parts]), parts))
        return tuple(found)

    some = st.sets(st.integers(1, 32), min_size=1, max_size=3)
    maybe = st.just(set()) | some
    cover = coverage(busy_from=draw(st.sampled_from((1, 8, 64))))
    sections = {"busy": buckets(draw(some)), "graph": buckets(draw(maybe))}
    evidence = make_table({1: 0}, coverage=cover).evidence
    return PolicyTable(dataclasses.replace(evidence, **sections, idle=buckets(draw(maybe))))


@settings(max_examples=40)
@given(tables())
def test_json_gives_back_an_equal_table(original: PolicyTable) -> None:
    again = PolicyTable.from_json(original.to_json())
    assert again == original
    assert (again.eager, again.graph) == (original.eager, original.graph)


def test_the_json_shows_what_is_applied_in_runs(usual: PolicyTable) -> None:
    plain = json.loads(usual.to_json())
    assert plain["schema"] == SCHEMA
    assert plain["applied"]["eager"] == [
        [1, 4, "policy 1"],
        [5, 8, "policy 0"],
        [9, 32, "policy 2"],
    ]
    assert plain["applied"]["graph"] == [[1, 2, "policy 2"], [3, 8, "policy 1"]]


def test_the_json_is_indented_for_readers_by_one(usual: PolicyTable) -> None:
    assert usual.to_json().startswith(
        f'{{\n "schema": {SCHEMA},\n "coverage": {{\n  "shape": {{\n   "num_experts": '
    )


def test_arrays_come_from_the_evidence_whatever_the_file_says_is_applied(
    usual: PolicyTable,
) -> None:
    plain = json.loads(usual.to_json())
    plain["applied"] = {"eager": [[1, 32, 2]], "graph": []}
    assert PolicyTable.from_json(json.dumps(plain)) == usual


def test_another_schema_is_refused(usual: PolicyTable) -> None:
    text = usual.to_json().replace(f'"schema": {SCHEMA}', f'"schema": {SCHEMA + 1}')
    with pytest.raises(ValueError, match="calibrate again"):
        PolicyTable.from_json(text)


def test_a_field_of_the_wrong_type_is_refused_by_its_place(usual: PolicyTable) -> None:
    plain = json.loads(usual.to_json())
    plain["busy"][1]["num_tokens"] = "1"
    with pytest.raises(ValueError, match=r"calibration\.busy\[1\]\.num_tokens: '1' is not a int"):
        PolicyTable.from_json(json.dumps(plain))
    plain["busy"][1]["num_tokens"] = True
    with pytest.raises(ValueError, match=r"busy\[1\]\.num_tokens: 'True'"):
        PolicyTable.from_json(json.dumps(plain))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300, None, "1", True])
def test_seconds_are_a_finite_number_of_a_size_that_can_be(
    usual: PolicyTable, value: object
) -> None:
    plain = json.loads(usual.to_json())
    plain["seconds"] = value
    with pytest.raises(ValueError, match=r"^calibration\.seconds: .* is not a float$"):
        PolicyTable.from_json(json.dumps(plain))


@pytest.mark.parametrize("value", [1, 0, "true", None])
def test_only_true_and_false_are_truth_values(usual: PolicyTable, value: object) -> None:
    plain = json.loads(usual.to_json())
    plain["coverage"]["shape"]["accumulate"] = value
    with pytest.raises(ValueError, match=r"shape\.accumulate"):
        PolicyTable.from_json(json.dumps(plain))


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "1", '"x"', "{}", "[" * 100_000, '{"a":' * 5_000, "\0", "NaN"],
)
def test_what_is_no_calibration_at_all_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        PolicyTable.from_json(text)


def test_what_is_nested_too_deeply_says_so() -> None:
    with pytest.raises(ValueError, match=r"^the JSON is nested too deeply$"):
        PolicyTable.from_json("[" * 100_000)


def places(plain: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside, the containers' own included."""
    found = [path] if path else []
    items: Any = ()
    if isinstance(plain, dict):
        items = plain.items()
    elif isinstance(plain, list):
        items = enumerate(plain)
    return found + [p for key, value in items for p in places(value, (*path, key))]


odd_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from((1 << 53, 1 << 80, 1e308, -0.0, float("nan"), float("inf"), 0.5)),
    st.text(max_size=5),
    st.just([]),
    st.just({}),
)

ORIGINAL = make_table({1: 1, 8: 0, 32: 2}, graph={2: 2, 8: 1})
PLACES = places(json.loads(ORIGINAL.to_json()))


def offers_only(found: PolicyTable) -> bool:
    return max(found.eager[1:] + found.graph[1:]) < len(found.evidence.candidates)


@settings(max_examples=400)
@given(st.sampled_from(PLACES), odd_values, st.sampled_from(("set", "delete", "repeat", "rename")))
def test_a_changed_value_is_refused_or_makes_a_table_of_offered_candidates_only(
    place: tuple[Any, ...], value: Any, change: str
) -> None:
    plain = json.loads(ORIGINAL.to_json())
    inside = plain
    for key in place[:-1]:
        inside = inside[key]
    if change == "delete":
        del inside[place[-1]]
    elif change == "repeat" and isinstance(inside, list):
        inside.append(copy.deepcopy(inside[0]))
    elif change == "rename" and isinstance(inside, dict):
        inside["unknown"] = inside.pop(place[-1])
    else:
        inside[place[-1]] = value
    try:
        found = PolicyTable.from_json(json.dumps(plain))
    except ValueError:
        return
    assert offers_only(found)
    assert PolicyTable.from_json(found.to_json()) == found


@settings(max_examples=300)
@given(st.data())
def test_a_torn_or_scribbled_file_is_refused_or_makes_a_table_of_offered_candidates_only(
    data: st.DataObject,
) -> None:
    text = ORIGINAL.to_json()
    at = data.draw(st.integers(0, len(text) - 1))
    length = data.draw(st.sampled_from((0, 1, 5, len(text))))
    text = text[:at] + data.draw(st.text('019-.,:"{}[]eEtrunal', max_size=4)) + text[at + length :]
    try:
        found = PolicyTable.from_json(text)
    except ValueError:
        return
    assert offers_only(found)


def test_dropping_a_field_or_adding_one_anywhere_is_refused() -> None:
    for place in PLACES:
        if place[0] == "applied" or not isinstance(place[-1], str):
            continue
        plain = json.loads(ORIGINAL.to_json())
        inside = plain
        for key in place[:-1]:
            inside = inside[key]
        if len(place) == 2 and place[0] in ("busy", "graph", "idle"):
            continue
        dropped = inside.pop(place[-1])
        with pytest.raises(ValueError, match="missing or unknown"):
            PolicyTable.from_json(json.dumps(plain))
        inside[place[-1]], inside["more"] = dropped, 1
        with pytest.raises(ValueError, match="missing or unknown"):
            PolicyTable.from_json(json.dumps(plain))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, 1 << 54),
        (int, -(1 << 54)),
        (int, 1.0),
        (int, True),
        (float, 1e300),
        (float, float("nan")),
        (float, "1.0"),
        (float, True),
        (bool, 1),
        (str, "x" * 5000),
        (str, None),
        (tuple[int, ...], [0] * 5000),
        (tuple[int, ...], (1,)),
    ],
)
def test_a_value_out_of_its_types_bounds_is_refused_with_its_place(
    kind: Any, value: object
) -> None:
    with pytest.raises(ValueError, match=r"^here"):
        from_plain(kind, value, "here")
