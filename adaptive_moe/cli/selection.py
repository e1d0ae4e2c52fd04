"""Which tables a command is about: what --table names, in the cache folder or in files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptive_moe.cli.options import UsageError, cache_folder_here
from adaptive_moe.models import ModelError, find_model
from adaptive_moe.policy.table import PolicyTable
from adaptive_moe.report.words import calls_words, where_words
from adaptive_moe.store.folder import read_file, stored_files
from adaptive_moe.store.text import StoredTable, read_any


@dataclass(frozen=True)
class TableFile:
    """A table, and the file it was read from."""

    stored: StoredTable
    path: Path

    @property
    def table(self) -> PolicyTable:
        return self.stored.table

    @property
    def engine(self) -> str:
        return self.stored.request.engine

    def describe(self) -> str:
        """One line: what the table is for, and on what it was measured."""
        evidence = self.table.evidence
        return f"{calls_words(evidence.coverage)}; {where_words(evidence)}, for {self.engine}"


@dataclass(frozen=True)
class Selection:
    """Tables, and in words where they come from. unusable: files without one, and why."""

    tables: tuple[TableFile, ...]
    where: str
    unusable: tuple[tuple[Path, str], ...] = ()


def select(table: str | None) -> Selection:
    """The tables that --table names; without it, those of the newest file of the cache folder.

    Raises ValueError saying what to do where that is nothing.
    """
    folder = cache_folder_here()
    if table is None:
        path = max(stored_files(folder), key=_written, default=None)
        if path is None:
            raise UsageError(
                f"nothing is kept in {folder}: run `adaptive-moe calibrate`, or give --table FILE"
            )
        return Selection(tuple(_read(path)), f"{path}, the newest")
    path = Path(table)
    if path.is_dir():
        selection = all_in(path)
        if not selection.tables:
            raise UsageError(f"{path} holds no usable table: give another folder, or a file")
        return selection
    if path.is_file():
        return Selection(tuple(_read(path)), str(path))
    if path.is_absolute() or (path.suffix == ".json" and path.parent != Path(".")):
        raise UsageError(f"{path} does not exist: give a file, or part of a name in {folder}")
    paths = [path for path in stored_files(folder) if table.lower() in path.name]
    paths = paths or _of_model(folder, table)
    if not paths:
        raise UsageError(
            f"--table={table!r} is no file, no part of a name in {folder} and no model with a "
            "table there: `adaptive-moe list` prints what is kept"
        )
    tables = tuple(file for path in paths for file in _read(path))
    where = str(paths[0]) if len(paths) == 1 else f"{len(paths)} files of {folder}"
    return Selection(tables, where)


def all_in(folder: Path) -> Selection:
    """Every stored file of a folder, by name."""
    tables, unusable = [], []
    for path in stored_files(folder):
        try:
            file = TableFile(read_file(path), path)
            name = f"{file.stored.key.name}.json"
            if name != path.name:
                raise ValueError(f"its content belongs into {name}")
            file.table  # noqa: B018  raises where the evidence is not whole
            tables.append(file)
        except (OSError, ValueError, ArithmeticError) as error:
            unusable.append((path, getattr(error, "strerror", None) or str(error)))
    return Selection(tuple(tables), str(folder), tuple(unusable))


def start_of(latest: TableFile) -> Selection:
    """The tables that were kept for the same engine, kernel and machine as this one."""

    def origin(file: TableFile) -> tuple[Any, ...]:
        return file.engine, file.table.evidence.kernel, file.table.evidence.environment

    folder = latest.path.parent
    tables = tuple(f for f in all_in(folder).tables if origin(f) == origin(latest)) or (latest,)
    return Selection(tables, f"{folder}, {latest.engine}")


def _read(path: Path) -> Iterator[TableFile]:
    """The tables of one file."""
    return (TableFile(stored, path) for stored in read_any(path))


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # removed meanwhile
        return 0.0


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
