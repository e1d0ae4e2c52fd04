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

from adaptive_moe.policy.decision import Candidate, Rule, Standing, combine, decide
from adaptive_moe.policy.environment import Environment
from adaptive_moe.policy.plain import from_plain
from adaptive_moe.policy.table import (
    SCHEMA,
    Bucket,
    Calibration,
    Fill,
    PolicyTable,
    runs,
)
from adaptive_moe.shape import SortingShape

POLICIES = (0, 1, 2)


def bucket(num_tokens: int, policy: int) -> Bucket:
    """A bucket whose samples say that `policy` takes 7 us and the others 10."""
    candidates = [Candidate(p, ((7.0 if p == policy else 10.0),) * 8) for p in POLICIES]
    verdict = decide(candidates, Rule())
    return Bucket(num_tokens, *combine([verdict]), (Fill(1.0, verdict),))


def calibration(**other: Any) -> Calibration:
    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "shape": SortingShape(8, 2, 64, local_experts=4, num_local_tokens=True),
        "kernel": "made up",
        "policies": POLICIES,
        "environment": Environment("a device", "an arch", 3, "", "2.0", "3.10"),
        "rule": Rule(),
        "max_tokens": 32,
        "created": "2026-01-01T00:00:00+00:00",
        "seconds": 0.25,
    }
    return Calibration(**{**facts, **other})


def table(eager: dict[int, int], graph: dict[int, int] | None = None, **other: Any) -> PolicyTable:
    """A table whose evidence says, for each token count, which policy won."""
    return PolicyTable(
        calibration(
            eager=tuple(bucket(n, p) for n, p in eager.items()),
            graph=tuple(bucket(n, p) for n, p in (graph or {}).items()),
            **other,
        )
    )


@pytest.fixture(scope="module")
def usual() -> PolicyTable:
    return table({1: 1, 4: 1, 8: 0, 32: 2}, graph={2: 2, 8: 1})


def test_each_token_count_has_one_byte_from_the_bucket_not_below_it(usual: PolicyTable) -> None:
    assert usual.eager[1:] == bytes([1] * 4 + [0] * 4 + [2] * 24)
    assert usual.graph[1:] == bytes([2] * 2 + [1] * 6)
    assert (len(usual.eager), len(usual.graph)) == (33, 9)


def test_counts_up_to_max_tokens_beyond_the_last_bucket_take_its_policy() -> None:
    assert table({1: 1, 8: 2}, max_tokens=12).eager[1:] == bytes([1] + [2] * 11)


def test_where_nothing_is_captured_both_arrays_are_the_same() -> None:
    only_eager = table({1: 1, 8: 2})
    assert only_eager.graph is only_eager.eager


def test_policy_reads_the_array_that_the_call_s_capture_state_picks(usual: PolicyTable) -> None:
    for num_tokens in range(1, 33):
        assert usual.policy(num_tokens) == usual.eager[num_tokens]
    for num_tokens in range(1, 9):
        assert usual.policy(num_tokens, captured=True) == usual.graph[num_tokens]


@pytest.mark.parametrize(("captured", "last"), [(False, 2), (True, 1)])
def test_counts_past_the_end_take_the_last_bucket_s_winner(
    usual: PolicyTable, captured: bool, last: int
) -> None:
    for num_tokens in (33, 1 << 20, 1 << 70):
        assert usual.policy(num_tokens, captured=captured) == last
    # The hot path has no such argument check: it catches IndexError and takes the last byte.
    array = usual.graph if captured else usual.eager
    with pytest.raises(IndexError):
        array[33]
    assert array[-1] == last


@pytest.mark.parametrize("odd", [0, -1, True, False, 1.0, "1", None])
def test_what_is_no_token_count_is_an_error_and_never_a_policy(
    usual: PolicyTable, odd: Any
) -> None:
    with pytest.raises(ValueError, match=f"num_tokens={odd!r}.*integer >= 1"):
        usual.policy(odd)


def test_bucket_is_the_evidence_behind_policy(usual: PolicyTable) -> None:
    for captured in (False, True):
        for num_tokens in range(1, 40):
            found = usual.bucket(num_tokens, captured=captured)
            assert found.policy == usual.policy(num_tokens, captured=captured)
    assert usual.bucket(5).num_tokens == 8
    assert usual.bucket(5, captured=True).num_tokens == 8
    assert usual.bucket(33, captured=True).num_tokens == 8


def test_a_table_cannot_be_changed(usual: PolicyTable) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        usual.eager = b"\2"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        usual.evidence.eager[0].policy = 2  # type: ignore[misc]
    assert type(usual.eager) is bytes
    assert type(usual.graph) is bytes


WRONG = {
    "no bucket": ({}, {}, "without buckets"),
    "counts that fall": ({8: 1, 4: 1}, {}, "must rise"),
    "a count of 0": ({0: 1, 4: 1}, {}, "must rise from 1"),
    "a bucket past max_tokens": ({1: 1, 64: 1}, {}, "max_tokens=32"),
    "too many tokens": ({1: 1}, {"max_tokens": 1 << 40}, "max_tokens="),
    "a policy that was not offered": ({1: 1, 4: 2}, {"policies": (0, 1)}, "not one of those"),
    "another schema": ({1: 1}, {"schema": SCHEMA + 1}, "calibrate again"),
}


