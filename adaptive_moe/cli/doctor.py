"""adaptive-moe doctor: will the engine choose here, and if not, why not; then the facts.

Nothing is measured, and no engine and no AITER is imported. A finding is not ok where something
that was asked for will not happen; the exit code is 1 where there is such a one.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from adaptive_moe import PREFIX, VLLM_VARIABLE, __version__
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
    vllm_refuses,
)

RAY_COPIES = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis, and its facts for --json. ok: False where something that was
    asked for will not happen; is_detail: shown with --verbose only, while it is ok."""

    topic: str
    text: str
    ok: bool = True
    facts: dict[str, Any] = field(default_factory=dict)
    is_detail: bool = False

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
    parser.add_argument("--verbose", action="store_true", help="every variable too")
    output.add_json(parser)


def run_doctor(args: argparse.Namespace) -> int:
    findings = diagnose(os.environ)
    shown = [f for f in findings[1:] if args.verbose or not (f.is_detail and f.ok)]
    width = max(len(finding.topic) for finding in shown) + 2
    # On a terminal in columns; elsewhere a line a finding.
    columns = max(shutil.get_terminal_size(fallback=(10_000, 0)).columns, 2 * width)
    verdict = textwrap.wrap(findings[0].text, columns, break_long_words=False)
    lines = [*verdict, *(line for f in shown for line in f.lines(width, columns))]
    if not args.verbose:
        lines.append("adaptive-moe doctor --verbose shows every variable")
    ok = all(finding.ok for finding in findings)
    plain = {f.topic: {"text": f.text, "ok": f.ok, **f.facts} for f in findings}
    output.report(args, lines, {"ok": ok, "findings": plain})
    return 0 if ok else 1


def diagnose(environ: Mapping[str, str]) -> list[Finding]:
    """Every finding: first the verdict, then the machine, last the variables."""
    settings, problems = read_for_serving(environ)
    aiter = find_aiter()
    engines = [_engine(engine, environ) for engine in ENGINES]
    torch = _torch()
    return [
        _verdict(settings, aiter, engines, torch, environ),
        Finding("adaptive-moe", __version__, facts={"version": __version__}),
        _python(),
        torch,
        _aiter(aiter, settings),
        *engines,
        *_ray(engines, environ),
        _cache(settings, environ),
        *(Finding("misspelt", text, ok=False) for text in misspelt(environ)),
        *(_variable(variable, environ, problems) for variable in VARIABLES),
    ]


def _python() -> Finding:
    text = f"{platform.python_version()} on {platform.platform()}"
    if sys.version_info < (3, 11) and importlib.util.find_spec("tomli") is None:
        text += "; models by name need tomli: pip install tomli"
    return Finding("python", text)


def _torch() -> Finding:
    try:
        import torch
    except ImportError as error:
        text = f"not importable ({error}): pip install torch"
        return Finding("torch", text, ok=False, facts={"gpu": False})
    from adaptive_moe.kernels.environment import describe_environment

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    here = describe_environment(device)
    units = f"{here.compute_units} CUs" if gpu else plural(here.compute_units, "thread")
    text = f"{here.torch}, {here.device} ({here.arch}, {here.runtime or 'CPU only'}, {units})"
    return Finding("torch", text, facts={"gpu": gpu, "environment": asdict(here)})


def _aiter(aiter: AiterInstall, settings: Settings) -> Finding:
    facts = {"usable": aiter.problem is None, **asdict(aiter)}
    if aiter.problem is None:
        return Finding("aiter", f"AMD's AITER {aiter.version} in {aiter.location}", facts=facts)
    return Finding("aiter", aiter.problem, ok=settings.mode is Mode.OFF, facts=facts)


