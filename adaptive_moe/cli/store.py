"""adaptive-moe cache list | show | clear | prune | export | import: what is kept, by hand."""

import argparse
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_moe.disk.file import DECISION_VERSION, Key, Stored, differences
from adaptive_moe.disk.folder import (
    MAX_FILE_BYTES,
    cache_folder,
    read_file,
    stored_files,
    temporary_files,
    write_file,
)
from adaptive_moe.policy.environment import Environment
from adaptive_moe.policy.table import SCHEMA
from adaptive_moe.report import text as report
from adaptive_moe.settings import Mode, read_settings

if TYPE_CHECKING:
    Parsers = argparse._SubParsersAction[argparse.ArgumentParser]

EXPORT_FORMAT = 1
_UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


@dataclass(frozen=True)
class Entry:
    """One file of the cache; stored is None where it would not be believed, and `problem` says
    why."""

    path: Path
    stored: Stored | None
    problem: str = ""

    def line(self) -> str:
        if self.stored is None:
            return f"{self.path.name}: not usable, {self.problem}"
        found = self.stored.table.evidence
        return (
            f"{self.path.name}: {found.shape.describe()} on {found.kernel} "
            f"({found.environment.device}), up to {found.max_tokens} tokens, "
            f"measured {found.created}: {report.summary(self.stored.table)}"
        )

    def plain(self) -> dict[str, Any]:
        found: dict[str, Any] = {"file": str(self.path), "usable": self.stored is not None}
        if self.stored is None:
            return {**found, "problem": self.problem}
        evidence = self.stored.table.evidence
        return {
            **found,
            "shape": vars(evidence.shape),
            "kernel": evidence.kernel,
            "environment": vars(evidence.environment),
            "max_tokens": evidence.max_tokens,
            "measured": evidence.created,
            "summary": report.summary(self.stored.table),
        }


