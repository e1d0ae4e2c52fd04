"""What is here, and what would happen: nothing is measured, no engine is imported."""

import importlib.metadata
import importlib.util
import platform
from collections.abc import Mapping
from dataclasses import dataclass

from adaptive_moe import __version__
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
    findings.append(Finding("would happen", _outlook(environ)))
    return findings


def describe_aiter() -> str:
    """Which `aiter` is importable: AMD's, PyPI's unrelated one, or none. Imports neither."""
    spec = importlib.util.find_spec("aiter")
    if spec is None:
        return "not installed: nothing to choose for; the cpu and triton kernels still calibrate"
    folders = list(spec.submodule_search_locations or ())
    if importlib.machinery.PathFinder.find_spec("aiter.fused_moe", folders) is None:
        return (
            f"{spec.origin} is not AMD's AITER but PyPI's unrelated `aiter` (async iterators): "
            "uninstall it and install AITER from https://github.com/ROCm/aiter"
        )
    try:
        version = importlib.metadata.version("amd-aiter")
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    return f"AMD's AITER {version} in {folders[0] if folders else spec.origin}"


def _torch() -> str:
    try:
        import torch
    except ImportError as error:
        return f"not importable ({error}): pip install torch"
    if not torch.cuda.is_available():
        return f"{torch.__version__}, CPU only ({torch.get_num_threads()} threads)"
    from adaptive_moe.environment import describe_environment

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


def _outlook(environ: Mapping[str, str]) -> str:
    try:
        settings = read_settings(environ)
    except SettingsError as error:
        return f"an error: {error}"
    if settings.mode is Mode.OFF:
        return f"nothing: AITER and the engine as they are; {ENGINE_VARIABLE}=auto turns us on"
    if settings.mode is Mode.FIXED:
        return f"policy {settings.fixed_policy} for every call; nothing is measured"
    if not describe_aiter().startswith("AMD's"):
        return "`auto` is accepted, but without AMD's AITER it changes nothing"
    return "each sorting shape is measured at warm-up and every batch gets its own policy"