def _engine(engine: Engine, environ: Mapping[str, str]) -> Finding:
    """Is it here, does it load the plugin, does it sort with AITER; problem: why nothing happens.
    ok even so: another engine may be the one that serves, see `_verdict`."""
    try:
        version = importlib.metadata.version(engine.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(engine.name, "not installed", facts={"version": None, "problem": None})
    entries = importlib.metadata.entry_points(group=engine.group)
    registered = any(entry.name == PLUGIN for entry in entries)
    loaded = registered and engine.loads_us(environ)
    without_aiter = engine.sorts_with_aiter(environ)
    problem = without_aiter
    if not registered:
        problem = f"the plugin is not registered in {engine.group}: install adaptive_moe again"
    elif not loaded:
        names = f"{engine.allow}={environ[engine.allow]!r}"
        problem = f"{names} leaves {PLUGIN} out: add it, or unset {engine.allow}"
    facts = {
        "version": version,
        "plugin_registered": registered,
        "plugin_loaded": loaded,
        "uses_aiter": without_aiter is None,
        "problem": problem,
    }
    word = "plugin loaded" if loaded else "plugin not loaded"
    return Finding(engine.name, f"{version}; {word}; {problem or 'AITER is on'}", facts=facts)


def _ray(engines: list[Finding], environ: Mapping[str, str]) -> list[Finding]:
    """vLLM's Ray backend copies its own variables to its workers, ours only on request."""
    here = any(f.topic == "vllm" and f.facts["version"] for f in engines)
    copied = [prefix.strip() for prefix in environ.get(RAY_COPIES, "").split(",")]
    ours = any(name.startswith(PREFIX) for name in environ)
    if not (here and ours) or importlib.util.find_spec("ray") is None or PREFIX in copied:
        return []
    text = f"with vLLM's Ray backend also set {RAY_COPIES}={PREFIX}: else {PREFIX}* stays here"
    return [Finding("ray", text)]


def _cache(settings: Settings, environ: Mapping[str, str]) -> Finding:
    from adaptive_moe.store.folder import cache_folder, stored_files

    folder = cache_folder(settings, environ)
    try:
        number = len(stored_files(folder))
        problem = _unwritable(os.path.realpath(folder))
    except OSError as error:
        number, problem = 0, error.strerror or str(error)
    if str(folder).startswith("~"):
        problem = "it has no home folder to begin in"
    facts = {"folder": str(folder), "files": number, "usable": problem is None, "problem": problem}
    is_needed = settings.mode is Mode.AUTO or settings.cache_dir is not None
    if problem is not None:
        text = f"{folder}: {problem}; give another ADAPTIVE_MOE_CACHE_DIR"
        return Finding("cache", text, ok=not is_needed, facts=facts)
    return Finding("cache", f"{folder}, {plural(number, 'table')}", facts=facts)


def _unwritable(folder: str) -> str | None:
    """Why nothing could be kept there, seen without writing."""
    if os.path.exists(folder):
        if not os.path.isdir(folder):
            return "it is not a folder"
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
    return Finding(variable.name, text, problem is None, facts, is_detail=value is None)


def _verdict(
    settings: Settings,
    aiter: AiterInstall,
    engines: list[Finding],
    torch: Finding,
    environ: Mapping[str, str],
) -> Finding:
    """What would happen to a server started from this shell, and whether that is what was asked."""
    facts = {"mode": settings.mode.value, "fixed_policy": settings.fixed_policy}
    here = [finding for finding in engines if finding.facts["version"] is not None]
    working = [finding for finding in here if finding.facts["problem"] is None]
    problem = _vllm_refuses(engines, environ) or _not_accepted(environ)
    if settings.mode is Mode.OFF and problem is None:
        off = f"off: AITER and the engine as they are; {NEUTRAL_VARIABLE}=auto turns it on"
        return Finding("verdict", off, facts=facts)
    if problem is None and not torch.ok:
        problem = f"torch is {torch.text}"
    problem = problem or aiter.problem
    if problem is None and here and not working:
        problem = "; ".join(f"{finding.topic}: {finding.facts['problem']}" for finding in here)
    if problem is not None:
        return Finding("verdict", f"will not: {problem}", ok=False, facts=facts)
    named = " and ".join(f"{finding.topic} {finding.facts['version']}" for finding in working)
    where = f"in {named}" if working else "after adaptive_moe.install()"
    if settings.mode is Mode.FIXED:
        policy = settings.fixed_policy or 0
        what = "" if policy in POLICIES else f", {meaning_of(policy)}"
        text = f"fixed policy {policy} for every call {where}{what}; nothing is measured"
    else:
        text = f"will choose {where}: what no stored table is for is measured at warm-up"
    return Finding("verdict", text, facts=facts)


def _not_accepted(environ: Mapping[str, str]) -> str | None:
    """What is wrong with the policy that was asked for, if anything."""
    names = (VLLM_VARIABLE, NEUTRAL_VARIABLE)
    _, problems = read_for_serving({n: environ[n] for n in names if n in environ})
    return problems[0] if problems and "disagree" not in problems[0] else None


def _vllm_refuses(engines: list[Finding], environ: Mapping[str, str]) -> str | None:
    """Why vLLM would end at its start over its own variable. It reads it with int(); `auto` and
    `off` are words that our plugin teaches it."""
    word = environ.get(VLLM_VARIABLE, "").strip()
    vllm = next((f for f in engines if f.topic == "vllm" and f.facts["version"]), None)
    if vllm is None or not word or not vllm_refuses(word):
        return None
    if not vllm.facts["plugin_loaded"]:
        return (
            f"vLLM does not start: {vllm.facts['problem']}; without the plugin "
            f"{VLLM_VARIABLE}={word!r} is a ValueError there"
        )
    _, problems = read_for_serving({VLLM_VARIABLE: word})
    return f"vLLM does not start: {problems[0].partition('; ')[0]}" if problems else None
