"""python -m tests.faults [NAME ...] [--short] [--out FILE]: run fault tests, print their counts."""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

# One thread a process: dozens of processes share the machine, and forked ones no thread pool.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# torch writes a page of stack for each connection that a killed rank leaves.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from . import crowd, damaged, disk, kills, ranks

# name: (the full number, the short one)
RUNS: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[], dict[str, Any]]]] = {
    "crowd": (lambda: crowd.run(32, 2), lambda: crowd.run(8, 1)),
    "kills": (lambda: kills.run(300), lambda: kills.run(12)),
    "damaged": (lambda: damaged.run(10_008), lambda: damaged.run(180)),
    "disk": (disk.run, disk.run),
    "ranks": (lambda: ranks.run(8, 20.0), lambda: ranks.run(3, 2.0)),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)} [all]")
    parser.add_argument("--short", action="store_true", help="a few of each, in seconds")
    parser.add_argument("--out", type=Path, help="also write the counts there")
    args = parser.parse_args()
    unknown = set(args.names) - set(RUNS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: give names of {', '.join(RUNS)}")
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{_cpu()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "runs": {},
    }
    failed = []
    for name in args.names or RUNS:
        begun = time.perf_counter()
        found = RUNS[name][args.short]()
        found["took_s"] = round(time.perf_counter() - begun, 1)
        report["runs"][name] = found
        if found.get("failures"):
            failed.append(name)
        print(name, json.dumps(found, indent=1), flush=True)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("failed: " + ", ".join(failed) if failed else "no failure", flush=True)
    return 1 if failed else 0


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
