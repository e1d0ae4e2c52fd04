"""Every kernel variant compiles to a code object for AMD GPUs, with none present.

calibration/compile_triton_amd.py says which variants those are and how they are compiled. The
recorded run has them all; here those of the most experts are compiled anew, since a kernel that
starts to spill does so with the most first.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from adaptive_moe.kernels import triton_sort
from adaptive_moe.kernels.triton_launches import Launch
from calibration.compile_triton_amd import EXPERTS, record

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("gfx942", "gfx950")
AMD_SHARED_MEMORY = 64 * 1024  # of a workgroup, gfx942
AMD_VECTOR_REGISTERS = 128  # with more, a SIMD holds under four wavefronts
AMD_WAVES = 16  # of a workgroup
FEW_EXPERTS = (513,)
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    path = ROOT / "calibration/results/triton_amd.json"
    result: dict[str, Any] = json.loads(path.read_text())
    return result


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    """Target -> variant -> what was compiled; from nothing, since the cache folder is new."""
    folder = tmp_path_factory.mktemp("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    out = folder / "out.json"
    command = [sys.executable, "-m", "calibration.compile_triton_amd", "--out", str(out)]
    command += ["--targets", *TARGETS, "--experts", *map(str, FEW_EXPERTS)]
    child = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert child.returncode == 0, child.stderr[-3000:]
    result: dict[str, Results] = json.loads(out.read_text())["targets"]
    return result


def variants(*experts: int) -> int:
    """One-shot's tiles and five launches, with options and without; two more dtypes."""

    def kernels(experts: int) -> int:
        return sum(experts in tile.experts for tile in triton_sort.TUNING.tiles) + 5

    return 2 * sum(map(kernels, experts)) + 2 * kernels(1)


def check_amd(results: Results, target: str) -> None:
    for name, result in results.items():
        assert result["is_elf"], name
        assert result["architecture"] == target, name
        assert result["wavefront"] == 64, name
        assert result["vgpr"] <= AMD_VECTOR_REGISTERS, name
        assert result["num_warps"] <= AMD_WAVES, name
        spilled = [result[key] for key in ("vgpr_spills", "sgpr_spills", "scratch_bytes")]
        assert spilled == [0, 0, 0], name
        assert result["static_lds_bytes"] + result["shared_bytes"] <= AMD_SHARED_MEMORY, name


@pytest.mark.parametrize("target", ["gfx942", "gfx950"])
def test_amd_code_objects_neither_spill_nor_use_scratch(
    compiled: dict[str, Results], target: str
) -> None:
    assert len(compiled[target]) == variants(*FEW_EXPERTS)
    check_amd(compiled[target], target)


@pytest.mark.parametrize("target", ["gfx942", "gfx950"])
def test_the_recorded_registers_are_those_of_these_kernels(
    recorded: dict[str, Any], compiled: dict[str, Results], target: str
) -> None:
    import triton

    results = recorded["targets"][target]
    assert len(results) == variants(*EXPERTS)
    check_amd(results, target)
    if recorded["triton"] == triton.__version__:
        same = compiled[target].keys() & results.keys()
        assert len(same) == variants(*FEW_EXPERTS)  # those with 513 experts, and the dtypes
        assert {name: compiled[target][name] for name in same} == {
            name: results[name] for name in same
        }


def small(*_: object, **options: Any) -> torch.Tensor:
    """In place of a large buffer, which is never touched here."""
    return torch.empty(1, **options)


def launches(**case: Any) -> list[Launch]:
    return [launch for launch, _ in record(**case)]


def test_one_launch_against_two_or_three() -> None:
    def names(tokens: int) -> list[str]:
        return [launch.kernel.__name__ for launch in launches(experts=256, tokens=tokens)]

    assert names(64) == ["one_shot_kernel", "count_kernel", "place_kernel"]
    largest = triton_sort.TUNING.tiles[-1].entries
    assert names(largest)[0] == "one_shot_kernel"
    assert names(triton_sort.TUNING.many_counts // 256)[-3:] == [
        "count_kernel",
        "scan_kernel",
        "place_kernel",
    ]


def test_a_token_count_compiles_no_more_than_its_tile() -> None:
    """A token count is neither in the key of what is compiled nor in what it is compiled for."""
    entries = triton_sort.TUNING.tiles[-1].entries
    keys = {launch.variant for tokens in range(1, entries, 7) for launch in launches(
        experts=256, tokens=tokens)}  # fmt: skip
    one_shot = [tile for tile in triton_sort.TUNING.tiles if 256 in tile.experts]
    assert len(keys) == len(one_shot) + 2
    for launch, tensors in record(experts=256, options=True):
        arguments = (*tensors, *launch.constants)
        for parameter, value in zip(launch.kernel.params, arguments, strict=True):
            if isinstance(value, int) and not parameter.is_constexpr:
                assert parameter.do_not_specialize, parameter.name


@pytest.mark.parametrize("policy", [0, 1, 2])
@pytest.mark.parametrize("most", [100, 5000, 70000, 200000])
def test_after_the_fewest_and_the_most_entries_no_number_compiles(
    policy: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a stored table is checked, before a capture that must not compile."""
    compiled: list[tuple[Launch, object]] = []
    monkeypatch.setattr(triton_sort, "_compile", compiled.extend)
    monkeypatch.setattr(triton_sort, "_launch", lambda *_: None)
    monkeypatch.setattr(triton_sort, "_bound", {})

    def variants_of(entries: int) -> set[tuple[object, ...]]:
        compiled.clear()
        ids = torch.zeros(entries, 1, dtype=torch.int32)
        triton_sort.moe_sorting(ids, ids.float(), 256, 8, torch.bfloat16, dispatch_policy=policy)
        return {launch.variant for launch, _ in compiled}

    known = variants_of(1) | variants_of(most)
    for entries in (2, 16, 17, 33, 100, 129, 257, 4096, 4097, 65535, 65536, 70000, 131073):
        if entries <= most:
            assert variants_of(entries) <= known, entries


def test_where_experts_are_not_counted_their_number_compiles_nothing() -> None:
    assert launches(experts=8, tokens=8)[0].variant == launches(experts=1000, tokens=8)[0].variant


def test_a_buffer_of_2_gib_takes_the_kernels_of_a_smaller_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton for AMD would compile anew for it, maybe while a graph is captured."""
    monkeypatch.setattr(torch, "empty_strided", small)
    plain, large = (launches(tokens=64, experts=256, model_dim=dim) for dim in (128, 1 << 24))
    assert [one.variant for one in plain] == [one.variant for one in large]
    for launch in plain:
        (moe_buf,) = (one for one in launch.kernel.params if one.name == "moe_buf")
        assert moe_buf.do_not_specialize


@pytest.mark.parametrize(
    "other",
    [
        {"experts": 257},
        {"experts": 256, "options": True},
        {"experts": 256, "dtype": torch.float32},
    ],
)
def test_what_is_compiled_apart_has_a_key_of_its_own(other: dict[str, Any]) -> None:
    plain = {launch.variant for launch in launches(experts=256, tokens=64)}
    assert plain.isdisjoint({launch.variant for launch in launches(tokens=64, **other)})
