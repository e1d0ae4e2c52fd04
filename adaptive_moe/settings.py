"""Environment -> frozen Settings: every variable, what it accepts, and every error about it.

`VARIABLES` is the one table of what exists; the readers read nothing else. A command gets an
error (`read_settings`). A server starts whatever the environment holds (`read_for_serving`).
"""

import enum
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from adaptive_moe import ENGINE_VARIABLE, PREFIX
from adaptive_moe.policy.coverage import MAX_TOKENS

NEUTRAL_VARIABLE = f"{PREFIX}DISPATCH_POLICY"
MAX_POLICY = 255

OFF = ("off", "none", "false")
YES, NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


class SettingsError(ValueError):
    """A variable or option has a value that is not accepted; the text says which and what is."""


class Mode(enum.Enum):
    """What the dispatch-policy variable asks for."""

    OFF = "off"
    AUTO = "auto"
    FIXED = "fixed"


class LogDetail(enum.Enum):
    """How much of a calibration is logged: a line a shape, or the bucket table too."""

    SUMMARY = "summary"
    TABLE = "table"


@dataclass(frozen=True)
class Settings:
    """What the environment asks for, parsed once.

    budget_s is in seconds a shape, margin a fraction of the baseline's time. buckets are token
    counts; empty: the default grid. busy_from None: the first count above the largest captured
    size. sorts are `policies` or names of kernels/sorts.py, in its order.
    """

    mode: Mode = Mode.OFF
    fixed_policy: int | None = None
    budget_s: float = 1.5
    margin: float = 0.01
    buckets: tuple[int, ...] = ()
    busy_from: int | None = None
    sorts: tuple[str, ...] = ("policies",)
    cache_dir: str | None = None
    recalibrate: bool = False
    log_detail: LogDetail = LogDetail.TABLE
    report: str | None = None


def _policy(text: str) -> tuple[Mode, int | None]:
    """`auto` or `off` in any case, or an integer policy."""
    word = text.strip().lower()
    if word == "auto":
        return Mode.AUTO, None
    if word in OFF:
        return Mode.OFF, None
    if word.isascii() and word.isdigit() and int(word) <= MAX_POLICY:
        return Mode.FIXED, int(word)
    raise ValueError


