"""Which of AITER's sorts guard ids of -1, read off small made-up source trees."""

from pathlib import Path

import pytest

from adaptive_moe.kernels.aiter_padding import (
    Kernel,
    kernels_for,
    one_shot_rows,
    refusal,
    unguarded,
)

ONE_SHOT = """
template <typename P>
struct MoeSortingKernel
{{
    D void sort(const int* topk_id) const
    {{
        for(;;)
        {{
            int eid = topk_id[slot];
            {first}
                smem_tokens(curr_token_id, eid) = 1;
        }}
        for(int eid = lane; eid < num_experts; eid += 8)
            if(local_expert_mask[eid] == 0) continue;
        for(;;)
        {{
            int eid = topk_id[slot];
            {second}
                smem_tokens(curr_token_id, eid) = 2;
        }}
    }}
}};
"""
LARGE = """
template <typename P>
struct MoeSortingMultiPhaseKernel_P0_v1
{{
    D void operator()() const
    {{
        auto x = ids[i]; IndexType eid = x[j]; // eid >= 0 is what a reader would expect here
        /* or eid >= 0 here */
        {large}
            p_expert_mesh[eid * stride + curr_token_id] = 1;
    }}
}};
"""
SMALL = """
template <typename P>
struct MoeSortingMultiPhaseKernel_P0_v2
{
    D void operator()() const { const int eid = blockIdx.x; if(eid_x == eid) mesh[t] = 1; }
};
"""
FLYDSL = """
@flyc.kernel
def moe_sorting_oneshot_kernel():
    eid = buffer_ops.buffer_load(topk, at)
    {one_shot}
    _lds_store_raw(mesh_mr, val, where)

@flyc.kernel
def p0_scatter_kernel():
    eid = buffer_ops.buffer_load(topk, at)  # eid >= 0
    {large}
    if valid:
        buffer_ops.buffer_store(val, ws, eid * stride)

@flyc.kernel
def p0v2_kernel():
    is_mine = valid & (expert_id == eid)
"""
BOUND = "if(eid >= 0 && eid < num_experts)"
UPPER = "if(eid < num_experts)"
OPUS = (Kernel.OPUS_ONE_SHOT, Kernel.OPUS_MULTI_PHASE, Kernel.OPUS_MULTI_PHASE_LARGE)
FLY = (Kernel.FLYDSL_ONE_SHOT, Kernel.FLYDSL_MULTI_PHASE, Kernel.FLYDSL_MULTI_PHASE_LARGE)
CK = (Kernel.CK_ONE_SHOT, Kernel.CK_MULTI_PHASE, Kernel.CK_MULTI_PHASE_LARGE)


def header(first: str = "", second: str = "", large: str = UPPER) -> str:
    return ONE_SHOT.format(first=first, second=second) + LARGE.format(large=large) + SMALL


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def opus(root: Path, text: str, meta: str = "aiter_meta") -> Path:
    put(root / meta / "csrc/include/moe_sorting_opus.h", text)
    return root / "aiter"


def bare(package: Path, version: str = "0.1.20") -> set[Kernel]:
    return set(unguarded(package, version))


def test_august_guards_only_what_compares_ids(tmp_path: Path) -> None:
    package = opus(tmp_path, header())
    found = unguarded(package, "0.1.20")
    assert Kernel.OPUS_MULTI_PHASE not in found
    assert {Kernel.OPUS_ONE_SHOT, Kernel.OPUS_MULTI_PHASE_LARGE} <= found.keys()
    said = found[Kernel.OPUS_MULTI_PHASE_LARGE]
    assert "from 2,048 tokens of AITER 0.1.20 does not skip" in said
    assert "moe_sorting_opus.h" in said
    assert "update AITER to v0.1.22.post1 or newer" in said


@pytest.mark.parametrize(
    "guard",
    [
        BOUND,
        "if(0 <= eid && eid < num_experts)",
        "if(eid < 0 || eid >= num_experts) continue;",
        "if(static_cast<uint32_t>(eid) < n)",
        "const bool is_routed = eid >= 0 && eid < num_experts; if(is_routed)",
    ],
)
def test_a_lower_bound_between_read_and_use_guards(tmp_path: Path, guard: str) -> None:
    package = opus(tmp_path, header(guard, guard, guard))
    assert not bare(package, "a checkout") & set(OPUS)


