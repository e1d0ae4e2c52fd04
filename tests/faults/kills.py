"""SIGKILL at random moments of measuring, writing and renaming."""

import mmap
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from adaptive_moe.kernels import load_kernel
from adaptive_moe.store import folder as folder_module
from adaptive_moe.store.folder import Folder
from adaptive_moe.store.write import STALE_AFTER_S, temporary_files
from tests.store.making import KEY, another

from .crowd import COVERAGES, key_of_coverage, measure
from .damaged import listening
from .processes import finish, kill, start

PHASES = ("between", "measuring", "writing", "flushing", "renaming", "flushing the folder")


def run(kills: int, seed: int = 0) -> dict[str, Any]:
    """Two in three kills hit a child that only writes, the others one that also measures."""
    torch.set_num_threads(1)
    chance = random.Random(seed)
    kernel = load_kernel("cpu")
    measured_key = key_of_coverage(kernel, COVERAGES[0])
    measured = measure(kernel, COVERAGES[0])
    known = [another(), another()]
    phases: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name, mmap.mmap(-1, 1) as phase:
        folder = Folder(Path(name) / "cache")
        folder.replace(KEY, known[0])
        folder.replace(measured_key, measured)
        for number in range(kills):
            measures = number % 3 == 0

            def work(measures: bool = measures) -> None:
                _report_phases(phase)
                while True:
                    for table in known:
                        folder.replace(KEY, table)
                    if measures:
                        phase[0] = 1
                        table = measure(kernel, COVERAGES[0])
                        phase[0] = 0
                        folder.replace(measured_key, table)

            child = start(work)
            time.sleep(chance.uniform(0.005, 0.150 if measures else 0.060))
            kill(child)
            ended = finish(child)
            if "signal" not in ended:
                failures[f"not killed: {ended}"[-300:]] += 1
            phases[PHASES[phase[0]]] += 1
            phase[0] = 0
            with listening() as lines:
                if folder.get(KEY) not in known:
                    failures["the last good table is gone"] += 1
                if folder.get(measured_key) is None:
                    failures["the last measured table is gone"] += 1
                # The next start: whatever the killed one left, writing works at once.
                wanted = known[number % 2]
                if not folder.replace(KEY, wanted) or folder.get(KEY) != wanted:
                    failures["the next start could not write"] += 1
            failures.update(lines)
        left_behind = temporary_files(folder.path)
        for path in left_behind:
            old = time.time() - STALE_AFTER_S - 1.0
            os.utime(path, (old, old))
        folder.replace(KEY, another())
        if temporary_files(folder.path):
            failures["temporary files stayed behind"] += 1
    return {
        "kills": kills,
        "killed_while": {name: phases[name] for name in PHASES},
        "temporary_files_left_by_kills": len(left_behind),
        "failures": dict(failures),
    }


def _report_phases(phase: mmap.mmap) -> None:
    """In the child only: note which step of a write is under way."""

    def noted(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            phase[0] = number
            result = function(*args, **kwargs)
            phase[0] = 0 if number in (4, 5) else 2
            return result

        return call

    flush_file, flush_folder = noted(3, os.fsync), noted(5, os.fsync)
    folder_module.replace_file = noted(2, folder_module.replace_file)
    os.replace = noted(4, os.replace)
    os.fsync = lambda fd: (flush_folder if os.path.isdir(f"/proc/self/fd/{fd}") else flush_file)(fd)