def _budget(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError
    return seconds


def _margin(text: str) -> float:
    margin = float(text)
    if not 0 <= margin <= 0.5:
        raise ValueError
    return margin


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(_count(word) for word in text.split(","))
    if any(low >= high for low, high in pairwise(counts)):
        raise ValueError
    return counts


def _count(text: str) -> int:
    word = text.strip()
    if not (word.isascii() and word.isdigit() and 1 <= int(word) <= MAX_TOKENS):
        raise ValueError
    return int(word)


def _sorts(text: str) -> tuple[str, ...]:
    # Here, because kernels are above settings; it imports no kernel.
    from adaptive_moe.kernels.sorts import GROUPS

    words = [" ".join(word.lower().split()) for word in text.split(",")]
    if not all(word in GROUPS or word in GROUPS["all"] for word in words):
        raise ValueError
    asked = {name for word in words for name in GROUPS.get(word, (word,))}
    return tuple(name for name in GROUPS["all"] if name in asked)


def _switch(text: str) -> bool:
    word = text.strip().lower()
    if word not in (*YES, *NO):
        raise ValueError
    return word in YES


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, default as text, what it accepts and what it does.
    parse raises ValueError for what is not accepted."""

    name: str
    default: str
    accepts: str
    meaning: str
    parse: Callable[[str], Any]


_POLICY = "auto, an integer from 0 to 255, or off"
_COUNTS = "rising token counts such as 1,8,64,512"
_FRACTION = "a fraction from 0 to 0.5"
_SECONDS = "seconds, more than 0"

VARIABLES = (
    Variable(
        ENGINE_VARIABLE,
        "unset",
        _POLICY,
        "auto: measure and choose; an integer: always that policy; unset or off: AITER as it is",
        _policy,
    ),
    Variable(
        NEUTRAL_VARIABLE,
        "unset",
        _POLICY,
        "the same for any engine; where both are set and differ, the name above wins",
        _policy,
    ),
    Variable(
        "ADAPTIVE_MOE_SORTS",
        "policies",
        "policies, aiter, all, or sorts by name such as flydsl,triton one-shot",
        "the candidates: the policies of the sort AITER is set to, all of AITER's sorts, or "
        "this package's too",
        _sorts,
    ),
    Variable(
        "ADAPTIVE_MOE_BUDGET_S",
        f"{Settings.budget_s:g}",
        _SECONDS,
        "most wall-clock time one shape's measurement may take",
        _budget,
    ),
    Variable(
        "ADAPTIVE_MOE_MARGIN",
        f"{Settings.margin:g}",
        _FRACTION,
        "the baseline stays unless another is faster by more than this, with confidence",
        _margin,
    ),
    Variable(
        "ADAPTIVE_MOE_BUCKETS",
        "powers of two",
        _COUNTS,
        "token counts measured first; crossovers between them are refined either way",
        _counts,
    ),
    Variable(
        "ADAPTIVE_MOE_BUSY_FROM",
        "above the largest captured size, else 2048",
        f"a token count from 1 to {MAX_TOKENS}",
        "eager calls of at least so many tokens meet a busy GPU; 1: all do",
        _count,
    ),
    Variable(
        "ADAPTIVE_MOE_CACHE_DIR",
        "$VLLM_CACHE_ROOT/adaptive_moe, else the user's cache folder",
        "a folder",
        "where calibrations are kept",
        str,
    ),
    Variable(
        "ADAPTIVE_MOE_RECALIBRATE",
        "no",
        "1, true, yes or on, or 0, false, no or off",
        "measure again, whatever is kept, and keep the new result",
        _switch,
    ),
    Variable(
        "ADAPTIVE_MOE_LOG_DETAIL",
        "table",
        "summary or table",
        "how much of a calibration is logged",
        lambda text: LogDetail(text.strip().lower()),
    ),
    Variable(
        "ADAPTIVE_MOE_REPORT",
        "unset",
        "a file name",
        "also write the evidence there as JSON",
        str,
    ),
)


def read_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Parse every variable of `VARIABLES`; SettingsError for the first that is not accepted, and
    where both names of the policy are set and differ. A variable that is empty counts as unset."""
    settings, problems = _read(environ)
    for error, _ in problems:
        raise error
    return settings


def read_for_serving(environ: Mapping[str, str] = os.environ) -> tuple[Settings, tuple[str, ...]]:
    """The same for a process that must start: what is not accepted has its default, and the second
    value a sentence about it. So have names that only look like ours. Never raises."""
    settings, problems = _read(environ)
    said = [f"{error}; {instead}" for error, instead in problems]
    return settings, (*said, *misspelt(environ))


def misspelt(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """A sentence for each variable that is named like one of ours and is none."""
    import difflib

    known = [variable.name for variable in VARIABLES]
    found = []
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in known:
            close = difflib.get_close_matches(name, known)
            meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(known[1:])}"
            found.append(f"{name} is not a variable of adaptive_moe and is not read: {meant}")
    return tuple(found)


def parse_budget(name: str, text: str) -> float:
    """Seconds, more than 0 and finite; `name` is the option to blame in SettingsError."""
    return float(_parse(name, text, _SECONDS, _budget))


def parse_margin(name: str, text: str) -> float:
    """A fraction from 0 to 0.5."""
    return float(_parse(name, text, _FRACTION, _margin))


def parse_buckets(name: str, text: str) -> tuple[int, ...]:
    """Rising token counts separated by commas; empty text is the default grid, ()."""
    return tuple(_parse(name, text, _COUNTS, _counts)) if text.strip() else ()


def _read(environ: Mapping[str, str]) -> tuple[Settings, list[tuple[SettingsError, str]]]:
    """The settings, and each error with what is done instead where it is not raised."""
    values: dict[str, Any] = {}
    asked: dict[str, tuple[Mode, int | None]] = {}
    problems: list[tuple[SettingsError, str]] = []
    for variable in VARIABLES:
        text = environ.get(variable.name, "")
        if not text.strip():
            continue
        try:
            value = _parse(variable.name, text, variable.accepts, variable.parse)
        except SettingsError as error:
            problems.append((error, f"it counts as {variable.default}"))
            continue
        if variable.parse is _policy:
            asked[variable.name] = value
        else:  # the field of Settings is called like the variable
            values[variable.name.removeprefix(PREFIX).lower()] = value
    mode, fixed_policy = next(iter(asked.values()), (Mode.OFF, None))
    if len(set(asked.values())) > 1:
        named = " and ".join(f"{name}={environ[name]!r}" for name in asked)
        text = f"{named} disagree: unset one of them, or give both the same value"
        problems.append((SettingsError(text), "the first of them counts"))
    return Settings(mode=mode, fixed_policy=fixed_policy, **values), problems


def _parse(name: str, text: str, accepts: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(text)
    except ValueError:
        raise SettingsError(
            f"{name}={text!r} is not accepted: give {accepts}, or leave it unset"
        ) from None
