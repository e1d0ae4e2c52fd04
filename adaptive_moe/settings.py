"""Environment -> frozen Settings: every variable, what it accepts, and every error about it.

`VARIABLES` is the one table of what exists; `adaptive-moe doctor` prints it and the parser below
reads nothing else.
"""

import enum
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

ENGINE_VARIABLE = "VLLM_ROCM_AITER_MOE_DISPATCH_POLICY"
NEUTRAL_VARIABLE = "ADAPTIVE_MOE_DISPATCH_POLICY"

# A policy is stored as one byte a token count.
MAX_POLICY = 255
MAX_TOKENS = 1 << 20


class SettingsError(ValueError):
    """A variable or option has a value that is not accepted; the text says which and what is."""


class Mode(enum.Enum):
    """What the dispatch-policy variable asks for."""

    OFF = "off"
    AUTO = "auto"
    FIXED = "fixed"


class LogDetail(enum.Enum):
    """How much of a calibration is logged."""

    SUMMARY = "summary"  # one line a shape
    TABLE = "table"  # and the bucket table


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, default as text, what it accepts and what it does."""

    name: str
    default: str
    accepts: str
    meaning: str


VARIABLES = (
    Variable(
        ENGINE_VARIABLE,
        "unset",
        "auto, or an integer from 0 to 255",
        "auto: measure and choose; an integer: always that policy; unset: leave AITER alone",
    ),
    Variable(
        NEUTRAL_VARIABLE,
        "unset",
        "auto, or an integer from 0 to 255",
        "the same for any engine; must agree with the name above where both are set",
    ),
    Variable(
        "ADAPTIVE_MOE_BUDGET_S",
        "0.75",
        "seconds, more than 0",
        "most wall-clock time one shape's measurement may take",
    ),
    Variable(
        "ADAPTIVE_MOE_MARGIN",
        "0.01",
        "a fraction from 0 to 0.5",
        "policy 0 stays unless another is faster by more than this, with confidence",
    ),
    Variable(
        "ADAPTIVE_MOE_BUCKETS",
        "powers of two",
        "rising token counts such as 1,8,64,512",
        "token counts measured first; crossovers between them are refined either way",
    ),
    Variable(
        "ADAPTIVE_MOE_CACHE_DIR",
        "$VLLM_CACHE_ROOT/adaptive_moe, else the user's cache folder",
        "a folder",
        "where calibrations are kept",
    ),
    Variable(
        "ADAPTIVE_MOE_RECALIBRATE",
        "no",
        "1, true, yes or on, or 0, false, no or off",
        "measure again, whatever is kept, and keep the new result",
    ),
    Variable(
        "ADAPTIVE_MOE_LOG_DETAIL",
        "table",
        "summary or table",
        "how much of a calibration is logged",
    ),
    Variable(
        "ADAPTIVE_MOE_REPORT",
        "unset",
        "a file name",
        "also write the evidence there as JSON",
    ),
)


@dataclass(frozen=True)
class Settings:
    """What the environment asks for, parsed once.

    budget_s is in seconds a shape; margin is a fraction of policy 0's time; buckets are token
    counts (empty: the default grid).
    """

    mode: Mode = Mode.OFF
    fixed_policy: int | None = None
    budget_s: float = 0.75
    margin: float = 0.01
    buckets: tuple[int, ...] = ()
    cache_dir: str | None = None
    recalibrate: bool = False
    log_detail: LogDetail = LogDetail.TABLE
    report: str | None = None


def read_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Parse every variable of `VARIABLES`; raise SettingsError on the first that is not accepted.

    A variable that is set but empty counts as unset.
    """
    mode, fixed_policy = _dispatch_policy(environ)
    budget = environ.get("ADAPTIVE_MOE_BUDGET_S") or "0.75"
    margin = environ.get("ADAPTIVE_MOE_MARGIN") or "0.01"
    detail = (environ.get("ADAPTIVE_MOE_LOG_DETAIL") or "table").lower()
    try:
        log_detail = LogDetail(detail)
    except ValueError:
        raise _refuse("ADAPTIVE_MOE_LOG_DETAIL", detail) from None
    return Settings(
        mode=mode,
        fixed_policy=fixed_policy,
        budget_s=parse_budget("ADAPTIVE_MOE_BUDGET_S", budget),
        margin=parse_margin("ADAPTIVE_MOE_MARGIN", margin),
        buckets=parse_buckets("ADAPTIVE_MOE_BUCKETS", environ.get("ADAPTIVE_MOE_BUCKETS") or ""),
        cache_dir=environ.get("ADAPTIVE_MOE_CACHE_DIR") or None,
        recalibrate=parse_switch(
            "ADAPTIVE_MOE_RECALIBRATE", environ.get("ADAPTIVE_MOE_RECALIBRATE") or "no"
        ),
        log_detail=log_detail,
        report=environ.get("ADAPTIVE_MOE_REPORT") or None,
    )


def parse_policy(name: str, text: str) -> tuple[Mode, int | None]:
    """`auto` in any case, or an integer policy; `name` is the variable or option to blame."""
    word = text.strip()
    if word.lower() == "auto":
        return Mode.AUTO, None
    if word.isascii() and word.isdigit() and int(word) <= MAX_POLICY:
        return Mode.FIXED, int(word)
    raise _refuse(name, text)


def parse_budget(name: str, text: str) -> float:
    """Seconds, more than 0 and finite."""
    seconds = _number(text)
    if seconds is None or not 0 < seconds < float("inf"):
        raise _refuse(name, text)
    return seconds


def parse_margin(name: str, text: str) -> float:
    """A fraction from 0 to 0.5."""
    margin = _number(text)
    if margin is None or not 0 <= margin <= 0.5:
        raise _refuse(name, text)
    return margin


def parse_switch(name: str, text: str) -> bool:
    """1, true, yes, on or 0, false, no, off, in any case."""
    word = text.strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off"):
        return False
    raise _refuse(name, text)


def parse_buckets(name: str, text: str) -> tuple[int, ...]:
    """Rising token counts separated by commas; empty text is the default grid, ()."""
    if not text.strip():
        return ()
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() for word in words):
        raise _refuse(name, text)
    counts = tuple(int(word) for word in words)
    rising = all(low < high for low, high in pairwise(counts))
    if counts[0] < 1 or counts[-1] > MAX_TOKENS or not rising:
        raise _refuse(name, text)
    return counts


def _dispatch_policy(environ: Mapping[str, str]) -> tuple[Mode, int | None]:
    asked = {
        name: parse_policy(name, environ[name])
        for name in (ENGINE_VARIABLE, NEUTRAL_VARIABLE)
        if environ.get(name, "").strip()
    }
    if len(set(asked.values())) > 1:
        raise SettingsError(
            f"{ENGINE_VARIABLE}={environ[ENGINE_VARIABLE]!r} and "
            f"{NEUTRAL_VARIABLE}={environ[NEUTRAL_VARIABLE]!r} disagree: "
            "unset one of them, or give both the same value"
        )
    return next(iter(asked.values()), (Mode.OFF, None))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _refuse(name: str, text: str) -> SettingsError:
    accepts = next((v.accepts for v in VARIABLES if v.name == name), None) or _OPTIONS[name]
    return SettingsError(f"{name}={text!r} is not accepted: give {accepts}, or leave it unset")


# Command-line options share the parsers above; they accept what their variable accepts.
_OPTIONS = {
    "--budget": "seconds, more than 0",
    "--margin": "a fraction from 0 to 0.5",
    "--buckets": "rising token counts such as 1,8,64,512",
}
