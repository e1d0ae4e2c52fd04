"""Which of AITER's sorts can be given rows of padding, whose expert ids are -1.

Engines mark rows of padding by -1 (docs/padding.md says which, when). A sorting kernel that takes
such an id for an index writes in front of its mesh: another expert's entries, or a memory fault of
the GPU. Which kernels look first changed over AITER's versions, and a source checkout keeps its
version over pulls; so the installed sources are read, and the version only where they say nothing.
Nothing of AITER is imported, and what cannot be told counts as not guarded.

Read in ROCm/aiter v0.1.11 to main of 2026-08-22, amd-aiter 0.1.7.post2.dev18, and the pull requests
ROCm/aiter#4839, #5295, #5638 and ROCm/rocm-libraries#6242.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path


class Kernel(Enum):
    """What may answer a call, as far as padding is concerned; the value names it in words."""

    OPUS_ONE_SHOT = "Opus one-shot"
    OPUS_MULTI_PHASE = "Opus multi-phase below 2,048 tokens"
    OPUS_MULTI_PHASE_LARGE = "Opus multi-phase from 2,048 tokens"
    CK_ONE_SHOT = "CK one-shot"
    CK_MULTI_PHASE = "CK multi-phase below 2,048 tokens"
    CK_MULTI_PHASE_LARGE = "CK multi-phase from 2,048 tokens"
    FLYDSL_ONE_SHOT = "FlyDSL one-shot"
    FLYDSL_MULTI_PHASE = "FlyDSL multi-phase up to 2,048 tokens"
    FLYDSL_MULTI_PHASE_LARGE = "FlyDSL multi-phase above 2,048 tokens"


# The first release that is known to guard all of Opus and FlyDSL.
GUARDED_SINCE = (0, 1, 22, 1)
_LARGE = 2048
# One-shot kernels of Opus and CK get half of 64 KiB, on gfx950 too: the host asks for no more.
_LDS_INTS = 64 * 1024 // 4 // 2
# From here on policy 0 takes multi-phase at any count (ROCm/aiter#3986); before that PR it did not.
_MANY_EXPERTS = 512


def one_shot_rows(num_experts: int) -> int:
    """Tokens that the one-shot kernel of Opus and CK sorts in one turn: 904 for 8 experts, 24 for
    256. 0 from 819 experts on: there the kernel has no room for a row and *never returns*, so that
    policy 1 must not be asked for (policy 0 does not choose it).

    Source: moe_sorting_get_smem_row_col and the loop over i_token in moe_sorting_opus.h.
    """
    rows = _LDS_INTS // (num_experts + 1) - 2
    return max(rows // 8 * 8, 0)


def kernels_for(
    backend: str, dispatch_policy: int, num_tokens: int, num_experts: int, topk: int
) -> frozenset[Kernel]:
    """The kernels that may answer a call: one, or several where AITER's versions differ.

    backend: `opus`, `ck` or `flydsl`, as it will really run; FlyDSL knows no policy. Raises
    ValueError for another.
    """
    if backend == "flydsl":
        if num_tokens <= max(16, 256 // max(topk, num_experts // 8)):
            # Less fits into 64 KiB with many experts; then it is the other one.
            return frozenset({Kernel.FLYDSL_ONE_SHOT, Kernel.FLYDSL_MULTI_PHASE})
        if num_tokens > _LARGE:
            return frozenset({Kernel.FLYDSL_MULTI_PHASE_LARGE})
        return frozenset({Kernel.FLYDSL_MULTI_PHASE})
    if backend not in ("opus", "ck"):
        raise ValueError(f"backend {backend!r} is not known: give opus, ck or flydsl")
    large = "_LARGE" if num_tokens >= _LARGE else ""
    one_shot = Kernel[f"{backend.upper()}_ONE_SHOT"]
    multi_phase = Kernel[f"{backend.upper()}_MULTI_PHASE{large}"]
    if dispatch_policy == 1:
        return frozenset({one_shot})
    if dispatch_policy != 0 or num_tokens > one_shot_rows(num_experts):
        return frozenset({multi_phase})
    # CK never had the exception for many experts.
    either = backend == "opus" and num_experts >= _MANY_EXPERTS
    return frozenset({one_shot, multi_phase} if either else {one_shot})


def refusal(
    unsafe: Mapping[Kernel, str], candidate: frozenset[Kernel], baseline: frozenset[Kernel]
) -> str | None:
    """Why `candidate` may not be offered where rows of padding can occur; None if it may.

    It may if all its kernels are guarded, or if it runs just what the baseline runs.
    unsafe: what `unguarded` found.
    """
    if candidate == baseline:
        return None
    return next((unsafe[kernel] for kernel in Kernel if kernel in candidate & unsafe.keys()), None)


def unguarded(
    package: Path, version: str, environ: Mapping[str, str] | None = None
) -> dict[Kernel, str]:
    """The kernels that do not guard ids of -1, each with a sentence that says so and what to do.

    package: the folder of the module `aiter`; version: as installed, or anything. environ may name
    other sources by AITER_META_DIR and CK_DIR, as AITER itself reads them.
    """
    texts = {
        backend: (path, _without_comments(path))
        for backend, path in _sources(package, environ or {}).items()
        if path.is_file()
    }
    found = {}
    for kernel, probe in _PROBES.items():
        backend = kernel.name.split("_")[0].lower()
        path, text = texts.get(backend, (None, ""))
        guarded = _is_guarded(probe, text)
        if guarded is None:
            guarded = backend != "ck" and _at_least(version, GUARDED_SINCE)
            said = f"nothing says that {kernel.value} of AITER {version} skips"
        else:
            said = f"{kernel.value} of AITER {version} does not skip"
        if not guarded:
            where = f" ({path})" if path else ""
            found[kernel] = (
                f"{said} expert ids of -1, as rows of padding have{where}: {_FIX[backend]}"
            )
    return found


_UPDATE = "update AITER to v0.1.22.post1 or newer (ROCm/aiter#5295)"
_FIX = {
    "opus": _UPDATE,
    "flydsl": _UPDATE,
    "ck": "unset AITER_USE_CK_MOE_SORTING and update AITER to v0.1.22.post1 or newer, whose Opus "
    "sort does",
}


def _sources(package: Path, environ: Mapping[str, str]) -> dict[str, Path]:
    """Where AITER takes its kernels from: of a wheel, `aiter_meta`; of a checkout, its root."""
    named = environ.get("AITER_META_DIR")
    root = package.parent
    places = [*([Path(named)] if named else []), root / "aiter_meta"]
    meta = next((place for place in places if (place / "csrc").is_dir()), root)
    ck = Path(environ.get("CK_DIR") or meta / "3rdparty/composable_kernel")
    return {
        "opus": meta / "csrc/include/moe_sorting_opus.h",
        "ck": ck / "include/ck_tile/ops/fused_moe/kernel/moe_sorting_kernel.hpp",
        "flydsl": package / "ops/flydsl/kernels/moe_sorting_kernel.py",
    }


@dataclass(frozen=True)
class _Probe:
    """Where in a source one kernel is, where it reads an expert id, and where it uses the id as an
    index. With no uses, `reads` is a comparison that is a guard by itself."""

    begins: str
    reads: str
    uses: str = ""


_ONE_SHOT = _Probe(
    r"\bstruct MoeSortingKernel\b",
    r"\beid\s*=[^;]*\btopk_id\w*\s*\[",
    r"\bsmem_tokens\(\s*curr_token_id\s*,\s*eid\s*\)|\blocal_expert_mask\s*\[\s*eid\s*\]",
)
_SMALL = _Probe(r"\bstruct MoeSortingMultiPhaseKernel_P0_v2\b", r"==\s*eid\b|\beid\s*==")
_LARGE_MESH = _Probe(
    r"\bstruct MoeSortingMultiPhaseKernel_P0_v1\b",
    r"\beid\s*=[^;]*\bx\s*\[",
    r"\bp_expert_mesh\s*\[\s*eid\b",
)
_PROBES = {
    Kernel.OPUS_ONE_SHOT: _ONE_SHOT,
    Kernel.OPUS_MULTI_PHASE: _SMALL,
    Kernel.OPUS_MULTI_PHASE_LARGE: _LARGE_MESH,
    Kernel.CK_ONE_SHOT: _ONE_SHOT,
    Kernel.CK_MULTI_PHASE: _SMALL,
    Kernel.CK_MULTI_PHASE_LARGE: _LARGE_MESH,
    Kernel.FLYDSL_ONE_SHOT: _Probe(
        r"\bdef moe_sorting_oneshot_kernel\b",
        r"\beid\s*=\s*buffer_ops\.buffer_load\(",
        r"\b_lds_store_raw\(\s*mesh_mr\b",
    ),
    Kernel.FLYDSL_MULTI_PHASE: _Probe(r"\bdef p0v2_kernel\b", r"==\s*eid\b|\beid\s*=="),
    Kernel.FLYDSL_MULTI_PHASE_LARGE: _Probe(
        r"\bdef p0_scatter_kernel\b",
        r"\beid\s*=\s*buffer_ops\.buffer_load\(",
        r"\bbuffer_ops\.buffer_store\(",
    ),
}
# The next kernel, in either language.
_ENDS = re.compile(r"^(?:template\b|struct\b)|^\s*@flyc\.", re.MULTILINE)
_ZERO = r"(?:0|c_zero\w*|(?:fx\.)?Int32\(0\))"
_LOWER_BOUND = re.compile(
    rf"\beid\s*(?:>=|<)\s*{_ZERO}(?!\w)|(?<!\w){_ZERO}\s*(?:<=|>)\s*eid\b"
    r"|\beid\s*>\s*-1\b|\b(?:unsigned|uint32_t)(?: int)?\s*>?\s*\)?\s*\(?\s*eid\b"
)
# Conditions of another kind: a helper's, or a comparison we cannot read.
_UNREADABLE = re.compile(r"\b(?!if\b|while\b)\w+\(\s*eid\b|\beid\.\w+\(|[<>!]=?\s*eid\b")


def _is_guarded(probe: _Probe, text: str) -> bool | None:
    """Does the kernel look at an id before it uses it? None where its text does not tell."""
    begin = re.search(probe.begins, text)
    if begin is None:
        return None
    end = _ENDS.search(text, begin.end())
    kernel = text[begin.end() : end.start() if end else len(text)]
    if not probe.uses:
        return True if re.search(probe.reads, kernel) else None
    answers = [_answer(between) for between in _from_read_to_use(probe, kernel)]
    if False in answers:
        return False
    return None if not answers or None in answers else True


def _from_read_to_use(probe: _Probe, kernel: str) -> Iterator[str]:
    reads = list(re.finditer(probe.reads, kernel))
    for read, following in zip(reads, [*reads[1:], None], strict=True):
        span = kernel[read.end() : following.start() if following else len(kernel)]
        use = re.search(probe.uses, span)
        # A read whose use is not found answers None: no lower bound, and a call that hides one.
        yield span[: use.start()] if use else "unreadable(eid)"


def _answer(between: str) -> bool | None:
    if _LOWER_BOUND.search(between):
        return True
    return None if _UNREADABLE.search(between) else False


def _without_comments(path: Path) -> str:
    """A remark about a bound must not be taken for one."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".py":
        return re.sub(r"#[^\n]*", "", text)
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)


def _at_least(version: str, wanted: tuple[int, int, int, int]) -> bool:
    """Is it that release or a later one? Development versions of it come before it."""
    match = re.match(r"v?(\d+)\.(\d+)\.(\d+)(?:\.post(\d+))?", version)
    if match is None:
        return False
    release = tuple(int(part or 0) for part in match.groups())
    early = re.search(r"dev|rc|a\d|b\d", version[match.end() :].partition("+")[0])
    return release > wanted if early else release >= wanted
