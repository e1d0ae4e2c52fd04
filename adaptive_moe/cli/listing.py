"""adaptive-moe list: everything that is kept, whoever measured it."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adaptive_moe.cli import output
from adaptive_moe.cli.options import cache_folder_here
from adaptive_moe.disk.file import Stored
from adaptive_moe.disk.folder import read_file, stored_files
from adaptive_moe.report.text import summary
from adaptive_moe.report.words import calls_words


@dataclass(frozen=True)
class Entry:
    """One file of the store; stored is None where it would not be believed, and `problem` says
    why."""

    path: Path
    stored: Stored | None
    problem: str = ""

    def lines(self) -> list[str]:
        if self.stored is None:
            return [f"{self.path.name}: not usable, {self.problem}"]
        found = self.stored.table.evidence
        return [
            f"{self.path.name}",
            f"  {calls_words(found.coverage)}, on {found.kernel} for {self.stored.request.engine} "
            f"({found.environment.device})",
            f"  measured {found.created}: {summary(self.stored.table)}",
        ]

    def plain(self) -> dict[str, Any]:
        found: dict[str, Any] = {"file": str(self.path), "usable": self.stored is not None}
        if self.stored is None:
            return {**found, "problem": self.problem}
        evidence = self.stored.table.evidence
        return {
            **found,
            "engine": self.stored.request.engine,
            "coverage": asdict(evidence.coverage),
            "kernel": evidence.kernel,
            "environment": asdict(evidence.environment),
            "candidates": evidence.candidates,
            "measured": evidence.created,
            "settled": self.stored.table.settled,
            "summary": summary(self.stored.table),
        }


def add_options(parser: argparse.ArgumentParser) -> None:
    output.add_json(parser)


def run(args: argparse.Namespace) -> int:
    folder = cache_folder_here()
    found = list(entries(folder))
    lines = [line for entry in found for line in entry.lines()] or [f"nothing is kept in {folder}"]
    plain = {"folder": str(folder), "entries": [entry.plain() for entry in found]}
    output.report(args, lines, plain)
    return 0


def entries(folder: Path) -> Iterator[Entry]:
    """What is in the folder under a name of ours, by name."""
    for path in stored_files(folder):
        try:
            stored = read_file(path)
        except (OSError, ValueError) as error:
            yield Entry(path, None, str(error))
            continue
        name = stored.key.file_name()
        if name == path.name:
            yield Entry(path, stored)
        else:
            yield Entry(path, None, f"its content belongs into {name}")
