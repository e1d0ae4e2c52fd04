"""What is here, and what would happen: nothing is measured, no engine is imported."""

import importlib.metadata
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from adaptive_moe import __version__
from adaptive_moe.engines.vllm import plugin_problem
from adaptive_moe.kernels.aiter import find_aiter
from adaptive_moe.settings import ENGINE_VARIABLE, VARIABLES, Mode, SettingsError, read_settings

PLUGIN_GROUPS = {"vllm": "vllm.general_plugins", "sglang": "sglang.srt.plugins"}


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis."""

    topic: str
    text: str


def diagnose(environ: Mapping[str, str]) -> list[Finding]:
    """Every finding, first the machine, then the variables, last what would happen."""
    findings = [
        Finding("adaptive-moe", __version__),
        Finding("python", f"{platform.python_version()} on {platform.platform()}"),
        Finding("torch", _torch()),
        Finding("aiter", describe_aiter()),
    ]
    for engine, group in PLUGIN_GROUPS.items():
        findings.append(Finding(engine, _engine(engine, group)))
    for variable in VARIABLES:
        value = environ.get(variable.name)
        shown = f"{value!r}" if value else f"unset ({variable.default})"
        findings.append(
            Finding(variable.name, f"{shown}; {variable.meaning}; accepts {variable.accepts}")
        )
    findings.append(Finding("calls", _calls()))
    findings.append(Finding("would happen", _outlook(environ)))
    return findings


def describe_aiter() -> str:
    """Which `aiter` is importable: AMD's, PyPI's unrelated one, or none. Imports neither."""
    found = find_aiter()
    return found.problem or f"AMD's AITER {found.version} in {found.location}"


def _torch() -> str:
    try:
        import torch
    except ImportError as error:
        return f"not importable ({error}): pip install torch"
    if not torch.cuda.is_available():
        return f"{torch.__version__}, CPU only ({torch.get_num_threads()} threads)"
    from adaptive_moe.policy.environment import describe_environment

    found = describe_environment(torch.device("cuda", torch.cuda.current_device()))
    return (
        f"{found.torch}, {found.device} ({found.arch}, {found.compute_units} CUs, {found.runtime})"
    )


def _engine(name: str, group: str) -> str:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    ours = [e for e in importlib.metadata.entry_points(group=group) if e.name == "adaptive_moe"]
    return f"{version}; plugin {'registered' if ours else 'not registered'} in {group}"


def _calls() -> str:
    process = sys.modules.get("adaptive_moe.engines.process")
    counts = None if process is None else process.counts()
    if counts is None or not counts.total:
        return (
            "none sorted in this process; where one serves, adaptive_moe.counts() tells, or "
            "adaptive_moe.cli.doctor.diagnose(os.environ)"
        )
    return ", ".join(f"{number} {name}" for name, number in asdict(counts).items() if number)


def _outlook(environ: Mapping[str, str]) -> str:
    try:
        settings = read_settings(environ)
    except SettingsError as error:
        return f"an error: {error}"
    if settings.mode is Mode.OFF:
        return f"nothing: AITER and the engine as they are; {ENGINE_VARIABLE}=auto turns us on"
    if settings.mode is Mode.FIXED:
        return f"policy {settings.fixed_policy} for every call; nothing is measured"
    problem = plugin_problem(environ)
    if problem is not None:
        return f"an error in vLLM: {problem}"
    if find_aiter().problem is not None:
        return "`auto` is accepted, but without AMD's AITER it changes nothing"
    return "each sorting shape is measured at warm-up and every batch gets its own policy"
