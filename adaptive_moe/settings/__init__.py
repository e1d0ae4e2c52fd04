"""Environment -> frozen Settings, and every error about it.

Who types a command gets an error (`read_settings`). A server starts whatever the environment holds
(`read_for_serving`).
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

from adaptive_moe import PREFIX, VLLM_VARIABLE
from adaptive_moe.settings.variables import (
    COUNTS,
    FRACTION,
    NEUTRAL_VARIABLE,
    OFF,
    SECONDS,
    VARIABLES,
    LogDetail,
    Mode,
    Settings,
    SettingsError,
    Variable,
    budget,
    margin,
    policy,
    token_counts,
)

__all__ = [
    "NEUTRAL_VARIABLE",
    "OFF",
    "VARIABLES",
    "VLLM_VARIABLE",
    "LogDetail",
    "Mode",
    "Settings",
    "SettingsError",
    "Variable",
    "misspelt",
    "parse_buckets",
    "parse_budget",
    "parse_margin",
    "read_for_serving",
    "read_settings",
    "vllm_refuses",
]

# How alike a name without our prefix must be to one of ours: no other of vLLM 0.33.0 and SGLang
# 0.5.23 comes above 0.72.
ALIKE = 0.77


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
    """A sentence for each variable that is named like one of ours, or like vLLM's of the policy,
    and is none."""
    import difflib

    known = [variable.name for variable in VARIABLES]
    sentences = []
    for name in sorted(environ):
        is_ours = name.startswith(PREFIX.rstrip("_"))
        if name in known or not (is_ours or "MOE" in name):
            continue
        close = difflib.get_close_matches(name, known, cutoff=0.6 if is_ours else ALIKE)
        if name.rstrip("_") == PREFIX.rstrip("_"):
            close = [NEUTRAL_VARIABLE]
        if close or is_ours:
            meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(known[1:])}"
            sentences.append(f"{name} is not a variable of adaptive_moe and is not read: {meant}")
    return tuple(sentences)


def parse_budget(name: str, text: str) -> float:
    """Seconds, more than 0 and finite; `name` is the option to blame in SettingsError."""
    return float(_parse(name, text, SECONDS, budget))


def parse_margin(name: str, text: str) -> float:
    """A fraction from 0 to 0.5."""
    return float(_parse(name, text, FRACTION, margin))


def parse_buckets(name: str, text: str) -> tuple[int, ...]:
    """Rising token counts separated by commas; empty text is the default grid, ()."""
    return tuple(_parse(name, text, COUNTS, token_counts)) if text.strip() else ()


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
            problems.append((error, _instead(variable, text)))
            continue
        if variable.parse is policy:
            asked[variable.name] = value
        else:  # the field of Settings is called like the variable
            values[variable.name.removeprefix(PREFIX).lower()] = value
    mode, fixed_policy = next(iter(asked.values()), (Mode.OFF, None))
    if len(set(asked.values())) > 1:
        named = " and ".join(f"{name}={environ[name]!r}" for name in asked)
        text = f"{named} disagree: unset one of them, or give both the same value"
        problems.append((SettingsError(text), "the first of them counts"))
    return Settings(mode=mode, fixed_policy=fixed_policy, **values), problems


def _instead(variable: Variable, text: str) -> str:
    """What happens with a value that is not accepted."""
    if variable.name == VLLM_VARIABLE and vllm_refuses(text):
        return "vLLM itself refuses it and does not start; elsewhere it counts as unset"
    return f"it counts as {variable.default}"


def vllm_refuses(text: str) -> bool:
    """Does vLLM alone end at its start over this value of its variable? It reads it with int()."""
    try:
        int(text)
    except ValueError:
        return True
    return False


def _parse(name: str, text: str, accepts: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(text)
    except ValueError:
        raise SettingsError(
            f"{name}={text!r} is not accepted: give {accepts}, or leave it unset"
        ) from None