def add_parser(subparsers: "Parsers") -> None:
    """Add `cache` and its commands."""
    cache = subparsers.add_parser("cache", help="list, show, remove, export or import what is kept")
    commands = cache.add_subparsers(dest="cache_command", required=True)
    commands.add_parser("list", help="one line a calibration")
    show = commands.add_parser("show", help="one calibration's table")
    show.add_argument("name", help="its file's name, or the beginning of it")
    commands.add_parser("clear", help="remove all calibrations")
    prune = commands.add_parser("prune", help="remove old calibrations")
    prune.add_argument("--older-than", required=True, metavar="AGE", help="such as 30d, 12h or 2w")
    export = commands.add_parser("export", help="write all usable calibrations to one file")
    export.add_argument("file", type=Path)
    load = commands.add_parser("import", help="keep the calibrations of an exported file")
    load.add_argument("file", type=Path)
    load.add_argument(
        "--anyway", action="store_true", help="also those that this machine would not use"
    )
    for parser in commands.choices.values():
        parser.add_argument("--json", action="store_true", help="print JSON instead")
        parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run one cache command; 0 where it did all that was asked, else 1. ValueError or OSError with
    what to do where it cannot."""
    folder = cache_folder(replace(read_settings(), mode=Mode.OFF))
    return _COMMANDS[args.cache_command](folder, args)


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


def machine_differences(key: Key, here: Mapping[str, Environment], aiter: str | None) -> list[str]:
    """What keeps this machine from ever using a table with that key, field by field.

    here: the environments of this machine by kind, `cpu` and perhaps `gpu`; aiter: the version that
    is installed. What an engine will ask for (capture sizes, largest batch) is not known yet.
    """
    found = [
        f"{name} ({theirs!r}, here {ours!r})"
        for name, theirs, ours in (
            ("schema", key.schema, SCHEMA),
            ("decision", key.request.decision, DECISION_VERSION),
        )
        if theirs != ours
    ]
    ours = here.get("cpu" if key.kernel == "cpu" else "gpu")
    if ours is None:
        found.append(f"environment.device ({key.environment.device!r}, here no GPU)")
    else:
        found += [f"environment.{text}" for text in differences(key.environment, ours)]
    name, _, rest = key.kernel.partition(" ")
    if name == "aiter" and not rest.startswith(f"{aiter} "):
        found.append(f"kernel ({key.kernel!r}, here AITER {aiter or 'is not installed'})")
    return found


def _list(folder: Path, args: argparse.Namespace) -> int:
    found = list(entries(folder))
    lines = [entry.line() for entry in found] or [f"nothing is kept in {folder}"]
    _print(args, lines, {"folder": str(folder), "entries": [entry.plain() for entry in found]})
    return 0


def _show(folder: Path, args: argparse.Namespace) -> int:
    found = [entry for entry in entries(folder) if entry.path.name.startswith(args.name)]
    if len(found) != 1:
        names = ", ".join(entry.path.name for entry in found[:8]) or "none"
        raise ValueError(
            f"{args.name!r} begins {len(found)} names in {folder} ({names}): give one that "
            "`adaptive-moe cache list` prints"
        )
    stored = found[0].stored
    if stored is None:
        raise ValueError(f"{found[0].path} is not usable: {found[0].problem}")
    if args.json:
        print(stored.table.to_json())
    else:
        print("\n".join([found[0].line(), *report.bucket_table(stored.table)]))
    return 0


def _clear(folder: Path, args: argparse.Namespace) -> int:
    removed = [_remove(path) for path in (*stored_files(folder), *temporary_files(folder))]
    _print(args, [f"{len(removed)} files removed from {folder}"], {"removed": removed})
    return 0


def _prune(folder: Path, args: argparse.Namespace) -> int:
    oldest = time.time() - parse_age(args.older_than)
    old = [p for p in (*stored_files(folder), *temporary_files(folder)) if _written(p) < oldest]
    removed = [_remove(path) for path in old]
    line = f"{len(removed)} files older than {args.older_than} removed from {folder}"
    _print(args, [line], {"removed": removed})
    return 0


def _export(folder: Path, args: argparse.Namespace) -> int:
    found = list(entries(folder))
    texts = [entry.stored.to_text() for entry in found if entry.stored is not None]
    bundle = {
        "adaptive_moe_export": EXPORT_FORMAT,
        "exported": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "calibrations": texts,
    }
    args.file.write_text(json.dumps(bundle, indent=1) + "\n", encoding="utf-8")
    skipped = [entry.line() for entry in found if entry.stored is None]
    lines = [f"{len(texts)} calibrations written to {args.file}", *skipped]
    _print(args, lines, {"file": str(args.file), "exported": len(texts), "skipped": skipped})
    return 0


def _import(folder: Path, args: argparse.Namespace) -> int:
    here, aiter = _this_machine()
    lines, imported, refused = [], [], []
    for number, text in enumerate(_exported(args.file), start=1):
        try:
            stored = Stored.from_text(text)
        except ValueError as error:
            refused.append({"number": number, "differences": [str(error)]})
            lines.append(f"calibration {number} is not whole: {error}")
            continue
        name, wrong = stored.key.file_name(), machine_differences(stored.key, here, aiter)
        if wrong:
            lines.append(f"{name} was measured elsewhere:")
            lines += [f"  {field}" for field in wrong]
        if wrong and not args.anyway:
            refused.append({"number": number, "file": name, "differences": wrong})
            lines.append("  not imported; --anyway keeps it for a machine it fits")
            continue
        write_file(folder / name, stored)
        imported.append(name)
        lines.append(f"{name} imported")
    lines.append(f"{len(imported)} imported into {folder}, {len(refused)} refused")
    _print(args, lines, {"folder": str(folder), "imported": imported, "refused": refused})
    return 1 if refused else 0


_COMMANDS = {
    "list": _list,
    "show": _show,
    "clear": _clear,
    "prune": _prune,
    "export": _export,
    "import": _import,
}


def parse_age(text: str) -> float:
    """Seconds of `30d`, `12h`, `90m` or `2w`."""
    match = re.fullmatch(r"(\d{1,6})([mhdw])", text.strip())
    if match is None:
        raise ValueError(f"--older-than={text!r} is not accepted: give such as 30d, 12h, 90m or 2w")
    return int(match[1]) * _UNITS[match[2]]


def _exported(path: Path) -> list[str]:
    if path.stat().st_size > 64 * MAX_FILE_BYTES:
        raise ValueError(f"{path} is too large to be an export ({path.stat().st_size} bytes)")
    try:
        bundle = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    texts = bundle.get("calibrations") if isinstance(bundle, dict) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{path} is not what `adaptive-moe cache export` writes")
    if bundle.get("adaptive_moe_export") != EXPORT_FORMAT:
        raise ValueError(f"{path} was written by another version: export it again with this one")
    return texts


def _this_machine() -> tuple[dict[str, Environment], str | None]:
    import torch

    from adaptive_moe.kernels.aiter import find_aiter
    from adaptive_moe.policy.environment import describe_environment

    here = {"cpu": describe_environment(torch.device("cpu"))}
    if torch.cuda.is_available():
        here["gpu"] = describe_environment(torch.device("cuda", torch.cuda.current_device()))
    install = find_aiter()
    return here, None if install.problem else install.version


def _remove(path: Path) -> str:
    path.unlink(missing_ok=True)
    return path.name


def _written(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return time.time()  # gone meanwhile: nothing to remove


def _print(args: argparse.Namespace, lines: list[str], plain: dict[str, Any]) -> None:
    print(json.dumps(plain, indent=1) if args.json else "\n".join(lines))