@pytest.mark.parametrize("name", WRONG)
def test_evidence_that_is_not_whole_makes_no_table(name: str) -> None:
    eager, other, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        table(eager, **other)


def test_graph_evidence_is_held_to_the_same() -> None:
    with pytest.raises(ValueError, match="must rise"):
        table({1: 1}, graph={8: 1, 4: 1})


def test_a_policy_that_fits_no_byte_is_refused() -> None:
    odd = dataclasses.replace(bucket(1, 1), policy=300)
    with pytest.raises(ValueError, match="300"):
        PolicyTable(calibration(policies=(0, 300), eager=(odd,)))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=40))
def test_runs_are_the_array_again(policies: list[int]) -> None:
    found = runs(bytes([0, *policies]))
    assert [p for first, last, p in found for _ in range(first, last + 1)] == policies
    assert found[0][0] == 1
    assert all(a[1] + 1 == b[0] and a[2] != b[2] for a, b in pairwise(found))


# JSON


@st.composite
def tables(draw: st.DrawFn) -> PolicyTable:
    """Verdicts of any kind, as few or many rounds give them, with several fills."""
    seed = draw(st.integers(0, 1 << 30))
    rng = random.Random(seed)

    def fill(fraction: float) -> Fill:
        rounds = draw(st.integers(0, 9))
        candidates = [
            Candidate(p, tuple(rng.uniform(5, 15) for _ in range(rounds))) for p in POLICIES
        ]
        if draw(st.booleans()):
            out = draw(st.sampled_from((Standing.HOPELESS, Standing.WRONG, Standing.FAILED)))
            candidates[1] = dataclasses.replace(candidates[1], out=out, reason="é \u2028 \"'\\")
        return Fill(fraction, decide(candidates, Rule()))

    def buckets(counts: set[int]) -> tuple[Bucket, ...]:
        found = []
        for num_tokens in sorted(counts):
            parts = (fill(1.0), fill(0.125))
            found.append(Bucket(num_tokens, *combine([f.verdict for f in parts]), parts))
        return tuple(found)

    some = st.sets(st.integers(1, 32), min_size=1, max_size=3)
    eager, graph = buckets(draw(some)), buckets(draw(st.just(set()) | some))
    return PolicyTable(calibration(eager=eager, graph=graph))


@settings(max_examples=40, deadline=None)
@given(tables())
def test_json_gives_back_an_equal_table(original: PolicyTable) -> None:
    again = PolicyTable.from_json(original.to_json())
    assert again == original
    assert (again.eager, again.graph) == (original.eager, original.graph)


def test_the_json_shows_what_is_applied_in_runs(usual: PolicyTable) -> None:
    plain = json.loads(usual.to_json())
    assert plain["schema"] == SCHEMA
    assert plain["applied"]["eager"] == [[1, 4, 1], [5, 8, 0], [9, 32, 2]]
    assert plain["applied"]["graph"] == [[1, 2, 2], [3, 8, 1]]


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
    plain["eager"][1]["policy"] = "1"
    with pytest.raises(ValueError, match=r"calibration\.eager\[1\]\.policy: '1' is not a int"):
        PolicyTable.from_json(json.dumps(plain))
    plain["eager"][1]["policy"] = True
    with pytest.raises(ValueError, match=r"eager\[1\]\.policy: 'True'"):
        PolicyTable.from_json(json.dumps(plain))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300, None, "1", True])
def test_seconds_are_a_finite_number_of_a_size_that_can_be(
    usual: PolicyTable, value: object
) -> None:
    plain = json.loads(usual.to_json())
    plain["seconds"] = value
    with pytest.raises(ValueError, match=r"seconds|not a number"):
        PolicyTable.from_json(json.dumps(plain))


@pytest.mark.parametrize("value", [1, 0, "true", None])
def test_only_true_and_false_are_truth_values(usual: PolicyTable, value: object) -> None:
    plain = json.loads(usual.to_json())
    plain["shape"]["accumulate"] = value
    with pytest.raises(ValueError, match=r"shape\.accumulate"):
        PolicyTable.from_json(json.dumps(plain))


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "1", '"x"', "{}", "[" * 100_000, '{"a":' * 5_000, "\0", "NaN"],
)
def test_what_is_no_calibration_at_all_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        PolicyTable.from_json(text)


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

ORIGINAL = table({1: 1, 8: 0, 32: 2}, graph={2: 2, 8: 1})
PLACES = places(json.loads(ORIGINAL.to_json()))


def offers_only(found: PolicyTable) -> bool:
    return set(found.eager[1:] + found.graph[1:]) <= set(found.evidence.policies)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(PLACES), odd_values, st.sampled_from(("set", "delete", "repeat", "rename")))
def test_a_changed_value_is_refused_or_makes_a_table_of_offered_policies_only(
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


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_torn_or_scribbled_file_is_refused_or_makes_a_table_of_offered_policies_only(
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
        if len(place) == 2 and place[0] in ("eager", "graph"):
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
