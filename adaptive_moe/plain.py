"""Frozen dataclasses <-> plain JSON values, strictly: whatever does not fit its type is refused.

Calibrations are read from disk and from other ranks, so reading validates everything by the
dataclasses' own annotations: exact fields, exact types, finite numbers, bounded sizes.
"""

import dataclasses
import enum
import math
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")

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


def from_plain(kind: type[T], value: Any, where: str = "calibration") -> T:
    """Build `kind` from plain values; ValueError naming the place of whatever does not fit."""
    return typing.cast(T, _read(kind, value, where))


def _read(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    arguments = typing.get_args(kind)
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        if value is None and type(None) in arguments:
            return None
        return _read(next(a for a in arguments if a is not type(None)), value, where)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list) or len(value) > MAX_ITEMS:
            raise _misfit(where, f"a list of at most {MAX_ITEMS}", value)
        return tuple(_read(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        known = {member.value: member for member in kind}
        if not isinstance(value, str) or value not in known:
            raise _misfit(where, f"one of {', '.join(map(str, known))}", value)
        return known[value]
    return _read_scalar(kind, value, where)


def _read_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str) and len(value) <= MAX_TEXT:
        return value
    if kind is int and type(value) is int and abs(value) <= MAX_INT:
        return value
    if kind is float and type(value) in (int, float) and abs(value) <= MAX_INT:
        return float(value)
    raise _misfit(where, f"a {getattr(kind, '__name__', kind)}", value)


def _read_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _misfit(where, f"an object ({kind.__name__})", value)
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind) if f.init]
    if set(value) != set(names):
        odd = sorted(set(map(str, value)) ^ set(names))
        raise ValueError(f"{where}: fields {odd[:4]} are missing or unknown")
    return kind(**{name: _read(hints[name], value[name], f"{where}.{name}") for name in names})


def _misfit(where: str, wanted: str, value: Any) -> ValueError:
    return ValueError(f"{where}: {str(value)[:60]!r} is not {wanted}")
