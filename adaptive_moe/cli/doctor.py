"""adaptive-moe doctor: what is here, and whether what the environment asks for will happen.

Nothing is measured, and no engine and no AITER is imported. A finding is not ok where something
that was asked for will not happen; the exit code is 1 where there is such a one.
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from adaptive_moe import ENGINE_VARIABLE, __version__
from adaptive_moe.cli import output
from adaptive_moe.cli.engines import ENGINES, PLUGIN, Engine
from adaptive_moe.kernels import POLICIES
from adaptive_moe.kernels.aiter import AiterInstall, find_aiter, meaning_of
from adaptive_moe.report.words import plural
from adaptive_moe.settings import (
    NEUTRAL_VARIABLE,
    VARIABLES,
    Mode,
    Settings,
    Variable,
    misspelt,
    read_for_serving,
)

ON = ("1", "true")


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis, and its facts for --json. ok: False where something that was
    asked for will not happen."""

    topic: str
    text: str
    ok: bool = True
    facts: dict[str, Any] = field(default_factory=dict)

    def lines(self, indent: int, columns: int) -> list[str]:
        """The topic, and beside it the text, no wider than so many columns."""
        return textwrap.wrap(
            ("" if self.ok else "NOT OK: ") + self.text,
            columns,
            initial_indent=self.topic.ljust(indent),
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
        )


def options_of_doctor(parser: argparse.ArgumentParser) -> None:
    output.add_json(parser)


def run_doctor(args: argparse.Namespace) -> int:
    findings = diagnose(os.environ)
    width = max(len(finding.topic) for finding in findings) + 2
    # On a terminal in columns; elsewhere a line a finding.
    columns = max(shutil.get_terminal_size(fallback=(10_000, 0)).columns, 2 * width)
    lines = [line for finding in findings for line in finding.lines(width, columns)]
    plain = [{**asdict(finding), **finding.facts} for finding in findings]
    for entry in plain:
        del entry["facts"]
    ok = all(finding.ok for finding in findings)
    output.report(args, lines, {"ok": ok, "findings": {e.pop("topic"): e for e in plain}})
    return 0 if ok else 1


def diagnose(environ: Mapping[str, str]) -> list[Finding]:
    """Every finding: first the machine, then the variables, last what would happen."""
    settings, problems = read_for_serving(environ)
    aiter = find_aiter()
    engines = [_engine(engine, environ, settings) for engine in ENGINES]
    return [
        Finding("adaptive-moe", __version__, facts={"version": __version__}),
        Finding("python", f"{platform.python_version()} on {platform.platform()}"),
        _torch(),
        _aiter(aiter, settings),
        *engines,
        _cache(settings, environ),
        *(_variable(variable, environ, problems) for variable in VARIABLES),
        *(Finding("misspelt", text, ok=False) for text in misspelt(environ)),
        _outlook(settings, aiter, engines, environ),
    ]


def _torch() -> Finding:
    try:
        import torch
    except ImportError as error:
        text = f"not importable ({error}): pip install torch"
        return Finding("torch", text, ok=False, facts={"gpu": False})
    from adaptive_moe.kernels.environment import describe_environment

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    found = describe_environment(device)
    units = f"{found.compute_units} CUs" if gpu else plural(found.compute_units, "thread")
    text = f"{found.torch}, {found.device} ({found.arch}, {found.runtime or 'CPU only'}, {units})"
    return Finding("torch", text, facts={"gpu": gpu, "environment": asdict(found)})


def _aiter(aiter: AiterInstall, settings: Settings) -> Finding:
    facts = {"usable": aiter.problem is None, **asdict(aiter)}
    if aiter.problem is None:
        return Finding("aiter", f"AMD's AITER {aiter.version} in {aiter.location}", facts=facts)
    return Finding("aiter", aiter.problem, ok=settings.mode is Mode.OFF, facts=facts)


