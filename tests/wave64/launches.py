"""The Triton sort compiled for an AMD target, its launches run by cdna.py on CPU tensors."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from adaptive_moe.kernels import triton_sort
from adaptive_moe.kernels.triton_launches import Launch
from calibration.compile_triton_amd import Recorded, compiled_ahead, source
from tests.wave64 import cdna

_ARGUMENT = re.compile(r"\.offset:\s+(\d+)\n\s+\.size:\s+(\d+)\n\s+\.value_kind:\s+(\w+)")
_programs: dict[tuple[str, str, int], "Compiled"] = {}


@dataclass(frozen=True)
class Compiled:
    """arguments: offset, size and kind of each, in the block of `kernarg_size` bytes."""

    program: cdna.Program
    arguments: list[tuple[int, int, str]]
    kernarg_size: int
    shared_bytes: int
    user_sgprs: int
    preloaded: int
    preloaded_entry: int


def programs_by_name(target: str) -> dict[str, cdna.Program]:
    """All that were run so far, each with how often each of its instructions was."""
    return {
        f"{source_hash} {waves}": compiled.program
        for (its_target, source_hash, waves), compiled in _programs.items()
        if its_target == target
    }


def _compiled(recorded: Recorded, target: str) -> Compiled:
    launch, _ = recorded
    key = (target, source(recorded, "hip").hash(), launch.num_warps)
    if key not in _programs:
        made = compiled_ahead(recorded, target)
        text = made.asm["amdgcn"]
        program = cdna.Program(text, re.search(r"\.globl\s+(\w+)", text)[1])
        _programs[key] = Compiled(
            program,
            [
                (int(offset), int(size), kind)
                for offset, size, kind in _ARGUMENT.findall(text[text.index(".amdgpu_metadata") :])
            ],
            int(re.search(r"kernarg_segment_size:\s+(\d+)", text)[1]),
            made.metadata.shared,
            int(re.search(r"amdhsa_user_sgpr_count (\d+)", text)[1]),
            int(re.search(r"kernarg_preload_length (\d+)", text)[1]),
            program.labels.get(".LBB0_0", 0),
        )
    return _programs[key]


def _kernel_arguments(compiled: Compiled, values: list[int], grid: int, threads: int) -> bytes:
    block = bytearray(compiled.kernarg_size)
    hidden = {"hidden_block_count_x": grid, "hidden_block_count_y": 1, "hidden_block_count_z": 1,
              "hidden_group_size_x": threads, "hidden_group_size_y": 1, "hidden_group_size_z": 1,
              "hidden_grid_dims": 1, "hidden_dynamic_lds_size": compiled.shared_bytes}  # fmt: skip
    given = iter([*values, 0, 0])  # the last two are Triton's scratch pointers: null
    for offset, width, kind in compiled.arguments:
        value = hidden.get(kind, 0) if kind.startswith("hidden_") else next(given)
        block[offset : offset + width] = value.to_bytes(width, "little", signed=value < 0)
    assert next(given, None) is None
    return bytes(block)


@contextmanager
def on_wave64(target: str, seed: int = 0) -> Iterator[None]:
    """Within it the launches of `moe_sorting` are run by the interpreter. `seed` picks the order of
    groups and waves and what registers and LDS hold at first; odd ones start where a kernel starts
    whose arguments were preloaded, even ones where firmware without preloading starts it."""

    def launch(launch: Launch, tensors: tuple[torch.Tensor | None, ...]) -> None:
        compiled = _compiled((launch, tensors), target)
        there = [tensor for tensor in tensors if tensor is not None]
        values = [tensor.data_ptr() for tensor in there]
        for parameter, value in zip(
            launch.kernel.params[len(tensors) :], launch.constants, strict=True
        ):
            if not parameter.is_constexpr:
                values.append(value)
        waves = launch.num_warps
        preload = compiled.preloaded if seed % 2 else 0
        cdna.launch(
            compiled.program,
            launch.programs,
            waves,
            _kernel_arguments(compiled, values, launch.programs, 64 * waves),
            [
                (tensor.data_ptr(), tensor.reshape(-1).view(torch.uint8).numpy())
                for tensor in there
                if tensor.numel()
            ],
            compiled.shared_bytes,
            user_sgprs=compiled.user_sgprs,
            preload=preload,
            entry=compiled.preloaded_entry if preload else 0,
            seed=seed,
        )

    kept = triton_sort._launch
    triton_sort._launch = launch
    try:
        yield
    finally:
        triton_sort._launch = kept
