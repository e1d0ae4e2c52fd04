"""What the Triton sort compiles to for AMD GPUs: registers, spills, scratch and shared memory.

    python -m calibration.compile_triton_amd --out calibration/results/triton_amd.json

Needs no GPU. The variants are those that `moe_sorting` asks for when called: its launches are
recorded with CPU tensors and compiled ahead. Bins are covered fully, and every run-time option is
there and absent with each of them; the options are independent branches, so both-on and both-off
reach all code. The buffer's dtype only changes the width of one store: each is compiled once.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adaptive_moe.kernels import triton_sort
from adaptive_moe.kernels.triton_launches import Launch

TARGETS = {
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
    "sm_90": GPUTarget("cuda", 90, 32),
}
# The fewest experts of each number of bins, in one power of two or in two.
EXPERTS = (1, 33, 65, 129, 161, 193, 257, 289, 321, 385, 513, 545, 577, 641, 769)
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
Recorded = tuple[Launch, tuple[torch.Tensor | None, ...]]


def record(*, experts: int, tokens: int = 64, options: bool = False, **more: Any) -> list[Recorded]:
    """The launches of one-shot and of multi-phase for so many entries, with their tensors."""
    launches: list[Recorded] = []
    kept = triton_sort._launch
    triton_sort._launch = lambda *launch: launches.append(launch)
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


def all_launches(some_experts: Sequence[int]) -> dict[str, Recorded]:
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
        for tile in triton_sort.TUNING.tiles:
            if case["experts"] in tile.experts:
                one_shot = record(tokens=tile.entries, **case)[0]
                named[f"one-shot up to {tile.entries}, {words}"] = one_shot
        _, _, named[f"multi-phase add up and place, {words}"] = record(tokens=64, **case)
        entries = triton_sort.TUNING.many_counts // 256
        for name, launch in zip(
            ("count", "add up", "place"), record(tokens=entries, **case)[-3:], strict=True
        ):
            named[f"multi-phase {name}, {words}"] = launch
        more = triton_sort.TUNING.most_entries + 1
        named[f"multi-phase place, most entries, {words}"] = record(tokens=more, **case)[-1]
    return named


def source(recorded: Recorded, backend: str) -> ASTSource:
    """The launch as Triton's compiler takes it: types and alignment in place of values."""
    launch, tensors = recorded
    kernel = launch.kernel
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(
        zip(kernel.params, (*tensors, *launch.constants), strict=True)
    ):
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(i,)] = []
            if not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
                attributes[(i,)] += [["tt.divisibility", 16]]
            # What Triton adds on AMD for buffers under 2 GiB, as all are but for moe_buf.
            if backend == "hip" and not parameter.do_not_specialize:
                attributes[(i,)] += [["tt.pointer_range", 32]]
        elif parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        else:
            signature[parameter.name] = "i32"
    return ASTSource(kernel, signature, constants, attributes)


def compiled_ahead(recorded: Recorded, target: str) -> Any:
    """Triton's compiled kernel, for a GPU that need not be here."""
    gpu = TARGETS[target]
    options = {"num_warps": recorded[0].num_warps}
    return triton.compile(source(recorded, gpu.backend), target=gpu, options=options)


def compile_all(target: str, experts: Sequence[int] = EXPERTS) -> dict[str, dict[str, Any]]:
    """Variant -> what the code object says of itself."""
    gpu = TARGETS[target]
    results = {}
    for name, recorded in all_launches(experts).items():
        compiled = compiled_ahead(recorded, target)
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
        results[name] = {
            **result,
            "num_warps": recorded[0].num_warps,
            "shared_bytes": compiled.metadata.shared,
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["gfx942", "gfx950"])
    parser.add_argument("--experts", nargs="+", type=int, default=EXPERTS)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    result = {
        "command": "python -m calibration.compile_triton_amd",
        "triton": triton.__version__,
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