def _engine(engine: Engine, environ: Mapping[str, str], settings: Settings) -> Finding:
    """Is it here, does it load the plugin, does it sort with AITER; problem: why nothing happens.
    ok even so: another engine may be the one that serves, see `_outlook`."""
    try:
        version = importlib.metadata.version(engine.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(engine.name, "not installed", facts={"version": None, "problem": None})
    entries = importlib.metadata.entry_points(group=engine.group)
    registered = any(entry.name == PLUGIN for entry in entries)
    loaded = registered and engine.loads_us(environ)
    uses_aiter = environ.get(engine.aiter, "").strip().lower() in ON
    problem = None
    if not registered:
        problem = f"the plugin is not registered in {engine.group}: install adaptive_moe again"
    elif not loaded:
        names = f"{engine.allow}={environ[engine.allow]!r}"
        problem = f"{names} leaves {PLUGIN} out: add it, or unset {engine.allow}"
    elif not uses_aiter:
        problem = f"it sorts with AITER only under {engine.aiter}=1, which is not set"
    facts = {
        "version": version,
        "plugin_registered": registered,
        "plugin_loaded": loaded,
        "uses_aiter": uses_aiter,
        "problem": problem,
    }
    word = "plugin loaded" if loaded else "plugin not loaded"
    return Finding(engine.name, f"{version}; {word}; {problem or 'AITER is on'}", facts=facts)


def _cache(settings: Settings, environ: Mapping[str, str]) -> Finding:
    from adaptive_moe.store.folder import cache_folder, stored_files

    folder = cache_folder(settings, environ)
    try:
        number = len(stored_files(folder))
        problem = _unwritable(os.path.realpath(folder))
    except OSError as error:
        number, problem = 0, error.strerror or str(error)
    facts = {"folder": str(folder), "files": number, "usable": problem is None, "problem": problem}
    asked = settings.mode is Mode.AUTO or settings.cache_dir is not None
    if problem is not None:
        text = f"{folder}: {problem}; give another ADAPTIVE_MOE_CACHE_DIR"
        return Finding("cache", text, ok=not asked, facts=facts)
    return Finding("cache", f"{folder}, {plural(number, 'calibration')}", facts=facts)


def _unwritable(folder: str) -> str | None:
    """Why nothing could be kept there, seen without writing."""
    if os.path.exists(folder):
        if not os.path.isdir(folder):
            return "it is not a folder"
        owner = os.stat(folder).st_uid
        if owner not in (0, os.geteuid()):
            return f"it belongs to user {owner}, not to you or root"
        return None if os.access(folder, os.W_OK | os.X_OK) else "it is not writable"
    parent = os.path.dirname(folder)
    if parent == folder:
        return "it does not exist"
    problem = _unwritable(parent)
    return problem and f"it does not exist, and of {parent}: {problem}"


def _variable(variable: Variable, environ: Mapping[str, str], problems: tuple[str, ...]) -> Finding:
    value = environ.get(variable.name) or None
    problem = next((p for p in problems if p.startswith(f"{variable.name}={value!r}")), None)
    shown = repr(value) if value is not None else "unset"
    if value is None and variable.default != "unset":
        shown += f", so {variable.default}"
    text = problem or f"{shown}; {variable.meaning}; accepts {variable.accepts}"
    facts = {"value": value, "default": variable.default, "accepts": variable.accepts}
    return Finding(variable.name, text, ok=problem is None, facts=facts)


def _outlook(
    settings: Settings, aiter: AiterInstall, engines: list[Finding], environ: Mapping[str, str]
) -> Finding:
    """What would happen to a server started from this shell, and whether that is what was asked."""
    facts = {"mode": settings.mode.value, "fixed_policy": settings.fixed_policy}

    def finding(text: str, *, ok: bool = True) -> Finding:
        return Finding("would happen", text, ok, facts)

    if settings.mode is Mode.OFF:
        off = f"nothing: AITER and the engine as they are; {NEUTRAL_VARIABLE}=auto turns us on"
        return finding(off)
    if refused := _vllm_refuses(engines, environ):
        return finding(f"vLLM does not start: {refused}", ok=False)
    if aiter.problem is not None:
        return finding("nothing changes: there is no AITER that takes a policy", ok=False)
    here = [finding for finding in engines if finding.facts["version"] is not None]
    working = [finding.topic for finding in here if finding.facts["problem"] is None]
    if here and not working:
        why = "; ".join(f"{finding.topic}: {finding.facts['problem']}" for finding in here)
        return finding(f"nothing changes: {why}", ok=False)
    where = f"in {' and '.join(working)}" if working else "after adaptive_moe.install()"
    if settings.mode is Mode.FIXED:
        policy = settings.fixed_policy or 0
        what = "" if policy in POLICIES else f", {meaning_of(policy)}"
        return finding(f"policy {policy} for every call {where}{what}; nothing is measured")
    return finding(f"each sorting shape is measured at warm-up {where}, if no stored table fits")


def _vllm_refuses(engines: list[Finding], environ: Mapping[str, str]) -> str | None:
    """vLLM alone reads its variable with int(): without the plugin, `auto` ends it at its start."""
    word = environ.get(ENGINE_VARIABLE, "").strip()
    without_us = any(
        found.topic == "vllm" and found.facts["version"] and not found.facts["plugin_loaded"]
        for found in engines
    )
    if not without_us or not word or _is_integer(word):
        return None
    return (
        f"{next(found for found in engines if found.topic == 'vllm').facts['problem']}; without "
        f"the plugin {ENGINE_VARIABLE}={word!r} is a ValueError there"
    )


def _is_integer(word: str) -> bool:
    try:
        int(word)
    except ValueError:
        return False
    return True
