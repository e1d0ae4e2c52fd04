"""Frozen dataclasses <-> plain JSON values, strictly: whatever does not fit its type is refused.

Tables are read from files and from other ranks, so reading validates everything by the dataclasses'
own annotations: exact fields, exact types, finite numbers, bounded sizes.
"""

import dataclasses
import enum
import functools
import math
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")

MAX_ITEMS = 4096
MAX_TEXT = 4096
MAX_INT = 1 << 53


def to_plain(value: Any) -> Any:
    """Dataclasses become dicts, tuples lists, enum members their values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def from_plain(kind: type[_T], value: Any, where: str = "calibration") -> _T:
    """Build `kind` from plain values; ValueError naming the place of whatever does not fit."""
    result: _T = _reader(typing.cast(Any, kind))(value, where)
    return result


# Reads a value, or raises ValueError naming the place.
_Reader = Callable[[Any, str], Any]


@functools.cache
def _reader(kind: Any) -> _Reader:
    """The reader of one annotation. Annotations are looked into once, not for each of the thousand
    values of a calibration: a start that finds its tables stored should take no time."""
    if dataclasses.is_dataclass(kind):
        return _dataclass_reader(kind)
    arguments = typing.get_args(kind)
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return _optional_reader(_reader(next(a for a in arguments if a is not type(None))))
    if typing.get_origin(kind) is tuple:
        any_length = arguments[-1] is Ellipsis
        return _tuple_reader(_reader(arguments[0]), None if any_length else len(arguments))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return _enum_reader({member.value: member for member in kind})
    return _SCALARS[kind]


def _dataclass_reader(kind: Any) -> _Reader:
    hints = typing.get_type_hints(kind)
    readers = {f.name: _reader(hints[f.name]) for f in dataclasses.fields(kind) if f.init}

    def read(value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise _misfit(where, f"an object ({kind.__name__})", value)
        if value.keys() != readers.keys():
            odd = sorted(set(map(str, value)) ^ set(readers))
            raise ValueError(f"{where}: fields {odd[:4]} are missing or unknown")
        return kind(**{n: read_one(value[n], f"{where}.{n}") for n, read_one in readers.items()})

    return read


def _optional_reader(inner: _Reader) -> _Reader:
    def read(value: Any, where: str) -> Any:
        return None if value is None else inner(value, where)

    return read


def _tuple_reader(item: _Reader, length: int | None) -> _Reader:
    """Of items of one kind; length: None for any."""
    wanted = f"a list of at most {MAX_ITEMS}" if length is None else f"a list of {length}"

    def read(value: Any, where: str) -> Any:
        if not isinstance(value, list) or len(value) > MAX_ITEMS:
            raise _misfit(where, wanted, value)
        if length is not None and len(value) != length:
            raise _misfit(where, wanted, value)
        return tuple(item(one, f"{where}[{i}]") for i, one in enumerate(value))

    return read


def _enum_reader(known: dict[Any, enum.Enum]) -> _Reader:
    def read(value: Any, where: str) -> Any:
        if not isinstance(value, str) or value not in known:
            raise _misfit(where, f"one of {', '.join(map(str, known))}", value)
        return known[value]

    return read


def _read_bool(value: Any, where: str) -> bool:
    if isinstance(value, bool):
        return value
    raise _misfit(where, "a bool", value)


def _read_str(value: Any, where: str) -> str:
    if isinstance(value, str) and len(value) <= MAX_TEXT:
        return value
    raise _misfit(where, "a str", value)


def _read_int(value: Any, where: str) -> int:
    if type(value) is int and abs(value) <= MAX_INT:
        return value
    raise _misfit(where, "a int", value)


def _read_float(value: Any, where: str) -> float:
    if type(value) in (int, float) and abs(value) <= MAX_INT:
        return float(value)
    raise _misfit(where, "a float", value)


_SCALARS: dict[type, _Reader] = {
    bool: _read_bool,
    str: _read_str,
    int: _read_int,
    float: _read_float,
}


def _misfit(where: str, wanted: str, value: Any) -> ValueError:
    return ValueError(f"{where}: {str(value)[:60]!r} is not {wanted}")
