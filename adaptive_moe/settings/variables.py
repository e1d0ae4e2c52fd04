"""Every environment variable: what it is called, what it accepts and what it does.

`VARIABLES` is the one table of what exists; readers (__init__.py), doctor and errors follow it.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from adaptive_moe import PREFIX, VLLM_VARIABLE
from adaptive_moe.policy.coverage import MAX_TOKENS

NEUTRAL_VARIABLE = f"{PREFIX}DISPATCH_POLICY"
MAX_POLICY = 255
MOST_SECONDS = 86400  # of a budget: a day
MOST_COUNTS = 4096  # what a stored table's key holds

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


def policy(text: str) -> tuple[Mode, int | None]:
    """`auto` or `off` in any case, or an integer policy."""
    word = text.strip().lower()
    if word == "auto":
        return Mode.AUTO, None
    if word in OFF:
        return Mode.OFF, None
    if word.isascii() and word.isdigit() and int(word) <= MAX_POLICY:
        return Mode.FIXED, int(word)
    raise ValueError


def budget(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= MOST_SECONDS:
        raise ValueError
    return seconds


def margin(text: str) -> float:
    margin = float(text)
    if not 0 <= margin <= 0.5:
        raise ValueError
    return margin


def token_counts(text: str) -> tuple[int, ...]:
    counts = tuple(_count(word) for word in text.split(","))
    if any(low >= high for low, high in pairwise(counts)) or len(counts) > MOST_COUNTS:
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


POLICY = "auto, an integer from 0 to 255, or off"
COUNTS = f"at most {MOST_COUNTS} rising token counts such as 1,8,64,512"
FRACTION = "a fraction from 0 to 0.5"
SECONDS = f"seconds, more than 0 and at most {MOST_SECONDS}"

VARIABLES = (
    Variable(
        VLLM_VARIABLE,
        "unset",
        POLICY,
        "auto: measure and choose; an integer: always that policy; unset or off: AITER as it is",
        policy,
    ),
    Variable(
        NEUTRAL_VARIABLE,
        "unset",
        POLICY,
        "the same for any engine; where both are set and differ, the name above wins",
        policy,
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
        SECONDS,
        "most wall-clock time one shape's measurement may take",
        budget,
    ),
    Variable(
        "ADAPTIVE_MOE_MARGIN",
        f"{Settings.margin:g}",
        FRACTION,
        "the baseline stays unless another is faster by more than this, with confidence",
        margin,
    ),
    Variable(
        "ADAPTIVE_MOE_BUCKETS",
        "powers of two",
        COUNTS,
        "token counts measured first; crossovers between them are refined either way",
        token_counts,
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
