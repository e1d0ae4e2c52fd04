"""What the Triton sort compiles to for AMD GPUs: registers, spills, scratch and shared memory.

    python calibration/compile_triton_amd.py --out calibration/results/triton_amd.json

Needs no GPU. The variants are those that `moe_sorting` asks for when called: its launches are
recorded with CPU tensors and compiled ahead. Bins are covered fully, and every run-time option is
there and absent with each of them; the options are independent branches, so both-on and both-off
reach all code. The buffer's dtype only changes the width of one store: each is compiled once.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from adaptive_moe.kernels import triton_sort

TARGETS = {
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
    "sm_90": GPUTarget("cuda", 90, 32),
}
EXPERTS = (1, 33, 65, 129, 257, 513)  # the fewest of 32, 64, ... 1,024 bins
POINTERS = {
    torch.int32: "*i32", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"
}  # fmt: skip
# As the metadata of an AMD code object calls them.
RESOURCES = {
    "vgpr": "vgpr_count",
    "agpr": "agpr_count",
    "sgpr": "sgpr_count",
    "vgpr_spills": "vgpr_spill_count",
    "sgpr_spills": "sgpr_spill_count",
    "scratch_bytes": "private_segment_fixed_size",
    "static_lds_bytes": "group_segment_fixed_size",
    "wavefront": "wavefront_size",
}
Launch = tuple[Any, tuple[object, ...], tuple[object, ...]]


def record(*, experts: int, tokens: int = 64, options: bool = False, **more: Any) -> list[Launch]:
    """Kernel, variant and arguments of each launch of one-shot and multi-phase."""
    launches: list[Launch] = []
    kept = triton_sort._launch
    triton_sort._launch = lambda kernel, _, *rest: launches.append((kernel, *rest))
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


def all_launches(some_experts: Sequence[int]) -> dict[str, Launch]:
    """Name -> launch, of every variant there is but for the combinations named above."""
    cases: list[dict[str, Any]] = [
        {"experts": experts, "options": options}
        for experts in some_experts
        for options in (False, True)
    ]
    cases += [{"experts": 1, "dtype": dtype} for dtype in (torch.float16, torch.float32)]
    named = {}
    for case in cases:
        words = ", ".join(f"{key} {value}" for key, value in case.items())
        launches = record(**case)
        names = ["one-shot", "multi-phase count", "multi-phase place"]
        for name, launch in zip(names, launches, strict=True):
            named[f"{name}, {words}"] = launch
    return named


def source(launch: Launch, backend: str) -> ASTSource:
    """The launch as Triton's compiler takes it: types and alignment in place of values."""
    kernel, variant, args = launch
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
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


def compile_all(target: str, experts: Sequence[int] = EXPERTS) -> dict[str, dict[str, Any]]:
    """Variant -> what the code object says of itself."""
    gpu = TARGETS[target]
    results = {}
    for name, launch in all_launches(experts).items():
        compiled = triton.compile(
            source(launch, gpu.backend),
            target=gpu,
            options={"num_warps": triton_sort.NUM_WARPS},
        )
        amd = gpu.backend == "hip"
        code, text = (
            compiled.asm["hsaco" if amd else "cubin"],
            compiled.asm["amdgcn" if amd else "ptx"],
        )
        result: dict[str, Any] = {"is_elf": bytes(code[:4]) == b"\x7fELF"}
        if amd:
            result["architecture"] = re.findall(r'\.amdgcn_target "[\w.-]*-(gfx\w+)"', text)[0]
            for ours, theirs in RESOURCES.items():
                result[ours] = int(re.findall(rf"\.{theirs}:\s+(\d+)", text)[0])
        else:
            result["architecture"] = re.findall(r"\.target (\w+)", text)[0]
        results[name] = {**result, "shared_bytes": compiled.metadata.shared}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["gfx942", "gfx950"])
    parser.add_argument("--experts", nargs="+", type=int, default=EXPERTS)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    result = {
        "command": "python calibration/compile_triton_amd.py",
        "triton": triton.__version__,
        "num_warps": triton_sort.NUM_WARPS,
        "targets": {target: compile_all(target, arguments.experts) for target in arguments.targets},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for target, variants in result["targets"].items():
        for key in ("vgpr", "sgpr", "vgpr_spills", "sgpr_spills", "scratch_bytes", "shared_bytes"):
            if values := [variant[key] for variant in variants.values() if key in variant]:
                print(f"{target} {key}: {min(values)} to {max(values)}")


if __name__ == "__main__":
    main()
