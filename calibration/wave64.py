"""Our Triton sorts, executed as the AMD code that they compile to: many random calls, no GPU.

    python -m calibration.wave64 --out calibration/results/wave64.json

tests/wave64/cdna.py interprets the gfx942 and gfx950 assembly instruction by instruction on waves
of 64 lanes, on registers and LDS that begin as garbage, with waves in random order; an access
outside a launch's tensors and an unsynchronised access of LDS are errors. Each sort is judged by
the contract and beside the CPU sort. It does not model time, waits, caches between dies, HIP's
launcher or graph capture. Exit status 1 where anything is wrong.
"""

import argparse
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton does now, without a warning

import numpy
import torch
import triton

from calibration import record
from tests.wave64 import launches
from tests.wave64.cases import problems_of, random_case

TARGETS = ("gfx942", "gfx950")
NOTHING = ("s_nop", "s_code_end")  # padding between instructions, which never runs


def run_some(job: tuple[str, int, int, int]) -> dict[str, Any]:
    """Every `step`th of `sorts` cases, from the `first` on, on one target."""
    target, first, step, sorts = job
    torch.set_num_threads(1)
    wrong, began = [], time.process_time()
    for seed in range(first, sorts, step):
        if problems := problems_of(random_case(seed), target):
            wrong.append({"case": str(random_case(seed)), "problems": problems})
    programs = launches.programs_by_name()
    executed = {
        name: {
            at
            for at, times in program.ran.items()
            if times and program.code[at].name not in NOTHING
        }
        for name, program in programs.items()
    }
    opcodes = {programs[name].code[at].name for name, some in executed.items() for at in some}
    sizes = {
        name: sum(instruction.name not in NOTHING for instruction in program.code)
        for name, program in programs.items()
    }
    instructions = sum(sum(program.ran.values()) for program in programs.values())
    return {
        "wrong": wrong, "opcodes": opcodes, "executed": executed, "sizes": sizes,
        "instructions": instructions, "seconds": time.process_time() - began,
    }  # fmt: skip


def summary(parts: list[dict[str, Any]], sorts: int) -> dict[str, Any]:
    executed: dict[str, set[int]] = {}
    for part in parts:
        for key, some in part["executed"].items():
            executed.setdefault(key, set()).update(some)
    sizes = {key: size for part in parts for key, size in part["sizes"].items()}
    return {
        "sorts": sorts,
        "wrong_sorts": sum(len(part["wrong"]) for part in parts),
        "wrong": [one for part in parts for one in part["wrong"]][:50],
        "code_objects": len(sizes),
        "share_of_their_instructions_executed": round(
            sum(map(len, executed.values())) / sum(sizes.values()), 4
        ),
        "opcodes_executed": len(set().union(*(part["opcodes"] for part in parts))),
        "wave_instructions": sum(part["instructions"] for part in parts),
        "cpu_seconds": round(sum(part["seconds"] for part in parts)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sorts", type=int, default=1000, help="on each target [1000]")
    parser.add_argument("--first", type=int, default=1, help="number of the first case [1]")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    result = {**record.stamp(), "triton": triton.__version__, "numpy": numpy.__version__}
    result["cases"] = f"numbers {args.first} to {args.first + args.sorts - 1} of random_case"
    context = multiprocessing.get_context("spawn")
    for target in TARGETS:
        jobs = [
            (target, args.first + part, args.processes, args.first + args.sorts)
            for part in range(args.processes)
        ]
        with context.Pool(args.processes) as pool:
            result[target] = summary(pool.map(run_some, jobs), args.sorts)
        print(target, result[target], flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(record.as_text(result) + "\n")
    return int(any(result[target]["wrong_sorts"] for target in TARGETS))


if __name__ == "__main__":
    sys.exit(main())
