"""Which tables a command is about: --table names a file of any kind, or part of a stored name."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from adaptive_moe.cli.options import UsageError, cache_folder_here
from adaptive_moe.disk.file import Stored
from adaptive_moe.disk.folder import read_file, stored_files
from adaptive_moe.disk.reader import find, newest, read_any
from adaptive_moe.models import ModelError, find_model
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.report.words import calls_words


@dataclass(frozen=True)
class Found:
    """A table and where it was read; request is what it answers, where a file says so."""

    table: PolicyTable
    path: Path
    engine: str = ""

    def describe(self) -> str:
        """The heading of whatever is printed about it."""
        found = self.table.evidence
        whose = f" for {self.engine}" if self.engine else ""
        device = found.environment.device
        return f"{calls_words(found.coverage)}, on {found.kernel}{whose} ({device})"


@dataclass(frozen=True)
class Sources:
    """Tables and, in words, where they come from."""

    tables: tuple[Found, ...]
    where: str


def add_table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--table",
        metavar="WHICH",
        help="a stored, exported or report file; part of a stored name; or a model [the newest]",
    )


def tables_of(args: argparse.Namespace) -> Sources:
    """What --table names: every table of a file, or every stored one of that name.

    Raises ValueError saying what to do where that is nothing.
    """
    folder = cache_folder_here()
    if args.table is None:
        path = newest(folder)
        if path is None:
            raise UsageError(
                f"nothing is kept in {folder}: run `adaptive-moe calibrate`, or give --table FILE"
            )
        return Sources(tuple(read(path)), f"{path}, the newest")
    path = Path(args.table)
    if path.is_file():
        return Sources(tuple(read(path)), str(path))
    if path.is_absolute() or (path.suffix == ".json" and path.parent != Path(".")):
        raise UsageError(f"{path} does not exist: give a file, or part of a name in {folder}")
    paths = find(folder, args.table) or _of_model(folder, args.table)
    if not paths:
        raise UsageError(
            f"--table={args.table!r} is no file, no part of a name in {folder} and no model with a "
            "table there: `adaptive-moe list` prints what is kept"
        )
    tables = tuple(table for path in paths for table in read(path))
    return Sources(tables, str(paths[0]) if len(paths) == 1 else f"{len(paths)} files of {folder}")


def start_of(args: argparse.Namespace) -> Sources:
    """The tables of a start: what --table names, or all that were kept for the same engine, kernel
    and machine as the newest one."""
    sources = tables_of(args)
    if args.table is not None:
        return sources
    latest = sources.tables[0]
    folder = latest.path.parent
    found = tuple(entry for entry in stored(folder) if _same_start(entry, latest))
    return replace(sources, tables=found, where=f"{folder}, {latest.engine or 'the newest'}")


def stored(folder: Path) -> Iterator[Found]:
    """Every usable table of the store, by name."""
    for path in stored_files(folder):
        try:
            one = read_file(path)
        except (OSError, ValueError):
            continue  # `list` says what is wrong with it
        yield Found(one.table, path, one.request.engine)


def read(path: Path) -> Iterator[Found]:
    """The tables of one file of any kind."""
    for one in read_any(path):
        if isinstance(one, Stored):
            yield Found(one.table, path, one.request.engine)
        else:
            yield Found(one, path)


def _of_model(folder: Path, name: str) -> list[Path]:
    """Stored tables of a known model's sort, with and without its shared experts."""
    try:
        models = [find_model(name)]
    except ModelError:
        return []
    if models[0].shared_experts:
        models.append(models[0].fused())
    wanted = [f"{m.num_experts}x{m.topk}-{m.model_dim}-" for m in models]
    return [path for path in stored_files(folder) if path.name.startswith(tuple(wanted))]


def _same_start(one: Found, other: Found) -> bool:
    ours, theirs = one.table.evidence, other.table.evidence
    return (one.engine, ours.kernel, ours.environment) == (
        other.engine,
        theirs.kernel,
        theirs.environment,
    )
