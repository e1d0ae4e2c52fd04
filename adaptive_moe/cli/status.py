"""adaptive-moe status: what the servers that use this cache folder run right now."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from adaptive_moe.cli import output
from adaptive_moe.cli.options import cache_folder_here
from adaptive_moe.disk.status import ProcessStatus, read_all

# Where a table came from, and when it was measured.
ORIGINS = {
    "stored": "from the cache folder, measured",
    "measured": "measured by this process",
    "agreed": "agreed by all ranks, measured",
}
# What became of a call, as adaptive_moe.Counts has it.
CALLS = {
    "chosen": "took what was measured to be faster",
    "baseline": "stayed with the baseline",
    "fixed": "took the policy that the variable names",
    "own": "kept the caller's own policy",
    "passed": "had nothing to choose",
    "odd": "could not be read",
    "unknown": "had no table (yet)",
    "fell_back": "fell back to the baseline",
    "failed": "met a failure of ours",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    output.add_json(parser)


def run(args: argparse.Namespace) -> int:
    folder = cache_folder_here()
    found = read_all(folder)
    lines = [line for status in found for line in _lines(status)]
    nothing = (
        f"no process that uses {folder} has written its status: servers do at their warm-up; with "
        "another ADAPTIVE_MOE_CACHE_DIR they write there"
    )
    plain = {"folder": str(folder), "processes": [_plain(status) for status in found]}
    output.report(args, lines or [nothing], plain)
    return 0


def _plain(status: ProcessStatus) -> dict[str, Any]:
    counted = {"calls": dict(status.calls), "captured": dict(status.captured)}
    return asdict(status) | counted


def _lines(status: ProcessStatus) -> Iterator[str]:
    state = "ended" if status.ended else f"runs, as of {status.moment}"
    yield (
        f"{status.engine}, pid {status.pid} on {status.host}, rank {status.rank} of "
        f"{status.ranks}, {status.mode}: {state} {status.written}"
    )
    for table in status.tables:
        yield f"  {table.calls} on {table.kernel} ({table.device})"
        origin = ORIGINS.get(table.origin, table.origin)
        yield f"    {origin} {table.measured}: {table.decided}"
    for problem in status.problems:
        yield f"  without a table: {problem}"
    told = [f"{n:,} {CALLS.get(name, name)}" for name, n in status.calls if n]
    if told:
        yield f"  calls: {', '.join(told)}"
    graphs = [f"{n:,} calls of {name}" for name, n in status.captured if n]
    if graphs:
        yield f"  the graphs hold {', '.join(graphs)}"