def test_each_kernel_is_judged_by_itself(tmp_path: Path) -> None:
    package = opus(tmp_path, header(large=BOUND))
    assert bare(package) & set(OPUS) == {Kernel.OPUS_ONE_SHOT}


def test_every_use_of_a_kernel_has_to_be_guarded(tmp_path: Path) -> None:
    package = opus(tmp_path, header(first=BOUND, second="", large=BOUND))
    assert Kernel.OPUS_ONE_SHOT in bare(package)


def test_content_is_believed_before_the_version(tmp_path: Path) -> None:
    assert Kernel.OPUS_ONE_SHOT in bare(opus(tmp_path / "old", header()), "0.1.27")
    guarded = opus(tmp_path / "new", header(BOUND, BOUND, BOUND))
    assert Kernel.OPUS_ONE_SHOT not in bare(guarded, "0.1.9")


@pytest.mark.parametrize(
    ("version", "guarded"),
    [
        ("0.1.22.post1", True),
        ("v0.1.22.post1+rocm7.2", True),
        ("0.1.22.post2.dev3", True),
        ("0.1.27", True),
        ("0.2.0", True),
        ("0.1.22", False),
        ("0.1.22.post1.dev3+gabc", False),
        ("0.1.9", False),
        ("(version unknown)", False),
    ],
)
def test_the_version_decides_what_the_content_does_not(
    tmp_path: Path, version: str, guarded: bool
) -> None:
    helper = "if(is_expert(eid, num_experts))"
    package = opus(tmp_path, header(helper, helper, helper))
    found = bare(package, version)
    assert (Kernel.OPUS_ONE_SHOT not in found) is guarded
    assert (Kernel.OPUS_MULTI_PHASE_LARGE not in found) is guarded
    # Sources that are not there, or not as we know them, say nothing either.
    assert (Kernel.FLYDSL_ONE_SHOT not in found) is guarded
    elsewhere = opus(tmp_path / "other", "struct SomethingElse {};")
    assert (Kernel.OPUS_MULTI_PHASE not in bare(elsewhere, version)) is guarded


def test_what_cannot_be_told_is_said_to_be_so(tmp_path: Path) -> None:
    said = unguarded(tmp_path / "aiter", "0.1.9")[Kernel.OPUS_ONE_SHOT]
    assert said.startswith("nothing says that Opus one-shot of AITER 0.1.9 skips")


def test_ck_is_never_guarded_by_a_version(tmp_path: Path) -> None:
    found = unguarded(tmp_path / "aiter", "0.1.27")
    assert set(CK) == found.keys()
    assert "AITER_USE_CK_MOE_SORTING" in found[Kernel.CK_ONE_SHOT]


def test_ck_is_read_where_aiter_takes_it_from(tmp_path: Path) -> None:
    kernel = "include/ck_tile/ops/fused_moe/kernel/moe_sorting_kernel.hpp"
    package = opus(tmp_path, header())
    put(tmp_path / "aiter_meta/3rdparty/composable_kernel" / kernel, header(large=BOUND))
    assert bare(package) & set(CK) == {Kernel.CK_ONE_SHOT}
    put(tmp_path / "own" / kernel, header())
    environ = {"CK_DIR": str(tmp_path / "own")}
    assert Kernel.CK_MULTI_PHASE_LARGE in unguarded(package, "", environ)


def test_a_checkout_is_read_at_its_root_and_a_named_folder_before_all(tmp_path: Path) -> None:
    package = opus(tmp_path, header(BOUND, BOUND, BOUND), meta=".")
    assert not bare(package) & set(OPUS)
    opus(tmp_path, header(), meta="elsewhere")
    environ = {"AITER_META_DIR": str(tmp_path / "elsewhere")}
    assert Kernel.OPUS_ONE_SHOT in unguarded(package, "", environ)


