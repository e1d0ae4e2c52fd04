"""Whatever holds tables, for people to look at: a file of the store, or a report.

A store's own loading (folder.py) is stricter: what it returns serves.
"""

import json
from pathlib import Path
from typing import Any

from adaptive_moe.disk.file import Stored
from adaptive_moe.disk.folder import MAX_FILE_BYTES, stored_files
from adaptive_moe.policy.table import PolicyTable

# A report holds a few tables for each model.
MAX_BYTES = 64 * MAX_FILE_BYTES


def read_any(path: Path) -> list[Stored | PolicyTable]:
    """The tables of a file of the store, of an ADAPTIVE_MOE_REPORT or of a table's own JSON, in
    order. OSError, or ValueError saying what is wrong with which of them."""
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES} bytes: it is no file of ours")
    try:
        text = content.decode("utf-8")
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if isinstance(plain, dict) and "sha256" in plain:
        return [_read(path, 1, Stored.from_text, text)]
    tables = plain if isinstance(plain, list) else [plain]
    if not all(isinstance(table, dict) and "coverage" in table for table in tables):
        raise ValueError(
            f"{path} holds no tables: give a file of the cache folder, or one that "
            "ADAPTIVE_MOE_REPORT or `calibrate --output` named"
        )
    texts = [json.dumps(table) for table in tables]
    return [_read(path, n, PolicyTable.from_json, text) for n, text in enumerate(texts, start=1)]


def find(folder: Path, part_of_name: str) -> list[Path]:
    """The store's files whose name contains that text, in any case, by name."""
    part = part_of_name.lower()
    return [path for path in stored_files(folder) if part in path.name]


def newest(folder: Path) -> Path | None:
    """The store's file that was written last; None where there is none."""
    return max(stored_files(folder), key=_written, default=None)


def _written(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:  # removed meanwhile
        return 0.0


def _read(path: Path, number: int, read: Any, text: str) -> Any:
    try:
        return read(text)
    except ValueError as error:
        raise ValueError(f"table {number} of {path} is not whole: {error}") from None
