"""plain.py: whatever does not fit its type is refused, at the place that it names."""

import enum
from dataclasses import dataclass

import pytest

from adaptive_moe.store.plain import (
    MAX_INT,
    MAX_ITEMS,
    MAX_TEXT,
    from_plain,
    to_plain,
)


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


@dataclass(frozen=True)
class Inner:
    number: float


@dataclass(frozen=True)
class Outer:
    name: str
    count: int
    flag: bool
    colour: Colour
    inner: Inner
    perhaps: float | None
    spans: tuple[tuple[int, int], ...]


GOOD = Outer("x", 1, True, Colour.RED, Inner(0.5), None, ((1, 2), (3, 4)))


def test_what_is_written_is_read():
    assert from_plain(Outer, to_plain(GOOD)) == GOOD


def test_an_integer_is_a_float_and_infinity_is_none():
    assert from_plain(Inner, {"number": 2}) == Inner(2.0)
    assert to_plain(Inner(float("inf"))) == {"number": None}


def test_the_largest_values_that_fit_are_read():
    most = {**to_plain(GOOD), "name": "x" * MAX_TEXT, "count": -MAX_INT}
    most |= {"inner": {"number": MAX_INT}, "spans": [[1, 2]] * MAX_ITEMS}
    assert to_plain(from_plain(Outer, most))["count"] == -MAX_INT


@pytest.mark.parametrize(
    ("field", "value", "where"),
    [
        ("name", 7, "here.name: '7' is not a str$"),
        ("name", "x" * (MAX_TEXT + 1), f"here.name: '{'x' * 60}' is not a str$"),
        ("count", True, "here.count: 'True' is not a int$"),
        ("count", 1.0, "here.count"),
        ("count", MAX_INT + 1, "here.count"),
        ("flag", 1, "here.flag: '1' is not a bool$"),
        ("colour", "blue", "here.colour: 'blue' is not one of red, green$"),
        ("colour", ["red"], "here.colour"),
        ("inner", {"number": "1"}, "here.inner.number: '1' is not a float$"),
        ("inner", {"number": True}, "here.inner.number"),
        ("inner", {"number": 1e300}, "here.inner.number"),
        ("inner", {"number": float("nan")}, "here.inner.number"),
        ("inner", {"number": 1.0, "more": 1}, r"here.inner: fields \['more'\]"),
        (
            "inner",
            dict.fromkeys("edcba"),
            r"here.inner: fields \['a', 'b', 'c', 'd'\] are missing or unknown$",
        ),
        ("inner", {}, "here.inner: fields"),
        ("inner", [1.0], r"here.inner: '\[1.0\]' is not an object \(Inner\)$"),
        ("perhaps", "none", "here.perhaps"),
        ("spans", {}, f"here.spans: '{{}}' is not a list of at most {MAX_ITEMS}$"),
        ("spans", [[1, 2], [3]], r"here.spans\[1\]: '\[3\]' is not a list of 2$"),
        ("spans", [[1, 2, 3]], r"here.spans\[0\]"),
        ("spans", [[1, "2"]], r"here.spans\[0\]\[1\]"),
        ("spans", [[1, 2]] * (MAX_ITEMS + 1), "here.spans"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(field, value, where):
    plain = {**to_plain(GOOD), field: value}
    with pytest.raises(ValueError, match=where):
        from_plain(Outer, plain, "here")
