"""Our Triton sorts, executed as the AMD code that they compile to: many random calls, no GPU.

    python -m calibration.wave64 --out calibration/results/wave64.json

tests/wave64/cdna.py interprets the gfx942 and gfx950 assembly instruction by instruction on waves
of 64 lanes, on registers and LDS that begin as garbage, with waves in random order; an access
outside a launch's tensors and an unsynchronised access of LDS are errors. Each sort is judged by
the contract and beside the CPU sort. It does not model time, waits, caches between dies, HIP's
launcher or graph capture. Exit status 1 where anything is wrong.
"""

import argparse
import math
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
JOB = 20  # cases
NOTHING = ("s_nop", "s_code_end")  # padding between instructions, which never runs


def run_some(job: tuple[str, range, float]) -> dict[str, Any]:
    """The cases of these numbers on one target, unless the deadline is over."""
    target, numbers, deadline = job
    torch.set_num_threads(1)
    programs = launches.programs_by_name(target)
    for program in programs.values():
        program.ran.clear()
    wrong, done, began = [], 0, time.process_time()
    for number in numbers:
        if time.time() > deadline:
            break
        done += 1
        if problems := problems_of(random_case(number), target):
            wrong.append({"case": str(random_case(number)), "problems": problems})
    programs = launches.programs_by_name(target)
    executed = {
        name: {at for at in program.ran if program.code[at].name not in NOTHING}
        for name, program in programs.items()
    }
    sizes = {
        name: sum(instruction.name not in NOTHING for instruction in program.code)
        for name, program in programs.items()
    }
    return {
        "sorts": done, "wrong": wrong, "executed": executed, "sizes": sizes,
        "opcodes": {programs[name].code[at].name for name, some in executed.items() for at in some},
        "instructions": sum(sum(program.ran.values()) for program in programs.values()),
        "seconds": time.process_time() - began,
    }  # fmt: skip


def summary(parts: list[dict[str, Any]]) -> dict[str, Any]:
    executed: dict[str, set[int]] = {}
    for part in parts:
        for key, some in part["executed"].items():
            executed.setdefault(key, set()).update(some)
    sizes = {key: size for part in parts for key, size in part["sizes"].items()}
    return {
        "sorts": sum(part["sorts"] for part in parts),
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
    parser.add_argument("--seconds", type=float, default=math.inf, help="start none after so long")
    args = parser.parse_args()
    result = {**record.stamp(), "triton": triton.__version__, "numpy": numpy.__version__}
    result["cases"] = f"of random_case, from number {args.first} on"
    deadline, numbers = time.time() + args.seconds, range(args.first, args.first + args.sorts)
    # Targets take turns, so that what time leaves out is left out of both.
    jobs = [
        (target, numbers[start : start + JOB], deadline)
        for start in range(0, args.sorts, JOB)
        for target in TARGETS
    ]
    parts: dict[str, list[dict[str, Any]]] = {target: [] for target in TARGETS}
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for (target, *_), part in zip(jobs, pool.imap(run_some, jobs), strict=True):
            parts[target].append(part)
            print(target, summary(parts[target]), file=sys.stderr, flush=True)
    result |= {target: summary(parts[target]) for target in TARGETS}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(record.as_text(result) + "\n")
    return int(any(result[target]["wrong_sorts"] for target in TARGETS))


if __name__ == "__main__":
    sys.exit(main())
