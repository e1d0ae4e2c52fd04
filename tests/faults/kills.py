"""SIGKILL at random moments of calibrating, writing and renaming."""

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

from adaptive_moe.disk import folder as store_module
from adaptive_moe.disk.folder import Store, key_for
from adaptive_moe.disk.write import STALE_AFTER_S, temporary_files
from adaptive_moe.kernels import load_kernel

from .corrupt import listening
from .crowd import COVERAGES, PLAN, measure
from .made_up import EAGER, key_of, made_up_table
from .processes import finish, kill, start

PHASES = ("between", "calibrating", "writing", "flushing", "renaming", "flushing the folder")


def run(kills: int, seed: int = 0) -> dict[str, Any]:
    """Two in three kills hit a child that only publishes, the others one that also calibrates."""
    torch.set_num_threads(1)
    chance = random.Random(seed)
    kernel = load_kernel("cpu")
    measured_key = key_for(kernel, COVERAGES[0], PLAN, "test")
    measured = measure(kernel, COVERAGES[0])
    known = [made_up_table(n, eager=EAGER[: 8 + n]) for n in range(2)]
    known_key = key_of(known[0])
    assert key_of(known[1]) == known_key
    phases: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    left_behind = 0
    with tempfile.TemporaryDirectory() as folder, mmap.mmap(-1, 1) as phase:
        store = Store(Path(folder) / "cache")
        store.publish({known_key: known[0], measured_key: measured})
        for number in range(kills):
            calibrates = number % 3 == 0

            def work(calibrates: bool = calibrates) -> None:
                _report_phases(phase)
                while True:
                    for table in known:
                        store.publish({known_key: table})
                    if calibrates:
                        phase[0] = 1
                        table = measure(kernel, COVERAGES[0])
                        phase[0] = 0
                        store.publish({measured_key: table})

            child = start(work)
            time.sleep(chance.uniform(0.005, 0.150 if calibrates else 0.060))
            kill(child)
            ended = finish(child)
            if "signal" not in ended:
                failures[f"not killed: {ended}"[-300:]] += 1
            phases[PHASES[phase[0]]] += 1
            phase[0] = 0
            with listening() as lines:
                found = store.load(known_key)
                if found is None or found.table not in known:
                    failures["the last good table is gone"] += 1
                if store.load(measured_key) is None:
                    failures["the last good calibration is gone"] += 1
                # The next start: whatever the killed one left, publishing works at once.
                wanted = known[number % 2]
                published, found = store.publish({known_key: wanted}), store.load(known_key)
                if published != 1 or found is None or found.table != wanted:
                    failures["the next start could not publish"] += 1
            failures.update(lines)
        left_behind = len(temporary_files(store.folder))
        for path in temporary_files(store.folder):
            old = time.time() - STALE_AFTER_S - 1.0
            os.utime(path, (old, old))
        store.publish({known_key: known[0]})
        store.publish({known_key: known[1]})
        remaining = len(temporary_files(store.folder))
    return {
        "kills": kills,
        "killed_while": {name: phases[name] for name in PHASES},
        "temporary_files_left_by_kills": left_behind,
        "of_these_left_by_a_later_write": remaining,
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
    store_module.replace_file = noted(2, store_module.replace_file)
    os.replace = noted(4, os.replace)
    os.fsync = lambda fd: (flush_folder if os.path.isdir(f"/proc/self/fd/{fd}") else flush_file)(fd)
