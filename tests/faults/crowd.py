"""Many processes calibrate and publish the same shapes and different ones, at the same time."""

import itertools
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from adaptive_moe.disk.folder import Store, key_for, read_file, stored_files
from adaptive_moe.disk.write import temporary_files
from adaptive_moe.kernels import SortKernel, load_kernel
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.decision import Rule
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.shape import SortingShape
from adaptive_moe.tuning.calibrator import Plan, calibrate

from .corrupt import listening
from .processes import finish_all, start

COVERAGES = tuple(
    Coverage.up_to(SortingShape(num_experts, 2, 32), 8) for num_experts in (4, 8, 12, 16)
)
PLAN = Plan(first=(1, 8), budget_s=60.0, rule=Rule(min_rounds=2, max_rounds=6))


def measure(kernel: SortKernel, coverage: Coverage) -> PolicyTable:
    """A real calibration of a few rounds, however busy the machine is: each look at the clock
    costs a second of the budget."""
    looks = itertools.count()
    return calibrate(kernel, coverage, PLAN, now=lambda: float(next(looks)))


def run(processes: int, rounds: int) -> dict[str, Any]:
    """Counts of hits, files and whatever went wrong."""
    torch.set_num_threads(1)
    kernel = load_kernel("cpu")
    measure(kernel, COVERAGES[0])  # what torch imports on first use, once for all children
    keys = [key_for(kernel, coverage, PLAN, "test") for coverage in COVERAGES]
    failures: Counter[str] = Counter()
    files = hits = published = found_by_another = 0
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "cache"
            gate, opener = os.pipe()

            def work(place: int, folder: Path = folder, gate: int = gate) -> dict[str, int]:
                os.close(opener)  # noqa: B023  the child's own copy
                os.read(gate, 1)  # until the parent closes its end: all begin at once
                own, other = place % len(COVERAGES), (place // len(COVERAGES)) % len(COVERAGES)
                # Half of them measure whatever is there, so that many publish the same file.
                store = Store(folder, recalibrate=place % 2 == 0)
                tables, hit = {}, 0
                for i in {own, other}:
                    found = store.load(keys[i])
                    hit += found is not None
                    tables[keys[i]] = found.table if found else measure(kernel, COVERAGES[i])
                return {"published": store.publish(tables), "wanted": len(tables), "hit": hit}

            children = [start(lambda place=place: work(place)) for place in range(processes)]
            os.close(gate)
            os.close(opener)
            for answer in finish_all(children):
                if "result" not in answer:
                    failures[str(answer)[-300:]] += 1
                    continue
                found_by_another += answer["result"]["hit"]
                published += answer["result"]["published"]
                if answer["result"]["published"] != answer["result"]["wanted"]:
                    failures["not everything was published"] += 1
            with listening() as lines:
                hits += sum(Store(folder).load(key) is not None for key in keys)
            failures.update(lines)
            for path in stored_files(folder):
                files += 1
                read_file(path)
            if temporary_files(folder):
                failures["a temporary file stayed behind"] += 1
    return {
        "processes": processes,
        "rounds": rounds,
        "published": published,
        "served_by_another_process_meanwhile": found_by_another,
        "files": files,
        "later_readers": rounds * len(keys),
        "hits": hits,
        "failures": dict(failures),
    }