def test_flydsl_is_read_from_its_python(tmp_path: Path) -> None:
    path = tmp_path / "aiter/ops/flydsl/kernels/moe_sorting_kernel.py"
    put(path, FLYDSL.format(one_shot="where = row * cols + eid", large="at = eid * stride"))
    assert bare(tmp_path / "aiter") & set(FLY) == {FLY[0], FLY[2]}
    guard = "valid = valid & (eid >= c_zero_i32) & (eid < c_E)"
    put(path, FLYDSL.format(one_shot=guard, large="at = eid * stride"))
    assert bare(tmp_path / "aiter") & set(FLY) == {FLY[2]}
    put(path, FLYDSL.format(one_shot=guard, large=guard))
    assert not bare(tmp_path / "aiter") & set(FLY)


# AITER's own numbers: what fits into LDS for the one-shot kernel.
@pytest.mark.parametrize(
    ("num_experts", "rows"),
    [(8, 904), (128, 56), (256, 24), (385, 16), (818, 8), (819, 0), (896, 0)],
)
def test_rows_of_the_one_shot_kernel(num_experts: int, rows: int) -> None:
    assert one_shot_rows(num_experts) == rows


@pytest.mark.parametrize(
    ("call", "kernels"),
    [
        (("opus", 0, 24, 256, 8), {Kernel.OPUS_ONE_SHOT}),
        (("opus", 0, 25, 256, 8), {Kernel.OPUS_MULTI_PHASE}),
        (("opus", 1, 4096, 256, 8), {Kernel.OPUS_ONE_SHOT}),
        (("opus", 2, 1, 256, 8), {Kernel.OPUS_MULTI_PHASE}),
        (("opus", 2, 2047, 256, 8), {Kernel.OPUS_MULTI_PHASE}),
        (("opus", 0, 2048, 256, 8), {Kernel.OPUS_MULTI_PHASE_LARGE}),
        (("opus", 0, 8, 512, 10), {Kernel.OPUS_ONE_SHOT, Kernel.OPUS_MULTI_PHASE}),
        (("opus", 0, 1, 896, 16), {Kernel.OPUS_MULTI_PHASE}),
        (("ck", 0, 8, 512, 10), {Kernel.CK_ONE_SHOT}),
        (("ck", 2, 2048, 8, 2), {Kernel.CK_MULTI_PHASE_LARGE}),
        (("flydsl", 0, 32, 64, 8), {Kernel.FLYDSL_ONE_SHOT, Kernel.FLYDSL_MULTI_PHASE}),
        (("flydsl", 0, 33, 64, 8), {Kernel.FLYDSL_MULTI_PHASE}),
        (("flydsl", 0, 2048, 256, 8), {Kernel.FLYDSL_MULTI_PHASE}),
        (("flydsl", 0, 2049, 256, 8), {Kernel.FLYDSL_MULTI_PHASE_LARGE}),
    ],
)
def test_which_kernel_answers(call: tuple[str, int, int, int, int], kernels: set[Kernel]) -> None:
    assert kernels_for(*call) == kernels


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="'triton' is not known: give opus, ck or flydsl"):
        kernels_for("triton", 0, 1, 8, 2)


def test_an_unguarded_kernel_is_refused_unless_the_baseline_runs_just_that(tmp_path: Path) -> None:
    august = unguarded(opus(tmp_path, header()), "0.1.20")

    def asked(candidate: int, baseline: int, num_tokens: int, num_experts: int = 256) -> str | None:
        return refusal(
            august,
            kernels_for("opus", candidate, num_tokens, num_experts, 8),
            kernels_for("opus", baseline, num_tokens, num_experts, 8),
        )

    assert asked(1, 0, 8) is None  # both run one-shot
    assert asked(2, 0, 8) is None  # multi-phase compares ids
    assert asked(2, 0, 4096) is None  # both run what could fault
    assert "one-shot" in str(asked(1, 0, 25))
    assert "one-shot" in str(asked(0, 2, 8))
    assert "one-shot" in str(asked(1, 0, 8, 512))  # policy 0 may be either there
    fly = kernels_for("flydsl", 0, 4096, 256, 8)
    assert "FlyDSL" in str(refusal(august, fly, kernels_for("opus", 2, 4096, 256, 8)))
    assert refusal({}, fly, kernels_for("opus", 2, 4096, 256, 8)) is None
