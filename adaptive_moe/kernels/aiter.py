"""The live AITER: what is installed, whether its seam is the one we know, and its sort as a kernel.

Read in ROCm/aiter from v0.1.5 to main of 2026-08-22: `aiter.fused_moe.moe_sorting` keeps its first
nine parameters, `dispatch_policy` being the ninth, while those after it differ by version.
"""

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

MODULE = "aiter.fused_moe"
SEAM = "moe_sorting"
# What picks block_size for a token count, called just before each sort.
CHOOSER = "get_2stage_cfgs"
# What the seam calls under Opus and CK, since v0.1.11; others have put theirs in its place.
IMPLEMENTATION = "_moe_sorting_impl"
LEADING = (
    "topk_ids",
    "topk_weights",
    "num_experts",
    "model_dim",
    "moebuf_dtype",
    "block_size",
    "expert_mask",
    "num_local_tokens",
    "dispatch_policy",
)

# Parameters after the ninth that have been; which of them there are differs by version.
KNOWN = ("return_local_topk_ids", "accumulate", "flat", "output_aux", "output")
# Those that make AITER leave out the sort, or the policy.
UNSORTED = ("flat", "output_aux")
# Those that are a tensor to write to.
BUFFERS = ("output",)

_Result = TypeVar("_Result")

# AMD's package has been called both; PyPI's unrelated one is called the second.
_DISTRIBUTIONS = ("amd-aiter", "aiter")
# What the rest of AITER's names for "the second stage reduces by itself" have been.
REDUCES = ("stage2_uses_route_reduce", "is_flydsl_stage2_reduce")


@dataclass(frozen=True)
class AiterInstall:
    """What `import aiter` would find. problem is None where it is AMD's and knows of policies."""

    version: str
    location: str
    problem: str | None


def find_aiter() -> AiterInstall:
    """Look for AITER without importing it; its import builds kernels and needs a GPU."""
    try:
        return _find_aiter()
    except Exception as error:  # another's module, or files that cannot be read
        problem = f"AITER cannot be looked at: {type(error).__name__}: {error}"
        return AiterInstall("", "", problem)


def _find_aiter() -> AiterInstall:
    spec = importlib.util.find_spec("aiter")
    if spec is None:
        return AiterInstall("", "", "AITER is not installed (no module named aiter)")
    folders = list(spec.submodule_search_locations or [])
    location = folders[0] if folders else str(spec.origin)
    version = installed_version()
    sources = [text for folder in folders for text in _sources(Path(folder))]
    if not sources:
        problem = (
            f"the installed `aiter` {version} at {location} has no fused_moe: it is PyPI's "
            "unrelated package of that name, not AMD's AITER; pip uninstall aiter, then install "
            "AITER from https://github.com/ROCm/aiter"
        )
        return AiterInstall(version, location, problem)
    if not any("dispatch_policy" in text for text in sources):
        problem = (
            f"AITER {version} at {location} takes no dispatch_policy, so there is nothing to "
            "choose: install AITER v0.1.5 or newer from https://github.com/ROCm/aiter"
        )
        return AiterInstall(version, location, problem)
    return AiterInstall(version, location, None)


def _sources(folder: Path) -> list[str]:
    """The text of AITER's fused_moe, a module or a package."""
    paths = [folder / "fused_moe.py", *sorted((folder / "fused_moe").glob("*.py"))]
    return [p.read_text(encoding="utf-8", errors="replace") for p in paths if p.is_file()]


def installed_version() -> str:
    """As the package metadata says; a source checkout may have none, or an old one."""
    for name in _DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "(version unknown)"


def is_failure(error: BaseException) -> bool:
    """Any Exception, and the SystemExit with a message by which AITER ends a failed build. One
    without is how a process is told to end, and must pass on."""
    is_exit = isinstance(error, SystemExit) and isinstance(error.code, str)
    return is_exit or isinstance(error, Exception)


def run_without_exit(call: Callable[[], _Result]) -> _Result:
    """call(), with a RuntimeError in the place of such a SystemExit."""
    try:
        return call()
    except SystemExit as error:
        if not is_failure(error):
            raise
        raise RuntimeError(error.code) from error


def seam_problem(module: ModuleType) -> str | None:
    """Why `module.moe_sorting` cannot be wrapped, in a sentence with what to do; None if it can."""
    seam = getattr(module, SEAM, None)
    if seam is None:
        return (
            f"{module.__name__} has no {SEAM}: this is not the AITER we know; install AITER v0.1.5 "
            "or newer from https://github.com/ROCm/aiter"
        )
    parameters = inspect.signature(seam).parameters
    names = tuple(parameters)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        return None  # another tool's wrapper, which passes on what it is given
    if "dispatch_policy" not in names:
        return (
            f"this AITER's {SEAM}({', '.join(names)}) takes no dispatch_policy, so there is "
            "nothing to choose: install AITER v0.1.5 or newer"
        )
    if names[: len(LEADING)] != LEADING:
        return (
            f"this AITER's {SEAM}({', '.join(names)}) does not begin with {', '.join(LEADING)}: "
            "it is newer than this adaptive_moe knows; upgrade adaptive_moe"
        )
    return None


def meaning_of(policy: int) -> str:
    """What AITER does with a policy, in words. It compares with 0 and 1 and knows no others."""
    return {0: "AITER's own choice, by what fits", 1: "one-shot", 2: "multi-phase"}.get(
        policy, "no policy of AITER's, which takes it as 2, multi-phase"
    )


@dataclass(frozen=True)
class SortRequest:
    """What AITER will ask of the sort at one token count. sorts: False where it takes a path that
    ignores the policy (flat, output_aux)."""

    block_size: int
    accumulate: bool
    sorts: bool


@dataclass(frozen=True)
class ConfigCall:
    """How AITER's `get_2stage_cfgs` was asked for block_size and stages: all arguments but the
    first, which is the token count; these describe the layer."""

    rest: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]


def request_at(
    module: ModuleType, choose: Callable[..., Any], call: ConfigCall, num_tokens: int
) -> SortRequest:
    """Ask AITER's chooser what `num_tokens` rows of that layer will be sorted as."""
    pad = getattr(module, "get_padded_M", None)
    padded = pad(num_tokens) if pad is not None else num_tokens
    found = choose(padded, *call.rest, **dict(call.keywords))
    reduces = next((getattr(module, name) for name in REDUCES if hasattr(module, name)), None)
    return SortRequest(
        block_size=int(found.block_m),
        accumulate=not (reduces is not None and found.stage2 is not None and reduces(found.stage2)),
        sorts=not (getattr(found, "flat", False) or getattr(found, "output_aux", False)),
    )
