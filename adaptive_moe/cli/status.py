"""adaptive-moe status: what the servers that use this cache folder run right now."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict

from adaptive_moe.cli import output
from adaptive_moe.cli.options import cache_folder_here
from adaptive_moe.disk.status import ProcessStatus, read_all


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
    plain = {"folder": str(folder), "processes": [asdict(status) for status in found]}
    output.report(args, lines or [nothing], plain)
    return 0


def _lines(status: ProcessStatus) -> Iterator[str]:
    state = "ended" if status.ended else f"runs, as of {status.moment}"
    yield (
        f"{status.engine}, pid {status.pid} on {status.host}, rank {status.rank} of "
        f"{status.ranks}, {status.mode}: {state} {status.written}"
    )
    for table in status.tables:
        yield f"  {table.calls} on {table.kernel} ({table.device})"
        open_ = "" if table.settled else ", some buckets unsettled"
        yield f"    {table.origin}, measured {table.measured}{open_}: {table.decided}"
    for problem in status.problems:
        yield f"  without a table: {problem}"
    for what, counted in (("calls", status.calls), ("captured calls", status.captured)):
        told = ", ".join(f"{number} {name}" for name, number in counted if number)
        if told:
            yield f"  {what}: {told}"
