"""Every kernel variant compiles to a code object for AMD and NVIDIA GPUs, with none present.

The variants are those that `moe_sorting` asks for when called: its launches are recorded with CPU
tensors and compiled for each target in a child process (this file, started as a script). Bins are
covered fully, and every run-time option is there and absent with each of them; the options are
independent branches, so both-on and both-off reach all code. The buffer's dtype only changes the
width of one store: each is compiled once.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

TARGETS = {
    "gfx942": ("hip", "gfx942", 64),
    "gfx950": ("hip", "gfx950", 64),
    "sm_90": ("cuda", 90, 32),
}
EXPERTS = (1, 33, 65, 129, 257, 513)  # the fewest of 32, 64, ... 1,024 bins
AMD_SHARED_MEMORY = 64 * 1024  # of a workgroup, gfx942
Launch = tuple[Any, tuple[object, ...], tuple[object, ...]]


def record(*, experts: int, tokens: int = 64, options: bool = False, **more: Any) -> list[Launch]:
    """Kernel, variant and arguments of each launch of one-shot and multi-phase."""
    from adaptive_moe.kernels import triton_sort

    launches: list[Launch] = []
    kept = triton_sort._launch
    triton_sort._launch = lambda kernel, _, variant, args: launches.append((kernel, variant, args))
    try:
        for policy in (1, 2):
            triton_sort.moe_sorting(
                torch.zeros(tokens, 1, dtype=torch.int32),
                torch.zeros(tokens, 1),
                experts,
                more.get("model_dim", 128),
                more.get("dtype", torch.bfloat16),
                expert_mask=torch.ones(experts, dtype=torch.int32) if options else None,
                num_local_tokens=torch.ones(1, dtype=torch.int32) if options else None,
                dispatch_policy=policy,
            )
    finally:
        triton_sort._launch = kept
    return launches


def all_launches() -> dict[str, Launch]:
    named = {}
    for experts in EXPERTS:
        for options in (False, True):
            for kernel, variant, args in record(experts=experts, options=options):
                named[f"{kernel.__name__}, {experts} experts, options {options}"] = (
                    kernel, variant, args
                )  # fmt: skip
    for dtype in (torch.float16, torch.float32):
        for kernel, variant, args in record(experts=1, dtype=dtype)[:2]:
            named[f"{kernel.__name__}, {dtype}"] = (kernel, variant, args)
    return named


def source(launch: Launch, backend: str) -> Any:
    """The launch as Triton's compiler takes it: types and alignment in place of values."""
    from triton.compiler import ASTSource

    kernel, variant, args = launch
    types = {torch.int32: "*i32", torch.float32: "*fp32", torch.bfloat16: "*bf16",
             torch.float16: "*fp16"}  # fmt: skip
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = types[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
            if parameter.do_not_specialize_on_alignment:
                attributes[(i,)] = []
            # What Triton adds on AMD for buffers under 2 GiB; a larger one is a variant.
            if backend == "hip" and not (parameter.name == "moe_buf" and variant[3]):
                attributes[(i,)] += [["tt.pointer_range", 32]]
        elif parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        else:
            signature[parameter.name] = "i32"
    return ASTSource(kernel, signature, constants, attributes)


def compile_all(target: str) -> dict[str, dict[str, object]]:
    import triton
    from triton.backends.compiler import GPUTarget

    from adaptive_moe.kernels.triton_sort import NUM_WARPS

    backend, architecture, width = TARGETS[target]
    results = {}
    for name, launch in all_launches().items():
        compiled = triton.compile(
            source(launch, backend),
            target=GPUTarget(backend, architecture, width),
            options={"num_warps": NUM_WARPS},
        )
        code = compiled.asm["hsaco" if backend == "hip" else "cubin"]
        text = compiled.asm["amdgcn" if backend == "hip" else "ptx"]
        results[name] = {
            "is_elf": bytes(code[:4]) == b"\x7fELF",
            "warp_size": compiled.metadata.warp_size,
            "shared": compiled.metadata.shared,
            "wavefront": re.findall(r"\.wavefront_size:\s+(\d+)", text),
            "static_shared": re.findall(r"\.group_segment_fixed_size:\s+(\d+)", text),
            "architecture": re.findall(r'\.amdgcn_target "[\w.-]*-(gfx\w+)"', text)
            or re.findall(r"\.target (\w+)", text),
        }
    return results


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, Any]]]:
    """Target -> variant -> what was compiled; from nothing, since the cache folder is new."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    children = {
        target: subprocess.Popen(
            [sys.executable, __file__, target],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for target in TARGETS
    }  # fmt: skip
    results = {}
    for target, child in children.items():
        out, err = child.communicate()
        assert child.returncode == 0, f"{target}: {err[-3000:]}"
        results[target] = json.loads(out.splitlines()[-1])
    return results


@pytest.mark.parametrize("target", ["gfx942", "gfx950"])
def test_amd_code_objects(compiled: dict[str, Any], target: str) -> None:
    assert len(compiled[target]) == len(EXPERTS) * 2 * 3 + 4
    for name, result in compiled[target].items():
        assert result["is_elf"], name
        assert result["architecture"] == [target], name
        assert result["warp_size"] == 64, name
        assert result["wavefront"] == ["64"], name
        static = sum(map(int, result["static_shared"]))
        assert static + result["shared"] <= AMD_SHARED_MEMORY, name


def test_nvidia_cubins(compiled: dict[str, Any]) -> None:
    assert len(compiled["sm_90"]) == len(EXPERTS) * 2 * 3 + 4
    for name, result in compiled["sm_90"].items():
        assert result["is_elf"], name
        assert result["architecture"][0].startswith("sm_90"), name


def test_one_launch_against_two() -> None:
    names = [kernel.__name__ for kernel, _, _ in record(experts=256)]
    assert names == ["_one_shot_kernel", "_count_kernel", "_place_kernel"]


def test_token_counts_never_compile() -> None:
    """A token count is neither in the key of what is compiled nor in what it is compiled for."""
    keys = {variant for tokens in range(1, 300) for _, variant, _ in record(
        experts=256, tokens=tokens)}  # fmt: skip
    assert len(keys) == 3
    for kernel, _, args in record(experts=256, options=True):
        for parameter, value in zip(kernel.params, args, strict=True):
            if isinstance(value, int) and not parameter.is_constexpr:
                assert parameter.do_not_specialize, parameter.name


@pytest.mark.parametrize(
    "other",
    [
        {"experts": 257},
        {"experts": 256, "options": True},
        {"experts": 256, "dtype": torch.float32},
        {"experts": 256, "tokens": 64, "model_dim": 1 << 24},  # 2 GiB of bfloat16
    ],
)
def test_what_is_compiled_apart_has_a_key_of_its_own(
    other: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.empty

    def small(*size: Any, **options: Any) -> torch.Tensor:
        """Large buffers are never touched here; do not allocate them."""
        return real(1, **options) if size and isinstance(size[0], tuple) else real(*size, **options)

    monkeypatch.setattr(torch, "empty", small)
    plain = {variant for _, variant, _ in record(experts=256)}
    assert plain.isdisjoint({variant for _, variant, _ in record(**other)})


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    print(json.dumps(compile_all(sys.argv[1])))
