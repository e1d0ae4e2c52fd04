"""Many processes measure and keep the same shapes and different ones, at the same time."""

import itertools
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from adaptive_moe.kernels import SortKernel, load_kernel
from adaptive_moe.policy.coverage import Coverage
from adaptive_moe.policy.evidence import Evidence, Rule
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.shape import SortingShape
from adaptive_moe.store.folder import Folder, read_file, stored_files
from adaptive_moe.store.key import TableKey, key_for
from adaptive_moe.store.shared import SharedStore
from adaptive_moe.store.tables import Stores, table_for
from adaptive_moe.store.write import temporary_files
from adaptive_moe.tuning.calibrate import Plan, calibrate

from .damaged import listening
from .processes import finish_all, start

COVERAGES = tuple(
    Coverage.up_to(SortingShape(num_experts, 2, 32), 8) for num_experts in (4, 8, 12, 16)
)
PLAN = Plan(first=(1, 8), budget_s=60.0, rule=Rule(min_rounds=2, max_rounds=6))


def key_of_coverage(kernel: SortKernel, coverage: Coverage) -> TableKey:
    return key_for(kernel, coverage, PLAN.rule, engine="test", first=PLAN.first)


def measure(kernel: SortKernel, coverage: Coverage, earlier: Evidence | None = None) -> PolicyTable:
    """A real calibration of a few rounds, however busy the machine is: each look at the clock
    costs a second of the budget."""
    looks = itertools.count()
    return calibrate(kernel, coverage, PLAN, earlier=earlier, now=lambda: float(next(looks)))


def run(processes: int, rounds: int) -> dict[str, Any]:
    """Counts of hits, files and whatever went wrong."""
    torch.set_num_threads(1)
    kernel = load_kernel("cpu")
    measure(kernel, COVERAGES[0])  # what torch imports on first use, once for all children
    keys = [key_of_coverage(kernel, coverage) for coverage in COVERAGES]
    failures: Counter[str] = Counter()
    origins: Counter[str] = Counter()
    files = hits = 0
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Folder(Path(name) / "cache")
            gate, opener = os.pipe()

            def work(place: int, folder: Folder = folder, gate: int = gate) -> list[str]:
                os.close(opener)  # noqa: B023  the child's own copy
                os.read(gate, 1)  # until the parent closes its end: all begin at once
                first, second = place % len(COVERAGES), (place // len(COVERAGES)) % len(COVERAGES)
                with SharedStore(lambda: None) as shared, listening() as lines:
                    # Half of them measure whatever is there, so that many write the same file.
                    stores = Stores(folder, shared, recalibrate=place % 2 == 0)
                    served = [
                        table_for(
                            *(keys[i], stores),
                            lambda earlier, i=i: measure(kernel, COVERAGES[i], earlier),
                            PLAN.budget_s,
                        )
                        for i in {first, second}
                    ]
                return [*(one.origin for one in served), *lines]

            children = [start(lambda place=place: work(place)) for place in range(processes)]
            os.close(gate)
            os.close(opener)
            for answer in finish_all(children):
                if "result" not in answer:
                    failures[str(answer)[-300:]] += 1
                    continue
                origins.update(answer["result"])
            with listening() as lines:
                hits += sum(folder.get(key) is not None for key in keys)
            failures.update(lines)
            for path in stored_files(folder.path):
                files += 1
                read_file(path)
            if temporary_files(folder.path):
                failures["a temporary file stayed behind"] += 1
    if hits != rounds * len(keys):
        failures["a later reader missed"] = rounds * len(keys) - hits
    failures.update({line: n for line, n in origins.items() if line not in ("measured", "stored")})
    return {
        "processes": processes,
        "rounds": rounds,
        "tables_by_origin": dict(origins),
        "files": files,
        "later_readers": rounds * len(keys),
        "hits": hits,
        "failures": dict(failures),
    }
