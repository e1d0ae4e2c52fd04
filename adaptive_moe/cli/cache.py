"""adaptive-moe cache clear | prune | export | import: what is kept, by hand."""

import argparse
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from adaptive_moe.cli import output
from adaptive_moe.cli.listing import entries
from adaptive_moe.cli.options import cache_folder_here
from adaptive_moe.disk.file import DECISION_VERSION, Key, Stored, differences
from adaptive_moe.disk.folder import stored_files, write_file
from adaptive_moe.disk.reader import export_text, read_any
from adaptive_moe.disk.write import temporary_files
from adaptive_moe.policy.environment import Environment
from adaptive_moe.policy.evidence import SCHEMA

_UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def add_options(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="cache_command", required=True, metavar="COMMAND")
    commands.add_parser("clear", help="remove all calibrations")
    prune = commands.add_parser("prune", help="remove old calibrations")
    prune.add_argument("--older-than", required=True, metavar="AGE", help="such as 30d, 12h or 2w")
    export = commands.add_parser("export", help="write all usable calibrations to one file")
    export.add_argument("file")
    load = commands.add_parser("import", help="keep the calibrations of an exported file")
    load.add_argument("file", type=Path)
    load.add_argument(
        "--anyway", action="store_true", help="also those that this machine would not use"
    )
    for command in commands.choices.values():
        output.add_json(command)


def run(args: argparse.Namespace) -> int:
    """Run one cache command; 0 where it did all that was asked, else 1. ValueError or OSError with
    what to do where it cannot."""
    return _COMMANDS[args.cache_command](cache_folder_here(), args)


def machine_differences(key: Key, here: Mapping[str, Environment], aiter: str | None) -> list[str]:
    """What keeps this machine from ever using a table with that key, field by field.

    here: the environments of this machine by kind, `cpu` and perhaps `gpu`; aiter: the version that
    is installed. What an engine will ask for (captured sizes, largest batch) is not known yet.
    """
    found = [
        f"{name} ({theirs!r}, here {ours!r})"
        for name, theirs, ours in (
            ("schema", key.schema, SCHEMA),
            ("decision", key.request.decision, DECISION_VERSION),
        )
        if theirs != ours
    ]
    theirs = key.environment
    ours = here.get("gpu" if theirs.runtime else "cpu")
    if ours is None:
        found.append(f"environment.device ({theirs.device!r}, here no GPU)")
    else:
        if not theirs.runtime:  # how many threads a process has is not a fact of the machine
            ours = replace(ours, compute_units=theirs.compute_units)
        found += [f"environment.{text}" for text in differences(theirs, ours)]
    name, _, rest = key.kernel.partition(" ")
    if name == "aiter" and not rest.startswith(f"{aiter} "):
        found.append(f"kernel ({key.kernel!r}, here AITER {aiter or 'is not installed'})")
    return found


def parse_age(text: str) -> float:
    """Seconds of `30d`, `12h`, `90m` or `2w`."""
    match = re.fullmatch(r"(\d{1,6})([mhdw])", text.strip())
    if match is None:
        raise ValueError(f"--older-than={text!r} is not accepted: give such as 30d, 12h, 90m or 2w")
    return int(match[1]) * _UNITS[match[2]]


def _clear(folder: Path, args: argparse.Namespace) -> int:
    removed = [_remove(path) for path in _all_files(folder)]
    output.report(args, [f"{len(removed)} files removed from {folder}"], {"removed": removed})
    return 0


def _prune(folder: Path, args: argparse.Namespace) -> int:
    oldest = time.time() - parse_age(args.older_than)
    removed = [_remove(path) for path in _all_files(folder) if _written(path) < oldest]
    line = f"{len(removed)} files older than {args.older_than} removed from {folder}"
    output.report(args, [line], {"removed": removed})
    return 0


def _export(folder: Path, args: argparse.Namespace) -> int:
    found = list(entries(folder))
    usable = [entry.stored for entry in found if entry.stored is not None]
    skipped = [line for entry in found if entry.stored is None for line in entry.lines()]
    if not usable:
        nothing = f"nothing in {folder} can be exported: run `adaptive-moe calibrate`"
        raise RuntimeError("; ".join([nothing, *skipped]))
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    output.write(args.file, export_text(usable, now).encode("utf-8"))
    if args.file == output.STDOUT:
        return 0
    lines = [f"{len(usable)} calibrations written to {args.file}", *skipped]
    plain = {"file": args.file, "exported": len(usable), "skipped": skipped}
    output.report(args, lines, plain)
    return 0


def _import(folder: Path, args: argparse.Namespace) -> int:
    here, aiter = _this_machine()
    lines, imported, refused = [], [], []
    for stored in read_any(args.file):
        if not isinstance(stored, Stored):
            raise ValueError(
                f"{args.file} says for no engine what it holds: give a file that `adaptive-moe "
                "cache export` wrote, or one of a cache folder"
            )
        name, wrong = stored.key.file_name(), machine_differences(stored.key, here, aiter)
        if wrong:
            lines.append(f"{name} was measured elsewhere:")
            lines += [f"  {field}" for field in wrong]
        if wrong and not args.anyway:
            refused.append({"file": name, "differences": wrong})
            lines.append("  not imported; --anyway keeps it for a machine it fits")
            continue
        write_file(folder / name, stored)
        imported.append(name)
        lines.append(f"{name} imported")
    lines.append(f"{len(imported)} imported into {folder}, {len(refused)} refused")
    plain = {"folder": str(folder), "imported": imported, "refused": refused}
    output.report(args, lines, plain)
    return 1 if refused else 0


_COMMANDS = {"clear": _clear, "prune": _prune, "export": _export, "import": _import}


def _this_machine() -> tuple[dict[str, Environment], str | None]:
    import torch

    from adaptive_moe.kernels.aiter import find_aiter
    from adaptive_moe.policy.environment import describe_environment

    here = {"cpu": describe_environment(torch.device("cpu"))}
    if torch.cuda.is_available():
        here["gpu"] = describe_environment(torch.device("cuda", torch.cuda.current_device()))
    install = find_aiter()
    return here, None if install.problem else install.version


def _all_files(folder: Path) -> list[Path]:
    return [*stored_files(folder), *temporary_files(folder)]


def _remove(path: Path) -> str:
    path.unlink(missing_ok=True)
    return path.name


def _written(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return time.time()  # gone meanwhile: nothing to remove
