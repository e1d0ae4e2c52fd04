"""Disks and folders that fail: serving goes on with the table in memory, after one warning."""

import os
import resource
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adaptive_moe.disk.folder import open_store, stored_files
from adaptive_moe.disk.write import temporary_files
from adaptive_moe.settings import Settings

from .corrupt import listening
from .made_up import EAGER, key_of, made_up_table
from .processes import finish, start

STRANGER = 12345


def run() -> dict[str, Any]:
    """Each fault that can be made here, and how; `how` says where it could only be imitated."""
    found: dict[str, Any] = {}
    failures: dict[str, Any] = {}
    for name, fault in FAULTS:
        answer = finish(start(fault))
        result = answer.get("result", answer)
        found[name] = result
        if result.get("skipped") is None and not result.get("survived"):
            failures[name] = result
    return {"faults": found, "failures": failures}


def serve(folder: Path, *, kept: bool, expected_lines: int = 1) -> dict[str, Any]:
    """One start of a rank on that folder: two shapes, loaded in vain, measured, published."""
    tables = [made_up_table(3, eager=EAGER[:8]), made_up_table(4, eager=EAGER[:8], kernel="other")]
    with listening() as lines:
        store = open_store(Settings(cache_dir=str(folder)))
        loaded = [store.load(key_of(table)) for table in tables]
        written = store.publish({key_of(table): table for table in tables})
    survived = (
        loaded == [None, None]
        and len(lines) == expected_lines
        and str(folder) in "".join(lines)
        and written == (len(tables) if kept else 0)
    )
    return {"survived": survived, "written": written, "log": lines}


def full_disk() -> dict[str, Any]:
    """No byte free, then a few: the first write fails at once, or half way."""
    if os.geteuid() != 0:
        return {"skipped": "mounting needs root; see the size limit below"}
    answers = []
    for free in (0, 4096):
        with mounted("size=64k") as folder:
            cache = folder / "cache"
            cache.mkdir(mode=0o700)
            (folder / "filler").write_bytes(bytes(_free(folder) - free))
            answers.append(serve(cache, kept=False))
            if temporary_files(cache) or stored_files(cache):
                answers[-1]["survived"] = False
    return {**answers[0], "survived": all(a["survived"] for a in answers), "how": "tmpfs of 64 KiB"}


def size_limit() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        answer = serve(Path(name) / "cache", kept=False)
        if temporary_files(Path(name) / "cache"):
            answer["survived"] = False
    return {**answer, "how": "RLIMIT_FSIZE, so that a write stops half way (EFBIG)"}


def failing_flush() -> dict[str, Any]:
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with tempfile.TemporaryDirectory() as name:
        os.fsync = fail
        answer = serve(Path(name) / "cache", kept=False)
        if temporary_files(Path(name) / "cache") or stored_files(Path(name) / "cache"):
            answer["survived"] = False
    return {**answer, "how": "os.fsync raises EIO (injected)"}


def read_only_disk() -> dict[str, Any]:
    if os.geteuid() != 0:
        return {"skipped": "mounting needs root; see the read-only folder below"}
    with mounted("size=64k") as folder:
        (folder / "cache").mkdir(mode=0o700)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        return {**serve(folder / "cache", kept=False), "how": "tmpfs remounted read-only"}


def read_only_folder() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "cache"
        folder.mkdir(mode=0o500)
        _become_user(Path(name), folder)
        return {**serve(folder, kept=False), "how": "mode 0500, as a user who is not root"}


def folder_of_another() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "cache"
        folder.mkdir(mode=0o777)
        if os.geteuid() != 0:
            return {"skipped": "giving a folder away needs root"}
        os.chown(folder, STRANGER, STRANGER)
        return {**serve(folder, kept=False), "how": "chown to another user"}


def unreachable_folder() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "file").write_text("")
        return {**serve(Path(name) / "file" / "cache", kept=False), "how": "a file on the way"}


def link_in_place() -> dict[str, Any]:
    """The link is not followed, and what it points at is left alone; it gives way to a file."""
    return _in_place(lambda path, target: path.symlink_to(target))


def pipe_in_place() -> dict[str, Any]:
    return _in_place(lambda path, target: os.mkfifo(path))


def file_of_another() -> dict[str, Any]:
    if os.geteuid() != 0:
        return {"skipped": "giving a file away needs root"}

    def plant(path: Path, target: Path) -> None:
        path.write_text(target.read_text(encoding="utf-8"), encoding="utf-8")
        os.chown(path, STRANGER, STRANGER)

    return _in_place(plant)


def file_others_write() -> dict[str, Any]:
    def plant(path: Path, target: Path) -> None:
        path.write_text(target.read_text(encoding="utf-8"), encoding="utf-8")
        path.chmod(0o666)

    return _in_place(plant)


def _in_place(plant: Callable[[Path, Path], None]) -> dict[str, Any]:
    """Something planted in place of a good file, with that good file (as `target`) at hand."""
    table = made_up_table(3, eager=EAGER[:8])
    with tempfile.TemporaryDirectory() as name:
        away = open_store(Settings(cache_dir=str(Path(name) / "away")))
        away.publish({key_of(table): table})
        target = away.folder / key_of(table).file_name()
        before = target.read_bytes()
        folder = Path(name) / "cache"
        folder.mkdir(mode=0o700)
        plant(folder / target.name, target)
        answer = serve(folder, kept=True)
        now = open_store(Settings(cache_dir=str(folder))).load(key_of(table))
        if target.read_bytes() != before or now is None or now.table != table:
            answer["survived"] = False
    return answer


FAULTS = (
    ("full disk", full_disk),
    ("size limit", size_limit),
    ("failing flush", failing_flush),
    ("read-only disk", read_only_disk),
    ("read-only folder", read_only_folder),
    ("folder of another user", folder_of_another),
    ("folder that cannot be made", unreachable_folder),
    ("link in place of the file", link_in_place),
    ("pipe in place of the file", pipe_in_place),
    ("file of another user", file_of_another),
    ("file that others may write", file_others_write),
)


@contextmanager
def mounted(options: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", name], check=True)
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", name], check=True)


def _free(folder: Path) -> int:
    facts = os.statvfs(folder)
    return facts.f_bavail * facts.f_frsize


def _become_user(*folders: Path) -> None:
    """Root may write anywhere: go on as somebody who may not."""
    if os.geteuid() == 0:
        for folder in folders:
            os.chown(folder, STRANGER, STRANGER)
        os.setuid(STRANGER)
