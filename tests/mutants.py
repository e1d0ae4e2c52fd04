"""python -m tests.mutants [PATTERN ...] [--sample N] [--out FILE]: which mutants no test notices.

A mutant is the package with one small change. mutmut makes them all, finds out which test reaches
which, and runs them (`[tool.mutmut]` in pyproject.toml); here they are drawn and counted, a room of
the package at a time.
"""

import argparse
import fnmatch
import json
import os
import platform
import random
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

MUTANTS = Path("mutants")
# mutmut forks after torch has run, which threads of its own do not survive.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# What mutmut's words for what became of a mutant count as; any other is that a test noticed it.
SURVIVED, UNREACHED = "survived", "reached by no test"
BY_TIME = "noticed, as the tests did not end"
KINDS = {
    "timeout": BY_TIME,
    "segfault": BY_TIME,  # killed, for it used more of the processor than it may
    "survived": SURVIVED,
    "no tests": UNREACHED,
    "not checked": "unknown",
    "skipped": "unknown",
    "suspicious": "unknown",
    "check was interrupted by user": "unknown",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument(
        "patterns", nargs="*", default=["*"], metavar="PATTERN", help="of their names [all]"
    )
    parser.add_argument("--sample", type=int, metavar="N", help="so many of them, at random [all]")
    parser.add_argument("--seed", type=int, default=0, help="of the sample [0]")
    parser.add_argument("--children", type=int, default=os.cpu_count(), help="at a time [cores]")
    parser.add_argument("--keep", action="store_true", help="mutants/ of a run before")
    parser.add_argument("--count", action="store_true", help="what is there, and run nothing")
    parser.add_argument("--out", type=Path, help="write the counts and who survives there")
    args = parser.parse_args()
    if not args.keep and not args.count:
        shutil.rmtree(MUTANTS, ignore_errors=True)
    names = known() if args.count else made(args.children)
    names = drawn(names, args.patterns, args.sample, args.seed)
    if not names:
        parser.error(f"{' '.join(args.patterns)}: no mutant has such a name; mutants/ has them all")
    if not args.count:
        mutmut("run", "--max-children", str(args.children), *names)
    report = {
        "command": "python -m tests.mutants " + " ".join(sys.argv[1:]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("mutmut", "pytest", "hypothesis", "torch")},
        },
        "mutants": len(known()),
        **counted(names, results()),
    }
    text = json.dumps(report, indent=1, ensure_ascii=False)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0


def made(children: int) -> list[str]:
    """All names, after mutmut has made them. It does so when it runs one, whichever that is."""
    mutmut("run", "--max-children", str(children), "adaptive_moe.policy.interval.x_half_width*_1")
    return known()


def known() -> list[str]:
    found = []
    for meta in sorted(MUTANTS.rglob("*.meta")):
        found += json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"]
    return found


def drawn(names: list[str], patterns: list[str], sample: int | None, seed: int) -> list[str]:
    names = [n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in patterns)]
    if sample is None or sample >= len(names):
        return names
    return sorted(random.Random(seed).sample(names, sample))


def results() -> dict[str, str]:
    """What became of each, in mutmut's words."""
    lines = mutmut("results", "--all", "true", quiet=True).splitlines()
    return dict(line.strip().rsplit(": ", 1) for line in lines if "__mutmut_" in line)


def counted(names: list[str], became: dict[str, str]) -> dict[str, Any]:
    kinds = {name: KINDS.get(became.get(name, "not checked"), "noticed") for name in names}
    rooms: dict[str, Counter[str]] = defaultdict(Counter)
    for name, kind in kinds.items():
        place = name.split(".")[1]
        rooms["the package itself" if place.startswith("x_") else place][kind] += 1
    noticed = sum(room["noticed"] + room[BY_TIME] for room in rooms.values())
    return {
        "run": len(names),
        "noticed": noticed,
        "noticed_percent": round(100 * noticed / len(names), 1),
        "of_these_by_time": sum(room[BY_TIME] for room in rooms.values()),
        "rooms": dict(sorted(rooms.items())),
        "survived": [name for name, kind in kinds.items() if kind == SURVIVED],
        "reached_by_no_test": [name for name, kind in kinds.items() if kind == UNREACHED],
    }


def mutmut(*arguments: str, quiet: bool = False) -> str:
    command = [sys.executable, "-m", "mutmut", *arguments]
    done = subprocess.run(
        command,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE if quiet else sys.stderr,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"mutmut {arguments[0]} ended with {done.returncode}; its output is above")
    return done.stdout or ""


if __name__ == "__main__":
    sys.exit(main())
